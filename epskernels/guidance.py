"""What guidance and thresholding need of a whole sample, before the step: one number each, which the step then takes.

    rescale    phi*std(f)/std(fhat) + 1 - phi,  fhat = u + g*(f - u)    Lin et al., arXiv 2305.08891, eq. 15 and 16
    threshold  max(1, the quantile of |m0|)                             Saharia et al., arXiv 2205.11487, section 2.3

The first takes one pass over f and u (`moments`); the second is PyTorch's ops.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .ops import fail, moments, rows_and_index, step
from .spec import ROW_WIDTHS, ROWS_SHAPE
from .table import Table, denoising_rows, describe
from .typing import Backend, Index

__all__ = ["abs_m0", "dynamic_threshold", "guidance_rescale", "quantile_of_sizes"]

# A standard deviation below 2^-24 of the root mean square is rounding: float32 values that close are equal. The float64 sums of
# equal values err by some 2^-52 of their squares.
_ROUNDING = 2.0**-48


def guidance_rescale(
    f: Tensor, u: Tensor, table: Table | Tensor, index: Index, phi: float = 0.7, *, backend: Backend | None = None
) -> Tensor:
    """The factor that brings the guided output's standard deviation towards the conditional one's: (B,) float32, for
    `step(..., u=u, rescale=...)`.

    A sample whose guided output is constant, zeros too, has no deviation to bring anywhere: its factor is 1.

    f, u: the model's outputs, conditional and unconditional, (B, ...), float32, float16 or bfloat16. table: a Table, or its rows:
    float32 (R, 24). index: an int, or an int64 tensor, () for one row or (B,) for a row each. phi: how far, in [0, 1]; 0 gives
    ones. backend: what runs, one of BACKENDS; None for what `use_backend` says.
    Raises ValueError for phi, RuntimeError for the others. Lin et al., arXiv 2305.08891, eq. 15 and 16.
    """
    if not (isinstance(phi, Real) and 0 <= phi <= 1):
        raise ValueError(f"phi: expected a value in [0, 1], got {phi!r}")
    if u is None:
        fail("u: expected a tensor, got None")
    sums = moments(f, u, table, index, backend=backend)
    numel = f[0].numel()
    total = numel * sums[:, 1::2]
    squares = total - sums[:, ::2] * sums[:, ::2]  # of the deviations from the mean, times numel
    squares = torch.where(squares <= _ROUNDING * total, 0.0, squares)
    ratio = torch.where(squares[:, 1] == 0, 1.0, (squares[:, 0] / squares[:, 1]).sqrt())
    return (phi * ratio + (1 - phi)).float()


def dynamic_threshold(
    x: Tensor,
    f: Tensor,
    table: Table | Tensor,
    index: Index,
    *,
    u: Tensor | None = None,
    rescale: Tensor | None = None,
    ratio: float = 0.995,
    sample_max_value: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """The quantile of |m0| in each sample, at least 1 and at most sample_max_value: (B,) float32, for `step(..., threshold=...)`.

    x: the state, (B, ...), float32, float16 or bfloat16. f, u: the model's outputs, conditional and unconditional, x's shape, any
    of the three dtypes; u is needed where the row's g is not 1. table: a Table, or its rows: float32 (R, 24). index: an int, or
    an int64 tensor, () for one row or (B,) for a row each. rescale: (B,) float32, times the guided output (`guidance_rescale`).
    ratio: which quantile, in (0, 1], between two elements by linear interpolation. sample_max_value: at least 1; inf for no
    bound. backend: what runs, one of BACKENDS; None for what `use_backend` says. Raises ValueError for ratio and
    sample_max_value, or a table whose m0 is not x_0, RuntimeError for the others. Saharia et al., arXiv 2205.11487, section
    2.3; diffusers' `_threshold_sample`.
    """
    if not (isinstance(ratio, Real) and 0 < ratio <= 1):
        raise ValueError(f"ratio: expected a value in (0, 1], got {ratio!r}")
    if not (isinstance(sample_max_value, Real) and sample_max_value >= 1):
        raise ValueError(f"sample_max_value: expected a value of at least 1, got {sample_max_value!r}")
    if isinstance(table, Table) and not table.keeps_x0:
        raise ValueError(
            f"table: expected one whose m0 is x_0, and {table.name} keeps eps: it has nothing to threshold"
        )
    size = abs_m0(x, f, table, index, u=u, rescale=rescale, backend=backend)
    return quantile_of_sizes(size, ratio).clamp(1.0, sample_max_value)


def quantile_of_sizes(size: Tensor, ratio: float) -> Tensor:
    """The quantile of each sample's elements, (B,) float32, by linear interpolation, of samples of any size.

    torch.quantile takes 2^24 elements in all. size: float32 (B, ...). NaN where a sample has one.
    """
    size = size.flatten(1)
    position = ratio * (size.shape[1] - 1)
    below = math.floor(position)
    # From the largest down: the two elements that the quantile lies between are the last of them.
    largest = size.topk(size.shape[1] - below, dim=1).values
    low, high = largest[:, -1].double(), largest[:, max(-2, -largest.shape[1])].double()
    quantile = (low + (position - below) * (high - low)).float()
    return torch.where(size.isnan().any(1), float("nan"), quantile)


def abs_m0(x: Tensor, f: Tensor, table: Table | Tensor, index: Index, **named: Any) -> Tensor:
    """|m0|, float32, of rows that are left without all else: whatever history, noise or second state they ask for."""
    if not isinstance(x, torch.Tensor):
        fail(f"x: expected a tensor, got {describe(x)}")
    rows, index = rows_and_index(table, index, x)
    if not isinstance(rows, torch.Tensor):
        fail(f"table: expected a Table, or its rows: a float32 tensor {ROWS_SHAPE}, got {describe(rows)}")
    if rows.dim() != 2 or rows.shape[1] not in ROW_WIDTHS:
        fail(f"rows: expected shape {ROWS_SHAPE}, got {tuple(rows.shape)}")
    if isinstance(table, Table) and table.device != x.device:
        fail(f"table: expected one on {x.device}, as x is, got one on {table.device}: Table.to(device) makes it")
    return step(x.float(), f, denoising_rows(rows), index, return_m0=True, **named)[1].abs()
