#include "cpu/flow_block.h"

#include <type_traits>

#include "cpu/amx_product.h"
#include "cpu/flow_block_gelu.h"
#include "cpu/flow_block_tile.h"
#include "cpu/transpose.h"
#include "cpu/vec_rows.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using flow_block::Destination;
using flow_block::Input;
using flow_block::kChunkRows;
using flow_block::kDepth;
using flow_block::Output;
using flow_block::panel_width;
using flow_block::Weight;
using flow_block::whole_pairs;

// Row `index` of all images' tokens; null where the tensor is absent.
template <class T>
inline const T* row_at(const Rows& rows, int64_t index, int64_t tokens) {
  return row<T>(rows, index / tokens, index % tokens);
}

// --- the weight -----------------------------------------------------------------------------

// Where element k of an output lies in a panel of `width`: bfloat16 has k and k + 1 in one word.
template <class T>
int64_t packed_at(int64_t k, int64_t column, int64_t width) {
  return std::is_same_v<T, BFloat16> ? (k / 2 * width + column) * 2 + k % 2 : k * width + column;
}

template <class T>
void pack(const Weight& weight, int64_t begin, int64_t end) {
  constexpr int64_t square = 16;  // neither side is walked a cache line an element
  static_assert(flow_block::kColumnGroup % square == 0, "a panel is whole squares");
  const int64_t depth = whole_pairs(weight.depth);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns;
    const T* from = static_cast<const T*>(weight.data) + first * weight.row_stride;
    T* to = static_cast<T*>(weight.packed) + first * depth;
    const int64_t columns = smaller(kPanelColumns, weight.outputs - first);
    const int64_t width = panel_width(weight.outputs, first);
    for (int64_t k0 = 0; k0 < depth; k0 += square) {
      for (int64_t n0 = 0; n0 < width; n0 += square) {
        for (int64_t k = k0; k < smaller(k0 + square, depth); ++k) {
          for (int64_t n = n0; n < n0 + square; ++n) {
            to[packed_at<T>(k, n, width)] =
                n < columns && k < weight.depth ? from[n * weight.row_stride + k] : T{};
          }
        }
      }
    }
  }
}

// --- the rows -------------------------------------------------------------------------------

// A row that is normalised and modulated as it is read.
template <class T>
struct Source {
  const T *x, *shift, *step_shift, *scale, *step_scale;
  float scale_offset;
  Moments moments;

  void open(const Input& input, int64_t index) {
    x = row_at<T>(input.x, index, input.tokens);
    scale = row_at<T>(input.scale, index, input.tokens);
    if (scale == nullptr) return;
    scale_offset = input.scale_offset;
    shift = row_at<T>(input.shift, index, input.tokens);
    step_shift = row_at<T>(input.step_shift, index, input.tokens);
    step_scale = row_at<T>(input.step_scale, index, input.tokens);
    const auto value = [&](auto io, int64_t at) { return io.load(x + at); };
    moments = moments_of(input.depth, sum_of(input.depth, value), input.eps, value);
  }

  template <class Access>
  Vec load(Access io, int64_t at) const {
    const Vec value = io.load(x + at);
    if (scale == nullptr) return value;
    const Vec modulated =
        fma(moments.normal(value), scale_offset + combine(io, scale, step_scale, at),
            combine(io, shift, step_shift, at));
    return io.keep(modulated);
  }
};

// Block `block` of a chunk of `blocks`; rows beyond `rows` are zeros.
template <class T>
void prepare_block(const Input& input, int64_t first, int64_t rows, int64_t block, int64_t blocks,
                   float* chunk) {
  static_assert(kBlockRows == 8, "transpose() is for 8 rows");
  constexpr int64_t piece = 16;
  static_assert(piece % kWidth == 0 && kDepth % piece == 0, "a piece is whole vectors of a pass");
  const int64_t per_word = multiplies_pairs<T>() ? 2 : 1;
  Source<T> sources[kBlockRows];
  for (int64_t row = 0; row < rows; ++row) sources[row].open(input, first + row);
  float words[piece / 8][kBlockRows][8] = {};
  for (int64_t k = 0; k < input.depth; k += piece) {
    const int64_t size = smaller(piece, input.depth - k);
    for (int64_t row = 0; row < rows; ++row) {
      float read[piece];
      for (int64_t i = 0; i < size; i += kWidth) {
        with_access(size - i, [&](auto io) {
          const Vec values = sources[row].load(io, k + i);
          if (per_word == 2) {
            Full{}.store(reinterpret_cast<T*>(read) + i, values);
          } else {
            Full{}.store(read + i, values);
          }
        });
      }
      for (int64_t i = 0; i < piece / per_word; i += 8) {
        __builtin_memcpy(words[i / 8][row], read + i, sizeof words[0][0]);
      }
    }
    const int64_t pass = k / kDepth * kDepth;
    const int64_t steps = ceil_div(smaller(kDepth, input.depth - pass), per_word);
    float* to =
        chunk + (pass / per_word * blocks + steps * block + (k - pass) / per_word) * kBlockRows;
    const int64_t count = ceil_div(size, per_word);
    for (int64_t i = 0; i < count; i += 8, to += 8 * kBlockRows) {
      if (count - i >= 8) {
        transpose(words[i / 8][0], 8, to, kBlockRows);
      } else {
        float last[8 * kBlockRows];
        transpose(words[i / 8][0], 8, last, kBlockRows);
        __builtin_memcpy(to, last, (count - i) * kBlockRows * sizeof(float));
      }
    }
  }
}

// Rows of a chunk as they are multiplied by tiles.
template <class T>
void prepare_rows(const Input& input, int64_t first, int64_t begin, int64_t end) {
  const int64_t depth = whole_pairs(input.depth);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t chunk = row / kChunkRows * kChunkRows;
    T* to = reinterpret_cast<T*>(input.workspace + chunk * input.depth) + (row - chunk) * depth;
    Source<T> source;
    source.open(input, first + row);
    for_each(input.depth, [&](auto io, int64_t at) { io.store(to + at, source.load(io, at)); });
    if (depth > input.depth) to[input.depth] = T{};
  }
}

template <class T>
void prepare(const Input& input, int64_t first, int64_t rows, int64_t begin, int64_t end) {
  if (multiplies_tiles<T>()) {
    return prepare_rows<T>(input, first, begin * kBlockRows, smaller(end * kBlockRows, rows));
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i * kBlockRows, chunk = row / kChunkRows * kChunkRows;
    prepare_block<T>(input, first + row, smaller(kBlockRows, rows - row),
                     (row - chunk) / kBlockRows,
                     ceil_div(smaller(kChunkRows, rows - chunk), kBlockRows),
                     input.workspace + chunk * input.depth);
  }
}

// --- the product ----------------------------------------------------------------------------

// Columns of one row, all of which go to `to`, where `first` is column `at`.
template <class T>
void finish_row(const Output& output, const Destination& to, int64_t at, int64_t row, int64_t first,
                int64_t columns, const float* sums) {
  T* y = static_cast<T*>(to.data) + row / output.tokens * to.image_stride +
         row % output.tokens * to.token_stride + at;
  const T* bias = output.bias == nullptr ? nullptr : static_cast<const T*>(output.bias) + first;
  const T* gate = row_at<T>(output.gate, row, output.tokens);
  const T* step_gate = row_at<T>(output.step_gate, row, output.tokens);
  const T* residual = row_at<T>(output.residual, row, output.tokens);
  for (int64_t i = 0; i < columns; i += kWidth) {
    with_access(columns - i, [&](auto io) {
      Vec value = io.load(sums + i);
      if (bias != nullptr) value += io.load(bias + i);
      if (output.gelu) value = gelu_tanh(value);
      if (gate != nullptr) {
        value = fma(combine(io, gate, step_gate, first + i), value, io.load(residual + first + i));
      } else if (residual != nullptr) {
        value += io.load(residual + first + i);
      }
      io.store(y + i, value);
    });
  }
}

// A piece of a panel of `width` as floats: itself, or converted.
inline const float* as_floats(const float* piece, int64_t, int64_t, float*) { return piece; }
inline const float* as_floats(const Float16* piece, int64_t depth, int64_t width,
                              float* converted) {
  for (int64_t i = 0; i < depth * width; i += kWidth) {
    Full{}.store(converted + i, Full{}.load(piece + i));
  }
  return converted;
}
inline const float* as_floats(const BFloat16* piece, int64_t depth, int64_t width,
                              float* converted) {
  const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(piece);
  for (int64_t k = 0; k < depth; k += 2, words += width) {
    float* even = converted + k * width;
    for (int64_t i = 0; i < width; i += kWidth) {
      UVec both;
      __builtin_memcpy(&both, words + i, sizeof both);
      Full{}.store(even + i, (Vec)(both << 16));
      Full{}.store(even + width + i, (Vec)(both & 0xffff0000u));
    }
  }
  return converted;
}

// The sums of a panel of `width` by a chunk's blocks of rows.
template <class T, class Product>
void multiply_blocks(const T* weight, int64_t width, int64_t all, int64_t columns,
                     const float* chunk, int64_t rows, float* sums) {
  constexpr bool pairs = !std::is_same_v<Product, Floats>;
  constexpr int64_t per_word = pairs ? 2 : 1;
  alignas(64) float converted[pairs || sizeof(T) == sizeof(float) ? 1 : kDepth * kPanelColumns];
  const int64_t blocks = ceil_div(rows, kBlockRows);
  // While one piece is used the next is fetched from memory, in the first block or spread over
  // the first two or three: 3 lines a step in all.
  const int64_t lines = blocks == 1 ? 3 : blocks == 2 ? 2 : 1;
  for (int64_t k = 0; k < all; k += kDepth) {
    const int64_t depth = smaller(kDepth, all - k);
    const int64_t steps = ceil_div(depth, per_word);
    const T* piece = weight + k * width;
    const char* next = reinterpret_cast<const char*>(piece + depth * width);
    const float* b;
    if constexpr (pairs) {
      b = reinterpret_cast<const float*>(piece);
    } else {
      b = as_floats(piece, depth, width, converted);
    }
    for (int64_t i = 0; i < blocks; ++i) {
      multiply_block<Product>(chunk + (k / per_word * blocks + steps * i) * kBlockRows, b, width,
                              steps, rows - i * kBlockRows, columns, k == 0,
                              sums + i * kBlockRows * kPanelColumns, next + i * lines * steps * 64,
                              i * lines < 3 ? lines : 0);
    }
  }
}

// A panel by a chunk of up to kChunkRows rows, of which `row` is the first.
template <class T, class Product>
void multiply_unit(const Output& output, int64_t panel, const float* chunk, int64_t row,
                   int64_t rows) {
  alignas(64) float sums[kChunkRows * kPanelColumns];
  const int64_t first = panel * kPanelColumns;
  const int64_t columns = smaller(kPanelColumns, output.outputs - first);
  const int64_t width = panel_width(output.outputs, first), depth = whole_pairs(output.depth);
  const T* weight = static_cast<const T*>(output.packed) + first * depth;
  if constexpr (std::is_same_v<Product, Tiles>) {
    static_assert(flow_block::kColumnGroup == 16, "a panel is whole tiles");
    constexpr int64_t stride = kPanelColumns * sizeof(float);
    const TileFactors product{chunk, 2 * depth, weight, 4 * width, depth / 2, sums, stride};
    multiply_by_tiles(product, rows, width, true);
  } else {
    multiply_blocks<T, Product>(weight, width, output.depth, columns, chunk, rows, sums);
  }
  if (output.depth == 0) __builtin_memset(sums, 0, sizeof sums);
  for (int64_t done = 0; done < columns;) {
    const int64_t part = (first + done) / output.part, at = first + done - part * output.part;
    const int64_t count = smaller(columns - done, output.part - at);
    for (int64_t i = 0; i < rows; ++i) {
      finish_row<T>(output, output.y[part], at, row + i, first + done, count,
                    sums + i * kPanelColumns + done);
    }
    done += count;
  }
}

template <class T>
void multiply(const Output& output, int64_t first, int64_t rows, int64_t begin, int64_t end) {
  const int64_t chunks = ceil_div(rows, kChunkRows);
  const bool tiles = multiplies_tiles<T>();
  const auto run = tiles                   ? multiply_unit<T, Tiles>
                   : multiplies_pairs<T>() ? multiply_unit<T, Pairs>
                                           : multiply_unit<T, Floats>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit % chunks * kChunkRows;
    run(output, unit / chunks, output.workspace + row * output.depth, first + row,
        smaller(kChunkRows, rows - row));
  }
  if (tiles) release_tiles();
}

// --- the activation alone, for training ------------------------------------------------------

template <class T>
void gelu(const void* x, void* y, int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(x) + begin;
  T* to = static_cast<T*>(y) + begin;
  for_each(end - begin,
           [&](auto io, int64_t at) { io.store(to + at, gelu_tanh(io.load(from + at))); });
}

template <class T>
void gelu_backward(const void* x, void* grad, void* y, int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(x) + begin;
  T *its_grad = static_cast<T*>(grad) + begin, *to = static_cast<T*>(y) + begin;
  for_each(end - begin, [&](auto io, int64_t at) {
    const GeluAndDerivative its = gelu_tanh_and_derivative(io.load(from + at));
    io.store(its_grad + at, io.load(its_grad + at) * its.derivative);
    io.store(to + at, its.value);
  });
}

}  // namespace

extern const flow_block::Kernels flow_block_kernels = {
    {pack<float>, pack<BFloat16>, pack<Float16>},
    {prepare<float>, prepare<BFloat16>, prepare<Float16>},
    {multiply<float>, multiply<BFloat16>, multiply<Float16>},
    {gelu<float>, gelu<BFloat16>, gelu<Float16>},
    {gelu_backward<float>, gelu_backward<BFloat16>, gelu_backward<Float16>},
};

}  // namespace ECAR_ISA
}  // namespace ecar
