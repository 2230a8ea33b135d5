"""Many threads at once: tables are immutable and ops without state, so each gets the bits that it gets alone."""

import concurrent.futures
import contextlib
import threading

import pytest
import torch

import epskernels
from epskernels import samplers, schedule
from epskernels.ops import backends

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, THREADS = (3, 17, 5), 12
TABLE = epskernels.concat(
    [
        samplers.ddpm(schedule.linear(), 7, scaling=1.01, guidance=2.0),
        samplers.dpmpp_2m(schedule.linear(), 9, scaling=0.99),
        samplers.ddim(schedule.linear(), 6, eta=0.5, clip=1.0),
    ]
)


def at_once(run):
    """run(0), run(1), ... in threads that begin together; what they returned."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait(60)
        return run(number)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def trajectory(number):
    """Steps of a batch of unlike rows, in place and not, and the noise, from the thread's own numbers."""
    generator = torch.Generator().manual_seed(number)
    x, f, u, m1 = (torch.randn(4, *SHAPE, generator=generator) for _ in range(4))
    index, seeds = torch.randint(len(TABLE), (4,), generator=generator), torch.arange(4) + number
    results = []
    for i in range(40):
        inputs = {"u": u, "m1": m1, "seeds": seeds}
        x, m0 = epskernels.step(x, f, TABLE, (index + i) % len(TABLE), **inputs, return_m0=True)
        epskernels.step(m0, f, TABLE.rows, TABLE.row_index[i % len(TABLE)], **inputs, out=m0)
        x = 0.5 * x + 0.125 * epskernels.normal(seeds, SHAPE, draw=i)
        results += [x, m0]
        m1 = m0
    return results


def test_stepping_at_once_gives_the_bits_of_stepping_alone():
    alone = [trajectory(number) for number in range(THREADS)]
    rows = TABLE.rows.clone()
    for together, expected in zip(at_once(trajectory), alone, strict=True):
        assert all(map(torch.equal, together, expected))
    assert torch.equal(TABLE.rows, rows)


def test_sampling_at_once_on_one_table():
    table = samplers.dpmpp_2m(schedule.linear(), 8, scaling=1.01)
    run = lambda number: epskernels.sample(lambda x, t: x / (1 + x * x), table, [number, 7], SHAPE)  # noqa: E731
    alone = [run(number) for number in range(THREADS)]
    assert all(map(torch.equal, at_once(run), alone))


def test_threads_of_the_kernel_itself():
    """Large enough that each call shares its tiles out over torch's threads too."""
    torch.set_num_threads(2)  # the fixture's, after the module: one
    x, f, seeds = torch.randn(2, 300_000), torch.randn(2, 300_000), torch.tensor([3, 4])
    table = samplers.ddpm(schedule.linear(), THREADS)
    run = lambda number: epskernels.step(x, f, table, number, seeds=seeds)  # noqa: E731
    alone = [run(number) for number in range(THREADS)]
    together = at_once(run)
    torch.set_num_threads(1)
    assert all(map(torch.equal, together, alone))


def test_a_backend_chosen_in_one_thread_is_not_that_of_another():
    names = (None, "reference", "cpu")
    expected = {None: backends.DISPATCHED, "cpu": backends.DISPATCHED, "reference": backends.REFERENCE_FUNCTIONS}
    x = torch.zeros(1)
    inside = threading.Barrier(THREADS)

    def run(number):
        name, other = names[number % 3], names[(number + 1) % 3]
        if name is None:
            inside.wait(60)  # the others are in their contexts
            seen = [backends.chosen(x, None) for _ in range(50)]
            inside.wait(60)
            return seen, [expected[None]] * 50
        with epskernels.use_backend(name):
            inside.wait(60)
            seen = [backends.chosen(x, None)]
            if other is not None:
                with epskernels.use_backend(other):
                    seen.append(backends.chosen(x, None))
            seen.append(backends.chosen(x, None))
            inside.wait(60)
        return [*seen, backends.chosen(x, None)], [
            expected[name], *([expected[other]] if other else []), expected[name], expected[None],
        ]  # fmt: skip

    before = backends.open_choices
    for seen, wanted in at_once(run):
        assert len(seen) == len(wanted) and all(a is b for a, b in zip(seen, wanted, strict=True))
    assert backends.open_choices == before


def test_contexts_opened_and_closed_all_the_time():
    """Whatever the others choose, a thread's own steps run, on what it chose, with the same bits."""
    expected = trajectory(0)

    def run(number):
        for i in range(3):
            name = ("reference", "cpu", "auto")[(number + i) % 3]
            with epskernels.use_backend(name) if number % 4 else contextlib.nullcontext():
                assert all(map(torch.equal, trajectory(0), expected))

    at_once(run)
    assert backends.open_choices == (0 if backends.DEFAULT_BACKEND is None else 1)
