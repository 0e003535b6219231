// pool.h: running softmax means of groups of vectors, for each dimension (the compressors of DeepSeek-V4 and
// the pools of GLM-5.3's indexer).
//
//   entry[d] = sum over the vectors of e^gate[d] vector[d]  /  sum of e^gate[d]
//
//   A token adds its vector to the state, relative to the greatest gate so far; the last token of a group
//   writes the entry. With overlap, an entry has the first halves of the group before and the second halves
//   of its own. Without gates it is the mean.
//
// Promise: the operations of a token and their order do not depend on the other tokens in the call.
#pragma once

#include <float.h>
#include <math.h>

#include "kernels/exp.h"
#include "kernels/pool_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

using PoolLane = float;
constexpr int64_t kPoolLanes = 1;
inline float pool_load(const float* from, int64_t) { return *from; }
inline void pool_store(float* to, float value, int64_t) { *to = value; }
inline float pool_of(float value) { return value; }
inline float pool_greater(float most, float gate) { return most > gate ? most : gate; }
inline float pool_weight(float gate, float most) { return expf(gate - most); }
inline float pool_fma(float a, float b, float c) { return a * b + c; }
inline float pool_ratio(float value, float sum) { return value / sum; }

#else

using PoolLane = Vec;
constexpr int64_t kPoolLanes = kLanes;
inline Vec pool_load(const float* from, int64_t n) { return load(from, n); }
inline void pool_store(float* to, Vec value, int64_t n) { store(to, value, n); }
inline Vec pool_of(float value) { return broadcast(value); }
inline Vec pool_greater(Vec most, Vec gate) { return max_or_second(most, gate); }
inline Vec pool_weight(Vec gate, Vec most) { return exp(sub(gate, most)); }
inline Vec pool_fma(Vec a, Vec b, Vec c) { return fma(a, b, c); }
inline Vec pool_ratio(Vec value, Vec sum) { return div(value, sum); }

#endif

struct PoolPart {
  // A gate of minus infinity then weighs 0, also as the first of a group.
  PoolLane most = pool_of(-FLT_MAX), sum = pool_of(0.0f), value = pool_of(0.0f);

  void add(PoolLane vector, PoolLane gate) {
    const PoolLane greatest = pool_greater(most, gate);
    const PoolLane kept = pool_weight(most, greatest), weight = pool_weight(gate, greatest);
    sum = pool_fma(sum, kept, weight);
    value = pool_fma(value, kept, pool_fma(weight, vector, pool_of(0.0f)));
    most = greatest;
  }
  void load(const float* state, int64_t dim, int64_t n) {
    most = pool_load(state, n);
    sum = pool_load(state + dim, n);
    value = pool_load(state + 2 * dim, n);
  }
  void store(float* state, int64_t dim, int64_t n) const {
    pool_store(state, most, n);
    pool_store(state + dim, sum, n);
    pool_store(state + 2 * dim, value, n);
  }
};

void pool(const PoolArgs& a) {
  const int64_t columns = a.has_overlap ? 2 * a.dim : a.dim, own = columns - a.dim;
  for (int64_t d = a.begin; d < a.end; d += kPoolLanes) {
    const int64_t n = a.end - d < kPoolLanes ? a.end - d : kPoolLanes;
    PoolPart entry, next;
    entry.load(a.state + d, a.dim, n);
    if (a.has_overlap) next.load(a.state + 3 * a.dim + d, a.dim, n);
    const auto gate_of = [&](int64_t row, int64_t within, int64_t column) {
      if (a.gates == nullptr) return pool_of(0.0f);
      const PoolLane gate = pool_load(a.gates + row * a.stride + column, n);
      if (a.bias == nullptr) return gate;
      return pool_fma(gate, pool_of(1.0f), pool_load(a.bias + within * columns + column, n));
    };
    float* to = a.entries + d;
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      const int64_t position = a.position + t, within = position % a.ratio;
      if (within == 0) {
        entry = position > 0 ? next : PoolPart{};  // without overlap, `next` stays empty
        next = {};
      }
      entry.add(pool_load(a.vectors + t * a.stride + own + d, n), gate_of(t, within, own + d));
      if (a.has_overlap) next.add(pool_load(a.vectors + t * a.stride + d, n), gate_of(t, within, d));
      if (within + 1 < a.ratio) continue;
      pool_store(to, pool_ratio(entry.value, entry.sum), n);
      to += a.dim;
    }
    entry.store(a.state + d, a.dim, n);
    if (a.has_overlap) next.store(a.state + 3 * a.dim + d, a.dim, n);
  }
}

}  // namespace
}  // namespace argosy
