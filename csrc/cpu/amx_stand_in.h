#pragma once

// Functions that do what AMX's instructions do, for *_isa.cpp files: so the kernels' own source is
// tested where the CPU has no tiles. What the instructions would fault at ends the process.
// Operations and numbers are those of Intel's Software Developer's Manual, volume 2.

#include <immintrin.h>

#include <cstring>

#include "cpu/amx.h"

namespace ecar {
namespace ECAR_ISA {
namespace stand_in {

// A thread's tiles: zeros beyond a tile's rows and their bytes.
struct State {
  TileConfig config;
  bool configured = false;
  alignas(64) unsigned char tiles[8][16][64] = {};
};
inline thread_local State its;

inline void require(bool condition) {
  if (!condition) __builtin_trap();
}

inline void loadconfig(const void* from) {
  std::memcpy(&its.config, from, sizeof its.config);
  require(its.config.palette == 1 && its.config.start_row == 0);
  for (const std::uint8_t reserved : its.config.reserved) require(reserved == 0);
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = its.config.rows[tile], row_bytes = its.config.row_bytes[tile];
    require(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0));
    require(tile < 8 || rows == 0);
  }
  std::memset(its.tiles, 0, sizeof its.tiles);
  its.configured = true;
}

inline void release() {
  its.configured = false;
  std::memset(its.tiles, 0, sizeof its.tiles);
}

inline void use(int tile) { require(its.configured && its.config.rows[tile] > 0); }

inline void zero(int tile) {
  use(tile);
  std::memset(its.tiles[tile], 0, sizeof its.tiles[tile]);
}

inline void loadd(int tile, const void* base, long stride) {
  zero(tile);
  for (int row = 0; row < its.config.rows[tile]; ++row) {
    std::memcpy(its.tiles[tile][row], static_cast<const char*>(base) + row * stride,
                its.config.row_bytes[tile]);
  }
}

inline void stored(int tile, void* base, long stride) {
  use(tile);
  for (int row = 0; row < its.config.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, its.tiles[tile][row],
                its.config.row_bytes[tile]);
  }
}

// A row of c by all of b: the products of even elements and those of odd ones are summed apart from
// zero, one rounding each, then added, then added to c. Not inlined, so that no arithmetic moves to
// where MXCSR is another.
__attribute__((noinline)) inline void multiply_row(const unsigned char* a, int words,
                                                   const unsigned char (*b)[64], unsigned char* c) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int k = 0; k < words; ++k) {
    int word;
    std::memcpy(&word, a + 4 * k, sizeof word);
    const __m512i x = _mm512_set1_epi32(word), y = _mm512_loadu_si512(b[k]);
    even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                           _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
    odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                          _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
  }
  _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), _mm512_add_ps(even, odd)));
}

inline void dpbf16ps(int to, int first, int second) {
  const TileConfig& config = its.config;
  use(to), use(first), use(second);
  require(to != first && to != second && first != second);
  require(config.row_bytes[to] % 4 == 0 && config.row_bytes[first] % 4 == 0);
  require(config.rows[to] == config.rows[first]);
  require(config.row_bytes[first] / 4 == config.rows[second]);
  require(config.row_bytes[second] == config.row_bytes[to]);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to the nearest, subnormals are zeros, no exceptions
  for (int row = 0; row < config.rows[to]; ++row) {
    multiply_row(its.tiles[first][row], config.rows[second], its.tiles[second], its.tiles[to][row]);
  }
  _mm_setcsr(before);
}

}  // namespace stand_in
}  // namespace ECAR_ISA
}  // namespace ecar

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig stand_in::loadconfig
#define _tile_release stand_in::release
#define _tile_zero stand_in::zero
#define _tile_loadd stand_in::loadd
#define _tile_stored stand_in::stored
#define _tile_dpbf16ps stand_in::dpbf16ps
