// The tensors that a launch's parameters hold: what its kernel may read, and what it may write.
#pragma once

#include <vector>

#include "step_cuda.h"

struct Touched {
  const char* name;
  const void* data;
  int64_t samples, stride, bytes, element;  // so many bytes of each sample
  int64_t written;
};

namespace epskernels {

template <typename Values>
Touched values_of(const char* name, const Values& values, int64_t batch) {
  const int64_t size = sizeof *values.data;
  return {name, values.data, values.data ? values.stride ? batch : 1 : 0, values.stride * size, size, size, 0};
}

inline Touched rows_of(const float* rows, int64_t count, int64_t stride, int64_t columns) {
  return {"rows", rows, rows ? count : 0, stride * 4, columns * 4, 4, 0};
}

inline std::vector<Touched> touched_by(const StepParameters& p) {
  const StepOperands& a = p.operands;
  const auto batch_of = [&a](const char* name, const Batch& tensor, Dtype dtype, int64_t written, int64_t halves = 1) {
    return Touched{name, tensor.data, tensor.data ? halves * a.batch : 0, tensor.stride, a.sample_numel * size_of(dtype), size_of(dtype), written};
  };
  return {batch_of("x", a.x, a.x_dtype, 0), batch_of("f", a.f, a.f_dtype, 0), batch_of("u", a.u, a.f_dtype, 0),
          batch_of("m1", a.m1, a.x_dtype, 0), batch_of("m2", a.m2, a.x_dtype, 0), batch_of("y", a.y, a.x_dtype, 0),
          batch_of("v", a.v, a.f_dtype, 0), batch_of("grad", a.grad, a.x_dtype, 0), batch_of("noise", a.noise, a.x_dtype, 0),
          batch_of("out", a.out, a.x_dtype, 1), batch_of("m0", a.m0, a.x_dtype, 1), batch_of("y_out", a.y_out, a.x_dtype, 1),
          batch_of("model_input", a.model_input, a.f_dtype, 1, a.doubled ? 2 : 1),
          rows_of(p.rows, p.row_count, p.row_stride, p.wide_rows ? WIDE_ROW_COLUMNS : ROW_COLUMNS), values_of("index", p.index, a.batch),
          values_of("seeds", p.seeds, a.batch), values_of("rescale", p.rescale, a.batch), values_of("threshold", p.threshold, a.batch)};
}

inline std::vector<Touched> touched_by(const NormalParameters& p) {
  const NormalOperands& a = p.operands;
  const int64_t size = size_of(a.dtype);
  return {{"out", a.out, a.batch, a.sample_numel * size, a.sample_numel * size, size, 1}, values_of("seeds", p.seeds, a.batch)};
}

inline std::vector<Touched> touched_by(const MomentsParameters& p) {
  const MomentsOperands& a = p.operands;
  const int64_t size = size_of(a.dtype), sums = a.batch * (a.u.data ? 4 : 2);
  return {{"f", a.f.data, a.batch, a.f.stride, a.sample_numel * size, size, 0},
          {"u", a.u.data, a.u.data ? a.batch : 0, a.u.stride, a.sample_numel * size, size, 0},
          rows_of(p.rows, p.row_count, p.row_stride, ROW_COLUMNS), values_of("index", p.index, a.batch),
          {"sums of tiles", p.of_tiles, sums, p.tiles * 8, p.tiles * 8, 8, 1}};
}

// Sums to fewer sums: moments_cuda.cu's own type.
template <typename Level>
std::vector<Touched> touched_by(const Level& level) {
  return {{"sums", level.from, level.rows, level.count * 8, level.count * 8, 8, 0},
          {"fewer sums", level.to, level.rows, level.groups * 8, level.groups * 8, 8, 1}};
}

}  // namespace epskernels
