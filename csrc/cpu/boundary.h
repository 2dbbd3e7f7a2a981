#pragma once

// The boundary between two network calls of a stage, as the CPU's and the CUDA kernel take it.

#include <cstdint>

#include "cpu/rows.h"

namespace ecar {

// Rows [images or 2 images, tokens, channels], the unconditional ones last; weights, biases and
// positions are contiguous, as are the outputs.
struct Boundary {
  Rows x, shift, scale, step_shift, step_scale;
  const void *weight, *bias, *embed_weight, *embed_bias, *positions;
  const void* state;
  std::int64_t state_image_stride, state_token_stride;
  const void* previous;  // null, or the guided velocity of the step before: rows like the state's
  std::int64_t previous_image_stride, previous_token_stride;
  void *new_state, *embedded;
  void* kept;  // null, or where the guided velocity is left; may be `previous`
  std::int64_t images, tokens, channels, outputs;
  bool guided, wide_state;  // wide_state: float32 whatever x is
  float eps;
};

constexpr std::int64_t kMaxOutputs = 64;

}  // namespace ecar
