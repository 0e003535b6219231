#include "ops/matmul.h"

#include <algorithm>

#include "kernels/half.h"
#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/transcode.h"

namespace argosy {

namespace {

constexpr int64_t kBlockRows = 32;  // two panels: one tile of rows

int64_t num_blocks(const MatrixView& matrix) { return round_up(matrix.rows, kBlockRows) / kBlockRows; }

// Splits the activations of all tokens, for products on tiles.
void split_tokens(Runtime& runtime, const float* x, int64_t cols, int64_t num_tokens, uint8_t* out) {
  constexpr int64_t kCols = 256;  // of an item
  const int64_t tiles = round_up(num_tokens, kSplitTokens) / kSplitTokens;
  const int64_t parts = round_up(cols, kCols) / kCols;
  runtime.parallel_for(tiles * parts, kSplitTokens * kCols, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts * kCols;
      runtime.kernels().split_activations({
          .x = x,
          .x_stride = cols,
          .num_tokens = num_tokens,
          .cols = cols,
          .tile = item / parts,
          .begin = first,
          .end = std::min(cols, first + kCols),
          .out = out,
      });
    }
  });
}

}  // namespace

const uint8_t* rows_at(const MatrixView& matrix, int64_t row) {
  if (!is_quantized(matrix.format)) return nullptr;
  return matrix.data + row / kPanelRows * panel_bytes(matrix.format, matrix.cols);
}

ColumnOrder::ColumnOrder(const MatrixView& matrix) : cols_(matrix.cols) {
  if (!has_act_order(matrix.format) || matrix.rows == 0 || matrix.cols == 0) return;
  const uint8_t* data = matrix.data + panels_bytes(matrix.format, matrix.rows, matrix.cols);
  if (read_unaligned<int32_t>(data) >= 0) data_ = data;
}

bool ColumnOrder::operator==(const ColumnOrder& other) const {
  if (data_ == nullptr || other.data_ == nullptr) return data_ == other.data_;
  return cols_ == other.cols_ && std::memcmp(data_, other.data_, size_t(cols_) * 4) == 0;
}

int64_t ColumnOrder::column(int64_t i) const {
  return std::min(int64_t{read_unaligned<uint32_t>(data_ + 4 * i)}, cols_ - 1);
}

void quantize_token(const KernelTable& table, const float* x, int64_t cols, uint8_t* activations,
                    const ColumnOrder& order) {
  if (!order) return table.quantize_activations(x, cols, 0, num_groups(cols), activations);
  constexpr int64_t kGroups = 16;
  float in_order[kGroups * kGroupSize];
  for (int64_t group = 0; group < num_groups(cols); group += kGroups) {
    const int64_t end = std::min(group + kGroups, num_groups(cols));
    for (int64_t i = group * kGroupSize; i < std::min(end * kGroupSize, cols); ++i)
      in_order[i - group * kGroupSize] = x[order.column(i)];
    table.quantize_activations(in_order, cols, group, end, activations);
  }
}

void quantize_tokens(Runtime& runtime, const float* x, int64_t x_stride, int64_t cols, int64_t num_tokens,
                     uint8_t* activations, const ColumnOrder& order) {
  const KernelTable& table = runtime.kernels();
  runtime.parallel_for(num_tokens, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      quantize_token(table, x + token * x_stride, cols, activations + token * activation_bytes(cols), order);
    }
  });
}

int64_t matmul_scratch_bytes(int64_t cols, int64_t num_tokens) {
  return std::max(num_tokens * activation_bytes(cols), split_bytes(cols, num_tokens));
}

namespace {

// matmul() of matrices whose columns have the same order. The caller holds the lock.
void multiply(Runtime& runtime, const std::vector<Product>& products, const ColumnOrder& order,
              const float* x, int64_t num_tokens) {
  const KernelTable& table = runtime.kernels();
  const int64_t cols = products[0].matrix.cols;
  std::vector<int64_t> first_block = {0};
  bool quantizes = false, splits = false;
  for (const Product& product : products) {
    first_block.push_back(first_block.back() + num_blocks(product.matrix));
    quantizes |= is_quantized(product.matrix.format);
    splits |= table.split_activations != nullptr && splits_activations(product.matrix.format);
  }
  // If both kinds of weights are there, which is rare, each thread splits the activations itself.
  splits &= !quantizes;
  uint8_t* activations = nullptr;
  if (quantizes) {
    activations = runtime.scratch(num_tokens * activation_bytes(cols));
    quantize_tokens(runtime, x, cols, cols, num_tokens, activations, order);
  } else if (splits) {
    activations = runtime.scratch(split_bytes(cols, num_tokens));
    split_tokens(runtime, x, cols, num_tokens, activations);
  }
  // Of the product before, for each thread: what a thread copies of the activations serves all its ranges.
  std::vector<Format> formats(size_t(runtime.num_threads()), Format::f32);
  runtime.parallel_for(
      first_block.back(), kBlockRows * cols * num_tokens,
      [&](int64_t begin, int64_t end, int worker) {
        Format& before = formats[size_t(worker)];
        for (size_t i = 0; i < products.size(); ++i) {
          const MatrixView& matrix = products[i].matrix;
          const int64_t row_begin = (std::max(begin, first_block[i]) - first_block[i]) * kBlockRows;
          const int64_t row_end =
              std::min((std::min(end, first_block[i + 1]) - first_block[i]) * kBlockRows, matrix.rows);
          if (row_begin >= row_end) continue;
          const bool quantized = is_quantized(matrix.format);
          // After the last row, the thread continues with the next matrix.
          const uint8_t* next = nullptr;
          if (row_end < matrix.rows) {
            next = rows_at(matrix, row_end);
          } else if (i + 1 < products.size()) {
            next = rows_at(products[i + 1].matrix, 0);
          }
          table.matmul[int(matrix.format)]({
              .format = matrix.format,
              .weights = matrix.data,
              .cols = cols,
              .row_begin = row_begin,
              .row_end = row_end,
              .x = quantized ? activations : reinterpret_cast<const uint8_t*>(x),
              .x_stride = quantized ? activation_bytes(cols) : cols * 4,
              .x_index = nullptr,
              .y = products[i].out + row_begin,
              .y_stride = matrix.rows,
              .y_index = nullptr,
              .num_tokens = num_tokens,
              .next_weights = next,
              .tuning = runtime.tuning(matrix.format),
              .scratch = runtime.product_scratch(worker),
              .split_x = splits ? activations : nullptr,
              .repeats_x = matrix.format == before,
          });
          before = matrix.format;
        }
      },
      runtime.blocks_together(kBlockRows));
}

}  // namespace

void dequantize_row(const KernelTable& table, const MatrixView& matrix, int64_t row, float* out) {
  table.dequantize_row(matrix.format, matrix.data, matrix.cols, row, out);
  const ColumnOrder order(matrix);
  if (!order) return;
  const std::vector<float> in_order(out, out + matrix.cols);
  for (int64_t i = 0; i < matrix.cols; ++i) out[order.column(i)] = in_order[size_t(i)];
}

void matmul(Runtime& runtime, const std::vector<Product>& products, const float* x, int64_t num_tokens) {
  if (products.empty() || num_tokens == 0) return;
  const auto lock = runtime.lock();
  const auto has_order = [](const Product& product) { return bool(ColumnOrder(product.matrix)); };
  if (std::none_of(products.begin(), products.end(), has_order))
    return multiply(runtime, products, {}, x, num_tokens);
  std::vector<Product> rest = products;
  while (!rest.empty()) {
    const ColumnOrder order(rest[0].matrix);
    const auto first = std::stable_partition(rest.begin(), rest.end(), [&](const Product& product) {
      return !(ColumnOrder(product.matrix) == order);
    });
    multiply(runtime, {first, rest.end()}, order, x, num_tokens);
    rest.erase(first, rest.end());
  }
}

void embed(Runtime& runtime, const MatrixView& matrix, const int32_t* ids, int64_t num_tokens, float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, matrix.cols * 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      dequantize_row(table, matrix, ids[token], out + token * matrix.cols);
    }
  });
}

void quantize(Runtime* runtime, Format format, const float* weights, int64_t rows, int64_t cols,
              uint8_t* out) {
  const KernelTable& table = runtime != nullptr ? runtime->kernels() : best_kernels();
  if (is_quantized(format)) {
    const auto quantize_panels = format == Format::q8 ? table.quantize_q8 : table.quantize_q4;
    const int64_t panels = round_up(rows, kPanelRows) / kPanelRows;
    const auto body = [&](int64_t begin, int64_t end, int) {
      quantize_panels(weights, rows, cols, begin, end, out);
    };
    if (runtime == nullptr) return body(0, panels, 0);
    const auto lock = runtime->lock();
    return runtime->parallel_for(panels, kPanelRows * cols * 8, body);
  }
  const int64_t size = rows * cols;
  if (format == Format::f32) {
    if (size > 0) std::memcpy(out, weights, size_t(size) * 4);
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const uint16_t bits = format == Format::f16 ? f16_from_float(weights[i]) : bf16_from_float(weights[i]);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

void dequantize(const MatrixView& matrix, float* out) {
  const KernelTable& table = best_kernels();
  for (int64_t row = 0; row < matrix.rows; ++row) {
    dequantize_row(table, matrix, row, out + row * matrix.cols);
  }
}

}  // namespace argosy
