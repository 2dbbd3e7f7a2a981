#pragma once

// Between two network calls of a stage: final adaLN and linear, guidance and the Euler update,
// token by token; then the next step's embedding with positions, band of channels by band, so
// that a weight is turned once for many tokens. Every sum is taken in an order that depends on
// channels and outputs alone. Since all tokens are read before the first is embedded, `embedded`
// may be x itself, `new_state` the state, and `kept` the velocity of the step before.

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace ecar {

// What the CUDA kernel takes, too. Rows [images or 2 images, tokens, channels], the unconditional
// ones last; weights, biases and positions are contiguous, as are the outputs.
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

struct FlowBoundary : Boundary {
  float dt, guidance, half_ratio;
  bool embed_turned;  // its weight lies [outputs, channels], as it is read
};

constexpr std::int64_t kBandTokens = 64;  // of one unit, at most
constexpr std::int64_t kMaxBand = 256;    // channels of one unit, at most

// Channels of a band: 1 KiB of a row of float32, or less where few tokens would not occupy all
// threads. (Strips of 256 bytes took an eighth longer of 4,096 tokens.)
inline std::int64_t band_of(std::int64_t tokens_of_all_images) {
  return tokens_of_all_images > kBandTokens ? kMaxBand : kMaxBand / 4;
}

// Works on tokens [begin, end) of all images.
using BoundaryState = void (*)(const FlowBoundary&, std::int64_t begin, std::int64_t end);
// Works on units [begin, end): unit = chunk of tokens * bands + band.
using BoundaryEmbed = void (*)(const FlowBoundary&, std::int64_t begin, std::int64_t end);

struct BoundaryKernels {
  BoundaryState state[kDtypes][2];  // [1]: of a wide state
  BoundaryEmbed embed[kDtypes][2];
};

#define ECAR_DECLARE(isa) \
  namespace isa {         \
  extern const BoundaryKernels boundary_kernels; \
  }
ECAR_FOR_EACH_ISA(ECAR_DECLARE)
#undef ECAR_DECLARE

}  // namespace ecar
