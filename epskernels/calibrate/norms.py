"""lambda_t from the norms of a model's output: at each step the norm gap, and polynomials through it.

match_norms   lambda_i = ||eps_sampling|| / ||eps_training|| at step i
fit           that, or a measured norm gap, as a polynomial in i, with its R^2
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .. import scaling
from ..exposure import Images, batches, epsilon_norm, figures, noised, save_figure
from ..plots import finish
from ..table import Table
from ..trajectory import Trajectory
from ..typing import Array, FilePath, ModelCall, Outputs

__all__ = ["FITS", "Fit", "Matched", "Sampler", "fit", "match_norms", "noise_alone", "steps_of"]

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

    def __repr__(self) -> str:
        low, high = self.lambda_t.min(), self.lambda_t.max()
        return f"Matched({self.sampler}, {self.images} images; lambda_t {low:.4g} to {high:.4g}, {len(self.lambda_t)} steps)"

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
    if not in_order or len(step) != len(table) or (first and not noise_alone(table)[0]):
        raise ValueError(f"sampler: expected rows for each of its {asked[0]} steps, in order, got {len(table)} rows")
    return table, step


def noise_alone(table: Table) -> NDArray[np.bool_]:
    """Which rows are at noise alone, (R,): no lambda_t but 1 is defined there."""
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
    steps, alone = step_of_row.max() + 1, noise_alone(table)
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
