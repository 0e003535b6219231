// gated_delta_args.h: the arguments of a gated delta net (gated_delta.h).
#pragma once

#include <cstdint>

namespace argosy {

// The gates of num_heads value heads, in place. Those of token t begin at a + t * a_stride and
// b + t * b_stride.
struct DeltaGatesArgs {
  float *a, *b;
  int64_t a_stride, b_stride;
  const float *rate, *dt_bias;  // [num_heads]
  int64_t num_tokens, num_heads;
};

// Channels of a causal convolution, in place. `stride` separates the positions of `weights` and `window`.
struct DeltaConvArgs {
  float* x;  // token t's channels begin at x + t * x_stride
  int64_t x_stride;
  const float* weights;  // [width][channels]
  float* window;  // [width - 1][channels]: the inputs before the first token; on return, before the next
  int64_t stride, width, channels, num_tokens;
  float length, eps;  // if length > 0, the result is x / sqrt(sum of x^2 + eps) * length
};

// One value head. The q of token t begins `stride` floats after the q of token t - 1; k, v and z likewise.
struct DeltaRuleArgs {
  const float *q, *k, *v;
  int64_t stride;
  const float* z;
  int64_t z_stride;
  const float* decay;
  int64_t decay_stride;
  const float* beta;
  int64_t beta_stride;
  float* state;  // [key_dim][value_dim]
  float* out;
  int64_t out_stride;
  const float* norm;  // [value_dim]
  float eps;
  int64_t num_tokens, key_dim, value_dim;
};

}  // namespace argosy
