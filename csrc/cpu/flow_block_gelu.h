#pragma once

// GELU in its tanh form, for *_isa.cpp files.

#include "cpu/vec.h"

namespace ecar {
namespace ECAR_ISA {
namespace {

// e^x within 2 ulp where -87 <= x <= 87, and that of the nearer end beyond; a NaN stays one.
inline Vec exp(Vec x) {
  x = x > 87.0f ? splat(87.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vec magic = splat(0x1.8p23f);  // its ulp is 1: adding it rounds to a whole number
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, n times the first exact
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  // The last bits of `shifted` are n: 2^n by its exponent.
  return p * (Vec)(((IVec)shifted << 23) + (127 << 23));
}

// x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): nothing cancels.
inline Vec gelu_tanh(Vec x) {
  const Vec minus_2u = x * fma(x * x, splat(-0.0713548163f), splat(-1.59576912f));
  return x / (1.0f + exp(minus_2u));
}

// x s and its derivative s + x s (1 - s) (2u)' with s = 1 / (1 + e^-2u), and 1 - s = s e^-2u.
struct GeluAndDerivative {
  Vec value, derivative;
};
inline GeluAndDerivative gelu_tanh_and_derivative(Vec of) {
  // The derivative is 1 from there on, and 0 below the other; a NaN stays one.
  Vec x = of > 30.0f ? splat(30.0f) : of;
  x = x < -30.0f ? splat(-30.0f) : x;
  const Vec square = x * x;
  const Vec e = exp(x * fma(square, splat(-0.0713548163f), splat(-1.59576912f)));
  const Vec s = 1.0f / (1.0f + e);
  const Vec slope = x * fma(square, splat(3 * 0.0713548163f), splat(1.59576912f));
  return {of * s, fma(slope * (s * e), s, s)};
}

}  // namespace
}  // namespace ECAR_ISA
}  // namespace ecar
