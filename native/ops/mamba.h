// mamba.h: a Mamba-2 mixer between its projections (Dao and Gu, arXiv:2405.21060).
#pragma once

#include <cstdint>
#include <vector>

#include "ops/causal_conv.h"
#include "ops/recurrent_state.h"
#include "ops/runtime.h"

namespace argosy {

// A row of the input projection is [z, x, B, C, dt]; the convolution runs over x, B and C. Heads of a group
// lie side by side and share B and C.
struct MambaShape {
  int64_t num_heads, head_dim, state_dim, num_groups;
  int64_t conv_width;  // positions that the convolution sees

  bool operator==(const MambaShape&) const = default;
  int64_t channels() const { return num_heads * head_dim; }
  int64_t group_channels() const { return channels() / num_groups; }  // of the norm
  int64_t conv_channels() const { return channels() + 2 * num_groups * state_dim; }
  int64_t projected() const { return channels() + conv_channels() + num_heads; }
  // The inputs of the convolution before the next token, [conv_width - 1][conv_channels], and the matrices
  // [heads][state_dim][head_dim]. Throws std::invalid_argument for a size below 1 or a state that is too
  // large.
  StateShape state() const;
};

struct MambaWeights {
  const float* conv;        // [conv_width][conv_channels]
  const float* conv_bias;   // [conv_channels]; nullptr: none
  const float* rate;        // [heads], negative: the decay rate
  const float* dt_bias;     // [heads]
  const float* skip;        // [heads]
  const float* norm;        // [channels]
  float eps;                // the norm's epsilon
  float least_dt, most_dt;  // bounds of a step
};

// projected is [num_tokens][shape.projected()] and is overwritten, decay [num_tokens][heads] is scratch, out
// is [num_tokens][channels].
void mamba(Runtime& runtime, RecurrentState& state, int64_t layer, const MambaShape& shape,
           const MambaWeights& weights, float* projected, float* decay, const std::vector<StateRun>& runs,
           float* out);

}  // namespace argosy
