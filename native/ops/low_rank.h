// low_rank.h: low-rank pairs beside products with packed weights (LoRA, arXiv:2106.09685).
//
//   y = W x + scale * up^T (down x)
//
//   low_rank_down(runtime, products);          // t = scale * (down x), in one parallel loop
//   ...                                        // y = W x, before or after
//   low_rank_up(runtime, products);            // y += up^T t, in one parallel loop
//
// W stays as it is packed; nothing is merged. `down` is the paper's A, `up` its B transposed: both are read
// row by row. The order of sums: down x as any product with a float format; then, for each element of y in
// turn, y += t[0] up[0] + t[1] up[1] + ... in ascending order, t = scale * (down x). So bits depend neither
// on the other tokens nor on the threads.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/formats.h"
#include "ops/matmul.h"
#include "ops/runtime.h"

namespace argosy {

struct LowRank {
  Format format = Format::f32;    // f32, f16 or bf16
  const uint8_t* down = nullptr;  // [rank][columns of W]
  const uint8_t* up = nullptr;    // [rank][rows of W that change]
  int64_t rank = 0;               // 0: there is no pair
  float scale = 1;
  // [rows of W that change]: then y of each is multiplied by its factor (DoRA, arXiv:2402.09353); nullptr:
  // no.
  const float* factors = nullptr;
};

// The pairs of an expert, or of a dense network.
struct ExpertPairs {
  LowRank gate, up, down;
};

// A pair beside the product of some tokens. Token i reads x + x_stride * (x_index ? x_index[i] : i) and
// changes y + y_stride * (y_index ? y_index[i] : i); strides are in floats.
struct LowRankProduct {
  LowRank pair = {};
  int64_t cols = 0, rows = 0;  // of `down`, of `up`
  int64_t num_tokens = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const int32_t* x_index = nullptr;
  float* t = nullptr;  // [num_tokens][pair.rank], the caller's memory between the halves: low_rank_bytes()
  float* y = nullptr;  // the first of the rows of W that change
  int64_t y_stride = 0;
  const int32_t* y_index = nullptr;
};

// Neither takes scratch of the runtime. Products whose x, x_index, tokens and format are equal should follow
// one another.
void low_rank_down(Runtime& runtime, std::span<const LowRankProduct> products);
void low_rank_up(Runtime& runtime, std::span<const LowRankProduct> products);

// The second half for rows [row_begin, row_end) and some of the tokens: `count` from `first` on. Token i of
// them changes y + y_stride * (y_index ? y_index[i] : i), where its element row_begin begins. For loops of
// callers; `next`: what the caller reads next.
void add_low_rank_rows(const KernelTable& table, const LowRankProduct& product, int64_t row_begin,
                       int64_t row_end, int64_t first, int64_t count, float* y, int64_t y_stride,
                       const int32_t* y_index, const uint8_t* next = nullptr);

// y *= factors, both [count].
inline void multiply_by(const float* factors, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] *= factors[i];
}

// Sums of squares of rows [first, first + num_rows) of W + t vectors: t [num_rows][rank], vectors
// [rank][columns of W]. `of_rows` [num_rows] is written, `of_columns` [columns of W] is added to; nullptr:
// not wanted. Runs on the calling thread, and takes memory for a few rows. The bits depend on nothing else.
void merged_squares(const MatrixView& matrix, int64_t first, int64_t num_rows, const float* t,
                    const float* vectors, int64_t rank, double* of_rows, double* of_columns);

// Bytes of `t` for this many tokens, with pairs whose ranks add up to `ranks`.
inline int64_t low_rank_bytes(int64_t num_tokens, int64_t ranks) { return num_tokens * ranks * 4; }

}  // namespace argosy
