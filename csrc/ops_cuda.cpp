// torch.ops.epskernels.* on NVIDIA GPUs: checks on the host what can be known without waiting for the device, then one launch
// on the current stream; for sums over samples two or three.
#define USE_CUDA  // the headers' own name for it: declares the current stream

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>

#include "ops.h"
#include "rows.h"
#include "step_cuda.h"

namespace epskernels {
namespace {

bool aligned(const Batch& tensor, int64_t batch) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && (batch == 1 || tensor.stride % 16 == 0);
}

Integers integers(const View& view) {
  if (!view) return {};
  return {reinterpret_cast<const int64_t*>(view.data), view.dim == 0 ? 0 : view.strides[0]};
}

Floats floats(const View& view) {
  if (!view) return {};
  return {reinterpret_cast<const float*>(view.data), view.strides[0]};
}

// The device of the tensors is current while this lives; `stream` is its current stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit OnDevice(int32_t index) : guard(index) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
};

void check_launch(const char* error) {
  if (error)
    fail("the CUDA kernel was not launched: ", error,
         "; compiled for " EPSKERNELS_CUDA_TARGETS ". backend=\"triton\" or \"reference\" runs without it");
}

// EPSKERNELS_CHECK_ROWS=1: waits for the device, and raises what would otherwise come out as NaN.
bool checks_rows() {
  const char* wanted = std::getenv("EPSKERNELS_CHECK_ROWS");
  return wanted && std::strcmp(wanted, "1") == 0;
}

void check_rows_on_host(const StepArguments& tensors, const StepViews& a) {
  const auto cpu = torch::stable::Device(torch::headeronly::DeviceType::CPU, -1);
  const Tensor rows = torch::stable::to(torch::stable::contiguous(tensors.rows), cpu);
  const Tensor index = torch::stable::to(tensors.index, cpu);
  const OptionalTensor seeds = tensors.seeds ? OptionalTensor(torch::stable::to(*tensors.seeds, cpu)) : OptionalTensor();
  const OptionalTensor threshold = tensors.threshold ? OptionalTensor(torch::stable::to(*tensors.threshold, cpu)) : OptionalTensor();
  const OptionalTensor rescale = tensors.rescale ? OptionalTensor(torch::stable::to(*tensors.rescale, cpu)) : OptionalTensor();
  StepViews on_host = a;
  on_host.rows = View("rows", rows);
  on_host.index = View("index", index);
  on_host.seeds = view_of("seeds", seeds);
  on_host.threshold = view_of("threshold", threshold);
  on_host.rescale = view_of("rescale", rescale);
  std::vector<Sample> samples;
  epskernels::read_rows(on_host, samples);
}

struct Cuda {
  struct Rows {
    StepParameters parameters;
    Tensor copy;  // of rows at other addresses than the kernel reads
  };

  static Rows read_rows(const StepArguments& tensors, const StepViews& a) {
    if (checks_rows()) check_rows_on_host(tensors, a);
    Rows rows;
    StepParameters& p = rows.parameters;
    p.row_count = a.rows.sizes[0];
    if (aligned({a.rows.data, a.rows.batch_stride()}, p.row_count)) {
      p.rows = reinterpret_cast<const float*>(a.rows.data);
      p.row_stride = a.rows.strides[0];
    } else {
      rows.copy = allocate(a.rows, [&] { return torch::stable::new_empty(tensors.rows, tensors.rows.sizes()); });
      torch::stable::copy_(rows.copy, tensors.rows);
      p.rows = static_cast<const float*>(rows.copy.data_ptr());
      p.row_stride = a.rows.sizes[1];
    }
    p.index = integers(a.index);
    p.seeds = integers(a.seeds);
    p.rescale = floats(a.rescale);
    p.threshold = floats(a.threshold);
    p.present = TERM_CLIP | TERM_F;
    for (const auto& [term, present] :
         {std::pair(TERM_GUIDANCE, bool(a.u)), {TERM_M1, bool(a.m1)}, {TERM_M2, bool(a.m2)}, {TERM_GRAD, bool(a.grad)},
          {TERM_NOISE, a.noise || a.seeds}, {TERM_VARIANCE, bool(a.v)}, {TERM_Y, bool(a.y)}, {TERM_Y_OUT, a.has_y_out},
          {TERM_RESCALE, bool(a.rescale)}, {TERM_THRESHOLD, bool(a.threshold)}})
      if (present) p.present |= term;
    p.device = a.x.device_index;
    p.wide_rows = a.rows.sizes[1] == WIDE_ROW_COLUMNS;
    return rows;
  }

  static void run(const StepOperands& operands, const Rows& rows) {
    StepParameters p = rows.parameters;
    StepOperands& a = p.operands = operands;
    const std::pair<const Batch*, Dtype> all[] = {
        {&a.x, a.x_dtype},     {&a.f, a.f_dtype},        {&a.u, a.f_dtype}, {&a.m1, a.x_dtype},
        {&a.m2, a.x_dtype},    {&a.v, a.f_dtype},        {&a.grad, a.x_dtype}, {&a.noise, a.x_dtype},
        {&a.y, a.x_dtype},     {&a.out, a.x_dtype},      {&a.m0, a.x_dtype}, {&a.y_out, a.x_dtype},
        {&a.model_input, a.f_dtype}};
    // One row for a batch without gaps, where nothing depends on the sample: one long sample, so that short ones fill their blocks.
    bool one_sample = p.index.stride == 0 && !p.seeds.data && !(p.present & (TERM_RESCALE | TERM_THRESHOLD));
    for (const auto& [tensor, dtype] : all)
      if (tensor->data && tensor->stride != a.sample_numel * size_of(dtype)) one_sample = false;
    if (one_sample) {
      a.model_input.stride *= a.batch;  // to its second half
      a.sample_numel *= a.batch;
      a.batch = 1;
    }
    if (a.band_dims == 0) a.width = a.sample_numel;
    if (a.height % 2 == 0) a.height = a.sample_numel / a.width;  // planes of whole pairs of image rows are one
    p.aligned = true;
    for (const auto& [tensor, dtype] : all) p.aligned = p.aligned && aligned(*tensor, a.batch);
    p.aligned = p.aligned && (!a.doubled || a.model_input.stride % 16 == 0);
    const OnDevice device(p.device);
    check_launch(launch_step(p, device.stream));
  }

  static void normal(const NormalOperands& operands, const View& seeds) {
    const int64_t sample_bytes = operands.sample_numel * size_of(operands.dtype);
    const OnDevice device(seeds.device_index);
    check_launch(launch_normal({operands, integers(seeds), aligned({operands.out, sample_bytes}, operands.batch)},
                               device.stream));
  }

  static void moments(const MomentsOperands& a, const View& rows, const View& index, Tensor& out) {
    MomentsParameters p{};
    p.operands = a;
    if (a.u.data) {
      p.rows = reinterpret_cast<const float*>(rows.data);
      p.row_stride = rows.strides[0];
      p.row_count = rows.sizes[0];
      p.index = integers(index);
    }
    p.tiles = (a.sample_numel + MOMENTS_TILE - 1) / MOMENTS_TILE;
    p.of_tiles = p.sums = static_cast<double*>(out.data_ptr());
    OptionalTensor workspace;
    if (p.tiles > 1) {
      workspace = allocate(out, {moments_workspace(out.numel(), p.tiles)}, ScalarType::Double);
      p.of_tiles = static_cast<double*>(workspace->data_ptr());
    }
    const OnDevice device(View("sums", out).device_index);
    check_launch(launch_moments(p, device.stream));
  }
};

}  // namespace
}  // namespace epskernels

// The tests register the same code, run on the host, under names of their own.
#ifndef EPSKERNELS_LIBRARY
#define EPSKERNELS_LIBRARY epskernels
#define EPSKERNELS_KEY CUDA
#endif
#define REGISTER(library_name, key) \
  STABLE_TORCH_LIBRARY_IMPL(library_name, key, library) { epskernels::Ops<epskernels::Cuda>::register_all(library); }
REGISTER(EPSKERNELS_LIBRARY, EPSKERNELS_KEY)
