// Just enough of CUDA's runtime for csrc/*.cu as host C++: a launch runs its blocks and threads one after the other. A block whose
// threads exchange values runs once more for each exchange, with what the threads gave the time before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <vector>

#include "touched.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(16) float4 {
  float x, y, z, w;
};

inline thread_local std::vector<std::vector<double>> exchanged;  // by thread of the block, in the order of its exchanges
inline thread_local size_t exchanges;                            // that the running thread has made

// Every lane of the warp takes part. What a thread writes must not change what it reads: it is written again.
inline double __shfl_down_sync(unsigned, double value, unsigned delta) {
  std::vector<double>& mine = exchanged[threadIdx.x];
  mine.resize(std::max(mine.size(), exchanges + 1));
  mine[exchanges] = value;
  const std::vector<double>& theirs = exchanged[threadIdx.x % 32 + delta < 32 ? threadIdx.x + delta : threadIdx.x];
  const size_t i = exchanges++;
  return i < theirs.size() ? theirs[i] : 0.0;
}

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

// Where it is set, it takes the launches: a kernel's address, its parameters, the tensors that it may touch.
using Launch = cudaError_t (*)(const void* kernel, const unsigned* grid, const unsigned* block, const void* parameters, size_t size,
                               const Touched* touched, size_t tensors);
inline Launch launch_elsewhere = nullptr;

template <typename Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      std::getenv("EPSKERNELS_TEST_NO_LAUNCH"))
    return cudaErrorInvalidConfiguration;
  if (launch_elsewhere) {
    const Parameters& parameters = *static_cast<Parameters*>(arguments[0]);
    const std::vector<Touched> touched = epskernels::touched_by(parameters);
    const unsigned in_grid[] = {grid.x, grid.y, grid.z}, in_block[] = {block.x, block.y, block.z};
    return launch_elsewhere(reinterpret_cast<const void*>(kernel), in_grid, in_block, &parameters, sizeof parameters, touched.data(),
                            touched.size());
  }
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        exchanged.assign(block.x, {});
        for (size_t time = 0, most = 0; time <= most; ++time)
          for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
            exchanges = 0;
            kernel(*static_cast<Parameters*>(arguments[0]));
            most = std::max(most, exchanges);
          }
      }
  return cudaSuccess;
}
