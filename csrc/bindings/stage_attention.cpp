// Stage attention on CPU tensors.

#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "cpu/stage_attention.h"

namespace ecar {
namespace {

using stage_attention::Block;
using std::int64_t;

// The sizes of one call, checked, and its blocks of queries.
struct Call {
  Dtype dtype;
  int64_t images, queries, keys, heads, head_dim;
  int64_t pairs = 0;  // of a query and a key that it sees, in one head
  std::vector<Block> blocks;
  float scale;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& stages,
       double scale_)
      : dtype(check_leading("q", q, 4)), scale(static_cast<float>(scale_)) {
    const Sizes sizes = q.sizes();
    images = sizes[0], queries = sizes[1], heads = sizes[2], head_dim = sizes[3];
    if (k.dim() != 4) refuse("k", "4 dimensions, got ", text(k.sizes()));
    keys = k.size(1);
    check_sizes("k", k, q, {images, keys, heads, head_dim});
    check_sizes("v", v, q, {images, keys, heads, head_dim});
    divide(stages);
  }

  void divide(const std::vector<int64_t>& stages) {
    int64_t left = keys;
    for (const int64_t length : stages) {
      if (length < 1 || length > left) refuse("stage_lengths", keys, " tokens as k has");
      left -= length;
    }
    if (left != 0 || keys == 0) refuse("stage_lengths", keys, " tokens as k has");
    std::size_t first = stages.size();
    int64_t covered = 0, number = 0;
    while (first > 0 && covered < queries) {
      covered += stages[--first];
      number += stage_attention::blocks_of(stages[first]);
    }
    if (covered != queries) refuse("q", "the tokens of the newest stages, got ", queries);
    blocks.resize(number);
    int64_t at = 0, end = keys - queries;
    for (Block* next = blocks.data(); first < stages.size(); ++first) {
      const int64_t length = stages[first];
      end += length;
      stage_attention::divide(at, length, end, next);
      next += stage_attention::blocks_of(length);
      at += length, pairs += length * end;
    }
  }

  stage_attention::Shape shape() const {
    return {heads, queries, keys, head_dim, blocks.data(), static_cast<int64_t>(blocks.size()),
            scale};
  }
};

stage_attention::Heads heads_of(const Tensor& tensor) {
  const Sizes strides = tensor.strides();
  return {tensor.const_data_ptr(), strides[0], strides[1], strides[2]};
}

stage_attention::MutableHeads outputs_of(const Tensor& tensor) {
  const Sizes strides = tensor.strides();
  return {tensor.mutable_data_ptr(), strides[0], strides[1], strides[2]};
}

void run_forward(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& out, float* lse) {
  const stage_attention::Forward a{call.shape(), heads_of(q),     heads_of(k),
                                   heads_of(v),  outputs_of(out), lse};
  const int64_t units = call.images * call.heads * a.shape.num_blocks;
  if (units == 0 || call.head_dim == 0) return;
  const int64_t cost = 2 * call.pairs * call.head_dim / a.shape.num_blocks;
  const stage_attention::ForwardKernel kernel =
      ECAR_CHOOSE(stage_attention_kernels).forward[call.dtype];
  parallel(units, cost / kMultiplyAddsAnElement,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor like_queries(const Call& call, const Tensor& q) {
  return empty(q, {call.images, call.queries, call.heads, call.head_dim});
}

Tensor stage_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                               std::vector<int64_t> stage_lengths, double scale) {
  const Call call(q, k, v, stage_lengths, scale);
  const Tensor out = like_queries(call, q);
  run_forward(call, q, k, v, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> stage_attention_training(const Tensor& q, const Tensor& k,
                                                    const Tensor& v,
                                                    std::vector<int64_t> stage_lengths,
                                                    double scale) {
  const Call call(q, k, v, stage_lengths, scale);
  const Tensor out = like_queries(call, q);
  const Tensor lse = empty(q, {call.images, call.heads, call.queries}, aoti_torch_dtype_float32());
  run_forward(call, q, k, v, out, static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

void check_lse(const Tensor& lse, const Call& call) {
  const Sizes sizes = lse.sizes();
  if (sizes.size() != 3 || sizes[0] != call.images || sizes[1] != call.heads ||
      sizes[2] != call.queries || !lse.is_contiguous() ||
      dtype_code(lse) != aoti_torch_dtype_float32()) {
    refuse("lse", "stage_attention_training's second result for these arguments, got ",
           text(sizes));
  }
}

std::tuple<Tensor, Tensor, Tensor> stage_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, std::vector<int64_t> stage_lengths, double scale) {
  const Call call(q, k, v, stage_lengths, scale);
  check_sizes("grad", grad, q, {call.images, call.queries, call.heads, call.head_dim});
  check_sizes("out", out, q, {call.images, call.queries, call.heads, call.head_dim});
  check_lse(lse, call);
  const Tensor grad_q = like_queries(call, q);
  const Tensor grad_k = empty(q, {call.images, call.keys, call.heads, call.head_dim});
  const Tensor grad_v = empty(q, {call.images, call.keys, call.heads, call.head_dim});
  const stage_attention::Backward a{call.shape(),
                                    heads_of(grad),
                                    heads_of(q),
                                    heads_of(k),
                                    heads_of(v),
                                    heads_of(out),
                                    static_cast<const float*>(lse.const_data_ptr()),
                                    outputs_of(grad_q),
                                    outputs_of(grad_k),
                                    outputs_of(grad_v)};
  if (call.head_dim == 0) return {grad_q, grad_k, grad_v};
  const stage_attention::Kernels& kernels = ECAR_CHOOSE(stage_attention_kernels);
  const int64_t heads = call.images * call.heads;
  const int64_t cost = 5 * call.pairs * call.head_dim / kMultiplyAddsAnElement;
  if (heads >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    const stage_attention::BackwardKernel kernel = kernels.backward[call.dtype];
    parallel(heads, cost, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  } else {
    const stage_attention::BackwardKernel kernel = kernels.backward_parts[call.dtype];
    const int64_t parts = stage_attention::parts_of(a.shape);
    parallel(heads * parts, cost / parts,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
  library.def(
      "stage_attention(Tensor q, Tensor k, Tensor v, int[] stage_lengths, float scale) -> Tensor");
  library.def(
      "stage_attention_training(Tensor q, Tensor k, Tensor v, int[] stage_lengths, float scale) "
      "-> (Tensor, Tensor)");
  library.def(
      "stage_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, int[] stage_lengths, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CPU, library) {
  library.impl("stage_attention", TORCH_BOX(&ecar::stage_attention_forward));
  library.impl("stage_attention_training", TORCH_BOX(&ecar::stage_attention_training));
  library.impl("stage_attention_backward", TORCH_BOX(&ecar::stage_attention_backward));
}
