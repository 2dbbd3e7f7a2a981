#pragma once

// For *_isa.cpp files.

#include "cpu/vec.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

// [8][8] of rows `from_stride` apart to its transpose, of rows `to_stride` apart: words as they
// are, or times `factor`.
template <bool kTimes = true>
inline void transpose(const float* from, std::int64_t from_stride, float* to,
                      std::int64_t to_stride, float factor = 1.0f) {
#if defined(ECAR_ISA_avx512) || defined(ECAR_ISA_avx2)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm256_loadu_ps(from + i * from_stride);
    if constexpr (kTimes) a[i] = a[i] * factor;
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // a[i + j]: columns j and j + 4 of rows i to i + 3
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + to_stride * j, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + to_stride * (j + 4), _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) {
      to[to_stride * j + i] =
          kTimes ? from[from_stride * i + j] * factor : from[from_stride * i + j];
    }
  }
#endif
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
