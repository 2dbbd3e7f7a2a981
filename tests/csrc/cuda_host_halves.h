// What cuda_bf16.h and cuda_fp16.h have, for cuda_host.h.

#pragma once

#include <cstdint>

// A 16-bit float is its bits.
struct HostBFloat16 {
  std::uint16_t bits;
};
struct HostHalf {
  std::uint16_t bits;
};

inline std::uint16_t __bfloat16_as_ushort(HostBFloat16 value) { return value.bits; }
inline HostBFloat16 __float2bfloat16_rn(float value) {
  const std::uint32_t bits = __float_as_uint(value), rounded = bits + 0x7fffu + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16)};
}

inline HostHalf __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(HostHalf value) { return value.bits; }

inline float __half2float(HostHalf value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Subnormals come out right: both powers of two are exact.
  const float magnitude = __uint_as_float(rest << 13) * 0x1p112f;
  return sign != 0 ? -magnitude : magnitude;
}

inline HostHalf __float2half_rn(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t half;
  if (rest >= 0x7f800000u) {
    half = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 2^-1 rounds to multiples of 2^-24
    half = __float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13;
    if (half > 0x7c00u) half = 0x7c00u;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}
