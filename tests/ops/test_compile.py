"""The public functions inside torch.compile: no graph break, the same bits, one op per model call, nothing compiled twice."""

import collections
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import epskernels
from epskernels import samplers, schedule

from ..support import markdown_examples

pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = {
    "ddpm": samplers.ddpm(schedule.linear(), 5, scaling=1.01),
    "learned": samplers.ddpm(schedule.linear(), 5, scaling=1.01, variance="learned_range"),
    "dpmpp_2m": samplers.dpmpp_2m(schedule.linear(), 5, scaling=1.01),
    "edm_heun": samplers.edm_heun(schedule.KarrasSchedule(), 4, scaling=1.01, S_churn=2),
    "guided": samplers.ddim(schedule.linear(), 5, scaling=1.01, guidance=2.0),
    "band": samplers.ddpm(
        schedule.linear(), 5, scaling=1.01, correction=epskernels.corrections.dcw(-0.1, 0.05, dims=1)
    ),
}
TABLE = TABLES["ddpm"]
INDEX = torch.tensor(2)


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def generated(function, *arguments, **options):
    """What a call returns under Inductor, and the body of its one generated function."""
    result, sources = run_and_get_code(torch.compile(function, fullgraph=True, **options), *arguments)
    (source,) = sources
    return result, source[source.index("def call(") : source.index("runner = Runner")]


def calls_in(body):
    """How often the generated function calls each kernel of Inductor's and each op; an op that copies is among them."""
    names = [
        line.split("(")[0].split("=")[-1].strip() for line in body.splitlines() if "(" in line and "assert" not in line
    ]
    kept = ("cpp_fused", "torch.ops.", "aten.", "extern_kernels.", "copy_", "clone")
    return collections.Counter(name for name in names if any(part in name for part in kept))


def model(x, i):
    return torch.tanh(x) * 0.5


def tensors(*shape):
    return torch.randn(shape), torch.randn(shape), torch.arange(shape[0])


def test_step_and_normal_compile_without_graph_break():
    def run(f, seeds):
        x = epskernels.normal(seeds, (3, 5))
        x, m0 = epskernels.step(x, f, TABLE, 1, seeds=seeds, return_m0=True)
        return torch.ops.epskernels.step(x, f, TABLE.rows, TABLE.index[:2], seeds=seeds) + m0

    f, seeds = torch.randn(2, 3, 5), torch.tensor([7, 8])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(f, seeds), run(f, seeds))


# ---- what a call may vary without being compiled again ----


def test_no_recompilation_for_another_row_seed_or_table():
    """The row by a tensor, by a row for each sample, or by a number; lambda by another table, or by its rows."""
    counter = CompileCounter()
    compiled = torch.compile(epskernels.step, backend=counter, fullgraph=True)
    x, f, _ = tensors(2, 3, 5)
    others = [samplers.ddpm(schedule.linear(), 5, scaling=scale) for scale in (1.0, 1.005, 0.99)]
    for index in (TABLE.row_index, TABLE.index, torch.tensor([[1, 2], [3, 0]]).unbind()):
        counter.clear()
        for i in index:
            for table in (TABLE, *others):
                seeds = torch.randint(2**62, (2,))
                assert torch.equal(compiled(x, f, table, i, seeds=seeds), epskernels.step(x, f, table, i, seeds=seeds))
                rows = table.rows
                assert torch.equal(compiled(x, f, rows, i, seeds=seeds), epskernels.step(x, f, rows, i, seeds=seeds))
        assert counter.frame_count <= 2  # one for tables, one for rows; the second index needs none of its own
        torch._dynamo.reset()


def test_a_row_by_number_is_compiled_once_more_at_most():
    """Dynamo compiles for the first number that it sees, and for all numbers when it sees a second one."""
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, f, i: epskernels.step(x, f, TABLE, i, seeds=seeds), backend=counter, fullgraph=True
    )
    x, f, seeds = tensors(2, 3, 5)
    for i in range(len(TABLE)):
        assert torch.equal(compiled(x, f, i), epskernels.step(x, f, TABLE, i, seeds=seeds))
    assert counter.frame_count == 2


def test_sums_over_samples_are_not_compiled_for_each_row():
    def run(x, f, u, i):
        rescale = epskernels.guidance_rescale(f, u, table, i)
        threshold = epskernels.dynamic_threshold(x, f, table, i, u=u, rescale=rescale, sample_max_value=2.0)
        return epskernels.step(x, f, table, i, u=u, rescale=rescale, threshold=threshold)

    table, counter = samplers.ddim(schedule.linear(), 5, guidance=3.0), CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    x, f, _ = tensors(2, 3, 5)
    for i in (*range(5), *table.row_index):
        assert torch.equal(compiled(x, f, x, i), run(x, f, x, i))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("names", [("seeds",), ("u", "m1", "m2", "v", "grad", "noise")], ids=["seeds", "all"])
@pytest.mark.parametrize("dynamic, compilations", [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
def test_another_batch_or_resolution_is_not_compiled_again(dynamic, compilations, names):
    def run(x, f, index, more):
        latent = epskernels.normal(torch.arange(x.shape[0], device=x.device), x.shape[1:])
        return epskernels.step(x + latent, f, TABLE.rows, index, **more, return_m0=True)

    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 8, 9), (3, 3, 10, 11), (5, 3, 12, 16), (4, 3, 8, 8), (7, 3, 17, 6)):
        x, f, seeds = tensors(*shape)
        more = {name: seeds if name == "seeds" else torch.randn(shape) for name in names}
        index = seeds % len(TABLE)
        for got, expected in zip(compiled(x, f, index, more), run(x, f, index, more), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == compilations


def test_dynamic_shapes_by_inductor():
    def run(x, f, index, seeds):
        return epskernels.step(x * 2, f, TABLE.rows, index, seeds=seeds, return_m0=True)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 8, 9), (5, 3, 10, 11)):
        x, f, seeds = tensors(*shape)
        for got, expected in zip(compiled(x, f, INDEX, seeds), run(x, f, INDEX, seeds), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


# ---- whole loops ----


def loop(start, table, seeds, further, index=None):
    """All of a table's rows, by Python's numbers, or by a tensor that advances in the graph."""
    x = m1 = m2 = start
    for i in range(len(table)):
        f = torch.tanh(x) * 0.5
        more = {name: torch.sin(f + x) for name in further}
        row = i if index is None else index
        x, m0 = epskernels.step(x, f, table, row, m1=m1, m2=m2, seeds=seeds, **more, return_m0=True)
        m1, m2 = m0, m1
        index = None if index is None else index + 1
    return x


@pytest.mark.parametrize("by_tensor", [False, True], ids=["by_number", "by_tensor"])
@pytest.mark.parametrize("name", TABLES)
def test_a_whole_loop_is_one_graph(name, by_tensor):
    table, seeds = TABLES[name], torch.tensor([7, 8])
    further = [key for key, on in (("u", table.guided), ("v", table.learned_variance)) if on]
    arguments = epskernels.normal(seeds, (3, 5)), table, seeds, further, torch.tensor(0) if by_tensor else None
    graphs = []

    def backend(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if "epskernels" in str(node.target)])
        return graph.forward

    got = torch.compile(loop, backend=backend, fullgraph=True)(*arguments)
    assert torch.equal(got, loop(*arguments))
    assert [len(nodes) for nodes in graphs] == [len(table)]


def test_a_compiled_model_and_step_is_compiled_once_for_all_rows():
    """The usual loop: the row's index goes in as a tensor."""

    @functools.partial(torch.compile, backend=(counter := CompileCounter()), fullgraph=True)
    def model_and_step(x, index, seeds):
        return epskernels.step(x, model(x, index), TABLE, index, seeds=seeds)

    seeds = torch.tensor([7, 8])
    x = expected = epskernels.normal(seeds, (3, 5))
    for index in TABLE.row_index:
        x = model_and_step(x, index, seeds)
        expected = epskernels.step(expected, model(expected, index), TABLE, index, seeds=seeds)
    assert torch.equal(x, expected) and counter.frame_count == 1


@pytest.mark.parametrize("name", TABLES)
def test_sample_is_one_graph(name):
    """The package's own loop, model and all; other seeds take the same graph."""
    table, counter = TABLES[name], CompileCounter()

    def model(x, t):
        f = torch.tanh(x + t.reshape(-1, 1, 1) * 1e-3) * 0.5
        f = torch.cat([f, torch.sin(f)], 1) if table.learned_variance else f
        return (f, f * 0.3) if table.guided else f

    def run(seeds):
        return epskernels.sample(model, table, seeds, (3, 5))

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for seeds in (torch.tensor([7, 8]), torch.tensor([-1, 2**62])):
        assert torch.equal(compiled(seeds), run(seeds))
    assert counter.frame_count == 1


# ---- what Inductor makes of it ----


def test_one_op_per_model_call():
    """The sampler's side of a compiled model and step: one call, beside the model's own kernel; the profiler sees no other."""

    def run(x, seeds, index):
        return epskernels.step(x, torch.tanh(x) * 0.5, TABLE, index, seeds=seeds)

    x, _, seeds = tensors(2, 3, 8, 8)
    result, body = generated(run, x, seeds, INDEX)
    torch.testing.assert_close(result, run(x, seeds, INDEX))
    called = calls_in(body)
    assert called.pop("torch.ops.epskernels.step.default") == 1
    assert list(called.values()) == [1] and "tanh" in next(iter(called))  # the model's
    compiled = torch.compile(run, fullgraph=True)
    compiled(x, seeds, INDEX)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for index in TABLE.row_index:
            x = compiled(x, seeds, index)
    ran = collections.Counter(event.name for event in profile.events() if "::" in event.name)
    assert ran == {"epskernels::step": len(TABLE)}


IN_PLACE = {
    "out": lambda x, f, m1, index, seeds: epskernels.step(x, f, TABLE, index, seeds=seeds, out=x),
    "out_and_m0": lambda x, f, m1, index, seeds: epskernels.step(x, f, TABLE, index, m1=m1, seeds=seeds, out=x, m0=m1),
    "op": lambda x, f, m1, index, seeds: torch.ops.epskernels.step_(x, f, TABLE.rows, index, m1, seeds=seeds, m0=m1),
    "buffer": lambda x, f, m1, index, seeds: epskernels.step(x, f, TABLE, index, seeds=seeds, out=m1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_in_place_is_not_copied(name):
    """The generated code is the op, on the tensors given; no buffer, no clone, no copy."""
    x, f, seeds = tensors(2, 3, 8, 8)
    m1, eager = torch.randn(2, 3, 8, 8), [x.clone()]
    eager.append(m1.clone())
    IN_PLACE[name](eager[0], f, eager[1], INDEX, seeds)
    places = x.data_ptr(), m1.data_ptr()
    _, body = generated(lambda *arguments: [IN_PLACE[name](*arguments)][:0], x, f, m1, INDEX, seeds)
    assert torch.equal(x, eager[0]) and torch.equal(m1, eager[1]) and places == (x.data_ptr(), m1.data_ptr())
    op = "step_" if name == "op" else "step_out"
    assert calls_in(body) == {f"torch.ops.epskernels.{op}.default": 1}, body
    assert "empty_strided" not in body


def test_a_loop_in_place_needs_no_buffers():
    """A whole trajectory in a tensor of the graph's own: one, for all rows."""

    def run(seeds, f):
        x = epskernels.normal(seeds, (3, 5))
        for i in range(len(TABLE)):
            torch.ops.epskernels.step_(x, f, TABLE.rows, TABLE.index[i], seeds=seeds)
        return x

    _, f, seeds = tensors(2, 3, 5)
    got, body = generated(run, seeds, f)
    assert torch.equal(got, run(seeds, f))
    expected = {"torch.ops.epskernels.normal.default": 1, "torch.ops.epskernels.step_.default": len(TABLE)}
    assert calls_in(body) == expected and "empty_strided" not in body, body


def test_in_place_step_is_functionalised():
    def run(x, f):
        y = x * 1
        torch.ops.epskernels.step_(y, f, TABLE.rows, TABLE.row_index[1], seeds=seeds)
        return y

    x, f, seeds = tensors(2, 3, 5)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x, f), run(x, f))


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channel_half": lambda t: torch.cat([t, t], 1)[:, 4:],
    "transposed": lambda t: t.transpose(2, 3),
    "expanded": lambda t: t[:1].expand_as(t),
    "every_other": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_laid_out_as_in_eager_mode(layout):
    """Inductor believes the fake kernels: one that says other strides than the kernel's makes it read the wrong elements."""

    def run(x, f, seeds):
        x, m0 = epskernels.step(x, f, TABLE, 2, seeds=seeds, return_m0=True)
        return x, m0, x * 2 + m0

    x, f, seeds = tensors(2, 4, 6, 5)
    x, f = LAYOUTS[layout](x), LAYOUTS[layout](f)
    got, _ = generated(run, x, f, seeds)
    for result, expected in zip(got, run(x, f, seeds), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        assert result.stride() == expected.stride()


def test_reduce_overhead():
    """On the CPU it is the default mode; with CUDA graphs it is in test_gpu.py."""
    compiled = torch.compile(lambda x, i: epskernels.step(x, x * 0.5, TABLE, i, seeds=seeds), mode="reduce-overhead")
    _, _, seeds = tensors(2, 3, 5)
    x = expected = epskernels.normal(seeds, (3, 5))
    for index in TABLE.row_index:
        x = compiled(x, index)
        expected = epskernels.step(expected, expected * 0.5, TABLE, index, seeds=seeds)
    assert torch.equal(x, expected)


def test_the_page_on_production_use(tmp_path):
    markdown_examples.run("docs/production_compile.md", tmp_path)
