#pragma once

// Elements as the kernels see them: stored in 32 or 16 bits, computed with in float, and read and
// written 16 bytes at a time where the layout allows it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cpu/dtypes.h"
#include "ecar/macros.h"

#define ECAR_DEVICE __device__ __forceinline__

namespace ecar {
namespace cuda {

ECAR_DEVICE float to_float(float value) { return value; }
ECAR_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
ECAR_DEVICE float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

ECAR_DEVICE void from_float(float value, float& to) { to = value; }
ECAR_DEVICE void from_float(float value, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
ECAR_DEVICE void from_float(float value, Float16& to) {
  to.bits = __half_as_ushort(__float2half_rn(value));
}

// The elements of one 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

template <class T>
union Vector {
  uint4 bytes;
  T items[kVector<T>];
};

// `count` elements from `from`, as floats; in one access where `whole`, else one by one. Not by
// __ldg, which is for what nobody writes to while the kernel lives: it begins before the one before
// it has ended.
template <class T>
ECAR_DEVICE void load(const T* from, int count, bool whole, float (&to)[kVector<T>]) {
  if (whole) {
    Vector<T> data;
    data.bytes = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = to_float(data.items[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
ECAR_DEVICE void store(T* to, int count, bool whole, const float* from) {
  if (whole) {
    Vector<T> data;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) from_float(from[i], data.items[i]);
    *reinterpret_cast<uint4*>(to) = data.bytes;
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < count) from_float(from[i], to[i]);
    }
  }
}

// Asks for the 128 bytes around an address of global memory; they are not waited for.
ECAR_DEVICE void prefetch(const void* address) {
#ifdef __NVCC__
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
#else
  static_cast<void>(address);
#endif
}

// Into the L2 cache alone, which sees later writes: for what is asked for before
// await_previous().
ECAR_DEVICE void prefetch_early(const void* address) {
#ifdef __NVCC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  static_cast<void>(address);
#endif
}

// The kernel before this one on the stream may still run: what it writes is there after this, and
// what it reads may be written to. The kernel after this one may start, and wait likewise. Every
// thread calls it, also one with nothing to do: where a kernel has ended, so have those before it.
ECAR_DEVICE void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

}  // namespace cuda
}  // namespace ecar
