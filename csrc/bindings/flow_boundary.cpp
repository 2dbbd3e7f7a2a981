// flow_boundary on CPU tensors, and its schemas.

#include "cpu/flow_boundary.h"

#include <tuple>

#include "bindings/flow_boundary.h"

namespace ecar {
namespace {

using std::int64_t;

void run(const FlowBoundary& a, Dtype dtype) {
  const int64_t all = a.images * a.tokens;
  const BoundaryKernels& kernels = ECAR_CHOOSE(boundary_kernels);
  const BoundaryState state = kernels.state[dtype][a.wide_state];
  const BoundaryEmbed embed = kernels.embed[dtype][a.wide_state];
  // Four multiply-adds are about an element of elementwise work.
  parallel(all, (a.guided ? 2 : 1) * a.channels * (4 + a.outputs / 4),
           [&](int64_t begin, int64_t end) { state(a, begin, end); });
  const int64_t band = band_of(all), bands = (a.channels + band - 1) / band;
  const int64_t chunks = (all + kBandTokens - 1) / kBandTokens;
  const int64_t tokens = all < kBandTokens ? all : kBandTokens;
  parallel(bands * chunks, band * (a.outputs * (tokens + 16) / 4 + tokens),
           [&](int64_t begin, int64_t end) { embed(a, begin, end); });
}

// `new_state` may be the state, `embedded` x, and `velocity_out` the velocity of the step before.
void flow_boundary_out(const Tensor& x, const Tensor& state, const Tensor& shift,
                       const Tensor& scale, const Tensor& weight, const Tensor& bias,
                       const Tensor& embed_weight, const Tensor& embed_bias,
                       const Tensor& positions, double dt, const MaybeTensor& step_shift,
                       const MaybeTensor& step_scale, double guidance_scale, double ratio,
                       double eps, const Tensor& new_state, const Tensor& embedded,
                       const MaybeTensor& previous, const MaybeTensor& velocity_out) {
  FlowBoundary a{};
  a.embed_turned = is_turned(embed_weight);
  const Dtype dtype = set_boundary(a,
                                   {x, state, shift, scale, weight, bias, embed_weight, embed_bias,
                                    positions, step_shift, step_scale, previous},
                                   eps, a.embed_turned);
  check_output("new_state", new_state, state, {a.images, a.tokens, a.outputs});
  check_output("embedded", embedded, x, {x.size(0), a.tokens, a.channels});
  if (!same_memory(new_state, state)) check_apart("new_state", new_state, state);
  if (!same_memory(embedded, x)) check_apart("embedded", embedded, x);
  if (previous.has_value()) {
    check_apart("new_state", new_state, *previous);
    check_apart("embedded", embedded, *previous);
  }
  if (velocity_out.has_value()) {
    const Tensor& kept = *velocity_out;
    check_output("velocity_out", kept, state, {a.images, a.tokens, a.outputs});
    for (const Tensor* other : {&x, &state, &new_state, &embedded}) {
      check_apart("velocity_out", kept, *other);
    }
    if (previous.has_value() && !same_memory(kept, *previous)) {
      check_apart("velocity_out", kept, *previous);
    }
    a.kept = kept.mutable_data_ptr();
  }
  a.new_state = new_state.mutable_data_ptr();
  a.embedded = embedded.mutable_data_ptr();
  const MaybeTensor none;
  read_numbers(a, {dt, guidance_scale, ratio, none, none, none});
  run(a, dtype);
}

template <bool kVelocity>
auto flow_boundary(const Tensor& x, const Tensor& state, const Tensor& shift, const Tensor& scale,
                   const Tensor& weight, const Tensor& bias, const Tensor& embed_weight,
                   const Tensor& embed_bias, const Tensor& positions, double dt,
                   const MaybeTensor& step_shift, const MaybeTensor& step_scale,
                   double guidance_scale, double ratio, double eps, const MaybeTensor& previous,
                   const MaybeTensor& dt_data, const MaybeTensor& guidance_data,
                   const MaybeTensor& ratio_data) {
  FlowBoundary a{};
  a.embed_turned = is_turned(embed_weight);
  const Dtype dtype = set_boundary(a,
                                   {x, state, shift, scale, weight, bias, embed_weight, embed_bias,
                                    positions, step_shift, step_scale, previous},
                                   eps, a.embed_turned);
  const Tensor new_state = empty_as(state), embedded = empty_as(x);
  const MaybeTensor kept = kVelocity ? MaybeTensor(empty_as(state)) : std::nullopt;
  a.new_state = new_state.mutable_data_ptr();
  a.embedded = embedded.mutable_data_ptr();
  if (kVelocity) a.kept = kept->mutable_data_ptr();
  read_numbers(a, {dt, guidance_scale, ratio, dt_data, guidance_data, ratio_data});
  run(a, dtype);
  return with_velocity<kVelocity>(kept, new_state, embedded);
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
#define ECAR_BOUNDARY \
  "(Tensor x, Tensor state, Tensor shift, Tensor scale, Tensor weight, Tensor bias, " \
  "Tensor embed_weight, Tensor embed_bias, Tensor positions, float dt, Tensor? step_shift, " \
  "Tensor? step_scale, float guidance_scale, float ratio, float eps, "
  library.def("flow_boundary" ECAR_BOUNDARY ECAR_STEP_OPTIONS "(Tensor state, Tensor embedded)");
  library.def("flow_boundary_velocity" ECAR_BOUNDARY ECAR_STEP_OPTIONS
              "(Tensor state, Tensor embedded, Tensor velocity)");
  // On CUDA alone; the statistics are those of the embedded rows.
  library.def("flow_boundary_chained" ECAR_BOUNDARY ECAR_STEP_OPTIONS
              "(Tensor state, Tensor embedded, Tensor statistics)");
  library.def("flow_boundary_chained_velocity" ECAR_BOUNDARY ECAR_STEP_OPTIONS
              "(Tensor state, Tensor embedded, Tensor statistics, Tensor velocity)");
  library.def("flow_boundary_out" ECAR_BOUNDARY
              "Tensor(a!) new_state, Tensor(b!) embedded, Tensor? previous=None, "
              "Tensor(c!)? velocity_out=None) -> ()");
#undef ECAR_BOUNDARY
}

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CPU, library) {
  library.impl("flow_boundary", TORCH_BOX(&ecar::flow_boundary<false>));
  library.impl("flow_boundary_velocity", TORCH_BOX(&ecar::flow_boundary<true>));
  library.impl("flow_boundary_out", TORCH_BOX(&ecar::flow_boundary_out));
}
