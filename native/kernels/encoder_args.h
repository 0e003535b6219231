// encoder_args.h: the arguments of the operations of encoders (gelu.h, linear_bf16.h, attend.h,
// attend_bf16.h).
#pragma once

#include <cstdint>

namespace argosy {

enum class Gelu { erf, tanh, quick };

// How `linear` finishes a sum: y = sum, y = y + sum, y = y * sum, or y = activation(sum).
enum class Finish { store, add, multiply, gelu_erf, gelu_tanh, gelu_quick, silu };

// linear with bfloat16 activations: tokens in a panel, and most rows of the weights in a call.
[[maybe_unused]] static constexpr int64_t kPanelTokens = 64;
[[maybe_unused]] static constexpr int64_t kLinearRows = 48;
// Tokens that are rounded in one call.
[[maybe_unused]] static constexpr int64_t kRoundedTokens = 16;

// Bytes of a panel: [pairs of columns][kPanelTokens][2] bfloat16.
static inline constexpr int64_t token_panel_bytes(int64_t cols) { return (cols + 1) / 2 * kPanelTokens * 4; }

struct PanelArgs {
  const float* x;
  int64_t x_stride;
  int64_t num_tokens, cols;  // at most kRoundedTokens tokens
  uint8_t* panel;            // where the first of them lies in its panel
};

// y[t][r - row_begin] is made of bias[r] + sum over c of W[r][c] * x[t][c], for the tokens of a panel.
struct LinearArgs {
  const uint8_t* weights;  // the whole matrix
  int64_t cols;
  int64_t row_begin, row_end;  // at most kLinearRows
  const uint8_t* panel;
  int64_t num_tokens;
  const float* bias;  // one for each row; nullptr: none
  Finish finish;
  float* y;
  int64_t y_stride;
};

// attend: most queries in a call, and keys in a block.
[[maybe_unused]] static constexpr int64_t kAttendQueries = 64;
[[maybe_unused]] static constexpr int64_t kAttendKeys = 48;

// Queries of one head against all its keys. The row of query i begins at query + i * query_stride, and so on.
struct AttendArgs {
  const float *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  int64_t num_queries, num_keys, dim;  // at least one key
  float scale;
  float* out;
  int64_t out_stride;
  float* scratch;  // attend_scratch_floats(dim)
};

// attend with everything rounded to bfloat16: keys in a block.
[[maybe_unused]] static constexpr int64_t kRoundedKeys = 96;

// Keys and values of one head, at most kRoundedKeys.
struct RoundKeysArgs {
  const float *key, *value;
  int64_t key_stride, value_stride;
  int64_t num_keys, dim;
  uint8_t* keys;    // [num_keys][dim] bfloat16
  uint8_t* values;  // [dim][kRoundedKeys] bfloat16
};

// Queries of one head against all its keys, as in AttendArgs.
struct AttendRoundedArgs {
  const float* query;
  int64_t query_stride, num_queries;
  const uint8_t *keys, *values;  // each block follows the one before
  int64_t num_keys, dim;
  float scale;
  float* out;
  int64_t out_stride;
  float* scratch;  // attend_rounded_scratch_floats(dim)
};

// Queries and running sums, the weights of a block, three numbers for each query, a block of keys and values.
static inline constexpr int64_t attend_scratch_floats(int64_t dim) {
  return kAttendQueries * (2 * dim + kAttendKeys + 3) + 2 * kAttendKeys * dim;
}

// Queries and running sums, the scores of a block, three numbers for each query.
static inline constexpr int64_t attend_rounded_scratch_floats(int64_t dim) {
  return kPanelTokens * ((dim + 1) / 2 + dim + kRoundedKeys + 3);
}

}  // namespace argosy
