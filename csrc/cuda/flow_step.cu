// The flow step's launches. Kernels' bodies: flow_step.cuh and flow_boundary.cuh.

#include "cuda/flow_step.cuh"

#include <cuda_runtime.h>

#include "cuda/flow_boundary.cuh"

namespace ecar {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) euler_kernel(EulerStep a, std::int64_t units) {
  const std::int64_t unit = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) euler_unit<T>(a, kWide, unit);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) upsample_renoise_kernel(UpsampleRenoise a,
                                                                    std::int64_t units) {
  const std::int64_t unit = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) upsample_renoise_unit<T>(a, kWide, unit);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) initial_noise_kernel(InitialNoise a,
                                                                 std::int64_t units) {
  const std::int64_t unit = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) initial_noise_unit<T>(a, kWide, unit);
}

template <class T, class S, int kTokens, int kGuided>
__global__ void __launch_bounds__(kBoundaryThreads, 2) flow_boundary_kernel(FlowBoundary a) {
  extern __shared__ float shared[];
  flow_boundary_block<T, S, kTokens, kGuided>(a, shared);
}

template <class Arguments>
int launch(void (*wide_kernel)(Arguments, std::int64_t),
           void (*narrow_kernel)(Arguments, std::int64_t), const Arguments& a, bool wide,
           std::int64_t units, void* stream) {
  if (units == 0) return cudaSuccess;
  const std::int64_t blocks = ceil_div(units, kThreads);
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  (wide ? wide_kernel : narrow_kernel)<<<static_cast<unsigned>(blocks), kThreads, 0,
                                         static_cast<cudaStream_t>(stream)>>>(a, units);
  return cudaGetLastError();
}

template <class T, class S, int kTokens, int kGuided>
int launch_boundary(const FlowBoundary& a, void* stream) {
  const std::int64_t blocks = a.images * ceil_div(a.tokens, kTokens);
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const auto kernel = flow_boundary_kernel<T, S, kTokens, kGuided>;
  const int bytes = static_cast<int>(boundary_shared(a, kTokens) * 4);
  if (bytes > 48 << 10) {  // more has to be asked for; not a stream's work, so fine in a graph
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), kBoundaryThreads, bytes,
           static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

template <class T, class S>
int choose_boundary(const FlowBoundary& a, void* stream) {
  if (boundary_group(a) == 1) {
    return a.guided ? launch_boundary<T, S, 1, 2>(a, stream)
                    : launch_boundary<T, S, 1, 1>(a, stream);
  }
  return a.guided ? launch_boundary<T, S, kGroup, 2>(a, stream)
                  : launch_boundary<T, S, kGroup, 1>(a, stream);
}

template <class T>
int choose_state(const FlowBoundary& a, void* stream) {
  return a.wide_state ? choose_boundary<T, float>(a, stream) : choose_boundary<T, T>(a, stream);
}

// call(T{}) for the type's T.
template <class Call>
int with_type(Dtype dtype, const Call& call) {
  return dtype == kFloat32 ? call(float{}) : dtype == kBFloat16 ? call(BFloat16{})
                                                                : call(Float16{});
}

}  // namespace

int euler_step(const EulerStep& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(euler_kernel<T, true>, euler_kernel<T, false>, a, wide<T>(a), units<T>(a),
                  stream);
  });
}

int upsample_renoise(const UpsampleRenoise& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(upsample_renoise_kernel<T, true>, upsample_renoise_kernel<T, false>, a,
                  wide<T>(a), units<T>(a.step), stream);
  });
}

int initial_noise(const InitialNoise& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(initial_noise_kernel<T, true>, initial_noise_kernel<T, false>, a, wide<T>(a),
                  units<T>(a), stream);
  });
}

int flow_boundary(const FlowBoundary& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) { return choose_state<decltype(t)>(a, stream); });
}

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace ecar
