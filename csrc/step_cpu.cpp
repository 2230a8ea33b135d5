// The step on the CPU, tile by tile: widen to float32, step_value on every element, round at the store.
// Compiled once per instruction set, with EPSKERNELS_CAPABILITY naming it; the arithmetic is the same in all of them.
#include "step_cpu.h"

#include <utility>

#include "halves.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define NO_LOOP_DEPENDENCE _Pragma("clang loop vectorize(assume_safety)")
#else
#define NO_LOOP_DEPENDENCE _Pragma("GCC ivdep")
#endif

namespace epskernels::EPSKERNELS_CAPABILITY {
namespace {

static_assert(TILE % 64 == 0);

// ---- float16 and bfloat16 ----

void widen_tile_float16(const uint16_t* source, float* tile, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(tile + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
  for (; i < count; ++i) tile[i] = widen_float16(source[i]);
}

void round_tile_float16(const float* tile, uint16_t* target, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) target[i] = round_float16(tile[i]);
}

// The tile's values as float32: the tensor's own memory where it is float32, else `buffer`.
const float* widen_tile(Dtype dtype, const char* sample, int64_t begin, int64_t count, float* buffer) {
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(sample) + begin;
  const uint16_t* source = reinterpret_cast<const uint16_t*>(sample) + begin;
  if (dtype == Dtype::float16) {
    widen_tile_float16(source, buffer, count);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = widen_bfloat16(source[i]);
  }
  return buffer;
}

void round_tile(Dtype dtype, const float* tile, char* sample, int64_t begin, int64_t count) {
  uint16_t* target = reinterpret_cast<uint16_t*>(sample) + begin;
  if (dtype == Dtype::float16) {
    round_tile_float16(tile, target, count);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = round_bfloat16(tile[i]);
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
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // plain _mm512_mul_epu32 warns in GCC 12
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
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
    if (dtype == Dtype::float32) {
      std::memcpy(out + done * sizeof(float), z, count * sizeof(float));
    } else {
      round_tile(dtype, z, out, done, count);
    }
  }
}

// ---- the step ----

struct TileInputs {
  const float *x, *f, *u, *m1, *m2, *grad, *z;
};

constexpr unsigned KEEP_M0 = STEP_VALUE_TERMS;  // one more bit: m0 is wanted

// One combination of terms, so that the loop over the tile has no branch. `out` may be `x`, and `m0` any other input.
template <unsigned variant>
void step_tile(const StepRow& row_in_memory, const TileInputs& in, float* out, float* m0_out, int64_t count) {
  constexpr unsigned terms = variant % STEP_VALUE_TERMS;
  const StepRow row = row_in_memory;
  const float *x = in.x, *f = in.f, *u = in.u, *m1 = in.m1, *m2 = in.m2, *grad = in.grad, *z = in.z;
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
    float m0;
    const float next = step_value(row, terms, element, m0);
    if constexpr ((variant & KEEP_M0) != 0) m0_out[i] = m0;
    out[i] = next;
  }
}

struct StepTiles {
  void (*of[2 * STEP_VALUE_TERMS])(const StepRow&, const TileInputs&, float*, float*, int64_t);
};
template <unsigned... variants>
constexpr StepTiles step_tiles(std::integer_sequence<unsigned, variants...>) {
  return {{&step_tile<variants>...}};
}
constexpr StepTiles STEP_TILES = step_tiles(std::make_integer_sequence<unsigned, 2 * STEP_VALUE_TERMS>{});

// z and grad times the standard deviation, or variance, that the model has learned.
void learned_tile(const StepRow& row, const float* v, const float* z, float* scaled_z, const float* grad,
                  float* scaled_grad, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float s = learned_sigma(row, v[i]);
    if (z) scaled_z[i] = s * z[i];
    if (grad) scaled_grad[i] = (s * s) * grad[i];
  }
}

void step(const StepCall& call, int64_t index, int64_t begin, int64_t end) {
  const StepOperands& operands = call.operands;
  const Sample& sample = call.samples[index];
  const StepRow& row = *sample.row;
  const unsigned terms = sample.terms;
  const auto at = [index](const Batch& batch) { return batch.data + index * batch.stride; };
  const bool direct = operands.x_dtype == Dtype::float32, keep_m0 = operands.m0.data != nullptr;
  alignas(64) float buffers[12][TILE];
  for (; begin < end; begin += TILE) {
    const int64_t count = end - begin < TILE ? end - begin : TILE;
    TileInputs in{};
    in.x = widen_tile(operands.x_dtype, at(operands.x), begin, count, buffers[0]);
    in.f = widen_tile(operands.f_dtype, at(operands.f), begin, count, buffers[1]);
    if (terms & TERM_GUIDANCE) in.u = widen_tile(operands.f_dtype, at(operands.u), begin, count, buffers[2]);
    if (terms & TERM_M1) in.m1 = widen_tile(operands.x_dtype, at(operands.m1), begin, count, buffers[3]);
    if (terms & TERM_M2) in.m2 = widen_tile(operands.x_dtype, at(operands.m2), begin, count, buffers[4]);
    if (terms & TERM_GRAD) in.grad = widen_tile(operands.x_dtype, at(operands.grad), begin, count, buffers[5]);
    if ((terms & TERM_NOISE) && operands.noise.data != nullptr) {
      in.z = widen_tile(operands.x_dtype, at(operands.noise), begin, count, buffers[6]);
    } else if (terms & TERM_NOISE) {
      normal_tile(sample.seed, static_cast<uint32_t>(row.draw), STREAM_STEP, begin, count, buffers[6]);
      in.z = buffers[6];
    }
    if ((terms & TERM_VARIANCE) && (terms & (TERM_NOISE | TERM_GRAD))) {
      const float* v = widen_tile(operands.f_dtype, at(operands.v), begin, count, buffers[7]);
      learned_tile(row, v, in.z, buffers[8], in.grad, buffers[9], count);
      if (in.z) in.z = buffers[8];
      if (in.grad) in.grad = buffers[9];
    }
    float* out = direct ? reinterpret_cast<float*>(at(operands.out)) + begin : buffers[10];
    float* m0 = direct && keep_m0 ? reinterpret_cast<float*>(at(operands.m0)) + begin : buffers[11];
    STEP_TILES.of[terms % STEP_VALUE_TERMS + (keep_m0 ? KEEP_M0 : 0)](row, in, out, m0, count);
    if (!direct) {
      round_tile(operands.x_dtype, out, at(operands.out), begin, count);
      if (keep_m0) round_tile(operands.x_dtype, m0, at(operands.m0), begin, count);
    }
  }
}

#define EPSKERNELS_TEXT(name) #name
#define EPSKERNELS_NAME(name) EPSKERNELS_TEXT(name)

}  // namespace

extern const CpuKernels kernels{EPSKERNELS_NAME(EPSKERNELS_CAPABILITY), &step, &normal};

}  // namespace epskernels::EPSKERNELS_CAPABILITY
