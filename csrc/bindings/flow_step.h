#pragma once

// An Euler step's arguments, checked and taken apart, on the CPU and on CUDA.

#include <tuple>

#include "bindings/tensors.h"

namespace ecar {

// previous: null, or the guided velocity of the step before.
struct StepTensors {
  const Tensor &x, &velocity;
  const MaybeTensor& previous;
};

// Each a number or, for CUDA graphs, one float32 in a tensor.
struct StepNumbers {
  double dt, guidance_scale, ratio;
  const MaybeTensor &dt_data, &guidance_data, &ratio_data;
};

// Where a number lies in memory; null where it is none of a tensor's.
inline const float* number_data(const char* name, const MaybeTensor& tensor) {
  if (!tensor.has_value()) return nullptr;
  if (dtype_code(*tensor) != aoti_torch_dtype_float32() || tensor->numel() != 1) {
    refuse(name, "one float32");
  }
  return static_cast<const float*>(tensor->const_data_ptr());
}

// On the CPU the numbers are read at once.
template <class Arguments>
inline void read_numbers(Arguments& a, const StepNumbers& numbers) {
  const auto read = [](const char* name, double value, const MaybeTensor& tensor) {
    const float* data = number_data(name, tensor);
    return data != nullptr ? *data : static_cast<float>(value);
  };
  a.dt = read("dt_data", numbers.dt, numbers.dt_data);
  a.guidance = read("guidance_data", numbers.guidance_scale, numbers.guidance_data);
  a.half_ratio = 0.5f * read("ratio_data", numbers.ratio, numbers.ratio_data);
}

// The results of an op, with or without the velocity that was kept.
template <bool kVelocity, class... Results>
inline auto with_velocity(const MaybeTensor& kept, const Results&... results) {
  if constexpr (kVelocity) {
    return std::tuple<Results..., Tensor>{results..., *kept};
  } else if constexpr (sizeof...(Results) == 1) {
    return (Tensor(results), ...);
  } else {
    return std::tuple<Results...>{results...};
  }
}

// All but the numbers, of which each device has its own kind. kept: a new tensor for the guided
// velocity, or null.
template <class Arguments>
inline void set_step(Arguments& a, const StepTensors& in, const Tensor& out,
                     const MaybeTensor& kept) {
  const Tensor &x = in.x, &velocity = in.velocity;
  const Sizes sizes = x.sizes();
  const std::int64_t images = velocity.dim() == 4 ? velocity.size(0) : 0;
  const bool guided = images == 2 * sizes[0];
  check_sizes("velocity", velocity, x,
              {guided ? 2 * sizes[0] : sizes[0], sizes[1], sizes[2], sizes[3]});
  a.x = x.const_data_ptr();
  a.velocity = velocity.const_data_ptr();
  for (int d = 0; d < 3; ++d) {
    a.sizes[d] = sizes[d];
    a.x_strides[d] = x.stride(d);
    a.velocity_strides[d] = velocity.stride(d);
  }
  a.inner = sizes[3];
  a.out = out.mutable_data_ptr();
  if (guided && sizes[0] > 0) {
    a.unconditional = static_cast<const char*>(a.velocity) +
                      sizes[0] * velocity.stride(0) * static_cast<std::int64_t>(x.element_size());
  }
  if (in.previous.has_value()) {
    check_sizes("previous", *in.previous, x, {sizes[0], sizes[1], sizes[2], sizes[3]});
    a.previous = in.previous->const_data_ptr();
    for (int d = 0; d < 3; ++d) a.previous_strides[d] = in.previous->stride(d);
  }
  if (kept.has_value()) a.kept = kept->mutable_data_ptr();
}

// Adjacent dimensions that are one in memory become one, so that short rows become long ones.
template <class Arguments>
inline void merge_dimensions(Arguments& a) {
  for (int d = 2; d >= 0; --d) {
    const bool joined = a.sizes[d] == 1 ||
                        (a.x_strides[d] == a.inner && a.velocity_strides[d] == a.inner &&
                         (a.previous == nullptr || a.previous_strides[d] == a.inner));
    if (!joined) return;
    a.inner *= a.sizes[d];
    a.sizes[d] = 1;
    a.x_strides[d] = a.velocity_strides[d] = a.previous_strides[d] = 0;
  }
}

}  // namespace ecar

// What every step's schema ends with: the history, and the numbers in tensors that a CUDA graph
// reads when it is replayed. Ops named *_velocity return the guided velocity, too.
#define ECAR_STEP_OPTIONS                                                                    \
  "Tensor? previous=None, Tensor? dt_data=None, Tensor? guidance_data=None, "                \
  "Tensor? ratio_data=None) -> "
