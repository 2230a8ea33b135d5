// A launch: blocks of THREADS along x, layers (samples, or rows of sums) along y and z.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace epskernels {

constexpr int THREADS = 128;
constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;  // that a grid of large tiles has to have, at least

// The block's layer; beyond the last where they do not fill the grid.
__device__ __forceinline__ int64_t layer_of_block() { return blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z; }

// Of a device; 1 where CUDA does not say, which a launch will then do.
inline int multiprocessors(int device) {
  constexpr int DEVICES = 64;
  static std::atomic<int> known[DEVICES];
  const bool kept = device >= 0 && device < DEVICES;
  int count = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) return 1;
    if (kept) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

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
