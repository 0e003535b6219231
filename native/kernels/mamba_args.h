// mamba_args.h: the arguments of the steps of a Mamba-2 mixer (mamba.h).
#pragma once

#include <cstdint>

namespace argosy {

// The steps of num_heads heads. Those of token t begin at dt + t * dt_stride and decay + t * decay_stride.
struct MambaStepsArgs {
  float* dt;  // in place: as the projection gives it -> the step
  int64_t dt_stride;
  float* decay;
  int64_t decay_stride;
  const float *rate, *dt_bias;  // [num_heads]
  float least_dt, most_dt;      // the step is clamped to them
  int64_t num_tokens, num_heads;
};

}  // namespace argosy
