"""Bad input: an error that names the argument, the same from the compiled ops and the reference, before any write.

And its other side: what looks odd but is allowed (in place, interleaved, expanded, inference mode) gives the usual
bits.
"""

import inspect
import itertools
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import epskernels
from epskernels import Table, ops, samplers, scaling, schedule
from epskernels.ops import backends
from epskernels.spec import BAND_COLUMNS
from epskernels.table import COLUMNS, SECOND_STATE

from ..support import kernels

pytestmark = pytest.mark.usefixtures("extension")

BATCH, SHAPE = 3, (3, 2, 5)
LIKE_X, LIKE_F = ("m1", "m2", "y", "grad", "noise"), ("u", "v")
FLOATS = ("x", "f", *LIKE_F, *LIKE_X)
PER_SAMPLE = ("rescale", "threshold")
TENSORS = (*FLOATS, "rows", "index", "seeds", *PER_SAMPLE)
SENTINEL = 12345.0
R = re.escape


ON_HOST = [name for name in kernels.HOST_KERNELS if not kernels.Kernel(name).reads_rows]


@pytest.fixture(params=["compiled", "reference", *ON_HOST])
def backend(request, monkeypatch):
    monkeypatch.setenv("EPSKERNELS_CHECK_ROWS", "1")  # where the kernel itself would answer with NaN
    with epskernels.use_backend("auto" if request.param == "compiled" else request.param):
        yield request.param


def op(backend, name):
    if backend == "reference":
        return ops.REFERENCE[name]
    return getattr(torch.ops.epskernels, name) if backend == "compiled" else kernels.overload(backend, name)


def make_row(**coefficients):
    values = {"clip": np.inf, "g": 1.0, "c_in": 1.0} | coefficients
    return [values.get(column, 0.0) for column in COLUMNS]


def make_rows():
    """A row that asks for every tensor, one with the least, one that makes noise."""
    everything = make_row(
        d_x=0.9, d_f=-0.4, clip=2.0, g=1.5, c_x=0.6, c_f=0.1, c_m0=0.3, c_m1=-0.2, c_m2=0.1, c_grad=0.05, c_noise=0.3,
        c_y=0.07, logvar_min=-1.0, logvar_max=0.5, draw=7.0, guided_channels=1.0, c_in_next=0.5,
    )  # fmt: skip
    plain = make_row(d_x=1.1, d_f=-0.3, c_x=0.5, c_m0=0.5)
    noisy = make_row(d_x=1.1, d_f=-0.3, c_x=0.5, c_m0=0.5, c_noise=0.2, draw=3.0)
    return torch.tensor([everything, plain, noisy])


def good(**changes):
    """Arguments that every op takes, with changes; None leaves an argument out."""
    generator = torch.Generator().manual_seed(1)
    a = {name: torch.randn(SHAPE, generator=generator) for name in FLOATS if name != "noise"}
    a |= {"rows": make_rows(), "index": torch.zeros(BATCH, dtype=torch.int64), "seeds": torch.arange(5, 5 + BATCH)}
    a |= {"rescale": torch.tensor([0.9, 1.0, 1.1]), "threshold": torch.tensor([1.5, 1.0, 2.0])}
    return {name: value for name, value in (a | changes).items() if value is not None or name in changes}


def with_noise(**changes):
    return good(**({"seeds": None, "noise": torch.ones(SHAPE)} | changes))


def complete(name, value=None):
    """Good arguments with this one among them, as `value` where given."""
    make = with_noise if name == "noise" else good
    return make() if value is None else make(**{name: value})


def call(a, **outputs):
    a = dict(a)
    return epskernels.step(a.pop("x"), a.pop("f"), a.pop("rows"), a.pop("index"), **a, **outputs)


def memory(tensor):
    """All bytes of the storage, what lies beside the tensor included."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return None
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def unchanged(before, after):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(before, after, strict=True))


def refused(backend, a, message, how, **outputs):
    """The op raises RuntimeError with this message and leaves all memory that it was given as it was."""
    held = [*a.values(), *outputs.values()]
    before = [memory(value) for value in held]
    with pytest.raises(RuntimeError, match=message):
        if how == "step_":
            op(backend, "step_")(**a, **{key: value for key, value in outputs.items() if key not in ("out", "x")})
        else:
            call(a, **outputs, return_m0=how == "step_m0", return_y=how == "step_y")
    assert unchanged(before, [memory(value) for value in held])


# ---- inputs ----


def dtypes(*names):
    return [getattr(torch, name) for name in names]


NOT_FLOATS = dtypes("float64", "int64", "int32", "uint8", "bool", "complex64")
SHAPES = {
    "other batch": (BATCH + 1, 2, 5),
    "batch of one": (1, 2, 5),
    "other sample": (BATCH, 2, 6),
    "other rank": (BATCH, 10),
    "no dimensions": (),
    "no elements": (0,),
    "no samples": (0, 2, 5),
}
BAD = {
    "x: no dimensions": (lambda: good(x=torch.tensor(1.0), f=torch.tensor(1.0)), r"x: expected shape \(B, .*got \(\)"),
    "x: empty batch": (
        lambda: good(**{name: torch.ones(0, 2, 5) for name in FLOATS if name != "noise"}),
        r"x: expected shape \(B, .*got \(0, 2, 5\)",
    ),
    "x: empty samples": (
        lambda: good(**{name: torch.ones(BATCH, 0) for name in FLOATS if name != "noise"}),
        r"x: expected shape \(B, .*got \(3, 0\)",
    ),
    "noise: seeds too": (lambda: good(noise=torch.ones(SHAPE)), "noise: expected seeds or noise, got both"),
    "noise: missing": (lambda: good(seeds=None), "seeds or noise: missing, and row 0 needs it"),
    "noise: missing in the last row": (
        lambda: good(index=torch.tensor([1, 1, 2]), seeds=None),
        "seeds or noise: missing, and row 2 needs it",
    ),
}
for name in ("u", "m1", "m2", "v", "y"):
    BAD[f"{name}: missing"] = (lambda name=name: good(**{name: None}), rf"\b{name}: missing, and row 0 needs it")
# One check judges all of them alike: each tensor with some shape and some dtype, and each shape and dtype with some tensor.
LIKE = {name: "as f has" if name in LIKE_F else "as x has" for name in FLOATS}
for name, (title, shape) in zip(FLOATS[1:], itertools.cycle(SHAPES.items())):
    BAD[f"{name}: {title}"] = (
        lambda name=name, shape=shape: complete(name, torch.ones(shape)),
        rf"\b{name}: expected shape {R(str(SHAPE))} {LIKE[name]}, got {R(str(shape))}",
    )
for name, other in zip(FLOATS, itertools.cycle(NOT_FLOATS)):
    for dtype in [other] + (dtypes("float16") if name not in ("x", "f") else []):
        text = str(dtype).removeprefix("torch.")
        expected = "float32, float16 or bfloat16" if name in ("x", "f") else f"float32 {LIKE[name]}"
        BAD[f"{name}: {text}"] = (
            lambda name=name, dtype=dtype: complete(name, torch.ones(SHAPE, dtype=dtype)),
            rf"\b{name}: expected dtype {expected}, got {text}",
        )
for title, shape in {"another shape": (BATCH, 2, 6), "more dimensions": (*SHAPE, 1)}.items():
    BAD[f"x: {title}"] = (lambda shape=shape: good(x=torch.ones(shape)), rf"f: expected shape {R(str(shape))} as x has")
BAD["x: half, the rest not"] = (
    lambda: good(x=torch.ones(SHAPE, dtype=torch.float16)),
    "m1: expected dtype float16 as x has, got float32",
)
OF_TORCH = {}  # what the op itself says, where epskernels.step has other words


def no_tensor(name, expected, got, found):
    OF_TORCH[f"{name}: {got}"] = f"for argument '{name}' but instead found type '{found}'"
    return rf"^epskernels: {name if name != 'rows' else 'table'}: expected {expected}, got {got}$"


NO_TENSOR = dict.fromkeys(TENSORS, "a tensor, or None") | {
    "x": "a tensor",
    "f": "a tensor",
    "rows": R("a Table, or its rows: a float32 tensor (R, 24) or (R, 28)"),
    "index": R("an int, or an int64 tensor, () or (B,)"),
    "seeds": R("an int64 tensor (B,), as epskernels.as_seeds makes from integers"),
}
for name in TENSORS:
    elsewhere = rf"\b{name}: expected a tensor on cpu, as . is, got one on meta"
    reason = "f: expected a tensor on meta, as x is, got one on cpu" if name == "x" else elsewhere

    for title, change, message in (
        ("on meta", lambda tensor: tensor.to("meta"), reason),
        ("list of 3", torch.Tensor.tolist, no_tensor(name, NO_TENSOR[name], "list of 3", "list")),
        ("numpy.ndarray", torch.Tensor.numpy, no_tensor(name, NO_TENSOR[name], "numpy.ndarray", "ndarray")),
        ("sparse", torch.Tensor.to_sparse, rf"\b{name}: expected a dense tensor, got sparse_coo"),
    ):
        BAD[f"{name}: {title}"] = (
            lambda name=name, change=change: complete(name, change(complete(name)[name])),
            message,
        )
for name in ("x", "f", "rows", "index"):
    BAD[f"{name}: None"] = (
        lambda name=name: good(**{name: None}),
        no_tensor(name, NO_TENSOR[name], "None", "NoneType"),
    )

for title, rows, got in (
    ("23 columns", torch.ones(3, 23), "(3, 23)"),
    ("25 columns", torch.ones(3, 25), "(3, 25)"),
    ("29 columns", torch.ones(3, 29), "(3, 29)"),
    ("transposed", torch.ones(24, 3), "(24, 3)"),
    ("one dimension", torch.ones(24), "(24,)"),
    ("three dimensions", torch.ones(1, 3, 24), "(1, 3, 24)"),
    ("none", torch.ones(0, 24), "(0, 24)"),
    ("no elements", torch.ones(0), "(0,)"),
):
    BAD[f"rows: {title}"] = (
        lambda rows=rows: good(rows=rows),
        rf"rows: expected shape \(R, 24\) or \(R, 28\) with R >= 1, got {R(got)}",
    )
for dtype in dtypes("float64", "float16", "int32"):
    text = str(dtype).removeprefix("torch.")
    BAD[f"rows: {text}"] = (
        lambda dtype=dtype: good(rows=make_rows().to(dtype)),
        f"rows: expected dtype float32, got {text}",
    )
for title, rows, strides in (
    ("columns apart", torch.ones(3, 48)[:, ::2], (48, 2)),
    ("columns first", torch.ones(24, 3).t(), (1, 3)),
    ("expanded", torch.ones(1, 24).expand(3, 24), (0, 1)),
    ("overlapping", torch.ones(64).as_strided((3, 24), (8, 1)), (8, 1)),
    ("overlapping wide ones", torch.ones(128).as_strided((3, 28), (24, 1)), (24, 1)),
):
    BAD[f"rows: {title}"] = (
        lambda rows=rows: good(rows=rows),
        f"rows: expected contiguous rows, got strides {R(str(strides))}",
    )


def rows_with(column, value, row=0):
    rows = make_rows()
    rows[row, COLUMNS.index(column)] = value
    return rows


for column in ("logvar_min", "logvar_max"):
    BAD[f"v: missing, {column} 0"] = (
        lambda column=column: good(rows=rows_with(column, 0.0), v=None),
        r"\bv: missing, and row 0 needs it",
    )
for column, value in [*zip(COLUMNS, itertools.cycle((np.inf, -np.inf, np.nan))), ("clip", -np.inf)]:
    BAD[f"rows: {column} {value}"] = (
        lambda column=column, value=value: good(rows=rows_with(column, value)),
        f"rows: expected finite coefficients and clip >= 0, got -?{value} in row 0, column {COLUMNS.index(column)}",
    )
BAD["rows: clip -0"] = (lambda: good(rows=rows_with("clip", -0.0)), "rows: .*clip >= 0, got -0(.0)? in row 0, column 2")
BAD["rows: clip -1"] = (lambda: good(rows=rows_with("clip", -1)), "rows: .*clip >= 0, got -1(.0)? in row 0, column 2")
for value, column in itertools.product((-1.0, 0.5, 2.0**24), ("draw", "guided_channels")):
    BAD[f"rows: {column} {value:g}"] = (
        lambda value=value, column=column: good(rows=rows_with(column, value)),
        rf"rows: expected {column} to be an integer in \[0, 2\^24\), got .* in row 0",
    )


def with_band(**columns):
    """Good rows, the first of which corrects a band so."""
    band = torch.zeros(3, 4)
    band[0] = torch.tensor([columns.get(column, 0.0) for column in BAND_COLUMNS])
    return torch.cat([make_rows(), band], 1)


for column, value in zip(BAND_COLUMNS, itertools.cycle((np.nan, np.inf))):
    BAD[f"rows: {column} {value}"] = (
        lambda column=column, value=value: good(rows=with_band(**{column: value})),
        f"rows: expected finite coefficients .*, got {value} in row 0, column {(COLUMNS + BAND_COLUMNS).index(column)}",
    )
for value in (0.0, 1.5, 3.0, -1.0):
    BAD[f"rows: band_dims {value:g}"] = (
        lambda value=value: good(rows=with_band(l_x=0.1, band_dims=value)),
        f"rows: expected band_dims to be 1 or 2, got {value:g}.* in row 0",
    )
BAD["x: a band in two dimensions"] = (
    lambda: good(rows=with_band(l_next=0.1, band_dims=2.0)),
    rf"x: expected shape \(B, C, H, W\) or .*, as row 0 corrects a band of it, got {R(str(SHAPE))}",
)
for name, shape in zip(itertools.cycle(PER_SAMPLE), ((), (1,), (BATCH, 1), (0,), (BATCH + 1,))):
    BAD[f"{name}: {shape}"] = (
        lambda name=name, shape=shape: good(**{name: torch.ones(shape)}),
        rf"{name}: expected shape \({BATCH},\), got {R(str(shape))}",
    )
for name, dtype in zip(itertools.cycle(PER_SAMPLE), dtypes("float64", "float16", "int64", "bool")):
    text = str(dtype).removeprefix("torch.")
    BAD[f"{name}: {text}"] = (
        lambda name=name, dtype=dtype: good(**{name: torch.ones(BATCH, dtype=dtype)}),
        f"{name}: expected dtype float32, got {text}",
    )
for value in (0.0, -0.0, -1.0, np.inf, -np.inf):
    BAD[f"threshold: {value}"] = (
        lambda value=value: good(threshold=torch.tensor([1.0, value, 1.0])),
        rf"threshold: expected finite values above 0, got {value:g}(\.0)? for sample 1",
    )
BAD["rows: NaN in the last sample's row"] = (
    lambda: good(rows=rows_with("d_f", np.nan, row=2), index=torch.tensor([0, 0, 2])),
    "rows: expected finite coefficients .* got nan in row 2, column 1",
)

for title, index, got in (
    ("negative", torch.tensor(-1), -1),
    ("too big", torch.tensor(3), 3),
    ("the last sample's negative", torch.tensor([0, 1, -1]), -1),
    ("the last sample's too big", torch.tensor([0, 1, 3]), 3),
    ("lowest integer", torch.tensor(-(2**63)), -(2**63)),
    ("highest integer", torch.tensor(2**63 - 1), 2**63 - 1),
    ("offset that wraps to 0", torch.tensor(2**58), 2**58),
):
    BAD[f"index: {title}"] = (lambda index=index: good(index=index), rf"index: expected values in \[0, 3\), got {got}")
for title, shape in {"of one": (1,), "of two": (2,), "a column": (3, 1), "empty": (0,)}.items():
    BAD[f"index: {title}"] = (
        lambda shape=shape: good(index=torch.zeros(shape, dtype=torch.int64)),
        rf"index: expected shape \(\) or \(3,\), got {R(str(shape))}",
    )
for dtype in dtypes("int32", "uint8", "float32", "bool"):
    text = str(dtype).removeprefix("torch.")
    BAD[f"index: {text}"] = (
        lambda dtype=dtype: good(index=torch.zeros(BATCH, dtype=dtype)),
        f"index: expected dtype int64, got {text}",
    )
for value in (True, 0.0):
    BAD[f"index: {value}"] = (
        lambda value=value: good(index=value),
        no_tensor("index", NO_TENSOR["index"], repr(value), type(value).__name__),
    )
BAD["rows: 'ddim'"] = (lambda: good(rows="ddim"), no_tensor("rows", NO_TENSOR["rows"], "'ddim'", "str"))

for title, shape in {"a scalar": (), "one too many": (4,), "of one": (1,), "a column": (3, 1), "empty": (0,)}.items():
    BAD[f"seeds: {title}"] = (
        lambda shape=shape: good(seeds=torch.zeros(shape, dtype=torch.int64)),
        rf"seeds: expected shape \(3,\), got {R(str(shape))}",
    )
for dtype in dtypes("int32", "float64", "bool", "uint16", "uint32", "uint64"):
    text = str(dtype).removeprefix("torch.")
    BAD[f"seeds: {text}"] = (
        lambda dtype=dtype: good(seeds=torch.zeros(BATCH, dtype=dtype)),
        f"seeds: expected dtype int64, got {text}",
    )


@pytest.mark.parametrize("how", ["step", "step_m0", "step_y", "step_out", "step_"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case, how):
    make, message = BAD[case]
    a = make()
    if how in ("step", "step_m0", "step_y"):
        refused(backend, a, message, how)
    elif how == "step_out":
        refused(backend, a, message, how, out=torch.full(SHAPE, SENTINEL), m0=torch.full(SHAPE, SENTINEL))
    else:
        refused(backend, a, OF_TORCH.get(case, message), how, m0=torch.full(SHAPE, SENTINEL))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", TENSORS)
def test_a_nested_tensor(backend, name):
    """Its layout is strided too. Where torch dispatches, torch refuses it."""
    nested = torch.nested.nested_tensor(list(complete(name)[name]))
    said = rf"\b{name}: expected a dense tensor, got a nested tensor"
    with pytest.raises(RuntimeError, match=said if backend in ("reference", "triton") else "NestedTensor"):
        call(complete(name, nested))


@pytest.fixture
def logged(caplog):
    with caplog.at_level(logging.DEBUG, "epskernels"):
        yield


@pytest.mark.parametrize("case", BAD)
def test_bad_input_where_calls_are_logged(case, logged):
    """The log leaves it to the op to judge."""
    make, message = BAD[case]
    refused("auto", make(), message, "step_out", out=torch.full(SHAPE, SENTINEL))


def test_bad_moments_where_calls_are_logged(logged):
    with pytest.raises(RuntimeError, match=r"f: expected shape \(B, ...\) with at least one element, got \(\)"):
        epskernels.moments(torch.tensor(1.0))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("f", torch.zeros(1, 3), r"f: expected shape .* as x has, got \(1, 3\)"),
        ("rows", torch.zeros(1, 23), r"rows: expected shape \(R, 24\) or"),
        ("rows", torch.tensor([make_row(c_x=1, c_m1=1)]), "m1: missing, and row 0 needs it .c_m1"),
        ("rows", torch.tensor([make_row(c_noise=1)]), "seeds or noise: missing, and row 0 needs it .c_noise"),
        ("index", torch.zeros(7, dtype=torch.int64), r"index: expected shape \(\) or \(3,\), got \(7,\)"),
    ],
    ids=["f", "rows", "row_of_history", "row_of_noise", "index"],
)
def test_bad_input_of_step_plain(backend, name, value, message):
    a = {
        "x": torch.zeros(SHAPE),
        "f": torch.zeros(SHAPE),
        "rows": torch.tensor([make_row(c_x=1)]),
        "index": torch.tensor(0),
    }
    with pytest.raises(RuntimeError, match=message):
        op(backend, "step_plain")(**a | {name: value})


@pytest.mark.parametrize("name", ["x", "f", "seeds", "m1", "rows"])
@pytest.mark.parametrize("results", [{}, {"return_m0": True}, {"return_y": True}], ids=str)
def test_no_tensor_beside_one_that_requires_grad(backend, name, results):
    """The way through autograd refuses in the same words."""
    a = good(u=good()["u"].requires_grad_(), **{name: [0.5] * 3})
    with pytest.raises(RuntimeError, match=BAD[f"{name}: list of 3"][1]):
        call(a, **results)


def test_an_error_in_the_caller_s_words_hides_the_dispatcher_s():
    with pytest.raises(RuntimeError) as caught:
        call(good(seeds=[0, 1, 2]))
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_table_on_another_device(backend, device):
    """`rows` is a name that the caller did not write."""
    table, other = samplers.ddim(schedule.linear(), 20), "meta" if device == "cpu" else "cpu"
    x = torch.ones(SHAPE, device=device)
    for run, like in (
        (lambda: epskernels.step(x, x, table.to(other), 3), "x"),
        (lambda: epskernels.moments(x, x, table.to(other), 3), "f"),
    ):
        with pytest.raises(RuntimeError, match=f"table: expected one on {device}, as {like} is, got one on {other}: "):
            run()


BAD_MOMENTS = {
    "f a list": (lambda f: epskernels.moments([1.0]), r"f: expected a tensor, got list of 1"),
    "f None": (lambda f: epskernels.moments(None), r"f: expected a tensor, got None"),
    "u a list": (
        lambda f: epskernels.moments(f, [1.0], make_rows(), 0),
        "u: expected a tensor, or None, got list of 1",
    ),
    "table a word": (lambda f: epskernels.moments(f, f, "ddim", 0), "table: expected a Table, or its .* got 'ddim'"),
    "index a float": (lambda f: epskernels.moments(f, f, make_rows(), 1.0), "index: expected an int, .*, got 1.0"),
    "u alone": (lambda f: epskernels.moments(f, f), "u, table, index: expected all of them, or none"),
    "no table": (lambda f: epskernels.moments(f, f, index=0), "u, table, index: expected all of them, or none"),
    "no index": (lambda f: epskernels.moments(f, f, make_rows()), "u, table, index: expected all of them, or none"),
    "no u": (lambda f: epskernels.moments(f, None, make_rows(), 0), "u, table, index: expected all of them, or none"),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_bad_moments(backend, case):
    run, message = BAD_MOMENTS[case]
    with pytest.raises(RuntimeError, match=f"^epskernels: {message}$"):
        run(good()["f"])


@pytest.mark.parametrize("left_out", ["u", "rows", "index"])
def test_the_op_s_moments_with_a_part_of_what_guidance_needs(backend, left_out):
    """The op itself says so: in epskernels.moments the caller's words stand before it."""
    f, u, rows, index = (None if name == left_out else good()[name] for name in ("f", "u", "rows", "index"))
    with pytest.raises(RuntimeError, match="^epskernels: u, rows, index: expected all of them, or none$"):
        op(backend, "moments")(f, u, rows, index)


@pytest.mark.parametrize("index", [-1, 20, 2**63, 2**70, -(2**70)])
@pytest.mark.parametrize("kind", ["table", "rows"])
def test_bad_python_index(backend, kind, index):
    table = samplers.ddim(schedule.linear(), 20)
    with pytest.raises(RuntimeError, match=f"index: expected .*, got {index}"):
        epskernels.step(torch.ones(SHAPE), torch.ones(SHAPE), table if kind == "table" else table.rows, index)


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("name", [*TENSORS, "out", "m0", "y_out", "model_input"])
def test_freed_storage(backend, name, offset):
    if backend == "reference":
        pytest.skip("PyTorch's own ops crash here, and so does the reference, which is made of them")
    a = complete(name) if name in TENSORS else good()
    outputs = {key: torch.full(SHAPE, SENTINEL) for key in ("out", "m0", "y_out", "model_input")}
    given = a if name in a else outputs
    whole = torch.zeros(offset + given[name].numel(), dtype=given[name].dtype)
    given[name] = whole[offset:].view(given[name].shape)
    whole.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor with memory, got one whose storage was freed"):
        op(backend, "step_out")(**a, **outputs)
    assert all((output == SENTINEL).all() for key, output in outputs.items() if key != name)


@pytest.mark.parametrize("name", ["f", "u", "rows", "index", "seeds"])
def test_freed_storage_of_the_other_ops(backend, name):
    if backend == "reference":
        pytest.skip("as above")
    a = {key: good()[key] for key in ("f", "u", "rows", "index", "seeds")}
    a[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor with memory, got one whose storage was freed"):
        if name == "seeds":
            op(backend, "normal")(a["seeds"], [4], dtype=torch.float32)
        op(backend, "moments")(a["f"], a["u"], a["rows"], a["index"])


# Of more bytes than there are addresses. Torch says why only from 2.13 on.
NO_MEMORY = {
    "a result": (
        lambda: epskernels.step(x := torch.ones(1, 1).expand(1, 2**46), x, make_rows(), 1),
        r"float32 \(1, 70368744177664\) on cpu",
    ),
    "a copy": (
        lambda: epskernels.moments(torch.ones(1, 1, 1).bfloat16().expand(1, 2**23, 2**24)),
        r"bfloat16 \(1, 8388608, 16777216\) on cpu",
    ),
    "normals": (
        lambda: epskernels.normal([1, 2], (2**46,), dtype=torch.float16),
        r"float16 \(2, 70368744177664\) on cpu",
    ),
}


@pytest.mark.parametrize("backend", ["compiled", "cuda_on_host"], indirect=True)
@pytest.mark.parametrize("case", NO_MEMORY)
def test_no_memory(backend, case):
    run, what = NO_MEMORY[case]
    why = ": .*tried to allocate 281474976710656 bytes" if torch.__version__ >= (2, 13) else "$"
    with pytest.raises(RuntimeError, match=f"epskernels: could not allocate {what}{why}"):
        run()


OUT_OF_MEMORY = {
    "step": lambda: call(good()),
    "step_out": lambda: call(good(), out=torch.empty(SHAPE)),
    "step with gradient": lambda: call(good(x=torch.ones(SHAPE, requires_grad=True))),
    "moments": lambda: epskernels.moments(torch.ones(SHAPE)),
    "normal": lambda: epskernels.normal([1], (4,)),
}


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_a_gpu_s_lack_of_memory_has_torch_s_type(case, monkeypatch):
    message = "epskernels: could not allocate float32 (3, 2, 5) on cuda:0: CUDA out of memory. Tried to allocate 2 GiB."

    def full(*args, **kwargs):
        raise RuntimeError(message)

    functions = backends.Functions(*[full] * len(backends.Functions._fields))
    monkeypatch.setitem(backends.BY_NAME, "cpu", (lambda: functions, "cpu"))
    with epskernels.use_backend("cpu"), pytest.raises(torch.OutOfMemoryError, match=R(message)):
        OUT_OF_MEMORY[case]()


# ---- outputs ----


def shifted(like, by=1):
    """Two tensors of this shape in one buffer, the second `by` elements further on."""
    count = like.numel()
    buffer = torch.full((count + by,), SENTINEL, dtype=like.dtype)
    buffer[:count] = like.reshape(-1)
    return buffer[:count].view(like.shape), buffer[by:].view(like.shape)


def on_top_of(name, by):
    """Arguments, and an output that shares memory with one of them, `by` elements further on or back."""
    a = complete(name)
    value, count = a[name], int(np.prod(SHAPE))
    if name in FLOATS:
        first, second = shifted(value, abs(by))
        a[name], output = (first, second) if by > 0 else (second, first)
        a[name].copy_(value)
    else:
        words = value.numel() * value.element_size() // 4
        buffer = torch.full((2 * count + words,), SENTINEL)
        a[name] = buffer[count : count + words].view(value.dtype).view(value.shape).copy_(value)
        # An index or seeds are shorter than an output, which begins inside of them or ends there.
        start = count + min(by, words - 1) if by > 0 else -by
        output = buffer[start : start + count].view(SHAPE)
    return a, output


BAD_OUTPUTS = {}
for title, shape in SHAPES.items():
    BAD_OUTPUTS[title] = (
        lambda shape=shape: (good(), torch.full(shape, SENTINEL)),
        rf"NAME: expected shape {R(str(SHAPE))} as x has, got {R(str(shape))}",
    )
for dtype in (*NOT_FLOATS, torch.float16):
    text = str(dtype).removeprefix("torch.")
    BAD_OUTPUTS[text] = (
        lambda dtype=dtype: (good(), torch.ones(SHAPE, dtype=dtype)),
        f"NAME: expected dtype float32 as x has, got {text}",
    )
BAD_OUTPUTS |= {
    "on meta": (
        lambda: (good(), torch.ones(SHAPE, device="meta")),
        "NAME: expected a tensor on cpu, as x is, got one on meta",
    ),
    "sparse": (lambda: (good(), torch.ones(SHAPE).to_sparse()), "NAME: expected a dense tensor, got sparse_coo"),
    "a list": (lambda: (good(), [1.0]), "NAME: expected a tensor, or None, got list of 1$"),
    "expanded batch": (
        lambda: (good(), torch.full((1, 2, 5), SENTINEL).expand(SHAPE)),
        "NAME: expected every element at its own address, got overlapping strides",
    ),
    "expanded element": (
        lambda: (good(), torch.full((1, 1, 1), SENTINEL).expand(SHAPE)),
        "NAME: expected every element at its own address, got overlapping strides",
    ),
    "overlapping strides": (
        lambda: (good(), torch.full((30,), SENTINEL).as_strided(SHAPE, (5, 4, 1))),
        "NAME: expected every element at its own address, got overlapping strides",
    ),
    "over all of rows": (
        lambda: (good(rows=(rows := make_rows())), rows.view(-1)[:30].view(SHAPE)),
        "NAME: overlaps the memory of rows",
    ),
    "over x in another layout": (
        lambda: (a := good(), a["x"].view(-1).as_strided(SHAPE, (1, 15, 3))),
        "NAME: overlaps the memory of x without being the same tensor",
    ),
    "halves of x, further apart": (
        lambda: (good(x=(buffer := torch.full((4, 4, 5), SENTINEL))[:3, :2]), buffer[1:4, 1:3]),
        "NAME: overlaps the memory of x without being the same tensor",
    ),
    "every other channel, where x has the last two": (
        lambda: (good(x=(buffer := torch.full((3, 4, 5), SENTINEL))[:, 2:]), buffer[:, ::2]),
        "NAME: overlaps the memory of x without being the same tensor",
    ),
    "halves of x, one channel before": (
        lambda: (good(x=(buffer := torch.full((3, 4, 5), SENTINEL))[:, 1:3]), buffer[:, :2]),
        "NAME: overlaps the memory of x without being the same tensor",
    ),
}
for name in TENSORS:
    for by in (1, 7, -1):
        BAD_OUTPUTS[f"{name} and {by:+d}"] = (
            lambda name=name, by=by: on_top_of(name, by),
            f"NAME: overlaps the memory of {name}",
        )


@pytest.mark.parametrize("name", ["out", "m0", "y_out"])
@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_output(backend, case, name):
    make, message = BAD_OUTPUTS[case]
    a, output = make()
    outputs = {"out": output} if name == "out" else {"out": torch.full(SHAPE, SENTINEL), name: output}
    refused(backend, a, message.replace("NAME", name), "step_out", **outputs)


@pytest.mark.parametrize("name", ["m0", "y_out"])
@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_output_in_place(backend, case, name):
    make, message = BAD_OUTPUTS[case]
    if case == "a list":
        message = "for argument 'NAME' but instead found type 'list'"
    a, output = make()
    refused(backend, a, message.replace("NAME", name), "step_", **{name: output})


WIDE = (2 * BATCH, *SHAPE[1:])
BAD_MODEL_INPUTS = {
    "three times the batch": (torch.full((3 * BATCH, 2, 5), SENTINEL), "expected shape .*, or twice the batch, got"),
    "half of the batch": (torch.full((1, 2, 5), SENTINEL), "expected shape .*, or twice the batch, got"),
    "other sample": (torch.full((BATCH, 2, 6), SENTINEL), "expected shape .*, or twice the batch, got"),
    "other rank": (torch.full((BATCH, 10), SENTINEL), "expected shape .*, or twice the batch, got"),
    "no dimensions": (torch.tensor(SENTINEL), "expected shape .*, or twice the batch, got"),
    "half precision": (torch.full(WIDE, SENTINEL, dtype=torch.float16), "expected dtype float32 as f has, got float16"),
    "integers": (torch.ones(WIDE, dtype=torch.int64), "expected dtype float32 as f has, got int64"),
    "on meta": (torch.ones(WIDE, device="meta"), "expected a tensor on cpu, as x is, got one on meta"),
    "sparse": (torch.ones(WIDE).to_sparse(), "expected a dense tensor, got sparse_coo"),
    "expanded": (torch.full((1, 2, 5), SENTINEL).expand(WIDE), "expected every element at its own address"),
}


@pytest.mark.parametrize("how", ["step_out", "step_"])
@pytest.mark.parametrize("case", BAD_MODEL_INPUTS)
def test_bad_model_input(backend, case, how):
    model_input, message = BAD_MODEL_INPUTS[case]
    outputs = {"out": torch.full(SHAPE, SENTINEL)} if how == "step_out" else {}
    refused(backend, good(), f"model_input: {message}", how, **outputs, model_input=model_input)


@pytest.mark.parametrize("name", FLOATS)
def test_model_input_over_an_input(backend, name):
    a = complete(name)
    refused(
        backend,
        a,
        f"model_input: overlaps the memory of {name}",
        "step_out",
        model_input=a[name],
        out=torch.zeros(SHAPE),
    )


def test_the_op_s_out_may_not_be_absent(backend):
    message = "expected a value of type 'Tensor' for argument 'out' but instead found type 'NoneType'"
    m0 = torch.full(SHAPE, SENTINEL)
    with pytest.raises(RuntimeError, match=message):
        op(backend, "step_out")(**good(), out=None, m0=m0)
    assert (m0 == SENTINEL).all()


def test_model_input_in_the_dtype_of_x(backend):
    halves = {name: torch.ones(SHAPE, dtype=torch.bfloat16) for name in ("f", "u", "v")}
    message = "model_input: expected dtype bfloat16 as f has, got float32"
    outputs = {"out": torch.full(SHAPE, SENTINEL), "model_input": torch.full(SHAPE, SENTINEL)}
    refused(backend, good(**halves), message, "step_out", **outputs)


def test_one_sample_over_another_with_strides_of_0(backend):
    """A batch of one may have any stride, which says nothing of how samples lie."""
    buffer = torch.full((11,), SENTINEL)
    x, out = (buffer[first:].as_strided((1, 2, 5), (0, 5, 1)) for first in (0, 1))
    a = {"x": x, "f": torch.ones(1, 2, 5), "rows": make_rows(), "index": torch.tensor(1)}
    refused(backend, a, "out: overlaps the memory of x without being the same tensor", "step_out", out=out)


@pytest.mark.parametrize("name", ["out", "m0", "y_out"])
def test_model_input_over_an_output(backend, name):
    outputs = {key: torch.full(SHAPE, SENTINEL) for key in ("out", "m0", "y_out")}
    message = f"model_input: overlaps the memory of {name}"
    refused(backend, good(), message, "step_out", **outputs, model_input=outputs[name])


def test_y_out_over_m0(backend):
    out, m0 = torch.full(SHAPE, SENTINEL), torch.full(SHAPE, SENTINEL)
    refused(backend, good(), "y_out: overlaps the memory of m0", "step_out", out=out, m0=m0, y_out=m0)


@pytest.mark.parametrize("column", SECOND_STATE)
@pytest.mark.parametrize("how", ["step", "step_m0", "step_out", "step_"])
def test_a_second_state_that_would_be_lost(backend, column, how):
    a = good(rows=rows_with(column, 0.5))
    outputs = {"out": torch.full(SHAPE, SENTINEL)} if how == "step_out" else {}
    refused(backend, a, "y_out: missing, and row 0 needs it", how, **outputs)


@pytest.mark.parametrize("column, name", [("k_m1", "m1"), ("k_m2", "m2"), ("k_y", "y")])
def test_inputs_of_the_second_state_alone(backend, column, name):
    rows = rows_with(column, 0.5)
    rows[0, COLUMNS.index(f"c_{name}")] = 0
    refused(backend, good(rows=rows, **{name: None}), f"{name}: missing, and row 0 needs it .{column}", "step_y")


def test_rows_as_output(backend):
    rows = make_rows()
    a = good(rows=rows, index=1, **{name: torch.ones(3, 24) for name in FLOATS if name != "noise"})
    refused(backend, a, "out: overlaps the memory of rows", "step_out", out=rows)


def test_same_memory_as_another_dtype(backend):
    f = torch.ones(SHAPE, dtype=torch.bfloat16)
    halves = {name: torch.ones(SHAPE, dtype=torch.float16) for name in ("x", "m1", "m2", "y", "grad")}
    a = good(f=f, u=f.clone(), v=f.clone(), **halves)
    refused(backend, a, "out: overlaps the memory of f without", "step_out", out=f.view(torch.float16))


@pytest.mark.parametrize("by", [0, 1, 7, 29])
def test_m0_over_out(backend, by):
    out, m0 = shifted(torch.full(SHAPE, SENTINEL), by) if by else [torch.full(SHAPE, SENTINEL)] * 2
    refused(backend, good(), "m0: overlaps the memory of out", "step_out", out=out, m0=m0)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["out", "m0", "y_out", "model_input", "x"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_output_that_requires_grad(backend, name, layout):
    outputs = {key: torch.full(SHAPE, SENTINEL) for key in ("out", "m0", "y_out", "model_input")}
    a = good()
    tensor = a["x"] if name == "x" else outputs[name]
    if layout == "transposed":
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    tensor.requires_grad_()
    if name == "x":
        a["x"] = outputs["out"] = tensor
    else:
        outputs[name] = tensor
    message = f"{name}: expected a tensor that does not require grad"
    refused(backend, a, message, "step_out", **outputs)
    with torch.no_grad():
        expected = call(good(), return_m0=True)
        assert same(call(a, **outputs), expected[0]) and same(outputs["m0"], expected[1])


def test_m0_over_x_in_place(backend):
    a = good()
    refused(backend, a, "m0: overlaps the memory of x", "step_", m0=a["x"])


@pytest.mark.parametrize("case", ["expanded", "over f"])
def test_bad_x_in_place(backend, case):
    if case == "expanded":
        a, message = good(x=torch.ones(1, 2, 5).expand(SHAPE)), "x: expected every element at its own address"
    else:
        x, f = shifted(torch.ones(SHAPE), 3)
        a, message = good(x=x, f=f), "x: overlaps the memory of f without being the same tensor"
    refused(backend, a, message, "step_")


# ---- allowed ----


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def test_in_place(backend):
    expected_x, expected_m0 = call(good(), return_m0=True)
    for a in (good(), good(x=good()["x"].transpose(1, 2).contiguous().transpose(1, 2))):
        m0 = torch.full(SHAPE, SENTINEL)
        result = call(a, out=a["x"], m0=m0)
        assert result is a["x"] and same(result, expected_x) and same(m0, expected_m0)
    a, step_ = good(), op(backend, "step_")
    assert step_(**a) is None and same(a["x"], expected_x)


@pytest.mark.interpreted(4)
@pytest.mark.parametrize(
    "out, m0", [(out, m0) for out in (None, *FLOATS) for m0 in ("m1", "m2", "x", "f") if out != m0]
)
def test_outputs_over_inputs(backend, out, m0):
    expected_x, expected_m0 = call(complete(out), return_m0=True)
    a = complete(out)
    result, got_m0 = call(a, out=a.get(out), m0=a[m0], return_m0=True)
    assert got_m0 is a[m0] and (out is None or result is a[out])
    assert same(result, expected_x) and same(got_m0, expected_m0)


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("names", [("x", "out"), ("out", "x"), ("out", "m0"), ("m0", "out"), ("m1", "m0"), ("x", "f")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channel_halves(backend, names, dtype):
    def in_dtype():
        return {name: value.to(dtype) if name in FLOATS else value for name, value in good().items()}

    expected_x, expected_m0 = call(in_dtype(), return_m0=True)
    a, buffer = in_dtype(), torch.full((BATCH, 4, 5), SENTINEL, dtype=dtype)
    outputs = {"out": torch.empty(SHAPE, dtype=dtype), "m0": torch.empty(SHAPE, dtype=dtype)}
    for name, half in zip(names, (buffer[:, :2], buffer[:, 2:]), strict=True):
        if name in outputs:
            outputs[name] = half
        else:
            a[name] = half.copy_(a[name])
    call(a, **outputs)
    assert same(outputs["out"], expected_x) and same(outputs["m0"], expected_m0)


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("name", [*FLOATS, "index", "seeds", *PER_SAMPLE])
def test_expanded_inputs(backend, name):
    part = complete(name)[name][:1]
    expanded = part.expand(BATCH, *part.shape[1:])
    result, m0 = call(complete(name, expanded), return_m0=True)
    expected, expected_m0 = call(complete(name, expanded.clone()), return_m0=True)
    assert same(result, expected) and same(m0, expected_m0)


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "one value": lambda t: t[:1, :1, :1].expand(t.shape),
    "reversed sign bit": lambda t: torch._neg_view(-t),
}


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FLOATS)
def test_layouts_of_inputs(backend, name, layout):
    value = LAYOUTS[layout](complete(name)[name])
    result, m0 = call(complete(name, value), return_m0=True)
    expected, expected_m0 = call(complete(name, value.clone(memory_format=torch.contiguous_format)), return_m0=True)
    assert same(result, expected) and same(m0, expected_m0)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("name", ["rows", "index", "seeds", *PER_SAMPLE])
def test_a_sign_bit_on_single_elements(backend, name):
    """Of the tensors that are not read element by element."""
    a = good(index=torch.tensor([1, 0, 2]))
    assert same(call(a | {name: torch._neg_view(-a[name])}), call(a))
    f, u, rows, index, seeds = (a[key] for key in ("f", "u", "rows", "index", "seeds"))
    moments, normal = op(backend, "moments"), op(backend, "normal")
    assert same(moments(f, u, torch._neg_view(-rows), torch._neg_view(-index)), moments(f, u, rows, index))
    assert same(normal(torch._neg_view(-seeds), [7], dtype=torch.float32), normal(seeds, [7], dtype=torch.float32))


def one_channel(tensor, stride):
    """The same memory, whose dimension of one is never stepped along."""
    return tensor.as_strided((BATCH, 1, 10), (10, stride, 1))


@pytest.mark.parametrize("stride", [0, 1, 77])
def test_a_dimension_of_one_has_any_stride(backend, stride):
    """Of an output of its own, and of one that is x."""
    table = make_rows()
    x, f = torch.randn(BATCH, 1, 10), torch.randn(BATCH, 1, 10)
    expected, out = epskernels.step(x, f, table, 1), torch.full((BATCH, 1, 10), SENTINEL)
    epskernels.step(x, f, table, 1, out=one_channel(out, stride))
    assert same(out, expected)
    epskernels.step(x, f, table, 1, out=one_channel(x, stride))
    assert same(x, expected)


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("name", ["x", "f", "out"])
def test_an_address_between_multiples_of_16(backend, name, by):
    """Of samples of whole tiles, each as far from such an address as the first."""
    table, tensors = make_rows(), {key: torch.randn(2, 4096) for key in ("x", "f", "out")}
    expected = epskernels.step(tensors["x"], tensors["f"], table, torch.tensor([1, 1]))
    tensors[name] = torch.zeros(8192 + by)[by:].view(2, 4096).copy_(tensors[name])
    out = tensors.pop("out")
    assert epskernels.step(*tensors.values(), table, torch.tensor([1, 1]), out=out) is out and same(out, expected)


@pytest.mark.parametrize("first", ["x", "out"])
def test_an_output_may_begin_where_an_input_ends(backend, first):
    table = make_rows()
    buffer = torch.randn(2, *SHAPE)
    x, out = (buffer[0], buffer[1]) if first == "x" else (buffer[1], buffer[0])
    f = torch.randn(SHAPE)
    expected = epskernels.step(x.clone(), f, table, 1)
    assert epskernels.step(x, f, table, 1, out=out) is out and same(out, expected)


OUTPUTS = ("out", "m0", "y_out", "model_input")


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("layout", ["transposed", "batch last", "every other", "offset", "reversed sign bit"])
@pytest.mark.parametrize("names", [OUTPUTS, *((name,) for name in OUTPUTS)], ids="_".join)
def test_layouts_of_outputs(backend, layout, names):
    """Of all, and of one beside plain ones."""
    a = good(rows=rows_with("k_x", 0.5))
    expected, got = ({name: torch.full(SHAPE, SENTINEL) for name in OUTPUTS} for _ in range(2))
    call(a, **expected)
    got |= {name: LAYOUTS[layout](got[name]) for name in names}
    assert call(a, **got) is got["out"]
    assert all(same(got[name], expected[name]) for name in OUTPUTS)


NEGATIVE = LAYOUTS["reversed sign bit"]


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_in_place_in_a_view_with_the_negative_bit(backend, layout):
    """x' over x, m0 over m1, y' over y; by the function, and by the op that has x for its output."""
    rows = rows_with("k_x", 0.5)
    names = {"x": "out", "m1": "m0", "y": "y_out"}
    expected = {output: torch.empty(SHAPE) for output in names.values()}
    call(good(rows=rows), **expected)
    for run in (
        lambda a, **outputs: call(a, out=a["x"], **outputs),
        lambda a, **named: op(backend, "step_")(**a, **named),
    ):
        a = good(rows=rows)
        for name in names:
            value = a[name] if layout == "contiguous" else LAYOUTS[layout](a[name])
            a[name] = NEGATIVE(value)
        run(a, m0=a["m1"], y_out=a["y"])
        assert all(a[name].is_neg() and same(a[name], expected[output]) for name, output in names.items())


def test_a_view_and_its_memory_are_one_tensor(backend):
    """x' over the memory of which m1 is the negative view."""
    a = good()
    expected = call(a)
    memory = -a["m1"]
    assert call(a | {"m1": torch._neg_view(memory)}, out=memory) is memory and same(memory, expected)
    a = good()
    out = torch._neg_view(a["m1"])
    assert call(a, out=out) is out and same(out, expected)


@pytest.mark.parametrize("name", ["out", "m0", "y_out", "model_input"])
def test_a_bad_view_with_the_negative_bit(backend, name):
    bad = torch._neg_view(torch.full((BATCH, 2, 6), SENTINEL))
    outputs = {"out": torch.full(SHAPE, SENTINEL), name: bad}
    refused(
        backend, good(), rf"epskernels: {name}: expected shape \(3, 2, 5\).*, got \(3, 2, 6\)", "step_out", **outputs
    )


def test_a_bad_x_with_the_negative_bit_in_place(backend):
    bad = torch._neg_view(torch.ones(1, 2, 5).expand(SHAPE))
    refused(backend, good(x=bad), "epskernels: x: expected every element at its own address", "step_")
    refused(backend, good(x=bad, f=[1.0]), "for argument 'f' but instead found type 'list'", "step_")


def test_conjugated_tensors_have_another_dtype(backend):
    z = torch.ones(SHAPE, dtype=torch.complex64).conj()
    assert z.is_conj()
    for name in FLOATS:
        expected = "float32, float16 or bfloat16" if name in ("x", "f") else "float32 as . has"
        refused(backend, complete(name, z), f"{name}: expected dtype {expected}, got complex64", "step")
    for name in OUTPUTS:
        outputs = {"out": torch.full(SHAPE, SENTINEL), name: z}
        refused(backend, good(), f"{name}: expected dtype float32 as . has, got complex64", "step_out", **outputs)
    with pytest.raises(RuntimeError, match="f: expected dtype float32, float16 or bfloat16, got complex64"):
        epskernels.moments(z)
    imaginary = torch.full(SHAPE, SENTINEL, dtype=torch.complex64).conj().imag  # where such views come from
    assert imaginary.is_neg() and same(call(good(), out=imaginary), call(good()))


def test_negative_seeds(backend):
    unsigned = [2**64 - 1, 2**63, 2**64 - 5]
    signed = [-1, -(2**63), -5]
    assert same(epskernels.as_seeds(unsigned), torch.tensor(signed))
    assert same(epskernels.normal(unsigned, (7,)), epskernels.normal(signed, (7,)))
    assert same(call(good(seeds=epskernels.as_seeds(unsigned))), call(good(seeds=torch.tensor(signed))))


def test_inference_mode(backend):
    expected, noise, outside = call(good()), epskernels.normal([1], (5,)).tolist(), good()
    with torch.inference_mode():
        a = good()
        assert same(call(a), expected) and same(call(outside), expected)
        assert same(call(a, out=a["x"]), expected)
        assert same(call(outside, out=outside["x"]), expected)
        assert epskernels.normal([1], (5,)).tolist() == noise


def test_rows_out_of_use_are_not_judged(backend):
    rows = make_rows()
    rows[2] = np.nan
    assert call(good(rows=rows)).isfinite().all()


def test_tensors_that_no_row_needs(backend):
    plain = torch.tensor(1)
    expected = call(good(index=plain, u=None, m1=None, m2=None, v=None, grad=None, seeds=None, y=None))
    nans = {name: torch.full(SHAPE, np.nan) for name in ("u", "m1", "m2", "v", "grad", "y")}
    assert same(call(good(index=plain, **nans)), expected)


@pytest.mark.parametrize("stride", [0, 1, 99])
def test_clip_0_and_one_row_of_any_stride(backend, stride):
    rows = torch.zeros(1, 99).as_strided((1, 24), (stride, 1))
    rows[0] = rows_with("clip", 0.0)[0]
    assert (call(good(rows=rows), return_m0=True)[1] == 0).all()


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_nan_in_gives_nan_out(backend, name, dtype):
    a = {key: value.to(dtype) if key in FLOATS else value for key, value in complete(name).items()}
    a[name][1, 0, 3] = np.nan
    result, m0 = call(a, return_m0=True)
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[1, 0, 3] = True
    assert torch.equal(result.isnan(), expected)
    assert torch.equal(m0.isnan(), expected if name in ("x", "f", "u") else torch.zeros_like(expected))


def test_a_threshold_of_nan_makes_its_sample_nan(backend):
    """As dynamic_threshold gives it for a sample that holds NaN: no argument is wrong."""
    result, m0 = call(good(threshold=torch.tensor([1.0, np.nan, 1.0])), return_m0=True)
    expected, expected_m0 = call(good(threshold=torch.ones(BATCH)), return_m0=True)
    assert result[1].isnan().all() and m0[1].isnan().all()
    assert same(result[::2], expected[::2]) and same(m0[::2], expected_m0[::2])


# ---- normal, seeds, backends ----


BAD_NORMAL = {
    "shape 0": (lambda: epskernels.normal([1], (4, 0)), r"shape: expected sizes of at least 1, got 0"),
    "shape negative": (lambda: epskernels.normal([1], (-1,)), r"shape: expected sizes of at least 1, got -1"),
    "shape a float": (lambda: epskernels.normal([1], (4.0,)), "shape: expected integers as sizes, got 4.0$"),
    "shape an int": (lambda: epskernels.normal([1], 4), "shape: expected a list or tuple of sizes, got 4"),
    "shape a string": (lambda: epskernels.normal([1], "4"), "shape: expected a list or tuple of sizes, got '4'"),
    "shape too big": (lambda: epskernels.normal([1], (2**40, 2**40)), "shape: too many elements for a tensor"),
    "no seeds": (lambda: epskernels.normal([], (4,)), "seeds: expected at least one seed, got none"),
    "draw negative": (lambda: epskernels.normal([1], (4,), draw=-1), r"draw: expected a value in \[0, 2\^32\), got -1"),
    "draw too big": (lambda: epskernels.normal([1], (4,), draw=2**32), r"draw: expected .*, got 4294967296"),
    "draw far too big": (lambda: epskernels.normal([1], (4,), draw=2**64), rf"draw: expected .* got {2**64}$"),
    "draw a float": (lambda: epskernels.normal([1], (4,), draw=0.5), r"draw: expected an integer .*, got 0.5$"),
    "stream negative": (lambda: epskernels.normal([1], (4,), stream=-1), r"stream: expected a value .*, got -1"),
    "stream too big": (lambda: epskernels.normal([1], (4,), stream=2**32), r"stream: expected .*, got 4294967296"),
    "stream None": (lambda: epskernels.normal([1], (4,), stream=None), r"stream: expected an integer .*, got None$"),
    "dtype a string": (
        lambda: epskernels.normal([1], (4,), dtype="float32"),
        "dtype: expected float32, float16 or bfloat16 of torch, got 'float32'$",
    ),
    "dtype None": (lambda: epskernels.normal([1], (4,), dtype=None), "dtype: expected float32, .* of torch, got None$"),
}
for dtype in NOT_FLOATS:
    text = str(dtype).removeprefix("torch.")
    BAD_NORMAL[f"dtype {text}"] = (
        lambda dtype=dtype: epskernels.normal([1], (4,), dtype=dtype),
        f"dtype: expected float32, float16 or bfloat16, got {text}",
    )


@pytest.mark.parametrize("case", BAD_NORMAL)
def test_bad_normal(backend, case):
    run, message = BAD_NORMAL[case]
    with pytest.raises(RuntimeError, match=message):
        run()


@pytest.mark.parametrize(
    "seeds, message",
    [
        (torch.zeros((), dtype=torch.int64), r"seeds: expected shape \(B,\), got \(\)"),
        (torch.zeros((2, 1), dtype=torch.int64), r"seeds: expected shape \(B,\), got \(2, 1\)"),
        (torch.zeros(0, dtype=torch.int64), "seeds: expected at least one seed, got none"),
        (torch.zeros(2, dtype=torch.int32), "seeds: expected dtype int64, got int32"),
        (torch.zeros(2), "seeds: expected dtype int64, got float32"),
        (torch.zeros(2, device="meta"), "seeds: expected dtype int64, got float32"),
        (torch.zeros(2, dtype=torch.int64).to_sparse(), "seeds: expected a dense tensor, got sparse_coo"),
        ([1, 2], "argument 'seeds' but instead found type 'list'"),
        (None, "argument 'seeds' but instead found type 'NoneType'"),
    ],
    ids=["scalar", "column", "none", "int32", "float32", "float32 on meta", "sparse", "a list", "None"],
)
def test_bad_seeds_of_the_op(backend, seeds, message):
    run = op(backend, "normal")
    with pytest.raises(RuntimeError, match=message):
        run(seeds, [4], dtype=torch.float32)


@pytest.mark.parametrize(
    "seeds, got",
    [
        ([1.5], "1.5"),
        ([1, None], "None"),
        ("12", "'12'"),
        (12, "12"),
        (None, "None"),
        (np.array([1.0]), "1."),
        ([2**64], str(2**64)),
        ([-(2**63) - 1], str(-(2**63) - 1)),
        (torch.zeros(2), "float32"),
        (torch.zeros(2, dtype=torch.int32), "int32"),
        (torch.zeros((), dtype=torch.int64), r"int64 \(\)"),
        (torch.zeros((1, 2), dtype=torch.int64), r"int64 \(1, 2\)"),
    ],
    ids=str,
)
def test_bad_seeds(backend, seeds, got):
    for run in (epskernels.as_seeds, lambda seeds: epskernels.normal(seeds, (4,))):
        with pytest.raises(ValueError, match=f"seeds: expected .*{got}"):
            run(seeds)


def test_seeds_of_numpy_and_ranges():
    assert epskernels.as_seeds(np.array([1, 2**64 - 1], dtype=np.uint64)).tolist() == [1, -1]
    assert epskernels.as_seeds(range(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["gpu", "CPU", "", None, 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend: expected one of .*'reference'.*got"), epskernels.use_backend(name):
        pass


@pytest.mark.skipif(kernels.ON_GPU, reason="there is a GPU")
def test_backend_that_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, why in (("cuda", "CUDA|GPU"), ("triton", "no GPU is available to torch")):
        with pytest.raises(RuntimeError, match=f"backend '{name}' is missing: .*({why})"), epskernels.use_backend(name):
            pass
        with pytest.raises(RuntimeError, match=f"backend '{name}' is missing"):
            call(good(), backend=name)


def test_backend_cpu_elsewhere():
    x = torch.ones(SHAPE, device="meta")
    with epskernels.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for, and .* on meta"):
        epskernels.step(x, x, make_rows(), 1)


def test_unknown_cpu_capability(extension):
    with pytest.raises(ValueError, match="expected one of generic.* got 'sse9'"):
        extension.set_cpu_capability("sse9")


def test_the_best_instruction_set_is_the_default():
    """In a process of its own: the tests of this one have forced others."""
    asked = "from epskernels import _C; assert _C.cpu_capability() == _C.cpu_capabilities()[-1]"
    subprocess.run([sys.executable, "-c", asked], check=True)


# ---- constructors ----

KEPT = {"c_x": 1.0, "alpha_in": 1.0, "alpha_out": 1.0}  # a row that leaves x as it is


def table(**values):
    return Table(KEPT | values)


LINEAR, ZERO_SNR = schedule.linear(), schedule.linear().zero_terminal_snr()
KARRAS, FLOW = schedule.KarrasSchedule(), schedule.FlowSchedule()
BAD_CONSTRUCTORS = {
    "Table: unknown column": (lambda: table(c_z=1.0), ValueError, r"values: unknown columns \['c_z'\], expected some"),
    "Table: no rows": (lambda: Table({}), ValueError, "values: expected at least one row, got none"),
    "Table: empty columns": (lambda: Table({"d_x": []}), ValueError, "values: expected at least one row, got none"),
    "Table: length": (
        lambda: table(d_x=[1, 2, 3], d_f=[1, 2]),
        ValueError,
        r"d_f: expected 3 values or one, got shape \(2,\)",
    ),
    "Table: matrix": (lambda: table(d_x=np.ones((2, 2))), ValueError, r"d_x: expected 4 values or one, got .*\(2, 2\)"),
    "Table: beyond float32": (lambda: table(d_x=1e39), ValueError, r"d_x: expected a value within float32, got 1e\+39"),
    "Table: clip 0": (lambda: table(clip=0), ValueError, "clip: expected a value above 0, .* got 0.0 in row 0"),
    "Table: clip NaN": (lambda: table(clip=np.nan), ValueError, "clip: expected a value above 0.* got nan"),
    "Table: draw half": (lambda: table(draw=0.5), ValueError, r"draw: expected an integer in \[0, 2\^24\), got 0.5"),
    "Table: draw -1": (lambda: table(draw=-1), ValueError, "draw: expected an integer .* got -1.0"),
    "Table: draw 2^24": (lambda: table(draw=[0, 2**24]), ValueError, "draw: expected .* got 16777216.0 in row 1"),
    "Table: lambda_t 0": (lambda: table(lambda_t=0), ValueError, "lambda_t: expected a value above 0, got 0.0"),
    "Table: mean": (lambda: table(c_m0=0.1), ValueError, "mean of row 0 of table: .* give 1.1, the path 1"),
    "Table: variance": (lambda: table(c_noise=0.1), ValueError, "variance of row 0 of table: .* give 0.01"),
    "Table: initial_sigma -1": (
        lambda: Table(KEPT, initial_sigma=-1),
        ValueError,
        "initial_sigma: expected a finite value >= 0, got -1",
    ),
    "Table: initial_sigma NaN": (lambda: Table(KEPT, initial_sigma=np.nan), ValueError, "initial_sigma: .* got nan"),
    "Table: band_dims 3": (
        lambda: table(l_next=0.1, band_dims=3),
        ValueError,
        "band_dims: expected 1 or 2, got 3.0 in row 0",
    ),
    "Table: w_next 0": (lambda: table(w_next=0), ValueError, "w_next: expected a value other than 0"),
    "Table: ends_step 2": (lambda: table(ends_step=2), ValueError, "ends_step: expected 0 or 1, got 2.0"),
    "Table: assignment": (lambda: setattr(table(), "rows", None), AttributeError, "immutable: cannot set rows"),
    "Table: reading an unknown column": (lambda: table()["c_z"], KeyError, "'c_z'.*: expected one of"),
    "concat: nothing": (lambda: epskernels.concat([]), ValueError, "tables: expected at least one, got none"),
    "concat: devices": (lambda: epskernels.concat([table(), table().to("meta")]), ValueError, "tables: .* one device"),
    "concat: discrete and not": (
        lambda: epskernels.concat([samplers.ddim(LINEAR, 5), samplers.edm_euler(KARRAS, 5)]),
        ValueError,
        "tables: expected all with discrete timesteps or all with noise levels",
    ),
    "betas: empty": (lambda: schedule.from_betas([]), ValueError, r"betas: expected shape \(T,\) .* got \(0,\)"),
    "betas: matrix": (lambda: schedule.from_betas(np.ones((2, 2))), ValueError, r"betas: expected shape .*\(2, 2\)"),
    "betas: above 1": (lambda: schedule.from_betas([0.1, 1.1]), ValueError, r"betas: .*\[0, 1\], got 1.1 at 1"),
    "betas: negative": (lambda: schedule.from_betas([-0.1]), ValueError, r"betas: .*\[0, 1\], got -0.1 at 0"),
    "betas: NaN": (lambda: schedule.from_betas([0.1, np.nan]), ValueError, r"betas: .*\[0, 1\], got nan at 1"),
    "betas: alphas_cumprod": (
        lambda: schedule.from_betas(LINEAR.abar),
        ValueError,
        "betas: expected small ones first, got values that fall from 0.9999 to 4.03.*, as alphas and alphas_cumprod do",
    ),
    "betas: alphas": (lambda: schedule.from_betas(1 - LINEAR.betas), ValueError, "betas: .* fall from 0.9999 to 0.98"),
    "linear: beta_end": (lambda: schedule.linear(beta_end=1.5), ValueError, "betas: expected values"),
    "steps: more than T": (lambda: LINEAR.grid(1001), ValueError, "steps: expected at most T = 1000, got 1001"),
    "steps: decreasing": (
        lambda: LINEAR.grid([5, 5]),
        ValueError,
        r"steps: expected strictly decreasing timesteps in \[0, 1000\), got \[5, 5\]",
    ),
    "steps: outside": (lambda: LINEAR.grid([1000, 3]), ValueError, r"steps: .*got \[1000, 3\]"),
    "steps: floats": (lambda: LINEAR.grid([3.5, 1.0]), ValueError, "steps: expected integer timesteps, got .* float64"),
    "steps: no timesteps": (lambda: LINEAR.grid([]), ValueError, "steps: "),
    "steps: words": (lambda: LINEAR.grid("ten"), ValueError, "steps: expected counts such as .* got 'ten'"),
    "steps: ddim without a stride": (lambda: LINEAR.grid("ddim300"), ValueError, "steps: no integer stride .*ddim300"),
    "steps: section too short": (lambda: LINEAR.grid("600,10"), ValueError, "steps: section 0 of '600,10' has 500"),
    "steps_offset": (lambda: LINEAR.grid(10, steps_offset=100), ValueError, "steps: .*got .*1000"),
    "spacing": (lambda: LINEAR.grid(10, spacing="karras"), ValueError, "spacing: expected 'leading', .* got 'karras'"),
    "final": (lambda: LINEAR.grid(10, final="last"), ValueError, "final: expected 'clean' or 'first', got 'last'"),
    "karras: sigma_min": (lambda: schedule.KarrasSchedule(sigma_min=0), ValueError, "sigma_min, sigma_max: .* 0.0, 80"),
    "karras: order": (lambda: schedule.KarrasSchedule(2.0, 1.0), ValueError, "sigma_min, sigma_max: .* got 2.0, 1.0"),
    "karras: sigma_max inf": (lambda: schedule.KarrasSchedule(sigma_max=np.inf), ValueError, "sigma_max: .* got .*inf"),
    "karras: sigma_max NaN": (lambda: schedule.KarrasSchedule(sigma_max=np.nan), ValueError, "sigma_max: .* got .*nan"),
    "karras: rho 0": (lambda: schedule.KarrasSchedule(rho=0), ValueError, "rho: expected a value above 0, got 0"),
    "karras: rho NaN": (lambda: schedule.KarrasSchedule(rho=np.nan), ValueError, "rho: expected .* above 0, got nan"),
    "karras: model at alpha 0": (
        lambda: schedule.KarrasSchedule(model=ZERO_SNR),
        ValueError,
        "model: expected a schedule with alpha > 0",
    ),
    "flow: shift 0": (lambda: schedule.FlowSchedule(shift=0), ValueError, "shift: expected a value above 0, got 0"),
    "flow: shift NaN": (lambda: schedule.FlowSchedule(shift=np.nan), ValueError, "shift: expected .* got nan"),
    "lambda: constant 0": (lambda: scaling.constant(0), ValueError, "lambda: expected a value above 0, got 0"),
    "lambda: constant NaN": (lambda: scaling.constant(np.nan), ValueError, "b: expected a finite number, got nan"),
    "lambda: below 0 on the way": (
        lambda: scaling.linear(-0.2, 1.0, origin="noisiest").values(10),
        ValueError,
        "lambda: expected finite values above 0, got 0.0 at step 5 of 10 from the noisiest, by linear",
    ),
    "lambda: array with NaN": (
        lambda: scaling.array([1.0, np.nan], origin="cleanest"),
        ValueError,
        "lambda: expected finite values above 0, got nan at step 0 of 2",
    ),
    "lambda: array with inf": (lambda: scaling.array([np.inf], origin="noisiest"), ValueError, "lambda: .* got inf"),
    "lambda: array too short": (
        lambda: samplers.ddim(LINEAR, 5, scaling=scaling.array([1.0, 1.1], origin="noisiest")),
        ValueError,
        "scaling: expected one value for each of 5 steps, got 2",
    ),
    "lambda: empty array": (
        lambda: scaling.array([], origin="noisiest"),
        ValueError,
        r"values: expected shape \(steps,\), got \(0,\)",
    ),
    "lambda: overflow": (
        lambda: scaling.exponential(1e3, 1.0, origin="noisiest").values(5),
        ValueError,
        "lambda: expected finite values above 0, got inf at step 1 of 5",
    ),
    "origin": (
        lambda: scaling.linear(0.1, 1.0, origin="start"),
        ValueError,
        "origin: expected 'cleanest' or 'noisiest' .* got 'start'",
    ),
    "scaling: a string": (
        lambda: samplers.ddim(LINEAR, 5, scaling="1.005"),
        ValueError,
        r"scaling: expected a number, got the text .1\.005.: pass 1\.005",
    ),
    "scaling: True": (lambda: samplers.ddim(LINEAR, 5, scaling=True), TypeError, "scaling: expected .* got bool"),
    "scaling: NaN": (
        lambda: samplers.ddim(LINEAR, 5, scaling=np.nan),
        ValueError,
        "scaling: expected a finite .* got nan",
    ),
    "scaling: -1": (lambda: samplers.ddim(LINEAR, 5, scaling=-1), ValueError, "scaling: expected .* above 0, got -1"),
    "published: unknown": (
        lambda: epskernels.published("ADM", "CIFAR-10", 7),
        KeyError,
        "no published setting ADM/CIFAR-10/7/uniform; steps of ADM, CIFAR-10: expected one of 100, 50, 20, got 7",
    ),
    "published: system": (
        lambda: epskernels.published("DDPM", "CIFAR-10", 20),
        KeyError,
        "no published setting DDPM/CIFAR-10/20/uniform; system: expected one of 'ADM', 'EDM', 'DDIM', got 'DDPM'",
    ),
    "published: dataset": (
        lambda: epskernels.published("EDM", "CIFAR10", 35),
        KeyError,
        "; dataset of EDM: expected one of 'CIFAR-10', 'CIFAR-10 conditional', got 'CIFAR10'",
    ),
    "published: kind": (
        lambda: epskernels.published("EDM", "CIFAR-10", 35, "rk4"),
        KeyError,
        "; kind of EDM, CIFAR-10, 35: expected one of 'heun', 'euler', got 'rk4'",
    ),
    "sampler: argument": (
        lambda: samplers.ddpm(LINEAR, 5, clp=1.0),
        TypeError,
        "ddpm: expected arguments among scaling, .*, clip, guidance, spacing, steps_offset, final, got 'clp'",
    ),
    "sampler: argument of one without a grid of timesteps": (
        lambda: samplers.edm_heun(KARRAS, 5, spacing="trailing"),
        TypeError,
        "edm_heun: expected arguments among scaling, .* S_noise, got 'spacing'",
    ),
    "sampler: argument through another": (
        lambda: samplers.dit(5, clp=1.0),
        TypeError,
        "dit: expected arguments among scaling, .*guided_channels, T, .*variance, clip, spacing, .*, got 'clp'",
    ),
    "sampler: an argument of what it calls": (
        lambda: samplers.dit(5, schedule=LINEAR),
        TypeError,
        "dit: expected arguments among .*, got 'schedule'",
    ),
    "sampler: spacing of noise levels": (
        lambda: samplers.euler(KARRAS, 5, spacing="trailing"),
        ValueError,
        "spacing: expected none with a KarrasSchedule, got spacing='trailing'",
    ),
    "sampler: options of a grid that is made": (
        lambda: samplers.ddim(LINEAR.grid(5), 5, spacing="trailing", final="first"),
        ValueError,
        "spacing, final: expected none with a Grid, got spacing='trailing', final='first'",
    ),
    "sampler: spacing of ADM's chain": (
        lambda: samplers.ddpm(LINEAR, "20", spacing="trailing"),
        ValueError,
        "spacing, steps_offset: expected none where steps tells the timesteps, as '20' does, got 'trailing', 0",
    ),
    "sampler: an offset of given timesteps": (
        lambda: samplers.ddim(LINEAR, [900, 500, 100], steps_offset=1),
        ValueError,
        r"spacing, steps_offset: expected none .* as \[900, 500, 100\] does, got 'leading', 1",
    ),
    "ddpm: variance": (
        lambda: samplers.ddpm(LINEAR, 5, variance="learned"),
        ValueError,
        "variance: expected 'fixed_small', .* got 'learned'",
    ),
    "ddpm: learned variance of one step": (
        lambda: samplers.ddpm(LINEAR, 1, variance="learned_range"),
        ValueError,
        "variance: 'learned_range' needs at least two steps",
    ),
    "ddim: direction": (
        lambda: samplers.ddim(LINEAR, 5, direction="up"),
        ValueError,
        "direction: expected 'scaled' or 'unscaled', got 'up'",
    ),
    "ddim: eta -1": (lambda: samplers.ddim(LINEAR, 5, eta=-1), ValueError, "eta: expected a finite value >= 0, got -1"),
    "ddim: eta NaN": (lambda: samplers.ddim(LINEAR, 5, eta=np.nan), ValueError, "eta: expected a finite .* got nan"),
    "ddim: eta 50": (lambda: samplers.ddim(LINEAR, 5, eta=50.0), ValueError, "eta: expected no more noise .* got 50"),
    "ddim: spacing": (lambda: samplers.ddim(LINEAR, 5, spacing="log"), ValueError, "spacing: expected .* got 'log'"),
    "ddim: unknown option": (lambda: samplers.ddim(LINEAR, 5, spaces="log"), TypeError, "spaces"),
    "ddim: Karras schedule": (
        lambda: samplers.ddim(KARRAS, 5),
        TypeError,
        "schedule: expected a Grid or one of DiscreteSchedule, FlowSchedule, got KarrasSchedule",
    ),
    "ddim: another grid's steps": (lambda: samplers.ddim(LINEAR.grid(6), 5), ValueError, "steps: expected 6, .* got 5"),
    "edm: DDPM schedule": (lambda: samplers.edm_heun(LINEAR, 5), TypeError, "schedule: expected a KarrasSchedule"),
    "edm: S_churn -1": (lambda: samplers.edm_heun(KARRAS, 5, S_churn=-1), ValueError, "S_churn: .* >= 0, got -1"),
    "edm: S_noise NaN": (lambda: samplers.edm_euler(KARRAS, 5, S_noise=np.nan), ValueError, "S_noise: .* got nan"),
}
for kind in ("d_x", "c_noise", "alpha_out", "logvar_min", "g", "t"):
    for value in (np.nan, np.inf):
        BAD_CONSTRUCTORS[f"Table: {kind} {value}"] = (
            lambda kind=kind, value=value: table(**{kind: [0.0, value]}),
            ValueError,
            f"{kind}: expected a finite value, got {value} in row 1 of table",
        )
for steps in (0, -3, True, 2.5, None):
    BAD_CONSTRUCTORS[f"steps: {steps}"] = (
        lambda steps=steps: LINEAR.grid(steps),
        ValueError,
        f"steps: expected an integer of at least 1, got {steps}",
    )
    BAD_CONSTRUCTORS[f"karras, steps: {steps}"] = (
        lambda steps=steps: KARRAS.grid(steps),
        ValueError,
        f"steps: expected an integer of at least 1, got {steps}",
    )
    BAD_CONSTRUCTORS[f"flow, steps: {steps}"] = (
        lambda steps=steps: FLOW.grid(steps),
        ValueError,
        f"steps: expected an integer of at least 1, got {steps}",
    )
    for make in (schedule.linear, schedule.scaled_linear, schedule.cosine):
        BAD_CONSTRUCTORS[f"{make.__name__}, T: {steps}"] = (
            lambda make=make, steps=steps: make(steps),
            ValueError,
            f"T: expected an integer of at least 1, got {steps}",
        )
# Those of SAMPLERS that have no grid_options take a KarrasSchedule, or the timesteps of a distilled network.
SIGNATURES = {name: inspect.signature(sampler).parameters for name, sampler in samplers.SAMPLERS.items()}
SCHEDULES = {
    name: KARRAS for name, takes in SIGNATURES.items() if "grid_options" not in takes and name not in ("lcm", "tcd")
}
SCHEDULES |= {"flow_euler": FLOW}
for name, sampler in samplers.SAMPLERS.items():
    path = SCHEDULES.get(name, LINEAR)
    for argument, value, error, message in (
        ("prediction", "noise", ValueError, r"prediction: expected one of \('epsilon', .* got 'noise'"),
        ("prediction", None, ValueError, r"prediction: expected one of .* got None"),
        ("clip", 0, ValueError, "clip: expected a value above 0, or None, got 0"),
        ("clip", -1.0, ValueError, "clip: expected a value above 0, or None, got -1"),
        ("clip", np.nan, ValueError, "clip: expected a value above 0, or None, got nan"),
        ("guidance", np.nan, ValueError, "guidance: expected a finite value, got nan"),
        ("guidance", np.inf, ValueError, "guidance: expected a finite value, got inf"),
        ("scaling", 0.0, ValueError, "scaling: expected a value above 0, got 0"),
        ("scaling", None, TypeError, "scaling: expected a number, numbers .*, got NoneType"),
        ("eta", -1.0, ValueError, "eta: expected a finite value >= 0, got -1.0"),
        ("S_noise", np.nan, ValueError, "S_noise: expected a finite value >= 0, got nan"),
        ("order", 5, ValueError, "order: expected .*, got 5"),
        ("space", "x", ValueError, "space: expected 'vp' or 'sigma', got 'x'"),
    ):
        if argument not in SIGNATURES[name]:
            continue
        BAD_CONSTRUCTORS[f"{name}: {argument} {value}"] = (
            lambda sampler=sampler, path=path, argument=argument, value=value: sampler(path, 5, **{argument: value}),
            error,
            message,
        )
    BAD_CONSTRUCTORS[f"{name}: schedule"] = (lambda s=sampler: s("linear", 5), TypeError, "schedule: expected .*str")
    if path is not LINEAR or name in ("lcm", "tcd"):
        continue
    if "space" in SIGNATURES[name] and SIGNATURES[name]["space"].default == "sigma":
        BAD_CONSTRUCTORS[f"{name}: sigma space at alpha 0"] = (
            lambda sampler=sampler: sampler(ZERO_SNR, 5, spacing="trailing"),
            ValueError,
            "space: 'sigma' needs alpha > 0 at every step; take 'vp'",
        )
        continue
    if name == "ddim_inverse":  # it is asked at all points but the noisiest
        continue
    keeps_eps = "clip" not in SIGNATURES[name]
    BAD_CONSTRUCTORS[f"{name}: epsilon at alpha 0"] = (
        lambda sampler=sampler: sampler(ZERO_SNR, 5, spacing="trailing"),
        ValueError,
        f"schedule: {name} needs alpha > 0 at every step"
        if keeps_eps
        else r"prediction: 'epsilon' says nothing of x_0 where alpha is 0, sigma 1 \(step 0\)",
    )
    if keeps_eps:
        continue
    BAD_CONSTRUCTORS[f"{name}: lambda at alpha 0"] = (
        lambda sampler=sampler: sampler(
            ZERO_SNR,
            5,
            spacing="trailing",
            prediction="v_prediction",
            scaling=scaling.array([1.01] * 5, origin="noisiest"),
        ),
        ValueError,
        r"scaling: expected 1 where x is noise alone \(step 0\), got 1.01",
    )

BAD_CONSTRUCTORS |= {
    "Table: values no mapping": (lambda: Table([1.0]), TypeError, "values: expected a mapping of columns, got list"),
    "Table: text": (lambda: table(c_x="much"), ValueError, "c_x: expected numbers, got 'much'"),
    "Table: clip 0 in float32": (lambda: table(clip=1e-60), ValueError, "clip: expected a value above 0, .* got 1e-60"),
    "Table: nan in a check": (lambda: table(logvar_min=1000.0), ValueError, "variance of row 0"),
    "concat: no table": (lambda: epskernels.concat([1]), TypeError, "tables: expected Tables, got 1$"),
    "concat: None": (lambda: epskernels.concat(None), TypeError, "tables: expected a list of Tables, got None$"),
    "concat: a table": (
        lambda: epskernels.concat(table()),
        TypeError,
        "tables: expected a list of Tables, got epskernels.table.Table$",
    ),
    "concat: a word": (lambda: epskernels.concat("ddim"), TypeError, "tables: expected Tables, got 'd'$"),
    "Table: initial_sigma text": (lambda: Table(KEPT, initial_sigma="1"), ValueError, "initial_sigma: .* got '1'$"),
    "Table: initial_sigma None": (lambda: Table(KEPT, initial_sigma=None), ValueError, "initial_sigma: .* got None$"),
    "Table: as a list": (lambda: list(table()), TypeError, "'Table' object is not iterable"),
    "steps_offset": (
        lambda: LINEAR.timesteps(5, steps_offset=0.5),
        ValueError,
        "steps_offset: expected an integer, got 0.5",
    ),
    "steps: ddim with sections": (
        lambda: LINEAR.timesteps("ddim25,3"),
        ValueError,
        "steps: expected one count after 'ddim'",
    ),
    "cosine: max_beta nan": (lambda: schedule.cosine(max_beta=np.nan), ValueError, "max_beta: expected a value in"),
    "betas: first 0": (lambda: schedule.from_betas([0.0, 0.1]), ValueError, "betas: expected the first above 0, got 0"),
    "karras: model": (
        lambda: schedule.KarrasSchedule(model="x"),
        TypeError,
        "model: expected a DiscreteSchedule, got str",
    ),
    "karras: no levels": (lambda: KARRAS.grid_at([]), ValueError, "sigma: expected .N,. finite values above 0"),
    "karras: nan level": (lambda: KARRAS.grid_at([np.nan]), ValueError, "sigma: expected .N,. finite values above 0"),
    "edm_heun: S_min nan": (lambda: samplers.edm_heun(KARRAS, 4, S_min=np.nan), ValueError, "S_min, S_max: expected"),
    "heun: alpha 0": (
        lambda: samplers.heun(ZERO_SNR, 5, spacing="trailing", space="vp", prediction="v_prediction"),
        ValueError,
        "schedule: heun needs alpha > 0 at every step",
    ),
    "dpmpp_2m: solver": (lambda: samplers.dpmpp_2m(LINEAR, 5, solver="x"), ValueError, "solver: .* got 'x'"),
    "dpmpp_3m: third": (lambda: samplers.dpmpp_3m(LINEAR, 5, third="x"), ValueError, "third: .* got 'x'"),
    "unipc: order": (lambda: samplers.unipc(LINEAR, 5, order=4), ValueError, "order: expected 1, 2 or 3, got 4"),
    "unipc: solver": (lambda: samplers.unipc(LINEAR, 5, solver="bh3"), ValueError, "solver: .* got 'bh3'"),
    "unipc: alpha 0": (
        lambda: samplers.unipc(ZERO_SNR, 5, spacing="trailing", prediction="v_prediction"),
        ValueError,
        "schedule: unipc needs alpha > 0 at every step",
    ),
    "dpmpp_2m_sde: eta": (lambda: samplers.dpmpp_2m_sde(LINEAR, 5, eta=-1.0), ValueError, "eta: .* got -1"),
    "euler_ancestral: S_noise": (
        lambda: samplers.euler_ancestral(LINEAR, 5, S_noise=-1.0),
        ValueError,
        "S_noise: expected a finite value >= 0, got -1",
    ),
    "tcd: gamma": (
        lambda: samplers.tcd(LINEAR, 4, gamma=1.5),
        ValueError,
        "gamma: expected a value in .0, 1., got 1.5",
    ),
    "lcm: too many steps": (
        lambda: samplers.lcm(LINEAR, 60),
        ValueError,
        "steps: expected 1 <= steps <= .* got 60, 50",
    ),
    "pfgmpp_prior: D": (lambda: epskernels.pfgmpp_prior([1], (3,), 80.0, 0), ValueError, "D: .* got 0"),
    "pfgmpp_prior: sigma_max": (
        lambda: epskernels.pfgmpp_prior([1], (3,), -1.0, 8),
        ValueError,
        "sigma_max: expected a finite value above 0, got -1",
    ),
    "pfgmpp_prior: sigma_max text": (
        lambda: epskernels.pfgmpp_prior([1], (3,), "80", 8),
        ValueError,
        "sigma_max: expected a finite value above 0, got '80'$",
    ),
    "pfgmpp_prior: shape": (
        lambda: epskernels.pfgmpp_prior([1], 3, 80.0, 8),
        RuntimeError,
        "shape: expected a list or tuple of sizes, got 3$",
    ),
    "ddim: guidance text": (
        lambda: samplers.ddim(LINEAR, 4, guidance="7"),
        ValueError,
        "guidance: expected a finite value",
    ),
    "scaling: formula": (
        lambda: scaling.EpsilonScaling(lambda i: np.ones(3), "cleanest", "three").values(4),
        ValueError,
        r"lambda: expected one value for each of 4 steps, got shape \(3,\)",
    ),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("case", BAD_CONSTRUCTORS)
def test_bad_constructor(case):
    make, error, message = BAD_CONSTRUCTORS[case]
    with pytest.raises(error, match=message):
        make()
