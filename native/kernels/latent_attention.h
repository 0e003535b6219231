// latent_attention.h: attention of heads that share one cached vector per position (DeepSeek-V2,
// arXiv:2405.04434, in its absorbed form), over a section of the positions.
//
//   state[h] = (most, sum, values) of scores[p] = scale * q[h] . vector[p], with
//     most   = max over p of scores[p]
//     sum    = sum over p of exp(scores[p] - most)
//     values = sum over p of exp(scores[p] - most) * vector[p][0 .. value_dim)
//
//   p from `begin` to the last position that the token sees, at most kSectionPositions. q, states and out are
//   float32.
//
// A section is a stretch of positions at a fixed place, and latent_merge adds the states of a token's
// sections in ascending order. So a token's output depends only on the positions it sees, not on which thread
// computes a section. Within a section, stretches of kStretchKeys positions have a running maximum
// (arXiv:1805.02867).
//
// Bound by multiply-adds: a vector of 576 elements serves up to 128 heads. So heads are the lanes, and an
// element of a vector is broadcast to sixteen of them: no sum crosses lanes, and no number of positions or
// elements leaves a remainder.
#pragma once

#include <math.h>

#include "kernels/exp.h"
#include "kernels/half.h"
#include "kernels/kv_formats.h"
#include "kernels/latent_args.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

void latent_attention(const LatentAttentionArgs& a) {
  float scores[kSectionPositions];
  for (int64_t c = 0; c < a.num_columns; ++c) {
    const LatentColumn& column = a.columns[c];
    for (int64_t head = 0; head < column.num_heads; ++head) {
      const float* q = column.q + head * a.kv.dim;
      const int64_t last = last_of_section(a, column);
      float most = -INFINITY;
      for (int64_t p = a.begin; p <= last; ++p) {
        const uint8_t* vector = latent_vector(a, p);
        float dot = 0.0f;
        for (int64_t d = 0; d < a.kv.dim; ++d) dot += q[d] * latent_element(a.kv, vector, d);
        scores[p - a.begin] = dot * a.scale;
        most = fmaxf(most, scores[p - a.begin]);
      }
      float sum = 0.0f;
      for (int64_t d = 0; d < a.value_dim; ++d) column.state[d * kColumnHeads + head] = 0.0f;
      for (int64_t p = a.begin; p <= last; ++p) {
        const uint8_t* vector = latent_vector(a, p);
        const float weight = expf(scores[p - a.begin] - most);
        sum += weight;
        for (int64_t d = 0; d < a.value_dim; ++d) {
          column.state[d * kColumnHeads + head] += weight * latent_element(a.kv, vector, d);
        }
      }
      state_most(column.state, a.value_dim)[head] = most;
      state_sum(column.state, a.value_dim)[head] = sum;
    }
  }
}

void latent_merge(const float* next, int64_t value_dim, int64_t num_heads, float* state) {
  const float* next_most = next + value_dim * kColumnHeads;
  float* most = state_most(state, value_dim);
  for (int64_t head = 0; head < num_heads; ++head) {
    const float larger = fmaxf(most[head], next_most[head]);
    const float mine = expf(most[head] - larger), theirs = expf(next_most[head] - larger);
    for (int64_t d = 0; d < value_dim; ++d) {
      float& value = state[d * kColumnHeads + head];
      value = value * mine + next[d * kColumnHeads + head] * theirs;
    }
    float& sum = state_sum(state, value_dim)[head];
    sum = sum * mine + next_most[kColumnHeads + head] * theirs;
    most[head] = larger;
  }
}

#else

constexpr int64_t kColumnVecs = kColumnHeads / kLanes;
static_assert(kColumnVecs * kLanes == kColumnHeads);

// Computes the scores of kPositions vectors, `stride` floats apart, for the heads of kColumns columns: q
// [dim][heads], scores [positions][heads].
template <int kColumns, int kPositions>
void latent_scores(const float* vectors, int64_t stride, const float* const* q, int64_t dim, float scale,
                   float* const* scores) {
  constexpr int kVecs = kColumns * int(kColumnVecs);
  Vec sum[kPositions][kVecs];
#pragma GCC unroll 16
  for (int p = 0; p < kPositions; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sum[p][v] = zeros();
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec query[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
      query[v] = load(q[v / kColumnVecs] + d * kColumnHeads + v % kColumnVecs * kLanes);
#pragma GCC unroll 16
    for (int p = 0; p < kPositions; ++p) {
      const Vec element = broadcast(vectors[p * stride + d]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[p][v] = fma(element, query[v], sum[p][v]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPositions; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      store(scores[v / kColumnVecs] + p * kColumnHeads + v % kColumnVecs * kLanes,
            mul(sum[p][v], broadcast(scale)));
    }
  }
}

// Scales the values of the columns, then adds `count` weighted vectors to their elements [0, kElements).
template <int kColumns, int kElements>
void latent_values(const float* vectors, int64_t stride, int64_t count, const float* const* weights,
                   const float* const* shrink, float* const* values) {
  constexpr int kVecs = kColumns * int(kColumnVecs);
  Vec sum[kElements][kVecs];
#pragma GCC unroll 16
  for (int d = 0; d < kElements; ++d) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const int64_t lane = v % kColumnVecs * kLanes;
      sum[d][v] =
          mul(load(values[v / kColumnVecs] + d * kColumnHeads + lane), load(shrink[v / kColumnVecs] + lane));
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    Vec weight[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
      weight[v] = load(weights[v / kColumnVecs] + p * kColumnHeads + v % kColumnVecs * kLanes);
#pragma GCC unroll 16
    for (int d = 0; d < kElements; ++d) {
      const Vec element = broadcast(vectors[p * stride + d]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[d][v] = fma(element, weight[v], sum[d][v]);
    }
  }
#pragma GCC unroll 16
  for (int d = 0; d < kElements; ++d) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      store(values[v / kColumnVecs] + d * kColumnHeads + v % kColumnVecs * kLanes, sum[d][v]);
    }
  }
}

// Turns the scores of `count` positions into weights; `shrink` is the factor for older values.
inline void latent_soften(float* scores, int64_t count, float* most, float* sum, float* shrink) {
  for (int64_t lane = 0; lane < kColumnHeads; lane += kLanes) {
    const Vec before = load(most + lane);
    Vec largest = before;
    for (int64_t p = 0; p < count; ++p)
      largest = max_or_second(load(scores + p * kColumnHeads + lane), largest);
    Vec weights = zeros();
    for (int64_t p = 0; p < count; ++p) {
      float* score = scores + p * kColumnHeads + lane;
      const Vec weight = exp(sub(load(score), largest));
      store(score, weight);
      weights = add(weights, weight);
    }
    const Vec smaller = exp(sub(before, largest));
    store(sum + lane, add(mul(load(sum + lane), smaller), weights));
    store(shrink + lane, smaller);
    store(most + lane, largest);
  }
}

// Calls body(Number<n>{}, at) for tiles of n = kSize from `begin` to `end`, then for smaller tiles.
template <int kSize, class Body>
inline void in_tiles(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kSize <= end; begin += kSize) body(Number<kSize>{}, begin);
  if constexpr (kSize > 1) in_tiles<kSize * 2 / 3>(begin, end, body);
}

// Processes the `count` positions of `vectors` for kColumns columns that see all of them.
template <int kColumns>
void latent_stretch(const LatentAttentionArgs& a, const LatentColumn* columns, const float* vectors,
                    int64_t stride, int64_t count, const float* const* q, float* const* weights) {
  constexpr int kTile = kLatentTile / kColumns;
  in_tiles<kTile>(0, count, [&]<int kPositions>(Number<kPositions>, int64_t p) {
    float* scores[kColumns];
    for (int c = 0; c < kColumns; ++c) scores[c] = weights[c] + p * kColumnHeads;
    latent_scores<kColumns, kPositions>(vectors + p * stride, stride, q, a.kv.dim, a.scale, scores);
  });

  alignas(64) float shrinks[kColumns][kColumnHeads];
  const float* shrink[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    float* state = columns[c].state;
    latent_soften(weights[c], count, state_most(state, a.value_dim), state_sum(state, a.value_dim),
                  shrinks[c]);
    shrink[c] = shrinks[c];
  }
  in_tiles<kTile>(0, a.value_dim, [&]<int kElements>(Number<kElements>, int64_t d) {
    float* values[kColumns];
    for (int c = 0; c < kColumns; ++c) values[c] = columns[c].state + d * kColumnHeads;
    latent_values<kColumns, kElements>(vectors + d, stride, count, weights, shrink, values);
  });
}

// Copies `count` vectors as float32, `stride` floats apart; vector_of(i) is where the i-th lies.
template <class Kv, class VectorOf>
void copy_vectors(const LatentLayer& kv, int64_t count, int64_t stride, float* to,
                  const VectorOf& vector_of) {
  const int64_t dim = kv.dim;
  for (int64_t p = 0; p < count; ++p, to += stride) {
    const uint8_t* scales = vector_of(p);
    const uint8_t* vector = scales + kv_scale_bytes(kv.format, dim);
    int64_t d = 0;
    for (int64_t group = 0; d < dim; ++group) {
      const typename Kv::Scale scale = Kv::value_scale(scales, group);
      const int64_t end = dim - d < Kv::kGroup ? dim : d + Kv::kGroup;
      for (; d + kLanes <= end; d += kLanes) store(to + d, Kv::load(vector + d * Kv::kBytes, scale));
      if (d < end) store(to + d, Kv::load(vector + d * Kv::kBytes, end - d, scale));
      d = end;
    }
  }
}

void latent_attention(const LatentAttentionArgs& a) {
  const int64_t dim = a.kv.dim, stride = latent_stride(dim);
  float* vectors = a.scratch;
  float* packed = vectors + kStretchKeys * stride;
  float* scores = packed + kMostColumns * dim * kColumnHeads;
  const float* q[kMostColumns];
  float* weights[kMostColumns];
  int64_t last = a.begin;
  for (int64_t c = 0; c < a.num_columns; ++c) {
    const LatentColumn& column = a.columns[c];
    float* to = packed + c * dim * kColumnHeads;
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t head = 0; head < kColumnHeads; ++head) {
        to[d * kColumnHeads + head] = head < column.num_heads ? column.q[head * dim + d] : 0.0f;
      }
    }
    q[c] = to;
    weights[c] = scores + c * kStretchKeys * kColumnHeads;
    for (int64_t i = 0; i < a.value_dim * kColumnHeads; i += kLanes) store(column.state + i, zeros());
    for (int64_t i = 0; i < kColumnHeads; i += kLanes) {
      store(state_most(column.state, a.value_dim) + i, broadcast(-INFINITY));
      store(state_sum(column.state, a.value_dim) + i, zeros());
    }
    const int64_t own = last_of_section(a, column);
    last = own > last ? own : last;
  }
  for (int64_t begin = a.begin; begin <= last; begin += kStretchKeys) {
    const int64_t most = last - begin + 1 < kStretchKeys ? last - begin + 1 : kStretchKeys;
    with_kv(a.kv.format, [&]<class Kv>(Kv) {
      copy_vectors<Kv>(a.kv, most, stride, vectors, [&](int64_t i) { return latent_vector(a, begin + i); });
    });
    const auto seen = [&](int64_t c) {
      const int64_t count = last_of_section(a, a.columns[c]) - begin + 1;
      return count < most ? count : most;
    };
    for (int64_t c = 0; c < a.num_columns;) {
      if (kColumnVecs == 1 && c + 1 < a.num_columns && seen(c) == seen(c + 1)) {
        if constexpr (kColumnVecs == 1)
          latent_stretch<2>(a, a.columns + c, vectors, stride, seen(c), q + c, weights + c);
        c += 2;
      } else {
        if (seen(c) > 0) latent_stretch<1>(a, a.columns + c, vectors, stride, seen(c), q + c, weights + c);
        ++c;
      }
    }
  }
}

void latent_merge(const float* next, int64_t value_dim, int64_t, float* state) {
  const float* next_most = next + value_dim * kColumnHeads;
  const float* next_sum = next_most + kColumnHeads;
  for (int64_t lane = 0; lane < kColumnHeads; lane += kLanes) {
    float* most = state_most(state, value_dim) + lane;
    float* sum = state_sum(state, value_dim) + lane;
    const Vec larger = max_or_second(load(most), load(next_most + lane));
    const Vec mine = exp(sub(load(most), larger)), theirs = exp(sub(load(next_most + lane), larger));
    for (int64_t d = 0; d < value_dim; ++d) {
      float* value = state + d * kColumnHeads + lane;
      store(value, fma(load(next + d * kColumnHeads + lane), theirs, mul(load(value), mine)));
    }
    store(sum, fma(load(next_sum + lane), theirs, mul(load(sum), mine)));
    store(most, larger);
  }
}

#endif

// out [num_heads][value_dim]: the values of a state divided by its sum, to which each head's sink adds its
// weight; sinks [num_heads], nullptr: none.
void latent_finish(const float* state, int64_t value_dim, int64_t num_heads, const float* sinks, float* out) {
  const float* most = state + value_dim * kColumnHeads;
  const float* sum = most + kColumnHeads;
  float share[kColumnHeads];
  for (int64_t head = 0; head < num_heads; ++head) {
    // A sink far above all scores weighs infinitely much, and the result is 0.
    const float sink = sinks != nullptr ? expf(sinks[head] - most[head]) : 0.0f;
    share[head] = 1.0f / (sum[head] + sink);
  }
  for (int64_t d = 0; d < value_dim; ++d) {
    for (int64_t head = 0; head < num_heads; ++head)
      out[head * value_dim + d] = state[d * kColumnHeads + head] * share[head];
  }
}

}  // namespace
}  // namespace argosy
