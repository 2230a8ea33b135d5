"""lambda_t of Epsilon Scaling (arXiv 2308.15321): eps_theta(x_t, t) -> eps_theta(x_t, t) / lambda_t.

The only place where lambda is defined; it is folded into a table's rows and has no name after that. It divides: lambda
above 1 shrinks the predicted noise. i is the 0-based index of the sampler's step; where it counts from is always said.
"""

import dataclasses
import functools
import json
import logging
import pathlib

import numpy as np

from .shards import write_whole

_log = logging.getLogger("epskernels")
ORIGINS = ("cleanest", "noisiest")
NOISE_ALONE = 1 / 900  # of alpha/sigma: a zero SNR is often written as sigma = 4096, and a flow begun at 0.999 or above
FORMAT = 1  # of the JSON files


@dataclasses.dataclass(frozen=True)
class EpsilonScaling:
    """lambda_i = formula(i), i = 0 at the cleanest or the noisiest step.

    `values(steps)` gives lambda for each step, the noisiest first. label: what repr shows. source: where it was published, or
    what it was fitted to. spec: the function here that made it and its arguments, for JSON; None for a formula of one's own.
    """

    formula: object
    origin: str
    label: str
    source: str = ""
    spec: dict | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.origin not in ORIGINS:
            raise ValueError(f"origin: expected 'cleanest' or 'noisiest' for the step i = 0, got {self.origin!r}")

    def values(self, steps):
        """(steps,) float64, the noisiest step first. Raises ValueError where lambda is not finite or not above 0."""
        lambdas = np.asarray(self.formula(np.arange(steps)), dtype=np.float64)
        if lambdas.shape != (steps,):
            raise ValueError(f"lambda: expected one value for each of {steps} steps, got shape {lambdas.shape}")
        if self.origin == "cleanest":
            lambdas = lambdas[::-1]
        bad = np.flatnonzero(~(np.isfinite(lambdas) & (lambdas > 0)))
        if bad.size:
            raise ValueError(
                f"lambda: expected finite values above 0, got {lambdas[bad[0]]} at step {bad[0]} of {steps} "
                f"from the noisiest, by {self.label}"
            )
        return lambdas.copy()

    def save(self, path, **notes):
        """To JSON, for `load`. notes: kept beside it, such as the sampler and the steps that it was fitted for.

        Raises ValueError for a formula that is not one of this module's.
        """
        if self.spec is None:
            raise ValueError(f"scaling: expected one made by a function of epskernels.scaling, to save it, got {self}")
        saved = {"format": FORMAT, **self.spec, "source": self.source, "notes": notes}
        text = json.dumps(saved, indent=1, allow_nan=False) + "\n"
        write_whole(pathlib.Path(path), lambda file: file.write(text.encode()))

    def __repr__(self):
        return f"EpsilonScaling({self.label}{', ' + self.source if self.source else ''})"


def _number(name, value):
    value = float(value)
    if not np.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def constant(b):
    """lambda_i = b: the paper's uniform schedule. b = 1 is no scaling."""
    b = _number("b", b)
    if b <= 0:
        raise ValueError(f"lambda: expected a value above 0, got {b}")
    spec = {"kind": "constant", "b": b}
    return EpsilonScaling(lambda i: np.full(i.shape, b), "noisiest", f"constant {b:g}", spec=spec)


def linear(k, b, *, origin):
    """lambda_i = k*i + b, the paper's linear schedule.

    origin: where i = 0 is, "cleanest" as in ADM-ES, "noisiest" as in the authors' DDIM code.
    """
    k, b = _number("k", k), _number("b", b)
    spec = {"kind": "linear", "k": k, "b": b, "origin": origin}
    return EpsilonScaling(lambda i: k * i + b, origin, f"linear k={k:g} b={b:g} from the {origin}", spec=spec)


def quadratic(a, k, b, *, origin):
    """lambda_i = a*i^2 + k*i + b."""
    a, k, b = _number("a", a), _number("k", k), _number("b", b)
    spec = {"kind": "quadratic", "a": a, "k": k, "b": b, "origin": origin}
    label = f"quadratic a={a:g} k={k:g} b={b:g} from the {origin}"
    return EpsilonScaling(lambda i: a * i**2 + k * i + b, origin, label, spec=spec)


def exponential(k, b, *, origin):
    """lambda_i = b*exp(k*i)."""
    k, b = _number("k", k), _number("b", b)
    spec = {"kind": "exponential", "k": k, "b": b, "origin": origin}
    label = f"exponential k={k:g} b={b:g} from the {origin}"
    return EpsilonScaling(lambda i: b * np.exp(k * i), origin, label, spec=spec)


def array(values, *, origin):
    """lambda_i = values[i]; the sampler must have exactly as many steps, else ValueError."""
    values = np.array(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values: expected shape (steps,), got {values.shape}")

    def formula(i):
        if len(i) != len(values):
            raise ValueError(f"lambda: expected one value for each of {len(i)} steps, got {len(values)}")
        return values

    spec = {"kind": "array", "values": values.tolist(), "origin": origin}
    scaling = EpsilonScaling(formula, origin, f"array of {len(values)} from the {origin}", spec=spec)
    scaling.values(len(values))
    return scaling


_KINDS = {function.__name__: function for function in (constant, linear, quadratic, exponential, array)}


def load(path):
    """The EpsilonScaling of a JSON file, and the notes beside it. Raises ValueError, naming the file, for anything else."""
    path = pathlib.Path(path)
    try:
        saved = json.loads(path.read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r}")
        arguments = {k: v for k, v in saved.items() if k not in ("format", "kind", "source", "notes")}
        scaling = _KINDS[saved["kind"]](**arguments)
        return dataclasses.replace(scaling, source=str(saved.get("source", ""))), dict(saved.get("notes", {}))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a scaling saved by EpsilonScaling.save, format {FORMAT}: {error}") from None


def as_scaling(scaling):
    """An EpsilonScaling, or a number for the constant one; anything else is a TypeError."""
    if isinstance(scaling, EpsilonScaling):
        return scaling
    if isinstance(scaling, (int, float, np.number)) and not isinstance(scaling, bool):
        return constant(scaling)
    raise TypeError(f"scaling: expected an EpsilonScaling or a number, got {type(scaling).__name__}")


def noise_alone(alpha, sigma, f_x0):
    """Whether so little of x = alpha*x_0 + sigma*eps is x_0 that lambda would say what x_0 is, and not the network.

    f_x0: the share of x_0 in the network's output. Where it is 0 the network predicts eps itself, its own errors are divided by
    alpha too, and lambda is left to it, as in the paper. Arrays or tensors.
    """
    return (alpha < NOISE_ALONE * sigma) & (f_x0 != 0)


def lambdas(scaling, alone, name="lambda", say=None):
    """(steps,) lambda of each step, the noisiest first; 1 where x is noise `alone`, (steps,) bool: only that has a meaning there.

    A formula gives 1 there, as `say` is told, by default the log, once; an array must.
    Raises ValueError where it does not, and as EpsilonScaling.values does.
    """
    lambda_t = scaling.values(len(alone))
    wrong = np.flatnonzero(alone & (lambda_t != 1))
    if wrong.size:
        i = int(wrong[0])
        if scaling.spec is not None and scaling.spec["kind"] == "array":
            raise ValueError(f"{name}: expected 1 where x is noise alone (step {i}), got {lambda_t[i]:g}")
        (say or _say)(f"{name} is 1 in step {i}: x is noise alone there")
        lambda_t[alone] = 1.0
    return lambda_t


@functools.cache
def _say(message):
    _log.warning("%s", message)


def scale(d_x, d_f, alpha, lambda_t):
    """(d_x, d_f) of m0 = d_x*x + d_f*f with eps -> eps/lambda_t: x0' = (1 - 1/lambda_t)*x/alpha + x0/lambda_t. For arrays or
    tensors."""
    return d_x / lambda_t + (1 - 1 / lambda_t) / alpha, d_f / lambda_t


# ---- the published settings (FIDs: baseline, then with Epsilon Scaling) ----

_ADM_DATASETS = ("CIFAR-10", "LSUN tower 64", "FFHQ 128", "ImageNet 64", "ImageNet 128")
_ADM_UNIFORM = {
    100: ((1.017, 3.37, 2.17), (1.006, 3.59, 2.91), (1.005, 14.52, 6.77), (1.006, 2.71, 2.39), (1.004, 3.55, 3.37)),
    50: ((1.017, 4.43, 2.49), (1.007, 7.28, 3.68), (1.007, 26.15, 9.50), (1.006, 3.75, 3.07), (1.004, 5.15, 4.33)),
    20: ((1.017, 10.36, 5.15), (1.011, 23.92, 8.22), (1.008, 59.35, 26.14), (1.006, 10.96, 7.52), (1.005, 12.48, 9.95)),
}
_ADM_LINEAR_20 = (
    (0.0025, 1.0, 10.36, 4.31), (0.0008, 1.0034, 23.92, 7.60), (0.0004, 1.0042, 59.35, 24.83),
    (0.0002, 1.0041, 10.96, 7.37), (0.00022, 1.00291, 12.48, 9.86),
)  # fmt: skip
_EDM = {  # NFE: (conditional, solver) -> (b, baseline, scaled)
    35: {(False, "heun"): (1.0005, 1.97, 1.95), (False, "euler"): (1.0034, 3.81, 2.80),
         (True, "heun"): (1.0006, 1.82, 1.80), (True, "euler"): (1.0035, 3.74, 2.59)},
    21: {(False, "heun"): (0.9985, 2.33, 2.24), (False, "euler"): (1.0043, 6.29, 4.32),
         (True, "heun"): (0.9983, 2.17, 2.08), (True, "euler"): (1.0045, 5.91, 3.74)},
    13: {(False, "heun"): (1.0060, 7.16, 6.54), (False, "euler"): (1.0048, 12.28, 8.39),
         (True, "heun"): (1.0070, 6.69, 6.16), (True, "euler"): (1.0051, 10.66, 6.59)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """One published setting: its FIDs without and with scaling (None where the source gives none)."""

    scaling: EpsilonScaling
    fid_baseline: float | None
    fid_scaled: float | None


def _settings():
    settings = {}

    def add(key, scaling, baseline, scaled):
        source = "published for " + ", ".join(str(part) for part in key)
        settings[key] = Published(dataclasses.replace(scaling, source=source), baseline, scaled)

    for steps, row in _ADM_UNIFORM.items():
        for dataset, (b, baseline, scaled) in zip(_ADM_DATASETS, row, strict=True):
            add(("ADM", dataset, steps, "uniform"), constant(b), baseline, scaled)
    for dataset, (k, b, baseline, scaled) in zip(_ADM_DATASETS, _ADM_LINEAR_20, strict=True):
        add(("ADM", dataset, 20, "linear"), linear(k, b, origin="cleanest"), baseline, scaled)
    for nfe, cells in _EDM.items():
        for (conditional, solver), (b, baseline, scaled) in cells.items():
            dataset = "CIFAR-10 conditional" if conditional else "CIFAR-10"
            add(("EDM", dataset, nfe, solver), constant(b), baseline, scaled)
    add(("DDIM", "CelebA", 100, "uniform"), constant(1.0012), None, None)
    return settings


SETTINGS = _settings()


def published_setting(system, dataset, steps, kind=None):
    """The Published setting of `published`, with its FIDs."""
    if kind is None:
        kind = "heun" if system == "EDM" else "uniform"
    key = (system, dataset, steps, kind)
    if key not in SETTINGS:
        known = "; ".join(", ".join(str(part) for part in k) for k in SETTINGS)
        raise KeyError(f"no published setting {key}; known (system, dataset, steps, kind): {known}")
    return SETTINGS[key]


def published(system, dataset, steps, kind=None):
    """The lambda that the authors report (arXiv 2308.15321; for DDIM, the README of their code).

    system: "ADM", "EDM" or "DDIM". dataset: as the paper names it. steps: T' respaced steps; for EDM the NFE.
    kind: "uniform" or "linear" (ADM, 20 steps); for EDM the solver, "heun" or "euler". Default: uniform, heun.
    Raises KeyError, listing what exists, for any other.
    """
    return published_setting(system, dataset, steps, kind).scaling
