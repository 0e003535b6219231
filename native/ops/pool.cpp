#include "ops/pool.h"

#include <algorithm>

#include "kernels/kernel_table.h"

namespace argosy {

namespace {

constexpr int64_t kBlockDims = 64;  // a thread's dimensions: whole cache lines

struct Entries {
  const StateRun* run;
  int64_t first;  // the number of the run's first entry among those of all runs
};

}  // namespace

void pool_tokens(Runtime& runtime, RecurrentState* state, int64_t layer, int64_t state_begin,
                 const PoolShape& shape, const PoolInputs& inputs, const std::vector<StateRun>& runs,
                 const PoolPositions& positions, PoolEntries& entries) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t tokens = positions.num_tokens, ratio = shape.ratio;
  const auto position_of = [&](int64_t token, int64_t axis) {
    return positions.angles != nullptr ? positions.angles[axis * tokens + token]
                                       : float(positions.order[token]);
  };
  entries.tokens.clear();
  for (int64_t token = 0; token < tokens; ++token) {
    if ((positions.order[token] + 1) % ratio == 0) entries.tokens.push_back(token);
  }
  const int64_t count = entries.count();
  if (ratio == 1) {
    for (int64_t token = 0; token < tokens; ++token) {
      std::copy_n(inputs.vectors + token * inputs.stride, shape.dim, entries.vectors + token * shape.dim);
      for (int64_t axis = 0; axis < positions.num_axes; ++axis)
        entries.positions[axis * count + token] = position_of(token, axis);
    }
    return;
  }
  std::vector<Entries> of_runs;
  int64_t at = 0;
  for (const StateRun& run : runs) {
    of_runs.push_back({&run, at});
    float* begins = state->matrices(run.slot, layer) + state_begin + shape.state_floats() - shape.kMostAxes;
    for (int64_t token = run.begin; token < run.end; ++token) {
      const int64_t within = positions.order[token] % ratio;
      for (int64_t axis = 0; axis < positions.num_axes; ++axis) {
        if (within == 0) begins[axis] = position_of(token, axis);
        if (within + 1 == ratio) entries.positions[axis * count + at] = begins[axis];
      }
      at += within + 1 == ratio ? 1 : 0;
    }
  }
  const int64_t blocks = (shape.dim + kBlockDims - 1) / kBlockDims;
  const int64_t work = 24 * tokens / std::max<int64_t>(1, int64_t(runs.size())) * kBlockDims;
  runtime.parallel_for(int64_t(runs.size()) * blocks, work, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const auto& [run, first] = of_runs[size_t(item / blocks)];
      const int64_t from = item % blocks * kBlockDims;
      table.pool({
          .vectors = inputs.vectors + run->begin * inputs.stride,
          .gates = inputs.gates != nullptr ? inputs.gates + run->begin * inputs.stride : nullptr,
          .stride = inputs.stride,
          .bias = inputs.bias,
          .num_tokens = run->end - run->begin,
          .position = positions.order[run->begin],
          .ratio = ratio,
          .dim = shape.dim,
          .has_overlap = shape.has_overlap,
          .begin = from,
          .end = std::min(from + kBlockDims, shape.dim),
          .state = state->matrices(run->slot, layer) + state_begin,
          .entries = entries.vectors + first * shape.dim,
      });
    }
  });
}

}  // namespace argosy
