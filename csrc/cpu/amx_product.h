#pragma once

// Products by AMX's tiles of 16 rows by 16 words, for *_isa.cpp files. A word is a pair of
// bfloat16, of one row or of one column: [k / 2][column][k % 2], as a weight is packed.

#include "cpu/amx.h"
#include "cpu/vec_tile.h"
#if defined(ECAR_ISA_avx512) && defined(ECAR_AMX_STAND_IN)
#include "cpu/amx_stand_in.h"
#endif

namespace ecar {
namespace ECAR_ISA {
namespace {

using std::int64_t;

// Rows of `words` words at a, as many rows of columns at b, and the sums at c; strides in bytes.
struct TileFactors {
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  int64_t words;
  float* c;
  int64_t c_stride;
};

#if defined(ECAR_ISA_avx512) && defined(ECAR_AMX)
constexpr int64_t kTile = 16, kTileBytes = 64;
constexpr int64_t kPassWords = 8 * kTile;  // whose piece of a panel of 48 columns, 24 KiB, fits L1

// Tiles 0 to 3 are sums, 4 and 5 of a, 6 and 7 of b.
ECAR_AMX inline void configure_tiles(int64_t rows, int64_t words) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<std::uint8_t>(tile < 6 ? rows : words);
    config.row_bytes[tile] = static_cast<std::uint16_t>(tile == 4 || tile == 5 ? 4 * words : 64);
  }
  // GCC's intrinsic names no more than the first bytes as its input.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// R tiles of rows by V of columns over `words` words, whole tiles or one as it is configured. The
// sums are stored to c where `fresh`, else added.
template <int R, int V>
ECAR_AMX void multiply_tiles(const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                             int64_t words, bool fresh, char* c, int64_t c_stride) {
  char* below = c + kTile * c_stride;
  if (fresh) {
    _tile_zero(0);
    if constexpr (V == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && V == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_stride);
    if constexpr (V == 2) _tile_loadd(1, c + kTileBytes, c_stride);
    if constexpr (R == 2) _tile_loadd(2, below, c_stride);
    if constexpr (R == 2 && V == 2) _tile_loadd(3, below + kTileBytes, c_stride);
  }
  for (int64_t k = 0; k < words; k += kTile, a += kTileBytes, b += kTile * b_stride) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) {
      _tile_loadd(5, a + kTile * a_stride, a_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (V == 2) {
      _tile_loadd(7, b + kTileBytes, b_stride);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  if constexpr (V == 2) _tile_stored(1, c + kTileBytes, c_stride);
  if constexpr (R == 2) _tile_stored(2, below, c_stride);
  if constexpr (R == 2 && V == 2) _tile_stored(3, below + kTileBytes, c_stride);
}

template <int R>
ECAR_AMX void multiply_columns(const TileFactors& f, int64_t row, int64_t k, int64_t words,
                               int64_t columns, bool fresh) {
  const char* a = static_cast<const char*>(f.a) + row * f.a_stride + 4 * k;
  const char* b = static_cast<const char*>(f.b) + k * f.b_stride;
  char* c = reinterpret_cast<char*>(f.c) + row * f.c_stride;
  int64_t n = 0;
  for (; columns - n >= 2 * kTile; n += 2 * kTile) {
    multiply_tiles<R, 2>(a, f.a_stride, b + 4 * n, f.b_stride, words, fresh, c + 4 * n, f.c_stride);
  }
  if (n < columns) {
    multiply_tiles<R, 1>(a, f.a_stride, b + 4 * n, f.b_stride, words, fresh, c + 4 * n, f.c_stride);
  }
}

// `rows` rows by whole tiles of `columns`: whole tiles of words first, then what is left. A row's
// sums do not depend on where the passes end.
ECAR_AMX inline void multiply_by_tiles(const TileFactors& f, int64_t rows, int64_t columns,
                                       bool fresh) {
  const int64_t whole = f.words / kTile * kTile;
  const int64_t pass = rows > 2 * kTile ? kPassWords : whole;
  for (int64_t k = 0; k < f.words;) {
    const int64_t words = k < whole ? smaller(pass, whole - k) : f.words - k;
    int64_t configured = 0;
    for (int64_t row = 0; row < rows;) {
      const int64_t height = smaller(rows - row, kTile);
      if (height != configured) configure_tiles(configured = height, smaller(words, kTile));
      if (rows - row >= 2 * kTile) {
        multiply_columns<2>(f, row, k, words, columns, fresh && k == 0), row += 2 * kTile;
      } else {
        multiply_columns<1>(f, row, k, words, columns, fresh && k == 0), row += height;
      }
    }
    k += words;
  }
}

// After the last product of a thread's piece of work: its tiles need not be kept any longer.
ECAR_AMX inline void release_tiles() { _tile_release(); }
#else
inline void multiply_by_tiles(const TileFactors&, int64_t, int64_t, bool) {}  // never called
inline void release_tiles() {}
#endif

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
