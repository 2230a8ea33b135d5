"""From diffusers' schedulers to the fused ones and back, in pipelines."""

import copy
import logging

from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from .. import scaling
from .consistency import LCMScheduler, TCDScheduler
from .flow import FlowMatchEulerDiscreteScheduler
from .linear_multistep import DEISMultistepScheduler, IPNDMScheduler, LMSDiscreteScheduler, PNDMScheduler
from .multistep import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, UniPCMultistepScheduler
from .plan import set_by_attribute
from .scheduler import Fused
from .sigmas import EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from .timesteps import DDIMScheduler, DDPMScheduler

_log = logging.getLogger("epskernels")


FUSED = {
    twin._theirs: twin
    for twin in (
        DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler,
        HeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler, LCMScheduler,
        TCDScheduler, UniPCMultistepScheduler,
        PNDMScheduler, LMSDiscreteScheduler, IPNDMScheduler, DEISMultistepScheduler,
    )
}  # fmt: skip


def fused(scheduler, eps_scaling=None):
    """The fused twin of a diffusers scheduler, with its configuration and what else it carries.

    eps_scaling: lambda, as scaling.as_scaling takes it; default a fused scheduler's own, or 1, which is diffusers' numbers.
    Raises TypeError for a scheduler that has no twin here, listing those that have; as scaling.as_scaling for eps_scaling.
    """
    kind = type(scheduler)
    twin = kind if kind in FUSED.values() else FUSED.get(kind)
    if twin is None:
        known = ", ".join(sorted(known.__name__ for known in FUSED))
        raise TypeError(f"scheduler: {kind.__module__}.{kind.__name__} has no fused twin; known: {known}")
    left = scheduler.config.get("eps_scaling", 1)
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
    """Replaces a pipeline's scheduler by its fused twin, and returns the pipeline; of a scheduler, returns the twin.

    eps_scaling: as in `fused`. seeds: a sample's each, for noise made in the kernel where the pipeline is given no generator; the
    first latents are the pipeline's (docs/diffusers.md shows how to make those by seeds too). Raises as `fused`.
    """
    if isinstance(pipe, SchedulerMixin):
        scheduler = fused(pipe, eps_scaling)
        scheduler.seeds = seeds
        return scheduler
    pipe.scheduler = fuse(_scheduler_of(pipe), eps_scaling, seeds)
    return pipe


def unfuse(pipe):
    """Puts diffusers' own class back into a pipeline, and returns it; of a scheduler, returns diffusers'.

    What is saved then loads without this package. lambda goes: diffusers' step does not scale. A scheduler that is not fused
    stays as it is.
    """
    if not isinstance(pipe, SchedulerMixin):
        pipe.scheduler = unfuse(_scheduler_of(pipe))
        return pipe
    if not isinstance(pipe, Fused):
        return pipe
    result = pipe._theirs.__new__(pipe._theirs)
    ours = set().union(*(vars(cls) for cls in type(pipe).__mro__ if cls.__module__.startswith(__package__)))
    result.__dict__.update({k: v for k, v in copy.deepcopy(pipe.__dict__).items() if k not in ours})
    config = {k: v for k, v in pipe.config.items() if k != "eps_scaling"}
    if "_use_default_values" in config:
        config["_use_default_values"] = [name for name in config["_use_default_values"] if name != "eps_scaling"]
    result._internal_dict = FrozenDict(config)
    for name, value in set_by_attribute(pipe.config).items():
        if name in config:
            setattr(result._internal_dict, name, value)
    return result


def _scheduler_of(pipe):
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise TypeError(f"pipe: expected a pipeline with a scheduler, or a scheduler, got {type(pipe).__name__}")
    return scheduler


def share(pipe):
    """The same pipeline for another request, at the same time: its modules are shared, its scheduler is a fork of its own."""
    twin = copy.copy(pipe)
    twin.scheduler = pipe.scheduler.fork()
    return twin


__all__ = ["FUSED", "SchedulerMixin", "fuse", "fused", "share", "unfuse", *(twin.__name__ for twin in FUSED.values())]
