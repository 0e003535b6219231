// combine.h: adds the experts' outputs of one token to its hidden state.
//
//   combine            out[i] += sum over j, ascending, of weights[j] * expert_out[j][i]
//   add_sigmoid_gated  out[i] += sigmoid(gate_logit) * x[i]
//
//   out, x  float32 [hidden].    expert_out  float32 [k][hidden].
//
// One version for all instruction sets: each element has its own sum, whatever the vector width.
#pragma once

#include <math.h>

#include "kernels/exp.h"

namespace argosy {
namespace {

void combine(const float* __restrict expert_out, const float* __restrict weights, int64_t k, int64_t hidden,
             float* __restrict out) {
  constexpr int64_t kBlock = 256;  // a block of sums stays in the first-level cache
  for (int64_t begin = 0; begin < hidden; begin += kBlock) {
    const int64_t n = hidden - begin < kBlock ? hidden - begin : kBlock;
    float sum[kBlock] = {};
    for (int64_t j = 0; j < k; ++j) {
      const float* x = expert_out + j * hidden + begin;
      for (int64_t i = 0; i < n; ++i) sum[i] += weights[j] * x[i];
    }
    for (int64_t i = 0; i < n; ++i) out[begin + i] += sum[i];
  }
}

void add_sigmoid_gated(const float* __restrict x, float gate_logit, int64_t hidden, float* __restrict out) {
#if ARGOSY_VECTOR
  const float gate = 1.0f / (1.0f + exp(-gate_logit));
#else
  const float gate = 1.0f / (1.0f + expf(-gate_logit));
#endif
  for (int64_t i = 0; i < hidden; ++i) out[i] += gate * x[i];
}

}  // namespace
}  // namespace argosy
