// latent_attention_amx.h: the latent attention of latent_attention.h on the tiles of Intel AMX.
//
// Vectors, queries and weights are split into two bfloat16 numbers and multiplied as in attention_amx.h.
// Heads stay in the lanes, so both products have the vectors on their left:
//
//   scores [positions][heads]   = vectors [positions][dimensions]            * queries [dimensions][heads]
//   values [dimensions][heads]  = transposed vectors [dimensions][positions] * weights [positions][heads]
//
// The vectors of the section are split once for all columns of a call and kept in both layouts. Scores and
// states have the layout of latent_attention.h, whose merges serve both. A section has a single maximum.
//
// A lane of a tile depends on its own column only, and a position that a column does not see has a weight of
// zero. So a column has the same bits in every call. A weight of zero times an infinity or NaN would be NaN:
// the transposed vectors have zeros in place of such numbers, and a column that sees the position has a score
// of NaN there, and with it a weight and values of NaN.
#pragma once

#include "kernels/amx.h"
#include "kernels/attention_amx.h"
#include "kernels/exp.h"
#include "kernels/kv_formats.h"
#include "kernels/latent_args.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

// Numbers in a row of a tile, of positions or of dimensions: a step of a product.
constexpr int64_t kStepNumbers = kTileRowBytes / 2;
constexpr int64_t kSectionSteps = kSectionPositions / kStepNumbers;
static_assert(kSectionSteps * kStepNumbers == kSectionPositions);
// Steps of dimensions after which scores go on to the next positions: the queries of so many steps, 24 KiB,
// stay in the first-level cache.
constexpr int64_t kScoreSteps = 6;
static_assert(kColumnHeads == kLanes && kLanes == kTileRows);

// The sizes of the parts of a call's scratch.
struct AmxLatentSizes {
  AmxLatentSizes(int64_t dim, int64_t value_dim)
      : steps((dim + kStepNumbers - 1) / kStepNumbers),
        value_tiles((value_dim + kTileRows - 1) / kTileRows) {}

  int64_t key_bytes() const { return 2 * kSectionSteps * steps * kTileBytes; }
  int64_t value_bytes() const { return value_tiles * kSectionSteps * kTileBytes; }
  int64_t query_bytes() const { return steps * kTileBytes; }                  // of a column
  static int64_t weight_bytes() { return kSectionSteps * kTileBytes; }        // of a column
  static int64_t score_bytes() { return kSectionPositions * kTileRowBytes; }  // of a column
  int64_t bytes() const {
    const int64_t once = key_bytes() + value_bytes() + 2 * (query_bytes() + weight_bytes());
    return 64 + 2 * once + 2 * score_bytes();
  }

  int64_t steps;        // of 32 dimensions
  int64_t value_tiles;  // of 16 dimensions
};

// Rows of sixteen pairs of bfloat16 become the columns of a tile.
inline void put_transposed(uint8_t* tile, Vec (&rows)[kLanes]) {
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(tile + i * kTileRowBytes), rows[i]);
}

// Pairs of one element of each: the first sixteen, or the last.
inline Vec pairs_of(__m512i first, __m512i second, bool are_last) {
  const __m512i from_second = _mm512_set1_epi32(32 << 16), from_last = _mm512_set1_epi16(are_last ? 16 : 0);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i both = _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16));
  const __m512i order = _mm512_add_epi16(_mm512_add_epi16(both, from_second), from_last);
  return _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, order, second));
}

class AmxLatentAttention {
 public:
  explicit AmxLatentAttention(const LatentAttentionArgs& args) : a(args), sizes(args.kv.dim, args.value_dim) {
    TileMemory memory(a.scratch);
    keys = memory.take_split(sizes.key_bytes());
    values = memory.take_split(sizes.value_bytes());
    queries = memory.take_split(2 * sizes.query_bytes());
    weights = memory.take_split(2 * sizes.weight_bytes());
    scores = memory.take_floats(2 * sizes.score_bytes());
  }

  void run() {
    int64_t most = 0;
    for (int64_t c = 0; c < a.num_columns; ++c) most = num_seen(c) > most ? num_seen(c) : most;
    with_kv(a.kv.format, [&]<class Kv>(Kv) { split_vectors<Kv>(most); });
    static constexpr TileConfig kConfig = whole_tiles();
    const TileScope tiles(kConfig);
    for (int64_t c = 0; c < a.num_columns; c += 2) {
      if (c + 1 < a.num_columns) {
        run_columns<2>(c);
      } else {
        run_columns<1>(c);
      }
    }
  }

 private:
  // The number of the section's positions that column c sees.
  int64_t num_seen(int64_t c) const { return last_of_section(a, a.columns[c]) - a.begin + 1; }

  static int64_t steps_of(int64_t positions) { return (positions + kStepNumbers - 1) / kStepNumbers; }

  // Splits the first `count` vectors of the section. Zeros follow to the end of their step.
  template <class Kv>
  void split_vectors(int64_t count) {
    for (int64_t step = 0; step < steps_of(count); ++step) {
      const uint8_t* vectors[kStepNumbers];
      for (int64_t i = 0; i < kStepNumbers; ++i) {
        const int64_t position = step * kStepNumbers + i;
        vectors[i] = position < count ? latent_vector(a, a.begin + position) : nullptr;
      }
      for (int64_t d = 0; d < sizes.steps; ++d) split_step<Kv>(vectors, step, d);
    }
  }

  // Splits dimensions [32 d, 32 d + 32) of the vectors of a step of positions.
  template <class Kv>
  void split_step(const uint8_t* const* vectors, int64_t step, int64_t d) {
    __m512i high[kStepNumbers], low[kStepNumbers];
    for (int64_t i = 0; i < kStepNumbers; ++i) {
      Vec first = zeros(), second = zeros();
      if (vectors[i] != nullptr) {
        const typename Kv::Scale scale = Kv::value_scale(vectors[i], d);
        const uint8_t* elements = vectors[i] + kv_scale_bytes(a.kv.format, a.kv.dim);
        first = load_part<Kv>(elements, d * kStepNumbers, scale);
        second = load_part<Kv>(elements, d * kStepNumbers + kLanes, scale);
      }
      split(first, second, high[i], low[i]);
      const int64_t tile = (2 * step + i / kTileRows) * sizes.steps + d;
      const Split row = keys + (tile * kTileBytes + i % kTileRows * kTileRowBytes);
      _mm512_store_si512(row.high, high[i]);
      _mm512_store_si512(row.low, low[i]);
    }
    if (2 * d >= sizes.value_tiles) return;
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    for (int64_t i = 0; i < kStepNumbers; ++i) {
      const __mmask32 is_finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(high[i], exponent), exponent);
      high[i] = _mm512_maskz_mov_epi16(is_finite, high[i]);
      low[i] = _mm512_maskz_mov_epi16(is_finite, low[i]);
    }
    for (int64_t tile = 2 * d; tile < 2 * d + 2 && tile < sizes.value_tiles; ++tile) {
      const Split to = values + (tile * kSectionSteps + step) * kTileBytes;
      Vec pairs[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) pairs[i] = pairs_of(high[2 * i], high[2 * i + 1], tile > 2 * d);
      put_transposed(to.high, pairs);
      for (int64_t i = 0; i < kLanes; ++i) pairs[i] = pairs_of(low[2 * i], low[2 * i + 1], tile > 2 * d);
      put_transposed(to.low, pairs);
    }
  }

  // Elements [d, d + 16) of a vector, with zeros after the last one.
  template <class Kv>
  Vec load_part(const uint8_t* elements, int64_t d, const typename Kv::Scale& scale) const {
    const int64_t rest = a.kv.dim - d;
    if (rest >= kLanes) return Kv::load(elements + d * Kv::kBytes, scale);
    return rest > 0 ? Kv::load(elements + d * Kv::kBytes, rest, scale) : zeros();
  }

  template <int kColumns>
  void run_columns(int64_t c) {
    int64_t most = 0;
    for (int64_t i = 0; i < kColumns; ++i) {
      split_queries(a.columns[c + i], i);
      most = num_seen(c + i) > most ? num_seen(c + i) : most;
    }
    const int64_t steps = steps_of(most);
    score<kColumns>(steps);
    for (int64_t i = 0; i < kColumns; ++i) soften(a.columns[c + i].state, i, num_seen(c + i), steps);
    const int64_t whole_tiles = a.value_dim / kTileRows;
    int64_t tile = 0;
    for (; tile + 2 <= whole_tiles; tile += 2) add_values<2, kColumns>(c, tile, steps);
    for (; tile < sizes.value_tiles; ++tile) add_values<1, kColumns>(c, tile, steps);
  }

  // Splits the queries of a column, the i-th of those at hand, with zeros for missing heads.
  void split_queries(const LatentColumn& column, int64_t i) {
    for (int64_t d = 0; d < sizes.steps; ++d) {
      Vec high[kLanes], low[kLanes];
      for (int64_t head = 0; head < kColumnHeads; ++head) {
        const float* q = column.q + head * a.kv.dim;
        const auto part = [&](int64_t at) {
          const int64_t rest = a.kv.dim - at, n = rest < kLanes ? rest : kLanes;
          return head < column.num_heads && n > 0 ? load(q + at, n) : zeros();
        };
        __m512i high_row, low_row;
        split(part(d * kStepNumbers), part(d * kStepNumbers + kLanes), high_row, low_row);
        high[head] = _mm512_castsi512_ps(high_row);
        low[head] = _mm512_castsi512_ps(low_row);
      }
      const Split to = queries + (i * sizes.query_bytes() + d * kTileBytes);
      put_transposed(to.high, high);
      put_transposed(to.low, low);
    }
  }

  // The products of vectors and queries.
  template <int kColumns>
  void score(int64_t steps) {
    using Grid = TileGrid<2, kColumns>;
    for (int64_t begin = 0; begin < sizes.steps; begin += kScoreSteps) {
      const int64_t end = begin + kScoreSteps < sizes.steps ? begin + kScoreSteps : sizes.steps;
      for (int64_t tile = 0; tile < 2 * steps; tile += 2) {
        float* to = scores + tile * (kTileBytes / 4);
        if (begin == 0) {
          Grid::zero();
        } else {
          Grid::load(to, kTileBytes, sizes.score_bytes(), kTileRowBytes);
        }
        for (int64_t d = begin; d < end; ++d) {
          multiply_split<Grid>(keys + (tile * sizes.steps + d) * kTileBytes, sizes.steps * kTileBytes,
                               queries + d * kTileBytes, sizes.query_bytes());
        }
        Grid::store(to, kTileBytes, sizes.score_bytes(), kTileRowBytes);
      }
    }
  }

  // Turns the products of the i-th column at hand into weights, of which the first `count` are not zero.
  void soften(float* state, int64_t i, int64_t count, int64_t steps) {
    float* score = scores + i * (sizes.score_bytes() / 4);
    Vec largest = broadcast(-INFINITY);
    for (int64_t p = 0; p < count; ++p) {
      const Vec scaled = mul(load(score + p * kLanes), broadcast(a.scale));
      store(score + p * kLanes, scaled);
      largest = max_or_second(scaled, largest);
    }
    Vec sum = zeros();
    const auto weight_of = [&](int64_t p) {
      if (p >= count) return zeros();
      const Vec weight = exp(sub(load(score + p * kLanes), largest));
      sum = add(sum, weight);
      return weight;
    };
    const Split to = weights + i * sizes.weight_bytes();
    for (int64_t p = 0; p < steps * kStepNumbers; p += 2) {
      const Vec first = weight_of(p);
      put_pairs(to + p / 2 * kTileRowBytes, first, weight_of(p + 1));
    }
    store(state_most(state, a.value_dim), largest);
    store(state_sum(state, a.value_dim), sum);
  }

  // Writes the weighted sums of elements from 16 * tile on to the states of columns from c on.
  template <int kRows, int kColumns>
  void add_values(int64_t c, int64_t tile, int64_t steps) {
    using Grid = TileGrid<kRows, kColumns>;
    Grid::zero();
    for (int64_t step = 0; step < steps; ++step) {
      multiply_split<Grid>(values + (tile * kSectionSteps + step) * kTileBytes, kSectionSteps * kTileBytes,
                           weights + step * kTileBytes, sizes.weight_bytes());
    }
    // The scores have become weights, so their memory is free.
    Grid::store(scores, kTileBytes, kRows * kTileBytes, kTileRowBytes);
    const int64_t begin = tile * kTileRows, end = begin + kRows * kTileRows;
    for (int64_t i = 0; i < kColumns; ++i) {
      const float* from = scores + i * kRows * (kTileBytes / 4);
      float* to = a.columns[c + i].state;
      for (int64_t d = begin; d < end && d < a.value_dim; ++d) {
        store(to + d * kColumnHeads, load(from + (d - begin) * kColumnHeads));
      }
    }
  }

  const LatentAttentionArgs& a;
  const AmxLatentSizes sizes;
  Split keys;     // [tile of positions][step of dimensions]
  Split values;   // [tile of dimensions][step of positions]
  Split queries;  // [two columns][step of dimensions]
  Split weights;  // [two columns][step of positions]
  float* scores;  // [two columns][position][head]
};

void latent_attention_amx(const LatentAttentionArgs& a) { AmxLatentAttention(a).run(); }

}  // namespace
}  // namespace argosy
