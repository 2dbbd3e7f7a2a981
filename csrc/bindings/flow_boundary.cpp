// flow_boundary on CPU tensors, and its schemas.

#include "cpu/flow_boundary.h"

#include <tuple>

#include "bindings/boundary.h"

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

// `new_state` may be the state, `embedded` may be x.
void flow_boundary_out(const Tensor& x, const Tensor& state, const Tensor& shift,
                       const Tensor& scale, const Tensor& weight, const Tensor& bias,
                       const Tensor& embed_weight, const Tensor& embed_bias,
                       const Tensor& positions, double dt, const MaybeTensor& step_shift,
                       const MaybeTensor& step_scale, double guidance_scale, double eps,
                       const Tensor& new_state, const Tensor& embedded) {
  FlowBoundary a{};
  const Dtype dtype = set_boundary(a, {x, state, shift, scale, weight, bias, embed_weight,
                                       embed_bias, positions, step_shift, step_scale}, dt, eps);
  check_output("new_state", new_state, state, {a.images, a.tokens, a.outputs});
  check_output("embedded", embedded, x, {x.size(0), a.tokens, a.channels});
  if (!same_memory(new_state, state)) check_apart("new_state", new_state, state);
  if (!same_memory(embedded, x)) check_apart("embedded", embedded, x);
  a.new_state = new_state.mutable_data_ptr();
  a.embedded = embedded.mutable_data_ptr();
  a.guidance = static_cast<float>(guidance_scale);
  run(a, dtype);
}

std::tuple<Tensor, Tensor> flow_boundary(
    const Tensor& x, const Tensor& state, const Tensor& shift, const Tensor& scale,
    const Tensor& weight, const Tensor& bias, const Tensor& embed_weight,
    const Tensor& embed_bias, const Tensor& positions, double dt, const MaybeTensor& step_shift,
    const MaybeTensor& step_scale, double guidance_scale, double eps,
    const MaybeTensor& guidance) {
  // A scale in a tensor is for CUDA graphs; ecar_kernels.flow_step reads one on the CPU itself.
  if (guidance.has_value()) refuse("guidance", "none for CPU tensors, got a tensor");
  FlowBoundary a{};
  const Dtype dtype = set_boundary(a, {x, state, shift, scale, weight, bias, embed_weight,
                                       embed_bias, positions, step_shift, step_scale}, dt, eps);
  const Tensor new_state = empty(state, {a.images, a.tokens, a.outputs});
  const Tensor embedded = empty(x, {x.size(0), a.tokens, a.channels});
  a.new_state = new_state.mutable_data_ptr();
  a.embedded = embedded.mutable_data_ptr();
  a.guidance = static_cast<float>(guidance_scale);
  run(a, dtype);
  return {new_state, embedded};
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ecar, library) {
  library.def(
      "flow_boundary(Tensor x, Tensor state, Tensor shift, Tensor scale, Tensor weight, "
      "Tensor bias, Tensor embed_weight, Tensor embed_bias, Tensor positions, float dt, "
      "Tensor? step_shift, Tensor? step_scale, float guidance_scale, float eps, "
      "Tensor? guidance=None) -> (Tensor state, Tensor embedded)");
  library.def(
      "flow_boundary_out(Tensor x, Tensor state, Tensor shift, Tensor scale, Tensor weight, "
      "Tensor bias, Tensor embed_weight, Tensor embed_bias, Tensor positions, float dt, "
      "Tensor? step_shift, Tensor? step_scale, float guidance_scale, float eps, "
      "Tensor(a!) new_state, Tensor(b!) embedded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CPU, library) {
  library.impl("flow_boundary", TORCH_BOX(&ecar::flow_boundary));
  library.impl("flow_boundary_out", TORCH_BOX(&ecar::flow_boundary_out));
}
