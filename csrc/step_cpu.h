// The CPU kernel's interface: raw pointers, no torch. step_cpu.cpp is compiled once per instruction set.
#pragma once

#include "batch.h"
#include "step.h"

namespace epskernels {

struct Sample {
  const StepRow* row;
  unsigned terms;  // asked for by the row and present
  uint64_t seed;
  float rescale = 1.0f, threshold = 1.0f;
};

struct StepCall {
  StepOperands operands;
  const Sample* samples;
  bool stream;  // out goes past the caches: it is larger than they are
};

constexpr int64_t TILE = MOMENTS_TILE;  // elements worked on at a time: every buffer of a tile stays in the first cache

// Halves are added until one is left: an order that any number of lanes can keep. Mirrors ops/reference.py::tree_sum.
static inline double tree_sum(double* values, int64_t size) {
  while (size > 1) {
    size /= 2;
    for (int64_t i = 0; i < size; ++i) values[i] = values[i] + values[i + size];
  }
  return values[0];
}

struct CpuKernels {
  const char* name;
  // Elements [begin, end) of one sample, begin a multiple of TILE.
  void (*step)(const StepCall& call, int64_t sample, int64_t begin, int64_t end);
  // Of elements [begin, begin + count) of a sample, count at most TILE: the sums of f and f^2 and, with u, of the guided output and
  // its square, where the sample's first `guided` elements are guided.
  void (*moments)(const MomentsOperands& operands, int64_t sample, float g, int64_t guided, int64_t begin, int64_t count,
                  double* sums);
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
