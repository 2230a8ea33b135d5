"""The load test's own program, on a handful of requests. No speed is asserted."""

import pathlib
import sys

import numpy as np
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import load_test  # noqa: E402
from load_test import OURS, PEER, Setting, Workload  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers under NumPy 2
]
SETTINGS = [Setting("ddim", 4, 1.01, 2.0), Setting("dpmpp_2m", 5), Setting("ddpm", 6, 0.99)]


def workload(model=load_test.small_model):
    return Workload("tiny", model, (1, 8, 8), 3, True, SETTINGS, 9, {PEER: (0.9,)}, 2)


def test_measures_both_sides():
    result = load_test.measure(workload())
    assert [row["arrivals"] for row in result["rows"]] == ["all at once", "Poisson, 0.9 of the throughput of diffusers"]
    for row in result["rows"]:
        for side in (row[OURS], row[PEER]):
            assert side["requests"] == 18 and len(side["throughput_of_rounds"]) == 2
            assert 0 < side["latency_ms"]["p50"] <= side["latency_ms"]["p95"] <= side["latency_ms"]["p99"]
            assert 1 <= side["mean_batch"] <= 3
            assert 0 < side["tick_ms"]["model"] + side["tick_ms"]["step"] <= side["tick_ms"]["tick"]


@pytest.mark.parametrize("side", [OURS, PEER])
def test_a_side_that_computes_something_else_is_caught(side, monkeypatch):
    class Wrong(load_test.CONTENDERS[side]):
        def step(self, f, v, u):
            super().step(1.01 * f, v, u)

    monkeypatch.setitem(load_test.CONTENDERS, side, Wrong)
    with pytest.raises(AssertionError):
        load_test.check(workload())


def test_the_same_requests_arrive_on_both_sides():
    sides = [[*workload().requests(side, np.random.default_rng(1))] for side in (OURS, PEER)]
    for a, b in zip(*sides, strict=True):
        assert a.seed == b.seed and torch.equal(a.table.rows, b.table.rows) and b.setting.steps == len(b.table)
