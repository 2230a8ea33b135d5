"""Exponential integrators: DPM-Solver and DPM-Solver++, of one step or several, ER-SDE."""

from collections.abc import Callable, Sequence

import numpy as np

from ..typing import Array
from .one_step import Numbers, ancestral, basis, first_order

# ---- exponential integrators: h = log SNR(next) - log SNR, of which each is three integrals ----


def log_snr(alpha: Numbers, sigma: Array) -> Array:
    """log(alpha/sigma), the lambda of DPM-Solver's papers: -inf where alpha is 0, inf where sigma is."""
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def integrals(scale_next: Numbers, z: Array) -> tuple[Array, Array, Array]:
    """(a, b, c): the weights of m0 and of its first two derivatives over a step.

    x_0 integrated (DPM-Solver++, arXiv 2211.01095; its SDE): scale_next = alpha_next, z = -(1 + eta)*h. eps (DPM-Solver,
    arXiv 2206.00927): scale_next = sigma_next, z = h. Finite where x_0 is and h infinite.
    """
    first = np.expm1(z)
    second = first / z - 1
    return -scale_next * first, -scale_next * second, -scale_next * (second / z - 0.5)


def earlier(h: Array, steps: int) -> Array:
    """The step lengths of so many steps before; NaN where there were none."""
    return np.concatenate([np.full(min(steps, len(h)), np.nan), h[: max(len(h) - steps, 0)]])


def differences(h: Array, h1: Array, h2: Array) -> tuple[Array, Array, Array]:
    """Weights of (m0, m1, m2) in DPM-Solver's D1 of order two, D1 of order three and D2, each (3, N).

    h: this step's length, h1 and h2: those of the two steps before (arXiv 2211.01095, eq. 9; its multistep third order).
    """
    zero = np.zeros_like(h)
    first, before = np.array([h / h1, -h / h1, zero]), np.array([zero, h / h2, -h / h2])  # divided differences
    r0, r1 = h1 / h, h2 / h
    return first, first + r0 / (r0 + r1) * (first - before), (first - before) / (r0 + r1)


def multistep(
    h: Array, integrals: tuple[Array, Array, Array], solver: str, second_difference: float = 1.0
) -> dict[int, Array]:
    """{order: weights of (m0, m1, m2), (3, N)} of DPM-Solver's multistep methods.

    h: (N,) step lengths. integrals: (a, b, c). solver: "midpoint" or "heun", of order two. second_difference: what counts of
    c in order three: 1 as published, 2 for order three in fact.
    """
    a, b, c = integrals
    D1, D1_of_3, D2 = differences(h, earlier(h, 1), earlier(h, 2))
    first = np.array([a, np.zeros_like(h), np.zeros_like(h)])
    return {
        1: first,
        2: first + (0.5 * a if solver == "midpoint" else b) * D1,
        3: first + b * D1_of_3 + second_difference * c * D2,
    }


def decay(h: Array, eta: float) -> Array:
    """exp(-eta*h), of x in the reverse SDE; 1 without noise, also where h is infinite."""
    return np.exp(-eta * h) if eta else np.ones_like(h)


def sde_noise(sigma_next: Array, h: Array, eta: float, by_x0: bool = True) -> Array:
    """The noise's standard deviation over a step of the reverse SDE, (N,).

    by_x0: whether x_0 is integrated, or eps (eta is 1 then).
    """
    return sigma_next * np.sqrt(-np.expm1(-2 * eta * h) if by_x0 else np.expm1(2 * h))


def singlestep(
    alpha: Numbers,
    sigma: Array,
    stages: Sequence[tuple[Numbers, Array]],
    *,
    by_x0: bool = True,
    solver: str = "midpoint",
    eta: float = 0.0,
) -> list[Array]:
    """DPM-Solver's steps with one to three calls: the states at the stages' ends, each (4, N).

    They are shares of the step's first x and of its calls' m, the oldest first; `from_before` makes rows of them. stages:
    (alpha, sigma) where each stage ends. by_x0: whether x_0 is integrated or eps. solver: "midpoint" or "heun", of two stages.
    eta: of the reverse SDE, whose noise is left out here. Source: DPM-Solver (arXiv 2206.00927, alg. 1, 2, 4, 5), DPM-Solver++
    (arXiv 2211.01095, alg. 1), SEEDS (arXiv 2305.14267).
    """
    x, *m = basis(sigma)
    h = [log_snr(*end) - log_snr(alpha, sigma) for end in stages]
    estimates: list[Array] = []  # of x_0, or eps, in each call
    states: list[Array] = []
    for k, (alpha_k, sigma_k) in enumerate(stages):
        at, scale_alpha, scale_sigma = (x, alpha, sigma) if k == 0 else (states[-1], *stages[k - 1])
        estimates.append(m[k] if by_x0 else (at - scale_alpha * m[k]) / scale_sigma)
        z = -(1 + eta) * h[k] if by_x0 else h[k]
        weights = stage(
            integrals(alpha_k if by_x0 else sigma_k, z),
            h[k],
            h[:k][::-1],
            solver if len(stages) == 2 or k == 2 else "heun",
        )
        kept = sigma_k / sigma * decay(h[k], eta) if by_x0 else alpha_k / alpha
        states.append(kept * x + sum(weights[age] * estimates[k - age] for age in range(k + 1)))
    return states


def stage(integrals: tuple[Array, Array, Array], h: Array, gaps: Sequence[Array], solver: str) -> Array:
    """DPM-Solver's weights of a step's estimates in the state that one of its calls leads to, (3, N), the newest first.

    h: from the step's start to that state, in log SNR. gaps: from the start to the step's later calls, the newest first: none
    to two. solver: "midpoint" counts the newest estimate's difference alone, "heun" is exact for polynomials. Source: as
    `singlestep`.
    """
    a, b, c = integrals
    zero = np.zeros_like(h)
    if not gaps:
        return np.array([a, zero, zero])
    r0 = gaps[0] / h
    if len(gaps) == 1:
        newest = (a / 2 if solver == "midpoint" else b) / r0
        return np.array([newest, a - newest, zero])
    if solver == "midpoint":
        return np.array([b / r0, zero, a - b / r0])
    r1 = gaps[1] / h
    newest, middle = (2 * c - b * r1) / (r0 * (r0 - r1)), (b * r0 - 2 * c) / (r1 * (r0 - r1))
    return np.array([newest, middle, a - newest - middle])


def two_noises(
    sigma: Array, sigma_middle: Array, sigma_next: Array, eta: float, r: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """k-diffusion's dpmpp_sde on x = x_0 + sigma*eps: the rows of a step's two calls, each ancestral from the step's first x.

    The second does not carry the first one's noise on, so the first x travels as y. r: where the middle lies in log SNR.
    The noise is in c_noise. Source: DPM-Solver++(2S) (arXiv 2211.01095, alg. 1), as an SDE in k-diffusion.
    """
    down, up = ancestral(1.0, sigma, 1.0, sigma_middle, eta)
    first = dict(zip(("c_x", "c_m0"), first_order(1.0, sigma, 1.0, down), strict=True))
    first |= {"c_noise": up, "k_x": np.ones_like(sigma)}
    down, up = ancestral(1.0, sigma, 1.0, sigma_next, eta)
    kept, of_m = first_order(1.0, sigma, 1.0, down)
    newest = 1 / (2 * r)
    second = {"c_x": np.zeros_like(sigma), "c_y": kept, "c_m0": of_m * newest, "c_m1": of_m * (1 - newest)}
    return first, second | {"c_noise": up}


def quadrature(start: Array, end: Array) -> tuple[Array, Array]:
    """Gauss and Legendre's points and weights between start and end, (N,) each: (N, 64) both.

    Exact for polynomials, and to rounding for what is as smooth as an exponential over a step.
    """
    at, weights = np.polynomial.legendre.leggauss(64)
    half = (end - start)[:, None] / 2
    return (start + end)[:, None] / 2 + half * at, half * weights


# ---- ER-SDE ----


def er_noise_scale(r: Array) -> Array:
    """The authors' fifth phi of r = sigma/alpha, r*(exp(r^0.3) + 10) (arXiv 2309.06169, the scale that its code samples with)."""
    return r * (np.exp(r**0.3) + 10)


def er_sde(r: Array, r_next: Array, scaler: Callable[[Array], Array]) -> tuple[Array, Array, dict[int, Array]]:
    """(kept, noise, {order: weights of m0, m1, m2, (3, N)}) of x'/alpha' = kept*x/alpha + weights + noise*z.

    r, r_next: (N,). scaler: phi of r; kept = phi(r')/phi(r), and phi(r) = r is the probability flow. Source: Cui et al., arXiv
    2309.06169, ER-SDE-Solver-1 to 3 (variance preserving); its integrals by Gauss and Legendre. D is the slope half a step
    back, as published, so that order three is of order two in fact.
    """
    zero = np.zeros_like(r)
    kept = scaler(r_next) / scaler(r)
    noise = np.sqrt(np.maximum(r_next**2 - (r * kept) ** 2, 0))
    at, counts = quadrature(np.log(r_next), np.log(r))
    at, counts = np.exp(at), counts * np.exp(at)
    by_scaler, by_distance = (counts / scaler(at)).sum(1), (counts * (at - r[:, None]) / scaler(at)).sum(1)
    step, scaled = r_next - r, scaler(r_next)
    r1, r2 = earlier(r, 1), earlier(r, 2)
    one, two = 1 / (r - r1), 1 / (r1 - r2)
    D = np.array([one, -one, zero])  # the slope of the estimate, and its change
    U = (D - np.array([zero, two, -two])) / ((r - r2) / 2)
    first = np.array([1 - kept, zero, zero])
    second = first + (step + by_scaler * scaled) * D
    return kept, noise, {1: first, 2: second, 3: second + (step**2 / 2 + by_distance * scaled) * U}
