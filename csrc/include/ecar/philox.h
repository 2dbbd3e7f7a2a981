#pragma once

// The noise of an image: Philox4x32-10 (Salmon et al. 2011) and Box-Muller normals.
// The oracle is ecar_kernels/flow_step/reference.py.

#include <cmath>
#include <cstdint>

#include "ecar/macros.h"

namespace ecar {

struct Words4 {
  std::uint32_t at[4];
};

struct Normals4 {
  float at[4];
};

// Four random words from a counter and a key.
ECAR_HOST_DEVICE Words4 philox4x32_10(Words4 counter, std::uint32_t key0, std::uint32_t key1) {
  std::uint32_t* c = counter.at;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * c[2];
    const std::uint32_t high0 = static_cast<std::uint32_t>(product0 >> 32);
    const std::uint32_t high1 = static_cast<std::uint32_t>(product1 >> 32);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = static_cast<std::uint32_t>(product1);
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9;  // golden ratio
    key1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return counter;
}

// A word as a number in (0, 1]: rounded to the nearest float (ties to even), 0.5 added in float;
// 2^-32 is an exact factor. The same bits everywhere. 1 for the last 128 words, never 0.
ECAR_HOST_DEVICE float uniform(std::uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
}

// Four standard normals from four words, in float; each function good to a few ulp, so build
// without -ffast-math and --use_fast_math.
ECAR_HOST_DEVICE Normals4 normals(Words4 words) {
  Normals4 z;
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = sqrtf(-2.0f * logf(uniform(words.at[pair])));
#if defined(__CUDA_ARCH__)
    // Exact in its argument's reduction, so without the slow path of sinf, which needs a stack.
    float sine, cosine;
    sincospif(2.0f * uniform(words.at[pair + 1]), &sine, &cosine);
    z.at[pair] = radius * cosine;
    z.at[pair + 1] = radius * sine;
#else
    const float angle = 6.2831853071795865f * uniform(words.at[pair + 1]);
    z.at[pair] = radius * cosf(angle);
    z.at[pair + 1] = radius * sinf(angle);
#endif
  }
  return z;
}

// The normals of one call of an image's stream, stages counted from 1.
// Stage 1: elements 4 call .. 4 call + 3 of [C, h, w]. Later stages: the first three are the
// details d1, d2, d3 of low-resolution element `call`.
ECAR_HOST_DEVICE Normals4 image_normals(std::int64_t seed, std::uint32_t stage,
                                        std::uint32_t call) {
  const std::uint64_t key = static_cast<std::uint64_t>(seed);
  return normals(philox4x32_10({{call, stage, 0, 0}}, static_cast<std::uint32_t>(key),
                               static_cast<std::uint32_t>(key >> 32)));
}

}  // namespace ecar
