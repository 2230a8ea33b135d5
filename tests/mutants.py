"""Plants faults, one at a time, and asks which test notices: `python -m tests.mutants`, `make mutants`.

tests/mutants.toml lists the faults: a text that occurs once in its file, and what a mistake would write there. Each is planted in
a copy of the working tree. What is compiled is built again. Then run, each until its first failure:

    likely   the test files that the list names for the source file, as `make test` runs them
    whole    all that `make test` runs
    deep     the likely files with what is marked `deep`

until one kills the fault. Results go to build/mutants.jsonl, a line each; --resume goes on from there. At the end the table in
tests/mutants.md is written.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
LIST, TABLE, RESULTS = ROOT / "tests" / "mutants.toml", ROOT / "tests" / "mutants.md", ROOT / "build" / "mutants.jsonl"
# What only the tests compile, for the host; all other C++ is in the library.
CUDA_ALONE = ("step_cuda.cu", "step_cuda.h", "moments_cuda.cu", "launch_cuda.h", "ops_cuda.cpp")
# The list's own test fails over any fault, and a CUDA library is not built.
LEFT_OUT = [f"--ignore=tests/{name}" for name in ("project/test_structure.py", "ops/test_cuda_build.py", "gpu")]
LIMITS = {"likely": 300, "whole": 1800, "deep": 1200}  # seconds


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault. tests: files that are likely to notice it, below tests/. first, then: what of them runs, as pytest's -k."""

    file: str
    name: str
    old: str
    new: str
    tests: tuple
    first: str
    then: str
    reason: str  # why no test can notice it, of one that survives

    @property
    def compiled(self):
        """Whether the library is built from it."""
        in_c = self.file.startswith("csrc/") and pathlib.Path(self.file).name not in CUDA_ALONE
        return in_c or self.file == "epskernels/spec.py"

    @property
    def compiled_for_host(self):
        """Whether the tests compile it, with the CUDA kernel."""
        return self.file.startswith("csrc/") or self.file == "epskernels/spec.py"

    def planted(self, text):
        """The file's text with the fault. Raises ValueError where the list does not fit it."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.name}: expected once, found {count} times:\n{self.old}")
        if self.old == self.new:
            raise ValueError(f"{self.file}: {self.name}: changes nothing")
        return text.replace(self.old, self.new)


def read_list():
    """All mutants, in the list's order."""
    mutants = []
    for file, group in tomllib.loads(LIST.read_text()).items():
        for each in group["mutants"]:
            about = {"first": group.get("first", ""), "then": group.get("then", ""), "tests": tuple(group["tests"])}
            rest = {"reason": ""} | about | each
            mutants.append(Mutant(file, **rest))
    return mutants


# ---- a copy of the tree ----

# Imports once what takes the tests' processes most of their time, then forks: for each line, [a file for the output, pytest's
# arguments], prints the fork's number, and later its exit status.
SERVER = """
import json, os, sys
import torch
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
import diffusers, filelock, hypothesis, numpy, pytest, torch._dynamo, tqdm.auto, triton, triton.language
from diffusers import DDPMScheduler, UNet2DModel

for line in sys.stdin:
    output, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            for number, path in ((0, os.devnull), (1, output), (2, output)):
                os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
            status = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Tree:
    """A copy of the working tree in a temporary folder, built."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True)
        command = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"]
        for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        # It goes before an installed epskernels, in the tests' own processes too.
        self.environment = os.environ | {
            "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "EPSKERNELS_BUILD": "1", "EPSKERNELS_CUDA": "0",
        }  # fmt: skip
        self.changed = False  # since the library was built
        self.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True)
        # Without optimisation, in a third of the time: no bit depends on it.
        kernels = self.folder / "tests" / "support" / "kernels.py"
        kernels.write_text(kernels.read_text().replace('"-O2"', '"-O0"'))
        (self.built,) = self.folder.glob("build/cmake-*")
        self.cmake = shutil.which(
            "cmake", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
        )
        self.run([self.cmake, "-DCMAKE_BUILD_TYPE=Debug", "-B", self.built], check=True)
        if said := self.build():
            raise RuntimeError(said)
        self.run(self.for_host, check=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=self.folder, env=self.environment, **pipes)
        self.built_for_host = {path: path.read_bytes() for path in self.folder.glob("build/tests/*/*.so")}

    for_host = [sys.executable, "-c", "from tests.support import kernels; kernels.cuda_on_host()"]

    def run(self, command, limit=None, check=False):
        """(exit status, None after `limit` seconds; output). Raises RuntimeError with the output where `check` says so."""
        options = {"cwd": self.folder, "env": self.environment, "text": True, "errors": "replace"}
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True, **options)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            said.seek(0)
            output = said.read()
        if check and status:
            raise RuntimeError(f"{command}: exit status {status}\n{output}")
        return status, output

    def pytest(self, arguments, limit):
        """As `run`."""
        with tempfile.NamedTemporaryFile("r", errors="replace") as said:
            self.server.stdin.write(json.dumps([said.name, arguments]).encode() + b"\n")
            child = int(self.server.stdout.readline())
            ended, _, _ = select.select([self.server.stdout], [], [], limit)
            if not ended:
                os.killpg(child, signal.SIGKILL)
            status = int(self.server.stdout.readline())
            return status if ended else None, said.read()

    def build(self):
        """Of what has changed. Returns the compiler's words where it fails."""
        for command in (["--build", self.built], ["--install", self.built, "--prefix", self.folder / "epskernels"]):
            status, output = self.run([self.cmake, *command])
            if status:
                return output
        self.changed = False
        return ""

    def test(self, files, limit, *options):
        """(the killer, or None; a note). Until the first failure."""
        status, output = self.pytest(
            ["-x", "-vv", "--tb=line", "-rN", "-p", "no:cacheprovider", *LEFT_OUT, *options, *files], limit
        )
        if status in (0, 5):  # 5: -k has left none
            return None, ""
        lines = re.findall(
            r"^(tests/\S+::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED)| Fatal Python error: .+)?(?: +\[ *\d+%\])?$",
            output,
            re.M,
        )
        last = lines[-1][0] if lines else ""
        if status is None:
            return last, f"the time limit of {limit} s"
        if status < 0:
            return last, f"the process ends by signal {-status}"
        if failed := [name for name, word in lines if word in ("FAILED", "ERROR")]:
            return failed[0], ""
        collecting = re.findall(r"^_+ ERROR collecting (\S+) _+$", output, re.M)
        return collecting[0] if collecting else last, "cannot be imported" if collecting else "pytest cannot begin"

    def try_(self, mutant, quick):
        """The result: {"killed by": test, "stage": ..., "note": ...}, or {"stage": "survives"} or "does not compile"."""
        path = self.folder / mutant.file
        text = path.read_text()
        path.write_text(mutant.planted(text))
        try:
            self.changed = self.changed or mutant.compiled
            if self.changed and (output := self.build()):
                return {"stage": "does not compile", "note": output[-2000:]}
            likely = [f"tests/{name}" for name in mutant.tests]
            parts = [part for part in (mutant.first, mutant.then) if part] or [""]
            for part in parts:
                # Compiled in a test, what does not compile would pass for a kill.
                if mutant.compiled_for_host and "not cuda_on_host" not in part:
                    status, output = self.run(self.for_host)
                    if status and "CalledProcessError" in output:
                        return {"stage": "does not compile", "note": output[-2000:]}
                killer, note = self.test(likely, LIMITS["likely"], "-k", part)
                if killer is not None:
                    return {"stage": "likely", "killed by": killer, "note": note}
            for stage, files, options in () if quick else (("whole", (), ()), ("deep", likely, ("-m", ""))):
                killer, note = self.test(files, LIMITS[stage], *options)
                if killer is not None:
                    return {"stage": stage, "killed by": killer, "note": note}
            return {"stage": "survives"}
        finally:
            path.write_text(text)
            self.changed = self.changed or mutant.compiled
            if mutant.compiled_for_host:
                for built, content in self.built_for_host.items():
                    built.write_bytes(content)  # newer than its source again


# ---- the campaign ----


def read_results():
    """{(file, name): result} of faults that the list still has as they were tried."""
    texts = {(m.file, m.name): [m.old, m.new] for m in read_list()}
    results = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        result = json.loads(line)
        key = result["file"], result["name"]
        if texts.get(key) == result["texts"]:
            results[key] = result
    return results


def in_passes(mutants, passes=4):
    """An order in which a campaign that is stopped has tried some of every file: each fourth, then the next fourth, and so on."""
    count = collections.Counter()
    rank = {}
    for mutant in mutants:
        rank[mutant] = count[mutant.file] % passes
        count[mutant.file] += 1
    return sorted(mutants, key=rank.get)


def campaign(mutants, jobs, quick, baseline):
    """Tries all of them. Raises RuntimeError where a test fails without any fault."""
    RESULTS.parent.mkdir(exist_ok=True)
    lock, trees, done = threading.Lock(), queue.Queue(), 0

    def try_(mutant):
        nonlocal done
        tree = trees.get()
        began = time.monotonic()
        try:
            result = tree.try_(mutant, quick)
        finally:
            trees.put(tree)
        about = {"file": mutant.file, "name": mutant.name, "texts": [mutant.old, mutant.new]}
        result = about | {"seconds": round(time.monotonic() - began, 1)} | result
        with lock:
            done += 1
            with open(RESULTS, "a") as file:
                file.write(json.dumps(result) + "\n")
            killer = result.get("killed by", "")
            said = f"[{done}/{len(mutants)}] {mutant.file}: {mutant.name}: {result['stage']} {killer} {result['seconds']} s"
            print(said, flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for tree in pool.map(Tree, [f"{folder}/{i}" for i in range(jobs)]):
                trees.put(tree)
            if baseline:
                tree = trees.get()
                killer, note = tree.test((), 2 * LIMITS["whole"])
                if killer is not None:
                    raise RuntimeError(f"without any fault {killer} fails {note}")
                trees.put(tree)
                print("without any fault all tests pass", flush=True)
            try:
                for future in [pool.submit(try_, mutant) for mutant in in_passes(mutants)]:
                    future.result()
            except BaseException:  # Ctrl-C too: the results so far are kept
                pool.shutdown(cancel_futures=True)
                raise


def write_table(mutants, results):
    tried = [m for m in mutants if (m.file, m.name) in results]
    stages = collections.Counter(results[m.file, m.name]["stage"] for m in tried)
    killed = stages["likely"] + stages["whole"]
    hours = sum(results[m.file, m.name]["seconds"] for m in tried) / 3600
    lines = [
        "# Faults planted, and the tests that notice them", "",
        "Written by `make mutants` (tests/mutants.py) from tests/mutants.toml: not for editing.", "",
        f"{len(tried)} planted. `make test` kills {killed}; only the deep tests kill {stages['deep']}; {stages['survives']} "
        f"survive. {hours:.1f} hours.", "",
    ]  # fmt: skip
    if len(tried) < len(mutants):
        lines += [f"{len(mutants) - len(tried)} more are listed, and were not tried.", ""]
    if stages["does not compile"]:
        lines += [f"{stages['does not compile']} do not compile, which says nothing.", ""]
    left = [m for m in tried if results[m.file, m.name]["stage"] == "survives"]
    if left:
        lines += ["| survivor | why no test can notice it |", "|---|---|"]
        lines += [f"| {m.file}: {_cell(m.name)} | {_cell(m.reason) or '**no reason is known**'} |" for m in left] + [""]
    for file in dict.fromkeys(m.file for m in tried):
        lines += [f"## {file}", "", "| fault | killed by |", "|---|---|"]
        for mutant in tried:
            if mutant.file == file:
                lines.append(f"| {_cell(mutant.name)} | {_killer(results[mutant.file, mutant.name])} |")
        lines.append("")
    TABLE.write_text("\n".join(lines).rstrip("\n") + "\n")


def _killer(result):
    if "killed by" not in result:
        return f"*{result['stage']}*"
    file, _, test = result["killed by"].removeprefix("tests/").partition("::")
    test = re.sub(r"^(.{70}).+", r"\1...", test)
    said = f"{file} `{test.replace('`', '')}`" if test else file
    notes = [result["note"]] if result["note"] else []
    notes += ["only deep"] if result["stage"] == "deep" else []
    return _cell(said + (f" ({', '.join(notes)})" if notes else ""))


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="those whose 'FILE: NAME' it finds")
    parser.add_argument("--resume", action="store_true", help="keep the results that there are")
    parser.add_argument("--survivors", action="store_true", help="with --resume: those again that survived")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trees, each with a core; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="the likely files alone")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    args = parser.parse_args()
    mutants = read_list()
    for mutant in mutants:
        mutant.planted((ROOT / mutant.file).read_text())
    if not args.table:
        wanted = [mutant for mutant in mutants if re.search(args.only, f"{mutant.file}: {mutant.name}")]
        if not (args.resume or args.only):
            RESULTS.unlink(missing_ok=True)
        if args.resume:
            again = ("survives", "does not compile") if args.survivors else ()
            there = {key for key, result in read_results().items() if result["stage"] not in again}
            wanted = [mutant for mutant in wanted if (mutant.file, mutant.name) not in there]
        campaign(wanted, args.jobs, args.quick, not args.no_baseline)
    results = read_results()
    write_table(mutants, results)
    stages = {mutant: results.get((mutant.file, mutant.name), {"stage": ""})["stage"] for mutant in mutants}
    expected = ("", "likely", "whole")
    bad = [m for m in mutants if stages[m] not in expected and not (stages[m] == "survives" and m.reason)]
    if bad:
        sys.exit("\n".join(f"{mutant.file}: {mutant.name}: {stages[mutant]}" for mutant in bad))


if __name__ == "__main__":
    main()
