"""k-diffusion's signatures against the float64 oracles."""

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import epskernels
from epskernels import corrections, k_diffusion, scaling
from epskernels.k_diffusion import sampling
from epskernels.table import VALUES, Table

from ..support import oracles

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

    def of(self, sigmas, pairs=False):
        """That of each step; 0 where none was drawn. pairs: one for each of the step's two calls."""
        if pairs:
            drawn = [z for _, _, z in self.given]
            return list(zip(drawn[::2], drawn[1::2], strict=True))
        by_level = {np.float32(sigma): z for sigma, _, z in self.given}
        return [by_level.get(np.float32(sigma), np.zeros(SHAPE)) for sigma in sigmas]


CHURNED = ("euler", "heun", "dpm_2")
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
    "dpmpp_2s_ancestral-eta": ("sigma_dpmpp_2s", {"eta": 3.0}, {"eta": 3.0}),  # down to 0 and up again
    "dpm_2": ("sigma_dpm_2", {}, {}),
    "dpm_2_ancestral": ("sigma_dpm_2_ancestral", {}, {}),
    "dpm_2_ancestral-eta": ("sigma_dpm_2_ancestral", {"eta": 3.0, "s_noise": 1.1}, {"eta": 3.0, "s_noise": 1.1}),
    "lms": ("sigma_lms", {}, {}),
    "lms-2": ("sigma_lms", {"order": 2}, {"order": 2}),
    "dpmpp_sde": ("sigma_dpmpp_sde", {}, {}),
    "dpmpp_sde-r": ("sigma_dpmpp_sde", {"r": 0.3, "eta": 0.7}, {"r": 0.3, "eta": 0.7}),
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
        noise.of(sigmas, "dpmpp_sde" in name),
        **theirs,
    )[-1]
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", CHURNED)
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
    assert [pair[:2] for pair in noise.given] == [tuple(sigmas[i : i + 2].tolist()) for i in churned]
    expected = churned_by_hand(x.double().numpy(), sigmas, noise.of(sigmas), method=name, **churn)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def churned_by_hand(x, sigmas, noise, method, s_churn, s_tmin, s_tmax, s_noise, lam=1.01):
    """k-diffusion's sample_euler, sample_heun or sample_dpm_2 in float64; noise: that of each step."""

    def d(x, sigma):
        return (x - denoise(x, sigma)) / sigma / lam

    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (gamma + 1)
        x = x + noise[i] * s_noise * np.sqrt(hat**2 - sigma**2)
        slope = d(x, hat)
        slope = corrected(method, d, x, slope, hat, after)
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


def corrected(method, d, x, slope, sigma, after):
    """The slope that a step follows, of the one at its start."""
    if method == "heun" and after > 0:
        return (slope + d(x + (after - sigma) * slope, after)) / 2
    if method == "dpm_2" and after > 0:
        middle = np.sqrt(sigma * after)
        return d(x + (middle - sigma) * slope, middle)
    return slope


FUNCTIONS = [
    "euler", "heun", "dpm_2", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "lms",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
]  # fmt: skip
SLOPE_FIRST = ("euler", "heun", "dpm_2", "lms")  # k-diffusion forms the slope, then calls back
TWO_CALLS = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
WITHOUT_NOISE = ("dpmpp_2m", "lms")


def sampler(name, **options):
    return functools.partial(getattr(k_diffusion, f"sample_{name}"), disable=True, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [torch.tensor, list], ids=["tensor", "list"])
def test_callback(name, given):
    seen = []
    sampler(name)(model, start(EDM), given(EDM), callback=lambda info: seen.append(info), eps_scaling=1.01)
    assert [info["i"] for info in seen] == list(range(9))
    for info, sigma in zip(seen, EDM, strict=False):
        assert list(info) == ["x", "i", "sigma", "sigma_hat", "denoised"]
        assert info["sigma"].shape == info["sigma_hat"].shape == () and float(info["sigma"]) == pytest.approx(
            sigma, rel=1e-6
        )
        plain = model(info["x"], info["sigma_hat"].float().expand(2))
        scaled = info["x"] - (info["x"] - plain) / 1.01
        torch.testing.assert_close(info["denoised"], scaled, rtol=1e-5, atol=1e-5)


def test_callback_is_told_the_raised_sigma():
    seen = []
    churn = {"s_churn": 3.6, "s_tmin": 0.05, "s_tmax": 50.0}
    sampler("heun")(model, start(EDM), torch.tensor(EDM), callback=lambda info: seen.append(info), **churn)
    raised = [sigma * (1 + 0.4 * (0.05 <= sigma <= 50)) for sigma in EDM[:-1]]
    np.testing.assert_allclose([float(info["sigma_hat"]) for info in seen], raised, rtol=1e-12)
    assert {info["sigma_hat"].dtype for info in seen} == {torch.float64}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_a_callback_that_only_looks_changes_no_bit(name, dtype, lam):
    x, seeds = start(EDM).to(dtype), None if name in WITHOUT_NOISE else [3, 4]
    churn = {"s_churn": 4.0} if name in CHURNED else {}
    run = sampler(name, eps_scaling=lam, seeds=seeds, **churn)
    looked = run(model, x, torch.tensor(EDM), callback=lambda info: info["denoised"].sum())
    assert torch.equal(looked, run(model, x, torch.tensor(EDM)))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_a_callback_that_writes_to_denoised(name, lam):
    """It acts as if the model had said so, in the first call of each step; where the slope was formed before, not at all."""
    sigmas, calls = torch.tensor(EDM), itertools.count()
    run = sampler(name, seeds=[3, 4])
    result = run(model, start(EDM), sigmas, callback=lambda info: info["denoised"].mul_(0.5).add_(0.1), eps_scaling=lam)
    if name in SLOPE_FIRST:
        assert torch.equal(result, run(model, start(EDM), sigmas, eps_scaling=lam))
        return

    def written(x, sigma):
        denoised = x - (x - model(x, sigma)) / lam
        return denoised if name in TWO_CALLS and next(calls) % 2 else 0.5 * denoised + 0.1

    torch.testing.assert_close(result, run(written, start(EDM), sigmas), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_callback_that_writes_to_x(name):
    """As an inpainting mask does: the step leads on from there."""
    sigmas, calls, lam = torch.tensor(EDM), itertools.count(), 1.017
    run = sampler(name, seeds=[3, 4], eps_scaling=lam)
    result = run(model, start(EDM), sigmas, callback=lambda info: info["x"].mul_(0.9).add_(0.1))
    if name in SLOPE_FIRST:
        expected = written_by_hand(start(EDM), EDM, name, lam)
    else:

        def writes(x, sigma):
            denoised = model(x, sigma)
            denoised = x - (x - denoised) / lam
            if not (name in TWO_CALLS and next(calls) % 2):
                x.mul_(0.9).add_(0.1)
            return denoised

        expected = run(writes, start(EDM), sigmas, eps_scaling=1.0)
    torch.testing.assert_close(result, torch.as_tensor(expected).float(), rtol=1e-4, atol=1e-4)


def written_by_hand(x, sigmas, method, lam):
    """k-diffusion's sampler of that name in float64, with a callback that makes 0.9*x + 0.1 of x."""
    x = x.double().numpy()

    def d(x, sigma):
        return (x - denoise(x, sigma)) / sigma / lam

    slopes = []
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        slopes = [d(x, sigma), *slopes[:3]]
        x = 0.9 * x + 0.1
        if method == "lms":
            nodes = [sigmas[i - k] for k in range(len(slopes))]
            weights = oracles.lagrange_weights(nodes, sigma, after, lambda s: s, lambda s: 1.0)
            x = x + sum(w * slope for w, slope in zip(weights, slopes, strict=True))
        else:
            x = x + (after - sigma) * corrected(method, d, x, slopes[0], sigma, after)
    return x


# ---- DPM-Solver, fast and adaptive ----

ENDS = (0.05, 20.0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 11])
@pytest.mark.parametrize("options", [{}, {"eta": 0.6, "s_noise": 1.02}, {"eta": 3.0}], ids=str)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_dpm_fast(n, options, lam):
    noise, steps = Noise(), n // 3 + 1
    orders = {0: [*[3] * (steps - 2), 2, 1], 1: [*[3] * (steps - 1), 1], 2: [*[3] * (steps - 1), 2]}[n % 3]
    sigmas = np.exp(np.linspace(np.log(ENDS[1]), np.log(ENDS[0]), steps + 1))
    calls, x = [], start(sigmas)

    def spy(x, sigma):
        calls.append(1)
        return model(x, sigma)

    result = k_diffusion.sample_dpm_fast(
        spy, x, *ENDS, n, disable=True, eps_scaling=lam, noise_sampler=noise, **options
    )
    assert len(calls) == n or options.get("eta") == 3.0
    z = [np.zeros(SHAPE)] * steps
    for sigma, _, drawn in noise.given:
        z[int(np.argmin(np.abs(np.log(sigmas / sigma))))] = drawn
    expected = oracles.sigma_dpm_solver(
        denoise, x.double().numpy(), sigmas, np.full(steps, lam), z, order=orders, least=ENDS[0], **options
    )[-1]
    # A long step multiplies what was rounded: float32's expm1(h)*eps is some e^h.
    allowed = 2e-5 * max(1, np.abs(expected).max()) * (20 if steps == 1 else 1)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=allowed)


def adaptive_by_hand(x, order, rtol=0.05, atol=0.0078, h=0.05, pid=(0.0, 1.0, 0.0), safety=0.81, lam=1.0):
    """DPM-Solver-12 and 23 in float64, with k-diffusion's controller; (x, attempts, accepted)."""
    t, t_end, before, history, tries, accepted = -np.log(ENDS[1]), -np.log(ENDS[0]), x, None, 0, 0
    p, i, d = pid
    while t < t_end - 1e-5:
        t_next = min(t_end, t + h)
        sigmas = np.exp([-t, -t_next])
        low, high = (
            oracles.sigma_dpm_solver(denoise, x, sigmas, [lam], [0.0], order=k, r1=1 / 3 if order == 3 else 1 / 2)[-1]
            for k in (order - 1, order)
        )
        allowed = np.maximum(atol, rtol * np.maximum(np.abs(low), np.abs(before)))
        inverse = 1 / (np.sqrt((((low - high) / allowed) ** 2).mean()) + 1e-8)
        history = [inverse] * 3 if history is None else [inverse, *history[1:]]
        factor = history[0] ** ((p + i + d) / order) * history[1] ** (-(p + 2 * d) / order) * history[2] ** (d / order)
        factor = 1 + np.arctan(factor - 1)
        tries += 1
        if factor >= safety:
            history = [history[0], history[0], history[1]]
            before, x, t, accepted = low, high, t_next, accepted + 1
        h *= factor
    return x, tries, accepted


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("pid", [(0.0, 1.0, 0.0), (0.2, 0.5, 0.1)], ids=str)
@pytest.mark.parametrize("lam", [1.0, 1.017])
def test_dpm_adaptive(order, pid, lam):
    x, seen = start([ENDS[1]]), []
    coefficients = dict(zip(("pcoeff", "icoeff", "dcoeff"), pid, strict=True))
    result, info = k_diffusion.sample_dpm_adaptive(
        model, x, *ENDS, None, seen.append, True, order, return_info=True, eps_scaling=lam, **coefficients
    )
    expected, tries, accepted = adaptive_by_hand(x.double().numpy(), order, pid=pid, lam=lam)
    assert info == {"steps": tries, "nfe": tries * order, "n_accept": accepted, "n_reject": tries - accepted}
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=1e-4)
    assert (
        len(seen) == tries and torch.equal(seen[-1]["x"], result) and seen[-1]["t"] == pytest.approx(-np.log(ENDS[0]))
    )
    keys = [
        "sigma",
        "sigma_hat",
        "x",
        "i",
        "t",
        "t_up",
        "denoised",
        "error",
        "h",
        "steps",
        "nfe",
        "n_accept",
        "n_reject",
    ]
    assert list(seen[0]) == keys


def test_dpm_adaptive_rejects_steps():
    _, info = k_diffusion.sample_dpm_adaptive(
        model, start([ENDS[1]]), *ENDS, disable=True, h_init=3.0, rtol=0.01, return_info=True
    )
    assert info["n_reject"] > 0


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dpm_seeds(name, dtype):
    """The noise of a seed is its own; the steps of the adaptive one are the batch's, so here they have twins."""
    run = functools.partial(getattr(k_diffusion, f"sample_{name}"), model, disable=True, eta=0.7)
    x = start([ENDS[1]])[:1].to(dtype).expand(2, -1, -1, -1).clone()
    more = (7,) if name == "dpm_fast" else ()
    together = run(x, *ENDS, *more, seeds=[5, 5])
    assert torch.equal(*together) and together.dtype == dtype
    alone = run(x[:1], *ENDS, *more, seeds=[5])
    if name == "dpm_fast":
        assert torch.equal(together[:1], alone)
    else:  # the norm of a batch adds up in another order
        torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
    assert not torch.equal(*run(x, *ENDS, *more, seeds=[5, 6]))
    torch.manual_seed(1)
    drawn = run(x, *ENDS, *more)
    torch.manual_seed(1)
    assert torch.equal(drawn, run(x, *ENDS, *more, noise_sampler=lambda *_: torch.randn(x.shape, dtype=dtype)))


@pytest.mark.parametrize(
    "name, options, message",
    [
        *(
            (name, *refused)
            for name in ("dpm_fast", "dpm_adaptive")
            for refused in (
                ({"sigma_min": 0.0}, "sigma_min: expected a finite number above 0, got 0.0"),
                ({"sigma_min": 30.0}, "sigma_min, sigma_max: expected sigma_min < sigma_max, got 30.0, 20.0"),
                ({"eta": -1.0}, "eta: expected a finite number of at least 0, got -1.0"),
                ({"seeds": [1]}, "seeds: expected one for each of 2 samples, got 1"),
            )
        ),
        ("dpm_fast", {"n": 0}, "n: expected an integer of at least 1, got 0"),
        ("dpm_fast", {"eps_scaling": [1.0, 1.01]}, "eps_scaling: expected one value for each of 3 steps, got 2"),
        ("dpm_adaptive", {"order": 4}, "order: expected 2 or 3, got 4"),
        ("dpm_adaptive", {"h_init": 0.0}, "h_init: expected a finite number above 0, got 0.0"),
        (
            "dpm_adaptive",
            {"eps_scaling": [1.0, 1.01]},
            "eps_scaling: expected one number, or lambda by noise level, since",
        ),
    ],
    ids=str,
)
def test_dpm_refuses(name, options, message):
    given = {"sigma_min": ENDS[0], "sigma_max": ENDS[1], "disable": True} | ({"n": 8} if name == "dpm_fast" else {})
    with pytest.raises(ValueError, match=message):
        getattr(k_diffusion, f"sample_{name}")(never, torch.zeros(SHAPE), **given | options)


# ---- steps of length 0, or none ----


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sigmas", [[], [2.0], torch.tensor([0.0])], ids=str)
def test_no_step(name, sigmas):
    x = start(EDM)
    assert sampler(name, eps_scaling=1.01)(None, x, sigmas) is x


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("repeated", [(0,), (3,), (3, 3), (4, 7), (8,)], ids=str)
@pytest.mark.parametrize("levels", ["to_0", "above_0"])
def test_steps_of_length_0(name, repeated, levels):
    """The same as without them, but that the callback is told; lambda counts them."""
    plain, given = LEVELS[levels], list(LEVELS[levels])
    lambdas = list(np.linspace(1.0, 1.02, len(plain) - 1))
    given_lambdas = list(lambdas)
    for at in sorted(repeated, reverse=True):
        if at >= len(plain) - (levels == "to_0"):
            pytest.skip("0 is no level of a step")
        given.insert(at, given[at])
        given_lambdas.insert(at, 1.3)
    seen, run = [], sampler(name, seeds=[3, 4])
    result = run(
        model, start(plain), torch.tensor(given), callback=lambda info: seen.append(info["i"]),
        eps_scaling=scaling.array(given_lambdas[: len(given) - 1], origin="noisiest"),
    )  # fmt: skip
    expected = run(model, start(plain), torch.tensor(plain), eps_scaling=scaling.array(lambdas, origin="noisiest"))
    assert seen == list(range(len(given) - 1))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_but_steps_of_length_0(name):
    x, seen = start(EDM), []
    run = sampler(name, seeds=[3, 4], callback=seen.append, eps_scaling=1.5)
    assert torch.equal(run(model, x, torch.tensor([3.0, 3.0, 3.0])), x)
    for info in seen:
        torch.testing.assert_close(info["denoised"], x - (x - model(x, torch.full((2,), 3.0))) / 1.5)


@pytest.mark.parametrize("name", CHURNED)
def test_churn_moves_between_equal_levels(name):
    """Up to the raised level and down again, also in the last step."""
    sigmas, noise = np.array([5.0, 2.0, 2.0, 1.0, 1.0]), Noise()
    churn = {"s_churn": 1.6, "s_tmin": 1.0, "s_tmax": 50.0, "s_noise": 1.003}
    x = start(sigmas)
    result = sampler(name)(model, x, torch.tensor(sigmas), **churn, eps_scaling=1.01, noise_sampler=noise)
    drawn = [z for _, _, z in noise.given]
    assert len(drawn) == 4
    expected = churned_by_hand(x.double().numpy(), sigmas, drawn, method=name, **churn)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=1e-4)


# ---- noise ----


@pytest.mark.parametrize("name", CHURNED)
def test_churn_by_torchs_generator(name):
    """k-diffusion draws in every step, churned or not: the same seed gives the same noise."""
    churn = {"s_churn": 3.6, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.003}
    x = start(EDM)
    torch.manual_seed(5)
    drawn = [torch.randn(SHAPE).double().numpy() for _ in EDM[:-1]]
    expected = churned_by_hand(x.double().numpy(), EDM, drawn, method=name, **churn)
    torch.manual_seed(5)
    result = sampler(name)(model, x, torch.tensor(EDM), **churn, eps_scaling=1.01)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=1e-4)


def test_torchs_generator_over_a_step_of_length_0():
    """k-diffusion draws there too."""
    sigmas, x = [5.0, 2.0, 2.0, 1.0, 0.0], start(EDM)
    torch.manual_seed(5)
    drawn = [torch.randn(SHAPE) for _ in range(3)]
    torch.manual_seed(5)
    result = sampler("euler_ancestral")(model, x, torch.tensor(sigmas))
    given = {5.0: drawn[0], 2.0: drawn[2]}
    expected = sampler("euler_ancestral")(
        model, x, torch.tensor([5.0, 2.0, 1.0, 0.0]), noise_sampler=lambda sigma, after: given[float(sigma)]
    )
    assert torch.equal(result, expected)


def test_noise_of_another_dtype():
    x = start(EDM).bfloat16()
    run = sampler("euler_ancestral")
    noises = [torch.randn(SHAPE).bfloat16() for _ in EDM]
    wide, same = iter(noises), iter(noises)
    result = run(model, x, torch.tensor(EDM), noise_sampler=lambda *_: next(wide).float())
    assert torch.equal(result, run(model, x, torch.tensor(EDM), noise_sampler=lambda *_: next(same)))


def test_where_x_is_noise_alone():
    """A zero terminal SNR, written as a sigma of some thousands: a number is 1 there, an array must be."""
    sigmas, x = torch.tensor([4096.0, 50.0, 3.0, 0.5]), 4096 * torch.randn(SHAPE)
    run = functools.partial(k_diffusion.sample_euler, model, x, disable=True)
    first = [run(sigmas[:2], eps_scaling=lam) for lam in (1.0, 1.02)]
    assert torch.equal(*first)
    from_there = scaling.array([1.0, 1.02, 1.02], origin="noisiest")
    assert torch.equal(run(sigmas, eps_scaling=1.02), run(sigmas, eps_scaling=from_there))
    with pytest.raises(ValueError, match=r"eps_scaling: expected 1 where x is noise alone \(step 0\), got 1.02"):
        run(sigmas, eps_scaling=scaling.array([1.02] * 3, origin="noisiest"))
    raised, churn = torch.tensor([800.0, 50.0, 3.0, 0.5]), {"s_churn": 3.0, "seeds": [1, 2]}  # the first step's to 1131
    assert torch.equal(run(raised, eps_scaling=1.02, **churn), run(raised, eps_scaling=from_there, **churn))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_seeds(name):
    run = sampler(name, **({"s_churn": 4.0} if name in CHURNED else {}))
    x, sigmas = start(EDM), torch.tensor(EDM)
    together = run(model, x, sigmas, seeds=[5, 6])
    alone = [run(model, x[k : k + 1], sigmas, seeds=[5 + k]) for k in (0, 1)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, run(model, x, sigmas, seeds=[5, 7])) == (name in WITHOUT_NOISE)


@pytest.mark.parametrize("name", CHURNED)
def test_seeds_are_the_churn(name):
    """Each step's own normals: the states that the model is given are those of a noise_sampler that gives them."""
    x, sigmas, churn = start(EDM), torch.tensor(EDM), {"s_churn": 4.0, "s_noise": 1.003}
    rows = len(sigmas) - 1 if name == "euler" else 2 * (len(sigmas) - 1) - 1
    of_step = range(len(sigmas) - 2) if name == "euler" else range(1, rows, 2)  # the row that ends at a churned level
    draws = iter([rows, *of_step])
    told = sampler(name)(
        model, x, sigmas, **churn,
        noise_sampler=lambda *_: epskernels.normal([5, 6], SHAPE[1:], draw=next(draws), stream=0),
    )  # fmt: skip
    assert torch.equal(told, sampler(name)(model, x, sigmas, **churn, seeds=[5, 6])) and next(draws, None) is None


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


# ---- bad input ----


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 2.0], [2.0, float("nan")], [2.0, -1.0], [[2.0, 1.0]], [2.0, 0.0, 0.0], [0.0, 0.0], [float("inf"), 1.0], 3.0],
    ids=str,
)
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="sigmas: expected .N . 1,. finite values above 0 that do not rise"):
        k_diffusion.sample_euler(never, torch.zeros(SHAPE), torch.tensor(sigmas), disable=True)


def never(x, sigma):
    raise AssertionError("the model was called")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("euler", {"s_churn": -1.0}, "s_churn: expected a finite number of at least 0, got -1.0"),
        ("euler", {"s_churn": None}, "s_churn: expected a finite number of at least 0, got None"),
        ("euler", {"s_tmax": float("nan")}, "s_tmin, s_tmax: expected numbers, got 0.0, nan"),
        ("heun", {"s_noise": float("nan")}, "s_noise: expected a finite number of at least 0, got nan"),
        ("euler_ancestral", {"eta": float("inf")}, "eta: expected a finite number of at least 0, got inf"),
        ("dpmpp_2m_sde", {"solver_type": "rk4"}, "solver_type: expected 'midpoint' or 'heun', got 'rk4'"),
        ("dpmpp_3m_sde", {"s_noise": -1}, "s_noise: expected a finite number of at least 0, got -1"),
        ("heun", {"seeds": [1]}, "seeds: expected one for each of 2 samples, got 1"),
        ("dpmpp_2m", {"seeds": [1, 2, 3]}, "seeds: expected one for each of 2 samples, got 3"),
        ("dpmpp_2m", {"seeds": 7}, "seeds: expected an int64 tensor"),
        ("euler", {"seeds": [1, 2], "noise_sampler": Noise()}, "seeds, noise_sampler: expected one of them, got both"),
        ("dpm_2", {"s_churn": -1.0}, "s_churn: expected a finite number of at least 0, got -1.0"),
        ("lms", {"order": 5}, "order: expected 1, 2, 3 or 4, got 5"),
        ("dpmpp_sde", {"r": 0.0}, "r: expected a value in .0, 1., got 0"),
        ("euler", {"eps_scaling": 0.0}, "eps_scaling: expected a value above 0, got 0"),
        ("euler", {"eps_scaling": [1.01, 1.02]}, "eps_scaling: expected one value for each of 9 steps, got 2"),
        (
            "euler",
            {"x": torch.zeros(SHAPE).double()},
            "x: expected .B, ..... float32, .*got torch.float64 .2, 3, 4, 5.",
        ),
        ("euler", {"x": torch.zeros(0, 3)}, "x: expected .B, ..... .* not empty, got torch.float32 .0, 3."),
        ("euler", {"x": [1.0]}, "x: expected .B, ..... .*got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(name, options, message):
    given = {"x": torch.zeros(SHAPE), "sigmas": torch.tensor(EDM), **options}
    with pytest.raises(ValueError, match=message):
        sampler(name)(never, **given)


@pytest.mark.parametrize(
    "output, got",
    [
        (torch.zeros(2, 3), r"torch.float32 \(2, 3\)"),
        (torch.zeros(SHAPE).double(), r"torch.float64 \(2, 3, 4, 5\)"),
        ((torch.zeros(SHAPE),), "tuple"),
        (None, "NoneType"),
    ],
    ids=["shape", "float64", "tuple", "none"],
)
def test_bad_output(output, got):
    with pytest.raises(ValueError, match=rf"model: expected an output of shape \(2, 3, 4, 5\), as x has, .*got {got}"):
        sampler("dpmpp_2m")(lambda x, sigma: output, start(EDM), torch.tensor(EDM))


@pytest.mark.parametrize("form", ["list", "dict", "tensor"])
def test_forms_of_lambda(form):
    values = [1.0 + 0.002 * i for i in range(9)]
    forms = {
        "list": values,
        "dict": {"k": 0.002, "b": 1.0, "origin": "noisiest"},
        "tensor": torch.tensor(values, dtype=torch.float64),
    }
    run = sampler("heun")
    expected = run(model, start(EDM), torch.tensor(EDM), eps_scaling=scaling.linear(0.002, 1.0, origin="noisiest"))
    assert torch.equal(run(model, start(EDM), torch.tensor(EDM), eps_scaling=forms[form]), expected)


# ---- the scaling alone ----


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_scale_denoised(alpha):
    x, denoised = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = x.double() / alpha - (x.double() / alpha - denoised.double()) / 1.0123
    result = epskernels.k_diffusion.scale_denoised(x, denoised, 1.0123, alpha)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_denoised_of_each_sample(dtype):
    x, denoised = torch.randn(SHAPE), torch.randn(SHAPE)
    lam, alpha = torch.tensor([1.0123, 0.97], dtype=dtype), torch.tensor([0.3, 1.0], dtype=dtype)
    together = k_diffusion.scale_denoised(x, denoised, lam, alpha)
    alone = [
        k_diffusion.scale_denoised(x[i : i + 1], denoised[i : i + 1], lam[i].item(), alpha[i].item()) for i in (0, 1)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)
    for shared in (
        k_diffusion.scale_denoised(x, denoised, lam[0], 1.0),
        k_diffusion.scale_denoised(x, denoised, lam[0].item()),
    ):
        torch.testing.assert_close(shared, x - (x - denoised) / lam[0].item(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["eps_scaling", "alpha"])
@pytest.mark.parametrize(
    "value, message",
    [
        (0, "expected a finite number above 0, got 0"),
        (float("nan"), "expected a finite number above 0, got nan"),
        (None, "expected a finite number above 0, got None"),
        (torch.tensor([1.0, -1.0]), "expected finite numbers above 0, got .1.0, -1.0."),
        (
            torch.ones(3),
            r"expected a number, or a tensor of float32 or float64, \(\) or \(2,\), .*got torch.float32 \(3,\)",
        ),
        (torch.ones(2).long(), r"expected a number, or a tensor of float32 .*got torch.int64 \(2,\)"),
        (torch.ones(2, device="meta"), "expected a number, or a tensor .* on cpu, got .* on meta"),
    ],
    ids=["0", "nan", "none", "below_0", "shape", "dtype", "device"],
)
def test_scale_denoised_refuses(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        k_diffusion.scale_denoised(torch.zeros(SHAPE), torch.zeros(SHAPE), **{"eps_scaling": 1.01, name: value})


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, None], ids=["inference", "fake", "func"])
def test_scale_denoised_keeps_nothing_of_a_mode(mode):
    """A lambda and an alpha that no other test uses: rows kept from the first call would be those of its mode."""
    x, lam = torch.randn(SHAPE), {torch.inference_mode: 1.0421, FakeTensorMode: 1.0422, None: 1.0423}[mode]
    if mode is None:
        torch.func.grad(lambda x: k_diffusion.scale_denoised(x, x, lam).sum())(x)
    else:
        with mode():
            inside = torch.randn(SHAPE)
            k_diffusion.scale_denoised(inside, inside, lam)
    denoised = torch.randn(SHAPE, requires_grad=True)
    k_diffusion.scale_denoised(x, denoised, lam).sum().backward()
    torch.testing.assert_close(denoised.grad, torch.full(SHAPE, 1 / lam))


def test_scale_denoised_has_a_gradient_by_lambda():
    x, denoised = torch.randn(SHAPE), torch.randn(SHAPE)
    lam = torch.tensor([1.01, 1.02], dtype=torch.float64, requires_grad=True)
    k_diffusion.scale_denoised(x, denoised, lam, 0.5).sum().backward()
    expected = (x / 0.5 - denoised).double().sum((1, 2, 3)) / lam.detach() ** 2
    torch.testing.assert_close(lam.grad, expected, rtol=1e-4, atol=1e-4)


# ---- corrections ----

CORRECTION = corrections.dcw(
    [-0.1, -0.12, -0.08, -0.1, -0.06, -0.1, -0.1, -0.1, -0.1][: len(EDM) - 1], 0.05, schedule="constant"
)


def haar(d):
    """The low band of the last two dimensions, zeros beyond the edge."""
    height, width = d.shape[-2:]
    d = np.pad(d, [(0, 0)] * (d.ndim - 2) + [(0, height % 2), (0, width % 2)])
    blocks = (d[..., ::2, ::2] + d[..., 1::2, ::2] + d[..., ::2, 1::2] + d[..., 1::2, 1::2]) / 4
    return blocks.repeat(2, -2).repeat(2, -1)[..., :height, :width]


def differential(x, denoised, low, high):
    """arXiv 2604.16044, eq. 21."""
    d = np.asarray(x.double() if isinstance(x, torch.Tensor) else x) - denoised
    return x + low * haar(d) + high * (d - haar(d))


ONE_STEP = ("euler", "heun", "dpm_2", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "lcm", "ddpm",
            "seeds_2", "seeds_3", "exp_heun_2_x0", "exp_heun_2_x0_sde")  # fmt: skip
CORRECTED = sorted(
    name for name in k_diffusion.__all__ if "correction" in inspect.signature(getattr(k_diffusion, name)).parameters
)


@pytest.mark.parametrize("name", ONE_STEP)
def test_corrections_of_steps_without_history(name):
    """The function step by step, and the authors' formula after each, by what the model said last."""
    run, said, sigmas = getattr(k_diffusion, f"sample_{name}"), [], torch.tensor(EDM)
    takes_noise = "noise_sampler" in inspect.signature(run).parameters and name != "exp_heun_2_x0"

    def remembers(x, sigma):
        said.append(model(x, sigma))
        return said[-1]

    def noise():
        return {"noise_sampler": Noise()} if takes_noise else {}

    draws, x = noise(), start(EDM)
    for i in range(len(EDM) - 1):
        x = run(remembers, x, sigmas[i : i + 2], disable=True, **draws)
        if sigmas[i + 1] > 0:
            x = differential(x, said[-1].double().numpy(), CORRECTION.low[i], CORRECTION.high).float()
    found = run(model, start(EDM), sigmas, disable=True, correction=CORRECTION, **noise())
    assert torch.allclose(found, x, atol=2e-5 * max(1.0, float(x.abs().max())))
    assert not torch.allclose(run(model, start(EDM), sigmas, disable=True, **noise()), x, atol=1e-3)


@pytest.mark.parametrize("name", [name.removeprefix("sample_") for name in CORRECTED if "adaptive" not in name])
def test_tables_are_the_samplers_corrected_ones(name, monkeypatch):
    """The rows are those of the table function with the same correction: history and all."""
    made = []
    table_of = sampling.table_of

    def remembers(sampler, levels, *args):
        options = args[3]
        if len(levels) == len(EDM) or name == "dpm_fast":
            steps = len(levels) - 1
            correction = corrections.dcw(CORRECTION.low[:steps], 0.05, schedule="constant")
            made.append(
                sampler_with(sampler, correction)(sampling.Levels(levels), steps, prediction="sample", **options)
            )
        return table_of(sampler, levels, *args)

    def sampler_with(sampler, correction):
        if "correction" in inspect.signature(sampler).parameters:
            return lambda *args, **options: sampler(*args, **options, correction=correction)

        def plain(*args, **options):  # ComfyUI's own: the table, corrected as a sampler corrects its own
            table = sampler(*args, **options)
            return Table(corrections.corrected({key: table[key] for key in VALUES}, correction), name="corrected")

        return plain

    run, found = sampling.Sampling.run, []

    def keeps(self, *args):
        found.append(self.table)
        return run(self, *args)

    monkeypatch.setattr(sampling, "table_of", remembers)
    monkeypatch.setattr(sampling.Sampling, "run", keeps)
    levels = (0.01, 80.0, 24) if name == "dpm_fast" else (torch.tensor(EDM),)
    getattr(k_diffusion, f"sample_{name}")(model, start(EDM), *levels, disable=True, correction=CORRECTION)
    last = len(found[0]) if "uni_pc" not in name else len(found[0]) - 1  # to 0.001, which stands for 0
    assert torch.allclose(found[0].rows[:last], made[0].rows[:last], rtol=1e-6, atol=1e-7) and found[0].corrected
    assert (found[0]["w_next"][-1] == 1) == (name != "dpm_fast")  # which does not lead to an image


def test_a_correction_on_a_flow():
    class CONST:
        pass

    class Flow:
        model_sampling = CONST()

        def __call__(self, x, sigma, **extra_args):
            return model(x, sigma)

    sigmas, x = np.array([1.0, 0.8, 0.5, 0.2, 0.0]), torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    expected = x.double().numpy()
    for sigma, after in itertools.pairwise(sigmas):
        said = denoise(expected, sigma)
        expected = said + (expected - said) * after / sigma
        if after:
            expected = differential(expected, said, -0.1 * sigma, 0.04 * (1 - sigma))
    found = k_diffusion.sample_euler(
        Flow(), x, torch.tensor(sigmas), disable=True, correction=corrections.dcw(-0.1, 0.04)
    )
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-5)


def test_a_correction_of_steps_that_are_not_known():
    """dpm_adaptive: after each accepted step, by what the model said last; an SDE's noise is in the state too."""
    said, infos = [], []

    def remembers(x, sigma):
        said.append((x, model(x, sigma)))
        return said[-1][1]

    correction = corrections.dcw(-0.1, 0.05)
    run = functools.partial(k_diffusion.sample_dpm_adaptive, remembers, start(EDM), 0.05, 80.0, disable=True, eta=0.0)
    run(
        callback=lambda info: infos.append((info["n_accept"], len(said), info["x"], float(info["sigma"]))),
        correction=correction,
    )
    assert len(infos) > 3
    of_first = [info for info in infos if info[0] == 1][0]
    accepted = infos.index(of_first)
    plain, calls = [], len(said)
    run(callback=lambda info: plain.append((info["x"], float(info["sigma"]))))
    share = 1.0  # sigma_t/sigma_max of the first step
    last = said[of_first[1] - 1][1].double().numpy()
    expected = differential(plain[accepted][0], last, -0.1 * share, 0.05 * (1 - share))
    assert calls and torch.allclose(of_first[2], expected.float(), atol=1e-4)
    assert not torch.allclose(of_first[2], plain[accepted][0], atol=1e-2)
    with pytest.raises(ValueError, match="^correction: expected numbers, or weights by noise level"):
        run(correction=corrections.dc([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"^x: expected \(B, C, H, W\)"):
        k_diffusion.sample_dpm_adaptive(model, torch.randn(2, 3), 0.05, 80.0, correction=correction)


@pytest.mark.parametrize("kind", ["dc", "dcw"])
def test_a_correction_and_what_a_callback_writes(kind):
    """k-diffusion's x += d*dt comes after the callback: what it writes into x is a part of the state that is corrected."""
    correction = {"dc": corrections.dc(0.1), "dcw": corrections.dcw(0.1, -0.05, schedule="constant")}[kind]
    low, high = (0.1, 0.1) if kind == "dc" else (0.1, -0.05)
    sigmas, x = EDM[[2, 5, 7]], start(EDM[2:])
    expected = x.double().numpy()
    for sigma, after in itertools.pairwise(sigmas):
        said = denoise(expected, sigma)
        expected = differential(expected + 0.5 + (expected - said) / sigma * (after - sigma), said, low, high)
    found = k_diffusion.sample_euler(
        model, x, torch.tensor(sigmas), callback=lambda info: info["x"].add_(0.5), disable=True, correction=correction
    )
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_bad_corrections():
    sigmas = torch.tensor(EDM)
    for error, message, arguments in (
        (ValueError, "^s_churn: expected 0 beside a correction", {"correction": corrections.dc(0.1), "s_churn": 3.0}),
        (
            ValueError,
            f"^correction: expected {len(EDM) - 1} weights of the low band",
            {"correction": corrections.dc([0.1])},
        ),
        (TypeError, "^correction: expected a Correction, a dict or a .json file, got 0.1", {"correction": 0.1}),
    ):
        with pytest.raises(error, match=message):
            k_diffusion.sample_euler(never, start(EDM), sigmas, disable=True, **arguments)
    with pytest.raises(ValueError, match=r"^x: expected \(B, C, H, W\) or .*, got \(2, 6, 5\)"):
        k_diffusion.sample_euler(never, torch.randn(2, 6, 5), sigmas, disable=True, correction=corrections.dcw(0.1))
