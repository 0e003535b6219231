#include "ops/swiglu.h"

#include <algorithm>

#include "kernels/kernel_table.h"

namespace argosy {

namespace {

constexpr int64_t kWidthBlock = 32;   // rows of gate and up in one item: a group of the activations of down
constexpr int64_t kHiddenBlock = 64;  // rows of down in one item
constexpr int64_t kTokenBlock = 48;   // tokens whose gate and up outputs wait in a worker's scratch
constexpr int64_t kManyTokens =
    8;  // of an expert, from which on its activations weigh as much as its weights

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

// The order in which threads get the blocks of rows of the experts. With few tokens: one expert after the
// other, so that a thread reads weights that follow each other. With many: as many experts side by side as
// there are threads, so that each keeps the activations of one in its cache, and no two write to the same
// lines.
class BlockOrder {
 public:
  BlockOrder(int64_t num_experts, int64_t blocks, int64_t side_by_side)
      : num_experts_(num_experts), blocks_(blocks), side_by_side_(side_by_side) {}

  int64_t size() const { return num_experts_ * blocks_; }

  // body(expert, block, count) for items [begin, end): `count` blocks of the expert that follow each other,
  // at most longest(expert).
  template <class Longest, class Body>
  void visit(int64_t begin, int64_t end, Longest&& longest, Body&& body) const {
    while (begin < end) {
      const int64_t first = begin / (side_by_side_ * blocks_) * side_by_side_;
      const int64_t beside = std::min(side_by_side_, num_experts_ - first);
      const int64_t within = begin - first * blocks_;
      const int64_t expert = first + within % beside;
      const int64_t block = within / beside;
      int64_t count = 1;
      if (beside == 1) count = std::max(count, std::min({end - begin, blocks_ - block, longest(expert)}));
      body(expert, block, count);
      begin += count;
    }
  }

 private:
  int64_t num_experts_, blocks_, side_by_side_;
};

// To the rows and tokens that a product has just written.
void add_bias(const MatmulArgs& product, const float* bias) {
  for (int64_t token = 0; token < product.num_tokens; ++token) {
    float* y = product.y + product.y_stride * (product.y_index != nullptr ? product.y_index[token] : token);
    for (int64_t row = product.row_begin; row < product.row_end; ++row)
      y[row - product.row_begin] += bias[row];
  }
}

bool wants_quants(const std::vector<ExpertView>& experts, MatrixView ExpertView::* matrix) {
  return std::any_of(experts.begin(), experts.end(),
                     [&](const ExpertView& expert) { return is_quantized((expert.*matrix).format); });
}

}  // namespace

void swiglu_experts(Runtime& runtime, const std::vector<ExpertView>& experts, const Activation& activation,
                    const float* x, int64_t num_tokens, const Dispatch& dispatch, float* out) {
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
  const int64_t mean_tokens = (assignments + num_experts - 1) / num_experts;

  const int64_t side_by_side = mean_tokens < kManyTokens ? 1 : runtime.num_threads();

  // Gate, up and what lies between, for some blocks of one expert's inner neurons: so many that the outputs
  // of its tokens fit the scratch.
  const auto run_gate_up = [&](int64_t index, int64_t block, int64_t num_blocks, int worker) {
    const ExpertView& expert = experts[index];
    const int64_t row = block * kWidthBlock;
    const int64_t rows = std::min(num_blocks * kWidthBlock, width - row);
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
        args.y_stride = num_blocks * kWidthBlock;
        args.num_tokens = count;
        table.matmul[int(matrix.format)](args);
      };
      multiply(expert.gate, gate);
      multiply(expert.up, up);
      table.activate({
          .activation = activation,
          .gate = gate,
          .up = up,
          .gate_bias = expert.bias.gate != nullptr ? expert.bias.gate + row : nullptr,
          .up_bias = expert.bias.up != nullptr ? expert.bias.up + row : nullptr,
          .stride = num_blocks * kWidthBlock,
          .num_tokens = count,
          .n = rows,
          .out = inner + a * inner_stride + row,
          .out_stride = inner_stride,
      });
      for (int64_t i = 0; i < count && is_quantized(expert.down.format); ++i) {
        table.quantize_activations(inner + (a + i) * inner_stride + row, width, block, block + num_blocks,
                                   inner_quants + (a + i) * activation_bytes(width));
      }
    }
  };
  const BlockOrder of_width(num_experts, round_up(width, kWidthBlock) / kWidthBlock, side_by_side);
  const auto most_blocks = [&](int64_t index) {
    const int64_t tokens = dispatch.starts[index + 1] - dispatch.starts[index];
    return kTokenBlock / std::max<int64_t>(tokens, 1);
  };
  runtime.parallel_for(
      of_width.size(), 2 * kWidthBlock * hidden * mean_tokens, [&](int64_t begin, int64_t end, int worker) {
        of_width.visit(begin, end, most_blocks, [&](int64_t expert, int64_t block, int64_t count) {
          run_gate_up(expert, block, count, worker);
        });
      });

  const auto run_down = [&](int64_t index, int64_t block, int64_t num_blocks) {
    const MatrixView& down = experts[index].down;
    const int64_t row = block * kHiddenBlock;
    const int64_t a = dispatch.starts[index];
    MatmulArgs args = {};
    of_inner.give(down.format, args);
    args.weights = down.data;
    args.cols = width;
    args.row_begin = row;
    args.row_end = std::min(row + num_blocks * kHiddenBlock, hidden);
    args.x += a * args.x_stride;
    args.y = out + row;
    args.y_stride = hidden;
    if (dispatch.row != nullptr) {
      args.y_index = dispatch.row + a;
    } else {
      args.y += a * hidden;
    }
    args.num_tokens = dispatch.starts[index + 1] - a;
    if (args.num_tokens == 0) return;
    table.matmul[int(down.format)](args);
    if (const float* bias = experts[index].bias.down) add_bias(args, bias);
  };
  const BlockOrder of_hidden(num_experts, round_up(hidden, kHiddenBlock) / kHiddenBlock, side_by_side);
  runtime.parallel_for(of_hidden.size(), kHiddenBlock * width * mean_tokens,
                       [&](int64_t begin, int64_t end, int) {
                         of_hidden.visit(begin, end, [](int64_t) { return INT64_MAX; }, run_down);
                       });
}

}  // namespace argosy
