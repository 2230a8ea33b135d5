"""The public functions inside torch.compile: no graph break, the same bits, one op per model call, nothing compiled twice."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

import epskernels
from epskernels import samplers, schedule

pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = {
    "ddpm": samplers.ddpm(schedule.linear(), 5, scaling=1.01),
    "learned": samplers.ddpm(schedule.linear(), 5, scaling=1.01, variance="learned_range"),
    "dpmpp_2m": samplers.dpmpp_2m(schedule.linear(), 5, scaling=1.01),
    "edm_heun": samplers.edm_heun(schedule.KarrasSchedule(), 4, scaling=1.01, S_churn=2),
    "guided": samplers.ddim(schedule.linear(), 5, scaling=1.01, guidance=2.0),
}
TABLE = TABLES["ddpm"]


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def generated(function, *arguments):
    """What Inductor makes of a call: the result, and the body of its one function."""
    result, sources = run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    (source,) = sources
    return result, source[source.index("def call(") : source.index("runner = Runner")]


def test_step_and_normal_compile_without_graph_break():
    def run(f, seeds):
        x = epskernels.normal(seeds, (3, 5))
        x, m0 = epskernels.step(x, f, TABLE, 1, seeds=seeds, return_m0=True)
        return torch.ops.epskernels.step(x, f, TABLE.rows, TABLE.index[:2], seeds=seeds) + m0

    f, seeds = torch.randn(2, 3, 5), torch.tensor([7, 8])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(f, seeds), run(f, seeds))


# ---- whole loops ----


def model(x, table, i):
    """A stand-in with what the table asks of a model."""
    f = torch.tanh(x) * 0.5
    more = {"u": f * 0.3} if table.guided else {}
    return f, more | ({"v": torch.sin(x)} if table.learned_variance else {})


def loop(table, seeds, shape, index=None):
    """All of a table's rows, by Python's numbers, or by a tensor that advances in the graph."""
    x, m1 = table.initial_sigma * epskernels.normal(seeds, shape), None
    for i in range(len(table)):
        f, more = model(x, table, i)
        m1 = torch.zeros_like(x) if m1 is None else m1
        x, m1 = epskernels.step(x, f, table, i if index is None else index, m1=m1, seeds=seeds, **more, return_m0=True)
        index = None if index is None else index + 1
    return x


@pytest.mark.parametrize("by_tensor", [False, True], ids=["by_number", "by_tensor"])
@pytest.mark.parametrize("name", TABLES)
def test_a_whole_loop_is_one_graph(name, by_tensor):
    table, seeds = TABLES[name], torch.tensor([7, 8])
    traits = {"guided": table.guided, "learned_variance": table.learned_variance}

    class Traits:  # Dynamo does not trace a table's NumPy columns
        rows, index, row_index, initial_sigma = table.rows, table.index, table.row_index, table.initial_sigma

    counter = CompileCounter()
    index = torch.tensor(0) if by_tensor else None
    got = torch.compile(loop, backend=counter, fullgraph=True)(table, seeds, (3, 5), index)
    assert torch.equal(got, loop(table, seeds, (3, 5)))
    assert counter.frame_count == 1
