"""lambda_t of Epsilon Scaling (arXiv 2308.15321): eps_theta(x_t, t) -> eps_theta(x_t, t) / lambda_t.

The only place where lambda is defined; it is folded into a table's rows and has no name after that. It divides: lambda
above 1 shrinks the predicted noise. i is the 0-based index of the sampler's step; where it counts from is always said. A
schedule by noise level is a function of log(alpha/sigma) instead, and means the same whatever the sampler and its steps.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import numbers
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from . import solvers
from .files import argument, read_object, reading, write_whole
from .typing import Array, FilePath, Floats

__all__ = [
    "NOISE_ALONE", "EpsilonScaling", "ScalingLike", "array", "as_json", "as_scaling", "by_level", "constant", "exponential",
    "lambdas", "linear", "load", "log_snr", "noise_alone", "quadratic", "scale", "tsr",
]  # fmt: skip

_log = logging.getLogger("epskernels")
ORIGINS = ("cleanest", "noisiest", "level")
NOISE_ALONE = 1 / 900  # of alpha/sigma: a zero SNR is often written as sigma = 4096, and a flow begun at 0.999 or above
FORMAT = 1  # of the JSON files


@dataclasses.dataclass(frozen=True, eq=False)
class EpsilonScaling:
    """lambda_i = formula(i), i = 0 at the cleanest or the noisiest step; or, of origin "level", formula(log(alpha/sigma)).

    `values(steps)` gives lambda for each step, the noisiest first. label: what repr shows. source: where it was published, or
    what it was fitted to. steps: of the sampler that it was published or fitted for; with another number the log warns. spec:
    the function here that made it and its arguments, for JSON; None for a formula of one's own. Two with one spec are equal.
    """

    formula: Callable[[np.ndarray], ArrayLike]
    origin: str
    label: str
    source: str = ""
    spec: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise ValueError(
                "origin: expected 'cleanest' or 'noisiest' for the step i = 0, or 'level' for a formula of log(alpha/sigma), "
                f"got {self.origin!r}"
            )

    @property
    def by_level(self) -> bool:
        """Whether lambda is a function of the noise level, not of the step's number."""
        return self.origin == "level"

    def values(self, steps: int, levels: ArrayLike | None = None) -> Array:
        """(steps,) float64, the noisiest step first.

        levels: log(alpha/sigma) of each step, (steps,), as `log_snr` gives it, infinite ones too; what is not by level does not
        read it. Raises ValueError where lambda is not finite or not above 0, and where levels are missing.
        """
        if self.steps not in (None, steps) and not self.by_level:
            _say(
                f"{self.label}: {self.source or 'fitted'} with {self.steps} steps, used with {steps}: lambda need not transfer"
            )
        at = np.arange(steps) if levels is None or not self.by_level else np.asarray(levels, dtype=np.float64)
        if self.by_level and (levels is None or at.shape != (steps,)):
            raise ValueError(
                f"lambda: expected log(alpha/sigma) of each of {steps} steps, since {self.label} is by noise level, got "
                f"{'None' if levels is None else f'shape {at.shape}'}"
            )
        with np.errstate(over="ignore"):
            lambdas = np.asarray(self.formula(at), dtype=np.float64)
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

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it, and `as_scaling` takes: {"kind": "linear", "k": , ...}, with its source and steps.

        Raises ValueError for a formula that is not one of this module's.
        """
        if self.spec is None:
            raise ValueError(f"scaling: expected one made by a function of epskernels.scaling, to save it, got {self}")
        about = {"source": self.source, "steps": self.steps}
        return self.spec | {key: value for key, value in about.items() if value}

    def save(self, path: FilePath, **notes: Any) -> None:
        """To JSON, for `load`. notes: kept beside it, such as the sampler and the steps that it was fitted for.

        Raises ValueError for a formula that is not one of this module's.
        """
        text = json.dumps({"format": FORMAT, **self.to_dict(), "notes": notes}, indent=1, allow_nan=False) + "\n"
        write_whole(pathlib.Path(path), lambda file: file.write(text.encode()))

    def _identity(self) -> tuple[object, ...]:
        made = self.formula if self.spec is None else json.dumps(self.spec, sort_keys=True)
        return made, self.origin, self.source, self.steps

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, EpsilonScaling) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self.spec is None:
            return super().__reduce__()  # pickled where the formula can be
        return _from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"EpsilonScaling({self.label}{', ' + self.source if self.source else ''})"


def _number(name: str, value: float) -> float:
    value = float(value)
    if not np.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def constant(b: float) -> EpsilonScaling:
    """lambda_i = b: the paper's uniform schedule. b = 1 is no scaling."""
    b = _number("b", b)
    if b <= 0:
        raise ValueError(f"lambda: expected a value above 0, got {b}")
    spec = {"kind": "constant", "b": b}
    return EpsilonScaling(lambda i: np.full(i.shape, b), "noisiest", f"constant {b:g}", spec=spec)


def linear(k: float, b: float, *, origin: str) -> EpsilonScaling:
    """lambda_i = k*i + b, the paper's linear schedule.

    origin: where i = 0 is, "cleanest" as in ADM-ES, "noisiest" as in the authors' DDIM code.
    """
    k, b = _number("k", k), _number("b", b)
    spec = {"kind": "linear", "k": k, "b": b, "origin": origin}
    return EpsilonScaling(lambda i: k * i + b, origin, f"linear k={k:g} b={b:g} from the {origin}", spec=spec)


def quadratic(a: float, k: float, b: float, *, origin: str) -> EpsilonScaling:
    """lambda_i = a*i^2 + k*i + b."""
    a, k, b = _number("a", a), _number("k", k), _number("b", b)
    spec = {"kind": "quadratic", "a": a, "k": k, "b": b, "origin": origin}
    label = f"quadratic a={a:g} k={k:g} b={b:g} from the {origin}"
    return EpsilonScaling(lambda i: a * i**2 + k * i + b, origin, label, spec=spec)


def exponential(k: float, b: float, *, origin: str) -> EpsilonScaling:
    """lambda_i = b*exp(k*i)."""
    k, b = _number("k", k), _number("b", b)
    spec = {"kind": "exponential", "k": k, "b": b, "origin": origin}
    label = f"exponential k={k:g} b={b:g} from the {origin}"
    return EpsilonScaling(lambda i: b * np.exp(k * i), origin, label, spec=spec)


def array(values: ArrayLike, *, origin: str) -> EpsilonScaling:
    """lambda_i = values[i]; the sampler must have exactly as many steps, else ValueError."""
    lambdas = np.array(values, dtype=np.float64)
    if lambdas.ndim != 1 or lambdas.size == 0:
        raise ValueError(f"values: expected shape (steps,), got {lambdas.shape}")

    def formula(i: NDArray[np.int64]) -> Array:
        if len(i) != len(lambdas):
            raise ValueError(f"lambda: expected one value for each of {len(i)} steps, got {len(lambdas)}")
        return lambdas

    spec = {"kind": "array", "values": lambdas.tolist(), "origin": origin}
    scaling = EpsilonScaling(formula, origin, f"array of {len(lambdas)} from the {origin}", spec=spec)
    scaling.values(len(lambdas))
    return scaling


# ---- by noise level ----


def log_snr(alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """log(alpha/sigma) of x = alpha*x_0 + sigma*eps, float64: -infinity where x is noise alone, +infinity where it has none."""
    return solvers.log_snr(*(np.asarray(level, dtype=np.float64) for level in (alpha, sigma)))


def by_level(levels: ArrayLike | Callable[[Array], ArrayLike], values: ArrayLike | None = None) -> EpsilonScaling:
    """lambda as a function of the noise level log(alpha/sigma): the same for any number of steps, spacing and sampler.

    levels, values: (N,) each, a table: lambda is linear in log(alpha/sigma) between its levels, which rise, and stays beyond them
    what it is at the ends. Or a function of (steps,) float64, infinite values among them, for lambda of each. Raises ValueError.
    """
    if callable(levels):
        if values is not None:
            raise ValueError("values: expected none beside a function of the level")
        return EpsilonScaling(levels, "level", f"{getattr(levels, '__name__', 'a function')} of the noise level")
    if values is None:
        raise ValueError("values: expected lambda at each of the levels, got None")
    at, lambda_t = (np.array(each, dtype=np.float64) for each in (levels, values))
    if at.ndim != 1 or at.size == 0 or at.shape != lambda_t.shape:
        raise ValueError(f"levels, values: expected (N,) each, got {at.shape} and {lambda_t.shape}")
    if not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise ValueError(f"levels: expected finite values of log(alpha/sigma) that rise, got {at.tolist()}")
    spec = {"kind": "by_level", "levels": at.tolist(), "values": lambda_t.tolist()}
    label = f"table of {len(at)} noise levels"
    scaling = EpsilonScaling(lambda level: np.interp(level, at, lambda_t), "level", label, spec=spec)
    scaling.values(len(at), at)
    return scaling


def tsr(k: float, sigma: float = 1.0) -> EpsilonScaling:
    """Temporal Score Rescaling (arXiv 2510.01184): lambda = (snr*sigma^2/k + 1)/(snr*sigma^2 + 1), snr = (alpha/sigma_t)^2.

    It samples from the data's distribution with its modes, taken to have the standard deviation `sigma`, sharpened (k > 1: the
    estimate of the noise grows) or widened (k < 1). lambda goes from 1 at pure noise to 1/k at the clean end. k, sigma: above 0.
    Raises ValueError.
    """
    k, sigma = _number("k", k), _number("sigma", sigma)
    if k <= 0 or sigma <= 0:
        raise ValueError(f"k, sigma: expected values above 0, got {k:g} and {sigma:g}")

    def formula(level: Array) -> Array:
        return 1 + (1 / k - 1) / (1 + np.exp(-2 * level) / sigma**2)  # e^(-2*level) = 1/snr may be infinite

    spec = {"kind": "tsr", "k": k, "sigma": sigma}
    return EpsilonScaling(formula, "level", f"TSR k={k:g} sigma={sigma:g}", "arXiv 2510.01184", spec=spec)


_KINDS: dict[str, Callable[..., EpsilonScaling]] = {
    function.__name__: function for function in (constant, linear, quadratic, exponential, array, by_level, tsr)
}
# What as_scaling takes.
ScalingLike = (
    EpsilonScaling | float | Sequence[float] | np.ndarray | Tensor | Mapping[str, Any] | str | os.PathLike[str]
)


def _from_dict(saved: Mapping[str, Any]) -> EpsilonScaling:
    """The EpsilonScaling of `to_dict`."""
    arguments = {key: value for key, value in saved.items() if key not in ("kind", "source", "steps")}
    if saved["kind"] not in _KINDS:
        raise ValueError(f"kind: expected one of {tuple(_KINDS)}, got {saved['kind']!r}")
    steps = saved.get("steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise ValueError(f"steps: expected an integer, got {steps!r}")
    made = _KINDS[saved["kind"]](**arguments)
    return dataclasses.replace(made, source=str(saved.get("source", "")), steps=steps)


def load(path: FilePath) -> tuple[EpsilonScaling, dict[str, Any]]:
    """The EpsilonScaling of a JSON file, and the notes beside it. Raises ValueError, naming the file, for anything else."""
    path, expected = pathlib.Path(path), f"expected a scaling saved by EpsilonScaling.save, format {FORMAT},"
    saved = read_object(path, expected)
    with reading(path, expected):
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r}")
        notes = dict(saved.get("notes", {}))
        about = {key: value for key, value in saved.items() if key not in ("format", "notes")}
        return _from_dict({"steps": notes.get("steps")} | about), notes


def as_scaling(value: ScalingLike, name: str = "scaling") -> EpsilonScaling:
    """The EpsilonScaling that a value names: the one grammar for lambda, of samplers, schedulers, k_diffusion and files.

    value: an EpsilonScaling; a number, for every step; (steps,) numbers, a sequence, array or tensor, the noisiest step first;
    {"k": , "b": , "origin": "cleanest" (default) or "noisiest"}, the paper's linear schedule, or a dict that `to_dict` made, such
    as {"kind": "tsr", "k": 0.95, "sigma": 1};
    "SYSTEM/DATASET/STEPS[/KIND]", as in `published`; the path of a file that `EpsilonScaling.save` or `epskernels calibrate`
    wrote, a string that ends in .json or a pathlib.Path. name: what the caller calls the argument; errors begin with it.
    Raises TypeError for another type, ValueError for a bad value, FileNotFoundError.
    """
    if isinstance(value, EpsilonScaling):
        return value
    try:
        if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(".json")):
            with argument(name, "a file saved by EpsilonScaling.save"):
                return load(value)[0]
        if isinstance(value, str):
            return _named(value)
        if isinstance(value, Mapping):
            return _from_mapping(value)
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy() if value.dtype is not torch.bfloat16 else value.tolist()
        found = _numbers(value)
        if found is not None:
            return constant(float(found)) if found.ndim == 0 else array(found, origin="noisiest")
    except (ValueError, TypeError) as error:
        said = str(error)
        for inner in ("lambda", "values", "b") if not isinstance(value, Mapping) else ():
            said = said.removeprefix(f"{inner}: ")
        raise ValueError(f"{name}: {said}") from None
    raise TypeError(
        f"{name}: expected a number, numbers (one for each step), a dict, 'SYSTEM/DATASET/STEPS', a .json file or an "
        f"EpsilonScaling, got {type(value).__name__}"
    )


def as_json(value: ScalingLike, name: str = "scaling") -> float | list[float] | str | dict[str, Any]:
    """What JSON can hold of a value that as_scaling takes, and reads back: a number, list, string or dict.

    A file is stored by what it holds, not by its path. Raises as as_scaling, and ValueError for a formula of one's own.
    """
    made = as_scaling(value, name)
    if isinstance(value, str) and not value.endswith(".json"):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (EpsilonScaling, str, os.PathLike)):
        try:
            return made.to_dict()
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('scaling: ')}") from None
    saved = made.to_dict()
    return saved["b"] if saved["kind"] == "constant" else saved["values"]


def _numbers(value: object) -> np.ndarray | None:
    """A number, or an array of them; None for what is neither."""
    if isinstance(value, (bool, np.bool_)):
        return None
    if not isinstance(value, (numbers.Real, np.ndarray, Sequence)):
        return None
    found = np.asarray(value)
    return found if found.dtype.kind in "iuf" else None


def _named(text: str) -> EpsilonScaling:
    """The published setting of "SYSTEM/DATASET/STEPS" or with "/KIND"."""
    parts = [part.strip() for part in text.strip().rstrip("/").split("/")]
    with contextlib.suppress(ValueError):
        raise TypeError(f"expected a number, got the text {text!r}: pass {float(text):g}")
    if len(parts) not in (3, 4) or not parts[2].isdigit():
        raise ValueError(
            f"expected 'SYSTEM/DATASET/STEPS', or with '/KIND', or a file that ends in .json, got {text!r}"
        )
    from .published_settings import published  # which is made of this module's schedules

    try:
        return published(parts[0], parts[1], int(parts[2]), *parts[3:])
    except KeyError as error:
        raise ValueError(error.args[0]) from None


def _from_mapping(value: Mapping[str, Any]) -> EpsilonScaling:
    if "kind" in value:
        return _from_dict(value)
    if not {"b"} <= set(value) <= {"k", "b", "origin"}:
        raise ValueError(
            f"expected the keys k, b and perhaps origin, or those of EpsilonScaling.to_dict, got {list(value)}"
        )
    return linear(value.get("k", 0.0), value["b"], origin=value.get("origin", "cleanest"))


@overload
def noise_alone(alpha: Tensor, sigma: Tensor, f_x0: Tensor | float) -> Tensor: ...
@overload
def noise_alone(alpha: Array | float, sigma: Array, f_x0: np.ndarray | float) -> NDArray[np.bool_]: ...
def noise_alone(alpha: Any, sigma: Any, f_x0: Any) -> Any:
    """Whether so little of x = alpha*x_0 + sigma*eps is x_0 that lambda would say what x_0 is, and not the network.

    f_x0: the share of x_0 in the network's output. Where it is 0 the network predicts eps itself, its own errors are divided by
    alpha too, and lambda is left to it, as in the paper. Arrays or tensors.
    """
    return (alpha < NOISE_ALONE * sigma) & (f_x0 != 0)


def lambdas(
    scaling: EpsilonScaling,
    alone: NDArray[np.bool_],
    name: str = "lambda",
    say: Callable[[str], object] | None = None,
    levels: Array | None = None,
) -> Array:
    """(steps,) lambda of each step, the noisiest first; 1 where x is noise `alone`, (steps,) bool: only that has a meaning there.

    A formula gives 1 there, as `say` is told, by default the log, once; an array must. levels: log(alpha/sigma) of each step.
    Raises ValueError where it does not, and as EpsilonScaling.values does.
    """
    try:
        lambda_t = scaling.values(len(alone), levels)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('lambda: ')}") from None
    wrong = np.flatnonzero(alone & (lambda_t != 1))
    if wrong.size:
        i = int(wrong[0])
        if scaling.spec is not None and scaling.spec["kind"] == "array":
            raise ValueError(f"{name}: expected 1 where x is noise alone (step {i}), got {lambda_t[i]:g}")
        if not scaling.by_level:  # where it is a matter of course
            (say or _say)(f"lambda is 1 in step {i}: x is noise alone there")
        lambda_t[alone] = 1.0
    return lambda_t


@functools.lru_cache(maxsize=256)
def _say(message: str) -> None:
    _log.warning("%s", message)


def scale(d_x: Floats, d_f: Floats, alpha: Floats, lambda_t: Floats) -> tuple[Floats, Floats]:
    """(d_x, d_f) of m0 = d_x*x + d_f*f with eps -> eps/lambda_t: x0' = (1 - 1/lambda_t)*x/alpha + x0/lambda_t. For arrays or
    tensors."""
    return d_x / lambda_t + (1 - 1 / lambda_t) / alpha, d_f / lambda_t
