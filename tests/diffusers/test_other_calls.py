"""Schedulers whose step takes other arguments than (model_output, timestep, sample): whole trajectories beside diffusers' own."""

import copy

import diffusers
import numpy as np
import pytest
import torch

import epskernels
from epskernels import diffusers as fused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]
SHAPE = (2, 3, 4, 4)
SEEDS = [5, 2**63 + 1]
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
STEPS = 8


def score_sde(scheduler):
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)


def jumps(scheduler):
    scheduler.set_timesteps(STEPS, jump_length=2, jump_n_sample=2)


def cogvideo(scheduler, f, i, x, before, call):
    back = scheduler.timesteps[i - 1] if i else None
    old = before[1] if before else None
    return scheduler.step(f, old, scheduler.timesteps[i], back, x, **call)


def wuerstchen(scheduler, f, i, x, before, call):
    return scheduler.step(f, scheduler.timesteps[i].expand(len(x)), x, return_dict=False, **call)


def wuerstchen_rounded(scheduler, f, i, x, before, call):
    t = scheduler.timesteps[i].expand(len(x)).to(torch.bfloat16)
    return scheduler.step(f, t, x, return_dict=False, **call)


def repaint(scheduler, f, i, x, before, call):
    draw = torch.Generator().manual_seed(1)
    image, mask = (torch.rand(SHAPE, generator=draw).to(x.dtype) for _ in range(2))
    return scheduler.step(f, scheduler.timesteps[i], x, image, (mask > 0.4).to(x.dtype), return_dict=False, **call)


def predicted(scheduler, f, i, x, before, call):
    return scheduler.step_pred(f, scheduler.timesteps[i], x, return_dict=False, **call)


def brownian(scheduler, f, i, x, before, call):
    scheduler.scale_model_input(x, scheduler.timesteps[i])
    call = {"seeds": call["seeds"]} if "seeds" in call else {}
    return scheduler.step(f, scheduler.timesteps[i], x, return_dict=False, **call)


def churned(scheduler, f, i, x, before, call):
    t = scheduler.timesteps[i]
    sigma, sigma_prev = scheduler.schedule[t], scheduler.schedule[t - 1] if t else 0
    state, sigma_hat = scheduler.add_noise_to_input(x, sigma, **call)
    x, derivative = scheduler.step(f, sigma_hat, sigma_prev, state, return_dict=False)
    if sigma_prev:
        x, _ = scheduler.step_correct(f, sigma_hat, sigma_prev, state, x, derivative, return_dict=False)
    return (x,)


# label: (class, configuration, one step, set_timesteps)
CASES = {
    f"CogVideoXDPM-{label}": ("CogVideoXDPMScheduler", config, cogvideo, None)
    for label, config in {
        "epsilon": {}, "sample": {"prediction_type": "sample"}, "v": {"prediction_type": "v_prediction"}, "zero_snr": ZERO_SNR,
        "linspace": {"timestep_spacing": "linspace"}, "first": {"set_alpha_to_one": False},
    }.items()
} | {
    "Wuerstchen": ("DDPMWuerstchenScheduler", {}, wuerstchen, None),
    "Wuerstchen-scaler": ("DDPMWuerstchenScheduler", {"scaler": 2.0}, wuerstchen, None),
    "Wuerstchen-rounded": ("DDPMWuerstchenScheduler", {"scaler": 0.7}, wuerstchen_rounded, None),
    "RePaint": ("RePaintScheduler", {}, repaint, None),
    "RePaint-eta": ("RePaintScheduler", {"eta": 1.0, "clip_sample": False}, repaint, None),
    "RePaint-jumps": ("RePaintScheduler", {"eta": 0.5}, repaint, jumps),
    "ScoreSdeVe": ("ScoreSdeVeScheduler", {}, predicted, score_sde),
    "KarrasVe": ("KarrasVeScheduler", {}, churned, None),
    "KarrasVe-edm": ("KarrasVeScheduler", {"sigma_max": 9.0, "s_churn": 2.5, "s_noise": 1.0}, churned, None),
}  # fmt: skip
if hasattr(fused, "DPMSolverSDEScheduler"):
    BROWNIAN = {"noise_sampler_seed": 4}
    CASES |= {
        "DPMSolverSDE": ("DPMSolverSDEScheduler", BROWNIAN, brownian, None),
        "DPMSolverSDE-v": ("DPMSolverSDEScheduler", {**BROWNIAN, "prediction_type": "v_prediction"}, brownian, None),
        "DPMSolverSDE-karras": ("DPMSolverSDEScheduler", {**BROWNIAN, "use_karras_sigmas": True}, brownian, None),
    }
every = pytest.mark.parametrize("label", CASES)


def made(kind, label, **more):
    name, config, _, set_timesteps = CASES[label]
    scheduler = getattr(kind, name)(**config, **more)
    (set_timesteps or (lambda s: s.set_timesteps(STEPS)))(scheduler)
    return scheduler


def steps_of(label, scheduler):
    return len(scheduler.timesteps) - label.startswith("Wuerstchen")


@torch.no_grad()
def trajectory(label, scheduler, dtype=torch.float32, scale=None, count=None, rows=slice(None), **call):
    """[(x', the other result)] of every step, of outputs that are a smooth function of the state."""
    go, draw, results = CASES[label][2], torch.Generator().manual_seed(3), []
    x = (torch.randn(SHAPE, generator=draw) * float(scheduler.init_noise_sigma)).to(dtype)[rows]
    if "seeds" not in call:
        call["generator"] = torch.Generator().manual_seed(5)
    for i in range(count or steps_of(label, scheduler)):
        f = torch.sin(1.7 * x.double() / max(1.0, float(x.abs().max())) + i)
        if label == "ScoreSdeVe":
            f = -f / float(scheduler.discrete_sigmas[STEPS - 1 - i])
        f = (f if scale is None else scale(f, x.double(), i)).to(dtype)
        result = go(scheduler, f, i, x, results[-1] if results else None, dict(call))
        results.append(tuple(result))
        x = result[0]
    return results


def assert_close(found, expected, tolerance=2e-5):
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype is b.dtype
            size = float(b.double().abs().max().clamp(min=1))
            assert float((a.double() - b.double()).abs().max()) <= tolerance * size, i


@every
def test_trajectories_are_diffusers(label):
    ours = made(fused, label)
    found, expected = trajectory(label, ours), trajectory(label, made(diffusers, label))
    assert ours.path == "fused"
    assert_close(found, expected, 3e-4 if "SDE" in label or "first" in label else 2e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_in_half_precision(label, dtype):
    """Dtypes as in diffusers, and numbers as near as its roundings midway allow."""
    runs = [trajectory(label, made(kind, label), dtype, count=2) for kind in (fused, diffusers)]
    assert_close(*runs, tolerance=0.02 if dtype is torch.float16 else 0.12)


@every
def test_lambda_divides_the_predicted_eps(label):
    """A model that predicts eps: diffusers' step of f/lambda, lambda of each step or timestep, the noisiest first."""
    if label in ("CogVideoXDPM-sample", "CogVideoXDPM-v", "CogVideoXDPM-zero_snr", "DPMSolverSDE-v"):
        pytest.skip("it predicts something else")
    count = (steps_of(label, made(fused, label)) + 1) // 2 if "SDE-" in label + "-" and "DPM" in label else None
    plain = made(fused, label)
    steps = len(set(plain.timesteps.tolist())) - label.startswith("Wuerstchen") if count is None else count
    lam = [1.01 + i / 500 for i in range(steps)]
    order = sorted(set(plain.timesteps.tolist()), reverse=True)

    def of(i):
        return lam[i // 2] if count else lam[order.index(float(plain.timesteps[i]))]

    found = trajectory(label, made(fused, label, eps_scaling=lam))
    expected = trajectory(label, made(diffusers, label), scale=lambda f, x, i: f / of(i))
    assert_close(found, expected, 3e-4 if "SDE" in label or "first" in label else 3e-5)
    unscaled = trajectory(label, plain)
    assert float((found[-1][0] - unscaled[-1][0]).abs().max()) > 1e-4


@every
def test_seeds_and_forks(label):
    """A sample's noise is its seed's, alone or in a batch; a fork begins anew."""
    if label.startswith("RePaint"):
        pytest.skip("the image is of the whole batch")
    scheduler = made(fused, label)
    together = trajectory(label, scheduler, count=3, seeds=SEEDS)
    assert scheduler.path == "fused"
    again = trajectory(label, scheduler.fork(), count=3, seeds=SEEDS)
    assert torch.equal(together[-1][0], again[-1][0])
    if label.startswith("KarrasVe"):  # whose step draws none
        return
    with pytest.raises(ValueError, match="seeds: diffusers' own step takes a generator, and it runs here: of dtypes"):
        trajectory(label, scheduler.fork(), torch.float64, count=2, seeds=SEEDS)


@every
def test_own_step_goes_on(label):
    """float64: diffusers' own numbers, and lambda in them."""
    ours = made(fused, label)
    found = trajectory(label, ours, torch.float64, count=3)
    assert ours.path == "diffusers: of dtypes torch.float64 and torch.float64"
    assert_close(found, trajectory(label, made(diffusers, label), torch.float64, count=3), 0)


def test_a_timestep_of_each_sample_is_diffusers_own():
    """Wuerstchen's step takes where all samples end from the first one's timestep."""
    x, f, found = torch.randn(SHAPE), torch.randn(SHAPE), []
    for kind in (diffusers, fused):
        scheduler = made(kind, "Wuerstchen")
        generator = torch.Generator().manual_seed(1)
        found.append(scheduler.step(f, scheduler.timesteps[2:4], x, generator, return_dict=False)[0])
    assert torch.equal(*found) and scheduler.path.startswith("diffusers: timestep")


def test_another_timestep_back_is_diffusers_own():
    x, f, found = torch.randn(SHAPE), torch.randn(SHAPE), []
    for kind in (diffusers, fused):
        scheduler = made(kind, "CogVideoXDPM-epsilon")
        t = scheduler.timesteps
        found.append(scheduler.step(f, x, t[3], t[1], x, generator=torch.Generator().manual_seed(1))[0])
    assert torch.equal(*found) and "timestep_back" in scheduler.path


# ---- batches of samples at timesteps of their own ----

BATCHES = {
    "DDPM": ("DDPMParallelScheduler", {}), "DDPM-threshold": ("DDPMParallelScheduler", {"thresholding": True}),
    "DDPM-learned": ("DDPMParallelScheduler", {"variance_type": "learned_range"}),
    "DDIM": ("DDIMParallelScheduler", {}), "DDIM-v": ("DDIMParallelScheduler", {"prediction_type": "v_prediction"}),
    "DDIM-first": ("DDIMParallelScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "DDIM-sample": ("DDIMParallelScheduler", {"prediction_type": "sample", "thresholding": True}),
    "DDIM-zero_snr": ("DDIMParallelScheduler", ZERO_SNR),
}  # fmt: skip


@pytest.mark.parametrize("label", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("timesteps", [[875, 500, 0], [5, 999, 333], [444]], ids=str)
def test_batch_step_no_noise(label, dtype, timesteps):
    name, config = BATCHES[label]
    x, f = torch.randn(3, 3, 4, 4).to(dtype), torch.randn(3, 6 if "learned" in label else 3, 4, 4).to(dtype)
    results = []
    for kind in (diffusers, fused):
        scheduler = getattr(kind, name)(**config)
        scheduler.set_timesteps(STEPS)
        results.append(scheduler.batch_step_no_noise(f, torch.tensor(timesteps), x))
    assert scheduler.path == "fused" and results[0].dtype is results[1].dtype
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5 * float(results[0].abs().max()))


@pytest.mark.parametrize("name", ["DDPMParallelScheduler", "DDIMParallelScheduler"])
def test_batch_step_no_noise_scales(name):
    """By each timestep's lambda, interpolated between the schedule's; diffusers' own step of float64 too."""
    x, f, lam = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), [1.0 + 0.01 * i for i in range(STEPS)]
    theirs, ours = getattr(diffusers, name)(clip_sample=False), getattr(fused, name)(clip_sample=False, eps_scaling=lam)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(STEPS)
    t = ours.timesteps[[1, 4, 6]]
    t[1] -= 25  # a fifth of the way to the next
    each = torch.tensor([1.01, 1.042, 1.06]).view(3, 1, 1, 1)
    expected = theirs.batch_step_no_noise(f / each, t, x)
    torch.testing.assert_close(ours.batch_step_no_noise(f, t, x), expected, rtol=1e-5, atol=1e-5)
    assert ours.path == "fused"
    exact = ours.batch_step_no_noise(f.double(), t, x.double())
    assert ours.path.startswith("diffusers: of dtypes") and torch.allclose(exact.float(), expected, atol=1e-5)


def test_batch_step_no_noise_is_checked():
    scheduler, x = fused.DDIMParallelScheduler(), torch.ones(SHAPE)
    with pytest.raises(ValueError, match="^set_timesteps: expected a call of it before step"):
        scheduler.batch_step_no_noise(x, torch.tensor([5, 7]), x)
    with pytest.raises(ValueError, match="eta: expected 0, since no noise is added, got 0.5"):
        scheduler.batch_step_no_noise(x, torch.tensor([5, 7]), x, eta=0.5)


@every
def test_saved_fused_and_unfused(label, tmp_path):
    name = CASES[label][0]
    pipe = fused.fuse(made(diffusers, label), eps_scaling=1.01)
    assert type(pipe) is getattr(fused, name)
    pipe.save_pretrained(tmp_path)
    assert getattr(fused, name).from_pretrained(tmp_path).config.eps_scaling == 1.01
    plain = fused.unfuse(pipe)
    assert type(plain) is getattr(diffusers, name) and "eps_scaling" not in plain.config
    assert_close(trajectory(label, plain, count=2), trajectory(label, made(diffusers, label), count=2), 0)


@every
def test_copies_in_the_middle_of_a_trajectory(label):
    scheduler = made(fused, label)
    trajectory(label, scheduler, count=2)
    assert type(copy.deepcopy(scheduler)) is type(scheduler)


@pytest.mark.parametrize("label", ["Wuerstchen", "CogVideoXDPM-epsilon"])
def test_a_step_before_set_timesteps(label):
    name, config, go, _ = CASES[label]
    scheduler, x = getattr(fused, name)(**config), torch.ones(SHAPE)
    with pytest.raises(ValueError, match="^set_timesteps: expected a call of it"):
        if label == "Wuerstchen":
            scheduler.step(x, torch.ones(2), x)
        else:
            go(scheduler, x, 0, x, None, {})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fused", "diffusers' own"])
def test_a_batch_keeps_its_rows_while_a_fork_steps(dtype, monkeypatch):
    """Forks share the plan that was asked for last: here another asks in the middle of a call."""
    scheduler = fused.DDIMParallelScheduler(thresholding=True, eps_scaling=1.03)
    scheduler.set_timesteps(8)
    x, f = torch.randn(2, 2, 3, 4, 4, dtype=dtype)
    t = torch.tensor([800, 300])
    alone = scheduler.batch_step_no_noise(f, t, x)
    enter, other = type(scheduler)._enter, scheduler.fork()

    def interrupted(self, *arguments):
        row = enter(self, *arguments)
        if self is scheduler:
            other.step(f, other.timesteps[1], x)
        return row

    monkeypatch.setattr(type(scheduler), "_enter", interrupted)
    assert torch.equal(scheduler.batch_step_no_noise(f, t, x), alone)


# ---- KarrasVe, whose calls are known by their sigmas ----


@torch.no_grad()
def karras_ve(kind, dtype=torch.float32, of=lambda level: level, lam=lambda call: 1.0, **made):
    """[(state, slope, x_0)] of the calls of a trajectory, in float64.

    of: what a user makes of a level of the schedule. lam: by which call's output is divided.
    """
    scheduler = kind.KarrasVeScheduler(sigma_max=9.0, s_churn=2.7, **made)
    draw, found = torch.Generator().manual_seed(3), []

    def model(x, sigma):  # -eps of a denoiser
        return (torch.tanh(x) - x) / float(sigma) / lam(len(found))

    scheduler.set_timesteps(STEPS)
    levels = scheduler.schedule.to(dtype)
    x = (torch.randn(SHAPE, generator=draw) * scheduler.init_noise_sigma).to(dtype)
    for t in scheduler.timesteps:
        sigma, sigma_prev = of(levels[t]), of(levels[t - 1]) if t else 0
        state, sigma_hat = scheduler.add_noise_to_input(x, sigma, generator=draw)
        result = scheduler.step(model(state, sigma_hat), sigma_hat, sigma_prev, state)
        found.append(result)
        assert getattr(scheduler, "path", "fused") == "fused"
        if sigma_prev:
            more = (state, result.prev_sample, result.derivative)
            result = scheduler.step_correct(model(result.prev_sample, sigma_prev), sigma_hat, sigma_prev, *more)
            found.append(result)
        x = result.prev_sample
    return scheduler, [[value.double() for value in result.values()] for result in found]


@pytest.mark.parametrize("of", [lambda level: level, float], ids=["tensors", "numbers"])
def test_karras_ve_is_as_close_as_diffusers(of):
    _, exact = karras_ve(diffusers, torch.float64, of)
    _, theirs = karras_ve(diffusers, of=of)
    scheduler, ours = karras_ve(fused, of=of)
    assert scheduler.path == "fused" and len(ours) == 2 * STEPS - 1  # the last step is not corrected

    def errors(found):
        return [
            max(float((a[k] - b[k]).norm() / b[k].norm()) for a, b in zip(found, exact, strict=True)) for k in range(3)
        ]

    for a, b in zip(errors(ours), errors(theirs), strict=True):
        assert a <= 1.25 * b + 3e-7, (errors(ours), errors(theirs))


def test_karras_ve_scales_both_calls():
    """One lambda for a step and its correction, the noisiest first."""
    lam = [1.01 + i / 500 for i in range(STEPS)]
    _, found = karras_ve(fused, eps_scaling=lam)
    _, expected = karras_ve(diffusers, lam=lambda call: lam[call // 2])
    assert_close([f[:1] for f in found], [e[:1] for e in expected], 3e-5)


def test_karras_ve_scales_by_level():
    """Each call at the level of the state that it is asked at."""
    made = epskernels.scaling.by_level([-4.0, 0.0, 4.0], [1.05, 1.02, 1.0])
    scheduler, found = karras_ve(fused, eps_scaling=made)
    hat, end = scheduler._ends()
    with np.errstate(divide="ignore"):
        lam = np.interp(-np.log(np.stack([hat, end], axis=1).reshape(-1)), [-4.0, 0.0, 4.0], [1.05, 1.02, 1.0])
    _, expected = karras_ve(diffusers, lam=lambda call: lam[call])
    assert_close([f[:1] for f in found], [e[:1] for e in expected], 3e-5)
    assert len(scheduler.lambdas) == STEPS


def test_karras_ve_churns_by_seeds():
    scheduler, x = fused.KarrasVeScheduler(sigma_max=9.0), torch.randn(SHAPE)
    scheduler.set_timesteps(STEPS)
    sigma = scheduler.schedule[5]  # of the third step
    state, sigma_hat = scheduler.add_noise_to_input(x, sigma, seeds=SEEDS)
    assert sigma_hat > float(sigma)
    std = 1.007 * (sigma_hat**2 - float(sigma) ** 2) ** 0.5
    expected = x + std * epskernels.normal(SEEDS, [3, 4, 4], draw=2, stream=0)
    torch.testing.assert_close(state, expected)
    alone = scheduler.add_noise_to_input(x[1:], sigma, seeds=SEEDS[1:])[0]
    assert torch.equal(alone, state[1:])
    scheduler.step(x, sigma_hat, scheduler.schedule[4], state)
    assert scheduler.path == "fused"
    with pytest.raises(ValueError, match="^sigma: expected one of scheduler.schedule, since seeds are given, got 3.0"):
        scheduler.add_noise_to_input(x, 3.0, seeds=SEEDS)


def test_karras_ve_between_other_sigmas_is_diffusers_own():
    x, f, found = torch.randn(SHAPE), torch.randn(SHAPE), []
    for kind in (diffusers, fused):
        scheduler = kind.KarrasVeScheduler()
        scheduler.set_timesteps(STEPS)
        first = scheduler.step(f, 5.0, 3.0, x)
        found.append(scheduler.step_correct(f, 5.0, 3.0, x, first.prev_sample, first.derivative).prev_sample)
    assert torch.equal(*found) and scheduler.path.startswith("diffusers: timestep Call(sigma_hat=5.0, sigma_prev=3.0")
    scheduler.eps_scaling = 1.01
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="is not one of the schedule's, so that it has no lambda"):
        scheduler.step(f, 5.0, 3.0, x)
