"""Campaigns against what lies on disk: damaged files, races, kills. Each ends in the bits of a run that nothing has disturbed.

    damage      files flipped, cut, zeroed, swapped: read as they were, or refused by a ValueError that names the file
    race        processes that begin one new directory at once with other settings: one does, and every chunk is its own
    kill        SIGKILL at any moment of `epskernels sample --out DIRECTORY` and of exposure.measure(state=), then again
    full        a disk that takes no more: an error that names the file, and the next run goes on
    torchrun    clean runs of several processes: each ends well, its file written
    ranks       runs of several processes, one of which is killed; another number of processes goes on

A short one of each, but of the last two, is a test (test_distributed.py has theirs). At length:
    python -m tests.ranks.test_campaigns damage=30000 race=1000 kill=180 full=50 torchrun=300 ranks=16
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from epskernels import calibrate, cli, exposure, images, samplers, scaling, schedule, shards

from .test_distributed import build_model, children, kill_midway, launch

SEEDS = "0-19,40"
TABLE = samplers.ddim(schedule.linear(), 3)
SHORT = {"damage": 100, "full": 1, "race": 4, "kill": 2}


def stand_in(x, t):
    return 0.3 * x.sin()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


# ---- damage ----


class Reader:
    """How a file is made and read. checked: every change of its contents is seen; of others only that they cannot be parsed."""

    def __init__(self, make, read, checked=False):
        self.make, self.read, self.checked = make, read, checked


def some_run(path):
    run = shards.begin(path.parent, {"names": ["samples"], "shape": [1, 2, 2], "batch": 3}, range(7))
    for chunk in range(len(run)):
        samples = np.random.default_rng(chunk).normal(size=(len(run.seeds_of(chunk)), 1, 2, 2)).astype(np.float32)
        run.write("samples", chunk, samples)


def some_state(path):
    exposure.measure(stand_in, TABLE, torch.linspace(-1, 1, 4 * 4).reshape(4, 1, 2, 2), batch=2, state=path)


def read_state(path):
    found = exposure.measure(stand_in, TABLE, torch.linspace(-1, 1, 4 * 4).reshape(4, 1, 2, 2), batch=2, state=path)
    return found.rows


def some_cache(path):
    calibrate.search(lambda found: found.values(3).sum(), (0.9, 1.1), trials=3, cache=path)


def read_cache(path):
    found = calibrate.search(lambda found: found.values(3).sum(), (0.9, 1.1), trials=3, cache=path)
    return {"score": found.score, "trials": found.trials}


def some_image(path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)


def some_exposure(path):
    exposure.measure(stand_in, TABLE, torch.linspace(-1, 1, 16).reshape(4, 1, 2, 2)).save(path)


READERS = {
    "samples-000001.npy": Reader(some_run, lambda path: shards.Shards(path.parent).read("samples", 1), checked=True),
    "seeds.npy": Reader(some_run, lambda path: shards.Shards(path.parent).seeds, checked=True),
    "run.json": Reader(some_run, lambda path: shards.Shards(path.parent).load()),
    "state.npz": Reader(some_state, read_state, checked=True),
    "images.npy": Reader(lambda path: np.save(path, np.eye(8)[None, None]), lambda path: images.load(path, (1, 8, 8))),
    "images.npz": Reader(lambda path: np.savez(path, images=np.eye(8)[None, None]), lambda path: images.load(path, (1, 8, 8))),
    "image.png": Reader(some_image, lambda path: images.load(path.parent, (1, 8, 8))),
    "image.jpg": Reader(some_image, lambda path: images.load(path.parent, (1, 8, 8))),
    "image.webp": Reader(some_image, lambda path: images.load(path.parent, (1, 8, 8))),
    "exposure.json": Reader(some_exposure, lambda path: exposure.Exposure.load(path).rows),
    "lambda.json": Reader(
        lambda path: scaling.linear(0.001, 1.0, origin="cleanest").save(path, steps=3),
        lambda path: scaling.load(path)[0].to_dict(),
    ),
    "trials.json": Reader(some_cache, read_cache),
}  # fmt: skip


def damage(content, rng):
    """Other contents than these."""
    changed = bytearray(content)
    at = rng.randrange(min(len(content), rng.choice((128, len(content)))))  # the header as often as all the rest
    size = rng.randrange(1, 1 + len(content) - at)
    kind = rng.choice(("flip", "flip", "flip", "cut", "zero", "remove", "insert", "random", "move", "empty"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[min(at + rng.randrange(16), len(content) - 1)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zero":
        changed[at : at + size] = bytes(size)
    elif kind == "remove":
        del changed[at : at + rng.randrange(1, 9)]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "random":
        changed[at : at + size] = rng.randbytes(size)
    elif kind == "move":
        changed[at : at + size] = bytes(changed[at + size :]) + bytes(changed[at : at + size])
    else:
        changed.clear()
    return bytes(changed) if bytes(changed) != content else content[:-1]


def run_damage(trials, folder, seed=0):
    counts = collections.Counter()
    for name, reader in READERS.items():
        path = folder / name.replace(".", "-") / name
        path.parent.mkdir()
        reader.make(path)
        content, expected = path.read_bytes(), reader.read(path)
        others = {other: other.read_bytes() for other in path.parent.iterdir()}
        for trial in range(-(-trials // len(READERS))):
            path.write_bytes(damage(content, random.Random(f"{seed} {name} {trial}")))
            try:
                outcome = "read as it was" if same(reader.read(path), expected) else "read, changed"
            except ValueError as error:
                outcome = "refused"
                assert name in str(error) or str(path.parent) in str(error), (name, trial, error)
                assert "\n" not in str(error), (name, trial, error)
            except Exception as error:
                raise AssertionError(f"{name}, trial {trial}: {type(error).__name__}: {error}") from error
            assert outcome != "read, changed" or not reader.checked, (name, trial)
            counts[outcome] += 1
            for other, was in others.items():
                other.write_bytes(was)
    return counts


# ---- processes ----


def forked(work):
    """The pid of a process that runs work(), and ends with the status that it returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left_behind(*paths):
    """The temporary files among them whose process is gone: a number may by now be another's."""
    return [path.name for path in paths if not os.path.exists(f"/proc/{path.name.split('.')[-2]}")]


def run_race(trials, folder):
    """Three processes, two settings, at once: those of one setting succeed, the others are refused."""
    counts = collections.Counter()
    for trial in range(trials):
        directory, (waits, starts) = folder / f"race-{trial}", os.pipe()

        def begin(which, directory=directory, waits=waits, starts=starts):
            os.close(starts)
            os.read(waits, 1)  # until no process holds the other end: all go on at one moment
            settings = {"names": ["samples"], "shape": [2], "batch": 2, "lambda": which}
            try:
                run = shards.begin(directory, settings, range(6))
            except ValueError as error:
                return 2 if "begun with other settings" in str(error) else 3
            for chunk in range(len(run)):
                run.write("samples", chunk, np.full((2, 2), which, np.float32))
            return 0

        pids = [forked(lambda which=which: begin(which)) for which in (1, 2, 1 + trial % 2)]
        os.close(starts)
        os.close(waits)
        statuses = [status_of(pid) for pid in pids]
        winner = shards.Shards(directory).settings["lambda"]
        expected = [0 if which == winner else 2 for which in (1, 2, 1 + trial % 2)]
        assert statuses == expected, (trial, winner, statuses)
        assert (shards.Shards(directory).load() == winner).all() and not list(directory.glob("*.tmp"))
        counts[f"settings {winner} were first"] += 1
        shutil.rmtree(directory)
    return counts


def sample_into(directory, model):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        given = ["--model", model, "--steps", "4", "--seeds", SEEDS, "--batch", "2", "--quiet", "--out", str(directory)]
        return cli.main(["sample", *given])


def measure_into(path):
    exposure.measure(stand_in, TABLE, real_images(), batch=2, state=path, save_every=0).save(path.with_suffix(".json"))


def real_images():
    return torch.linspace(-1, 1, 40 * 64).reshape(40, 1, 8, 8)


def run_kill(trials, folder, seed=0):
    """Each is killed until it has ended: the moment is anywhere in the time that a whole run takes."""
    counts, rng = collections.Counter(), random.Random(seed)
    model = build_model(folder / "model")
    sample_into(folder / "expected", model)
    measure_into(folder / "expected.npz")
    expected, measured = shards.Shards(folder / "expected").load(), (folder / "expected.json").read_bytes()
    works = {
        "sample": lambda to: sample_into(to, model),
        "measure": lambda to: measure_into(to.with_suffix(".npz")),
    }
    took = {}
    for name, work in works.items():
        start = time.monotonic()
        assert status_of(forked(lambda work=work, name=name: work(folder / f"timed-{name}"))) == 0
        took[name] = time.monotonic() - start
    n = 0
    while counts["sample killed"] + counts["measure killed"] < trials:
        name = ("sample", "measure")[n % 2]
        to = folder / f"{name}-{n}"
        n += 1
        while True:
            pid = forked(lambda name=name, to=to: works[name](to))
            time.sleep(rng.uniform(0, took[name]))
            os.kill(pid, signal.SIGKILL)
            status = status_of(pid)
            assert status in (0, -signal.SIGKILL), status
            if status == 0:
                break
            counts[f"{name} killed"] += 1
            counts["temporary files left"] += len(list(folder.glob(f"{to.name}*.tmp")) + list(to.glob("*.tmp")))
        assert (
            status_of(forked(lambda name=name, to=to: works[name](to))) == 0
        )  # on what is finished: what was left goes
        if name == "sample":
            assert np.array_equal(shards.Shards(to).load(), expected)
        else:
            assert to.with_suffix(".json").read_bytes() == measured
        assert not left_behind(*folder.glob(f"{to.name}*.tmp"), *to.glob("*.tmp"))
        counts["ended with the same bits"] += 1
    return counts


def run_full(trials, folder, seed=0):
    """No file may grow past a limit, as on a full disk: status 1 and the path; without the limit the run goes on."""
    counts, rng = collections.Counter(), random.Random(seed)
    model = build_model(folder / "model")
    sample_into(folder / "expected", model)
    expected = shards.Shards(folder / "expected").load()
    for trial in range(trials):
        directory, errors = folder / f"full-{trial}", folder / f"full-{trial}.txt"

        def limited(limit, directory=directory, errors=errors):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                given = ["--model", model, "--steps", "4", "--seeds", SEEDS, "--batch", "2", "--quiet"]
                status = cli.main(["sample", *given, "--out", str(directory)])
            message = said.getvalue()
            return 10 + status if "File too large" in message and str(directory) in message else 20 + status

        limit = rng.randrange(64, 640)
        status = status_of(forked(lambda limit=limit: limited(limit)))
        assert status in (11, 12), (trial, limit, status)  # 12: run.json did not fit, said before the work
        counts["said, with the path"] += 1
        assert sample_into(directory, model) == 0
        assert np.array_equal(shards.Shards(directory).load(), expected) and not list(directory.glob("*.tmp"))
    return counts


def run_torchrun(trials, folder):
    counts = collections.Counter()
    model = build_model(folder / "model")
    hashes = set()
    for trial in range(trials):
        out = folder / f"torchrun-{trial}"
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "epskernels", "sample"]
        given = ["--quiet", "--model", model, "--steps", "2", "--seeds", "0-11", "--batch", "3"]
        command = [sys.executable, "-m", *launcher, *given, "--out", str(out), "--out", f"{out}.npz"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, (trial, result.stderr)
        hashes.add(result.stdout.split("sha256 of the samples ")[1].split()[0])
        assert len(np.load(f"{out}.npz")["samples"]) == 12 and len(hashes) == 1
        counts["ended well"] += 1
        shutil.rmtree(out)
    return counts


def run_ranks(trials, folder, seed=0):
    counts, rng = collections.Counter(), random.Random(seed)
    model = build_model(folder / "model")
    whole = launch(1, model, folder / "expected")
    assert whole.wait() == 0, whole.communicate()
    expected = shards.Shards(folder / "expected").load()
    for trial in range(trials):
        directory, first, then = folder / f"ranks-{trial}", rng.choice((1, 2, 3)), rng.choice((1, 2, 3))
        kill_midway(launch(first, model, directory), lambda pid: pid if first == 1 else rng.choice(children(pid)))  # noqa: B023
        resumed = launch(then, model, directory)
        said = resumed.communicate()
        assert resumed.returncode == 0, (trial, first, then, said)
        assert np.array_equal(shards.Shards(directory).load(), expected) and not left_behind(*directory.glob("*.tmp"))
        counts[f"{first} killed, {then} go on"] += 1
    return counts


CAMPAIGNS = {
    "damage": run_damage, "race": run_race, "kill": run_kill, "full": run_full, "torchrun": run_torchrun, "ranks": run_ranks,
}  # fmt: skip


def test_campaigns():
    """In a process without threads of others, since they fork."""
    command = [
        sys.executable,
        "-m",
        "tests.ranks.test_campaigns",
        *(f"{name}={count}" for name, count in SHORT.items()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]).keys() == SHORT.keys()


def main():
    torch.set_num_threads(1)
    found = {}
    for given in sys.argv[1:]:
        name, _, trials = given.partition("=")
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found[name] = dict(CAMPAIGNS[name](int(trials), pathlib.Path(folder)))
        print(f"{name}: {trials} trials, {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
