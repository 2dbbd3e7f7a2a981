#pragma once

#include <cstdint>

namespace ecar {

// Rows of C contiguous elements at data + image * batch + token * token_stride; strides in
// elements, 0 where broadcast. data is null for a step's part that is absent.
struct Rows {
  const void* data = nullptr;
  std::int64_t image_stride = 0;
  std::int64_t token_stride = 0;
};

}  // namespace ecar
