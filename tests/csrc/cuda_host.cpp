// The CUDA kernels' bodies on the host, for test_cuda_host.py. A thread of the elementwise kernels
// needs no other; a block of the boundary kernel runs as real threads that meet at barriers.

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define ECAR_CUDA_ON_HOST
#define __device__

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx, blockDim;
static pthread_barrier_t block_barrier, warp_barriers[8];
static float exchanged[8][32];

static void __syncthreads() { pthread_barrier_wait(&block_barrier); }

static float __shfl_xor_sync(unsigned, float value, int other) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  exchanged[warp][lane] = value;
  pthread_barrier_wait(&warp_barriers[warp]);
  const float found = exchanged[warp][lane ^ static_cast<unsigned>(other)];
  pthread_barrier_wait(&warp_barriers[warp]);
  return found;
}

#include "cuda/flow_boundary.cuh"
#include "cuda/flow_step.cuh"

namespace {

using namespace ecar;

template <class Call>
void with_type(int dtype, const Call& call) {
  if (dtype == kFloat32) call(float{});
  if (dtype == kBFloat16) call(BFloat16{});
  if (dtype == kFloat16) call(Float16{});
}

template <class T, class S, int kTokens, int kGuided>
void blocks(const cuda::FlowBoundary& a, unsigned threads) {
  const unsigned count = static_cast<unsigned>(a.images * cuda::ceil_div(a.tokens, kTokens));
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (unsigned w = 0; w < threads / 32; ++w) {
    pthread_barrier_init(&warp_barriers[w], nullptr, 32);
  }
  std::vector<float> shared(static_cast<std::size_t>(cuda::boundary_shared(a, kTokens)), NAN);
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      threadIdx = {t}, blockDim = {threads};
      for (unsigned block = 0; block < count; ++block) {
        blockIdx = {block};
        cuda::flow_boundary_block<T, S, kTokens, kGuided>(a, shared.data());
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

template <class T, class S>
void boundary(const cuda::FlowBoundary& a, int group) {
  if (group == 1 && a.guided) blocks<T, S, 1, 2>(a, 64);
  if (group == 1 && !a.guided) blocks<T, S, 1, 1>(a, 64);
  if (group != 1 && a.guided) blocks<T, S, cuda::kGroup, 2>(a, 64);
  if (group != 1 && !a.guided) blocks<T, S, cuda::kGroup, 1>(a, 64);
}

}  // namespace

extern "C" {

// sizes [4]; strides of x and velocity, 3 each; returns whether 16-byte accesses were taken.
int euler(int dtype, const void* x, const void* velocity, const void* unconditional, void* out,
          const std::int64_t* sizes, const std::int64_t* strides, float dt, float guidance) {
  cuda::EulerStep a{x, velocity, unconditional, {sizes[0], sizes[1], sizes[2]}, sizes[3],
                    {strides[0], strides[1], strides[2]}, {strides[3], strides[4], strides[5]},
                    out, dt, {0.0f, &guidance}};
  bool wide = false;
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    wide = cuda::wide<T>(a);
    for (std::int64_t u = 0; u < cuda::units<T>(a); ++u) cuda::euler_unit<T>(a, wide, u);
  });
  return wide;
}

int jump(int dtype, const void* x, const void* velocity, const void* unconditional, void* end,
         void* start, const std::int64_t* sizes, const std::int64_t* strides,
         const void* details, const std::int64_t* seeds, std::uint32_t stage, float dt,
         float guidance, float up, float noise) {
  cuda::UpsampleRenoise a{};
  a.step = {x, velocity, unconditional, {sizes[0], sizes[1], sizes[2]}, sizes[3],
            {strides[0], strides[1], strides[2]}, {strides[3], strides[4], strides[5]},
            end, dt, {guidance, nullptr}};
  a.details = details;
  const std::int64_t plane = sizes[2] * sizes[3];
  const std::int64_t detail_strides[] = {3 * sizes[1] * plane, 3 * plane, plane, sizes[3]};
  for (int d = 0; d < 4; ++d) a.details_strides[d] = detail_strides[d];
  a.seeds = seeds, a.seed_stride = 1, a.stage = stage;
  a.up_factor = up, a.noise_factor = noise, a.start = start;
  bool wide = false;
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    wide = cuda::wide<T>(a);
    for (std::int64_t u = 0; u < cuda::units<T>(a.step); ++u) {
      cuda::upsample_renoise_unit<T>(a, wide, u);
    }
  });
  return wide;
}

void noise(int dtype, const std::int64_t* seeds, std::int64_t images, std::int64_t count,
           void* out) {
  const cuda::InitialNoise a{seeds, 1, images, count, out};
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    for (std::int64_t u = 0; u < cuda::units<T>(a); ++u) {
      cuda::initial_noise_unit<T>(a, cuda::wide<T>(a), u);
    }
  });
}

// Contiguous tensors in the op's order; sizes: images, tokens, channels, outputs.
void flow_boundary(int dtype, int wide_state, int group, int guided, const void** in,
                   void* new_state, void* embedded, const std::int64_t* sizes, float dt,
                   float guidance, float eps) {
  cuda::FlowBoundary a{};
  const std::int64_t n = sizes[1], c = sizes[2];
  a.x = {in[0], n * c, c};
  a.state = in[1];
  a.state_image_stride = n * sizes[3], a.state_token_stride = sizes[3];
  a.shift = {in[2], n * c, c}, a.scale = {in[3], n * c, c};
  a.weight = in[4], a.bias = in[5], a.embed_weight = in[6], a.embed_bias = in[7];
  a.positions = in[8];
  a.step_shift = {in[9], 0, 0}, a.step_scale = {in[10], 0, 0};
  a.new_state = new_state, a.embedded = embedded;
  a.images = sizes[0], a.tokens = n, a.channels = c, a.outputs = sizes[3];
  a.guided = guided != 0, a.wide_state = wide_state != 0;
  a.dt = dt, a.eps = eps, a.guidance = {0.0f, &guidance};
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    wide_state ? boundary<T, float>(a, group) : boundary<T, T>(a, group);
  });
}

}  // extern "C"
