#pragma once

// The flow step: Euler with guidance, the jump between stages, and the noise of an image.

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/isa.h"

namespace ecar {

// x + dt v of images whose dimensions before the last are free in memory; v is guided where
// there is an unconditional one: v = u + guidance (c - u). With the guided velocity p of the step
// before it is x + dt (v + half_ratio (v - p)).
struct EulerStep {
  const void *x, *velocity, *unconditional, *previous;  // the last two: or null
  std::int64_t sizes[3], inner;  // dimensions before the last, and the last
  std::int64_t x_strides[3], velocity_strides[3], previous_strides[3];  // the last one's are 1
  void* out;   // contiguous, as is `kept`
  void* kept;  // null, or where v is left; may be `previous`
  float dt, guidance, half_ratio;
  bool stream;  // the outputs go past the caches
};

inline bool has_history(const EulerStep& a) { return a.previous != nullptr || a.kept != nullptr; }

// Elements of a row that are one unit of work.
constexpr std::int64_t kEulerBlock = 4096;

// Works on units [begin, end) of all rows' blocks.
using EulerStepKernel = void (*)(const EulerStep&, std::int64_t begin, std::int64_t end);

// end = step's result; start = up_factor up(end) + noise_factor h, h from the details or, where
// they are null, from the seeds. The step's sizes are [B, C, h] and inner is w.
struct UpsampleRenoise {
  EulerStep step;  // out: end
  const void* details;
  std::int64_t details_strides[4];  // B, C, 3, h
  const std::int64_t* seeds;
  std::int64_t seed_stride;
  std::uint32_t stage;
  float up_factor, noise_factor;
  void* start;  // contiguous [B, C, 2h, 2w]
};

// Works on low-resolution rows [begin, end).
using UpsampleRenoiseKernel = void (*)(const UpsampleRenoise&, std::int64_t begin,
                                       std::int64_t end);

struct InitialNoise {
  const std::int64_t* seeds;
  std::int64_t seed_stride;
  void* out;            // contiguous [B, count]
  std::int64_t count;   // elements of an image
  std::int64_t blocks;  // of an image: count over kNoiseBlock, rounded up
};

constexpr std::int64_t kNoiseBlock = 1024;

// Works on blocks [begin, end) of all images.
using InitialNoiseKernel = void (*)(const InitialNoise&, std::int64_t begin, std::int64_t end);

struct FlowStepKernels {
  EulerStepKernel euler_step[kDtypes][2];  // [1]: of a step that has a history
  UpsampleRenoiseKernel upsample_renoise[kDtypes][2];
  InitialNoiseKernel initial_noise[kDtypes];
};

#define ECAR_DECLARE(isa) \
  namespace isa {         \
  extern const FlowStepKernels flow_step_kernels; \
  }
ECAR_FOR_EACH_ISA(ECAR_DECLARE)
#undef ECAR_DECLARE

}  // namespace ecar
