// gated_delta.h: the gated delta net, which updates the recurrent state of sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/recurrent_state.h"
#include "ops/runtime.h"

namespace argosy {

// Sizes of a gated delta net. The channels of its convolution are q of all key heads, then k, then v.
struct DeltaShape {
  int64_t num_key_heads, num_value_heads, key_dim, value_dim;
  int64_t conv_width;  // positions that the convolution sees

  bool operator==(const DeltaShape&) const = default;
  int64_t key_channels() const { return num_key_heads * key_dim; }
  int64_t value_channels() const { return num_value_heads * value_dim; }
  int64_t conv_channels() const { return 2 * key_channels() + value_channels(); }

  // The inputs of the convolution before the next token, [conv_width - 1][conv_channels], and the matrices
  // [value_heads][key_dim][value_dim]. Throws std::invalid_argument for a size below 1 or a state that is too
  // large.
  StateShape state() const;
};

// Where the parts of a token lie in the outputs of its projections. Strides are in floats. A `group` is the
// distance between key heads, for q and k, or between the groups of value heads that share a key head. Value
// heads of one group lie side by side.
struct DeltaInputs {
  float *q, *k, *v;
  int64_t stride, key_group, value_group;
  const float* z;
  int64_t z_stride, z_group;
  float* a;  // one per value head; with a decay for each key dimension, key_dim per head
  int64_t a_stride, a_group;
  float* b;
  int64_t b_stride, b_group;
};

struct DeltaWeights {
  // The convolutions of q, k and v, [conv_width] rows. Either they are parts of one, with rows of
  // conv_channels, or each has rows of its own channels, and a window of its own in the state.
  const float* conv[3];
  bool has_joined_conv;
  const float* rate;     // [value_heads], negative: the decay rate
  const float* dt_bias;  // [value_heads], or [value_heads][key_dim]
  const float* norm;     // [value_dim]
  float eps;             // the norm's epsilon
  bool is_tiled;         // value head i uses key head i modulo key heads, not i / (value heads per key head)
  bool has_sigmoid_gate = false;  // the output is gated by sigmoid(z), not silu(z)
  // Kimi Delta Attention: each key dimension has its own decay, at least e^floor if floor < 0. With
  // has_sigmoid_gate, and as many value heads as key heads.
  bool has_channel_decay = false;
  float floor = 0;
};

// out is [num_tokens][value_heads * value_dim]. Overwrites its inputs.
void gated_delta(Runtime& runtime, RecurrentState& state, int64_t layer, const DeltaShape& shape,
                 const DeltaWeights& weights, const DeltaInputs& inputs, const std::vector<StateRun>& runs,
                 float* out);

// The q, k and v of head h of a token begin at q + t * stride + h * group and so on.
struct LightningInputs {
  const float *q, *k, *v;
  int64_t stride, group;
};

// Lightning attention (arXiv:2401.04658): each head forgets at a fixed rate, S = decay S + k (scale v)^T, and
// its output is S^T q. The shape has a convolution of one position: none. decay is [heads]; out as above.
void lightning_attention(Runtime& runtime, RecurrentState& state, int64_t layer, const DeltaShape& shape,
                         const float* decay, float scale, const LightningInputs& inputs,
                         const std::vector<StateRun>& runs, float* out);

}  // namespace argosy
