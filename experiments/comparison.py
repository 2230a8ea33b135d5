"""The corrections of exposure bias that need no training, side by side: `work` on a `Setting` of experiments/exposure.py.

uniform          lambda, by the trials of exposure.py
by level         lambda by noise level: the norm gap of that sampler's 20 model calls, at any number of steps
tsr              lambda by noise level, `scaling.tsr`: k by trials
dc               x' + s*(x' - m0): s by trials; "dc, alpha*m0" compares with alpha'*m0, where alpha is not 1
dcw low          the same of the low band, with the published schedule of its weight ("sigma") and a constant one
dcw double       beside the better of these, the high band
frequency        the low band's factor, then the high band's beside it
time shift       the row of the next call by the state's variance; its window by trials, where the network knows timesteps
pair             the best scaling and the best correction: the better stays, the other is searched again beside it

Weights are chosen over the selection's samples. They start where they change nothing, and go both ways. What is found lies in
the setting's row under "corrected", as `records` says.
"""

import functools

import records
from subjects import TimeShift

from epskernels import calibrate, corrections, quality, scaling

TRIALS = 9  # for each weight, at most; the start is known
RESAMPLES = 200
SAMPLES = {"power": 5000, "digits": 2000, "digits_edm": 2000}
LONG, SAMPLES_LONG = 50, {"digits": 1000, "digits_edm": 1000}  # from so many model calls on
FITTED_AT = 20  # model calls, of the norm gap by level
WINDOWS = (10, 20, 30, 60)  # of time shift
NOTHING = scaling.constant(1.0)
WEIGHT_OF = {"uniform": ("b", scaling.constant), "tsr": ("k", functools.partial(scaling.tsr, sigma=1.0))}
SAMPLERS = ("ddim", "ddpm", "edm_euler", "dpmpp_2m", "edm_heun")
# (model, model calls), what says most for its price first.
ORDER = (
    ("power", 10), ("digits_edm", 10), ("power", 20), ("digits_edm", 20), ("digits", 10), ("power", 50), ("digits", 20),
    ("digits_edm", 50), ("digits", 50),
)  # fmt: skip


class Compared:
    """What is known of a setting's corrections, and how to know more."""

    def __init__(self, setting, real):
        self.setting, self.real = setting, real
        self.found = {"trials": {}, "chosen": {}, "tables": {}, "delta": {}} | setting.row.get("corrected", {})
        table = setting.sampler(NOTHING)
        # What x' is compared with; where alpha is 1 it is the same.
        self.targets = {"dc": "m0"} | ({"dc, alpha*m0": "alpha*m0"} if (table["alpha_out"] != 1).any() else {})
        self.dims = min(2, len(setting.subject.shape) - 1)

    def _keep(self, part, **new):
        self.found[part] = self.found[part] | records.rounded(new)
        self.setting.keep(corrected=self.found)

    def distance(self, method, weights, s, c=None):
        """The Frechet distance of a trial, made once."""
        known = self.found["trials"].get(method, {})
        at = ",".join(f"{weight:.7g}" for weight in weights) or "fit"
        if at not in known:
            self._keep("trials", **{method: known | {at: self.setting.trial(s, self.real, c)}})
        return self.found["trials"][method][at]

    def search(self, method, start, make, at_start=None):
        """((scaling, correction), weights, distance) of a method's best weights. make: of the weights, (scaling, correction).

        at_start: the distance that the start has; default: of what is not corrected.
        """
        at_start = self.baseline if at_start is None else at_start

        def score(weights):
            if weights == start:
                return at_start
            return self.distance(method, weights.values(), *make(**weights))

        found = calibrate.search_weights(score, dict, start, trials=1 + (TRIALS - 1) * len(start))
        return make(**found.weights), found.weights, found.score

    @functools.cached_property
    def baseline(self):
        trials, _ = self.setting.trials(self.real)
        return trials[1.0]

    def by_level(self):
        """The norm gap of FITTED_AT model calls as a scaling by noise level, with 7 digits."""
        if "by level" not in self.found:
            matched = self.setting.matched_at(FITTED_AT)
            self.found["by level"] = records.rounded(matched.scaling("by_level").to_dict())
        return scaling.as_scaling(self.found["by level"])

    def scalings(self):
        trials, _ = self.setting.trials(self.real)
        b = min(trials, key=trials.get)
        yield "uniform", (scaling.constant(b), None), {"b": b}, trials[b]
        fitted = self.by_level()
        yield "by level", (fitted, None), {}, self.distance("by level", (), fitted)
        weight, make = WEIGHT_OF["tsr"]
        yield "tsr", *self.search("tsr", {weight: 1.0}, lambda **w: (make(**w), None))

    def corrections(self):
        """Of which each is (name, (scaling, correction), weights, distance)."""
        whole = {name: functools.partial(corrections.dc, target=target) for name, target in self.targets.items()}
        found = {name: self.search(name, {"s": 0.0}, beside(NOTHING, make)) for name, make in whole.items()}
        yield from ((name, *each) for name, each in found.items())
        target = self.targets[
            min(found, key=lambda name: found[name][-1])
        ]  # the bands are compared with what did better
        low = {}
        for schedule in corrections.SCHEDULES:
            make = functools.partial(corrections.dcw, schedule=schedule, target=target, dims=self.dims)
            low[schedule] = self.search(f"dcw low, {schedule}", {"low": 0.0}, beside(NOTHING, make))
            yield f"dcw low, {schedule}", *low[schedule]
        schedule = min(low, key=lambda name: low[name][-1])
        _, weights, distance = low[schedule]
        make = functools.partial(corrections.dcw, schedule=schedule, target=target, dims=self.dims, **weights)
        both, high, distance = self.search("dcw double", {"high": 0.0}, beside(NOTHING, make), distance)
        yield "dcw double", both, weights | high | {"schedule": schedule, "target": target}, distance
        make = functools.partial(corrections.frequency, dims=self.dims)
        yield "frequency", *self.search("frequency", {"low": 1.0, "high": 1.0}, beside(NOTHING, make))

    def pair(self, scalings, found):
        """(name, (scaling, correction), weights, distance) of the best scaling and the best correction together.

        The one that does better alone stays, and the other's weights are searched again beside it: what both mend, both overdo.
        """
        scaled, (lambda_t, _), _, by_scaling = min(scalings, key=lambda one: one[-1])
        corrected, (_, correction), weights, by_correction = min(found, key=lambda one: one[-1])
        method = f"{scaled} + {corrected}" if by_scaling <= by_correction else f"{corrected} + {scaled}"
        if by_scaling <= by_correction:
            start = dict.fromkeys((name for name in weights if name in ("s", "low", "high")), 0.0)
            if correction.kind == "frequency":
                start = dict.fromkeys(start, 1.0)
            of_all = (
                ("schedule",) + ("target",) * (correction.kind != "frequency") + ("dims",) * (correction.kind != "dc")
            )
            options = {key: getattr(correction, key) for key in of_all}
            make = functools.partial(getattr(corrections, correction.kind), **options)
            best = self.search(method, start, beside(lambda_t, make), by_scaling)
        elif scaled in WEIGHT_OF:
            weight, make = WEIGHT_OF[scaled]
            best = self.search(method, {weight: 1.0}, lambda **w: (make(**w), correction), by_correction)
        else:
            best = (lambda_t, correction), {}, self.distance(method, (), lambda_t, correction)
        made, searched, distance = best
        return "pair", made, {"together": method, **searched}, distance

    def time_shift(self):
        """(name, (scaling, TimeShift), window, distance) of the best window, 0 for none; nothing where there are no timesteps."""
        timesteps = self.setting.subject.samplers[self.setting.name].timesteps
        tried = {0: (None, self.baseline)}
        for window in WINDOWS if timesteps else ():
            if window <= timesteps // self.setting.steps:  # of a step's length at most
                shift = TimeShift(window)
                tried[window] = (shift, self.distance("time shift", (window,), NOTHING, shift))
        best = min(tried, key=lambda window: tried[window][1])
        if len(tried) > 1:
            yield "time shift", (NOTHING, tried[best][0]), {"window": best}, tried[best][1]

    def candidates(self):
        """{name: (scaling, correction or TimeShift)} of all methods, the weights chosen."""
        scalings, found = list(self.scalings()), list(self.corrections())
        named = [*scalings, *found, *self.time_shift(), self.pair(scalings, found)]
        chosen = {name: weights for name, _, weights, _ in named}
        if self.found["chosen"] != records.rounded(chosen):
            self.found |= {"chosen": {}, "tables": {}, "delta": {}}
            self._keep("chosen", **chosen)
        return {"baseline": (NOTHING, None)} | {name: made for name, made, *_ in named}

    def work(self):
        setting, name = self.setting, self.setting.subject.name
        candidates = self.candidates()
        samples = SAMPLES[name]
        if setting.row["calls"] >= LONG - 1:
            samples = SAMPLES_LONG.get(name, samples)
        if str(samples) not in self.found["tables"]:
            sets = {}
            for each, (s, c) in candidates.items():
                sets[each] = setting.features(s, setting.report_seed, samples, c=c)
            table = {
                each: {measure: [e.value, e.low, e.high] for measure, e in measures.items()}
                for each, measures in quality.compare(self.real, sets, resamples=RESAMPLES).items()
            }
            self._keep("tables", **{str(samples): table})
        for each, made in candidates.items():
            if each not in self.found["delta"] and not isinstance(made[1], TimeShift):
                self._keep("delta", **{each: setting.chain(*made)})


def cells(subjects):
    """(model, sampler, model calls) of all that is compared, of these models."""
    return [(subject, name, calls) for subject, calls in ORDER if subject in subjects for name in SAMPLERS]


def beside(scaled, make):
    """(scaling, correction) as a function of the correction's weights."""
    return lambda **weights: (scaled, make(**weights))


def work(setting, real):
    """All that a setting's row of the comparison needs."""
    Compared(setting, real).work()
