#pragma once

// What one thread of the elementwise kernels does: it takes one unit, a vector of 16 bytes of a
// row or what is left of the row.

#include "cuda/elements.cuh"
#include "cuda/flow_step.h"
#include "ecar/haar.h"
#include "ecar/philox.h"

namespace ecar {
namespace cuda {

ECAR_HOST_DEVICE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

ECAR_HOST_DEVICE bool aligned(const void* data) {
  return (reinterpret_cast<std::uintptr_t>(data) & 15) == 0;
}

// Whether every row of `inner` elements begins on 16 bytes.
template <class T>
ECAR_HOST_DEVICE bool rows_aligned(const void* data, const std::int64_t* strides,
                                   const std::int64_t* sizes, int dims) {
  bool fine = aligned(data);
  for (int d = 0; d < dims; ++d) fine = fine && (sizes[d] <= 1 || strides[d] % kVector<T> == 0);
  return fine;
}

ECAR_HOST_DEVICE std::int64_t rows_of(const EulerStep& a) {
  return a.sizes[0] * a.sizes[1] * a.sizes[2];
}

template <class T>
ECAR_HOST_DEVICE std::int64_t units(const EulerStep& a) {
  return rows_of(a) * ceil_div(a.inner, kVector<T>);
}

template <class T>
ECAR_HOST_DEVICE bool wide(const EulerStep& a) {
  return rows_aligned<T>(a.x, a.x_strides, a.sizes, 3) &&
         rows_aligned<T>(a.velocity, a.velocity_strides, a.sizes, 3) &&
         rows_aligned<T>(a.previous, a.previous_strides, a.sizes, 3) &&
         aligned(a.unconditional) && aligned(a.out) && aligned(a.kept) &&
         (rows_of(a) <= 1 || a.inner % kVector<T> == 0);
}

template <class T>
ECAR_HOST_DEVICE bool wide(const UpsampleRenoise& a) {
  const std::int64_t sizes[4] = {a.step.sizes[0], a.step.sizes[1], 3, a.step.sizes[2]};
  return wide<T>(a.step) && aligned(a.start) && a.step.inner % kVector<T> == 0 &&
         (a.details == nullptr || rows_aligned<T>(a.details, a.details_strides, sizes, 4));
}

template <class T>
ECAR_HOST_DEVICE std::int64_t units(const InitialNoise& a) {
  return a.images * ceil_div(a.count, kVector<T>);
}

template <class T>
ECAR_HOST_DEVICE bool wide(const InitialNoise& a) {
  return aligned(a.out) && (a.images <= 1 || a.count % kVector<T> == 0);
}

struct Place {
  std::int64_t row, at;    // at: first element of the vector
  std::int64_t index[3];   // of the row
  std::int64_t x, velocity, previous;  // offsets
  int count;
};

// Divisions by sizes of 64 bits are slow on a GPU, and hardly ever needed.
template <class Index>
ECAR_DEVICE void take_apart(const EulerStep& a, std::int64_t unit, Index each, Place& p) {
  Index rest = static_cast<Index>(unit) / each;
  p.row = rest;
  p.at = static_cast<Index>(unit) % each;
  for (int d = 2; d >= 0; --d) {
    const Index size = static_cast<Index>(a.sizes[d]);
    p.index[d] = rest % size;
    rest /= size;
  }
}

template <class T>
ECAR_DEVICE Place place_of(const EulerStep& a, std::int64_t unit) {
  const std::int64_t each = ceil_div(a.inner, kVector<T>);
  Place p{};
  if (unit < each) {
    p.at = unit;
  } else if (unit <= 0xffffffffLL) {
    take_apart(a, unit, static_cast<std::uint32_t>(each), p);
  } else {
    take_apart(a, unit, static_cast<std::uint64_t>(each), p);
  }
  p.at *= kVector<T>;
  const std::int64_t left = a.inner - p.at;
  p.count = static_cast<int>(left < kVector<T> ? left : kVector<T>);
  for (int d = 0; d < 3; ++d) {
    p.x += p.index[d] * a.x_strides[d];
    p.velocity += p.index[d] * a.velocity_strides[d];
    p.previous += p.index[d] * a.previous_strides[d];
  }
  return p;
}

ECAR_DEVICE float value_of(const Number& number) {
  return number.on_device != nullptr ? *number.on_device : number.value;
}

// Stores x + dt v, or with a history x + dt (v + ratio (v - previous) / 2), and leaves it in
// `value`.
template <class T>
ECAR_DEVICE void step(const EulerStep& a, const Place& p, bool whole,
                           float (&value)[kVector<T>]) {
  float velocity[kVector<T>];
  load(static_cast<const T*>(a.x) + p.x + p.at, p.count, whole, value);
  load(static_cast<const T*>(a.velocity) + p.velocity + p.at, p.count, whole, velocity);
  if (a.unconditional != nullptr) {
    float unconditional[kVector<T>];
    load(static_cast<const T*>(a.unconditional) + p.velocity + p.at, p.count, whole,
         unconditional);
    const float scale = value_of(a.guidance);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      velocity[i] = unconditional[i] + scale * (velocity[i] - unconditional[i]);
    }
  }
  if (a.kept != nullptr) {
    store(static_cast<T*>(a.kept) + p.row * a.inner + p.at, p.count, whole, velocity);
  }
  if (a.previous != nullptr) {
    float previous[kVector<T>];
    load(static_cast<const T*>(a.previous) + p.previous + p.at, p.count, whole, previous);
    const float half_ratio = 0.5f * value_of(a.ratio);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      velocity[i] = velocity[i] + half_ratio * (velocity[i] - previous[i]);
    }
  }
  const float dt = value_of(a.dt);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) value[i] = value[i] + dt * velocity[i];
  store(static_cast<T*>(a.out) + p.row * a.inner + p.at, p.count, whole, value);
}

template <class T>
ECAR_DEVICE void euler_unit(const EulerStep& a, bool wide, std::int64_t unit) {
  const Place p = place_of<T>(a, unit);
  float value[kVector<T>];
  step<T>(a, p, wide && p.count == kVector<T>, value);
}

template <class T>
ECAR_DEVICE void upsample_renoise_unit(const UpsampleRenoise& a, bool wide,
                                            std::int64_t unit) {
  constexpr int kItems = kVector<T>;
  const Place p = place_of<T>(a.step, unit);
  const bool whole = wide && p.count == kItems;
  float value[kItems], d1[kItems], d2[kItems], d3[kItems];
  step<T>(a.step, p, whole, value);
  if (a.details != nullptr) {
    const T* details = static_cast<const T*>(a.details) + p.index[0] * a.details_strides[0] +
                       p.index[1] * a.details_strides[1] + p.index[2] * a.details_strides[3] +
                       p.at;
    load(details, p.count, whole, d1);
    load(details + a.details_strides[2], p.count, whole, d2);
    load(details + 2 * a.details_strides[2], p.count, whole, d3);
  } else {
    const std::int64_t seed = a.seeds[p.index[0] * a.seed_stride];
    const std::int64_t call =
        (p.index[1] * a.step.sizes[2] + p.index[2]) * a.step.inner + p.at;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Normals4 z = image_normals(seed, a.stage, static_cast<std::uint32_t>(call + i));
      d1[i] = z.at[0], d2[i] = z.at[1], d3[i] = z.at[2];
    }
  }
  const std::int64_t width = 2 * a.step.inner;
  T* to = static_cast<T*>(a.start) + 2 * p.row * width + 2 * p.at;
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    float pairs[2 * kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Block2x2 high = haar_high_pass(d1[i], d2[i], d3[i]);
      const float base = a.up_factor * value[i];
      pairs[2 * i] = base + a.noise_factor * high.at[line][0];
      pairs[2 * i + 1] = base + a.noise_factor * high.at[line][1];
    }
    const int count = 2 * p.count;
    store(to + line * width, count, whole, pairs);
    store(to + line * width + kItems, count - kItems, whole, pairs + kItems);
  }
}

// Element 4 i + k of an image is normal k of call i.
template <class T>
ECAR_DEVICE void initial_noise_unit(const InitialNoise& a, bool wide, std::int64_t unit) {
  constexpr int kItems = kVector<T>;
  const std::int64_t each = ceil_div(a.count, kItems);
  const std::int64_t image = unit / each, at = unit % each * kItems;
  const std::int64_t seed = a.seeds[image * a.seed_stride];
  const int count = static_cast<int>(a.count - at < kItems ? a.count - at : kItems);
  float value[kItems];
#pragma unroll
  for (int call = 0; call < kItems / 4; ++call) {
    const Normals4 z = image_normals(seed, 1, static_cast<std::uint32_t>(at / 4 + call));
#pragma unroll
    for (int k = 0; k < 4; ++k) value[4 * call + k] = z.at[k];
  }
  store(static_cast<T*>(a.out) + image * a.count + at, count, wide && count == kItems, value);
}

}  // namespace cuda
}  // namespace ecar
