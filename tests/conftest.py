import os
import pathlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import epskernels
from epskernels import _C  # the tests prove the compiled kernels: a build without them fails here

from .support import kernels, pairwise
from .support.kernels import KERNELS, Kernel, params


def pytest_configure(config):
    config.pluginmanager.register(pairwise)


@pytest.fixture(autouse=True)
def _same_numbers_each_run():
    # Without a GPU not torch.manual_seed: it notes the call's stack for every device there might be, in milliseconds.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.fixture
def extension():
    return _C


@pytest.fixture(params=params(KERNELS))
def kernel(request, monkeypatch):
    """The public functions run on this kernel."""
    with Kernel(request.param).active(monkeypatch) as kernel:
        yield kernel


@pytest.fixture(params=params(["reference", *KERNELS]))
def backend(request, monkeypatch):
    """The public functions run on the reference, or on one of the kernels."""
    if request.param == "reference":
        with epskernels.use_backend("reference"):
            yield request.param
    else:
        with Kernel(request.param).active(monkeypatch):
            yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """For many small tensors: on a busy machine PyTorch's threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Their fixtures compile, or start processes, for many tests at once.
ON_ONE_WORKER = (
    "test_bench",
    "test_cli",
    "test_cuda_build",
    "test_distributed",
    "test_export",
    "test_install",
    "test_other_cpus",
    "test_site",
    "test_triton",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What compiles cuda_on_host, in half a minute, comes first, and its other tests last: no worker waits for the other's."""
    need_it = [item for item in items if "cuda_on_host" in item.nodeid or "cuda_ptx" in item.nodeid]
    last = {item for item in need_it[1:] if item.path.stem not in ON_ONE_WORKER}
    items[:] = [
        *need_it[:1],
        *(item for item in items if item not in last and item not in need_it[:1]),
        *(i for i in items if i in last),
    ]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """xdist's own marker for this, xdist_group, does nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = pathlib.PurePath(nodeid.partition("::")[0])
            return str(file) if file.stem in ON_ONE_WORKER else nodeid

    return Scheduling(config, log)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compared"] = dict(kernels.compared)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    kernels.compared.update(getattr(node, "workeroutput", {}).get("compared", {}))


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{name} {count:,}" for name, count in kernels.compared.items())
    if counts:
        terminalreporter.write_line(f"tensors held to the reference's bits: {counts}")
