"""Schedulers without a fused twin, diffusers' and a user's own: lambda scales the model's output, then their own step runs."""

import copy
import inspect
import json
import pickle
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin  # by which diffusers finds the schedulers of a module
from diffusers.configuration_utils import ConfigMixin, register_to_config

from epskernels import diffusers as fused
from epskernels.diffusers.scaled import scaled_class

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]
SHAPE = (2, 3, 5, 7)


class Plain(SchedulerMixin, ConfigMixin):
    """A user's scheduler: eps, a tensor of timesteps, and attributes that are called as ours are."""

    @register_to_config
    def __init__(self, num_train_timesteps=100, prediction_type="epsilon"):
        self.alphas_cumprod = torch.linspace(0.999, 0.01, num_train_timesteps)
        self.timesteps, self._step, self._noise, self._model = None, 0, "mine", "mine"

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.linspace(
            self.config.num_train_timesteps - 1, 0, num_inference_steps, device=device
        ).long()
        self._step = 0

    def _row(self, f):
        return 0.1 * f

    def step(self, model_output, timestep, sample, return_dict=False):
        self._step += 1
        return (sample - self._row(model_output),)


class Keywords(Plain):
    def step(self, *, noise_pred, t, latents):
        return (latents - 0.1 * noise_pred,)


class OtherNames(Plain):
    def step(self, prediction, time, state, scale=0.1):
        return (state - scale * prediction,)


class Flow(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        pass

    def set_timesteps(self, n):
        self.sigmas = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        self.timesteps = 1000 * self.sigmas[:-1]

    def scale_noise(self, sample, timestep, noise):
        return sample

    def step(self, model_output, timestep, sample):
        i = int((self.timesteps == timestep).nonzero()[0, 0])
        return (sample + (self.sigmas[i + 1] - self.sigmas[i]).float() * model_output,)


class OfNumbers(diffusers.DDIMScheduler):
    """A user's subclass of one that has a twin keeps its own step."""

    def step(self, model_output, timestep, sample, **more):
        more.pop("return_dict", None)
        return (super().step(model_output, timestep, sample, **more).prev_sample + 1,)


class Unregistered(SchedulerMixin, ConfigMixin):
    def __init__(self, gain=1.0):
        self.gain, self.timesteps = gain, [3, 2, 1]

    def step(self, model_output, timestep, sample):
        return (sample - self.gain * model_output,)


OWN = (Plain, Keywords, OtherNames, Flow, OfNumbers, Unregistered)
TOKENS = {
    "AmusedScheduler",
    "VQDiffusionScheduler",
    "BlockRefinementScheduler",
    "EntropyBoundScheduler",
    "DiscreteDDIMScheduler",
}
OF_DIFFUSERS = [
    name for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and not name.startswith("Flax") and name not in TOKENS
]  # fmt: skip
MADE = {  # arguments of the constructor, of set_timesteps, and more of step
    "ConsistencyDecoderScheduler": ({}, {"num_inference_steps": 2}, {}),
    "RFD4ProteinaScheduler": (
        {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.2, "tsr_sigma": 1.0, "tail_steps": 0},
        {"num_inference_steps": 5}, {"emit_mask": torch.ones(SHAPE[:2])},
    ),
    "HeliosScheduler": ({}, {"num_inference_steps": 5, "stage_index": 0}, {}),
    "HeliosDMDScheduler": ({}, {"num_inference_steps": 5, "stage_index": 0}, {}),
    "SCMScheduler": ({}, {"num_inference_steps": 5, "intermediate_timesteps": None}, {}),
}  # fmt: skip
NEEDS_TORCHSDE = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}


def scheduler_of(name, kind=None, eps_scaling=None):
    made, steps, _ = MADE.get(name, ({}, {"num_inference_steps": 5}, {}))
    scheduler = getattr(diffusers.schedulers, name)(**made)
    if kind is not None:
        scheduler = kind(scheduler, eps_scaling)
    if hasattr(scheduler, "set_timesteps"):
        scheduler.set_timesteps(**steps)
    return scheduler


def as_scaled(scheduler, eps_scaling=None):
    """The scaling class, also of those that have a twin."""
    twin = scaled_class(type(scheduler))
    result = twin.__new__(twin)
    result.__dict__.update(copy.deepcopy(scheduler.__dict__))
    result._adopt(1.0 if eps_scaling is None else eps_scaling, None)
    return result


def states(name, scheduler, calls=5, scale=lambda i, f, x: f):
    shape = (2, 4, 30) if name == "PiflowScheduler" else SHAPE if "Proteina" not in name else SHAPE[:2] + (3,)
    draw, x, found = torch.Generator().manual_seed(3), None, []
    more = dict(MADE.get(name, ({}, {}, {}))[2])
    if "generator" in inspect.signature(scheduler.step).parameters and "Proteina" not in name:
        more["generator"] = torch.Generator().manual_seed(5)
    torch.manual_seed(6)
    x = torch.randn((2, 4, 3) if name == "PiflowScheduler" else shape, generator=draw)
    if name == "HeliosDMDScheduler":
        more |= {
            "dmd_noisy_tensor": torch.randn(2, 3, 1, 5, 7), "dmd_sigmas": scheduler.sigmas, "dmd_timesteps": scheduler.timesteps,
            "all_timesteps": scheduler.timesteps,
        }  # fmt: skip
        shape, x = (2, 3, 1, 5, 7), torch.randn(2, 3, 1, 5, 7, generator=draw)
    for i, t in enumerate(scheduler.timesteps[:calls]):
        f = torch.randn(shape, generator=draw)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        if name == "SCMScheduler" and i == len(scheduler.timesteps) - 1:
            break
        if name == "DDPMWuerstchenScheduler":
            t = t.expand(2)
        if name == "HeliosDMDScheduler":
            more["cur_sampling_step"] = i
        x = scheduler.step(scale(i, f, x), t, x, return_dict=False, **more)[0]
        found.append(x)
    return found


# ---- lambda = 1 ----


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_at_lambda_1_it_is_its_own_step(name):
    """Each of diffusers' schedulers, those with a twin too."""
    if name in NEEDS_TORCHSDE:
        pytest.importorskip("torchsde")
    ours = scheduler_of(name, as_scaled)
    assert isinstance(ours, getattr(diffusers.schedulers, name)) and type(ours).__name__ == name and ours.seeds is None
    if not hasattr(ours, "step"):  # of the SDEs, whose predictor and corrector are methods of their own
        return
    if name in ("KarrasVeScheduler", "RePaintScheduler", "CogVideoXDPMScheduler"):  # whose arguments are others
        return
    theirs = states(name, scheduler_of(name))
    for a, b in zip(states(name, ours), theirs, strict=True):
        assert torch.equal(a, b)
    assert ours.path == f"{name}'s own step" and len(theirs) > 1


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_tokens_are_refused(name):
    scheduler = getattr(diffusers.schedulers, name).__new__(getattr(diffusers, name))
    with pytest.raises(TypeError, match=f"scheduler: {name} chooses tokens: it has no predicted noise"):
        fused.fuse(scheduler)
    assert not hasattr(fused, name)


# ---- lambda ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "eps_scaling", [1.02, [1.0, 1.01, 1.02, 1.03], {"k": 0.01, "b": 1.0}, {"k": 0.0, "b": 1.0}, [1.0] * 4], ids=str
)
def test_a_users_own(dtype, eps_scaling):
    ours = fused.fuse(Plain(), eps_scaling=eps_scaling)
    ours.set_timesteps(4)
    expected = {"[1.0, 1.01": (1.0, 1.01, 1.02, 1.03), "{'k': 0.01": (1.03, 1.02, 1.01, 1.0), "1.02": (1.02,) * 4}
    lam = next((value for key, value in expected.items() if str(eps_scaling).startswith(key)), (1.0,) * 4)
    assert ours.lambdas == pytest.approx(lam)
    x, f = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    for i in (2, 0, 3):
        found = ours.step(f, ours.timesteps[i], x)[0]
        scaled = (f.double() / lam[i]).to(dtype) if lam[i] != 1 else f
        torch.testing.assert_close(found, x - 0.1 * scaled)
        assert ours.path == ("scaled, then Plain's own step" if lam[i] != 1 else "Plain's own step")
    assert ours._step == 3 and ours._noise == "mine"


@pytest.mark.parametrize("kind", [Keywords, OtherNames])
def test_other_arguments(kind):
    ours = fused.fuse(kind(), eps_scaling=1.25)
    ours.set_timesteps(4)
    x, f, t = torch.randn(SHAPE), torch.randn(SHAPE), 66
    names = list(inspect.signature(kind().step).parameters)
    by_name = ours.step(**dict(zip(names, (f, t, x), strict=False)))[0]
    torch.testing.assert_close(by_name, x - 0.1 * f / 1.25)
    if kind is OtherNames:
        assert torch.equal(ours.step(f, t, state=x)[0], by_name) and torch.equal(ours.step(f, t, x, 0.1)[0], by_name)
    assert inspect.signature(ours.step) == inspect.signature(kind().step)


def test_a_learned_variance_is_not_scaled():
    ours = fused.fuse(Plain(), eps_scaling=1.25)
    ours.set_timesteps(4)
    f, x = torch.randn(2, 6, 5, 7), torch.randn(SHAPE)
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plain, "step", lambda self, model_output, timestep, sample: kept.update(f=model_output))
        ours.step(f, ours.timesteps[1], x)
    assert torch.equal(kept["f"][:, 3:], f[:, 3:])
    torch.testing.assert_close(kept["f"][:, :3], f[:, :3] / 1.25)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["DDIM", "PNDM", "LMSDiscrete", "DEISMultistep", "DPMSolverSinglestep", "EDMEuler", "EulerDiscrete"]
)
def test_lambda_is_that_of_the_noise(name, prediction):
    """The output's eps, by definition, divided by lambda; for each kind of path that diffusers has."""
    made = (
        {"prediction_type": prediction} if name != "PNDM" else {"prediction_type": prediction, "skip_prk_steps": True}
    )
    theirs = getattr(diffusers, f"{name}Scheduler")(**made)
    if name in ("PNDM", "EDMEuler") and prediction == "sample":
        return
    ours = as_scaled(theirs, 1.02)
    for each in (theirs, ours):
        each.set_timesteps(5)
    if name in ("DDIM", "PNDM"):
        abar = theirs.alphas_cumprod[theirs.timesteps].double()
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    elif hasattr(theirs, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = theirs._sigma_to_alpha_sigma_t(theirs.sigmas.double())
    else:
        sigma = theirs.sigmas.double()
        alpha = torch.ones_like(sigma)

    def scale(i, f, x):
        a, s, f, x = float(alpha[i]), float(sigma[i]), f.double(), x.double()
        c = 1 / np.hypot(a, s)  # what the network sees is on a unit circle
        if name == "EDMEuler":
            out = s * 0.5 / np.hypot(s, 0.5) * (1 if prediction == "epsilon" else -1)
            skip = 0.25 / (s**2 + 0.25)
            x0 = skip * x + out * f
            x0 = x - s * (x - x0) / s / 1.02
            return ((x0 - skip * x) / out).float()
        x0 = {"epsilon": (x - s * f) / a, "sample": f, "v_prediction": a * c * c * x - s * c * f}[prediction]
        eps = (x - a * x0) / s / 1.02
        x0 = (x - s * eps) / a
        return {"epsilon": eps, "sample": x0, "v_prediction": c * (a * eps - s * x0)}[prediction].float()

    for a, b in zip(states(name, ours), states(name, theirs, scale=scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ours.path == f"scaled, then {name}Scheduler's own step"


def test_lambda_of_a_flow():
    theirs, ours = Flow(), fused.fuse(Flow(), eps_scaling=1.02)
    for each in (theirs, ours):
        each.set_timesteps(5)
    assert ours.lambdas == (1.0, 1.02, 1.02, 1.02, 1.02)  # x is noise alone in the first
    for i in range(5):
        x, f, s = torch.randn(SHAPE), torch.randn(SHAPE), float(theirs.sigmas[i])
        eps = (x + (1 - s) * f) / ours.lambdas[i]
        scaled = f if i == 0 else eps - (x - s * eps) / (1 - s)
        found = ours.step(f, ours.timesteps[i], x)[0]
        torch.testing.assert_close(found, theirs.step(scaled, theirs.timesteps[i], x)[0], rtol=1e-5, atol=1e-5)


def test_calls_at_one_timestep_share_its_lambda():
    """PNDM's first two calls are of the same time."""
    ours = as_scaled(diffusers.PNDMScheduler(skip_prk_steps=True), [1.01, 1.02, 1.03, 1.04, 1.05])
    ours.set_timesteps(5)
    assert ours.lambdas == pytest.approx((1.01, 1.02, 1.02, 1.03, 1.04, 1.05))
    ours.timesteps = ours.timesteps[3:]  # those that are left keep theirs
    assert ours.lambdas == pytest.approx((1.03, 1.04, 1.05))
    with pytest.raises(ValueError, match="eps_scaling: expected one value for each of 7 steps, got 5"):
        ours.set_timesteps(7)


def test_what_is_not_known_is_refused_but_at_lambda_1():
    for scheduler, missing in (
        (diffusers.IPNDMScheduler, "prediction_type is None in its configuration"),
        (diffusers.KDPM2DiscreteScheduler, "the sigma of a step's second model call is not known"),
        (Unregistered, "prediction_type is None in its configuration"),
    ):
        made = scheduler() if scheduler is not diffusers.KDPM2DiscreteScheduler else scheduler(prediction_type="sample")
        with pytest.raises(
            ValueError, match=f"eps_scaling: expected 1 for {scheduler.__name__}, got 1.02: .*{missing}"
        ):
            as_scaled(made, 1.02)
        as_scaled(made)
    unset = fused.fuse(Plain(), eps_scaling=1.02)
    with pytest.raises(
        ValueError, match=r"Plain, got 1.02: timesteps is of type NoneType, not a tensor \(set_timesteps may"
    ):
        unset.step(torch.ones(2), 3, torch.ones(2))
    unset.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep: 98 is not one of the schedule's, so that it has no lambda"):
        unset.step(torch.ones(2), 98, torch.ones(2))
    named = fused.fuse(Unregistered(gain=2.0))
    assert named.step(torch.ones(2), 1, torch.ones(2))[0].tolist() == [-1, -1] and named.gain == 2
    no_sigmas = Plain(prediction_type="v_prediction")
    no_sigmas.alphas_cumprod = None
    scheduler = fused.fuse(no_sigmas, eps_scaling=1.02)
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction', and it has no sigma for each timestep"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="seeds: Plain's own step draws its noise; pass a generator"):
        fused.fuse(Plain(), seeds=[1])


# ---- what a user does with it ----


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: fused.fuse(s)],
    ids=["copy", "deepcopy", "pickle", "fuse"],
)  # fmt: skip
def test_copies(kind, copied):
    lam = 1.02 if kind is not Unregistered else 1.0
    ours = fused.fuse(kind(), eps_scaling=lam)
    assert (
        type(ours) is type(fused.fuse(kind())) and isinstance(ours, kind) and isinstance(ours, diffusers.SchedulerMixin)
    )
    if hasattr(ours, "set_timesteps"):
        ours.set_timesteps(4)
    names, x, f = list(inspect.signature(kind().step).parameters), torch.randn(SHAPE), torch.randn(SHAPE)
    twin = copied(ours)
    assert type(twin) is type(ours) and twin.eps_scaling == lam
    calls = [dict(zip(names, (f, each.timesteps[1], x), strict=False)) for each in (ours, twin)]
    assert torch.equal(ours.step(**calls[0])[0], twin.step(**calls[1])[0])
    back = fused.unfuse(twin)
    assert (
        type(back) is kind and "eps_scaling" not in back.config and vars(back).keys() == vars(fused.unfuse(ours)).keys()
    )
    if kind is Plain:
        assert back._noise == back._model == "mine" and back._step > 0


def test_a_fork_begins_anew():
    ours = as_scaled(diffusers.PNDMScheduler(skip_prk_steps=True), 1.02)
    ours.set_timesteps(5)
    alone = states("PNDM", ours.fork())
    states("PNDM", ours, calls=3)
    assert ours.counter == 3 and ours.fork().counter == 0
    for a, b in zip(states("PNDM", ours.fork()), alone, strict=True):
        assert torch.equal(a, b)


class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


LOAD = """
import json, sys, diffusers, epskernels
if len(sys.argv) > 2: __import__(sys.argv[2])
import tests.diffusers.test_scaled as test
pipe = test.Pipeline.from_pretrained(sys.argv[1])
print(json.dumps([type(pipe.scheduler).__module__, type(pipe.scheduler).__name__, pipe.scheduler.eps_scaling]))
"""


LEFT = [
    name
    for name in OF_DIFFUSERS
    if getattr(diffusers.schedulers, name) not in fused.FUSED and name not in NEEDS_TORCHSDE
]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(getattr(diffusers.schedulers, name), marks=pytest.mark.deep) for name in LEFT), Plain]
)
def test_saved_pipelines_load_again(kind, tmp_path):
    class_of = scaled_class(kind)
    pipe = Pipeline(class_of(**MADE.get(kind.__name__, ({},))[0]))
    pipe.scheduler = class_of.from_config(pipe.scheduler.config)
    if kind is Plain:
        pipe.scheduler.eps_scaling = {"k": 0.001, "b": 1.0}
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is class_of and again.scheduler.eps_scaling == pipe.scheduler.eps_scaling
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = kind.__name__ if kind is not Plain else f"{__name__}.Plain"
    assert json.loads(done.stdout.splitlines()[-1]) == ["epskernels.diffusers", name, pipe.scheduler.eps_scaling]
    plain = fused.unfuse(pipe)
    plain.save_pretrained(tmp_path)
    assert type(Pipeline.from_pretrained(tmp_path).scheduler) is kind


def test_names_that_are_none():
    with pytest.raises(
        AttributeError, match="nowhere.Mine is a scheduler of your own: import nowhere before you load it"
    ):
        getattr(fused, "nowhere.Mine")
    for name in ("NoScheduler", "SchedulerMixin.x", "json.JSONDecoder", "fusee"):
        assert not hasattr(fused, name)
    for name, said in (
        ("DDIMSchduler", "did you mean DDIMScheduler"),
        ("fuses", "did you mean fuse"),
        ("xyz", "'xyz'$"),
    ):
        with pytest.raises(AttributeError, match=said):
            getattr(fused, name)
    for name in LEFT:
        assert getattr(fused, name) is scaled_class(getattr(diffusers.schedulers, name))


def test_share():
    pipe = fused.fuse(Pipeline(Plain()), eps_scaling=1.02)
    pipe.scheduler.set_timesteps(4)
    twin = fused.share(pipe)
    assert twin.scheduler is not pipe.scheduler and twin.scheduler.lambdas == pipe.scheduler.lambdas == (1.02,) * 4


class Recording(Plain):
    """It remembers what its step was given."""

    def step(self, model_output, timestep, sample, return_dict=False):
        self.given = model_output
        return super().step(model_output, timestep, sample, return_dict)


def test_the_scaled_output_keeps_its_dtype_beside_a_state_of_another():
    scheduler = fused.fuse(Recording(prediction_type="v_prediction"), eps_scaling=1.02)
    scheduler.set_timesteps(4)
    f, x = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    scheduler.step(f, scheduler.timesteps[1], x)
    assert scheduler.given.dtype is torch.bfloat16 and not torch.equal(scheduler.given, f)


def test_a_copy_is_scaled_by_its_own_schedule_and_lambda():
    scheduler = fused.fuse(Plain(), eps_scaling={"k": 0.01, "b": 1.0})
    scheduler.set_timesteps(7)
    assert len(scheduler.lambdas) == 7
    twin, again = copy.copy(scheduler), fused.fuse(scheduler, eps_scaling=1.03)
    twin.set_timesteps(3)
    again.set_timesteps(2)
    assert twin.lambdas == (1.02, 1.01, 1.0) and len(scheduler.lambdas) == 7 and again.lambdas == (1.03, 1.03)


class OwnFlow(diffusers.FlowMatchEulerDiscreteScheduler):
    pass


def test_a_flow_whose_sigmas_are_above_1_is_not_scaled():
    """Its x is not (1 - sigma)*x_0 + sigma*eps."""
    scheduler = fused.fuse(OwnFlow(), eps_scaling=1.01)
    with pytest.raises(ValueError, match="its sigmas are inverted, or above 1"):
        scheduler.set_timesteps(sigmas=[4.0, 2.0, 1.0])
