"""The kernels that the tests hold to the reference, all called with tensors of the host.

On the host itself: the CPU kernel with each instruction set; the CUDA kernel's own source as host C++, its blocks and threads
run as loops; the Triton kernel in its interpreter; where EPSKERNELS_TEST_KERNELS names them, the CPU kernel as other compilers
make it, and for Arm (other_cpus.py). On a machine for NVIDIA's virtual instructions (ptx.py): what nvcc and Triton make
of them. With a GPU: the CUDA and the Triton kernel, through copies of the host's
memory in the same layout, so that a misaligned or strided view stays one.
"""

import collections
import contextlib
import functools
import os
import pathlib
import subprocess

import filelock
import pytest
import torch

import epskernels
from epskernels import _C, build, ops, spec
from epskernels.ops import backends, registration

from . import other_cpus, ptx_launch

ROOT = pathlib.Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
GPU_KERNELS = [name for name in ("cuda", "triton") if ON_GPU and not build.why_missing(name)]
HOST_KERNELS = [*_C.cpu_capabilities(), "cuda_on_host"]
if build.interprets_triton() and not build.why_missing("triton"):
    HOST_KERNELS.append("triton")
KERNELS = HOST_KERNELS + GPU_KERNELS
# On the PTX machine, and why not.
MACHINES = {
    "cuda_ptx": None if ptx_launch.NVCC else "nvcc is not on this machine: nothing compiles the CUDA kernel to PTX",
    "triton_ptx": build.why_missing("triton"),
}
if wanted := os.environ.get("EPSKERNELS_TEST_KERNELS"):  # some of them, such as "cuda,triton"
    KERNELS = [name for name in (*KERNELS, *other_cpus.OTHERS) if name in wanted.split(",")]
    MACHINES = {name: why for name, why in MACHINES.items() if name in wanted.split(",")}
READ_ROWS = (*_C.cpu_capabilities(), *other_cpus.OTHERS)  # on the host: they raise where the others give NaN
CPU_KERNELS = [name for name in KERNELS if name in READ_ROWS]


def params(names):
    """For a fixture: these kernels, and those on the PTX machine, skipped where they cannot be."""
    return [
        *names,
        *(pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=str(why))) for name, why in MACHINES.items()),
    ]


def compile_for_host(sources, here, sanitizers, target):
    torch_folder = pathlib.Path(torch.__file__).parent
    include = torch_folder / "include"
    command = [
        "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off",
        "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wl,-Bsymbolic",
        # A 16-byte access at another address, or an index outside an array, ends the process.
        f"-fsanitize={sanitizers}", "-fsanitize-undefined-trap-on-error",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DEPSKERNELS_LIBRARY=epskernels_cuda_on_host",
        "-DEPSKERNELS_KEY=CPU", '-DEPSKERNELS_CUDA_TARGETS="the host"', "-isystem", include,
        "-isystem", include / "torch" / "csrc" / "api" / "include",
        "-I", here, "-I", ROOT / "csrc", "-I", target.parent, "-x", "c++", *sources,
        "-L", torch_folder / "lib", "-ltorch_cpu", "-o", target,
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)


@functools.cache
def cuda_on_host():
    """The ops of csrc/*.cu and csrc/ops_cuda.cpp over tests/support/cuda_on_host, compiled where they have changed."""
    sanitizers = os.environ.get("EPSKERNELS_SANITIZE", "alignment,bounds")
    target = ROOT / "build" / "tests" / f"cuda_on_host-{sanitizers}" / "libepskernels_cuda_on_host.so"
    here = ROOT / "tests" / "support" / "cuda_on_host"
    sources = [*(ROOT / "csrc").glob("*.cu"), ROOT / "csrc" / "ops_cuda.cpp", here / "device.cpp"]
    read = (*here.iterdir(), *(ROOT / "csrc").iterdir(), pathlib.Path(spec.__file__))
    newest = max(path.stat().st_mtime for path in read)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_suffix(".lock")):  # between the processes of a test run
        if not target.exists() or target.stat().st_mtime < newest:
            (target.parent / "spec.h").write_text(spec.cpp_header())
            compile_for_host(sources, here, sanitizers, target)
    library = torch.library.Library("epskernels_cuda_on_host", "DEF")
    for schema in spec.SCHEMAS:
        library.define(schema)
    for name, function in ops.REFERENCE.items():  # as for the package's own ops, what no kernel takes
        library.impl(name, function, "CompositeExplicitAutograd")
    registration.register_negative(library, torch.ops.epskernels_cuda_on_host)
    torch.ops.load_library(target)
    return library, torch.ops.epskernels_cuda_on_host, ptx_launch.Elsewhere(target)


def overload(name, op):
    """What runs this op on a kernel: a torch op, or Triton's Python launcher."""
    if name == "cuda_on_host":
        return getattr(cuda_on_host()[1], op).default
    if name == "cuda_ptx":
        return cuda_on_host()[2].of(overload("cuda_on_host", op))
    if name == "triton_ptx":
        return ptx_launch.triton_functions()[op]
    if name == "triton":
        from epskernels.ops.triton_backend import TRITON

        return TRITON[op]
    if name in other_cpus.OTHERS:
        return other_cpus.overload(name, op)
    return getattr(torch.ops.epskernels, op).default


def why_missing(name):
    """What this machine lacks to run a kernel that was asked for by name, or None."""
    return other_cpus.OTHERS[name].why_missing() if name in other_cpus.OTHERS else None


def functions_of(name):
    return backends.Functions(*(overload(name, op) for op in backends.Functions._fields))


for _name in ("cuda_on_host", *other_cpus.OTHERS, *MACHINES):
    backends.BY_NAME[_name] = (functools.partial(functions_of, _name), None)


current = "torch.ops"  # the name of the active kernel
compared = collections.Counter()  # tensors held to the reference's bits, by kernel


class Mirror:
    """Tensors on the GPU over copies of the host tensors' whole storages, at the same offsets and strides."""

    def __init__(self):
        self.storages = {}

    def to_gpu(self, value):
        if isinstance(value, epskernels.Table):
            return value.to("cuda")
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[storage.data_ptr()] = (host, host.cuda())
        there = self.storages[storage.data_ptr()][1].untyped_storage()
        view = torch.empty(0, dtype=value.dtype, device="cuda")
        view.set_(there, value.storage_offset(), value.shape, value.stride())
        return torch._neg_view(view) if value.is_neg() else view

    def to_host(self, result, given):
        """What the call wrote, in the host's memory; its results, the host's own tensors where it returned what it was given."""
        for host, there in self.storages.values():
            host.copy_(there)
        if isinstance(result, tuple):
            return tuple(self.to_host(part, given) for part in result)
        for value, mirrored in given:
            if result is mirrored:
                return value
        return result.cpu() if isinstance(result, torch.Tensor) else result


def on_gpu(function):
    def run(*args, **kwargs):
        mirror = Mirror()
        there_args = [mirror.to_gpu(value) for value in args]
        there = {key: mirror.to_gpu(value) for key, value in kwargs.items()}
        given = [*zip(args, there_args, strict=True), *((kwargs[key], there[key]) for key in kwargs)]
        return mirror.to_host(function(*there_args, **there), given)

    return run


class Kernel:
    """One of KERNELS, as functions of host tensors: step and normal, and the ops by name."""

    def __init__(self, name):
        self.name = name
        self.gpu = name in GPU_KERNELS
        self.interpreted = name == "triton" and build.interprets_triton()  # some 0.3 s a launch
        self.reads_rows = name in READ_ROWS

    def __str__(self):
        return self.name

    @contextlib.contextmanager
    def active(self, monkeypatch):
        """The public functions run on this kernel."""
        global current
        if missing := why_missing(self.name):
            pytest.skip(f"{self.name}: {missing}")
        current = self.name
        with self._active(monkeypatch):
            yield self
        current = "torch.ops"

    @contextlib.contextmanager
    def _active(self, monkeypatch):
        if self.name in _C.cpu_capabilities():
            before = _C.cpu_capability()
            _C.set_cpu_capability(self.name)
            with epskernels.use_backend("cpu"):
                yield
            _C.set_cpu_capability(before)
            return
        with epskernels.use_backend(self.name):
            if self.gpu:
                for name in ("step", "moments", "guidance_rescale", "dynamic_threshold"):
                    monkeypatch.setattr(epskernels, name, on_gpu(getattr(epskernels, name)))
                normal = epskernels.normal
                on = functools.partial(normal, device="cuda")
                monkeypatch.setattr(epskernels, "normal", lambda *args, **kwargs: on(*args, **kwargs).cpu())
            yield

    def op(self, op):
        function = overload(self.name, op)
        return on_gpu(function) if self.gpu else function
