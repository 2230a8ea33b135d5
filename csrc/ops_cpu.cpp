// torch.ops.epskernels.* on the CPU: checks everything before anything is written, then shares the tiles of all samples out
// over torch's threads. The schemas are in epskernels/ops.py.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "arguments.h"
#include "cpu_capability.h"

namespace epskernels {
namespace {

using torch::headeronly::ScalarType;

// Elements that are worth a thread of their own.
constexpr int64_t GRAIN_STEP = 32768, GRAIN_NOISE = 4096;

// ---- each sample's row ----

void check_row(const StepRow& row, int64_t index) {
  const float* values = reinterpret_cast<const float*>(&row);
  for (int column = 0; column < ROW_COLUMNS; ++column) {
    const bool is_clip = &values[column] == &row.clip;
    if (is_clip ? !(row.clip >= 0.0f) : !std::isfinite(values[column]))
      fail("rows: expected finite coefficients and clip >= 0, got ", values[column], " in row ", index, ", column ",
           column);
  }
  if (!(row.draw >= 0.0f && row.draw < 0x1p24f && row.draw == std::floor(row.draw)))
    fail("rows: expected draw to be an integer in [0, 2^24), got ", row.draw, " in row ", index);
}

void check_term(bool asked, bool present, int64_t index, const char* column, const char* argument) {
  if (asked && !present) fail(argument, ": missing, and row ", index, " needs it (", column, ")");
}

// Finds and checks every sample's row; returns whether some sample makes its noise here.
bool read_rows(const StepViews& a, std::vector<Sample>& samples) {
  const bool one_row = a.index.dim == 0 && !a.seeds;
  samples.resize(one_row ? 1 : a.batch());
  bool draws = false;
  for (int64_t b = 0; b < static_cast<int64_t>(samples.size()); ++b) {
    const int64_t i = integer_at(a.index, b);
    if (i < 0 || i >= a.rows.sizes[0]) fail("index: expected values in [0, ", a.rows.sizes[0], "), got ", i);
    const StepRow& row = *reinterpret_cast<const StepRow*>(a.rows.data + i * a.rows.strides[0] * sizeof(float));
    const bool checked = b > 0 && samples[b - 1].row == &row;
    unsigned terms = checked ? samples[b - 1].terms : row_terms(row);
    if (!checked) {
      check_row(row, i);
      check_term(terms & TERM_GUIDANCE, bool(a.u), i, "g is not 1", "u");
      check_term(terms & TERM_M1, bool(a.m1), i, "c_m1 is not 0", "m1");
      check_term(terms & TERM_M2, bool(a.m2), i, "c_m2 is not 0", "m2");
      check_term(terms & TERM_NOISE, a.seeds || a.noise, i, "c_noise is not 0", "seeds or noise");
      check_term(terms & TERM_VARIANCE, bool(a.v), i, "logvar_min and logvar_max are not 0", "v");
      if (!a.grad) terms &= ~TERM_GRAD;
    }
    samples[b] = {&row, terms, a.seeds ? static_cast<uint64_t>(integer_at(a.seeds, b)) : 0};
    draws |= (terms & TERM_NOISE) && !a.noise;
  }
  if (one_row) samples.resize(a.batch(), samples[0]);
  return draws;
}

// ---- layouts: samples contiguous in themselves are used in place, others through a contiguous copy ----

struct Layouts {
  std::vector<Tensor> copies;  // held for the length of a call
  std::vector<std::pair<Tensor, Tensor>> results;

  Batch input(const View& view, const Tensor& tensor) {
    if (view.samples_contiguous()) return {view.data, view.batch_stride()};
    copies.push_back(torch::stable::contiguous(tensor));
    return contiguous(view, copies.back());
  }
  Batch input(const View& view, const OptionalTensor& tensor) { return view ? input(view, *tensor) : Batch{}; }

  Batch output(const Tensor& tensor) {
    const View view("", tensor);
    if (view.samples_contiguous()) return {view.data, view.batch_stride()};
    results.emplace_back(tensor, torch::stable::new_empty(tensor, tensor.sizes()));
    return contiguous(view, results.back().second);
  }
  void finish() {
    for (auto& [target, result] : results) torch::stable::copy_(target, result);
  }

 private:
  static Batch contiguous(const View& view, const Tensor& copy) {
    return {static_cast<char*>(copy.data_ptr()), view.numel() / view.sizes[0] * view.element_size()};
  }
};

// A new tensor as torch.empty_like makes it.
Tensor allocate_like(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return torch::stable::empty_like(tensor);
  int32_t dtype;
  aoti_torch_get_dtype(tensor.get(), &dtype);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(tensor.dim(), tensor.sizes().data(), tensor.strides().data(),
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// ---- the step ----

void run(const StepCall& call, int64_t batch, bool draws) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tiles = (call.sample_numel + TILE - 1) / TILE;
  const int64_t tile_numel = std::min(TILE, call.sample_numel);
  const int64_t grain = std::max<int64_t>(1, (draws ? GRAIN_NOISE : GRAIN_STEP) / tile_numel);
  torch::stable::parallel_for(0, batch * tiles, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t sample = first / tiles, tile = first % tiles;
      const int64_t count = std::min(last - first, tiles - tile);
      kernels.step(call, sample, tile * TILE, std::min((tile + count) * TILE, call.sample_numel));
      first += count;
    }
  });
}

// Those that are absent are allocated (m0 where `make_m0` says so), once all inputs are known to be good.
struct Outputs {
  OptionalTensor out, m0;
  bool make_m0 = false;
  const char* out_name = "out";
};

void step_into(const StepArguments& tensors, Outputs& outputs) {
  const StepViews a(tensors);
  check_step(a);
  std::vector<Sample> samples;
  const bool draws = read_rows(a, samples);
  check_outputs(optional_view(outputs.out_name, outputs.out), optional_view("m0", outputs.m0), a);
  if (!outputs.out) outputs.out = allocate_like(tensors.x);
  if (outputs.make_m0) outputs.m0 = allocate_like(tensors.x);

  Layouts layouts;
  StepCall call;
  call.x_dtype = float_dtype(a.x);
  call.f_dtype = float_dtype(a.f);
  call.x = layouts.input(a.x, tensors.x);
  call.f = layouts.input(a.f, tensors.f);
  call.u = layouts.input(a.u, tensors.u);
  call.m1 = layouts.input(a.m1, tensors.m1);
  call.m2 = layouts.input(a.m2, tensors.m2);
  call.v = layouts.input(a.v, tensors.v);
  call.grad = layouts.input(a.grad, tensors.grad);
  call.noise = layouts.input(a.noise, tensors.noise);
  call.out = layouts.output(*outputs.out);
  if (outputs.m0) call.m0 = layouts.output(*outputs.m0);
  call.samples = samples.data();
  call.sample_numel = a.sample_numel();
  run(call, a.batch(), draws);
  layouts.finish();
}

// ---- the ops ----

#define STEP_PARAMETERS                                                                                     \
  Tensor x, Tensor f, Tensor rows, Tensor index, OptionalTensor u, OptionalTensor m1, OptionalTensor m2,    \
      OptionalTensor v, OptionalTensor grad, OptionalTensor noise, OptionalTensor seeds
#define STEP_ARGUMENTS \
  { x, f, rows, index, u, m1, m2, v, grad, noise, seeds }

Tensor step(STEP_PARAMETERS) {
  Outputs outputs;
  step_into(STEP_ARGUMENTS, outputs);
  return std::move(*outputs.out);
}

std::tuple<Tensor, Tensor> step_m0(STEP_PARAMETERS) {
  Outputs outputs;
  outputs.make_m0 = true;
  step_into(STEP_ARGUMENTS, outputs);
  return {std::move(*outputs.out), std::move(*outputs.m0)};
}

void step_out(STEP_PARAMETERS, Tensor out, OptionalTensor m0) {
  Outputs outputs{std::move(out), std::move(m0)};
  step_into(STEP_ARGUMENTS, outputs);
}

void step_(STEP_PARAMETERS, OptionalTensor m0) {
  Outputs outputs{x, std::move(m0), false, "x"};
  step_into(STEP_ARGUMENTS, outputs);
}

Tensor normal(Tensor seeds_tensor, std::vector<int64_t> shape, ScalarType dtype, int64_t draw, int64_t stream) {
  const View seeds("seeds", seeds_tensor);
  if (seeds.dim != 1) fail("seeds: expected shape (B,), got ", seeds.shape());
  const int64_t batch = seeds.sizes[0];
  check_integers(seeds, false, batch);
  if (batch == 0) fail("seeds: expected at least one seed, got none");
  int64_t sample_numel = 1;
  for (const int64_t size : shape) {
    if (size < 1) fail("shape: expected sizes of at least 1, got ", size);
    if (sample_numel > (int64_t{1} << 62) / size / batch) fail("shape: too many elements for a tensor");
    sample_numel *= size;
  }
  if (draw < 0 || draw >> 32) fail("draw: expected a value in [0, 2^32), got ", draw);
  if (stream < 0 || stream >> 32) fail("stream: expected a value in [0, 2^32), got ", stream);
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::BFloat16)
    fail("dtype: expected float32, float16 or bfloat16, got ", dtype_name(static_cast<int32_t>(dtype)));

  shape.insert(shape.begin(), batch);
  Tensor out = torch::stable::new_empty(seeds_tensor, shape, dtype);
  const View view("out", out);
  const Dtype out_dtype = float_dtype(view);
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tiles = (sample_numel + TILE - 1) / TILE;
  const int64_t grain = std::max<int64_t>(1, GRAIN_NOISE / std::min(TILE, sample_numel));
  torch::stable::parallel_for(0, batch * tiles, grain, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) {
      const int64_t sample = first / tiles, begin = first % tiles * TILE;
      kernels.normal(static_cast<uint64_t>(integer_at(seeds, sample)), static_cast<uint32_t>(draw),
                     static_cast<uint32_t>(stream), out_dtype,
                     view.data + (sample * sample_numel + begin) * view.element_size(), begin,
                     std::min(begin + TILE, sample_numel));
    }
  });
  return out;
}

}  // namespace
}  // namespace epskernels

STABLE_TORCH_LIBRARY_IMPL(epskernels, CPU, library) {
  library.impl("step", TORCH_BOX(&epskernels::step));
  library.impl("step_m0", TORCH_BOX(&epskernels::step_m0));
  library.impl("step_out", TORCH_BOX(&epskernels::step_out));
  library.impl("step_", TORCH_BOX(&epskernels::step_));
  library.impl("normal", TORCH_BOX(&epskernels::normal));
}
