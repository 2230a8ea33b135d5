"""What the network's output says; first order; several calls in a step whose weights are differences of levels; flows."""

from collections.abc import Sequence

import numpy as np

from ..typing import Array

Numbers = Array | float  # (N,), or one number for all
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")  # what a network may predict: eps, x_0, v, eps - x_0


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


def consistency_boundary(sigma: Array, sigma_min: float, sigma_data: float) -> tuple[Array, Array]:
    """(c_skip, c_out) of x_0 = c_skip*x + c_out*F, which is x at sigma_min (consistency models, arXiv 2303.01469, app. C)."""
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    return c_skip, (sigma - sigma_min) * sigma_data / np.sqrt(sigma**2 + sigma_data**2)


def trigonometric(t: Array) -> tuple[Array, Array]:
    """(alpha, sigma) of TrigFlow's x = cos(t)*x_0 + sin(t)*eps, eps of the data's deviation (arXiv 2410.11081, eq. 4)."""
    return np.cos(t), np.sin(t)


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


def leapt(sigma: Array, sigma_middle: Array, sigma_next: Array) -> list[Array]:
    """Euler to the middle, then from the step's start by the estimate of x_0 there: the states at the two ends, each (4, N).

    They are shares, as probed has them. Source: DPM-Solver++(2S) (arXiv 2211.01095, alg. 1) where eps - x_0 is followed.
    """
    x, m_0, m_1, _ = basis(sigma)
    return [m + (x - m) * end / sigma for m, end in ((m_0, sigma_middle), (m_1, sigma_next))]


def flow_middle(sigma: Array, sigma_next: Array) -> Array:
    """The middle of a flow's step in log SNR; 0.9999 from sigma = 1, which has none (ComfyUI)."""
    with np.errstate(divide="ignore"):
        ratio = np.sqrt(sigma / (1 - sigma) * sigma_next / (1 - sigma_next))
    return np.where(sigma < 1, 1 / (1 + 1 / ratio), 0.9999)


def heunpp(levels: Sequence[Array], sigma_next: Array, sigma_max: float) -> list[Array]:
    """Heun++ on x = x_0 + sigma*eps: Euler from call to call, and at last the step by the slopes of all: states, each (4, N).

    levels: of the step's one to three calls. A slope after the first counts sigma/(calls*sigma_max), the first the rest. The
    states are shares, as probed has them. Source: ComfyUI's heunpp2.
    """
    x, *m = basis(levels[0])
    at, slopes, states = x, [], []
    for k, sigma in enumerate(levels):
        slopes.append((at - m[k]) / sigma)
        if k < len(levels) - 1:
            at = at + (levels[k + 1] - sigma) * slopes[k]
            states.append(at)
    later = [sigma / (len(levels) * sigma_max) for sigma in levels[1:]]
    mean = (1 - sum(later)) * slopes[0] + sum(w * slope for w, slope in zip(later, slopes[1:], strict=True))
    return [*states, x + (sigma_next - levels[0]) * mean]


def basis(like: Array) -> Array:
    """A step's first state and the m of its calls, the oldest first, as shares of themselves: (4, 4, N)."""
    return np.eye(4)[:, :, None] * np.ones_like(like)


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
