#pragma once

// The GEMMs of a flow block with what surrounds them fused in: single-threaded parts that the
// bindings run in parallel. Every sum is taken in an order that depends on the weight's shape
// alone, so a row's result depends neither on the other rows nor on the threads.
//
// A call is cut into slabs of kSlabRows rows. A slab's rows are first written to a workspace,
// normalised and modulated, as floats or, where the CPU multiplies those, as pairs of bfloat16;
// then units of one weight panel by one chunk of rows are computed. The weight is packed into
// panels of kPanelColumns outputs, [panel][k][output]; bfloat16 as [panel][k / 2][output][k % 2].
// The last panel has as many outputs as are left, up to a multiple of kColumnGroup with zeros.
// The workspace is
// [chunk][k / kDepth][block][k % kDepth][row of the block], pairs as one word.

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace ecar {
namespace flow_block {

constexpr std::int64_t kPanelColumns = 48;  // 3 AVX-512 vectors: 24 sums with kBlockRows
constexpr std::int64_t kColumnGroup = 16;   // the widest vector
constexpr std::int64_t kBlockRows = 8;
constexpr std::int64_t kDepth = 128;      // of one pass: its piece of a panel, 24 KiB, fits L1
constexpr std::int64_t kChunkRows = 128;  // whose partial sums, 24 KiB, stay near
constexpr std::int64_t kSlabRows = 256;   // bounds the workspace

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::int64_t panels(std::int64_t outputs) { return ceil_div(outputs, kPanelColumns); }

// Columns of the panel that begins with output `first`, zeros among them.
inline std::int64_t panel_width(std::int64_t outputs, std::int64_t first) {
  const std::int64_t left = ceil_div(outputs - first, kColumnGroup) * kColumnGroup;
  return left < kPanelColumns ? left : kPanelColumns;
}

// Panels are as deep as the next even number: bfloat16 is packed in pairs of k.
inline std::int64_t whole_pairs(std::int64_t depth) { return depth + depth % 2; }

// In elements; in floats.
inline std::int64_t packed_size(std::int64_t outputs, std::int64_t depth) {
  return ceil_div(outputs, kColumnGroup) * kColumnGroup * whole_pairs(depth);
}
inline std::int64_t workspace_size(std::int64_t rows, std::int64_t depth) {
  return ceil_div(rows < kSlabRows ? rows : kSlabRows, kBlockRows) * kBlockRows * depth;
}

struct Weight {
  const void* data;         // [outputs, depth]
  std::int64_t row_stride;  // in elements
  std::int64_t outputs, depth;
  void* packed;
};

// What the rows go through before the product: LayerNorm and modulation,
// LN(x) (scale_offset + scale + step_scale) + shift + step_shift, or nothing where scale is absent.
struct Input {
  Rows x, shift, step_shift, scale, step_scale;
  std::int64_t tokens;  // of one image
  std::int64_t depth;
  float eps, scale_offset;
  float* workspace;
};

// Where rows of elements are written to, as Rows.
struct Destination {
  void* data;
  std::int64_t image_stride, token_stride;
};

constexpr std::int64_t kParts = 3;

// What the product goes through: act(product + bias), then times gate + step_gate where there is a
// gate, then plus the residual where there is one. Columns [i * part, (i + 1) * part) go to y[i].
struct Output {
  const void* packed;
  const float* workspace;
  const void* bias;  // null if absent
  bool gelu;
  Rows gate, step_gate, residual;
  std::int64_t tokens;
  std::int64_t outputs, depth;
  Destination y[kParts];
  std::int64_t part;  // outputs, or less: a third of q, k and v
};

// Panels [begin, end).
using Pack = void (*)(const Weight&, std::int64_t begin, std::int64_t end);
// Blocks [begin, end) of the slab of `rows` rows from row `first` on.
using Prepare = void (*)(const Input&, std::int64_t first, std::int64_t rows, std::int64_t begin,
                         std::int64_t end);
// Units [begin, end) of that slab: unit = panel * chunks + chunk.
using Multiply = void (*)(const Output&, std::int64_t first, std::int64_t rows, std::int64_t begin,
                          std::int64_t end);

// Elements [begin, end): y = gelu(x); in the backward, grad *= gelu'(x), too.
using Gelu = void (*)(const void* x, void* y, std::int64_t begin, std::int64_t end);
using GeluBackward = void (*)(const void* x, void* grad, void* y, std::int64_t begin,
                              std::int64_t end);

struct Kernels {
  Pack pack[kDtypes];
  Prepare prepare[kDtypes];
  Multiply multiply[kDtypes];
  Gelu gelu[kDtypes];
  GeluBackward gelu_backward[kDtypes];
};

}  // namespace flow_block

#define ECAR_DECLARE(isa) \
  namespace isa { \
  extern const flow_block::Kernels flow_block_kernels; \
  }
ECAR_FOR_EACH_ISA(ECAR_DECLARE)
#undef ECAR_DECLARE

}  // namespace ecar
