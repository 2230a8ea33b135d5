"""What a PTX instruction computes, as a function of numpy arrays: a value for each thread.

From the PTX ISA's definitions, one entry for each instruction that the kernels use; another is an error. Products and sums round
once, to nearest even; subnormals stay, except under .ftz; a NaN that comes out is the one NaN that NVIDIA's processors give.
Approximations err, at random and at their extremes, by what the ISA allows.
"""

import dataclasses
import operator
from collections.abc import Callable

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f16": np.float16,
    "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NAN = {
    np.dtype(np.float16): np.uint16(0x7FFF).view(np.float16),
    np.dtype(np.float32): np.uint32(0x7FFFFFFF).view(np.float32),
    np.dtype(np.float64): np.uint64(0x7FFFFFFFFFFFFFFF).view(np.float64),
}
BFLOAT16_NAN = np.uint16(0x7FFF)
RSQRT_ERROR = 2.0**-22.9  # relative, of rsqrt.approx: the ISA's table for the whole range


class PtxError(Exception):
    """The program does what no program may: an unknown instruction, an access outside of the tensors, a race."""


@dataclasses.dataclass
class Operation:
    function: Callable[..., np.ndarray]
    target: str
    sources: tuple[str, ...]


def bits(value):
    """A value's bits, as unsigned integers."""
    return value if value.dtype == np.bool_ else value.view(UNSIGNED[value.dtype.itemsize])


# ---- floating point ----


def _one_nan(value):
    nan = np.isnan(value)
    return np.where(nan, NAN[value.dtype], value) if nan.any() else value


def _rounded_once(function):
    return lambda *values: _one_nan(function(*values))


def fma(a, b, c):
    """a*b + c of float32, rounded once.

    The product is exact in float64. The sum there is rounded to odd: a last bit that stands for all that was cut off, so that
    the second rounding, to float32, is that of the exact sum.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    total, error = np.broadcast_arrays(total, error)
    cut = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    outwards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(cut, (total.view(np.int64) + outwards).view(np.float64), total).astype(np.float32)


def _smaller(a, b):
    """min of floats: -0 is below +0, and of a number and a NaN it is the number."""
    equal = (bits(a) | bits(b)).view(a.dtype)
    return _one_nan(np.where(a == b, equal, np.where((a < b) | np.isnan(b), a, b)))


def _larger(a, b):
    equal = (bits(a) & bits(b)).view(a.dtype)
    return _one_nan(np.where(a == b, equal, np.where((a > b) | np.isnan(b), a, b)))


def _or_nan(function):
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), NAN[a.dtype], function(a, b))


def _flip_sign(value):
    return (bits(value) ^ _sign(value)).view(value.dtype)


def _clear_sign(value):
    return (bits(value) & ~_sign(value)).view(value.dtype)


def _sign(value):
    unsigned = UNSIGNED[value.dtype.itemsize]
    return unsigned(1 << (8 * value.dtype.itemsize - 1))


def _flushed(value):
    """Subnormals as zeros of their sign."""
    tiny = np.abs(value) < np.finfo(value.dtype).tiny
    return np.where(tiny, np.copysign(value.dtype.type(0), value), value)


def approximated(exact, bound, rng):
    """float32 within this relative error of float64 numbers: at either extreme, or between them."""
    error = np.clip(rng.uniform(-2, 2, exact.shape), -1, 1) * bound
    value = (exact * (1 + error)).astype(np.float32)
    beyond = np.abs(value.astype(np.float64) - exact) > bound * np.abs(exact)
    return np.where(beyond, np.nextafter(value, exact.astype(np.float32)), value)


def rsqrt(value, rng):
    value = _flushed(value)
    return _one_nan(_flushed(approximated(1 / np.sqrt(value.astype(np.float64)), RSQRT_ERROR, rng)))


# ---- integers ----


def _shift_left(value, amount):
    width = 8 * value.dtype.itemsize
    return np.where(amount < width, value << np.minimum(amount, width - 1).astype(value.dtype), value.dtype.type(0))


def _shift_right(value, amount):
    """Beyond the width: zeros or, of a signed number, its sign."""
    width = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(amount, width - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(amount < width, shifted, value.dtype.type(0))


def _quotient(a, b):
    """Towards zero."""
    if (b == 0).any():
        raise PtxError("an integer is divided by zero")
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def _remainder(a, b):
    return a - _quotient(a, b) * b


def _twice_as_wide(value):
    return value.astype(np.dtype(f"{value.dtype.kind}{2 * value.dtype.itemsize}"))


def _wide_product(a, b):
    return _twice_as_wide(a) * _twice_as_wide(b)


def _high_product(a, b):
    product = _wide_product(a, b)
    return (product >> product.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)


def _field(value, position, length):
    """bfe: so many bits of a number from a position on; above them a signed one's last, which may be the number's own sign."""
    width, word = 8 * value.dtype.itemsize, bits(value)
    position, length = (v.astype(np.int64) & 0xFF for v in (position, length))

    def bit(i):
        return word >> np.minimum(i, width - 1).astype(word.dtype) & word.dtype.type(1)

    above = np.where(length > 0, bit(np.maximum(position + length - 1, 0)), 0) * (value.dtype.kind == "i")
    result = np.zeros_like(word)
    for i in range(width):
        result |= np.where((i < length) & (position + i < width), bit(position + i), above).astype(
            word.dtype
        ) << word.dtype.type(i)
    return result.view(value.dtype)


# ---- conversions ----


def to_bfloat16(value):
    """The bits of float32 rounded to bfloat16, to nearest even."""
    word = bits(value)
    rounded = ((word + (0x7FFF + (word >> 16 & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), BFLOAT16_NAN, rounded)


def _to_float16(value):
    return _one_nan(value.astype(np.float16))


def _from_bfloat16(word):
    return (word.astype(np.uint32) << 16).view(np.float32)


def _to_integer(target):
    """Towards zero, held to the target's range. NaN: 0 or, of or to 64 bits, the lowest."""
    limits = np.iinfo(target)

    def convert(value):
        truncated = np.trunc(value.astype(np.float64))
        inside = (truncated >= float(limits.min)) & (truncated < float(limits.max) + (limits.bits < 64))
        integer = np.where(inside, truncated, 0).astype(target)
        integer = np.where(inside, integer, np.where(truncated < 0, limits.min, limits.max).astype(target))
        wide = limits.bits == 64 or value.dtype == np.float64
        of_nan = UNSIGNED[limits.bits // 8](1 << (limits.bits - 1) if wide else 0).view(target)
        return np.where(np.isnan(value), of_nan, integer)

    return convert


HALVES = {"f16": (_to_float16, lambda value: value.astype(np.float32)), "bf16": (to_bfloat16, _from_bfloat16)}


def _conversion(modifiers, target, source):
    to, of = TYPES[target], TYPES[source]
    match modifiers, target, source:
        case ["rn"], "f16x2" | "bf16x2", "f32":
            half = HALVES[target[:-2]][0]
            pack = lambda high, low: bits(half(low)).astype(np.uint32) | bits(half(high)).astype(np.uint32) << 16  # noqa: E731
            return Operation(pack, target, (source, source))
        case ["rn"], "f16" | "bf16", "f32":
            return Operation(HALVES[target][0], target, (source,))
        case [], "f32", "f16" | "bf16":
            return Operation(_rounded_once(HALVES[source][1]), target, (source,))
        case [], "f64", "bf16":
            return Operation(_rounded_once(lambda value: _from_bfloat16(value).astype(to)), target, (source,))
        case ([], "f64", "f32" | "f16") | (["rn"], "f32", "f64"):
            return Operation(_rounded_once(lambda value: value.astype(to)), target, (source,))
        case ["rzi"], _, "f32" | "f64" if to(0).dtype.kind in "iu":
            return Operation(_to_integer(to), target, (source,))
        case ["rn"], "f32" | "f64", _ if of(0).dtype.kind in "iu":
            return Operation(lambda value: value.astype(to), target, (source,))
        case [], _, _ if to(0).dtype.kind in "iu" and of(0).dtype.kind in "iu" and "f" not in target + source:
            return Operation(lambda value: value.astype(to), target, (source,))
    raise KeyError


# ---- all of them ----

COMPARED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
COMBINED = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def _comparison(modifiers, kind):
    name, *combined = modifiers
    if kind[0] == "f" and name not in ("lo", "ls", "hi", "hs"):  # ordered: false of NaN; with a u: true of NaN
        unordered = name.endswith("u") and name[:-1] in COMPARED
        by = COMPARED[name.removesuffix("u") if unordered else name]
        function = lambda a, b: np.where(np.isnan(a) | np.isnan(b), unordered, by(a, b))  # noqa: E731
    else:
        function = COMPARED[name]
    if not combined:
        return Operation(function, "pred", (kind, kind))
    (combine,) = (COMBINED[c] for c in combined)
    return Operation(lambda a, b, c: combine(function(a, b), c), "pred", (kind, kind, "pred"))


def _of_floats(name, modifiers, kind, rng):
    same = {
        ("add", "rn"): operator.add, ("sub", "rn"): operator.sub, ("mul", "rn"): operator.mul, ("div", "rn"): operator.truediv,
        ("sqrt", "rn"): np.sqrt, ("add",): operator.add, ("sub",): operator.sub,
    }  # fmt: skip
    others = {
        ("neg",): _flip_sign, ("abs",): _clear_sign, ("min",): _smaller, ("max",): _larger, ("min", "NaN"): _or_nan(_smaller),
        ("max", "NaN"): _or_nan(_larger),
    }  # fmt: skip
    key = (name, *modifiers)
    if key in (("mul",), ("mad",), ("fma",)):
        raise PtxError(f"{name}.{kind} without .rn: the assembler may fuse it with a sum")
    if key == ("fma", "rn") and kind == "f32":
        return Operation(_rounded_once(fma), kind, (kind,) * 3)
    if key == ("rsqrt", "approx", "ftz") and kind == "f32":
        return Operation(lambda value: rsqrt(value, rng), kind, (kind,))
    function = _rounded_once(same[key]) if key in same else others[key]
    return Operation(function, kind, (kind,) * (1 if name in ("sqrt", "neg", "abs") else 2))


def _of_integers(name, modifiers, kind):
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    binary = {
        ("add",): operator.add, ("sub",): operator.sub, ("mul", "lo"): operator.mul, ("mul", "hi"): _high_product,
        ("min",): np.minimum,
        ("max",): np.maximum, ("div",): _quotient, ("rem",): _remainder, ("and",): operator.and_, ("or",): operator.or_,
        ("xor",): operator.xor,
    }  # fmt: skip
    key = (name, *modifiers)
    match key:
        case ("mul", "wide"):
            return Operation(_wide_product, wide, (kind, kind))
        case ("mad", "wide"):
            return Operation(lambda a, b, c: _wide_product(a, b) + c, wide, (kind, kind, wide))
        case ("mad", "lo"):
            return Operation(lambda a, b, c: a * b + c, kind, (kind,) * 3)
        case ("shl",):
            return Operation(_shift_left, kind, (kind, "u32"))
        case ("shr",):
            return Operation(_shift_right, kind, (kind, "u32"))
        case ("bfe",):
            return Operation(_field, kind, (kind, "u32", "u32"))
        case ("neg",) | ("not",):
            return Operation(operator.neg if name == "neg" else operator.invert, kind, (kind,))
    return Operation(binary[key], kind, (kind, kind))


def operation(opcode, rng):
    """What computes this instruction. rng: the approximations' errors."""
    name, *rest = opcode.split(".")
    kinds = [part for part in rest if part in TYPES]
    modifiers = [part for part in rest if part not in TYPES]
    try:
        if name == "cvt":
            return _conversion(modifiers, *kinds)
        (kind,) = kinds
        if name == "setp":
            return _comparison(modifiers, kind)
        if name == "selp" and not modifiers:
            return Operation(lambda a, b, chosen: np.where(chosen, a, b), kind, (kind, kind, "pred"))
        if name == "cvta" and modifiers == ["to", "global"]:
            return Operation(lambda address: address, kind, (kind,))
        if kind == "pred":
            return Operation({"not": operator.invert, **COMBINED}[name], kind, (kind,) * (1 if name == "not" else 2))
        return _of_floats(name, modifiers, kind, rng) if kind in ("f32", "f64") else _of_integers(name, modifiers, kind)
    except (KeyError, ValueError, TypeError) as error:
        raise PtxError(f"unknown instruction {opcode}") from error
