// A GPU on the host, as much of one as csrc/cuda needs. conftest.py compiles flow_step.cu with this
// file included first.
//
// Emulated: all threads of all blocks, one at a time, on fibers. A thread runs until it waits for
// others, in __syncthreads or in a shuffle of a whole warp; waiting for a thread that has ended is
// an error. Dynamic shared memory is NaN at first, and writes past its end are errors, as are
// 16-byte accesses that are not aligned. A launch is checked as CUDA does: blocks, threads, shared
// memory and its attribute (for each device), the device of the stream, the arguments' size; the
// last error is kept.
// Not emulated: grids and blocks of more than one dimension (an error), launch bounds, registers,
// static shared memory, atomics, memory order, blocks that run side by side, other intrinsics, and
// a launch that still runs when the call returns.

#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

// The numbers of driver_types.h.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int ptxVersion;
};
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

constexpr int kSharedMost = 228 << 10;
namespace ecar::cuda { namespace { alignas(16) float shared[kSharedMost / 4 + 64]; } }

namespace host {

// As the tests set them. A stream of device d lies between kStreams + 16 d and the next device's.
inline int device = 0, fail_next = 0, shared_optin = 99 << 10;  // 99 KiB: sm_120, the least
inline int compiled_for = 90;  // of which chip the code is that runs
inline bool reversed = false, dry = false;
constexpr std::intptr_t kStreams = 0x5000;

inline cudaError_t last_error = cudaSuccess, block_error = cudaSuccess;
inline const char* kernel_name;            // by the first index that the kernel looks at
inline std::string launches;               // a line each
inline std::map<std::pair<int, const void*>, int> shared_raised;
inline dim3 thread_index, block_index;
inline unsigned block_size;

inline void named(const char* name) {
  if (*kernel_name == 0) kernel_name = name;
}

inline void check_aligned(const void* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) block_error = cudaErrorMisalignedAddress;
}

// What threads meet at: the block, or a warp.
struct Meeting {
  unsigned members, arrived = 0, round = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool begun = false;
  int thread = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
  static constexpr std::size_t kStack = 64 << 10;
};

struct Thread {
  Fiber* fiber = nullptr;
  Meeting* waits = nullptr;
  unsigned round = 0, shuffles = 0;
  bool waited = false, done = false;  // waited: for the kernel before
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Fiber*> idle;
inline std::vector<Thread> threads;
inline Meeting block_meeting;
inline std::vector<Meeting> warp_meetings;
inline float exchanged[32][2][32];
inline Fiber* running;
inline jmp_buf scheduler;
inline void (*body)(void*);
inline void* body_arguments;

inline void leave() {
  if (_setjmp(running->at) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    body(body_arguments);
    if (!threads[running->thread].waited) block_error = cudaErrorLaunchFailure;
    threads[running->thread].done = true;
    leave();
  }
}

inline void resume(int index) {
  Thread& thread = threads[index];
  if (thread.fiber == nullptr) {
    if (idle.empty()) {
      fibers.push_back(std::make_unique<Fiber>());
      idle.push_back(fibers.back().get());
    }
    thread.fiber = idle.back();
    thread.fiber->thread = index;
    idle.pop_back();
  }
  running = thread.fiber;
  thread_index.x = static_cast<unsigned>(index);
  if (_setjmp(scheduler) == 0) {
    if (running->begun) _longjmp(running->at, 1);
    running->begun = true;
    getcontext(&running->context);
    running->context.uc_stack.ss_sp = running->stack.get();
    running->context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&running->context, fiber_main, 0);
    setcontext(&running->context);
  }
  if (threads[index].done) idle.push_back(running);
}

inline void meet(Meeting& meeting) {
  Thread& self = threads[thread_index.x];
  self.waits = &meeting;
  self.round = meeting.round;
  if (++meeting.arrived == meeting.members) meeting.arrived = 0, ++meeting.round;
  leave();
}

inline bool moved;  // whether any thread went on

// Every thread of a warp in turn, as long as one can go on.
inline int run_warp(int first, int end) {
  int done = 0, resumed = 0;
  do {
    resumed = 0;
    for (int i = first; i < end; ++i) {
      const int index = reversed ? first + end - 1 - i : i;
      const Thread& thread = threads[index];
      if (thread.done || (thread.waits != nullptr && thread.waits->round == thread.round)) continue;
      resume(index);
      ++resumed;
      done += thread.done;
    }
    moved = moved || resumed > 0;
  } while (resumed > 0);
  return done;
}

// Warps one after the other, each as far as it goes: what one writes too early, others read.
// False: some wait for ever.
inline bool run_block() {
  const int count = static_cast<int>(block_size), warps = (count + 31) / 32;
  threads.assign(count, {});
  block_meeting = {block_size};
  warp_meetings.assign(warps, {32});
  for (int done = 0; done < count;) {
    moved = false;
    for (int i = 0; i < warps; ++i) {
      const int first = 32 * (reversed ? warps - 1 - i : i);
      done += run_warp(first, first + 32 < count ? first + 32 : count);
    }
    if (!moved) {
      idle.clear(), fibers.clear();
      return false;
    }
  }
  return true;
}

inline cudaError_t run_grid(unsigned blocks, int bytes) {
  constexpr std::uint32_t kNan = 0xffffffffu, kBehind = 0xa5a5a5a5u;
  auto* words = reinterpret_cast<std::uint32_t*>(ecar::cuda::shared);
  const int used = bytes / 4;
  block_error = cudaSuccess;
  for (unsigned i = 0; i < blocks; ++i) {
    block_index.x = reversed ? blocks - 1 - i : i;
    for (int w = 0; w < used + 64; ++w) words[w] = w < used ? kNan : kBehind;
    if (!run_block()) return cudaErrorLaunchFailure;
    for (int w = used; w < used + 64; ++w) {
      if (words[w] != kBehind) return cudaErrorIllegalAddress;
    }
    if (block_error != cudaSuccess) return block_error;
  }
  return cudaSuccess;
}

inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const bool one = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!one || grid.x == 0 || grid.x > 0x7fffffff || block.x == 0 || block.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const auto raised = shared_raised.find({device, kernel});
  const int most = raised == shared_raised.end() ? 48 << 10 : raised->second;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(most)) return cudaErrorInvalidValue;
  const std::intptr_t stream = reinterpret_cast<std::intptr_t>(config.stream) - kStreams;
  if (stream / 16 != device) return cudaErrorInvalidResourceHandle;
  return static_cast<cudaError_t>(std::exchange(fail_next, 0));
}

}  // namespace host

#define threadIdx (host::named(__PRETTY_FUNCTION__), host::thread_index)
#define blockIdx (host::named(__PRETTY_FUNCTION__), host::block_index)
inline dim3 blockDim;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel's arguments");
  cudaError_t error = host::check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) {
    const unsigned blocks = config->gridDim.x;
    const int bytes = static_cast<int>(config->dynamicSmemBytes);
    auto call = [&] { kernel(arguments...); };
    host::body = [](void* data) { (*static_cast<decltype(call)*>(data))(); };
    host::body_arguments = &call;
    ::blockDim = config->blockDim;
    host::block_size = ::blockDim.x;
    host::kernel_name = "";
    if (!host::dry) error = host::run_grid(blocks, bytes);
    host::launches += (host::dry ? "dry" : host::kernel_name) + ("|" + std::to_string(blocks)) +
                      "|" + std::to_string(host::block_size) + "|" + std::to_string(bytes) + "|" +
                      std::to_string(host::device) + "|" +
                      std::to_string(reinterpret_cast<std::intptr_t>(config->stream)) + "|" +
                      std::to_string(config->numAttrs == 1 &&
                                     config->attrs->val.programmaticStreamSerializationAllowed) +
                      "\n";
  }
  return error == cudaSuccess ? error : host::last_error = error;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value > host::shared_optin) return host::last_error = cudaErrorInvalidValue;
  host::shared_raised[{host::device, reinterpret_cast<const void*>(kernel)}] = value;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel*) {
  if (host::compiled_for == 0) return host::last_error = cudaErrorInvalidValue;
  found->ptxVersion = host::compiled_for;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(host::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "error " + std::to_string(error);
  return text.c_str();
}

inline void __syncthreads() { host::meet(host::block_meeting); }

// The launches are one after the other, so there is nothing to wait for; but no thread may leave
// it out, for the next kernel's wait is for this kernel's end.
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { host::threads[host::thread_index.x].waited = true; }

inline float __shfl_xor_sync(unsigned, float value, int other) {
  const unsigned thread = host::thread_index.x, lane = thread % 32;
  // In turns, so that no lane writes what another is yet to read.
  float* const values = host::exchanged[thread / 32][host::threads[thread].shuffles++ % 2];
  values[lane] = value;
  host::meet(host::warp_meetings[thread / 32]);
  return values[lane ^ static_cast<unsigned>(other)];
}

struct uint4 {
  unsigned x, y, z, w;
  uint4() = default;
  uint4(const uint4&) = default;
  uint4& operator=(const uint4& from) {
    host::check_aligned(this);
    host::check_aligned(&from);
    std::memcpy(&x, &from.x, 16);
    return *this;
  }
};

struct float4 {
  float x, y, z, w;
  float4(const float4& from) {
    host::check_aligned(&from);
    std::memcpy(&x, &from.x, 16);
  }
};

inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(M_PI * x));
  *cosine = static_cast<float>(std::cos(M_PI * x));
}

#include "cuda_host_halves.h"

// For the bindings' part, cuda_host.cpp, and for the tests.
#define HOST_EXPORT __attribute__((visibility("default")))
extern "C" {

HOST_EXPORT int host_set_device(int device) { return std::exchange(host::device, device); }

// fail: the error of the next launch. shared: the most that a block may ask for. compiled_for: the
// chip of the code that runs, 80 or 90; 0 where CUDA does not say.
HOST_EXPORT void host_set(int fail, int shared, int reversed, int dry, int compiled_for) {
  host::fail_next = fail, host::shared_optin = shared, host::compiled_for = compiled_for;
  host::reversed = reversed != 0, host::dry = dry != 0;
  host::shared_raised.clear();
}

HOST_EXPORT int host_last_error() { return host::last_error; }

HOST_EXPORT const char* host_launches() {
  static std::string text;
  text = std::exchange(host::launches, "");
  return text.c_str();
}

}  // extern "C"
