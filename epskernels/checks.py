"""The checks of the backends written in Python: the same as in csrc/arguments.h and csrc/ops.h, in the same words.

All raise RuntimeError naming the argument, before anything is written.
"""

import math

import numpy as np
import torch

from .table import COLUMNS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fail(message):
    raise RuntimeError(f"epskernels: {message}")


def shape_of(tensor):
    return str(tuple(tensor.shape))


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _check_type(name, value, kind, expected):
    """What the dispatcher checks first, in its words."""
    if not isinstance(value, kind):
        found = type(value).__name__
        fail(f"expected a value of type '{expected}' for argument '{name}' but instead found type '{found}'")


def _check_dense(name, tensor):
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        fail(f"{name}: expected a dense tensor, got {layout}")


def _check_like(name, tensor, other_name, other, dtype=True):
    if tensor is None:
        return
    if tensor.device != other.device:
        fail(f"{name}: expected a tensor on {other.device}, as {other_name} is, got one on {tensor.device}")
    if tensor.shape != other.shape:
        fail(f"{name}: expected shape {shape_of(other)} as {other_name} has, got {shape_of(tensor)}")
    if dtype and tensor.dtype != other.dtype:
        fail(f"{name}: expected dtype {dtype_name(other)} as {other_name} has, got {dtype_name(tensor)}")


def _check_integers(name, tensor, may_be_scalar, x):
    if tensor.device != x.device:
        fail(f"{name}: expected a tensor on {x.device}, as x is, got one on {tensor.device}")
    if tensor.dtype != torch.int64:
        fail(f"{name}: expected dtype int64, got {dtype_name(tensor)}")
    if not (may_be_scalar and tensor.dim() == 0) and tuple(tensor.shape) != (len(x),):
        fail(f"{name}: expected shape {'() or ' if may_be_scalar else ''}({len(x)},), got {shape_of(tensor)}")


def check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds):
    """Everything that can be known without reading values. Raises RuntimeError naming the argument."""
    optional = {"u": u, "m1": m1, "m2": m2, "v": v, "grad": grad, "noise": noise, "seeds": seeds}
    for name, tensor in {"x": x, "f": f, "rows": rows, "index": index, **optional}.items():
        if tensor is not None or name not in optional:
            _check_type(name, tensor, torch.Tensor, "Optional[Tensor]" if name in optional else "Tensor")
            _check_dense(name, tensor)
    for name, tensor in (("x", x), ("f", f)):
        if tensor.dtype not in DTYPES:
            fail(f"{name}: expected dtype float32, float16 or bfloat16, got {dtype_name(tensor)}")
    if x.dim() < 1 or x.numel() == 0:
        fail(f"x: expected shape (B, ...) with at least one element, got {shape_of(x)}")
    _check_like("f", f, "x", x, dtype=False)
    for name, tensor in (("u", u), ("v", v)):
        _check_like(name, tensor, "f", f)
    for name, tensor in (("m1", m1), ("m2", m2), ("grad", grad), ("noise", noise)):
        _check_like(name, tensor, "x", x)
    if rows.device != x.device:
        fail(f"rows: expected a tensor on {x.device}, as x is, got one on {rows.device}")
    if rows.dtype != torch.float32:
        fail(f"rows: expected dtype float32, got {dtype_name(rows)}")
    if rows.dim() != 2 or rows.shape[1] != len(COLUMNS) or rows.shape[0] < 1:
        fail(f"rows: expected shape (R, {len(COLUMNS)}) with R >= 1, got {shape_of(rows)}")
    if rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < len(COLUMNS)):
        fail(f"rows: expected contiguous rows, got strides {tuple(rows.stride())}")
    _check_integers("index", index, True, x)
    if seeds is not None:
        _check_integers("seeds", seeds, False, x)
        if noise is not None:
            fail("noise: expected seeds or noise, got both")


def check_values(rows, index, u, m1, m2, v, noise, seeds):
    """What the rows in use ask for; reads index and rows on the host."""
    used = index.reshape(-1).unique().tolist()
    for i in used:
        if not 0 <= i < len(rows):
            fail(f"index: expected values in [0, {len(rows)}), got {i}")
    for i in used:
        row = dict(zip(COLUMNS, rows[i].tolist(), strict=True))
        for column, (name, value) in enumerate(row.items()):
            good_clip = (
                value >= 0 and math.copysign(1, value) > 0
            )  # no negative zero: the bounds have the signs that one expects
            if not (good_clip if name == "clip" else math.isfinite(value)):
                fail(f"rows: expected finite coefficients and clip >= 0, got {value} in row {i}, column {column}")
        if not (0 <= row["draw"] < 2**24 and row["draw"] == int(row["draw"])):
            fail(f"rows: expected draw to be an integer in [0, 2^24), got {row['draw']} in row {i}")
        for asked, tensor, argument, why in (
            (row["g"] != 1, u, "u", "g is not 1"),
            (row["c_m1"] != 0, m1, "m1", "c_m1 is not 0"),
            (row["c_m2"] != 0, m2, "m2", "c_m2 is not 0"),
            (row["c_noise"] != 0, seeds if noise is None else noise, "seeds or noise", "c_noise is not 0"),
            (row["logvar_min"] != 0 or row["logvar_max"] != 0, v, "v", "logvar_min and logvar_max are not 0"),
        ):
            if asked and tensor is None:
                fail(f"{argument}: missing, and row {i} needs it ({why})")


def _extent(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_outputs_like(x, outputs):
    """What can be known of the outputs without looking at their memory."""
    for name, output in outputs.items():
        if output is not None or name != "m0":
            _check_type(name, output, torch.Tensor, "Optional[Tensor]" if name == "m0" else "Tensor")
            _check_dense(name, output)
            _check_like(name, output, "x", x)


def check_outputs(outputs, inputs):
    """Of {"out" or "x": tensor, "m0": tensor or None}, given all inputs by name: each like x, and apart from all the others, or
    exactly one of the inputs that are read element by element."""
    check_outputs_like(inputs["x"], outputs)
    (out_name, out), (_, m0) = outputs.items()
    _check_output(out_name, out, inputs)
    if m0 is not None:
        _check_output("m0", m0, inputs)
        _check_overlap("m0", m0, out_name, out, False)


def _check_output(name, out, inputs):
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
        if stride < reach:
            fail(f"{name}: expected every element at its own address, got overlapping strides")
        reach += stride * (size - 1)
    for other_name, other in inputs.items():
        _check_overlap(name, out, other_name, other, other_name not in ("rows", "index", "seeds"))


def _check_overlap(name, out, other_name, other, may_be_same):
    """An output may be a tensor read element by element (same memory, same layout) or lie apart from it."""
    if other is None:
        return
    (begin, end), (other_begin, other_end) = _extent(out), _extent(other)
    if other_begin >= end or other_end <= begin or _interleaved(out, other):
        return
    if may_be_same and other_begin == begin and other.dtype == out.dtype and _strides(other) == _strides(out):
        return
    fail(f"{name}: overlaps the memory of {other_name}{' without being the same tensor' if may_be_same else ''}")


def _strides(tensor):
    """Of the dimensions that are stepped along."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]


def _interleaved(a, b):
    """Samples of two tensors that take turns in one buffer, as channel halves do."""
    if a.dim() != b.dim() or a.stride(0) * a.element_size() != b.stride(0) * b.element_size() or a.stride(0) == 0:
        return False
    if not (a[0].is_contiguous() and b[0].is_contiguous()):
        return False
    stride = a.stride(0) * a.element_size()
    distance = (b.data_ptr() - a.data_ptr()) % stride
    return distance >= a[0].numel() * a.element_size() and distance + b[0].numel() * b.element_size() <= stride


def check_normal(seeds, shape, dtype, draw, stream):
    _check_type("seeds", seeds, torch.Tensor, "Tensor")
    _check_dense("seeds", seeds)
    integers = (int, np.integer, torch.SymInt)
    for name, value in (*(("shape", size) for size in shape), ("draw", draw), ("stream", stream)):
        _check_type(name, value, integers, "List[int]" if name == "shape" else "int")
    if seeds.dtype != torch.int64:
        fail(f"seeds: expected dtype int64, got {dtype_name(seeds)}")
    if seeds.dim() != 1:
        fail(f"seeds: expected shape (B,), got {shape_of(seeds)}")
    if len(seeds) == 0:
        fail("seeds: expected at least one seed, got none")
    numel = len(seeds)
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
