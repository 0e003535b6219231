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

void quantize_tokens(Runtime& runtime, const float* x, int64_t x_stride, int64_t cols, int64_t num_tokens,
                     uint8_t* activations) {
  const KernelTable& table = runtime.kernels();
  runtime.parallel_for(num_tokens, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      table.quantize_activations(x + token * x_stride, cols, 0, num_groups(cols),
                                 activations + token * activation_bytes(cols));
    }
  });
}

int64_t matmul_scratch_bytes(int64_t cols, int64_t num_tokens) {
  return std::max(num_tokens * activation_bytes(cols), split_bytes(cols, num_tokens));
}

void matmul(Runtime& runtime, const std::vector<Product>& products, const float* x, int64_t num_tokens) {
  if (products.empty() || num_tokens == 0) return;
  const KernelTable& table = runtime.kernels();
  const int64_t cols = products[0].matrix.cols;
  const auto lock = runtime.lock();
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
    quantize_tokens(runtime, x, cols, cols, num_tokens, activations);
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

void embed(Runtime& runtime, const MatrixView& matrix, const int32_t* ids, int64_t num_tokens, float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, matrix.cols * 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      table.dequantize_row(matrix.format, matrix.data, matrix.cols, ids[token], out + token * matrix.cols);
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
    table.dequantize_row(matrix.format, matrix.data, matrix.cols, row, out + row * matrix.cols);
  }
}

}  // namespace argosy
