// ngrams.h: the n-gram sublayer of a layer: rows of a table, gated by the residual streams that they join
// (Engram, arXiv:2601.07372).
//
//   x        the rows of a token, one after another                       [width]
//   gate_s   sigmoid(signed sqrt(norm(key_s . x) . norm(stream_s) / sqrt(hidden)))
//   stream_s += v_s + silu(conv(norm(v_s))),  v_s = gate_s * value . x
//
// The convolution is optional. Its inputs are recurrent state. Sums of a token and stream have one order.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/causal_conv.h"
#include "ops/matmul.h"
#include "ops/recurrent_state.h"
#include "ops/runtime.h"
#include "ops/table_rows.h"

namespace argosy {

struct NgramSizes {
  int64_t width, streams;
};

struct Ngrams {
  TableRows* table;
  MatrixView key;           // [streams * hidden, width]
  MatrixView value;         // [hidden, width]
  const float* key_norm;    // [streams][hidden]
  const float* query_norm;  // [streams][hidden], of the streams
  // With a convolution over all channels of all streams.
  const float* conv_norm = nullptr;  // [streams][hidden]
  std::optional<CausalConv> conv = std::nullopt;
  int64_t state_layer = 0;

  int64_t hidden() const { return value.rows; }
  int64_t streams() const { return key.rows / value.rows; }
  int64_t rows_per_token() const { return value.cols / table->table().cols; }
};

// Adds to hidden [num_tokens][streams][hidden]. rows: float32 [num_tokens][width]; scratch: [num_tokens]
// [(streams + 1) * hidden]. state and runs are those of the step, for the convolution.
void add_ngrams(Runtime& runtime, const Ngrams& ngrams, float eps, const float* rows, int64_t num_tokens,
                RecurrentState* state, const std::vector<StateRun>& runs, float* scratch, float* hidden);

}  // namespace argosy
