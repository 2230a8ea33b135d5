"""The ops torch.ops.epskernels.*: definition, checks, fake kernels, choice of backend.

step         (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold) -> x'
step_plain   (x, f, rows, index) -> x': step, at less host time
step_m0      the same -> (x', m0)
step_y       the same -> (x', m0, y')
step_out     the same, written to `out` (and `m0`, `y_out`, `model_input`, where given)
step_        the same, written to x (and the others)
moments      (f, u, rows, index) -> sums over each sample
normal       (seeds, shape, dtype, draw, stream) -> the generator's normals

The compiled kernels register themselves, for CPU and for CUDA tensors. Where one is missing, CUDA tensors run on the Triton
kernel; failing that the reference stands in, and says so once.

The ops themselves have no gradient, which costs their callers nothing: `step` takes the way through autograd where an input
requires grad, and marks what it writes; of what step_out and step_ write when called directly, autograd learns nothing.
torch.vmap folds its dimension into the batch, for `step` and for the ops that write nothing.
"""

import contextlib
import contextvars
import functools
import logging
import operator
import os
import threading
import typing
import warnings

import numpy as np
import torch
from torch import is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from . import build
from .build import BACKENDS
from .checks import (
    ELEMENTWISE,
    INPUTS,
    check_moments,
    check_normal,
    check_outputs,
    check_outputs_like,
    check_step,
    check_values,
    dtype_name,
    fail,
    rows_in_use,
    shape_of,
)
from .schemas import SCHEMAS
from .step_gradient import noise_rows, step_gradients
from .step_reference import STREAM_INITIAL, moments_reference, normal_reference, step_reference
from .table import COLUMNS, Table, describe

_log = logging.getLogger("epskernels")
_is_logged, _DEBUG = _log.isEnabledFor, logging.DEBUG  # logging keeps the answer until some level changes: 40 ns a call
if os.environ.get("EPSKERNELS_LOG") == "debug":
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    # What the program's own handlers print is not printed twice.
    _handler.addFilter(lambda record: all(record.levelno < other.level for other in logging.getLogger().handlers))
    _log.addHandler(_handler)
    _log.setLevel(logging.DEBUG)
if hasattr(torch.ops.epskernels, "step"):  # and torch takes no fake kernels from Python for ops so defined
    raise ImportError(
        "epskernels: this process has loaded libepskernels.so, which defines the ops for programs without Python; "
        "import epskernels before it is loaded: it then leaves the ops as they are"
    )
_library = torch.library.Library("epskernels", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


# ---- the reference as a backend of every op ----


def _reference(inputs, named, writes_y=False):
    """What step_reference returns, and all inputs by name."""
    inputs = dict(zip(INPUTS, inputs, strict=False)) | named
    check_step(**inputs)
    check_values(inputs, writes_y)
    return step_reference(**inputs), inputs


def _like(results, x):
    """In the layout that torch.empty_like(x) has, as every backend returns it."""
    return tuple(torch.empty_like(x).copy_(result) for result in results)


def reference_step(*inputs, **named):
    results, inputs = _reference(inputs, named)
    return _like(results[:1], inputs["x"])[0]


def reference_step_m0(*inputs, **named):
    results, inputs = _reference(inputs, named)
    return _like(results[:2], inputs["x"])


def reference_step_y(*inputs, **named):
    results, inputs = _reference(inputs, named, writes_y=True)
    return _like(results[:3], inputs["x"])


def _reference_into(outputs, inputs, named):
    results, inputs = _reference(inputs, named, writes_y=outputs["y_out"] is not None)
    check_outputs(outputs, inputs)
    for output, result in zip(outputs.values(), results, strict=True):
        if output is not None:
            for half in output.split(len(result)):
                half.copy_(result)


def reference_step_out(*inputs, out, m0=None, y_out=None, model_input=None, **named):
    _reference_into({"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, inputs, named)


def reference_step_(x, *inputs, m0=None, y_out=None, model_input=None, **named):
    _reference_into({"x": x, "m0": m0, "y_out": y_out, "model_input": model_input}, (x, *inputs), named)


def reference_normal(seeds, shape, dtype, draw=0, stream=STREAM_INITIAL):
    check_normal(seeds, shape, dtype, draw, stream)
    return normal_reference(seeds, shape, draw, stream).to(dtype).contiguous()


def reference_moments(f, u=None, rows=None, index=None):
    check_moments(f, u, rows, index)
    if u is not None and f.device.type == "cpu":
        rows_in_use(rows, index)
    return moments_reference(f, u, rows, index)


REFERENCE = {
    "step": reference_step,
    "step_plain": reference_step,
    "step_m0": reference_step_m0,
    "step_y": reference_step_y,
    "step_out": reference_step_out,
    "step_": reference_step_,
    "moments": reference_moments,
    "normal": reference_normal,
}


# ---- registration ----

_stand_ins = {}  # for each kind of device without a compiled kernel, the functions by op


def _stand_in(name):
    """Where no compiled kernel is registered for a kind of device: Triton's on a GPU, else the reference."""

    def stand_in(first, *args, **kwargs):
        kind = first.device.type if isinstance(first, torch.Tensor) else "cpu"
        if kind in _stand_ins:
            return _stand_ins[kind][name](first, *args, **kwargs)
        missing = build.why_missing(kind) if kind in ("cpu", "cuda") else None
        missing = missing or "this version has no kernel for it"
        without_triton = build.why_missing("triton") if kind == "cuda" else ""
        functions = _triton_functions() if without_triton is None else REFERENCE
        result = functions[name](first, *args, **kwargs)
        _stand_ins[kind] = functions
        if without_triton is None:
            _log.debug("%s tensors run on the Triton kernel: %s", kind, missing)
        else:
            missing += f"; nor is there Triton: {without_triton}" if without_triton else ""
            warnings.warn(
                f"epskernels runs its pure PyTorch reference, slower, on {kind} tensors: {missing}", stacklevel=3
            )
        return result

    stand_in.__name__ = f"stand_in_{name}"
    return stand_in


def _triton_functions():
    from .step_triton import TRITON

    return TRITON


for _name in REFERENCE:
    _library.impl(_name, _stand_in(_name), "CompositeExplicitAutograd")


def _register_fake_step(name, results):
    @torch.library.register_fake(f"epskernels::{name}", lib=_library)
    def _(x, *inputs, **named):
        check_step(x, *inputs, **named)
        made = tuple(torch.empty_like(x) for _ in range(results))
        return made if results > 1 else made[0]


for _name, _results in (("step", 1), ("step_plain", 1), ("step_m0", 2), ("step_y", 3)):
    _register_fake_step(_name, _results)


@torch.library.register_fake("epskernels::step_out", lib=_library)
def _(x, f, *inputs, out, m0=None, y_out=None, model_input=None, **named):
    check_step(x, f, *inputs, **named)
    check_outputs_like(x, f, {"out": out, "m0": m0, "y_out": y_out, "model_input": model_input})


@torch.library.register_fake("epskernels::step_", lib=_library)
def _(x, f, *inputs, m0=None, y_out=None, model_input=None, **named):
    check_step(x, f, *inputs, **named)
    check_outputs_like(x, f, {"m0": m0, "y_out": y_out, "model_input": model_input})


@torch.library.register_fake("epskernels::moments", lib=_library)
def _(f, u=None, rows=None, index=None):
    check_moments(f, u, rows, index)
    return f.new_empty((f.shape[0], 2 if u is None else 4), dtype=torch.float64)


@torch.library.register_fake("epskernels::normal", lib=_library)
def _(seeds, shape, dtype, draw=0, stream=STREAM_INITIAL):
    check_normal(seeds, shape, dtype, draw, stream)
    return torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)


build.load_kernels()


# ---- outputs that are views with the negative bit, such as x.conj().imag: their memory holds the negated values ----


def register_negative(library, ops):
    """What torch does by itself for inputs: it clones them. Of an op that writes a tensor it expects that one back."""

    def memory(tensor):
        return torch._neg_view(tensor) if tensor is not None and tensor.is_neg() else tensor

    def into_memory(inputs, outputs, named):
        held = {name: memory(output) for name, output in outputs.items()}
        inputs = [value.resolve_neg() if isinstance(value, torch.Tensor) else value for value in inputs]
        named = {name: value if value is None else value.resolve_neg() for name, value in named.items()}
        ops.step_out(*inputs, **named, **held)
        for name, output in outputs.items():
            if held[name] is not output:
                held[name].neg_()

    def step_out(*inputs, out, m0=None, y_out=None, model_input=None, **named):
        into_memory(inputs, {"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, named)

    def step_(x, *inputs, m0=None, y_out=None, model_input=None, **named):
        outputs = {"out": x, "m0": m0, "y_out": y_out, "model_input": model_input}
        try:
            into_memory((x, *inputs), outputs, named)
        except RuntimeError as error:  # it has x for an output
            raise RuntimeError(str(error).replace("epskernels: out:", "epskernels: x:")) from None

    library.impl("step_out", step_out, "Negative")
    library.impl("step_", step_, "Negative")


register_negative(_library, torch.ops.epskernels)


# ---- choice of backend ----


class _Functions(typing.NamedTuple):
    """What the public functions call."""

    step: typing.Callable
    step_m0: typing.Callable
    step_y: typing.Callable
    step_out: typing.Callable
    moments: typing.Callable
    normal: typing.Callable


_DISPATCHED = _Functions(*(getattr(torch.ops.epskernels, name).default for name in _Functions._fields))
_BY_RESULTS = {1: _DISPATCHED.step, 2: _DISPATCHED.step_m0, 3: _DISPATCHED.step_y}
# What OpOverload.__call__ calls.
_WITHOUT_PYTHON = {results: op._op for results, op in _BY_RESULTS.items()}
_STEP_PLAIN = torch.ops.epskernels.step_plain.default._op
_REFERENCE = _Functions(*(REFERENCE[name] for name in _Functions._fields))


# By backend: how to get its functions, and the only kind of device that it takes.
_BACKENDS = {
    "auto": (lambda: _DISPATCHED, None),
    "cpu": (lambda: _DISPATCHED, "cpu"),
    "cuda": (lambda: _DISPATCHED, "cuda"),
    "triton": (lambda: _Functions(*(_triton_functions()[name] for name in _Functions._fields)), None),
    "reference": (lambda: _REFERENCE, None),
}
_forced = contextvars.ContextVar("epskernels_backend", default=None)


def _check_backend(name):
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    missing = build.why_missing(name) if name in ("cpu", "cuda", "triton") else None
    if missing:
        raise RuntimeError(f"epskernels: backend {name!r} is missing: {missing}")
    return None if name == "auto" else name


# An import never fails by the environment, so that `epskernels info` can say what is wrong: the calls do.
_FAULTS = build.environment_faults()
_DEFAULT_BACKEND = None if _FAULTS else _check_backend(os.environ.get("EPSKERNELS_BACKEND") or "auto")
_choices_lock = threading.Lock()
# Contexts open in any thread, the process's own choice counted in: while there are none, nothing is looked up.
_choices = 1 if _FAULTS or _DEFAULT_BACKEND else 0


@contextlib.contextmanager
def use_backend(name):
    """Within the context, `step`, `moments` and `normal` run on this backend: "auto", "cpu", "cuda" (compiled C++ and CUDA C++),
    "triton" or "reference".

    Raises ValueError for an unknown one, RuntimeError for one that this installation or machine lacks, saying why.
    EPSKERNELS_BACKEND sets the same for a whole process; the functions' own argument `backend` comes first.
    torch.ops.epskernels.* called directly always dispatch by device; compiled graphs do but for the argument.
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


def _chosen_name(backend):
    if is_compiling():
        return backend or "auto"
    return backend or _forced.get() or _DEFAULT_BACKEND or "auto"


def _chosen(tensor, backend):
    """The functions of the backend that was asked for: by the call, else by the context, else for the process."""
    if _FAULTS:
        fail("; ".join(_FAULTS))
    if is_compiling() and backend in (None, *_BACKENDS):
        return _BACKENDS[backend or "auto"][0]()
    if backend is not None:
        _check_backend(backend)
    name = _chosen_name(backend)
    functions, kind = _BACKENDS[name]
    if kind and isinstance(tensor, torch.Tensor) and tensor.device.type != kind:
        fail(f"backend {name!r} was asked for, and the tensors are on {tensor.device}")
    return functions()


def _log_call(name, functions, backend, tensors):
    """Which kernel a call runs on, why, and what keeps it from its fast path."""
    tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor) and value.numel()}
    if not tensors:
        return  # about to be refused
    first = next(iter(tensors.values()))
    kind = first.device.type
    why = "by default"
    for chosen, said in (
        (_DEFAULT_BACKEND, "by EPSKERNELS_BACKEND"),
        (_forced.get(), "by use_backend"),
        (backend, "as asked"),
    ):
        why = said if chosen else why
    if functions is _REFERENCE or _stand_ins.get(kind) is REFERENCE:
        kernel = "the reference"
    elif functions is not _DISPATCHED or (kind == "cuda" and build.why_missing("cuda")):
        kernel = "the Triton kernel"
    else:
        kernel = f"the CPU kernel ({build.extension().cpu_capability()})" if kind == "cpu" else "the CUDA kernel"
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
    _log.debug("%s on %s runs on %s, %s%s", name, first.device, kernel, why, "".join(f"; {text}" for text in slower))


# ---- errors in the caller's words: looked for once a call has failed, so that others pay nothing ----

# What is no optional tensor.
_EXPECTED = {
    "x": "a tensor",
    "f": "a tensor",
    "rows": f"a Table, or its rows: a float32 tensor (R, {len(COLUMNS)})",
    "index": "an int, or an int64 tensor, () or (B,)",
    "seeds": "an int64 tensor (B,), as epskernels.as_seeds makes from integers",
}
_REQUIRED = ("x", "f", "rows", "index")


def _explain(error, table, tensors, required=_REQUIRED):
    """Raises what torch, or the op, said in other words than the caller's; returns where `error` says it all."""
    said = str(error)
    if "epskernels: could not allocate" in said and "out of memory" in said:
        # The stable ABI lets a library raise none but RuntimeError.
        raise torch.OutOfMemoryError(said) from None
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) and (value is not None or name in required):
            argument, expected = "table" if name == "rows" else name, _EXPECTED.get(name, "a tensor, or None")
            fail(f"{argument}: expected {expected}, got {describe(value)}")
    if isinstance(table, Table) and said.startswith("epskernels: rows: expected a tensor on "):
        like = next(name for name in ("x", "f") if name in tensors)
        devices = f"on {tensors[like].device}, as {like} is, got one on {table.device}"
        fail(f"table: expected one {devices}: Table.to(device) makes it")


def _explain_normal(shape, dtype, draw, stream):
    for name, value in (*(("shape", size) for size in shape), ("draw", draw), ("stream", stream)):
        if not isinstance(value, (int, np.integer, torch.SymInt)) or not -(2**63) <= value < 2**63:
            expected = "integers as sizes" if name == "shape" else "an integer in [0, 2^32)"
            fail(f"{name}: expected {expected}, got {describe(value)}")
    if not isinstance(dtype, torch.dtype):
        fail(f"dtype: expected float32, float16 or bfloat16 of torch, got {describe(dtype)}")


# ---- gradients and vmap ----


# As PyTorch's Python calls them (autograd.Function.apply, autograd.graph.increment_version), at half the time.
_transforms_active, _increment_version = torch._C._are_functorch_transforms_active, torch._C._increment_version


def _require_grad(x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold, *outputs):
    try:
        if x.requires_grad or f.requires_grad or rows.requires_grad:
            return True
        for tensor in (u, m1, m2, v, grad, noise, y, rescale, threshold, *outputs):
            if tensor is not None and tensor.requires_grad:
                return True
    except AttributeError:
        return False  # not a tensor: about to be refused
    return _transforms_active()  # torch.func's: what vmap has wrapped does not tell


def _by_name(inputs, outputs):
    return dict(zip((*INPUTS, "out", "m0", "y_out", "model_input"), (*inputs, *outputs), strict=True))


def _refuse_gradients(**tensors):
    """A gradient would stop here in silence."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            fail(
                f"{name}: expected a tensor that does not require grad, or torch.no_grad(): a step that writes to "
                "given tensors has no gradient"
            )


def _refuse_tangents(inputs):
    for name, tensor in zip(INPUTS, inputs, strict=True):
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            fail(f"{name}: expected a tensor without a tangent: the step has no forward-mode derivative")


class _Step(torch.autograd.Function):
    """An op with its gradient, on a backend by name. Only the inputs are kept; noise made from seeds is made again."""

    @staticmethod
    def forward(backend, op, x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold):
        run = getattr(_BACKENDS[backend][0](), op)
        return run(x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, next_bar, m0_bar=None, second_bar=None):
        x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold = ctx.saved_tensors
        wanted = [name for name, needed in zip(INPUTS, ctx.needs_input_grad[2:], strict=True) if needed]
        z = noise
        if seeds is not None and ("v" in wanted or "rows" in wanted):
            zeros = torch.zeros_like(x, dtype=torch.float32)
            drawn = noise_rows(rows.detach())
            z = _BACKENDS[ctx.backend][0]().step(zeros, zeros, drawn, index, None, None, None, None, None, None, seeds)
        bars = step_gradients(
            wanted, (next_bar, m0_bar, second_bar), x, f, rows, index, u, m1, m2, v, grad, z, y, rescale, threshold
        )
        return None, None, *(bars.get(name) for name in INPUTS)

    @staticmethod
    def vmap(info, in_dims, backend, op, *inputs):
        return _folded(functools.partial(_Step.apply, backend, op), info, in_dims[2:], inputs)


def _folded(run, info, in_dims, inputs):
    """vmap of `run`: its dimension becomes the outer part of the batch."""
    size = info.batch_size
    one = [t if dim is None else t.select(dim, 0) for t, dim in zip(inputs, in_dims, strict=True)]
    check_step(*one)

    def outermost(tensor, dim):
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    tensors = dict(zip(INPUTS, inputs, strict=True))
    dims = dict(zip(INPUTS, in_dims, strict=True))
    rows, index, count = tensors["rows"], tensors["index"], one[2].shape[0]
    if dims["rows"] is not None or dims["index"] is not None or index.dim():
        index = outermost(index, dims["index"])
        index = (index if index.dim() == 2 else index[:, None]).expand(size, one[0].shape[0])
        if dims["rows"] is not None:
            rows = outermost(rows, dims["rows"]).flatten(0, 1)
            first = count * torch.arange(size, device=index.device)[:, None]
            index = torch.where((index >= 0) & (index < count), first + index, -1)
        index = index.flatten()
    folded = {name: t if t is None else outermost(t, dims[name]).flatten(0, 1) for name, t in tensors.items()
              if name not in ("rows", "index")}  # fmt: skip
    folded |= {"rows": rows, "index": index}
    results = run(*(folded[name] for name in INPUTS))
    if isinstance(results, tuple):
        return tuple(result.unflatten(0, (size, -1)) for result in results), (0,) * len(results)
    return results.unflatten(0, (size, -1)), 0


def _register_vmap(op, run):
    def rule(info, in_dims, *inputs):
        absent = [None] * (len(INPUTS) - len(inputs))
        return _folded(run, info, [*in_dims, *absent], [*inputs, *absent])

    torch.library.register_vmap(f"epskernels::{op}", rule, lib=_library)


def _refuse_vmap(op):
    def refuse(*args, **kwargs):
        fail(
            f"{op}: expected no torch.vmap around an op that writes to its arguments; step, step_m0 and step_y take it"
        )

    _library.impl(op, refuse, "FuncTorchBatched")


def _vmap_moments(info, in_dims, f, u=None, rows=None, index=None):
    dims = (*in_dims, None, None, None)[:4]
    one = [t if dim is None else t.select(dim, 0) for t, dim in zip((f, u, rows, index), dims, strict=True)]
    check_moments(*one)
    if u is None:
        f = f.movedim(dims[0], 0)
        return _DISPATCHED.moments(f.flatten(0, 1)).unflatten(0, f.shape[:2]), 0

    def run(x, f, rows, index, u, *absent):
        return _DISPATCHED.moments(f, u, rows, index)

    absent = [None] * (len(INPUTS) - 5)
    return _folded(run, info, [dims[0], dims[0], *dims[2:], dims[1], *absent], [f, f, rows, index, u, *absent])


def _vmap_normal(info, in_dims, seeds, shape, *options, **named):
    seeds = seeds.movedim(in_dims[0], 0)
    if seeds.dim() != 2:
        fail(f"seeds: expected shape (B,), got {shape_of(seeds[0])}")
    return _DISPATCHED.normal(seeds.flatten(), shape, *options, **named).unflatten(0, seeds.shape), 0


for _name in ("step", "step_m0", "step_y"):
    _register_vmap(_name, getattr(_DISPATCHED, _name))
_register_vmap("step_plain", _DISPATCHED.step)
for _name in ("step_out", "step_"):
    _refuse_vmap(_name)
torch.library.register_vmap("epskernels::moments", _vmap_moments, lib=_library)
torch.library.register_vmap("epskernels::normal", _vmap_normal, lib=_library)


# ---- the public functions ----


def rows_and_index(table, index, like):
    """The tensors that the ops take, for a Table or its rows, and an int or a tensor; a new one lies where `like` does."""
    rows = table
    if isinstance(table, Table):
        rows = table.rows
        if type(index) is int and 0 <= index < len(table.row_index):
            # A compiled graph then takes any row, an eager call a tensor made before.
            return rows, table.index[index] if is_dynamo_compiling() else table.row_index[index]
    if type(index) is int or isinstance(index, np.integer):
        if not -(2**63) <= index < 2**63:
            fail(f"index: expected an integer of 64 bits, got {index}")
        index = torch.tensor(int(index), device=getattr(like, "device", None))
    return rows, index


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
    y=None,
    rescale=None,
    threshold=None,
    out=None,
    m0=None,
    y_out=None,
    model_input=None,
    return_m0=False,
    return_y=False,
    backend=None,
):
    """One model call's update: apply row `index` of `table` to the state x and the model's raw output f.

    x: (B, ...), float32, float16 or bfloat16. f: the model's output, x's shape, any of the three dtypes.
    table: a Table, or its rows: float32 (R, 24). index: an int, or an int64 tensor, () for one row or (B,) for a row each.
    u: unconditional output, as f; needed where the row's g is not 1. m1, m2: m0 of the one and two calls before, as x; needed
    where c_m1, c_m2 are not 0. v: the model's second half of channels (learned variance), as f. grad: a classifier's
    gradient, as x; rows with c_grad = 0 leave it out. seeds: (B,) int64 (see `as_seeds`), for the noise made in the kernel; or
    noise: standard normals, as x; one of them needed where c_noise is not 0. y: the second state of predictor-correctors, as x;
    needed where c_y or k_y is not 0. rescale: (B,) float32, times the guided output (`guidance_rescale`). threshold: (B,)
    float32, finite and above 0: m0 is held to it and divided by it (`dynamic_threshold`).
    out: written instead of a new tensor; may be x itself. m0: written with the denoised estimate, as x; may be m1 or m2. y_out:
    written with the second state y', as x; may be y. model_input: (B, ...) or (2B, ...), as f: written with what the model reads
    next, the next row's c_in times x', in both halves where the batch is doubled for guidance.
    return_m0: return (x', m0) instead of x'; return_y: (x', m0, y'). backend: one of BACKENDS, as in `use_backend`; default its
    choice.

    Samples contiguous in themselves, at any batch stride, are read in place; other layouts through a copy.
    Returns x', or with m0, or with m0 and y', in x's shape and dtype; the tensors given as out, m0 and y_out where they were.
    Raises RuntimeError, naming the argument, before anything is written; torch.OutOfMemoryError where torch does. On a GPU the
    values of index, rows and threshold are never read by the host: a sample whose index is out of range, or whose row needs a
    tensor that is absent, comes out as NaN; EPSKERNELS_CHECK_ROWS=1 reads them on the host at every call and raises, as on the
    CPU.
    """
    rows, index = rows_and_index(table, index, x)
    inputs = (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)
    outputs = (out, m0, y_out, model_input)
    functions = _chosen(x, backend) if _choices or backend is not None else _DISPATCHED
    if not is_dynamo_compiling() and _is_logged(_DEBUG) and not is_compiling():
        _log_call("step", functions, backend, _by_name(inputs, outputs))
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    try:
        if is_grad_enabled() and _require_grad(*inputs, *outputs):
            if out is None and m0 is None and y_out is None and model_input is None:
                if is_compiling() and _transforms_active():  # Dynamo would drop the gradient
                    fail(
                        "step: expected no transform of torch.func within torch.compile, which would lose its gradient"
                    )
                op = "step_y" if return_y else "step_m0" if return_m0 else "step"
                return _Step.apply(_chosen_name(backend), op, *inputs)
            _refuse_gradients(**_by_name(inputs, outputs))
        if out is None and m0 is None and y_out is None and model_input is None:
            if return_y:
                return functions.step_y(*inputs)
            return functions.step_m0(*inputs) if return_m0 else functions.step(*inputs)
        if m0 is None and (return_m0 or return_y):
            m0 = torch.empty_like(x)
        if y_out is None and return_y:
            y_out = torch.empty_like(x)
        if out is None:
            out = torch.empty_like(x)
        functions.step_out(*inputs, out=out, m0=m0, y_out=y_out, model_input=model_input)
    except (RuntimeError, TypeError) as error:
        _explain(error, table, _by_name(inputs, outputs))
        raise
    if not is_dynamo_compiling():  # autograd may have kept what is overwritten, and then refuses to go on with it
        if m0 is None and y_out is None and model_input is None:
            _increment_version((out,))
        else:
            _increment_version([output for output in (out, m0, y_out, model_input) if output is not None])
    return (out, m0, y_out) if return_y else (out, m0) if return_m0 else out


def _step_results(results, x, f, rows, index, *others, **named):
    more = {"return_m0": results == 2, "return_y": results == 3}
    return step(x, f, rows, index, **dict(zip(INPUTS[4:], others, strict=False)), **named, **more)


def step_results(results, plain=False):
    """`step` for callers that count microseconds: a function that returns the first `results` of (x', m0, y').

    It takes the inputs in the order of checks.INPUTS, as many as are given, or by name; rows and index are tensors. plain: x, f,
    rows and index are all. No gradient may be asked for.
    """
    if _choices:
        return functools.partial(_step_results, results)
    if is_dynamo_compiling():
        return _BY_RESULTS[results]
    if _is_logged(_DEBUG):
        return functools.partial(_step_results, results)
    return _STEP_PLAIN if plain and results == 1 else _WITHOUT_PYTHON[results]


def moments(f, u=None, table=None, index=None, *, backend=None):
    """Sums over each sample, float64 (B, 2): of f and of f^2; with u, (B, 4): of the guided output fhat and fhat^2 too.

    f: (B, ...), float32, float16 or bfloat16. u: as f; table (or its rows) and index as in `step`: fhat = u + g*(f - u), in
    float32, as the step forms it. backend: as in `step`. The same bits on every device: tiles of 1,024 elements, halves added to
    halves, then the tiles likewise.
    Raises RuntimeError naming the argument; for one that requires grad too: there is no gradient, and the sums of f.detach() are
    constants.
    """
    rows, index = rows_and_index(table, index, f)
    if is_grad_enabled():
        for name, tensor in (("f", f), ("u", u), ("rows", rows)):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                fail(
                    f"{name}: expected a tensor that does not require grad, or torch.no_grad(): moments have no gradient"
                )
    functions = _chosen(f, backend)
    if not is_dynamo_compiling() and _is_logged(_DEBUG) and not is_compiling():
        _log_call("moments", functions, backend, {"f": f, "u": u, "rows": rows})
    try:
        return functions.moments(f, u, rows, index)
    except (RuntimeError, TypeError) as error:
        if (table is None) != (u is None) or (index is None) != (u is None):
            fail("u, table, index: expected all of them, or none")
        _explain(error, table, {"f": f, "u": u, "rows": rows, "index": index}, ("f",))
        raise


def as_seeds(seeds, device="cpu"):
    """Seeds as an int64 tensor (B,) on `device`: from an int64 tensor, or a list or range of integers in [0, 2^64).

    The 64 bits are the generator's key: 2^64 - 1 and -1 are the same seed. Raises ValueError for anything else.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise ValueError(f"seeds: expected an int64 tensor (B,), got {dtype_name(seeds)} {shape_of(seeds)}")
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


def normal(seeds, shape, *, dtype=torch.float32, draw=0, stream=STREAM_INITIAL, device=None, backend=None):
    """Standard normals (B, *shape) from the package's generator: sample b depends on seeds[b] alone.

    seeds: int64 (B,), or a list or range of integers. shape: of one sample. dtype: float32, float16 or bfloat16, rounded once
    from float32. draw, stream: integers in [0, 2^32); stream 1 is the initial latent, stream 0 the noise of the steps.
    The same on every backend and device (Philox4x32-10, Salmon et al., SC 2011; Box-Muller).
    Raises RuntimeError, ValueError for the seeds.
    """
    seeds = as_seeds(seeds, device or getattr(seeds, "device", "cpu"))
    if not isinstance(shape, (tuple, list)):
        fail(f"shape: expected a list or tuple of sizes, got {shape!r}")
    functions = _chosen(seeds, backend)
    if not is_dynamo_compiling() and _is_logged(_DEBUG) and not is_compiling():
        _log_call("normal", functions, backend, {"seeds": seeds})
    try:
        return functions.normal(seeds, list(shape), dtype=dtype, draw=draw, stream=stream)
    except (RuntimeError, TypeError) as error:
        _explain_normal(shape, dtype, draw, stream)
        _explain(error, None, {"seeds": seeds})
        raise
