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

// out[t][r] = sum over c of W[r][c] * x[t][c]
struct Product {
  MatrixView matrix;
  float* out;  // [num_tokens][matrix.rows]
};

// Multiplies x float32 [num_tokens][cols] by several matrices with the same number of columns: x is quantised
// once, or split once for tiles, and all products share one parallel loop.
void matmul(Runtime& runtime, const std::vector<Product>& products, const float* x, int64_t num_tokens);

// The most runtime scratch that matmul takes for matrices with this many columns.
int64_t matmul_scratch_bytes(int64_t cols, int64_t num_tokens);

// out[t] = row ids[t] of the matrix, as float32. All ids must be in range.
void embed(Runtime& runtime, const MatrixView& matrix, const int32_t* ids, int64_t num_tokens, float* out);

// `out` holds matrix_bytes(format, rows, cols). Without a runtime, runs on the calling thread, with
// best_kernels(). Every instruction set quantises and dequantises to the same bits.
void quantize(Runtime* runtime, Format format, const float* weights, int64_t rows, int64_t cols,
              uint8_t* out);
void dequantize(const MatrixView& matrix, float* out);

// Quantises the activations of num_tokens tokens to int8. Rows of x are x_stride floats apart, rows of
// `activations` activation_bytes(cols). The caller holds the lock.
void quantize_tokens(Runtime& runtime, const float* x, int64_t x_stride, int64_t cols, int64_t num_tokens,
                     uint8_t* activations);

}  // namespace argosy
