// latent_index.h: the lightning indexer (DeepSeek-V3.2, arXiv:2512.02556), which chooses the positions that a
// token of latent attention sees.
//
// Every position has a small index key, one for all heads, in a cache beside its latent vector. A token
// scores all positions that it could see, and the best `count` remain. The reference turns queries and keys
// by a Hadamard matrix and rounds them to FP8: the first changes no product, the second only saves time; both
// are left out.
#pragma once

#include "ops/latent_attention.h"

namespace argosy {

struct IndexSizes {
  int64_t num_heads = 0, dim = 0;
  int64_t count = 0;  // the positions that a token sees at most

  bool operator==(const IndexSizes&) const = default;
};

// For each token that chosen.limits, writes `count` positions in ascending order to `chosen`
// [num_tokens][count]: those with the highest scores (kernels/latent_index.h), and on a tie the lower
// position. NaN counts as the highest score, so that the damage stays visible. Whatever shares a batch, a
// token's choice depends on its own scores only.
//
// batch.q [num_tokens][num_heads][dim], weights [num_tokens][num_heads].
void choose_positions(Runtime& runtime, const LatentLayer& keys, const float* weights,
                      const AttentionBatch& batch, int64_t count, int32_t* chosen);

// The runtime scratch that choose_positions takes. Throws std::invalid_argument for more than 2^62 bytes.
int64_t index_scratch_bytes(const IndexSizes& sizes, int num_threads);

}  // namespace argosy
