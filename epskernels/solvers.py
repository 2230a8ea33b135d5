"""Each solver's step as weights, in float64: from x = alpha*x_0 + sigma*eps to x' = alpha_next*x_0 + sigma_next*eps.

    x' = c_x*x + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_noise*z          m: estimates of x_0 (or of eps), the newest first

Pure functions of arrays (N,): no schedule, no model, no lambda. `samplers` and the diffusers schedulers both call them, so that
a formula stands once. They do not judge their arguments: what is not finite in gives what is not finite out. r = sigma/alpha
throughout, the noise-to-signal ratio; h is a step's rise of log SNR = log(alpha/sigma).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .typing import Array

Numbers = Array | float  # (N,), or one number for all
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


# ---- what the network's output says of x_0 and eps ----


def model_output(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(f_x0, f_eps): the network's output as f_x0*x_0 + f_eps*eps, for x = alpha*x_0 + sigma*eps.

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


def determinant(f_x0: Array, f_eps: Array, alpha: Numbers, sigma: Array) -> Array:
    """Of the two equations for x and the output: 0 where they say nothing of x_0."""
    return alpha * f_eps - sigma * f_x0


def x0_of(f_x0: Array, f_eps: Array, alpha: Numbers, sigma: Array) -> tuple[Array, Array]:
    """(d_x, d_f) of x_0 = d_x*x + d_f*f."""
    D = determinant(f_x0, f_eps, alpha, sigma)
    return f_eps / D, -sigma / D


def eps_of(f_x0: Array, f_eps: Array, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(e_x, e_f) of eps = e_x*x + e_f*f."""
    D = determinant(f_x0, f_eps, alpha, sigma)
    return -f_x0 / D, alpha / D


def preconditioned(sigma: Array, sigma_data: float) -> tuple[Array, Array, Array]:
    """(c_skip, c_out, c_in) of EDM's denoiser c_skip*x + c_out*F(c_in*x) (arXiv 2206.00364, table 1)."""
    root = np.sqrt(sigma**2 + sigma_data**2)
    return (sigma_data / root) ** 2, sigma * sigma_data / root, 1 / root


def boundary(scaled_t: Array, sigma_data: float = 0.5) -> tuple[Array, Array]:
    """(c_skip, c_out) of a consistency model's x_0 = c_skip*x + c_out*m0 (arXiv 2310.04378, eq. 9)."""
    root = np.sqrt(scaled_t**2 + sigma_data**2)
    return (sigma_data / root) ** 2, scaled_t / root


# ---- first order: how much of x's own noise is kept ----


def first_order(alpha: Numbers, sigma: Array, alpha_next: Numbers, keep: Numbers) -> tuple[Array, Array]:
    """(c_x, c_m0) of a step that keeps the standard deviation `keep` of x's own noise; noise makes up the rest.

    keep is sigma_next in ddim, euler and flow_euler; the functions below give that of the others.
    """
    c_x = keep / sigma
    return c_x, alpha_next - c_x * alpha


def rest(sigma_next: Array, keep: Array) -> Array:
    """The noise that a first order step adds: keep^2 + noise^2 = sigma_next^2."""
    return np.sqrt(np.maximum(sigma_next**2 - keep**2, 0))


def posterior(
    alpha_ts: Array, variance_ts: Array, sigma: Array, alpha_next: Array, sigma_next: Array
) -> tuple[Array, Array, Array]:
    """(c_x, c_m0, variance) of x' given x and x_0 (DDPM, arXiv 2006.11239, eq. 6 and 7; Kingma et al., arXiv 2107.00630).

    alpha_ts = alpha/alpha_next, variance_ts = sigma^2 - alpha_ts^2*sigma_next^2: the chain's own step, sqrt(1 - beta) and beta.
    """
    kept = sigma_next**2 / sigma**2
    return alpha_ts * kept, alpha_next * variance_ts / sigma**2, variance_ts * kept


def chain(alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array) -> tuple[Array, Array]:
    """(alpha_ts, variance_ts) of `posterior`."""
    alpha_ts = alpha / alpha_next
    return alpha_ts, sigma**2 - alpha_ts**2 * sigma_next**2


def ancestral(alpha: Numbers, sigma: Array, alpha_next: Numbers, sigma_next: Array, eta: float) -> tuple[Array, Array]:
    """(sigma_down, sigma_up): Euler down, then noise up (k-diffusion); eta = 1 is the posterior's variance.

    With r = sigma/alpha: up^2 = min(r_next^2, eta^2*r_next^2*(r^2 - r_next^2)/r^2)*alpha_next^2. Finite where alpha is 0.
    """
    shrunk = np.clip(1 - (sigma_next * alpha / (alpha_next * sigma)) ** 2, 0, 1)
    up = sigma_next * np.minimum(1, eta * np.sqrt(shrunk))
    return rest(sigma_next, up), up


# ---- two model calls in a step ----


def churned(sigma: Array, steps: int, S_churn: float, S_min: float, S_max: float) -> Array:
    """sigma_hat, each level once churn has raised it, (N,) (arXiv 2206.00364, alg. 2). steps: by which S_churn is divided."""
    gamma = min(S_churn / steps, np.sqrt(2) - 1)
    return np.where((S_min <= sigma) & (sigma <= S_max), sigma * (1 + gamma), sigma)


def heun_correction(alpha: Numbers, sigma: Array, alpha_next: Numbers, sigma_next: Array) -> Array:
    """kappa of x'' = x' + kappa*(m0 - m1): Heun's second half, x' what Euler's step made of m1, m0 the estimate there."""
    return (sigma / alpha - sigma_next / alpha_next) * alpha_next**2 / (2 * sigma_next)


def trapezoid(sigma: Array, sigma_next: Array) -> tuple[Array, Array, Array, Array]:
    """(c_y, c_m1, c_x, c_m0) of Heun's second half from where the step began, y; x = x_0 + sigma*eps."""
    half = (sigma_next - sigma) / 2
    return 1 + half / sigma, -half / sigma, half / sigma_next, -half / sigma_next


def probed(sigma: Array, sigma_middle: Array, sigma_next: Array) -> list[Array]:
    """DPM-Solver-2 as k-diffusion has it, on x = x_0 + sigma*eps: Euler to the middle, then the whole step by the slope there.

    Returns the states at the two ends, each (4, N): the shares of the step's first x and of its calls' m. `from_before` makes
    rows of them. Source: Karras et al., arXiv 2206.00364, alg. 2, with the slope taken at another point (k-diffusion's dpm_2).
    """
    x, m_0, m_1, _ = basis(sigma)
    middle = x + (sigma_middle - sigma) * (x - m_0) / sigma
    return [middle, x + (sigma_next - sigma) * (middle - m_1) / sigma_middle]


# ---- linear multistep: the polynomial through the last estimates of eps, integrated ----


def quadrature(start: Array, end: Array) -> tuple[Array, Array]:
    """Gauss and Legendre's points and weights between start and end, (N,) each: (N, 64) both.

    Exact for polynomials, and to rounding for what is as smooth as an exponential over a step.
    """
    at, weights = np.polynomial.legendre.leggauss(64)
    half = (end - start)[:, None] / 2
    return (start + end)[:, None] / 2 + half * at, half * weights


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


def basis(like: Array) -> Array:
    """A step's first state and the m of its calls, the oldest first, as shares of themselves: (4, 4, N)."""
    return np.eye(4)[:, :, None] * np.ones_like(like)


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


def from_before(states: Sequence[Array]) -> list[dict[str, Array]]:
    """Each stage's row by the state that it finds, and m0, m1, m2, from the states as shares of the step's first x and its m.

    A stage's state holds the first x, so that no tensor has to carry it. Noise that was added to it is carried on too.
    """
    before, rows = basis(states[0][0])[0], []
    for k, state in enumerate(states):
        c_x = state[0] / before[0]
        weights = state - c_x * before
        rows.append({"c_x": c_x} | {f"c_m{age}": weights[k + 1 - age] for age in range(k + 1)})
        before = state
    return rows


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


# ---- flows ----


def flow_down(sigma: Array, sigma_next: Array, eta: float, draws: np.ndarray | bool) -> tuple[Array, Array, Array]:
    """(sigma_down, scale, noise) of an ancestral step on x = (1 - sigma)*x_0 + sigma*eps; without `draws` it ends at sigma_down.

    The step leads to sigma_down = sigma_next*(1 + eta*(sigma_next/sigma - 1)); `scale` on all brings the share of x_0 to 1 -
    sigma_next, and noise the rest. Source: ComfyUI's and LTX-Video's euler_ancestral for rectified flows.
    """
    down = sigma_next * (1 + eta * (sigma_next / sigma - 1))
    scale = np.where(draws, (1 - sigma_next) / (1 - down), 1.0)
    return down, scale, np.where(draws, rest(sigma_next, scale * down), 0.0)


def flow_ancestral(sigma: Array, sigma_next: Array, eta: float, draws: np.ndarray | bool) -> tuple[Array, Array, Array]:
    """(c_x, c_m0, noise) of an ancestral step of Euler's on x = (1 - sigma)*x_0 + sigma*eps, by `flow_down`."""
    down, scale, noise = flow_down(sigma, sigma_next, eta, draws)
    c_x = scale * down / sigma
    return c_x, scale - c_x, noise


def consistency_boundary(sigma: Array, sigma_min: float, sigma_data: float) -> tuple[Array, Array]:
    """(c_skip, c_out) of x_0 = c_skip*x + c_out*F, which is x at sigma_min (consistency models, arXiv 2303.01469, app. C)."""
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    return c_skip, (sigma - sigma_min) * sigma_data / np.sqrt(sigma**2 + sigma_data**2)


def trigonometric(t: Array) -> tuple[Array, Array]:
    """(alpha, sigma) of TrigFlow's x = cos(t)*x_0 + sin(t)*eps, eps of the data's deviation (arXiv 2410.11081, eq. 4)."""
    return np.cos(t), np.sin(t)
