// matmul.h: products with weights, for a whole batch.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/runtime.h"

namespace argosy {

struct MatrixView {
  Format format;
  const uint8_t* data;
  int64_t rows, cols;
};

// The panel that holds a row; null if the format has no panels.
const uint8_t* rows_at(const MatrixView& matrix, int64_t row);

// The order of the columns of a matrix in its panels; false if they are in their places.
class ColumnOrder {
 public:
  ColumnOrder() = default;
  explicit ColumnOrder(const MatrixView& matrix);
  explicit operator bool() const { return data_ != nullptr; }
  bool operator==(const ColumnOrder& other) const;
  // The column that is number i of the panels. Whatever the memory holds, it is less than cols.
  int64_t column(int64_t i) const;

 private:
  const uint8_t* data_ = nullptr;
  int64_t cols_ = 0;
};

// out[t][r] = sum over c of W[r][c] * x[t][c]
struct Product {
  MatrixView matrix;
  float* out;  // [num_tokens][matrix.rows]
};

// Multiplies x float32 [num_tokens][cols] by several matrices with the same number of columns: x is quantised
// once, or split once for tiles, and all products share one parallel loop. Matrices whose columns are in
// another order have a loop of their own, or share it with those of the same order.
void matmul(Runtime& runtime, const std::vector<Product>& products, const float* x, int64_t num_tokens);

// The most runtime scratch that matmul takes for matrices with this many columns.
int64_t matmul_scratch_bytes(int64_t cols, int64_t num_tokens);

// A row of the matrix as float32.
void dequantize_row(const KernelTable& table, const MatrixView& matrix, int64_t row, float* out);

// out[t] = row ids[t] of the matrix, as float32. All ids must be in range.
void embed(Runtime& runtime, const MatrixView& matrix, const int32_t* ids, int64_t num_tokens, float* out);

// `out` holds matrix_bytes(format, rows, cols). Without a runtime, runs on the calling thread, with
// best_kernels(). Every instruction set quantises and dequantises to the same bits.
void quantize(Runtime* runtime, Format format, const float* weights, int64_t rows, int64_t cols,
              uint8_t* out);
void dequantize(const MatrixView& matrix, float* out);

// Quantises the activations of num_tokens tokens to int8, in the order of a matrix's columns. Rows of x are
// x_stride floats apart, rows of `activations` activation_bytes(cols). The caller holds the lock.
void quantize_tokens(Runtime& runtime, const float* x, int64_t x_stride, int64_t cols, int64_t num_tokens,
                     uint8_t* activations, const ColumnOrder& order = {});
// The same for one token, on the calling thread.
void quantize_token(const KernelTable& table, const float* x, int64_t cols, uint8_t* activations,
                    const ColumnOrder& order);

}  // namespace argosy
