"""Samplers as tables: (schedule, steps, scaling) -> Table. No tensor math; a new sampler is a new function here.

Each works out, in float64, the row of every model call: the step's ends (alpha_t, sigma_t) -> (alpha_s, sigma_s), the
denoised estimate m0 from the model's output with lambda_t folded in, and x' as a linear combination of x, m0 and friends.
"""

import numpy as np

from .scaling import as_scaling, lambdas, noise_alone, scale
from .schedule import DiscreteSchedule, FlowSchedule, Grid, KarrasSchedule, linear
from .table import COLUMNS, PROVENANCE, Table

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
    Not finite where alpha is 0 and lambda_t is not 1. Raises ValueError where epsilon is predicted at alpha = 0.
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
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled_d_x, scaled_d_f = scale(d_x, d_f, alpha, lambda_t)
    scaled = lambda_t != 1
    return np.where(scaled, scaled_d_x, d_x), np.where(scaled, scaled_d_f, d_f), f_x0, f_eps


def _lambdas(scaling, grid, prediction):
    f_x0, _ = model_output(prediction, grid.alpha, grid.sigma)
    return lambdas(as_scaling(scaling), noise_alone(grid.alpha, grid.sigma, f_x0), "scaling")


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
    lambda_t = _lambdas(scaling, grid, prediction)
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


def _in_space(grid, space):
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


def log_snr(alpha, sigma):
    """log(alpha/sigma), the lambda of DPM-Solver's papers: -inf where alpha is 0, inf where sigma is."""
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def differences(h, h1, h2):
    """Weights of (m0, m1, m2) in DPM-Solver's D1 of order two, D1 of order three and D2, each (3, N).

    h: this step's log SNR, h1 and h2: those of the two steps before (arXiv 2211.01095, eq. 9; its multistep third order).
    """
    zero = np.zeros_like(h)
    first, before = np.array([h / h1, -h / h1, zero]), np.array([zero, h / h2, -h / h2])  # divided differences
    r0, r1 = h1 / h, h2 / h
    return first, first + r0 / (r0 + r1) * (first - before), (first - before) / (r0 + r1)


def bh_weights(hh, ratios, order, solver, correct):
    """UniPC's B(h)*rho for the differences (m_k - m0)/r_k, k = 1..order - 1, and, correcting, for m_t - m0: a list of (N,).

    hh: -h where x_0 is predicted, h where eps is. ratios: r_1, r_2 (N,). solver: "bh1" or "bh2".
    Source: Zhao et al., arXiv 2302.04867, alg. 1 and 2, with its code's shortcuts at order one (corrector) and two (predictor).
    """
    B = hh if solver == "bh1" else np.expm1(hh)
    size = order if correct else order - 1
    if size == 0:
        return []
    if size == 1:
        return [0.5 * B]
    r = np.stack([*ratios[: order - 1], np.ones_like(hh)], axis=-1)[:, :size]
    R = np.stack([r**k for k in range(size)], axis=1)
    b, phi, factorial = [], np.expm1(hh) / hh - 1, 1
    for k in range(1, size + 1):
        b.append(phi * factorial / B)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    good = np.isfinite(R).all(axis=(1, 2)) & np.isfinite(b).all(axis=0)
    good[good] = np.linalg.det(R[good]) != 0
    rho = np.full((len(hh), size), np.nan)
    rho[good] = np.linalg.solve(R[good], np.stack(b, axis=-1)[good][..., None])[..., 0]
    return [B * rho[:, k] for k in range(size)]


def bh_updates(hh, ratios, front, most, solver, first=None):
    """UniPC's updates A*x + ... for each order up to `most`: {order: weights of m0, m1, m2, (3, N)} of the predictor, and
    {order: (weights, that of m_t, (N,))} of the corrector. front: alpha_s where x_0 is predicted, sigma_s where eps is.
    first: the weight of m0 in the first order, -front*expm1(hh), where that needs a limit.
    """
    first, none = -front * np.expm1(hh) if first is None else first, np.zeros_like(hh)

    def update(order, correct):
        rho = bh_weights(hh, ratios, order, solver, correct)
        weights, of_t = np.array([first, none, none]), rho.pop() if correct else none
        for k, B_rho in enumerate(rho):
            weights[0] += front * B_rho / ratios[k]
            weights[k + 1] -= front * B_rho / ratios[k]
        weights[0] += front * of_t
        return weights, -front * of_t

    orders = range(1, most + 1)
    return {order: update(order, False)[0] for order in orders}, {order: update(order, True) for order in orders}


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
    scaling: lambda_t, an EpsilonScaling or a number; 1 where x is noise alone (scaling.lambdas), as at zero terminal SNR or in
    the first step of a flow. prediction: one of PREDICTIONS.
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
    not where alpha is 0, and not in the unscaled form. A step ends at the next timestep (diffusers': T//n below its own, which is
    another with "linspace", and with "trailing" where n does not divide T). The other arguments as in ddpm. Raises ValueError
    naming the argument.
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
    lambda_t = _lambdas(scaling, at_hat, prediction)

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


def _multistep(
    name, schedule, steps, *, order, scaling, prediction, clip, guidance, lower_order_final, eta, solver, S_noise, space,
    grid_options, third="published",
):  # fmt: skip
    """DPM-Solver++ of order two or three over h = log SNR(s) - log SNR(t); eta > 0 solves the SDE, with H = (1 + eta)*h.

    x_s = (sigma_s/sigma_t)*exp(-eta*h)*x + alpha_s*(1 - exp(-H))*m0 + alpha_s*(weights of D1, D2) + noise
    """
    if solver not in ("midpoint", "heun"):
        raise ValueError(f"solver: expected 'midpoint' or 'heun', got {solver!r}")
    if third not in ("published", "exact"):
        raise ValueError(f"third: expected 'published' or 'exact', got {third!r}")
    eta, S_noise = _number("eta", eta, 0), _number("S_noise", S_noise, 0)
    allowed = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
    grid = _in_space(_grid(schedule, steps, allowed, grid_options), space)
    grid, columns = _first_order(grid, len(grid), scaling, prediction, clip, guidance, allowed, {})
    n, at, after = len(grid), log_snr(grid.alpha, grid.sigma), log_snr(grid.alpha_next, grid.sigma_next)
    h = after - at
    decay = np.exp(-eta * h) if eta else np.ones(n)
    c_x = grid.sigma_next / grid.sigma * decay
    total = grid.alpha_next - c_x * grid.alpha  # alpha_s*(1 - exp(-H)), finite where sigma_s = 0
    weights = np.zeros((3, n))
    for i in range(1, n):
        left = n - i  # steps to go, this one counted in
        here = min(order, i + 1, left if lower_order_final else order)
        if here > 1 and not np.isfinite([h[i], h[i - 1]]).all():
            here = 1  # the previous step has infinite length, or this one has
        if here > 2 and not np.isfinite(h[i - 2]):
            here = 2
        if here == 1:
            continue
        H = (1 + eta) * h[i]
        second, D1, D2 = differences(h[i], h[i - 1], h[i - 2] if here > 2 else np.inf)
        phi = 0.5 * total[i] if solver == "midpoint" else grid.alpha_next[i] - total[i] / H
        if here == 2:
            weights[:, i] = phi * second
        else:
            phi = grid.alpha_next[i] - total[i] / H
            times = 2 if third == "exact" else 1
            weights[:, i] = phi * D1 - times * (phi / H - 0.5 * grid.alpha_next[i]) * D2
    columns["c_x"] = c_x
    columns["c_m0"], columns["c_m1"], columns["c_m2"] = total + weights[0], weights[1], weights[2]
    if eta:
        variance = grid.sigma_next**2 * -np.expm1(-2 * eta * np.where(grid.sigma_next > 0, h, 0))
        columns["c_noise"], columns["excess"] = S_noise * np.sqrt(variance), (S_noise**2 - 1) * variance
    return _table(name, grid, columns, grid.initial_sigma)


def dpmpp_2m(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    lower_order_final=True,
    solver="midpoint",
    space="vp",
    **grid_options,
):
    """DPM-Solver++(2M), the deterministic multistep solver (arXiv 2211.01095, alg. 2), with eps/lambda_t in every m0.

    lower_order_final: the last step is first order (it always is where it ends at sigma = 0). solver: "midpoint" or "heun".
    schedule: any of the three, or a Grid, with sigma > 0 at every model call. space: as in euler. The other arguments as in
    ddpm. Raises ValueError.
    """
    return _multistep(
        "dpmpp_2m", schedule, steps, order=2, scaling=scaling, prediction=prediction, clip=clip, guidance=guidance,
        lower_order_final=lower_order_final, eta=0.0, solver=solver, S_noise=1.0, space=space, grid_options=grid_options,
    )  # fmt: skip


def dpmpp_2m_sde(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    lower_order_final=True,
    solver="midpoint",
    eta=1.0,
    S_noise=1.0,
    space="vp",
    **grid_options,
):
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix B; k-diffusion's dpmpp_2m_sde): dpmpp_2m with fresh noise in each step.

    eta: 0 is dpmpp_2m, 1 the reverse SDE. S_noise scales the noise. The other arguments as in dpmpp_2m.
    """
    return _multistep(
        "dpmpp_2m_sde", schedule, steps, order=2, scaling=scaling, prediction=prediction, clip=clip, guidance=guidance,
        lower_order_final=lower_order_final, eta=eta, solver=solver, S_noise=S_noise, space=space,
        grid_options=grid_options,
    )  # fmt: skip


def dpmpp_3m(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    lower_order_final=True,
    third="published",
    space="vp",
    **grid_options,
):
    """DPM-Solver++(3M): two earlier m0; the first steps are of orders one and two.

    lower_order_final: so are the last two. third: "published", the weights of the authors' code, diffusers and k-diffusion, whose
    second difference counts half, so that they converge with order two; "exact", with order three. The other arguments as in
    dpmpp_2m.
    """
    return _multistep(
        "dpmpp_3m", schedule, steps, order=3, scaling=scaling, prediction=prediction, clip=clip, guidance=guidance,
        lower_order_final=lower_order_final, eta=0.0, solver="heun", S_noise=1.0, space=space, grid_options=grid_options,
        third=third,
    )  # fmt: skip


def dpmpp_3m_sde(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    lower_order_final=True,
    eta=1.0,
    S_noise=1.0,
    space="vp",
    **grid_options,
):
    """dpmpp_3m with fresh noise in each step (k-diffusion's dpmpp_3m_sde). Arguments as in dpmpp_2m_sde."""
    return _multistep(
        "dpmpp_3m_sde", schedule, steps, order=3, scaling=scaling, prediction=prediction, clip=clip, guidance=guidance,
        lower_order_final=lower_order_final, eta=eta, solver="heun", S_noise=S_noise, space=space,
        grid_options=grid_options,
    )  # fmt: skip


def euler(
    schedule, steps, *, scaling=1.0, prediction="epsilon", clip=None, guidance=1.0, space="sigma", **grid_options
):
    """Euler's method for the probability flow: ddim's update (eta = 0), in either state.

    schedule: any of the three, or a Grid. space: "sigma", the state x_0 + (sigma/alpha)*eps of k-diffusion, of which the network
    is fed alpha times; or "vp", the state that the network was trained on. The same trajectory, but for that factor.
    The other arguments as in ddpm. Raises ValueError: "sigma" where alpha is 0.
    """
    allowed = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
    grid = _in_space(_grid(schedule, steps, allowed, grid_options), space)
    grid, columns = _first_order(grid, len(grid), scaling, prediction, clip, guidance, allowed, {})
    columns["c_x"] = grid.sigma_next / grid.sigma
    columns["c_m0"] = grid.alpha_next - columns["c_x"] * grid.alpha
    return _table("euler", grid, columns, grid.initial_sigma)


def euler_ancestral(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    eta=1.0,
    S_noise=1.0,
    space="sigma",
    **grid_options,
):
    """Euler down to sigma_down, then noise up to sigma_s (k-diffusion's euler_ancestral); eta = 1 is the posterior's variance.

    With r = sigma/alpha: up = min(r_s, eta*sqrt(r_s^2*(r_t^2 - r_s^2)/r_t^2)), down^2 = r_s^2 - up^2. Arguments as in euler.
    """
    eta, S_noise = _number("eta", eta, 0), _number("S_noise", S_noise, 0)
    allowed = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
    grid = _in_space(_grid(schedule, steps, allowed, grid_options), space)
    grid, columns = _first_order(grid, len(grid), scaling, prediction, clip, guidance, allowed, {})
    down, up = ancestral(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next, eta)
    columns["c_x"] = down / grid.sigma
    columns["c_m0"] = grid.alpha_next - columns["c_x"] * grid.alpha
    columns["c_noise"], columns["excess"] = S_noise * up, (S_noise**2 - 1) * up**2
    return _table("euler_ancestral", grid, columns, grid.initial_sigma)


def ancestral(alpha, sigma, alpha_next, sigma_next, eta):
    """(sigma_down, sigma_up) of an ancestral step, in the state's own variables; finite where alpha is 0."""
    shrunk = np.clip(1 - (sigma_next * alpha / (alpha_next * sigma)) ** 2, 0, 1)  # 1 - (r_s/r_t)^2
    up = sigma_next * np.minimum(1, eta * np.sqrt(shrunk))
    return np.sqrt(np.maximum(sigma_next**2 - up**2, 0)), up


def heun(schedule, steps, *, scaling=1.0, prediction="epsilon", clip=None, guidance=1.0, space="sigma", **grid_options):
    """Heun's method on the points of the schedule itself (k-diffusion's heun without churn): 2*steps - 1 model calls.

    The second row of a step is x' + kappa*(m0 - m1), evaluated at the next point; lambda_t of a step scales both. A step that
    ends at sigma = 0 has one row. Arguments as in euler, with alpha > 0 at every step. Raises ValueError.
    """
    allowed = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
    grid = _in_space(_grid(schedule, steps, allowed, grid_options), space)
    if (grid.alpha == 0).any():
        raise ValueError("schedule: heun needs alpha > 0 at every step")
    ratio = grid.sigma_next / grid.sigma
    kappa = (grid.sigma / grid.alpha - grid.sigma_next / grid.alpha_next)[:-1] * grid.alpha_next[:-1] ** 2
    return _two_calls(
        "heun", grid, _points(grid, slice(1, None)), scaling, prediction, clip, guidance,
        first={"c_x": ratio, "c_m0": grid.alpha_next - ratio * grid.alpha},
        second={"c_x": np.ones(len(grid) - 1), "c_m0": kappa / (2 * grid.sigma[1:]), "c_m1": -kappa / (2 * grid.sigma[1:])},
    )  # fmt: skip


def _points(grid, which):
    return Grid(
        grid.t[which],
        grid.alpha[which],
        grid.sigma[which],
        grid.c_in[which],
        grid.initial_sigma,
        discrete=grid.discrete,
    )


def _two_calls(name, grid, middle, scaling, prediction, clip, guidance, first, second):
    """The table of a method with a second model call in every step but the last, at the points `middle`, (N - 1,).

    first: the first call's columns, of N values, which leads to the middle point but in the last step; second: those of N - 1.
    """
    lambda_t = _lambdas(scaling, grid, prediction)

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
    columns |= {"clip": _clip_value(clip), "g": _number("guidance", guidance)}
    return _table(name, grid, columns, grid.initial_sigma)


def dpmpp_2s(schedule, steps, *, scaling=1.0, prediction="sample", clip=None, guidance=1.0, eta=0.0, S_noise=1.0):
    """DPM-Solver++(2S) (arXiv 2211.01095, alg. 1, r = 1/2), k-diffusion's dpmpp_2s_ancestral where eta > 0: 2*steps - 1 calls.

    The first row leads to the middle of the step in log SNR, the second from there: x is what the first row made of it.
    schedule: a KarrasSchedule, since the network is asked between its points. eta: as in euler_ancestral.
    The other arguments as in ddpm. Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(schedule, KarrasSchedule):
        raise TypeError(f"schedule: expected a KarrasSchedule, got {type(schedule).__name__}")
    eta, S_noise = _number("eta", eta, 0), _number("S_noise", S_noise, 0)
    grid = schedule.grid(steps)
    if len(grid) == 1:
        return _edm(
            "dpmpp_2s", schedule, steps, scaling, prediction, clip, guidance, (0.0, 0.0, np.inf, 1.0), heun=False
        )
    down, up = ancestral(1.0, grid.sigma, 1.0, grid.sigma_next, eta)
    inner = slice(0, -1)  # the last step, to sigma = 0, is Euler's
    sigma, end = grid.sigma[inner], down[inner]
    if (end == 0).any():
        raise ValueError(f"eta: expected a step down to sigma above 0, got {eta}")
    middle = schedule.grid_at(np.sqrt(sigma * end))
    to_middle, from_middle = np.append(middle.sigma, 0.0) / grid.sigma, end / middle.sigma
    back = 1 - to_middle[inner]  # m1's share of the state at the middle
    return _two_calls(
        "dpmpp_2s", grid, middle, scaling, prediction, clip, guidance,
        first={"c_x": to_middle, "c_m0": 1 - to_middle},
        second={"c_x": from_middle, "c_m1": -from_middle * back, "c_m0": 1 - end / sigma,
                "c_noise": S_noise * up[inner], "excess": (S_noise**2 - 1) * up[inner] ** 2},
    )  # fmt: skip


def unipc(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="epsilon",
    clip=None,
    guidance=1.0,
    order=2,
    solver="bh2",
    corrector=True,
    lower_order_final=True,
    space="vp",
    **grid_options,
):
    """UniPC (arXiv 2302.04867, alg. 1 and 2; B(h), x_0 predicted): a multistep predictor, corrected by the next call's m0.

    Once the model was called at the predicted x, the corrected state is y + kappa*m0: y, the second state, is what the row before
    knew of it, so that no tensor is kept beyond m1 and m2. order: 1, 2 or 3. solver: "bh1" or "bh2". corrector: False for UniP.
    lower_order_final: the last steps are of orders ..., 2, 1. The other arguments as in dpmpp_2m, with alpha > 0 at every step.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, got {order!r}")
    if solver not in ("bh1", "bh2"):
        raise ValueError(f"solver: expected 'bh1' or 'bh2', got {solver!r}")
    allowed = (DiscreteSchedule, KarrasSchedule, FlowSchedule)
    grid = _in_space(_grid(schedule, steps, allowed, grid_options), space)
    grid, columns = _first_order(grid, len(grid), scaling, prediction, clip, guidance, allowed, {})
    if (grid.alpha == 0).any():
        raise ValueError("schedule: unipc needs alpha > 0 at every step")
    n, at, after = len(grid), log_snr(grid.alpha, grid.sigma), log_snr(grid.alpha_next, grid.sigma_next)
    h, i = after - at, np.arange(n)
    h1, h2 = np.append(np.nan, h[:-1]), np.append([np.nan, np.nan], h[:-2])[:n]
    with np.errstate(invalid="ignore", divide="ignore"):
        predictors, correctors = bh_updates(-h, [-h1 / h, -(h1 + h2) / h], grid.alpha_next, order, solver)
    here = np.minimum(np.minimum(order, i + 1), n - i if lower_order_final else order)
    here = np.where(np.isfinite(h), here, 1)
    P = np.select([here == p for p in predictors], list(predictors.values()))
    Q, of_t = (np.select([here == p for p in correctors], each) for each in zip(*correctors.values(), strict=True))
    A = grid.sigma_next / grid.sigma
    P[0] = np.where(here == 1, grid.alpha_next - A * grid.alpha, P[0])  # finite where sigma_s = 0
    corrects_next = (i < n - 1) & bool(corrector)
    Q, of_t = np.where(corrects_next, Q, 0.0), np.where(corrects_next, of_t, 0.0)
    corrects, kappa = np.append(False, corrects_next[:-1]), np.append(0.0, of_t[:-1])
    k = np.where(corrects_next, A, 0.0)
    columns |= {
        "c_x": np.where(corrects, 0.0, A), "c_y": np.where(corrects, A, 0.0),
        "c_m0": A * kappa + P[0], "c_m1": P[1], "c_m2": P[2],
        "k_x": np.where(corrects, 0.0, k), "k_y": np.where(corrects, k, 0.0),
        "k_m0": k * kappa + Q[0], "k_m1": Q[1], "k_m2": Q[2],
    }  # fmt: skip
    # y is the corrected state less its share of m_t.
    columns["y_out_x0"] = np.where(corrects_next, grid.alpha_next - of_t, 0.0)
    columns["y_out_eps"] = np.where(corrects_next, grid.sigma_next, 0.0)
    columns["y_x0"], columns["y_eps"] = (np.append(0.0, columns[f"y_out_{key}"][:-1]) for key in ("x0", "eps"))
    return _table("unipc", grid, columns, grid.initial_sigma)


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
    grid, columns = _first_order(schedule, t, scaling, prediction, clip, guidance, (DiscreteSchedule,), {})
    c_skip, c_out = boundary(timestep_scaling * grid.t, sigma_data)
    columns["c_x"], columns["c_m0"] = grid.alpha_next * c_skip, grid.alpha_next * c_out
    columns["c_noise"] = grid.sigma_next
    # The boundary condition moves the mean, and leaves some of x's noise in.
    columns["alpha_out"] = grid.alpha_next * (c_skip * grid.alpha + c_out)
    columns["excess"] = (columns["c_x"] * grid.sigma) ** 2
    return _table("lcm", grid, columns, grid.initial_sigma)


def boundary(scaled_t, sigma_data=0.5):
    """(c_skip, c_out) of a consistency model."""
    root = np.sqrt(scaled_t**2 + sigma_data**2)
    return (sigma_data / root) ** 2, scaled_t / root


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
    gamma = _number("gamma", gamma, 0)
    if gamma > 1:
        raise ValueError(f"gamma: expected a value in [0, 1], got {gamma}")
    t = _consistency_timesteps(schedule, steps, original_steps)
    grid = schedule.grid(t, final="first")
    grid, columns = _first_order(grid, len(grid), scaling, prediction, clip, guidance, (DiscreteSchedule,), {})
    s = np.append(np.floor((1 - gamma) * t[1:]), 0).astype(np.int64)
    down, up = grid.alpha_next / schedule.alpha[s] * schedule.sigma[s], 0.0
    up = np.sqrt(np.maximum(grid.sigma_next**2 - down**2, 0)) * (np.append(t[1:], 0) > s)
    columns["c_x"] = down / grid.sigma
    columns["c_m0"] = grid.alpha_next - columns["c_x"] * grid.alpha
    columns["c_noise"] = up
    return _table("tcd", grid, columns, grid.initial_sigma)


def flow_euler(
    schedule,
    steps,
    *,
    scaling=1.0,
    prediction="flow",
    clip=None,
    guidance=1.0,
    stochastic=False,
    **grid_options,
):
    """Rectified flow's sampler: Euler on x_t = (1 - sigma)*x_0 + sigma*eps, or, stochastic, m0 with fresh noise in each step.

    schedule: a FlowSchedule, or a Grid. The other arguments as in ddpm. Raises ValueError naming the argument.
    """
    grid, columns = _first_order(schedule, steps, scaling, prediction, clip, guidance, (FlowSchedule,), grid_options)
    columns["c_x"] = np.zeros(len(grid)) if stochastic else grid.sigma_next / grid.sigma
    columns["c_m0"] = grid.alpha_next - columns["c_x"] * grid.alpha
    columns["c_noise"] = grid.sigma_next * bool(stochastic)
    return _table("flow_euler", grid, columns, grid.initial_sigma)


def pfgmpp(schedule, steps, *, scaling=1.0, prediction="sample", clip=None, guidance=1.0):
    """PFGM++ (arXiv 2302.04265, alg. 2): EDM's Heun, since r = sigma*sqrt(D), from another prior: epskernels.pfgmpp_prior.

    Arguments as in edm_heun, without churn. D is nowhere in the table: it is the network's, and the prior's.
    """
    return _edm("pfgmpp", schedule, steps, scaling, prediction, clip, guidance, (0.0, 0.0, np.inf, 1.0), heun=True)


def dit(steps=250, *, scaling=1.0, guidance=4.0, guided_channels=3, T=1000, **options):
    """DiT's own sampling (arXiv 2212.09748): ddpm on linear betas, respaced as ADM's, learned variance, latents not clamped.

    steps: a count, or ADM's section counts. guidance: the scale of classifier-free guidance, of as many leading channels as
    guided_channels says, 0 for all; three of the four in its authors' code. options: as in ddpm.
    """
    steps = str(steps) if isinstance(steps, (int, np.integer)) else steps
    options = {"variance": "learned_range", "clip": None} | options
    table = ddpm(linear(T), steps, scaling=scaling, guidance=guidance, **options)
    values = {key: table[key] for key in COLUMNS + PROVENANCE} | {"guided_channels": guided_channels}
    return Table(values, name=f"dit[{len(table)}]", initial_sigma=table.initial_sigma, discrete=True)


SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (
        ddpm, ddim, edm_euler, edm_heun, euler, euler_ancestral, heun, dpmpp_2s, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde,
        unipc, lcm, tcd, flow_euler, pfgmpp,
    )
}  # fmt: skip
