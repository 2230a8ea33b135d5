// The step on an NVIDIA GPU: each thread loads all that it needs in 16-byte words, step_value on every element, round at the
// store. One launch; the row, its index and the seed are read on the device. Compiled for the host too, by the tests.
#include "step_cuda.h"

#include "halves.h"
#include "launch_cuda.h"

namespace epskernels {
namespace {

// ---- neighbouring elements of a tensor, in its own format ----

template <Dtype dtype, int COUNT>
struct Unit {
  static constexpr bool wide = dtype == Dtype::float32;
  static constexpr int SIZE = wide ? 4 : 2, WORDS = COUNT * SIZE / 4;
  static_assert(WORDS % 4 == 0);
  uint32_t words[WORDS];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (wide) return float_from_bits(words[i]);
    const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    return dtype == Dtype::float16 ? widen_float16(half) : widen_bfloat16(half);
  }

  __device__ __forceinline__ void set(const float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (wide) words[i] = bits_from_float(values[i]);
      else if constexpr (dtype == Dtype::float16) words[i] = pack_float16(values[2 * i], values[2 * i + 1]);
      else words[i] = pack_bfloat16(values[2 * i], values[2 * i + 1]);
    }
  }

  // In 16-byte words, from such an address.
  __device__ __forceinline__ void load(const char* source) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 word = reinterpret_cast<const uint4*>(source)[i];
      words[4 * i] = word.x;
      words[4 * i + 1] = word.y;
      words[4 * i + 2] = word.z;
      words[4 * i + 3] = word.w;
    }
  }

  __device__ __forceinline__ void store(char* target) const {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i)
      reinterpret_cast<uint4*>(target)[i] =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }

  // The first `count` elements at most, one by one; count may be negative, and the address then lies beyond the sample.
  __device__ __forceinline__ void load_first(int64_t count, const char* source) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (wide) {
        words[i] = i < count ? reinterpret_cast<const uint32_t*>(source)[i] : 0;
      } else {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(source);
        const uint32_t low = 2 * i < count ? halves[2 * i] : 0, high = 2 * i + 1 < count ? halves[2 * i + 1] : 0;
        words[i] = low | high << 16;
      }
    }
  }

  __device__ __forceinline__ void store_first(int64_t count, char* target) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i >= count) continue;
      if constexpr (wide) reinterpret_cast<uint32_t*>(target)[i] = words[i];
      else reinterpret_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
};

// A block's tile of a sample, cut into units that its threads take in turn.
template <int UNIT>
struct Tile {
  int64_t sample, begin;  // the same in all threads of a block
  int64_t left;           // elements of the sample from `begin` on
  bool whole;             // all inside the sample, in 16-byte words

  __device__ __forceinline__ Tile(int units, int64_t sample_numel, bool aligned)
      : sample(layer_of_block()),
        begin(blockIdx.x * (int64_t{THREADS} * UNIT * units)),
        left(sample_numel - begin),
        whole(aligned && left >= THREADS * UNIT * units) {}

  // This thread's unit i begins here, counted from the tile's beginning.
  __device__ __forceinline__ int at(int i) const { return (i * THREADS + static_cast<int>(threadIdx.x)) * UNIT; }

  template <Dtype dtype>
  __device__ __forceinline__ char* address(const Batch& tensor, int i) const {
    constexpr int SIZE = Unit<dtype, UNIT>::SIZE;
    return tensor.data + (sample * tensor.stride + begin * SIZE) + at(i) * SIZE;
  }

  template <Dtype dtype>
  __device__ __forceinline__ void load(Unit<dtype, UNIT>& unit, const Batch& tensor, int i) const {
    if (whole) unit.load(address<dtype>(tensor, i));
    else unit.load_first(left - at(i), address<dtype>(tensor, i));
  }

  template <Dtype dtype>
  __device__ __forceinline__ void store(const float (&values)[UNIT], const Batch& tensor, int i) const {
    Unit<dtype, UNIT> unit;
    unit.set(values);
    if (whole) unit.store(address<dtype>(tensor, i));
    else unit.store_first(left - at(i), address<dtype>(tensor, i));
  }
};

// ---- noise ----

// Normals of a unit's elements, which begin `offset` elements into a tile that begins at `tile_begin`. A tile's length is a power of
// two and divides its beginning, so that the counter's high word is the same in all of it.
template <int COUNT>
__device__ __forceinline__ void normals(uint64_t seed, uint32_t draw, uint32_t stream, int64_t tile_begin, int offset,
                                        float (&z)[COUNT]) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t group = static_cast<uint64_t>(tile_begin) / 4;
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const uint32_t low = static_cast<uint32_t>(group) + static_cast<uint32_t>(offset + i) / 4;
    const PhiloxWords words = philox({low, static_cast<uint32_t>(group >> 32), draw, stream}, key0, key1);
    box_muller(words.w0, words.w1, z[i], z[i + 1]);
    box_muller(words.w2, words.w3, z[i + 2], z[i + 3]);
  }
}

// ---- the step ----

struct SampleRow {
  StepRow row;
  unsigned terms;  // asked for by the row and present
  uint64_t seed;
  int64_t guided;  // so many of a sample's elements are
  float rescale, threshold;
};

// Terms that need no tensor.
constexpr unsigned OF_ROW_ALONE = TERM_CLIP | TERM_F | TERM_K_M1 | TERM_K_M2 | TERM_K_Y | TERM_CHANNELS;

// A sample whose index is out of range, or whose row cannot be applied, becomes NaN: the host is not there to raise.
__device__ __forceinline__ SampleRow read_row(const StepParameters& p, int64_t sample, unsigned present) {
  SampleRow result{};
  StepRow& row = result.row;
  const int64_t index = p.index.data[sample * p.index.stride];
  if (p.seeds.data) result.seed = static_cast<uint64_t>(p.seeds.data[sample * p.seeds.stride]);
  bool good = index >= 0 && index < p.row_count;
  if (good) {
    const float* source = p.rows + index * p.row_stride;
    alignas(16) float columns[ROW_COLUMNS];
#pragma unroll
    for (int i = 0; i < ROW_COLUMNS; i += 4)
      *reinterpret_cast<float4*>(columns + i) = *reinterpret_cast<const float4*>(source + i);
    memcpy(&row, columns, sizeof row);
    const unsigned asked = row_terms(row);
    result.terms = (asked | (present & TERM_Y_OUT)) & (present | OF_ROW_ALONE);
    good = valid_clip(row.clip) && !(tensor_terms(asked) & ~(present | OF_ROW_ALONE | TERM_GRAD));
    if ((result.terms & TERM_NOISE) && p.seeds.data && !valid_count(row.draw)) good = false;
    if (!valid_count(row.guided_channels)) good = false;
    if (!(result.terms & TERM_GUIDANCE)) result.terms &= ~TERM_CHANNELS;
    if (result.terms & TERM_CHANNELS) result.guided = guided_numel(row, p.operands.guided_period, p.operands.channel_numel);
    if (present & TERM_RESCALE) result.rescale = p.rescale.data[sample * p.rescale.stride];
    if (present & TERM_THRESHOLD) {
      result.threshold = p.threshold.data[sample * p.threshold.stride];
      good = good && valid_threshold(result.threshold);
    }
    result.terms |= present & (TERM_RESCALE | TERM_THRESHOLD);
  }
  if (!good) {
    row.d_x = row.c_x = row.k_x = NAN;
    result.terms = present & TERM_Y_OUT;
  }
  return result;
}

// Kernels for each set of these tensors, by name of their terms, and one for all others.
constexpr unsigned EVERYTHING = ~0u;

template <Dtype X, Dtype F, unsigned tensors, bool large>
struct Shape {
  static constexpr bool everything = tensors == EVERYTHING;
  static constexpr bool one_width = (X == Dtype::float32) == (F == Dtype::float32);
  static constexpr int UNIT = X == Dtype::float32 && F == Dtype::float32 ? 4 : 8;  // 16 bytes of the narrower tensor
  // Noise is bound by instructions: in large tensors each thread spreads its own over 16 elements, small ones are spread over many
  // threads. The rest is bound by memory.
  static constexpr bool uses_noise = !everything && (tensors & TERM_NOISE);
  static constexpr int UNITS = uses_noise ? (large ? 16 / UNIT : 1) : one_width && (UNIT == 4 || !everything) ? 2 : 1;
  static constexpr int64_t TILE = int64_t{THREADS} * UNIT * UNITS;  // elements of a block
};

template <unsigned certain, unsigned possible, int COUNT, typename Value>
__device__ __forceinline__ void step_unit(const SampleRow& s, const Value& value, float (&next)[COUNT], float (&m0)[COUNT],
                                          float (&second)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    StepInputs in = value(i);
    if constexpr (!(possible & TERM_CHANNELS)) in.guided = ~0u;
    const StepOutputs out = step_value(s.row, certain | (s.terms & possible), in);
    next[i] = out.x;
    m0[i] = out.m0;
    if constexpr (possible & TERM_Y_OUT) second[i] = out.y;
  }
}

template <Dtype X, Dtype F, unsigned tensors, bool large>
__global__ void __launch_bounds__(THREADS) step_kernel(const StepParameters p) {
  using Shape = Shape<X, F, tensors, large>;
  constexpr int UNIT = Shape::UNIT, UNITS = Shape::UNITS;
  constexpr bool may_guide = tensors & TERM_GUIDANCE, may_use_m1 = tensors & TERM_M1, may_draw = tensors & TERM_NOISE;
  const StepOperands& a = p.operands;
  const Tile<UNIT> tile(UNITS, a.sample_numel, p.aligned);
  if (tile.sample >= a.batch) return;

  // Needed whatever the row says: on their way while the row is read.
  Unit<X, UNIT> x[UNITS];
  Unit<F, UNIT> f[UNITS];
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    tile.load(x[i], a.x, i);
    tile.load(f[i], a.f, i);
  }
  const SampleRow s = read_row(p, tile.sample, Shape::everything ? p.present : TERM_CLIP | TERM_F | tensors);
  const unsigned reads = Shape::everything ? tensor_terms(s.terms) : s.terms;
  const bool guides = may_guide && (reads & TERM_GUIDANCE), uses_m1 = may_use_m1 && (reads & TERM_M1);
  const bool noise_given = Shape::everything && a.noise.data;
  const bool draws = may_draw && (s.terms & TERM_NOISE) && !noise_given;
  const bool learned = (s.terms & TERM_VARIANCE) && (s.terms & (TERM_NOISE | TERM_GRAD));

  // Only what the row asks for: the rest may be uninitialised.
  Unit<F, UNIT> u[UNITS], v[UNITS];
  Unit<X, UNIT> m1[UNITS], m2[UNITS], y[UNITS], grad[UNITS], noise[UNITS];
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    if (guides) tile.load(u[i], a.u, i);
    if (uses_m1) tile.load(m1[i], a.m1, i);
    if constexpr (Shape::everything) {
      if (reads & TERM_M2) tile.load(m2[i], a.m2, i);
      if (reads & TERM_Y) tile.load(y[i], a.y, i);
      if (s.terms & TERM_GRAD) tile.load(grad[i], a.grad, i);
      if ((s.terms & TERM_NOISE) && noise_given) tile.load(noise[i], a.noise, i);
      if (learned) tile.load(v[i], a.v, i);
    }
  }

  float z[UNITS][UNIT] = {};
  if (draws) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i)
      normals(s.seed, static_cast<uint32_t>(s.row.draw), STREAM_STEP, tile.begin, tile.at(i), z[i]);
  }

#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    float scaled_grad[UNIT] = {}, next[UNIT], m0[UNIT], second[UNIT];
    if constexpr (Shape::everything) {
#pragma unroll
      for (int j = 0; j < UNIT; ++j) {
        if ((s.terms & TERM_NOISE) && noise_given) z[i][j] = noise[i][j];
        if (s.terms & TERM_GRAD) scaled_grad[j] = grad[i][j];
        if (learned) {
          const float sigma = learned_sigma(s.row, v[i][j]);
          z[i][j] = sigma * z[i][j];
          scaled_grad[j] = (sigma * sigma) * scaled_grad[j];
        }
      }
    }
    const auto value = [&](int j) {
      StepInputs in{};
      in.x = x[i][j];
      in.f = f[i][j];
      if constexpr (may_guide) in.u = u[i][j];
      if constexpr (may_use_m1) in.m1 = m1[i][j];
      if constexpr (Shape::everything) {
        in.m2 = m2[i][j];
        in.y = y[i][j];
        in.rescale = s.rescale;
        in.threshold = s.threshold;
      }
      if constexpr (may_guide) in.guided = !(s.terms & TERM_CHANNELS) || (tile.begin + tile.at(i) + j) % a.guided_period < s.guided ? ~0u : 0u;
      in.grad = scaled_grad[j];
      in.z = z[i][j];
      return in;
    };
    // What rows mostly ask for is compiled without tests; clamping to an infinite clip changes nothing, and stays.
    constexpr unsigned mostly = Shape::everything ? TERM_NOISE : tensors;
    constexpr unsigned all = Shape::everything ? ~TERM_VARIANCE : TERM_F | TERM_CHANNELS | tensors;
    if ((s.terms & all & ~TERM_CLIP) == mostly)
      step_unit<TERM_CLIP | mostly, 0>(s, value, next, m0, second);
    else
      step_unit<0, TERM_CLIP | all>(s, value, next, m0, second);
    tile.template store<X>(next, a.out, i);
    if (a.m0.data) tile.template store<X>(m0, a.m0, i);
    if constexpr (Shape::everything) {
      if (a.y_out.data) tile.template store<X>(second, a.y_out, i);
    }
    if (a.model_input.data) {
      Unit<X, UNIT> stored;
      stored.set(next);
#pragma unroll
      for (int j = 0; j < UNIT; ++j) next[j] = s.row.c_in_next * stored[j];
      tile.template store<F>(next, a.model_input, i);
      if (a.doubled) tile.template store<F>(next, {a.model_input.data + a.batch * a.model_input.stride, a.model_input.stride}, i);
    }
  }
}

// ---- the initial latent ----

template <Dtype dtype>
__global__ void __launch_bounds__(THREADS) normal_kernel(const NormalParameters p) {
  constexpr int UNIT = dtype == Dtype::float32 ? 4 : 8;
  const NormalOperands& a = p.operands;
  const Tile<UNIT> tile(1, a.sample_numel, p.aligned);
  if (tile.sample >= a.batch) return;
  float z[UNIT];
  normals(static_cast<uint64_t>(p.seeds.data[tile.sample * p.seeds.stride]), a.draw, a.stream, tile.begin, tile.at(0), z);
  tile.template store<dtype>(z, Batch{a.out, a.sample_numel * Unit<dtype, UNIT>::SIZE}, 0);
}

// ---- launches ----

template <typename Parameters>
const char* launch_samples(void (*kernel)(Parameters), const Parameters& p, int64_t tile, void* stream) {
  return launch(kernel, p, (p.operands.sample_numel + tile - 1) / tile, p.operands.batch, stream);
}

template <Dtype X, Dtype F, unsigned tensors>
const char* launch_kernel(const StepParameters& p, void* stream) {
  using Small = Shape<X, F, tensors, false>;
  using Large = Shape<X, F, tensors, true>;
  if constexpr (Small::TILE != Large::TILE) {
    constexpr int64_t ENOUGH = 512;  // blocks, for the GPUs of today
    if (p.operands.batch * (p.operands.sample_numel / Large::TILE) >= ENOUGH)
      return launch_samples(&step_kernel<X, F, tensors, true>, p, Large::TILE, stream);
  }
  return launch_samples(&step_kernel<X, F, tensors, false>, p, Small::TILE, stream);
}

template <Dtype X, Dtype F, unsigned... sets>
const char* launch_pair(const StepParameters& p, void* stream) {
  const StepOperands& a = p.operands;
  const unsigned tensors = p.present & ~OF_ROW_ALONE;
  const char* error = nullptr;
  if (a.noise.data || !((tensors == sets && (error = launch_kernel<X, F, sets>(p, stream), true)) || ...))
    error = launch_kernel<X, F, EVERYTHING>(p, stream);
  return error;
}

template <Dtype X, Dtype F>
const char* launch_common(const StepParameters& p, void* stream) {
  constexpr unsigned G = TERM_GUIDANCE, M1 = TERM_M1, N = TERM_NOISE;
  return launch_pair<X, F, 0u, G, M1, N, G | M1, G | N, M1 | N, G | M1 | N>(p, stream);
}

template <Dtype X>
const char* launch_state(const StepParameters& p, void* stream) {
  switch (p.operands.f_dtype) {
    case Dtype::float32: return launch_common<X, Dtype::float32>(p, stream);
    case Dtype::float16: return launch_common<X, Dtype::float16>(p, stream);
    default: return launch_common<X, Dtype::bfloat16>(p, stream);
  }
}

}  // namespace

const char* launch_step(const StepParameters& p, void* stream) {
  switch (p.operands.x_dtype) {
    case Dtype::float32: return launch_state<Dtype::float32>(p, stream);
    case Dtype::float16: return launch_state<Dtype::float16>(p, stream);
    default: return launch_state<Dtype::bfloat16>(p, stream);
  }
}

const char* launch_normal(const NormalParameters& p, void* stream) {
  switch (p.operands.dtype) {
    case Dtype::float32: return launch_samples(&normal_kernel<Dtype::float32>, p, THREADS * 4, stream);
    case Dtype::float16: return launch_samples(&normal_kernel<Dtype::float16>, p, THREADS * 8, stream);
    default: return launch_samples(&normal_kernel<Dtype::bfloat16>, p, THREADS * 8, stream);
  }
}

}  // namespace epskernels
