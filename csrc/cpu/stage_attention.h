#pragma once

// Stage attention without a mask: a block of queries lies inside one stage and sees a prefix of
// the keys, so that nothing is computed to be thrown away. Single-threaded parts that the bindings
// run in parallel; no sum depends on how the units are spread over threads.
//
// Scores are kept transposed, [key][query], with queries in the lanes: the softmax needs no
// horizontal operation, and a key's row is read where it lies, one number at a time.

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/isa.h"

namespace ecar {
namespace stage_attention {

constexpr std::int64_t kQueries = 48;  // of a block, at most: 3 AVX-512 vectors
constexpr std::int64_t kSpread = 16;   // blocks are even in units of so many
constexpr std::int64_t kKeys = 128;    // whose scores are held at a time, at most

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The width of a row of floats in the workspace: zeros beyond the head.
inline std::int64_t padded(std::int64_t head_dim) { return ceil_div(head_dim, 16) * 16; }

// Rows of contiguous elements at data + image * .. + row * .. + head * ..; in elements.
struct Heads {
  const void* data;
  std::int64_t image_stride, row_stride, head_stride;
};
struct MutableHeads {
  void* data;
  std::int64_t image_stride, row_stride, head_stride;
};

// Queries of one stage, and how many keys they see.
struct Block {
  std::int64_t first, count, keys;
};

struct Shape {
  std::int64_t heads, queries, keys, head_dim;
  const Block* blocks;
  std::int64_t num_blocks;
  float scale;
};

struct Forward {
  Shape shape;
  Heads q, k, v;
  MutableHeads out;
  float* lse;  // [images, heads, queries], in base 2; null if not wanted
};

struct Backward {
  Shape shape;
  Heads grad, q, k, v, out;
  const float* lse;
  MutableHeads grad_q, grad_k, grad_v;
};

// The keys go in pieces, about even.
inline std::int64_t piece_of(std::int64_t keys) {
  return ceil_div(ceil_div(keys, ceil_div(keys, kKeys)), 8) * 8;
}

// Of one head's backward: blocks of queries and pieces of keys.
inline std::int64_t parts_of(const Shape& shape) {
  return shape.num_blocks + ceil_div(shape.keys, piece_of(shape.keys));
}

// Units [begin, end): unit = (image * heads + head) * num_blocks + block.
using ForwardKernel = void (*)(const Forward&, std::int64_t begin, std::int64_t end);
// Heads [begin, end) of all images, in five products; or parts [begin, end) of them,
// part = (image * heads + head) * parts_of() + .., which come to seven. The bits are the same.
using BackwardKernel = void (*)(const Backward&, std::int64_t begin, std::int64_t end);

struct Kernels {
  ForwardKernel forward[kDtypes];
  BackwardKernel backward[kDtypes];
  BackwardKernel backward_parts[kDtypes];
};

// Memory for `floats` floats, aligned to a cache line, of the calling thread: kept until a larger
// piece is asked for or the thread ends.
float* workspace(std::int64_t floats);

// Blocks of a stage's `count` queries: as few as can be, about even.
inline std::int64_t blocks_of(std::int64_t count) { return ceil_div(count, kQueries); }
// Writes them from `blocks` on; `first` is the stage's first query.
void divide(std::int64_t first, std::int64_t count, std::int64_t keys, Block* blocks);

}  // namespace stage_attention

#define ECAR_DECLARE(isa) \
  namespace isa { \
  extern const stage_attention::Kernels stage_attention_kernels; \
  }
ECAR_FOR_EACH_ISA(ECAR_DECLARE)
#undef ECAR_DECLARE

}  // namespace ecar
