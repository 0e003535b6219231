// elementwise.h: activations of one number, or of a vector of them with the same bits in any lane.
//
//   silu         x / (1 + e^-x)
//   gelu_erf     0.5 x (1 + erf(x / sqrt 2))
//   gelu_tanh    0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
//   gelu_quick   x sigmoid(1.702 x)
//   softplus     log(1 + e^x)
//   soft_limit   limit tanh(x / limit)
//
// The gelus are forms of x * P(normal <= x) (Hendrycks and Gimpel, arXiv:1606.08415). The vector version
// takes erf from Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26, whose error is at
// most 1.5e-7: 1 - erf(z) = (a1 t + ... + a5 t^5) e^-z^2 with t = 1 / (1 + p z), for z >= 0. gelu_tanh is
// computed as x sigmoid(2 u), which loses no digits where the result is small.
#pragma once

#include <math.h>

#include "kernels/exp.h"

namespace argosy {
namespace {

constexpr float kQuick = 1.702f, kRootOf2OverPi = 0.797884561f, kCubeOfTanh = 0.044715f;

#if !ARGOSY_VECTOR  // the reference

inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
inline float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.707106781f)); }
inline float gelu_tanh(float x) { return x * sigmoid(2.0f * kRootOf2OverPi * (x + kCubeOfTanh * x * x * x)); }
inline float gelu_quick(float x) { return x * sigmoid(kQuick * x); }
inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
inline float soft_limit(float limit, float x) { return limit * tanhf(x / limit); }

#else

// x sigmoid(-minus_u)
inline Vec gated(Vec x, Vec minus_u) { return div(x, add(broadcast(1.0f), exp(minus_u))); }

inline Vec silu(Vec x) { return gated(x, sub(zeros(), x)); }

inline Vec gelu_erf(Vec x) {
  const Vec magnitude = max_or_second(sub(zeros(), x), x);
  const Vec t = div(broadcast(1.0f), fma(broadcast(0.3275911f * 0.707106781f), magnitude, broadcast(1.0f)));
  Vec p = broadcast(1.061405429f);
  p = fma(p, t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const Vec beyond = mul(mul(p, t), exp(mul(mul(x, x), broadcast(-0.5f))));  // 1 - erf(|x| / sqrt 2)
  // For both signs, so that small results are not differences of large ones.
  return sub(max_or_second(zeros(), x), mul(mul(broadcast(0.5f), magnitude), beyond));
}

inline Vec gelu_tanh(Vec x) {
  const Vec scaled = mul(x, broadcast(-2.0f * kRootOf2OverPi));
  return gated(x, fma(mul(mul(scaled, broadcast(kCubeOfTanh)), x), x, scaled));
}

inline Vec gelu_quick(Vec x) { return gated(x, mul(x, broadcast(-kQuick))); }

// max(x, 0) + log(1 + y) with y = e^-|x|; log(1 + y) = 2 artanh z with z = y / (2 + y) <= 1/3, whose series
// is cut off below float32.
inline Vec softplus(Vec x) {
  const Vec y = exp(sub(zeros(), max_or_second(sub(zeros(), x), x)));
  const Vec z = div(y, add(y, broadcast(2.0f))), square = mul(z, z);
  Vec p = broadcast(1.0f / 15);
  for (const float divisor : {13.0f, 11.0f, 9.0f, 7.0f, 5.0f, 3.0f, 1.0f}) {
    p = fma(p, square, broadcast(1.0f / divisor));
  }
  return fma(mul(broadcast(2.0f), z), p, max_or_second(zeros(), x));
}

// tanh z = y / (y + 2) with y = e^2z - 1; above 20, where it is 1, y must stay finite.
inline Vec soft_limit(Vec limit, Vec x) {
  const Vec twice = min_or_second(broadcast(40.0f), mul(broadcast(2.0f), div(x, limit)));
  const Vec y = exp_minus_one(twice);
  return mul(limit, div(y, add(y, broadcast(2.0f))));
}

#endif

}  // namespace
}  // namespace argosy
