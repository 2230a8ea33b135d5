// torch.ops.epskernels.* on the CPU: shares the tiles of all samples out over torch's threads.
#include <torch/csrc/stable/ops.h>

#include "cpu_capability.h"
#include "ops.h"
#include "rows.h"
#include "schemas_defined.h"

namespace epskernels {
namespace {

// Elements that are worth a thread of their own.
constexpr int64_t GRAIN_STEP = 32768, GRAIN_NOISE = 4096;
// A state of so many bytes will not be found in a cache by whoever reads it next.
constexpr int64_t STREAM_BYTES = int64_t{1} << 25;

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
    // In place the lines are in the cache already, and a new page is there once it was cleared.
    const bool cached = operands.out_is_new || operands.out.data == operands.x.data;
    const bool stream = !cached && operands.batch * operands.sample_numel * size_of(operands.x_dtype) >= STREAM_BYTES;
    const StepCall call{operands, rows.samples.data(), stream};
    // What a thread takes at a time: a tile, or so many whole blocks of a band.
    const Strips strips(operands);
    const bool by_band = std::any_of(rows.samples.begin(), rows.samples.end(), [](const Sample& s) { return s.terms & TERM_BAND; });
    const int64_t numel = operands.sample_numel, pieces = by_band ? strips.count : (numel + TILE - 1) / TILE;
    const int64_t piece_numel = std::min(by_band ? strips.length : TILE, numel);
    const int64_t grain = std::max<int64_t>(1, (rows.draws ? GRAIN_NOISE : GRAIN_STEP) / piece_numel);
    torch::stable::parallel_for(0, operands.batch * pieces, grain, [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t sample = first / pieces, piece = first % pieces;
        const int64_t count = std::min(last - first, pieces - piece);
        if (by_band) kernels.step_by_band(call, sample, strips, piece, piece + count);
        else kernels.step(call, sample, piece * TILE, std::min((piece + count) * TILE, numel));
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

  static void moments(const MomentsOperands& a, const View& rows, const View& index, Tensor& out) {
    const int64_t numel = a.sample_numel, tiles = (numel + TILE - 1) / TILE, sums = a.u.data ? 4 : 2;
    std::vector<std::pair<float, int64_t>> guidance(a.batch, {1.0f, numel});
    for (int64_t b = 0; a.u.data && b < a.batch; ++b) {
      const StepRow& row = row_at(rows, integer_at(index, b));
      check_row(row, integer_at(index, b), rows.sizes[1]);
      guidance[b] = {row.g, guided_numel(row, numel, a.channel_numel)};
    }
    const CpuKernels& kernels = cpu_kernels();
    int64_t padded = 1;
    while (padded < tiles) padded *= 2;
    std::vector<double> of_tiles(a.batch * sums * padded, 0.0);
    const int64_t grain = std::max<int64_t>(1, GRAIN_STEP / std::min(TILE, numel));
    torch::stable::parallel_for(0, a.batch * tiles, grain, [&](int64_t first, int64_t last) {
      for (; first < last; ++first) {
        const int64_t sample = first / tiles, tile = first % tiles, begin = tile * TILE;
        const auto& [g, guided] = guidance[sample];
        double of_tile[4];
        kernels.moments(a, sample, g, guided, begin, std::min(TILE, numel - begin), of_tile);
        for (int64_t sum = 0; sum < sums; ++sum) of_tiles[(sample * sums + sum) * padded + tile] = of_tile[sum];
      }
    });
    double* result = static_cast<double*>(out.data_ptr());
    for (int64_t i = 0; i < a.batch * sums; ++i) result[i] = tree_sum(of_tiles.data() + i * padded, padded);
  }
};

}  // namespace

bool& schemas_defined() {
  static bool defined = false;
  return defined;
}

}  // namespace epskernels

// The tests register the same code, over kernels of other processors, under a name of their own.
#ifndef EPSKERNELS_LIBRARY
#define EPSKERNELS_LIBRARY epskernels
#endif
#define REGISTER(library_name) \
  STABLE_TORCH_LIBRARY_IMPL(library_name, CPU, library) { epskernels::Ops<epskernels::Cpu>::register_all(library); }
REGISTER(EPSKERNELS_LIBRARY)
