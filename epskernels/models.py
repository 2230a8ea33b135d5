"""Trained networks from a diffusers directory, as the callables that sample() takes."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import schedule
from .files import read_object
from .typing import Device, FilePath, ModelCall

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["DIGITS", "Model", "load"]

DIGITS = pathlib.Path(__file__).with_name("digits")  # ships with the package: see its README.md


@dataclasses.dataclass
class Model:
    """A network and what a table for it needs.

    call: (x, t) -> f, or (f, u) with classes. variance: ddpm's. grid: where its timesteps are, for DiscreteSchedule.grid.
    final: where ddim's last step ends. shape: of one sample. classes: how many, 0 for an unconditional network.
    """

    network: "UNet2DModel"
    schedule: schedule.DiscreteSchedule
    prediction: str
    variance: str
    clip: float | None
    grid: dict[str, Any]
    final: str
    shape: tuple[int, ...]
    classes: int

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of its output's channels is v."""
        return self.variance == "learned_range"

    def callable(self, label: int | None = None, guidance: float = 1.0) -> ModelCall:
        """The network as sample() calls it. label: a class; with guidance other than 1 its last class is the empty one.

        Raises ValueError for a label or a guidance that the network cannot use.
        """
        if self.classes == 0:
            if label is not None or guidance != 1:
                raise ValueError("guidance and class need a network with classes, and this one has none")
            return lambda x, t: self.network(self._cast(x), t, return_dict=False)[0]
        if label is None or not 0 <= label < self.classes:
            raise ValueError(f"class: expected a class in [0, {self.classes}), got {label}")

        def conditional(x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            labels = torch.full((len(x),), label, device=x.device)
            if guidance == 1:
                return self.network(self._cast(x), t, class_labels=labels, return_dict=False)[0]
            both = torch.cat([labels, torch.full_like(labels, self.classes - 1)])
            output = self.network(self._cast(x).repeat(2, 1, 1, 1), t.repeat(2), class_labels=both, return_dict=False)[
                0
            ]
            f, u = output.chunk(2)
            return f, u

        return conditional

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.network.dtype)


def load(directory: FilePath = DIGITS, device: Device = "cpu") -> Model:
    """The UNet2DModel and the schedule of betas of a diffusers pipeline directory (unet/, scheduler/).

    Of the scheduler's configuration all is heeded that says what the network has learned, and where the samplers ddpm, ddim,
    euler, euler_ancestral, heun and unipc call it; what is of its own solver alone (its order, Karras' sigmas) is not: the
    sampler is chosen here.
    Raises FileNotFoundError where one of them is missing, ValueError for a network or a schedule that has no counterpart here.
    """
    import diffusers
    from diffusers.utils import logging

    directory = pathlib.Path(directory)
    _, said = (_config(directory, part) for part in ("unet/config.json", "scheduler/scheduler_config.json"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network = diffusers.UNet2DModel.from_pretrained(directory / "unet").eval().requires_grad_(False).to(device)
        named = said.get("_class_name", "DDPMScheduler")
        kind: Any = getattr(diffusers, str(named), None)
        if lacks := getattr(kind, "_backends", None):  # diffusers' stand-in for a class
            raise ValueError(f"model: {named} of {directory} needs {', '.join(lacks)}: pip install {' '.join(lacks)}")
        is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        if not is_scheduler:
            raise ValueError(f"model: expected a scheduler of diffusers in {directory}, got {named!r}")
        scheduler = kind.from_pretrained(directory / "scheduler")
    # What diffusers raises for a configuration that makes no sense: of a schedule of betas, of numbers that are none.
    except (NotImplementedError, TypeError, NameError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"model: {directory}: {str(error).splitlines()[0]}") from None
    finally:
        logging.set_verbosity(verbosity)
    unet, config = network.config, scheduler.config  # with the defaults of that scheduler for what is not said
    if config.get("prediction_type") not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"model: unknown prediction type {config.get('prediction_type')!r} in {directory}")
    for name in ("thresholding", "use_flow_sigmas"):
        if config.get(name):
            raise ValueError(f"model: {name} of {directory}/scheduler has no counterpart here")
    size = (unet.sample_size,) * 2 if isinstance(unet.sample_size, int) else tuple(unet.sample_size or ())
    if len(size) != 2:
        raise ValueError(f"model: expected a sample_size (H, W) in {directory}/unet, got {unet.sample_size}")
    return Model(
        network=network,
        schedule=_betas(config, scheduler),
        prediction=config.prediction_type,
        variance=_variance(config, unet),
        clip=config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        grid={"spacing": config.get("timestep_spacing", "leading"), "steps_offset": config.get("steps_offset", 0)},
        final="clean" if config.get("set_alpha_to_one", True) else "first",
        shape=(unet.in_channels, *size),
        classes=unet.num_class_embeds or 0,
    )


def _config(directory: pathlib.Path, part: str) -> dict[str, Any]:
    path = directory / part
    if not path.exists():
        raise FileNotFoundError(f"model: expected {part} in {directory}, the directory of a diffusers pipeline")
    return read_object(path, "model: expected a configuration of diffusers")


def _variance(config: Any, unet: Any) -> str:
    """What ddpm takes where nothing else is said."""
    kind = config.get("variance_type") or "fixed_small"
    if unet.out_channels == unet.in_channels:
        return "fixed_large" if kind.startswith("fixed_large") else "fixed_small"
    if unet.out_channels != 2 * unet.in_channels:
        raise ValueError(f"model: expected {unet.in_channels} output channels, or twice that, got {unet.out_channels}")
    if kind == "learned":
        raise ValueError("model: a variance that is learned other than as a range has no counterpart here")
    return "learned_range"


def _betas(config: Any, scheduler: Any) -> schedule.DiscreteSchedule:
    """The schedule in float64, from its formula where the configuration names one."""
    T, name = config.num_train_timesteps, config.get("beta_schedule")
    if config.get("trained_betas") is None and name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        ends = () if name == "squaredcos_cap_v2" else (config.beta_start, config.beta_end)
        path = (schedule.cosine if name == "squaredcos_cap_v2" else getattr(schedule, name))(T, *ends)
        path = path.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else path
    elif name is not None:
        path = schedule.from_betas(scheduler.betas.double().numpy())
    else:
        raise ValueError(f"model: expected a scheduler of betas, got {type(scheduler).__name__}")
    theirs = scheduler.alphas_cumprod.double().numpy()
    if path.abar.shape != theirs.shape or not np.allclose(path.abar, theirs, rtol=1e-2, atol=1e-5):
        raise ValueError(f"model: the noise levels of {type(scheduler).__name__} have no counterpart here")
    return path
