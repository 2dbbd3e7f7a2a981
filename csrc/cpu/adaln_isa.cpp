#include "cpu/adaln.h"

#include "cpu/vec_rows.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

template <class T>
T* output(void* data, std::int64_t row, std::int64_t channels) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + row * channels;
}

// Requests what a later loop reads, from a loop that reads little. Memory would be idle while the
// statistics are summed, and hardware does not foresee the next row of a strided modulation.
template <class T>
inline void fetch(const T* row, std::int64_t at) {
  __builtin_prefetch(row + at);
}

template <class T, bool kGated, bool kNorm, class Whole>
void forward_rows(const AdalnForward& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = a.channels;
  for (std::int64_t index = begin; index < end; ++index) {
    const std::int64_t image = index / a.tokens, token = index % a.tokens;
    const T* x = row<T>(a.x, image, token);
    float total = 0;
    if constexpr (kGated) {
      const T* branch = row<T>(a.branch, image, token);
      const T* gate = row<T>(a.gate, image, token);
      const T* step_gate = row<T>(a.step_gate, image, 0);
      T* new_x = output<T>(a.new_x, index, channels);
      const auto residual = [&](auto io, std::int64_t at) {
        const Vec value = fma(combine(io, gate, step_gate, at), io.load(branch + at),
                              io.load(x + at));
        io.store(new_x + at, value);
        return rounded<T>(value);
      };
      if constexpr (kNorm) {
        total = sum_of(channels, residual);
      } else {
        for_each<Whole>(channels, residual);
      }
      x = new_x;
    } else {
      total = sum_of(channels, [&](auto io, std::int64_t at) { return io.load(x + at); });
    }
    if constexpr (kNorm) {
      const T* shift = row<T>(a.shift, image, token);
      const T* step_shift = row<T>(a.step_shift, image, 0);
      const T* scale = row<T>(a.scale, image, token);
      const T* step_scale = row<T>(a.step_scale, image, 0);
      T* y = output<T>(a.y, index, channels);
      const Moments moments = moments_of(channels, total, a.eps, [&](auto io, std::int64_t at) {
        fetch(shift, at);
        fetch(scale, at);
        return io.load(x + at);
      });
      const std::int64_t next = index + 1 < end ? index + 1 : index;
      const std::int64_t next_image = next / a.tokens, next_token = next % a.tokens;
      const T* next_x = row<T>(a.x, next_image, next_token);
      const T* next_branch = row<T>(a.branch, next_image, next_token);
      const T* next_gate = row<T>(a.gate, next_image, next_token);
      for_each<Whole>(channels, [&, moments](auto io, std::int64_t at) {
        fetch(next_x, at);
        if constexpr (kGated) {
          fetch(next_branch, at);
          fetch(next_gate, at);
        }
        io.store(y + at, fma(moments.normal(io.load(x + at)),
                             1.0f + combine(io, scale, step_scale, at),
                             combine(io, shift, step_shift, at)));
      });
    }
  }
}

template <class T, bool kGated, bool kNorm>
void forward(const AdalnForward& a, std::int64_t begin, std::int64_t end) {
  if (a.stream) {
    forward_rows<T, kGated, kNorm, Stream>(a, begin, end);
    fence();
  } else {
    forward_rows<T, kGated, kNorm, Full>(a, begin, end);
  }
}

// In the caches, whatever becomes of the outputs.
inline void accumulate(Full, float* sums, std::int64_t at, Vec value) {
  Full{}.store(sums + at, Full{}.load(sums + at) + value);
}
inline void accumulate(Partial io, float* sums, std::int64_t at, Vec value) {
  io.store(sums + at, io.load(sums + at) + value);
}

template <class T, bool kGated, bool kNorm, class Whole>
void backward_token(const AdalnBackward& a, std::int64_t image, std::int64_t token, float* sums) {
  const std::int64_t channels = a.channels, index = image * a.tokens + token;
  const std::int64_t next_token = token + 1 < a.tokens ? token + 1 : token;
  const T* next_x = row<T>(a.x, image, next_token);
  const T* next_grad_y = row<T>(a.grad_y, image, next_token);
  const T* next_scale = row<T>(a.scale, image, next_token);
  const T* grad_new_x = row<T>(a.grad_new_x, image, token);
  const T* grad_y = row<T>(a.grad_y, image, token);
  const T* x = row<T>(a.x, image, token);
  const T* scale = row<T>(a.scale, image, token);
  const T* step_scale = row<T>(a.step_scale, image, 0);
  const T* branch = row<T>(a.branch, image, token);
  const T* gate = row<T>(a.gate, image, token);
  const T* step_gate = row<T>(a.step_gate, image, 0);
  T* grad_x = output<T>(a.grad_x, index, channels);
  T* grad_branch = output<T>(a.grad_branch, index, channels);
  T* grad_gate = output<T>(a.grad_gate, index, channels);
  T* grad_scale = output<T>(a.grad_scale, index, channels);
  float* gate_sums = kGated ? sums : nullptr;
  float* shift_sums = kGated && sums != nullptr ? sums + channels : sums;
  float* scale_sums = sums == nullptr ? nullptr : shift_sums + channels;

  // dx = deviation (g - mean(g) - n mean(g n)), with g = dy (1 + scale) and n = LN(x).
  Moments moments;
  Vec mean_grad{}, mean_grad_normal{};
  const auto modulated = [&](auto io, std::int64_t at) {
    return io.load(grad_y + at) * (1.0f + combine(io, scale, step_scale, at));
  };
  if constexpr (kNorm) {
    const auto [x_sum, grad_sum] =
        sums_of<2>(channels, [&](auto io, std::int64_t at, Sums<2>& sums) {
          sums.of[0] += io.load(x + at);
          sums.of[1] += modulated(io, at);
        }).of;
    const Vec pivot = splat(x_sum / channels);
    const auto [distances, squares, products] =
        sums_of<3>(channels, [&](auto io, std::int64_t at, Sums<3>& sums) {
          if constexpr (kGated) {
            fetch(grad_new_x, at);
            fetch(branch, at);
            fetch(gate, at);
          } else {
            fetch(next_x, at);
          }
          const Vec distance = io.keep(io.load(x + at) - pivot);
          sums.of[0] += distance;
          sums.of[1] = fma(distance, distance, sums.of[1]);
          sums.of[2] = fma(distance, modulated(io, at), sums.of[2]);
        }).of;
    moments = moments_of(channels, pivot, distances, squares, a.eps);
    mean_grad = splat(grad_sum / channels);
    mean_grad_normal = fma(splat(products / channels), moments.inverse_deviation,
                           mean_grad * moments.rest);
  }
  for_each<Whole>(channels, [&](auto io, std::int64_t at) {
    Vec grad = grad_new_x == nullptr ? Vec{} : io.load(grad_new_x + at);
    if constexpr (kNorm) {
      if constexpr (kGated) fetch(next_x, at);
      fetch(next_grad_y, at);
      fetch(next_scale, at);
      const Vec normal = moments.normal(io.load(x + at)), dy = io.load(grad_y + at);
      grad = fma(moments.inverse_deviation,
                 fma(normal, -mean_grad_normal, modulated(io, at) - mean_grad), grad);
      io.store(grad_x + at, grad);
      if (grad_scale != nullptr) io.store(grad_scale + at, dy * normal);
      if (sums != nullptr) {
        accumulate(io, shift_sums, at, dy);
        accumulate(io, scale_sums, at, dy * normal);
      }
    }
    if constexpr (kGated) {
      const Vec gate_grad = grad * io.load(branch + at);
      io.store(grad_branch + at, grad * combine(io, gate, step_gate, at));
      if (grad_gate != nullptr) io.store(grad_gate + at, gate_grad);
      if (sums != nullptr) accumulate(io, gate_sums, at, gate_grad);
    }
  });
}

template <class T, bool kGated, bool kNorm, class Whole>
void backward_blocks(const AdalnBackward& a, std::int64_t begin, std::int64_t end) {
  constexpr int kSlots = (kGated ? 1 : 0) + (kNorm ? 2 : 0);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t image = unit / a.blocks, first = unit % a.blocks * a.block;
    const std::int64_t last = first + a.block < a.tokens ? first + a.block : a.tokens;
    float* sums = nullptr;
    if (a.sums != nullptr) {
      const std::int64_t count = kSlots * a.channels;
      sums = a.sums + unit * count;
      for_each(count, [&](auto io, std::int64_t at) { io.store(sums + at, Vec{}); });
    }
    for (std::int64_t token = first; token < last; ++token) {
      backward_token<T, kGated, kNorm, Whole>(a, image, token, sums);
    }
  }
}

template <class T, bool kGated, bool kNorm>
void backward(const AdalnBackward& a, std::int64_t begin, std::int64_t end) {
  if (a.stream) {
    backward_blocks<T, kGated, kNorm, Stream>(a, begin, end);
    fence();
  } else {
    backward_blocks<T, kGated, kNorm, Full>(a, begin, end);
  }
}

// In double: there may be many blocks, and they are few beside the tensors.
template <class T>
void sums(const AdalnSums& a, std::int64_t begin, std::int64_t end) {
  constexpr int kColumns = 4 * kWidth;
  const std::int64_t width = a.slots * a.channels;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t slot = at / a.channels, column = at % a.channels;
    std::int64_t count = a.channels - column;
    if (count > end - at) count = end - at;
    if (count > kColumns) count = kColumns;
    T* out = static_cast<T*>(a.out) + slot * (a.images + 1) * a.channels + column;
    const auto write = [&](const double* values, std::int64_t image) {
      float narrow[kColumns];
      for (int i = 0; i < kColumns; ++i) narrow[i] = static_cast<float>(values[i]);
      T* to = out + image * a.channels;
      for_each(count, [&](auto io, std::int64_t i) { io.store(to + i, Full{}.load(narrow + i)); });
    };
    double total[kColumns] = {};
    for (std::int64_t image = 0; image < a.images; ++image) {
      double rows[kColumns] = {};
      for (std::int64_t block = 0; block < a.blocks; ++block) {
        const float* from = a.sums + (image * a.blocks + block) * width + at;
        for (int i = 0; i < count; ++i) rows[i] += from[i];
      }
      write(rows, image);
      for (int i = 0; i < count; ++i) total[i] += rows[i];
    }
    write(total, a.images);
    at += count;
  }
}

}  // namespace

const AdalnKernels adaln_kernels = {
    {forward<float, false, true>, forward<BFloat16, false, true>, forward<Float16, false, true>},
    {forward<float, true, false>, forward<BFloat16, true, false>, forward<Float16, true, false>},
    {forward<float, true, true>, forward<BFloat16, true, true>, forward<Float16, true, true>},
    {backward<float, false, true>, backward<BFloat16, false, true>,
     backward<Float16, false, true>},
    {backward<float, true, false>, backward<BFloat16, true, false>,
     backward<Float16, true, false>},
    {backward<float, true, true>, backward<BFloat16, true, true>, backward<Float16, true, true>},
    {sums<float>, sums<BFloat16>, sums<Float16>},
};

}  // namespace ECAR_ISA
}  // namespace ecar
