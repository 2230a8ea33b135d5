"""Exposure bias, measured: how far a sampler's states and predictions are from those that its network was trained on.

    delta_t = (std(xhat_t - alpha_t*x_0) - sigma_t)^2       variance error, after all steps down to t, or after one
    DeltaN(t) = ||eps_sampling|| / ||eps_training||         norm gap, each an average over images
    e_t = rms(m0 - x_0)                                     prediction error, x_t = alpha_t*x_0 + sigma_t*eps
    ||L(x_t)||, ||x_t - L(x_t)||, and of eps                norms of the low and the high Haar band, L of `bands.py`

Per row of a sampler's table (arXiv 2308.15321, sections 3 and 4). Streaming: a batch at a time, merged by Chan's formula. It does
not judge samples (`quality.py`) nor choose lambda_t (`calibrate/`).
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .bands import low_band
from .files import check_writable, read_object, reading, write_whole
from .ops import moments, normal
from .ops.reference import guided_output
from .plots import figures, finish, largest_gap, plain_ticks, save_figure
from .table import Table, check_one_sampler, denoising_rows
from .trajectory import Trajectory
from .typing import Array, Device, FilePath, ModelCall, Outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BANDS", "PARTS", "Exposure", "Moments", "batches", "closed_form", "epsilon_norm", "figures", "measure", "noised",
    "save_figure",
]  # fmt: skip

Images = Iterable[Any]  # of images, or of tuples that begin with one; a DataLoader of batches of them
FORMAT = 1  # of an Exposure's file
STATE_FORMAT = 2  # of measure's state: 1 had no bands
PARTS = ("training", "chain", "samples")  # of what `measure` runs
BANDS = ("state_low", "noise_low", "state_high", "noise_high")  # of the state and of eps, whose norms `measure` takes
STREAM_DATA = 2  # of the generator: the noise that is added to real images
_PIXELS = ("single", "error", "chain")  # per-pixel statistics
_BAND_ROWS = {f"{name}_{part}{suffix}" for name in BANDS for part in PARTS for suffix in ("", "_se")}
_NORMS = ("norm", *BANDS)
_SCALARS = {"training": (*_NORMS, "error", "covariance", "noise"), "chain": _NORMS, "samples": _NORMS}


# ---- streaming statistics ----


class Moments:
    """Means and sums of squared deviations of `rows` quantities of shape `shape`, float64: batches merged by Chan's formula.

    Chan, Golub, LeVeque, "Updating formulae", 1979; with batches of one it is Welford's.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], device: Device = "cpu"):
        self.count = np.zeros(rows, np.int64)
        self.mean = torch.zeros(rows, *shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def add(self, row: int, values: Tensor) -> None:
        """values: (B, *shape) of row `row`."""
        values = values.double()
        mean = values.mean(0)
        count, total = int(self.count[row]), int(self.count[row]) + len(values)
        shift = mean - self.mean[row]
        self.mean[row] += shift * (len(values) / total)
        self.squares[row] += (values - mean).square().sum(0) + shift.square() * (count * len(values) / total)
        self.count[row] = total

    @property
    def variance(self) -> Tensor:
        """Unbiased; NaN below two values."""
        count = torch.from_numpy(self.count).to(self.mean).reshape(-1, *[1] * (self.mean.dim() - 1))
        return torch.where(count > 1, self.squares / (count - 1).clamp(min=1), math.nan)


# ---- the closed form ----


def closed_form(
    table: Table, error: Array | float, covariance: Array | float = 0.0, noise: Array | float | None = None
) -> Array:
    """Variance of x' - alpha_out*x_0 after one step from x = alpha_in*x_0 + sigma_in*eps: (R,) float64.

        (c_x*sigma + ...)^2 + g^2*e^2 + 2*(c_x*sigma + ...)*g*cov + c_noise^2*s^2

    with g = c_m0 for most samplers. error: e_t, standard deviation of d = m0 - x_0. covariance: of d and eps; the paper's error
    model, m0 = x_0 + e_t*(fresh noise), has 0, and then this is its 1 - abar + (sqrt(abar)*beta/(1 - abar)*e)^2. The best
    possible denoiser has alpha*e^2/sigma (its error is orthogonal to x). noise: s^2, mean variance of the noise of rows with
    learned variance (default exp(logvar_min); 1 without). NaN for rows that read history or a second state, or are corrected.
    For rows with c_f exact without clipping. Derived; for DDPM eq. 9 of arXiv 2308.15321.
    """
    c = {name: table[name] for name in ("c_x", "c_f", "c_m0", "c_noise", "alpha_in", "sigma_in", "f_x0", "f_eps")}
    if not table.keeps_x0:  # m0 = eps = (x - alpha*x_0)/sigma
        c |= {"c_x": c["c_x"] + c["c_m0"] / c["sigma_in"], "c_m0": -c["c_m0"] * c["alpha_in"] / c["sigma_in"]}
    noise = np.exp(table["logvar_min"]) if noise is None else noise
    lambda_t, sigma = table["lambda_t"], c["sigma_in"]
    determinant = c["alpha_in"] * c["f_eps"] - sigma * c["f_x0"]
    with np.errstate(divide="ignore", invalid="ignore"):
        # f = f_x0*x_0 + f_eps*eps - (determinant/sigma)*(raw error), d = (raw error)/lambda + (1 - 1/lambda)*(sigma/alpha)*eps
        by_f = np.where(c["c_f"] != 0, c["c_f"] * determinant, 0)
        of_eps = (
            c["c_x"] * sigma + c["c_f"] * c["f_eps"] + np.where(lambda_t == 1, 0, by_f * (lambda_t - 1) / c["alpha_in"])
        )
        of_error = c["c_m0"] - np.where(by_f != 0, by_f * lambda_t / sigma, 0)
    variance = of_eps**2 + 2 * of_eps * of_error * covariance + (of_error * error) ** 2 + c["c_noise"] ** 2 * noise
    others = [table.corrected_rows, *(table[name] != 0 for name in ("c_m1", "c_m2", "c_y"))]
    return np.where(np.any(others, axis=0), np.nan, variance)


# ---- the result ----


def _gap(name: str, said: str) -> tuple[property, property]:
    """The properties of a norm's gap and of its standard error."""

    def sides(self: "Exposure") -> tuple[Array, Array, Array, Array]:
        training, chain, samples = (getattr(self, f"{name}_{part}") for part in PARTS)
        training_se, chain_se, samples_se = (getattr(self, f"{name}_{part}_se") for part in PARTS)
        of_chain = np.isnan(samples)
        return np.where(of_chain, chain, samples), np.where(of_chain, chain_se, samples_se), training, training_se

    def gap(self: "Exposure") -> Array:
        sampling, _, training, _ = sides(self)
        return sampling / training

    def gap_se(self: "Exposure") -> Array:
        sampling, sampling_se, training, training_se = sides(self)
        return sampling / training * np.hypot(sampling_se / sampling, training_se / training)

    return (
        property(gap, doc=f"{said}: of the samples where they were measured, else of the chain from real images."),
        property(gap_se, doc="Its standard error, as if the two sides were independent."),
    )


@dataclasses.dataclass(frozen=True)
class Exposure:
    """What `measure` found, per row of the table: float64 (R,) each, the noisiest first; NaN where a part was not measured.

    t: what the model is told. lambda_t, alpha_in, sigma_in, alpha_out, sigma_out: the table's.
    norm_training, norm_chain, norm_samples: mean of ||eps_theta||, over C*H*W, with x_t from real images; down a chain that
    began with real images at the first t; and down one from pure noise, as in sampling. The last two are divided by lambda_t.
    state_low_*, state_high_*, noise_low_*, noise_high_*: the same of the two Haar bands of x_t and of eps_theta, in the last two
    dimensions of a sample, in the last one of (L,) and (C, L). NaN where these have one element, and where a file has none.
    norm_*_se and so on: standard errors.
    error: e_t, rms of m0 - x_0. error_std: without its mean at each pixel. covariance: of m0 - x_0 and eps.
    std_single, std_chain: standard deviation of x' - alpha_out*x_0 over images at a pixel, averaged over pixels, after one step
    and after all. variance_single: the squares', averaged. variance_paper, variance_closed: `closed_form` with the paper's
    independent error, and with the measured covariance.
    """

    sampler: str
    images: int
    seed: int
    rows: dict[str, Array]

    def __getattr__(self, name: str) -> Array:
        rows = self.__dict__.get("rows", {})
        if name in rows:
            return rows[name]
        if name in _BAND_ROWS and "t" in rows:  # saved before there were any
            return np.full(len(rows["t"]), np.nan)
        raise AttributeError(f"Exposure has no {name!r}, expected one of {sorted(rows)}")

    def __repr__(self) -> str:
        gap, delta = self.norm_gap, self.delta_chain[-1]
        said = [f"{self.sampler}, {self.images} images"]
        said += [] if np.isnan(gap).all() else [f"norm gap {np.nanmin(gap):.4g} to {np.nanmax(gap):.4g}"]
        said += [] if np.isnan(delta) else [f"delta_t at the end {delta:.2g}"]
        return f"Exposure({'; '.join(said)})"

    norm_gap, norm_gap_se = _gap("norm", "DeltaN(t)")
    state_gap_low, state_gap_low_se = _gap("state_low", "||L(x_t)||, sampling over training")
    state_gap_high, state_gap_high_se = _gap("state_high", "||x_t - L(x_t)||, sampling over training")
    noise_gap_low, noise_gap_low_se = _gap("noise_low", "DeltaN(t) of the low band of eps_theta")
    noise_gap_high, noise_gap_high_se = _gap("noise_high", "DeltaN(t) of the high band of eps_theta")

    @property
    def delta_chain(self) -> Array:
        """delta_t by the authors' procedure, of the state after each row."""
        return (self.std_chain - self.sigma_out) ** 2

    @property
    def delta_single(self) -> Array:
        """delta_t after one step from a state that is exact."""
        return (self.std_single - self.sigma_out) ** 2

    def save(self, path: FilePath) -> None:
        """To JSON: numbers that read back as they were, null for NaN, "inf" and "-inf" for infinities."""

        def as_json(x: float) -> float | str | None:
            return x if math.isfinite(x) else None if math.isnan(x) else str(x)

        rows = {name: [as_json(x) for x in values.tolist()] for name, values in self.rows.items()}
        saved = {"format": FORMAT, "sampler": self.sampler, "images": self.images, "seed": self.seed, "rows": rows}
        text = json.dumps(saved, indent=1, allow_nan=False) + "\n"
        write_whole(pathlib.Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: FilePath) -> "Exposure":
        """Raises ValueError that names the file, where it is of another format, or damaged."""
        expected = f"expected an Exposure of format {FORMAT}"
        saved = read_object(path, expected)
        with reading(path, expected):
            if saved["format"] != FORMAT:
                raise ValueError(f"its format is {saved['format']!r}")
            rows = {name: np.array(values, dtype=np.float64) for name, values in saved["rows"].items()}
            lengths = {values.shape for values in rows.values()}
            if len(lengths) != 1 or len(lengths.pop()) != 1:
                raise ValueError("its rows are not all of one length")
            return cls(str(saved["sampler"]), int(saved["images"]), int(saved["seed"]), rows)

    def plot(self, path: FilePath) -> None:
        """DeltaN(t), delta_t, and the variance after one step beside the closed form. By the file's suffix: .png, .svg, .pdf."""
        figure, axes = figures(3, width=4.8)
        i = np.arange(len(self.t))
        axes[0].errorbar(i, self.norm_gap, 2 * self.norm_gap_se, marker="o", markersize=3, capsize=2)
        axes[0].axhline(1, color="black", linewidth=0.8)
        axes[0].set(
            title=f"Predicted noise: {largest_gap(self.norm_gap, self.norm_gap_se)}",
            ylabel="norm gap: sampling / training",
        )
        for name, marker, said in (("chain", "o", "after all steps so far"), ("single", "s", "after this step alone")):
            axes[1].plot(i, getattr(self, f"delta_{name}"), marker=marker, markersize=3, label=said)
        last = self.delta_chain[-1]
        axes[1].set(title="Variance error" + ("" if np.isnan(last) else f": {last:.2g} at the end of the chain"),
                    ylabel="delta_t, squared units of the images", yscale="log")  # fmt: skip
        for name, line, said in (
            ("single", "o", "measured"),
            ("paper", "--", "closed form, independent error"),
            ("closed", "-", "closed form, measured covariance"),
        ):
            excess = getattr(self, f"variance_{name}") - self.sigma_out**2
            axes[2].plot(i, excess, line, markersize=3, label=said)
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.abs(self.variance_closed / self.variance_single - 1)
        within = f" at most {100 * np.nanmax(off):.2g} % off" if np.isfinite(off).any() else ""
        axes[2].set(title=f"Variance after one step: closed form{within}",
                    ylabel="variance - sigma^2, squared units of the images")  # fmt: skip
        axes[2].set_yscale("symlog", linthresh=1e-5)
        for axis in axes[1:]:
            plain_ticks(axis, "y")
        self._save(figure, axes, path)

    def plot_bands(self, path: FilePath) -> None:
        """The gaps of the Haar bands, of states and of predictions. Raises ValueError where there are none."""
        if np.isnan(self.state_gap_low).all():
            raise ValueError(
                "bands: expected an Exposure that has them in both training and sampling, got NaN for all rows"
            )
        figure, axes = figures(2, width=5.4)
        for axis, (name, said) in zip(axes, (("state", "States x_t"), ("noise", "Predicted noise")), strict=True):
            found = []
            for band, marker in (("low", "o"), ("high", "s")):
                gap, error = (getattr(self, f"{name}_gap_{band}{suffix}") for suffix in ("", "_se"))
                axis.errorbar(
                    np.arange(len(gap)), gap, 2 * error, marker=marker, markersize=3, capsize=2, label=f"{band} band"
                )
                found.append(f"{band} band {largest_gap(gap, error)}")
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(title=f"{said}:\n" + ",\n".join(found),
                     ylabel="norm: sampling / training")  # fmt: skip
        self._save(figure, axes, path)

    def _save(self, figure: "Figure", axes: "list[Axes]", path: FilePath) -> None:
        for axis in axes:
            axis.set_xlabel(f"model call, 0 (noisiest) to {len(self.t) - 1}")
            axis.locator_params(axis="x", integer=True)
            finish(axis)
        said = f"{self.sampler}, T' = {len(self.t)} model calls, {self.images} images; bars: two standard errors"
        figure.suptitle(said, fontsize=9, color="dimgray")
        save_figure(figure, path)


# ---- measuring ----


@torch.no_grad()
def measure(
    model: ModelCall,
    table: Table,
    images: Images,
    *,
    seed: int = 0,
    batch: int = 64,
    parts: Collection[str] = PARTS,
    state: FilePath | None = None,
    save_every: float = 30.0,
    key: object = "",
    progress: bool = False,
) -> Exposure:
    """The exposure bias of a model under a sampler: an Exposure.

    model: any callable (x, t) -> f. table: one sampler's, on the device to work on; its lambda_t is what is measured with.
    images: an iterable of at least two real images (C, H, W) of a floating dtype, in the network's range, such as a tensor
    (N, C, H, W) or a torch Dataset; of a tuple (image, label) the image is taken. Of a DataLoader each image of its batches.
    seed: image n is given the noise of seed + n: the same in any batch. batch: images per model call.
    parts: "training" (real images: norms, e_t, one step), "chain" (real images at the first t, then the sampler), "samples"
    (from noise); each is a model call per row and image.
    state: an .npz file with all that is needed to go on: written every `save_every` seconds, read where it is there. A run that
    goes on gives the bits of one that never stopped. key: whatever tells this model from others, kept with the state.
    Raises ValueError naming the argument; also for a state of other settings or images.
    """
    check_one_sampler(table)
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts: expected some of {PARTS}, got {parts!r}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
    settings = {
        "format": STATE_FORMAT, "sampler": table.name, "rows": _sha256(table.rows.cpu().numpy()), "seed": int(seed),
        "batch": batch, "parts": sorted(parts), "key": str(key),
    }  # fmt: skip
    checkpoint, digest = _Checkpoint(state, settings, save_every), ""
    run: _Run | None = None
    batched = isinstance(images, DataLoader)  # whose length counts batches
    bar = tqdm(
        total=len(images) if isinstance(images, Sized) and not batched else None, desc=table.name, disable=not progress
    )
    for x_0 in batches(images, batch):
        digest_before, digest = digest, hashlib.sha256((digest + _sha256(x_0.numpy())).encode()).hexdigest()
        if run is None:
            run = _Run(model, table, tuple(x_0.shape[1:]), parts, int(seed))
            if checkpoint.saved is not None:
                run.restore(checkpoint.saved)
        elif x_0.shape[1:] != run.shape:
            raise ValueError(f"images: expected shape {run.shape}, as the first had, got {tuple(x_0.shape[1:])}")
        if not checkpoint.has_seen(len(x_0), digest):
            # Only full batches are saved, since more images may follow.
            if run.images and (len(x_0) < batch or checkpoint.is_due):
                checkpoint.save(run, digest_before)
            run.add(x_0.to(table.device))
        bar.update(len(x_0))
    bar.close()
    checkpoint.check_end()
    if run is None or run.images < 2:
        raise ValueError(f"images: expected at least two, got {0 if run is None else run.images}")
    if run.images % batch == 0:
        checkpoint.save(run, digest)
    return run.result()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def batches(images: Images, batch: int) -> Iterator[Tensor]:
    """Float32 tensors (B, *shape) of an iterable of images, or a DataLoader. Raises ValueError naming `images`."""
    of_batches = isinstance(images, DataLoader) and images.batch_sampler is not None
    found: Iterator[Tensor] = map(_tensor, images)
    found = itertools.chain.from_iterable(found) if of_batches else found
    while chunk := list(itertools.islice(found, batch)):
        for image in chunk:
            if not image.is_floating_point() or image.dim() == 0 or image.numel() == 0:
                raise ValueError(f"images: expected floating point images, got {image.dtype} {tuple(image.shape)}")
            if image.shape != chunk[0].shape:
                raise ValueError(f"images: expected one shape, got {tuple(chunk[0].shape)} and {tuple(image.shape)}")
        yield torch.stack(chunk).float().cpu()


def _tensor(image: Any) -> Tensor:
    """Of an image or a batch of them, or the first of a tuple."""
    image = image[0] if isinstance(image, (tuple, list)) and len(image) else image
    try:
        return torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"images: expected tensors, arrays, or tuples that begin with one, got {type(image).__name__}"
        ) from None


class _Checkpoint:
    """The file of `measure`'s state, where there is one: what it held, which images it has seen, and when to write it again."""

    def __init__(self, path: FilePath | None, settings: dict[str, Any], save_every: float):
        self.path, self.settings, self.save_every = path, settings, save_every
        self.saved: dict[str, np.ndarray] | None = None
        self.last_save = time.monotonic()
        if path is not None:
            check_writable(path)
            if pathlib.Path(path).exists():
                self.saved = _load_state(path, settings)
        self.images_to_skip = 0 if self.saved is None else int(self.saved["images"])

    def has_seen(self, count: int, digest: str) -> bool:
        """Whether the next `count` images are in the file already. digest: of all images so far, these included.

        Raises ValueError where the file was begun with other images.
        """
        if self.saved is None or self.images_to_skip <= 0:
            return False
        self.images_to_skip -= count
        if self.images_to_skip < 0 or (self.images_to_skip == 0 and digest != str(self.saved["digest"])):
            raise ValueError(f"images: {self.path} was begun with others")
        return True

    def check_end(self) -> None:
        """Raises ValueError where the images have ended before those that the file has seen."""
        if self.saved is not None and self.images_to_skip > 0:
            raise ValueError(f"images: expected at least the {int(self.saved['images'])} that {self.path} has seen")

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.last_save >= self.save_every

    def save(self, run: "_Run", digest: str) -> None:
        """digest: of all images that the run has added."""
        if self.path is not None:
            arrays: dict[str, Any] = {**run.arrays(), "settings": json.dumps(self.settings), "digest": digest}
            write_whole(pathlib.Path(self.path), lambda file: np.savez(file, **arrays))
            self.last_save = time.monotonic()


def _load_state(path: FilePath, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    with reading(path, "state: damaged, or of something else: expected what measure has saved"):
        with np.load(path) as file:
            saved = dict(file)
        begun, _, _ = json.loads(str(saved["settings"])), int(saved["images"]), str(saved["digest"])
        if not isinstance(begun, dict):
            raise ValueError(f"its settings are of type {type(begun).__name__}")
    changed = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    if changed:
        said = "; ".join(f"{name} was {begun.get(name)!r}, is {settings.get(name)!r}" for name in changed)
        raise ValueError(f"state: {path} was begun with other settings: {said}")
    return saved


def noised(table: Table, i: int, x_0: Tensor, seeds: Tensor) -> Tensor:
    """Real images (B, *shape) as the model sees them in training at row i, on the table's device; seeds: of the noise."""
    eps = normal(seeds, x_0.shape[1:], stream=STREAM_DATA)
    return table["alpha_in"][i] * x_0.to(table.device) + table["sigma_in"][i] * eps


def _epsilon(table: Table, i: int, x: Tensor, output: Outputs) -> Tensor:
    """eps_theta of each sample at row i, before lambda_t, after guidance: float32 (B, *shape)."""
    f, u, _ = output
    if u is not None:
        f = guided_output(f, u, table.rows[i : i + 1], torch.zeros(1, dtype=torch.int64, device=f.device))
    alpha, sigma, f_x0, f_eps = (table[name][i] for name in ("alpha_in", "sigma_in", "f_x0", "f_eps"))
    if f_x0 == 0 and f_eps == 1:
        return f.float()
    determinant = alpha * f_eps - sigma * f_x0
    return (alpha / determinant) * f.float() - (f_x0 / determinant) * x


def _norm(x: Tensor) -> Tensor:
    """Of each sample: float64 (B,)."""
    return moments(x)[:, 1].sqrt()


def epsilon_norm(table: Table, i: int, x: Tensor, output: Outputs) -> Tensor:
    """||eps_theta|| of each sample at row i, before lambda_t, after guidance: float64 (B,)."""
    return _norm(_epsilon(table, i, x, output))


def _norms(table: Table, i: int, x: Tensor, output: Outputs) -> list[Tensor]:
    """Of each sample, float64 (B,): ||eps_theta||, and the norms of the bands of x and eps_theta, in the order of BANDS."""
    eps = _epsilon(table, i, x, output)
    dims = 1 if x.dim() < 4 else 2
    if max(x.shape[-dims:]) == 1:
        return [_norm(eps), *torch.full((len(BANDS), len(x)), math.nan, dtype=torch.float64, device=x.device)]
    low = [low_band(each, dims) for each in (x, eps)]
    return [_norm(each) for each in (eps, *low, x - low[0], eps - low[1])]


class _Run:
    """The statistics of all rows and parts, and how a batch is added to them."""

    def __init__(self, model: ModelCall, table: Table, shape: tuple[int, ...], parts: Collection[str], seed: int):
        self.model, self.table, self.shape, self.parts, self.seed = model, table, shape, parts, seed
        self.images, rows = 0, len(table)
        self.pixels = {name: Moments(rows, shape, table.device) for name in _PIXELS}
        self.scalars = {part: Moments(rows, (len(names),)) for part, names in _SCALARS.items()}
        # A second state has no training value: one step from an exact x is then m0 alone.
        self.rows = denoising_rows(table.rows) if table.second_state else table.rows

    def _all(self) -> dict[str, Moments]:
        return {f"pixels_{name}": m for name, m in self.pixels.items()} | {
            f"scalars_{name}": m for name, m in self.scalars.items()
        }

    def arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {"images": np.int64(self.images)}
        for name, kept in self._all().items():
            arrays |= {f"{name}_count": kept.count, f"{name}_mean": kept.mean.cpu().numpy()}
            arrays[f"{name}_squares"] = kept.squares.cpu().numpy()
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, expected in self.arrays().items():
            found = arrays.get(name)
            if found is None or found.dtype != expected.dtype or found.ndim != expected.ndim:
                raise ValueError(f"state: expected {expected.dtype} {name} among its arrays: it is damaged")
            if found.shape != expected.shape:
                raise ValueError(f"images: expected {found.shape[1:]}, as in the state, got {expected.shape[1:]}")
        self.images = int(arrays["images"])
        for name, kept in self._all().items():
            kept.count = arrays[f"{name}_count"]
            kept.mean = torch.from_numpy(arrays[f"{name}_mean"]).to(kept.mean.device)
            kept.squares = torch.from_numpy(arrays[f"{name}_squares"]).to(kept.mean.device)

    def add(self, x_0: Tensor) -> None:
        first = self.seed + self.images
        seeds = torch.arange(first, first + len(x_0), device=x_0.device)
        eps = normal(seeds, self.shape, stream=STREAM_DATA)
        alpha, sigma = self.table["alpha_in"], self.table["sigma_in"]
        if "training" in self.parts:
            self._training(x_0, eps, seeds)
        if "chain" in self.parts:
            self._chain("chain", alpha[0] * x_0 + sigma[0] * eps, seeds, x_0)
        if "samples" in self.parts:
            self._chain("samples", self.table.initial_sigma * normal(seeds, self.shape), seeds)
        self.images += len(x_0)

    def _training(self, x_0: Tensor, eps: Tensor, seeds: Tensor) -> None:
        """Every row from an exact state, all of an image with the same noise; history is then the m0 of the rows before."""
        table, elements = self.table, x_0[0].numel()
        exact = Trajectory(table, x_0, rows=self.rows, second_state=False)
        for i in range(len(table)):
            x = exact.x = table["alpha_in"][i] * x_0 + table["sigma_in"][i] * eps
            output = exact.call(self.model, i)
            m0 = exact.step(i, *output, seeds=seeds)
            assert m0 is not None  # it was asked for
            if not table.keeps_x0:  # m0 is eps
                m0 = (x - table["sigma_in"][i] * m0) / table["alpha_in"][i]
            error = m0 - x_0
            scalars = [
                *_norms(table, i, x, output), moments(error)[:, 1] / elements, moments(error * eps)[:, 0] / elements,
                self._noise(i, output[2], elements, seeds),
            ]  # fmt: skip
            self.scalars["training"].add(i, torch.stack(scalars, 1).cpu())
            self.pixels["error"].add(i, error)
            if self.rows is table.rows:
                self.pixels["single"].add(i, exact.x.double() - table["alpha_out"][i] * x_0.double())

    def _chain(self, part: str, x: Tensor, seeds: Tensor, x_0: Tensor | None = None) -> None:
        table, chain = self.table, Trajectory(self.table, x, rows=self.table.rows)
        for i in range(len(table)):
            output = chain.call(self.model, i)
            norms = dict(zip(_NORMS, _norms(table, i, chain.x, output), strict=True))
            scaled = [norm if name.startswith("state") else norm / table["lambda_t"][i] for name, norm in norms.items()]
            self.scalars[part].add(i, torch.stack(scaled, 1).cpu())
            chain.step(i, *output, seeds=seeds)
            if x_0 is not None:
                self.pixels["chain"].add(i, chain.x.double() - table["alpha_out"][i] * x_0.double())

    def _noise(self, i: int, v: Tensor | None, elements: int, seeds: Tensor) -> Tensor:
        """s^2, the mean over each sample of the learned variance; 1 without."""
        low, high = self.table["logvar_min"][i], self.table["logvar_max"][i]
        if v is None or (low == 0 and high == 0):
            return torch.ones(len(seeds), dtype=torch.float64, device=seeds.device)
        fraction = (v.float() + 1) / 2
        return moments((fraction * high + (1 - fraction) * low).exp())[:, 0] / elements

    def result(self) -> Exposure:
        table, nan = self.table, np.full(len(self.table), np.nan)
        names = ("t", "lambda_t", "alpha_in", "sigma_in", "alpha_out", "sigma_out")
        rows = {name: table[name].copy() for name in names}
        means, errors = {}, {}
        for part, kept in self.scalars.items():
            measured = part in self.parts
            for k, name in enumerate(_SCALARS[part]):
                means[part, name] = kept.mean[:, k].numpy().copy() if measured else nan
                errors[part, name] = np.sqrt(kept.variance[:, k].numpy() / kept.count) if measured else nan
        for part, name in itertools.product(PARTS, _NORMS):
            rows |= {f"{name}_{part}": means[part, name], f"{name}_{part}_se": errors[part, name]}

        def of_pixels(name: str, reduce: Callable[[Tensor], Tensor]) -> Array:
            kept = self.pixels[name]
            values = reduce(kept.variance).flatten(1).mean(1).cpu().numpy()
            return np.where(kept.count > 1, values, np.nan)

        rows["error"] = np.sqrt(means["training", "error"])
        rows["error_std"] = np.sqrt(of_pixels("error", lambda variance: variance))
        rows["covariance"] = means["training", "covariance"]
        rows["std_single"], rows["std_chain"] = of_pixels("single", torch.sqrt), of_pixels("chain", torch.sqrt)
        rows["variance_single"] = of_pixels("single", lambda variance: variance)
        noise = means["training", "noise"]
        rows["variance_paper"] = closed_form(table, rows["error_std"], noise=noise)
        rows["variance_closed"] = closed_form(table, rows["error_std"], rows["covariance"], noise)
        return Exposure(table.name, self.images, self.seed, rows)
