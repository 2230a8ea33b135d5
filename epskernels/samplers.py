"""Samplers as tables: (schedule, steps, scaling) -> Table. No tensor math; a new sampler is a new function here.

Each works out, in float64, the row of every model call: the step's ends (alpha_t, sigma_t) -> (alpha_s, sigma_s), the
denoised estimate m0 from the model's output with lambda_t folded in, and x' as a linear combination of x, m0 and friends.
"""

import numpy as np

from .scaling import as_scaling, scale
from .schedule import DiscreteSchedule, FlowSchedule, Grid, KarrasSchedule
from .table import Table

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


# ---- what all samplers share ----


def model_output(prediction, alpha, sigma):
    """(f_x0, f_eps): the network's output as f_x0*x_0 + f_eps*eps, for x_t = alpha*x_0 + sigma*eps.

    v = alpha*eps - sigma*x_0 (Salimans and Ho, arXiv 2202.00512); flow = eps - x_0. Raises ValueError: unknown prediction.
    """
    zero, one = np.zeros_like(sigma), np.ones_like(sigma)
    if prediction == "epsilon":
        return zero, one
    if prediction == "sample":
        return one, zero
    if prediction == "v_prediction":
        return -sigma, alpha + zero
    if prediction == "flow":
        return -one, one
    raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")


def denoiser(prediction, grid, lambda_t):
    """(d_x, d_f) of m0 = d_x*x + d_f*f, with eps -> eps/lambda_t: x0' = (1 - 1/lambda_t)*x/alpha + x0/lambda_t.

    Exact for every prediction, since x0' is linear in (x, f). The network's own variables are c_in times those of the path.
    Raises ValueError where alpha = 0: epsilon prediction is undefined there, and so is any lambda_t but 1.
    """
    alpha, sigma = grid.alpha, grid.sigma
    f_x0, f_eps = model_output(prediction, grid.c_in * alpha, grid.c_in * sigma)
    determinant = alpha * f_eps - sigma * f_x0
    if (determinant == 0).any():
        row = int(np.flatnonzero(determinant == 0)[0])
        raise ValueError(
            f"prediction: {prediction!r} says nothing of x_0 where alpha is {alpha[row]:g}, sigma {sigma[row]:g} (step {row})"
        )
    d_x, d_f = f_eps / determinant, -sigma / determinant
    scaled = lambda_t != 1
    if (scaled & (alpha == 0)).any():
        row = int(np.flatnonzero(scaled & (alpha == 0))[0])
        raise ValueError(f"lambda: expected 1 where alpha is 0 (step {row}), got {lambda_t[row]:g}")
    safe_alpha = np.where(alpha == 0, 1.0, alpha)
    scaled_d_x, scaled_d_f = scale(d_x, d_f, safe_alpha, lambda_t)
    return np.where(scaled, scaled_d_x, d_x), np.where(scaled, scaled_d_f, d_f), f_x0, f_eps


def _clip_value(clip):
    if clip is None:
        return np.inf
    if not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip: expected a value above 0, or None, got {clip!r}")
    return float(clip)


def _number(name, value, low=-np.inf):
    if not isinstance(value, (int, float, np.number)) or not (np.isfinite(value) and value >= low):
        raise ValueError(f"{name}: expected a finite value{f' >= {low:g}' if low > -np.inf else ''}, got {value!r}")
    return float(value)


def _grid(schedule, steps, allowed, grid_options):
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


def _table(name, grid, columns, initial_sigma):
    calls = len(columns["t"])
    columns["draw"] = np.arange(calls)
    return Table(columns, name=f"{name}[{calls}]", initial_sigma=initial_sigma, discrete=grid.discrete)


def _first_order(schedule, steps, scaling, prediction, clip, guidance, allowed, grid_options):
    """The grid and the columns of samplers with one model call per step."""
    grid = _grid(schedule, steps, allowed, grid_options)
    lambda_t = as_scaling(scaling).values(len(grid))
    d_x, d_f, f_x0, f_eps = denoiser(prediction, grid, lambda_t)
    columns = {
        "t": grid.t, "c_in": grid.c_in, "lambda_t": lambda_t,
        "alpha_in": grid.alpha, "sigma_in": grid.sigma, "alpha_out": grid.alpha_next, "sigma_out": grid.sigma_next,
        "d_x": d_x, "d_f": d_f, "f_x0": f_x0, "f_eps": f_eps,
        "clip": _clip_value(clip), "g": _number("guidance", guidance),
    }  # fmt: skip
    return grid, columns


def _posterior(grid):
    """alpha_ts = alpha_t/alpha_s, sigma_ts^2 = sigma_t^2 - alpha_ts^2*sigma_s^2 (beta_t of the respaced chain), and the
    posterior variance of x_s given x_t and x_0 (Kingma et al., arXiv 2107.00630, eq. 25-27; DDPM's beta-tilde)."""
    alpha_ts = grid.alpha / grid.alpha_next
    variance_ts = grid.sigma**2 - alpha_ts**2 * grid.sigma_next**2
    return alpha_ts, variance_ts, variance_ts * grid.sigma_next**2 / grid.sigma**2


# ---- the samplers ----


def ddpm(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    variance="fixed_small",
    clip=1.0,
    guidance=1.0,
    **grid_options,
):
    """Ancestral sampling (DDPM, arXiv 2006.11239, eq. 6-7), and ADM's p_sample with learned variance; ADM-ES.

    schedule: a DiscreteSchedule (its betas are respaced to `steps` as ADM does), FlowSchedule, or a Grid. steps: a count,
    ADM's section counts or timesteps (DiscreteSchedule.timesteps; spacing and the rest of its options pass through).
    scaling: lambda_t, an EpsilonScaling or a number. prediction: one of PREDICTIONS.
    variance: "fixed_small" (posterior), "fixed_large" (beta), "learned_range" (the model's second half of channels, v,
    between the two; arXiv 2102.09672, eq. 15). clip: x_0 is held to [-clip, clip]; None for none.
    guidance: the scale g of fhat = u + g*(f - u). A classifier's gradient, where given to the step, shifts the mean by the
    variance times it (ADM's condition_mean). Raises ValueError naming the argument.
    """
    grid, columns = _first_order(
        schedule, steps, scaling, prediction, clip, guidance, (DiscreteSchedule, FlowSchedule), grid_options
    )
    alpha_ts, variance_ts, small = _posterior(grid)
    inside = np.append(np.ones(len(grid) - 1), 0.0)  # the last step adds no noise
    columns["c_x"] = alpha_ts * grid.sigma_next**2 / grid.sigma**2
    columns["c_m0"] = grid.alpha_next * variance_ts / grid.sigma**2
    # The last posterior variance is 0 where sigma_s is; its neighbour's stands in for its logarithm, as in ADM.
    stand_in = small.copy()
    if len(grid) > 1 and small[-1] == 0:
        stand_in[-1] = small[-2]
    if variance == "fixed_small":
        columns["c_noise"], columns["c_grad"] = np.sqrt(small) * inside, small
        columns["excess"] = small * (inside - 1)
    elif variance == "fixed_large":
        large = np.append(variance_ts[:-1], stand_in[-1])
        columns["c_noise"], columns["c_grad"] = np.sqrt(large) * inside, large
        columns["excess"] = large * inside - small
    elif variance == "learned_range":
        if not (stand_in > 0).all():
            raise ValueError("variance: 'learned_range' needs at least two steps")
        columns["c_noise"], columns["c_grad"] = inside, np.ones(len(grid))
        columns["logvar_min"], columns["logvar_max"] = np.log(stand_in), np.log(variance_ts)
        columns["excess"] = small * (inside - 1)
    else:
        raise ValueError(f"variance: expected 'fixed_small', 'fixed_large' or 'learned_range', got {variance!r}")
    return _table("ddpm", grid, columns, grid.initial_sigma)


def ddim(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    eta=0.0,
    direction="scaled",
    clip=None,
    guidance=1.0,
    **grid_options,
):
    """DDIM (arXiv 2010.02502, eq. 12), with Epsilon Scaling in either of its two published forms; on a FlowSchedule, Euler.

    eta: 0 deterministic, 1 the posterior's variance. direction: "scaled", where the noise direction is derived again from
    the scaled and clamped x_0 (ADM-ES, DDIM-ES), or "unscaled", where it is the model's own eps (LDM-ES); lambda does not
    transfer between the two. A classifier's gradient shifts eps by -sigma_t times it after clamping (ADM's condition_score);
    not where alpha is 0, and not in the unscaled form. The other arguments as in ddpm. Raises ValueError naming the argument.
    """
    grid, columns = _first_order(
        schedule, steps, scaling, prediction, clip, guidance, (DiscreteSchedule, FlowSchedule), grid_options
    )
    _, _, posterior = _posterior(grid)
    eta = _number("eta", eta, 0)
    noise_variance = eta**2 * posterior
    if (noise_variance > grid.sigma_next**2 * (1 + 1e-12)).any():
        raise ValueError(f"eta: expected no more noise than sigma_s^2, got {eta}")
    towards = np.sqrt(np.maximum(grid.sigma_next**2 - noise_variance, 0))
    columns["c_noise"] = np.sqrt(noise_variance)
    if direction == "scaled":  # eps = (x - alpha*m0)/sigma
        columns["c_x"] = towards / grid.sigma
        columns["c_m0"] = grid.alpha_next - towards * grid.alpha / grid.sigma
        safe_alpha = np.where(grid.alpha == 0, 1.0, grid.alpha)
        shift = grid.alpha_next * grid.sigma**2 / safe_alpha - towards * grid.sigma
        columns["c_grad"] = np.where(grid.alpha == 0, 0.0, shift)  # there eps says nothing of x_0
    elif direction == "unscaled":  # eps = e_x*x + e_f*f, what the model said
        f_x0, f_eps = columns["f_x0"], columns["f_eps"]
        determinant = grid.alpha * f_eps - grid.sigma * f_x0
        columns["c_x"] = towards * -f_x0 / determinant
        columns["c_f"] = towards * grid.alpha / determinant
        columns["c_m0"] = grid.alpha_next
    else:
        raise ValueError(f"direction: expected 'scaled' or 'unscaled', got {direction!r}")
    return _table("ddim", grid, columns, grid.initial_sigma)


def _churned(grid, S_churn, S_min, S_max, S_noise):
    """The grid at the raised noise levels sigma_hat, and the variance that churn adds before each step."""
    S_churn, S_noise = _number("S_churn", S_churn, 0), _number("S_noise", S_noise, 0)
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
    lambda_t = as_scaling(scaling).values(n)

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
    ratio = sigma_next / sigma_hat
    euler = {**part(at_hat, lambda_t), "c_x": ratio, "c_m0": 1 - ratio, "c_m1": np.zeros(n)}
    if not heun or n == 1:
        columns = euler | noise
    else:
        # Heun: the Euler row, then x' + kappa*(m0 - m1) with a second evaluation at sigma_next, but for the last step.
        kappa = (sigma_hat[:-1] - sigma_next[:-1]) / (2 * sigma_next[:-1])
        corrector = {
            **part(schedule.grid_at(sigma_next[:-1]), lambda_t[:-1]),
            "c_x": np.ones(n - 1), "c_m0": kappa, "c_m1": -kappa, **{key: column[:-1] for key, column in noise.items()},
        }  # fmt: skip
        predictor = euler | still
        columns = {}
        for key in predictor:
            columns[key] = np.empty(2 * n - 1)
            columns[key][0::2], columns[key][1::2] = predictor[key], corrector[key]
    columns |= {"alpha_in": 1.0, "alpha_out": 1.0, "clip": _clip_value(clip), "g": _number("guidance", guidance)}
    initial_sigma = np.sqrt(grid.sigma[0] ** 2 + S_noise**2 * added[0])
    return _table(name, grid, columns, initial_sigma)


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


def dpmpp_2m(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    lower_order_final=True,
    **grid_options,
):
    """DPM-Solver++(2M), the deterministic multistep solver (arXiv 2211.01095, alg. 2), with eps/lambda_t in every m0.

    lower_order_final: the last step is first order (it always is where it ends at sigma = 0). schedule: any of the three, or
    a Grid, with alpha > 0 and sigma > 0 at every model call. The other arguments as in ddpm. Raises ValueError.
    """
    allowed = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
    grid, columns = _first_order(schedule, steps, scaling, prediction, clip, guidance, allowed, grid_options)
    with np.errstate(divide="ignore"):
        log_snr = np.log(grid.alpha) - np.log(grid.sigma)  # the paper's lambda, not the scaling's
        log_snr_next = np.log(grid.alpha_next) - np.log(grid.sigma_next)
    ratio = grid.sigma_next / grid.sigma
    total = grid.alpha_next - ratio * grid.alpha  # alpha_s*(1 - exp(-h)), finite where sigma_s = 0
    second = np.zeros(len(grid))
    for i in range(1, len(grid)):
        last = i == len(grid) - 1
        if grid.alpha[i - 1] == 0 or grid.sigma_next[i] == 0 or (last and lower_order_final):
            continue  # the previous step has infinite length, or this one has: first order
        h_before, h = log_snr[i] - log_snr[i - 1], log_snr_next[i] - log_snr[i]
        second[i] = h / (2 * h_before)
    columns["c_x"] = ratio
    columns["c_m0"] = total * (1 + second)
    columns["c_m1"] = -total * second
    return _table("dpmpp_2m", grid, columns, grid.initial_sigma)


SAMPLERS = {sampler.__name__: sampler for sampler in (ddpm, ddim, edm_euler, edm_heun, dpmpp_2m)}
