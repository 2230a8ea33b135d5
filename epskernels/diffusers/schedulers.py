"""Drop-in diffusers schedulers: their configuration, timesteps and noise; the step is one launch, with Epsilon Scaling in it.

    x' = c_x*x + c_f*f + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_noise*z,   m0 = clamp(d_x*x + d_f*f)

A class subclasses its namesake. `_formula` gives diffusers' own update as these columns, in float64, from the arrays that
diffusers computed; the mixin folds lambda in (f becomes f/lambda + (1 - 1/lambda)*f_x0/alpha*x, f_x0 the share of x_0 in f) and
keeps the result on the device: an immutable Plan, made once for each schedule. What cannot be one launch is listed in
docs/diffusers.md; what runs diffusers' own step, on the scaled output, says so in `scheduler.path` and in the log.
"""

import collections
import copy
import functools
import inspect
import logging
import math
import threading
import types

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers import schedulers as theirs
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .. import scaling
from ..guidance import quantile_of_sizes
from ..ops import as_seeds, normal, step, step_results
from ..samplers import ancestral, bh_updates, boundary, differences, log_snr
from ..spec import STREAM_STEP
from ..table import _DEFAULTS, COLUMNS

_log = logging.getLogger("epskernels")
_FLOAT32 = torch.float32
_DTYPES = (_FLOAT32, torch.float16, torch.bfloat16)


class Plan:
    """One row of coefficients for each model call of a trajectory, on one device. Nothing changes it: requests may share it.

    columns: float64, by name, (R,). rows: float32 (R, len(COLUMNS)). index: R scalar tensors. For each row: draws, whether the
    step draws noise there; noisy, whether it uses it; before, the standard deviation of the noise that x gets before it (churn);
    history, how many earlier m0 it reads; sound, whether it is finite, as it is not where diffusers' numbers are not; plain, its
    index where it is sound and reads nothing but x, f and the noise that the step draws, else None. For each step: lambda_t, and
    to_x: the scaled output is f/lambda_t + to_x*x.
    """

    __slots__ = (
        "columns", "rows", "index", "draws", "noisy", "before", "history", "sound", "plain", "lambda_t", "to_x",
    )  # fmt: skip

    def __init__(self, columns, draws, lambda_t, to_x, device):
        columns = dict(columns)
        before = columns.pop("before", 0.0)
        length = max(np.size(column) for column in columns.values())
        stacked = np.empty((length, len(COLUMNS)))
        if unknown := set(columns) - set(COLUMNS):
            raise ValueError(f"columns: unknown {sorted(unknown)}")
        for j, name in enumerate(COLUMNS):
            stacked[:, j] = columns.get(name, _DEFAULTS.get(name, 0.0))
        with np.errstate(over="ignore"):
            rows = stacked.astype(np.float32)
        may_be_infinite = [COLUMNS.index(name) for name in COLUMNS if _DEFAULTS.get(name) == np.inf]
        sound = np.isfinite(np.delete(rows, may_be_infinite, axis=1)).all(axis=1)
        rows[~sound] = 0.0
        values = {name: np.ascontiguousarray(stacked[:, j]) for j, name in enumerate(COLUMNS)}
        for column in values.values():
            column.setflags(write=False)
        reads = [(values[f"c_{m}"] != 0) | (values[f"k_{m}"] != 0) for m in ("m1", "m2")]
        before = np.broadcast_to(before, (length,))
        noisy = ((values["c_noise"] != 0) | (before != 0)) & sound
        draws, index = np.broadcast_to(draws, (length,)), torch.arange(length, device=device).unbind()
        plain = sound & (before == 0) & (draws == noisy)
        for name in ("c_m1", "c_m2", "k_m1", "k_m2", "c_y", "k_y", "logvar_min", "logvar_max"):
            plain &= values[name] == 0
        for attribute, value in (
            ("columns", types.MappingProxyType(values)),
            ("rows", torch.from_numpy(rows).to(device)),
            ("index", index),
            ("draws", tuple(draws.tolist())),
            ("noisy", tuple(noisy.tolist())),
            ("before", tuple(before.tolist())),
            ("history", tuple(np.where(reads[1], 2, reads[0]).tolist())),
            ("sound", tuple(sound.tolist())),
            ("plain", tuple(i if alone else None for i, alone in zip(index, plain.tolist(), strict=True))),
            ("lambda_t", tuple(lambda_t.tolist())),
            ("to_x", tuple(to_x.tolist())),
        ):
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name, value):
        raise AttributeError(f"a Plan is immutable: cannot set {name}")

    def __len__(self):
        return len(self.index)


class _Recent:
    """What was asked for last, up to `most` entries. Threads may share it."""

    def __init__(self, most):
        self.most, self.entries, self.lock = most, collections.OrderedDict(), threading.Lock()

    def get(self, key, make):
        """The entry of a key, made where there is none."""
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]
        made = make()
        with self.lock:
            self.entries[key] = made
            while len(self.entries) > self.most:
                self.entries.popitem(last=False)
        return made


class _Config(FrozenDict):
    """A configuration that counts its changes: FrozenDict lets attributes be set, pipelines do so, and a step looks at them."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        own = self.__dict__
        own["_changes"], own["_content"] = own.get("_changes", 0) + 1, None

    def content(self):
        """What a schedule may depend on, as a string."""
        own = self.__dict__
        if own["_content"] is None:
            own["_content"] = repr([(name, own.get(name)) for name in sorted(self) if not name.startswith("_")])
        return own["_content"]


def _set_by_attribute(config):
    """What was set of a configuration by attribute alone."""
    return {name: value for name, value in vars(config).items() if name in config and value is not config[name]}


class _Schedule:
    """All that follows from the numbers of a schedule, for every scheduler that has them.

    host: the timesteps as numbers; rank: where each is; input_scale: scale_model_input's; plans: by the options of step and the
    device.
    """

    __slots__ = ("host", "rank", "input_scale", "plans")

    def __init__(self, host, input_scale):
        self.host, self.input_scale, self.plans = host, input_scale, _Recent(16)
        self.rank = {t: i for i, t in reversed(list(enumerate(host)))}


_schedules = _Recent(32)


def _content(tensor):
    """The bytes of a tensor, dtype and shape before them."""
    host = tensor.detach().cpu()
    host = host.view(torch.int16) if host.dtype is torch.bfloat16 else host
    return tensor.dtype, tuple(tensor.shape), host.numpy().tobytes()


def _kept(value):
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value  # those may be written into


def _value(of, scheduler, name):
    return getattr(scheduler if of is None else of, name, None)


class _Seen:
    """A scheduler's schedule as it was when its rows were made, and whether it still is: every step asks.

    schedule: what follows from it. at: the places of the timesteps by their addresses. last: the options, the device and the plan
    asked for last. Tensors on the CPU are compared by their bytes, since .data and .numpy() write past their version; others by
    their version.
    """

    __slots__ = (
        "timesteps", "sigmas", "alphas_cumprod", "config", "changes", "count", "memory", "others", "schedule", "at", "dtype",
        "device", "last",
    )  # fmt: skip

    def __init__(self, scheduler):
        held = scheduler.__dict__
        self.timesteps, self.sigmas, self.alphas_cumprod = (
            held.get(n) for n in ("timesteps", "sigmas", "alphas_cumprod")
        )
        self.config, self.count = held["_internal_dict"], held.get("num_inference_steps")
        self.changes, self.memory = self.config._changes, []
        # What most schedulers do not have: (object, or None for the scheduler, attribute, its value).
        self.others = [(None, name) for name in scheduler._reads]
        if isinstance(self.config.eps_scaling, (list, dict)):  # which may be written into
            self.others.append((self.config, "eps_scaling"))
        for name in scheduler._tensors:
            if (tensor := held.get(name)) is None:
                continue
            if tensor.device.type != "cpu":
                self.others.append((tensor, "_version"))
                continue
            alias = tensor.detach()  # keeps the memory where the tensor is given another
            alias = alias.view(torch.int16) if alias.dtype is torch.bfloat16 else alias
            read = alias.numpy().tobytes
            self.memory.append((tensor, tensor.data_ptr(), read, read()))
        self.others = [(of, name, _kept(_value(of, scheduler, name))) for of, name in self.others]
        timesteps = self.timesteps
        self.dtype, self.device, self.last = timesteps.dtype, timesteps.device, (None, None, None)
        apart = timesteps.stride(0) * timesteps.element_size()
        self.at = {timesteps.data_ptr() + i * apart: i for i in reversed(range(len(timesteps)))}

    def is_of(self, scheduler):
        """Whether the scheduler's schedule, configuration and what else its rows are made of are still those."""
        held, config = scheduler.__dict__, self.config
        if (
            held["timesteps"] is not self.timesteps
            or held.get("sigmas") is not self.sigmas
            or held["_internal_dict"] is not config
            or config._changes != self.changes
            or held.get("num_inference_steps") != self.count
        ):
            return False
        if is_dynamo_compiling():  # alphas_cumprod may be on another device by now, and memory cannot be looked at
            return True
        for of, name, value in self.others:
            if _value(of, scheduler, name) != value:
                return False
        for tensor, address, read, content in self.memory:
            if tensor.data_ptr() != address or read() != content:
                return False
        return held.get("alphas_cumprod") is self.alphas_cumprod

    def key(self, scheduler):
        """What schedules are kept by."""
        reads = [_value(None, scheduler, name) for name in scheduler._reads]
        tensors = [_content(scheduler.__dict__[name]) for name in scheduler._tensors if name in scheduler.__dict__]
        of_config = self.config.content(), repr(self.config.eps_scaling)  # which may have been written into
        return type(scheduler), *of_config, self.count, scheduler._scheduled, scheduler._surplus, repr(reads), *tensors

    def place(self, timestep):
        """The index of a timestep that is a view into the schedule's, without reading it; None for any other."""
        i = self.at.get(timestep.data_ptr())
        if i is None or timestep.numel() != 1 or timestep.dtype is not self.dtype or timestep.device != self.device:
            return None
        return i

    def __reduce__(self):
        """To None: a deep copy of a scheduler, or one from a pickle, has its timesteps elsewhere."""
        return type(None), ()


class _Fused:
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
        if parent is _Fused or parent.__name__ != cls.__name__:
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
        self._internal_dict = _Config(self._internal_dict)

    def _adopt(self, eps_scaling):
        """The scaling into the configuration; a default one is not written where diffusers' own class would warn of it."""
        changed = {"eps_scaling": scaling.as_json(eps_scaling, "eps_scaling")}
        if "_use_default_values" in self.config:  # as it is not where a file names all
            defaults = [name for name in self.config["_use_default_values"] if name != "eps_scaling"]
            changed["_use_default_values"] = defaults + ["eps_scaling"] * (changed["eps_scaling"] == 1)
        by_attribute = _set_by_attribute(self.config)
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
        lambda_t = scaling.lambdas(value, of_all, "eps_scaling", functools.partial(_say, self))[at]
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
            if type(self._internal_dict) is not _Config:  # a pipeline may put a FrozenDict there
                by_attribute = _set_by_attribute(self._internal_dict)
                self._internal_dict = _Config(self._internal_dict)
                self._internal_dict.__dict__.update(by_attribute)
            for name in self._tensors:
                tensor = self.__dict__.get(name)
                if tensor is not None and tensor.is_inference() and tensor.device.type != "cpu":  # without a version
                    with torch.inference_mode(False):
                        setattr(self, name, tensor.clone())
            self._read_config()
            seen = self._seen = _Seen(self)
            seen.schedule = _schedules.get(
                seen.key(self), lambda: _Schedule(self.timesteps.tolist(), self._input_scale())
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
        i, most = self._step_index, self._most_steps()
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
            elif not plan.sound[row]:
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
        elif timestep.dtype is _FLOAT32:
            if self._step_index is None:
                self._init_step_index(timestep)
            row = self._step_index
        else:
            return None
        if row is None or row >= len(plan) or (index := plan.plain[row]) is None:
            return None
        if draws := plan.draws[row]:
            if generator is None and (seeds := self._seeds) is not None:
                if seeds.device != device:
                    return None
            elif noise_dtype is None or noise_dtype is dtype:
                noise = _draw(f, generator, dtype)
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
        _say(self, f"runs diffusers' own step: {why}")
        if i is not None:
            lambda_t, to_x = plan.lambda_t[i], plan.to_x[i]
            if to_x and plan.before[row]:
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

    def _noise(self, plan, row, f, generator, seeds, given=None, dtype=None, noisy=None):
        """{"noise": ...} or {"seeds": ...} for the step: diffusers' own draw from the generator, or the kernel's from seeds.

        noisy: whether the step uses it, where the row does not say.
        """
        if generator is not None and seeds is not None:
            raise ValueError("generator, seeds: expected one of them, got both")
        if not plan.draws[row]:
            return {}
        noisy = plan.noisy[row] if noisy is None else noisy
        if given is None and generator is None:
            if seeds is None and self._seeds is not None:
                seeds = self._seeds = self._seeds.to(f.device)
            if seeds is not None:
                return {"seeds": as_seeds(seeds, f.device)} if noisy else {}
        noise = _draw(f, generator, dtype or f.dtype) if given is None else given.to(f.device)
        return {"noise": noise} if noisy else {}

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


def _say(scheduler, message):
    """Once for each class and message."""
    _say_of(type(scheduler).__name__, message)


@functools.lru_cache(maxsize=256)
def _say_of(name, message):
    _log.warning("epskernels.diffusers.%s %s", name, message)


def _draw(f, generator, dtype):
    """diffusers' randn_tensor of f's shape; what that comes to where one generator draws where f is, without its overhead."""
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == f.device.type):
        if dtype is f.dtype and f.is_contiguous():  # naming what f has anyway takes as long as making the tensor
            return torch.randn_like(f) if generator is None else torch.empty_like(f).normal_(generator=generator)
        return torch.empty_like(f, dtype=dtype, memory_format=torch.contiguous_format).normal_(generator=generator)
    return randn_tensor(f.shape, generator=generator, device=f.device, dtype=dtype)


def _double(values):
    return np.asarray(torch.as_tensor(values).detach().cpu().double())


def _state(f, x):
    """x in the dtype that holds both."""
    return x if x.dtype is f.dtype else x.to(torch.promote_types(x.dtype, f.dtype))


def _vp_denoiser(prediction, alpha, sigma):
    """(d_x, d_f) of x_0 on a variance-preserving path, as diffusers writes it."""
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    known = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (zero, one),
        "v_prediction": (alpha + zero, -sigma + zero),
        "flow_prediction": (one, -sigma + zero),
    }
    if prediction not in known:
        raise ValueError(f"prediction_type: expected one of {tuple(known)}, got {prediction!r}")
    return known[prediction]


def _clip(config):
    """The bound of clip_sample; thresholding comes first in diffusers."""
    on = getattr(config, "clip_sample", False) and not getattr(config, "thresholding", False)
    return float(config.clip_sample_range) if on else math.inf


# ---- on timesteps: DDPM, DDIM ----


class _OnAlphas(_Fused):
    """Of alphas_cumprod at the timesteps."""

    _tensors = "timesteps", "alphas_cumprod"

    def _length(self):
        return len(self.timesteps)

    def _lambda_steps(self, rows):
        """Timesteps that are left of those that set_timesteps made keep their lambda."""
        known = {t: i for i, t in enumerate(self._scheduled)}
        places = [known.get(t) for t in self._host()]
        if None in places or len(set(places)) < rows:
            return np.arange(rows), rows
        return np.array(places), len(self._scheduled)

    def _t(self):
        return np.asarray(self._host(), dtype=np.int64)

    def _abar(self, t, beyond=1.0):
        """alphas_cumprod at t; `beyond` where t < 0, NaN above what there is."""
        abar = _double(self.alphas_cumprod)
        inside = abar[np.clip(t, 0, len(abar) - 1)]
        return np.where(t < 0, float(beyond), np.where(t < len(abar), inside, np.nan))

    def _ratio(self, a, b):
        """a/b as diffusers rounds it: near t = 0, one minus it has few digits, and lambda 1 promises diffusers' numbers."""
        if self.alphas_cumprod.dtype is not _FLOAT32:
            return a / b
        return (a.astype(np.float32) / b.astype(np.float32)).astype(np.float64)

    def _model(self, options):
        abar = self._abar(self._t())
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        return alpha, sigma, *_vp_denoiser(self.config.prediction_type, alpha, sigma)


class _OnTimesteps(_OnAlphas):
    _counts = False

    def _row(self, plan, timestep):
        return (self._place(timestep),) * 2


class DDPMScheduler(_OnTimesteps, diffusers.DDPMScheduler):
    def _read_config(self):
        super()._read_config()
        self._configured = self.config.variance_type

    def _formula(self, options):
        t = self._t()
        abar, abar_prev = self._abar(t), self._abar(np.append(t[1:], -1))
        alpha_ts = self._ratio(abar, abar_prev)
        beta = 1 - alpha_ts
        d_x, d_f = self._model(options)[2:]
        small = np.maximum((1 - abar_prev) / (1 - abar) * beta, 1e-20)
        kind, inside = self.config.variance_type, t > 0
        columns = {
            "d_x": d_x, "d_f": d_f, "clip": _clip(self.config), "t": t,
            "c_m0": np.sqrt(abar_prev) * beta / (1 - abar), "c_x": np.sqrt(alpha_ts) * (1 - abar_prev) / (1 - abar),
        }  # fmt: skip
        if kind in ("learned", "learned_range"):
            columns["c_noise"] = np.ones(len(t))
            if kind == "learned_range":
                columns["logvar_min"], columns["logvar_max"] = np.log(small) * inside, np.log(beta) * inside
        else:
            variance = {"fixed_large": beta, "fixed_large_log": np.log(beta)}
            columns["c_noise"] = np.sqrt(variance.get(kind, small))  # any other is fixed_small to diffusers
        columns["c_noise"] = np.where(inside, columns["c_noise"], 0.0)
        return columns, inside

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        f, x, v = model_output, sample, None
        learned = self.variance_type in ("learned", "learned_range")
        results = None
        if not learned and self.variance_type == self._configured:
            results = self._plain(f, timestep, x, generator, seeds, 2)
        if results is None:
            plan, i, _, why = entered = self._enter((), f, timestep, x)
            if why is None and self.variance_type != self._configured:
                *_, why = entered = (plan, i, i, "variance_type is not its configuration's")
            if why is not None:
                return self._own(entered, f, timestep, x, seeds, generator=generator, return_dict=return_dict)
            if learned and f.shape[1] == 2 * x.shape[1]:
                f, v = f.split(x.shape[1], dim=1)
            x = _state(f, x)
            noise = self._noise(plan, i, f, generator, seeds)
            if v is not None and self.variance_type == "learned":  # its root scales the noise before the launch
                noise, v = [("noise", v.sqrt() * z) for z in self._as_tensor(noise, x, i)], None
            results = self._step(plan, i, f, x, v=v, **dict(noise))
        return theirs.scheduling_ddpm.DDPMSchedulerOutput(*results) if return_dict else results


class DDIMScheduler(_OnTimesteps, diffusers.DDIMScheduler):
    _options = (0.0, False)
    _tensors = "timesteps", "alphas_cumprod", "final_alpha_cumprod"
    _needs_steps = True

    def _formula(self, options):
        eta, clipped = options
        t = self._t()
        prev = t - self.config.num_train_timesteps // (self.num_inference_steps or 1)
        abar, abar_prev = self._abar(t), self._abar(prev, self.final_alpha_cumprod)
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        d_x, d_f = self._model(options)[2:]
        variance = (1 - abar_prev) / (1 - abar) * (1 - self._ratio(abar, abar_prev))
        std = eta * np.sqrt(variance)
        towards = np.sqrt(1 - abar_prev - std**2)
        columns = {
            "d_x": d_x,
            "d_f": d_f,
            "clip": _clip(self.config),
            "c_m0": np.sqrt(abar_prev),
            "c_noise": std,
            "t": t,
        }
        if clipped:  # eps from x_0 as clamped
            columns["c_x"] = towards / sigma
            columns["c_m0"] = columns["c_m0"] - towards * alpha / sigma
        else:
            e_x, e_f = {
                "epsilon": (0.0, 1.0), "sample": (1 / sigma, -alpha / sigma), "v_prediction": (sigma, alpha),
            }[self.config.prediction_type]  # fmt: skip
            columns["c_x"], columns["c_f"] = towards * e_x, towards * e_f
        return columns, eta > 0

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.0,
        use_clipped_model_output=False,
        generator=None,
        variance_noise=None,
        return_dict=True,
        *,
        seeds=None,
    ):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        options = (float(eta), bool(use_clipped_model_output))
        plan, i, _, why = entered = self._enter(options, model_output, timestep, sample)
        if why is not None:
            return self._own(
                entered, model_output, timestep, sample, seeds, eta=eta, use_clipped_model_output=use_clipped_model_output,
                generator=generator, variance_noise=variance_noise, return_dict=return_dict,
            )  # fmt: skip
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("generator, variance_noise: expected one of them, got both")
        x = _state(model_output, sample)
        noise = self._noise(plan, i, model_output, generator, seeds, variance_noise)
        x, m0 = self._step(plan, i, model_output, x, **noise)
        if not return_dict:
            return x, m0
        return theirs.scheduling_ddim.DDIMSchedulerOutput(prev_sample=x, pred_original_sample=m0)


# ---- on steps counted from the first, x = x_0 + sigma*eps: Euler, Heun, EDM ----


class _OnSigmas(_Fused):
    def _sigmas(self):
        """sigma at each model call, and where its step ends."""
        return (sigmas := _double(self.sigmas))[:-1], sigmas[1:]

    def _input_scale(self):
        return (1 / np.sqrt(_double(self.sigmas) ** 2 + self._data_variance())).tolist()

    def _data_variance(self):
        return 1.0

    def scale_model_input(self, sample, timestep):
        if self._step_index is None:
            self._init_step_index(timestep)
        scales, i = self._refresh().schedule.input_scale, self._step_index
        if i >= len(scales):
            raise IndexError(f"scale_model_input: expected a step below {len(scales)}, the schedule's, got step {i}")
        self.is_scale_input_called = True
        return sample * scales[i]

    def _output(self, sigma, at=None):
        """(d_x, d_f) of x_0; at: the level that v_prediction takes, where it is not sigma."""
        zero, one, at = np.zeros_like(sigma), np.ones_like(sigma), sigma if at is None else at
        kind = self.config.prediction_type
        known = {
            "epsilon": (one, -sigma), "sample": (zero, one), "original_sample": (zero, one),
            "v_prediction": (1 / (at**2 + 1), -at / np.sqrt(at**2 + 1)),
        }  # fmt: skip
        if kind not in known:
            raise ValueError(f"prediction_type: expected one of {tuple(known)}, got {kind!r}")
        return known[kind]

    def _model(self, options):
        sigma = self._sigmas()[0]
        return np.ones(len(sigma)), sigma, *self._output(sigma)

    def _result(self, x, m0, return_dict):
        self._step_index += 1
        return self._output_class(prev_sample=x, pred_original_sample=m0) if return_dict else (x, m0)


def _warn_of_unscaled_input(scheduler):
    if not scheduler.is_scale_input_called:
        _say(
            scheduler, "expects scale_model_input to be called on what the model is given, before step, and it was not"
        )


def _refuse_integers(scheduler, timestep):
    if isinstance(timestep, int) or getattr(timestep, "dtype", None) in (torch.int64, torch.int32):
        raise ValueError(
            f"timestep: expected one of {type(scheduler).__name__}'s own timesteps, got the integer {timestep}"
        )


class _Euler(_OnSigmas):
    """Euler with churn, whose noise the model's estimate sees too: x gets it in an operation of its own."""

    _options = (0.0, 0.0, math.inf)

    def _hat(self, options):
        s_churn, s_tmin, s_tmax = options
        sigma = self._sigmas()[0]
        gamma = np.where((s_tmin <= sigma) & (sigma <= s_tmax), min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1), 0.0)
        return sigma, sigma * (gamma + 1)

    def _model(self, options):
        sigma, hat = self._hat(options)
        return np.ones(len(sigma)), hat, *self._output(hat, sigma)

    def _formula(self, options):
        sigma, hat = self._hat(options)
        d_x, d_f = self._output(hat, sigma)
        ratio, before = self._sigmas()[1] / hat, np.sqrt(hat**2 - sigma**2)
        return {"d_x": d_x, "d_f": d_f, "c_x": ratio, "c_m0": 1 - ratio, "before": before, "t": sigma}, before > 0

    def _euler(self, f, timestep, x, churn, s_noise, generator, return_dict, seeds, **more):
        _refuse_integers(self, timestep)
        _warn_of_unscaled_input(self)
        plan, i, _, why = entered = self._enter(tuple(float(bound) for bound in churn.values()), f, timestep, x)
        if more.get("pred_original_sample") is not None:
            *_, why = entered = (plan, i, i, "pred_original_sample is given")
            if self.config.eps_scaling != 1:
                raise ValueError("pred_original_sample: expected None, since it has its own lambda, got a tensor")
        if why is not None:
            return self._own(
                entered, f, timestep, x, seeds, **churn, s_noise=s_noise, generator=generator, return_dict=return_dict,
                **more,
            )  # fmt: skip
        x = _state(f, x)
        for noise in self._as_tensor(self._noise(plan, i, f, generator, seeds), x, i):
            x = torch.add(x.float(), noise, alpha=plan.before[i] * s_noise)
        x, m0 = self._step(plan, i, f, x, f.dtype)
        return self._result(x, m0, return_dict)


class EulerDiscreteScheduler(_Euler, diffusers.EulerDiscreteScheduler):
    _output_class = theirs.scheduling_euler_discrete.EulerDiscreteSchedulerOutput

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        return_dict=True,
        *,
        seeds=None,
    ):
        """diffusers' step; seeds: (B,), for noise made by the package's generator."""
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        return self._euler(model_output, timestep, sample, churn, s_noise, generator, return_dict, seeds)


class _Preconditioned:
    """EDM's c_skip and c_out (arXiv 2206.00364, table 1)."""

    def _output(self, sigma, at=None):
        data = self.config.sigma_data
        root = np.sqrt(sigma**2 + data**2)
        signs = {"epsilon": 1.0, "v_prediction": -1.0}
        if self.config.prediction_type not in signs:
            raise ValueError(f"prediction_type: expected one of {tuple(signs)}, got {self.config.prediction_type!r}")
        return (data / root) ** 2, signs[self.config.prediction_type] * sigma * data / root

    def _data_variance(self):
        return self.config.sigma_data**2


class EDMEulerScheduler(_Preconditioned, _Euler, diffusers.EDMEulerScheduler):
    _output_class = theirs.scheduling_edm_euler.EDMEulerSchedulerOutput

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        return_dict=True,
        pred_original_sample=None,
        *,
        seeds=None,
    ):
        """diffusers' step; seeds: (B,), for noise made by the package's generator."""
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        return self._euler(
            model_output, timestep, sample, churn, s_noise, generator, return_dict, seeds,
            pred_original_sample=pred_original_sample,
        )  # fmt: skip


class EulerAncestralDiscreteScheduler(_OnSigmas, diffusers.EulerAncestralDiscreteScheduler):
    _output_class = theirs.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput

    def _formula(self, options):
        if self.config.prediction_type == "sample":
            raise NotImplementedError("prediction_type: 'sample' is not one of EulerAncestralDiscreteScheduler's")
        sigma, sigma_next = self._sigmas()
        d_x, d_f = self._output(sigma)
        down, up = ancestral(1.0, sigma, 1.0, sigma_next, 1.0)
        ratio = down / sigma
        return {"d_x": d_x, "d_f": d_f, "c_x": ratio, "c_m0": 1 - ratio, "c_noise": up, "t": sigma}, True

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        _refuse_integers(self, timestep)
        _warn_of_unscaled_input(self)
        f = model_output
        plan, i, _, why = entered = self._enter((), f, timestep, sample)
        if why is not None:
            return self._own(entered, f, timestep, sample, seeds, generator=generator, return_dict=return_dict)
        x = _state(f, sample)
        x, m0 = self._step(plan, i, f, x, f.dtype, **self._noise(plan, i, f, generator, seeds))
        return self._result(x, m0, return_dict)


class HeunDiscreteScheduler(_OnSigmas, diffusers.HeunDiscreteScheduler):
    """Two rows for each step but the last; the second goes on from the state that the first was given, as diffusers does."""

    _output_class = theirs.scheduling_heun_discrete.HeunDiscreteSchedulerOutput
    _mixes = False
    _before = None

    def _per_call(self, lambda_t):
        return np.repeat(lambda_t, 2)[: self._length()]

    def _per_step(self, values):
        return values[::2]

    def _formula(self, options):
        at, after = self._sigmas()
        second = np.arange(len(at)) % 2 == 1
        start = np.where(second, np.roll(at, 1), at)  # where the step began
        end = np.where(second, at, after)
        d_x, d_f = self._output(at)
        ratio, half = end / start, (end - start) / 2
        columns = {
            "d_x": d_x, "d_f": d_f, "clip": _clip(self.config), "t": at,
            "c_x": np.where(second, half / end, ratio), "c_m0": np.where(second, -half / end, 1 - ratio),
            "c_y": np.where(second, 1 + half / start, 0.0), "c_m1": np.where(second, -half / start, 0.0),
        }  # fmt: skip
        return columns, False

    def step(self, model_output, timestep, sample, return_dict=True):
        f = model_output
        plan, i, _, why = entered = self._enter((), f, timestep, sample)
        if why is not None:
            return self._own(entered, f, timestep, sample, return_dict=return_dict)
        x, inputs = _state(f, sample), {}
        if not self.state_in_first_order:
            inputs = {"y": _like(self.sample, x), "m1": _like(self._before, x)}
        elif i % 2:
            raise ValueError(f"timestep: {timestep} begins at the second half of a step, whose first half did not run")
        next_x, m0 = self._step(plan, i, f, x, **inputs)
        if inputs:
            self.prev_derivative = self.dt = self.sample = self._before = None
        else:  # dt is what state_in_first_order looks at
            self.dt, self.sample, self._before = plan.columns["t"][i], x, m0
        return self._result(next_x, m0, return_dict)

    def _restart(self):
        super()._restart()
        self.prev_derivative = self.dt = self.sample = self._before = None


# ---- rectified flow ----


class FlowMatchEulerDiscreteScheduler(_Fused, diffusers.FlowMatchEulerDiscreteScheduler):
    def _model(self, options):
        sigma = _double(self.sigmas)[:-1]
        one = np.ones(len(sigma))
        if self.config.invert_sigmas:  # the schedule's are of x_0
            return sigma, 1 - sigma, one, 1 - sigma
        if not self._interpolates(sigma):  # x = x_0 + sigma*eps: the velocity is eps
            return one, sigma, one, -sigma
        return 1 - sigma, sigma, one, -sigma

    def _interpolates(self, sigma):
        """Whether x = (1 - sigma)*x_0 + sigma*eps at the schedule's sigmas, in float64 on the host."""
        return not self.config.invert_sigmas and sigma.max() <= 1.001

    def _formula(self, options):
        sigma, sigma_next = (sigmas := _double(self.sigmas))[:-1], sigmas[1:]
        columns = {"d_x": 1.0, "d_f": -sigma, "t": sigma}
        if self.config.stochastic_sampling:
            return columns | {"c_x": np.zeros(len(sigma)), "c_m0": 1 - sigma_next, "c_noise": sigma_next}, True
        return columns | {"c_x": np.ones(len(sigma)), "c_f": sigma_next - sigma}, False

    def step(
        self,
        model_output,
        timestep,
        sample,
        s_churn=0.0,
        s_tmin=0.0,
        s_tmax=float("inf"),
        s_noise=1.0,
        generator=None,
        per_token_timesteps=None,
        return_dict=True,
        *,
        seeds=None,
    ):
        """diffusers' step, which ignores the four s_ too; seeds: (B,), for noise made in the kernel."""
        f, x = model_output, None
        # diffusers draws in float32, whatever the model's dtype.
        if per_token_timesteps is None:
            x = self._plain(f, timestep, sample, generator, seeds, 1, _FLOAT32)
        if x is None:
            _refuse_integers(self, timestep)
            plan, i, _, why = entered = self._enter((), f, timestep, sample)
            if why is not None:
                return self._own(
                    entered, f, timestep, sample, seeds, generator=generator, per_token_timesteps=per_token_timesteps,
                    return_dict=return_dict,
                )  # fmt: skip
            x = _state(f, sample)
            per_token = per_token_timesteps is not None  # some may have noise to come in the schedule's last step
            noise = self._noise(plan, i, f, generator, seeds, dtype=torch.float32, noisy=True if per_token else None)
            if per_token:
                x = self._per_token(plan, i, f, x.float(), per_token_timesteps, self._as_tensor(noise, x, i))
            else:
                x = self._step(plan, i, f, x, f.dtype, **noise, results=1)
        self._step_index += 1
        if not return_dict:
            return (x,)
        return theirs.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)

    def _per_token(self, plan, i, f, x, timesteps, noise):
        """Each token with a level of its own, (B, N) timesteps: one launch with a row for each token, made on the device."""
        try:
            timesteps = timesteps.expand(x.shape[:2] if x.dim() == 3 else None)
        except (TypeError, RuntimeError):
            raise ValueError(
                "per_token_timesteps: expected (B, N), or a shape that broadcasts to it, for a sample (B, N, C) "
                f"{tuple(x.shape)}, got {tuple(timesteps.shape)}"
            ) from None
        sigma = timesteps / self.config.num_train_timesteps
        levels = self.sigmas.to(sigma.device)[:, None, None]
        below = ((levels < sigma[None] - 1e-6) * levels).max(dim=0).values
        rows = torch.zeros(*sigma.shape, len(COLUMNS), dtype=torch.float32, device=x.device)
        columns = {name: rows[..., j] for j, name in enumerate(COLUMNS)}
        for name, value in _DEFAULTS.items():
            if name in columns:
                columns[name].fill_(value)
        at, steps = self._lambda_steps(self._length())
        lambda_t = float(scaling.as_scaling(self.config.eps_scaling, "eps_scaling").values(steps)[at[i]])
        if lambda_t != 1 and not self._interpolates(plan.columns["t"]):
            raise ValueError(
                f"eps_scaling: expected 1 with per_token_timesteps and sigmas inverted or above 1, got {lambda_t:g}"
            )
        nowhere = scaling.noise_alone(1 - sigma, sigma, -1)  # lambda is 1 there
        on_f = torch.where(nowhere, 1.0, 1 / lambda_t)
        to_x = torch.where(nowhere, 0.0, -(1 - 1 / lambda_t) / (1 - sigma))
        if self.config.stochastic_sampling:
            columns["d_x"].copy_(1 - sigma * to_x)
            columns["d_f"].copy_(-sigma * on_f)
            columns["c_m0"].copy_(1 - below)
            columns["c_noise"].copy_(below)
        else:
            columns["c_x"].copy_(1 + (sigma - below) * to_x)
            columns["c_f"].copy_((sigma - below) * on_f)
        noise = dict([("noise", z.flatten(0, 1)) for z in noise])
        self.path = self._ran = "fused"
        index = torch.arange(sigma.numel(), device=x.device)
        return step(x.flatten(0, 1), f.flatten(0, 1), rows.flatten(0, 1), index, **noise).unflatten(0, sigma.shape)


# ---- multistep ----


def _earlier(h, steps):
    """The step lengths of so many steps before; NaN where there were none."""
    return np.concatenate([np.full(min(steps, len(h)), np.nan), h[:-steps]])


def _like(m, x):
    return m if m is None or m.dtype is x.dtype else m.to(x.dtype)


class _Multistep(_Fused):
    """The rows of a step at position i with L calls before it, at most solver_order: row L*N + i."""

    _needs_steps = True

    def _row(self, plan, timestep):
        (_, i), n = super()._row(plan, timestep), self._length()
        return min(self.lower_order_nums, len(plan) // n - 1) * n + i, i

    def _levels(self):
        """The log SNRs (N + 1,), alphas and sigmas of the schedule, in float64."""
        sigmas = _double(self.sigmas)
        alpha, sigma = self._alpha_sigma(sigmas)
        return alpha, sigma, log_snr(alpha, sigma)

    def _alpha_sigma(self, sigmas):
        if self.config.use_flow_sigmas:
            return 1 - sigmas, sigmas
        alpha = 1 / np.sqrt(sigmas**2 + 1)
        return alpha, sigmas * alpha

    def _denoiser(self):
        alpha, sigma = (level[:-1] for level in self._alpha_sigma(_double(self.sigmas)))
        if self.config.prediction_type == "flow_prediction":
            sigma = _double(self.sigmas)[:-1]
        return _vp_denoiser(self.config.prediction_type, alpha, sigma)

    def _model(self, options):
        alpha, sigma = self._alpha_sigma(_double(self.sigmas)[:-1])
        return alpha, sigma, *self._denoiser()

    def _kept(self, by_noise):
        """(d_x, d_f) of what the history keeps: x_0, or eps where that is integrated."""
        if not by_noise:
            return self._denoiser()
        alpha, sigma = (level[:-1] for level in self._alpha_sigma(_double(self.sigmas)))
        kinds = {
            "epsilon": (0 * sigma, 1 + 0 * sigma), "sample": (1 / sigma, -alpha / sigma), "v_prediction": (sigma, alpha),
        }  # fmt: skip
        if self.config.prediction_type not in kinds:
            raise ValueError(f"prediction_type: expected one of {tuple(kinds)}, got {self.config.prediction_type!r}")
        return kinds[self.config.prediction_type]

    def _keep(self, m0):
        """m0 into the history that diffusers keeps too."""
        self.model_outputs = [*self.model_outputs[1:], m0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)

    def _history(self, plan, row, x):
        count = plan.history[row]
        if count == 0:
            return {}
        m1 = _like(self.model_outputs[-1], x)
        return {"m1": m1} if count == 1 else {"m1": m1, "m2": _like(self.model_outputs[-2], x)}

    def _restart(self):
        super()._restart()
        self.model_outputs, self.lower_order_nums = [None] * self.config.solver_order, 0


class _DPMSolver(_Multistep):
    def _formula(self, options):
        config, n = self.config, self._length()
        alpha, sigma, at = self._levels()
        h, none = np.diff(at), np.zeros(n)
        h1, h2 = _earlier(h, 1), _earlier(h, 2)
        second, D1, D2 = differences(h, h1, h2)
        start, end = slice(0, -1), slice(1, None)
        by_noise = config.algorithm_type in ("dpmsolver", "sde-dpmsolver")  # the model's eps is integrated, not its x_0
        sde = config.algorithm_type.startswith("sde")
        if by_noise:
            E, times = np.expm1(h), 2.0 if sde else 1.0
            c_x, first = alpha[end] / alpha[start], -times * sigma[end] * E
            phi = -times * sigma[end] * (E / h - 1)
            of_D2 = np.full(n, np.nan) if sde else -sigma[end] * ((E - h) / h**2 - 0.5)  # diffusers has no such order
            noise = sigma[end] * np.sqrt(np.expm1(2 * h))
        else:
            H = 2 * h if sde else h
            A = -np.expm1(-H)
            c_x, first = sigma[end] / sigma[start] * (np.exp(-h) if sde else 1.0), alpha[end] * A
            phi = alpha[end] * (1 - A / H)
            of_D2 = alpha[end] * ((A / H - 1) / H + (-0.5 if sde else 0.5))  # its sign of 1/2 for the SDE is diffusers'
            noise = sigma[end] * np.sqrt(-np.expm1(-2 * h))
        middle = 0.5 * first if config.solver_type == "midpoint" else phi
        of_order = {
            1: np.array([first, none, none]),
            2: np.array([first, none, none]) + middle * second,
            3: np.array([first, none, none]) + phi * D1 + of_D2 * D2,
        }
        if sde and not self._third_order_sde:
            of_order[3][:] = np.nan
        weights = [np.select([order == k for k in of_order], list(of_order.values())) for order in self._orders(n)]
        columns = dict(zip(("c_m0", "c_m1", "c_m2"), np.concatenate(weights, axis=1), strict=True))
        levels = len(weights)
        columns |= {
            name: np.tile(column, levels) for name, column in zip(("d_x", "d_f"), self._kept(by_noise), strict=True)
        }
        columns["c_x"], columns["c_noise"] = np.tile(c_x, levels), np.tile(noise, levels) if sde else 0.0
        return columns, sde

    _third_order_sde = True

    def _orders(self, n):
        """diffusers' order of each step, for each number of calls before it."""
        config, i, steps = self.config, np.arange(n), len(self.timesteps)  # which may have been cut
        few = steps < 15
        last = (i == steps - 1) & (
            config.euler_at_final or (config.lower_order_final and few) or config.final_sigmas_type == "zero"
        )
        last_but_one = (i == steps - 2) & bool(config.lower_order_final and few)
        for before in range(config.solver_order + 1):
            order = min(config.solver_order, before + 1)
            yield np.where(last, 1, np.where(last_but_one, min(order, 2), order))

    def _read_config(self):
        config, by_x0 = self.config, self.config.algorithm_type.endswith("++")
        learned = getattr(config, "variance_type", None) in ("learned", "learned_range")
        self._leading = 3 if learned and config.prediction_type == "epsilon" else None  # channels, as diffusers has it
        self._thresholds, self._bends_eps = config.thresholding and by_x0, config.thresholding and not by_x0
        self._keeps_output = config.prediction_type == (
            "sample" if by_x0 else "epsilon"
        )  # whose dtype is then the state's

    def _dpm(self, f, timestep, x, generator, noise_dtype, return_dict, seeds, **more):
        plan, row, i, why = entered = self._enter((), f, timestep, x)
        whole, f = f, f if self._leading is None else f[:, : self._leading]
        if why is None and self._bends_eps:
            *_, why = entered = (plan, row, i, "dynamic thresholding of a solver that integrates eps")
        if why is not None:
            return self._own(entered, whole, timestep, x, seeds, generator=generator, return_dict=return_dict, **more)
        x = _state(f, x)
        noise = self._noise(plan, row, f, generator, seeds, more.get("variance_noise"), noise_dtype)
        dtype = f.dtype if self._keeps_output else x.dtype
        x, m0 = self._step(plan, row, f, x, dtype, **self._history(plan, row, x), **noise)
        self._keep(m0)
        self._step_index += 1
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)


class DPMSolverMultistepScheduler(_DPMSolver, diffusers.DPMSolverMultistepScheduler):
    def step(
        self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True, *, seeds=None
    ):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self._dpm(
            model_output, timestep, sample, generator, torch.float32, return_dict, seeds, variance_noise=variance_noise
        )


class EDMDPMSolverMultistepScheduler(_Preconditioned, _DPMSolver, diffusers.EDMDPMSolverMultistepScheduler):
    _third_order_sde = False  # diffusers has none here

    def _sigmas(self):
        return (sigmas := _double(self.sigmas))[:-1], sigmas[1:]

    _input_scale = _OnSigmas._input_scale

    def _alpha_sigma(self, sigmas):
        return np.ones_like(sigmas), sigmas

    def _denoiser(self):
        return self._output(self._sigmas()[0])

    scale_model_input = _OnSigmas.scale_model_input

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self._dpm(model_output, timestep, sample, generator, None, return_dict, seeds)


class UniPCMultistepScheduler(_Multistep, diffusers.UniPCMultistepScheduler):
    """x is what the predictor made; y carries the part of the corrected state that was known before the model's call."""

    _mixes = False
    _reads = "predict_x0", "disable_corrector", "solver_p"

    def _read_config(self):
        self._thresholds = self.config.thresholding and self.predict_x0

    def _formula(self, options):
        config, n = self.config, self._length()
        alpha, sigma, at = self._levels()
        h = np.diff(at)
        h1, h2 = _earlier(h, 1), _earlier(h, 2)
        ratios = [-h1 / h, -(h1 + h2) / h]
        hh = -h if self.predict_x0 else h
        scale, other = (alpha, sigma) if self.predict_x0 else (sigma, alpha)
        A, scale = other[1:] / other[:-1], scale[1:]
        # To sigma 0 where eps is integrated: 0*inf, whose limit is finite.
        first = None if self.predict_x0 else np.where(scale == 0, -A * sigma[:-1], -scale * np.expm1(hh))
        predictors, correctors = bh_updates(hh, ratios, scale, config.solver_order, config.solver_type, first)
        i = np.arange(n)
        left = len(self.timesteps) - i  # fewer where timesteps were cut: diffusers has no order 0
        most = np.minimum(config.solver_order, left) if config.lower_order_final else np.full(n, config.solver_order)
        corrects = ~np.isin(i - 1, list(self.disable_corrector)) & (i > 0)
        levels = []
        for before in range(config.solver_order + 1):
            order, order_before = np.minimum(most, before + 1), np.minimum(np.roll(most, 1), max(before, 1))
            P = np.select([order == p for p in predictors], list(predictors.values()))
            Q = np.select([order == p for p in correctors], [w for w, _ in correctors.values()])
            Q = np.where(np.append(corrects[1:], False), Q, 0.0)  # nobody reads the others
            kappa = np.select([order_before == p for p in correctors], [np.roll(k, 1) for _, k in correctors.values()])
            on = corrects & (before > 0)
            kappa = np.where(on, A * kappa, 0.0)
            k = np.append(corrects[1:], False) * A
            levels.append({
                "c_x": np.where(on, 0.0, A), "c_y": np.where(on, A, 0.0),
                "k_x": np.where(on, 0.0, k), "k_y": np.where(on, k, 0.0),
                "c_m0": kappa + P[0], "c_m1": P[1], "c_m2": P[2],
                "k_m0": np.where(k != 0, kappa + Q[0], 0.0), "k_m1": Q[1], "k_m2": Q[2],
            })  # fmt: skip
        columns = {name: np.concatenate([level[name] for level in levels]) for name in levels[0]}
        columns |= {
            name: np.tile(c, len(levels))
            for name, c in zip(("d_x", "d_f"), self._kept(not self.predict_x0), strict=True)
        }
        return columns, False

    def _most_steps(self):
        """By lower_order_final the order of a step is at most the number of timesteps that are left: none where they were cut."""
        return min(self._length(), len(self.timesteps)) if self.config.lower_order_final else self._length()

    def _check_last_steps(self, plan):
        n = self._length()
        row = min(n - 1, self.config.solver_order) * n + n - 1
        if not (plan.sound[row] or self.solver_p):
            raise ValueError(
                f"set_timesteps: expected a last step that has a limit, and one to sigma {float(self.sigmas[-1]):g} with "
                f"lower_order_final={self.config.lower_order_final} of solver_order {self.config.solver_order} has none: set "
                "lower_order_final=True"
            )

    def step(self, model_output, timestep, sample, return_dict=True):
        f = model_output
        plan, row, i, why = entered = self._enter((), f, timestep, sample)
        if why is None and self.solver_p is not None:
            *_, why = entered = (plan, row, i, "solver_p is another scheduler's step")
        if why is not None:
            return self._own(entered, f, timestep, sample, return_dict=return_dict)
        x = _state(f, sample)
        corrected = {"y": _like(self.last_sample, x)} if self.lower_order_nums else {}
        x, m0, self.last_sample = self._step(plan, row, f, x, **self._history(plan, row, x), **corrected, results=3)
        self._keep(m0)
        self._step_index += 1
        x = _like(x, sample)
        return theirs.scheduling_utils.SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _restart(self):
        super()._restart()
        self.last_sample = None


# ---- consistency models ----


class _Consistency(_OnAlphas):
    """Their second result is y'."""

    _needs_steps = True

    def _row(self, plan, timestep):
        if self._step_index is None:
            self._init_step_index(timestep)
        i = self._step_index  # beyond where timesteps were cut, diffusers goes on by the timestep that it is given
        return (i, i) if i < self._length() else (None, None)

    def _consistency(self, options, f, timestep, x, generator, return_dict, seeds, **more):
        plan, i, _, why = entered = self._enter(options, f, timestep, x)
        if why is None and self._place(timestep) != i:
            *_, why = entered = (plan, i, i, f"timestep {timestep} is not that of step {i}")
        if why is not None:
            return self._own(entered, f, timestep, x, seeds, generator=generator, return_dict=return_dict, **more)
        x = _state(f, x)
        noise = self._noise(plan, i, f, generator, seeds, dtype=x.dtype)
        x, _, y = self._step(plan, i, f, x, **noise, results=3)
        self._step_index += 1
        return self._output_class(x, y) if return_dict else (x, y)


class LCMScheduler(_Consistency, diffusers.LCMScheduler):
    _output_class = theirs.scheduling_lcm.LCMSchedulerOutput

    def _formula(self, options):
        t = self._t()
        last = np.arange(len(t)) == self.num_inference_steps - 1
        abar_prev = self._abar(np.append(t[1:], t[-1]))  # of itself, where the schedule ends before num_inference_steps
        c_skip, c_out = boundary(t * self.config.timestep_scaling)
        root = np.where(last, 1.0, np.sqrt(abar_prev))
        d_x, d_f = self._model(options)[2:]
        columns = {
            "d_x": d_x, "d_f": d_f, "clip": _clip(self.config), "t": t, "c_x": root * c_skip, "c_m0": root * c_out,
            "c_noise": np.where(last, 0.0, np.sqrt(1 - abar_prev)), "k_x": c_skip, "k_m0": c_out,
        }  # fmt: skip
        return columns, ~last

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        return self._consistency((), model_output, timestep, sample, generator, return_dict, seeds)


class TCDScheduler(_Consistency, diffusers.TCDScheduler):
    _output_class = theirs.scheduling_tcd.TCDSchedulerOutput
    _options = (0.3,)

    def _read_config(self):
        self._thresholds = False  # diffusers' step does not look at it

    def _formula(self, options):
        (eta,) = options
        t = self._t()
        prev = np.append(t[1:], 0)
        # diffusers multiplies in float32, whose floor may be another integer.
        s = np.floor(np.float32(1 - eta) * prev.astype(np.float32)).astype(np.int64)
        abar_s, (alpha, sigma, d_x, d_f) = self._abar(s), self._model(options)
        k_x = np.sqrt(1 - abar_s) / sigma
        k_m0 = np.sqrt(abar_s) - k_x * alpha
        noisy = (np.arange(len(t)) != self.num_inference_steps - 1) & (eta > 0)
        ratio = np.where(noisy, self._ratio(self._abar(prev), abar_s), 1.0)
        columns = {
            "d_x": d_x, "d_f": d_f, "t": t, "k_x": k_x, "k_m0": k_m0, "c_x": np.sqrt(ratio) * k_x, "c_m0": np.sqrt(ratio) * k_m0,
            "c_noise": np.sqrt(1 - ratio),
        }  # fmt: skip
        return columns, noisy

    def step(self, model_output, timestep, sample, eta=0.3, generator=None, return_dict=True, *, seeds=None):
        """diffusers' step; seeds: (B,), for noise made in the kernel."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
        return self._consistency((float(eta),), model_output, timestep, sample, generator, return_dict, seeds, eta=eta)


# ---- pipelines ----

FUSED = {
    twin._theirs: twin
    for twin in (
        DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler,
        HeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler, LCMScheduler,
        TCDScheduler, UniPCMultistepScheduler,
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


_OWN_ATTRIBUTES = (
    "_seen", "_seeds", "_ran", "path", "_scheduled", "_surplus", "_thresholds", "_leading", "_bends_eps", "_before",
    "_configured", "_keeps_output",
)  # fmt: skip


def unfuse(pipe):
    """Puts diffusers' own class back into a pipeline, and returns it; of a scheduler, returns diffusers'.

    What is saved then loads without this package. lambda goes: diffusers' step does not scale. A scheduler that is not fused
    stays as it is.
    """
    if not isinstance(pipe, SchedulerMixin):
        pipe.scheduler = unfuse(_scheduler_of(pipe))
        return pipe
    if not isinstance(pipe, _Fused):
        return pipe
    result = pipe._theirs.__new__(pipe._theirs)
    result.__dict__.update({k: v for k, v in copy.deepcopy(pipe.__dict__).items() if k not in _OWN_ATTRIBUTES})
    config = {k: v for k, v in pipe.config.items() if k != "eps_scaling"}
    if "_use_default_values" in config:
        config["_use_default_values"] = [name for name in config["_use_default_values"] if name != "eps_scaling"]
    result._internal_dict = FrozenDict(config)
    for name, value in _set_by_attribute(pipe.config).items():
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
