// The CPU kernel's interface: plain pointers, no torch. step_cpu.cpp is compiled once per instruction set.
#pragma once

#include "batch.h"
#include "step.h"

namespace epskernels {

struct Sample {
  const StepRow* row;
  unsigned terms;  // asked for by the row and present
  uint64_t seed;
};

struct StepCall {
  StepOperands operands;
  const Sample* samples;
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
