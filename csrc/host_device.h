// HOST_DEVICE marks the functions that the host and the CUDA compiler share, UNROLL their loops that are copied out on a GPU.
// Internal linkage on the host: the CPU kernel is compiled once per instruction set, and no copy may stand in for another.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HOST_DEVICE static inline __attribute__((always_inline))
#define UNROLL
#endif
