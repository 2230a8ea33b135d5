"""What guidance and thresholding need of a whole sample, before the step: one number each, which the step then takes.

    rescale    phi*std(f)/std(fhat) + 1 - phi,  fhat = u + g*(f - u)    Lin et al., arXiv 2305.08891, eq. 15 and 16
    threshold  max(1, the quantile of |m0|)                             Saharia et al., arXiv 2205.11487, section 2.3

The first takes one pass over f and u, whose sums are float64, in a fixed order; the second is PyTorch's ops.
"""

import math

import numpy as np
import torch

from .checks import fail
from .ops import step
from .table import COLUMNS, Table, denoising_rows


def moments(f, u=None, table=None, index=None):
    """Sums over each sample, float64 (B, 2): of f and of f^2; with u, (B, 4): of the guided output fhat and fhat^2 too.

    f: (B, ...), float32, float16 or bfloat16. u: as f; table (or its rows) and index as in `step`: fhat = u + g*(f - u), in
    float32, as the step forms it. The same bits on every device: tiles of 1,024 elements, halves added to halves, then the
    tiles likewise.
    Raises RuntimeError naming the argument; for one that requires grad too: there is no gradient, and the sums of f.detach() are
    constants.
    """
    rows = table.rows if isinstance(table, Table) else table
    if torch.is_grad_enabled():
        for name, tensor in (("f", f), ("u", u), ("rows", rows)):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                fail(
                    f"{name}: expected a tensor that does not require grad, or torch.no_grad(): moments have no gradient"
                )
    if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
        index = torch.tensor(int(index), device=f.device)
    return torch.ops.epskernels.moments(f, u, rows, index)


def guidance_rescale(f, u, table, index, phi=0.7):
    """The factor that brings the guided output's standard deviation towards the conditional one's: (B,) float32, for
    `step(..., u=u, rescale=...)`.

    f, u, table, index: as in `step`. phi: how far, in [0, 1]; 0 gives ones. Where a sample's guided output is constant, the
    factor is not finite.
    Raises ValueError for phi, RuntimeError for the others. Lin et al., arXiv 2305.08891, eq. 15 and 16.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi: expected a value in [0, 1], got {phi!r}")
    sums = moments(f, u, table, index)
    numel = f[0].numel()
    squares = sums[:, 1::2] - sums[:, ::2] * sums[:, ::2] / numel  # of the deviations from the mean
    return (phi * (squares[:, 0] / squares[:, 1]).sqrt() + (1 - phi)).float()


def dynamic_threshold(x, f, table, index, *, u=None, rescale=None, ratio=0.995, sample_max_value=1.0):
    """The quantile of |m0| in each sample, at least 1 and at most sample_max_value: (B,) float32, for `step(..., threshold=...)`.

    x, f, table, index, u, rescale: as in `step`. ratio: which quantile, in (0, 1], between two elements by linear interpolation.
    sample_max_value: at least 1; inf for no bound. Raises ValueError for the last two, RuntimeError for the others.
    Saharia et al., arXiv 2205.11487, section 2.3; diffusers' `_threshold_sample`.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a value in (0, 1], got {ratio!r}")
    if not sample_max_value >= 1:
        raise ValueError(f"sample_max_value: expected a value of at least 1, got {sample_max_value!r}")
    size = abs_m0(x, f, table, index, u=u, rescale=rescale).flatten(1)
    position = ratio * (size.shape[1] - 1)
    below = math.floor(position)
    # From the largest down: the two elements that the quantile lies between are the last of them.
    largest = size.topk(size.shape[1] - below, dim=1).values
    low, high = largest[:, -1].double(), largest[:, max(-2, -largest.shape[1])].double()
    quantile = (low + (position - below) * (high - low)).float()
    quantile = torch.where(size.isnan().any(1), float("nan"), quantile)
    return quantile.clamp(1.0, sample_max_value)


def abs_m0(x, f, table, index, *, u=None, rescale=None):
    """|m0|, float32, of rows that are left without all else: whatever history, noise or second state they ask for."""
    rows = table.rows if isinstance(table, Table) else table
    if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or rows.shape[1] != len(COLUMNS):
        fail(f"rows: expected shape (R, {len(COLUMNS)}), got {getattr(rows, 'shape', rows)}")
    return step(x.float(), f, denoising_rows(rows), index, u=u, rescale=rescale, return_m0=True)[1].abs()
