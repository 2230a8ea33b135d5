"""Times functions side by side, and keeps what came out: ratios with their intervals, the machine, the command.

A comparison is measured in blocks, each in a process of its own and minutes apart, on tensors made anew: what a process
happens to get (addresses, pages, a neighbour on the machine) is part of the spread. A block runs its contenders in turn, in a
new order each round, so that a busy machine, and what each leaves in the caches, hurts all alike. The ratio is the median over
all rounds; its interval of 95 % is the hierarchical bootstrap's: blocks are drawn again, then rounds within them.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

import numpy as np
import torch

from epskernels import build

SCHEMA = 1
OURS = "epskernels"
TWICE = os.environ.get("EPSKERNELS_BENCH_TWICE") == "1"  # a planted slowdown, for the test of the compare command


@dataclasses.dataclass
class Comparison:
    """`make()` returns {contender: function without arguments}, the first of them ours, having asserted that they agree."""

    group: str
    name: str
    make: object
    axes: dict = dataclasses.field(default_factory=dict)
    targets: dict = dataclasses.field(default_factory=dict)  # {peer: the ratio that must not be exceeded}
    before: dict = dataclasses.field(default_factory=dict)  # {contender: what runs, untimed, before each of its rounds}

    @property
    def title(self):
        return f"{self.group}: {self.name}"


def asked(parser, only, names):
    """The names that hold --only's expression; where none does, the parser says what there is, with exit status 2."""
    found = [name for name in names if re.search(only, name)]
    if not found:
        parts = dict.fromkeys(name.partition(": ")[0] for name in names)
        parser.error(
            f"--only: expected an expression that is in the name of a comparison, got {only!r}; there are: {'; '.join(parts)}"
        )
    return found


def twice(run):
    def both():
        run()
        return run()

    return both


def time_block(comparison, rounds, seconds):
    """{contender: [seconds of a call in each round]}, on tensors made for this block."""
    contenders, calls = comparison.make(), {}
    ours = next(iter(contenders))
    if TWICE:
        contenders[ours] = twice(contenders[ours])
    for name, run in contenders.items():
        comparison.before.get(name, bool)()
        for _ in range(3):
            run()
        begin = time.perf_counter()
        run()
        calls[name] = max(4, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    times, rng = {name: [] for name in contenders}, np.random.default_rng()
    for _ in range(rounds):
        # In another order each time: who follows whom decides what is left in the caches and the allocator.
        for name in rng.permutation(list(contenders)).tolist():
            run = contenders[name]
            comparison.before.get(name, bool)()
            run()
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return times


def rows_of(comparison, blocks):
    """One row per peer: {group, name, axes, peer, ratio, interval, rounds, target, met}. A ratio below 1: ours takes less."""
    ours, *others = blocks[0]
    own = np.array([block[ours] for block in blocks])
    for peer in others:
        ratio, interval = ratio_of(own, np.array([block[peer] for block in blocks]))
        target = comparison.targets.get(peer)
        yield {
            "group": comparison.group, "name": comparison.name, "axes": comparison.axes, "peer": peer, "ratio": ratio,
            "interval": interval, "rounds": own.size, "target": target, "met": None if target is None else ratio <= target,
        }  # fmt: skip


def ratio_of(ours, peer, draws=2000):
    """The median ratio over (blocks, rounds), and its interval of 95 %."""
    ratios, rng = ours / peer, np.random.default_rng(0)
    blocks, rounds = ratios.shape
    block = rng.integers(blocks, size=(draws, blocks, 1))
    chosen = rng.integers(rounds, size=(draws, blocks, rounds))
    drawn = np.median(ratios[block, chosen].reshape(draws, -1), axis=1)
    return float(np.median(ratios)), [float(bound) for bound in np.quantile(drawn, (0.025, 0.975))]


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor():
    if pathlib.Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def about():
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    extension = build.extension()
    return {
        "processor": processor(),
        "cpu_capability": extension.cpu_capability(),
        "compiler": extension.build_info()["compiler"],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("epskernels", "torch", "diffusers", "triton", "numpy")},
        "commit": commit + ("+changes" if changed else ""),
        "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def load(path):
    """A results file; ValueError where it is of another schema."""
    results = json.loads(pathlib.Path(path).read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {results.get('schema')!r}")
    return results


def asked_for(parser, path):
    """The results file that a command line names; where there is none, the parser says so, with exit status 2."""
    try:
        return load(path)
    except FileNotFoundError:
        parser.error(
            f"no results at {path}: `make bench` writes benchmarks/results/latest.json, and cpu.json there is kept"
        )


def save(path, results):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def key(row):
    """What a row is, in any run."""
    return row["group"], row["name"], row["peer"]
