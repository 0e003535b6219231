#include "ops/gated_delta.h"

#include <algorithm>
#include <cmath>

#include "kernels/causal_conv_args.h"
#include "kernels/gated_delta_args.h"
#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr float kUnitLengthEps = 1e-6f;  // for the unit length of q and k

constexpr const char* kState = "a gated delta net";

}  // namespace

StateShape DeltaShape::state() const {
  // Check each part first, so that no sum can overflow.
  checked_product(kState, {3, num_key_heads, key_dim, conv_width});
  checked_product(kState, {3, num_value_heads, value_dim, conv_width});
  return {(conv_width - 1) * conv_channels(), checked_product(kState, {num_value_heads, key_dim, value_dim})};
}

void gated_delta(Runtime& runtime, RecurrentState& recurrent, int64_t layer, const DeltaShape& shape,
                 const DeltaWeights& weights, const DeltaInputs& inputs, const std::vector<StateRun>& runs,
                 float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t key_heads = shape.num_key_heads, value_heads = shape.num_value_heads;
  const int64_t sharing = value_heads / key_heads;  // value heads per key head
  const int64_t channels = shape.conv_channels(), num_runs = int64_t(runs.size());
  int64_t num_tokens = 0;
  for (const StateRun& run : runs) num_tokens += run.end - run.begin;
  const int64_t tokens_a_run = num_tokens / std::max<int64_t>(num_runs, 1);

  // Items: q, k and v of each key head, then all gates as one item. Gates of key dimensions belong to their
  // head.
  const int64_t parts = 3 * key_heads + (weights.has_channel_decay ? 0 : 1);
  const int64_t part_work = tokens_a_run * channels / (3 * key_heads) * (shape.conv_width + 16);
  runtime.parallel_for(num_runs * parts, part_work, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const StateRun& run = runs[size_t(item / parts)];
      const int64_t part = item % parts, tokens = run.end - run.begin;
      if (part == 3 * key_heads) {
        for (int64_t head = 0; head < value_heads; head += sharing) {
          table.delta_gates({
              .a = inputs.a + run.begin * inputs.a_stride + head / sharing * inputs.a_group,
              .b = inputs.b + run.begin * inputs.b_stride + head / sharing * inputs.b_group,
              .a_stride = inputs.a_stride,
              .b_stride = inputs.b_stride,
              .rate = weights.rate + head,
              .dt_bias = weights.dt_bias + head,
              .num_tokens = tokens,
              .num_heads = sharing,
          });
        }
        continue;
      }
      const int64_t head = part / 3, kind = part % 3;
      const int64_t width = kind == 2 ? sharing * shape.value_dim : shape.key_dim;
      const int64_t row = weights.has_joined_conv ? channels
                          : kind == 2             ? shape.value_channels()
                                                  : shape.key_channels();
      const int64_t past = weights.has_joined_conv ? 1 : shape.conv_width - 1;
      float* first = (kind == 0   ? inputs.q
                      : kind == 1 ? inputs.k
                                  : inputs.v) +
                     run.begin * inputs.stride + head * (kind == 2 ? inputs.value_group : inputs.key_group);
      float* window = recurrent.window(run.slot, layer) + kind * shape.key_channels() * past + head * width;
      for (int64_t j = 0; run.is_start && j + 1 < shape.conv_width; ++j) {
        std::fill_n(window + j * row, width, 0.0f);
      }
      table.causal_conv({
          .x = first,
          .x_stride = inputs.stride,
          .in_gate = nullptr,
          .out_gate = nullptr,
          .weights = weights.conv[kind] + head * width,
          .bias = nullptr,
          .window = window,
          .out = first,
          .out_stride = inputs.stride,
          .stride = row,
          .width = shape.conv_width,
          .channels = width,
          .num_tokens = tokens,
          .length = kind == 0   ? 1.0f / std::sqrt(float(shape.key_dim))
                    : kind == 1 ? 1.0f
                                : 0.0f,
          .eps = kUnitLengthEps,
      });
    }
  });

  const int64_t head_work = 3 * tokens_a_run * shape.key_dim * shape.value_dim;
  runtime.parallel_for(num_runs * value_heads, head_work, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const StateRun& run = runs[size_t(item / value_heads)];
      const int64_t head = item % value_heads;
      const int64_t key_head = weights.is_tiled ? head % key_heads : head / sharing;
      const int64_t key_at = run.begin * inputs.stride + key_head * inputs.key_group;
      const int64_t value_at = head % sharing * shape.value_dim;
      float* a = inputs.a + run.begin * inputs.a_stride + head / sharing * inputs.a_group + head % sharing;
      float* b = inputs.b + run.begin * inputs.b_stride + head / sharing * inputs.b_group + head % sharing;
      if (weights.has_channel_decay) {
        table.channel_gates({
            .a = a,
            .b = b,
            .a_stride = inputs.a_stride,
            .b_stride = inputs.b_stride,
            .dt_bias = weights.dt_bias + head * shape.key_dim,
            .rate = weights.rate[head],
            .floor = weights.floor,
            .num_tokens = run.end - run.begin,
            .key_dim = shape.key_dim,
        });
      }
      float* state = recurrent.matrices(run.slot, layer) + head * shape.key_dim * shape.value_dim;
      if (run.is_start) std::fill_n(state, shape.key_dim * shape.value_dim, 0.0f);
      table.delta_rule({
          .update =
              weights.has_channel_decay ? DeltaRuleArgs::Update::channel_delta : DeltaRuleArgs::Update::delta,
          .q = inputs.q + key_at,
          .k = inputs.k + key_at,
          .v = inputs.v + run.begin * inputs.stride + head / sharing * inputs.value_group + value_at,
          .stride = inputs.stride,
          .z = inputs.z + run.begin * inputs.z_stride + head / sharing * inputs.z_group + value_at,
          .z_stride = inputs.z_stride,
          .is_sigmoid = weights.has_sigmoid_gate,
          .decay = a,
          .decay_stride = inputs.a_stride,
          .beta = b,
          .beta_stride = inputs.b_stride,
          .state = state,
          .out = out + (run.begin * value_heads + head) * shape.value_dim,
          .out_stride = shape.value_channels(),
          .norm = weights.norm,
          .eps = weights.eps,
          .num_tokens = run.end - run.begin,
          .key_dim = shape.key_dim,
          .value_dim = shape.value_dim,
      });
    }
  });
}

void lightning_attention(Runtime& runtime, RecurrentState& recurrent, int64_t layer, const DeltaShape& shape,
                         const float* decay, float scale, const LightningInputs& inputs,
                         const std::vector<StateRun>& runs, float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t heads = shape.num_value_heads, num_runs = int64_t(runs.size());
  int64_t num_tokens = 0;
  for (const StateRun& run : runs) num_tokens += run.end - run.begin;
  const int64_t head_work = 2 * num_tokens / std::max<int64_t>(num_runs, 1) * shape.key_dim * shape.value_dim;
  runtime.parallel_for(num_runs * heads, head_work, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const StateRun& run = runs[size_t(item / heads)];
      const int64_t head = item % heads, at = run.begin * inputs.stride + head * inputs.group;
      float* state = recurrent.matrices(run.slot, layer) + head * shape.key_dim * shape.value_dim;
      if (run.is_start) std::fill_n(state, shape.key_dim * shape.value_dim, 0.0f);
      table.delta_rule({
          .update = DeltaRuleArgs::Update::add,
          .q = inputs.q + at,
          .k = inputs.k + at,
          .v = inputs.v + at,
          .stride = inputs.stride,
          .z = nullptr,
          .z_stride = 0,
          .decay = decay + head,
          .decay_stride = 0,
          .beta = &scale,
          .beta_stride = 0,
          .state = state,
          .out = out + (run.begin * heads + head) * shape.value_dim,
          .out_stride = shape.value_channels(),
          .norm = nullptr,
          .eps = 0.0f,
          .num_tokens = run.end - run.begin,
          .key_dim = shape.key_dim,
          .value_dim = shape.value_dim,
      });
    }
  });
}

}  // namespace argosy
