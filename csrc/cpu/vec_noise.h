#pragma once

// The noise of an image, a vector of calls at a time: ecar/philox.h in vectors. The words and the
// uniforms have the same bits; the normals agree to float rounding. For *_isa.cpp files only.

#include "cpu/vec.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

typedef std::uint64_t WVec __attribute__((vector_size(4 * kWidth)));

struct VecWords {
  UVec at[4];
};

struct VecNormals {
  Vec at[4];
};

// The full products of the even lanes: their low halves times a constant.
inline WVec multiply_even(WVec a, std::uint32_t b) {
#if defined(ECAR_ISA_avx512)
  return (WVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(ECAR_ISA_avx2)
  return (WVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (WVec)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

inline void multiply(UVec a, std::uint32_t b, UVec& high, UVec& low) {
  constexpr std::uint64_t kLow = 0xffffffffu;
  const WVec even = multiply_even((WVec)a, b), odd = multiply_even((WVec)a >> 32, b);
  low = (UVec)((even & kLow) | (odd << 32));
  high = (UVec)((even >> 32) | (odd & ~kLow));
}

// Philox4x32-10 of the counters (call, stage, 0, 0) and one key, for kWidth calls in a row.
inline VecWords philox(std::uint32_t first_call, std::uint32_t stage, std::uint64_t seed) {
  UVec c0 = (UVec)lane_numbers() + first_call, c1 = UVec{} + stage, c2{}, c3{};
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    UVec high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// (0, 1]
inline Vec uniform(UVec word) {
  return (__builtin_convertvector(word, Vec) + 0.5f) * 0x1p-32f;
}

// ln u of a normal float, to about an ulp: u = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), and
// Cephes' polynomial in f.
inline Vec logarithm(Vec u) {
  const IVec exponent = ((IVec)u - 0x3f3504f3) >> 23;
  const Vec f = (Vec)((IVec)u - (exponent << 23)) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec square = f * f;
  constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                                     1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                     -2.4999993993e-1f, 3.3333331174e-1f};
  Vec p = splat(7.0376836292e-2f);
  for (const float coefficient : kCoefficients) p = fma(p, f, splat(coefficient));
  // ln 2 in two parts, the first exact in few bits.
  Vec low = fma(e, splat(-2.12194440e-4f), p * f * square);
  low = fma(square, splat(-0.5f), low);
  return fma(e, splat(0.693359375f), f + low);
}

// cos and sin of 2 pi u, u in [0, 1]: the quarter turn is taken off exactly, the rest is within
// an eighth of a turn (Cephes' polynomials).
inline void turn(Vec u, Vec& cosine, Vec& sine) {
  const IVec quarter = __builtin_convertvector(u * 4.0f + 0.5f, IVec);
  const Vec angle =
      6.2831853071795865f * (u - 0.25f * __builtin_convertvector(quarter, Vec));
  const Vec z = angle * angle;
  Vec s = fma(splat(-1.9515295891e-4f), z, splat(8.3321608736e-3f));
  s = fma(s, z, splat(-1.6666654611e-1f));
  s = fma(s * z, angle, angle);
  Vec c = fma(splat(2.443315711809948e-5f), z, splat(-1.388731625493765e-3f));
  c = fma(c, z, splat(4.166664568298827e-2f));
  c = fma(c * z, z, fma(z, splat(-0.5f), splat(1.0f)));
  const IVec swap = (quarter & 1) != 0;
  const UVec negative_cosine = (UVec)((quarter + 1) & 2) << 30, negative_sine =
      (UVec)(quarter & 2) << 30;
  cosine = (Vec)((UVec)(swap ? s : c) ^ negative_cosine);
  sine = (Vec)((UVec)(swap ? c : s) ^ negative_sine);
}

inline VecNormals normals(const VecWords& words) {
  VecNormals z;
  for (int pair = 0; pair < 4; pair += 2) {
    const Vec radius = sqrt(-2.0f * logarithm(uniform(words.at[pair])));
    Vec cosine, sine;
    turn(uniform(words.at[pair + 1]), cosine, sine);
    z.at[pair] = radius * cosine;
    z.at[pair + 1] = radius * sine;
  }
  return z;
}

// a0, b0, a1, b1, ...: the first and the second half.
inline void interleave(Vec a, Vec b, Vec& first, Vec& second) {
#if defined(ECAR_ISA_avx512)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  first = _mm512_permutex2var_ps(a, low, b);
  second = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
#elif defined(ECAR_ISA_avx2)
  const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  first = _mm256_permute2f128_ps(low, high, 0x20);
  second = _mm256_permute2f128_ps(low, high, 0x31);
#else
  float pairs[2 * kWidth];
  for (int i = 0; i < kWidth; ++i) pairs[2 * i] = a[i], pairs[2 * i + 1] = b[i];
  first = Full{}.load(pairs), second = Full{}.load(pairs + kWidth);
#endif
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
