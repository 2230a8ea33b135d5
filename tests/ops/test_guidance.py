"""Sums over samples, bit for bit; guidance rescale and dynamic thresholding against diffusers' own formulas."""

import math

import pytest
import torch

import epskernels
from epskernels import samplers, schedule
from epskernels.guidance import guidance_rescale
from epskernels.ops import REFERENCE
from epskernels.table import COLUMNS

from .test_step_bits import each_dtype, make_inputs, make_row, random_rows

# ---- moments ----


def assert_same_sums(kernel, *arguments):
    got, expected = kernel.op("moments")(*arguments), REFERENCE["moments"](*arguments)
    assert got.dtype == torch.float64 and got.shape == (len(arguments[0]), 4 if len(arguments) > 1 else 2)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num().view(torch.int64), expected.nan_to_num().view(torch.int64))  # zeros' signs too


@pytest.mark.executed(cuda=2, triton=1)
@pytest.mark.parametrize("special", [0.0, 0.01])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 7, 5), (2, 1024), (3, 5000), (1, 4, 64, 65)], ids=str)
@each_dtype
def test_moments_have_the_reference_s_bits(kernel, dtype, shape, special):
    inputs = make_inputs(shape, ("u",), 1, dtype, dtype, special=special)
    rows, index = random_rows(4, ("u",), 2, idle=0.2), torch.arange(shape[0]) % 4
    f, u = inputs["f"], inputs["u"]
    for arguments in ((f,), (f, u, rows, index), (f, u, rows, torch.tensor(1))):
        assert_same_sums(kernel, *arguments)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_moments_keep_the_sign_of_zero(kernel, tiles):
    f = torch.stack([torch.full((1024 * tiles,), -0.0), torch.zeros(1024 * tiles)])
    assert_same_sums(kernel, f)
    assert_same_sums(kernel, f[:, :-1])


def test_moments_of_more_tiles_than_a_warp_takes(kernel):
    assert_same_sums(kernel, torch.randn(1, 1024 * 1024 + 1))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2000)], ids=str)
def test_moments_of_rows_that_cannot_be_applied(kernel, shape):
    """Where rows are read on the device, the sums of fhat are NaN, of that sample alone."""
    f, u = torch.randn(2, *shape)
    rows, index = random_rows(4, ("u",), 2, idle=0), torch.tensor([2, 4, -1, 3])
    rows[3, COLUMNS.index("guided_channels")] = 0.5
    if kernel.reads_rows:
        with pytest.raises(RuntimeError, match="index: expected values in"):
            kernel.op("moments")(f, u, rows, index)
        with pytest.raises(RuntimeError, match="rows: expected guided_channels to be an integer"):
            kernel.op("moments")(f, u, rows, torch.tensor(3))
        return
    sums = kernel.op("moments")(f, u, rows, index)
    assert sums[:, 2:].isnan().all(1).tolist() == [False, True, True, True]
    assert torch.equal(sums[:, :2], REFERENCE["moments"](f))
    assert torch.equal(sums[:1], REFERENCE["moments"](f[:1], u[:1], rows, index[:1]))


def test_moments_are_sums():
    f, u = torch.randn(3, 4, 50, 31), torch.randn(3, 4, 50, 31)
    row = make_row(g=3, guided_channels=2)
    fhat = torch.cat([(u + 3 * (f - u))[:, :2], f[:, 2:]], dim=1)
    expected = [
        power.double().flatten(1).sum(1) for value in (f.double(), fhat.double()) for power in (value, value**2)
    ]
    got = epskernels.moments(f, u, row, 0)
    torch.testing.assert_close(got, torch.stack(expected, dim=1), rtol=1e-6, atol=1e-5)
    assert torch.equal(epskernels.moments(f), got[:, :2])


def test_moments_do_not_depend_on_threads_or_batch():
    f = torch.randn(5, 70001)
    threads = torch.get_num_threads()
    together = epskernels.moments(f)
    torch.set_num_threads(2)
    two = epskernels.moments(f)
    torch.set_num_threads(threads)
    assert torch.equal(together, two)
    assert torch.equal(together, torch.cat([epskernels.moments(f[i : i + 1]) for i in range(5)]))


@pytest.mark.parametrize("layout", ["channels_last", "half_of_channels", "expanded", "misaligned"])
def test_moments_of_other_layouts(kernel, layout):
    f = torch.randn(2, 6, 5, 5)
    views = {
        "channels_last": f.to(memory_format=torch.channels_last),
        "half_of_channels": f[:, :3],
        "expanded": f[:1].expand_as(f),
        "misaligned": torch.randn(2 * 6 * 25 + 1)[1:].view(f.shape),
    }
    rows = torch.cat([torch.zeros(1, 3), make_row(g=3, guided_channels=2)], 1)[:, 3:]  # at any address
    assert_same_sums(kernel, views[layout])
    assert_same_sums(kernel, views[layout], torch.randn_like(views[layout]), rows, torch.tensor([0, 0]))


BAD_MOMENTS = {
    "f float64": (lambda f, row: (f.double(),), "f: expected dtype float32, float16 or bfloat16, got float64"),
    "f without dimensions": (
        lambda f, row: (f[0, 0],),
        r": expected shape \(B, ...\) with at least one element, got \(\)",
    ),
    "f empty": (lambda f, row: (f[:0],), r": expected shape \(B, ...\) with at least one element"),
    "u alone": (lambda f, row: (f, f), "u, rows, index: expected all of them, or none"),
    "u of another shape": (lambda f, row: (f, f[:1], row, torch.tensor(0)), "u: expected shape .* as f has"),
    "u of another dtype": (lambda f, row: (f, f.half(), row, torch.tensor(0)), "u: expected dtype float32 as f has"),
    "rows too narrow": (lambda f, row: (f, f, row[:, :3], torch.tensor(0)), r"rows: expected shape \(R, 24\) or"),
    "rows NaN": (lambda f, row: (f, f, row * math.nan, torch.tensor(0)), "rows: expected finite coefficients"),
    "index too big": (lambda f, row: (f, f, row, torch.tensor(1)), r"index: expected values in \[0, 1\), got 1"),
    "index negative": (
        lambda f, row: (f, f, row, torch.tensor([0, -1])),
        r"index: expected values in \[0, 1\), got -1",
    ),
    "index int32": (lambda f, row: (f, f, row, torch.tensor(0, dtype=torch.int32)), "index: expected dtype int64"),
    "index shape": (lambda f, row: (f, f, row, torch.tensor([0, 0, 0])), r"index: expected shape \(\) or \(2,\)"),
}

READ_ON_DEVICE = ("rows NaN", "index too big", "index negative")  # by kernels that do so: NaN


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_bad_moments(kernel, case):
    make, message = BAD_MOMENTS[case]
    arguments = make(torch.ones(2, 5), make_row(g=2))
    for op in (kernel.op("moments"), REFERENCE["moments"]):
        if op == REFERENCE["moments"] or kernel.reads_rows or case not in READ_ON_DEVICE:
            with pytest.raises(RuntimeError, match=message):
                op(*arguments)


@pytest.mark.parametrize("guided", [False, True])
def test_opcheck_moments(guided):
    f = torch.randn(2, 3, 5)
    arguments = (f, torch.randn(2, 3, 5), make_row(g=2), torch.tensor(0)) if guided else (f,)
    torch.library.opcheck(torch.ops.epskernels.moments.default, arguments)


# ---- guidance rescale ----


def rescaled(cfg, conditional, phi):
    """The paper's equations 15 and 16, which diffusers calls rescale_noise_cfg."""
    dims = tuple(range(1, cfg.dim()))
    ratio = conditional.std(dim=dims, keepdim=True) / cfg.std(dim=dims, keepdim=True)
    return phi * (cfg * ratio) + (1 - phi) * cfg


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("g", [1.5, 7.5, 20.0])
def test_guidance_rescale_is_the_paper_s(g, phi):
    generator = torch.Generator().manual_seed(1)
    x, f, u = (torch.randn(3, 4, 32, 32, generator=generator) for _ in range(3))
    table = samplers.ddim(schedule.linear(), 20, guidance=g)
    rescale = epskernels.guidance_rescale(f, u, table, 7, phi)
    assert rescale.shape == (3,) and rescale.dtype == torch.float32
    theirs = rescaled(u + g * (f - u), f, phi)
    plain = samplers.ddim(schedule.linear(), 20)
    torch.testing.assert_close(
        epskernels.step(x, f, table, 7, u=u, rescale=rescale),
        epskernels.step(x, theirs, plain, 7),
        rtol=1e-5,
        atol=1e-5,
    )
    if phi == 0:
        assert torch.equal(rescale, torch.ones(3))


@pytest.mark.parametrize("shape", [(3, 4, 7, 11), (2, 3, 32, 32)], ids=str)
@pytest.mark.parametrize("phi", [0.3, 0.7])
def test_guidance_rescale_has_the_reference_s_bits(kernel, shape, phi):
    f, u = torch.randn(2, *shape)
    rows = samplers.ddim(schedule.linear(), 20, guidance=7.5).rows
    expected = guidance_rescale(f, u, rows, 7, phi, backend="reference")  # on the host, wherever the kernel runs
    assert torch.equal(epskernels.guidance_rescale(f, u, rows, 7, phi), expected)


@pytest.mark.parametrize("phi", [-0.1, 1.1, math.nan])
def test_bad_phi(phi):
    f = torch.randn(2, 5)
    with pytest.raises(ValueError, match="phi: expected a value in"):
        epskernels.guidance_rescale(f, f, make_row(g=2), 0, phi)


# ---- dynamic thresholding ----


@pytest.mark.parametrize("sample_max_value", [1.0, 1.5, 100.0, math.inf])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 16, 17), (3, 1), (1, 2)], ids=str)
def test_dynamic_threshold_is_diffusers(shape, ratio, sample_max_value):
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(2)
    x, f, u = (torch.randn(shape, generator=generator) for _ in range(3))
    table = samplers.ddim(schedule.linear(), 20, guidance=7.5)
    row = {name: table[name][7] for name in ("d_x", "d_f")}
    threshold = epskernels.dynamic_threshold(x, f, table, 7, u=u, ratio=ratio, sample_max_value=sample_max_value)
    _, m0 = epskernels.step(x, f, table, 7, u=u, threshold=threshold, return_m0=True)
    scheduler = DDIMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=sample_max_value)
    denoised = (row["d_x"] * x.double() + row["d_f"] * (u + 7.5 * (f - u)).double()).float()
    theirs = scheduler._threshold_sample(denoised.reshape(*shape, *[1] * (4 - len(shape)))).reshape(shape)
    torch.testing.assert_close(m0, theirs, rtol=2e-5, atol=1e-6)
    assert (m0.abs() <= 1).all() and (threshold >= 1).all() and (threshold <= sample_max_value).all()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_dynamic_threshold_asks_for_nothing_that_denoising_does_not(sampler):
    """Neither noise nor history."""
    table = getattr(samplers, sampler)(schedule.linear(), 20, clip=None)
    x = 5 * torch.randn(2, 3, 8, 8)
    threshold = epskernels.dynamic_threshold(x, torch.randn_like(x), table, 7, sample_max_value=9.0)
    assert threshold.shape == (2,) and (threshold > 1).all()


def test_nan_gives_a_nan_threshold_to_its_sample_alone():
    x = torch.randn(3, 50)
    x[1, 3] = math.nan
    table = samplers.ddim(schedule.linear(), 20)
    threshold = epskernels.dynamic_threshold(x, x, table, 7)
    assert threshold.isnan().tolist() == [False, True, False]
    got = epskernels.step(x, x, table, 7, threshold=threshold)
    assert got.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0.0}, "ratio: expected a value in"), ({"ratio": 1.5}, "ratio: expected"),
        ({"ratio": math.nan}, "ratio: expected"),
        ({"sample_max_value": 0.5}, "sample_max_value: expected a value of at least 1"),
        ({"sample_max_value": math.nan}, "sample_max_value: expected"),
    ],
)  # fmt: skip
def test_bad_options_of_dynamic_threshold(options, message):
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=message):
        epskernels.dynamic_threshold(x, x, samplers.ddim(schedule.linear(), 20), 7, **options)


def test_a_table_whose_m0_is_no_x_0_has_no_threshold():
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"table: expected one whose m0 is x_0, and lms\[5\] keeps eps"):
        epskernels.dynamic_threshold(x, x, samplers.lms(schedule.linear(), 5), 3)


def test_in_one_graph_with_the_step():
    """What the whole sample says, and the step that takes it, without a graph break."""
    table = samplers.ddim(schedule.linear(), 20, guidance=7.5)

    def run(x, f, u, index):
        rescale = epskernels.guidance_rescale(f, u, table.rows, index)
        threshold = epskernels.dynamic_threshold(x, f, table.rows, index, u=u, rescale=rescale, sample_max_value=2.0)
        return epskernels.step(x, f, table.rows, index, u=u, rescale=rescale, threshold=threshold)

    x, f, u, index = (*(torch.randn(2, 3, 8, 8) for _ in range(3)), torch.tensor([3, 11]))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, f, u, index), run(x, f, u, index))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("numel", [1, 3, 1000, 786432])
def test_rescale_of_constant_outputs_is_1(numel, phi):
    """Zeros too: there is no deviation to bring anywhere. NaN in gives NaN out."""
    table = samplers.ddim(schedule.cosine(), 4, guidance=7.5)
    for value in (0.0, 1.0, 0.1, -123.456, 1e-20, 1e10):
        f = torch.full((2, numel), value)
        assert guidance_rescale(f, f, table, 1, phi).tolist() == [1.0, 1.0]
        assert guidance_rescale(f, -f, table, 1, phi).tolist() == [1.0, 1.0]
    f = torch.full((2, numel), 0.5)
    f[1, 0] = math.nan
    factors = guidance_rescale(f, f, table, 1, phi)
    assert factors[0] == 1 and factors[1].isnan()


def test_rescale_of_a_constant_conditional_output_takes_all_its_deviation():
    table = samplers.ddim(schedule.cosine(), 4, guidance=7.5)
    f, u = torch.full((1, 1000), 0.1), torch.randn(1, 1000)
    assert guidance_rescale(f, u, table, 1, 0.75).tolist() == [0.25]
