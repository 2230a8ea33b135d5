"""Samplers of distilled networks: lcm, tcd."""

import numpy as np

from .. import solvers
from ..schedule import DiscreteSchedule
from .common import first_order_columns, make_table, number


def _consistency_timesteps(schedule, steps, original_steps):
    """The timesteps on which LCM and TCD were distilled, thinned out: (original_steps,) evenly spaced, then `steps` of them."""
    if not isinstance(schedule, DiscreteSchedule):
        raise TypeError(f"schedule: expected a DiscreteSchedule, got {type(schedule).__name__}")
    if np.ndim(steps) == 1:
        return schedule.timesteps(steps)
    T = len(schedule)
    if not 1 <= steps <= original_steps <= T:
        raise ValueError(f"steps: expected 1 <= steps <= original_steps <= {T}, got {steps}, {original_steps}")
    distilled = (np.arange(1, original_steps + 1) * (T // original_steps) - 1)[::-1]
    return distilled[np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(np.int64)]


def lcm(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    original_steps=50,
    timestep_scaling=10.0,
    sigma_data=0.5,
):
    """Latent consistency models' multistep sampling (arXiv 2310.04378, alg. 3): x_s = alpha_s*x_0' + sigma_s*z.

    x_0' = c_skip*x + c_out*m0, the boundary condition at timestep_scaling*t; the last step is x_0' itself.
    steps: a count, taken from the original_steps of the distillation, or timesteps. The other arguments as in ddpm.
    """
    t = _consistency_timesteps(schedule, steps, original_steps)
    grid, columns = first_order_columns(schedule, t, scaling, prediction, clip, guidance, (DiscreteSchedule,), {})
    c_skip, c_out = solvers.boundary(timestep_scaling * grid.t, sigma_data)
    columns["c_x"], columns["c_m0"] = grid.alpha_next * c_skip, grid.alpha_next * c_out
    columns["c_noise"] = grid.sigma_next
    # The boundary condition moves the mean, and leaves some of x's noise in.
    columns["alpha_out"] = grid.alpha_next * (c_skip * grid.alpha + c_out)
    columns["excess"] = (columns["c_x"] * grid.sigma) ** 2
    return make_table("lcm", grid, columns, grid.initial_sigma)


def tcd(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    gamma=0.3,
    original_steps=50,
):
    """Trajectory consistency distillation's sampling (arXiv 2402.19159, alg. 4): to floor((1 - gamma)*s), then noise up to s.

    gamma: 0 deterministic (diffusers' eta). The last step ends at timestep 0. The other arguments as in lcm.
    """
    gamma = number("gamma", gamma, 0)
    if gamma > 1:
        raise ValueError(f"gamma: expected a value in [0, 1], got {gamma}")
    t = _consistency_timesteps(schedule, steps, original_steps)
    grid = schedule.grid(t, final="first")
    grid, columns = first_order_columns(grid, len(grid), scaling, prediction, clip, guidance, (DiscreteSchedule,), {})
    s = np.append(np.floor((1 - gamma) * t[1:]), 0).astype(np.int64)
    down = grid.alpha_next / schedule.alpha[s] * schedule.sigma[s]
    columns["c_x"], columns["c_m0"] = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, down)
    columns["c_noise"] = solvers.rest(grid.sigma_next, down) * (np.append(t[1:], 0) > s)
    return make_table("tcd", grid, columns, grid.initial_sigma)
