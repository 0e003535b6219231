// latent_args.h: the arguments of latent attention and its indexer; where a state has its parts, where
// vectors lie, and which of a section a column sees.
#pragma once

#include "kernels/attention_args.h"
#include "kernels/kv_layer.h"

namespace argosy {

// Latent attention: a column is sixteen heads of one token, which go through the vectors together. A call
// takes at most two columns, or on tiles sixteen, because it splits the vectors for all of them. Positions
// are processed in sections.
[[maybe_unused]] static constexpr int64_t kColumnHeads = 16;
[[maybe_unused]] static constexpr int64_t kMostColumns = 2, kAmxColumns = 16;
[[maybe_unused]] static constexpr int64_t kSectionPositions = 256;

struct LatentColumn {
  const float* q;     // [num_heads][dim]
  int64_t num_heads;  // at most kColumnHeads
  int64_t last;       // the last position that the token sees; with `positions`, its index there;
                      // otherwise from `first` on
  float* state;       // latent_state_floats(value_dim): values [value_dim][kColumnHeads], most, sum
};

// Columns of one sequence against the section of positions that starts at `begin`; every column sees it.
struct LatentAttentionArgs {
  LatentLayer kv;
  const int32_t* blocks;  // the sequence's block table: position p lies in blocks[p / block_tokens]
  // The columns see only these, and sections are sections of this list; nullptr: all from `first` on.
  const int32_t* positions;
  int64_t first;  // `begin` and LatentColumn::last count from here
  const LatentColumn* columns;
  int64_t num_columns;
  int64_t begin;
  int64_t value_dim;  // the values are the first value_dim elements of a vector
  float scale;
  float* scratch;  // KernelTable::latent_floats(dim, value_dim)
};

// Tokens of one sequence against the index keys of positions [begin, end).
struct IndexArgs {
  LatentLayer keys;
  const int32_t* blocks;
  const float* q;        // [num_tokens][num_heads][dim]
  const float* weights;  // [num_tokens][num_heads]; nullptr, with one head: scores are its products
  int64_t num_tokens, num_heads;
  int64_t begin, end;
  float* scores;  // [num_tokens][end - begin], rows scores_row floats apart
  int64_t scores_row;
  float* scratch;  // index_scratch_floats(dim)
};

static inline constexpr int64_t latent_state_floats(int64_t value_dim) {
  return (value_dim + 2) * kColumnHeads;
}
// Distance between vectors in the scratch: an odd number of cache lines, so that vectors spread over the sets
// of a cache.
static inline constexpr int64_t latent_stride(int64_t dim) { return (round_up(dim, 16) / 16 | 1) * 16; }
// Vectors of a stretch as float32, and the queries and scores of the columns.
static inline constexpr int64_t latent_scratch_floats(int64_t dim) {
  return kStretchKeys * latent_stride(dim) + kMostColumns * kColumnHeads * (dim + kStretchKeys);
}
// Index keys of a few positions as float32, by position and by dimension.
[[maybe_unused]] static constexpr int64_t kMostIndexPositions = 32;
static inline constexpr int64_t index_scratch_floats(int64_t dim) {
  return kMostIndexPositions * (latent_stride(dim) + round_up(dim, 16));
}

namespace {

inline float* state_most(float* state, int64_t value_dim) { return state + value_dim * kColumnHeads; }
inline float* state_sum(float* state, int64_t value_dim) {
  return state_most(state, value_dim) + kColumnHeads;
}

inline const uint8_t* latent_vector(const LatentLayer& kv, const int32_t* blocks, int64_t position) {
  const int64_t block = (position / kv.block_tokens + 1) * kv.block_stride - 1;
  const int64_t slot = blocks[block] * kv.block_tokens + position % kv.block_tokens;
  return kv.vectors + slot * latent_vector_bytes(kv);
}

inline const uint8_t* latent_vector(const LatentAttentionArgs& a, int64_t position) {
  return latent_vector(a.kv, a.blocks, a.positions != nullptr ? a.positions[position] : a.first + position);
}

inline int64_t last_of_section(const LatentAttentionArgs& a, const LatentColumn& column) {
  return column.last - a.begin < kSectionPositions ? column.last : a.begin + kSectionPositions - 1;
}

}  // namespace
}  // namespace argosy
