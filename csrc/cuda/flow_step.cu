// The flow step's launches. Kernels' bodies: flow_step.cuh and flow_boundary.cuh.

#include "cuda/flow_step.cuh"

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "cuda/flow_boundary.cuh"

namespace ecar {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) euler_kernel(EulerStep a, std::int64_t units) {
  await_previous();
  const std::int64_t unit = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) euler_unit<T>(a, kWide, unit);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) upsample_renoise_kernel(UpsampleRenoise a,
                                                                    std::int64_t units) {
  await_previous();
  const std::int64_t unit = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) upsample_renoise_unit<T>(a, kWide, unit);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) initial_noise_kernel(InitialNoise a,
                                                                 std::int64_t units) {
  await_previous();
  const std::int64_t unit = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) initial_noise_unit<T>(a, kWide, unit);
}

template <class T, class S, int kTokens, int kGuided>
__global__ void __launch_bounds__(kBoundaryThreads, 2) flow_boundary_kernel(FlowBoundary a) {
  extern __shared__ float shared[];
  flow_boundary_block<T, S, kTokens, kGuided>(a, shared);
}

// May the kernel begin before the one before it on the stream has ended? Where the code that this
// device runs has await_previous(), as that of sm_90 and newer, and the environment allows it.
template <class Kernel>
bool begins_early(Kernel* kernel) {
  static const char* const given = std::getenv("ECAR_DEPENDENT_LAUNCH");
  if (given != nullptr && std::strcmp(given, "0") == 0) return false;
  cudaFuncAttributes found{};
  if (cudaFuncGetAttributes(&found, kernel) == cudaSuccess) return found.ptxVersion >= 90;
  cudaGetLastError();
  return false;
}

// Every launch: a row of blocks, none where there is nothing to do.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::int64_t bytes,
           void* stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = begins_early(kernel) ? 1 : 0;
  cudaError_t error = cudaSuccess;
  if (bytes > 48 << 10) {  // more has to be asked for; not a stream's work, so fine in a graph
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // reported here, so that no later call does
  return error;
}

template <class Arguments>
int launch_units(void (*wide_kernel)(Arguments, std::int64_t),
                 void (*narrow_kernel)(Arguments, std::int64_t), const Arguments& a, bool wide,
                 std::int64_t units, void* stream) {
  return launch(wide ? wide_kernel : narrow_kernel, ceil_div(units, kThreads), kThreads, 0, stream,
                a, units);
}

template <class T, class S, int kTokens, int kGuided>
int launch_boundary(const FlowBoundary& a, void* stream) {
  return launch(flow_boundary_kernel<T, S, kTokens, kGuided>,
                a.images * ceil_div(a.tokens, kTokens) * boundary_slices(a, kTokens),
                kBoundaryThreads, boundary_shared(a, kTokens) * 4, stream, a);
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
    return launch_units(euler_kernel<T, true>, euler_kernel<T, false>, a, wide<T>(a),
                        units<T>(a), stream);
  });
}

int upsample_renoise(const UpsampleRenoise& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch_units(upsample_renoise_kernel<T, true>, upsample_renoise_kernel<T, false>, a,
                        wide<T>(a), units<T>(a.step), stream);
  });
}

int initial_noise(const InitialNoise& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch_units(initial_noise_kernel<T, true>, initial_noise_kernel<T, false>, a,
                        wide<T>(a), units<T>(a), stream);
  });
}

int flow_boundary(const FlowBoundary& a, Dtype dtype, void* stream) {
  return with_type(dtype, [&](auto t) { return choose_state<decltype(t)>(a, stream); });
}

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace ecar
