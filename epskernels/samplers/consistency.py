"""Samplers of distilled networks: consistency, lcm, tcd."""

import numpy as np
from numpy.typing import NDArray

from .. import solvers
from ..schedule import DiscreteSchedule
from ..table import Table
from ..typing import Steps
from .common import BETWEEN, DISTILLED, Correction, Scaling, Schedule, karras, make_table, number, one_call, sampler


@sampler(BETWEEN)
def consistency(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
) -> Table:
    """Multistep consistency sampling (arXiv 2303.01469, alg. 1): x_s = m0 + sqrt(sigma_s^2 - sigma_min^2)*z, at last m0 itself.

    The network is the consistency function f(x; sigma), its boundary condition inside.

    schedule: a KarrasSchedule; the last of its levels is sigma_min.
    steps: how many noise levels, one model call each.
    scaling: lambda_t of eps = (x - f)/sigma, which the paper does not have, in any form that `scaling.as_scaling` takes.
    prediction: "sample".
    Raises ValueError or TypeError naming the argument.
    """
    grid, columns = one_call(karras(schedule), steps, scaling, prediction, clip, guidance, {})
    noise = solvers.rest(grid.sigma_next, np.minimum(grid.sigma[-1], grid.sigma_next))
    columns |= {"c_m0": np.ones(len(grid)), "c_noise": noise, "excess": noise**2 - grid.sigma_next**2}
    return make_table("consistency", grid, columns, correction=correction)


def _distilled(schedule: Schedule, steps: Steps, original_steps: int) -> tuple[DiscreteSchedule, NDArray[np.int64]]:
    """The schedule, and of the original_steps evenly spaced timesteps on which LCM and TCD were distilled `steps`.

    Raises TypeError for another schedule, ValueError for counts that do not fit.
    """
    if not isinstance(schedule, DiscreteSchedule):
        raise TypeError(f"schedule: expected a DiscreteSchedule, got {type(schedule).__name__}")
    if np.ndim(steps) == 1:
        return schedule, schedule.timesteps(steps)
    T = len(schedule)
    if not isinstance(steps, (int, np.integer)) or not 1 <= steps <= original_steps <= T:
        raise ValueError(f"steps: expected 1 <= steps <= original_steps <= {T}, got {steps}, {original_steps}")
    distilled = (np.arange(1, original_steps + 1) * (T // original_steps) - 1)[::-1]
    return schedule, distilled[np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(np.int64)]


@sampler(DISTILLED)
def lcm(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Table:
    """Latent consistency models' multistep sampling (arXiv 2310.04378, alg. 3): x_s = alpha_s*x_0' + sigma_s*z.

    x_0' = c_skip*x + c_out*m0, the boundary condition at timestep_scaling*t; the last step is x_0' itself.

    timestep_scaling, sigma_data: of the boundary condition.
    Raises ValueError or TypeError naming the argument.
    """
    model, t = _distilled(schedule, steps, original_steps)
    grid, columns = one_call(model, t, scaling, prediction, clip, guidance, {}, allowed=(DiscreteSchedule,))
    c_skip, c_out = solvers.boundary(timestep_scaling * grid.t, sigma_data)
    columns["c_x"], columns["c_m0"] = grid.alpha_next * c_skip, grid.alpha_next * c_out
    columns["c_noise"] = grid.sigma_next
    # The boundary condition moves the mean, and leaves some of x's noise in.
    columns["alpha_out"] = grid.alpha_next * (c_skip * grid.alpha + c_out)
    columns["excess"] = (columns["c_x"] * grid.sigma) ** 2
    return make_table("lcm", grid, columns, correction=correction)


@sampler(DISTILLED)
def tcd(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    gamma: float = 0.3,
    original_steps: int = 50,
) -> Table:
    """Trajectory consistency distillation's sampling (arXiv 2402.19159, alg. 4): to floor((1 - gamma)*s), then noise up to s.

    The last step ends at timestep 0.

    gamma: in [0, 1]; 0 is deterministic. diffusers calls it eta.
    Raises ValueError or TypeError naming the argument.
    """
    gamma = number("gamma", gamma, 0)
    if gamma > 1:
        raise ValueError(f"gamma: expected a value in [0, 1], got {gamma}")
    model, t = _distilled(schedule, steps, original_steps)
    grid, columns = one_call(
        model, t, scaling, prediction, clip, guidance, {"final": "first"}, allowed=(DiscreteSchedule,)
    )
    s = np.append(np.floor((1 - gamma) * t[1:]), 0).astype(np.int64)
    down = grid.alpha_next / model.alpha[s] * model.sigma[s]
    columns["c_x"], columns["c_m0"] = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, down)
    columns["c_noise"] = solvers.rest(grid.sigma_next, down) * (np.append(t[1:], 0) > s)
    return make_table("tcd", grid, columns, correction=correction)
