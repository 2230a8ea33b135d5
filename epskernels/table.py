"""A sampler's table: one row of coefficients per model call, float64 until it becomes the kernel's float32 rows.

    mean      c_x*alpha_in + c_f*f_x0 + (c_m0 + c_m1 + c_m2)*m_x0 + c_y*y_x0 = alpha_out
    variance  (c_x*sigma_in + c_f*f_eps + (c_m0 + c_m1 + c_m2)*m_eps + c_y*y_eps)^2 + (c_noise*s_min)^2 = sigma_out^2 + excess

hold for every row of every sampler (x_t = alpha_t*x_0 + sigma_t*eps; the model's output f = f_x0*x_0 + f_eps*eps; m0, m1 and m2
are m_x0*x_0 + m_eps*eps, as a rule x_0; the second state y = y_x0*x_0 + y_eps*eps; s_min^2 = exp(logvar_min)), whatever lambda:
the constructor checks them, so a table that breaks them cannot exist. So do k_x*alpha_in + (k_m0 + k_m1 + k_m2)*m_x0 + k_y*y_x0
= y_out_x0 and k_x*sigma_in + (k_m0 + k_m1 + k_m2)*m_eps + k_y*y_eps = y_out_eps, the second state's; and each row reads the
second state that the row before it wrote. A wrong split between c_m0 and c_m1 passes.

A row that corrects its x' (corrections.py) has w_next*(the sampler's x') + w_m0*m0 + w_x*x: that is taken off before the proof.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .scaling import noise_alone, scale
from .spec import BAND_COLUMNS, COLUMNS, SECOND_STATE, band_dims_of
from .typing import Array, Device

__all__ = [
    "BAND_COLUMNS", "COLUMNS", "PROVENANCE", "VALUES", "Table", "band_dims_of", "check_one_sampler", "concat",
    "denoising_rows", "describe",
]  # fmt: skip

# Where a row comes from: the path's two ends, lambda_t, what the model's output is made of, the variance that the sampler adds on
# purpose beyond sigma_out^2 (fixed_large, S_noise), what the second state is made of, before and after, what m0 estimates, what a
# correction has made of the sampler's x', and whether the row ends a step (1 or 0).
PROVENANCE = (
    "alpha_in", "sigma_in", "alpha_out", "sigma_out", "lambda_t", "f_x0", "f_eps", "excess",
    "y_x0", "y_eps", "y_out_x0", "y_out_eps", "m_x0", "m_eps", "w_next", "w_m0", "w_x", "ends_step",
)  # fmt: skip
VALUES = COLUMNS + BAND_COLUMNS + PROVENANCE  # all that a table holds by name
DEFAULTS: dict[str, float] = {
    "clip": np.inf, "g": 1.0, "c_in": 1.0, "lambda_t": 1.0, "m_x0": 1.0, "w_next": 1.0, "ends_step": 1.0,
}  # fmt: skip
_TOLERANCE = 1e-9


def describe(value: object) -> str:
    """What came in the place of something else, in short: for messages."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, (int, float, type(None))):
        return str(value)
    length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.") + length


Part = tuple[str, int, int, float]  # of a concatenated table: name, first row, rows, initial_sigma
_TRAITS: dict[str, Callable[["Table"], Any]] = {}
if TYPE_CHECKING:  # what it is to its readers
    _trait = property
else:

    def _trait(function):
        """A property worked out once, in the constructor: torch.compile then sees a number, and guards on that."""
        name = function.__name__
        _TRAITS[name] = function
        return property(lambda self: self._traits[name], doc=function.__doc__)


class Table:
    """An immutable table of R rows.

    values: for each name of VALUES, R numbers or one for all (absent: 0; clip inf; g, c_in, lambda_t, m_x0, w_next, ends_step 1;
    c_in_next that of the row after, and 1 for the last).
    name: what repr shows. initial_sigma: standard deviation of the initial latent, which starts at row 0.
    discrete: the model's t is an integer timestep, not a noise level.

    Raises ValueError naming the column: unknown, not of length R, not finite (clip may be inf), clip <= 0, a draw that is no
    integer in [0, 2^24) (nor guided_channels), lambda_t <= 0, rows that break the mean or the variance above, or an m0 that
    estimates one thing in some of a sampler's rows and another in others.

    Attributes: rows, float32 (R, 24) on the table's device, (R, 28) where a band is corrected; index, int64 (R,), 0 to R - 1,
    there too; row_index, the same as a tuple of R scalar tensors, ready to pass to the ops; parts, a (name, first row, rows,
    initial_sigma) for each table that this one was concatenated from.
    """

    __slots__ = ("_values", "_unscaled", "_traits", "rows", "index", "row_index", "parts", "discrete", "__weakref__")
    rows: Tensor
    index: Tensor
    row_index: tuple[Tensor, ...]
    parts: tuple[Part, ...]
    discrete: bool
    _values: dict[str, Array]
    _unscaled: Tensor | None
    _traits: dict[str, Any]
    __iter__ = None  # a table is read by column: Python would try the rows' numbers

    def __init__(
        self,
        values: Mapping[str, ArrayLike],
        *,
        name: str = "table",
        initial_sigma: float = 1.0,
        discrete: bool = False,
        parts: Sequence[Part] | None = None,
        device: Device = "cpu",
    ):
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a mapping of columns, got {type(values).__name__}")
        if unknown := set(values) - set(VALUES):
            raise ValueError(f"values: unknown columns {sorted(unknown)}, expected some of {VALUES}")
        length = max((np.size(column) for column in values.values()), default=0)
        if length == 0:
            raise ValueError("values: expected at least one row, got none")
        columns = {}
        for key in VALUES:
            try:
                column = np.asarray(values.get(key, DEFAULTS.get(key, 0.0)), dtype=np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"{key}: expected numbers, got {values[key]!r}") from None
            if column.ndim > 1 or column.size not in (1, length):
                raise ValueError(f"{key}: expected {length} values or one, got shape {column.shape}")
            columns[key] = np.broadcast_to(column.reshape(-1), (length,)) + 0.0  # a copy, without -0
        if "c_in_next" not in values:
            columns["c_in_next"] = np.append(columns["c_in"][1:], 1.0)
        for column in columns.values():
            column.setflags(write=False)
        if not (isinstance(initial_sigma, Real) and 0 <= initial_sigma < np.inf):
            raise ValueError(f"initial_sigma: expected a finite value >= 0, got {describe(initial_sigma)}")
        parts = tuple(parts) if parts else ((name, 0, length, float(initial_sigma)),)
        _check(columns, parts)

        with torch.inference_mode(False):  # a table outlives the mode it is made in, whose tensors take no gradient
            names = COLUMNS + BAND_COLUMNS if _by_band(columns).any() else COLUMNS
            rows = torch.from_numpy(np.stack([columns[key] for key in names], axis=1).astype(np.float32)).to(device)
            index = torch.arange(length, device=device)
            row_index, unscaled = index.unbind(), _unscaled(columns)
        for attribute, value in (
            ("_values", columns),
            ("_unscaled", unscaled),
            ("rows", rows),
            ("index", index),
            ("row_index", row_index),
            ("parts", parts),
            ("discrete", bool(discrete)),
        ):
            object.__setattr__(self, attribute, value)
        object.__setattr__(self, "_traits", {name: function(self) for name, function in _TRAITS.items()})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Table is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Table is immutable: cannot delete {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._values, self.discrete, self.parts, self.device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> Array:
        """A column or provenance as a read-only float64 array of R values."""
        if column not in self._values:
            raise KeyError(f"{column!r}: expected one of {VALUES}")
        return self._values[column]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    @property
    def name(self) -> str:
        """What repr shows; of a concatenated table, the names of its parts."""
        return " + ".join(part[0] for part in self.parts)

    @property
    def initial_sigma(self) -> float:
        """Standard deviation of the initial latent of the first part."""
        return self.parts[0][3]

    @_trait
    def calls(self) -> tuple[tuple[float, float], ...]:
        """What each model call is fed: a tuple of R pairs (t, c_in), t an int where it is discrete."""
        t = self["t"].astype(np.int64) if self.discrete else self["t"]
        return tuple(zip(t.tolist(), self["c_in"].tolist(), strict=True))

    @_trait
    def history(self) -> int:
        """How many earlier m0 the rows read: 0, 1 or 2."""
        second = self["c_m2"].any() or self["k_m2"].any()
        return 2 if second else 1 if self["c_m1"].any() or self["k_m1"].any() else 0

    @_trait
    def keeps_x0(self) -> bool:
        """m0 is an estimate of x_0, as a rule; in linear multistep methods it is one of eps."""
        return bool((self["m_x0"] == 1).all() and not self["m_eps"].any())

    @_trait
    def second_state(self) -> bool:
        """Some row writes, or reads, the second state y."""
        return any(self[key].any() for key in ("c_y", *SECOND_STATE))

    @property
    def corrected_rows(self) -> NDArray[np.bool_]:
        """Which rows correct their x', (R,): see corrections.py."""
        added = (self["w_next"] != 1) | (self["w_m0"] != 0) | (self["w_x"] != 0)
        return added | _by_band(self._values)

    @_trait
    def corrected(self) -> bool:
        """Some row corrects its x'."""
        return bool(self.corrected_rows.any())

    @_trait
    def band_dims(self) -> int:
        """In how many of the last dimensions some row corrects a band of x': 0 for none."""
        return int(np.max(self["band_dims"] * _by_band(self._values)))

    @_trait
    def needs_noise(self) -> bool:
        """Some row adds noise."""
        return bool(self["c_noise"].any())

    @_trait
    def learned_variance(self) -> bool:
        """Some row needs v, the second half of the model's channels."""
        return bool(self["logvar_min"].any() or self["logvar_max"].any())

    @_trait
    def guided(self) -> bool:
        """Some row has g != 1, and so needs the unconditional output u."""
        return bool((self["g"] != 1).any())

    @_trait
    def takes_grad(self) -> bool:
        """Some row can shift its mean by a classifier's gradient."""
        return bool(self["c_grad"].any())

    def scaled_rows(self, lambda_t: Tensor) -> Tensor:
        """The rows with another lambda_t, differentiable in it: float32 (R, columns), to pass in the table's place.

        lambda_t: float32 or float64, () or (R,), a value for each row (edm_heun has two rows in a step), on the table's
        device. Worked out in float64 and rounded once, as a sampler does it. Where x is noise alone a row stays as it is: no
        other lambda_t is defined there; a sampler has 1 in the second row of such a step too. One that is not above 0 gives a
        row of NaN: the step refuses it, a GPU's passes it on.
        Raises ValueError for another shape, dtype or device, or a table whose d_x and d_f are not those of its provenance.
        """
        if self._unscaled is None:
            raise ValueError(
                f"scaled_rows: {self.name} has d_x, d_f that its alpha_in, sigma_in, f_x0, f_eps and lambda_t do not give"
            )
        if not isinstance(lambda_t, torch.Tensor) or lambda_t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"lambda_t: expected a tensor of float32 or float64, got {getattr(lambda_t, 'dtype', lambda_t)}"
            )
        if lambda_t.dim() > 1 or lambda_t.numel() != len(self) ** lambda_t.dim() or lambda_t.device != self.device:
            raise ValueError(
                f"lambda_t: expected shape () or ({len(self)},) on {self.device}, "
                f"got {tuple(lambda_t.shape)} on {lambda_t.device}"
            )
        d_x, d_f, alpha, alone = self._unscaled.to(self.device).unbind()
        lambda_t = torch.where(lambda_t > 0, lambda_t.double(), torch.nan)
        scaled = scale(d_x, d_f, torch.where(alone != 0, 1.0, alpha), lambda_t)
        columns = list(self.rows.unbind(1))
        for name, column in zip(("d_x", "d_f"), scaled, strict=True):
            i = COLUMNS.index(name)
            columns[i] = torch.where(alone != 0, columns[i], column.float())
        return torch.stack(columns, 1)

    def to(self, device: Device) -> "Table":
        """The same table with its rows on `device`."""
        if torch.device(device) == self.device:
            return self
        return Table(self._values, discrete=self.discrete, parts=self.parts, device=device)

    def __repr__(self) -> str:
        shown = ["t", "lambda_t", "d_x", "d_f", "c_x", "c_m0"]
        others = ("c_f", "c_m1", "c_m2", "c_y", "c_noise", "c_grad", *SECOND_STATE, *BAND_COLUMNS)
        shown += [key for key in others if self[key].any()]
        head = "  row" + "".join(f"{key:>12}" for key in shown)
        picked = range(len(self)) if len(self) <= 8 else [0, 1, 2, None, len(self) - 2, len(self) - 1]
        lines = ["  ..." if i is None else f"{i:>5}" + "".join(f"{self[k][i]:>12.6g}" for k in shown) for i in picked]
        traits = [word for word, on in (("guided", self.guided), ("learned variance", self.learned_variance)) if on]
        title = ", ".join([f"Table {self.name}", f"{len(self)} rows", str(self.device), *traits])
        return "\n".join([title, head, *lines])


def check_one_sampler(table: Table) -> None:
    """Raises TypeError for what is no Table, ValueError for a table of several, concatenated."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a Table, such as samplers.ddim(schedule, steps) makes, got {describe(table)}")
    if len(table.parts) != 1:
        raise ValueError(f"table: expected one sampler's, got {len(table.parts)} concatenated: {table.name}")


def denoising_rows(rows: Tensor) -> Tensor:
    """Rows that make m0 alone: whatever history, noise or second state `rows` ask for, these do not."""
    denoising = torch.zeros_like(rows)
    parts = (("d_x", "g"), ("guided_channels", "guided_channels"))
    for first, last in parts:  # slices: a list of columns would be copied to the GPU
        kept = slice(COLUMNS.index(first), COLUMNS.index(last) + 1)
        denoising[:, kept] = rows[:, kept]
    return denoising


def _restore(values: Mapping[str, Array], discrete: bool, parts: Sequence[Part], device: torch.device) -> Table:
    return Table(values, discrete=discrete, parts=parts, device=device)


def concat(tables: Iterable[Table]) -> Table:
    """One table with the rows of all, in order: row i of table k is row parts[...] first + i of the result.

    A batch may then mix samplers, each sample with its own row index. Raises ValueError: no table, different devices, or
    discrete and continuous timesteps mixed.
    """
    if not isinstance(tables, Iterable):
        raise TypeError(f"tables: expected a list of Tables, got {describe(tables)}")
    tables = list(tables)
    if not tables:
        raise ValueError("tables: expected at least one, got none")
    for table in tables:
        if not isinstance(table, Table):
            raise TypeError(f"tables: expected Tables, got {describe(table)}")
    if len({table.device for table in tables}) > 1:
        raise ValueError(f"tables: expected one device, got {sorted({str(table.device) for table in tables})}")
    if len({table.discrete for table in tables}) > 1:
        raise ValueError("tables: expected all with discrete timesteps or all with noise levels, got both")
    values = {key: np.concatenate([table[key] for table in tables]) for key in VALUES}
    parts: list[Part] = []
    first = 0
    for table in tables:
        parts += [(name, first + start, length, sigma) for name, start, length, sigma in table.parts]
        first += len(table)
    return Table(values, discrete=tables[0].discrete, parts=parts, device=tables[0].device)


def _unscaled(columns: Mapping[str, Array]) -> Tensor | None:
    """d_x and d_f for lambda_t = 1, alpha_in/m_x0, and whether x is noise alone: float64 (4, R); None where lambda_t does not
    lead from them to the columns."""
    names = ("alpha_in", "sigma_in", "f_x0", "f_eps", "m_x0", "m_eps")
    alpha, sigma, f_x0, f_eps, m_x0, m_eps = (columns[key] for key in names)
    with np.errstate(all="ignore"):
        determinant = alpha * f_eps - sigma * f_x0
        d_x, d_f = (m_x0 * f_eps - m_eps * f_x0) / determinant, (m_eps * alpha - m_x0 * sigma) / determinant
        x_0_by = np.where(m_x0 == 0, np.inf, alpha / m_x0)  # lambda moves m0's share of x_0 alone towards x/alpha
        scaled = scale(d_x, d_f, np.where(alpha == 0, 1.0, x_0_by), columns["lambda_t"])
        for key, column in zip(("d_x", "d_f"), scaled, strict=True):
            if not (np.abs(column - columns[key]) <= _TOLERANCE * (1 + np.abs(column))).all():
                return None
    return torch.from_numpy(np.stack([d_x, d_f, x_0_by, noise_alone(alpha, sigma, f_x0)]))


def _by_band(columns: Mapping[str, Array]) -> NDArray[np.bool_]:
    """Which rows correct a band."""
    return np.any([columns[key] != 0 for key in BAND_COLUMNS[:3]], axis=0)


def _check(columns: Mapping[str, Array], parts: Sequence[Part]) -> None:
    names = "+".join(part[0] for part in parts)

    def refuse(key: str, bad: NDArray[np.bool_], expected: str) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(f"{key}: expected {expected}, got {columns[key][row]} in row {row} of {names}")

    with np.errstate(over="ignore"):
        for key, column in columns.items():
            if key == "clip":
                refuse(key, ~(column.astype(np.float32) > 0), "a value above 0, or inf for none")
            else:
                refuse(key, ~np.isfinite(column), "a finite value")
                refuse(key, ~np.isfinite(column.astype(np.float32)), "a value within float32")
    for key in ("draw", "guided_channels"):
        count = columns[key]
        refuse(key, (count < 0) | (count >= 2**24) | (count != np.floor(count)), "an integer in [0, 2^24)")
    refuse("lambda_t", columns["lambda_t"] <= 0, "a value above 0")
    refuse("band_dims", _by_band(columns) & ~np.isin(columns["band_dims"], (1, 2)), "1 or 2")
    refuse("ends_step", ~np.isin(columns["ends_step"], (0, 1)), "0 or 1")
    refuse("w_next", columns["w_next"] == 0, "a value other than 0")

    c = dict(columns)  # without what a correction has added
    for key in ("c_x", "c_f", "c_m0", "c_m1", "c_m2", "c_y", "c_noise"):
        c[key] = (c[key] - c.get(f"w_{key[2:]}", 0.0)) / c["w_next"]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows does not agree
        _agree_sum("mean", [c["c_x"] * c["alpha_in"], c["c_f"] * c["f_x0"], *_kept(c, "c", "m_x0"),
                            c["c_y"] * c["y_x0"]], c["alpha_out"], names)  # fmt: skip
        for what, of_x, of_m in (("mean of y", "alpha_in", "x0"), ("noise of y", "sigma_in", "eps")):
            terms = [c["k_x"] * c[of_x], *_kept(c, "k", f"m_{of_m}"), c["k_y"] * c[f"y_{of_m}"]]
            _agree_sum(what, terms, c[f"y_out_{of_m}"], names)
        drift = c["c_x"] * c["sigma_in"] + c["c_f"] * c["f_eps"] + c["c_y"] * c["y_eps"] + sum(_kept(c, "c", "m_eps"))
        variance = drift**2 + c["c_noise"] ** 2 * np.exp(c["logvar_min"])
    _agree("variance", variance, c["sigma_out"] ** 2 + c["excess"], 1 + c["sigma_in"] ** 2, names)

    first = np.isin(np.arange(len(c["t"])), [start for _, start, _, _ in parts])
    for key in ("m_x0", "m_eps"):
        before = np.append(c[key][0], c[key][:-1])
        refuse(key, ~first & (c[key] != before), "the same in all rows of a sampler: what m0 is, m1 and m2 are later")
    for key in ("c_y", "k_y"):
        refuse(key, first & (c[key] != 0), "0 in a sampler's first row: no row before it has written y")
    reads = (c["c_y"] != 0) | (c["k_y"] != 0)
    for key in ("x0", "eps"):
        written = np.append(0.0, c[f"y_out_{key}"][:-1])  # by the row before
        _agree(
            "second state", np.where(reads, c[f"y_{key}"], 0), np.where(reads, written, 0), 1 + np.abs(written), names
        )


def _kept(columns: Mapping[str, Array], letter: str, of: str) -> list[Array]:
    """What m0, m1 and m2 bring of x_0 or eps."""
    return [columns[f"{letter}_{m}"] * columns[of] for m in ("m0", "m1", "m2")]


def _agree_sum(what: str, terms: Sequence[Array], expected: Array, names: str) -> None:
    _agree(what, np.sum(terms, axis=0), expected, 1 + np.sum(np.abs(terms), axis=0), names)


def _agree(what: str, got: Array, expected: Array, scale: Array, names: str) -> None:
    bad = np.flatnonzero(~(np.abs(got - expected) <= _TOLERANCE * scale))
    if bad.size:
        row = int(bad[0])
        raise ValueError(f"{what} of row {row} of {names}: the coefficients give {got[row]}, the path {expected[row]}")
