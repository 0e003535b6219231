// swiglu.h: feed-forward networks of a layer: routed experts, shared experts, dense.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel_table.h"
#include "ops/matmul.h"

namespace argosy {

// Added to the products of an expert; nullptr: none.
struct ExpertBias {
  const float *gate = nullptr, *up = nullptr;  // [width]
  const float* down = nullptr;                 // [hidden]
};

struct ExpertView {
  MatrixView gate, up;  // [width, hidden]
  MatrixView down;      // [hidden, width]
  ExpertBias bias = {};
};

// Which tokens each expert runs: expert i runs assignments starts[i] to starts[i + 1]. An assignment reads
// x[token[a]] and writes out[row[a]]; without `token` and `row` assignment a reads and writes row a.
struct Dispatch {
  const int32_t* starts;  // [experts + 1]
  const int32_t* token;
  const int32_t* row;
};

// y = activation(x Wg^T + bg, x Wu^T + bu) Wd^T + bd for every assignment. All experts share two parallel
// loops: gate and up with what lies between, then down. A bias is added to the finished sum of its row.
void swiglu_experts(Runtime& runtime, const std::vector<ExpertView>& experts, const Activation& activation,
                    const float* x, int64_t num_tokens, const Dispatch& dispatch, float* out);

}  // namespace argosy
