// The fused GEMMs of a flow block on CPU tensors, with the weight packed ahead of time.

#include <cmath>
#include <vector>

#include "bindings/tokens.h"
#include "cpu/flow_block.h"
#include "cpu/pages.h"
#include "cpu/stage_attention.h"

namespace ecar {
namespace {

using std::int64_t;

void check_contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    refuse(name, "a contiguous tensor, got strides ", text(tensor.strides()));
  }
}

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

void check_packed(const Tensor& packed, const Tensor& x, int64_t outputs, int64_t depth) {
  if (outputs < 0) refuse("outputs", "at least 0, got ", outputs);
  const int64_t size = flow_block::packed_size(outputs, depth);
  if (packed.dim() != 1 || packed.size(0) != size || packed.stride(0) != 1) {
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
  return empty(x, {flow_block::workspace_size(t.images * t.tokens, t.channels)},
               aoti_torch_dtype_float32());
}

void check_workspace(const Tensor& workspace, const Tokens& t) {
  const int64_t size = flow_block::workspace_size(t.images * t.tokens, t.channels);
  if (dtype_code(workspace) != aoti_torch_dtype_float32() || workspace.dim() != 1 ||
      workspace.size(0) < size || workspace.stride(0) != 1) {
    refuse("workspace", size, " or more contiguous float32, got ", text(workspace.sizes()));
  }
}

void run(Dtype dtype, flow_block::Input input, flow_block::Output output, const Tensor& workspace,
         const Tokens& t) {
  const int64_t all = t.images * t.tokens;
  if (all == 0 || output.outputs == 0) return;
  input.tokens = output.tokens = t.tokens;
  input.depth = output.depth = t.channels;
  input.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  output.workspace = input.workspace;
  const flow_block::Kernels& kernels = ECAR_CHOOSE(flow_block_kernels);
  const flow_block::Prepare prepare = kernels.prepare[dtype];
  const flow_block::Multiply multiply = kernels.multiply[dtype];
  for (int64_t first = 0; first < all; first += flow_block::kSlabRows) {
    const int64_t rows = all - first < flow_block::kSlabRows ? all - first : flow_block::kSlabRows;
    parallel(flow_block::ceil_div(rows, flow_block::kBlockRows),
             flow_block::kBlockRows * t.channels,
             [&](int64_t begin, int64_t end) { prepare(input, first, rows, begin, end); });
    const int64_t chunks = flow_block::ceil_div(rows, flow_block::kChunkRows);
    const int64_t cost = rows / chunks * flow_block::kPanelColumns * t.channels;
    parallel(flow_block::panels(output.outputs) * chunks, cost / kMultiplyAddsAnElement,
             [&](int64_t begin, int64_t end) { multiply(output, first, rows, begin, end); });
  }
}

Tensor packed_adaln_linear(const Tensor& x, const Tensor& shift, const Tensor& scale,
                           const Tensor& packed, int64_t outputs, const MaybeTensor& bias,
                           const MaybeTensor& step_shift, const MaybeTensor& step_scale,
                           bool gelu, double eps, double scale_offset) {
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
  output.outputs = outputs;
  output.y = y.mutable_data_ptr();
  run(dtype, input, output, new_workspace(x, t), t);
  return y;
}

Tensor packed_linear_gated_residual(const Tensor& h, const Tensor& packed,
                                    const MaybeTensor& bias, const Tensor& gate,
                                    const Tensor& residual, const MaybeTensor& step_gate) {
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
  output.outputs = out.channels;
  output.y = y.mutable_data_ptr();
  run(dtype, input, output, new_workspace(h, t), t);
  return y;
}

// One stage's attention over q, k and v of one projection, [images, tokens, 3, heads, head_dim].
void attend(Dtype dtype, const void* qkv, const Tokens& t, int64_t heads, int64_t item, void* out) {
  const int64_t head_dim = t.channels / heads, row = 3 * t.channels;
  const char* data = static_cast<const char*>(qkv);
  std::vector<stage_attention::Block> blocks(stage_attention::blocks_of(t.tokens));
  stage_attention::divide(0, t.tokens, t.tokens, blocks.data());
  const auto part = [&](int64_t index) {
    return stage_attention::Heads{data + index * t.channels * item, t.tokens * row, row, head_dim};
  };
  stage_attention::Forward a{};
  a.shape = {heads, t.tokens, t.tokens, head_dim, blocks.data(),
             static_cast<int64_t>(blocks.size()),
             static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)))};
  a.q = part(0), a.k = part(1), a.v = part(2);
  a.out = {out, t.tokens * t.channels, t.channels, head_dim};
  const int64_t units = t.images * heads * a.shape.num_blocks;
  const int64_t cost = 2 * t.tokens * t.tokens * head_dim / a.shape.num_blocks;
  const stage_attention::ForwardKernel kernel = ECAR_CHOOSE(stage_attention_kernels).forward[dtype];
  parallel(units, cost / kMultiplyAddsAnElement,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Six modulations of C channels each, from the `part`-th on, of all that the tensor holds.
Rows six_parts(const char* name, const Tensor& tensor, const Tensor& x, const Tokens& t,
               int64_t images, int64_t tokens, int64_t part) {
  const int64_t channels = tensor.dim() == 3 ? tensor.size(2) : 0;
  if (part < 0 || (part + 6) * t.channels > channels) {
    refuse(name, "six parts of ", t.channels, " channels from part ", part, " on, got ",
           text(tensor.sizes()));
  }
  check_sizes(name, tensor, x, {images, tokens, channels});
  return rows_of(tensor);
}

// A flow block: adaln_linear, attention, linear_gated_residual, adaln_linear, and
// linear_gated_residual, with x the residual stream, which is written over. `wide` holds what
// lies between them: q, k, v and attention's result, then the hidden tokens.
void flow_block_(const Tensor& x, const Tensor& spatial, const Tensor& step, int64_t part,
                 const Tensor& qkv, const MaybeTensor& qkv_bias, const Tensor& proj,
                 const MaybeTensor& proj_bias, const Tensor& fc1, const MaybeTensor& fc1_bias,
                 const Tensor& fc2, const MaybeTensor& fc2_bias, int64_t heads, int64_t hidden,
                 double eps, const Tensor& wide, const Tensor& workspace) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x), t_hidden{t.images, t.tokens, hidden};
  const int64_t c = t.channels, item = static_cast<int64_t>(x.element_size());
  check_contiguous("x", x);
  if (heads < 1 || c < 1 || c % heads != 0) refuse("heads", "a divisor of ", c, ", got ", heads);
  if (hidden < 1) refuse("hidden", "at least 1, got ", hidden);
  const Rows of_token = six_parts("spatial", spatial, x, t, t.images, t.tokens, part);
  const Rows of_step = six_parts("step", step, x, t, 1, 1, part);
  check_packed(qkv, x, 3 * c, c);
  check_packed(proj, x, c, c);
  check_packed(fc1, x, hidden, c);
  check_packed(fc2, x, c, hidden);
  check_workspace(workspace, t);
  check_workspace(workspace, t_hidden);
  const int64_t all = t.images * t.tokens, room = all * (4 * c > hidden ? 4 * c : hidden);
  check_sizes("wide", wide, x, {wide.numel()});
  if (wide.numel() < room) refuse("wide", room, " elements or more, got ", wide.numel());
  for (const Tensor* read : {&spatial, &step, &wide}) check_apart("x", x, *read);
  if (all == 0) return;

  const auto modulation = [&](const Rows& rows, int64_t index) {
    const char* data = static_cast<const char*>(rows.data) + (part + index) * c * item;
    return Rows{data, rows.image_stride, rows.token_stride};
  };
  char* between = static_cast<char*>(wide.mutable_data_ptr());
  void* attended = between + 3 * all * c * item;
  const auto product = [&](const void* from, int64_t depth, const Tensor& packed,
                           const MaybeTensor& bias, int64_t outputs, void* to, int64_t norm,
                           int64_t gate) {
    flow_block::Input input{};
    input.x = {from, t.tokens * depth, depth};
    if (norm >= 0) {
      input.shift = modulation(of_token, norm), input.scale = modulation(of_token, norm + 1);
      input.step_shift = modulation(of_step, norm);
      input.step_scale = modulation(of_step, norm + 1);
      input.eps = static_cast<float>(eps);
      input.scale_offset = 1;
    }
    flow_block::Output output{};
    output.packed = packed.const_data_ptr();
    output.bias = bias_of(bias, x, outputs);
    output.gelu = norm == 3;
    if (gate >= 0) {
      output.gate = modulation(of_token, gate), output.step_gate = modulation(of_step, gate);
      output.residual = rows_of(x);
    }
    output.outputs = outputs;
    output.y = to;
    run(dtype, input, output, workspace, {t.images, t.tokens, depth});
  };
  void* stream = x.mutable_data_ptr();
  product(stream, c, qkv, qkv_bias, 3 * c, between, 0, -1);
  attend(dtype, between, t, heads, item, attended);
  product(attended, c, proj, proj_bias, c, stream, -1, 2);
  product(stream, c, fc1, fc1_bias, hidden, between, 3, -1);
  product(between, hidden, fc2, fc2_bias, c, stream, -1, 5);
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

void gelu_backward_(const Tensor& grad, const Tensor& x) {
  const Dtype dtype = check_leading("x", x, x.dim());
  check_contiguous("x", x);
  if (grad.numel() != x.numel() || dtype_code(grad) != dtype_code(x)) {
    refuse("grad", "as many elements as x and its type, got ", text(grad.sizes()));
  }
  check_contiguous("grad", grad);
  check_apart("grad", grad, x);
  const flow_block::Gelu kernel = ECAR_CHOOSE(flow_block_kernels).gelu_backward[dtype];
  parallel(x.numel(), kGeluElements, [&](int64_t begin, int64_t end) {
    kernel(x.const_data_ptr(), grad.mutable_data_ptr(), begin, end);
  });
}

// Floats that a call's workspace has at least.
int64_t packed_workspace_size(int64_t rows, int64_t depth) {
  return flow_block::workspace_size(rows, depth);
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ecar, library) {
  library.def("pack_linear_weight(Tensor weight) -> Tensor");
  library.def(
      "packed_adaln_linear(Tensor x, Tensor shift, Tensor scale, Tensor packed, int outputs, "
      "Tensor? bias, Tensor? step_shift, Tensor? step_scale, bool gelu, float eps, "
      "float scale_offset) -> Tensor");
  library.def(
      "packed_linear_gated_residual(Tensor h, Tensor packed, Tensor? bias, Tensor gate, "
      "Tensor residual, Tensor? step_gate) -> Tensor");
  library.def(
      "flow_block_(Tensor(a!) x, Tensor spatial, Tensor step, int part, Tensor qkv, "
      "Tensor? qkv_bias, Tensor proj, Tensor? proj_bias, Tensor fc1, Tensor? fc1_bias, "
      "Tensor fc2, Tensor? fc2_bias, int heads, int hidden, float eps, Tensor(b!) wide, "
      "Tensor(c!) workspace) -> ()");
  library.def("packed_workspace_size(int rows, int depth) -> int");
  library.def("gelu(Tensor x) -> Tensor");
  library.def("gelu_backward_(Tensor(a!) grad, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CPU, library) {
  library.impl("pack_linear_weight", TORCH_BOX(&ecar::pack_linear_weight));
  library.impl("packed_adaln_linear", TORCH_BOX(&ecar::packed_adaln_linear));
  library.impl("packed_linear_gated_residual", TORCH_BOX(&ecar::packed_linear_gated_residual));
  library.impl("flow_block_", TORCH_BOX(&ecar::flow_block_));
  library.impl("gelu", TORCH_BOX(&ecar::gelu));
  library.impl("gelu_backward_", TORCH_BOX(&ecar::gelu_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CompositeExplicitAutograd, library) {
  library.impl("packed_workspace_size", TORCH_BOX(&ecar::packed_workspace_size));
}
