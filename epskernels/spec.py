"""What all implementations of the step have in common, written here alone: the columns of a row, the bits of its terms, the
inputs, the constants of the polynomials, the schemas of torch.ops.epskernels.*.

Python imports this file. For C++ and CUDA the build runs it as a script (`python spec.py > spec.h`): it prints the same as a
header. It imports the standard library alone, so that a build does not import torch.

Two rules for the schemas. A new optional argument comes last of its kind: exported programs give theirs by position, and would
give them to another in silence. A number is never keyword-only with a default: AOTInductor (torch 2.13) leaves such a one out
of the description of a call and not out of the call, which then fails.
"""

# ---- the row ----

# A row's columns, in their order: docs/architecture.md tells what each is.
COLUMNS = (
    "d_x", "d_f", "clip", "g",
    "c_x", "c_f", "c_m0", "c_m1", "c_m2", "c_grad", "c_noise",
    "draw",  # an integer: the noise of this row, wherever the row stands
    "logvar_min", "logvar_max",
    "guided_channels",  # an integer; 0: all of them
    "c_in_next",  # times x': what the model reads at the next call
    "c_y", "k_x", "k_m0", "k_m1", "k_m2", "k_y",
    "t", "c_in",  # what the caller feeds the model; the kernels do not use them
)  # fmt: skip
SECOND_STATE = ("k_x", "k_m0", "k_m1", "k_m2", "k_y")  # of y'
# Four more, of rows that correct the low Haar band of x' (corrections.py): the shape of `rows` says whether they are there, so
# that a launch knows it without reading them.
BAND_COLUMNS = ("l_next", "l_m0", "l_x", "band_dims")
ROW_WIDTHS = (len(COLUMNS), len(COLUMNS) + len(BAND_COLUMNS))
ROWS_SHAPE = " or ".join(f"(R, {width})" for width in ROW_WIDTHS)
BAND_SHAPES = {1: "(B, L) or (B, C, L)", 2: "(B, C, H, W) or (B, C, F, H, W)"}  # by the number of dimensions


def band_dims_of(dims: int) -> int:
    """In how many of a tensor's last dimensions its bands are taken: one of (B, L) and (B, C, L), two of (B, C, H, W) and
    (B, C, F, H, W), none of others (0)."""
    return {2: 1, 3: 1, 4: 2, 5: 2}.get(dims, 0)


# The terms of a row, each a bit, in this order.
TERM_NAMES = (
    "GUIDANCE", "CLIP", "F", "M1", "M2", "GRAD", "NOISE", "VARIANCE", "Y", "K_M1", "K_M2", "K_Y",
    "Y_OUT",  # y' is written
    "CHANNELS",  # some channels are not guided
    "RESCALE", "THRESHOLD",
    "BAND",  # the low band of x' is corrected
)  # fmt: skip
TERMS = {name: 1 << bit for bit, name in enumerate(TERM_NAMES)}
# What most samplers are made of; the CPU kernel's combinations of the rest are not compiled apart.
COMMON_TERMS = sum(TERMS[name] for name in ("GUIDANCE", "CLIP", "F", "M1", "M2", "GRAD", "NOISE"))

# ---- the inputs and outputs of a step, in the order of the schemas ----

REQUIRED = ("x", "f", "rows", "index")
OPTIONAL = ("u", "m1", "m2", "v", "grad", "noise", "seeds", "y", "rescale", "threshold")
INPUTS = REQUIRED + OPTIONAL
OUTPUTS = ("out", "m0", "y_out", "model_input")

# ---- numbers ----

# Streams of the noise: of the sampler's steps, and of the initial latent.
STREAM_STEP, STREAM_INITIAL = 0, 1
MOMENTS_TILE = 1024  # elements that `moments` adds first


def _polynomial(coefficients: dict[int, str]) -> dict[int, float]:
    return {power: float.fromhex(digits) for power, digits in coefficients.items()}


# Coefficients by power, the highest first. experiments/fit_polynomials.py finds them again.
# ln(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1)
LOG = _polynomial({
    8: "-0x1.9dfa74p-4", 7: "0x1.4c3d0ap-3", 6: "-0x1.614c08p-3", 5: "0x1.978e2ep-3",
    4: "-0x1.ff623cp-3", 3: "0x1.5559dcp-2", 2: "-0x1.00007ap-1", 1: "0x1.fffffep-1",
})  # fmt: skip
# sin(a) and cos(a), a in [-pi/4, pi/4)
SIN = _polynomial({7: "-0x1.9943e0p-13", 5: "0x1.11073ap-7", 3: "-0x1.555546p-3", 1: "0x1.0p+0"})
COS = _polynomial({6: "-0x1.644d62p-10", 4: "0x1.553e80p-5", 2: "-0x1.ffffb2p-2", 0: "0x1.0p+0"})
# exp(r), r in [-ln(2)/2, ln(2)/2]
EXP = _polynomial({
    5: "0x1.0fa834p-7", 4: "0x1.573a54p-5", 3: "0x1.555a6ap-3", 2: "0x1.fffdc6p-2", 1: "0x1.fffff6p-1", 0: "0x1.0p+0",
})  # fmt: skip
POLYNOMIALS = {"LOG": LOG, "SIN": SIN, "COS": COS, "EXP": EXP}
# How an argument is led to a polynomial's interval, float32 too.
LN2 = float.fromhex("0x1.62e430p-1")
TURN = float.fromhex("0x1.921fb6p-30")  # 2*pi/2^32
LOG2_E = float.fromhex("0x1.715476p+0")
LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e400p-1"), float.fromhex("0x1.7f7d1cp-20")  # their sum is ln(2)
EXP_LEAST, EXP_MOST = -87.0, 88.0  # exp's argument is held to these
MAGIC = float.fromhex("0x1.8p+23")  # adding it rounds to an integer, which the sum's low bits then hold
SQRT_HALF_BITS = 0x3F3504F3  # of sqrt(1/2), as a float32
SCALARS = {
    "LN2": LN2, "TURN": TURN, "LOG2_E": LOG2_E, "LN2_HIGH": LN2_HIGH, "LN2_LOW": LN2_LOW,
    "EXP_LEAST": EXP_LEAST, "EXP_MOST": EXP_MOST, "MAGIC": MAGIC,
}  # fmt: skip

# ---- the schemas, as torch.library reads them ----

_FIRST, *_OTHERS = [f"Tensor {name}" for name in REQUIRED]
_INPUTS = ", ".join([*_OTHERS, *(f"Tensor? {name}=None" for name in OPTIONAL)])
_OUTPUTS = ", ".join(f"Tensor({letter}!)? {name}=None" for letter, name in zip("bcd", OUTPUTS[1:], strict=True))
SCHEMAS = (
    f"step({_FIRST}, {_INPUTS}) -> Tensor",
    f"step_m0({_FIRST}, {_INPUTS}) -> (Tensor, Tensor)",
    f"step_y({_FIRST}, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    # As step without its optional inputs: to find them absent takes a quarter of the host time of a step of a small latent.
    f"step_plain({', '.join([_FIRST, *_OTHERS])}) -> Tensor",
    f"step_out({_FIRST}, {_INPUTS}, *, Tensor(a!) out, {_OUTPUTS}) -> ()",
    f"step_(Tensor(a!) x, {_INPUTS}, *, {_OUTPUTS}) -> ()",
    "moments(Tensor f, Tensor? u=None, Tensor? rows=None, Tensor? index=None) -> Tensor",
    f"normal(Tensor seeds, SymInt[] shape, ScalarType dtype, int draw=0, int stream={STREAM_INITIAL}) -> Tensor",
)


def cpp_header() -> str:
    """All of this as C++. Coefficients are named by their powers: LOG_8, ..., LOG_1; STEP_REQUIRED(DO) is DO(x) DO(f) ..."""
    terms = ", ".join(f"TERM_{name} = {bit}" for name, bit in TERMS.items())
    floats = {
        f"{name}_{power}": value for name, polynomial in POLYNOMIALS.items() for power, value in polynomial.items()
    }
    floats |= SCALARS
    schemas = ",\n".join(f'  R"({schema})"' for schema in SCHEMAS)
    return f"""// Printed by epskernels/spec.py, which says what is what.
#pragma once

#include <cstdint>

namespace epskernels {{

struct StepRow {{
  float {", ".join(COLUMNS)};
}};
struct BandRow {{  // behind a StepRow, where rows are so wide
  float {", ".join(BAND_COLUMNS)};
}};
constexpr int ROW_COLUMNS = {ROW_WIDTHS[0]}, WIDE_ROW_COLUMNS = {ROW_WIDTHS[1]};
enum StepTerm : unsigned {{ {terms} }};
constexpr unsigned COMMON_TERMS = {COMMON_TERMS};

constexpr uint32_t STREAM_STEP = {STREAM_STEP}, STREAM_INITIAL = {STREAM_INITIAL};
constexpr int64_t MOMENTS_TILE = {MOMENTS_TILE};
constexpr uint32_t SQRT_HALF_BITS = {SQRT_HALF_BITS:#x};
constexpr float {", ".join(f"{name} = {value.hex()}f" for name, value in floats.items())};

constexpr const char* SCHEMAS[] = {{
{schemas}
}};

}}  // namespace epskernels

#define STEP_REQUIRED(DO) {" ".join(f"DO({name})" for name in REQUIRED)}
#define STEP_OPTIONAL(DO) {" ".join(f"DO({name})" for name in OPTIONAL)}
#define STEP_PARAMETERS {", ".join([f"Tensor {name}" for name in REQUIRED] + [f"OptionalTensor {name}" for name in OPTIONAL])}
#define STEP_ARGUMENTS {", ".join(INPUTS)}
"""


if __name__ == "__main__":
    print(cpp_header(), end="")
