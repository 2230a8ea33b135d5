// torch.ops.epskernels.* on the CPU: shares the tiles of all samples out over torch's threads.
#include <torch/csrc/stable/ops.h>

#include "cpu_capability.h"
#include "ops.h"
#include "rows.h"

namespace epskernels {
namespace {

// Elements that are worth a thread of their own.
constexpr int64_t GRAIN_STEP = 32768, GRAIN_NOISE = 4096;

struct Cpu {
  struct Rows {
    std::vector<Sample> samples;
    bool draws;  // some sample makes its noise in the kernel
  };

  static Rows read_rows(const StepArguments&, const StepViews& a) {
    Rows rows;
    rows.draws = epskernels::read_rows(a, rows.samples);
    return rows;
  }

  static void run(const StepOperands& operands, const Rows& rows) {
    const CpuKernels& kernels = cpu_kernels();
    const StepCall call{operands, rows.samples.data()};
    const int64_t numel = operands.sample_numel, tiles = (numel + TILE - 1) / TILE;
    const int64_t grain = std::max<int64_t>(1, (rows.draws ? GRAIN_NOISE : GRAIN_STEP) / std::min(TILE, numel));
    torch::stable::parallel_for(0, operands.batch * tiles, grain, [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t sample = first / tiles, tile = first % tiles;
        const int64_t count = std::min(last - first, tiles - tile);
        kernels.step(call, sample, tile * TILE, std::min((tile + count) * TILE, numel));
        first += count;
      }
    });
  }

  static void normal(const NormalOperands& a, const View& seeds) {
    const CpuKernels& kernels = cpu_kernels();
    const int64_t numel = a.sample_numel, tiles = (numel + TILE - 1) / TILE;
    const int64_t grain = std::max<int64_t>(1, GRAIN_NOISE / std::min(TILE, numel));
    torch::stable::parallel_for(0, a.batch * tiles, grain, [&](int64_t first, int64_t last) {
      for (; first < last; ++first) {
        const int64_t sample = first / tiles, begin = first % tiles * TILE;
        kernels.normal(static_cast<uint64_t>(integer_at(seeds, sample)), a.draw, a.stream, a.dtype,
                       a.out + (sample * numel + begin) * size_of(a.dtype), begin, std::min(begin + TILE, numel));
      }
    });
  }
};

}  // namespace
}  // namespace epskernels

STABLE_TORCH_LIBRARY_IMPL(epskernels, CPU, library) { epskernels::Ops<epskernels::Cpu>::register_all(library); }
