// Noise: Philox4x32-10 words (Salmon et al., SC 2011), Box-Muller normals.
// Key: the sample's 64-bit seed. Counter: (element / 4 low word, high word, draw, stream); each counter gives four normals.
// Mirrors epskernels/step_reference.py::philox and ::normal_reference.
#pragma once

#include <cmath>

#include "polynomials.h"

namespace epskernels {

constexpr uint32_t STREAM_STEP = 0;     // the noise of the sampler's steps
constexpr uint32_t STREAM_INITIAL = 1;  // the initial latent

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

HOST_DEVICE PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * counter.w0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.w2;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

HOST_DEVICE float sqrt_rounded(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return std::sqrt(value);
#endif
}

// Two standard normals from two words: radius sqrt(-2 ln u) with u = (w + 1/2) / 2^32, angle 2*pi*w'/2^32.
HOST_DEVICE void box_muller(uint32_t radius_word, uint32_t angle_word, float& z0, float& z1) {
  const float u = static_cast<float>(radius_word) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrt_rounded(-2.0f * log_poly(u));
  float cosine, sine;
  cos_sin_poly(angle_word, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace epskernels
