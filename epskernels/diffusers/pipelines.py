"""From diffusers' schedulers to the fused ones and back, in pipelines."""

import copy
import functools
import logging

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import is_torchsde_available
from torch.nn import Module

from .. import scaling
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
from .timesteps import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from .two_calls import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from .video import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

_log = logging.getLogger("epskernels")


FUSED = {
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
        DDPMWuerstchenScheduler, RePaintScheduler, ScoreSdeVeScheduler,
    )
}  # fmt: skip
if is_torchsde_available():
    from .brownian import CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler

    FUSED |= {twin._theirs: twin for twin in (CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler)}


def fused(scheduler, eps_scaling=None):
    """The fused twin of a diffusers scheduler, with its configuration and what else it carries.

    Of any other scheduler, a user's own too, a subclass of its class that scales its model's output, and then runs its own step.
    eps_scaling: lambda, as scaling.as_scaling takes it; default a fused scheduler's own, or 1, which is diffusers' numbers.
    Raises TypeError for a scheduler of tokens; ValueError for a lambda other than 1 where it is not known how much of the model's
    output is noise; as scaling.as_scaling for eps_scaling.
    """
    kind = type(scheduler)
    twin = kind if isinstance(scheduler, Configured) else FUSED.get(kind) or scaled_class(kind)
    left = getattr(scheduler, "_internal_dict", {}).get("eps_scaling", 1)
    if eps_scaling is None and kind is not twin and left != 1:
        _log.warning(
            "epskernels.diffusers: eps_scaling %s stands in the configuration of diffusers' own %s, which does not scale: it is "
            "left out; pass eps_scaling= to have it", left, kind.__name__,
        )  # fmt: skip
        left = 1.0
    eps_scaling = scaling.as_json(left if eps_scaling is None else eps_scaling, "eps_scaling")
    result = twin.__new__(twin)
    result.__dict__.update(copy.deepcopy(scheduler.__dict__))
    result._adopt(eps_scaling)
    return result


def fuse(pipe, eps_scaling=None, seeds=None):
    """Replaces all schedulers of a pipeline by their fused twins, and returns the pipeline; of a scheduler, returns the twin.

    eps_scaling: as in `fused`, of every scheduler. seeds: a sample's each, for noise made in the kernel where the pipeline is
    given no generator; the first latents are the pipeline's (docs/diffusers.md shows how to make those by seeds too). Raises as
    `fused`; ValueError for seeds of a pipeline with several schedulers. Where anything raises, the pipeline stays as it was.
    """
    if isinstance(pipe, SchedulerMixin):
        scheduler = fused(pipe, eps_scaling)
        scheduler.seeds = seeds
        return scheduler
    return _replace(pipe, functools.partial(fuse, eps_scaling=eps_scaling, seeds=seeds), one=seeds is not None)


def unfuse(pipe):
    """Puts diffusers' own classes back into a pipeline, and returns it; of a scheduler, returns diffusers'.

    What is saved then loads without this package. lambda goes: diffusers' step does not scale. A scheduler that is not fused
    stays as it is.
    """
    if not isinstance(pipe, SchedulerMixin):
        return _replace(pipe, unfuse)
    if not isinstance(pipe, Configured):
        return pipe
    result = pipe._theirs.__new__(pipe._theirs)
    ours = [vars(cls) for cls in type(pipe).__mro__ if cls.__module__.startswith(__package__)]
    ours = {name for of in ours for name, value in of.items() if not callable(value)}
    result.__dict__.update({k: v for k, v in copy.deepcopy(pipe.__dict__).items() if k not in ours})
    config = {k: v for k, v in pipe.config.items() if k != "eps_scaling"}
    if "_use_default_values" in config:
        config["_use_default_values"] = [name for name in config["_use_default_values"] if name != "eps_scaling"]
    result._internal_dict = FrozenDict(config)
    for name, value in set_by_attribute(pipe.config).items():
        if name in config:
            setattr(result._internal_dict, name, value)
    return result


def share(pipe):
    """The same pipeline for another request, at the same time: its models are shared, its schedulers are forks of their own.

    Raises TypeError for a scheduler that is not fused: it cannot be forked.
    """
    return _shared(pipe, {})


def _shared(pipe, shared):
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


def _parts(pipe):
    """A pipeline's schedulers, and the pipelines in it, by name; what holds neither may hand a scheduler on."""
    parts = {
        name: each
        for name, each in getattr(pipe, "__dict__", {}).items()
        if isinstance(each, SchedulerMixin)
        or (isinstance(each, ConfigMixin) and not isinstance(each, Module) and hasattr(type(each), "components"))
    }
    handed_on = getattr(pipe, "scheduler", None)
    return parts or ({"scheduler": handed_on} if isinstance(handed_on, SchedulerMixin) else {})


def _schedulers(pipe, seen):
    """[(what holds it, name, scheduler)] of a pipeline and of the pipelines in it."""
    seen.add(id(pipe))
    found = []
    for name, part in _parts(pipe).items():
        if isinstance(part, SchedulerMixin):
            found.append((pipe, name, part))
        elif id(part) not in seen:
            found += _schedulers(part, seen)
    return found


def _replace(pipe, change, one=False):
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


__all__ = ["FUSED", "SchedulerMixin", "fuse", "fused", "share", "unfuse", *(twin.__name__ for twin in FUSED.values())]
