"""What all samplers share: the grid, lambda_t, the columns of the model calls, and the table."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .. import solvers
from ..corrections import CorrectionLike, as_correction, corrected
from ..docstrings import described
from ..scaling import ScalingLike as Scaling
from ..scaling import as_scaling, lambdas, log_snr, noise_alone, scale
from ..schedule import DiscreteSchedule, FlowSchedule, Grid, KarrasSchedule
from ..table import Table
from ..typing import Array, Steps

Schedule = DiscreteSchedule | KarrasSchedule | FlowSchedule | Grid
Correction = CorrectionLike | None
Columns = dict[str, Any]  # a table's columns and provenance by name: arrays, or one number for all rows
# Where the network is asked, in which steps, and the columns that the rows have of their own.
Calls = tuple[Grid, NDArray[np.int64], Columns]
ANY_SCHEDULE = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
GRID_OPTIONS = ("spacing", "steps_offset", "final")  # of DiscreteSchedule.grid
F = TypeVar("F", bound=Callable[..., Table])

# ---- what the samplers' docstrings say of the arguments that they share (docstrings.described) ----

EVERY = {
    "steps": 'how many; for a DiscreteSchedule also ADM\'s section counts as a string ("100", "10,10,20" from the cleanest '
    'section up, "ddim25"), or the timesteps themselves, decreasing. The number 20 and the string "20" are two chains: the first '
    "is spaced by `spacing` (950, 900, ..., 0 of 1,000), the second as ADM does it (999, 946, ..., 0).",
    "scaling": "lambda_t, by which the predicted noise is divided: a number; numbers for each step, the noisiest first; an "
    "EpsilonScaling; or another form that `scaling.as_scaling` takes. 1 changes nothing; where x is noise alone it is 1.",
    "correction": "of x' after each step that leaves noise in it: a Correction, or another form that "
    "`corrections.as_correction` takes; None for none.",
    "prediction": 'what the network predicts: "epsilon", "sample" (x_0), "v_prediction" or "flow" (eps - x_0).',
    "clip": "the estimate of x_0 is held to [-clip, clip]; None leaves it as it is.",
    "guidance": "the scale g of classifier-free guidance, u + g*(f - u); 1 takes the conditional output f alone.",
    "S_noise": "a factor of the noise that is added.",
    "grid_options": 'of `DiscreteSchedule.grid`: spacing ("leading", "trailing" or "linspace"), steps_offset, final ("clean" or '
    '"first"); their defaults are "leading", 0 and "clean". None for another schedule or a Grid.',
}
ON_A_PATH = EVERY | {
    "schedule": "a DiscreteSchedule, a KarrasSchedule, a FlowSchedule, or a Grid.",
    "space": 'the state: "vp", the network\'s own, or "sigma", x_0 + (sigma/alpha)*eps, k-diffusion\'s.',
}
BETWEEN = EVERY | {  # of methods that ask the network between the schedule's points, or at levels of their own
    "schedule": "a KarrasSchedule: the network is asked at any noise level.",
    "steps": "how many noise levels; the last step leads from the lowest to 0.",
    "prediction": '"sample" for an EDM denoiser D(x; sigma); "epsilon", "v_prediction" or "flow" for other networks.',
}
CHURN = {
    "S_churn": "how much noise is added before steps, over all of them; 0 for none.",
    "S_min": "steps from a level below it have no churn.",
    "S_max": "steps from a level above it have no churn.",
    "S_noise": "a factor of the noise that churn adds.",
}
IN_EPS = {
    "scaling": EVERY["scaling"] + " The history keeps eps/lambda_t.",
    "order": "1 to 4; the first steps are of orders 1, 2, 3, a step to sigma = 0 of order 1.",
}
DISTILLED = EVERY | {
    "schedule": "a DiscreteSchedule.",
    "steps": "how many, taken from the original_steps of the distillation; or the timesteps themselves, decreasing.",
    "original_steps": "how many evenly spaced timesteps the network was distilled on.",
}


# ---- arguments ----


def sampler(*texts: Mapping[str, str], options_of: Callable[..., Table] | None = None) -> Callable[[F], F]:
    """A decorator of samplers: `described` by the texts, and an argument that it does not take is a TypeError that names it.

    options_of: the sampler that its further options go to; by default they are those of a grid.
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function).parameters.values()
        takes = [each.name for each in own if each.kind is each.KEYWORD_ONLY]
        if options_of is not None:
            further = inspect.signature(options_of).parameters.values()
            takes += [each.name for each in further if each.kind is each.KEYWORD_ONLY and each.name not in takes]
        if any(each.kind is each.VAR_KEYWORD for each in own):
            takes += GRID_OPTIONS
        known = {each.name for each in own if each.kind is each.POSITIONAL_OR_KEYWORD}.union(takes)

        @functools.wraps(described(*texts)(function))
        def checked(*arguments: Any, **options: Any) -> Table:
            for name in options:
                if name not in known:
                    raise TypeError(f"{function.__name__}: expected arguments among {', '.join(takes)}, got {name!r}")
            return function(*arguments, **options)

        return cast(F, checked)

    return decorate


def clip_value(clip: float | None) -> float:
    """The column clip: infinite for None. Raises ValueError for what is not above 0."""
    if clip is None:
        return np.inf
    if not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip: expected a value above 0, or None, got {clip!r}")
    return float(clip)


def number(name: str, value: Any, low: float = -np.inf) -> float:
    """value as a float. Raises ValueError, naming the argument, for what is no finite number of at least `low`."""
    if not isinstance(value, (int, float, np.number)) or not (np.isfinite(value) and value >= low):
        raise ValueError(f"{name}: expected a finite value{f' >= {low:g}' if low > -np.inf else ''}, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError, naming the argument, for a value that is none of the choices."""
    if value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name}: expected {', '.join(most)} or {last}, got {value!r}")


# ---- the grid ----


def grid_of(schedule: Schedule, steps: Any, allowed: tuple[type, ...], grid_options: Mapping[str, Any]) -> Grid:
    """The grid of so many steps; a Grid is taken as it is.

    Raises TypeError for a schedule that is none of `allowed`, ValueError for a Grid of another length, and for options of a grid
    of timesteps where there are none.
    """
    if not isinstance(schedule, (Grid, *allowed)):
        names = ", ".join(kind.__name__ for kind in allowed)
        raise TypeError(f"schedule: expected a Grid or one of {names}, got {type(schedule).__name__}")
    if grid_options and not isinstance(schedule, DiscreteSchedule):
        said = ", ".join(f"{name}={value!r}" for name, value in grid_options.items())
        raise ValueError(f"{', '.join(grid_options)}: expected none with a {type(schedule).__name__}, got {said}")
    if isinstance(schedule, Grid):
        if steps != len(schedule):
            raise ValueError(f"steps: expected {len(schedule)}, the length of the grid given, got {steps!r}")
        return schedule
    return schedule.grid(steps, **grid_options)


def karras(schedule: Schedule) -> KarrasSchedule:
    """The schedule of a method that asks the network between its points, or at raised levels. Raises TypeError for another
    kind."""
    if not isinstance(schedule, KarrasSchedule):
        raise TypeError(f"schedule: expected a KarrasSchedule, got {type(schedule).__name__}")
    return schedule


def in_space(grid: Grid, space: str) -> Grid:
    """The grid in another state's variables: "vp" as it is, "sigma" x/alpha = x_0 + (sigma/alpha)*eps (k-diffusion's; the
    network is still fed what it knows). Raises ValueError for another one, or alpha = 0 in "sigma"."""
    if space == "vp":
        return grid
    if space != "sigma":
        raise ValueError(f"space: expected 'vp' or 'sigma', got {space!r}")
    if (grid.alpha == 0).any() or grid.alpha_end == 0:
        raise ValueError("space: 'sigma' needs alpha > 0 at every step; take 'vp', or another sampler")
    return Grid(
        grid.t, np.ones(len(grid)), grid.sigma / grid.alpha, grid.c_in * grid.alpha,
        float(grid.initial_sigma / grid.alpha[0]), 1.0, float(grid.sigma_end / grid.alpha_end), grid.discrete,
    )  # fmt: skip


def require_alpha(grid: Grid, name: str) -> None:
    """Raises ValueError where the sampler `name` would divide by an alpha of 0."""
    if (grid.alpha == 0).any():
        raise ValueError(f"schedule: {name} needs alpha > 0 at every step")


def points(grid: Grid, which: slice | NDArray[np.int64]) -> Grid:
    """Some points of a grid, and its end."""
    chosen = {name: getattr(grid, name)[which] for name in ("t", "alpha", "sigma", "c_in")}
    return dataclasses.replace(grid, **chosen)


# ---- lambda, and what the network's output says ----


def denoiser(prediction: str, grid: Grid, lambda_t: Array) -> tuple[Array, Array, Array, Array]:
    """(d_x, d_f, f_x0, f_eps), each (N,): m0 = d_x*x + d_f*f, with eps -> eps/lambda_t, and f = f_x0*x_0 + f_eps*eps.

    x0' = (1 - 1/lambda_t)*x/alpha + x0/lambda_t, exact for every prediction, since x0' is linear in (x, f). The network's own
    variables are c_in times those of the path. Not finite where alpha is 0 and lambda_t is not 1.
    Raises ValueError where epsilon is predicted at alpha = 0.
    """
    alpha, sigma = grid.alpha, grid.sigma
    f_x0, f_eps = _output(prediction, grid, "x_0")
    d_x, d_f = solvers.x0_of(f_x0, f_eps, alpha, sigma)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled_d_x, scaled_d_f = scale(d_x, d_f, alpha, lambda_t)
    scaled = lambda_t != 1
    return np.where(scaled, scaled_d_x, d_x), np.where(scaled, scaled_d_f, d_f), f_x0, f_eps


def noise_estimate(prediction: str, grid: Grid, lambda_t: Array) -> tuple[Array, Array, Array, Array]:
    """(d_x, d_f, f_x0, f_eps), each (N,), of samplers that keep eps: m0 = d_x*x + d_f*f = eps/lambda_t.

    Raises ValueError where x_0 is predicted at sigma = 0.
    """
    f_x0, f_eps = _output(prediction, grid, "eps")
    e_x, e_f = solvers.eps_of(f_x0, f_eps, grid.alpha, grid.sigma)
    return e_x / lambda_t, e_f / lambda_t, f_x0, f_eps


def _output(prediction: str, grid: Grid, wanted: str) -> tuple[Array, Array]:
    alpha, sigma = grid.alpha, grid.sigma
    f_x0, f_eps = solvers.model_output(prediction, grid.c_in * alpha, grid.c_in * sigma)
    nothing = solvers.determinant(f_x0, f_eps, alpha, sigma) == 0
    if nothing.any():
        row = int(np.flatnonzero(nothing)[0])
        raise ValueError(
            f"prediction: {prediction!r} says nothing of {wanted} where alpha is {alpha[row]:g}, sigma {sigma[row]:g} "
            f"(step {row})"
        )
    return f_x0, f_eps


def lambdas_of(scaling: Scaling, grid: Grid, prediction: str) -> Array:
    """lambda_t of each step, (N,). Raises ValueError and TypeError as `scaling.lambdas` and `scaling.as_scaling`."""
    f_x0, _ = solvers.model_output(prediction, grid.alpha, grid.sigma)
    alone, levels = noise_alone(grid.alpha, grid.sigma, f_x0), log_snr(grid.alpha, grid.sigma)
    return lambdas(as_scaling(scaling), alone, "scaling", levels=levels)


def lambdas_of_calls(scaling: Scaling, grid: Grid, prediction: str, point: Grid, step: NDArray[np.int64]) -> Array:
    """lambda_t of model calls at some points, (N,), in these steps of the grid: the step's; by noise level, the point's."""
    made = as_scaling(scaling)
    return lambdas_of(made, point, prediction) if made.by_level else lambdas_of(made, grid, prediction)[step]


# ---- the columns of model calls, and the table ----


def call(prediction: str, point: Grid, lambda_t: Array, keeps: str = "x_0") -> Columns:
    """What the row of a model call has in every sampler, at the points where the network is asked.

    keeps: what m0 is, and with it the history: an estimate of "x_0" or of "eps".
    """
    estimate = denoiser if keeps == "x_0" else noise_estimate
    d_x, d_f, f_x0, f_eps = estimate(prediction, point, lambda_t)
    return {
        "t": point.t, "c_in": point.c_in, "lambda_t": lambda_t, "alpha_in": point.alpha, "sigma_in": point.sigma,
        "d_x": d_x, "d_f": d_f, "f_x0": f_x0, "f_eps": f_eps,
        "m_x0": np.full(len(point), float(keeps == "x_0")), "m_eps": np.full(len(point), float(keeps == "eps")),
    }  # fmt: skip


def one_call(
    schedule: Schedule,
    steps: Steps,
    scaling: Scaling,
    prediction: str,
    clip: float | None,
    guidance: float,
    grid_options: Mapping[str, Any],
    *,
    allowed: tuple[type, ...] = ANY_SCHEDULE,
    space: str = "vp",
    keeps: str = "x_0",
) -> tuple[Grid, Columns]:
    """The grid, and the columns of a sampler with one model call a step except for its weights.

    The arguments are those of the samplers; allowed: the schedules that this one takes. Raises ValueError and TypeError naming
    the argument.
    """
    grid = in_space(grid_of(schedule, steps, allowed, grid_options), space)
    columns = call(prediction, grid, lambdas_of(scaling, grid, prediction), keeps)
    columns |= {"alpha_out": grid.alpha_next, "sigma_out": grid.sigma_next}
    columns |= {"clip": clip_value(clip), "g": number("guidance", guidance)}
    return grid, columns


def several_calls(
    name: str,
    grid: Grid,
    calls: Sequence[Calls],
    scaling: Scaling,
    prediction: str,
    clip: float | None,
    guidance: float,
    initial_sigma: float | None = None,
    correction: Correction = None,
) -> Table:
    """The table of a method whose steps have several model calls.

    grid: where the network is first asked in each step, and the end. calls: first calls of steps, then second ones, then third
    ones. A row leads to the point of the row after it; lambda_t of a step is that of all its calls, unless it is by noise level.
    initial_sigma: default the grid's.
    """
    parts = [
        call(prediction, point, lambdas_of_calls(scaling, grid, prediction, point, step)) | own
        for point, step, own in calls
    ]
    step_of = np.concatenate([step for _, step, _ in calls])
    order = np.argsort(step_of, kind="stable")
    columns: Columns = {"ends_step": np.append(np.diff(step_of[order]) > 0, True)}
    for key in dict.fromkeys(key for part in parts for key in part):
        columns[key] = np.concatenate(
            [np.broadcast_to(part.get(key, 0.0), len(point)) for part, (point, _, _) in zip(parts, calls, strict=True)]
        )[order]
    columns["alpha_out"] = np.append(columns["alpha_in"][1:], grid.alpha_end)
    columns["sigma_out"] = np.append(columns["sigma_in"][1:], grid.sigma_end)
    columns |= {"clip": clip_value(clip), "g": number("guidance", guidance)}
    return make_table(name, grid, columns, initial_sigma, correction)


def noise_columns(noise: Array, S_noise: float = 1.0) -> Columns:
    """The columns of noise of that standard deviation, (N,), times S_noise, which sigma_out does not count."""
    return {"c_noise": S_noise * noise, "excess": (S_noise**2 - 1) * noise**2}


def make_table(
    name: str, grid: Grid, columns: Columns, initial_sigma: float | None = None, correction: Correction = None
) -> Table:
    """The table, each row with a noise of its own. initial_sigma: default the grid's. Raises as corrections.corrected."""
    calls = len(columns["t"])
    made = as_correction(correction)
    columns = columns if made is None else corrected(columns, made, name)
    columns["draw"] = np.arange(calls)
    sigma = grid.initial_sigma if initial_sigma is None else initial_sigma
    return Table(columns, name=f"{name}[{calls}]", initial_sigma=float(sigma), discrete=grid.discrete)
