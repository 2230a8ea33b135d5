"""Everything that needs a GPU, in one command of at most six minutes, in parts by their worth; results as JSON and as a table.

    make gpu-check [RESULTS=FOLDER]     # or: python -m tests.gpu.gpu_check [--seconds 360] [--parts bits,benchmark] FOLDER
    make gpu-check-dry                  # all of it where there is no GPU, on the stand-in of tests/gpu/stand_in

The parts: build, for this GPU; bits, each kernel against the reference; benchmark; memcheck, racecheck and initcheck, beside
which the rest of the tests runs. Uses the Python that runs it, with the torch, triton, CMake, Ninja, pybind11 and pytest
installed there, and no network; the kernels are built into the source tree.

FOLDER/gpu-NAME.json, -tests.jsonl, -benchmark.json, .log and .md (the figures, predicted and measured) are written as results
come, so that they are there when it is cut off. Called again with the same FOLDER it goes on: what passed is not run again unless
the package, or the test's own file, has changed since. Exit status 1 where something failed, 3 where nothing failed and
something is left.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from . import figures

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAND_IN = pathlib.Path(__file__).parent / "stand_in"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# The most seconds of each part; what one leaves, those after it have.
LIMITS = {"build": 120, "predicted": 60, "bits": 100, "benchmark": 110, **dict.fromkeys((*SANITIZERS, "rest"), 300)}
LOGGED = 100_000  # characters of a part's output, its last
AFTER = 3  # seconds in which a part that is stopped may end by itself
MATRIX = [f"tests/ops/{test}.py" for test in ("test_step_bits", "test_noise", "test_rows_on_device")]
AGREE = [
    f"tests/gpu/test_gpu.py::test_{test}"
    for test in ("both_kernels_are_here", "all_backends_agree", "all_backends_agree_by_band")
]
# The rest: what only a GPU can show, what is deep of the matrix, and the machine code of this machine's compilers.
TESTS = {
    "bits": [*AGREE, *MATRIX],
    "rest": ["tests/gpu", *MATRIX, "tests/ops/test_triton.py", "tests/ops/test_cuda_build.py"],
}
LACKING = "diffusers torchsde pywt mlxtend sktime grimp torch_fidelity playwright"  # on the machine that was seen
PACKAGE = ("csrc/*", "epskernels/**/*.py", "CMakeLists.txt", "setup.py")
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def digest(*patterns):
    """Of the package's sources, and of these."""
    files = sorted({path for pattern in (*PACKAGE, *patterns) for path in ROOT.glob(pattern) if path.is_file()})
    content = hashlib.sha256()
    for path in files:
        content.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def write(path, text):
    """Whole, or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


# ---- as a plugin of pytest: which tests are left, and what became of each, as soon as it is known ----

OUTCOMES = os.environ.get("EPSKERNELS_GPU_OUTCOMES")  # a file of lines {id, outcome, seconds, digest}
DRY = "EPSKERNELS_GPU_DRY" in os.environ
# Tests of the GPU itself: no stand-in has its memory, its compilers, its profiler or its fake tensors.
ONLY_ON_A_GPU = re.compile(
    r"test_out_of_memory|one_kernel|compiled_for_any_size|every_square_root|more_elements_than|package|c_plus_plus"
    r"|test_triton.py|test_cuda_build.py|torchrun|ranks_on_gpus|opcheck"
)


def read_outcomes(path):
    """{id: its last outcome}; a line that a cut-off left unfinished is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            outcome = json.loads(line)
        except ValueError:
            continue
        found[outcome["id"]] = outcome
    return found


def file_of(test):
    return test.partition("::")[0]


def pytest_collection_modifyitems(config, items):
    done = set(json.loads(pathlib.Path(os.environ["EPSKERNELS_GPU_DONE"]).read_text()))
    left, tried = [item for item in items if item.nodeid not in done], set()
    if DRY:  # the first case of each test
        left = [item for item in left if not ONLY_ON_A_GPU.search(item.nodeid)]
        left = [item for item in left if not (item.function in tried or tried.add(item.function))]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reports())


class Reports:
    """Of the process that hears of all tests."""

    def __init__(self):
        self.digests = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        file = file_of(report.nodeid)
        if file not in self.digests:
            self.digests[file] = digest(file)
        outcome = {"id": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        with open(OUTCOMES, "a") as lines:
            lines.write(json.dumps(outcome | {"digest": self.digests[file]}) + "\n")


# ---- the parts ----


def stop(process):
    """Ends the part's whole process group: pytest's workers too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(AFTER)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


class Check:
    """The state in FOLDER, and what runs a part within the time."""

    def __init__(self, folder, seconds, wanted, machine):
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = str(folder / ("gpu-" + re.sub(r"\W+", "-", machine["gpu"].lower()).strip("-")))
        self.state, self.outcomes, self.measured, self.page, self.log = (
            pathlib.Path(self.stem + kind) for kind in (".json", "-tests.jsonl", "-benchmark.json", ".md", ".log")
        )
        self.logs = pathlib.Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.end, self.wanted, self.machine, self.lock = START + seconds, wanted, machine, threading.Lock()
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        before = json.loads(self.state.read_text()) if self.state.exists() else {"machine": {}}
        self.parts, self.budget, self.running, self.cut_off = {}, {}, set(), False
        if all(before["machine"].get(key) == machine[key] for key in SAME):
            self.parts, self.budget = before["parts"], before["instructions"]
        else:
            for path in (self.outcomes, self.measured):
                path.unlink(missing_ok=True)

    def save(self):
        """What is known so far, for whoever comes after a cut-off."""
        with self.lock:
            measured = json.loads(self.measured.read_text()) if self.measured.exists() else None
            rows = list(figures.rows(self.machine, self.budget, measured))
            state = {"machine": self.machine, "parts": self.parts, "instructions": self.budget, "figures": rows}
            write(self.state, json.dumps(state | {"benchmark": measured}, indent=1) + "\n")
            write(self.page, figures.page(self.machine, self.parts, rows, (measured or {}).get("targets", ())))

    def cut(self, *_):
        """Ends what runs: no part begins after it, and what is known is saved."""
        self.cut_off, self.end = True, 0.0
        for process in [*self.running]:
            stop(process)

    def limit(self, name):
        """Seconds: the stand-in is slow, and has as many as there are."""
        return min(math.inf if DRY else LIMITS[name], self.end - time.monotonic())

    def part(self, name, command, reads=(), good=(0,), **environment):
        """Runs one, its output in a log, unless it passed before and nothing that it reads has changed since."""
        now, limit = digest(*reads), self.limit(name)
        if name not in self.wanted:
            return
        if self.parts.get(name, {}).get("passed") and self.parts[name]["digest"] == now:
            say(f"{name}: passed before, and nothing that it reads has changed")
            return
        found = {"passed": None, "seconds": 0.0, "last_line": "no time was left", "digest": now}
        if limit >= 1:
            found |= {"last_line": "it was running when gpu-check was cut off"}
            self.parts[name] = found
            self.save()
            found = found | self.run(name, [str(word) for word in command], limit, good, environment)
        self.parts[name] = found
        self.save()

    def run(self, name, command, limit, good, environment):
        say(f"{name}, {limit:.0f} s at most: {' '.join(command)}")
        begin, log = time.monotonic(), self.logs / name
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment | environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            stop(process)
            self.running.discard(process)
        status = None if self.cut_off else status
        text = log.read_text(errors="replace")
        with self.log.open("a") as kept:
            kept.write(f"==== {name}: {' '.join(command)}\n{text[-LOGGED:]}\n")
        lines = [line for line in text.splitlines() if line.strip()]
        found = {"passed": None if status is None else status in good, "seconds": round(time.monotonic() - begin, 1)}
        found["last_line"] = lines[-1][:200] if lines else ""
        if self.outcomes.exists() and name in TESTS:
            outcomes = [outcome["outcome"] for outcome in read_outcomes(self.outcomes).values()]
            found["counts"] = {kind: outcomes.count(kind) for kind in sorted(set(outcomes))}
        say(f"{name}: {WORDS[found['passed']]} after {found['seconds']} s: {found['last_line'][:120]}")
        if found["passed"] is False:
            print("\n".join(lines[-40:]), flush=True)
        return found

    def tests(self, name, *options):
        """Those that have not passed since the package, or their file, was changed."""
        known = read_outcomes(self.outcomes)
        now = {file: digest(file) for file in map(file_of, known)}
        passed = [i for i, last in known.items() if last["outcome"] == "passed" and last["digest"] == now[file_of(i)]]
        done = self.logs / f"{name}.done"
        write(done, json.dumps(passed))
        workers = ("-n", min(8, os.cpu_count() or 1)) if importlib.util.find_spec("xdist") and not DRY else ()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.gpu.gpu_check",
            "-p",
            "no:cacheprovider",
            *workers,
            *options,
        ]
        self.part(
            name, [*command, *TESTS[name]], ("tests/**/*.py",), (0, 5) if passed else (0,), EPSKERNELS_GPU_DONE=str(done),
            EPSKERNELS_GPU_OUTCOMES=str(self.outcomes), EPSKERNELS_TEST_KERNELS="cuda,triton",
        )  # fmt: skip

    def count_instructions(self):
        """Of the library that was built: what the figures are predicted from."""
        self.part("predicted", [sys.executable, "-m", "tests.ops.test_cuda_build"], ("tests/ops/test_cuda_build.py",))
        if (self.logs / "predicted").exists() and self.parts["predicted"]["passed"]:
            budgets = json.loads((self.logs / "predicted").read_text())
            self.budget = budgets.get(f"sm_{self.machine['capability'].replace('.', '')}", {})

    def bench(self):
        """Goes on with the cases that are not measured yet."""
        reads = ("benchmarks/bench_gpu.py", "benchmarks/peers.py")
        if self.parts.get("benchmark", {}).get("digest") != digest(*reads):
            self.measured.unlink(missing_ok=True)
        seconds = max(1, self.limit("benchmark") - 15)
        command = [
            sys.executable,
            "benchmarks/bench_gpu.py",
            "--json",
            self.measured,
            "--resume",
            "--stop-after",
            f"{seconds:.0f}",
        ]
        command += ["--compile-seconds", "40", *(("--only", r"^\(1, 4.* (float32 |bfloat16 noise)") if DRY else ())]
        self.part("benchmark", command, reads)
        if self.parts.get("benchmark", {}).get("passed") and not json.loads(self.measured.read_text())["complete"]:
            self.parts["benchmark"]["passed"] = None

    def sanitize(self, tool):
        found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        command = [found] if found else ["compute-sanitizer: it is not on this machine"]
        if DRY:  # the same command line, and the program itself
            command = ["sh", "-c", 'shift 4; exec "$@"', "compute-sanitizer"]
        command += ["--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.gpu_sanitize"]
        kernels = ["cuda"] if DRY and tool != "memcheck" else ["cuda", "triton"]
        reads = ("tests/gpu/gpu_sanitize.py", "tests/support/*.py", "tests/ops/test_step_bits.py")
        if DRY or found:
            self.part(tool, [*command, *kernels], reads, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        elif tool in self.wanted:
            self.parts[tool] = {
                "passed": None,
                "seconds": 0.0,
                "last_line": "compute-sanitizer is not on this machine",
                "digest": "",
            }


SAME = ("gpu", "capability", "torch", "triton")  # results of another machine are not gone on with
WORDS = {True: "passed", False: "FAILED", None: "unfinished"}


def machine():
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.mem,power.limit,clocks.max.sm",
        "--format=csv,noheader,nounits",
    ]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        clock = int(driver.rpartition(",")[2])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError) as error:
        driver, clock = f"nvidia-smi: {error}", None
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": properties.name, "gpus": torch.cuda.device_count(), "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "max SM clock, MHz": clock,
        "driver, max memory clock, power limit, max SM clock": driver, "python": sys.version.split()[0],
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "commit": (commit or "unknown") + ("+changes" if changed else ""), "sources": digest("tests/**/*.py", "benchmarks/*.py"),
    }  # fmt: skip


def run_all(check):
    """The parts by their worth; what waits for nothing runs beside them."""
    switches = {"EPSKERNELS_BUILD": "1", "EPSKERNELS_CUDA": "1"}
    switches["EPSKERNELS_CUDA_ARCHITECTURES"] = check.machine["capability"].replace(".", "") + "-real"
    check.part("build", [sys.executable, "setup.py", "build_ext", "--inplace"], **switches)
    if check.parts.get("build", {"passed": True})["passed"]:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            counting = pool.submit(check.count_instructions)
            check.tests("bits")
            counting.result()
        check.bench()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            beside = [pool.submit(check.sanitize, tool) for tool in SANITIZERS]
            check.tests("rest", "-m", "")
            for part in beside:
                part.result()


def dry_environment():
    """Of a process that takes the host for a GPU, and lacks what the machine with the GPU lacks."""
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "torch_cuda.c").write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
    )
    library = folder / "libtorch_cuda.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", folder / "torch_cuda.c", "-o", library], check=True
    )
    path = os.pathsep.join([str(STAND_IN), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "EPSKERNELS_GPU_DRY": "1", "EPSKERNELS_STAND_IN_LIBRARY": str(library), "EPSKERNELS_STAND_IN_WITHOUT": LACKING,
        "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=ROOT / "benchmarks" / "results", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=3600 if DRY else 360, help="when to stop, whatever runs")
    parser.add_argument("--parts", default=",".join(LIMITS), help="some of them, between commas")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in, where there is no GPU")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - LIMITS.keys():
        parser.error(f"--parts: expected some of {', '.join(LIMITS)}, got {', '.join(sorted(unknown))}")
    if args.dry_run and not DRY:
        os.execve(sys.executable, [sys.executable, "-m", "tests.gpu.gpu_check", *sys.argv[1:]], dry_environment())
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu-check: no GPU is available to torch; `make gpu-check-dry` runs its Python without one")
    check = Check(args.folder.resolve(), args.seconds, args.parts.split(","), machine())
    say(json.dumps(check.machine))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, check.cut)
    run_all(check)
    check.save()
    print(check.page.read_text())
    say(f"results in {check.state}")
    passed = [check.parts.get(name, {"passed": None})["passed"] for name in check.wanted]
    sys.exit(1 if False in passed else 3 if None in passed else 0)


if __name__ == "__main__":
    main()
