"""Launches on the PTX machine, by the package's own launchers: nvcc's code of csrc/*.cu, and Triton's of its kernels.

CUDA: csrc/ops_cuda.cpp over tests/support/cuda_on_host chooses the kernel, the grid and the parameters; the launch comes here.
Triton: ops/triton_backend.py chooses; a process without Triton's interpreter compiles (`python -m tests.support.ptx_launch`).
What was compiled is kept in build/tests/ptx, by the hash of what it was made of.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import filelock
import torch

from epskernels import spec

from . import ptx, sass
from .ptx_memory import Span

ROOT = pathlib.Path(__file__).parents[2]
KEPT = ROOT / "build" / "tests" / "ptx"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = (80, 90, 100)
launched = collections.Counter()  # launches, by kernel's kind and name

architecture = 90  # that of the next launch
inductor = False  # whether Triton's kernels are compiled as Inductor does it
counts = None  # ptx.Counts of the next launches, where they are wanted


class Touched(ctypes.Structure):
    """Mirrors tests/support/cuda_on_host/touched.h."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("samples", "stride", "bytes", "element", "written")
    ]

    def span(self):
        shape, strides = (self.samples, self.bytes), (self.stride, 1)
        return Span(self.name.decode(), self.data or 0, shape, strides, self.element, bool(self.written))


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.c_size_t,
    ctypes.POINTER(Touched), ctypes.c_size_t,
)  # fmt: skip


@contextlib.contextmanager
def on(chosen):
    """CUDA's launches run the code for this architecture."""
    global architecture
    before, architecture = architecture, chosen
    yield
    architecture = before


@contextlib.contextmanager
def counting():
    """What the launches within execute."""
    global counts
    counts = ptx.Counts()
    yield counts
    counts = None


# ---- nvcc's ----


def _digest(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
    return digest.hexdigest()[:16]


def compile_cuda(source, target, number):
    """The PTX of one source file for one architecture."""
    flags = ["-ptx", "-std=c++20", "-O3", "-fmad=false", f"-arch=compute_{number}"]  # CMakeLists.txt's
    subprocess.run([NVCC, *flags, "-I", target.parent, "-I", ROOT / "csrc", source, "-o", target], check=True)


def from_library(name, number, read):
    """The PTX that the package's own library brings for that architecture, if it is no older than what was read."""
    library = ROOT / "epskernels" / "libepskernels_cuda.so"
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in read):
        return None
    texts = sass.cuobjdump("-arch", f"sm_{number}", "--dump-ptx", library).split("Fatbin ptx code:")[1:]
    return next((text[text.index(".version") :] for text in texts if f"{name}_cu" in text), None)


@functools.cache
def cuda_module(name, number):
    """({kernel's symbol on the host: text}, shared variables) of csrc/<name>.cu: the library's, or else compiled."""
    source = ROOT / "csrc" / f"{name}.cu"
    read = [source, pathlib.Path(spec.__file__), *sorted((ROOT / "csrc").glob("*.h"))]
    text = from_library(name, number, read)
    if text is None:
        version = subprocess.run([NVCC, "--version"], check=True, capture_output=True).stdout
        target = KEPT / f"{name}-{_digest(version, *(path.read_bytes() for path in read))}" / f"sm_{number}.ptx"
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_suffix(".lock")):  # between the processes of a test run
            if not target.exists():
                (target.parent / "spec.h").write_text(spec.cpp_header())
                compile_cuda(source, target.with_suffix(".new"), number)
                target.with_suffix(".new").rename(target)
        text = target.read_text()
    entries, shared = ptx.kernels(text)
    return {_on_host(symbol): text for symbol, text in entries.items()}, shared


def _on_host(symbol):
    """nvcc names an anonymous namespace after its file; the host's compiler does not."""
    begin = re.match(r"_ZN10epskernels(?=\d+_GLOBAL__N__)", symbol)
    length = re.match(r"\d+", symbol[begin.end() :])
    return f"{begin[0]}12_GLOBAL__N_1{symbol[begin.end() + length.end() + int(length[0]) :]}"


@functools.lru_cache(64)  # each holds some megabytes
def cuda_machine(symbol, number):
    for name in ("step_cuda", "moments_cuda"):
        entries, shared = cuda_module(name, number)
        if symbol in entries:
            return ptx.Machine(ptx.parse(entries[symbol], shared))
    raise ptx.PtxError(f"nvcc made no {symbol}")


class Elsewhere:
    """Takes the launches of the library over tests/support/cuda_on_host."""

    def __init__(self, path):
        library, self.error = ctypes.CDLL(str(path)), None
        symbols = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        values = {name: int(value, 16) for value, name in re.findall(r"^(\w+) \w (\S+)$", symbols, re.M)}
        setter = library.epskernels_launch_elsewhere
        base = ctypes.cast(setter, ctypes.c_void_p).value - values["epskernels_launch_elsewhere"]
        self.kernels = {base + value: name for name, value in values.items() if "_kernel" in name}
        self.set = lambda function: setter(ctypes.cast(function, ctypes.c_void_p))
        self.callback = LAUNCH(self._launch)

    def _launch(self, kernel, grid, block, parameters, size, touched, tensors):
        try:
            symbol = self.kernels[kernel]
            spans = [touched[i].span() for i in range(tensors)]
            machine = cuda_machine(symbol, architecture)
            machine.launch(grid[:3], block[:3], ctypes.string_at(parameters, size), spans, counts=counts)
            launched[f"sm_{architecture}", symbol] += 1
            return 0
        except Exception as error:  # which may not pass through C++
            self.error = error
            return 1

    def of(self, function):
        """The op, its launches run here."""

        def run(*args, **kwargs):
            self.set(self.callback)
            try:
                return function(*args, **kwargs)
            except RuntimeError:
                if self.error is not None:
                    raise self.error from None
                raise
            finally:
                self.set(None)
                self.error = None

        return run


# ---- Triton's ----

WRITTEN = ("out_ptr", "m0_ptr", "y_out_ptr", "model_input_ptr", "sums_ptr", "to_ptr")


def _argument(value):
    """What Triton compiles for, of an argument of a launch: of integers, whether 1, multiples of 16, of 64 bits."""
    if hasattr(value, "data_ptr"):
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if value is None or value == 1:
        return value
    return (0 if -(2**31) <= value < 2**31 else 2**40) + (16 if value % 16 == 0 else 3)


class Compiler:
    """The process that compiles, started where something is not there yet."""

    process = None

    @classmethod
    def asked(cls, request):
        if cls.process is None:
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            environment["TRITON_CACHE_DIR"] = str(KEPT / "triton-cache")
            command = [sys.executable, "-m", "tests.support.ptx_launch"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            cls.process = subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes)
        cls.process.stdin.write(request + "\n")
        cls.process.stdin.flush()
        answer = cls.process.stdout.readline()
        if not answer:
            raise RuntimeError("Triton's compiler ended")
        return answer


@functools.cache
def _triton_made_of():
    import triton

    folder = pathlib.Path(spec.__file__).parent
    return triton.__version__, spec.cpp_header(), (folder / "ops" / "triton_kernels.py").read_bytes()


@functools.lru_cache(64)  # each holds some megabytes
def triton_machine(request):
    """(Machine, names and types of its parameters, bytes of shared memory)"""
    kept = KEPT / "triton" / f"{_digest(*_triton_made_of(), request)}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        answer = Compiler.asked(request)
        if "error" in json.loads(answer):
            raise RuntimeError(json.loads(answer)["error"])
        kept.with_suffix(f".{os.getpid()}").write_text(answer)
        kept.with_suffix(f".{os.getpid()}").rename(kept)
    made = json.loads(kept.read_text())
    entries, shared = ptx.kernels(made["ptx"])
    (text,) = entries.values()
    return ptx.Machine(ptx.parse(text, shared)), made["signature"], made["shared"]


def launch_triton(kernel, grid, *arguments, num_warps, **constants):
    request = {
        "kernel": kernel,
        "architecture": architecture,
        "inductor": inductor,
        "arguments": [*map(_argument, arguments)],
        "warps": num_warps,
    }
    machine, signature, shared_bytes = triton_machine(json.dumps(request | {"constants": constants}))
    given = dict(zip(signature, arguments, strict=False))
    spans = []
    for name, value in given.items():
        if hasattr(value, "data_ptr") and value.numel():
            size = value.element_size()
            strides = (*(size * n for n in value.stride()), 1)
            spans.append(Span(name, value.data_ptr(), (*value.shape, size), strides, size, name in WRITTEN))
    # Triton's own parameters, behind ours, are scratch memory that is not there: zeros.
    block, places = bytearray(machine.program.parameter_bytes), machine.program.parameters.values()
    for (name, kind), place in zip(((n, k) for n, k in signature.items() if k != "constexpr"), places, strict=False):
        value = given[name].data_ptr() if kind.startswith("*") else given[name]
        size = 4 if kind == "i32" else 8
        block[place : place + size] = value.to_bytes(size, "little", signed=value < 0)
    machine.launch((*grid, 1, 1)[:3], (32 * num_warps, 1, 1), bytes(block), spans, shared_bytes, counts)
    launched["triton", kernel] += 1


def triton_functions():
    """The package's own functions of Triton's backend, their launches run here."""
    import triton.language as tl

    from epskernels.ops import triton_backend

    patches = {
        "INTERPRETED": tl.constexpr(False),
        "_launcher": lambda kernel, device: functools.partial(launch_triton, kernel.__name__),
    }

    def of(function):
        def run(*args, **kwargs):
            before = {name: getattr(triton_backend, name) for name in patches}
            vars(triton_backend).update(patches)
            try:
                return function(*args, **kwargs)
            finally:
                vars(triton_backend).update(before)

        return run

    return {name: of(function) for name, function in triton_backend.TRITON.items()}


class _Pointer:
    def __init__(self, dtype, aligned):
        self.dtype, self.aligned = getattr(torch, dtype), aligned

    def data_ptr(self):
        return 0 if self.aligned else 4


def _serve():
    """Answers each line, a request, with a line: the PTX, its parameters and its shared memory."""
    from triton.backends.nvidia.compiler import CUDABackend

    from epskernels.ops import triton_kernels

    from ..ops.test_triton import _inductor_s_copy, _use_driver

    CUDABackend.make_cubin = lambda *arguments, **named: b""  # nobody reads the machine code
    for line in sys.stdin:
        request = json.loads(line)
        _use_driver(request["architecture"])
        arguments = [_Pointer(**a) if isinstance(a, dict) else a for a in request["arguments"]]
        kernel, options = getattr(triton_kernels, request["kernel"]), {"enable_fp_fusion": False}
        try:
            if request["inductor"]:
                kernel, options = _inductor_s_copy(kernel, KEPT), {"sanitize_overflow": False, "debug": True}
            made = kernel.warmup(*arguments, **request["constants"], grid=(1,), num_warps=request["warps"], **options)
            answer = {"ptx": made.asm["ptx"], "signature": made.src.signature, "shared": made.metadata.shared}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
