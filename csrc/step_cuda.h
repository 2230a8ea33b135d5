// The CUDA kernel's interface: raw pointers, no torch, no CUDA headers.
#pragma once

#include "batch.h"
#include "step.h"

namespace epskernels {

// One integer per sample, at a stride in elements; stride 0: one for all.
struct Integers {
  const int64_t* data = nullptr;
  int64_t stride = 0;
};

struct Floats {
  const float* data = nullptr;
  int64_t stride = 0;
};

struct StepParameters {
  StepOperands operands;
  const float* rows;              // each at a multiple of 16 bytes
  int64_t row_stride, row_count;  // stride in elements
  Integers index, seeds;          // read on the device; seeds may be absent
  Floats rescale, threshold;      // likewise
  unsigned present;               // terms whose tensors are there
  bool aligned;                   // every sample of every tensor begins at a multiple of 16 bytes
  int32_t device;
  bool wide_rows;                 // of WIDE_ROW_COLUMNS
};

struct NormalParameters {
  NormalOperands operands;
  Integers seeds;
  bool aligned;
};

struct MomentsParameters {
  MomentsOperands operands;
  const float* rows;  // with u: see StepParameters
  int64_t row_stride, row_count;
  Integers index;
  int64_t tiles;     // of a sample
  double* of_tiles;  // moments_workspace() of them, or `sums` where a sample has one tile
  double* sums;      // (batch, 2), or (batch, 4) with u
};

// On the current device and the given stream (a cudaStream_t), without waiting. nullptr, or what CUDA says is wrong.
const char* launch_step(const StepParameters& parameters, void* stream);
const char* launch_normal(const NormalParameters& parameters, void* stream);
const char* launch_moments(const MomentsParameters& parameters, void* stream);

int64_t moments_workspace(int64_t rows, int64_t tiles);  // in doubles; rows: all samples' sums

}  // namespace epskernels
