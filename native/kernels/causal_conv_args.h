// causal_conv_args.h: the arguments of a causal convolution (causal_conv.h).
#pragma once

#include <cstdint>

namespace argosy {

// Channels of a depthwise causal convolution. Token t's begin at x + t * x_stride; `stride` separates the
// positions of `weights` and of `window`.
struct CausalConvArgs {
  const float* x;
  int64_t x_stride;
  // Both or none, as far apart as x: out_gate * conv(in_gate * x). Without them the result is silu(conv(x)).
  const float *in_gate, *out_gate;
  const float* weights;  // [width][channels]
  const float* bias;     // [channels]; nullptr: none
  float* window;  // [width - 1][channels]: the inputs before the first token; on return, before the next
  float* out;     // may be x
  int64_t out_stride;
  int64_t stride, width, channels, num_tokens;
  float length, eps;  // if length > 0, the result is x / sqrt(sum of x^2 + eps) * length
};

}  // namespace argosy
