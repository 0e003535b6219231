// latent_index.h: how much positions matter to a token, by the lightning indexer (DeepSeek-V3.2,
// arXiv:2512.02556), which chooses the positions that attention sees.
//
//   scores[t][p] = sum over heads h of weights[t][h] * max(0, q[t][h] . key[p])
//                  or q[t] . key[p], for one head without weights
//
//   float32; p from `begin` to `end`. NaN stays NaN. For one token and position, the order of sums is fixed:
//   by dimension, then by head.
//
// Positions are the lanes, so no sum crosses lanes: index keys are turned around once for all tokens and
// heads of a call, and an element of a query is broadcast.
#pragma once

#include "kernels/kv_formats.h"
#include "kernels/latent_args.h"
#include "kernels/latent_attention.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

void index_scores(const IndexArgs& a) {
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    for (int64_t p = a.begin; p < a.end; ++p) {
      const uint8_t* key = latent_vector(a.keys, a.blocks, p);
      float sum = 0.0f;
      for (int64_t head = 0; head < a.num_heads; ++head) {
        const float* q = a.q + (t * a.num_heads + head) * a.keys.dim;
        float dot = 0.0f;
        for (int64_t d = 0; d < a.keys.dim; ++d) dot += q[d] * latent_element(a.keys, key, d);
        if (a.weights == nullptr) {
          sum = dot;
          continue;
        }
        sum += a.weights[t * a.num_heads + head] * (dot < 0.0f ? 0.0f : dot);
      }
      a.scores[t * a.scores_row + p - a.begin] = sum;
    }
  }
}

#else

// Positions and heads whose products with all dimensions are summed in registers.
constexpr int kIndexVecs = 2;
constexpr int64_t kIndexPositions = kIndexVecs * kLanes;
constexpr int kIndexHeads = kLatentTile * int(kColumnVecs) / kIndexVecs;
static_assert(kIndexPositions <= kMostIndexPositions);

// keys [dim][kIndexPositions]; the products of kHeads queries, one after another.
template <int kHeads>
void index_products(const float* keys, const float* q, int64_t dim, Vec (&dot)[kHeads][kIndexVecs]) {
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
    for (int v = 0; v < kIndexVecs; ++v) dot[h][v] = zeros();
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec key[kIndexVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kIndexVecs; ++v) key[v] = load(keys + d * kIndexPositions + v * kLanes);
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const Vec query = broadcast(q[h * dim + d]);
#pragma GCC unroll 2
      for (int v = 0; v < kIndexVecs; ++v) dot[h][v] = fma(query, key[v], dot[h][v]);
    }
  }
}

// Adds what kHeads heads contribute to `sum`.
template <int kHeads>
void add_index_heads(const float* keys, const float* q, const float* weights, int64_t dim,
                     Vec (&sum)[kIndexVecs]) {
  Vec dot[kHeads][kIndexVecs];
  index_products<kHeads>(keys, q, dim, dot);
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
    const Vec weight = broadcast(weights[h]);
#pragma GCC unroll 2
    for (int v = 0; v < kIndexVecs; ++v) sum[v] = fma(weight, max_or_second(zeros(), dot[h][v]), sum[v]);
  }
}

// Turns kIndexPositions keys, `stride` floats apart, into [dim][kIndexPositions]. Reads up to the next
// multiple of kLanes behind their dimensions.
inline void turn_index_keys(const float* rows, int64_t stride, int64_t dim, float* keys) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    for (int v = 0; v < kIndexVecs; ++v) {
      Vec part[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) part[i] = load(rows + (v * kLanes + i) * stride + d);
      transpose(part);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(keys + (d + i) * kIndexPositions + v * kLanes, part[i]);
    }
  }
}

void index_scores(const IndexArgs& a) {
  const int64_t dim = a.keys.dim, stride = latent_stride(dim);
  float *rows = a.scratch, *keys = rows + kIndexPositions * stride;
  for (int64_t begin = a.begin; begin < a.end; begin += kIndexPositions) {
    const int64_t count = a.end - begin < kIndexPositions ? a.end - begin : kIndexPositions;
    with_kv(a.keys.format, [&]<class Kv>(Kv) {
      copy_vectors<Kv>(a.keys, count, stride, rows,
                       [&](int64_t i) { return latent_vector(a.keys, a.blocks, begin + i); });
    });
    turn_index_keys(rows, stride, dim, keys);  // lanes behind the last position hold old numbers
    const auto write = [&](int64_t t, const Vec(&sum)[kIndexVecs]) {
      float* scores = a.scores + t * a.scores_row + begin - a.begin;
      for (int v = 0; v < kIndexVecs; ++v) {
        const int64_t rest = count - v * kLanes;
        if (rest >= kLanes) {
          store(scores + v * kLanes, sum[v]);
        } else if (rest > 0) {
          store(scores + v * kLanes, sum[v], rest);
        }
      }
    };
    if (a.weights == nullptr) {
      in_tiles<kIndexHeads>(0, a.num_tokens, [&]<int kTokens>(Number<kTokens>, int64_t t) {
        Vec dot[kTokens][kIndexVecs];
        index_products<kTokens>(keys, a.q + t * dim, dim, dot);
        for (int i = 0; i < kTokens; ++i) write(t + i, dot[i]);
      });
      continue;
    }
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      const float *q = a.q + t * a.num_heads * dim, *weights = a.weights + t * a.num_heads;
      Vec sum[kIndexVecs];
      for (int v = 0; v < kIndexVecs; ++v) sum[v] = zeros();
      in_tiles<kIndexHeads>(0, a.num_heads, [&]<int kHeads>(Number<kHeads>, int64_t head) {
        add_index_heads<kHeads>(keys, q + head * dim, weights + head, dim, sum);
      });
      write(t, sum);
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
