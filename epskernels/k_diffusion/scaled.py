"""Epsilon Scaling alone, for a denoiser's answers in a loop of one's own."""

import reprlib

import numpy as np
import torch
from torch import Tensor

from ..ops import step
from .sampling import (
    number,
    sample_rows,
    shown,
)


def scale_denoised(x: Tensor, denoised: Tensor, eps_scaling: float | Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """The denoised estimate with its eps divided by lambda, in one pass: x/alpha - (x/alpha - denoised)/lambda.

    x: (B, ...), alpha*x_0 + sigma*eps: alpha is 1 for k-diffusion's state, 1 - sigma for a flow's. denoised: x's shape.
    eps_scaling: lambda. It and alpha: a finite number above 0, or a tensor of them, float32 or float64, () or (B,), one
    for each sample. Returns x's shape and dtype. Raises ValueError for lambda or alpha. On a GPU the host does not read a
    tensor's values: a sample with a bad one comes out as NaN.
    """
    lambda_t, alpha = _per_sample("eps_scaling", eps_scaling, x), _per_sample("alpha", alpha, x)
    return step(x, denoised, *sample_rows(x, c_x=(lambda_t - 1) / lambda_t / alpha, c_f=1 / lambda_t))


def _per_sample(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(value, torch.Tensor):
        return number(name, value, above_0=True)
    if (
        value.dtype not in (torch.float32, torch.float64)
        or value.shape not in ((), (len(x),))
        or value.device != x.device
    ):
        raise ValueError(
            f"{name}: expected a number, or a tensor of float32 or float64, () or ({len(x)},), on {x.device}, "
            f"got {shown(value)} on {value.device}"
        )
    good = (value > 0) & (value < np.inf)
    if value.device.type == "cpu" and not good.all():
        raise ValueError(f"{name}: expected finite numbers above 0, got {reprlib.repr(value.tolist())}")
    return torch.where(good, value, torch.nan)
