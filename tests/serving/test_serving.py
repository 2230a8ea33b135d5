"""examples/serving.py: unlike requests in one batch, each with the bits of sample() alone; and what may go wrong on the way."""

import asyncio
import concurrent.futures
import pathlib
import random
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import epskernels
from epskernels import samplers, schedule

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from serving import Batch, Closed, Engine, Full, Request, Rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LINEAR, SHAPE = schedule.linear(), (2, 5, 3)
KARRAS = schedule.KarrasSchedule(model=LINEAR)


def second_history(steps=5):
    """A third-order multistep table: the first rows read no history, none, one, then two m0."""
    order = torch.arange(steps).clamp(max=2).numpy()
    columns = {"t": range(steps, 0, -1), "d_x": 0.5, "d_f": -0.25, "alpha_in": 1.0, "alpha_out": 1.0, "c_x": 0.5}
    columns |= {
        "sigma_in": 2.0 ** -torch.arange(steps).numpy(),
        "sigma_out": 2.0 ** -torch.arange(1, steps + 1).numpy(),
    }
    columns |= {"c_m1": -0.25 * (order > 0), "c_m2": 0.125 * (order > 1)}
    return epskernels.Table(columns | {"c_m0": 0.5 - columns["c_m1"] - columns["c_m2"]}, name="third order")


def predictor_corrector(steps=6):
    """A table with a second state, which the first row does not read."""
    rows, sigma, y_x0, y_eps = [], 4.0, 0.0, 0.0
    for i in range(steps):
        later = float(i > 0)
        row = {"t": steps - i, "d_x": 0.5, "d_f": -0.25, "alpha_in": 1.0, "alpha_out": 1.0, "sigma_in": sigma}
        row |= {"y_x0": y_x0, "y_eps": y_eps, "c_x": 0.5, "c_m1": -0.25 * later, "c_y": 0.25 * later}
        row["c_m0"] = 1 - row["c_x"] - row["c_m1"] - row["c_y"] * y_x0
        row |= {"k_x": 0.25, "k_m0": 0.5, "k_m1": 0.125 * later, "k_y": 0.25 * later}
        sigma = row["sigma_out"] = row["c_x"] * sigma + row["c_y"] * y_eps
        y_eps = row["y_out_eps"] = row["k_x"] * row["sigma_in"] + row["k_y"] * y_eps
        y_x0 = row["y_out_x0"] = row["k_x"] + row["k_m0"] + row["k_m1"] + row["k_y"] * y_x0
        rows.append(row)
    return epskernels.Table({key: [row[key] for row in rows] for key in rows[0]}, name="predictor corrector")


TABLES = {
    "ddpm": samplers.ddpm(LINEAR, 6, scaling=1.01),
    "ddpm 9": samplers.ddpm(LINEAR, 9, scaling=0.995),
    "ddpm learned": samplers.ddpm(LINEAR, 7, variance="learned_range"),
    "ddim": samplers.ddim(LINEAR, 5, scaling=1.02),
    "ddim eta": samplers.ddim(LINEAR, 4, eta=0.7, clip=1.0),
    "ddim guided": samplers.ddim(LINEAR, 6, guidance=3.0),
    "edm_heun": samplers.edm_heun(KARRAS, 4, prediction="epsilon", S_churn=3.0),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 8, scaling=1.01),
    "dpmpp_2m guided": samplers.dpmpp_2m(LINEAR, 5, guidance=1.5),
    "ddim by band": samplers.ddim(LINEAR, 5, correction=epskernels.corrections.dcw(-0.2, 0.1)),
    "one step": samplers.ddim(LINEAR, 1),
    "third order": second_history(),
    "predictor corrector": predictor_corrector(),
}
LABELS = {"label": torch.tensor(0)}
ALL = {
    "conditions": LABELS,
    "guided": True,
    "learned_variance": True,
    "history": 2,
    "second_state": True,
    "max_rows": 80,
}


def plain(x, t, label):
    """+, * and / alone, which round correctly: a sample's bits are the same in any batch, at any place."""
    label, t = (value.reshape(-1, *[1] * (x.dim() - 1)).float() for value in (label, t))
    return x / (1 + x * x) * (1 + 1e-3 * t) + 0.125 * label


def model(x, t, label):
    """(f, u), each with the variance."""
    f = plain(x, t, label)
    return torch.cat([f, 0.5 * f], dim=1), torch.cat([0.25 * f, x], dim=1)


def alone(request, run=model, shape=SHAPE, **options):
    label = request.condition.get("label", 0)
    called = lambda x, t: run(x, t, torch.as_tensor(label, device=x.device).expand(len(x)))  # noqa: E731
    return epskernels.sample(called, request.table, [request.seed], shape, **options)[0]


def unlike(count, seed=0):
    choose = random.Random(seed)
    names = [*TABLES, *choose.choices([*TABLES], k=count)][:count]
    return [Request(TABLES[name], choose.getrandbits(64), {"label": choose.randrange(9)}) for name in names]


def serve(batch, requests, seed=0):
    """All requests, joining at random ticks; their samples in order."""
    engine = Engine(batch, queue=len(requests))
    choose = random.Random(seed)
    with engine:
        futures = []
        for request in requests:
            futures.append(engine.submit(request))
            ticks = batch.ticks + choose.randrange(3)
            while batch.ticks < ticks and batch.jobs:
                time.sleep(1e-5)
        return [future.result(timeout=60) for future in futures]


# ---- bits ----


@pytest.mark.parametrize("slots, padded", [(1, False), (5, False), (5, True)], ids=["one slot", "five", "five, padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_request_is_as_alone(dtype, slots, padded):
    batch, requests = Batch(model, SHAPE, slots=slots, dtype=dtype, padded=padded, **ALL), unlike(40)
    for tensor in (*batch.history, *batch.y):
        tensor.fill_(float("nan"))
    for request, sample in zip(requests, serve(batch, requests), strict=True):
        assert sample.dtype == dtype and sample.isfinite().all()
        assert torch.equal(sample, alone(request, dtype=dtype)), request
    assert not batch.jobs and not batch.rows._spans and not batch._ends
    assert slots == 1 or batch.ticks < sum(len(request.table) for request in requests) / 2


def test_the_reference_serves_the_same_bits():
    requests = unlike(20)
    compiled = serve(Batch(model, SHAPE, **ALL), requests)
    reference = serve(Batch(model, SHAPE, **ALL, backend="reference"), requests)
    assert all(map(torch.equal, compiled, reference))


def test_a_model_without_guidance_or_variance():
    requests = [Request(TABLES[name], 7) for name in ("ddpm", "edm_heun", "dpmpp_2m", "ddim eta")]
    batch = Batch(plain, SHAPE, conditions=LABELS)
    for request, sample in zip(requests, serve(batch, requests), strict=True):
        assert torch.equal(sample, alone(request, plain))


def test_padded_batches_do_not_depend_on_the_load():
    """A model whose bits depend on the batch's size, as those of convolutions and matrix products may."""

    def by_size(x, t):
        return x / (1 + x * x) * (1 + 1e-3 * len(x))

    requests = [Request(TABLES[name], seed) for seed in range(4) for name in ("ddpm", "ddim", "dpmpp_2m")]
    # Not a row to spare: idle slots must not look past the end.
    options = {"slots": 6, "padded": True, "max_rows": 6 + 5 + 8}
    loaded = serve(Batch(by_size, SHAPE, **options), requests)
    each = [serve(Batch(by_size, SHAPE, **options), [request])[0] for request in requests]
    assert all(map(torch.equal, loaded, each))
    assert not all(map(torch.equal, serve(Batch(by_size, SHAPE, slots=6), requests), each))


def test_submitted_by_many_threads():
    requests = unlike(48, seed=1)
    with (
        Engine(Batch(model, SHAPE, slots=7, **ALL), queue=4) as engine,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        futures = list(pool.map(lambda request: engine.submit(request, timeout=None), requests))
        for request, future in zip(requests, futures, strict=True):
            assert torch.equal(future.result(timeout=60), alone(request))


# ---- what a tick does ----


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


def joined(batch, requests):
    from serving import _Job

    jobs = [_Job(request, batch.check(request)) for request in requests]
    for job in jobs:
        assert batch.fits(job)
        batch.join(job)
    return jobs


def test_a_tick_costs_the_same_for_any_number_of_requests():
    counted = {}
    deepest = [Request(TABLES[name], 1) for name in ("third order", "predictor corrector", "edm_heun")]
    for count in (0, 9):
        batch, calls = Batch(model, SHAPE, slots=16, **ALL), []
        batch.model = lambda x, t, label, calls=calls: calls.append(len(x)) or model(x, t, label)
        joined(batch, deepest + unlike(count))
        with Count() as counter:
            assert batch.tick() == []
        assert calls == [3 + count] and sum("epskernels" in op for op in counter.ops) == 1
        counted[count] = counter.ops
    assert counted[0] == counted[9]


def test_equal_tables_are_stored_once():
    batch = Batch(plain, SHAPE, slots=8, conditions=LABELS, max_rows=12)
    again = samplers.ddpm(LINEAR, 6, scaling=1.01)
    jobs = joined(batch, [Request(TABLES["ddpm"], 1), Request(again, 2), Request(TABLES["ddim"], 3)])
    assert batch.index.tolist()[:3] == [0, 0, 6] and torch.equal(batch.rows.buffer[:6, :24], again.rows)
    batch.leave(jobs[0])
    assert len(batch.rows._spans) == 2
    batch.leave(jobs[1])
    assert list(batch.rows._spans) == [jobs[2].key] and batch.jobs == [jobs[2]] and jobs[2].slot == 0
    joined(batch, [Request(TABLES["ddpm"], 4)])
    assert batch.index.tolist()[:2] == [6, 0]


def test_rows_are_where_they_were_put():
    """Against a list of all cells: no two tables overlap, none is refused while a gap is long enough."""
    rows, choose, width = Rows(40, "cpu"), random.Random(2), len(epskernels.table.COLUMNS)
    users, refused = [], 0
    for number in range(400):
        if users and choose.random() < 0.45:
            rows.drop(users.pop(choose.randrange(len(users)))[0])
        length = choose.randrange(1, 13)
        wide = choose.random() < 0.3
        key, values = (number, length), torch.full((length, width + 4 * wide), float(number))
        if users and choose.random() < 0.2:
            key, values, _ = choose.choice(users)
        cells = [False] * 40
        for _, there, first in users:
            cells[first : first + len(there)] = [True] * len(there)
        shared = any(key == other for other, _, _ in users)
        gap = any(not any(cells[i : i + len(values)]) for i in range(40 - len(values) + 1))
        if rows.find(key, len(values)) is None:
            assert not gap and not shared
            refused += 1
            continue
        assert gap or shared
        users.append((key, values, rows.put(key, values)))
        for _, there, first in users:
            kept = rows.buffer[first : first + len(there)]
            assert torch.equal(kept[:, : there.shape[1]], there) and not kept[:, there.shape[1] :].any()
    assert refused > 20


def test_tables_that_do_not_fit_together_take_turns():
    """Twelve rows: nobody waits for ever, and nobody passes the first."""
    requests = [Request(TABLES[name], seed) for seed, name in enumerate(["ddpm 9", "ddpm", "ddim"] * 5)]
    batch = Batch(plain, SHAPE, conditions=LABELS, max_rows=12)
    order = []
    with Engine(batch, queue=15) as engine:
        futures = [engine.submit(request) for request in requests]
        for i, future in enumerate(futures):
            future.add_done_callback(lambda _, i=i: order.append(i))
        for request, future in zip(requests, futures, strict=True):
            assert torch.equal(future.result(timeout=60), alone(request, plain))
    assert [i for i in order if i % 3 == 0] == [0, 3, 6, 9, 12]


# ---- what may go wrong ----


class Gate:
    """A model that waits to be let through, and tells when it is called."""

    def __init__(self):
        self.calls, self.pass_ = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, x, t):
        self.calls.release()
        assert self.pass_.acquire(timeout=60)
        return x / (1 + x * x)

    def open(self):
        self.pass_.release(10**6)


def gated(**options):
    gate = Gate()
    return gate, Engine(Batch(gate, SHAPE, slots=2), **options)


def test_cancelled_while_waiting_and_while_running():
    gate, engine = gated()
    with engine:
        tables = [samplers.ddim(LINEAR, 1000), *[TABLES["ddpm"]] * 4]
        futures = [engine.submit(Request(table, seed)) for seed, table in enumerate(tables)]
        gate.calls.acquire()  # 0 runs, and may be 1
        gate.pass_.release()
        gate.calls.acquire()  # both do
        assert futures[0].cancel() and futures[3].cancel()
        gate.open()
        done, not_done = concurrent.futures.wait(futures, timeout=60)
        assert not not_done and [future.cancelled() for future in futures] == [True, False, False, True, False]
        for seed in (1, 2, 4):
            expected = epskernels.sample(lambda x, t: x / (1 + x * x), TABLES["ddpm"], [seed], SHAPE)[0]
            assert torch.equal(futures[seed].result(), expected)
        assert not futures[1].cancel()
    assert engine.batch.ticks < 100  # 0 did not run on


def test_a_storm_of_submits_and_cancels():
    requests, expected = unlike(24, seed=3), {}
    for request in requests:
        expected[request] = alone(request)
    batch = Batch(model, SHAPE, slots=5, **ALL)
    counts = {"served": 0, "cancelled": 0}

    def storm(number):
        choose, mine = random.Random(number), []
        for request in choose.choices(requests, k=40):
            mine.append((request, engine.submit(request, timeout=None)))
            if choose.random() < 0.5:
                choose.choice(mine)[1].cancel()
        for request, future in mine:
            concurrent.futures.wait([future], timeout=60)
            assert future.cancelled() or torch.equal(future.result(timeout=0), expected[request])
            counts["cancelled" if future.cancelled() else "served"] += 1

    with Engine(batch, queue=8) as engine, concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(storm, range(6)))
    assert sum(counts.values()) == 240 and min(counts.values()) > 10, counts
    assert not (batch.jobs or batch.rows._spans or batch._ends or engine._open or engine._waiting)


def test_a_full_queue_refuses_or_waits():
    gate, engine = gated(queue=1)
    with engine:
        running = []
        for seed in range(2):
            running.append(engine.submit(Request(TABLES["ddim"], seed)))
            gate.calls.acquire()  # in the batch, or first in the queue of an engine that waits in the model
            gate.pass_.release()
        gate.calls.acquire()
        waiting = engine.submit(Request(TABLES["ddim"], 2))
        with pytest.raises(Full, match="the queue is full, 1 waiting and 2 running"):
            engine.submit(Request(TABLES["ddim"], 3))
        with pytest.raises(Full):
            engine.submit(Request(TABLES["ddim"], 3), timeout=0.01)
        threading.Timer(0.05, waiting.cancel).start()  # makes room
        last = engine.submit(Request(TABLES["ddim"], 4), timeout=10)
        gate.open()
        assert waiting.cancelled() and last.result(timeout=60).isfinite().all()


def test_an_error_of_the_model_reaches_the_requests_that_it_ran_for():
    def fails_for_one(x, t, label):
        if (label == 8).any():
            raise MemoryError("no room for 8")
        return plain(x, t, label)

    requests = [Request(TABLES["ddpm"], seed, {"label": 3}) for seed in range(4)]
    batch = Batch(fails_for_one, SHAPE, conditions=LABELS)
    with Engine(batch) as engine:
        with pytest.raises(MemoryError, match="no room for 8"):
            engine.submit(Request(TABLES["ddim"], 0, {"label": 8})).result(timeout=60)
        for request in requests:
            assert torch.equal(engine.submit(request).result(timeout=60), alone(request, plain))
    assert not batch.rows._spans and not batch._ends


class Unlike(Exception):
    """It cannot be copied."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


RAISED = {
    "an error": (MemoryError("no room"), MemoryError, "^no room$"),
    "with attributes": (
        OSError(28, "No space left on device", "a/file"),
        OSError,
        "No space left on device: 'a/file'$",
    ),
    "not to be copied": (Unlike(1, 2), RuntimeError, "^Unlike: 1 and 2$"),
    # What futures, generators and tasks take for a sign of their own.
    "StopIteration": (StopIteration("no more"), RuntimeError, "^StopIteration: no more$"),
    "CancelledError": (concurrent.futures.CancelledError("gone"), RuntimeError, "^CancelledError: gone$"),
    "StopAsyncIteration": (StopAsyncIteration("no more"), StopAsyncIteration, "^no more$"),
}


@pytest.mark.parametrize("case", RAISED)
def test_each_request_of_a_tick_has_an_error_of_its_own(case):
    raised, kind, message = RAISED[case]
    submitted = threading.Event()

    def fails(x, t):
        submitted.wait(60)
        if len(x) == 3:
            raise raised
        return x

    async def all_of_them():
        with Engine(Batch(fails, SHAPE, slots=3)) as engine:
            asked = [asyncio.create_task(engine.generate(Request(TABLES["ddim"], seed))) for seed in range(3)]
            await asyncio.sleep(0)
            submitted.set()
            return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=60)

    errors = asyncio.run(all_of_them())
    assert len({id(error) for error in errors}) == 3 and not any(error is raised for error in errors)
    for error in errors:
        with pytest.raises(kind, match=message) as caught:
            raise error
        assert type(error) is kind and str(caught.traceback[-1].path) == __file__  # down to the model
    lengths = [len(list(traceback.walk_tb(error.__traceback__))) for error in errors]
    assert len(set(lengths)) == 1, lengths  # no request's lengthens another's
    assert kind is not RuntimeError or all(error.__cause__ is raised for error in errors)
    if isinstance(raised, OSError):
        assert all((error.errno, error.filename) == (28, "a/file") for error in errors)


OUTPUTS = {
    "no u": ({"guided": True}, lambda x, t: x, r"model: expected \(f, u\)"),
    "unasked u": ({}, lambda x, t: (x, x), "model: expected f, as guided=False"),
    "no variance": ({"learned_variance": True}, lambda x, t: x, "twice the channels of x, got"),
    "too few samples": ({"padded": True}, lambda x, t: x[:3], r"expected 16 samples, got \(3, 2, 5, 3\)"),
    "a dict": ({}, lambda x, t: {"sample": x}, "model: expected it to return a tensor f, .*, got dict"),
    "another shape": ({}, lambda x, t: x[..., :2], "f: expected shape"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_wrong_outputs_are_errors(case):
    options, run, message = OUTPUTS[case]
    with Engine(Batch(run, SHAPE, **options)) as engine:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            engine.submit(Request(TABLES["ddim"], 0)).result(timeout=60)


REFUSED = {
    "a number as table": (Request(3, 0), "table: expected one sampler's Table, got 3"),
    "a band of signals": (
        Request(samplers.ddim(LINEAR, 5, correction=epskernels.corrections.dcw(0.1, dims=1)), 0),
        "table: expected bands in 2 dimensions for samples of .*, got ddim.5., which corrects them in 1",
    ),
    "two tables": (Request(epskernels.concat([TABLES["ddim"]] * 2), 0), "table: expected one sampler's Table"),
    "shape": (Request(TABLES["ddim"], 0, shape=(2, 5, 4)), r"samples of \(2, 5, 3\), got \(2, 5, 4\)"),
    "a number as shape": (Request(TABLES["ddim"], 0, shape=5), r"samples of \(2, 5, 3\), got 5"),
    "no condition": (Request(TABLES["ddim"], 0, None), "condition: expected a mapping, got None"),
    "condition of words": (Request(TABLES["ddim"], 0, {"label": "cat"}), "label to be a tensor or numbers, got 'cat'"),
    "no request": (TABLES["ddim"], "request: expected a Request, got Table ddim"),
    "seed": (Request(TABLES["ddim"], 2**64), "seeds: expected integers of 64 bits"),
    "seed of floats": (Request(TABLES["ddim"], 0.5), "seeds: expected an int64 tensor"),
    "rows": (
        Request(samplers.ddim(LINEAR, 13), 0),
        r"table: ddim\[13\] needs max_rows=13 or more in Batch, which has 12$",
    ),
    "history": (Request(TABLES["third order"], 0), "needs history=2 or more in Batch, which has 1$"),
    "second state": (Request(TABLES["predictor corrector"], 0), "needs second_state=True in Batch, which has False$"),
    "guidance": (Request(TABLES["ddim guided"], 0), "needs guided=True in Batch, which has False$"),
    "variance": (Request(TABLES["ddpm learned"], 0), "needs learned_variance=True in Batch, which has False$"),
    "condition": (Request(TABLES["ddim"], 0, {"text": 1}), r"condition: expected some of \['label'\], got \['text'\]"),
    "condition's shape": (Request(TABLES["ddim"], 0, {"label": [1]}), r"label to be \(\) of torch.int64, got \(1,\)"),
    "condition's dtype": (Request(TABLES["ddim"], 0, {"label": 0.5}), "label to be .* got .* of torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engine_cannot_run_is_refused(case):
    request, message = REFUSED[case]
    with Engine(Batch(plain, SHAPE, conditions=LABELS, max_rows=12)) as engine:
        with pytest.raises(ValueError, match=message):
            engine.submit(request)


# ---- ends ----


def test_close_serves_what_it_has():
    gate, engine = gated()
    futures = [engine.submit(Request(TABLES["ddim"], seed)) for seed in range(6)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        time.sleep(1e-3)
    with pytest.raises(Closed, match="takes no more requests"):
        engine.submit(Request(TABLES["ddim"], 9))
    gate.open()
    closing.join(60)
    assert all(future.done() and future.result().isfinite().all() for future in futures)
    engine.close()  # again: nothing happens


def test_an_exception_in_the_block_cancels():
    gate, engine = gated()
    with pytest.raises(KeyError), engine:
        futures = [engine.submit(Request(TABLES["ddim"], seed)) for seed in range(6)]
        for future in futures:  # nothing is served before all are cancelled
            future.add_done_callback(lambda _: all(each.cancelled() for each in futures) and gate.open())
        raise KeyError
    assert not engine._thread.is_alive() and not engine._open
    assert all(future.cancelled() for future in futures)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_whose_thread_died():
    def dies(x, t):
        raise SystemExit

    engine = Engine(Batch(dies, SHAPE, slots=2))
    futures = []
    with pytest.raises(Closed):
        for _ in range(1000):
            futures.append(engine.submit(Request(TABLES["ddim"], 0), timeout=None))
    for future in futures:
        assert isinstance(future.exception(timeout=60), Closed)
    engine._thread.join(60)


def test_a_callback_may_submit_and_is_never_made_to_wait():
    followed = concurrent.futures.Future()
    gate, engine = gated(queue=1)

    def follow(_):
        try:
            engine.submit(Request(TABLES["ddim"], 1), timeout=None)
            engine.submit(Request(TABLES["ddim"], 2), timeout=None)
        except Full as error:
            followed.set_result(error)

    with engine:
        first = engine.submit(Request(TABLES["ddim"], 0))
        first.add_done_callback(follow)
        gate.open()
        assert isinstance(followed.result(timeout=60), Full)


def test_asyncio():
    async def both():
        with Engine(Batch(plain, SHAPE, conditions=LABELS)) as engine:
            requests = [Request(TABLES["dpmpp_2m"], seed) for seed in range(3)]
            samples = await asyncio.gather(*map(engine.generate, requests))
            assert all(torch.equal(s, alone(r, plain)) for r, s in zip(requests, samples, strict=True))
            task = asyncio.create_task(engine.generate(Request(samplers.ddim(LINEAR, 1000), 0)))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(ValueError, match="shape"):
                await engine.generate(Request(TABLES["ddim"], 0, shape=(1,)))

    asyncio.run(both())


FORGOTTEN = """
from epskernels import samplers, schedule
from serving import Batch, Engine, Request
engine = Engine(Batch(lambda x, t: x, (1, 8, 8)))
futures = [engine.submit(Request(samplers.ddim(schedule.linear(), 1000), seed)) for seed in range(40)]
print("submitted")
"""


def test_a_process_that_forgets_to_close_ends():
    command = [sys.executable, "-c", FORGOTTEN]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "submitted\n", "")
