#include "cpu/stage_attention.h"

#include <cstdlib>
#include <new>

namespace ecar {
namespace stage_attention {
namespace {

struct Workspace {
  float* data = nullptr;
  std::int64_t size = 0;

  ~Workspace() { std::free(data); }
};

thread_local Workspace its;

}  // namespace

float* workspace(std::int64_t floats) {
  if (floats > its.size) {
    std::free(its.data);
    its = Workspace{};
    constexpr std::size_t line = 64;
    const std::size_t bytes = (floats * sizeof(float) + line - 1) / line * line;
    its.data = static_cast<float*>(std::aligned_alloc(line, bytes));
    if (its.data == nullptr) throw std::bad_alloc();
    its.size = floats;
  }
  return its.data;
}

void divide(std::int64_t first, std::int64_t count, std::int64_t keys, Block* blocks) {
  const std::int64_t number = blocks_of(count), units = ceil_div(count, kSpread);
  for (std::int64_t i = 0; i < number; ++i) {
    const std::int64_t begin = units * i / number * kSpread;
    const std::int64_t end = i + 1 == number ? count : units * (i + 1) / number * kSpread;
    blocks[i] = {first + begin, end - begin, keys};
  }
}

}  // namespace stage_attention
}  // namespace ecar
