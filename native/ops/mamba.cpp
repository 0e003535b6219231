#include "ops/mamba.h"

#include <algorithm>

#include "kernels/gated_delta_args.h"
#include "kernels/mamba_args.h"
#include "kernels/swiglu_args.h"
#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr const char* kState = "a Mamba-2 mixer";

}  // namespace

StateShape MambaShape::state() const {
  // Check each part first, so that no sum can overflow.
  checked_product(kState, {8, num_heads, head_dim, conv_width});
  checked_product(kState, {8, num_groups, state_dim, conv_width});
  return {CausalConv::window_floats(conv_channels(), conv_width),
          checked_product(kState, {num_heads, state_dim, head_dim})};
}

// Prompts run through the recurrence too, token by token: its form in chunks would sum in another order at
// every length of a chunk.
void mamba(Runtime& runtime, RecurrentState& recurrent, int64_t layer, const MambaShape& shape,
           const MambaWeights& weights, float* projected, float* decay, const std::vector<StateRun>& runs,
           float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t heads = shape.num_heads, channels = shape.channels(), stride = shape.projected();
  const int64_t num_runs = int64_t(runs.size());
  int64_t num_tokens = 0;
  for (const StateRun& run : runs) num_tokens += run.end - run.begin;
  const int64_t tokens_a_run = num_tokens / std::max<int64_t>(num_runs, 1);

  float* x = projected + channels;
  float* dt = x + shape.conv_channels();
  causal_conv(runtime, recurrent, layer,
              {shape.conv_channels(), shape.conv_width, weights.conv, weights.conv_bias},
              {x, nullptr, nullptr, stride}, runs, {x, stride});

  // A head's steps, then its state through all tokens of a run.
  const int64_t head_work = 3 * tokens_a_run * shape.state_dim * shape.head_dim;
  runtime.parallel_for(num_runs * heads, head_work, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const StateRun& run = runs[size_t(item / heads)];
      const int64_t head = item % heads, at = run.begin * stride, tokens = run.end - run.begin;
      const float* b = x + at + channels + head / (heads / shape.num_groups) * shape.state_dim;
      const int64_t matrix_floats = shape.state_dim * shape.head_dim;
      float* state = recurrent.matrices(run.slot, layer) + head * matrix_floats;
      if (run.is_start) std::fill_n(state, matrix_floats, 0.0f);
      table.mamba_steps({
          .dt = dt + at + head,
          .dt_stride = stride,
          .decay = decay + run.begin * heads + head,
          .decay_stride = heads,
          .rate = weights.rate + head,
          .dt_bias = weights.dt_bias + head,
          .least_dt = weights.least_dt,
          .most_dt = weights.most_dt,
          .num_tokens = tokens,
          .num_heads = 1,
      });
      table.delta_rule({
          .update = DeltaRuleArgs::Update::add,
          .q = b + shape.num_groups * shape.state_dim,
          .k = b,
          .v = x + at + head * shape.head_dim,
          .stride = stride,
          .z = nullptr,
          .z_stride = 0,
          .decay = decay + run.begin * heads + head,
          .decay_stride = heads,
          .beta = dt + at + head,
          .beta_stride = stride,
          .state = state,
          .out = out + run.begin * channels + head * shape.head_dim,
          .out_stride = channels,
          .norm = nullptr,
          .eps = 0.0f,
          .num_tokens = tokens,
          .key_dim = shape.state_dim,
          .value_dim = shape.head_dim,
      });
    }
  });

  // The skip, the gate, then the norm group by group.
  const int64_t group = shape.group_channels();
  runtime.parallel_for(num_tokens, 20 * channels, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      float* y = out + t * channels;
      for (int64_t head = 0, i = 0; head < heads; ++head) {
        for (const int64_t end_of_head = i + shape.head_dim; i < end_of_head; ++i)
          y[i] += weights.skip[head] * x[t * stride + i];
      }
      table.activate({
          .activation = {},  // silu
          .gate = projected + t * stride,
          .up = y,
          .gate_bias = nullptr,
          .up_bias = nullptr,
          .stride = stride,
          .num_tokens = 1,
          .n = channels,
          .out = y,
          .out_stride = channels,
      });
      for (int64_t at = 0; at < channels; at += group)
        table.rms_norm(y + at, weights.norm + at, group, weights.eps, y + at);
    }
  });
}

}  // namespace argosy
