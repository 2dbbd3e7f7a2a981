// Philox's published known answers, normals to 40-digit arithmetic, and the Haar block.

#include <cmath>
#include <cstdio>

#include "ecar/haar.h"
#include "ecar/philox.h"

namespace {

int failures = 0;

void check_words(ecar::Words4 counter, std::uint32_t key0, std::uint32_t key1,
                 ecar::Words4 expected) {
  const ecar::Words4 words = ecar::philox4x32_10(counter, key0, key1);
  for (int i = 0; i < 4; ++i) {
    if (words.at[i] != expected.at[i]) {
      std::printf("philox4x32_10 word %d: expected %08x, got %08x\n", i, expected.at[i],
                  words.at[i]);
      ++failures;
    }
  }
}

void check_close(const char* what, int index, float value, double expected, double tolerance) {
  if (!(std::fabs(value - expected) <= tolerance)) {
    std::printf("%s %d: expected %.9g, got %.9g\n", what, index, expected, value);
    ++failures;
  }
}

// An angle near 2 pi is rounded by 2.4e-7, which a radius of 6.8 at most multiplies.
void check_normals(ecar::Words4 words, const double (&expected)[4]) {
  const ecar::Normals4 z = ecar::normals(words);
  for (int i = 0; i < 4; ++i) check_close("normals", i, z.at[i], expected[i], 2e-6);
}

}  // namespace

int main() {
  // Random123, kat_vectors.
  check_words({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_words({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, 0xffffffff, 0xffffffff,
              {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_words({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
              {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});

  check_normals({{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                {0.991137821439, -0.924662409166, -0.617608955962, -0.482068642189});
  check_normals({{0, 0xffffffff, 0xffffffff, 0x7fffffff}}, {6.763705635, 0, 0, 0});
  check_normals({{0x01000001, 0x40000000, 0x80000001, 0xc0000000}},
                {0, 3.33021844463, 0, -1.17741002252});

  const ecar::Block2x2 block = ecar::haar_high_pass(1, 10, 100);
  const double expected[2][2] = {{55.5, -54.5}, {-45.5, 44.5}};
  for (int i = 0; i < 4; ++i) {
    check_close("haar_high_pass", i, block.at[i / 2][i % 2], expected[i / 2][i % 2], 0);
  }

  if (failures == 0) std::printf("known answers hold\n");
  return failures == 0 ? 0 : 1;
}
