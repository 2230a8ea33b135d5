"""lambda_t: each schedule's values and direction; every published setting against the paper's tables, typed anew."""

import copy
import dataclasses
import itertools
import json
import math
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch

import epskernels
from epskernels import diffusers as fused
from epskernels import published, samplers, scaling, schedule
from epskernels.published_settings import SETTINGS, published_setting

STEPS = [1, 2, 7, 100]


# ---- values and direction ----

# i counts from the origin; each is made with that origin.
FORMULAS = {
    "linear": (lambda origin: scaling.linear(0.002, 1.001, origin=origin), lambda i: 0.002 * i + 1.001),
    "quadratic": (
        lambda origin: scaling.quadratic(1e-5, -2e-4, 1.01, origin=origin),
        lambda i: 1e-5 * i**2 - 2e-4 * i + 1.01,
    ),
    "exponential": (lambda origin: scaling.exponential(-0.01, 1.02, origin=origin), lambda i: 1.02 * np.exp(-0.01 * i)),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("origin", ["cleanest", "noisiest"])
@pytest.mark.parametrize("name", FORMULAS)
def test_values(name, origin, steps):
    """values() lists the noisiest step first; i = 0 is its first entry or its last."""
    make, formula = FORMULAS[name]
    got = make(origin).values(steps)
    expected = [formula(i if origin == "noisiest" else steps - 1 - i) for i in range(steps)]
    assert got.dtype == np.float64 and got.shape == (steps,)
    np.testing.assert_allclose(got, expected, rtol=1e-15)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("b", [1.0, 1.0005, 0.9985, 1.017])
def test_constant_values(b, steps):
    assert scaling.constant(b).values(steps).tolist() == [b] * steps
    assert scaling.as_scaling(b).values(steps).tolist() == [b] * steps


@pytest.mark.parametrize("origin, expected", [("cleanest", [3.0, 2.0, 1.0]), ("noisiest", [1.0, 2.0, 3.0])])
def test_array_values(origin, expected):
    given = np.array([1.0, 2.0, 3.0])
    s = scaling.array(given, origin=origin)
    given[:] = 9
    assert s.values(3).tolist() == expected
    for steps in (1, 2, 4):
        with pytest.raises(ValueError, match=f"one value for each of {steps} steps, got 3"):
            s.values(steps)


def test_values_are_the_callers_own():
    for s in (scaling.constant(1.01), scaling.array([1.0, 2.0], origin="noisiest")):
        first = s.values(2)
        first[:] = 5
        assert (s.values(2) != 5).all()


@pytest.mark.parametrize("make", [scaling.linear, scaling.quadratic, scaling.exponential, scaling.array])
def test_origin_must_be_said(make):
    arguments = {scaling.linear: (0.1, 1.0), scaling.quadratic: (0.1, 0.1, 1.0), scaling.exponential: (0.1, 1.0)}
    with pytest.raises(TypeError, match="origin"):
        make(*arguments.get(make, ([1.0],)))


@pytest.mark.parametrize("origin, cleanest", [("cleanest", 1.0), ("noisiest", 1.19)])
def test_direction_in_a_table(origin, cleanest):
    """The last row of a table is the cleanest step, timestep 0."""
    table = samplers.ddim(schedule.linear(), 20, scaling=scaling.linear(0.01, 1.0, origin=origin))
    assert table["t"][-1] == 0 and table["lambda_t"][-1] == pytest.approx(cleanest, rel=1e-15)
    assert table["lambda_t"][0] == pytest.approx(2.19 - cleanest, rel=1e-15)


def test_lambda_divides():
    """d_f = -sigma/(alpha*lambda): lambda above 1 shrinks the predicted noise; d_x stays 1/alpha."""
    plain, scaled = samplers.ddim(schedule.linear(), 10), samplers.ddim(schedule.linear(), 10, scaling=1.25)
    np.testing.assert_allclose(scaled["d_f"], plain["d_f"] / 1.25, rtol=1e-15)
    np.testing.assert_allclose(scaled["d_x"], plain["d_x"], rtol=1e-12)


def test_scaling_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scaling.constant(1.0).origin = "cleanest"


def test_repr_says_what_and_whence():
    assert repr(scaling.constant(1.005)) == "EpsilonScaling(constant 1.005)"
    assert repr(scaling.linear(0.002, 1.0, origin="cleanest")) == "EpsilonScaling(linear k=0.002 b=1 from the cleanest)"
    assert repr(scaling.array([1.0, 1.1], origin="noisiest")) == "EpsilonScaling(array of 2 from the noisiest)"
    edm = published("EDM", "CIFAR-10", 21)
    assert repr(edm) == "EpsilonScaling(constant 0.9985, published for EDM, CIFAR-10, 21, heun)"


# ---- the published settings (arXiv 2308.15321), cells as the paper prints them: baseline / scaled (b) ----

ADM_DATASETS = ["CIFAR-10", "LSUN tower 64", "FFHQ 128", "ImageNet 64", "ImageNet 128"]
ADM = {
    100: "3.37 / 2.17 (1.017) | 3.59 / 2.91 (1.006) | 14.52 / 6.77 (1.005) | 2.71 / 2.39 (1.006) | 3.55 / 3.37 (1.004)",
    50: "4.43 / 2.49 (1.017) | 7.28 / 3.68 (1.007) | 26.15 / 9.50 (1.007) | 3.75 / 3.07 (1.006) | 5.15 / 4.33 (1.004)",
    20: "10.36 / 5.15 (1.017) | 23.92 / 8.22 (1.011) | 59.35 / 26.14 (1.008) | 10.96 / 7.52 (1.006)"
    " | 12.48 / 9.95 (1.005)",
}
# Scaled FID (k, b), 20 steps, i = 0 the cleanest.
ADM_LINEAR = (
    "4.31 (.0025, 1.0) | 7.60 (.0008, 1.0034) | 24.83 (.0004, 1.0042) | 7.37 (.0002, 1.0041) | 9.86 (.00022, 1.00291)"
)
EDM_COLUMNS = list(itertools.product(["CIFAR-10", "CIFAR-10 conditional"], ["heun", "euler"]))
EDM = {
    35: "1.97 / 1.95 (1.0005) | 3.81 / 2.80 (1.0034) | 1.82 / 1.80 (1.0006) | 3.74 / 2.59 (1.0035)",
    21: "2.33 / 2.24 (0.9985) | 6.29 / 4.32 (1.0043) | 2.17 / 2.08 (0.9983) | 5.91 / 3.74 (1.0045)",
    13: "7.16 / 6.54 (1.0060) | 12.28 / 8.39 (1.0048) | 6.69 / 6.16 (1.0070) | 10.66 / 6.59 (1.0051)",
}


def cells(row):
    return [[float(number) for number in re.findall(r"\d*\.\d+", cell)] for cell in row.split("|")]


UNIFORM = {("DDIM", "CelebA", 100, "uniform"): (None, None, 1.0012)}
for steps, row in ADM.items():
    UNIFORM |= {("ADM", data, steps, "uniform"): tuple(c) for data, c in zip(ADM_DATASETS, cells(row), strict=True)}
for nfe, row in EDM.items():
    UNIFORM |= {("EDM", data, nfe, kind): tuple(c) for (data, kind), c in zip(EDM_COLUMNS, cells(row), strict=True)}
LINEAR = {
    ("ADM", data, 20, "linear"): (UNIFORM["ADM", data, 20, "uniform"][0], *cell)
    for data, cell in zip(ADM_DATASETS, cells(ADM_LINEAR), strict=True)
}


def name(key):
    return "-".join(str(part) for part in key)


@pytest.mark.parametrize("key", UNIFORM, ids=name)
def test_published_uniform(key):
    baseline, scaled, b = UNIFORM[key]
    setting = published_setting(*key)
    assert (setting.fid_baseline, setting.fid_scaled) == (baseline, scaled)
    assert setting.scaling.values(20).tolist() == [b] * 20
    assert published(*key) is setting.scaling
    assert f"published for {', '.join(str(part) for part in key)}" in repr(setting.scaling)


@pytest.mark.parametrize("key", LINEAR, ids=name)
def test_published_linear(key):
    baseline, scaled, k, b = LINEAR[key]
    setting = published_setting(*key)
    assert (setting.fid_baseline, setting.fid_scaled) == (baseline, scaled)
    np.testing.assert_allclose(setting.scaling.values(20), [k * i + b for i in range(19, -1, -1)], rtol=1e-15)
    assert published(*key) is setting.scaling


def test_nothing_else_is_published():
    assert set(SETTINGS) == set(UNIFORM) | set(LINEAR)
    assert len(SETTINGS) == 15 + 5 + 12 + 1


@pytest.mark.parametrize("dataset", ADM_DATASETS)
def test_linear_and_uniform_of_20_steps_agree_on_average(dataset):
    """b + 9.5*k is the mean over i = 0..19; the paper gives uniform b to three decimals. On CIFAR-10 they differ."""
    mean = published("ADM", dataset, 20, "linear").values(20).mean()
    uniform = published("ADM", dataset, 20).values(1)[0]
    assert (abs(mean - uniform) <= 0.0005 + 1e-12) == (dataset != "CIFAR-10")


def test_default_kinds():
    assert published("ADM", "FFHQ 128", 20) is published("ADM", "FFHQ 128", 20, "uniform")
    assert published("EDM", "CIFAR-10", 13) is published("EDM", "CIFAR-10", 13, "heun")
    assert published("DDIM", "CelebA", 100) is published("DDIM", "CelebA", 100, "uniform")


@pytest.mark.parametrize(
    "key, wrong",
    [
        (("LDM", "FFHQ 128", 20, "uniform"), "system: expected one of 'ADM', 'EDM', 'DDIM', got 'LDM'"),
        (
            ("ADM", "CIFAR10", 20, "uniform"),
            "dataset of ADM: expected one of 'CIFAR-10', 'LSUN tower 64', .*, got 'CIFAR10'",
        ),
        (("ADM", "CIFAR-10", 30, "uniform"), "steps of ADM, CIFAR-10: expected one of 100, 50, 20, got 30"),
        (("DDIM", "CelebA", 50, "uniform"), "steps of DDIM, CelebA: expected one of 100, got 50"),
        (("ADM", "CIFAR-10", 50, "linear"), "kind of ADM, CIFAR-10, 50: expected one of 'uniform', got 'linear'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_unknown_setting_says_what_its_first_wrong_part_may_be(key, wrong):
    with pytest.raises(KeyError) as caught:
        published(*key)
    assert re.fullmatch(f"no published setting {'/'.join(map(str, key))}; {wrong}", caught.value.args[0])


# ---- one grammar ----

VALUES = np.array([1.03, 1.02, 1.01])
FORMS = {
    "number": (1.02, [1.02] * 3),
    "integer": (1, [1.0] * 3),
    "numpy number": (np.float32(1.5), [1.5] * 3),
    "0-d array": (np.array(1.02), [1.02] * 3),
    "0-d tensor": (torch.tensor(1.5), [1.5] * 3),
    "list": (VALUES.tolist(), VALUES),
    "tuple": (tuple(VALUES), VALUES),
    "array": (VALUES, VALUES),
    "float64 tensor": (torch.tensor(VALUES), VALUES),
    "bfloat16 tensor": (torch.tensor([1.5, 1.25, 1.0], dtype=torch.bfloat16), [1.5, 1.25, 1.0]),
    "tensor that requires grad": (torch.tensor(VALUES, requires_grad=True), VALUES),
    "linear": ({"k": 0.01, "b": 1.0}, [1.02, 1.01, 1.0]),
    "linear from the noisiest": ({"k": 0.01, "b": 1.0, "origin": "noisiest"}, [1.0, 1.01, 1.02]),
    "b alone": ({"b": 1.02}, [1.02] * 3),
    "quadratic dict": ({"kind": "quadratic", "a": 0.01, "k": 0.0, "b": 1.0, "origin": "cleanest"}, [1.04, 1.01, 1.0]),
    "EpsilonScaling": (scaling.exponential(0.0, 1.02, origin="cleanest"), [1.02] * 3),
    "published": ("EDM/CIFAR-10/35/euler", [1.0034] * 3),
}


@pytest.mark.parametrize("value, expected", FORMS.values(), ids=FORMS)
def test_every_form_of_lambda(value, expected, tmp_path):
    """Also what is kept of it as JSON, in a file, and in a pickle."""
    made = scaling.as_scaling(value)
    np.testing.assert_allclose(made.values(3), expected, rtol=1e-15)
    kept = json.loads(json.dumps(scaling.as_json(value)))
    assert scaling.as_scaling(kept) == made
    made.save(tmp_path / "lambda.json")
    for path in (tmp_path / "lambda.json", str(tmp_path / "lambda.json")):
        assert scaling.as_scaling(path) == made
        assert scaling.as_scaling(scaling.as_json(path)) == made, "stored by what it holds"
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert copied == made and hash(copied) == hash(made) and copied.values(3).tolist() == made.values(3).tolist()
    torch.save(made, tmp_path / "made.pt")
    assert torch.load(tmp_path / "made.pt", weights_only=False) == made


BAD_FORMS = {
    "bool": (True, TypeError, "expected a number, numbers .*, got bool"),
    "None": (None, TypeError, "got NoneType"),
    "set": ({1.0}, TypeError, "got set"),
    "words": (["a", "b"], TypeError, "got list"),
    "complex": (torch.tensor([1j]), TypeError, "got ndarray"),
    "zero": (0, ValueError, "expected a value above 0, got 0"),
    "nan": (math.nan, ValueError, "expected a finite number, got nan"),
    "list with -1": ([1.0, -1.0], ValueError, "expected finite values above 0, got -1"),
    "empty": ([], ValueError, r"expected shape \(steps,\), got \(0,\)"),
    "two dimensions": ([[1.0]], ValueError, r"expected shape \(steps,\), got \(1, 1\)"),
    "keys": ({"k": 1.0}, ValueError, "expected the keys k, b and perhaps origin"),
    "kind": ({"kind": "cubic"}, ValueError, "kind: expected one of .*, got 'cubic'"),
    "arguments": ({"kind": "constant", "c": 1.0}, ValueError, "unexpected keyword argument 'c'"),
    "origin": ({"b": 1.0, "origin": "first"}, ValueError, "origin: expected 'cleanest' or 'noisiest'"),
    "steps": ({"kind": "constant", "b": 1.0, "steps": "20"}, ValueError, "steps: expected an integer, got '20'"),
    "name": (
        "ADM",
        ValueError,
        "expected 'SYSTEM/DATASET/STEPS', or with '/KIND', or a file that ends in .json, got 'ADM'",
    ),
    "unpublished": ("ADM/CIFAR-10/7", ValueError, "no published setting"),
    "no file": ("nowhere.json", FileNotFoundError, "expected a file saved by EpsilonScaling.save, and there is no"),
    "no path": (pathlib.Path("nowhere"), FileNotFoundError, "and there is no nowhere"),
}


@pytest.mark.parametrize("value, error, said", BAD_FORMS.values(), ids=BAD_FORMS)
@pytest.mark.parametrize("name", ["eps_scaling", "--lambda"])
def test_an_error_names_the_argument_as_the_caller_wrote_it(name, value, error, said):
    with pytest.raises(error, match=f"^{name}: .*{said}"):
        scaling.as_scaling(value, name)


def test_a_damaged_file_is_named(tmp_path):
    for i, text in enumerate(
        (
            "",
            "[]",
            "{}",
            '{"format": 1}',
            '{"format": 1, "kind": "linear", "k": 1}',
            "\ud800".encode("utf-8", "surrogatepass"),
        )
    ):
        path = tmp_path / f"{i}.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=f"^scaling: expected a scaling saved by .* in {re.escape(str(path))}: "):
            scaling.as_scaling(path)
    with pytest.raises(IsADirectoryError, match="^scaling: "):
        scaling.as_scaling(tmp_path)


def test_a_formula_of_ones_own_is_not_kept():
    own = scaling.EpsilonScaling(lambda i: 1 + 0.01 * i, "cleanest", "mine")
    assert scaling.as_scaling(own) is own
    with pytest.raises(
        ValueError, match="^eps_scaling: expected one made by a function of epskernels.scaling, to save it"
    ):
        scaling.as_json(own, "eps_scaling")
    assert own != dataclasses.replace(own, formula=lambda i: 1 + 0.01 * i)


@pytest.mark.parametrize("name, steps, other", [("ADM/CIFAR-10/20/linear", 20, 50), ("EDM/CIFAR-10/35", 18, 35)])
def test_other_steps_than_published_for_are_said(name, steps, other, caplog, tmp_path):
    """Heun's 35 model calls are 18 steps. A fitted lambda tells its steps too, through its file."""
    made = scaling.as_scaling(name)
    made.save(tmp_path / "again.json")
    fitted = scaling.linear(0.001, 1.0, origin="cleanest")
    fitted.save(tmp_path / "fitted.json", steps=steps)
    for lambda_t in (made, scaling.load(tmp_path / "again.json")[0], scaling.load(tmp_path / "fitted.json")[0]):
        scaling._say.cache_clear()
        caplog.clear()
        lambda_t.values(steps)
        assert not caplog.records
        lambda_t.values(other)
        lambda_t.values(other)
        assert [f"with {steps} steps, used with {other}" in record.message for record in caplog.records] == [True]


def test_a_formula_of_one_s_own_from_the_other_end_is_another_scaling():
    def formula(i):
        return 1 + 0.1 * i

    ends = [scaling.EpsilonScaling(formula, origin, "mine") for origin in scaling.ORIGINS]
    assert ends[0] != ends[1] and ends[0] == scaling.EpsilonScaling(formula, scaling.ORIGINS[0], "mine")


# ---- by noise level ----


BETAS = schedule.linear()


def test_log_snr():
    found = scaling.log_snr([1.0, 0.0, 0.6], [0.0, 1.0, 0.8])
    np.testing.assert_array_equal(found[:2], [np.inf, -np.inf])
    np.testing.assert_allclose(found[2], math.log(0.75), rtol=1e-15)


def tsr_by_hand(alpha, sigma, k, s):
    """The factor r of eps as the authors write it (arXiv 2510.01184), for one level."""
    snr = (alpha / sigma) ** 2
    return (snr * s**2 + 1) / (snr * s**2 / k + 1)


@pytest.mark.parametrize("k, s", [(0.93, 1.0), (1.1, 3.0), (1.0, 2.0)])
def test_tsr_is_the_authors(k, s):
    alpha = np.array([1e-4, 0.1, 0.5, 0.9, 0.9999])
    sigma = np.sqrt(1 - alpha**2)
    found = scaling.tsr(k, s).values(5, scaling.log_snr(alpha, sigma))
    np.testing.assert_allclose(
        1 / found, [tsr_by_hand(a, b, k, s) for a, b in zip(alpha, sigma, strict=True)], rtol=1e-14
    )
    np.testing.assert_allclose(scaling.tsr(k, s).values(2, [-np.inf, np.inf]), [1.0, 1 / k], rtol=1e-15)


def tsr_ddim(eps, x, t, alpha, sigma, k, s):
    """DDIM by the rescaled score (arXiv 2510.01184), float64; alpha, sigma: of each call, and after the last."""
    states = []
    for j in range(len(t)):
        score = -tsr_by_hand(alpha[j], sigma[j], k, s) * eps(x, t[j]) / sigma[j]
        x_0 = (x + sigma[j] ** 2 * score) / alpha[j]
        x = alpha[j + 1] * x_0 - sigma[j + 1] * sigma[j] * score
        states.append(x)
    return torch.stack(states)


def tsr_flow(velocity, x, sigma, k, s):
    """Euler of a flow by the rescaled score of its velocity, float64; at sigma = 1 the factor is 1."""
    states = []
    for j in range(len(sigma) - 1):
        v = velocity(x, 1000 * sigma[j])
        if sigma[j] < 1:
            score = -((1 - sigma[j]) * v + x) / sigma[j] * tsr_by_hand(1 - sigma[j], sigma[j], k, s)
            v = -(x + sigma[j] * score) / (1 - sigma[j])
        x = x + (sigma[j + 1] - sigma[j]) * v
        states.append(x)
    return torch.stack(states)


def small_network(x, t):
    return torch.sin(2 * x + float(t) / 300) + 0.3 * x.roll(1, -1)


def down(table, x, dtype):
    """All states down a table: in float32 by the op, in float64 by the table's columns as they are before they are rounded."""
    states = []
    for i in range(len(table)):
        f = small_network(x, table["t"][i])
        if dtype == torch.float32:
            x = epskernels.step(x, f, table, i)
        else:
            m0 = table["d_x"][i] * x + table["d_f"][i] * f
            x = table["c_x"][i] * x + table["c_f"][i] * f + table["c_m0"][i] * m0
        states.append(x.double())
    return torch.stack(states)


def stepped(scheduler, x):
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(small_network(x, t), t, x, return_dict=False)[0]
        states.append(x.double())
    return torch.stack(states)


def farthest(a, b):
    return float((a - b).abs().max() / b.abs().max())


X_T = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("k, s", [(0.93, 1.0), (1.1, 3.0)])
@pytest.mark.parametrize("kind", ["ddim", "flow_euler"])
def test_tsr_down_a_trajectory(kind, k, s, steps):
    def make(lambda_t):
        return samplers.ddim(BETAS, steps, scaling=lambda_t) if kind == "ddim" else samplers.flow_euler(
            schedule.FlowSchedule(3.0), steps, scaling=lambda_t
        )  # fmt: skip

    table = make(scaling.tsr(k, s))
    if kind == "ddim":
        t = np.arange(0, 1000, 1000 // steps)[::-1]
        abar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t], 1.0)
        expected = tsr_ddim(small_network, X_T.double(), t, np.sqrt(abar), np.sqrt(1 - abar), k, s)
    else:
        sigma = 3 * (at := np.linspace(1, 0, steps + 1)) / (1 + 2 * at)
        expected = tsr_flow(small_network, X_T.double(), sigma, k, s)
    assert farthest(down(table, X_T.double(), torch.float64), expected) < 1e-12
    assert farthest(down(table, X_T, torch.float32), expected) < 1e-5
    assert farthest(down(make(1.0), X_T, torch.float32), expected) > 1e-3


@pytest.mark.parametrize("k, s", [(0.93, 1.0), (1.1, 3.0)])
@pytest.mark.parametrize("shift", [None, 1.0, 3.0], ids=["ddim", "flow", "flow, shift 3"])
def test_tsr_in_a_diffusers_scheduler(shift, k, s):
    """At the levels that the scheduler itself holds."""

    def make(lambda_t):
        if shift is not None:
            made = fused.FlowMatchEulerDiscreteScheduler(shift=shift, eps_scaling=lambda_t)
        else:
            made = fused.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, eps_scaling=lambda_t)
        made.set_timesteps(20)
        return made

    scheduler = make({"kind": "tsr", "k": k, "sigma": s})
    if shift is None:
        t = scheduler.timesteps.numpy()
        abar = scheduler.alphas_cumprod.double().numpy()
        abar = np.append(abar[t], abar[0])
        expected = tsr_ddim(small_network, X_T.double(), t, np.sqrt(abar), np.sqrt(1 - abar), k, s)
    else:
        expected = tsr_flow(small_network, X_T.double(), scheduler.sigmas.double().numpy(), k, s)
    assert farthest(stepped(scheduler, X_T), expected) < 1e-5
    assert farthest(stepped(make(1.0), X_T), expected) > 1e-3


@pytest.mark.parametrize("k", [0.8, 2.0])
@pytest.mark.parametrize("kind", ["ddim", "flow_euler"])
def test_tsr_of_a_gaussian_samples_one_of_variance_over_k(kind, k):
    """What the paper derives it from: N(mu, s^2) becomes N(mu, s^2/k). The ODE keeps (x - alpha*mu)/std of the noisy one."""
    mu, s, errors = 0.7, 1.5, []
    for steps in (200, 400):
        if kind == "ddim":
            table = samplers.ddim(BETAS, steps, scaling=scaling.tsr(k, s), spacing="trailing")
        else:
            table = samplers.flow_euler(schedule.FlowSchedule(1.0), steps, scaling=scaling.tsr(k, s))
        alpha, sigma, row = table["alpha_in"], table["sigma_in"], itertools.count()

        def model(x, t, alpha=alpha, sigma=sigma, row=row):
            i = next(row)
            away, total = x - alpha[i] * mu, alpha[i] ** 2 * s**2 + sigma[i] ** 2
            x_0, eps = mu + alpha[i] * s**2 / total * away, sigma[i] / total * away
            return eps - x_0 if kind == "flow_euler" else eps

        found = epskernels.sample(model, table, range(3), (2, 5), start=X_T[:, :, :, 0])
        kept = (X_T[:, :, :, 0] - alpha[0] * mu) / math.sqrt(alpha[0] ** 2 * s**2 / k + sigma[0] ** 2)
        errors.append(float((found - (mu + s / math.sqrt(k) * kept)).abs().max()))
    assert errors[1] < 0.02 and errors[1] < 0.6 * errors[0]  # of first order


def test_a_table_of_levels():
    made = scaling.by_level([-2.0, 0.0, 1.0], [1.1, 1.0, 0.9])
    np.testing.assert_allclose(
        made.values(6, [-np.inf, -3, -1, 0.5, 2, np.inf]), [1.1, 1.1, 1.05, 0.95, 0.9, 0.9], rtol=1e-15
    )
    own = scaling.by_level(lambda level: 1 + 0.01 * np.tanh(level))
    np.testing.assert_allclose(own.values(2, [-np.inf, 0.0]), [0.99, 1.0])


BY_LEVEL = {"tsr": scaling.tsr(0.95, 1.5), "table": scaling.by_level([-3.0, 0.0, 4.0], [1.05, 1.02, 0.97])}


@pytest.mark.parametrize("made", BY_LEVEL.values(), ids=[*BY_LEVEL])
def test_a_scaling_by_level_is_saved_and_named_by_a_dict(made, tmp_path, caplog):
    made.save(tmp_path / "lambda.json", steps=20)
    loaded, notes = scaling.load(tmp_path / "lambda.json")
    assert loaded == dataclasses.replace(made, steps=20) and loaded.by_level
    assert made == scaling.as_scaling(made.to_dict()) == pickle.loads(pickle.dumps(made))
    assert scaling.as_json(made) == made.to_dict() and scaling.as_json(made.to_dict()) == made.to_dict()
    with caplog.at_level("WARNING"):
        loaded.values(7, np.arange(7.0))
    assert not caplog.records  # another number of steps means nothing to it


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: scaling.tsr(0.0), "k, sigma: expected values above 0, got 0 and 1"),
        (lambda: scaling.tsr(1.0, math.nan), "sigma: expected a finite number, got nan"),
        (lambda: scaling.by_level([0.0, 0.0], [1.0, 1.0]), "levels: expected finite values of .* that rise"),
        (lambda: scaling.by_level([0.0, np.inf], [1.0, 1.0]), "levels: expected finite values of .* that rise"),
        (lambda: scaling.by_level([0.0, 1.0], [1.0]), r"levels, values: expected \(N,\) each, got \(2,\) and \(1,\)"),
        (lambda: scaling.by_level([0.0], [-1.0]), "lambda: expected finite values above 0, got -1.0"),
        (lambda: scaling.by_level([0.0, 1.0]), "values: expected lambda at each of the levels, got None"),
        (lambda: scaling.by_level(np.tanh, [1.0]), "values: expected none beside a function"),
        (lambda: scaling.tsr(0.9).values(3), r"lambda: expected log\(alpha/sigma\) of each of 3 steps"),
        (
            lambda: scaling.tsr(0.9).values(3, [0.0, 1.0]),
            r"since TSR k=0.9 sigma=1 is by noise level, got shape \(2,\)",
        ),
        (
            lambda: samplers.ddim(BETAS, 4, scaling={"kind": "tsr", "k": -1}),
            "scaling: k, sigma: expected values above 0",
        ),
    ],
)
def test_bad_scalings_by_level(make, said):
    with pytest.raises(ValueError, match=said):
        make()


LEVEL_TABLES = {
    "ddpm": (samplers.ddpm, BETAS, {}),
    "ddim": (samplers.ddim, BETAS, {}),
    "plms": (samplers.plms, BETAS, {}),
    "unipc": (samplers.unipc, BETAS, {}),
    "edm_euler": (samplers.edm_euler, schedule.KarrasSchedule(model=BETAS), {"S_churn": 5.0}),
    "edm_heun": (samplers.edm_heun, schedule.KarrasSchedule(model=BETAS), {"S_churn": 5.0}),
    "dpmpp_sde": (samplers.dpmpp_sde, schedule.KarrasSchedule(model=BETAS), {}),
    "flow": (samplers.euler, schedule.FlowSchedule(), {"prediction": "flow", "space": "vp"}),
}


@pytest.mark.parametrize("made", BY_LEVEL.values(), ids=[*BY_LEVEL])
@pytest.mark.parametrize("name", LEVEL_TABLES)
@pytest.mark.parametrize("steps", [3, 10])
def test_each_call_reads_lambda_at_its_own_level(name, steps, made):
    """Of a second call within a step too, and at sigma as churn has raised it; 1 where x is noise alone."""
    sampler, over, options = LEVEL_TABLES[name]
    table = sampler(over, steps, scaling=made, **options)
    levels = scaling.log_snr(table["alpha_in"], table["sigma_in"])
    alone = scaling.noise_alone(table["alpha_in"], table["sigma_in"], table["f_x0"])
    np.testing.assert_array_equal(table["lambda_t"], np.where(alone, 1.0, made.values(len(table), levels)))
    assert len(np.unique(table["lambda_t"])) >= min(3, steps)


def test_steps_in_common_have_one_lambda():
    """Which is what a schedule of steps cannot promise."""
    made, fine = BY_LEVEL["table"], samplers.ddim(BETAS, 100, scaling=BY_LEVEL["table"])
    coarse = samplers.ddim(BETAS, 10, scaling=made)
    at = dict(zip(fine["t"], fine["lambda_t"], strict=True))
    shared = [t for t in coarse["t"] if t in at]
    assert len(shared) == 10 and [at[t] for t in shared] == coarse["lambda_t"].tolist()
