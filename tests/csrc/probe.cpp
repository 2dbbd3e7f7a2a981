// The shared headers behind a C interface, for test_headers.py.

#include "ecar/haar.h"
#include "ecar/philox.h"

extern "C" {

void philox(const std::uint32_t* counters, const std::uint32_t* keys, std::uint32_t* words,
            std::int64_t calls) {
  for (std::int64_t i = 0; i < calls; ++i) {
    const std::uint32_t* c = counters + 4 * i;
    const ecar::Words4 w =
        ecar::philox4x32_10({{c[0], c[1], c[2], c[3]}}, keys[2 * i], keys[2 * i + 1]);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = w.at[j];
  }
}

void uniforms(const std::uint32_t* words, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = ecar::uniform(words[i]);
}

void image_normals(std::int64_t seed, std::uint32_t stage, float* out, std::int64_t calls) {
  for (std::int64_t i = 0; i < calls; ++i) {
    const ecar::Normals4 z = ecar::image_normals(seed, stage, static_cast<std::uint32_t>(i));
    for (int j = 0; j < 4; ++j) out[4 * i + j] = z.at[j];
  }
}

void haar(const float* details, float* blocks, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float* d = details + 3 * i;
    const ecar::Block2x2 block = ecar::haar_high_pass(d[0], d[1], d[2]);
    for (int j = 0; j < 4; ++j) blocks[4 * i + j] = block.at[j / 2][j % 2];
  }
}

}  // extern "C"
