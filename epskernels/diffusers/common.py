"""What the families of schedulers share beside the mixin: messages, diffusers' draw of noise, dtypes, predictions."""

import functools
import logging
import math

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .. import solvers

_log = logging.getLogger("epskernels")


def say(scheduler, message):
    """Once for each class and message."""
    say_of(type(scheduler).__name__, message)


@functools.lru_cache(maxsize=256)
def say_of(name, message):
    _log.warning("epskernels.diffusers.%s %s", name, message)


def draw_noise(f, generator, dtype=None):
    """diffusers' randn_tensor of f's shape, in `dtype`, default f's.

    Where one generator draws where f is, it is what that comes to, without its overhead.
    """
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == f.device.type):
        if (
            dtype is None or dtype is f.dtype
        ) and f.is_contiguous():  # naming what f has anyway takes as long as making it
            return torch.randn_like(f) if generator is None else torch.empty_like(f).normal_(generator=generator)
        return torch.empty_like(f, dtype=dtype, memory_format=torch.contiguous_format).normal_(generator=generator)
    return randn_tensor(f.shape, generator=generator, device=f.device, dtype=dtype or f.dtype)


def as_float64(values):
    return np.asarray(torch.as_tensor(values).detach().cpu().double())


def widest(f, x):
    """x in the dtype that holds both."""
    return x if x.dtype is f.dtype else x.to(torch.promote_types(x.dtype, f.dtype))


def clip_of(config):
    """The bound of clip_sample; thresholding comes first in diffusers."""
    on = getattr(config, "clip_sample", False) and not getattr(config, "thresholding", False)
    return float(config.clip_sample_range) if on else math.inf


def as_dtype_of(m, x):
    return m if m is None or m.dtype is x.dtype else m.to(x.dtype)


# ---- what the model's output says ----

_KNOWN = ("epsilon", "sample", "v_prediction", "flow_prediction")


def output_of(prediction, alpha, sigma, known=_KNOWN[:3]):
    """(f_x0, f_eps) of the network's output on a variance-preserving path. Raises ValueError for an unknown prediction."""
    if prediction not in known:
        raise ValueError(f"prediction_type: expected one of {known}, got {prediction!r}")
    return solvers.model_output(prediction, alpha, sigma)


def x0_of(prediction, alpha, sigma):
    """(d_x, d_f) of x_0 on a variance-preserving path, as diffusers has it: a flow's x_0 is x - sigma*f on any."""
    if prediction == "flow_prediction":
        return np.ones_like(sigma), -sigma
    return positive_zeros(solvers.x0_of(*output_of(prediction, alpha, sigma, _KNOWN), alpha, sigma))


def eps_of(prediction, alpha, sigma):
    """(e_x, e_f) of eps on a variance-preserving path; a flow's from its x_0, on any path."""
    if prediction == "flow_prediction":
        d_x, d_f = x0_of(prediction, alpha, sigma)
        return (1 - alpha * d_x) / sigma, -alpha * d_f / sigma
    return positive_zeros(solvers.eps_of(*output_of(prediction, alpha, sigma), alpha, sigma))


def positive_zeros(columns):
    return tuple(column + 0.0 for column in columns)


def refuse_integers(scheduler, timestep):
    if isinstance(timestep, int) or getattr(timestep, "dtype", None) in (torch.int64, torch.int32):
        raise ValueError(
            f"timestep: expected one of {type(scheduler).__name__}'s own timesteps, got the integer {timestep}"
        )
