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

// The gates of one head whose decay differs between key dimensions, in place: those of token t are
// a + t * a_stride [key_dim] and b + t * b_stride.
struct ChannelGatesArgs {
  float *a, *b;
  int64_t a_stride, b_stride;
  const float* dt_bias;  // [key_dim]
  float rate;            // negative
  float floor;           // negative: the least logarithm of a decay; 0: there is none
  int64_t num_tokens, key_dim;
};

// One value head. The q of token t begins `stride` floats after the q of token t - 1; k, v and z likewise.
// A stride of 0 gives every token the same decay or beta.
struct DeltaRuleArgs {
  enum class Update {
    delta,          // S = decay S + k (beta (v - decay S^T k))^T
    channel_delta,  // the same with a decay for each key dimension
    add,            // S = decay S + k (beta v)^T
  } update = Update::delta;
  const float *q, *k, *v;
  int64_t stride;
  const float* z;  // the output gate
  int64_t z_stride;
  bool is_sigmoid = false;  // out is multiplied by sigmoid(z), not by silu(z)
  const float* decay;       // [1], or [key_dim] of each token
  int64_t decay_stride;
  const float* beta;
  int64_t beta_stride;
  float* state;  // [key_dim][value_dim]
  float* out;
  int64_t out_stride;
  const float* norm;  // [value_dim]; nullptr: out is S^T q, and z is ignored
  float eps;
  int64_t num_tokens, key_dim, value_dim;
};

}  // namespace argosy
