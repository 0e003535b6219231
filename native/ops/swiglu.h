// swiglu.h: the feed-forward networks of a layer: routed experts, shared experts, dense networks.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/swiglu_args.h"
#include "ops/low_rank.h"
#include "ops/matmul.h"

namespace argosy {

// Added to the products of an expert; nullptr: none.
struct ExpertBias {
  const float *gate = nullptr, *up = nullptr;  // [width]
  const float* down = nullptr;                 // [hidden]
};

struct ExpertView {
  std::optional<MatrixView> gate;  // [width, hidden]; none: the activation has no gate
  MatrixView up;                   // [width, hidden]
  MatrixView down;                 // [hidden, width]
  ExpertBias bias = {};

  const MatrixView& first() const { return gate ? *gate : up; }  // in the order of use
};

// The tokens of each expert: expert i runs assignments starts[i] to starts[i + 1]. An assignment a reads
// x[token[a]] and writes out[row[a]]; if `token` or `row` is null, it reads or writes row a.
struct Assignments {
  const int32_t* starts;  // [experts + 1]
  const int32_t* token;
  const int32_t* row;
};

// y = activation(x Wg^T + bg, x Wu^T + bu) Wd^T + bd for every assignment; either all experts have a gate, or
// none. All experts share two parallel loops: gate, up and activation, then down. A bias is added to the
// finished sum of its row. If columns are in another order, activations are quantised in loops before these,
// for some of the experts at a time.
//
// pairs[a]: the pairs of the expert of assignment a, or nullptr; without a gate, their gate has no rank. A
// pair is added to the product of its matrix before the bias is; the input of down's is the activation in
// float32, whatever the format of down. Pairs take a loop before each of the two.
void swiglu_experts(Runtime& runtime, const std::vector<ExpertView>& experts, const Activation& activation,
                    const float* x, int64_t num_tokens, const Assignments& dispatch, float* out,
                    const ExpertPairs* const* pairs = nullptr);

// The most runtime scratch that swiglu_experts takes, if all experts have the same formats. has_quants: some
// of these formats may be quantised. has_act_order: some of them may have act-order. ranks: the most that the
// ranks of the three pairs of an expert add up to; 0: there are no pairs.
int64_t swiglu_scratch_bytes(int64_t hidden, int64_t width, int64_t num_tokens, int64_t assignments,
                             int num_threads, bool has_quants, bool has_act_order, int64_t ranks = 0);

}  // namespace argosy
