#include "cpu/flow_step.h"

#include "cpu/vec_noise.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

// kHistory, here and below: there may be a velocity of the step before, or a place for this one's;
// an Euler step does not look for them.
template <class T>
struct StepRow {
  const T *x, *velocity, *unconditional, *previous;
  T *out, *kept;
  std::int64_t index[3];
};

template <bool kHistory, class T>
StepRow<T> step_row(const EulerStep& a, std::int64_t row) {
  StepRow<T> found;
  std::int64_t rest = row, x = 0, velocity = 0, previous = 0;
  for (int d = 2; d >= 0; --d) {
    found.index[d] = rest % a.sizes[d];
    rest /= a.sizes[d];
    x += found.index[d] * a.x_strides[d];
    velocity += found.index[d] * a.velocity_strides[d];
    if (kHistory) previous += found.index[d] * a.previous_strides[d];
  }
  const auto offset = [](auto* data, std::int64_t by) {
    return data == nullptr ? nullptr : data + by;
  };
  found.x = static_cast<const T*>(a.x) + x;
  found.velocity = static_cast<const T*>(a.velocity) + velocity;
  found.unconditional = offset(static_cast<const T*>(a.unconditional), velocity);
  found.out = static_cast<T*>(a.out) + row * a.inner;
  if (kHistory) {
    found.previous = offset(static_cast<const T*>(a.previous), previous);
    found.kept = offset(static_cast<T*>(a.kept), row * a.inner);
  }
  return found;
}

// Not fused: the same bits as the reference's.
template <bool kHistory, class T, class Access>
inline Vec stepped(Access io, const EulerStep& a, const StepRow<T>& row, std::int64_t at) {
  Vec velocity = io.load(row.velocity + at);
  if (row.unconditional != nullptr) {
    const Vec unconditional = io.load(row.unconditional + at);
    velocity = unconditional + a.guidance * (velocity - unconditional);
  }
  if (kHistory) {
    const Vec guided = velocity;
    if (row.previous != nullptr) {
      velocity = guided + a.half_ratio * (guided - io.load(row.previous + at));
    }
    if (row.kept != nullptr) io.store(row.kept + at, guided);
  }
  return io.load(row.x + at) + a.dt * velocity;
}

template <bool kHistory, class T, class Whole>
void euler_rows(const EulerStep& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = (a.inner + kEulerBlock - 1) / kEulerBlock;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const StepRow<T> row = step_row<kHistory, T>(a, unit / blocks);
    const std::int64_t first = unit % blocks * kEulerBlock;
    const std::int64_t rest = a.inner - first;
    for_each<Whole>(rest < kEulerBlock ? rest : kEulerBlock, [&](auto io, std::int64_t at) {
      io.store(row.out + first + at, stepped<kHistory>(io, a, row, first + at));
    });
  }
}

template <bool kHistory, class T>
void euler_step(const EulerStep& a, std::int64_t begin, std::int64_t end) {
  if (a.stream) {
    euler_rows<kHistory, T, Stream>(a, begin, end);
    fence();
  } else {
    euler_rows<kHistory, T, Full>(a, begin, end);
  }
}

// Two vectors of neighbours in turn: 2 kWidth elements, of which 2 per element of `io` exist.
template <class T>
inline void store_pairs(Full io, T* to, Vec even, Vec odd) {
  Vec first, second;
  interleave(even, odd, first, second);
  io.store(to, first);
  io.store(to + kWidth, second);
}

template <class T>
inline void store_pairs(Partial io, T* to, Vec even, Vec odd) {
  Vec first, second;
  interleave(even, odd, first, second);
  const int count = 2 * io.count;
  with_access(count, [&](auto part) { part.store(to, first); });
  if (count > kWidth) Partial{count - kWidth}.store(to + kWidth, second);
}

template <bool kHistory, class T>
void upsample_renoise(const UpsampleRenoise& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = a.step.inner, rows = a.step.sizes[2];
  const Vec up = splat(a.up_factor), half_noise = splat(0.5f * a.noise_factor);
  for (std::int64_t index = begin; index < end; ++index) {
    const StepRow<T> row = step_row<kHistory, T>(a.step, index);
    const auto [image, channel, line] = row.index;
    T* top = static_cast<T*>(a.start) + index * 4 * width;
    T* bottom = top + 2 * width;
    const std::int64_t first_call = (channel * rows + line) * width;
    const T* details = static_cast<const T*>(a.details);
    std::uint64_t seed = 0;
    if (details == nullptr) {
      seed = static_cast<std::uint64_t>(a.seeds[image * a.seed_stride]);
    } else {
      details += image * a.details_strides[0] + channel * a.details_strides[1] +
                 line * a.details_strides[3];
    }
    for_each(width, [&](auto io, std::int64_t at) {
      const Vec value = stepped<kHistory>(io, a.step, row, at);
      io.store(row.out + at, value);
      Vec d1, d2, d3;
      if (details == nullptr) {
        const VecNormals z =
            normals(philox(static_cast<std::uint32_t>(first_call + at), a.stage, seed));
        d1 = z.at[0], d2 = z.at[1], d3 = z.at[2];
      } else {
        d1 = io.load(details + at);
        d2 = io.load(details + a.details_strides[2] + at);
        d3 = io.load(details + 2 * a.details_strides[2] + at);
      }
      const Vec base = up * value;  // ecar/haar.h is the high-pass part of the block
      store_pairs(io, top + 2 * at, fma(half_noise, d1 + d2 + d3, base),
                  fma(half_noise, d1 - d2 - d3, base));
      store_pairs(io, bottom + 2 * at, fma(half_noise, -d1 + d2 - d3, base),
                  fma(half_noise, -d1 - d2 + d3, base));
    });
  }
}

template <class T>
void initial_noise(const InitialNoise& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t image = unit / a.blocks, first = unit % a.blocks * kNoiseBlock;
    const std::uint64_t seed = static_cast<std::uint64_t>(a.seeds[image * a.seed_stride]);
    const std::int64_t last = first + kNoiseBlock < a.count ? first + kNoiseBlock : a.count;
    T* out = static_cast<T*>(a.out) + image * a.count;
    // Element 4 i + k is normal k of call i.
    for (std::int64_t at = first; at < last; at += 4 * kWidth) {
      const VecNormals z = normals(philox(static_cast<std::uint32_t>(at / 4), 1, seed));
      Vec low02, high02, low13, high13, four[4];
      interleave(z.at[0], z.at[2], low02, high02);
      interleave(z.at[1], z.at[3], low13, high13);
      interleave(low02, low13, four[0], four[1]);
      interleave(high02, high13, four[2], four[3]);
      for (int part = 0; part < 4; ++part) {
        const std::int64_t place = at + part * kWidth;
        if (place + kWidth <= last) {
          Full{}.store(out + place, four[part]);
        } else if (place < last) {
          Partial{static_cast<int>(last - place)}.store(out + place, four[part]);
        }
      }
    }
  }
}

}  // namespace

const FlowStepKernels flow_step_kernels = {
    {{euler_step<false, float>, euler_step<true, float>},
     {euler_step<false, BFloat16>, euler_step<true, BFloat16>},
     {euler_step<false, Float16>, euler_step<true, Float16>}},
    {{upsample_renoise<false, float>, upsample_renoise<true, float>},
     {upsample_renoise<false, BFloat16>, upsample_renoise<true, BFloat16>},
     {upsample_renoise<false, Float16>, upsample_renoise<true, Float16>}},
    {initial_noise<float>, initial_noise<BFloat16>, initial_noise<Float16>},
};

}  // namespace ECAR_ISA
}  // namespace ecar
