// Sums over each sample on an NVIDIA GPU, in the order of ops/reference.py::tree_sum: a warp takes a tile of 1,024 elements, then
// a warp takes the sums of a sample's tiles. Two launches; three for samples of over a million elements.
#include "halves.h"
#include "launch_cuda.h"
#include "step_cuda.h"

namespace epskernels {
namespace {

constexpr int WARP = 32;
constexpr int64_t TILE = MOMENTS_TILE;  // of sums too
constexpr int OF_LANE = TILE / WARP;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ __forceinline__ int64_t warp() { return blockIdx.x * int64_t{THREADS / WARP} + threadIdx.x / WARP; }

struct Sums {
  double value, square;
};

__device__ __forceinline__ double plus(double a, double b) { return a + b; }
__device__ __forceinline__ Sums plus(const Sums& a, const Sums& b) { return {a.value + b.value, a.square + b.square}; }

// Of value(FIRST), value(FIRST + STEP), ...: halves are added until one is left.
template <int COUNT, int FIRST = 0, int STEP = 1, typename Value>
__device__ __forceinline__ auto tree_sum(const Value& value) {
  if constexpr (COUNT == 1) return value(FIRST);
  else return plus(tree_sum<COUNT / 2, FIRST, 2 * STEP>(value), tree_sum<COUNT / 2, FIRST + STEP, 2 * STEP>(value));
}

// Of a value of each lane, likewise: in the first.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int half = WARP / 2; half > 0; half /= 2) value = value + __shfl_down_sync(0xffffffffu, value, half);
  return value;
}

template <Dtype dtype>
__device__ __forceinline__ float element(const char* data, int64_t i) {
  if constexpr (dtype == Dtype::float32) return reinterpret_cast<const float*>(data)[i];
  const uint16_t half = reinterpret_cast<const uint16_t*>(data)[i];
  return dtype == Dtype::float16 ? widen_float16(half) : widen_bfloat16(half);
}

// This lane's elements of a tile: every 32nd of the sample's, 0 beyond its end.
template <Dtype dtype>
__device__ __forceinline__ void load(float (&values)[OF_LANE], const Batch& tensor, int64_t sample, int64_t begin, int64_t left) {
  const char* data = tensor.data + sample * tensor.stride;
  begin += lane();
  left -= lane();
#pragma unroll
  for (int k = 0; k < OF_LANE; ++k) values[k] = k * WARP < left ? element<dtype>(data, begin + k * WARP) : 0.0f;
}

__device__ __forceinline__ void store_sums(const float (&values)[OF_LANE], double* target, int64_t stride) {
  const Sums sums = tree_sum<OF_LANE>([&values](int k) {
    const double value = values[k];
    return Sums{value, value * value};  // a float32's square is exact
  });
  const double value = warp_sum(sums.value), square = warp_sum(sums.square);
  if (lane() > 0) return;
  target[0] = value;
  target[stride] = square;
}

// A sample whose index is out of range, or whose row cannot be applied, has NaN for the sums of fhat.
template <Dtype dtype, bool guided>
__global__ void __launch_bounds__(THREADS) tiles_kernel(const MomentsParameters p) {
  const MomentsOperands& a = p.operands;
  const int64_t sample = layer_of_block(), tile = warp(), begin = tile * TILE, left = a.sample_numel - begin;
  if (sample >= a.batch || tile >= p.tiles) return;
  double* const target = p.of_tiles + sample * (guided ? 4 : 2) * p.tiles + tile;
  float f[OF_LANE], u[OF_LANE];
  load<dtype>(f, a.f, sample, begin, left);
  if constexpr (guided) load<dtype>(u, a.u, sample, begin, left);
  store_sums(f, target, p.tiles);
  if constexpr (guided) {
    const int64_t index = p.index.data[sample * p.index.stride];
    StepRow row{};
    bool good = index >= 0 && index < p.row_count;
    if (good) {
      row.g = p.rows[index * p.row_stride + offsetof(StepRow, g) / sizeof(float)];
      row.guided_channels = p.rows[index * p.row_stride + offsetof(StepRow, guided_channels) / sizeof(float)];
      good = valid_count(row.guided_channels);
    }
    if (!good) row.g = NAN, row.guided_channels = 0.0f;
    const int64_t guided_left = row.g != 1.0f ? guided_numel(row, a.sample_numel, a.channel_numel) - begin - lane() : 0;
#pragma unroll
    for (int k = 0; k < OF_LANE; ++k) f[k] = guided_value(row.g, f[k], u[k], k * WARP < guided_left ? ~0u : 0u);
    store_sums(f, target + 2 * p.tiles, p.tiles);
  }
}

// Rows of sums to shorter ones: of a row's `padded`, of which `count` are there and the others 0, those that lie `groups` apart are
// added. What halves are left, the next level adds.
struct Level {
  const double* from;
  double* to;
  int64_t rows, count, padded, groups;
};

int64_t padded(int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  return size;
}

int64_t groups_of(int64_t padded) { return padded > TILE ? padded / TILE : 1; }

__global__ void __launch_bounds__(THREADS) level_kernel(const Level level) {
  const int64_t row = layer_of_block(), first = warp();
  if (row >= level.rows || first >= level.groups) return;
  const double* from = level.from + row * level.count;
  const double sum = warp_sum(tree_sum<OF_LANE>([&](int k) {
    const int64_t i = first + level.groups * (lane() + k * WARP);
    return i < level.count ? from[i] : i < level.padded ? 0.0 : -0.0;  // which adds nothing, to a -0 either
  }));
  if (lane() == 0) level.to[row * level.groups + first] = sum;
}

int64_t blocks(int64_t warps) { return (warps + THREADS / WARP - 1) / (THREADS / WARP); }

template <Dtype dtype>
const char* launch_tiles(const MomentsParameters& p, void* stream) {
  const auto kernel = p.operands.u.data ? &tiles_kernel<dtype, true> : &tiles_kernel<dtype, false>;
  return launch(kernel, p, blocks(p.tiles), p.operands.batch, stream);
}

const char* launch_tiles(const MomentsParameters& p, void* stream) {
  switch (p.operands.dtype) {
    case Dtype::float32: return launch_tiles<Dtype::float32>(p, stream);
    case Dtype::float16: return launch_tiles<Dtype::float16>(p, stream);
    default: return launch_tiles<Dtype::bfloat16>(p, stream);
  }
}

}  // namespace

int64_t moments_workspace(int64_t rows, int64_t tiles) {
  int64_t size = 0;
  for (int64_t count = tiles; count > 1; count = groups_of(padded(count))) size += rows * count;
  return size;
}

const char* launch_moments(const MomentsParameters& p, void* stream) {
  const int64_t rows = p.operands.batch * (p.operands.u.data ? 4 : 2);
  const char* error = launch_tiles(p, stream);
  double* from = p.of_tiles;
  for (int64_t count = p.tiles; count > 1 && !error; count = groups_of(padded(count))) {
    const int64_t groups = groups_of(padded(count));
    double* const to = groups > 1 ? from + rows * count : p.sums;
    error = launch(&level_kernel, Level{from, to, rows, count, padded(count), groups}, blocks(groups), rows, stream);
    from = to;
  }
  return error;
}

}  // namespace epskernels
