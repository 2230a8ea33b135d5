"""The ops torch.ops.epskernels.*: definition, fake kernels, compiled kernels, and what stands in where one is missing.

step         (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold) -> x'
step_plain   (x, f, rows, index) -> x': step, at less host time
step_m0      the same -> (x', m0)
step_y       the same -> (x', m0, y')
step_out     the same, written to `out` (and `m0`, `y_out`, `model_input`, where given)
step_        the same, written to x (and the others)
moments      (f, u, rows, index) -> sums over each sample
normal       (seeds, shape, dtype, draw, stream) -> the generator's normals

The compiled kernels register themselves, for CPU and for CUDA tensors. Where one is missing, CUDA tensors run on the Triton
kernel; failing that the reference stands in, and says so once, or raises where EPSKERNELS_FALLBACK=error. That is so of every
call that reaches the ops: of `step`, of torch.ops.epskernels.*, of compiled graphs and exported programs.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..spec import SCHEMAS, STREAM_INITIAL
from .checks import check_moments, check_normal, check_outputs_like, check_step, fail
from .log import log
from .reference_backend import REFERENCE

if hasattr(torch.ops.epskernels, "step"):  # and torch takes no fake kernels from Python for ops so defined
    raise ImportError(
        "epskernels: this process has loaded libepskernels.so, which defines the ops for programs without Python; "
        "import epskernels before it is loaded: it then leaves the ops as they are"
    )
library = torch.library.Library("epskernels", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


# ---- the fake kernels: they check the arguments, and return tensors of the right kind ----


def _fake_step(results: int) -> Callable[..., Any]:
    def fake(x: Tensor, *inputs: Any, **named: Any) -> Tensor | tuple[Tensor, ...]:
        check_step(x, *inputs, **named)
        made = tuple(torch.empty_like(x) for _ in range(results))
        return made if results > 1 else made[0]

    return fake


def _fake_step_out(
    x: Tensor, f: Tensor, *inputs: Any, out: Tensor, m0: Tensor | None = None, y_out: Tensor | None = None,
    model_input: Tensor | None = None, **named: Any,
) -> None:  # fmt: skip
    check_step(x, f, *inputs, **named)
    check_outputs_like(x, f, {"out": out, "m0": m0, "y_out": y_out, "model_input": model_input})


def _fake_step_(
    x: Tensor, f: Tensor, *inputs: Any, m0: Tensor | None = None, y_out: Tensor | None = None,
    model_input: Tensor | None = None, **named: Any,
) -> None:  # fmt: skip
    check_step(x, f, *inputs, **named)
    check_outputs_like(x, f, {"m0": m0, "y_out": y_out, "model_input": model_input})


def _fake_moments(
    f: Tensor, u: Tensor | None = None, rows: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    check_moments(f, u, rows, index)
    return f.new_empty((f.shape[0], 2 if u is None else 4), dtype=torch.float64)


def _fake_normal(
    seeds: Tensor, shape: Sequence[int], dtype: torch.dtype, draw: int = 0, stream: int = STREAM_INITIAL
) -> Tensor:
    check_normal(seeds, shape, dtype, draw, stream)
    return torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)


_FAKES: dict[str, Callable[..., Any]] = {
    "step": _fake_step(1), "step_plain": _fake_step(1), "step_m0": _fake_step(2), "step_y": _fake_step(3),
    "step_out": _fake_step_out, "step_": _fake_step_, "moments": _fake_moments, "normal": _fake_normal,
}  # fmt: skip


# ---- where no kernel was compiled ----

# For each kind of device without a compiled kernel that has been used, the functions by op.
_stand_ins: dict[str, dict[str, Callable[..., Any]]] = {}


def _stand_in(name: str) -> Callable[..., Any]:
    """Where no compiled kernel is registered for a kind of tensor: Triton's on a GPU, else the reference."""

    def stand_in(first: Any, *args: Any, **kwargs: Any) -> Any:
        kind = first.device.type if isinstance(first, torch.Tensor) else "cpu"
        if kind not in _stand_ins:
            _FAKES[name](first, *args, **kwargs)  # what no kernel takes comes here too, such as a sparse tensor
            _stand_ins[kind] = _functions_for(kind)
        return _stand_ins[kind][name](first, *args, **kwargs)

    stand_in.__name__ = f"stand_in_{name}"
    return stand_in


def _functions_for(kind: str) -> dict[str, Callable[..., Any]]:
    """What stands in on this kind of device. Raises where the environment, or a filter of warnings, does not let it."""
    if FAULTS:
        fail("; ".join(FAULTS))
    missing = build.why_missing(kind) if kind in ("cpu", "cuda") else None
    missing = missing or "this version has no kernel for it"
    if build.default_for(kind) == "triton":
        log.debug("%s tensors run on the Triton kernel: %s", kind, missing)
        return triton_functions()
    if kind == "cuda":
        missing += f"; nor is there Triton: {build.why_missing('triton')}"
    if _REFUSES_REFERENCE:
        fail(f"EPSKERNELS_FALLBACK=error, and only the pure PyTorch reference could run on {kind} tensors: {missing}")
    said = f"epskernels runs its pure PyTorch reference, slower, on {kind} tensors: {missing}"
    warnings.warn(said, build.FallbackWarning, stacklevel=4)
    return REFERENCE


def triton_functions() -> dict[str, Callable[..., Any]]:
    """The Triton backend's functions by op; Triton is imported by this call."""
    from .triton_backend import TRITON

    return TRITON


for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"epskernels::{_name}", _fake, lib=library)
    library.impl(_name, _stand_in(_name), "CompositeExplicitAutograd")


build.load_kernels()
# An import never fails by the environment, so that `epskernels info` can say what is wrong: the calls do.
FAULTS = build.environment_faults()
# Who has asked for the reference gets it.
_REFUSES_REFERENCE = (
    os.environ.get("EPSKERNELS_FALLBACK") == "error" and os.environ.get("EPSKERNELS_BACKEND") != "reference"
)


# ---- outputs that are views with the negative bit, such as x.conj().imag: their memory holds the negated values ----


def register_negative(library: torch.library.Library, ops: Any) -> None:
    """What torch does by itself for inputs: it clones them. Of an op that writes a tensor it expects that one back."""

    def memory(tensor: Any) -> Any:
        return torch._neg_view(tensor) if tensor is not None and tensor.is_neg() else tensor

    def into_memory(inputs: Sequence[Any], outputs: Mapping[str, Any], named: Mapping[str, Any]) -> None:
        held = {name: memory(output) for name, output in outputs.items()}
        inputs = [value.resolve_neg() if isinstance(value, torch.Tensor) else value for value in inputs]
        named = {name: value if value is None else value.resolve_neg() for name, value in named.items()}
        ops.step_out(*inputs, **named, **held)
        for name, output in outputs.items():
            if held[name] is not output:
                held[name].neg_()

    def step_out(
        *inputs: Any, out: Tensor, m0: Tensor | None = None, y_out: Tensor | None = None,
        model_input: Tensor | None = None, **named: Any,
    ) -> None:  # fmt: skip
        into_memory(inputs, {"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, named)

    def step_(
        x: Tensor, *inputs: Any, m0: Tensor | None = None, y_out: Tensor | None = None,
        model_input: Tensor | None = None, **named: Any,
    ) -> None:  # fmt: skip
        outputs = {"out": x, "m0": m0, "y_out": y_out, "model_input": model_input}
        try:
            into_memory((x, *inputs), outputs, named)
        except RuntimeError as error:  # it has x for an output
            raise RuntimeError(str(error).replace("epskernels: out:", "epskernels: x:")) from None

    library.impl("step_out", step_out, "Negative")
    library.impl("step_", step_, "Negative")


register_negative(library, torch.ops.epskernels)
