"""Networks and what sampling from them needs: a Model of one's own, or one from a diffusers directory."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import schedule
from .files import read_object
from .samplers import PREDICTIONS
from .samplers.common import clip_value, one_of
from .table import describe
from .trajectory import f_and_u
from .typing import Device, FilePath, ModelCall, Shape

__all__ = ["DIGITS", "Model", "load"]

DIGITS = pathlib.Path(__file__).with_name("digits")  # ships with the package: see its README.md
_VARIANCES = ("fixed_small", "fixed_large", "learned_range")
_ELSEWHERE = "; fuse such a pipeline, and search in it: docs/choosing_lambda.md, 'Search in a pipeline of your own'"
_Schedule = schedule.DiscreteSchedule | schedule.KarrasSchedule | schedule.FlowSchedule
_Weights = torch.nn.Module | Tensor


class Model:
    """A network and what sampling from it needs: `epskernels sample --model module:function` calls a function that makes one.

    network: (x, t) -> f, or with classes (x, t, labels) -> f, labels int64 (B,). A torch.nn.Module or another callable. f is a
    tensor, or what has it as `.sample`; with variance "learned_range" it has twice the channels of x. x comes in the dtype of
    the first floating-point tensor of weights, t as the schedule has it: int64 timesteps of a DiscreteSchedule, float32 sigma of
    a KarrasSchedule, float32 T*sigma of a FlowSchedule.
    schedule: what the network was trained on.
    shape: of one sample, such as (3, 64, 64).
    prediction: what f is, one of samplers.PREDICTIONS; default: "sample" for a KarrasSchedule that tells the network sigma,
    "flow" for a FlowSchedule, otherwise "epsilon".
    variance: the sampler ddpm's.
    clip: x_0 is held to [-clip, clip]; None: it is not.
    grid: spacing and steps_offset of a DiscreteSchedule's timesteps.
    final: where the sampler ddim ends: "clean" or "first".
    classes: how many labels there are; 0: the network takes none.
    empty: the label of no class, which classifier-free guidance needs; any integer that the network understands.
    decode: (B, *shape), float32, -> images (B, 1 or 3, H, W) in [-1, 1], such as a VAE's; None: the samples are the images.
    weights: the modules and tensors that network and decode compute with, such as [unet, vae, embeddings]. Their digest tells
    this model from another; without any, nothing that was written can be continued. Default: the network, if it is a Module.
    name: tells it from other models of the same weights; the command line puts --model there.
    Raises ValueError or TypeError that names the argument, also for a Module in training mode.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: _Schedule,
        shape: Shape,
        *,
        prediction: str | None = None,
        variance: str = "fixed_small",
        clip: float | None = None,
        grid: Mapping[str, Any] | None = None,
        final: str = "clean",
        classes: int = 0,
        empty: int | None = None,
        decode: Callable[[Tensor], Any] | None = None,
        weights: _Weights | Sequence[_Weights] | None = None,
        name: str = "",
    ):
        if not callable(network):
            raise TypeError(f"network: expected a callable, got {describe(network)}")
        if decode is not None and not callable(decode):
            raise TypeError(f"decode: expected a callable or None, got {describe(decode)}")
        if not isinstance(shape, (tuple, list)) or not shape or not all(_is_integer(size, 1) for size in shape):
            raise ValueError(f"shape: expected the sizes of one sample, such as (3, 64, 64), got {shape!r}")
        if not _is_integer(classes, 0):
            raise ValueError(f"classes: expected an integer of at least 0, got {classes!r}")
        if empty is not None and (classes == 0 or not _is_integer(empty)):
            raise ValueError(f"empty: expected a label, of a network with classes, or None, got {empty!r}")
        self.network, self.decode, self.name = network, decode, name
        self.grid, self.final = dict(grid or {}), final
        # Any: who has loaded a model of timesteps knows that it has them, and a type checker does not.
        self.schedule: Any = _checked_schedule(schedule, self.grid, final)
        self.shape = tuple(int(size) for size in shape)
        self.prediction = prediction or _default_prediction(schedule)
        one_of("prediction", self.prediction, tuple(PREDICTIONS))
        one_of("variance", variance, _VARIANCES)
        clip_value(clip)
        self.variance, self.clip, self.classes, self.empty = variance, clip, classes, empty
        if weights is None:
            weights = network if isinstance(network, torch.nn.Module) else ()
        self.weights = _checked_weights(weights)

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of its output's channels is v."""
        return self.variance == "learned_range"

    def callable(self, label: int | None = None, guidance: float = 1.0) -> ModelCall:
        """The network as sample() calls it: (x, t) -> f, or -> (f, u) with guidance other than 1, u that of the empty class.

        label: a class. Raises ValueError for a label or a guidance that the network cannot use.
        """
        if self.classes == 0:
            if label is not None or guidance != 1:
                raise ValueError("guidance and class need a network with classes, and this one has none")
            return self._output
        if label is None or not 0 <= label < self.classes:
            raise ValueError(f"class: expected a class in [0, {self.classes}), got {label}")
        if guidance != 1 and self.empty is None:
            raise ValueError(f"guidance: expected 1, since this network has no empty class, got {guidance:g}")

        def conditional(x: Tensor, t: Tensor) -> Tensor:
            return self._output(x, t, torch.full((len(x),), label, device=x.device))

        def guided(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            labels = torch.tensor([label, self.empty], device=x.device).repeat_interleave(len(x))
            f, u = self._output(torch.cat([x, x]), t.repeat(2), labels).chunk(2)
            return f, u

        return conditional if guidance == 1 else guided

    def _output(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        dtypes = (each.dtype for each in self.tensors() if each.is_floating_point())
        f, u = f_and_u(self.network(x.to(next(dtypes, torch.float32)), t, *labels))
        if u is not None:
            raise TypeError(
                "network: expected it to return f alone, got a pair: guidance asks for the empty class itself"
            )
        return f

    def images(self, samples: Tensor) -> Tensor:
        """Samples (B, *shape) as images, float32 (B, 1 or 3, H, W): decoded, if the model has a decode.

        Raises ValueError if they are no images.
        """
        found: Any = samples.float()
        if self.decode is not None:
            with torch.no_grad():
                found = self.decode(found)
        found = getattr(found, "sample", found)
        shape = tuple(found.shape) if isinstance(found, Tensor) else describe(found)
        if not (isinstance(shape, tuple) and len(shape) == 4 and shape[0] == len(samples) and shape[1] in (1, 3)):
            what = "samples" if self.decode is None else "what decode returns"
            raise ValueError(f"{what}: expected images ({len(samples)}, 1 or 3, H, W), got {shape}")
        return found.float()

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the weights: of modules their parameters, then their buffers."""
        for each in self.weights:
            if isinstance(each, Tensor):
                yield each
            else:
                yield from each.parameters()
                yield from each.buffers()


def _is_integer(value: object, low: float = -np.inf) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= low)


def _default_prediction(path: _Schedule) -> str:
    if isinstance(path, schedule.FlowSchedule):
        return "flow"
    return "sample" if isinstance(path, schedule.KarrasSchedule) and path.model is None else "epsilon"


def _checked_schedule(path: Any, grid: dict[str, Any], final: str) -> _Schedule:
    if not isinstance(path, _Schedule):
        raise TypeError(f"schedule: expected a DiscreteSchedule, KarrasSchedule or FlowSchedule, got {describe(path)}")
    one_of("final", final, ("clean", "first"))
    if unknown := grid.keys() - {"spacing", "steps_offset"}:
        raise ValueError(f"grid: expected spacing and steps_offset, got {sorted(unknown)}")
    if isinstance(path, schedule.DiscreteSchedule):
        path.timesteps(1, **grid)
    elif grid or final != "clean":
        raise ValueError(f"grid, final: expected none with a {type(path).__name__}, which has no timesteps")
    return path


def _checked_weights(weights: Any) -> tuple[_Weights, ...]:
    found = (weights,) if isinstance(weights, _Weights) else tuple(weights)
    for each in found:
        if not isinstance(each, _Weights):
            raise TypeError(f"weights: expected modules and tensors, got {describe(each)}")
        if isinstance(each, torch.nn.Module) and each.training:
            raise ValueError(
                f"weights: expected modules in evaluation mode, got a {type(each).__name__} in training: call eval()"
            )
    return found


def load(directory: FilePath = DIGITS, device: Device = "cpu") -> Model:
    """The UNet2DModel and the schedule of betas of an unconditional diffusers pipeline's directory (unet/, scheduler/).

    Of the scheduler's configuration all is heeded that says what the network has learned, and where the samplers ddpm, ddim,
    euler, euler_ancestral, heun and unipc call it; what is of its own solver alone (its order, Karras' sigmas) is not: the
    sampler is chosen here.
    Raises FileNotFoundError where one of them is missing, ValueError for a network or a schedule that has no counterpart here.
    """
    import diffusers
    from diffusers.utils import logging

    directory = pathlib.Path(directory)
    of_unet, said = (_config(directory, part) for part in ("unet/config.json", "scheduler/scheduler_config.json"))
    kind: Any = getattr(diffusers, str(of_unet.get("_class_name")), None)
    if isinstance(kind, type) and not issubclass(kind, diffusers.UNet2DModel):
        raise ValueError(
            f"model: expected a network (x, t) -> f, a UNet2DModel, in {directory}, got a {kind.__name__}{_ELSEWHERE}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network = diffusers.UNet2DModel.from_pretrained(directory / "unet").eval().requires_grad_(False).to(device)
        named = said.get("_class_name", "DDPMScheduler")
        kind = getattr(diffusers, str(named), None)
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
        network,
        _betas(config, scheduler),
        (unet.in_channels, *size),
        prediction=config.prediction_type,
        variance=_variance(config, unet),
        clip=config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        grid={"spacing": config.get("timestep_spacing", "leading"), "steps_offset": config.get("steps_offset", 0)},
        final="clean" if config.get("set_alpha_to_one", True) else "first",
        classes=unet.num_class_embeds or 0,
        empty=unet.num_class_embeds - 1 if unet.num_class_embeds else None,
    )


def _config(directory: pathlib.Path, part: str) -> dict[str, Any]:
    path = directory / part
    if not path.exists():
        other = (directory / "model_index.json").exists() and not (directory / "unet").exists()
        raise FileNotFoundError(
            f"model: expected {part} in {directory}, the directory of a diffusers pipeline{_ELSEWHERE if other else ''}"
        )
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
