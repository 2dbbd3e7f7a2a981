#pragma once

// flow_boundary's arguments, checked and taken apart, on the CPU and on CUDA.

#include "bindings/flow_step.h"
#include "bindings/tokens.h"
#include "cpu/flow_boundary.h"

namespace ecar {

struct BoundaryTensors {
  const Tensor &x, &state, &shift, &scale, &weight, &bias, &embed_weight, &embed_bias, &positions;
  const MaybeTensor &step_shift, &step_scale, &previous;
};

// Does a weight [rows, columns] lie turned in memory, column by column?
inline bool is_turned(const Tensor& weight) {
  return weight.dim() == 2 && !weight.is_contiguous() && weight.stride(0) == 1 &&
         weight.stride(1) == weight.size(0);
}

// All but the outputs, and the numbers, of which each device has its own kind. turned: the
// embedding's weight is.
inline Dtype set_boundary(Boundary& a, const BoundaryTensors& in, double eps, bool turned = false) {
  const Tensor &x = in.x, &state = in.state;
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  if (state.dim() != 3) refuse("state", "3 dimensions, got ", text(state.sizes()));
  const std::int64_t images = state.size(0), outputs = state.size(2);
  if (outputs > kMaxOutputs) refuse("state", "at most ", kMaxOutputs, " outputs, got ", outputs);
  if (t.images != images && t.images != 2 * images) {
    refuse("x", "as many images as the state or twice as many, got ", t.images);
  }
  const std::int32_t state_code = dtype_code(state);
  if (state_code != aoti_torch_dtype_float32() && state_code != dtype_code(x)) {
    refuse("state", "float32 or the type of x, got another one");
  }
  if (outputs > 1 && state.stride(2) != 1) refuse("state", "a contiguous last dimension");
  if (state.size(1) != t.tokens) refuse("state", t.tokens, " tokens, got ", state.size(1));
  check_sizes("weight", in.weight, x, {outputs, t.channels});
  check_sizes("bias", in.bias, x, {outputs});
  const Tensor& embed = in.embed_weight;
  if (!turned) {
    check_sizes("embed_weight", embed, x, {t.channels, outputs});
    if (!embed.is_contiguous()) refuse("embed_weight", "a contiguous tensor");
  } else if (embed.size(0) != t.channels || embed.size(1) != outputs ||
             dtype_code(embed) != dtype_code(x)) {
    refuse("embed_weight", t.channels, " x ", outputs, " of the first argument's type, got ",
           text(embed.sizes()));
  }
  check_sizes("embed_bias", in.embed_bias, x, {t.channels});
  check_sizes("positions", in.positions, x, {t.tokens, t.channels});
  if (!in.weight.is_contiguous()) refuse("weight", "a contiguous tensor");
  if (!in.positions.is_contiguous()) refuse("positions", "a contiguous tensor");
  a.x = rows_of(x);
  set_shift(a, in.shift, in.step_shift, x, t);
  set_scale(a, in.scale, in.step_scale, eps, x, t);
  a.weight = in.weight.const_data_ptr();
  a.bias = in.bias.const_data_ptr();
  a.embed_weight = in.embed_weight.const_data_ptr();
  a.embed_bias = in.embed_bias.const_data_ptr();
  a.positions = in.positions.const_data_ptr();
  a.state = state.const_data_ptr();
  a.state_image_stride = state.stride(0);
  a.state_token_stride = state.stride(1);
  if (in.previous.has_value()) {
    check_sizes("previous", *in.previous, state, {images, t.tokens, outputs});
    a.previous = in.previous->const_data_ptr();
    a.previous_image_stride = in.previous->stride(0);
    a.previous_token_stride = in.previous->stride(1);
  }
  a.images = images;
  a.tokens = t.tokens;
  a.channels = t.channels;
  a.outputs = outputs;
  a.guided = t.images != images;
  a.wide_state = state_code == aoti_torch_dtype_float32();
  return dtype;
}

}  // namespace ecar
