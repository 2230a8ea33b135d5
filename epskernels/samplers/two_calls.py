"""Two model calls in a step: edm_euler (one), edm_heun, pfgmpp, heun, dpmpp_2s."""

import numpy as np

from .. import solvers
from ..schedule import Grid, KarrasSchedule
from .common import ANY_SCHEDULE, clip_value, denoiser, grid_of, in_space, lambdas_of, make_table, number


def _churned(grid, S_churn, S_min, S_max, S_noise):
    """The grid at the raised noise levels sigma_hat, and the variance that churn adds before each step."""
    S_churn, S_noise = number("S_churn", S_churn, 0), number("S_noise", S_noise, 0)
    if np.isnan(S_min) or np.isnan(S_max):
        raise ValueError(f"S_min, S_max: expected numbers, got {S_min}, {S_max}")
    gamma = min(S_churn / len(grid), np.sqrt(2) - 1)
    sigma_hat = np.where((S_min <= grid.sigma) & (grid.sigma <= S_max), grid.sigma * (1 + gamma), grid.sigma)
    return sigma_hat, sigma_hat**2 - grid.sigma**2


def _edm(name, schedule, steps, scaling, prediction, clip, guidance, churn, heun):
    if not isinstance(schedule, KarrasSchedule):
        raise TypeError(f"schedule: expected a KarrasSchedule, got {type(schedule).__name__}")
    grid = schedule.grid(steps)
    n, S_noise = len(grid), churn[3]
    sigma_hat, added = _churned(grid, *churn)
    at_hat = schedule.grid_at(sigma_hat)
    sigma_next = grid.sigma_next
    added_next = np.append(added[1:], 0.0)  # churn before the next step is noise at the end of this one
    lambda_t = lambdas_of(scaling, at_hat, prediction)

    def part(point, lambda_t):
        d_x, d_f, f_x0, f_eps = denoiser(prediction, point, lambda_t)
        return {"t": point.t, "c_in": point.c_in, "lambda_t": lambda_t, "sigma_in": point.sigma,
                "d_x": d_x, "d_f": d_f, "f_x0": f_x0, "f_eps": f_eps}  # fmt: skip

    noise = {
        "c_noise": S_noise * np.sqrt(added_next),
        "sigma_out": np.sqrt(sigma_next**2 + added_next),
        "excess": (S_noise**2 - 1) * added_next,
    }
    still = {"c_noise": np.zeros(n), "sigma_out": sigma_next, "excess": np.zeros(n)}
    c_x, c_m0 = solvers.first_order(1.0, sigma_hat, 1.0, sigma_next)
    euler = {**part(at_hat, lambda_t), "c_x": c_x, "c_m0": c_m0, "c_m1": np.zeros(n)}
    if not heun or n == 1:
        columns = euler | noise
    else:
        # Heun: the Euler row, then x' + kappa*(m0 - m1) with a second evaluation at sigma_next, but for the last step.
        kappa = solvers.heun_correction(1.0, sigma_hat[:-1], 1.0, sigma_next[:-1])
        corrector = {
            **part(schedule.grid_at(sigma_next[:-1]), lambda_t[:-1]),
            "c_x": np.ones(n - 1), "c_m0": kappa, "c_m1": -kappa, **{key: column[:-1] for key, column in noise.items()},
        }  # fmt: skip
        predictor = euler | still
        columns = {}
        for key in predictor:
            columns[key] = np.empty(2 * n - 1)
            columns[key][0::2], columns[key][1::2] = predictor[key], corrector[key]
    columns |= {"alpha_in": 1.0, "alpha_out": 1.0, "clip": clip_value(clip), "g": number("guidance", guidance)}
    initial_sigma = np.sqrt(grid.sigma[0] ** 2 + S_noise**2 * added[0])
    return make_table(name, grid, columns, initial_sigma)


def edm_euler(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="sample",
    clip=None,
    guidance=1.0,
    S_churn=0.0,
    S_min=0.0,
    S_max=np.inf,
    S_noise=1.0,
):
    """EDM's sampler without the second order correction (arXiv 2206.00364, alg. 2); EDM-ES.

    schedule: a KarrasSchedule. steps: noise levels; one model call each. prediction: "sample" for an EDM denoiser D(x; sigma).
    Churn is folded into the noise of the row before, and the first step's into the initial latent: sigma stays exact.
    The other arguments as in ddpm. Raises ValueError or TypeError naming the argument.
    """
    churn = (S_churn, S_min, S_max, S_noise)
    return _edm("edm_euler", schedule, steps, scaling, prediction, clip, guidance, churn, heun=False)


def edm_heun(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="sample",
    clip=None,
    guidance=1.0,
    S_churn=0.0,
    S_min=0.0,
    S_max=np.inf,
    S_noise=1.0,
):
    """EDM's stochastic sampler with Heun's method (arXiv 2206.00364, alg. 2); EDM-ES.

    2*steps - 1 model calls, a row each; lambda_t of a step scales both of its evaluations. Arguments as in edm_euler.
    """
    churn = (S_churn, S_min, S_max, S_noise)
    return _edm("edm_heun", schedule, steps, scaling, prediction, clip, guidance, churn, heun=True)


def pfgmpp(schedule, steps, *, scaling=1.0, prediction="sample", clip=None, guidance=1.0):
    """PFGM++ (arXiv 2302.04265, alg. 2): EDM's Heun, since r = sigma*sqrt(D), from another prior: epskernels.pfgmpp_prior.

    Arguments as in edm_heun, without churn. D is nowhere in the table: it is the network's, and the prior's.
    """
    return _edm("pfgmpp", schedule, steps, scaling, prediction, clip, guidance, (0.0, 0.0, np.inf, 1.0), heun=True)


def heun(schedule, steps, *, scaling=1.0, prediction="epsilon", clip=None, guidance=1.0, space="sigma", **grid_options):
    """Heun's method on the points of the schedule itself (k-diffusion's heun without churn): 2*steps - 1 model calls.

    The second row of a step is x' + kappa*(m0 - m1), evaluated at the next point; lambda_t of a step scales both. A step that
    ends at sigma = 0 has one row. Arguments as in euler, with alpha > 0 at every step. Raises ValueError.
    """
    allowed = ANY_SCHEDULE
    grid = in_space(grid_of(schedule, steps, allowed, grid_options), space)
    if (grid.alpha == 0).any():
        raise ValueError("schedule: heun needs alpha > 0 at every step")
    c_x, c_m0 = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)
    kappa = solvers.heun_correction(*(ends[:-1] for ends in (grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)))
    return two_calls(
        "heun", grid, points(grid, slice(1, None)), scaling, prediction, clip, guidance,
        first={"c_x": c_x, "c_m0": c_m0},
        second={"c_x": np.ones(len(grid) - 1), "c_m0": kappa, "c_m1": -kappa},
    )  # fmt: skip


def dpmpp_2s(schedule, steps, *, scaling=1.0, prediction="sample", clip=None, guidance=1.0, eta=0.0, S_noise=1.0):
    """DPM-Solver++(2S) (arXiv 2211.01095, alg. 1, r = 1/2), k-diffusion's dpmpp_2s_ancestral where eta > 0: 2*steps - 1 calls.

    The first row leads to the middle of the step in log SNR, the second from there: x is what the first row made of it.
    schedule: a KarrasSchedule, since the network is asked between its points. eta: as in euler_ancestral.
    The other arguments as in ddpm. Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(schedule, KarrasSchedule):
        raise TypeError(f"schedule: expected a KarrasSchedule, got {type(schedule).__name__}")
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    grid = schedule.grid(steps)
    if len(grid) == 1:
        return _edm(
            "dpmpp_2s", schedule, steps, scaling, prediction, clip, guidance, (0.0, 0.0, np.inf, 1.0), heun=False
        )
    down, up = solvers.ancestral(1.0, grid.sigma, 1.0, grid.sigma_next, eta)
    inner = slice(0, -1)  # the last step, to sigma = 0, is Euler's
    sigma, end = grid.sigma[inner], down[inner]
    if (end == 0).any():
        raise ValueError(f"eta: expected a step down to sigma above 0, got {eta}")
    middle = schedule.grid_at(np.sqrt(sigma * end))
    to_middle, from_middle = np.append(middle.sigma, 0.0) / grid.sigma, end / middle.sigma
    back = 1 - to_middle[inner]  # m1's share of the state at the middle
    return two_calls(
        "dpmpp_2s", grid, middle, scaling, prediction, clip, guidance,
        first={"c_x": to_middle, "c_m0": 1 - to_middle},
        second={"c_x": from_middle, "c_m1": -from_middle * back, "c_m0": 1 - end / sigma,
                "c_noise": S_noise * up[inner], "excess": (S_noise**2 - 1) * up[inner] ** 2},
    )  # fmt: skip


def points(grid, which):
    return Grid(
        grid.t[which],
        grid.alpha[which],
        grid.sigma[which],
        grid.c_in[which],
        grid.initial_sigma,
        discrete=grid.discrete,
    )


def two_calls(name, grid, middle, scaling, prediction, clip, guidance, first, second):
    """The table of a method with a second model call in every step but the last, at the points `middle`, (N - 1,).

    first: the first call's columns, of N values, which leads to the middle point but in the last step; second: those of N - 1.
    """
    lambda_t = lambdas_of(scaling, grid, prediction)

    def part(point, lambda_t, alpha_out, sigma_out, own):
        d_x, d_f, f_x0, f_eps = denoiser(prediction, point, lambda_t)
        columns = {
            "t": point.t, "c_in": point.c_in, "lambda_t": lambda_t, "d_x": d_x, "d_f": d_f, "f_x0": f_x0, "f_eps": f_eps,
            "alpha_in": point.alpha, "sigma_in": point.sigma, "alpha_out": alpha_out, "sigma_out": sigma_out,
        }  # fmt: skip
        zero = np.zeros(len(point))
        return columns | {"c_m1": zero, "c_noise": zero, "excess": zero} | own

    ends = {"alpha_out": np.append(middle.alpha, grid.alpha_end), "sigma_out": np.append(middle.sigma, grid.sigma_end)}
    one = part(grid, lambda_t, **ends, own=first)
    two = part(middle, lambda_t[:-1], grid.alpha_next[:-1], grid.sigma_next[:-1], second)
    columns = {}
    for key in one:
        columns[key] = np.empty(2 * len(grid) - 1)
        columns[key][0::2], columns[key][1::2] = one[key], two[key]
    columns |= {"clip": clip_value(clip), "g": number("guidance", guidance)}
    return make_table(name, grid, columns, grid.initial_sigma)
