"""experiments/subjects.py: the networks load, are what their formulas say, and sample what resembles their data."""

import dataclasses
import functools
import math
import pathlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import epskernels
from epskernels import calibrate, exposure, images, models, quality, samplers

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
SAMPLERS = {
    "digits": ("ddpm", "ddim", "ddim-unscaled", "edm_euler", "edm_heun", "dpmpp_2m"),
    "digits_edm": ("edm_euler", "edm_heun", "ddpm", "ddim", "dpmpp_2m"),
    "power": ("ddpm", "ddim", "ddim-unscaled", "edm_euler", "edm_heun", "dpmpp_2m"),
}
QUICK = {("digits_edm", "edm_heun"), ("power", "ddpm"), ("power", "edm_euler")}
# Of noise's distance from the data; eight digits have a distance from any others.
LIMIT = {"digits": 0.6, "digits_edm": 0.3, "power": 0.02}


@pytest.fixture
def subjects(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import subjects

    return subjects


@pytest.fixture
def curves(subjects):
    try:
        return subjects.real_curves()
    except ImportError as error:
        pytest.skip(str(error))


@functools.cache
def load(name):
    import subjects

    return subjects.SUBJECTS[name]()


@functools.cache
def reference(name):
    """Features of real data, and their Frechet distance from noise's."""
    subject = load(name)
    real = subject.features(subject.real() if name == "power" else subject.real()[:500])
    noise = subject.from_stored(subject.to_stored(epskernels.normal(range(200), subject.shape)))
    return real, quality.frechet(real, subject.features(noise))


def test_curves(curves):
    assert curves.shape == (1096, 1, 24) and curves.dtype == np.float32
    assert len(np.unique(curves, axis=0)) == 1096
    assert np.abs(curves.mean(-1)).max() < 1e-6 and np.abs(curves.var(-1, ddof=1) - 1).max() < 1e-6
    assert -2.5 < curves.min() < -2.3 and 3.2 < curves.max() < 3.4
    assert curves.mean(0)[0, 4] < -1.4 and curves.mean(0)[0, 10] > 1.0  # little power at night, much before noon


def test_first_digits_are_of_all_kinds(subjects, monkeypatch):
    monkeypatch.setattr(subjects.images, "load", lambda source, shape: np.arange(5000))
    places = subjects.real_digits.__wrapped__()
    assert sorted(places) == list(range(5000))
    for count in (50, 256):
        assert np.ptp(np.bincount(places[:count] // 500, minlength=10)) <= 3  # 500 of each digit, sorted


def test_missing_package_is_named(subjects, monkeypatch):
    def missing(name):
        raise subjects.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(subjects.importlib.metadata, "distribution", missing)
    with pytest.raises(ImportError, match="sktime: pip install sktime"):
        subjects.real_curves.__wrapped__()


def test_denoiser_is_its_formulas(subjects):
    network = subjects.load_weights(subjects.DigitDenoiser(), "digits_edm")
    data = 0.96  # rms of the digits
    assert abs(np.sqrt(np.square(subjects.real_digits()[:500], dtype=np.float64).mean()) - data) < 0.01
    x_0 = torch.from_numpy(subjects.real_digits()[:5])
    for n, sigma in enumerate([0.002, 0.1, 0.96, 7.0, 80.0]):
        x = x_0[n] + sigma * epskernels.normal([n], (1, 28, 28))[0]
        scaled = x[0] / math.hypot(sigma, data)
        patches = torch.stack([scaled[i::2, j::2] for i in (0, 1) for j in (0, 1)])
        f_patches = network.network(patches[None], torch.tensor([100 * math.log(sigma) / 4]))[0][0]
        f = torch.empty(28, 28)
        for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            f[i::2, j::2] = f_patches[k]
        expected = data**2 / (sigma**2 + data**2) * x[0] + sigma * data / math.hypot(sigma, data) * f
        found = network(x[None], torch.tensor([sigma]))[0, 0]
        assert (found - expected).abs().max() < 2e-5 * max(1, expected.abs().max().item())
        assert (found - x_0[n, 0]).square().mean().sqrt() < 0.9 * min(sigma, 0.62) or sigma == 0.002


def test_denoiser_for_vp_samplers(subjects):
    call, abar = load("digits_edm").call, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = epskernels.normal([0, 1], (1, 28, 28))
    for t in (0, 200, 999):
        alpha, sigma = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        expected = call(x / alpha, torch.full((2,), sigma / alpha))
        assert (call(x, torch.full((2,), t)) - expected).abs().max() < 1e-4


# Of the bundled network, which costs most, none in `make test`: the last test has it.
SAMPLED = [
    pytest.param(name, sampler, marks=() if (name, sampler) in QUICK else pytest.mark.deep)
    for name in SAMPLERS
    for sampler in SAMPLERS[name]
]


@pytest.mark.parametrize("name, sampler", SAMPLED)
def test_samples_are_near_the_data(subjects, name, sampler, request):
    if name == "power":
        request.getfixturevalue("curves")
    subject = load(name)
    assert tuple(subject.samplers) == SAMPLERS[name]
    count, steps = {"digits": (8, 10), "digits_edm": (32, 10), "power": (200, 20)}[name]
    table = subject.samplers[sampler](steps, 1.0)
    samples = epskernels.sample(subject.call, table, range(count), subject.shape)
    assert torch.isfinite(samples).all()
    kept = subject.from_stored(subject.to_stored(samples))
    assert kept.shape == (count, *subject.shape) and kept.dtype == np.float32
    real, of_noise = reference(name)
    distance = quality.frechet(real, subject.features(kept))
    print(f"{name}, {table.name}: {distance:.2f}, of noise {of_noise:.2f}")
    assert distance < LIMIT[name] * of_noise


@pytest.mark.parametrize(
    "name, sampler",
    [pytest.param("digits_edm", "edm_euler", marks=pytest.mark.deep), ("digits_edm", "ddim"), ("power", "ddpm")],
)
def test_exposure_bias_can_be_measured(subjects, name, sampler, request):
    if name == "power":
        request.getfixturevalue("curves")
    subject = load(name)
    real = torch.from_numpy(subject.real()[:32])
    matched = calibrate.match_norms(subject.call, lambda s: subject.samplers[sampler](5, s), real)
    found = exposure.measure(subject.call, subject.samplers[sampler](5, 1.0), real, parts=("training", "chain"))
    np.testing.assert_allclose(matched.lambda_t, found.norm_gap, rtol=0.02)
    # No worse than telling the mean, at most noise levels, and better with less noise.
    assert (found.error < 1.1 * real.std().item()).all() and (found.error[1:] < found.error[:-1]).all()


def test_what_is_kept(subjects):
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.5]).reshape(1, 1, 1, 4)
    assert subjects.digits_to_bytes(bad).ravel().tolist() == [0, 255, 0, 191]
    assert subjects.curves_to_stored(bad).ravel().tolist() == [100, 100, -100, 0.5]


def test_training_goes_on_with_the_same_weights(subjects, tmp_path, monkeypatch, capsys):
    import train

    digits = np.random.default_rng(0).uniform(-1, 1, (40, 1, 28, 28)).astype(np.float32)
    recipe = dataclasses.replace(train.RECIPES["digits_edm"], batch=4, data=lambda: digits)
    monkeypatch.setitem(train.RECIPES, "digits_edm", recipe)
    options = ["digits_edm", "--steps", "4", "--save-every", "2", "--out"]
    train.main([*options, str(tmp_path / "whole")])
    calls = 0

    def stops(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return recipe.loss(*args)

    with monkeypatch.context() as patch:
        patch.setitem(train.RECIPES, "digits_edm", dataclasses.replace(recipe, loss=stops))
        with pytest.raises(KeyboardInterrupt):
            train.main([*options, str(tmp_path / "parts")])
    train.main([*options, str(tmp_path / "parts"), "--stop", "3"])
    train.main([*options, str(tmp_path / "parts")])
    whole, parts = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    logs = [(tmp_path / name / "train_log.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [row.split(",")[0] for row in logs[0]] == ["step", "2", "4"]
    assert [row.split(",")[0] for row in logs[1]] == ["step", "2", "3", "4"]
    assert logs[0][1].rsplit(",", 1)[0] == logs[1][1].rsplit(",", 1)[0]
    with pytest.raises(SystemExit):
        train.main([*options, str(tmp_path / "parts"), "--seed", "1"])
    assert "was begun with" in capsys.readouterr().err


def test_losses_are_their_formulas(subjects):
    """A network that returns nothing but zeros has the mean square of its target as its loss."""
    import train

    class Zero(torch.nn.Module):
        sigma_data = 0.96

        def forward(self, x, t):
            self.seen = x, t
            return torch.zeros_like(x)

    network, x_0 = Zero(), torch.full((4000, 1, 24), 0.5)
    loss = train.edm_loss(network, x_0, torch.Generator().manual_seed(0))
    x, sigma = network.seen
    assert abs(sigma.log().mean() - train.P_MEAN) < 0.1 and abs(sigma.log().std() - train.P_STD) < 0.1
    assert ((x - x_0).square().mean((1, 2)) / sigma**2).mean() == pytest.approx(1, abs=0.02)
    weight = 1 / (sigma * 0.96 / (sigma**2 + 0.96**2).sqrt()) ** 2
    assert loss == pytest.approx((0.25 * weight).mean().item(), rel=1e-4)

    loss = train.simple_loss(network, x_0, torch.Generator().manual_seed(0))
    x, t = network.seen
    alpha, sigma = (torch.tensor(values)[t].reshape(-1, 1, 1) for values in (train.PATH.alpha, train.PATH.sigma))
    assert t.min() == 0 and t.max() == 999
    eps = (x - alpha * x_0) / sigma
    assert loss == pytest.approx(eps.square().mean().item(), rel=1e-4) and loss == pytest.approx(1, abs=0.02)


# ---- the bundled network ----


@pytest.fixture(scope="module")
def classifier():
    digits = images.load("mnist", (1, 28, 28)).astype(np.float64)
    return LogisticRegression(C=0.05, max_iter=200).fit(digits.reshape(5000, 784), np.arange(5000) // 500)


@pytest.mark.parametrize("steps, count", [(10, 64), pytest.param(50, 256, marks=pytest.mark.deep)])
def test_samples_are_digits_of_all_classes(classifier, steps, count):
    model = models.load()
    table = samplers.ddpm(model.schedule, steps, scaling=1.005, variance="learned_range", clip=model.clip)
    batches = [range(first, first + 64) for first in range(0, count, 64)]
    samples = torch.cat([epskernels.sample(model.callable(), table, seeds, model.shape) for seeds in batches])
    assert samples.abs().max() <= 1
    probabilities = classifier.predict_proba(samples.reshape(count, -1).double().numpy())
    confident = (probabilities.max(axis=1) > 0.5).mean()
    counts = np.bincount(probabilities.argmax(axis=1), minlength=10)
    print(f"{confident:.3f} of {count} with a top probability over 0.5; digits 0 to 9: {counts.tolist()}")
    assert confident >= 0.9
    assert (counts > 0).all(), counts
