#pragma once

// The products, the exponential and the packing of attention, for *_isa.cpp files.

#include "cpu/amx_product.h"
#include "cpu/stage_attention.h"
#include "cpu/transpose.h"
#include "cpu/vec_tile.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using stage_attention::ceil_div;
using stage_attention::Heads;
using stage_attention::kKeys;
using stage_attention::kQueries;
using stage_attention::MutableHeads;
using std::int64_t;

// max(a, b); a NaN in b is kept.
inline Vec larger(Vec a, Vec b) {
#if defined(ECAR_ISA_avx512)
  return _mm512_max_ps(a, b);
#elif defined(ECAR_ISA_avx2)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 2^x within an ulp where -125 <= x <= 0, and 2^-125 below; a NaN stays one.
inline Vec exp2(Vec x) {
  x = larger(splat(-125.0f), x);
  // The ulp of `magic` is 1: adding it rounds to a whole number, whose last bits are then the
  // exponent of 2^n.
  const Vec magic = splat(0x1.8p23f + 127.0f);
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  // Minimax where |r| <= 1/2: 2e-9.
  Vec p = splat(1.5353365e-4f);
  p = fma(p, r, splat(1.3398875e-3f));
  p = fma(p, r, splat(9.618437e-3f));
  p = fma(p, r, splat(5.5503324e-2f));
  p = fma(p, r, splat(2.4022648e-1f));
  p = fma(p, r, splat(6.931472e-1f));
  p = fma(p, r, splat(1.0f));
  return p * (Vec)((IVec)shifted << 23);
}

constexpr float kLog2E = 1.44269504f;

// To the nearest bfloat16, in the upper half; a NaN that arithmetic makes stays one.
inline UVec round_to_bfloat16(Vec v) {
  const UVec bits = (UVec)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Of two numbers, a word.
inline Vec pair_of(Vec first, Vec second) {
  return (Vec)(round_to_bfloat16(first) >> 16 | (round_to_bfloat16(second) & 0xffff0000u));
}

// --- rows of the tensors --------------------------------------------------------------------

template <class T, class View>
inline auto head_of(const View& view, int64_t image, int64_t head) {
  return static_cast<T*>(view.data) + image * view.image_stride + head * view.head_stride;
}

// Rows to floats, `width` a row, zeros beyond the head.
template <class T>
void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t head_dim, int64_t width,
                float* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += width) {
    for_each(head_dim, [&](auto io, int64_t at) { Full{}.store(to + at, io.load(from + at)); });
    const int64_t written = ceil_div(head_dim, kWidth) * kWidth;
    for (int64_t at = written; at < width; at += kWidth) Full{}.store(to + at, Vec{});
  }
}

// Rows as they are, `width` words of two elements a row, zeros beyond the head.
inline void copy_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim,
                      int64_t width, float* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += width) {
    __builtin_memset(to + head_dim / 2, 0, (width - head_dim / 2) * sizeof(float));
    __builtin_memcpy(to, from, head_dim * sizeof(BFloat16));
  }
}

// Every two rows to `width` words of an element of each, zeros beyond the head and for a last row
// that is alone.
inline void pair_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim,
                      int64_t width, float* to) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * stride, to += width) {
    for_each(head_dim, [&](auto io, int64_t at) {
      const UVec first = (UVec)io.load(from + at);  // in the upper half
      const UVec second = i + 1 < rows ? (UVec)io.load(from + stride + at) : UVec{};
      Full{}.store(to + at, (Vec)(first >> 16 | second));
    });
    const int64_t written = ceil_div(head_dim, kWidth) * kWidth;
    for (int64_t at = written; at < width; at += kWidth) Full{}.store(to + at, Vec{});
  }
}

// --- products -------------------------------------------------------------------------------

// What becomes of a product: it replaces what was there, does so times a factor, is added, or is
// added to it times its row's factor.
enum class Into { replace, times, add, scaled };

// c[r][n] = sum over k < depth of a[r * row + k * kStep] b[k * b_row + n], a's row stride known
// when compiled where kRow > 0. Where bfloat16 is multiplied as pairs, k and k + 1 are one word.
struct Factors {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_row;
  int64_t depth;
  float* c;
  int64_t c_row;
  const float* scales;  // of the rows, for Into::scaled
  float factor = 1.0f;  // for Into::times
};

#define ECAR_TILE(TARGET, MULTIPLY_ADD) \
  template <Into kInto, int kRow, int kStep, int R, int V> \
  TARGET static void tile(const Factors& f, int64_t row, int64_t column) { \
    const int64_t a_row = kRow > 0 ? kRow : f.a_row, b_row = f.b_row; \
    const float* a = f.a + row * a_row; \
    const float* b = f.b + column; \
    Vec sums[R][V] = {}; \
    for (int64_t k = 0; k < f.depth; ++k) { \
      Vec columns[V]; \
      ECAR_UNROLL for (int v = 0; v < V; ++v) columns[v] = Full{}.load(b + v * kWidth); \
      ECAR_UNROLL for (int r = 0; r < R; ++r) { \
        const Vec x = splat(a[r * a_row]); \
        ECAR_UNROLL for (int v = 0; v < V; ++v) { \
          sums[r][v] = MULTIPLY_ADD(x, columns[v], sums[r][v]); \
        } \
      } \
      a += kStep; \
      b += b_row; \
    } \
    ECAR_UNROLL for (int r = 0; r < R; ++r) { \
      float* c = f.c + (row + r) * f.c_row + column; \
      ECAR_UNROLL for (int v = 0; v < V; ++v) { \
        Vec sum = sums[r][v]; \
        if constexpr (kInto == Into::times) sum = sum * splat(f.factor); \
        if constexpr (kInto == Into::add) sum += Full{}.load(c + v * kWidth); \
        if constexpr (kInto == Into::scaled) { \
          sum = fma(Full{}.load(c + v * kWidth), splat(f.scales[row + r]), sum); \
        } \
        Full{}.store(c + v * kWidth, sum); \
      } \
    } \
  }

// sums[n] = sum over k < depth of a[k][n] b[k][n], rows of kQueries words, in the order of a
// tile's.
#define ECAR_SUM_PRODUCTS(TARGET, MULTIPLY_ADD) \
  TARGET static void sum_products(const float* a, const float* b, int64_t depth, int64_t vectors, \
                                  float* sums) { \
    for (int64_t v = 0; v < vectors * kWidth; v += kWidth) { \
      Vec sum{}; \
      for (int64_t k = 0; k < depth; ++k) { \
        sum = MULTIPLY_ADD(Full{}.load(a + k * kQueries + v), Full{}.load(b + k * kQueries + v), \
                           sum); \
      } \
      Full{}.store(sums + v, sum); \
    } \
  }

// The products, and how the tensors' rows become factors: kPerWord elements a word.
struct Floats {
  static constexpr int64_t kPerWord = 1;
  static constexpr bool kByTiles = false;
  template <class... Arguments>
  static void pack_rows(Arguments... arguments) {
    widen_rows(arguments...);
  }
  template <class... Arguments>
  static void pack_values(Arguments... arguments) {
    widen_rows(arguments...);
  }
  ECAR_TILE(, fma)
  ECAR_SUM_PRODUCTS(, fma)
};
#if defined(ECAR_ISA_avx512)
struct Pairs {
  static constexpr int64_t kPerWord = 2;
  static constexpr bool kByTiles = false;
  template <class... Arguments>
  static void pack_rows(Arguments... arguments) {
    copy_rows(arguments...);
  }
  template <class... Arguments>
  static void pack_values(Arguments... arguments) {
    pair_rows(arguments...);
  }
  ECAR_TILE(ECAR_BF16, fma_pairs)
  ECAR_SUM_PRODUCTS(ECAR_BF16, fma_pairs)
};

// Pairs, multiplied by AMX's tiles. Where a's words of one row do not lie in a row, they are put
// there first: at most kKeys / 2 of them, of kQueries rows.
struct Tiles : Pairs {
  static constexpr bool kByTiles = true;

  template <Into kInto, int kRow, int kStep>
  static void multiply(const Factors& f, int64_t rows, int64_t columns) {
    const float* a = f.a;
    int64_t a_row = kRow > 0 ? kRow : f.a_row;
    alignas(64) float turned[kStep == 1 ? 1 : kQueries * kKeys / 2];
    if constexpr (kStep != 1) {
      constexpr int64_t stride = kKeys / 2;
      for (int64_t k = 0; k < f.depth; k += 8) {
        for (int64_t row = 0; row < rows; row += 8) {
          transpose<false>(f.a + k * kStep + row, kStep, turned + row * stride + k, stride);
        }
      }
      a = turned, a_row = stride;
    }
    if constexpr (kInto == Into::scaled) scale(f, rows, columns);
    multiply_by_tiles({a, 4 * a_row, f.b, 4 * f.b_row, f.depth, f.c, 4 * f.c_row}, rows, columns,
                      kInto == Into::replace || kInto == Into::times);
    if constexpr (kInto == Into::times) scale(f, rows, columns);
  }

  // Each row by its scale, or all by the factor.
  static void scale(const Factors& f, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
      const Vec factor = splat(f.scales != nullptr ? f.scales[i] : f.factor);
      for (int64_t at = 0; at < columns; at += kWidth) {
        float* its = f.c + i * f.c_row + at;
        Full{}.store(its, Full{}.load(its) * factor);
      }
    }
  }

  static void sum_products(const float* a, const float* b, int64_t depth, int64_t vectors,
                           float* sums) {
    alignas(64) float products[kQueries * kQueries];
    const int64_t queries = vectors * kWidth;
    Factors f{a, 1, b, kQueries, 0, products, kQueries, nullptr};
    for (int64_t k = 0; k < depth; k += f.depth) {
      f.a = a + k * kQueries, f.b = b + k * kQueries, f.depth = smaller(depth - k, kKeys / 2);
      if (k == 0) {
        multiply<Into::replace, 1, kQueries>(f, queries, queries);
      } else {
        multiply<Into::add, 1, kQueries>(f, queries, queries);
      }
    }
    for (int64_t i = 0; i < queries; ++i) sums[i] = products[i * kQueries + i];
  }
};
#endif
#undef ECAR_TILE
#undef ECAR_SUM_PRODUCTS

template <class Product, Into kInto, int kRow, int kStep, int V>
void tiles(const Factors& f, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    Product::template tile<kInto, kRow, kStep, kTileRows, V>(f, row, column);
  }
  if constexpr (kTileRows > 4) {
    if (rows - row >= 4) {
      Product::template tile<kInto, kRow, kStep, 4, V>(f, row, column), row += 4;
    }
  }
  if (rows - row >= 2) Product::template tile<kInto, kRow, kStep, 2, V>(f, row, column), row += 2;
  if (rows - row >= 1) Product::template tile<kInto, kRow, kStep, 1, V>(f, row, column);
}

// `rows` rows by `vectors` vectors of columns, which go in tiles about even.
template <Into kInto, int kRow, int kStep, class Product = Floats>
void multiply(const Factors& f, int64_t rows, int64_t vectors) {
  if constexpr (Product::kByTiles) {
    return Product::template multiply<kInto, kRow, kStep>(f, rows, vectors * kWidth);
  }
  const int64_t count = ceil_div(vectors, kTileVectors);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = vectors * i / count, size = vectors * (i + 1) / count - first;
    if (size == 3) {
      tiles<Product, kInto, kRow, kStep, 3>(f, rows, first * kWidth);
    } else if (size == 2) {
      tiles<Product, kInto, kRow, kStep, 2>(f, rows, first * kWidth);
    } else {
      tiles<Product, kInto, kRow, kStep, 1>(f, rows, first * kWidth);
    }
  }
}

// --- transposition --------------------------------------------------------------------------

// Queries are transposed as many at a time: whole vectors, and eights.
constexpr int64_t kWholeRows = kWidth > 8 ? kWidth : 8;

// Whole rows of `width` words to [width][kQueries], as they are or times `factor`.
template <bool kTimes = true>
inline void transpose_rows(const float* from, int64_t stride, int64_t rows, int64_t width,
                           float factor, float* to) {
  for (int64_t row = 0; row < rows; row += 8) {
    for (int64_t at = 0; at < width; at += 8) {
      transpose<kTimes>(from + row * stride + at, stride, to + at * kQueries + row, kQueries,
                        factor);
    }
  }
}

// As above, of any number of rows; zeros are put behind them.
template <bool kTimes = true>
inline void transpose_padded(float* from, int64_t rows, int64_t width, float factor, float* to) {
  const int64_t whole = ceil_div(rows, kWholeRows) * kWholeRows;
  __builtin_memset(from + rows * width, 0, (whole - rows) * width * sizeof(float));
  transpose_rows<kTimes>(from, width, whole, width, factor, to);
}

// Floats times `factor` to a row of the tensor.
template <class T>
inline void narrow_row(const float* from, float factor, int64_t head_dim, T* to) {
  for_each(head_dim, [&](auto io, int64_t at) { io.store(to + at, io.load(from + at) * factor); });
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
