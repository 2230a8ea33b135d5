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

// (B, 2), or (B, 4) with u: see step_reference.py::moments_reference.
Tensor moments(Tensor f_tensor, OptionalTensor u_tensor, OptionalTensor rows_tensor, OptionalTensor index_tensor) {
  const View f("f", f_tensor), u = optional_view("u", u_tensor);
  float_dtype(f);
  if (f.dim < 1 || f.numel() == 0) fail("f: expected shape (B, ...) with at least one element, got ", f.shape());
  if (bool(u_tensor) != bool(rows_tensor) || bool(u_tensor) != bool(index_tensor))
    fail("u, rows, index: expected all of them, or none");
  const int64_t batch = f.sizes[0], numel = f.numel() / batch, sums = u ? 4 : 2;
  const int64_t channel_numel = f.dim > 1 ? numel / f.sizes[1] : 1;
  std::vector<std::pair<float, int64_t>> guidance(batch, {1.0f, numel});
  if (u) {
    const View rows("rows", *rows_tensor), index("index", *index_tensor);
    for (const View* view : {&u, &rows, &index}) check_device(*view, f);
    check_like(u, f);
    check_rows(rows);
    check_integers(index, true, batch);
    for (int64_t b = 0; b < batch; ++b) {
      const StepRow& row = row_at(rows, integer_at(index, b));
      check_row(row, integer_at(index, b));
      guidance[b] = {row.g, guided_numel(row, numel, channel_numel)};
    }
  }

  Layouts layouts;
  const MomentsOperands operands{float_dtype(f), layouts.input(f, f_tensor), layouts.input(u, u_tensor)};
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tiles = (numel + TILE - 1) / TILE;
  int64_t padded = 1;
  while (padded < tiles) padded *= 2;
  std::vector<double> partial(batch * padded * sums, 0.0);  // of each sample's tiles, the same sum of all of them side by side
  torch::stable::parallel_for(0, batch * tiles, std::max<int64_t>(1, GRAIN_STEP / std::min(TILE, numel)), [&](int64_t first, int64_t last) {
    for (; first < last; ++first) {
      const int64_t sample = first / tiles, tile = first % tiles, begin = tile * TILE;
      double of_tile[4];
      kernels.moments(operands, sample, guidance[sample].first, guidance[sample].second, begin, std::min(TILE, numel - begin), of_tile);
      for (int64_t sum = 0; sum < sums; ++sum) partial[(sample * sums + sum) * padded + tile] = of_tile[sum];
    }
  });
  Tensor out = torch::stable::new_empty(f_tensor, {batch, sums}, ScalarType::Double);
  double* result = static_cast<double*>(out.data_ptr());
  for (int64_t i = 0; i < batch * sums; ++i) result[i] = tree_sum(partial.data() + i * padded, padded);
  return out;
}

}  // namespace

bool& schemas_defined() {
  static bool defined = false;
  return defined;
}

}  // namespace epskernels

STABLE_TORCH_LIBRARY_IMPL(epskernels, CPU, library) {
  epskernels::Ops<epskernels::Cpu>::register_all(library);
  library.impl("moments", TORCH_BOX(&epskernels::moments));
}
