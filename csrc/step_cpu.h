// The CPU kernel's interface: plain pointers, no torch. step_cpu.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "step.h"

namespace epskernels {

enum class Dtype : int { float32, float16, bfloat16 };

// A tensor whose samples are contiguous, at any distance from each other.
struct Batch {
  char* data = nullptr;
  int64_t stride = 0;  // bytes from one sample to the next
};

struct Sample {
  const StepRow* row;
  unsigned terms;  // asked for by the row and present
  uint64_t seed;
};

struct StepCall {
  Dtype x_dtype, f_dtype;                 // of x, m1, m2, grad, noise, out, m0; of f, u, v
  Batch x, f, u, m1, m2, v, grad, noise;  // without noise, a sample's seed makes it
  Batch out, m0;                          // m0 may be absent
  const Sample* samples;
  int64_t sample_numel;
};

constexpr int64_t TILE = 1024;  // elements worked on at a time: every buffer of a tile stays in the first cache

struct CpuKernels {
  const char* name;
  // Elements [begin, end) of one sample, begin a multiple of TILE.
  void (*step)(const StepCall& call, int64_t sample, int64_t begin, int64_t end);
  // Normals of elements [begin, end) of a sample, begin a multiple of 4, written from `out` on.
  void (*normal)(uint64_t seed, uint32_t draw, uint32_t stream, Dtype dtype, char* out, int64_t begin, int64_t end);
};

namespace generic { extern const CpuKernels kernels; }
#if defined(EPSKERNELS_X86)
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }
#endif

const CpuKernels& cpu_kernels();  // those in use: see cpu_capability.cpp

}  // namespace epskernels
