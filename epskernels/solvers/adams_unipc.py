"""Linear multistep, SA-Solver, UniPC: polynomials through what earlier calls gave."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..typing import Array
from .exponential import earlier, quadrature

# ---- linear multistep: the polynomial through the last estimates of eps, integrated ----


def lagrange(nodes: Sequence[Array], at: Array, weights: Array) -> Array:
    """The integrals of the Lagrange polynomials of the nodes, (nodes, N).

    nodes: (N,) each. at, weights: (N, points), where the polynomials are taken, and what each point counts.
    """
    found = []
    for k, node in enumerate(nodes):
        others = [*nodes[:k], *nodes[k + 1 :]]
        factors = [(at - other[:, None]) / (node - other)[:, None] for other in others]
        found.append((weights * np.prod(factors, axis=0)).sum(1))
    return np.array(found)


def adams(r: Array, u: Array, order: NDArray[np.integer], u_of: Callable[[Array], Array] | None = None) -> Array:
    """Adams and Bashforth's weights of the four newest estimates of eps in r' - r = sum of w_k*eps_k: (4, N), the newest first.

    The polynomial in u through the last `order` estimates is integrated, since x/alpha has slope eps in r. r, u: (N + 1,), of
    the calls and of the end. order: (N,), 1 to 4; 1 where a step ends at r = 0 and u_of is given. u_of: u of r; without it u
    counts as linear in r within a step. u = r is LMS and rhoAB-DEIS, u = log(r) or the time of a schedule tAB-DEIS (arXiv
    2204.13902, eq. 15), and the steps' numbers, 0, 1, ..., the weights of PLMS and IPNDM (arXiv 2202.09778, eq. 12).
    """
    weights = np.zeros((4, len(order)))
    weights[0] = np.diff(r)
    for most in range(2, 5):
        i = np.flatnonzero(order == most)
        if u_of is None:
            at, counts = quadrature(u[i], u[i + 1])
            du = np.where(u[i + 1] == u[i], 1.0, u[i + 1] - u[i])  # over a step of length 0 all is 0
            counts = counts * ((r[i + 1] - r[i]) / du)[:, None]
        else:  # over log(r), in which the times of schedules are smooth
            at, counts = quadrature(np.log(r[i]), np.log(r[i + 1]))
            at, counts = u_of(np.exp(at)), counts * np.exp(at)
        weights[:most, i] = lagrange([u[i - k] for k in range(most)], at, counts)
    return weights


def published_adams(r: Array, order: NDArray[np.integer]) -> Array:
    """IPNDM's weights for steps of any length as its code has them, (4, N), as `adams` returns them. r: (N + 1,).

    Those of order three are the integrals of Lagrange's polynomials on equal steps alone, those of order four never, and on
    unequal steps they do not add up to the step. Source: zju-pi's diff-sampler, ipndm_v.
    """
    h = np.diff(r)
    h1, h2, h3 = earlier(h, 1), earlier(h, 2), earlier(h, 3)
    zero = np.zeros_like(h)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_1, by_2 = h1 / h2, h1 * (h1 + h2) / (h2 * (h2 + h3))
        two = np.array([1 + h / h1 / 2, -h / h1 / 2, zero, zero])
        t1 = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        three = two + t1 * np.array([zero + 1, -1 - by_1, by_1, zero])
        t2 = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        t2 *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        four = three + t2 * np.array([zero + 1, -1 - by_1 - by_2, by_1 + by_2 * (1 + h2 / h3), -by_2 * by_1])
    one = np.array([zero + 1, zero, zero, zero])
    return h * of_order(order, {1: one, 2: two, 3: three, 4: four})


def delay_line(by_call: Array) -> dict[str, Array]:
    """The columns of rows that read the estimates of earlier calls: c_m0, c_m1, c_m2, and for an older one c_y, k_m2 and k_y.

    by_call: (R, R), the weight in row i of call j's estimate, of which each row reads one at most that is older than two calls.
    It travels as y: a row puts m2 there once it is needed later (k_m2 = 1), or hands y on (k_y = 1). y_eps and y_out_eps say
    where y holds an estimate of eps.
    """
    rows = len(by_call)
    columns = {key: np.zeros(rows) for key in ("c_m0", "c_m1", "c_m2", "c_y", "k_m2", "k_y")}
    held = np.full(rows, -1)  # the call whose estimate y holds when the row reads it
    for i, weights in enumerate(by_call):
        for age in range(min(3, i + 1)):
            columns[f"c_m{age}"][i] = weights[i - age]
        for j in np.flatnonzero(weights[: max(i - 2, 0)]):
            columns["c_y"][i], held[i] = weights[j], j
    for i in range(rows - 1, 0, -1):
        if held[i] >= 0:
            age = i - 1 - held[i]
            columns["k_m2" if age == 2 else "k_y"][i - 1] = 1.0
            held[i - 1] = held[i] if age > 2 else held[i - 1]
    columns["y_out_eps"] = columns["k_m2"] + columns["k_y"]
    columns["y_eps"] = np.append(0.0, columns["y_out_eps"][:-1])
    return columns


def vp_time(r: Array, beta_d: float, beta_min: float) -> Array:
    """The t where the variance preserving SDE of beta(t) = beta_min + beta_d*t has the ratio r (arXiv 2011.13456, eq. 33)."""
    return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(r**2)) - beta_min) / beta_d


# ---- SA-Solver ----


def stochastic_adams(
    h: Array, scale_next: Array, tau: Array, by_x0: bool = True, simplified: bool = False
) -> tuple[dict[int, Array], dict[int, tuple[Array, Array]]]:
    """SA-Solver's weights for each order: of m0, m1, m2, (3, N), in the predictor; those and that of m_next, (N,), in the
    corrector.

    The predictor has orders 1 to 3, the corrector 1 to 4. h: (N,) step lengths in log SNR. scale_next: alpha_next, or
    sigma_next where eps is integrated (by_x0 False). tau: of each step's noise, (N,). The polynomial of x_0 through the
    estimates is integrated, times (1 + tau^2)*exp((1 + tau^2)*(lambda - lambda_next)); that of eps, times -(1 + tau^2)*
    exp(lambda_next - lambda). simplified: order two of x_0 as the authors' code has it, which adds terms of higher order.
    Source: Xue et al., arXiv 2309.05019, eq. 15 and 18; for eps its authors' code.
    """
    zero = np.zeros_like(h)
    speed = (1 + tau**2)[:, None]
    at, counts = quadrature(zero, h)
    rate = speed if by_x0 else -np.ones_like(speed)
    counts = counts * (speed if by_x0 else -speed) * np.exp(rate * (at - h[:, None])) * scale_next[:, None]
    nodes = [zero, -earlier(h, 1), -earlier(h, 1) - earlier(h, 2)]

    def padded(weights: Array) -> Array:
        return np.concatenate([weights, np.zeros((3 - len(weights), len(h)))])

    predictors = {order: padded(lagrange(nodes[:order], at, counts)) for order in (1, 2, 3)}
    correctors = {}
    for order in (1, 2, 3, 4):
        of_next, *others = lagrange([h, *nodes[: order - 1]], at, counts)
        correctors[order] = padded(np.array(others).reshape(-1, len(h))), of_next
    if by_x0 and simplified:
        v = 1 + tau**2
        more = scale_next * (v * h**2 / 2 - h - np.expm1(-v * h) / v)
        with np.errstate(invalid="ignore", divide="ignore"):  # of steps of length 0, whose corrector nobody asks for
            of_step, of_earlier = more / h, more / earlier(h, 1)
        predictors[2] += of_earlier * np.array([[1.0], [-1.0], [0.0]])
        weights, of_next = correctors[2]
        correctors[2] = weights - of_step * np.array([[1.0], [0.0], [0.0]]), of_next + of_step
    return predictors, correctors


def corrected_later(A: Array, P: Array, Q: Array, of_next: Array) -> dict[str, Array]:
    """SA-Solver's columns by name: y carries by how much the corrector's share of known estimates differs from the predictor's.

    The state that a row finds is the predicted one, with its noise; the corrected one is x + y + of_next*m0. A: x's factor. P:
    the predictor's weights, (3, N). Q, (3, N), and of_next: the corrector's over the same step, and its weight of the next
    call's m0; 0 where no corrector follows.
    """
    corrects = np.append(False, of_next[:-1] != 0)
    completed = np.where(corrects, np.append(0.0, of_next[:-1]), 0.0)
    known = np.where(of_next != 0, Q - P, 0.0)
    return {
        "c_x": A, "c_y": np.where(corrects, A, 0.0), "c_m0": A * completed + P[0], "c_m1": P[1], "c_m2": P[2],
        "k_m0": known[0], "k_m1": known[1], "k_m2": known[2],
        "y_out_x0": known.sum(0), "y_x0": np.append(0.0, known.sum(0)[:-1]),
    }  # fmt: skip


# ---- UniPC ----


def bh_weights(hh: Array, ratios: Sequence[Array], order: int, solver: str, correct: bool) -> list[Array]:
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
    r = np.stack([*ratios[: order - 1], np.ones_like(hh)], axis=-1)[:, :size].clip(
        -1e30, 1e30
    )  # after a step from alpha 0
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


def bh_updates(
    h: Array, first: Array, scale_next: Array, most: int, solver: str, by_x0: bool = True
) -> tuple[dict[int, Array], dict[int, tuple[Array, Array]]]:
    """UniPC's updates A*x + ... for each order up to `most`: {order: weights of m0, m1, m2, (3, N)} of the predictor, and
    {order: (weights, that of m_next, (N,))} of the corrector.

    h: (N,) step lengths. first: m0's weight in the first order, alpha_next - A*alpha, or sigma_next - A*sigma where eps is
    predicted. scale_next: alpha_next, or sigma_next.
    """
    h1, h2, none = earlier(h, 1), earlier(h, 2), np.zeros_like(h)
    hh, ratios = -h if by_x0 else h, [-h1 / h, -(h1 + h2) / h]

    def update(order: int, correct: bool) -> tuple[Array, Array]:
        rho = bh_weights(hh, ratios, order, solver, correct)
        weights, of_next = np.array([first, none, none]), rho.pop() if correct else none
        for k, B_rho in enumerate(rho):
            weights[0] += scale_next * B_rho / ratios[k]
            weights[k + 1] -= scale_next * B_rho / ratios[k]
        weights[0] += scale_next * of_next
        return weights, -scale_next * of_next

    orders = range(1, most + 1)
    return {order: update(order, False)[0] for order in orders}, {order: update(order, True) for order in orders}


def of_order(order: NDArray[np.integer], updates: Mapping[int, Array]) -> Array:
    """The weights of each step's order, (3, N). order: (N,); 0 for a step of none, whose weights are 0."""
    return np.select([order == k for k in updates], list(updates.values()))


def predictor_corrector(
    A: Array, P: Array, Q: Array, of_before: Array, corrects: NDArray[np.bool_], corrects_next: NDArray[np.bool_]
) -> dict[str, Array]:
    """UniPC's columns by name: y carries the part of the corrected state that is known before the model's call.

    A: x's factor. P: the predictor's weights, (3, N). Q: the corrector's, which the next call completes; 0 where it does not.
    of_before: this call's weight in the corrector of the step before. corrects, corrects_next: whether this call completes one,
    and the next.
    """
    kappa = np.where(corrects, of_before, 0.0)
    k = np.where(corrects_next, A, 0.0)
    return {
        "c_x": np.where(corrects, 0.0, A), "c_y": np.where(corrects, A, 0.0),
        "c_m0": A * kappa + P[0], "c_m1": P[1], "c_m2": P[2],
        "k_x": np.where(corrects, 0.0, k), "k_y": np.where(corrects, k, 0.0),
        "k_m0": k * kappa + Q[0], "k_m1": Q[1], "k_m2": Q[2],
    }  # fmt: skip
