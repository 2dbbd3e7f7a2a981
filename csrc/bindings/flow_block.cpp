// The fused GEMMs of a flow block on CPU tensors, with the weight packed ahead of time.

#include "bindings/flow_block.h"
#include "cpu/pages.h"

namespace ecar {
namespace {

using std::int64_t;

Tensor pack_linear_weight(const Tensor& weight) {
  const Dtype dtype = check_leading("weight", weight, 2);
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  const int64_t size = flow_block::packed_size(outputs, depth);
  const int64_t item = weight.element_size(), page = kLargePage;
  const bool large = size * item >= page;
  // One page more, to align the first; what is left before and behind is given back. The rest
  // beyond the last whole page lies in small ones: rounded up, a model of width 768 would take
  // 15 % more memory.
  Tensor packed = empty(weight, {large ? size + page / item : size});
  int64_t skipped = 0;
  if (large) {
    const int64_t address = reinterpret_cast<int64_t>(packed.const_data_ptr());
    skipped = (flow_block::ceil_div(address, page) * page - address) / item;
    packed = torch::stable::narrow(packed, 0, skipped, size);
    ask_for_large_pages(packed.mutable_data_ptr(), size * item);
  }
  const flow_block::Weight a{weight.const_data_ptr(), weight.stride(0), outputs, depth,
                             packed.mutable_data_ptr()};
  const flow_block::Pack kernel = ECAR_CHOOSE(flow_block_kernels).pack[dtype];
  parallel(flow_block::panels(outputs), flow_block::kPanelColumns * depth,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (large) {
    char* data = static_cast<char*>(packed.mutable_data_ptr());
    move_to_large_pages(data, size * item);
    // Only now: where the memory was part of a large page before, the packing filled all of it.
    give_back_pages(data - skipped * item, skipped * item);
    give_back_pages(data + size * item, page - skipped * item);
  }
  return packed;
}

Tensor new_workspace(const Tensor& x, const Tokens& t) {
  return empty(x, {flow_block::workspace_size(t.images * t.tokens, t.channels)},
               aoti_torch_dtype_float32());
}

Tensor packed_adaln_linear(const Tensor& x, const Tensor& shift, const Tensor& scale,
                           const Tensor& packed, int64_t outputs, const MaybeTensor& bias,
                           const MaybeTensor& step_shift, const MaybeTensor& step_scale, bool gelu,
                           double eps, double scale_offset) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  check_packed(packed, x, outputs, t.channels);
  const Tensor y = empty(x, {t.images, t.tokens, outputs});
  flow_block::Input input{};
  input.x = rows_of(x);
  set_shift(input, shift, step_shift, x, t);
  set_scale(input, scale, step_scale, eps, x, t);
  input.scale_offset = static_cast<float>(scale_offset);
  flow_block::Output output{};
  output.packed = packed.const_data_ptr();
  output.bias = bias_of(bias, x, outputs);
  output.gelu = gelu;
  write_to(output, y.mutable_data_ptr(), outputs, t);
  run_product(dtype, input, output, new_workspace(x, t), t);
  return y;
}

Tensor packed_linear_gated_residual(const Tensor& h, const Tensor& packed, const MaybeTensor& bias,
                                    const Tensor& gate, const Tensor& residual,
                                    const MaybeTensor& step_gate) {
  const Dtype dtype = check_leading("h", h, 3);
  const Tokens t = tokens_of(h);
  check_leading("residual", residual, 3);
  const Tokens out{t.images, t.tokens, residual.size(2)};
  check_packed(packed, h, out.channels, t.channels);
  const Tensor y = empty(h, {out.images, out.tokens, out.channels});
  flow_block::Input input{};
  input.x = rows_of(h);
  flow_block::Output output{};
  output.packed = packed.const_data_ptr();
  output.bias = bias_of(bias, h, out.channels);
  set_gate(output, gate, step_gate, h, out);
  output.residual = like("residual", residual, h, out);
  write_to(output, y.mutable_data_ptr(), out.channels, out);
  run_product(dtype, input, output, new_workspace(h, t), t);
  return y;
}

// Elements that cost about as much as one of copying: an exponential and a division.
constexpr int64_t kGeluElements = 4;

Tensor gelu(const Tensor& x) {
  const Dtype dtype = check_leading("x", x, x.dim());
  check_contiguous("x", x);
  const Tensor y = empty_as(x);
  const flow_block::Gelu kernel = ECAR_CHOOSE(flow_block_kernels).gelu[dtype];
  parallel(x.numel(), kGeluElements, [&](int64_t begin, int64_t end) {
    kernel(x.const_data_ptr(), y.mutable_data_ptr(), begin, end);
  });
  return y;
}

Tensor gelu_backward_(const Tensor& grad, const Tensor& x) {
  const Dtype dtype = check_leading("x", x, x.dim());
  check_contiguous("x", x);
  if (grad.numel() != x.numel() || dtype_code(grad) != dtype_code(x)) {
    refuse("grad", "as many elements as x and its type, got ", text(grad.sizes()));
  }
  check_contiguous("grad", grad);
  check_apart("grad", grad, x);
  const Tensor y = empty_as(x);
  const flow_block::GeluBackward kernel = ECAR_CHOOSE(flow_block_kernels).gelu_backward[dtype];
  parallel(x.numel(), kGeluElements, [&](int64_t begin, int64_t end) {
    kernel(x.const_data_ptr(), grad.mutable_data_ptr(), y.mutable_data_ptr(), begin, end);
  });
  return y;
}

// Floats that a call's workspace has at least.
int64_t packed_workspace_size(int64_t rows, int64_t depth) {
  return flow_block::workspace_size(rows, depth);
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
  library.def("pack_linear_weight(Tensor weight) -> Tensor");
  library.def(
      "packed_adaln_linear(Tensor x, Tensor shift, Tensor scale, Tensor packed, int outputs, "
      "Tensor? bias, Tensor? step_shift, Tensor? step_scale, bool gelu, float eps, "
      "float scale_offset) -> Tensor");
  library.def(
      "packed_linear_gated_residual(Tensor h, Tensor packed, Tensor? bias, Tensor gate, "
      "Tensor residual, Tensor? step_gate) -> Tensor");
  library.def("packed_workspace_size(int rows, int depth) -> int");
  library.def("gelu(Tensor x) -> Tensor");
  library.def("gelu_backward_(Tensor(a!) grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CPU, library) {
  library.impl("pack_linear_weight", TORCH_BOX(&ecar::pack_linear_weight));
  library.impl("packed_adaln_linear", TORCH_BOX(&ecar::packed_adaln_linear));
  library.impl("packed_linear_gated_residual", TORCH_BOX(&ecar::packed_linear_gated_residual));
  library.impl("gelu", TORCH_BOX(&ecar::gelu));
  library.impl("gelu_backward_", TORCH_BOX(&ecar::gelu_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CompositeExplicitAutograd, library) {
  library.impl("packed_workspace_size", TORCH_BOX(&ecar::packed_workspace_size));
}
