"""`correction=` of the schedulers: whole trajectories beside diffusers' own in float64, patched as the authors patch samplers.

The patch is here, in plain PyTorch: after diffusers' own step, prev_sample + s*(prev_sample - x_0) in each band of Haar's
wavelet, x_0 being the scheduler's own estimate in that call. The first case of each class is quick, others are deep.
"""

import contextlib
import copy
import dataclasses
import json

import diffusers
import numpy as np
import pytest
import torch

from epskernels import corrections
from epskernels import diffusers as fused

from . import test_other_calls as others
from .test_other_calls import CASES as OTHERS
from .test_other_calls import STEPS
from .test_trajectories import CASES, drawn_in, errors, in_float64, network, trajectory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]

# ---- the authors' patch ----


def low_band(d):
    """One level of Haar's wavelet and back, without the high bands: the mean of 2x2 blocks, zeros beyond the edge."""
    height, width = d.shape[-2:]
    d = torch.nn.functional.pad(d, (0, width % 2, 0, height % 2))
    rows = d.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).mean(dim=(-3, -1))
    return rows.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width]


def patched(prev, x0, kind, low, high):
    """Eq. 17 and 21 of arXiv 2604.16044, and arXiv 2507.10072 for factors."""
    d = prev if kind == "frequency" else prev - x0
    low, high = (low - 1, high - 1) if kind == "frequency" else (low, high)
    return prev + low * low_band(d) + high * (d - low_band(d))


def by_prediction(kind, f, x, alpha, sigma):
    return {
        "epsilon": lambda: (x - sigma * f) / alpha, "sample": lambda: f, "v_prediction": lambda: alpha * x - sigma * f,
        "flow_prediction": lambda: x - sigma * f,
    }[kind]()  # fmt: skip


ON_FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF")
ON_ALPHAS = ("PNDM", "LCM", "TCD")


def estimate(scheduler, name, f, t, x, i, results, converted):
    """x_0 as diffusers' scheduler has it in call i."""
    config = scheduler.config
    if name in ON_FLOWS or (name == "Helios" and config.scheduler_type == "euler"):
        sigma = scheduler.sigmas[i]
        return x + (1 - sigma) * f if config.get("invert_sigmas") else x - sigma * f
    if name == "MiniMaxH3":
        return x + (1 - t) * f
    if name in ON_ALPHAS:
        abar = scheduler.alphas_cumprod[int(t)]
        x0 = by_prediction(config.prediction_type, f, x, abar.sqrt(), (1 - abar).sqrt())
        return x0.clamp(-1, 1) if getattr(config, "clip_sample", False) and name == "LCM" else x0
    if name == "IPNDM":
        return scheduler.alphas[i] * x - scheduler.betas[i] * f
    if name == "CMStochasticIterative":
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[i])
        x0 = c_out * f + c_skip * x
        return x0.clamp(-1, 1) if config.clip_denoised else x0
    if name == "ConsistencyDecoder":
        return scheduler.c_out[int(t)] * f + scheduler.c_skip[int(t)] * x
    if not converted:
        return results[1]
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
    by_eps = not getattr(scheduler, "predict_x0", True) or name == "DEISMultistep"
    by_eps |= getattr(config, "algorithm_type", "") in ("dpmsolver", "sde-dpmsolver", "noise_prediction")
    return (x - sigma * converted[-1]) / alpha if by_eps else converted[-1]


IN_HALVES = ("HeunDiscrete", "FlowMatchHeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
TO_AN_IMAGE = ("DDPM", "UnCLIP", "DDPMParallel", "LCM", "ConsistencyDecoder", "IPNDM")


class Patched:
    """diffusers' scheduler, whose step corrects the last call's prev_sample of each step."""

    def __init__(self, case, scheduler, correction):
        self.scheduler, self.case, self.correction = scheduler, case, correction
        self.name, self.call, self.converted, self.began = case.name.removesuffix("Scheduler"), case.begin, [], 0
        self.step.__func__.__wrapped__ = type(scheduler).step  # `trajectory` looks at its signature
        if hasattr(scheduler, "convert_model_output") and self.name not in ON_FLOWS:
            convert = scheduler.convert_model_output

            def keep(*args, **kwargs):
                self.converted.append(convert(*args, **kwargs))
                return self.converted[-1]

            scheduler.convert_model_output = keep

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def ends(self, i):
        """Whether call i is its step's last, and there is noise left to correct."""
        calls = len(self.timesteps)
        if self.name in IN_HALVES and i % 2 == 0:
            return False
        if self.name == "DPMSolverSinglestep":
            if i + 1 < calls and self.order_list[i + 1] != 1:
                return False
        if self.name == "PNDM":
            ends = i % 4 == 3 if not self.config.skip_prk_steps and i < 12 else i > 0
            return ends and not (self.config.set_alpha_to_one and i == calls - 1)
        if self.name == "CMStochasticIterative":  # to sigma_min without noise
            return bool(self.sigmas[i + 1] > 1.001 * self.config.sigma_min)
        if self.name == "SCM":
            return bool(self.timesteps[i + 1] != 0)
        if self.name == "TCD":
            return True
        if self.name.startswith(("DDIM", "CogVideoXDDIM")) and not self.config.set_alpha_to_one:
            return True
        if hasattr(self.scheduler, "sigmas") and self.name not in TO_AN_IMAGE and self.name not in IN_HALVES:
            return bool(self.sigmas[i + 1] != self.config.get("invert_sigmas", False))
        return i < self.case.calls - 1 if self.case.calls else i < calls - 1

    def number(self, i):
        """Which step a call belongs to."""
        if self.name in IN_HALVES:
            return i // 2
        if self.name == "DPMSolverSinglestep":
            return i - (self.order_list[i] - 1)
        if self.name == "PNDM":
            return (
                i // 4
                if not self.config.skip_prk_steps and i < 12
                else i - 9
                if not self.config.skip_prk_steps
                else i - 1
            )
        return i

    def step(self, f, t, x, **call):
        i, self.call = self.call, self.call + 1
        results = self.scheduler.step(f, t, x, **call)
        if not self.ends(i):
            return results
        x0 = estimate(self.scheduler, self.name, f, t, x, i, results, self.converted)
        weights = [w[self.number(i)] if isinstance(w, list) else w for w in (self.correction.low, self.correction.high)]
        return (patched(results[0], x0, self.correction.kind, *weights), *results[1:])


REFUSED = {"DDIMInverse", "DPMSolverMultistepInverse", "RePaint", "FlowMapEulerDiscrete"}
NOISE_ALONE = {"IPNDM"}  # keeps eps, and begins where that says nothing of x_0
MADE = {
    "dc": lambda w: corrections.dc(w),
    "dcw": lambda w: corrections.dcw([-x for x in w], 0.07, schedule="constant"),
}


def cases():
    first = {case.name: label for label, case in reversed(CASES.items())}.values()
    apart = REFUSED | NOISE_ALONE | {"DPMSolverSDE"}
    kept = {
        label: case for label, case in CASES.items()
        if case.name.removesuffix("Scheduler") not in apart and not case.own and not case.learned and "threshold" not in label
        and not {"s_churn", "eta", "variance_noise"} & set(case.call) and len(case.shape) == 4 and not case.begin
        and "zero_snr" not in label and label != "FlowMatchLCM-inverted" and case.steps.get("num_inference_steps") != 1
    }  # fmt: skip
    return [
        pytest.param(kind, case, id=f"{label}-{kind}", marks=[] if label in first else pytest.mark.deep)
        for label, case in kept.items() for kind in MADE
    ]  # fmt: skip


def weights(case):
    """A weight for each step."""
    scheduler = case.ours()
    return [0.03 + 0.004 * (i % 5) for i in range(scheduler._lambda_steps(len(scheduler.lambdas))[1])]


def run_patched(case, correction, f, dtype):
    theirs = Patched(case, case.theirs(), correction)
    with in_float64(theirs.scheduler, drawn_in(case)) if dtype is torch.float64 else contextlib.nullcontext():
        return states(trajectory(case, theirs, dtype, f))


def states(results):
    return [result[:1] for result in results]


@pytest.mark.parametrize("kind, case", cases())
def test_trajectories_are_the_patched_ones(kind, case):
    """Within a few roundings, or about as near as diffusers' own in float32 (UnCLIP begins at alpha 5e-5)."""
    correction, f = MADE[kind](weights(case)), network(case)
    expected = run_patched(case, correction, f, torch.float64)
    ours = case.ours()
    ours.correction = correction
    found = states(trajectory(case, ours, torch.float32, f))
    assert ours.path == "fused"
    gap = errors(found, expected).max()
    assert gap < 2e-6 or gap < 4 * errors(run_patched(case, correction, f, torch.float32), expected).max()
    assert errors(states(trajectory(case, case.ours(), torch.float32, f)), expected).max() > 1e-3  # it does something


@pytest.mark.parametrize(
    "name", ["DDIM-epsilon", "DPMSolverMultistep-dpmsolver++-midpoint-2", "FlowMatchEulerDiscrete-plain"]
)
def test_lambda_and_a_correction(name):
    """lambda scales what the patched scheduler is given."""
    case = CASES[name]
    correction, f = MADE["dcw"](weights(case)), network(case)
    alpha, sigma, d_x, d_f = case.ours()._model(case.ours()._options)

    def scaled(out, x, i):  # the predicted eps divided by lambda
        eps = (x - alpha[i] * (d_x[i] * x + d_f[i] * out)) / sigma[i]
        return (
            ((x - sigma[i] * eps / 1.02) / alpha[i] - d_x[i] * x) / d_f[i] if alpha[i] and 1 / alpha[i] < 1e6 else out
        )

    theirs = Patched(case, case.theirs(), correction)
    with in_float64(theirs.scheduler, drawn_in(case)):
        expected = states(trajectory(case, theirs, torch.float64, f, scale=scaled))
    ours = case.ours(1.02)
    ours.correction = correction
    assert errors(states(trajectory(case, ours, torch.float32, f)), expected).max() < 2e-6


# ---- schedulers that are called otherwise ----


def corrected_steps(label, correction):
    """One step of diffusers' scheduler, and the patch after it."""
    own = OTHERS[label][2]

    def x0_of(scheduler, f, i, x, made):
        if label.startswith("CogVideoXDPM") or label.startswith("DPMSolverSDE"):
            return made[1]
        if label == "ScoreSdeVe":
            return x + scheduler.discrete_sigmas[STEPS - 1 - i] ** 2 * f
        abar = scheduler._alpha_cumprod(scheduler.timesteps[i], "cpu")
        return (x - (1 - abar).sqrt() * f) / abar.sqrt()

    def go(scheduler, f, i, x, before, call):
        made = own(scheduler, f, i, x, before, call)
        made = made if isinstance(made, tuple) else tuple(made.values())
        calls = len(scheduler.timesteps) - label.startswith("Wuerstchen")
        if i == calls - 1 or (label.startswith("DPMSolverSDE") and i % 2 == 0):
            return made
        number = i // 2 if label.startswith("DPMSolverSDE") else i
        x0 = x0_of(scheduler, f, i, x, made)
        return patched(made[0], x0, correction.kind, correction.low[number], correction.high), *made[1:]

    return go


def karras_ve(correction):
    """The pipeline's two halves, the second corrected."""

    def go(scheduler, f, i, x, before, call):
        t = scheduler.timesteps[i]
        sigma, sigma_prev = scheduler.schedule[t], scheduler.schedule[t - 1] if t else 0
        state, hat = scheduler.add_noise_to_input(x, sigma, **call)
        x, derivative = scheduler.step(f, hat, sigma_prev, state, return_dict=False)
        if sigma_prev:
            of_first = x
            x, _ = scheduler.step_correct(f, hat, sigma_prev, state, x, derivative, return_dict=False)
            x = patched(x, of_first + sigma_prev * f, "dcw", correction.low[i], correction.high)
        return (x,)

    return go


CALLED_OTHERWISE = [label for label in ("CogVideoXDPM-epsilon", "Wuerstchen", "ScoreSdeVe", "KarrasVe-edm", "DPMSolverSDE")
                    if label in OTHERS]  # fmt: skip


@pytest.mark.parametrize("label", CALLED_OTHERWISE)
def test_other_calls(label, monkeypatch):
    ours = others.made(fused, label)
    correction = corrections.dcw([0.03 + 0.005 * i for i in range(len(ours.lambdas))], 0.07, schedule="constant")
    ours.correction = correction
    found = states(others.trajectory(label, ours))
    assert ours.path == "fused"
    go = karras_ve(correction) if label.startswith("KarrasVe") else corrected_steps(label, correction)
    case = OTHERS[label]
    uncorrected = states(others.trajectory(label, others.made(diffusers, label)))
    monkeypatch.setitem(OTHERS, label, (*case[:2], go, case[3]))
    expected = states(others.trajectory(label, others.made(diffusers, label)))
    others.assert_close(found, expected, 3e-4 if "SDE" in label else 2e-5)
    with pytest.raises(AssertionError):
        others.assert_close(uncorrected, expected, 1e-3)


def test_a_batch_at_timesteps_of_its_own():
    """batch_step_no_noise corrects each sample as step does at its timestep; a step to an image, not at all."""
    scheduler = fused.DDIMParallelScheduler(clip_sample=False, correction=corrections.dcw(-0.1, 0.05))
    scheduler.set_timesteps(10)
    x, f = (torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    at = scheduler.timesteps[[1, 6, 9]]
    made = scheduler.batch_step_no_noise(f, at, x)
    each = [scheduler.step(f[i : i + 1], t, x[i : i + 1], return_dict=False)[0] for i, t in enumerate(at)]
    plain = fused.DDIMParallelScheduler(clip_sample=False)
    plain.set_timesteps(10)
    assert torch.allclose(made, torch.cat(each), atol=1e-6) and scheduler.path == "fused"
    uncorrected = plain.batch_step_no_noise(f, at, x)
    assert torch.allclose(made[2], uncorrected[2], atol=1e-6) and not torch.allclose(
        made[:2], uncorrected[:2], atol=1e-3
    )


# ---- which weight ----


def low_weights(scheduler, correction):
    """Of the low band, in each row that is corrected."""
    scheduler.correction = correction
    columns = scheduler._plan(scheduler._options, torch.device("cpu")).columns
    return np.asarray(columns["l_next"])[: scheduler._length()]


@pytest.mark.parametrize("name", ["DDIM", "FlowMatchEulerDiscrete", "EulerDiscrete", "DPMSolverMultistep"])
def test_weights_by_the_noise(name):
    """sigma's share of the schedule's largest, and a table over log(alpha/sigma), where each step begins."""
    scheduler = getattr(fused, f"{name}Scheduler")()
    scheduler.set_timesteps(6)
    sigma = scheduler.sigmas[:-1].double().numpy() if name != "DDIM" else None
    if name == "DDIM":
        abar = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    elif name == "FlowMatchEulerDiscrete":
        alpha = 1 - sigma
    elif name == "EulerDiscrete":
        alpha = np.ones(6)
    else:
        alpha = 1 / np.sqrt(sigma**2 + 1)
        sigma = sigma * alpha
    acts = np.array([1, 1, 1, 1, 1, 0])
    found = low_weights(scheduler, corrections.dcw(-0.2))
    assert np.allclose(found, -0.2 * sigma / sigma.max() * acts, rtol=1e-6)
    table = {"levels": [-4.0, 0.0, 3.0], "values": [-0.3, -0.1, 0.2]}
    with np.errstate(divide="ignore"):
        expected = np.interp(np.log(alpha) - np.log(sigma), table["levels"], table["values"])
    found = low_weights(scheduler, corrections.dcw(table, schedule="constant"))
    assert np.allclose(found, expected * acts, rtol=1e-5, atol=1e-9)


def test_the_target_alpha_m0():
    """x' is compared with the share of the image that it holds: c_m0 is alpha*(-s) more, not -s."""
    scheduler = fused.EulerDiscreteScheduler(correction=corrections.dc(0.1))
    other = fused.EulerDiscreteScheduler(correction=corrections.dc(0.1, target="alpha*m0"))
    for each in (scheduler, other):
        each.set_timesteps(4)
    assert torch.equal(scheduler._plan(scheduler._options, "cpu").table, other._plan(other._options, "cpu").table)
    scheduler = fused.DDPMScheduler(clip_sample_range=2.0, correction=corrections.dc(0.1))
    scheduler.set_timesteps(4)
    first = scheduler._plan((), torch.device("cpu")).columns["c_m0"]
    scheduler.correction = corrections.dc(0.1, target="alpha*m0")
    second = scheduler._plan((), torch.device("cpu")).columns["c_m0"]
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[1:]].double().sqrt().numpy()
    assert np.allclose((second - first)[:-1], 0.1 * (1 - alpha), rtol=1e-9) and second[-1] == first[-1]


def test_steps_that_are_left_keep_their_weights():
    """With a begin index, and where timesteps were cut: also the share of the largest sigma of all."""
    correction = corrections.dcw([0.1, 0.2, 0.3, 0.4], schedule="sigma")
    for scheduler in (fused.DDIMScheduler(), fused.EulerDiscreteScheduler()):
        scheduler.set_timesteps(4)
        whole = low_weights(scheduler, correction)
        if isinstance(scheduler, fused.DDIMScheduler):
            scheduler.timesteps = scheduler.timesteps[2:]
            assert np.array_equal(low_weights(scheduler, correction), whole[2:])
        else:
            x = torch.randn(1, 4, 6, 6)
            scheduler.set_begin_index(2)
            scheduler.scale_model_input(x, scheduler.timesteps[2])
            scheduler.step(x, scheduler.timesteps[2], x)
            assert scheduler.path == "fused" and np.array_equal(low_weights(scheduler, correction), whole)
    with pytest.raises(ValueError, match="^correction: expected 5 weights of the low band, one for each step, got 4"):
        scheduler.set_timesteps(5)


# ---- in a configuration ----


@pytest.mark.parametrize("form", ["dict", "file", "Correction"])
def test_saved_and_loaded(form, tmp_path):
    made = corrections.dcw([-0.1, 0.0, 0.02], {"levels": [-1.0, 2.0], "values": [0.1, 0.3]}, schedule="constant")
    made.save(tmp_path / "correction.json")
    given = {"dict": made.to_dict(), "file": tmp_path / "correction.json", "Correction": made}[form]
    scheduler = fused.DDIMScheduler(correction=given)
    (tmp_path / "correction.json").unlink()  # read once
    scheduler.save_pretrained(tmp_path)
    for again in (
        fused.DDIMScheduler.from_pretrained(tmp_path), fused.DDIMScheduler.from_config(scheduler.config),
        fused.EulerDiscreteScheduler.from_config(scheduler.config), fused.fuse(scheduler), copy.deepcopy(scheduler),
        fused.DDIMScheduler.from_config(diffusers.DDIMScheduler().config, correction=made), scheduler.fork(),
        fused.fuse(diffusers.DDIMScheduler(), correction=given if form != "file" else made),
    ):  # fmt: skip
        assert again.correction == made.to_dict() == json.loads(json.dumps(again.config.correction))
        assert corrections.as_correction(again.correction) == made
    theirs = fused.unfuse(scheduler)
    assert "correction" not in theirs.config and type(theirs) is diffusers.DDIMScheduler


def test_use_by_another_scheduler_or_with_other_steps_is_said(tmp_path, caplog):
    corrections._say.cache_clear()
    corrections.dc(-0.1).save(tmp_path / "best.json", sampler="ddim", steps=10)
    scheduler = fused.DDIMScheduler(correction=tmp_path / "best.json")
    assert (scheduler.correction["sampler"], scheduler.correction["steps"]) == ("ddim", 10)
    scheduler.save_pretrained(tmp_path)
    scheduler = fused.DDIMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(10)
    scheduler.timesteps = scheduler.timesteps[4:]  # as pipelines that begin at an image
    x = torch.ones(1, 1, 4, 4)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert not caplog.records
    for other, steps in ((scheduler, 20), (fused.EulerDiscreteScheduler.from_config(scheduler.config), 10)):
        caplog.clear()
        other.set_timesteps(steps), other.set_timesteps(steps)
        (record,) = caplog.records
        used = f"correction: dc was fitted for ddim with 10 steps, used by {type(other).__name__} with {steps} steps"
        assert record.getMessage() == f"{used}: a weight need not transfer"


def test_what_is_not_corrected_is_diffusers_to_the_bit(caplog):
    """None is not written where diffusers' own class would warn of it."""
    scheduler = fused.DDIMScheduler()
    assert scheduler.correction is None and "correction" in scheduler.config["_use_default_values"]
    diffusers.DDIMScheduler.from_config(scheduler.config)
    assert not caplog.records
    scheduler.set_timesteps(4)
    table = scheduler._plan(scheduler._options, torch.device("cpu")).table
    scheduler.correction = corrections.dcw(0.1)
    assert scheduler._plan(scheduler._options, torch.device("cpu")).table.shape == (4, 28)
    scheduler.correction = corrections.dc(0.1)
    assert scheduler._plan(scheduler._options, torch.device("cpu")).table.shape == (4, 24)
    scheduler.correction = None
    assert torch.equal(scheduler._plan(scheduler._options, torch.device("cpu")).table, table)


def test_a_correction_that_is_written_into_is_seen():
    scheduler = fused.DDIMScheduler(correction=corrections.dc(0.1))
    scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4)
    first = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    scheduler.config.correction["low"] = scheduler.config.correction["high"] = 0.3
    assert not torch.equal(scheduler.step(x, scheduler.timesteps[0], x).prev_sample, first)


def test_pipelines_are_fused_with_a_correction():
    class Pipeline:
        def __init__(self):
            self.scheduler = diffusers.EulerDiscreteScheduler()

    pipe = fused.fuse(Pipeline(), correction={"kind": "dc", "s": 0.02})
    assert pipe.scheduler.correction == corrections.dc(0.02).to_dict()
    assert fused.share(pipe).scheduler.correction == pipe.scheduler.correction
    fused.unfuse(pipe)
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler


@pytest.mark.parametrize(
    "value, error, message",
    [
        (0.1, TypeError, "^correction: expected a Correction, a dict or a .json file, got 0.1"),
        ({"kind": "dw"}, ValueError, "^correction: kind: expected one of"),
        (
            "no.json",
            FileNotFoundError,
            "^correction: expected a file saved by Correction.save, and there is no no.json",
        ),
        (corrections.dc([0.1, 0.2]), ValueError, "^correction: expected 4 weights of the low band"),
    ],
    ids=["number", "kind", "file", "length"],
)
def test_bad_corrections(value, error, message):
    with pytest.raises(error, match=message):
        fused.DDIMScheduler(correction=value).set_timesteps(4)
    scheduler = fused.DDIMScheduler(correction=corrections.dc(0.1))
    if error is not ValueError or "kind" in message:
        with pytest.raises(error, match=message):
            scheduler.correction = value
        assert scheduler.correction == corrections.dc(0.1).to_dict()


# ---- what is refused ----


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_schedulers_without_a_correction(name):
    for make in (
        lambda: getattr(fused, f"{name}Scheduler")(correction=corrections.dc(0.1)),
        lambda: fused.fuse(getattr(diffusers, f"{name}Scheduler")(), correction=corrections.dc(0.1)),
    ):
        with pytest.raises(ValueError, match=f"^correction: expected None for {name}Scheduler, whose "):
            make()


def test_a_scheduler_without_a_twin():
    class OwnScheduler(diffusers.DDIMScheduler):
        pass

    with pytest.raises(ValueError, match="^correction: expected None for OwnScheduler, whose own step runs"):
        fused.fuse(OwnScheduler(), correction=corrections.dc(0.1))
    assert fused.fuse(OwnScheduler()).correction is None


def test_eps_that_says_nothing_of_x0():
    """IPNDM keeps eps, and begins at noise alone: no correction there by x_0, but by a weight of 0 or without x_0."""
    scheduler = fused.IPNDMScheduler(correction=corrections.dcw(0.1))
    with pytest.raises(ValueError, match="^correction: expected a sampler whose steps estimate x_0"):
        scheduler.set_timesteps(6)
    case = dataclasses.replace(CASES["IPNDM-plain"], steps={"num_inference_steps": 6})
    ours, f = case.ours(), network(case)
    ours.correction = corrections.dcw(0.0, [0.0, 0.1, 0.1, 0.1, 0.1, 0.1], schedule="constant")
    expected = run_patched(case, corrections.as_correction(ours.correction), f, torch.float64)
    assert errors(states(trajectory(case, ours, torch.float32, f)), expected).max() < 2e-6


def test_diffusers_own_step_is_refused():
    """Where it would run in the place of a row that is corrected: dtypes, gradients, timesteps off the schedule, tokens."""
    scheduler = fused.DDIMScheduler(correction=corrections.dc(0.1))
    scheduler.set_timesteps(4)
    x, t = torch.randn(1, 3, 4, 4), scheduler.timesteps
    for sample, at, why in (
        (x.double(), t[0], "of dtypes torch.float64"), (x.clone().requires_grad_(), t[0], "gradients are asked for"),
        (x, 3, "timestep 3 is not one of the schedule's"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^correction: expected None, since diffusers' own step runs here: {why}"):
            scheduler.step(x.to(sample.dtype), at, sample)
    scheduler.step(x.double(), t[-1], x.double())  # to an image: nothing is corrected
    lcm = fused.FlowMatchLCMScheduler(scale_factors=[0.5, 1.0], upscale_mode="nearest", correction=corrections.dc(0.1))
    with pytest.raises(ValueError, match="^correction: expected None, .*: scale_factors resize"):
        lcm.set_timesteps(4)
    flow = fused.FlowMatchEulerDiscreteScheduler(correction=corrections.dc(0.1))
    flow.set_timesteps(4)
    x = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match="^correction: expected None with per_token_timesteps"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.full((2, 6), 500.0))
    parallel = fused.DDIMParallelScheduler(correction=corrections.dc(0.1))
    parallel.set_timesteps(4)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="^correction: expected None, since diffusers' own step runs here"):
        parallel.batch_step_no_noise(x, parallel.timesteps[:2], x)


def test_packed_latents():
    """(B, N, C) has no two dimensions of an image; dc is of all bands."""
    flow = fused.FlowMatchEulerDiscreteScheduler(correction=corrections.dcw(0.1))
    flow.set_timesteps(4)
    x = torch.randn(2, 6, 4)
    with pytest.raises(
        ValueError, match=r"^sample: expected \(B, C, H, W\) or .*, got \(2, 6, 4\); corrections.dc takes"
    ):
        flow.step(x, flow.timesteps[0], x)
    flow.correction = corrections.dc(0.1)
    flow.set_timesteps(4)
    sigma, sigma_next = flow.sigmas[:2]
    expected = patched_all(x + (sigma_next - sigma) * x, x - sigma * x, 0.1)
    assert torch.allclose(flow.step(x, flow.timesteps[0], x).prev_sample, expected, atol=1e-6)


def patched_all(prev, x0, s):
    return prev + s * (prev - x0)


@pytest.mark.parametrize("kind", ["m0", "frequency"])
def test_one_dimension(kind):
    """Signals (B, C, L), in pairs of the last dimension."""
    correction = (
        corrections.dcw(0.1, schedule="constant", dims=1) if kind == "m0" else corrections.frequency(1.1, dims=1)
    )
    scheduler = fused.DDIMScheduler(clip_sample=False, correction=correction)
    scheduler.set_timesteps(4)
    plain = fused.DDIMScheduler(clip_sample=False)
    plain.set_timesteps(4)
    x, f = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    found = scheduler.step(f, scheduler.timesteps[0], x)
    prev, x0 = plain.step(f, plain.timesteps[0], x, return_dict=False)
    d = torch.nn.functional.pad(prev - x0 if kind == "m0" else prev, (0, 1)).unflatten(-1, (-1, 2)).mean(-1)
    assert torch.allclose(found.prev_sample, prev + 0.1 * d.repeat_interleave(2, -1)[..., :7], atol=1e-5)
    assert torch.allclose(found.pred_original_sample, x0, atol=1e-6)
