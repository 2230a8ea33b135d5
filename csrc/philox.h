// Noise: Philox4x32-10 words (Salmon et al., SC 2011), Box-Muller normals.
// Key: the sample's 64-bit seed. Counter: (element / 4 low word, high word, draw, stream); each counter gives four normals.
// Mirrors epskernels/ops/reference.py::philox and ::normal_reference.
#pragma once

#include <cmath>

#include "polynomials.h"

namespace epskernels {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// The whole product of two words.
HOST_DEVICE void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  // As one instruction; from 64-bit C++ the compiler makes two.
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%1, %0}, product; }"
      : "=r"(high), "=r"(low) : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}

// Of COUNT counters of one key, whose rounds share its words.
template <int COUNT>
HOST_DEVICE void philox(PhiloxWords (&counters)[COUNT], uint32_t key0, uint32_t key1) {
  UNROLL
  for (int round = 0; round < 10; ++round) {
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
      PhiloxWords& counter = counters[i];
      uint32_t high0, low0, high1, low1;
      multiply(0xD2511F53u, counter.w0, high0, low0);
      multiply(0xCD9E8D57u, counter.w2, high1, low1);
      counter = {high1 ^ counter.w1 ^ key0, low1, high0 ^ counter.w3 ^ key1, low0};
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

HOST_DEVICE PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  PhiloxWords counters[1] = {counter};
  philox(counters, key0, key1);
  return counters[0];
}

// The correctly rounded square root of zero, of either sign, or of a number in [2^-100, 2^100].
HOST_DEVICE float sqrt_rounded(float value) {
#if defined(__CUDA_ARCH__)
  // What __fsqrt_rn does for such numbers, without its branch to the others: one step of Newton's after the approximation
  // is exact here. The minimum turns the infinity of a zero into a number, whose product with that zero is the zero.
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(value));
  reciprocal = fminf(fabsf(reciprocal), 0x1.fffffep+127f);
  const float root = __fmul_rn(value, reciprocal);
  return __fmaf_rn(__fmaf_rn(-root, root, value), __fmul_rn(0.5f, reciprocal), root);
#else
  return std::sqrt(value);
#endif
}

// (word + 1/2)/2^32. The product is exact, so that a fused sum rounds as two operations do.
HOST_DEVICE float uniform(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(static_cast<float>(word), 0x1p-32f, 0x1p-33f);
#else
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
#endif
}

// Two standard normals from two words: radius sqrt(-2 ln u) with u = (w + 1/2) / 2^32, angle 2*pi*w'/2^32.
HOST_DEVICE void box_muller(uint32_t radius_word, uint32_t angle_word, float& z0, float& z1) {
  const float radius = sqrt_rounded(minus_two_log(uniform(radius_word)));
  float cosine, sine;
  cos_sin_poly(angle_word, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace epskernels
