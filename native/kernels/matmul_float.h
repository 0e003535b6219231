// matmul_float.h: y = W x for float32, float16 and bfloat16 weights.
//
//   W  rows x cols, row-major at any alignment.    x  float32 [tokens][cols].    y  float32, overwritten.
//
// Few tokens: bound by memory, 4 or 2 bytes per weight. Many tokens: bound by multiply-adds. A sum has one
// accumulator per lane, takes columns in ascending order, and folds the lanes once at the end. Tiles run over
// rows and tokens only, so a (row, token) gets the same sum in every tile.
#pragma once

#include "kernels/half.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

struct F32Weights {
  static constexpr int64_t kBytes = 4;
  static float load(const uint8_t* from) { return read_unaligned<float>(from); }
};
struct F16Weights {
  static constexpr int64_t kBytes = 2;
  static float load(const uint8_t* from) { return float_from_f16(read_unaligned<uint16_t>(from)); }
};
struct Bf16Weights {
  static constexpr int64_t kBytes = 2;
  static float load(const uint8_t* from) { return float_from_bf16(read_unaligned<uint16_t>(from)); }
};

template <class Weights>
void matmul_float(const MatmulArgs& a) {
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* weights = a.weights + row * a.cols * Weights::kBytes;
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      const float* x = float_row(a, token);
      float sum = 0.0f;
      for (int64_t col = 0; col < a.cols; ++col)
        sum += Weights::load(weights + col * Weights::kBytes) * x[col];
      output_row(a, token)[row - a.row_begin] = sum;
    }
  }
}

#else

// With many tokens, columns are processed in blocks, so that a tile rereads its data from the first-level
// cache. The sums of a tile, one vector each, are stored between blocks. The activations of a block are
// copied first, with the vectors of a tile's tokens side by side: rows whose distance is a large power of two
// would evict each other from the cache.
constexpr int64_t kBlockRows = 64, kBlockTokens = 24, kBlockCols = 512;
static_assert(kBlockRows % kFloatTileRows == 0 && kBlockTokens % kFloatTileTokens == 0);

// The activations of kTokens tokens, read in place: vector `i` of token j.
template <int kTokens>
struct RowsOfX {
  RowsOfX(const MatmulArgs& a, int64_t token) {
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) x[j] = float_row(a, token + j);
  }
  Vec at(int64_t col, int j) const { return load(x[j] + col); }
  Vec at(int64_t col, int j, int64_t n) const { return load(x[j] + col, n); }
  const float* x[kTokens];
};

// The same, copied: columns starting at `begin`, zeros after the last.
template <int kTokens>
struct CopyOfX {
  Vec at(int64_t col, int j) const { return load(copy + (col - begin) * kTokens + j * kLanes); }
  Vec at(int64_t col, int j, int64_t) const { return at(col, j); }
  const float* copy;
  int64_t begin;
};

template <int kTokens>
void copy_x(const MatmulArgs& a, int64_t token, int64_t begin, int64_t end, float* copy) {
  const RowsOfX<kTokens> x(a, token);
  for (int64_t col = begin; col < end; col += kLanes) {
    for (int j = 0; j < kTokens; ++j, copy += kLanes) {
      store(copy, end - col >= kLanes ? x.at(col, j) : x.at(col, j, end - col));
    }
  }
}

// kRows rows of W, read in place: kVecs vectors starting at `col` of row i. One sum runs over all columns.
// Rows are loaded and multiplied one after another: loading the whole tile first would be slower.
template <class Weights, int kRows>
struct RowsOfW {
  static constexpr int64_t kScaledCols = 0;
  static constexpr int kVecs = 1, kRowsAtOnce = 1;

  RowsOfW(const MatmulArgs& a, int64_t row) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      w[i] = a.weights + (row + i) * a.cols * Weights::kBytes;
      next[i] = w[i] + kRows * a.cols * Weights::kBytes;
      if (a.next_weights != nullptr && row + kRows >= a.row_end)
        next[i] = a.next_weights + i * a.cols * Weights::kBytes;
    }
  }
  void load(int64_t col, int i, Vec (&to)[kVecs]) const {
    // Prefetches the next tile into the second-level cache: rows may be too short for the hardware to detect
    // a stream.
    __builtin_prefetch(next[i] + col * Weights::kBytes, 0, 2);
    to[0] = Weights::load(w[i] + col * Weights::kBytes);
  }
  void load(int64_t col, int i, int64_t n, Vec (&to)[kVecs]) const {
    to[0] = Weights::load(w[i] + col * Weights::kBytes, n);
  }
  const uint8_t* w[kRows];
  const uint8_t* next[kRows];
};

// Replaces the memory for stored sums: a tile that takes all columns needs none.
struct NoneWait {};

// Adds the products of the columns that W loads at once to the sums; if kIsPart, of only n columns.
template <bool kIsPart, int kRows, int kTokens, class W, class X>
[[gnu::always_inline]] inline void add_vectors(const W& rows, const X& x, int64_t col, int64_t n,
                                               Vec (&sum)[kRows][kTokens]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i += W::kRowsAtOnce) {
    Vec w[W::kRowsAtOnce][W::kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < W::kRowsAtOnce; ++r) {
      if constexpr (kIsPart) {
        rows.load(col, i + r, n, w[r]);
      } else {
        rows.load(col, i + r, w[r]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < W::kVecs; ++v) {
      const int64_t at = col + v * kLanes, rest = n - v * kLanes;
      if (kIsPart && rest <= 0) break;
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) {
        const Vec some = kIsPart && rest < kLanes ? x.at(at, j, rest) : x.at(at, j);
#pragma GCC unroll 8
        for (int r = 0; r < W::kRowsAtOnce; ++r) sum[i + r][j] = fma(w[r][v], some, sum[i + r][j]);
      }
    }
  }
}

// Adds the products of columns [begin, end) to the sums.
template <int kRows, int kTokens, class W, class X>
[[gnu::always_inline]] inline void add_products(const W& rows, const X& x, int64_t begin, int64_t end,
                                                Vec (&sum)[kRows][kTokens]) {
  constexpr int64_t kCols = W::kVecs * kLanes;
  int64_t col = begin;
  for (; col + kCols <= end; col += kCols) add_vectors<false>(rows, x, col, kCols, sum);
  if (col < end) add_vectors<true>(rows, x, col, end - col, sum);
}

// Multiplies columns [begin, end) of a tile. The sums start from `waiting` unless begin is 0, and are stored
// there unless end is the last column. If rows have scales, the sum of each kScaledCols columns is multiplied
// by its own scale.
template <int kRows, int kTokens, class W, class X, class Waiting>
void matmul_float_tile(const MatmulArgs& a, const W& rows, const X& x, int64_t row, int64_t token,
                       int64_t begin, int64_t end, Waiting waiting) {
  constexpr bool kIsWhole = __is_same(Waiting, NoneWait);
  Vec sum[kRows][kTokens];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTokens; ++j) {
      sum[i][j] = zeros();
      if constexpr (!kIsWhole) {
        if (begin > 0) sum[i][j] = waiting[i * kTokens + j];
      }
    }
  }
  if constexpr (W::kScaledCols == 0) {
    add_products(rows, x, begin, end, sum);
  } else {
    for (int64_t block = begin; block < end; block += W::kScaledCols) {
      Vec part[kRows][kTokens];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kTokens; ++j) part[i][j] = zeros();
      }
      rows.prefetch(block);
      add_products(rows, x, block, end - block < W::kScaledCols ? end : block + W::kScaledCols, part);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec scale = rows.scale(block, i);
#pragma GCC unroll 8
        for (int j = 0; j < kTokens; ++j) sum[i][j] = fma(scale, part[i][j], sum[i][j]);
      }
    }
  }
  if constexpr (!kIsWhole) {
    if (end < a.cols) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kTokens; ++j) waiting[i * kTokens + j] = sum[i][j];
      }
      return;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    float* y = output_row(a, token + j) + (row - a.row_begin);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) y[i] = sum_lanes(sum[i][j]);
  }
}

// Multiplies rows [row, row_end) for kTokens tokens.
template <class Weights, int kTokens, class X>
void matmul_float_rows(const MatmulArgs& a, const X& x, int64_t row, int64_t row_end, int64_t token,
                       int64_t begin, int64_t end, Vec* waiting) {
  constexpr int kRows = kTokens == 1 ? kFloatRowsAlone : kFloatTileRows;
  for (; row + kRows <= row_end; row += kRows, waiting += kRows * kTokens) {
    matmul_float_tile<kRows, kTokens>(a, RowsOfW<Weights, kRows>(a, row), x, row, token, begin, end, waiting);
  }
  for (; row < row_end; ++row, waiting += kTokens) {
    matmul_float_tile<1, kTokens>(a, RowsOfW<Weights, 1>(a, row), x, row, token, begin, end, waiting);
  }
}

// At most one block of columns, for all its rows and tokens.
template <class Weights>
void matmul_float_block(const MatmulArgs& a, int64_t row, int64_t row_end, int64_t token, int64_t token_end,
                        int64_t begin, int64_t end, Vec* waiting) {
  alignas(64) float copy[kFloatTileTokens * kBlockCols];
  for (; token < token_end; token += kFloatTileTokens, waiting += kBlockRows * kFloatTileTokens) {
    with_number<kFloatTileTokens>(token_end - token < kFloatTileTokens ? token_end - token : kFloatTileTokens,
                                  [&]<int kTokens>(Number<kTokens>) {
                                    copy_x<kTokens>(a, token, begin, end, copy);
                                    matmul_float_rows<Weights, kTokens>(a, CopyOfX<kTokens>{copy, begin}, row,
                                                                        row_end, token, begin, end, waiting);
                                  });
  }
}

template <class Weights>
void matmul_float(const MatmulArgs& a) {
  if (a.num_tokens <= kFloatTileTokens || a.cols == 0) {
    // A single tile of tokens reads each weight once, so it takes whole rows.
    for (int64_t token = 0; token < a.num_tokens; token += kFloatTileTokens) {
      const int64_t rest = a.num_tokens - token;
      with_number<kFloatTileTokens>(
          rest < kFloatTileTokens ? rest : kFloatTileTokens, [&]<int kTokens>(Number<kTokens>) {
            const RowsOfX<kTokens> x(a, token);
            matmul_float_rows<Weights, kTokens>(a, x, a.row_begin, a.row_end, token, 0, a.cols, nullptr);
          });
    }
    return;
  }
  Vec waiting[kBlockRows * kBlockTokens];
  for (int64_t row = a.row_begin; row < a.row_end; row += kBlockRows) {
    const int64_t row_end = a.row_end - row < kBlockRows ? a.row_end : row + kBlockRows;
    for (int64_t token = 0; token < a.num_tokens; token += kBlockTokens) {
      const int64_t token_end = a.num_tokens - token < kBlockTokens ? a.num_tokens : token + kBlockTokens;
      for (int64_t col = 0; col < a.cols; col += kBlockCols) {
        const int64_t col_end = a.cols - col < kBlockCols ? a.cols : col + kBlockCols;
        matmul_float_block<Weights>(a, row, row_end, token, token_end, col, col_end, waiting);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
