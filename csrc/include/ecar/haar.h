#pragma once

// The Haar high-pass noise of a 2x2 block. The oracle is ecar_kernels/flow_step/reference.py.

#include "ecar/macros.h"

namespace ecar {

struct Block2x2 {
  float at[2][2];  // row, column
};

// h = n - up(down(n)) from three independent N(0, 1) details; covariance I - J/4.
ECAR_HOST_DEVICE Block2x2 haar_high_pass(float d1, float d2, float d3) {
  return {{{0.5f * (d1 + d2 + d3), 0.5f * (d1 - d2 - d3)},
           {0.5f * (-d1 + d2 - d3), 0.5f * (-d1 - d2 + d3)}}};
}

}  // namespace ecar
