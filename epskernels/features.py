"""Features of images for a Fréchet distance (`quality.frechet`) that need no training and no download, for any size.

    pixels       the image, averaged over a coarse grid
    dct          its low frequencies: orthonormal DCT-II coefficients over sqrt(H*W)
    random_conv  a convolutional network of fixed random weights, the same on every machine

Each takes images (N, C, H, W), arrays or tensors of floats in the model's units, and returns float64 (N, D), D at most 64. A
distance in them is **not** FID: it compares settings of one model with each other. Take more images and more samples than D.
FEATURES names these, and those of trained networks: `quality.digit_features`, and `quality.inception_features`.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import normal
from .quality import digit_features, inception_features
from .typing import Array, Shape

__all__ = ["FEATURES", "dct", "default", "pixels", "random_conv"]

DIMS = 64
STREAM_FEATURES = 3  # of the generator: the random weights


def _checked(images: np.ndarray | Tensor, dims: int) -> Tensor:
    """float32 on the CPU. Raises ValueError naming the argument."""
    found = torch.as_tensor(images)
    if found.dim() != 4 or 0 in found.shape or not found.is_floating_point():
        raise ValueError(f"images: expected floats (N, C, H, W), got {found.dtype} {tuple(found.shape)}")
    if isinstance(dims, bool) or not isinstance(dims, int) or dims < found.shape[1]:
        raise ValueError(f"dims: expected an integer of at least {found.shape[1]}, one for each channel, got {dims!r}")
    return found.detach().float().cpu()


def pixels(images: np.ndarray | Tensor, dims: int = DIMS) -> Array:
    """The means over a grid of as many equal cells as fit into `dims`, of each channel: (N, D), D at most dims.

    8 x 8 of one channel, 4 x 4 of three. Raises ValueError naming the argument.
    """
    found = _checked(images, dims)
    side = math.isqrt(dims // found.shape[1])
    height, width = (min(side, length) for length in found.shape[2:])
    return F.adaptive_avg_pool2d(found.double(), (height, width)).flatten(1).numpy()


def dct(images: np.ndarray | Tensor, dims: int = DIMS) -> Array:
    """The DCT-II coefficients of each channel with the lowest frequencies (u/H)^2 + (v/W)^2, over sqrt(H*W): (N, D), D at most
    dims, as many of each channel.

    Divided so, they do not depend on the size of the image. Raises ValueError naming the argument.
    """
    found = _checked(images, dims).double()
    (height, width), each = found.shape[2:], dims // found.shape[1]
    rows, columns = (torch.arange(n, dtype=torch.float64) / n for n in (height, width))
    lowest = (rows[:, None].square() + columns.square()).flatten().argsort(stable=True)[:each]
    coefficients = _cosines(height) @ found @ _cosines(width).T / math.sqrt(height * width)
    return coefficients.flatten(2)[:, :, lowest].flatten(1).numpy()


def _cosines(n: int) -> Tensor:
    """The orthonormal DCT-II, (n, n) float64."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * torch.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))


@torch.no_grad()
def random_conv(images: np.ndarray | Tensor, dims: int = DIMS, *, seed: int = 0, batch: int = 250) -> Array:
    """Means over the image of a convolutional network of random weights: (N, dims).

    The weights are normals of `seed`, the same bits on every machine. A 3 x 3 convolution and a ReLU at full size, then others
    that halve it until the shorter side is 4 or less, so that the last sees the whole image; each layer gives as many channels.
    Every other filter of the first one sums to 0: on even ground it sees noise alone. Raises ValueError naming the argument.
    """
    found = _checked(images, dims)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
    layers = 1 + max(1, math.ceil(math.log2(min(found.shape[2:]) / 4)))
    each = [len(part) for part in np.array_split(np.arange(dims), layers)]
    weights, parts = _random_weights(found.shape[1], layers, max(64, *each), seed), []
    for x in found.split(batch):
        means = []
        for n, (weight, count) in enumerate(zip(weights, each, strict=True)):
            x = F.relu(F.conv2d(x, weight, stride=2 if n else 1, padding=1))
            means.append(x[:, :count].mean((2, 3)))
        parts.append(torch.cat(means, 1))
    return torch.cat(parts).double().numpy()


@functools.lru_cache(maxsize=8)
def _random_weights(channels: int, layers: int, width: int, seed: int) -> tuple[Tensor, ...]:
    """Of each layer, (width, channels or width, 3, 3)."""
    inputs, made = [channels, *[width] * (layers - 1)], []
    for n, count in enumerate(inputs):
        weight = normal(torch.tensor([seed]), (width, count, 3, 3), draw=n, stream=STREAM_FEATURES)[0].double()
        made.append(weight * math.sqrt(2 / (9 * count)))  # keeps the mean square through a ReLU
    made[0][::2] -= made[0][::2].mean((2, 3), keepdim=True)
    return tuple(weight.float() for weight in made)


def default(shape: Shape) -> str:
    """The name of the features that `epskernels calibrate` takes for samples of a shape (C, H, W): "digits" for 28 x 28 of one
    channel, which it takes for digits; otherwise "random-conv"."""
    return "digits" if tuple(shape) == (1, 28, 28) else "random-conv"


# By the name that --features takes.
FEATURES: dict[str, Callable[..., Array]] = {
    "digits": digit_features,
    "pixels": pixels,
    "dct": dct,
    "random-conv": random_conv,
    "inception": inception_features,
}
