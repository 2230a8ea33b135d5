"""The GPU benchmark's own program, on the CPU: what it writes, and that it refuses to time a kernel that is wrong."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

import epskernels

PROGRAM = pathlib.Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"


def bench(folder, *options):
    report = folder / "report.json"
    command = [sys.executable, PROGRAM, "--device", "cpu", "--seconds", "0.0002", "--json", report, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done, json.loads(report.read_text())


def test_report(tmp_path):
    done, report = bench(tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(report) == {"machine", "providers", "only", "ceilings", "results", "targets"}
    assert {"device", "torch", "triton", "epskernels", "cuda_targets", "commit"} <= set(report["machine"])
    rows = report["results"]
    assert {row["feature"] for row in rows} == {
        "plain", "noise", "guidance", "history", "guidance+noise", "learned", "normal",
    }  # fmt: skip
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float32 of bfloat16"}
    assert all(row["device"] == "cpu" and row["error"] is None for row in rows)
    for row in rows:
        numbers = [row["seconds"], row["GB/s"], row["bytes"], *row["quartiles"], *sum(row["ratios"].values(), [])]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        if row["provider"] == "cpu" and row["how"] == "call" and row["feature"] != "normal":
            assert {"copy", "torch.add"} <= set(row["ratios"])
            assert row["copy_share"] == pytest.approx(1 / row["ratios"]["copy"][1])
    assert report["providers"]["inductor reduce-overhead"] == "needs a GPU"
    assert report["ceilings"]["smallest kernel, seconds"] > 0
    assert len(report["targets"]) == 6
    assert all(target["met"] is None and target["worst"] is None for target in report["targets"])
    assert "not measured cpu: deterministic step" in done.stdout and len(done.stdout.splitlines()[-46:]) <= 46


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAM)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "no GPU is available to torch" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("bench_gpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_gpu"]


def off_by_one_ulp(step):
    def wrong(x, *args, backend=None, **kwargs):
        result = step(x, *args, backend=backend, **kwargs)
        if backend != "reference":
            result.view(-1)[-1:] = result.view(-1)[-1:].nextafter(torch.tensor(math.inf, dtype=result.dtype))
        return result

    return wrong


def test_a_kernel_off_by_one_ulp_is_refused_before_timing(program, monkeypatch):
    program.check_ours("cpu", "cpu")
    monkeypatch.setattr(epskernels, "step", off_by_one_ulp(epskernels.step))
    with pytest.raises(AssertionError, match="cpu is not the reference"):
        program.check_ours("cpu", "cpu")
    assert program.who_is_missing("cpu", False)["cpu"].startswith("REFUSED before timing: AssertionError: cpu is not")


def test_a_target_is_met_only_by_all_of_its_comparisons(program):
    """As a GPU's rows would be judged."""
    rows = []
    for case in program.all_cases("cuda"):
        for how, names in program.plan(case, "cuda").items():
            ratios = {name: [0.9, 1.0, 1.05] for name in names if name != "cuda"}
            row = {"shape": case.shape, "dtype": case.dtype, "feature": case.feature, "how": how}
            rows.append(row | {"provider": "cuda", "ratios": ratios})

    def verdicts(rows):
        return {t["claim"]: t["met"] for t in program.judge(rows, "cuda", {}) if t["claim"].startswith("cuda")}

    claims = verdicts(rows)
    assert [met for claim, met in claims.items() if "copy bandwidth" in claim] == [True] * 3
    assert claims["cuda: small latents, time of diffusers' scheduler.step over ours"] is False
    without_one = [row for row in rows if not (row["shape"] == (256, 3, 256, 256) and row["feature"] == "plain")]
    assert verdicts(without_one)["cuda: deterministic step, state of 64 MB or more, share of copy bandwidth"] is None
    slow = next(row for row in rows if row["shape"] == (256, 3, 256, 256) and row["feature"] == "plain")
    slow["ratios"] = slow["ratios"] | {"copy": [1.1, 1.2, 1.3]}
    assert verdicts(rows)["cuda: deterministic step, state of 64 MB or more, share of copy bandwidth"] is False
