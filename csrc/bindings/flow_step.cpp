// The ops of the flow step on CPU tensors.

#include "cpu/flow_step.h"

#include <tuple>

#include "bindings/tokens.h"

namespace ecar {
namespace {

// Adjacent dimensions that are one in memory become one, so that short rows become long ones.
void merge_dimensions(EulerStep& a) {
  for (int d = 2; d >= 0; --d) {
    const bool joined = a.sizes[d] == 1 || (a.x_strides[d] == a.inner &&
                                            a.velocity_strides[d] == a.inner);
    if (!joined) return;
    a.inner *= a.sizes[d];
    a.sizes[d] = 1;
    a.x_strides[d] = a.velocity_strides[d] = 0;
  }
}

EulerStep euler_arguments(const Tensor& x, const Tensor& velocity, double dt,
                          double guidance_scale, const Tensor& out) {
  const Sizes sizes = x.sizes();
  const std::int64_t images = velocity.dim() == 4 ? velocity.size(0) : 0;
  const bool guided = images == 2 * sizes[0];
  check_sizes("velocity", velocity, x,
              {guided ? 2 * sizes[0] : sizes[0], sizes[1], sizes[2], sizes[3]});
  EulerStep a{};
  a.x = x.const_data_ptr();
  a.velocity = velocity.const_data_ptr();
  const Sizes x_strides = x.strides(), velocity_strides = velocity.strides();
  for (int d = 0; d < 3; ++d) {
    a.sizes[d] = sizes[d];
    a.x_strides[d] = x_strides[d];
    a.velocity_strides[d] = velocity_strides[d];
  }
  a.inner = sizes[3];
  a.out = out.mutable_data_ptr();
  a.dt = static_cast<float>(dt);
  a.guidance = static_cast<float>(guidance_scale);
  if (guided) {
    const std::int64_t bytes = sizes[0] * velocity_strides[0] *
                               static_cast<std::int64_t>(x.element_size());
    a.unconditional = static_cast<const char*>(a.velocity) + bytes;
  }
  return a;
}

// A scale in a tensor is for CUDA graphs; ecar_kernels.flow_step reads one on the CPU itself.
void check_guidance(const MaybeTensor& guidance) {
  if (guidance.has_value()) refuse("guidance", "none for CPU tensors, got a tensor");
}

Tensor euler_step(const Tensor& x, const Tensor& velocity, double dt, double guidance_scale,
                  const MaybeTensor& guidance) {
  check_guidance(guidance);
  const Dtype dtype = check_leading("x", x, 4);
  const Sizes sizes = x.sizes();
  const Tensor out = empty(x, {sizes[0], sizes[1], sizes[2], sizes[3]});
  EulerStep a = euler_arguments(x, velocity, dt, guidance_scale, out);
  a.stream = stream(out);
  merge_dimensions(a);
  const std::int64_t rows = a.sizes[0] * a.sizes[1] * a.sizes[2];
  const std::int64_t blocks = (a.inner + kEulerBlock - 1) / kEulerBlock;
  const EulerStepKernel kernel = ECAR_CHOOSE(flow_step_kernels).euler_step[dtype];
  parallel(rows * blocks, a.inner < kEulerBlock ? a.inner : kEulerBlock,
           [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
  return out;
}

void check_seeds(const Tensor& seeds) {
  if (dtype_code(seeds) != aoti_torch_dtype_int64()) refuse("seeds", "int64, got another type");
  if (seeds.dim() != 1) refuse("seeds", "one dimension, got ", text(seeds.sizes()));
}

void jump(Dtype dtype, UpsampleRenoise& a, const Tensor& x, const Tensor& velocity, double dt,
          double guidance_scale, double time, const Tensor& end, const Tensor& start) {
  const Sizes sizes = x.sizes();
  a.step = euler_arguments(x, velocity, dt, guidance_scale, end);
  a.up_factor = static_cast<float>((1 + time) / 2);
  a.noise_factor = static_cast<float>(1 - time);
  a.start = start.mutable_data_ptr();
  const UpsampleRenoiseKernel kernel = ECAR_CHOOSE(flow_step_kernels).upsample_renoise[dtype];
  // A drawn normal costs some twenty copied elements.
  parallel(sizes[3] > 0 ? sizes[0] * sizes[1] * sizes[2] : 0,
           sizes[3] * (a.details == nullptr ? 20 : 5),
           [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
}

std::tuple<Tensor, Tensor> new_jump(Dtype dtype, UpsampleRenoise& a, const Tensor& x,
                                    const Tensor& velocity, double dt, double guidance_scale,
                                    double time) {
  const Sizes sizes = x.sizes();
  const Tensor end = empty(x, {sizes[0], sizes[1], sizes[2], sizes[3]});
  const Tensor start = empty(x, {sizes[0], sizes[1], 2 * sizes[2], 2 * sizes[3]});
  jump(dtype, a, x, velocity, dt, guidance_scale, time, end, start);
  return {end, start};
}

void set_seeds(UpsampleRenoise& a, const Tensor& seeds, std::int64_t stage, const Tensor& x) {
  check_seeds(seeds);
  if (seeds.size(0) != x.size(0)) {
    refuse("seeds", "one for each image, ", x.size(0), ", got ", seeds.size(0));
  }
  a.seeds = static_cast<const std::int64_t*>(seeds.const_data_ptr());
  a.seed_stride = seeds.stride(0);
  a.stage = static_cast<std::uint32_t>(stage);
}

std::tuple<Tensor, Tensor> upsample_renoise_euler_seeds(const Tensor& x, const Tensor& velocity,
                                                        double dt, double guidance_scale,
                                                        double time, std::int64_t stage,
                                                        const Tensor& seeds,
                                                        const MaybeTensor& guidance) {
  check_guidance(guidance);
  const Dtype dtype = check_leading("x", x, 4);
  UpsampleRenoise a{};
  set_seeds(a, seeds, stage, x);
  return new_jump(dtype, a, x, velocity, dt, guidance_scale, time);
}

// `end` may be x or the velocity: each element is read before it is replaced.
void upsample_renoise_euler_seeds_out(const Tensor& x, const Tensor& velocity, double dt,
                                      double guidance_scale, double time, std::int64_t stage,
                                      const Tensor& seeds, const Tensor& end,
                                      const Tensor& start) {
  const Dtype dtype = check_leading("x", x, 4);
  const Sizes sizes = x.sizes();
  UpsampleRenoise a{};
  set_seeds(a, seeds, stage, x);
  check_output("end", end, x, {sizes[0], sizes[1], sizes[2], sizes[3]});
  check_output("start", start, x, {sizes[0], sizes[1], 2 * sizes[2], 2 * sizes[3]});
  for (const Tensor* input : {&x, &velocity}) {
    if (!same_memory(end, *input)) check_apart("end", end, *input);
    check_apart("start", start, *input);
  }
  jump(dtype, a, x, velocity, dt, guidance_scale, time, end, start);
}

std::tuple<Tensor, Tensor> upsample_renoise_euler_details(const Tensor& x, const Tensor& velocity,
                                                          double dt, double guidance_scale,
                                                          double time, const Tensor& details,
                                                          const MaybeTensor& guidance) {
  check_guidance(guidance);
  const Dtype dtype = check_leading("x", x, 4);
  const Sizes sizes = x.sizes();
  check_sizes("details", details, x, {sizes[0], sizes[1], 3, sizes[2], sizes[3]});
  UpsampleRenoise a{};
  a.details = details.const_data_ptr();
  for (int d = 0; d < 4; ++d) a.details_strides[d] = details.stride(d);
  return new_jump(dtype, a, x, velocity, dt, guidance_scale, time);
}

Dtype table_entry(ScalarType type) {
  if (type == ScalarType::Float) return kFloat32;
  if (type == ScalarType::BFloat16) return kBFloat16;
  if (type == ScalarType::Half) return kFloat16;
  refuse("dtype", "float32, bfloat16 or float16, got another type");
}

std::int32_t code_of(Dtype dtype) {
  return dtype == kFloat32    ? aoti_torch_dtype_float32()
         : dtype == kBFloat16 ? aoti_torch_dtype_bfloat16()
                              : aoti_torch_dtype_float16();
}

Tensor initial_noise(const Tensor& seeds, std::int64_t channels, std::int64_t height,
                     std::int64_t width, ScalarType type) {
  const Dtype dtype = table_entry(type);
  check_seeds(seeds);
  for (const std::int64_t size : {channels, height, width}) {
    if (size < 0) refuse("shape", "sizes of at least 0, got ", size);
  }
  const std::int64_t images = seeds.size(0);
  const Tensor out = empty(seeds, {images, channels, height, width}, code_of(dtype));
  InitialNoise a{};
  a.seeds = static_cast<const std::int64_t*>(seeds.const_data_ptr());
  a.seed_stride = seeds.stride(0);
  a.out = out.mutable_data_ptr();
  a.count = channels * height * width;
  a.blocks = (a.count + kNoiseBlock - 1) / kNoiseBlock;
  const InitialNoiseKernel kernel = ECAR_CHOOSE(flow_step_kernels).initial_noise[dtype];
  parallel(images * a.blocks, 10 * kNoiseBlock,
           [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ecar, library) {
  library.def(
      "euler_step(Tensor x, Tensor velocity, float dt, float guidance_scale, "
      "Tensor? guidance=None) -> Tensor");
  library.def(
      "upsample_renoise_euler_seeds(Tensor x, Tensor velocity, float dt, float guidance_scale, "
      "float time, int stage, Tensor seeds, Tensor? guidance=None) -> (Tensor end, Tensor start)");
  library.def(
      "upsample_renoise_euler_seeds_out(Tensor x, Tensor velocity, float dt, "
      "float guidance_scale, float time, int stage, Tensor seeds, Tensor(a!) end, "
      "Tensor(b!) start) -> ()");
  library.def(
      "upsample_renoise_euler_details(Tensor x, Tensor velocity, float dt, float guidance_scale, "
      "float time, Tensor details, Tensor? guidance=None) -> (Tensor end, Tensor start)");
  library.def(
      "initial_noise(Tensor seeds, int channels, int height, int width, ScalarType dtype) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CPU, library) {
  library.impl("euler_step", TORCH_BOX(&ecar::euler_step));
  library.impl("upsample_renoise_euler_seeds", TORCH_BOX(&ecar::upsample_renoise_euler_seeds));
  library.impl("upsample_renoise_euler_seeds_out",
               TORCH_BOX(&ecar::upsample_renoise_euler_seeds_out));
  library.impl("upsample_renoise_euler_details",
               TORCH_BOX(&ecar::upsample_renoise_euler_details));
  library.impl("initial_noise", TORCH_BOX(&ecar::initial_noise));
}
