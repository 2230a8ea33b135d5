"""What only a GPU can show: streams, graphs, no waiting, several devices, more than 2^31 elements. The bits of the whole matrix
are in test_step_bits.py, test_noise.py and test_rows_on_device.py, which run on the GPU's kernels too where there is one."""

import itertools
import subprocess

import pytest
import torch

import epskernels
from epskernels import _C, samplers, schedule, time_shift
from epskernels.ops import DTYPES
from epskernels.spec import COLUMNS, band_dims_of

from ..ops.test_export import OUTPUTS, Normal, Step, dynamic_shapes, misread, packaged, packaged_normal, step_inputs
from ..ops.test_rows_on_device import wide
from ..ops.test_step_bits import assert_same_bits, make_inputs, name, random_rows, reference
from ..support import kernels, markdown_examples

pytestmark = pytest.mark.skipif(not kernels.ON_GPU, reason="there is no GPU")
NAMES = ("u", "m1", "m2", "v", "grad", "seeds")
each_backend = pytest.mark.parametrize("backend", kernels.GPU_KERNELS)


def on_gpu(values, device="cuda"):
    return {key: value.to(device) for key, value in values.items()}


def step(backend, rows, index, inputs, **kwargs):
    inputs = dict(inputs)
    return epskernels.step(inputs.pop("x"), inputs.pop("f"), rows, index, **inputs, **kwargs, backend=backend)


def test_both_kernels_are_here():
    """gpu-check asks for both; a machine without nvcc, or without triton, says which and why."""
    missing = {backend: epskernels.build.why_missing(backend) for backend in ("cuda", "triton")}
    assert not any(missing.values()), missing


@each_backend
def test_out_of_memory(backend):
    """torch's own error; before 2.13 it does not tell a library which one it was."""
    x, rows = torch.ones(1, 1, device="cuda").expand(1, 2**45), random_rows(1, (), 1).cuda()
    told = backend != "cuda" or torch.__version__ >= (2, 13)
    with pytest.raises(torch.OutOfMemoryError if told else RuntimeError, match="out of memory|could not allocate"):
        epskernels.step(x, x, rows, 0, backend=backend)


# ---- every compiled kernel, small and large ----

SETS = [tuple(itertools.compress(("u", "m1", "seeds"), chosen)) for chosen in itertools.product((0, 1), repeat=3)]


@pytest.mark.parametrize("names", [*SETS, NAMES], ids=lambda names: "-".join(names) or "bare")
@pytest.mark.parametrize("f_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_all_backends_agree(x_dtype, f_dtype, names):
    """CUDA = Triton = CPU = reference, with tails, and in tensors that take the kernels for large ones."""
    for shape in ((2, 1027), (3, 2**19 + 8)):
        inputs = make_inputs(shape, names, 1, x_dtype, f_dtype)
        rows, index = random_rows(4, names, 2, idle=0), torch.arange(shape[0])
        expected = reference(rows, index, inputs)
        for backend in ("cpu", *kernels.GPU_KERNELS):
            there = on_gpu(inputs) if backend != "cpu" else inputs
            device = there["x"].device
            got = step(backend, rows.to(device), index.to(device), there, return_m0=True)
            for result, wanted, what in zip(got, expected, ("x'", "m0"), strict=True):
                assert_same_bits(result.cpu(), wanted, f"{what} of {backend}, {shape}")


BAND_SHAPES = ((2, 3, 64), (3, 2, 7, 5), (3, 4, 64, 64), (2, 2, 3, 9, 24), (2, 3, 255, 264), (1, 3, 2049, 514))


@pytest.mark.parametrize(
    "names", [(), ("seeds",), ("u", "m1", "seeds"), NAMES], ids=lambda names: "-".join(names) or "bare"
)
@pytest.mark.parametrize("f_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_all_backends_agree_by_band(x_dtype, f_dtype, names):
    for shape in BAND_SHAPES:
        inputs = make_inputs(shape, names, 1, x_dtype, f_dtype)
        rows, index = wide(random_rows(4, names, 2, idle=0), band_dims_of(len(shape)), 3), torch.arange(shape[0])
        expected = reference(rows, index, inputs)
        for backend in ("cpu", *kernels.GPU_KERNELS):
            there = on_gpu(inputs) if backend != "cpu" else inputs | {"x": inputs["x"].clone()}
            device = there["x"].device
            got = step(backend, rows.to(device), index.to(device), there, return_m0=True, out=there["x"])
            for result, wanted, what in zip(got, expected, ("x'", "m0"), strict=True):
                assert_same_bits(result.cpu(), wanted, f"{what} of {backend}, {shape}")


@each_backend
def test_every_square_root_that_noise_takes(backend):
    """2^28 normals against the CPU's: the device's root has a shortcut of its own."""
    for seed in range(16):
        got = epskernels.normal([seed], (2**24,), device="cuda", backend=backend)
        assert torch.equal(got.cpu(), epskernels.normal([seed], (2**24,)))


# ---- streams, graphs, waiting ----


@each_backend
def test_runs_on_the_current_stream(backend):
    inputs = on_gpu(make_inputs((2, 100_000), ("seeds",), 3))
    rows, index = random_rows(2, ("seeds",), 4, idle=0).cuda(), torch.arange(2).cuda()
    expected = step(backend, rows, index, inputs)
    late = torch.empty_like(inputs["x"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the step must wait for what follows, on this stream
        late.copy_(inputs["x"])
        got = step(backend, rows, index, inputs | {"x": late})
        latent = epskernels.normal(inputs["seeds"], (1000,), backend=backend)
    assert not stream.query(), "the host waited"
    stream.synchronize()
    assert_same_bits(got.cpu(), expected.cpu(), "x'")
    assert torch.equal(latent.cpu(), epskernels.normal(inputs["seeds"].cpu(), (1000,)))


@each_backend
def test_never_waits_for_the_device(backend):
    inputs = on_gpu(make_inputs((2, 1000), NAMES, 5))
    rows, index = random_rows(2, NAMES, 6, idle=0).cuda(), torch.arange(2).cuda()
    moments = kernels.overload(backend, "moments")
    step(backend, rows, index, inputs)  # compiles, and loads
    moments(inputs["f"], inputs["u"], rows, index)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(backend, rows, index, inputs, return_m0=True)
        epskernels.normal(inputs["seeds"], (77,), backend=backend)
        moments(inputs["f"], inputs["u"], rows, index)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_time_shift_chooses_without_waiting_for_the_device():
    """The row that the CPU takes, from the same bits of the variance."""
    table = time_shift.ShiftedTable(samplers.ddim, schedule.linear(), 7, window=30)
    x = epskernels.normal(range(64), (3, 9, 7)) * torch.linspace(0.8, 1.1, 64).reshape(-1, 1, 1, 1)
    there, at = table.to("cuda"), x.cuda()
    calls = [1, *(torch.tensor(i) for i in (1, [i % 7 for i in range(64)]))]
    on_device = [i.cuda() if isinstance(i, torch.Tensor) else i for i in calls]
    there.choose(1, at)  # loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [there.choose(i, at) for i in on_device]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(time_shift.variance(at).cpu(), time_shift.variance(x))
    for i, (index, t) in zip(calls, got, strict=True):
        assert all(torch.equal(*pair) for pair in zip((index.cpu(), t.cpu()), table.choose(i, x), strict=True))


@each_backend
def test_takes_no_memory_but_its_outputs(backend):
    inputs = on_gpu(make_inputs((2, 1000), NAMES, 7))
    rows, index = random_rows(2, NAMES, 8, idle=0).cuda(), torch.arange(2).cuda()
    out, m0 = torch.empty_like(inputs["x"]), torch.empty_like(inputs["x"])
    step(backend, rows, index, inputs, out=out, m0=m0)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step(backend, rows, index, inputs, out=out, m0=m0)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@each_backend
@pytest.mark.parametrize("size", [1001, 2**20 + 1])
def test_moments_in_a_graph_on_another_stream(backend, size):
    moments, rows = kernels.overload(backend, "moments"), random_rows(3, ("u",), 1, idle=0)
    f, u, index = torch.zeros(2, size).cuda(), torch.zeros(2, size).cuda(), torch.zeros(2, dtype=torch.int64).cuda()
    there, stream = rows.cuda(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moments(f, u, there, index)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = moments(f, u, there, index)
    for _ in range(3):
        fresh, which = torch.randn(2, 2, size), torch.randint(3, (2,))
        for static, value in ((f, fresh[0]), (u, fresh[1]), (index, which)):
            static.copy_(value)
        graph.replay()
        assert torch.equal(sums.cpu(), epskernels.moments(*fresh, rows, which))


@each_backend
def test_rescaled_and_thresholded_in_a_graph(backend):
    """Factor, threshold and step, with rows by number, as a captured loop has them."""
    table, here = samplers.ddim(schedule.linear(), 20, guidance=7.5), torch.randn(3, 2, 3, 67, 5)
    there, (x, f, u) = table.to("cuda"), here.cuda()

    def run(x, f, u, table, i, backend=None):
        rescale = epskernels.guidance_rescale(f, u, table, i, backend=backend)
        threshold = epskernels.dynamic_threshold(
            x, f, table, i, u=u, rescale=rescale, sample_max_value=2.0, backend=backend
        )
        return epskernels.step(x, f, table, i, u=u, rescale=rescale, threshold=threshold, backend=backend)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(x, f, u, there, 0, backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [run(x, f, u, there, i, backend) for i in (3, 7)]
    graph.replay()
    for i, result in zip((3, 7), got, strict=True):
        assert_same_bits(result.cpu(), run(*here, table, i), f"row {i}")


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_graph_replay_with_changed_inputs(backend, dtype):
    batch = 3
    rows = random_rows(7, NAMES, 9, idle=0)
    static = on_gpu(make_inputs((batch, 1001), NAMES, 10, dtype, dtype))
    static_rows, index = rows.cuda(), torch.zeros(batch, dtype=torch.int64, device="cuda")
    out, m0 = torch.empty_like(static["x"]), torch.empty_like(static["x"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(backend, static_rows, index, static, out=out, m0=m0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(backend, static_rows, index, static, out=out, m0=m0)
    for seed in range(4):
        fresh = make_inputs((batch, 1001), NAMES, 20 + seed, dtype, dtype)
        fresh_rows, which = random_rows(7, NAMES, 30 + seed, idle=0.2), torch.tensor([seed, 6 - seed, 3])
        for key, value in fresh.items():
            static[key].copy_(value)
        static_rows.copy_(fresh_rows)
        index.copy_(which)
        graph.replay()
        expected = reference(fresh_rows, which, fresh)
        assert_same_bits(out.cpu(), expected[0], "x'")
        assert_same_bits(m0.cpu(), expected[1], "m0")


@each_backend
def test_a_captured_step_replays_a_whole_trajectory(backend):
    """One graph for all rows: the index advances on the device."""
    table = samplers.ddpm(schedule.linear(), 20, scaling=1.01).to("cuda")
    seeds = torch.arange(3, device="cuda")
    x = epskernels.normal(seeds, (3, 9, 9), backend=backend)
    start, index = x.clone(), torch.zeros((), dtype=torch.int64, device="cuda")

    def advance():
        epskernels.step(x, 0.1 * x, table.rows, index, seeds=seeds, out=x, backend=backend)
        index.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        advance()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    x.copy_(start)
    index.zero_()
    for _ in range(len(table)):
        graph.replay()
    on_cpu = table.to("cpu")
    expected = start.cpu()
    for i in range(len(table)):
        expected = epskernels.step(expected, (0.1 * expected.cuda()).cpu(), on_cpu, i, seeds=seeds.cpu())
    assert_same_bits(x.cpu(), expected, "x")


@each_backend
def test_compiled_graphs(backend):
    inputs = on_gpu(make_inputs((2, 1003), ("u", "seeds"), 11))
    rows, index = random_rows(2, ("u", "seeds"), 12, idle=0).cuda(), torch.arange(2).cuda()

    def doubled(x, f, rows, index, u, seeds):
        return epskernels.step(x + x, f, rows, index, u=u, seeds=seeds, backend=None if backend == "cuda" else backend)

    torch._dynamo.reset()
    got = torch.compile(doubled, fullgraph=True)(rows=rows, index=index, **inputs)
    expected = doubled(rows=rows, index=index, **inputs)
    assert_same_bits(got.cpu(), expected.cpu(), "x'")


# ---- GraphedSampler ----

GRAPHED = {
    "ddpm": lambda: samplers.ddpm(schedule.linear(), 7, scaling=1.01),
    "edm_heun": lambda: samplers.edm_heun(schedule.KarrasSchedule(), 5, S_churn=10),
    "dpmpp_2m": lambda: samplers.dpmpp_2m(schedule.linear(), 7, scaling=1.005),
    "ddim, time shift": lambda: time_shift.ShiftedTable(samplers.ddim, schedule.linear(), 7, window=30, scaling=1.005),
}


def halved(x, t):
    """A model whose bits do not depend on the device: x is halved, and every other timestep shifts it."""
    return 0.5 * x + 0.25 * (t.reshape(-1, 1, 1, 1) > 500).to(x.dtype)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("sampler", GRAPHED)
def test_graphed_sampler(sampler, dtype, whole):
    table = GRAPHED[sampler]()
    made = epskernels.GraphedSampler(halved, table, 2, (3, 9, 9), dtype=dtype, whole=whole, device="cuda")
    assert made.graphed and made.why_not is None
    for seeds in ([5, 6], [7, 2**64 - 1]):
        expected = epskernels.sample(lambda x, t: halved(x.to(dtype), t), table, seeds, (3, 9, 9), dtype=dtype)
        assert_same_bits(made(seeds).cpu(), expected, "samples")


def test_graphed_sampler_of_a_doubled_batch():
    table = samplers.edm_euler(schedule.KarrasSchedule(), 5, guidance=3.0)

    def doubled(x, t):
        return torch.cat([0.125 * x[:2], 0.5 * x[2:]])

    made = epskernels.GraphedSampler(
        doubled, table, 2, (3, 9, 9), model_dtype=torch.bfloat16, doubled=True, device="cuda"
    )
    pair = lambda x, t: (0.5 * x.to(torch.bfloat16), 0.125 * x.to(torch.bfloat16))  # noqa: E731
    assert_same_bits(made([3, 4]).cpu(), epskernels.sample(pair, table, [3, 4], (3, 9, 9)), "samples")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
def test_graphed_sampler_on_two_streams(whole):
    """The second call is made long before the first is done, and must not write into it."""

    def slow(x, t):
        torch.cuda._sleep(20_000_000)
        return halved(x, t)

    table, shape = samplers.ddpm(schedule.linear(), 7), (3, 64, 64)
    made = epskernels.GraphedSampler(slow, table, 2, shape, whole=whole, device="cuda")
    seeds = torch.tensor([[1, 2], [3, 4], [5, 6]], device="cuda")
    streams = [torch.cuda.Stream() for _ in seeds]
    torch.cuda.synchronize()
    results = []
    for stream, each in zip(streams, seeds, strict=True):
        with torch.cuda.stream(stream):
            results.append(made(each))
    assert not streams[0].query()  # all were made while the first ran
    torch.cuda.synchronize()
    for result, each in zip(results, seeds.cpu(), strict=True):
        assert_same_bits(result.cpu(), epskernels.sample(halved, table, each, shape), "samples")


def test_a_graphed_loop_has_one_kernel_of_the_sampler_per_model_call():
    """Counted by the profiler: a model of one kernel, and the step."""
    table = samplers.ddpm(schedule.linear(), 7)
    made = epskernels.GraphedSampler(lambda x, t: x * 0.5, table, 2, (3, 64, 64), device="cuda")
    made([1, 2])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made([1, 2])
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [kernel for kernel in kernels if "Mem" not in kernel]
    steps = [i for i, kernel in enumerate(kernels) if "step_kernel" in kernel]
    assert len(steps) == len(table), kernels
    assert all(after - before == 2 for before, after in itertools.pairwise(steps)), kernels


def as_argument(backend):
    """A compiled graph dispatches by device, which is the CUDA kernel, unless told otherwise."""
    return None if backend == "cuda" else backend


@each_backend
def test_reduce_overhead_replays_for_every_row(backend):
    """Inductor's CUDA graphs: nothing keeps it from them, and the row's index is read anew in each replay."""
    table, seeds = samplers.ddpm(schedule.linear(), 8, scaling=1.01).to("cuda"), torch.arange(3, device="cuda")

    def run(x, index, seeds):
        return epskernels.step(x, x * 0.5, table.rows, index, seeds=seeds, backend=as_argument(backend))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, mode="reduce-overhead", fullgraph=True)
    x = expected = epskernels.normal(seeds, (3, 33))
    for index in table.row_index:
        torch.compiler.cudagraph_mark_step_begin()
        x = compiled(x, index, seeds).clone()
        expected = run(expected, index, seeds)
        assert_same_bits(x.cpu(), expected.cpu(), "x'")
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@each_backend
def test_a_compiled_step_is_one_kernel(backend):
    """In place, in a new tensor, and with its noise: the device runs one kernel for a model call's update."""
    table, seeds = samplers.ddpm(schedule.linear(), 8, scaling=1.01).to("cuda"), torch.arange(3, device="cuda")
    x, f = torch.randn(2, 3, 5, 64, 64, device="cuda")
    forms = {
        "new": lambda x, f, index: epskernels.step(x, f, table.rows, index, seeds=seeds, backend=as_argument(backend)),
        "out": lambda x, f, index: epskernels.step(
            x, f, table.rows, index, seeds=seeds, out=x, backend=as_argument(backend)
        ),
    }
    for called, form in forms.items():
        torch._dynamo.reset()
        compiled = torch.compile(form, fullgraph=True)
        for index in table.row_index[:2]:
            compiled(x, f, index)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for index in table.row_index:
                compiled(x, f, index)
            torch.cuda.synchronize()
        ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(ran) == len(table), (called, ran)


@each_backend
def test_compiled_for_any_size_once(backend):
    table = samplers.ddpm(schedule.linear(), 8, scaling=1.01).to("cuda")

    def run(x, index, seeds):
        return epskernels.step(x * 2, x, table.rows, index, seeds=seeds, backend=as_argument(backend))

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 17, 19), (5, 4, 20, 22)):
        x, seeds = torch.randn(shape, device="cuda"), torch.arange(shape[0], device="cuda")
        assert_same_bits(compiled(x, seeds, seeds).cpu(), run(x, seeds, seeds).cpu(), "x'")
    assert counter.frame_count == 1


@each_backend
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_the_cpu(backend, compiled):
    names = (*NAMES, "y", "rescale", "threshold")
    inputs = make_inputs((3, 1003), names, 16, special=0)
    rows, index = random_rows(4, names, 17, idle=0).clamp(-2, 2), torch.tensor([3, 0, 3])
    rows[:, COLUMNS.index("clip")].clamp_(min=0.5)
    rows[:, COLUMNS.index("draw")] = torch.arange(4.0)
    found = []
    torch._dynamo.reset()
    for device in ("cpu", "cuda"):
        leaves = on_gpu(inputs | {"rows": rows}, device)
        leaves = {key: leaf if key == "seeds" else leaf.detach().requires_grad_() for key, leaf in leaves.items()}
        wanted = [leaf for key, leaf in leaves.items() if key != "seeds"]

        def loss(x, f, rows, device=device, **more):
            chosen = as_argument(backend) if device == "cuda" else None
            results = epskernels.step(x, f, rows, index.to(device), **more, return_y=True, backend=chosen)
            return sum((result * result).sum() for result in results)

        run = torch.compile(loss, fullgraph=True) if compiled and device == "cuda" else loss
        found.append([gradient.cpu() for gradient in torch.autograd.grad(run(**leaves), wanted)])
    for got, expected in zip(*reversed(found), strict=True):
        assert ((got - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)).item()


# ---- several devices ----


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@each_backend
def test_another_device_than_the_current_one(backend):
    inputs = make_inputs((2, 1003), NAMES, 13)
    rows, index = random_rows(2, NAMES, 14, idle=0), torch.arange(2)
    assert torch.cuda.current_device() == 0
    there = on_gpu(inputs, "cuda:1")
    got = step(backend, rows.to("cuda:1"), index.to("cuda:1"), there)
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(got.cpu(), reference(rows, index, inputs)[0], "x'")
    with pytest.raises(RuntimeError, match="rows: expected a tensor on"):
        step(backend, rows.to("cuda:0"), index.to("cuda:1"), there)


# ---- more than 2^31 elements ----

LONG = 2**31 + 4099
PLACES = [slice(0, 4096), slice(LONG - 8195, LONG - 3), slice(LONG - 4099, LONG)]  # each begins at a multiple of 4


def normals(seed, draw, stream, place):
    """What the CPU's kernel makes there, in float32."""
    parts = range(place.start, place.stop, 1024)
    made = [_C.normal_elements(seed, draw, stream, part, min(1024, place.stop - part)) for part in parts]
    return torch.cat([torch.tensor(part) for part in made]).reshape(1, -1)


@each_backend
@pytest.mark.skipif(
    kernels.ON_GPU and torch.cuda.get_device_properties(0).total_memory < 40 * 2**30, reason="needs 40 GiB"
)
def test_more_elements_than_32_bits_count(backend):
    """A sample of 2^31 + 4099 elements, looked at where it begins, around 2^31 and where it ends."""
    torch.cuda.empty_cache()
    row = random_rows(1, ("seeds",), 15, idle=0)
    draw = int(row[0, COLUMNS.index("draw")])
    x, f = torch.randn(1, LONG, device="cuda"), torch.randn(1, LONG, device="cuda")
    seeds = torch.tensor([77], device="cuda")
    kept = [(x[:, place].cpu(), f[:, place].cpu()) for place in PLACES]
    epskernels.step(x, f, row.cuda(), torch.tensor(0, device="cuda"), seeds=seeds, out=x, backend=backend)
    for place, (part_x, part_f) in zip(PLACES, kept, strict=True):
        noise = normals(77, draw, 0, place)
        expected = epskernels.step(part_x, part_f, row, 0, noise=noise, backend="reference")
        assert_same_bits(x[:, place].cpu(), expected, f"x' from {place.start}")
    del x, f
    torch.cuda.empty_cache()
    latent = epskernels.normal(seeds, (LONG,), dtype=torch.bfloat16, backend=backend)
    for place in PLACES:
        expected = normals(77, 0, 1, place).to(torch.bfloat16)
        assert_same_bits(latent[:, place].cpu(), expected, f"normal from {place.start}")
    del latent
    torch.cuda.empty_cache()


# ---- packages, and C++ without Python ----


def test_a_package_has_the_bits_of_the_cpu(tmp_path):
    """The same program as test_export.py packages, compiled for the GPU, with batches and tables of other sizes."""

    def there(values):
        return tuple(value.cuda() for value in values)

    program = torch.export.export(Step(), there(step_inputs(4, 3, 1)), dynamic_shapes=dynamic_shapes())
    package = packaged(program, tmp_path)
    for batch, row_count in ((4, 3), (9, 12), (1, 1)):
        inputs = step_inputs(batch, row_count, batch)
        for got, wanted, what in zip(package(*there(inputs)), Step()(*inputs), OUTPUTS, strict=True):
            assert_same_bits(got.cpu(), wanted, f"{what}, batch {batch}")


@misread
def test_a_packaged_normal_runs_on_the_gpu(tmp_path):
    seeds = torch.arange(4)
    package = packaged_normal(seeds.cuda(), tmp_path)
    assert_same_bits(package(seeds.cuda()).cpu(), Normal()(seeds), "z")


def test_the_c_plus_plus_example_samples_on_the_gpu(tmp_path):
    """Its job's tensors are on the GPU, so its ops run there; libepskernels.so has brought their kernels."""
    markdown_examples.build_cpp(tmp_path / "build")
    table, seeds = samplers.ddpm(schedule.cosine(), 20, scaling=1.01), torch.arange(5)
    job = {"rows": table.rows.cuda(), "initial_sigma": table.initial_sigma, "seeds": seeds.cuda(), "shape": [3, 8, 8]}
    torch.save(job, tmp_path / "job.pt")
    subprocess.run([tmp_path / "build" / "sampler", tmp_path / "job.pt", tmp_path / "samples.pt"], check=True)
    samples = torch.load(tmp_path / "samples.pt")
    assert samples.device.type == "cuda"
    assert torch.equal(samples.cpu(), epskernels.sample(lambda x, t: 0.1 * x, table, seeds, (3, 8, 8)))
