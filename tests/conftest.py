import pytest
import torch

import epskernels
from epskernels import _C  # the tests prove the compiled kernels: a build without them fails here


@pytest.fixture(autouse=True)
def _same_numbers_each_run():
    torch.manual_seed(0)


@pytest.fixture
def extension():
    return _C


@pytest.fixture(params=["reference", *_C.cpu_capabilities()])
def backend(request):
    """The public functions run on the reference, or on the kernel with one instruction set."""
    before = _C.cpu_capability()
    if request.param == "reference":
        with epskernels.use_backend("reference"):
            yield request.param
    else:
        _C.set_cpu_capability(request.param)
        with epskernels.use_backend("cpu"):
            yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture(scope="module")
def one_thread():
    """For many small tensors: on a busy machine PyTorch's threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
