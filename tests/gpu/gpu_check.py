"""Everything that needs a GPU, in one command: build for this GPU, tests, compute-sanitizer, benchmark; results as JSON.

    make gpu-check [RESULTS=FOLDER]        # or: python tests/gpu/gpu_check.py FOLDER

Uses the Python that runs it, with the torch, triton, CMake, Ninja, pybind11 and pytest installed there, and no network; the
kernels are built into the source tree. Writes FOLDER/gpu-NAME.json, and a log of each stage beside it. Exit status 1 where a
stage fails.
"""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def run(folder, name, command, limit, **environment):
    """Runs one stage with its output in a log; returns {passed, seconds, last line, log}."""
    say(f"{name}: {' '.join(str(part) for part in command)}")
    begin, log = time.monotonic(), folder / f"{name}.log"
    with log.open("w") as output:
        try:
            status = subprocess.run(
                [str(part) for part in command], cwd=ROOT, env={**ENVIRONMENT, **environment}, stdout=output,
                stderr=subprocess.STDOUT, timeout=limit,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    stage = {"passed": status == 0, "seconds": round(time.monotonic() - begin, 1), "status": status}
    stage["last_line"] = lines[-1] if lines else ""
    say(f"{name}: {'passed' if status == 0 else 'FAILED'} in {stage['seconds']} s: {stage['last_line']}")
    if status != 0:
        print("\n".join(lines[-60:]), flush=True)
    return stage


def machine():
    properties = torch.cuda.get_device_properties(0)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"nvidia-smi: {error}"
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "driver, max SM clock, max memory clock, power limit": driver,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__
        if importlib.util.find_spec("triton")
        else "not installed",
        "cuda": torch.version.cuda,
        "commit": commit + ("+changes" if changed else ""),
    }


def counted(path):
    """{tests, failures, skipped, ...} of a JUnit file."""
    if not path.exists():
        return {}
    suites = xml.etree.ElementTree.parse(path).getroot().iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    return counts


def pytest_stage(folder, name, tests, limit, *options):
    report = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *options, *tests]
    stage = run(folder, name, command, limit, EPSKERNELS_TEST_KERNELS="cuda,triton")
    stage["counts"] = counted(report)
    report.unlink(missing_ok=True)
    return stage


def sanitize_stage(folder, tool):
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not found:
        say(f"{tool}: compute-sanitizer is not on this machine")
        return {"passed": None, "last_line": "compute-sanitizer is not on this machine"}
    command = [
        found,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.gpu.gpu_sanitize",
        "cuda",
        "triton",
    ]
    return run(folder, tool, command, 300, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def main():
    if not torch.cuda.is_available():
        raise SystemExit("gpu-check: no GPU is available to torch; `make test` checks what can be checked without one")
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "benchmarks" / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    name = re.sub(r"\W+", "-", about["gpu"].lower()).strip("-")
    results = {"machine": about, "stages": {}, "benchmark": None}
    stages = results["stages"]
    say(json.dumps(about))

    architecture = about["capability"].replace(".", "")
    switches = {
        "EPSKERNELS_BUILD": "1",
        "EPSKERNELS_CUDA": "1",
        "EPSKERNELS_CUDA_ARCHITECTURES": f"{architecture}-real",
    }
    stages["build"] = run(folder, "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 300, **switches)
    if stages["build"]["passed"]:
        workers = min(8, os.cpu_count() or 1)
        options = ("-m", "", *(("-n", str(workers)) if importlib.util.find_spec("xdist") else ()))
        matrix = ["test_step_bits", "test_noise", "test_rows_on_device", "test_triton", "test_cuda_build"]
        matrix = [f"tests/ops/{test}.py" for test in matrix]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            started = {"tests": pool.submit(pytest_stage, folder, "tests", matrix, 420, *options)}
            started |= {tool: pool.submit(sanitize_stage, folder, tool) for tool in SANITIZERS}
            stages.update({stage: future.result() for stage, future in started.items()})
        stages["gpu_tests"] = pytest_stage(
            folder, "gpu_tests", [str(path) for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))], 400
        )
        report = folder / "benchmark.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, "benchmarks/bench_gpu.py", "--json", report]
        stages["benchmark"] = run(folder, "benchmark", command, 300)
        if report.exists():
            results["benchmark"] = json.loads(report.read_text())
            report.unlink()

    target = folder / f"gpu-{name}.json"
    target.write_text(json.dumps(results, indent=1) + "\n")
    if (folder / "benchmark.log").exists():
        print((folder / "benchmark.log").read_text())
    print(f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit'][:12]}")
    for stage, result in stages.items():
        passed = {True: "passed", False: "FAILED", None: "not run"}[result["passed"]]
        print(
            f"  {stage:<10} {passed:<8} {result.get('seconds', 0):6.1f} s  {result.get('counts') or result['last_line'][:90]}"
        )
    say(f"results in {target}")
    sys.exit(any(result["passed"] is False for result in stages.values()))


if __name__ == "__main__":
    main()
