// panel_bf16.h: products of rows in bfloat16 with a panel of up to kPanelTokens tokens, rounded to bfloat16.
//
//   panel  [pairs of columns][kPanelTokens][2].    rows  bfloat16, at any alignment.
//   sums   float32 [rows][kPanelTokens].
//
// vdpbf16ps does two multiply-adds in each lane, where a float32 product does one. Tokens are in the lanes: a
// pair of columns of sixteen tokens is a vector, and the same pair of a row is broadcast, so rows need no
// other layout. Sums are float32, of pairs of columns in ascending order, whatever the number of tokens.
// Products below the smallest normal number are zero.
//
// While a tile of rows is multiplied, the rows after it are prefetched into the second-level cache: they are
// several short streams, which the hardware detects late.
//
// With AMX, sixteen rows by sixteen tokens are a tile, and sixteen pairs of columns of a panel another, where
// there are whole tiles: the number of columns is a multiple of 32. Sums are then those of tdpbf16ps (amx.h)
// of 32 columns after another.
#pragma once

#if ARGOSY_AMX
#include "kernels/amx.h"
#endif
#include "kernels/encoder_args.h"
#include "kernels/matmul_args.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {

constexpr int kPanelTileRows = 6, kPanelTileVecs = 4;
static_assert(kPanelTileVecs * kLanes == kPanelTokens);

// Rounds scale * x of up to sixteen tokens into their place in a panel; the lanes of missing tokens become
// zero.
inline void round_tokens(const PanelArgs& a, Vec scale) {
  for (int64_t col = 0; col < a.cols; col += 2 * kLanes) {
    const int64_t n = a.cols - col;
    Vec pairs[kLanes];
    for (int64_t t = 0; t < kLanes; ++t) {
      const float* x = a.x + t * a.x_stride + col;
      const Vec low = t < a.num_tokens ? load(x, n < kLanes ? n : kLanes) : zeros();
      const Vec high =
          t < a.num_tokens && n > kLanes ? load(x + kLanes, n < 2 * kLanes ? n - kLanes : kLanes) : zeros();
      pairs[t] = Vec(_mm512_cvtne2ps_pbh(mul(high, scale), mul(low, scale)));  // the same bits
    }
    transpose(pairs);
    const int64_t num_pairs = n < 2 * kLanes ? (n + 1) / 2 : kLanes;
    for (int64_t p = 0; p < num_pairs; ++p) {
      _mm512_storeu_ps(a.panel + (col / 2 + p) * kPanelTokens * 4, pairs[p]);
    }
  }
}

// The rows that a panel is multiplied with, `stride` bytes apart.
struct PanelRows {
  const uint8_t* data;
  int64_t stride, cols;
};

// The sums of kRows rows for kVecs vectors of tokens. They begin with begin(row, vec).
template <int kRows, int kVecs, class Begin>
inline void multiply_tile(const PanelRows& rows, const uint8_t* panel, const Begin& begin, float* sums) {
  const uint8_t* row[kRows];
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    row[i] = rows.data + i * rows.stride;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[i][v] = begin(i, v);
  }
  const auto add_pair = [&](int64_t pair, const auto& weights_of) {
    __m512bh x[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      x[v] = __m512bh(_mm512_loadu_si512(panel + (pair * kPanelTokens + v * kLanes) * 4));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512bh weights = __m512bh(_mm512_set1_epi32(weights_of(row[i])));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x[v], weights);
    }
  };
  constexpr int64_t kLinePairs = 16;  // pairs of one row in a cache line
  const int64_t pairs = rows.cols / 2;
  for (int64_t line = 0; line < pairs; line += kLinePairs) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(row[i] + kRows * rows.stride + 4 * line, 0, 2);
    const int64_t end = pairs - line < kLinePairs ? pairs : line + kLinePairs;
    for (int64_t pair = line; pair < end; ++pair) {
      add_pair(pair, [&](const uint8_t* from) { return read_unaligned<int32_t>(from + 4 * pair); });
    }
  }
  if (rows.cols % 2 != 0) {
    add_pair(pairs, [&](const uint8_t* from) { return int32_t(read_unaligned<uint16_t>(from + 4 * pairs)); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(sums + i * kPanelTokens + v * kLanes, sum[i][v]);
  }
}

#if ARGOSY_AMX

constexpr int64_t kTileCols = 32;

// Adds the products of kRows tiles of rows and kTokens tiles of tokens to the sums.
template <int kRows, int kTokens>
inline void multiply_tiles(const PanelRows& rows, const uint8_t* panel, bool prefetches, float* sums) {
  using Grid = TileGrid<kRows, kTokens>;
  constexpr int64_t kStride = kPanelTokens * 4;  // bytes between two pairs of a panel, and two rows of sums
  Grid::load(sums, kTileRows * kStride, kTileRowBytes, kStride);
  for (int64_t col = 0; col < rows.cols; col += kTileCols) {
    const uint8_t* row = rows.data + col * 2;
    if (prefetches) {
      for (int64_t i = 0; i < kRows * kTileRows; ++i) {
        __builtin_prefetch(row + (kRows * kTileRows + i) * rows.stride, 0, 2);
      }
    }
    Grid::load_left(row, kTileRows * rows.stride, rows.stride);
    Grid::load_right(panel + col / 2 * kStride, kTileRowBytes, kStride);
    Grid::dot_bf16();
  }
  Grid::store(sums, kTileRows * kStride, kTileRowBytes, kStride);
}

// Multiplies the first num_rows rows, whole tiles of them, by kVecs vectors of tokens.
template <int kVecs>
inline void multiply_tiles_of_rows(const PanelRows& rows, int64_t num_rows, const uint8_t* panel,
                                   float* sums) {
  static constexpr TileConfig kConfig = whole_tiles();
  const TileScope tiles(kConfig);
  const auto multiply = [&]<int kRows>(Number<kRows>, int64_t row) {
    const PanelRows some = {rows.data + row * rows.stride, rows.stride, rows.cols};
    float* of_rows = sums + row * kPanelTokens;
#pragma GCC unroll 2
    for (int v = 0; v + 2 <= kVecs; v += 2) {
      multiply_tiles<kRows, 2>(some, panel + v * kTileRowBytes, v == 0, of_rows + v * kLanes);
    }
    if constexpr (kVecs % 2 != 0) {
      constexpr int kLast = kVecs - 1;
      multiply_tiles<kRows, 1>(some, panel + kLast * kTileRowBytes, kLast == 0, of_rows + kLast * kLanes);
    }
  };
  int64_t row = 0;
  for (; row + 2 * kTileRows <= num_rows; row += 2 * kTileRows) multiply(Number<2>{}, row);
  if (row < num_rows) multiply(Number<1>{}, row);
}

#endif

// The sums of num_rows rows for kVecs vectors of tokens. They begin with begin(row, vec).
template <int kVecs, class Begin>
inline void multiply_rows(const PanelRows& rows, int64_t num_rows, const uint8_t* panel, const Begin& begin,
                          float* sums) {
  const auto multiply = [&]<int kRows>(Number<kRows>, int64_t first) {
    multiply_tile<kRows, kVecs>(
        {rows.data + first * rows.stride, rows.stride, rows.cols}, panel,
        [&](int row, int vec) { return begin(first + row, vec); }, sums + first * kPanelTokens);
  };
  int64_t row = 0;
#if ARGOSY_AMX
  if (rows.cols % kTileCols == 0) {
    for (; row + kTileRows <= num_rows; row += kTileRows) {
      for (int64_t i = row; i < row + kTileRows; ++i) {
        for (int v = 0; v < kVecs; ++v) store(sums + i * kPanelTokens + v * kLanes, begin(i, v));
      }
    }
    multiply_tiles_of_rows<kVecs>(rows, row, panel, sums);
  }
#endif
  for (; row + kPanelTileRows <= num_rows; row += kPanelTileRows) multiply(Number<kPanelTileRows>{}, row);
  with_number<kPanelTileRows - 1>(num_rows - row,
                                  [&]<int kRows>(Number<kRows> number) { multiply(number, row); });
}

// Calls write(token, row, n, values) for up to sixteen rows of sums at a time.
template <class Write>
inline void for_each_token(const float* sums, int64_t num_tokens, int64_t num_rows, const Write& write) {
  for (int64_t token = 0; token < num_tokens; token += kLanes) {
    const int64_t tokens = num_tokens - token < kLanes ? num_tokens - token : kLanes;
    for (int64_t row = 0; row < num_rows; row += kLanes) {
      const int64_t rows = num_rows - row < kLanes ? num_rows - row : kLanes;
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = i < rows ? load(sums + (row + i) * kPanelTokens + token) : zeros();
      }
      transpose(block);
      for (int64_t t = 0; t < tokens; ++t) write(token + t, row, rows, block[t]);
    }
  }
}

}  // namespace
}  // namespace argosy
