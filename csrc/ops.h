// torch.ops.epskernels.* for one kind of device, over a Backend that has
//   Rows                  what it knows of the samples' rows before it runs
//   read_rows(tensors, views) -> Rows
//   run(operands, Rows)   the step
//   normal(operands, seeds)
//   moments(operands, rows, index, out)   rows and index are absent without u
// Checks everything before anything is written. The schemas are in epskernels/spec.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include "arguments.h"

// What torch said, in this thread, of its last call that failed. From torch 2.13 on; null before.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace epskernels {

using torch::headeronly::ScalarType;

// The tensor that `make` makes. Where torch cannot: what was wanted, and why, which torch's stable ABI keeps to itself.
template <typename Make>
Tensor allocate(const View& wanted, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    const char* why = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
    fail("could not allocate ", dtype_name(wanted.dtype), " ", wanted.shape(), " on ", device_name(wanted), *why ? ": " : "", why);
  }
}

// One beside `tensor`, on its device.
inline Tensor allocate(const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType dtype) {
  View wanted("", tensor);
  wanted.sizes = shape.data(), wanted.dim = static_cast<int64_t>(shape.size()), wanted.dtype = static_cast<int32_t>(dtype);
  return allocate(wanted, [&] { return torch::stable::new_empty(tensor, shape, dtype); });
}

// Samples contiguous in themselves are used in place, others through a contiguous copy.
struct Layouts {
  std::vector<Tensor> copies;  // held for the length of a call
  std::vector<std::pair<Tensor, Tensor>> results;

  Batch input(const View& view, const Tensor& tensor) {
    if (view.samples_contiguous()) return {view.data, view.batch_stride()};
    copies.push_back(allocate(view, [&] { return torch::stable::contiguous(tensor); }));
    return contiguous(view, copies.back());
  }
  Batch input(const View& view, const OptionalTensor& tensor) { return view ? input(view, *tensor) : Batch{}; }

  Batch output(const Tensor& tensor) {
    const View view("", tensor);
    if (view.samples_contiguous()) return {view.data, view.batch_stride()};
    results.emplace_back(tensor, allocate(view, [&] { return torch::stable::new_empty(tensor, tensor.sizes()); }));
    return contiguous(view, results.back().second);
  }
  Batch output(const OptionalTensor& tensor) { return tensor ? output(*tensor) : Batch{}; }
  void finish() {
    for (auto& [target, result] : results) torch::stable::copy_(target, result);
  }

 private:
  static Batch contiguous(const View& view, const Tensor& copy) {
    return {static_cast<char*>(copy.data_ptr()), view.numel() / view.sizes[0] * view.element_size()};
  }
};

// A new tensor as torch.empty_like makes it.
inline Tensor allocate_like(const Tensor& tensor, const View& view) {
  return allocate(view, [&] {
    if (!tensor.is_contiguous()) return torch::stable::empty_like(tensor);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(view.dim, view.sizes, view.strides, view.dtype, view.device_type,
                                                    view.device_index, &handle));
    return Tensor(handle);
  });
}

template <typename Backend>
struct Ops {
  // Those that are absent are allocated (m0 where `make_m0` says so), once all inputs are known to be good.
  struct Outputs {
    OptionalTensor out, m0, y_out, model_input;
    bool make_m0 = false, make_y_out = false;
    const char* out_name = "out";
  };

  static void step_into(const StepArguments& tensors, Outputs& outputs) {
    StepViews a(tensors);
    a.has_y_out = outputs.y_out || outputs.make_y_out;
    check_step(a);
    const typename Backend::Rows rows = Backend::read_rows(tensors, a);
    check_outputs({view_of(outputs.out_name, outputs.out), view_of("m0", outputs.m0),
                   view_of("y_out", outputs.y_out), view_of("model_input", outputs.model_input)}, a);
    const bool out_is_new = !outputs.out;
    if (out_is_new) outputs.out = allocate_like(tensors.x, a.x);
    if (outputs.make_m0) outputs.m0 = allocate_like(tensors.x, a.x);
    if (outputs.make_y_out) outputs.y_out = allocate_like(tensors.x, a.x);

    Layouts layouts;
    StepOperands operands;
    operands.x_dtype = float_dtype(a.x);
    operands.f_dtype = float_dtype(a.f);
    operands.x = layouts.input(a.x, tensors.x);
    operands.f = layouts.input(a.f, tensors.f);
    operands.u = layouts.input(a.u, tensors.u);
    operands.m1 = layouts.input(a.m1, tensors.m1);
    operands.m2 = layouts.input(a.m2, tensors.m2);
    operands.y = layouts.input(a.y, tensors.y);
    operands.v = layouts.input(a.v, tensors.v);
    operands.grad = layouts.input(a.grad, tensors.grad);
    operands.noise = layouts.input(a.noise, tensors.noise);
    operands.out = layouts.output(*outputs.out);
    operands.out_is_new = out_is_new;
    operands.m0 = layouts.output(outputs.m0);
    operands.y_out = layouts.output(outputs.y_out);
    operands.model_input = layouts.output(outputs.model_input);
    operands.doubled = outputs.model_input && outputs.model_input->size(0) != a.batch();
    operands.batch = a.batch();
    operands.sample_numel = a.sample_numel();
    operands.channel_numel = a.channel_numel();
    operands.guided_period = operands.sample_numel;
    operands.band_dims = a.band_dims();
    if (operands.band_dims > 0) operands.width = a.x.sizes[a.x.dim - 1];
    if (operands.band_dims > 1) operands.height = a.x.sizes[a.x.dim - 2];
    Backend::run(operands, rows);
    layouts.finish();
  }

  static Tensor step(STEP_PARAMETERS) {
    Outputs outputs;
    step_into({STEP_ARGUMENTS}, outputs);
    return std::move(*outputs.out);
  }

  static std::tuple<Tensor, Tensor> step_m0(STEP_PARAMETERS) {
    Outputs outputs;
    outputs.make_m0 = true;
    step_into({STEP_ARGUMENTS}, outputs);
    return {std::move(*outputs.out), std::move(*outputs.m0)};
  }

  static std::tuple<Tensor, Tensor, Tensor> step_y(STEP_PARAMETERS) {
    Outputs outputs;
    outputs.make_m0 = outputs.make_y_out = true;
    step_into({STEP_ARGUMENTS}, outputs);
    return {std::move(*outputs.out), std::move(*outputs.m0), std::move(*outputs.y_out)};
  }

  // For its host time alone: the dispatcher looks for each optional input that is absent.
  static Tensor step_plain(Tensor x, Tensor f, Tensor rows, Tensor index) {
    return step(std::move(x), std::move(f), std::move(rows), std::move(index), {}, {}, {}, {}, {}, {}, {}, {}, {}, {});
  }

  static void step_out(STEP_PARAMETERS, Tensor out, OptionalTensor m0, OptionalTensor y_out, OptionalTensor model_input) {
    Outputs outputs{std::move(out), std::move(m0), std::move(y_out), std::move(model_input)};
    step_into({STEP_ARGUMENTS}, outputs);
  }

  static void step_(STEP_PARAMETERS, OptionalTensor m0, OptionalTensor y_out, OptionalTensor model_input) {
    Outputs outputs{x, std::move(m0), std::move(y_out), std::move(model_input), false, false, "x"};
    step_into({STEP_ARGUMENTS}, outputs);
  }

  static Tensor normal(Tensor seeds_tensor, std::vector<int64_t> shape, ScalarType dtype, int64_t draw, int64_t stream) {
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
    Tensor out = allocate(seeds_tensor, shape, dtype);
    const View view("out", out);
    Backend::normal({float_dtype(view), view.data, static_cast<uint32_t>(draw), static_cast<uint32_t>(stream), batch, sample_numel}, seeds);
    return out;
  }

  // (B, 2), or (B, 4) with u: see ops/reference.py::moments_reference.
  static Tensor moments(Tensor f_tensor, OptionalTensor u_tensor, OptionalTensor rows_tensor, OptionalTensor index_tensor) {
    const View f("f", f_tensor), u = view_of("u", u_tensor), rows = view_of("rows", rows_tensor),
               index = view_of("index", index_tensor);
    check_moments(f, u, rows, index);
    Layouts layouts;
    const int64_t batch = f.sizes[0], numel = f.numel() / batch;
    Tensor out = allocate(f_tensor, {batch, u ? 4 : 2}, ScalarType::Double);
    Backend::moments({float_dtype(f), layouts.input(f, f_tensor), layouts.input(u, u_tensor), batch, numel,
                      f.dim > 1 ? numel / f.sizes[1] : 1}, rows, index, out);
    return out;
  }

  static void register_all(torch::stable::detail::StableLibrary& library) {
    library.impl("step", TORCH_BOX(&Ops::step));
    library.impl("step_m0", TORCH_BOX(&Ops::step_m0));
    library.impl("step_y", TORCH_BOX(&Ops::step_y));
    library.impl("step_plain", TORCH_BOX(&Ops::step_plain));
    library.impl("step_out", TORCH_BOX(&Ops::step_out));
    library.impl("step_", TORCH_BOX(&Ops::step_));
    library.impl("normal", TORCH_BOX(&Ops::normal));
    library.impl("moments", TORCH_BOX(&Ops::moments));
  }
};

}  // namespace epskernels
