"""One model call in a step, with the estimates of eps of earlier ones: plms, lms, ipndm, ipndm_v, deis, gradient_estimation.

x/alpha has slope eps in r = sigma/alpha, and a step integrates a polynomial through the last slopes. m0 is eps here, and so are
m1 and m2: estimates of x_0 do not tell the eps of earlier calls, since the states of those calls are gone. The fourth eps
travels as y, which each row hands on (k_m2 = 1). The clamp is of m0, and so none of these has `clip`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import solvers
from ..scaling import array
from ..schedule import Grid
from ..table import Table
from ..typing import Array, Steps
from .common import (
    ANY_SCHEDULE,
    IN_EPS,
    ON_A_PATH,
    Correction,
    Scaling,
    Schedule,
    grid_of,
    in_space,
    lambdas_of_calls,
    make_table,
    number,
    one_call,
    one_of,
    points,
    require_alpha,
    sampler,
)  # fmt: skip


def _grid(
    name: str, schedule: Schedule, steps: Steps, space: str, grid_options: Mapping[str, Any]
) -> tuple[Grid, Array]:
    """The grid, and r = sigma/alpha of its calls and of the end, (N + 1,)."""
    grid = in_space(grid_of(schedule, steps, ANY_SCHEDULE, grid_options), space)
    require_alpha(grid, name)
    return grid, np.append(grid.sigma, grid.sigma_end) / np.append(grid.alpha, grid.alpha_end)


def _orders(grid: Grid, order: int, first_order_to_0: bool) -> NDArray[np.integer]:
    """The order of each step: as many estimates as there are, at most `order`; 1 to sigma = 0 if asked for."""
    one_of("order", order, (1, 2, 3, 4))
    orders = np.minimum(order, np.arange(len(grid)) + 1)
    return np.where((grid.sigma_next == 0) & first_order_to_0, 1, orders)


def _by_call(weights: Array) -> Array:
    """The weights of the four newest estimates, (4, N), as those of each call's estimate in each row, (N, N)."""
    by_call, i = np.zeros((weights.shape[1],) * 2), np.arange(weights.shape[1])
    for age, column in enumerate(weights):
        by_call[i[age:], i[age:] - age] = column[age:]
    return by_call


def _table(
    name: str,
    grid: Grid,
    by_call: Array,
    scaling: Scaling,
    correction: Correction,
    prediction: str,
    guidance: float,
    misses: Array | float = 0.0,
    ends_step: ArrayLike = 1.0,
) -> Table:
    """The table of x' = alpha'/alpha*x + the weights of each call's estimate of eps in each row, (N, N).

    misses: by how much the weights of a step, (N,), add up to more than the step of sigma/alpha. ends_step: (N,), 0 for a call
    that does not end one.
    """
    grid, columns = one_call(grid, len(grid), scaling, prediction, None, guidance, {}, keeps="eps")
    columns["c_x"] = grid.alpha_next / grid.alpha
    columns["excess"] = (grid.sigma_next + grid.alpha_next * misses) ** 2 - grid.sigma_next**2
    columns["ends_step"] = ends_step
    return make_table(name, grid, columns | solvers.delay_line(by_call), correction=correction)


@sampler(ON_A_PATH, IN_EPS)
def lms(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    order: int = 4,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """Linear multistep in r = sigma/alpha (k-diffusion's lms): Adams and Bashforth's method for steps of any length.

    alpha must be above 0 at every step.

    order: 1 to 4, of the last step too; the first steps are of orders 1, 2, 3.
    Raises ValueError naming the argument.
    """
    grid, r = _grid("lms", schedule, steps, space, grid_options)
    weights = solvers.adams(r, r, _orders(grid, order, False))
    return _table("lms", grid, _by_call(grid.alpha_next * weights), scaling, correction, prediction, guidance)


@sampler(ON_A_PATH, IN_EPS)
def ipndm(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    order: int = 4,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """IPNDM (arXiv 2204.13902, section 4): Adams and Bashforth's weights of equal steps, such as (55, -59, 37, -9)/24.

    alpha must be above 0 at every step.

    Raises ValueError naming the argument.
    """
    grid, r = _grid("ipndm", schedule, steps, space, grid_options)
    weights = solvers.adams(r, np.arange(len(grid) + 1.0), _orders(grid, order, True))
    return _table("ipndm", grid, _by_call(grid.alpha_next * weights), scaling, correction, prediction, guidance)


@sampler(ON_A_PATH, IN_EPS)
def ipndm_v(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    order: int = 4,
    weights: str = "published",
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """IPNDM for steps of any length (zju-pi's diff-sampler; ComfyUI's ipndm_v).

    alpha must be above 0 at every step.

    weights: "published", those of its code: of order two on unequal steps with order=3, and with order=4 not convergent there,
        since they do not add up to the step (`excess` says by how much the noise misses sigma); or "exact", Adams and
        Bashforth's, those of lms.
    Raises ValueError naming the argument.
    """
    one_of("weights", weights, ("published", "exact"))
    grid, r = _grid("ipndm_v", schedule, steps, space, grid_options)
    orders = _orders(grid, order, True)
    made = solvers.published_adams(r, orders) if weights == "published" else solvers.adams(r, r, orders)
    misses = made.sum(0) - np.diff(r)
    return _table("ipndm_v", grid, _by_call(grid.alpha_next * made), scaling, correction, prediction, guidance, misses)


@sampler(ON_A_PATH, IN_EPS)
def deis(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    order: int = 3,
    variable: str = "time",
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """DEIS (arXiv 2204.13902, eq. 14 and 15): eps is a polynomial in a variable of the path, and integrated exactly.

    alpha must be above 0 at every step.

    variable: "time", tAB-DEIS, t of the variance preserving SDE beta(t) = beta_min + beta_d*t with the same sigma/alpha;
        "log_rho", log(sigma/alpha), diffusers' choice; or "rho", rhoAB-DEIS, sigma/alpha.
    beta_d, beta_min: of the SDE whose time "time" is.
    Raises ValueError naming the argument.
    """
    one_of("variable", variable, ("time", "log_rho", "rho"))
    beta_d, beta_min = number("beta_d", beta_d, 0), number("beta_min", beta_min)
    if beta_d == 0:
        raise ValueError("beta_d: expected a value above 0, got 0")
    grid, r = _grid("deis", schedule, steps, space, grid_options)
    variables: dict[str, Callable[[Array], Array] | None] = {
        "time": lambda r: solvers.vp_time(r, beta_d, beta_min), "log_rho": np.log, "rho": None,
    }  # fmt: skip
    u_of = variables[variable]
    with np.errstate(divide="ignore"):
        u = r if u_of is None else u_of(r)
    weights = solvers.adams(r, u, _orders(grid, order, True), u_of)
    return _table("deis", grid, _by_call(grid.alpha_next * weights), scaling, correction, prediction, guidance)


@sampler(ON_A_PATH, IN_EPS)
def gradient_estimation(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    gamma: float = 2.0,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """Gradient estimation (Permenter and Yuan, arXiv 2306.04848, alg. 2): Euler's step with gamma*eps + (1 - gamma)*(eps
    before).

    The first step and one to sigma = 0 are Euler's. alpha must be above 0 at every step.

    gamma: the share of the newest eps; 1 is euler.
    Raises ValueError naming the argument.
    """
    gamma = number("gamma", gamma)
    grid, r = _grid("gradient_estimation", schedule, steps, space, grid_options)
    more = np.where(_orders(grid, 2, True) == 2, gamma - 1, 0.0)
    zero = np.zeros(len(grid))
    weights = np.diff(r) * np.array([1 + more, -more, zero, zero])
    return _table(
        "gradient_estimation", grid, _by_call(grid.alpha_next * weights), scaling, correction, prediction, guidance
    )


@sampler(ON_A_PATH, IN_EPS)
def plms(
    schedule: Schedule,
    steps: Steps,
    *,
    scaling: Scaling = 1.0,
    correction: Correction = None,
    prediction: str = "epsilon",
    guidance: float = 1.0,
    space: str = "vp",
    **grid_options: Any,
) -> Table:
    """PLMS (PNDM, arXiv 2202.09778, eq. 12; latent diffusion's): IPNDM's weights, but a first step of two calls.

    There are steps + 1 calls, a row each. The first step goes again by the mean of eps at its two ends, of which the history
    keeps the first; the other steps are of orders 2, 3 and 4, the last too. lambda_t of the first step is that of both its
    calls. alpha must be above 0 at every step.

    Raises ValueError naming the argument.
    """
    grid, r = _grid("plms", schedule, steps, space, grid_options)
    i = np.arange(len(grid))
    second = i[1:2]  # the extra call, unless there is one step alone: as row 1, at the first step's end
    by_call = _by_call(grid.alpha_next * solvers.adams(r, np.arange(len(grid) + 1.0), _orders(grid, 4, False)))
    by_call = np.insert(np.insert(by_call, second, 0.0, axis=0), second, 0.0, axis=1)
    by_call[second, second] = by_call[0, 0] / 2
    by_call[second, 0] = -by_call[0, 0] / 2
    calls = points(grid, np.insert(i, second, 1))
    lambda_t = lambdas_of_calls(scaling, grid, prediction, calls, np.insert(i, second, 0))
    ends = (np.arange(len(calls)) != 0) | (len(second) == 0)
    scaling = array(lambda_t, origin="noisiest")
    return _table("plms", calls, by_call, scaling, correction, prediction, guidance, ends_step=ends)
