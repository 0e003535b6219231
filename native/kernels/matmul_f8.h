// matmul_f8.h: y = W x for FP8 E4M3 weights with scales of blocks or rows, and for other codes in rows.
//
//   W  laid out as in formats.h, at any alignment.    x  float32 [tokens][cols].    y  float32, overwritten.
//
// f8, f8_row: for each 128 columns in ascending order, y += scale * (sum of code * x). f8_32, mxfp8: a scale
// lasts for one or two vectors, so it multiplies the weights: y += (scale * code) * x; so it does for
// int8_row, bnb4 and bnb4_double. The sums and tiles are as in matmul_float.h. There are no NaN codes:
// transcoding refuses them (transcode_f8.h).
//
// Few tokens: bound by memory, one byte per weight, or half. Many tokens: bound by multiply-adds; a few rows
// at a time are converted to float32 for all tokens of a block.
#pragma once

#include "kernels/half.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_float.h"

namespace argosy {
namespace {

// The values of the codes of bitsandbytes' 8-bit scales: `create_dynamic_map` of its functional.py. Between
// 10^(i - 7) and 10^(i - 6) lie the middles of 2^i equal steps, for i from 0 to 6, with both signs; then
// there are 0 and 1.
struct DynamicMap {
  float value[256];
};
constexpr DynamicMap dynamic_map() {
  DynamicMap map = {};
  double power = 1e-6;
  for (int i = 0, at = 0; i < 7; ++i, power *= 10.0) {
    for (int step = 0; step < 1 << i; ++step, ++at) {
      const auto value = float(power * (0.1 + 0.9 * (step + 0.5) / (1 << i)));
      map.value[128 + at] = value;
      map.value[126 - at] = -value;
    }
  }
  map.value[255] = 1.0f;
  return map;
}
constexpr DynamicMap kDynamicMap = dynamic_map();

// bnb4_double: the scale with number `index` of a row (formats.h).
inline float double_scale(const uint8_t* scales, int64_t cols, int64_t index) {
  const int64_t before = scales[4];  // the lowest byte: no other value can be meant
  const auto factor = read_unaligned<float>(scales + 8 + (before + index) / kDoubleBlock * 4);
  const uint8_t code = scales[f8_format(Format::bnb4_double).double_scales_at(cols) + index];
  return kDynamicMap.value[code] * factor + read_unaligned<float>(scales);
}

// The scale of a column among those of its row.
inline float f8_scale_in(Format format, const uint8_t* scales, int64_t cols, int64_t col) {
  const F8Format f8 = f8_format(format);
  if (f8.is_double) return double_scale(scales, cols, col / f8.scale_cols);
  scales += f8.scale_cols == 0 ? 0 : col / f8.scale_cols * f8.scale_bytes;
  return f8.scale_bytes == 1 ? float_from_e8m0(*scales) : read_unaligned<float>(scales);
}
inline float f8_scale_at(Format format, const uint8_t* weights, int64_t cols, int64_t row, int64_t col) {
  return f8_scale_in(format, weights + f8_scales_at(format, row, cols), cols, col);
}

// Whether a scale multiplies weights, not sums.
constexpr bool scales_weights(Format format) { return format != Format::f8 && format != Format::f8_row; }

inline float f8_weight_at(Format format, const uint8_t* weights, int64_t cols, int64_t row, int64_t col) {
  const uint8_t* codes = weights + f8_row_at(format, row, cols);
  const float scale = f8_scale_at(format, weights, cols, row, col);
  if (format == Format::int8_row) return float(int8_t(codes[col])) * scale;
  if (!is_bnb4(format)) return float_from_f8(codes[col]) * scale;
  const int code = codes[col / 2] >> (col % 2 == 0 ? 4 : 0) & 15;
  return read_unaligned<float>(weights + f8_stretch_at(format, row, cols) + 4 * code) * scale;
}

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
          part += (scales_weights(kFormat) ? f8_weight_at(kFormat, a.weights, a.cols, row, col)
                                           : float_from_f8(codes[col])) *
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
Vec f8_scale(const uint8_t* scales, int64_t cols, int64_t col) {
  // A power of two times 256 has another exponent, and is normal.
  if constexpr (kFormat == Format::mxfp8) {
    return broadcast(bit_cast<float>((uint32_t(scales[col / kGroupSize]) + 8) << 23));
  }
  const float scale = f8_scale_in(kFormat, scales, cols, col);
  return broadcast(has_e4m3_codes(kFormat) ? scale * 256.0f : scale);
}

// Loads the codes of vectors of columns, as value / 256 if they are E4M3.
template <Format kFormat>
struct F8Codes {
  F8Codes(const uint8_t*, int64_t, int64_t num_cols) : cols(num_cols) {}
  template <int kVecs>
  void load(const uint8_t* codes, int64_t col, Vec (&to)[kVecs]) const {
    load_f8(codes + col, to);
  }
  template <int kVecs>
  void load(const uint8_t* codes, int64_t col, int64_t n, Vec (&to)[kVecs]) const {
    load_f8(codes + col, n, to);
  }
  int64_t cols;
};
template <>
struct F8Codes<Format::int8_row> {
  F8Codes(const uint8_t*, int64_t, int64_t num_cols) : cols(num_cols) {}
  template <int kVecs>
  void load(const uint8_t* codes, int64_t col, Vec (&to)[kVecs]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) to[v] = load_i8(codes + col + v * kLanes);
  }
  template <int kVecs>
  void load(const uint8_t* codes, int64_t col, int64_t n, Vec (&to)[kVecs]) const {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t rest = n - v * kLanes;
      to[v] = rest <= 0 ? zeros() : load_i8(codes + col + v * kLanes, rest < kLanes ? rest : kLanes);
    }
  }
  int64_t cols;
};
template <Format kFormat>
  requires(is_bnb4(kFormat))
struct F8Codes<kFormat> {
  // The same values in every stretch.
  F8Codes(const uint8_t* weights, int64_t row, int64_t num_cols)
      : values(weights + f8_stretch_at(kFormat, row, num_cols)), cols(num_cols) {}
  template <int kVecs>
  void load(const uint8_t* codes, int64_t col, Vec (&to)[kVecs]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) to[v] = values.of_nibbles(codes + (col + v * kLanes) / 2);
  }
  template <int kVecs>
  void load(const uint8_t* codes, int64_t col, int64_t, Vec (&to)[kVecs]) const {
    load(codes, col, to);  // rows are padded
  }
  SixteenFloats values;
  int64_t cols;
};

// Columns that have the scale of the first of them; 0: all.
template <Format kFormat>
constexpr int64_t kScaleCols = f8_format(kFormat).scale_cols;

// Reads rows in place and converts kNumVecs vectors at once to value / 256, or to weights.
template <Format kFormat, int kRows, int kNumVecs>
struct RowsOfF8 {
  static constexpr int64_t kScaledCols = scales_weights(kFormat) ? 0 : kF8Block;
  static constexpr int kVecs = kNumVecs, kRowsAtOnce = kRows;

  RowsOfF8(const MatmulArgs& a, int64_t row)
      : of_codes(a.weights, row, a.cols), ahead(kRows * f8_format(kFormat).row_code_bytes(a.cols)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      codes[i] = a.weights + f8_row_at(kFormat, row + i, a.cols);
      scales[i] = a.weights + f8_scales_at(kFormat, row + i, a.cols);
    }
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const {
    of_codes.load(codes[i], col, to);
    if constexpr (scales_weights(kFormat)) {
      __builtin_prefetch(codes[i] + (is_bnb4(kFormat) ? col / 2 : col) + ahead, 0, 2);
      scale_weights(col, i, kVecs * kLanes, to);
    }
  }
  void load(int64_t col, int i, int64_t n, Vec (&to)[kVecs]) const {
    of_codes.load(codes[i], col, n, to);
    if constexpr (scales_weights(kFormat)) scale_weights(col, i, n, to);
  }
  void scale_weights(int64_t col, int i, int64_t n, Vec (&to)[kVecs]) const {
    Vec by = zeros();
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      if (v * kLanes >= n) break;
      if (v == 0 || (kScaleCols<kFormat> > 0 && v * kLanes % kScaleCols<kFormat> == 0))
        by = f8_scale<kFormat>(scales[i], of_codes.cols, col + v * kLanes);
      to[v] = mul(by, to[v]);
    }
  }
  Vec scale(int64_t col, int i) const { return f8_scale<kFormat>(scales[i], of_codes.cols, col); }
  // Prefetches the next tile into the second-level cache: rows may be too short for the hardware to detect a
  // stream.
  void prefetch(int64_t col) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(codes[i] + col + ahead, 0, 2);
      __builtin_prefetch(codes[i] + col + ahead + 64, 0, 2);
    }
  }
  F8Codes<kFormat> of_codes;
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
  static void convert(const F8Codes<kFormat>&, const uint8_t* codes, const uint8_t*, int64_t col, int64_t n,
                      Value* to) {
    halve_f8(codes + col, n, to);
  }
};
template <Format kFormat>
  requires(scales_weights(kFormat))
struct F8Copy<kFormat> {
  using Value = float;
  static Vec load(const Value* from) { return argosy::load(from); }
  static void convert(const F8Codes<kFormat>& of_codes, const uint8_t* codes, const uint8_t* scales,
                      int64_t col, int64_t n, Value* to) {
    Vec values[kF8Vecs];
    if (n < kF8Vecs * kLanes) {
      of_codes.load(codes, col, n, values);
    } else {
      of_codes.load(codes, col, values);
    }
    for (int v = 0; v < kF8Vecs; ++v) {
      const Vec scale = v * kLanes < n ? f8_scale<kFormat>(scales, of_codes.cols, col + v * kLanes) : zeros();
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
      : values(converted), cols(a.cols), begin(first) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) scales[i] = a.weights + f8_scales_at(kFormat, row + i, a.cols);
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const {
    to[0] = F8Copy<kFormat>::load(values + i * kBlockCols + col - begin);
  }
  void load(int64_t col, int i, int64_t, Vec (&to)[kVecs]) const { load(col, i, to); }
  Vec scale(int64_t col, int i) const { return f8_scale<kFormat>(scales[i], cols, col); }
  void prefetch(int64_t) const {}
  const Value* values;
  int64_t cols;
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
  const F8Codes<kFormat> of_codes(a.weights, row, a.cols);
  for (int64_t i = row; i < row_end; ++i) {
    const uint8_t* codes = a.weights + f8_row_at(kFormat, i, a.cols);
    const uint8_t* scales = a.weights + f8_scales_at(kFormat, i, a.cols);
    auto* to = values + (i - row) * kBlockCols;
    // The next columns of this row, or the first of a row in the next block: pieces too short for the
    // hardware to detect a stream.
    const uint8_t* next = end < a.cols ? codes + (is_bnb4(kFormat) ? end / 2 : end)
                                       : a.weights + f8_row_at(kFormat, i + kBlockRows, a.cols);
    for (int64_t at = 0; at < kBlockCols; at += 64) __builtin_prefetch(next + at, 0, 2);
    for (int64_t col = begin; col < end; col += kF8Vecs * kLanes, to += kF8Vecs * kLanes)
      F8Copy<kFormat>::convert(of_codes, codes, scales, col, end - col, to);
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
