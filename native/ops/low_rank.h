// low_rank.h: low-rank pairs beside products with packed weights (LoRA, arXiv:2106.09685).
//
//   y = W x + scale * up^T (down x)
//
// W stays as it is packed; nothing is merged. `down` is the paper's A, `up` its B transposed: both are read
// row by row. The order of sums: down x as any product with a float format; then, for each element of y in
// turn, y += t[0] up[0] + t[1] up[1] + ... in ascending order, t = scale * (down x).
#pragma once

#include <cstdint>

#include "kernels/formats.h"

namespace argosy {

struct LowRank {
  Format format = Format::f32;    // f32, f16 or bf16
  const uint8_t* down = nullptr;  // [rank][columns of W]
  const uint8_t* up = nullptr;    // [rank][rows of W that change]
  int64_t rank = 0;               // 0: there is no pair
  float scale = 1;
};

// The pairs of an expert, or of a dense network.
struct ExpertPairs {
  LowRank gate, up, down;
};

}  // namespace argosy
