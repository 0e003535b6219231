// mamba.h: the steps of a Mamba-2 mixer (Dao and Gu, arXiv:2405.21060). Its recurrence is delta_rule's.
//
//   mamba_steps  dt  ->  dt = softplus(dt + dt_bias), clamped;  decay = e^(rate dt)
#pragma once

#include <math.h>

#include "kernels/mamba_args.h"

namespace argosy {
namespace {

// Steps are few, and every head differs: one version for all instruction sets.
void mamba_steps(const MambaStepsArgs& args) {
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    float* dt = args.dt + t * args.dt_stride;
    float* decay = args.decay + t * args.decay_stride;
    for (int64_t i = 0; i < args.num_heads; ++i) {
      const float x = dt[i] + args.dt_bias[i];
      float step = x > 20.0f ? x : log1pf(expf(x));  // beyond 20 the difference is below rounding
      step = step < args.least_dt ? args.least_dt : step > args.most_dt ? args.most_dt : step;
      dt[i] = step;
      decay[i] = expf(args.rate[i] * step);
    }
  }
}

}  // namespace
}  // namespace argosy
