"""Two model calls in a step: edm_euler (one), edm_heun, pfgmpp, heun, dpm_2, dpm_2_ancestral, dpmpp_sde.

The second row reads what the first one made of x, and m1, from which the step's first x follows. dpmpp_sde's cannot: noise of
its own lies between, so that the first x travels as y.
"""

import dataclasses
from typing import Any

import numpy as np

from .. import solvers
from ..schedule import Grid
from ..table import Table
from ..typing import Array, Steps
from .common import (
    ANY_SCHEDULE,
    BETWEEN,
    CHURN,
    ON_A_PATH,
    Calls,
    Columns,
    Correction,
    Scaling,
    Schedule,
    grid_of,
    in_space,
    karras,
    noise_columns,
    number,
    points,
    require_alpha,
    sampler,
    several_calls,
)  # fmt: skip

Churn = tuple[float, float, float, float]  # S_churn, S_min, S_max, S_noise
_NO_CHURN = (0.0, 0.0, np.inf, 1.0)


def _churned(grid: Grid, S_churn: float, S_min: float, S_max: float, S_noise: float) -> tuple[Array, Array]:
    """The grid's levels raised to sigma_hat, and the variance that churn adds before each step."""
    S_churn, S_noise = number("S_churn", S_churn, 0), number("S_noise", S_noise, 0)
    if np.isnan(S_min) or np.isnan(S_max):
        raise ValueError(f"S_min, S_max: expected numbers, got {S_min}, {S_max}")
    sigma_hat = solvers.churned(grid.sigma, len(grid), S_churn, S_min, S_max)
    return sigma_hat, sigma_hat**2 - grid.sigma**2


def _edm(
    name: str,
    schedule: Schedule,
    steps: int,
    scaling: Scaling,
    correction: Correction,
    prediction: str,
    clip: float | None,
    guidance: float,
    churn: Churn,
    second: str | None,
) -> Table:
    """EDM's algorithm 2. second: where each step that does not lead to 0 has its second call, at its "end", in its "middle" in
    log sigma, or None."""
    grid = karras(schedule).grid(steps)
    sigma_hat, added = _churned(grid, *churn)
    if correction is not None and added.any():
        raise ValueError(
            "S_churn: expected 0 beside a correction: the state that a step leaves has the next one's churn in it"
        )
    at_hat, S_noise = dataclasses.replace(karras(schedule).grid_at(sigma_hat), sigma_end=grid.sigma_end), churn[3]
    # Churn before the next step is noise at the end of this one; that of the first step is in the initial latent.
    noise = noise_columns(np.sqrt(np.append(added[1:], 0.0)), S_noise)
    initial_sigma = np.sqrt(grid.sigma[0] ** 2 + S_noise**2 * added[0])
    every, twice = np.arange(len(grid)), np.flatnonzero((grid.sigma_next > 0) & (second is not None))
    of_once = np.isin(every, twice, invert=True)
    sigma, end = sigma_hat[twice], grid.sigma_next[twice]
    c_x, c_m0 = solvers.first_order(1.0, sigma_hat, 1.0, grid.sigma_next)
    if second == "middle":
        middle = np.sqrt(sigma * end)
        rows = solvers.from_before(solvers.probed(sigma, middle, end))
        c_x[twice], c_m0[twice] = rows[0]["c_x"], rows[0]["c_m0"]
        corrector = rows[1]
    else:  # Heun: x' + kappa*(m0 - m1)
        kappa = solvers.heun_correction(1.0, sigma, 1.0, end)
        middle, corrector = end, {"c_x": np.ones(len(twice)), "c_m0": kappa, "c_m1": -kappa}
    first = {"c_x": c_x, "c_m0": c_m0} | {key: column * of_once for key, column in noise.items()}
    calls: list[Calls] = [(at_hat, every, first)]
    if len(twice):
        corrector |= {key: column[twice] for key, column in noise.items()}
        calls.append((karras(schedule).grid_at(middle), twice, corrector))
    return several_calls(name, at_hat, calls, scaling, prediction, clip, guidance, initial_sigma, correction=correction)


@sampler(BETWEEN, CHURN)
def edm_euler(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = np.inf,
    S_noise: float = 1.0,
) -> Table:
    """EDM's sampler without the second order correction (arXiv 2206.00364, alg. 2); EDM-ES.

    Churn is folded into the noise of the row before, and the first step's into the initial latent: sigma stays exact.

    steps: how many noise levels; one model call each.
    Raises ValueError or TypeError naming the argument.
    """
    churn = (S_churn, S_min, S_max, S_noise)
    return _edm("edm_euler", schedule, steps, scaling, correction, prediction, clip, guidance, churn, None)


@sampler(BETWEEN, CHURN)
def edm_heun(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = np.inf,
    S_noise: float = 1.0,
) -> Table:
    """EDM's stochastic sampler with Heun's method (arXiv 2206.00364, alg. 2); EDM-ES.

    2*steps - 1 model calls, a row each. lambda_t of a step scales both of its calls.

    Raises ValueError or TypeError naming the argument.
    """
    churn = (S_churn, S_min, S_max, S_noise)
    return _edm("edm_heun", schedule, steps, scaling, correction, prediction, clip, guidance, churn, "end")


@sampler(BETWEEN)
def pfgmpp(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
) -> Table:
    """PFGM++ (arXiv 2302.04265, alg. 2): EDM's Heun, since r = sigma*sqrt(D), from another prior: epskernels.pfgmpp_prior.

    D is nowhere in the table: it is the network's, and the prior's. 2*steps - 1 model calls, a row each.

    Raises ValueError or TypeError naming the argument.
    """
    return _edm("pfgmpp", schedule, steps, scaling, correction, prediction, clip, guidance, _NO_CHURN, "end")


@sampler(BETWEEN, CHURN)
def dpm_2(
    schedule: Schedule,
    steps: int,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "sample",
    clip: float | None = None,
    guidance: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = np.inf,
    S_noise: float = 1.0,
) -> Table:
    """k-diffusion's dpm_2: EDM's algorithm 2 (arXiv 2206.00364), the slope taken in the middle of the step in log sigma.

    2*steps - 1 model calls, a row each. lambda_t of a step scales both of its calls.

    Raises ValueError or TypeError naming the argument.
    """
    churn = (S_churn, S_min, S_max, S_noise)
    return _edm("dpm_2", schedule, steps, scaling, correction, prediction, clip, guidance, churn, "middle")


@sampler(BETWEEN)
def dpm_2_ancestral(
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
    """k-diffusion's dpm_2_ancestral: dpm_2 down to sigma_down, then noise up.

    A step down to 0 has one call, and no noise follows it, as in k-diffusion.

    eta: how much of the noise is fresh; 0 is dpm_2.
    Raises ValueError or TypeError naming the argument.
    """
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    grid = karras(schedule).grid(steps)
    down, up = solvers.ancestral(1.0, grid.sigma, 1.0, grid.sigma_next, eta)
    twice = np.flatnonzero(down > 0)
    sigma, end = grid.sigma[twice], down[twice]
    middle = np.sqrt(sigma * end)
    rows = solvers.from_before(solvers.probed(sigma, middle, end))
    c_x, c_m0 = solvers.first_order(1.0, grid.sigma, 1.0, down)
    c_x[twice], c_m0[twice] = rows[0]["c_x"], rows[0]["c_m0"]
    lacks = np.where(down > 0, 0.0, -(grid.sigma_next**2))  # of the variance, without noise
    first: Columns = {"c_x": c_x, "c_m0": c_m0, "excess": lacks}
    calls: list[Calls] = [(grid, np.arange(len(grid)), first)]
    if len(twice):
        calls.append((karras(schedule).grid_at(middle), twice, rows[1] | noise_columns(up[twice], S_noise)))
    return several_calls("dpm_2_ancestral", grid, calls, scaling, prediction, clip, guidance, correction=correction)


@sampler(BETWEEN)
def dpmpp_sde(
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
) -> Table:
    """k-diffusion's dpmpp_sde: DPM-Solver++(2S) (arXiv 2211.01095, alg. 1) as an SDE, with noise after both calls of a step.

    The last step, to sigma = 0, has one call.

    eta: how much noise there is: 1 is the reverse SDE, 0 is dpmpp_2s (at r = 1/2).
    r: where the second call lies in log SNR, in (0, 1].
    Raises ValueError or TypeError naming the argument.
    """
    eta, S_noise, r = number("eta", eta, 0), number("S_noise", S_noise, 0), number("r", r, 0)
    if not 0 < r <= 1:
        raise ValueError(f"r: expected a value in (0, 1], got {r:g}")
    grid = karras(schedule).grid(steps)
    twice = np.flatnonzero(grid.sigma_next > 0)
    sigma, end = grid.sigma[twice], grid.sigma_next[twice]
    middle = sigma ** (1 - r) * end**r
    one, two = solvers.two_noises(sigma, middle, end, eta, r)
    once = np.flatnonzero(grid.sigma_next == 0)
    to_0 = dict(
        zip(("c_x", "c_m0"), solvers.first_order(1.0, grid.sigma[once], 1.0, grid.sigma_next[once]), strict=True)
    )
    one |= noise_columns(one["c_noise"], S_noise) | {"y_out_x0": np.ones(len(twice)), "y_out_eps": sigma}
    two |= noise_columns(two["c_noise"], S_noise) | {"y_x0": np.ones(len(twice)), "y_eps": sigma}
    calls: list[Calls] = [(points(grid, twice), twice, one), (points(grid, once), once, to_0)]
    if len(twice):
        calls.append((karras(schedule).grid_at(middle), twice, two))
    return several_calls("dpmpp_sde", grid, calls, scaling, prediction, clip, guidance, correction=correction)


@sampler(ON_A_PATH)
def heun(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    space: str = "sigma",
    **grid_options: Any,
) -> Table:
    """Heun's method on the points of the schedule itself (k-diffusion's heun without churn): 2*steps - 1 model calls.

    The second row of a step is x' + kappa*(m0 - m1), evaluated at the next point; lambda_t of a step scales both. The last step
    has one row. alpha must be above 0 at every step.

    Raises ValueError naming the argument.
    """
    grid = in_space(grid_of(schedule, steps, ANY_SCHEDULE, grid_options), space)
    require_alpha(grid, "heun")
    c_x, c_m0 = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)
    kappa = solvers.heun_correction(*(ends[:-1] for ends in (grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)))
    every = np.arange(len(grid))
    calls: list[Calls] = [
        (grid, every, {"c_x": c_x, "c_m0": c_m0}),
        (points(grid, slice(1, None)), every[:-1], {"c_x": np.ones(len(grid) - 1), "c_m0": kappa, "c_m1": -kappa}),
    ]
    return several_calls("heun", grid, calls, scaling, prediction, clip, guidance, correction=correction)
