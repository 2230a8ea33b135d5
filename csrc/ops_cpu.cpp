// torch.ops.epskernels.* on the CPU: every argument is checked here, before anything is written; then the tiles of all
// samples are shared out over torch's threads. The schemas, and the same checks for other backends, are in epskernels/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "cpu_capability.h"
#include "step_cpu.h"

#if defined(EPSKERNELS_X86)
#include <cpuid.h>
#endif

namespace epskernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements that are worth a thread of their own.
constexpr int64_t GRAIN_STEP = 32768, GRAIN_NOISE = 4096;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "epskernels: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// ---- the instruction set ----

#if defined(EPSKERNELS_X86)
// Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool machine_has(const CpuKernels& kernels) {
#if defined(EPSKERNELS_X86)
  if (&kernels == &avx2::kernels) return __builtin_cpu_supports("avx2") && has_f16c();
  if (&kernels == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c();
#endif
  return &kernels == &generic::kernels;
}

std::vector<const CpuKernels*> available_kernels() {
  std::vector<const CpuKernels*> available{&generic::kernels};
#if defined(EPSKERNELS_X86)
  __builtin_cpu_init();
  for (const CpuKernels* kernels : {&avx2::kernels, &avx512::kernels})
    if (machine_has(*kernels)) available.push_back(kernels);
#endif
  return available;
}

std::atomic<const CpuKernels*>& chosen_kernels() {
  static std::atomic<const CpuKernels*> chosen{available_kernels().back()};
  return chosen;
}

// ---- reading and checking the arguments ----

const char* dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},   {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"}};
  for (const auto& [known, name] : names)
    if (dtype == known) return name;
  return "another dtype";
}

// A tensor's description, read once.
struct View {
  const char* name = nullptr;  // without one, the argument is absent
  char* data = nullptr;
  int64_t dim = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;

  View() = default;
  View(const char* name, const Tensor& tensor) : name(name) {
    if (!tensor.defined())
      fail("expected a value of type 'Tensor' for argument '", name, "' but instead found type 'NoneType'");
    data = static_cast<char*>(tensor.data_ptr());
    const auto tensor_sizes = tensor.sizes();
    dim = static_cast<int64_t>(tensor_sizes.size());
    sizes = tensor_sizes.data();
    strides = tensor.strides().data();
    aoti_torch_get_dtype(tensor.get(), &dtype);
    if (!tensor.is_cpu()) fail(name, ": expected a tensor on cpu, as x is, got one on another device");
    if (!data && numel() > 0) fail(name, ": expected a tensor with memory, got one whose storage was freed");
  }
  // Not by its data: a tensor without elements has none, and is there all the same.
  explicit operator bool() const { return name != nullptr; }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
    return count;
  }
  int64_t element_size() const {
    return dtype == aoti_torch_dtype_int64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
  }
  int64_t batch_stride() const { return strides[0] * element_size(); }
  bool samples_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d > 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
  std::string shape() const {
    std::string text = "(";
    for (int64_t d = 0; d < dim; ++d) text += std::to_string(sizes[d]) + (d + 1 < dim || dim == 1 ? "," : "") + (d + 1 < dim ? " " : "");
    return text + ")";
  }
};

Dtype float_dtype(const View& view) {
  if (view.dtype == aoti_torch_dtype_float32()) return Dtype::float32;
  if (view.dtype == aoti_torch_dtype_float16()) return Dtype::float16;
  if (view.dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  fail(view.name, ": expected dtype float32, float16 or bfloat16, got ", dtype_name(view.dtype));
}

void check_same_shape(const View& view, const View& other) {
  if (view.dim == other.dim && std::equal(view.sizes, view.sizes + view.dim, other.sizes)) return;
  fail(view.name, ": expected shape ", other.shape(), " as ", other.name, " has, got ", view.shape());
}

void check_like(const View& view, const View& other) {
  if (!view) return;  // an optional argument
  check_same_shape(view, other);
  if (view.dtype != other.dtype)
    fail(view.name, ": expected dtype ", dtype_name(other.dtype), " as ", other.name, " has, got ",
         dtype_name(view.dtype));
}

void check_integers(const View& view, bool may_be_scalar, int64_t batch) {
  if (view.dtype != aoti_torch_dtype_int64())
    fail(view.name, ": expected dtype int64, got ", dtype_name(view.dtype));
  if (may_be_scalar && view.dim == 0) return;
  if (view.dim != 1 || view.sizes[0] != batch)
    fail(view.name, ": expected shape ", may_be_scalar ? "() or (" : "(", batch, ",), got ", view.shape());
}

int64_t integer_at(const View& view, int64_t i) {
  return reinterpret_cast<const int64_t*>(view.data)[view.dim == 0 ? 0 : i * view.strides[0]];
}

// A tensor's first byte, and the one after its last.
std::pair<const char*, const char*> extent(const View& view) {
  int64_t last = 0;
  for (int64_t d = 0; d < view.dim; ++d) last += (view.sizes[d] - 1) * view.strides[d];
  return {view.data, view.data + (last + 1) * view.element_size()};
}

bool same_memory(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// Samples of two tensors that take turns in one buffer, as channel halves do.
bool interleaved(const View& a, const View& b) {
  if (a.dim != b.dim || !a.samples_contiguous() || !b.samples_contiguous()) return false;
  const int64_t stride = a.batch_stride();
  if (stride != b.batch_stride() || stride == 0) return false;
  const int64_t distance = ((b.data - a.data) % stride + stride) % stride;
  return distance >= a.numel() / a.sizes[0] * a.element_size() &&
         distance + b.numel() / b.sizes[0] * b.element_size() <= stride;
}

// An output may be a tensor read element by element (same memory, same layout) or lie apart from it; nothing between.
void check_overlap(const View& out, const View& other, bool may_be_same) {
  if (!other) return;
  const auto [out_begin, out_end] = extent(out);
  const auto [begin, end] = extent(other);
  if (out_end <= begin || end <= out_begin || interleaved(out, other)) return;
  if (may_be_same && same_memory(out, other)) return;
  fail(out.name, ": overlaps the memory of ", other.name, may_be_same ? " without being the same tensor" : "");
}

void check_output(const View& out, const View& x) {
  check_like(out, x);
  // Sorted by stride, each dimension must step past all that lies below it.
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < out.dim; ++d)
    if (out.sizes[d] > 1) dims.emplace_back(out.strides[d], out.sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < reach) fail(out.name, ": expected every element at its own address, got overlapping strides");
    reach = stride * (size - 1) + reach;
  }
}

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

struct StepArguments {
  const Tensor &x, &f, &rows, &index;
  const OptionalTensor &u, &m1, &m2, &v, &grad, &noise, &seeds;
};

// Holds the contiguous copies made of tensors in other layouts, for the length of a call.
struct Copies {
  std::vector<Tensor> tensors;

  Batch batch(const View& view, const Tensor* tensor) {
    if (!view) return {};
    if (view.samples_contiguous()) return {view.data, view.batch_stride()};
    tensors.push_back(torch::stable::contiguous(*tensor));
    return {static_cast<char*>(tensors.back().data_ptr()), view.numel() / view.sizes[0] * view.element_size()};
  }
};

View optional_view(const char* name, const OptionalTensor& tensor) { return tensor ? View(name, *tensor) : View(); }
const Tensor* pointer(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

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

void run(const StepCall& call, const CpuKernels& kernels, int64_t batch, bool draws) {
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

void step_into(const StepArguments& a, Outputs& outputs) {
  const View x("x", a.x), f("f", a.f), rows("rows", a.rows), index("index", a.index);
  const View u = optional_view("u", a.u), m1 = optional_view("m1", a.m1), m2 = optional_view("m2", a.m2);
  const View v = optional_view("v", a.v), grad = optional_view("grad", a.grad);
  const View noise = optional_view("noise", a.noise), seeds = optional_view("seeds", a.seeds);

  StepCall call;
  call.x_dtype = float_dtype(x);
  call.f_dtype = float_dtype(f);
  if (x.dim < 1 || x.numel() == 0) fail("x: expected shape (B, ...) with at least one element, got ", x.shape());
  check_same_shape(f, x);
  for (const View* view : {&u, &v}) check_like(*view, f);
  for (const View* view : {&m1, &m2, &grad, &noise}) check_like(*view, x);
  if (rows.dtype != aoti_torch_dtype_float32())
    fail("rows: expected dtype float32, got ", dtype_name(rows.dtype));
  if (rows.dim != 2 || rows.sizes[1] != ROW_COLUMNS || rows.sizes[0] < 1)
    fail("rows: expected shape (R, ", ROW_COLUMNS, ") with R >= 1, got ", rows.shape());
  if (rows.strides[1] != 1 || (rows.sizes[0] > 1 && rows.strides[0] < ROW_COLUMNS))
    fail("rows: expected contiguous rows, got strides (", rows.strides[0], ", ", rows.strides[1], ")");
  const int64_t batch = x.sizes[0];
  check_integers(index, true, batch);
  if (seeds) check_integers(seeds, false, batch);
  if (seeds && noise) fail("noise: expected seeds or noise, got both");

  // ---- each sample's row ----
  const bool one_row = index.dim == 0 && !seeds;
  std::vector<Sample> samples(one_row ? 1 : batch);
  bool draws = false;
  for (int64_t b = 0; b < static_cast<int64_t>(samples.size()); ++b) {
    const int64_t i = integer_at(index, b);
    if (i < 0 || i >= rows.sizes[0]) fail("index: expected values in [0, ", rows.sizes[0], "), got ", i);
    const StepRow& row = *reinterpret_cast<const StepRow*>(rows.data + i * rows.strides[0] * sizeof(float));
    const bool checked = b > 0 && samples[b - 1].row == &row;
    unsigned terms = checked ? samples[b - 1].terms : row_terms(row);
    if (!checked) {
      check_row(row, i);
      check_term(terms & TERM_GUIDANCE, bool(u), i, "g is not 1", "u");
      check_term(terms & TERM_M1, bool(m1), i, "c_m1 is not 0", "m1");
      check_term(terms & TERM_M2, bool(m2), i, "c_m2 is not 0", "m2");
      check_term(terms & TERM_NOISE, seeds || noise, i, "c_noise is not 0", "seeds or noise");
      check_term(terms & TERM_VARIANCE, bool(v), i, "logvar_min and logvar_max are not 0", "v");
      if (!grad) terms &= ~TERM_GRAD;
    }
    samples[b] = {&row, terms, seeds ? static_cast<uint64_t>(integer_at(seeds, b)) : 0};
    draws |= (terms & TERM_NOISE) && !noise;
  }
  if (one_row) samples.resize(batch, samples[0]);
  call.samples = samples.data();
  call.sample_numel = x.numel() / batch;

  // ---- the outputs ----
  const View out = optional_view(outputs.out_name, outputs.out), m0 = optional_view("m0", outputs.m0);
  for (const View* output : {&out, &m0}) {
    if (!*output) continue;
    check_output(*output, x);
    for (const View* input : {&x, &f, &u, &m1, &m2, &v, &grad, &noise}) check_overlap(*output, *input, true);
    for (const View* input : {&rows, &index, &seeds}) check_overlap(*output, *input, false);
  }
  if (m0) check_overlap(m0, out, false);
  if (!outputs.out) outputs.out = allocate_like(a.x);
  if (outputs.make_m0) outputs.m0 = allocate_like(a.x);

  // ---- other layouts than contiguous samples go through contiguous copies ----
  Copies copies;
  call.x = copies.batch(x, &a.x);
  call.f = copies.batch(f, &a.f);
  call.u = copies.batch(u, pointer(a.u));
  call.m1 = copies.batch(m1, pointer(a.m1));
  call.m2 = copies.batch(m2, pointer(a.m2));
  call.v = copies.batch(v, pointer(a.v));
  call.grad = copies.batch(grad, pointer(a.grad));
  call.noise = copies.batch(noise, pointer(a.noise));
  OptionalTensor contiguous_out, contiguous_m0;
  const auto target = [&](const Tensor& output, OptionalTensor& contiguous) -> Batch {
    const View view("", output);
    if (view.samples_contiguous()) return {view.data, view.batch_stride()};
    contiguous = torch::stable::new_empty(output, output.sizes());
    return {static_cast<char*>(contiguous->data_ptr()), call.sample_numel * view.element_size()};
  };
  call.out = target(*outputs.out, contiguous_out);
  if (outputs.m0) call.m0 = target(*outputs.m0, contiguous_m0);

  run(call, *chosen_kernels().load(std::memory_order_relaxed), batch, draws);
  if (contiguous_out) torch::stable::copy_(*outputs.out, *contiguous_out);
  if (contiguous_m0) torch::stable::copy_(*outputs.m0, *contiguous_m0);
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
  const CpuKernels& kernels = *chosen_kernels().load(std::memory_order_relaxed);
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

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : available_kernels()) names.push_back(kernels->name);
  return names;
}

std::string cpu_capability() { return chosen_kernels().load()->name; }

void set_cpu_capability(const std::string& name) {
  std::string known;
  for (const CpuKernels* kernels : available_kernels()) {
    if (name == kernels->name) {
      chosen_kernels().store(kernels);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("cpu capability: expected one of " + known + " on this machine, got '" + name + "'");
}

std::vector<float> normal_elements(uint64_t seed, uint32_t draw, uint32_t stream, int64_t begin, int64_t count) {
  if (begin < 0 || begin % 4 != 0) throw std::invalid_argument("begin: expected a multiple of 4, at least 0");
  if (count < 1 || count > TILE) throw std::invalid_argument("count: expected 1 to " + std::to_string(TILE));
  if (begin > INT64_MAX - count) throw std::invalid_argument("begin: expected less than 2^63 - count");
  std::vector<float> elements(count);
  char* out = reinterpret_cast<char*>(elements.data());
  chosen_kernels().load()->normal(seed, draw, stream, Dtype::float32, out, begin, begin + count);
  return elements;
}

}  // namespace epskernels

STABLE_TORCH_LIBRARY_IMPL(epskernels, CPU, library) {
  library.impl("step", TORCH_BOX(&epskernels::step));
  library.impl("step_m0", TORCH_BOX(&epskernels::step_m0));
  library.impl("step_out", TORCH_BOX(&epskernels::step_out));
  library.impl("step_", TORCH_BOX(&epskernels::step_));
  library.impl("normal", TORCH_BOX(&epskernels::normal));
}
