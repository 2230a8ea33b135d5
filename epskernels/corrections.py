"""Corrections of a sampler's states that need no training, folded into its rows: they add no pass over memory.

    dc           x' + s*(x' - m0)                                                    all of x'
    dcw          x' + s_low*L(x' - m0) + s_high*(x' - m0 - L(x' - m0))               by band
    frequency    w_low*L(x') + w_high*(x' - L(x'))                                   by band, without m0

after every step but those that lead to an image without noise. x' is what the sampler's step makes, m0 its estimate of x_0,
with lambda_t in it; of a step of several model calls the last call's. L is the projection on the low band of one level of Haar's
wavelet: the mean of each 2x2 block of the last two dimensions, or of each pair in the last one. What lies outside counts as 0.

dc and dcw: "Elucidating the SNR-t Bias of Diffusion Probabilistic Models", arXiv 2604.16044. frequency: frequency regulation,
arXiv 2507.10072. A row then has w_next*x' + w_m0*m0 + w_x*x in the place of x', and L(l_next*x' + l_m0*m0 + l_x*x) of that is the
band's share, which the kernels add in the same pass (`ops.reference`).
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .files import argument, read_object, reading, write_whole
from .scaling import log_snr
from .spec import BAND_COLUMNS, BAND_SHAPES, COLUMNS, band_dims_of
from .table import PROVENANCE, Table, check_one_sampler, describe
from .typing import Array, FilePath, Floats

__all__ = [
    "Correction", "CorrectionLike", "as_correction", "corrected", "corrected_rows", "dc", "dcw", "frequency", "load",
]  # fmt: skip

_log = logging.getLogger("epskernels")
FORMAT = 1  # of the JSON files
_FITTED = "sampler", "steps"  # of a correction: what its weights were fitted for
KINDS, SCHEDULES, TARGETS = ("dc", "dcw", "frequency"), ("constant", "sigma"), ("m0", "alpha*m0")
# A weight: of every step; of each, the noisiest first; or {"levels": , "values": } over log(alpha/sigma), linear between them.
Weight = float | Sequence[float] | np.ndarray | Tensor | Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Correction:
    """A correction of every step's x'. Made by `dc`, `dcw` or `frequency`, which say what its weights are.

    kind: which of them. low, high: the two bands' weights; dc has the same for both. schedule: "constant"; or "sigma", where the
    low band's weight falls as the noise does, and the high band's rises. target: what x' is compared with. dims: the bands are
    those of a sample's last two dimensions (images, video), or of the last one (signals). sampler, steps: what the weights were
    fitted for, such as "ddim" or "EulerDiscreteScheduler"; with others the log warns. They do not count for equality.
    Raises ValueError and TypeError naming the argument.
    """

    kind: str
    low: Weight
    high: Weight
    schedule: str = "constant"
    target: str = "m0"
    dims: int = 2
    sampler: str | None = dataclasses.field(default=None, repr=False)
    steps: int | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("schedule", SCHEDULES), ("target", TARGETS), ("dims", (1, 2))):
            if getattr(self, name) not in choices:
                *most, last = map(repr, choices)
                raise ValueError(f"{name}: expected {', '.join(most)} or {last}, got {getattr(self, name)!r}")
        for name in ("low", "high"):
            object.__setattr__(self, name, _kept(name, getattr(self, name)))
        if not (self.sampler is None or isinstance(self.sampler, str)):
            raise TypeError(f"sampler: expected the name of one, or None, got {describe(self.sampler)}")
        if not (self.steps is None or (isinstance(self.steps, int) and not isinstance(self.steps, bool))):
            raise TypeError(f"steps: expected an integer or None, got {describe(self.steps)}")

    def weights(self, levels: Array, sigma: Array, sigma_max: float) -> tuple[Array, Array]:
        """(low, high), (steps,) float64 each: how much of each band's difference is added; 0 is nothing.

        levels, sigma: log(alpha/sigma) and sigma where each step begins. Raises ValueError for another number of weights.
        """
        low, high = (_values(name, getattr(self, name), levels) for name in ("low", "high"))
        if self.kind == "frequency":  # factors
            low, high = low - 1, high - 1
        if self.schedule == "sigma":
            fraction = sigma / sigma_max if sigma_max > 0 else np.zeros_like(sigma)
            low, high = low * fraction, high * (fraction if self.kind == "dc" else 1 - fraction)
        return low, high

    def numbers(self, band: str) -> Array:
        """Of a weight, "low" or "high": () of one for all steps, (steps,), or the values of a table of levels. float64."""
        weight: Any = getattr(self, band)
        return np.asarray(weight["values"] if isinstance(weight, dict) else weight, dtype=np.float64)

    def with_numbers(self, **weights: ArrayLike) -> "Correction":
        """The same with other numbers in its weights, low= or high= or both, which are fitted for nothing yet."""
        changed: dict[str, Any] = dict.fromkeys(_FITTED)
        for band, given in weights.items():
            weight: Any = getattr(self, band)
            values = np.asarray(given, dtype=np.float64).tolist()
            changed[band] = weight | {"values": values} if isinstance(weight, dict) else values
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it, and `as_correction` takes: {"kind": "dcw", "low": , "high": , ...}."""
        return self._formula() | self._fitted()

    def save(self, path: FilePath, **notes: Any) -> None:
        """To JSON, for `load`. notes: kept beside it; of these, sampler and steps are what it was fitted for."""
        fitted = dataclasses.replace(self, **{name: notes[name] for name in _FITTED if name in notes})
        saved = {"format": FORMAT, **self._formula(), "notes": notes | fitted._fitted()}
        text = json.dumps(saved, indent=1, allow_nan=False) + "\n"
        write_whole(pathlib.Path(path), lambda file: file.write(text.encode()))

    def warn_of_transfer(self, steps: int | None, *names: str) -> None:
        """Says in the log, once, where the weights were fitted for another sampler or number of steps.

        steps: of the sampler that takes them now; None: it is not known how many. names: what it is called, first its own name.
        """
        other_steps = None not in (self.steps, steps) and self.steps != steps
        if other_steps or (self.sampler is not None and self.sampler not in names):
            fitted, used = (
                name if number is None else f"{name} with {number} steps"
                for name, number in ((self.sampler or "a sampler", self.steps), (names[0], steps))
            )
            _say(f"correction: {self.kind} was fitted for {fitted}, used by {used}: a weight need not transfer")

    def _formula(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _FITTED}

    def _fitted(self) -> dict[str, Any]:
        return {name: value for name in _FITTED if (value := getattr(self, name)) is not None}

    def _identity(self) -> str:
        return json.dumps(self._formula(), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Correction) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())


@functools.lru_cache(maxsize=256)
def _say(message: str) -> None:
    _log.warning("%s", message)


def _kept(name: str, weight: Weight) -> Weight:
    """A weight as JSON holds it: a float, a list, or a dict of levels and values. Raises ValueError and TypeError."""
    expected = (
        "a number, numbers (one for each step, the noisiest first), or {'levels': , 'values': } over log(alpha/sigma)"
    )
    if isinstance(weight, Mapping):
        if set(weight) != {"levels", "values"}:
            raise ValueError(f"{name}: expected {expected}, got the keys {list(weight)}")
        levels, values = (np.array(weight[key], dtype=np.float64) for key in ("levels", "values"))
        if levels.ndim != 1 or levels.size == 0 or levels.shape != values.shape or not (np.diff(levels) > 0).all():
            raise ValueError(
                f"{name}: expected as many values as levels, which rise, got {values.shape} and {levels.tolist()}"
            )
        if not (np.isfinite(levels).all() and np.isfinite(values).all()):
            raise ValueError(f"{name}: expected finite levels and values, got {dict(weight)}")
        return {"levels": levels.tolist(), "values": values.tolist()}
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (Real, Sequence, np.ndarray, Tensor))
        or isinstance(weight, str)
    ):
        raise TypeError(f"{name}: expected {expected}, got {describe(weight)}")
    values = np.asarray(weight.detach().cpu() if isinstance(weight, Tensor) else weight)
    if values.dtype.kind not in "iuf" or values.ndim > 1 or values.size == 0:
        raise ValueError(f"{name}: expected {expected}, got {describe(weight)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite weights, got {values.tolist()}")
    return values.astype(np.float64).tolist()


def _values(name: str, weight: Any, levels: Array) -> Array:
    """The weight of each step."""
    if isinstance(weight, dict):
        return np.interp(levels, weight["levels"], weight["values"])
    if isinstance(weight, list) and len(weight) != len(levels):
        raise ValueError(
            f"correction: expected {len(levels)} weights of the {name} band, one for each step, got {len(weight)}"
        )
    return np.broadcast_to(np.asarray(weight, dtype=np.float64), levels.shape)


def dc(s: Weight, *, schedule: str = "constant", target: str = "m0") -> Correction:
    """Differential correction of all of x': x' + s_t*(x' - m0) (arXiv 2604.16044, eq. 17). It folds into the row: no cost.

    s: a number, numbers (one for each step, the noisiest first), or {"levels": , "values": } over log(alpha/sigma), linear
    between them. The authors' are positive and small (0.005 for EDM in 13 steps); the sign is a matter of the model. schedule:
    "constant", or "sigma": s*sigma_t/sigma_max, where the step begins. target: "m0", as published; or "alpha*m0", which is what
    x' holds of the image by the estimate m0: s then scales the noise of x' alone. On paths x_0 + sigma*eps they are the same.
    Raises ValueError and TypeError naming the argument.
    """
    return Correction("dc", s, s, schedule, target)


def dcw(low: Weight, high: Weight = 0.0, *, schedule: str = "sigma", target: str = "m0", dims: int = 2) -> Correction:
    """Differential correction in the wavelet domain (arXiv 2604.16044, eq. 18 to 21): each band of x' - m0 with its own weight.

    low, high: a number, numbers (one for each step, the noisiest first), or {"levels": , "values": } over log(alpha/sigma),
    linear between them. schedule: "sigma", as the authors recommend: low*sigma_t/sigma_max, high*(1 - sigma_t/sigma_max); or
    "constant": the weights as they are. dims: 2 for images and video, 1 for signals. Search low first, then high beside the
    best low. target: what x' is compared with: "m0", or "alpha*m0", what x' holds of the image by the estimate m0. Raises
    ValueError and TypeError naming the argument.
    """
    return Correction("dcw", low, high, schedule, target, dims)


def frequency(low: Weight, high: Weight = 1.0, *, schedule: str = "constant", dims: int = 2) -> Correction:
    """Frequency regulation (W++, arXiv 2507.10072): low*L(x') + high*(x' - L(x')); 1 leaves a band as it is.

    low, high: factors, above 0: a number, numbers (one for each step, the noisiest first), or {"levels": , "values": } over
    log(alpha/sigma), linear between them. schedule: "constant", or "sigma": what differs from 1 is taken times sigma_t/sigma_max
    in the low band, 1 - sigma_t/sigma_max in the high one. dims: 2 for images and video, 1 for signals.
    Raises ValueError and TypeError naming the argument.
    """
    made = Correction("frequency", low, high, schedule, dims=dims)
    for name in ("low", "high"):
        weight = getattr(made, name)
        values = weight["values"] if isinstance(weight, dict) else weight
        if np.min(values) <= 0:
            raise ValueError(f"{name}: expected factors above 0, got {np.min(values):g}")
    return made


CorrectionLike = Correction | Mapping[str, Any] | str | os.PathLike[str]  # what as_correction takes, and None


def _from_dict(saved: Mapping[str, Any]) -> Correction:
    """The Correction of `to_dict`; what is left out has the default of its kind's function."""
    kind, given = saved.get("kind"), {key: value for key, value in saved.items() if key not in ("kind", *_FITTED)}
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    fitted: dict[str, Any] = {name: saved.get(name) for name in _FITTED}
    return dataclasses.replace(_of_kind(kind, given), **fitted)


def _of_kind(kind: str, given: dict[str, Any]) -> Correction:
    if kind == "dc":
        weights = [given.pop(key) for key in ("s", "low", "high") if key in given]
        given.pop("dims", None)
        if not weights or any(weight != weights[0] for weight in weights):
            raise ValueError(f"s: expected one weight of all bands, got {weights}")
        return dc(weights[0], **given)
    if kind == "frequency" and given.pop("target", "m0") != "m0":
        raise ValueError("target: expected none for 'frequency', which compares with nothing")
    return (dcw if kind == "dcw" else frequency)(**given)


def load(path: FilePath) -> tuple[Correction, dict[str, Any]]:
    """The Correction of a JSON file, and the notes beside it. Raises ValueError, naming the file, for anything else."""
    path, expected = pathlib.Path(path), f"expected a correction saved by Correction.save, format {FORMAT},"
    saved = read_object(path, expected)
    with reading(path, expected):
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r}")
        notes = dict(saved.get("notes", {}))
        about = {key: value for key, value in saved.items() if key not in ("format", "notes")}
        return _from_dict({name: notes.get(name) for name in _FITTED} | about), notes


def as_correction(value: CorrectionLike | None, name: str = "correction") -> Correction | None:
    """The Correction that a value names: the one grammar, of samplers, schedulers, k_diffusion and files. None stays None.

    value: a Correction; a dict that `to_dict` made, such as {"kind": "dcw", "low": -0.1}; or the path of a file that
    `Correction.save` or `epskernels calibrate` wrote. name: what the caller calls the argument; errors begin with it.
    Raises TypeError for another type, ValueError for a bad value, FileNotFoundError.
    """
    if value is None or isinstance(value, Correction):
        return value
    try:
        if isinstance(value, Mapping):
            return _from_dict(value)
        if isinstance(value, (str, os.PathLike)):
            if isinstance(value, str) and not value.endswith(".json") and not os.path.exists(value):
                raise ValueError(
                    "expected a .json file, a Correction such as corrections.dc(-0.1), or a dict such as "
                    f'{{"kind": "dc", "s": -0.1}}, got {value!r}'
                )
            with argument(name, "a file saved by Correction.save"):
                return load(value)[0]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    raise TypeError(f"{name}: expected a Correction, a dict or a .json file, got {describe(value)}")


_DEFAULTS = {"ends_step": 1.0, "m_x0": 1.0}  # of columns


def corrected(columns: Mapping[str, Any], correction: Correction, sampler: str | None = None) -> dict[str, Any]:
    """The columns of a sampler's rows with a correction folded in; those that it does not touch are the same arrays.

    columns: float64, (R,) or a number each, by name: COLUMNS, and of PROVENANCE alpha_in, sigma_in, alpha_out, m_x0, m_eps and
    ends_step. A row that does not end a step stays as it is, and so does one that leads to an image without noise (sigma_out 0).
    sampler: its name, if it has one; the log warns where the weights were fitted for another, or another number of steps.
    Raises ValueError where m0 says nothing of x_0, or where the high band would be left out altogether.
    """
    if sampler is not None:
        rows = max(np.size(column) for column in columns.values())
        correction.warn_of_transfer(int(_column(columns, "ends_step", rows).sum()), sampler)
    return folded(columns, correction, *_weights_of_rows(columns, correction))


def _column(columns: Mapping[str, Any], key: str, rows: int) -> Array:
    return np.broadcast_to(np.asarray(columns.get(key, _DEFAULTS.get(key, 0.0)), dtype=np.float64), (rows,))


def _weights_of_rows(columns: Mapping[str, Any], correction: Correction) -> tuple[Array, Array]:
    """(low, high), (R,) each: the step's in the row that ends it, 0 in others and in one that leads to an image."""
    rows = max(np.size(column) for column in columns.values())
    alpha, sigma = (_column(columns, key, rows) for key in ("alpha_in", "sigma_in"))
    ends = _column(columns, "ends_step", rows) == 1
    begins = np.append(0, np.flatnonzero(ends)[:-1] + 1)  # of each step, its first row
    low, high = np.zeros(rows), np.zeros(rows)
    low[ends], high[ends] = correction.weights(
        log_snr(alpha[begins], sigma[begins]), sigma[begins], float(np.max(sigma[begins]))
    )
    acts = _column(columns, "sigma_out", rows) != 0
    return np.where(acts, low, 0.0), np.where(acts, high, 0.0)


def folded(columns: Mapping[str, Any], correction: Correction, low: Array, high: Array) -> dict[str, Any]:
    """`corrected` with the weights of each row given, (R,): 0 where nothing is added.

    columns: COLUMNS, and of PROVENANCE alpha_in, sigma_in, alpha_out, m_x0 and m_eps.
    """
    of_m0, of_x = _target(columns, correction, (low != 0) | (high != 0))
    if (high == -1).any():
        raise ValueError(
            "correction: expected a weight of the high band other than -1, which leaves nothing of it to correct"
        )
    added = _added(low, high, of_m0, of_x)
    added["band_dims"] = np.where(added["l_next"] != 0, float(correction.dims), 0.0)
    scaled = _scaled({key: _column(columns, key, len(low)) for key in _SCALED}, added)
    return {**columns, **{key: value for key, value in scaled.items() if key in columns or value.any()}, **added}


def _target(columns: Mapping[str, Any], correction: Correction, acts: NDArray[np.bool_]) -> tuple[Array, Array]:
    """What x' is compared with in the rows that act, (R,): of_m0*m0 + of_x*x; 0 in others. Raises ValueError where m0 does not
    tell it."""
    names = ("alpha_in", "sigma_in", "alpha_out", "m_x0", "m_eps")
    alpha, sigma, alpha_out, m_x0, m_eps = (_column(columns, key, len(acts)) for key in names)
    # m0's estimate of x_0: of_m0*m0 + of_x*x, since m0 = m_x0*x_0 + m_eps*eps and x = alpha*x_0 + sigma*eps.
    with np.errstate(divide="ignore", invalid="ignore"):
        by_eps = np.where(m_eps == 0, 0.0, m_eps / sigma)
        of_m0 = 1 / (m_x0 - by_eps * alpha)
        of_x = -by_eps * of_m0
    share = alpha_out if correction.target == "alpha*m0" else np.ones_like(alpha)
    if correction.kind == "frequency":
        share = np.zeros_like(alpha)
    needed = acts & (share != 0)
    if not (np.isfinite(of_m0) & np.isfinite(of_x))[needed].all():
        raise ValueError("correction: expected a sampler whose steps estimate x_0, to compare x' with")
    return np.where(needed, of_m0 * share, 0.0), np.where(needed, of_x * share, 0.0)


def _added(low: Floats, high: Floats, of_m0: Floats, of_x: Floats) -> dict[str, Any]:
    """What a correction adds to rows, by name. For arrays or tensors."""
    w_next = 1 + high
    difference = (low - high) / w_next
    added = {"w_next": w_next, "w_m0": -high * of_m0, "w_x": -high * of_x}
    return added | {"l_next": difference, "l_m0": -difference * of_m0, "l_x": -difference * of_x}


_SCALED = ("c_x", "c_f", "c_m0", "c_m1", "c_m2", "c_y", "c_grad", "c_noise")


def _scaled(columns: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """The columns _SCALED of the corrected x'. For arrays or tensors."""
    scaled = {key: added["w_next"] * columns[key] for key in _SCALED}
    return scaled | {"c_x": scaled["c_x"] + added["w_x"], "c_m0": scaled["c_m0"] + added["w_m0"]}


# ---- rows that are differentiable in the weights ----


def corrected_rows(
    table: Table, correction: Correction, low: Tensor, high: Tensor | None = None, *, rows: Tensor | None = None
) -> Tensor:
    """The rows of a table, with a correction: float32 (R, columns), differentiable in its weights, to pass in the table's place.

    table: one sampler's, without a correction. low, high: float32 or float64 on its device, in the place of the correction's own
    numbers and of their shape (`Correction.numbers`); of dc low alone. rows: the table's with another lambda_t, as
    `Table.scaled_rows` makes them. Worked out in float64 and rounded once, as a sampler does it; a high band's weight of -1 gives
    a row that is not finite.
    Raises ValueError and TypeError naming the argument.
    """
    check_one_sampler(table)
    if table.corrected:
        raise ValueError(f"table: expected one without a correction, got {table.name} with one")
    bands = ("low",) if correction.kind == "dc" else ("low", "high")
    if (high is None) != (len(bands) == 1):
        raise ValueError(f"high: expected {'a tensor' if high is None else 'None'} for {correction.kind!r}")
    columns = {key: table[key] for key in (*_SCALED, *PROVENANCE)}
    weights, acts = [], np.zeros(len(table), dtype=bool)
    for band, given in zip(bands, (low, high), strict=False):
        shape = correction.numbers(band).shape
        if not isinstance(given, Tensor) or given.dtype not in (torch.float32, torch.float64) or given.shape != shape:
            got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else describe(given)
            raise ValueError(f"{band}: expected a tensor of float32 or float64, shape {shape}, got {got}")
        basis, offset = _in_rows(columns, correction, band)
        acts |= basis.any(1)
        basis_, offset_ = (torch.from_numpy(each).to(table.device) for each in (basis, offset))
        weights.append(basis_ @ given.double().reshape(-1) + offset_)
    target = (torch.from_numpy(each).to(table.device) for each in _target(columns, correction, acts))
    added = _added(weights[0], weights[-1], *target)
    own = {key: torch.from_numpy(table[key].copy()).to(table.device) for key in _SCALED}
    made = dict(zip(COLUMNS, (table.rows if rows is None else rows).unbind(1), strict=True))
    made |= {key: value.float() for key, value in _scaled(own, added).items()}
    if correction.kind != "dc":
        dims = torch.from_numpy(np.where(acts, float(correction.dims), 0.0)).to(table.device)
        made |= {key: {**added, "band_dims": dims}[key].float() for key in BAND_COLUMNS}
    return torch.stack(list(made.values()), 1)


def _in_rows(columns: Mapping[str, Any], correction: Correction, band: str) -> tuple[Array, Array]:
    """(basis (R, N), offset (R,)): a band's weight in each row is basis @ numbers + offset, since every schedule is affine."""
    numbers = correction.numbers(band)

    def weights(values: Array) -> Array:
        made = correction.with_numbers(**{band: values.reshape(numbers.shape)})
        return _weights_of_rows(columns, made)[("low", "high").index(band)]

    offset = weights(np.zeros(numbers.size))
    return np.stack([weights(unit) - offset for unit in np.eye(numbers.size)], 1), offset


def check_bands(name: str, x: Tensor, dims: int) -> None:
    """Raises ValueError for a state whose bands are not those of its last `dims` dimensions; 0: no band is corrected.

    Callers look at it before the launch: a GPU's step would make NaN of such a state.
    """
    if dims and dims != band_dims_of(x.dim()):
        raise ValueError(
            f"{name}: expected {BAND_SHAPES[dims]}, whose bands are to be corrected, got {tuple(x.shape)}; corrections.dc takes "
            "states of any shape"
        )
