"""The low band of a sample by Haar's wavelet, one level: the mean of each block, at each of its elements.

    L = ((a00 + a01) + (a10 + a11))*0.25        of each 2x2 block of the last two dimensions
    L = (a0 + a1)*0.5                           of each pair of the last one

What lies outside counts as 0, as PyWavelets' mode "zero" has it for odd sizes. The high band is the rest, x - L.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["low_band"]


def low_band(x: Tensor, dims: int) -> Tensor:
    """The low band of each image, shape and dtype of x, every operation rounded to it. dims: 1 or 2, the last of x.

    Raises ValueError naming the argument.
    """
    if dims not in (1, 2):
        raise ValueError(f"dims: expected 1 or 2, got {dims!r}")
    if x.dim() < dims or not x.is_floating_point():
        raise ValueError(f"x: expected floating point with {dims} dimensions or more, got {x.dtype} {tuple(x.shape)}")
    size = x.shape[-dims:]
    odd = [padding for n in reversed(size) for padding in (0, n % 2)]
    if any(odd):
        x = F.pad(x, odd)
    sums = x[..., 0::2] + x[..., 1::2]
    if dims == 1:
        return (sums * 0.5).repeat_interleave(2, -1)[..., : size[0]]
    means = (sums[..., 0::2, :] + sums[..., 1::2, :]) * 0.25
    return means.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., : size[0], : size[1]]
