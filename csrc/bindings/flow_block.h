#pragma once

// A product with a packed weight, checked and run in parallel.

#include "bindings/tokens.h"
#include "cpu/flow_block.h"

namespace ecar {

inline void check_contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    refuse(name, "a contiguous tensor, got strides ", text(tensor.strides()));
  }
}

inline void check_packed(const Tensor& packed, const Tensor& x, std::int64_t outputs,
                         std::int64_t depth) {
  if (outputs < 0) refuse("outputs", "at least 0, got ", outputs);
  const std::int64_t size = flow_block::packed_size(outputs, depth);
  if (packed.dim() != 1 || packed.size(0) != size || packed.stride(0) != 1) {
    refuse("packed", "pack_linear_weight's result for a weight of ", outputs, " x ", depth,
           ", got ", text(packed.sizes()));
  }
  if (dtype_code(packed) != dtype_code(x)) {
    refuse("packed", "the first argument's type, got another one");
  }
}

inline const void* bias_of(const MaybeTensor& bias, const Tensor& x, std::int64_t outputs) {
  if (!bias.has_value()) return nullptr;
  check_sizes("bias", *bias, x, {outputs});
  return bias->const_data_ptr();
}

inline void check_workspace(const Tensor& workspace, const Tokens& t) {
  const std::int64_t size = flow_block::workspace_size(t.images * t.tokens, t.channels);
  if (dtype_code(workspace) != aoti_torch_dtype_float32() || workspace.dim() != 1 ||
      workspace.size(0) < size || workspace.stride(0) != 1) {
    refuse("workspace", size, " or more contiguous float32, got ", text(workspace.sizes()));
  }
}

// All columns of a product to rows that lie one after the other.
inline void write_to(flow_block::Output& output, void* y, std::int64_t outputs, const Tokens& t) {
  output.outputs = output.part = outputs;
  output.y[0] = {y, t.tokens * outputs, outputs};
}

inline void run_product(Dtype dtype, flow_block::Input input, flow_block::Output output,
                        const Tensor& workspace, const Tokens& t) {
  const std::int64_t all = t.images * t.tokens;
  if (all == 0 || output.outputs == 0) return;
  input.tokens = output.tokens = t.tokens;
  input.depth = output.depth = t.channels;
  input.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  output.workspace = input.workspace;
  const flow_block::Kernels& kernels = ECAR_CHOOSE(flow_block_kernels);
  const flow_block::Prepare prepare = kernels.prepare[dtype];
  const flow_block::Multiply multiply = kernels.multiply[dtype];
  for (std::int64_t first = 0; first < all; first += flow_block::kSlabRows) {
    const std::int64_t rows =
        all - first < flow_block::kSlabRows ? all - first : flow_block::kSlabRows;
    parallel(
        flow_block::ceil_div(rows, flow_block::kBlockRows), flow_block::kBlockRows * t.channels,
        [&](std::int64_t begin, std::int64_t end) { prepare(input, first, rows, begin, end); });
    const std::int64_t chunks = flow_block::ceil_div(rows, flow_block::kChunkRows);
    const std::int64_t cost = rows / chunks * flow_block::kPanelColumns * t.channels;
    parallel(
        flow_block::panels(output.outputs) * chunks, cost / kMultiplyAddsAnElement,
        [&](std::int64_t begin, std::int64_t end) { multiply(output, first, rows, begin, end); });
  }
}

}  // namespace ecar
