// attention_args.h: the arguments of attention (attention.h, attention_amx.h), and what a token sees, in
// positions, lanes and sections.
#pragma once

#include <math.h>

#include "kernels/kv_layer.h"

namespace argosy {

// A call processes four tiles at a time, for up to this many (token, head) pairs at once.
[[maybe_unused]] static constexpr int64_t kStretchKeys = 64;
[[maybe_unused]] static constexpr int64_t kMaxQueries = 32;
// The same on tiles, where a call splits the keys for all of them.
[[maybe_unused]] static constexpr int64_t kAmxQueries = 128;
// Lanes of a section. Each section has a running maximum of its own, and the sections that a token sees are
// merged in ascending order, so threads can divide the sections of one token among themselves.
[[maybe_unused]] static constexpr int64_t kSectionKeys = 1024;

// The positions before its own that a token sees: the last `size` with its own, or all of them if it is 0. In
// chunks, positions are divided into ranges of `size`, and a token sees none of an earlier range.
struct Window {
  int64_t size = 0;
  bool is_chunked = false;
};

// The first position that the token at `order` sees.
static inline int64_t first_seen(const Window& window, int64_t order) {
  if (window.size == 0) return 0;
  if (window.is_chunked) return order / window.size * window.size;
  return order >= window.size ? order - window.size + 1 : 0;
}

// Tokens of one sequence against one KV head.
struct AttentionArgs {
  KvLayer kv;
  int64_t kv_head;
  const float* q;             // [num_tokens][num_heads][head_dim]
  float* out;                 // [num_tokens][num_heads][value_dim]
  const int32_t* order;       // [num_tokens], the index of a token in its sequence
  const int32_t* sees_until;  // [num_tokens], the end of the positions it sees; nullptr: its own is the last
  int64_t num_tokens, num_heads;
  const int32_t* blocks;  // the sequence's block table: position p lies in blocks[p / block_tokens]
  float scale;
  Window window;
  float* scratch;                // KernelTable::attention_floats(head_dim, value_dim)
  const float* sinks = nullptr;  // [num_heads], a score that takes weight and adds no value; nullptr: none
  // At least 0: the call computes this section only. It writes the states of the queries that see the
  // section, and not `out`.
  int64_t section = -1;
  float* states = nullptr;  // [num_tokens][heads of the KV head][attention_state_floats(value_dim)]
};

// A copy of each query, its scores of a stretch, and its running weighted sums: of a section, and of all.
static inline constexpr int64_t attention_scratch_floats(int64_t head_dim, int64_t value_dim) {
  return kMaxQueries *
         (round_up(head_dim, kKeyTile) + kStretchKeys + 2 * (round_up(value_dim, kKeyTile) + kKeyTile));
}
// Of one query: the weighted sum of values; then, in a cache line of their own, the largest score and the sum
// of weights.
static inline constexpr int64_t attention_state_floats(int64_t value_dim) {
  return round_up(value_dim, kKeyTile) + kKeyTile;
}

namespace {

inline int64_t first_position(const AttentionArgs& a, int64_t token) {
  return first_seen(a.window, a.order[token]);
}

inline int64_t last_position(const AttentionArgs& a, int64_t token) {
  return a.sees_until != nullptr ? a.sees_until[token] - 1 : a.order[token];
}

// Without a sink, returns a score whose weight is zero.
inline float sink_of(const AttentionArgs& a, int64_t head) {
  return a.sinks != nullptr ? a.sinks[head] : -INFINITY;
}

// The numbers of the first and the last section that a token sees.
inline int64_t first_section(const AttentionArgs& a, int64_t token) {
  return lane_of(a.kv, first_position(a, token)) / kSectionKeys;
}

inline int64_t last_section(const AttentionArgs& a, int64_t token) {
  return lane_of(a.kv, last_position(a, token)) / kSectionKeys;
}

// Where the state of a query goes if the call has one section.
inline float* state_of(const AttentionArgs& a, int64_t query) {
  return a.states + query * attention_state_floats(a.kv.value_dim);
}

}  // namespace
}  // namespace argosy
