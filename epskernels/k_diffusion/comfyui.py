"""ComfyUI's samplers beyond k-diffusion's, by its signatures and names, on x_0 + sigma*eps and on flows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import samplers, scaling, solvers
from ..docstrings import described
from ..samplers.common import Calls, karras, one_of, points, several_calls
from ..samplers.common import number as finite
from ..schedule import KarrasSchedule
from ..table import Table
from ..typing import Array
from .flows import BY_RATIO, Flow, is_flow, sampling_of, without_noise
from .sampling import (
    ARGUMENTS,
    Callback,
    Correction,
    Denoiser,
    Extra,
    NoiseSampler,
    Seeds,
    Sigmas,
    as_levels,
    noisy,
    number,
    run,
    twice,
)

_SMALLEST = 0.001  # where ComfyUI's UniPC ends instead of at 0
# Its DEIS counts in the time of the variance preserving SDE whose sigma/alpha is 0.002 at t = 0.001 and 80 at t = 1.
_ENDS = np.log1p(np.array([0.002, 80.0]) ** 2)
_BETA_D = 2 * (_ENDS[0] / 0.001 - _ENDS[1]) / (0.001 - 1)


@described(ARGUMENTS)
def sample_dpmpp_2m_sde_heun(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M), SDE, with the heun solver."""
    return run(
        samplers.dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        flow=BY_RATIO, **noisy(eta, s_noise), solver="heun", lower_order_final=False,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_ddpm(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Ancestral sampling with the posterior's variance: euler_ancestral at eta 1. A flow is refused."""
    return run(
        samplers.euler_ancestral, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler,
        flow=Flow(refusal="model: expected a denoiser of x_0 + sigma*eps for ddpm, got ComfyUI's model of a flow; take "
                  "euler_ancestral"),
    )  # fmt: skip


def _consistent(schedule: KarrasSchedule, steps: int, **options: Any) -> Table:
    """m0, with fresh noise of the next level, on the path of the levels."""
    return samplers.flow_euler(schedule.grid(steps), steps, stochastic=True, **options)


@described(ARGUMENTS)
def sample_lcm(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """The estimate of x_0, with fresh noise of the next level, for models of few steps (LCM, Turbo)."""
    return run(
        _consistent, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        flow=Flow("own", lambda grid, steps, **o: samplers.flow_euler(grid, steps, stochastic=True, **o)),
    )  # fmt: skip


def _heunpp2(schedule: KarrasSchedule, steps: int, *, scaling: scaling.ScalingLike = 1.0, prediction: str) -> Table:
    """Up to three calls in a step, the third at the level after next; two in the last but one, one in the last."""
    grid = karras(schedule).grid(steps)
    calls: list[list[Calls]] = [[], [], []]
    ends = np.append(grid.sigma, grid.sigma_end)
    for count, which in ((1, slice(-1, None)), (2, slice(-2, -1)), (3, slice(0, -2))):
        step = np.arange(steps)[which]
        if len(step):
            levels = [ends[step + k] for k in range(count)]
            rows = solvers.from_before(solvers.heunpp(levels, ends[step + 1], ends[0]))
            for k, row in enumerate(rows):
                calls[k].append((points(grid, step + k), step, row))
    return several_calls("heunpp2", grid, sum(calls, []), scaling, prediction, None, 1.0)


@described(ARGUMENTS)
def sample_heunpp2(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Heun++: three model calls in a step, whose slopes count by their levels. It draws no noise, and has no churn."""
    return run(
        _heunpp2, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, slope_first=True,
        calls=lambda levels: np.minimum(3, np.arange(len(levels) - 1, 0, -1)),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_ipndm(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    max_order: int = 4, *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """IPNDM, of order 1 to 4: the weights of equal steps. It draws no noise."""
    one_of("max_order", max_order, (1, 2, 3, 4))
    return run(
        samplers.ipndm, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, slope_first=True, order=max_order
    )  # fmt: skip


@described(ARGUMENTS)
def sample_ipndm_v(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    max_order: int = 4, *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """IPNDM for steps of any length, of order 1 to 4, as published. It draws no noise."""
    one_of("max_order", max_order, (1, 2, 3, 4))
    return run(
        samplers.ipndm_v, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, slope_first=True,
        order=max_order,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_deis(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    max_order: int = 3, *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """tAB-DEIS, of order 1 to 4; its integrals are exact, where ComfyUI adds up 10,000 points. It draws no noise."""
    one_of("max_order", max_order, (1, 2, 3, 4))
    return run(
        samplers.deis, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, slope_first=True,
        order=max_order, beta_d=_BETA_D, beta_min=_ENDS[1] - _BETA_D / 2,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_res_multistep(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """RES, second order multistep. It draws no noise."""
    return run(samplers.res_multistep, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds)


@described(ARGUMENTS)
def sample_res_multistep_ancestral(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """RES down to sigma_down, then noise up. A flow is refused unless eta is 0."""
    return run(
        samplers.res_multistep, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, noise_sampler,
        flow=without_noise(eta), **noisy(eta, s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_gradient_estimation(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    ge_gamma: float = 2.0,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Euler's step along ge_gamma*slope + (1 - ge_gamma)*(the slope before). It draws no noise."""
    return run(
        samplers.gradient_estimation, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds,
        slope_first=True, gamma=finite("ge_gamma", ge_gamma),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_er_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    s_noise: float = 1.0, noise_sampler: NoiseSampler = None, noise_scaler: Callable[[Tensor], Tensor] | None = None,
    max_stage: int = 3, *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """ER-SDE-Solver-1 to 3. Its integrals are exact, where ComfyUI adds up 200 points.

    noise_scaler: the noise scale phi of sigma/alpha; None for ComfyUI's default.
    max_stage: 1, 2 or 3, the order.
    """
    one_of("max_stage", max_stage, (1, 2, 3))
    scaler = None if noise_scaler is None else lambda r: noise_scaler(torch.as_tensor(r)).numpy()
    return run(
        samplers.er_sde, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler, flow=BY_RATIO,
        order=max_stage, scaler=scaler, S_noise=number("s_noise", s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_seeds_2(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, r: float = 0.5, solver_type: str = "phi_1",
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """SEEDS-2: two model calls in a step, and noise after each.

    r: where the second call of a step lies in log SNR, in (0, 1].
    solver_type: "phi_1" or "phi_2".
    """
    if solver_type not in ("phi_1", "phi_2"):
        raise ValueError(f"solver_type: expected 'phi_1' or 'phi_2', got {solver_type!r}")
    return run(
        samplers.seeds_2, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler, flow=BY_RATIO,
        calls=twice, middles=(r,), chained=True, r=r, solver="midpoint" if solver_type == "phi_1" else "heun",
        **noisy(eta, s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_exp_heun_2_x0(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    solver_type: str = "phi_2",
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Heun's exponential method: SEEDS-2 whose second call is at the step's end, without noise.

    solver_type: "phi_1" or "phi_2".
    """
    return sample_seeds_2(
        model, x, sigmas, extra_args, callback, disable, 0.0, 1.0, None, 1.0, solver_type,
        eps_scaling=eps_scaling, correction=correction, seeds=seeds,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_exp_heun_2_x0_sde(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, solver_type: str = "phi_2",
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """SEEDS-2 whose second call is at the step's end, after the step's noise.

    solver_type: "phi_1" or "phi_2".
    """
    return sample_seeds_2(
        model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, 1.0, solver_type,
        eps_scaling=eps_scaling, correction=correction, seeds=seeds,
    )  # fmt: skip


@described(ARGUMENTS)
def sample_seeds_3(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """SEEDS-3: three model calls in a step, at its start, 1/3 and 2/3 in log SNR, and noise after each."""
    return run(
        samplers.seeds_3, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler, flow=BY_RATIO,
        calls=lambda levels: np.where(levels[1:] > 0, 3, 1), middles=(1 / 3, 2 / 3), chained=True, **noisy(eta, s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_sa_solver(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    tau_func: Callable[[float], float] | None = None, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    predictor_order: int = 3, corrector_order: int = 4,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """SA-Solver: a stochastic multistep predictor, corrected by the next model call.

    tau_func: how much noise there is at the sigma where a step ends. Default 1 between ComfyUI's 20 and 80 percent, 0
        outside; 1 everywhere for a model without model_sampling.
    predictor_order: 1 to 3.
    corrector_order: 1 to 4, or 0 for none.
    """
    sampling = sampling_of(model)

    def tau(ratio: Array) -> Array:
        sigma = ratio / (1 + ratio) if is_flow(sampling) else ratio
        if tau_func is not None:
            return np.array([number("tau_func", tau_func(each)) for each in sigma.tolist()])
        if sampling is None:
            return np.ones_like(sigma)
        begin, end = (float(sampling.percent_to_sigma(percent)) for percent in (0.2, 0.8))
        return np.where((end <= sigma) & (sigma <= begin), 1.0, 0.0)

    return run(
        samplers.sa_solver, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction,
        seeds, noise_sampler, flow=BY_RATIO,
        tau=tau, predictor_order=predictor_order, corrector_order=corrector_order, S_noise=number("s_noise", s_noise),
    )  # fmt: skip


@described(ARGUMENTS)
def sample_uni_pc(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    variant: str = "bh1", *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """UniPC of order 3, the last steps of lower ones. It ends at sigma 0.001 instead of 0, as in ComfyUI, or
    just below the level before, if that is no higher. It draws no noise.

    variant: "bh1" or "bh2".
    """
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant: expected 'bh1' or 'bh2', got {variant!r}")
    levels, alpha, to_image = as_levels(sigmas), 1.0, False
    if len(levels) > 1 and levels[-1] == 0:
        to_image = True
        levels[-1] = min(_SMALLEST, 0.999 * levels[-2])  # no step of length 0: the last call corrects the step before
        device = sigmas.device if isinstance(sigmas, Tensor) else "cpu"
        sigmas = torch.tensor(levels, dtype=torch.float32, device=device)
        alpha = 1 - levels[-1] if is_flow(sampling_of(model)) else 1.0
    x = run(
        samplers.unipc, model, x, sigmas, extra_args, callback, disable, eps_scaling, correction, seeds, order=3, solver=variant,
        to_image=to_image,
    )  # fmt: skip
    return x if alpha == 1 else x / alpha


@described(ARGUMENTS)
def sample_uni_pc_bh2(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, eps_scaling: scaling.ScalingLike = 1.0, correction: Correction = None, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """sample_uni_pc with B(h) = exp(h) - 1."""
    return sample_uni_pc(
        model, x, sigmas, extra_args, callback, disable, "bh2", eps_scaling=eps_scaling, correction=correction, seeds=seeds
    )  # fmt: skip
