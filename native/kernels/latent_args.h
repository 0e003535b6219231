// latent_args.h: where a state has its parts, where vectors lie, and which of a section a column sees.
#pragma once

#include "kernels/kernel_table.h"

namespace argosy {
namespace {

inline float* state_most(float* state, int64_t value_dim) { return state + value_dim * kColumnHeads; }
inline float* state_sum(float* state, int64_t value_dim) {
  return state_most(state, value_dim) + kColumnHeads;
}

inline const uint8_t* latent_vector(const LatentAttentionArgs& a, int64_t position) {
  const int64_t slot =
      a.blocks[position / a.kv.block_tokens] * a.kv.block_tokens + position % a.kv.block_tokens;
  return a.kv.vectors + slot * latent_vector_bytes(a.kv);
}

inline int64_t last_of_section(const LatentAttentionArgs& a, const LatentColumn& column) {
  return column.last - a.begin < kSectionPositions ? column.last : a.begin + kSectionPositions - 1;
}

}  // namespace
}  // namespace argosy
