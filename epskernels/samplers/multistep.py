"""One model call in a step, with the estimates of earlier ones: dpmpp_2m, dpmpp_3m, their SDE forms, unipc."""

import numpy as np

from .. import solvers
from .common import ANY_SCHEDULE, first_order_columns, grid_of, in_space, make_table, number


def _finite_steps(h):
    """How many of the steps up to each, itself counted in, have a finite length: the most that its order may be, at least 1.

    A step to sigma = 0 or from alpha = 0 has none.
    """
    finite = np.isfinite(h)
    run = np.zeros(len(h), dtype=np.int64)
    for i in range(len(h)):
        run[i] = (run[i - 1] if i else 0) + 1 if finite[i] else 0
    return np.maximum(run, 1)


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
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    allowed = ANY_SCHEDULE
    grid = in_space(grid_of(schedule, steps, allowed, grid_options), space)
    grid, columns = first_order_columns(grid, len(grid), scaling, prediction, clip, guidance, allowed, {})
    n, i = len(grid), np.arange(len(grid))
    h = solvers.log_snr(grid.alpha_next, grid.sigma_next) - solvers.log_snr(grid.alpha, grid.sigma)
    with np.errstate(invalid="ignore", divide="ignore"):
        integrals = solvers.integrals(grid.alpha_next, -(1 + eta) * h)
        weights = solvers.multistep(h, integrals, solver, 2.0 if third == "exact" else 1.0)
    lasting = np.minimum(order, n - i) if lower_order_final else np.full(n, order)
    W = solvers.of_order(np.minimum(lasting, _finite_steps(h)), weights)
    columns["c_x"] = grid.sigma_next / grid.sigma * solvers.decay(h, eta)
    columns["c_m0"], columns["c_m1"], columns["c_m2"] = W
    if eta:
        noise = solvers.sde_noise(grid.sigma_next, h, eta)
        columns["c_noise"], columns["excess"] = S_noise * noise, (S_noise**2 - 1) * noise**2
    return make_table(name, grid, columns, grid.initial_sigma)


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
    allowed = ANY_SCHEDULE
    grid = in_space(grid_of(schedule, steps, allowed, grid_options), space)
    grid, columns = first_order_columns(grid, len(grid), scaling, prediction, clip, guidance, allowed, {})
    if (grid.alpha == 0).any():
        raise ValueError("schedule: unipc needs alpha > 0 at every step")
    n, i = len(grid), np.arange(len(grid))
    h = solvers.log_snr(grid.alpha_next, grid.sigma_next) - solvers.log_snr(grid.alpha, grid.sigma)
    A, first = solvers.first_order(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next)
    with np.errstate(invalid="ignore", divide="ignore"):
        predictors, correctors = solvers.bh_updates(h, first, grid.alpha_next, order, solver)
    order_of_step = np.minimum(np.minimum(order, i + 1), n - i if lower_order_final else order)
    order_of_step = np.where(np.isfinite(h), order_of_step, 1)
    P = solvers.of_order(order_of_step, predictors)
    Q, of_next = (
        solvers.of_order(order_of_step, dict(zip(correctors, each, strict=True)))
        for each in zip(*correctors.values(), strict=True)
    )
    corrects_next = (i < n - 1) & bool(corrector)
    Q, of_next = np.where(corrects_next, Q, 0.0), np.where(corrects_next, of_next, 0.0)
    corrects = np.append(False, corrects_next[:-1])
    columns |= solvers.predictor_corrector(A, P, Q, np.append(0.0, of_next[:-1]), corrects, corrects_next)
    # y is the corrected state less its share of m_t.
    columns["y_out_x0"] = np.where(corrects_next, grid.alpha_next - of_next, 0.0)
    columns["y_out_eps"] = np.where(corrects_next, grid.sigma_next, 0.0)
    columns["y_x0"], columns["y_eps"] = (np.append(0.0, columns[f"y_out_{key}"][:-1]) for key in ("x0", "eps"))
    return make_table("unipc", grid, columns, grid.initial_sigma)
