// swiglu.h: out = silu(gate) * up, where silu(x) = x / (1 + e^-x). (Shazeer, arXiv:2002.05202)
//
//   gate, up, out  float32 [n]; out may be gate or up.
//
//   mul_sigmoid    x *= 1 / (1 + e^-gate): the output gate of attention heads
#pragma once

#include <math.h>

#include "kernels/exp.h"
#include "kernels/kernel_table.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void mul_sigmoid(const float* gate, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= 1.0f / (1.0f + expf(-gate[i]));
}

#else

inline Vec silu(Vec x) { return div(x, add(broadcast(1.0f), exp(sub(zeros(), x)))); }

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t here = n - i < kLanes ? n - i : kLanes;
    store(out + i, mul(silu(load(gate + i, here)), load(up + i, here)), here);
  }
}

void mul_sigmoid(const float* gate, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t here = n - i < kLanes ? n - i : kLanes;
    const Vec denominator = add(broadcast(1.0f), exp(sub(zeros(), load(gate + i, here))));
    store(x + i, div(load(x + i, here), denominator), here);
  }
}

#endif

}  // namespace
}  // namespace argosy
