// attention_amx.h: the attention of attention.h on the tiles of Intel AMX, for groups of heads that share a
// KV head.
//
// Each query, key, value and weight is split into two bfloat16 numbers, a high and a low part, which together
// keep 16 bits of a float32 and all 11 of a float16. A product adds three products of tiles: high by low,
// high by high, low by high. So scores and sums have errors of about 2^-16, not the 2^-9 of bfloat16.
//
// Positions are divided as in attention.h: into sections, which have the same states and merges, and within
// them into stretches, at fixed places. A tile of scores is sixteen queries by sixteen positions. A row of a
// tile depends on its own query only, and a position that a query does not see has a weight of zero, so an
// output has the same bits in decode, in a chunk of any size and with any number of threads.
//
// The keys and values of a stretch are split once for all queries of a call; a call takes up to
// kAmxQueries of them, so that this is a small part of the work.
#pragma once

#include <math.h>

#include "kernels/amx.h"
#include "kernels/attention_args.h"
#include "kernels/exp.h"
#include "kernels/kernel_table.h"
#include "kernels/kv_formats.h"
#include "kernels/matmul_args.h"
#include "kernels/split_bf16.h"

namespace argosy {

extern const KernelTable kAvx512Kernels;

namespace {

// Keys that are multiplied by queries before their weights are multiplied by values: sixteen tiles of
// positions, eight steps of two tiles.
constexpr int64_t kAmxStretch = 256;
constexpr int64_t kStretchTiles = kAmxStretch / kKeyTile, kStepKeys = 2 * kKeyTile;
constexpr int64_t kStretchSteps = kAmxStretch / kStepKeys;
constexpr int64_t kRowTiles = kAmxQueries / kTileRows;
static_assert(kSectionKeys % kAmxStretch == 0);

// The sizes of the parts of a call's scratch, for heads of these dimensions.
struct AmxAttentionSizes {
  AmxAttentionSizes(int64_t head_dim, int64_t value_dim)
      : steps((head_dim + 31) / 32),
        columns((value_dim + 15) / 16),
        state(attention_state_floats(value_dim)) {}

  int64_t query_bytes() const { return kRowTiles * steps * kTileBytes; }
  int64_t key_bytes() const { return kStretchTiles * steps * kTileBytes; }
  int64_t value_bytes() const { return kStretchSteps * columns * kTileBytes; }
  static int64_t weight_bytes() { return 2 * kStretchSteps * kTileBytes; }
  static int64_t score_bytes() { return 2 * kStretchTiles * kTileBytes; }
  int64_t sum_bytes() const { return kRowTiles * columns * kTileBytes; }
  int64_t bytes() const {
    const int64_t twice = query_bytes() + key_bytes() + value_bytes() + weight_bytes();
    return 64 + 2 * twice + score_bytes() + sum_bytes() + (kAmxQueries + 1) * state * 4;
  }

  int64_t steps;    // of 32 dimensions
  int64_t columns;  // of 16 dimensions, of values
  int64_t state;    // floats
};

// Adds the products of tiles: high by low, high by high, low by high.
template <class Grid>
inline void multiply_split(const Split& x, int64_t x_row, const Split& w, int64_t w_column) {
  Grid::load_left(x.high, x_row, kTileRowBytes);
  Grid::load_right(w.low, w_column, kTileRowBytes);
  Grid::dot_bf16();
  Grid::load_right(w.high, w_column, kTileRowBytes);
  Grid::dot_bf16();
  Grid::load_left(x.low, x_row, kTileRowBytes);
  Grid::dot_bf16();
}

// The progress of one (token, head) through the keys.
struct AmxQuery {
  int64_t first, last;  // lanes that the query sees, in all
  float sink;           // -INFINITY: none
  float most, sum;      // of the current section: the running maximum of scores, the sum of weights
  bool has_total;       // there was a section before
  int64_t begin, end;   // lanes that the query sees, in the current stretch
};

template <class Kv>
class AmxAttention {
 public:
  // Splits `count` queries into tiles of sixteen, and fills the last tile with zeros.
  AmxAttention(const AttentionArgs& args, int64_t first_query, int64_t count)
      : a(args), sizes(args.kv.head_dim, args.kv.value_dim), num_queries(count) {
    TileMemory memory(a.scratch);
    q = memory.take_split(sizes.query_bytes());
    keys = memory.take_split(sizes.key_bytes());
    values = memory.take_split(sizes.value_bytes());
    weights = memory.take_split(sizes.weight_bytes());
    scores = memory.take_floats(sizes.score_bytes());
    sums = memory.take_floats(sizes.sum_bytes());
    totals = memory.take_floats((kAmxQueries + 1) * sizes.state * 4);
    const int64_t group = a.num_heads / a.kv.kv_heads;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = (first_query + i) / group;
      const int64_t head = a.kv_head * group + (first_query + i) % group;
      queries[i] = {lane_of(a.kv, first_position(a, token)),
                    lane_of(a.kv, last_position(a, token)),
                    sink_of(a, head),
                    -INFINITY,
                    0.0f,
                    false,
                    0,
                    0};
      put_query(i, a.q + (token * a.num_heads + head) * a.kv.head_dim);
    }
    for (int64_t i = count; i < round_up(count, kTileRows); ++i) put_query(i, nullptr);
  }

  void run() {
    int64_t first = INT64_MAX, last = -1;
    for (int64_t i = 0; i < num_queries; ++i) {
      first = queries[i].first < first ? queries[i].first : first;
      last = queries[i].last > last ? queries[i].last : last;
    }
    const int64_t begin = a.section < 0 ? first / kSectionKeys : a.section;
    const int64_t end = a.section < 0 ? last / kSectionKeys + 1 : a.section + 1;
    for (int64_t section = begin; section < end; ++section) run_section(section);
  }

  const AmxQuery& query(int64_t i) const { return queries[i]; }
  const float* total(int64_t i) const { return totals + i * sizes.state; }

 private:
  void put_query(int64_t i, const float* from) {
    const int64_t dim = a.kv.head_dim;
    const auto part = [&](int64_t d) {
      const int64_t n = dim - d < kLanes ? dim - d : kLanes;
      return from != nullptr && n > 0 ? load(from + d, n) : zeros();
    };
    for (int64_t step = 0; step < sizes.steps; ++step) {
      const int64_t tile = i / kTileRows * sizes.steps + step;
      put_row(q + (tile * kTileBytes + i % kTileRows * kTileRowBytes), part(step * 32), part(step * 32 + 16));
    }
  }

  void run_section(int64_t section) {
    const int64_t start = section * kSectionKeys, after = start + kSectionKeys;
    int64_t from = after, to = start - 1;  // lanes that any query sees
    for (int64_t i = 0; i < num_queries; ++i) {
      AmxQuery& query = queries[i];
      if (!sees(query, start, after)) continue;
      const bool has_sink = section == query.first / kSectionKeys && query.sink != -INFINITY;
      query.most = has_sink ? query.sink : -INFINITY;
      query.sum = has_sink ? 1.0f : 0.0f;
      from = query.first < from ? query.first : from;
      to = query.last > to ? query.last : to;
    }
    if (from == after) return;
    from = from > start ? from : start;
    to = to < after ? to : after - 1;
    for (int64_t at = 0; at < sizes.sum_bytes() / 4; at += kLanes) store(sums + at, zeros());
    for (int64_t stretch = from / kAmxStretch; stretch <= to / kAmxStretch; ++stretch) {
      run_stretch(stretch * kAmxStretch, from, to);
    }
    for (int64_t i = 0; i < num_queries; ++i) {
      if (sees(queries[i], start, after)) end_section(i);
    }
  }

  static bool sees(const AmxQuery& query, int64_t begin, int64_t end) {
    return query.first < end && query.last >= begin;
  }

  // Moves what a query has added up in a section to its total.
  void end_section(int64_t i) {
    float* total = totals + i * sizes.state;
    float* state = queries[i].has_total ? totals + kAmxQueries * sizes.state : total;
    for (int64_t c = 0; c < sizes.columns; ++c) store(state + c * kLanes, load(sums_of(i, c)));
    store(state + sizes.columns * kLanes, zeros());
    state[sizes.columns * kLanes] = queries[i].most;
    state[sizes.columns * kLanes + 1] = queries[i].sum;
    if (queries[i].has_total) kAvx512Kernels.attention_merge(state, a.kv.value_dim, total);
    queries[i].has_total = true;
  }

  float* sums_of(int64_t i, int64_t column) const {
    return sums + (i / kTileRows * sizes.columns + column) * (kTileBytes / 4) + i % kTileRows * kLanes;
  }

  // The stretch that begins at lane `start`, of which lanes [from, to] of a section are seen by any query.
  void run_stretch(int64_t start, int64_t from, int64_t to) {
    const int64_t begin = from > start ? from - start : 0;
    const int64_t end = to - start < kAmxStretch ? to - start + 1 : kAmxStretch;
    for (int64_t i = 0; i < num_queries; ++i) {
      AmxQuery& query = queries[i];
      query.begin = query.first > start ? query.first - start : 0;
      query.end = query.last - start + 1 < kAmxStretch ? query.last - start + 1 : kAmxStretch;
    }
    const int64_t step_begin = begin / kStepKeys, step_end = (end + kStepKeys - 1) / kStepKeys;
    split_stretch(start, begin, end, step_begin, step_end);
    static constexpr TileConfig kConfig = whole_tiles();
    const TileScope tiles(kConfig);
    const int64_t row_tiles = (num_queries + kTileRows - 1) / kTileRows;
    for (int64_t row = 0; row < row_tiles; row += 2) {
      if (row + 1 < row_tiles) {
        run_rows<2>(row, step_begin, step_end);
      } else {
        run_rows<1>(row, step_begin, step_end);
      }
    }
  }

  // Splits the keys and values of lanes [begin, end) of a stretch. Tiles and values outside
  // become zeros, because memory may hold NaN there, and a weight of zero times NaN is NaN.
  void split_stretch(int64_t start, int64_t begin, int64_t end, int64_t step_begin, int64_t step_end) {
    const KvLayer& kv = a.kv;
    const int64_t per_block = tiles_per_block(kv);
    for (int64_t tile = 2 * step_begin; tile < 2 * step_end; ++tile) {
      const int64_t lane = tile * kKeyTile;
      if (lane + kKeyTile <= begin || lane >= end) {
        put_tile(tile, nullptr, nullptr, 0, 0);
        num_keys[tile] = 0;
        continue;
      }
      const int64_t number = start / kKeyTile + tile;
      const int64_t place =
          (a.blocks[number / per_block] * kv.kv_heads + a.kv_head) * per_block + number % per_block;
      const int64_t rest = kv.block_tokens - number % per_block * kKeyTile;
      num_keys[tile] = rest < kKeyTile ? rest : kKeyTile;
      const int64_t last = end - lane < num_keys[tile] ? end - lane : num_keys[tile];
      put_tile(tile, kv.keys + place * key_tile_bytes(kv), kv.values + place * value_tile_bytes(kv),
               begin > lane ? begin - lane : 0, last);
    }
  }

  // Splits the keys of a tile, and its values from row `first` to before row `last`.
  void put_tile(int64_t tile, const uint8_t* key, const uint8_t* value, int64_t first, int64_t last) {
    const int64_t dim = a.kv.head_dim, padded_dim = padded_value_dim(a.kv);
    const Split key_tile = keys + tile * sizes.steps * kTileBytes;
    typename Kv::Scale scale = {};
    for (int64_t d = 0; d < sizes.steps * 32; d += 2) {
      const Split row = key_tile + d / 2 * kTileRowBytes;
      if (key == nullptr || d >= dim) {
        put_zeros(row);
        continue;
      }
      const uint8_t* from = key + d * kKeyTile * Kv::kBytes;
      if constexpr (Kv::kKeyScaleBytes > 0) {
        from += d / kKvGroup * Kv::kKeyScaleBytes;
        if (d % kKvGroup == 0) scale = Kv::key_scale(from, 0);
        from += Kv::kKeyScaleBytes;
      }
      const Vec second = d + 1 < dim ? Kv::load(from + kKeyTile * Kv::kBytes, scale) : zeros();
      put_pairs(row, Kv::load(from, scale), second);
    }
    const int64_t groups = kv_groups(padded_dim);
    const uint8_t* scales = value + kKeyTile * padded_dim * Kv::kBytes;  // if there are any
    for (int64_t c = 0; c < sizes.columns; ++c) {
      const auto element = [&](int64_t row) {
        if (row < first || row >= last) return zeros();
        const typename Kv::Scale of_row = Kv::value_scale(scales, row * groups + c * kLanes / kKvGroup);
        return Kv::load(value + (row * padded_dim + c * kLanes) * Kv::kBytes, of_row);
      };
      const Split value_tile =
          values + ((tile / 2 * sizes.columns + c) * kTileBytes + tile % 2 * (kTileBytes / 2));
      for (int64_t row = 0; row < kKeyTile; row += 2) {
        put_pairs(value_tile + row / 2 * kTileRowBytes, element(row), element(row + 1));
      }
    }
  }

  // One or two tiles of queries, from tile `row`.
  template <int kRows>
  void run_rows(int64_t row, int64_t step_begin, int64_t step_end) {
    for (int64_t step = step_begin; step < step_end; ++step) score<kRows>(row, step);
    for (int64_t i = row * kTileRows; i < (row + kRows) * kTileRows; ++i) {
      soften(i, (i / kTileRows - row), step_begin, step_end);
    }
    int64_t column = 0;
    for (; column + 2 <= sizes.columns; column += 2) add_values<kRows, 2>(row, column, step_begin, step_end);
    if (column < sizes.columns) add_values<kRows, 1>(row, column, step_begin, step_end);
  }

  // The scores of two tiles of positions.
  template <int kRows>
  void score(int64_t row, int64_t step) {
    using Grid = TileGrid<kRows, 2>;
    const int64_t row_bytes = sizes.steps * kTileBytes;
    const Split x = q + row * row_bytes, w = keys + 2 * step * row_bytes;
    Grid::zero();
    for (int64_t d = 0; d < row_bytes; d += kTileBytes)
      multiply_split<Grid>(x + d, row_bytes, w + d, row_bytes);
    Grid::store(scores + 2 * step * (kTileBytes / 4), kStretchTiles * kTileBytes, kTileBytes, kTileRowBytes);
  }

  // Adds the weighted values of a stretch to kColumns columns.
  template <int kRows, int kColumns>
  void add_values(int64_t row, int64_t column, int64_t step_begin, int64_t step_end) {
    using Grid = TileGrid<kRows, kColumns>;
    float* to = sums + (row * sizes.columns + column) * (kTileBytes / 4);
    const int64_t to_row = sizes.columns * kTileBytes, weights_row = kStretchSteps * kTileBytes;
    Grid::load(to, to_row, kTileBytes, kTileRowBytes);
    for (int64_t step = step_begin; step < step_end; ++step) {
      multiply_split<Grid>(weights + step * kTileBytes, weights_row,
                           values + (step * sizes.columns + column) * kTileBytes, kTileBytes);
    }
    Grid::store(to, to_row, kTileBytes, kTileRowBytes);
  }

  // Turns the scores of query i into weights, and rescales its sums to the new maximum; `row` is its tile
  // among those of the scores.
  void soften(int64_t i, int64_t row, int64_t step_begin, int64_t step_end) {
    const auto weights_of = [&](int64_t step) {
      return weights + ((row * kStretchSteps + step) * kTileBytes + i % kTileRows * kTileRowBytes);
    };
    if (i >= num_queries || queries[i].begin >= queries[i].end) {
      for (int64_t step = step_begin; step < step_end; ++step) put_zeros(weights_of(step));
      return;
    }
    AmxQuery& query = queries[i];
    float* score = scores + (row * kStretchTiles * kTileRows + i % kTileRows) * kLanes;
    constexpr int64_t kTile = kTileRows * kLanes;
    Vec largest = broadcast(query.most);
    for (int64_t tile = 2 * step_begin; tile < 2 * step_end; ++tile) {
      const int64_t at = tile * kKeyTile;
      const int64_t begin = query.begin > at ? query.begin - at : 0;
      int64_t end = query.end - at < num_keys[tile] ? query.end - at : num_keys[tile];
      end = end > 0 ? end : 0;
      Vec scaled = mul(load(score + tile * kTile), broadcast(a.scale));
      if (begin > 0 || end < kKeyTile) {
        scaled = keep_lanes(scaled, begin < kKeyTile ? begin : kKeyTile, end, -INFINITY);
      }
      store(score + tile * kTile, scaled);
      largest = max_or_second(scaled, largest);
    }
    const float most = max_lanes(largest);
    Vec sum = zeros();
    for (int64_t step = step_begin; step < step_end; ++step) {
      const Vec first = exp(sub(load(score + 2 * step * kTile), broadcast(most)));
      const Vec second = exp(sub(load(score + (2 * step + 1) * kTile), broadcast(most)));
      put_row(weights_of(step), first, second);
      sum = add(add(sum, first), second);
    }
    // Multiplying by one changes no bits, so skipping it changes none either.
    if (most > query.most) {
      const float shrink = exp(query.most - most);
      query.sum *= shrink;
      for (int64_t c = 0; c < sizes.columns; ++c) {
        store(sums_of(i, c), mul(load(sums_of(i, c)), broadcast(shrink)));
      }
    }
    query.most = most;
    query.sum += sum_lanes(sum);
  }

  const AttentionArgs& a;
  const AmxAttentionSizes sizes;
  const int64_t num_queries;
  Split q;        // [row tile][step of dimensions]
  Split keys;     // [tile of positions][step of dimensions]
  Split values;   // [step of positions][column]
  Split weights;  // [two row tiles][step of positions]
  float* scores;  // [two row tiles][tile of positions]
  float* sums;    // [row tile][column]
  float* totals;  // [queries + 1][state]
  AmxQuery queries[kAmxQueries];
  int64_t num_keys[kStretchTiles];  // positions of a tile that are not padding; 0: no query sees the tile
};

// With fewer heads than this for a KV head, decode would spend more time on splitting keys than on products.
constexpr int64_t kFewestGroupedHeads = 4;

void attention_amx(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.kv.kv_heads, dim = a.kv.value_dim;
  if (group < kFewestGroupedHeads) return kAvx512Kernels.attention(a);
  for (int64_t begin = 0; begin < a.num_tokens * group; begin += kAmxQueries) {
    const int64_t rest = a.num_tokens * group - begin;
    const int64_t count = rest < kAmxQueries ? rest : kAmxQueries;
    with_kv(a.kv.format, [&]<class Kv>(Kv) {
      AmxAttention<Kv> attention(a, begin, count);
      attention.run();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (begin + i) / group * a.num_heads + a.kv_head * group + (begin + i) % group;
        if (a.section < 0) {
          kAvx512Kernels.attention_finish(attention.total(i), dim, a.out + row * dim);
        } else if (attention.query(i).has_total) {  // it sees the section
          float* state = state_of(a, begin + i);
          for (int64_t d = 0; d < attention_state_floats(dim); ++d) state[d] = attention.total(i)[d];
        }
      }
    });
  }
}

}  // namespace
}  // namespace argosy
