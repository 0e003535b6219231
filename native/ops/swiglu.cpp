#include "ops/swiglu.h"

#include <algorithm>
#include <array>
#include <span>

#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/swiglu_args.h"

namespace argosy {

namespace {

constexpr int64_t kWidthBlock = 32;   // rows of gate and up per item: one group of the activations of down
constexpr int64_t kHiddenBlock = 64;  // rows of down per item
// Tokens whose gate and up outputs fit in a worker's scratch; if products split their activations, at most.
constexpr int64_t kTokenBlock = 48, kSplitTokenBlock = 128;

static_assert(kWidthBlock == kGroupSize);

// The input of a product: float32 rows, or the output of quantize_activations.
struct Activations {
  const float* floats;
  int64_t float_stride;  // in floats
  const uint8_t* quants;
  int64_t quant_stride;

  void give(Format format, MatmulArgs& args) const {
    args.format = format;
    args.x = is_quantized(format) ? quants : reinterpret_cast<const uint8_t*>(floats);
    args.x_stride = is_quantized(format) ? quant_stride : float_stride * 4;
  }
};

// Calls body(expert, block, count) for items [begin, end) of the row blocks of all experts: `count`
// consecutive blocks of one expert, at most longest(expert). It visits one expert after another, so that a
// thread reads consecutive weights.
template <class Longest, class Body>
void visit_blocks(int64_t blocks, int64_t begin, int64_t end, Longest&& longest, Body&& body) {
  while (begin < end) {
    const int64_t expert = begin / blocks;
    const int64_t block = begin % blocks;
    const int64_t count = std::max<int64_t>(1, std::min({end - begin, blocks - block, longest(expert)}));
    body(expert, block, count);
    begin += count;
  }
}

// Adds the bias to the rows and tokens that a product has just written.
void add_bias(const MatmulArgs& product, const float* bias) {
  for (int64_t token = 0; token < product.num_tokens; ++token) {
    float* y = product.y + product.y_stride * (product.y_index != nullptr ? product.y_index[token] : token);
    for (int64_t row = product.row_begin; row < product.row_end; ++row)
      y[row - product.row_begin] += bias[row];
  }
}

// The matrices of an expert, in their order in ExpertPairs.
constexpr size_t kGate = 0, kUp = 1, kDown = 2;

// Assignments that follow one another in one expert and have the same pairs.
struct PairedRun {
  int64_t first, count;                    // assignments
  std::array<LowRankProduct, 3> products;  // of gate, up and down
};

// The runs of these experts, ascending. Their products have no x, no t and no y yet.
std::vector<PairedRun> find_runs(std::span<const ExpertView> experts, const int32_t* starts,
                                 const ExpertPairs* const* pairs) {
  std::vector<PairedRun> runs;
  if (pairs == nullptr) return runs;
  for (size_t i = 0; i < experts.size(); ++i) {
    for (int64_t a = starts[i], end = a; a < starts[i + 1]; a = end) {
      while (end < starts[i + 1] && pairs[end] == pairs[a]) ++end;
      if (pairs[a] == nullptr) continue;
      const MatrixView &up = experts[i].up, &down = experts[i].down;
      const auto product_of = [&](const LowRank& pair, const MatrixView& matrix) {
        return LowRankProduct{.pair = pair, .cols = matrix.cols, .rows = matrix.rows, .num_tokens = end - a};
      };
      runs.push_back(
          {a,
           end - a,
           {product_of(pairs[a]->gate, up), product_of(pairs[a]->up, up), product_of(pairs[a]->down, down)}});
    }
  }
  return runs;
}

// A product of one expert whose first token is assignment a, and its pairs. The thread goes on with them if
// it has all their rows, and from there with what the caller reads next.
void multiply(const KernelTable& table, const std::vector<PairedRun>& runs, size_t matrix, int64_t a,
              MatmulArgs product) {
  const auto ends_before = [a](const PairedRun& run) { return run.first + run.count <= a; };
  auto run = std::partition_point(runs.begin(), runs.end(), ends_before);
  const auto overlaps = [&] { return run != runs.end() && run->first < a + product.num_tokens; };
  const uint8_t* next = product.next_weights;
  if (overlaps()) {
    const LowRankProduct& pairs = run->products[matrix];
    if (pairs.pair.rank > 0 && product.row_end - product.row_begin == pairs.rows)
      product.next_weights = pairs.pair.up;
  }
  table.matmul[int(product.format)](product);
  for (; overlaps(); ++run) {
    const int64_t begin = std::max(a, run->first);
    const int64_t end = std::min(a + product.num_tokens, run->first + run->count);
    const MatmulArgs some = some_tokens(product, begin - a, end - begin);
    add_low_rank_rows(table, run->products[matrix], some.row_begin, some.row_end, begin - run->first,
                      some.num_tokens, some.y, some.y_stride, some.y_index, next);
  }
}

constexpr int64_t kWorkerFloats = 2 * kSplitTokenBlock * kWidthBlock;  // gate and up outputs of a worker

// Where the parts of the scratch lie.
struct Scratch {
  ScratchLayout layout;
  int64_t x, ordered_x, inner_quants, inner_floats, of_pairs, workers;
};

struct Wanted {
  bool x_as_quants, inner_as_quants, inner_as_floats;
  int64_t num_ordered;  // assignments whose x is quantised in the orders of their experts
  int64_t pair_bytes;   // between the halves of the pairs
};

// The most assignments whose x is quantised in the orders of their experts at once, unless one has more.
constexpr int64_t kOrderedTogether = 64;
int64_t most_ordered(int64_t num_tokens, int64_t assignments) {
  return std::min(assignments, std::max(num_tokens, kOrderedTogether));
}

Scratch lay_out(int64_t hidden, int64_t width, int64_t num_tokens, int64_t assignments, int num_threads,
                const Wanted& wanted) {
  Scratch scratch = {};
  ScratchLayout& layout = scratch.layout;
  scratch.x = layout.add(wanted.x_as_quants ? num_tokens * activation_bytes(hidden) : 0);
  scratch.ordered_x = layout.add(2 * wanted.num_ordered * activation_bytes(hidden));
  scratch.inner_quants = layout.add(wanted.inner_as_quants ? assignments * activation_bytes(width) : 0);
  scratch.inner_floats = layout.add(wanted.inner_as_floats ? assignments * round_up(width, 16) * 4 : 0);
  scratch.of_pairs = layout.add(wanted.pair_bytes);
  scratch.workers = layout.add(num_threads * kWorkerFloats * 4);
  return scratch;
}

// The orders of the columns of an expert's matrices.
struct ExpertOrders {
  ColumnOrder gate, up, down;  // without a gate, `gate` is up's
  bool up_is_as_gate;

  explicit ExpertOrders(const ExpertView& expert)
      : gate(expert.first()), up(expert.up), down(expert.down), up_is_as_gate(gate == up) {}
};

// swiglu_experts() for some experts; `dispatch` is that of all, from the first of them on. The caller holds
// the lock.
void run_experts(Runtime& runtime, std::span<const ExpertView> experts, const Activation& activation,
                 const float* x, int64_t num_tokens, const Assignments& dispatch, float* out,
                 const ExpertPairs* const* pairs);

}  // namespace

int64_t swiglu_scratch_bytes(int64_t hidden, int64_t width, int64_t num_tokens, int64_t assignments,
                             int num_threads, bool has_quants, bool has_act_order, int64_t ranks) {
  // Experts of the same formats take either quants or floats between their products, and quants are larger.
  // With act-order or pairs they take both.
  const bool is_ordered = has_quants && has_act_order;
  const Wanted most = {.x_as_quants = has_quants,
                       .inner_as_quants = has_quants,
                       .inner_as_floats = !has_quants || is_ordered || ranks > 0,
                       .num_ordered = is_ordered ? most_ordered(num_tokens, assignments) : 0,
                       .pair_bytes = low_rank_bytes(assignments, ranks)};
  return lay_out(hidden, width, num_tokens, assignments, num_threads, most).layout.bytes();
}

void swiglu_experts(Runtime& runtime, const std::vector<ExpertView>& experts, const Activation& activation,
                    const float* x, int64_t num_tokens, const Assignments& dispatch, float* out,
                    const ExpertPairs* const* pairs) {
  const int64_t num_experts = int64_t(experts.size());
  const int64_t assignments = experts.empty() ? 0 : dispatch.starts[num_experts];
  if (assignments == 0) return;
  const auto lock = runtime.lock();
  const std::span<const ExpertView> all = experts;
  const auto run = [&](int64_t begin, int64_t end) {
    const Assignments of_these = {dispatch.starts + begin, dispatch.token, dispatch.row};
    run_experts(runtime, all.subspan(size_t(begin), size_t(end - begin)), activation, x, num_tokens, of_these,
                out, pairs);
  };
  const bool has_orders = std::any_of(experts.begin(), experts.end(), [](const ExpertView& expert) {
    return ColumnOrder(expert.first()) || ColumnOrder(expert.up);
  });
  if (!has_orders) return run(0, num_experts);
  const int64_t most = most_ordered(num_tokens, assignments);
  for (int64_t begin = 0; begin < num_experts;) {
    int64_t end = begin + 1;
    while (end < num_experts && dispatch.starts[end + 1] - dispatch.starts[begin] <= most) ++end;
    run(begin, end);
    begin = end;
  }
}

namespace {

void run_experts(Runtime& runtime, std::span<const ExpertView> experts, const Activation& activation,
                 const float* x, int64_t num_tokens, const Assignments& dispatch, float* out,
                 const ExpertPairs* const* pairs) {
  const int64_t num_experts = int64_t(experts.size());
  const int64_t first_assignment = dispatch.starts[0], end_assignment = dispatch.starts[num_experts];
  const int64_t assignments = end_assignment - first_assignment;
  if (assignments == 0) return;
  const KernelTable& table = runtime.kernels();
  const int64_t hidden = experts[0].up.cols;
  const int64_t width = experts[0].up.rows;
  const int64_t inner_stride = round_up(width, 16);
  Wanted wanted = {};
  bool orders_x = false, orders_inner = false;
  std::vector<ExpertOrders> orders;
  orders.reserve(experts.size());
  for (const ExpertView& expert : experts) {
    const ExpertOrders& own = orders.emplace_back(expert);
    orders_x |= own.gate || own.up;
    wanted.x_as_quants |= is_quantized(expert.first().format) && !own.gate;
    wanted.x_as_quants |= is_quantized(expert.up.format) && !own.up;
    wanted.inner_as_quants |= is_quantized(expert.down.format);
    wanted.inner_as_floats |= !is_quantized(expert.down.format) || own.down;
    orders_inner |= bool(own.down);
  }

  wanted.num_ordered = orders_x ? assignments : 0;
  std::vector<PairedRun> runs = find_runs(experts, dispatch.starts, pairs);
  bool keeps_inner = false;  // for the pairs of down
  for (const PairedRun& run : runs) {
    for (const LowRankProduct& product : run.products)
      wanted.pair_bytes += low_rank_bytes(run.count, product.pair.rank);
    keeps_inner |= run.products[kDown].pair.rank > 0;
  }
  wanted.inner_as_floats |= keeps_inner;
  const Scratch places = lay_out(hidden, width, num_tokens, end_assignment, runtime.num_threads(), wanted);
  uint8_t* scratch = runtime.scratch(places.layout.bytes());
  float* inner = reinterpret_cast<float*>(scratch + places.inner_floats);
  uint8_t* inner_quants = scratch + places.inner_quants;

  std::vector<LowRankProduct> beside_first, beside_down;
  float* t = reinterpret_cast<float*>(scratch + places.of_pairs);
  for (PairedRun& run : runs) {
    for (size_t i = kGate; i <= kDown; ++i) {
      LowRankProduct& product = run.products[i];
      if (product.pair.rank == 0) continue;
      product.t = t;
      t += run.count * product.pair.rank;
      product.x_stride = i == kDown ? inner_stride : hidden;
      product.x_index = i != kDown && dispatch.token != nullptr ? dispatch.token + run.first : nullptr;
      product.x = i == kDown ? inner : x;
      if (product.x_index == nullptr) product.x += run.first * product.x_stride;
      (i == kDown ? beside_down : beside_first).push_back(product);
    }
  }

  // The x of an assignment in the order of gate, and of up if that is the same.
  const auto ordered_x = [&](int64_t a, bool is_of_up) {
    return scratch + places.ordered_x + (2 * (a - first_assignment) + is_of_up) * activation_bytes(hidden);
  };
  // Calls body(assignment, expert) for all of them, in parallel.
  const auto for_assignments = [&](int64_t work, const auto& body) {
    runtime.parallel_for(assignments, work, [&](int64_t begin, int64_t end, int) {
      for (int64_t a = first_assignment + begin; a < first_assignment + end; ++a) {
        const int32_t* next =
            std::upper_bound(dispatch.starts, dispatch.starts + num_experts + 1, int32_t(a));
        body(a, next - dispatch.starts - 1);
      }
    });
  };

  if (wanted.x_as_quants) quantize_tokens(runtime, x, hidden, hidden, num_tokens, scratch + places.x);
  if (orders_x) {
    for_assignments(2 * hidden, [&](int64_t a, int64_t index) {
      const float* from = x + (dispatch.token != nullptr ? dispatch.token[a] : a) * hidden;
      const ExpertOrders& own = orders[size_t(index)];
      if (own.gate) quantize_token(table, from, hidden, ordered_x(a, false), own.gate);
      if (own.up && !own.up_is_as_gate) quantize_token(table, from, hidden, ordered_x(a, true), own.up);
    });
  }
  low_rank_down(runtime, beside_first);
  const Activations of_x = {x, hidden, scratch + places.x, activation_bytes(hidden)};
  const Activations of_inner = {inner, inner_stride, inner_quants, activation_bytes(width)};
  const int64_t mean_tokens = (assignments + num_experts - 1) / num_experts;
  // Splitting activations takes long, so a thread goes through all its rows with those that it keeps.
  // Otherwise it goes through all tokens with some rows.
  const bool splits = table.split_activations != nullptr;
  const int64_t token_block = splits ? std::min(most_split_tokens(hidden), kSplitTokenBlock) : kTokenBlock;

  // The weights that a thread reads next when the rows of this expert end before `row`. `matrix_of` returns
  // an expert's first matrix, or its down.
  const auto rows_after = [&](const auto& matrix_of, int64_t index, int64_t row) -> const uint8_t* {
    const MatrixView& matrix = matrix_of(experts[index]);
    if (row < matrix.rows) return rows_at(matrix, row);
    return index + 1 < num_experts ? rows_at(matrix_of(experts[index + 1]), 0) : nullptr;
  };

  const auto first_of = [](const ExpertView& expert) -> const MatrixView& { return expert.first(); };
  const auto down_of = [](const ExpertView& expert) -> const MatrixView& { return expert.down; };

  // Runs gate, up and the activation for some blocks of one expert's inner neurons and `count` of its tokens,
  // from assignment a on. There are few enough blocks that the outputs fit in the scratch. `is_next`: this
  // worker has just run other blocks of the same expert and tokens.
  const auto run_gate_up = [&](int64_t index, int64_t block, int64_t num_blocks, int64_t a, int64_t count,
                               int worker, bool is_next) {
    const ExpertView& expert = experts[index];
    const int64_t row = block * kWidthBlock;
    const int64_t rows = std::min(num_blocks * kWidthBlock, width - row);
    float* gate = reinterpret_cast<float*>(scratch + places.workers) + worker * kWorkerFloats;
    float* up = expert.gate ? gate + token_block * kWidthBlock : gate;
    const ExpertOrders& own = orders[size_t(index)];
    const auto run_product = [&](const MatrixView& matrix, const ColumnOrder& order, float* y,
                                 const uint8_t* next, bool repeats_x) {
      MatmulArgs args = {};
      of_x.give(matrix.format, args);
      args.weights = matrix.data;
      args.cols = hidden;
      args.row_begin = row;
      args.row_end = row + rows;
      if (order) {
        args.x = ordered_x(a, &order == &own.up && !own.up_is_as_gate);
        args.x_stride = 2 * activation_bytes(hidden);
      } else if (dispatch.token != nullptr) {
        args.x_index = dispatch.token + a;
      } else {
        args.x += a * args.x_stride;
      }
      args.y = y;
      args.y_stride = rows;
      args.num_tokens = count;
      args.next_weights = next;
      args.tuning = runtime.tuning(matrix.format);
      args.scratch = runtime.product_scratch(worker);
      args.repeats_x = repeats_x && expert.first().format == expert.up.format && own.up_is_as_gate;
      multiply(table, runs, &matrix == &expert.up ? kUp : kGate, a, args);
    };
    const bool reads_on = a == dispatch.starts[index];  // later tokens find the weights in the cache
    if (expert.gate)
      run_product(*expert.gate, own.gate, gate, reads_on ? rows_at(expert.up, row) : nullptr, is_next);
    run_product(expert.up, own.up, up, reads_on ? rows_after(first_of, index, row + rows) : nullptr,
                expert.gate || is_next);
    // Quantise activations while they are still in the cache; float32 activations are kept as they are, and
    // so are those that are quantised in another order, or that pairs read.
    const bool becomes_quants = is_quantized(expert.down.format) && !own.down;
    const bool is_kept = !becomes_quants || keeps_inner;
    float* activated = is_kept ? inner + a * inner_stride + row : gate;
    const int64_t activated_stride = is_kept ? inner_stride : rows;
    table.activate({
        .activation = activation,
        .gate = gate,
        .up = up,
        .gate_bias = expert.bias.gate != nullptr ? expert.bias.gate + row : nullptr,
        .up_bias = expert.bias.up != nullptr ? expert.bias.up + row : nullptr,
        .stride = rows,
        .num_tokens = count,
        .n = rows,
        .out = activated,
        .out_stride = activated_stride,
    });
    for (int64_t i = 0; i < count && becomes_quants; ++i) {
      table.quantize_activations(activated + i * activated_stride, width, block, block + num_blocks,
                                 inner_quants + (a + i) * activation_bytes(width));
    }
  };
  const int64_t width_blocks = round_up(width, kWidthBlock) / kWidthBlock;
  const auto most_blocks = [&](int64_t index) {
    const int64_t tokens = dispatch.starts[index + 1] - dispatch.starts[index];
    return splits ? INT64_MAX : token_block / std::max<int64_t>(tokens, 1);
  };
  runtime.parallel_for(
      num_experts * width_blocks, 2 * kWidthBlock * hidden * mean_tokens,
      [&](int64_t begin, int64_t end, int worker) {
        int64_t before = -1;  // the expert
        visit_blocks(width_blocks, begin, end, most_blocks, [&](int64_t index, int64_t block, int64_t count) {
          const int64_t first = dispatch.starts[index], last = dispatch.starts[index + 1];
          for (int64_t a = first; a < last; a += token_block) {
            const int64_t tokens = std::min(token_block, last - a);
            const int64_t fit = token_block / tokens;
            for (int64_t at = 0; at < count; at += fit) {
              const bool is_next = at > 0 || (index == before && last - first <= token_block);
              run_gate_up(index, block + at, std::min(fit, count - at), a, tokens, worker, is_next);
            }
          }
          before = index;
        });
      },
      runtime.blocks_together(kWidthBlock));

  if (orders_inner) {
    for_assignments(width, [&](int64_t a, int64_t index) {
      if (const ColumnOrder& order = orders[size_t(index)].down)
        quantize_token(table, inner + a * inner_stride, width, inner_quants + a * activation_bytes(width),
                       order);
    });
  }
  low_rank_down(runtime, beside_down);
  const auto run_down = [&](int64_t index, int64_t block, int64_t num_blocks, int worker) {
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
    args.next_weights = rows_after(down_of, index, args.row_end);
    args.tuning = runtime.tuning(down.format);
    args.scratch = runtime.product_scratch(worker);
    multiply(table, runs, kDown, a, args);
    if (const float* bias = experts[index].bias.down) add_bias(args, bias);
  };
  const int64_t hidden_blocks = round_up(hidden, kHiddenBlock) / kHiddenBlock;
  runtime.parallel_for(
      num_experts * hidden_blocks, kHiddenBlock * width * mean_tokens,
      [&](int64_t begin, int64_t end, int worker) {
        visit_blocks(
            hidden_blocks, begin, end, [](int64_t) { return INT64_MAX; },
            [&](int64_t expert, int64_t block, int64_t count) { run_down(expert, block, count, worker); });
      },
      runtime.blocks_together(kHiddenBlock));
}

}  // namespace
}  // namespace argosy
