"""Each solver's step as weights, in float64: from x = alpha*x_0 + sigma*eps to x' = alpha_next*x_0 + sigma_next*eps.

    x' = c_x*x + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_noise*z          m: estimates of x_0 (or of eps), the newest first

Pure functions of arrays (N,): no schedule, no model, no lambda. `samplers` and the diffusers schedulers both call them, so that a
formula stands once. They do not judge their arguments: what is not finite in gives what is not finite out.
"""

import numpy as np

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


# ---- what the network's output says of x_0 and eps ----


def model_output(prediction, alpha, sigma):
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


def determinant(f_x0, f_eps, alpha, sigma):
    """Of the two equations for x and the output: 0 where they say nothing of x_0."""
    return alpha * f_eps - sigma * f_x0


def x0_of(f_x0, f_eps, alpha, sigma):
    """(d_x, d_f) of x_0 = d_x*x + d_f*f."""
    D = determinant(f_x0, f_eps, alpha, sigma)
    return f_eps / D, -sigma / D


def eps_of(f_x0, f_eps, alpha, sigma):
    """(e_x, e_f) of eps = e_x*x + e_f*f."""
    D = determinant(f_x0, f_eps, alpha, sigma)
    return -f_x0 / D, alpha / D


def preconditioned(sigma, sigma_data):
    """(c_skip, c_out, c_in) of EDM's denoiser c_skip*x + c_out*F(c_in*x) (arXiv 2206.00364, table 1)."""
    root = np.sqrt(sigma**2 + sigma_data**2)
    return (sigma_data / root) ** 2, sigma * sigma_data / root, 1 / root


def boundary(scaled_t, sigma_data=0.5):
    """(c_skip, c_out) of a consistency model's x_0 = c_skip*x + c_out*m0 (arXiv 2310.04378, eq. 9)."""
    root = np.sqrt(scaled_t**2 + sigma_data**2)
    return (sigma_data / root) ** 2, scaled_t / root


# ---- first order: how much of x's own noise is kept ----


def first_order(alpha, sigma, alpha_next, keep):
    """(c_x, c_m0) of a step that keeps the standard deviation `keep` of x's own noise; noise makes up the rest.

    keep is sigma_next in ddim, euler and flow_euler; the functions below give that of the others.
    """
    c_x = keep / sigma
    return c_x, alpha_next - c_x * alpha


def rest(sigma_next, keep):
    """The noise that a first order step adds: keep^2 + noise^2 = sigma_next^2."""
    return np.sqrt(np.maximum(sigma_next**2 - keep**2, 0))


def posterior(alpha_ts, variance_ts, sigma, alpha_next, sigma_next):
    """(c_x, c_m0, variance) of x' given x and x_0 (DDPM, arXiv 2006.11239, eq. 6 and 7; Kingma et al., arXiv 2107.00630).

    alpha_ts = alpha/alpha_next, variance_ts = sigma^2 - alpha_ts^2*sigma_next^2: the chain's own step, sqrt(1 - beta) and beta.
    """
    kept = sigma_next**2 / sigma**2
    return alpha_ts * kept, alpha_next * variance_ts / sigma**2, variance_ts * kept


def chain(alpha, sigma, alpha_next, sigma_next):
    """(alpha_ts, variance_ts) of `posterior`."""
    alpha_ts = alpha / alpha_next
    return alpha_ts, sigma**2 - alpha_ts**2 * sigma_next**2


def ancestral(alpha, sigma, alpha_next, sigma_next, eta):
    """(sigma_down, sigma_up): Euler down, then noise up (k-diffusion); eta = 1 is the posterior's variance.

    With r = sigma/alpha: up^2 = min(r_next^2, eta^2*r_next^2*(r^2 - r_next^2)/r^2)*alpha_next^2. Finite where alpha is 0.
    """
    shrunk = np.clip(1 - (sigma_next * alpha / (alpha_next * sigma)) ** 2, 0, 1)
    up = sigma_next * np.minimum(1, eta * np.sqrt(shrunk))
    return rest(sigma_next, up), up


# ---- two model calls in a step ----


def heun_correction(alpha, sigma, alpha_next, sigma_next):
    """kappa of x'' = x' + kappa*(m0 - m1): Heun's second half, x' what Euler's step made of m1, m0 the estimate there."""
    return (sigma / alpha - sigma_next / alpha_next) * alpha_next**2 / (2 * sigma_next)


def trapezoid(sigma, sigma_next):
    """(c_y, c_m1, c_x, c_m0) of Heun's second half from where the step began, y; x = x_0 + sigma*eps."""
    half = (sigma_next - sigma) / 2
    return 1 + half / sigma, -half / sigma, half / sigma_next, -half / sigma_next


# ---- exponential integrators: h = log SNR(next) - log SNR, of which each is three integrals ----


def log_snr(alpha, sigma):
    """log(alpha/sigma), the lambda of DPM-Solver's papers: -inf where alpha is 0, inf where sigma is."""
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def integrals(scale_next, z):
    """(a, b, c): the weights of m0 and of its first two derivatives over a step.

    x_0 integrated (DPM-Solver++, arXiv 2211.01095; its SDE): scale_next = alpha_next, z = -(1 + eta)*h. eps (DPM-Solver,
    arXiv 2206.00927): scale_next = sigma_next, z = h. Finite where x_0 is and h infinite.
    """
    first = np.expm1(z)
    second = first / z - 1
    return -scale_next * first, -scale_next * second, -scale_next * (second / z - 0.5)


def earlier(h, steps):
    """The step lengths of so many steps before; NaN where there were none."""
    return np.concatenate([np.full(min(steps, len(h)), np.nan), h[: max(len(h) - steps, 0)]])


def differences(h, h1, h2):
    """Weights of (m0, m1, m2) in DPM-Solver's D1 of order two, D1 of order three and D2, each (3, N).

    h: this step's length, h1 and h2: those of the two steps before (arXiv 2211.01095, eq. 9; its multistep third order).
    """
    zero = np.zeros_like(h)
    first, before = np.array([h / h1, -h / h1, zero]), np.array([zero, h / h2, -h / h2])  # divided differences
    r0, r1 = h1 / h, h2 / h
    return first, first + r0 / (r0 + r1) * (first - before), (first - before) / (r0 + r1)


def multistep(h, integrals, solver, second_difference=1.0):
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


def decay(h, eta):
    """exp(-eta*h), of x in the reverse SDE; 1 without noise, also where h is infinite."""
    return np.exp(-eta * h) if eta else np.ones_like(h)


def sde_noise(sigma_next, h, eta, by_x0=True):
    """The noise's standard deviation over a step of the reverse SDE. by_x0: whether x_0 is integrated, or eps (eta is 1 then)."""
    return sigma_next * np.sqrt(-np.expm1(-2 * eta * h) if by_x0 else np.expm1(2 * h))


# ---- UniPC ----


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


def bh_updates(h, first, scale_next, most, solver, by_x0=True):
    """UniPC's updates A*x + ... for each order up to `most`: {order: weights of m0, m1, m2, (3, N)} of the predictor, and
    {order: (weights, that of m_next, (N,))} of the corrector.

    h: (N,) step lengths. first: m0's weight in the first order, alpha_next - A*alpha, or sigma_next - A*sigma where eps is
    predicted. scale_next: alpha_next, or sigma_next.
    """
    h1, h2, none = earlier(h, 1), earlier(h, 2), np.zeros_like(h)
    hh, ratios = -h if by_x0 else h, [-h1 / h, -(h1 + h2) / h]

    def update(order, correct):
        rho = bh_weights(hh, ratios, order, solver, correct)
        weights, of_next = np.array([first, none, none]), rho.pop() if correct else none
        for k, B_rho in enumerate(rho):
            weights[0] += scale_next * B_rho / ratios[k]
            weights[k + 1] -= scale_next * B_rho / ratios[k]
        weights[0] += scale_next * of_next
        return weights, -scale_next * of_next

    orders = range(1, most + 1)
    return {order: update(order, False)[0] for order in orders}, {order: update(order, True) for order in orders}


def of_order(order, updates):
    """The weights of each step's order, (3, N). order: (N,); 0 for a step of none, whose weights are 0."""
    return np.select([order == k for k in updates], list(updates.values()))


def predictor_corrector(A, P, Q, of_before, corrects, corrects_next):
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
