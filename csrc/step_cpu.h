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

// A sample's elements, in order, in strips of whole blocks of a band: some planes, or some pairs of image rows of one.
struct Strips {
  int64_t plane, numel, length, of_plane, count;

  explicit Strips(const StepOperands& a) : plane(a.height * a.width), numel(a.sample_numel) {
    const int64_t pair = a.height > 1 ? 2 * a.width : 2;
    const bool small = plane <= TILE;
    length = small ? TILE / plane * plane : TILE > pair ? TILE / pair * pair : pair;
    of_plane = small ? 0 : (plane + length - 1) / length;
    count = small ? (numel + length - 1) / length : numel / plane * of_plane;
  }
  int64_t begin(int64_t i) const { return of_plane ? i / of_plane * plane + i % of_plane * length : i * length; }
  int64_t end(int64_t i) const {
    const int64_t limit = of_plane ? (i / of_plane + 1) * plane : numel, end = begin(i) + length;
    return end < limit ? end : limit;
  }
};

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
  // Strips [first, last) of one sample, some of whose batch correct a band.
  void (*step_by_band)(const StepCall& call, int64_t sample, const Strips& strips, int64_t first, int64_t last);
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
