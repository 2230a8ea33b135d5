"""GraphedSampler where there is no GPU: the loop that would be captured, run as it is. tests/gpu/test_gpu.py has the graphs."""

import concurrent.futures
import contextlib
import threading
import time

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.utils._python_dispatch import TorchDispatchMode

import epskernels
from epskernels import GraphedSampler, samplers, schedule

from ..support import markdown_examples

VP, KARRAS = schedule.linear(), schedule.KarrasSchedule()
TABLES = {
    "ddpm": samplers.ddpm(VP, 7, scaling=1.01),
    "ddim": samplers.ddim(VP, 6, clip=1.0),
    "edm_heun": samplers.edm_heun(KARRAS, 5, S_churn=10),
    "dpmpp_2m": samplers.dpmpp_2m(VP, 7, scaling=1.005),
    "dpmpp_sde": samplers.dpmpp_sde(KARRAS, 5, scaling=1.005),
    "plms": samplers.plms(VP, 7, scaling=1.005),
    "dpmpp_3m": samplers.dpmpp_3m(VP, 7),  # two estimates of calls before
    "edm_euler": samplers.edm_euler(schedule.KarrasSchedule(model=VP), 5, prediction="epsilon"),  # c_in is not 1
}
SHAPE = (3, 6, 5)


def model(x, t):
    return 0.3 * x + 1e-4 * t.reshape(-1, 1, 1, 1).to(x.dtype)


def sampler(*args, **kwargs):
    with pytest.warns(RuntimeWarning, match="runs without a graph: the table is on cpu, and CUDA graphs need a GPU"):
        made = GraphedSampler(*args, **kwargs)
    assert not made.graphed and "GPU" in made.why_not
    return made


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_the_bits_of_sample(name, dtype, whole):
    table = TABLES[name]
    made = sampler(model, table, 2, SHAPE, dtype=dtype, whole=whole)
    for seeds in ([5, 6], [7, 2**64 - 1], [5, 6]):
        got = made(seeds)
        assert torch.equal(got, epskernels.sample(lambda x, t: model(x.to(dtype), t), table, seeds, SHAPE, dtype=dtype))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16], ids=str)
def test_a_doubled_batch(model_dtype, whole):
    """u in the first half, f in the second, in the model's dtype."""
    table = samplers.edm_euler(KARRAS, 5, guidance=3.0)
    seen = []

    def doubled(x, t):
        seen.append((x.dtype, tuple(x.shape), tuple(t.shape), t.dtype))
        assert torch.equal(*x.chunk(2))
        return torch.cat([0.1 * x[:2], 0.4 * x[2:]])

    def pair(x, t):
        x = x.to(model_dtype)
        return 0.4 * x, 0.1 * x

    got = sampler(doubled, table, 2, SHAPE, model_dtype=model_dtype, doubled=True, whole=whole)([3, 4])
    assert torch.equal(got, epskernels.sample(pair, table, [3, 4], SHAPE))
    assert set(seen) == {(model_dtype, (4, *SHAPE), (4,), torch.float32)} and len(seen) == len(table)


def test_learned_variance():
    table = samplers.ddpm(VP, 6, variance="learned_range")

    def learned(x, t):
        return torch.cat([0.2 * x, 0.5 * x.tanh()], dim=1)

    assert torch.equal(sampler(learned, table, 2, SHAPE)([1, 2]), epskernels.sample(learned, table, [1, 2], SHAPE))


def test_results_are_the_caller_s_own():
    made = sampler(model, TABLES["ddim"], 2, SHAPE)
    first = made([1, 2])
    kept = first.clone()
    made([3, 4])
    assert torch.equal(first, kept)


def test_calls_of_many_threads_take_turns():
    """They all write the sampler's own tensors."""
    inside = []

    def alone(x, t):
        inside.append(threading.get_ident())
        time.sleep(0.002)
        assert inside == [threading.get_ident()]
        inside.clear()
        return model(x, t)

    made = sampler(alone, TABLES["ddim"], 2, SHAPE)
    seeds = [[i, i + 1] for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(made, seeds))
    assert all(
        torch.equal(each, epskernels.sample(model, TABLES["ddim"], own, SHAPE))
        for each, own in zip(got, seeds, strict=True)
    )


class Stream(list):
    """What was asked of it, in order."""

    def wait_event(self, event):
        self.append(f"wait for {event}")

    def record_event(self, event):
        self.append(f"record {event}")

    def replay(self):
        self.append("replay")
        if len(self) > 20:
            raise MemoryError


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
def test_a_call_waits_on_its_stream_for_the_call_before(whole, monkeypatch):
    """And leaves word for the next one, where it fails too. tests/gpu/test_gpu.py does it on two streams."""
    made = sampler(model, TABLES["ddim"], 2, SHAPE, whole=whole)
    made._done, replays = "done", ["replay"] * (1 if whole else len(TABLES["ddim"]))
    for failing in (False, True):
        stream = made._graph = Stream([""] * 20 * failing)
        monkeypatch.setattr(torch.cuda, "current_stream", {made.table.device: stream}.get)
        with pytest.raises(MemoryError) if failing else contextlib.nullcontext():
            made([1, 2])
        expected = ["wait for done", *(replays[:1] if failing else replays), "record done"]
        assert stream[20 * failing :] == expected


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TABLES)
def test_between_two_model_calls_there_is_one_op(name):
    """The model's own, which is a multiplication here, and the step."""
    table = TABLES[name]

    def counted(x, t):
        calls.names.append("model")
        return 0.5 * x

    made, calls = sampler(counted, table, 2, SHAPE), Calls()
    with torch.no_grad(), calls:
        made._loop()
    between = calls.names[calls.names.index("model") :]
    assert between == ["model", "aten.mul.Tensor", "epskernels.step_out.default"] * len(table)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"batch": 0}, ValueError, "batch: expected an integer of at least 1, got 0"),
        ({"batch": 2.0}, ValueError, "batch: expected an integer"),
        ({"dtype": torch.float64}, ValueError, "^dtype: expected float32, float16 or bfloat16, got torch.float64"),
        ({"model_dtype": torch.int64}, ValueError, "model_dtype: expected float32"),
        ({"table": epskernels.concat([TABLES["ddpm"], TABLES["ddim"]])}, ValueError, "table: expected one sampler's"),
        ({"table": "ddim"}, TypeError, "table: expected a Table, .*, got 'ddim'$"),
        ({"model": None}, TypeError, "model: expected a callable, got None$"),
        ({"shape": 4}, ValueError, "shape: expected a list or tuple of sizes of at least 1, got 4$"),
        ({"shape": (4.0,)}, ValueError, r"shape: expected .*, got \(4.0,\)$"),
    ],
    ids=["batch", "batch_float", "dtype", "model_dtype", "table", "no_table", "no_model", "shape", "shape_float"],
)
def test_bad_arguments(change, error, message):
    arguments = {"model": model, "table": TABLES["ddim"], "batch": 2, "shape": SHAPE} | change
    with pytest.raises(error, match=message):
        GraphedSampler(**arguments)


NOT_DOUBLED = {
    "a pair": (lambda x, t: (x, x), ValueError, "as doubled says, got a pair"),
    "half": (lambda x, t: x[:2], ValueError, r"as doubled says, got \(2, 3, 4, 4\)"),
    "a dict": (lambda x, t: {"sample": x}, TypeError, "model: expected it to return a tensor f, .*, got dict"),
}


@pytest.mark.parametrize("case", NOT_DOUBLED)
def test_a_doubled_model_returns_one_tensor(case):
    run, error, message = NOT_DOUBLED[case]
    made = sampler(run, samplers.ddim(schedule.linear(), 4, guidance=2.0), 2, (3, 4, 4), doubled=True)
    with pytest.raises(error, match=message):
        made([1, 2])


def test_a_model_may_return_diffusers_outputs():
    plain, named = (sampler(run, TABLES["ddim"], 2, SHAPE) for run in (model, lambda x, t: UNet2DOutput(model(x, t))))
    assert torch.equal(named([1, 2]), plain([1, 2]))
    table = samplers.ddim(schedule.linear(), 4, guidance=2.0)
    plain, named = (
        sampler(run, table, 2, (3, 4, 4), doubled=True)
        for run in (lambda x, t: 0.5 * x, lambda x, t: UNet2DOutput(0.5 * x))
    )
    assert torch.equal(named([1, 2]), plain([1, 2]))


def test_another_number_of_seeds():
    made = sampler(model, TABLES["ddim"], 2, SHAPE)
    with pytest.raises(ValueError, match="seeds: expected 2, the batch that was captured, got 3"):
        made([1, 2, 3])


def test_a_model_of_another_dtype_than_it_was_told():
    made = sampler(lambda x, t: x.float(), TABLES["ddim"], 2, SHAPE, model_dtype=torch.float16)
    with pytest.raises(RuntimeError, match="model_input: expected dtype float32 as f has, got float16"):
        made([1, 2])


@pytest.mark.filterwarnings("ignore:epskernels.GraphedSampler runs without a graph:RuntimeWarning")
def test_the_page_on_production(tmp_path):
    names = markdown_examples.run("docs/production.md", tmp_path)
    assert names["images"].shape == names["x"].shape == (4, 3, 32, 32)
    assert names["images"].isfinite().all() and names["x"].isfinite().all()
