// attention.h: causal attention of some tokens of one sequence against one KV head, in grouped-query form.
//
//   out[t][h] = sum over p of softmax over p (scale * q[t][h] . key[p]) * value[p]
//
//   p from max(0, position[t] - window + 1) to position[t]; heads h that share the KV head; keys and values
//   in KV blocks (layout: kernel_table.h); q and out float32.
//
// The reference goes over the keys twice. The vector version takes tiles of sixteen positions, at fixed
// places, with a running maximum (Milakov and Gimelshein, arXiv:1805.02867): which tiles a token meets, and
// in which order, follows from its position alone, so its output is the same in decode and in a prefill chunk
// of any size. A tile is loaded once for all the tokens and heads of the call.
#pragma once

#include <math.h>

#include "kernels/exp.h"
#include "kernels/half.h"
#include "kernels/kernel_table.h"

namespace argosy {
namespace {

inline int64_t first_position(const AttentionArgs& a, int64_t position) {
  return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}

#if !ARGOSY_VECTOR  // the reference

inline float kv_element(const KvLayer& kv, const uint8_t* base, int64_t index) {
  return kv.is_f16 ? float_from_f16(read_unaligned<uint16_t>(base + 2 * index))
                   : read_unaligned<float>(base + 4 * index);
}

inline float attention_score(const AttentionArgs& a, const float* q, int64_t position) {
  const int64_t offset = position % a.kv.block_tokens;
  const uint8_t* keys = key_head(a.kv, a.blocks[position / a.kv.block_tokens], a.kv_head);
  const int64_t first = offset / kKeyTile * kKeyTile * a.kv.head_dim + offset % kKeyTile;
  float dot = 0.0f;
  for (int64_t d = 0; d < a.kv.head_dim; ++d) dot += q[d] * kv_element(a.kv, keys, first + d * kKeyTile);
  return dot * a.scale;
}

void attention(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.kv.kv_heads;
  const int64_t dim = a.kv.head_dim;
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const int64_t last = a.positions[token];
    for (int64_t head = a.kv_head * group; head < (a.kv_head + 1) * group; ++head) {
      const float* q = a.q + (token * a.num_heads + head) * dim;
      float* out = a.out + (token * a.num_heads + head) * dim;
      float most = -INFINITY;
      for (int64_t p = first_position(a, last); p <= last; ++p) most = fmaxf(most, attention_score(a, q, p));
      float sum = 0.0f;
      for (int64_t d = 0; d < dim; ++d) out[d] = 0.0f;
      for (int64_t p = first_position(a, last); p <= last; ++p) {
        const float weight = expf(attention_score(a, q, p) - most);
        const uint8_t* values = value_head(a.kv, a.blocks[p / a.kv.block_tokens], a.kv_head);
        const int64_t first = p % a.kv.block_tokens * kv_padded_dim(a.kv);
        sum += weight;
        for (int64_t d = 0; d < dim; ++d) out[d] += weight * kv_element(a.kv, values, first + d);
      }
      for (int64_t d = 0; d < dim; ++d) out[d] /= sum;
    }
  }
}

#else

// One (token, head) on its way through the keys.
struct Query {
  const float* q;
  float* out;
  float* scores;        // [16], of the tile at hand; then the weights of its keys
  float* values;        // [padded_dim], running weighted sum
  int64_t first, last;  // positions it sees
  float most;           // running maximum of the scores
  float sum;            // running sum of the weights
  int64_t begin, end;   // keys of the tile at hand that it sees
};

constexpr int64_t kTileVecs = kKeyTile / kLanes;

// The scores of one tile for kCount queries: a key element is loaded once for all of them.
template <class Element, int kCount>
void score_tile(Query* const* queries, const uint8_t* keys, int64_t dim, float scale) {
  const float* q[kCount];
  Vec score[kCount][kTileVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    q[i] = queries[i]->q;
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) score[i][v] = zeros();
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec key[kTileVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v)
      key[v] = Element::load(keys + (d * kKeyTile + v * kLanes) * Element::kBytes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) score[i][v] = fma(broadcast(q[i][d]), key[v], score[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVecs; ++v) {
      store(queries[i]->scores + v * kLanes, mul(score[i][v], broadcast(scale)));
    }
  }
}

// Scores become weights; what was summed so far is scaled to the new maximum.
inline void soften_tile(Query& query, int64_t padded_dim) {
  Vec score[kTileVecs];
  float most = query.most;
  for (int v = 0; v < kTileVecs; ++v) {
    const int64_t before = v * kLanes;
    const int64_t begin = query.begin > before ? query.begin - before : 0;
    const int64_t end = query.end > before ? query.end - before : 0;
    score[v] = keep_lanes(load(query.scores + before), begin < kLanes ? begin : kLanes,
                          end < kLanes ? end : kLanes, -INFINITY);
    const float here = max_lanes(score[v]);
    most = here > most ? here : most;
  }
  Vec sum = zeros();
  for (int v = 0; v < kTileVecs; ++v) {
    score[v] = exp(sub(score[v], broadcast(most)));
    store(query.scores + v * kLanes, score[v]);
    sum = add(sum, score[v]);
  }
  // Multiplying by one changes no bit, so leaving it out changes none either.
  if (most > query.most) {
    const float shrink = exp(query.most - most);
    query.sum *= shrink;
    for (int64_t d = 0; d < padded_dim; d += kLanes) {
      store(query.values + d, mul(load(query.values + d), broadcast(shrink)));
    }
  }
  query.most = most;
  query.sum += sum_lanes(sum);
}

// Adds the weighted values of keys [begin, end) of a tile, keys in ascending order, for kCount queries that
// see them.
template <class Element, int kCount, int kVecs>
void add_values(Query* const* queries, const uint8_t* values, int64_t padded_dim, int64_t d, int64_t begin,
                int64_t end) {
  const float* weights[kCount];
  Vec sum[kCount][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    weights[i] = queries[i]->scores;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[i][v] = load(queries[i]->values + d + v * kLanes);
  }
  for (int64_t key = begin; key < end; ++key) {
    const uint8_t* row = values + (key * padded_dim + d) * Element::kBytes;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Vec value = Element::load(row + v * kLanes * Element::kBytes);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) sum[i][v] = fma(broadcast(weights[i][key]), value, sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(queries[i]->values + d + v * kLanes, sum[i][v]);
  }
}

template <class Element, int kCount>
void add_all_values(Query* const* queries, const uint8_t* values, int64_t padded_dim, int64_t begin,
                    int64_t end) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= padded_dim; d += 4 * kLanes) {
    add_values<Element, kCount, 4>(queries, values, padded_dim, d, begin, end);
  }
  for (; d < padded_dim; d += kLanes) {
    add_values<Element, kCount, 1>(queries, values, padded_dim, d, begin, end);
  }
}

// One tile for the queries that see any of it: `whole` of them see all its keys and come first.
template <class Element>
void attend_tile(const AttentionArgs& a, Query* const* queries, int64_t count, int64_t whole,
                 int64_t num_keys, const uint8_t* keys, const uint8_t* values) {
  const int64_t dim = a.kv.head_dim;
  const int64_t padded_dim = kv_padded_dim(a.kv);
  int64_t i = 0;
  for (; i + kScoreQueries <= count; i += kScoreQueries) {
    score_tile<Element, kScoreQueries>(queries + i, keys, dim, a.scale);
  }
  for (; i + 2 <= count; i += 2) score_tile<Element, 2>(queries + i, keys, dim, a.scale);
  for (; i < count; ++i) score_tile<Element, 1>(queries + i, keys, dim, a.scale);
  for (i = 0; i < count; ++i) soften_tile(*queries[i], padded_dim);
  for (i = 0; i + kValueQueries <= whole; i += kValueQueries) {
    add_all_values<Element, kValueQueries>(queries + i, values, padded_dim, 0, num_keys);
  }
  for (; i < count; ++i) {
    add_all_values<Element, 1>(queries + i, values, padded_dim, queries[i]->begin, queries[i]->end);
  }
}

template <class Element>
void attend_queries(const AttentionArgs& a, Query* all, int64_t count) {
  const KvLayer& kv = a.kv;
  int64_t first = all[0].first;
  int64_t last = all[0].last;
  for (int64_t i = 1; i < count; ++i) {
    first = all[i].first < first ? all[i].first : first;
    last = all[i].last > last ? all[i].last : last;
  }
  for (int64_t block = first / kv.block_tokens; block <= last / kv.block_tokens; ++block) {
    const uint8_t* keys = key_head(kv, a.blocks[block], a.kv_head);
    const uint8_t* values = value_head(kv, a.blocks[block], a.kv_head);
    for (int64_t offset = 0; offset < kv.block_tokens; offset += kKeyTile) {
      const int64_t start = block * kv.block_tokens + offset;
      const int64_t num_keys = kv.block_tokens - offset < kKeyTile ? kv.block_tokens - offset : kKeyTile;
      Query* seeing[kMaxQueries];
      int64_t whole = 0;
      int64_t partial = kMaxQueries;  // filled from the end
      for (int64_t i = 0; i < count; ++i) {
        Query& query = all[i];
        query.begin = query.first > start ? query.first - start : 0;
        query.end = query.last - start + 1 < num_keys ? query.last - start + 1 : num_keys;
        if (query.begin >= query.end) continue;
        if (query.begin == 0 && query.end == num_keys) {
          seeing[whole++] = &query;
        } else {
          seeing[--partial] = &query;
        }
      }
      int64_t seen = whole;
      for (; partial < kMaxQueries; ++partial) seeing[seen++] = seeing[partial];
      if (seen == 0) continue;
      attend_tile<Element>(a, seeing, seen, whole, num_keys,
                           keys + offset * kv.head_dim * kv_element_bytes(kv),
                           values + offset * kv_padded_dim(kv) * kv_element_bytes(kv));
    }
  }
}

void attention(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.kv.kv_heads;
  const int64_t dim = a.kv.head_dim;
  const int64_t padded_dim = kv_padded_dim(a.kv);
  Query queries[kMaxQueries];
  for (int64_t begin = 0; begin < a.num_tokens * group; begin += kMaxQueries) {
    const int64_t rest = a.num_tokens * group - begin;
    const int64_t count = rest < kMaxQueries ? rest : kMaxQueries;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = (begin + i) / group;
      const int64_t at = (token * a.num_heads + a.kv_head * group + (begin + i) % group) * dim;
      const int64_t last = a.positions[token];
      float* scratch = a.scratch + i * (kKeyTile + padded_dim);
      queries[i] =
          Query{a.q + at, a.out + at, scratch, scratch + kKeyTile, first_position(a, last), last, -INFINITY,
                0.0f,     0,          0};
      for (int64_t d = 0; d < padded_dim; d += kLanes) store(queries[i].values + d, zeros());
    }
    if (a.kv.is_f16) {
      attend_queries<F16Weights>(a, queries, count);
    } else {
      attend_queries<F32Weights>(a, queries, count);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Vec share = broadcast(1.0f / queries[i].sum);
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t n = dim - d < kLanes ? dim - d : kLanes;
        store(queries[i].out + d, mul(load(queries[i].values + d), share), n);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
