#pragma once

// Tokens [B, N, C] and their modulations, checked and taken apart for the kernels.

#include "bindings/tensors.h"
#include "cpu/rows.h"

namespace ecar {

struct Tokens {
  std::int64_t images, tokens, channels;
};

inline Tokens tokens_of(const Tensor& x) {
  const Sizes sizes = x.sizes();
  return {sizes[0], sizes[1], sizes[2]};
}

inline Rows rows_of(const Tensor& tensor) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  return {tensor.const_data_ptr(), sizes[0] == 1 ? 0 : strides[0], sizes[1] == 1 ? 0 : strides[1]};
}

// Tokens like x.
inline Rows like(const char* name, const Tensor& tensor, const Tensor& x, const Tokens& t) {
  check_sizes(name, tensor, x, {t.images, t.tokens, t.channels});
  return rows_of(tensor);
}

// [B, N, C] or [B, 1, C].
inline Rows spatial(const char* name, const Tensor& tensor, const Tensor& x, const Tokens& t) {
  const bool broadcast = tensor.dim() == 3 && tensor.size(1) == 1;
  check_sizes(name, tensor, x, {t.images, broadcast ? 1 : t.tokens, t.channels});
  return rows_of(tensor);
}

// [1, 1, C] or [B, 1, C], or absent.
inline Rows step(const char* name, const MaybeTensor& tensor, const Tensor& x, const Tokens& t) {
  if (!tensor.has_value()) return {};
  const bool broadcast = tensor->dim() == 3 && tensor->size(0) == 1;
  check_sizes(name, *tensor, x, {broadcast ? 1 : t.images, 1, t.channels});
  return rows_of(*tensor);
}

// The modulation's parts in a kernel's arguments, for tokens like x.
template <class Arguments>
inline void set_shift(Arguments& a, const Tensor& shift, const MaybeTensor& step_shift,
                      const Tensor& x, const Tokens& t) {
  a.shift = spatial("shift", shift, x, t);
  a.step_shift = step("step_shift", step_shift, x, t);
}

template <class Arguments>
inline void set_scale(Arguments& a, const Tensor& scale, const MaybeTensor& step_scale, double eps,
                      const Tensor& x, const Tokens& t) {
  a.scale = spatial("scale", scale, x, t);
  a.step_scale = step("step_scale", step_scale, x, t);
  a.eps = static_cast<float>(eps);
}

template <class Arguments>
inline void set_gate(Arguments& a, const Tensor& gate, const MaybeTensor& step_gate,
                     const Tensor& x, const Tokens& t) {
  a.gate = spatial("gate", gate, x, t);
  a.step_gate = step("step_gate", step_gate, x, t);
}

}  // namespace ecar
