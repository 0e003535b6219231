// rms_norm.h: out = x / sqrt(mean(x^2) + eps) * weight, for one row.
//
//   x, weight, out  float32 [cols]; out may be x. (Zhang and Sennrich, arXiv:1910.07467)
#pragma once

#include <math.h>

namespace argosy {
namespace {

inline float inverse_root(float sum_of_squares, int64_t cols, float eps) {
  return 1.0f / sqrtf(sum_of_squares / float(cols) + eps);
}

#if !ARGOSY_VECTOR  // the reference

void rms_norm(const float* x, const float* weight, int64_t cols, float eps, float* out) {
  float sum = 0.0f;
  for (int64_t i = 0; i < cols; ++i) sum += x[i] * x[i];
  const float scale = inverse_root(sum, cols, eps);
  for (int64_t i = 0; i < cols; ++i) out[i] = x[i] * scale * weight[i];
}

#else

void rms_norm(const float* x, const float* weight, int64_t cols, float eps, float* out) {
  const int64_t whole = cols / kLanes * kLanes;
  const int64_t rest = cols - whole;
  Vec sum = zeros();
  for (int64_t i = 0; i < whole; i += kLanes) sum = fma(load(x + i), load(x + i), sum);
  if (rest > 0) sum = fma(load(x + whole, rest), load(x + whole, rest), sum);
  const Vec scale = broadcast(inverse_root(sum_lanes(sum), cols, eps));
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (rest > 0) {
    store(out + whole, mul(mul(load(x + whole, rest), scale), load(weight + whole, rest)), rest);
  }
}

#endif

}  // namespace
}  // namespace argosy
