"""ComfyUI's samplers and flows against float64 oracles; its nodes, against a stand-in of ComfyUI and inside ComfyUI itself.

EPSKERNELS_COMFYUI names a checkout of ComfyUI, EPSKERNELS_COMFYUI_PYTHON a Python with what it imports (default: this one).
"""

import asyncio
import copy
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

import epskernels
from epskernels import corrections, k_diffusion, samplers, scaling, schedule

from ..support import oracles
from .test_k_diffusion import EDM, FUNCTIONS, LEVELS, SHAPE, Noise, denoise, model, never, start

FLOW = np.array([1.0, 0.93, 0.8, 0.62, 0.4, 0.2, 0.07, 0.0])
FLOW_LEVELS = {"from_1": FLOW, "above_0": FLOW[1:-1], "one_to_0": FLOW[[4, -1]], "low": np.array([0.9, 0.6, 9e-4, 0.0])}
BETA_D = 2 * (np.log1p(0.002**2) / 0.001 - np.log1p(80.0**2)) / (0.001 - 1)


def of_sigma(oracle, **options):
    """An oracle of the form oracle(denoise, x, sigmas, lam, noise)."""

    def run(denoise, x, sigmas, noise):
        return getattr(oracles, oracle)(denoise, x, sigmas, np.ones(len(sigmas)), noise, **options)[-1]

    return run


def of_calls(oracle, by_eps=False, noisy=False, **options):
    """An oracle of the form oracle(denoise, x, alpha, sigma[, noise]), whose denoise is told the number of the call."""

    def run(denoise, x, sigmas, noise):
        def call(x, j):
            estimate = denoise(x, sigmas[j])
            return (x - estimate) / sigmas[j] if by_eps else estimate

        given = (noise,) if noisy else ()
        return getattr(oracles, oracle)(call, x, np.ones(len(sigmas)), sigmas, *given, **options)[-1]

    return run


def unipc(variant):
    """It ends at 0.001 instead of at 0; on a flow that level's share of x_0 is divided out."""

    def run(denoise, x, sigmas, noise):
        ended = np.append(sigmas[:-1], sigmas[-1] or min(0.001, 0.999 * sigmas[-2]))
        order = max(1, min(3, len(sigmas) - 2))
        return of_calls("unipc", order=order, variant=variant)(denoise, x, ended, noise)

    return run


def lcm(denoise, x, sigmas, noise):
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x = denoise(x, sigma) + after * noise[i]
    return x


# name: (oracle of x_0 + sigma*eps, how many noises a step has, our options, the form on flows)
ETA = {"eta": 0.6, "s_noise": 1.1}
COMFYUIS = {
    "dpmpp_2m_sde_heun": (of_sigma("sigma_dpmpp_2m_sde", solver="heun", **ETA), 1, ETA, "ratio"),
    "ddpm": (of_sigma("sigma_euler_ancestral", eta=1.0), 1, {}, "refused"),
    "lcm": (lcm, 1, {}, "own"),
    "heunpp2": (of_sigma("sigma_heunpp2"), 0, {}, "velocity"),
    "ipndm": (of_calls("ipndm", by_eps=True), 0, {}, "velocity"),
    "ipndm_v": (of_calls("ipndm_v", by_eps=True), 0, {}, "velocity"),
    "deis": (of_calls("deis", by_eps=True, beta=(np.log1p(6400.0) - BETA_D / 2, BETA_D)), 0, {}, "velocity"),
    "res_multistep": (of_sigma("sigma_res_multistep"), 0, {}, "velocity"),
    "res_multistep_ancestral": (of_sigma("sigma_res_multistep", **ETA), 1, ETA, "refused"),
    "gradient_estimation": (of_calls("gradient_estimation", by_eps=True, gamma=1.7), 0, {"ge_gamma": 1.7}, "velocity"),
    "er_sde": (of_calls("er_sde", noisy=True, s_noise=1.1), 1, {"s_noise": 1.1}, "ratio"),
    "seeds_2": (of_sigma("sigma_seeds_2", r=0.4, **ETA), 2, {"r": 0.4} | ETA, "ratio"),
    "seeds_3": (of_sigma("sigma_seeds_3", **ETA), 3, ETA, "ratio"),
    "exp_heun_2_x0": (of_sigma("sigma_seeds_2", eta=0.0, r=1.0, phi=2), -2, {}, "ratio"),
    "exp_heun_2_x0_sde": (of_sigma("sigma_seeds_2", r=1.0, phi=2, **ETA), 2, ETA, "ratio"),
    "sa_solver": (
        of_calls("sa_solver", noisy=True, predictor=3, corrector=4, tau=0.7), 1, {"tau_func": lambda sigma: 0.7}, "ratio",
    ),
    "uni_pc": (unipc("bh1"), 0, {}, "velocity"),
    "uni_pc_bh2": (unipc("bh2"), 0, {}, "velocity"),
}  # fmt: skip
# and k-diffusion's, on flows
KDIFFUSIONS = {
    "euler": (of_sigma("sigma_euler"), 0, {}, "velocity"),
    "heun": (of_sigma("sigma_heun"), 0, {}, "velocity"),
    "dpm_2": (of_sigma("sigma_dpm_2"), 0, {}, "velocity"),
    "lms": (of_sigma("sigma_lms"), 0, {}, "velocity"),
    "dpmpp_2m": (of_sigma("sigma_dpmpp_2m_sde", eta=0.0), 0, {}, "velocity"),
    "dpmpp_2m_sde": (of_sigma("sigma_dpmpp_2m_sde", **ETA), 1, ETA, "ratio"),
    "dpmpp_3m_sde": (of_sigma("sigma_dpmpp_3m_sde", **ETA), 1, ETA, "ratio"),
    "dpmpp_sde": (of_sigma("sigma_dpmpp_sde", r=0.3, **ETA), 2, {"r": 0.3} | ETA, "ratio"),
    "euler_ancestral": (functools.partial(oracles.flow_ancestral, **ETA), 1, ETA, "own"),
    "dpm_2_ancestral": (functools.partial(oracles.flow_ancestral, method="dpm_2", **ETA), 1, ETA, "own"),
    "dpmpp_2s_ancestral": (functools.partial(oracles.flow_ancestral, method="dpmpp_2s", **ETA), 1, ETA, "own"),
}


def flow_lcm(denoise, x, sigmas, noise):
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        x = (1 - after) * denoise(x, sigma) + after * noise[i]
    return x


def by_step(given, sigmas, each):
    """The noises that were drawn, one or a tuple for each step; zeros where none was."""
    drawn, steps = [z for _, _, z in given], len(sigmas) - 1
    count = abs(each)
    none = np.zeros(SHAPE) if count < 2 else (np.zeros(SHAPE),) * count
    if each <= 0:
        assert not drawn
        return [none] * steps
    groups = drawn if each == 1 else list(zip(*[iter(drawn)] * each, strict=True))
    assert len(groups) == steps - int(sigmas[-1] == 0)
    return groups + [none] * (steps - len(groups))


def run_ours(name, options, noise, *args, **more):
    function = getattr(k_diffusion, f"sample_{name}")
    if "noise_sampler" in inspect.signature(function).parameters and name not in ("euler", "heun", "dpm_2"):
        options = options | {"noise_sampler": noise}
    return function(*args, disable=True, **options, **more)


@pytest.mark.parametrize("name", COMFYUIS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_against_the_oracle(name, levels, lam):
    oracle, each, options, _ = COMFYUIS[name]
    sigmas, noise = LEVELS[levels], Noise()
    x = start(sigmas)
    result = run_ours(name, options, noise, model, x, torch.tensor(sigmas), {"shift": 0.2}, eps_scaling=lam)

    def scaled(x, sigma):
        return x - (x - denoise(x, sigma, 0.2)) / lam

    expected = oracle(scaled, x.double().numpy(), sigmas, by_step(noise.given, sigmas, each))
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=3e-5 * max(1, np.abs(expected).max()))


# ---- flows ----


class CONST:
    """Named as ComfyUI's flow parametrisation is."""


class Sampling:
    """ComfyUI's model_sampling of a model of x_0 + sigma*eps."""

    def percent_to_sigma(self, percent):
        return float(np.exp(np.interp(percent, [0, 1], np.log([80.0, 0.002]))))


class FlowSampling(Sampling, CONST):
    def percent_to_sigma(self, percent):
        return 1.0 - percent


class Model:
    """ComfyUI's BaseModel, which the hook is given."""

    def __init__(self, model_sampling):
        self.model_sampling = model_sampling


class Wrapper:
    """ComfyUI's samplers are given a wrapper (for inpainting) of a wrapper (the guider) of the model."""

    def __init__(self, inner_model, call=model):
        self.inner_model, self.call = inner_model, call

    def __call__(self, x, sigma, **extra_args):
        return self.call(x, sigma, **extra_args)


def flow_denoise(x, sigma):
    return 1.2 * np.tanh(0.8 * x + 0.3 * np.sin(np.roll(x, 1, -1)) + sigma)


def flow_model(x, sigma, **extra_args):
    return torch.tensor(flow_denoise(x.double().numpy(), float(sigma[0].double()))).float()


ON_FLOWS = {name: entry for name, entry in (COMFYUIS | KDIFFUSIONS).items() if entry[3] != "refused"}


def on_ratio(oracle, denoise, x, sigmas, noise):
    """An oracle of x_0 + r*eps on a flow, r = sigma/(1 - sigma)."""

    def of_ratio(x, r):
        return denoise(x / (1 + r), r / (1 + r))

    r = sigmas / (1 - sigmas)
    return oracle(of_ratio, x * (1 + r[0]), r, noise) / (1 + r[-1])


@pytest.mark.parametrize("name", ON_FLOWS)
@pytest.mark.parametrize("levels", FLOW_LEVELS)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_flow_against_the_oracle(name, levels, lam):
    """lambda divides eps of (1 - sigma)*x_0 + sigma*eps, and is 1 where x is noise alone."""
    oracle, each, options, form = ON_FLOWS[name]
    sigmas, noise = FLOW_LEVELS[levels], Noise()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    flow = Wrapper(Wrapper(Model(FlowSampling())), flow_model)
    result = run_ours(name, options, noise, flow, x, torch.tensor(sigmas, dtype=torch.float32), eps_scaling=lam)
    seen = np.float32(sigmas).astype(np.float64)
    if form == "ratio" and seen[0] == 1:  # as ComfyUI has it: no log SNR there
        seen[0] = np.float32(1 - 1e-4)
    lambdas = iter(lambda_of_calls(name, seen, lam))

    def scaled(x, sigma):
        alpha, by = 1 - sigma, next(lambdas)
        return flow_denoise(x, sigma) if by == 1 else x / alpha - (x / alpha - flow_denoise(x, sigma)) / by

    z = by_step(noise.given, seen, each)
    start = x.double().numpy()
    if form == "ratio":
        expected = on_ratio(oracle, scaled, start, seen, z)
    elif name == "lcm":
        expected = flow_lcm(scaled, start, seen, z)
    else:
        expected = oracle(scaled, start, seen, z)
    if "uni_pc" in name and sigmas[-1] == 0:
        expected = expected / (1 - min(0.001, 0.999 * seen[-2]))
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=5e-5 * max(1, np.abs(expected).max()))


CALLS = {"heunpp2": 3, "seeds_3": 3} | dict.fromkeys(
    ["heun", "dpm_2", "seeds_2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpmpp_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral"], 2
)  # fmt: skip


def lambda_of_calls(name, sigmas, lam):
    """lambda of each call: its step's, 1 where that begins with noise alone."""
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        calls = CALLS.get(name, 1) if after > 0 else 1
        if name == "heunpp2":
            calls = min(3, len(sigmas) - 1 - i)
        yield from [1.0 if 1 - sigma < sigma / 900 else lam] * calls


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.parametrize("lam", [1.0, 1.01])
def test_dpm_on_a_flow(name, lam):
    """Along the slope: as on x_0 + sigma*eps, by a model whose eps was divided before."""
    x, n = torch.randn(SHAPE), (7,) if name == "dpm_fast" else ()

    def scaled(x, sigma):
        s = sigma.reshape(-1, 1, 1, 1).double()
        state, told = x.double() / (1 - s), flow_model(x, sigma).double()
        return (state - (state - told) / lam).float()

    run = functools.partial(getattr(k_diffusion, f"sample_{name}"), disable=True)
    result = run(Wrapper(Model(FlowSampling()), flow_model), x, 0.03, 0.97, *n, eps_scaling=lam)
    if lam == 1 or name == "dpm_adaptive":
        torch.testing.assert_close(result, run(scaled, x, 0.03, 0.97, *n), rtol=1e-4, atol=1e-4)
    else:  # a step's calls have its lambda, as have all here
        torch.testing.assert_close(result, run(scaled, x, 0.03, 0.97, *n), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="eta: expected 0 for a flow, got 0.5; take euler_ancestral"):
        run(Wrapper(Model(FlowSampling()), never), x, 0.03, 0.97, *n, eta=0.5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ddpm", {}, "model: expected a denoiser of x_0 . sigma.eps for ddpm, got ComfyUI's model of a flow; take euler_anc"),
        ("res_multistep_ancestral", {}, "eta: expected 0 for a flow, got 1.0; take euler_ancestral, dpmpp_2s_ancestral or"),
        ("euler", {"s_churn": 1.0}, "s_churn: expected 0 for a flow, .* got 1.0; take euler_ancestral"),
        ("euler_ancestral", {"eta": 1.5}, r"eta: expected a value in \[0, 1\] for a flow, got 1.5"),
        ("dpm_2_ancestral", {"eta": 1.5}, r"eta: expected a value in \[0, 1\] for a flow, got 1.5"),
        ("dpmpp_2m", {"sigmas": [1.2, 0.5, 0.0]}, r"sigmas: expected values of at most 1 for a flow, got \[1.2, 0.5, 0.0\]"),
        ("dpmpp_2m_sde", {"sigmas": [1.0, 1.0, 0.0]}, "sigmas: expected .* that do not rise"),
    ],
)  # fmt: skip
def test_flow_refuses(name, options, message):
    given = {"x": torch.zeros(SHAPE), "sigmas": torch.tensor(FLOW)} | options
    with pytest.raises(ValueError, match=message):
        getattr(k_diffusion, f"sample_{name}")(Wrapper(Wrapper(Model(FlowSampling())), never), **given)


def test_res_multistep_ancestral_without_noise_takes_a_flow():
    flow, x = Wrapper(Model(FlowSampling()), flow_model), torch.randn(SHAPE)
    run = functools.partial(k_diffusion.sample_res_multistep_ancestral, flow, x, torch.tensor(FLOW), disable=True)
    assert torch.equal(run(eta=0.0), k_diffusion.sample_res_multistep(flow, x, torch.tensor(FLOW), disable=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_comfyui_model_that_is_no_flow(name):
    """As any other denoiser."""
    run = functools.partial(getattr(k_diffusion, f"sample_{name}"), disable=True, seeds=[3, 4])
    other = Wrapper(Wrapper(Model(Sampling())))
    assert torch.equal(run(other, start(EDM), torch.tensor(EDM)), run(model, start(EDM), torch.tensor(EDM)))


def test_flow_euler_by_eta():
    """The table that the ancestral step of flows is, from a FlowSchedule."""
    grid = schedule.FlowSchedule(3.0).grid(6)
    table = samplers.flow_euler(schedule.FlowSchedule(3.0), 6, eta=0.6, S_noise=1.1, scaling=1.01, prediction="sample")
    sigmas = np.append(grid.sigma, 0.0)
    noise = {i: epskernels.normal([5], SHAPE[1:], draw=i, stream=0).double().numpy() for i in range(6)}
    x = np.random.default_rng(9).normal(size=(1, *SHAPE[1:]))
    state = torch.tensor(x).float()
    for i in range(6):
        f = torch.tensor(flow_denoise(state.double().numpy(), sigmas[i])).float()
        state = epskernels.step(state, f, table, i, seeds=torch.tensor([5]))

    def scaled(x, sigma):
        return (
            flow_denoise(x, sigma)
            if sigma == 1
            else x / (1 - sigma) - (x / (1 - sigma) - flow_denoise(x, sigma)) / 1.01
        )

    expected = oracles.flow_ancestral(scaled, x, sigmas, noise, **ETA)
    np.testing.assert_allclose(state.double().numpy(), expected, rtol=0, atol=3e-5 * max(1, np.abs(expected).max()))
    for bad in ({"eta": 1.5}, {"eta": 0.5, "stochastic": True}):
        with pytest.raises(ValueError, match=r"eta: expected a value in \[0, 1\], and 0 where stochastic"):
            samplers.flow_euler(schedule.FlowSchedule(), 6, **bad)


def test_sa_solver_draws_between_comfyuis_percents():
    """ComfyUI's default: noise from 20 to 80 percent."""
    noise, sampling = Noise(), Sampling()
    x, sigmas = start(EDM), torch.tensor(EDM)
    k_diffusion.sample_sa_solver(Wrapper(Model(sampling)), x, sigmas, disable=True, noise_sampler=noise)
    low, high = sampling.percent_to_sigma(0.8), sampling.percent_to_sigma(0.2)
    ends = [sigma for sigma in EDM[1:] if low <= sigma <= high]
    assert 0 < len(ends) < len(EDM) - 2
    assert [after for _, after, _ in noise.given] == pytest.approx(ends)


@pytest.mark.parametrize("name", ["seeds_3", "exp_heun_2_x0_sde", "dpmpp_sde"])
@pytest.mark.parametrize("flow", [False, True])
def test_the_levels_that_a_noise_sampler_is_told(name, flow):
    """SEEDS' noises follow each other; dpmpp_sde's both begin where the step does."""
    noise, sampling = Noise(), FlowSampling() if flow else Sampling()
    sigmas = torch.tensor([0.9, 0.4, 0.1, 0.0])
    wrapped = Wrapper(Wrapper(Model(sampling)), flow_model)
    getattr(k_diffusion, f"sample_{name}")(wrapped, torch.randn(SHAPE), sigmas, disable=True, noise_sampler=noise)
    t = -torch.log(sigmas[:3].double() / (1 - sigmas[:3].double()) if flow else sigmas[:3].double())

    def level(i, r):
        at = torch.exp(-(t[i] + r * (t[i + 1] - t[i])))
        return float(at / (1 + at) if flow else at)

    at = {"seeds_3": (1 / 3, 2 / 3, 1), "exp_heun_2_x0_sde": (1, 1), "dpmpp_sde": (0.5, 1)}[name]
    begin = {"seeds_3": (0, 1 / 3, 2 / 3), "exp_heun_2_x0_sde": (0, 1), "dpmpp_sde": (0, 0)}[name]
    expected = [(level(i, a), level(i, b)) for i in (0, 1) for a, b in zip(begin, at, strict=True)]
    np.testing.assert_allclose([pair[:2] for pair in noise.given], expected, rtol=1e-5)


# ---- CFG++ ----

CFG_PP = {
    "euler_cfg_pp": {},
    "euler_ancestral_cfg_pp": ETA,
    "dpmpp_2m_cfg_pp": {},
    "res_multistep_cfg_pp": {},
    "res_multistep_ancestral_cfg_pp": ETA,
    "gradient_estimation_cfg_pp": {"ge_gamma": 1.7},
}


def unguided(x, sigma):
    return 0.7 * np.tanh(x) + 0.1 * sigma


def cfg_pp_by_hand(name, denoise, x, sigmas, noise, flow=False, eta=0.0, s_noise=1.0, ge_gamma=2.0):
    """ComfyUI's sampler of that name in float64; noise: of each step."""
    before, slope_before, down_before = None, None, None
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        guided, uncond = denoise(x, s), unguided(x, s)
        alpha, alpha_next = (1 - s, 1 - s_next) if flow and "euler" in name else (1.0, 1.0)
        slope = (x - alpha * uncond) / s
        down, up = oracles.ancestral_step(s / alpha if alpha else 1e12, s_next / alpha_next, eta)
        if s_next == 0:
            x = guided
        elif "euler" in name:
            x = alpha_next * (guided + s_noise * up * noise[i]) + alpha_next * down * slope
        elif "gradient" in name:
            x = guided + s_next * slope
            if slope_before is not None:
                x = x + (ge_gamma - 1) * (slope - slope_before) * (s_next - s)
        elif "2m" in name:
            kept, mixed = s_next / s, 0.0
            if before is not None:
                mixed = (1 - kept) * np.log(s / s_next) / np.log(sigmas[i - 1] / s) / 2 * (guided - before)
            x = guided - kept * uncond + mixed + kept * x
        else:
            if before is None or down == 0:
                x = guided + down * slope
            else:
                h = np.log(s / down)
                c_2 = np.log(down_before / sigmas[i - 1]) / h
                phi_1 = -np.expm1(-h) / h
                phi_2 = (1 - phi_1) / h
                x = np.exp(-h) * (x + guided - uncond) + h * ((phi_1 - phi_2 / c_2) * uncond + phi_2 / c_2 * before)
            x = x + s_noise * up * noise[i]
        before, slope_before, down_before = uncond, slope, down
    return x


def hooked(told):
    """As ComfyUI's guider: it calls the hooks of model_options after guidance."""

    def call(x, sigma, model_options=None, **extra_args):
        guided = told(x, sigma)
        uncond = torch.tensor(unguided(x.double().numpy(), float(sigma[0].double()))).float()
        assert model_options["disable_cfg1_optimization"] and model_options["kept"] == 5
        for hook in model_options["sampler_post_cfg_function"]:
            guided = hook({"denoised": guided, "uncond_denoised": uncond})
        return guided

    return call


@pytest.mark.parametrize("name", CFG_PP)
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
def test_cfg_pp_against_the_oracle(name, flow, levels):
    options, noise = CFG_PP[name], Noise()
    sigmas = LEVELS[levels]
    if flow:
        sigmas = FLOW_LEVELS[{"to_0": "from_1", "two": "above_0"}.get(levels, levels)]
        options = {"eta": 0.0} if name == "res_multistep_ancestral_cfg_pp" else options
    given = Wrapper(Wrapper(Model(FlowSampling() if flow else Sampling())), hooked(flow_model if flow else model))
    x = start(sigmas)
    function = getattr(k_diffusion, f"sample_{name}")
    own = {"noise_sampler": noise} if "noise_sampler" in inspect.signature(function).parameters else {}
    extra_args = {"model_options": {"kept": 5}}
    result = function(given, x, torch.tensor(sigmas, dtype=torch.float32), extra_args, None, True, **options, **own)
    assert extra_args == {"model_options": {"kept": 5}}
    seen = np.float32(sigmas).astype(np.float64)
    expected = cfg_pp_by_hand(
        name, flow_denoise if flow else denoise, x.double().numpy(), seen, noise.of(seen[:-1]), flow, **options
    )
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=3e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", CFG_PP)
def test_cfg_pp_seeds_and_steps_of_length_0(name):
    run = functools.partial(
        getattr(k_diffusion, f"sample_{name}"), Wrapper(Model(Sampling()), hooked(model)),
        extra_args={"model_options": {"kept": 5}}, disable=True,
    )  # fmt: skip
    x, sigmas, seen = start(EDM), torch.tensor(EDM), []
    together = run(x, sigmas, seeds=[5, 6])
    assert torch.equal(together, torch.cat([run(x[k : k + 1], sigmas, seeds=[5 + k]) for k in (0, 1)]))
    assert torch.equal(together, run(x, sigmas, seeds=[5, 7])) == ("ancestral" not in name)
    given = torch.tensor(np.insert(EDM, [0, 4, 7], EDM[[0, 4, 7]]))
    assert torch.equal(together, run(x, given, seeds=[5, 6], callback=lambda info: seen.append(info["i"])))
    assert seen == list(range(len(given) - 1)) and run(x, [2.0]) is x and torch.equal(run(x, [2.0, 2.0]), x)
    torch.manual_seed(1)
    drawn = run(x, sigmas)
    torch.manual_seed(1)
    assert torch.equal(drawn, run(x, sigmas))


def test_cfg_pp_refuses():
    run, x = functools.partial(k_diffusion.sample_euler_cfg_pp, disable=True), start(EDM)
    with pytest.raises(
        ValueError, match="model: expected ComfyUI's, whose hooks after guidance tell the unconditional"
    ):
        run(lambda x, sigma, model_options: model(x, sigma), x, torch.tensor(EDM))
    flow = Wrapper(Model(FlowSampling()), never)
    with pytest.raises(ValueError, match="eta: expected 0 for a flow, got 1.0; take euler_ancestral"):
        k_diffusion.sample_res_multistep_ancestral_cfg_pp(flow, x, torch.tensor(FLOW), disable=True)


# ---- what all have in common ----

ALL = [name for name in COMFYUIS if name != "exp_heun_2_x0"]
LISTED = {name.removeprefix("sample_") for name in k_diffusion.__all__ if name.startswith("sample_")}


def test_every_function_has_an_oracle():
    assert {*COMFYUIS, *FUNCTIONS, *CFG_PP, "dpm_fast", "dpm_adaptive"} == LISTED


@pytest.mark.parametrize("name", [*ALL, "euler", "lms", "dpmpp_sde"])
@pytest.mark.parametrize("flow", [False, True])
def test_a_callback_that_only_looks_changes_no_bit(name, flow):
    if flow and name not in ON_FLOWS:
        pytest.skip("refused")
    seen, told = [], flow_model if flow else model
    sigmas = torch.tensor(FLOW[1:] if flow else EDM, dtype=torch.float32)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * sigmas[0]
    given = Wrapper(Model(FlowSampling() if flow else Sampling()), told)
    run = functools.partial(
        getattr(k_diffusion, f"sample_{name}"), given, x, sigmas, disable=True, seeds=[3, 4], eps_scaling=1.017
    )
    looked = run(callback=lambda info: seen.append(info["denoised"].clone()))
    assert torch.equal(looked, run()) and len(seen) == len(sigmas) - 1
    alpha = 1 - sigmas[0] if flow else 1.0
    first = x / alpha - (x / alpha - told(x, sigmas[0].expand(2))) / 1.017
    torch.testing.assert_close(seen[0], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("flow", [False, True])
def test_seeds(name, flow):
    if flow and COMFYUIS[name][3] == "refused":
        pytest.skip("refused")
    run = functools.partial(getattr(k_diffusion, f"sample_{name}"), disable=True)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * (1 if flow else EDM[0])
    sigmas = torch.tensor(FLOW if flow else EDM, dtype=torch.float32)
    given = Wrapper(Model(FlowSampling()), flow_model) if flow else model
    together = run(given, x, sigmas, seeds=[5, 6])
    alone = [run(given, x[k : k + 1], sigmas, seeds=[5 + k]) for k in (0, 1)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, run(given, x, sigmas, seeds=[5, 7])) == (COMFYUIS[name][1] <= 0)


@pytest.mark.parametrize("name", ALL)
def test_steps_of_length_0_and_none(name):
    run = functools.partial(getattr(k_diffusion, f"sample_{name}"), model, disable=True, seeds=[3, 4])
    x = start(EDM)
    assert run(x, [2.0], eps_scaling=1.01) is x
    if name == "heunpp2":
        return  # its steps know of the levels after
    given = np.insert(EDM, [0, 4, 7], EDM[[0, 4, 7]])
    assert torch.equal(run(x, torch.tensor(given)), run(x, torch.tensor(EDM)))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("seeds_2", {"solver_type": "phi_3"}, "solver_type: expected 'phi_1' or 'phi_2', got 'phi_3'"),
        ("seeds_2", {"r": 0.0}, "r: expected a value in .0, 1., got 0"),
        ("uni_pc", {"variant": "bh3"}, "variant: expected 'bh1' or 'bh2', got 'bh3'"),
        ("ipndm", {"max_order": 5}, "max_order: expected 1, 2, 3 or 4, got 5"),
        ("gradient_estimation", {"ge_gamma": None}, "ge_gamma: expected a finite value, got None"),
        ("er_sde", {"max_stage": 4}, "max_stage: expected 1, 2 or 3, got 4"),
        ("er_sde", {"s_noise": -1.0}, "s_noise: expected a finite number of at least 0, got -1.0"),
        ("sa_solver", {"tau_func": lambda sigma: -1.0}, "tau_func: expected a finite number of at least 0, got -1.0"),
        ("lcm", {"seeds": [1]}, "seeds: expected one for each of 2 samples, got 1"),
        ("deis", {"x": torch.zeros(0, 3)}, "x: expected .B, ..... .* not empty"),
    ],
    ids=lambda part: str(part) if isinstance(part, str) else "-".join(part),
)
def test_refuses(name, options, message):
    given = {"x": torch.zeros(SHAPE), "sigmas": torch.tensor(EDM), "disable": True} | options
    with pytest.raises(ValueError, match=message):
        getattr(k_diffusion, f"sample_{name}")(never, **given)


def test_er_sde_by_another_noise_scale():
    """A function of tensors, as ComfyUI's node gives it; phi(r) = r is the probability flow."""
    run = functools.partial(k_diffusion.sample_er_sde, model, start(EDM), torch.tensor(EDM), disable=True)
    result = run(noise_scaler=lambda r: r * torch.ones_like(r), seeds=[1, 2])
    expected = of_calls("er_sde", noisy=True, phi=lambda r: r)(
        denoise, start(EDM).double().numpy(), EDM, [np.zeros(SHAPE)] * len(EDM)
    )
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=3e-5)


# ---- the nodes, against a stand-in of ComfyUI ----


class Patcher:
    """What the node uses of ComfyUI's ModelPatcher: patches are applied to the model when it is sampled, not before."""

    def __init__(self, model_sampling):
        self.model, self.object_patches, self.model_options = Model(model_sampling), {}, {"transformer_options": {}}

    def clone(self):
        twin = copy.copy(self)
        twin.object_patches, twin.model_options = dict(self.object_patches), copy.deepcopy(self.model_options)
        return twin

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def set_model_sampler_post_cfg_function(self, function):
        hooks = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*hooks, function]

    def sample(self, x, sigma, denoised, sigmas=None):
        """One call of the model, as comfy.samplers.cfg_function makes it of the conditional and the unconditional output."""
        options = copy.deepcopy(self.model_options)
        if sigmas is not None:
            options["transformer_options"]["sample_sigmas"] = torch.tensor(sigmas)
        patched = Model(self.object_patches.get("model_sampling", self.model.model_sampling))
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)).clone()
        for hook in options.get("sampler_post_cfg_function", []):
            denoised = hook(
                {"denoised": denoised, "cond": [], "uncond": [], "cond_scale": 7.0, "model": patched, "uncond_denoised": x,
                 "cond_denoised": x, "sigma": sigma, "model_options": options, "input": x}
            )  # fmt: skip
        return denoised


class Put:
    """An input or output of the schema: what it was made of."""

    def __init__(self, id=None, **given):
        self.id, self.given = id, given


@dataclasses.dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list
    outputs: list


class KSampler:
    """comfy.samplers.KSAMPLER: it keeps the function, and what it is called with."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.inpaint_options = sampler_function, inpaint_options


def comfy_modules():
    """What the nodes import of ComfyUI."""
    kind = types.SimpleNamespace(Input=Put, Output=Put)
    io = types.SimpleNamespace(
        ComfyNode=object, Schema=Schema, NodeOutput=lambda *result: result, Model=kind, Float=kind, Int=kind, Combo=kind,
        Sampler=kind, Noise=kind,
    )  # fmt: skip
    names = (
        "comfy",
        "comfy.k_diffusion",
        "comfy.k_diffusion.sampling",
        "comfy.samplers",
        "comfy_api",
        "comfy_api.latest",
    )
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    modules["comfy_api.latest"].io, modules["comfy_api.latest"].ComfyExtension = io, object
    modules["comfy.samplers"].KSAMPLER = KSampler
    modules["comfy.k_diffusion.sampling"].default_noise_sampler = lambda x, seed: ("normal", seed)
    modules["comfy.k_diffusion.sampling"].BrownianTreeNoiseSampler = lambda x, *ends, seed, cpu: (
        "tree",
        *ends,
        seed,
        cpu,
    )
    return modules


COMFYUI = pathlib.Path(__file__).parents[2] / "integrations" / "comfyui"


def load_node(folder=COMFYUI):
    """As ComfyUI does: under a name that is the folder's path."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for loaded in [each for each in sys.modules if each.startswith(name)]:
            del sys.modules[loaded]
    return module


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in comfy_modules().items():
            patch.setitem(sys.modules, name, module)
        found = asyncio.run(asyncio.run(load_node().comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in found}


@pytest.fixture
def node(nodes):
    return nodes["EpsilonScalingFused"]  # the name in saved workflows


def test_schemas(nodes):
    assert list(nodes) == ["EpsilonScalingFused", "EpskernelsSampler", "EpskernelsNoise"]
    for node in nodes.values():
        made = node.define_schema()
        assert [each.id for each in made.inputs] == list(inspect.signature(node.execute).parameters)
        untold = [each.id for each in made.inputs if "tooltip" not in each.given]
        assert set(untold) <= {"model", "sampler_name", "noise_seed"} and made.description and "/" in made.category


def patch(node, patcher, eps_scaling, **options):
    (patched,) = node.execute(
        patcher, **{"eps_scaling": eps_scaling, "schedule": "uniform", "at_the_end": 1.3, "flow": "noise"} | options
    )
    return patched


def scaled(x, denoised, lam, alpha=1.0):
    return x / alpha - (x / alpha - denoised) / lam


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_node_scales_and_leaves_the_model_alone(node):
    plain, (x, denoised) = Patcher(Sampling()), torch.randn(2, *SHAPE)
    patched = patch(node, plain, 1.02)
    assert plain.sample(x, 3.0, denoised) is denoised
    close(patched.sample(x, 3.0, denoised), scaled(x, denoised, 1.02))
    close(patch(node, patched, 1.03).sample(x, 3.0, denoised), scaled(x, scaled(x, denoised, 1.02), 1.03))
    assert patch(node, plain, 1.0).sample(x, 3.0, denoised) is denoised
    assert patch(node, plain, 1.0, schedule="linear", at_the_end=1.0).sample(x, 3.0, denoised) is denoised


def test_node_linear(node):
    """lambda is linear in the number of the step, not in sigma; 1 at the end is a value as any other."""
    (x, denoised), sigmas = torch.randn(2, *SHAPE), [14.6, 5.0, 1.0, 0.4, 0.1, 0.0]
    patched = patch(node, Patcher(Sampling()), 1.04, schedule="linear", at_the_end=1.0)
    lambdas = {14.6: 1.04, 5.0: 1.03, 1.0: 1.02, 0.4: 1.01, 0.1: 1.0, 20.0: 1.04, 3.0: 1.025, 0.0: 1.0}
    for sigma, lam in lambdas.items():
        close(patched.sample(x, sigma, denoised, sigmas), scaled(x, denoised, lam))
    every = patched.sample(x, torch.tensor([0.4, 5.0]), denoised, sigmas)
    close(every, scaled(x, denoised, torch.tensor([1.01, 1.03]).reshape(-1, 1, 1, 1)))
    close(patched.sample(x, 0.4, denoised, sigmas[4::-1] + [14.6]), scaled(x, denoised, 1.0 + 0.04 / 4))  # upwards
    close(patched.sample(x, 5.0, denoised, [5.0, 0.0]), scaled(x, denoised, 1.04))
    close(patched.sample(x, 1.0, denoised, [5.0, 5.0, 1.0, 1.0, 0.4, 0.0]), scaled(x, denoised, 1.02))
    with pytest.raises(
        RuntimeError, match="schedule 'linear' counts the sampler's steps, and this ComfyUI does not tell"
    ):
        patched.sample(x, 1.0, denoised)


def test_node_on_a_flow(node):
    x, denoised = torch.randn(2, *SHAPE)
    patched = patch(node, Patcher(FlowSampling()), 1.02)
    eps = (x - 0.4 * denoised) / 0.6
    close(patched.sample(x, 0.6, denoised), (x - 0.6 * eps / 1.02) / 0.4)
    for sigma in (1.0, 0.9995):
        assert torch.equal(patched.sample(x, sigma, denoised), denoised)
    velocity = patch(node, Patcher(FlowSampling()), 1.02, flow="velocity")
    for sigma in (0.6, 1.0):
        close(velocity.sample(x, sigma, denoised), x - sigma * ((x - denoised) / sigma) / 1.02)


def test_node_scales_each_sample_at_its_own_sigma(node):
    x, denoised = torch.randn(2, *SHAPE)
    for sampling, sigmas in ((FlowSampling, (0.9, 0.2)), (FlowSampling, (1.0, 0.5)), (Sampling, (4518.0, 2.0))):
        patched = patch(node, Patcher(sampling()), 1.02)
        together = patched.sample(x, torch.tensor(sigmas), denoised)
        alone = [patched.sample(x[i : i + 1], sigmas[i], denoised[i : i + 1]) for i in (0, 1)]
        assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[1], denoised[1])


def test_node_where_x_is_noise_alone(node):
    """A zero terminal SNR, which ComfyUI writes as a sigma of some thousands."""
    patched, (x, denoised) = patch(node, Patcher(Sampling()), 1.02), torch.randn(2, *SHAPE)
    assert torch.equal(patched.sample(4518.0 * x, 4518.0, denoised), denoised)
    close(patched.sample(x, 3.0, denoised), scaled(x, denoised, 1.02))


def test_node_asks_the_model_when_it_runs(node):
    """A model sampling that is patched in after the node."""
    patched, (x, denoised) = patch(node, Patcher(Sampling()), 1.02), torch.randn(2, *SHAPE)
    patched.add_object_patch("model_sampling", FlowSampling())
    close(patched.sample(x, 0.6, denoised), scaled(x, denoised, 1.02, alpha=0.4))


def test_node_in_inference_mode_then_with_a_gradient(node):
    patched = patch(node, Patcher(FlowSampling()), 1.02)
    with torch.inference_mode():
        patched.sample(*torch.randn(2, *SHAPE)[:1], 0.6, torch.randn(SHAPE))
    x, denoised = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    patched.sample(x, 0.6, denoised).sum().backward()
    torch.testing.assert_close(denoised.grad, torch.full(SHAPE, 1 / 1.02))


# ---- the sampler node ----


def sampler_of(nodes, name, **options):
    (sampler,) = nodes["EpskernelsSampler"].execute(
        **{"sampler_name": name, "eta": 1.0, "s_noise": 1.0, "noise": "per sample"} | options
    )
    return sampler


def test_sampler_node_has_every_function(nodes):
    names = nodes["EpskernelsSampler"].define_schema().inputs[0].given["options"]
    assert sorted(names) == sorted({*LISTED, "ddim"})


def comfyuis():
    def call(x, sigma, model_options=None, **extra_args):
        guided = model(x, sigma)
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):
            guided = hook({"denoised": guided, "uncond_denoised": 0.5 * guided})
        return guided

    return Wrapper(Wrapper(Model(Sampling())), call)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_sampler_node(nodes, name):
    """The function of the name, with seed + i for sample i; the seed is the run's, or the node's own."""
    x, sigmas = start(EDM), torch.tensor(EDM)
    run = sampler_of(nodes, name, eta=0.6, s_noise=1.1).sampler_function
    result = run(comfyuis(), x, sigmas, extra_args={"seed": 2**64 - 1}, disable=True)
    function = getattr(k_diffusion, f"sample_{name}")
    taken = inspect.signature(function).parameters
    options = {"eta": 0.6, "s_noise": 1.1} if name not in ("dpm_fast", "dpm_adaptive") else {}
    options = {key: value for key, value in options.items() if key in taken}
    ends = (EDM[-2], EDM[0], 9)[: {"dpm_fast": 3, "dpm_adaptive": 2}.get(name, 0)]
    expected = function(
        comfyuis(), x, *(torch.tensor(e) if isinstance(e, float) else e for e in ends or (sigmas,)),
        extra_args={"seed": 0}, disable=True, seeds=[-1, 0], **options,
    )  # fmt: skip
    assert torch.equal(result, expected)
    own = sampler_of(nodes, name, eta=0.6, s_noise=1.1, seed=2**64 - 1).sampler_function
    assert torch.equal(own(comfyuis(), x, sigmas, extra_args={"seed": 5}, disable=True), expected)
    assert run(None, x, sigmas[:1], extra_args={}) is x


def test_sampler_node_corrects(nodes):
    x, sigmas = start(EDM), torch.tensor(EDM)
    run = sampler_of(nodes, "dpmpp_2m", dcw_low=-0.1, dcw_high=0.05).sampler_function
    result = run(comfyuis(), x, sigmas, extra_args={"seed": 0}, disable=True)
    expected = k_diffusion.sample_dpmpp_2m(comfyuis(), x, sigmas, disable=True, correction=corrections.dcw(-0.1, 0.05))
    assert torch.equal(result, expected)
    assert not torch.equal(expected, k_diffusion.sample_dpmpp_2m(comfyuis(), x, sigmas, disable=True))
    with pytest.raises(ValueError, match="^dcw_low, dcw_high: expected 0 for euler_cfg_pp, got 0.1, 0.0"):
        sampler_of(nodes, "euler_cfg_pp", dcw_low=0.1)


def test_sampler_node_options(nodes, monkeypatch):
    told = []
    for name in LISTED:
        original = getattr(k_diffusion, f"sample_{name}")
        wrapped = functools.wraps(original)(lambda *args, **given: told.append(given))
        monkeypatch.setattr(k_diffusion, f"sample_{name}", wrapped)

    def options(name, **given):
        told.clear()
        sampler = sampler_of(nodes, name, **given)
        sampler.sampler_function(model, start(EDM), torch.tensor(EDM), extra_args={"seed": 4})
        return {key: value for key, value in told[0].items() if key not in ("extra_args", "callback", "disable")}

    per_sample = {"seeds": [4, 5]}
    assert options("lms", order=2) == per_sample | {"order": 2}
    assert options("deis", order=2) == per_sample | {"max_order": 2}
    assert options("er_sde", order=2) == per_sample | {"max_stage": 2, "s_noise": 1.0}
    assert options("lms") == options("dpm_fast") == options("dpmpp_2m", s_churn=3.0) == per_sample
    assert options("heun", s_churn=3.0, s_noise=0.9) == per_sample | {"s_churn": 3.0, "s_noise": 0.9}
    assert options("seeds_2", noise="ComfyUI's") == {"eta": 1.0, "s_noise": 1.0, "noise_sampler": ("normal", 4)}
    tree = options("dpmpp_sde", noise="ComfyUI's", seed=9)["noise_sampler"]
    assert tree == ("tree", torch.tensor(EDM[-2]), torch.tensor(EDM[0]), 9, True)
    assert options("euler", noise="ComfyUI's") == {"s_churn": 0.0, "s_noise": 1.0}
    assert options("dpm_adaptive", noise="ComfyUI's") == {}
    assert options("ddim") == options("euler")
    assert options("lms", dcw_low=-0.1) == per_sample | {"correction": corrections.dcw(-0.1)}
    assert options("dpm_fast", dcw_high=0.05) == per_sample | {"correction": corrections.dcw(0.0, 0.05)}
    assert (
        sampler_of(nodes, "ddim").inpaint_options == {"random": True} and not sampler_of(nodes, "euler").inpaint_options
    )


@pytest.mark.parametrize("sampling", [Sampling, FlowSampling])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde", "lms", "dpmpp_sde"])
def test_lambda_of_the_model_acts_once(nodes, node, name, sampling):
    """The sampler node has none of its own: with the model's it is the function with eps_scaling."""
    patched, lam = patch(node, Patcher(sampling()), 1.02), 1.02
    told = flow_model if sampling is FlowSampling else model
    sigmas = torch.tensor(FLOW[1:] if sampling is FlowSampling else EDM, dtype=torch.float32)
    x = torch.randn(SHAPE) * sigmas[0]

    def call(x, sigma, **extra_args):
        return patched.sample(x, sigma, told(x, sigma))

    result = sampler_of(nodes, name).sampler_function(
        Wrapper(Wrapper(Model(sampling())), call), x, sigmas, extra_args={"seed": 3}, disable=True
    )
    function = functools.partial(
        getattr(k_diffusion, f"sample_{name}"), Wrapper(Wrapper(Model(sampling())), told), x, sigmas, disable=True,
        seeds=[3, 4],
    )  # fmt: skip
    assert not torch.allclose(function(), function(eps_scaling=lam), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result, function(eps_scaling=lam), rtol=1e-4, atol=1e-4)


def test_noise_node(nodes):
    """Sample i of the latent, or the i-th of its batch, has the initial noise of noise_seed + i."""
    (noise,) = nodes["EpskernelsNoise"].execute(2**64 - 1)
    assert noise.seed == 2**64 - 1
    latent = torch.zeros(2, 4, 6, 8)
    expected = epskernels.normal([-1, 0], (4, 6, 8), stream=1)
    assert torch.equal(noise.generate_noise({"samples": latent}), expected)
    picked = noise.generate_noise({"samples": latent, "batch_index": [1, 1]})
    assert torch.equal(picked, expected[[1, 1]])

    class Nested(list):
        is_nested = True

        def unbind(self):
            return self

    first, second = noise.generate_noise({"samples": Nested([latent, latent])})
    assert torch.equal(first, expected) and not torch.equal(second, expected)


# ---- what is refused, and what the registry reads ----


def test_nodes_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "epskernels", None)
    with pytest.raises(ImportError, match="^epskernels is not installed; in .*: pip install --no-deps .$"):
        load_node()


@pytest.mark.parametrize("package, version", [("epskernels", "0.0.9"), ("torch", "2.9.1+cu128")])
def test_nodes_with_a_package_that_is_too_old(monkeypatch, package, version):
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    with pytest.raises(
        ImportError, match=f"^these nodes need {package} [0-9.]+ or newer, and {re.escape(version)} is installed"
    ):
        load_node()


@pytest.mark.parametrize("without", ["comfy_api", "ComfyExtension"])
def test_nodes_in_a_comfyui_that_is_too_old(monkeypatch, without):
    for name, module in comfy_modules().items():
        monkeypatch.setitem(sys.modules, name, None if without == "comfy_api" and name.startswith(without) else module)
    if without == "ComfyExtension":
        del sys.modules["comfy_api.latest"].ComfyExtension
    with pytest.raises(
        ImportError, match=r"^these nodes need a ComfyUI with comfy_api.latest.ComfyExtension \(V3 nodes\)"
    ):
        load_node()


@pytest.mark.parametrize("name", ["epskernels", "epskernels-comfyui"])
def test_nodes_whose_folder_hides_the_package(tmp_path, name):
    """In a process that finds custom_nodes first. Past that check, it is ComfyUI that is missing."""
    shutil.copytree(COMFYUI, tmp_path / "custom_nodes" / name)
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path / "custom_nodes")!r})
spec = importlib.util.spec_from_file_location("a_node", {str(tmp_path / "custom_nodes" / name / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
    root = pathlib.Path(epskernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    hides = "epskernels hides the package epskernels, whose name it has; rename it to epskernels-comfyui" in done.stderr
    assert hides == (name == "epskernels") and hides != ("these nodes need a ComfyUI" in done.stderr)


def test_what_the_registry_reads():
    project = tomllib.loads((COMFYUI / "pyproject.toml").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"]) and project["project"]["name"] == "epskernels"
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= set(project["tool"]["comfy"])
    asked = [line for line in (COMFYUI / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    ours = tomllib.loads((COMFYUI.parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(asked) == sorted(each for each in ours if not each.startswith("torch"))


# ---- inside ComfyUI ----

CHECKOUT = os.environ.get("EPSKERNELS_COMFYUI")
in_comfyui = pytest.mark.skipif(not CHECKOUT, reason="EPSKERNELS_COMFYUI names no checkout of ComfyUI")


class Server:
    """ComfyUI's own server, on the CPU, with our nodes and the tiny models of tests/support/comfyui_server.py."""

    def __init__(self, folder):
        self.folder, script = folder, COMFYUI.parents[1] / "tests" / "support" / "comfyui_server.py"
        (folder / "custom_nodes").mkdir()
        shutil.copytree(COMFYUI, folder / "custom_nodes" / "epskernels-comfyui")
        shutil.copy(script, folder / "custom_nodes")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        python = os.environ.get("EPSKERNELS_COMFYUI_PYTHON", sys.executable)
        root = str(pathlib.Path(epskernels.__file__).parents[1])
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [python, str(script), CHECKOUT, str(folder), str(self.port)],
            env=os.environ | {"PYTHONPATH": root}, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.wait(lambda: self.get("object_info"), 240)

    def wait(self, what, seconds):
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            assert self.process.poll() is None, self.logged()
            try:
                if found := what():
                    return found
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.logged())

    def logged(self):
        return pathlib.Path(self.log.name).read_text()[-4000:]

    def get(self, path, data=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data and json.dumps(data).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def run(self, prompt):
        """The latent that the node "keep" wrote, or the exception's message."""
        path = self.folder / f"{time.monotonic_ns()}.npy"
        prompt = prompt | {"keep": {"class_type": "Keep", "inputs": {"latent": ["sample", 0], "path": str(path)}}}
        number = self.get("prompt", {"prompt": prompt})["prompt_id"]
        done = self.wait(lambda: self.get(f"history/{number}").get(number), 120)
        if done["status"]["status_str"] != "success":
            return next(
                told["exception_message"] for kind, told in done["status"]["messages"] if kind == "execution_error"
            )
        return torch.tensor(np.load(path))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.process.terminate()
    server.process.wait(30)


def prompt(kind, sampler, steps=6, seed=3, batch=2, noise="RandomNoise", scheduler="normal", patch=None):
    """A prompt of ComfyUI's API. sampler, patch: (class_type, inputs), patch of a node from MODEL to MODEL."""
    model = ["patch" if patch else "tiny", 0]
    nodes = {
        "tiny": ("Tiny", {"kind": kind}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": batch}),
        "noise": (noise, {"noise_seed": seed}),
        "guider": ("CFGGuider", {"model": model, "positive": ["tiny", 1], "negative": ["tiny", 2], "cfg": 3.0}),
        "sampler": sampler,
        "sigmas": ("BasicScheduler", {"model": model, "scheduler": scheduler, "steps": steps, "denoise": 1.0}),
        "sample": (
            "SamplerCustomAdvanced",
            {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0],
             "latent_image": ["latent", 0]},
        ),
    }  # fmt: skip
    if patch:
        nodes["patch"] = patch[0], {"model": ["tiny", 0]} | patch[1]
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def ours(name, **options):
    return "EpskernelsSampler", {"sampler_name": name, "eta": 1.0, "s_noise": 1.0, "noise": "ComfyUI's"} | options


def theirs(name):
    return "KSamplerSelect", {"sampler_name": name}


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


@in_comfyui
def test_comfyui_lists_the_nodes(server):
    for name, outputs in {
        "EpsilonScalingFused": ["MODEL"],
        "EpskernelsSampler": ["SAMPLER"],
        "EpskernelsNoise": ["NOISE"],
    }.items():
        info = server.get(f"object_info/{name}")[name]
        assert (
            info["output"] == outputs
            and info["description"]
            and info["python_module"] == "custom_nodes.epskernels-comfyui"
        )
    names = server.get("object_info/EpskernelsSampler")["EpskernelsSampler"]["input"]["required"]["sampler_name"][1][
        "options"
    ]
    assert set(names) - set(known_to(server)) <= {"exp_heun_2_x0", "exp_heun_2_x0_sde"}  # newer than 0.3.64


ALLOWED = {"er_sde": 1e-3}  # ComfyUI adds up 200 points of its integral


def known_to(server):
    """The names of ComfyUI's own list."""
    listed = server.get("object_info/KSamplerSelect")["KSamplerSelect"]["input"]["required"]["sampler_name"]
    return listed[1]["options"] if listed[0] == "COMBO" else listed[0]


@in_comfyui
@pytest.mark.parametrize("kind", ["sd15", "aura"])
@pytest.mark.parametrize("name", sorted({*LISTED, "ddim"}))
def test_beside_comfyuis_sampler_of_the_name(server, kind, name, record_property):
    """On the same noise: the same latent, or a refusal that says what to take."""
    if name not in known_to(server):
        pytest.skip("this ComfyUI has no sampler of the name")
    expected = server.run(prompt(kind, theirs(name)))
    result = server.run(prompt(kind, ours(name)))
    if kind == "aura" and name in ("ddpm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"):
        assert "take euler_ancestral" in result
        return
    off = difference(result, expected)
    record_property("difference", off)
    assert off < ALLOWED.get(name, 1e-4 if kind == "aura" else 3e-5)


@in_comfyui
@pytest.mark.parametrize("kind", ["sd15", "aura"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_sde", "seeds_2"])
def test_epsilon_scaling_with_the_sampler(server, kind, name):
    """The model's lambda, once: as ComfyUI's own sampler has it from the same node, and ComfyUI's node in its own way."""
    lam = {"eps_scaling": 1.02, "schedule": "uniform", "at_the_end": 1.0, "flow": "velocity"}
    patched = server.run(prompt(kind, ours(name), patch=("EpsilonScalingFused", lam)))
    assert difference(patched, server.run(prompt(kind, theirs(name), patch=("EpsilonScalingFused", lam)))) < 1e-4
    own = server.run(prompt(kind, ours(name), patch=("Epsilon Scaling", {"scaling_factor": 1.02})))
    assert difference(patched, own) < 1e-4
    assert difference(patched, server.run(prompt(kind, ours(name)))) > 5e-4


@in_comfyui
@pytest.mark.parametrize("kind", ["sd15", "aura"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde", "seeds_3"])
def test_a_sample_alone_or_in_a_batch(server, kind, name):
    """The second of a batch is the first of a batch of one with the next seed. A model's own bits may depend on the batch."""
    sampler = ours(name, noise="per sample")
    both = server.run(prompt(kind, sampler, noise="EpskernelsNoise", seed=7))
    alone = server.run(prompt(kind, sampler, noise="EpskernelsNoise", seed=8, batch=1))
    assert difference(alone[0], both[1]) < 1e-4 and difference(both[0], both[1]) > 0.1


# ---- lambda by noise level ----

BY_LEVEL = scaling.by_level([-3.0, 0.0, 3.0], [1.05, 1.01, 0.97])


def scaled_by_hand(call, alpha_of):
    """The model whose eps is divided by lambda of its own sigma; 1 where x is noise alone."""

    def scaled(x, sigma, **extra_args):
        at = float(sigma[0].double())
        alpha, estimate = alpha_of(at), call(x, sigma, **extra_args)
        if alpha < at / 900:
            return estimate
        by = float(np.interp(np.log(alpha / at), [-3.0, 0.0, 3.0], [1.05, 1.01, 0.97]))
        return ((1 - 1 / by) * x.double() / alpha + estimate.double() / by).float()

    return scaled


@pytest.mark.parametrize("name", [*FUNCTIONS, *COMFYUIS])
@pytest.mark.parametrize("on", ["eps", "flow"])
def test_each_call_reads_lambda_by_level_at_its_own(name, on):
    if on == "flow" and name not in ON_FLOWS:
        pytest.skip("no flows")
    run, options = getattr(k_diffusion, f"sample_{name}"), (COMFYUIS | KDIFFUSIONS).get(name, (0, 0, {}))[2]
    sigmas = torch.tensor(EDM if on == "eps" else FLOW, dtype=torch.float32)
    call, alpha_of = (model, lambda at: 1.0) if on == "eps" else (flow_model, lambda at: 1 - at)
    seeds = {} if "seeds" not in inspect.signature(run).parameters else {"seeds": [5, 6]}

    def sampled(call, **scaled):
        asked = Wrapper(Model(Sampling() if on == "eps" else FlowSampling()), call)
        return run(asked, start(sigmas.numpy()), sigmas, disable=True, **options, **seeds, **scaled)

    got = sampled(call, eps_scaling=BY_LEVEL)
    expected = sampled(scaled_by_hand(call, alpha_of))
    torch.testing.assert_close(got, expected, rtol=0, atol=4e-5 * max(1.0, expected.abs().max().item()))
    assert (got - sampled(call)).abs().max() > 1e-3


def test_adaptive_steps_read_lambda_by_level():
    x = start([20.0])
    got = k_diffusion.sample_dpm_adaptive(model, x, 0.05, 20.0, disable=True, eps_scaling=BY_LEVEL)
    by_hand = k_diffusion.sample_dpm_adaptive(scaled_by_hand(model, lambda at: 1.0), x, 0.05, 20.0, disable=True)
    plain = k_diffusion.sample_dpm_adaptive(model, x, 0.05, 20.0, disable=True)
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, by_hand, rtol=0, atol=2e-3)  # the step's length follows the last bits of the error
