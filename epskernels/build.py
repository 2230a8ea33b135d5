"""Which compiled parts this installation has, and why one is missing."""

import importlib
import os
import pathlib

_NOTE = pathlib.Path(__file__).with_name("not_built.txt")
_MEND = "install a C++ compiler and torch>=2.11, then the package again: pip install --force-reinstall --no-deps ..."
_extension = None
_why = None


def load_kernels():
    """Import epskernels._C, which brings the CPU kernel's registration with it; the schemas must exist by then.

    EPSKERNELS_CPU_CAPABILITY forces an instruction set: generic, avx2 or avx512. ValueError for one that the machine lacks.
    """
    global _extension, _why
    try:
        _extension = importlib.import_module("epskernels._C")
    except ImportError as error:
        reason = _NOTE.read_text().strip() if _NOTE.exists() else str(error)
        _why = f"the compiled kernels are missing ({reason}); {_MEND}"
        return
    if capability := os.environ.get("EPSKERNELS_CPU_CAPABILITY"):
        _extension.set_cpu_capability(capability)


def extension():
    """epskernels._C, or None."""
    return _extension


def why_missing():
    """None where the compiled kernels are there; else the reason and the mend, one sentence."""
    return _why
