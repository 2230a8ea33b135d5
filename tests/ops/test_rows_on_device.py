"""Kernels that read rows on the device: what the host cannot refuse comes out as NaN, for that sample alone; and the switch that
makes the host read them."""

import pytest
import torch

import epskernels
from epskernels.ops import DTYPES, REFERENCE
from epskernels.spec import BAND_COLUMNS, COLUMNS, SECOND_STATE, band_dims_of

from ..support import kernels
from .test_step_bits import (
    LAYOUTS,
    READ_LAYOUTS,
    assert_all_same_bits,
    assert_same_bits,
    make_inputs,
    make_row,
    name,
    random_rows,
    reference,
    step,
)

ON_DEVICE = [kernel for kernel in kernels.KERNELS if not kernels.Kernel(kernel).reads_rows]
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("u", "m1", "m2", "v", "grad", "y", "seeds")
COMMON_SET = ("u", "m1", "seeds")
SETS = [tuple(n for k, n in enumerate(COMMON_SET) if chosen >> k & 1) for chosen in range(8)]
DTYPE_PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)


@pytest.fixture(params=kernels.params(ON_DEVICE))
def kernel(request, monkeypatch):
    monkeypatch.delenv("EPSKERNELS_CHECK_ROWS", raising=False)
    with kernels.Kernel(request.param).active(monkeypatch) as kernel:
        yield kernel


def check_only_bad_samples_are_nan(rows, index, inputs, bad):
    """The samples in `bad` are NaN in x' and m0, all others as the reference makes them alone."""
    good = [b for b in range(len(index)) if b not in bad]
    model_input = torch.zeros(2 * len(inputs["x"]), *inputs["x"].shape[1:], dtype=inputs["f"].dtype)
    got = step(rows, index, inputs, return_m0=True, return_y="y" in inputs, model_input=model_input)
    for result in (*got, *model_input.chunk(2)):
        assert result[list(bad)].isnan().all()
    if good:
        expected = reference(rows, index[good], {key: value[good] for key, value in inputs.items()})
        assert_all_same_bits([result[good] for result in got], expected)


@pytest.mark.executed(cuda=2)
@pytest.mark.interpreted(2)
@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize("wrong", [-1, 4, 2**31, 2**32, 2**40 + 1, -(2**40), 2**63 - 1, -(2**63)], ids=str)
@each_dtype
def test_index_out_of_range(kernel, dtype, wrong, size):
    inputs = make_inputs((4, size), NAMES, 1, dtype, dtype, special=0)
    rows = random_rows(4, NAMES, 2, idle=0)
    check_only_bad_samples_are_nan(rows, torch.tensor([2, wrong, 0, 3]), inputs, {1})
    everywhere = step(rows, torch.tensor(wrong), inputs, return_y=True)
    assert all(result.isnan().all() for result in everywhere)


NEEDS = {
    "u": {"g": 2.0}, "m1": {"c_m1": 0.5}, "m2": {"c_m2": -0.5}, "v": {"logvar_max": 1.0}, "noise": {"c_noise": 0.25},
    "y": {"c_y": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("others", ["no_other", "others"])
@pytest.mark.parametrize("missing", NEEDS)
def test_a_row_that_needs_an_absent_tensor(kernel, missing, others):
    names = [key for key in NEEDS if key != missing] if others == "others" else []
    inputs = make_inputs((3, 130), names, 3, special=0)
    plain = make_row(d_x=1.5, d_f=-0.5, clip=2.0, c_x=0.25, c_m0=0.5)
    asking = make_row(d_x=1.5, d_f=-0.5, clip=2.0, c_x=0.25, c_m0=0.5, **NEEDS[missing])
    check_only_bad_samples_are_nan(torch.cat([plain, asking]), torch.tensor([0, 1, 0]), inputs, {1})


@pytest.mark.parametrize("missing, column", [("m1", "k_m1"), ("m2", "k_m2"), ("y", "k_y"), ("y", "c_y")])
def test_a_second_state_that_needs_an_absent_tensor(kernel, missing, column):
    inputs = make_inputs((3, 130), [name for name in ("m1", "m2", "y") if name != missing], 3, special=0)
    plain, asking = make_row(d_x=1.5, c_x=0.25, k_x=1.0), make_row(d_x=1.5, c_x=0.25, k_x=1.0, **{column: 0.5})
    rows, index = torch.cat([plain, asking]), torch.tensor([0, 1, 0])
    got = step(rows, index, inputs, return_y=True)
    assert all(result[1].isnan().all() and result[::2].isfinite().all() for result in got)


@pytest.mark.parametrize("column", SECOND_STATE)
def test_a_second_state_that_would_be_lost(kernel, column):
    """A row that writes y', and nowhere to write it."""
    names = ("m1", "m2", "y")
    inputs = make_inputs((3, 130), names, 3, special=0)
    rows = random_rows(2, names, 4, idle=0)
    rows[:, [COLUMNS.index(key) for key in SECOND_STATE]] = 0
    rows[1, COLUMNS.index(column)] = 0.5
    got = step(rows, torch.tensor([0, 1, 0]), inputs)
    assert got[1].isnan().all() and got[::2].isfinite().all()


@pytest.mark.parametrize("channels", [-1.0, 0.5, 2.0**24, 1e30, float("inf"), float("nan")])
def test_bad_guided_channels(kernel, channels):
    inputs = make_inputs((2, 130), ("u",), 5, special=0)
    rows = torch.cat([make_row(c_f=1, g=2, guided_channels=value) for value in (channels, 64)])
    check_only_bad_samples_are_nan(rows, torch.tensor([1, 0]), inputs, {1})


@pytest.mark.parametrize("threshold", [0.0, -0.0, -1.0, float("inf"), float("nan")])
def test_bad_threshold(kernel, threshold):
    inputs = make_inputs((3, 130), (), 5, special=0) | {"threshold": torch.tensor([1.0, threshold, 2.0])}
    rows = random_rows(1, (), 4, idle=0)
    got = step(rows, torch.tensor(0), inputs, return_m0=True)
    for result in got:
        assert result[1].isnan().all() and result[::2].isfinite().all()


@pytest.mark.parametrize("names", [(), ("u",), ("v", "grad", "noise")], ids=["bare", "u", "v_grad_noise"])
@pytest.mark.parametrize("clip", [-0.0, -1.0, -(2.0**-149), -float("inf"), float("nan")])
def test_bad_clip(kernel, clip, names):
    inputs = make_inputs((2, 130), names, 4, special=0)
    rows = torch.cat([make_row(d_x=1, c_x=1, clip=clip), make_row(d_x=1, c_x=1, clip=0.0)])
    check_only_bad_samples_are_nan(rows, torch.tensor([1, 0]), inputs, {1})


@pytest.mark.executed(cuda=1)
@pytest.mark.parametrize("names", [("seeds",), ("u", "seeds"), ("v", "seeds")], ids=["seeds", "u_seeds", "v_seeds"])
@pytest.mark.parametrize("draw", [-1.0, 0.5, 2.0**24, 1e30, float("inf"), float("nan")])
def test_bad_draw(kernel, draw, names):
    inputs = make_inputs((2, 130), names, 5, special=0)
    rows = torch.cat([make_row(c_x=1, c_noise=1, draw=draw), make_row(c_x=1, c_noise=1, draw=2.0**24 - 1)])
    check_only_bad_samples_are_nan(rows, torch.tensor([1, 0]), inputs, {1})


def test_a_row_that_does_not_draw_may_have_any_draw(kernel):
    inputs = make_inputs((2, 130), ("seeds",), 6, special=0)
    got = step(make_row(c_x=1, draw=0.5), torch.tensor(0), inputs)
    assert_same_bits(got, inputs["x"], "x'")


@pytest.mark.parametrize("column", ["d_x", "d_f", "c_x", "c_m0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coefficients_that_are_not_finite_enter_as_they_are(kernel, column, value):
    inputs = make_inputs((2, 130), (), 7, special=0)
    row = make_row(d_x=1.5, d_f=-0.5, c_x=0.25, c_m0=0.5)
    row[0, COLUMNS.index(column)] = value
    assert not step(row, torch.tensor(0), inputs).isfinite().any()


CHECKED = {
    "index": (lambda a: a | {"index": torch.tensor([0, 7])}, r"index: expected values in \[0, 2\), got 7"),
    "u": (lambda a: {key: value for key, value in a.items() if key != "u"}, "u: missing, and row . needs it"),
    "clip": (lambda a: a | {"rows": a["rows"].clone().fill_(-1)}, "rows: expected finite coefficients and clip >= 0"),
    "threshold": (
        lambda a: a | {"threshold": torch.tensor([1.0, 0.0])},
        "threshold: expected finite values above 0, got 0",
    ),
}


@pytest.mark.parametrize("case", CHECKED)
def test_the_host_checks_them_when_asked_to(kernel, monkeypatch, case):
    monkeypatch.setenv("EPSKERNELS_CHECK_ROWS", "1")
    change, message = CHECKED[case]
    names = ("u", "m1", "m2", "v", "rescale", "threshold", "noise")
    rows, index = random_rows(2, names, 8, idle=0), torch.tensor([1, 0])
    arguments = make_inputs((2, 130), names, 8) | {"rows": rows, "index": index}
    wide = {"rows": torch.cat([rows, rows], dim=1)[:, : len(COLUMNS)], "index": torch.tensor([1, 9, 0, 9])[::2]}
    for form in ({}, wide):
        given = arguments | form
        inputs = {key: given[key] for key in arguments if key not in ("rows", "index")}
        assert_same_bits(step(given["rows"], given["index"], inputs), reference(rows, index, inputs)[0], "x'")
    changed = change(arguments)
    rows, index = changed.pop("rows"), changed.pop("index")
    before = {key: value.clone() for key, value in changed.items()}
    with pytest.raises(RuntimeError, match=message):
        step(rows, index, changed, out=changed["x"])
    for key, value in before.items():
        assert_same_bits(changed[key], value, key)


def test_a_batch_of_more_samples_than_a_grid_is_high(kernel):
    batch = 40 if kernel.interpreted else 66000
    inputs = make_inputs((batch, 3), ("seeds",), 9)
    rows = random_rows(5, ("seeds",), 10, idle=0)
    index = torch.arange(batch) % 5
    got, expected = step(rows, index, inputs, return_m0=True), reference(rows, index, inputs)
    assert_same_bits(got[0], expected[0], "x'")
    assert_same_bits(got[1], expected[1], "m0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", [(1, 2**21 + 5), (3, 2**19 + 8)], ids=str)
def test_large_tensors_with_noise(kernel, dtype, shape):
    """They take kernels of their own, with more elements to a thread."""
    if kernel.interpreted:
        pytest.skip("triton's interpreter is too slow for it")
    inputs = make_inputs(shape, ("seeds",), 11, dtype, dtype)
    rows = random_rows(3, ("seeds",), 12, idle=0)
    index = torch.arange(shape[0])
    assert_same_bits(step(rows, index, inputs), reference(rows, index, inputs)[0], "x'")


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(name, pair)))
@pytest.mark.parametrize("optional", SETS, ids=lambda names: "-".join(names) or "none")
def test_large_tensors(kernel, optional, dtypes):
    """Of every set that has a kernel of its own; on a GPU they are not large, and take the others."""
    if kernel.name == "triton" and not kernel.gpu:
        pytest.skip("triton's interpreter is too slow for it")
    inputs = make_inputs((2, 33_003), optional, 21, *dtypes)
    rows = random_rows(3, optional, 22, idle=0)
    index = torch.tensor([2, 0])
    assert_same_bits(step(rows, index, inputs), reference(rows, index, inputs)[0], "x'")


def test_backend_by_argument(kernel):
    inputs = make_inputs((2, 130), ("u",), 13)
    x, f = inputs.pop("x"), inputs.pop("f")
    rows = random_rows(1, ("u",), 14, idle=0)
    with epskernels.use_backend("reference"):
        got = epskernels.step(x, f, rows, 0, **inputs, backend=kernel.name)
    assert_same_bits(got, epskernels.step(x, f, rows, 0, **inputs, backend="reference"), "x'")


@pytest.mark.skipif("cuda_on_host" not in kernels.KERNELS, reason="left out by EPSKERNELS_TEST_KERNELS")
@pytest.mark.parametrize("kernel", ["cuda_on_host"], indirect=True)
@pytest.mark.parametrize("run", ["step", "normal", "moments"])
def test_a_launch_that_fails_is_an_error(kernel, run, monkeypatch):
    monkeypatch.setenv("EPSKERNELS_TEST_NO_LAUNCH", "1")
    x = torch.ones(2, 5)
    calls = {
        "step": lambda: epskernels.step(x, x, make_row(c_x=1), 0),
        "normal": lambda: epskernels.normal([1], (4,)),
        "moments": lambda: epskernels.moments(x),
    }
    with pytest.raises(RuntimeError, match="the CUDA kernel was not launched: invalid configuration; compiled for"):
        calls[run]()


# ---- rows that correct a band ----

# Triton's kernel has its band from tests/ops/test_triton.py.
by_band = pytest.mark.parametrize(
    "kernel", kernels.params([kernel for kernel in ON_DEVICE if kernel != "triton"]), indirect=True
)
ALL_SET = ("u", "m1", "m2", "v", "grad", "y", "rescale", "threshold", "seeds")
each_pair = pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(name, pair)))
BAND_SHAPES = [
    (2, 1), (3, 5), (2, 64), (1, 17), (2, 3, 1), (3, 3, 9), (2, 5, 16), (3, 2, 1, 1), (2, 3, 5, 7), (2, 3, 4, 8), (1, 2, 3, 12),
    (2, 3, 7, 16), (2, 1, 6, 33), (2, 2, 3, 5, 6), (2, 2, 3, 3, 8), (1, 1, 37, 1), (2, 2, 9, 520),
]  # fmt: skip


def wide(rows, dims, seed=0, idle=0.25):
    """Rows with columns of a band, some of which correct nothing."""
    g = torch.Generator().manual_seed(seed)
    band = torch.randn(len(rows), 4, generator=g)
    band[torch.rand(len(rows), 4, generator=g) < idle] = 0
    band[:, 3] = dims
    return torch.cat([rows, band], dim=1)


def check_band(rows, index, inputs):
    """x', m0 and y' have the reference's bits, and the doubled model input is of x' as it is stored."""
    x, f = inputs["x"], inputs["f"]
    model_input = torch.zeros(2 * len(x), *x.shape[1:], dtype=f.dtype)
    got = step(rows, index, inputs, return_m0=True, return_y="y" in inputs, model_input=model_input)
    expected = reference(rows, index, inputs)
    assert_all_same_bits(got, expected)
    c_in = rows[index, COLUMNS.index("c_in_next")].reshape(-1, *[1] * (x.dim() - 1))
    stored = (c_in * expected[0].float()).to(f.dtype)
    for half in model_input.chunk(2):
        assert_same_bits(half, stored, "model_input")


@pytest.mark.executed(cuda=2)
@by_band
@pytest.mark.parametrize("names", [(), COMMON_SET, ALL_SET], ids=["bare", "common", "all"])
@pytest.mark.parametrize("shape", BAND_SHAPES, ids=str)
@each_pair
def test_band_of_any_shape(kernel, dtypes, shape, names):
    inputs = make_inputs(shape, names, 15, *dtypes, special=0.02)
    rows = wide(random_rows(5, names, 16), band_dims_of(len(shape)), 17)
    for channels in (0, 1):
        rows[:, COLUMNS.index("guided_channels")] = channels
        check_band(rows, torch.tensor(3), inputs)
        check_band(rows, torch.arange(shape[0]) * 3 % 5, inputs)


@by_band
@pytest.mark.parametrize(
    "names", [("u",), ("m1",), ("seeds",), ("noise",), ("m1", "m2"), ("v", "grad", "noise")], ids="-".join
)
@each_pair
def test_band_of_any_tensors(kernel, dtypes, names):
    inputs = make_inputs((3, 2, 5, 24), names, 18, *dtypes)
    check_band(wide(random_rows(4, names, 19, idle=0), 2, 20, idle=0), torch.tensor([1, 3, 0]), inputs)


@by_band
@pytest.mark.parametrize(
    "layout", ["offset_by_one", "odd_batch_stride", "second_channel_half", "channels_last", "expanded_batch"]
)
@each_pair
def test_band_in_other_layouts(kernel, dtypes, layout):
    inputs = make_inputs((4, 6, 5, 8), ("u", "m1", "m2"), 21, *dtypes)
    inputs = {key: READ_LAYOUTS[layout](value) for key, value in inputs.items()}
    rows = wide(random_rows(4, ("u", "m1", "m2"), 22, idle=0), 2, 23)
    check_band(rows, torch.tensor(2), inputs)
    check_band(rows, torch.arange(4), inputs)
    if layout in LAYOUTS:
        expected = reference(rows, torch.arange(4), inputs)
        got = step(rows, torch.arange(4), inputs, out=inputs["x"], m0=inputs["m1"])
        assert got is inputs["x"]
        assert_all_same_bits((got, inputs["m1"]), expected)


@by_band
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 4, 8, 16), (3, 4, 20)], ids=str)
def test_band_in_place(kernel, shape):
    inputs = make_inputs(shape, COMMON_SET, 24)
    rows, index = (
        wide(random_rows(4, COMMON_SET, 25, idle=0), band_dims_of(len(shape)), 26, idle=0),
        torch.arange(shape[0]),
    )
    expected = reference(rows, index, inputs)
    model_input = torch.zeros(2 * shape[0], *shape[1:])
    step(rows, index, inputs, out=inputs["x"], m0=inputs["m1"], model_input=model_input)
    assert_all_same_bits((inputs["x"], inputs["m1"]), expected)


@by_band
@pytest.mark.parametrize("layout", ["wider", "strided_rows", "offset"])
def test_wide_rows_in_other_layouts(kernel, layout):
    inputs, rows = make_inputs((4, 3, 6, 8), COMMON_SET, 27), wide(random_rows(4, COMMON_SET, 28, idle=0), 2, 29)
    columns = rows.shape[1]
    view = {
        "wider": torch.full((4, columns + 4), float("nan"))[:, 4:],
        "strided_rows": torch.full((8, columns), float("nan"))[1::2],
        "offset": torch.full((4 * columns + 1,), float("nan"))[1:].view(4, columns),
    }[layout]
    view.copy_(rows)
    got = step(view, torch.arange(4), inputs)
    assert_same_bits(got, reference(rows, torch.arange(4), inputs)[0], "x'")


@by_band
@pytest.mark.parametrize("names", [(), ALL_SET], ids=["bare", "all"])
@pytest.mark.parametrize("dims", [0.0, 1.0, 3.0, -2.0, 2.5, float("nan")])
@pytest.mark.parametrize("shape", [(3, 2, 4, 8), (3, 2, 2, 5, 3)], ids=str)
def test_a_band_of_other_dimensions(kernel, shape, dims, names):
    inputs = make_inputs(shape, names, 30, special=0)
    rows = wide(random_rows(3, names, 31, idle=0), 2, 32, idle=0)
    rows[1, -1] = dims
    rows[2, -4:] = torch.tensor([0.0, -0.0, 0.0, 1.0])  # nothing is corrected: nothing is wrong
    check_only_bad_samples_are_nan(rows, torch.arange(3), inputs, {1})


@by_band
@pytest.mark.parametrize("dims", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300,), (3, 2, 2, 2, 2, 75)], ids=str)
def test_a_band_of_what_has_none(kernel, shape, dims):
    inputs = make_inputs(shape, ("seeds",), 33, special=0)
    rows = wide(random_rows(2, ("seeds",), 34, idle=0), dims, 35, idle=0)
    rows[0, -4:-1] = 0
    check_only_bad_samples_are_nan(rows, torch.arange(shape[0]) % 2, inputs, set(range(1, shape[0], 2)))


@by_band
@pytest.mark.parametrize("column", ["l_next", "l_m0", "l_x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coefficients_of_a_band_that_are_not_finite(kernel, column, value):
    inputs = make_inputs((2, 3, 4, 5), (), 36, special=0)
    rows = wide(random_rows(1, (), 37), 2, 38)
    rows[0, len(COLUMNS) + BAND_COLUMNS.index(column)] = value
    got = step(rows, torch.tensor(0), inputs, return_m0=True)
    assert_same_bits(got[1], reference(rows[:, : len(COLUMNS)], torch.tensor(0), inputs)[1], "m0")
    assert not got[0].isfinite().any()


@by_band
def test_the_host_checks_a_band_when_asked_to(kernel, monkeypatch):
    monkeypatch.setenv("EPSKERNELS_CHECK_ROWS", "1")
    inputs, index = make_inputs((2, 3, 4, 5), (), 39), torch.tensor([1, 0])
    rows = wide(random_rows(2, (), 40), 2, 41, idle=0)
    assert_all_same_bits((step(rows, index, inputs),), reference(rows, index, inputs)[:1])
    rows[0, -1] = 1
    with pytest.raises(
        RuntimeError,
        match=r"x: expected shape \(B, L\) or \(B, C, L\), as row 0 corrects a band of it, got \(2, 3, 4, 5\)",
    ):
        step(rows, index, inputs)


@by_band
def test_moments_of_wide_rows(kernel):
    inputs, rows = make_inputs((5, 3, 40), ("u",), 42, special=0), wide(random_rows(3, ("u",), 43), 1, 44)
    index = torch.tensor([2, 0, 1, 1, 0])
    got = kernel.op("moments")(inputs["f"], inputs["u"], rows, index)
    assert torch.equal(got, REFERENCE["moments"](inputs["f"], inputs["u"], rows, index))
    assert torch.equal(got, kernel.op("moments")(inputs["f"], inputs["u"], rows[:, : len(COLUMNS)].contiguous(), index))
