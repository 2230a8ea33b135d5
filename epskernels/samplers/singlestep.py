"""One to three model calls in a step, of DPM-Solver's family: dpmpp_2s, dpmpp_3s, dpm_solver, seeds_2, seeds_3.

A row reads what the row before made of x, and the m of its step's calls, from which the step's first x follows: no tensor
carries it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import solvers
from ..schedule import Grid, KarrasSchedule
from ..table import Table
from ..typing import Array
from .common import (
    BETWEEN,
    Calls,
    Correction,
    Scaling,
    Schedule,
    karras,
    noise_columns,
    number,
    one_of,
    points,
    sampler,
    several_calls,
)

# Of each order: where the calls after the first lie in log SNR.
_RATIOS: dict[int, tuple[float, ...]] = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}


def _singlestep(
    name: str,
    schedule: KarrasSchedule,
    grid: Grid,
    orders: NDArray[np.integer],
    scaling: Scaling,
    correction: Correction,
    prediction: str,
    clip: float | None,
    guidance: float,
    *,
    ratios: dict[int, tuple[float, ...]] = _RATIOS,
    by_x0: bool = True,
    solver: str = "midpoint",
    down: Array | None = None,
    up: Array | None = None,
    eta: float = 0.0,
    S_noise: float = 1.0,
) -> Table:
    """The table of a step with orders[i] calls in step i, on x = x_0 + sigma*eps.

    down, up: (N,), where each step leads, and the noise that follows it (ancestral); default sigma_next and none. eta: of the
    reverse SDE, which has noise after each call. A step down to 0 is of order one.
    """
    down = grid.sigma_next if down is None else down
    up = np.zeros(len(grid)) if up is None else up
    orders = np.where(down > 0, orders, 1)
    calls: list[list[Calls]] = [[], [], []]  # the first calls of steps, the second ones, the third ones
    for order in np.unique(orders):
        step = np.flatnonzero(orders == order)
        sigma, end = grid.sigma[step], down[step]
        levels = [sigma, *(sigma ** (1 - r) * end**r for r in ratios[int(order)]), end]
        with np.errstate(divide="ignore", invalid="ignore"):
            states = solvers.singlestep(
                1.0, sigma, [(1.0, level) for level in levels[1:]], by_x0=by_x0 or order == 1, solver=solver, eta=eta
            )  # fmt: skip
            log_snr = [solvers.log_snr(1.0, level) for level in levels]
        for k, row in enumerate(solvers.from_before(states)):
            noise = up[step] if k == order - 1 else np.zeros(len(step))
            if eta:
                noise = solvers.sde_noise(levels[k + 1], log_snr[k + 1] - log_snr[k], eta)
            point = points(grid, step) if k == 0 else schedule.grid_at(levels[k])
            calls[k].append((point, step, row | noise_columns(noise, S_noise)))
    return several_calls(name, grid, sum(calls, []), scaling, prediction, clip, guidance, correction=correction)


@sampler(BETWEEN)
def dpmpp_2s(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
    S_noise: float = 1.0,
) -> Table:
    """DPM-Solver++(2S) (arXiv 2211.01095, alg. 1, r = 1/2), k-diffusion's dpmpp_2s_ancestral where eta > 0: 2*steps - 1 calls.

    The first row leads to the middle of the step in log SNR, the second from there. A step down to 0 has one row. lambda_t of a
    step is that of its calls.

    eta: above 0 a step leads down to sigma_down, then noise up.
    Raises ValueError or TypeError naming the argument.
    """
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    grid = karras(schedule).grid(steps)
    down, up = solvers.ancestral(1.0, grid.sigma, 1.0, grid.sigma_next, eta)
    return _singlestep(
        "dpmpp_2s", karras(schedule), grid, np.full(len(grid), 2), scaling, correction, prediction, clip, guidance,
        down=down, up=up, S_noise=S_noise,
    )  # fmt: skip


@sampler(BETWEEN)
def dpmpp_3s(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
) -> Table:
    """DPM-Solver++(3S), single step of order three, x_0 integrated (DPM-Solver's code, from arXiv 2211.01095): 3*steps - 2
    calls.

    A step's calls lie at its start, at 1/3 and at 2/3 of it in log SNR; the last step, to sigma = 0, has one. lambda_t of a
    step is that of its calls.

    Raises ValueError or TypeError naming the argument.
    """
    grid = karras(schedule).grid(steps)
    return _singlestep(
        "dpmpp_3s", karras(schedule), grid, np.full(len(grid), 3), scaling, correction, prediction, clip, guidance
    )  # fmt: skip


@sampler(BETWEEN)
def dpm_solver(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    order: int | Sequence[int] = 2,
    r: float = 0.5,
    eta: float = 0.0,
    S_noise: float = 1.0,
    least: float = 0.0,
) -> Table:
    """DPM-Solver-1, 2 and 3 (arXiv 2206.00927, alg. 1 and 2), single steps, eps integrated: `order` calls a step.

    The last step, to sigma = 0, is of order 1. lambda_t of a step is that of its calls.

    order: 1, 2, 3, or one of them for each step.
    r: where the second call of order two lies in log SNR, in (0, 1).
    eta: above 0 a step leads down to sigma_down, but to no level below `least`, then noise up (k-diffusion's dpm_fast).
    least: the lowest sigma_down.
    Raises ValueError or TypeError naming the argument.
    """
    eta, S_noise, least = number("eta", eta, 0), number("S_noise", S_noise, 0), number("least", least, 0)
    grid = karras(schedule).grid(steps)
    orders = np.asarray(order)
    if orders.shape not in ((), (len(grid),)) or not np.isin(orders, (1, 2, 3)).all():
        raise ValueError(f"order: expected 1, 2 or 3, or {len(grid)} of them, got {order!r}")
    if not 0 < number("r", r) < 1:
        raise ValueError(f"r: expected a value in (0, 1), got {r!r}")
    down, _ = solvers.ancestral(1.0, grid.sigma, 1.0, grid.sigma_next, eta)
    down = np.maximum(down, np.minimum(least, grid.sigma_next))
    return _singlestep(
        "dpm_solver", karras(schedule), grid, np.broadcast_to(orders, len(grid)), scaling, correction, prediction, clip, guidance,
        ratios=_RATIOS | {2: (float(r),)}, by_x0=False, down=down, up=solvers.rest(grid.sigma_next, down), S_noise=S_noise,
    )  # fmt: skip


@sampler(BETWEEN)
def seeds_2(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    eta: float = 1.0,
    S_noise: float = 1.0,
    r: float = 0.5,
    solver: str = "midpoint",
) -> Table:
    """SEEDS-2 (arXiv 2305.14267), x_0 predicted: DPM-Solver++(2S) of the reverse SDE, 2*steps - 1 calls.

    The second call carries the first one's noise on, as one Brownian motion would. lambda_t of a step is that of its calls.

    eta: how much noise there is: 1 is the reverse SDE, 0 is dpmpp_2s.
    r: where the second call lies in log SNR, in (0, 1].
    solver: "midpoint" (ComfyUI's phi_1) or "heun" (phi_2).
    Raises ValueError or TypeError naming the argument.
    """
    one_of("solver", solver, ("midpoint", "heun"))
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    if not 0 < number("r", r) <= 1:
        raise ValueError(f"r: expected a value in (0, 1], got {r!r}")
    grid = karras(schedule).grid(steps)
    return _singlestep(
        "seeds_2", karras(schedule), grid, np.full(len(grid), 2), scaling, correction, prediction, clip, guidance,
        ratios=_RATIOS | {2: (float(r),)}, solver=solver, eta=eta, S_noise=S_noise,
    )  # fmt: skip


@sampler(BETWEEN)
def seeds_3(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    eta: float = 1.0,
    S_noise: float = 1.0,
) -> Table:
    """SEEDS-3 (arXiv 2305.14267), x_0 predicted: DPM-Solver++(3S) of the reverse SDE, 3*steps - 2 calls.

    Each call carries the noise of those before it on, as one Brownian motion would. lambda_t of a step is that of its calls.

    eta: how much noise there is: 1 is the reverse SDE, 0 is dpmpp_3s.
    Raises ValueError or TypeError naming the argument.
    """
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    grid = karras(schedule).grid(steps)
    return _singlestep(
        "seeds_3", karras(schedule), grid, np.full(len(grid), 3), scaling, correction, prediction, clip, guidance,
        eta=eta, S_noise=S_noise,
    )  # fmt: skip
