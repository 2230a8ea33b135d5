// The arguments of the step: read once, checked before anything is written. Nothing here reads a tensor's values.
// epskernels/ops/checks.py checks the same, in the same words, for the backends written in Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "step.h"

namespace epskernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "epskernels: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// ---- one tensor ----

inline const char* dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},   {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_uint16(), "uint16"},       {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},       {aoti_torch_dtype_complex32(), "complex32"},
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
  int32_t dtype = 0, device_type = 0, device_index = 0;

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
    aoti_torch_get_device_type(tensor.get(), &device_type);
    aoti_torch_get_device_index(tensor.get(), &device_index);
    if (numel() > 0 && freed(tensor)) fail(name, ": expected a tensor with memory, got one whose storage was freed");
  }
  // The address is then the view's offset. Torch is asked for it only where few programs have memory.
  bool freed(const Tensor& tensor) const {
    const auto address = reinterpret_cast<uintptr_t>(data);
    return address >> 40 == 0 && address == static_cast<uintptr_t>(tensor.storage_offset() * element_size());
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

inline Dtype float_dtype(const View& view) {
  if (view.dtype == aoti_torch_dtype_float32()) return Dtype::float32;
  if (view.dtype == aoti_torch_dtype_float16()) return Dtype::float16;
  if (view.dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  fail(view.name, ": expected dtype float32, float16 or bfloat16, got ", dtype_name(view.dtype));
}

inline std::string device_name(const View& view) {
  if (view.device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (view.device_type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(view.device_index);
  return "another kind of device";
}

inline void check_device(const View& view, const View& x) {
  if (!view || (view.device_type == x.device_type && view.device_index == x.device_index)) return;
  fail(view.name, ": expected a tensor on ", device_name(x), ", as x is, got one on ", device_name(view));
}

inline void check_same_shape(const View& view, const View& other) {
  if (view.dim == other.dim && std::equal(view.sizes, view.sizes + view.dim, other.sizes)) return;
  fail(view.name, ": expected shape ", other.shape(), " as ", other.name, " has, got ", view.shape());
}

inline void check_like(const View& view, const View& other) {
  if (!view) return;  // an optional argument
  check_same_shape(view, other);
  if (view.dtype != other.dtype)
    fail(view.name, ": expected dtype ", dtype_name(other.dtype), " as ", other.name, " has, got ",
         dtype_name(view.dtype));
}

inline void check_integers(const View& view, bool may_be_scalar, int64_t batch) {
  if (view.dtype != aoti_torch_dtype_int64())
    fail(view.name, ": expected dtype int64, got ", dtype_name(view.dtype));
  if (may_be_scalar && view.dim == 0) return;
  if (view.dim != 1 || view.sizes[0] != batch)
    fail(view.name, ": expected shape ", may_be_scalar ? "() or (" : "(", batch, ",), got ", view.shape());
}

// One number for each sample.
inline void check_floats(const View& view, int64_t batch) {
  if (!view) return;
  if (view.dtype != aoti_torch_dtype_float32())
    fail(view.name, ": expected dtype float32, got ", dtype_name(view.dtype));
  if (view.dim != 1 || view.sizes[0] != batch)
    fail(view.name, ": expected shape (", batch, ",), got ", view.shape());
}

inline float float_at(const View& view, int64_t i) {
  return reinterpret_cast<const float*>(view.data)[i * view.strides[0]];
}

inline int64_t integer_at(const View& view, int64_t i) {
  return reinterpret_cast<const int64_t*>(view.data)[view.dim == 0 ? 0 : i * view.strides[0]];
}

// A tensor's first byte, and the one after its last.
inline std::pair<const char*, const char*> extent(const View& view) {
  int64_t last = 0;
  for (int64_t d = 0; d < view.dim; ++d) last += (view.sizes[d] - 1) * view.strides[d];
  return {view.data, view.data + (last + 1) * view.element_size()};
}

inline bool same_memory(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// Samples of two tensors that take turns in one buffer, as channel halves do.
inline bool interleaved(const View& a, const View& b) {
  if (a.dim != b.dim || !a.samples_contiguous() || !b.samples_contiguous()) return false;
  const int64_t stride = a.batch_stride();
  if (stride != b.batch_stride() || stride == 0) return false;
  const int64_t distance = ((b.data - a.data) % stride + stride) % stride;
  return distance >= a.numel() / a.sizes[0] * a.element_size() &&
         distance + b.numel() / b.sizes[0] * b.element_size() <= stride;
}

// An output may be a tensor read element by element (same memory, same layout) or lie apart from it; nothing between.
inline void check_overlap(const View& out, const View& other, bool may_be_same) {
  if (!other) return;
  const auto [out_begin, out_end] = extent(out);
  const auto [begin, end] = extent(other);
  if (out_end <= begin || end <= out_begin || interleaved(out, other)) return;
  if (may_be_same && same_memory(out, other)) return;
  fail(out.name, ": overlaps the memory of ", other.name, may_be_same ? " without being the same tensor" : "");
}

// Sorted by stride, each dimension must step past all that lies below it.
inline void check_addresses(const View& out) {
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

// ---- all of them ----

// STEP_REQUIRED(DO) and STEP_OPTIONAL(DO) are DO(x) DO(f) ...: the inputs' names, in their order, from epskernels/spec.py.
#define TENSOR(name) const Tensor& name;
#define OPTIONAL_TENSOR(name) const OptionalTensor& name;
#define VIEW(name) View name;
#define READ(name) name(view_of(#name, arguments.name)),

struct StepArguments {
  STEP_REQUIRED(TENSOR)
  STEP_OPTIONAL(OPTIONAL_TENSOR)
};

inline View view_of(const char* name, const Tensor& tensor) { return View(name, tensor); }
inline View view_of(const char* name, const OptionalTensor& tensor) { return tensor ? View(name, *tensor) : View(); }

struct StepViews {
  STEP_REQUIRED(VIEW)
  STEP_OPTIONAL(VIEW)
  bool has_y_out;

  explicit StepViews(const StepArguments& arguments) : STEP_REQUIRED(READ) STEP_OPTIONAL(READ) has_y_out(false) {}

  int64_t batch() const { return x.sizes[0]; }
  int64_t sample_numel() const { return x.numel() / batch(); }
  int64_t channel_numel() const { return x.dim > 1 ? sample_numel() / x.sizes[1] : 1; }
  // In how many of x's last dimensions these rows may correct a band: mirrors epskernels/spec.py::band_dims_of.
  int band_dims() const {
    const bool wide = rows.sizes[1] == WIDE_ROW_COLUMNS;
    return !wide || x.dim < 2 || x.dim > 5 ? 0 : x.dim > 3 ? 2 : 1;
  }
};

#undef TENSOR
#undef OPTIONAL_TENSOR
#undef VIEW
#undef READ

inline void check_rows(const View& rows) {
  if (rows.dtype != aoti_torch_dtype_float32()) fail("rows: expected dtype float32, got ", dtype_name(rows.dtype));
  if (rows.dim != 2 || (rows.sizes[1] != ROW_COLUMNS && rows.sizes[1] != WIDE_ROW_COLUMNS) || rows.sizes[0] < 1)
    fail("rows: expected shape (R, ", ROW_COLUMNS, ") or (R, ", WIDE_ROW_COLUMNS, ") with R >= 1, got ", rows.shape());
  if (rows.strides[1] != 1 || (rows.sizes[0] > 1 && rows.strides[0] < rows.sizes[1]))
    fail("rows: expected contiguous rows, got strides (", rows.strides[0], ", ", rows.strides[1], ")");
}

inline void check_step(const StepViews& a) {
  for (const View* view : {&a.f, &a.rows, &a.index, &a.u, &a.m1, &a.m2, &a.v, &a.grad, &a.noise, &a.seeds, &a.y, &a.rescale,
                           &a.threshold})
    check_device(*view, a.x);
  float_dtype(a.x);
  float_dtype(a.f);
  if (a.x.dim < 1 || a.x.numel() == 0)
    fail("x: expected shape (B, ...) with at least one element, got ", a.x.shape());
  check_same_shape(a.f, a.x);
  for (const View* view : {&a.u, &a.v}) check_like(*view, a.f);
  for (const View* view : {&a.m1, &a.m2, &a.y, &a.grad, &a.noise}) check_like(*view, a.x);
  check_rows(a.rows);
  check_integers(a.index, true, a.batch());
  if (a.seeds) check_integers(a.seeds, false, a.batch());
  if (a.seeds && a.noise) fail("noise: expected seeds or noise, got both");
  check_floats(a.rescale, a.batch());
  check_floats(a.threshold, a.batch());
}

inline void check_moments(const View& f, const View& u, const View& rows, const View& index) {
  float_dtype(f);
  if (f.dim < 1 || f.numel() == 0) fail("f: expected shape (B, ...) with at least one element, got ", f.shape());
  if (bool(u) != bool(rows) || bool(u) != bool(index)) fail("u, rows, index: expected all of them, or none");
  if (!u) return;
  for (const View* view : {&u, &rows, &index}) check_device(*view, f);
  check_like(u, f);
  check_rows(rows);
  check_integers(index, true, f.sizes[0]);
}

struct OutputViews {
  View out, m0, y_out, model_input;
};

inline void check_model_input(const View& model_input, const StepViews& a) {
  const View& x = a.x;
  const bool fits = model_input.dim == x.dim && (model_input.sizes[0] == x.sizes[0] || model_input.sizes[0] == 2 * x.sizes[0]) &&
                    std::equal(x.sizes + 1, x.sizes + x.dim, model_input.sizes + 1);
  if (!fits) fail("model_input: expected shape ", x.shape(), ", or twice the batch, got ", model_input.shape());
  if (model_input.dtype != a.f.dtype)
    fail("model_input: expected dtype ", dtype_name(a.f.dtype), " as f has, got ", dtype_name(model_input.dtype));
}

inline void check_outputs(const OutputViews& outputs, const StepViews& a) {
  const View* all[] = {&outputs.out, &outputs.m0, &outputs.y_out, &outputs.model_input};
  for (const View* output : all) {
    if (!*output) continue;
    const bool is_state = output != &outputs.model_input;
    check_device(*output, a.x);
    if (is_state) check_like(*output, a.x);
    else check_model_input(*output, a);
    check_addresses(*output);
    for (const View* input : {&a.x, &a.f, &a.u, &a.m1, &a.m2, &a.y, &a.v, &a.grad, &a.noise})
      check_overlap(*output, *input, is_state);
    for (const View* input : {&a.rows, &a.index, &a.seeds, &a.rescale, &a.threshold}) check_overlap(*output, *input, false);
    for (const View* const* other = all; *other != output; ++other) check_overlap(*output, **other, false);
  }
}

}  // namespace epskernels
