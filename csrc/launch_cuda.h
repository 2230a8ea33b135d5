// A launch: blocks of THREADS along x, layers (samples, or rows of sums) along y and z.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace epskernels {

constexpr int THREADS = 128;

// The block's layer; beyond the last where they do not fill the grid.
__device__ __forceinline__ int64_t layer_of_block() { return blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z; }

template <typename Parameters>
const char* launch(void (*kernel)(Parameters), Parameters parameters, int64_t blocks, int64_t layers, void* stream) {
  const int64_t y = layers < 65535 ? layers : 65535, z = (layers + y - 1) / y;
  if (blocks > 0x7fffffff || z > 65535) return "too many elements for a launch";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(y), static_cast<unsigned>(z));
  void* arguments[] = {&parameters};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, dim3(THREADS), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace epskernels
