"""Gradients through the step: the formula written again in float64, gradcheck, eager autograd; vmap; lambda learned."""

import functools
import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import epskernels
from epskernels import samplers, schedule
from epskernels.ops.gradient import step_gradients
from epskernels.spec import BAND_COLUMNS, INPUTS, band_dims_of
from epskernels.table import COLUMNS

from .test_step_bits import assert_same_bits, each_dtype_pair, make_row, random_rows, with_bands

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONAL = ("u", "m1", "m2", "v", "grad", "y", "rescale", "threshold")
PER_SAMPLE = ("rescale", "threshold")
ALL = (*OPTIONAL, "noise")
SUBSETS = [
    (*names, *noise)
    for names in (*itertools.chain.from_iterable(itertools.combinations(OPTIONAL[:6], n) for n in range(7)), OPTIONAL)
    for noise in ((), ("noise",), ("seeds",))
]
SOME = [(), ("u", "seeds"), ("m1", "m2"), ("v", "grad", "seeds"), ("u", "rescale", "threshold"), ("m1", "m2", "y"), ALL]
FORMULA = (
    "u",
    "m1",
    "m2",
    "v",
    "grad",
    "noise",
    "y",
    "rescale",
    "threshold",
)  # in the order of the formula's arguments
each_set = pytest.mark.parametrize(
    "names",
    [pytest.param(names, marks=() if names in (SOME[1], SOME[5], ALL) else pytest.mark.deep) for names in SOME],
    ids=lambda names: "-".join(names) or "bare",
)


def formula(
    x, f, rows, index, u=None, m1=None, m2=None, v=None, grad=None, z=None, y=None, rescale=None, threshold=None
):
    """(x', m0, y') by the formula of docs/architecture.md; no term is left out of it."""
    each = (-1, *[1] * (x.dim() - 1))
    columns = rows[index].reshape(-1, rows.shape[1], *each[1:]).unbind(1)
    row = dict(zip(COLUMNS + BAND_COLUMNS, columns, strict=False))
    fhat = f
    if u is not None:
        guided = row["guided_channels"].expand_as(x[:, :1] if x.dim() > 1 else x)
        channel = torch.arange(x.shape[1]).reshape(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else torch.zeros(1)
        fhat = torch.where((guided == 0) | (channel < guided), u + row["g"] * (f - u), f)
    fhat = fhat if rescale is None else rescale.reshape(each) * fhat
    m0 = torch.clamp(row["d_x"] * x + row["d_f"] * fhat, -row["clip"], row["clip"])
    if threshold is not None:
        bound = threshold.reshape(each)
        m0 = torch.clamp(m0, -bound, bound) / bound
    s = 1.0
    if v is not None:
        frac = (v + 1) / 2
        s = torch.exp((frac * row["logvar_max"] + (1 - frac) * row["logvar_min"]) / 2)
    total = row["c_x"] * x + row["c_f"] * fhat + row["c_m0"] * m0
    second = row["k_x"] * x + row["k_m0"] * m0
    for name, tensor in (("m1", m1), ("m2", m2), ("y", y)):
        if tensor is not None:
            total, second = total + row[f"c_{name}"] * tensor, second + row[f"k_{name}"] * tensor
    total = total if grad is None else total + row["c_grad"] * (s**2 * grad)
    total = total if z is None else total + row["c_noise"] * (s * z)
    if "l_next" in row:
        total = total + low_band(row["l_next"] * total + row["l_m0"] * m0 + row["l_x"] * x, band_dims_of(x.dim()))
    return total, m0, second


def low_band(values, dims):
    """By torch's own pooling: means of pairs, or of 2x2 blocks, the last of them filled up with zeros."""
    size = values.shape[-dims:]
    padding = [extra for length in reversed(size) for extra in (0, length % 2)]
    pool = torch.nn.functional.avg_pool2d if dims == 2 else torch.nn.functional.avg_pool1d
    means = pool(torch.nn.functional.pad(values.reshape(-1, 1, *size), padding), 2)
    means = torch.nn.functional.interpolate(means, scale_factor=2, mode="nearest")
    return means[(..., *(slice(length) for length in size))].reshape(values.shape)


def call(names, seed, shape=(2, 3), idle=0.25, x_dtype=torch.float32, f_dtype=torch.float32):
    """Rows and inputs of moderate numbers, of which m0 is clamped in about half."""
    torch.manual_seed(seed)
    rows = random_rows(3, names, seed, idle)
    for column, low, high in (("logvar_min", -3, -2), ("logvar_max", -1, 1), ("clip", 0.3, 2), ("g", 1.5, 4)):
        at = rows[:, COLUMNS.index(column)]
        off = at == (float("inf") if column == "clip" else 1 if column == "g" else 0)
        at.copy_(torch.where(off, at, torch.empty(3).uniform_(low, high)))
    for column in ("d_x", "d_f", *[column for column in COLUMNS if column[:2] in ("c_", "k_")]):
        rows[:, COLUMNS.index(column)].clamp_(-2, 2)
    inputs = {key: torch.randn(shape).to(f_dtype if key in ("f", "u", "v") else x_dtype) for key in ("x", "f", *names)}
    inputs |= {key: torch.empty(shape[0]).uniform_(0.4, 1.2) for key in PER_SAMPLE if key in names}
    if "seeds" in names:
        inputs["seeds"] = torch.randint(2**62, shape[:1])
    return rows, inputs


def noise_of(rows, index, inputs):
    """The normals that the step adds, in float64."""
    if "seeds" not in inputs:
        return inputs.get("noise")
    draws = rows[index, COLUMNS.index("draw")].expand(len(inputs["x"])).tolist()
    shape = inputs["x"].shape[1:]
    made = [epskernels.normal([s], shape, stream=0, draw=int(d)) for s, d in zip(inputs["seeds"], draws, strict=True)]
    return torch.cat(made)


def required(inputs, rows):
    """Leaves that require grad, by name; the seeds as they are."""
    leaves = {key: value.detach().clone() for key, value in (inputs | {"rows": rows}).items()}
    return {key: value if key == "seeds" else value.requires_grad_() for key, value in leaves.items()}


def backward(results, weights, leaves):
    """The leaves' gradients of a loss that is not linear in the results."""
    loss = sum(
        (result.double() * w + (result.double() * w) ** 2).sum() for result, w in zip(results, weights, strict=False)
    )
    wanted = {key: leaf for key, leaf in leaves.items() if key != "seeds"}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def expected_gradients(rows, index, inputs, weights):
    """By eager autograd through the formula in float64."""
    z = noise_of(rows, index, inputs)
    inputs = {key: value.double() for key, value in inputs.items() if key not in ("noise", "seeds")}
    leaves = required(inputs | ({} if z is None else {"z": z.double()}), rows.double())
    results = formula(index=index, **leaves)
    gradients = backward(results if "y" in inputs else results[:2], weights, leaves)
    return {"noise" if key == "z" else key: value for key, value in gradients.items()}


def assert_close(got, expected, tolerance, what=""):
    for key, gradient in got.items():
        size = expected[key].abs().max().clamp(min=1)
        error = ((gradient.double() - expected[key]).abs().max() / size).item()
        assert error <= tolerance, f"{what}: gradient by {key} is off by {error} of its largest"


def results_of(leaves, index):
    """x', m0, and y' where y is among the inputs: a row then writes it."""
    return step(leaves, index, **{"return_y" if "y" in leaves else "return_m0": True})


def step(leaves, index, **options):
    leaves = dict(leaves)
    return epskernels.step(leaves.pop("x"), leaves.pop("f"), leaves.pop("rows"), index, **leaves, **options)


# ---- the formula of the gradient ----


class Float64Step(torch.autograd.Function):
    """The formula forward, the package's gradient backward."""

    @staticmethod
    def forward(ctx, index, *tensors):
        ctx.save_for_backward(index, *tensors)
        x, f, rows, *more = tensors
        return formula(x, f, rows, index, *more)

    @staticmethod
    def backward(ctx, *bars_out):
        index, x, f, rows, *more = ctx.saved_tensors
        names = ("x", "f", "rows", "u", "m1", "m2", "v", "grad", "noise", "y", "rescale", "threshold")
        wanted = [name for name, needed in zip(names, ctx.needs_input_grad[1:], strict=True) if needed]
        bars = step_gradients(wanted, bars_out, x, f, rows, index, *more)
        return None, *(bars.get(name) for name in names)


@pytest.mark.parametrize("idle", [0, 0.4, 1], ids=["no_idle", "some_idle", "all_idle"])
@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([2, 0])], ids=["one_row", "row_each"])
@each_set
def test_gradcheck(names, index, idle):
    """First and second derivatives, of idle coefficients too."""
    names = tuple("noise" if name == "seeds" else name for name in names)
    rows, inputs = call(names, 3, (2, 2), idle)
    rows[:, COLUMNS.index("guided_channels")] = torch.tensor([9.5, 0.5, 1.5])  # no numbers at which the result jumps
    inputs = {key: value.double().requires_grad_() for key, value in inputs.items()}
    tensors = [inputs["x"], inputs["f"], rows.double().requires_grad_(), *(inputs.get(key) for key in FORMULA)]
    function = functools.partial(Float64Step.apply, index)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


# ---- the step's own gradients ----


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: "-".join(names) or "bare")
def test_gradients_of_every_subset_of_inputs(names):
    for index, idle in ((torch.tensor([2, 0]), 0.25), (torch.tensor([1, 1]), 0), (torch.tensor(1), 0)):
        rows, inputs = call(names, 5, (2, 33), idle)
        weights = torch.randn(3, 2, 33)
        leaves = required(inputs, rows)
        results = results_of(leaves, index)
        for result, plain in zip(results, results_of(inputs | {"rows": rows}, index), strict=True):
            assert_same_bits(result.detach(), plain, "forward")
        got = backward(results, weights, leaves)
        assert_close(got, expected_gradients(rows, index, inputs, weights), 3e-5, f"index {index.tolist()}")


@each_dtype_pair
def test_gradients_have_their_inputs_dtype(x_dtype, f_dtype):
    names = (*OPTIONAL, "seeds")
    rows, inputs = call(names, 7, (2, 65), 0, x_dtype, f_dtype)
    index, weights = torch.tensor([0, 2]), torch.randn(3, 2, 65)
    leaves = required(inputs, rows)
    got = backward(results_of(leaves, index), weights, leaves)
    assert {key: value.dtype for key, value in got.items()} == {
        key: leaf.dtype for key, leaf in leaves.items() if key != "seeds"
    }
    halves = [dtype for dtype in (x_dtype, f_dtype) if dtype != torch.float32]
    tolerance = max((32 * torch.finfo(dtype).eps for dtype in halves), default=3e-5)  # x' is rounded before the loss
    assert_close(got, expected_gradients(rows, index, inputs, weights), tolerance)


def layouts(tensor):
    return {
        "channels_last": tensor.contiguous(memory_format=torch.channels_last),
        "channel_half": torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]],
        "transposed": tensor.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", ["channels_last", "channel_half", "transposed"])
def test_gradients_in_any_layout(layout):
    names = (*OPTIONAL, "seeds")
    rows, inputs = call(names, 9, (2, 4, 3, 5))
    index, weights = torch.tensor([0, 2]), torch.randn(3, 2, 4, 3, 5)
    leaves = required(inputs, rows)
    laid = {key: layouts(leaf)[layout] if leaf.dim() == 4 else leaf for key, leaf in leaves.items()}
    got = backward(results_of(laid, index), weights, leaves)
    assert_close(got, expected_gradients(rows, index, inputs, weights), 3e-5)


@pytest.mark.parametrize("shape", [(2, 5), (2, 2, 4), (2, 2, 3, 5), (2, 1, 2, 4, 3)], ids=str)
def test_gradients_of_a_band(shape):
    """Some rows correct one, some do not; the band's own coefficients have a gradient too."""
    names = (*OPTIONAL, "seeds")
    rows, inputs = call(names, 25, shape, 0)
    rows = with_bands(rows, band_dims_of(len(shape)), 26, idle=0)
    rows[1, len(COLUMNS) + 2] = 0
    weights = torch.randn(3, *shape)
    for index in (torch.tensor([2, 0]), torch.tensor(1)):
        leaves = required(inputs, rows)
        got = backward(results_of(leaves, index), weights, leaves)
        assert got["rows"].shape == rows.shape and got["rows"][index][..., len(COLUMNS) : -1].all()
        assert_close(got, expected_gradients(rows, index, inputs, weights), 3e-5)


def test_gradcheck_of_a_band():
    names = ("u", "m1", "noise")
    rows, inputs = call(names, 27, (2, 1, 3, 3), 0)
    rows = with_bands(rows, 2, 28, idle=0)
    rows[:, COLUMNS.index("guided_channels")] = 0.5  # no number at which the result jumps
    inputs = {key: value.double().requires_grad_() for key, value in inputs.items()}
    # band_dims is no number to differentiate by.
    band, last = rows.double()[:, :-1].requires_grad_(), rows.double()[:, -1:]
    tensors = [inputs["x"], inputs["f"], band, *(inputs.get(key) for key in FORMULA)]

    def function(x, f, band, *more):
        return Float64Step.apply(torch.tensor([2, 0]), x, f, torch.cat([band, last], 1), *more)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("shape", [(3,), (1, 1), (3, 2, 1, 1, 2)], ids=str)
def test_gradients_of_any_rank(shape):
    rows, inputs = call(("u", "seeds"), 11, shape)
    for index in (torch.tensor(2), torch.arange(shape[0])):
        leaves, weights = required(inputs, rows), torch.randn(1, *shape)
        got = backward([step(leaves, index)], weights, leaves)
        zeros = torch.zeros(shape)
        assert_close(got, expected_gradients(rows, index, inputs, [weights[0], zeros]), 3e-5)


def test_an_expanded_gradient_and_one_result_unused():
    rows, inputs = call(("m1",), 13, (2, 5))
    for which in (0, 1):
        leaves = required(inputs, rows)
        step(leaves, torch.tensor(0), return_m0=True)[which].sum().backward()  # a gradient of stride 0
        other = required({key: value.double() for key, value in inputs.items()}, rows.double())
        formula(index=torch.tensor(0), **other)[which].sum().backward()
        for key in leaves:
            expected = torch.zeros_like(other[key]) if other[key].grad is None else other[key].grad
            assert_close({key: leaves[key].grad}, {key: expected}, 3e-5)


@pytest.mark.parametrize("alone", ["x", "f", "u", "m1", "v", "grad", "rows"])
def test_one_input_alone_requires_grad(alone):
    rows, inputs = call((*OPTIONAL, "seeds"), 15)
    leaves = required(inputs, rows)
    everything = backward(results_of(leaves, torch.tensor(1)), torch.ones(3, 2, 3), leaves)
    others = {key: value.detach() for key, value in leaves.items()} | {alone: leaves[alone]}
    got = backward(results_of(others, torch.tensor(1)), torch.ones(3, 2, 3), {alone: leaves[alone]})
    assert torch.equal(got[alone], everything[alone])


def test_gradients_by_backend(kernel):
    """On any kernel, which makes the noise again."""
    rows, inputs = call((*OPTIONAL, "seeds"), 17, (2, 70))
    index, weights = torch.tensor([1, 2]), torch.randn(3, 2, 70)
    if kernel.gpu:
        pytest.skip("the mirrored tensors of the host have no graph; tests/gpu/test_gpu.py has the GPU's")
    leaves = required(inputs, rows)
    got = backward(results_of(leaves, index), weights, leaves)
    assert_close(got, expected_gradients(rows, index, inputs, weights), 3e-5)


def test_double_backward():
    rows, inputs = call((*OPTIONAL, "seeds"), 19, (2, 7), 0.3)
    index, weights = torch.tensor([0, 2]), torch.randn(3, 2, 7)
    found = []
    z = noise_of(rows, index, inputs)
    for double in (False, True):
        cast = {key: value.double() if double and key != "seeds" else value for key, value in inputs.items()}
        if double:
            cast = {key: value for key, value in cast.items() if key != "seeds"}
        leaves = required(cast, rows.double() if double else rows)
        results = formula(index=index, **leaves, z=z.double()) if double else results_of(leaves, index)
        loss = sum((result * w).pow(2).sum() for result, w in zip(results, weights.to(results[0]), strict=True))
        wanted = [leaf for key, leaf in leaves.items() if key != "seeds"]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)
        found.append(dict(zip([key for key in leaves if key != "seeds"], second, strict=True)))
    assert_close(*found, 1e-4)


@pytest.mark.parametrize(
    ("at", "slope"), [(-2.0, 0), (-1.0, 1), (-0.5, 1), (1.0, 1), (1.5, 0), (float("nan"), 0)], ids=str
)
def test_clamp_passes_gradients_at_its_bounds(at, slope):
    x = torch.tensor([at], requires_grad=True)
    rows = make_row(d_x=1, clip=1, c_m0=1)
    epskernels.step(x, torch.zeros(1), rows, 0).backward()
    assert x.grad == slope


def test_uninitialised_history_is_harmless_where_it_is_idle():
    """NaN and infinity in all that is idle: no gradient sees them."""
    row = make_row(d_x=0.5, d_f=0.25, clip=2, c_x=1, c_m0=0.5)
    x, f = torch.randn(1, 6), torch.randn(1, 6)
    bare = required({"x": x, "f": f}, row)
    expected = backward(step(bare, 0, return_y=True), torch.ones(3, 1, 6), bare)
    poison = torch.tensor([[float("nan"), float("inf"), -float("inf")] * 2])
    elementwise = [key for key in ALL if key not in PER_SAMPLE]
    leaves = required({"x": x, "f": f} | dict.fromkeys(elementwise, poison), row)
    got = backward(step(leaves, 0, return_y=True), torch.ones(3, 1, 6), leaves)
    assert torch.equal(got["x"], expected["x"]) and torch.equal(got["f"], expected["f"])
    assert torch.equal(got["rows"], expected["rows"])
    for key in elementwise:
        assert torch.equal(got[key], torch.zeros(1, 6)), key


def test_rows_sum_over_the_samples_that_use_them():
    rows, inputs = call(("m1",), 21, (4, 5))
    leaves = required(inputs, rows)
    index = torch.tensor([2, 0, 2, 2])
    step(leaves, index).sum().backward()
    column = leaves["rows"].grad[:, COLUMNS.index("c_m1")]
    sums = [inputs["m1"][index == i].sum() for i in range(3)]
    torch.testing.assert_close(column, torch.stack([torch.as_tensor(value) for value in sums]))


def test_only_inputs_are_kept():
    rows, inputs = call((*OPTIONAL, "seeds"), 23)
    leaves, kept = required(inputs, rows), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        results_of(leaves, torch.tensor(1))
    index = 1  # of its own storage, made by the call
    assert len(kept) == len(leaves) + index and {leaf.data_ptr() for leaf in leaves.values()} <= set(kept)


def test_no_graph_where_none_is_asked_for():
    rows, inputs = call(("seeds",), 25)
    leaves = required(inputs, rows)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not step(leaves, 0).requires_grad
    assert step(inputs | {"rows": rows}, 0).grad_fn is None


# ---- what is refused, and what autograd must notice ----


@pytest.mark.parametrize("key", ["x", "f", "rows", *ALL])
@pytest.mark.parametrize("form", ["out", "m0", "y_out", "model_input"])
def test_a_step_into_given_tensors_refuses_gradients(key, form):
    rows, inputs = call(ALL, 27)
    tensors = inputs | {"rows": rows}
    tensors[key].requires_grad_()
    outputs = {"y_out": torch.full((2, 3), 7.0)}  # which the rows ask for
    outputs[form] = written = torch.full((2, 3), 7.0)
    with pytest.raises(RuntimeError, match=f"{key}: expected a tensor that does not require grad, or torch.no_grad"):
        step(tensors, 0, **outputs)
    assert (written == 7).all()
    with torch.no_grad():
        step(tensors, 0, **outputs)
    assert not (written == 7).any()


def test_forward_mode_is_refused():
    rows, inputs = call(("u",), 29)
    for key in inputs:
        others = {name: value for name, value in inputs.items() if name != key} | {"rows": rows}
        run = lambda t, key=key, others=others: step(others | {key: t}, 0)  # noqa: E731
        with pytest.raises(RuntimeError, match=f"{key}: expected a tensor without a tangent"):
            torch.func.jvp(run, (inputs[key],), (inputs[key],))


def test_a_threshold_from_the_state_passes_its_gradient_on():
    """dynamic_threshold is a step and a quantile: the derivative of both, beside the formula's."""
    rows, inputs = call((), 30, (2, 40), 0)
    rows[:, COLUMNS.index("d_x")] = 2
    rows[:, COLUMNS.index("clip")] = math.inf
    leaves, index, weights = required(inputs, rows), torch.tensor([0, 2]), torch.randn(3, 2, 40)
    threshold = epskernels.dynamic_threshold(
        leaves["x"], leaves["f"], leaves["rows"], index, ratio=0.8, sample_max_value=math.inf
    )
    got = backward(results_of(leaves | {"threshold": threshold}, index), weights, leaves)
    doubles = required(inputs | {"x": inputs["x"].double(), "f": inputs["f"].double()}, rows.double())
    m0 = formula(index=index, **doubles)[1]
    bound = m0.abs().quantile(0.8, dim=1)
    assert (bound > 1).all()
    expected = backward(formula(index=index, **doubles, threshold=bound)[:2], weights, doubles)
    assert_close(got, expected, 3e-5)


@pytest.mark.parametrize("key", ["f", "u", "rows"])
def test_sums_of_a_sample_refuse_gradients(key):
    rows, inputs = call(("u",), 32)
    tensors = inputs | {"rows": rows}
    tensors[key].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{key}: expected a tensor that does not require grad, or torch.no_grad"):
        epskernels.guidance_rescale(tensors["f"], tensors["u"], tensors["rows"], 0)
    with torch.no_grad():
        epskernels.guidance_rescale(tensors["f"], tensors["u"], tensors["rows"], 0)


@pytest.mark.parametrize("written", ["out", "m0", "y_out"])
def test_autograd_notices_what_a_step_overwrites(written):
    weight = torch.ones(1, requires_grad=True)
    rows, inputs = call((), 31)
    x = inputs["x"]
    loss = (weight * x).sum()  # keeps x
    with torch.no_grad():
        step(inputs | {"rows": rows}, 0, **{written: x})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["step", "step_plain", "step_m0", "step_y", "moments"])
def test_the_op_itself_has_no_gradient_and_pytorch_says_so(op):
    rows, inputs = call((), 33)
    x, f = inputs["x"].requires_grad_(), inputs["f"]
    others = () if op == "moments" else (f, rows, torch.tensor(0))
    result = getattr(torch.ops.epskernels, op)(x, *others)
    result = result[0] if isinstance(result, tuple) else result
    with pytest.warns(UserWarning, match=f"epskernels::{op}: an autograd kernel was not registered"):
        (result.sum() + 0 * x.sum()).backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autograd_learns_nothing_of_what_an_op_writes(compiled):
    """As docs/production_compile.md says of the ops called directly."""

    def loss_of(leaf):
        x = 3 * leaf
        torch.ops.epskernels.step_(x, torch.zeros(2), make_row(c_x=0.5), torch.tensor(0))
        return x.sum()

    leaf = torch.ones(2, requires_grad=True)
    torch._dynamo.reset()
    loss = (torch.compile(loss_of, backend="aot_eager", fullgraph=True) if compiled else loss_of)(leaf)
    loss.backward()
    assert loss == 3 and (leaf.grad == 3).all()  # where 1.5 is right
    torch.ops.epskernels.step_(leaf, torch.zeros(2), make_row(c_x=0.5), torch.tensor(0))
    assert (leaf == 0.5).all() and leaf._version == 0


# ---- torch.func ----


def loss_of(index, seeds, x, f, rows, m1):
    a, b = epskernels.step(x, f, rows, index, m1=m1, seeds=seeds, return_m0=True)
    return (a * a).sum() + b.sum()


@pytest.fixture
def batched():
    """(loss, tensors, (size, ...) x): a loss of (x, f, rows, m1), and as many x as vmap takes."""
    rows, inputs = call(("m1", "seeds"), 35, (2, 3))
    loss = functools.partial(loss_of, torch.tensor([2, 0]), inputs["seeds"])
    return loss, (inputs["x"], inputs["f"], rows, inputs["m1"]), torch.randn(4, 2, 3)


def test_func_grad(batched):
    loss, tensors, _ = batched
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, wanted in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors), expected, strict=True):
        assert torch.equal(got, wanted)


def test_per_sample_gradients(batched):
    """vmap of grad, and grad of vmap."""
    loss, (_, *others), many = batched
    gradient = torch.func.grad(loss, argnums=(0, 2))
    expected = [torch.stack(parts) for parts in zip(*(gradient(x, *others) for x in many), strict=True)]
    got = torch.vmap(gradient, in_dims=(0, None, None, None))(many, *others)
    torch.testing.assert_close(list(got), expected)

    summed = torch.func.grad(
        lambda xs, rows: torch.vmap(lambda x: loss(x, others[0], rows, others[2]))(xs).sum(), (0, 1)
    )
    by_x, by_rows = summed(many, others[1])
    torch.testing.assert_close([by_x, by_rows], [expected[0], expected[1].sum(0)])


def test_jacobian(batched):
    _, (x, f, rows, m1), _ = batched
    jacobian = torch.func.jacrev(lambda x: epskernels.step(x, f, rows[:, :], 0, m1=m1, noise=m1))(x)
    row = dict(zip(COLUMNS, rows[0].tolist(), strict=True))
    inside = (row["d_x"] * x + row["d_f"] * f).abs() <= row["clip"]
    torch.testing.assert_close(
        jacobian.reshape(6, 6), torch.diag((row["c_x"] + inside * row["c_m0"] * row["d_x"]).flatten())
    )


# For each case: the dimension of each input that vmap runs over, or None.
VMAPPED = {
    "x": {"x": 0},
    "x_last": {"x": 2},
    "all": dict.fromkeys(INPUTS, 0),
    "rows": {"rows": 1},
    "rows_and_index": {"rows": 0, "index": 0},
    "index": {"index": 0},
    "seeds": {"seeds": 1},
    "m1": {"m1": -1},
}


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([2, 0])], ids=["one_row", "row_each"])
@pytest.mark.parametrize("op", ["public", "step", "step_m0", "step_y"])
@pytest.mark.parametrize("dims", VMAPPED.values(), ids=list(VMAPPED))
def test_vmap(dims, op, index):
    """Bit for bit the calls one by one."""
    size, names = 3, (*OPTIONAL, "seeds")
    absent = ("noise",)
    if op in ("step", "step_m0"):  # which cannot write a second state
        absent, names = ("noise", "y"), tuple(name for name in names if name != "y")
    calls = []
    for seed in range(size):
        rows, inputs = call(names, 40 + seed)
        calls.append(inputs | {"rows": rows, "index": (index + seed) % 3} | dict.fromkeys(absent))
    in_dims = {name: dims.get(name) for name in INPUTS} | dict.fromkeys(absent)
    stacked = {name: calls[0][name] if in_dims[name] is None else torch.stack([c[name] for c in calls], in_dims[name])
               for name in INPUTS}  # fmt: skip

    def public(x, f, rows, index, *more):
        return epskernels.step(x, f, rows, index, **dict(zip(INPUTS[4:], more, strict=True)), return_y=True)

    run = public if op == "public" else getattr(torch.ops.epskernels, op)
    got = torch.vmap(run, in_dims=tuple(in_dims.values()))(*stacked.values())
    each = [run(*(calls[k if in_dims[name] is not None else 0][name] for name in INPUTS)) for k in range(size)]
    got, each = (got, each) if isinstance(got, tuple) else ((got,), [(result,) for result in each])
    for result, singles in zip(got, zip(*each, strict=True), strict=True):
        assert_same_bits(result, torch.stack(singles), op)


@pytest.mark.parametrize("dim, index", [(0, torch.tensor(1)), (2, torch.tensor([1, 0]))], ids=["one_row", "row_each"])
def test_vmap_of_step_plain(batched, dim, index):
    _, (_, f, *_), many = batched
    rows = torch.cat([make_row(c_x=0.5, c_f=2.0), make_row(c_x=1, c_m0=0.3, d_f=1)])
    got = torch.vmap(torch.ops.epskernels.step_plain, in_dims=(dim, None, None, None))(
        many.movedim(0, dim), f, rows, index
    )
    assert_same_bits(got, torch.stack([epskernels.step(x, f, rows, index) for x in many]), "step_plain")


def test_gradients_of_step_plain_are_those_of_step():
    """None, as of every op: the public step has them."""
    x, row = torch.ones(2, 3, requires_grad=True), make_row(c_x=1)
    results = [
        op(x, x.detach(), row, torch.tensor(0)) for op in (torch.ops.epskernels.step, torch.ops.epskernels.step_plain)
    ]
    assert results[0].requires_grad == results[1].requires_grad
    assert type(results[0].grad_fn) is type(results[1].grad_fn)


def test_vmap_of_vmap(batched):
    _, (_, f, rows, m1), many = batched
    run = lambda x: epskernels.step(x, f, rows, 1, m1=m1, noise=m1)  # noqa: E731
    twice = torch.stack([many, many + 1])
    assert torch.equal(torch.vmap(torch.vmap(run))(twice), torch.stack([torch.stack([*map(run, xs)]) for xs in twice]))


MOMENTS_VMAPPED = [
    {"f": 0},
    {"f": 2},
    {"u": 1},
    {"index": 0},
    {"rows": 1},
    dict.fromkeys(("f", "u", "rows", "index"), 0),
]


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([2, 0])], ids=["one_row", "row_each"])
@pytest.mark.parametrize("dims", MOMENTS_VMAPPED, ids="-".join)
@pytest.mark.filterwarnings("error")
def test_vmap_of_moments(dims, index):
    """Bit for bit the calls one by one; f alone too."""
    calls = []
    for seed in range(3):
        rows, inputs = call(("u",), 50 + seed)
        calls.append({"f": inputs["f"], "u": inputs["u"], "rows": rows, "index": (index + seed) % 3})
    in_dims = [dims.get(name) for name in calls[0]]
    stacked = [calls[0][name] if dim is None else torch.stack([c[name] for c in calls], dim)
               for name, dim in zip(calls[0], in_dims, strict=True)]  # fmt: skip
    each = [[calls[k if name in dims else 0][name] for name in calls[0]] for k in range(3)]
    got = torch.vmap(epskernels.moments, in_dims=tuple(in_dims))(*stacked)
    assert torch.equal(got, torch.stack([epskernels.moments(*one) for one in each]))
    got = torch.vmap(epskernels.guidance_rescale, in_dims=tuple(in_dims))(*stacked)
    assert torch.equal(got, torch.stack([epskernels.guidance_rescale(*one) for one in each]))
    if "f" in dims:
        got = torch.vmap(epskernels.moments, in_dims=dims["f"])(stacked[0])
        assert torch.equal(got, torch.stack([epskernels.moments(one[0]) for one in each]))


def test_vmap_of_moments_refuses():
    f, row = torch.ones(3, 2, 5), make_row(g=2)
    with pytest.raises(RuntimeError, match=r"f: expected shape \(B, ...\) with at least one element, got \(\)"):
        torch.vmap(epskernels.moments)(f[:, 0, 0])
    with pytest.raises(RuntimeError, match=r"u: expected shape \(2, 5\) as f has, got \(1, 5\)"):
        torch.vmap(lambda f, u: epskernels.moments(f, u, row, 0))(f, f[:, :1])
    with pytest.raises(RuntimeError, match="u, table, index: expected all of them, or none"):
        torch.vmap(lambda f: epskernels.moments(f, None, row, torch.tensor(0)))(f)


def test_vmap_of_normal():
    seeds = torch.arange(6).reshape(2, 3)
    got = torch.vmap(lambda s: epskernels.normal(s, (5,), dtype=torch.bfloat16, draw=3), in_dims=1)(seeds)
    assert torch.equal(got, torch.stack([epskernels.normal(s, (5,), dtype=torch.bfloat16, draw=3) for s in seeds.T]))
    with pytest.raises(RuntimeError, match=r"seeds: expected shape \(B,\), got \(\)"):
        torch.vmap(lambda s: torch.ops.epskernels.normal(s, [5], dtype=torch.float32))(torch.arange(6))


def test_vmap_refuses(batched):
    _, (x, f, rows, _), many = batched
    rows = make_row(c_x=1)
    with pytest.raises(RuntimeError, match="step_out: expected no torch.vmap around an op that writes"):
        torch.vmap(lambda x: epskernels.step(x, f, rows, 0, out=x))(many)
    with pytest.raises(RuntimeError, match="step_: expected no torch.vmap around an op that writes"):
        torch.vmap(lambda x: torch.ops.epskernels.step_(x, f, rows, torch.tensor(0)))(many)
    with pytest.raises(RuntimeError, match=r"f: expected shape \(3,\) as x has, got \(2, 3\)"):
        torch.vmap(lambda x: epskernels.step(x, f, rows, 0))(x)
    with pytest.raises(RuntimeError, match=r"x: expected shape \(B, ...\) with at least one element, got \(\)"):
        torch.vmap(lambda x: epskernels.step(x, x, rows, 0))(x[0])


# ---- under torch.compile ----


@each_set
def test_compiled_gradients(names):
    """Forward and backward in one graph each: the eager bits."""
    rows, inputs = call(names, 45, (2, 9))
    index, weights = torch.tensor([1, 2]), torch.randn(3, 2, 9)
    leaves = required(inputs, rows)
    expected = backward(results_of(leaves, index), weights, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(results_of, backend="aot_eager", fullgraph=True)
    got = backward(compiled(leaves, index), weights, leaves)
    for key, gradient in got.items():
        assert torch.equal(gradient, expected[key]), key


def test_compiled_gradients_of_any_size_are_compiled_once():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(results_of, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 4, 5), (4, 6, 7), (5, 7, 9)):  # none of 3, the number of rows: Dynamo takes equal sizes for one
        rows, inputs = call(("u", "v", "seeds"), 46, shape)
        index, weights = torch.arange(shape[0]) % 3, torch.randn(3, *shape)
        leaves = required(inputs, rows)
        expected = backward(results_of(leaves, index), weights, leaves)
        for key, gradient in backward(compiled(leaves, index), weights, leaves).items():
            assert torch.equal(gradient, expected[key]), key
    assert counter.frame_count == 1


@pytest.mark.deep
def test_compiled_gradients_by_inductor():
    rows, inputs = call((*OPTIONAL, "seeds"), 47, (2, 9))
    index, weights = torch.tensor([1, 2]), torch.randn(3, 2, 9)
    leaves = required(inputs, rows)
    torch._dynamo.reset()
    compiled = torch.compile(results_of, fullgraph=True)
    got = backward(compiled(leaves, index), weights, leaves)
    assert_close(got, expected_gradients(rows, index, inputs, weights), 3e-5)


def test_transforms_within_a_compiled_function_are_refused(batched):
    loss, tensors, _ = batched
    torch._dynamo.reset()
    with pytest.raises(Exception, match="expected no transform of torch.func within torch.compile"):
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(*tensors)
    got = torch.compile(torch.func.grad(loss), backend="aot_eager")(*tensors)  # which breaks the graph there
    assert torch.equal(got, torch.func.grad(loss)(*tensors))


# ---- lambda, learned ----

SCALED = {
    "ddpm": lambda scale: samplers.ddpm(schedule.linear(), 20, scaling=scale),
    "ddim_v": lambda scale: samplers.ddim(schedule.linear(), 20, scaling=scale, prediction="v_prediction"),
    "ddim_unscaled": lambda scale: samplers.ddim(schedule.linear(), 20, scaling=scale, direction="unscaled"),
    "edm_heun": lambda scale: samplers.edm_heun(schedule.KarrasSchedule(), 18, scaling=scale),
    "edm_of_timesteps": lambda scale: samplers.edm_euler(
        schedule.KarrasSchedule(model=schedule.linear()), 10, scaling=scale, prediction="epsilon"
    ),
    "dpmpp_2m": lambda scale: samplers.dpmpp_2m(schedule.linear(), 20, scaling=scale),
    "plms": lambda scale: samplers.plms(schedule.linear(), 20, scaling=scale),
    "lms_v": lambda scale: samplers.lms(schedule.linear(), 20, scaling=scale, prediction="v_prediction"),
    "seeds_3": lambda scale: samplers.seeds_3(schedule.KarrasSchedule(), 6, scaling=scale),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("scale", [0.9985, 1.0, 1.004, 1.3])
def test_scaled_rows_are_those_of_the_table_with_that_lambda(name, scale):
    expected = SCALED[name](scale)
    for table in (SCALED[name](1.0), SCALED[name](1.01)):
        rows = table.scaled_rows(torch.tensor(scale, dtype=torch.float64))
        assert torch.equal(rows, expected.rows)
        torch.testing.assert_close(table.scaled_rows(torch.full((len(table),), scale)), expected.rows)


def test_rows_where_no_lambda_is_defined_stay():
    table = samplers.ddim(schedule.linear().zero_terminal_snr(), 5, prediction="v_prediction", spacing="trailing")
    lambda_t = torch.full((5,), 1.1, requires_grad=True)
    rows = table.scaled_rows(lambda_t)
    assert torch.equal(rows[0], table.rows[0]) and (rows[1:] != table.rows[1:]).any(1).all()
    rows[:, :2].sum().backward()
    assert lambda_t.grad[0] == 0 and (lambda_t.grad[1:] != 0).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_lambda_that_is_not_above_0_cannot_be_stepped_with(value):
    rows = SCALED["ddpm"](1.0).scaled_rows(torch.tensor(value))
    with pytest.raises(RuntimeError, match="rows: expected finite coefficients"):
        epskernels.step(torch.ones(1, 2), torch.ones(1, 2), rows, 3)


@pytest.mark.parametrize(
    "value, message",
    [
        (1.0, "expected a tensor of float32 or float64, got 1.0"),
        (torch.tensor(1), "expected a tensor of float32 or float64, got torch.int64"),
        (torch.ones(3), r"expected shape \(\) or \(20,\) on cpu, got \(3,\) on cpu"),
        (torch.ones(20, 1), r"expected shape \(\) or \(20,\) on cpu, got \(20, 1\) on cpu"),
        (torch.ones(20, device="meta"), r"expected shape \(\) or \(20,\) on cpu, got \(20,\) on meta"),
    ],
    ids=str,
)
def test_scaled_rows_refuses(value, message):
    with pytest.raises(ValueError, match="lambda_t: " + message):
        SCALED["ddpm"](1.0).scaled_rows(value)


def test_rows_that_their_provenance_does_not_give_are_refused():
    columns = {"alpha_in": 0.5, "sigma_in": 0.5, "alpha_out": 1.0, "c_m0": 1.0, "d_x": 1.0}
    with pytest.raises(ValueError, match="scaled_rows: table has d_x, d_f that"):
        epskernels.Table(columns).scaled_rows(torch.tensor(1.0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lambda_is_found_by_gradient_descent(compiled):
    """The k and b of a linear lambda_t, through all five steps, from the states that it gives."""
    table = samplers.ddpm(schedule.cosine(), 5)
    seeds, i = torch.arange(4), torch.arange(5)
    start = epskernels.normal(seeds, (16,))

    def trajectory(k, b):
        rows, x, states = table.scaled_rows(b + k * i), start, []
        for row in range(5):
            x = epskernels.step(x, torch.tanh(1.5 * x), rows, row, seeds=seeds)
            states.append(x)
        return torch.stack(states)

    hidden = torch.tensor([-0.01, 1.04])
    target = trajectory(*hidden)
    learned = torch.tensor([0.0, 1.0], requires_grad=True)

    def loss(learned):
        return (trajectory(learned[0], learned[1]) - target).pow(2).sum()

    torch._dynamo.reset()
    evaluate = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    optimizer = torch.optim.LBFGS([learned], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        value = evaluate(learned)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(learned.detach(), hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", ["cuda_on_host"], indirect=True)
def test_an_index_out_of_range_spoils_no_other_sample_s_gradient(kernel):
    """Where a kernel reads rows itself, it answers NaN, and the way back reads no row outside of the table."""
    rows, inputs = call((), 3, (2, 5))
    x = inputs["x"].requires_grad_()
    epskernels.step(x, inputs["f"], rows, torch.tensor([1, 9]))[0].sum().backward()
    good = inputs["x"].detach()[:1].requires_grad_()
    epskernels.step(good, inputs["f"][:1], rows, torch.tensor([1])).sum().backward()
    assert torch.equal(x.grad[:1], good.grad)
