#include "cpu/flow_boundary.h"

#include "cpu/vec_rows.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

using std::int64_t;

constexpr int64_t kRoom = kMaxOutputs + kWidth;  // whole vectors may be written

template <class T>
inline const T* at(const void* data, int64_t index) {
  return static_cast<const T*>(data) + index;
}

// `K` outputs' sums over the channels of one modulated row.
template <int K, class T, class Load>
inline void products(const FlowBoundary& a, Load load, int64_t output, float* to) {
  const T* weight = at<T>(a.weight, output * a.channels);
  Vec sums[K] = {};
  for_each(a.channels, [&](auto io, int64_t c) {
    const Vec y = load(io, c);
    for (int k = 0; k < K; ++k) sums[k] = fma(y, io.load(weight + k * a.channels + c), sums[k]);
  });
  for (int k = 0; k < K; ++k) {
    const Vec bias = Partial{1}.load(at<T>(a.bias, output + k));
    to[output + k] = horizontal_sum(sums[k]) + bias[0];
  }
}

// The velocity of one row.
template <class T>
void velocity_of(const FlowBoundary& a, int64_t image, int64_t token, float* to) {
  const T* x = row<T>(a.x, image, token);
  const T* shift = row<T>(a.shift, image, token);
  const T* scale = row<T>(a.scale, image, token);
  const T* step_shift = row<T>(a.step_shift, image, token);
  const T* step_scale = row<T>(a.step_scale, image, token);
  const auto value = [&](auto io, int64_t c) { return io.load(x + c); };
  const Moments moments = moments_of(a.channels, sum_of(a.channels, value), a.eps, value);
  const auto modulated = [&](auto io, int64_t c) {
    const Vec normal = (io.load(x + c) - moments.mean) * moments.inverse_deviation;
    return io.keep(fma(normal, 1.0f + combine(io, scale, step_scale, c),
                       combine(io, shift, step_shift, c)));
  };
  int64_t output = 0;
  // The next token's rows come while this one's are multiplied.
  const auto ahead_modulated = [&](auto io, int64_t c) {
    __builtin_prefetch(x + a.x.token_stride + c);
    __builtin_prefetch(shift + a.shift.token_stride + c);
    __builtin_prefetch(scale + a.scale.token_stride + c);
    return modulated(io, c);
  };
  if (a.outputs >= 8) products<8, T>(a, ahead_modulated, 0, to), output = 8;
  for (; output + 8 <= a.outputs; output += 8) products<8, T>(a, modulated, output, to);
  for (; output + 4 <= a.outputs; output += 4) products<4, T>(a, modulated, output, to);
  for (; output < a.outputs; ++output) products<1, T>(a, modulated, output, to);
}

// S: the state's type.
template <class T, class S>
void new_states(const FlowBoundary& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / a.tokens, token = index % a.tokens;
    float velocity[kRoom], unconditional[kRoom];
    velocity_of<T>(a, image, token, velocity);
    if (a.guided) velocity_of<T>(a, a.images + image, token, unconditional);
    const S* old = at<S>(a.state, image * a.state_image_stride + token * a.state_token_stride);
    S* to = static_cast<S*>(a.new_state) + index * a.outputs;
    const S* previous =
        a.previous == nullptr
            ? nullptr
            : at<S>(a.previous, image * a.previous_image_stride + token * a.previous_token_stride);
    S* kept = a.kept == nullptr ? nullptr : static_cast<S*>(a.kept) + index * a.outputs;
    for_each(a.outputs, [&](auto io, int64_t output) {
      Vec v = io.load(velocity + output);
      if (a.guided) {
        const Vec u = io.load(unconditional + output);
        v = u + a.guidance * (v - u);
      }
      const Vec guided = v;
      if (previous != nullptr) v = v + a.half_ratio * (v - io.load(previous + output));
      if (kept != nullptr) io.store(kept + output, guided);
      io.store(to + output, io.load(old + output) + a.dt * v);  // not fused, as euler_step
    });
  }
}

// The embedding's weights of a band of channels, [output][channel of the band].
template <class T>
void turn_weights(const FlowBoundary& a, int64_t first, int64_t channels, float (*to)[kMaxBand]) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* weight = at<T>(a.embed_weight, (first + c) * a.outputs);
    float read[kRoom];
    for_each(a.outputs, [&](auto io, int64_t output) {
      Full{}.store(read + output, io.load(weight + output));
    });
    for (int64_t output = 0; output < a.outputs; ++output) to[output][c] = read[output];
  }
}

// `Tokens` tokens from `index` on by `Vectors` whole vectors, or less than one, of a band.
template <int Tokens, int Vectors, class T, class Access>
inline void embed_tile(const FlowBoundary& a, Access io, const float (*weights)[kMaxBand],
                       const float (*states)[kRoom], int64_t first, int64_t c, int64_t index) {
  Vec sums[Tokens][Vectors] = {};
  for (int64_t output = 0; output < a.outputs; ++output) {
    for (int v = 0; v < Vectors; ++v) {
      const Vec weight = io.load(weights[output] + c + v * kWidth);
      for (int t = 0; t < Tokens; ++t) {
        sums[t][v] = fma(splat(states[t][output]), weight, sums[t][v]);
      }
    }
  }
  const int64_t all = a.images * a.tokens;
  for (int t = 0; t < Tokens; ++t) {
    const int64_t token = (index + t) % a.tokens;
    for (int v = 0; v < Vectors; ++v) {
      const int64_t channel = first + c + v * kWidth;
      const Vec sum = sums[t][v] + io.load(at<T>(a.embed_bias, channel)) +
                      io.load(at<T>(a.positions, token * a.channels + channel));
      T* to = static_cast<T*>(a.embedded) + (index + t) * a.channels + channel;
      io.store(to, sum);
      if (a.guided) io.store(to + all * a.channels, sum);
    }
  }
}

template <int Tokens, class T, class S>
void embed_tokens(const FlowBoundary& a, const float (*weights)[kMaxBand], int64_t first,
                  int64_t channels, int64_t index) {
  constexpr int vectors = 4;
  float states[Tokens][kRoom];
  for (int t = 0; t < Tokens; ++t) {  // as the next step reads them
    const S* state = at<S>(a.new_state, (index + t) * a.outputs);
    for_each(a.outputs, [&](auto io, int64_t output) {
      Full{}.store(states[t] + output, io.load(state + output));
    });
  }
  int64_t c = 0;
  for (; c + vectors * kWidth <= channels; c += vectors * kWidth) {
    embed_tile<Tokens, vectors, T>(a, Full{}, weights, states, first, c, index);
  }
  for (; c < channels; c += kWidth) {
    with_access(channels - c, [&](auto io) {
      embed_tile<Tokens, 1, T>(a, io, weights, states, first, c, index);
    });
  }
}

template <class T, class S>
void embed(const FlowBoundary& a, int64_t begin, int64_t end) {
  const int64_t all = a.images * a.tokens, band = band_of(all);
  const int64_t bands = (a.channels + band - 1) / band;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % bands * band, from = unit / bands * kBandTokens;
    const int64_t channels = a.channels - first < band ? a.channels - first : band;
    const int64_t until = all - from < kBandTokens ? all : from + kBandTokens;
    float weights[kMaxOutputs][kMaxBand];
    turn_weights<T>(a, first, channels, weights);
    int64_t index = from;
    for (; index + 2 <= until; index += 2) {
      embed_tokens<2, T, S>(a, weights, first, channels, index);
    }
    if (index < until) embed_tokens<1, T, S>(a, weights, first, channels, index);
  }
}

}  // namespace

const BoundaryKernels boundary_kernels = {
    {{new_states<float, float>, new_states<float, float>},
     {new_states<BFloat16, BFloat16>, new_states<BFloat16, float>},
     {new_states<Float16, Float16>, new_states<Float16, float>}},
    {{embed<float, float>, embed<float, float>},
     {embed<BFloat16, BFloat16>, embed<BFloat16, float>},
     {embed<Float16, Float16>, embed<Float16, float>}},
};

}  // namespace ECAR_ISA
}  // namespace ecar
