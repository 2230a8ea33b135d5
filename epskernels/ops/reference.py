"""The specification: one row of a table applied to a batch, in eager PyTorch, float32, one rounding per operation.

    fhat = rescale*(u + g*(f - u))
    m0   = clamp(d_x*x + d_f*fhat, -clip, clip), then clamp(m0, -threshold, threshold)/threshold
    x'   = c_x*x + c_f*fhat + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_y*y + c_grad*(s^2*grad) + c_noise*(s*z)
    y'   = k_x*x + k_m0*m0 + k_m1*m1 + k_m2*m2 + k_y*y

and, where rows have the columns of the band, x' + L(l_next*x' + l_m0*m0 + l_x*x) in the place of x', L being `bands.low_band`.

Every other backend returns these bits. Mirrors csrc/step.h::step_value and csrc/philox.h. Constants and columns
are those of epskernels/spec.py. It does not check its arguments: reference_backend.py does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bands import low_band
from ..spec import (
    BAND_COLUMNS,
    COLUMNS,
    COS,
    EXP,
    EXP_LEAST,
    EXP_MOST,
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG,
    LOG2_E,
    MAGIC,
    MOMENTS_TILE,
    SIN,
    SQRT_HALF_BITS,
    STREAM_STEP,
    TURN,
    band_dims_of,
)

_WORD = 0xFFFFFFFF


def _horner(polynomial: dict[int, float], x: Tensor) -> Tensor:
    first, *others = polynomial.values()
    p = torch.full_like(x, first)
    for c in others:
        p = p * x + c
    return p


def sqrt_rounded(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root: PyTorch's own goes through a vector library on the CPU."""
    return x.double().sqrt().float()


def log_poly(u: Tensor) -> Tensor:
    """ln(u), u float32 normal in (0, 1]."""
    bits = u.view(torch.int32)
    e = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    return e.float() * LN2 + _horner(LOG, f) * f


def cos_sin_poly(turn: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2*pi*turn/2^32, turn int64 in [0, 2^32)."""
    shifted = (turn + 0x20000000) & _WORD
    quadrant = shifted >> 30
    a = ((shifted & 0x3FFFFFFF) - 0x20000000).float() * TURN
    a2 = a * a
    s = _horner(SIN, a2) * a
    c = _horner(COS, a2)
    odd = (quadrant & 1) != 0
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = torch.where((quadrant & 2) != 0, -sine, sine)
    return cosine, sine


def exp_poly(y: Tensor) -> Tensor:
    """exp(y), y float32 held to [EXP_LEAST, EXP_MOST]; exp(0) is 1 exactly; NaN passes through."""
    y = torch.where(y < EXP_LEAST, EXP_LEAST, y)
    y = torch.where(y > EXP_MOST, EXP_MOST, y)
    rounded = y * LOG2_E + MAGIC
    k = rounded - MAGIC
    r = (y - k * LN2_HIGH) - k * LN2_LOW
    scale = torch.where(y.isnan(), 0, k).to(torch.int32)
    return _horner(EXP, r) * ((scale + 127) << 23).view(torch.float32)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors of words and two of keys (all in [0, 2^32)) to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # their low 64 bits, which is all of them
        c0, c1, c2, c3 = (
            (product1 >> 32) & _WORD ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32) & _WORD ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals of two words each."""
    u = radius_word.float() * 2.0**-32 + 2.0**-33
    radius = sqrt_rounded(log_poly(u) * -2.0)
    cosine, sine = cos_sin_poly(angle_word)
    return radius * cosine, radius * sine


def normal_reference(seeds: Tensor, shape: Sequence[int], draw: int | Tensor, stream: int) -> Tensor:
    """Standard normals (B, *shape), float32: element e of a sample is normal e % 4 of the counter (e // 4, draw, stream).

    seeds: (B,) int64, the 64-bit keys. draw: an integer in [0, 2^32), or a (B,) int64 tensor of them.
    """
    count = 1
    for size in shape:
        count *= size
    group = torch.arange((count + 3) // 4, device=seeds.device)
    seeds = seeds.reshape(-1, 1)
    draw = torch.as_tensor(draw, dtype=torch.int64, device=seeds.device).reshape(-1, 1)
    counter = (group & _WORD, group >> 32, draw, torch.full_like(draw, stream))
    words = philox(counter, (seeds & _WORD, (seeds >> 32) & _WORD))
    normals = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return torch.stack(normals, dim=-1).reshape(len(seeds), -1)[:, :count].reshape(-1, *shape)


def clamp(value: Tensor, bound: Tensor) -> Tensor:
    """To [-bound, bound] by comparison: NaN stays NaN."""
    value = torch.where(value < -bound, -bound, value)
    return torch.where(value > bound, bound, value)


def tree_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, padded with zeros to a power of two: its halves are added, again and again."""
    size = 1
    while size < values.shape[-1]:
        size *= 2
    values = torch.nn.functional.pad(values, (0, size - values.shape[-1]))
    while size > 1:
        size //= 2
        values = values[..., :size] + values[..., size:]
    return values[..., 0]


def moments_reference(
    f: Tensor, u: Tensor | None = None, rows: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """(B, 2) or, with u, (B, 4) float64: the sums of f and f^2, and of fhat and fhat^2, over each sample: by `tree_sum` over
    tiles of 1,024 elements, then over the tiles. A float32's square is exact in float64. Mirrors csrc/step_cpu.cpp::moments."""
    results = []
    values = [f]
    if u is not None and rows is not None and index is not None:
        values.append(guided_output(f, u, rows, index))
    for value in values:
        value = value.double().reshape(len(f), -1)
        value = torch.nn.functional.pad(value, (0, -value.shape[1] % MOMENTS_TILE)).reshape(len(f), -1, MOMENTS_TILE)
        results += [tree_sum(tree_sum(power)) for power in (value, value * value)]
    return torch.stack(results, dim=1)


def guided_output(f: Tensor, u: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """fhat = u + g*(f - u), float32, as the step forms it; NaN for a sample whose index is out of range or whose guided_channels
    is no count."""
    inside = (index >= 0) & (index < len(rows))
    rows = rows.index_select(0, torch.where(inside, index, 0).reshape(-1))
    each = (-1, *[1] * (f.dim() - 1))
    g, channels = (rows[:, COLUMNS.index(name)].reshape(each) for name in ("g", "guided_channels"))
    good = inside.reshape(each) & (channels >= 0) & (channels < 2**24) & (channels == channels.floor())
    return torch.where(good, _guide(f.float(), u.float(), g, channels), float("nan"))


def guided_elements(f: Tensor, guided_channels: Tensor) -> Tensor:
    """Which elements of f are guided, as a mask that broadcasts: those of the first channels, or all."""
    channels = (*f.shape[1:2], *[1] * (f.dim() - 2))  # of a sample, and each one's number
    channel = torch.arange(channels[0] if channels else 1, device=f.device).reshape(1, *channels)
    return (guided_channels == 0) | (channel < guided_channels)


def _guide(f: Tensor, u: Tensor, g: Tensor, guided_channels: Tensor) -> Tensor:
    return torch.where((g != 1) & guided_elements(f, guided_channels), u + g * (f - u), f)


def step_reference(
    x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor | None = None, m1: Tensor | None = None,
    m2: Tensor | None = None, v: Tensor | None = None, grad: Tensor | None = None, noise: Tensor | None = None,
    seeds: Tensor | None = None, y: Tensor | None = None, rescale: Tensor | None = None, threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', m0, y', the next model input): the first three in x's shape and dtype, the last in f's dtype. Arguments as in
    epskernels.step, already checked."""
    dtype, f_dtype, shape = x.dtype, f.dtype, x.shape
    columns = rows.index_select(0, index.reshape(-1)).reshape(-1, rows.shape[1], *[1] * (x.dim() - 1)).unbind(1)
    row = dict(zip(COLUMNS + BAND_COLUMNS, columns, strict=False))  # the band's may be missing
    x, f = x.float(), f.float()
    u, m1, m2, v, grad, noise, y = (t if t is None else t.float() for t in (u, m1, m2, v, grad, noise, y))
    each = (-1, *[1] * (x.dim() - 1))  # one number for each sample

    def term(total: Tensor, name: str, value: Tensor | None) -> Tensor:
        """total + coefficient*value, where the coefficient is not zero and the tensor is there."""
        if value is None:
            return total
        return torch.where(row[name] != 0, total + row[name] * value, total)

    fhat = f
    if u is not None:
        fhat = _guide(f, u, row["g"], row["guided_channels"])
    if rescale is not None:
        fhat = rescale.reshape(each) * fhat
    m0 = clamp(row["d_x"] * x + row["d_f"] * fhat, row["clip"])
    if threshold is not None:
        m0 = clamp(m0, threshold.reshape(each)) / threshold.reshape(each)

    z = noise
    if seeds is not None:
        draw = row["draw"].reshape(-1).to(torch.int64)
        z = normal_reference(seeds, shape[1:], draw, STREAM_STEP)
    if v is not None:
        frac = (v + 1.0) * 0.5
        logvar = frac * row["logvar_max"] + (1.0 - frac) * row["logvar_min"]
        s = exp_poly(0.5 * logvar)
        s = torch.where((row["logvar_min"] != 0) | (row["logvar_max"] != 0), s, 1.0)
        z = z if z is None else s * z
        grad = grad if grad is None else (s * s) * grad

    total = term(row["c_x"] * x, "c_f", fhat)
    total = total + row["c_m0"] * m0
    total = term(total, "c_m1", m1)
    total = term(total, "c_m2", m2)
    total = term(total, "c_y", y)
    total = term(total, "c_grad", grad)
    total = term(total, "c_noise", z)
    if "l_next" in row and (dims := band_dims_of(x.dim())):
        band = row["l_next"] * total + row["l_m0"] * m0
        band = term(band, "l_x", x)
        idle = (row["l_next"] == 0) & (row["l_m0"] == 0) & (row["l_x"] == 0)
        total = torch.where(idle, total, total + low_band(band, dims))
    next_x = total.to(dtype)

    second = row["k_x"] * x + row["k_m0"] * m0
    for name, value in (("k_m1", m1), ("k_m2", m2), ("k_y", y)):
        second = term(second, name, value)
    return next_x, m0.to(dtype), second.to(dtype), (row["c_in_next"] * next_x.float()).to(f_dtype)
