"""Trained networks from a diffusers directory, as the callables that sample() takes."""

import dataclasses
import pathlib

import torch

from . import schedule

DIGITS = pathlib.Path(__file__).with_name("digits")  # ships with the package: see its README.md


@dataclasses.dataclass
class Model:
    """A network and what a table for it needs.

    call: (x, t) -> f, or (f, u) with classes. shape: of one sample. classes: how many, 0 for an unconditional network.
    """

    network: torch.nn.Module
    schedule: schedule.DiscreteSchedule
    prediction: str
    learned_variance: bool
    clip: float | None
    shape: tuple
    classes: int

    def callable(self, label=None, guidance=1.0):
        """The network as sample() calls it. label: a class; with guidance other than 1 its last class is the empty one.

        Raises ValueError for a label or a guidance that the network cannot use.
        """
        if self.classes == 0:
            if label is not None or guidance != 1:
                raise ValueError("guidance and class need a network with classes, and this one has none")
            return lambda x, t: self.network(self._cast(x), t, return_dict=False)[0]
        if label is None or not 0 <= label < self.classes:
            raise ValueError(f"class: expected a class in [0, {self.classes}), got {label}")

        def conditional(x, t):
            labels = torch.full((len(x),), label, device=x.device)
            if guidance == 1:
                return self.network(self._cast(x), t, class_labels=labels, return_dict=False)[0]
            both = torch.cat([labels, torch.full_like(labels, self.classes - 1)])
            output = self.network(self._cast(x).repeat(2, 1, 1, 1), t.repeat(2), class_labels=both, return_dict=False)[
                0
            ]
            return tuple(output.chunk(2))

        return conditional

    def _cast(self, x):
        return x.to(self.network.dtype)


def load(directory=DIGITS, device="cpu"):
    """The UNet2DModel and the DDPM schedule of a diffusers pipeline directory (unet/, scheduler/).

    Raises FileNotFoundError where one of them is missing, ValueError for a schedule that has no counterpart here.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.utils import logging

    directory = pathlib.Path(directory)
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (directory / part).exists():
            raise FileNotFoundError(f"model: expected {part} in {directory}, the directory of a diffusers pipeline")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network = UNet2DModel.from_pretrained(directory / "unet").eval().requires_grad_(False).to(device)
        scheduler = DDPMScheduler.from_pretrained(directory / "scheduler")
    finally:
        logging.set_verbosity(verbosity)
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"model: unknown prediction type {config.prediction_type!r} in {directory}")
    size = network.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return Model(
        network=network,
        schedule=_betas(config, scheduler),
        prediction=config.prediction_type,
        learned_variance=network.config.out_channels == 2 * network.config.in_channels,
        clip=config.clip_sample_range if config.clip_sample else None,
        shape=(network.config.in_channels, *size),
        classes=network.config.num_class_embeds or 0,
    )


def _betas(config, scheduler):
    """The schedule in float64, from its formula where the configuration names one."""
    T, given = config.num_train_timesteps, config.trained_betas is not None
    if not given and config.beta_schedule == "squaredcos_cap_v2":
        return schedule.cosine(T)
    if not given and config.beta_schedule in ("linear", "scaled_linear"):
        return getattr(schedule, config.beta_schedule)(T, config.beta_start, config.beta_end)
    return schedule.from_betas(scheduler.betas.double().numpy())
