// matmul_args.h: the arguments of products; where the rows of one token begin, and the arguments of some
// tokens.
#pragma once

#include "kernels/formats.h"
#include "kernels/tuning.h"

namespace argosy {

// The memory of one product on tiles (matmul_amx.h), and where some products split their activations
// (matmul_float_amx.h).
[[maybe_unused]] static constexpr int64_t kAmxScratchBytes = int64_t{736} << 10;
[[maybe_unused]] static constexpr int64_t kSplitScratchBytes = int64_t{1088} << 10;
// Whether products with weights of this format can run on tiles. Those of q2_k and q3_k add up two dot
// products of a group as 16-bit integers, which tiles do not have; those of grouped formats are read at run
// time, and coded formats run on their wide format. Nothing multiplies row scales there.
static inline constexpr bool has_amx_product(Format format) {
  return is_quantized(format) && !quant_format(format).is_paired() && !is_coded(format) &&
         !is_grouped(format) && !quant_format(format).has_row_scale;
}
// In the instruction set `amx`, products with weights of these formats run on tiles always, and split their
// activations into two bfloat16 parts (matmul_float_amx.h).
static inline constexpr bool splits_activations(Format format) {
  return format == Format::bf16 || format == Format::f8;
}
// Tokens of a tile of split activations.
[[maybe_unused]] static constexpr int64_t kSplitTokens = 16;
// Bytes of split activations: for each sixteen tokens, for each 32 columns, a tile of high parts and one of
// low parts. A tile has [pairs of columns][16 tokens][2] bfloat16, with zeros for missing columns and tokens;
// if there is only one token in all, [pairs of columns][2].
static inline constexpr int64_t split_bytes(int64_t cols, int64_t num_tokens) {
  return round_up(cols, 32) * 4 * (num_tokens == 1 ? 1 : round_up(num_tokens, kSplitTokens));
}
// The most tokens of which a product keeps the split activations while it goes through its rows, at least 32
// if there are as many: they fit in the scratch, and in the second-level cache.
[[maybe_unused]] static constexpr int64_t kKeptSplitBytes = int64_t{1} << 20;
static inline constexpr int64_t most_split_tokens(int64_t cols) {
  constexpr int64_t kMost = 128, kTwoTiles = 2 * kSplitTokens;
  if (split_bytes(cols, kMost) <= kKeptSplitBytes) return kMost;
  const int64_t fit = kKeptSplitBytes / split_bytes(cols, kTwoTiles);
  return fit > 1 ? fit * kTwoTiles : kTwoTiles;
}
// Where products of coded formats decode two panels, behind what product_scratch.h keeps. What else lies
// there only serves a product that follows with the same format.
[[maybe_unused]] static constexpr int64_t kWideScratchAt = 256, kStripCols = 2048;
[[maybe_unused]] static constexpr int64_t kCodedScratchBytes =
    kWideScratchAt + 2 * panel_bytes(Format::wide_halves, kStripCols);
// At its beginning: the operations of all products since it was zeros. Other threads may read them.
struct ProductCounts {
  uint64_t in_tiles, all;
};

// y[t][r - row_begin] = sum over c of W[r][c] * x[t][c]
struct MatmulArgs {
  Format format;           // of the weights: one kernel may serve several
  const uint8_t* weights;  // the whole matrix
  int64_t cols;
  int64_t row_begin, row_end;  // for panels, row_begin is a multiple of 16
  const uint8_t* x;  // token t begins at x + x_stride * (x_index ? x_index[t] : t); float32 [cols], or
  int64_t x_stride;  //   the output of quantize_activations if weights are in panels. x_stride in bytes
  const int32_t* x_index;
  float* y;          // token t begins at y + y_stride * (y_index ? y_index[t] : t)
  int64_t y_stride;  // in floats
  const int32_t* y_index;
  int64_t num_tokens;
  const uint8_t* next_weights = nullptr;  // the panels or rows that the caller reads next: a prefetch hint
  Tuning tuning = {};
  // KernelTable::product_scratch_bytes of this thread, aligned to 64. nullptr: a product without tiles; those
  // that split activations, and those of coded formats, need it.
  uint8_t* scratch = nullptr;
  // What KernelTable::split_activations wrote of all tokens, aligned to 64; nullptr: the product splits x.
  const uint8_t* split_x = nullptr;
  // The product before, with this scratch, had the same activations: x and x_index, with the same content.
  bool repeats_x = false;
};

// Columns [begin, end) of sixteen tokens, or of those that are left: the tokens from 16 * tile on.
struct SplitArgs {
  const float* x;            // of the first token
  int64_t x_stride;          // in floats
  int64_t num_tokens, cols;  // in all
  int64_t tile, begin, end;  // begin is a multiple of 32
  uint8_t* out;              // split_bytes(cols, num_tokens), aligned to 64
};

namespace {

inline const uint8_t* activation_row(const MatmulArgs& a, int64_t token) {
  return a.x + (a.x_index != nullptr ? a.x_index[token] : token) * a.x_stride;
}
inline const float* float_row(const MatmulArgs& a, int64_t token) {
  return reinterpret_cast<const float*>(activation_row(a, token));
}
template <class Args>  // MatmulArgs or LowRankArgs
inline float* output_row(const Args& a, int64_t token) {
  return a.y + (a.y_index != nullptr ? a.y_index[token] : token) * a.y_stride;
}

// The same product for `count` tokens from `first`.
inline MatmulArgs some_tokens(MatmulArgs a, int64_t first, int64_t count) {
  if (a.x_index != nullptr) {
    a.x_index += first;
  } else {
    a.x += first * a.x_stride;
  }
  if (a.y_index != nullptr) {
    a.y_index += first;
  } else {
    a.y += first * a.y_stride;
  }
  a.num_tokens = count;
  return a;
}

// A compile-time number.
template <int kValue>
struct Number {};

// Calls body(Number<n>{}) for n from kLeast to kMost; does nothing for other n.
template <int kMost, int kLeast = 1, class Body>
inline void with_number(int64_t n, const Body& body) {
  if constexpr (kMost >= kLeast) {
    if (n == kMost) return body(Number<kMost>{});
    with_number<kMost - 1, kLeast>(n, body);
  }
}

}  // namespace
}  // namespace argosy
