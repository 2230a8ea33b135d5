// log, sin, cos and exp as polynomials of + and * alone: part of the specification, the same bits wherever they run.
// Mirrors epskernels/ops/reference.py. Relative error of each below 2^-21.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

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

// ln(u) for normal u in (0, 1]: u = m * 2^e with m in [sqrt(1/2), sqrt(2)), ln(u) = e*ln(2) + ln(1 + (m - 1)).
HOST_DEVICE float log_poly(float u) {
  const uint32_t bits = bits_from_float(u);
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = float_from_bits(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = -0x1.9dfa74p-4f;
  p = p * f + 0x1.4c3d0ap-3f;
  p = p * f + -0x1.614c08p-3f;
  p = p * f + 0x1.978e2ep-3f;
  p = p * f + -0x1.ff623cp-3f;
  p = p * f + 0x1.5559dcp-2f;
  p = p * f + -0x1.00007ap-1f;
  p = p * f + 0x1.fffffep-1f;
  return static_cast<float>(e) * 0x1.62e430p-1f + p * f;
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
  const float a = static_cast<float>(static_cast<int32_t>(turn << 2)) * 0x1.921fb6p-32f;
  const float a2 = a * a;
  float s = -0x1.9943e0p-13f;
  s = s * a2 + 0x1.11073ap-7f;
  s = s * a2 + -0x1.555546p-3f;
  s = s * a2 + 1.0f;
  s = s * a;
  float c = -0x1.644d62p-10f;
  c = c * a2 + 0x1.553e80p-5f;
  c = c * a2 + -0x1.ffffb2p-2f;
  c = c * a2 + 1.0f;
  swap_if_bit(quadrant, 0x40000000u, c, s);
  cosine = float_from_bits(bits_from_float(c) ^ ((quadrant + 0x40000000u) & 0x80000000u));
  sine = float_from_bits(bits_from_float(s) ^ (quadrant & 0x80000000u));
}

// exp(y), y held to [-87, 88]; exp(0) is 1 exactly; NaN passes through.
HOST_DEVICE float exp_poly(float y) {
  y = select(y < -87.0f, -87.0f, y);
  y = select(y > 88.0f, 88.0f, y);
  const float magic = 0x1.8p+23f;  // adding it rounds to an integer, which its low bits then hold
  const float rounded = y * 0x1.715476p+0f + magic;
  const float k = rounded - magic;
  const float r = (y - k * 0x1.62e400p-1f) - k * 0x1.7f7d1cp-20f;
  float p = 0x1.0fa834p-7f;
  p = p * r + 0x1.573a54p-5f;
  p = p * r + 0x1.555a6ap-3f;
  p = p * r + 0x1.fffdc6p-2f;
  p = p * r + 0x1.fffff6p-1f;
  p = p * r + 1.0f;
  const uint32_t exponent = bits_from_float(rounded) - bits_from_float(magic) + 127u;
  return p * float_from_bits(exponent << 23);
}

}  // namespace epskernels
