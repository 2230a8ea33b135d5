"""Corrections folded into rows, beside their papers' formulas after the sampler's own step; their grammar, and files."""

import dataclasses
import json

import numpy as np
import pytest
import pywt
import torch

import epskernels
from epskernels import corrections, exposure, k_diffusion, samplers, schedule
from epskernels.table import COLUMNS, VALUES

VP, KARRAS, FLOW = schedule.linear(), schedule.KarrasSchedule(), schedule.FlowSchedule(shift=2.0)
STEPS, SHAPE = 4, (2, 5, 6)
CORRECTED = [name for name in samplers.SAMPLERS if name != "ddim_inverse"]  # which leads to noise
KINDS = {
    "dc": corrections.dc(0.11),
    "dc_alpha": corrections.dc([0.1, -0.2, 0.3, 0.4], target="alpha*m0", schedule="sigma"),
    "low": corrections.dcw(-0.3),
    "double": corrections.dcw(-0.3, 0.2, target="alpha*m0"),
    "levels": corrections.dcw({"levels": [-3.0, 2.0], "values": [0.4, -0.1]}, 0.1, schedule="constant"),
    "frequency": corrections.frequency(1.2, 0.9, schedule="sigma"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def bands(x):
    """(low, high) by PyWavelets, one level of Haar, zeros outside."""
    coefficients, details = pywt.dwt2(x, "haar", mode="zero")
    low = pywt.idwt2((coefficients, (None, None, None)), "haar", mode="zero")[..., : x.shape[-2], : x.shape[-1]]
    high = pywt.idwt2((None, details), "haar", mode="zero")[..., : x.shape[-2], : x.shape[-1]]
    assert np.allclose(low + high, x)
    return low, high


def by_hand(x, m0, kind, fraction, alpha, level, step):
    """x' corrected, as the papers write it. fraction: sigma_t/sigma_max where the step begins."""
    if kind == "dc":
        return x + 0.11 * (x - m0)
    if kind == "dc_alpha":
        return x + (0.1, -0.2, 0.3, 0.4)[step] * fraction * (x - alpha * m0)
    low, high = bands(x - alpha * m0 if kind == "double" else x - m0)
    if kind == "low":
        return x - 0.3 * fraction * low
    if kind == "double":
        return x - 0.3 * fraction * low + 0.2 * (1 - fraction) * high
    if kind == "levels":
        return x + np.interp(level, (-3, 2), (0.4, -0.1)) * low + 0.1 * high
    low, high = bands(x)
    return (1 + 0.2 * fraction) * low + (1 - 0.1 * (1 - fraction)) * high


def network(x, t):
    inside = 0.4 * x + 0.2 * torch.sin(x.roll(1, -1)) + 0.1 * x.roll(1, -2)
    return 1.2 * torch.tanh(inside + 0.4 * torch.cos(t.reshape(-1, 1, 1, 1).to(x.dtype) / 160))


def make(name, **options):
    """A table of any sampler, on a schedule that it takes."""
    sampler = samplers.SAMPLERS[name]
    if name in ("consistency", "edm_euler", "edm_heun", "pfgmpp", "heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s", "dpmpp_sde",
                "dpmpp_3s", "dpm_solver", "seeds_2", "seeds_3"):  # fmt: skip
        return sampler(KARRAS, STEPS, **options)
    if name == "flow_euler":
        return sampler(FLOW, STEPS, **options)
    return sampler(VP, STEPS, **options)


def by_loop(plain, kind, x, seeds):
    """The plain table's rows in float64, each step's x' corrected by hand: the states after each row."""
    m1 = m2 = y = np.zeros_like(x)
    begin, states, step = 0, [], 0
    for r in range(len(plain)):
        row = {key: plain[key][r] for key in VALUES}
        t = torch.full((len(x),), row["t"], dtype=torch.float64)
        f = network(torch.from_numpy(row["c_in"] * x), t).numpy()
        m0 = np.clip(row["d_x"] * x + row["d_f"] * f, -row["clip"], row["clip"])
        z = epskernels.normal(seeds, SHAPE, stream=0, draw=int(row["draw"])).double().numpy()
        tensors = {"x": x, "f": f, "m0": m0, "m1": m1, "m2": m2, "y": y, "noise": z}
        after = sum(row[f"c_{key}"] * tensor for key, tensor in tensors.items())
        y = sum(row[f"k_{key}"] * tensors[key] for key in ("x", "m0", "m1", "m2", "y"))
        if row["ends_step"]:
            x_0 = m0 if plain.keeps_x0 else (x - row["sigma_in"] * m0) / row["alpha_in"]
            alpha, sigma = plain["alpha_in"][begin], plain["sigma_in"][begin]
            if row["sigma_out"] != 0:
                level = np.log(alpha / sigma)
                after = by_hand(after, x_0, kind, sigma / plain["sigma_in"].max(), row["alpha_out"], level, step)
            begin, step = r + 1, step + 1
        x, m1, m2 = after, m0, m1
        states.append(x)
    assert step == STEPS
    return states


SOME = ("ddpm", "edm_heun", "dpmpp_2m", "unipc", "plms", "flow_euler")
EVERY = [
    pytest.param(name, kind, marks=() if name in SOME or kind == "double" else pytest.mark.deep)
    for name in CORRECTED
    for kind in KINDS
]


@pytest.mark.parametrize("name, kind", EVERY)
def test_every_sampler_against_its_plain_rows_and_the_paper(name, kind):
    plain, corrected = make(name, scaling=1.01), make(name, scaling=1.01, correction=KINDS[kind])
    seeds = [3, 2**63 + 5]
    x = plain.initial_sigma * epskernels.normal(seeds, SHAPE).double().numpy()
    expected, got = by_loop(plain, kind, x, seeds), []
    epskernels.sample(network, corrected, seeds, SHAPE, callback=lambda i, x, m0: got.append(x.double().numpy()))
    for r, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(a - b).max() <= 2e-5 * max(1, np.abs(b).max()), f"row {r}"
    # A row that does not end a step, and one that leads to an image, are as they were.
    same = (plain["ends_step"] == 0) | (plain["sigma_out"] == 0)
    assert (same.any() or name == "tcd") and all((plain[key][same] == corrected[key][same]).all() for key in VALUES)
    assert (plain["ends_step"].sum(), corrected.initial_sigma) == (STEPS, plain.initial_sigma)


def test_rows_are_wide_where_a_band_is_corrected_alone():
    assert make("ddim").rows.shape == make("ddim", correction=corrections.dc(0.1)).rows.shape == (STEPS, 24)
    same = make("ddim", correction=corrections.dcw(0.1, 0.1, schedule="constant"))
    assert torch.equal(same.rows, make("ddim", correction=corrections.dc(0.1)).rows) and same.band_dims == 0
    wide = make("ddim", correction=corrections.dcw(0.1))
    assert wide.rows.shape == (STEPS, 28) and wide.band_dims == 2 and wide.corrected
    assert not make("ddim").corrected and make("ddim", correction=corrections.dc(0.1)).corrected
    both = epskernels.concat([make("ddim"), wide])
    assert (
        torch.equal(both.rows[:STEPS, : len(COLUMNS)], make("ddim").rows)
        and not both.rows[:STEPS, len(COLUMNS) :].any()
    )
    assert torch.equal(both.rows[STEPS:], wide.rows) and "l_next" in repr(wide) and "l_next" not in repr(make("ddim"))


@each_kind
def test_no_weight_is_no_correction(kind):
    plain = make("dpmpp_2m")
    for idle in (corrections.dc(0.0), corrections.dcw(0.0), corrections.frequency(1.0)):
        assert torch.equal(make("dpmpp_2m", correction=idle).rows, plain.rows)


def test_the_authors_edm_euler():
    """generate.py of DCW, recommended form, published example: 13 steps, low band, s = 0.005 times sigma_t/sigma_max."""
    sigmas = np.append(KARRAS.grid(13).sigma, 0)
    x = 80 * epskernels.normal([1], (3, 7, 8)).double().numpy()
    expected = x
    for i, (t, t_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = network(torch.from_numpy(expected / np.sqrt(t**2 + 0.25)), torch.full((1,), t)).numpy()
        after = expected + (t_next - t) * (expected - denoised) / t
        (low, high), (of_low, _) = pywt.dwt2(after, "haar", mode="zero"), pywt.dwt2(denoised, "haar", mode="zero")
        low = low + 0.005 * (sigmas[i] / 80) * (low - of_low)
        expected = pywt.idwt2((low, high), "haar", mode="zero")[..., :7, :8]
    table = samplers.edm_euler(KARRAS, 13, correction=corrections.dcw(0.005))
    got = epskernels.sample(
        lambda x, t: network(x / (t**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), t), table, [1], (3, 7, 8)
    )
    # The last of their steps corrects x' = m0 by x' - m0, which is nothing.
    assert np.abs(got.double().numpy() - expected).max() < 2e-5


def test_the_closed_form_leaves_corrected_rows_out():
    table = make("ddim", correction=corrections.dcw([0.0, 0.1, 0.1, 0.1], schedule="constant"))
    assert (np.isnan(exposure.closed_form(table, 0.1)) == table.corrected_rows).all()
    assert table.corrected_rows.tolist() == [False, True, True, False]


def test_bands_of_signals_and_video():
    for shape, dims in (((2, 9), 1), ((7,), 1), ((2, 3, 5, 4), 2)):
        table = samplers.ddim(VP, 3, correction=corrections.dcw(-0.3, 0.2, dims=dims))
        out = epskernels.sample(lambda x, t: 0.5 * x.tanh(), table, [1, 2], shape)
        assert out.shape == (2, *shape) and out.isfinite().all()
        alone = epskernels.sample(lambda x, t: 0.5 * x.tanh(), table, [2], shape)
        assert torch.equal(alone, out[1:])
        wrong = samplers.ddim(VP, 3, correction=corrections.dcw(-0.3, dims=3 - dims))
        with pytest.raises(RuntimeError, match=r"x: expected shape \(B, .* corrects a band of it, got"):
            epskernels.sample(lambda x, t: 0.5 * x.tanh(), wrong, [1, 2], shape)


# ---- the grammar, and files ----


@each_kind
def test_saved_and_loaded(kind, tmp_path):
    made = KINDS[kind]
    made.save(tmp_path / "correction.json", sampler="ddim", steps=4)
    loaded, notes = corrections.load(tmp_path / "correction.json")
    assert loaded == made and hash(loaded) == hash(made) and notes == {"sampler": "ddim", "steps": 4}
    for value in (made, made.to_dict(), json.loads(json.dumps(made.to_dict())), str(tmp_path / "correction.json")):
        assert corrections.as_correction(value) == made
    assert make("ddim", correction=tmp_path / "correction.json").rows.equal(make("ddim", correction=made).rows)
    other = dataclasses.replace(made, low=0.7, high=0.7)
    assert other != made and made != "dc"


def test_use_by_another_sampler_or_with_other_steps_is_said_once(tmp_path, caplog):
    corrections._say.cache_clear()
    corrections.dc(0.1).save(tmp_path / "a.json", sampler="ddim", steps=4, score=2.0)
    loaded, notes = corrections.load(tmp_path / "a.json")
    assert loaded.to_dict() == corrections.dc(0.1).to_dict() | {"sampler": "ddim", "steps": 4} and notes["score"] == 2.0
    assert corrections.as_correction(loaded.to_dict()).steps == 4 and loaded.with_numbers(low=0.2).steps is None
    assert loaded == corrections.dc(0.1)
    assert loaded.with_numbers(low=0.1, high=0.1).to_dict() == corrections.dc(0.1).to_dict()
    loaded.save(tmp_path / "b.json", by="me")
    assert corrections.load(tmp_path / "b.json")[1] == {"by": "me", "sampler": "ddim", "steps": 4}
    edm, sigmas = dataclasses.replace(loaded, sampler="edm_euler"), torch.tensor([9.0, 3.0, 2.0, 1.0, 0.0])

    def run(name, *sigmas, **more):
        getattr(k_diffusion, name)(lambda x, _: 0.5 * x, torch.ones(1, 1, 4, 4), *sigmas, disable=True, **more)

    make("ddim", correction=loaded)
    run("sample_euler", sigmas, correction=edm)
    assert not caplog.records
    for uses, said in (
        (
            lambda: samplers.ddim(schedule.linear(), 5, correction=loaded),
            "ddim with 4 steps, used by ddim with 5 steps",
        ),
        (
            lambda: samplers.ddpm(schedule.linear(), 4, correction=loaded),
            "ddim with 4 steps, used by ddpm with 4 steps",
        ),
        (
            lambda: run("sample_euler", sigmas[1:], correction=edm),
            "edm_euler with 4 steps, used by sample_euler with 3",
        ),
        (
            lambda: run("sample_dpm_adaptive", 0.1, 1.0, correction=edm),
            "used by sample_dpm_adaptive: a weight need not",
        ),
    ):
        caplog.clear()
        uses(), uses()
        (record,) = caplog.records
        assert record.getMessage().startswith("correction: dc was fitted for ") and said in record.getMessage()
    for fitted in ({"steps": "4"}, {"steps": True}, {"sampler": 4}):
        with pytest.raises(TypeError, match=f"^{next(iter(fitted))}: expected"):
            corrections.dc(0.1).save(tmp_path / "c.json", **fitted)
    assert not (tmp_path / "c.json").exists()


def test_short_forms():
    assert corrections.as_correction({"kind": "dc", "s": 0.1}) == corrections.dc(0.1)
    assert corrections.as_correction({"kind": "dcw", "low": np.float32(0.5)}) == corrections.dcw(0.5)
    assert corrections.as_correction({"kind": "frequency", "low": torch.tensor([1.5, 1.0])}).low == [1.5, 1.0]
    assert corrections.as_correction(None) is None


BAD = {
    "kind": ({"kind": "dcv", "low": 1}, "correction: kind: expected one of .*'dcw'.*, got 'dcv'"),
    "no weight": ({"kind": "dc"}, "correction: s: expected one weight of all bands, got"),
    "two weights": ({"kind": "dc", "low": 1, "high": 2}, r"correction: s: expected one weight of all bands, got \[1, 2\]"),
    "schedule": ({"kind": "dcw", "low": 1, "schedule": "snr"}, "schedule: expected 'constant' or 'sigma', got 'snr'"),
    "target": ({"kind": "dc", "s": 1, "target": "x"}, r"target: expected 'm0' or 'alpha\*m0', got 'x'"),
    "target of frequency": ({"kind": "frequency", "low": 1, "target": "alpha*m0"}, "target: expected none"),
    "dims": ({"kind": "dcw", "low": 1, "dims": 3}, "dims: expected 1 or 2, got 3"),
    "NaN": ({"kind": "dcw", "low": np.nan}, "low: expected finite weights, got nan"),
    "text": ({"kind": "dcw", "low": "1"}, "low: expected a number, numbers .*, got '1'"),
    "flag": ({"kind": "dcw", "low": True}, "low: expected a number, numbers .*, got True"),
    "matrix": ({"kind": "dcw", "low": np.ones((2, 2))}, "low: expected a number, numbers"),
    "keys": ({"kind": "dcw", "low": {"level": [1]}}, r"low: expected .* got the keys \['level'\]"),
    "levels": ({"kind": "dcw", "low": {"levels": [1, 1], "values": [0, 1]}}, "low: expected as many values as levels, which"),
    "values": ({"kind": "dcw", "low": {"levels": [0, 1], "values": [0, np.inf]}}, "low: expected finite levels and values"),
    "factor": ({"kind": "frequency", "low": 0.0}, "low: expected factors above 0, got 0"),
    "other key": ({"kind": "dcw", "low": 1, "weight": 2}, "correction: .*unexpected keyword argument 'weight'"),
    "number of weights": ({"kind": "dcw", "low": [1, 2]}, "correction: expected 4 weights of the low band, .*, got 2"),
    "all of the high band": ({"kind": "dc", "s": -1.0}, "correction: expected a weight of the high band other than -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_corrections(case):
    value, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        make("ddim", correction=value)


def test_what_is_no_correction():
    for value in (0.1, [1, 2], object()):
        with pytest.raises(TypeError, match="correction: expected a Correction, a dict or a .json file, got"):
            make("ddim", correction=value)
    with pytest.raises(
        FileNotFoundError, match="correction: expected a file saved by Correction.save, and there is no"
    ):
        make("ddim", correction="nowhere.json")
    for text in ("dc", "dc:-0.1"):  # the command line's
        with pytest.raises(
            ValueError, match=rf"correction: expected a .json file, .* corrections.dc\(-0.1\), .*, got '{text}'"
        ):
            make("ddim", correction=text)
    with pytest.raises(ValueError, match="S_churn: expected 0 beside a correction"):
        samplers.edm_euler(KARRAS, 5, S_churn=10, correction=corrections.dc(0.1))


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"format": 2, "kind": "dc", "low": 1, "high": 1}))
    with pytest.raises(
        ValueError, match="expected a correction saved by Correction.save, format 1, in .*a.json: format 2"
    ):
        make("ddim", correction=str(tmp_path / "a.json"))
