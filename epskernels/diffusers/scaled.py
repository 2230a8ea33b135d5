"""Any scheduler that has no fused twin, a user's own too: lambda scales its model's output, then its own step runs.

`scaled_class` makes a subclass of the scheduler's class, so that what asks isinstance gets the answer that it got before. The
scaling is a row, f/lambda + to_x*x, of a plan like the fused steps' (`Scaling`). At lambda 1 nothing is touched or refused.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from diffusers import SchedulerMixin, schedulers
from numpy.typing import NDArray
from torch import Tensor

from .. import scaling, solvers
from ..corrections import CorrectionLike
from ..scaling import ScalingLike
from ..typing import SeedsLike
from .common import Formula, Levels, Options, Result, Timestep, as_float64, output_of, positive_zeros
from .plan import Configuration, Plan
from .scheduler import Configured, Fused

_OF_TOKENS = (
    "AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler", "VQDiffusionScheduler"
)  # fmt: skip
_ARGUMENTS = {"f": ("model_output", "noise_pred"), "t": ("timestep", "t"), "x": ("sample", "latents", "x")}  # of step
_TENSORS = "timesteps", "sigmas", "alphas_cumprod"


class Scaling(Fused):
    """The rows that scale one scheduler's outputs. It is no part of it, so that no name of the scheduler's class is taken.

    of: the scheduler; `follow` takes over what it has by now.
    """

    def __init__(self, of: Any) -> None:
        self.of = of
        self._read_config()

    def _read_config(self) -> None:
        self._thresholds = False

    def follow(self, scheduled: tuple[float, ...]) -> Self:
        """Itself, with what the scheduler has by now; scheduled: the timesteps that set_timesteps made. Raises ValueError for
        timesteps that are no tensor."""
        held = self.of.__dict__
        if type(held["_internal_dict"]) is not Configuration:  # a pipeline may put a FrozenDict there
            self.of.register_to_config()
        self.__dict__.update({name: held.get(name) for name in ("_internal_dict", "num_inference_steps", *_TENSORS)})
        self._scheduled = scheduled
        if not isinstance(self.timesteps, Tensor):
            kind = type(getattr(self.of, "timesteps", None)).__name__
            raise self.unknown(f"timesteps is of type {kind}, not a tensor (set_timesteps may not have been called)")
        return self

    @property
    def config(self) -> Any:
        """The scheduler's configuration, or the copy of it that counts its changes."""
        return self._internal_dict

    @property
    def _tensors(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in _TENSORS if isinstance(self.__dict__.get(name), Tensor))

    def _length(self) -> int:
        return len(self.timesteps)

    def _row(self, plan: Plan, timestep: Timestep | None) -> int | None:
        return self._place(timestep)

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        """A step is a timestep: calls at the same one share their lambda."""
        now = self._host()
        schedule = self._scheduled if set(now) <= set(self._scheduled) else now
        known = {t: i for i, t in enumerate(dict.fromkeys(schedule))}
        return np.array([known[t] for t in now]), len(known)

    def _formula(self, options: Options) -> Formula:
        return {"c_f": np.ones(self._length())}, False

    # ---- what is known of the model's output ----

    def _as_scaling(self) -> scaling.EpsilonScaling:
        return scaling.as_scaling(self.of.config.eps_scaling, "eps_scaling")

    def unknown(self, missing: str) -> ValueError:
        """The ValueError for a lambda other than 1; missing: what is not known of the scheduler."""
        return ValueError(
            f"eps_scaling: expected 1 for {self._theirs.__name__}, got {self.of.config.eps_scaling}: {missing}, so that it is "
            "not known how much of the model's output is noise"
        )

    def prediction(self) -> str:
        """What the output is; ValueError where that is not known."""
        of, config = self.of, self.of.config
        kind = getattr(config, "prediction_type", None)
        if hasattr(of, "precondition_outputs") and getattr(config, "sigma_data", None) is not None:
            return "preconditioned"
        if kind is None and hasattr(of, "scale_noise") and not hasattr(of, "alphas_cumprod"):
            kind = "flow_prediction"  # as of all of diffusers' that have that method and no prediction_type
        kind = "sample" if kind == "original_sample" else kind
        if kind not in ("epsilon", "sample", "v_prediction", "flow_prediction"):
            raise self.unknown(f"prediction_type is {kind!r} in its configuration")
        if (kind != "epsilon" or self._as_scaling().by_level) and getattr(of, "order", 1) != 1:
            raise self.unknown(f"prediction_type is {kind!r}, and the sigma of a step's second model call is not known")
        return kind

    def _model(self, options: Options) -> Levels:
        kind, n = self.prediction(), self._length()
        one, sigmas = np.ones(n), getattr(self.of, "sigmas", None)
        if kind == "epsilon" and not self._as_scaling().by_level:
            return one, one, one, -one  # of no consequence: f/lambda whatever they are
        has_sigmas = isinstance(sigmas, (Tensor, np.ndarray)) and len(sigmas) in (n, n + 1)
        if has_sigmas:
            sigma = as_float64(sigmas)[:n]
        elif kind in ("preconditioned", "flow_prediction") or getattr(self.of, "alphas_cumprod", None) is None:
            raise self.unknown(f"prediction_type is {kind!r}, and it has no sigma for each timestep")
        if kind == "preconditioned":
            c_skip, c_out, _ = solvers.preconditioned(sigma, self.of.config.sigma_data)
            return one, sigma, c_skip, -c_out if self.of.config.prediction_type == "v_prediction" else c_out
        if kind == "flow_prediction":
            if sigma.max() > 1.001 or getattr(self.of.config, "invert_sigmas", False):
                raise self.unknown("its sigmas are inverted, or above 1")
            return 1 - sigma, sigma, one, -sigma
        if has_sigmas and not hasattr(self.of, "_sigma_to_alpha_sigma_t"):
            c_in = solvers.preconditioned(sigma, 1.0)[2]  # x = x_0 + sigma*eps, of which the network knows c_in*x
            return one, sigma, *positive_zeros(solvers.x0_of(*output_of(kind, c_in, c_in * sigma), one, sigma))
        if has_sigmas:
            levels = self.of._sigma_to_alpha_sigma_t(torch.from_numpy(sigma))
            alpha, sigma = (as_float64(level) * one for level in levels)
        else:
            abar = as_float64(self.of.alphas_cumprod)[np.asarray(self._host(), dtype=np.int64)]
            alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        return alpha, sigma, *positive_zeros(solvers.x0_of(*output_of(kind, alpha, sigma), alpha, sigma))

    # ---- one output ----

    def output(self, f: Tensor, timestep: Timestep, x: Tensor) -> Tensor | None:
        """f/lambda + to_x*x in f's dtype; None at lambda 1. Of an output with a learned variance, the first half of channels."""
        row = self._enter(f, timestep, x)
        if row.step is None:
            raise ValueError(f"timestep: {timestep} is not one of the schedule's, so that it has no lambda")
        if row.lambda_t == 1:
            return None
        own, more = f, None
        if isinstance(x, Tensor) and f.dim() == x.dim() > 1 and f.shape[1] == 2 * x.shape[1]:
            own, more = f.split(x.shape[1], dim=1)
        x = x if row.to_x else own  # which then counts nothing
        if row.why is None and own.shape == x.shape:
            own = self._step(row, own, x, like_f=True, results=1)
        else:
            own = self._scaled_output(own, x, row.lambda_t, row.to_x).to(f.dtype)
        return own if more is None else torch.cat([own, more], dim=1)


class Scaled(Configured):
    """What the classes that `scaled_class` makes share.

    path: how the last step ran, "scaled, then <class>'s own step" or "<class>'s own step". lambdas: lambda at each timestep.
    """

    path: str | None = None
    _scaling: Scaling | None = None
    _scaling_class: type[Scaling]
    _scheduled: tuple[float, ...] = ()  # the timesteps that set_timesteps made,
    _asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # and what it was called with
    _arguments: tuple[list[str], dict[str, Any]]  # of step, as `_arguments` finds them

    _uncorrected = "whose own step runs, which has no rows to correct"

    def _adopt(self, eps_scaling: ScalingLike, correction: CorrectionLike | None) -> None:
        if "_internal_dict" not in self.__dict__:  # a constructor without register_to_config
            self.register_to_config()
        super()._adopt(eps_scaling, correction)
        if self._scales():
            type(self)._scaling_class(self).prediction()

    def _read_config(self) -> None:
        """Their step reads it."""

    def _scales(self) -> bool:
        value = self.config.eps_scaling
        return value not in (1, {"k": 0, "b": 1}) and not (isinstance(value, list) and set(value) == {1})

    def _follow(self) -> Scaling:
        if self._scaling is None or self._scaling.of is not self:  # of a shallow copy
            self._scaling = type(self)._scaling_class(self)
        return self._scaling.follow(self._scheduled)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """lambda at each timestep, the noisiest first: a tuple of numbers."""
        return self._follow().lambdas if self._scales() else (1.0,) * len(self.timesteps)

    @property
    def seeds(self) -> Tensor | None:
        """None: its own step draws the noise. Raises ValueError where another value is set."""
        return None

    @seeds.setter
    def seeds(self, seeds: SeedsLike | None) -> None:
        if seeds is not None:
            raise ValueError(f"seeds: {self._theirs.__name__}'s own step draws its noise; pass a generator")

    def fork(self) -> Self:
        """A scheduler for one request. set_timesteps, called as it was before, is what has it begin anew."""
        twin: Any = copy.deepcopy(self)
        if self._asked is not None:
            twin.set_timesteps(*self._asked[0], **self._asked[1])
        return twin

    def _scaled_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
        path = f"{self._theirs.__name__}'s own step"
        if self._scales():
            names, named = self._arguments
            given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
            values: list[Any] = [given.get(named[key]) for key in "ftx"]
            scaled = self._follow().output(*values) if isinstance(values[0], Tensor) else None
            if scaled is not None:
                path = f"scaled, then {path}"
                if named["f"] in kwargs:
                    kwargs = kwargs | {named["f"]: scaled}
                else:
                    at = names.index(named["f"])
                    args = (*args[:at], scaled, *args[at + 1 :])
        self.path = path
        return self._theirs.step(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_scaling"}
        return _new, (self._theirs,), state


def _new(theirs: Any) -> Any:
    twin: Any = scaled_class(theirs)
    return twin.__new__(twin)


@functools.lru_cache(maxsize=256)
def scaled_class(theirs: Any) -> type[Any]:
    """The subclass of a scheduler's class that scales. Raises TypeError for a scheduler of tokens.

    Its module is this package, its name that of diffusers' class, or "module.Class" of a user's: what a saved pipeline names is
    found again by `named`.
    """
    for cls in theirs.__mro__:
        if cls.__name__ in _OF_TOKENS and cls.__module__.startswith("diffusers."):
            raise TypeError(
                f"scheduler: {theirs.__name__} chooses tokens: it has no predicted noise, which lambda could scale"
            )
    own = getattr(schedulers, theirs.__name__, None) is theirs
    name = theirs.__name__ if own else f"{theirs.__module__}.{theirs.__name__}"
    members = {
        "_theirs": theirs, "__module__": __package__, "__doc__": theirs.__doc__, "__signature__": _with_eps_scaling(theirs),
        "_scaling_class": type(theirs.__name__, (Scaling,), {"_theirs": theirs}),
    }  # fmt: skip
    if hasattr(theirs, "step"):
        members["_arguments"] = _arguments(theirs.step)

        @functools.wraps(theirs.step)  # pipelines look at its signature
        def step(self: Any, *args: Any, **kwargs: Any) -> Result:
            return self._scaled_step(args, kwargs)

        members["step"] = step
    if hasattr(theirs, "set_timesteps"):

        @functools.wraps(theirs.set_timesteps)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            theirs.set_timesteps(self, *args, **kwargs)
            timesteps = getattr(self, "timesteps", None)
            self._asked, self._scheduled = (args, kwargs), ()
            if isinstance(timesteps, Tensor):
                self._scheduled = tuple(timesteps.tolist())
                if "eps_scaling" in self.config and self._scales():  # not while their constructor runs
                    _ = self.lambdas  # what the first step would raise is raised here

        members["set_timesteps"] = set_timesteps
    return type(name, (Scaled, theirs), members)


def _with_eps_scaling(theirs: Any) -> inspect.Signature:
    parameters = list(inspect.signature(theirs).parameters.values())
    last = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    ours = inspect.Parameter("eps_scaling", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    return inspect.Signature([*(p for p in parameters if p not in last), ours, *last])


def _arguments(step: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """(the names of step's arguments in order, and of the output, the time and the state)."""
    found = list(inspect.signature(step).parameters.values())[1:]
    names = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    at = [*names, None, None, None]
    return names, {
        key: next((name for name in known if name in names), at[i]) for i, (key, known) in enumerate(_ARGUMENTS.items())
    }


def named(name: str) -> type[Any]:
    """The class that a saved pipeline names: "PiflowScheduler", or "module.Class" of a module that is imported.

    Raises AttributeError where there is none.
    """
    module, _, own = name.rpartition(".")
    if module and module not in sys.modules:
        raise AttributeError(f"{name} is a scheduler of your own: import {module} before you load it")
    theirs = getattr(sys.modules[module] if module else schedulers, own, None)
    mixin = SchedulerMixin
    if not (isinstance(theirs, type) and issubclass(theirs, mixin) and theirs is not mixin):
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    try:
        return scaled_class(theirs)
    except TypeError as error:
        raise AttributeError(str(error)) from None
