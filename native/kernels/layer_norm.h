// layer_norm.h: out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, for one row.
//
//   x, weight, bias, out  float32 [cols]; out may be x; bias may be nullptr. (Ba and others,
//   arXiv:1607.06450)
#pragma once

#include "kernels/rms_norm.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

void layer_norm(const float* x, const float* weight, const float* bias, int64_t cols, float eps, float* out) {
  float sum = 0.0f;
  for (int64_t i = 0; i < cols; ++i) sum += x[i];
  const float mean = sum / float(cols);
  float squares = 0.0f;
  for (int64_t i = 0; i < cols; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = inverse_root(squares, cols, eps);
  for (int64_t i = 0; i < cols; ++i) {
    out[i] = (x[i] - mean) * scale * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
  }
}

#else

void layer_norm(const float* x, const float* weight, const float* bias, int64_t cols, float eps, float* out) {
  const int64_t whole = cols / kLanes * kLanes;
  const int64_t rest = cols - whole;
  Vec sum = zeros();
  for (int64_t i = 0; i < whole; i += kLanes) sum = add(load(x + i), sum);
  if (rest > 0) sum = add(load(x + whole, rest), sum);
  const Vec mean = broadcast(sum_lanes(sum) / float(cols));
  Vec squares = zeros();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec centred = sub(load(x + i), mean);
    squares = fma(centred, centred, squares);
  }
  if (rest > 0) {
    const Vec centred = keep_lanes(sub(load(x + whole, rest), mean), 0, rest, 0.0f);
    squares = fma(centred, centred, squares);
  }
  const Vec scale = broadcast(inverse_root(sum_lanes(squares), cols, eps));
  const auto normed = [&](Vec values, Vec by) { return mul(mul(sub(values, mean), scale), by); };
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec value = normed(load(x + i), load(weight + i));
    store(out + i, bias != nullptr ? add(value, load(bias + i)) : value);
  }
  if (rest > 0) {
    const Vec value = normed(load(x + whole, rest), load(weight + whole, rest));
    store(out + whole, bias != nullptr ? add(value, load(bias + whole, rest)) : value, rest);
  }
}

#endif

}  // namespace
}  // namespace argosy
