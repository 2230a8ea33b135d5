"""What all samplers share: the grid, lambda_t, the columns of one model call, and the table."""

import numpy as np

from .. import solvers
from ..scaling import as_scaling, lambdas, noise_alone, scale
from ..schedule import DiscreteSchedule, FlowSchedule, Grid, KarrasSchedule
from ..table import Table

ANY_SCHEDULE = (DiscreteSchedule, KarrasSchedule, FlowSchedule)


def denoiser(prediction, grid, lambda_t):
    """(d_x, d_f) of m0 = d_x*x + d_f*f, with eps -> eps/lambda_t: x0' = (1 - 1/lambda_t)*x/alpha + x0/lambda_t.

    Exact for every prediction, since x0' is linear in (x, f). The network's own variables are c_in times those of the path.
    Not finite where alpha is 0 and lambda_t is not 1. Raises ValueError where epsilon is predicted at alpha = 0.
    """
    alpha, sigma = grid.alpha, grid.sigma
    f_x0, f_eps = solvers.model_output(prediction, grid.c_in * alpha, grid.c_in * sigma)
    nothing = solvers.determinant(f_x0, f_eps, alpha, sigma) == 0
    if nothing.any():
        row = int(np.flatnonzero(nothing)[0])
        raise ValueError(
            f"prediction: {prediction!r} says nothing of x_0 where alpha is {alpha[row]:g}, sigma {sigma[row]:g} (step {row})"
        )
    d_x, d_f = solvers.x0_of(f_x0, f_eps, alpha, sigma)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled_d_x, scaled_d_f = scale(d_x, d_f, alpha, lambda_t)
    scaled = lambda_t != 1
    return np.where(scaled, scaled_d_x, d_x), np.where(scaled, scaled_d_f, d_f), f_x0, f_eps


def lambdas_of(scaling, grid, prediction):
    f_x0, _ = solvers.model_output(prediction, grid.alpha, grid.sigma)
    return lambdas(as_scaling(scaling), noise_alone(grid.alpha, grid.sigma, f_x0), "scaling")


def clip_value(clip):
    if clip is None:
        return np.inf
    if not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip: expected a value above 0, or None, got {clip!r}")
    return float(clip)


def number(name, value, low=-np.inf):
    if not isinstance(value, (int, float, np.number)) or not (np.isfinite(value) and value >= low):
        raise ValueError(f"{name}: expected a finite value{f' >= {low:g}' if low > -np.inf else ''}, got {value!r}")
    return float(value)


def grid_of(schedule, steps, allowed, grid_options):
    if isinstance(schedule, Grid):
        if grid_options or steps != len(schedule):
            raise ValueError(
                f"steps: expected {len(schedule)}, the length of the grid given, and no options; got {steps}"
            )
        return schedule
    if not isinstance(schedule, allowed):
        names = ", ".join(kind.__name__ for kind in allowed)
        raise TypeError(f"schedule: expected a Grid or one of {names}, got {type(schedule).__name__}")
    return schedule.grid(steps, **grid_options)


def make_table(name, grid, columns, initial_sigma):
    calls = len(columns["t"])
    columns["draw"] = np.arange(calls)
    return Table(columns, name=f"{name}[{calls}]", initial_sigma=initial_sigma, discrete=grid.discrete)


def first_order_columns(schedule, steps, scaling, prediction, clip, guidance, allowed, grid_options):
    """The grid and the columns of samplers with one model call per step."""
    grid = grid_of(schedule, steps, allowed, grid_options)
    lambda_t = lambdas_of(scaling, grid, prediction)
    d_x, d_f, f_x0, f_eps = denoiser(prediction, grid, lambda_t)
    columns = {
        "t": grid.t, "c_in": grid.c_in, "lambda_t": lambda_t,
        "alpha_in": grid.alpha, "sigma_in": grid.sigma, "alpha_out": grid.alpha_next, "sigma_out": grid.sigma_next,
        "d_x": d_x, "d_f": d_f, "f_x0": f_x0, "f_eps": f_eps,
        "clip": clip_value(clip), "g": number("guidance", guidance),
    }  # fmt: skip
    return grid, columns


def in_space(grid, space):
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
