// attend.h: attention in which every query sees every key, for queries of one head of an encoder.
//
//   out[q] = sum over s of softmax over s (scale * query[q] . key[s]) * value[s]
//
//   query, key, value, out  float32 rows of `dim`, each with its own stride; out may be query. At most
//   kAttendQueries queries.
//
// The reference passes over the keys twice. The vector version takes blocks of kAttendKeys keys with a
// running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867), as FlashAttention does (Dao and others,
// arXiv:2205.14135). Queries are in the lanes: of both products, one operand is a vector of queries and the
// other an element of a key or a value. So no sum runs across lanes, any `dim` fills the vectors, and the
// bits of a query's output do not depend on the other queries.
//
// Bound by multiply-adds. The keys and values of a block are copied, because rows a power of two apart would
// evict each other from the cache. Those of the next block are prefetched: rows of a head lie far apart, so
// the hardware detects no stream.
#pragma once

#include <math.h>

#include "kernels/encoder_args.h"
#include "kernels/exp.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

inline float attend_score(const AttendArgs& a, const float* query, int64_t s) {
  float dot = 0.0f;
  for (int64_t d = 0; d < a.dim; ++d) dot += query[d] * a.key[s * a.key_stride + d];
  return dot * a.scale;
}

void attend(const AttendArgs& a) {
  float* sums = a.scratch;  // [dim]
  for (int64_t q = 0; q < a.num_queries; ++q) {
    const float* query = a.query + q * a.query_stride;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t s = 0; s < a.num_keys; ++s) most = fmaxf(most, attend_score(a, query, s));
    for (int64_t d = 0; d < a.dim; ++d) sums[d] = 0.0f;
    for (int64_t s = 0; s < a.num_keys; ++s) {
      const float weight = expf(attend_score(a, query, s) - most);
      sum += weight;
      for (int64_t d = 0; d < a.dim; ++d) sums[d] += weight * a.value[s * a.value_stride + d];
    }
    for (int64_t d = 0; d < a.dim; ++d) a.out[q * a.out_stride + d] = sums[d] / sum;
  }
}

#else

// Where the parts of the scratch lie. [..][kAttendQueries] unless said otherwise.
struct AttendScratch {
  float *query, *sums;  // [dim]: queries times scale; running weighted sums of the values
  float* weights;       // [kAttendKeys]: the scores of a block, later the weights of its keys
  float *most, *sum;    // running maximum of the scores, running sum of the weights
  float* shrink;        // how a block changes the running sums
  float *key, *value;   // [kAttendKeys][dim], copies
};

inline AttendScratch divide_scratch(const AttendArgs& a) {
  const int64_t of_queries = a.dim * kAttendQueries;
  float* rows = a.scratch + 2 * of_queries;
  float* numbers = rows + kAttendKeys * kAttendQueries;
  float* copies = numbers + 3 * kAttendQueries;
  return {a.scratch, a.scratch + of_queries,      rows,
          numbers,   numbers + kAttendQueries,    numbers + 2 * kAttendQueries,
          copies,    copies + kAttendKeys * a.dim};
}

// The scores of kKeys keys, for kVecs vectors of queries.
template <int kKeys, int kVecs>
void attend_scores(const float* key, const float* query, int64_t dim, float* scores) {
  Vec score[kKeys][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) score[i][v] = zeros();
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec some[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) some[v] = load(query + d * kAttendQueries + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const Vec element = broadcast(key[i * dim + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) score[i][v] = fma(element, some[v], score[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(scores + i * kAttendQueries + v * kLanes, score[i][v]);
  }
}

// Turns the scores of a block into weights, and renews the running maximum and sum.
template <int kVecs>
void attend_weights(const AttendScratch& scratch, int64_t at, int64_t num_keys) {
  float* weights = scratch.weights + at;
  Vec most[kVecs], sum[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) most[v] = load(scratch.most + at + v * kLanes);
  for (int64_t s = 0; s < num_keys; ++s) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      most[v] = max_or_second(load(weights + s * kAttendQueries + v * kLanes), most[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const Vec shrink = exp(sub(load(scratch.most + at + v * kLanes), most[v]));
    sum[v] = mul(load(scratch.sum + at + v * kLanes), shrink);
    store(scratch.shrink + at + v * kLanes, shrink);
    store(scratch.most + at + v * kLanes, most[v]);
  }
  for (int64_t s = 0; s < num_keys; ++s) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* weight = weights + s * kAttendQueries + v * kLanes;
      const Vec value = exp(sub(load(weight), most[v]));
      store(weight, value);
      sum[v] = add(sum[v], value);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store(scratch.sum + at + v * kLanes, sum[v]);
}

// Adds the weighted values of a block to kDims dimensions of the running sums.
template <int kDims, int kVecs>
void attend_values(const float* value, const float* weights, const float* shrink, int64_t num_keys,
                   int64_t dim, float* sums) {
  Vec sum[kDims][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kDims; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      sum[i][v] = mul(load(sums + i * kAttendQueries + v * kLanes), load(shrink + v * kLanes));
    }
  }
  for (int64_t s = 0; s < num_keys; ++s) {
    Vec weight[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) weight[v] = load(weights + s * kAttendQueries + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kDims; ++i) {
      const Vec element = broadcast(value[s * dim + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = fma(element, weight[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kDims; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(sums + i * kAttendQueries + v * kLanes, sum[i][v]);
  }
}

// Prefetches keys and values [begin, end) into the second-level cache.
inline void prefetch_keys(const AttendArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kLineFloats = 16;
  for (int64_t s = begin; s < end && s < a.num_keys; ++s) {
    for (int64_t d = 0; d < a.dim; d += kLineFloats) {
      __builtin_prefetch(a.key + s * a.key_stride + d, 0, 2);
      __builtin_prefetch(a.value + s * a.value_stride + d, 0, 2);
    }
  }
}

// Keys [begin, begin + num_keys), for kVecs vectors of queries from query `at` on.
template <int kVecs>
void attend_block(const AttendArgs& a, const AttendScratch& scratch, int64_t at, int64_t begin,
                  int64_t num_keys) {
  const int64_t dim = a.dim;
  const float* query = scratch.query + at;
  int64_t s = 0;
  for (; s + kAttendTile <= num_keys; s += kAttendTile) {
    if (at == 0) prefetch_keys(a, begin + kAttendKeys + s, begin + kAttendKeys + s + kAttendTile);
    attend_scores<kAttendTile, kVecs>(scratch.key + s * dim, query, dim,
                                      scratch.weights + s * kAttendQueries + at);
  }
  with_number<kAttendTile - 1>(num_keys - s, [&]<int kRest>(Number<kRest>) {
    attend_scores<kRest, kVecs>(scratch.key + s * dim, query, dim, scratch.weights + s * kAttendQueries + at);
  });
  attend_weights<kVecs>(scratch, at, num_keys);
  const float* weights = scratch.weights + at;
  const float* shrink = scratch.shrink + at;
  int64_t d = 0;
  for (; d + kAttendTile <= dim; d += kAttendTile) {
    attend_values<kAttendTile, kVecs>(scratch.value + d, weights, shrink, num_keys, dim,
                                      scratch.sums + d * kAttendQueries + at);
  }
  with_number<kAttendTile - 1>(dim - d, [&]<int kRest>(Number<kRest>) {
    attend_values<kRest, kVecs>(scratch.value + d, weights, shrink, num_keys, dim,
                                scratch.sums + d * kAttendQueries + at);
  });
}

inline void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t dim, float* to) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += dim) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
    if (d < dim) store(to + d, load(from + d, dim - d), dim - d);
  }
}

// Queries times scale, and zeros after the last.
inline void pack_queries(const AttendArgs& a, int64_t lanes, float* query) {
  for (int64_t q = 0; q < lanes; q += kLanes) {
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      const int64_t n = a.dim - d < kLanes ? a.dim - d : kLanes;
      Vec rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = q + i < a.num_queries
                      ? mul(load(a.query + (q + i) * a.query_stride + d, n), broadcast(a.scale))
                      : zeros();
      }
      transpose(rows);
      for (int64_t i = 0; i < n; ++i) store(query + (d + i) * kAttendQueries + q, rows[i]);
    }
  }
}

// Divides the sums of the values by the sums of the weights.
inline void write_queries(const AttendArgs& a, int64_t lanes, const AttendScratch& scratch) {
  for (int64_t q = 0; q < lanes; q += kLanes) {
    const Vec share = div(broadcast(1.0f), load(scratch.sum + q));
    const int64_t count = a.num_queries - q < kLanes ? a.num_queries - q : kLanes;
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      const int64_t n = a.dim - d < kLanes ? a.dim - d : kLanes;
      Vec rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = i < n ? mul(load(scratch.sums + (d + i) * kAttendQueries + q), share) : zeros();
      }
      transpose(rows);
      for (int64_t i = 0; i < count; ++i) store(a.out + (q + i) * a.out_stride + d, rows[i], n);
    }
  }
}

void attend(const AttendArgs& a) {
  const AttendScratch scratch = divide_scratch(a);
  const int64_t lanes = (a.num_queries + kLanes - 1) / kLanes * kLanes;
  pack_queries(a, lanes, scratch.query);
  for (int64_t d = 0; d < a.dim; ++d) {
    for (int64_t q = 0; q < lanes; q += kLanes) store(scratch.sums + d * kAttendQueries + q, zeros());
  }
  for (int64_t q = 0; q < lanes; ++q) {
    scratch.most[q] = -INFINITY;
    scratch.sum[q] = 0.0f;
  }
  for (int64_t begin = 0; begin < a.num_keys; begin += kAttendKeys) {
    const int64_t num_keys = a.num_keys - begin < kAttendKeys ? a.num_keys - begin : kAttendKeys;
    copy_rows(a.key + begin * a.key_stride, a.key_stride, num_keys, a.dim, scratch.key);
    copy_rows(a.value + begin * a.value_stride, a.value_stride, num_keys, a.dim, scratch.value);
    for (int64_t at = 0; at < lanes; at += kAttendVecs * kLanes) {
      const int64_t vecs = (lanes - at) / kLanes;
      with_number<kAttendVecs>(vecs < kAttendVecs ? vecs : kAttendVecs, [&]<int kVecs>(Number<kVecs>) {
        attend_block<kVecs>(a, scratch, at, begin, num_keys);
      });
    }
  }
  write_queries(a, lanes, scratch);
}

#endif

}  // namespace
}  // namespace argosy
