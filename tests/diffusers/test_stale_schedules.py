"""What a fused scheduler sees of its schedule and configuration, however they are changed: diffusers' own is the yardstick.

Every case does the same to diffusers' scheduler and to ours, and compares the steps that follow.
"""

import copy
import logging

import diffusers
import numpy as np
import pytest
import torch

from epskernels import diffusers as fused
from epskernels.diffusers import common
from epskernels.diffusers.plan import SCHEDULES

from ..support.schedulers import ALIKE, CONFIGS, IN_HALVES, OF_ALPHAS, OF_MOTIONS, ONE_SCHEDULE, set_steps, times

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning"),
]
SHAPE = (1, 3, 4, 4)
NAMES = sorted({*ALIKE} - {*ONE_SCHEDULE})
NOT_COUNTED = {
    name for name in NAMES if not hasattr(ALIKE[name], "step_index")
}  # a step is found by its timestep alone
HALVES = (torch.float32, torch.float16, torch.bfloat16)


def made(kind, name, config=None, steps=8):
    scheduler = getattr(kind, name)(**CONFIGS.get(name, {}) | (config or {}))
    if steps:
        set_steps(scheduler, steps)
    return scheduler


@torch.no_grad()
def steps_of(scheduler, change=lambda scheduler: None, count=None, dtypes=(torch.float32,) * 2, **call):
    """The states after each step, `change` done after set_timesteps; or the type of the error that a step raises."""
    draw = torch.Generator().manual_seed(3)
    x, states = 3 * torch.randn(SHAPE, generator=draw).to(dtypes[0]), []
    if "generator" in scheduler.step.__code__.co_varnames:
        call["generator"] = torch.Generator().manual_seed(5)
    change(scheduler)
    for t in times(scheduler)[:count]:
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.scale_model_input(x, t)
        f = torch.randn(SHAPE, generator=draw).to(dtypes[1])
        try:
            x = scheduler.step(f, t, x, return_dict=False, **call)[0]
        except Exception as error:
            return [*states, type(error)]
        states.append(x)
    return states


def assert_same(ours, theirs, tolerance=2e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, type):
            assert a is b
        else:
            size = float(b.nan_to_num().abs().max().clamp(min=1))
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def assert_same_steps(name, config=None, steps=8, **more):
    runs = [steps_of(made(kind, name, config, steps), **more) for kind in (fused, diffusers)]
    assert_same(*runs)
    return runs[0]


# ---- stale plans ----

BY_ATTRIBUTE = [
    ("DDIMScheduler", {}, "clip_sample", False),
    ("DDIMScheduler", {}, "prediction_type", "v_prediction"),
    ("DDIMScheduler", {"clip_sample": False}, "thresholding", True),
    ("DDPMScheduler", {}, "clip_sample", False),
    ("DDPMScheduler", {}, "clip_sample_range", 0.5),
    ("DDPMScheduler", {}, "thresholding", True),
    ("DPMSolverMultistepScheduler", {}, "prediction_type", "sample"),
    ("DPMSolverMultistepScheduler", {}, "solver_order", 1),
    ("DPMSolverMultistepScheduler", {}, "solver_type", "heun"),
    ("DPMSolverMultistepScheduler", {}, "thresholding", True),
    ("EDMEulerScheduler", {}, "prediction_type", "v_prediction"),
    ("EulerAncestralDiscreteScheduler", {}, "prediction_type", "v_prediction"),
    ("EulerDiscreteScheduler", {}, "prediction_type", "v_prediction"),
    ("FlowMatchEulerDiscreteScheduler", {}, "stochastic_sampling", True),
    ("HeunDiscreteScheduler", {}, "clip_sample", True),
    ("LCMScheduler", {}, "timestep_scaling", 1.0),
    ("TCDScheduler", {}, "prediction_type", "sample"),
    ("UniPCMultistepScheduler", {}, "lower_order_final", False),
    ("UniPCMultistepScheduler", {}, "solver_type", "bh1"),
]


@pytest.mark.parametrize(
    "name, config, key, value", BY_ATTRIBUTE, ids=[f"{name}-{key}" for name, _, key, _ in BY_ATTRIBUTE]
)
@pytest.mark.parametrize("when", [0, 2], ids=["before the first step", "after the second"])
def test_a_configuration_key_set_by_attribute(name, config, key, value, when):
    """As StableCascadePriorPipeline does: scheduler.config.clip_sample = False."""

    count = 7 if name == "UniPCMultistepScheduler" else None  # its last step without lower_order_final has no numbers
    runs = []
    for kind in (fused, diffusers):
        scheduler = made(kind, name, config)
        generator = (
            {"generator": torch.Generator().manual_seed(5)}
            if "generator" in scheduler.step.__code__.co_varnames
            else {}
        )
        draw, states = torch.Generator().manual_seed(3), []
        x = 3 * torch.randn(SHAPE, generator=draw)
        for i, t in enumerate(scheduler.timesteps[:count]):
            if i == when:
                setattr(scheduler.config, key, value)
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.randn(SHAPE, generator=draw), t, x, return_dict=False, **generator)[0]
            states.append(x)
        runs.append(states)
    assert scheduler.config[key] != value, "by attribute alone"
    assert_same(*runs)


def test_what_is_set_by_attribute_stays_when_it_is_fused():
    """And when lambda is set, or a pipeline puts a FrozenDict there; what is registered later forgets it, as in diffusers."""
    theirs = made(diffusers, "DDIMScheduler")
    theirs.config.clip_sample = False
    ours = fused.fused(theirs, 1.0)
    assert ours.config.clip_sample is False and fused.unfuse(ours).config.clip_sample is False
    ours.eps_scaling = 1.0
    assert_same(steps_of(ours), steps_of(theirs))
    for scheduler in (theirs, ours):
        scheduler.register_to_config(steps_offset=0)
        assert scheduler.config.clip_sample is True
    assert_same(steps_of(ours), steps_of(theirs))
    plain = diffusers.DDIMScheduler().config
    plain.clip_sample = False
    for scheduler in (theirs, ours):
        scheduler._internal_dict = type(plain)(plain | {"eps_scaling": 1.0, "clip_sample_range": 2.0})
    assert_same(steps_of(ours), steps_of(theirs))


WAYS = {
    "in place": lambda tensor: tensor.mul_(0.9),
    ".data in place": lambda tensor: tensor.data.mul_(0.9),
    ".numpy()": lambda tensor: tensor.numpy().__imul__(0.9),
    ".data assigned": lambda tensor: setattr(tensor, "data", tensor * 0.9),
    "one element": lambda tensor: tensor.data[2].mul_(0.9),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stepped", [False, True], ids=["", "after a step"])
def test_numbers_written_in_any_way_are_seen(name, way, stepped):
    """sigmas, or alphas_cumprod where the step reads those."""

    def change(scheduler):
        if stepped:
            torch.manual_seed(9)
            scheduler.step(torch.ones(SHAPE), scheduler.timesteps[0], torch.ones(SHAPE), return_dict=False)
            set_steps(scheduler, 8)
        of_alphas = name.startswith(OF_ALPHAS)
        numbers = "alphas_cumprod" if of_alphas else "betas" if name == "IPNDMScheduler" else "sigmas"
        tensor = getattr(scheduler, numbers, scheduler.timesteps)
        before = tensor.clone()
        WAYS[way](tensor)
        assert not torch.equal(tensor, before)

    ours = assert_same_steps(name, change=change)
    assert not torch.equal(ours[3], steps_of(made(fused, name))[3]) or way == "one element"


def test_timesteps_written_past_their_version_are_seen():
    for name in ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler"):
        assert_same_steps(name, change=lambda scheduler: scheduler.timesteps.numpy().__isub__(3), count=7)


@pytest.mark.parametrize("attribute, value", [("disable_corrector", [0, 1, 2]), ("predict_x0", False)])
def test_unipc_s_own_attributes_are_seen(attribute, value):
    assert_same_steps("UniPCMultistepScheduler", change=lambda scheduler: setattr(scheduler, attribute, value), count=7)


def test_a_list_written_into_is_seen():
    scheduler = made(fused, "UniPCMultistepScheduler", {"disable_corrector": [1]})
    other = made(diffusers, "UniPCMultistepScheduler", {"disable_corrector": [1]})
    for one in (scheduler, other):
        one.disable_corrector.append(2)
    assert_same(steps_of(scheduler), steps_of(other))
    lambdas = made(fused, "DDIMScheduler", {"eps_scaling": [1.01] * 8})
    lambdas.config.eps_scaling[2] = 1.5
    assert lambdas.lambdas[2] == 1.5


# ---- identity by address ----


OTHER_WAYS = ("FlowMapEulerDiscreteScheduler", "HeliosScheduler")  # takes the first of any number; looks at none


OTHER_WAYS = ("FlowMapEulerDiscreteScheduler", "HeliosScheduler")  # takes the first of any number; looks at none


@pytest.mark.parametrize("name", NAMES)
def test_two_timesteps_are_not_one(name):
    """A view that begins at a timestep's address is that timestep only where it has one element of its dtype."""
    for kind in (diffusers, fused) if name not in OTHER_WAYS else ():
        scheduler = made(kind, name)
        if name not in NOT_COUNTED:
            scheduler._step_index = None
        x = torch.ones(SHAPE)
        if name in ("LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler", "HeliosScheduler") and kind is diffusers:
            continue  # these look at it where no begin index is given, and may broadcast it
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            scheduler.step(x, scheduler.timesteps[3:5], x)
    scheduler = made(fused, name)
    scheduler._plan(scheduler._options, torch.device("cpu"))
    assert scheduler._seen.place(scheduler.timesteps[3]) == 3
    timesteps = scheduler.timesteps
    for other in (timesteps[3:5], timesteps[3:3], timesteps.view(torch.int16)[3 * timesteps.element_size() // 2 :][:1]):
        assert other.data_ptr() == timesteps[3].data_ptr() or not other.numel()
        assert scheduler._seen.place(other) is None, other


# ---- bounds, and what is shared ----


def test_restored_and_copied_schedulers_share_a_plan():
    """As panorama pipelines do with __dict__, and requests with set_timesteps."""
    scheduler = made(fused, "DDIMScheduler", {"eps_scaling": 1.01})
    device = torch.device("cpu")
    plan = scheduler._plan(scheduler._options, device)
    others = [copy.deepcopy(scheduler), made(fused, "DDIMScheduler", {"eps_scaling": 1.01})]
    restored = made(fused, "DDIMScheduler", {"eps_scaling": 1.02})
    restored.__dict__.update(copy.deepcopy(scheduler.__dict__))
    for other in (*others, restored):
        assert other._plan(other._options, device) is plan
    others[0].config.prediction_type = "sample"
    assert others[0]._plan(others[0]._options, device) is not plan


def test_what_is_kept_is_bounded():
    scheduler = made(fused, "DDIMScheduler")
    x = torch.ones(SHAPE)
    for i in range(100):
        scheduler.step(x, scheduler.timesteps[0], x, eta=i / 100)
    assert len(scheduler._seen.schedule.plans.entries) == scheduler._seen.schedule.plans.most
    for steps in range(1, 100):
        scheduler.set_timesteps(steps)
    assert len(SCHEDULES.entries) == SCHEDULES.most


def test_a_plan_made_in_inference_mode_serves_calls_with_gradients():
    with torch.inference_mode():
        scheduler = made(fused, "DDPMScheduler", {"num_train_timesteps": 77})
        scheduler.step(torch.ones(SHAPE), scheduler.timesteps[1], torch.ones(SHAPE))
    plan = scheduler._plan(scheduler._options, torch.device("cpu"))
    assert not plan.table.is_inference() and not plan.rows[0].index.is_inference()


# ---- timesteps cut off, as older img2img code does ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("begin", [None, 0, 2, "cut"])
@pytest.mark.parametrize("config", [{}, {"solver_order": 3}], ids=["", "order 3"])
def test_timesteps_cut_off(name, cut, begin, config):
    if config and "solver_order" not in made(diffusers, name).config:
        pytest.skip("it has no order")
    if name.startswith(IN_HALVES) and cut % 2 and begin != 0:
        pytest.skip("a second half of a step without its first is refused")

    def change(scheduler):
        scheduler.timesteps = scheduler.timesteps[cut:]
        if begin is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(cut if begin == "cut" else begin)

    runs = [steps_of(made(kind, name, config, 12), change=change) for kind in (fused, diffusers)]
    if isinstance(runs[1][-1], type):  # what diffusers cannot do raises here too, and not later
        assert isinstance(runs[0][-1], type) and len(runs[0]) <= len(runs[1])
        runs = [run[: len(runs[0]) - 1] for run in runs]
    assert_same(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_lambda_of_timesteps_cut_off_is_that_of_their_step(name):
    lambdas = [1 + i / 100 for i in range(8)]
    scheduler = made(fused, name, {"eps_scaling": [1.0, *lambdas[1:]]})
    whole = scheduler.lambdas
    scheduler.timesteps = scheduler.timesteps[3 if name == "PNDMScheduler" else 6 :]
    if name == "PNDMScheduler":  # four calls a step, three of them between its timestep and the next
        assert scheduler.lambdas == whole[1:]
        return
    kept = whole[:2] if "Inverse" in name else whole[6:]
    assert scheduler.lambdas == (kept if name.startswith((*OF_ALPHAS, "SCM")) else whole)
    assert whole[1:] == tuple(lambdas[1:])


# ---- the ends of a schedule ----


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_as_many_steps_as_there_are_with_an_offset(name):
    """t = 1000 is beyond the schedule, in diffusers too; all other steps run."""
    runs = []
    for kind in (fused, diffusers):
        scheduler, x, states = (
            made(kind, name, {"steps_offset": 1, "timestep_spacing": "leading"}, 1000),
            torch.ones(SHAPE),
            [],
        )
        with pytest.raises(IndexError):
            scheduler.step(x, scheduler.timesteps[0], x)
        for t in scheduler.timesteps[[1, 2, 500, 997, 998, 999]]:
            x = scheduler.step(0.3 * x, t, x, generator=torch.Generator().manual_seed(2), return_dict=False)[0]
            states.append(x)
        runs.append(states)
    assert_same(*runs)


def test_noise_added_to_the_last_of_a_thousand_steps():
    """Near t = 0, one minus a quotient of float32 has few digits; lambda 1 promises diffusers' numbers."""
    for name, call in (("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0}), ("TCDScheduler", {"eta": 1.0})):
        runs = []
        for kind in (fused, diffusers):
            scheduler, x = (
                made(kind, name, {"clip_sample": False}, 1000 if name != "TCDScheduler" else 50),
                torch.ones(SHAPE),
            )
            states, draw = [], torch.Generator().manual_seed(4)
            if name == "TCDScheduler":
                scheduler.set_begin_index(47)
            for t in scheduler.timesteps[-3:]:
                x = scheduler.step(0.3 * x.sin(), t, x, generator=draw, return_dict=False, **call)[0]
                states.append(x)
            runs.append(states)
        assert_same(*runs, tolerance=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_of_eps_ends_at_x_0(order, solver_type):
    """Its last step to sigma 0 is 0*inf, which has a limit: diffusers' own of a sigma of almost 0."""
    runs = []
    for kind in (fused, diffusers):
        scheduler = made(
            kind, "UniPCMultistepScheduler", {"predict_x0": False, "solver_order": order, "solver_type": solver_type}
        )
        if kind is diffusers:
            scheduler.sigmas[-1] = 1e-6
        runs.append(steps_of(scheduler))
    assert_same(*runs)


@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_refuses_a_last_step_without_a_limit_before_the_model_is_called(order, predict_x0):
    scheduler = fused.UniPCMultistepScheduler(lower_order_final=False, solver_order=order, predict_x0=predict_x0)
    if order == 1:
        scheduler.set_timesteps(5)
        assert all(state.isfinite().all() for state in steps_of(scheduler))
        return
    with pytest.raises(
        ValueError, match="set_timesteps: expected a last step that has a limit, .* lower_order_final=True"
    ):
        scheduler.set_timesteps(5)


# ---- dtypes ----

PREDICTIONS_THAT_ARE_NONE = {
    ("PNDMScheduler", "sample"),
    ("SCMScheduler", "sample"), ("SCMScheduler", "v_prediction"),
    ("CosineDPMSolverMultistepScheduler", "sample"),
    ("EDMEulerScheduler", "sample"), ("EDMDPMSolverMultistepScheduler", "sample"), ("EulerAncestralDiscreteScheduler", "sample"),
    ("UnCLIPScheduler", "v_prediction"), ("KDPM2DiscreteScheduler", "sample"), ("KDPM2AncestralDiscreteScheduler", "sample"),
    ("DPMSolverSDEScheduler", "sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of_x", HALVES, ids=str)
@pytest.mark.parametrize("of_f", HALVES, ids=str)
def test_the_state_has_diffusers_dtype(name, of_x, of_f):
    algorithm = "noise_prediction" if name == "SASolverScheduler" else "sde-dpmsolver++"
    configs = [{}, {"solver_order": 3}, {"algorithm_type": algorithm}, {"stochastic_sampling": True}]
    configs += [{"prediction_type": kind} for kind in ("sample", "v_prediction")]
    if name == "DPMSolverMultistepScheduler":
        configs += [{"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}]
    known = made(diffusers, name).config
    for config in configs:
        if name.startswith("DEIS") and "algorithm_type" in config:
            continue  # it has one
        if not set(config) <= set(known) or (name, config.get("prediction_type")) in PREDICTIONS_THAT_ARE_NONE:
            continue
        if (
            name == "CosineDPMSolverMultistepScheduler" and config.get("solver_order") == 3
        ):  # of which diffusers has none
            continue
        ours, theirs = (steps_of(made(kind, name, config), dtypes=(of_x, of_f)) for kind in (fused, diffusers))
        until = next((i for i, state in enumerate(theirs) if isinstance(state, type)), len(theirs))  # where it cannot
        assert [state.dtype for state in ours][:until] == [state.dtype for state in theirs[:until]]
        assert until >= 2 and not any(isinstance(state, type) for state in ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_default_dtype_changes_nothing(name, dtype):
    runs = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            scheduler = made(fused, name, {"eps_scaling": 1.01})
            torch.set_default_dtype(torch.float32)
            draw = torch.Generator().manual_seed(3)
            x, f = torch.randn(2, *SHAPE, generator=draw)
            torch.set_default_dtype(default)
            call = {"generator": draw} if "generator" in scheduler.step.__code__.co_varnames else {}
            per_token = {}
            if name == "FlowMatchEulerDiscreteScheduler":
                x, f, per_token = x[0], f[0], {"per_token_timesteps": torch.full((3, 4), 500.0, dtype=torch.float32)}
            halves = name.startswith(("KDPM2", "DPMSolverSDE"))
            first = 0 if name == "PNDMScheduler" else 2 if halves else 1  # the first half of a step
            t = scheduler.timesteps[first]
            runs.append(scheduler.step(f, t, x, return_dict=False, **call, **per_token)[0])
            assert scheduler.path == "fused"
        finally:
            torch.set_default_dtype(torch.float32)
    assert runs[0].dtype == runs[1].dtype
    if dtype is torch.float64 and name not in OF_MOTIONS:  # in half precision diffusers' own schedules are others
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)


# ---- levels of tokens ----


@pytest.mark.parametrize("shape", [(2, 6), (2, 1), (1, 6), (6,), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_levels_of_tokens_broadcast(shape, stochastic):
    """As LTXConditionPipeline without an image passes (B, 1)."""
    x, f, levels = torch.randn(2, 6, 4), torch.randn(2, 6, 4), 1000 * torch.rand(shape)
    found = []
    for kind in (fused, diffusers):
        scheduler = made(kind, "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": stochastic})
        call = {"generator": torch.Generator().manual_seed(2), "per_token_timesteps": levels}
        found.append(scheduler.step(f, scheduler.timesteps[3], x, return_dict=False, **call)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# ---- what is said ----


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler"])
def test_a_forgotten_scale_model_input_is_said(name, caplog):
    common.say_of.cache_clear()
    scheduler, x = made(fused, name), torch.ones(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert "expects scale_model_input to be called" in caplog.text
    caplog.clear()
    common.say_of.cache_clear()
    scheduler = made(fused, name)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x)
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler",
             "UniPCMultistepScheduler"],
)  # fmt: skip
def test_a_step_before_set_timesteps(name):
    scheduler, x = made(fused, name, steps=None), torch.ones(SHAPE)
    with pytest.raises(ValueError, match="^set_timesteps: expected a call of it before step"):
        scheduler.step(x, scheduler.timesteps[0], x)


# With an end that is no fault, or none.
ENDLESS = {"LCMScheduler", "TCDScheduler", "FlowMapEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_COUNTED - ENDLESS))
def test_one_call_too_many(name):
    scheduler = made(fused, name)
    n, x = len(times(scheduler)), torch.ones(SHAPE)
    assert not isinstance(steps_of(scheduler)[-1], type)
    with pytest.raises(IndexError, match=f"^step: expected at most {n} calls after set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.scale_model_input(x, scheduler.timesteps[-1])  # at the last sigma, as in diffusers
        scheduler._step_index += 1
        with pytest.raises(IndexError, match=f"^scale_model_input: expected a step below {n + 1}"):
            scheduler.scale_model_input(x, scheduler.timesteps[-1])


# ---- thresholds of large samples ----


@pytest.mark.parametrize(
    "shape", [(1, 3, 17), (2, 1, 1), pytest.param((1, 1, 2**12, 2**12 + 1), marks=pytest.mark.deep)], ids=str
)
def test_thresholds_of_samples_of_any_size(shape):
    """torch.quantile takes 2^24 elements; its float32 position is exact for small samples."""
    x, f = torch.randn(2, *shape)
    scheduler = made(fused, "DDPMScheduler", {"thresholding": True, "sample_max_value": 10.0})
    _, x0 = scheduler.step(f, scheduler.timesteps[2], x, return_dict=False)
    assert scheduler.path == "fused"
    config = scheduler.config
    abar = scheduler.alphas_cumprod[scheduler.timesteps[2]].double()
    free = ((x.double() - (1 - abar).sqrt() * f.double()) / abar.sqrt()).flatten(1)
    s = torch.stack([row.abs().sort().values for row in free])
    at = config.dynamic_thresholding_ratio * (s.shape[1] - 1)
    low, high = s[:, int(at)], s[:, min(int(at) + 1, s.shape[1] - 1)]
    bound = (low + (at - int(at)) * (high - low)).clamp(1, 10)[:, None]
    expected = (free.clamp(-bound, bound) / bound).float().reshape(shape)
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_logged_of_a_usual_run(caplog):
    with caplog.at_level(logging.WARNING):
        for name in NAMES:
            steps_of(made(fused, name))
    assert not [record for record in caplog.records if record.name == "epskernels"]


def test_lambda_is_given_for_timesteps_of_which_there_are_fewer_than_sigmas():
    """diffusers leaves out equal timesteps, and not their sigmas."""
    given = np.linspace(0.9, 1.1, 999)
    scheduler = fused.DPMSolverMultistepInverseScheduler(eps_scaling=given.tolist())
    scheduler.set_timesteps(1000)
    assert len(scheduler.timesteps) == 999 and len(scheduler.sigmas) == 1001
    np.testing.assert_allclose(scheduler.lambdas[-999:], given)
    x = torch.randn(2, 3, 4, 4)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert scheduler.path == "fused"


def test_a_fork_has_no_seeds_of_its_own():
    scheduler = fused.DDPMScheduler()
    scheduler.seeds = [3, 4]
    assert scheduler.fork().seeds is None and scheduler.seeds.tolist() == [3, 4]


@pytest.mark.parametrize("name", ALIKE)
def test_set_timesteps_does_not_say_that_lambda_is_ignored(name, monkeypatch):
    """As diffusers does where it makes another scheduler of a configuration."""
    said = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", lambda *args: said.append(args))
    scheduler = getattr(fused, name)(**CONFIGS.get(name, {}), eps_scaling=1.01)
    set_steps(scheduler, 2 if "Decoder" in name else 4)
    assert not [args for args in said if "eps_scaling" in str(args)]
    assert scheduler.eps_scaling == 1.01


def test_churn_that_would_come_after_the_scaling_is_refused():
    """diffusers' own step, here for float64, adds churn to x, of which the scaled output already has a share."""
    scheduler = fused.EulerDiscreteScheduler(prediction_type="v_prediction", eps_scaling=1.01)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="eps_scaling: diffusers' own step adds churn after the scaling"):
        scheduler.step(x, scheduler.timesteps[0], x, s_churn=1.0)


@pytest.mark.parametrize("name", ["HeunDiscrete", "FlowMatchHeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_a_trajectory_does_not_begin_at_the_second_half_of_a_step(name):
    scheduler = getattr(fused, f"{name}Scheduler")()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    x = torch.randn(2, 3, 4, 4)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[1])
    with pytest.raises(ValueError, match="begins at the second half of a step|expected the first half of a step first"):
        scheduler.step(x, scheduler.timesteps[1], x)
