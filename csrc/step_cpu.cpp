// The step on the CPU, tile by tile: widen to float32, step_value on every element, round at the store.
// Compiled once per instruction set, with EPSKERNELS_CAPABILITY naming it; the arithmetic is the same in all of them.
#include "step_cpu.h"

#include <utility>
#include <vector>

#include "halves.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define NO_LOOP_DEPENDENCE _Pragma("clang loop vectorize(assume_safety)")
#else
#define NO_LOOP_DEPENDENCE _Pragma("GCC ivdep")
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace epskernels::EPSKERNELS_CAPABILITY {
namespace {

static_assert(TILE % 64 == 0);

// ---- float16 and bfloat16 ----

ALWAYS_INLINE void widen_tile_float16(const uint16_t* source, float* tile, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)  // the masked forms, since GCC 12 warns of those without a mask
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(tile + i, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#elif defined(__ARM_NEON)
  for (; i + 4 <= count; i += 4) vst1q_f32(tile + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + i))));
#endif
  for (; i < count; ++i) tile[i] = widen_float16(source[i]);
}

ALWAYS_INLINE void round_tile_float16(const float* tile, uint16_t* target, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  for (; i + 4 <= count; i += 4) vst1_u16(target + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(tile + i))));
#endif
  for (; i < count; ++i) target[i] = round_float16(tile[i]);
}

void widen_halves(Dtype dtype, const uint16_t* source, float* tile, int64_t count) {
  if (dtype == Dtype::float16) {
    widen_tile_float16(source, tile, count);
  } else {
    for (int64_t i = 0; i < count; ++i) tile[i] = widen_bfloat16(source[i]);
  }
}

void round_halves(Dtype dtype, const float* tile, uint16_t* target, int64_t count) {
  if (dtype == Dtype::float16) {
    round_tile_float16(tile, target, count);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = round_bfloat16(tile[i]);
  }
}

// The tile's values as float32: the tensor's own memory where it is float32, else `buffer`.
const float* widen_tile(Dtype dtype, const char* sample, int64_t begin, int64_t count, float* buffer) {
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(sample) + begin;
  widen_halves(dtype, reinterpret_cast<const uint16_t*>(sample) + begin, buffer, count);
  return buffer;
}

// Past the caches, which what is larger than they are would only empty; whole lines of them.
void stream_bytes(const char* source, char* target, int64_t count) {
  int64_t i = 0;
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(target) % 64 == 0)
    for (; i + 64 <= count; i += 64)
      for (int64_t j = i; j < i + 64; j += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + j), _mm_load_si128(reinterpret_cast<const __m128i*>(source + j)));
#endif
  std::memcpy(target + i, source + i, count - i);
}

void store_tile(Dtype dtype, const float* tile, char* sample, int64_t begin, int64_t count, bool stream) {
  char* target = sample + begin * size_of(dtype);
  alignas(64) uint16_t halves[TILE];
  if (dtype == Dtype::float32) {
    if (stream) stream_bytes(reinterpret_cast<const char*>(tile), target, count * sizeof(float));
    else std::memcpy(target, tile, count * sizeof(float));
  } else if (stream) {
    round_halves(dtype, tile, halves, count);
    stream_bytes(reinterpret_cast<const char*>(halves), target, count * sizeof(uint16_t));
  } else {
    round_halves(dtype, tile, reinterpret_cast<uint16_t*>(target), count);
  }
}

// ---- noise ----

// Philox in 64-bit lanes whose low halves count: the widening 32-bit multiply then yields high and low word in place.
#if defined(__AVX512F__)
constexpr int LANES = 8;
#elif defined(__AVX2__)
constexpr int LANES = 4;
#else
constexpr int LANES = 2;
#endif
typedef uint64_t Words __attribute__((vector_size(8 * LANES)));
typedef uint32_t NarrowWords __attribute__((vector_size(4 * LANES)));

inline Words multiply(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // _mm512_mul_epu32 warns in GCC 12
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline Words everywhere(uint64_t word) { return Words{} + word; }

inline void store_low(Words words, uint32_t* target) {
  const NarrowWords narrow = __builtin_convertvector(words, NarrowWords);
  std::memcpy(target, &narrow, sizeof narrow);
}

constexpr int64_t GROUPS = TILE / 4;  // of four normals, a counter each

// The words of counters [first, first + count), rounded up to whole lanes. Mirrors philox.h::philox.
void philox_tile(uint64_t seed, uint32_t draw, uint32_t stream, uint64_t first, int64_t count, uint32_t (*words)[GROUPS]) {
  Words lane{};
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  for (int64_t i = 0; i < count; i += LANES) {
    const Words group = lane + (first + i);
    Words c0 = group, c1 = group >> 32, c2 = everywhere(draw), c3 = everywhere(stream);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Words product0 = multiply(c0, everywhere(0xD2511F53u)), product1 = multiply(c2, everywhere(0xCD9E8D57u));
      c0 = (product1 >> 32) ^ c1 ^ everywhere(key0);
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ everywhere(key1);
      c3 = product0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    store_low(c0, words[0] + i);
    store_low(c1, words[1] + i);
    store_low(c2, words[2] + i);
    store_low(c3, words[3] + i);
  }
}

// Normals of elements [begin, begin + count), begin a multiple of 4, count at most TILE; z has room for a whole tile.
void normal_tile(uint64_t seed, uint32_t draw, uint32_t stream, int64_t begin, int64_t count, float* z) {
  constexpr int64_t WIDTH = 16;  // a multiple of every vector's width, so that no loop below has a remainder
  const int64_t groups = ((count + 3) / 4 + WIDTH - 1) / WIDTH * WIDTH;
  alignas(64) uint32_t words[4][GROUPS];
  alignas(64) float normals[4][GROUPS];
  philox_tile(seed, draw, stream, static_cast<uint64_t>(begin) / 4, groups, words);
  for (int pair = 0; pair < 4; pair += 2)
    for (int64_t i = 0; i < groups; ++i)
      box_muller(words[pair][i], words[pair + 1][i], normals[pair][i], normals[pair + 1][i]);
  for (int64_t i = 0; i < groups; ++i) {
    z[4 * i] = normals[0][i];
    z[4 * i + 1] = normals[1][i];
    z[4 * i + 2] = normals[2][i];
    z[4 * i + 3] = normals[3][i];
  }
}

void normal(uint64_t seed, uint32_t draw, uint32_t stream, Dtype dtype, char* out, int64_t begin, int64_t end) {
  alignas(64) float z[TILE];
  for (int64_t done = 0; done < end - begin; done += TILE) {
    const int64_t count = end - begin - done < TILE ? end - begin - done : TILE;
    normal_tile(seed, draw, stream, begin + done, count, z);
    store_tile(dtype, z, out, done, count, false);
  }
}

// ---- the step ----

struct TileInputs {
  const float *x, *f, *u, *m1, *m2, *y, *grad, *z;
  float rescale, threshold;
  int64_t guided;  // so many of the tile's elements are, from the first on
};

struct TileOutputs {
  float *x, *m0, *y;
};

constexpr unsigned KEEP_M0 = COMMON_TERMS + 1;  // one more bit: m0 is wanted

// One combination of the common terms, so that the loop over the tile has no branch. Outputs may be inputs.
template <unsigned variant>
void step_tile(const StepRow& row_in_memory, const TileInputs& in, const TileOutputs& out, int64_t count) {
  constexpr unsigned terms = variant & COMMON_TERMS;
  const StepRow row = row_in_memory;
  const float *x = in.x, *f = in.f, *u = in.u, *m1 = in.m1, *m2 = in.m2, *grad = in.grad, *z = in.z;
  float *next = out.x, *m0 = out.m0;
  NO_LOOP_DEPENDENCE
  for (int64_t i = 0; i < count; ++i) {
    StepInputs element{};
    element.x = x[i];
    element.f = f[i];
    if constexpr ((terms & TERM_GUIDANCE) != 0) element.u = u[i];
    if constexpr ((terms & TERM_M1) != 0) element.m1 = m1[i];
    if constexpr ((terms & TERM_M2) != 0) element.m2 = m2[i];
    if constexpr ((terms & TERM_GRAD) != 0) element.grad = grad[i];
    if constexpr ((terms & TERM_NOISE) != 0) element.z = z[i];
    const StepOutputs value = step_value(row, terms, element);
    if constexpr ((variant & KEEP_M0) != 0) m0[i] = value.m0;
    next[i] = value.x;
  }
}

struct StepTiles {
  void (*of[2 * KEEP_M0])(const StepRow&, const TileInputs&, const TileOutputs&, int64_t);
};
template <unsigned... variants>
constexpr StepTiles step_tiles(std::integer_sequence<unsigned, variants...>) {
  return {{&step_tile<variants>...}};
}
constexpr StepTiles STEP_TILES = step_tiles(std::make_integer_sequence<unsigned, 2 * KEEP_M0>{});

// The same in half precision, all in registers, where no term beside these is there.
constexpr unsigned HALF_TERMS[] = {TERM_GUIDANCE, TERM_CLIP, TERM_M1, TERM_NOISE};
constexpr unsigned KEEP_HALF_M0 = 16;  // one bit more than a variant of them has
#if defined(__AVX512F__)
constexpr int64_t BLOCK = 16;  // of so many elements, which one register holds
#else
constexpr int64_t BLOCK = 8;
#endif

constexpr unsigned half_variant(unsigned terms) {
  unsigned variant = 0;
  for (int i = 0; i < 4; ++i) variant |= terms & HALF_TERMS[i] ? 1u << i : 0u;
  return variant;
}
constexpr unsigned half_terms(unsigned variant) {
  unsigned terms = 0;
  for (int i = 0; i < 4; ++i) terms |= variant >> i & 1 ? HALF_TERMS[i] : 0u;
  return terms;
}

struct HalfTile {
  const uint16_t *x, *f, *u, *m1;
  const float* z;
  uint16_t *next, *m0;
};

#if defined(__F16C__) || defined(__ARM_NEON)
constexpr bool CONVERTS_FLOAT16 = true;  // the processor does, a register at a time
#else
constexpr bool CONVERTS_FLOAT16 = false;
#endif

// count: whole blocks.
template <Dtype dtype, unsigned variant>
void step_halves(const StepRow& row_in_memory, const HalfTile& tile_in_memory, int64_t count) {
  constexpr unsigned terms = half_terms(variant);
  const StepRow row = row_in_memory;
  const HalfTile tile = tile_in_memory;
  if constexpr (dtype == Dtype::float16 && CONVERTS_FLOAT16) {
    for (int64_t i = 0; i < count; i += BLOCK) {
      alignas(64) float x[BLOCK], f[BLOCK], u[BLOCK], m1[BLOCK], next[BLOCK], m0[BLOCK];
      widen_tile_float16(tile.x + i, x, BLOCK);
      widen_tile_float16(tile.f + i, f, BLOCK);
      if constexpr ((terms & TERM_GUIDANCE) != 0) widen_tile_float16(tile.u + i, u, BLOCK);
      if constexpr ((terms & TERM_M1) != 0) widen_tile_float16(tile.m1 + i, m1, BLOCK);
#pragma GCC unroll 1
      for (int j = 0; j < BLOCK; ++j) {
        StepInputs element{};
        element.x = x[j];
        element.f = f[j];
        if constexpr ((terms & TERM_GUIDANCE) != 0) element.u = u[j];
        if constexpr ((terms & TERM_M1) != 0) element.m1 = m1[j];
        if constexpr ((terms & TERM_NOISE) != 0) element.z = tile.z[i + j];
        const StepOutputs value = step_value(row, terms, element);
        next[j] = value.x;
        m0[j] = value.m0;
      }
      round_tile_float16(next, tile.next + i, BLOCK);
      if constexpr ((variant & KEEP_HALF_M0) != 0) round_tile_float16(m0, tile.m0 + i, BLOCK);
    }
  } else {
    const auto widen = [](uint16_t half) { return dtype == Dtype::float16 ? widen_float16(half) : widen_bfloat16(half); };
    const auto round = [](float value) { return dtype == Dtype::float16 ? round_float16(value) : round_bfloat16(value); };
    NO_LOOP_DEPENDENCE
    for (int64_t i = 0; i < count; ++i) {
      StepInputs element{};
      element.x = widen(tile.x[i]);
      element.f = widen(tile.f[i]);
      if constexpr ((terms & TERM_GUIDANCE) != 0) element.u = widen(tile.u[i]);
      if constexpr ((terms & TERM_M1) != 0) element.m1 = widen(tile.m1[i]);
      if constexpr ((terms & TERM_NOISE) != 0) element.z = tile.z[i];
      const StepOutputs value = step_value(row, terms, element);
      tile.next[i] = round(value.x);
      if constexpr ((variant & KEEP_HALF_M0) != 0) tile.m0[i] = round(value.m0);
    }
  }
}

using StepHalves = void (*)(const StepRow&, const HalfTile&, int64_t);
struct HalfTiles {
  StepHalves of[2 * KEEP_HALF_M0];
};
template <Dtype dtype, unsigned... variants>
constexpr HalfTiles half_tiles(std::integer_sequence<unsigned, variants...>) {
  return {{&step_halves<dtype, variants>...}};
}
constexpr auto HALF_VARIANTS = std::make_integer_sequence<unsigned, 2 * KEEP_HALF_M0>{};
constexpr HalfTiles FLOAT16_TILES = half_tiles<Dtype::float16>(HALF_VARIANTS), BFLOAT16_TILES = half_tiles<Dtype::bfloat16>(HALF_VARIANTS);

// Masks that the compiler knows nothing of: it would make branches of them, and leave the loop without vectors.
struct TermMasks {
  uint32_t masks[16];

  explicit TermMasks(unsigned terms) {
    for (int i = 0; i < 16; ++i) {
      volatile uint32_t mask = terms >> i & 1 ? ~0u : 0u;
      masks[i] = mask;
    }
  }
};
inline uint32_t mask_of(unsigned term, const TermMasks& terms) { return terms.masks[__builtin_ctz(term)]; }

// Any terms: each is computed, and chosen where it is there. All pointers can be read and written, an absent tensor's too.
void step_tile_any(const StepRow& row_in_memory, const TermMasks& terms_in_memory, const TileInputs& in, const TileOutputs& out, int64_t count) {
  const StepRow row = row_in_memory;
  const float *x = in.x, *f = in.f, *u = in.u, *m1 = in.m1, *m2 = in.m2, *y = in.y, *grad = in.grad, *z = in.z;
  float *next = out.x, *m0 = out.m0, *second = out.y;
  const TermMasks terms = terms_in_memory;
  const float rescale = in.rescale, threshold = in.threshold;
  const int guided = in.guided < 0 ? 0 : in.guided < TILE ? static_cast<int>(in.guided) : static_cast<int>(TILE);
  NO_LOOP_DEPENDENCE
  for (int i = 0; i < static_cast<int>(count); ++i) {
    const StepInputs element{x[i], f[i], u[i], m1[i], m2[i], y[i], grad[i], z[i], rescale, threshold,
                             0u - static_cast<uint32_t>(i < guided)};
    const StepOutputs value = step_value(row, terms, element);
    m0[i] = value.m0;
    second[i] = value.y;
    next[i] = value.x;
  }
}

// z and grad times the standard deviation, or variance, that the model has learned.
void learned_tile(const StepRow& row, const float* v, const float* z, float* scaled_z, const float* grad,
                  float* scaled_grad, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float s = learned_sigma(row, v[i]);
    if (z) scaled_z[i] = s * z[i];
    if (grad) scaled_grad[i] = (s * s) * grad[i];
  }
}

// float32 values as float16 or bfloat16 holds them.
void as_stored(Dtype dtype, float* tile, int64_t count) {
  alignas(64) uint16_t halves[TILE];
  round_halves(dtype, tile, halves, count);
  widen_tile(dtype, reinterpret_cast<const char*>(halves), 0, count, tile);
}

void model_input_tile(float c_in, const float* x, float* model_input, int64_t count) {
  for (int64_t i = 0; i < count; ++i) model_input[i] = c_in * x[i];
}

// ---- the low band of x': the sums of blocks, halved or quartered, added to their elements ----

// Neighbouring floats, in whole pairs: as many as one register holds.
#if defined(__AVX512F__)
constexpr int PAIR_BYTES = 64;
#define NEIGHBOURS 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#elif defined(__AVX__)
constexpr int PAIR_BYTES = 32;
#define NEIGHBOURS 1, 0, 3, 2, 5, 4, 7, 6
#else
constexpr int PAIR_BYTES = 16;
#define NEIGHBOURS 1, 0, 3, 2
#endif
typedef float Pairs __attribute__((vector_size(PAIR_BYTES)));
constexpr int64_t PAIRS = PAIR_BYTES / sizeof(float);

inline Pairs load_pairs(const float* source) {
  Pairs pairs;
  std::memcpy(&pairs, source, sizeof pairs);
  return pairs;
}

// Either of a pair adds the other, in whichever order: a sum of two is the same.
inline Pairs with_neighbour(Pairs pairs) {
#if defined(__clang__)
  return pairs + __builtin_shufflevector(pairs, pairs, NEIGHBOURS);
#else
  typedef int32_t Lanes __attribute__((vector_size(PAIR_BYTES)));
  return pairs + __builtin_shuffle(pairs, Lanes{NEIGHBOURS});
#endif
}

// An image row of a strip: x', to which the band's mean is added, and what the band is made of. x is there where l_x is not 0.
struct BandLine {
  float* next;
  const float *m0, *x;

  BandLine at(int64_t i) const { return {next + i, m0 + i, x ? x + i : nullptr}; }
};

template <bool with_x>
Pairs band_pairs(const BandRow& band, const BandLine& line, int64_t i) {
  const Pairs value = band.l_next * load_pairs(line.next + i) + band.l_m0 * load_pairs(line.m0 + i);
  if constexpr (with_x) return value + band.l_x * load_pairs(line.x + i);
  return value;
}

template <bool with_x>
float band_value(const BandRow& band, const BandLine& line, int64_t i) {
  const float value = band.l_next * line.next[i] + band.l_m0 * line.m0[i];
  if constexpr (with_x) return value + band.l_x * line.x[i];
  return value;
}

template <bool with_x>
float last_pair(const BandRow& band, const BandLine& line, int64_t i, bool both) {
  return band_value<with_x>(band, line, i) + (both ? band_value<with_x>(band, line, i + 1) : 0.0f);
}

inline void add_pairs(Pairs mean, float* target) {
  const Pairs sum = load_pairs(target) + mean;
  std::memcpy(target, &sum, sizeof sum);
}

// Two image rows of `width` elements.
template <bool with_x>
void add_band(const BandRow& band_in_memory, const BandLine& upper, const BandLine& lower, int64_t width) {
  const BandRow band = band_in_memory;
  int64_t i = 0;
  for (; i + PAIRS <= width; i += PAIRS) {
    const Pairs sums = with_neighbour(band_pairs<with_x>(band, upper, i)) + with_neighbour(band_pairs<with_x>(band, lower, i));
    add_pairs(sums * 0.25f, upper.next + i);
    add_pairs(sums * 0.25f, lower.next + i);
  }
  for (; i < width; i += 2) {
    const bool both = i + 1 < width;
    const float mean = (last_pair<with_x>(band, upper, i, both) + last_pair<with_x>(band, lower, i, both)) * 0.25f;
    for (const BandLine* line : {&upper, &lower}) {
      line->next[i] += mean;
      if (both) line->next[i + 1] += mean;
    }
  }
}

// One row: in two dimensions the last of an odd number, below which there are zeros.
template <bool with_x>
void add_last_band(const BandRow& band_in_memory, const BandLine& line, int64_t width, int band_dims) {
  const BandRow band = band_in_memory;
  const float below = band_dims == 2 ? 0.0f : -0.0f, share = band_dims == 2 ? 0.25f : 0.5f;  // -0 adds nothing, to a -0 either
  int64_t i = 0;
  for (; i + PAIRS <= width; i += PAIRS)
    add_pairs((with_neighbour(band_pairs<with_x>(band, line, i)) + below) * share, line.next + i);
  for (; i < width; i += 2) {
    const bool both = i + 1 < width;
    const float mean = (last_pair<with_x>(band, line, i, both) + below) * share;
    line.next[i] += mean;
    if (both) line.next[i + 1] += mean;
  }
}

// Room for one tensor's tile each.
enum Buffer { ABSENT, X, F, U, M1, M2, Y, GRAD, NOISE, V, SCALED_NOISE, SCALED_GRAD, OUT, M0, Y_OUT, MODEL_INPUT, BUFFERS };

// One sample's step, some elements of it at a time.
class Stepper {
 public:
  Stepper(const StepCall& call, int64_t index)
      : call(call), a(call.operands), index(index), sample(call.samples[index]), row(*sample.row), terms(sample.terms & ~TERM_BAND),
        reads(tensor_terms(terms)), common(!(terms & ~(COMMON_TERMS | TERM_VARIANCE))), masks(terms),
        guided(terms & TERM_CHANNELS ? guided_numel(row, a.sample_numel, a.channel_numel) : a.sample_numel) {
    if (!common) std::memset(buffers[ABSENT], 0, sizeof buffers[ABSENT]);
  }

  // Elements [begin, begin + count) to where `out` says, m0 as well where it is wanted. Of noise made here begin must be a
  // multiple of 4, or begin % 4 + count at most TILE.
  void compute(int64_t begin, int64_t count, const TileOutputs& out, bool keep_m0) {
    TileInputs in{};
    in.x = read(true, a.x_dtype, a.x, X, begin, count);
    in.f = read(true, a.f_dtype, a.f, F, begin, count);
    in.u = read(reads & TERM_GUIDANCE, a.f_dtype, a.u, U, begin, count);
    in.m1 = read(reads & TERM_M1, a.x_dtype, a.m1, M1, begin, count);
    in.m2 = read(reads & TERM_M2, a.x_dtype, a.m2, M2, begin, count);
    in.y = read(reads & TERM_Y, a.x_dtype, a.y, Y, begin, count);
    read_noise(in, begin, count);
    if (common) {
      STEP_TILES.of[(terms & COMMON_TERMS) + (keep_m0 ? KEEP_M0 : 0)](row, in, out, count);
    } else {
      in.rescale = sample.rescale;
      in.threshold = sample.threshold;
      in.guided = guided - begin;
      step_tile_any(row, masks, in, out, count);
    }
  }

  // z and grad, times the standard deviation, or variance, that the model has learned.
  void read_noise(TileInputs& in, int64_t begin, int64_t count) {
    in.grad = read(reads & TERM_GRAD, a.x_dtype, a.grad, GRAD, begin, count);
    in.z = read((reads & TERM_NOISE) && a.noise.data, a.x_dtype, a.noise, NOISE, begin, count);
    if ((terms & TERM_NOISE) && !a.noise.data) {
      const int64_t skipped = begin % 4;  // of the first counter's normals
      normal_tile(sample.seed, static_cast<uint32_t>(row.draw), STREAM_STEP, begin - skipped, skipped + count, buffers[NOISE]);
      in.z = buffers[NOISE] + skipped;
    }
    if ((terms & TERM_VARIANCE) && (terms & (TERM_NOISE | TERM_GRAD))) {
      const float* v = read(true, a.f_dtype, a.v, V, begin, count);
      learned_tile(row, v, terms & TERM_NOISE ? in.z : nullptr, buffers[SCALED_NOISE],
                   terms & TERM_GRAD ? in.grad : nullptr, buffers[SCALED_GRAD], count);
      in.z = buffers[SCALED_NOISE];
      in.grad = buffers[SCALED_GRAD];
    }
  }

  // float32 goes straight to its tensor, but for what is to go past the caches; nullptr for all else.
  float* direct(const Batch& tensor, int64_t begin) const {
    const bool straight = a.x_dtype == Dtype::float32 && tensor.data && !call.stream;
    return straight ? reinterpret_cast<float*>(at(tensor, index)) + begin : nullptr;
  }

  float* target(const Batch& tensor, Buffer buffer, int64_t begin) {
    float* straight = direct(tensor, begin);
    return straight ? straight : buffers[buffer];
  }

  // What was computed into a buffer, to its tensor.
  void write(const float* tile, const Batch& tensor, Buffer buffer, int64_t begin, int64_t count) {
    if (tensor.data && tile == buffers[buffer]) store_tile(a.x_dtype, tile, at(tensor, index), begin, count, call.stream);
  }

  // The model's next input, of x' as its tensor holds it. Writes to `next`.
  void write_model_input(float* next, int64_t begin, int64_t count) {
    if (!a.model_input.data) return;
    if (a.x_dtype != Dtype::float32) as_stored(a.x_dtype, next, count);
    model_input_tile(row.c_in_next, next, buffers[MODEL_INPUT], count);
    for (int64_t half = 0; half <= a.doubled; ++half)
      store_tile(a.f_dtype, buffers[MODEL_INPUT], at(a.model_input, index + half * a.batch), begin, count, call.stream);
  }

  void step(int64_t begin, int64_t count) {
    if (half_tiles && count >= BLOCK) {
      const int64_t whole = count / BLOCK * BLOCK;
      step_in_registers(begin, whole);
      if (whole == count) return;
      begin += whole;
      count -= whole;
    }
    const TileOutputs out{target(a.out, OUT, begin), target(a.m0, M0, begin), target(a.y_out, Y_OUT, begin)};
    compute(begin, count, out, a.m0.data != nullptr);
    write(out.x, a.out, OUT, begin, count);
    write(out.m0, a.m0, M0, begin, count);
    write(out.y, a.y_out, Y_OUT, begin, count);
    write_model_input(out.x, begin, count);
  }

  void step_in_registers(int64_t begin, int64_t count) {
    TileInputs in{};
    read_noise(in, begin, count);
    alignas(64) uint16_t next[TILE], m0[TILE];
    const auto halves = [&](const Batch& tensor) { return reinterpret_cast<uint16_t*>(at(tensor, index)) + begin; };
    const auto given = [&](unsigned term, const Batch& tensor) { return terms & term ? halves(tensor) : nullptr; };
    const auto target = [&](const Batch& tensor, uint16_t* buffer) {
      return !tensor.data ? nullptr : call.stream ? buffer : halves(tensor);
    };
    const HalfTile tile{halves(a.x), halves(a.f), given(TERM_GUIDANCE, a.u), given(TERM_M1, a.m1), in.z, target(a.out, next), target(a.m0, m0)};
    half_tiles->of[half_variant(terms) + (tile.m0 ? KEEP_HALF_M0 : 0)](row, tile, count);
    if (!call.stream) return;
    const auto stream = [&](const uint16_t* from, const Batch& tensor) {
      stream_bytes(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(halves(tensor)), count * sizeof(uint16_t));
    };
    stream(next, a.out);
    if (tile.m0) stream(m0, a.m0);
  }

  // A strip of whole blocks. room: for three times as many elements.
  template <bool with_x>
  void step_by_band(const BandRow& band, int64_t begin, int64_t end, float* room) {
    const int64_t length = end - begin;
    float* out = direct(a.out, begin);
    float* m0_out = direct(a.m0, begin);
    const BandLine strip{out ? out : room, m0_out ? m0_out : room + length, with_x ? room + 2 * length : nullptr};
    float* m0 = const_cast<float*>(strip.m0);
    for (int64_t done = 0; done < length;) {
      const int64_t first = begin + done, most = TILE - first % 4, count = length - done < most ? length - done : most;
      const TileOutputs to{strip.next + done, m0 + done, target(a.y_out, Y_OUT, first)};
      if constexpr (with_x) {  // before an output takes its place
        float* kept = room + 2 * length + done;
        const float* x = widen_tile(a.x_dtype, at(a.x, index), first, count, kept);
        if (x != kept) std::memcpy(kept, x, count * sizeof(float));
      }
      compute(first, count, to, true);
      write(to.y, a.y_out, Y_OUT, first, count);
      done += count;
    }
    // A strip begins with a pair of image rows; in one dimension, anywhere in a row.
    int64_t row_of_plane = begin / a.width % a.height, column = begin % a.width;
    for (int64_t done = 0; done < length;) {
      const int64_t left = length - done, width = left < a.width - column ? left : a.width - column;
      const bool pair = row_of_plane + 1 < a.height;
      if (pair) add_band<with_x>(band, strip.at(done), strip.at(done + a.width), width);
      else add_last_band<with_x>(band, strip.at(done), width, a.band_dims);
      done += pair ? 2 * a.width : width;
      row_of_plane = row_of_plane + 2 < a.height ? row_of_plane + 2 : 0;
      column = 0;
    }
    for (int64_t done = 0; done < length; done += TILE) {
      const int64_t count = length - done < TILE ? length - done : TILE;
      if (!out) store_tile(a.x_dtype, strip.next + done, at(a.out, index), begin + done, count, call.stream);
      if (!m0_out && a.m0.data) store_tile(a.x_dtype, m0 + done, at(a.m0, index), begin + done, count, call.stream);
      write_model_input(strip.next + done, begin + done, count);
    }
  }

 private:
  const StepCall& call;
  const StepOperands& a;
  const int64_t index;
  const Sample& sample;
  const StepRow& row;
  const unsigned terms, reads;
  const bool common;
  const TermMasks masks;
  const int64_t guided;
  const HalfTiles* const half_tiles = tiles_of_halves();  // nullptr: through buffers of float32
  alignas(64) float buffers[BUFFERS][TILE];

  const float* read(bool present, Dtype dtype, const Batch& tensor, Buffer buffer, int64_t begin, int64_t count) {
    return present ? widen_tile(dtype, at(tensor, index), begin, count, buffers[buffer]) : buffers[ABSENT];
  }

  const HalfTiles* tiles_of_halves() const {
    const bool others = (terms & ~(half_terms(KEEP_HALF_M0 - 1) | TERM_VARIANCE)) || a.y_out.data || a.model_input.data;
    if (a.x_dtype == Dtype::float32 || a.x_dtype != a.f_dtype || others) return nullptr;
    return a.x_dtype == Dtype::float16 ? &FLOAT16_TILES : &BFLOAT16_TILES;
  }

  static char* at(const Batch& batch, int64_t sample) { return batch.data + sample * batch.stride; }
};

void step(const StepCall& call, int64_t index, int64_t begin, int64_t end) {
  Stepper stepper(call, index);
  for (; begin < end; begin += TILE) stepper.step(begin, end - begin < TILE ? end - begin : TILE);
#if defined(__SSE2__)
  if (call.stream) _mm_sfence();
#endif
}

void step_by_band(const StepCall& call, int64_t index, const Strips& strips, int64_t first, int64_t last) {
  const Sample& sample = call.samples[index];
  if (!(sample.terms & TERM_BAND)) {  // others of its batch do
    for (int64_t begin = strips.begin(first), end = strips.end(last - 1); begin < end;) {
      const int64_t next = (begin / TILE + 1) * TILE < end ? (begin / TILE + 1) * TILE : end;
      step(call, index, begin, next);
      begin = next;
    }
    return;
  }
  const BandRow& band = *reinterpret_cast<const BandRow*>(sample.row + 1);
  alignas(64) float tiles[3 * TILE];
  std::vector<float> more(strips.length > TILE ? 3 * strips.length : 0);  // one pair of long image rows
  float* room = more.empty() ? tiles : more.data();
  Stepper stepper(call, index);
  for (; first < last; ++first) {
    if (band.l_x == 0.0f) stepper.step_by_band<false>(band, strips.begin(first), strips.end(first), room);
    else stepper.step_by_band<true>(band, strips.begin(first), strips.end(first), room);
  }
#if defined(__SSE2__)
  if (call.stream) _mm_sfence();
#endif
}

// ---- sums over a sample ----

void moments_tile(const float* tile, double* sums) {
  alignas(64) double values[TILE / 2], squares[TILE / 2];
  for (int64_t i = 0; i < TILE / 2; ++i) {
    const double low = tile[i], high = tile[i + TILE / 2];
    values[i] = low + high;
    squares[i] = low * low + high * high;  // a float32's square is exact
  }
  sums[0] = tree_sum(values, TILE / 2);
  sums[1] = tree_sum(squares, TILE / 2);
}

void moments(const MomentsOperands& operands, int64_t index, float g, int64_t guided, int64_t begin, int64_t count,
             double* sums) {
  alignas(64) float f[TILE], u[TILE], fhat[TILE];
  const auto read = [&](const Batch& batch, float* buffer) {
    const float* tile = widen_tile(operands.dtype, batch.data + index * batch.stride, begin, count, buffer);
    if (tile != buffer) std::memcpy(buffer, tile, count * sizeof(float));
    for (int64_t i = count; i < TILE; ++i) buffer[i] = 0.0f;
  };
  read(operands.f, f);
  moments_tile(f, sums);
  if (!operands.u.data) return;
  read(operands.u, u);
  const int64_t guided_here = g != 1.0f ? guided - begin : 0;
  for (int64_t i = 0; i < TILE; ++i) fhat[i] = guided_value(g, f[i], u[i], 0u - static_cast<uint32_t>(i < guided_here));
  moments_tile(fhat, sums + 2);
}

#define EPSKERNELS_TEXT(name) #name
#define EPSKERNELS_NAME(name) EPSKERNELS_TEXT(name)

}  // namespace

extern const CpuKernels kernels{EPSKERNELS_NAME(EPSKERNELS_CAPABILITY), &step, &step_by_band, &moments, &normal};

}  // namespace epskernels::EPSKERNELS_CAPABILITY
