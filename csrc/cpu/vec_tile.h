#pragma once

// What the tiles of all products have in common, for *_isa.cpp files.

#include <type_traits>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

#define ECAR_UNROLL _Pragma("GCC unroll 8")

// A tile of sums fills the registers: 24 of 32 with AVX-512, 12 of 16 elsewhere.
#if defined(ECAR_ISA_avx512)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

// Whether elements are multiplied as pairs, two in a word.
template <class T>
bool multiplies_pairs() {
#if defined(ECAR_ISA_avx512)
  if constexpr (std::is_same_v<T, BFloat16>) return multiplies_bfloat16();
#endif
  return false;
}

// Whether they are multiplied by tiles.
template <class T>
bool multiplies_tiles() {
#if defined(ECAR_ISA_avx512)
  if constexpr (std::is_same_v<T, BFloat16>) return isa() == Isa::amx;
#endif
  return false;
}

#if defined(ECAR_ISA_avx512)
#define ECAR_BF16 __attribute__((target("avx512bf16")))
ECAR_BF16 inline Vec fma_pairs(Vec a, Vec b, Vec sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
