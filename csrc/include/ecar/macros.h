#pragma once

// Functions that CPU and CUDA kernels share.
#if defined(__CUDACC__)
#define ECAR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ECAR_HOST_DEVICE inline
#endif
