"""One model call in a step, with the estimates of x_0 of earlier ones: dpmpp_2m, dpmpp_3m and their SDE forms, res_multistep,
er_sde, unipc, sa_solver."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import solvers
from ..schedule import Grid
from ..table import Table
from ..typing import Array, Steps
from .common import (
    ON_A_PATH,
    Columns,
    Correction,
    Scaling,
    Schedule,
    make_table,
    noise_columns,
    number,
    one_call,
    one_of,
    require_alpha,
    sampler,
)


def _finite_steps(h: Array) -> NDArray[np.int64]:
    """How many of the steps up to each, itself counted in, have a finite length: the most that its order may be, at least 1.

    A step to sigma = 0 or from alpha = 0 has none.
    """
    finite = np.isfinite(h)
    run = np.zeros(len(h), dtype=np.int64)
    for i in range(len(h)):
        run[i] = (run[i - 1] if i else 0) + 1 if finite[i] else 0
    return np.maximum(run, 1)


def _log_snr_steps(grid: Grid) -> Array:
    """h of each step, (N,): infinite to sigma = 0 and from alpha = 0."""
    return solvers.log_snr(grid.alpha_next, grid.sigma_next) - solvers.log_snr(grid.alpha, grid.sigma)


def _dpmpp(
    grid: Grid,
    order: int,
    lower_order_final: bool,
    *,
    eta: float = 0.0,
    solver: str = "heun",
    S_noise: float = 1.0,
    third: str = "published",
) -> Columns:
    """DPM-Solver++'s columns, of order two or three over h = log SNR(s) - log SNR(t); eta > 0 solves the SDE, with H = (1 +
    eta)*h.

    x_s = (sigma_s/sigma_t)*exp(-eta*h)*x + alpha_s*(1 - exp(-H))*m0 + alpha_s*(weights of D1, D2) + noise
    """
    one_of("solver", solver, ("midpoint", "heun"))
    one_of("third", third, ("published", "exact"))
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    n, i = len(grid), np.arange(len(grid))
    h = _log_snr_steps(grid)
    with np.errstate(invalid="ignore", divide="ignore"):
        integrals = solvers.integrals(grid.alpha_next, -(1 + eta) * h)
        weights = solvers.multistep(h, integrals, solver, 2.0 if third == "exact" else 1.0)
    lasting = np.minimum(order, n - i) if lower_order_final else np.full(n, order)
    columns = _weights(solvers.of_order(np.minimum(lasting, _finite_steps(h)), weights))
    columns["c_x"] = grid.sigma_next / grid.sigma * solvers.decay(h, eta)
    return columns | (noise_columns(solvers.sde_noise(grid.sigma_next, h, eta), S_noise) if eta else {})


def _weights(of_m: Array) -> Columns:
    return dict(zip(("c_m0", "c_m1", "c_m2"), of_m, strict=True))


@sampler(ON_A_PATH)
def dpmpp_2m(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    lower_order_final: bool = True,
    solver: str = "midpoint",
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """DPM-Solver++(2M), the deterministic multistep solver (arXiv 2211.01095, alg. 2), with eps/lambda_t in every m0.

    sigma must be above 0 at every model call.

    lower_order_final: the last step is first order (it always is where it ends at sigma = 0).
    solver: "midpoint" or "heun".
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    return make_table(
        "dpmpp_2m", grid, columns | _dpmpp(grid, 2, lower_order_final, solver=solver), correction=correction
    )


@sampler(ON_A_PATH)
def dpmpp_2m_sde(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    lower_order_final: bool = True,
    solver: str = "midpoint",
    eta: float = 1.0,
    S_noise: float = 1.0,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix B; k-diffusion's dpmpp_2m_sde): dpmpp_2m with fresh noise in each step.

    sigma must be above 0 at every model call.

    lower_order_final: the last step is first order (it always is where it ends at sigma = 0).
    solver: "midpoint" or "heun".
    eta: how much noise there is: 1 is the reverse SDE, 0 is dpmpp_2m.
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    own = _dpmpp(grid, 2, lower_order_final, solver=solver, eta=eta, S_noise=S_noise)
    return make_table("dpmpp_2m_sde", grid, columns | own, correction=correction)


@sampler(ON_A_PATH)
def dpmpp_3m(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    lower_order_final: bool = True,
    third: str = "published",
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """DPM-Solver++(3M): two earlier m0; the first steps are of orders one and two.

    sigma must be above 0 at every model call.

    lower_order_final: the last two steps are of orders two and one.
    third: "published", the weights of the authors' code, diffusers and k-diffusion, whose second difference counts half, so that
        they converge with order two; or "exact", with order three.
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    return make_table(
        "dpmpp_3m", grid, columns | _dpmpp(grid, 3, lower_order_final, third=third), correction=correction
    )


@sampler(ON_A_PATH)
def dpmpp_3m_sde(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    lower_order_final: bool = True,
    eta: float = 1.0,
    S_noise: float = 1.0,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """DPM-Solver++(3M) with fresh noise in each step (k-diffusion's dpmpp_3m_sde).

    sigma must be above 0 at every model call.

    lower_order_final: the last two steps are of orders two and one.
    eta: how much noise there is: 1 is the reverse SDE, 0 is dpmpp_3m.
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    return make_table(
        "dpmpp_3m_sde",
        grid,
        columns | _dpmpp(grid, 3, lower_order_final, eta=eta, S_noise=S_noise),
        correction=correction,
    )


@sampler(ON_A_PATH)
def res_multistep(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
    S_noise: float = 1.0,
    space: str = "sigma",
    **grid_options: Any,
) -> Table:
    """RES's second order multistep (arXiv 2308.02157, section 3), ancestral where eta > 0: with eta 0, dpmpp_2m with
    solver="heun".

    The first step, and those down to 0, are Euler's. sigma must be above 0 at every model call.

    eta: above 0 a step leads down to sigma_down, then noise up.
    Raises ValueError naming the argument.
    """
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    eta, S_noise = number("eta", eta, 0), number("S_noise", S_noise, 0)
    down, up = solvers.ancestral(grid.alpha, grid.sigma, grid.alpha_next, grid.sigma_next, eta)
    with np.errstate(invalid="ignore", divide="ignore"):
        h = solvers.log_snr(grid.alpha_next, down) - solvers.log_snr(grid.alpha, grid.sigma)
        # The estimate before counts as lying a whole step down behind, as published, whatever noise came after that step.
        weights = solvers.multistep(h, solvers.integrals(grid.alpha_next, -h), "heun")
    columns |= _weights(solvers.of_order(np.minimum(2, _finite_steps(h)), weights))
    columns["c_x"] = down / grid.sigma
    return make_table("res_multistep", grid, columns | noise_columns(up, S_noise), correction=correction)


@sampler(ON_A_PATH)
def er_sde(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    order: int = 3,
    scaler: Callable[[Array], Array] | None = None,
    S_noise: float = 1.0,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """ER-SDE-Solver-1 to 3 (arXiv 2309.06169), the extended reverse-time SDE.

    The integrals of the noise scale are exact; the authors add up 200 points. Order 3 converges like order 2, as published. alpha
    and sigma must be above 0 at every model call.

    order: 1, 2 or 3: the highest that a step has.
    scaler: the noise scale phi of r = sigma/alpha, a function of arrays. phi(r) = r is the probability flow, without noise.
        Default the authors' fifth, r*(exp(r^0.3) + 10).
    Raises ValueError naming the argument.
    """
    one_of("order", order, (1, 2, 3))
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    require_alpha(grid, "er_sde")
    with np.errstate(invalid="ignore", divide="ignore"):
        kept, noise, weights = solvers.er_sde(
            grid.sigma / grid.alpha, grid.sigma_next / grid.alpha_next, scaler or solvers.er_noise_scale
        )
    order_of_step = np.minimum(order, _finite_steps(_log_snr_steps(grid)))
    columns |= _weights(grid.alpha_next * solvers.of_order(order_of_step, weights))
    columns["c_x"] = kept * grid.alpha_next / grid.alpha
    return make_table(
        "er_sde",
        grid,
        columns | noise_columns(grid.alpha_next * noise, number("S_noise", S_noise, 0)),
        correction=correction,
    )


@sampler(ON_A_PATH)
def unipc(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    order: int = 2,
    solver: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """UniPC (arXiv 2302.04867, alg. 1 and 2; B(h), x_0 predicted): a multistep predictor, corrected by the next call's m0.

    Once the model was called at the predicted x, the corrected state is y + kappa*m0: y, the second state, is what the row
    before knew of it, so that no tensor is kept beyond m1 and m2. alpha and sigma must be above 0 at every model call.

    order: 1, 2 or 3.
    solver: "bh1" or "bh2".
    corrector: False for UniP, the predictor alone.
    lower_order_final: the last steps are of orders ..., 2, 1.
    Raises ValueError naming the argument.
    """
    one_of("order", order, (1, 2, 3))
    one_of("solver", solver, ("bh1", "bh2"))
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    require_alpha(grid, "unipc")
    n, i = len(grid), np.arange(len(grid))
    h = _log_snr_steps(grid)
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
    return make_table("unipc", grid, columns, correction=correction)


@sampler(ON_A_PATH)
def sa_solver(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    guidance: float = 1.0,
    predictor_order: int = 3,
    corrector_order: int = 4,
    tau: float | Callable[[Array], Array] = 1.0,
    S_min: float = 0.0,
    S_max: float = np.inf,
    S_noise: float = 1.0,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """SA-Solver (arXiv 2309.05019, alg. 1; x_0 predicted): a stochastic multistep predictor, corrected by the next call's m0.

    Towards sigma = 0 the orders fall, and the last call is not corrected. The corrected state keeps the predictor's noise: it
    is x + y + kappa*m0, x the predicted state. alpha and sigma must be above 0 at every model call.

    predictor_order: 1 to 3.
    corrector_order: 1 to 4, or 0 for none.
    tau: how much noise there is: 0 is the probability flow, 1 the reverse SDE; or a function of the sigma/alpha where steps end,
        an array.
    S_min, S_max: tau is 0 in steps that end at a sigma/alpha outside of them.
    Raises ValueError naming the argument.
    """
    one_of("predictor_order", predictor_order, (1, 2, 3))
    one_of("corrector_order", corrector_order, (0, 1, 2, 3, 4))
    S_noise = number("S_noise", S_noise, 0)
    grid, columns = one_call(schedule, steps, scaling, prediction, clip, guidance, grid_options, space=space)
    require_alpha(grid, "sa_solver")
    n, i = len(grid), np.arange(len(grid))
    ratio = grid.sigma_next / grid.alpha_next
    taus = np.array([number("tau", each, 0) for each in (tau(ratio) if callable(tau) else [tau])])
    tau_of_step = np.where((S_min <= ratio) & (ratio <= S_max), taus, 0.0)
    h = _log_snr_steps(grid)
    finite = np.isfinite(h)
    faded = tau_of_step**2 * np.where(finite, h, 0.0)
    A = grid.sigma_next / grid.sigma * solvers.decay(faded, 1.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        predictors, correctors = solvers.stochastic_adams(h, grid.alpha_next, tau_of_step)
    left = n - 1 - i if grid.sigma_end == 0 else np.full(n, n)  # finite steps from here on
    P = solvers.of_order(np.maximum(np.minimum(np.minimum(predictor_order, i + 1), left), 1), predictors)
    P = np.where(finite, P, np.array([[1.0], [0.0], [0.0]]) * (grid.alpha_next - A * grid.alpha))
    corrected = np.append(np.isfinite(h[1:]), False)  # the call at the step's end is, where another step follows
    correctors_order = np.where(corrected, np.minimum(np.minimum(corrector_order, i + 2), left), 0)
    Q, of_next = (
        solvers.of_order(correctors_order, dict(zip(correctors, each, strict=True)))
        for each in zip(*correctors.values(), strict=True)
    )
    columns |= solvers.corrected_later(A, P, Q, of_next)
    noise = solvers.sde_noise(grid.sigma_next, faded, 1.0)
    return make_table("sa_solver", grid, columns | noise_columns(noise, S_noise), correction=correction)
