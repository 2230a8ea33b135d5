"""k-diffusion's signatures against the float64 oracles, and the ComfyUI node against a stand-in of its hook."""

import functools
import importlib.util
import inspect
import itertools
import pathlib

import numpy as np
import oracles
import pytest
import torch

import epskernels
from epskernels import k_diffusion, scaling

SHAPE = (2, 3, 4, 5)
EDM = oracles.edm_sigmas(9)
LEVELS = {"to_0": EDM, "above_0": EDM[:-1], "two": EDM[[2, 5]], "one_to_0": EDM[[4, -1]]}


def denoise(x, sigma, shift=0.0):
    return 1.2 * np.tanh(0.8 * x / np.sqrt(1 + sigma**2 / 4) + 0.3 * np.sin(np.roll(x, 1, -1)) + shift)


def model(x, sigma, shift=0.0):
    assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
    level = float(sigma[0].double()) if x.dtype == torch.float32 else float(sigma[0])
    return torch.tensor(denoise(x.double().numpy(), level, shift)).float()


class Noise:
    """A noise_sampler that remembers what it gave, for which levels."""

    def __init__(self):
        self.given, self.generator = [], torch.Generator().manual_seed(3)

    def __call__(self, sigma, sigma_next):
        z = torch.randn(SHAPE, generator=self.generator)
        self.given.append((float(sigma), float(sigma_next), z.double().numpy()))
        return z

    def of(self, sigmas):
        """That of each step; 0 where none was drawn."""
        by_level = {np.float32(sigma): z for sigma, _, z in self.given}
        return [by_level.get(np.float32(sigma), np.zeros(SHAPE)) for sigma in sigmas]


# name: (oracle, its options, options of ours)
SAMPLERS = {
    "euler": ("sigma_euler", {}, {}),
    "heun": ("sigma_heun", {}, {}),
    "euler_ancestral": ("sigma_euler_ancestral", {}, {}),
    "euler_ancestral-eta": ("sigma_euler_ancestral", {"eta": 0.6, "s_noise": 1.003}, {"eta": 0.6, "s_noise": 1.003}),
    "dpmpp_2s_ancestral": ("sigma_dpmpp_2s", {"eta": 1.0}, {}),
    "dpmpp_2m": ("sigma_dpmpp_2m_sde", {"eta": 0.0}, {}),
    "dpmpp_2m_sde": ("sigma_dpmpp_2m_sde", {}, {}),
    "dpmpp_2m_sde-heun": ("sigma_dpmpp_2m_sde", {"solver": "heun", "eta": 0.5}, {"solver_type": "heun", "eta": 0.5}),
    "dpmpp_3m_sde": ("sigma_dpmpp_3m_sde", {"s_noise": 0.9}, {"s_noise": 0.9}),
}


def start(sigmas):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * sigmas[0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_against_the_oracle(name, levels, lam):
    oracle, theirs, options = SAMPLERS[name]
    sigmas, noise = LEVELS[levels], Noise()
    x = start(sigmas)
    run = getattr(k_diffusion, f"sample_{name.split('-')[0]}")
    if "noise_sampler" in inspect.signature(run).parameters:
        options = options | {"noise_sampler": noise}
    result = run(model, x, torch.tensor(sigmas), {"shift": 0.2}, None, True, **options, eps_scaling=lam)
    expected = getattr(oracles, oracle)(
        lambda x, sigma: denoise(x, sigma, 0.2),
        x.double().numpy(),
        sigmas,
        np.full(len(sigmas), lam),
        noise.of(sigmas),
        **theirs,
    )[-1]
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("s_tmin, s_tmax", [(0.05, 50.0), (0.0, float("inf"))])
@pytest.mark.parametrize("levels", LEVELS)
def test_churn(name, levels, s_tmin, s_tmax):
    """k-diffusion's, at each level that has a step: the noise sampler is told that level and the next."""
    sigmas, noise = LEVELS[levels], Noise()
    steps = len(sigmas) - 1
    churn = {"s_churn": 0.4 * steps, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": 1.003}
    x = start(sigmas)
    run = getattr(k_diffusion, f"sample_{name}")
    result = run(model, x, torch.tensor(sigmas), None, None, True, **churn, eps_scaling=1.01, noise_sampler=noise)
    churned = [i for i in range(steps) if s_tmin <= sigmas[i] <= s_tmax]
    assert [pair[:2] for pair in noise.given] == [tuple(np.float32(sigmas[i : i + 2]).tolist()) for i in churned]
    expected = churned_by_hand(x.double().numpy(), sigmas, noise.of(sigmas), heun=name == "heun", **churn)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def churned_by_hand(x, sigmas, noise, heun, s_churn, s_tmin, s_tmax, s_noise, lam=1.01):
    """k-diffusion's sample_euler or sample_heun in float64; noise: that of each step."""

    def d(x, sigma):
        return (x - denoise(x, sigma)) / sigma / lam

    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (gamma + 1)
        x = x + noise[i] * s_noise * np.sqrt(hat**2 - sigma**2)
        slope = d(x, hat)
        if heun and after > 0:
            slope = (slope + d(x + (after - hat) * slope, after)) / 2
        x = x + (after - hat) * slope
    return x


def test_the_first_churn_is_added_to_the_latent():
    calls = []

    def spy(x, sigma):
        calls.append((x.clone(), float(sigma[0])))
        return model(x, sigma)

    noise, x = Noise(), start(EDM)
    k_diffusion.sample_euler(spy, x, torch.tensor(EDM), disable=True, s_churn=4.0, noise_sampler=noise)
    hat = EDM[0] * (1 + min(4.0 / 9, 2**0.5 - 1))
    assert calls[0][1] == pytest.approx(hat, rel=1e-6)
    added = torch.tensor(noise.given[0][2]).float() * (hat**2 - EDM[0] ** 2) ** 0.5
    torch.testing.assert_close(calls[0][0], x + added, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2s_ancestral"])
def test_callback(name):
    seen = []
    run = getattr(k_diffusion, f"sample_{name}")
    run(model, start(EDM), torch.tensor(EDM), callback=lambda info: seen.append(info), disable=True, eps_scaling=1.01)
    assert [info["i"] for info in seen] == list(range(9))
    for info, sigma in zip(seen, EDM, strict=False):
        assert set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"} and float(info["sigma"]) == sigma
        plain = model(info["x"], info["sigma_hat"].expand(2))
        scaled = info["x"] - (info["x"] - plain) / 1.01
        torch.testing.assert_close(info["denoised"], scaled, rtol=1e-5, atol=1e-5)


def test_where_x_is_noise_alone():
    """A zero terminal SNR, written as a sigma of some thousands: a number is 1 there, an array must be."""
    sigmas, x = torch.tensor([4096.0, 50.0, 3.0, 0.5]), 4096 * torch.randn(SHAPE)
    run = functools.partial(k_diffusion.sample_euler, model, x, disable=True)
    first = [run(sigmas[:2], eps_scaling=lam) for lam in (1.0, 1.02)]
    assert torch.equal(*first)
    from_there = scaling.array([1.0, 1.02, 1.02], origin="noisiest")
    assert torch.equal(run(sigmas, eps_scaling=1.02), run(sigmas, eps_scaling=from_there))
    with pytest.raises(ValueError, match=r"lambda: expected 1 where x is noise alone \(step 0\), got 1.02"):
        run(sigmas, eps_scaling=scaling.array([1.02] * 3, origin="noisiest"))


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s_ancestral"])
def test_seeds(name):
    run = getattr(k_diffusion, f"sample_{name}")
    x, sigmas = start(EDM), torch.tensor(EDM)
    together = run(model, x, sigmas, disable=True, seeds=[5, 6])
    alone = [run(model, x[k : k + 1], sigmas, disable=True, seeds=[5 + k]) for k in (0, 1)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    x = start(EDM).to(dtype)
    result = k_diffusion.sample_dpmpp_2m(model, x, torch.tensor(EDM), disable=True)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.float(),
        k_diffusion.sample_dpmpp_2m(model, start(EDM), torch.tensor(EDM), disable=True),
        rtol=0,
        atol=0.05,
    )


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, 2.0], [1.0, 1.0], [2.0, float("nan")], [2.0, -1.0], [[2.0, 1.0]]], ids=str
)
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="sigmas: expected .N . 1,. finite, decreasing values"):
        k_diffusion.sample_euler(model, torch.zeros(SHAPE), torch.tensor(sigmas), disable=True)


# ---- the scaling alone, and ComfyUI's node ----


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_scale_denoised(alpha):
    x, denoised = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = x.double() / alpha - (x.double() / alpha - denoised.double()) / 1.0123
    result = epskernels.k_diffusion.scale_denoised(x, denoised, 1.0123, alpha)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="eps_scaling: expected a finite value above 0, got 0"):
        k_diffusion.scale_denoised(x, denoised, 0)
    with pytest.raises(ValueError, match="alpha: expected a finite value above 0, got 0"):
        k_diffusion.scale_denoised(x, denoised, 1.01, 0)


class CONST:
    """Named as ComfyUI's flow parametrisation is."""


class Sampling:
    sigma_max, sigma_min = torch.tensor(10.0), torch.tensor(0.0)


class FlowSampling(Sampling, CONST):
    sigma_max = torch.tensor(1.0)


class ZeroSNRSampling(Sampling):
    sigma_max = torch.tensor(4518.0)


class Patcher:
    """What the node uses of ComfyUI's ModelPatcher, and how its sampler calls the hook after guidance."""

    def __init__(self, sampling):
        self.sampling, self.hooks = sampling, []

    def clone(self):
        twin = Patcher(self.sampling)
        twin.hooks = list(self.hooks)
        return twin

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self.sampling

    def set_model_sampler_post_cfg_function(self, function):
        self.hooks.append(function)

    def denoise(self, x, sigma, denoised):
        for hook in self.hooks:
            args = {"denoised": denoised, "input": x, "sigma": torch.full((len(x),), sigma), "model_options": {}}
            denoised = hook(args)
        return denoised


@pytest.fixture(scope="module")
def node():
    path = pathlib.Path(__file__).parents[1] / "integrations" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("comfyui_node", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (name,) = module.NODE_CLASS_MAPPINGS
    assert name in module.NODE_DISPLAY_NAME_MAPPINGS
    return module.NODE_CLASS_MAPPINGS[name]


def test_node_scales_and_leaves_the_model_alone(node):
    plain, (x, denoised) = Patcher(Sampling()), torch.randn(2, *SHAPE)
    assert set(node.INPUT_TYPES()["required"]) | set(node.INPUT_TYPES()["optional"]) == set(
        inspect.signature(node().patch).parameters
    )
    (patched,) = getattr(node(), node.FUNCTION)(plain, 1.02)
    assert not plain.hooks and len(patched.hooks) == 1
    torch.testing.assert_close(patched.denoise(x, 3.0, denoised), x - (x - denoised) / 1.02, rtol=1e-5, atol=1e-6)
    (same,) = node().patch(plain, 1.0)
    assert same.denoise(x, 3.0, denoised) is denoised


def test_node_linear(node):
    (x, denoised) = torch.randn(2, *SHAPE)
    (patched,) = node().patch(Patcher(Sampling()), 1.0, 1.04)
    for sigma, lam in ((10.0, 1.0), (5.0, 1.02), (0.0, 1.04)):
        expected = x - (x - denoised) / lam
        torch.testing.assert_close(patched.denoise(x, sigma, denoised), expected, rtol=1e-5, atol=1e-5)


def test_node_on_a_flow(node):
    (patched,), (x, denoised) = node().patch(Patcher(FlowSampling()), 1.02), torch.randn(2, *SHAPE)
    eps = (x - 0.4 * denoised) / 0.6
    expected = (x - 0.6 * eps / 1.02) / 0.4
    torch.testing.assert_close(patched.denoise(x, 0.6, denoised), expected, rtol=1e-5, atol=1e-5)
    assert patched.denoise(x, 1.0, denoised) is denoised
    assert patched.denoise(x, 0.9995, denoised) is denoised


def test_node_where_x_is_noise_alone(node):
    """A zero terminal SNR, which ComfyUI writes as a sigma of some thousands."""
    (patched,), (x, denoised) = node().patch(Patcher(ZeroSNRSampling()), 1.02), torch.randn(2, *SHAPE)
    assert patched.denoise(4518.0 * x, 4518.0, denoised) is denoised
    torch.testing.assert_close(patched.denoise(x, 3.0, denoised), x - (x - denoised) / 1.02, rtol=1e-5, atol=1e-6)
