"""The benchmarks' own programs: their statistics, comparison of runs, page; on a GPU; the load test. No speed is asserted."""

import argparse
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import epskernels

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import harness  # noqa: E402
import load_test  # noqa: E402
import report as report_program  # noqa: E402
from load_test import OURS, PEER, Setting, Workload  # noqa: E402


def bench(path, only, **environment):
    command = [sys.executable, FOLDER / "bench.py", "--only", only, "--json", path, "--passes", "2"]
    forced = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(part) for part in command], env=forced, capture_output=True, text=True)


deep = pytest.mark.deep  # the run measures for half a minute


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "run.json"
    done = bench(path, r"^(call|memory|batch|growth: 10\^[456]|size: plain into out, 10\^[34])")
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
    import bench

    rows = harness.load(run)["memory"]
    forms = ("new tensor", "out=", "eager PyTorch")
    assert {(row["feature"], row["form"]) for row in rows} == {
        (name, form) for name in bench.FEATURES for form in forms
    }
    assert len(rows) == len(forms) * len(bench.FEATURES)
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


def test_a_part_that_is_not_there_is_refused(capsys):
    names, parser = ["size: plain", "size: noise", "real model: ddim", "memory"], argparse.ArgumentParser()
    assert harness.asked(parser, "^size", names) == names[:2] and harness.asked(parser, "", names) == names
    with pytest.raises(SystemExit) as stop:
        harness.asked(parser, "By size", names)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.endswith("got 'By size'; there are: size; real model; memory\n")


@deep
@pytest.mark.parametrize(
    "program, name", [("bench.py", "; real model; "), ("bench_diffusers.py", "; DDIM; "), ("bench_gpu.py", " float32 noise; ")]
)  # fmt: skip
def test_a_program_refuses_it_before_anything_is_measured(program, name, tmp_path):
    path, here = tmp_path / "run.json", ["--device", "cpu"] if program == "bench_gpu.py" else []
    command = [sys.executable, str(FOLDER / program), "--only", "By feature", "--json", str(path), *here]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not path.exists() and done.stdout == ""
    assert "got 'By feature'; there are: " in done.stderr and name in done.stderr


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
    for plot in ("share_of_copy", "beside_compile", "by_size"):
        assert (tmp_path / "benchmarks" / f"{plot}.svg").stat().st_size > 5000 and f"{plot}.svg" in page
        assert (tmp_path / "benchmarks" / f"{plot}.svg").read_bytes() == (
            docs / "benchmarks" / f"{plot}.svg"
        ).read_bytes()


def test_the_page_and_its_plots_are_of_the_run_that_is_kept(tmp_path):
    """Titles are made of the run's numbers, also where these are others, or fewer."""
    run, results = FOLDER / "results" / "cpu.json", harness.load(FOLDER / "results" / "cpu.json")
    plots = report_program.draw(results, tmp_path)
    page = "\n".join(report_program.page(results, run.relative_to(FOLDER.parent), plots)) + "\n"
    assert page == (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == set(plots)
    assert set(plots) == {path.name for path in (FOLDER.parent / "docs" / "benchmarks").iterdir()}
    drawn = (tmp_path / "beside_compile.svg").read_text()
    rows = [row for row in results["rows"] if row["group"] == "scheduler"]
    said = f"{report_program.times([row['ratio'] for row in rows])} as fast as"
    assert said in drawn and said in plots["beside_compile.svg"]
    rows[0]["ratio"] = 1 / 98.7
    rows[0]["interval"] = [1 / 99, 1 / 98]
    results["rows"] = [
        row for row in results["rows"] if row["axes"].get("feature") != "plain" and row["group"] != "batch"
    ]
    others = report_program.draw(results, tmp_path)
    assert "to 99 times as fast as diffusers'" in others["beside_compile.svg"]
    assert "without noise" not in others["beside_compile.svg"] and "samples" not in others["by_size.svg"]
    assert report_program.draw({**results, "rows": []}, tmp_path) == {}


@pytest.mark.parametrize(
    "ratios, said", [([0.5, 0.08], "2 to 12 times"), ([0.97], "1 times"), ([2.0, 0.3], "0.5 to 3.3 times")]
)
def test_how_many_times(ratios, said):
    assert report_program.times(ratios) == said


@pytest.mark.deep
def test_results_that_are_not_there(tmp_path):
    """As before the first `make bench`."""
    kept, missing = FOLDER / "results" / "cpu.json", tmp_path / "latest.json"
    for done in (report(missing, tmp_path), compared(kept, missing), compared(missing, kept)):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"error: no results at {missing}: `make bench` writes benchmarks/results/latest.json" in done.stderr
        assert not list(tmp_path.iterdir())


# ---- bench_gpu.py where there is no GPU: it runs on the CPU, judges nothing, and refuses a wrong kernel ----

PROGRAM = FOLDER / "bench_gpu.py"


@pytest.fixture
def bench_gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(path, *arguments):
    command = [sys.executable, PROGRAM, "--device", "cpu", "--seconds", "1e-5", "--json", path, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EPSKERNELS_BACKEND": "auto"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_runs_on_the_cpu_and_judges_nothing(bench_gpu, tmp_path):
    done = start(tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"machine", "providers", "only", "ceilings", "results", "targets", "complete"}
    assert results["complete"]
    assert {"device", "torch", "triton", "python", "epskernels", "cuda_targets", "commit"} <= results["machine"].keys()
    assert results["ceilings"]["smallest kernel, seconds"] > 0

    found = {(tuple(r["shape"]), r["dtype"], r["feature"], r["how"], r["provider"]) for r in results["results"]}
    missing = results["providers"].keys()  # diffusers may be among them
    assert missing - {"diffusers"} == {bench_gpu.INDUCTOR, bench_gpu.REDUCE}
    plans = [
        (case, how, names) for case in bench_gpu.all_cases("cpu") for how, names in bench_gpu.plan(case, "cpu").items()
    ]
    assert found == {(*case[:3], how, name) for case, how, names in plans for name in names if name not in missing}
    for row in results["results"]:
        assert row["device"] == "cpu" and row["error"] is None
        numbers = [row["seconds"], *row["quartiles"], row["bytes"], row["GB/s"], *sum(row["ratios"].values(), [])]
        assert all(0 < number < math.inf for number in numbers), row
        assert row["provider"] != "cpu" or row["how"] == "host" or row["feature"] == "normal" or row["copy_share"] > 0

    assert len(results["targets"]) == 7
    assert all(t["met"] is None and t["worst"] is None and t["claim"] and t["target"] for t in results["targets"])
    table = done.stdout.rsplit("written to", 1)[1].splitlines()[1:]
    assert len(table) <= 45 and sum(line.startswith("not measured") for line in table) == 7


def test_covers_every_shape_dtype_and_feature_within_45_lines(bench_gpu):
    cases = list(bench_gpu.all_cases("cuda"))
    assert len(set(cases)) == len(cases) == 6 * (2 * 7 + 2) + 8
    assert sum(bench_gpu.INDUCTOR in bench_gpu.plan(case, "cuda")["node"] for case in cases) == 6 * (2 * 4 + 2) + 4
    step = bench_gpu.Case((1, 4, 64, 64), "float32 of bfloat16", "guidance")
    assert step.bytes == 16384 * (4 + 4 + 2 + 2)


@pytest.mark.deep
def test_goes_on_with_what_is_left(bench_gpu, tmp_path):
    """Cut short after no case, then all of them; what failed comes last, and again; another machine's results are refused."""
    path, only = tmp_path / "results.json", ("--only", r"^\(1, 4, 4, 4\) float32 (plain|noise)")
    assert start(path, *only, "--stop-after", "0").returncode == 1
    assert json.loads(path.read_text()) | {"results": []} == json.loads(path.read_text()) | {"complete": False}
    done = start(path, *only, "--resume")
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    assert results["complete"] and {row["feature"] for row in results["results"]} == {"plain", "noise"}

    plain, noise = (
        case
        for case in bench_gpu.all_cases("cpu")
        if case.name in ("(1, 4, 4, 4) float32 plain", "(1, 4, 4, 4) float32 noise")
    )
    rows = [row | {"shape": tuple(row["shape"])} for row in results["results"]]
    assert bench_gpu.left(rows, [plain, noise]) == []
    rows[0]["error"] = "not compiled"
    other = plain._replace(dtype="bfloat16")
    assert bench_gpu.left(rows, [plain, noise, other]) == [other, plain]

    path.write_text(json.dumps(results | {"machine": results["machine"] | {"torch": "2.0"}}))
    with pytest.raises(SystemExit, match=f"{path} has torch '2.0', and this is"):
        bench_gpu.resumed(path, bench_gpu.machine("cpu"))


def test_a_provider_that_fails_is_in_the_results(bench_gpu, monkeypatch):
    def fail():
        raise RuntimeError("no such\nthing")

    calls_of = bench_gpu.calls_of
    monkeypatch.setattr(bench_gpu, "calls_of", lambda name, *rest: [fail] if name == "copy" else calls_of(name, *rest))
    case = next(bench_gpu.all_cases("cpu"))
    rows = bench_gpu.measure(
        case, "cpu", 60e6, 1e-5, {bench_gpu.INDUCTOR: "off", bench_gpu.REDUCE: "off", "diffusers": "off"}, {}
    )
    errors = {(row["how"], row["provider"]): row["error"] for row in rows}
    assert errors.pop(("call", "copy")) == "RuntimeError: no such"
    assert set(errors.values()) == {None}


@pytest.mark.parametrize("output", ["out", "m0"])
def test_refuses_a_kernel_that_is_one_ulp_off(bench_gpu, monkeypatch, output):
    right = epskernels.step

    def wrong(*args, backend=None, **named):
        result = right(*args, backend=backend, **named)
        if backend != "reference" and named.get(output) is not None:
            written = named[output].view(-1)
            written[-1:] = torch.nextafter(written[-1:], torch.tensor(math.inf, dtype=written.dtype))
        return result

    bench_gpu.check_ours("cpu", "cpu")
    bench_gpu.check_functional("cpu")
    monkeypatch.setattr(epskernels, "step", wrong)
    with pytest.raises(AssertionError, match="cpu is not the reference"):
        bench_gpu.check_ours("cpu", "cpu")
    assert bench_gpu.who_is_missing("cpu", False)["cpu"].startswith("REFUSED before timing: AssertionError")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = start(tmp_path / "results.json", "--device", "cuda")
    assert done.returncode == 1 and "no GPU is available" in done.stderr


# ---- the load test, on a handful of requests ----


def a_load_test(test):
    quiet = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under NumPy 2
    return pytest.mark.usefixtures("one_thread")(quiet(test))


SETTINGS = [Setting("ddim", 4, 1.01, 2.0), Setting("dpmpp_2m", 5), Setting("ddpm", 6, 0.99)]


def workload(model=load_test.small_model):
    return Workload("tiny", model, (1, 8, 8), 3, True, SETTINGS, 9, {PEER: (0.9,)}, 2)


@a_load_test
def test_measures_both_sides():
    result = load_test.measure(workload())
    assert [row["arrivals"] for row in result["rows"]] == ["all at once", "Poisson, 0.9 of the throughput of diffusers"]
    for row in result["rows"]:
        for side in (row[OURS], row[PEER]):
            assert side["requests"] == 18 and len(side["throughput_of_rounds"]) == 2
            assert 0 < side["latency_ms"]["p50"] <= side["latency_ms"]["p95"] <= side["latency_ms"]["p99"]
            assert 1 <= side["mean_batch"] <= 3
            assert 0 < side["tick_ms"]["model"] + side["tick_ms"]["step"] <= side["tick_ms"]["tick"]


@a_load_test
@pytest.mark.parametrize("side", [OURS, PEER])
def test_a_side_that_computes_something_else_is_caught(side, monkeypatch):
    class Wrong(load_test.CONTENDERS[side]):
        def step(self, f, v, u):
            super().step(1.01 * f, v, u)

    monkeypatch.setitem(load_test.CONTENDERS, side, Wrong)
    with pytest.raises(AssertionError):
        load_test.check(workload())


@a_load_test
def test_the_same_requests_arrive_on_both_sides():
    sides = [[*workload().requests(side, np.random.default_rng(1))] for side in (OURS, PEER)]
    for a, b in zip(*sides, strict=True):
        assert a.seed == b.seed and torch.equal(a.table.rows, b.table.rows) and b.setting.steps == len(b.table)
