import pytest
import torch

from epskernels import build


@pytest.fixture(autouse=True)
def _same_numbers_each_run():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def extension():
    """epskernels._C: the tests prove the compiled kernels, so a build without them fails."""
    assert build.extension() is not None, build.why_missing()
    return build.extension()
