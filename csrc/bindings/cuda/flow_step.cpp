// The ops of the flow step on CUDA tensors. libecar_cpu.so, loaded first, defines the schemas.

#include "cuda/flow_step.h"

#include <dlfcn.h>

#include <tuple>

#include <torch/csrc/stable/accelerator.h>

#include "bindings/boundary.h"

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

cuda::Guidance guidance_of(double scale, const MaybeTensor& tensor, const Tensor& leading) {
  if (!tensor.has_value()) return {static_cast<float>(scale), nullptr};
  check_device("guidance", *tensor, leading);
  if (dtype_code(*tensor) != aoti_torch_dtype_float32() || tensor->numel() != 1) {
    refuse("guidance", "one float32");
  }
  return {0.0f, static_cast<const float*>(tensor->const_data_ptr())};
}

// As the CPU's: adjacent dimensions that are one in memory become one.
void merge_dimensions(cuda::EulerStep& a) {
  for (int d = 2; d >= 0; --d) {
    const bool joined = a.sizes[d] == 1 || (a.x_strides[d] == a.inner &&
                                            a.velocity_strides[d] == a.inner);
    if (!joined) return;
    a.inner *= a.sizes[d];
    a.sizes[d] = 1;
    a.x_strides[d] = a.velocity_strides[d] = 0;
  }
}

cuda::EulerStep euler_arguments(const Tensor& x, const Tensor& velocity, double dt,
                                double guidance_scale, const MaybeTensor& guidance,
                                const Tensor& out) {
  const Sizes sizes = x.sizes();
  const std::int64_t images = velocity.dim() == 4 ? velocity.size(0) : 0;
  const bool guided = images == 2 * sizes[0];
  check_sizes("velocity", velocity, x,
              {guided ? 2 * sizes[0] : sizes[0], sizes[1], sizes[2], sizes[3]});
  check_device("velocity", velocity, x);
  cuda::EulerStep a{};
  a.x = x.const_data_ptr();
  a.velocity = velocity.const_data_ptr();
  for (int d = 0; d < 3; ++d) {
    a.sizes[d] = sizes[d];
    a.x_strides[d] = x.stride(d);
    a.velocity_strides[d] = velocity.stride(d);
  }
  a.inner = sizes[3];
  a.out = out.mutable_data_ptr();
  a.dt = static_cast<float>(dt);
  a.guidance = guidance_of(guidance_scale, guidance, x);
  if (guided && sizes[0] > 0) {
    a.unconditional = static_cast<const char*>(a.velocity) +
                      sizes[0] * velocity.stride(0) * static_cast<std::int64_t>(x.element_size());
  }
  return a;
}

Tensor euler_step(const Tensor& x, const Tensor& velocity, double dt, double guidance_scale,
                  const MaybeTensor& guidance) {
  check_cuda("x", x);
  const Dtype dtype = check_leading("x", x, 4);
  const DeviceGuard guard(device_of(x));
  const Sizes sizes = x.sizes();
  const Tensor out = empty(x, {sizes[0], sizes[1], sizes[2], sizes[3]}, dtype_code(x), false);
  cuda::EulerStep a = euler_arguments(x, velocity, dt, guidance_scale, guidance, out);
  merge_dimensions(a);
  check("euler_step", cuda::euler_step(a, dtype, current_stream(device_of(x))));
  return out;
}

std::int64_t check_seeds(const Tensor& seeds) {
  if (dtype_code(seeds) != aoti_torch_dtype_int64()) refuse("seeds", "int64, got another type");
  if (seeds.dim() != 1) refuse("seeds", "one dimension, got ", text(seeds.sizes()));
  return seeds.size(0);
}

std::tuple<Tensor, Tensor> jump(Dtype dtype, cuda::UpsampleRenoise& a, const Tensor& x,
                                const Tensor& velocity, double dt, double guidance_scale,
                                double time, const MaybeTensor& guidance) {
  const DeviceGuard guard(device_of(x));
  const Sizes sizes = x.sizes();
  const std::int32_t code = dtype_code(x);
  const Tensor end = empty(x, {sizes[0], sizes[1], sizes[2], sizes[3]}, code, false);
  const Tensor start = empty(x, {sizes[0], sizes[1], 2 * sizes[2], 2 * sizes[3]}, code, false);
  a.step = euler_arguments(x, velocity, dt, guidance_scale, guidance, end);
  a.up_factor = static_cast<float>((1 + time) / 2);
  a.noise_factor = static_cast<float>(1 - time);
  a.start = start.mutable_data_ptr();
  check("upsample_renoise_euler", cuda::upsample_renoise(a, dtype, current_stream(device_of(x))));
  return {end, start};
}

std::tuple<Tensor, Tensor> upsample_renoise_euler_seeds(const Tensor& x, const Tensor& velocity,
                                                        double dt, double guidance_scale,
                                                        double time, std::int64_t stage,
                                                        const Tensor& seeds,
                                                        const MaybeTensor& guidance) {
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
  return jump(dtype, a, x, velocity, dt, guidance_scale, time, guidance);
}

std::tuple<Tensor, Tensor> upsample_renoise_euler_details(const Tensor& x, const Tensor& velocity,
                                                          double dt, double guidance_scale,
                                                          double time, const Tensor& details,
                                                          const MaybeTensor& guidance) {
  check_cuda("x", x);
  const Dtype dtype = check_leading("x", x, 4);
  const Sizes sizes = x.sizes();
  check_sizes("details", details, x, {sizes[0], sizes[1], 3, sizes[2], sizes[3]});
  check_device("details", details, x);
  cuda::UpsampleRenoise a{};
  a.details = details.const_data_ptr();
  for (int d = 0; d < 4; ++d) a.details_strides[d] = details.stride(d);
  return jump(dtype, a, x, velocity, dt, guidance_scale, time, guidance);
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

std::tuple<Tensor, Tensor> flow_boundary(
    const Tensor& x, const Tensor& state, const Tensor& shift, const Tensor& scale,
    const Tensor& weight, const Tensor& bias, const Tensor& embed_weight,
    const Tensor& embed_bias, const Tensor& positions, double dt, const MaybeTensor& step_shift,
    const MaybeTensor& step_scale, double guidance_scale, double eps,
    const MaybeTensor& guidance) {
  check_cuda("x", x);
  cuda::FlowBoundary a{};
  const Dtype dtype = set_boundary(a, {x, state, shift, scale, weight, bias, embed_weight,
                                       embed_bias, positions, step_shift, step_scale}, dt, eps);
  if (a.channels > cuda::kMaxChannels || a.channels < 1) {
    refuse("x", "1 to ", cuda::kMaxChannels, " channels, got ", a.channels);
  }
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"state", &state},
        {"shift", &shift}, {"scale", &scale}, {"weight", &weight}, {"bias", &bias},
        {"embed_weight", &embed_weight}, {"embed_bias", &embed_bias},
        {"positions", &positions}}) {
    check_device(name, *tensor, x);
  }
  if (step_shift.has_value()) check_device("step_shift", *step_shift, x);
  if (step_scale.has_value()) check_device("step_scale", *step_scale, x);
  const DeviceGuard guard(device_of(x));
  const Tensor new_state =
      empty(state, {a.images, a.tokens, a.outputs}, dtype_code(state), false);
  const Tensor embedded = empty(x, {x.size(0), a.tokens, a.channels}, dtype_code(x), false);
  a.new_state = new_state.mutable_data_ptr();
  a.embedded = embedded.mutable_data_ptr();
  a.guidance = guidance_of(guidance_scale, guidance, x);
  check("flow_boundary", cuda::flow_boundary(a, dtype, current_stream(device_of(x))));
  return {new_state, embedded};
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_IMPL(ecar, CUDA, library) {
  library.impl("euler_step", TORCH_BOX(&ecar::euler_step));
  library.impl("upsample_renoise_euler_seeds", TORCH_BOX(&ecar::upsample_renoise_euler_seeds));
  library.impl("upsample_renoise_euler_details",
               TORCH_BOX(&ecar::upsample_renoise_euler_details));
  library.impl("initial_noise", TORCH_BOX(&ecar::initial_noise));
  library.impl("flow_boundary", TORCH_BOX(&ecar::flow_boundary));
}
