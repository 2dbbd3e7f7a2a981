#pragma once

// Rows of tokens and of their modulations, for *_isa.cpp files.

#include "cpu/rows.h"
#include "cpu/vec.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

// The row of one token; null where the tensor is absent.
template <class T>
inline const T* row(const Rows& rows, std::int64_t image, std::int64_t token) {
  const T* data = static_cast<const T*>(rows.data);
  return data == nullptr ? nullptr
                         : data + image * rows.image_stride + token * rows.token_stride;
}

// A modulation's spatial and step part at one offset.
template <class T, class Access>
inline Vec combine(Access io, const T* spatial, const T* step, std::int64_t at) {
  const Vec part = io.load(spatial + at);
  return step == nullptr ? part : part + io.load(step + at);
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
