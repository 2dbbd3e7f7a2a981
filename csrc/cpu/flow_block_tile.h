#pragma once

// The innermost part of the product, for *_isa.cpp files: a block of rows by a piece of a panel.

#include "cpu/flow_block.h"
#include "cpu/vec_tile.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using flow_block::ceil_div;
using flow_block::kBlockRows;
using flow_block::kPanelColumns;
using std::int64_t;

constexpr int kTileColumns = kTileVectors * kWidth;
static_assert(kBlockRows % kTileRows == 0 && kPanelColumns % kTileColumns == 0, "whole tiles");

// One pass over a tile of R rows by V vectors, b's rows being `width` apart: its sums are stored to
// `to` where `fresh`, else added. Each step takes a word of each row and asks for `Lines` cache
// lines from `next`.
#define ECAR_TILE(TARGET, MULTIPLY_ADD) \
  template <int R, int V, int Lines> \
  TARGET static void tile(const float* a, const float* b, int64_t width, int64_t steps, \
                          bool fresh, float* to, const char* next) { \
    Vec sums[R][V] = {}; \
    for (int64_t k = 0; k < steps; ++k) { \
      Vec columns[V]; \
      ECAR_UNROLL for (int v = 0; v < V; ++v) columns[v] = Full{}.load(b + v * kWidth); \
      for (int line = 0; line < Lines; ++line) __builtin_prefetch(next + 64 * line, 0, 2); \
      ECAR_UNROLL for (int r = 0; r < R; ++r) { \
        const Vec x = splat(a[r]); \
        ECAR_UNROLL for (int v = 0; v < V; ++v) { \
          sums[r][v] = MULTIPLY_ADD(x, columns[v], sums[r][v]); \
        } \
      } \
      a += kBlockRows; \
      b += width; \
      next += 64 * Lines; \
    } \
    ECAR_UNROLL for (int r = 0; r < R; ++r) { \
      ECAR_UNROLL for (int v = 0; v < V; ++v) { \
        float* p = to + r * kPanelColumns + v * kWidth; \
        Full{}.store(p, fresh ? sums[r][v] : Full{}.load(p) + sums[r][v]); \
      } \
    } \
  }

struct Floats {
  ECAR_TILE(, fma)
};

#if defined(ECAR_ISA_avx512)
struct Pairs {
  ECAR_TILE(ECAR_BF16, fma_pairs)
};
#else
using Pairs = Floats;  // never called
#endif
#undef ECAR_TILE

struct Tiles {};  // the product of amx_product.h

template <class Product, int R, int Lines>
void tiles(const float* a, const float* b, int64_t width, int64_t steps, int64_t columns,
           bool fresh, float* to, const char* next) {
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    const int64_t vectors = ceil_div(columns - n, kWidth);
    if (vectors >= kTileVectors) {
      Product::template tile<R, kTileVectors, Lines>(a, b + n, width, steps, fresh, to + n, next);
    } else if (vectors == 2) {
      Product::template tile<R, 2, 0>(a, b + n, width, steps, fresh, to + n, next);
    } else {
      Product::template tile<R, 1, 0>(a, b + n, width, steps, fresh, to + n, next);
    }
  }
}

// A block of `rows` rows or more; less than half a block takes the smallest tile that holds it.
template <class Product>
void multiply_block(const float* a, const float* b, int64_t width, int64_t steps, int64_t rows,
                    int64_t columns, bool fresh, float* to, const char* next, int64_t lines) {
  if (rows <= 1) return tiles<Product, 1, 0>(a, b, width, steps, columns, fresh, to, next);
  if (rows <= 2) return tiles<Product, 2, 0>(a, b, width, steps, columns, fresh, to, next);
  if (rows <= 4) return tiles<Product, 4, 0>(a, b, width, steps, columns, fresh, to, next);
  for (int r = 0; r < kBlockRows; r += kTileRows) {
    float* out = to + r * kPanelColumns;
    if (lines == 3) {
      tiles<Product, kTileRows, 3>(a + r, b, width, steps, columns, fresh, out, next);
    } else if (lines == 2) {
      tiles<Product, kTileRows, 2>(a + r, b, width, steps, columns, fresh, out, next);
    } else if (lines == 1) {
      tiles<Product, kTileRows, 1>(a + r, b, width, steps, columns, fresh, out, next);
    } else {
      tiles<Product, kTileRows, 0>(a + r, b, width, steps, columns, fresh, out, next);
    }
  }
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
