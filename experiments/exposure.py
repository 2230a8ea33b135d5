"""Epsilon Scaling on small models: what it does to exposure bias and to sample quality, per sampler and number of steps.

    python experiments/exposure.py run --minutes 30      # goes on where it stopped; everything lies in runs/exposure
    python experiments/exposure.py run --subject power   # one model only; several runs at once share the work
    python experiments/exposure.py status
    python experiments/exposure.py quick                 # one row again, within five minutes
    python experiments/exposure.py report                # docs/exposure/*.svg; the tables of docs/exposure.md and README.md

For each setting (model, sampler, steps): lambda_t by norms, and b by trials of the Frechet distance over one set of seeds; the
distances in the table are of another. Some settings try other shapes of lambda_t too, b is their mean. Samples are kept in
files, a chunk of seeds each, so that a run can stop at any time. The results, experiments/results, are computed again
from those; the trials and tables that they hold are not made again.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import time

import filelock
import numpy as np
import torch
from subjects import SUBJECTS

import epskernels
from epskernels import calibrate, exposure, quality, scaling
from epskernels.files import write_whole

ROOT = pathlib.Path(__file__).parents[1]
CACHE, RESULTS = ROOT / "runs" / "exposure", ROOT / "experiments" / "results"
CHUNK = 100  # samples to a file
CALIBRATION = 256  # real data, for norms and exposure bias
SELECT_SEED = 100_000  # where the seeds of a trial's samples begin
REPORT_SEED = 0
ROUNDS = (1000, 2000, 5000)  # samples in the table: all settings get the first number before one gets the second
STRIDE = 1000
RESAMPLES = 200
QUICK = ("digits", "ddpm", 10, 1000)
LIMITS = (0.8, 1.25)  # of b

# Model calls of a chain, and chains that only cheap models are asked for.
CALLS = (10, 20, 50, 100)
LONG = {"digits_edm": [("ddpm", 1000)], "power": [("ddpm", 1000), ("ddim", 1000)]}
# Settings that compare shapes, and norms matched with feedback.
SHAPED = {("ddpm", 10), ("ddim", 10), ("edm_euler", 10)}
# lambda_t - 1 along the chain, i from 0 at the cleanest step to 1 at the noisiest; scaled to a mean of 1, times b - 1.
SHAPES = {
    "uniform": np.ones_like,
    "linear": lambda i: i,
    "linear, falling": lambda i: 1 - i,
    "quadratic": lambda i: i**2,
    "exponential": lambda i: np.expm1(4 * i),
}


class OutOfTime(Exception):
    """The minutes are used up."""


def shaped(shape, b, steps):
    """The EpsilonScaling of that shape whose mean is b."""
    if b == 1 or shape == "uniform":
        return scaling.constant(b)
    weight = SHAPES[shape](np.linspace(0, 1, steps))
    return scaling.array(1 + (b - 1) * weight / weight.mean(), origin="cleanest")


def trial_steps(steps):
    """By how much b changes from trial to trial: downhill by the first as far as it goes, then by the next."""
    return (0.01, 0.005) + (0.0025,) * (steps >= 50) + (0.00125,) * (steps >= 1000)


class Setting:
    """A model, a sampler and a number of steps: what is known of them, and how to know more. row: of the results, or None."""

    def __init__(self, subject, name, steps, row=None, deadline=float("inf")):
        self.subject, self.name, self.steps, self.deadline = subject, name, steps, deadline
        self.title = f"{name}-{steps}"
        self.row = {} if row is None else row
        self.skip = steps // 4  # cleanest steps that the fits leave out: the paper's 5 of 20
        compares = (name, steps) in SHAPED
        self.shapes, self.feedback = (SHAPES, (False, True)) if compares else (("uniform",), (False,))
        self.folder, self.results = CACHE / subject.name / self.title, RESULTS / subject.name
        for folder in (self.folder, self.results):
            folder.mkdir(parents=True, exist_ok=True)

    def sampler(self, s):
        return self.subject.samplers[self.name](self.steps, s)

    def _check_time(self):
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _call(self, x, t):
        self._check_time()
        return self.subject.call(x, t)

    @functools.cached_property
    def _calibration(self):
        return torch.from_numpy(self.subject.real()[:CALIBRATION])

    def matched(self, feedback=False):
        """lambda_t by norms, kept as a file of its own."""
        path = self._matched_path(feedback)
        if not path.exists():
            found = calibrate.match_norms(
                self._call, self.sampler, self._calibration, feedback=feedback, seed=SELECT_SEED
            )
            s = found.scaling("array", self.skip)
            s.save(path, sampler=self.title, images=CALIBRATION, feedback=feedback, lambda_t=found.lambda_t.tolist(),
                   standard_error=found.standard_error.tolist())  # fmt: skip
        return scaling.load(path)

    def _matched_path(self, feedback):
        return self.results / f"{self.title}-{'feedback' if feedback else 'lambda'}.json"

    def measured(self, label, s):
        """The exposure bias with a scaling."""
        path, table = self.results / f"{self.title}-{label}.json", self.sampler(s)
        if path.exists():
            found = exposure.Exposure.load(path)
            if np.array_equal(found.lambda_t, table["lambda_t"]):  # b may have been another
                return found
        state = self.folder / f"exposure-{label}-{file_label(s, self.steps)}.npz"
        found = exposure.measure(self._call, table, self._calibration, seed=2 * SELECT_SEED, state=state)
        found.save(path)
        state.unlink(missing_ok=True)
        return found

    def features(self, s, first, count, compute=True):
        """(count, D) features of the samples of seeds first, first + 1, ...; None where they are not all there."""
        chunks = []
        for start in range(first, first + count, CHUNK):
            path = self.folder / f"{file_label(s, self.steps)}-{start:06d}.npy"
            if not path.exists():
                if not compute:
                    return None
                self._check_time()
                samples = self.sample(s, range(start, start + CHUNK))
                write_whole(path, lambda file, samples=samples: np.save(file, samples))
            chunks.append(features_of(self.subject, path))
        return np.concatenate(chunks)

    def sample(self, s, seeds):
        """As they are stored."""
        return self.subject.to_stored(epskernels.sample(self._call, self.sampler(s), seeds, self.subject.shape))

    def trials(self, real, shape="uniform", compute=True):
        """({b: Frechet distance of the selection's samples}, whether all trials are there)."""
        found = {float(b): distance for b, distance in self.row.get("trials", {}).get(shape, {}).items()}

        def there(b):
            if b not in found:
                features = self.features(shaped(shape, b, self.steps), SELECT_SEED, self.subject.trial, compute)
                if features is None:
                    return False
                found[b] = quality.frechet(real, features)
            return True

        best = 1.0
        for step in trial_steps(self.steps):
            moved = True
            while moved:
                near = [b for b in (best, round(best - step, 5), round(best + step, 5)) if LIMITS[0] <= b <= LIMITS[1]]
                if not all(there(b) for b in near):
                    return found, False
                lower = min(near, key=found.get)
                best, moved = lower, lower != best
        return found, True

    def candidates(self, real, compute=True):
        """The scalings of the table's row, by name; None where their selection is not done."""
        found = {"baseline": scaling.constant(1.0)}
        for shape in self.shapes:
            trials, complete = self.trials(real, shape, compute)
            if not complete:
                return None
            found[shape] = shaped(shape, min(trials, key=trials.get), self.steps)
        if not compute and not all(self._matched_path(feedback).exists() for feedback in self.feedback):
            return None
        found["norm-matched"], notes = self.matched()
        if True in self.feedback:
            found["with feedback"], _ = self.matched(True)
        line = calibrate.fit(notes["lambda_t"], "linear", self.skip)
        if self.steps <= 20 and (line(np.arange(self.steps)) > 0).all():  # no lambda otherwise
            found["fit to norms"] = line.scaling
        return found

    def work(self, real, samples):
        """All that the row of so many samples needs."""
        self.measured("baseline", scaling.constant(1.0))
        candidates = self.candidates(real)
        if str(samples) not in self.tables(candidates):
            for start in range(0, samples, STRIDE):  # all candidates come as far before one goes on
                for s in candidates.values():
                    self.features(s, REPORT_SEED + start, min(STRIDE, samples))
        for name in ("uniform", "norm-matched"):
            self.measured(name, candidates[name])

    def tables(self, candidates):
        """Those of the results, where they are of the same candidates."""
        same = self.row.get("lambda") == lambdas(candidates, self.steps)
        return dict(self.row["tables"]) if same else {}

    def result(self, real):
        """The row: from what is in the cache, and from the row before."""
        trials = {shape: self.trials(real, shape, compute=False)[0] for shape in self.shapes}
        candidates = self.candidates(real, compute=False)
        if not any(trials.values()):
            return None
        row = {"sampler": self.name, "steps": self.steps, "calls": len(self.sampler(1.0))}
        row["trials"] = {shape: {f"{b:g}": found[b] for b in sorted(found)} for shape, found in trials.items()}
        if candidates is None:
            return {**self.row, **row}
        row["lambda"] = lambdas(candidates, self.steps)
        row["matched"] = matched = self.matched()[1]["lambda_t"]  # the cleanest steps too
        row["fits"] = {kind: {"coefficients": found.coefficients, "r2": found.r2 if np.isfinite(found.r2) else None}
                       for kind in calibrate.FITS for found in [calibrate.fit(matched, kind, self.skip)]}  # fmt: skip
        row["tables"] = self.tables(candidates)
        for count in ROUNDS:
            if str(count) not in row["tables"]:
                sets = {name: self.features(s, REPORT_SEED, count, compute=False) for name, s in candidates.items()}
                if all(features is not None for features in sets.values()):
                    found = quality.compare(real, sets, resamples=RESAMPLES)
                    row["tables"][str(count)] = {
                        name: {key: [e.value, e.low, e.high] for key, e in each.items()} for name, each in found.items()
                    }
        return row


def lambdas(candidates, steps):
    """lambda_t by name; one number where it is the same at all steps."""
    found = {name: s.values(steps).tolist() for name, s in candidates.items()}
    return {name: values[0] if len(set(values)) == 1 else values for name, values in found.items()}


def file_label(s, steps):
    """A file name's part for a scaling."""
    values = s.values(steps)
    if (values == values[0]).all():
        return f"{values[0]:.6g}".replace(".", "_")
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]


@functools.cache
def features_of(subject, path):
    return subject.features(subject.from_stored(np.load(path)))


@functools.cache
def real_features(subject):
    return subject.features(subject.real())


def settings(subject, rows=(), deadline=float("inf")):
    """All of a model's, in the order of the work."""
    known = {(row["sampler"], row["steps"]): row for row in rows}
    chains = [(name, steps_of(name, calls)) for calls in CALLS for name in subject.samplers]
    return [Setting(subject, *chain, known.get(chain), deadline) for chain in chains + LONG.get(subject.name, [])]


def steps_of(name, calls):
    """The steps of a chain of about so many model calls: edm_heun's n steps make 2*n - 1."""
    return calls // 2 + (calls < 50) if name == "edm_heun" else calls


def results_path(subject):
    return RESULTS / f"{subject.name}.json"


def known_rows(subject):
    """The rows of the results, where their numbers can be compared with those of now: of another processor's too."""
    path = results_path(subject)
    if not path.exists():
        return []
    saved, now = json.loads(path.read_text()), about(subject)
    noise, noise_now = saved["about"]["noise"], now["noise"]
    same = {**saved["about"], "noise": None} == {**now, "noise": None} and noise.keys() == noise_now.keys()
    same = same and all(np.allclose(noise[key], noise_now[key], rtol=1e-4) for key in noise)
    return saved["rows"] if same else []


@functools.cache
def about(subject):
    """What all rows have in common: which features, how many samples, and how far apart sets of the real data are themselves,
    with noise of some standard deviations on one of them."""
    real = subject.real()
    first, others = subject.features(real[::5]), real[4::5]
    noise = epskernels.normal(range(len(others)), subject.shape).numpy()
    floor = {f"{size:g}": quality.frechet(first, subject.features(others + size * noise)) for size in (0, 0.02, 0.05)}
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in subject.weights}
    return {"weights": weights, "select": [SELECT_SEED, subject.trial], "report": REPORT_SEED, "resamples": RESAMPLES,
            "noise": {"sets": [len(first), len(others)], **floor}}  # fmt: skip


def write_results(subject):
    """From the cache and the results so far; what other runs have added to those is kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(CACHE / f"{subject.name}.lock"):
        rows = [row for s in settings(subject, known_rows(subject)) if (row := s.result(real_features(subject)))]
        versions = {"torch": torch.__version__, "epskernels": epskernels.__version__}
        text = json.dumps({"about": about(subject), **versions, "rows": rows}, indent=1, allow_nan=False) + "\n"
        write_whole(results_path(subject), lambda file: file.write(text.encode()))


def run(minutes, subjects):
    deadline = time.monotonic() + 60 * minutes
    try:
        for samples in ROUNDS:
            for subject in subjects:
                for setting in settings(subject, known_rows(subject), deadline):
                    try:
                        with filelock.FileLock(setting.folder / "lock", blocking=False):
                            print(f"{subject.name}, {setting.title}, {samples} samples", flush=True)
                            setting.work(real_features(subject), samples)
                            write_results(subject)
                    except filelock.Timeout:
                        continue  # another run is at it
    except OutOfTime:
        print("out of time", flush=True)
        write_results(subject)


def status(subjects):
    for subject in subjects:
        for setting in settings(subject, known_rows(subject)):
            candidates = setting.candidates(real_features(subject), compute=False)
            if candidates is None:
                said = f"{len(setting.trials(real_features(subject), compute=False)[0])} trials"
            else:
                there = {name: sum(setting.features(s, start, CHUNK, compute=False) is not None
                                   for start in range(0, ROUNDS[-1], CHUNK)) for name, s in candidates.items()}  # fmt: skip
                said = ", ".join(f"{name} {CHUNK * count}" for name, count in there.items())
            tables = ", ".join(setting.row.get("tables", [])) or "none"
            print(f"{subject.name}, {setting.title}: {said}; tables: {tables}")


def quick():
    """One row again, nothing read from the cache: the distances and their difference must lie in the table's intervals."""
    subject, name, steps, count = QUICK
    subject = SUBJECTS[subject]()
    row = next(row for row in known_rows(subject) if (row["sampler"], row["steps"]) == (name, steps))
    table, b = row["tables"][str(count)], row["lambda"]["uniform"]
    setting, started, sets = Setting(subject, name, steps), time.monotonic(), {}
    for key, value in (("baseline", 1.0), ("uniform", b)):
        seeds = range(REPORT_SEED, REPORT_SEED + count)
        stored = [setting.sample(value, seeds[start : start + CHUNK]) for start in range(0, count, CHUNK)]
        sets[key] = subject.features(subject.from_stored(np.concatenate(stored)))
    found = quality.compare(real_features(subject), sets, k=None, resamples=RESAMPLES)
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
    parser.add_argument("--subject", choices=SUBJECTS, action="append", help="run, status: of these models only")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    subjects = [SUBJECTS[name]() for name in args.subject or SUBJECTS]
    if args.command == "run":
        return run(args.minutes, subjects)
    if args.command == "report":
        from exposure_report import report

        found = {s.name: results_path(s) for s in subjects}
        return report(
            {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}, RESULTS, ROOT
        )
    return {"status": lambda: status(subjects), "quick": quick}[args.command]()


if __name__ == "__main__":
    raise SystemExit(main())
