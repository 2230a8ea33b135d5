"""What a scheduler's steps are made of: the rows of a schedule, on a device, and whether the schedule is still that.

Row, Plan        the rows
Schedule         what follows from a schedule's numbers; schedules of equal numbers share one
Seen             a scheduler's schedule and configuration, as they were when its rows were made
Configuration    which counts its changes
Theirs           for type checkers: what the classes here take from diffusers' own
"""

import collections
import copy
import dataclasses
import threading
import types
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..spec import BAND_COLUMNS
from ..table import COLUMNS, DEFAULTS
from ..typing import Array, FilePath
from .common import OURS, Columns, Draws, Timestep

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What a step needs to know of its row of coefficients, and of its place in the schedule.

    step: which step, as lambda counts them; None where the schedule has no such timestep. table, index: what the op takes.
    why: what keeps the row from being applied, so that diffusers' own step runs; None where nothing does. draws: whether the step
    draws noise; uses_noise: whether it is used. churn_std: the standard deviation of what raises x before the launch. history:
    how many earlier m0 it reads. thresholds: whether m0 is thresholded. corrects: whether x' is corrected; band_dims: in how many
    of the last dimensions the plan corrects bands, 0 for none. prepares: whether thresholds or band_dims say that there is
    something to do before the launch. c_noise, d_x, d_f, t: those columns, c_noise without the correction. lambda_t, to_x: the
    scaled output is f/lambda_t + to_x*x.
    """

    step: int = None  # type: ignore[assignment]  # but where `why` says so, it is a number
    table: Tensor | None = None
    index: Tensor | None = None
    why: str | None = None
    draws: bool = True
    uses_noise: bool = True
    churn_std: float = 0.0
    history: int = 0
    thresholds: bool = False
    corrects: bool = False
    band_dims: int = 0
    prepares: bool = False
    c_noise: float = 0.0
    d_x: float | Tensor = 1.0
    d_f: float | Tensor = 0.0
    t: float = 0.0
    lambda_t: float = 1.0
    to_x: float = 0.0

    def refused(self, why: str) -> "Row":
        """The same row where something else keeps it from being applied."""
        return dataclasses.replace(self, why=why)


class Plan:
    """One row of coefficients for each model call of a trajectory, on one device. Nothing changes it: requests may share it.

    columns: float64, by name, (R,). table: float32 (R, len(COLUMNS)), wider where a band is corrected. rows: R of Row.
    lambda_t: of each step.
    """

    __slots__ = ("columns", "table", "rows", "lambda_t")
    columns: Mapping[str, Array]
    table: Tensor
    rows: tuple[Row, ...]
    lambda_t: tuple[float, ...]

    def __init__(
        self, columns: Columns, draws: Draws, lambda_t: Array, to_x: Array, device: torch.device, why: str | None = None,
        thresholds: bool = False,
    ) -> None:  # fmt: skip
        columns = dict(columns)
        churn_std: Any = columns.pop("churn_std", 0.0)
        w_next, corrects = (columns.pop(name, value) for name, value in (("w_next", 1.0), ("corrects", False)))
        band_dims = int(np.max(columns.get("band_dims", 0)))
        names = COLUMNS + BAND_COLUMNS if band_dims else COLUMNS
        length, steps = max(np.size(column) for column in columns.values()), len(lambda_t)
        stacked = np.empty((length, len(names)))
        if unknown := set(columns) - set(COLUMNS + BAND_COLUMNS):
            raise ValueError(f"columns: unknown {sorted(unknown)}")
        for j, name in enumerate(names):
            stacked[:, j] = columns.get(name, DEFAULTS.get(name, 0.0))
        with np.errstate(over="ignore"):
            rounded = stacked.astype(np.float32)
        may_be_infinite = [COLUMNS.index(name) for name in COLUMNS if DEFAULTS.get(name) == np.inf]
        finite: Any = np.isfinite(np.delete(rounded, may_be_infinite, axis=1)).all(axis=1)
        rounded[~finite] = 0.0
        values = {name: np.ascontiguousarray(stacked[:, j]) for j, name in enumerate(names)}
        for column in values.values():
            column.setflags(write=False)
        reads = [(values[f"c_{m}"] != 0) | (values[f"k_{m}"] != 0) for m in ("m1", "m2")]
        churn_std = np.broadcast_to(churn_std, (length,))
        of_row: dict[str, Any] = {
            "draws": np.broadcast_to(draws, (length,)),
            "uses_noise": ((values["c_noise"] != 0) | (churn_std != 0)) & finite,
            "churn_std": churn_std,
            "history": np.where(reads[1], 2, reads[0]),
            "corrects": np.broadcast_to(corrects, (length,)),
            "c_noise": values["c_noise"] / w_next,
            "d_x": values["d_x"],
            "d_f": values["d_f"],
            "t": values["t"],
            "lambda_t": np.resize(lambda_t, length),
            "to_x": np.resize(to_x, length),
        }
        of_row, table = {name: array.tolist() for name, array in of_row.items()}, torch.from_numpy(rounded).to(device)
        of_all: dict[str, Any] = {
            "thresholds": thresholds,
            "band_dims": band_dims,
            "prepares": thresholds or band_dims > 0,
        }
        rows = []
        for r, index in enumerate(torch.arange(length, device=device).unbind()):
            i = r % steps
            reason = why or (None if finite[r] else f"the coefficients of step {i} are not finite")
            each = {name: array[r] for name, array in of_row.items()}
            rows.append(Row(i, table, index, reason, **of_all, **each))
        object.__setattr__(self, "columns", types.MappingProxyType(values))
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "lambda_t", tuple(lambda_t.tolist()))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Plan is immutable: cannot set {name}")

    def __len__(self) -> int:
        return len(self.rows)


class Recent:
    """What was asked for last, up to `most` entries. Threads may share it."""

    def __init__(self, most: int) -> None:
        self.entries: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self.most, self.lock = most, threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        own = self.__dict__
        own["_changes"], own["_content"] = own.get("_changes", 0) + 1, None

    def content(self) -> str:
        """What a schedule may depend on, as a string."""
        own = self.__dict__
        if own["_content"] is None:
            own["_content"] = repr([(name, own.get(name)) for name in sorted(self) if not name.startswith("_")])
        return own["_content"]


def set_by_attribute(config: Any) -> dict[str, Any]:
    """What was set of a configuration by attribute alone."""
    return {name: value for name, value in vars(config).items() if name in config and value is not config[name]}


class Schedule:
    """All that follows from the numbers of a schedule, for every scheduler that has them.

    host: the timesteps as numbers; rank: where each is; input_scale: scale_model_input's; plans: by the options of step and the
    device.
    """

    __slots__ = ("host", "rank", "input_scale", "plans")

    def __init__(self, host: list[float], input_scale: list[float] | None) -> None:
        self.host, self.input_scale, self.plans = host, input_scale, Recent(16)
        self.rank = {t: i for i, t in enumerate(host)}


SCHEDULES = Recent(32)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """The bytes of a tensor, dtype and shape before them."""
    host = tensor.detach().cpu()
    host = host.view(torch.int16) if host.dtype is torch.bfloat16 else host
    return tensor.dtype, tuple(tensor.shape), host.numpy().tobytes()


def _kept(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value  # those may be written into


def _value(of: object, scheduler: object, name: str) -> Any:
    return getattr(scheduler if of is None else of, name, None)


class Seen:
    """A scheduler's schedule as it was when its rows were made, and whether it still is: every step asks.

    schedule: what follows from it. length, most: its rows, and how many steps may be taken; asked for once, since the len of a
    tensor takes half as long as all else here. at: the places of the timesteps by their addresses. last: the options, the device
    and the plan asked for last.
    Tensors on the CPU are compared by their bytes, since .data and .numpy() write past their version; others by their version.
    """

    __slots__ = (
        "config", "changes", "count", "on_host", "on_device", "others", "schedule", "length", "most", "at", "dtype", "device",
        "device_index", "last",
    )  # fmt: skip
    schedule: Schedule

    def __init__(self, scheduler: Any) -> None:
        held = scheduler.__dict__
        self.config, self.count = held["_internal_dict"], held.get("num_inference_steps")
        self.changes = self.config._changes
        self.on_host, self.on_device = [], []
        for name in scheduler._tensors:
            if (tensor := held.get(name)) is None:
                continue
            if tensor.device.type != "cpu":
                self.on_device.append((name, tensor, tensor._version))
                continue
            alias = tensor.detach()  # keeps the memory where the tensor is given another
            alias = alias.view(torch.int16) if alias.dtype is torch.bfloat16 else alias
            read = alias.numpy().tobytes
            self.on_host.append((name, tensor, tensor.data_ptr, tensor.data_ptr(), read, read()))
        # What most schedulers do not have: (object, or None for the scheduler, attribute, its value).
        others = [(None, name) for name in scheduler._reads]
        for name in OURS:
            if isinstance(getattr(self.config, name, None), (list, dict)):  # which may be written into
                others.append((self.config, name))
        self.others = [(of, name, _kept(_value(of, scheduler, name))) for of, name in others]
        self.length, self.most, timesteps = scheduler._length(), scheduler._most_steps(), held["timesteps"]
        self.dtype, self.device, self.device_index = timesteps.dtype, timesteps.device, timesteps.get_device()
        self.last: tuple[Any, Any, Any] = None, None, None
        apart = timesteps.stride(0) * timesteps.element_size()
        self.at = {timesteps.data_ptr() + i * apart: i for i in reversed(range(len(timesteps)))}

    def is_of(self, scheduler: Any) -> bool:
        """Whether the scheduler's schedule, configuration and what else its rows are made of are still those."""
        held, config = scheduler.__dict__, self.config
        if (
            held["_internal_dict"] is not config
            or config._changes != self.changes
            or held.get("num_inference_steps") != self.count
        ):
            return False
        if is_dynamo_compiling():  # memory cannot be looked at, and alphas_cumprod may be on another device by now
            kept = [*self.on_host, *self.on_device]
            return all(held[name] is tensor or name == "alphas_cumprod" for name, tensor, *_ in kept)
        for name, tensor, data_ptr, address, read, content in self.on_host:
            if held[name] is not tensor or data_ptr() != address or read() != content:
                return False
        for name, tensor, version in self.on_device:
            if held[name] is not tensor or tensor._version != version:
                return False
        for of, name, value in self.others:
            if _value(of, scheduler, name) != value:
                return False
        return True

    def key(self, scheduler: Any) -> tuple[Any, ...]:
        """What schedules are kept by."""
        reads = [_value(None, scheduler, name) for name in scheduler._reads]
        # A function itself, which is kept with the key: its text has an address, where another may lie later.
        reads = [value if callable(value) else repr(value) for value in reads]
        tensors = [_content(scheduler.__dict__[name]) for name in scheduler._tensors if name in scheduler.__dict__]
        # repr: what may have been written into
        of_config = self.config.content(), *(repr(getattr(self.config, name, None)) for name in OURS)
        of_scheduler = self.count, scheduler._scheduled, scheduler._surplus, *reads, *tensors
        return type(scheduler), *of_config, *of_scheduler

    def place(self, timestep: Tensor) -> int | None:
        """The index of a timestep that is a view into the schedule's, without reading it; None for any other."""
        i = self.at.get(timestep.data_ptr())
        if (
            i is None
            or timestep.dtype is not self.dtype
            or timestep.numel() != 1
            or timestep.get_device() != self.device_index
        ):
            return None
        return i

    def __reduce__(self) -> tuple[Any, ...]:
        """To None: a deep copy of a scheduler, or one from a pickle, has its timesteps elsewhere."""
        return type(None), ()


if TYPE_CHECKING:

    class Theirs:
        """What the classes here take from the class after them, diffusers' own; not every one of those has all of it.

        from_config and from_pretrained: more exact than diffusers', whose result is a scheduler or a tuple.
        """

        timesteps: Tensor
        sigmas: Tensor
        num_inference_steps: int
        _internal_dict: Configuration
        _step_index: int
        _begin_index: int

        @property
        def config(self) -> Configuration: ...
        def __init__(self, *args: Any, **theirs: Any) -> None: ...
        def register_to_config(self, **kwargs: Any) -> None: ...
        @classmethod
        def extract_init_dict(
            cls, config_dict: Any, **kwargs: Any
        ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]: ...
        def _init_step_index(self, timestep: Timestep) -> None: ...
        @overload
        @classmethod
        def from_config(cls, config: Any, return_unused_kwargs: Literal[False] = ..., **kwargs: Any) -> Self: ...
        @overload
        @classmethod
        def from_config(
            cls, config: Any, return_unused_kwargs: Literal[True], **kwargs: Any
        ) -> tuple[Self, dict[str, Any]]: ...
        @classmethod
        def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any: ...
        @overload
        @classmethod
        def from_pretrained(
            cls, pretrained_model_name_or_path: FilePath, subfolder: str | None = ...,
            return_unused_kwargs: Literal[False] = ..., **kwargs: Any,
        ) -> Self: ...  # fmt: skip
        @overload
        @classmethod
        def from_pretrained(
            cls, pretrained_model_name_or_path: FilePath, subfolder: str | None = ..., *,
            return_unused_kwargs: Literal[True], **kwargs: Any,
        ) -> tuple[Self, dict[str, Any]]: ...  # fmt: skip
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any: ...
else:
    Theirs = object
