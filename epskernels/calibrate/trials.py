"""A search by trials of any score: of lambda, or of the weights of a correction; cached, so that it can stop and go on.

search          b, or (k, b) of lambda_i = k*i + b, downhill over the score
search_weights  the weights of a correction, one after the other
"""

import contextlib
import dataclasses
import functools
import json
import math
import numbers
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from .. import scaling
from ..files import check_writable, read_object, reading, write_whole
from ..table import describe
from ..typing import Array, FilePath

__all__ = ["Found", "downhill", "number_of", "search", "search_weights", "shown"]


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

    score: a function of an EpsilonScaling that returns a number, or a tensor of one, small where it is good; the same for the
    same scaling: fix its seeds. One that is not finite counts as infinitely bad.
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

    k_limits, middle_limits = limits.tolist() if linear else ([0.0, 0.0], limits.tolist())
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


class _Along:
    """The scores along one axis, by place. Two places nearer than `apart`, which rounding makes of one, have one trial."""

    def __init__(self, score: Callable[[float], float], apart: float):
        self.score, self.apart, self.scores = score, apart, dict[float, float]()

    def at(self, x: float) -> float:
        known = min(self.scores, key=lambda place: abs(place - x), default=math.inf)
        if abs(known - x) > self.apart:
            known = x
            self.scores[x] = self.score(x)
        return self.scores[known]


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

    def value_along(n: int, fixed: tuple[float, ...], x: float) -> float:
        return value((*fixed[:n], x, *fixed[n + 1 :]))

    start = tuple(axis.start for axis in axes)
    baseline = value(start)
    best = tuple(min(max(axis.start, axis.limits[0]), axis.limits[1]) for axis in axes)
    searched = [n for n, axis in enumerate(axes) if axis.step > 0]
    for n, left in zip(searched, range(len(searched), 0, -1), strict=True):
        axis, share = axes[n], len(made) + (trials - len(made)) // left
        along = _Along(functools.partial(value_along, n, best), axis.step / 800)
        descend = functools.partial(
            downhill, along.at, best[n], axis.step, smallest=axis.step / 8, growth=2.0, limits=axis.limits
        )
        with contextlib.suppress(_EnoughError):
            allowed = share - 1  # one is for the parabola
            descend()
        with contextlib.suppress(_EnoughError):
            allowed = share
            if (lowest := _vertex(along.scores)) is not None:
                along.at(min(max(lowest, axis.limits[0]), axis.limits[1]))
            descend()
        if along.scores:
            best = (*best[:n], min(along.scores, key=along.scores.__getitem__), *best[n + 1 :])
    bar.close()
    lowest_at = min(made, key=made.__getitem__)
    if not math.isfinite(made[lowest_at]):
        raise ValueError(f"score: expected a finite number from at least one trial, got none from {len(made)}")
    weights = dict(zip(named(*start), lowest_at, strict=True))
    found = tuple((*at, each) for at, each in made.items())
    return Found(make(**weights), weights, made[lowest_at], baseline, found)


def number_of(value: Any, expected: str) -> float:
    """What a score returned, as a float: a number, or a tensor or array of one. Raises ValueError that begins with `expected`."""
    found = value.item() if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1 else value
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ValueError(f"{expected} a number, got {shown(value)}")
    return float(found)


def shown(value: Any) -> str:
    """What a function of the user's returned, in short: for messages."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}"
    return describe(value)


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
            score = number_of(make(), "score: expected a function that returns")
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
