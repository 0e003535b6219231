// attention_args.h: what a token sees, in positions, lanes and sections.
#pragma once

#include <math.h>

#include "kernels/kernel_table.h"

namespace argosy {
namespace {

inline int64_t first_position(const AttentionArgs& a, int64_t token) {
  const int64_t order = a.order[token];
  return a.window > 0 && order >= a.window ? order - a.window + 1 : 0;
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
  return a.states + query * attention_state_floats(a.kv.head_dim);
}

}  // namespace
}  // namespace argosy
