// The step on an NVIDIA GPU: each thread loads all that it needs in 16-byte words, step_value on every element, round at the
// store. One launch; the row, its index and the seed are read on the device. Compiled for the host too, by the tests.
#include "step_cuda.h"

#include <cuda_runtime.h>

#include "halves.h"

namespace epskernels {
namespace {

constexpr int THREADS = 128;

// ---- neighbouring elements of a tensor, in its own format ----

template <Dtype dtype, int COUNT>
struct Unit {
  static constexpr bool wide = dtype == Dtype::float32;
  static constexpr int WORDS = wide ? COUNT : COUNT / 2;
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

  // `count` elements from `source` on; `whole`: all of them, at an address of 16-byte words.
  __device__ __forceinline__ void load(const char* source, int count, bool whole) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < WORDS / 4; ++i) {
        const uint4 word = reinterpret_cast<const uint4*>(source)[i];
        words[4 * i] = word.x;
        words[4 * i + 1] = word.y;
        words[4 * i + 2] = word.z;
        words[4 * i + 3] = word.w;
      }
      return;
    }
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

  __device__ __forceinline__ void store(char* target, int count, bool whole) const {
    if (whole) {
#pragma unroll
      for (int i = 0; i < WORDS / 4; ++i)
        reinterpret_cast<uint4*>(target)[i] =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i >= count) continue;
      if constexpr (wide) reinterpret_cast<uint32_t*>(target)[i] = words[i];
      else reinterpret_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
};

// Where a thread's unit lies in its sample.
struct Place {
  int64_t begin;
  int count;   // elements inside the sample, from 0 to a whole unit's
  bool whole;  // a whole unit, in 16-byte words

  __device__ __forceinline__ Place(int64_t begin, int unit, int64_t sample_numel, bool aligned) : begin(begin) {
    const int64_t left = sample_numel - begin;
    count = left <= 0 ? 0 : left < unit ? static_cast<int>(left) : unit;
    whole = aligned && count == unit;
  }

  template <Dtype dtype, int COUNT>
  __device__ __forceinline__ void load(Unit<dtype, COUNT>& unit, const Batch& tensor, int64_t sample) const {
    constexpr int64_t SIZE = dtype == Dtype::float32 ? 4 : 2;
    unit.load(tensor.data + sample * tensor.stride + begin * SIZE, count, whole);
  }

  template <Dtype dtype, int COUNT>
  __device__ __forceinline__ void store(const float (&values)[COUNT], const Batch& tensor, int64_t sample) const {
    constexpr int64_t SIZE = dtype == Dtype::float32 ? 4 : 2;
    Unit<dtype, COUNT> unit;
    unit.set(values);
    unit.store(tensor.data + sample * tensor.stride + begin * SIZE, count, whole);
  }
};

// ---- noise ----

// Normals of elements [begin, begin + COUNT) of a sample, begin a multiple of 4.
template <int COUNT>
__device__ __forceinline__ void normals(uint64_t seed, uint32_t draw, uint32_t stream, int64_t begin, float (&z)[COUNT]) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const uint64_t group = static_cast<uint64_t>(begin + i) / 4;
    const PhiloxWords words =
        philox({static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), draw, stream}, key0, key1);
    box_muller(words.w0, words.w1, z[i], z[i + 1]);
    box_muller(words.w2, words.w3, z[i + 2], z[i + 3]);
  }
}

// ---- the step ----

struct SampleRow {
  StepRow row;
  unsigned terms;  // asked for by the row and present
  uint64_t seed;
};

// A sample whose index is out of range, or whose row cannot be applied, becomes NaN: the host is not there to raise.
__device__ __forceinline__ SampleRow read_row(const StepParameters& p, int64_t sample) {
  SampleRow result{};
  StepRow& row = result.row;
  const int64_t index = p.index.data[sample * p.index.stride];
  if (p.seeds.data) result.seed = static_cast<uint64_t>(p.seeds.data[sample * p.seeds.stride]);
  bool good = index >= 0 && index < p.row_count;
  if (good) {
    const float* source = p.rows + index * p.row_stride;
    float columns[ROW_COLUMNS];
    if (p.rows_aligned) {
#pragma unroll
      for (int i = 0; i < ROW_COLUMNS; i += 4) {
        const float4 word = *reinterpret_cast<const float4*>(source + i);
        columns[i] = word.x;
        columns[i + 1] = word.y;
        columns[i + 2] = word.z;
        columns[i + 3] = word.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < ROW_COLUMNS; ++i) columns[i] = source[i];
    }
    row = {columns[0], columns[1], columns[2],  columns[3],  columns[4],  columns[5],  columns[6],  columns[7],
           columns[8], columns[9], columns[10], columns[11], columns[12], columns[13], columns[14], columns[15]};
    const unsigned asked = row_terms(row);
    result.terms = asked & p.present;
    good = (asked & ~p.present & ~TERM_GRAD) == 0 && row.clip >= 0.0f;
    if ((asked & TERM_NOISE) && p.seeds.data) good = good && valid_draw(row.draw);
  }
  if (!good) {
    row.d_x = row.c_x = NAN;
    result.terms = 0;
  }
  return result;
}

enum class Variant {
  plain,  // x and f alone
  noisy,  // and noise made here
  full,   // everything that there is
};

template <Dtype X, Dtype F, Variant variant>
struct Shape {
  static constexpr bool one_width = (X == Dtype::float32) == (F == Dtype::float32);
  static constexpr int UNIT = X == Dtype::float32 && F == Dtype::float32 ? 4 : 8;  // 16 bytes of the narrower tensor
  static constexpr int UNITS = one_width && (UNIT == 4 || variant != Variant::full) ? 2 : 1;
  static constexpr int64_t TILE = int64_t{THREADS} * UNIT * UNITS;  // elements of a block
};

template <unsigned certain, unsigned possible, int COUNT, typename Value>
__device__ __forceinline__ void step_unit(const SampleRow& s, const Value& value, float (&next)[COUNT], float (&m0)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) next[i] = step_value(s.row, certain | (s.terms & possible), value(i), m0[i]);
}

template <Dtype X, Dtype F, Variant variant>
__global__ void __launch_bounds__(THREADS) step_kernel(const StepParameters p) {
  using Shape = Shape<X, F, variant>;
  constexpr int UNIT = Shape::UNIT, UNITS = Shape::UNITS;
  const StepOperands& a = p.operands;
  for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
    const int64_t begin = blockIdx.x * Shape::TILE + threadIdx.x * UNIT;
    const auto place = [&](int i) { return Place(begin + i * (THREADS * UNIT), UNIT, a.sample_numel, p.aligned); };

    // Needed whatever the row says: on their way while the row is read.
    Unit<X, UNIT> x[UNITS];
    Unit<F, UNIT> f[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      place(i).load(x[i], a.x, sample);
      place(i).load(f[i], a.f, sample);
    }
    const SampleRow s = read_row(p, sample);

    // Only what the row asks for: the rest may be uninitialised.
    constexpr int EXTRA = variant == Variant::full ? UNITS : 0;
    Unit<F, UNIT> u[EXTRA + 1], v[EXTRA + 1];
    Unit<X, UNIT> m1[EXTRA + 1], m2[EXTRA + 1], grad[EXTRA + 1], noise[EXTRA + 1];
    const bool learned = (s.terms & TERM_VARIANCE) && (s.terms & (TERM_NOISE | TERM_GRAD));
    const bool noise_given = a.noise.data != nullptr;
#pragma unroll
    for (int i = 0; i < EXTRA; ++i) {
      if (s.terms & TERM_GUIDANCE) place(i).load(u[i], a.u, sample);
      if (s.terms & TERM_M1) place(i).load(m1[i], a.m1, sample);
      if (s.terms & TERM_M2) place(i).load(m2[i], a.m2, sample);
      if (s.terms & TERM_GRAD) place(i).load(grad[i], a.grad, sample);
      if ((s.terms & TERM_NOISE) && noise_given) place(i).load(noise[i], a.noise, sample);
      if (learned) place(i).load(v[i], a.v, sample);
    }

#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      float z[UNIT] = {}, scaled_grad[UNIT] = {}, next[UNIT], m0[UNIT];
      const Place at = place(i);
      if constexpr (variant != Variant::plain) {
        if ((s.terms & TERM_NOISE) && !noise_given)
          normals(s.seed, static_cast<uint32_t>(s.row.draw), STREAM_STEP, at.begin, z);
      }
      if constexpr (variant == Variant::full) {
#pragma unroll
        for (int j = 0; j < UNIT; ++j) {
          if ((s.terms & TERM_NOISE) && noise_given) z[j] = noise[i][j];
          if (s.terms & TERM_GRAD) scaled_grad[j] = grad[i][j];
          if (learned) {
            const float sigma = learned_sigma(s.row, v[i][j]);
            z[j] = sigma * z[j];
            scaled_grad[j] = (sigma * sigma) * scaled_grad[j];
          }
        }
        step_unit<0, ~0u>(s, [&](int j) {
          return StepInputs{x[i][j], f[i][j], u[i][j], m1[i][j], m2[i][j], scaled_grad[j], z[j]};
        }, next, m0);
      } else {
        // Clamping to an infinite clip changes nothing: it is left in.
        const auto value = [&](int j) { return StepInputs{x[i][j], f[i][j], 0, 0, 0, 0, z[j]}; };
        if (variant == Variant::noisy && (s.terms & (TERM_F | TERM_NOISE)) == TERM_NOISE)
          step_unit<TERM_CLIP | TERM_NOISE, 0>(s, value, next, m0);
        else
          step_unit<TERM_CLIP, TERM_F | (variant == Variant::noisy ? TERM_NOISE : 0u)>(s, value, next, m0);
      }
      at.template store<X>(next, a.out, sample);
      if (a.m0.data) at.template store<X>(m0, a.m0, sample);
    }
  }
}

// ---- the initial latent ----

template <Dtype dtype>
__global__ void __launch_bounds__(THREADS) normal_kernel(const NormalParameters p) {
  constexpr int UNIT = dtype == Dtype::float32 ? 4 : 8;
  const NormalOperands& a = p.operands;
  const Batch out{a.out, a.sample_numel * (dtype == Dtype::float32 ? 4 : 2)};
  for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
    const Place at((int64_t{blockIdx.x} * THREADS + threadIdx.x) * UNIT, UNIT, a.sample_numel, p.aligned);
    if (at.count == 0) continue;
    float z[UNIT];
    normals(static_cast<uint64_t>(p.seeds.data[sample * p.seeds.stride]), a.draw, a.stream, at.begin, z);
    at.template store<dtype>(z, out, sample);
  }
}

// ---- launches ----

template <typename Parameters>
const char* launch(void (*kernel)(Parameters), Parameters parameters, int64_t tile, void* stream) {
  const int64_t tiles = (parameters.operands.sample_numel + tile - 1) / tile, batch = parameters.operands.batch;
  if (tiles > 0x7fffffff) return "a sample has too many elements for a launch";
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(batch < 65535 ? batch : 65535));
  void* arguments[] = {&parameters};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, dim3(THREADS), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <Dtype X, Dtype F, Variant variant>
const char* launch_variant(const StepParameters& p, void* stream) {
  return launch(&step_kernel<X, F, variant>, p, Shape<X, F, variant>::TILE, stream);
}

template <Dtype X, Dtype F>
const char* launch_pair(const StepParameters& p, void* stream) {
  const StepOperands& a = p.operands;
  if (a.u.data || a.m1.data || a.m2.data || a.v.data || a.grad.data || a.noise.data)
    return launch_variant<X, F, Variant::full>(p, stream);
  return p.seeds.data ? launch_variant<X, F, Variant::noisy>(p, stream) : launch_variant<X, F, Variant::plain>(p, stream);
}

template <Dtype X>
const char* launch_state(const StepParameters& p, void* stream) {
  switch (p.operands.f_dtype) {
    case Dtype::float32: return launch_pair<X, Dtype::float32>(p, stream);
    case Dtype::float16: return launch_pair<X, Dtype::float16>(p, stream);
    default: return launch_pair<X, Dtype::bfloat16>(p, stream);
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
    case Dtype::float32: return launch(&normal_kernel<Dtype::float32>, p, THREADS * 4, stream);
    case Dtype::float16: return launch(&normal_kernel<Dtype::float16>, p, THREADS * 8, stream);
    default: return launch(&normal_kernel<Dtype::bfloat16>, p, THREADS * 8, stream);
  }
}

}  // namespace epskernels
