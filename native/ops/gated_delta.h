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
  float *a, *b;
  int64_t gate_stride, gate_group;
};

struct DeltaWeights {
  const float* conv;     // [conv_width][conv_channels]
  const float* rate;     // [value_heads], negative: the decay rate
  const float* dt_bias;  // [value_heads]
  const float* norm;     // [value_dim]
  float eps;             // the norm's epsilon
  bool is_tiled;         // value head i uses key head i modulo key heads, not i / (value heads per key head)
};

// out is [num_tokens][value_heads * value_dim]. Overwrites its inputs.
void gated_delta(Runtime& runtime, RecurrentState& state, int64_t layer, const DeltaShape& shape,
                 const DeltaWeights& weights, const DeltaInputs& inputs, const std::vector<StateRun>& runs,
                 float* out);

}  // namespace argosy
