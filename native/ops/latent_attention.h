// latent_attention.h: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) of a batch, always in
// absorbed form.
//
// The cache stores one vector per position: kv_rank elements, which a matrix would expand to the key and
// value of every head, and rope_dim elements of rotated key, which all heads share. The vectors are never
// expanded; the matrix is applied to the query and to the result instead:
//
//   q_h = [ key_up_h q_nope_h | q_rope_h ]    attended_h = softmax(scale q_h . vectors) latents
//   out_h = value_up_h attended_h
//
// Heads may also read the cached vectors as they are, and from several stores in one softmax: the positions
// of a window, then entries that each stand for several earlier positions (DeepSeek-V4).
#pragma once

#include <cstdint>
#include <vector>

#include "ops/attention.h"
#include "ops/low_rank.h"
#include "ops/matmul.h"

namespace argosy {

struct LatentHeads {
  MatrixView key_up;    // [num_heads * kv_rank, nope_dim]
  MatrixView value_up;  // [num_heads * value_dim, kv_rank]
  int64_t num_heads, nope_dim, rope_dim, kv_rank, value_dim;
  float scale;                   // scales the scores
  const float* sinks = nullptr;  // [num_heads], a score that takes weight and adds no value; nullptr: none

  int64_t vector_dim() const { return kv_rank + rope_dim; }
  int64_t query_dim() const { return nope_dim + rope_dim; }
};

// The first kv_rank of the `dim` elements of each vector become x / sqrt(mean(x^2) + eps) * weight, in place.
void latent_norm(Runtime& runtime, float* vectors, const float* weight, float eps, int64_t num_tokens,
                 int64_t kv_rank, int64_t dim);

// vectors [num_tokens][dim], rounded to nearest even if the cache is not float32. All slots must be in range.
void latent_write(Runtime& runtime, const LatentLayer& kv, const float* vectors, const int64_t* slots,
                  int64_t num_tokens);

// The positions that an indexer chose for each token that would see more than `count` groups of `size`
// positions (latent_index.h). Such a token also sees the unfinished group behind the others.
struct ChosenPositions {
  const int32_t* positions =
      nullptr;  // [num_tokens][row()], ascending; nullptr: all tokens see all positions
  int64_t count = 0, size = 1;

  int64_t row() const { return count * size + size - 1; }
  bool limits(const AttentionBatch& batch, int64_t token) const {
    return positions != nullptr && batch.until(token) / size > count;
  }
  // How many positions a token sees.
  int64_t seen_by(const AttentionBatch& batch, int64_t token) const {
    return limits(batch, token) ? count * size + batch.until(token) % size : batch.until(token);
  }
};

// The entries of a store that a token sees: a list, or `count` of them from `first` on.
struct SeenEntries {
  const int32_t* positions;  // [count], ascending; nullptr: no list
  int64_t first, count;
};

// A store of vectors, and what each token sees of it.
struct LatentSource {
  LatentLayer kv;
  const int32_t* block_table;  // [sequences][max_blocks]
  int64_t max_blocks;
  std::vector<SeenEntries> seen;  // [num_tokens]
};

constexpr int64_t kMostSources = 2;

// Heads that share each cached vector, which is key and value.
struct SharedHeads {
  int64_t num_heads, dim;
  float scale;         // scales the scores
  const float* sinks;  // [num_heads]; nullptr: none
};

// Attention over all sources in one softmax; every token sees an entry of the first. States of sections are
// merged in the order of the sources. q and out [num_tokens][num_heads][dim], sequence [num_tokens].
void shared_attention(Runtime& runtime, const std::vector<LatentSource>& sources, const SharedHeads& heads,
                      const float* q, const int32_t* sequence, int64_t num_tokens, float* out);

// The most runtime scratch that shared_attention takes. Throws as latent_scratch_bytes.
int64_t shared_scratch_bytes(int64_t dim, int num_threads);

// A block-diagonal product: out [num_tokens][num_groups][rows of a group] are each group's rows of the matrix
// times its x [num_tokens][num_groups][cols].
void multiply_groups(Runtime& runtime, const MatrixView& matrix, int64_t num_groups, const float* x,
                     int64_t num_tokens, float* out);

// The most runtime scratch that multiply_groups takes. Throws as latent_scratch_bytes.
int64_t group_scratch_bytes(int64_t num_groups, int64_t cols, int64_t max_tokens);

// Pairs beside the two matrices, as they are absorbed:
//
//   q_h += scale * sum over i of (key.down_h[i] . q_nope_h) key.up[i]
//   out_h += scale * sum over i of (value.down[i] . attended_h) value.up_h[i]
//
// Factors are those of the rows that a cached vector would be expanded to: q_nope_h is multiplied by those of
// keys before its products, and out_h by those of values behind them.
struct LatentPairs {
  LowRank key;    // down [num_heads][rank][nope_dim], up [rank][kv_rank]
  LowRank value;  // down [rank][kv_rank], up [num_heads][rank][value_dim]
};

// Multiplies q [num_tokens][num_heads][nope_dim + rope_dim] by the factors of keys, for latent_attention.
void multiply_queries(Runtime& runtime, const LatentHeads& heads, const LatentPairs* const* pairs,
                      int64_t num_tokens, float* q);

// batch.q [num_tokens][num_heads][nope_dim + rope_dim], no window.
// out [num_tokens][num_heads * value_dim].
// pairs [num_tokens], nullptr: the token has none; nullptr: no token has any.
void latent_attention(Runtime& runtime, const LatentLayer& kv, const LatentHeads& heads,
                      const AttentionBatch& batch, const ChosenPositions& chosen, float* out,
                      const LatentPairs* const* pairs = nullptr);

// The most runtime scratch that latent_attention takes. Only the sizes in `heads` matter. Sizes are at most
// 2^30. Throws std::invalid_argument for more than 2^62 bytes.
int64_t latent_scratch_bytes(const LatentHeads& heads, int64_t max_tokens, int num_threads);

}  // namespace argosy
