// The fused GEMMs of a flow block on CPU tensors, with the weight packed ahead of time.

#include "bindings/tokens.h"
#include "cpu/gemm.h"
#include "cpu/pages.h"

namespace ecar {
namespace {

using std::int64_t;

// Multiply-adds that cost about as much as one element of elementwise work: see kGrain.
constexpr int64_t kMultiplyAddsAnElement = 8;

Tensor pack_linear_weight(const Tensor& weight) {
  const Dtype dtype = check_leading("weight", weight, 2);
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  const int64_t size = gemm::packed_size(outputs, depth);
  const int64_t item = weight.element_size(), page = kLargePage;
  const bool large = size * item >= page;
  // One page more, to align the first; what is left before and behind is given back. The rest
  // beyond the last whole page lies in small ones: rounded up, a model of width 768 would take
  // 15 % more memory.
  Tensor packed = empty(weight, {large ? size + page / item : size});
  int64_t skipped = 0;
  if (large) {
    const int64_t address = reinterpret_cast<int64_t>(packed.const_data_ptr());
    skipped = (gemm::ceil_div(address, page) * page - address) / item;
    packed = torch::stable::narrow(packed, 0, skipped, size);
    ask_for_large_pages(packed.mutable_data_ptr(), size * item);
  }
  const gemm::Weight a{weight.const_data_ptr(), weight.stride(0), outputs, depth,
                       packed.mutable_data_ptr()};
  const gemm::Pack kernel = ECAR_CHOOSE(gemm_kernels).pack[dtype];
  parallel(gemm::panels(outputs), gemm::kPanelColumns * depth, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  if (large) {
    char* data = static_cast<char*>(packed.mutable_data_ptr());
    move_to_large_pages(data, size * item);
    // Only now: where the memory was part of a large page before, the packing filled all of it.
    give_back_pages(data - skipped * item, skipped * item);
    give_back_pages(data + size * item, page - skipped * item);
  }
  return packed;
}

void check_packed(const Tensor& packed, const Tensor& x, int64_t outputs, int64_t depth) {
  if (outputs < 0) refuse("outputs", "at least 0, got ", outputs);
  const int64_t size = gemm::packed_size(outputs, depth);
  if (packed.dim() != 1 || packed.size(0) < size || packed.stride(0) != 1) {
    refuse("packed", "pack_linear_weight's result for a weight of ", outputs, " x ", depth,
           ", got ", text(packed.sizes()));
  }
  if (dtype_code(packed) != dtype_code(x)) {
    refuse("packed", "the first argument's type, got another one");
  }
}

const void* bias_of(const MaybeTensor& bias, const Tensor& x, int64_t outputs) {
  if (!bias.has_value()) return nullptr;
  check_sizes("bias", *bias, x, {outputs});
  return bias->const_data_ptr();
}

Tensor new_workspace(const Tensor& x, const Tokens& t) {
  return empty(x, {gemm::workspace_size(t.images * t.tokens, t.channels)},
               aoti_torch_dtype_float32());
}

void check_workspace(const Tensor& workspace, const Tokens& t) {
  const int64_t size = gemm::workspace_size(t.images * t.tokens, t.channels);
  if (dtype_code(workspace) != aoti_torch_dtype_float32() || workspace.dim() != 1 ||
      workspace.size(0) < size || workspace.stride(0) != 1) {
    refuse("workspace", size, " or more contiguous float32, got ", text(workspace.sizes()));
  }
}

void run(Dtype dtype, gemm::Input input, gemm::Output output, const Tensor& workspace,
         const Tokens& t) {
  const int64_t all = t.images * t.tokens;
  if (all == 0 || output.outputs == 0) return;
  input.tokens = output.tokens = t.tokens;
  input.depth = output.depth = t.channels;
  input.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  output.workspace = input.workspace;
  const gemm::Kernels& kernels = ECAR_CHOOSE(gemm_kernels);
  const gemm::Prepare prepare = kernels.prepare[dtype];
  const gemm::Multiply multiply = kernels.multiply[dtype];
  for (int64_t first = 0; first < all; first += gemm::kSlabRows) {
    const int64_t rows = all - first < gemm::kSlabRows ? all - first : gemm::kSlabRows;
    parallel(gemm::ceil_div(rows, gemm::kBlockRows), gemm::kBlockRows * t.channels,
             [&](int64_t begin, int64_t end) { prepare(input, first, rows, begin, end); });
    const int64_t chunks = gemm::ceil_div(rows, gemm::kChunkRows);
    const int64_t cost = rows / chunks * gemm::kPanelColumns * t.channels;
    parallel(gemm::panels(output.outputs) * chunks, cost / kMultiplyAddsAnElement,
             [&](int64_t begin, int64_t end) { multiply(output, first, rows, begin, end); });
  }
}

void adaln_linear(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& packed,
                  int64_t outputs, const MaybeTensor& bias, const MaybeTensor& step_shift,
                  const MaybeTensor& step_scale, bool gelu, double eps, const Tensor& workspace,
                  const Tensor& out) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  check_packed(packed, x, outputs, t.channels);
  check_workspace(workspace, t);
  check_output("out", out, x, {t.images, t.tokens, outputs});
  check_apart("out", out, x);
  gemm::Input input{};
  input.x = rows_of(x);
  set_shift(input, shift, step_shift, x, t);
  set_scale(input, scale, step_scale, eps, x, t);
  gemm::Output output{};
  output.packed = packed.const_data_ptr();
  output.bias = bias_of(bias, x, outputs);
  output.gelu = gelu;
  output.outputs = outputs;
  output.y = out.mutable_data_ptr();
  run(dtype, input, output, workspace, t);
}

Tensor packed_adaln_linear(const Tensor& x, const Tensor& shift, const Tensor& scale,
                           const Tensor& packed, int64_t outputs, const MaybeTensor& bias,
                           const MaybeTensor& step_shift, const MaybeTensor& step_scale,
                           bool gelu, double eps) {
  check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  check_packed(packed, x, outputs, t.channels);
  const Tensor y = empty(x, {t.images, t.tokens, outputs});
  adaln_linear(x, shift, scale, packed, outputs, bias, step_shift, step_scale, gelu, eps,
               new_workspace(x, t), y);
  return y;
}

// The residual may be `out` itself: each of its elements is read by the one that replaces it.
void linear_gated_residual(const Tensor& h, const Tensor& packed, const MaybeTensor& bias,
                           const Tensor& gate, const Tensor& residual,
                           const MaybeTensor& step_gate, const Tensor& workspace,
                           const Tensor& out) {
  const Dtype dtype = check_leading("h", h, 3);
  const Tokens t = tokens_of(h);
  check_leading("residual", residual, 3);
  const Tokens of_out{t.images, t.tokens, residual.size(2)};
  check_packed(packed, h, of_out.channels, t.channels);
  check_workspace(workspace, t);
  check_output("out", out, h, {t.images, t.tokens, of_out.channels});
  check_apart("out", out, h);
  if (!same_memory(out, residual)) check_apart("out", out, residual);
  gemm::Input input{};
  input.x = rows_of(h);
  gemm::Output output{};
  output.packed = packed.const_data_ptr();
  output.bias = bias_of(bias, h, of_out.channels);
  set_gate(output, gate, step_gate, h, of_out);
  output.residual = like("residual", residual, h, of_out);
  output.outputs = of_out.channels;
  output.y = out.mutable_data_ptr();
  run(dtype, input, output, workspace, t);
}

Tensor packed_linear_gated_residual(const Tensor& h, const Tensor& packed,
                                    const MaybeTensor& bias, const Tensor& gate,
                                    const Tensor& residual, const MaybeTensor& step_gate) {
  check_leading("h", h, 3);
  const Tokens t = tokens_of(h);
  check_leading("residual", residual, 3);
  check_packed(packed, h, residual.size(2), t.channels);
  const Tensor y = empty(h, {t.images, t.tokens, residual.size(2)});
  linear_gated_residual(h, packed, bias, gate, residual, step_gate, new_workspace(h, t), y);
  return y;
}

// Floats that a call's workspace has at least.
int64_t packed_workspace_size(int64_t rows, int64_t depth) {
  return gemm::workspace_size(rows, depth);
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ecar, library) {
  library.def("pack_linear_weight(Tensor weight) -> Tensor");
  library.def(
      "packed_adaln_linear(Tensor x, Tensor shift, Tensor scale, Tensor packed, int outputs, "
      "Tensor? bias, Tensor? step_shift, Tensor? step_scale, bool gelu, float eps) -> Tensor");
  library.def(
      "packed_linear_gated_residual(Tensor h, Tensor packed, Tensor? bias, Tensor gate, "
      "Tensor residual, Tensor? step_gate) -> Tensor");
  library.def(
      "packed_adaln_linear_out(Tensor x, Tensor shift, Tensor scale, Tensor packed, int outputs, "
      "Tensor? bias, Tensor? step_shift, Tensor? step_scale, bool gelu, float eps, "
      "Tensor(a!) workspace, Tensor(b!) out) -> ()");
  library.def(
      "packed_linear_gated_residual_out(Tensor h, Tensor packed, Tensor? bias, Tensor gate, "
      "Tensor residual, Tensor? step_gate, Tensor(a!) workspace, Tensor(b!) out) -> ()");
  library.def("packed_workspace_size(int rows, int depth) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CPU, library) {
  library.impl("pack_linear_weight", TORCH_BOX(&ecar::pack_linear_weight));
  library.impl("packed_adaln_linear", TORCH_BOX(&ecar::packed_adaln_linear));
  library.impl("packed_linear_gated_residual", TORCH_BOX(&ecar::packed_linear_gated_residual));
  library.impl("packed_adaln_linear_out", TORCH_BOX(&ecar::adaln_linear));
  library.impl("packed_linear_gated_residual_out", TORCH_BOX(&ecar::linear_gated_residual));
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CompositeExplicitAutograd, library) {
  library.impl("packed_workspace_size", TORCH_BOX(&ecar::packed_workspace_size));
}
