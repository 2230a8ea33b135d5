"""The generator: Philox's published words, normal and independent numbers, noise that depends on the seed alone.

Statistics run on fixed seeds, so that they pass or fail for good; their bounds follow from the sample size (5 standard
errors, unless said otherwise). The compiled kernel makes them: a test here holds it to the reference's bits.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

import epskernels
from epskernels import _C, samplers, schedule
from epskernels.ops import DTYPES, reference
from epskernels.table import COLUMNS

CAPABILITIES = _C.cpu_capabilities()
pytestmark = pytest.mark.usefixtures("one_thread")
WORD = 2**32 - 1
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


# ---- words ----


@pytest.mark.parametrize(
    "begin, count, message",
    [
        (-4, 4, "begin: expected a multiple of 4, at least 0"),
        (2, 4, "begin: expected a multiple of 4, at least 0"),
        (0, 0, "count: expected 1 to 1024"),
        (0, 1025, "count: expected 1 to 1024"),
        (2**63 - 4, 4, r"begin: expected less than 2\^63 - count"),
    ],
)
def test_elements_that_are_none(begin, count, message):
    with pytest.raises(ValueError, match=message):
        _C.normal_elements(77, 3, 1, begin, count)


def expected_elements(begin):
    """1,001 elements of seed 77, draw 3, stream 1, as the reference makes them."""
    group = torch.arange(251) + begin // 4
    counter = (group & WORD, group >> 32, torch.full_like(group, 3), torch.ones_like(group))
    words = reference.philox(counter, (torch.tensor(77), torch.tensor(0)))
    pairs = reference.box_muller(*words[:2]), reference.box_muller(*words[2:])
    return torch.stack([*pairs[0], *pairs[1]], dim=1).flatten()[:1001]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("begin", [0, 4, 2**34 - 512, 2**34, 2**40 + 64, 2**62], ids=str)
def test_elements_beyond_what_memory_holds(capability, begin):
    """The counter's high word counts from element 2^34 on."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(capability)
    got = torch.tensor(_C.normal_elements(77, 3, 1, begin, 1001))
    _C.set_cpu_capability(before)
    assert same_bits(got, expected_elements(begin))


# Philox4x32-10, from Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


def known_answers():
    words = [[int(word, 16) for word in line.split()] for line in KNOWN_ANSWERS.split("\n") if line]
    return [(line[:4], line[4:6], line[6:]) for line in words]


def python_words(counter, key):
    counter = [torch.tensor([word]) for word in counter]
    return [word.item() for word in reference.philox(counter, [torch.tensor([word]) for word in key])]


def compiled_words(counter, key):
    return _C.philox(counter, key)


@pytest.mark.parametrize("philox", [python_words, compiled_words], ids=["reference", "compiled"])
@pytest.mark.parametrize("counter, key, words", known_answers(), ids=["zeros", "ones", "pi"])
def test_philox_known_answers(philox, counter, key, words):
    assert philox(counter, key) == words


def test_philox_reference_and_compiled_agree():
    random = np.random.default_rng(1)
    for values in random.integers(0, 2**32, (500, 6)).tolist():
        assert python_words(values[:4], values[4:]) == compiled_words(values[:4], values[4:])


# ---- from words to normals ----


def dense_words():
    ends = 4096
    return torch.cat([torch.arange(0, 2**32, 4099), torch.arange(ends), torch.arange(2**32 - ends, 2**32)])


def uniforms(words):
    """The float32 numbers (w + 1/2)/2^32 that the logarithm sees, in float64."""
    return (words.float() * 2.0**-32 + 2.0**-33).double().numpy()


def cosine_and_sine(words):
    """Of 2*pi*w/2^32 in float64, from the nearest quarter turn, so that zeros are exact."""
    words = words.numpy()
    quarter = (words + 2**29 >> 30) % 4
    rest = ((words + 2**29) % 2**30 - 2**29) * (2 * np.pi / 2**32)
    c, s = np.cos(rest), np.sin(rest)
    return np.choose(quarter, [c, -s, -c, s]), np.choose(quarter, [s, c, -s, -c])


def relative_error(got, exact):
    got = got.double().numpy()
    assert (got[exact == 0] == 0).all()
    return (np.abs(got - exact)[exact != 0] / np.abs(exact[exact != 0])).max()


def test_log_polynomial():
    u = torch.cat([dense_words().float() * 2.0**-32 + 2.0**-33, torch.linspace(0.3, 1, 1_000_001)])
    assert relative_error(reference.log_poly(u), np.log(u.double().numpy())) < 2**-21


def test_cosine_and_sine_polynomials():
    words = dense_words()
    for got, exact in zip(reference.cos_sin_poly(words), cosine_and_sine(words), strict=True):
        assert relative_error(got, exact) < 2**-21


def test_exp_polynomial():
    y = torch.cat([torch.linspace(-87, 88, 1_000_001), torch.linspace(-1, 1, 1_000_001)])
    assert relative_error(reference.exp_poly(y), np.exp(y.double().numpy())) < 2**-21
    assert reference.exp_poly(torch.zeros(1)).item() == 1
    assert reference.exp_poly(torch.tensor([-1e9, float("-inf")])).log().tolist() == pytest.approx([-87, -87])
    assert reference.exp_poly(torch.tensor([1e9, float("inf")])).log().tolist() == pytest.approx([88, 88])
    assert reference.exp_poly(torch.tensor([float("nan")])).isnan().all()


def test_square_root_is_correctly_rounded():
    x = torch.cat([torch.linspace(0, 46, 1_000_001), torch.logspace(-38, 2, 1_000_001)])
    got = reference.sqrt_rounded(x)
    assert torch.equal(got, torch.from_numpy(np.sqrt(x.numpy())))


def test_normals_of_given_words():
    """Every radius with scattered angles, and every angle with scattered radii."""
    radius = dense_words()
    angle = radius[torch.randperm(len(radius), generator=torch.Generator().manual_seed(1))]
    z = reference.box_muller(radius, angle)
    for got, exact in zip(z, np.sqrt(-2 * np.log(uniforms(radius))) * cosine_and_sine(angle), strict=True):
        assert relative_error(got, exact) < 2**-20
    # Where u is near 1, its own rounding to float32 moves the radius, which is small there.
    u = (radius.double().numpy() + 0.5) / 2**32
    for got, exact in zip(z, np.sqrt(-2 * np.log(u)) * cosine_and_sine(angle), strict=True):
        error = np.abs(got.double().numpy() - exact)
        assert error.max() < 2**-11 and error[u < 0.99].max() < 2**-18


@pytest.mark.parametrize("seed", [0, 1, WORD, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("draw, stream", [(0, 0), (0, 1), (1, 0), (7, WORD), (WORD, 3), (2**31, 2**31)])
def test_which_words_make_which_normal(backend, seed, draw, stream):
    """Elements 4k to 4k + 3 come from the counter (k, 0, draw, stream); the key is the seed, low word first."""
    groups = [compiled_words([k, 0, draw, stream], [seed & WORD, seed >> 32]) for k in range(5)]
    words = torch.tensor(groups)
    pairs = [reference.box_muller(words[:, i], words[:, i + 1]) for i in (0, 2)]
    expected = torch.stack([*pairs[0], *pairs[1]], dim=1).reshape(1, -1)
    for size in (1, 2, 3, 4, 5, 18, 20):
        got = epskernels.normal([seed], (size,), draw=draw, stream=stream)
        assert same_bits(got, expected[:, :size].contiguous())


# ---- every backend the same ----


@pytest.mark.executed(cuda=2, triton=1)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (63,), (1000,), (3, 32, 32), (65537,)], ids=str)
@each_dtype
def test_normal_has_the_bits_of_the_reference(backend, dtype, shape):
    seeds = [0, 5, 2**64 - 1]
    got = epskernels.normal(seeds, shape, dtype=dtype, draw=4, stream=2)
    expected = reference.normal_reference(epskernels.as_seeds(seeds), shape, 4, 2)
    assert got.shape == (3, *shape)
    assert same_bits(got, expected.to(dtype))


def test_seeds_are_unsigned(backend):
    signed = epskernels.normal(torch.tensor([-1, -(2**63), -(2**32)]), (63,))
    assert same_bits(epskernels.normal([2**64 - 1, 2**63, 2**64 - 2**32], (63,)), signed)
    assert same_bits(epskernels.normal([-1, -(2**63), -(2**32)], (63,)), signed)


def test_seeds_at_any_stride(backend):
    seeds = torch.arange(12).reshape(4, 3)
    assert same_bits(epskernels.normal(seeds[:, 1], (63,)), epskernels.normal([1, 4, 7, 10], (63,)))


# ---- noise depends on the seed alone ----


@pytest.mark.interpreted(1)
@each_dtype
def test_normal_of_a_sample_alone_and_in_any_batch(backend, dtype):
    seeds = [3, 2**40, 0, 3, 2**64 - 1, 17, 1]
    batch = epskernels.normal(seeds, (3, 7, 9), dtype=dtype)
    alone = torch.cat([epskernels.normal([seed], (3, 7, 9), dtype=dtype) for seed in seeds])
    assert torch.equal(batch, alone)
    order = [4, 2, 0, 6, 5, 1, 3]
    assert torch.equal(epskernels.normal([seeds[i] for i in order], (3, 7, 9), dtype=dtype), batch[order])
    assert torch.equal(epskernels.normal(seeds[2:4], (3, 7, 9), dtype=dtype), batch[2:4])


@pytest.mark.parametrize("short", [1, 2, 3, 4, 5, 63, 1023, 1024, 1025])
def test_normal_of_a_longer_sample_starts_with_the_shorter_ones(backend, short):
    assert torch.equal(epskernels.normal([8, 9], (2500,))[:, :short], epskernels.normal([8, 9], (short,)))


def test_normal_of_a_shape_is_the_flat_one_reshaped(backend):
    assert torch.equal(epskernels.normal([8, 9], (3, 20, 25)).flatten(1), epskernels.normal([8, 9], (1500,)))


def mixed_table():
    vp = schedule.linear()
    return epskernels.concat(
        [
            samplers.ddpm(vp, 5, scaling=1.017),
            samplers.ddim(vp, 4, eta=1.0, guidance=3.0),
            samplers.ddpm(vp, 6, variance="learned_range"),
            samplers.dpmpp_2m(vp, 3),
        ]
    )


@pytest.mark.interpreted(1)
@each_dtype
def test_step_of_a_sample_alone_and_in_a_mixed_batch(backend, dtype):
    table, batch = mixed_table(), 9
    g = torch.Generator().manual_seed(5)
    inputs = {key: torch.randn(batch, 3, 11, 5, generator=g).to(dtype) for key in ("x", "f", "u", "m1", "v")}
    inputs["seeds"] = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
    index = torch.tensor([0, 6, 16, 10, 3, 14, 7, 4, 12])
    together = epskernels.step(table=table, index=index, **inputs)
    for i in range(batch):
        alone = {key: value[i : i + 1] for key, value in inputs.items()}
        assert torch.equal(epskernels.step(table=table, index=index[i], **alone), together[i : i + 1])
    order = torch.randperm(batch, generator=g)
    moved = {key: value[order] for key, value in inputs.items()}
    assert torch.equal(epskernels.step(table=table, index=index[order], **moved), together[order])


@pytest.mark.parametrize("draw", [0, 1, 999, 2**24 - 1])
@each_dtype
def test_noise_of_a_step_is_normal_of_its_draw(backend, dtype, draw):
    row = {"clip": math.inf, "g": 1.0, "c_noise": 1.0, "draw": draw}
    rows = torch.tensor([[row.get(column, 0.0) for column in COLUMNS]])
    seeds, zero = torch.tensor([0, -1, 2**40]), torch.zeros(3, 5, 301, dtype=dtype)
    got = epskernels.step(zero, zero, rows, 0, seeds=seeds)
    assert torch.equal(got, epskernels.normal(seeds, (5, 301), dtype=dtype, draw=draw, stream=0))


def test_rows_of_a_table_draw_apart_and_the_same_in_a_concatenation(backend):
    table = samplers.ddpm(schedule.linear(), 5)
    both = epskernels.concat([samplers.ddim(schedule.linear(), 3), table])
    x, seeds = torch.zeros(1, 63), torch.tensor([12])
    assert len(set(table["draw"])) == len(table)
    for i, draw in enumerate(table["draw"]):
        noise = table.rows[i, COLUMNS.index("c_noise")] * epskernels.normal(seeds, (63,), draw=int(draw), stream=0)
        assert torch.equal(epskernels.step(x, x, table, i, seeds=seeds), noise)
        assert torch.equal(epskernels.step(x, x, both, 3 + i, seeds=seeds), noise)


# ---- normal: the law of one variable ----

MANY = 2**24


@pytest.fixture(scope="module")
def many():
    """2^24 normals of 64 seeds, float32."""
    return epskernels.normal(range(64), (MANY // 64,)).flatten()


@pytest.mark.parametrize("lane", ["all", 0, 1, 2, 3])
def test_moments(many, lane):
    """Of all normals, and of the four that each counter gives: cosine and sine of two radii."""
    z = (many if lane == "all" else many[lane::4]).double()
    n = len(z)
    moments = [(z**k).mean().item() for k in (1, 2, 3, 4, 6)]
    # Var(z^k) = E z^2k - (E z^k)^2, with E z^2k = (2k - 1)!!
    for got, exact, variance in zip(moments, (0, 1, 0, 3, 15), (1, 2, 15, 96, 10170), strict=True):
        assert abs(got - exact) < 5 * math.sqrt(variance / n)
    centred = z - z.mean()
    deviation = centred.square().mean().sqrt()
    skewness = (centred**3).mean() / deviation**3
    kurtosis = (centred**4).mean() / deviation**4
    assert abs(skewness) < 5 * math.sqrt(6 / n)
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / n)


@pytest.mark.parametrize("side", [-1, 1], ids=["below", "above"])
@pytest.mark.parametrize("sigmas", [1, 2, 3, 4, 5])
def test_tails(many, sigmas, side):
    """The count lies inside all but a millionth of the binomial law."""
    count = (many * side > sigmas).sum().item()
    low, high = scipy.stats.binom.interval(1 - 1e-6, len(many), scipy.stats.norm.sf(sigmas))
    assert low <= count <= high


def test_largest(many):
    """32-bit uniforms end at sqrt(66*ln(2)) = 6.764; 2^24 normals reach 5 with near certainty."""
    largest = many.abs().max().item()
    assert 5 < largest < 6.8
    lowest_word = reference.box_muller(torch.tensor([0]), torch.tensor([0]))[0].item()
    assert lowest_word == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    assert many.isfinite().all()


@pytest.mark.parametrize("draw, stream", [(0, 1), (0, 0), (1, 0), (WORD, WORD)])
def test_kolmogorov_smirnov(draw, stream):
    z = epskernels.normal([2024], (500_000,), draw=draw, stream=stream)[0]
    assert scipy.stats.kstest(z.double().numpy(), "norm").pvalue > 1e-3


def test_kolmogorov_smirnov_of_radius_and_angle():
    """z0^2 + z1^2 is exponential and the angle uniform, for the pairs of Box-Muller and for pairs across them."""
    z = epskernels.normal([77], (1_000_000,))[0].double().reshape(-1, 4).numpy()
    for i, j in itertools.combinations(range(4), 2):
        assert scipy.stats.kstest((z[:, i] ** 2 + z[:, j] ** 2) / 2, "expon").pvalue > 1e-3
        assert scipy.stats.kstest(np.arctan2(z[:, i], z[:, j]), "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-3


# ---- normal: many variables ----


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 1024, 4096, 65536])
def test_autocorrelation(many, lag):
    z = many[: 2**22].double()
    for values, variance in ((z, 1), ((z**2 - 1), 4), (z.abs() - math.sqrt(2 / math.pi), (1 - 2 / math.pi) ** 2)):
        correlation = (values[:-lag] * values[lag:]).mean().item()
        assert abs(correlation) < 5 * math.sqrt(variance / (len(z) - lag))


def assert_uncorrelated(z):
    """z: (variables, samples). No pair's correlation, nor that of their squares, beyond what N(0, 1) would show.

    The bound is for the largest of all pairs, met by chance once in a million.
    """
    variables, samples = z.shape
    pairs = variables * (variables - 1) / 2
    bound = scipy.stats.norm.isf(1e-6 / (2 * pairs)) / math.sqrt(samples)
    for values in (z.double(), z.double() ** 2):
        correlation = torch.corrcoef(values).fill_diagonal_(0)
        assert correlation.abs().max() < bound


FAMILIES = {
    "seeds_from_0": lambda n: epskernels.normal(range(64), (n,)),
    "seeds_at_2^63": lambda n: epskernels.normal(range(2**63 - 32, 2**63 + 32), (n,)),
    "seeds_apart_in_the_high_word": lambda n: epskernels.normal([5 + (i << 32) for i in range(64)], (n,)),
    "seeds_apart_in_one_bit": lambda n: epskernels.normal([1 << i for i in range(64)], (n,)),
    "draws": lambda n: torch.cat([epskernels.normal([5], (n,), draw=i, stream=0) for i in range(64)]),
    "streams": lambda n: torch.cat([epskernels.normal([5], (n,), draw=0, stream=i) for i in range(64)]),
    "draw_and_stream_swapped": lambda n: torch.cat(
        [epskernels.normal([5], (n,), draw=i, stream=j) for i in range(8) for j in range(8)]
    ),
    "seed_and_draw_swapped": lambda n: torch.cat(
        [epskernels.normal([i], (n,), draw=j) for i in range(8) for j in range(8)]
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_correlation_between(family):
    assert_uncorrelated(FAMILIES[family](2**15))


@pytest.mark.parametrize("across", ["seeds", "draws"])
def test_no_correlation_between_elements(across):
    """Element i and element j of a sample, over many samples."""
    if across == "seeds":
        z = epskernels.normal(range(2**15), (64,))
    else:
        z = torch.cat([epskernels.normal([3], (64,), draw=draw, stream=0) for draw in range(2**13)])
    assert_uncorrelated(z.T)


def test_neighbouring_seeds_by_element():
    """Element e of seed s against element e of seed s + 1 and s + 2^32, over many seeds."""
    n = 2**17
    z = epskernels.normal(range(n + 1), (4,)).double()
    high = epskernels.normal([s + 2**32 for s in range(n)], (4,)).double()
    for other in (z[1:], high):
        assert ((z[:-1] * other).mean(0).abs() < 5 / math.sqrt(n)).all()
        assert (((z[:-1] ** 2 - 1) * (other**2 - 1)).mean(0).abs() < 5 * 2 / math.sqrt(n)).all()


def test_no_normal_appears_twice_in_a_row_of_counters():
    """A repeated counter would repeat four normals; by chance two of 2^18 pairs are the same once in 2^19 runs."""
    z = epskernels.normal([1, 2], (2**19,)).reshape(-1, 4)
    pairs = z[:, :2].contiguous().view(torch.int64).flatten()
    assert len(pairs.unique()) == len(pairs)
