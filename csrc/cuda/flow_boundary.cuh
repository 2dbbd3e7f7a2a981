#pragma once

// Between two network calls of a stage, in one launch: final adaLN and linear, guidance, the
// Euler update, and the next step's embedding with positions. A block takes `group` tokens of one
// image, with guidance both of their rows, so that a weight read once serves them all. Sums are
// in float, each in an order that neither the batch nor the group changes.
//
// Where there are few tokens, several blocks do the same token and embed a slice of the channels
// each, and what is read after the first sums is asked for before them.

#include "cuda/flow_step.cuh"

namespace ecar {
namespace cuda {

constexpr int kBoundaryThreads = 256;
constexpr int kGroup = 4;                      // tokens of a block, at most
constexpr std::int64_t kBoundaryShared = 96 << 10;  // sm_120 gives a block 99 KiB
constexpr std::int64_t kBoundaryBlocks = 128;       // about one for each multiprocessor

// In floats: normalised rows, their velocities, the new states, warps' sums.
ECAR_HOST_DEVICE std::int64_t boundary_shared(const FlowBoundary& a, int group) {
  const std::int64_t rows = group * (a.guided ? 2 : 1);
  return rows * (a.channels + a.outputs + 32) + group * a.outputs;
}

// One token a block where there are few (the chip is wide), more where weights are read often.
ECAR_HOST_DEVICE int boundary_group(const FlowBoundary& a) {
  const bool fits = boundary_shared(a, kGroup) * 4 <= kBoundaryShared;
  return fits && a.images * a.tokens >= 1024 ? kGroup : 1;
}

// Blocks of a group, each with its slice of the channels to embed: of no fewer than its threads.
ECAR_HOST_DEVICE std::int64_t boundary_slices(const FlowBoundary& a, int group) {
  const std::int64_t groups = a.images * ((a.tokens + group - 1) / group);
  const std::int64_t slices = (a.channels + kBoundaryThreads - 1) / kBoundaryThreads;
  const std::int64_t wanted = groups > 0 ? kBoundaryBlocks / groups : 1;
  return wanted < 1 ? 1 : wanted < slices ? wanted : slices;
}

__device__ inline float warp_sum(float value) {
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

template <class T>
__device__ inline const T* row_at(const Rows& rows, std::int64_t image, std::int64_t token) {
  return static_cast<const T*>(rows.data) + image * rows.image_stride +
         token * rows.token_stride;
}

// Each row's sum over the block, to every thread; `sums` holds a row's warps, 32 to a row.
template <int kRows>
__device__ inline void block_sums(float (&value)[kRows], float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = warp_sum(value[r]);
    if (lane == 0) sums[32 * r + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    value[r] = 0.0f;
    for (int w = 0; w < warps; ++w) value[r] += sums[32 * r + w];
  }
  __syncthreads();
}

// Do rows of this many elements begin on 16 bytes, one after another?
template <class T>
__device__ inline bool whole_vectors(const void* data, int row) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && row % kVector<T> == 0;
}

template <class T>
__device__ inline bool whole_vectors(const Rows& rows, int row) {
  return whole_vectors<T>(rows.data, row) && rows.image_stride % kVector<T> == 0 &&
         rows.token_stride % kVector<T> == 0;
}

__device__ inline void load_shared(const float* from, float (&to)[4]) {
  const float4 read = *reinterpret_cast<const float4*>(from);
  to[0] = read.x, to[1] = read.y, to[2] = read.z, to[3] = read.w;
}

// `count` floats of shared memory, in 16 bytes where `whole`.
template <int kCount>
__device__ inline void load_row(const float* from, int count, bool whole, float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float four[4] = {};
    if (whole) {
      load_shared(from + i, four);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = i + j < count ? from[i + j] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = four[j];
  }
}

template <int kCount>
__device__ inline void store_row(float* to, int count, bool whole, const float (&from)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) store(to + i, count - i, whole, from + i);
}

// Asks for `count` elements, 128 bytes a thread; nothing where there is no tensor.
template <bool kEarly = false, class T>
__device__ inline void ask_for(const T* from, std::int64_t count) {
  if (from == nullptr) return;
  constexpr int kLine = 128 / sizeof(T);
  for (std::int64_t i = threadIdx.x * kLine; i < count; i += blockDim.x * kLine) {
    kEarly ? prefetch_early(from + i) : prefetch(from + i);
  }
}

// A lane's part of one output's sums: of its 16 bytes of every 512 where the rows allow it.
template <class T, int kRows>
__device__ inline void lane_sums(const T* weight, const float* y, int channels, bool whole,
                                 float (&sum)[kRows]) {
  const int lane = threadIdx.x % 32;
  if (whole) {
#pragma unroll 2
    for (int c = lane * kVector<T>; c < channels; c += 32 * kVector<T>) {
      float w[kVector<T>];
      load(weight + c, kVector<T>, true, w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector<T>; i += 4) {
          float four[4];
          load_shared(y + r * channels + c + i, four);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[r] = fmaf(w[i + j], four[j], sum[r]);
        }
      }
    }
    return;
  }
#pragma unroll 4
  for (int c = lane; c < channels; c += 32) {
    const float w = to_float(weight[c]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = fmaf(w, y[r * channels + c], sum[r]);
  }
}

// Of `count` values, one in each of the first lanes: a number near the mean, the mean less that,
// and the sum of the squared deviations from it, as flow_block/kernels.py has them.
struct Statistics {
  float own, rest, square;
};

__device__ inline Statistics warp_statistics(float value, int count) {
  const int lane = threadIdx.x % 32;
  const float many = static_cast<float>(count);
  const float own = warp_sum(lane < count ? value : 0.0f) / many;
  const float deviation = lane < count ? value - own : 0.0f;
  const float rest = warp_sum(deviation) / many;
  return {own, rest, warp_sum(deviation * deviation) - many * rest * rest};
}

// One channel of the tokens from `first` on, to memory and, as rounded, to `embedded`.
template <class T, int kGuided, int kTokens>
__device__ inline void embed(const FlowBoundary& a, int c, std::int64_t image, std::int64_t first,
                             const float* state, bool whole, float (&embedded)[kTokens]) {
  const int outputs = static_cast<int>(a.outputs);
  const T* weight = static_cast<const T*>(a.embed_weight) + std::int64_t{c} * outputs;
  float sum[kTokens] = {};
  for (int first_output = 0; first_output < outputs; first_output += kVector<T>) {
    const int count = outputs - first_output;
    float w[kVector<T>];
    load(weight + first_output, count, whole, w);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        sum[t] = fmaf(w[i], state[t * outputs + first_output + i], sum[t]);
      }
    }
  }
  const float bias = to_float(static_cast<const T*>(a.embed_bias)[c]);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const std::int64_t token = first + t;
    if (token >= a.tokens) continue;
    const T* positions = static_cast<const T*>(a.positions);
    T value;
    from_float(sum[t] + bias + to_float(positions[token * a.channels + c]), value);
    embedded[t] = to_float(value);
#pragma unroll
    for (int half = 0; half < kGuided; ++half) {
      const std::int64_t row = (image + half * a.images) * a.tokens + token;
      static_cast<T*>(a.embedded)[row * a.channels + c] = value;
    }
  }
}

// S: the state's type.
template <class T, class S, int kTokens, int kGuided>
__device__ inline void flow_boundary_block(const FlowBoundary& a, float* shared) {
  constexpr int kRows = kTokens * kGuided;
  const int channels = static_cast<int>(a.channels), outputs = static_cast<int>(a.outputs);
  const std::int64_t groups = (a.tokens + kTokens - 1) / kTokens;
  const int slices = static_cast<int>(boundary_slices(a, kTokens));
  const int slice = static_cast<int>(blockIdx.x % slices);
  const std::int64_t group = blockIdx.x / slices;
  const std::int64_t image = group / groups, first = group % groups * kTokens;
  // Of channels that this block embeds, in whole parts.
  const int band = ((channels + slices - 1) / slices + kPart - 1) / kPart * kPart;
  const int begin = slice * band < channels ? slice * band : channels;
  const int end = begin + band < channels ? begin + band : channels;
  if (kTokens == 1) {  // weights, which no kernel before this one writes
    ask_for<true>(static_cast<const T*>(a.weight), std::int64_t{outputs} * channels);
    ask_for<true>(static_cast<const T*>(a.embed_weight) + std::int64_t{begin} * outputs,
                  std::int64_t{end - begin} * outputs);
  }
  await_previous();
  float* y = shared;                       // [row][channel]
  float* velocity = y + kRows * channels;  // [row][output]
  float* state = velocity + kRows * outputs;
  float* sums = state + kTokens * outputs;
  std::int64_t images[kRows], tokens[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // Past the image's last token, that token again; nothing of it is stored.
    const std::int64_t token = first + r % kTokens;
    tokens[r] = token < a.tokens ? token : a.tokens - 1;
    images[r] = image + (r / kTokens) * a.images;
  }

  constexpr int kWidth = kVector<T>;  // channels of a thread at once
  const int step = blockDim.x * kWidth;
  const bool whole_x = whole_vectors<T>(a.x, channels);
  const bool whole_y = channels % kWidth == 0;
  float total[kRows] = {};
  for (int c = threadIdx.x * kWidth; c < channels; c += step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float value[kWidth];
      load(row_at<T>(a.x, images[r], tokens[r]) + c, channels - c, whole_x, value);
      store_row(y + r * channels + c, channels - c, whole_y, value);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[r] += value[i];  // 0 past the row
    }
  }
  if (kTokens == 1) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ask_for(row_at<T>(a.scale, images[r], tokens[r]), channels);
      ask_for(row_at<T>(a.shift, images[r], tokens[r]), channels);
      if (a.step_scale.data) ask_for(row_at<T>(a.step_scale, images[r], 0), channels);
      if (a.step_shift.data) ask_for(row_at<T>(a.step_shift, images[r], 0), channels);
    }
    ask_for(static_cast<const T*>(a.weight), std::int64_t{outputs} * channels);
    ask_for(static_cast<const T*>(a.bias), outputs);
    ask_for(static_cast<const S*>(a.state) + image * a.state_image_stride +
                first * a.state_token_stride,
            outputs);
    if (a.previous != nullptr) {
      ask_for(static_cast<const S*>(a.previous) + image * a.previous_image_stride +
                  first * a.previous_token_stride,
              outputs);
    }
    ask_for(static_cast<const T*>(a.embed_weight) + std::int64_t{begin} * outputs,
            std::int64_t{end - begin} * outputs);
    ask_for(static_cast<const T*>(a.embed_bias) + begin, end - begin);
    ask_for(static_cast<const T*>(a.positions) + first * channels + begin, end - begin);
  }
  block_sums(total, sums);
  float mean[kRows], square[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) mean[r] = total[r] / static_cast<float>(channels);
  for (int c = threadIdx.x * kWidth; c < channels; c += step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float value[kWidth];
      load_row(y + r * channels + c, channels - c, whole_y, value);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float deviation = i < channels - c ? value[i] - mean[r] : 0.0f;
        square[r] = fmaf(deviation, deviation, square[r]);
      }
    }
  }
  block_sums(square, sums);
  const bool whole_token =
      whole_vectors<T>(a.scale, channels) && whole_vectors<T>(a.shift, channels);
  const bool whole_scale = whole_vectors<T>(a.step_scale, channels);
  const bool whole_shift = whole_vectors<T>(a.step_shift, channels);
#pragma unroll  // else mean and square need an address, so a stack
  for (int r = 0; r < kRows; ++r) {
    const float deviation = 1.0f / sqrtf(square[r] / static_cast<float>(channels) + a.eps);
    const T* shift = row_at<T>(a.shift, images[r], tokens[r]);
    const T* scale = row_at<T>(a.scale, images[r], tokens[r]);
    const T* step_shift = row_at<T>(a.step_shift, images[r], 0);
    const T* step_scale = row_at<T>(a.step_scale, images[r], 0);
    for (int c = threadIdx.x * kWidth; c < channels; c += step) {
      const int count = channels - c;
      float by[kWidth], plus[kWidth], step_by[kWidth] = {}, step_plus[kWidth] = {}, value[kWidth];
      load(scale + c, count, whole_token, by);
      load(shift + c, count, whole_token, plus);
      if (a.step_scale.data != nullptr) load(step_scale + c, count, whole_scale, step_by);
      if (a.step_shift.data != nullptr) load(step_shift + c, count, whole_shift, step_plus);
      load_row(y + r * channels + c, count, whole_y, value);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        value[i] = fmaf((value[i] - mean[r]) * deviation, (1.0f + by[i]) + step_by[i],
                        plus[i] + step_plus[i]);
      }
      store_row(y + r * channels + c, count, whole_y, value);
    }
  }
  __syncthreads();

  // The velocity: a warp takes an output at a time.
  const int lane = threadIdx.x % 32;
  const bool whole = whole_vectors<T>(a.weight, channels);
  for (int output = threadIdx.x / 32; output < outputs; output += blockDim.x / 32) {
    const T* weight = static_cast<const T*>(a.weight) + std::int64_t{output} * channels;
    float sum[kRows] = {};
    lane_sums(weight, y, channels, whole, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum[r] = warp_sum(sum[r]);
      if (lane == 0) {
        velocity[r * outputs + output] =
            sum[r] + to_float(static_cast<const T*>(a.bias)[output]);
      }
    }
  }
  __syncthreads();

  const float dt = value_of(a.dt), guidance = value_of(a.guidance);
  const float half_ratio = a.previous != nullptr ? 0.5f * value_of(a.ratio) : 0.0f;
  for (int i = threadIdx.x; i < kTokens * outputs; i += blockDim.x) {
    const int t = i / outputs, output = i % outputs;
    const std::int64_t token = first + t;
    if (token >= a.tokens) continue;
    float v = velocity[i];
    if (kGuided == 2) {
      const float unconditional = velocity[kTokens * outputs + i];
      v = unconditional + guidance * (v - unconditional);
    }
    const S* old = static_cast<const S*>(a.state) + image * a.state_image_stride +
                   token * a.state_token_stride;
    const std::int64_t place = (image * a.tokens + token) * outputs + output;
    if (a.kept != nullptr && slice == 0) from_float(v, static_cast<S*>(a.kept)[place]);
    if (a.previous != nullptr) {
      const S* previous = static_cast<const S*>(a.previous) + image * a.previous_image_stride +
                          token * a.previous_token_stride;
      v = v + half_ratio * (v - to_float(previous[output]));
    }
    S value;
    from_float(to_float(old[output]) + dt * v, value);
    if (slice == 0) static_cast<S*>(a.new_state)[place] = value;
    state[i] = to_float(value);  // what the next step reads
  }
  __syncthreads();

  const bool whole_embed = whole_vectors<T>(a.embed_weight, outputs);
  for (int part = begin + threadIdx.x / 32 * 32; part < end; part += blockDim.x) {
    const int c = part + lane;
    float embedded[kTokens] = {};  // as rounded
    if (c < end) embed<T, kGuided>(a, c, image, first, state, whole_embed, embedded);
    if (a.statistics == nullptr) continue;
    const int count = end - part < kPart ? end - part : kPart;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= a.tokens) continue;
      const Statistics found = warp_statistics(embedded[t], count);
      const std::int64_t parts = (channels + kPart - 1) / kPart;
#pragma unroll
      for (int half = 0; half < kGuided; ++half) {
        const std::int64_t row = (image + half * a.images) * a.tokens + first + t;
        float* to = a.statistics + row * 3 * parts + part / kPart;
        if (lane == 0) to[0] = found.own, to[parts] = found.rest, to[2 * parts] = found.square;
      }
    }
  }
}

}  // namespace cuda
}  // namespace ecar
