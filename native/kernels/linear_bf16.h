// linear_bf16.h: y = W x + b for bfloat16 weights and many tokens, with x rounded to bfloat16.
//
//   W  rows x cols, row-major at any alignment.    x  float32 rows.    b  float32 [rows] or nullptr.
//   y  float32 rows, overwritten.
//
// Bound by multiply-adds: vdpbf16ps does two in each lane, where a float32 product does one. Tokens are in
// the lanes: a pair of columns of sixteen tokens is a vector, and the same pair of a row of W is broadcast,
// so W needs no other layout. Sums are float32: bias first, then pairs of columns in ascending order,
// whatever the number of tokens. Products below the smallest normal number are zero.
//
// The tokens of a panel [pairs of columns][kPanelTokens][2] stream from the second-level cache while
// kLinearRows rows of W, which stay there for the next panel, use them.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {

constexpr int kLinearTileRows = 6, kLinearTileVecs = 4;
static_assert(kLinearTileVecs * kLanes == kPanelTokens && kLinearRows % kLinearTileRows == 0);

// Rounds up to sixteen tokens into their place in a panel; the lanes of missing tokens become zero.
void round_to_panel(const PanelArgs& a) {
  for (int64_t col = 0; col < a.cols; col += 2 * kLanes) {
    const int64_t n = a.cols - col;
    Vec pairs[kLanes];
    for (int64_t t = 0; t < kLanes; ++t) {
      const float* x = a.x + t * a.x_stride + col;
      const Vec low = t < a.num_tokens ? load(x, n < kLanes ? n : kLanes) : zeros();
      const Vec high =
          t < a.num_tokens && n > kLanes ? load(x + kLanes, n < 2 * kLanes ? n - kLanes : kLanes) : zeros();
      pairs[t] = Vec(_mm512_cvtne2ps_pbh(high, low));  // the same bits
    }
    transpose(pairs);
    const int64_t num_pairs = n < 2 * kLanes ? (n + 1) / 2 : kLanes;
    for (int64_t p = 0; p < num_pairs; ++p) {
      _mm512_storeu_ps(a.panel + (col / 2 + p) * kPanelTokens * 4, pairs[p]);
    }
  }
}

// The sums of kRows rows from `row` on, for kVecs vectors of tokens: sums [kRows][kPanelTokens].
template <int kRows, int kVecs>
void linear_tile(const LinearArgs& a, int64_t row, float* sums) {
  const uint8_t* w[kRows];
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    w[i] = a.weights + (row + i) * a.cols * 2;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[i][v] = a.bias != nullptr ? broadcast(a.bias[row + i]) : zeros();
  }
  const auto add_pair = [&](int64_t pair, const auto& weights_of) {
    __m512bh x[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      x[v] = __m512bh(_mm512_loadu_si512(a.panel + (pair * kPanelTokens + v * kLanes) * 4));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512bh weights = __m512bh(_mm512_set1_epi32(weights_of(w[i])));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x[v], weights);
    }
  };
  const int64_t pairs = a.cols / 2;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    add_pair(pair, [&](const uint8_t* from) { return read_unaligned<int32_t>(from + 4 * pair); });
  }
  if (a.cols % 2 != 0) {
    add_pair(pairs, [&](const uint8_t* from) { return int32_t(read_unaligned<uint16_t>(from + 4 * pairs)); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(sums + i * kPanelTokens + v * kLanes, sum[i][v]);
  }
}

// Writes sums [n][kPanelTokens] as rows of y.
inline void write_tokens(const LinearArgs& a, const float* sums, int64_t n) {
  for (int64_t token = 0; token < a.num_tokens; token += kLanes) {
    for (int64_t row = 0; row < n; row += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = load(sums + (row + i) * kPanelTokens + token);
      transpose(block);
      const int64_t rows = n - row < kLanes ? n - row : kLanes;
      const int64_t tokens = a.num_tokens - token < kLanes ? a.num_tokens - token : kLanes;
      for (int64_t t = 0; t < tokens; ++t) {
        store(a.y + (token + t) * a.y_stride + row, block[t], rows);
      }
    }
  }
}

void linear_panel(const LinearArgs& a) {
  alignas(64) float sums[kLinearRows * kPanelTokens] = {};
  with_number<kLinearTileVecs>((a.num_tokens + kLanes - 1) / kLanes, [&]<int kVecs>(Number<kVecs>) {
    int64_t row = a.row_begin;
    float* to = sums;
    for (; row + kLinearTileRows <= a.row_end; row += kLinearTileRows, to += kLinearTileRows * kPanelTokens) {
      linear_tile<kLinearTileRows, kVecs>(a, row, to);
    }
    with_number<kLinearTileRows - 1>(
        a.row_end - row, [&]<int kRows>(Number<kRows>) { linear_tile<kRows, kVecs>(a, row, to); });
  });
  write_tokens(a, sums, a.row_end - a.row_begin);
}

}  // namespace
}  // namespace argosy
