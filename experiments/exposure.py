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
GRID = (
    1.0,
    0.98,
    0.99,
    1.01,
    1.02,
)  # of b; then 0.01 farther while the best is at an end, then 0.005 to both of its sides
STRIDE = 1000
RESAMPLES = 200
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
        self.skip = steps // 4  # cleanest steps that the fits leave out: the paper's 5 of 20
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
        """({b: Frechet distance of the selection's samples}, whether all that the sweep asks for is there)."""
        found = {}

        def there(b):
            b = round(b, 4)
            if b not in found:
                features = self.features(scaling.constant(b), SELECT_SEED, SELECT, compute)
                if features is None:
                    return False
                found[b] = quality.frechet(real, features)
            return True

        for b in GRID:
            if not there(b):
                return found, False
        while 0.9 < (best := min(found, key=found.get)) < 1.1 and best in (min(found), max(found)):
            if not there(best + (0.01 if best > 1 else -0.01)):
                return found, False
        return found, there(best - 0.005) and there(best + 0.005)

    def candidates(self, real, compute=True):
        """The scalings of the table's row, by name; None where the selection is not done."""
        sweep, complete = self.sweep(real, compute)
        if not compute and not (complete and (RESULTS / f"{self.title}-lambda.json").exists()):
            return None
        matched, notes = self.matched()
        found = {"baseline": scaling.constant(1.0), "uniform": scaling.constant(min(sweep, key=sweep.get)),
                 "norm-matched": matched}  # fmt: skip
        line = calibrate.fit(notes["lambda_t"], "linear", self.skip)
        if (line(np.arange(self.steps)) > 0).all():  # no lambda otherwise
            found["linear"] = line.scaling
        return found

    def work(self, real, samples):
        """All that the row of so many samples needs."""
        self.measured("baseline", scaling.constant(1.0))
        candidates = self.candidates(real)
        for start in range(0, samples, STRIDE):  # all candidates come as far before one goes on
            for s in candidates.values():
                self.features(s, REPORT_SEED + start, STRIDE)
        for name in ("uniform", "norm-matched"):
            self.measured(name, candidates[name])

    def result(self, real, before):
        """The row: from what is in the cache, and what was compared before."""
        sweep, _ = self.sweep(real, compute=False)
        candidates = self.candidates(real, compute=False)
        row = {"sampler": self.name, "steps": self.steps, "calls": len(self.sampler(1.0))}
        row["sweep"] = {f"{b:g}": distance for b, distance in sweep.items()}
        if candidates is None:
            return before or (row if sweep else None)  # perhaps from another machine's cache
        lambdas = {name: s.values(self.steps).tolist() for name, s in candidates.items()}
        row["lambda"] = {
            name: values[0] if name in ("baseline", "uniform") else values for name, values in lambdas.items()
        }
        matched = json.loads((RESULTS / f"{self.title}-lambda.json").read_text())["notes"]["lambda_t"]
        row["fits"] = {kind: {"coefficients": found.coefficients, "r2": found.r2 if np.isfinite(found.r2) else None}
                       for kind in calibrate.FITS for found in [calibrate.fit(matched, kind, self.skip)]}  # fmt: skip
        same = before is not None and before.get("lambda") == row["lambda"]
        row["tables"] = dict(before["tables"]) if same else {}
        for count in ROUNDS:
            if str(count) in row["tables"]:
                continue
            sets = {name: self.features(s, REPORT_SEED, count, compute=False) for name, s in candidates.items()}
            if all(features is not None for features in sets.values()):
                found = quality.compare(real, sets, resamples=RESAMPLES)
                row["tables"][str(count)] = {
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


@functools.cache
def noise_floor():
    """{standard deviation: Frechet distance between 1,000 real digits and 1,000 others with such noise}."""
    digits, noise = images.load("mnist", (1, 28, 28)), epskernels.normal(range(1000), (1, 28, 28)).numpy()
    first, others = quality.digit_features(digits[::5]), digits[4::5]
    return {
        f"{size:g}": quality.frechet(first, quality.digit_features(others + size * noise)) for size in (0, 0.02, 0.05)
    }


def write_results(real):
    path, classifier = RESULTS / "exposure.json", hashlib.sha256(quality.WEIGHTS.read_bytes()).hexdigest()
    before = json.loads(path.read_text()) if path.exists() else {}
    known = before.get("rows", []) if before.get("classifier") == classifier else []
    known = {(row["sampler"], row["steps"]): row for row in known}
    rows = [row for s in settings() if (row := s.result(real, known.get((s.name, s.steps))))]
    saved = {"classifier": classifier, "resamples": RESAMPLES, "select": [SELECT_SEED, SELECT], "report": REPORT_SEED,
             "torch": torch.__version__, "epskernels": epskernels.__version__, "noise": noise_floor(), "rows": rows}  # fmt: skip
    text = json.dumps(saved, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


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
            print(f"{setting.title}: {len(setting.sweep(real, compute=False)[0])} of the sweep")
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
    found = quality.compare(real, sets, k=None, resamples=RESAMPLES)
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
