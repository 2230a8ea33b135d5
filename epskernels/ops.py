"""The ops torch.ops.epskernels.*: schemas, checks, fake kernels, choice of backend.

step         (x, f, rows, index, u, m1, m2, v, grad, noise, seeds) -> x'
step_m0      the same -> (x', m0)
step_out     the same, written to `out` (and `m0`, where given)
step_        the same, written to x (and `m0`, where given)
normal       (seeds, shape, dtype, draw, stream) -> the generator's normals

The compiled CPU kernel registers itself for CPU tensors; the reference stands in everywhere else, and says so once.
"""

import contextlib
import contextvars
import operator
import os
import threading
import warnings

import numpy as np
import torch
from torch import is_grad_enabled
from torch.compiler import is_compiling

from . import build
from .step_reference import STREAM_INITIAL, normal_reference, step_reference
from .table import COLUMNS, Table

_INPUTS = (
    "Tensor f, Tensor rows, Tensor index, Tensor? u=None, Tensor? m1=None, Tensor? m2=None, "
    "Tensor? v=None, Tensor? grad=None, Tensor? noise=None, Tensor? seeds=None"
)
SCHEMAS = (
    f"step(Tensor x, {_INPUTS}) -> Tensor",
    f"step_m0(Tensor x, {_INPUTS}) -> (Tensor, Tensor)",
    f"step_out(Tensor x, {_INPUTS}, *, Tensor(a!) out, Tensor(b!)? m0=None) -> ()",
    f"step_(Tensor(a!) x, {_INPUTS}, *, Tensor(b!)? m0=None) -> ()",
    "normal(Tensor seeds, SymInt[] shape, *, ScalarType dtype, int draw=0, int stream=1) -> Tensor",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "cpu", "reference")

_library = torch.library.Library("epskernels", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


# ---- checks: the same as in csrc/arguments.h and ops_cpu.cpp, for the backends written in Python ----


def _fail(message):
    raise RuntimeError(f"epskernels: {message}")


def _shape(tensor):
    return str(tuple(tensor.shape))


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _check_type(name, value, kind, expected):
    """What the dispatcher checks first, in its words."""
    if not isinstance(value, kind):
        found = type(value).__name__
        _fail(f"expected a value of type '{expected}' for argument '{name}' but instead found type '{found}'")


def _check_dense(name, tensor):
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        _fail(f"{name}: expected a dense tensor, got {layout}")


def _check_like(name, tensor, other_name, other, dtype=True):
    if tensor is None:
        return
    if tensor.device != other.device:
        _fail(f"{name}: expected a tensor on {other.device}, as {other_name} is, got one on {tensor.device}")
    if tensor.shape != other.shape:
        _fail(f"{name}: expected shape {_shape(other)} as {other_name} has, got {_shape(tensor)}")
    if dtype and tensor.dtype != other.dtype:
        _fail(f"{name}: expected dtype {_dtype(other)} as {other_name} has, got {_dtype(tensor)}")


def _check_integers(name, tensor, may_be_scalar, x):
    if tensor.device != x.device:
        _fail(f"{name}: expected a tensor on {x.device}, as x is, got one on {tensor.device}")
    if tensor.dtype != torch.int64:
        _fail(f"{name}: expected dtype int64, got {_dtype(tensor)}")
    if not (may_be_scalar and tensor.dim() == 0) and tuple(tensor.shape) != (len(x),):
        _fail(f"{name}: expected shape {'() or ' if may_be_scalar else ''}({len(x)},), got {_shape(tensor)}")


def check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds):
    """Everything that can be known without reading values. Raises RuntimeError naming the argument."""
    optional = {"u": u, "m1": m1, "m2": m2, "v": v, "grad": grad, "noise": noise, "seeds": seeds}
    for name, tensor in {"x": x, "f": f, "rows": rows, "index": index, **optional}.items():
        if tensor is not None or name not in optional:
            _check_type(name, tensor, torch.Tensor, "Optional[Tensor]" if name in optional else "Tensor")
            _check_dense(name, tensor)
    for name, tensor in (("x", x), ("f", f)):
        if tensor.dtype not in DTYPES:
            _fail(f"{name}: expected dtype float32, float16 or bfloat16, got {_dtype(tensor)}")
    if x.dim() < 1 or x.numel() == 0:
        _fail(f"x: expected shape (B, ...) with at least one element, got {_shape(x)}")
    _check_like("f", f, "x", x, dtype=False)
    for name, tensor in (("u", u), ("v", v)):
        _check_like(name, tensor, "f", f)
    for name, tensor in (("m1", m1), ("m2", m2), ("grad", grad), ("noise", noise)):
        _check_like(name, tensor, "x", x)
    if rows.device != x.device:
        _fail(f"rows: expected a tensor on {x.device}, as x is, got one on {rows.device}")
    if rows.dtype != torch.float32:
        _fail(f"rows: expected dtype float32, got {_dtype(rows)}")
    if rows.dim() != 2 or rows.shape[1] != len(COLUMNS) or rows.shape[0] < 1:
        _fail(f"rows: expected shape (R, {len(COLUMNS)}) with R >= 1, got {_shape(rows)}")
    if rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < len(COLUMNS)):
        _fail(f"rows: expected contiguous rows, got strides {tuple(rows.stride())}")
    _check_integers("index", index, True, x)
    if seeds is not None:
        _check_integers("seeds", seeds, False, x)
        if noise is not None:
            _fail("noise: expected seeds or noise, got both")


def check_values(rows, index, u, m1, m2, v, noise, seeds):
    """What the rows in use ask for; reads index and rows on the host."""
    used = index.reshape(-1).unique().tolist()
    for i in used:
        if not 0 <= i < len(rows):
            _fail(f"index: expected values in [0, {len(rows)}), got {i}")
    for i in used:
        row = dict(zip(COLUMNS, rows[i].tolist(), strict=True))
        for column, (name, value) in enumerate(row.items()):
            if not (value >= 0 if name == "clip" else abs(value) < float("inf")):
                _fail(f"rows: expected finite coefficients and clip >= 0, got {value} in row {i}, column {column}")
        if not (0 <= row["draw"] < 2**24 and row["draw"] == int(row["draw"])):
            _fail(f"rows: expected draw to be an integer in [0, 2^24), got {row['draw']} in row {i}")
        for asked, tensor, argument, why in (
            (row["g"] != 1, u, "u", "g is not 1"),
            (row["c_m1"] != 0, m1, "m1", "c_m1 is not 0"),
            (row["c_m2"] != 0, m2, "m2", "c_m2 is not 0"),
            (row["c_noise"] != 0, seeds if noise is None else noise, "seeds or noise", "c_noise is not 0"),
            (row["logvar_min"] != 0 or row["logvar_max"] != 0, v, "v", "logvar_min and logvar_max are not 0"),
        ):
            if asked and tensor is None:
                _fail(f"{argument}: missing, and row {i} needs it ({why})")


def _extent(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check_outputs_like(x, outputs):
    """What can be known of the outputs without looking at their memory."""
    for name, output in outputs.items():
        if output is not None or name != "m0":
            _check_type(name, output, torch.Tensor, "Optional[Tensor]" if name == "m0" else "Tensor")
            _check_dense(name, output)
            _check_like(name, output, "x", x)


def _check_output(name, out, inputs):
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
        if stride < reach:
            _fail(f"{name}: expected every element at its own address, got overlapping strides")
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
    _fail(f"{name}: overlaps the memory of {other_name}{' without being the same tensor' if may_be_same else ''}")


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


# ---- the reference as a backend of every op ----


def _reference(x, f, rows, index, u, m1, m2, v, grad, noise, seeds):
    check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    check_values(rows, index, u, m1, m2, v, noise, seeds)
    return step_reference(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)


def _like(result, x):
    """In the layout that torch.empty_like(x) has, as every backend returns it."""
    return torch.empty_like(x).copy_(result)


def reference_step(x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None):
    return _like(_reference(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)[0], x)


def reference_step_m0(x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None):
    next_x, m0 = _reference(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    return _like(next_x, x), _like(m0, x)


def _reference_into(outputs, x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None):
    next_x, next_m0 = _reference(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    inputs = {"x": x, "f": f, "u": u, "m1": m1, "m2": m2, "v": v, "grad": grad, "noise": noise}
    inputs |= {"rows": rows, "index": index, "seeds": seeds}
    _check_outputs_like(x, outputs)
    (out_name, out), (_, m0) = outputs.items()
    _check_output(out_name, out, inputs)
    if m0 is not None:
        _check_output("m0", m0, inputs)
        _check_overlap("m0", m0, out_name, out, False)
        m0.copy_(next_m0)
    out.copy_(next_x)


def reference_step_out(*inputs, out, m0=None, **named):
    _reference_into({"out": out, "m0": m0}, *inputs, **named)


def reference_step_(x, *inputs, m0=None, **named):
    _reference_into({"x": x, "m0": m0}, x, *inputs, **named)


def check_normal(seeds, shape, dtype, draw, stream):
    _check_type("seeds", seeds, torch.Tensor, "Tensor")
    _check_dense("seeds", seeds)
    integers = (int, np.integer, torch.SymInt)
    for name, value in (*(("shape", size) for size in shape), ("draw", draw), ("stream", stream)):
        _check_type(name, value, integers, "List[int]" if name == "shape" else "int")
    if seeds.dtype != torch.int64:
        _fail(f"seeds: expected dtype int64, got {_dtype(seeds)}")
    if seeds.dim() != 1:
        _fail(f"seeds: expected shape (B,), got {_shape(seeds)}")
    if len(seeds) == 0:
        _fail("seeds: expected at least one seed, got none")
    numel = len(seeds)
    for size in shape:
        if size < 1:
            _fail(f"shape: expected sizes of at least 1, got {size}")
        numel = numel * size
        if numel > 2**62:
            _fail("shape: too many elements for a tensor")
    for name, value in (("draw", draw), ("stream", stream)):
        if not 0 <= value < 2**32:
            _fail(f"{name}: expected a value in [0, 2^32), got {value}")
    if dtype not in DTYPES:
        _fail(f"dtype: expected float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")


def reference_normal(seeds, shape, *, dtype, draw=0, stream=STREAM_INITIAL):
    check_normal(seeds, shape, dtype, draw, stream)
    return normal_reference(seeds, shape, draw, stream).to(dtype).contiguous()


REFERENCE = {
    "step": reference_step,
    "step_m0": reference_step_m0,
    "step_out": reference_step_out,
    "step_": reference_step_,
    "normal": reference_normal,
}


# ---- registration ----

_said = set()


def _stand_in(name, function):
    """The reference where no kernel is registered: it runs, and the user is told once for each kind of device."""

    def stand_in(first, *args, **kwargs):
        result = function(first, *args, **kwargs)
        kind = first.device.type
        if kind not in _said:
            _said.add(kind)
            reason = build.why_missing() or "this version has no kernel for it"
            warnings.warn(
                f"epskernels runs its pure PyTorch reference, slower, on {kind} tensors: {reason}", stacklevel=3
            )
        return result

    stand_in.__name__ = f"stand_in_{name}"
    return stand_in


for _name, _function in REFERENCE.items():
    _library.impl(_name, _stand_in(_name, _function), "CompositeExplicitAutograd")


@torch.library.register_fake("epskernels::step", lib=_library)
def _(x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None):
    check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    return torch.empty_like(x)


@torch.library.register_fake("epskernels::step_m0", lib=_library)
def _(x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None):
    check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("epskernels::step_out", lib=_library)
def _(x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None, *, out, m0=None):
    check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    _check_outputs_like(x, {"out": out, "m0": m0})


@torch.library.register_fake("epskernels::step_", lib=_library)
def _(x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, noise=None, seeds=None, *, m0=None):
    check_step(x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    _check_outputs_like(x, {"m0": m0})


@torch.library.register_fake("epskernels::normal", lib=_library)
def _(seeds, shape, *, dtype, draw=0, stream=STREAM_INITIAL):
    check_normal(seeds, shape, dtype, draw, stream)
    return torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)


build.load_kernels()
_STEP_OPS = tuple(getattr(torch.ops.epskernels, name).default for name in ("step", "step_m0", "step_out"))
_normal = torch.ops.epskernels.normal.default


# ---- choice of backend ----

_forced = contextvars.ContextVar("epskernels_backend", default=None)


def _check_backend(name):
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    if name == "cpu" and build.why_missing():
        raise RuntimeError(f"epskernels: backend 'cpu' is missing: {build.why_missing()}")
    return None if name == "auto" else name


_DEFAULT_BACKEND = _check_backend(os.environ.get("EPSKERNELS_BACKEND", "auto"))
_choices_lock = threading.Lock()
# Contexts open in any thread, the process's own choice counted in: while there are none, nothing is looked up.
_choices = 0 if _DEFAULT_BACKEND is None else 1


@contextlib.contextmanager
def use_backend(name):
    """Within the context, `step` and `normal` run on this backend: "auto", "cpu" (compiled) or "reference".

    Raises ValueError for an unknown one, RuntimeError for one that this installation lacks. EPSKERNELS_BACKEND sets the same
    for a whole process. torch.ops.epskernels.* called directly, and compiled graphs, always dispatch by device.
    """
    global _choices
    token = _forced.set(_check_backend(name) or "auto")
    with _choices_lock:
        _choices += 1
    try:
        yield
    finally:
        with _choices_lock:
            _choices -= 1
        _forced.reset(token)


def _runs_reference(x):
    if is_compiling():
        return False
    name = _forced.get() or _DEFAULT_BACKEND
    if name == "cpu" and isinstance(x, torch.Tensor) and x.device.type != "cpu":
        _fail(f"backend 'cpu' was asked for, and the tensors are on {x.device}")
    return name == "reference"


def _refuse_gradients(**tensors):
    """A gradient would stop here in silence."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            _fail(
                f"{name}: expected a tensor that does not require grad, or torch.no_grad(): the step has no gradient yet"
            )


def _step_ops(x):
    if _runs_reference(x):
        return reference_step, reference_step_m0, reference_step_out
    return _STEP_OPS


# ---- the public functions ----


def step(
    x,
    f,
    table,
    index,
    *,
    u=None,
    m1=None,
    m2=None,
    v=None,
    grad=None,
    noise=None,
    seeds=None,
    out=None,
    m0=None,
    return_m0=False,
):
    """One model call's update: apply row `index` of `table` to the state x and the model's raw output f.

    x: (B, ...), float32, float16 or bfloat16. f: the model's output, x's shape, any of the three dtypes.
    table: a Table, or its rows: float32 (R, 16). index: an int, or an int64 tensor, () for one row or (B,) for a row each.
    u: unconditional output, as f; needed where the row's g is not 1. m1, m2: m0 of the one and two calls before, as x; needed
    where c_m1, c_m2 are not 0. v: the model's second half of channels (learned variance), as f. grad: a classifier's
    gradient, as x; rows with c_grad = 0 leave it out. seeds: (B,) int64, for the noise made in the kernel; or noise: standard
    normals, as x; one of them needed where c_noise is not 0.
    out: written instead of a new tensor; may be x itself. m0: written with the denoised estimate, as x; may be m1 or m2.
    return_m0: return (x', m0) instead of x'.

    Samples contiguous in themselves, at any batch stride, are read in place; other layouts through a copy.
    Returns x', or (x', m0), in x's shape and dtype; the tensors given as out and m0 where they were.
    Raises RuntimeError, naming the argument, before anything is written.
    """
    if isinstance(table, Table):
        rows = table.rows
        if type(index) is int and 0 <= index < len(table.row_index):
            index = table.row_index[index]
    else:
        rows = table
    if type(index) is int:
        if not -(2**63) <= index < 2**63:
            _fail(f"index: expected an integer of 64 bits, got {index}")
        index = torch.tensor(index, device=getattr(x, "device", None))
    inputs = (x, f, rows, index, u, m1, m2, v, grad, noise, seeds)
    if is_grad_enabled():
        _refuse_gradients(x=x, f=f, u=u, m1=m1, m2=m2, v=v, grad=grad, noise=noise, out=out, m0=m0)
    run, run_m0, run_out = _step_ops(x) if _choices else _STEP_OPS
    if out is None and m0 is None:
        return run_m0(*inputs) if return_m0 else run(*inputs)
    if return_m0 and m0 is None:
        m0 = torch.empty_like(x)
    if out is None:
        out = torch.empty_like(x)
    run_out(*inputs, out=out, m0=m0)
    return (out, m0) if return_m0 else out


def as_seeds(seeds, device="cpu"):
    """Seeds as an int64 tensor (B,) on `device`: from an int64 tensor, or a list or range of integers in [0, 2^64).

    The 64 bits are the generator's key: 2^64 - 1 and -1 are the same seed. Raises ValueError for anything else.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise ValueError(f"seeds: expected an int64 tensor (B,), got {_dtype(seeds)} {_shape(seeds)}")
        return seeds.to(device)
    try:
        values = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds: expected an int64 tensor (B,), or a list or range of ints, got {seeds!r}") from None
    for value in values:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: expected integers of 64 bits, got {value}")
    values = [value - 2**64 if value >= 2**63 else value for value in values]
    return torch.tensor(values, dtype=torch.int64, device=device)


def normal(seeds, shape, *, dtype=torch.float32, draw=0, stream=STREAM_INITIAL, device=None):
    """Standard normals (B, *shape) from the package's generator: sample b depends on seeds[b] alone.

    seeds: int64 (B,), or a list or range of integers. shape: of one sample. dtype: float32, float16 or bfloat16, rounded once
    from float32. draw, stream: integers in [0, 2^32); stream 1 is the initial latent, stream 0 the noise of the steps.
    The same on every backend and device (Philox4x32-10, Salmon et al., SC 2011; Box-Muller).
    Raises RuntimeError, ValueError for the seeds.
    """
    seeds = as_seeds(seeds, device or getattr(seeds, "device", "cpu"))
    if not isinstance(shape, (tuple, list)):
        _fail(f"shape: expected a list or tuple of sizes, got {shape!r}")
    run = reference_normal if _runs_reference(seeds) else _normal
    return run(seeds, list(shape), dtype=dtype, draw=draw, stream=stream)
