#pragma once

// Vectors of floats as wide as the instruction set's registers. For *_isa.cpp files only: all of
// it has internal linkage. Plain operators are GCC's and Clang's vector extensions, which every
// architecture has; fma() is one rounding where the set has it. The build forbids the compiler to
// contract on its own, so that one formula gives the same bits in every kernel.

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/dtypes.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

#if defined(ECAR_ISA_avx512)
constexpr int kWidth = 16;
#elif defined(ECAR_ISA_avx2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t HVec __attribute__((vector_size(2 * kWidth)));

// A number in every lane, its bits as they are.
inline Vec splat(float value) {
#if defined(ECAR_ISA_avx512)
  return _mm512_set1_ps(value);
#elif defined(ECAR_ISA_avx2)
  return _mm256_set1_ps(value);
#else
  return Vec{value, value, value, value};
#endif
}

inline IVec lane_numbers() {
  IVec lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// a b + c
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(ECAR_ISA_avx512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(ECAR_ISA_avx2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Vec sqrt(Vec v) {
#if defined(ECAR_ISA_avx512)
  return _mm512_sqrt_ps(v);
#elif defined(ECAR_ISA_avx2)
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The sum of all lanes, by halves.
inline float horizontal_sum(Vec v) {
#if defined(ECAR_ISA_avx512)
  return _mm512_reduce_add_ps(v);
#else
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
#endif
}

// Between storage and float: to the nearest, ties to even; a NaN stays one.

inline Vec widen(Vec v, float) { return v; }
inline Vec narrow(Vec v, float) { return v; }

// Zeros before each number. GCC converts half a vector at a time where no intrinsic says how.
inline UVec extend(HVec half) {
#if defined(ECAR_ISA_avx512)
  return (UVec)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(ECAR_ISA_avx2)
  return (UVec)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, UVec);
#endif
}

inline Vec widen(HVec half, BFloat16) { return (Vec)(extend(half) << 16); }

inline HVec narrow(Vec v, BFloat16) {
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v != v ? UVec{} + 0x7fc0u : rounded, HVec);
}

inline Vec widen(HVec half, Float16) {
#if defined(ECAR_ISA_avx512)
  return _mm512_cvtph_ps((__m256i)half);
#elif defined(ECAR_ISA_avx2)
  return _mm256_cvtph_ps((__m128i)half);
#else
  const UVec h = extend(half);
  const UVec magnitude = (h & 0x7fffu) << 13;
  // The exponent's bias goes from 15 to 127; a subnormal becomes normal in the product.
  const UVec scaled = (UVec)((Vec)magnitude * 0x1p112f);
  const UVec special = (UVec)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (Vec)(scaled | special | ((h & 0x8000u) << 16));
#endif
}

inline HVec narrow(Vec v, Float16) {
#if defined(ECAR_ISA_avx512)
  return (HVec)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(ECAR_ISA_avx2)
  return (HVec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const UVec u = (UVec)v, magnitude = u & 0x7fffffffu;
  const UVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 shifts a subnormal's bits to the float's end, rounded.
  const UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000u;
  const UVec special = magnitude > 0x7f800000u ? UVec{} + 0x7e00u : UVec{} + 0x7c00u;
  UVec h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= (143u << 23) ? special : h;
  return __builtin_convertvector(h | ((u >> 16) & 0x8000u), HVec);
#endif
}

template <class T>
struct StorageOf {
  using type = HVec;
};
template <>
struct StorageOf<float> {
  using type = Vec;
};

// What a store followed by a load would give.
template <class T>
inline Vec rounded(Vec v) {
  return widen(narrow(v, T{}), T{});
}

// Access to kWidth elements.
struct Full {
  template <class T>
  Vec load(const T* from) const {
    typename StorageOf<T>::type storage;
    __builtin_memcpy(&storage, from, sizeof storage);
    return widen(storage, T{});
  }
  template <class T>
  void store(T* to, Vec v) const {
    const typename StorageOf<T>::type storage = narrow(v, T{});
    __builtin_memcpy(to, &storage, sizeof storage);
  }
  Vec keep(Vec v) const { return v; }
};

// As Full, past the caches where `to` is aligned to what is stored: for outputs that no cache
// could hold. fence() before another thread may look.
struct Stream : Full {
  template <class T>
  void store(T* to, Vec v) const {
    const typename StorageOf<T>::type storage = narrow(v, T{});
#if defined(__x86_64__)
    if (reinterpret_cast<std::uintptr_t>(to) % sizeof storage == 0) {
#if defined(ECAR_ISA_avx512)
      if constexpr (sizeof storage == 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)storage);
        return;
      } else {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)storage);
        return;
      }
#elif defined(ECAR_ISA_avx2)
      if constexpr (sizeof storage == 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)storage);
        return;
      } else {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)storage);
        return;
      }
#else
      if constexpr (sizeof storage == 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)storage);
        return;
      }
#endif
    }
#endif
    __builtin_memcpy(to, &storage, sizeof storage);
  }
};

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Access to the first `count` < kWidth elements, the others reading as 0.
struct Partial {
  int count;
#if defined(ECAR_ISA_avx512)
  // Masks; a copy of so many bytes is a call.
  __mmask16 lanes() const { return static_cast<__mmask16>((1u << count) - 1u); }
  template <class T>
  Vec load(const T* from) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return _mm512_maskz_loadu_ps(lanes(), from);
    } else {
      return widen((HVec)_mm256_maskz_loadu_epi16(lanes(), from), T{});
    }
  }
  template <class T>
  void store(T* to, Vec v) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      _mm512_mask_storeu_ps(to, lanes(), v);
    } else {
      _mm256_mask_storeu_epi16(to, lanes(), (__m256i)narrow(v, T{}));
    }
  }
#else
  template <class T>
  Vec load(const T* from) const {
    typename StorageOf<T>::type storage = {};
    __builtin_memcpy(&storage, from, count * sizeof(T));
    return widen(storage, T{});
  }
  template <class T>
  void store(T* to, Vec v) const {
    const typename StorageOf<T>::type storage = narrow(v, T{});
    __builtin_memcpy(to, &storage, count * sizeof(T));
  }
#endif
  Vec keep(Vec v) const { return lane_numbers() < count ? v : Vec{}; }
};

// body(access) for the kWidth or fewer elements that are left.
template <class Body>
inline void with_access(std::int64_t left, Body body) {
  if (left >= kWidth) {
    body(Full{});
  } else {
    body(Partial{static_cast<int>(left)});
  }
}

// body(access, offset) over a row of `count` elements.
template <class Whole = Full, class Body>
inline void for_each(std::int64_t count, Body body) {
  std::int64_t at = 0;
  for (; at + kWidth <= count; at += kWidth) body(Whole{}, at);
  if (at < count) body(Partial{static_cast<int>(count - at)}, at);
}

// Sums over a row that are made together.
template <int kSums>
struct Sums {
  Vec of[kSums];

  Sums operator+(const Sums& other) const {
    Sums both;
    for (int i = 0; i < kSums; ++i) both.of[i] = of[i] + other.of[i];
    return both;
  }
};
template <int kSums>
struct Totals {
  float of[kSums];
};

// The sums to which body(access, offset, Sums&) adds over a row; in chains next to each other, for
// an addition takes some cycles. Of lanes beyond the row it has to add 0.
template <int kSums, class Body>
inline Totals<kSums> sums_of(std::int64_t count, Body body) {
  constexpr int kChains = kSums > 2 ? 2 : 4;  // which registers can hold
  Sums<kSums> a{}, b{}, c{}, d{};
  std::int64_t at = 0;
  for (; at + kChains * kWidth <= count; at += kChains * kWidth) {
    body(Full{}, at, a);
    body(Full{}, at + kWidth, b);
    if constexpr (kChains > 2) {
      body(Full{}, at + 2 * kWidth, c);
      body(Full{}, at + 3 * kWidth, d);
    }
  }
  for (; at + kWidth <= count; at += kWidth) body(Full{}, at, a);
  if (at < count) body(Partial{static_cast<int>(count - at)}, at, b);
  const Sums<kSums> all = (a + b) + (c + d);
  Totals<kSums> totals;
  for (int i = 0; i < kSums; ++i) totals.of[i] = horizontal_sum(all.of[i]);
  return totals;
}

// The sum of body(access, offset) over a row.
template <class Body>
inline float sum_of(std::int64_t count, Body body) {
  return sums_of<1>(count, [&](auto io, std::int64_t at, Sums<1>& sum) {
    sum.of[0] += io.keep(body(io, at));
  }).of[0];
}

// LayerNorm's statistics of a row. The mean has more than float's digits: where it is large against
// the spread, its own rounding would be seen.
struct Moments {
  Vec pivot{};  // the mean, rounded
  Vec inverse_deviation{};
  Vec rest{};  // what normal() has to add for that rounding

  Vec normal(Vec value) const { return fma(value - pivot, inverse_deviation, rest); }
};

// From the sums over `count` values of their distances from the pivot, and of their squares.
// E[x^2] - mean^2 would lose every digit where the mean is large; of the distances it is next to 0.
inline Moments moments_of(std::int64_t count, Vec pivot, float distances, float squares,
                          float eps) {
  const float rest = distances / count, variance = squares / count - rest * rest;
  const float inverse = 1.0f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
  return {pivot, splat(inverse), splat(-rest * inverse)};
}

// Of the values that `load` gives, from their rounded sum.
template <class Load>
inline Moments moments_of(std::int64_t count, float sum, float eps, Load load) {
  const Vec pivot = splat(sum / count);
  const auto [distances, squares] =
      sums_of<2>(count, [&](auto io, std::int64_t at, Sums<2>& sums) {
        const Vec distance = io.keep(load(io, at) - pivot);
        sums.of[0] += distance;
        sums.of[1] = fma(distance, distance, sums.of[1]);
      }).of;
  return moments_of(count, pivot, distances, squares, eps);
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
