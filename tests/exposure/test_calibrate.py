"""epskernels.calibrate: lambdas that are planted, or known from a recursion, are found again."""

import functools
import json
import math
import pathlib

import numpy as np
import pytest
import torch

import epskernels
from epskernels import bands, calibrate, cli, corrections, exposure, models, quality, samplers, scaling, schedule
from epskernels.table import VALUES
from epskernels.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

COSINE, KARRAS, SHAPE = schedule.cosine(), schedule.KarrasSchedule(0.05, 20), (1, 6, 6)


def gain(t):
    """Of a linear network f = gain*x: 1.04 times that of the exact one for `data`. t: a timestep of COSINE, or KARRAS' sigma."""
    t = torch.as_tensor(t)
    discrete = not t.is_floating_point()
    alpha = torch.tensor(COSINE.alpha)[t] if discrete else torch.ones_like(t)
    sigma = torch.tensor(COSINE.sigma)[t] if discrete else t
    return 1.04 * sigma / (0.25 * alpha**2 + sigma**2)


def linear_model(x, t):
    return gain(t).reshape(-1, 1, 1, 1).float() * x


def data(n, spread=0.5, seed=0):
    return spread * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


SAMPLERS = {
    "ddpm": lambda s: samplers.ddpm(COSINE, 6, scaling=s, clip=None),
    "ddim": lambda s: samplers.ddim(COSINE, 6, scaling=s),
    "ddim-unscaled": lambda s: samplers.ddim(COSINE, 6, scaling=s, direction="unscaled"),
    "edm_euler": lambda s: samplers.edm_euler(KARRAS, 6, scaling=s, prediction="epsilon"),
}


# ---- polynomials ----


@pytest.mark.parametrize(
    "kind, planted", [("constant", [1.01]), ("linear", [2e-3, 1.004]), ("quadratic", [1e-4, -2e-3, 1.02])]
)
@pytest.mark.parametrize("skip", [0, 5])
def test_fit_recovers_a_planted_polynomial(kind, planted, skip):
    """Of i from the cleanest, whatever the skipped steps hold; as a scaling, in a table, it is the planted one again."""
    values = np.polyval(planted, np.arange(20))[::-1].copy()
    values[20 - skip :] = 7
    found = calibrate.fit(values, kind, skip)
    np.testing.assert_allclose(found.coefficients, planted, rtol=1e-9)
    assert kind == "constant" or found.r2 == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(found.scaling.values(20), np.polyval(planted, np.arange(20))[::-1], rtol=1e-12)
    np.testing.assert_allclose(found.derivative, np.polyder(planted) if len(planted) > 1 else [], atol=1e-12)


def test_goodness_of_fit():
    """R^2 against its definition, where the fit is not good."""
    y = np.array([1.0, 1.5, 1.1, 1.9, 1.2])
    found = calibrate.fit(y[::-1], "linear")
    residuals = y - found(np.arange(5))
    assert found.r2 == pytest.approx(1 - (residuals**2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-12)
    assert 0 < found.r2 < 0.5 and residuals.sum() == pytest.approx(0, abs=1e-12)
    assert math.isnan(calibrate.fit(np.ones(4), "linear").r2)


# ---- norm matching ----


@pytest.mark.parametrize("feedback", [False, True], ids=["", "feedback"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_match_norms_follows_the_recursion_of_a_linear_network(name, feedback):
    """States of f = gain*x stay Gaussian: their variance, and so each ratio of norms, is known down the chain."""
    table = SAMPLERS[name](1.0)
    found = calibrate.match_norms(linear_model, SAMPLERS[name], data(3000), feedback=feedback, batch=1000)
    v, expected = 0.25 * table["alpha_in"][0] ** 2 + table["sigma_in"][0] ** 2, []
    for i in range(6):
        trained = 0.25 * table["alpha_in"][i] ** 2 + table["sigma_in"][i] ** 2
        expected.append(math.sqrt(v / trained))
        row = SAMPLERS[name](found.scaling(skip=0)) if feedback else table  # what it chose decides the next variance
        g = gain(int(table["t"][i]) if table.discrete else table["t"][i]).item() * table["c_in"][i]
        v *= (row["c_x"][i] + row["c_f"][i] * g + row["c_m0"][i] * (row["d_x"][i] + row["d_f"][i] * g)) ** 2
        v += row["c_noise"][i] ** 2
    assert max(abs(np.array(expected) - 1)) > 0.02
    assert found.lambda_t[0] == expected[0] == 1 and found.standard_error[0] == 0
    assert (np.abs(found.lambda_t - expected)[1:] < 5 * found.standard_error[1:]).all()
    assert found.standard_error.max() < 0.005
    np.testing.assert_allclose(found.lambda_t, found.norm_sampling / found.norm_training, rtol=1e-15)


@pytest.mark.parametrize("name", SAMPLERS)
def test_matched_norms_have_no_gap(name):
    """The chain from the same images with what was found: its norms are those of training."""

    def model(x, t):
        return torch.tanh(2 * x) + 0.1 * x

    options = {"feedback": True, "seed": 3}
    found = calibrate.match_norms(model, SAMPLERS[name], data(64), batch=16, **options)
    plain = exposure.measure(model, SAMPLERS[name](1.0), data(64), seed=3, parts=("training", "chain"))
    scaled = SAMPLERS[name](found.scaling(skip=0))
    matched = exposure.measure(model, scaled, data(64), seed=3, parts=("training", "chain"))
    assert np.abs(plain.norm_gap - 1).max() > 0.02
    np.testing.assert_allclose(matched.norm_gap, 1, rtol=1e-6)
    other = calibrate.match_norms(model, SAMPLERS[name], data(64), batch=7, **options)
    np.testing.assert_allclose(other.lambda_t, found.lambda_t, rtol=1e-6)
    gap = calibrate.match_norms(model, SAMPLERS[name], data(64), seed=3)  # without feedback it is the gap itself
    np.testing.assert_allclose(gap.lambda_t, plain.norm_gap, rtol=1e-6)


def test_rows_of_a_heun_step_share_its_lambda():
    sampler = lambda s: samplers.edm_heun(KARRAS, 4, scaling=s, prediction="epsilon")  # noqa: E731
    table, step_of_row = calibrate.steps_of(sampler)
    assert step_of_row.tolist() == [0, 0, 1, 1, 2, 2, 3] and len(table) == 7
    found = calibrate.match_norms(linear_model, sampler, data(8))
    scaled = sampler(found.scaling(skip=0))
    np.testing.assert_array_equal(scaled["lambda_t"], found.lambda_t[step_of_row])


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_history_and_second_state_are_carried(name):
    sampler = lambda s: samplers.SAMPLERS[name](COSINE, 5, scaling=s, spacing="trailing")  # noqa: E731
    found = calibrate.match_norms(linear_model, sampler, data(16), feedback=True)
    sampled = exposure.measure(linear_model, sampler(found.scaling(skip=0)), data(16), parts=("training", "chain"))
    np.testing.assert_allclose(sampled.norm_gap, 1, rtol=1e-6)


def test_lambda_is_one_where_alpha_is_zero():
    path = schedule.linear().zero_terminal_snr()
    sampler = lambda s: samplers.ddim(path, 4, scaling=s, prediction="v_prediction", spacing="trailing")  # noqa: E731
    found = calibrate.match_norms(linear_model, sampler, data(8))
    assert sampler(1.0)["alpha_in"][0] == 0 and found.lambda_t[0] == 1 and (found.lambda_t[1:] != 1).all()


def test_matched_fits_and_plot(tmp_path):
    found = calibrate.match_norms(linear_model, SAMPLERS["ddim"], data(8))
    assert found.scaling().values(6).tolist() == [*found.lambda_t[:5], 1.0] and found.lambda_t[5] != 1
    assert found.scaling(skip=6).values(6).tolist() == [1.0] * 6
    with pytest.raises(ValueError, match="skip: expected 0 to 6, got 7"):
        found.scaling(skip=7)
    assert found.scaling("constant", 0).values(6)[0] == pytest.approx(found.lambda_t.mean(), rel=1e-12)
    expected = np.polyfit(np.arange(1, 6), found.lambda_t[-2::-1], 1)
    assert [found.scaling("linear").spec[key] for key in ("k", "b")] == pytest.approx(expected.tolist(), rel=1e-12)
    found.plot(tmp_path / "lambda.png", "linear")
    assert (tmp_path / "lambda.png").read_bytes().startswith(b"\x89PNG")


# ---- search ----


def distance(planted, steps=12):
    """A score that is smallest at a planted lambda; counts its calls."""
    calls = []

    def score(candidate):
        calls.append(candidate)
        return float(((candidate.values(steps) - planted) ** 2).sum())

    score.calls = calls
    return score


def test_search_recovers_a_planted_uniform_lambda():
    score = distance(1.0173)
    found = calibrate.search(score, (0.98, 1.04), trials=10)
    assert found.scaling.values(1)[0] == pytest.approx(1.0173, abs=2e-4)
    assert len(score.calls) == len(found.trials) <= 10
    assert found.baseline == score(scaling.constant(1.0)) and found.score < 1e-6


def test_the_text_of_matched_norms_is_a_line():
    matched = calibrate.match_norms(linear_model, SAMPLERS["ddpm"], data(4))
    low, high = matched.lambda_t.min(), matched.lambda_t.max()
    assert repr(matched) == f"Matched(ddpm[6], 4 images; lambda_t {low:.4g} to {high:.4g}, 6 steps)"


@pytest.mark.parametrize("planted", [0.95, 1.0, 1.07])
def test_no_trial_is_made_twice(planted):
    """Thirds are rounded to 7 digits, one way going up and the other coming down."""
    found = calibrate.search(lambda s: (s.values(1)[0] - planted) ** 2, (0.9, 1.1))
    tried = sorted(b for _, b, _ in found.trials)
    assert len(tried) == 8 and min(np.diff(tried)) > 1e-3
    assert {type(each) for trial in found.trials for each in trial} == {float} and "np." not in repr(found)


@pytest.mark.parametrize(
    "value, shown",
    [("a", "'a'"), (None, "None"), (True, "True"), (torch.ones(2), r"torch.float32 \(2,\)"), ([1.0], "list of 1")],
    ids=str,
)
def test_a_score_that_is_no_number_is_refused(value, shown):
    message = f"^score: expected a function that returns a number, got {shown}$"
    with pytest.raises(ValueError, match=message):
        calibrate.search(lambda s: value, (0.9, 1.1))
    with pytest.raises(ValueError, match=message):
        calibrate.search_weights(lambda s: value, corrections.dc, {"s": 0.0})


def test_a_score_may_be_a_tensor_of_one_number():
    found = calibrate.search(lambda s: torch.tensor([(s.values(1)[0] - 1.01) ** 2]), (0.97, 1.03), trials=3)
    assert type(found.score) is float


def test_search_recovers_a_planted_line():
    planted = np.polyval([0.0025, 1.001], np.arange(12))[::-1]
    found = calibrate.search(distance(planted), ((-0.005, 0.005), (0.98, 1.04)), steps=12, trials=40)
    assert found.scaling.spec["k"] == pytest.approx(0.0025, abs=1e-4)
    assert found.scaling.spec["b"] == pytest.approx(1.001, abs=1e-3)


def test_search_recovers_the_factor_of_a_network_that_predicts_too_much():
    """eps times 1.04 at every t: from samples alone, compared with those of the network as it should be."""

    def good(x, t):
        alpha, sigma = (torch.tensor(getattr(COSINE, name))[t].reshape(-1, 1, 1, 1) for name in ("alpha", "sigma"))
        return (sigma * x / (0.25 * alpha**2 + sigma**2)).float()

    def score(candidate):
        table = samplers.ddim(COSINE, 8, scaling=candidate)
        samples = epskernels.sample(lambda x, t: 1.04 * good(x, t), table, range(50), SHAPE)
        return (samples.std() - expected).abs().item()

    expected = epskernels.sample(good, samplers.ddim(COSINE, 8), range(50, 2050), SHAPE).std()
    found = calibrate.search(score, (0.97, 1.1), trials=12)
    assert found.scaling.values(1)[0] == pytest.approx(1.04, abs=0.015) and found.score < 0.2 * found.baseline


def planted(**weights):
    """A score that is smallest at planted weights, with a little of their product; counts its calls."""
    calls = []

    def score(made):
        calls.append(made)
        off = [made[name] - value for name, value in weights.items()]
        return sum(x * x for x in off) + 0.1 * math.prod(off) * (len(off) > 1)

    score.calls = calls
    return score


@pytest.mark.parametrize("s", [-0.41, -0.0131, 0.0, 0.07, 1.3])
def test_search_recovers_a_planted_weight_of_either_sign(s):
    """Of any size: the steps double, then halve, and a parabola finds the floor."""
    score = planted(s=s)
    found = calibrate.search_weights(score, dict, {"s": 0.0}, trials=12)
    assert found.best == found.weights and found.weights["s"] == pytest.approx(s, abs=2e-3)
    assert found.baseline == s * s and found.trials[0] == (0, s * s) and len(score.calls) == len(found.trials) <= 12


def test_two_weights_are_searched_one_beside_the_other():
    score = planted(low=-0.25, high=0.06)
    found = calibrate.search_weights(score, dict, {"low": 0.0, "high": 0.0}, trials=24)
    lows, highs = zip(*[(made["low"], made["high"]) for made in score.calls], strict=True)
    first = next(n for n, high in enumerate(highs) if high)
    assert first <= 12 and not any(highs[:first]) and len(set(lows[first:])) == 1  # of the best low
    assert found.weights == {"low": pytest.approx(-0.25, abs=0.01), "high": pytest.approx(0.06, abs=0.01)}
    assert found.score == min(trial[-1] for trial in found.trials) and len(found.trials) <= 24


def test_weights_stay_in_their_bounds_and_trials_in_their_number():
    for trials in (2, 3, 5, 9):
        score = planted(low=-3.0, high=2.0)
        bounds = {"low": (-0.3, 0.2)}
        found = calibrate.search_weights(score, dict, {"low": 0.0, "high": 0.0}, bounds=bounds, trials=trials)
        assert len(score.calls) == len(found.trials) <= trials
        assert found.score < found.baseline or trials < 5
        assert all(-0.3 <= low <= 0.2 and -0.9 <= high <= 2 for low, high, _ in found.trials)


def test_downhill_goes_as_far_as_it_gets_better():
    """In steps of 0.01 from 1 down to the valley at 0.953, then in half of them: the search for b of experiments/exposure.py."""
    asked = []
    score = lambda b: asked.append(b) or abs(b - 0.953)  # noqa: E731
    assert calibrate.downhill(score, 1.0, 0.01, smallest=0.005) == 0.955
    assert sorted(set(asked)) == [0.94, 0.945, 0.95, 0.955, 0.96, 0.97, 0.98, 0.99, 1.0, 1.01]
    assert calibrate.downhill(score, 1.0, 0.01, smallest=0.005, limits=(0.98, 1.2)) == 0.98
    assert calibrate.downhill(score, 1.0, 0.01, smallest=0.00125, growth=2.0) == pytest.approx(0.953, abs=0.00125)


def test_search_recovers_the_correction_of_a_sampler_that_is_off():
    """Samples of a sampler with a planted correction: from them alone the weight is found, through the sampler itself."""

    def samples(correction):
        table = samplers.ddim(COSINE, 6, correction=correction)
        return epskernels.sample(linear_model, table, range(16), SHAPE)

    expected = samples(corrections.dc(-0.06, target="alpha*m0"))
    make = functools.partial(corrections.dc, target="alpha*m0")
    found = calibrate.search_weights(lambda c: (samples(c) - expected).square().mean().item(), make, {"s": 0.0})
    assert found.weights["s"] == pytest.approx(-0.06, abs=2e-3) and found.best == make(found.weights["s"])
    with pytest.raises(TypeError, match="scaling: expected the result of a search over scalings"):
        _ = found.scaling


def test_interrupted_search_of_weights_goes_on_from_its_cache(tmp_path):
    start, cache = {"low": 0.0, "high": 0.0}, tmp_path / "trials.json"
    whole = calibrate.search_weights(planted(low=0.1, high=-0.1), dict, start)
    stops = planted(low=0.1, high=-0.1)

    def interrupted(made):
        if len(stops.calls) == 7:
            raise KeyboardInterrupt
        return stops(made)

    with pytest.raises(KeyboardInterrupt):
        calibrate.search_weights(interrupted, dict, start, cache=cache)
    goes_on = planted(low=0.1, high=-0.1)
    found = calibrate.search_weights(goes_on, dict, start, cache=cache)
    assert found == whole and len(goes_on.calls) == len(whole.trials) - 7
    with pytest.raises(ValueError, match=r"begun with weights \['low', 'high'\], now \['low'\]"):
        calibrate.search_weights(planted(low=0.1), dict, {"low": 0.0}, cache=cache)


# ---- epskernels calibrate --correction ----


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A function that runs `epskernels calibrate` on the bundled digits, with random images for the real ones."""
    monkeypatch.chdir(tmp_path)
    np.save("digits.npy", np.random.default_rng(0).uniform(-1, 1, (4, 1, 28, 28)).astype(np.float32))
    settings = ["--steps", "2", "--data", "digits.npy", "--images", "4", "--samples", "2", "--out", "found.json"]
    return lambda *arguments: cli.main(["calibrate", "--quiet", *settings, "--sampler", "ddim", *arguments])


@pytest.mark.parametrize(
    "arguments, weights",
    [
        (["dc", "--target", "alpha*m0", "--lambda", "1.01"], ["s"]),
        (["dcw", "--schedule", "constant"], ["low", "high"]),
        (["frequency"], ["low", "high"]),
        (["tsr", "--sigma", "0.96"], ["k"]),
    ],
    ids=lambda value: value[0],
)
def test_calibrates_a_correction(arguments, weights, digits, capsys):
    """The file is what samplers take, with the score that it says."""
    trials = 3 if len(weights) == 1 else 5
    assert digits("--correction", *arguments, "--trials", str(trials), "--cache", "trials.json") == 0
    printed, model = capsys.readouterr().out, models.load()
    assert f"{arguments[0]}, {weights[0]} " in printed and "wrote found.json" in printed
    if arguments[0] == "tsr":
        made, notes = scaling.load("found.json")
        options = {"scaling": made}
        assert made.spec["kind"] == "tsr" and made.spec["sigma"] == 0.96
    else:
        made, notes = corrections.load("found.json")
        options = {"correction": "found.json"}
        assert made.kind == arguments[0] and (made.target, made.schedule) == {
            "dc": ("alpha*m0", "constant"), "dcw": ("m0", "constant"), "frequency": ("m0", "constant")
        }[made.kind]  # fmt: skip
    if "--lambda" in arguments:
        assert notes["lambda"] == {"kind": "constant", "b": 1.01}
        options["scaling"] = 1.01
    assert len(notes["trials"]) == trials and all(len(trial) == len(weights) + 1 for trial in notes["trials"])
    unchanged = [1.0 if arguments[0] in ("frequency", "tsr") else 0.0] * len(weights)
    key = "score without correction"
    assert notes["trials"][0] == [*unchanged, notes[key]] and notes["score"] == min(
        trial[-1] for trial in notes["trials"]
    )
    table = samplers.ddim(
        model.schedule, 2, clip=model.clip, prediction=model.prediction, final=model.final, **model.grid, **options
    )
    samples = epskernels.sample(model.callable(), table, range(2), model.shape)
    real = quality.digit_features(np.load("digits.npy"))
    assert quality.frechet(real, quality.digit_features(samples)) == pytest.approx(notes["score"], rel=1e-9)
    before = open("trials.json").read()
    assert digits("--correction", *arguments, "--trials", str(trials), "--cache", "trials.json") == 0
    assert open("trials.json").read() == before
    assert digits("--correction", *arguments, "--trials", "2", "--cache", "trials.json", "--seed", "1") == 2
    assert "begun with key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--correction", "dc", "--method", "norms"], "--correction: not an option of --method norms"),
        (["--correction", "dc", "--fit", "linear"], "--fit: not an option of --method search"),
        (["--correction", "dc", "--sigma", "1"], "--sigma: not an option of --correction dc"),
        (["--correction", "tsr", "--lambda", "1.01"], "--lambda: not an option of --correction tsr"),
        (["--correction", "tsr", "--target", "m0"], "--target: not an option of --correction tsr"),
        (["--correction", "frequency", "--target", "m0"], "--target: not an option of --correction frequency"),
        (["--correction", "dcw", "--k-bounds", "0", "1"], "--k-bounds: not an option of --correction dcw"),
        (["--lambda", "1.01"], "--lambda: not an option of a calibration without --correction"),
        (["--schedule", "sigma"], "--schedule: not an option of a calibration without --correction"),
        (["--trials", "4"], "--trials: not an option of --method norms"),
        (["--method", "search", "--skip", "1"], "--skip: not an option of --method search"),
        (["--correction", "dc", "--trials", "1"], "--trials: expected at least 2, got 1"),
        (["--correction", "dc", "--bounds", "1", "0"], "bounds: expected (low, high), low < high, got [1.0, 0.0]"),
        (["--correction", "dc", "--lambda", "-1"], "--lambda: "),
        (["--correction", "dc", "--lambda", "{"], "--lambda: expected JSON, got '{'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_calibrate_refuses(arguments, message, digits, capsys):
    assert digits(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert not (pathlib.Path("found.json")).exists()


# ---- the gradient ----


def exact(x, t):
    """The exact eps for `data`."""
    return linear_model(x, t) / 1.04


@pytest.mark.parametrize("name", ["ddpm", "ddim", "edm_euler"])
def test_learn_recovers_a_planted_uniform_lambda(name):
    """From samples alone: eps comes out 1.04 times too large, and the loss is the distance from what it should give."""
    expected = epskernels.sample(exact, SAMPLERS[name](1.0), range(8), SHAPE)
    loss = lambda x: (x - expected).square().mean()  # noqa: E731
    found = calibrate.learn(linear_model, SAMPLERS[name], loss, range(8), SHAPE, form="constant", rounds=60)
    assert found.scaling.values(1)[0] == pytest.approx(1.04, abs=2e-3)
    assert len(found.losses) == 60 and min(found.losses) < 0.01 * found.losses[0]


def test_learn_recovers_a_planted_line_and_array():
    planted = scaling.linear(0.008, 1.01, origin="cleanest").values(6)
    timesteps = SAMPLERS["ddim"](1.0)["t"]

    def model(x, t):
        return planted[int(np.flatnonzero(timesteps == t[0].item())[0])] * exact(x, t)

    states = []
    keep = lambda i, x, m0: states.append(x.clone())  # noqa: E731
    epskernels.sample(exact, SAMPLERS["ddim"](1.0), range(8), SHAPE, callback=keep)
    loss = lambda x: (x - states[-1]).square().mean()  # noqa: E731
    line = calibrate.learn(model, SAMPLERS["ddim"], loss, range(8), SHAPE, form="linear", rounds=80)
    assert min(line.losses) < 1e-3 * line.losses[0] and line.scaling.spec["kind"] == "linear"
    free = calibrate.learn(model, SAMPLERS["ddim"], loss, range(8), SHAPE, rounds=80)
    assert min(free.losses) < 1e-3 * free.losses[0] and free.scaling.spec["kind"] == "array"
    # What is learned is what the sampler does with it.
    scaled = epskernels.sample(model, SAMPLERS["ddim"](free.scaling), range(8), SHAPE)
    assert loss(scaled).item() == pytest.approx(min(free.losses), rel=1e-3, abs=1e-9)


def test_learn_through_heun_history_and_a_second_state():
    for sampler in (
        lambda s: samplers.edm_heun(KARRAS, 3, scaling=s, prediction="epsilon"),
        lambda s: samplers.dpmpp_2m(COSINE, 4, scaling=s, spacing="trailing"),
        lambda s: samplers.unipc(COSINE, 4, scaling=s, spacing="trailing"),
    ):
        expected = epskernels.sample(exact, sampler(1.0), range(4), SHAPE)
        loss = lambda x, expected=expected: (x - expected).square().mean()  # noqa: E731
        found = calibrate.learn(linear_model, sampler, loss, range(4), SHAPE, form="constant", rounds=60)
        assert found.scaling.values(1)[0] == pytest.approx(1.04, abs=4e-3)


def test_learn_leaves_lambda_where_alpha_is_zero():
    path = schedule.linear().zero_terminal_snr()
    sampler = lambda s: samplers.ddim(path, 4, scaling=s, prediction="v_prediction", spacing="trailing")  # noqa: E731
    found = calibrate.learn(linear_model, sampler, lambda x: x.square().mean(), range(4), SHAPE, rounds=5)
    assert found.scaling.values(4)[0] == 1 and (found.scaling.values(4)[1:] != 1).all()
    found = calibrate.learn(
        linear_model, sampler, lambda x: x.square().mean(), range(4), SHAPE, form="constant", rounds=5
    )
    assert found.scaling.values(1)[0] != 1 and sampler(found.scaling)["lambda_t"][0] == 1


@pytest.mark.parametrize("form", ["array", "constant", "linear"])
def test_what_learn_found_is_what_the_sampler_does(form):
    """Of two calls too, in a step that begins at noise alone: both have lambda 1."""
    path = schedule.cosine()
    sampler = lambda s: samplers.heun(path, 5, scaling=s, prediction="v_prediction", spacing="trailing")  # noqa: E731
    loss = lambda x: (x - 0.3).square().mean()  # noqa: E731
    found = calibrate.learn(linear_model, sampler, loss, range(4), SHAPE, form=form, rounds=8, rate=0.02)
    samples = epskernels.sample(linear_model, sampler(found.scaling), range(4), SHAPE)
    assert min(found.losses) < found.losses[0]
    assert loss(samples).item() == pytest.approx(min(found.losses), rel=1e-4)


# ---- the gradient of a correction's weights ----

KINDS = {
    "dc": corrections.dc(-0.11),
    "dc-sigma": corrections.dc([0.1, -0.2, 0.3, 0.1, -0.1], target="alpha*m0", schedule="sigma"),
    "dcw": corrections.dcw(-0.3, 0.2),
    "dcw-constant": corrections.dcw(-0.25, 0.1, schedule="constant", target="alpha*m0"),
    "dcw-levels": corrections.dcw({"levels": [-3.0, 2.0], "values": [0.4, -0.1]}, 0.1, schedule="constant"),
    "frequency": corrections.frequency(1.2, 0.9),
    "frequency-sigma": corrections.frequency(1.2, [0.9, 1.1, 1.0, 0.8, 1.2], schedule="sigma"),
}
CORRECTED = {
    "ddim": lambda **options: samplers.ddim(COSINE, 5, clip=0.8, **options),
    "ddpm": lambda **options: samplers.ddpm(COSINE, 5, **options),
    "edm_heun": lambda **options: samplers.edm_heun(KARRAS, 5, prediction="epsilon", **options),
    "dpmpp_2m": lambda **options: samplers.dpmpp_2m(COSINE, 5, spacing="trailing", **options),
    "plms": lambda **options: samplers.plms(COSINE, 5, **options),  # keeps eps
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def numbers_of(correction):
    """Its weights as float64 tensors that take a gradient, as `corrected_rows` wants them."""
    bands = ("low",) if correction.kind == "dc" else ("low", "high")
    return {band: torch.from_numpy(correction.numbers(band)).requires_grad_() for band in bands}


@each_kind
@pytest.mark.parametrize("name", CORRECTED)
def test_differentiable_rows_are_the_samplers(name, kind):
    """To the bit but where float64 rounds twice; beside a lambda too."""
    correction = KINDS[kind]
    for scale in (1.0, 1.03):
        plain, expected = CORRECTED[name](), CORRECTED[name](scaling=scale, correction=correction)
        scaled = plain.scaled_rows(torch.tensor(scale)) if scale != 1 else None
        rows = corrections.corrected_rows(plain, correction, **numbers_of(correction), rows=scaled)
        assert rows.shape == expected.rows.shape and rows.requires_grad
        torch.testing.assert_close(rows, expected.rows, rtol=2e-7, atol=1e-7)


def in_float64(table, x, seeds):
    """The samples that a table makes of x with `tanh_model`, in float64: its coefficients before they are rounded."""
    row_of = lambda i: {key: table[key][i] for key in VALUES}  # noqa: E731
    m = [torch.zeros_like(x), torch.zeros_like(x)]
    for i in range(len(table)):
        c = row_of(i)
        f = tanh_model(c["c_in"] * x, None)
        m0 = (c["d_x"] * x + c["d_f"] * f).clamp(-c["clip"], c["clip"])
        made = c["c_x"] * x + c["c_f"] * f + c["c_m0"] * m0 + c["c_m1"] * m[0] + c["c_m2"] * m[1]
        if c["c_noise"]:
            made = made + c["c_noise"] * epskernels.normal(seeds, SHAPE, draw=int(c["draw"]), stream=0).double()
        if c["band_dims"]:
            made = made + bands.low_band(c["l_next"] * made + c["l_m0"] * m0 + c["l_x"] * x, 2)
        x, m = made, [m0, m[0]]
    return x


def tanh_model(x, t):
    return 0.7 * torch.tanh(1.5 * x) + 0.1 * x


@each_kind
@pytest.mark.parametrize("name", ["ddim", "ddpm", "edm_heun", "dpmpp_2m"])
def test_the_gradient_of_weights_is_that_of_float64_differences(name, kind):
    """Central differences of the samplers' own float64 tables, for every number of the correction."""
    correction, seeds, loss = KINDS[kind], torch.arange(4), lambda x: (x - 0.3).square().mean() + x.abs().mean()
    plain, numbers = CORRECTED[name](), numbers_of(correction)
    start = plain.initial_sigma * epskernels.normal(seeds, SHAPE)
    run = Trajectory(plain, start, rows=corrections.corrected_rows(plain, correction, **numbers))
    for row in range(len(plain)):
        run.step(row, *run.call(tanh_model, row), seeds=seeds)
    loss(run.x).backward()

    def moved(band, n, by):
        values = correction.numbers(band)
        values.reshape(-1)[n] += by
        changed = {"low": values, "high": values} if correction.kind == "dc" else {band: values}
        table = CORRECTED[name](correction=correction.with_numbers(**changed))
        return loss(in_float64(table, start.double(), seeds)).item()

    for band, values in numbers.items():
        for n, got in enumerate(values.grad.reshape(-1).tolist()):
            expected = (moved(band, n, 1e-5) - moved(band, n, -1e-5)) / 2e-5
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5), (band, n)
    assert any(values.grad.abs().max() > 1e-2 for values in numbers.values())


@pytest.mark.parametrize(
    "planted, start",
    [
        (corrections.dc(-0.06, target="alpha*m0"), corrections.dc(0.0, target="alpha*m0")),
        (corrections.dcw(-0.08, 0.04, schedule="constant"), corrections.dcw(0.0, schedule="constant")),
        (corrections.frequency(0.95, 1.04), corrections.frequency(1.0)),
    ],
    ids=["dc", "dcw", "frequency"],
)
def test_learn_recovers_planted_weights(planted, start, tmp_path):
    """From samples alone; the file is what samplers take."""
    sampler = SAMPLERS["ddim"]
    expected = epskernels.sample(exact, samplers.ddim(COSINE, 6, correction=planted), range(8), SHAPE)
    loss = lambda x: (x - expected).square().mean()  # noqa: E731
    options = {"form": None, "correction": start, "rounds": 60, "rate": 8e-3}
    found = calibrate.learn(exact, sampler, loss, range(8), SHAPE, **options)
    assert min(found.losses) < 0.02 * found.losses[0] and found.scaling.values(6).tolist() == [1.0] * 6
    for band in ("low", "high"):
        assert found.correction.numbers(band) == pytest.approx(planted.numbers(band), abs=8e-3)
    found.correction.save(tmp_path / "correction.json", sampler="ddim")
    assert corrections.load(tmp_path / "correction.json")[0] == found.correction
    table = samplers.ddim(COSINE, 6, correction=tmp_path / "correction.json")
    assert loss(epskernels.sample(exact, table, range(8), SHAPE)).item() == pytest.approx(min(found.losses), rel=1e-3)


def test_learn_finds_lambda_and_a_correction_together():
    """lambda alone, and a weight alone, leave more of the loss; together they are what the sampler does with both."""
    planted = samplers.ddim(COSINE, 6, scaling=1.03, correction=corrections.dc(-0.07))
    expected = epskernels.sample(tanh_model, planted, range(8), SHAPE)
    loss = lambda x: (x - expected).square().mean()  # noqa: E731
    learn = functools.partial(
        calibrate.learn, tanh_model, SAMPLERS["ddim"], loss, range(8), SHAPE, rounds=120, rate=4e-3
    )
    start = {"kind": "dc", "s": 0.0}
    alone, weight, both = (
        learn(form="constant"), learn(form=None, correction=start), learn(form="constant", correction=start),
    )  # fmt: skip
    assert alone.correction is None and both.losses[0] == alone.losses[0] == weight.losses[0]
    assert min(both.losses) < 0.1 * min(*alone.losses, *weight.losses)
    table = samplers.ddim(COSINE, 6, scaling=both.scaling, correction=both.correction)
    assert loss(epskernels.sample(tanh_model, table, range(8), SHAPE)).item() == pytest.approx(
        min(both.losses), rel=1e-3
    )


def test_learn_keeps_the_form_of_the_weights():
    start = corrections.dcw({"levels": [-2.0, 1.0], "values": [0.0, 0.0]}, [0.0] * 6, schedule="constant")
    loss = lambda x: (x - 0.2).square().mean()  # noqa: E731
    found = calibrate.learn(
        linear_model, SAMPLERS["ddim"], loss, range(4), SHAPE, form=None, correction=start, rounds=6
    )
    assert found.correction.low["levels"] == [-2.0, 1.0] and all(found.correction.low["values"])
    *others, last = found.correction.high
    assert len(others) == 5 and all(others) and last == 0  # which leads to an image
    assert min(found.losses) < found.losses[0]


def test_samplers_that_cannot_be_calibrated():
    fixed = samplers.ddim(COSINE, 4)
    with pytest.raises(ValueError, match="sampler: expected one that scales by what it is called with"):
        calibrate.steps_of(lambda s: fixed)
    with pytest.raises(ValueError, match="sampler: expected rows for each of its 3 steps, in order, got 4 rows"):
        calibrate.steps_of(lambda s: s.values(3) is not None and fixed)
    with pytest.raises(ValueError, match="sampler: expected one whose lambda_t is the scaling given, got .* for 1"):
        calibrate.steps_of(lambda s: s.values(4) is not None and samplers.ddim(COSINE, 4, scaling=1.1))
    assert calibrate.steps_of(lambda s: samplers.heun(COSINE, 1, scaling=s))[1].tolist() == [0]


def test_the_steps_of_rows():
    """Of two and three calls a step, and of a second call in the first step alone."""
    path = schedule.KarrasSchedule()
    for sampler, expected in (
        (lambda s: samplers.dpmpp_3s(path, 3, scaling=s), [0, 0, 0, 1, 1, 1, 2]),
        (lambda s: samplers.dpm_solver(path, 4, scaling=s, order=(3, 1, 2, 1)), [0, 0, 0, 1, 2, 2, 3]),
        (lambda s: samplers.plms(COSINE, 4, scaling=s), [0, 0, 1, 2, 3]),
        (lambda s: samplers.dpmpp_2s(path, 3, scaling=s, eta=9.0), [0, 1, 2]),
    ):
        assert calibrate.steps_of(sampler)[1].tolist() == expected


@pytest.mark.parametrize("heun", [False, True])
def test_steps_are_numbered_where_x_is_noise_alone(heun):
    """Several steps of it, whose lambda is 1 whatever is asked for."""
    path, make = schedule.KarrasSchedule(sigma_max=50_000.0), samplers.edm_heun if heun else samplers.edm_euler
    table, steps = calibrate.steps_of(lambda s: make(path, 12, scaling=s, prediction="sample"))
    assert 3 < (table["sigma_in"] > 900).sum() < len(table) - 3
    assert steps.tolist() == (np.repeat(np.arange(12), 2)[:-1] if heun else np.arange(12)).tolist()


def test_no_scaling_is_a_trial():
    found = calibrate.search(distance(1.0), (1.01, 1.05), trials=4)
    assert found.scaling.values(1)[0] == 1 and found.score == found.baseline == 0


def test_interrupted_search_goes_on_from_its_cache(tmp_path):
    whole = calibrate.search(distance(1.02), (0.98, 1.04), trials=7)
    stops = distance(1.02)

    def interrupted(candidate):
        if len(stops.calls) == 3:
            raise KeyboardInterrupt
        return stops(candidate)

    arguments = {"bounds": (0.98, 1.04), "trials": 7, "cache": tmp_path / "trials.json", "key": "m"}
    with pytest.raises(KeyboardInterrupt):
        calibrate.search(interrupted, **arguments)
    goes_on = distance(1.02)
    found = calibrate.search(goes_on, **arguments)
    assert found.trials == whole.trials and len(goes_on.calls) == len(whole.trials) - 3
    again = distance(1.02)
    assert calibrate.search(again, **arguments).score == whole.score and not again.calls
    with pytest.raises(ValueError, match="begun with key 'm', now 'another'"):
        calibrate.search(again, **arguments | {"key": "another"})


def test_a_score_that_is_not_finite_is_the_worst(tmp_path):
    cache = tmp_path / "trials.json"
    score = lambda s: math.nan if s.values(1)[0] > 1.006 else abs(s.values(1)[0] - 1.005)  # noqa: E731
    found = calibrate.search(score, (0.98, 1.04), trials=8, cache=cache)
    assert found.scaling.values(1)[0] == pytest.approx(1.005, abs=3e-3)
    assert None in [trial["score"] for trial in json.loads(cache.read_text())["trials"]]


def test_no_scaling_may_be_what_is_not_finite(tmp_path):
    score = lambda s: math.inf if s.values(1)[0] == 1 else s.values(1)[0]  # noqa: E731
    found = calibrate.search(score, (0.98, 1.04), trials=4, cache=tmp_path / "trials.json")
    assert found.baseline == math.inf and found.trials[0] == (0, 1, math.inf) and found.score < 1.04
    again = calibrate.search(score, (0.98, 1.04), trials=4, cache=tmp_path / "trials.json")
    assert again.trials == found.trials and again.baseline == math.inf


def learn(sampler=SAMPLERS["ddim"], **options):
    loss = lambda x: x.square().mean()  # noqa: E731
    return calibrate.learn(linear_model, sampler, loss, [1], SHAPE, **{"rounds": 3, **options})


def corrected_rows(kind, *weights):
    return corrections.corrected_rows(samplers.ddim(COSINE, 3), KINDS[kind], *weights)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: calibrate.fit([1.0, math.nan], "linear"), "values: expected"),
        (lambda: calibrate.fit([1.0, 1.0], "cubic"), "kind: expected one of .*got 'cubic'"),
        (lambda: calibrate.fit([1.0] * 5, "linear", skip=4), "skip: expected 0 to 3 for 5 steps, got 4"),
        (lambda: calibrate.search(abs, (1.0, 0.9)), "bounds: expected"),
        (lambda: calibrate.search(abs, ((0, 1), (1, 2))), "steps: expected an integer of at least 2"),
        (lambda: calibrate.search(abs, (0.9, 1.0), trials=1), "trials: expected an integer of at least 2, got 1"),
        (lambda: calibrate.search_weights(abs, dict, {}), "start: expected a finite number for each weight, got {}"),
        (lambda: calibrate.search_weights(abs, dict, {"s": math.inf}), "start: expected a finite number for each weight"),
        (lambda: calibrate.search_weights(abs, dict, {"s": 0.0}, step=0.0), "step: expected a number above 0, got 0.0"),
        (lambda: calibrate.search_weights(abs, dict, {"s": 0.0}, bounds={"b": (0, 1)}), r"bounds: expected some of \['s'\], got"),
        (lambda: calibrate.search_weights(abs, dict, {"s": 0.0}, bounds={"s": (1, 0)}), r"bounds: expected \(low, high\), low <"),
        (lambda: calibrate.search_weights(abs, dict, {"s": 0.0}, trials=True), "trials: expected an integer of at least 2, got"),
        (lambda: calibrate.search(lambda s: math.nan, (0.9, 1.1), trials=3), "score: expected .* at least one trial, got none"),
        (lambda: calibrate.learn(linear_model, SAMPLERS["ddim"], torch.sum, [1], SHAPE, form="cubic"), "form: expected one of"),
        (lambda: calibrate.learn(linear_model, SAMPLERS["ddim"], torch.sum, [1], SHAPE, rounds=1), "rounds, rate: expected"),
        (lambda: calibrate.learn(linear_model, SAMPLERS["ddim"], lambda x: x.sum() * math.inf, [1], SHAPE), "loss: expected a"),
        (lambda: learn(form=None), "form: expected one for lambda_t where there is no correction to learn, got None"),
        (lambda: learn(lambda s: samplers.ddim(COSINE, 4, scaling=s, correction=KINDS["dc"]), correction=corrections.dc(0.0)),
         "table: expected one without a correction, got ddim"),
        (lambda: learn(correction=corrections.dc([0.0] * 3)), "correction: expected 6 weights of the low band, one for"),
        (lambda: learn(lambda s: samplers.ddim(COSINE, 2, scaling=s), correction=corrections.frequency(0.01), rate=0.012),
         "low: expected factors above 0, got -"),
        (lambda: corrected_rows("dc", torch.zeros(3)), r"low: expected .*, shape \(\), got torch.float32 \(3,\)"),
        (lambda: corrected_rows("dc", 0.1), r"low: expected a tensor of float32 or float64, shape \(\), got 0.1"),
        (lambda: corrected_rows("dc", torch.zeros(()), torch.zeros(())), "high: expected None for 'dc'"),
        (lambda: corrected_rows("dcw", torch.zeros(())), "high: expected a tensor for 'dcw'"),
        (lambda: calibrate.match_norms(linear_model, SAMPLERS["ddim"], data(1)), "images: expected at least two, got 1"),
        (lambda: calibrate.match_norms(linear_model, SAMPLERS["ddim"], data(4), batch=0), "batch: expected an integer"),
        (lambda: calibrate.match_norms(linear_model, lambda s: SAMPLERS["ddim"](1.1), data(4)), "sampler: expected one that"),
        (lambda: calibrate.match_norms(lambda x, t: x * math.nan, SAMPLERS["ddim"], data(4)), "model: norms of eps at step 0"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- scalings in files ----


@pytest.mark.parametrize(
    "made",
    [
        scaling.constant(1.0173), scaling.linear(0.1, 1 / 3, origin="cleanest"),
        scaling.quadratic(1e-5, -0.1 / 3, 1.5, origin="noisiest"), scaling.exponential(-0.01, 1.02, origin="cleanest"),
        scaling.array([1.1, 1 / 3, 0.9], origin="noisiest"), epskernels.published("ADM", "CIFAR-10", 20, "linear"),
    ],
    ids=lambda s: s.spec["kind"],
)  # fmt: skip
def test_scaling_saved_and_loaded(made, tmp_path):
    made.save(tmp_path / "lambda.json", sampler="ddim", steps=3)
    loaded, notes = scaling.load(tmp_path / "lambda.json")
    np.testing.assert_array_equal(loaded.values(3), made.values(3))
    assert repr(loaded) == repr(made) and notes == {"sampler": "ddim", "steps": 3}


def test_a_formula_of_ones_own_cannot_be_saved(tmp_path):
    own = scaling.EpsilonScaling(lambda i: 1.0 + 0 * i, "cleanest", "mine")
    with pytest.raises(ValueError, match="expected one made by a function of epskernels.scaling"):
        own.save(tmp_path / "lambda.json")
    assert not (tmp_path / "lambda.json").exists()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"format": 2, "kind": "constant", "b": 1}', '{"format": 1, "kind": "cubic", "b": 1}',
     '{"format": 1, "kind": "constant", "b": -1}', '{"format": 1, "kind": "constant", "k": 1}'],
)  # fmt: skip
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "lambda.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"expected a scaling saved by EpsilonScaling.save, format 1, in .*lambda.json: "
    ):
        scaling.load(tmp_path / "lambda.json")
