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

// A row that is normalised and modulated as it is read.
template <class T>
struct Modulated {
  const T *x, *shift, *scale, *step_shift, *step_scale;
  Moments moments;

  void open(const FlowBoundary& a, int64_t image, int64_t token) {
    x = row<T>(a.x, image, token);
    shift = row<T>(a.shift, image, token);
    scale = row<T>(a.scale, image, token);
    step_shift = row<T>(a.step_shift, image, token);
    step_scale = row<T>(a.step_scale, image, token);
    const auto value = [&](auto io, int64_t c) { return io.load(x + c); };
    moments = moments_of(a.channels, sum_of(a.channels, value), a.eps, value);
  }

  // Channels [first, first + count). Those of the row that is `ahead` tokens away come meanwhile.
  void write(const FlowBoundary& a, int64_t first, int64_t count, int64_t ahead, float* to) const {
    for_each(count, [&](auto io, int64_t at) {
      const int64_t c = first + at;
      __builtin_prefetch(x + ahead * a.x.token_stride + c);
      __builtin_prefetch(shift + ahead * a.shift.token_stride + c);
      __builtin_prefetch(scale + ahead * a.scale.token_stride + c);
      const Vec normal = moments.normal(io.load(x + c));
      io.store(to + at, fma(normal, 1.0f + combine(io, scale, step_scale, c),
                            combine(io, shift, step_shift, c)));
    });
  }
};

constexpr int kRows = 4;         // that are multiplied at a time, at most
constexpr int64_t kPiece = 512;  // of their channels: 8 KiB, near

// `K` outputs' sums over a piece of the channels of `R` modulated rows.
template <int R, int K, class T>
inline void products(const FlowBoundary& a, const float (*y)[kPiece], int64_t first, int64_t count,
                     int64_t output, Vec (*sums)[kMaxOutputs]) {
  const T* weight = at<T>(a.weight, output * a.channels + first);
  Vec own[R][K];
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) own[r][k] = first == 0 ? Vec{} : sums[r][output + k];
  }
  for_each(count, [&](auto io, int64_t c) {
    Vec weights[K];
    for (int k = 0; k < K; ++k) weights[k] = io.load(weight + k * a.channels + c);
    for (int r = 0; r < R; ++r) {
      const Vec value = io.load(y[r] + c);
      for (int k = 0; k < K; ++k) own[r][k] = fma(value, weights[k], own[r][k]);
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) sums[r][output + k] = own[r][k];
  }
}

// The velocities of `R` rows.
template <int R, class T>
void velocities_of(const FlowBoundary& a, const Modulated<T>* rows, int64_t ahead,
                   float (*to)[kRoom]) {
  Vec sums[R][kMaxOutputs];
  float y[R][kPiece];
  for (int64_t first = 0; first < a.channels; first += kPiece) {
    const int64_t count = a.channels - first < kPiece ? a.channels - first : kPiece;
    for (int r = 0; r < R; ++r) rows[r].write(a, first, count, ahead, y[r]);
    int64_t output = 0;
    for (; output + 4 <= a.outputs; output += 4) {
      products<R, 4, T>(a, y, first, count, output, sums);
    }
    for (; output < a.outputs; ++output) products<R, 1, T>(a, y, first, count, output, sums);
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t output = 0; output < a.outputs; ++output) {
      const Vec sum = a.channels == 0 ? Vec{} : sums[r][output];
      to[r][output] = horizontal_sum(sum) + Partial{1}.load(at<T>(a.bias, output))[0];
    }
  }
}

// S: the state's type.
template <class T, class S>
void new_state(const FlowBoundary& a, int64_t image, int64_t token, const float* conditional,
               const float* unconditional) {
  const int64_t index = image * a.tokens + token;
  const S* old = at<S>(a.state, image * a.state_image_stride + token * a.state_token_stride);
  S* to = static_cast<S*>(a.new_state) + index * a.outputs;
  const S* previous =
      a.previous == nullptr
          ? nullptr
          : at<S>(a.previous, image * a.previous_image_stride + token * a.previous_token_stride);
  S* kept = a.kept == nullptr ? nullptr : static_cast<S*>(a.kept) + index * a.outputs;
  for_each(a.outputs, [&](auto io, int64_t output) {
    Vec v = io.load(conditional + output);
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

template <class T, class S>
void new_states(const FlowBoundary& a, int64_t begin, int64_t end) {
  const int halves = a.guided ? 2 : 1;
  for (int64_t index = begin; index < end;) {
    const int tokens = end - index < kRows / halves ? 1 : kRows / halves;
    Modulated<T> rows[kRows];
    float velocities[kRows][kRoom];
    for (int r = 0; r < halves * tokens; ++r) {  // the unconditional ones last
      const int64_t at = index + r % tokens;
      rows[r].open(a, at / a.tokens + r / tokens * a.images, at % a.tokens);
    }
    if (halves * tokens == 4) {
      velocities_of<4>(a, rows, tokens, velocities);
    } else if (halves * tokens == 2) {
      velocities_of<2>(a, rows, tokens, velocities);
    } else {
      velocities_of<1>(a, rows, tokens, velocities);
    }
    for (int t = 0; t < tokens; ++t, ++index) {
      new_state<T, S>(a, index / a.tokens, index % a.tokens, velocities[t],
                      velocities[a.guided ? tokens + t : t]);
    }
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

// Weights of a band, each output's channels `stride` after those of the output before.
template <class W>
struct Turned {
  const W* data;
  int64_t stride;
};

// `Tokens` tokens from `index` on by `Vectors` whole vectors, or less than one, of a band.
template <int Tokens, int Vectors, class T, class W, class Access>
inline void embed_tile(const FlowBoundary& a, Access io, const Turned<W>& weights,
                       const float (*states)[kRoom], int64_t first, int64_t c, int64_t index) {
  Vec sums[Tokens][Vectors] = {};
  for (int64_t output = 0; output < a.outputs; ++output) {
    for (int v = 0; v < Vectors; ++v) {
      const Vec weight = io.load(weights.data + output * weights.stride + c + v * kWidth);
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

template <int Tokens, class T, class S, class W>
void embed_tokens(const FlowBoundary& a, const Turned<W>& weights, int64_t first, int64_t channels,
                  int64_t index) {
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

template <class T, class S, class W>
void embed_band(const FlowBoundary& a, const Turned<W>& weights, int64_t first, int64_t channels,
                int64_t from, int64_t until) {
  int64_t index = from;
  for (; index + 4 <= until; index += 4) {
    embed_tokens<4, T, S>(a, weights, first, channels, index);
  }
  for (; index < until; ++index) embed_tokens<1, T, S>(a, weights, first, channels, index);
}

template <class T, class S>
void embed(const FlowBoundary& a, int64_t begin, int64_t end) {
  const int64_t all = a.images * a.tokens, band = band_of(all);
  const int64_t bands = (a.channels + band - 1) / band;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % bands * band, from = unit / bands * kBandTokens;
    const int64_t channels = a.channels - first < band ? a.channels - first : band;
    const int64_t until = all - from < kBandTokens ? all : from + kBandTokens;
    if (a.embed_turned) {
      const Turned<T> weights{at<T>(a.embed_weight, first), a.channels};
      embed_band<T, S>(a, weights, first, channels, from, until);
    } else {
      float turned[kMaxOutputs][kMaxBand];
      turn_weights<T>(a, first, channels, turned);
      embed_band<T, S>(a, Turned<float>{turned[0], kMaxBand}, first, channels, from, until);
    }
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
