// attend_bf16.h: the attention of attend.h with queries, keys, values and weights rounded to bfloat16.
//
//   out[q] = sum over s of w[q][s] * value[s] / sum over s of w[q][s]
//   w[q][s] = 2^(log2(e) * scale * query[q] . key[s] - running maximum)
//
//   query, out  float32 rows of `dim`; out may be query. At most kPanelTokens queries.
//   keys        bfloat16 [keys][dim]
//   values      bfloat16 [blocks of kRoundedKeys keys][dim][kRoundedKeys]
//
// Both products are those of panel_bf16.h: queries, and then the weights of a block of keys, are a panel;
// keys and, transposed, values are rows. Scores, sums and the running maximum are float32. The weights are
// summed as they are after rounding, so that a constant value stays the same. The bits of a query's output do
// not depend on the other queries. (Milakov and Gimelshein, arXiv:1805.02867)
#pragma once

#include <math.h>

#include "kernels/panel_bf16.h"

namespace argosy {
namespace {

static_assert(kAttendQueries == kPanelTokens && kRoundedKeys % 2 == 0);

// 2^x for x <= 0, with a relative error of 3e-6: bfloat16 keeps 4e-3. A polynomial of the fraction that is
// best in the largest relative error (Remez) times a power of two. NaN stays NaN.
inline Vec power_of_two(Vec x) {
  const Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = broadcast(0.01353417f);
  p = fma(p, fraction, broadcast(0.05201146f));
  p = fma(p, fraction, broadcast(0.24144275f));
  p = fma(p, fraction, broadcast(0.69300384f));
  p = fma(p, fraction, broadcast(1.0000026f));
  return scale_by_power(p, x);
}

// In each lane, the first in the low half and the second in the high half.
inline __m512bh round_pair(Vec first, Vec second) {
  return __m512bh(interleave_halves(__m512i(_mm512_cvtne2ps_pbh(second, first))));
}

inline void store_rounded(uint8_t* to, Vec values, int64_t n) {
  _mm256_mask_storeu_epi16(to, first_lanes(n), __m256i(_mm512_cvtneps_pbh(values)));
}

inline void round_keys(const RoundKeysArgs& a) {
  for (int64_t s = 0; s < a.num_keys; s += kLanes) {
    const int64_t num_keys = a.num_keys - s < kLanes ? a.num_keys - s : kLanes;
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      const int64_t n = a.dim - d < kLanes ? a.dim - d : kLanes;
      Vec rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i < num_keys) {
          store_rounded(a.keys + ((s + i) * a.dim + d) * 2, load(a.key + (s + i) * a.key_stride + d, n), n);
        }
        rows[i] = i < num_keys ? load(a.value + (s + i) * a.value_stride + d, n) : zeros();
      }
      transpose(rows);
      for (int64_t i = 0; i < n; ++i) {
        store_rounded(a.values + ((d + i) * kRoundedKeys + s) * 2, rows[i], num_keys);
      }
    }
  }
}

// The running numbers of kPanelTokens queries.
struct RoundedState {
  float *most, *sum;  // the maximum of the scores, the sum of the weights
  float* shrink;      // how a block changes the running sums
};

// Turns the scores [num_keys][kPanelTokens] of a block into its weights, a panel in the same memory.
template <int kVecs>
inline void round_weights(const RoundedState& state, int64_t num_keys, float* scores) {
  const __m512bh ones = __m512bh(_mm512_set1_epi32(0x3F803F80));
#pragma GCC unroll 4
  for (int64_t at = 0; at < kVecs * kLanes; at += kLanes) {
    const Vec before = load(state.most + at);
    Vec most = before;
    for (int64_t s = 0; s < num_keys; ++s) most = max_or_second(load(scores + s * kPanelTokens + at), most);
    const Vec shrink = power_of_two(sub(before, most));
    store(state.shrink + at, shrink);
    store(state.most + at, most);
    Vec sum = mul(load(state.sum + at), shrink);
    const auto weight = [&](int64_t s) {
      return power_of_two(sub(load(scores + s * kPanelTokens + at), most));
    };
    for (int64_t s = 0; s < num_keys; s += 2) {
      const __m512bh pair = round_pair(weight(s), s + 1 < num_keys ? weight(s + 1) : zeros());
      sum = _mm512_dpbf16_ps(sum, pair, ones);
      store(scores + s / 2 * kPanelTokens + at, Vec(pair));  // two scores that were read become one pair
    }
    store(state.sum + at, sum);
  }
}

void attend_rounded(const AttendRoundedArgs& a) {
  float* query = a.scratch;
  float* sums = query + (a.dim + 1) / 2 * kPanelTokens;
  float* scores = sums + a.dim * kPanelTokens;
  float* numbers = scores + kRoundedKeys * kPanelTokens;
  const RoundedState state = {numbers, numbers + kPanelTokens, numbers + 2 * kPanelTokens};
  uint8_t* panel = reinterpret_cast<uint8_t*>(query);
  for (int64_t q = 0; q < a.num_queries; q += kLanes) {
    const int64_t count = a.num_queries - q < kLanes ? a.num_queries - q : kLanes;
    constexpr float kLog2OfE = 1.44269504f;
    round_tokens({a.query + q * a.query_stride, a.query_stride, count, a.dim, panel + q * 4},
                 broadcast(a.scale * kLog2OfE));
  }
  for (int64_t i = 0; i < a.dim * kPanelTokens; i += kLanes) store(sums + i, zeros());
  for (int64_t q = 0; q < kPanelTokens; q += kLanes) {
    store(state.most + q, broadcast(-INFINITY));
    store(state.sum + q, zeros());
  }
  with_number<kPanelTileVecs>((a.num_queries + kLanes - 1) / kLanes, [&]<int kVecs>(Number<kVecs>) {
    for (int64_t s = 0; s < a.num_keys; s += kRoundedKeys) {
      const int64_t num_keys = a.num_keys - s < kRoundedKeys ? a.num_keys - s : kRoundedKeys;
      multiply_rows<kVecs>(
          {a.keys + s * a.dim * 2, a.dim * 2, a.dim}, num_keys, panel, [](int64_t, int) { return zeros(); },
          scores);
      round_weights<kVecs>(state, num_keys, scores);
      multiply_rows<kVecs>(
          {a.values + s * a.dim * 2, kRoundedKeys * 2, num_keys}, a.dim,
          reinterpret_cast<const uint8_t*>(scores),
          [&](int64_t d, int vec) {
            return mul(load(sums + d * kPanelTokens + vec * kLanes), load(state.shrink + vec * kLanes));
          },
          sums);
    }
  });
  for_each_token(sums, a.num_queries, a.dim, [&](int64_t q, int64_t d, int64_t n, Vec values) {
    store(a.out + q * a.out_stride + d, div(values, broadcast(state.sum[q])), n);
  });
}

}  // namespace
}  // namespace argosy
