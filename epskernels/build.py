"""Which compiled parts this installation has, and why one is missing."""

import importlib
import pathlib

_NOTE = pathlib.Path(__file__).with_name("not_built.txt")
_MEND = "install a C++ compiler and torch>=2.11, then the package again: pip install --force-reinstall --no-deps ..."
_extension = None
_why = None


def load_kernels():
    """Import epskernels._C, which brings the CPU kernel's registration with it; the schemas must exist by then."""
    global _extension, _why
    try:
        _extension = importlib.import_module("epskernels._C")
    except ImportError as error:
        reason = _NOTE.read_text().strip() if _NOTE.exists() else str(error)
        _why = f"the compiled kernels are missing ({reason}); {_MEND}"


def extension():
    """epskernels._C, or None."""
    return _extension


def why_missing():
    """None where the compiled kernels are there; else the reason and the mend, one sentence."""
    return _why
