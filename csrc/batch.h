// Tensors as the kernels see them: raw pointers, no torch.
#pragma once

#include <cstdint>

namespace epskernels {

enum class Dtype : int { float32, float16, bfloat16 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// A tensor whose samples are contiguous, at any distance from each other; absent without data.
struct Batch {
  char* data = nullptr;
  int64_t stride = 0;  // bytes from one sample to the next
};

struct StepOperands {
  Dtype x_dtype, f_dtype;                    // of x, m1, m2, y, grad, noise, out, m0, y_out; of f, u, v, model_input
  Batch x, f, u, m1, m2, y, v, grad, noise;  // without noise, a sample's seed makes it
  Batch out, m0, y_out, model_input;         // all but out may be absent
  bool out_is_new = false;                   // its pages may not be there yet
  bool doubled = false;                      // model_input has a second half, of `batch` samples more
  int64_t batch, sample_numel, channel_numel;
  int band_dims = 0;              // in how many of a sample's last dimensions rows may correct a band; 0 where they cannot
  int64_t height = 1, width = 1;  // of the planes whose bands they are
  int64_t guided_period;  // elements after which channels begin anew: a sample's, where a batch is taken for one long sample too
};

struct MomentsOperands {
  Dtype dtype;
  Batch f, u;  // u may be absent
  int64_t batch, sample_numel, channel_numel;
};

struct NormalOperands {
  Dtype dtype;
  char* out;  // contiguous
  uint32_t draw, stream;
  int64_t batch, sample_numel;
};

}  // namespace epskernels
