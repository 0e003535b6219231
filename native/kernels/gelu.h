// gelu.h: the activations of encoders, in place on float32 [n].
//
//   gelu   x * P(normal <= x), in three forms (Hendrycks and Gimpel, arXiv:1606.08415):
//     erf    0.5 x (1 + erf(x / sqrt 2)). The vector version takes erf from Abramowitz and Stegun, Handbook
//     of
//            Mathematical Functions (1964), 7.1.26, whose error is at most 1.5e-7:
//            1 - erf(z) = (a1 t + ... + a5 t^5) e^-z^2 with t = 1 / (1 + p z), for z >= 0
//     tanh   gelu_tanh of swiglu.h
//     quick  x sigmoid(1.702 x)
//   silu   x sigmoid(x)
#pragma once

#include <math.h>

#include "kernels/exp.h"
#include "kernels/kernel_table.h"
#include "kernels/swiglu.h"

namespace argosy {
namespace {

constexpr float kQuick = 1.702f;

#if !ARGOSY_VECTOR  // the reference

inline float gelu_of(Gelu kind, float x) {
  if (kind == Gelu::erf) return 0.5f * x * (1.0f + erff(x * 0.707106781f));
  if (kind == Gelu::quick) return x * sigmoid(kQuick * x);
  return gelu_tanh(x);
}

void gelu(Gelu kind, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = gelu_of(kind, x[i]);
}

void silu_in_place(int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= sigmoid(x[i]);
}

#else

template <class F>
void replace_each(int64_t n, float* x, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, f(load(x + i)));
  if (i < n) store(x + i, f(load(x + i, n - i)), n - i);
}

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

void gelu(Gelu kind, int64_t n, float* x) {
  switch (kind) {
    case Gelu::erf:
      return replace_each(n, x, gelu_erf);
    case Gelu::tanh:
      return replace_each(n, x, [](Vec some) { return gelu_tanh(some); });
    case Gelu::quick:
      return replace_each(n, x, [](Vec some) { return gated(some, mul(some, broadcast(-kQuick))); });
  }
}

void silu_in_place(int64_t n, float* x) {
  replace_each(n, x, [](Vec some) { return silu(some); });
}

#endif

}  // namespace
}  // namespace argosy
