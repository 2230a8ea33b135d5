"""From diffusers' schedulers to the fused ones and back, in pipelines."""

import copy
import functools
import logging
from collections.abc import Callable
from types import EllipsisType
from typing import Any, Never, TypeVar, overload

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import is_torchsde_available
from torch.nn import Module

from .. import scaling
from ..corrections import CorrectionLike, as_correction
from ..scaling import ScalingLike
from ..typing import SeedsLike
from .common import OURS, refuse_other_names
from .consistency import (
    CMStochasticIterativeScheduler,
    ConsistencyDecoderScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from .continuous import DDPMWuerstchenScheduler, ScoreSdeVeScheduler
from .flow import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MiniMaxH3Scheduler,
)
from .flow_stochastic import FlowMatchLCMScheduler, LTXEulerAncestralRFScheduler
from .helios import HeliosScheduler
from .inpainting import RePaintScheduler
from .linear_multistep import DEISMultistepScheduler, IPNDMScheduler, LMSDiscreteScheduler, PNDMScheduler
from .multistep import (
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from .parallel import DDIMParallelScheduler, DDPMParallelScheduler
from .plan import set_by_attribute
from .scaled import scaled_class
from .scheduler import Configured
from .sigmas import EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from .singlestep import DPMSolverSinglestepScheduler
from .stochastic import KarrasVeScheduler, SASolverScheduler
from .timesteps import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from .two_calls import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from .video import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

# In full, since type checkers read no other list. Whoever adds a class to FUSED adds its name.
__all__ = [
    "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler",
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DDPMWuerstchenScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FUSED", "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosScheduler",
    "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KarrasVeScheduler", "LCMScheduler", "LMSDiscreteScheduler", "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler",
    "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "SCMScheduler", "SchedulerMixin", "ScoreSdeVeScheduler",
    "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler", "fuse", "fused", "share", "unfuse",
]  # fmt: skip

_log = logging.getLogger("epskernels")
_Pipeline = TypeVar("_Pipeline")
_Twin = TypeVar("_Twin", bound=Configured)

# The fused twin of each class of diffusers'.
FUSED: dict[type, type[Configured]] = {
    twin._theirs: twin
    for twin in (
        DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler,
        HeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler, LCMScheduler,
        TCDScheduler, UniPCMultistepScheduler,
        PNDMScheduler, LMSDiscreteScheduler, IPNDMScheduler, DEISMultistepScheduler,
        DPMSolverSinglestepScheduler, DPMSolverMultistepInverseScheduler,
        FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, FlowMapEulerDiscreteScheduler, LTXEulerAncestralRFScheduler,
        HeliosScheduler, MiniMaxH3Scheduler, SCMScheduler, CMStochasticIterativeScheduler, ConsistencyDecoderScheduler,
        DDIMInverseScheduler, DDIMParallelScheduler, DDPMParallelScheduler, UnCLIPScheduler, CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler,
        DDPMWuerstchenScheduler, RePaintScheduler, ScoreSdeVeScheduler, SASolverScheduler, KarrasVeScheduler,
    )
}  # fmt: skip
if is_torchsde_available():
    from .brownian import CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler

    __all__ += ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"]
    FUSED |= {twin._theirs: twin for twin in (CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler)}


# An argument that was not passed, `...`, leaves what a fused scheduler has; None takes it off.
_Scaling = ScalingLike | EllipsisType | None
_Correction = CorrectionLike | EllipsisType | None
_Seeds = SeedsLike | EllipsisType | None


@overload
def fused(scheduler: _Twin, eps_scaling: _Scaling = ..., correction: _Correction = ...) -> _Twin: ...
@overload
def fused(scheduler: object, eps_scaling: _Scaling = ..., correction: _Correction = ...) -> Any: ...
def fused(scheduler: Any, eps_scaling: _Scaling = ..., correction: _Correction = ...) -> Any:
    """The fused twin of a diffusers scheduler, with its configuration and what else it carries.

    Of any other scheduler, a user's own too, a subclass of its class that scales its model's output, and then runs its own step.
    eps_scaling: lambda, as `scaling.as_scaling` takes it; None is 1: diffusers' numbers, within rounding. correction: of x' after
    each step, as `corrections.as_correction` takes it; None is none. What is not passed stays as a fused scheduler has it.
    Raises TypeError for a scheduler of tokens; ValueError for a lambda other than 1 where it is not known how much of the model's
    output is noise, and for a correction of a scheduler that takes none; as scaling.as_scaling and corrections.as_correction.
    """
    kind: Any = type(scheduler)
    twin: Any = kind if isinstance(scheduler, Configured) else FUSED.get(kind) or scaled_class(kind)
    kept: dict[str, Any] = {}
    for name, value, default in (("eps_scaling", eps_scaling, 1.0), ("correction", correction, None)):
        left = getattr(scheduler, "_internal_dict", {}).get(name, default)
        if value is ... and kind is not twin and left != default:
            _log.warning(
                "epskernels.diffusers: %s %s stands in the configuration of diffusers' own %s, which does not know it: it is "
                "left out; pass %s= to have it", name, left, kind.__name__, name,
            )  # fmt: skip
            left = default
        kept[name] = left if value is ... else default if value is None else value
    eps_scaling, correction = scaling.as_json(kept["eps_scaling"], "eps_scaling"), as_correction(kept["correction"])
    result = twin.__new__(twin)
    result.__dict__.update(copy.deepcopy(scheduler.__dict__))
    result._adopt(eps_scaling, correction)
    return result


def fuse(
    pipe: _Pipeline, eps_scaling: _Scaling = ..., seeds: _Seeds = ..., correction: _Correction = ..., **unknown: Never
) -> _Pipeline:
    """Replaces all schedulers of a pipeline by their fused twins, and returns the pipeline; of a scheduler, returns the twin.

    eps_scaling: lambda of every scheduler, as `scaling.as_scaling` takes it; None is 1: diffusers' numbers, within rounding.
    correction: of x' after each step, as `corrections.as_correction` takes it; None is none. seeds: a sample's each, for noise
    made in the kernel where the pipeline is given no generator; the first latents are the pipeline's (docs/diffusers.md shows how
    to make those by seeds too); None is none. What is not passed stays as a fused scheduler has it, or is as with None.
    Raises as `fused`; TypeError for an unknown argument; ValueError for seeds of a pipeline with several schedulers. Where
    anything raises, the pipeline stays as it was.
    """
    refuse_other_names("fuse", unknown)
    if unknown:
        raise TypeError(f"fuse() got an unexpected keyword argument {next(iter(unknown))!r}")
    if isinstance(pipe, SchedulerMixin):
        scheduler = fused(pipe, eps_scaling, correction)
        if seeds is not ...:
            scheduler.seeds = seeds
        return scheduler
    correction = correction if correction is ... else as_correction(correction)  # a file is read once
    change = functools.partial(fuse, eps_scaling=eps_scaling, seeds=seeds, correction=correction)
    return _replace(pipe, change, one=seeds is not ... and seeds is not None)


@overload
def unfuse(pipe: Configured) -> Any: ...
@overload
def unfuse(pipe: _Pipeline) -> _Pipeline: ...
def unfuse(pipe: Any) -> Any:
    """Puts diffusers' own classes back into a pipeline, and returns it; of a scheduler, returns diffusers'.

    What is saved then loads without this package. lambda and the correction go: diffusers' step has neither. A scheduler that is
    not fused stays as it is.
    """
    if not isinstance(pipe, SchedulerMixin):
        return _replace(pipe, unfuse)
    if not isinstance(pipe, Configured):
        return pipe
    result = pipe._theirs.__new__(pipe._theirs)
    classes = [vars(cls) for cls in type(pipe).__mro__ if cls.__module__.startswith(__package__)]
    ours = {name for of in classes for name, value in of.items() if not callable(value)}
    result.__dict__.update({k: v for k, v in copy.deepcopy(pipe.__dict__).items() if k not in ours})
    config = {k: v for k, v in pipe.config.items() if k not in OURS}
    if "_use_default_values" in config:
        config["_use_default_values"] = [name for name in config["_use_default_values"] if name not in OURS]
    result._internal_dict = FrozenDict(config)
    for name, value in set_by_attribute(pipe.config).items():
        if name in config:
            setattr(result._internal_dict, name, value)
    return result


def share(pipe: _Pipeline) -> _Pipeline:
    """The same pipeline for another request, at the same time: its models are shared, its schedulers are forks of their own.

    Raises TypeError for a scheduler that is not fused: it cannot be forked.
    """
    return _shared(pipe, {})


def _shared(pipe: Any, shared: dict[int, Any]) -> Any:
    """`share`; shared: what the copies of pipelines and schedulers are so far, by the id of the original."""
    twin = shared[id(pipe)] = copy.copy(pipe)
    for name, value in _parts(pipe).items():
        if id(value) not in shared:
            if isinstance(value, SchedulerMixin) and not isinstance(value, Configured):
                raise TypeError(
                    f"pipe: expected fused schedulers (fuse(pipe) first), got {name} of {type(value).__name__}"
                )
            shared[id(value)] = value.fork() if isinstance(value, SchedulerMixin) else _shared(value, shared)
        setattr(twin, name, shared[id(value)])
    return twin


def _parts(pipe: object) -> dict[str, Any]:
    """A pipeline's schedulers, and the pipelines in it, by name; what holds neither may hand a scheduler on."""
    parts = {
        name: each
        for name, each in getattr(pipe, "__dict__", {}).items()
        if isinstance(each, SchedulerMixin)
        or (isinstance(each, ConfigMixin) and not isinstance(each, Module) and hasattr(type(each), "components"))
    }
    handed_on = getattr(pipe, "scheduler", None)
    return parts or ({"scheduler": handed_on} if isinstance(handed_on, SchedulerMixin) else {})


def _schedulers(pipe: object, seen: set[int]) -> list[tuple[Any, str, Any]]:
    """[(what holds it, name, scheduler)] of a pipeline and of the pipelines in it."""
    seen.add(id(pipe))
    found = []
    for name, part in _parts(pipe).items():
        if isinstance(part, SchedulerMixin):
            found.append((pipe, name, part))
        elif id(part) not in seen:
            found += _schedulers(part, seen)
    return found


def _replace(pipe: Any, change: Callable[[Any], Any], one: bool = False) -> Any:
    """Puts change(scheduler) in the place of every scheduler; one that stands in several places is changed once."""
    found = _schedulers(pipe, set())
    if not found:
        held = type(getattr(pipe, "scheduler", None))
        other = (
            ""
            if held is type(None)
            else f", whose scheduler is a {held.__name__}, not one of diffusers' SchedulerMixin"
        )
        raise TypeError(f"pipe: expected a pipeline with a scheduler, or a scheduler, got {type(pipe).__name__}{other}")
    different = {id(scheduler): (name, scheduler) for _, name, scheduler in found}
    if one and len(different) > 1:
        names = ", ".join(name for name, _ in different.values())
        raise ValueError(
            f"seeds: expected None for a pipeline with several schedulers ({names}), whose noise would be the same; set the "
            "seeds of each by pipe.<name>.seeds"
        )
    changed = {key: change(scheduler) for key, (_, scheduler) in different.items()}
    for holder, name, scheduler in found:
        if hasattr(holder, "update_components"):  # a modular pipeline, which keeps specifications too
            holder.update_components(**{name: changed[id(scheduler)]})
        else:
            setattr(holder, name, changed[id(scheduler)])
    return pipe
