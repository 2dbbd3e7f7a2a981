#pragma once

// The adaLN family: y = LN(x) (1 + scale + step_scale) + shift + step_shift, the gated residual
// x + (gate + step_gate) branch, and both in one pass; forward and backward.

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace ecar {

struct AdalnForward {
  Rows x, branch, gate, step_gate, shift, step_shift, scale, step_scale;
  void* new_x;  // contiguous, as y
  void* y;
  std::int64_t tokens, channels;  // of one image
  float eps;
  bool stream;  // the last output goes past the caches
};

// Works on tokens [begin, end) of all images in a row.
using AdalnForwardKernel = void (*)(const AdalnForward&, std::int64_t begin, std::int64_t end);

// Gradients that broadcast modulation gets are sums over tokens. To be the same bits on any
// number of threads they are summed in fixed blocks: tokens of one image, `block` at a time.
struct AdalnBackward {
  Rows grad_new_x, grad_y;
  Rows x;  // what the LayerNorm saw: the new x where there is a gate
  Rows branch, gate, step_gate, scale, step_scale;
  void *grad_x, *grad_branch;  // contiguous, as all outputs
  void *grad_gate, *grad_scale;  // for every token; null if not asked for
  float* sums;                   // [image, block, slot, C]; null if not asked for
  std::int64_t tokens, channels, block, blocks;  // `blocks` of one image
  float eps;
  bool stream;  // the outputs go past the caches
};

// The order of the slots: gate, shift, scale, of those that the op has.
// Works on blocks [begin, end) of all images in a row.
using AdalnBackwardKernel = void (*)(const AdalnBackward&, std::int64_t begin, std::int64_t end);

// The second half of the sums: over blocks, then over images.
struct AdalnSums {
  const float* sums;  // [image, block, slot, C]
  void* out;          // [slot, images + 1, C]: each image's, then the total
  std::int64_t images, blocks, slots, channels;
};

// Works on columns [begin, end) of slots x C.
using AdalnSumsKernel = void (*)(const AdalnSums&, std::int64_t begin, std::int64_t end);

struct AdalnKernels {
  AdalnForwardKernel adaln[kDtypes], gated_residual[kDtypes], gated_residual_adaln[kDtypes];
  AdalnBackwardKernel adaln_backward[kDtypes], gated_residual_backward[kDtypes],
      gated_residual_adaln_backward[kDtypes];
  AdalnSumsKernel sums[kDtypes];
};

#define ECAR_DECLARE(isa) \
  namespace isa {         \
  extern const AdalnKernels adaln_kernels; \
  }
ECAR_FOR_EACH_ISA(ECAR_DECLARE)
#undef ECAR_DECLARE

}  // namespace ecar
