"""Time shift against plain float64 loops, one sample at a time, written from arXiv 2305.15583; and its bits in every loop."""

import functools
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import epskernels
from epskernels import GraphedSampler, cli, models, samplers, schedule
from epskernels.time_shift import UNUSED, ShiftedTable, nearest, variance

from ..serving.test_serving import ALL, TABLES, Batch, Request, alone, model, serve
from ..support import oracles

LINEAR, SHAPE, SEEDS = schedule.linear(), (3, 6, 5), [1, 2, 3, 4]
KARRAS = schedule.KarrasSchedule(model=LINEAR)
ABAR = np.cumprod(1 - oracles.linear_betas())
STEPS, WINDOW, CUTOFF = 12, 30, 200
LAM = 1 + 0.002 * np.arange(1, 100)  # the noisiest first
SPREAD = torch.tensor([0.7, 0.9, 1.0, 1.15]).reshape(4, 1, 1, 1)  # so that the samples take different times
shifted = functools.partial(ShiftedTable, window=WINDOW, cutoff=CUTOFF)


def by_step(lam):
    return epskernels.scaling.array(lam, origin="noisiest")


def network(x, t):
    """An eps of data of variance 1/2, and a part that is not linear; of float32 tensors or float64 arrays."""
    lib = torch if isinstance(x, torch.Tensor) else np
    t = t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) if lib is torch else np.float64(t)
    abar = lib.exp(-1e-4 * t - 9.95e-6 * t * t)
    return x * (1 - abar) ** 0.5 / (1 - abar / 2) + abar * lib.tanh(2 * x) * lib.cos(t / 60)


# ---- the oracles: one sample, a float64 array ----


class Oracle:
    """What the paper's loop chooses: the time within w/2 of the usual one whose 1 - abar is nearest to the state's variance."""

    def __init__(self, lam, noise, window=WINDOW, cutoff=CUTOFF):
        self.lam, self.noise, self.half, self.cutoff, self.told = lam, noise, window // 2, cutoff, []

    def nearest(self, x, t):
        times = [tau for tau in range(len(ABAR)) if abs(tau - t) <= self.half]
        return min(times, key=lambda tau: (x.var(ddof=1) - (1 - ABAR[tau])) ** 2)

    def unless_first(self, x, t):
        return self.nearest(x, t) if self.told and t > self.cutoff else t

    def eps(self, x, tau):
        self.told.append(tau)
        return network(x, tau)

    def ddim(self, x, times, eta=0.0):
        for i, (t, after) in enumerate(zip(times, [*times[1:], None], strict=True)):
            tau = self.unless_first(x, t)
            eps = self.eps(x, tau) / self.lam[i]
            a, b = ABAR[tau], 1.0 if after is None else ABAR[after]
            std = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
            x = (
                np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
                + np.sqrt(1 - b - std**2) * eps
                + std * self.noise[i]
            )
        return x

    def ddpm(self, x, times):
        """The posterior of x_0 from tau to the next time (arXiv 2006.11239, eq. 7)."""
        for i, (t, after) in enumerate(zip(times, [*times[1:], None], strict=True)):
            tau = self.unless_first(x, t)
            eps = self.eps(x, tau) / self.lam[i]
            a, b = ABAR[tau], 1.0 if after is None else ABAR[after]
            x_0, beta = (x - np.sqrt(1 - a) * eps) / np.sqrt(a), 1 - a / b
            mean = (np.sqrt(b) * beta * x_0 + np.sqrt(a / b) * (1 - b) * x) / (1 - a)
            x = mean + np.sqrt(beta * (1 - b) / (1 - a)) * self.noise[i]
        return x

    def target(self, x, times, multistep=True):
        """As the authors' PNDM code: x at t goes to the time near the next one that its variance names; the network hears t."""
        old, e_first = [], None
        for i, (t, after) in enumerate(zip(times, [*times[1:], None], strict=True)):
            e = self.eps(x, t) / self.lam[i]
            if after is not None:
                after = self.nearest(x, after) if i > 0 and after > self.cutoff else after
            a, b = ABAR[t], 1.0 if after is None else ABAR[after]
            ends = (np.sqrt(a), np.sqrt(1 - a)), (np.sqrt(b), np.sqrt(1 - b))
            e_first = e
            if multistep and i == 0 and after is not None:
                e = (e + self.eps(oracles.transfer(x, e, *ends), after) / self.lam[i]) / 2
            elif multistep:
                e = oracles.pndm_eps([*old[-3:], e])
            x = oracles.transfer(x, e, *ends)
            old.append(e_first)
        return x

    def dpmpp_2m(self, x, times):
        ends = np.append(ABAR[times], 1.0)
        alpha, sigma = np.sqrt(ends), np.sqrt(1 - ends)

        def denoise(x, j):
            return (x - sigma[j] * self.eps(x, self.unless_first(x, times[j])) / self.lam[j]) / alpha[j]

        return oracles.dpmpp_2m(denoise, x, alpha, sigma, lower_order_final=True)[-1]

    def dpm_solver(self, x, sigmas):
        """On x_0 + sigma*eps: it is the variance of what the network is fed that counts."""

        def denoise(x, sigma):
            fed = x / np.sqrt(1 + sigma**2)
            return x - sigma * self.eps(fed, self.unless_first(fed, oracles.sigma_to_t(sigma, oracles.linear_betas())))

        return oracles.sigma_dpm_solver(denoise, x, sigmas, self.lam, self.noise, order=2)[-1]


def times(spacing="leading"):
    return LINEAR.timesteps(STEPS, spacing)


KARRAS_SIGMAS = oracles.edm_sigmas(STEPS, *np.sqrt((1 - ABAR[[0, -1]]) / ABAR[[0, -1]]))
KARRAS_SIGMAS[:-1] = KARRAS.grid(STEPS).sigma  # the ends are those of EDM where the network knows them
CASES = {
    "ddim": (samplers.ddim, {}, lambda o, x: o.ddim(x, times())),
    "ddim-trailing": (samplers.ddim, {"spacing": "trailing"}, lambda o, x: o.ddim(x, times("trailing"))),
    "ddim-eta": (samplers.ddim, {"eta": 0.8}, lambda o, x: o.ddim(x, times(), eta=0.8)),
    "ddpm": (samplers.ddpm, {"clip": None}, lambda o, x: o.ddpm(x, times())),
    "ddim-target": (samplers.ddim, {"form": "target"}, lambda o, x: o.target(x, times(), multistep=False)),
    "plms": (samplers.plms, {}, lambda o, x: o.target(x, times())),
    "dpmpp_2m": (samplers.dpmpp_2m, {"spacing": "trailing"}, lambda o, x: o.dpmpp_2m(x, times("trailing"))),
    "dpm_solver": (samplers.dpm_solver, {"prediction": "epsilon"}, lambda o, x: o.dpm_solver(x, KARRAS_SIGMAS)),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["lambda_1", "lambda"])
@pytest.mark.parametrize("name", CASES)
def test_against_a_plain_loop(name, scaled):
    """The same times are told, and the samples are those of the loop but for float32's rounding."""
    sampler, options, run = CASES[name]
    lam = LAM[:STEPS] if scaled else np.ones(STEPS)
    table = shifted(sampler, KARRAS if name == "dpm_solver" else LINEAR, STEPS, scaling=by_step(lam), **options)
    start = table.table.initial_sigma * SPREAD * epskernels.normal(SEEDS, SHAPE)
    told = []

    def recorded(x, t):
        told.append(t.clone())
        return network(x, t)

    got = epskernels.sample(recorded, table, SEEDS, SHAPE, start=start)
    noise = np.stack([epskernels.normal(SEEDS, SHAPE, draw=i, stream=0).double().numpy() for i in range(STEPS)])
    usual = epskernels.sample(network, table.table, SEEDS, SHAPE, start=start)
    for b in range(len(SEEDS)):
        oracle = Oracle(lam, noise[:, b])
        expected = run(oracle, start[b].double().numpy())
        np.testing.assert_allclose([float(t[b]) for t in told], oracle.told, rtol=1e-6)
        error, effect = abs(got[b].double().numpy() - expected).max(), abs(usual[b].double().numpy() - expected).max()
        assert error <= 2e-6 * abs(expected).max() and effect > 100 * error
    if "target" not in name and name != "plms":  # and not all samples take the same
        assert any(t.unique().numel() > 1 for t in told)


# ---- which row is taken ----


def test_the_times_that_may_be_taken():
    """Cut at both ends of the schedule, none at the first call nor up to the cutoff."""
    path = schedule.linear(50)
    table = ShiftedTable(samplers.ddim, path, [48, 30, 12, 11, 2], window=20, cutoff=11)
    assert table.shifts == (False, True, True, False, False) and table.candidates == 21
    times, allowed = table.t.reshape(5, 21), table.levels != UNUSED
    expected = [[], range(20, 41), range(2, 23), [], []]
    for i, each in enumerate(expected):
        assert times[i][allowed[i]].tolist() == list(each)
        assert (times[i][~allowed[i]] == table.table["t"][i]).all()
        assert torch.equal(table.levels[i][allowed[i]], torch.tensor(1 - path.abar[list(each)]))
    wide = ShiftedTable(samplers.dpmpp_2m, path, [48, 45, 4], window=21)  # half of it to a side, rounded down
    assert [wide.t.reshape(3, 21)[i][wide.levels[i] != UNUSED].tolist() for i in (1, 2)] == [
        [*range(35, 50)],
        [*range(15)],
    ]


def test_between_timesteps_a_window_holds_those_within_half_of_it():
    table = shifted(samplers.dpmpp_2m, KARRAS, 6, prediction="epsilon")
    t, times = table.table["t"], table.t.reshape(6, -1)
    assert table.t.dtype == torch.float32 and t[2] != round(t[2])
    taken = times[2][table.levels[2] != UNUSED]
    assert taken.tolist() == [tau for tau in range(1000) if abs(tau - t[2]) <= WINDOW / 2] and len(taken) == WINDOW
    assert np.allclose(table.levels[2, 0] * table.table["c_in"][2] ** 2, 1 - ABAR[int(taken[0])], rtol=1e-12)


@pytest.mark.parametrize("by_tensor", [False, True], ids=["by_number", "by_tensor"])
def test_a_state_takes_the_time_whose_variance_it_has(by_tensor):
    """Any of the window; its nearer end outside of it; between two the nearer one; and each sample that of its own call."""
    table = ShiftedTable(samplers.ddim, LINEAR, [900, 500, 100], window=8)
    sigma2 = 1 - LINEAR.abar
    below, above = (weight * sigma2[496:504] + (1 - weight) * sigma2[497:505] for weight in (0.6, 0.4))
    levels = torch.tensor(np.concatenate([sigma2[496:505], [0.0, 1e3], below, above]), dtype=torch.float32)
    x = torch.tensor([-1.0, 1.0, 0.0]) * levels.sqrt()[:, None]  # their variances
    index, t = table.choose(torch.tensor(1) if by_tensor else np.int64(1), x)
    assert t.tolist() == [*range(496, 505), 496, 504, *range(496, 504), *range(497, 505)]
    assert index.dtype == torch.int64 and torch.equal(table.t[index], t)
    calls = (torch.arange(len(x)) + 2) % 3
    index, t = table.choose(calls, x)
    assert torch.equal(index // table.candidates, calls)
    assert t.tolist() == [table.choose(k, x[b : b + 1])[1].item() for b, k in enumerate(calls.tolist())]
    assert (t[calls == 0] == 900).all() and set(t[calls == 2].tolist()) == {96, 104}


def test_the_nearest_of_equals_is_the_less_noisy():
    levels = torch.tensor([1.0, 2.0, 2.0, 4.0, UNUSED], dtype=torch.float64)
    assert nearest(torch.tensor([1.5, 2.0, 3.0, 1e200], dtype=torch.float64), levels).tolist() == [0, 1, 1, 0]
    assert nearest(torch.tensor([float("nan"), float("inf")], dtype=torch.float64), levels).tolist() == [0, 0]
    assert (
        nearest(torch.ones(3, dtype=torch.float64), torch.full((5,), UNUSED, dtype=torch.float64)).tolist() == [0] * 3
    )


@pytest.mark.parametrize("dtype", epskernels.ops.DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_the_variance_is_unbiased(dtype, mean):
    x = (mean + epskernels.normal(range(5), (3, 7, 11)) * torch.arange(1, 6).reshape(-1, 1, 1, 1)).to(dtype)
    expected = x.double().flatten(1).var(1)
    torch.testing.assert_close(variance(x), expected, rtol=1e-10, atol=0)
    with epskernels.use_backend("reference"):
        assert torch.equal(variance(x), variance(x, backend="cpu"))


# ---- a table like others ----


@pytest.mark.parametrize("name", CASES)
def test_where_nothing_is_shifted_the_rows_are_the_sampler_s_own(name):
    """The candidates of a call without a choice, and the usual time among those of a call with one."""
    sampler, options, _ = CASES[name]
    path = KARRAS if name == "dpm_solver" else LINEAR
    for cutoff in (1000, 0):
        table = ShiftedTable(sampler, path, STEPS, window=4, cutoff=cutoff, scaling=1.01, **options)
        rows, usual = table.rows.unflatten(0, (len(table), -1)), table.table.rows
        assert any(table.shifts) == (cutoff == 0)
        for i, shifts in enumerate(table.shifts):
            if not shifts:
                assert torch.equal(rows[i], usual[i].expand_as(rows[i]))
            elif usual[i, -2] == usual[i, -2].round():
                torch.testing.assert_close(rows[i, 2], usual[i], rtol=1e-6, atol=1e-7)
    table = ShiftedTable(sampler, path, STEPS, window=4, cutoff=1000, **options)
    assert torch.equal(*(epskernels.sample(network, each, SEEDS, SHAPE) for each in (table, table.table)))


@pytest.mark.parametrize("name", CASES)
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(name):
    sampler, options, _ = CASES[name]
    table = shifted(sampler, KARRAS if name == "dpm_solver" else LINEAR, STEPS, **options)
    together = epskernels.sample(network, table, SEEDS, SHAPE)
    assert torch.equal(together, torch.cat([epskernels.sample(network, table, [seed], SHAPE) for seed in SEEDS]))
    with epskernels.use_backend("reference"):
        assert torch.equal(together, epskernels.sample(network, table, SEEDS, SHAPE))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "plms", "dpmpp_2m"])
def test_nan_stays_in_its_sample(name):
    """Whichever row it takes is one of the table's, and of its own call."""
    sampler, options, _ = CASES[name]
    table = shifted(sampler, LINEAR, STEPS, **options)
    start = epskernels.normal(SEEDS, SHAPE)
    usual = epskernels.sample(network, table, SEEDS, SHAPE, start=start)
    for bad in (float("nan"), float("inf"), 3e38):
        start[1, 0, 0, 0] = bad
        for i in range(STEPS):
            for each in (i, torch.tensor(i)):
                assert (table.choose(each, start)[0] // table.candidates == i).all()
        got = epskernels.sample(network, table, SEEDS, SHAPE, start=start)
        assert torch.equal(got[[0, 2, 3]], usual[[0, 2, 3]]) and not got[1].isfinite().all()


def test_lambda_by_level_is_that_of_the_shifted_level():
    lambda_t = epskernels.scaling.by_level([-4.0, 4.0], [1.05, 1.0])
    table = ShiftedTable(samplers.ddim, LINEAR, [900, 500, 100], window=2, scaling=lambda_t)
    rows = table.rows.unflatten(0, (3, 3))
    for k, t in enumerate((499, 500, 501)):
        expected = samplers.ddim(LINEAR, [900, t, 100], scaling=lambda_t)
        torch.testing.assert_close(rows[1, k], expected.rows[1], rtol=1e-6, atol=1e-7)


def test_moved_and_pickled():
    table = shifted(samplers.ddim, LINEAR, 6)
    assert table.to("cpu") is table and len(table) == 6 and "ddim[6], 3 calls shifted among 31" in repr(table)
    again = pickle.loads(pickle.dumps(table))
    assert torch.equal(*(epskernels.sample(network, each, SEEDS, SHAPE) for each in (table, again)))
    meta = table.to("meta")
    assert meta.device.type == meta.levels.device.type == meta.t.device.type == meta.table.device.type == "meta"
    with torch.inference_mode():
        made = shifted(samplers.ddim, LINEAR, 6)
    assert not made.rows.is_inference() and not made.levels.is_inference()


def test_a_sampler_of_one_s_own():
    """The network alone is told another time."""
    table = shifted(lambda schedule, steps, **options: samplers.dit(steps, **options), LINEAR, 6, guidance=1.0)
    columns = [i for i, name in enumerate(epskernels.table.COLUMNS) if name != "t"]
    assert all((rows[:, columns] == rows[0, columns]).all() for rows in table.rows.unflatten(0, (6, -1)))
    assert table.table.learned_variance and sum(table.shifts) > 0


# ---- in every loop, without the host ----

LOOPS = {
    "ddim": shifted(samplers.ddim, LINEAR, 6, scaling=1.01),
    "ddpm": shifted(samplers.ddpm, LINEAR, 6),
    "plms": shifted(samplers.plms, LINEAR, 7),
    "dpmpp_2m": shifted(samplers.dpmpp_2m, LINEAR, 6),
    "dpm_solver": shifted(samplers.dpm_solver, KARRAS, 4, prediction="epsilon"),  # c_in is not 1
}


def graphed(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "epskernels.GraphedSampler runs without a graph")
        return GraphedSampler(*args, **kwargs)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_the_graphed_loop_has_the_bits_of_sample(name, dtype, whole):
    made = graphed(network, LOOPS[name], 2, SHAPE, dtype=dtype, whole=whole)
    for seeds in ([5, 6], [7, 2**64 - 1]):
        expected = epskernels.sample(lambda x, t: network(x.to(dtype), t), LOOPS[name], seeds, SHAPE, dtype=dtype)
        assert torch.equal(made(seeds), expected)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
def test_a_doubled_batch(whole):
    table = shifted(samplers.ddim, LINEAR, 6, guidance=3.0)

    def doubled(x, t):
        assert t.shape == (4,) and torch.equal(*t.chunk(2))
        return torch.cat([0.1 * x[:2], network(x[2:], t[2:])])

    got = graphed(doubled, table, 2, SHAPE, doubled=True, whole=whole)([3, 4])
    assert torch.equal(got, epskernels.sample(lambda x, t: (network(x, t), 0.1 * x), table, [3, 4], SHAPE))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "row_by_row"])
@pytest.mark.parametrize("name", LOOPS)
def test_the_host_never_waits(name, whole):
    """Nothing that is captured reads a value on the host, or copies from it."""
    made, calls = graphed(lambda x, t: x * 0.5, LOOPS[name], 2, SHAPE, whole=whole), Calls()
    made._begin()
    with torch.no_grad(), calls:
        made._loop() if whole else made._next_row()
    assert {"epskernels.moments.default", "epskernels.step_out.default"} <= calls.names
    reads = (
        "local_scalar",
        "nonzero",
        "is_nonzero",
        "equal",
        "_to_copy",
        "lift_fresh",
        "masked_select",
        "item",
        "unique",
    )
    assert not [call for call in calls.names if any(read in call for read in reads)], calls.names


@pytest.mark.parametrize("name", LOOPS)
def test_the_choice_reads_no_value(name):
    """On a device whose tensors have none."""
    table = LOOPS[name].to("meta")
    x = torch.empty(2, *SHAPE, device="meta")
    for i in (1, torch.empty((), dtype=torch.int64, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")):
        index, t = table.choose(i, x)
        assert index.shape[-1:] in ((), (2,)) and t.shape == (2,) and index.device.type == t.device.type == "meta"


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_sample_is_one_graph(name):
    counter = CompileCounter()
    run = functools.partial(epskernels.sample, network, LOOPS[name], shape=(3, 5))
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for seeds in (torch.tensor([7, 8]), torch.tensor([-1, 2**62])):
        assert torch.equal(compiled(seeds=seeds), run(seeds=seeds))
    assert counter.frame_count == 1


SERVED = {
    "ddim": shifted(samplers.ddim, LINEAR, 5, scaling=1.02),
    "ddim narrow": ShiftedTable(samplers.ddim, LINEAR, 6, window=4),
    "ddpm": shifted(samplers.ddpm, LINEAR, 6),
    "plms": shifted(samplers.plms, LINEAR, 6),
    "dpmpp_2m": shifted(samplers.dpmpp_2m, LINEAR, 8),
    "dpm_solver": shifted(samplers.dpm_solver, KARRAS, 3, prediction="epsilon"),
}


@pytest.mark.parametrize("slots, padded", [(1, False), (5, False), (5, True)], ids=["one slot", "five", "five, padded"])
def test_requests_with_and_without_it_share_a_batch(slots, padded):
    tables = {f"shifted {name}": table for name, table in SERVED.items()} | TABLES
    requests = [Request(tables[name], seed) for seed in range(2) for name in sorted(tables, key=len)]
    batch = Batch(model, SHAPE, slots=slots, padded=padded, window=WINDOW, **ALL | {"max_rows": 700})
    for sample, request in zip(serve(batch, requests), requests, strict=True):
        assert torch.equal(sample, alone(request, shape=SHAPE)), request.table
    assert not batch.rows._spans and (batch.candidates == 1).all()
    assert not torch.equal(alone(requests[0]), alone(Request(tables["shifted ddim"].table, requests[0].seed)))


def test_requests_that_an_engine_cannot_run():
    with pytest.raises(ValueError, match=r"table: ddim\[5\] needs window=30 or more in Batch, which has 28"):
        Batch(model, SHAPE, window=28, **ALL | {"max_rows": 700}).check(Request(SERVED["ddim"], 1))
    with pytest.raises(ValueError, match=r"table: ddim\[5\] needs max_rows=155 or more in Batch, which has 154"):
        Batch(model, SHAPE, window=30, **ALL | {"max_rows": 154}).check(Request(SERVED["ddim"], 1))
    Batch(model, SHAPE, window=30, **ALL | {"max_rows": 155}).check(Request(SERVED["ddim"], 1))


# ---- bad arguments ----

MISTAKES = {
    "sampler": ({"sampler": "ddim"}, TypeError, "sampler: expected a function such as samplers.ddim, got 'ddim'"),
    "no table": ({"sampler": lambda schedule, steps: 3}, TypeError, "table: expected a Table, .*, got 3"),
    "window 1": ({"window": 1}, ValueError, "window: expected an integer of at least 2, got 1"),
    "window float": ({"window": 30.0}, ValueError, "window: expected an integer of at least 2, got 30.0"),
    "window bool": ({"window": True}, ValueError, "window: expected an integer"),
    "cutoff": ({"cutoff": -1}, ValueError, "cutoff: expected a finite value >= 0, got -1"),
    "cutoff nan": ({"cutoff": float("nan")}, ValueError, "cutoff: expected a finite value >= 0, got nan"),
    "cutoff none": ({"cutoff": None}, ValueError, "cutoff: expected a finite value >= 0, got None"),
    "form": ({"form": "ddim"}, ValueError, "form: expected 'step' or 'target' or 'network' for ddim, got 'ddim'"),
    "form of another": (
        {"sampler": samplers.dpmpp_2m, "form": "step"}, ValueError, "form: expected 'network' for dpmpp_2m, got 'step'",
    ),
    "schedule": (
        {"schedule": schedule.FlowSchedule()}, TypeError, "schedule: expected a DiscreteSchedule for the form 'step', got Flow",
    ),
    "karras": (
        {"sampler": samplers.dpmpp_2m, "schedule": schedule.KarrasSchedule()}, TypeError,
        r"schedule: expected a DiscreteSchedule, or a KarrasSchedule\(model=...\), got Karras",
    ),
    "space": ({"sampler": samplers.plms, "space": "sigma"}, ValueError, "space: expected 'vp' for the form 'target'"),
    "correction": (
        {"sampler": samplers.plms, "correction": {"kind": "dc", "s": 0.1}},
        ValueError,
        "correction: expected none beside the form 'target' of plms",
    ),
    "noise upwards": (
        {"sampler": samplers.ddpm, "steps": 100}, ValueError, "window: expected one within which each step of ddpm",
    ),
    "options": ({"eta": -1.0}, ValueError, "eta: expected"),
    "steps": ({"steps": 0}, ValueError, "steps: expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_arguments(case):
    change, error, message = MISTAKES[case]
    arguments = {"sampler": samplers.ddim, "schedule": LINEAR, "steps": 6, "window": 30} | change
    with pytest.raises(error, match=message):
        ShiftedTable(arguments.pop("sampler"), arguments.pop("schedule"), arguments.pop("steps"), **arguments)


def test_a_window_beyond_the_step_s_end_is_fine_without_noise():
    """As published: the state then goes up a little."""
    table = ShiftedTable(samplers.ddim, LINEAR, 100, window=30, cutoff=300)
    assert epskernels.sample(network, table, SEEDS, SHAPE).isfinite().all()


@pytest.mark.parametrize("i", [-1, 6])
def test_a_call_that_the_table_does_not_have(i):
    with pytest.raises(IndexError, match=rf"i: expected a model call in \[0, 6\), got {i}$"):
        LOOPS["ddim"].choose(i, torch.zeros(2, 3))


def test_samples_that_have_no_variance():
    with pytest.raises(ValueError, match=r"x: expected samples of at least 2 elements, .*, got \(4, 1\)"):
        epskernels.sample(network, LOOPS["ddim"], SEEDS, (1,))


def test_it_is_no_table_where_its_choice_would_be_lost():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="table: expected a Table, or its rows"):
        epskernels.step(x, x, LOOPS["ddim"], 0)
    with pytest.raises(TypeError, match="tables: expected Tables"):
        epskernels.concat([LOOPS["ddim"]])


# ---- the command line ----


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_command_takes_a_window_and_a_cutoff(sampler, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    arguments = ["--sampler", sampler, "--steps", "4", "--seeds", "3,4", "--compare", "--quiet", "--out", str(out)]
    assert cli.main(["sample", *arguments, "--time-shift", "40,100"]) == 0
    assert f"{sampler}, 4 steps, 2 seeds" in (said := capsys.readouterr().out) and "window 40, cutoff 100" in said
    digits, saved = models.load(), np.load(out)
    options, path = {"prediction": digits.prediction, "window": 40, "cutoff": 100}, digits.schedule
    if sampler == "dpm_solver":
        path = schedule.KarrasSchedule(model=path)
    else:
        options |= digits.grid | ({"final": digits.final} if sampler == "ddim" else {})
    table = ShiftedTable(
        getattr(samplers, sampler), path, 4, **options | ({"clip": digits.clip} if sampler != "plms" else {})
    )
    for name, each in (("samples", table), ("baseline", table.table)):
        expected = epskernels.sample(digits.callable(), each, [3, 4], digits.shape)
        assert np.array_equal(saved[name], expected.numpy())
    assert not np.array_equal(saved["samples"], saved["baseline"])


@pytest.mark.parametrize("text", ["wide", "1.5", "30,300,1", ""])
def test_the_command_refuses_another_window(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--time-shift", text])
    assert f"expected WINDOW or WINDOW,CUTOFF, such as 30,300, got {text!r}" in capsys.readouterr().err


def test_the_command_says_what_the_table_says(capsys):
    assert cli.main(["sample", "--time-shift", "1"]) == 2
    assert re.search("window: expected an integer of at least 2, got 1", capsys.readouterr().err)
