"""benchmarks/bench_gpu.py where there is no GPU: it runs on the CPU, judges nothing, and refuses a wrong kernel."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import epskernels

PROGRAM = pathlib.Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_gpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(path, *arguments):
    command = [sys.executable, PROGRAM, "--device", "cpu", "--seconds", "1e-5", "--json", path, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EPSKERNELS_BACKEND": "auto"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_runs_on_the_cpu_and_judges_nothing(bench, tmp_path):
    done = start(tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"machine", "providers", "only", "ceilings", "results", "targets"}
    assert {"device", "torch", "triton", "python", "epskernels", "cuda_targets", "commit"} <= results["machine"].keys()
    assert results["ceilings"]["smallest kernel, seconds"] > 0

    found = {(tuple(r["shape"]), r["dtype"], r["feature"], r["how"], r["provider"]) for r in results["results"]}
    missing = results["providers"].keys()  # diffusers may be among them
    assert missing - {"diffusers"} == {bench.INDUCTOR, bench.REDUCE}
    plans = [(case, how, names) for case in bench.all_cases("cpu") for how, names in bench.plan(case, "cpu").items()]
    assert found == {(*case[:3], how, name) for case, how, names in plans for name in names if name not in missing}
    for row in results["results"]:
        assert row["device"] == "cpu" and row["error"] is None
        numbers = [row["seconds"], *row["quartiles"], row["bytes"], row["GB/s"], *sum(row["ratios"].values(), [])]
        assert all(0 < number < math.inf for number in numbers), row
        assert row["provider"] != "cpu" or row["how"] == "host" or row["feature"] == "normal" or row["copy_share"] > 0

    assert len(results["targets"]) == 6
    assert all(t["met"] is None and t["worst"] is None and t["claim"] and t["target"] for t in results["targets"])
    table = done.stdout.rsplit("written to", 1)[1].splitlines()[1:]
    assert len(table) <= 45 and sum(line.startswith("not measured") for line in table) == 6


def test_covers_every_shape_dtype_and_feature_within_45_lines(bench):
    cases = list(bench.all_cases("cuda"))
    assert len(set(cases)) == len(cases) == 6 * (2 * 6 + 2) + 8
    assert sum(bench.INDUCTOR in bench.plan(case, "cuda")["node"] for case in cases) == 6 * (2 * 3 + 2) + 4
    step = bench.Case((1, 4, 64, 64), "float32 of bfloat16", "guidance")
    assert step.bytes == 16384 * (4 + 4 + 2 + 2)


def test_a_provider_that_fails_is_in_the_results(bench, monkeypatch):
    def fail():
        raise RuntimeError("no such\nthing")

    calls_of = bench.calls_of
    monkeypatch.setattr(bench, "calls_of", lambda name, *rest: [fail] if name == "copy" else calls_of(name, *rest))
    case = next(bench.all_cases("cpu"))
    rows = bench.measure(case, "cpu", 60e6, 1e-5, {bench.INDUCTOR: "off", bench.REDUCE: "off", "diffusers": "off"}, {})
    errors = {(row["how"], row["provider"]): row["error"] for row in rows}
    assert errors.pop(("call", "copy")) == "RuntimeError: no such"
    assert set(errors.values()) == {None}


@pytest.mark.parametrize("output", ["out", "m0"])
def test_refuses_a_kernel_that_is_one_ulp_off(bench, monkeypatch, output):
    right = epskernels.step

    def wrong(*args, backend=None, **named):
        result = right(*args, backend=backend, **named)
        if backend != "reference" and named.get(output) is not None:
            written = named[output].view(-1)
            written[-1:] = torch.nextafter(written[-1:], torch.tensor(math.inf, dtype=written.dtype))
        return result

    bench.check_ours("cpu", "cpu")
    bench.check_functional("cpu")
    monkeypatch.setattr(epskernels, "step", wrong)
    with pytest.raises(AssertionError, match="cpu is not the reference"):
        bench.check_ours("cpu", "cpu")
    assert bench.who_is_missing("cpu", False)["cpu"].startswith("REFUSED before timing: AssertionError")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = start(tmp_path / "results.json", "--device", "cuda")
    assert done.returncode == 1 and "no GPU is available" in done.stderr
