"""The step in Triton, for GPUs without the compiled CUDA kernel, and for Inductor, which sees the kernel in its graphs.

Mirrors csrc/step.h, csrc/philox.h, csrc/polynomials.h and csrc/moments_cuda.cu; the formula and the coefficients are those of
step_reference.py. One launch per step, whatever the rows; index, rows and seeds are read on the device. A sample whose index is
out of range, or whose row asks for what is not there, comes out as NaN.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import triton_op, wrap_triton

from . import build, step_reference
from .checks import (
    INPUTS,
    check_memory,
    check_moments,
    check_normal,
    check_outputs,
    check_outputs_like,
    check_step,
    check_values,
    fail,
)
from .step_reference import MOMENTS_TILE, STREAM_INITIAL

LOG = tl.constexpr(tuple(step_reference.LOG))
SIN = tl.constexpr(tuple(step_reference.SIN))
COS = tl.constexpr(tuple(step_reference.COS))
EXP = tl.constexpr(tuple(step_reference.EXP))
LN2 = tl.constexpr(step_reference.LN2)
LOG2_E = tl.constexpr(step_reference.LOG2_E)
TURN = tl.constexpr(step_reference.TURN)
LN2_HIGH = tl.constexpr(step_reference.LN2_HIGH)
LN2_LOW = tl.constexpr(step_reference.LN2_LOW)
MAGIC = tl.constexpr(step_reference.MAGIC)
STREAM_STEP = tl.constexpr(step_reference.STREAM_STEP)
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
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    return mul(e.to(tl.float32), LN2) + mul(_horner(LOG, f), f)


@device_function
def cos_sin_poly(turn):
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
    y = tl.where(y < -87.0, -87.0, y)
    y = tl.where(y > 88.0, 88.0, y)
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
def _normals(seed, draw, stream, start, BLOCK: tl.constexpr, VEC: tl.constexpr):
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


# ---- kernels ----


@triton.jit
def step_kernel(
    out_ptr, out_stride, m0_ptr, m0_stride, y_out_ptr, y_out_stride, model_input_ptr, model_input_stride,
    x_ptr, x_stride, f_ptr, f_stride, u_ptr, u_stride, m1_ptr, m1_stride, m2_ptr, m2_stride, y_ptr, y_stride,
    v_ptr, v_stride, grad_ptr, grad_stride, noise_ptr, noise_stride, rescale_ptr, rescale_stride, threshold_ptr, threshold_stride,
    seeds_ptr, seeds_stride, rows_ptr, rows_stride, rows_count, index_ptr, index_stride,
    numel, guided_period, channel_numel, tiles, batch, DOUBLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    VEC: tl.constexpr = 4 if x_ptr.dtype.element_ty == tl.float32 or f_ptr.dtype.element_ty == tl.float32 else 8
    sample, start, count = _tile(numel, tiles, BLOCK)
    lane = _lanes(BLOCK, VEC)
    x = _load(x_ptr, x_stride, sample, start, count, lane)
    f = _load(f_ptr, f_stride, sample, start, count, lane)

    index = tl.load(index_ptr + sample * index_stride)
    good = (index >= 0) & (index < rows_count)
    row = rows_ptr + tl.where(good, index, 0) * rows_stride
    # The order of table.py::COLUMNS.
    d_x, d_f, clip, g = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    c_x, c_f, c_m0, c_m1 = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    c_m2, c_grad, c_noise, draw = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    logvar_min, logvar_max = tl.load(row + 12), tl.load(row + 13)
    guided_channels, c_in_next = tl.load(row + 14), tl.load(row + 15)
    c_y, k_x, k_m0, k_m1 = tl.load(row + 16), tl.load(row + 17), tl.load(row + 18), tl.load(row + 19)
    k_m2, k_y = tl.load(row + 20), tl.load(row + 21)

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
            z = _normals(seed, drawn, tl.full([], STREAM_STEP, tl.uint32), start, BLOCK, VEC)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + sample * threshold_stride)
        good &= (threshold != threshold) | ((threshold > 0.0) & (threshold < float("inf")))
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
    VEC: tl.constexpr = 4 if out_ptr.dtype.element_ty == tl.float32 else 8
    sample, start, count = _tile(numel, tiles, BLOCK)
    seed = tl.load(seeds_ptr + sample * seeds_stride)
    # Through int64: Triton makes an argument of 1 a constant.
    draw, stream = tl.full([], draw, tl.int64).to(tl.uint32), tl.full([], stream, tl.int64).to(tl.uint32)
    z = _normals(seed, draw, stream, start, BLOCK, VEC)
    _store(out_ptr, numel, sample, start, count, _lanes(BLOCK, VEC), z)


@triton.jit
def _added(a, b):
    return a + b


@device_function
def _tree_sum(value, SIZE: tl.constexpr):
    """As step_reference.py's, of one element. In one warp: in registers, then by shuffles."""
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
        g, guided_channels = tl.load(row + 3), tl.load(row + 14)  # the order of table.py::COLUMNS
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


# ---- launches ----


def _block_of(numel):
    """(elements, warps) of a program, for samples of numel elements: 8 elements a thread. The bits do not depend on it."""
    if INTERPRETED.value:
        return min(max(triton.next_power_of_2(numel), 8), 65536), 1
    return (1024, 4) if numel > 512 else (256, 1)


def _batch(tensor, numel, written=False):
    """The tensor and its batch stride; one whose samples are not contiguous in themselves, as a contiguous one."""
    if tensor is None:
        return None, 0
    if not tensor.is_neg():  # its elements are what its memory holds
        if tensor.is_contiguous():
            return tensor, numel
        if tensor[0].is_contiguous():
            return tensor, tensor.stride(0)
    return (torch.empty_like if written else torch.clone)(tensor, memory_format=torch.contiguous_format), numel


def _resolved(*tensors):
    """Those of which single elements are read, as their memory holds them."""
    return [tensor if tensor is None else tensor.resolve_neg() for tensor in tensors]


def _run_step(launch, written, x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold, block=None):
    """One call of `launch`, with the grid, the kernel's arguments and its options. written: out, m0, y_out, model_input."""
    rows, index, seeds, rescale, threshold = _resolved(rows, index, seeds, rescale, threshold)
    batch = x.shape[0]
    numel, channels = x.numel() // batch, x.shape[1] if x.dim() > 1 else 1
    outputs = [_batch(tensor, numel, written=True) for tensor in written]
    tensors = outputs + [_batch(tensor, numel) for tensor in (x, f, u, m1, m2, y, v, grad, noise)]
    channel_numel, doubled = numel // channels, written[3] is not None and written[3].shape[0] != batch
    # One sample, where nothing depends on the sample: programs are not wasted on small ones.
    guided_period = numel
    alone = seeds is None and rescale is None and threshold is None and index.dim() == 0 and not doubled
    if alone and all(stride == numel for t, stride in tensors if t is not None):
        batch, numel = 1, batch * numel
    size, warps = block or _block_of(numel)
    tiles = triton.cdiv(numel, size)
    launch(
        (batch * tiles,),
        *(item for pair in tensors for item in pair),
        *(item for t in (rescale, threshold, seeds) for item in (t, 0 if t is None else t.stride(0))),
        rows, rows.stride(0), rows.shape[0], index, index.stride(0) if index.dim() else 0,
        numel, guided_period, channel_numel, None if batch == 1 else tiles, x.shape[0],
        DOUBLED=doubled, BLOCK=size, num_warps=warps,
    )  # fmt: skip
    for tensor, (result, _) in zip(written, outputs, strict=True):
        if result is not tensor:
            tensor.copy_(result)


def _run_normal(launch, out, seeds, draw, stream, block=None):
    seeds = seeds.resolve_neg()
    numel = out.numel() // seeds.shape[0]
    size, warps = block or _block_of(numel)
    tiles = triton.cdiv(numel, size)
    arguments = out, seeds, seeds.stride(0), draw, stream, numel, None if seeds.shape[0] == 1 else tiles
    launch((seeds.shape[0] * tiles,), *arguments, BLOCK=size, num_warps=warps)


def _run_moments(launch_tiles, launch_level, f, u, rows, index):
    batch, sums = f.shape[0], 2 if u is None else 4
    numel = f.numel() // batch
    tiles = triton.cdiv(numel, MOMENTS_TILE)
    rows, index = _resolved(rows, index)
    values = torch.empty(batch * sums, tiles, dtype=torch.float64, device=f.device)
    launch_tiles(
        (batch * tiles,), values, *_batch(f, numel), *_batch(u, numel),
        *((None, 0, 0) if u is None else (rows, rows.stride(0), rows.shape[0])),
        *((None, 0) if u is None else (index, index.stride(0) if index.dim() else 0)),
        numel, numel // f.shape[1] if f.dim() > 1 else 1, tiles, TILE=MOMENTS_TILE, num_warps=1,
    )  # fmt: skip
    while (count := values.shape[1]) > 1:
        padded = triton.next_power_of_2(count)
        shorter = values.new_empty(len(values), max(padded // MOMENTS_TILE, 1))
        arguments = shorter, values, count, padded, shorter.shape[1]
        launch_level((shorter.numel(),), *arguments, TILE=MOMENTS_TILE, num_warps=1)
        values = shorter
    return values.reshape(batch, sums)


def _launcher(kernel, device):
    if device.type == "cpu" and not INTERPRETED.value:
        fail("backend 'triton' was asked for, and the tensors are on cpu")

    def launch(grid, *arguments, **options):
        with torch.accelerator.device_index(device.index):
            kernel[grid](*arguments, **options, enable_fp_fusion=False)

    return launch


# ---- for torch.compile: ops whose bodies it traces, down to the kernel ----


@triton_op("epskernels::triton_step_out", mutates_args={"out", "m0", "y_out", "model_input"})
def triton_step_out_op(
    x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor | None, m1: Tensor | None, m2: Tensor | None,
    v: Tensor | None, grad: Tensor | None, noise: Tensor | None, seeds: Tensor | None, y: Tensor | None, rescale: Tensor | None,
    threshold: Tensor | None, out: Tensor, m0: Tensor | None, y_out: Tensor | None, model_input: Tensor | None,
) -> None:  # fmt: skip
    inputs = (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)
    check_step(*inputs)
    check_outputs_like(x, f, {"out": out, "m0": m0, "y_out": y_out, "model_input": model_input})

    def launch(grid, *arguments, **options):
        wrap_triton(step_kernel)[grid](*arguments, **options)

    _run_step(launch, (out, m0, y_out, model_input), *inputs)


@triton_op("epskernels::triton_normal", mutates_args=())
def triton_normal_op(seeds: Tensor, shape: list[int], dtype: torch.dtype, draw: int, stream: int) -> Tensor:
    check_normal(seeds, shape, dtype, draw, stream)

    def launch(grid, *arguments, **options):
        wrap_triton(normal_kernel)[grid](*arguments, **options)

    out = torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)
    _run_normal(launch, out, seeds, draw, stream)
    return out


# ---- the functions of the backend, by op ----


def _step(outputs, inputs, named):
    """Runs the step into `outputs`: {"out" or "x": tensor, "m0", "y_out", "model_input": tensor or None}."""
    inputs = dict.fromkeys(INPUTS) | dict(zip(INPUTS, inputs, strict=False)) | named
    x = inputs["x"]
    if is_compiling():
        torch.ops.epskernels.triton_step_out(*inputs.values(), *_made(outputs, x).values())
        return tuple(outputs.values())
    check_step(**inputs)
    check_memory(inputs)
    if os.environ.get("EPSKERNELS_CHECK_ROWS") == "1":
        check_values(inputs, outputs["y_out"] is not None)
    launch = _launcher(step_kernel, x.device)
    given = {key: tensor for key, tensor in outputs.items() if tensor is not NEW}
    check_outputs(given, inputs)
    check_memory(given)
    _run_step(launch, tuple(_made(outputs, x).values()), *inputs.values())
    return tuple(outputs.values())


NEW = object()  # an output to be made, once all inputs are known to be good


def _made(outputs, x):
    outputs |= {key: torch.empty_like(x) for key, tensor in outputs.items() if tensor is NEW}
    return outputs


def _new(*names):
    return dict.fromkeys(("out", "m0", "y_out", "model_input")) | dict.fromkeys(names, NEW)


def triton_step(*inputs, **named):
    return _step(_new("out"), inputs, named)[0]


def triton_step_m0(*inputs, **named):
    return _step(_new("out", "m0"), inputs, named)[:2]


def triton_step_y(*inputs, **named):
    return _step(_new("out", "m0", "y_out"), inputs, named)[:3]


def triton_step_out(*inputs, out, m0=None, y_out=None, model_input=None, **named):
    _step({"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, inputs, named)


def triton_step_(x, *inputs, m0=None, y_out=None, model_input=None, **named):
    _step({"x": x, "m0": m0, "y_out": y_out, "model_input": model_input}, (x, *inputs), named)


def triton_normal(seeds, shape, dtype, draw=0, stream=STREAM_INITIAL):
    if is_compiling():
        return torch.ops.epskernels.triton_normal(seeds, shape, dtype, draw, stream)
    check_normal(seeds, shape, dtype, draw, stream)
    check_memory({"seeds": seeds})
    launch = _launcher(normal_kernel, seeds.device)
    out = torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)
    _run_normal(launch, out, seeds, draw, stream)
    return out


def triton_moments(f, u=None, rows=None, index=None):
    check_moments(f, u, rows, index)
    check_memory({"f": f, "u": u, "rows": rows, "index": index})
    return _run_moments(_launcher(tiles_kernel, f.device), _launcher(level_kernel, f.device), f, u, rows, index)


TRITON = {
    "step": triton_step,
    "step_plain": triton_step,
    "step_m0": triton_step_m0,
    "step_y": triton_step_y,
    "step_out": triton_step_out,
    "step_": triton_step_,
    "normal": triton_normal,
    "moments": triton_moments,
}
