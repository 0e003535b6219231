// gelu.h: the activations of encoders (elementwise.h), in place on float32 [n].
#pragma once

#include "kernels/elementwise.h"
#include "kernels/encoder_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

void gelu(Gelu kind, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = kind == Gelu::erf ? gelu_erf(x[i]) : kind == Gelu::tanh ? gelu_tanh(x[i]) : gelu_quick(x[i]);
  }
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

void gelu(Gelu kind, int64_t n, float* x) {
  switch (kind) {
    case Gelu::erf:
      return replace_each(n, x, gelu_erf);
    case Gelu::tanh:
      return replace_each(n, x, [](Vec some) { return gelu_tanh(some); });
    case Gelu::quick:
      return replace_each(n, x, gelu_quick);
  }
}

void silu_in_place(int64_t n, float* x) {
  replace_each(n, x, [](Vec some) { return silu(some); });
}

#endif

}  // namespace
}  // namespace argosy
