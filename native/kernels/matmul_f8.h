// matmul_f8.h: y = W x for FP8 E4M3 weights with scales of blocks or rows.
//
//   W  laid out as in formats.h, at any alignment.    x  float32 [tokens][cols].    y  float32, overwritten.
//
// f8, f8_row: for each 128 columns in ascending order, y += scale * (sum of code * x). f8_32, mxfp8: a scale
// lasts for one or two vectors, so it multiplies the weights: y += (scale * code) * x. The sums and tiles are
// as in matmul_float.h. There are no NaN codes: transcoding refuses them (transcode_f8.h).
//
// Few tokens: bound by memory, one byte per weight. Many tokens: bound by multiply-adds; a few rows at a time
// are converted to float32 for all tokens of a block.
#pragma once

#include "kernels/half.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_float.h"

namespace argosy {
namespace {

// The scale of a column among those of its row.
inline float f8_scale_in(Format format, const uint8_t* scales, int64_t col) {
  const F8Format f8 = f8_format(format);
  scales += f8.scale_cols == 0 ? 0 : col / f8.scale_cols * f8.scale_bytes;
  return f8.scale_bytes == 1 ? float_from_e8m0(*scales) : read_unaligned<float>(scales);
}
inline float f8_scale_at(Format format, const uint8_t* weights, int64_t cols, int64_t row, int64_t col) {
  return f8_scale_in(format, weights + f8_scales_at(format, row, cols), col);
}

// Whether a scale multiplies weights, not sums.
constexpr bool scales_weights(Format format) { return f8_format(format).scale_cols == 32; }

#if !ARGOSY_VECTOR  // the reference

template <Format kFormat>
void matmul_f8(const MatmulArgs& a) {
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* codes = a.weights + f8_row_at(kFormat, row, a.cols);
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      const float* x = float_row(a, token);
      float sum = 0.0f;
      for (int64_t begin = 0; begin < a.cols; begin += kF8Block) {
        const int64_t end = a.cols - begin < kF8Block ? a.cols : begin + kF8Block;
        float part = 0.0f;
        for (int64_t col = begin; col < end; ++col) {
          const float weight = float_from_f8(codes[col]);
          part += (scales_weights(kFormat) ? weight * f8_scale_at(kFormat, a.weights, a.cols, row, col)
                                           : weight) *
                  x[col];
        }
        sum += scales_weights(kFormat) ? part : f8_scale_at(kFormat, a.weights, a.cols, row, begin) * part;
      }
      output_row(a, token)[row - a.row_begin] = sum;
    }
  }
}

#else

// The scale for codes converted to value / 256.
template <Format kFormat>
Vec f8_scale(const uint8_t* scales, int64_t col) {
  // A power of two times 256 has another exponent, and is normal.
  if constexpr (kFormat == Format::mxfp8) {
    return broadcast(bit_cast<float>((uint32_t(scales[col / kGroupSize]) + 8) << 23));
  }
  return broadcast(f8_scale_in(kFormat, scales, col) * 256.0f);
}

// Reads rows in place and converts kNumVecs vectors at once to value / 256, or to weights.
template <Format kFormat, int kRows, int kNumVecs>
struct RowsOfF8 {
  static constexpr int64_t kScaledCols = scales_weights(kFormat) ? 0 : kF8Block;
  static constexpr int kVecs = kNumVecs, kRowsAtOnce = kRows;

  RowsOfF8(const MatmulArgs& a, int64_t row) : ahead(kRows * a.cols) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      codes[i] = a.weights + f8_row_at(kFormat, row + i, a.cols);
      scales[i] = a.weights + f8_scales_at(kFormat, row + i, a.cols);
    }
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const {
    load_f8(codes[i] + col, to);
    if constexpr (scales_weights(kFormat)) {
      __builtin_prefetch(codes[i] + col + ahead, 0, 2);
      scale_weights(col, i, kVecs * kLanes, to);
    }
  }
  void load(int64_t col, int i, int64_t n, Vec (&to)[kVecs]) const {
    load_f8(codes[i] + col, n, to);
    if constexpr (scales_weights(kFormat)) scale_weights(col, i, n, to);
  }
  void scale_weights(int64_t col, int i, int64_t n, Vec (&to)[kVecs]) const {
    Vec by = zeros();
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      if (v * kLanes >= n) break;
      if (v * kLanes % kGroupSize == 0) by = f8_scale<kFormat>(scales[i], col + v * kLanes);
      to[v] = mul(by, to[v]);
    }
  }
  Vec scale(int64_t col, int i) const { return f8_scale<kFormat>(scales[i], col); }
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

// What a block of rows is converted to, once for all tokens: float16, value / 256, with scales in place; or
// float32 weights.
template <Format kFormat>
struct F8Copy {
  using Value = uint16_t;
  static Vec load(const Value* from) { return F16Weights::load(reinterpret_cast<const uint8_t*>(from)); }
  static void convert(const uint8_t* codes, const uint8_t*, int64_t col, int64_t n, Value* to) {
    halve_f8(codes + col, n, to);
  }
};
template <Format kFormat>
  requires(scales_weights(kFormat))
struct F8Copy<kFormat> {
  using Value = float;
  static Vec load(const Value* from) { return argosy::load(from); }
  static void convert(const uint8_t* codes, const uint8_t* scales, int64_t col, int64_t n, Value* to) {
    Vec values[kF8Vecs];
    if (n < kF8Vecs * kLanes) {
      load_f8(codes + col, n, values);
    } else {
      load_f8(codes + col, values);
    }
    for (int v = 0; v < kF8Vecs; ++v) {
      const Vec scale = v * kLanes < n ? f8_scale<kFormat>(scales, col + v * kLanes) : zeros();
      store(to + v * kLanes, mul(scale, values[v]));
    }
  }
};

// Converted rows: columns starting at `begin`, zeros after the last column.
template <Format kFormat, int kRows>
struct CopyOfF8 {
  static constexpr int64_t kScaledCols = scales_weights(kFormat) ? 0 : kF8Block;
  static constexpr int kVecs = 1, kRowsAtOnce = kRows;
  using Value = typename F8Copy<kFormat>::Value;

  CopyOfF8(const MatmulArgs& a, int64_t row, const Value* converted, int64_t first)
      : values(converted), begin(first) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) scales[i] = a.weights + f8_scales_at(kFormat, row + i, a.cols);
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const {
    to[0] = F8Copy<kFormat>::load(values + i * kBlockCols + col - begin);
  }
  void load(int64_t col, int i, int64_t, Vec (&to)[kVecs]) const { load(col, i, to); }
  Vec scale(int64_t col, int i) const { return f8_scale<kFormat>(scales[i], col); }
  void prefetch(int64_t) const {}
  const Value* values;
  const uint8_t* scales[kRows];
  int64_t begin;
};

// Multiplies all columns of rows [row, a.row_end), kRows at a time, for kTokens tokens. Returns the first row
// not processed.
template <Format kFormat, int kRows, int kTokens>
[[gnu::noinline]] int64_t matmul_f8_rows(const MatmulArgs& a, int64_t row, int64_t token) {
  // With few tokens, reading dominates, and their sums leave registers for wide conversion.
  constexpr int kVecs = kTokens <= 2 ? kF8VecsOfFewTokens : kTokens <= 4 ? kF8Vecs : 1;
  const RowsOfX<kTokens> x(a, token);
  for (; row + kRows <= a.row_end; row += kRows) {
    const RowsOfF8<kFormat, kRows, kVecs> rows(a, row);
    matmul_float_tile<kRows, kTokens>(a, rows, x, row, token, 0, a.cols, NoneWait{});
  }
  return row;
}

template <Format kFormat, int kTokens>
void matmul_converted_rows(const MatmulArgs& a, const typename F8Copy<kFormat>::Value* values,
                           const float* copy, int64_t row, int64_t row_end, int64_t token, int64_t begin,
                           int64_t end, Vec* waiting) {
  const CopyOfX<kTokens> x{copy, begin};
  constexpr int kRows = kFloatTileRows;
  for (; row + kRows <= row_end; row += kRows, waiting += kRows * kTokens, values += kRows * kBlockCols) {
    matmul_float_tile<kRows, kTokens>(a, CopyOfF8<kFormat, kRows>(a, row, values, begin), x, row, token,
                                      begin, end, waiting);
  }
  for (; row < row_end; ++row, waiting += kTokens, values += kBlockCols) {
    matmul_float_tile<1, kTokens>(a, CopyOfF8<kFormat, 1>(a, row, values, begin), x, row, token, begin, end,
                                  waiting);
  }
}

// At most one block of rows, tokens and columns; begin is a multiple of 128.
template <Format kFormat>
void matmul_f8_block(const MatmulArgs& a, int64_t row, int64_t row_end, int64_t token, int64_t token_end,
                     int64_t begin, int64_t end, Vec* waiting) {
  alignas(64) typename F8Copy<kFormat>::Value values[kBlockRows * kBlockCols];
  alignas(64) float copy[kFloatTileTokens * kBlockCols];
  for (int64_t i = row; i < row_end; ++i) {
    const uint8_t* codes = a.weights + f8_row_at(kFormat, i, a.cols);
    const uint8_t* scales = a.weights + f8_scales_at(kFormat, i, a.cols);
    auto* to = values + (i - row) * kBlockCols;
    // The next columns of this row, or the first of a row in the next block: pieces too short for the
    // hardware to detect a stream.
    const uint8_t* next = end < a.cols ? codes + end : a.weights + f8_row_at(kFormat, i + kBlockRows, a.cols);
    for (int64_t at = 0; at < kBlockCols; at += 64) __builtin_prefetch(next + at, 0, 2);
    for (int64_t col = begin; col < end; col += kF8Vecs * kLanes, to += kF8Vecs * kLanes)
      F8Copy<kFormat>::convert(codes, scales, col, end - col, to);
  }
  for (; token < token_end; token += kFloatTileTokens, waiting += kBlockRows * kFloatTileTokens) {
    with_number<kFloatTileTokens>(token_end - token < kFloatTileTokens ? token_end - token : kFloatTileTokens,
                                  [&]<int kTokens>(Number<kTokens>) {
                                    copy_x<kTokens>(a, token, begin, end, copy);
                                    matmul_converted_rows<kFormat, kTokens>(a, values, copy, row, row_end,
                                                                            token, begin, end, waiting);
                                  });
  }
}

template <Format kFormat>
void matmul_f8(const MatmulArgs& a) {
  if (a.num_tokens <= kFloatTileTokens || a.cols == 0) {
    for (int64_t token = 0; token < a.num_tokens; token += kFloatTileTokens) {
      const int64_t rest = a.num_tokens - token;
      with_number<kFloatTileTokens>(
          rest < kFloatTileTokens ? rest : kFloatTileTokens, [&]<int kTokens>(Number<kTokens>) {
            constexpr int kRows = kTokens == 1 ? kF8RowsAlone : kFloatTileRows;
            const int64_t row = matmul_f8_rows<kFormat, kRows, kTokens>(a, a.row_begin, token);
            matmul_f8_rows<kFormat, 1, kTokens>(a, row, token);
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
        matmul_f8_block<kFormat>(a, row, row_end, token, token_end, col, col_end, waiting);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
