#include "ops/low_rank.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/low_rank_args.h"
#include "kernels/matmul_args.h"

namespace argosy {

namespace {

// Rows of `down` and tokens of an item. On tiles, the ranks of one pair should share what is split of x.
constexpr int64_t kRanks = 16, kDownTokens = 48;
constexpr int64_t kRows = 256, kUpTokens = 64;  // of an item of `up`

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Calls body(product, item of it, worker, before, after) for all items of all products, in one parallel loop.
// `before`: this worker has just had the item before; `after`: the product that it goes on with if this is
// the last item of one, otherwise nullptr.
template <class Items, class Body>
void for_items(Runtime& runtime, std::span<const LowRankProduct> products, const Items& items_of,
               const Body& body) {
  std::vector<int64_t> first = {0};
  int64_t work = 0;  // bytes of the pairs or twice the multiply-adds, whichever is more
  for (const LowRankProduct& product : products) {
    const auto [items, work_of_it] = items_of(product);
    first.push_back(first.back() + items);
    work += 2 * work_of_it;
  }
  if (first.back() == 0) return;
  runtime.parallel_for(first.back(), work / first.back(), [&](int64_t begin, int64_t end, int worker) {
    size_t index = size_t(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= first[index + 1]) ++index;
      size_t next = index;
      while (item + 1 < end && item + 1 >= first[next + 1]) ++next;
      body(products[index], item - first[index], worker, item > begin,
           next > index ? &products[next] : nullptr);
    }
  });
}

constexpr int64_t kMergedRows = 8;  // at once

double sum_of_squares(const float* values, int64_t count) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  for (int64_t i = 0; i < count / kSums * kSums; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += double(values[i + j]) * double(values[i + j]);
  for (int64_t i = count / kSums * kSums; i < count; ++i) sums[0] += double(values[i]) * double(values[i]);
  return std::accumulate(sums, sums + kSums, 0.0);
}

bool have_equal_inputs(const MatmulArgs& a, const MatmulArgs& b) {
  return a.x == b.x && a.x_stride == b.x_stride && a.x_index == b.x_index && a.num_tokens == b.num_tokens &&
         a.cols == b.cols && a.format == b.format;
}

}  // namespace

void low_rank_down(Runtime& runtime, std::span<const LowRankProduct> products) {
  if (products.empty()) return;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  std::vector<MatmulArgs> before(size_t(runtime.num_threads()));  // of each thread
  for_items(
      runtime, products,
      [](const LowRankProduct& product) {
        const int64_t items = blocks(product.pair.rank, kRanks) * blocks(product.num_tokens, kDownTokens);
        return std::pair(items, product.pair.rank * product.cols * product.num_tokens);
      },
      [&](const LowRankProduct& product, int64_t item, int worker, bool has_before,
          const LowRankProduct* after) {
        const LowRank& pair = product.pair;
        const int64_t rank_blocks = blocks(pair.rank, kRanks);
        const int64_t first = item / rank_blocks * kDownTokens, row = item % rank_blocks * kRanks;
        MatmulArgs args = {};
        args.format = pair.format;
        args.weights = pair.down;
        args.cols = product.cols;
        args.row_begin = row;
        args.row_end = std::min(row + kRanks, pair.rank);
        args.x = reinterpret_cast<const uint8_t*>(product.x);
        args.x_stride = product.x_stride * 4;
        args.x_index = product.x_index;
        args.y = product.t + row;
        args.y_stride = pair.rank;
        args = some_tokens(args, first, std::min(kDownTokens, product.num_tokens - first));
        args.tuning = runtime.tuning(pair.format);
        args.scratch = runtime.product_scratch(worker);
        args.next_weights = after != nullptr ? after->pair.down : nullptr;
        MatmulArgs& last = before[size_t(worker)];
        args.repeats_x = has_before && have_equal_inputs(args, last);
        last = args;
        table.matmul[int(pair.format)](args);
        for (int64_t i = 0; i < args.num_tokens; ++i) {
          float* t = args.y + i * pair.rank;
          for (int64_t j = 0; j < args.row_end - row; ++j) t[j] *= pair.scale;
        }
      });
}

void low_rank_up(Runtime& runtime, std::span<const LowRankProduct> products) {
  if (products.empty()) return;
  const auto lock = runtime.lock();
  for_items(
      runtime, products,
      [](const LowRankProduct& product) {
        const int64_t items = blocks(product.rows, kRows) * blocks(product.num_tokens, kUpTokens);
        return std::pair(product.pair.rank > 0 ? items : 0,
                         product.pair.rank * product.rows * product.num_tokens);
      },
      [&](const LowRankProduct& product, int64_t item, int, bool, const LowRankProduct*) {
        const int64_t row_blocks = blocks(product.rows, kRows);
        const int64_t first = item / row_blocks * kUpTokens, row = item % row_blocks * kRows;
        const int32_t* y_index = product.y_index != nullptr ? product.y_index + first : nullptr;
        float* y = product.y + row + (y_index != nullptr ? 0 : first * product.y_stride);
        add_low_rank_rows(runtime.kernels(), product, row, std::min(row + kRows, product.rows), first,
                          std::min(kUpTokens, product.num_tokens - first), y, product.y_stride, y_index);
      });
}

void add_low_rank_rows(const KernelTable& table, const LowRankProduct& product, int64_t row_begin,
                       int64_t row_end, int64_t first, int64_t count, float* y, int64_t y_stride,
                       const int32_t* y_index, const uint8_t* next) {
  table.add_low_rank({
      .format = product.pair.format,
      .up = product.pair.up,
      .up_cols = product.rows,
      .rank = product.pair.rank,
      .row_begin = row_begin,
      .row_end = row_end,
      .t = product.t + first * product.pair.rank,
      .t_stride = product.pair.rank,
      .y = y,
      .y_stride = y_stride,
      .y_index = y_index,
      .num_tokens = count,
      .next_weights = next,
  });
  if (product.pair.factors == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    multiply_by(product.pair.factors + row_begin, row_end - row_begin,
                y + y_stride * (y_index != nullptr ? y_index[i] : i));
  }
}

void merged_squares(const MatrixView& matrix, int64_t first, int64_t num_rows, const float* t,
                    const float* vectors, int64_t rank, double* of_rows, double* of_columns) {
  const KernelTable& table = best_kernels();
  std::vector<float> merged(static_cast<size_t>(kMergedRows * matrix.cols));
  for (int64_t begin = 0; begin < num_rows; begin += kMergedRows) {
    const int64_t count = std::min(kMergedRows, num_rows - begin);
    for (int64_t i = 0; i < count; ++i)
      dequantize_row(table, matrix, first + begin + i, merged.data() + i * matrix.cols);
    table.add_low_rank({
        .format = Format::f32,
        .up = reinterpret_cast<const uint8_t*>(vectors),
        .up_cols = matrix.cols,
        .rank = rank,
        .row_begin = 0,
        .row_end = matrix.cols,
        .t = t + begin * rank,
        .t_stride = rank,
        .y = merged.data(),
        .y_stride = matrix.cols,
        .y_index = nullptr,
        .num_tokens = count,
    });
    for (int64_t i = 0; i < count; ++i) {
      const float* row = merged.data() + i * matrix.cols;
      if (of_rows != nullptr) of_rows[begin + i] = sum_of_squares(row, matrix.cols);
      for (int64_t column = 0; of_columns != nullptr && column < matrix.cols; ++column)
        of_columns[column] += double(row[column]) * double(row[column]);
    }
  }
}

}  // namespace argosy
