// causal_conv.h: a depthwise causal convolution whose last inputs are recurrent state.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/recurrent_state.h"
#include "ops/rows.h"
#include "ops/runtime.h"

namespace argosy {

struct CausalConv {
  int64_t channels, width;  // width: the positions that it sees
  const float* weights;     // [width][channels]
  const float* bias;        // [channels]; nullptr: none

  // The window of a layer. Throws std::invalid_argument for a size below 1 or a state that is too large.
  static int64_t window_floats(int64_t channels, int64_t width);
};

// Rows `stride` floats apart.
struct ConvInputs {
  const float* x;
  const float *in_gate, *out_gate;  // both or none: out_gate * conv(in_gate * x) instead of silu(conv(x))
  int64_t stride;
};

// Writes `channels` floats for each token of the runs; out may be x.
void causal_conv(Runtime& runtime, RecurrentState& state, int64_t layer, const CausalConv& conv,
                 const ConvInputs& inputs, const std::vector<StateRun>& runs, Rows<float> out);

}  // namespace argosy
