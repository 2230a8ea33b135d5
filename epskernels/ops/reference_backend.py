"""The reference as a backend of every op: checked arguments, results in the layout that the other backends return."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import INPUTS, STREAM_INITIAL
from .checks import check_moments, check_normal, check_outputs, check_step, check_values, rows_in_use
from .reference import moments_reference, normal_reference, step_reference


def _reference(
    inputs: Sequence[Tensor | None], named: Mapping[str, Tensor | None], writes_y: bool = False
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What step_reference returns, and all inputs by name."""
    by_name: dict[str, Any] = {**dict(zip(INPUTS, inputs, strict=False)), **named}
    check_step(**by_name)
    check_values(by_name, writes_y)
    return step_reference(**by_name), by_name


def _like(results: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """In the layout that torch.empty_like(x) has, as every backend returns it."""
    return tuple(torch.empty_like(x).copy_(result) for result in results)


def reference_step(*inputs: Tensor | None, **named: Tensor | None) -> Tensor:
    """x'."""
    results, by_name = _reference(inputs, named)
    return _like(results[:1], by_name["x"])[0]


def reference_step_m0(*inputs: Tensor | None, **named: Tensor | None) -> tuple[Tensor, ...]:
    """(x', m0)."""
    results, by_name = _reference(inputs, named)
    return _like(results[:2], by_name["x"])


def reference_step_y(*inputs: Tensor | None, **named: Tensor | None) -> tuple[Tensor, ...]:
    """(x', m0, y')."""
    results, by_name = _reference(inputs, named, writes_y=True)
    return _like(results[:3], by_name["x"])


def _reference_into(
    outputs: Mapping[str, Tensor | None], inputs: Sequence[Tensor | None], named: Mapping[str, Tensor | None]
) -> None:
    results, by_name = _reference(inputs, named, writes_y=outputs["y_out"] is not None)
    check_outputs(outputs, by_name)
    for output, result in zip(outputs.values(), results, strict=True):
        if output is not None:
            for half in output.split(len(result)):
                half.copy_(result)


def reference_step_out(
    *inputs: Tensor | None, out: Tensor, m0: Tensor | None = None, y_out: Tensor | None = None,
    model_input: Tensor | None = None, **named: Tensor | None,
) -> None:  # fmt: skip
    """Writes to the outputs that are given."""
    _reference_into({"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, inputs, named)


def reference_step_(
    x: Tensor, *inputs: Tensor | None, m0: Tensor | None = None, y_out: Tensor | None = None,
    model_input: Tensor | None = None, **named: Tensor | None,
) -> None:  # fmt: skip
    """Writes x' to x, and the other outputs that are given."""
    _reference_into({"x": x, "m0": m0, "y_out": y_out, "model_input": model_input}, (x, *inputs), named)


def reference_normal(
    seeds: Tensor, shape: Sequence[int], dtype: torch.dtype, draw: int = 0, stream: int = STREAM_INITIAL
) -> Tensor:
    """The generator's normals, (B, *shape)."""
    check_normal(seeds, shape, dtype, draw, stream)
    return normal_reference(seeds, shape, draw, stream).to(dtype).contiguous()


def reference_moments(
    f: Tensor, u: Tensor | None = None, rows: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """Sums over each sample, float64 (B, 2) or (B, 4)."""
    check_moments(f, u, rows, index)
    if rows is not None and index is not None and f.device.type == "cpu":
        rows_in_use(rows, index)
    return moments_reference(f, u, rows, index)


REFERENCE: dict[str, Callable[..., Any]] = {
    "step": reference_step,
    "step_plain": reference_step,
    "step_m0": reference_step_m0,
    "step_y": reference_step_y,
    "step_out": reference_step_out,
    "step_": reference_step_,
    "moments": reference_moments,
    "normal": reference_normal,
}
