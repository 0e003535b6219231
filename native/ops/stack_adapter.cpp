#include "ops/stack_adapter.h"

#include <algorithm>
#include <span>

#include "kernels/low_rank_args.h"
#include "kernels/matmul_args.h"

namespace argosy {

namespace {

constexpr int64_t kBlockRows = 32;  // rows of a replacement per item
constexpr int64_t kScratchBytes = int64_t{256} << 10;
static_assert(kMostRank * 4 <= kScratchBytes);

// out[row] = W x[row], for some rows. Float formats take x as it is.
void multiply_some(Runtime& runtime, const MatrixView& matrix, std::span<const int32_t> rows, const float* x,
                   float* out) {
  const KernelTable& table = runtime.kernels();
  const int64_t num_rows = int64_t(rows.size());
  runtime.parallel_for((matrix.rows + kBlockRows - 1) / kBlockRows, kBlockRows * matrix.cols * num_rows,
                       [&](int64_t begin, int64_t end, int worker) {
                         table.matmul[int(matrix.format)]({
                             .format = matrix.format,
                             .weights = matrix.data,
                             .cols = matrix.cols,
                             .row_begin = begin * kBlockRows,
                             .row_end = std::min(end * kBlockRows, matrix.rows),
                             .x = reinterpret_cast<const uint8_t*>(x),
                             .x_stride = matrix.cols * 4,
                             .x_index = rows.data(),
                             .y = out + begin * kBlockRows,
                             .y_stride = matrix.rows,
                             .y_index = rows.data(),
                             .num_tokens = num_rows,
                             .tuning = runtime.tuning(matrix.format),
                             .scratch = runtime.product_scratch(worker),
                         });
                       },
                       runtime.blocks_together(kBlockRows));
}

// Adds pairs to products that may share x, for as many rows at a time as have room in scratch.
void add_pairs(Runtime& runtime, std::vector<LowRankProduct> pairs, std::span<const int32_t> rows) {
  int64_t ranks = 0;
  for (const LowRankProduct& product : pairs) ranks += product.pair.rank;
  const int64_t most = std::max<int64_t>(1, kScratchBytes / low_rank_bytes(1, ranks));
  auto* inner = reinterpret_cast<float*>(runtime.scratch(kScratchBytes));
  for (size_t first = 0; first < rows.size(); first += size_t(most)) {
    const auto some = rows.subspan(first, std::min(size_t(most), rows.size() - first));
    float* t = inner;
    for (LowRankProduct& product : pairs) {
      product.num_tokens = int64_t(some.size());
      product.x_index = product.y_index = some.data();
      product.t = std::exchange(t, t + product.num_tokens * product.pair.rank);
    }
    low_rank_down(runtime, pairs);
    low_rank_up(runtime, pairs);
  }
}

}  // namespace

int64_t adapter_scratch_bytes() { return kScratchBytes; }

void change_products(Runtime& runtime, const AdaptedRows& adapted, const std::vector<Product>& products,
                     const float* x) {
  const auto lock = runtime.lock();
  std::vector<LowRankProduct> pairs;
  int64_t ranks = 0;
  const auto add = [&] {
    if (!pairs.empty()) add_pairs(runtime, std::exchange(pairs, {}), adapted.rows);
    ranks = 0;
  };
  for (const Product& product : products) {
    const auto found = adapted.adapter->products.find(product.matrix.data);
    if (found == adapted.adapter->products.end()) continue;
    const ProductChange& change = found->second;
    const int64_t cols = product.matrix.cols;
    if (change.replacement) multiply_some(runtime, *change.replacement, adapted.rows, x, product.out);
    for (const auto& [pair, row_begin, num_rows] : change.pairs) {
      // One after another, if they change the same rows.
      const bool changes_last = &pair != &change.pairs[0].pair;
      if (changes_last || ranks + pair.rank > kMostRank) add();
      ranks += pair.rank;
      pairs.push_back({
          .pair = pair,
          .cols = cols,
          .rows = num_rows,
          .num_tokens = 0,
          .x = x,
          .x_stride = cols,
          .x_index = nullptr,
          .t = nullptr,
          .y = product.out + row_begin,
          .y_stride = product.matrix.rows,
          .y_index = nullptr,
      });
    }
  }
  add();
}

void change_embeddings(Runtime& runtime, const AdaptedRows& adapted, const int32_t* ids, int64_t hidden,
                       float* out) {
  const KernelTable& table = runtime.kernels();
  const StackAdapter& adapter = *adapted.adapter;
  const LowRank& pair = adapter.embedding;
  if (!adapter.replaced_embedding && pair.rank == 0) return;
  const auto lock = runtime.lock();
  const auto change = [&](int64_t begin, int64_t end, int) {
    std::vector<float> inner(static_cast<size_t>(pair.rank));
    for (int64_t i = begin; i < end; ++i) {
      const int32_t row = adapted.rows[size_t(i)];
      float* y = out + row * hidden;
      if (const auto& matrix = adapter.replaced_embedding)
        table.dequantize_row(matrix->format, matrix->data, hidden, ids[row], y);
      if (pair.rank == 0) continue;
      table.dequantize_row(pair.format, pair.down, pair.rank, ids[row], inner.data());
      for (float& t : inner) t *= pair.scale;
      table.add_low_rank({
          .format = pair.format,
          .up = pair.up,
          .up_cols = hidden,
          .rank = pair.rank,
          .row_begin = 0,
          .row_end = hidden,
          .t = inner.data(),
          .t_stride = pair.rank,
          .y = y,
          .y_stride = hidden,
          .y_index = nullptr,
          .num_tokens = 1,
      });
      if (pair.factors != nullptr) multiply_by(pair.factors, hidden, y);
      if (adapter.token_factors != nullptr) {
        for (int64_t column = 0; column < hidden; ++column) y[column] *= adapter.token_factors[ids[row]];
      }
    }
  };
  runtime.parallel_for(int64_t(adapted.rows.size()), hidden * (pair.rank + 4), change);
}

}  // namespace argosy
