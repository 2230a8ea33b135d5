"""What a scheduler's steps are made of: the rows of a schedule, on a device, and whether the schedule is still that.

Plan             the rows
Schedule         what follows from a schedule's numbers; schedules of equal numbers share one
Seen             a scheduler's schedule and configuration, as they were when its rows were made
Configuration    which counts its changes
"""

import collections
import copy
import threading
import types

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch.compiler import is_dynamo_compiling

from ..table import COLUMNS, DEFAULTS


class Plan:
    """One row of coefficients for each model call of a trajectory, on one device. Nothing changes it: requests may share it.

    columns: float64, by name, (R,). rows: float32 (R, len(COLUMNS)). index: R scalar tensors.
    Of each row: draws, whether the step draws noise; uses_noise, whether it is used; churn_std, the standard deviation of what
    raises x before it; history, how many earlier m0 it reads; finite, whether it can be applied, as where diffusers' numbers are
    finite; plain, its index where it reads nothing but x, f and the noise that the step draws, else None.
    Of each step: lambda_t; to_x, where the scaled output is f/lambda_t + to_x*x.
    """

    __slots__ = (
        "columns", "rows", "index", "draws", "uses_noise", "churn_std", "history", "finite", "plain", "lambda_t", "to_x",
    )  # fmt: skip

    def __init__(self, columns, draws, lambda_t, to_x, device):
        columns = dict(columns)
        churn_std = columns.pop("churn_std", 0.0)
        length = max(np.size(column) for column in columns.values())
        stacked = np.empty((length, len(COLUMNS)))
        if unknown := set(columns) - set(COLUMNS):
            raise ValueError(f"columns: unknown {sorted(unknown)}")
        for j, name in enumerate(COLUMNS):
            stacked[:, j] = columns.get(name, DEFAULTS.get(name, 0.0))
        with np.errstate(over="ignore"):
            rows = stacked.astype(np.float32)
        may_be_infinite = [COLUMNS.index(name) for name in COLUMNS if DEFAULTS.get(name) == np.inf]
        finite = np.isfinite(np.delete(rows, may_be_infinite, axis=1)).all(axis=1)
        rows[~finite] = 0.0
        values = {name: np.ascontiguousarray(stacked[:, j]) for j, name in enumerate(COLUMNS)}
        for column in values.values():
            column.setflags(write=False)
        reads = [(values[f"c_{m}"] != 0) | (values[f"k_{m}"] != 0) for m in ("m1", "m2")]
        churn_std = np.broadcast_to(churn_std, (length,))
        uses_noise = ((values["c_noise"] != 0) | (churn_std != 0)) & finite
        draws, index = np.broadcast_to(draws, (length,)), torch.arange(length, device=device).unbind()
        plain = finite & (churn_std == 0) & (draws == uses_noise)
        for name in ("c_m1", "c_m2", "k_m1", "k_m2", "c_y", "k_y", "logvar_min", "logvar_max"):
            plain &= values[name] == 0
        for attribute, value in (
            ("columns", types.MappingProxyType(values)),
            ("rows", torch.from_numpy(rows).to(device)),
            ("index", index),
            ("draws", tuple(draws.tolist())),
            ("uses_noise", tuple(uses_noise.tolist())),
            ("churn_std", tuple(churn_std.tolist())),
            ("history", tuple(np.where(reads[1], 2, reads[0]).tolist())),
            ("finite", tuple(finite.tolist())),
            ("plain", tuple(i if alone else None for i, alone in zip(index, plain.tolist(), strict=True))),
            ("lambda_t", tuple(lambda_t.tolist())),
            ("to_x", tuple(to_x.tolist())),
        ):
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name, value):
        raise AttributeError(f"a Plan is immutable: cannot set {name}")

    def __len__(self):
        return len(self.index)


class Recent:
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


class Configuration(FrozenDict):
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


def set_by_attribute(config):
    """What was set of a configuration by attribute alone."""
    return {name: value for name, value in vars(config).items() if name in config and value is not config[name]}


class Schedule:
    """All that follows from the numbers of a schedule, for every scheduler that has them.

    host: the timesteps as numbers; rank: where each is; input_scale: scale_model_input's; plans: by the options of step and the
    device.
    """

    __slots__ = ("host", "rank", "input_scale", "plans")

    def __init__(self, host, input_scale):
        self.host, self.input_scale, self.plans = host, input_scale, Recent(16)
        self.rank = {t: i for i, t in reversed(list(enumerate(host)))}


SCHEDULES = Recent(32)


def _content(tensor):
    """The bytes of a tensor, dtype and shape before them."""
    host = tensor.detach().cpu()
    host = host.view(torch.int16) if host.dtype is torch.bfloat16 else host
    return tensor.dtype, tuple(tensor.shape), host.numpy().tobytes()


def _kept(value):
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value  # those may be written into


def _value(of, scheduler, name):
    return getattr(scheduler if of is None else of, name, None)


class Seen:
    """A scheduler's schedule as it was when its rows were made, and whether it still is: every step asks.

    schedule: what follows from it. length, most: its rows, and how many steps may be taken; asked for once, since the len of a
    tensor takes half as long as all else here. at: the places of the timesteps by their addresses. last: the options, the device
    and the plan asked for last.
    Tensors on the CPU are compared by their bytes, since .data and .numpy() write past their version; others by their version.
    """

    __slots__ = (
        "timesteps", "sigmas", "alphas_cumprod", "config", "changes", "count", "memory", "others", "schedule", "length", "most",
        "at", "dtype", "device", "last",
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
        self.length, self.most, timesteps = scheduler._length(), scheduler._most_steps(), self.timesteps
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
