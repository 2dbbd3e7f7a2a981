#include "cpu/stage_attention.h"

#include <type_traits>

#include "cpu/stage_attention_tile.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using stage_attention::Backward;
using stage_attention::Block;
using stage_attention::Forward;
using stage_attention::Shape;

constexpr float kLog2E = 1.44269504f;

// A number of at least 0 to the nearest bfloat16, in the upper half; a NaN stays one.
inline UVec round_to_bfloat16(Vec v) {
  const UVec bits = (UVec)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// The running softmax of a block of queries.
struct Softmax {
  alignas(64) float largest[kQueries];
  alignas(64) float total[kQueries];
  alignas(64) float rounded[kQueries];  // the total of the weights as they are multiplied
  alignas(64) float shrink[kQueries];   // of what was summed before

  // Scores in base 2, [keys][kQueries], to weights; as pairs to [keys / 2][kQueries].
  template <bool kPairs>
  void take(float* scores, int64_t keys, int64_t vectors, bool fresh) {
    for (int64_t v = 0; v < vectors * kWidth; v += kWidth) {
      float* at = scores + v;
      Vec most[4];
      for (Vec& its : most) its = fresh ? Full{}.load(at) : Full{}.load(largest + v);
      int64_t i = 0;
      for (; i + 4 <= keys; i += 4) {
        ECAR_UNROLL for (int j = 0; j < 4; ++j) {
          most[j] = larger(most[j], Full{}.load(at + (i + j) * kQueries));
        }
      }
      for (; i < keys; ++i) most[0] = larger(most[0], Full{}.load(at + i * kQueries));
      const Vec now = larger(larger(most[0], most[1]), larger(most[2], most[3]));
      Vec sums[4] = {}, pair_sums[2] = {};
      const auto weight = [&](int64_t key) { return exp2(Full{}.load(at + key * kQueries) - now); };
      const auto weigh = [&](int64_t key, Vec& sum) {
        const Vec its = weight(key);
        Full{}.store(at + key * kQueries, its);
        sum += its;
      };
      const auto weigh_pair = [&](int64_t key, bool both, Vec& sum, Vec& pair_sum) {
        const Vec first = weight(key), second = both ? weight(key + 1) : Vec{};
        const UVec low = round_to_bfloat16(first) >> 16;
        const UVec high = round_to_bfloat16(second) & 0xffff0000u;
        Full{}.store(at + key / 2 * kQueries, (Vec)(low | high));
        sum += first + second;
        pair_sum += (Vec)(low << 16) + (Vec)high;
      };
      if constexpr (kPairs) {
        for (i = 0; i + 4 <= keys; i += 4) {
          ECAR_UNROLL for (int j = 0; j < 2; ++j)
              weigh_pair(i + 2 * j, true, sums[j], pair_sums[j]);
        }
        for (; i < keys; i += 2) weigh_pair(i, i + 1 < keys, sums[0], pair_sums[0]);
      } else {
        for (i = 0; i + 4 <= keys; i += 4) {
          ECAR_UNROLL for (int j = 0; j < 4; ++j) weigh(i + j, sums[j]);
        }
        for (; i < keys; ++i) weigh(i, sums[0]);
      }
      Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), pair_sum = pair_sums[0] + pair_sums[1];
      if (!fresh) {
        const Vec factor = exp2(Full{}.load(largest + v) - now);
        Full{}.store(shrink + v, factor);
        sum = fma(Full{}.load(total + v), factor, sum);
        if (kPairs) pair_sum = fma(Full{}.load(rounded + v), factor, pair_sum);
      }
      Full{}.store(largest + v, now);
      Full{}.store(total + v, sum);
      Full{}.store(rounded + v, kPairs ? pair_sum : sum);
    }
  }
};

// With Pairs, keys and queries are words of two of the head's elements, and values and weights
// words of two keys. Only the weights are rounded for it, and divided by what they then sum to.
template <class T, class Product>
void forward(const Forward& a, int64_t begin, int64_t end) {
  constexpr bool direct = std::is_same_v<T, float>;  // keys are read where they lie
  constexpr int64_t per_word = Product::kPerWord;
  constexpr bool pairs = per_word == 2;
  const Shape& s = a.shape;
  const int64_t width = stage_attention::padded(s.head_dim), key_width = width / per_word;
  const int64_t most = ceil_div(s.keys, per_word) * width;  // words of the values
  float* queries =
      stage_attention::workspace(2 * kQueries * width + kKeys * kQueries + (direct ? 1 : 2) * most);
  float* scores = queries + kQueries * width;
  float* sums = scores + kKeys * kQueries;
  float* values = sums + kQueries * width;
  float* keys = values + most;
  const float factor = s.scale * kLog2E;
  Softmax softmax;
  int64_t current = -1, copied = 0;  // keys and values of the current head
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block& block = s.blocks[unit % s.num_blocks];
    const int64_t image = unit / s.num_blocks / s.heads, head = unit / s.num_blocks % s.heads;
    if (unit / s.num_blocks != current) current = unit / s.num_blocks, copied = 0;
    const T* k = head_of<const T>(a.k, image, head);
    if (copied < block.keys) {
      const int64_t first = copied / per_word * per_word;  // a row that was alone gets its pair
      Product::pack_values(head_of<const T>(a.v, image, head) + first * a.v.row_stride,
                           a.v.row_stride, block.keys - first, s.head_dim, width,
                           values + first / per_word * width);
      if constexpr (!direct) {
        Product::pack_rows(k + copied * a.k.row_stride, a.k.row_stride, block.keys - copied,
                           s.head_dim, key_width, keys + copied * key_width);
      }
      copied = block.keys;
    }
    const T* q = head_of<const T>(a.q, image, head) + block.first * a.q.row_stride;
    if (direct && width == s.head_dim && block.count % kWholeRows == 0) {
      transpose_rows(reinterpret_cast<const float*>(q), a.q.row_stride, block.count, width, factor,
                     queries);
    } else {
      Product::pack_rows(q, a.q.row_stride, block.count, s.head_dim, key_width, sums);
      transpose_padded<!pairs>(sums, block.count, key_width, factor, queries);
    }

    const int64_t vectors = ceil_div(block.count, kWidth);
    const int64_t piece = stage_attention::piece_of(block.keys);
    for (int64_t at = 0; at < block.keys; at += piece) {
      const int64_t count = smaller(piece, block.keys - at);
      Factors product{keys + at * key_width,
                      key_width,
                      queries,
                      kQueries,
                      ceil_div(s.head_dim, per_word),
                      scores,
                      kQueries,
                      nullptr,
                      factor};
      if constexpr (direct) product.a = k + at * a.k.row_stride, product.a_row = a.k.row_stride;
      multiply<pairs ? Into::times : Into::replace, 0, 1, Product>(product, count, vectors);
      softmax.take<pairs>(scores, count, vectors, at == 0);
      product = {scores,
                 1,
                 values + at / per_word * width,
                 width,
                 ceil_div(count, per_word),
                 sums,
                 width,
                 softmax.shrink};
      if (at == 0) {
        multiply<Into::replace, 1, kQueries, Product>(product, block.count, width / kWidth);
      } else {
        multiply<Into::scaled, 1, kQueries, Product>(product, block.count, width / kWidth);
      }
    }
    T* out = head_of<T>(a.out, image, head) + block.first * a.out.row_stride;
    for (int64_t i = 0; i < block.count; ++i, out += a.out.row_stride) {
      narrow_row(sums + i * width, 1.0f / softmax.rounded[i], s.head_dim, out);
    }
    if (a.lse != nullptr) {
      float* lse = a.lse + current * s.queries + block.first;
      for (int64_t i = 0; i < block.count; ++i) {
        lse[i] = softmax.largest[i] + __builtin_log2f(softmax.total[i]);
      }
    }
  }
}

// One head's gradients. A piece of keys at a time gets its own gradients complete, while each
// block of queries that sees it adds to its own.
template <class T>
struct HeadGradients {
  const Backward& a;
  const Shape& s;
  int64_t width;
  // [block][width][kQueries]: queries in base 2, gradients of the output
  float *queries, *grads;
  float* outputs;  // [width][kQueries], of one block
  // [block][kQueries][width]
  float *query_rows, *grad_rows, *grad_queries;
  // [block][kQueries]
  float *lse, *delta;
  // [kKeys][width]
  float *key_rows, *value_rows, *grad_keys, *grad_values;
  // [kKeys][kQueries]
  float *weights, *grad_scores;

  static int64_t floats(const Shape& s) {
    const int64_t width = stage_attention::padded(s.head_dim);
    return s.num_blocks * kQueries * (5 * width + 2) + kQueries * width +
           kKeys * (4 * width + 2 * kQueries);
  }

  explicit HeadGradients(const Backward& arguments)
      : a(arguments), s(arguments.shape), width(stage_attention::padded(s.head_dim)) {
    float* next = stage_attention::workspace(floats(s));
    const auto take = [&](int64_t count) {
      float* taken = next;
      next += count;
      return taken;
    };
    const int64_t rows = s.num_blocks * kQueries;
    queries = take(rows * width), grads = take(rows * width);
    query_rows = take(rows * width), grad_rows = take(rows * width);
    grad_queries = take(rows * width), outputs = take(kQueries * width);
    key_rows = take(kKeys * width), value_rows = take(kKeys * width);
    grad_keys = take(kKeys * width), grad_values = take(kKeys * width);
    weights = take(kKeys * kQueries), grad_scores = take(kKeys * kQueries);
    lse = take(rows), delta = take(rows);
  }

  void read_queries(int64_t image, int64_t head, int64_t begin, int64_t end) {
    const T* q = head_of<const T>(a.q, image, head);
    const T* grad = head_of<const T>(a.grad, image, head);
    const T* out = head_of<const T>(a.out, image, head);
    const float* its_lse = a.lse + (image * s.heads + head) * s.queries;
    for (int64_t b = begin; b < end; ++b) {
      const Block& block = s.blocks[b];
      const int64_t at = b * kQueries, first = block.first;
      widen_rows(q + first * a.q.row_stride, a.q.row_stride, block.count, s.head_dim, width,
                 query_rows + at * width);
      transpose_padded(query_rows + at * width, block.count, width, s.scale * kLog2E,
                       queries + at * width);
      widen_rows(grad + first * a.grad.row_stride, a.grad.row_stride, block.count, s.head_dim,
                 width, grad_rows + at * width);
      transpose_padded(grad_rows + at * width, block.count, width, 1.0f, grads + at * width);
      // Summed as the gradients of the weights are, so that they round alike.
      float* y = grad_queries + at * width;
      if (block.keys > stage_attention::piece_of(s.keys)) {  // else `differentiate` has them all
        widen_rows(out + first * a.out.row_stride, a.out.row_stride, block.count, s.head_dim, width,
                   y);
        transpose_padded(y, block.count, width, 1.0f, outputs);
        for (int64_t v = 0; v < ceil_div(block.count, kWidth) * kWidth; v += kWidth) {
          Vec sum{};
          for (int64_t d = 0; d < s.head_dim; ++d) {
            sum = fma(Full{}.load(outputs + d * kQueries + v),
                      Full{}.load(grads + at * width + d * kQueries + v), sum);
          }
          Full{}.store(delta + at + v, sum);
        }
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
      ECAR_UNROLL for (int64_t i = 0; i < keys; ++i) {
        float* grad = grad_scores + i * kQueries + v;
        Full{}.store(grad,
                     Full{}.load(weights + i * kQueries + v) * (Full{}.load(grad) - its_delta));
      }
    }
  }

  // Blocks [begin, end) of queries and `count` keys from `first` on.
  void attend(int64_t begin, int64_t end, int64_t first, int64_t count, bool for_queries,
              bool for_keys) {
    for (int64_t b = begin; b < end; ++b) {
      const Block& block = s.blocks[b];
      const int64_t keys = smaller(count, block.keys - first);
      if (keys <= 0) continue;
      const int64_t vectors = ceil_div(block.count, kWidth), at = b * kQueries * width;
      Factors product{key_rows,   width,   queries + at, kQueries,
                      s.head_dim, weights, kQueries,     nullptr};
      multiply<Into::replace, 0, 1>(product, keys, vectors);
      product.a = value_rows, product.b = grads + at, product.c = grad_scores;
      multiply<Into::replace, 0, 1>(product, keys, vectors);
      differentiate(b, keys, vectors, first == 0 && keys == block.keys);
      if (for_keys) {
        product = {weights,     kQueries,    grad_rows + at, width,
                   block.count, grad_values, width,          nullptr};
        multiply<Into::add, kQueries, 1>(product, keys, width / kWidth);
        product.a = grad_scores, product.b = query_rows + at, product.c = grad_keys;
        multiply<Into::add, kQueries, 1>(product, keys, width / kWidth);
      }
      if (for_queries) {
        product = {grad_scores, 1, key_rows, width, keys, grad_queries + at, width, nullptr};
        multiply<Into::add, 1, kQueries>(product, block.count, width / kWidth);
      }
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
      widen_rows(k + first * a.k.row_stride, a.k.row_stride, count, s.head_dim, width, key_rows);
      widen_rows(v + first * a.v.row_stride, a.v.row_stride, count, s.head_dim, width, value_rows);
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

template <class T>
void backward(const Backward& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  HeadGradients<T> gradients(a);
  for (int64_t i = begin; i < end; ++i) {
    gradients.run(i / s.heads, i % s.heads, 0, s.num_blocks, 0, s.keys, true, true);
  }
}

template <class T>
void backward_parts(const Backward& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  const int64_t piece = stage_attention::piece_of(s.keys), parts = stage_attention::parts_of(s);
  HeadGradients<T> gradients(a);
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
}

void forward_bfloat16(const Forward& a, int64_t begin, int64_t end) {
#if defined(ECAR_ISA_avx512)
  if (multiplies_pairs<BFloat16>()) return forward<BFloat16, Pairs>(a, begin, end);
#endif
  forward<BFloat16, Floats>(a, begin, end);
}

}  // namespace

extern const stage_attention::Kernels stage_attention_kernels = {
    {forward<float, Floats>, forward_bfloat16, forward<Float16, Floats>},
    {backward<float>, backward<BFloat16>, backward<Float16>},
    {backward_parts<float>, backward_parts<BFloat16>, backward_parts<Float16>},
};

}  // namespace ECAR_ISA
}  // namespace ecar
