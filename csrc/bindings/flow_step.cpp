// The ops of the flow step on CPU tensors.

#include "cpu/flow_step.h"

#include <tuple>

#include "bindings/flow_step.h"

namespace ecar {
namespace {

// With kVelocity the guided velocity is a result, too.
template <bool kVelocity>
auto euler_step(const Tensor& x, const Tensor& velocity, double dt, double guidance_scale,
                double ratio, const MaybeTensor& previous, const MaybeTensor& dt_data,
                const MaybeTensor& guidance_data, const MaybeTensor& ratio_data) {
  const Dtype dtype = check_leading("x", x, 4);
  const Tensor out = empty_as(x);
  const MaybeTensor kept = kVelocity ? MaybeTensor(empty_as(x)) : std::nullopt;
  EulerStep a{};
  set_step(a, {x, velocity, previous}, out, kept);
  read_numbers(a, {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data});
  a.stream = stream(out);
  merge_dimensions(a);
  const std::int64_t rows = a.sizes[0] * a.sizes[1] * a.sizes[2];
  const std::int64_t blocks = (a.inner + kEulerBlock - 1) / kEulerBlock;
  const EulerStepKernel kernel = ECAR_CHOOSE(flow_step_kernels).euler_step[dtype][has_history(a)];
  parallel(rows * blocks, a.inner < kEulerBlock ? a.inner : kEulerBlock,
           [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
  return with_velocity<kVelocity>(kept, out);
}

void check_seeds(const Tensor& seeds) {
  if (dtype_code(seeds) != aoti_torch_dtype_int64()) refuse("seeds", "int64, got another type");
  if (seeds.dim() != 1) refuse("seeds", "one dimension, got ", text(seeds.sizes()));
}

void jump(Dtype dtype, UpsampleRenoise& a, const StepTensors& in, const StepNumbers& numbers,
          double time, const Tensor& end, const Tensor& start, const MaybeTensor& kept) {
  const Sizes sizes = in.x.sizes();
  set_step(a.step, in, end, kept);
  read_numbers(a.step, numbers);
  a.up_factor = static_cast<float>((1 + time) / 2);
  a.noise_factor = static_cast<float>(1 - time);
  a.start = start.mutable_data_ptr();
  const UpsampleRenoiseKernel kernel =
      ECAR_CHOOSE(flow_step_kernels).upsample_renoise[dtype][has_history(a.step)];
  // A drawn normal costs some twenty copied elements.
  parallel(sizes[3] > 0 ? sizes[0] * sizes[1] * sizes[2] : 0,
           sizes[3] * (a.details == nullptr ? 20 : 5),
           [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
}

template <bool kVelocity>
auto new_jump(Dtype dtype, UpsampleRenoise& a, const StepTensors& in, const StepNumbers& numbers,
              double time) {
  const Sizes sizes = in.x.sizes();
  const Tensor end = empty_as(in.x);
  const Tensor start = empty(in.x, {sizes[0], sizes[1], 2 * sizes[2], 2 * sizes[3]});
  const MaybeTensor kept = kVelocity ? MaybeTensor(empty_as(in.x)) : std::nullopt;
  jump(dtype, a, in, numbers, time, end, start, kept);
  return with_velocity<kVelocity>(kept, end, start);
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

template <bool kVelocity>
auto upsample_renoise_euler_seeds(const Tensor& x, const Tensor& velocity, double dt,
                                  double guidance_scale, double ratio, double time,
                                  std::int64_t stage, const Tensor& seeds,
                                  const MaybeTensor& previous, const MaybeTensor& dt_data,
                                  const MaybeTensor& guidance_data,
                                  const MaybeTensor& ratio_data) {
  const Dtype dtype = check_leading("x", x, 4);
  UpsampleRenoise a{};
  set_seeds(a, seeds, stage, x);
  return new_jump<kVelocity>(dtype, a, {x, velocity, previous},
                             {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data},
                             time);
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
  const MaybeTensor none;
  jump(dtype, a, {x, velocity, none}, {dt, guidance_scale, 0, none, none, none}, time, end, start,
       none);
}

template <bool kVelocity>
auto upsample_renoise_euler_details(const Tensor& x, const Tensor& velocity, double dt,
                                    double guidance_scale, double ratio, double time,
                                    const Tensor& details, const MaybeTensor& previous,
                                    const MaybeTensor& dt_data, const MaybeTensor& guidance_data,
                                    const MaybeTensor& ratio_data) {
  const Dtype dtype = check_leading("x", x, 4);
  const Sizes sizes = x.sizes();
  check_sizes("details", details, x, {sizes[0], sizes[1], 3, sizes[2], sizes[3]});
  UpsampleRenoise a{};
  a.details = details.const_data_ptr();
  for (int d = 0; d < 4; ++d) a.details_strides[d] = details.stride(d);
  return new_jump<kVelocity>(dtype, a, {x, velocity, previous},
                             {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data},
                             time);
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

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
#define ECAR_EULER_STEP \
  "(Tensor x, Tensor velocity, float dt, float guidance_scale, float ratio, " ECAR_STEP_OPTIONS
  library.def("euler_step" ECAR_EULER_STEP "Tensor");
  library.def("euler_step_velocity" ECAR_EULER_STEP "(Tensor x, Tensor velocity)");
#undef ECAR_EULER_STEP
#define ECAR_SEEDS                                                               \
  "(Tensor x, Tensor velocity, float dt, float guidance_scale, float ratio, "    \
  "float time, int stage, Tensor seeds, " ECAR_STEP_OPTIONS "(Tensor end, Tensor start"
  library.def("upsample_renoise_euler_seeds" ECAR_SEEDS ")");
  library.def("upsample_renoise_euler_seeds_velocity" ECAR_SEEDS ", Tensor velocity)");
#undef ECAR_SEEDS
  library.def(
      "upsample_renoise_euler_seeds_out(Tensor x, Tensor velocity, float dt, "
      "float guidance_scale, float time, int stage, Tensor seeds, Tensor(a!) end, "
      "Tensor(b!) start) -> ()");
#define ECAR_DETAILS                                                             \
  "(Tensor x, Tensor velocity, float dt, float guidance_scale, float ratio, "    \
  "float time, Tensor details, " ECAR_STEP_OPTIONS "(Tensor end, Tensor start"
  library.def("upsample_renoise_euler_details" ECAR_DETAILS ")");
  library.def("upsample_renoise_euler_details_velocity" ECAR_DETAILS ", Tensor velocity)");
#undef ECAR_DETAILS
  library.def(
      "initial_noise(Tensor seeds, int channels, int height, int width, ScalarType dtype) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CPU, library) {
  library.impl("euler_step", TORCH_BOX(&ecar::euler_step<false>));
  library.impl("euler_step_velocity", TORCH_BOX(&ecar::euler_step<true>));
  library.impl("upsample_renoise_euler_seeds",
               TORCH_BOX(&ecar::upsample_renoise_euler_seeds<false>));
  library.impl("upsample_renoise_euler_seeds_velocity",
               TORCH_BOX(&ecar::upsample_renoise_euler_seeds<true>));
  library.impl("upsample_renoise_euler_seeds_out",
               TORCH_BOX(&ecar::upsample_renoise_euler_seeds_out));
  library.impl("upsample_renoise_euler_details",
               TORCH_BOX(&ecar::upsample_renoise_euler_details<false>));
  library.impl("upsample_renoise_euler_details_velocity",
               TORCH_BOX(&ecar::upsample_renoise_euler_details<true>));
  library.impl("initial_noise", TORCH_BOX(&ecar::initial_noise));
}
