#pragma once

// What the bindings share: checks whose messages name the argument, outputs, and threads.
//
// The public functions check before they call an op and say more; these checks are the last
// line: whatever is asked of an op, its kernel stays inside its tensors.

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dtypes.h"

// torch.ops.<name> of all bindings. A build for the Kernel Hub has one of its own, for several
// versions may be in one process (tools/hub_kernel.py).
#ifndef ECAR_OPS
#define ECAR_OPS ecar
#endif

namespace ecar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The wording of an error: "argument 'x': expected ..., got ...".
template <class... Parts>
[[noreturn]] inline void refuse(const char* name, const Parts&... parts) {
  std::ostringstream message;
  message << "argument '" << name << "': expected ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string text(Sizes sizes) {
  std::ostringstream out;
  out << '[';
  for (std::size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  out << ']';
  return out.str();
}

inline std::int32_t dtype_code(const Tensor& tensor) {
  std::int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// The tensor that sets the type: its dimensions, its entry in the kernels' tables.
inline Dtype check_leading(const char* name, const Tensor& tensor, std::size_t dims) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  if (sizes.size() != dims) refuse(name, dims, " dimensions, got ", text(sizes));
  if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) {
    refuse(name, "a contiguous last dimension, got strides ", text(strides));
  }
  const std::int32_t code = dtype_code(tensor);
  if (code == aoti_torch_dtype_float32()) return kFloat32;
  if (code == aoti_torch_dtype_bfloat16()) return kBFloat16;
  if (code == aoti_torch_dtype_float16()) return kFloat16;
  refuse(name, "float32, bfloat16 or float16, got another type");
}

// A tensor of the leading one's type and of these sizes.
inline void check_sizes(const char* name, const Tensor& tensor, const Tensor& leading,
                        std::initializer_list<std::int64_t> expected) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  const Sizes wanted(expected.begin(), expected.size());
  bool same = sizes.size() == wanted.size();
  for (std::size_t i = 0; same && i < wanted.size(); ++i) same = sizes[i] == wanted[i];
  if (!same) refuse(name, text(wanted), ", got ", text(sizes));
  const std::size_t last = wanted.size() - 1;
  if (sizes[last] > 1 && strides[last] != 1) {
    refuse(name, "a contiguous last dimension, got strides ", text(strides));
  }
  if (dtype_code(tensor) != dtype_code(leading)) {
    refuse(name, "the first argument's type, got another one");
  }
}

// From this size on, an output's memory usually comes fresh from the kernel.
constexpr std::int64_t kLarge = std::int64_t{4} << 20;

// Asks for huge pages before the first touch, as torch's THP_MEM_ALLOC_ENABLE=1 does for all of
// its memory: faults of 4 KiB cost more than the kernels do. On a virtual Zen 4, 64 MiB outputs:
// adaln 441 ms without, 186 ms with.
inline void prepare_large(void* data, std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  // A kernel that refuses leaves the pages small.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Outputs from here on are written past the caches, which could not hold them: it spares the
// read of each line that an ordinary store makes first.
constexpr std::int64_t kStreamBytes = std::int64_t{32} << 20;

inline bool stream(const Tensor& output) {
  return output.numel() * static_cast<std::int64_t>(output.element_size()) >= kStreamBytes;
}

// A new contiguous tensor of the type and device of `like`.
inline Tensor empty(const Tensor& like, const std::int64_t* sizes, std::size_t dims,
                    std::int32_t dtype, bool host) {
  std::int64_t strides[8];
  std::int64_t stride = 1, count = 1;
  for (std::size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    count *= sizes[i];
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  std::int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(dims), sizes, strides, dtype, device_type, device_index, &handle));
  const Tensor tensor(handle);
  const std::int64_t bytes = count * static_cast<std::int64_t>(aoti_torch_dtype_element_size(dtype));
  if (host && bytes >= kLarge) prepare_large(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

inline Tensor empty(const Tensor& like, std::initializer_list<std::int64_t> sizes,
                    std::int32_t dtype, bool host = true) {
  return empty(like, sizes.begin(), sizes.size(), dtype, host);
}

inline Tensor empty(const Tensor& like, std::initializer_list<std::int64_t> sizes) {
  return empty(like, sizes, dtype_code(like));
}

// A new contiguous tensor of the sizes, type and device of `like`.
inline Tensor empty_as(const Tensor& like, bool host = true) {
  const Sizes sizes = like.sizes();
  return empty(like, sizes.data(), sizes.size(), dtype_code(like), host);
}

// A tensor to write to: of the leading one's type, of these sizes, contiguous.
inline void check_output(const char* name, const Tensor& out, const Tensor& leading,
                         std::initializer_list<std::int64_t> sizes) {
  check_sizes(name, out, leading, sizes);
  if (!out.is_contiguous()) refuse(name, "a contiguous tensor, got strides ", text(out.strides()));
}

// Do both have the same elements at the same addresses?
inline bool same_memory(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.dim() != b.dim()) return false;
  for (std::int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  }
  return true;
}

// A contiguous output must not lie in what the kernel is yet to read.
inline void check_apart(const char* name, const Tensor& out, const Tensor& input) {
  std::int64_t last = 0;
  for (std::int64_t d = 0; d < input.dim(); ++d) {
    if (input.size(d) == 0) return;
    last += (input.size(d) - 1) * input.stride(d);
  }
  const auto bytes = [](const Tensor& tensor, std::int64_t elements) {
    return elements * static_cast<std::int64_t>(tensor.element_size());
  };
  const char* in = static_cast<const char*>(input.const_data_ptr());
  const char* to = static_cast<const char*>(out.const_data_ptr());
  if (to < in + bytes(input, last + 1) && in < to + bytes(out, out.numel())) {
    refuse(name, "memory apart from that of the inputs, got an overlap");
  }
}

// Elements that a thread should have before another one is worth waking.
constexpr std::int64_t kGrain = 32768;
// Multiply-adds that cost about as much as one element of elementwise work.
constexpr std::int64_t kMultiplyAddsAnElement = 8;

// work(begin, end) over [0, count), on torch's threads where there is enough of it.
template <class Work>
inline void parallel(std::int64_t count, std::int64_t elements_each, const Work& work) {
  const std::int64_t grain = kGrain / (elements_each > 0 ? elements_each : 1) + 1;
  if (count <= grain) {
    if (count > 0) work(std::int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, work);
  }
}

}  // namespace ecar
