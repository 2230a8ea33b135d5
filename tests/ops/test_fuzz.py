"""Random calls of the ops, most of them malformed: they raise or return, as the reference does, with the same bits.

Everything runs in a child process, so that a crash is a failure with its output. A call depends on its number alone:
`python -m tests.ops.test_fuzz NUMBER` repeats that one and shows its arguments.
"""

import collections
import faulthandler
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch

import epskernels
from epskernels import _C, ops
from epskernels.table import COLUMNS, SECOND_STATE

from ..support import kernels

ALLOWED = (RuntimeError, TypeError, ValueError)
LIKE_X, LIKE_F = ("x", "m1", "m2", "y", "grad", "noise"), ("f", "u", "v")
OUTPUTS = ("out", "m0", "y_out", "model_input")
FLOATS = (*LIKE_X, *LIKE_F)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ANY_DTYPE = (
    *DTYPES, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e5m2,
)  # fmt: skip
SAMPLES = ((), (1,), (7,), (3, 5), (2, 3, 4), (1, 2, 1, 3), (4, 1, 5), (2, 2, 16)) * 2 + ((1030,), (3, 700))
# The kernels that calls go to by turns: the CPU kernel's, and the CUDA kernel's source on the host.
TURNS = [name for name in kernels.KERNELS if name in (*kernels.READ_ROWS, "cuda_on_host")]
TURNS = [name for name in TURNS if not kernels.why_missing(name)]


# ---- well-formed calls ----


def random_values(rng, shape, dtype):
    values = torch.randn(shape) * rng.choice((1.0, 1.0, 1e-3, 1e4))
    if rng.random() < 0.2 and values.numel():
        flat = values.view(-1)
        for _ in range(rng.randrange(1, 4)):
            special = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 6e-8, 65520.0, 3.4e38)
            flat[rng.randrange(len(flat))] = rng.choice(special)
    return values.to(dtype)


def random_layout(rng, values, may_expand=True):
    """The same values in some other layout."""
    kind = rng.choice(("plain",) * 5 + ("half", "permuted", "strided", "offset") + ("expanded",) * may_expand)
    if kind == "half" and values.dim() > 1:
        buffer = torch.cat([values, values + 1], dim=1)
        return buffer[:, : values.shape[1]] if rng.random() < 0.5 else buffer[:, values.shape[1] :]
    if kind == "permuted":
        order = rng.sample(range(values.dim()), values.dim())
        return values.permute(order).contiguous().permute([order.index(d) for d in range(values.dim())])
    if kind == "strided":
        return torch.stack([values, values], dim=-1)[..., 0]
    if kind == "offset":
        return torch.cat([values.new_zeros(3), values.reshape(-1)])[3:].view(values.shape)
    if kind == "expanded":
        sizes = [slice(0, 1) if rng.random() < 0.5 else slice(None) for _ in values.shape]
        return values[tuple(sizes)].clone().expand(values.shape)
    return values


def random_row(rng):
    row = {name: rng.choice((0.0, rng.gauss(0, 1))) for name in COLUMNS}
    row |= {"d_x": rng.gauss(0, 1), "d_f": rng.gauss(0, 1), "clip": rng.choice((math.inf, 1.0, 0.0, 0.3))}
    row |= {"g": rng.choice((1.0, 0.0, 7.5)), "draw": float(rng.choice((0, 1, 999, 2**24 - 1)))}
    row["guided_channels"] = float(rng.choice((0, 0, 1, 2, 100)))
    if rng.random() < 0.7:
        row |= {"logvar_min": 0.0, "logvar_max": 0.0}
    if rng.random() < 0.6:
        row |= dict.fromkeys(("c_y", *SECOND_STATE), 0.0)
    return [row[name] for name in COLUMNS]


def random_step(rng, name):
    batch, sample = rng.randrange(1, 5), rng.choice(SAMPLES)
    x_dtype, f_dtype = (torch.float32,) * 2 if rng.random() < 0.4 else (rng.choice(DTYPES), rng.choice(DTYPES))
    shape, count = (batch, *sample), rng.randrange(1, 5)
    rows = torch.tensor([random_row(rng) for _ in range(count)])
    if rng.random() < 0.2:
        rows = torch.cat([rows, rows], dim=1)[:, : len(COLUMNS)]
    index = torch.tensor([rng.randrange(count) for _ in range(batch)]) if rng.random() < 0.6 else rng.randrange(count)
    index = random_layout(rng, index) if torch.is_tensor(index) else torch.tensor(index)
    if name not in ("step_y", "step_out", "step_"):
        rows[:, [COLUMNS.index(key) for key in SECOND_STATE]] = 0
    used = {key: column for key, column in zip(COLUMNS, rows[index].view(-1, len(COLUMNS)).unbind(1), strict=True)}
    needed = {
        "u": (used["g"] != 1).any(),
        "m1": used["c_m1"].any() or used["k_m1"].any(),
        "m2": used["c_m2"].any() or used["k_m2"].any(),
        "y": used["c_y"].any() or used["k_y"].any(),
        "v": used["logvar_min"].any() or used["logvar_max"].any(),
        "noise": used["c_noise"].any(),
    }
    a = {"rows": rows, "index": index}
    for key in FLOATS:
        if key in ("x", "f") or needed.get(key) or rng.random() < 0.3:
            dtype = x_dtype if key in LIKE_X else f_dtype
            may_expand = key != "x" or name != "step_"
            a[key] = random_layout(rng, random_values(rng, shape, dtype), may_expand)
    if "noise" in a and rng.random() < 0.7:
        del a["noise"]
        a["seeds"] = random_layout(rng, torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(batch)]))
    for key in ("rescale", "threshold"):
        if rng.random() < 0.2:
            a[key] = random_layout(rng, torch.tensor([rng.uniform(0.1, 2.0) for _ in range(batch)]))
    if name == "step_out":
        a["out"] = random_output(rng, a, "x", taken=())
    if name in ("step_out", "step_"):
        if rng.random() < 0.5:
            a["m0"] = random_output(rng, a, "x" if name == "step_out" else "m1", taken=(a.get("out"),))
        if any(used[key].any() for key in SECOND_STATE) or rng.random() < 0.2:
            a["y_out"] = random_output(rng, a, "x" if name == "step_out" else "y", taken=(a.get("out"), a.get("m0")))
        if rng.random() < 0.3:
            doubled = torch.full((batch * rng.randrange(1, 3), *sample), 7.0, dtype=f_dtype)
            a["model_input"] = random_layout(rng, doubled, may_expand=False)
    return a


def random_output(rng, a, favourite, taken):
    """A new tensor, or now and then one of the inputs that an output may stand on."""
    like = a["x"]
    old = [a[key] for key in (favourite, "m1", "m2", "f") if key in a and all(a[key] is not t for t in taken)]
    old = [t for t in old if t.dtype == like.dtype and 0 not in t.stride() and (favourite == "x" or t is not like)]
    if old and rng.random() < 0.4:
        return rng.choice(old)
    return random_layout(rng, torch.full(like.shape, 7.0, dtype=like.dtype), may_expand=False)


def random_normal(rng):
    seeds = torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(rng.randrange(1, 5))])
    a = {"seeds": random_layout(rng, seeds), "shape": list(rng.choice(SAMPLES)), "dtype": rng.choice(DTYPES)}
    a["draw"], a["stream"] = rng.choice((0, 5, 2**32 - 1)), rng.choice((0, 1, 2**32 - 1))
    return a


# ---- what is done to them ----


def drop(rng, a, key):
    del a[key]


def replace(rng, a, key):
    a[key] = rng.choice((None, 3, 0.5, "cpu", [1.0, 2.0], True))


def convert(rng, a, key):
    a[key] = a[key].to(rng.choice(ANY_DTYPE))


def move(rng, a, key):
    a[key] = a[key].to("meta")


def make_sparse(rng, a, key):
    a[key] = a[key].to_sparse()


def reshape(rng, a, key):
    t = a[key]
    a[key] = rng.choice(
        (
            lambda: t[None],
            lambda: t[..., None],
            lambda: t.reshape(-1),
            lambda: t[:0],
            lambda: t.new_empty(0),
            lambda: t.reshape(-1)[0],
            lambda: torch.cat([t, t]) if t.dim() else t[None],
            lambda: t.reshape(1, -1),
            lambda: t[..., :0] if t.dim() else t.reshape(1)[:0],
            lambda: t.mT if t.dim() > 1 else t[None],
        )
    )()


def break_rows(rng, a, key):
    rows = a["rows"] = a["rows"].clone()
    row = rng.randrange(len(rows))
    if rng.random() < 0.6:
        rows[row, rng.randrange(len(COLUMNS))] = rng.choice((math.nan, math.inf, -math.inf))
    else:
        bad = [("clip", -1.0), ("clip", -0.0)]
        bad += [(column, value) for column in ("draw", "guided_channels") for value in (-1.0, 0.5, 2.0**24)]
        column, value = rng.choice(bad)
        rows[row, COLUMNS.index(column)] = value


def restride_rows(rng, a, key):
    rows = a["rows"]
    a["rows"] = rng.choice(
        (
            lambda: rows[:, ::2],
            lambda: torch.stack([rows, rows], dim=-1)[..., 0],
            lambda: rows[:1].expand(2, -1),
            lambda: rows.t().contiguous().t(),
            lambda: torch.cat([rows, rows], dim=1),
            lambda: torch.cat([rows, rows]).reshape(-1).as_strided((2, len(COLUMNS)), (5, 1)),
        )
    )()


def break_index(rng, a, key):
    a["index"] = a["index"].clone()
    count = len(a["rows"])
    bad = rng.choice((-1, count, count + 7, 2**31, -(2**63), 2**63 - 1, 2**58, 2**60))
    a["index"].view(-1)[rng.randrange(a["index"].numel())] = bad


def add_both(rng, a, key):
    a["seeds"], a["noise"] = torch.arange(len(a["x"])), torch.zeros(a["x"].shape, dtype=a["x"].dtype)


def overlap(rng, a, key):
    """An output and another tensor move into one buffer, some elements apart."""
    output = rng.choice([name for name in (*OUTPUTS, "x") if name in a])
    other = rng.choice([name for name in a if name != output])
    words, more = a[output].numel(), a[other].numel() * a[other].element_size()
    size = a[output].element_size()
    buffer = torch.zeros((2 * words * size + more + 64) // 8 * 8, dtype=torch.uint8)
    begin = words * size // 8 * 8
    place = buffer[begin : begin + more].view(a[other].dtype).view(a[other].shape)
    a[other] = place.copy_(a[other])
    start = begin + size * rng.randrange(-words, more // size + 1)
    start = min(max(start, 0), buffer.numel() - words * size) // size * size
    a[output] = buffer[start : start + words * size].view(a[output].dtype).view(a[output].shape)


def fold_output(rng, a, key):
    """Strides with which elements of an output share their memory."""
    output = rng.choice([name for name in (*OUTPUTS, "x") if name in a])
    t = a[output]
    if rng.random() < 0.5:
        a[output] = t.reshape(-1)[:1].clone().view([1] * t.dim()).expand(t.shape)
    else:
        strides = [rng.randrange(0, 6) for _ in t.shape]
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
        a[output] = torch.zeros(reach, dtype=t.dtype).as_strided(t.shape, strides)


def break_shape(rng, a, key):
    bad = rng.choice((0, -1, -(2**63), 0.5, None, 2**40, 2**62, 2**70))
    a["shape"].insert(rng.randrange(len(a["shape"]) + 1), bad)
    if isinstance(bad, int) and 2**40 <= bad < 2**70:
        a["shape"].append(2**40)


def break_integer(rng, a, key):
    a[rng.choice(("draw", "stream"))] = rng.choice((-1, 2**32, 2**63 - 1, -(2**63), 0.5, "1", None, 2**70))


def break_dtype(rng, a, key):
    a["dtype"] = rng.choice((torch.float64, torch.int64, torch.bool, torch.complex64, None, "float32"))


def add_unknown(rng, a, key):
    a["lam"] = 1.0


ON_ANY = (drop, replace, convert, convert, move, make_sparse, reshape, reshape, reshape)
ON_STEP = (break_rows, break_rows, restride_rows, break_index, break_index, add_both, add_unknown)
ON_OUTPUTS = (overlap, overlap, overlap, fold_output)
ON_NORMAL = (break_shape, break_shape, break_integer, break_integer, break_dtype, add_unknown)


def random_call(number):
    """(op, arguments, what was done to them); equal numbers give equal calls, in memory of their own."""
    rng = random.Random(number)
    torch.default_generator.manual_seed(number)
    name = rng.choice(("step", "step_m0", "step_y", "step_out", "step_out", "step_", "step_", "normal"))
    a = random_normal(rng) if name == "normal" else random_step(rng, name)
    done = []
    if rng.random() < 0.78:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            special = ON_NORMAL if name == "normal" else ON_STEP + (ON_OUTPUTS if name in ("step_out", "step_") else ())
            change = rng.choice(ON_ANY + special)
            keys = [key for key, value in a.items() if change in (drop, replace) or torch.is_tensor(value)]
            try:
                change(rng, a, key := rng.choice(keys))
            except (RuntimeError, IndexError, KeyError, ValueError, TypeError, AttributeError):
                continue  # two changes that do not go together
            done.append(f"{change.__name__} {key}" if change in ON_ANY else change.__name__)
    return name, a, done


# ---- running and comparing them ----


def plain(value):
    return torch.is_tensor(value) and value.layout == torch.strided and value.device.type == "cpu"


def memory(tensor, dtype=torch.uint8):
    """The whole storage, what lies beside the tensor included."""
    return torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())


def same_bits(a, b):
    """Equal bytes, but for the payload of NaN."""
    a, b = (t.clone(memory_format=torch.contiguous_format).view(-1) for t in (a, b))
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    if torch.equal(a.view(integers), b.view(integers)):
        return True
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(*(t.masked_fill(nan, 0).view(integers) for t in (a, b)))


def run(function, a):
    """(result, None) or (None, the error)."""
    try:
        return function(**a), None
    except ALLOWED as error:
        return None, error


def argument_of(error):
    """The argument that an error of epskernels names."""
    text = str(error)
    if text.startswith("epskernels: ") and not text.startswith("epskernels: expected"):
        return text.split(":")[1].strip()
    return None


def check(number, counts):
    name, a, done = random_call(number)
    _, b, _ = random_call(number)
    before = {key: memory(value).clone() for key, value in a.items() if plain(value)}
    kernel = TURNS[number % len(TURNS)]
    if kernel in _C.cpu_capabilities():
        _C.set_cpu_capability(kernel)
        function = getattr(torch.ops.epskernels, name)
    else:
        function = kernels.overload(kernel, name)
    result, error = run(function, a)
    expected, expected_error = run(ops.REFERENCE[name], b)
    said = f"call {number}, {name}, {done}: {kernel} {error or 'returned'}; reference {expected_error or 'returned'}"
    assert (error is None) == (expected_error is None), said
    if error is not None:
        for key, kept in before.items():
            assert torch.equal(memory(a[key]), kept), f"{said}; and {key} was written"
            assert torch.equal(memory(b[key]), kept), f"{said}; and the reference wrote {key}"
        names = argument_of(error), argument_of(expected_error)
        assert len(done) != 1 or None in names or names[0] == names[1], f"{said}; not the same argument"
    else:
        results = result if isinstance(result, tuple) else (result,)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for one, other in zip(results, expected, strict=True):
            if one is not None:
                assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride()), said
                assert not plain(one) or same_bits(one, other), f"{said}; other bits"
        outputs = [a[key] for key in (*OUTPUTS, *(("x",) if name == "step_" else ())) if key in before]
        written = {t.untyped_storage().data_ptr(): t.dtype for t in outputs}
        for key, kept in before.items():
            dtype = written.get(a[key].untyped_storage().data_ptr())
            if dtype is None:
                assert torch.equal(memory(a[key]), kept), f"{said}; {key} was written"
            else:
                assert same_bits(memory(a[key], dtype), memory(b[key], dtype)), f"{said}; other bits in {key}"
    counts[kernel] += 1
    counts["malformed" if done else "well-formed"] += 1
    counts["refused" if error is not None else "returned"] += 1
    if done and error is not None:
        counts["malformed and refused"] += 1
    counts[name] += 1


def main():
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    os.environ["EPSKERNELS_CHECK_ROWS"] = "1"
    if len(sys.argv) == 2:
        name, a, done = random_call(int(sys.argv[1]))
        print(name, done, *(f"{key} = {value}" for key, value in a.items()), sep="\n", flush=True)
        check(int(sys.argv[1]), collections.Counter())
        return
    counts, progress = collections.Counter(), open(sys.argv[2], "w")  # noqa: SIM115
    for number in range(int(sys.argv[3])):
        progress.seek(0)
        progress.write(f"{number:8}")
        progress.flush()
        check(number, counts)
    print(json.dumps({"package": epskernels.__file__, **counts}))


@pytest.mark.parametrize("calls", [800, pytest.param(15000, marks=pytest.mark.deep)])
@pytest.mark.skipif(not TURNS, reason="none of the kernels that were asked for is here")
def test_malformed_calls(extension, calls):
    with tempfile.NamedTemporaryFile("r") as progress:
        command = [sys.executable, "-m", "tests.ops.test_fuzz", "--progress", progress.name, str(calls)]
        child = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1200, cwd=kernels.ROOT)
        last = progress.read().strip()
    assert child.returncode == 0, f"exit status {child.returncode} in call {last}:\n{child.stdout}\n{child.stderr}"
    counts = json.loads(child.stdout.splitlines()[-1])
    print(counts)
    assert pathlib.Path(counts["package"]) == pathlib.Path(epskernels.__file__), "the child tested another installation"
    assert counts["malformed and refused"] > calls * 2 / 3
    assert counts["returned"] > calls / 5


if __name__ == "__main__":
    main()
