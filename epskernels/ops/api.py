"""The functions that users call: step, moments, normal, as_seeds; and step_results, for callers that count microseconds."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from ..spec import INPUTS, OUTPUTS, REQUIRED, ROWS_SHAPE, STREAM_INITIAL
from ..table import Table, describe
from ..typing import Backend, Device, Index, SeedsLike, Shape
from . import backends
from .backends import DISPATCHED, chosen, chosen_name, log_call
from .checks import dtype_name, fail, shape_of
from .log import DEBUG, is_logged
from .transforms import refuse_gradients, refuse_tangents, require_grad, step_with_gradient

_increment_version = torch._C._increment_version  # as autograd.graph.increment_version, at half the time

# ---- errors in the caller's words: looked for once a call has failed, so that others pay nothing ----

# What is no optional tensor.
_EXPECTED = {
    "x": "a tensor",
    "f": "a tensor",
    "rows": f"a Table, or its rows: a float32 tensor {ROWS_SHAPE}",
    "index": "an int, or an int64 tensor, () or (B,)",
    "seeds": "an int64 tensor (B,), as epskernels.as_seeds makes from integers",
}


def _explain(error: Exception, table: object, tensors: Mapping[str, Any], required: Sequence[str] = REQUIRED) -> None:
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


def _explain_normal(shape: Iterable[object], dtype: object, draw: object, stream: object) -> None:
    for name, value in (*(("shape", size) for size in shape), ("draw", draw), ("stream", stream)):
        if not isinstance(value, (int, np.integer, torch.SymInt)) or not -(2**63) <= value < 2**63:
            expected = "integers as sizes" if name == "shape" else "an integer in [0, 2^32)"
            fail(f"{name}: expected {expected}, got {describe(value)}")
    if not isinstance(dtype, torch.dtype):
        fail(f"dtype: expected float32, float16 or bfloat16 of torch, got {describe(dtype)}")


def _by_name(inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(INPUTS + OUTPUTS, (*inputs, *outputs), strict=True))


def rows_and_index(table: Any, index: Any, like: object) -> tuple[Any, Any]:
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


class StepInputs(TypedDict, total=False):
    """The optional inputs of `step`, its outputs where they are given, and its backend."""

    u: Tensor | None
    m1: Tensor | None
    m2: Tensor | None
    v: Tensor | None
    grad: Tensor | None
    noise: Tensor | None
    seeds: Tensor | None
    y: Tensor | None
    rescale: Tensor | None
    threshold: Tensor | None
    out: Tensor | None
    m0: Tensor | None
    y_out: Tensor | None
    model_input: Tensor | None
    backend: Backend | None


@overload
def step(x: Tensor, f: Tensor, table: Table | Tensor, index: Index, *, return_m0: Literal[False] = ...,
         return_y: Literal[False] = ..., **inputs: Unpack[StepInputs]) -> Tensor: ...  # fmt: skip
@overload
def step(x: Tensor, f: Tensor, table: Table | Tensor, index: Index, *, return_m0: bool = ...,
         return_y: Literal[True], **inputs: Unpack[StepInputs]) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def step(x: Tensor, f: Tensor, table: Table | Tensor, index: Index, *, return_m0: Literal[True],
         return_y: Literal[False] = ..., **inputs: Unpack[StepInputs]) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def step(x: Tensor, f: Tensor, table: Table | Tensor, index: Index, *, return_m0: bool = ...,
         return_y: bool = ..., **inputs: Unpack[StepInputs]) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
def step(
    x: Tensor, f: Tensor, table: Table | Tensor, index: Index, *, u: Tensor | None = None, m1: Tensor | None = None,
    m2: Tensor | None = None, v: Tensor | None = None, grad: Tensor | None = None, noise: Tensor | None = None,
    seeds: Tensor | None = None, y: Tensor | None = None, rescale: Tensor | None = None, threshold: Tensor | None = None,
    out: Tensor | None = None, m0: Tensor | None = None, y_out: Tensor | None = None, model_input: Tensor | None = None,
    return_m0: bool = False, return_y: bool = False, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
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
    return_m0: return (x', m0) instead of x'; return_y: (x', m0, y'). backend: what runs, one of BACKENDS; None for what
    `use_backend` says.

    Samples contiguous in themselves, at any batch stride, are read in place; other layouts through a copy.
    Returns x', or with m0, or with m0 and y', in x's shape and dtype; the tensors given as out, m0 and y_out where they were.
    Raises RuntimeError, naming the argument, before anything is written; torch.OutOfMemoryError where torch does. On a GPU the
    values of index, rows and threshold are never read by the host: a sample whose index is out of range, or whose row needs a
    tensor that is absent, comes out as NaN; EPSKERNELS_CHECK_ROWS=1 reads them on the host at every call and raises, as on the
    CPU.
    """
    rows, index = rows_and_index(table, index, x)
    inputs: tuple[Any, ...] = (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)
    outputs = (out, m0, y_out, model_input)
    functions = chosen(x, backend) if backends.open_choices or backend is not None else DISPATCHED
    if not is_dynamo_compiling() and is_logged(DEBUG) and not is_compiling():
        log_call("step", functions, backend, _by_name(inputs, outputs))
    if forward_ad._current_level >= 0:
        refuse_tangents(inputs)
    try:
        if out is None and m0 is None and y_out is None and model_input is None:
            plain = (
                u is None and m1 is None and m2 is None and v is None and grad is None and noise is None and seeds is None
                and y is None and rescale is None and threshold is None
            )  # fmt: skip
            if is_grad_enabled() and (require_grad(x, f, rows) if plain else require_grad(x, f, rows, *inputs[4:])):
                op = "step_y" if return_y else "step_m0" if return_m0 else "step"
                return step_with_gradient(chosen_name(backend), op, inputs)
            if return_y:
                return functions.step_y(*inputs)
            if return_m0:
                return functions.step_m0(*inputs)
            if plain and functions is DISPATCHED and not is_compiling():  # at less host time
                return _STEP_PLAIN(x, f, rows, index)
            return functions.step(*inputs)
        if is_grad_enabled() and require_grad(x, f, rows, *inputs[4:], *outputs):
            refuse_gradients(_by_name(inputs, outputs))
        return _step_into(functions, inputs, outputs, return_m0, return_y)
    except (RuntimeError, TypeError) as error:
        _explain(error, table, _by_name(inputs, outputs))
        raise


def _step_into(
    functions: backends.Functions,
    inputs: tuple[Any, ...],
    outputs: tuple[Tensor | None, ...],
    return_m0: bool,
    return_y: bool,
) -> Any:
    """Writes to the outputs that are given; makes those that are returned besides."""
    x = inputs[0]
    out, m0, y_out, model_input = outputs
    if m0 is None and (return_m0 or return_y):
        m0 = torch.empty_like(x)
    if y_out is None and return_y:
        y_out = torch.empty_like(x)
    if out is None:
        out = torch.empty_like(x)
    functions.step_out(*inputs, out=out, m0=m0, y_out=y_out, model_input=model_input)
    if not is_dynamo_compiling():  # autograd may have kept what is overwritten, and then refuses to go on with it
        if m0 is None and y_out is None and model_input is None:
            _increment_version((out,))
        else:
            _increment_version([output for output in (out, m0, y_out, model_input) if output is not None])
    return (out, m0, y_out) if return_y else (out, m0) if return_m0 else out


def _step_results(results: int, x: Tensor, f: Tensor, rows: Tensor, index: Tensor, *others: Any, **named: Any) -> Any:
    more: dict[str, Any] = {"return_m0": results == 2, "return_y": results == 3}
    return step(x, f, rows, index, **dict(zip(INPUTS[4:], others, strict=False)), **named, **more)


_BY_RESULTS: dict[int, Any] = {1: DISPATCHED.step, 2: DISPATCHED.step_m0, 3: DISPATCHED.step_y}
# What OpOverload.__call__ calls.
_WITHOUT_PYTHON = {results: op._op for results, op in _BY_RESULTS.items()}
_STEP_PLAIN = torch.ops.epskernels.step_plain.default._op


def step_results(results: int, plain: bool = False) -> Callable[..., Any]:
    """`step` for callers that count microseconds: a function that returns the first `results` of (x', m0, y').

    It takes the inputs in the order of spec.INPUTS, as many as are given, or by name; rows and index are tensors. plain: x, f,
    rows and index are all. No gradient may be asked for.
    """
    if backends.open_choices:
        return functools.partial(_step_results, results)
    if is_dynamo_compiling():
        return _BY_RESULTS[results]
    if is_logged(DEBUG):
        return functools.partial(_step_results, results)
    return _STEP_PLAIN if plain and results == 1 else _WITHOUT_PYTHON[results]


def moments(
    f: Tensor,
    u: Tensor | None = None,
    table: Table | Tensor | None = None,
    index: Index | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Sums over each sample, float64 (B, 2): of f and of f^2; with u, (B, 4): of the guided output fhat and fhat^2 too.

    With u, the guided output is fhat = u + g*(f - u), in float32, as the step forms it. The same bits on every device: tiles of
    1,024 elements, halves added to halves, then the tiles likewise.

    f: the model's output, (B, ...), float32, float16 or bfloat16. u: the unconditional output, as f. table: a Table, or its rows,
    float32 (R, 24); index: an int, or an int64 tensor, () or (B,): where g is from, needed with u. backend: what runs, one of
    BACKENDS; None for what `use_backend` says.
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
    functions = chosen(f, backend)
    if not is_dynamo_compiling() and is_logged(DEBUG) and not is_compiling():
        log_call("moments", functions, backend, {"f": f, "u": u, "rows": rows})
    try:
        return functions.moments(f, u, rows, index)
    except (RuntimeError, TypeError) as error:
        if (table is None) != (u is None) or (index is None) != (u is None):
            fail("u, table, index: expected all of them, or none")
        _explain(error, table, {"f": f, "u": u, "rows": rows, "index": index}, ("f",))
        raise


def as_seeds(seeds: SeedsLike, device: Device = "cpu") -> Tensor:
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


def normal(
    seeds: SeedsLike,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    draw: int = 0,
    stream: int = STREAM_INITIAL,
    device: Device | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Standard normals (B, *shape) from the package's generator: sample b depends on seeds[b] alone.

    seeds: int64 (B,), or a list or range of integers. shape: of one sample. dtype: float32, float16 or bfloat16, rounded once
    from float32. draw, stream: integers in [0, 2^32); stream 1 is the initial latent, stream 0 the noise of the steps.
    The same on every backend and device (Philox4x32-10, Salmon et al., SC 2011; Box-Muller).
    Raises RuntimeError, ValueError for the seeds.
    """
    by_default: Device = getattr(seeds, "device", "cpu")
    seeds = as_seeds(seeds, device or by_default)
    if not isinstance(shape, (tuple, list)):
        fail(f"shape: expected a list or tuple of sizes, got {shape!r}")
    functions = chosen(seeds, backend)
    if not is_dynamo_compiling() and is_logged(DEBUG) and not is_compiling():
        log_call("normal", functions, backend, {"seeds": seeds})
    try:
        return functions.normal(seeds, list(shape), dtype=dtype, draw=draw, stream=stream)
    except (RuntimeError, TypeError) as error:
        _explain_normal(shape, dtype, draw, stream)
        _explain(error, None, {"seeds": seeds})
        raise
