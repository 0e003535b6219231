// matmul_f8.h: y = W x for FP8 E4M3 weights with a scale for each 128 rows and 128 columns.
//
//   W  laid out as in formats.h, at any alignment.    x  float32 [tokens][cols].    y  float32, overwritten.
//
// For each 128 columns in ascending order: y += scale * (sum of code * x). The sums and tiles are as in
// matmul_float.h. There are no NaN codes: transcoding refuses them (transcode_f8.h).
//
// Few tokens: bound by memory, one byte per weight. Many tokens: bound by multiply-adds; a few rows at a time
// are converted to float32 for all tokens of a block.
#pragma once

#include "kernels/half.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_float.h"

namespace argosy {
namespace {

inline float f8_scale_at(const uint8_t* weights, int64_t cols, int64_t row, int64_t col) {
  return read_unaligned<float>(weights + f8_scales_at(row, cols) + col / kF8Block * 4);
}

#if !ARGOSY_VECTOR  // the reference

void matmul_f8(const MatmulArgs& a) {
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* codes = a.weights + f8_row_at(row, a.cols);
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      const float* x = float_row(a, token);
      float sum = 0.0f;
      for (int64_t begin = 0; begin < a.cols; begin += kF8Block) {
        const int64_t end = a.cols - begin < kF8Block ? a.cols : begin + kF8Block;
        float part = 0.0f;
        for (int64_t col = begin; col < end; ++col) part += float_from_f8(codes[col]) * x[col];
        sum += f8_scale_at(a.weights, a.cols, row, begin) * part;
      }
      output_row(a, token)[row - a.row_begin] = sum;
    }
  }
}

#else

// The scale for codes converted to value / 256.
inline Vec f8_scale(const uint8_t* scales, int64_t col) {
  return broadcast(read_unaligned<float>(scales + col / kF8Block * 4) * 256.0f);
}

// Reads rows in place and converts kNumVecs vectors at once to value / 256.
template <int kRows, int kNumVecs>
struct RowsOfF8 {
  static constexpr int64_t kScaledCols = kF8Block;
  static constexpr int kVecs = kNumVecs, kRowsAtOnce = kRows;

  RowsOfF8(const MatmulArgs& a, int64_t row) : ahead(kRows * a.cols) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      codes[i] = a.weights + f8_row_at(row + i, a.cols);
      scales[i] = a.weights + f8_scales_at(row + i, a.cols);
    }
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const { load_f8(codes[i] + col, to); }
  void load(int64_t col, int i, int64_t n, Vec (&to)[kVecs]) const { load_f8(codes[i] + col, n, to); }
  Vec scale(int64_t col, int i) const { return f8_scale(scales[i], col); }
  // Prefetches the next tile into the second-level cache: rows may be too short for the hardware to detect a
  // stream.
  void prefetch(int64_t col) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(codes[i] + col + ahead, 0, 2);
      __builtin_prefetch(codes[i] + col + ahead + 64, 0, 2);
    }
  }
  const uint8_t* codes[kRows];
  const uint8_t* scales[kRows];
  int64_t ahead;
};

// A block of rows as float16, value / 256: columns starting at `begin`, zeros after the last column; scales
// in place.
template <int kRows>
struct HalvesOfF8 {
  static constexpr int64_t kScaledCols = kF8Block;
  static constexpr int kVecs = 1, kRowsAtOnce = kRows;

  HalvesOfF8(const MatmulArgs& a, int64_t row, const uint16_t* values, int64_t first)
      : halves(reinterpret_cast<const uint8_t*>(values)), begin(first) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) scales[i] = a.weights + f8_scales_at(row + i, a.cols);
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const {
    to[0] = F16Weights::load(halves + (i * kBlockCols + col - begin) * 2);
  }
  void load(int64_t col, int i, int64_t, Vec (&to)[kVecs]) const { load(col, i, to); }
  Vec scale(int64_t col, int i) const { return f8_scale(scales[i], col); }
  void prefetch(int64_t) const {}
  const uint8_t* halves;
  const uint8_t* scales[kRows];
  int64_t begin;
};

// Multiplies all columns of rows [row, a.row_end), kRows at a time, for kTokens tokens. Returns the first row
// not processed.
template <int kRows, int kTokens>
[[gnu::noinline]] int64_t matmul_f8_rows(const MatmulArgs& a, int64_t row, int64_t token) {
  // With few tokens, reading dominates, and their sums leave registers for wide conversion.
  constexpr int kVecs = kTokens <= 2 ? kF8VecsOfFewTokens : kTokens <= 4 ? kF8Vecs : 1;
  const RowsOfX<kTokens> x(a, token);
  for (; row + kRows <= a.row_end; row += kRows) {
    const RowsOfF8<kRows, kVecs> rows(a, row);
    matmul_float_tile<kRows, kTokens>(a, rows, x, row, token, 0, a.cols, NoneWait{});
  }
  return row;
}

template <int kTokens>
void matmul_halves_rows(const MatmulArgs& a, const uint16_t* halves, const float* copy, int64_t row,
                        int64_t row_end, int64_t token, int64_t begin, int64_t end, Vec* waiting) {
  const CopyOfX<kTokens> x{copy, begin};
  constexpr int kRows = kFloatTileRows;
  for (; row + kRows <= row_end; row += kRows, waiting += kRows * kTokens, halves += kRows * kBlockCols) {
    matmul_float_tile<kRows, kTokens>(a, HalvesOfF8<kRows>(a, row, halves, begin), x, row, token, begin, end,
                                      waiting);
  }
  for (; row < row_end; ++row, waiting += kTokens, halves += kBlockCols) {
    matmul_float_tile<1, kTokens>(a, HalvesOfF8<1>(a, row, halves, begin), x, row, token, begin, end,
                                  waiting);
  }
}

// At most one block of rows, tokens and columns; begin is a multiple of 128.
void matmul_f8_block(const MatmulArgs& a, int64_t row, int64_t row_end, int64_t token, int64_t token_end,
                     int64_t begin, int64_t end, Vec* waiting) {
  alignas(64) uint16_t halves[kBlockRows * kBlockCols];
  alignas(64) float copy[kFloatTileTokens * kBlockCols];
  for (int64_t i = row; i < row_end; ++i) {
    const uint8_t* codes = a.weights + f8_row_at(i, a.cols);
    uint16_t* to = halves + (i - row) * kBlockCols;
    // The next columns of this row, or the first of a row in the next block: pieces too short for the
    // hardware to detect a stream.
    const uint8_t* next = end < a.cols ? codes + end : a.weights + f8_row_at(i + kBlockRows, a.cols);
    for (int64_t at = 0; at < kBlockCols; at += 64) __builtin_prefetch(next + at, 0, 2);
    for (int64_t col = begin; col < end; col += kF8Vecs * kLanes, to += kF8Vecs * kLanes)
      halve_f8(codes + col, end - col, to);
  }
  for (; token < token_end; token += kFloatTileTokens, waiting += kBlockRows * kFloatTileTokens) {
    with_number<kFloatTileTokens>(token_end - token < kFloatTileTokens ? token_end - token : kFloatTileTokens,
                                  [&]<int kTokens>(Number<kTokens>) {
                                    copy_x<kTokens>(a, token, begin, end, copy);
                                    matmul_halves_rows<kTokens>(a, halves, copy, row, row_end, token, begin,
                                                                end, waiting);
                                  });
  }
}

void matmul_f8(const MatmulArgs& a) {
  if (a.num_tokens <= kFloatTileTokens || a.cols == 0) {
    for (int64_t token = 0; token < a.num_tokens; token += kFloatTileTokens) {
      const int64_t rest = a.num_tokens - token;
      with_number<kFloatTileTokens>(
          rest < kFloatTileTokens ? rest : kFloatTileTokens, [&]<int kTokens>(Number<kTokens>) {
            constexpr int kRows = kTokens == 1 ? kF8RowsAlone : kFloatTileRows;
            const int64_t row = matmul_f8_rows<kRows, kTokens>(a, a.row_begin, token);
            matmul_f8_rows<1, kTokens>(a, row, token);
          });
    }
    return;
  }
  static_assert(kBlockCols % kF8Block == 0);
  Vec waiting[kBlockRows * kBlockTokens];
  for (int64_t row = a.row_begin; row < a.row_end; row += kBlockRows) {
    const int64_t row_end = a.row_end - row < kBlockRows ? a.row_end : row + kBlockRows;
    for (int64_t token = 0; token < a.num_tokens; token += kBlockTokens) {
      const int64_t token_end = a.num_tokens - token < kBlockTokens ? a.num_tokens : token + kBlockTokens;
      for (int64_t col = 0; col < a.cols; col += kBlockCols) {
        const int64_t col_end = a.cols - col < kBlockCols ? a.cols : col + kBlockCols;
        matmul_f8_block(a, row, row_end, token, token_end, col, col_end, waiting);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
