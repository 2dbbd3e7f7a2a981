#include "cpu/stage_attention.h"

#include <type_traits>

#include "cpu/stage_attention_gradients.h"
#include "cpu/stage_attention_tile.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using stage_attention::Forward;

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
  if constexpr (Product::kByTiles) release_tiles();
}

void forward_bfloat16(const Forward& a, int64_t begin, int64_t end) {
#if defined(ECAR_ISA_avx512)
  if (multiplies_tiles<BFloat16>()) return forward<BFloat16, Tiles>(a, begin, end);
  if (multiplies_pairs<BFloat16>()) return forward<BFloat16, Pairs>(a, begin, end);
#endif
  forward<BFloat16, Floats>(a, begin, end);
}

void backward_bfloat16(const Backward& a, int64_t begin, int64_t end) {
#if defined(ECAR_ISA_avx512)
  if (multiplies_tiles<BFloat16>()) return backward<BFloat16, Tiles>(a, begin, end);
  if (multiplies_pairs<BFloat16>()) return backward<BFloat16, Pairs>(a, begin, end);
#endif
  backward<BFloat16, Floats>(a, begin, end);
}

void backward_parts_bfloat16(const Backward& a, int64_t begin, int64_t end) {
#if defined(ECAR_ISA_avx512)
  if (multiplies_tiles<BFloat16>()) return backward_parts<BFloat16, Tiles>(a, begin, end);
  if (multiplies_pairs<BFloat16>()) return backward_parts<BFloat16, Pairs>(a, begin, end);
#endif
  backward_parts<BFloat16, Floats>(a, begin, end);
}

}  // namespace

extern const stage_attention::Kernels stage_attention_kernels = {
    {forward<float, Floats>, forward_bfloat16, forward<Float16, Floats>},
    {backward<float, Floats>, backward_bfloat16, backward<Float16, Floats>},
    {backward_parts<float, Floats>, backward_parts_bfloat16, backward_parts<Float16, Floats>},
};

}  // namespace ECAR_ISA
}  // namespace ecar
