"""lambda from any form to a saved pipeline, and back in a new process: with this package, and without it."""

import json
import logging
import math
import pathlib
import pickle
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

import epskernels
from epskernels import corrections, models, scaling
from epskernels import diffusers as fused

from ..support.schedulers import ONE_SCHEDULE, set_steps

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]
ROOT = pathlib.Path(epskernels.__file__).parents[1]
NAMES = sorted({twin.__name__ for twin in fused.FUSED.values()} - {*ONE_SCHEDULE})


def digits():
    pipe = diffusers.DDPMPipeline.from_pretrained(models.DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_new_process(code, *arguments, without=()):
    """What `code` prints as JSON. without: modules that cannot be imported there."""
    hide = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in without)
    done = subprocess.run(
        [sys.executable, "-c", hide + code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT.parent,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RUN = """
import json, pathlib, sys, torch, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
kind = type(pipe.scheduler)
found = {}
for folder in map(pathlib.Path, sys.argv[2:]):  # schedulers alone
    of_class = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    named = getattr(sys.modules["epskernels.diffusers"], of_class)
    loaded = named.from_pretrained(folder)
    found[folder.name] = [named.__module__, named.__name__, loaded.eps_scaling, hasattr(named, "_enter")]
of_pipe = [kind.__module__, kind.__name__, dict(pipe.scheduler.config).get("eps_scaling"), image.tolist()]
print(json.dumps([*of_pipe, found]))
"""


def image_of(pipe):
    return pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images


@pytest.mark.parametrize(
    "first",
    [
        "import epskernels",
        pytest.param("import diffusers, epskernels", marks=pytest.mark.deep),
        pytest.param("import epskernels.diffusers", marks=pytest.mark.deep),
    ],
)
def test_a_saved_fused_pipeline_loads_in_a_new_process(first, tmp_path):
    """With the lambda and correction that it was saved with, of files that are gone by then; and so does every scheduler."""
    scaling.linear(0.01, 1.01, origin="cleanest").save(tmp_path / "lambda.json", steps=4)
    corrections.dcw(-0.1, 0.05).save(tmp_path / "correction.json")
    plain = image_of(fused.fuse(digits(), eps_scaling=tmp_path / "lambda.json"))
    pipe = fused.fuse(digits(), eps_scaling=tmp_path / "lambda.json", correction=tmp_path / "correction.json")
    (tmp_path / "lambda.json").unlink()
    (tmp_path / "correction.json").unlink()
    pipe.save_pretrained(tmp_path / "pipe")
    linear, saved = {"k": 0.01, "b": 1.0}, {name: tmp_path / name for name in NAMES}
    for name, folder in saved.items():
        getattr(fused, name)(eps_scaling=linear).save_pretrained(folder)
    module, name, eps_scaling, image, found = in_new_process(f"{first}\n{RUN}", tmp_path / "pipe", *saved.values())
    assert found == {name: ["epskernels.diffusers", name, linear, True] for name in NAMES}
    assert (module, name) == ("epskernels.diffusers", "DDPMScheduler")
    assert scaling.as_scaling(eps_scaling) == scaling.as_scaling(pipe.scheduler.eps_scaling)
    assert np.array_equal(image, image_of(pipe)) and not np.array_equal(image, plain)


@pytest.mark.deep
def test_an_unfused_pipeline_loads_without_this_package(tmp_path):
    pipe = digits()
    expected = image_of(pipe)
    fused.fuse(pipe, eps_scaling=1.01)
    assert not np.array_equal(image_of(pipe), expected)
    assert fused.unfuse(pipe) is pipe and type(pipe.scheduler) is diffusers.DDPMScheduler
    assert np.array_equal(image_of(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDPMScheduler"]
    module, name, eps_scaling, image, _ = in_new_process(RUN, tmp_path, without=["epskernels"])
    assert (name, eps_scaling) == ("DDPMScheduler", None) and np.array_equal(image, expected)


def test_import_epskernels_does_not_import_diffusers():
    loaded = in_new_process("import json, sys, epskernels\nprint(json.dumps([name in sys.modules for name in sys.argv[1:]]))",
                            "diffusers", "epskernels.diffusers.pipelines", "epskernels.diffusers")  # fmt: skip
    assert loaded == [False, False, True]


def test_without_diffusers_the_error_says_what_to_install():
    code = """
import json, epskernels
said = []
for action in ("from epskernels.diffusers import fuse", "epskernels.diffusers.fuse", "hasattr(epskernels.diffusers, '__path__')"):
    try:
        exec(action)
        said.append("")
    except ImportError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    said = in_new_process(code, without=["diffusers"])
    assert said == ["epskernels.diffusers needs diffusers: pip install 'diffusers>=0.42'"] * 2 + [""]


# ---- lambda in a configuration ----

FORMS = {
    "number": 1.01,
    "numpy number": np.float64(1.01),
    "list": [1.0, 1.03, 1.02, 1.01],
    "array": np.array([1.0, 1.03, 1.02, 1.01]),
    "tensor": torch.tensor([1.0, 1.5, 1.25, 1.0]),
    "linear": {"k": 0.01, "b": 1.0},
    "published": "ADM/CIFAR-10/20/linear",
    "EpsilonScaling": scaling.exponential(0.01, 1.0, origin="cleanest"),
    "of published": epskernels.published("EDM", "CIFAR-10", 35),
}


# Each class with some of the forms, each form with some of the classes; the others are deep.
EVERY_FORM = [
    pytest.param(name, form, marks=[] if (i + j) % 4 == 0 else pytest.mark.deep)
    for i, name in enumerate(NAMES) for j, form in enumerate(FORMS)
]  # fmt: skip


@pytest.mark.parametrize("name, form", EVERY_FORM)
def test_a_configuration_holds_every_form(name, form, tmp_path):
    """repr, JSON, a file, a pickle, from_config; and the lambdas in use, before the first step."""
    twin, value = getattr(fused, name), FORMS[form]
    scheduler = twin(eps_scaling=value)
    assert form in ("published", "numpy number") or "eps_scaling" in repr(scheduler)
    scheduler.save_pretrained(tmp_path)
    others = [twin.from_pretrained(tmp_path), twin.from_config(scheduler.config), pickle.loads(pickle.dumps(scheduler))]
    for one in (scheduler, *others):
        assert one.config.eps_scaling == scheduler.config.eps_scaling and json.loads(json.dumps(one.config.eps_scaling))
        set_steps(one, 4)
        expected = scaling.as_scaling(value).values(4)
        found = np.array(one.lambdas)
        assert found.shape == (4,) and np.array_equal(found[found != 1], expected[found != 1])


def test_eps_scaling_can_be_set():
    """What was ignored in silence before."""
    x, f = torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    scheduler = fused.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    unscaled = scheduler.step(f, scheduler.timesteps[1], x).prev_sample
    scheduler.eps_scaling = [1.0, 1.01, 1.02, 1.03]
    assert scheduler.lambdas == (1.0, 1.01, 1.02, 1.03) and scheduler.config.eps_scaling == [1.0, 1.01, 1.02, 1.03]
    other = fused.DDIMScheduler(clip_sample=False, eps_scaling=1.01)
    other.set_timesteps(4)
    scaled = scheduler.step(f, scheduler.timesteps[1], x).prev_sample
    assert torch.equal(scaled, other.step(f, other.timesteps[1], x).prev_sample) and not torch.equal(scaled, unscaled)
    scheduler.eps_scaling = 1.0
    assert torch.equal(scheduler.step(f, scheduler.timesteps[1], x).prev_sample, unscaled)
    with pytest.raises(ValueError, match="^eps_scaling: expected a value above 0, got 0"):
        scheduler.eps_scaling = 0
    assert scheduler.eps_scaling == 1.0


def test_a_formula_of_ones_own_is_refused_where_it_cannot_be_kept():
    own = scaling.EpsilonScaling(lambda i: 1 + 0.01 * i, "cleanest", "mine")
    for make in (lambda: fused.DDIMScheduler(eps_scaling=own), lambda: fused.fuse(diffusers.DDIMScheduler(), own)):
        with pytest.raises(ValueError, match="^eps_scaling: expected one made by a function of epskernels.scaling"):
            make()


@pytest.mark.parametrize("name", NAMES)
def test_fuse_and_unfuse_a_scheduler(name):
    """There and back, in the middle of a run, nothing of ours is left."""
    theirs = getattr(diffusers.schedulers, name)()
    set_steps(theirs, 5)
    ours = fused.fuse(theirs, eps_scaling=1.01, seeds=[3])
    assert (
        type(ours) is getattr(fused, name)
        and ours.seeds.tolist() == [3]
        and type(theirs) is getattr(diffusers.schedulers, name)
    )
    back = fused.unfuse(ours)
    assert type(back) is type(theirs) and vars(back).keys() == vars(theirs).keys() and back.config == theirs.config
    assert type(back.config) is type(theirs.config)
    assert fused.unfuse(theirs) is theirs


def test_what_is_no_scheduler_is_refused():
    for function in (fused.fuse, fused.unfuse):
        with pytest.raises(TypeError, match="^pipe: expected a pipeline with a scheduler, or a scheduler, got int"):
            function(5)


def test_a_stale_key_does_not_come_back(caplog):
    """diffusers' usual from_config gives a scheduler that does not scale: diffusers says so then, fuse when it is fused again."""
    ours = fused.fuse(diffusers.DDIMScheduler(), eps_scaling=1.01)
    other = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = fused.fuse(other)
    assert again.eps_scaling == 1.0 and "eps_scaling 1.01 stands in the configuration of diffusers' own" in caplog.text
    caplog.clear()
    assert fused.fuse(other, eps_scaling=1.02).eps_scaling == 1.02 and fused.fuse(ours).eps_scaling == 1.01
    assert fused.EulerDiscreteScheduler.from_config(ours.config).eps_scaling == 1.01 and not caplog.records


def test_fused_again_only_what_is_passed_changes():
    ours = fused.fuse(diffusers.DDIMScheduler(), eps_scaling=1.01, seeds=[3], correction=corrections.dc(0.1))
    for passed in ({}, {"eps_scaling": 1.02}, {"correction": corrections.dc(0.2)}, {"seeds": [4, 5]},
                   {"eps_scaling": None}, {"correction": None}, {"seeds": None}):  # fmt: skip
        again, expected = (
            fused.fuse(ours, **passed),
            {"eps_scaling": 1.01, "seeds": [3], "correction": corrections.dc(0.1)},
        )
        expected |= passed
        assert again.eps_scaling == (1.0 if expected["eps_scaling"] is None else expected["eps_scaling"])
        assert corrections.as_correction(again.correction) == expected["correction"]
        assert (None if again.seeds is None else again.seeds.tolist()) == expected["seeds"]
    theirs = fused.fuse(diffusers.DDIMScheduler(), None, None, None)
    assert (theirs.eps_scaling, theirs.seeds, theirs.correction) == (1.0, None, None)


@pytest.mark.parametrize("name", ["scaling", "lambda_t", "corrections"])
def test_names_of_elsewhere_are_refused(name):
    """from_config too, where diffusers would leave them out and say nothing."""
    right = "correction" if name == "corrections" else "eps_scaling"
    theirs = diffusers.DDIMScheduler()
    for make in (fused.DDIMScheduler, lambda **given: fused.DDIMScheduler.from_config(theirs.config, **given),
                 lambda **given: fused.fuse(theirs, **given)):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name}: .* has no such argument; it is {right}= here$"):
            make(**{name: 1.01})

    class Own(diffusers.DDIMScheduler):
        @diffusers.configuration_utils.register_to_config
        def __init__(self, scaling=2.0):
            pass

    kept = fused.fuse(Own())
    assert type(kept).from_config(kept.config, scaling=3.0).config.scaling == 3.0
    with pytest.raises(TypeError, match="^fuse.. got an unexpected keyword argument 'eps_scalng'"):
        fused.fuse(theirs, eps_scalng=1.01)


def test_other_steps_than_published_for_are_said(caplog):
    scaling._say.cache_clear()
    scheduler = fused.DDPMScheduler(eps_scaling="ADM/CIFAR-10/20/linear")
    scheduler.set_timesteps(20)
    assert not caplog.records
    scheduler.set_timesteps(50)
    assert "published for ADM, CIFAR-10, 20, linear with 20 steps, used with 50" in caplog.text


# ---- lambda by noise level ----

BY_LEVEL = {"kind": "by_level", "levels": [-4.0, 0.0, 4.0], "values": [1.06, 1.02, 0.97]}


def level_of_call(scheduler, i, timestep):
    """log(alpha/sigma) of the state of the i-th model call, from what diffusers keeps."""
    if isinstance(scheduler, (fused.FlowMatchEulerDiscreteScheduler, fused.FlowMatchHeunDiscreteScheduler)):
        sigma = float(scheduler.sigmas[i])
        return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        abar = float(scheduler.alphas_cumprod[int(timestep)])
        return 0.5 * math.log(abar / (1 - abar))
    return -math.log(float(scheduler.sigmas[i]))  # of x_0 + sigma*eps, and of its variance-preserving multiple


@pytest.mark.parametrize(
    "name",
    [
        "DDPM",
        "DDIM",
        "PNDM",
        "EulerDiscrete",
        "HeunDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "FlowMatchEulerDiscrete",
    ],
)
@pytest.mark.parametrize("steps", [4, 9])
def test_lambda_by_level_is_that_of_each_call_s_own_level(name, steps):
    scheduler = getattr(fused, f"{name}Scheduler")(eps_scaling=BY_LEVEL)
    scheduler.set_timesteps(steps)
    found = scheduler._plan(scheduler._options, scheduler.timesteps.device).lambda_t
    expected = [
        np.interp(level_of_call(scheduler, i, t), BY_LEVEL["levels"], BY_LEVEL["values"])
        for i, t in enumerate(scheduler.timesteps)
    ]
    if name.startswith("Flow"):
        expected[0] = 1.0  # noise alone
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=2e-6)
    assert len(set(found)) >= min(steps, 4)


def test_lambda_by_level_is_saved_and_needs_a_level(tmp_path):
    scheduler = fused.DDIMScheduler(eps_scaling=epskernels.scaling.tsr(0.95))
    scheduler.save_pretrained(tmp_path)
    loaded = fused.DDIMScheduler.from_pretrained(tmp_path)
    assert loaded.eps_scaling == {"kind": "tsr", "k": 0.95, "sigma": 1.0, "source": "arXiv 2510.01184"}
    assert fused.fuse(diffusers.DDIMScheduler(), eps_scaling=loaded.eps_scaling).eps_scaling == loaded.eps_scaling
    flow = fused.FlowMatchEulerDiscreteScheduler(eps_scaling=BY_LEVEL)
    flow.set_timesteps(4)
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="eps_scaling: expected lambda of steps with per_token_timesteps"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.full((2, 3), 500.0))


def test_a_batch_at_timesteps_of_its_own_has_lambda_by_level():
    scheduler = fused.DDIMParallelScheduler(eps_scaling=BY_LEVEL)
    scheduler.set_timesteps(10)
    plain = fused.DDIMParallelScheduler()
    plain.set_timesteps(10)
    timesteps = torch.tensor([901, 333, 5])
    x, f = torch.randn(2, 3, 4, 8, 8)
    abar = scheduler.alphas_cumprod[timesteps].double()
    lambda_t = np.interp(0.5 * torch.log(abar / (1 - abar)), BY_LEVEL["levels"], BY_LEVEL["values"])
    scaled = f / torch.from_numpy(lambda_t).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        scheduler.batch_step_no_noise(f, timesteps, x),
        plain.batch_step_no_noise(scaled, timesteps, x),
        rtol=1e-5,
        atol=1e-5,
    )


class OwnDDIM(diffusers.DDIMScheduler):
    """A user's own, which is scaled before its own step."""


class OwnEuler(diffusers.EulerDiscreteScheduler):
    pass


class OwnHeun(diffusers.HeunDiscreteScheduler):
    pass


@pytest.mark.parametrize("kind", [OwnDDIM, OwnEuler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_scheduler_of_one_s_own_is_scaled_by_level(kind, prediction_type):
    scheduler = fused.fuse(kind(prediction_type=prediction_type), eps_scaling=BY_LEVEL)
    scheduler.set_timesteps(5)
    expected = [
        np.interp(level_of_call(scheduler, i, t), BY_LEVEL["levels"], BY_LEVEL["values"])
        for i, t in enumerate(scheduler.timesteps)
    ]
    np.testing.assert_allclose(scheduler.lambdas, expected, rtol=2e-6)


def test_a_second_call_s_level_is_not_known_of_a_scheduler_of_one_s_own():
    with pytest.raises(ValueError, match="the sigma of a step's second model call is not known"):
        fused.fuse(OwnHeun(), eps_scaling=BY_LEVEL)


def test_unfuse_keeps_what_was_set_by_attribute():
    scheduler = fused.DDPMScheduler(eps_scaling=1.01)
    scheduler.config.clip_sample = False  # as pipelines set it
    plain = fused.unfuse(scheduler)
    assert plain.config.clip_sample is False and type(plain) is diffusers.DDPMScheduler
