"""Epsilon Scaling on the bundled digits model: what it does to exposure bias and to sample quality, per sampler and steps.

    python experiments/exposure.py run --minutes 30      # goes on where it stopped; everything lies in runs/exposure
    python experiments/exposure.py status
    python experiments/exposure.py quick                 # one row again, within five minutes
    python experiments/exposure.py report                # docs/exposure/*.svg, and the tables of docs/exposure.md

For each setting (sampler, steps): lambda_t by norms, and b by a sweep of the Frechet distance over one set of seeds; the
distances in the table are of another. Samples are kept as bytes, a chunk of seeds to a file, so that a run can stop at any
time. The results, experiments/results/exposure.json, are computed again from those files.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import time

import numpy as np
import torch

import epskernels
from epskernels import calibrate, exposure, images, models, quality, samplers, scaling, schedule
from epskernels.shards import write_whole

ROOT = pathlib.Path(__file__).parents[1]
CACHE, RESULTS, DOCS = ROOT / "runs" / "exposure", ROOT / "experiments" / "results", ROOT / "docs"
CHUNK = 100  # samples to a file
CALIBRATION = 256  # images, for norms and exposure bias
SELECT, SELECT_SEED = 500, 100_000  # samples of a trial, and where their seeds begin
REPORT_SEED = 0
ROUNDS = (1000, 2000, 5000)  # samples in the table: all settings get the first number before one gets the second
GRID = (1.0, 0.99, 1.01, 0.98, 1.02, 0.995, 1.005, 0.97, 0.96)
QUICK = ("ddpm", 10, 1000)


def learned_ddpm(path, steps, s):
    return samplers.ddpm(path, steps, scaling=s, variance="learned_range", clip=1.0)


def dpmpp(path, steps, s):
    return samplers.dpmpp_2m(path, steps, scaling=s, spacing="trailing")


def edm(make):
    return lambda path, steps, s: make(schedule.KarrasSchedule(model=path), steps, scaling=s, prediction="epsilon")


# ADM-style and LDM-style DDIM, as the paper's code bases clip them.
SAMPLERS = {
    "ddpm": learned_ddpm,
    "ddim": lambda path, steps, s: samplers.ddim(path, steps, scaling=s, clip=1.0),
    "ddim-unscaled": lambda path, steps, s: samplers.ddim(path, steps, scaling=s, direction="unscaled"),
    "edm_euler": edm(samplers.edm_euler),
    "edm_heun": edm(samplers.edm_heun),
    "dpmpp_2m": dpmpp,
}
# In the order of the work. edm_heun: steps that make 2*steps - 1 model calls.
SETTINGS = [("ddpm", 10), ("ddim", 10), ("ddim-unscaled", 10), ("ddpm", 20), ("ddim", 20), ("ddim-unscaled", 20),
            ("edm_euler", 10), ("edm_heun", 6), ("dpmpp_2m", 10), ("edm_euler", 20), ("edm_heun", 11), ("dpmpp_2m", 20),
            ("ddpm", 50), ("ddim", 50), ("ddim-unscaled", 50), ("edm_euler", 50), ("edm_heun", 25), ("dpmpp_2m", 50),
            ("ddpm", 100), ("ddim", 100), ("ddpm", 1000)]  # fmt: skip


class OutOfTime(Exception):
    """The minutes are used up."""


class Setting:
    """One sampler and number of steps: what is known of it, and how to know more."""

    def __init__(self, name, steps, model, deadline=float("inf")):
        self.name, self.steps, self.model, self.deadline = name, steps, model, deadline
        self.title = f"{name}-{steps}"
        self.folder = CACHE / self.title
        self.folder.mkdir(parents=True, exist_ok=True)

    def sampler(self, s):
        return SAMPLERS[self.name](self.model.schedule, self.steps, s)

    def _check_time(self):
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _call(self, x, t):
        self._check_time()
        return self.model.network(x, t, return_dict=False)[0]

    def matched(self):
        """lambda_t by norms, kept as a file of its own."""
        path = RESULTS / f"{self.title}-lambda.json"
        if not path.exists():
            data = torch.from_numpy(images.load("mnist", self.model.shape, CALIBRATION))
            found = calibrate.match_norms(self._call, self.sampler, data, seed=SELECT_SEED, batch=64)
            found.scaling().save(path, sampler=self.title, images=CALIBRATION, lambda_t=found.lambda_t.tolist(),
                                 standard_error=found.standard_error.tolist())  # fmt: skip
        return scaling.load(path)

    def measured(self, label, s):
        """The exposure bias with a scaling."""
        path = RESULTS / f"{self.title}-{label}.json"
        if not path.exists():
            data = torch.from_numpy(images.load("mnist", self.model.shape, CALIBRATION))
            state = self.folder / f"exposure-{label}.npz"
            found = exposure.measure(self._call, self.sampler(s), data, seed=2 * SELECT_SEED, state=state)
            found.save(path)
        return exposure.Exposure.load(path)

    def features(self, s, first, count, compute=True):
        """(count, 64) features of the samples of seeds first, first + 1, ...; None where they are not all there."""
        chunks = []
        for start in range(first, first + count, CHUNK):
            path = self.folder / f"{label(s, self.steps)}-{start:06d}.npy"
            if not path.exists():
                if not compute:
                    return None
                self._check_time()
                seeds = range(start, start + CHUNK)
                samples = to_bytes(epskernels.sample(self._call, self.sampler(s), seeds, self.model.shape))
                write_whole(path, lambda file, samples=samples: np.save(file, samples))
            chunks.append(features_of(path))
        return np.concatenate(chunks)

    def sweep(self, real, compute=True):
        """{b: Frechet distance of the selection's samples}, over as much of GRID as there is."""
        found = {}
        for b in GRID:
            features = self.features(scaling.constant(b), SELECT_SEED, SELECT, compute)
            if features is not None:
                found[b] = quality.frechet(real, features)
        return found

    def candidates(self, real, compute=True):
        """The scalings of the table's row, by name; None where the selection is not done."""
        sweep = self.sweep(real, compute)
        if len(sweep) < len(GRID) or not (RESULTS / f"{self.title}-lambda.json").exists():
            if not compute:
                return None
        matched, notes = self.matched()
        line = calibrate.fit(notes["lambda_t"], "linear").scaling
        return {"baseline": scaling.constant(1.0), "uniform": scaling.constant(min(sweep, key=sweep.get)),
                "norm-matched": matched, "linear": line}  # fmt: skip

    def work(self, real, samples):
        """All that the row of so many samples needs."""
        self.measured("baseline", scaling.constant(1.0))
        candidates = self.candidates(real)
        for start in range(0, samples, 1000):  # all candidates come as far before one goes on
            for s in candidates.values():
                self.features(s, REPORT_SEED + start, 1000)
        for name in ("uniform", "norm-matched"):
            self.measured(name, candidates[name])

    def result(self, real):
        """The row: from what is in the cache."""
        sweep = self.sweep(real, compute=False)
        candidates = self.candidates(real, compute=False)
        row = {"sampler": self.name, "steps": self.steps, "calls": len(self.sampler(1.0)), "sweep": sweep}
        if candidates is None:
            return row if sweep else None
        lambdas = {name: s.values(self.steps).tolist() for name, s in candidates.items()}
        row["lambda"] = {
            name: values[0] if name in ("baseline", "uniform") else values for name, values in lambdas.items()
        }
        matched = json.loads((RESULTS / f"{self.title}-lambda.json").read_text())["notes"]["lambda_t"]
        row["fits"] = {kind: {"coefficients": found.coefficients, "r2": found.r2 if np.isfinite(found.r2) else None}
                       for kind in calibrate.FITS for found in [calibrate.fit(matched, kind)]}  # fmt: skip
        row["tables"] = {}
        for count in ROUNDS:
            sets = {name: self.features(s, REPORT_SEED, count, compute=False) for name, s in candidates.items()}
            if all(features is not None for features in sets.values()):
                found = quality.compare(real, sets)
                row["tables"][count] = {
                    name: {key: [e.value, e.low, e.high] for key, e in each.items()} for name, each in found.items()
                }
        return row


def to_bytes(samples):
    """As an image file would hold them, uint8 (N, 1, 28, 28); what is not finite is black, and far from any digit."""
    return (samples.nan_to_num(-1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


@functools.cache
def features_of(path):
    return quality.digit_features(np.load(path).astype(np.float32) / 127.5 - 1)


def label(s, steps):
    """A file name's part for a scaling."""
    values = s.values(steps)
    if (values == values[0]).all():
        return f"{values[0]:.6g}".replace(".", "_")
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]


def real_features():
    return quality.digit_features(images.load("mnist", (1, 28, 28)))


def settings(deadline=float("inf")):
    model = models.load()
    return [Setting(name, steps, model, deadline) for name, steps in SETTINGS]


def write_results(real):
    rows = [row for setting in settings() if (row := setting.result(real))]
    for row in rows:
        row["sweep"] = {f"{b:g}": distance for b, distance in row["sweep"].items()}
    saved = {"classifier": "epskernels/digits/classifier.npz", "select": [SELECT_SEED, SELECT], "report": REPORT_SEED,
             "torch": torch.__version__, "epskernels": epskernels.__version__, "rows": rows}  # fmt: skip
    text = json.dumps(saved, indent=1, allow_nan=False) + "\n"
    write_whole(RESULTS / "exposure.json", lambda file: file.write(text.encode()))


def run(minutes):
    real = real_features()
    deadline = time.monotonic() + 60 * minutes
    try:
        for samples in ROUNDS:
            for setting in settings(deadline):
                print(f"{setting.title}, {samples} samples", flush=True)
                setting.work(real, samples)
                write_results(real)
    except OutOfTime:
        print("out of time", flush=True)
    write_results(real)


def status():
    real = real_features()
    for setting in settings():
        candidates = setting.candidates(real, compute=False)
        if candidates is None:
            print(f"{setting.title}: sweep of {len(setting.sweep(real, compute=False))} of {len(GRID)}")
            continue
        counts = {name: sum(setting.features(s, start, CHUNK, compute=False) is not None for start in range(0, 5000, CHUNK))
                  for name, s in candidates.items()}  # fmt: skip
        print(f"{setting.title}: " + ", ".join(f"{name} {CHUNK * count}" for name, count in counts.items()))


def quick():
    """One row again, nothing read from the cache: the distances and their difference must lie in the table's intervals."""
    name, steps, count = QUICK
    saved = json.loads((RESULTS / "exposure.json").read_text())
    row = next(row for row in saved["rows"] if (row["sampler"], row["steps"]) == (name, steps))
    table, b = row["tables"][str(count)], row["lambda"]["uniform"]
    setting, real = Setting(name, steps, models.load()), real_features()
    started, sets = time.monotonic(), {}
    for key, value in (("baseline", 1.0), ("uniform", b)):
        samples = []
        for start in range(0, count, CHUNK):
            seeds = range(REPORT_SEED + start, REPORT_SEED + start + CHUNK)
            samples.append(epskernels.sample(setting._call, setting.sampler(value), seeds, setting.model.shape))
        sets[key] = quality.digit_features(to_bytes(torch.cat(samples)).astype(np.float32) / 127.5 - 1)
    found = quality.compare(real, sets, k=None)
    print(f"{setting.title}, {count} samples, {time.monotonic() - started:.0f} s; the table's in brackets")
    failed = False
    for key, measure in (("baseline", "frechet"), ("uniform", "frechet"), ("uniform", "frechet_difference")):
        value, (_, low, high) = found[key][measure].value, table[key][measure]
        inside = low <= value <= high
        failed |= not inside
        said = "" if inside else ": NOT inside"
        print(f"  lambda {1.0 if key == 'baseline' else b:g}, {measure}: {value:.4f} [{low:.4f}, {high:.4f}]{said}")
    return int(failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "status", "quick", "report"))
    parser.add_argument("--minutes", type=float, default=30.0, help="run: stop after so many; default: %(default)s")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.command == "run":
        return run(args.minutes)
    if args.command == "report":
        from exposure_report import report

        return report(json.loads((RESULTS / "exposure.json").read_text()), RESULTS, DOCS)
    return {"status": status, "quick": quick}[args.command]()


if __name__ == "__main__":
    raise SystemExit(main())
