#include "ops/causal_conv.h"

#include <algorithm>

#include "kernels/causal_conv_args.h"
#include "ops/checked_size.h"

namespace argosy {

int64_t CausalConv::window_floats(int64_t channels, int64_t width) {
  return checked_product("a convolution", {4, channels, width}) / 4 - channels;
}

void causal_conv(Runtime& runtime, RecurrentState& state, int64_t layer, const CausalConv& conv,
                 const ConvInputs& inputs, const std::vector<StateRun>& runs, Rows<float> out) {
  // A cache line or more of each token, and a window that stays in the first-level cache.
  constexpr int64_t kBlock = 128;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t num_runs = int64_t(runs.size()), blocks = (conv.channels + kBlock - 1) / kBlock;
  int64_t num_tokens = 0;
  for (const StateRun& run : runs) num_tokens += run.end - run.begin;
  const int64_t work = num_tokens / std::max<int64_t>(num_runs, 1) * kBlock * (conv.width + 16);
  runtime.parallel_for(num_runs * blocks, work, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const StateRun& run = runs[size_t(item / blocks)];
      const int64_t channel = item % blocks * kBlock, channels = std::min(kBlock, conv.channels - channel);
      const int64_t at = run.begin * inputs.stride + channel;
      float* window = state.window(run.slot, layer) + channel;
      for (int64_t j = 0; run.is_start && j + 1 < conv.width; ++j)
        std::fill_n(window + j * conv.channels, channels, 0.0f);
      table.causal_conv({
          .x = inputs.x + at,
          .x_stride = inputs.stride,
          .in_gate = inputs.in_gate != nullptr ? inputs.in_gate + at : nullptr,
          .out_gate = inputs.out_gate != nullptr ? inputs.out_gate + at : nullptr,
          .weights = conv.weights + channel,
          .bias = conv.bias != nullptr ? conv.bias + channel : nullptr,
          .window = window,
          .out = out.data + run.begin * out.stride + channel,
          .out_stride = out.stride,
          .stride = conv.channels,
          .width = conv.width,
          .channels = channels,
          .num_tokens = run.end - run.begin,
          .length = 0.0f,
          .eps = 0.0f,
      });
    }
  });
}

}  // namespace argosy
