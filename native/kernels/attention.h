// attention.h: grouped-query attention of consecutive tokens of one sequence against one KV head.
//
//   out[t][h] = sum over p of softmax over p (scale * q[t][h] . key[p]) * value[p]
//
//   p runs from first_seen(window, order[t]) to sees_until[t] - 1, which is order[t] unless tokens see later
//   ones (a span of a picture), and h over the heads that share the KV head; keys and values lie in KV blocks
//   (layout: kv_layer.h); q and out are float32. A sink is one more score of a head: it takes weight from
//   the other scores and adds no value (gpt-oss; arXiv:2309.17453 explains why models want one).
//
// Positions are divided into sections at fixed places. Each section has its own state, and the states of the
// sections that a token sees are merged in ascending order, whichever thread computed them. Within a
// section, the reference passes over the keys twice. The vector version processes stretches of four tiles of
// sixteen positions, at fixed places, with a running maximum (Milakov and Gimelshein, arXiv:1805.02867).
// Which positions share a stretch and a section, and the order of its sums, depend only on the positions a
// token sees, so its output is the same in decode, in a prefill chunk of any size, and with any number of
// threads. A sink initialises the running maximum and sum of the first section.
//
// Bound by multiply-adds if many tokens and heads share the keys, by reading the keys for one token. The keys
// of a few tiles, and the values of a few columns, stay in the first-level cache while all queries of the
// call use them. Blocks lie apart, and hardware starts anew in each: the first queries of a stretch prefetch
// the next stretch into the second-level cache.
#pragma once

#include <math.h>

#include "kernels/attention_args.h"
#include "kernels/exp.h"
#include "kernels/half.h"
#include "kernels/kv_formats.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

inline float attention_score(const AttentionArgs& a, const float* q, int64_t position) {
  const int64_t offset = position % a.kv.block_tokens;
  const uint8_t* keys = key_head(a.kv, a.blocks[position / a.kv.block_tokens], a.kv_head);
  float dot = 0.0f;
  for (int64_t d = 0; d < a.kv.head_dim; ++d) dot += q[d] * key_element(a.kv, keys, offset, d);
  return dot * a.scale;
}

// Writes the state of one section.
inline void attend_section(const AttentionArgs& a, int64_t token, int64_t head, int64_t section,
                           float* state) {
  const int64_t dim = a.kv.value_dim, padded_dim = padded_value_dim(a.kv);
  const float* q = a.q + (token * a.num_heads + head) * a.kv.head_dim;
  const bool is_first = section == first_section(a, token);
  int64_t begin = first_position(a, token);
  while (lane_of(a.kv, begin) / kSectionKeys < section) ++begin;
  int64_t end = begin;
  const float sink = is_first ? sink_of(a, head) : -INFINITY;
  float most = sink;
  for (; end <= last_position(a, token) && lane_of(a.kv, end) / kSectionKeys == section; ++end) {
    most = fmaxf(most, attention_score(a, q, end));
  }
  float sum = expf(sink - most);
  for (int64_t d = 0; d < padded_dim; ++d) state[d] = 0.0f;
  for (int64_t p = begin; p < end; ++p) {
    const float weight = expf(attention_score(a, q, p) - most);
    const uint8_t* values = value_head(a.kv, a.blocks[p / a.kv.block_tokens], a.kv_head);
    sum += weight;
    for (int64_t d = 0; d < dim; ++d) {
      state[d] += weight * value_element(a.kv, values, p % a.kv.block_tokens, d);
    }
  }
  state[padded_dim] = most;
  state[padded_dim + 1] = sum;
}

void attention_merge(const float* next, int64_t value_dim, float* state) {
  const int64_t most_at = round_up(value_dim, kKeyTile);
  const float most = fmaxf(state[most_at], next[most_at]);
  const float mine = expf(state[most_at] - most), theirs = expf(next[most_at] - most);
  for (int64_t d = 0; d < value_dim; ++d) state[d] = state[d] * mine + next[d] * theirs;
  state[most_at + 1] = state[most_at + 1] * mine + next[most_at + 1] * theirs;
  state[most_at] = most;
}

void attention_finish(const float* state, int64_t value_dim, float* out) {
  for (int64_t d = 0; d < value_dim; ++d) out[d] = state[d] / state[round_up(value_dim, kKeyTile) + 1];
}

void attention(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.kv.kv_heads;
  float *total = a.scratch, *next = total + attention_state_floats(a.kv.value_dim);
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const int64_t first = first_section(a, token), last = last_section(a, token);
    for (int64_t i = 0; i < group; ++i) {
      const int64_t head = a.kv_head * group + i;
      if (a.section >= 0) {
        if (first <= a.section && a.section <= last)
          attend_section(a, token, head, a.section, state_of(a, token * group + i));
        continue;
      }
      attend_section(a, token, head, first, total);
      for (int64_t section = first + 1; section <= last; ++section) {
        attend_section(a, token, head, section, next);
        attention_merge(next, a.kv.value_dim, total);
      }
      attention_finish(total, a.kv.value_dim, a.out + (token * a.num_heads + head) * a.kv.value_dim);
    }
  }
}

#else

constexpr int64_t kTileVecs = kKeyTile / kLanes;
constexpr int64_t kStretchTiles = kStretchKeys / kKeyTile;

// The progress of one (token, head) through the keys. Lane numbers include the padding of the blocks.
struct Query {
  float* q;             // [head_dim], a copy: rows of the batch may be a power of two apart
  float* scores;        // [kStretchKeys], scores of the current stretch, later the weights of its keys
  float* values;        // [padded value_dim], running weighted sum
  float* total;         // the state of all sections before
  int64_t first, last;  // lanes that the query sees, in all
  float sink;           // -INFINITY: none
  float most;           // running maximum of the scores, in the current section
  float sum;            // running sum of the weights
  bool has_total;       // there was a section before
  int64_t begin, end;   // lanes that the query sees, in the current stretch
};

// ahead: where the keys and values of the same tile of the next stretch are, or its own.
struct KeyTile {
  const uint8_t* keys;
  const uint8_t* values;
  int64_t num_keys;
  const uint8_t* ahead_keys;
  const uint8_t* ahead_values;
};

// Computes the scores of kTiles tiles for kCount queries. Each key element is loaded once for all queries,
// each query element once for all tiles.
template <class Kv, int kCount, int kTiles, bool kAsksAhead>
void score_tiles(Query* const* queries, const KeyTile* tiles, int64_t at, int64_t dim, float scale) {
  const float* q[kCount];
  const uint8_t *keys[kTiles], *ahead[kTiles];
  Vec score[kCount][kTiles][kTileVecs];
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
    keys[t] = tiles[t].keys;
    ahead[t] = tiles[t].ahead_keys;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    q[i] = queries[i]->q;
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) score[i][t][v] = zeros();
    }
  }
  typename Kv::Scale scale_of[kTiles][kTileVecs] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vec key[kTiles][kTileVecs];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      if constexpr (Kv::kKeyScaleBytes > 0) {
        if (d % kKvGroup == 0) {
#pragma GCC unroll 2
          for (int v = 0; v < kTileVecs; ++v)
            scale_of[t][v] = Kv::key_scale(keys[t] + d * kKeyTile * Kv::kBytes, v * kLanes);
          keys[t] += Kv::kKeyScaleBytes;
          ahead[t] += Kv::kKeyScaleBytes;
        }
      }
      if constexpr (kAsksAhead) __builtin_prefetch(ahead[t] + d * kKeyTile * Kv::kBytes, 0, 2);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v)
        key[t][v] = Kv::load(keys[t] + (d * kKeyTile + v * kLanes) * Kv::kBytes, scale_of[t][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vec element = broadcast(q[i][d]);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < kTileVecs; ++v) score[i][t][v] = fma(element, key[t][v], score[i][t][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        store(queries[i]->scores + at + t * kKeyTile + v * kLanes, mul(score[i][t][v], broadcast(scale)));
      }
    }
  }
}

// Turns the scores of a stretch into weights, and rescales the running sums to the new maximum.
inline void soften(Query& query, const KeyTile* tiles, int64_t padded_dim) {
  const int64_t tile_begin = query.begin / kKeyTile;
  const int64_t tile_end = (query.end + kKeyTile - 1) / kKeyTile;
  Vec largest = broadcast(query.most);
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    for (int64_t v = 0; v < kTileVecs; ++v) {
      const int64_t at = t * kKeyTile + v * kLanes;
      const int64_t keys = tiles[t].num_keys - v * kLanes;
      const int64_t begin = query.begin > at ? query.begin - at : 0;
      int64_t end = query.end - at < keys ? query.end - at : keys;
      end = end > 0 ? end : 0;
      if (begin > 0 || end < kLanes) {
        store(query.scores + at, keep_lanes(load(query.scores + at), begin < kLanes ? begin : kLanes,
                                            end < kLanes ? end : kLanes, -INFINITY));
      }
      largest = max_or_second(load(query.scores + at), largest);
    }
  }
  const float most = max_lanes(largest);
  Vec sum = zeros();
  for (int64_t at = tile_begin * kKeyTile; at < tile_end * kKeyTile; at += kLanes) {
    const Vec weight = exp(sub(load(query.scores + at), broadcast(most)));
    store(query.scores + at, weight);
    sum = add(sum, weight);
  }
  // Multiplying by one changes no bits, so skipping it changes none either.
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

// Adds the weighted values of lanes [begin, end), in ascending order, to kVecs vectors of columns starting at
// d, for kCount queries that see these lanes.
template <class Kv, int kCount, int kVecs, bool kAsksAhead>
void add_values(Query* const* queries, const KeyTile* tiles, int64_t padded_dim, int64_t d, int64_t begin,
                int64_t end) {
  const float* weights[kCount];
  const int64_t groups = kv_groups(padded_dim);
  Vec sum[kCount][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    weights[i] = queries[i]->scores;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[i][v] = load(queries[i]->values + d + v * kLanes);
  }
  for (int64_t t = begin / kKeyTile; t * kKeyTile < end; ++t) {
    const KeyTile& tile = tiles[t];
    const int64_t first = begin > t * kKeyTile ? begin - t * kKeyTile : 0;
    const int64_t after = end - t * kKeyTile < tile.num_keys ? end - t * kKeyTile : tile.num_keys;
    const uint8_t* scales = tile.values + kKeyTile * padded_dim * Kv::kBytes;  // if there are any
    for (int64_t key = first; key < after; ++key) {
      const int64_t at = (key * padded_dim + d) * Kv::kBytes;
      const uint8_t* row = tile.values + at;
      if constexpr (kAsksAhead) {
#pragma GCC unroll 4
        for (int line = 0; line < kVecs * kLanes * Kv::kBytes; line += 64) {
          __builtin_prefetch(tile.ahead_values + at + line, 0, 2);
        }
      }
      Vec value[kVecs];
      typename Kv::Scale scale = {};
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        // Several vectors begin at a multiple of a group, and one lies within a group.
        if (v * kLanes % kKvGroup == 0)
          scale = Kv::value_scale(scales, key * groups + d / kKvGroup + v * kLanes / kKvGroup);
        value[v] = Kv::load(row + v * kLanes * Kv::kBytes, scale);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Vec weight = broadcast(weights[i][t * kKeyTile + key]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[i][v] = fma(weight, value[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(queries[i]->values + d + v * kLanes, sum[i][v]);
  }
}

// Does the same for all queries of a stretch, several at once if they see the same lanes.
template <class Kv, int kVecs>
void add_columns(Query* const* queries, int64_t count, const KeyTile* tiles, int64_t padded_dim, int64_t d) {
  const auto add = [&]<int kCount>(Number<kCount>, int64_t i) {
    const int64_t begin = queries[i]->begin, end = queries[i]->end;
    if (i == 0) {
      add_values<Kv, kCount, kVecs, true>(queries, tiles, padded_dim, d, begin, end);
    } else {
      add_values<Kv, kCount, kVecs, false>(queries + i, tiles, padded_dim, d, begin, end);
    }
  };
  int64_t i = 0;
  while (i < count) {
    int64_t same = 1;
    while (same < kValueQueries && i + same < count && queries[i + same]->begin == queries[i]->begin &&
           queries[i + same]->end == queries[i]->end) {
      ++same;
    }
    if (same < kValueQueries) {
      for (; same > 0; --same, ++i) add(Number<1>{}, i);
    } else {
      add(Number<kValueQueries>{}, i);
      i += kValueQueries;
    }
  }
}

template <class Kv, int kTiles>
void score_queries(Query* const* queries, int64_t count, const KeyTile* tiles, int64_t tile, int64_t dim,
                   float scale) {
  const int64_t at = tile * kKeyTile;
  const auto are_seen = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (queries[i]->begin < at + kTiles * kKeyTile && queries[i]->end > at) return true;
    }
    return false;
  };
  const auto score = [&]<int kCount>(Number<kCount>, int64_t i) {
    if (!are_seen(i, i + kCount)) return;
    if (i == 0) {
      score_tiles<Kv, kCount, kTiles, true>(queries, tiles + tile, at, dim, scale);
    } else {
      score_tiles<Kv, kCount, kTiles, false>(queries + i, tiles + tile, at, dim, scale);
    }
  };
  int64_t i = 0;
  for (; i + kScoreQueries <= count; i += kScoreQueries) score(Number<kScoreQueries>{}, i);
  with_number<kScoreQueries - 1>(count - i, [&]<int kRest>(Number<kRest> rest) { score(rest, i); });
}

// Processes tiles [0, num_tiles) of a stretch for the queries that see any of it.
template <class Kv>
void attend_stretch(const AttentionArgs& a, Query* const* queries, int64_t count, const KeyTile* tiles,
                    int64_t tile_begin, int64_t tile_end) {
  const int64_t dim = a.kv.head_dim;
  const int64_t padded_dim = padded_value_dim(a.kv);
  int64_t tile = tile_begin;
  for (; tile + kScoreTiles <= tile_end; tile += kScoreTiles) {
    score_queries<Kv, kScoreTiles>(queries, count, tiles, tile, dim, a.scale);
  }
  for (; tile < tile_end; ++tile) score_queries<Kv, 1>(queries, count, tiles, tile, dim, a.scale);
  for (int64_t i = 0; i < count; ++i) soften(*queries[i], tiles, padded_dim);
  int64_t d = 0;
  for (; d + 4 * kLanes <= padded_dim; d += 4 * kLanes) {
    add_columns<Kv, 4>(queries, count, tiles, padded_dim, d);
  }
  for (; d < padded_dim; d += kLanes) add_columns<Kv, 1>(queries, count, tiles, padded_dim, d);
}

// Not inlined, so that every merge executes the same instructions.
[[gnu::noinline]] void attention_merge(const float* next, int64_t value_dim, float* state) {
  const int64_t most_at = round_up(value_dim, kKeyTile), sum_at = most_at + 1;
  const float most = next[most_at] > state[most_at] ? next[most_at] : state[most_at];
  const float mine = exp(state[most_at] - most), theirs = exp(next[most_at] - most);
  for (int64_t d = 0; d < most_at; d += kLanes) {
    store(state + d, fma(load(next + d), broadcast(theirs), mul(load(state + d), broadcast(mine))));
  }
  state[sum_at] = next[sum_at] * theirs + state[sum_at] * mine;
  state[most_at] = most;
}

void attention_finish(const float* state, int64_t value_dim, float* out) {
  const Vec share = broadcast(1.0f / state[round_up(value_dim, kKeyTile) + 1]);
  for (int64_t d = 0; d < value_dim; d += kLanes) {
    const int64_t n = value_dim - d < kLanes ? value_dim - d : kLanes;
    store(out + d, mul(load(state + d), share), n);
  }
}

inline void begin_section(Query& query, int64_t section, int64_t padded_dim) {
  const bool has_sink = section == query.first / kSectionKeys && query.sink != -INFINITY;
  query.most = has_sink ? query.sink : -INFINITY;
  query.sum = has_sink ? 1.0f : 0.0f;
  for (int64_t d = 0; d < padded_dim; d += kLanes) store(query.values + d, zeros());
}

inline void end_section(Query& query, int64_t value_dim, int64_t padded_dim) {
  query.values[padded_dim] = query.most;
  query.values[padded_dim + 1] = query.sum;
  if (query.has_total) {
    attention_merge(query.values, value_dim, query.total);
    return;
  }
  for (int64_t d = 0; d < attention_state_floats(value_dim); d += kLanes) {
    store(query.total + d, load(query.values + d));
  }
  query.has_total = true;
}

// Processes the stretches of [first, last], lanes of one section, for the queries that see any of it. The
// call goes on to lane `end`.
template <class Kv>
void attend_lanes(const AttentionArgs& a, Query* all, int64_t count, int64_t first, int64_t last,
                  int64_t end) {
  const KvLayer& kv = a.kv;
  const int64_t per_block = tiles_per_block(kv);
  const int64_t key_bytes = key_tile_bytes(kv), value_bytes = value_tile_bytes(kv);
  const auto place_of = [&](int64_t tile) {
    return (a.blocks[tile / per_block] * kv.kv_heads + a.kv_head) * per_block + tile % per_block;
  };
  const auto keys_of = [&](int64_t tile) { return kv.keys + place_of(tile) * key_bytes; };
  const auto values_of = [&](int64_t tile) { return kv.values + place_of(tile) * value_bytes; };
  for (int64_t stretch = first / kStretchKeys; stretch <= last / kStretchKeys; ++stretch) {
    const int64_t start = stretch * kStretchKeys;
    const int64_t tile_begin = first > start ? (first - start) / kKeyTile : 0;
    const int64_t tile_end = last - start < kStretchKeys ? (last - start) / kKeyTile + 1 : kStretchTiles;
    KeyTile tiles[kStretchTiles] = {};
    for (int64_t t = tile_begin; t < tile_end; ++t) {
      const int64_t tile = stretch * kStretchTiles + t;
      const int64_t offset = tile % per_block * kKeyTile;
      tiles[t].keys = keys_of(tile);
      tiles[t].values = values_of(tile);
      tiles[t].num_keys = kv.block_tokens - offset < kKeyTile ? kv.block_tokens - offset : kKeyTile;
      const int64_t ahead = tile + kStretchTiles <= end / kKeyTile ? tile + kStretchTiles : tile;
      tiles[t].ahead_keys = keys_of(ahead);
      tiles[t].ahead_values = values_of(ahead);
    }
    Query* seeing[kMaxQueries];
    int64_t seen = 0;
    for (int64_t i = 0; i < count; ++i) {
      Query& query = all[i];
      query.begin = query.first > start ? query.first - start : 0;
      query.end = query.last - start + 1 < kStretchKeys ? query.last - start + 1 : kStretchKeys;
      if (query.begin < query.end) seeing[seen++] = &query;
    }
    if (seen > 0) attend_stretch<Kv>(a, seeing, seen, tiles, tile_begin, tile_end);
  }
}

template <class Kv>
void attend_queries(const AttentionArgs& a, Query* all, int64_t count) {
  const int64_t padded_dim = padded_value_dim(a.kv);
  int64_t first = all[0].first;
  int64_t last = all[0].last;
  for (int64_t i = 1; i < count; ++i) {
    first = all[i].first < first ? all[i].first : first;
    last = all[i].last > last ? all[i].last : last;
  }
  const int64_t begin = a.section < 0 ? first / kSectionKeys : a.section;
  const int64_t end = a.section < 0 ? last / kSectionKeys + 1 : a.section + 1;
  for (int64_t section = begin; section < end; ++section) {
    const int64_t start = section * kSectionKeys, after = start + kSectionKeys;
    const auto sees = [&](const Query& query) { return query.first < after && query.last >= start; };
    int64_t from = after, to = start - 1;  // lanes that any query sees
    for (int64_t i = 0; i < count; ++i) {
      if (!sees(all[i])) continue;
      begin_section(all[i], section, padded_dim);
      from = all[i].first < from ? all[i].first : from;
      to = all[i].last > to ? all[i].last : to;
    }
    if (from == after) continue;
    to = to < after ? to : after - 1;
    attend_lanes<Kv>(a, all, count, from > start ? from : start, to, a.section < 0 ? last : to);
    for (int64_t i = 0; i < count; ++i) {
      if (sees(all[i])) end_section(all[i], a.kv.value_dim, padded_dim);
    }
  }
}

void attention(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.kv.kv_heads;
  const int64_t dim = a.kv.head_dim, value_dim = a.kv.value_dim;
  const int64_t query_floats = round_up(dim, kKeyTile) + kStretchKeys;
  const int64_t state_floats = attention_state_floats(value_dim);
  Query queries[kMaxQueries];
  for (int64_t begin = 0; begin < a.num_tokens * group; begin += kMaxQueries) {
    const int64_t rest = a.num_tokens * group - begin;
    const int64_t count = rest < kMaxQueries ? rest : kMaxQueries;
    const auto head_of = [&](int64_t i) { return a.kv_head * group + (begin + i) % group; };
    const auto row_of = [&](int64_t i) { return (begin + i) / group * a.num_heads + head_of(i); };
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = (begin + i) / group;
      // The totals lie apart, so that what a section uses is small.
      float* q = a.scratch + i * (query_floats + state_floats);
      float* scores = q + query_floats - kStretchKeys;
      float* totals = a.scratch + kMaxQueries * (query_floats + state_floats);
      queries[i] = Query{q,
                         scores,
                         scores + kStretchKeys,
                         totals + i * state_floats,
                         lane_of(a.kv, first_position(a, token)),
                         lane_of(a.kv, last_position(a, token)),
                         sink_of(a, head_of(i)),
                         -INFINITY,
                         0.0f,
                         false,
                         0,
                         0};
      for (int64_t d = 0; d < dim; ++d) queries[i].q[d] = a.q[row_of(i) * dim + d];
    }
    with_kv(a.kv.format, [&]<class Kv>(Kv) { attend_queries<Kv>(a, queries, count); });
    for (int64_t i = 0; i < count; ++i) {
      const float* total = queries[i].total;
      if (a.section < 0) {
        attention_finish(total, value_dim, a.out + row_of(i) * value_dim);
      } else if (queries[i].has_total) {  // it sees the section
        float* state = state_of(a, begin + i);
        for (int64_t d = 0; d < state_floats; ++d) state[d] = total[d];
      }
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
