"""Time shift (TS-DPM, Li et al., arXiv 2305.15583, alg. 2): a step takes the timestep whose noise the state really has.

    t_s = argmin over tau in [t - w/2, t + w/2] of (var(x) - (1 - abar_tau))^2     for each sample, only while t > cutoff

var(x) is the unbiased variance of all elements of a sample. A ShiftedTable holds a row for each candidate tau of each model call,
made in float64 beforehand; which one a sample takes is worked out on the device, so that no loop waits for it.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import samplers
from .ops import moments
from .samplers.common import GRID_OPTIONS
from .schedule import DiscreteSchedule, Grid, KarrasSchedule
from .spec import COLUMNS
from .table import VALUES, Table, check_one_sampler, describe
from .typing import Array, Backend, Device, Index, Steps

__all__ = ["FORMS", "UNUSED", "ShiftedTable", "nearest", "on_device", "variance"]

# The forms that each sampler has, its default first; all others have "network" alone.
FORMS: dict[Callable[..., Table], tuple[str, ...]] = {
    samplers.ddim: ("step", "target", "network"),
    samplers.ddpm: ("step", "network"),
    samplers.plms: ("target", "network"),
    samplers.ipndm: ("target", "network"),
}
# The level of a candidate that may not be chosen: further from every variance than any other. (inf - inf would be NaN.)
UNUSED = torch.finfo(torch.float64).max


class ShiftedTable:
    """A sampler with time shift, to pass in a table's place to `sample`, GraphedSampler and the serving engine.

    sampler: a function of `samplers`, or any (schedule, steps, **options) -> Table. schedule: a DiscreteSchedule; for the form
    "network" also a KarrasSchedule with such a `model`. steps, options: the sampler's own, scaling= (lambda_t) among them.
    window: the paper's w, at least 2 training timesteps: w//2 to each side of the usual one. The schedule's ends cut it.
    cutoff: only timesteps above it are shifted. The first model call never is.
    form: what takes the other timestep.
      "step"     the network and the start of the step: the paper's algorithm. The default of ddim and ddpm.
      "target"   the end of the step: the authors' code for PNDM and DDIM. The window lies around the next timestep, which is also
                 compared with the cutoff. The network is told the usual timesteps. The default of plms and ipndm, whose weighted
                 estimate of eps stays; ddim has it too.
      "network"  the network alone; the coefficients stay: the authors' code for DEIS. The default of all other samplers.
    Of two timesteps that are equally near, the less noisy one is taken. A state with NaN gives NaN.
    Raises ValueError and TypeError naming the argument, and what the sampler raises.

    Attributes: table, the sampler's own, of N rows. candidates, K = 2*(window//2) + 1, the rows for each of them. rows, float32
    (N*K, columns): model call i has those from i*K on, the less noisy first. t, (N*K,): what the network is told, int64 or
    float32. levels, float64 (N, K): the variance that each stands for, UNUSED where it may not be chosen. shifts: for each call,
    whether there is a choice. `choose` picks the row; in a loop of one's own:

        index, t = shifted.choose(i, x)
        x = epskernels.step(x, model(x, t), shifted.rows, index)
    """

    table: Table
    rows: Tensor
    t: Tensor
    levels: Tensor
    candidates: int
    shifts: tuple[bool, ...]
    _first: Tensor

    def __init__(
        self,
        sampler: Callable[..., Table],
        schedule: DiscreteSchedule | KarrasSchedule,
        steps: Steps,
        *,
        window: int,
        cutoff: float = 0,
        form: str | None = None,
        **options: Any,
    ):
        if not callable(sampler):
            raise TypeError(f"sampler: expected a function such as samplers.ddim, got {describe(sampler)}")
        if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 2:
            raise ValueError(f"window: expected an integer of at least 2, got {describe(window)}")
        if not (isinstance(cutoff, Real) and 0 <= cutoff < math.inf):
            raise ValueError(f"cutoff: expected a finite value >= 0, got {describe(cutoff)}")
        forms = FORMS.get(sampler, ("network",))
        form = forms[0] if form is None else form
        if form not in forms:
            name = getattr(sampler, "__name__", "this sampler")
            raise ValueError(f"form: expected {' or '.join(map(repr, forms))} for {name}, got {describe(form)}")
        path = schedule.model if form == "network" and isinstance(schedule, KarrasSchedule) else schedule
        if not isinstance(path, DiscreteSchedule):
            or_karras = ", or a KarrasSchedule(model=...)" if form == "network" else f" for the form {form!r}"
            raise TypeError(f"schedule: expected a DiscreteSchedule{or_karras}, got {schedule!r}")
        self.table = table = sampler(schedule, steps, **options)
        check_one_sampler(table)

        centre = np.append(table["t"][1:], -1) if form == "target" else table["t"]
        shifts = (np.arange(len(table)) > 0) & (centre > cutoff)
        if form == "target":
            shifts &= centre < table["t"]  # a first step of two calls: the second has the end of the first
        tau, allowed = _windows(centre, shifts, int(window) // 2, len(path))
        self.candidates = tau.shape[1]
        tables = [
            _candidate(form, sampler, path, table, options, *column) for column in zip(tau.T, allowed.T, strict=True)
        ]
        levels = np.where(allowed, 1 - path.abar[np.where(allowed, tau, 0).astype(np.int64)], np.inf)
        levels = np.where(
            allowed, levels / table["c_in"][:, None] ** 2, UNUSED
        )  # of the state, not of what the network reads

        self.shifts = tuple(shifts.tolist())
        kind = torch.int64 if table.discrete else torch.float32
        with torch.inference_mode(False):
            self.rows = torch.stack([each.rows for each in tables], 1).flatten(0, 1)
            self.t = self.rows[:, COLUMNS.index("t")].to(kind)
            self.levels = torch.from_numpy(levels).to(table.device)
            self._first = torch.arange(0, len(self.rows), self.candidates, device=table.device)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        shifted = f"{sum(self.shifts)} calls shifted among {self.candidates} candidates"
        return f"ShiftedTable {self.table.name}, {shifted}, {self.device}"

    def to(self, device: Device) -> "ShiftedTable":
        """The same on `device`."""
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        for name in ("table", "rows", "t", "levels", "_first"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def choose(self, i: Index, x: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
        """(index, t) of model call i for the states x, (B, ...): which of `rows`, int64 () or (B,), and the network's t, (B,).

        i: an integer, or an int64 tensor, () for all samples or (B,) for each, whose values the host never reads. backend: of the
        sums, as in `moments`. Raises IndexError for an integer that is no model call's, ValueError for samples of one element,
        which have no variance; and as `moments`.
        """
        if isinstance(i, torch.Tensor):
            levels, first = self.levels.index_select(0, i.reshape(-1)), i.reshape(-1) * self.candidates
        else:
            if not 0 <= i < len(self):
                raise IndexError(f"i: expected a model call in [0, {len(self)}), got {i}")
            levels, first = self.levels[i], self._first[i]
            if not self.shifts[i]:
                return first, self.t[i * self.candidates].expand(len(x))
        index = first + nearest(variance(x, backend=backend), levels)
        return index, self.t.index_select(0, index)


def variance(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The unbiased variance of all elements of each sample, float64 (B,): the same bits on every backend, alone or in any batch.

    x: (B, ...), as `moments` takes it. Raises ValueError for samples of one element.
    """
    n = math.prod(x.shape[1:])
    if n < 2:
        raise ValueError(f"x: expected samples of at least 2 elements, which have a variance, got {tuple(x.shape)}")
    total, squares = moments(x.detach(), backend=backend).unbind(1)
    by_n, by_rest = 1 / n, 1 / (n - 1)  # CUDA's division by a number is not rounded as the CPU's
    return (squares - total * total * by_n) * by_rest


def nearest(variance: Tensor, levels: Tensor) -> Tensor:
    """Which of the levels, float64 (K,) or (B, K), is nearest (squared) to each variance, (B,): int64 (B,).

    The first of equal ones; never UNUSED, except 0 where nothing is nearer: for NaN, inf, or UNUSED alone.
    """
    return (levels - variance[:, None]).square().argmin(1)


def on_device(table: Table | ShiftedTable, device: Device | None) -> tuple[Table, ShiftedTable | None]:
    """(the sampler's own table, the ShiftedTable if it is one), on `device`, by default their own.

    Raises TypeError for anything else, ValueError for a table of several samplers.
    """
    shifted = table if isinstance(table, ShiftedTable) else None
    table = table.table if isinstance(table, ShiftedTable) else table
    check_one_sampler(table)
    device = device or table.device
    return table.to(device), shifted and shifted.to(device)


# ---- the candidates ----


def _windows(centre: Array, shifts: NDArray[np.bool_], half: int, T: int) -> tuple[Array, NDArray[np.bool_]]:
    """(timesteps, whether each may be chosen), (N, K): all within `half` of the centre, (N,); the centre itself elsewhere."""
    tau = np.ceil(centre - half)[:, None] + np.arange(2 * half + 1)
    allowed = shifts[:, None] & (tau <= centre[:, None] + half) & (tau >= 0) & (tau < T)
    return np.where(allowed, tau, centre[:, None]), allowed


@dataclasses.dataclass(frozen=True)
class _Steps(Grid):
    """A grid whose steps end where they are told, and not where the next one begins."""

    ends: tuple[Array, Array] = dataclasses.field(kw_only=True)

    @property
    def alpha_next(self) -> Array:
        return self.ends[0]

    @property
    def sigma_next(self) -> Array:
        return self.ends[1]


def _candidate(
    form: str,
    sampler: Callable[..., Table],
    path: DiscreteSchedule,
    table: Table,
    options: Mapping[str, Any],
    tau: Array,
    allowed: NDArray[np.bool_],
) -> Table:
    """The sampler's table with the timesteps tau, (N,), in the place of its own where that is allowed, (N,)."""
    if form == "network":
        return _changed(table, {"t": tau})
    start, ends = (table["alpha_in"], table["sigma_in"]), (table["alpha_out"], table["sigma_out"])
    at = np.where(allowed, tau, 0).astype(np.int64)
    alpha, sigma = (
        np.where(allowed, shifted[at], usual)
        for shifted, usual in zip((path.alpha, path.sigma), start if form == "step" else ends, strict=True)
    )
    if form == "step":
        return _between(sampler, table, options, tau, (alpha, sigma), ends)
    if sampler is samplers.ddim:
        return _between(sampler, table, options, table["t"], start, (alpha, sigma))
    # x'/alpha' = x/alpha + (r' - r)*eps, r = sigma/alpha; eps, the weighted estimate, stays (PNDM, arXiv 2202.09778, eq. 11)
    if table.corrected:
        raise ValueError(f"correction: expected none beside the form 'target' of {table.name}")
    if not np.array_equal(start[0], path.alpha[table["t"].astype(np.int64)]):
        raise ValueError("space: expected 'vp' for the form 'target'")
    r = start[1] / start[0]
    ratio = np.divide(
        alpha * (sigma / alpha - r), ends[0] * (ends[1] / ends[0] - r), out=np.ones_like(r), where=allowed
    )
    weights = {key: table[key] * ratio for key in ("c_m0", "c_m1", "c_m2", "c_y")}
    return _changed(table, weights | {"c_x": alpha / start[0], "alpha_out": alpha, "sigma_out": sigma})


def _between(
    sampler: Callable[..., Table],
    table: Table,
    options: Mapping[str, Any],
    t: Array,
    start: tuple[Array, Array],
    ends: tuple[Array, Array],
) -> Table:
    """The sampler's rows between these levels, (alpha, sigma) each. Raises ValueError where noise is added on the way up."""
    upwards = (start[1] <= ends[1]) & (table["c_noise"] != 0)
    if upwards.any():
        i = int(np.flatnonzero(upwards)[0])
        raise ValueError(
            f"window: expected one within which each step of {table.name}, which adds noise, starts above its end; call {i}, "
            f"at t = {table['t'][i]:g}, does not"
        )
    last = float(ends[0][-1]), float(ends[1][-1])
    grid = _Steps(t, *start, table["c_in"], table.initial_sigma, *last, ends=ends)
    own = {key: value for key, value in options.items() if key not in GRID_OPTIONS}
    return sampler(grid, len(grid), **own)


def _changed(table: Table, columns: dict[str, Array]) -> Table:
    """The table with other columns."""
    values = {key: table[key] for key in VALUES} | columns
    return Table(
        values, name=table.name, initial_sigma=table.initial_sigma, discrete=table.discrete, device=table.device
    )
