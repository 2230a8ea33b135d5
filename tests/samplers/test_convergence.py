"""Convergence orders of the deterministic samplers: the tables' columns in float64 against the exact trajectory.

A table's constructor checks the mean and variance of each row; a wrong split between c_m0 and c_m1 passes, and loses
the order. With y = x/alpha and r = sigma/alpha every sampler here solves dy/dr = eps(y, r)/lambda.
"""

import functools

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from epskernels import samplers, schedule

# Data: a mixture of Gaussians on the line, so that the denoiser is exact and nonlinear.
WEIGHTS, MEANS, STDS = np.array([0.5, 0.3, 0.2]), np.array([-0.7, 0.4, 1.1]), np.array([0.35, 0.25, 0.45])
STARTS = np.linspace(-1.5, 1.5, 9)  # in units of the first noise level


def denoise(y, r):
    """E[x_0 | y], y = x_0 + r*eps, for the mixture."""
    y = y[:, None]
    variances = STDS**2 + r**2
    log_density = np.log(WEIGHTS) - 0.5 * np.log(variances) - 0.5 * (y - MEANS) ** 2 / variances
    posterior = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    return (posterior * (MEANS + STDS**2 / variances * (y - MEANS))).sum(axis=1)


@functools.cache
def exact(start, end, lam):
    """y at r = end of the trajectories that start at r = start."""

    def slope(log_r, y):  # dy/dlog(r)
        return (y - denoise(y, np.exp(log_r))) / lam

    ends = np.log(start), np.log(end)
    return solve_ivp(slope, ends, STARTS * start, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


def network(prediction, x, alpha, sigma):
    x0 = denoise(x / alpha, sigma / alpha)
    eps = (x - alpha * x0) / sigma
    return {"epsilon": eps, "sample": x0, "flow": eps - x0}[prediction]


def run(table, prediction, rows, lam=1.0, exact_rows=0):
    """The state after `rows` rows of the table, each applied by its float64 columns; the first exact_rows of them are solved
    exactly instead: what a multistep solver of order three needs to show its order, since it starts with order one."""
    alpha, sigma = table["alpha_in"], table["sigma_in"]
    x, m1, m2, y = STARTS * sigma[0], *np.zeros((3, len(STARTS)))
    for i in range(rows):
        if 0 < i <= exact_rows:
            x = exact(sigma[0] / alpha[0], sigma[i] / alpha[i], lam) * alpha[i]
        f = network(prediction, x, alpha[i], sigma[i])
        m0 = table["d_x"][i] * x + table["d_f"][i] * f
        terms = {"x": x, "m0": m0, "m1": m1, "m2": m2, "y": y}
        x = table["c_f"][i] * f + sum(table[f"c_{name}"][i] * value for name, value in terms.items())
        y = sum(table[f"k_{name}"][i] * value for name, value in terms.items())
        m1, m2 = m0, m1
    return x


# ---- grids of n steps between fixed noise levels, on one curve whatever n, and a last step to sigma = 0 ----


def karras(n):
    return schedule.KarrasSchedule(0.02, 80.0), n + 1


def vp(n):
    """The linear betas cut into 8320 timesteps, so that a step can be halved often: from the last one to 127."""
    scale = 1000 / 8320
    return schedule.linear(8320, 1e-4 * scale, 0.02 * scale), 8319 - np.arange(n + 1) * (8192 // n)


def rectified_flow(n):
    """From sigma = 0.9: towards alpha = 0, lambda != 1 makes the equation stiff."""
    return flow_grid(np.linspace(0.9, 0.02, n + 1))


def uneven_flow(n):
    """Steps that take turns, one twice as long as the other: their ratio stays when they halve."""
    lengths = np.where(np.arange(n) % 2, 2.0, 1.0)
    return flow_grid(0.9 - 0.88 * np.append(0, np.cumsum(lengths)) / lengths.sum())


def even(n):
    """Equal steps of sigma, the last to an end above 0."""
    sigma = np.linspace(4.0, 0.5, n + 2)
    return schedule.Grid(sigma[:-1], np.ones(n + 1), sigma[:-1], np.ones(n + 1), 4.0, 1.0, sigma[-1], False), n + 1


def open_flow(n):
    """As rectified_flow, but that the last step ends above 0: methods do not fall in order towards it."""
    sigma = np.linspace(0.9, 0.02, n + 1)
    return schedule.Grid(1000 * sigma, 1 - sigma, sigma, np.ones(n + 1), 0.9, 0.99, 0.01, False), n + 1


def flow_grid(sigma):
    return schedule.Grid(1000 * sigma, 1 - sigma, sigma, np.ones(len(sigma)), sigma[0], discrete=False), len(sigma)


def errors(sampler, grid, prediction, lam, counts, exact_rows=0):
    """The largest error over the starts, for each count, before the last row: its step to sigma = 0 never halves."""
    found = []
    for n in counts:
        points, steps = grid(n)
        table = sampler(points, steps, scaling=lam, prediction=prediction)
        rows = len(table) - 1
        alpha, sigma = table["alpha_in"], table["sigma_in"]
        reference = exact(sigma[0] / alpha[0], sigma[rows] / alpha[rows], lam) * alpha[rows]
        found.append(np.abs(run(table, prediction, rows, lam, exact_rows) - reference).max())
    return np.array(found)


def order(counts, found):
    return -np.polyfit(np.log(counts), np.log(found), 1)[0]


EXACT_3M = functools.partial(samplers.dpmpp_3m, lower_order_final=False, third="exact")
ORDERS = {
    "edm_euler": (samplers.edm_euler, karras, "sample", 1),
    "edm_heun": (samplers.edm_heun, karras, "sample", 2),
    "ddim-vp": (samplers.ddim, vp, "epsilon", 1),
    "ddim-flow": (samplers.ddim, rectified_flow, "flow", 1),
    "dpmpp_2m-vp": (samplers.dpmpp_2m, vp, "epsilon", 2),
    "dpmpp_2m-karras": (samplers.dpmpp_2m, karras, "sample", 2),
    "dpmpp_2m-flow": (samplers.dpmpp_2m, rectified_flow, "flow", 2),
    "dpmpp_2m-flow-uneven": (samplers.dpmpp_2m, uneven_flow, "flow", 2),
    "dpmpp_2m-heun": (functools.partial(samplers.dpmpp_2m, solver="heun"), karras, "sample", 2),
    "euler": (samplers.euler, karras, "sample", 1),
    "euler-vp-space": (functools.partial(samplers.euler, space="vp"), vp, "epsilon", 1),
    "heun": (samplers.heun, karras, "sample", 2),
    "heun-vp": (samplers.heun, vp, "epsilon", 2),
    "heun-vp-space": (functools.partial(samplers.heun, space="vp"), vp, "epsilon", 2),
    "heun-flow": (functools.partial(samplers.heun, space="vp"), rectified_flow, "flow", 2),
    "dpmpp_2s": (samplers.dpmpp_2s, karras, "sample", 2),
    "dpmpp_3m": (functools.partial(samplers.dpmpp_3m, lower_order_final=False), karras, "sample", 2),
    "dpmpp_3m-exact": (EXACT_3M, karras, "sample", 3),
    "dpmpp_3m-exact-flow": (EXACT_3M, rectified_flow, "flow", 3),
    "dpmpp_3m-exact-flow-uneven": (EXACT_3M, uneven_flow, "flow", 3),
    "unipc-1": (functools.partial(samplers.unipc, order=1), karras, "sample", 2),
    "unipc-2": (functools.partial(samplers.unipc, order=2), karras, "sample", 3),
    "unipc-2-bh1-flow": (functools.partial(samplers.unipc, order=2, solver="bh1"), rectified_flow, "flow", 3),
    "unipc-2-flow-uneven": (functools.partial(samplers.unipc, order=2), uneven_flow, "flow", 3),
    "unip-1": (functools.partial(samplers.unipc, order=1, corrector=False), karras, "sample", 1),
    "unip-2": (functools.partial(samplers.unipc, order=2, corrector=False), karras, "sample", 2),
    "flow_euler": (samplers.flow_euler, rectified_flow, "flow", 1),
    "pfgmpp": (samplers.pfgmpp, karras, "sample", 2),
}
# Methods of higher order begin with lower ones: so many rows are solved exactly.
EXACT_ROWS = 3
HIGHER = {
    "lms-2": (functools.partial(samplers.lms, order=2), karras, "sample", 2),
    "lms-3": (functools.partial(samplers.lms, order=3), uneven_flow, "flow", 3),
    "lms": (samplers.lms, uneven_flow, "flow", 4),
    "lms-even": (samplers.lms, even, "sample", 4),
    "lms-vp": (samplers.lms, vp, "epsilon", 4),
    "ipndm": (samplers.ipndm, karras, "sample", 2),
    "ipndm-even": (samplers.ipndm, even, "sample", 4),
    "plms": (samplers.plms, vp, "epsilon", 2),
    "plms-even": (samplers.plms, even, "sample", 4),
    "ipndm_v-exact": (functools.partial(samplers.ipndm_v, weights="exact"), uneven_flow, "flow", 4),
    "ipndm_v-even-3": (functools.partial(samplers.ipndm_v, order=3), even, "sample", 3),
    "ipndm_v-even-4": (samplers.ipndm_v, even, "sample", 3),  # its third difference counts 11/24, not 9/24
    "ipndm_v-uneven-3": (functools.partial(samplers.ipndm_v, order=3), uneven_flow, "flow", 2),
    "ipndm_v-uneven-4": (samplers.ipndm_v, uneven_flow, "flow", 0),
    "deis": (samplers.deis, even, "sample", 3),
    "deis-4": (functools.partial(samplers.deis, order=4), even, "sample", 4),
    "deis-log_rho-uneven": (functools.partial(samplers.deis, order=4, variable="log_rho"), uneven_flow, "flow", 4),
    "deis-log_rho-vp": (functools.partial(samplers.deis, variable="log_rho"), vp, "epsilon", 3),
    "deis-rho": (functools.partial(samplers.deis, variable="rho"), karras, "sample", 3),
    "er_sde-1": (functools.partial(samplers.er_sde, order=1, scaler=lambda r: r), rectified_flow, "flow", 1),
    "er_sde-2": (functools.partial(samplers.er_sde, order=2, scaler=lambda r: r), rectified_flow, "flow", 2),
    # Of order two as published: the slope is that half a step back, as if it were that at the estimate.
    "er_sde-3": (functools.partial(samplers.er_sde, order=3, scaler=lambda r: r), rectified_flow, "flow", 2),
    "sa_solver-1-2": (
        functools.partial(samplers.sa_solver, tau=0, predictor_order=1, corrector_order=2),
        open_flow,
        "flow",
        2,
    ),
    "sa_solver-2-0": (
        functools.partial(samplers.sa_solver, tau=0, predictor_order=2, corrector_order=0),
        open_flow,
        "flow",
        2,
    ),
    "sa_solver-3-0": (
        functools.partial(samplers.sa_solver, tau=0, predictor_order=3, corrector_order=0),
        open_flow,
        "flow",
        3,
    ),
    "sa_solver": (functools.partial(samplers.sa_solver, tau=0), open_flow, "flow", 4),
    "ddim_inverse": (samplers.ddim_inverse, open_flow, "flow", 1),
}
ORDERS |= {
    "gradient_estimation": (samplers.gradient_estimation, karras, "sample", 1),
    "gradient_estimation-even": (functools.partial(samplers.gradient_estimation, gamma=1.5), even, "sample", 2),
    "res_multistep": (samplers.res_multistep, karras, "sample", 2),
    "dpm_2": (samplers.dpm_2, karras, "sample", 2),
    "dpm_2_ancestral": (functools.partial(samplers.dpm_2_ancestral, eta=0), karras, "sample", 2),
    "dpmpp_sde": (functools.partial(samplers.dpmpp_sde, eta=0), karras, "sample", 2),
    "dpmpp_sde-r": (functools.partial(samplers.dpmpp_sde, eta=0, r=0.7), karras, "sample", 2),
    "dpm_solver-1": (functools.partial(samplers.dpm_solver, order=1), karras, "sample", 1),
    "dpm_solver-2": (samplers.dpm_solver, karras, "sample", 2),
    "dpm_solver-2-r": (functools.partial(samplers.dpm_solver, r=0.8), karras, "sample", 2),
    "dpm_solver-3": (functools.partial(samplers.dpm_solver, order=3), karras, "sample", 3),
    "dpmpp_3s": (samplers.dpmpp_3s, karras, "sample", 3),
    "seeds_2": (functools.partial(samplers.seeds_2, eta=0, solver="heun", r=0.9), karras, "sample", 2),
    "seeds_3": (functools.partial(samplers.seeds_3, eta=0), karras, "sample", 3),
}
COUNTS = [64, 128, 256, 512, 1024]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("lam", [pytest.param(1.0, marks=pytest.mark.deep), 1.02], ids="lambda={}".format)
def test_order(name, lam):
    sampler, grid, prediction, expected = ORDERS[name]
    found = errors(sampler, grid, prediction, lam, COUNTS, exact_rows=2 if "exact" in name else 0)
    assert order(COUNTS, found) == pytest.approx(expected, abs=0.2), found


@pytest.mark.parametrize("name", HIGHER)
def test_order_after_exact_steps(name):
    sampler, grid, prediction, expected = HIGHER[name]
    found = errors(sampler, grid, prediction, 1.02, COUNTS[1:], exact_rows=EXACT_ROWS + (name.startswith("plms")))
    seen = found > 1e-12  # not where float64 ends
    assert order(np.array(COUNTS[1:])[seen], found[seen]) == pytest.approx(expected, abs=0.25), found
