// HOST_DEVICE marks the functions that the host and the CUDA compiler share.
// Internal linkage on the host: the CPU kernel is compiled once per instruction set, and no copy may stand in for another.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE static inline __attribute__((always_inline))
#endif
