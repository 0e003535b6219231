// low_rank_args.h: the arguments of add_low_rank.
#pragma once

#include "kernels/formats.h"

namespace argosy {

// y[i][row - row_begin] += t[i][0] * up[0][row] + t[i][1] * up[1][row] + ..., for token i and each row
struct LowRankArgs {
  Format format;      // of `up`: f32, f16 or bf16
  const uint8_t* up;  // [rank][up_cols], at any alignment
  int64_t up_cols;
  int64_t rank;
  int64_t row_begin, row_end;
  const float* t;  // token i begins at t + t_stride * i
  int64_t t_stride;
  float* y;          // token i begins at y + y_stride * (y_index ? y_index[i] : i)
  int64_t y_stride;  // in floats
  const int32_t* y_index;
  int64_t num_tokens;
  const uint8_t* next_weights = nullptr;  // what the caller reads next: a prefetch hint
};

}  // namespace argosy
