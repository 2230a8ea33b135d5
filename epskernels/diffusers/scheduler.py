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
from .common import draw_noise, say
from .plan import SCHEDULES, Configuration, Plan, Schedule, Seen, set_by_attribute

_log = logging.getLogger("epskernels")
FLOAT32 = torch.float32
_DTYPES = (FLOAT32, torch.float16, torch.bfloat16)


class Fused:
    """What all schedulers here share; the class after it in the order of inheritance is diffusers' own.

    path: how the last step ran, "fused" or "diffusers: <why>". seeds: a sample's seed each, or None; steps then make their noise
    in the kernel unless a generator is given. eps_scaling: lambda, as scaling.as_scaling takes it; may be set. lambdas: lambda of
    each step.
    """

    _counts = True  # the steps; else each call finds its row by its timestep
    _mixes = True  # a trajectory may go on with diffusers' own step, since its history is the same
    _needs_steps = False  # set_timesteps has to come before step
    _options = ()  # the arguments of step that change the rows, with their defaults
    _tensors = "timesteps", "sigmas"  # what the rows are made of,
    _reads = ()  # and of which other attributes
    _seen = _seeds = _ran = path = sigmas = None
    _scheduled, _surplus = (), 0  # the timesteps that set_timesteps made, and how many rows it made beyond them

    def __init_subclass__(cls):
        parent = cls.__bases__[-1]
        if parent is Fused or parent.__name__ != cls.__name__:
            return  # a mixin
        parameters = inspect.signature(parent.__init__).parameters
        own = inspect.Parameter("eps_scaling", inspect.Parameter.KEYWORD_ONLY, default=1.0)

        @functools.wraps(parent.__init__)
        def __init__(self, *args, eps_scaling=1.0, **kwargs):
            eps_scaling = scaling.as_json(eps_scaling, "eps_scaling")
            parent.__init__(self, *args, **kwargs)
            self._adopt(eps_scaling)

        __init__.__signature__ = inspect.Signature([*parameters.values(), own])

        @functools.wraps(parent.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            parent.set_timesteps(self, *args, **kwargs)
            self._seen = self._ran = None
            self._scheduled = tuple(self.timesteps.tolist())
            self._surplus = self._length() - len(self._scheduled)
            if "eps_scaling" in self.config:  # not while diffusers' own constructor runs
                self._check_last_steps(self._plan(self._options, self.timesteps.device))

        cls.__init__, cls.set_timesteps = __init__, set_timesteps
        cls._theirs = parent
        cls.__module__ = __package__  # where users find it, and saved pipelines

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
        seen = self._refresh()
        before, where, plan = seen.last
        if before == options and where == device:
            return plan

        def make():
            with torch.inference_mode(False):  # what is kept serves calls with gradients too
                return Plan(*self._scaled_formula(options), device)

        plan = seen.schedule.plans.get((options, device), make)
        seen.last = options, device, plan
        return plan

    def _refresh(self):
        """The schedule and the configuration as they are now."""
        seen = self._seen
        if seen is None or not seen.is_of(self):
            if type(self._internal_dict) is not Configuration:  # a pipeline may put a FrozenDict there
                by_attribute = set_by_attribute(self._internal_dict)
                self._internal_dict = Configuration(self._internal_dict)
                self._internal_dict.__dict__.update(by_attribute)
            for name in self._tensors:
                tensor = self.__dict__.get(name)
                if tensor is not None and tensor.is_inference() and tensor.device.type != "cpu":  # without a version
                    with torch.inference_mode(False):
                        setattr(self, name, tensor.clone())
            self._read_config()
            seen = self._seen = Seen(self)
            seen.schedule = SCHEDULES.get(
                seen.key(self), lambda: Schedule(self.timesteps.tolist(), self._input_scale())
            )
        return seen

    def _scaled_formula(self, options):
        with np.errstate(all="ignore"):  # a row that is not finite is not used
            columns, draws = self._formula(options)
            alpha, sigma, d_x, d_f = self._model(options)
            scale = self._per_call(self._lambdas(alpha, sigma, d_x))
            on_x = np.where(scale == 1, 0.0, (1 - d_x * alpha) / d_f * (1 - 1 / scale) / alpha)
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
        if self.begin_index is not None:
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
        """The row of this call and its step, or None for both where the schedule does not have the timestep."""
        if self._step_index is None:
            self._init_step_index(timestep)
        i, most = self._step_index, self._seen.most
        if i >= most:
            raise IndexError(
                f"step: expected at most {most} calls after set_timesteps, or a begin index below, got step {i}"
            )
        return i, i

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

    def _enter(self, options, f, timestep, x):
        """(plan, row, step, why): what this call applies, and why it cannot, or None."""
        why = None
        if self._needs_steps and self.num_inference_steps is None:
            raise ValueError("set_timesteps: expected a call of it before step")
        if not (isinstance(x, torch.Tensor) and isinstance(f, torch.Tensor)):
            why = f"sample and model_output are {type(x).__name__} and {type(f).__name__}, not tensors"
        elif x.dtype not in _DTYPES or f.dtype not in _DTYPES:
            why = f"of dtypes {x.dtype} and {f.dtype}"
        elif is_grad_enabled() and (x.requires_grad or f.requires_grad):
            why = "gradients are asked for, and its operations have them"
        plan = self._plan(options, self.timesteps.device if why else x.device)
        row, i = self._row(plan, timestep)
        if why is None:
            if row is None:
                why = f"timestep {timestep} is not one of the schedule's"
            elif not plan.finite[row]:
                why = f"the coefficients of step {i} are not finite"
        return plan, row, i, why

    def _plain(self, f, timestep, x, generator, seeds, results, noise_dtype=None):
        """What _enter, _noise and _step come to in a plain call, after one look: its results; None leaves the call to them.

        Plain: the schedule and device planned for last, a timestep of the schedule's own, x and f of one dtype, no gradient or
        thresholding, a row that reads nothing else but the noise that the scheduler draws or makes from its own seeds. On small
        latents those three take longer than the op. For schedulers that have no options and may change paths (_mixes).
        """
        seen = self._seen
        if (
            seen is None
            or not seen.is_of(self)
            or type(x) is not Tensor
            or type(f) is not Tensor
            or type(timestep) is not Tensor
            or seeds is not None
            or self._thresholds
        ):
            return None
        _, device, plan = seen.last
        dtype = x.dtype
        if dtype is not f.dtype or dtype not in _DTYPES or x.device != device:
            return None
        if is_grad_enabled() and (x.requires_grad or f.requires_grad):
            return None
        if not self._counts:
            row = seen.place(timestep)
        elif timestep.dtype is FLOAT32:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
        else:
            return None
        if row is None or row >= seen.length or (index := plan.plain[row]) is None:
            return None
        if draws := plan.draws[row]:
            if generator is None and (seeds := self._seeds) is not None:
                if seeds.device != device:
                    return None
            elif noise_dtype is None or noise_dtype is dtype:
                noise = draw_noise(f, generator, dtype)
            else:
                return None
        self.path = self._ran = "fused"
        if not draws:
            return step_results(results, plain=True)(x, f, plan.rows, index)
        if seeds is not None:
            return step_results(results)(x, f, plan.rows, index, seeds=seeds)
        return step_results(results)(x, f, plan.rows, index, noise=noise)

    def _own(self, entered, f, timestep, x, seeds=None, **arguments):
        """diffusers' own step, on the output scaled by lambda: f/lambda plus its share of x_0 times x."""
        plan, row, i, why = entered
        if (seeds is not None or (self._seeds is not None and arguments.get("generator") is None)) and (
            row is None or plan.draws[row]
        ):
            raise ValueError(f"seeds: diffusers' own step takes a generator, and it runs here: {why}")
        if not self._mixes and self._ran == "fused":
            raise RuntimeError(
                f"{type(self).__name__}: cannot go on with diffusers' own step within a trajectory: {why}"
            )
        self._ran, self.path = "own", f"diffusers: {why}"
        say(self, f"runs diffusers' own step: {why}")
        if i is not None:
            lambda_t, to_x = plan.lambda_t[i], plan.to_x[i]
            if to_x and plan.churn_std[row]:
                raise ValueError(
                    f"eps_scaling: diffusers' own step adds churn after the scaling, and it runs here: {why}"
                )
            if lambda_t != 1:
                f = self._scaled_output(f, x, lambda_t, to_x)
        elif self.config.eps_scaling != 1:
            raise ValueError(f"timestep: {timestep} is not one of the schedule's, so that it has no lambda")
        return self._theirs.step(self, f, timestep, x, **arguments)

    def _scaled_output(self, f, x, lambda_t, to_x):
        if f.shape == x.shape:
            return f / lambda_t + to_x * x
        own, v = f.split([x.shape[1], f.shape[1] - x.shape[1]], dim=1)  # learned variance
        return torch.cat([own / lambda_t + to_x * x, v], dim=1)

    def _noise(self, plan, row, f, generator, seeds, given=None, dtype=None, uses_noise=None):
        """{"noise": ...} or {"seeds": ...} for the step: diffusers' own draw from the generator, or the kernel's from seeds.

        uses_noise: whether the step uses it, where the row does not say.
        """
        if generator is not None and seeds is not None:
            raise ValueError("generator, seeds: expected one of them, got both")
        if not plan.draws[row]:
            return {}
        uses_noise = plan.uses_noise[row] if uses_noise is None else uses_noise
        if given is None and generator is None:
            if seeds is None and self._seeds is not None:
                seeds = self._seeds = self._seeds.to(f.device)
            if seeds is not None:
                return {"seeds": as_seeds(seeds, f.device)} if uses_noise else {}
        noise = draw_noise(f, generator, dtype or f.dtype) if given is None else given.to(f.device)
        return {"noise": noise} if uses_noise else {}

    def _as_tensor(self, noise, x, i):
        """[the noise of step i] where it comes from seeds too, or []."""
        if "seeds" in noise:
            return [normal(noise["seeds"], list(x.shape[1:]), draw=i, stream=STREAM_STEP)]
        return list(noise.values())

    def _threshold(self, plan, row, f, x):
        """Dynamic thresholding's (B,), as diffusers takes it (arXiv 2205.11487): a quantile of |x_0| in each sample."""
        x0 = plan.columns["d_x"][row] * x.float() + plan.columns["d_f"][row] * f.float()
        s = quantile_of_sizes(x0.abs(), self.config.dynamic_thresholding_ratio)
        return s.clamp(min=1, max=self.config.sample_max_value)

    def _step(self, plan, row, f, x, dtype=None, m1=None, m2=None, v=None, noise=None, seeds=None, y=None, results=2):
        """One launch: the first `results` of x', m0, y'; x' in `dtype`, default x's. Noise of more digits than x widens x."""
        if not self._mixes and self._ran == "own":
            raise RuntimeError(
                f"{type(self).__name__}: cannot go on with the fused step within a trajectory: {self.path}"
            )
        self.path = self._ran = "fused"
        dtype = dtype or x.dtype
        if noise is not None and noise.dtype is not x.dtype:
            wide = torch.promote_types(x.dtype, noise.dtype)
            x, noise, m1, m2, y = (None if a is None else a.to(wide) for a in (x, noise, m1, m2, y))
        threshold = self._threshold(plan, row, f, x) if self._thresholds else None
        inputs = x, f, plan.rows, plan.index[row]
        if noise is not None or seeds is not None or y is not None or v is not None or threshold is not None:
            inputs += None, m1, m2, v, None, noise, seeds, y, None, threshold
        elif m1 is not None:
            inputs += None, m1, m2
        made = step_results(results, len(inputs) == 4)(*inputs)
        if x.dtype is not dtype:
            made = (made[0].to(dtype), *made[1:]) if results > 1 else made.to(dtype)
        return made
