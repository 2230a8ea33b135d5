// log, sin, cos and exp as polynomials of + and * alone: part of the specification, the same bits wherever they run.
// The coefficients are those of epskernels/spec.py. Mirrors epskernels/ops/reference.py. Relative error of each below 2^-21.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "spec.h"

namespace epskernels {

HOST_DEVICE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HOST_DEVICE uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

HOST_DEVICE float select(bool condition, float yes, float no) { return condition ? yes : no; }

// -2*ln(u) for normal u in (0, 1]: u = m * 2^e with m in [sqrt(1/2), sqrt(2)), ln(u) = e*ln(2) + ln(1 + (m - 1)). The factor
// -2 is in the coefficients, where it costs nothing: a power of two changes no rounding. reference.py and triton_kernels.py
// have log_poly, and multiply what it returns.
HOST_DEVICE float minus_two_log(float u) {
  const uint32_t bits = bits_from_float(u);
  const int32_t e = static_cast<int32_t>(bits - SQRT_HALF_BITS) >> 23;
  const float f = float_from_bits(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = -2.0f * LOG_8;
  p = p * f + -2.0f * LOG_7;
  p = p * f + -2.0f * LOG_6;
  p = p * f + -2.0f * LOG_5;
  p = p * f + -2.0f * LOG_4;
  p = p * f + -2.0f * LOG_3;
  p = p * f + -2.0f * LOG_2;
  p = p * f + -2.0f * LOG_1;
  return static_cast<float>(e) * (-2.0f * LN2) + p * f;
}

HOST_DEVICE void swap_if_bit(uint32_t word, uint32_t bit, float& a, float& b) {
#if defined(__CUDA_ARCH__)
  // Kept as a test of the bit: the compiler would shift it down first.
  asm("{ .reg .pred set; .reg .b32 masked; .reg .f32 kept; and.b32 masked, %2, %3; setp.ne.u32 set, masked, 0; mov.f32 kept, %0;"
      " selp.f32 %0, %1, %0, set; selp.f32 %1, kept, %1, set; }"
      : "+f"(a), "+f"(b)
      : "r"(word), "r"(bit));
#else
  const float first = a;
  a = select((word & bit) != 0, b, a);
  b = select((word & bit) != 0, first, b);
#endif
}

// cos and sin of 2*pi*turn/2^32. The quadrant is split off as an integer; the rest, turn's low 30 bits with their sign, lies in
// [-pi/4, pi/4).
HOST_DEVICE void cos_sin_poly(uint32_t turn, float& cosine, float& sine) {
  const uint32_t quadrant = turn + 0x20000000u;  // in its two high bits
  const float a = static_cast<float>(static_cast<int32_t>(turn << 2)) * (TURN / 4.0f);
  const float a2 = a * a;
  float s = SIN_7;
  s = s * a2 + SIN_5;
  s = s * a2 + SIN_3;
  s = s * a2 + SIN_1;
  s = s * a;
  float c = COS_6;
  c = c * a2 + COS_4;
  c = c * a2 + COS_2;
  c = c * a2 + COS_0;
  swap_if_bit(quadrant, 0x40000000u, c, s);
  cosine = float_from_bits(bits_from_float(c) ^ ((quadrant + 0x40000000u) & 0x80000000u));
  sine = float_from_bits(bits_from_float(s) ^ (quadrant & 0x80000000u));
}

// exp(y), y held to [EXP_LEAST, EXP_MOST]; exp(0) is 1 exactly; NaN passes through.
HOST_DEVICE float exp_poly(float y) {
  y = select(y < EXP_LEAST, EXP_LEAST, y);
  y = select(y > EXP_MOST, EXP_MOST, y);
  const float rounded = y * LOG2_E + MAGIC;  // to an integer, which its low bits then hold
  const float k = rounded - MAGIC;
  const float r = (y - k * LN2_HIGH) - k * LN2_LOW;
  float p = EXP_5;
  p = p * r + EXP_4;
  p = p * r + EXP_3;
  p = p * r + EXP_2;
  p = p * r + EXP_1;
  p = p * r + EXP_0;
  const uint32_t exponent = bits_from_float(rounded) - bits_from_float(MAGIC) + 127u;
  return p * float_from_bits(exponent << 23);
}

}  // namespace epskernels
