#pragma once

// Attention's backward, for *_isa.cpp files.

#include "cpu/stage_attention_tile.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using stage_attention::Backward;
using stage_attention::Block;
using stage_attention::Shape;

// One head's gradients. A piece of keys at a time gets its own gradients complete, while each
// block of queries that sees it adds to its own.
//
// With Pairs, factors of the scores and of the weights' gradients are words of two of the head's
// elements, factors of the gradients of keys and values words of two queries, and those of the
// gradients of queries words of two keys. Only weights and the scores' gradients are rounded for
// it.
template <class T, class Product>
struct HeadGradients {
  static constexpr int64_t kPerWord = Product::kPerWord;
  static constexpr bool kPairs = kPerWord == 2;

  const Backward& a;
  const Shape& s;
  int64_t width, key_width;  // words of a row whose elements are words, and whose pairs are
  // [block][key_width][kQueries]: queries, in base 2 unless they are pairs, gradients of the output
  float *queries, *grads;
  float* outputs;  // [key_width][kQueries], of one block
  // [block][kQueries / kPerWord][width]
  float *query_rows, *grad_rows;
  float* grad_queries;  // [block][kQueries][width]
  // [block][kQueries]
  float *lse, *delta;
  // [kKeys][key_width]
  float *key_rows, *value_rows;
  float* key_pairs;  // [kKeys / 2][width]
  // [kKeys][width]
  float *grad_keys, *grad_values;
  // [kKeys][kQueries]
  float *weights, *grad_scores;
  // [kKeys][kQueries / 2], words of two queries
  float *weight_pairs, *score_pairs;
  float* score_key_pairs;  // [kKeys / 2][kQueries], words of two keys
  float* alone;            // [width], a row of key_pairs

  static int64_t floats(const Shape& s) {
    const int64_t width = stage_attention::padded(s.head_dim), key_width = width / kPerWord;
    const int64_t pairs = kPairs ? kKeys / 2 * (width + 3 * kQueries) + width : 0;
    return s.num_blocks * kQueries * (4 * key_width + width + 2) + kQueries * key_width +
           kKeys * 2 * (key_width + width + kQueries) + pairs;
  }

  explicit HeadGradients(const Backward& arguments)
      : a(arguments),
        s(arguments.shape),
        width(stage_attention::padded(s.head_dim)),
        key_width(width / kPerWord) {
    float* next = stage_attention::workspace(floats(s));
    const auto take = [&](int64_t count) {
      float* taken = next;
      next += count;
      return taken;
    };
    const int64_t rows = s.num_blocks * kQueries;
    queries = take(rows * key_width), grads = take(rows * key_width);
    query_rows = take(rows * key_width), grad_rows = take(rows * key_width);
    grad_queries = take(rows * width), outputs = take(kQueries * key_width);
    key_rows = take(kKeys * key_width), value_rows = take(kKeys * key_width);
    grad_keys = take(kKeys * width), grad_values = take(kKeys * width);
    weights = take(kKeys * kQueries), grad_scores = take(kKeys * kQueries);
    lse = take(rows), delta = take(rows);
    if constexpr (kPairs) {
      key_pairs = take(kKeys / 2 * width), alone = take(width);
      weight_pairs = take(kKeys / 2 * kQueries), score_pairs = take(kKeys / 2 * kQueries);
      score_key_pairs = take(kKeys / 2 * kQueries);
    }
  }

  // A block's rows, transposed to `columns` and as factors of the keys' gradients to `rows`;
  // scratch: [kQueries][key_width].
  void read_rows(const T* from, int64_t stride, int64_t count, float factor, float* columns,
                 float* rows, float* scratch) {
    float* plain = kPairs ? scratch : rows;
    Product::pack_rows(from, stride, count, s.head_dim, key_width, plain);
    transpose_padded<!kPairs>(plain, count, key_width, factor, columns);
    if constexpr (kPairs) Product::pack_values(from, stride, count, s.head_dim, width, rows);
  }

  void read_queries(int64_t image, int64_t head, int64_t begin, int64_t end) {
    const T* q = head_of<const T>(a.q, image, head);
    const T* grad = head_of<const T>(a.grad, image, head);
    const T* out = head_of<const T>(a.out, image, head);
    const float* its_lse = a.lse + (image * s.heads + head) * s.queries;
    for (int64_t b = begin; b < end; ++b) {
      const Block& block = s.blocks[b];
      const int64_t at = b * kQueries, first = block.first, words = at * key_width;
      float* y = grad_queries + at * width;
      read_rows(q + first * a.q.row_stride, a.q.row_stride, block.count, s.scale * kLog2E,
                queries + words, query_rows + words, y);
      read_rows(grad + first * a.grad.row_stride, a.grad.row_stride, block.count, 1.0f,
                grads + words, grad_rows + words, y);
      if (block.keys > stage_attention::piece_of(s.keys)) {  // else `differentiate` has them all
        Product::pack_rows(out + first * a.out.row_stride, a.out.row_stride, block.count,
                           s.head_dim, key_width, y);
        transpose_padded<!kPairs>(y, block.count, key_width, 1.0f, outputs);
        // Summed as the gradients of the weights are, so that they round alike.
        Product::sum_products(outputs, grads + words, ceil_div(s.head_dim, kPerWord),
                              ceil_div(block.count, kWidth), delta + at);
      }
      __builtin_memset(lse + at, 0, kQueries * sizeof(float));
      __builtin_memcpy(lse + at, its_lse + first, block.count * sizeof(float));
      __builtin_memset(y, 0, kQueries * width * sizeof(float));
    }
  }

  // The scores of a block of queries and `keys` keys become weights, and the weights' gradients
  // the scores': p (g - delta), delta the sum of p g over all keys. Where these are `all` of them
  // it is taken as that, and a rounding of g falls out of the difference; then what p (g - delta)
  // sums to is added, which ought to be 0: where one key has nearly all the weight, what rounding
  // left in delta would be all of its difference. Of more keys than a piece delta is the output
  // times its gradient, whose own rounding is then one among many.
  void differentiate(int64_t b, int64_t keys, int64_t vectors, bool all) {
    for (int64_t v = 0; v < vectors * kWidth; v += kWidth) {
      const Vec its_lse = Full{}.load(lse + b * kQueries + v);
      Vec sum{};
      ECAR_UNROLL for (int64_t i = 0; i < keys; ++i) {
        float* weight = weights + i * kQueries + v;
        const Vec p = exp2(Full{}.load(weight) - its_lse);
        Full{}.store(weight, p);
        if (all) sum = fma(p, Full{}.load(grad_scores + i * kQueries + v), sum);
      }
      Vec its_delta = all ? sum : Full{}.load(delta + b * kQueries + v);
      if (all) {
        Vec left{};
        ECAR_UNROLL for (int64_t i = 0; i < keys; ++i) {
          const int64_t at = i * kQueries + v;
          left = fma(Full{}.load(weights + at), Full{}.load(grad_scores + at) - sum, left);
        }
        its_delta = sum + left;
      }
      const auto gradient = [&](int64_t i) {
        const int64_t at = i * kQueries + v;
        return Full{}.load(weights + at) * (Full{}.load(grad_scores + at) - its_delta);
      };
      if constexpr (kPairs) {
        const auto narrow_to = [&](float* to, int64_t i, Vec its) {
          Full{}.store(reinterpret_cast<BFloat16*>(to) + i * kQueries + v, its);
        };
        for (int64_t i = 0; i < keys; i += 2) {
          const Vec first = gradient(i), second = i + 1 < keys ? gradient(i + 1) : Vec{};
          Full{}.store(score_key_pairs + i / 2 * kQueries + v, pair_of(first, second));
          narrow_to(score_pairs, i, first);
          narrow_to(weight_pairs, i, Full{}.load(weights + i * kQueries + v));
          if (i + 1 == keys) break;
          narrow_to(score_pairs, i + 1, second);
          narrow_to(weight_pairs, i + 1, Full{}.load(weights + (i + 1) * kQueries + v));
        }
      } else {
        ECAR_UNROLL for (int64_t i = 0; i < keys; ++i) {
          Full{}.store(grad_scores + i * kQueries + v, gradient(i));
        }
      }
    }
    const int64_t count = s.blocks[b].count;
    if (kPairs && count % 2 == 1) {  // its word's other query is none
      for (int64_t i = 0; i < keys; ++i) {
        reinterpret_cast<BFloat16*>(weight_pairs)[i * kQueries + count].bits = 0;
        reinterpret_cast<BFloat16*>(score_pairs)[i * kQueries + count].bits = 0;
      }
    }
  }

  // The gradients of the block's queries, of keys [0, keys) of the piece.
  void add_to_queries(int64_t b, int64_t keys, int64_t count) {
    Factors product{kPairs ? score_key_pairs : grad_scores,
                    1,
                    kPairs ? key_pairs : key_rows,
                    width,
                    ceil_div(keys, kPerWord),
                    grad_queries + b * kQueries * width,
                    width,
                    nullptr};
    // The other key of the last word is one that the queries do not see, and may be no number.
    const bool cut = kPairs && keys % 2 == 1 && keys < count;
    float* last = kPairs ? key_pairs + keys / 2 * width : nullptr;
    if (cut) {
      __builtin_memcpy(alone, last, width * sizeof(float));
      for (int64_t at = 0; at < width; at += kWidth) {
        Full{}.store(last + at, (Vec)((UVec)Full{}.load(last + at) & 0xffffu));
      }
    }
    multiply<Into::add, 1, kQueries, Product>(product, s.blocks[b].count, width / kWidth);
    if (cut) __builtin_memcpy(last, alone, width * sizeof(float));
  }

  // Blocks [begin, end) of queries and `count` keys from `first` on.
  void attend(int64_t begin, int64_t end, int64_t first, int64_t count, bool for_queries,
              bool for_keys) {
    constexpr int kRow = kQueries / kPerWord;
    for (int64_t b = begin; b < end; ++b) {
      const Block& block = s.blocks[b];
      const int64_t keys = smaller(count, block.keys - first);
      if (keys <= 0) continue;
      const int64_t vectors = ceil_div(block.count, kWidth), words = b * kQueries * key_width;
      Factors product{
          key_rows, key_width, queries + words, kQueries,        ceil_div(s.head_dim, kPerWord),
          weights,  kQueries,  nullptr,         s.scale * kLog2E};
      multiply<kPairs ? Into::times : Into::replace, 0, 1, Product>(product, keys, vectors);
      product.a = value_rows, product.b = grads + words, product.c = grad_scores;
      multiply<Into::replace, 0, 1, Product>(product, keys, vectors);
      differentiate(b, keys, vectors, first == 0 && keys == block.keys);
      if (for_keys) {
        product = {kPairs ? weight_pairs : weights,
                   kRow,
                   grad_rows + words,
                   width,
                   ceil_div(block.count, kPerWord),
                   grad_values,
                   width,
                   nullptr};
        multiply<Into::add, kRow, 1, Product>(product, keys, width / kWidth);
        product.a = kPairs ? score_pairs : grad_scores;
        product.b = query_rows + words, product.c = grad_keys;
        multiply<Into::add, kRow, 1, Product>(product, keys, width / kWidth);
      }
      if (for_queries) add_to_queries(b, keys, count);
    }
  }

  // The gradients of keys [first, last), which start a piece, and those of blocks [begin, end),
  // as far as each is complete with the others.
  void run(int64_t image, int64_t head, int64_t begin, int64_t end, int64_t first, int64_t last,
           bool for_queries, bool for_keys) {
    read_queries(image, head, begin, end);
    const T* k = head_of<const T>(a.k, image, head);
    const T* v = head_of<const T>(a.v, image, head);
    T* grad_k = head_of<T>(a.grad_k, image, head);
    T* grad_v = head_of<T>(a.grad_v, image, head);
    const int64_t piece = stage_attention::piece_of(s.keys);
    for (; first < last; first += piece) {
      const int64_t count = smaller(piece, last - first);
      const T *its_k = k + first * a.k.row_stride, *its_v = v + first * a.v.row_stride;
      Product::pack_rows(its_k, a.k.row_stride, count, s.head_dim, key_width, key_rows);
      Product::pack_rows(its_v, a.v.row_stride, count, s.head_dim, key_width, value_rows);
      if constexpr (kPairs) {
        Product::pack_values(its_k, a.k.row_stride, count, s.head_dim, width, key_pairs);
      }
      __builtin_memset(grad_keys, 0, count * width * sizeof(float));
      __builtin_memset(grad_values, 0, count * width * sizeof(float));
      attend(begin, end, first, count, for_queries, for_keys);
      for (int64_t i = 0; for_keys && i < count; ++i) {
        narrow_row(grad_keys + i * width, s.scale, s.head_dim,
                   grad_k + (first + i) * a.grad_k.row_stride);
        narrow_row(grad_values + i * width, 1.0f, s.head_dim,
                   grad_v + (first + i) * a.grad_v.row_stride);
      }
    }
    T* grad_q = head_of<T>(a.grad_q, image, head);
    for (int64_t b = begin; for_queries && b < end; ++b) {
      const Block& block = s.blocks[b];
      for (int64_t i = 0; i < block.count; ++i) {
        narrow_row(grad_queries + (b * kQueries + i) * width, s.scale, s.head_dim,
                   grad_q + (block.first + i) * a.grad_q.row_stride);
      }
    }
  }
};

template <class T, class Product>
void backward(const Backward& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  HeadGradients<T, Product> gradients(a);
  for (int64_t i = begin; i < end; ++i) {
    gradients.run(i / s.heads, i % s.heads, 0, s.num_blocks, 0, s.keys, true, true);
  }
  if constexpr (Product::kByTiles) release_tiles();
}

template <class T, class Product>
void backward_parts(const Backward& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  const int64_t piece = stage_attention::piece_of(s.keys), parts = stage_attention::parts_of(s);
  HeadGradients<T, Product> gradients(a);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / parts / s.heads, head = i / parts % s.heads, part = i % parts;
    if (part < s.num_blocks) {
      gradients.run(image, head, part, part + 1, 0, s.blocks[part].keys, true, false);
      continue;
    }
    const int64_t first = (part - s.num_blocks) * piece;
    int64_t seen_from = 0;
    while (seen_from < s.num_blocks && s.blocks[seen_from].keys <= first) ++seen_from;
    gradients.run(image, head, seen_from, s.num_blocks, first, smaller(first + piece, s.keys),
                  false, true);
  }
  if constexpr (Product::kByTiles) release_tiles();
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
