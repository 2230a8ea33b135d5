"""Independent float64 oracles: each sampler as its paper or its code base writes it, lambda included, in plain numpy.

Nothing here knows a table. An oracle returns the states that its loop passes through, one for each step. It takes
model(x, t), from and to float64 arrays; lam[j] and noise[j] for the j-th step visited, the noisiest first; and keep,
which rounds what a sampler stores between two model calls (states, kept estimates, gradients): `exact` rounds nothing.
"""

import numpy as np
from scipy import integrate


def exact(values):
    return values


# ---- schedules ----


def linear_betas(T=1000):
    """Ho et al., arXiv 2006.11239, section 4."""
    return np.linspace(1e-4, 0.02, T)


def scaled_linear_betas(T=1000):
    """Latent diffusion: the square roots are linear."""
    return np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2


def cosine_betas(T=1000):
    """Nichol and Dhariwal, arXiv 2102.09672, eq. 17."""
    abar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def zero_snr_betas(betas):
    """Lin et al., arXiv 2305.08891, algorithm 1."""
    root = np.sqrt(np.cumprod(1 - betas))
    first, last = root[0], root[-1]
    root = (root - last) * first / (first - last)
    alphas = np.append(root[0] ** 2, root[1:] ** 2 / root[:-1] ** 2)
    return 1 - alphas


def adm_timesteps(T, count):
    """ADM's space_timesteps for one section, ascending; the position is a running sum, and ties round as it does."""
    position, taken = 0.0, []
    for _ in range(count):
        taken.append(round(position))
        position += (T - 1) / (count - 1)
    return np.array(taken)


def edm_sigmas(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Karras et al., arXiv 2206.00364, eq. 5, with the final 0."""
    i = np.arange(steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + i / (steps - 1) * (low - high)) ** rho, 0.0)


# ---- ADM ----


class Adm:
    """GaussianDiffusion's constants for the betas of the timesteps kept; index 0 is the cleanest step."""

    def __init__(self, betas, timesteps):
        base, last, respaced = np.cumprod(1 - betas), 1.0, []
        for t in timesteps:
            respaced.append(1 - base[t] / last)
            last = base[t]
        self.timesteps, self.betas = timesteps, np.array(respaced)
        self.abar = np.cumprod(1 - self.betas)
        self.abar_prev = np.append(1.0, self.abar[:-1])
        self.posterior_variance = self.betas * (1 - self.abar_prev) / (1 - self.abar)
        self.posterior_variance_clipped = np.append(self.posterior_variance[1], self.posterior_variance[1:])
        self.coef1 = self.betas * np.sqrt(self.abar_prev) / (1 - self.abar)
        self.coef2 = (1 - self.abar_prev) * np.sqrt(1 - self.betas) / (1 - self.abar)

    def x0_from_eps(self, x, i, eps):
        return np.sqrt(1 / self.abar[i]) * x - np.sqrt(1 / self.abar[i] - 1) * eps

    def eps_from_x0(self, x, i, x0):
        return (np.sqrt(1 / self.abar[i]) * x - x0) / np.sqrt(1 / self.abar[i] - 1)

    def variance(self, kind, i, v):
        """(variance, log variance) of p(x_{i-1} | x_i)."""
        small, clipped = self.posterior_variance, self.posterior_variance_clipped
        if kind == "fixed_small":
            return small[i], np.log(clipped[i])
        if kind == "fixed_large":
            large = np.append(small[1], self.betas[1:])
            return large[i], np.log(large[i])
        frac = (v + 1) / 2
        log_variance = frac * np.log(self.betas[i]) + (1 - frac) * np.log(clipped[i])
        return np.exp(log_variance), log_variance


def adm_p_sample(model, x, betas, timesteps, lam, noise, *, variance, clip=1.0, cond_fn=None, keep=exact):
    """ADM-ES's p_sample_loop: eps/lambda, x0 clamped, posterior mean; a classifier adds variance*grad to it."""
    adm, states = Adm(betas, timesteps), []
    for j, i in enumerate(reversed(range(len(timesteps)))):
        out = model(x, timesteps[i])
        eps, v = np.split(out, 2, axis=1) if variance == "learned_range" else (out, None)
        x0 = np.clip(adm.x0_from_eps(x, i, eps / lam[j]), -clip, clip)
        mean = adm.coef1[i] * x0 + adm.coef2[i] * x
        model_variance, log_variance = adm.variance(variance, i, v)
        if cond_fn is not None:
            mean = mean + model_variance * keep(cond_fn(x, timesteps[i]))
        nonzero_mask = float(i != 0)
        x = keep(mean + nonzero_mask * np.exp(0.5 * log_variance) * noise[j])
        states.append(x)
    return states


def adm_ddim_sample(model, x, betas, timesteps, lam, noise, *, eta, clip=1.0, cond_fn=None, keep=exact):
    """ADM-ES's ddim_sample_loop: eps derived again from the clamped x0; condition_score shifts that eps."""
    adm, states = Adm(betas, timesteps), []
    for j, i in enumerate(reversed(range(len(timesteps)))):
        x0 = np.clip(adm.x0_from_eps(x, i, model(x, timesteps[i]) / lam[j]), -clip, clip)
        eps = adm.eps_from_x0(x, i, x0)
        if cond_fn is not None:
            eps = eps - np.sqrt(1 - adm.abar[i]) * keep(cond_fn(x, timesteps[i]))
            x0 = adm.x0_from_eps(x, i, eps)
        abar, abar_prev = adm.abar[i], adm.abar_prev[i]
        sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)
        mean = x0 * np.sqrt(abar_prev) + np.sqrt(1 - abar_prev - sigma**2) * eps
        x = keep(mean + float(i != 0) * sigma * noise[j])
        states.append(x)
    return states


# ---- DDIM ----


def ddim_es(model, x, betas, timesteps, lam, noise, *, eta, keep=exact):
    """The authors' DDIM code (arXiv 2010.02502, eq. 12): eps/lambda in x0 and in the direction, no clamp."""
    abar = np.append(1.0, np.cumprod(1 - betas))  # at t + 1, so that the step before timestep 0 is t = -1
    following, states = np.append(-1, timesteps[:-1]), []
    for j, (t, s) in enumerate(zip(timesteps[::-1], following[::-1], strict=True)):
        at, at_next = abar[t + 1], abar[s + 1]
        et = model(x, t) / lam[j]
        x0_t = (x - et * np.sqrt(1 - at)) / np.sqrt(at)
        c1 = eta * np.sqrt((1 - at / at_next) * (1 - at_next) / (1 - at))
        c2 = np.sqrt((1 - at_next) - c1**2)
        x = keep(np.sqrt(at_next) * x0_t + c1 * noise[j] + c2 * et)
        states.append(x)
    return states


def ldm_ddim(model, uncond, x, betas, steps, lam, noise, *, eta, scale, keep=exact):
    """LDM-ES's DDIM: guidance, then x0 from eps/lambda, but the direction from the eps that was not scaled."""
    abar = np.cumprod(1 - betas)
    timesteps = np.arange(0, len(betas), len(betas) // steps) + 1
    alphas, alphas_prev = abar[timesteps], np.append(abar[0], abar[timesteps[:-1]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    states = []
    for j, i in enumerate(reversed(range(steps))):
        e_t = model(x, timesteps[i])
        if uncond is not None:
            e_t_uncond = uncond(x, timesteps[i])
            e_t = e_t_uncond + scale * (e_t - e_t_uncond)
        pred_x0 = (x - np.sqrt(1 - alphas[i]) * e_t / lam[j]) / np.sqrt(alphas[i])
        dir_xt = np.sqrt(1 - alphas_prev[i] - sigmas[i] ** 2) * e_t
        x = keep(np.sqrt(alphas_prev[i]) * pred_x0 + dir_xt + sigmas[i] * noise[j])
        states.append(x)
    return states


def ddim_v(model, x, betas, timesteps, lam, *, keep=exact):
    """Deterministic DDIM of a v-predicting network, v = alpha*eps - sigma*x0 (arXiv 2202.00512, appendix D)."""
    abar = np.cumprod(1 - betas)
    following, states = np.append(-1, timesteps[:-1]), []
    for j, (t, s) in enumerate(zip(timesteps[::-1], following[::-1], strict=True)):
        alpha, sigma = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        alpha_s, sigma_s = (1.0, 0.0) if s < 0 else (np.sqrt(abar[s]), np.sqrt(1 - abar[s]))
        v = model(x, t)
        x0, eps = alpha * x - sigma * v, sigma * x + alpha * v
        if lam[j] != 1:  # where alpha is 0, only lambda = 1 has a meaning
            eps = eps / lam[j]
            x0 = (x - sigma * eps) / alpha
        x = keep(alpha_s * x0 + sigma_s * eps)
        states.append(x)
    return states


# ---- EDM ----


def edm_sampler(
    denoise, x_hat, sigmas, lam, noise, *, heun, S_churn=0.0, S_min=0.0, S_max=np.inf, S_noise=1.0, keep=exact
):
    """edm_sampler (arXiv 2206.00364, alg. 2) with eps = (x - D)/sigma divided by lambda at both evaluations.

    Starts from x_hat of step 0, its churn already in; noise[j] is the churn of step j >= 1. Returns x_hat of every
    later step, where the network is called first, and the final x.
    """
    n, states, x_next = len(sigmas) - 1, [], x_hat
    for i in range(n):
        t_cur, t_next = sigmas[i], sigmas[i + 1]
        gamma = min(S_churn / n, np.sqrt(2) - 1) if S_min <= t_cur <= S_max else 0.0
        t_hat = t_cur + gamma * t_cur
        if i > 0:
            x_hat = keep(x_next + np.sqrt(t_hat**2 - t_cur**2) * S_noise * noise[i])
            states.append(x_hat)
        # Euler step
        eps = (x_hat - denoise(x_hat, t_hat)) / t_hat
        denoised = x_hat - t_hat * (eps / lam[i])
        d_cur = (x_hat - denoised) / t_hat
        x_next = x_hat + (t_next - t_hat) * d_cur
        # second order correction
        if heun and i < n - 1:
            x_euler = keep(x_next)
            if keep is not exact:
                # With one stored state x_hat is overwritten: it follows from x_euler and the estimate kept.
                d_cur = (x_euler - keep(denoised)) / t_next
                x_hat = keep(denoised) + t_hat * d_cur
            d_prime = (x_euler - denoise(x_euler, t_next)) / t_next / lam[i]
            x_next = x_hat + (t_next - t_hat) * (0.5 * d_cur + 0.5 * d_prime)
    return [*states, keep(x_next)]


def edm_initial_std(sigmas, S_churn=0.0, S_min=0.0, S_max=np.inf, S_noise=1.0):
    """Standard deviation of x_hat at step 0: latents*t_0 with the first churn added."""
    gamma = min(S_churn / (len(sigmas) - 1), np.sqrt(2) - 1) if S_min <= sigmas[0] <= S_max else 0.0
    t_hat = sigmas[0] + gamma * sigmas[0]
    return np.sqrt(sigmas[0] ** 2 + S_noise**2 * (t_hat**2 - sigmas[0] ** 2))


def sigma_to_t(sigma, betas):
    """The fractional timestep where a VP network has noise-to-signal ratio sigma; log sigma is linear between two."""
    abar = np.cumprod(1 - betas)
    log_sigmas = 0.5 * np.log((1 - abar) / abar)
    low = np.clip(np.searchsorted(log_sigmas, np.log(sigma)) - 1, 0, len(betas) - 2)
    w = (np.log(sigma) - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
    return low + np.clip(w, 0, 1)


def vp_denoiser(model, betas):
    """D(x; sigma) of an eps-predicting VP network: it is fed x/sqrt(1 + sigma^2) and sigma's timestep."""

    def denoise(x, sigma):
        return x - sigma * model(x / np.sqrt(1 + sigma**2), sigma_to_t(sigma, betas))

    return denoise


# ---- DPM-Solver++ ----


def dpmpp_2m(denoise, x, alpha, sigma, *, lower_order_final, keep=exact):
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, alg. 2), data prediction; first order into sigma = 0.

    alpha, sigma: (N + 1,), the last where the trajectory ends. denoise(x, j): the estimate x_theta of model call j.
    """
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)
    n, before, states = len(alpha) - 1, None, []
    for j in range(n):
        h = log_snr[j + 1] - log_snr[j]
        x_theta = denoise(x, j)
        first_order = before is None or sigma[j + 1] == 0 or (lower_order_final and j == n - 1)
        D = x_theta
        if not first_order:
            r = (log_snr[j] - log_snr[j - 1]) / h
            D = (1 + 1 / (2 * r)) * x_theta - 1 / (2 * r) * before
        x = keep(sigma[j + 1] / sigma[j] * x - alpha[j + 1] * np.expm1(-h) * D)
        before = keep(x_theta)
        states.append(x)
    return states


# ---- UniPC ----


def unipc(denoise, x, alpha, sigma, *, order, variant, corrector=True, keep=exact):
    """UniPC, B(h) version, data prediction (Zhao et al., arXiv 2302.04867, alg. 1 and 2), as its code writes it.

    denoise(x, j): the estimate of model call j. The states are those that the model is called on; the last is the result.
    keep rounds them, the estimates, and of the corrected state the part that is known before the model's call.
    """
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    n, states, m, known, weight = len(alpha) - 1, [], [], None, None

    def update(x, s, p, correct):
        """From step s to s + 1 with p estimates up to s: all but m_t's term, and m_t's weight."""
        h = lam[s + 1] - lam[s]
        hh = -h
        B = hh if variant == "bh1" else np.expm1(hh)
        base = sigma[s + 1] / sigma[s] * x - alpha[s + 1] * np.expm1(hh) * m[s]
        rks = [(lam[s - k] - lam[s]) / h for k in range(1, p)]
        size = len(rks) + correct
        if size == 0:
            return base, None
        R, b, phi, factorial = [], [], np.expm1(hh) / hh - 1, 1
        for k in range(1, size + 1):
            R.append(np.power([*rks, 1.0][:size], k - 1))
            b.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        rhos = np.array([0.5]) if size == 1 else np.linalg.solve(np.array(R), np.array(b))
        total = sum(rho * (m[s - k] - m[s]) / r for k, (rho, r) in enumerate(zip(rhos, rks, strict=False), 1))
        if not correct:
            return base - alpha[s + 1] * B * total, None
        return base - alpha[s + 1] * B * (total - rhos[-1] * m[s]), -alpha[s + 1] * B * rhos[-1]

    for j in range(n):
        m_t = denoise(x, j)
        corrected = x if known is None else known + weight * m_t
        m.append(m_t)
        p = min(order, j + 1, n - j)
        x = keep(update(corrected, j, p, False)[0])
        if corrector and j < n - 1:
            known, weight = update(corrected, j, p, True)
            known = keep(known)
        m[-1] = keep(m_t)
        states.append(x)
    return states


# ---- rectified flow ----


def flow_euler(velocity, x, sigma, lam, *, keep=exact):
    """Euler of dx/dsigma = v = eps - x0, where eps = x + (1 - sigma)*v is divided by lambda and x0 follows from it."""
    states = []
    for j in range(len(sigma) - 1):
        s, v = sigma[j], velocity(x, sigma[j])
        if lam[j] != 1:  # where sigma is 1, only lambda = 1 has a meaning
            eps = (x + (1 - s) * v) / lam[j]
            v = eps - (x - s * eps) / (1 - s)
        x = keep(x + (sigma[j + 1] - s) * v)
        states.append(x)
    return states


def bayes_ancestral(denoise, x, alpha, sigma, noise, *, keep=exact):
    """x_s ~ q(x_s | x_t, x0) for any alpha, sigma, by Bayes' rule: the product of q(x_s | x0) and q(x_t | x_s).

    denoise(x, j): the estimate of x0 at step j. The last step, to sigma = 0, is x0.
    """
    states = []
    for j in range(len(alpha) - 1):
        x0 = denoise(x, j)
        if sigma[j + 1] == 0:
            x = keep(alpha[j + 1] * x0)
        else:
            a = alpha[j] / alpha[j + 1]
            transition = sigma[j] ** 2 - a**2 * sigma[j + 1] ** 2
            precision = 1 / sigma[j + 1] ** 2 + a**2 / transition
            mean = (alpha[j + 1] * x0 / sigma[j + 1] ** 2 + a * x / transition) / precision
            x = keep(mean + noise[j] / np.sqrt(precision))
        states.append(x)
    return states


# ---- k-diffusion's samplers, on x = x0 + sigma*eps; denoise(x, sigma) is the plain denoiser, scaled here ----


def _scaled(denoise, x, sigma, lam):
    """x - sigma*eps/lambda of the denoiser's eps."""
    eps = (x - denoise(x, sigma)) / sigma
    return x - sigma * eps / lam


def to_d(x, sigma, denoised):
    return (x - denoised) / sigma


def sigma_euler(denoise, x, sigmas, lam, noise, *, keep=exact):
    states = []
    for i in range(len(sigmas) - 1):
        d = to_d(x, sigmas[i], _scaled(denoise, x, sigmas[i], lam[i]))
        x = keep(x + d * (sigmas[i + 1] - sigmas[i]))
        states.append(x)
    return states


def ancestral_step(sigma_from, sigma_to, eta):
    sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def sigma_euler_ancestral(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, keep=exact):
    states = []
    for i in range(len(sigmas) - 1):
        down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
        d = to_d(x, sigmas[i], _scaled(denoise, x, sigmas[i], lam[i]))
        x = keep(x + d * (down - sigmas[i]) + noise[i] * s_noise * up)
        states.append(x)
    return states


def sigma_heun(denoise, x, sigmas, lam, noise, *, keep=exact, keep_m0=None):
    """As in edm_sampler, one state is stored: where that rounds, x follows from x_2 and the estimate kept (keep_m0)."""
    states, keep_m0 = [], keep_m0 or keep
    for i in range(len(sigmas) - 1):
        d = to_d(x, sigmas[i], _scaled(denoise, x, sigmas[i], lam[i]))
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = keep(x + d * dt)
        else:
            x_2 = keep(x + d * dt)
            if keep is not exact:
                denoised = keep_m0(x - sigmas[i] * d)
                d = to_d(x_2, sigmas[i + 1], denoised)
                x = denoised + sigmas[i] * d
            d_2 = to_d(x_2, sigmas[i + 1], _scaled(denoise, x_2, sigmas[i + 1], lam[i]))
            x = keep(x + (d + d_2) / 2 * dt)
        states.append(x)
    return states


def sigma_dpmpp_2s(denoise, x, sigmas, lam, noise, *, eta=0.0, s_noise=1.0, keep=exact):
    """DPM-Solver++(2S) with r = 1/2 in t = -log(sigma), ancestral where eta > 0."""
    states = []
    for i in range(len(sigmas) - 1):
        denoised = _scaled(denoise, x, sigmas[i], lam[i])
        down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
        if down == 0:
            x = x + to_d(x, sigmas[i], denoised) * (down - sigmas[i])
        else:
            t, t_next = -np.log(sigmas[i]), -np.log(down)
            h = t_next - t
            s = t + h / 2
            x_2 = keep((np.exp(-s) / np.exp(-t)) * x - np.expm1(-h / 2) * denoised)
            if keep is not exact:  # one state is stored, as in sigma_heun
                x = (x_2 + np.expm1(-h / 2) * keep(denoised)) * np.exp(-t) / np.exp(-s)
            denoised_2 = _scaled(denoise, x_2, np.exp(-s), lam[i])
            x = (np.exp(-t_next) / np.exp(-t)) * x - np.expm1(-h) * denoised_2
        x = keep(x + noise[i] * s_noise * up) if sigmas[i + 1] > 0 else keep(x)
        states.append(x)
    return states


def sigma_dpmpp_2m_sde(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, solver="midpoint", keep=exact):
    states, old, h_last = [], None, None
    for i in range(len(sigmas) - 1):
        denoised = _scaled(denoise, x, sigmas[i], lam[i])
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            h = -np.log(sigmas[i + 1]) + np.log(sigmas[i])
            eta_h = eta * h
            x = sigmas[i + 1] / sigmas[i] * np.exp(-eta_h) * x - np.expm1(-h - eta_h) * denoised
            if old is not None:
                r = h_last / h
                if solver == "heun":
                    x = x + (np.expm1(-h - eta_h) / (h + eta_h) + 1) * (1 / r) * (denoised - old)
                else:
                    x = x - 0.5 * np.expm1(-h - eta_h) * (1 / r) * (denoised - old)
            x = x + noise[i] * sigmas[i + 1] * np.sqrt(-np.expm1(-2 * eta_h)) * s_noise
            h_last = h
        x, old = keep(x), keep(denoised)
        states.append(x)
    return states


def sigma_dpmpp_3m_sde(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, keep=exact):
    states, denoised_1, denoised_2, h_1, h_2 = [], None, None, None, None
    for i in range(len(sigmas) - 1):
        denoised = _scaled(denoise, x, sigmas[i], lam[i])
        if sigmas[i + 1] == 0:
            x, h = denoised, None
        else:
            h = -np.log(sigmas[i + 1]) + np.log(sigmas[i])
            h_eta = h * (eta + 1)
            x = np.exp(-h_eta) * x - np.expm1(-h_eta) * denoised
            phi_2 = np.expm1(-h_eta) / h_eta + 1
            if h_2 is not None:
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
                d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
                d2 = (d1_0 - d1_1) / (r0 + r1)
                x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
            elif h_1 is not None:
                x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
            if eta:
                x = x + noise[i] * sigmas[i + 1] * np.sqrt(-np.expm1(-2 * h * eta)) * s_noise
        x, denoised_1, denoised_2, h_1, h_2 = keep(x), keep(denoised), denoised_1, h, h_1
        states.append(x)
    return states


# ---- two model calls in a step, on x = x0 + sigma*eps; where states round, one is stored, as in sigma_heun ----


def found_again(x_2, denoised, sigma, sigma_2):
    """The x that Euler's step from sigma to sigma_2 made x_2 of."""
    return denoised + (x_2 - denoised) * sigma / sigma_2


def sigma_dpm_2(denoise, x_hat, sigmas, lam, noise, *, S_churn=0.0, S_min=0.0, S_max=np.inf, S_noise=1.0, keep=exact):
    """k-diffusion's dpm_2; starts, and returns states, as edm_sampler does."""
    n, states, x = len(sigmas) - 1, [], x_hat
    for i in range(n):
        gamma = min(S_churn / n, np.sqrt(2) - 1) if S_min <= sigmas[i] <= S_max else 0.0
        hat = sigmas[i] * (1 + gamma)
        if i > 0:
            x = keep(x + np.sqrt(hat**2 - sigmas[i] ** 2) * S_noise * noise[i])
            states.append(x)
        denoised = _scaled(denoise, x, hat, lam[i])
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        mid = np.exp((np.log(hat) + np.log(sigmas[i + 1])) / 2)
        x_2 = keep(x + to_d(x, hat, denoised) * (mid - hat))
        if keep is not exact:
            x = found_again(x_2, keep(denoised), hat, mid)
        x = x + to_d(x_2, mid, _scaled(denoise, x_2, mid, lam[i])) * (sigmas[i + 1] - hat)
    return [*states, keep(x)]


def sigma_dpm_2_ancestral(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, keep=exact):
    states = []
    for i in range(len(sigmas) - 1):
        sigma = sigmas[i]
        denoised = _scaled(denoise, x, sigma, lam[i])
        down, up = ancestral_step(sigma, sigmas[i + 1], eta)
        if down == 0:
            x = x + to_d(x, sigma, denoised) * (down - sigma)
        else:
            mid = np.exp((np.log(sigma) + np.log(down)) / 2)
            x_2 = keep(x + to_d(x, sigma, denoised) * (mid - sigma))
            if keep is not exact:
                x = found_again(x_2, keep(denoised), sigma, mid)
            x = x + to_d(x_2, mid, _scaled(denoise, x_2, mid, lam[i])) * (down - sigma)
            x = x + noise[i] * s_noise * up
        x = keep(x)
        states.append(x)
    return states


def sigma_dpmpp_sde(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, r=0.5, keep=exact):
    """noise[i]: those of both calls."""
    states = []
    for i in range(len(sigmas) - 1):
        denoised = _scaled(denoise, x, sigmas[i], lam[i])
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            t, t_next = -np.log(sigmas[i]), -np.log(sigmas[i + 1])
            s = t + (t_next - t) * r
            down, up = ancestral_step(sigmas[i], np.exp(-s), eta)
            x_2 = keep(down / sigmas[i] * x + (1 - down / sigmas[i]) * denoised + noise[i][0] * s_noise * up)
            denoised_2 = _scaled(denoise, x_2, np.exp(-s), lam[i])
            down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
            mixed = (1 - 1 / (2 * r)) * keep(denoised) + 1 / (2 * r) * denoised_2
            x = down / sigmas[i] * x + (1 - down / sigmas[i]) * mixed + noise[i][1] * s_noise * up
        x = keep(x)
        states.append(x)
    return states


# ---- single steps of DPM-Solver's family, on x = x0 + sigma*eps ----


def second_stage(x, d_0, d_1, s, s_1, s_2):
    """u_2 of DPM-Solver-3, u_1 following from x and d_0."""
    h_1, h_2 = np.log(s / s_1), np.log(s / s_2)
    eps = to_d(x, s, d_0)
    eps_1 = to_d(x - s_1 * np.expm1(h_1) * eps, s_1, d_1)
    return x - s_2 * np.expm1(h_2) * eps - s_2 * h_2 / h_1 * (np.expm1(h_2) / h_2 - 1) * (eps_1 - eps)


def sigma_dpm_solver(denoise, x, sigmas, lam, noise, *, order, eta=0.0, s_noise=1.0, least=0.0, r1=0.5, keep=exact):
    """DPM-Solver-1, 2, 3 (Lu et al., arXiv 2206.00927, alg. 1 and 2): eps integrated over lambda = -log(sigma).

    order: of each step; the step to 0 is of order 1. Ancestral where eta > 0, down to `least` at the lowest.
    """
    states, orders = [], np.broadcast_to(order, len(sigmas) - 1)
    for i in range(len(sigmas) - 1):
        s, lam_i = sigmas[i], lam[i]
        down, up = ancestral_step(s, sigmas[i + 1], eta)
        if down < least and sigmas[i + 1] > 0:
            down, up = least, np.sqrt(sigmas[i + 1] ** 2 - least**2)
        d_0 = _scaled(denoise, x, s, lam_i)
        if orders[i] == 1 or down == 0:
            x = x + (down - s) * to_d(x, s, d_0)
        else:
            h = np.log(s) - np.log(down)
            r_1, r_2 = (r1, 1) if orders[i] == 2 else (1 / 3, 2 / 3)
            s_1, s_2 = s * np.exp(-r_1 * h), s * np.exp(-r_2 * h)
            u_1 = keep(x - s_1 * np.expm1(r_1 * h) * to_d(x, s, d_0))
            d_1 = _scaled(denoise, u_1, s_1, lam_i)
            if keep is not exact:
                d_0 = keep(d_0)
                x = found_again(u_1, d_0, s, s_1)
            if orders[i] == 2:
                eps, eps_1 = to_d(x, s, d_0), to_d(u_1, s_1, d_1)
                x = x - down * np.expm1(h) * eps - down / (2 * r_1) * np.expm1(h) * (eps_1 - eps)
            else:
                u_2 = keep(second_stage(x, d_0, d_1, s, s_1, s_2))
                d_2 = _scaled(denoise, u_2, s_2, lam_i)
                if keep is not exact:  # u_2 is affine in x
                    d_1 = keep(d_1)
                    at_0, at_1 = (
                        second_stage(value, d_0, d_1, s, s_1, s_2) for value in (np.zeros_like(x), np.ones_like(x))
                    )
                    x = (u_2 - at_0) / (at_1 - at_0)
                eps, eps_2 = to_d(x, s, d_0), to_d(u_2, s_2, d_2)
                x = x - down * np.expm1(h) * eps - down / r_2 * (np.expm1(h) / h - 1) * (eps_2 - eps)
        x = keep(x + noise[i] * s_noise * up) if up else keep(x)
        states.append(x)
    return states


def sigma_dpmpp_3s(denoise, x, sigmas, lam, noise, *, keep=exact):
    """DPM-Solver++'s singlestep third order update (the code of Lu et al., arXiv 2211.01095), r = 1/3, 2/3."""
    return sigma_seeds_3(denoise, x, sigmas, lam, noise, eta=0.0, keep=keep)


def sigma_seeds_2(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, r=0.5, phi=1, keep=exact):
    """SEEDS-2 (Gonzalez et al., arXiv 2305.14267), x0 predicted. noise[i]: of both calls. phi: 1 or 2, of the second's weight."""
    states = []
    for i in range(len(sigmas) - 1):
        s, s_next = sigmas[i], sigmas[i + 1]
        d_0 = _scaled(denoise, x, s, lam[i])
        if s_next == 0:
            x = d_0
        else:
            h = np.log(s) - np.log(s_next)
            s_1, H = s * np.exp(-r * h), (1 + eta) * h
            z_1, z_2 = noise[i]
            start = np.exp(-r * H) * x  # s_1/s*exp(-r*eta*h)
            shaken = s_1 * s_noise * np.sqrt(1 - np.exp(-2 * r * eta * h)) * z_1
            u = keep(start - np.expm1(-r * H) * d_0 + shaken)
            d_1 = _scaled(denoise, u, s_1, lam[i])
            later = s_next / s_1 * np.exp(-(1 - r) * eta * h)
            if keep is not exact:  # x's and the noise's share follow from u and the estimate kept
                start, shaken, d_0 = u + np.expm1(-r * H) * keep(d_0), 0.0, keep(d_0)
            if phi == 1:
                mean = -np.expm1(-H) * ((1 - 1 / (2 * r)) * d_0 + 1 / (2 * r) * d_1)
            else:
                mean = -np.expm1(-H) * d_0 + (np.expm1(-H) + H) / H * (d_1 - d_0) / r
            fresh = s_next * s_noise * np.sqrt(1 - np.exp(-2 * (1 - r) * eta * h)) * z_2
            x = later * (start + shaken) + mean + fresh
        x = keep(x)
        states.append(x)
    return states


def sigma_seeds_3(denoise, x, sigmas, lam, noise, *, eta=1.0, s_noise=1.0, keep=exact):
    """SEEDS-3 (Gonzalez et al., arXiv 2305.14267), x0 predicted, r = 1/3 and 2/3. noise[i]: of the three calls."""
    r_1, r_2, states = 1 / 3, 2 / 3, []
    for i in range(len(sigmas) - 1):
        s, s_next = sigmas[i], sigmas[i + 1]
        d_0 = _scaled(denoise, x, s, lam[i])
        if s_next == 0:
            x = d_0
        else:
            h = np.log(s) - np.log(s_next)
            H = (1 + eta) * h
            s_1, s_2 = s * np.exp(-r_1 * h), s * np.exp(-r_2 * h)
            z = noise[i] if eta else [0.0, 0.0, 0.0]

            def noise_over(part, h=h):
                return s_noise * np.sqrt(-np.expm1(-2 * part * eta * h))

            known = np.exp(-r_1 * H) * x + s_1 * noise_over(r_1) * z[0]
            u_1 = keep(known - np.expm1(-r_1 * H) * d_0)
            d_1 = _scaled(denoise, u_1, s_1, lam[i])
            if keep is not exact:
                known, d_0 = u_1 + np.expm1(-r_1 * H) * keep(d_0), keep(d_0)
            phi_2 = (np.expm1(-r_2 * H) + r_2 * H) / (r_2 * H)
            known = np.exp(-(r_2 - r_1) * H) * known + s_2 * noise_over(r_2 - r_1) * z[1]
            of_m = lambda d_0, d_1, H=H, phi_2=phi_2: -np.expm1(-r_2 * H) * d_0 + r_2 / r_1 * phi_2 * (d_1 - d_0)  # noqa: E731
            u_2 = keep(known + of_m(d_0, d_1))
            d_2 = _scaled(denoise, u_2, s_2, lam[i])
            if keep is not exact:
                known = u_2 - of_m(d_0, keep(d_1))
            phi_2 = (np.expm1(-H) + H) / H
            x = np.exp(-(1 - r_2) * H) * known + s_next * noise_over(1 - r_2) * z[2]
            x = x - np.expm1(-H) * d_0 + phi_2 / r_2 * (d_2 - d_0)
        x = keep(x)
        states.append(x)
    return states


# ---- linear multistep: eps of earlier calls ----


def transfer(x, eps, at, after):
    """DDIM's step from (alpha, sigma) = at to after, by any eps (Liu et al., arXiv 2202.09778, eq. 11)."""
    return after[0] * (x - at[1] * eps) / at[0] + after[1] * eps


def pndm_eps(history):
    """Liu et al., arXiv 2202.09778, eq. 12 and its lower orders; history: the newest last."""
    e = history[::-1]
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


def plms(eps, x, alpha, sigma, *, keep=exact):
    """Latent diffusion's plms. eps(x, j): of step j, or, for j + 0.5, at step j's end. alpha, sigma: (N + 1,)."""
    old, states = [], []
    ends = list(zip(alpha, sigma, strict=True))
    for j in range(len(alpha) - 1):
        e = eps(x, j)
        if j == 0:
            x_next = keep(transfer(x, e, ends[0], ends[1]))
            e_next = eps(x_next, 0.5)
            if keep is not exact:  # the row adds the difference to what was stored
                e = keep(e)
                slope = ends[1][1] - ends[0][1] * ends[1][0] / ends[0][0]
                x = keep(x_next + slope * (e_next - e) / 2)
            else:
                x = transfer(x, (e + e_next) / 2, ends[0], ends[1])
        else:
            x = keep(transfer(x, pndm_eps([*old[-3:], e]), ends[j], ends[j + 1]))
        old.append(keep(e))
        states.append(x)
    return states


def ipndm(eps, x, alpha, sigma, *, order=4, keep=exact):
    """IPNDM (Zhang and Chen, arXiv 2204.13902, section 4): plms without its second call; a step to sigma = 0 is DDIM's."""
    old, states = [], []
    for j in range(len(alpha) - 1):
        e = eps(x, j)
        history = [e] if sigma[j + 1] == 0 else [*old, e][-order:]
        x = keep(transfer(x, pndm_eps(history), (alpha[j], sigma[j]), (alpha[j + 1], sigma[j + 1])))
        old.append(keep(e))
        states.append(x)
    return states


def lagrange_weights(nodes, start, end, variable, density):
    """The integrals over [start, end] of density(s) times the polynomials in variable(s) that are 1 at one node, 0 at others."""
    found = []
    for k, node in enumerate(nodes):

        def polynomial(s, k=k, node=node):
            return np.prod([(variable(s) - other) / (node - other) for m, other in enumerate(nodes) if m != k])

        value, _ = integrate.quad(
            lambda s, p=polynomial: density(s) * p(s), start, end, epsabs=0, epsrel=1e-12, limit=500
        )
        found.append(value)
    return found


def lms(eps, x, alpha, sigma, *, order=4, keep=exact):
    """k-diffusion's lms: the polynomial in r = sigma/alpha through the last slopes of x/alpha."""
    r, old, states = sigma / alpha, [], []
    for j in range(len(alpha) - 1):
        e = eps(x, j)
        history = [*old, e][-order:][::-1]
        nodes = [r[j - k] for k in range(len(history))]
        weights = lagrange_weights(nodes, r[j], r[j + 1], lambda s: s, lambda s: 1.0)
        x = keep(alpha[j + 1] * (x / alpha[j] + sum(w * e for w, e in zip(weights, history, strict=True))))
        old.append(keep(e))
        states.append(x)
    return states


def sigma_lms(denoise, x, sigmas, lam, noise, *, order=4, keep=exact):
    def eps(x, j):
        return to_d(x, sigmas[j], _scaled(denoise, x, sigmas[j], lam[j]))

    return lms(eps, x, np.ones(len(sigmas)), np.asarray(sigmas), order=order, keep=keep)


def ipndm_v(eps, x, alpha, sigma, *, order=4, keep=exact):
    """IPNDM for steps of any length, written out as its code does."""
    r, old, states = sigma / alpha, [], []
    for j in range(len(alpha) - 1):
        e = eps(x, j)
        used = 1 if sigma[j + 1] == 0 else min(order, j + 1)
        h = r[j + 1] - r[j]
        h_1, h_2, h_3 = (r[j - k] - r[j - k - 1] if j > k else np.nan for k in range(3))
        mean = e
        if used > 1:
            mean = (2 + h / h_1) / 2 * e - h / h_1 / 2 * old[-1]
        if used > 2:
            temp = (1 - h / (3 * (h + h_1)) * (h * (h + h_1)) / (h_1 * (h_1 + h_2))) / 2
            mean = mean + temp * (e - (1 + h_1 / h_2) * old[-1] + h_1 / h_2 * old[-2])
        if used > 3:
            ratio = h_1 * (h_1 + h_2) / (h_2 * (h_2 + h_3))
            temp = (1 - h / (3 * (h + h_1))) / 2 + (1 - h / (2 * (h + h_1))) * h / (6 * (h + h_1 + h_2))
            temp = temp * (h * (h + h_1) * (h + h_1 + h_2)) / (h_1 * (h_1 + h_2) * (h_1 + h_2 + h_3))
            mean = mean + temp * (
                e - (1 + h_1 / h_2 + ratio) * old[-1] + (h_1 / h_2 + ratio * (1 + h_2 / h_3)) * old[-2]
                - ratio * h_1 / h_2 * old[-3]
            )  # fmt: skip
        x = keep(alpha[j + 1] * (x / alpha[j] + h * mean))
        old.append(keep(e))
        states.append(x)
    return states


def deis(eps, x, alpha, sigma, *, order=3, variable="time", beta=(0.1, 19.9), keep=exact):
    """DEIS (Zhang and Chen, arXiv 2204.13902, eq. 14, 15): in the time of beta[0] + beta[1]*t, or in log rho, rho."""
    rho, old, states = sigma / alpha, [], []
    if variable == "time":  # log(1 + rho^2) = the integral of beta

        def to(r):
            return (-beta[0] + np.sqrt(beta[0] ** 2 + 2 * beta[1] * np.log(1 + r**2))) / beta[1]

        def slope(t):
            r = np.sqrt(np.exp(beta[0] * t + beta[1] * t**2 / 2) - 1)
            return (beta[0] + beta[1] * t) / 2 * (1 + r**2) / r
    else:
        to, slope = {"log_rho": (np.log, np.exp), "rho": (lambda r: r, lambda r: 1.0)}[variable]
    for j in range(len(alpha) - 1):
        e = eps(x, j)
        if sigma[j + 1] == 0:
            weights, history = [rho[j + 1] - rho[j]], [e]
        else:
            history = [*old, e][-order:][::-1]
            nodes = [to(rho[j - k]) for k in range(len(history))]
            weights = lagrange_weights(nodes, to(rho[j]), to(rho[j + 1]), lambda s: s, slope)
        x = keep(alpha[j + 1] * (x / alpha[j] + sum(w * e for w, e in zip(weights, history, strict=True))))
        old.append(keep(e))
        states.append(x)
    return states


def gradient_estimation(eps, x, alpha, sigma, *, gamma=2.0, keep=exact):
    """Permenter and Yuan, arXiv 2306.04848, algorithm 2, on r = sigma/alpha; Euler's step at the beginning and to 0."""
    r, before, states = sigma / alpha, None, []
    for j in range(len(alpha) - 1):
        e = eps(x, j)
        mean = e if before is None or r[j + 1] == 0 else gamma * e + (1 - gamma) * before
        x, before = keep(alpha[j + 1] * (x / alpha[j] + (r[j + 1] - r[j]) * mean)), keep(e)
        states.append(x)
    return states


# ---- more multistep methods that predict x0 ----


def sigma_res_multistep(denoise, x, sigmas, lam, noise, *, eta=0.0, s_noise=1.0, keep=exact):
    """RES (Zhang et al., arXiv 2308.02157), second order multistep, ancestral as ComfyUI has it."""
    states, old, old_down = [], None, None
    for i in range(len(sigmas) - 1):
        denoised = _scaled(denoise, x, sigmas[i], lam[i])
        down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
        if down == 0 or old is None:
            x = x + to_d(x, sigmas[i], denoised) * (down - sigmas[i])
        else:
            h = np.log(sigmas[i]) - np.log(down)
            c_2 = (-np.log(sigmas[i - 1]) + np.log(old_down)) / h
            phi_1 = -np.expm1(-h) / h
            phi_2 = (1 - phi_1) / h
            x = np.exp(-h) * x + h * ((phi_1 - phi_2 / c_2) * denoised + phi_2 / c_2 * old)
        x = keep(x + noise[i] * s_noise * up) if sigmas[i + 1] > 0 else keep(x)
        old, old_down = keep(denoised), down
        states.append(x)
    return states


def er_sde(denoise, x, alpha, sigma, noise, *, order=3, phi=None, s_noise=1.0, keep=exact):
    """ER-SDE-Solver (Cui et al., arXiv 2309.06169), variance preserving. denoise(x, j): the estimate of model call j."""
    phi = phi or (lambda r: r * (np.exp(r**0.3) + 10))
    r, states, m = sigma / alpha, [], []
    for j in range(len(alpha) - 1):
        m.append(denoise(x, j))
        if sigma[j + 1] == 0:
            x = alpha[j + 1] * m[-1]
        else:
            s, t = r[j], r[j + 1]
            kept = phi(t) / phi(s)
            y = kept * x / alpha[j] + (1 - kept) * m[-1]
            if order > 1 and j > 0:
                slope = (m[-1] - m[-2]) / (s - r[j - 1])
                one = integrate.quad(lambda v: 1 / phi(v), t, s, epsrel=1e-12, epsabs=0)[0]
                y = y + (t - s + phi(t) * one) * slope
            if order > 2 and j > 1:
                before = (m[-2] - m[-3]) / (r[j - 1] - r[j - 2])
                two = integrate.quad(lambda v, s=s: (v - s) / phi(v), t, s, epsrel=1e-12, epsabs=0)[0]
                y = y + ((t - s) ** 2 / 2 + phi(t) * two) * (slope - before) / ((s - r[j - 2]) / 2)
            x = alpha[j + 1] * (y + noise[j] * s_noise * np.sqrt(max(t**2 - (s * kept) ** 2, 0)))
        x, m[-1] = keep(x), keep(m[-1])
        states.append(x)
    return states


def sa_solver(
    denoise, x, alpha, sigma, noise, *, predictor, corrector, tau=1.0, window=(0, np.inf), s_noise=1.0, keep=exact
):
    """SA-Solver (Xue et al., arXiv 2309.05019, alg. 1, eq. 15 and 18), with its code's falling orders towards sigma = 0."""
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    n, m, states, corrected, last = len(alpha) - 1, [], [], x, None
    to_0 = sigma[-1] == 0

    def weights(nodes, i, tau):
        """b of the estimates at the nodes over step i."""
        speed = 1 + tau**2
        return [alpha[i + 1] * b for b in lagrange_weights(
            [lam[k] for k in nodes], lam[i], lam[i + 1], lambda s: s, lambda s: speed * np.exp(speed * (s - lam[i + 1]))
        )]  # fmt: skip

    for i in range(n):
        m.append(denoise(x, i))
        order = min(corrector, i + 1, n - i if to_0 else n)
        if i and order and not (to_0 and i == n - 1):
            A, shaken, predicted, tau_i = last
            nodes = [i - k for k in range(order)]
            b = weights(nodes, i - 1, tau_i)
            if keep is exact:
                corrected = A * corrected + sum(w * m[k] for w, k in zip(b, nodes, strict=True)) + shaken
            else:  # y is what the corrector's share of known estimates has beyond the predictor's
                y = sum(w * value for w, value in zip(b[1:], [predicted[1][k] for k in nodes[1:]], strict=True))
                corrected = x + keep(y - predicted[0]) + b[0] * m[i]
        else:
            corrected = x
        h = lam[i + 1] - lam[i]
        if sigma[i + 1] == 0:
            x = alpha[i + 1] * m[i]
        else:
            tau_i = tau if window[0] <= sigma[i + 1] / alpha[i + 1] <= window[1] else 0.0
            A = sigma[i + 1] / sigma[i] * np.exp(-(tau_i**2) * h)
            shaken = sigma[i + 1] * np.sqrt(-np.expm1(-2 * tau_i**2 * h)) * s_noise * noise[i]
            nodes = [i - k for k in range(max(min(predictor, i + 1, n - 1 - i if to_0 else n), 1))]
            b = weights(nodes, i, tau_i)
            predicted = sum(w * m[k] for w, k in zip(b, nodes, strict=True))
            last = A, shaken, (predicted, dict(enumerate(m))), tau_i
            x = A * corrected + predicted + shaken
        x, m[i] = keep(x), keep(m[i])
        states.append(x)
    return states


# ---- ComfyUI's ----


def sigma_heunpp2(denoise, x, sigmas, lam, noise, *, keep=exact):
    """ComfyUI's heunpp2: one call in the last step, two in the one before, three in the others."""
    states = []
    for i in range(len(sigmas) - 1):
        at, slopes, start = x, [], x
        for k in range(min(3, len(sigmas) - 1 - i)):
            if k:
                at = at + (sigmas[i + k] - sigmas[i + k - 1]) * slopes[-1]
            slopes.append(to_d(at, sigmas[i + k], _scaled(denoise, at, sigmas[i + k], lam[i])))
        parts = [sigmas[i + k] / (len(slopes) * sigmas[0]) for k in range(1, len(slopes))]
        mean = sum(w * d for w, d in zip([1 - sum(parts), *parts], slopes, strict=True))
        x = keep(start + (sigmas[i + 1] - sigmas[i]) * mean)
        states.append(x)
    return states


def flow_ancestral(denoise, x, sigmas, noise, *, method="euler", eta=1.0, s_noise=1.0):
    """ComfyUI's euler_ancestral, dpm_2_ancestral and dpmpp_2s_ancestral for x = (1 - sigma)*x_0 + sigma*eps."""
    for i, (s, s_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        d = denoise(x, s)
        if s_next == 0:
            x = d
            continue
        down = s_next * (1 + (s_next / s - 1) * eta)
        if method == "euler":
            x = down / s * x + (1 - down / s) * d
        elif method == "dpm_2":
            middle = np.sqrt(s * down)
            u = x + (x - d) / s * (middle - s)
            x = x + (u - denoise(u, middle)) / middle * (down - s)
        else:
            logit = np.log((1 - np.array([s, down])) / np.array([s, down])) if s < 1 else None
            middle = 0.9999 if s == 1 else 1 / (1 + np.exp(logit.mean()))
            u = middle / s * x + (1 - middle / s) * d
            x = down / s * x + (1 - down / s) * denoise(u, middle)
        scale = (1 - s_next) / (1 - down)
        x = scale * x + noise[i] * s_noise * np.sqrt(max(s_next**2 - (down * scale) ** 2, 0))
    return x


# ---- and others ----


def sigma_consistency(denoise, x, sigmas, lam, noise, *, keep=exact):
    """Song et al., arXiv 2303.01469, algorithm 1; denoise: the consistency function. sigmas: at last epsilon, then 0."""
    states = []
    for i in range(len(sigmas) - 1):
        x = _scaled(denoise, x, sigmas[i], lam[i])
        if sigmas[i + 1] > 0:
            x = x + np.sqrt(sigmas[i + 1] ** 2 - sigmas[-2] ** 2) * noise[i]
        x = keep(x)
        states.append(x)
    return states


def ddim_inverse(eps, x, alpha, sigma, *, keep=exact):
    """Song et al., arXiv 2010.02502, eq. 14 upwards. eps(x, j): in step j, told the time of its end. alpha, sigma: from clean."""
    states = []
    for j in range(len(alpha) - 1):
        x = keep(transfer(x, eps(x, j), (alpha[j], sigma[j]), (alpha[j + 1], sigma[j + 1])))
        states.append(x)
    return states


# ---- consistency models ----


def consistency_timesteps(T, original_steps, steps):
    origin = [i * (T // original_steps) - 1 for i in range(1, original_steps + 1)][::-1]
    return [origin[int(i)] for i in np.floor(np.linspace(0, original_steps, steps, endpoint=False))]


def lcm(model, x, betas, t, lam, noise, *, keep=exact):
    """Luo et al., arXiv 2310.04378, algorithm 3, with the boundary condition of its code (timesteps times 10, sigma_data 1/2)."""
    abar, states = np.cumprod(1 - betas), []
    for j, tj in enumerate(t):
        x0 = (x - np.sqrt(1 - abar[tj]) * model(x, tj) / lam[j]) / np.sqrt(abar[tj])
        scaled_t = 10.0 * tj
        c_skip, c_out = 0.25 / (scaled_t**2 + 0.25), scaled_t / np.sqrt(scaled_t**2 + 0.25)
        x = c_skip * x + c_out * x0
        if j < len(t) - 1:
            x = np.sqrt(abar[t[j + 1]]) * x + np.sqrt(1 - abar[t[j + 1]]) * noise[j]
        x = keep(x)
        states.append(x)
    return states


def tcd(model, x, betas, t, lam, noise, *, gamma, keep=exact):
    """Zheng et al., arXiv 2402.19159, algorithm 4."""
    abar, states = np.cumprod(1 - betas), []
    for j, tj in enumerate(t):
        after = t[j + 1] if j < len(t) - 1 else 0
        s = int(np.floor((1 - gamma) * after))
        eps = model(x, tj) / lam[j]
        x0 = (x - np.sqrt(1 - abar[tj]) * eps) / np.sqrt(abar[tj])
        x = np.sqrt(abar[s]) * x0 + np.sqrt(1 - abar[s]) * eps
        if j < len(t) - 1 and gamma > 0:
            x = np.sqrt(abar[after] / abar[s]) * x + np.sqrt(1 - abar[after] / abar[s]) * noise[j]
        x = keep(x)
        states.append(x)
    return states


# ---- PFGM++ ----


def pfgmpp_sampler(denoise, x, steps, lam, D, *, sigma_min=0.002, sigma_max=80.0, rho=7.0, keep=exact):
    """Xu et al., arXiv 2302.04265, algorithm 2: the ODE in r = sigma*sqrt(D), Heun, on EDM's grid; denoise is told sigma."""
    r = np.append(edm_sigmas(steps, sigma_min, sigma_max, rho)[:-1] * np.sqrt(D), 0.0)
    states = []
    for i in range(steps):
        d = (x - _scaled(denoise, x, r[i] / np.sqrt(D), lam[i])) / r[i]
        x_next = keep(x + (r[i + 1] - r[i]) * d)
        if i < steps - 1:
            if keep is not exact:  # one state is stored, as in sigma_heun
                d = (x_next - (denoised := keep(x - r[i] * d))) / r[i + 1]
                x = denoised + r[i] * d
            d_next = (x_next - _scaled(denoise, x_next, r[i + 1] / np.sqrt(D), lam[i])) / r[i + 1]
            x_next = keep(x + (r[i + 1] - r[i]) * (0.5 * d + 0.5 * d_next))
        x = x_next
        states.append(x)
    return states
