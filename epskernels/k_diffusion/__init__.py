"""k-diffusion's and ComfyUI's samplers by their own signatures, with Epsilon Scaling: sample_euler(model, x, sigmas, ...).

On x_0 + sigma*eps, and on ComfyUI's flows, (1 - sigma)*x_0 + sigma*eps. Every table is that of `samplers` there; an update is
one launch. `scale_denoised` is the scaling alone, for a loop of one's own.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import samplers, scaling
from ..docstrings import described
from ..ops import step
from . import flows
from .adaptive import Pair, StepSize, check_ends, of_any_step
from .cfg_pp import (
    sample_dpmpp_2m_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
    sample_gradient_estimation_cfg_pp,
    sample_res_multistep_ancestral_cfg_pp,
    sample_res_multistep_cfg_pp,
)
from .comfyui import (
    sample_ddpm,
    sample_deis,
    sample_dpmpp_2m_sde_heun,
    sample_er_sde,
    sample_exp_heun_2_x0,
    sample_exp_heun_2_x0_sde,
    sample_gradient_estimation,
    sample_heunpp2,
    sample_ipndm,
    sample_ipndm_v,
    sample_lcm,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_sa_solver,
    sample_seeds_2,
    sample_seeds_3,
    sample_uni_pc,
    sample_uni_pc_bh2,
)
from .flows import BY_RATIO, ancestral, is_flow, sampling_of, without_noise
from .sampling import (
    ARGUMENTS,
    Callback,
    Correction,
    Denoiser,
    Extra,
    NoiseSampler,
    Seeds,
    Sigmas,
    as_noise_seeds,
    check,
    check_flow,
    noisy,
    run,
    sample_rows,
    twice,
    twice_down,
)
from .scaled import scale_denoised

__all__ = [
    "is_flow",
    "scale_denoised",
    "sample_euler",
    "sample_heun",
    "sample_dpm_2",
    "sample_euler_ancestral",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_lms",
    "sample_dpmpp_sde",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m_sde",
    "sample_dpm_fast",
    "sample_dpm_adaptive",
    "sample_dpmpp_2m_sde_heun",
    "sample_ddpm",
    "sample_lcm",
    "sample_heunpp2",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_deis",
    "sample_res_multistep",
    "sample_res_multistep_ancestral",
    "sample_gradient_estimation",
    "sample_er_sde",
    "sample_seeds_2",
    "sample_seeds_3",
    "sample_exp_heun_2_x0",
    "sample_exp_heun_2_x0_sde",
    "sample_sa_solver",
    "sample_uni_pc",
    "sample_uni_pc_bh2",
    "sample_dpmpp_2m_cfg_pp",
    "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp",
    "sample_gradient_estimation_cfg_pp",
    "sample_res_multistep_ancestral_cfg_pp",
    "sample_res_multistep_cfg_pp",
]


@described(ARGUMENTS)
def sample_euler(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None,
    noise_sampler: NoiseSampler = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """EDM's Euler (arXiv 2206.00364, alg. 2). noise_sampler and seeds are for the churn."""
    return run(
        samplers.edm_euler, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise), slope_first=True,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_heun(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None,
    noise_sampler: NoiseSampler = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """EDM's Heun (arXiv 2206.00364, alg. 2): two model calls in a step. noise_sampler and seeds are for the churn."""
    return run(
        samplers.edm_heun, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise), slope_first=True, calls=twice,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpm_2(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None,
    noise_sampler: NoiseSampler = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """EDM's algorithm 2 with the slope of the step's middle: two model calls in a step. noise_sampler and seeds are for the
    churn.
    """
    return run(
        samplers.dpm_2, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        churn=(s_churn, s_tmin, s_tmax, s_noise), slope_first=True, calls=twice,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_euler_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Euler down to sigma_down, then noise up."""
    return run(
        samplers.euler_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler,
        flow=ancestral(samplers.flow_euler, eta), **noisy(eta, s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpm_2_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """sample_dpm_2 down to sigma_down, then noise up: two model calls in a step, one and no noise where sigma_down is 0."""
    options = noisy(eta, s_noise)
    return run(
        samplers.dpm_2_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler,
        calls=twice_down(options["eta"]), flow=ancestral(flows.dpm_2_ancestral, eta, twice), **options,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpmpp_2s_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S), ancestral: two model calls in a step, one where sigma_down is 0."""
    options = noisy(eta, s_noise)
    return run(
        samplers.dpmpp_2s, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        calls=twice_down(options["eta"]), flow=ancestral(flows.dpmpp_2s_ancestral, eta, twice), **options,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_lms(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    order: int = 4, *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Linear multistep. It draws no noise.

    order: 1 to 4.
    """
    return run(
        samplers.lms, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds,
        slope_first=True, order=order,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpmpp_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, r: float = 1 / 2,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++, SDE: two model calls in a step, and noise after each.

    r: where the second call of a step lies in log sigma, in (0, 1].
    """
    return run(
        samplers.dpmpp_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        calls=twice, middles=(r,), flow=BY_RATIO, r=r, **noisy(eta, s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpmpp_2m(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M). It draws no noise."""
    return run(
        samplers.dpmpp_2m, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds,
        lower_order_final=False,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpmpp_2m_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, solver_type: str = "midpoint",
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M), SDE.

    solver_type: "midpoint" or "heun".
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type: expected 'midpoint' or 'heun', got {solver_type!r}")
    return run(
        samplers.dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        flow=BY_RATIO, **noisy(eta, s_noise), solver=solver_type, lower_order_final=False,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpmpp_3m_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M), SDE."""
    return run(
        samplers.dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        flow=BY_RATIO, **noisy(eta, s_noise), lower_order_final=False,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpm_fast(
    model: Denoiser, x: Tensor, sigma_min: float, sigma_max: float, n: int, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast (arXiv 2206.00927, section 3.4): n model calls in steps of orders 3, 3, ..., equal in log sigma.

    n: how many model calls, in n//3 + 1 steps. An array of lambda has a value for each step.
    """
    check_ends(sigma_min, sigma_max)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n: expected an integer of at least 1, got {n!r}")
    steps = int(n) // 3 + 1
    orders = [3] * (steps - 2) + [2, 1] if n % 3 == 0 else [3] * (steps - 1) + [int(n) % 3]
    start, end = (-torch.tensor([float(sigma_max), float(sigma_min)]).log()).tolist()
    sigmas = (-torch.linspace(start, end, steps + 1)).exp().to(x.device if isinstance(x, Tensor) else "cpu")
    return run(
        samplers.dpm_solver, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        calls=lambda levels: np.array(orders), slope_first=True, dpm=True, flow=without_noise(eta),
        order=orders, least=float(sigmas[-1]), **noisy(eta, s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_dpm_adaptive(
    model: Denoiser, x: Tensor, sigma_min: float, sigma_max: float, extra_args: Extra = None, callback: Callback = None,
    disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05,
    pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler = None, return_info: bool = False,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor | tuple[Tensor, dict[str, int]]:  # fmt: skip
    """DPM-Solver-12 or 23 (arXiv 2206.00927, appendix C): steps as long as the two orders agree.

    The error is one number of the whole batch, which the host waits for.

    order: 2 or 3, the higher of the two orders.
    rtol, atol: how much of the two orders' difference is allowed, relative and absolute.
    h_init: the length of the first step in log sigma.
    pcoeff, icoeff, dcoeff, accept_safety: of the controller of the steps' length.
    eps_scaling: lambda: one number, or by noise level, since the steps are not known.
    correction: of the state after each accepted step: numbers, or by noise level.
    seeds: (B,), for noise made in the kernel: the k-th accepted step has the k-th noise.
    return_info: also return {"steps", "nfe", "n_accept", "n_reject"}.
    """
    check_ends(sigma_min, sigma_max)
    check(x)
    flow = without_noise(eta) if is_flow(sampling_of(model)) else None
    if flow is not None:
        check_flow(flow, np.array([sigma_max, sigma_min]))
    if order not in (2, 3):
        raise ValueError(f"order: expected 2 or 3, got {order!r}")
    lambda_t = scaling.as_scaling(eps_scaling, "eps_scaling")
    if not lambda_t.by_level and (lambda_t.spec is None or lambda_t.spec["kind"] != "constant"):
        raise ValueError(
            f"eps_scaling: expected one number, or lambda by noise level, since the steps are not known, got {eps_scaling!r}"
        )
    made = of_any_step(correction, x)
    options = noisy(eta, s_noise)
    chosen = None if seeds is None else as_noise_seeds(seeds, noise_sampler, x)
    controller = StepSize(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    t, t_end = (-torch.tensor(float(sigma)).log() for sigma in (sigma_max, sigma_min))
    x_prev = x
    with torch.no_grad(), tqdm(disable=disable) as bar:
        while t < t_end - 1e-5:
            t_next = torch.minimum(t_end, t + controller.h)
            sigma, sigma_next = ((-each).exp().to(x.device) for each in (t, t_next))
            pair = Pair(order, sigma, sigma_next, float((-t_end).exp()), lambda_t, options, x, flow)
            low, high, denoised, estimate = pair.run(model, x, extra_args or {})
            allowed = torch.clamp(rtol * torch.maximum(low.float().abs(), x_prev.float().abs()), min=atol)
            error = torch.linalg.norm((low.float() - high.float()) / allowed) / x.numel() ** 0.5
            if controller.accepts(float(error)):
                noise: dict[str, Any] = {}
                if pair.noise and chosen is not None:
                    noise = {"seeds": chosen}
                elif pair.noise:
                    drawn = torch.randn_like(x) if noise_sampler is None else noise_sampler(sigma, sigma_next)
                    noise = {"noise": drawn.to(x.dtype)}
                x_prev, x, t = low, high, t_next
                if noise or made is not None:
                    columns = pair.after(made, sigma_max) | {"draw": float(info["n_accept"])}
                    x = step(x, estimate, *sample_rows(x, **columns), **noise)
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            bar.update(order)
            if callback is not None:
                at = (-t).exp()
                told = {
                    "sigma": at,
                    "sigma_hat": at,
                    "x": x,
                    "i": info["steps"] - 1,
                    "t": t,
                    "t_up": t,
                    "denoised": denoised,
                }
                callback(told | {"error": error, "h": controller.h} | info)
    return (x, info) if return_info else x
