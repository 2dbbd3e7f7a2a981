// The ops of the adaLN family on CPU tensors. Gradients that are not asked for are empty [0].

#include "cpu/adaln.h"

#include <tuple>

#include "bindings/tokens.h"

namespace ecar {
namespace {

// Tokens like x: an output, or [0] where it is not asked for.
Tensor output(const Tensor& x, const Tokens& t, bool wanted = true) {
  return wanted ? empty(x, {t.images, t.tokens, t.channels}) : empty(x, {0});
}

void* data_of(const Tensor& output, bool wanted) {
  return wanted ? output.mutable_data_ptr() : nullptr;
}

// Past the caches where they could not hold these outputs and what is read for them, as much again.
bool stream(const Tensor& x, const Tokens& t, std::int64_t outputs) {
  return 2 * outputs * t.images * t.tokens * t.channels *
             static_cast<std::int64_t>(x.element_size()) >= kStreamBytes;
}

void run_forward(const AdalnForwardKernel* kernels, Dtype dtype, AdalnForward& a, const Tensor& x,
                 const Tokens& t, std::int64_t outputs) {
  a.tokens = t.tokens, a.channels = t.channels, a.stream = stream(x, t, outputs);
  const AdalnForwardKernel kernel = kernels[dtype];
  parallel(t.images * t.tokens, t.channels, [&](std::int64_t begin, std::int64_t end) {
    kernel(a, begin, end);
  });
}

Tensor adaln(const Tensor& x, const Tensor& shift, const Tensor& scale,
             const MaybeTensor& step_shift, const MaybeTensor& step_scale, double eps) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor y = output(x, t);
  AdalnForward a{};
  a.x = rows_of(x);
  set_shift(a, shift, step_shift, x, t);
  set_scale(a, scale, step_scale, eps, x, t);
  a.y = y.mutable_data_ptr();
  run_forward(ECAR_CHOOSE(adaln_kernels).adaln, dtype, a, x, t, 1);
  return y;
}

Tensor gated_residual(const Tensor& x, const Tensor& branch, const Tensor& gate,
                      const MaybeTensor& step_gate) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor new_x = output(x, t);
  AdalnForward a{};
  a.x = rows_of(x);
  a.branch = like("branch", branch, x, t);
  set_gate(a, gate, step_gate, x, t);
  a.new_x = new_x.mutable_data_ptr();
  run_forward(ECAR_CHOOSE(adaln_kernels).gated_residual, dtype, a, x, t, 1);
  return new_x;
}

std::tuple<Tensor, Tensor> gated_residual_adaln(
    const Tensor& x, const Tensor& branch, const Tensor& gate, const Tensor& shift,
    const Tensor& scale, const MaybeTensor& step_gate, const MaybeTensor& step_shift,
    const MaybeTensor& step_scale, double eps) {
  const Dtype dtype = check_leading("x", x, 3);
  const Tokens t = tokens_of(x);
  const Tensor new_x = output(x, t), y = output(x, t);
  AdalnForward a{};
  a.x = rows_of(x);
  a.branch = like("branch", branch, x, t);
  set_gate(a, gate, step_gate, x, t);
  set_shift(a, shift, step_shift, x, t);
  set_scale(a, scale, step_scale, eps, x, t);
  a.new_x = new_x.mutable_data_ptr();
  a.y = y.mutable_data_ptr();
  run_forward(ECAR_CHOOSE(adaln_kernels).gated_residual_adaln, dtype, a, x, t, 2);
  return {new_x, y};
}

// Tokens of one image whose gradients are summed in a row: enough of them to make the second
// half of the sums small, few enough to keep every thread busy at 256 tokens and batch 1.
constexpr std::int64_t kBlock = 16;

// Runs a backward kernel; returns the sums [slots, B + 1, C]: each image's, then the total.
Tensor run_backward(const AdalnBackwardKernel* kernels, Dtype dtype, AdalnBackward& a,
                    const Tensor& x, const Tokens& t, std::int64_t slots, bool wanted) {
  a.tokens = t.tokens, a.channels = t.channels;
  a.stream = stream(x, t, (a.grad_x != nullptr) + (a.grad_branch != nullptr) +
                              (a.grad_gate != nullptr) + (a.grad_scale != nullptr));
  a.block = kBlock, a.blocks = (t.tokens + kBlock - 1) / kBlock;
  const Tensor sums = wanted ? empty(x, {slots, t.images + 1, t.channels}) : empty(x, {0});
  const Tensor partial = empty(x, {wanted ? t.images * a.blocks * slots * t.channels : 0},
                               aoti_torch_dtype_float32());
  a.sums = static_cast<float*>(data_of(partial, wanted));
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
  const Tensor grad_x = output(x, t), grad_scale = output(x, t, scale_wanted);
  AdalnBackward a{};
  a.grad_y = like("grad_y", grad_y, x, t);
  a.x = rows_of(x);
  set_scale(a, scale, step_scale, eps, x, t);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_scale = data_of(grad_scale, scale_wanted);
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
  const Tensor grad_branch = output(branch, t);
  const Tensor grad_gate = output(branch, t, gate_wanted);
  AdalnBackward a{};
  a.grad_new_x = like("grad_new_x", grad_new_x, branch, t);
  a.branch = rows_of(branch);
  set_gate(a, gate, step_gate, branch, t);
  a.grad_branch = grad_branch.mutable_data_ptr();
  a.grad_gate = data_of(grad_gate, gate_wanted);
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
  const Tensor grad_x = output(new_x, t), grad_branch = output(new_x, t);
  const Tensor grad_gate = output(new_x, t, gate_wanted);
  const Tensor grad_scale = output(new_x, t, scale_wanted);
  AdalnBackward a{};
  a.grad_new_x = like("grad_new_x", grad_new_x, new_x, t);
  a.grad_y = like("grad_y", grad_y, new_x, t);
  a.x = rows_of(new_x);
  a.branch = like("branch", branch, new_x, t);
  set_gate(a, gate, step_gate, new_x, t);
  set_scale(a, scale, step_scale, eps, new_x, t);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_branch = grad_branch.mutable_data_ptr();
  a.grad_gate = data_of(grad_gate, gate_wanted);
  a.grad_scale = data_of(grad_scale, scale_wanted);
  return {grad_x, grad_branch, grad_gate, grad_scale,
          run_backward(ECAR_CHOOSE(adaln_kernels).gated_residual_adaln_backward, dtype, a, new_x,
                       t, 3, sums_wanted)};
}

}  // namespace
}  // namespace ecar

STABLE_TORCH_LIBRARY_FRAGMENT(ECAR_OPS, library) {
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

STABLE_TORCH_LIBRARY_IMPL(ECAR_OPS, CPU, library) {
  library.impl("adaln", TORCH_BOX(&ecar::adaln));
  library.impl("gated_residual", TORCH_BOX(&ecar::gated_residual));
  library.impl("gated_residual_adaln", TORCH_BOX(&ecar::gated_residual_adaln));
  library.impl("adaln_backward", TORCH_BOX(&ecar::adaln_backward));
  library.impl("gated_residual_backward", TORCH_BOX(&ecar::gated_residual_backward));
  library.impl("gated_residual_adaln_backward", TORCH_BOX(&ecar::gated_residual_adaln_backward));
}
