// What a CPU multiplies by vpdpbusd, of eight bits, next to vdpbf16ps, of sixteen: multiply-adds a
// second of the fused products' inner loop on one thread, the two in turns. A weight is packed into
// panels of 48 outputs; 8 rows at a time meet one. Four factors of eight bits are a word, two of
// sixteen, so the loops differ in that instruction and in how many words a row has.
// Prints a line for each size of weight: its elements, the two rates.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

constexpr int kRows = 8, kVectors = 3, kDepth = 768, kRounds = 15;

struct Sixteen {
  static constexpr int kPerWord = 2;
  static __m512i multiply_add(__m512i a, __m512i b, __m512i sum) {
    return (__m512i)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
struct Eight {
  static constexpr int kPerWord = 4;
  static __m512i multiply_add(__m512i a, __m512i b, __m512i sum) {
    return _mm512_dpbusd_epi32(sum, a, b);
  }
};

// `blocks` of 8 rows by a weight of `panels`.
template <class Format>
__attribute__((noinline)) void multiply(const int* rows, int blocks, const __m512i* weight,
                                        int panels, __m512i* to) {
  constexpr int steps = kDepth / Format::kPerWord;
  for (int panel = 0; panel < panels; ++panel, weight += steps * kVectors) {
    for (int block = 0; block < blocks; ++block) {
      __m512i sums[kRows][kVectors] = {};
      const int* a = rows + block * steps * kRows;
      for (int k = 0; k < steps; ++k, a += kRows) {
        const __m512i* b = weight + k * kVectors;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i x = _mm512_set1_epi32(a[r]);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            sums[r][v] = Format::multiply_add(x, b[v], sums[r][v]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) to[r * kVectors + v] = sums[r][v];
      }
    }
  }
}

template <class Format>
double rate(const int* rows, int blocks, const __m512i* weight, int panels, __m512i* to) {
  const double adds = 16.0 * kVectors * kDepth * kRows * blocks * panels;
  const int calls = std::max(1, static_cast<int>(2e9 / adds));
  const std::clock_t begin = std::clock();  // of this process, which may wait for others
  for (int i = 0; i < calls; ++i) multiply<Format>(rows, blocks, weight, panels, to);
  return adds * calls * CLOCKS_PER_SEC / (std::clock() - begin);
}

int main() {
  constexpr int most = 400;  // panels: 14.7 million weights, as a flow head of E-CAR-S
  const std::size_t vectors = static_cast<std::size_t>(most) * kVectors * kDepth / 2;
  __m512i* weight = static_cast<__m512i*>(std::aligned_alloc(64, vectors * sizeof(__m512i)));
  std::vector<int> rows(256 * kDepth / 2, 0x3c3c3c3c);  // small numbers in either format
  std::fill_n(reinterpret_cast<int*>(weight), 16 * vectors, 0x3c3c3c3c);
  alignas(64) __m512i to[kRows * kVectors];
  for (const int panels : {1, most}) {
    for (const int tokens : {16, 256}) {
      std::vector<double> sixteen, eight;
      for (int round = 0; round < kRounds; ++round) {
        sixteen.push_back(rate<Sixteen>(rows.data(), tokens / kRows, weight, panels, to));
        eight.push_back(rate<Eight>(rows.data(), tokens / kRows, weight, panels, to));
      }
      std::sort(sixteen.begin(), sixteen.end());
      std::sort(eight.begin(), eight.end());
      std::printf("%d %d %.4g %.4g\n", 16 * kVectors * kDepth * panels, tokens,
                  sixteen[kRounds / 2], eight[kRounds / 2]);
    }
  }
  std::free(weight);
}
