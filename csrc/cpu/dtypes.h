#pragma once

#include <cstdint>

namespace ecar {

// The storage of the 16-bit types; arithmetic is in float.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Order of the entries in every table of kernels.
enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDtypes = 3 };

}  // namespace ecar
