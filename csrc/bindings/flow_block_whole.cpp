// Whole transformer blocks on CPU tensors, each one call: their products, and the attention
// between.

#include <cmath>
#include <utility>
#include <vector>

#include "bindings/flow_block.h"
#include "cpu/stage_attention.h"

namespace ecar {
namespace {

using std::int64_t;

// The attention of one stage's queries, [images, tokens, heads, head_dim], over `keys` keys.
void attend(Dtype dtype, const stage_attention::Heads& q, const stage_attention::Heads& k,
            const stage_attention::Heads& v, int64_t keys, const Tokens& t, int64_t heads,
            void* out) {
  const int64_t head_dim = t.channels / heads;
  std::vector<stage_attention::Block> blocks(stage_attention::blocks_of(t.tokens));
  stage_attention::divide(0, t.tokens, keys, blocks.data());
  stage_attention::Forward a{};
  a.shape = {heads,
             t.tokens,
             keys,
             head_dim,
             blocks.data(),
             static_cast<int64_t>(blocks.size()),
             static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)))};
  a.q = q, a.k = k, a.v = v;
  a.out = {out, t.tokens * t.channels, t.channels, head_dim};
  const int64_t units = t.images * heads * a.shape.num_blocks;
  const int64_t cost = 2 * t.tokens * keys * head_dim / a.shape.num_blocks;
  const stage_attention::ForwardKernel kernel = ECAR_CHOOSE(stage_attention_kernels).forward[dtype];
  parallel(units, cost / kMultiplyAddsAnElement,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

struct Layer {
  const Tensor& packed;
  const MaybeTensor& bias;
};

// Before and after one half of a block: what its input is normalised and modulated by, and the gate
// of its branch, absent where that is 1.
struct Half {
  flow_block::Input norm;
  Rows gate, step_gate;
};

// A transformer block over the residual stream x, which is written over: adaln_linear, attention,
// linear_gated_residual, adaln_linear, and linear_gated_residual. `wide` holds what lies between
// them: q, k and v where no cache has the last two, attention's result, then the hidden tokens.
struct TransformerBlock {
  const Tensor& x;
  const Layer qkv, proj, fc1, fc2;
  const int64_t heads, hidden;
  const Tensor &wide, &workspace;
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const int64_t all = t.images * t.tokens, c = t.channels;

  // between: elements of a token, but the hidden ones.
  void check(int64_t between) const {
    check_contiguous("x", x);
    if (heads < 1 || c < 1 || c % heads != 0) refuse("heads", "a divisor of ", c, ", got ", heads);
    if (hidden < 1) refuse("hidden", "at least 1, got ", hidden);
    check_packed(qkv.packed, x, 3 * c, c);
    check_packed(proj.packed, x, c, c);
    check_packed(fc1.packed, x, hidden, c);
    check_packed(fc2.packed, x, c, hidden);
    check_workspace(workspace, t);
    check_workspace(workspace, {t.images, t.tokens, hidden});
    const int64_t room = all * (between > hidden ? between : hidden);
    check_sizes("wide", wide, x, {wide.numel()});
    if (wide.numel() < room) refuse("wide", room, " elements or more, got ", wide.numel());
    check_apart("x", x, wide);
  }

  void product(flow_block::Input input, const void* from, int64_t depth, const Layer& layer,
               flow_block::Output output) const {
    input.x = {from, t.tokens * depth, depth};
    output.packed = layer.packed.const_data_ptr();
    output.bias = bias_of(layer.bias, x, output.outputs);
    run_product(dtype, input, output, workspace, {t.images, t.tokens, depth});
  }

  // from: tokens of the branch, `depth` wide.
  void close(const Half& half, const void* from, int64_t depth, const Layer& layer) const {
    flow_block::Output output{};
    output.gate = half.gate, output.step_gate = half.step_gate, output.residual = rows_of(x);
    write_to(output, x.mutable_data_ptr(), c, t);
    product({}, from, depth, layer, output);
  }

  // Where q, k and v go, and how many keys there are then.
  void run_all(const Half& attention, const Half& mlp, const flow_block::Destination (&qkv_to)[3],
               int64_t keys, void* attended) const {
    flow_block::Output projected{};
    projected.outputs = 3 * c, projected.part = c;
    for (int i = 0; i < 3; ++i) projected.y[i] = qkv_to[i];
    product(attention.norm, x.const_data_ptr(), c, qkv, projected);
    const auto heads_of = [&](const flow_block::Destination& rows, int64_t skipped) {
      const char* data = static_cast<const char*>(rows.data);
      return stage_attention::Heads{data - skipped * rows.token_stride * item(), rows.image_stride,
                                    rows.token_stride, c / heads};
    };
    const int64_t before = keys - t.tokens;
    attend(dtype, heads_of(qkv_to[0], 0), heads_of(qkv_to[1], before), heads_of(qkv_to[2], before),
           keys, t, heads, attended);
    close(attention, attended, c, proj);
    flow_block::Output activated{};
    activated.gelu = true;
    write_to(activated, wide.mutable_data_ptr(), hidden, t);
    product(mlp.norm, x.const_data_ptr(), c, fc1, activated);
    close(mlp, wide.const_data_ptr(), hidden, fc2);
  }

  int64_t item() const { return static_cast<int64_t>(x.element_size()); }
  char* between(int64_t columns) const {
    return static_cast<char*>(wide.mutable_data_ptr()) + all * columns * item();
  }
};

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

// A flow block: its six modulations are parts of `spatial` and `step`.
void flow_block_(const Tensor& x, const Tensor& spatial, const Tensor& step, int64_t part,
                 const Tensor& qkv, const MaybeTensor& qkv_bias, const Tensor& proj,
                 const MaybeTensor& proj_bias, const Tensor& fc1, const MaybeTensor& fc1_bias,
                 const Tensor& fc2, const MaybeTensor& fc2_bias, int64_t heads, int64_t hidden,
                 double eps, const Tensor& wide, const Tensor& workspace) {
  const TransformerBlock block{
      x,    {qkv, qkv_bias}, {proj, proj_bias}, {fc1, fc1_bias}, {fc2, fc2_bias}, heads, hidden,
      wide, workspace};
  const Tokens& t = block.t;
  block.check(4 * t.channels);
  const Rows of_token = six_parts("spatial", spatial, x, t, t.images, t.tokens, part);
  const Rows of_step = six_parts("step", step, x, t, 1, 1, part);
  for (const Tensor* read : {&spatial, &step}) check_apart("x", x, *read);
  if (block.all == 0) return;
  const auto modulation = [&](const Rows& rows, int64_t index) {
    const char* data =
        static_cast<const char*>(rows.data) + (part + index) * t.channels * block.item();
    return Rows{data, rows.image_stride, rows.token_stride};
  };
  const auto half = [&](int64_t first) {
    Half found{};
    found.norm.shift = modulation(of_token, first),
    found.norm.scale = modulation(of_token, first + 1);
    found.norm.step_shift = modulation(of_step, first);
    found.norm.step_scale = modulation(of_step, first + 1);
    found.norm.eps = static_cast<float>(eps), found.norm.scale_offset = 1;
    found.gate = modulation(of_token, first + 2), found.step_gate = modulation(of_step, first + 2);
    return found;
  };
  const int64_t row = 3 * t.channels;
  const auto part_of = [&](int64_t index) {
    char* data = block.between(0) + index * t.channels * block.item();
    return flow_block::Destination{data, t.tokens * row, row};
  };
  block.run_all(half(0), half(3), {part_of(0), part_of(1), part_of(2)}, t.tokens,
                block.between(row));
}

// A layer of a stage's tokens over those of the stages before: keys and values, [images, N, heads,
// head_dim], hold `begin` tokens, and are given those of x.
void stage_block_(const Tensor& x, const Tensor& norm1, const Tensor& norm1_bias, const Tensor& qkv,
                  const MaybeTensor& qkv_bias, const Tensor& proj, const MaybeTensor& proj_bias,
                  const Tensor& norm2, const Tensor& norm2_bias, const Tensor& fc1,
                  const MaybeTensor& fc1_bias, const Tensor& fc2, const MaybeTensor& fc2_bias,
                  int64_t heads, int64_t hidden, double eps1, double eps2, const Tensor& keys,
                  const Tensor& values, int64_t begin, const Tensor& wide,
                  const Tensor& workspace) {
  const TransformerBlock block{
      x,    {qkv, qkv_bias}, {proj, proj_bias}, {fc1, fc1_bias}, {fc2, fc2_bias}, heads, hidden,
      wide, workspace};
  const Tokens& t = block.t;
  block.check(2 * t.channels);
  const int64_t room = keys.dim() == 4 ? keys.size(1) : 0;
  if (begin < 0 || begin + t.tokens > room) {
    refuse("begin", "0 to ", room - t.tokens, ", got ", begin);
  }
  for (const auto& [name, cache] : {std::pair{"keys", &keys}, {"values", &values}}) {
    check_sizes(name, *cache, x, {t.images, room, heads, t.channels / heads});
    if (heads > 1 && cache->stride(2) != t.channels / heads) {
      refuse(name, "heads one after the other, got strides ", text(cache->strides()));
    }
    for (const Tensor* written : {&x, &wide}) check_apart(name, *written, *cache);
  }
  const auto half = [&](const Tensor& weight, const Tensor& bias, double eps) {
    check_sizes("norm", weight, x, {t.channels});
    check_sizes("norm", bias, x, {t.channels});
    Half found{};
    found.norm.scale = {weight.const_data_ptr(), 0, 0};
    found.norm.shift = {bias.const_data_ptr(), 0, 0};
    found.norm.eps = static_cast<float>(eps);
    return found;
  };
  const Half first = half(norm1, norm1_bias, eps1), second = half(norm2, norm2_bias, eps2);
  if (block.all == 0) return;
  const auto cached = [&](const Tensor& cache) {
    const int64_t row = cache.stride(1);
    char* data = static_cast<char*>(cache.mutable_data_ptr()) + begin * row * block.item();
    return flow_block::Destination{data, cache.stride(0), row};
  };
  const flow_block::Destination queries{block.between(0), t.tokens * t.channels, t.channels};
  block.run_all(first, second, {queries, cached(keys), cached(values)}, begin + t.tokens,
                block.between(t.channels));
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
  library.def(
      "flow_block_(Tensor(a!) x, Tensor spatial, Tensor step, int part, Tensor qkv, "
      "Tensor? qkv_bias, Tensor proj, Tensor? proj_bias, Tensor fc1, Tensor? fc1_bias, "
      "Tensor fc2, Tensor? fc2_bias, int heads, int hidden, float eps, Tensor(b!) wide, "
      "Tensor(c!) workspace) -> ()");
  library.def(
      "stage_block_(Tensor(a!) x, Tensor norm1, Tensor norm1_bias, Tensor qkv, Tensor? qkv_bias, "
      "Tensor proj, Tensor? proj_bias, Tensor norm2, Tensor norm2_bias, Tensor fc1, "
      "Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, int heads, int hidden, float eps1, "
      "float eps2, Tensor(b!) keys, Tensor(c!) values, int begin, Tensor(d!) wide, "
      "Tensor(e!) workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CPU, library) {
  library.impl("flow_block_", TORCH_BOX(&ecar::flow_block_));
  library.impl("stage_block_", TORCH_BOX(&ecar::stage_block_));
}
