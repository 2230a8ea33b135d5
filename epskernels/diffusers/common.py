"""What the families of schedulers share beside the mixin: messages, diffusers' draw of noise, dtypes, predictions."""

import functools
import logging
import math
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from .. import solvers
from ..typing import Array

_log = logging.getLogger("epskernels")
OURS = "eps_scaling", "correction"  # of a scheduler's configuration
# What these are called elsewhere in this package, or by others.
_OTHER_NAMES = {
    "scaling": OURS[0],
    "epsilon_scaling": OURS[0],
    "lambda_": OURS[0],
    "lambda_t": OURS[0],
    "corrections": OURS[1],
}

# What a scheduler's method is called among `epskernels.samplers`, by its class's name (docs/samplers.md).
SAMPLERS = {
    "CMStochasticIterativeScheduler": ("consistency",), "DDIMInverseScheduler": ("ddim_inverse",),
    "DDIMParallelScheduler": ("ddim",), "DDIMScheduler": ("ddim",),
    "DDPMParallelScheduler": ("ddpm",), "DDPMScheduler": ("ddpm",), "DEISMultistepScheduler": ("deis",),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde"),
    "DPMSolverSDEScheduler": ("dpmpp_sde",), "DPMSolverSinglestepScheduler": ("dpmpp_2s", "dpmpp_3s", "dpm_solver"),
    "EDMDPMSolverMultistepScheduler": ("dpmpp_2m", "dpmpp_3m"), "EDMEulerScheduler": ("edm_euler",),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral",), "EulerDiscreteScheduler": ("euler", "edm_euler"),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler",), "FlowMatchLCMScheduler": ("flow_euler",),
    "HeunDiscreteScheduler": ("heun", "edm_heun"), "IPNDMScheduler": ("ipndm",),
    "KDPM2AncestralDiscreteScheduler": ("dpm_2_ancestral",), "KDPM2DiscreteScheduler": ("dpm_2",), "LCMScheduler": ("lcm",),
    "LMSDiscreteScheduler": ("lms",), "LTXEulerAncestralRFScheduler": ("flow_euler",), "PNDMScheduler": ("plms",),
    "SASolverScheduler": ("sa_solver",), "TCDScheduler": ("tcd",), "UnCLIPScheduler": ("ddpm",),
    "UniPCMultistepScheduler": ("unipc",),
}  # fmt: skip

Columns = dict[str, Any]  # of rows, by name: float64, (R,), or one number for all
Draws = bool | NDArray[np.bool_]  # whether a step draws noise, or which rows do, (R,)
Formula = tuple[Columns, Draws]
Levels = tuple[Array, Array, Array, Array]  # alpha, sigma, d_x and d_f
Options = tuple[Any, ...]  # the arguments of step that change the rows
# What step is given and returns: the timestep as it stands in the schedule; diffusers' output class, or a tuple of its tensors.
Timestep = Tensor | float
Generators = torch.Generator | list[torch.Generator] | None
Result = Any


class Ends(NamedTuple):
    """Of each row: where its step ends, whether it is the last call of that, and which row of the schedule is the first call.

    alpha, sigma: of x' = alpha*x_0 + sigma*eps there; sigma 0: an image without noise. All (N,), or of all rows.
    """

    alpha: Array
    sigma: Array
    last: NDArray[np.bool_]
    first: NDArray[np.integer]


def ends_of(alpha: Array, sigma: Array, last: NDArray[np.bool_] | None = None) -> Ends:
    """The Ends of rows whose steps follow each other; last: by default each call ends a step."""
    last = np.ones(len(sigma), dtype=bool) if last is None else last
    begins = np.append(True, last[:-1])
    return Ends(alpha, sigma, last, np.flatnonzero(begins)[np.cumsum(begins) - 1])


def refuse_other_names(of: str, given: Iterable[str], known: Container[str] = ()) -> None:
    """Raises TypeError for an argument of `of` that has another name here, if it is not one of `known`."""
    for name in given:
        if name in _OTHER_NAMES and name not in known:
            raise TypeError(f"{name}: {of} has no such argument; it is {_OTHER_NAMES[name]}= here")


def say(scheduler: object, message: str) -> None:
    """Once for each class and message."""
    say_of(type(scheduler).__name__, message)


@functools.lru_cache(maxsize=256)
def say_of(name: str, message: str) -> None:
    """`say`, by the class's name."""
    _log.warning("epskernels.diffusers.%s %s", name, message)


def draw_noise(f: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> Tensor:
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


def as_float64(values: Any) -> Array:
    """A tensor, an array or numbers as a float64 array on the host."""
    return np.asarray(torch.as_tensor(values).detach().cpu().double())


def widest(f: Tensor, x: Tensor) -> Tensor:
    """x in the dtype that holds both."""
    return x if x.dtype is f.dtype else x.to(torch.promote_types(x.dtype, f.dtype))


def clip_of(config: Any) -> float:
    """The bound of clip_sample; thresholding comes first in diffusers."""
    on = getattr(config, "clip_sample", False) and not getattr(config, "thresholding", False)
    return float(config.clip_sample_range) if on else math.inf


def as_dtype_of(m: Tensor | None, x: Tensor) -> Any:
    """m in x's dtype; None stays None."""
    return m if m is None or m.dtype is x.dtype else m.to(x.dtype)


# ---- what the model's output says ----


def check_output(f: Tensor, x: Tensor) -> None:
    """Raises ValueError for an output of another shape or device than the state's, by the names of step's arguments."""
    if f.device != x.device:
        raise ValueError(f"model_output: expected a tensor on {x.device} as sample is, got one on {f.device}")
    if f.shape == x.shape:
        return
    hint = ""
    if f.dim() == x.dim() > 1 and f.shape[1] == 2 * x.shape[1]:
        hint = (
            "; twice its channels: the model predicts a variance too, as DDPMScheduler takes it with "
            'variance_type="learned_range"'
        )
    raise ValueError(f"model_output: expected shape {tuple(x.shape)} as sample has, got {tuple(f.shape)}{hint}")


_KNOWN = ("epsilon", "sample", "v_prediction", "flow_prediction")


def output_of(prediction: str, alpha: Array, sigma: Array, known: tuple[str, ...] = _KNOWN[:3]) -> tuple[Array, Array]:
    """(f_x0, f_eps) of the network's output on a variance-preserving path. Raises ValueError for an unknown prediction."""
    if prediction not in known:
        raise ValueError(f"prediction_type: expected one of {known}, got {prediction!r}")
    return solvers.model_output(prediction, alpha, sigma)


def x0_of(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(d_x, d_f) of x_0 on a variance-preserving path, as diffusers has it: a flow's x_0 is x - sigma*f on any."""
    if prediction == "flow_prediction":
        return np.ones_like(sigma), -sigma
    return positive_zeros(solvers.x0_of(*output_of(prediction, alpha, sigma, _KNOWN), alpha, sigma))


def eps_of(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(e_x, e_f) of eps on a variance-preserving path; a flow's from its x_0, on any path."""
    if prediction == "flow_prediction":
        d_x, d_f = x0_of(prediction, alpha, sigma)
        return (1 - alpha * d_x) / sigma, -alpha * d_f / sigma
    return positive_zeros(solvers.eps_of(*output_of(prediction, alpha, sigma), alpha, sigma))


def positive_zeros(columns: tuple[Array, Array]) -> tuple[Array, Array]:
    """The two columns with +0 for -0."""
    of_x, of_f = columns
    return of_x + 0.0, of_f + 0.0


def refuse_integers(scheduler: object, timestep: Timestep) -> None:
    """Raises ValueError for an integer where timesteps are none: an index of the schedule is not its timestep."""
    if isinstance(timestep, int) or getattr(timestep, "dtype", None) in (torch.int64, torch.int32):
        raise ValueError(
            f"timestep: expected one of {type(scheduler).__name__}'s own timesteps, got the integer {timestep}"
        )
