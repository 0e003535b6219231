// low_rank.h: adds the second half of low-rank pairs to the rows of tokens (ops/low_rank.h).
//
//   up  rank x up_cols, row-major at any alignment; float32, float16 or bfloat16.    t, y  float32
//
// Each element of y takes its products in ascending order of rank, each with one rounding (fma), so its bits
// depend neither on the instruction set nor on what else is added. Few tokens: bound by memory, as long as
// `up` is not in the cache. Many tokens: bound by multiply-adds; what a tile reads of `up` serves all of its
// tokens, and further tiles find it in the cache.
#pragma once

#include <math.h>

#include "kernels/half.h"
#include "kernels/low_rank_args.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_float.h"

namespace argosy {
namespace {

inline float* low_rank_row(const LowRankArgs& a, int64_t token) {
  return a.y + a.y_stride * (a.y_index != nullptr ? a.y_index[token] : token);
}

#if !ARGOSY_VECTOR  // the reference

template <class Weights>
void add_low_rank_of(const LowRankArgs& a) {
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const float* t = a.t + token * a.t_stride;
    float* y = low_rank_row(a, token);
    for (int64_t row = a.row_begin; row < a.row_end; ++row) {
      float sum = y[row - a.row_begin];
      for (int64_t i = 0; i < a.rank; ++i) {
        sum = fmaf(t[i], Weights::load(a.up + (i * a.up_cols + row) * Weights::kBytes), sum);
      }
      y[row - a.row_begin] = sum;
    }
  }
}

#else

// Their sums fill half of the registers of AVX2.
constexpr int kLowRankTokens = 4, kLowRankVecs = 2, kLowRankVecsAlone = 8;

// kVecs vectors of rows from `row` on, for kTokens tokens from `token` on. If kIsPart, one vector with n
// rows.
template <class Weights, int kVecs, int kTokens, bool kIsPart>
[[gnu::always_inline]] inline void low_rank_tile(const LowRankArgs& a, int64_t row, int64_t token,
                                                 int64_t n) {
  static_assert(!kIsPart || kVecs == 1);
  const float* t = a.t + token * a.t_stride;
  const uint8_t* up = a.up + row * Weights::kBytes;
  float* y[kTokens];
  Vec sum[kTokens][kVecs];
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    y[j] = low_rank_row(a, token + j) + (row - a.row_begin);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kIsPart) {
        sum[j][v] = load(y[j], n);
      } else {
        sum[j][v] = load(y[j] + v * kLanes);
      }
    }
  }
  for (int64_t i = 0; i < a.rank; ++i, up += a.up_cols * Weights::kBytes) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      Vec w;
      if constexpr (kIsPart) {
        w = Weights::load(up, n);
      } else {
        w = Weights::load(up + v * kLanes * Weights::kBytes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) sum[j][v] = fma(broadcast(t[j * a.t_stride + i]), w, sum[j][v]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kIsPart) {
        store(y[j], sum[j][v], n);
      } else {
        store(y[j] + v * kLanes, sum[j][v]);
      }
    }
  }
}

template <class Weights>
void add_low_rank_of(const LowRankArgs& a) {
  // One tile of rows for all tokens, then the next: what it reads of `up` stays in the first-level cache.
  const auto for_tokens = [&]<int kVecs, bool kIsPart>(Number<kVecs>, int64_t row, int64_t n) {
    for (int64_t token = 0; token < a.num_tokens; token += kLowRankTokens) {
      const int64_t rest = a.num_tokens - token;
      with_number<kLowRankTokens>(rest < kLowRankTokens ? rest : kLowRankTokens,
                                  [&]<int kTokens>(Number<kTokens>) {
                                    low_rank_tile<Weights, kVecs, kTokens, kIsPart>(a, row, token, n);
                                  });
    }
  };
  int64_t row = a.row_begin;
  if (a.num_tokens == 1) {
    for (; row + kLowRankVecsAlone * kLanes <= a.row_end; row += kLowRankVecsAlone * kLanes)
      low_rank_tile<Weights, kLowRankVecsAlone, 1, false>(a, row, 0, 0);
  }
  for (; row + kLowRankVecs * kLanes <= a.row_end; row += kLowRankVecs * kLanes)
    for_tokens.template operator()<kLowRankVecs, false>({}, row, 0);
  for (; row < a.row_end; row += kLanes) {
    const int64_t n = a.row_end - row < kLanes ? a.row_end - row : kLanes;
    for_tokens.template operator()<1, true>({}, row, n);
  }
}

#endif

void add_low_rank(const LowRankArgs& a) {
  if (a.rank == 0 || a.num_tokens == 0) return;
  if (a.format == Format::f32) {
    add_low_rank_of<F32Weights>(a);
  } else if (a.format == Format::f16) {
    add_low_rank_of<F16Weights>(a);
  } else {
    add_low_rank_of<Bf16Weights>(a);
  }
}

}  // namespace
}  // namespace argosy
