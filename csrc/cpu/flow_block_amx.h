#pragma once

// The product by AMX's tiles of 16 rows by 16 words, for *_isa.cpp files. A word is a pair of
// bfloat16, and a packed weight has them where a tile has: [k / 2][output][k % 2].

#include "cpu/amx.h"
#include "cpu/flow_block.h"
#include "cpu/vec_tile.h"
#if defined(ECAR_ISA_avx512) && defined(ECAR_AMX_STAND_IN)
#include "cpu/amx_stand_in.h"
#endif

namespace ecar {
namespace ECAR_ISA {
namespace {

using std::int64_t;

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 64;         // of a row
constexpr int64_t kPassWords = 8 * kTile;  // whose piece of a panel, 24 KiB, fits L1
static_assert(flow_block::kColumnGroup == kTile, "a panel is whole tiles");

struct Tiles {};  // the product's name

#if defined(ECAR_ISA_avx512) && defined(ECAR_AMX)
// Tiles 0 to 3 are sums, 4 and 5 of rows, 6 and 7 of the weight.
ECAR_AMX inline void configure(int64_t rows, int64_t words) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<std::uint8_t>(tile < 6 ? rows : words);
    config.row_bytes[tile] = static_cast<std::uint16_t>(tile == 4 || tile == 5 ? 4 * words : 64);
  }
  // GCC's intrinsic names no more than the first bytes as its input.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// R tiles of rows by V of the weight over `words` words, a whole number of tiles or one as it is
// configured; strides are in bytes. The sums go to `to`, or are added to those that are there.
template <int R, int V>
ECAR_AMX void multiply_tiles(const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                             int64_t words, bool fresh, float* to) {
  constexpr int64_t stride = flow_block::kPanelColumns * sizeof(float);
  float* below = to + kTile * flow_block::kPanelColumns;
  if (fresh) {
    _tile_zero(0);
    if constexpr (V == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && V == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, to, stride);
    if constexpr (V == 2) _tile_loadd(1, to + kTile, stride);
    if constexpr (R == 2) _tile_loadd(2, below, stride);
    if constexpr (R == 2 && V == 2) _tile_loadd(3, below + kTile, stride);
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
  _tile_stored(0, to, stride);
  if constexpr (V == 2) _tile_stored(1, to + kTile, stride);
  if constexpr (R == 2) _tile_stored(2, below, stride);
  if constexpr (R == 2 && V == 2) _tile_stored(3, below + kTile, stride);
}

template <int R>
ECAR_AMX void multiply_columns(const char* a, int64_t a_stride, const char* b, int64_t width,
                               int64_t words, bool fresh, float* to) {
  for (int64_t n = 0; n < width; n += 2 * kTile) {
    if (width - n >= 2 * kTile) {
      multiply_tiles<R, 2>(a, a_stride, b + 4 * n, 4 * width, words, fresh, to + n);
    } else {
      multiply_tiles<R, 1>(a, a_stride, b + 4 * n, 4 * width, words, fresh, to + n);
    }
  }
}

// `rows` rows of `words` words by a panel of `width`: whole tiles of words first, then what is
// left. A row's sums do not depend on where the passes end.
ECAR_AMX inline void multiply_panel(const char* a, int64_t rows, const char* b, int64_t width,
                                    int64_t words, float* to) {
  const int64_t whole = words / kTile * kTile, stride = 4 * words;
  const int64_t pass = rows > 2 * kTile ? kPassWords : whole;
  for (int64_t k = 0; k < words;) {
    const int64_t count = k < whole ? smaller(pass, whole - k) : words - k;
    int64_t configured = 0;
    for (int64_t i = 0; i < rows;) {
      const int64_t height = smaller(rows - i, kTile);
      if (height != configured) configure(configured = height, smaller(count, kTile));
      const char* from = a + i * stride + 4 * k;
      float* sums = to + i * flow_block::kPanelColumns;
      if (rows - i >= 2 * kTile) {
        multiply_columns<2>(from, stride, b + 4 * k * width, width, count, k == 0, sums);
        i += 2 * kTile;
      } else {
        multiply_columns<1>(from, stride, b + 4 * k * width, width, count, k == 0, sums);
        i += height;
      }
    }
    k += count;
  }
}

ECAR_AMX inline void release_tiles() { _tile_release(); }
#else
inline void multiply_panel(const char*, int64_t, const char*, int64_t, int64_t, float*) {}
inline void release_tiles() {}
#endif

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
