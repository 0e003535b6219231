// pool.h: entries that stand for groups of consecutive positions, for attention or an indexer over a long
// past (DeepSeek-V4's compressors, GLM-5.3's pools).
//
// A token's vector goes into the running state of its group (kernels/pool.h), which is a part of the
// recurrent state; the group's last token completes the entry. Entry e stands for the positions
// [e * ratio, (e + 1) * ratio), so a token at position p sees (p + 1) / ratio entries.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/pool_args.h"
#include "ops/attention.h"
#include "ops/recurrent_state.h"
#include "ops/runtime.h"

namespace argosy {

struct PoolShape {
  int64_t ratio = 1, dim = 0;
  // An entry has parts of the group before, too (kernels/pool.h).
  bool has_overlap = false;

  bool operator==(const PoolShape&) const = default;
  // The elements of a token's vector, and of its gates.
  int64_t columns() const { return has_overlap ? 2 * dim : dim; }
  // With ratio 1, entries are the vectors themselves.
  int64_t state_floats() const { return ratio > 1 ? pool_state_floats(dim, has_overlap) + kMostAxes : 0; }

  static constexpr int64_t kMostAxes = 3;  // of the rotary position that a group begins at
};

// What tokens give to a pool, in rows of `stride` floats.
struct PoolInputs {
  const float* vectors;  // [columns]
  const float* gates;    // [columns]; nullptr: an entry is a mean
  int64_t stride;
  const float* bias;  // [ratio][columns], added to the gates by place in the group; nullptr: none
};

// The rotary positions of the tokens.
struct PoolPositions {
  const int32_t* order;  // [num_tokens]
  const float* angles;   // [num_axes][num_tokens]; nullptr: order on every axis
  int64_t num_tokens, num_axes;
};

// The entries that were completed, in the order of their tokens.
struct PoolEntries {
  float* vectors;    // [num_tokens][dim], room for as many entries as there are tokens
  float* positions;  // [kMostAxes][num_tokens], the same: [axes][entries], where their groups begin
  std::vector<int64_t> tokens;  // that completed each
  int64_t count() const { return int64_t(tokens.size()); }
};

// Adds the tokens of all runs to the pool whose state begins `state_begin` floats after the matrices of the
// layer. A run's first token goes on where the state stopped.
void pool_tokens(Runtime& runtime, RecurrentState* state, int64_t layer, int64_t state_begin,
                 const PoolShape& shape, const PoolInputs& inputs, const std::vector<StateRun>& runs,
                 const PoolPositions& positions, PoolEntries& entries);

// Where the cache stores an entry: `slot` is where the last position of its group lies.
inline int64_t entry_slot(int64_t slot, int64_t block_tokens, const LatentLayer& store, int64_t ratio) {
  return slot / block_tokens * store.block_tokens + slot % block_tokens / ratio;
}

}  // namespace argosy
