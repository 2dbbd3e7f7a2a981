#pragma once

// The flow step on CUDA: what the bindings hand to the launches. Strides are in elements.

#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/flow_boundary.h"

namespace ecar {
namespace cuda {

// Read from the device where `on_device` is not null, so that a graph replays with another one.
struct Number {
  float value;
  const float* on_device;
};

// As cpu/flow_step.h: dimensions before the last are free in memory.
struct EulerStep {
  const void *x, *velocity, *unconditional, *previous;  // the last two: or null
  std::int64_t sizes[3], inner;
  std::int64_t x_strides[3], velocity_strides[3], previous_strides[3];
  void *out, *kept;  // contiguous; kept: null, or where the guided velocity is left
  Number dt, guidance, ratio;
};

struct UpsampleRenoise {
  EulerStep step;  // out: end
  const void* details;  // or null: then the seeds
  std::int64_t details_strides[4];  // B, C, 3, h
  const std::int64_t* seeds;
  std::int64_t seed_stride;
  std::uint32_t stage;
  float up_factor, noise_factor;
  void* start;  // contiguous [B, C, 2h, 2w]
};

struct InitialNoise {
  const std::int64_t* seeds;
  std::int64_t seed_stride, images, count;  // count: elements of an image
  void* out;                                // contiguous [images, count]
};

struct FlowBoundary : Boundary {
  Number dt, guidance, ratio;
  float* statistics;  // null, or where the embedded rows' are left: contiguous [rows, 3, parts]
};

constexpr int kPart = 32;  // channels of a part, the last of which may have fewer

constexpr std::int64_t kMaxChannels = 8192;

// Each queues one launch on the stream and returns a cudaError_t.
int euler_step(const EulerStep&, Dtype, void* stream);
int upsample_renoise(const UpsampleRenoise&, Dtype, void* stream);
int initial_noise(const InitialNoise&, Dtype, void* stream);
int flow_boundary(const FlowBoundary&, Dtype, void* stream);
const char* error_text(int code);

}  // namespace cuda
}  // namespace ecar
