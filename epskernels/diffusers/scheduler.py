"""The mixin of all schedulers here: which row a call applies, the launch, and diffusers' own step where it cannot be one.

    x' = c_x*x + c_f*f + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_noise*z,   m0 = clamp(d_x*x + d_f*f)

A class subclasses its namesake. `_formula` gives diffusers' own update as these columns, in float64, from the arrays that
diffusers computed; the mixin folds lambda in (f becomes f/lambda + (1 - 1/lambda)*f_x0/alpha*x, f_x0 the share of x_0 in f) and
keeps the result on the device: an immutable Plan, made once for each schedule. What cannot be one launch is listed in
docs/diffusers.md; what runs diffusers' own step, on the scaled output, says so in `scheduler.path` and in the log.
"""

import copy
import functools
import inspect
import logging
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, is_grad_enabled

from .. import scaling
from ..corrections import Correction, CorrectionLike, as_correction, check_bands, folded
from ..guidance import quantile_of_sizes
from ..ops import as_seeds, normal, step_results
from ..scaling import ScalingLike
from ..spec import BAND_COLUMNS, COLUMNS, STREAM_STEP
from ..typing import Array, SeedsLike
from .common import (
    OURS,
    SAMPLERS,
    Columns,
    Draws,
    Ends,
    Formula,
    Generators,
    Levels,
    Options,
    Result,
    Timestep,
    as_dtype_of,
    check_output,
    draw_noise,
    refuse_other_names,
    say,
    widest,
)
from .plan import SCHEDULES, Configuration, Plan, Row, Schedule, Seen, Theirs, set_by_attribute

_log = logging.getLogger("epskernels")
FLOAT32 = torch.float32
_DTYPES = (FLOAT32, torch.float16, torch.bfloat16)


class Configured(Theirs):
    """eps_scaling and correction in a configuration; the class after it in the order of inheritance is theirs."""

    _theirs: Any  # diffusers' class, or a user's
    _seen: Any = None  # a Seen, from the first step on
    _ran: str | None = None
    _uncorrected: str | None = None  # why no correction is taken

    def __init__(
        self, *args: Any, eps_scaling: ScalingLike = 1.0, correction: CorrectionLike | None = None, **theirs: Any
    ) -> None:
        refuse_other_names(type(self).__name__, theirs, self._get_init_keys(type(self)))
        eps_scaling, correction = scaling.as_json(eps_scaling, "eps_scaling"), as_correction(correction)
        super().__init__(*args, **theirs)
        self._adopt(eps_scaling, correction)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """What diffusers takes from a configuration for the constructor: its own class's arguments, and ours."""
        own = next(
            c for c in input_class.__mro__ if "__init__" in vars(c) and c is not Configured and "_theirs" not in vars(c)
        )
        return {
            *inspect.signature(vars(own)["__init__"]).parameters,
            *(OURS if issubclass(input_class, Configured) else []),
        }

    @classmethod
    def extract_init_dict(
        cls, config_dict: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What from_config reads: diffusers leaves out an argument that it does not know, and says nothing."""
        refuse_other_names(f"{cls.__name__}.from_config", kwargs, cls._get_init_keys(cls))
        return super().extract_init_dict(config_dict, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """diffusers' own, with a configuration that counts its changes."""
        super().register_to_config(**kwargs)  # which forgets what was set by attribute
        self._internal_dict = Configuration(self._internal_dict)

    def _adopt(self, eps_scaling: ScalingLike, correction: CorrectionLike | None) -> None:
        """Both into the configuration; a default one is not written where diffusers' own class would warn of it."""
        made = as_correction(correction)
        if made is not None and self._uncorrected is not None:
            raise ValueError(f"correction: expected None for {self._theirs.__name__}, {self._uncorrected}, got {made}")
        changed: dict[str, Any] = {"eps_scaling": scaling.as_json(eps_scaling, "eps_scaling")}
        changed["correction"] = None if made is None else made.to_dict()
        if "_use_default_values" in self.config:  # as it is not where a file names all
            defaults = [name for name in self.config["_use_default_values"] if name not in OURS]
            defaults += [name for name in OURS if changed[name] in (1, None)]
            changed["_use_default_values"] = defaults
        by_attribute = set_by_attribute(self.config)
        self.register_to_config(**changed)
        self.config.__dict__.update({name: value for name, value in by_attribute.items() if name not in changed})
        self._seen = self._ran = None
        self._read_config()

    def _read_config(self) -> None:
        """What every step looks at: asking the configuration each time takes longer than the step."""
        self._thresholds = bool(getattr(self.config, "thresholding", False))

    @property
    def eps_scaling(self) -> Any:
        """lambda as the configuration keeps it; set as scaling.as_scaling takes it, and raises as that."""
        return self.config.eps_scaling

    @eps_scaling.setter
    def eps_scaling(self, eps_scaling: ScalingLike) -> None:
        self._adopt(eps_scaling, self.correction)

    @property
    def correction(self) -> Any:
        """The correction of x' as the configuration keeps it, a dict or None; set as corrections.as_correction takes it, and
        raises as that."""
        return getattr(self.config, "correction", None)  # a pipeline may put a configuration without it there

    @correction.setter
    def correction(self, correction: CorrectionLike | None) -> None:
        self._adopt(self.config.eps_scaling, correction)


class Fused(Configured):
    """What all schedulers here share; the class after it in the order of inheritance is diffusers' own.

    path: how the last step ran, "fused" or "diffusers: <why>". seeds: a sample's seed each, or None; steps then make their noise
    in the kernel unless a generator is given.
    eps_scaling: lambda, as scaling.as_scaling takes it; may be set. lambdas: lambda of each step. correction: of x' after each
    step, except those to an image without noise, as corrections.as_correction takes it; may be set. x' is the prev_sample of the
    call that ends a step, m0 the scheduler's estimate of x_0 in that call; all other results are as without a correction.
    step has diffusers' arguments, and seeds where it draws noise. sample: (B, ...), model_output: its shape, or twice its
    channels with a learned variance; float32, float16 or bfloat16, on one device. generator: one, or one for each sample. Returns
    diffusers' output class, or without return_dict the tuple of its tensors. Raises ValueError before set_timesteps, and for
    seeds where a generator is given too, or diffusers' own step runs; IndexError after the last step; RuntimeError where a
    trajectory whose history is not diffusers' would go on with diffusers' own step, or the reverse. With a correction, ValueError
    where diffusers' own step would run.
    """

    _mixes = True  # a trajectory may go on with diffusers' own step, since its history is the same
    _needs_steps = False  # set_timesteps has to come before step
    _options: Options = ()  # the arguments of step that change the rows, with their defaults
    _tensors: tuple[str, ...] = ("timesteps", "sigmas")  # what the rows are made of,
    _reads: tuple[str, ...] = ()  # and of which other attributes
    # A scheduler's own: its numbers as last seen, its seeds, how the last step ran (`_ran` where it must not change), the
    # timesteps that set_timesteps made, how many rows it made beyond them, and whether x_0 is thresholded.
    path: str | None = None
    _seeds: Tensor | None = None
    _scheduled: tuple[float, ...] = ()
    _surplus, _thresholds = 0, False
    _output_class: Any  # diffusers', of what step returns
    __signature__: inspect.Signature

    def __init_subclass__(cls) -> None:
        parent: Any = cls.__bases__[-1]
        if parent is Fused or parent.__name__ != cls.__name__:
            if "__init__" in vars(cls):  # a user's own subclass
                cls.__signature__ = inspect.signature(functools.partial(vars(cls)["__init__"], None))
            return
        cls._theirs = parent
        cls.__module__ = __package__  # where users find it, and saved pipelines
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in zip(OURS, (1.0, None), strict=True)
        ]
        parameters = [*inspect.signature(parent).parameters.values(), *own]
        cls.__signature__ = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))  # **kwargs last

        @functools.wraps(parent.set_timesteps)  # pipelines look at its signature
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            self._set_timesteps(*args, **kwargs)
            self._seen = self._ran = None
            self._scheduled = tuple(self.timesteps.tolist())
            self._surplus = max(0, self._length() - len(self._scheduled))
            if "eps_scaling" in self.config:  # not while diffusers' own constructor runs
                self._check_last_steps(self._plan(self._options, self.timesteps.device))

        cls.set_timesteps = set_timesteps  # type: ignore[attr-defined]  # declared, it would hide diffusers' signature

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._theirs.set_timesteps(self, *args, **kwargs)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """lambda of each step of the schedule, the noisiest first: a tuple of numbers."""
        plan = self._plan(self._options, self.timesteps.device)
        return tuple(self._per_step(np.array(plan.lambda_t)).tolist())

    # ---- the plan ----

    def _formula(self, options: Options) -> Formula:
        """diffusers' update without lambda: (columns, draws). Columns by name, (R,) float64 or one number."""
        raise NotImplementedError

    def _model(self, options: Options) -> Levels:
        """(alpha, sigma, d_x, d_f) of x = alpha*x_0 + sigma*eps and x_0 = d_x*x + d_f*f as diffusers has it, for each row."""
        raise NotImplementedError

    def _ends_of(self, options: Options) -> Ends:
        """Where the step of each row ends, for a correction of x'."""
        raise NotImplementedError

    def _lambdas(self, alpha: Array, sigma: Array, d_x: Array) -> Array:
        """lambda for each row; 1 where x is noise alone."""
        says_x0 = ~(np.abs(d_x * alpha - 1) < 1e-9)  # d_x may be infinite
        alone, value = scaling.noise_alone(alpha, sigma, says_x0), self._as_scaling()
        if value.by_level:
            lambda_t = scaling.lambdas(value, alone, "eps_scaling", levels=scaling.log_snr(alpha, sigma))
            return np.where(sigma == 0, 1.0, lambda_t)
        alone = self._per_step(alone)
        at, steps = self._lambda_steps(len(alone))
        of_all = np.zeros(steps, dtype=bool)
        of_all[at] = alone
        lambda_t = scaling.lambdas(value, of_all, "eps_scaling", functools.partial(say, self))[at]
        lambda_t[self._per_step(sigma) == 0] = 1.0  # without noise, any lambda is 1
        return self._per_call(lambda_t)

    def _weights(self, correction: Correction, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        """The weights (low, high) of the step of each row, by where the step begins."""
        alpha, sigma = self._per_step(alpha), self._per_step(sigma)
        at, steps = self._lambda_steps(len(sigma))
        name = self._theirs.__name__
        correction.warn_of_transfer(steps, name, *SAMPLERS.get(name, ()))
        levels, sigmas = np.zeros(steps), np.zeros(steps)
        levels[at[::-1]], sigmas[at[::-1]] = (
            scaling.log_snr(alpha, sigma)[::-1],
            sigma[::-1],
        )  # a step's first call last
        low, high = correction.weights(levels, sigmas, self._largest_sigma(sigma))
        return self._per_call(low[at]), self._per_call(high[at])

    def _largest_sigma(self, sigma: Array) -> float:
        """Of the schedule that set_timesteps made; sigma: of the steps that are left."""
        return float(np.nanmax(sigma))

    def _as_scaling(self) -> scaling.EpsilonScaling:
        return scaling.as_scaling(self.config.eps_scaling, "eps_scaling")

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        """(which step each row is of, how many steps lambda is given for)."""
        steps = rows - self._surplus
        return np.minimum(np.arange(rows), steps - 1), steps

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        return values

    def _input_scale(self) -> list[float] | None:
        """What scale_model_input multiplies by in each step, or None."""

    def _per_call(self, values: np.ndarray) -> np.ndarray:
        return values

    def _plan(self, options: Options, device: torch.device) -> Plan:
        """The Plan of the schedule and the configuration as they are now."""
        seen = self._seen
        if seen is None or not seen.is_of(self):
            seen = self._look()
        planned_options, planned_device, plan = seen.last
        if planned_options == options and planned_device == device:
            return plan

        def make() -> Plan:
            with torch.inference_mode(False):  # what is kept serves calls with gradients too
                why = self._refuses()
                if why is not None and self.correction is not None:
                    raise ValueError(f"correction: expected None, since diffusers' own step runs here: {why}")
                return Plan(*self._scaled_formula(options), device, why, self._thresholds)

        plan = seen.schedule.plans.get((options, device), make)
        seen.last = options, device, plan
        return plan

    def _look(self) -> Seen:
        """The schedule and the configuration as they are now, looked at anew: a Seen."""
        if type(self._internal_dict) is not Configuration:  # a pipeline may put a FrozenDict there
            by_attribute = set_by_attribute(self._internal_dict)
            self._internal_dict = Configuration(self._internal_dict)
            self._internal_dict.__dict__.update(by_attribute)
        for name in self._tensors:
            tensor = self.__dict__.get(name)
            if tensor is not None and tensor.is_inference() and tensor.device.type != "cpu":  # without a version
                with torch.inference_mode(False):
                    setattr(self, name, tensor.clone())
        if self.__dict__.get("timesteps") is None:
            raise ValueError("set_timesteps: expected a call of it first")
        self._read_config()
        seen = self._seen = Seen(self)
        seen.schedule = SCHEDULES.get(seen.key(self), lambda: Schedule(self.timesteps.tolist(), self._input_scale()))
        return seen

    def _scaled_formula(self, options: Options) -> tuple[Columns, Draws, Array, Array]:
        with np.errstate(all="ignore"):  # a row that is not finite is not used
            columns, draws = self._formula(options)
            alpha, sigma, d_x, d_f = model = self._model(options)
            scale = self._lambdas(alpha, sigma, d_x)
            on_x = np.where((scale == 1) | (d_f == 0), 0.0, (1 - d_x * alpha) / d_f * (1 - 1 / scale) / alpha)
            length = len(scale)
            levels = max(np.size(column) for column in columns.values()) // length
            columns = {name: np.broadcast_to(column, levels * length) + 0.0 for name, column in columns.items()}
            lambda_t, to_x = np.tile(scale, levels), np.tile(on_x, levels)
            columns["draw"] = np.tile(np.arange(length), levels)
            zero = np.zeros(levels * length)
            if (correction := as_correction(self.correction)) is not None:
                columns = self._correct(correction, columns, model, self._ends_of(options))
            for x, f in (("d_x", "d_f"), ("c_x", "c_f")):
                of_f = columns.get(f, zero)
                columns[x], columns[f] = columns.get(x, zero) + of_f * to_x, of_f / lambda_t
            if not (np.isfinite(columns.get("clip", np.inf)).any() or self._thresholds or "k_y" in columns):
                # Nothing bends m0: its terms are x's and f's, with fewer roundings.
                m0 = columns.pop("c_m0", zero)
                columns["c_x"] = columns["c_x"] + m0 * columns["d_x"]
                columns["c_f"] = columns["c_f"] + m0 * columns["d_f"]
        return columns, draws, scale, on_x

    def _correct(self, correction: Correction, columns: Columns, model: Levels, ends: Ends) -> Columns:
        """The columns, unscaled, with the correction in them; "corrects" says in which rows."""
        rows = len(next(iter(columns.values())))
        alpha, sigma, d_x, d_f, alpha_out = (np.resize(level, rows) for level in (*model, ends.alpha))
        of_x, of_f = (columns.get(name, np.zeros(rows)) for name in ("d_x", "d_f"))
        per_f = of_f / d_f  # m0, which need not be x_0 = d_x*x + d_f*f, is of_x*x + of_f*f
        m_x0, m_eps = of_x * alpha + per_f * (1 - d_x * alpha), (of_x - per_f * d_x) * sigma
        acts = np.resize(ends.last & (ends.sigma != 0), rows)
        finite = np.all([np.isfinite(column) for name, column in columns.items() if name != "clip"], axis=0)
        low, high = (
            np.where(acts & finite, np.resize(weight[ends.first], rows), 0.0)
            for weight in self._weights(correction, *model[:2])
        )
        provenance = {"alpha_in": alpha, "sigma_in": sigma, "alpha_out": alpha_out, "m_x0": m_x0, "m_eps": m_eps}
        made = folded(columns | provenance, correction, low, high)
        kept = {*columns, *COLUMNS, *BAND_COLUMNS, "w_next"}
        corrects = acts & ((low != 0) | (high != 0) | ~finite)
        return {name: made[name] for name in made if name in kept} | {"corrects": corrects}

    def _refuses(self) -> str | None:
        """Why no row of this configuration can be one launch, or None."""

    def _check_last_steps(self, plan: Plan) -> None:
        """Raises ValueError where a trajectory would end at a step that has no numbers, after all its model calls."""

    # ---- which step ----

    def _place(self, timestep: object) -> int | None:
        """The index of a timestep in self.timesteps, or None. A view into it is recognised by its address, without reading it."""
        seen = self._seen
        if isinstance(timestep, torch.Tensor):
            if (i := seen.place(timestep)) is not None:
                return i
            if timestep.numel() != 1:
                return None
            if timestep.device.type != "cpu":
                _log.debug("%s: a timestep on %s was read back", type(self).__name__, timestep.device)
            timestep = timestep.item()
        elif isinstance(timestep, np.ndarray) and timestep.size == 1:
            timestep = timestep.item()
        return seen.schedule.rank.get(timestep) if isinstance(timestep, (int, float, np.number)) else None

    def _init_step_index(self, timestep: Timestep) -> None:
        """diffusers' choice, without reading a timestep back that is one of its own."""
        if getattr(self, "begin_index", None) is not None:
            self._step_index = self._begin_index
            return
        self._plan(self._options, self.timesteps.device)
        i, host = self._place(timestep), self._seen.schedule.host
        if i is None:
            super()._init_step_index(timestep)
        else:
            same = [j for j, t in enumerate(host) if t == host[i]]
            self._step_index = same[1 if len(same) > 1 else 0]

    def _row(self, plan: Plan, timestep: Timestep | None) -> Any:
        """Which of the plan's rows this call applies, or None where the schedule does not have the timestep."""
        if self._step_index is None:
            self._init_step_index(timestep)
        i, most = self._step_index, self._seen.most
        if i >= most:
            raise IndexError(
                f"step: expected at most {most} calls after set_timesteps, or a begin index below, got step {i}"
            )
        return i

    def _most_steps(self) -> int:
        return self._length()

    def _length(self) -> int:
        """How many steps the schedule has numbers for, those of timesteps that were cut off too."""
        return len(self.sigmas) - 1

    def _host(self) -> list[Any]:
        return self._seen.schedule.host

    # ---- the step ----

    @property
    def seeds(self) -> Tensor | None:
        """(B,) int64, a sample's seed each, or None; set as ops.as_seeds takes them, and raises as that."""
        return self._seeds

    @seeds.setter
    def seeds(self, seeds: SeedsLike | None) -> None:
        self._seeds = None if seeds is None else as_seeds(seeds)

    def fork(self) -> Self:
        """A scheduler with its own position, history and seeds, for one request; it shares the plan and the configuration."""
        twin = copy.copy(self)
        twin._restart()
        return twin

    def _restart(self) -> None:
        for name in ("_step_index", "_begin_index"):
            if name in self.__dict__:
                setattr(self, name, None)
        self._ran = self.path = self._seeds = None

    def _enter(self, f: Tensor, timestep: Timestep | None, x: Tensor, options: Options = ()) -> Row:
        """The Row that this call applies; its `why` says what keeps it from being one launch, then diffusers' own step runs."""
        if self._needs_steps and self.num_inference_steps is None:
            raise ValueError("set_timesteps: expected a call of it before step")
        why = None
        if not (isinstance(x, Tensor) and isinstance(f, Tensor)):
            why = f"sample and model_output are {type(x).__name__} and {type(f).__name__}, not tensors"
        elif x.dtype not in _DTYPES or f.dtype not in _DTYPES:
            why = f"of dtypes {x.dtype} and {f.dtype}"
        elif is_grad_enabled() and (x.requires_grad or f.requires_grad):
            why = "gradients are asked for, and its operations have them"
        seen = self._seen
        if seen is None or not seen.is_of(self):
            seen = self._look()
        device = seen.device if why else x.device
        of_options, on_device, plan = seen.last
        if of_options != options or on_device != device:
            plan = self._plan(options, device)
        number = self._row(plan, timestep)
        row = Row(why=f"timestep {timestep} is not one of the schedule's") if number is None else plan.rows[number]
        return row if why is None else row.refused(why)

    def _noise(
        self, row: Row, f: Tensor, generator: Generators, seeds: SeedsLike | None, given: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """(noise, seeds) for the step, one or both None: diffusers' own draw from the generator, or the kernel's from seeds."""
        if generator is not None and seeds is not None:
            raise ValueError("generator, seeds: expected one of them, got both")
        if not row.draws:
            return None, None
        if given is None and generator is None:
            if seeds is not None:
                seeds = as_seeds(seeds, f.device)
                return None, seeds if row.uses_noise else None
            kept = self._seeds
            if kept is not None:
                if kept.device != f.device:
                    kept = self._seeds = kept.to(f.device)
                return None, kept if row.uses_noise else None
        noise = draw_noise(f, generator, dtype) if given is None else given.to(f.device)
        return noise if row.uses_noise else None, None

    def _step(
        self, row: Row, f: Tensor, x: Tensor, noise: Tensor | None = None, seeds: Tensor | None = None,
        m1: Tensor | None = None, m2: Tensor | None = None, y: Tensor | None = None, v: Tensor | None = None,
        like_f: bool = False, results: int = 2,
    ) -> Any:  # fmt: skip
        """One launch: the first `results` of x', m0, y'; x' of f's dtype if like_f, otherwise of the one that holds x and f.

        Noise of more digits than x widens x.
        """
        if not self._mixes:
            self._go_on("fused", self.path)
        self.path = "fused"
        dtype = computed = x.dtype
        if computed is not f.dtype:
            x = widest(f, x)
            computed = x.dtype
            dtype = f.dtype if like_f else computed
        if noise is not None and noise.dtype is not computed:
            computed = torch.promote_types(computed, noise.dtype)
            m1, m2, y = as_dtype_of(m1, x), as_dtype_of(m2, x), as_dtype_of(y, x)  # the history is of the state's dtype
            x, noise = x.to(computed), noise.to(computed)
        try:
            if row.prepares or m1 is not None or y is not None or v is not None:
                threshold = self._threshold(row, f, x) if row.thresholds else None
                check_bands("sample", x, row.band_dims)
                m1, m2, y = as_dtype_of(m1, x), as_dtype_of(m2, x), as_dtype_of(y, x)
                more = m1, m2, v, None, noise, seeds, y, None, threshold
                made = step_results(results)(x, f, row.table, row.index, None, *more)
            elif noise is not None:
                made = step_results(results)(x, f, row.table, row.index, noise=noise)
            elif seeds is not None:
                made = step_results(results)(x, f, row.table, row.index, seeds=seeds)
            else:
                made = step_results(results, True)(x, f, row.table, row.index)
        except (RuntimeError, ValueError):
            check_output(f, x)  # in diffusers' words, and only here: a step has no time for it
            raise
        if dtype is not computed:
            made = (made[0].to(dtype), *made[1:]) if results > 1 else made.to(dtype)
        return made

    def _own(
        self, row: Row, f: Tensor, timestep: Timestep, x: Tensor, seeds: SeedsLike | None = None, method: str = "step",
        **arguments: Any,
    ) -> Result:  # fmt: skip
        """diffusers' own step, or another of its methods, on the scaled output: f/lambda plus its share of x_0 times x."""
        if (seeds is not None or (self._seeds is not None and arguments.get("generator") is None)) and row.draws:
            raise ValueError(f"seeds: diffusers' own step takes a generator, and it runs here: {row.why}")
        self._refuse_uncorrected(row)
        if not self._mixes:
            self._go_on("diffusers' own", row.why)
        self.path = f"diffusers: {row.why}"
        say(self, f"runs diffusers' own step: {row.why}")
        if row.step is None and self.config.eps_scaling != 1:
            raise ValueError(f"timestep: {timestep} is not one of the schedule's, so that it has no lambda")
        if row.to_x and row.churn_std:
            raise ValueError(
                f"eps_scaling: diffusers' own step adds churn after the scaling, and it runs here: {row.why}"
            )
        if row.lambda_t != 1:
            f = self._scaled_output(f, x, row.lambda_t, row.to_x)
        return self._call_theirs(method, f, timestep, x, **arguments)

    def _refuse_uncorrected(self, row: Row) -> None:
        """Raises ValueError where diffusers' own step would run and the row is one to correct."""
        if self.correction is not None and (row.step is None or row.corrects):
            raise ValueError(f"correction: expected None, since diffusers' own step runs here: {row.why}")

    def _call_theirs(self, method: str, f: Tensor, timestep: Any, x: Tensor, **arguments: Any) -> Result:
        return getattr(self._theirs, method)(self, f, timestep=timestep, sample=x, **arguments)

    def _go_on(self, kind: str, why: str | None) -> None:
        """Raises RuntimeError where a trajectory would change between the fused step and diffusers' own."""
        if self._ran not in (None, kind):
            raise RuntimeError(
                f"{type(self).__name__}: cannot go on with {'the ' * (kind == 'fused')}{kind} step within a trajectory: {why}"
            )
        self._ran = kind

    def _scaled_output(self, f: Tensor, x: Tensor, lambda_t: float | Tensor, to_x: float | Tensor) -> Tensor:
        if f.shape == x.shape:
            return f / lambda_t + to_x * x
        own, v = f.split([x.shape[1], f.shape[1] - x.shape[1]], dim=1)  # learned variance
        return torch.cat([own / lambda_t + to_x * x, v], dim=1)

    def _drawn(self, noise: Tensor | None, seeds: Tensor | None, x: Tensor, i: int) -> Tensor | None:
        """The noise of step i as a tensor, from seeds too; None where there is none."""
        return noise if seeds is None else normal(seeds, list(x.shape[1:]), draw=i, stream=STREAM_STEP)

    def _threshold(self, row: Row, f: Tensor, x: Tensor) -> Tensor:
        """Dynamic thresholding's (B,), as diffusers takes it (arXiv 2205.11487): a quantile of |x_0| in each sample."""
        x0 = row.d_x * x.float() + row.d_f * f.float()
        s = quantile_of_sizes(x0.abs(), self.config.dynamic_thresholding_ratio)
        return s.clamp(min=1, max=self.config.sample_max_value)


class InHalves(Fused):
    """Two model calls a step, with one lambda; one in the last."""

    state_in_first_order: bool
    sample: Tensor | None  # where the step began

    def _per_call(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, 2)[: self._length()]

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        return values[::2]

    def _ends_steps(self) -> NDArray[np.bool_]:
        """Which calls are the last of their step."""
        i = np.arange(self._length())
        return (i % 2 == 1) | (i == len(i) - 1)


class FromCleanest(Fused):
    """Towards noise: lambda's first number is the noisiest step's, which is the last."""

    _uncorrected = "whose steps lead towards noise"

    def _lambda_steps(self, rows: int) -> tuple[NDArray[np.integer], int]:
        at, steps = super()._lambda_steps(rows)
        return steps - 1 - at[::-1], steps

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        return values[::-1]

    _per_call = _per_step
