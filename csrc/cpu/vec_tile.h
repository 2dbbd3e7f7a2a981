#pragma once

// What the tiles of all products have in common, for *_isa.cpp files.

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

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
