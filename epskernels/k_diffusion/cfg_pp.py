"""ComfyUI's CFG++ samplers (arXiv 2406.08070): x_0 is the guided estimate, the noise is the unconditional one's.

    x' = c_x*x + c_y*guided + c_m0*m0 + c_m1*m1 + noise        m: of the unconditional estimate; itself, or its slope

The model is ComfyUI's: its hook after guidance tells the unconditional estimate. Lambda is the model's too (the node Epsilon
Scaling): there is no eps_scaling here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import solvers
from ..docstrings import described
from ..ops import step
from ..samplers.common import number as finite
from ..spec import COLUMNS
from ..typing import Array
from .flows import BY_VELOCITY, Flow, is_flow, sampling_of, without_noise
from .sampling import (
    ARGUMENTS,
    Callback,
    Denoiser,
    Extra,
    NoiseSampler,
    Seeds,
    Sigmas,
    as_levels,
    as_noise_seeds,
    check,
    check_flow,
    check_output,
    noisy,
)

OF_COMFYUI = {
    "model": "ComfyUI's, of x_0 + sigma*eps or of a flow: its hook after guidance tells the unconditional estimate."
}

Weights = Callable[[Array, Array, Array], dict[str, Any]]  # columns, of alpha, (N + 1,), sigma and sigma_next, (N,)


def _rows(weights: Weights, levels: Array, on_flow: bool) -> Tensor:
    """float32 (N, columns), a row for each step between the levels, (N + 1,)."""
    sigma, sigma_next = levels[:-1], levels[1:]
    columns: dict[str, Any] = {"d_f": 1.0, "clip": np.inf, "g": 1.0, "draw": np.arange(len(sigma))}
    with np.errstate(divide="ignore", invalid="ignore"):
        columns |= weights(1 - levels if on_flow else np.ones(len(levels)), sigma, sigma_next)
    zero = np.zeros(len(sigma))
    return torch.tensor(np.stack([columns.get(name, 0.0) + zero for name in COLUMNS], 1), dtype=torch.float32)


def _run(
    weights: Weights,
    model: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Extra,
    callback: Callback,
    disable: bool | None,
    seeds: Seeds,
    noise_sampler: NoiseSampler = None,
    flow: Flow = BY_VELOCITY,
) -> Tensor:
    """The state after the last step. Raises ValueError as the other functions do."""
    levels = as_levels(sigmas)
    check(x)
    chosen = None if seeds is None else as_noise_seeds(seeds, noise_sampler, x)
    on_flow = is_flow(sampling_of(model))
    if on_flow:
        check_flow(flow, levels)
    moves = np.append(np.diff(levels) < 0, True)  # a step of length 0 leaves x as it is
    told = sigmas if isinstance(sigmas, Tensor) else torch.tensor(levels, dtype=torch.float32, device=x.device)
    unconditional: list[Tensor] = []

    def hook(args: dict[str, Any]) -> Tensor:
        unconditional[:] = [args["uncond_denoised"]]
        return args["denoised"]

    options = dict((extra_args or {}).get("model_options", {}), disable_cfg1_optimization=True)
    options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), hook]
    arguments, m1, row = (extra_args or {}) | {"model_options": options}, None, 0
    with torch.no_grad():
        rows = _rows(weights, levels[moves], on_flow) if moves[:-1].any() else torch.zeros(0, len(COLUMNS))
        draws, indices = rows[:, COLUMNS.index("c_noise")].tolist(), torch.arange(len(rows), device=x.device).unbind()
        rows = rows.to(x.device)
        for i in tqdm(range(len(levels) - 1), disable=disable):
            guided = check_output(model(x, x.new_full((len(x),), levels[i]), **arguments), x)
            if not unconditional:
                raise ValueError(
                    "model: expected ComfyUI's, whose hooks after guidance tell the unconditional estimate"
                )
            if callback is not None:
                callback({"x": x, "i": i, "sigma": told[i], "sigma_hat": told[i], "denoised": guided})
            if not moves[i]:
                continue
            noise: dict[str, Any] = {}
            if draws[row] and chosen is not None:
                noise = {"seeds": chosen}
            elif draws[row]:
                drawn = torch.randn_like(x) if noise_sampler is None else noise_sampler(told[i], told[i + 1])
                noise = {"noise": drawn.to(x.dtype)}
            inputs = {"y": guided.to(x.dtype), "m1": m1} | noise
            x, m1 = step(x, unconditional[0], rows, indices[row], return_m0=True, **inputs)[:2]
            row += 1
    return x


def _euler(eta: float, s_noise: float) -> Weights:
    def weights(alpha: Array, sigma: Array, sigma_next: Array) -> dict[str, Any]:
        down, up = solvers.ancestral(alpha[:-1], sigma, alpha[1:], sigma_next, eta)
        kept = down / sigma
        return {"c_x": kept, "c_y": alpha[1:], "c_m0": -kept * alpha[:-1], "c_noise": s_noise * up}

    return weights


def _res_multistep(eta: float, s_noise: float) -> Weights:
    def weights(alpha: Array, sigma: Array, sigma_next: Array) -> dict[str, Any]:
        down, up = solvers.ancestral(1.0, sigma, 1.0, sigma_next, eta)
        h, kept = np.log(sigma / down), down / sigma
        of_m = solvers.multistep(h, solvers.integrals(1.0, -h), "heun")[2]
        second = (down > 0) & (np.arange(len(sigma)) > 0)
        newest, before = (np.where(second, each, 0.0) for each in of_m[:2])
        of_guided = np.where(second, kept, 1.0)
        return {"c_x": kept, "c_y": of_guided, "c_m0": newest - kept, "c_m1": before, "c_noise": s_noise * up}

    return weights


def _dpmpp_2m(alpha: Array, sigma: Array, sigma_next: Array) -> dict[str, Any]:
    h, kept = np.log(sigma / sigma_next), sigma_next / sigma
    second = (sigma_next > 0) & (np.arange(len(sigma)) > 0)
    more = np.where(second, solvers.integrals(1.0, -h)[0] * h / (2 * solvers.earlier(h, 1)), 0.0)
    return {"c_x": kept, "c_y": 1 + more, "c_m0": -kept, "c_m1": -more}


def _gradient_estimation(gamma: float) -> Weights:
    def weights(alpha: Array, sigma: Array, sigma_next: Array) -> dict[str, Any]:
        second = (sigma_next > 0) & (np.arange(len(sigma)) > 0)
        more = np.where(second, (gamma - 1) * (sigma_next - sigma), 0.0)
        return {"d_x": 1 / sigma, "d_f": -1 / sigma, "c_y": 1.0, "c_m0": sigma_next + more, "c_m1": -more}

    return weights


@described(ARGUMENTS, OF_COMFYUI)
def sample_euler_cfg_pp(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Euler's steps with CFG++. It draws no noise."""
    return _run(_euler(0.0, 1.0), model, x, sigmas, extra_args, callback, disable, seeds)


@described(ARGUMENTS, OF_COMFYUI)
def sample_euler_ancestral_cfg_pp(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, *, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Euler with CFG++ down to sigma_down, then noise up, on flows too."""
    options = noisy(eta, s_noise)
    weights = _euler(options["eta"], options["S_noise"])
    return _run(weights, model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler)


@described(ARGUMENTS, OF_COMFYUI)
def sample_dpmpp_2m_cfg_pp(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) with CFG++: the difference is that of the guided estimate and the unconditional one before. No noise."""
    return _run(_dpmpp_2m, model, x, sigmas, extra_args, callback, disable, seeds)


@described(ARGUMENTS, OF_COMFYUI)
def sample_res_multistep_cfg_pp(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    *, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """RES, second order multistep, with CFG++. It draws no noise."""
    return _run(_res_multistep(0.0, 1.0), model, x, sigmas, extra_args, callback, disable, seeds)


@described(ARGUMENTS, OF_COMFYUI)
def sample_res_multistep_ancestral_cfg_pp(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, *, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """RES with CFG++ down to sigma_down, then noise up. A flow is refused unless eta is 0."""
    options = noisy(eta, s_noise)
    weights = _res_multistep(options["eta"], options["S_noise"])
    return _run(weights, model, x, sigmas, extra_args, callback, disable, seeds, noise_sampler, without_noise(eta))


@described(ARGUMENTS, OF_COMFYUI)
def sample_gradient_estimation_cfg_pp(
    model: Denoiser, x: Tensor, sigmas: Sigmas, extra_args: Extra = None, callback: Callback = None, disable: bool | None = None,
    ge_gamma: float = 2.0, *, seeds: Seeds = None,
) -> Tensor:  # fmt: skip
    """Gradient estimation with CFG++, by the slopes of the unconditional estimate. It draws no noise."""
    weights = _gradient_estimation(finite("ge_gamma", ge_gamma))
    return _run(weights, model, x, sigmas, extra_args, callback, disable, seeds)
