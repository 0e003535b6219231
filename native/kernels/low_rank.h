// low_rank.h: adds the second half of low-rank pairs to the rows of tokens (ops/low_rank.h).
//
//   up  rank x up_cols, row-major at any alignment; float32, float16 or bfloat16.    t, y  float32
//
// Each element of y takes its products in ascending order of rank, each with one rounding (fma), so its bits
// depend neither on the instruction set nor on what else is added. Few tokens: bound by memory. Many tokens:
// bound by multiply-adds.
#pragma once

#include <math.h>

#include "kernels/half.h"
#include "kernels/low_rank_args.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_float.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

template <class Weights>
void add_low_rank_of(const LowRankArgs& a) {
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const float* t = a.t + token * a.t_stride;
    float* y = output_row(a, token);
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

// Adds ranks [first, first + kRanks) to one token, from its first element to its last: as many streams of
// memory as the hardware follows.
template <class Weights, int kRanks>
void add_ranks(const LowRankArgs& a, int64_t first, int64_t token) {
  const int64_t n = a.row_end - a.row_begin, stride = a.up_cols * Weights::kBytes;
  const uint8_t* up = a.up + first * stride + a.row_begin * Weights::kBytes;
  // What is read next: of the next ranks, or of the caller. Otherwise a hint asks for what is here.
  const uint8_t* next = up;
  if (first + kRanks < a.rank) {
    next = up + kRanks * stride;
  } else if (a.next_weights != nullptr) {
    next = a.next_weights;
  }
  float* y = output_row(a, token);
  Vec t[kRanks];
#pragma GCC unroll 8
  for (int i = 0; i < kRanks; ++i) t[i] = broadcast(a.t[token * a.t_stride + first + i]);
  int64_t row = 0;
  for (; row + 2 * kLanes <= n; row += 2 * kLanes) {
    Vec sum[2] = {load(y + row), load(y + row + kLanes)};
#pragma GCC unroll 8
    for (int i = 0; i < kRanks; ++i) {
      const uint8_t* from = up + i * stride + row * Weights::kBytes;
      // To the second-level cache: rows may be too short for the hardware to detect a stream.
      for (int64_t at = 0; at < 2 * kLanes * Weights::kBytes; at += 64)
        __builtin_prefetch(next + i * stride + row * Weights::kBytes + at, 0, 2);
      sum[0] = fma(t[i], Weights::load(from), sum[0]);
      sum[1] = fma(t[i], Weights::load(from + kLanes * Weights::kBytes), sum[1]);
    }
    store(y + row, sum[0]);
    store(y + row + kLanes, sum[1]);
  }
  for (; row < n; row += kLanes) {
    const int64_t rest = n - row < kLanes ? n - row : kLanes;
    Vec sum = load(y + row, rest);
#pragma GCC unroll 8
    for (int i = 0; i < kRanks; ++i)
      sum = fma(t[i], Weights::load(up + i * stride + row * Weights::kBytes, rest), sum);
    store(y + row, sum, rest);
  }
}

template <class Weights>
void add_to_few(const LowRankArgs& a) {
  constexpr int kRanks = 4;
  int64_t first = 0;
  for (; first + kRanks <= a.rank; first += kRanks) {
    for (int64_t token = 0; token < a.num_tokens; ++token) add_ranks<Weights, kRanks>(a, first, token);
  }
  for (; first < a.rank; ++first) {
    for (int64_t token = 0; token < a.num_tokens; ++token) add_ranks<Weights, 1>(a, first, token);
  }
}

// A tile of many tokens, whose sums fill half of the registers. The elements of `up` that it takes are first
// copied as float32, side by side: rows whose distance is a large power of two would evict each other from
// the cache.
constexpr int kLowRankTokens = 4, kLowRankVecs = ARGOSY_AVX512 ? 4 : 2;
constexpr int64_t kCopiedRanks = 32;

// Adds `count` copied ranks, from `first` on, to kVecs vectors of kTokens tokens. If kIsPart, one vector with
// n elements.
template <int kVecs, int kTokens, bool kIsPart>
[[gnu::always_inline]] inline void add_copied(const LowRankArgs& a, const float* copy, int64_t first,
                                              int64_t count, int64_t row, int64_t token, int64_t n) {
  static_assert(!kIsPart || kVecs == 1);
  const float* t = a.t + token * a.t_stride + first;
  float* y[kTokens];
  Vec sum[kTokens][kVecs];
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    y[j] = output_row(a, token + j) + (row - a.row_begin);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kIsPart) {
        sum[j][v] = load(y[j], n);
      } else {
        sum[j][v] = load(y[j] + v * kLanes);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i, copy += kVecs * kLanes) {
    Vec up[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) up[v] = load(copy + v * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) {
      const Vec factor = broadcast(t[j * a.t_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[j][v] = fma(factor, up[v], sum[j][v]);
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

// Adds all ranks to kVecs vectors of all tokens; if kIsPart, to one with n elements.
template <class Weights, int kVecs, bool kIsPart>
void add_to_rows(const LowRankArgs& a, int64_t row, int64_t n) {
  alignas(64) float copy[kCopiedRanks * kVecs * kLanes];
  for (int64_t first = 0; first < a.rank; first += kCopiedRanks) {
    const int64_t count = a.rank - first < kCopiedRanks ? a.rank - first : kCopiedRanks;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* from = a.up + ((first + i) * a.up_cols + row) * Weights::kBytes;
      // Of the next rows: they arrive while the tokens are multiplied.
      for (int64_t at = 0; at < kVecs * kLanes * Weights::kBytes; at += 64)
        __builtin_prefetch(from + kVecs * kLanes * Weights::kBytes + at);
      for (int v = 0; v < kVecs; ++v, from += kLanes * Weights::kBytes)
        store(copy + (i * kVecs + v) * kLanes, kIsPart ? Weights::load(from, n) : Weights::load(from));
    }
    for (int64_t token = 0; token < a.num_tokens; token += kLowRankTokens) {
      const int64_t rest = a.num_tokens - token;
      with_number<kLowRankTokens>(rest < kLowRankTokens ? rest : kLowRankTokens,
                                  [&]<int kTokens>(Number<kTokens>) {
                                    add_copied<kVecs, kTokens, kIsPart>(a, copy, first, count, row, token, n);
                                  });
    }
  }
}

template <class Weights>
void add_low_rank_of(const LowRankArgs& a) {
  if (a.num_tokens < kLowRankTokens) return add_to_few<Weights>(a);
  int64_t row = a.row_begin;
  for (; row + kLowRankVecs * kLanes <= a.row_end; row += kLowRankVecs * kLanes)
    add_to_rows<Weights, kLowRankVecs, false>(a, row, kLanes);
  for (; row < a.row_end; row += kLanes)
    add_to_rows<Weights, 1, true>(a, row, a.row_end - row < kLanes ? a.row_end - row : kLanes);
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
