// The ops of the adaLN family on CPU tensors. Gradients that are not asked for are empty [0].

#include "cpu/adaln.h"

#include <tuple>

#include "bindings/tokens.h"

namespace ecar {
namespace {

void run_forward(const AdalnForwardKernel* kernels, Dtype dtype, const AdalnForward& arguments,
                 const Tokens& t) {
  const AdalnForwardKernel kernel = kernels[dtype];
  parallel(t.images * t.tokens, t.channels, [&](std::int64_t begin, std::int64_t end) {
    kernel(arguments, begin, end);
  });
}

Tensor adaln(const Tensor& x, const Tensor& shift, const Tensor& scale,
             const MaybeTensor& step_shift, const MaybeTensor& step_scale, double eps) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor y = empty(x, {t.images, t.tokens, t.channels});
  AdalnForward a{};
  a.x = rows_of(x);
  a.shift = spatial("shift", shift, x, t);
  a.scale = spatial("scale", scale, x, t);
  a.step_shift = step("step_shift", step_shift, x, t);
  a.step_scale = step("step_scale", step_scale, x, t);
  a.y = y.mutable_data_ptr();
  a.tokens = t.tokens, a.channels = t.channels, a.eps = static_cast<float>(eps);
  a.stream = stream(y);
  run_forward(ECAR_CHOOSE(adaln_kernels).adaln, dtype, a, t);
  return y;
}

Tensor gated_residual(const Tensor& x, const Tensor& branch, const Tensor& gate,
                      const MaybeTensor& step_gate) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor new_x = empty(x, {t.images, t.tokens, t.channels});
  AdalnForward a{};
  a.x = rows_of(x);
  a.branch = like("branch", branch, x, t);
  a.gate = spatial("gate", gate, x, t);
  a.step_gate = step("step_gate", step_gate, x, t);
  a.new_x = new_x.mutable_data_ptr();
  a.tokens = t.tokens, a.channels = t.channels, a.stream = stream(new_x);
  run_forward(ECAR_CHOOSE(adaln_kernels).gated_residual, dtype, a, t);
  return new_x;
}

std::tuple<Tensor, Tensor> gated_residual_adaln(
    const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& shift,
    const Tensor& scale, const MaybeTensor& step_gate, const MaybeTensor& step_shift,
    const MaybeTensor& step_scale, double eps) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor new_x = empty(x, {t.images, t.tokens, t.channels});
  const Tensor y = empty(x, {t.images, t.tokens, t.channels});
  AdalnForward a{};
  a.x = rows_of(x);
  a.branch = like("branch", branch, x, t);
  a.gate = spatial("gate", gate, x, t);
  a.shift = spatial("shift", shift, x, t);
  a.scale = spatial("scale", scale, x, t);
  a.step_gate = step("step_gate", step_gate, x, t);
  a.step_shift = step("step_shift", step_shift, x, t);
  a.step_scale = step("step_scale", step_scale, x, t);
  a.new_x = new_x.mutable_data_ptr();
  a.y = y.mutable_data_ptr();
  a.tokens = t.tokens, a.channels = t.channels, a.eps = static_cast<float>(eps);
  a.stream = stream(y);
  run_forward(ECAR_CHOOSE(adaln_kernels).gated_residual_adaln, dtype, a, t);
  return {new_x, y};
}

// Tokens of one image whose gradients are summed in a row: enough of them to make the second
// half of the sums small, few enough to keep every thread busy at 256 tokens and batch 1.
constexpr std::int64_t kBlock = 16;

// Output [B, N, C] of a gradient, or [0].
Tensor gradient(const Tensor& x, const Tokens& t, bool wanted) {
  return wanted ? empty(x, {t.images, t.tokens, t.channels}) : empty(x, {0});
}

// Runs a backward kernel; returns the sums [slots, B + 1, C]: each image's, then the total.
Tensor run_backward(const AdalnBackwardKernel* kernels, Dtype dtype, AdalnBackward& a,
                    const Tensor& x, const Tokens& t, std::int64_t slots, bool wanted) {
  a.tokens = t.tokens, a.channels = t.channels;
  a.block = kBlock, a.blocks = (t.tokens + kBlock - 1) / kBlock;
  const Tensor sums = wanted ? empty(x, {slots, t.images + 1, t.channels}) : empty(x, {0});
  const Tensor partial = empty(x, {wanted ? t.images * a.blocks * slots * t.channels : 0},
                               aoti_torch_dtype_float32());
  a.sums = wanted ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  const AdalnBackwardKernel kernel = kernels[dtype];
  parallel(t.images * a.blocks, kBlock * t.channels, [&](std::int64_t begin, std::int64_t end) {
    kernel(a, begin, end);
  });
  if (wanted) {
    const AdalnSums s{a.sums, sums.mutable_data_ptr(), t.images, a.blocks, slots, t.channels};
    const AdalnSumsKernel kernel = ECAR_CHOOSE(adaln_kernels).sums[dtype];
    parallel(slots * t.channels, t.images * a.blocks,
             [&](std::int64_t begin, std::int64_t end) { kernel(s, begin, end); });
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& grad_y, const Tensor& x,
                                                  const Tensor& scale,
                                                  const MaybeTensor& step_scale, double eps,
                                                  bool scale_wanted, bool sums_wanted) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor grad_x = gradient(x, t, true), grad_scale = gradient(x, t, scale_wanted);
  AdalnBackward a{};
  a.grad_y = like("grad_y", grad_y, x, t);
  a.x = rows_of(x);
  a.scale = spatial("scale", scale, x, t);
  a.step_scale = step("step_scale", step_scale, x, t);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_scale = scale_wanted ? grad_scale.mutable_data_ptr() : nullptr;
  a.eps = static_cast<float>(eps);
  return {grad_x, grad_scale, run_backward(ECAR_CHOOSE(adaln_kernels).adaln_backward, dtype, a, x,
                                           t, 2, sums_wanted)};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(const Tensor& grad_new_x,
                                                           const Tensor& branch,
                                                           const Tensor& gate,
                                                           const MaybeTensor& step_gate,
                                                           bool gate_wanted, bool sums_wanted) {
  const Dtype dtype = check_leading("branch", branch, 3);
  const Tokens t = tokens_of(branch);
  const Tensor grad_branch = gradient(branch, t, true);
  const Tensor grad_gate = gradient(branch, t, gate_wanted);
  AdalnBackward a{};
  a.grad_new_x = like("grad_new_x", grad_new_x, branch, t);
  a.branch = rows_of(branch);
  a.gate = spatial("gate", gate, branch, t);
  a.step_gate = step("step_gate", step_gate, branch, t);
  a.grad_branch = grad_branch.mutable_data_ptr();
  a.grad_gate = gate_wanted ? grad_gate.mutable_data_ptr() : nullptr;
  return {grad_branch, grad_gate,
          run_backward(ECAR_CHOOSE(adaln_kernels).gated_residual_backward, dtype, a, branch, t, 1,
                       sums_wanted)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_backward(
    const Tensor& grad_new_x, const Tensor& grad_y, const Tensor& new_x, const Tensor& branch,
    const Tensor& gate, const Tensor& scale, const MaybeTensor& step_gate,
    const MaybeTensor& step_scale, double eps, bool gate_wanted, bool scale_wanted,
    bool sums_wanted) {
  const Dtype dtype = check_leading("new_x", new_x, 3);
  const Tokens t = tokens_of(new_x);
  const Tensor grad_x = gradient(new_x, t, true), grad_branch = gradient(new_x, t, true);
  const Tensor grad_gate = gradient(new_x, t, gate_wanted);
  const Tensor grad_scale = gradient(new_x, t, scale_wanted);
  AdalnBackward a{};
  a.grad_new_x = like("grad_new_x", grad_new_x, new_x, t);
  a.grad_y = like("grad_y", grad_y, new_x, t);
  a.x = rows_of(new_x);
  a.branch = like("branch", branch, new_x, t);
  a.gate = spatial("gate", gate, new_x, t);
  a.scale = spatial("scale", scale, new_x, t);
  a.step_gate = step("step_gate", step_gate, new_x, t);
  a.step_scale = step("step_scale", step_scale, new_x, t);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_branch = grad_branch.mutable_data_ptr();
  a.grad_gate = gate_wanted ? grad_gate.mutable_data_ptr() : nullptr;
  a.grad_scale = scale_wanted ? grad_scale.mutable_data_ptr() : nullptr;
  a.eps = static_cast<float>(eps);
  return {grad_x, grad_branch, grad_gate, grad_scale,
          run_backward(ECAR_CHOOSE(adaln_kernels).gated_residual_adaln_backward, dtype, a, new_x,
                       t, 3, sums_wanted)};
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ecar, library) {
  library.def(
      "adaln(Tensor x, Tensor shift, Tensor scale, Tensor? step_shift, Tensor? step_scale, "
      "float eps) -> Tensor");
  library.def("gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? step_gate) -> Tensor");
  library.def(
      "gated_residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
      "Tensor? step_gate, Tensor? step_shift, Tensor? step_scale, float eps) "
      "-> (Tensor new_x, Tensor y)");
  library.def(
      "adaln_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor? step_scale, float eps, "
      "bool scale_wanted, bool sums_wanted) -> (Tensor grad_x, Tensor grad_scale, Tensor sums)");
  library.def(
      "gated_residual_backward(Tensor grad_new_x, Tensor branch, Tensor gate, Tensor? step_gate, "
      "bool gate_wanted, bool sums_wanted) "
      "-> (Tensor grad_branch, Tensor grad_gate, Tensor sums)");
  library.def(
      "gated_residual_adaln_backward(Tensor grad_new_x, Tensor grad_y, Tensor new_x, "
      "Tensor branch, Tensor gate, Tensor scale, Tensor? step_gate, Tensor? step_scale, "
      "float eps, bool gate_wanted, bool scale_wanted, bool sums_wanted) "
      "-> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, Tensor grad_scale, Tensor sums)");
}

STABLE_TORCH_LIBRARY_IMPL(ecar, CPU, library) {
  library.impl("adaln", TORCH_BOX(&ecar::adaln));
  library.impl("gated_residual", TORCH_BOX(&ecar::gated_residual));
  library.impl("gated_residual_adaln", TORCH_BOX(&ecar::gated_residual_adaln));
  library.impl("adaln_backward", TORCH_BOX(&ecar::adaln_backward));
  library.impl("gated_residual_backward", TORCH_BOX(&ecar::gated_residual_backward));
  library.impl("gated_residual_adaln_backward", TORCH_BOX(&ecar::gated_residual_adaln_backward));
}
