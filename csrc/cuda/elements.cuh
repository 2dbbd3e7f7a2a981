#pragma once

// Elements as the kernels see them: stored in 32 or 16 bits, computed with in float, and read and
// written 16 bytes at a time where the layout allows it. Runs on the host too, for the tests.

#include <cstdint>
#include <cstring>

#include "cpu/dtypes.h"
#include "ecar/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ecar {
namespace cuda {

ECAR_HOST_DEVICE float to_float(float value) { return value; }
ECAR_HOST_DEVICE void from_float(float value, float& to) { to = value; }

ECAR_HOST_DEVICE float bits_to_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

ECAR_HOST_DEVICE float to_float(BFloat16 value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}

ECAR_HOST_DEVICE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Subnormals come out right: both powers of two are exact.
  const float magnitude = bits_to_float(rest << 13) * 0x1p112f;
  return sign != 0 ? -magnitude : magnitude;
#endif
}

ECAR_HOST_DEVICE void from_float(float value, BFloat16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
  to.bits = static_cast<std::uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16);
#endif
}

ECAR_HOST_DEVICE void from_float(float value, Float16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(value));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t half;
  if (rest >= 0x7f800000u) {
    half = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 2^-1 rounds to multiples of 2^-24
    float shifted = bits_to_float(rest) + 0.5f;
    std::memcpy(&half, &shifted, 4);
    half -= 0x3f000000u;
  } else {
    half = (rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13;
    if (half > 0x7c00u) half = 0x7c00u;
  }
  to.bits = static_cast<std::uint16_t>(sign | half);
#endif
}

struct alignas(16) Bytes16 {
  std::uint32_t word[4];
};

// The elements of one 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// `count` elements from `from`, as floats; in one access where `whole`, else one by one.
template <class T>
ECAR_HOST_DEVICE void load(const T* from, int count, bool whole, float (&to)[kVector<T>]) {
  if (whole) {
    union {
      Bytes16 bytes;
      T items[kVector<T>];
    } data;
#if defined(__CUDA_ARCH__)
    const uint4 read = __ldg(reinterpret_cast<const uint4*>(from));
    data.bytes = {{read.x, read.y, read.z, read.w}};
#else
    std::memcpy(&data, from, 16);
#endif
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = to_float(data.items[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
ECAR_HOST_DEVICE void store(T* to, int count, bool whole, const float* from) {
  if (whole) {
    union {
      Bytes16 bytes;
      T items[kVector<T>];
    } data;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) from_float(from[i], data.items[i]);
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint4*>(to) = make_uint4(data.bytes.word[0], data.bytes.word[1],
                                               data.bytes.word[2], data.bytes.word[3]);
#else
    std::memcpy(to, &data, 16);
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < count) from_float(from[i], to[i]);
    }
  }
}

}  // namespace cuda
}  // namespace ecar
