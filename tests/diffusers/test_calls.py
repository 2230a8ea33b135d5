"""Steps called in many ways, beside diffusers' own: tensors, timesteps, generators, what was set by hand.

Results, position and what was drawn from every generator must be diffusers'; the path is what the table says.
"""

import contextlib
import copy
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import epskernels
from epskernels import diffusers as fused
from epskernels.diffusers import common
from epskernels.diffusers.plan import Plan
from epskernels.ops import backends

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array_:DeprecationWarning"),
]
SHAPE = (2, 3, 5, 7)
DDPM, FLOW = fused.DDPMScheduler, fused.FlowMatchEulerDiscreteScheduler
BF16, CHANNELS_LAST = torch.bfloat16, torch.channels_last


class Subclass(torch.Tensor):
    pass


def made(kind, config=None, steps=4):
    scheduler = kind(**(config or {}))
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler


def go(scheduler, i=1, x=lambda x: x, f=lambda f: f, t=lambda t: t, **call):
    """One step: of x, f and the timestep as these functions change them."""
    draw = torch.Generator().manual_seed(3)
    tensors = torch.randn(2, *SHAPE, generator=draw)
    return scheduler.step(f(tensors[1]), t(scheduler.timesteps[i]), x(tensors[0]), return_dict=False, **call)


def with_generator(scheduler, generators, **more):
    return *go(scheduler, generator=generators, **more), *(
        torch.randn(2, generator=g) for g in (generators if isinstance(generators, list) else [generators])
    )


def seeded(n):
    return [torch.Generator().manual_seed(k) for k in range(n)]


def with_attributes(scheduler, call=go, **attributes):
    for name, value in attributes.items():
        setattr(scheduler, name, value)
    return call(scheduler)


def twice(scheduler, first, **more):
    return *first(scheduler), *go(scheduler, 2, **more)


def gradient(scheduler, name):
    with torch.enable_grad():
        leaf = torch.ones(SHAPE, requires_grad=True)
        result = go(scheduler, **{name: lambda value: value * leaf})[0]
        return result.detach(), *torch.autograd.grad(result.sum(), leaf)


def to(dtype):
    return {"x": lambda x: x.to(dtype), "f": lambda f: f.to(dtype)}


FUSED = {
    "as it comes": lambda s: go(s),
    "bfloat16": lambda s: go(s, **to(BF16)),
    "float16": lambda s: go(s, **to(torch.float16)),
    "gradients enabled": lambda s: torch.enable_grad()(go)(s),
    "channels last": lambda s: go(s, **dict.fromkeys("xf", lambda a: a.to(memory_format=CHANNELS_LAST))),
    "a copy": lambda s: go(copy.deepcopy(s)),
    "a generator": lambda s: with_generator(s, *seeded(1)),
    "generators": lambda s: with_generator(s, seeded(2)),
    "f of another dtype": lambda s: go(s, f=lambda f: f.to(BF16)),
    "x of another dtype": lambda s: go(s, x=lambda x: x.to(BF16)),
    "x of a subclass": lambda s: go(s, x=lambda x: x.as_subclass(Subclass)),
    "f of a subclass": lambda s: go(s, f=lambda f: f.as_subclass(Subclass)),
    "x of another device": lambda s: go(s, **dict.fromkeys("xf", lambda a: a.to("meta"))),
    "timesteps set by hand": lambda s: with_attributes(s, timesteps=s.timesteps.clone()),
    "sigmas set by hand": lambda s: with_attributes(s, sigmas=torch.linspace(0.9, 0, 5)),
}
OWN = {
    "float64": ("of dtypes torch.float64", lambda s: go(s, **to(torch.float64))),
    "gradient of x": ("gradients are asked for", lambda s: gradient(s, "x")),
    "gradient of f": ("gradients are asked for", lambda s: gradient(s, "f")),
}
STOCHASTIC = {"stochastic_sampling": True}
# (the scheduler, its configuration, what is run, and the path of its last step).
CASES = {
    **{f"DDPM, {name}": (DDPM, {}, run, "fused") for name, run in FUSED.items()},
    **{f"flow, {name}": (FLOW, {}, run, "fused") for name, run in FUSED.items()},
    **{f"stochastic flow, {name}": (FLOW, STOCHASTIC, run, "fused") for name, run in FUSED.items()},
    **{
        f"{title}, {name}": (kind, config, run, f"diffusers: {why}")
        for name, (why, run) in OWN.items()
        for title, kind, config in (("DDPM", DDPM, {}), ("flow", FLOW, {}), ("stochastic flow", FLOW, STOCHASTIC))
    },
    "DDPM, a generator where seeds are set": (
        DDPM, {}, lambda s: with_attributes(s, lambda s: with_generator(s, *seeded(1)), seeds=[3, 4]), "fused",
    ),
    "DDPM, the last step": (DDPM, {}, lambda s: with_generator(s, *seeded(1), i=3), "fused"),
    "DDPM, a timestep copied": (DDPM, {}, lambda s: go(s, t=lambda t: t.clone()), "fused"),
    "DDPM, a timestep sliced": (DDPM, {}, lambda s: go(s, t=lambda t: t[None]), "fused"),
    "DDPM, a timestep as a number": (DDPM, {}, lambda s: go(s, t=lambda t: t.item()), "fused"),
    "DDPM, thresholding": (DDPM, {"thresholding": True}, go, "fused"),
    "DDPM, a row without numbers": (
        DDPM, {"variance_type": "fixed_large_log"}, go, "diffusers: the coefficients of step 1 are not finite",
    ),
    "DDPM, after diffusers' own step": (DDPM, {}, lambda s: twice(s, OWN["float64"][1]), "fused"),
    "DDPM, after another device": (DDPM, {}, lambda s: twice(s, FUSED["x of another device"]), "fused"),
    "DDPM, set again": (DDPM, {}, lambda s: (*go(s), s.set_timesteps(5), *go(s))[-2:], "fused"),
    "DDPM, variance_type changed": (
        DDPM, {}, lambda s: with_attributes(s, variance_type="fixed_large"), "diffusers: variance_type is not",
    ),
    "flow, a row without numbers": (
        FLOW, {}, lambda s: twice(s, lambda s: with_attributes(s, sigmas=torch.tensor([1, 0.7, np.nan, 0.2, 0]))),
        "diffusers: the coefficients of step 2 are not finite",
    ),
    "flow, its last step": (FLOW, {}, lambda s: [go(s, i)[0] for i in (0, 1, 2, 3)], "fused"),
    "flow, begun by hand": (FLOW, {}, lambda s: (s.set_begin_index(2), *go(s, 2))[1:], "fused"),
    "flow, levels of tokens": (
        FLOW, {}, lambda s: go(s, **dict.fromkeys("xf", lambda a: a[0]), per_token_timesteps=torch.full((3, 5), 500.0)),
        "fused",
    ),
    "stochastic flow, noise that is not used": (
        FLOW, STOCHASTIC, lambda s: (s.set_begin_index(3), *with_generator(s, *seeded(1), i=3))[1:], "fused",
    ),
}  # fmt: skip
CASES |= {
    f"DDPM, {kind}{', of half the channels' * half}, step {i}": (
        DDPM, {"variance_type": kind},
        lambda s, half=half, i=i: go(s, i, f=lambda f: f if half else torch.cat([f, f.tanh()], 1)), "fused",
    )
    for kind, half, i in (("learned", False, 1), ("learned_range", False, 1), ("learned_range", False, 3))
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_call_gives_what_diffusers_gives(case):
    kind, config, run, path = CASES[case]
    seen = []
    for of in (kind, getattr(diffusers, kind.__name__)):
        scheduler = made(of, config)
        torch.manual_seed(9)
        with torch.no_grad():
            results = list(run(scheduler))
        seen.append((results, torch.randn(3), getattr(scheduler, "step_index", None)))
        if of is kind and "a copy" not in case:
            assert scheduler.path.startswith(path)
    (ours, drawn, index), (theirs, their_draw, their_index) = seen
    assert torch.equal(drawn, their_draw) and index == their_index and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.device == b.device and a.shape == b.shape
        if "another dtype" not in case:  # there diffusers' dtypes follow the order of its operations
            assert a.dtype is b.dtype
        if a.device.type == "cpu":
            bound = 0.02 if "float16" in case or "another dtype" in case else 1e-5
            torch.testing.assert_close(a, b.to(a.dtype), equal_nan=True, rtol=bound, atol=bound)


REFUSED = {
    "x as an array": (DDPM, lambda s: go(s, x=lambda x: x.numpy()), TypeError, "unsupported operand"),
    "f on another device": (
        DDPM, lambda s: go(s, f=lambda f: f.to("meta")), ValueError, "^model_output: .* on cpu as sample is, got one on meta$",
    ),
    "f of another batch": (DDPM, lambda s: go(s, f=lambda f: f[:1]), ValueError, r"^model_output: expected shape \(2, "),
    "no generator": (DDPM, lambda s: go(s, generator=5), AttributeError, "device"),
    "no timestep": (DDPM, lambda s: go(s, t=lambda t: s.timesteps[1:1]), RuntimeError, "size of tensor"),
    "seeds of another length": (DDPM, lambda s: go(s, seeds=[3]), RuntimeError, "seeds: expected"),
    "its own seeds of another length": (
        DDPM, lambda s: with_attributes(s, seeds=[3]), RuntimeError, "seeds: expected",
    ),
    "seeds and a generator": (
        DDPM, lambda s: go(s, seeds=[3, 4], generator=torch.Generator()), ValueError, "generator, seeds: expected one of them",
    ),
    "an integer": (FLOW, lambda s: go(s, t=lambda t: t.long()), ValueError, "timestep: expected one of"),
    "one step more": (FLOW, lambda s: [go(s, i) for i in (0, 1, 2, 3, 3)], IndexError, "expected at most 4 calls"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_a_call_that_is_refused(case):
    kind, run, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(made(kind))


def test_a_fork_steps_as_its_scheduler():
    for kind in (DDPM, FLOW):
        results = []
        for scheduler in (made(kind), made(kind).fork()):
            torch.manual_seed(1)
            results.append(go(scheduler))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_a_scheduler_s_seeds_move_with_the_sample():
    scheduler = made(DDPM)
    scheduler.seeds = [3, 4]
    go(scheduler, **dict.fromkeys("xf", lambda a: a.to("meta")))
    assert scheduler.seeds.device.type == "meta"


def test_a_row_knows_what_its_step_needs():
    """Of the second row each; the first has no coefficients."""
    knows = {
        "c_noise": {"uses_noise": True}, "c_m1": {"history": 1}, "k_m1": {"history": 1}, "c_m2": {"history": 2},
        "k_m2": {"history": 2}, "churn_std": {"uses_noise": True, "churn_std": 0.5}, "d_x": {"d_x": 0.5}, "t": {"t": 0.5},
    }  # fmt: skip
    for name, expected in knows.items():
        for draws in (False, True):
            columns = {"t": np.zeros(2)} | {name: np.array([0.0, 0.5])}
            plan = Plan(columns, draws, np.array([1.0, 1.25]), np.array([0.0, 0.75]), torch.device("cpu"))
            first, second = plan.rows
            assert (first.step, second.step, second.index.item()) == (0, 1, 1) and first.draws is second.draws is draws
            assert (first.history, first.uses_noise, first.why, first.lambda_t) == (0, False, None, 1.0)
            assert {key: getattr(second, key) for key in expected} == expected
            assert (second.lambda_t, second.to_x, second.why) == (1.25, 0.75, None)


@pytest.mark.parametrize("name", ["c_x", "d_f", "k_m0", "c_noise"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_row_that_is_not_finite_says_so(name, value):
    columns = {"t": np.zeros(4), name: np.array([0.0, 0.5, value, 0.5])}
    plan = Plan(columns, False, np.ones(2), np.zeros(2), torch.device("cpu"))
    assert [row.why for row in plan.rows] == [None, None, "the coefficients of step 0 are not finite", None]
    assert [row.uses_noise for row in plan.rows] == [False, name == "c_noise", False, name == "c_noise"]
    assert not plan.table[2].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "expanded"])
@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "a generator"])
@pytest.mark.parametrize("dtype, to", [(torch.float32, torch.float32), (BF16, BF16), (BF16, torch.float32)], ids=str)
def test_noise_is_what_diffusers_draws(layout, own, dtype, to):
    change = {
        "contiguous": lambda f: f, "channels last": lambda f: f.to(memory_format=CHANNELS_LAST),
        "transposed": lambda f: f.transpose(1, 3), "expanded": lambda f: f[:, :, :1].expand(SHAPE),
    }[layout]  # fmt: skip
    f, drawn = change(torch.ones(SHAPE, dtype=dtype)), []
    for draw in (lambda g: common.draw_noise(f, g, to), lambda g: randn_tensor(f.shape, g, f.device, to)):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own else None
        drawn.append((draw(generator), torch.randn(3, generator=generator)))
    for a, b in zip(*drawn, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_ops_of_a_step():
    x = torch.ones(SHAPE)
    for kind, names in ((FLOW, ["epskernels.step_plain"]), (DDPM, ["aten.randn_like", "epskernels.step_m0"])):
        scheduler = made(kind)
        t = scheduler.timesteps[1]
        with Ops() as seen:
            scheduler.step(x, t, x, return_dict=False)
        assert seen.names == [f"{name}.default" for name in names]


@pytest.mark.parametrize("kind", [DDPM, FLOW])
@pytest.mark.parametrize("why", ["context", "log"])
def test_a_step_runs_where_it_is_asked_to(kind, why, caplog, monkeypatch):
    expected, ran = go(made(kind), generator=torch.Generator().manual_seed(1)), []

    def counted(run):
        return lambda *inputs: ran.append(1) or run(*inputs)

    reference = backends.REFERENCE_FUNCTIONS
    reference = reference._replace(step=counted(reference.step), step_m0=counted(reference.step_m0))
    monkeypatch.setattr(backends, "REFERENCE_FUNCTIONS", reference)
    with contextlib.nullcontext() if why == "log" else epskernels.use_backend("reference"):
        with caplog.at_level(logging.DEBUG if why == "log" else logging.WARNING, "epskernels"):
            got = go(made(kind), generator=torch.Generator().manual_seed(1))
    assert ran == [1] if why == "context" else "step on cpu runs on" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_step_compiles():
    """The flow's without a break; DDPM's with one, at the address of its timestep. In graphs there is no step_plain."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    for kind in (FLOW, DDPM):
        eager, scheduler = made(kind), made(kind)
        for one in (eager, scheduler):
            if kind is FLOW:
                one.set_begin_index(1)
                one._init_step_index(None)
        step = torch.compile(scheduler.step, backend=backend, fullgraph=kind is FLOW)
        x = torch.randn(SHAPE)
        torch.manual_seed(2)
        got = step(x, scheduler.timesteps[1], x, return_dict=False)
        torch.manual_seed(2)
        for a, b in zip(got, eager.step(x, eager.timesteps[1], x, return_dict=False), strict=True):
            assert torch.equal(a, b)
        assert scheduler.path == "fused"
    assert "epskernels.step.default" in graphs[0] and not any("step_plain" in code for code in graphs)


@pytest.mark.parametrize("i", [0, -1], ids=["first", "last"])
def test_the_results_are_diffusers_own_objects(i):
    for kind, names in ((DDPM, ["prev_sample", "pred_original_sample"]), (FLOW, ["prev_sample"])):
        scheduler = made(kind)
        x = torch.ones(SHAPE)
        result = scheduler.step(x, scheduler.timesteps[i], x)
        assert type(result).__name__ == f"{kind.__name__}Output" and list(result) == names
        assert all(value.shape == x.shape for value in result.values())


def test_a_column_that_no_row_has_is_refused():
    with pytest.raises(ValueError, match=r"columns: unknown \['c_z'\]"):
        Plan({"c_x": np.ones(2), "c_z": 1.0}, False, np.ones(2), np.zeros(2), torch.device("cpu"))
