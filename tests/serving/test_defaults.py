"""Another default dtype or device of torch changes nothing: whatever the package makes, it makes as its arguments are."""

import pathlib
import sys

import pytest
import torch

import epskernels
from epskernels import GraphedSampler, samplers, schedule
from epskernels.table import COLUMNS

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

from serving import Batch, Engine, Request  # noqa: E402

LINEAR, SHAPE = schedule.linear(), (2, 5, 3)
FLOATS = ("u", "m1", "m2", "v", "grad", "y")


def network(x, t):
    """In the state's dtype, whatever the default."""
    return torch.sin(x) * (1 + 1e-3 * t.reshape(-1, 1, 1, 1).to(x.dtype))


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    row = dict.fromkeys(COLUMNS, 0.1) | {"clip": 1.5, "g": 2.0, "draw": 3.0, "guided_channels": 1.0, "logvar_min": -1.0}
    rows = torch.tensor([list(row.values())], dtype=torch.float32, device="cpu")
    a = {
        "x": drawn(3, *SHAPE),
        "f": drawn(3, *SHAPE),
        "rows": rows,
        "index": torch.zeros(3, dtype=torch.int64, device="cpu"),
    }
    a |= {name: drawn(3, *SHAPE) for name in FLOATS}
    numbers = torch.tensor([1.5, 1.0, 2.0], dtype=torch.float32, device="cpu")
    return a | {"seeds": epskernels.as_seeds([3, 4, 2**63]), "rescale": numbers, "threshold": numbers}


def step(dtype=torch.float32, **named):
    a = tensors(dtype)
    return epskernels.step(a.pop("x"), a.pop("f"), a.pop("rows"), a.pop("index"), **a, return_y=True, **named)


def gradients():
    a = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors().items()}
    given = [t for t in a.values() if t.is_floating_point()]
    results = epskernels.step(a.pop("x"), a.pop("f"), a.pop("rows"), a.pop("index"), **a, return_y=True)
    return torch.autograd.grad(sum((i + 1) * result.sum() for i, result in enumerate(results)), given)


def served():
    def model(x, t, strength):
        return network(x, t) * strength.to(x.dtype).reshape(-1, 1, 1, 1)

    tables = [samplers.ddim(LINEAR, 4, scaling=1.01), samplers.edm_heun(schedule.KarrasSchedule(model=LINEAR), 3)]
    batch = Batch(model, SHAPE, conditions={"strength": 0.5})
    with Engine(batch) as engine:
        futures = [engine.submit(Request(table, seed, {"strength": 0.25})) for seed, table in enumerate(tables)]
        return [future.result(timeout=60) for future in futures]


@torch.no_grad()
def graphed():
    with pytest.warns(RuntimeWarning, match="runs without a graph"):
        made = GraphedSampler(network, samplers.dpmpp_2m(LINEAR, 5), 2, SHAPE, model_dtype=torch.float32)
    return [made([5, 6])]


def sampled():
    edm = schedule.KarrasSchedule()
    tables = (
        samplers.ddpm(LINEAR, 5),
        samplers.ddim(schedule.FlowSchedule(3.0), 4, prediction="flow"),
        samplers.edm_heun(edm, 3),
        samplers.unipc(LINEAR, 5),
        samplers.dpmpp_3m_sde(LINEAR, 5),
    )
    return [epskernels.sample(network, table, [1, 2], SHAPE) for table in tables]


def table_parts():
    table = epskernels.concat([samplers.ddim(LINEAR, 4, scaling=1.01), samplers.ddpm(LINEAR, 5)])
    scaled = table.scaled_rows(torch.tensor(1.02, dtype=torch.float64, device="cpu"))
    return [table.rows, table.index, *table.row_index, scaled]


CASES = {
    "step": lambda: step(),
    "step, bfloat16": lambda: step(torch.bfloat16),
    "step on the reference": lambda: step(backend="reference"),
    "step on Triton": lambda: step(backend="triton"),
    "gradients": gradients,
    "moments": lambda: [epskernels.moments(*(tensors()[name] for name in ("f", "u", "rows")), 0)],
    "normal": lambda: [epskernels.normal([1, 2], (4,), backend=backend) for backend in ("auto", "reference")],
    "tables": table_parts,
    "sample": sampled,
    "pfgmpp_prior": lambda: [epskernels.pfgmpp_prior([1, 2], SHAPE, 80.0, 128)],
    "GraphedSampler": graphed,
    "serving": served,
}


@pytest.fixture
def default(request):
    if isinstance(request.param, torch.dtype):
        torch.set_default_dtype(request.param)
    else:
        torch.set_default_device(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


EXPECTED = {}


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16, "meta"], ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_the_same_under_another_default(case, default):
    if case == "step on Triton" and (epskernels.build.why_missing("triton") or torch.cuda.is_available()):
        pytest.skip("Triton's interpreter does not run here")
    got = CASES[case]()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    if case not in EXPECTED:
        EXPECTED[case] = CASES[case]()
    for a, b in zip(got, EXPECTED[case], strict=True):
        assert a.device.type == "cpu" and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("default", ["meta"], indirect=True)
def test_what_is_made_on_the_default_device_is_told_apart(default):
    """A program's own tensors lie there, a table on the CPU unless another device is asked for."""
    x, table = torch.ones(2, *SHAPE), samplers.ddim(LINEAR, 4)
    with pytest.raises(
        RuntimeError, match="table: expected one on meta, as x is, got one on cpu: Table.to.device. makes it"
    ):
        epskernels.step(x, x, table, 1)
    assert epskernels.step(x, x, table.to("meta"), 1).is_meta
    with pytest.raises(RuntimeError, match="seeds: expected a tensor on meta, as x is, got one on cpu"):
        epskernels.step(x, x, table.to("meta"), 1, seeds=epskernels.as_seeds([1, 2]))
    with pytest.raises(ValueError, match="model: expected an output on cpu, as x is, got one on meta"):
        epskernels.sample(lambda x, t: torch.zeros(x.shape), table, [1], SHAPE)
