"""The PTX machine of tests/support/ptx.py: it does what the ISA says, and notices what it must. And the kernels that run on it.

All other tests of the kernels run on it as well,
        as `cuda_ptx` and `triton_ptx`. `python -m tests.ops.test_ptx` prints what the kernels
execute: instructions by element, and what moves in memory.
"""

import collections
import fractions
import itertools
import math
import re
import struct

import numpy as np
import pytest
import torch

import epskernels

from ..support import kernels, ptx, ptx_launch
from ..support.ptx_arithmetic import RSQRT_ERROR, TYPES, UNSIGNED, PtxError, operation
from ..support.ptx_memory import Span
from . import test_step_bits as bits


def needs(machine):
    why = kernels.MACHINES.get(machine, "EPSKERNELS_TEST_KERNELS leaves it out")
    return pytest.mark.skipif(bool(why), reason=str(why))


needs_nvcc, needs_triton = needs("cuda_ptx"), needs("triton_ptx")
pytestmark = pytest.mark.usefixtures("one_thread")

# ---- small programs ----

NAN, NAN16, NAN64, INF = 0x7FFFFFFF, 0x7FFF, 0x7FFFFFFFFFFFFFFF, math.inf


def span(name, array, written=False):
    strides = (array.itemsize, 1)
    return Span(name, array.ctypes.data, (array.size, array.itemsize), strides, array.itemsize, written)


def run(body, tensors, blocks=1, threads=32, written=("out", "new"), shared="", seed=0):
    """Runs a program whose parameters are the tensors' addresses, in %rd0, %rd1, ...; what each register is, its name tells."""
    declared = (
        ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .f32 %f<20>; .reg .f64 %d<9>;\n"
    )
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(tensors)))
    loads = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(len(tensors)))
    head = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, " + f"{threads}, %r0;\n"
    program = ptx.parse(f".visible .entry small({parameters})\n{{\n{declared}{shared}{loads}{head}{body}\n}}\n")
    addresses = b"".join(struct.pack("<Q", array.ctypes.data) for array in tensors.values())
    spans = [span(name, array) for name, array in tensors.items() if name != "new"]
    spans += [span(name, array, True) for name, array in tensors.items() if name in written]
    counts = ptx.Counts()
    ptx.Machine(program, seed).launch((blocks, 1, 1), (threads, 1, 1), addresses, spans, counts=counts)
    return counts


def at(register, pointer, size):
    """Code that puts the address of element %r<register> of tensor `pointer` into %rd19."""
    return f"mul.wide.u32 %rd18, %r{register}, {size}; add.s64 %rd19, %rd{pointer}, %rd18;\n"


def executed(opcode, *operands):
    """The result's bits, of this instruction in a program of its own. Operands: bits, or Python floats of a float type."""
    computes = operation(opcode, np.random.default_rng(0))
    prefix = {0: "%p", 2: "%h", 4: "%r", 8: "%rd"}
    body, tensors, names = "", {}, []
    for i, (kind, value) in enumerate(zip(computes.sources, operands, strict=True)):
        size = 0 if kind == "pred" else np.dtype(TYPES[kind]).itemsize
        held = np.full(32, value if isinstance(value, int) else bits_of(value, kind), UNSIGNED[size or 4])
        tensors[f"in{i}"] = held
        wide = 8 * held.itemsize
        register = f"{prefix[held.itemsize]}{10 + i}" if held.itemsize != 2 else f"%h{i}"
        body += at(0, i, held.itemsize) + f"ld.global.b{wide} {register}, [%rd19];\n"
        if not size:
            body += f"setp.ne.u32 %p{i}, {register}, 0;\n"
            register = f"%p{i}"
        names.append(register)
    size = 0 if computes.target == "pred" else np.dtype(TYPES[computes.target]).itemsize
    out = np.zeros(32, UNSIGNED[size or 4])
    target = {0: "%p8", 2: "%h8", 4: "%r9", 8: "%rd9"}[size]
    body += f"{opcode} {target}, {', '.join(names)};\n"
    if not size:
        body, target = body + "selp.u32 %r9, 1, 0, %p8;\n", "%r9"
    body += at(0, len(tensors), out.itemsize) + f"st.global.b{8 * out.itemsize} [%rd19], {target};\nret;"
    run(body, tensors | {"out": out})
    assert (out == out[0]).all() or "approx" in opcode
    return int(out[0])


FORMATS = {"f16": "<e", "f32": "<f", "f64": "<d"}


def bits_of(value, kind):
    if kind == "bf16":
        return bits_of(value, "f32") >> 16
    data = struct.pack(FORMATS[kind], value)
    return int.from_bytes(data, "little")


def expects(opcode, *cases):
    """(opcode, operands, expected); floats in the expected place are of the instruction's type."""
    kind = next(part for part in opcode.split(".")[1:] if part in TYPES)
    kind = "pred" if opcode.startswith("setp") else kind
    return [(opcode, case[:-1], bits_of(case[-1], kind) if isinstance(case[-1], float) else case[-1]) for case in cases]


TINY, LEAST = 2.0**-126, 2.0**-149  # the smallest normal and subnormal number of float32
M1 = 0xFFFFFFFF  # -1 of 32 bits
M1_64 = 0xFFFFFFFFFFFFFFFF
DEFINED = [
    # Rounded once, to nearest even; subnormals; signed zeros; one NaN.
    *expects("add.rn.f32", (1.0, 2.0**-24, 1.0), (1 + 2.0**-23, 2.0**-24, 1 + 2.0**-22), (1.0, 2.0**-24 + 2.0**-47,
        1 + 2.0**-23)),
    *expects("add.rn.f32", (-0.0, -0.0, -0.0), (1.0, -1.0, 0.0), (LEAST, LEAST, 2 * LEAST), (INF, -INF, NAN), (0x7FC12345, 1.0,
        NAN)),
    *expects("add.rn.f32", (3.4028234663852886e38, 2.0**103, INF), (3.4028234663852886e38, 2.0**102, 3.4028234663852886e38)),
    *expects("sub.rn.f32", (1.0, 1.0, 0.0), (TINY, LEAST, TINY - LEAST), (-0.0, 0.0, -0.0), (INF, INF, NAN)),
    *expects("add.f32", (1.0, 2.0, 3.0)), *expects("sub.f32", (1.0, 2.0, -1.0)),
    *expects("mul.rn.f32", (2.0**-75, 2.0**-75, 0.0), (1.5 * 2.0**-75, 2.0**-75, LEAST), (1.0, -0.0, -0.0), (0.0, INF, NAN)),
    *expects("mul.rn.f32", (1 + 2.0**-23, 1 + 2.0**-23, 1 + 2.0**-22), (2.0**100, 2.0**100, INF), (TINY, 0.5, TINY / 2)),
    *expects("mul.rn.f64", (1 + 2.0**-52, 1 + 2.0**-52, 1 + 2.0**-51), (0.0, INF, NAN64)),
    *expects("add.rn.f64", (1.0, 2.0**-53, 1.0), (-0.0, 0.0, 0.0), (0.1, 0.2, 0.1 + 0.2)),
    *expects("fma.rn.f32", (1 + 2.0**-23, 1 + 2.0**-23, -(1 + 2.0**-22), 2.0**-46), (2.0**64, 2.0**64, -INF, -INF)),
    *expects("fma.rn.f32", (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80, 1 + 2.0**-11 + 2.0**-23), (1 + 2.0**-12, 1 + 2.0**-12, 0.0,
        1 + 2.0**-11)),
    *expects("fma.rn.f32", (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80), 1 + 2.0**-11), (3.0, -0.0, -0.0, -0.0), (3.0, -0.0, 0.0,
        0.0)),
    *expects("fma.rn.f32", (0.0, INF, 1.0, NAN), (LEAST, 0.5, 0.0, 0.0), (LEAST, 0.75, 0.0, LEAST), (LEAST, 0.5, LEAST,
        2 * LEAST)),
    *expects("div.rn.f32", (1.0, 3.0, 0x3EAAAAAB), (1.0, 0.0, INF), (-1.0, INF, -0.0), (0.0, 0.0, NAN), (TINY, 2.0**10,
        TINY / 2**10)),
    *expects("sqrt.rn.f32", (2.0, 0x3FB504F3), (-0.0, -0.0), (-1.0, NAN), (INF, INF), (LEAST, 0x1A3504F3)),
    *expects("neg.f32", (0.0, -0.0), (INF, -INF)), *expects("abs.f32", (-0.0, 0.0), (-INF, INF), (-LEAST, LEAST)),
    *expects("min.f32", (-0.0, 0.0, -0.0), (0.0, -0.0, -0.0), (1.0, NAN, 1.0), (0x7FC00001, 2.0, 2.0), (NAN, NAN, NAN), (-INF,
        1.0, -INF)),
    *expects("max.f32", (-0.0, 0.0, 0.0), (0.0, -0.0, 0.0), (NAN, 1.0, 1.0), (NAN, NAN, NAN)),
    *expects("min.NaN.f32", (1.0, NAN, NAN), (0xFFC00000, 1.0, NAN), (2.0, 1.0, 1.0), (0.0, -0.0, -0.0)),
    *expects("max.NaN.f32", (1.0, NAN, NAN), (2.0, 1.0, 2.0), (-0.0, 0.0, 0.0)),
    # Comparisons: false of NaN, or with a u true of NaN.
    *expects("setp.eq.f32", (-0.0, 0.0, 1), (NAN, NAN, 0)), *expects("setp.ne.f32", (1.0, 2.0, 1), (NAN, 1.0, 0)),
    *expects("setp.neu.f32", (NAN, 1.0, 1), (1.0, 1.0, 0)), *expects("setp.ltu.f32", (NAN, 1.0, 1), (2.0, 1.0, 0), (1.0, 2.0,
        1)),
    *expects("setp.lt.f32", (NAN, 1.0, 0), (-0.0, 0.0, 0), (-1.0, 0.0, 1)), *expects("setp.geu.f32", (NAN, 1.0, 1), (0.0, 1.0,
        0)),
    *expects("setp.gt.f32", (LEAST, 0.0, 1), (NAN, 0.0, 0)), *expects("setp.gtu.f32", (NAN, 0.0, 1)), *expects("setp.ge.f32",
        (1.0, 1.0, 1)),
    *expects("setp.lt.s32", (M1, 0, 1)), *expects("setp.lt.u32", (M1, 0, 0)), *expects("setp.gt.s64", (M1_64, 0, 0), (1, M1_64,
        1)),
    *expects("setp.lt.and.s32", (M1, 0, 0, 0), (M1, 0, 1, 1)), *expects("selp.b32", (1, 2, 1, 1), (1, 2, 0, 2)),
    # Integers: modulo their width, divided towards zero.
    *expects("add.s32", (M1, 1, 0)), *expects("sub.s64", (0, 1, M1_64)), *expects("mul.lo.s32", (0x10000, 0x10001, 0x10000)),
    *expects("mul.wide.u32", (M1, M1, 0xFFFFFFFE00000001)), *expects("mul.wide.s32", (M1, M1, 1), (M1, 2, 0xFFFFFFFFFFFFFFFE)),
    *expects("mul.hi.u32", (M1, M1, 0xFFFFFFFE), (0x10000, 0x10000, 1)), *expects("mul.lo.s64", (2**40, 2**24 + 3, 3 * 2**40)),
    *expects("mad.lo.s32", (M1, 5, 3, 0xFFFFFFFE)), *expects("mad.wide.u32", (M1, 2, 1, 0x1FFFFFFFF)), *expects("mad.lo.s64",
        (M1_64, 5, 6, 1)),
    *expects("mad.wide.s32", (M1, 2, 1, M1_64)), *expects("div.s32", (0xFFFFFFF9, 2, 0xFFFFFFFD)), *expects("div.u32", (7, 2,
        3)),
    *expects("div.s64", (0xFFFFFFFFFFFFFFF9, 2, 0xFFFFFFFFFFFFFFFD), (7, 0xFFFFFFFFFFFFFFFE, 0xFFFFFFFFFFFFFFFD), (6, 3, 2)),
    *expects("rem.s64", (0xFFFFFFFFFFFFFFF9, 2, M1_64), (7, 0xFFFFFFFFFFFFFFFE, 1)), *expects("rem.u32", (M1, 10, 5)),
    *expects("min.s64", (M1_64, 1, M1_64)), *expects("and.b32", (12, 10, 8)), *expects("or.b16", (12, 10, 14)),
        *expects("xor.b64", (12, 10, 6)),
    *expects("not.b32", (0, M1)), *expects("and.pred", (1, 0, 0), (1, 1, 1)), *expects("not.pred", (1, 0)), *expects("or.pred",
        (1, 0, 1)),
    # Shifts beyond the width.
    *expects("shl.b32", (1, 31, 0x80000000), (1, 32, 0), (1, M1, 0)), *expects("shl.b64", (1, 63, 2**63), (1, 64, 0)),
    *expects("shr.u32", (2**31, 31, 1), (2**31, 32, 0)), *expects("shr.s32", (2**31, 31, M1), (2**31, 99, M1), (2**30, 99, 0)),
    *expects("shr.u64", (2**63, 64, 0)), *expects("shr.s64", (2**63, 64, M1_64)), *expects("shl.b16", (1, 15, 0x8000), (1, 16,
        0)),
    *expects("bfe.u32", (0xABCD1234, 8, 8, 0x12), (0xABCD1234, 28, 8, 0xA), (1, 40, 4, 0), (5, 0, 0, 0), (M1, 0, 32, M1)),
    *expects("bfe.s32", (0x00000F80, 7, 5, M1), (0x00000F80, 7, 6, 31), (0x80000000, 28, 8, 0xFFFFFFF8), (0x80000000, 40, 4,
        M1)),
    # Conversions.
    *expects("cvt.s64.s32", (M1, M1_64)), *expects("cvt.u64.u32", (M1, M1)), *expects("cvt.u32.u64", (2**40 + 7, 7)),
    *expects("cvt.u16.u32", (0x12345, 0x2345)), *expects("cvt.u32.u16", (0xFFFF, 0xFFFF)), *expects("cvt.u64.u16", (0xFFFF,
        0xFFFF)),
    *expects("cvt.rn.f32.u32", (M1, 2.0**32), (2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4)), *expects("cvt.rn.f32.s32", (M1,
        -1.0)),
    *expects("cvt.rzi.s32.f32", (1.9, 1), (-1.9, M1), (1e10, 0x7FFFFFFF), (-1e10, 0x80000000), (NAN, 0), (INF, 0x7FFFFFFF)),
    *expects("cvt.rzi.u32.f32", (-1.0, 0), (1e10, M1), (NAN, 0), (2.0**31, 2**31)),
    *expects("cvt.rzi.s64.f32", (1e30, 2**63 - 1), (-1e30, 2**63), (NAN, 2**63), (2.0**62, 2**62)),
    ("cvt.rn.f32.f64", (1 + 2.0**-24,), bits_of(1.0, "f32")), ("cvt.rn.f32.f64", (1e300,), bits_of(INF, "f32")),
    ("cvt.f64.f32", (0x7F800001,), NAN64), ("cvt.f64.f32", (LEAST,), bits_of(LEAST, "f64")),
    *expects("cvt.rn.f16.f32", (65519.0, 65504.0), (65520.0, INF), (2.0**-25, 0.0), (1.5 * 2.0**-25, 2.0**-24), (-0.0, -0.0),
        (NAN, NAN16)),
    *expects("cvt.rn.f16.f32", (1 + 2.0**-11, 1.0), (1 + 3 * 2.0**-11, 1 + 2.0**-9)), *expects("cvt.f32.f16", (2.0**-24,
        2.0**-24)),
    *expects("cvt.rn.bf16.f32", (1 + 2.0**-8, 1.0), (1 + 3 * 2.0**-8, 1 + 2.0**-6), (NAN, NAN16), (3.4e38, INF), (LEAST, 0.0)),
    *expects("cvt.f32.bf16", (0x3F80, 1.0), (0x0001, 2.0**-133), (0xFF80, -INF), (0x7F81, NAN)), ("cvt.f64.bf16", (0x3F80,),
        bits_of(1.0, "f64")),
    ("cvt.rn.f16x2.f32", (1.0, -2.0), 0x3C00C000), ("cvt.rn.bf16x2.f32", (1.0, -2.0), 0x3F80C000),
    *expects("rsqrt.approx.ftz.f32", (0.0, INF), (-0.0, -INF), (LEAST, INF), (-LEAST, -INF), (INF, 0.0), (-1.0, NAN), (NAN,
        NAN)),
]  # fmt: skip


@pytest.mark.parametrize("opcode", sorted({case[0] for case in DEFINED}))
def test_an_instruction_does_what_the_isa_says(opcode):
    for case, operands, expected in DEFINED:
        if case == opcode:
            got = executed(opcode, *operands)
            assert got == expected, f"{opcode} of {operands}: {got:#x}, expected {expected:#x}"


@pytest.mark.parametrize(
    "opcode",
    ["mul.f32", "mul.f64", "mad.f32", "fma.f32", "fma.rz.f32", "add.rz.f32", "add.ftz.f32", "lg2.approx.f32", "popc.b32",
        "cvt.f32.f64",
     "cvt.rn.f16.f64", "setp.xx.s32", "div.full.f32", "add.sat.s32", "rsqrt.approx.f32"],
)  # fmt: skip
def test_an_unknown_instruction_is_an_error(opcode):
    with pytest.raises(PtxError, match="unknown instruction|may fuse it"):
        operation(opcode, np.random.default_rng(0))


def exactly_rounded(value):
    """A Fraction to float32, to nearest even, by integers alone."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 24, -149)
    while abs(value) >= fractions.Fraction(2) ** (exponent + 24):
        exponent += 1
    return float(
        round(value / fractions.Fraction(2) ** exponent) * fractions.Fraction(2) ** exponent
    )  # round(): half to even


def test_fma_rounds_the_exact_sum_once():
    """Beside exact arithmetic; addends around the ties of the product, where a sum in float64 would round twice."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(2**23, 2**24, 400).astype(np.float32) * np.float32(2.0**-23) for _ in range(2))
    a[::2], b[::2] = (1 + rng.integers(0, 2**12, (2, 200)) * 2.0**-12).astype(np.float32)
    c = (rng.choice([-1, 1], 400) * 2.0 ** rng.integers(-140, 3, 400)).astype(np.float32)
    got = operation("fma.rn.f32", rng).function(a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        exact = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z))
        assert float(result) == exactly_rounded(exact), (x, y, z)


def test_halves_widen_and_round_as_torch_has_them():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        wide = operation(f"cvt.f32.{kind}", None).function(every.numpy().view(TYPES[kind]))
        expected = every.view(dtype).float().numpy()
        assert np.array_equal(wide, expected, equal_nan=True) and np.array_equal(
            np.signbit(wide)[:32768], np.signbit(expected)[:32768]
        )
        near = torch.from_numpy(expected).view(torch.int32)[:, None] + torch.arange(-3, 4) * (
            1 << (12 if kind == "f16" else 15)
        )
        near = near.view(torch.float32).flatten()
        with np.errstate(over="ignore"):
            back = operation(f"cvt.rn.{kind}.f32", None).function(near.numpy()).view(np.int16)
        wanted = near.to(dtype)
        assert ((torch.from_numpy(back) == wanted.view(torch.int16)) | wanted.isnan()).all()


def test_approximations_err_both_ways_within_their_bound():
    value = np.random.default_rng(3).uniform(0.5, 8, 20000).astype(np.float32)
    got = operation("rsqrt.approx.ftz.f32", np.random.default_rng(4)).function(value).astype(np.float64)
    error = got * np.sqrt(value.astype(np.float64)) - 1
    assert np.abs(error).max() <= RSQRT_ERROR
    assert error.min() < -0.9 * RSQRT_ERROR and error.max() > 0.9 * RSQRT_ERROR
    assert len(np.unique(np.round(error / 2.0**-25))) > 4


# ---- threads ----

ADDRESS = at(2, 0, 4)  # of this thread's element of the first tensor
STORE = ADDRESS + "st.global.b32 [%rd19], %r9;\n"


def output(n):
    """Zeros, at a multiple of 32 bytes, so that the sectors they lie in are known."""
    memory = np.zeros(4 * n + 32, np.uint8)
    return memory[-memory.ctypes.data % 32 :][: 4 * n].view(np.uint32)


def test_threads_that_part_meet_again():
    """Each thread counts to its own number, of which the odd ones skip; then the warp exchanges."""
    body = """
    mov.u32 %r9, 0; mov.u32 %r10, 0; and.b32 %r11, %r0, 1; setp.ne.u32 %p1, %r11, 0; @%p1 bra SKIP;
LOOP: setp.ge.u32 %p0, %r10, %r0; @%p0 bra DONE; add.s32 %r9, %r9, %r10; add.s32 %r10, %r10, 1; bra.uni LOOP;
SKIP: mov.u32 %r9, 1000;
DONE: @%p1 add.s32 %r9, %r9, 1;
    shfl.sync.bfly.b32 %r9|%p2, %r9, 1, 31, -1;
"""
    out = output(128)
    counts = run(body + STORE + "ret;", {"out": out}, 2, 64)
    expected = [n * (n - 1) // 2 if n % 2 == 0 else 1001 for n in range(64)]
    assert out.tolist() == [expected[n ^ 1] for n in range(64)] * 2
    assert counts.instructions["exchange"] == counts.threads == 128
    assert counts.memory == {("requests", "out"): 4, ("sectors", "out"): 16, ("bytes", "out"): 512}


@pytest.mark.parametrize(
    "shuffle, expected",
    [("down.b32 %r9, %r0, 4, 31", [*range(4, 32), 28, 29, 30, 31]), ("up.b32 %r9, %r0, 4, 0", [0, 1, 2, 3, *range(28)]),
     ("idx.b32 %r9, %r0, 5, 31", [5] * 32), ("bfly.b32 %r9, %r0, 3, 31", [n ^ 3 for n in range(32)]),
     ("down.b32 %r9, %r0, 1, 6175", [n if n % 8 == 7 else n + 1 for n in range(32)])],
)  # fmt: skip
def test_shuffles(shuffle, expected):
    """The last: in segments of 8 lanes, (24 << 8) + 31."""
    out = output(32)
    run(f"shfl.sync.{shuffle}, -1;\n{STORE}ret;", {"out": out})
    assert out.tolist() == expected


SHARED = ".shared .align 16 .b8 buffer[256];\n"
TURNED = """mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4; st.shared.b32 [%r5], %r2;
{wait} sub.s32 %r6, 63, %r0; shl.b32 %r7, %r6, 2; add.s32 %r8, %r3, %r7; ld.shared.b32 %r9, [%r8];
"""


def test_shared_memory_of_each_block_and_its_barrier():
    out = output(128)
    run(TURNED.format(wait="bar.sync 0;") + STORE + "ret;", {"out": out}, 2, 64, shared=SHARED)
    assert out.tolist() == [*range(63, -1, -1), *range(127, 63, -1)]


TURNED_IN_WARP = TURNED.replace("63, %r0", "31, %r0").replace("{wait}", "bar.warp.sync -1;")


def test_a_warp_s_barrier_is_enough_for_the_warp():
    out = output(32)
    run(TURNED_IN_WARP + STORE + "ret;", {"out": out}, shared=SHARED)
    assert out.tolist() == [*range(31, -1, -1)]


MATRICES = """mov.u32 %r3, buffer; shl.b32 %r4, %r0, 3; add.s32 %r5, %r3, %r4; st.shared.v2.b32 [%r5], {%r0, %r10};
bar.sync 0; shr.u32 %r6, %r0, 3; and.b32 %r7, %r0, 7; shl.b32 %r7, %r7, 4; shl.b32 %r6, %r6, 7; add.s32 %r6, %r6, %r7;
add.s32 %r8, %r3, %r6; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r9, %r11}, [%r8]; mad.lo.s32 %r9, %r11, 100, %r9;
"""


def test_matrices_from_shared_memory():
    """Lane n stores n into word 2n. A matrix's row is four words; lane n gets word n % 4 of row n / 4, of each matrix."""
    out = output(32)
    run("mov.u32 %r10, 50;" + MATRICES + STORE + "ret;", {"out": out}, shared=SHARED)
    words = [word for n in range(32) for word in (n, 50)]
    assert out.tolist() == [words[n] + 100 * words[32 + n] for n in range(32)]


def test_matrices_to_shared_memory():
    """Lane n has n and n + 100 of two matrices. Their rows' addresses are those of lanes 0 to 7, and 8 to 15."""
    rows = "mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.s32 %r5, %r3, %r4; add.s32 %r6, %r0, 100;\n"
    store = "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r5], {%r0, %r6}; bar.sync 0;\n"
    out, twice = output(32), SHARED.replace("256", "512")
    for offset, first in ((0, 0), (128, 100)):
        load = f"shl.b32 %r7, %r0, 2; add.s32 %r8, %r3, %r7; ld.shared.b32 %r9, [%r8+{offset}];\n"
        run(rows + store + load + STORE + "ret;", {"out": out}, shared=twice)
        assert out.tolist() == [*range(first, first + 32)]


@pytest.mark.parametrize("stored", ["", ".trans"])
@pytest.mark.parametrize("loaded", ["", ".trans"])
def test_matrices_transposed(stored, loaded):
    """Lane n has the elements 2n and 2n + 1 of a matrix."""
    body = f"""mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.s32 %r5, %r3, %r4; shl.b32 %r6, %r0, 1; shl.b32 %r7, %r6, 16;
    or.b32 %r6, %r6, %r7; add.s32 %r6, %r6, 65536; stmatrix.sync.aligned.m8n8.x1{stored}.shared.b16 [%r5], {{%r6}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1{loaded}.shared.b16 {{%r9}}, [%r5];
    """
    out = output(32)
    run(body + STORE + "ret;", {"out": out}, shared=SHARED.replace("256", "512"))
    expected = np.arange(64).reshape(8, 8)
    expected = expected if stored == loaded else expected.T
    assert out.view(np.uint16).tolist() == expected.flatten().tolist()


PARTED = "setp.lt.u32 %p0, %r0, 16; @%p0 bra AWAY; {} AWAY: ret;"
REFUSED = {
    "no barrier": (TURNED.format(wait="") + STORE, "shared memory: a race"),
    "a warp's barrier for two": (TURNED.format(wait="bar.warp.sync -1;") + STORE, "shared memory: a race"),
    "a barrier that some miss": (PARTED.format("bar.sync 0;"), "a thread is not there"),
    "a shuffle that some miss": (PARTED.format("shfl.sync.down.b32 %r9, %r0, 1, 31, -1;"),
        "a lane that its mask names is not there"),
    "a matrix that some miss": (PARTED.format("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [0];"), "a lane is not there"),
    "a matrix at no multiple of 16": ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [4];", "a row at an address"),
    "beyond the shared memory": ("st.shared.b32 [%r2+256], %r2;", "beyond the shared memory"),
    "beyond the tensor": (ADDRESS + "st.global.b32 [%rd19+4], %r2;", "beyond every tensor is written"),
    "before the tensor": (ADDRESS + "ld.global.b32 %r9, [%rd19+-32];", "below every tensor|is no tensor's|beyond every tensor"),
    "another tensor's end": (at(2, 1, 4) + "ld.global.b32 %r9, [%rd19+4];",
        "is read, which is no tensor's|beyond every tensor is read"),
    "what is only read": (at(2, 1, 4) + "st.global.b32 [%rd19], %r2;", "is written, which is no tensor's"),
    "what is only written": (at(2, 2, 4) + "ld.global.b32 %r9, [%rd19];", "is read, which is no tensor's"),
    "not aligned": (ADDRESS + "ld.global.b32 %r9, [%rd19+2];", "at an address that they do not divide"),
    "not aligned to its words": (ADDRESS + "ld.global.v2.b32 {%r9, %r10}, [%rd19];", "at an address that they do not divide"),
    "two blocks, one place": (at(0, 0, 4) + "st.global.b32 [%rd19], %r2;", "a race: thread .* writes"),
    "two threads, one place": ("shr.u32 %r3, %r2, 1;" + at(3, 0, 4) + "st.global.b32 [%rd19], %r2;",
        "a race: thread .* writes"),
    "read where another wrote": (STORE + "xor.b32 %r3, %r2, 1;" + at(3, 0, 4) + "ld.global.b32 %r9, [%rd19];",
        "a race: thread .* reads"),
    "written where another read": ("xor.b32 %r3, %r2, 1;" + at(3, 0, 4) + "ld.global.b32 %r9, [%rd19];" + STORE,
        "a race: thread .* writes"),
    "written where all read": ("ld.global.b32 %r9, [%rd0];" + STORE, "a race: thread .* writes"),
    "no end": ("LOOP: bra.uni LOOP;", "does not end"),
    "an unknown special register": ("mov.u32 %r9, %clock;", "unknown operand %clock"),
    "a division by zero": ("div.s32 %r9, %r0, 0;", "divided by zero"),
    "a wider operand": ("add.s64 %rd5, %rd0, %r0;", "%r0 is read as s64"),
    "a narrower target": ("add.s64 %r9, %rd0, %rd0;", "%r9 is given a value of int64"),
    "an unknown load": ("ld.local.b32 %r9, [%rd0];", "unknown instruction ld.local.b32"),
    "an unknown barrier": ("bar.arrive 0, 32;", "unknown instruction bar.arrive"),
    "an unknown directive": (".local .b8 depot[8];", "unknown directive"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_program_may_not_do(fault, monkeypatch):
    monkeypatch.setattr(ptx, "LONGEST", 1000)
    body, message = REFUSED[fault]
    tensors = {"out": output(128), "in": np.arange(128, dtype=np.uint32), "new": output(128)}
    with pytest.raises(PtxError, match=message):
        run(body + "ret;", tensors, 2, 64, shared=SHARED)


def test_a_tensor_s_gaps_are_no_tensor_s():
    """A view with every other element, as the launchers describe a batch with a stride."""
    data = output(64)
    body = "ld.param.u64 %rd0, [p]; mov.u32 %r2, %tid.x;" + at(2, 0, 8) + "st.global.b32 [%rd19], %r2; ret;"
    program = ptx.parse(f".entry small(.param .u64 p)\n{{\n.reg .b64 %rd<20>; .reg .b32 %r<20>; {body}\n}}\n")
    spans = [Span("out", data.ctypes.data, (32, 4), (8, 1), 4, True)]
    ptx.Machine(program).launch((1, 1, 1), (32, 1, 1), struct.pack("<Q", data.ctypes.data), spans)
    assert data[::2].tolist() == [*range(32)] and not data[1::2].any()
    program.blocks[0][-2].operands[0] = "[%rd19+4]"
    with pytest.raises(PtxError, match="is written, which is no tensor's|beyond every tensor"):
        ptx.Machine(program).launch((1, 1, 1), (32, 1, 1), struct.pack("<Q", data.ctypes.data), spans)


def test_a_register_that_nothing_wrote_is_random():
    seen = [output(128) for _ in range(2)]
    for seed, out in enumerate(seen):
        run(STORE + "ret;", {"out": out}, 2, 64, seed=seed)
        assert len(np.unique(out)) > 120
    assert not (seen[0] == seen[1]).any()


# ---- the package's kernels ----

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
COMMON = [names for count in range(4) for names in itertools.combinations(("u", "m1", "seeds"), count)]
EVERYTHING = bits.INPUT_SETS["all_with_seeds"]
LARGE = (1, 33_003)  # enough for the form of large tensors on cuda_on_host's two multiprocessors
FORMS = {
    "small": [(names, (2, 300)) for names in (*COMMON, EVERYTHING)],
    "large": [(names, LARGE) for names in COMMON],
    "by_band": [(names, (2, 3, 5, 12)) for names in ((), ("seeds",), EVERYTHING)],
}


each_architecture = pytest.mark.parametrize(
    "architecture", [pytest.param(n, marks=() if n == 90 else pytest.mark.deep) for n in ptx_launch.ARCHITECTURES]
)


def step_symbols(architecture, x_dtype, f_dtype, form):
    """Those of nvcc's kernels for these dtypes, csrc/step_cuda.cu::step_kernel<X, F, tensors, Form>."""
    number = {"small": 0, "large": 1, "by_band": 2}[form]
    pattern = re.compile(
        rf"step_kernelILNS_5DtypeE{DTYPES[x_dtype]}E(?:LNS_5Dtype|LS2_|LS\d*_){DTYPES[f_dtype]}ELj\d+ELNS0_4FormE{number}E"
    )
    return {symbol for symbol in ptx_launch.cuda_module("step_cuda", architecture)[0] if pattern.search(symbol)}


@needs_nvcc
@pytest.mark.parametrize(
    "architecture, form",
    [
        pytest.param(n, form, marks=() if (n, form) == (90, "small") else pytest.mark.deep)
        for n in ptx_launch.ARCHITECTURES
        for form in FORMS
    ],
)
@pytest.mark.parametrize(
    "x_dtype, f_dtype",
    [pytest.param(x, f, marks=() if (x, f) == (torch.float16, torch.bfloat16) else pytest.mark.deep) for x,
        f in bits.DTYPE_PAIRS],
    ids=[f"x_{bits.name(x)}-f_{bits.name(f)}" for x, f in bits.DTYPE_PAIRS],
)  # fmt: skip
def test_every_kernel_of_the_step(architecture, form, x_dtype, f_dtype):
    """Each of nvcc's has run, its bits those of the reference; the counts say that none was left out."""
    calls = FORMS[form]
    if form == "large" and x_dtype.itemsize != f_dtype.itemsize:  # without noise these have one form
        calls = [call for call in calls if "seeds" in call[0]]
    ptx_launch.launched.clear()
    kernels.current = "cuda_ptx"
    with ptx_launch.on(architecture), epskernels.use_backend("cuda_ptx"):
        for number, (names, shape) in enumerate(calls):
            rows = bits.random_rows(3, names, number)
            if form == "by_band":
                rows = bits.with_bands(rows, 2, number)
            bits.check(rows, torch.arange(shape[0]), bits.make_inputs(shape, names, number, x_dtype, f_dtype))
    kernels.current = "torch.ops"
    ran = {symbol for _, symbol in ptx_launch.launched}
    expected = step_symbols(architecture, x_dtype, f_dtype, form)
    assert ran == expected and len(expected) == len(calls)


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [pytest.param(n, marks=() if n == 90 else pytest.mark.deep) for n in ptx_launch.ARCHITECTURES]
)
def test_every_kernel_of_the_noise_and_of_the_sums(architecture):
    ptx_launch.launched.clear()
    kernels.current = "cuda_ptx"
    rows, index = bits.random_rows(3, ("u",), 1), torch.tensor([2, 0])
    with ptx_launch.on(architecture):
        for dtype in DTYPES:
            got = epskernels.normal([3, -9], (5, 201), dtype=dtype, draw=7, backend="cuda_ptx")
            bits.assert_same_bits(
                got, epskernels.normal([3, -9], (5, 201), dtype=dtype, draw=7, backend="reference"), "normals"
            )
            inputs = bits.make_inputs((2, 3, 1000), ("u",), 2, dtype, dtype, special=0)
            for given in ((inputs["f"],), (inputs["f"], inputs["u"], rows, index)):
                sums, expected = (epskernels.moments(*given, backend=name) for name in ("cuda_ptx", "reference"))
                assert torch.equal(sums, expected)
    kernels.current = "torch.ops"
    ran = {symbol for _, symbol in ptx_launch.launched}
    of_noise = {symbol for symbol in ptx_launch.cuda_module("step_cuda", architecture)[0] if "normal_kernel" in symbol}
    assert ran == of_noise | ptx_launch.cuda_module("moments_cuda", architecture)[0].keys() and len(ran) == 3 + 7


# ---- planted faults ----


def _truncating(match):
    """bfloat16 by cutting off, in the place of rounding."""
    return (
        "{{ .reg .b32 cut0, cut1; mov.b32 cut0, {2}; mov.b32 cut1, {1}; shr.u32 cut0, cut0, 16; and.b32 cut1, cut1, -65536; "
        "or.b32 {0}, cut0, cut1; }}"
    ).format(*match.groups())


def _fused(text):
    """Sums take products unrounded, as an assembler may that is allowed to contract."""
    products = {each[1]: each for each in re.finditer(r"mul\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+);", text)}

    def fuse(total):
        product = products.get(total[3])
        return f"fma.rn.f32 {total[1]}, {product[2]}, {product[3]}, {total[2]};" if product else total[0]

    return re.sub(r"add\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+);", fuse, text)


def _once(pattern, by, which=0):
    def plant(text):
        found = [*re.finditer(pattern, text)][which]
        return text[: found.start()] + (by(found) if callable(by) else found.expand(by)) + text[found.end() :]

    return plant


# What is done to nvcc's PTX, and what must come of it: "bits" that differ, or what the machine says.
WHOLE, ODD = (2, 2048), (2, 300)  # tiles that are whole, or that end within
FAULTS = {
    "a store one element too far": (ODD, _once(r"st\.global\.u16\s+\[(%rd\d+)\+14\]", r"st.global.u16 [\1+16]"),
        "a race|no tensor|every tensor"),
    "a store of words too far": (WHOLE, _once(r"st\.global\.v4\.u32\s+\[(%rd\d+)\]", r"st.global.v4.u32 [\1+16]"),
        "a race|no tensor|every tensor"),
    "two blocks that write one tile": (WHOLE, lambda text: re.sub(r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;", text),
        "a race"),
    "a product that is fused": (WHOLE, _fused, "bits"),
    "a bound that is missing": (ODD, lambda text: re.sub(r"@%p\d+ bra\s+\S+;(?=\s+st\.global)", "", text),
        "a race|no tensor|every tensor"),
    "a bound of loads that is missing": (ODD, lambda text: re.sub(r"@%p\d+ bra\s+\S+;(?=\s+ld\.global\.u16)", "", text),
        "no tensor|every tensor"),
    "a wrong rounding": (WHOLE, lambda text: re.sub(r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+);", _truncating, text),
        "bits"),
    "a register that nothing writes": (WHOLE, _once(r"mul\.rn\.f32\s+%f\d+, %f\d+, %f\d+;", "", 5), "bits"),
    "a shift by one too few": (WHOLE, _once(r"xor\.b32 \s*(%r\d+), %r\d+, (%r\d+);", r"mov.b32 \1, \2;", 3), "bits"),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    shape, plant, message = FAULTS[fault]
    names, dtype = ("seeds",), torch.float32 if plant is _fused else torch.bfloat16  # which would hide it
    rows, inputs = bits.random_rows(3, names, 1, idle=0), bits.make_inputs(shape, names, 2, dtype, dtype, special=0)
    expected, index = bits.reference(rows, torch.arange(2), inputs), torch.arange(2)

    def differs():
        got = bits.step(rows, index, inputs, return_m0=True)
        return not all(
            torch.equal(a.view(bits.INTEGERS[dtype]), b.view(bits.INTEGERS[dtype]))
            for a, b in zip(got, expected, strict=True)
        )

    with epskernels.use_backend("cuda_ptx"):
        assert not differs()
        make = ptx_launch.cuda_machine.__wrapped__
        parse = ptx.parse

        def planted(text, shared=""):
            changed = plant(text)
            assert changed != text
            return parse(changed, shared)

        monkeypatch.setattr(ptx, "parse", planted)
        monkeypatch.setattr(ptx_launch, "cuda_machine", make)
        if message == "bits":
            assert differs()
        else:
            with pytest.raises(PtxError, match=message):
                differs()


# ---- Triton's ----

TRITON_CALLS = {
    "bare": ((), (2, 300)), "everything": (EVERYTHING, (2, 300)), "whole_tiles": (("u", "m1", "seeds"), (2, 2048)),
    "band": (("m1",), (2, 3, 6, 8)), "band_odd": (("u", "seeds"), (2, 3, 5, 7)), "band_of_pairs": (("seeds",), (2, 3, 10)),
}  # fmt: skip


def check_triton(call, dtypes):
    names, shape = TRITON_CALLS[call]
    rows, index = bits.random_rows(3, names, 1), torch.arange(2)
    if call.startswith("band"):
        rows = bits.with_bands(rows, epskernels.spec.band_dims_of(len(shape)), 2)
    with epskernels.use_backend("triton_ptx"):
        bits.check(rows, index, bits.make_inputs(shape, names, 3, *dtypes))


@needs_triton
@each_architecture
@pytest.mark.parametrize(
    "call", [pytest.param(c, marks=() if c == "everything" else pytest.mark.deep) for c in TRITON_CALLS]
)
@pytest.mark.parametrize("compiled", ["alone", pytest.param("by_inductor", marks=pytest.mark.deep)])
@pytest.mark.parametrize(
    "dtypes", [bits.MIXED_PAIRS[0], *(pytest.param(d, marks=pytest.mark.deep) for d in bits.MIXED_PAIRS[1:])]
)
def test_triton_s_step(architecture, call, compiled, dtypes, monkeypatch):
    """As Triton compiles it, and as Inductor has it compiled: with other options, from a copy of the source."""
    monkeypatch.setattr(kernels, "current", "triton_ptx")
    monkeypatch.setattr(ptx_launch, "inductor", compiled == "by_inductor")
    with ptx_launch.on(architecture):
        check_triton(call, dtypes)


# ---- what they execute ----

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
COUNTED = {
    "x and f, float32": ((), FLOAT32, (2, 32768)), "x and f, bfloat16": ((), BFLOAT16, (2, 32768)),
    "with noise, float32": (("seeds",), FLOAT32, (2, 32768)), "with noise, bfloat16": (("seeds",), BFLOAT16, (2, 32768)),
    "with guidance and noise, float32": (("u", "seeds"), FLOAT32, (2, 32768)),
    "with guidance and noise, bfloat16": (("u", "seeds"), BFLOAT16, (2, 32768)),
    "by band, float32": ((), FLOAT32, (2, 4, 64, 64)), "by band, bfloat16": ((), BFLOAT16, (2, 4, 64, 64)),
    "by band with noise, float32": (("seeds",), FLOAT32, (2, 4, 64, 64)),
    "by band with noise, bfloat16": (("seeds",), BFLOAT16, (2, 4, 64, 64)),
}  # fmt: skip
OF_ROWS = ("rows", "index", "seeds")
KINDS = ("float", "division", "integer", "conversion", "choice", "move", "memory", "parameter", "control")


def counted(names, dtype, shape, misaligned=False):
    """(PTX instructions by kind and element; bytes of sectors over bytes asked for; a warp's requests for its row)"""
    rows = bits.make_row(c_x=0.5, c_m0=0.5, d_x=1, d_f=-1, clip=1, c_noise="seeds" in names, g=1 + ("u" in names))
    if len(shape) == 4:
        rows = bits.with_bands(rows, 2, 1, idle=0)
    inputs = bits.make_inputs(shape, names, 1, dtype, dtype, special=0)
    if misaligned:
        inputs["x"] = bits.LAYOUTS["offset_by_one"](inputs["x"])
    with ptx_launch.counting() as counts, epskernels.use_backend("cuda_ptx"):
        bits.step(rows, torch.zeros(shape[0], dtype=torch.int64), inputs)
    numel, memory = inputs["x"].numel(), collections.Counter()
    for (what, tensor), count in counts.memory.items():
        memory[what, tensor in OF_ROWS] += count
    return (
        {kind: count / numel for kind, count in counts.instructions.items()},
        memory["sectors", False] * 32 / memory["bytes", False],
        memory["requests", True] * 32 / counts.threads,
    )


@needs_nvcc
def test_what_the_fast_path_moves_and_executes():
    """Sectors: no byte that was not asked for. Read element by element, a tensor has them moved for each element of a unit."""
    kinds, moved, of_row = counted((), FLOAT32, (2, 4096))
    assert moved == 1.0 and of_row <= 8 and kinds["float"] < 9 and sum(kinds.values()) < 40
    slow, moved, _ = counted((), FLOAT32, (2, 4096), misaligned=True)
    assert moved == pytest.approx((4 + 1 + 1) / 3, rel=0.05) and sum(slow.values()) > sum(kinds.values())


def print_counts():
    print(f"| | {' | '.join(KINDS)} | all | sectors over bytes | misaligned: all | sectors over bytes |")
    print(f"|---{'|---' * (len(KINDS) + 4)}|")
    for title, call in COUNTED.items():
        kinds, moved, _ = counted(*call)
        slow, moved_slow, _ = counted(*call, misaligned=True)
        numbers = [*(kinds.get(kind, 0) for kind in KINDS), sum(kinds.values()), moved, sum(slow.values()), moved_slow]
        print(f"| {title} | {' | '.join(f'{number:.2f}' for number in numbers)} |", flush=True)


if __name__ == "__main__":
    print_counts()
