// One row of a sampler's table, applied to one element: the only C++ copy of the formula, host and device.
//
//   fhat = rescale*(u + g*(f - u))
//   m0   = clamp(d_x*x + d_f*fhat, -clip, clip), then clamp(m0, -threshold, threshold)/threshold
//   x'   = c_x*x + c_f*fhat + c_m0*m0 + c_m1*m1 + c_m2*m2 + c_y*y + c_grad*(s^2*grad) + c_noise*(s*z)
//   y'   = k_x*x + k_m0*m0 + k_m1*m1 + k_m2*m2 + k_y*y
//   s    = exp((frac*logvar_max + (1 - frac)*logvar_min)/2), frac = (v + 1)/2; 1 without v
//
// float32, every operation rounded once, left to right, never fused. A term is left out, not multiplied by zero, where its
// tensor is absent or its coefficient idle (zero; for g, one; for v, both bounds zero). c_x, c_m0, k_x and k_m0 have no such
// rule. Where guided_channels is not zero, the channels from that one on are not guided: fhat = rescale*f.
// A row's columns and the bits of its terms are those of epskernels/spec.py. Mirrors epskernels/ops/reference.py::step_reference.
#pragma once

#include "philox.h"

namespace epskernels {

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
  if (row.c_y != 0.0f) terms |= TERM_Y;
  if (row.k_m1 != 0.0f) terms |= TERM_K_M1;
  if (row.k_m2 != 0.0f) terms |= TERM_K_M2;
  if (row.k_y != 0.0f) terms |= TERM_K_Y;
  if ((terms & (TERM_K_M1 | TERM_K_M2 | TERM_K_Y)) || row.k_x != 0.0f || row.k_m0 != 0.0f) terms |= TERM_Y_OUT;
  if (row.guided_channels != 0.0f) terms |= TERM_CHANNELS;
  return terms;
}

// Rows of 28 columns have a BandRow behind them: x' + L(l_next*x' + l_m0*m0 + l_x*x) comes in the place of x', where L takes each
// element to the mean of its pair or 2x2 block, ((a + b) + (c + d))/4; what lies outside counts as 0.
HOST_DEVICE bool corrects_band(const BandRow& band) {
  return band.l_next != 0.0f || band.l_m0 != 0.0f || band.l_x != 0.0f;
}

// Which tensors a row's terms read: the terms that stand for the tensors in StepCall and StepParameters.
HOST_DEVICE unsigned tensor_terms(unsigned terms) {
  if (terms & TERM_K_M1) terms |= TERM_M1;
  if (terms & TERM_K_M2) terms |= TERM_M2;
  if (terms & TERM_K_Y) terms |= TERM_Y;
  return terms;
}

// At least 0, and not the negative zero: bounds of [-clip, clip] that are zeros have the signs that one expects.
HOST_DEVICE bool valid_clip(float clip) { return bits_from_float(clip) <= 0x7f800000u; }

// An integer that a float32 counts exactly: a draw, or a number of channels.
HOST_DEVICE bool valid_count(float count) {
  return count >= 0.0f && count < 0x1p24f && count == static_cast<float>(static_cast<int32_t>(count));
}

// Finite and above 0; NaN, as a sample that holds NaN has it, makes the sample NaN.
HOST_DEVICE bool valid_threshold(float threshold) { return !(threshold <= 0.0f) && threshold != INFINITY; }

// How many of a sample's elements are guided.
HOST_DEVICE int64_t guided_numel(const StepRow& row, int64_t sample_numel, int64_t channel_numel) {
  const int64_t channels = static_cast<int64_t>(row.guided_channels);
  return channels == 0 || channels >= sample_numel / channel_numel ? sample_numel : channels * channel_numel;
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

HOST_DEVICE float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

struct StepInputs {
  float x, f, u, m1, m2, y;
  float grad, z;  // with learned variance, s^2*grad and s*z
  float rescale, threshold;
  uint32_t guided = ~0u;  // all ones, or none
};

struct StepOutputs {
  float x, m0, y;
};

// A term's mask, all ones or none: of terms that the compiler knows, or on a GPU. The CPU kernel has another for terms of a row.
HOST_DEVICE uint32_t mask_of(unsigned term, unsigned terms) { return terms & term ? ~0u : 0u; }

HOST_DEVICE float choose(uint32_t mask, float yes, float no) {
#if defined(__CUDA_ARCH__)
  return mask ? yes : no;
#else
  return float_from_bits((bits_from_float(yes) & mask) | (bits_from_float(no) & ~mask));
#endif
}

HOST_DEVICE float guided_value(float g, float f, float u, uint32_t guided) { return choose(guided, u + g * (f - u), f); }

template <typename Terms>
HOST_DEVICE StepOutputs step_value(const StepRow& row, const Terms& terms, const StepInputs& in) {
  const auto add = [&terms](unsigned term, float total, float coefficient, float value) {
    return choose(mask_of(term, terms), total + coefficient * value, total);
  };
  const float guided = guided_value(row.g, in.f, in.u, mask_of(TERM_GUIDANCE, terms) & in.guided);
  const float fhat = choose(mask_of(TERM_RESCALE, terms), in.rescale * guided, guided);

  const float denoised = row.d_x * in.x + row.d_f * fhat;
  const float clipped = choose(mask_of(TERM_CLIP, terms), clamp(denoised, row.clip), denoised);
  const float m0 = choose(mask_of(TERM_THRESHOLD, terms), divide(clamp(clipped, in.threshold), in.threshold), clipped);

  float next = row.c_x * in.x;
  next = add(TERM_F, next, row.c_f, fhat);
  next = next + row.c_m0 * m0;
  next = add(TERM_M1, next, row.c_m1, in.m1);
  next = add(TERM_M2, next, row.c_m2, in.m2);
  next = add(TERM_Y, next, row.c_y, in.y);
  next = add(TERM_GRAD, next, row.c_grad, in.grad);
  next = add(TERM_NOISE, next, row.c_noise, in.z);

  float second = row.k_x * in.x;
  second = second + row.k_m0 * m0;
  second = add(TERM_K_M1, second, row.k_m1, in.m1);
  second = add(TERM_K_M2, second, row.k_m2, in.m2);
  second = add(TERM_K_Y, second, row.k_y, in.y);
  return {next, m0, second};
}

}  // namespace epskernels
