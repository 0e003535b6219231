// latent_index.h: indexers, which choose the positions, or blocks of positions, that a token sees.
//
// Every position has a small index key, one for all heads, in a cache beside its latent vector, or keys and
// values. A token scores all positions that it could see, and the best remain.
//
// The lightning indexer (DeepSeek-V3.2, arXiv:2512.02556) chooses positions for all heads together. The
// reference turns queries and keys by a Hadamard matrix and rounds them to FP8: the first changes no product,
// the second only saves time; both are left out.
//
// In block-sparse attention (MiniMax-M3), each index head chooses blocks for the heads of one KV head. A
// block is as good as its best position. DeepSeek-V4.1 chooses blocks first, for all heads together, and
// later layers choose positions inside them.
#pragma once

#include "ops/latent_attention.h"

namespace argosy {

struct IndexSizes {
  int64_t num_heads = 0, dim = 0;
  int64_t count = 0;       // the positions that a token sees at most, or blocks
  int64_t block_size = 0;  // positions of a block that each head chooses; 0: heads choose positions together
  int64_t pool_size = 1;   // positions for which one key stands
  bool is_joint = false;   // heads choose blocks together

  int64_t choices_per_token() const { return block_size > 0 && !is_joint ? num_heads : 1; }
  bool operator==(const IndexSizes&) const = default;
};

// The blocks of `size` positions that a token chooses inside if it sees more than count * size positions.
struct CandidateBlocks {
  const int32_t* blocks = nullptr;  // [num_tokens][count], ascending; nullptr: all
  int64_t count = 0, size = 1;

  bool limits(const AttentionBatch& batch, int64_t token) const {
    return blocks != nullptr && batch.until(token) > count * size;
  }
};

// For each token that chosen.limits, writes `count` positions in ascending order to `chosen`
// [num_tokens][count]: those with the highest scores (kernels/latent_index.h), and on a tie the lower
// position. NaN counts as the highest score, so that the damage stays visible. Whatever shares a batch, a
// token's choice depends on its own scores only.
//
// batch.q [num_tokens][num_heads][dim], weights [num_tokens][num_heads]. The candidates of a token have at
// least `count` positions that it sees.
void choose_positions(Runtime& runtime, const LatentLayer& keys, const float* weights,
                      const AttentionBatch& batch, int64_t count, int32_t* chosen,
                      const CandidateBlocks& candidates = {});

// For each token that sees more than count * size positions, writes to `blocks` [num_tokens][count] the
// blocks of `size` positions with the best scores, in ascending order; its last block is always one of them.
// Ties and NaN as above.
void choose_candidates(Runtime& runtime, const LatentLayer& keys, const float* weights,
                       const AttentionBatch& batch, int64_t count, int64_t size, int32_t* blocks);

// Turns the groups that each token chose of its batch, [num_tokens][chosen.count], into their positions and
// those of its unfinished group, [num_tokens][chosen.row()], in place. `positions` is that of `chosen`.
void expand_groups(const AttentionBatch& batch, const ChosenPositions& chosen, int32_t* positions);

// For each token that chosen.limits, writes to `blocks` [num_tokens][num_heads][count] the blocks of
// chosen.size positions that each head chooses, in ascending order: the token's own and the num_local - 1
// before it, then those with the highest products of query and key; ties and NaN as above.
//
// batch.q [num_tokens][num_heads][dim], which sees nothing after itself; 1 <= num_local <= chosen.count and
// chosen.size <= kMostIndexBlock.
void choose_blocks(Runtime& runtime, const LatentLayer& keys, const AttentionBatch& batch,
                   const ChosenBlocks& chosen, int64_t num_local, int32_t* blocks);

constexpr int64_t kMostIndexBlock = 8192;

// The runtime scratch that choosing takes. Throws std::invalid_argument for more than 2^62 bytes.
int64_t index_scratch_bytes(const IndexSizes& sizes, int num_threads);

}  // namespace argosy
