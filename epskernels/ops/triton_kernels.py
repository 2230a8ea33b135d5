"""The step's kernels in Triton, for GPUs without the compiled CUDA kernel, and for Inductor, which sees the kernel in its graphs.

Mirrors csrc/step.h, csrc/philox.h, csrc/polynomials.h and csrc/moments_cuda.cu; the formula and the coefficients are those of
reference.py. One launch per step, whatever the rows; index, rows and seeds are read on the device. A sample whose index is
out of range, or whose row asks for what is not there, comes out as NaN.
"""

import triton
import triton.language as tl

from .. import build, spec

LOG, SIN, COS, EXP = (tl.constexpr(tuple(spec.POLYNOMIALS[name].values())) for name in ("LOG", "SIN", "COS", "EXP"))
LN2, LN2_HIGH, LN2_LOW = tl.constexpr(spec.LN2), tl.constexpr(spec.LN2_HIGH), tl.constexpr(spec.LN2_LOW)
LOG2_E, TURN, MAGIC = tl.constexpr(spec.LOG2_E), tl.constexpr(spec.TURN), tl.constexpr(spec.MAGIC)
EXP_LEAST, EXP_MOST = tl.constexpr(spec.EXP_LEAST), tl.constexpr(spec.EXP_MOST)
SQRT_HALF_BITS = tl.constexpr(spec.SQRT_HALF_BITS)
STREAM_STEP = tl.constexpr(spec.STREAM_STEP)


def _columns(*names):
    """Where a row has them."""
    return [tl.constexpr((spec.COLUMNS + spec.BAND_COLUMNS).index(name)) for name in names]


D_X, D_F, CLIP, G, GUIDED_CHANNELS = _columns("d_x", "d_f", "clip", "g", "guided_channels")
C_X, C_F, C_M0, C_M1, C_M2 = _columns("c_x", "c_f", "c_m0", "c_m1", "c_m2")
C_Y, C_GRAD, C_NOISE, C_IN_NEXT = _columns("c_y", "c_grad", "c_noise", "c_in_next")
K_X, K_M0, K_M1, K_M2, K_Y = _columns("k_x", "k_m0", "k_m1", "k_m2", "k_y")
DRAW, LOGVAR_MIN, LOGVAR_MAX = _columns("draw", "logvar_min", "logvar_max")
L_NEXT, L_M0, L_X, BAND_DIMS = _columns(*spec.BAND_COLUMNS)
INTERPRETED = tl.constexpr(build.interprets_triton())
# What the kernels call. Interpreted, each call of a jit function would patch triton.language anew: half of the time.
device_function = (lambda function: function) if INTERPRETED.value else triton.jit


# ---- arithmetic ----


@device_function
def mul(a, b):
    """a*b rounded once: a*b + -0, exact in one fma, which no compiler can fuse with an addition whatever its flags.

    It cannot know this -0, which comes from a dimension that every grid leaves at 1. (Inductor passes no enable_fp_fusion.)
    """
    return tl.fma(a, b, tl.program_id(2).to(tl.float32) * -1.0)


@device_function
def _horner(COEFFICIENTS: tl.constexpr, x):
    p = mul(x, COEFFICIENTS[0]) + COEFFICIENTS[1]
    for i in tl.static_range(2, len(COEFFICIENTS.value)):
        p = mul(p, x) + COEFFICIENTS[i]
    return p


@device_function
def log_poly(u):
    """ln(u), u in (0, 1]. These functions are those of reference.py."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    return mul(e.to(tl.float32), LN2) + mul(_horner(LOG, f), f)


@device_function
def cos_sin_poly(turn):
    """cos and sin of 2*pi*turn/2^32."""
    quadrant = tl.add(turn, 0x20000000, sanitize_overflow=False)  # in its two high bits
    a = mul((turn << 2).to(tl.int32, bitcast=True).to(tl.float32), TURN / 4)
    a2 = mul(a, a)
    s = mul(_horner(SIN, a2), a).to(tl.uint32, bitcast=True)
    c = _horner(COS, a2).to(tl.uint32, bitcast=True)
    odd = (quadrant & 0x40000000) != 0
    cosine = tl.where(odd, s, c) ^ (tl.add(quadrant, 0x40000000, sanitize_overflow=False) & 0x80000000)
    sine = tl.where(odd, c, s) ^ (quadrant & 0x80000000)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@device_function
def exp_poly(y):
    """exp(y), y held to [EXP_LEAST, EXP_MOST]."""
    y = tl.where(y < EXP_LEAST, EXP_LEAST, y)
    y = tl.where(y > EXP_MOST, EXP_MOST, y)
    rounded = mul(y, LOG2_E) + MAGIC
    k = rounded - MAGIC
    r = (y - mul(k, LN2_HIGH)) - mul(k, LN2_LOW)
    magic_bits = 0x4B400000
    exponent = tl.sub(rounded.to(tl.int32, bitcast=True), magic_bits - 127, sanitize_overflow=False) << 23
    return mul(_horner(EXP, r), exponent.to(tl.float32, bitcast=True))


@device_function
def _clamp(value, bound):
    low = mul(bound, -1.0)
    value = tl.where(value < low, low, value)
    return tl.where(value > bound, bound, value)


@device_function
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10: a counter and a key to four words."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@device_function
def box_muller(radius_word, angle_word):
    """Two normals of two words."""
    u = mul(radius_word.to(tl.float32), 2.0**-32) + 2.0**-33
    radius = tl.sqrt_rn(mul(log_poly(u), -2.0))
    cosine, sine = cos_sin_poly(angle_word)
    return mul(radius, cosine), mul(radius, sine)


@device_function
def _four_normals(seed, draw, stream, low, high):
    w0, w1, w2, w3 = philox(low, high, draw, stream, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@device_function
def normals(seed, draw, stream, start, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Of the elements start to start + BLOCK, start a multiple of BLOCK: the counter's low word does not carry.

    A thread has VEC elements in a row, and makes them all: one counter, or two.
    """
    low = (start >> 2).to(tl.uint32) + tl.arange(0, BLOCK // VEC).to(tl.uint32) * (VEC // 4)
    high = (start >> 34).to(tl.uint32)
    z0, z1, z2, z3 = _four_normals(seed, draw, stream, low, high)
    if VEC == 8:
        y0, y1, y2, y3 = _four_normals(seed, draw, stream, low + 1, high)
        z0, z1, z2, z3 = tl.interleave(z0, y0), tl.interleave(z1, y1), tl.interleave(z2, y2), tl.interleave(z3, y3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@device_function
def _picked(shift, a, b, c, d):
    return tl.where(shift < 2, tl.where(shift == 0, a, b), tl.where(shift == 2, c, d))


@device_function
def normals_at(seed, draw, stream, first, ALIGNED: tl.constexpr):
    """Of four elements from each of `first` (64 bits) on: of one counter where `first` are multiples of 4, else of two."""
    counter = first >> 2
    z0, z1, z2, z3 = _four_normals(seed, draw, stream, counter.to(tl.uint32), (counter >> 32).to(tl.uint32))
    if not ALIGNED:
        counter, shift = counter + 1, first & 3
        y0, y1, y2, y3 = _four_normals(seed, draw, stream, counter.to(tl.uint32), (counter >> 32).to(tl.uint32))
        y0, y1, y2, z3 = (
            _picked(shift, z0, z1, z2, z3),
            _picked(shift, z1, z2, z3, y0),
            _picked(shift, z2, z3, y0, y1),
            _picked(shift, z3, y0, y1, y2),
        )
        z0, z1, z2 = y0, y1, y2
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# ---- memory ----


@device_function
def _lanes(BLOCK: tl.constexpr, VEC: tl.constexpr):
    """A tile's elements: where dtypes are mixed, all tensors are laid out over the threads as the widest is."""
    return tl.max_contiguous(tl.arange(0, BLOCK), VEC)


@device_function
def _widen(value):
    if INTERPRETED and value.dtype == tl.bfloat16:  # Triton's interpreter misreads bfloat16's subnormals
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@device_function
def _rounded(value, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + (0x7FFF + ((bits >> 16) & 1)), 0x7FC00000)
        value = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@device_function
def _load(ptr, stride, sample, start, count, lane):
    """The first `count` elements of a tile, in float32; the others are not read, and 0."""
    return _widen(tl.load(ptr + sample * stride + start + lane, mask=lane < count, other=0.0))


@device_function
def _store(ptr, stride, sample, start, count, lane, value):
    tl.store(ptr + sample * stride + start + lane, _rounded(value, ptr.dtype.element_ty), mask=lane < count)


@device_function
def _tile(numel, tiles, BLOCK: tl.constexpr):
    """This program's sample, the first of its elements, and how many remain from there on: all of 64 bits."""
    sample, tile = tl.full([], 0, tl.int64), tl.program_id(0)
    if tiles is not None:
        sample = (tile // tiles).to(tl.int64)
        tile = tile % tiles
    start = tile.to(tl.int64) * BLOCK
    return sample, start, numel - start


# ---- the low band ----


@device_function
def offsets(i, tile, numel, height, width, BLOCK: tl.constexpr, BAND: tl.constexpr):
    """Where the elements i of a tile stand in the sample; those that are none, outside of the image, beyond numel.

    A tile is made of units of four columns (an image row's last may have fewer) and of one row, or of two. The lower of two
    rows are the tile's second half: so a thread has all elements of its blocks. height: None where the rows of the whole
    sample pair up.
    """
    unit = tile.to(tl.uint32) * (BLOCK // BAND // 4 + 0 * numel)  # of 64 bits where numel is
    unit += i % (BLOCK // BAND) // 4
    units = tl.full([], (width + 3) // 4, unit.dtype)  # in a row, or in two
    row, column = unit // units, unit % units * 4 + i % 4
    inside = column < width
    if BAND == 2:
        lower = i // (BLOCK // 2)
        if height is None:
            row = row * 2 + lower
        else:
            pairs = tl.full([], (height + 1) // 2, unit.dtype)
            lower += row % pairs * 2
            inside &= lower < height
            row = row // pairs * height + lower
    return row.to(tl.int64) * width + column + tl.where(inside, 0, numel)


@device_function
def _low_band(value, BAND: tl.constexpr):
    """Of a tile, laid out as `offsets` has it. Mirrors reference.py::low_band."""
    even, odd = tl.split(tl.reshape(value, (value.shape[0] // 2, 2)))
    sums = even + odd
    if BAND == 2:
        upper, lower = tl.split(tl.trans(tl.reshape(sums, (2, sums.shape[0] // 2))))
        sums = upper + lower
    means = mul(sums, 0.5**BAND)
    means = tl.interleave(means, means)
    if BAND == 2:
        means = tl.reshape(tl.trans(tl.join(means, means)), (value.shape[0],))
    return means


# ---- kernels ----


@triton.jit
def step_kernel(
    out_ptr, out_stride, m0_ptr, m0_stride, y_out_ptr, y_out_stride, model_input_ptr, model_input_stride,
    x_ptr, x_stride, f_ptr, f_stride, u_ptr, u_stride, m1_ptr, m1_stride, m2_ptr, m2_stride, y_ptr, y_stride,
    v_ptr, v_stride, grad_ptr, grad_stride, noise_ptr, noise_stride, rescale_ptr, rescale_stride, threshold_ptr, threshold_stride,
    seeds_ptr, seeds_stride, rows_ptr, rows_stride, rows_count, index_ptr, index_stride,
    numel, guided_period, channel_numel, tiles, batch, height, width, DOUBLED: tl.constexpr, BLOCK: tl.constexpr,
    BAND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A program's tile of one sample: rows, inputs, noise, step, stores. One function: what it has loaded would be some thirty
    arguments of any part of it, of which Triton inlines each again.

    BAND: what spec.band_dims_of says; None where rows have no columns of a band. height, width: an image's, for `offsets`; no
    width where a tile's elements follow each other in the sample. ALIGNED: 4, 2 or 1, the greatest that divides width.
    """
    VEC: tl.constexpr = 4 if x_ptr.dtype.element_ty == tl.float32 or f_ptr.dtype.element_ty == tl.float32 else 8
    sample, start, count = _tile(numel, tiles, BLOCK)
    lane = _lanes(BLOCK, VEC)
    if width is not None:
        tile = tl.program_id(0) if tiles is None else tl.program_id(0) % tiles
        lane = offsets(tl.arange(0, BLOCK), tile, numel, height, width, BLOCK, BAND)
        lane = tl.max_contiguous(tl.multiple_of(lane, ALIGNED), ALIGNED)
        start, count = tl.zeros_like(start), tl.multiple_of(tl.full([], numel, tl.int64), ALIGNED)
    x = _load(x_ptr, x_stride, sample, start, count, lane)
    f = _load(f_ptr, f_stride, sample, start, count, lane)

    index = tl.load(index_ptr + sample * index_stride)
    good = (index >= 0) & (index < rows_count)
    row = rows_ptr + tl.where(good, index, 0) * rows_stride
    d_x, d_f, clip, g = tl.load(row + D_X), tl.load(row + D_F), tl.load(row + CLIP), tl.load(row + G)
    c_x, c_f, c_m0, c_m1 = tl.load(row + C_X), tl.load(row + C_F), tl.load(row + C_M0), tl.load(row + C_M1)
    c_m2, c_y, c_grad, c_noise = tl.load(row + C_M2), tl.load(row + C_Y), tl.load(row + C_GRAD), tl.load(row + C_NOISE)
    draw, logvar_min, logvar_max = tl.load(row + DRAW), tl.load(row + LOGVAR_MIN), tl.load(row + LOGVAR_MAX)
    guided_channels, c_in_next = tl.load(row + GUIDED_CHANNELS), tl.load(row + C_IN_NEXT)
    k_x, k_m0, k_m1 = tl.load(row + K_X), tl.load(row + K_M0), tl.load(row + K_M1)
    k_m2, k_y = tl.load(row + K_M2), tl.load(row + K_Y)

    # What the row asks for is read; where it is not there, the sample is NaN.
    guidance, variance = g != 1.0, (logvar_min != 0.0) | (logvar_max != 0.0)
    good &= clip.to(tl.uint32, bitcast=True) <= 0x7F800000  # at least 0, and not the negative zero
    channels = tl.where((guided_channels >= 0.0) & (guided_channels < 2.0**24), guided_channels, 0.0).to(tl.int32)
    good &= channels.to(tl.float32) == guided_channels
    if u_ptr is None:
        good &= g == 1.0
    else:
        u = _load(u_ptr, u_stride, sample, start, tl.where(guidance, count, 0), lane)
    if m1_ptr is None:
        good &= (c_m1 == 0.0) & (k_m1 == 0.0)
    else:
        m1 = _load(m1_ptr, m1_stride, sample, start, tl.where((c_m1 != 0.0) | (k_m1 != 0.0), count, 0), lane)
    if m2_ptr is None:
        good &= (c_m2 == 0.0) & (k_m2 == 0.0)
    else:
        m2 = _load(m2_ptr, m2_stride, sample, start, tl.where((c_m2 != 0.0) | (k_m2 != 0.0), count, 0), lane)
    if y_ptr is None:
        good &= (c_y == 0.0) & (k_y == 0.0)
    else:
        y = _load(y_ptr, y_stride, sample, start, tl.where((c_y != 0.0) | (k_y != 0.0), count, 0), lane)
    if y_out_ptr is None:
        good &= (k_x == 0.0) & (k_m0 == 0.0) & (k_m1 == 0.0) & (k_m2 == 0.0) & (k_y == 0.0)
    if v_ptr is None:
        good &= (logvar_min == 0.0) & (logvar_max == 0.0)
    else:
        v = _load(v_ptr, v_stride, sample, start, tl.where(variance, count, 0), lane)
    if grad_ptr is not None:
        grad = _load(grad_ptr, grad_stride, sample, start, tl.where(c_grad != 0.0, count, 0), lane)
    if noise_ptr is not None:
        z = _load(noise_ptr, noise_stride, sample, start, tl.where(c_noise != 0.0, count, 0), lane)
    elif seeds_ptr is None:
        good &= c_noise == 0.0
    else:
        z = tl.zeros_like(x)
        if c_noise != 0.0:
            drawn = tl.where((draw >= 0.0) & (draw < 2.0**24), draw, 0.0).to(tl.uint32)
            good &= drawn.to(tl.float32) == draw
            seed = tl.load(seeds_ptr + sample * seeds_stride)
            stream = tl.full([], STREAM_STEP, tl.uint32)
            if width is None:
                z = normals(seed, drawn, stream, start, BLOCK, VEC)
            else:
                first = offsets(tl.arange(0, BLOCK // 4) * 4, tile, numel, height, width, BLOCK, BAND)
                z = normals_at(seed, drawn, stream, first, ALIGNED == 4)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + sample * threshold_stride)
        good &= (threshold != threshold) | ((threshold > 0.0) & (threshold < float("inf")))
    if BAND is not None:
        l_next, l_m0, l_x = tl.load(row + L_NEXT), tl.load(row + L_M0), tl.load(row + L_X)
        banded = (l_next != 0.0) | (l_m0 != 0.0) | (l_x != 0.0)
        if BAND == 0:
            good &= banded == 0
        else:
            good &= (banded == 0) | (tl.load(row + BAND_DIMS) == BAND)
    nan = float("nan")
    d_x, c_x, k_x = tl.where(good, d_x, nan), tl.where(good, c_x, nan), tl.where(good, k_x, nan)

    fhat = f
    if u_ptr is not None:
        if guidance:
            fhat = u + mul(g, f - u)
            if channels != 0:
                fhat = tl.where((start + lane) % guided_period < channels.to(tl.int64) * channel_numel, fhat, f)
    if rescale_ptr is not None:
        fhat = mul(tl.load(rescale_ptr + sample * rescale_stride), fhat)
    m0 = _clamp(mul(d_x, x) + mul(d_f, fhat), clip)
    if threshold_ptr is not None:
        m0 = tl.div_rn(_clamp(m0, threshold), threshold + tl.zeros_like(m0))

    if v_ptr is not None:
        if variance:
            frac = mul(v + 1.0, 0.5)
            s = exp_poly(mul(mul(frac, logvar_max) + mul(1.0 - frac, logvar_min), 0.5))
            if grad_ptr is not None:
                grad = mul(mul(s, s), grad)
            if noise_ptr is not None or seeds_ptr is not None:
                z = mul(s, z)

    total = mul(c_x, x)
    if c_f != 0.0:
        total += mul(c_f, fhat)
    total += mul(c_m0, m0)
    if m1_ptr is not None:
        if c_m1 != 0.0:
            total += mul(c_m1, m1)
    if m2_ptr is not None:
        if c_m2 != 0.0:
            total += mul(c_m2, m2)
    if y_ptr is not None:
        if c_y != 0.0:
            total += mul(c_y, y)
    if grad_ptr is not None:
        if c_grad != 0.0:
            total += mul(c_grad, grad)
    if noise_ptr is not None or seeds_ptr is not None:
        if c_noise != 0.0:
            total += mul(c_noise, z)
    if BAND:
        if banded:
            band = mul(l_next, total) + mul(l_m0, m0)
            if l_x != 0.0:
                band += mul(l_x, x)
            if width is not None:
                band = tl.where(lane < count, band, 0.0)
            total += _low_band(band, BAND)

    _store(out_ptr, out_stride, sample, start, count, lane, total)
    if m0_ptr is not None:
        _store(m0_ptr, m0_stride, sample, start, count, lane, m0)
    if y_out_ptr is not None:
        second = mul(k_x, x)
        second += mul(k_m0, m0)
        if m1_ptr is not None:
            if k_m1 != 0.0:
                second += mul(k_m1, m1)
        if m2_ptr is not None:
            if k_m2 != 0.0:
                second += mul(k_m2, m2)
        if y_ptr is not None:
            if k_y != 0.0:
                second += mul(k_y, y)
        _store(y_out_ptr, y_out_stride, sample, start, count, lane, second)
    if model_input_ptr is not None:
        stored = _widen(_rounded(total, out_ptr.dtype.element_ty))
        model_input = mul(c_in_next, stored)
        _store(model_input_ptr, model_input_stride, sample, start, count, lane, model_input)
        if DOUBLED:
            _store(model_input_ptr, model_input_stride, sample + batch, start, count, lane, model_input)


@triton.jit
def normal_kernel(out_ptr, seeds_ptr, seeds_stride, draw, stream, numel, tiles, BLOCK: tl.constexpr):
    """A program's tile of one sample: normals."""
    VEC: tl.constexpr = 4 if out_ptr.dtype.element_ty == tl.float32 else 8
    sample, start, count = _tile(numel, tiles, BLOCK)
    seed = tl.load(seeds_ptr + sample * seeds_stride)
    # Through int64: Triton makes an argument of 1 a constant.
    draw, stream = tl.full([], draw, tl.int64).to(tl.uint32), tl.full([], stream, tl.int64).to(tl.uint32)
    z = normals(seed, draw, stream, start, BLOCK, VEC)
    _store(out_ptr, numel, sample, start, count, _lanes(BLOCK, VEC), z)


@triton.jit
def _added(a, b):
    return a + b


@device_function
def _tree_sum(value, SIZE: tl.constexpr):
    """As reference.py's, of one element. In one warp: in registers, then by shuffles."""
    for _ in tl.static_range(SIZE.bit_length() - 1):
        halves = tl.reshape(value, (2, value.shape[0] // 2))
        if INTERPRETED:  # there a reduction takes each element in turn
            low, high = tl.split(tl.trans(halves))
            value = low + high
        else:
            value = tl.reduce(halves, 0, _added)
    return value


@device_function
def _store_sums(ptr, stride, value, TILE: tl.constexpr):
    value, one = value.to(tl.float64), tl.arange(0, 1)
    tl.store(ptr + one, _tree_sum(value, TILE))
    tl.store(ptr + stride + one, _tree_sum(value * value, TILE))  # a float32's square is exact


@triton.jit
def tiles_kernel(
    sums_ptr, f_ptr, f_stride, u_ptr, u_stride, rows_ptr, rows_stride, rows_count, index_ptr, index_stride,
    numel, channel_numel, tiles, TILE: tl.constexpr,
):  # fmt: skip
    """A program's tile of one sample: its sums, two, or four where there is u."""
    sample, start, count = _tile(numel, tiles, TILE)
    lane = tl.arange(0, TILE)
    f = _load(f_ptr, f_stride, sample, start, count, lane)
    sums = sums_ptr + sample * tiles * (2 if u_ptr is None else 4) + start // TILE
    _store_sums(sums, tiles, f, TILE)
    if u_ptr is not None:
        u = _load(u_ptr, u_stride, sample, start, count, lane)
        index = tl.load(index_ptr + sample * index_stride)
        good = (index >= 0) & (index < rows_count)
        row = rows_ptr + tl.where(good, index, 0) * rows_stride
        g, guided_channels = tl.load(row + G), tl.load(row + GUIDED_CHANNELS)
        channels = tl.where((guided_channels >= 0.0) & (guided_channels < 2.0**24), guided_channels, 0.0).to(tl.int32)
        good &= channels.to(tl.float32) == guided_channels
        guided = tl.where(channels != 0, channels.to(tl.int64) * channel_numel, numel)
        fhat = tl.where(start + lane < tl.where(g != 1.0, guided, 0), u + mul(g, f - u), f)
        fhat = tl.where(lane < count, tl.where(good, fhat, float("nan")), 0.0)
        _store_sums(sums + 2 * tiles, tiles, fhat, TILE)


@triton.jit
def level_kernel(to_ptr, from_ptr, count, padded, groups, TILE: tl.constexpr):
    """Rows of sums to shorter ones: see csrc/moments_cuda.cu::Level."""
    row, first = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    i = first + tl.arange(0, TILE).to(tl.int64) * groups
    value = tl.load(from_ptr + row * count + i, mask=i < count, other=0.0)
    minus_zero = tl.full([], -(2**63), tl.int64).to(tl.float64, bitcast=True)  # a literal is 0 to Triton 3.6
    value = tl.where(i < padded, value, minus_zero)  # which adds nothing, to a -0 either
    tl.store(to_ptr + row * groups + first + tl.arange(0, 1), _tree_sum(value, TILE))
