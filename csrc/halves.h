// float16 and bfloat16 to and from float32: rounded to nearest even, subnormals kept, NaN to NaN.
#pragma once

#include "polynomials.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace epskernels {

HOST_DEVICE float widen_float16(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const int32_t magnitude = half & 0x7fff;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  // Masks: below 2^-14, and infinite or NaN.
  const uint32_t small = static_cast<uint32_t>((magnitude - 0x400) >> 31), infinite = static_cast<uint32_t>((0x7bff - magnitude) >> 31);
  // What is small is read as 2^-14 more, then less: exact, and no float32 subnormal, which a processor may be told to flush.
  const uint32_t bits = (static_cast<uint32_t>(magnitude) << 13) + 0x38000000u + (small & 0x00800000u);
  const float value = float_from_bits(bits) - float_from_bits(small & 0x38800000u);
  return float_from_bits(bits_from_float(value) | (infinite & 0x7f800000u) | sign);
#endif
}

HOST_DEVICE uint16_t round_float16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_from_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the half's subnormal, rounded by the addition, in the low bits.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
#endif
}

HOST_DEVICE float widen_bfloat16(uint16_t value) { return float_from_bits(static_cast<uint32_t>(value) << 16); }

HOST_DEVICE uint16_t round_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
#endif
}

// Two numbers in one word, the first in its low half.
HOST_DEVICE uint32_t pack_float16(float low, float high) {
#if defined(__CUDA_ARCH__)
  const __half2 packed = __floats2half2_rn(low, high);
  return __half_as_ushort(packed.x) | static_cast<uint32_t>(__half_as_ushort(packed.y)) << 16;
#else
  return round_float16(low) | static_cast<uint32_t>(round_float16(high)) << 16;
#endif
}

HOST_DEVICE uint32_t pack_bfloat16(float low, float high) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(packed.x) | static_cast<uint32_t>(__bfloat16_as_ushort(packed.y)) << 16;
#else
  return round_bfloat16(low) | static_cast<uint32_t>(round_bfloat16(high)) << 16;
#endif
}

}  // namespace epskernels
