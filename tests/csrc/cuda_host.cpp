// The real CUDA bindings on a machine without CUDA, for test_cuda_host.py. Tensors of cuda:0 and
// cuda:1 lie in the host's memory, and torch's dispatcher takes them to CUDA's kernels. What the
// bindings call of torch's CUDA is here: device guards, streams, memory. The ops are registered in
// `ecar_host`, so that the real library can be loaded too.

#include <dlfcn.h>

#define USE_CUDA  // the declaration of streams
#define aoti_torch_create_device_guard host_create_device_guard
#define aoti_torch_delete_device_guard host_delete_device_guard
#define aoti_torch_empty_strided host_empty_strided
#define dlsym host_dlsym

#include <cstdint>
#include <cstring>
#include <list>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include <ATen/core/Tensor.h>

#define TORCH_TARGET_VERSION 0x020a000000000000  // the bindings', as CMakeLists.txt has it
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" int host_set_device(int device);  // returns the one before

namespace {

bool no_streams = false;

// Memory of outputs: NaN in every dtype, a margin on both sides.
constexpr std::size_t kMargin = 256;
static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ % 16 == 0);
constexpr std::size_t kLarge = std::size_t{1} << 30;  // never written: a dry run
std::list<std::vector<unsigned char>> outputs;

// torch's own ways to make a tensor of an address first look for its CUDA library.
at::Tensor tensor_at(void* data, std::size_t bytes, c10::Device device, caffe2::TypeMeta type) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(data, device), nullptr,
                       false);
  const c10::DispatchKeySet keys(device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  return at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, type);
}

AOTITorchError stream_of(std::int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(std::intptr_t{0x5000} + 16 * device + 1);
  return 0;
}

void* host_dlsym(void*, const char* name) {
  const bool known = std::strcmp(name, "aoti_torch_get_current_cuda_stream") == 0 && !no_streams;
  return known ? reinterpret_cast<void*>(&stream_of) : nullptr;
}

static_assert(std::is_same_v<decltype(&stream_of), decltype(&aoti_torch_get_current_cuda_stream)>);

}  // namespace

extern "C" {

AOTITorchError host_create_device_guard(std::int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(std::intptr_t{host_set_device(index)} + 1);
  return 0;
}

AOTITorchError host_delete_device_guard(DeviceGuardHandle guard) {
  host_set_device(static_cast<int>(reinterpret_cast<std::intptr_t>(guard) - 1));
  return 0;
}

AOTITorchError host_empty_strided(std::int64_t dims, const std::int64_t* sizes,
                                  const std::int64_t* strides, std::int32_t dtype,
                                  std::int32_t device_type, std::int32_t device,
                                  AtenTensorHandle* tensor) {
  const int current = host_set_device(0);
  host_set_device(current);
  if (device_type != aoti_torch_device_type_cuda() || device != current) {
    throw std::runtime_error("an output without its device's guard");
  }
  std::size_t bytes = aoti_torch_dtype_element_size(dtype);
  for (std::int64_t d = 0; d < dims; ++d) bytes *= static_cast<std::size_t>(sizes[d]);
  if (bytes > kLarge) bytes = 0;
  unsigned char* data = outputs.emplace_back(bytes + 2 * kMargin, 0xa5).data() + kMargin;
  std::memset(data, 0xff, bytes);
  const auto type = dtype == aoti_torch_dtype_float32()    ? c10::ScalarType::Float
                    : dtype == aoti_torch_dtype_bfloat16() ? c10::ScalarType::BFloat16
                                                           : c10::ScalarType::Half;
  at::Tensor result = tensor_at(data, bytes, {c10::kCUDA, static_cast<c10::DeviceIndex>(device)},
                                c10::scalarTypeToTypeMeta(type));
  const auto rank = static_cast<std::size_t>(dims);
  result.unsafeGetTensorImpl()->set_sizes_and_strides({sizes, rank}, {strides, rank});
  *tensor = reinterpret_cast<AtenTensorHandle>(new at::Tensor(std::move(result)));
  return 0;
}

// How many outputs were written outside; their memory ends here.
__attribute__((visibility("default"))) int host_release() {
  int damaged = 0;
  for (const std::vector<unsigned char>& memory : outputs) {
    for (std::size_t i = 0; i < kMargin; ++i) {
      if (memory[i] != 0xa5 || memory[memory.size() - 1 - i] != 0xa5) {
        ++damaged;
        break;
      }
    }
  }
  outputs.clear();
  return damaged;
}

__attribute__((visibility("default"))) void host_streams(int there) { no_streams = there == 0; }

}  // extern "C"

#include <torch/csrc/stable/library.h>
#define ECAR_OPS ecar_host

#include "bindings/cuda/flow_step.cpp"

namespace {

using ecar::Tensor;

// The same memory on another device; the argument has to outlive the result.
Tensor moved(const Tensor& tensor, c10::Device device) {
  const at::Tensor& from = *reinterpret_cast<at::Tensor*>(tensor.get());
  const c10::Storage& storage = from.storage();
  at::Tensor to = tensor_at(storage.mutable_data(), storage.nbytes(), device, from.dtype());
  to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(),
                                                  from.storage_offset());
  return Tensor(reinterpret_cast<AtenTensorHandle>(new at::Tensor(std::move(to))));
}

Tensor on_cuda(const Tensor& tensor, std::int64_t device) {
  return moved(tensor, {c10::kCUDA, static_cast<c10::DeviceIndex>(device)});
}

Tensor on_host(const Tensor& tensor) { return moved(tensor, c10::kCPU); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ecar_host, library) {
  library.def("on_cuda(Tensor tensor, int device) -> Tensor");
  library.def("on_host(Tensor tensor) -> Tensor");
}

_STABLE_TORCH_LIBRARY_IMPL(ecar_host, CompositeExplicitAutograd, library, 1) {
  library.impl("on_cuda", TORCH_BOX(&on_cuda));
  library.impl("on_host", TORCH_BOX(&on_host));
}
