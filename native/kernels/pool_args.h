// pool_args.h: the arguments of pools, which turn groups of consecutive vectors into one entry each.
#pragma once

#include <cstdint>

namespace argosy {

// The state of a pool: for each part, the greatest gate, the sum of weights and the weighted sum, each [dim].
// Without overlap the only part is the entry that the current group becomes. With overlap a second part holds
// what the current group adds to the next entry.
static inline constexpr int64_t pool_state_floats(int64_t dim, bool has_overlap) {
  return 3 * dim * (has_overlap ? 2 : 1);
}

// Consecutive tokens of one sequence; dimensions [begin, end) of them.
struct PoolArgs {
  // Rows of `dim` elements, or with overlap 2 * dim: first what the token adds to the next entry, then what
  // it adds to that of its own group.
  const float* vectors;
  const float* gates;  // rows like those of `vectors`; nullptr: all vectors of a group weigh the same
  int64_t stride;      // floats between rows
  const float* bias;   // [ratio][dim or 2 * dim], added to the gates; nullptr: none
  int64_t num_tokens;
  int64_t position;  // of the first token in its sequence
  int64_t ratio;     // vectors of a group
  int64_t dim;
  bool has_overlap;
  int64_t begin, end;
  float* state;    // pool_state_floats
  float* entries;  // [groups that end within the tokens][dim]
};

}  // namespace argosy
