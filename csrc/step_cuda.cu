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

  // The first `count` elements at most; count may be negative, and the address then lies beyond the sample. One by one, where they
  // are no whole 16-byte words.
  __device__ __forceinline__ void load_first(int count, const char* source) {
    if (in_words(count, source)) return load(source);
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

  __device__ __forceinline__ void store_first(int count, char* target) const {
    if (in_words(count, target)) return store(target);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i >= count) continue;
      if constexpr (wide) reinterpret_cast<uint32_t*>(target)[i] = words[i];
      else reinterpret_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }

  static __device__ __forceinline__ bool in_words(int count, const char* address) {
    return count >= COUNT && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  }
};

// A thread's units of a tensor. Tile has the sample, where each unit begins, and how many of its elements lie inside.
template <typename Tile, Dtype dtype, int UNIT>
__device__ __forceinline__ char* address_of(const Tile& tile, const Batch& tensor, int i) {
  constexpr int SIZE = Unit<dtype, UNIT>::SIZE;
  return tensor.data + (tile.sample * tensor.stride + tile.begin * SIZE) + tile.offset(i) * SIZE;
}

template <typename Tile, Dtype dtype, int UNIT, int UNITS>
__device__ __forceinline__ void load(const Tile& tile, Unit<dtype, UNIT> (&units)[UNITS], const Batch& tensor) {
  if (tile.whole) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) units[i].load(address_of<Tile, dtype, UNIT>(tile, tensor, i));
  } else {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) units[i].load_first(tile.count(i), address_of<Tile, dtype, UNIT>(tile, tensor, i));
  }
}

template <Dtype dtype, typename Tile, int UNIT, int UNITS>
__device__ __forceinline__ void store(const Tile& tile, const float (&values)[UNITS][UNIT], const Batch& tensor) {
  Unit<dtype, UNIT> units[UNITS];
#pragma unroll
  for (int i = 0; i < UNITS; ++i) units[i].set(values[i]);
  if (tile.whole) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i)
      if (tile.has(i)) units[i].store(address_of<Tile, dtype, UNIT>(tile, tensor, i));
  } else {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) units[i].store_first(tile.count(i), address_of<Tile, dtype, UNIT>(tile, tensor, i));
  }
}

// ---- noise ----

// The normals of some counters, each of four elements.
template <int COUNT>
__device__ __forceinline__ void normals_of(uint64_t seed, PhiloxWords (&counters)[COUNT], float* z) {
  philox(counters, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    box_muller(counters[i].w0, counters[i].w1, z[4 * i], z[4 * i + 1]);
    box_muller(counters[i].w2, counters[i].w3, z[4 * i + 2], z[4 * i + 3]);
  }
}

struct Noise {
  uint64_t seed;
  uint32_t draw, stream;

  __device__ __forceinline__ PhiloxWords counter(uint64_t group) const {
    return {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), draw, stream};
  }
};

// Normals of a sample's elements from `begin` on, wherever that is: units share a counter's four where it is no multiple of 4.
template <int COUNT>
__device__ __forceinline__ void normals_from(const Noise& noise, int64_t begin, float (&z)[COUNT]) {
  const int skipped = static_cast<int>(begin % 4);  // of the first counter's
#pragma unroll 1
  for (int i = 0; 4 * i < COUNT + skipped; ++i) {
    PhiloxWords counter[1] = {noise.counter(static_cast<uint64_t>(begin) / 4 + i)};
    float four[4];
    normals_of(noise.seed, counter, four);
#pragma unroll
    for (int j = 0; j < 4 * COUNT; ++j)
      if (j / 4 == 4 * i + j % 4 - skipped) z[j / 4] = four[j % 4];
  }
}

// ---- a thread's units ----

// A block's tile of a sample, cut into units that its threads take in turn.
template <int UNIT, int UNITS>
struct Tile {
  static constexpr int NUMEL = THREADS * UNIT * UNITS;
  int64_t sample, begin;  // the same in all threads of a block
  int inside;             // elements of it inside the sample
  bool whole;             // all, in 16-byte words

  __device__ __forceinline__ Tile(int64_t sample_numel, bool aligned) : sample(layer_of_block()), begin(int64_t{blockIdx.x} * NUMEL) {
    const int64_t left = sample_numel - begin;
    inside = left < NUMEL ? static_cast<int>(left) : NUMEL;
    whole = aligned && inside == NUMEL;
  }

  // This thread's unit i begins here, counted from the tile's beginning.
  __device__ __forceinline__ int offset(int i) const { return (i * THREADS + static_cast<int>(threadIdx.x)) * UNIT; }
  __device__ __forceinline__ int count(int i) const { return inside - offset(i); }
  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ bool outside(int64_t batch) const { return sample >= batch; }

  // A tile's length is a power of two and divides its beginning, so that the counter's high word is the same in all of it.
  __device__ __forceinline__ void normals(const Noise& noise, float (&z)[UNITS][UNIT]) const {
    PhiloxWords counters[UNITS * UNIT / 4];
    const PhiloxWords first = noise.counter(static_cast<uint64_t>(begin) / 4);
#pragma unroll
    for (int i = 0; i < UNITS * UNIT / 4; ++i) {
      counters[i] = first;
      counters[i].w0 += static_cast<uint32_t>(offset(4 * i / UNIT) + 4 * i % UNIT) / 4;
    }
    normals_of(noise.seed, counters, z[0]);
  }
};

// A thread takes two units of one image row or, where a band has two dimensions, one of each of two neighbouring rows.
HOST_DEVICE int64_t band_units(const StepOperands& a, int unit) {
  const int64_t columns = a.band_dims == 2 ? unit : 2 * unit;
  return (a.width + columns - 1) / columns;
}

// Two units that hold whole blocks of a band. Where the second lies outside, below the last of an odd number of image rows or behind
// the end of one, it is read in the first's place and never written.
template <int UNIT>
struct BandTile {
  static_assert(UNIT % 4 == 0);
  int64_t sample, begin, second;  // elements: of the sample before the first unit, from there to the second unit
  int columns, columns_behind;    // of each unit, inside its image row
  bool inside, shifted, whole;    // shifted: image rows begin anywhere in a counter's four; whole: in 16-byte words

  __device__ __forceinline__ BandTile(const StepOperands& a, bool aligned) : sample(layer_of_block()) {
    const bool pairs_rows = a.band_dims == 2;
    const uint32_t units = static_cast<uint32_t>(band_units(a, UNIT)), thread = blockIdx.x * THREADS + threadIdx.x;
    const uint32_t of_plane = thread / units;
    uint32_t plane = 0, row = of_plane;
    if (pairs_rows) {
      const uint32_t pairs = static_cast<uint32_t>((a.height + 1) / 2);
      if (a.height * a.width < a.sample_numel) plane = of_plane / pairs;
      row = 2 * (of_plane - plane * pairs);
    }
    const int64_t column = int64_t{thread - of_plane * units} * (pairs_rows ? UNIT : 2 * UNIT), left = a.width - column;
    begin = (plane * a.height + row) * a.width + column;
    columns = left < UNIT ? static_cast<int>(left) : UNIT;
    columns_behind = pairs_rows ? (row + 1 < a.height ? columns : 0) : left > UNIT ? left < 2 * UNIT ? static_cast<int>(left) - UNIT : UNIT : 0;
    second = columns_behind == 0 ? 0 : pairs_rows ? a.width : UNIT;
    inside = begin < a.sample_numel;
    shifted = a.width % 4 != 0;
    whole = aligned && a.width % UNIT == 0;
  }

  __device__ __forceinline__ int64_t offset(int i) const { return i == 0 ? 0 : second; }
  __device__ __forceinline__ bool outside(int64_t batch) const { return sample >= batch || !inside; }
  __device__ __forceinline__ bool has(int i) const { return count(i) > 0; }
  __device__ __forceinline__ int count(int i) const { return i == 0 ? columns : columns_behind; }

  __device__ __forceinline__ void normals(const Noise& noise, float (&z)[2][UNIT]) const {
    if (shifted) {
#pragma unroll
      for (int i = 0; i < 2; ++i) normals_from(noise, begin + offset(i), z[i]);
      return;
    }
    PhiloxWords counters[UNIT / 2];
#pragma unroll
    for (int i = 0; i < UNIT / 2; ++i)
      counters[i] = noise.counter(static_cast<uint64_t>(begin + offset(4 * i / UNIT)) / 4 + i % (UNIT / 4));
    normals_of(noise.seed, counters, z[0]);
  }
};

// ---- the step ----

// Kernels for each set of these tensors, by name of their terms, and one for all others.
constexpr unsigned EVERYTHING = ~0u;

struct SampleRow {
  StepRow row;
  unsigned terms;  // asked for by the row and present
  uint64_t seed;
  int64_t guided;  // so many of a sample's elements are
  float rescale, threshold;
  BandRow band;  // of wide rows
  bool corrects;  // the band
};

// Terms that need no tensor.
constexpr unsigned OF_ROW_ALONE = TERM_CLIP | TERM_F | TERM_K_M1 | TERM_K_M2 | TERM_K_Y | TERM_CHANNELS;

// Whether a row asks for these tensors and nothing else, and can be applied: what rows mostly are, in few instructions.
template <unsigned tensors>
__device__ __forceinline__ bool asks_for(const StepRow& row) {
  const auto bits = [](float value) { return bits_from_float(value); };
  uint32_t idle = bits(row.c_f) | bits(row.c_m2) | bits(row.c_grad) | bits(row.c_y) | bits(row.logvar_min) | bits(row.logvar_max) |
                  bits(row.k_x) | bits(row.k_m0) | bits(row.k_m1) | bits(row.k_m2) | bits(row.k_y) | bits(row.guided_channels);
  if constexpr (!(tensors & TERM_M1)) idle |= bits(row.c_m1);
  if constexpr (!(tensors & TERM_NOISE)) idle |= bits(row.c_noise) | bits(row.draw);
  idle <<= 1;  // zeros of either sign
  if constexpr (!(tensors & TERM_GUIDANCE)) idle |= bits(row.g) ^ bits(1.0f);
  bool asked = idle == 0 && valid_clip(row.clip);
  if constexpr (tensors & TERM_GUIDANCE) asked = asked && row.g != 1.0f;
  if constexpr (tensors & TERM_M1) asked = asked && row.c_m1 != 0.0f;
  if constexpr (tensors & TERM_NOISE) asked = asked && row.c_noise != 0.0f && valid_count(row.draw);
  return asked;
}

// A sample whose index is out of range, or whose row cannot be applied, becomes NaN: the host is not there to raise.
template <bool wide, unsigned tensors>
__device__ __forceinline__ SampleRow read_row(const StepParameters& p, int64_t sample) {
  constexpr bool everything = tensors == EVERYTHING;
  const unsigned present = everything ? p.present : TERM_CLIP | TERM_F | tensors;
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
    if (!everything && asks_for<tensors>(row)) {
      result.terms = TERM_CLIP | tensors;
    } else {
      const unsigned asked = row_terms(row);
      result.terms = (asked | (present & TERM_Y_OUT)) & (present | OF_ROW_ALONE);
      good = valid_clip(row.clip) && !(tensor_terms(asked) & ~(present | OF_ROW_ALONE | TERM_GRAD));
      if ((result.terms & TERM_NOISE) && p.seeds.data && !valid_count(row.draw)) good = false;
      if (!valid_count(row.guided_channels)) good = false;
      if (!(result.terms & TERM_GUIDANCE)) result.terms &= ~TERM_CHANNELS;
      if (result.terms & TERM_CHANNELS) result.guided = guided_numel(row, p.operands.guided_period, p.operands.channel_numel);
    }
    if (present & TERM_RESCALE) result.rescale = p.rescale.data[sample * p.rescale.stride];
    if (present & TERM_THRESHOLD) {
      result.threshold = p.threshold.data[sample * p.threshold.stride];
      good = good && valid_threshold(result.threshold);
    }
    result.terms |= present & (TERM_RESCALE | TERM_THRESHOLD);
    if constexpr (wide) {
      const float4 band = *reinterpret_cast<const float4*>(source + ROW_COLUMNS);
      result.band = {band.x, band.y, band.z, band.w};
      result.corrects = corrects_band(result.band);
      if (result.corrects) good = good && p.operands.band_dims > 0 && result.band.band_dims == static_cast<float>(p.operands.band_dims);
    }
  }
  if (!good) {
    row.d_x = row.c_x = row.k_x = NAN;
    result.terms = present & TERM_Y_OUT;
  }
  return result;
}

// Large tensors give each thread more elements, over which what it does once is spread; small ones are spread over many threads.
// Rows that may correct a band have kernels of their own.
enum Form { SMALL, LARGE, BY_BAND };

template <Dtype X, Dtype F, unsigned tensors, Form form>
struct Shape {
  static constexpr bool everything = tensors == EVERYTHING, by_band = form == BY_BAND;
  static constexpr bool one_width = (X == Dtype::float32) == (F == Dtype::float32);
  static constexpr int UNIT = X == Dtype::float32 && F == Dtype::float32 ? 4 : 8;  // 16 bytes of the narrower tensor
  static constexpr bool uses_noise = !everything && (tensors & TERM_NOISE);
  static constexpr int SMALLEST = uses_noise || !one_width || (UNIT == 8 && everything) ? 1 : 2;
  static constexpr int UNITS = by_band ? 2 : form == SMALL || everything ? SMALLEST : one_width ? 4 : uses_noise ? 2 : SMALLEST;

  static __device__ __forceinline__ auto tile(const StepParameters& p) {
    if constexpr (by_band) return BandTile<UNIT>(p.operands, p.aligned);
    else return Tile<UNIT, UNITS>(p.operands.sample_numel, p.aligned);
  }
};

// Bits of the elements from `begin` on that are guided. One division, where a batch may be taken for one long sample.
template <int UNIT>
__device__ __forceinline__ unsigned guided_elements(int64_t begin, int64_t period, int64_t guided) {
  int64_t place = begin % period;
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < UNIT; ++j) {
    if (place < guided) bits |= 1u << j;
    if (++place == period) place = 0;
  }
  return bits;
}

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

// x' + L(values), of a thread's two units.
template <int UNIT>
__device__ __forceinline__ void add_band(const BandTile<UNIT>& tile, int dims, float (&values)[2][UNIT], float (&next)[2][UNIT]) {
  if (!tile.whole || !tile.has(1)) {  // what lies outside counts as 0
#pragma unroll
    for (int j = 0; j < 2 * UNIT; ++j)
      if (j % UNIT >= tile.count(j / UNIT)) values[j / UNIT][j % UNIT] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < UNIT; j += 2) {
    const float first = values[0][j] + values[0][j + 1], second = values[1][j] + values[1][j + 1];
    const float block = (first + second) * 0.25f;
    const float mean[2] = {dims == 2 ? block : first * 0.5f, dims == 2 ? block : second * 0.5f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next[i][j] = next[i][j] + mean[i];
      next[i][j + 1] = next[i][j + 1] + mean[i];
    }
  }
}

template <Dtype X, Dtype F, unsigned tensors, Form form>
__global__ void __launch_bounds__(THREADS) step_kernel(const StepParameters p) {
  using Shape = Shape<X, F, tensors, form>;
  constexpr int UNIT = Shape::UNIT, UNITS = Shape::UNITS;
  constexpr bool may_guide = tensors & TERM_GUIDANCE, may_use_m1 = tensors & TERM_M1, may_draw = tensors & TERM_NOISE;
  const StepOperands& a = p.operands;
  const auto tile = Shape::tile(p);
  if (tile.outside(a.batch)) return;

  // Needed whatever the row says: on their way while the row is read.
  Unit<X, UNIT> x[UNITS];
  Unit<F, UNIT> f[UNITS];
  load(tile, x, a.x);
  load(tile, f, a.f);
  const SampleRow s = read_row<Shape::by_band, tensors>(p, tile.sample);
  const unsigned reads = Shape::everything ? tensor_terms(s.terms) : s.terms;
  const bool guides = may_guide && (reads & TERM_GUIDANCE), uses_m1 = may_use_m1 && (reads & TERM_M1);
  const bool noise_given = Shape::everything && a.noise.data;
  const bool draws = may_draw && (s.terms & TERM_NOISE) && !noise_given;
  const bool learned = (s.terms & TERM_VARIANCE) && (s.terms & (TERM_NOISE | TERM_GRAD));

  // Only what the row asks for: the rest may be uninitialised.
  Unit<F, UNIT> u[UNITS], v[UNITS];
  Unit<X, UNIT> m1[UNITS], m2[UNITS], y[UNITS], grad[UNITS], noise[UNITS];
  if (guides) load(tile, u, a.u);
  if (uses_m1) load(tile, m1, a.m1);
  if constexpr (Shape::everything) {
    if (reads & TERM_M2) load(tile, m2, a.m2);
    if (reads & TERM_Y) load(tile, y, a.y);
    if (s.terms & TERM_GRAD) load(tile, grad, a.grad);
    if ((s.terms & TERM_NOISE) && noise_given) load(tile, noise, a.noise);
    if (learned) load(tile, v, a.v);
  }

  float z[UNITS][UNIT] = {};
  if (draws) tile.normals({s.seed, static_cast<uint32_t>(s.row.draw), STREAM_STEP}, z);

  float next[UNITS][UNIT], m0[UNITS][UNIT], second[UNITS][UNIT], low_band[UNITS][UNIT];
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    float scaled_grad[UNIT] = {};
    const unsigned guided = may_guide && (s.terms & TERM_CHANNELS) ? guided_elements<UNIT>(tile.begin + tile.offset(i), a.guided_period, s.guided) : ~0u;
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
      if constexpr (may_guide) in.guided = guided >> j & 1 ? ~0u : 0u;
      in.grad = scaled_grad[j];
      in.z = z[i][j];
      return in;
    };
    // What rows mostly ask for is compiled without tests; clamping to an infinite clip changes nothing, and stays.
    constexpr unsigned mostly = Shape::everything ? TERM_NOISE : tensors;
    constexpr unsigned all = Shape::everything ? ~TERM_VARIANCE : TERM_F | TERM_CHANNELS | tensors;
    if ((s.terms & all & ~TERM_CLIP) == mostly)
      step_unit<TERM_CLIP | mostly, 0>(s, value, next[i], m0[i], second[i]);
    else
      step_unit<0, TERM_CLIP | all>(s, value, next[i], m0[i], second[i]);
    if constexpr (Shape::by_band) {
#pragma unroll
      for (int j = 0; j < UNIT; ++j) {
        const float added = s.band.l_next * next[i][j] + s.band.l_m0 * m0[i][j];
        low_band[i][j] = s.band.l_x != 0.0f ? added + s.band.l_x * x[i][j] : added;
      }
    }
  }
  if constexpr (Shape::by_band) {
    if (s.corrects) add_band(tile, a.band_dims, low_band, next);
  }
  store<X>(tile, next, a.out);
  if (a.m0.data) store<X>(tile, m0, a.m0);
  if constexpr (Shape::everything) {
    if (a.y_out.data) store<X>(tile, second, a.y_out);
  }
  if (!a.model_input.data) return;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    Unit<X, UNIT> stored;
    stored.set(next[i]);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) next[i][j] = s.row.c_in_next * stored[j];
  }
  store<F>(tile, next, a.model_input);
  if (a.doubled) store<F>(tile, next, {a.model_input.data + a.batch * a.model_input.stride, a.model_input.stride});
}

// ---- the initial latent ----

template <Dtype dtype>
__global__ void __launch_bounds__(THREADS) normal_kernel(const NormalParameters p) {
  constexpr int UNIT = dtype == Dtype::float32 ? 4 : 8;
  const NormalOperands& a = p.operands;
  const Tile<UNIT, 1> tile(a.sample_numel, p.aligned);
  if (tile.outside(a.batch)) return;
  float z[1][UNIT];
  tile.normals({static_cast<uint64_t>(p.seeds.data[tile.sample * p.seeds.stride]), a.draw, a.stream}, z);
  store<dtype>(tile, z, Batch{a.out, a.sample_numel * Unit<dtype, UNIT>::SIZE});
}

// ---- launches ----

template <typename Parameters>
const char* launch_samples(void (*kernel)(Parameters), const Parameters& p, int64_t tile, void* stream) {
  return launch(kernel, p, (p.operands.sample_numel + tile - 1) / tile, p.operands.batch, stream);
}

template <Dtype X, Dtype F, unsigned tensors>
const char* launch_kernel(const StepParameters& p, void* stream) {
  using Small = Shape<X, F, tensors, SMALL>;
  using Large = Shape<X, F, tensors, LARGE>;
  constexpr int64_t small = Tile<Small::UNIT, Small::UNITS>::NUMEL, large = Tile<Large::UNIT, Large::UNITS>::NUMEL;
  if constexpr (small != large) {
    if (p.operands.batch * (p.operands.sample_numel / large) >= BLOCKS_PER_MULTIPROCESSOR * multiprocessors(p.device))
      return launch_samples(&step_kernel<X, F, tensors, LARGE>, p, large, stream);
  }
  return launch_samples(&step_kernel<X, F, tensors, SMALL>, p, small, stream);
}

// BandTile counts threads in 32 bits.
template <Dtype X, Dtype F, unsigned tensors>
const char* launch_by_band(const StepParameters& p, void* stream) {
  constexpr int UNIT = Shape<X, F, tensors, BY_BAND>::UNIT;
  const StepOperands& a = p.operands;
  const int64_t rows = a.band_dims == 2 ? a.sample_numel / (a.height * a.width) * ((a.height + 1) / 2) : a.sample_numel / a.width;
  const int64_t threads = rows * band_units(a, UNIT);
  if (threads > 0x7fffffff) return "too many elements for a launch";
  return launch(&step_kernel<X, F, tensors, BY_BAND>, p, (threads + THREADS - 1) / THREADS, a.batch, stream);
}

template <Dtype X, Dtype F, unsigned... sets>
const char* launch_pair(const StepParameters& p, void* stream) {
  const StepOperands& a = p.operands;
  const unsigned tensors = p.present & ~OF_ROW_ALONE;
  if (p.wide_rows) {
    if (tensors == 0) return launch_by_band<X, F, 0>(p, stream);
    return tensors == TERM_NOISE && !a.noise.data ? launch_by_band<X, F, TERM_NOISE>(p, stream) : launch_by_band<X, F, EVERYTHING>(p, stream);
  }
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
