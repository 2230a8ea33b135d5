"""The kernels against the reference, bit for bit: each of tests/support/kernels.py::KERNELS.

Where the reference has NaN the kernel has NaN, of any payload; every other value has the same bits, the sign of zero
included.
"""

import inspect
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import epskernels
from epskernels import _C, samplers, schedule
from epskernels.ops import DTYPES, REFERENCE
from epskernels.spec import BAND_COLUMNS, band_dims_of
from epskernels.table import COLUMNS, SECOND_STATE

from ..support import kernels

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONAL = ("u", "m1", "m2", "v", "grad", "y", "rescale", "threshold", "noise", "seeds")
PER_SAMPLE = ("rescale", "threshold")  # one float32 number each
LIKE_F = ("f", "u", "v")  # in the model's dtype; the rest are in the state's
INTEGERS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
}  # fmt: skip
SPECIAL = torch.tensor(
    [
        0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"),
        2.0**-149, -(2.0**-149), 2.0**-127, 2.0**-126, 1e-30, -1e-40, 3.4e38, -3.4028234663852886e38,
        65504.0, 65519.996, 65520.0, -70000.0, 2.0**-14, 2.0**-15, 2.0**-24, 2.0**-25, -(2.0**-26), 6.1e-5,
    ]
)  # fmt: skip


def name(dtype):
    return str(dtype).removeprefix("torch.")


DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)
each_dtype_pair = pytest.mark.parametrize(
    "x_dtype, f_dtype", DTYPE_PAIRS, ids=[f"x_{name(x)}-f_{name(f)}" for x, f in DTYPE_PAIRS]
)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def assert_same_bits(got, expected, what):
    kernels.compared[kernels.current] += 1
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    got, expected = got.contiguous(), expected.contiguous()
    integers = INTEGERS[got.dtype]
    differ = (got.view(integers) != expected.view(integers)) & ~(got.isnan() & expected.isnan())
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        error = (got.double() - expected.double())[differ].abs().max().item()
        pytest.fail(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, max |difference| {error}; "
            f"first at {first}: got {got[first].item()!r}, expected {expected[first].item()!r}"
        )


def assert_all_same_bits(got, expected):
    for what, a, b in zip(RESULTS, got, expected, strict=False):
        assert_same_bits(a, b, what)
    assert len(got) == len(expected)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_row(**columns):
    """One row, every column idle but those given."""
    values = {"clip": float("inf"), "g": 1.0} | columns
    names = COLUMNS + BAND_COLUMNS if set(columns) & set(BAND_COLUMNS) else COLUMNS
    assert set(values) <= set(names)
    return torch.tensor([[values.get(column, 0.0) for column in names]], dtype=torch.float32)


def random_rows(count, names, seed, idle=0.25):
    """Rows that need no optional input but those named; of their coefficients, this fraction is idle."""
    g = generator(seed)
    shape = (count, len(COLUMNS))
    rows = torch.randn(shape, generator=g) * 10.0 ** torch.empty(shape).uniform_(-2, 1, generator=g)
    off = torch.rand(shape, generator=g) < idle
    has_noise = "noise" in names or "seeds" in names
    absent = {"c_m1": "m1" not in names, "c_m2": "m2" not in names, "c_noise": not has_noise}
    absent |= {"g": "u" not in names, "logvar_min": "v" not in names, "logvar_max": "v" not in names}
    absent |= dict.fromkeys(("c_y", *SECOND_STATE), "y" not in names)
    absent |= {"k_m1": "m1" not in names or "y" not in names, "k_m2": "m2" not in names or "y" not in names}
    for i, column in enumerate(COLUMNS):
        off[:, i] |= absent.get(column, False)
        rows[off[:, i], i] = 1.0 if column == "g" else float("inf") if column == "clip" else 0.0
    rows[:, COLUMNS.index("clip")].abs_()
    rows[:, COLUMNS.index("draw")] = torch.randint(0, 2**24, (count,), generator=g).float()
    rows[:, COLUMNS.index("guided_channels")] = torch.randint(0, 4, (count,), generator=g).float()
    return rows


def with_bands(rows, dims, seed, idle=0.25):
    """The rows with random columns of the band behind them; some correct none."""
    g = generator(seed)
    band = torch.randn(len(rows), 4, generator=g)
    band[torch.rand(band.shape, generator=g) < idle] = 0
    band[torch.rand(len(rows), generator=g) < idle] = 0
    band[:, 3] = dims
    return torch.cat([rows, band], 1)


def make_inputs(shape, names, seed, x_dtype=torch.float32, f_dtype=torch.float32, special=0.05):
    """x, f and the named optional inputs; this fraction of the elements is NaN, infinite, subnormal and the like."""
    g = generator(seed)
    inputs = {}
    for key in ("x", "f", *names):
        if key == "seeds":
            inputs[key] = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=g)
            continue
        if key in PER_SAMPLE:
            inputs[key] = torch.rand(shape[0], generator=g) + 0.1
            continue
        value = torch.randn(shape, generator=g)
        picked = SPECIAL[torch.randint(len(SPECIAL), shape, generator=g)]
        value = torch.where(torch.rand(shape, generator=g) < special, picked, value)
        inputs[key] = value.to(f_dtype if key in LIKE_F else x_dtype)
    return inputs


RESULTS = ("x'", "m0", "y'")


def reference(rows, index, inputs):
    """(x', m0), and y' where y is among the inputs, of the reference, from contiguous copies."""
    inputs = {key: value.clone(memory_format=torch.contiguous_format) for key, value in inputs.items()}
    return REFERENCE["step_y" if "y" in inputs else "step_m0"](rows=rows, index=index, **inputs)


def step(rows, index, inputs, **kwargs):
    """On the kernel that the test's fixture has made active."""
    inputs = dict(inputs)
    return epskernels.step(inputs.pop("x"), inputs.pop("f"), rows, index, **inputs, **kwargs)


def check(rows, index, inputs):
    got = step(rows, index, inputs, return_m0=True, return_y="y" in inputs)
    assert_all_same_bits(got, reference(rows, index, inputs))


@pytest.mark.parametrize("op", REFERENCE)
def test_a_compiled_kernel_is_registered(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"epskernels::{op}", "CPU")


# ---- every dtype, size, batch and set of inputs ----

INPUT_SETS = {
    "bare": (),
    "guidance_history": ("u", "m1", "m2"),
    "grad_noise": ("grad", "noise"),
    "seeds": ("seeds",),
    "learned_variance": ("v", "grad", "seeds"),
    "all_with_noise": ("u", "m1", "m2", "v", "grad", "noise"),
    "second_state": ("m1", "m2", "y", "seeds"),
    "all_with_seeds": ("u", "m1", "m2", "v", "grad", "y", "rescale", "threshold", "seeds"),
}
each_input_set = pytest.mark.parametrize("names", INPUT_SETS.values(), ids=list(INPUT_SETS))


@pytest.mark.executed(cuda=5)
@each_input_set
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 3, 63, 1000])
@each_dtype_pair
def test_step(kernel, x_dtype, f_dtype, size, batch, names):
    inputs = make_inputs((batch, size), names, size * 10 + batch, x_dtype, f_dtype)
    rows = random_rows(5, names, size + batch)
    check(rows, torch.tensor(3), inputs)
    check(rows, torch.arange(batch) * 3 % 5, inputs)


MIXED_PAIRS = [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("index", ["one_row", "row_each"])
@pytest.mark.parametrize("x_dtype, f_dtype", MIXED_PAIRS, ids=[f"x_{name(x)}-f_{name(f)}" for x, f in MIXED_PAIRS])
def test_step_of_many_tiles(kernel, x_dtype, f_dtype, index):
    names = ("u", "m1", "m2", "v", "grad", "y", "rescale", "threshold", "seeds")
    inputs = make_inputs((2, 65537), names, 0, x_dtype, f_dtype)
    rows = random_rows(2, names, 11, idle=0)
    for guided in (0, 1, 1500, 40000, 65536):  # channels of one element each
        rows[:, COLUMNS.index("guided_channels")] = guided
        check(rows, torch.tensor(1) if index == "one_row" else torch.tensor([1, 0]), inputs)


SUBSETS = [names for count in range(6) for names in itertools.combinations(OPTIONAL[:5], count)]


@pytest.mark.parametrize("noise", ["no_noise", "noise", "seeds"])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_step_with_every_subset_of_inputs(kernel, names, noise):
    names = names if noise == "no_noise" else (*names, noise)
    for x_dtype, f_dtype in ((torch.float32, torch.float32), (torch.float16, torch.bfloat16)):
        inputs = make_inputs((6, 21), names, 5, x_dtype, f_dtype)
        check(random_rows(6, names, len(names)), torch.arange(6), inputs)


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 5), (2, 1, 1, 1), (2, 3, 1, 5, 2, 2)], ids=str)
def test_step_of_any_rank(kernel, shape):
    names = ("u", "m1", "m2", "v", "grad", "seeds")
    check(random_rows(shape[0], names, 3), torch.arange(shape[0]), make_inputs(shape, names, 4))


@pytest.mark.parametrize("c_f", [0.0, 0.7], ids=["c_f_zero", "c_f"])
@pytest.mark.parametrize("clip", [0.0, 2.0**-130, 0.5, 3.0, float("inf")])
@each_dtype
def test_step_clamps(kernel, dtype, clip, c_f):
    row = make_row(d_x=1.25, d_f=-0.75, clip=clip, c_x=0.3, c_f=c_f, c_m0=1.5)
    check(row, torch.tensor(0), make_inputs((3, 1000), (), 8, dtype, dtype, special=0.3))


@pytest.mark.parametrize("scale", [1e-8, 6e-8, 1e-6, 6.1e-5, 1e4, 65504.0, 1e38])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_step_rounds_tiny_and_huge_results(kernel, dtype, scale):
    row = make_row(d_x=scale, d_f=0.3 * scale, c_x=0.9 * scale, c_f=0.2 * scale, c_m0=1e-3)
    check(row, torch.tensor(0), make_inputs((3, 4001), (), 9, dtype, torch.float32))


@pytest.mark.executed(cuda=1)
@pytest.mark.parametrize("special", [0.5, 1.0])
@each_dtype_pair
def test_step_of_special_values(kernel, x_dtype, f_dtype, special):
    names = ("u", "m1", "m2", "v", "grad", "y", "noise", "rescale", "threshold")
    inputs = make_inputs((8, 1000), names, 21, x_dtype, f_dtype, special)
    check(random_rows(8, names, 22), torch.arange(8), inputs)


@pytest.mark.parametrize("v", [-1e30, -300.0, -3.0, -1.0, 0.0, 1.0, 3.0, 300.0, 1e30, float("inf"), float("nan")])
def test_learned_variance_far_outside_its_range(kernel, v):
    inputs = make_inputs((2, 63), ("grad", "noise"), 2, special=0)
    inputs["v"] = torch.full((2, 63), v)
    bounds = ((-9, -2), (-200, 200))
    rows = [make_row(c_noise=1, c_grad=0.1, logvar_min=low, logvar_max=high) for low, high in bounds]
    check(torch.cat(rows), torch.arange(2), inputs)


# ---- rows: whose, and from where ----


def _tables():
    vp = schedule.linear()
    discrete = [
        samplers.ddpm(vp, 5, scaling=1.017, variance="learned_range", guidance=1.5),
        samplers.ddpm(vp, 7, variance="fixed_large"),
        samplers.ddim(vp, 4, scaling=1.0012, eta=0.5, direction="unscaled", guidance=7.5),
        samplers.dpmpp_2m(vp, 6, scaling=1.005, clip=1.0),
        samplers.plms(vp, 6, scaling=1.005),
        samplers.sa_solver(vp, 6, scaling=1.005),
    ]
    edm = [
        samplers.edm_heun(schedule.KarrasSchedule(), 6, scaling=0.9985, S_churn=20, S_noise=1.003),
        samplers.edm_euler(schedule.KarrasSchedule(), 9, scaling=1.0043),
        samplers.dpmpp_2m(schedule.KarrasSchedule(), 5, prediction="sample", scaling=1.003),
        samplers.dpmpp_sde(schedule.KarrasSchedule(), 5, scaling=1.003),
        samplers.seeds_3(schedule.KarrasSchedule(), 4, scaling=1.003),
    ]
    return {"discrete": epskernels.concat(discrete), "edm": epskernels.concat(edm)}


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("kind", ["discrete", "edm"])
@each_dtype
def test_batch_of_mixed_samplers(kernel, dtype, kind):
    table = _tables()[kind]
    batch = len(table)
    inputs = make_inputs((batch, 3, 7, 5), ("u", "m1", "m2", "v", "grad", "seeds", "y"), 31, dtype, dtype)
    permuted = torch.randperm(batch, generator=generator(1))
    check(table.rows, permuted, inputs)
    for i in range(batch):
        check(table.rows, table.row_index[i], {key: value[:2] for key, value in inputs.items()})


def test_rows_of_every_sampler(kernel):
    vp, karras, flow = schedule.linear(), schedule.KarrasSchedule(), schedule.FlowSchedule()
    rows = []
    for name, sampler in samplers.SAMPLERS.items():
        by_timesteps = "grid_options" in inspect.signature(sampler).parameters or name in ("lcm", "tcd")
        path = flow if name == "flow_euler" else vp if by_timesteps else karras
        rows.append(sampler(path, 5, scaling=1.003).rows)
    rows = torch.cat(rows)[:: 5 if kernel.name == "triton" else 1]  # whose interpreter takes 40 ms a row
    inputs = make_inputs((len(rows), 37), ("m1", "m2", "seeds", "y"), 33)
    check(rows, torch.arange(len(rows)), inputs)


@pytest.mark.parametrize("layout", ["wider", "strided_rows", "offset"])
def test_rows_in_other_layouts(kernel, layout):
    names = ("u", "m1", "m2", "v", "grad", "seeds")
    inputs, rows, columns = make_inputs((4, 63), names, 1), random_rows(4, names, 2), len(COLUMNS)
    if layout == "wider":
        view = torch.full((4, columns + 3), float("nan"))[:, 1 : columns + 1]
    elif layout == "strided_rows":
        view = torch.full((8, columns), float("nan"))[1::2]
    else:
        view = torch.full((4 * columns + 1,), float("nan"))[1:].view(4, columns)
    view.copy_(rows)
    got = step(view, torch.arange(4), inputs)
    assert_same_bits(got, reference(rows, torch.arange(4), inputs)[0], "x'")


def test_strided_and_expanded_index_and_seeds(kernel):
    names = ("noise",)
    rows = random_rows(3, names, 2, idle=0)
    inputs = make_inputs((6, 63), (), 1)
    strided = torch.tensor([2, 9, 0, 9, 1, 9, 1, 9, 2, 9, 0, 9])[::2]
    seeds = torch.randint(-(2**63), 2**63 - 1, (6, 3), generator=generator(4))
    for index, used in ((strided, seeds[:, 1]), (torch.tensor(1).expand(6), seeds[0, :1].expand(6))):
        expected = reference(rows, index.contiguous(), inputs | {"seeds": used.contiguous()})[0]
        assert_same_bits(step(rows, index, inputs | {"seeds": used}), expected, "x'")


# ---- layouts ----


def _filled(tensor, *shape):
    """A buffer of NaN: what lies between a view's elements must neither be read nor written."""
    return torch.full(shape, float("nan"), dtype=tensor.dtype)


def _copied(view, tensor):
    view.copy_(tensor)
    return view


def _sliced(tensor):
    b, c, h, w = tensor.shape
    return _copied(_filled(tensor, b, 2 * c, 3 * h, 2 * w)[:, ::2, 1::3, ::2], tensor)


LAYOUTS = {
    "contiguous": lambda t: _copied(_filled(t, *t.shape), t),
    "first_half_of_batch": lambda t: _copied(_filled(t, 2 * len(t), *t.shape[1:])[: len(t)], t),
    "second_half_of_batch": lambda t: _copied(_filled(t, 2 * len(t), *t.shape[1:])[len(t) :], t),
    "every_other_sample": lambda t: _copied(_filled(t, 2 * len(t), *t.shape[1:])[1::2], t),
    "first_channel_half": lambda t: _copied(_filled(t, len(t), 2 * t.shape[1], *t.shape[2:])[:, : t.shape[1]], t),
    "second_channel_half": lambda t: _copied(_filled(t, len(t), 2 * t.shape[1], *t.shape[2:])[:, t.shape[1] :], t),
    "odd_batch_stride": lambda t: _copied(_filled(t, len(t), t[0].numel() + 3)[:, :-3].unflatten(1, t.shape[1:]), t),
    "offset_by_one": lambda t: _copied(_filled(t, t.numel() + 1)[1:].view(t.shape), t),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: _copied(_filled(t, *t.transpose(1, 3).shape).transpose(1, 3), t),
    "batch_last": lambda t: _copied(_filled(t, *t.permute(1, 2, 3, 0).shape).permute(3, 0, 1, 2), t),
    "sliced": _sliced,
    "reversed_dims": lambda t: _copied(_filled(t, *t.shape[::-1]).permute(3, 2, 1, 0), t),
}  # fmt: skip
READ_LAYOUTS = LAYOUTS | {
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_channels": lambda t: t[:, :1].expand_as(t),
    "one_value": lambda t: t[:1, :1, :1, :1].expand_as(t),
}
ALL_TENSORS = ("u", "m1", "m2", "v", "grad", "noise", "y")
SHAPE = (4, 6, 5, 7)


@pytest.mark.interpreted(4)
@pytest.mark.parametrize("layout", READ_LAYOUTS)
@each_dtype
def test_layout_of_all_inputs(kernel, dtype, layout):
    inputs = make_inputs(SHAPE, ALL_TENSORS, 41, dtype, dtype)
    inputs = {key: READ_LAYOUTS[layout](value) for key, value in inputs.items()}
    check(random_rows(4, ALL_TENSORS, 42, idle=0), torch.arange(4), inputs)
    del inputs["noise"]
    check(random_rows(4, ALL_TENSORS, 42, idle=0), torch.tensor(2), inputs | {"seeds": torch.arange(4)})


@pytest.mark.parametrize("key", ("x", "f", *ALL_TENSORS))
@pytest.mark.parametrize(
    "layout", ["second_channel_half", "channels_last", "sliced", "expanded_batch", "offset_by_one"]
)
def test_layout_of_one_input(kernel, layout, key):
    inputs = make_inputs(SHAPE, ALL_TENSORS, 43, torch.bfloat16, torch.float16)
    inputs[key] = READ_LAYOUTS[layout](inputs[key])
    check(random_rows(4, ALL_TENSORS, 44, idle=0), torch.arange(4), inputs)


def test_guidance_and_learned_variance_from_one_model_output(kernel):
    """A doubled batch's output, each half with v in its second half of channels: four views of one buffer."""
    output = make_inputs((8, 6, 5, 5), (), 1)["f"]
    unconditional, conditional = output.chunk(2)
    (u, _), (f, v) = unconditional.chunk(2, dim=1), conditional.chunk(2, dim=1)
    inputs = make_inputs((4, 3, 5, 5), ("seeds",), 2) | {"f": f, "u": u, "v": v}
    check(random_rows(4, ("u", "v", "seeds"), 3, idle=0), torch.arange(4), inputs)


def _assert_nothing_written_around(view):
    base = view if view._base is None else view._base
    written = torch.zeros_like(base, dtype=torch.bool)
    written.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    assert base[~written].isnan().all()


@pytest.mark.executed(cuda=2)
@pytest.mark.parametrize("m0_layout", ["contiguous", "second_channel_half", "channels_last"])
@pytest.mark.parametrize("out_layout", LAYOUTS)
@each_dtype
def test_layout_of_outputs(kernel, dtype, out_layout, m0_layout):
    inputs = make_inputs(SHAPE, ALL_TENSORS, 45, dtype, dtype)
    rows, index = random_rows(4, ALL_TENSORS, 46, idle=0), torch.arange(4)
    expected = reference(rows, index, inputs)
    out, m0, y_out = (LAYOUTS[layout](inputs["x"] * 0) for layout in (out_layout, m0_layout, m0_layout))
    strides = out.stride(), m0.stride(), y_out.stride()
    assert step(rows, index, inputs, out=out, m0=m0, y_out=y_out) is out
    assert_all_same_bits((out, m0, y_out), expected)
    assert (out.stride(), m0.stride(), y_out.stride()) == strides
    for written in (out, m0, y_out):
        _assert_nothing_written_around(written)


@pytest.mark.executed(cuda=2)
@pytest.mark.parametrize("layout", ["contiguous", "second_channel_half", "odd_batch_stride", "channels_last"])
@pytest.mark.parametrize("halves", [1, 2], ids=["as_x", "doubled"])
@each_dtype_pair
def test_model_input(kernel, x_dtype, f_dtype, halves, layout):
    """The next row's c_in times x' as it is stored, in the model's dtype."""
    inputs = make_inputs(SHAPE, ("u", "seeds"), 47, x_dtype, f_dtype)
    rows, index = random_rows(4, ("u", "seeds"), 48, idle=0), torch.arange(4)
    out, _ = reference(rows, index, inputs)
    c_in = rows[:, COLUMNS.index("c_in_next")].reshape(4, 1, 1, 1)
    model_input = LAYOUTS[layout](torch.zeros(halves * SHAPE[0], *SHAPE[1:], dtype=f_dtype))
    assert_same_bits(step(rows, index, inputs, model_input=model_input), out, "x'")
    assert_same_bits(model_input, (c_in * out.float()).to(f_dtype).repeat(halves, 1, 1, 1), "model_input")
    _assert_nothing_written_around(model_input)


@pytest.mark.parametrize("index", ["one_row", "row_each"])
@pytest.mark.parametrize("size", [1, 37, 1024, 5000])
def test_model_input_beside_everything_else(kernel, index, size):
    inputs = make_inputs((3, size), OPTIONAL[:9], size, torch.bfloat16, torch.float16)
    rows = random_rows(3, OPTIONAL[:9], size, idle=0)
    index = torch.tensor(1) if index == "one_row" else torch.arange(3)
    expected = reference(rows, index, inputs)
    model_input = torch.zeros(6, size, dtype=torch.float16)
    got = step(rows, index, inputs, model_input=model_input, out=inputs["x"], y_out=inputs["y"], return_y=True)
    assert_all_same_bits(got, expected)
    c_in = rows[index, COLUMNS.index("c_in_next")].reshape(-1, 1)
    assert_same_bits(model_input, (c_in * expected[0].float()).to(torch.float16).repeat(2, 1), "model_input")


# ---- the low band of x' ----

BANDED = {
    "flat": (3, 37), "channels": (2, 3, 8), "long": (1, 2, 3001), "one": (2, 1), "column": (2, 2, 3, 1),
    "image": (2, 3, 8, 12), "odd": (2, 3, 7, 5), "odd_height": (2, 2, 9, 8), "odd_width": (2, 2, 6, 11),
    "wide": (1, 2, 3, 1030), "video": (2, 2, 3, 5, 6), "one_row": (2, 3, 1, 9), "tiles": (1, 2, 33, 64),
}  # fmt: skip


@pytest.mark.executed(cuda=3)
@pytest.mark.interpreted(1)
@pytest.mark.parametrize(
    "names", [(), ("u", "seeds"), INPUT_SETS["all_with_seeds"]], ids=["bare", "guidance_seeds", "all"]
)
@pytest.mark.parametrize("shape", BANDED.values(), ids=list(BANDED))
@pytest.mark.parametrize("x_dtype, f_dtype", MIXED_PAIRS, ids=[f"x_{name(x)}-f_{name(f)}" for x, f in MIXED_PAIRS])
def test_band(kernel, x_dtype, f_dtype, shape, names):
    """Rows that correct a band beside rows that do not; every output, one row for all and one for each, and in place."""
    dims, batch = band_dims_of(len(shape)), shape[0]
    rows = with_bands(random_rows(5, names, 61), dims, sum(shape))
    for index in (torch.tensor(3), torch.arange(batch) * 3 % 5):
        inputs = make_inputs(shape, names, 62, x_dtype, f_dtype)
        check(rows, index, inputs)
        expected, model_input = reference(rows, index, inputs), torch.zeros(2 * batch, *shape[1:], dtype=f_dtype)
        others = {"y_out": inputs["y"]} if "y" in inputs else {}  # and no m0, which the band takes all the same
        assert_same_bits(
            step(rows, index, inputs, out=inputs["x"], model_input=model_input, **others), expected[0], "x'"
        )
        c_in = rows[index, COLUMNS.index("c_in_next")].reshape(-1, *[1] * (len(shape) - 1))
        expected = (c_in * expected[0].float()).to(f_dtype)
        assert_same_bits(model_input, torch.cat([expected, expected]), "model_input")


@pytest.mark.interpreted(1)
@pytest.mark.parametrize(
    "layout", ["second_channel_half", "odd_batch_stride", "offset_by_one", "channels_last", "sliced"]
)
@each_dtype
def test_band_in_any_layout(kernel, dtype, layout):
    inputs = make_inputs(SHAPE, ALL_TENSORS, 63, dtype, dtype)
    rows, index = with_bands(random_rows(4, ALL_TENSORS, 64), 2, 65, idle=0), torch.arange(4)
    expected = reference(rows, index, inputs)
    laid = {key: LAYOUTS[layout](value) for key, value in inputs.items()}
    out = LAYOUTS[layout](inputs["x"] * 0)
    assert_all_same_bits(step(rows, index, laid, out=out, return_y=True), expected)
    _assert_nothing_written_around(out)


@pytest.mark.parametrize("over", ["m0", "y_out"])
@each_dtype
def test_band_beside_another_output_over_x(kernel, dtype, over):
    """The band reads x, m0 and x', wherever an output goes."""
    names = INPUT_SETS["second_state"]
    inputs, rows = make_inputs((2, 3, 5, 6), names, 66, dtype), with_bands(random_rows(2, names, 67), 2, 68, idle=0)
    expected = reference(rows, torch.arange(2), inputs)
    written = {"out": torch.zeros_like(inputs["x"]), "m0": torch.zeros_like(inputs["x"]), "y_out": inputs["m1"]}
    written[over] = inputs["x"]
    step(rows, torch.arange(2), inputs, **written)
    assert_all_same_bits(tuple(written.values()), expected)


def test_band_of_zeros_and_of_what_lies_outside(kernel):
    """-0 beside the zeros outside becomes +0, in two dimensions as in one, and a block that is whole stays -0."""
    for shape, dims in (((1, 3), 1), ((1, 1, 3, 3), 2), ((1, 1, 2, 3), 2), ((1, 1, 3, 2), 2)):
        x = torch.full(shape, -0.0)
        check(make_row(c_x=1, d_x=1, l_next=1, l_m0=1, band_dims=dims), torch.tensor(0), {"x": x, "f": x})


# ---- forms of the call ----


def _form_step_(kernel, given, arguments):
    kernel.op("step_")(**arguments)
    return (given["x"],)


def _form_step_with_m0_over_m1(kernel, given, arguments):
    kernel.op("step_")(**arguments, m0=given["m1"])
    return given["x"], given["m1"]


def _form_step_with_y_in_place(kernel, given, arguments):
    kernel.op("step_")(**arguments, m0=given["m2"], y_out=given["y"])
    return given["x"], given["m2"], given["y"]


def _form(out=None, m0=None, y_out=None, **returns):
    """epskernels.step with out, m0 and y_out the tensor named, or a "new" one."""

    def run(kernel, given, arguments):
        wanted = {"out": out, "m0": m0, "y_out": y_out}
        outputs = {key: given.get(target, given["x"].clone()) for key, target in wanted.items() if target}
        arguments["table"] = arguments.pop("rows")
        results = epskernels.step(**arguments, **outputs, **returns)
        results = results if returns else (results,)
        for key, result in zip(wanted, results, strict=False):
            assert key not in outputs or result is outputs[key]
        return results if returns or not m0 else (*results, outputs["m0"])

    return run


# Each returns x', and m0 and y' where the form gives them.
FORMS = {
    "functional": _form(),
    "return_m0": _form(return_m0=True),
    "return_y": _form(return_y=True),
    "m0": _form(m0="new"),
    "out": _form(out="new"),
    "out_and_return_m0": _form(out="new", return_m0=True),
    "out_and_return_y": _form(out="new", return_y=True),
    "in_place": _form(out="x"),
    "in_place_m0_over_m1": _form(out="x", m0="m1", return_m0=True),
    "in_place_y": _form(out="x", m0="m2", y_out="y", return_y=True),
    "y_over_m1": _form(y_out="m1", return_y=True),
    "m0_over_m2": _form(m0="m2", return_m0=True),
    "step_": _form_step_,
    "step_with_m0_over_m1": _form_step_with_m0_over_m1,
    "step_with_y_in_place": _form_step_with_y_in_place,
}
WRITES = {
    "in_place": {"x"}, "step_": {"x"}, "in_place_m0_over_m1": {"x", "m1"}, "step_with_m0_over_m1": {"x", "m1"},
    "m0_over_m2": {"m2"}, "in_place_y": {"x", "m2", "y"}, "step_with_y_in_place": {"x", "m2", "y"}, "y_over_m1": {"m1"},
}  # fmt: skip
WITH_Y = ("return_y", "out_and_return_y", "in_place_y", "y_over_m1", "step_with_y_in_place")


@pytest.mark.executed(cuda=2)
@pytest.mark.parametrize("layout", ["contiguous", "second_channel_half", "channels_last", "sliced"])
@pytest.mark.parametrize("form", FORMS)
@each_dtype
def test_form(kernel, dtype, form, layout):
    names = ALL_TENSORS if form in WITH_Y else ALL_TENSORS[:-1]
    inputs = make_inputs(SHAPE, names, 51, dtype, torch.float32)
    rows, index = random_rows(4, names, 52, idle=0), torch.arange(4)
    expected = reference(rows, index, inputs)
    given = {key: LAYOUTS[layout](value) for key, value in inputs.items()}
    results = FORMS[form](kernel, given, {"rows": rows, "index": index} | given)
    assert_all_same_bits(results, expected[: len(results)])
    for key in set(inputs) - WRITES.get(form, set()):
        assert_same_bits(given[key], inputs[key], key)
    for key in WRITES.get(form, set()):
        _assert_nothing_written_around(given[key])


MAY_BE_OVERWRITTEN = [None, "x", "f", *ALL_TENSORS]


@pytest.mark.parametrize("apart", range(1, len(MAY_BE_OVERWRITTEN)))
@pytest.mark.parametrize("i", range(len(MAY_BE_OVERWRITTEN)), ids=MAY_BE_OVERWRITTEN)
def test_any_input_may_be_overwritten(kernel, i, apart):
    """By out, and at once another, so far after it in the list, by m0."""
    out, m0 = MAY_BE_OVERWRITTEN[i], MAY_BE_OVERWRITTEN[(i + apart) % len(MAY_BE_OVERWRITTEN)]
    for dtype in (torch.float32, torch.float16):
        inputs = make_inputs((2, 1100), ALL_TENSORS, 53, dtype, dtype)
        rows, index = random_rows(2, ALL_TENSORS, 54, idle=0), torch.arange(2)
        expected = reference(rows, index, inputs)
        got = step(rows, index, inputs, out=inputs.get(out), m0=inputs.get(m0), return_y=True)
        assert_all_same_bits(got, expected)


@pytest.mark.parametrize("y_out", ["x", "f", *ALL_TENSORS])
def test_any_input_may_be_overwritten_by_y(kernel, y_out):
    for dtype in (torch.float32, torch.float16):
        inputs = make_inputs((2, 1100), ALL_TENSORS, 55, dtype, dtype)
        rows, index = random_rows(2, ALL_TENSORS, 56, idle=0), torch.arange(2)
        expected = reference(rows, index, inputs)
        assert_all_same_bits(step(rows, index, inputs, y_out=inputs[y_out], return_y=True), expected)


@pytest.mark.parametrize("kernel", kernels.CPU_KERNELS, indirect=True)
@pytest.mark.parametrize("shape", [(3, 65537), (1, 70000), (300, 1000)], ids=str)
@each_dtype
def test_threads_do_not_change_bits(kernel, two_threads, dtype, shape):
    names = ("u", "m1", "m2", "v", "grad", "y", "rescale", "threshold", "seeds")
    inputs = make_inputs(shape, names, 61, dtype, dtype)
    rows, index = random_rows(3, names, 62, idle=0), torch.arange(shape[0]) % 3
    two = step(rows, index, inputs, return_y=True)
    torch.set_num_threads(1)
    assert_all_same_bits(step(rows, index, inputs, return_y=True), two)


@pytest.mark.parametrize(
    "kernel", [name for name in kernels.CPU_KERNELS if name not in _C.cpu_capabilities()[:-1]], indirect=True
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=() if d is torch.bfloat16 else pytest.mark.deep) for d in DTYPES], ids=name
)
def test_a_state_larger_than_the_caches(kernel, dtype):
    """Which goes past them: 32 MiB and some."""
    inputs = make_inputs((2, 2**23 + 5), ("y",), 63, dtype, torch.float32)
    rows, index = random_rows(2, ("y",), 64, idle=0), torch.arange(2)
    expected, model_input = reference(rows, index, inputs), torch.zeros(4, 2**23 + 5)
    for out in (torch.zeros_like(inputs["x"]), torch.zeros(2, 2**23 + 9, dtype=dtype)[:, 3:-1]):
        got = step(rows, index, inputs, out=out, return_y=True, model_input=model_input)
        assert_all_same_bits(got, expected)
    c_in = rows[:, COLUMNS.index("c_in_next")].reshape(-1, 1)
    assert_same_bits(model_input, (c_in * expected[0].float()).repeat(2, 1), "model_input")


# ---- properties ----

_wide = st.floats(width=32, allow_nan=False, allow_infinity=False)
_coefficient = st.one_of(st.just(0.0), st.sampled_from([1.0, -1.0, 0.5]), st.floats(-4, 4, width=32), _wide)


@st.composite
def _random_row(draw, names):
    row = dict.fromkeys(COLUMNS, 0.0) | {"g": 1.0}
    row["clip"] = draw(st.one_of(st.just(float("inf")), st.just(0.0), st.floats(0, 3, width=32), _wide.map(abs)))
    for column, needs in (
        ("d_x", ()), ("d_f", ()), ("c_x", ()), ("c_f", ()), ("c_m0", ()), ("c_grad", ()), ("c_m1", ("m1",)),
        ("c_m2", ("m2",)), ("c_noise", ("noise", "seeds")), ("logvar_min", ("v",)), ("logvar_max", ("v",)),
        ("c_y", ("y",)), ("k_x", ("y",)), ("k_m0", ("y",)), ("k_y", ("y",)),
    ):  # fmt: skip
        if not needs or set(needs) & set(names):
            row[column] = draw(_coefficient)
    for column, history in (("k_m1", "m1"), ("k_m2", "m2")):
        if {"y", history} <= set(names):
            row[column] = draw(_coefficient)
    row["guided_channels"] = float(draw(st.integers(0, 20)))
    if "u" in names:
        row["g"] = draw(st.one_of(st.just(1.0), _coefficient))
    row["draw"] = float(draw(st.integers(0, 2**24 - 1)))
    return [row[column] for column in COLUMNS]


@st.composite
def _random_call(draw):
    names = draw(st.sets(st.sampled_from(OPTIONAL[:8]))) | draw(st.sampled_from([set(), {"noise"}, {"seeds"}]))
    names = tuple(key for key in OPTIONAL if key in names)
    batch, size = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 33, 65]))
    rows = torch.tensor(draw(st.lists(_random_row(names), min_size=1, max_size=3)))
    last = len(rows) - 1
    index = draw(st.one_of(st.integers(0, last), st.lists(st.integers(0, last), min_size=batch, max_size=batch)))
    x_dtype, f_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    kind, seed = draw(st.sampled_from(["normal", "special", "bits"])), draw(st.integers(0, 2**32))
    inputs = make_inputs((batch, size), names, seed, x_dtype, f_dtype, special=0.5 if kind == "special" else 0.0)
    if kind == "bits":
        for key, value in inputs.items():
            if value.dtype.is_floating_point and key not in PER_SAMPLE:
                bits = torch.randint(-(2**31), 2**31, value.shape, generator=generator(seed), dtype=torch.int64)
                inputs[key] = bits.to(INTEGERS[value.dtype]).view(value.dtype)
                seed += 1
    return rows, torch.tensor(index), inputs


@pytest.mark.parametrize("examples", [50, pytest.param(250, marks=pytest.mark.deep)])
def test_step_of_random_rows_and_inputs(kernel, examples):
    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(call=_random_call())
    def check_random_call(call):
        check(*call)

    check_random_call()


# ---- the order of the columns, and idle terms ----

MINUS_ZERO = torch.full((2, 63), -0.0)  # added, or multiplied by 0 and added, it changes no bit of the others


def _distinct():
    """Every tensor another number, so that a term taken for another shows."""
    inputs = {key: torch.full((2, 63), 2.0 + i) for i, key in enumerate(("x", "f", *ALL_TENSORS))}
    return inputs | {"v": torch.full((2, 63), -1.0)}


# column, the other columns that it shows through, and what x' and m0 then are.
ONE_HOT = {
    "d_x": ({"d_x": 1}, None, "x"),
    "d_f": ({"d_f": 1}, None, "f"),
    "d_f_guided": ({"d_f": 1, "g": 0}, None, "u"),
    "c_x": ({"c_x": 1}, "x", None),
    "c_f": ({"c_f": 1}, "f", None),
    "c_f_guided": ({"c_f": 1, "g": 0}, "u", None),
    "c_m0_of_x": ({"c_m0": 1, "d_x": 1}, "x", "x"),
    "c_m0_of_f": ({"c_m0": 1, "d_f": 1}, "f", "f"),
    "c_m1": ({"c_m1": 1}, "m1", None),
    "c_m2": ({"c_m2": 1}, "m2", None),
    "c_y": ({"c_y": 1}, "y", None),
    "c_grad": ({"c_grad": 1}, "grad", None),
    "c_noise": ({"c_noise": 1}, "noise", None),
}


@pytest.mark.parametrize("case", ONE_HOT)
@each_dtype
def test_one_hot(backend, dtype, case):
    columns, next_x, m0 = ONE_HOT[case]
    inputs = {key: value.to(dtype) for key, value in _distinct().items()}
    zero = torch.zeros(2, 63, dtype=dtype)
    rest = dict(inputs)
    got = epskernels.step(rest.pop("x"), rest.pop("f"), make_row(**columns), 0, **rest, return_m0=True)
    assert torch.equal(got[0], zero if next_x is None else inputs[next_x])
    assert torch.equal(got[1], zero if m0 is None else inputs[m0])


def test_guidance_column(backend):
    inputs = _distinct()
    row = make_row(d_f=1, g=3)
    _, m0 = epskernels.step(inputs["x"], inputs["f"], row, 0, u=inputs["u"], return_m0=True)
    assert torch.equal(m0, inputs["u"] + 3 * (inputs["f"] - inputs["u"]))


# column, the others that it shows through, and what y' then is.
ONE_HOT_Y = {
    "k_x": ({"k_x": 1}, "x"), "k_m0": ({"k_m0": 1, "d_x": 1}, "x"), "k_m1": ({"k_m1": 1}, "m1"), "k_m2": ({"k_m2": 1}, "m2"),
    "k_y": ({"k_y": 1}, "y"), "none": ({"c_y": 1}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_HOT_Y)
@each_dtype
def test_one_hot_second_state(backend, dtype, case):
    columns, second = ONE_HOT_Y[case]
    inputs = {key: value.to(dtype) for key, value in _distinct().items()}
    rest = dict(inputs)
    got = epskernels.step(rest.pop("x"), rest.pop("f"), make_row(**columns), 0, **rest, return_y=True)
    assert torch.equal(got[2], torch.zeros(2, 63, dtype=dtype) if second is None else inputs[second])


@pytest.mark.parametrize("channels", [0, 1, 2, 5, 6, 7])
def test_guided_channels_column(backend, channels):
    x, f, u = (torch.full((2, 6, 3, 3), value) for value in (1.0, 2.0, 5.0))
    got = epskernels.step(x, f, make_row(c_f=1, g=3, guided_channels=channels), 0, u=u)
    guided = 6 if channels == 0 else min(channels, 6)
    assert torch.equal(got[:, :guided], torch.full((2, guided, 3, 3), -4.0))
    assert torch.equal(got[:, guided:], f[:, guided:])


def test_c_in_next_column(backend):
    x, model_input = torch.full((2, 63), 3.0), torch.zeros(4, 63)
    got = epskernels.step(x, x, make_row(c_x=2, c_in_next=0.25), 0, model_input=model_input)
    assert (got == 6).all() and (model_input == 1.5).all()


def test_rescale(backend):
    """Of the guided output, which m0 and c_f then see."""
    x, f, u = (torch.full((2, 63), value) for value in (0.0, 2.0, 5.0))
    rescale = torch.tensor([0.5, 2.0])
    got, m0 = epskernels.step(x, f, make_row(c_f=1, d_f=3, g=3), 0, u=u, rescale=rescale, return_m0=True)
    assert torch.equal(got[:, 0], -4 * rescale) and torch.equal(m0[:, 0], -12 * rescale)
    assert torch.equal(epskernels.step(x, f, make_row(c_f=1), 0, rescale=rescale)[:, 0], 2 * rescale)


def test_threshold(backend):
    """After the clip: m0 is held to it, and then divided by it."""
    x = torch.tensor([-8.0, -1.0, -0.0, 0.5, 2.0, 8.0]).repeat(3, 1)
    threshold = torch.tensor([1.0, 2.0, 4.0])
    got, m0 = epskernels.step(x, x, make_row(c_m0=1, d_x=1, clip=3), 0, threshold=threshold, return_m0=True)
    held = x.clamp(-3, 3).clamp(-threshold[:, None], threshold[:, None]) / threshold[:, None]
    assert torch.equal(m0, held) and torch.equal(got, held)


@pytest.mark.parametrize("key", PER_SAMPLE)
def test_nan_of_a_sample_makes_that_sample_nan(backend, key):
    x, value = torch.ones(3, 63), torch.tensor([1.0, float("nan"), 1.0])
    got = epskernels.step(x, x, make_row(c_m0=1, d_f=1), 0, **{key: value})
    assert got[1].isnan().all() and got[0].isfinite().all() and got[2].isfinite().all()


@pytest.mark.parametrize("x, clamped", [(-9.0, -0.5), (-0.25, -0.25), (0.25, 0.25), (9.0, 0.5)])
def test_clip_column(backend, x, clamped):
    x = torch.full((2, 63), x)
    got, m0 = epskernels.step(x, MINUS_ZERO, make_row(d_x=1, c_m0=1, clip=0.5), 0, return_m0=True)
    assert (m0 == clamped).all() and (got == clamped).all()


@pytest.mark.parametrize("column, v", [("logvar_min", -1.0), ("logvar_max", 1.0)])
@pytest.mark.parametrize("term", ["noise", "grad"])
def test_learned_variance_columns(backend, column, v, term):
    """At v = -1 the variance is exp(logvar_min), at v = 1 exp(logvar_max), and the other bound has no weight."""
    row = make_row(**{f"c_{term}": 1, column: np.log(0.04), ({"logvar_min", "logvar_max"} - {column}).pop(): 50.0})
    got = epskernels.step(MINUS_ZERO, MINUS_ZERO, row, 0, v=torch.full((2, 63), v), **{term: torch.ones(2, 63)})
    assert got.sub(0.2 if term == "noise" else 0.04).abs().max() < 1e-6


def test_draw_column(backend):
    rows = torch.cat([make_row(c_noise=1, draw=draw) for draw in (0, 1, 2**24 - 1)])
    got = epskernels.step(MINUS_ZERO, MINUS_ZERO, rows, torch.tensor([2, 1]), seeds=torch.tensor([7, 8]))
    expected = [epskernels.normal([seed], (63,), draw=draw, stream=0) for seed, draw in ((7, 2**24 - 1), (8, 1))]
    assert torch.equal(got, torch.cat(expected))


@pytest.mark.parametrize("column", ["t", "c_in"])
def test_columns_for_the_model_do_not_enter(backend, column):
    inputs = _distinct()
    rows = random_rows(1, ALL_TENSORS, 5, idle=0)
    other = rows.clone()
    other[0, COLUMNS.index(column)] = 1e30
    x, f = inputs.pop("x"), inputs.pop("f")
    got = [epskernels.step(x, f, table, 0, **inputs, return_y=True) for table in (rows, other)]
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


IDLE = {
    "u": {"g": 1.0}, "m1": {"c_m1": 0.0, "k_m1": 0.0}, "m2": {"c_m2": 0.0, "k_m2": 0.0}, "y": {"c_y": 0.0, "k_y": 0.0},
    "grad": {"c_grad": 0.0}, "noise": {"c_noise": 0.0}, "v": {"logvar_min": 0.0, "logvar_max": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", IDLE)
@each_dtype
def test_idle_term_is_left_out(backend, dtype, key, poison):
    """In a batch whose other sample uses the term."""
    inputs = make_inputs((2, 63), ALL_TENSORS, 71, dtype, dtype, special=0)
    rows = random_rows(2, ALL_TENSORS, 72, idle=0)
    for column, value in IDLE[key].items():
        rows[1, COLUMNS.index(column)] = value
    inputs[key][1] = poison
    alone = {k: value[1:] for k, value in inputs.items() if k != key}
    got = epskernels.step(inputs.pop("x"), inputs.pop("f"), rows, torch.arange(2), **inputs, return_y=True)
    expected = epskernels.step(alone.pop("x"), alone.pop("f"), rows, 1, **alone, return_y=True)
    assert_all_same_bits([result[1:] for result in got], expected)
    assert expected[0].isfinite().all()


def test_all_idle_terms_at_once(backend):
    inputs = make_inputs((2, 1000), (), 73, special=0)
    nan = torch.full((2, 1000), float("nan"))
    row = make_row(d_x=1.5, d_f=-0.5, c_x=0.25, c_m0=0.5, clip=1)
    got = epskernels.step(**inputs, table=row, index=0, u=nan, m1=nan, m2=nan, v=nan, grad=nan, noise=nan, y=nan)
    assert_same_bits(got, epskernels.step(**inputs, table=row, index=0), "x'")
    assert got.isfinite().all()


def test_absent_grad_is_left_out_of_rows_that_take_one(backend):
    inputs = make_inputs((2, 63), (), 74)
    row = make_row(d_x=1.5, d_f=-0.5, c_x=0.25, c_m0=0.5)
    with_grad = row.clone()
    with_grad[0, COLUMNS.index("c_grad")] = 3.0
    got = epskernels.step(**inputs, table=with_grad, index=0)
    assert_same_bits(got, epskernels.step(**inputs, table=row, index=0), "x'")


# ---- conversions ----


def _every_pattern(dtype, width):
    """All 2^16 bit patterns as samples of this many elements: 4 never fill a vector, 65536 nearly always do."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, width)


# One input passed on; 0 times the others, or times a clamped value, is a zero whose sign changes nothing.
PASSED = {
    "x": {"c_x": 1, "d_x": 1, "clip": 1},
    "f": {"c_f": 1, "d_f": 1, "clip": 1},
    "u": {"c_f": 1, "g": 0, "d_f": 1, "clip": 1},
    "m1": {"c_m1": 1}, "m2": {"c_m2": 1}, "grad": {"c_grad": 1}, "noise": {"c_noise": 1}, "y": {"c_y": 1},
}  # fmt: skip


@pytest.mark.executed(cuda=1)
@pytest.mark.parametrize("width", [4, 65536])
@pytest.mark.parametrize("key", PASSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_every_half_precision_number_passes_through(backend, dtype, key, width):
    every = _every_pattern(dtype, width)
    if key == "u":  # u + 0*(f - u) is NaN for an infinite u, and 0 for -0
        every = torch.where(every.isinf() | (every == 0), 0, every)
    zero = torch.full_like(every, -0.0)
    inputs = {"x": zero, "f": zero} | {key: every}
    got = epskernels.step(inputs.pop("x"), inputs.pop("f"), make_row(**PASSED[key]), 0, **inputs)
    assert_same_bits(got, every, "x'")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_every_half_precision_state_as_m0(backend, dtype):
    """m0 is not clamped here, and so infinities stay."""
    every = _every_pattern(dtype, 65536)
    _, m0 = epskernels.step(every, torch.full_like(every, -0.0), make_row(d_x=1), 0, return_m0=True)
    assert_same_bits(m0, every, "m0")


@pytest.mark.parametrize("width", [4, 65536])
@pytest.mark.parametrize("key", ["x", "f"])
def test_float16_where_the_processor_flushes_subnormals(kernel, key, width):
    """Those of float16 are none in float32, and stay."""
    every = _every_pattern(torch.float16, width)
    zero, model_input = torch.full_like(every, -0.0), torch.empty_like(every)
    row = make_row(c_in_next=1, **PASSED[key])
    assert torch.set_flush_denormal(True)
    try:
        got = epskernels.step(**{"x": zero, "f": zero, key: every}, table=row, index=0, model_input=model_input)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, every, "x'")
    assert_same_bits(model_input, every, "the model's next input")


@pytest.mark.parametrize("state", DTYPES, ids=lambda dtype: f"to_{name(dtype)}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_every_half_precision_model_output_as_m0(backend, dtype, state):
    every = _every_pattern(dtype, 65536)
    x = torch.full(every.shape, -0.0, dtype=state)
    _, m0 = epskernels.step(x, every, make_row(d_f=1), 0, return_m0=True)
    assert_same_bits(m0, every.to(state), "m0")


def _dense_float32():
    """Every top 19 bits with low bits at, just below and just above the ties of both half precisions, and all ties."""
    top = torch.arange(-(2**18), 2**18).to(torch.int32) << 13
    dense = torch.cat([top | low for low in (0, 0x0FFF, 0x1000, 0x1001, 0x1FFF)]).view(torch.float32)
    half = torch.arange(0x7C00).to(torch.int16).view(torch.float16).double()
    ties = ((half[1:] + half[:-1]) / 2).float()
    near = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0)])
    return torch.cat([dense, near, -near])


@pytest.mark.parametrize("width", [7, None], ids=["short_samples", "one_sample"])
@pytest.mark.parametrize("output", ["x'", "m0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_results_are_rounded_as_torch_rounds(kernel, dtype, output, width):
    f = _dense_float32()
    if width:
        f = f[::5]
        f = f[: f.numel() // width * width]
    f = f.reshape(-1, width or f.numel())
    x = torch.full(f.shape, -0.0, dtype=dtype)
    row = make_row(c_f=1, d_f=1, clip=1) if output == "x'" else make_row(d_f=1)
    got = step(row, 0, {"x": x, "f": f}, return_m0=True)
    assert_same_bits(got[output == "m0"], f.to(dtype), output)


@each_dtype_pair
@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([2, 0])], ids=["one_row", "row_each"])
def test_step_plain_is_step(kernel, index, x_dtype, f_dtype):
    inputs = make_inputs((2, 3, 333), (), 83, x_dtype, f_dtype)
    arguments = (inputs["x"], inputs["f"], random_rows(3, (), 84), index)
    assert_same_bits(kernel.op("step_plain")(*arguments), kernel.op("step")(*arguments), "step_plain")


# ---- what torch.compile is told ----

OPCHECK_SETS = {
    "bare": (),
    "history": ("m1", "m2"),
    "seeds": ("u", "seeds"),
    "all_with_noise": (*ALL_TENSORS, "rescale", "threshold"),
}


@pytest.mark.parametrize("index", ["one_row", "row_each"])
@pytest.mark.parametrize("names", OPCHECK_SETS.values(), ids=list(OPCHECK_SETS))
@pytest.mark.parametrize("op", ["step", "step_m0", "step_y", "step_out", "step_out_all", "step_", "step_with_all"])
def test_opcheck_step(op, names, index):
    inputs = make_inputs((2, 3, 5), names, 81, special=0)
    writes_y = op == "step_y" or op.endswith("_all")
    rows = random_rows(2, names if writes_y else tuple(name for name in names if name != "y"), 82)
    arguments = (inputs.pop("x"), inputs.pop("f"), rows, torch.tensor(1) if index == "one_row" else torch.arange(2))
    if op.startswith("step_out"):
        inputs["out"] = torch.zeros(2, 3, 5)
    if op.endswith("_all"):
        inputs |= {"m0": torch.zeros(2, 3, 5), "y_out": torch.zeros(2, 3, 5), "model_input": torch.zeros(4, 3, 5)}
    op = {"step_out_all": "step_out", "step_with_all": "step_"}.get(op, op)
    overload = getattr(torch.ops.epskernels, op).default
    torch.library.opcheck(overload, arguments, inputs)


@pytest.mark.parametrize("index", [torch.tensor(1), torch.arange(2)], ids=["one_row", "row_each"])
def test_opcheck_step_plain(index):
    inputs = make_inputs((2, 3, 5), (), 81, special=0)
    torch.library.opcheck(torch.ops.epskernels.step_plain.default, (*inputs.values(), random_rows(2, (), 82), index))


@pytest.mark.parametrize("shape", [[], [5], [3, 4, 5]], ids=str)
@each_dtype
def test_opcheck_normal(dtype, shape):
    arguments, kwargs = (torch.tensor([1, -2]), shape), {"dtype": dtype, "draw": 3, "stream": 0}
    overload = torch.ops.epskernels.normal.default
    torch.library.opcheck(overload, arguments, kwargs)


FAKE_LAYOUTS = {key: READ_LAYOUTS[key] for key in READ_LAYOUTS} | {
    "first_sample_of_channel_half": lambda t: READ_LAYOUTS["first_channel_half"](t)[:1],
    "single_channel": lambda t: t[:, :1],
    "every_other_element": lambda t: t.flatten()[::2],
}


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("layout", FAKE_LAYOUTS)
def test_outputs_are_laid_out_as_foretold(kernel, layout, kind):
    x = FAKE_LAYOUTS[layout](torch.randn(SHAPE, generator=generator(1)))
    arguments = [x, x.clone(), make_row(c_x=1), torch.tensor(0)]
    mode = torch._subclasses.FakeTensorMode()
    for name in ("step", "step_m0", "step_y"):
        op, real = getattr(torch.ops.epskernels, name), kernel.op(name)(*arguments)
        if kind == "fake":
            with mode:
                told = op(*(mode.from_tensor(tensor) for tensor in arguments))
        else:
            told = op(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in arguments))
        with epskernels.use_backend("reference"):
            standing_in = epskernels.step(*arguments, return_m0=name == "step_m0", return_y=name == "step_y")
        results = [[t] if isinstance(t, torch.Tensor) else t for t in (real, told, standing_in)]
        for a, b, c in zip(*results, strict=True):
            assert a.shape == b.shape == c.shape == x.shape and a.dtype == b.dtype == c.dtype
            # A dimension of one element may have any stride, and torch.empty_like itself tells another than it makes.
            long = [d for d in range(x.dim()) if x.shape[d] > 1]
            assert [a.stride(d) for d in long] == [b.stride(d) for d in long] == [c.stride(d) for d in long]
