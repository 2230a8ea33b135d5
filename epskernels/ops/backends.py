"""The choice of backend: by a call's argument, by a context, for the process; and what a log says of it."""

import contextlib
import contextvars
import os
import threading
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.compiler import is_compiling

from .. import build
from ..build import BACKENDS
from ..typing import Backend
from .checks import ELEMENTWISE, fail
from .log import log
from .reference_backend import REFERENCE
from .registration import FAULTS, triton_functions


class Functions(typing.NamedTuple):
    """What the public functions call."""

    step: Callable[..., Any]
    step_m0: Callable[..., Any]
    step_y: Callable[..., Any]
    step_out: Callable[..., Any]
    moments: Callable[..., Any]
    normal: Callable[..., Any]


DISPATCHED = Functions(*(getattr(torch.ops.epskernels, name).default for name in Functions._fields))
REFERENCE_FUNCTIONS = Functions(*(REFERENCE[name] for name in Functions._fields))

# By backend: how to get its functions, and the only kind of device that it takes.
BY_NAME: dict[str, tuple[Callable[[], Functions], str | None]] = {
    "auto": (lambda: DISPATCHED, None),
    "cpu": (lambda: DISPATCHED, "cpu"),
    "cuda": (lambda: DISPATCHED, "cuda"),
    "triton": (lambda: Functions(*(triton_functions()[name] for name in Functions._fields)), None),
    "reference": (lambda: REFERENCE_FUNCTIONS, None),
}
KERNEL_NAMES = {
    "cpu": "the CPU kernel", "cuda": "the CUDA kernel", "triton": "the Triton kernel", "reference": "the reference",
}  # fmt: skip
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("epskernels_backend", default=None)


def _check_backend(name: str) -> str | None:
    if name not in BY_NAME:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    missing = build.why_missing(name) if name in build.KERNELS else None
    if missing:
        raise RuntimeError(f"epskernels: backend {name!r} is missing: {missing}")
    return None if name == "auto" else name


DEFAULT_BACKEND = None if FAULTS else _check_backend(os.environ.get("EPSKERNELS_BACKEND") or "auto")
_lock = threading.Lock()
# Contexts open in any thread, the process's own choice counted in: while there are none, nothing is looked up.
open_choices = 1 if FAULTS or DEFAULT_BACKEND else 0


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the context, `step`, `moments` and `normal` run on this backend: "auto", "cpu", "cuda" (compiled C++ and CUDA C++),
    "triton" or "reference".

    Raises ValueError for an unknown one, RuntimeError for one that this installation or machine lacks, saying why.
    EPSKERNELS_BACKEND sets the same for a whole process; the functions' own argument `backend` comes first.
    torch.ops.epskernels.* called directly always dispatch by device; compiled graphs do but for the argument.
    """
    global open_choices
    token = _forced.set(_check_backend(name) or "auto")
    with _lock:
        open_choices += 1
    try:
        yield
    finally:
        with _lock:
            open_choices -= 1
        _forced.reset(token)


def chosen_name(backend: str | None) -> str:
    """The backend of a call with this argument."""
    if is_compiling():
        return backend or "auto"
    return backend or _forced.get() or DEFAULT_BACKEND or "auto"


def chosen(tensor: Any, backend: str | None) -> Functions:
    """The functions of the backend that was asked for: by the call, else by the context, else for the process."""
    if FAULTS:
        fail("; ".join(FAULTS))
    if is_compiling() and backend in (None, *BY_NAME):
        return BY_NAME[backend or "auto"][0]()
    if backend is not None:
        _check_backend(backend)
    name = chosen_name(backend)
    functions, kind = BY_NAME[name]
    if kind and isinstance(tensor, torch.Tensor) and tensor.device.type != kind:
        fail(f"backend {name!r} was asked for, and the tensors are on {tensor.device}")
    return functions()


def log_call(name: str, functions: Functions, backend: str | None, tensors: Mapping[str, Any]) -> None:
    """Which kernel a call runs on, why, and what keeps it from its fast path."""
    tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor) and value.numel()}
    if not tensors:
        return  # about to be refused
    first = next(iter(tensors.values()))
    kind = first.device.type
    why = "by default"
    for choice, said in (
        (DEFAULT_BACKEND, "by EPSKERNELS_BACKEND"),
        (_forced.get(), "by use_backend"),
        (backend, "as asked"),
    ):
        why = said if choice else why
    runs = "reference" if functions is REFERENCE_FUNCTIONS else "triton"
    runs = build.default_for(kind) if functions is DISPATCHED else runs
    extension = build.extension()
    capability = f" ({extension.cpu_capability()})" if runs == "cpu" and extension else ""
    kernel = KERNEL_NAMES[runs] + capability
    slower = []
    for key, tensor in tensors.items():
        if key not in (*ELEMENTWISE, "rows", "out", "m0", "y_out", "model_input") or not tensor.dim():
            continue
        size = tensor.element_size()
        if key != "rows" and not tensor[0].is_contiguous():
            slower.append(f"{key} goes through a contiguous copy")
        elif kind == "cuda" and (tensor.data_ptr() % 16 or (len(tensor) > 1 and tensor.stride(0) * size % 16)):
            effect = "is copied" if key == "rows" else "makes accesses of single elements"
            slower.append(f"{key}, whose samples do not begin at multiples of 16 bytes, {effect}")
    log.debug("%s on %s runs on %s, %s%s", name, first.device, kernel, why, "".join(f"; {text}" for text in slower))
