"""Autograd and torch.func around the ops.

The ops themselves have no gradient, which costs their callers nothing: `step` takes the way through autograd where an input
requires grad, and marks what it writes; of what step_out and step_ write when called directly, autograd learns nothing.
torch.vmap folds its dimension into the batch, for `step` and for the ops that write nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..spec import INPUTS
from .backends import BY_NAME, DISPATCHED
from .checks import check_moments, check_step, fail, shape_of
from .gradient import noise_rows, step_gradients
from .registration import library

_transforms_active = torch._C._are_functorch_transforms_active  # as autograd.Function.apply asks


def require_grad(x: Tensor, f: Tensor, rows: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd, or a transform of torch.func, has to see the step."""
    try:
        if x.requires_grad or f.requires_grad or rows.requires_grad:
            return True
        for tensor in others:
            if tensor is not None and tensor.requires_grad:
                return True
    except AttributeError:
        return False  # not a tensor: about to be refused
    return _transforms_active()  # torch.func's: what vmap has wrapped does not tell


def refuse_gradients(tensors: Mapping[str, object]) -> None:
    """A gradient would stop here in silence."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            fail(
                f"{name}: expected a tensor that does not require grad, or torch.no_grad(): a step that writes to "
                "given tensors has no gradient"
            )


def refuse_tangents(inputs: Sequence[object]) -> None:
    """Forward-mode derivatives would be lost in silence."""
    for name, tensor in zip(INPUTS, inputs, strict=True):
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            fail(f"{name}: expected a tensor without a tangent: the step has no forward-mode derivative")


def step_with_gradient(backend: str, op: str, inputs: Sequence[Tensor | None]) -> Any:
    """The results of an op, on a backend by name, with a gradient by every input."""
    if is_compiling() and _transforms_active():  # Dynamo would drop the gradient
        fail("step: expected no transform of torch.func within torch.compile, which would lose its gradient")
    return _Step.apply(backend, op, *inputs)


class _Step(torch.autograd.Function):
    """An op with its gradient, on a backend by name. Only the inputs are kept; noise made from seeds is made again."""

    @staticmethod
    def forward(
        backend: str, op: str, x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor | None, m1: Tensor | None,
        m2: Tensor | None, v: Tensor | None, grad: Tensor | None, noise: Tensor | None, seeds: Tensor | None,
        y: Tensor | None, rescale: Tensor | None, threshold: Tensor | None,
    ) -> Any:  # fmt: skip
        run = getattr(BY_NAME[backend][0](), op)
        return run(x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(
        ctx: Any, next_bar: Tensor, m0_bar: Tensor | None = None, second_bar: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold = ctx.saved_tensors
        wanted = [name for name, needed in zip(INPUTS, ctx.needs_input_grad[2:], strict=True) if needed]
        z = noise
        if seeds is not None and ("v" in wanted or "rows" in wanted):
            zeros = torch.zeros_like(x, dtype=torch.float32)
            drawn = noise_rows(rows.detach())
            z = BY_NAME[ctx.backend][0]().step(zeros, zeros, drawn, index, None, None, None, None, None, None, seeds)
        bars = step_gradients(
            wanted, (next_bar, m0_bar, second_bar), x, f, rows, index, u, m1, m2, v, grad, z, y, rescale, threshold
        )
        return None, None, *(bars.get(name) for name in INPUTS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], backend: str, op: str, *inputs: Tensor | None) -> Any:
        return _folded(functools.partial(_Step.apply, backend, op), info, in_dims[2:], inputs)


def _folded(
    run: Callable[..., Any], info: Any, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[Any, Any]:
    """vmap of `run`: its dimension becomes the outer part of the batch."""
    size = info.batch_size
    one = [t if dim is None else t.select(dim, 0) for t, dim in zip(inputs, in_dims, strict=True)]
    check_step(*one)

    def outermost(tensor: Tensor, dim: int | None) -> Tensor:
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


def _register_vmap(op: str, run: Callable[..., Any]) -> None:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Any, Any]:
        absent = [None] * (len(INPUTS) - len(inputs))
        return _folded(run, info, [*in_dims, *absent], [*inputs, *absent])

    torch.library.register_vmap(f"epskernels::{op}", rule, lib=library)


def _refuse_vmap(op: str) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        fail(
            f"{op}: expected no torch.vmap around an op that writes to its arguments; step, step_m0 and step_y take it"
        )

    library.impl(op, refuse, "FuncTorchBatched")


def _vmap_moments(
    info: Any, in_dims: tuple[Any, ...], f: Tensor, u: Tensor | None = None, rows: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    dims = (*in_dims, None, None, None)[:4]
    tensors: tuple[Any, ...] = (f, u, rows, index)
    one = [t if dim is None else t.select(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
    check_moments(*one)
    if u is None:
        f = f.movedim(dims[0], 0)
        return DISPATCHED.moments(f.flatten(0, 1)).unflatten(0, f.shape[:2]), 0

    def run(x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor, *absent: None) -> Tensor:
        return DISPATCHED.moments(f, u, rows, index)

    absent = [None] * (len(INPUTS) - 5)
    return _folded(run, info, [dims[0], dims[0], *dims[2:], dims[1], *absent], [f, f, rows, index, u, *absent])


def _vmap_normal(
    info: Any, in_dims: tuple[Any, ...], seeds: Tensor, shape: Sequence[int], *options: Any, **named: Any
) -> tuple[Tensor, int]:
    seeds = seeds.movedim(in_dims[0], 0)
    if seeds.dim() != 2:
        fail(f"seeds: expected shape (B,), got {shape_of(seeds[0])}")
    return DISPATCHED.normal(seeds.flatten(), shape, *options, **named).unflatten(0, seeds.shape), 0


for _name in ("step", "step_m0", "step_y"):
    _register_vmap(_name, getattr(DISPATCHED, _name))
_register_vmap("step_plain", DISPATCHED.step)
for _name in ("step_out", "step_"):
    _refuse_vmap(_name)
torch.library.register_vmap("epskernels::moments", _vmap_moments, lib=library)
torch.library.register_vmap("epskernels::normal", _vmap_normal, lib=library)
