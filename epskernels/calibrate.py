"""lambda_t for a model and a sampler: from its norms, in one run, by trials of any score, or by a gradient.

    match_norms   lambda_i = ||eps_sampling|| / ||eps_training|| at step i, the norm gap
    fit           that, or a measured norm gap, as a polynomial in i, with its R^2
    search        b, or (k, b) of lambda_i = k*i + b, downhill over a score; cached, so that it can stop and go on
    search_weights  the same for the weights of a correction, one after the other
    learn         by the gradient of a loss of the samples, through the whole sampler

Each gives an EpsilonScaling. arXiv 2308.15321 fits the norm gap by a quadratic and takes a linear lambda; the last is its
practice, trials by FID. It publishes neither as a program.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm.auto import tqdm

from . import scaling
from .exposure import Images, batches, epsilon_norm, figures, noised, save_figure
from .files import check_writable, read_object, reading, write_whole
from .ops import as_seeds, normal
from .plots import finish
from .table import Table
from .trajectory import Trajectory
from .typing import Array, FilePath, ModelCall, Outputs, SeedsLike, Shape

__all__ = [
    "FITS", "Fit", "Found", "Learned", "Matched", "downhill", "fit", "learn", "match_norms", "search", "search_weights",
    "steps_of",
]  # fmt: skip

Sampler = Callable[[scaling.EpsilonScaling], Table]
FITS = {"constant": 0, "linear": 1, "quadratic": 2}  # the degree of each kind of polynomial


# ---- polynomials ----


@dataclasses.dataclass(frozen=True)
class Fit:
    """A polynomial in i, the step counted from the cleanest: coefficients, the highest power first; r2: its goodness R^2, NaN
    where all values are the same; skip: the cleanest steps that were left out."""

    coefficients: tuple[float, ...]
    r2: float
    skip: int

    def __call__(self, i: ArrayLike) -> Array:
        return np.polyval(np.asarray(self.coefficients), np.asarray(i, dtype=np.float64))

    @property
    def derivative(self) -> tuple[float, ...]:
        """Coefficients of its derivative: of the norm gap's quadratic, the line that the paper takes lambda's slope from."""
        return tuple(np.polyder(np.asarray(self.coefficients)).tolist())

    @property
    def scaling(self) -> scaling.EpsilonScaling:
        """As lambda_i."""
        if len(self.coefficients) == 1:
            return scaling.constant(*self.coefficients)
        make: Callable[..., scaling.EpsilonScaling] = (
            scaling.linear if len(self.coefficients) == 2 else scaling.quadratic
        )
        return make(*self.coefficients, origin="cleanest")


def fit(values: ArrayLike, kind: str, skip: int = 0) -> Fit:
    """Least squares through values (steps,), the noisiest first: a Fit. kind: "constant", "linear" or "quadratic".

    skip: how many of the cleanest steps to leave out; the paper leaves out 5. Raises ValueError naming the argument.
    """
    lambda_t = np.asarray(values, dtype=np.float64)
    if lambda_t.ndim != 1 or not np.isfinite(lambda_t).all():
        raise ValueError(f"values: expected (steps,) finite numbers, got shape {lambda_t.shape}: {lambda_t}")
    if kind not in FITS:
        raise ValueError(f"kind: expected one of {tuple(FITS)}, got {kind!r}")
    if not 0 <= skip < len(lambda_t) - FITS[kind]:
        raise ValueError(f"skip: expected 0 to {len(lambda_t) - FITS[kind] - 1} for {len(lambda_t)} steps, got {skip}")
    i, y = np.arange(len(lambda_t))[skip:], lambda_t[::-1][skip:]
    coefficients = np.polyfit(i, y, FITS[kind])
    total = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - np.polyval(coefficients, i)) ** 2).sum() / total if total > 0 else math.nan
    return Fit(tuple(coefficients.tolist()), float(r2), skip)


# ---- norm matching ----


@dataclasses.dataclass(frozen=True)
class Matched:
    """What `match_norms` found, per step of the sampler, float64 (steps,), the noisiest first.

    lambda_t: the ratio of the norms, or 1 where x is noise alone. standard_error: of it, of pairs. norm_training,
    norm_sampling: means over images, the second before it is divided by lambda_t. levels: log(alpha/sigma) of each step.
    """

    sampler: str
    images: int
    lambda_t: Array
    standard_error: Array
    norm_training: Array
    norm_sampling: Array
    levels: Array

    @property
    def skip(self) -> int:
        """How many of the cleanest steps are left out where nothing else is said: a quarter, as the paper leaves out 5 of 20."""
        return len(self.lambda_t) // 4

    def scaling(self, kind: str = "array", skip: int | None = None) -> scaling.EpsilonScaling:
        """lambda_t itself, "array" or, for any number of steps, "by_level"; or the fit of that kind to it.

        skip: the cleanest steps whose ratio is not used, where it tells more of x_0 than of the noise: the fit leaves them out,
        in the array and by level they are 1. Default: a quarter of the steps.
        """
        skip = self.skip if skip is None else skip
        if kind not in ("array", "by_level"):
            return fit(self.lambda_t, kind, skip).scaling
        if not 0 <= skip <= len(self.lambda_t):
            raise ValueError(f"skip: expected 0 to {len(self.lambda_t)}, got {skip}")
        kept = np.arange(len(self.lambda_t)) < len(self.lambda_t) - skip
        values = np.where(kept, self.lambda_t, 1)
        if kind == "array":
            return scaling.array(values, origin="noisiest")
        known = (self.levels > math.log(scaling.NOISE_ALONE)) & np.isfinite(self.levels)  # below, x is noise alone
        return scaling.by_level(self.levels[known], values[known])

    def plot(self, path: FilePath, kind: str | None = None, skip: int | None = None) -> None:
        """lambda_t with two standard errors, and the fit."""
        skip = self.skip if skip is None else skip
        figure, (axis,) = figures(1, width=5.4)
        i = np.arange(len(self.lambda_t))
        axis.errorbar(i, self.lambda_t, 2 * self.standard_error, fmt="o", markersize=3, capsize=2, label="matched")
        if kind in FITS:
            line = fit(self.lambda_t, kind, skip)
            axis.plot(i, line(i[::-1]), label=f"{kind}, R^2 {line.r2:.3f}")
        axis.axhline(1, color="black", linewidth=0.8)
        low, high = self.lambda_t.min(), self.lambda_t.max()
        axis.set(title=f"{self.sampler}: lambda_t from {low:.4g} to {high:.4g} closes the norm gap",
                 xlabel=f"step, 0 (noisiest) to {len(i) - 1}", ylabel="lambda_t, with two standard errors")  # fmt: skip
        axis.locator_params(axis="x", integer=True)
        finish(axis)
        save_figure(figure, path)


def steps_of(sampler: Sampler) -> tuple[Table, NDArray[np.int64]]:
    """(table without scaling, the step of each row): rows that share a step share its lambda_t.

    sampler: a function of a scaling that returns the Table. Raises ValueError where the table does not carry its lambda_t.
    """
    asked: list[int] = []

    def ones(i: NDArray[np.int64]) -> Array:
        asked.append(len(i))
        return np.ones(len(i))

    table = sampler(scaling.EpsilonScaling(ones, "noisiest", "1"))
    if not asked:
        raise ValueError("sampler: expected one that scales by what it is called with: it did not look at it")
    if (table["lambda_t"] != 1).any():
        raise ValueError(f"sampler: expected one whose lambda_t is the scaling given, got {table['lambda_t']} for 1")
    if len(table.parts) != 1:
        raise ValueError(f"sampler: expected one sampler's table, got {len(table.parts)} concatenated: {table.name}")
    # A lambda of its own for each step tells its rows; where x is noise alone it stays 1, and those steps share the first rows.
    marked = sampler(scaling.EpsilonScaling(lambda i: 1 + (i + 1) / 1024, "noisiest", "1 + (i + 1)/1024"))["lambda_t"]
    step = np.rint((marked - 1) * 1024).astype(np.int64) - 1
    first = int(np.argmax(step >= 0)) if (step >= 0).any() else len(step)
    step[:first] = np.arange(first) * (step[first] if first < len(step) else asked[0]) // max(first, 1)
    in_order = np.isin(np.diff(step), (0, 1)).all() and (step[0], step[-1]) == (0, asked[0] - 1)
    if not in_order or len(step) != len(table) or (first and not _noise_alone(table)[0]):
        raise ValueError(f"sampler: expected rows for each of its {asked[0]} steps, in order, got {len(table)} rows")
    return table, step


def _noise_alone(table: Table) -> NDArray[np.bool_]:
    return scaling.noise_alone(table["alpha_in"], table["sigma_in"], table["f_x0"])


def _norms(table: Table, i: int, calls: Iterable[tuple[Tensor, Outputs]]) -> Array:
    """||eps_theta|| of all samples at row i. calls: of each batch x, and f, u and v of the model's output for it."""
    return torch.cat([epsilon_norm(table, i, x, output) for x, output in calls]).cpu().numpy()


@torch.no_grad()
def match_norms(
    model: ModelCall,
    sampler: Sampler,
    images: Images,
    *,
    feedback: bool = False,
    seed: int = 0,
    batch: int = 64,
    progress: bool = False,
) -> Matched:
    """lambda_t of each step such that eps_theta/lambda_t has the norm that it has in training: a Matched.

    In one run, of two model calls per image and row. It begins at the images, noised to the sampler's first t, and compares each
    sample with its own image: from pure noise the norms of other images would be compared, whose spread hides the gap, and
    the first t's own distance from pure noise would count as a gap.
    feedback=False: the run takes its steps without scaling, so that lambda_t is the norm gap. True: each step is taken with the
    lambda_t just found, so that the gap of the scaled sampler is closed exactly; but a lambda_t above 1 leaves noise in x, one
    below 1 takes too much out, and the next norm moves the same way: in a sampler that adds no noise of its own lambda_t may run
    away, as it does on two of the three models of docs/exposure.md, downward.
    model: any callable (x, t) -> f. sampler: a function of a scaling that returns the Table, such as
    functools.partial(samplers.ddpm, schedule, 20) called with scaling=: `lambda s: samplers.ddpm(schedule, 20, scaling=s)`.
    images: at least two real ones, as `exposure.measure` takes them. seed: image n is given the noise of seed + n. batch: images
    per model call. All are held in memory, as are as many states and model outputs.
    Raises ValueError naming the argument.
    """
    table, step_of_row = steps_of(sampler)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
    data = list(batches(images, batch))
    count = sum(len(x_0) for x_0 in data)
    if count < 2:
        raise ValueError(f"images: expected at least two, got {count}")
    device = table.device
    firsts = np.cumsum([seed] + [len(x_0) for x_0 in data])[:-1]
    seeds = [torch.arange(first, first + len(x_0), device=device) for first, x_0 in zip(firsts, data, strict=True)]
    runs = [Trajectory(table, noised(table, 0, x_0, s)) for x_0, s in zip(data, seeds, strict=True)]
    steps, alone = step_of_row.max() + 1, _noise_alone(table)
    lambda_t, errors, training, sampling = np.ones(steps), np.zeros(steps), np.zeros(steps), np.zeros(steps)
    for i in tqdm(range(len(table)), desc=f"{table.name}, norms", disable=not progress):
        n = step_of_row[i]
        outputs = [run.call(model, i) for run in runs]
        if i == 0 or step_of_row[i - 1] != n:
            exact = (Trajectory(table, noised(table, i, x_0, s)) for x_0, s in zip(data, seeds, strict=True))
            training_norms = _norms(table, i, ((state.x, state.call(model, i)) for state in exact))
            sampling_norms = _norms(table, i, zip((run.x for run in runs), outputs, strict=True))
            training[n], sampling[n] = training_norms.mean(), sampling_norms.mean()
            if not (np.isfinite(training[n]) and np.isfinite(sampling[n]) and training[n] > 0 and sampling[n] > 0):
                raise ValueError(f"model: norms of eps at step {n} are {sampling[n]} sampling, {training[n]} training")
            ratio = sampling[n] / training[n]
            if not alone[i]:
                lambda_t[n] = ratio
            errors[n] = (sampling_norms - ratio * training_norms).std(ddof=1) / training[n] / math.sqrt(count)
        scaled = sampler(scaling.array(lambda_t, origin="noisiest")) if feedback else table
        for run, output, s in zip(runs, outputs, seeds, strict=True):
            run.rows = scaled
            run.step(i, *output, seeds=s)
    first = np.searchsorted(step_of_row, np.arange(steps))
    levels = scaling.log_snr(table["alpha_in"][first], table["sigma_in"][first])
    return Matched(table.name, count, lambda_t, errors, training, sampling, levels)


# ---- search ----


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found. best: what has the smallest score, made of `weights`; score: that; baseline: the score of the start,
    which changes nothing; trials: all of them as (*weights, score). A score that was not finite is infinity."""

    best: Any
    weights: dict[str, float]
    score: float
    baseline: float
    trials: tuple[tuple[float, ...], ...]

    @property
    def scaling(self) -> scaling.EpsilonScaling:
        """The best, where it is a scaling. Raises TypeError otherwise."""
        if not isinstance(self.best, scaling.EpsilonScaling):
            raise TypeError(f"scaling: expected the result of a search over scalings, got one over {self.best}")
        return self.best


def downhill(
    score: Callable[[float], float],
    start: float,
    step: float,
    *,
    smallest: float,
    growth: float = 1.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> float:
    """The value whose score is smallest, from start on: a step to both sides, downhill as far as it goes, then in steps of half
    that size, down to the smallest.

    score: is asked for one value several times: it should remember. growth: what a step is multiplied by each time it went
    downhill, until one does not. Values are rounded to 7 digits after the point, and stay within the limits.
    """
    best = start
    while step >= smallest * (1 - 1e-9):
        sides = (round(best - step, 7), round(best + step, 7))
        near = [best, *(value for value in sides if limits[0] <= value <= limits[1])]
        lower = min(near, key=score)
        if lower == best:
            step, growth = step / 2, 1.0
        else:
            best, step = lower, step * growth
    return best


def search(
    score: Callable[[scaling.EpsilonScaling], float],
    bounds: Sequence[float] | Sequence[Sequence[float]],
    *,
    steps: int | None = None,
    trials: int = 8,
    cache: FilePath | None = None,
    key: object = "",
    progress: bool = False,
) -> Found:
    """The lambda that makes a score smallest, in a handful of trials: a Found. No scaling is always one of them.

    score: a function of an EpsilonScaling that returns a number, small where it is good; the same for the same scaling: fix its
    seeds. One that is not finite counts as infinitely bad.
    bounds: (low, high) of b, the uniform lambda; or ((low, high) of k, (low, high) of lambda in the middle) of
    lambda_i = k*i + b, i from the cleanest of `steps`: first k, then the middle beside the best k. The first step is a sixth of
    the bounds' distance. trials: calls of score, at most. cache: a JSON file; trials
    that it holds are not made again. key: whatever else the score depends on, kept with it.
    Raises ValueError naming the argument, also where no trial has a finite score.
    """
    limits = _checked_bounds(bounds)
    linear, last = limits.ndim == 2, 0
    if linear:
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 2:
            raise ValueError(f"steps: expected an integer of at least 2, to search (k, b), got {steps!r}")
        last = int(steps) - 1

    def line(k: float, middle: float) -> dict[str, float]:
        return {"k": k, "b": round(middle - k * last / 2, 7)}

    def as_lambda(k: float, b: float) -> scaling.EpsilonScaling:
        return scaling.linear(k, b, origin="cleanest") if linear else scaling.constant(b)

    k_limits, middle_limits = limits if linear else ([0.0, 0.0], limits)
    axes = [
        _Axis(start, (high - low) / 6, (low, high)) for start, (low, high) in ((0.0, k_limits), (1.0, middle_limits))
    ]
    known = _Trials(
        cache, {"format": scaling.FORMAT, "key": str(key), "steps": last + 1 if linear else None}, ("k", "b")
    )
    return _coordinate_wise(lambda p: score(as_lambda(**p)), as_lambda, line, axes, trials, known, progress)


def search_weights(
    score: Callable[[Any], float],
    make: Callable[..., Any],
    start: Mapping[str, float],
    *,
    bounds: Mapping[str, Sequence[float]] | None = None,
    step: float = 0.04,
    trials: int = 12,
    cache: FilePath | None = None,
    key: object = "",
    progress: bool = False,
) -> Found:
    """The weights of a correction that make a score smallest: a Found, whose `best` is what `make` made of them.

    `search_weights(score, corrections.dcw, {"low": 0.0, "high": 0.0})`; dc's start is {"s": 0.0}, frequency's
    {"low": 1.0, "high": 1.0}, scaling.tsr's {"k": 1.0}; functools.partial sets their other arguments.
    score: a function of what make returns that returns a number, small where it is good; the same for the same weights: fix its
    seeds. One that is not finite counts as infinitely bad.
    start: weights that change nothing, by the names of make's arguments. They are searched in that order, each beside the best of
    those before it: from the start to both sides, in steps that double as long as the score falls, then halve, down to `step`/8;
    at last where a parabola through the best three is lowest. bounds: (low, high) of a weight; default: 0.9 below its start to 2
    above. trials: calls of score, at most; each weight has an equal share of what is left. The start is one.
    cache: a JSON file; trials that it holds are not made again. key: whatever else the score depends on, kept with it.
    Raises ValueError naming the argument, also where no trial has a finite score.
    """
    if not start or not all(math.isfinite(value) for value in start.values()):
        raise ValueError(f"start: expected a finite number for each weight, got {dict(start)}")
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step: expected a number above 0, got {step!r}")
    if strange := set(bounds or ()) - set(start):
        raise ValueError(f"bounds: expected some of {list(start)}, got {sorted(strange)}")
    axes = []
    for name, value in start.items():
        low, high = _checked_bounds((bounds or {}).get(name, (value - 0.9, value + 2)), one=True)
        axes.append(_Axis(float(value), min(step, (high - low) / 2), (float(low), float(high))))
    names = tuple(start)
    known = _Trials(cache, {"format": scaling.FORMAT, "key": str(key), "weights": list(names)}, names)
    named = lambda *values: dict(zip(names, values, strict=True))  # noqa: E731
    return _coordinate_wise(lambda p: score(make(**p)), make, named, axes, trials, known, progress)


class _Axis(NamedTuple):
    """Of one weight."""

    start: float
    step: float
    limits: tuple[float, float]


class _EnoughError(Exception):
    """All trials are made."""


def _coordinate_wise(
    score: Callable[[dict[str, float]], float],
    make: Callable[..., Any],
    named: Callable[..., dict[str, float]],
    axes: Sequence[_Axis],
    trials: int,
    known: "_Trials",
    progress: bool,
) -> Found:
    """The search, an axis after the other. named: the weights' names and values, of a place on the axes."""
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 2:
        raise ValueError(f"trials: expected an integer of at least 2, got {trials!r}")
    bar = tqdm(total=trials, desc="search", disable=not progress)
    made: dict[tuple[float, ...], float] = {}
    allowed = trials

    def value(place: tuple[float, ...]) -> float:
        point = named(*place)
        at = tuple(point.values())
        if at not in made:
            if len(made) >= allowed:
                raise _EnoughError
            made[at] = known.score(at, lambda: score(point))
            bar.update()
            bar.set_postfix(**point, score=made[at])
        return made[at]

    start = tuple(axis.start for axis in axes)
    baseline = value(start)
    best = tuple(min(max(axis.start, axis.limits[0]), axis.limits[1]) for axis in axes)
    searched = [n for n, axis in enumerate(axes) if axis.step > 0]
    for n, left in zip(searched, range(len(searched), 0, -1), strict=True):
        along: dict[float, float] = {}

        def at(x: float, n: int = n, fixed: tuple[float, ...] = best, along: dict[float, float] = along) -> float:
            along[x] = value((*fixed[:n], x, *fixed[n + 1 :]))
            return along[x]

        axis, share = axes[n], len(made) + (trials - len(made)) // left
        descend = functools.partial(
            downhill, at, best[n], axis.step, smallest=axis.step / 8, growth=2.0, limits=axis.limits
        )
        with contextlib.suppress(_EnoughError):
            allowed = share - 1  # one is for the parabola
            descend()
        with contextlib.suppress(_EnoughError):
            allowed = share
            if (lowest := _vertex(along)) is not None:
                at(min(max(lowest, axis.limits[0]), axis.limits[1]))
            descend()
        if along:
            best = (*best[:n], min(along, key=along.__getitem__), *best[n + 1 :])
    bar.close()
    lowest_at = min(made, key=made.__getitem__)
    if not math.isfinite(made[lowest_at]):
        raise ValueError(f"score: expected a finite number from at least one trial, got none from {len(made)}")
    weights = dict(zip(named(*start), lowest_at, strict=True))
    found = tuple((*at, each) for at, each in made.items())
    return Found(make(**weights), weights, made[lowest_at], baseline, found)


def _vertex(along: Mapping[float, float]) -> float | None:
    """Where the parabola through the best value and its neighbours is lowest; None where there is none."""
    x = sorted(value for value in along if math.isfinite(along[value]))
    n = min(range(len(x)), key=lambda i: along[x[i]], default=0)
    if not 0 < n < len(x) - 1:
        return None
    near = np.array(x[n - 1 : n + 2])
    a, b, _ = np.polyfit(near - near[1], [along[value] for value in near], 2)
    return round(float(near[1] - b / (2 * a)), 7) if a > 0 else None


def _checked_bounds(bounds: ArrayLike, *, one: bool = False) -> Array:
    """float64 (2,) or (2, 2). Raises ValueError naming `bounds`."""
    found = np.asarray(bounds, dtype=np.float64)
    shapes = ((2,),) if one else ((2,), (2, 2))
    if found.shape not in shapes or not (np.isfinite(found).all() and (found[..., 0] < found[..., 1]).all()):
        raise ValueError(
            f"bounds: expected (low, high){'' if one else ' or two of them'}, low < high, got {found.tolist()}"
        )
    return found


class _Trials:
    """The scores in a JSON file, by the weights of these names."""

    def __init__(self, path: FilePath | None, settings: dict[str, Any], names: tuple[str, ...]):
        self.path, self.saved = None if path is None else pathlib.Path(path), settings | {"trials": []}
        self.names = names
        if self.path is not None:
            check_writable(self.path)
        if self.path is not None and self.path.exists():
            what = "cache: expected what search has saved"
            saved = read_object(self.path, what)
            with reading(self.path, what):
                saved["trials"] = list(saved["trials"])
                self._by_weights(saved["trials"])
            for name, expected in settings.items():
                if saved.get(name) != expected:
                    raise ValueError(f"cache: {path} was begun with {name} {saved.get(name)!r}, now {expected!r}")
            self.saved = saved
        self.scores = self._by_weights(self.saved["trials"])

    def score(self, at: tuple[float, ...], make: Callable[[], float]) -> float:
        if at not in self.scores:
            score = float(make())
            trial = dict(zip(self.names, at, strict=True)) | {"score": score if math.isfinite(score) else None}
            self.saved["trials"].append(trial)
            self.scores |= self._by_weights([trial])
            if self.path is not None:
                text = json.dumps(self.saved, indent=1) + "\n"
                write_whole(self.path, lambda file: file.write(text.encode()))
        return self.scores[at]

    def _by_weights(self, trials: Iterable[dict[str, Any]]) -> dict[tuple[float, ...], float]:
        return {
            tuple(float(trial[name]) for name in self.names): math.inf
            if trial["score"] is None
            else float(trial["score"])
            for trial in trials
        }


# ---- the gradient ----


@dataclasses.dataclass(frozen=True)
class Learned:
    """What `learn` found: the scaling of the smallest loss, and the loss of each round, the first without scaling."""

    scaling: scaling.EpsilonScaling
    losses: tuple[float, ...]


def learn(
    model: ModelCall,
    sampler: Sampler,
    loss: Callable[[Tensor], Tensor],
    seeds: SeedsLike,
    shape: Shape,
    *,
    form: str = "array",
    rounds: int = 30,
    rate: float = 3e-3,
    progress: bool = False,
) -> Learned:
    """The lambda_t that Adam finds for a loss of the samples, by the gradient through every step and model call: a Learned.

    model: any callable (x, t) -> f, differentiable in x. sampler: a function of a scaling that returns the Table. loss: a
    function of the samples (B, *shape) that returns a scalar tensor. seeds: of the samples, the same in every round, all in one
    batch, with the activations of a whole trajectory in memory. form: "array", a lambda_t for each step, "constant", "linear"
    or "quadratic". rate: Adam's, of lambda itself.
    Raises ValueError naming the argument, also where the loss is not finite.
    """
    table, step_of_row = steps_of(sampler)
    if form != "array" and form not in FITS:
        raise ValueError(f"form: expected one of {('array', *FITS)}, got {form!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 2 or not rate > 0:
        raise ValueError(f"rounds, rate: expected at least 2 and a rate above 0, got {rounds!r}, {rate!r}")
    steps, device = int(step_of_row.max()) + 1, table.device
    i = (
        torch.linspace(1, -1, steps, dtype=torch.float64, device=device)
        if steps > 1
        else torch.zeros(1, dtype=torch.float64, device=device)
    )
    basis = torch.eye(steps, dtype=torch.float64, device=device)
    if form != "array":
        basis = torch.stack([i**power for power in range(FITS[form] + 1)], 1)
    seeds = as_seeds(seeds, device)
    weights = torch.zeros(basis.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=rate)
    losses: list[float] = []
    best = np.ones(steps)
    of_row = torch.from_numpy(step_of_row).to(device)
    # Where x is noise alone, with the second call of such a step.
    alone = torch.from_numpy(np.isin(step_of_row, step_of_row[_noise_alone(table)])).to(device)
    for _ in tqdm(range(rounds), desc=f"{table.name}, gradient", disable=not progress):
        lambda_t = 1 + basis @ weights
        rows = table.scaled_rows(torch.where(alone, 1.0, lambda_t[of_row]))
        run = Trajectory(table, table.initial_sigma * normal(seeds, shape), rows=rows)
        for row in range(len(table)):
            run.step(row, *run.call(model, row), seeds=seeds)
        value = loss(run.x)
        if not torch.isfinite(value):
            raise ValueError(
                f"loss: expected a finite number, got {value.item()} in round {len(losses)}; rate is {rate}"
            )
        if not losses or value.item() < min(losses):
            best = lambda_t.detach().cpu().numpy()
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    found = scaling.array(best, origin="noisiest") if form == "array" else fit(best, form).scaling
    return Learned(found, tuple(losses))
