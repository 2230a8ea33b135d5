"""Epsilon Scaling on small models: what it does to exposure bias and to sample quality, per sampler and number of steps.

    python experiments/exposure.py run --minutes 30      # goes on where it stopped; everything lies in runs/exposure
    python experiments/exposure.py run --subject power   # one model only; several runs at once share the work
    python experiments/exposure.py status
    python experiments/exposure.py quick                 # one row again, within five minutes
    python experiments/exposure.py report                # docs/exposure/*.svg; the tables of docs/exposure.md and README.md

For each setting (model, sampler, steps): lambda_t by norms, and b by trials of the Frechet distance over one set of seeds; the
distances in the table are of another. Some settings try other shapes of lambda_t too, b is their mean. The corrections of
`comparison.py` come first. A run can stop at any
time: it keeps samples in files, a chunk of seeds each, and what it found in a file for each setting. `report` moves the
latter into experiments/results, one file for each model. What the results hold is not made again.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import time

import comparison
import filelock
import numpy as np
import records
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
FIRST_STEP = 0.01  # of b, from trial to trial

# Model calls of a chain, and chains that only cheap models are asked for.
CALLS = (10, 20, 50, 100)
LONG = {"digits_edm": [("ddpm", 1000)], "power": [("ddpm", 1000), ("ddim", 1000)]}
# Settings that compare shapes, and norms matched with feedback.
SHAPED = {("ddpm", 10), ("ddim", 10), ("edm_euler", 10)}
FEEDBACK = {"norm-matched": False, "with feedback": True}  # of `calibrate.match_norms`
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


class Missing(Exception):
    """What is asked for is not known, and is not to be made."""


def shaped(shape, b, steps):
    """The EpsilonScaling of that shape whose mean is b."""
    if b == 1 or shape == "uniform":
        return scaling.constant(b)
    weight = SHAPES[shape](np.linspace(0, 1, steps))
    return scaling.array(1 + (b - 1) * weight / weight.mean(), origin="cleanest")


def smallest_step(steps):
    """By how little b changes in the last trials: downhill by the first step as far as it goes, then by half of it, and so on."""
    return FIRST_STEP / (8 if steps >= 1000 else 4 if steps >= 50 else 2)


class Setting:
    """A model, a sampler and a number of steps: what is known of them, and how to know more."""

    def __init__(self, subject, name, steps, deadline=float("inf")):
        self.subject, self.name, self.steps, self.deadline = subject, name, steps, deadline
        self.title, self.report_seed = f"{name}-{steps}", REPORT_SEED
        self.skip = steps // 4  # cleanest steps that the fits leave out: the paper's 5 of 20
        compares = (name, steps) in SHAPED
        self.shapes, self.matches = (SHAPES, tuple(FEEDBACK)) if compares else (("uniform",), ("norm-matched",))
        self.folder = CACHE / subject.name / self.title
        self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def row(self):
        """What is known, as `records` says. Read at the first use: `run` holds the setting's lock by then."""
        fresh = {"sampler": self.name, "steps": self.steps, "calls": len(self.sampler(1.0)),
                 "trials": {shape: {} for shape in self.shapes}, "norms": {}, "exposure": {}}  # fmt: skip
        return known_rows(self.subject).get((self.name, self.steps), fresh)

    def keep(self, **found):
        """Puts that into the row, and the row into the setting's file."""
        self.row.update(records.rounded(found))
        with lock(self.subject):
            records.write(self.folder / "row.json", about(self.subject), [self.row])

    def sampler(self, s, c=None):
        return self.subject.samplers[self.name](self.steps, s, c)

    def label(self, s, c):
        """A file name's part for a scaling and a correction."""
        if c is None and not s.by_level:
            return file_label(s, self.steps)
        return hashlib.sha256(self.sampler(s, c).rows.numpy().tobytes()).hexdigest()[:12]

    def _check_time(self):
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _call(self, x, t):
        self._check_time()
        return self.subject.call(x, t)

    @functools.cached_property
    def _calibration(self):
        return torch.from_numpy(self.subject.real()[:CALIBRATION])

    def matched(self, name):
        """lambda_t by norms, (steps,) numbers."""
        if name not in self.row["norms"]:
            found = calibrate.match_norms(
                self._call, self.sampler, self._calibration, feedback=FEEDBACK[name], seed=SELECT_SEED
            )
            new = {"lambda_t": found.lambda_t.tolist(), "standard_error": found.standard_error.tolist()}
            self.keep(norms=self.row["norms"] | {name: new})
        return self.row["norms"][name]["lambda_t"]

    def matched_at(self, calls):
        """The `calibrate.Matched` of this sampler at so many model calls, from the results where they have it."""
        other = Setting(self.subject, self.name, steps_of(self.name, calls), self.deadline)
        if "norm-matched" not in other.row["norms"]:
            return calibrate.match_norms(self._call, other.sampler, self._calibration, seed=SELECT_SEED)
        known = other.row["norms"]["norm-matched"]
        table, step_of_row = calibrate.steps_of(other.sampler)
        rows = np.searchsorted(step_of_row, np.arange(other.steps))
        levels = scaling.log_snr(table["alpha_in"][rows], table["sigma_in"][rows])
        lambda_t, error, nothing = (
            np.array(known["lambda_t"]),
            np.array(known["standard_error"]),
            np.full(other.steps, np.nan),
        )
        return calibrate.Matched(table.name, CALIBRATION, lambda_t, error, nothing, nothing, levels)

    def measured(self, label, s):
        """The exposure bias with a scaling."""
        table, known = self.sampler(s), self.row["exposure"]
        lambda_t = table["lambda_t"].tolist()
        if label not in known or known[label]["rows"]["lambda_t"] != lambda_t:  # b may have been another
            state = self.folder / f"exposure-{label}-{file_label(s, self.steps)}.npz"
            found = exposure.measure(self._call, table, self._calibration, seed=2 * SELECT_SEED, state=state)
            self.keep(exposure=known | {label: records.of_exposure(found)})
            state.unlink(missing_ok=True)
        return records.to_exposure(self.row["exposure"][label])

    def features(self, s, first, count, compute=True, c=None):
        """(count, D) features of the samples of seeds first, first + 1, ...; None where they are not all there."""
        chunks = []
        for start in range(first, first + count, CHUNK):
            path = self.folder / f"{self.label(s, c)}-{start:06d}.npy"
            if not path.exists():
                if not compute:
                    return None
                self._check_time()
                samples = self.sample(s, range(start, start + CHUNK), c)
                write_whole(path, lambda file, samples=samples: np.save(file, samples))
            chunks.append(features_of(self.subject, path))
        return np.concatenate(chunks)

    def sample(self, s, seeds, c=None):
        """As they are stored."""
        return self.subject.to_stored(epskernels.sample(self._call, self.sampler(s, c), seeds, self.subject.shape))

    def trial(self, s, real, c=None):
        """The Frechet distance of the selection's samples, of which nothing is kept."""
        seeds = range(SELECT_SEED, SELECT_SEED + self.subject.trial)
        stored = [self.sample(s, seeds[start : start + CHUNK], c) for start in range(0, len(seeds), CHUNK)]
        features = self.subject.features(self.subject.from_stored(np.concatenate(stored)))
        return records.rounded(quality.frechet(real, features))

    def chain(self, s, c):
        """delta_t after each row, down the chain from real data."""
        table = self.sampler(s, c)
        found = exposure.measure(self._call, table, self._calibration, seed=2 * SELECT_SEED, parts=("chain",))
        return found.delta_chain.tolist()

    def trials(self, real, shape="uniform", compute=True):
        """({b: Frechet distance of the selection's samples}, whether all trials are there)."""
        found = {float(b): distance for b, distance in self.row["trials"].get(shape, {}).items()}

        def distance(b):
            if b not in found:
                if not compute:
                    raise Missing
                features = self.features(shaped(shape, b, self.steps), SELECT_SEED, self.subject.trial)
                found[b] = records.rounded(quality.frechet(real, features))
                new = {f"{b:g}": found[b] for b in sorted(found)}
                self.keep(trials=self.row["trials"] | {shape: new})
            return found[b]

        try:
            calibrate.downhill(distance, 1.0, FIRST_STEP, smallest=smallest_step(self.steps), limits=LIMITS)
        except Missing:
            return found, False
        return found, True

    def candidates(self, real, compute=True):
        """The scalings of the table's row, by name; None where their selection is not done."""
        found = {"baseline": scaling.constant(1.0)}
        for shape in self.shapes:
            trials, complete = self.trials(real, shape, compute)
            if not complete:
                return None
            found[shape] = shaped(shape, min(trials, key=trials.get), self.steps)
        if not compute and not all(name in self.row["norms"] for name in self.matches):
            return None
        for name in self.matches:
            kept = self.matched(name)[: self.steps - self.skip]
            found[name] = scaling.array(kept + [1.0] * self.skip, origin="noisiest")
        line = calibrate.fit(self.matched("norm-matched"), "linear", self.skip)
        if self.steps <= 20 and (line(np.arange(self.steps)) > 0).all():  # no lambda otherwise
            found["fit to norms"] = line.scaling
        return found

    def work(self, real, samples):
        """All that the row of so many samples needs."""
        self.measured("baseline", scaling.constant(1.0))
        candidates = self.candidates(real)
        lambda_t = lambdas(candidates, self.steps)
        if self.row.get("lambda") != lambda_t:
            self.keep(**{"lambda": lambda_t, "tables": {}})
        if str(samples) not in self.row["tables"]:
            for start in range(0, samples, STRIDE):  # all candidates come as far before one goes on
                for s in candidates.values():
                    self.features(s, REPORT_SEED + start, min(STRIDE, samples))
            sets = {name: self.features(s, REPORT_SEED, samples) for name, s in candidates.items()}
            new = {
                name: {measure: [e.value, e.low, e.high] for measure, e in each.items()}
                for name, each in quality.compare(real, sets, resamples=RESAMPLES).items()
            }
            self.keep(tables=self.row["tables"] | {str(samples): new})
        for name in ("uniform", "norm-matched"):
            self.measured(name, candidates[name])


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


def settings(subject, deadline=float("inf")):
    """All of a model's, in the order of the work."""
    chains = [(name, steps_of(name, calls)) for calls in CALLS for name in subject.samplers]
    return [Setting(subject, *chain, deadline) for chain in chains + LONG.get(subject.name, [])]


def steps_of(name, calls):
    """The steps of a chain of about so many model calls: edm_heun's n steps make 2*n - 1."""
    return calls // 2 + (calls < 50) if name == "edm_heun" else calls


def results_path(subject):
    return RESULTS / f"{subject.name}.json"


@functools.cache
def lock(subject):
    """Of the results, and of what runs have kept beside them."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(CACHE / f"{subject.name}.lock")


def kept_paths(subject):
    """The settings' files that are not in the results yet, of the same weights, seeds and data as now."""
    paths = sorted((CACHE / subject.name).glob("*/row.json"))
    return [path for path in paths if records.read(path, about(subject))]


def known_rows(subject):
    """{(sampler, steps): row} of the results, and in their place those that runs have kept since."""
    with lock(subject):
        paths = [path for path in (results_path(subject), *kept_paths(subject)) if path.exists()]
        rows = [row for path in paths for row in records.read(path, about(subject))]
    return {(row["sampler"], row["steps"]): row for row in rows}


def fold(subject):
    """Moves what runs have kept into the results, all of it or nothing."""
    with lock(subject):
        if not (kept := kept_paths(subject)):
            return
        rows = known_rows(subject)
        ordered = [rows[key] for s in settings(subject) if (key := (s.name, s.steps)) in rows]
        records.write(results_path(subject), about(subject), ordered)
        for path in kept:
            path.unlink()


@functools.cache
def about(subject):
    """What all rows have in common: which features, how many samples, and how far apart sets of the real data are themselves,
    with noise of some standard deviations on one of them."""
    real = subject.real()
    first, others = subject.features(real[::5]), real[4::5]
    noise = epskernels.normal(range(len(others)), subject.shape).numpy()
    floor = {f"{size:g}": quality.frechet(first, subject.features(others + size * noise)) for size in (0, 0.02, 0.05)}
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in subject.weights}
    found = {"weights": weights, "select": [SELECT_SEED, subject.trial], "report": REPORT_SEED, "resamples": RESAMPLES,
             "noise": {"sets": [len(first), len(others)], **floor}}  # fmt: skip
    return records.rounded(found)


def run(minutes, subjects):
    deadline = time.monotonic() + 60 * minutes
    known = {subject.name: subject for subject in subjects}
    compared = [
        Setting(known[subject], name, steps_of(name, calls), deadline)
        for subject, name, calls in comparison.cells(known)
        if name in known[subject].samplers
    ]
    work = [(setting, "corrections", comparison.work) for setting in compared]
    for samples in ROUNDS:
        table = functools.partial(Setting.work, samples=samples)
        work += [(setting, f"{samples} samples", table) for each in subjects for setting in settings(each, deadline)]
    try:
        for setting, what, do in work:
            try:
                with filelock.FileLock(setting.folder / "lock", blocking=False):
                    print(f"{setting.subject.name}, {setting.title}, {what}", flush=True)
                    do(setting, real_features(setting.subject))
            except filelock.Timeout:
                continue  # another run is at it
    except OutOfTime:
        print("out of time", flush=True)


def status(subjects):
    for subject in subjects:
        for setting in settings(subject):
            candidates = setting.candidates(real_features(subject), compute=False)
            compared = setting.row.get("corrected", {})
            if candidates is None:
                said = f"{len(setting.trials(real_features(subject), compute=False)[0])} trials"
            else:
                made = {name: sum(setting.features(s, start, CHUNK, compute=False) is not None
                                  for start in range(0, ROUNDS[-1], CHUNK)) for name, s in candidates.items()}  # fmt: skip
                said = ", ".join(f"{name} {CHUNK * count}" for name, count in made.items())
            tables = ", ".join(setting.row.get("tables", [])) or "none"
            corrected = (
                ", ".join(compared.get("tables", [])) or f"{sum(map(len, compared.get('trials', {}).values()))} trials"
            )
            print(f"{subject.name}, {setting.title}: {said}; tables: {tables}; corrections: {corrected}")


def quick():
    """One row again, nothing read from the cache: the distances and their difference must lie in the table's intervals."""
    subject, name, steps, count = QUICK
    subject = SUBJECTS[subject]()
    setting, started, sets = Setting(subject, name, steps), time.monotonic(), {}
    table, b = setting.row["tables"][str(count)], setting.row["lambda"]["uniform"]
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

        for subject in subjects:
            fold(subject)
        found = {s.name: results_path(s) for s in subjects}
        return report({name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}, ROOT)
    return {"status": lambda: status(subjects), "quick": quick}[args.command]()


if __name__ == "__main__":
    raise SystemExit(main())
