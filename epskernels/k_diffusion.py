"""k-diffusion's samplers by its own signatures, with Epsilon Scaling: sample_euler(model, x, sigmas, ...), and so on.

model(x, sigma, **extra_args) is any denoiser of x = x_0 + sigma*eps; the update is one launch. eps_scaling, a number or an
EpsilonScaling, has denoised' = x - (x - denoised)/lambda, but for sigma above 900, where x is noise alone and lambda is 1;
`scale_denoised` does it for a loop of one's own, at any sigma. seeds: (B,), for noise made in the kernel; else
noise_sampler(sigma, sigma_next), by default torch.randn_like, also where k-diffusion has a Brownian tree. Every table is that of
samplers.py at the given sigmas. It does not take sigmas that rise.
"""

import dataclasses
import functools

import numpy as np
import torch
from tqdm.auto import tqdm

from . import samplers, scaling
from .ops import as_seeds, step
from .schedule import KarrasSchedule
from .table import COLUMNS


class _Given(KarrasSchedule):
    """The noise levels of a caller, who may end above 0: a last one, 0, is then added, and not run."""

    def __init__(self, sigmas):
        levels = np.array(sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas, dtype=np.float64)
        if (
            levels.ndim != 1
            or len(levels) < 2
            or not np.isfinite(levels).all()
            or (np.diff(levels) >= 0).any()
            or levels[-1] < 0
        ):
            raise ValueError(
                f"sigmas: expected (N + 1,) finite, decreasing values down to 0 or more, got {levels.tolist()}"
            )
        self.model, self._ratios = None, np.array([0.0, np.inf])
        self.levels, self.steps = levels[levels > 0], len(levels) - 1

    def grid(self, steps):
        return self.grid_at(self.levels)

    def table(self, sampler, eps_scaling, **options):
        given, not_run = scaling.as_scaling(eps_scaling), np.ones(len(self.levels) - self.steps)
        scaled = dataclasses.replace(
            given, formula=lambda i: np.append(given.values(self.steps), not_run), origin="noisiest"
        )
        return sampler(self, len(self.levels), scaling=scaled, prediction="sample", **options)


def _run(
    sampler, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler=None, ahead=0, **options
):
    """ahead: which step after it a row's noise is of: 1 with churn."""
    given = _Given(sigmas)
    table = given.table(sampler, eps_scaling, **options).to(x.device)
    calls = -(-len(table) // len(given.levels))  # of the model, in a step
    t, noisy = table["t"], table["c_noise"] != 0
    noise_sampler = noise_sampler or (lambda sigma, sigma_next: torch.randn_like(x))
    seeds = None if seeds is None else as_seeds(seeds, x.device)
    levels = np.append(given.levels, 0.0)
    before = np.sqrt(
        max(table.initial_sigma**2 - levels[0] ** 2, 0)
    )  # the first step's churn; the others' is in the rows
    with torch.no_grad():
        if before:
            x = torch.add(x, noise_sampler(*_pair(x, levels, 0)), alpha=float(before))
        m1 = m2 = None
        for i in tqdm(range(given.steps), disable=disable):
            for row in range(calls * i, min(calls * (i + 1), len(table))):
                sigma = x.new_full((len(x),), t[row])
                denoised = model(x, sigma, **(extra_args or {}))
                noise = {}
                if noisy[row]:
                    if seeds is not None:
                        noise = {"seeds": seeds}
                    else:
                        noise = {"noise": noise_sampler(*_pair(x, levels, i + ahead))}
                next_x, m0 = step(x, denoised, table, row, m1=m1, m2=m2, **noise, return_m0=True)
                if callback is not None and row == calls * i:
                    callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigma[0], "denoised": m0})
                x, m1, m2 = next_x, m0, m1
    return x


def _pair(x, levels, i):
    return x.new_tensor(levels[i]), x.new_tensor(levels[i + 1])


def _churn(s_churn, s_tmin, s_tmax, s_noise, sigmas):
    """EDM's options; its table counts the steps that are in it, of which the one that is not run has no churn."""
    given = _Given(sigmas)
    if len(given.levels) > given.steps:
        s_tmin = max(s_tmin, np.nextafter(given.levels[-1], np.inf))
    S_churn = s_churn * len(given.levels) / given.steps
    return {"S_churn": S_churn, "S_min": s_tmin, "S_max": s_tmax, "S_noise": s_noise, "ahead": 1}


def sample_euler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
    *, eps_scaling=1.0, noise_sampler=None,
):  # fmt: skip
    """EDM's Euler (arXiv 2206.00364, alg. 2). Churn is drawn where it is not 0, by noise_sampler, before the model's call."""
    churn = _churn(s_churn, s_tmin, s_tmax, s_noise, sigmas)
    return _run(
        samplers.edm_euler, model, x, sigmas, extra_args, callback, disable, eps_scaling, None, noise_sampler, **churn
    )


def sample_heun(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
    *, eps_scaling=1.0, noise_sampler=None,
):  # fmt: skip
    """EDM's Heun (arXiv 2206.00364, alg. 2)."""
    churn = _churn(s_churn, s_tmin, s_tmax, s_noise, sigmas)
    return _run(
        samplers.edm_heun, model, x, sigmas, extra_args, callback, disable, eps_scaling, None, noise_sampler, **churn
    )


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """Euler down to sigma_down, then noise up."""
    return _run(
        samplers.euler_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        eta=eta, S_noise=s_noise,
    )  # fmt: skip


def sample_dpmpp_2s_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """DPM-Solver++(2S), ancestral: two model calls in a step."""
    return _run(
        samplers.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        eta=eta, S_noise=s_noise,
    )  # fmt: skip


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, *, eps_scaling=1.0):
    """DPM-Solver++(2M)."""
    return _run(
        samplers.dpmpp_2m, model, x, sigmas, extra_args, callback, disable, eps_scaling, None, lower_order_final=False
    )


def sample_dpmpp_2m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    solver_type="midpoint", *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """DPM-Solver++(2M), SDE; solver_type "midpoint" or "heun"."""
    return _run(
        samplers.dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        eta=eta, S_noise=s_noise, solver=solver_type, lower_order_final=False,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, eps_scaling=1.0, seeds=None,
):  # fmt: skip
    """DPM-Solver++(3M), SDE."""
    return _run(
        samplers.dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, seeds, noise_sampler,
        eta=eta, S_noise=s_noise, lower_order_final=False,
    )  # fmt: skip


# ---- the scaling alone ----


@functools.lru_cache(maxsize=256)
def _row(lambda_t, alpha, device):
    """The row of x' = (1 - 1/lambda)*x/alpha + denoised/lambda, and its index."""
    row = dict.fromkeys(COLUMNS, 0.0) | {"clip": np.inf, "g": 1.0, "d_f": 1.0}
    row |= {"c_x": (1 - 1 / lambda_t) / alpha, "c_f": 1 / lambda_t}
    return torch.tensor([[row[name] for name in COLUMNS]], device=device), torch.tensor(0, device=device)


def scale_denoised(x, denoised, eps_scaling, alpha=1.0):
    """The denoised estimate once its eps is divided by lambda, in one launch: x/alpha - (x/alpha - denoised)/lambda.

    x: (B, ...), alpha*x_0 + sigma*eps: alpha is 1 for k-diffusion's state, 1 - sigma for a flow's. denoised: of x's shape.
    eps_scaling: lambda, a number above 0. Returns it in x's shape and dtype. Raises ValueError for lambda or alpha.
    """
    if not 0 < eps_scaling < np.inf:
        raise ValueError(f"eps_scaling: expected a finite value above 0, got {eps_scaling!r}")
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha: expected a finite value above 0, got {alpha!r}")
    return step(x, denoised, *_row(float(eps_scaling), float(alpha), x.device))
