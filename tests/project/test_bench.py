"""The benchmark suite's own program: its statistics, its comparison of runs, its page. No speed is asserted."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import harness  # noqa: E402


def bench(path, only, **environment):
    command = [sys.executable, FOLDER / "bench.py", "--only", only, "--json", path, "--passes", "2"]
    forced = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(part) for part in command], env=forced, capture_output=True, text=True)


deep = pytest.mark.deep  # the run measures for half a minute


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "run.json"
    done = bench(path, r"^(call|memory|batch|growth 10\^[456]|size plain into out, 10\^[34])")
    assert done.returncode == 0, done.stderr
    return path


@deep
def test_run(run):
    results = harness.load(run)
    assert {"processor", "versions", "commit", "command", "threads", "date"} <= results["machine"].keys()
    assert {row["group"] for row in results["rows"]} == {"call", "batch", "growth", "size"}
    for row in results["rows"]:
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high and row["rounds"] == 10
        assert row["met"] == (None if row["target"] is None else row["ratio"] <= row["target"])
    assert len({harness.key(row) for row in results["rows"]}) == len(results["rows"])
    assert all(exponent > 0 for exponent in results["growth"].values())


@deep
def test_memory_is_the_output_alone(run):
    rows = harness.load(run)["memory"]
    assert len(rows) == 18
    for row in rows:
        if row["form"] == "new tensor":
            assert row["allocations"] == 1 and row["peak_over_state"] == 1
        elif row["form"] == "out=":
            assert row["allocations"] == 0 and row["peak_over_state"] == 0


def compared(*runs):
    command = [sys.executable, FOLDER / "compare.py", *runs]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@deep
def test_a_slower_run_is_caught(run, tmp_path):
    """As EPSKERNELS_BENCH_TWICE=1 makes one; without a clock, so that no busy machine can fail it."""
    results, slower = harness.load(run), tmp_path / "slower.json"
    for row in results["rows"]:
        row["ratio"] *= 100
        row["interval"] = [100 * bound for bound in row["interval"]]
    harness.save(slower, results)
    count = len(results["rows"])
    done = compared(run, slower)
    assert done.returncode == 1 and done.stdout.count("SLOWER") == count
    assert f"{count} rows: {count} slower, 0 faster, 0 the same" in done.stdout
    back = compared(slower, run)
    assert back.returncode == 0 and f"0 slower, {count} faster" in back.stdout
    itself = compared(run, run)
    assert itself.returncode == 0 and "0 slower, 0 faster" in itself.stdout and "(100.0%)" in itself.stdout


def test_the_planted_slowdown_runs_ours_twice_and_the_peer_once(monkeypatch):
    monkeypatch.setattr(harness, "TWICE", True)
    calls = {"ours": 0, "peer": 0}

    def make():
        def run(name):
            calls[name] += 1
            time.sleep(1e-3)

        return {name: functools.partial(run, name) for name in calls}

    block = harness.time_block(harness.Comparison("g", "n", make), rounds=1, seconds=0)
    assert calls == {"ours": 2 * 9, "peer": 9} and set(block) == set(calls)


def row(ratio, low, high):
    return {"group": "g", "name": "n", "peer": "p", "ratio": ratio, "interval": [low, high]}


@pytest.mark.parametrize(
    "old, new, said",
    [
        ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "slower"),
        ((1.0, 0.9, 1.1), (0.7, 0.6, 0.8), "faster"),
        ((1.0, 0.9, 1.1), (1.15, 1.05, 1.25), "same"),
        ((1.0, 0.999, 1.001), (1.01, 1.009, 1.011), "same"),
    ],
)
def test_verdict(old, new, said):
    assert compare.verdict(row(*old), row(*new)) == said


def test_interval_of_a_ratio():
    rng = np.random.default_rng(1)
    peer = 1 + 0.01 * rng.standard_normal((5, 7))
    ratio, (low, high) = harness.ratio_of(0.5 * peer * (1 + 0.02 * rng.standard_normal((5, 7))), peer)
    assert low <= ratio <= high and abs(ratio - 0.5) < 0.01 and high - low < 0.03
    shifted = np.array([0.9, 0.95, 1.0, 1.05, 1.1])[:, None] * peer  # blocks that differ
    ratio, (low, high) = harness.ratio_of(shifted, peer)
    assert low < 0.97 and high > 1.03


def test_other_schemas_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="expected schema 1, got 99"):
        harness.load(path)


def report(run, docs):
    command = [sys.executable, FOLDER / "report.py", run, "--docs", docs]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@deep
def test_report(run, tmp_path):
    for docs in (tmp_path, tmp_path / "again"):
        docs.mkdir(exist_ok=True)
        done = report(run, docs)
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "benchmarks.md").read_text()
    assert "run.json" in page and "## Memory of a call" in page and "Not measured: the run left it out" in page
    for plot in ("share_of_copy", "beside_compile", "by_batch", "by_size"):
        assert (tmp_path / "benchmarks" / f"{plot}.svg").stat().st_size > 5000 and f"{plot}.svg" in page
        assert (tmp_path / "benchmarks" / f"{plot}.svg").read_bytes() == (
            docs / "benchmarks" / f"{plot}.svg"
        ).read_bytes()


def test_results_that_are_not_there(tmp_path):
    """As before the first `make bench`."""
    kept, missing = FOLDER / "results" / "cpu.json", tmp_path / "latest.json"
    for done in (report(missing, tmp_path), compared(kept, missing), compared(missing, kept)):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"error: no results at {missing}: `make bench` writes benchmarks/results/latest.json" in done.stderr
        assert not list(tmp_path.iterdir())
