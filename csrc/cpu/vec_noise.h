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

// Numbers in the low halves of 64-bit lanes. What is in the high halves is never looked at: the
// products take low halves alone.
inline WVec spread(std::uint32_t value) { return WVec{} + value; }

inline WVec xor3(WVec a, WVec b, WVec c) {
#if defined(ECAR_ISA_avx512)
  return (WVec)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The low halves of two: even's in the even lanes, odd's in the odd ones.
inline UVec join(WVec even, WVec odd) {
#if defined(ECAR_ISA_avx512)
  return (UVec)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(ECAR_ISA_avx2)
  return (UVec)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
  return (UVec)((even & 0xffffffffu) | (odd << 32));
#endif
}

constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// The rounds of Philox on half of the calls. The first two are written out, for their counters
// (call, stage, 0, 0) leave one product in each, and numbers that all calls have in common.
inline void philox_half(WVec call, std::uint32_t stage, std::uint64_t seed, WVec (&c)[4]) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  const WVec first = multiply_even(call, kMultiplier0);
  const std::uint64_t common = std::uint64_t{kMultiplier0} * (stage ^ key0);
  const WVec second = multiply_even((first >> 32) ^ spread(key1), kMultiplier1);
  key0 += kWeyl0;
  key1 += kWeyl1;
  c[0] = (second >> 32) ^ spread(key0);
  c[1] = second;
  c[2] = first ^ spread(static_cast<std::uint32_t>(common >> 32) ^ key1);
  c[3] = spread(static_cast<std::uint32_t>(common));
  for (int round = 2; round < 10; ++round) {
    key0 += kWeyl0;
    key1 += kWeyl1;
    const WVec product0 = multiply_even(c[0], kMultiplier0);
    const WVec product1 = multiply_even(c[2], kMultiplier1);
    c[0] = xor3(product1 >> 32, c[1], spread(key0));
    c[1] = product1;
    c[2] = xor3(product0 >> 32, c[3], spread(key1));
    c[3] = product0;
  }
}

// Philox4x32-10 of the counters (call, stage, 0, 0) and one key, for kWidth calls in a row.
inline VecWords philox(std::uint32_t first_call, std::uint32_t stage, std::uint64_t seed) {
  const WVec calls = (WVec)((UVec)lane_numbers() + first_call);
  WVec even[4], odd[4];
  philox_half(calls, stage, seed, even);
  philox_half(calls >> 32, stage, seed, odd);
  VecWords words;
  for (int i = 0; i < 4; ++i) words.at[i] = join(even[i], odd[i]);
  return words;
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
