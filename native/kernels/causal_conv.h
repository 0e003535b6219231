// causal_conv.h: a depthwise causal convolution over the tokens of one sequence, token by token.
//
//   conv(x)[t] = bias + sum over j of weights[j] x[t - width + 1 + j]
//   out = silu(conv(x)), or with gates out_gate * conv(in_gate * x);  then, if asked, to a given length
//
// Promise: the operations of a token and their order do not depend on the other tokens in the call.
#pragma once

#include <math.h>

#include "kernels/causal_conv_args.h"
#include "kernels/exp.h"
#include "kernels/swiglu.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

void causal_conv(const CausalConvArgs& args) {
  const int64_t last = args.width - 1;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const float* x = args.x + t * args.x_stride;
    float* out = args.out + t * args.out_stride;
    float sum_of_squares = 0.0f;
    for (int64_t c = 0; c < args.channels; ++c) {
      const float now = args.in_gate != nullptr ? args.in_gate[t * args.x_stride + c] * x[c] : x[c];
      float sum = args.bias != nullptr ? args.bias[c] : 0.0f;
      for (int64_t j = 0; j < last; ++j) {
        float& past = args.window[j * args.stride + c];
        sum += args.weights[j * args.stride + c] * past;
        past = j + 1 < last ? args.window[(j + 1) * args.stride + c] : now;
      }
      sum += args.weights[last * args.stride + c] * now;
      out[c] =
          args.out_gate != nullptr ? args.out_gate[t * args.x_stride + c] * sum : sum / (1.0f + expf(-sum));
      sum_of_squares += out[c] * out[c];
    }
    if (args.length == 0.0f) continue;
    const float scale = args.length / sqrtf(sum_of_squares + args.eps);
    for (int64_t c = 0; c < args.channels; ++c) out[c] *= scale;
  }
}

#else

template <bool kHasGates>
void convolve(const CausalConvArgs& args) {
  const int64_t last = args.width - 1;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const int64_t at = t * args.x_stride;
    float* out = args.out + t * args.out_stride;
    Vec sum_of_squares = zeros();
    for (int64_t c = 0; c < args.channels; c += kLanes) {
      const int64_t n = args.channels - c < kLanes ? args.channels - c : kLanes;
      Vec now = load(args.x + at + c, n);
      if constexpr (kHasGates) now = mul(load(args.in_gate + at + c, n), now);
      Vec sum = args.bias != nullptr ? load(args.bias + c, n) : zeros();
      for (int64_t j = 0; j < last; ++j) {
        float* past = args.window + j * args.stride + c;
        sum = fma(load(args.weights + j * args.stride + c, n), load(past, n), sum);
        store(past, j + 1 < last ? load(past + args.stride, n) : now, n);
      }
      sum = fma(load(args.weights + last * args.stride + c, n), now, sum);
      if constexpr (kHasGates) {
        sum = mul(load(args.out_gate + at + c, n), sum);
      } else {
        sum = silu(sum);
      }
      store(out + c, sum, n);
      sum_of_squares = fma(sum, sum, sum_of_squares);
    }
    if (args.length == 0.0f) continue;
    const Vec scale = broadcast(args.length / sqrtf(sum_lanes(sum_of_squares) + args.eps));
    for (int64_t c = 0; c < args.channels; c += kLanes) {
      const int64_t n = args.channels - c < kLanes ? args.channels - c : kLanes;
      store(out + c, mul(load(out + c, n), scale), n);
    }
  }
}

void causal_conv(const CausalConvArgs& args) {
  if (args.in_gate != nullptr) return convolve<true>(args);
  convolve<false>(args);
}

#endif

}  // namespace
}  // namespace argosy
