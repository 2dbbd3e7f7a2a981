// The ops of the flow step on CUDA tensors. libecar_cpu.so, loaded first, defines the schemas.

#include "cuda/flow_step.h"

#include <dlfcn.h>

#include <tuple>

#include <torch/csrc/stable/accelerator.h>

#include "bindings/flow_boundary.h"

namespace ecar {
namespace {

using torch::stable::accelerator::DeviceGuard;

std::int32_t device_of(const Tensor& tensor) {
  std::int32_t index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

// From torch's CUDA library, which is in the process wherever there is a CUDA tensor; looked up
// rather than linked, so that the library is built with a CPU torch too.
void* current_stream(std::int32_t device) {
  using Get = AOTITorchError (*)(std::int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = dlsym(library != nullptr ? library : RTLD_DEFAULT,
                        "aoti_torch_get_current_cuda_stream");
    if (found == nullptr) throw std::runtime_error("this torch has no CUDA streams");
    return reinterpret_cast<Get>(found);
  }();
  void* stream;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

void check(const char* op, int code) {
  if (code != 0) {
    throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " +
                             cuda::error_text(code));
  }
}

// Of the tensor that sets the device: torch calls an op here for any tensor that is on a GPU.
void check_cuda(const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) refuse(name, "a CUDA tensor, got one on another device");
}

void check_device(const char* name, const Tensor& tensor, const Tensor& leading) {
  std::int32_t type, leading_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(leading.get(), &leading_type));
  if (type != leading_type || device_of(tensor) != device_of(leading)) {
    refuse(name, "the first argument's device, got another one");
  }
}

// The numbers of a step, with those in tensors on the device of the leading one.
template <class Arguments>
void set_numbers(Arguments& a, const StepNumbers& numbers, const Tensor& leading) {
  const auto set = [&](const char* name, double value, const MaybeTensor& tensor) {
    if (tensor.has_value()) check_device(name, *tensor, leading);
    return cuda::Number{static_cast<float>(value), number_data(name, tensor)};
  };
  a.dt = set("dt_data", numbers.dt, numbers.dt_data);
  a.guidance = set("guidance_data", numbers.guidance_scale, numbers.guidance_data);
  a.ratio = set("ratio_data", numbers.ratio, numbers.ratio_data);
}

void set_device_step(cuda::EulerStep& a, const StepTensors& in, const StepNumbers& numbers,
                     const Tensor& out, const MaybeTensor& kept) {
  set_step(a, in, out, kept);
  check_device("velocity", in.velocity, in.x);
  if (in.previous.has_value()) check_device("previous", *in.previous, in.x);
  set_numbers(a, numbers, in.x);
}

// A new tensor like another one for the velocity, where it is a result.
template <bool kVelocity>
MaybeTensor room_for_velocity(const Tensor& like) {
  return kVelocity ? MaybeTensor(empty_as(like, false)) : std::nullopt;
}

// With kVelocity the guided velocity is a result, too.
template <bool kVelocity>
auto euler_step(const Tensor& x, const Tensor& velocity, double dt, double guidance_scale,
                double ratio, const MaybeTensor& previous, const MaybeTensor& dt_data,
                const MaybeTensor& guidance_data, const MaybeTensor& ratio_data) {
  check_cuda("x", x);
  const Dtype dtype = check_leading("x", x, 4);
  const DeviceGuard guard(device_of(x));
  const Tensor out = empty_as(x, false);
  const MaybeTensor kept = room_for_velocity<kVelocity>(x);
  cuda::EulerStep a{};
  set_device_step(a, {x, velocity, previous},
                  {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data}, out, kept);
  merge_dimensions(a);
  check("euler_step", cuda::euler_step(a, dtype, current_stream(device_of(x))));
  return with_velocity<kVelocity>(kept, out);
}

std::int64_t check_seeds(const Tensor& seeds) {
  if (dtype_code(seeds) != aoti_torch_dtype_int64()) refuse("seeds", "int64, got another type");
  if (seeds.dim() != 1) refuse("seeds", "one dimension, got ", text(seeds.sizes()));
  return seeds.size(0);
}

template <bool kVelocity>
auto jump(Dtype dtype, cuda::UpsampleRenoise& a, const StepTensors& in, const StepNumbers& numbers,
          double time) {
  const Tensor& x = in.x;
  const DeviceGuard guard(device_of(x));
  const Sizes sizes = x.sizes();
  const Tensor end = empty_as(x, false);
  const Tensor start =
      empty(x, {sizes[0], sizes[1], 2 * sizes[2], 2 * sizes[3]}, dtype_code(x), false);
  const MaybeTensor kept = room_for_velocity<kVelocity>(x);
  set_device_step(a.step, in, numbers, end, kept);
  a.up_factor = static_cast<float>((1 + time) / 2);
  a.noise_factor = static_cast<float>(1 - time);
  a.start = start.mutable_data_ptr();
  check("upsample_renoise_euler", cuda::upsample_renoise(a, dtype, current_stream(device_of(x))));
  return with_velocity<kVelocity>(kept, end, start);
}

template <bool kVelocity>
auto upsample_renoise_euler_seeds(const Tensor& x, const Tensor& velocity, double dt,
                                  double guidance_scale, double ratio, double time,
                                  std::int64_t stage, const Tensor& seeds,
                                  const MaybeTensor& previous, const MaybeTensor& dt_data,
                                  const MaybeTensor& guidance_data,
                                  const MaybeTensor& ratio_data) {
  check_cuda("x", x);
  const Dtype dtype = check_leading("x", x, 4);
  if (check_seeds(seeds) != x.size(0)) {
    refuse("seeds", "one for each image, ", x.size(0), ", got ", seeds.size(0));
  }
  check_device("seeds", seeds, x);
  cuda::UpsampleRenoise a{};
  a.seeds = static_cast<const std::int64_t*>(seeds.const_data_ptr());
  a.seed_stride = seeds.stride(0);
  a.stage = static_cast<std::uint32_t>(stage);
  return jump<kVelocity>(dtype, a, {x, velocity, previous},
                         {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data}, time);
}

template <bool kVelocity>
auto upsample_renoise_euler_details(const Tensor& x, const Tensor& velocity, double dt,
                                    double guidance_scale, double ratio, double time,
                                    const Tensor& details, const MaybeTensor& previous,
                                    const MaybeTensor& dt_data, const MaybeTensor& guidance_data,
                                    const MaybeTensor& ratio_data) {
  check_cuda("x", x);
  const Dtype dtype = check_leading("x", x, 4);
  const Sizes sizes = x.sizes();
  check_sizes("details", details, x, {sizes[0], sizes[1], 3, sizes[2], sizes[3]});
  check_device("details", details, x);
  cuda::UpsampleRenoise a{};
  a.details = details.const_data_ptr();
  for (int d = 0; d < 4; ++d) a.details_strides[d] = details.stride(d);
  return jump<kVelocity>(dtype, a, {x, velocity, previous},
                         {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data}, time);
}

Tensor initial_noise(const Tensor& seeds, std::int64_t channels, std::int64_t height,
                     std::int64_t width, ScalarType type) {
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 ||
                     type == ScalarType::Half;
  if (!known) refuse("dtype", "float32, bfloat16 or float16, got another type");
  const Dtype dtype = type == ScalarType::Float      ? kFloat32
                      : type == ScalarType::BFloat16 ? kBFloat16
                                                     : kFloat16;
  const std::int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                aoti_torch_dtype_float16()};
  for (const std::int64_t size : {channels, height, width}) {
    if (size < 0) refuse("shape", "sizes of at least 0, got ", size);
  }
  const std::int64_t images = check_seeds(seeds);
  const DeviceGuard guard(device_of(seeds));
  const Tensor out = empty(seeds, {images, channels, height, width}, codes[dtype], false);
  const cuda::InitialNoise a{static_cast<const std::int64_t*>(seeds.const_data_ptr()),
                             seeds.stride(0), images, channels * height * width,
                             out.mutable_data_ptr()};
  check("initial_noise", cuda::initial_noise(a, dtype, current_stream(device_of(seeds))));
  return out;
}

// With kChained the embedded rows' statistics are a result, too: [rows, tokens, 3, parts].
template <bool kVelocity, bool kChained = false>
auto flow_boundary(const Tensor& x, const Tensor& state, const Tensor& shift, const Tensor& scale,
                   const Tensor& weight, const Tensor& bias, const Tensor& embed_weight,
                   const Tensor& embed_bias, const Tensor& positions, double dt,
                   const MaybeTensor& step_shift, const MaybeTensor& step_scale,
                   double guidance_scale, double ratio, double eps, const MaybeTensor& previous,
                   const MaybeTensor& dt_data, const MaybeTensor& guidance_data,
                   const MaybeTensor& ratio_data) {
  check_cuda("x", x);
  cuda::FlowBoundary a{};
  const Dtype dtype = set_boundary(a, {x, state, shift, scale, weight, bias, embed_weight,
                                       embed_bias, positions, step_shift, step_scale, previous},
                                   eps);
  if (a.channels > cuda::kMaxChannels || a.channels < 1) {
    refuse("x", "1 to ", cuda::kMaxChannels, " channels, got ", a.channels);
  }
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"state", &state},
        {"shift", &shift}, {"scale", &scale}, {"weight", &weight}, {"bias", &bias},
        {"embed_weight", &embed_weight}, {"embed_bias", &embed_bias},
        {"positions", &positions}}) {
    check_device(name, *tensor, x);
  }
  for (const auto& [name, tensor] : {std::pair<const char*, const MaybeTensor*>{"step_shift",
        &step_shift}, {"step_scale", &step_scale}, {"previous", &previous}}) {
    if (tensor->has_value()) check_device(name, **tensor, x);
  }
  const DeviceGuard guard(device_of(x));
  const Tensor new_state = empty_as(state, false), embedded = empty_as(x, false);
  const MaybeTensor kept = room_for_velocity<kVelocity>(state);
  a.new_state = new_state.mutable_data_ptr();
  a.embedded = embedded.mutable_data_ptr();
  if (kVelocity) a.kept = kept->mutable_data_ptr();
  set_numbers(a, {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data}, x);
  const auto launch = [&] {
    check("flow_boundary", cuda::flow_boundary(a, dtype, current_stream(device_of(x))));
  };
  if constexpr (kChained) {
    const std::int64_t parts = (a.channels + cuda::kPart - 1) / cuda::kPart;
    const Tensor statistics =
        empty(x, {x.size(0), a.tokens, 3, parts}, aoti_torch_dtype_float32(), false);
    a.statistics = static_cast<float*>(statistics.mutable_data_ptr());
    launch();
    return with_velocity<kVelocity>(kept, new_state, embedded, statistics);
  } else {
    launch();
    return with_velocity<kVelocity>(kept, new_state, embedded);
  }
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CUDA, library) {
  library.impl("euler_step", TORCH_BOX(&ecar::euler_step<false>));
  library.impl("euler_step_velocity", TORCH_BOX(&ecar::euler_step<true>));
  library.impl("upsample_renoise_euler_seeds",
               TORCH_BOX(&ecar::upsample_renoise_euler_seeds<false>));
  library.impl("upsample_renoise_euler_seeds_velocity",
               TORCH_BOX(&ecar::upsample_renoise_euler_seeds<true>));
  library.impl("upsample_renoise_euler_details",
               TORCH_BOX(&ecar::upsample_renoise_euler_details<false>));
  library.impl("upsample_renoise_euler_details_velocity",
               TORCH_BOX(&ecar::upsample_renoise_euler_details<true>));
  library.impl("initial_noise", TORCH_BOX(&ecar::initial_noise));
  library.impl("flow_boundary", TORCH_BOX(&ecar::flow_boundary<false>));
  library.impl("flow_boundary_velocity", TORCH_BOX(&ecar::flow_boundary<true>));
  library.impl("flow_boundary_chained", TORCH_BOX((&ecar::flow_boundary<false, true>)));
  library.impl("flow_boundary_chained_velocity", TORCH_BOX((&ecar::flow_boundary<true, true>)));
}
