"""The checks of the backends written in Python: the same as in csrc/arguments.h and csrc/ops.h, in the same words.

All raise RuntimeError naming the argument, before anything is written.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..spec import (
    BAND_COLUMNS,
    BAND_SHAPES,
    COLUMNS,
    INPUTS,
    OPTIONAL,
    ROW_WIDTHS,
    ROWS_SHAPE,
    SECOND_STATE,
    band_dims_of,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fail(message: str) -> NoReturn:
    """Raises RuntimeError, as the compiled kernels do."""
    raise RuntimeError(f"epskernels: {message}") from None


def shape_of(tensor: Tensor) -> str:
    """For messages, such as (2, 3)."""
    return str(tuple(tensor.shape))


def dtype_name(tensor: Tensor) -> str:
    """For messages, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def _check_type(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """What the dispatcher checks first, in its words."""
    if not isinstance(value, kind):
        found = type(value).__name__
        fail(f"expected a value of type '{expected}' for argument '{name}' but instead found type '{found}'")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        fail(f"{name}: expected a dense tensor, got {layout}")


def _check_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "x") -> None:
    if tensor.device != other.device:
        fail(f"{name}: expected a tensor on {other.device}, as {other_name} is, got one on {tensor.device}")


def _check_like(name: str, tensor: Tensor | None, other_name: str, other: Tensor, dtype: bool = True) -> None:
    if tensor is None:
        return
    _check_device(name, tensor, other, other_name)
    if tensor.shape != other.shape:
        fail(f"{name}: expected shape {shape_of(other)} as {other_name} has, got {shape_of(tensor)}")
    if dtype and tensor.dtype != other.dtype:
        fail(f"{name}: expected dtype {dtype_name(other)} as {other_name} has, got {dtype_name(tensor)}")


def _check_integers(name: str, tensor: Tensor, may_be_scalar: bool, x: Tensor) -> None:
    _check_device(name, tensor, x)
    if tensor.dtype != torch.int64:
        fail(f"{name}: expected dtype int64, got {dtype_name(tensor)}")
    if not (may_be_scalar and tensor.dim() == 0) and tensor.shape != x.shape[:1]:
        fail(f"{name}: expected shape {'() or ' if may_be_scalar else ''}({len(x)},), got {shape_of(tensor)}")


def _check_floats(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """One number for each sample."""
    if tensor is None:
        return
    _check_device(name, tensor, x)
    if tensor.dtype != torch.float32:
        fail(f"{name}: expected dtype float32, got {dtype_name(tensor)}")
    if tuple(tensor.shape) != (x.shape[0],):
        fail(f"{name}: expected shape ({x.shape[0]},), got {shape_of(tensor)}")


# Inputs of a step that are read element by element: an output may be one of them.
ELEMENTWISE = ("x", "f", "u", "m1", "m2", "v", "grad", "noise", "y")


def check_step(
    x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor | None = None, m1: Tensor | None = None,
    m2: Tensor | None = None, v: Tensor | None = None, grad: Tensor | None = None, noise: Tensor | None = None,
    seeds: Tensor | None = None, y: Tensor | None = None, rescale: Tensor | None = None, threshold: Tensor | None = None,
) -> None:  # fmt: skip
    """Everything that can be known without reading values. Raises RuntimeError naming the argument."""
    tensors: tuple[Any, ...] = (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)
    for name, tensor in zip(INPUTS, tensors, strict=True):
        if tensor is not None or name not in OPTIONAL:
            _check_type(name, tensor, torch.Tensor, "Optional[Tensor]" if name in OPTIONAL else "Tensor")
            _check_dense(name, tensor)
    for name, tensor in (("x", x), ("f", f)):
        if tensor.dtype not in DTYPES:
            fail(f"{name}: expected dtype float32, float16 or bfloat16, got {dtype_name(tensor)}")
    if x.dim() < 1 or x.numel() == 0:
        fail(f"x: expected shape (B, ...) with at least one element, got {shape_of(x)}")
    _check_like("f", f, "x", x, dtype=False)
    for name, tensor in (("u", u), ("v", v)):
        _check_like(name, tensor, "f", f)
    for name, tensor in (("m1", m1), ("m2", m2), ("y", y), ("grad", grad), ("noise", noise)):
        _check_like(name, tensor, "x", x)
    _check_device("rows", rows, x)
    if rows.dtype != torch.float32:
        fail(f"rows: expected dtype float32, got {dtype_name(rows)}")
    if rows.dim() != 2 or rows.shape[1] not in ROW_WIDTHS or rows.shape[0] < 1:
        fail(f"rows: expected shape {ROWS_SHAPE} with R >= 1, got {shape_of(rows)}")
    if rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]):
        fail(f"rows: expected contiguous rows, got strides {tuple(rows.stride())}")
    _check_integers("index", index, True, x)
    if seeds is not None:
        _check_integers("seeds", seeds, False, x)
        if noise is not None:
            fail("noise: expected seeds or noise, got both")
    _check_floats("rescale", rescale, x)
    _check_floats("threshold", threshold, x)


def check_moments(f: Tensor, u: Tensor | None = None, rows: Tensor | None = None, index: Tensor | None = None) -> None:
    """Of `moments`, as check_step of the step."""
    _check_type("f", f, torch.Tensor, "Tensor")
    if (rows is None) != (u is None) or (index is None) != (u is None):
        fail("u, rows, index: expected all of them, or none")
    _check_dense("f", f)
    if f.dtype not in DTYPES:
        fail(f"f: expected dtype float32, float16 or bfloat16, got {dtype_name(f)}")
    if f.dim() < 1 or f.numel() == 0:
        fail(f"f: expected shape (B, ...) with at least one element, got {shape_of(f)}")
    if u is not None and rows is not None and index is not None:
        check_step(f, f, rows, index, u)


def rows_in_use(rows: Tensor, index: Tensor) -> dict[int, dict[str, float]]:
    """{i: the row's columns by name} of the rows that index names; reads both on the host."""
    used = index.reshape(-1).unique().tolist()
    for i in used:
        if not 0 <= i < len(rows):
            fail(f"index: expected values in [0, {len(rows)}), got {i}")
    found = {}
    for i in used:
        row = found[i] = dict(zip(COLUMNS + BAND_COLUMNS, rows[i].tolist(), strict=False))
        for column, (name, value) in enumerate(row.items()):
            # No negative zero for a clip: its bounds have the signs that one expects.
            good_clip = value >= 0 and math.copysign(1, value) > 0
            if not (good_clip if name == "clip" else math.isfinite(value)):
                fail(f"rows: expected finite coefficients and clip >= 0, got {value} in row {i}, column {column}")
        for name in ("draw", "guided_channels"):
            if not (0 <= row[name] < 2**24 and row[name] == int(row[name])):
                fail(f"rows: expected {name} to be an integer in [0, 2^24), got {row[name]} in row {i}")
    return found


# What a row asks for: the coefficient, and the argument that must then be there.
_HISTORY = {"c_m1": "m1", "c_m2": "m2", "c_y": "y", "k_m1": "m1", "k_m2": "m2", "k_y": "y"}


def check_values(inputs: Mapping[str, Any], writes_y: bool) -> None:
    """What the rows in use ask for; reads index, rows and threshold on the host. inputs: by name; writes_y: there is a y_out."""
    given = {name for name in INPUTS if inputs.get(name) is not None} | ({"y_out"} if writes_y else set())
    given |= {"seeds or noise"} if given & {"seeds", "noise"} else set()
    for i, row in rows_in_use(inputs["rows"], inputs["index"]).items():
        needs = [("u", "g is not 1", row["g"] != 1)]
        needs += [(argument, f"{column} is not 0", row[column] != 0) for column, argument in _HISTORY.items()]
        needs.append(("y_out", "k_x, k_m0, k_m1, k_m2 or k_y is not 0", any(row[column] for column in SECOND_STATE)))
        needs.append(("seeds or noise", "c_noise is not 0", row["c_noise"] != 0))
        learned = row["logvar_min"] != 0 or row["logvar_max"] != 0
        needs.append(("v", "logvar_min and logvar_max are not 0", learned))
        for argument, why, asked in needs:
            if asked and argument not in given:
                fail(f"{argument}: missing, and row {i} needs it ({why})")
        if any(row.get(column) for column in BAND_COLUMNS[:3]):
            dims = band_dims_of(inputs["x"].dim())
            if row["band_dims"] != dims or dims == 0:
                if row["band_dims"] not in BAND_SHAPES:
                    fail(f"rows: expected band_dims to be 1 or 2, got {row['band_dims']} in row {i}")
                expected = BAND_SHAPES[int(row["band_dims"])]
                fail(f"x: expected shape {expected}, as row {i} corrects a band of it, got {shape_of(inputs['x'])}")
    if "threshold" in given:
        for sample, value in enumerate(inputs["threshold"].tolist()):
            if value <= 0 or value == math.inf:
                fail(f"threshold: expected finite values above 0, got {value} for sample {sample}")


def check_memory(tensors: Mapping[str, Tensor | None]) -> None:
    """Of tensors by name, or None, that a kernel is about to read or write."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_meta or tensor.numel() == 0:
            continue
        if tensor.untyped_storage().data_ptr() == 0:  # a view's own address is its offset then
            fail(f"{name}: expected a tensor with memory, got one whose storage was freed")


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_outputs_like(x: Tensor, f: Tensor, outputs: Mapping[str, Any]) -> None:
    """What can be known of the outputs without looking at their memory."""
    for name, output in outputs.items():
        optional = name in ("m0", "y_out", "model_input")
        if output is None and optional:
            continue
        _check_type(name, output, torch.Tensor, "Optional[Tensor]" if optional else "Tensor")
        _check_dense(name, output)
        if name == "model_input":
            _check_model_input(output, x, f)
        else:
            _check_like(name, output, "x", x)


def _check_model_input(model_input: Tensor, x: Tensor, f: Tensor) -> None:
    _check_device("model_input", model_input, x)
    if (
        model_input.dim() != x.dim()
        or model_input.shape[1:] != x.shape[1:]
        or model_input.shape[0] not in (x.shape[0], 2 * x.shape[0])
    ):
        fail(f"model_input: expected shape {shape_of(x)}, or twice the batch, got {shape_of(model_input)}")
    if model_input.dtype != f.dtype:
        fail(f"model_input: expected dtype {dtype_name(f)} as f has, got {dtype_name(model_input)}")


def check_outputs(outputs: Mapping[str, Tensor | None], inputs: Mapping[str, Any]) -> None:
    """Of {"out" or "x": tensor, "m0", "y_out", "model_input": tensor or None}, given all inputs by name: each of its shape, and
    apart from all the others, or, but for model_input, exactly one of the inputs that are read element by element."""
    check_outputs_like(inputs["x"], inputs["f"], outputs)
    for name, output in outputs.items():
        if output is None:
            continue
        _check_output(name, output, inputs)
        for other in list(outputs)[: list(outputs).index(name)]:
            _check_overlap(name, output, other, outputs[other], False)


def _check_output(name: str, out: Tensor, inputs: Mapping[str, Tensor | None]) -> None:
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
        if stride < reach:
            fail(f"{name}: expected every element at its own address, got overlapping strides")
        reach += stride * (size - 1)
    for other_name, other in inputs.items():
        _check_overlap(name, out, other_name, other, other_name in ELEMENTWISE and name != "model_input")


def _check_overlap(name: str, out: Tensor, other_name: str, other: Tensor | None, may_be_same: bool) -> None:
    """An output may be a tensor read element by element (same memory, same layout) or lie apart from it."""
    if other is None:
        return
    (begin, end), (other_begin, other_end) = _extent(out), _extent(other)
    if other_begin >= end or other_end <= begin or _interleaved(out, other):
        return
    if may_be_same and other_begin == begin and other.dtype == out.dtype and _strides(other) == _strides(out):
        return
    fail(f"{name}: overlaps the memory of {other_name}{' without being the same tensor' if may_be_same else ''}")


def _strides(tensor: Tensor) -> list[int]:
    """Of the dimensions that are stepped along."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Samples of two tensors that take turns in one buffer, as channel halves do."""
    if a.dim() != b.dim() or a.stride(0) * a.element_size() != b.stride(0) * b.element_size() or a.stride(0) == 0:
        return False
    if not (a[0].is_contiguous() and b[0].is_contiguous()):
        return False
    stride = a.stride(0) * a.element_size()
    distance = (b.data_ptr() - a.data_ptr()) % stride
    return distance >= a[0].numel() * a.element_size() and distance + b[0].numel() * b.element_size() <= stride


def check_normal(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype, draw: int, stream: int) -> None:
    """Of `normal`, as check_step of the step."""
    _check_type("seeds", seeds, torch.Tensor, "Tensor")
    _check_dense("seeds", seeds)
    integers = (int, np.integer, torch.SymInt)
    for name, value in (*(("shape", size) for size in shape), ("draw", draw), ("stream", stream)):
        _check_type(name, value, integers, "List[int]" if name == "shape" else "int")
    if seeds.dtype != torch.int64:
        fail(f"seeds: expected dtype int64, got {dtype_name(seeds)}")
    if seeds.dim() != 1:
        fail(f"seeds: expected shape (B,), got {shape_of(seeds)}")
    numel = seeds.shape[0]  # len() would make a symbolic size a number
    if numel == 0:
        fail("seeds: expected at least one seed, got none")
    for size in shape:
        if size < 1:
            fail(f"shape: expected sizes of at least 1, got {size}")
        numel = numel * size
        if numel > 2**62:
            fail("shape: too many elements for a tensor")
    for name, value in (("draw", draw), ("stream", stream)):
        if not 0 <= value < 2**32:
            fail(f"{name}: expected a value in [0, 2^32), got {value}")
    if dtype not in DTYPES:
        fail(f"dtype: expected float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")
