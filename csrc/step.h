// One row of a sampler's table, applied to one element: the only C++ copy of the formula, host and device.
//
//   fhat = u + g*(f - u)
//   m0   = clamp(d_x*x + d_f*fhat, -clip, clip)
//   x'   = c_x*x + c_f*fhat + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_grad*(s^2*grad) + c_noise*(s*z)
//   s    = exp((frac*logvar_max + (1 - frac)*logvar_min)/2), frac = (v + 1)/2; 1 without v
//
// float32, every operation rounded once, left to right, never fused. A term is left out, not multiplied by zero, where its
// tensor is absent or its coefficient idle (zero; for g, one; for v, both bounds zero). c_x and c_m0 have no such rule.
// Mirrors epskernels/step_reference.py::step_reference.
#pragma once

#include "philox.h"

namespace epskernels {

// The order of the columns; epskernels/table.py::COLUMNS is the same list.
struct StepRow {
  float d_x, d_f, clip, g;
  float c_x, c_f, c_m0, c_m1, c_m2, c_grad, c_noise;
  float logvar_min, logvar_max;
  float draw;     // an integer: the noise of this row, wherever the row stands
  float t, c_in;  // what the caller feeds the model; the kernel does not use them
};
constexpr int ROW_COLUMNS = 16;
static_assert(sizeof(StepRow) == ROW_COLUMNS * sizeof(float));

enum StepTerm : unsigned {
  TERM_GUIDANCE = 1,
  TERM_CLIP = 2,
  TERM_F = 4,
  TERM_M1 = 8,
  TERM_M2 = 16,
  TERM_GRAD = 32,
  TERM_NOISE = 64,
  TERM_VARIANCE = 128,
};
constexpr unsigned STEP_VALUE_TERMS = 128;  // combinations that step_value tells apart: all but TERM_VARIANCE

// The terms that the row asks for; one that needs a tensor is computed where the tensor is present as well.
HOST_DEVICE unsigned row_terms(const StepRow& row) {
  unsigned terms = 0;
  if (row.g != 1.0f) terms |= TERM_GUIDANCE;
  if (!(row.clip == INFINITY)) terms |= TERM_CLIP;
  if (row.c_f != 0.0f) terms |= TERM_F;
  if (row.c_m1 != 0.0f) terms |= TERM_M1;
  if (row.c_m2 != 0.0f) terms |= TERM_M2;
  if (row.c_grad != 0.0f) terms |= TERM_GRAD;
  if (row.c_noise != 0.0f) terms |= TERM_NOISE;
  if (row.logvar_min != 0.0f || row.logvar_max != 0.0f) terms |= TERM_VARIANCE;
  return terms;
}

// At least 0, and not the negative zero: bounds of [-clip, clip] that are zeros have the signs that one expects.
HOST_DEVICE bool valid_clip(float clip) { return bits_from_float(clip) <= 0x7f800000u; }

HOST_DEVICE bool valid_draw(float draw) {
  return draw >= 0.0f && draw < 0x1p24f && draw == static_cast<float>(static_cast<int32_t>(draw));
}

// s, the standard deviation that the model has learned, from v.
HOST_DEVICE float learned_sigma(const StepRow& row, float v) {
  const float frac = (v + 1.0f) * 0.5f;
  const float logvar = frac * row.logvar_max + (1.0f - frac) * row.logvar_min;
  return exp_poly(0.5f * logvar);
}

// To [-clip, clip]; NaN stays NaN, and -0 stays -0.
HOST_DEVICE float clamp(float value, float clip) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(value), "f"(-clip));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(value), "f"(clip));
  return value;
#else
  value = select(value < -clip, -clip, value);
  return select(value > clip, clip, value);
#endif
}

struct StepInputs {
  float x, f, u, m1, m2;
  float grad, z;  // with learned variance, s^2*grad and s*z
};

HOST_DEVICE float step_value(const StepRow& row, unsigned terms, const StepInputs& in, float& m0) {
  float fhat = in.f;
  if (terms & TERM_GUIDANCE) fhat = in.u + row.g * (in.f - in.u);

  m0 = row.d_x * in.x + row.d_f * fhat;
  if (terms & TERM_CLIP) m0 = clamp(m0, row.clip);

  float next = row.c_x * in.x;
  if (terms & TERM_F) next = next + row.c_f * fhat;
  next = next + row.c_m0 * m0;
  if (terms & TERM_M1) next = next + row.c_m1 * in.m1;
  if (terms & TERM_M2) next = next + row.c_m2 * in.m2;
  if (terms & TERM_GRAD) next = next + row.c_grad * in.grad;
  if (terms & TERM_NOISE) next = next + row.c_noise * in.z;
  return next;
}

}  // namespace epskernels
