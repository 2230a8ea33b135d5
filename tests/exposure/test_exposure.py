"""epskernels.exposure: against simulations whose errors are known, naive two-pass sums, and itself interrupted."""

import json
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
import torch

import epskernels
from epskernels import exposure, plots, samplers, schedule
from epskernels.bands import low_band

pytestmark = pytest.mark.usefixtures("one_thread")

COSINE, SHAPE = schedule.cosine(), (1, 5, 7)
KARRAS = schedule.KarrasSchedule(0.02, 20)
TABLES = {
    "ddpm": samplers.ddpm(COSINE, 8, clip=None),
    "ddpm-learned": samplers.ddpm(COSINE, 8, variance="learned_range", scaling=1.01),
    "ddim": samplers.ddim(COSINE, 8, eta=0.5),
    "ddim-unscaled-v": samplers.ddim(COSINE, 8, direction="unscaled", prediction="v_prediction", scaling=1.02),
    "edm_heun": samplers.edm_heun(KARRAS, 6, S_churn=2),
    "dpmpp_2m": samplers.dpmpp_2m(COSINE, 8, scaling=0.99, spacing="trailing"),
}


def point(t, table):
    """alpha and sigma of the row that calls the model with t."""
    i = int(np.flatnonzero(np.isclose(table["t"], float(t), rtol=1e-6))[0])
    return table["alpha_in"][i], table["sigma_in"][i], i


def wavy(x, t):
    """Any function; of two channels, for learned variance too."""
    level = t.reshape(-1, *[1] * (x.dim() - 1)).float()
    return torch.cat([torch.sin(3 * x) + 0.2 * x + 1e-4 * level, torch.cos(x)], 1)


def images(n, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def equal(a, b):
    assert a.rows.keys() == b.rows.keys() and (a.sampler, a.images, a.seed) == (b.sampler, b.images, b.seed)
    return all(np.array_equal(a.rows[name], b.rows[name], equal_nan=True) for name in a.rows)


# ---- bands ----


def pair_means(n):
    """(n, n): the mean of each pair at both of its elements; of a last one without partner, half of it."""
    pairs = np.arange(n) // 2
    return (pairs[:, None] == pairs) * 0.5


BANDS = [((6,), 1), ((7,), 1), ((1,), 1), ((3, 24), 1), ((2, 8, 6), 2), ((2, 5, 8), 2), ((3, 8, 7), 2), ((5, 7), 2),
         ((1, 1), 2), ((2, 3, 9, 33), 2)]  # fmt: skip


@pytest.mark.parametrize("shape, dims", BANDS, ids=str)
def test_low_band_is_a_product_of_pair_means(shape, dims):
    """P x along one dimension, P x P' along two; and in float32 the bits of its written order."""
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x.numpy() @ pair_means(shape[-1])
    if dims == 2:
        expected = pair_means(shape[-2]) @ expected
    found = low_band(x, dims)
    assert found.shape == x.shape and found.dtype == x.dtype
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14, atol=1e-15)

    x = x.float()
    found, padded = low_band(x, dims), np.zeros((*x.shape[:-dims], *(n + n % 2 for n in shape[-dims:])), np.float32)
    padded[tuple(slice(n) for n in x.shape)] = x.numpy()
    a = padded[..., 0::2] + padded[..., 1::2]
    a = a * np.float32(0.5) if dims == 1 else (a[..., 0::2, :] + a[..., 1::2, :]) * np.float32(0.25)
    assert found.dtype == torch.float32
    for index in np.ndindex(*x.shape):  # each element has its block's number
        assert found[index] == a[(*index[:-dims], *(i // 2 for i in index[-dims:]))]


@pytest.mark.parametrize("shape, dims", BANDS, ids=str)
def test_low_band_is_pywavelets(shape, dims):
    """The inverse transform of the transform's approximation, its details left out, cut to size."""
    pywt = pytest.importorskip(
        "pywt", reason="PyWavelets is not installed"
    )  # as where the GPU is, which runs this module too
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if dims == 1:
        expected = pywt.idwt(pywt.dwt(x.numpy(), "haar", mode="zero")[0], None, "haar", mode="zero")
    else:
        expected = pywt.idwt2((pywt.dwt2(x.numpy(), "haar", mode="zero")[0], (None,) * 3), "haar", mode="zero")
    cut = expected[tuple(slice(n) for n in x.shape)]
    np.testing.assert_allclose(low_band(x, dims).numpy(), cut, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    "x, dims, message",
    [(torch.ones(4, 4), 3, "dims: expected 1 or 2, got 3"), (torch.ones(4), 2, "x: expected floating point with 2"),
     (torch.ones(4, 4, dtype=torch.int64), 2, "x: expected .* got torch.int64")],
)  # fmt: skip
def test_low_band_refuses(x, dims, message):
    with pytest.raises(ValueError, match=message):
        low_band(x, dims)


# ---- errors that are known ----


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_closed_form_of_the_papers_error_model(variance):
    """x_theta = x_0 + e_t*(fresh noise), of one image: the variance of a step, and of every step down the chain."""
    table = samplers.ddpm(COSINE, 8, variance=variance, clip=None)
    image = images(1)[0]
    e = np.linspace(0.5, 0.1, 8)
    draw = torch.Generator().manual_seed(3)

    def model(x, t):
        alpha, sigma, i = point(t[0], table)
        x_theta = image + e[i] * torch.randn(x.shape, generator=draw)
        eps = (x - alpha * x_theta) / sigma
        return torch.cat([eps, torch.full_like(eps, 0.4)], 1) if variance == "learned_range" else eps

    found = exposure.measure(model, table, [image] * 4000, batch=1000, parts=("training", "chain"))
    count = 4000 * image.numel()
    s2 = np.exp(0.7 * table["logvar_max"] + 0.3 * table["logvar_min"])
    expected = table["c_x"] ** 2 * table["sigma_in"] ** 2 + table["c_noise"] ** 2 * s2 + (table["c_m0"] * e) ** 2
    if variance == "fixed_small":  # the paper's own formula
        beta = 1 - (table["alpha_in"] / table["alpha_out"]) ** 2
        written = table["alpha_out"] * beta / table["sigma_in"] ** 2 * e
        np.testing.assert_allclose(expected[:-1], (table["sigma_out"] ** 2 + written**2)[:-1], rtol=1e-9)
    np.testing.assert_allclose(exposure.closed_form(table, e, noise=s2), expected, rtol=1e-12)

    tolerance = 5 * np.sqrt(2 / count)  # of a variance, relative: five standard errors
    np.testing.assert_allclose(found.error, e, rtol=tolerance)
    assert np.abs(found.covariance).max() < 5 * 0.5 / np.sqrt(count)
    np.testing.assert_allclose(found.variance_single, expected, rtol=tolerance)
    np.testing.assert_allclose(found.variance_paper, expected, rtol=tolerance)
    np.testing.assert_allclose(found.std_single, np.sqrt(expected), rtol=tolerance)

    chain, v = [], table["sigma_in"][0] ** 2
    for i in range(8):
        v = table["c_x"][i] ** 2 * v + (table["c_m0"][i] * e[i]) ** 2 + table["c_noise"][i] ** 2 * s2[i]
        chain.append(v)
    np.testing.assert_allclose(found.std_chain, np.sqrt(chain), rtol=tolerance)
    np.testing.assert_allclose(found.delta_chain[:-1], (np.sqrt(chain) - table["sigma_out"])[:-1] ** 2, atol=0.01)


class Mixture:
    """Pixels of +-1 with a spread of 0.2: draws, and the exact E[x_0 | x]."""

    spread = 0.2

    def draw(self, n, shape, seed=0):
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (n, *shape), generator=draw) * 2.0 - 1
        return signs + self.spread * torch.randn(n, *shape, generator=draw)

    def denoise(self, x, alpha, sigma):
        variance = alpha**2 * self.spread**2 + sigma**2
        mean = torch.tanh(alpha * x / variance)  # of the signs, given x
        return mean + alpha * self.spread**2 / variance * (x - alpha * mean)

    def error(self, alpha, sigma):
        """E[(E[x_0 | x] - x_0)^2], by quadrature: E[x_0^2] less E[E[x_0 | x]^2]."""
        x = torch.linspace(-12, 12, 40001, dtype=torch.float64)
        variance = alpha**2 * self.spread**2 + sigma**2
        density = sum(torch.exp(-((x - alpha * s) ** 2) / (2 * variance)) for s in (-1, 1))
        density /= density.sum()
        return 1 + self.spread**2 - (density * self.denoise(x, alpha, sigma) ** 2).sum().item()


@pytest.mark.parametrize(
    "table",
    [
        samplers.ddpm(COSINE, 8, clip=None),
        samplers.ddim(COSINE, 8, scaling=1.05),
        samplers.ddim(COSINE, 8, direction="unscaled", scaling=1.05, eta=0.3),
        samplers.edm_euler(KARRAS, 8, scaling=0.97),
    ],
    ids=["ddpm", "ddim", "ddim-unscaled", "edm_euler"],
)
def test_closed_form_of_an_exact_denoiser_and_noise(table):
    """The measured covariance closes the form, and is the orthogonal error's; the paper's form leaves it out."""
    mixture, e, draw = Mixture(), 0.15, torch.Generator().manual_seed(4)

    def model(x, t):
        alpha, sigma, _ = point(t[0], table)
        x_theta = mixture.denoise(x, alpha, sigma) + e * torch.randn(x.shape, generator=draw)
        return x_theta if table["f_x0"][0] == 1 else (x - alpha * x_theta) / sigma

    data = mixture.draw(3000, (1, 4, 8))
    found = exposure.measure(model, table, data, batch=500, parts=("training",))
    count, lambda_t = data.numel(), table["lambda_t"]
    best = np.array([mixture.error(a, s) for a, s in zip(table["alpha_in"], table["sigma_in"], strict=True)])
    alpha, ratio = table["alpha_in"], table["sigma_in"] / table["alpha_in"]
    # m0 - x_0 = raw/lambda + (1 - 1/lambda)*ratio*eps, and the raw error has covariance alpha*best/sigma with eps.
    gain = (1 - 1 / lambda_t) * ratio
    covariance = best / ratio / lambda_t + gain
    error = np.sqrt((best + e**2) / lambda_t**2 + 2 * gain * best / ratio / lambda_t + gain**2)
    tolerance = 6 * np.sqrt(2 / count)
    np.testing.assert_allclose(found.error, error, rtol=tolerance)
    np.testing.assert_allclose(found.covariance, covariance, atol=6 * error.max() / np.sqrt(count))
    np.testing.assert_allclose(found.variance_single, found.variance_closed, rtol=3 * tolerance, atol=1e-5)
    expected = exposure.closed_form(table, error, covariance)
    np.testing.assert_allclose(found.variance_single, expected, rtol=3 * tolerance, atol=1e-5)
    middle = slice(2, 6)
    assert (expected[middle] > 1.02 * exposure.closed_form(table, error)[middle]).all()
    assert alpha.min() > 0


@pytest.mark.parametrize(
    "table",
    [
        samplers.ddpm(COSINE, 8, scaling=1.1), samplers.ddim(COSINE, 8, scaling=0.9, eta=0.7),
        samplers.ddim(COSINE, 8, direction="unscaled", scaling=1.1),
        samplers.ddim(COSINE, 8, direction="unscaled", prediction="v_prediction", scaling=0.9, eta=0.5),
        samplers.edm_euler(KARRAS, 8, scaling=1.1, S_churn=1),
    ],
    ids=["ddpm", "ddim", "ddim-unscaled", "ddim-unscaled-v", "edm_euler"],
)  # fmt: skip
def test_closed_form_is_exact(table):
    """An error of x_0 that is part of eps and part fresh noise w: the row applied to the coefficients of eps and of w."""
    c = {name: table[name] for name in ("d_x", "d_f", "c_x", "c_f", "c_m0", "c_noise", "f_x0", "f_eps")}
    alpha, sigma, of_eps, of_w = table["alpha_in"], table["sigma_in"], 0.3, 0.2
    error_to_f = -(alpha * c["f_eps"] - sigma * c["f_x0"]) / sigma
    f = c["f_eps"] + error_to_f * of_eps, error_to_f * of_w
    m0 = c["d_x"] * sigma + c["d_f"] * f[0], c["d_f"] * f[1]
    x = c["c_x"] * sigma + c["c_f"] * f[0] + c["c_m0"] * m0[0], c["c_f"] * f[1] + c["c_m0"] * m0[1]
    expected = x[0] ** 2 + x[1] ** 2 + c["c_noise"] ** 2
    np.testing.assert_allclose(exposure.closed_form(table, np.hypot(*m0), m0[0]), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["edm_heun", "dpmpp_2m"])
def test_no_closed_form_where_history_is_read(name):
    table = TABLES[name]
    reads = table["c_m1"] != 0
    assert reads.any() and np.array_equal(np.isnan(exposure.closed_form(table, np.full(len(table), 0.1))), reads)


# ---- the sums ----


@pytest.mark.parametrize("name", TABLES)
def test_naive_two_pass(name):
    """All numbers from arrays that are kept whole; the samples' norms from sample() itself."""
    table, data = TABLES[name], images(11)
    found = exposure.measure(wavy_for(table), table, data, seed=5, batch=4)
    seeds = torch.arange(5, 16)
    eps = epskernels.normal(seeds, SHAPE, stream=exposure.STREAM_DATA)

    def epsilon(x, f, i):
        alpha, sigma = table["alpha_in"][i], table["sigma_in"][i]
        raw = f[:, :1].double().numpy()
        f_x0, f_eps = table["f_x0"][i], table["f_eps"][i]
        return (alpha * raw - f_x0 * x.double().numpy()) / (alpha * f_eps - sigma * f_x0)

    def norms(e):
        each = np.sqrt((e.reshape(len(e), -1) ** 2).sum(1))
        return each.mean(), each.std(ddof=1) / np.sqrt(len(each))

    def check_bands(part, i, x, e):
        """By the matrices of pair means, the state and eps alike."""
        for what, values in (("state", x.double().numpy()), ("noise", e)):
            low = pair_means(SHAPE[1]) @ values @ pair_means(SHAPE[2])
            for band, each in (("low", low), ("high", values - low)):
                mean, se = norms(each)
                assert getattr(found, f"{what}_{band}_{part}")[i] == pytest.approx(mean, rel=3e-6)
                assert getattr(found, f"{what}_{band}_{part}_se")[i] == pytest.approx(se, rel=1e-4)

    seen = []

    def spy(x, t):
        seen.append((x, wavy_for(table)(x, t)))
        return seen[-1][1]

    def walk(x):
        """By the public step."""
        m1 = None
        for i in range(len(table)):
            t = torch.full((11,), table["t"][i], dtype=torch.int64 if table.discrete else torch.float32)
            f = wavy_for(table)(x, t)
            inputs = {"v": f[:, 1:] if table.learned_variance else None, "m1": m1, "seeds": seeds}
            x_next, m0 = epskernels.step(x, f[:, :1].contiguous(), table, i, **inputs, return_m0=True)
            yield i, x, f, m0, x_next
            m1, x = m0, x_next

    epskernels.sample(spy, table, seeds, SHAPE)
    sampled = [norms(epsilon(x, f, i) / table["lambda_t"][i]) for i, (x, f) in enumerate(seen)]
    np.testing.assert_allclose(found.norm_samples, [mean for mean, _ in sampled], rtol=1e-6)
    np.testing.assert_allclose(found.norm_samples_se, [se for _, se in sampled], rtol=1e-5)

    for i, (x, f) in enumerate(seen):
        check_bands("samples", i, x, epsilon(x, f, i) / table["lambda_t"][i])

    for i, x, f, _, x_next in walk(table["alpha_in"][0] * data + table["sigma_in"][0] * eps):
        check_bands("chain", i, x, epsilon(x, f, i) / table["lambda_t"][i])
        assert found.norm_chain[i] == pytest.approx(norms(epsilon(x, f, i) / table["lambda_t"][i])[0], rel=1e-6)
        residual = x_next.double().numpy() - table["alpha_out"][i] * data.double().numpy()
        assert found.std_chain[i] == pytest.approx(residual.std(0, ddof=1).mean(), rel=1e-12)

    m1 = None
    for i in range(len(table)):
        x = table["alpha_in"][i] * data + table["sigma_in"][i] * eps
        t = torch.full((11,), table["t"][i], dtype=torch.int64 if table.discrete else torch.float32)
        f = wavy_for(table)(x, t)
        inputs = {"v": f[:, 1:] if table.learned_variance else None, "m1": m1, "seeds": seeds}
        x_next, m1 = epskernels.step(x, f[:, :1].contiguous(), table, i, **inputs, return_m0=True)
        error = (m1 - data).double().numpy()
        check_bands("training", i, x, epsilon(x, f, i))
        assert found.norm_training[i] == pytest.approx(norms(epsilon(x, f, i))[0], rel=1e-6)
        assert found.error[i] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)
        assert found.error_std[i] == pytest.approx(np.sqrt(error.var(0, ddof=1).mean()), rel=1e-9)
        assert found.covariance[i] == pytest.approx((error * eps.double().numpy()).mean(), rel=1e-5, abs=1e-7)
        residual = x_next.double().numpy() - table["alpha_out"][i] * data.double().numpy()
        assert found.variance_single[i] == pytest.approx(residual.var(0, ddof=1).mean(), rel=1e-9)
        assert found.std_single[i] == pytest.approx(residual.std(0, ddof=1).mean(), rel=1e-9)
    np.testing.assert_array_equal(found.norm_gap, found.norm_samples / found.norm_training)
    np.testing.assert_array_equal(found.state_gap_low, found.state_low_samples / found.state_low_training)
    np.testing.assert_array_equal(found.noise_gap_high, found.noise_high_samples / found.noise_high_training)
    relative = [
        getattr(found, f"noise_low_{part}_se") / getattr(found, f"noise_low_{part}") for part in ("samples", "training")
    ]
    np.testing.assert_allclose(found.noise_gap_low_se, found.noise_gap_low * np.hypot(*relative), rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (3, 1, 7), (2, 3, 4, 7)], ids=str)
def test_bands_are_of_the_last_two_dimensions_or_the_last(shape):
    """An eps model that answers x: its bands are the state's, and the first state is noise from the seeds."""
    table = samplers.ddim(COSINE, 3, scaling=1.25)
    found = exposure.measure(lambda x, t: x, table, torch.randn(6, *shape), seed=2, batch=4)
    x = (table.initial_sigma * epskernels.normal(range(2, 8), shape)).double().numpy()
    low = x @ pair_means(shape[-1])
    if len(shape) > 2:
        low = pair_means(shape[-2]) @ low
    for band, values in (("low", low), ("high", x - low)):
        norm = np.sqrt((values.reshape(6, -1) ** 2).sum(1)).mean()
        assert getattr(found, f"state_{band}_samples")[0] == pytest.approx(norm, rel=1e-6)
        for part, lambda_t in (("samples", 1.25), ("chain", 1.25), ("training", 1.0)):
            state = getattr(found, f"state_{band}_{part}")
            np.testing.assert_allclose(getattr(found, f"noise_{band}_{part}"), state / lambda_t, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (5, 1), (5, 1, 1)], ids=str)
def test_one_element_has_no_bands(shape):
    found = exposure.measure(lambda x, t: x, samplers.ddim(COSINE, 3), torch.randn(6, *shape))
    assert np.isfinite(found.norm_gap).all()
    assert all(
        np.isnan(getattr(found, f"{what}_gap_{band}")).all() for what in ("state", "noise") for band in ("low", "high")
    )


def test_norms_with_guidance_of_some_channels():
    """As DiT's rows guide them, for eps and for v alike: by hand for the first two channels of three."""
    model, data = lambda x, t: (0.5 * x, 0.25 * x), torch.randn(5, 3, 4, 4)  # noqa: E731
    by_hand = torch.tensor([1.0, 1.0, 0.5]).reshape(3, 1, 1)
    for prediction in ("epsilon", "v_prediction"):
        options = {"variance": "fixed_small", "clip": None, "prediction": prediction}
        table = samplers.dit(3, guidance=3.0, guided_channels=2, **options)
        assert (table["guided_channels"] == 2).all()
        expected = exposure.measure(lambda x, t: by_hand * x, samplers.ddpm(schedule.linear(), "3", **options), data)
        found = exposure.measure(model, table, data)
        for name in ("norm", *exposure.BANDS):
            for part in exposure.PARTS:
                one, other = (getattr(each, f"{name}_{part}") for each in (found, expected))
                np.testing.assert_allclose(one, other, rtol=2e-5, err_msg=f"{name}_{part}")


def test_a_second_state_is_carried_down_the_chain():
    """UniPC: samples and chain as sample() makes them; one step from an exact state is not defined, its m0 is."""
    table, data = samplers.unipc(COSINE, 6, spacing="trailing"), images(9)
    found = exposure.measure(wavy_for(table), table, data, batch=4)
    assert table.second_state and np.isnan(found.std_single).all() and np.isfinite(found.error).all()
    eps = epskernels.normal(range(9), SHAPE, stream=exposure.STREAM_DATA)
    start, states = table["alpha_in"][0] * data + table["sigma_in"][0] * eps, []
    keep = lambda i, x, m0: states.append(x.double().numpy().copy())  # noqa: E731
    epskernels.sample(wavy_for(table), table, range(9), SHAPE, start=start, callback=keep)
    for i, x in enumerate(states):
        residual = x - table["alpha_out"][i] * data.double().numpy()
        assert found.std_chain[i] == pytest.approx(residual.std(0, ddof=1).mean(), rel=1e-9)


def test_a_table_that_keeps_eps():
    """One model call in all ways, by x_0 or by eps: the same statistics."""
    ours, plain = (
        exposure.measure(wavy, sampler(schedule.linear(), 6, scaling=1.01, **options), images(6))
        for sampler, options in ((samplers.lms, {"order": 1}), (samplers.ddim, {}))
    )
    for name, expected in plain.rows.items():
        np.testing.assert_allclose(ours.rows[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


def wavy_for(table):
    return wavy if table.learned_variance else lambda x, t: wavy(x, t)[:, :1].contiguous()


def test_guided_norm_is_of_the_guided_output():
    table = samplers.ddim(COSINE, 3, guidance=3.0)
    model = lambda x, t: (0.5 * x, 0.25 * x)  # noqa: E731
    guided = exposure.measure(model, table, images(6))
    alone = exposure.measure(lambda x, t: x, samplers.ddim(COSINE, 3), images(6))
    np.testing.assert_allclose(guided.norm_training, alone.norm_training, rtol=1e-6)
    np.testing.assert_allclose(guided.norm_samples, alone.norm_samples, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("name", TABLES)
def test_batch_size_changes_the_rounding_only(name, batch):
    table = TABLES[name]
    one, other = (exposure.measure(wavy_for(table), table, images(10), batch=b) for b in (7, batch))
    for key in one.rows:
        np.testing.assert_allclose(other.rows[key], one.rows[key], rtol=1e-12, atol=1e-15, err_msg=key)


def test_any_iterable_and_labels():
    table, data = TABLES["ddim"], images(5)
    whole = exposure.measure(wavy_for(table), table, data, batch=2)
    labelled = [(image.numpy(), 7) for image in data]
    assert equal(whole, exposure.measure(wavy_for(table), table, iter(labelled), batch=2))


@pytest.mark.parametrize("labels", [False, True])
def test_a_dataloader_of_batches(labels):
    """Its batches are taken apart: the numbers are those of the images, whatever its batch."""
    table, given = TABLES["ddim"], images(7)
    dataset = torch.utils.data.TensorDataset(given, torch.arange(7)) if labels else given
    expected = exposure.measure(wavy_for(table), table, given, batch=4)
    for size in (2, 3, 7, 100, None):
        loader = torch.utils.data.DataLoader(dataset, batch_size=size)
        assert equal(exposure.measure(wavy_for(table), table, loader, batch=4, progress=size == 3), expected)


@pytest.mark.parametrize(
    "wrong", [{"image": torch.zeros(1, 2, 2)}, "an image", None, []], ids=lambda value: type(value).__name__
)
def test_what_is_no_image_is_named(wrong):
    with pytest.raises(ValueError, match="images: expected"):
        exposure.measure(wavy_for(TABLES["ddim"]), TABLES["ddim"], [wrong, wrong])


def test_parts_that_were_not_asked_for_are_nan():
    found = exposure.measure(wavy_for(TABLES["ddim"]), TABLES["ddim"], images(4), parts=("chain", "training"))
    assert np.isnan(found.norm_samples).all() and np.isnan(found.state_low_samples_se).all()
    np.testing.assert_array_equal(found.state_gap_high, found.state_high_chain / found.state_high_training)
    np.testing.assert_array_equal(found.norm_gap, found.norm_chain / found.norm_training)
    found = exposure.measure(wavy_for(TABLES["ddim"]), TABLES["ddim"], images(4), parts=("samples",))
    assert np.isnan(found.error).all() and np.isnan(found.std_chain).all() and np.isfinite(found.norm_samples).all()


# ---- interruption ----


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", TABLES)
def test_resumed_is_uninterrupted_bit_for_bit(name, tmp_path):
    table, data, state = TABLES[name], images(23), tmp_path / "state.npz"
    whole = exposure.measure(wavy_for(table), table, data, batch=4)
    calls = [0]

    def stops(x, t):
        calls[0] += 1
        if calls[0] > 3 * 3 * len(table) + 5:  # inside the fourth batch
            raise Interrupted
        return wavy_for(table)(x, t)

    with pytest.raises(Interrupted):
        exposure.measure(stops, table, data, batch=4, state=state, save_every=0)
    calls[0] = 0

    def counts(x, t):
        calls[0] += 1
        return wavy_for(table)(x, t)

    assert equal(whole, exposure.measure(counts, table, data, batch=4, state=state, save_every=0))
    assert calls[0] == 3 * 3 * len(table)  # three of six batches
    more = images(30)
    more[:23] = data
    calls[0] = 0
    grown = exposure.measure(counts, table, more, batch=4, state=state)
    assert equal(grown, exposure.measure(wavy_for(table), table, more, batch=4)) and calls[0] == 3 * 3 * len(table)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch": 2}, "batch was 4, is 2"),
        ({"key": "another"}, "key was '', is 'another'"),
        ({"table": TABLES["ddpm"]}, "sampler was"),
        ({"images": images(8, seed=1)}, "was begun with others"),
        ({"images": images(3)}, "begun with others|at least the 8"),
        ({"images": images(8)[:4]}, "at least the 8"),
    ],
    ids=["seed", "batch", "key", "table", "images", "part of a batch", "fewer images"],
)
def test_state_of_something_else_is_refused(changes, message, tmp_path):
    arguments = {"model": wavy_for(TABLES["ddim"]), "table": TABLES["ddim"], "images": images(8), "batch": 4}
    exposure.measure(**arguments, state=tmp_path / "state.npz")
    before = (tmp_path / "state.npz").read_bytes()
    with pytest.raises(ValueError, match=message):
        exposure.measure(**arguments | changes, state=tmp_path / "state.npz")
    assert (tmp_path / "state.npz").read_bytes() == before


@pytest.mark.parametrize("kind", ["truncated", "empty", "another archive", "an array", "lacking", "of other dtypes",
                                  "settings of another type"])  # fmt: skip
def test_a_damaged_state_is_refused(kind, tmp_path):
    state = tmp_path / "state.npz"
    arguments = {
        "model": wavy_for(TABLES["ddim"]),
        "table": TABLES["ddim"],
        "images": images(8),
        "batch": 4,
        "state": state,
    }
    exposure.measure(**arguments)
    whole, arrays = state.read_bytes(), dict(np.load(state))
    if kind == "another archive":
        np.savez(state, images=np.ones(3))
    elif kind == "lacking":
        np.savez(state, **{name: array for name, array in arrays.items() if name != "pixels_chain_mean"})
    elif kind == "an array":
        np.save(state.open("wb"), np.ones(3))
    elif kind == "of other dtypes":
        np.savez(state, **arrays | {"images": np.float64(8.5)})
    elif kind == "settings of another type":
        np.savez(state, **arrays | {"settings": "[]"})
    else:
        state.write_bytes(whole[: len(whole) // 2] if kind == "truncated" else b"")
    with pytest.raises(ValueError, match="^state: .*damaged"):
        exposure.measure(**arguments)


# ---- the result ----


@pytest.mark.parametrize("parts", [exposure.PARTS, ("training", "samples"), ("training",), ("samples",)], ids="-".join)
def test_its_text_is_a_line(parts):
    found = exposure.measure(wavy_for(TABLES["ddim"]), TABLES["ddim"], images(4), parts=parts)
    said = repr(found)
    assert said.startswith(f"Exposure({TABLES['ddim'].name}, 4 images") and said.endswith(")") and len(said) < 100
    gap = f"norm gap {found.norm_gap.min():.4g} to {found.norm_gap.max():.4g}"
    assert (gap in said) == ({"training", "samples"} <= set(parts)) and "nan" not in said
    assert (f"delta_t at the end {found.delta_chain[-1]:.2g}" in said) == ("chain" in parts)


def test_saved_and_loaded(tmp_path):
    found = exposure.measure(wavy_for(TABLES["edm_heun"]), TABLES["edm_heun"], images(4), seed=9)
    found.save(tmp_path / "exposure.json")
    assert equal(found, exposure.Exposure.load(tmp_path / "exposure.json"))
    saved = json.loads((tmp_path / "exposure.json").read_text())
    assert saved["rows"]["variance_paper"][1] is None  # Heun's second row: plain JSON has no NaN
    saved["format"] = 99
    (tmp_path / "exposure.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="expected an Exposure of format"):
        exposure.Exposure.load(tmp_path / "exposure.json")


def test_a_file_from_before_the_bands(tmp_path):
    """It loads, its bands are NaN, and they cannot be drawn."""
    found = exposure.measure(wavy_for(TABLES["ddim"]), TABLES["ddim"], images(4))
    found.save(tmp_path / "exposure.json")
    saved = json.loads((tmp_path / "exposure.json").read_text())
    saved["rows"] = {name: values for name, values in saved["rows"].items() if not name.startswith(exposure.BANDS)}
    assert len(saved["rows"]) == len(found.rows) - 24
    (tmp_path / "exposure.json").write_text(json.dumps(saved))
    old = exposure.Exposure.load(tmp_path / "exposure.json")
    np.testing.assert_array_equal(old.norm_gap, found.norm_gap)
    np.testing.assert_array_equal(old.norm_gap_se, found.norm_gap_se)
    for name in ("state_gap_low", "state_gap_high_se", "noise_gap_low", "noise_gap_high_se", "noise_low_chain"):
        assert np.isnan(getattr(old, name)).all() and getattr(old, name).shape == (8,)
    old.plot(tmp_path / "old.svg")
    with pytest.raises(ValueError, match="bands: expected an Exposure that has them"):
        old.plot_bands(tmp_path / "bands.svg")
    assert not (tmp_path / "bands.svg").exists()


def test_a_state_from_before_the_bands_is_refused(tmp_path):
    arguments = {"model": wavy_for(TABLES["ddim"]), "table": TABLES["ddim"], "images": images(8), "batch": 4}
    state = tmp_path / "state.npz"
    exposure.measure(**arguments, state=state)
    arrays = dict(np.load(state))
    settings = json.loads(str(arrays["settings"])) | {"format": 1}
    np.savez(state, **arrays | {"settings": json.dumps(settings)})
    with pytest.raises(ValueError, match=f"^state: {state} was begun with other settings: format was 1, is 2$"):
        exposure.measure(**arguments, state=state)


def test_infinities_are_saved_as_plain_json(tmp_path):
    found = exposure.measure(lambda x, t: x * 1e30, TABLES["ddim"], images(4), parts=("training", "chain"))
    assert np.isinf(found.std_chain).any() or np.isinf(found.norm_chain).any()
    found.save(tmp_path / "exposure.json")
    json.loads((tmp_path / "exposure.json").read_text(), parse_constant=pytest.fail)
    assert equal(found, exposure.Exposure.load(tmp_path / "exposure.json"))
    found.plot(tmp_path / "exposure.png")


@pytest.mark.parametrize(
    "ratio, error, said",
    [
        ([1.01, 0.9, 1.04], 0.0, "up to 10 % smaller than in training"),
        ([1.01, 0.9, 1.04], [0.001, 0.1, 0.001], "up to 4 % larger than in training"),
        ([1.01, np.nan, 1.04], [0.01, 0.01, np.nan], "up to 4 % larger than in training"),
        ([1.01, 0.99], [0.01, 0.01], "as in training"),
        ([np.nan, np.nan], [np.nan, np.nan], "not measured"),
        ([1.0, np.inf], 0.0, "as in training"),
    ],
)
def test_what_a_title_says_of_a_gap(ratio, error, said):
    assert plots.largest_gap(ratio, error) == said


def test_titles_say_what_was_found(tmp_path):
    found = exposure.measure(wavy_for(TABLES["ddpm"]), TABLES["ddpm"], images(4))
    found.plot(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert f">Predicted noise: {plots.largest_gap(found.norm_gap, found.norm_gap_se)}<" in text
    assert f">Variance error: {found.delta_chain[-1]:.2g} at the end of the chain<" in text


def test_an_svg_is_small_and_shows_what_matplotlib_draws(tmp_path):
    """The same elements at the same places with the same styles and letters, to a twentieth of a point."""
    figure, (axis,) = plots.figures(1)
    x = np.linspace(0, 1, 30)
    axis.plot(x, 1e-4 * x**2, "--", marker="o", label="a & b < c")
    axis.fill_between(x, -1e-4 * x, x * 1e-4, alpha=0.2)
    axis.set(title="two\nlines: 1.23456 % of 0.000123", ylabel="sigma_t")
    plots.finish(axis)
    with matplotlib.rc_context(plots._LETTERS):
        figure.savefig(tmp_path / "theirs.svg", metadata={"Date": None})
    plots.save_figure(figure, tmp_path / "ours.svg")
    theirs, ours = (tmp_path / f"{name}.svg" for name in ("theirs", "ours"))
    assert ours.stat().st_size < 0.6 * theirs.stat().st_size
    drawn = [list(_drawn(path)) for path in (theirs, ours)]
    assert len(drawn[0]) == len(drawn[1]) > 50 and sum(kind == "text" for kind, *_ in drawn[1]) > 10
    for (kind, said, look, places), (kind_, said_, look_, places_) in zip(*drawn, strict=True):
        assert (kind, said, look) == (kind_, said_, look_)
        assert np.allclose(places, places_, atol=0.051, rtol=0)


def _drawn(path):
    """(kind, letters, style, numbers) of each element that is seen."""
    root = xml.etree.ElementTree.parse(path).getroot()
    rules = dict(re.findall(r"\.\w+ \.(s\d+)\{(.*?)\}", path.read_text()))
    for element in root.iter():
        kind = element.tag.rpartition("}")[2]
        if kind not in ("path", "use", "text", "rect"):
            continue
        look = element.get("style") or rules.get(element.get("class"), "")
        shape = re.sub(
            r"rotate\(-0 .*?\)", "", " ".join(element.get(name, "") for name in ("d", "x", "y", "transform"))
        )
        numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:e-\d+)?", shape)]
        yield (
            kind,
            element.text and element.text.strip(),
            [re.sub(r"\s+", " ", look), re.sub(r"[^A-Za-z]", "", shape)],
            numbers,
        )


@pytest.mark.parametrize("suffix", [pytest.param("png", marks=pytest.mark.deep), "svg"])
def test_plot(suffix, tmp_path):
    found = exposure.measure(wavy_for(TABLES["ddpm"]), TABLES["ddpm"], images(4), progress=True)
    for draw, axes in ((found.plot, 3), (found.plot_bands, 2)):
        draw(tmp_path / f"exposure.{suffix}")
        drawn = (tmp_path / f"exposure.{suffix}").read_bytes()
        assert drawn.startswith(b"\x89PNG") if suffix == "png" else drawn.count(b'id="axes_') == axes
        draw(tmp_path / f"again.{suffix}")  # the same bytes: no date, no random names
        assert (tmp_path / f"again.{suffix}").read_bytes() == drawn
        (tmp_path / f"again.{suffix}").unlink()
    found.plot(tmp_path / "without")
    assert (tmp_path / "without.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'nope' is not supported"):
        found.plot(tmp_path / "exposure.nope")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"exposure.{suffix}", "without.png"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"table": epskernels.concat([TABLES["ddim"], TABLES["ddpm"]])}, "table: expected one sampler's, got 2"),
        ({"parts": ("train",)}, r"parts: expected some of .*got \('train',\)"),
        ({"parts": ()}, "parts: expected some of"),
        ({"batch": 0}, "batch: expected an integer of at least 1, got 0"),
        ({"images": images(1)}, "images: expected at least two, got 1"),
        ({"images": []}, "images: expected at least two, got 0"),
        (
            {"images": torch.zeros(4, *SHAPE, dtype=torch.uint8)},
            "images: expected floating point images, got torch.uint8",
        ),
        ({"images": [torch.zeros(1, 2, 2), torch.zeros(1, 3, 3)]}, "images: expected one shape"),
        ({"images": [torch.zeros(1, 2, 2)] * 2 + [torch.zeros(1, 3, 3)], "batch": 2}, "images: expected shape"),
    ],
)
def test_refused(changes, message):
    arguments = {"model": wavy_for(TABLES["ddim"]), "table": TABLES["ddim"], "images": images(4)} | changes
    with pytest.raises(ValueError, match=message):
        exposure.measure(**arguments)


def test_unknown_row_is_named():
    found = exposure.measure(wavy_for(TABLES["ddim"]), TABLES["ddim"], images(2))
    with pytest.raises(AttributeError, match="no 'norm'"):
        found.norm  # noqa: B018


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"format": 9}', '{"format": 1, "rows": []}', '{"format": 1, "rows": {"t": [1, "x"]}}',
             '{"format": 1, "rows": {"t": [1], "error": [1, 2]}, "sampler": "", "images": 1, "seed": 0}',
             '{"format": 1, "rows": {"t": [1]}}'],
)  # fmt: skip
def test_a_damaged_exposure_is_refused(text, tmp_path):
    (tmp_path / "exposure.json").write_text(text)
    with pytest.raises(ValueError, match=f"expected an Exposure of format 1 in {tmp_path}/exposure.json: "):
        exposure.Exposure.load(tmp_path / "exposure.json")


def test_a_state_that_cannot_be_written_is_said_before_the_work(tmp_path):
    def model(x, t):
        raise AssertionError("the work has begun")

    for path in (tmp_path / ("x" * 250 + ".npz"), tmp_path):
        with pytest.raises(OSError, match=str(path)):
            exposure.measure(model, TABLES["ddim"], images(4), state=path)
