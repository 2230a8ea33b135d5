"""The sampling loop: one model call and one step per row of a table, which knows no sampler by name; and PFGM++'s prior."""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from tqdm.auto import tqdm

from .ops import DTYPES, as_seeds, normal
from .table import Table, describe
from .time_shift import ShiftedTable, on_device
from .trajectory import Trajectory, ask, outputs
from .typing import Device, ModelCall, SeedsLike, Shape

__all__ = ["check_callables", "pfgmpp_prior", "sample"]


@torch.no_grad()
def sample(
    model: ModelCall,
    table: Table | ShiftedTable,
    seeds: SeedsLike,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device | None = None,
    start: Tensor | None = None,
    cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: bool = False,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Samples (B, *shape) from a table, one for each seed; a seed gives the same noise in any batch, on any device.

    model: any callable (x, t) -> f, or -> (f, u) for guidance, u the unconditional output; what has f as `.sample`, as
    diffusers' networks return it, counts as f. x is c_in times the state, t a tensor (B,), int64 timesteps or float32 noise
    levels. f has x's shape, or twice its channels where the variance is learned: the second half is then v, which tables without
    learned variance ignore. x comes in `dtype`; f may have float32, float16 or bfloat16: a network in double is called as
    lambda x, t: net(x.double(), t).float().
    table: one sampler's Table, or a ShiftedTable (`time_shift`). seeds: int64 (B,), or a list or range of integers. shape: of one
    sample. dtype: of the state. device: default the table's. start: the state to start from, (B, *shape); default initial_sigma
    times the seeds' normals.
    cond_fn: (x, t) -> gradient of log p(y | x), for tables with classifier guidance. progress: show a bar.
    callback: called as callback(i, x, m0) after row i; m0 estimates x_0, or eps where table.keeps_x0 is False.
    Raises ValueError for a table of several samplers, another dtype, a start of another shape, an output of the model or of
    cond_fn of another shape, dtype or device, a model output without the second half that the table needs, or a cond_fn that the
    table cannot use; TypeError for an argument, or an output of the model or of cond_fn, that is no such thing at all. What the
    model raises goes through, with a note of what it was called with.
    """
    table, shifted = on_device(table, device)
    check_callables(model=model, cond_fn=cond_fn, callback=callback)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    if cond_fn is not None and not table.takes_grad:
        raise ValueError(f"cond_fn: {table.name} has no classifier guidance (c_grad is 0)")
    seeds = as_seeds(seeds, table.device)
    t_dtype = torch.int64 if table.discrete else torch.float32
    timesteps = torch.tensor([t for t, _ in table.calls], dtype=t_dtype, device=table.device)

    if start is None:
        x = table.initial_sigma * normal(seeds, shape)
    elif isinstance(start, torch.Tensor):
        x = start.to(table.device)
    else:
        raise TypeError(f"start: expected a tensor, got {describe(start)}")
    if x.shape != (len(seeds), *shape):
        raise ValueError(f"start: expected shape {(len(seeds), *shape)}, got {tuple(x.shape)}")
    x = x.to(dtype)
    trajectory = Trajectory(table, x, rows=shifted.rows if shifted else table)
    rows = range(len(table))
    # tqdm starts a thread of its own, also for a bar that is not shown.
    for i in tqdm(rows, desc=table.name) if progress and not is_dynamo_compiling() else rows:
        x, c_in = trajectory.x, table.calls[i][1]
        index, t = shifted.choose(i, x) if shifted else (i, timesteps[i].expand(len(seeds)))
        f, u, v = outputs(ask(model, x if c_in == 1 else c_in * x, t), x, table)
        grad = None if cond_fn is None else _gradient(cond_fn(x, t), x).to(dtype)
        m0 = trajectory.step(index, f, u, v, grad=grad, seeds=seeds, returns_m0=callback is not None)
        if callback is not None and m0 is not None:
            callback(i, trajectory.x, m0)
    return trajectory.x


def check_callables(**functions: object) -> None:
    """Raises TypeError for what cannot be called; all but model may be None."""
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "model"):
            raise TypeError(f"{name}: expected a callable, got {describe(function)}")


def _gradient(value: object, x: Tensor) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"cond_fn: expected it to return a tensor, as x, got {describe(value)}")
    if value.shape != x.shape:
        raise ValueError(f"cond_fn: expected a gradient of shape {tuple(x.shape)}, as x has, got {tuple(value.shape)}")
    return value


def pfgmpp_prior(seeds: SeedsLike, shape: Shape, sigma_max: float, D: int, *, device: Device | None = None) -> Tensor:
    """PFGM++'s prior (arXiv 2302.04265, eq. 5): samples (B, *shape), float32, to pass as sample(..., start=).

    Its radius is sigma_max*sqrt(D)*sqrt(b/(1 - b)), b ~ Beta(N/2, D/2), N the elements of a sample, its direction uniform. That
    is sigma_max*z*sqrt(D/chi2), chi2 of D degrees: a Gaussian in the limit of D. A seed gives the same z as for other samplers.
    """
    if isinstance(D, bool) or not isinstance(D, int) or D < 1:
        raise ValueError(f"D: expected an integer of at least 1, got {D!r}")
    if not (isinstance(sigma_max, Real) and 0 < sigma_max < math.inf):
        raise ValueError(f"sigma_max: expected a finite value above 0, got {describe(sigma_max)}")
    by_default: Device = getattr(seeds, "device", "cpu")
    seeds = as_seeds(seeds, device or by_default)
    z = normal(seeds, shape).double()
    chi2 = normal(seeds, (int(D),), draw=1).double().square().sum(1)
    factor = (sigma_max * (D / chi2).sqrt()).reshape(-1, *[1] * len(shape))
    return (factor * z).float()
