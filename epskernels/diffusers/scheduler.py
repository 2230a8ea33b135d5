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

import numpy as np
import torch
from torch import Tensor, is_grad_enabled

from .. import scaling
from ..guidance import quantile_of_sizes
from ..ops import as_seeds, normal, step_results
from ..spec import STREAM_STEP
from .common import as_dtype_of, draw_noise, say, widest
from .plan import SCHEDULES, Configuration, Plan, Row, Schedule, Seen, set_by_attribute

_log = logging.getLogger("epskernels")
FLOAT32 = torch.float32
_DTYPES = (FLOAT32, torch.float16, torch.bfloat16)


class Configured:
    """eps_scaling in a scheduler's configuration; the class after it in the order of inheritance is diffusers', or a user's."""

    _seen = _ran = None

    def __init__(self, *args, eps_scaling=1.0, **theirs):
        eps_scaling = scaling.as_json(eps_scaling, "eps_scaling")
        super().__init__(*args, **theirs)
        self._adopt(eps_scaling)

    @staticmethod
    def _get_init_keys(input_class):
        """What diffusers takes from a configuration for the constructor: its own class's arguments, and eps_scaling."""
        own = next(
            c for c in input_class.__mro__ if "__init__" in vars(c) and c is not Configured and "_theirs" not in vars(c)
        )
        return {
            *inspect.signature(own.__init__).parameters,
            *(["eps_scaling"] if issubclass(input_class, Configured) else []),
        }

    def register_to_config(self, **kwargs):
        super().register_to_config(**kwargs)  # which forgets what was set by attribute
        self._internal_dict = Configuration(self._internal_dict)

    def _adopt(self, eps_scaling):
        """The scaling into the configuration; a default one is not written where diffusers' own class would warn of it."""
        changed = {"eps_scaling": scaling.as_json(eps_scaling, "eps_scaling")}
        if "_use_default_values" in self.config:  # as it is not where a file names all
            defaults = [name for name in self.config["_use_default_values"] if name != "eps_scaling"]
            changed["_use_default_values"] = defaults + ["eps_scaling"] * (changed["eps_scaling"] == 1)
        by_attribute = set_by_attribute(self.config)
        self.register_to_config(**changed)
        vars(self.config).update({name: value for name, value in by_attribute.items() if name not in changed})
        self._seen = self._ran = None
        self._read_config()

    def _read_config(self):
        """What every step looks at: asking the configuration each time takes longer than the step."""
        self._thresholds = bool(getattr(self.config, "thresholding", False))

    @property
    def eps_scaling(self):
        return self.config.eps_scaling

    @eps_scaling.setter
    def eps_scaling(self, eps_scaling):
        self._adopt(eps_scaling)


class Fused(Configured):
    """What all schedulers here share; the class after it in the order of inheritance is diffusers' own.

    path: how the last step ran, "fused" or "diffusers: <why>". seeds: a sample's seed each, or None; steps then make their noise
    in the kernel unless a generator is given.
    eps_scaling: lambda, as scaling.as_scaling takes it; may be set. lambdas: lambda of each step.
    """

    _mixes = True  # a trajectory may go on with diffusers' own step, since its history is the same
    _needs_steps = False  # set_timesteps has to come before step
    _options = ()  # the arguments of step that change the rows, with their defaults
    _tensors = "timesteps", "sigmas"  # what the rows are made of,
    _reads = ()  # and of which other attributes
    # A scheduler's own: its numbers as last seen, its seeds, how the last step ran (`_ran` where it must not change), the
    # timesteps that set_timesteps made, how many rows it made beyond them, and whether x_0 is thresholded.
    path = _seen = _seeds = _ran = None
    _scheduled, _surplus, _thresholds = (), 0, False

    def __init_subclass__(cls):
        parent = cls.__bases__[-1]
        if parent is Fused or parent.__name__ != cls.__name__:
            if "__init__" in vars(cls):  # a user's own subclass
                cls.__signature__ = inspect.signature(functools.partial(cls.__init__, None))
            return
        cls._theirs = parent
        cls.__module__ = __package__  # where users find it, and saved pipelines
        own = inspect.Parameter("eps_scaling", inspect.Parameter.KEYWORD_ONLY, default=1.0)
        parameters = [*inspect.signature(parent).parameters.values(), own]
        cls.__signature__ = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))  # **kwargs last

        @functools.wraps(parent.set_timesteps)  # pipelines look at its signature
        def set_timesteps(self, *args, **kwargs):
            parent.set_timesteps(self, *args, **kwargs)
            self._seen = self._ran = None
            self._scheduled = tuple(self.timesteps.tolist())
            self._surplus = max(0, self._length() - len(self._scheduled))
            if "eps_scaling" in self.config:  # not while diffusers' own constructor runs
                self._check_last_steps(self._plan(self._options, self.timesteps.device))

        cls.set_timesteps = set_timesteps

    @property
    def lambdas(self):
        """lambda of each step of the schedule, the noisiest first: a tuple of numbers."""
        plan = self._plan(self._options, self.timesteps.device)
        return tuple(self._per_step(np.array(plan.lambda_t)).tolist())

    # ---- the plan ----

    def _formula(self, options):
        """diffusers' update without lambda: (columns, draws). Columns by name, (R,) float64 or one number."""
        raise NotImplementedError

    def _model(self, options):
        """(alpha, sigma, d_x, d_f) of x = alpha*x_0 + sigma*eps and x_0 = d_x*x + d_f*f as diffusers has it, for each row."""
        raise NotImplementedError

    def _lambdas(self, alpha, sigma, d_x):
        """lambda for each step; 1 where x is noise alone."""
        says_x0 = ~(np.abs(d_x * alpha - 1) < 1e-9)  # d_x may be infinite
        alone = self._per_step(scaling.noise_alone(alpha, sigma, says_x0))
        value, (at, steps) = scaling.as_scaling(self.config.eps_scaling, "eps_scaling"), self._lambda_steps(len(alone))
        of_all = np.zeros(steps, dtype=bool)
        of_all[at] = alone
        lambda_t = scaling.lambdas(value, of_all, "eps_scaling", functools.partial(say, self))[at]
        lambda_t[self._per_step(sigma) == 0] = 1.0  # without noise, any lambda is 1
        return lambda_t

    def _lambda_steps(self, rows):
        """(which step each row is of, how many steps lambda is given for)."""
        steps = rows - self._surplus
        return np.minimum(np.arange(rows), steps - 1), steps

    def _per_step(self, values):
        return values

    def _input_scale(self):
        """What scale_model_input multiplies by in each step, or None."""

    def _per_call(self, lambda_t):
        return lambda_t

    def _plan(self, options, device):
        """The Plan of the schedule and the configuration as they are now."""
        seen = self._seen
        if seen is None or not seen.is_of(self):
            seen = self._look()
        planned_options, planned_device, plan = seen.last
        if planned_options == options and planned_device == device:
            return plan

        def make():
            with torch.inference_mode(False):  # what is kept serves calls with gradients too
                return Plan(*self._scaled_formula(options), device, self._refuses(), self._thresholds)

        plan = seen.schedule.plans.get((options, device), make)
        seen.last = options, device, plan
        return plan

    def _look(self):
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

    def _scaled_formula(self, options):
        with np.errstate(all="ignore"):  # a row that is not finite is not used
            columns, draws = self._formula(options)
            alpha, sigma, d_x, d_f = self._model(options)
            scale = self._per_call(self._lambdas(alpha, sigma, d_x))
            on_x = np.where((scale == 1) | (d_f == 0), 0.0, (1 - d_x * alpha) / d_f * (1 - 1 / scale) / alpha)
            length = len(scale)
            levels = max(np.size(column) for column in columns.values()) // length
            columns = {name: np.broadcast_to(column, levels * length) + 0.0 for name, column in columns.items()}
            lambda_t, to_x = np.tile(scale, levels), np.tile(on_x, levels)
            columns["draw"] = np.tile(np.arange(length), levels)
            zero = np.zeros(levels * length)
            for x, f in (("d_x", "d_f"), ("c_x", "c_f")):
                of_f = columns.get(f, zero)
                columns[x], columns[f] = columns.get(x, zero) + of_f * to_x, of_f / lambda_t
            if not (np.isfinite(columns.get("clip", np.inf)).any() or self._thresholds or "k_y" in columns):
                # Nothing bends m0: its terms are x's and f's, with fewer roundings.
                m0 = columns.pop("c_m0", zero)
                columns["c_x"] = columns["c_x"] + m0 * columns["d_x"]
                columns["c_f"] = columns["c_f"] + m0 * columns["d_f"]
        return columns, draws, scale, on_x

    def _refuses(self):
        """Why no row of this configuration can be one launch, or None."""

    def _check_last_steps(self, plan):
        """Raises ValueError where a trajectory would end at a step that has no numbers, after all its model calls."""

    # ---- which step ----

    def _place(self, timestep):
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

    def _init_step_index(self, timestep):
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

    def _row(self, plan, timestep):
        """Which of the plan's rows this call applies, or None where the schedule does not have the timestep."""
        if self._step_index is None:
            self._init_step_index(timestep)
        i, most = self._step_index, self._seen.most
        if i >= most:
            raise IndexError(
                f"step: expected at most {most} calls after set_timesteps, or a begin index below, got step {i}"
            )
        return i

    def _most_steps(self):
        return self._length()

    def _length(self):
        """How many steps the schedule has numbers for, those of timesteps that were cut off too."""
        return len(self.sigmas) - 1

    def _host(self):
        return self._seen.schedule.host

    # ---- the step ----

    @property
    def seeds(self):
        return self._seeds

    @seeds.setter
    def seeds(self, seeds):
        self._seeds = None if seeds is None else as_seeds(seeds)

    def fork(self):
        """A scheduler with its own position, history and seeds, for one request; it shares the plan and the configuration."""
        twin = copy.copy(self)
        twin._restart()
        return twin

    def _restart(self):
        for name in ("_step_index", "_begin_index"):
            if name in self.__dict__:
                setattr(self, name, None)
        self._ran = self.path = self._seeds = None

    def _enter(self, f, timestep, x, options=()):
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

    def _noise(self, row, f, generator, seeds, given=None, dtype=None):
        """(noise, seeds) for the step, one or both None: diffusers' own draw from the generator, or the kernel's from seeds."""
        if generator is not None and seeds is not None:
            raise ValueError("generator, seeds: expected one of them, got both")
        if not row.draws:
            return None, None
        if given is None and generator is None and (seeds is not None or self._seeds is not None):
            if seeds is not None:
                seeds = as_seeds(seeds, f.device)
            else:
                seeds = self._seeds
                if seeds.device != f.device:
                    seeds = self._seeds = seeds.to(f.device)
            return None, seeds if row.uses_noise else None
        noise = draw_noise(f, generator, dtype) if given is None else given.to(f.device)
        return noise if row.uses_noise else None, None

    def _step(self, row, f, x, noise=None, seeds=None, m1=None, m2=None, y=None, v=None, like_f=False, results=2):
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
        if row.thresholds or m1 is not None or y is not None or v is not None:
            threshold = self._threshold(row, f, x) if row.thresholds else None
            m1, m2, y = as_dtype_of(m1, x), as_dtype_of(m2, x), as_dtype_of(y, x)
            more = m1, m2, v, None, noise, seeds, y, None, threshold
            made = step_results(results)(x, f, row.table, row.index, None, *more)
        elif noise is not None:
            made = step_results(results)(x, f, row.table, row.index, noise=noise)
        elif seeds is not None:
            made = step_results(results)(x, f, row.table, row.index, seeds=seeds)
        else:
            made = step_results(results, True)(x, f, row.table, row.index)
        if dtype is not computed:
            made = (made[0].to(dtype), *made[1:]) if results > 1 else made.to(dtype)
        return made

    def _own(self, row, f, timestep, x, seeds=None, method="step", **arguments):
        """diffusers' own step, or another of its methods, on the scaled output: f/lambda plus its share of x_0 times x."""
        if (seeds is not None or (self._seeds is not None and arguments.get("generator") is None)) and row.draws:
            raise ValueError(f"seeds: diffusers' own step takes a generator, and it runs here: {row.why}")
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

    def _call_theirs(self, method, f, timestep, x, **arguments):
        return getattr(self._theirs, method)(self, f, timestep=timestep, sample=x, **arguments)

    def _go_on(self, kind, why):
        """Raises RuntimeError where a trajectory would change between the fused step and diffusers' own."""
        if self._ran not in (None, kind):
            raise RuntimeError(
                f"{type(self).__name__}: cannot go on with {'the ' * (kind == 'fused')}{kind} step within a trajectory: {why}"
            )
        self._ran = kind

    def _scaled_output(self, f, x, lambda_t, to_x):
        if f.shape == x.shape:
            return f / lambda_t + to_x * x
        own, v = f.split([x.shape[1], f.shape[1] - x.shape[1]], dim=1)  # learned variance
        return torch.cat([own / lambda_t + to_x * x, v], dim=1)

    def _drawn(self, noise, seeds, x, i):
        """The noise of step i as a tensor, from seeds too; None where there is none."""
        return noise if seeds is None else normal(seeds, list(x.shape[1:]), draw=i, stream=STREAM_STEP)

    def _threshold(self, row, f, x):
        """Dynamic thresholding's (B,), as diffusers takes it (arXiv 2205.11487): a quantile of |x_0| in each sample."""
        x0 = row.d_x * x.float() + row.d_f * f.float()
        s = quantile_of_sizes(x0.abs(), self.config.dynamic_thresholding_ratio)
        return s.clamp(min=1, max=self.config.sample_max_value)


class InHalves:
    """Two model calls a step, with one lambda; one in the last."""

    def _per_call(self, lambda_t):
        return np.repeat(lambda_t, 2)[: self._length()]

    def _per_step(self, values):
        return values[::2]


class FromCleanest:
    """Towards noise: lambda's first number is the noisiest step's, which is the last."""

    def _lambda_steps(self, rows):
        at, steps = super()._lambda_steps(rows)
        return steps - 1 - at[::-1], steps

    def _per_step(self, values):
        return values[::-1]

    _per_call = _per_step
