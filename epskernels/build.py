"""Which compiled parts this installation has, why one is missing, and where a C++ build finds them."""

import functools
import importlib
import importlib.util
import logging
import os
import pathlib
import sys
from types import ModuleType

import torch

from .typing import Backend

__all__ = [
    "BACKENDS", "KERNELS", "FallbackWarning", "cmake_dir", "cuda_targets", "default_for", "environment_faults", "extension",
    "interprets_triton", "library", "load_kernels", "require", "why_missing",
]  # fmt: skip

# What runs: "auto" is the fastest that is there for the tensors' device.
BACKENDS: tuple[Backend, ...] = ("auto", "cpu", "cuda", "triton", "reference")
KERNELS: tuple[Backend, ...] = ("cpu", "cuda", "triton")  # those that an installation may lack
_FOLDER = pathlib.Path(__file__).parent
_NOTES = {"cpu": _FOLDER / "not_built.txt", "cuda": _FOLDER / "not_built_cuda.txt"}
_LIBRARY = _FOLDER / "libepskernels.so"
_CUDA_LIBRARY = _FOLDER / "libepskernels_cuda.so"
_MEND = "install {}, then the package again: pip install --force-reinstall --no-deps PATH_OF_THE_CHECKOUT"
_log = logging.getLogger("epskernels")
_extension: ModuleType | None = None
_why: dict[str, str] = {}


class FallbackWarning(UserWarning):
    """The pure PyTorch reference runs, many times slower, because the kernel for such tensors is missing.

    warnings.simplefilter("error", epskernels.FallbackWarning) makes it an error, as EPSKERNELS_FALLBACK=error does.
    """


def load_kernels() -> None:
    """Load the kernels, whose registration comes with them; the schemas must exist by then.

    _C brings the CPU kernel. The CUDA kernel is loaded where torch was built with CUDA; not on ROCm, whose tensors are on "cuda"
    too. EPSKERNELS_CPU_CAPABILITY forces an instruction set, if the machine has it: generic, avx2 or avx512.
    """
    global _extension
    try:
        _extension = importlib.import_module("epskernels._C")
    except ImportError as error:
        _why["cpu"] = f"the compiled kernels are missing {_because('cpu', error, 'a C++ compiler and torch>=2.11')}"
    else:
        capability = os.environ.get("EPSKERNELS_CPU_CAPABILITY")
        if capability in _extension.cpu_capabilities():
            _extension.set_cpu_capability(capability)
    _load_cuda_kernels()
    for backend in ("cpu", "cuda"):
        _log.debug("%s kernel: %s", backend, _why.get(backend, "loaded"))


def _load_cuda_kernels() -> None:
    if torch.version.hip is not None:  # no compiler makes the kernel for it: not even a mend
        _why["cuda"] = f"this torch ({torch.__version__}) is ROCm's: on AMD's GPUs the Triton kernel runs"
        return
    try:
        if not _CUDA_LIBRARY.exists():
            raise OSError("not built")
        if torch.version.cuda is None:  # its symbols of CUDA's streams would be missing
            _why["cuda"] = f"this torch ({torch.__version__}) was built without CUDA"
        else:
            torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        _why["cuda"] = f"the CUDA kernel is missing {_because('cuda', error, 'nvcc and a torch>=2.11 with CUDA')}"


def _because(backend: str, error: Exception, tool: str) -> str:
    """(why a part is missing); and the mend."""
    note = _NOTES[backend] if _NOTES[backend].exists() else _NOTES["cpu"]
    if note.exists():
        return f"({note.read_text().strip()}); {_MEND.format(tool)}"
    sources = _FOLDER.parent
    if not (sources / "csrc" / "step.h").exists() or importlib.util.find_spec("epskernels._C"):
        return f"({error}); {_MEND.format(tool)}"
    why, mend = f"this is the source tree {sources}, not built for this Python", ""
    for installed in (pathlib.Path(place, "epskernels").resolve() for place in sys.path):
        if installed != _FOLDER.resolve() and (installed / "__init__.py").exists():
            why += f", and it hides the package installed in {installed}"
            mend = "run outside of the source tree, or "
            break
    return f"({why}); {mend}build it there: `make build` or pip install --editable ."


def library() -> pathlib.Path:
    """Path of libepskernels.so: the ops, with their schemas, for a program without Python to link to, or to load with dlopen.

    A Python process has no need of it. Raises RuntimeError where it was not built, saying why.
    """
    if not _LIBRARY.exists():
        raise RuntimeError(f"epskernels: {why_missing() or f'{_LIBRARY} is missing'}")
    return _LIBRARY


def cmake_dir() -> pathlib.Path:
    """Folder for CMake's -Depskernels_DIR: find_package(epskernels) gives the target epskernels::epskernels.

    Raises as `library` does.
    """
    return library().parent / "cmake"


def extension() -> ModuleType | None:
    """epskernels._C, or None."""
    return _extension


def environment_faults() -> list[str]:
    """What is wrong with the variables EPSKERNELS_*, a line each, such as "EPSKERNELS_LOG: expected one of (...), got 'x'".

    An empty variable is one that is not set. The public functions raise these lines as RuntimeError; an import does not.
    """
    expected: dict[str, tuple[str, ...]] = {
        "EPSKERNELS_BACKEND": BACKENDS, "EPSKERNELS_FALLBACK": ("warn", "error"), "EPSKERNELS_LOG": ("debug", "0", "1"),
        "EPSKERNELS_CHECK_ROWS": ("0", "1"),
    }  # fmt: skip
    if _extension:
        expected["EPSKERNELS_CPU_CAPABILITY"] = tuple(_extension.cpu_capabilities())
    given = {name: os.environ[name] for name in expected if os.environ.get(name)}
    faults = [f"{name}: expected one of {expected[name]}, got {value!r}" for name, value in given.items()
              if value not in expected[name]]  # fmt: skip
    backend = given.get("EPSKERNELS_BACKEND")
    if backend in KERNELS and (missing := why_missing(backend)):
        faults.append(f"EPSKERNELS_BACKEND: backend {backend!r} is missing: {missing}")
    return faults


def cuda_targets() -> str | None:
    """What the CUDA kernel was compiled for, such as "CUDA 13.0: sm_80, sm_90, compute_90"; None without one."""
    note = _FOLDER / "built_cuda.txt"
    return note.read_text().strip() if _CUDA_LIBRARY.exists() and note.exists() else None


@functools.cache
def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no GPU is available to torch"


def interprets_triton() -> bool:
    """Whether triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_missing(backend: str = "cpu") -> str | None:
    """None where the backend, "cpu", "cuda" or "triton", can run; else the reason, and the mend where there is one.

    Raises ValueError for another name.
    """
    if backend not in KERNELS:
        raise ValueError(f"backend: expected one of {KERNELS}, got {backend!r}")
    if backend != "triton":
        return _why.get(backend) or (_no_gpu() if backend == "cuda" else None)
    if importlib.util.find_spec("triton") is None:
        wanted = "pip install triton" if torch.version.hip is None else "it comes with torch's own wheels for ROCm"
        return f"triton is not installed; {wanted}"
    return None if interprets_triton() else _no_gpu()


def require(*backends: str) -> None:
    """For the start of a service: returns where each of these backends can run, "cpu" where none is named.

    backends: of "cpu", "cuda" and "triton". Raises RuntimeError with all reasons: a backend that is missing, a variable
    EPSKERNELS_* with a wrong value, an EPSKERNELS_BACKEND that forces another backend. ValueError for another name.
    """
    wanted = backends or ("cpu",)
    reasons = [f"{name}: {missing}" for name in wanted if (missing := why_missing(name))]
    reasons += environment_faults()
    forced = os.environ.get("EPSKERNELS_BACKEND")
    if forced in BACKENDS and forced not in ("auto", *wanted):
        reasons.append(f"EPSKERNELS_BACKEND: expected one of {('auto', *wanted)}, got {forced!r}")
    if reasons:
        raise RuntimeError(f"epskernels: {'; '.join(reasons)}")


def default_for(kind: str) -> str:
    """The backend that runs where none is asked for, on tensors of this kind of device ("cpu", "cuda", ...)."""
    of_kind = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(kind, ())
    return next((name for name in of_kind if not why_missing(name)), "reference")
