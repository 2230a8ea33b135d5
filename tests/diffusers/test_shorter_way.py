"""The quick way of the fused schedulers' plain steps beside the general one: where it is taken, and that nothing tells.

Every case runs twice, with `_plain` and with a `_plain` that always leaves the call to the others. Results and errors, path,
position, and what was drawn from every generator must be the same.
"""

import contextlib
import logging

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


# What runs: (configuration, scheduler -> results), of DDPM and of the flow; then for each of its steps whether it is plain.
TAKEN = {
    "plain": lambda s: go(s),
    "bfloat16": lambda s: go(s, **to(BF16)),
    "float16": lambda s: go(s, **to(torch.float16)),
    "gradients enabled": lambda s: torch.enable_grad()(go)(s),
    "channels last": lambda s: go(s, **dict.fromkeys("xf", lambda a: a.to(memory_format=CHANNELS_LAST))),
    "a fork": lambda s: go(s.fork()),
    "a generator": lambda s: with_generator(s, *seeded(1)),
    "generators": lambda s: with_generator(s, seeded(2)),
    "its own seeds": lambda s: with_attributes(s, seeds=[3, 4]),
    "its own seeds, a generator": lambda s: with_attributes(s, lambda s: with_generator(s, *seeded(1)), seeds=[3, 4]),
}
LEFT = {
    "float64": lambda s: go(s, **to(torch.float64)),
    "f of another dtype": lambda s: go(s, f=lambda f: f.to(BF16)),
    "x of another dtype": lambda s: go(s, x=lambda x: x.to(BF16)),
    "x of a subclass": lambda s: go(s, x=lambda x: x.as_subclass(Subclass)),
    "f of a subclass": lambda s: go(s, f=lambda f: f.as_subclass(Subclass)),
    "x of another device": lambda s: go(s, **dict.fromkeys("xf", lambda a: a.to("meta"))),
    "f of another device alone": lambda s: go(s, x=lambda x: x.to("meta")),
    "an array": lambda s: go(s, x=lambda x: x.numpy()),
    "an output in an array": lambda s: go(s, f=lambda f: f.numpy()),
    "gradient of x": lambda s: gradient(s, "x"),
    "gradient of f": lambda s: gradient(s, "f"),
    "seeds": lambda s: go(s, seeds=[3, 4]),
    "seeds of another length": lambda s: go(s, seeds=[3]),
    "a timestep as a number": lambda s: go(s, t=lambda t: t.item()),
    "timesteps set by hand": lambda s: with_attributes(s, timesteps=s.timesteps.clone()),
    "sigmas set by hand": lambda s: with_attributes(s, sigmas=torch.linspace(0.9, 0, 5)),
}
CASES = {
    **{f"DDPM, {name}": (DDPM, {}, run, [True]) for name, run in TAKEN.items()},
    **{f"DDPM, {name}": (DDPM, {}, run, [False]) for name, run in LEFT.items()},
    **{f"flow, {name}": (FLOW, {}, run, [True]) for name, run in TAKEN.items()},
    **{f"flow, {name}": (FLOW, {}, run, [False]) for name, run in LEFT.items()},
    **{
        f"stochastic flow, {name}": (FLOW, {"stochastic_sampling": True}, run, [name not in ("bfloat16", "float16")])
        for name, run in TAKEN.items()
    },
    "DDPM, seeds and a generator": (DDPM, {}, lambda s: go(s, seeds=[3, 4], generator=torch.Generator()), [False]),
    "DDPM, no generator": (DDPM, {}, lambda s: go(s, generator=5), [None]),
    "DDPM, its own seeds of another length": (DDPM, {}, lambda s: with_attributes(s, seeds=[3]), [None]),
    "DDPM, its own seeds on another device": (
        DDPM, {}, lambda s: with_attributes(s, _seeds=torch.zeros(2, dtype=torch.int64, device="meta")), [False]
    ),
    "DDPM, shapes": (DDPM, {}, lambda s: go(s, f=lambda f: f[:1]), [None]),
    "DDPM, the last step": (DDPM, {}, lambda s: with_generator(s, *seeded(1), i=3), [True]),
    "DDPM, a timestep copied": (DDPM, {}, lambda s: go(s, t=lambda t: t.clone()), [False]),
    "DDPM, a timestep sliced": (DDPM, {}, lambda s: go(s, t=lambda t: t[None]), [True]),
    "DDPM, no timestep": (DDPM, {}, lambda s: go(s, t=lambda t: s.timesteps[1:1]), [False]),
    "DDPM, thresholding": (DDPM, {"thresholding": True}, go, [False]),
    "DDPM, a row without numbers": (DDPM, {"variance_type": "fixed_large_log"}, go, [False]),
    "DDPM, after diffusers' own step": (DDPM, {}, lambda s: twice(s, LEFT["float64"]), [False, True]),
    "DDPM, after another device": (DDPM, {}, lambda s: twice(s, LEFT["x of another device"]), [False, False]),
    "DDPM, set again": (DDPM, {}, lambda s: (*go(s), s.set_timesteps(5), *go(s))[-2:], [True, True]),
    "flow, a row without numbers": (
        FLOW, {}, lambda s: twice(s, lambda s: with_attributes(s, sigmas=torch.tensor([1, 0.7, np.nan, 0.2, 0]))), [False, False],
    ),
    "flow, an integer": (FLOW, {}, lambda s: go(s, t=lambda t: t.long()), [False]),
    "flow, its last step and one more": (FLOW, {}, lambda s: [go(s, i) for i in (0, 1, 2, 3, 3)], [True] * 4 + [False]),
    "flow, begun by hand": (FLOW, {}, lambda s: (s.set_begin_index(2), *go(s, 2))[1:], [True]),
    "flow, levels of tokens": (
        FLOW, {}, lambda s: go(s, **dict.fromkeys("xf", lambda a: a[0]), per_token_timesteps=torch.full((3, 5), 500.0)), [],
    ),
    "stochastic flow, noise that is not used": (
        FLOW, {"stochastic_sampling": True}, lambda s: (s.set_begin_index(3), *with_generator(s, *seeded(1), i=3))[1:], [False],
    ),
}  # fmt: skip
CASES |= {
    f"DDPM, {kind}{', of half the channels' * half}": (
        DDPM, {"variance_type": kind},
        lambda s, half=half, i=i: go(s, i, f=lambda f: f if half else torch.cat([f, f.tanh()], 1)), [],
    )
    for kind, half, i in (("learned", False, 1), ("learned_range", False, 1), ("learned_range", False, 3), ("learned", True, 1))
}  # fmt: skip


def observed(kind, config, run, monkeypatch, quick):
    """What there is to see of a run, and for each step whether it was plain (None: it raised)."""
    taken, plain = [], kind._plain

    def watched(self, *args):
        taken.append(None)
        made = plain(self, *args) if quick else None
        taken[-1] = made is not None
        return made

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(kind, "_plain", watched)
        scheduler = made(kind, config)
        torch.manual_seed(9)
        try:
            results = list(run(scheduler))
        except Exception as error:
            results = [(type(error), str(error))]
    left = torch.randn(3)
    told = scheduler.path, scheduler._ran, getattr(scheduler, "_step_index", None)
    return [*results, left, told], taken


def same(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor):
        return a == b
    alike = type(a) is type(b) and a.dtype == b.dtype and a.stride() == b.stride() and a.device == b.device
    return alike and (a.device.type == "meta" or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


@pytest.mark.parametrize("case", CASES)
def test_nothing_tells_the_quick_way(case, monkeypatch):
    kind, config, run, expected = CASES[case]
    seen, taken = observed(kind, config, run, monkeypatch, quick=True)
    other, _ = observed(kind, config, run, monkeypatch, quick=False)
    assert taken == expected
    assert len(seen) == len(other)
    for a, b in zip(seen, other, strict=True):
        assert same(a, b), (a, b)


def test_a_scheduler_that_was_not_set_makes_its_plan_first():
    scheduler, other = made(DDPM, steps=0), made(DDPM, steps=0)
    assert scheduler._seen is None
    other._plain = lambda *args: None
    assert torch.equal(go(scheduler, 900)[1], go(other, 900)[1])


READS_MORE = ("c_m1", "c_m2", "k_m1", "k_m2", "c_y", "k_y", "logvar_min", "logvar_max")


@pytest.mark.parametrize("draws", [False, True], ids=["", "draws"])
@pytest.mark.parametrize("name", [*READS_MORE, "churn_std", "c_noise", "c_x", "d_f", "k_x", "k_m0"])
@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_plain_row_reads_x_f_and_the_noise_that_is_drawn(name, value, draws):
    plan = Plan({"t": np.zeros(2), name: np.array([0.0, value])}, draws, np.ones(2), np.zeros(2), torch.device("cpu"))
    alone = value == 0.5 and name not in (*READS_MORE, "churn_std") and draws == (name == "c_noise")
    assert plan.plain == (None if draws else plan.index[0], plan.index[1] if alone else None)


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
def test_the_ops_of_a_plain_step():
    x = torch.ones(SHAPE)
    for kind, names in ((FLOW, ["epskernels.step_plain"]), (DDPM, ["aten.randn_like", "epskernels.step_m0"])):
        scheduler = made(kind)
        t = scheduler.timesteps[1]
        with Ops() as seen:
            scheduler.step(x, t, x, return_dict=False)
        assert seen.names == [f"{name}.default" for name in names]


@pytest.mark.parametrize("kind", [DDPM, FLOW])
@pytest.mark.parametrize("why", ["context", "log"])
def test_a_plain_step_runs_where_it_is_asked_to(kind, why, caplog, monkeypatch):
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
def test_a_plain_step_compiles():
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
