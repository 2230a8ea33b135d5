"""gpu-check where there is no GPU: what a cut-off leaves, how it goes on, what it predicts, and its Python on a stand-in."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from ..gpu import figures, gpu_check
from ..support.markdown_examples import ROOT

MACHINE = {
    "gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "max SM clock, MHz": 1980, "torch": "2.11.0",
    "triton": "3.6.0", "commit": "0123456789abcdef",
}  # fmt: skip
PYTHON = [sys.executable, "-c"]


@pytest.fixture
def sources(monkeypatch):
    """Of the package, as digest sees them: change the value and they have changed."""
    found = {"": "as they are"}
    monkeypatch.setattr(gpu_check, "digest", lambda *patterns: found[""] + "".join(found.get(p, "") for p in patterns))
    return found


def check(folder, parts=("build", "bits", "memcheck"), seconds=600, **changed):
    return gpu_check.Check(folder, time.monotonic() - gpu_check.START + seconds, parts, MACHINE | changed)


def state(folder):
    return json.loads((folder / "gpu-nvidia-h200.json").read_text())


def test_what_passed_is_not_run_again_until_it_changes(tmp_path, sources):
    counted = [*PYTHON, f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"]
    runs = []
    for change in ({}, {"": "changed"}, {"read": "changed too"}, {"other": "not read"}):
        sources |= change
        for _ in range(2):
            check(tmp_path).part("build", counted, ("read",))
        runs.append(len((tmp_path / "runs").read_text()))
    assert runs == [1, 2, 3, 3]
    check(tmp_path, torch="2.12.0").part("build", counted, ("read",))
    assert len((tmp_path / "runs").read_text()) == 4, "another torch is another machine"


def test_what_failed_is_run_again(tmp_path, sources):
    for command, passed in (("raise SystemExit('it broke')", False), ("print('mended')", True)):
        check(tmp_path).part("build", [*PYTHON, command])
        assert state(tmp_path)["parts"]["build"]["passed"] is passed
    assert state(tmp_path)["parts"]["build"]["last_line"] == "mended"


def test_a_part_ends_at_its_limit_with_its_children(tmp_path, sources):
    command = "import subprocess, sys; print('begun', flush=True); "
    command += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    check(tmp_path, seconds=2).part("memcheck", [*PYTHON, command])
    assert time.monotonic() - begin < 20
    found = state(tmp_path)["parts"]["memcheck"]
    assert found["passed"] is None and found["last_line"] == "begun"
    check(tmp_path, seconds=0).part("bits", [*PYTHON, "pass"])
    assert state(tmp_path)["parts"]["bits"] | {"digest": ""} == {
        "passed": None, "seconds": 0.0, "last_line": "no time was left", "digest": "",
    }  # fmt: skip


def test_cut_off_it_keeps_what_there_is(tmp_path, sources):
    """By a signal, whose handler ends what runs; and without one, what was running is in the state."""
    checking = check(tmp_path)
    checking.part("build", [*PYTHON, "print('built')"])
    thread = threading.Thread(target=checking.part, args=("bits", [*PYTHON, "import time; time.sleep(60)"]))
    thread.start()
    while not checking.running:
        time.sleep(0.01)
    assert state(tmp_path)["parts"]["bits"]["last_line"] == "it was running when gpu-check was cut off"
    checking.cut()
    thread.join(20)
    assert not thread.is_alive()
    parts = state(tmp_path)["parts"]
    assert parts["build"]["passed"] is True and parts["bits"]["passed"] is None
    assert "| bits | passes | unfinished |" in (tmp_path / "gpu-nvidia-h200.md").read_text()


@pytest.mark.deep
def test_tests_that_passed_are_left_out(tmp_path, sources, monkeypatch):
    """By what pytest reported of each as it ended; a line that a kill left unfinished is none."""
    checking, file = check(tmp_path), "tests/ops/test_spec.py"
    before = {
        "test_the_build_s_header_needs_nothing_installed": ("passed", "now"),
        "test_the_header_has_columns_terms_and_constants": ("failed", "now"),
        "test_columns_and_terms_that_files_and_programs_hold": ("passed", "then"),
    }
    lines = [
        json.dumps({"id": f"{file}::{test}", "outcome": outcome, "digest": of})
        for test, (outcome, of) in before.items()
    ]
    checking.outcomes.write_text("\n".join([*lines, lines[2].replace("then", "now")[:-1]]) + "\n")
    monkeypatch.setitem(gpu_check.TESTS, "bits", [f"{file}::{test}" for test in before])
    monkeypatch.setattr(gpu_check, "digest", lambda *patterns: "now")
    checking.tests("bits", "-n", "0")
    assert checking.parts["bits"]["passed"] is True
    assert "2 passed, 1 deselected" in (tmp_path / "gpu-nvidia-h200.log").read_text()
    known = gpu_check.read_outcomes(checking.outcomes)
    assert len(known) == 3 and {outcome["outcome"] for outcome in known.values()} == {"passed"}


# ---- what is predicted ----


def row(feature, dtype, provider, seconds, shape=(256, 3, 256, 256), size=4, tensors=3):
    moved = tensors * size * 256 * 3 * 256 * 256
    return {
        "feature": feature,
        "dtype": dtype,
        "shape": shape,
        "provider": provider,
        "how": "node",
        "seconds": seconds,
        "bytes": moved,
    }


def test_figures():
    """By hand: 604 MB at 4.8 TB/s; 50.3 million elements of 68.8 instructions on 132 multiprocessors of 128 lanes at 1.98 GHz."""
    budget = {"x and f, float32": {"instructions": 29.9}, "with noise, bfloat16": {"instructions": 68.8}}
    rows = [
        row("plain", "float32", "cuda", 150e-6),
        row("plain", "float32", "copy", 140e-6),
        row("plain", "float32", "triton", None),
    ]
    rows += [
        row("noise", "bfloat16", "cuda", 130e-6, size=2),
        row("plain", "float32", "cuda", 1e-6, shape=(1, 4, 64, 64)),
    ]
    found = {each["figure"]: each for each in figures.rows(MACHINE, budget, {"results": rows})}
    plain, noise = found["x and f, float32"], found["with noise, bfloat16"]
    assert plain["bound by"] == "memory" and plain["predicted"] == pytest.approx(603979776 / 4.8e12)
    assert noise["bound by"] == "issue" and noise["predicted"] == pytest.approx(50331648 * 68.8 / (132 * 128 * 1.98e9))
    assert (plain["cuda"], plain["triton"], plain["copy"], noise["cuda"]) == (150e-6, None, 140e-6, 130e-6)
    assert found["normal, float32"]["bound by"] == "not measured"
    page = figures.page(MACHINE, {}, found.values(), [])
    assert "| x and f, float32 | (256, 3, 256, 256) | memory | 125.8 | 150.0 (1.19) | - (-) | 140.0 (1.11) |" in page
    (other,) = [
        each for each in figures.rows(MACHINE | {"gpu": "GeForce"}, budget, {"results": rows[:1]}) if each["shape"]
    ]
    assert other["predicted"] is None and other["bound by"] == "its data sheet is not listed"


# ---- on the stand-in ----


def run(command, environment, root=ROOT):
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_the_stand_in_runs_tests_of_the_gpu(tmp_path):
    """The first case of each, with the CUDA kernel's own source: a graph's replays, and no waiting."""
    environment = gpu_check.dry_environment()
    (tmp_path / "done").write_text("[]")
    environment |= {
        "EPSKERNELS_GPU_OUTCOMES": str(tmp_path / "outcomes"),
        "EPSKERNELS_GPU_DONE": str(tmp_path / "done"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.gpu.gpu_check",
        "-p",
        "no:cacheprovider",
        "tests/gpu/test_gpu.py",
    ]
    wanted = [
        "test_a_captured_step_replays_a_whole_trajectory",
        "test_graphed_sampler_of_a_doubled_batch",
        "test_never_waits",
    ]
    done = run([*command, "-k", " or ".join(wanted)], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = gpu_check.read_outcomes(tmp_path / "outcomes")
    assert len(outcomes) == 3 and {outcome["outcome"] for outcome in outcomes.values()} == {"passed"}


ON_ROCM = """
import torch, epskernels
from epskernels import build, samplers, schedule
assert torch.zeros(1, device="cuda").device.type == "cuda" and torch.version.cuda is None
table, x, seeds = samplers.ddpm(schedule.linear(), 5), torch.randn(2, 3, 4), torch.arange(2)
there = epskernels.step(x.cuda(), x.cuda(), table.to("cuda"), 1, seeds=seeds.cuda())
assert there.is_cuda and torch.equal(there.cpu(), epskernels.step(x, x, table, 1, seeds=seeds))
assert torch.equal(epskernels.normal([1], (3,), device="cuda").cpu(), epskernels.normal([1], (3,)))
try:
    epskernels.step(x.cuda(), x.cuda(), table.to("cuda"), 1, seeds=seeds.cuda(), backend="cuda")
except RuntimeError as error:
    assert "is missing: this torch" in str(error) and "is ROCm's: on AMD's GPUs the Triton kernel runs" in str(error)
else:
    raise AssertionError("a kernel for NVIDIA's GPUs on AMD's")
assert "libepskernels_cuda.so" not in open("/proc/self/maps").read()
"""


@pytest.mark.deep
def test_a_torch_for_amd_runs_the_triton_kernel():
    """Its tensors say "cuda", its torch.version.cuda is None, and nvcc would be of no use."""
    environment = gpu_check.dry_environment() | {"EPSKERNELS_STAND_IN_ROCM": "1", "EPSKERNELS_LOG": "debug"}
    done = run([sys.executable, "-c", ON_ROCM], environment)
    assert done.returncode == 0, done.stderr
    assert "step on cuda:0 runs on the Triton kernel, by default" in done.stderr
    assert "cuda tensors run on the Triton kernel: this torch (" in done.stderr and "reference" not in done.stderr
    told = run([sys.executable, "-m", "epskernels", "info"], environment | {"EPSKERNELS_LOG": ""})
    assert told.returncode == 0 and "GPU 0: stand-in, gfx942:sramecc+:xnack-\n" in told.stdout, told.stderr
    assert "  triton     available\n" in told.stdout and "nvcc" not in told.stdout
    assert "by default: cpu for CPU tensors, triton for CUDA tensors, which ROCm's are\n" in told.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run([sys.executable, "-m", "tests.gpu.gpu_check"], os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "no GPU is available to torch; `make gpu-check-dry`" in done.stderr
    done = run(
        [sys.executable, "-m", "tests.gpu.gpu_check", "--parts", "bits,speed"], os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and "--parts: expected some of build, predicted, bits" in done.stderr


@pytest.mark.deep
@pytest.mark.skipif(
    not shutil.which("nvcc"), reason="nvcc is not on this machine: the CUDA library is not compiled here"
)
def test_the_whole_of_it_on_the_stand_in(tmp_path):
    """Every part, in a copy of the sources, from their build to the table; and again, when nothing is left to do."""
    skipped = shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info", "*.so", "*built*.txt", "docs")
    copy, tools = shutil.copytree(ROOT, tmp_path / "sources", ignore=skipped), os.path.dirname(sys.executable)
    environment = os.environ | {"PYTHONPATH": str(copy), "PATH": os.pathsep.join([tools, os.environ["PATH"]])}
    command = [sys.executable, "-m", "tests.gpu.gpu_check", "--dry-run", tmp_path / "results"]
    done = run(command, environment, copy)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    found = json.loads((tmp_path / "results" / "gpu-stand-in.json").read_text())
    assert found["parts"].keys() == gpu_check.LIMITS.keys() and all(part["passed"] for part in found["parts"].values())
    assert found["benchmark"]["complete"] and found["instructions"]["with noise, bfloat16"]["instructions"] > 50
    begin = time.monotonic()
    again = run(command, environment, copy)
    assert again.returncode == 0 and again.stdout.count("passed before") == len(gpu_check.LIMITS)
    assert time.monotonic() - begin < 120
