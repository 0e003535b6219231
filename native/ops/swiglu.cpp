#include "ops/swiglu.h"

#include <algorithm>

#include "kernels/kernel_table.h"

namespace argosy {

namespace {

constexpr int64_t kWidthBlock = 32;   // rows of gate and up in one item: a group of the activations of down
constexpr int64_t kHiddenBlock = 64;  // rows of down in one item
constexpr int64_t kTokenBlock = 48;   // tokens whose gate and up outputs wait in a worker's scratch

static_assert(kWidthBlock == kGroupSize);

// x of a matrix: float32 rows, or what quantize_activations made of them.
struct Activations {
  const float* floats;
  int64_t float_stride;  // in floats
  const uint8_t* quants;
  int64_t quant_stride;

  void give(Format format, MatmulArgs& args) const {
    args.x = is_quantized(format) ? quants : reinterpret_cast<const uint8_t*>(floats);
    args.x_stride = is_quantized(format) ? quant_stride : float_stride * 4;
  }
};

bool wants_quants(const std::vector<ExpertView>& experts, MatrixView ExpertView::* matrix) {
  return std::any_of(experts.begin(), experts.end(),
                     [&](const ExpertView& expert) { return is_quantized((expert.*matrix).format); });
}

}  // namespace

void swiglu_experts(Runtime& runtime, const std::vector<ExpertView>& experts, const float* x,
                    int64_t num_tokens, const Dispatch& dispatch, float* out) {
  const int64_t num_experts = int64_t(experts.size());
  const int64_t assignments = experts.empty() ? 0 : dispatch.starts[num_experts];
  if (assignments == 0) return;
  const KernelTable& table = kernels();
  const int64_t hidden = experts[0].gate.cols;
  const int64_t width = experts[0].gate.rows;
  const int64_t inner_stride = round_up(width, 16);
  const bool x_as_quants = wants_quants(experts, &ExpertView::gate) || wants_quants(experts, &ExpertView::up);
  const bool inner_as_quants = wants_quants(experts, &ExpertView::down);

  const auto lock = runtime.lock();
  ScratchLayout layout;
  const int64_t x_at = layout.add(x_as_quants ? num_tokens * activation_bytes(hidden) : 0);
  const int64_t quants_at = layout.add(inner_as_quants ? assignments * activation_bytes(width) : 0);
  const int64_t floats_at = layout.add(assignments * inner_stride * 4);
  const int64_t worker_floats = 2 * kTokenBlock * kWidthBlock;
  const int64_t workers_at = layout.add(runtime.num_threads() * worker_floats * 4);
  uint8_t* scratch = runtime.scratch(layout.bytes());
  float* inner = reinterpret_cast<float*>(scratch + floats_at);
  uint8_t* inner_quants = scratch + quants_at;

  if (x_as_quants) quantize_tokens(runtime, x, hidden, num_tokens, scratch + x_at);
  const Activations of_x = {x, hidden, scratch + x_at, activation_bytes(hidden)};
  const Activations of_inner = {inner, inner_stride, inner_quants, activation_bytes(width)};
  const int64_t mean_tokens = assignments / num_experts + 1;

  // Gate, up and what lies between, for 32 of one expert's inner neurons.
  const int64_t width_blocks = round_up(width, kWidthBlock) / kWidthBlock;
  const auto run_gate_up = [&](int64_t item, int worker) {
    const int64_t index = item / width_blocks;
    const ExpertView& expert = experts[index];
    const int64_t row = item % width_blocks * kWidthBlock;
    const int64_t rows = std::min(kWidthBlock, width - row);
    float* gate = reinterpret_cast<float*>(scratch + workers_at) + worker * worker_floats;
    float* up = gate + kTokenBlock * kWidthBlock;
    for (int64_t a = dispatch.starts[index]; a < dispatch.starts[index + 1]; a += kTokenBlock) {
      const int64_t count = std::min<int64_t>(kTokenBlock, dispatch.starts[index + 1] - a);
      const auto multiply = [&](const MatrixView& matrix, float* y) {
        MatmulArgs args = {};
        of_x.give(matrix.format, args);
        args.weights = matrix.data;
        args.cols = hidden;
        args.row_begin = row;
        args.row_end = row + rows;
        if (dispatch.token != nullptr) {
          args.x_index = dispatch.token + a;
        } else {
          args.x += a * args.x_stride;
        }
        args.y = y;
        args.y_stride = kWidthBlock;
        args.num_tokens = count;
        table.matmul[int(matrix.format)](args);
      };
      multiply(expert.gate, gate);
      multiply(expert.up, up);
      for (int64_t i = 0; i < count; ++i) {
        float* to = inner + (a + i) * inner_stride + row;
        table.silu_mul(gate + i * kWidthBlock, up + i * kWidthBlock, rows, to);
        if (is_quantized(expert.down.format)) {
          const int64_t group = row / kGroupSize;
          table.quantize_activations(to, width, group, group + 1,
                                     inner_quants + (a + i) * activation_bytes(width));
        }
      }
    }
  };
  runtime.parallel_for(num_experts * width_blocks, 2 * kWidthBlock * hidden * mean_tokens,
                       [&](int64_t begin, int64_t end, int worker) {
                         for (int64_t item = begin; item < end; ++item) run_gate_up(item, worker);
                       });

  const int64_t hidden_blocks = round_up(hidden, kHiddenBlock) / kHiddenBlock;
  const auto run_down = [&](int64_t item) {
    const int64_t index = item / hidden_blocks;
    const MatrixView& down = experts[index].down;
    const int64_t row = item % hidden_blocks * kHiddenBlock;
    const int64_t a = dispatch.starts[index];
    MatmulArgs args = {};
    of_inner.give(down.format, args);
    args.weights = down.data;
    args.cols = width;
    args.row_begin = row;
    args.row_end = std::min(row + kHiddenBlock, hidden);
    args.x += a * args.x_stride;
    args.y = out + row;
    args.y_stride = hidden;
    if (dispatch.row != nullptr) {
      args.y_index = dispatch.row + a;
    } else {
      args.y += a * hidden;
    }
    args.num_tokens = dispatch.starts[index + 1] - a;
    if (args.num_tokens > 0) table.matmul[int(down.format)](args);
  };
  runtime.parallel_for(num_experts * hidden_blocks, kHiddenBlock * width * mean_tokens,
                       [&](int64_t begin, int64_t end, int) {
                         for (int64_t item = begin; item < end; ++item) run_down(item);
                       });
}

}  // namespace argosy
