// coded.h: y = W x for coded formats, which products cannot multiply as they lie in memory.
//
//   many tokens   A strip of a panel is decoded into the thread's scratch as a panel of a wide format, whose
//                 tiles (quantized_tile_*.h) multiply it with all tokens. Between strips, the sums wait in y.
//   few tokens    DirectProduct multiplies the codes as it decodes them; without one, the same as with many.
//
// A new coded format needs a CodedRow (coded_row.h) and its entry in formats.h. An instruction set makes it
// fast by specialising two templates, in a header that isa_*.cpp includes before all_kernels.h:
//
//   Decode<F>::run           writes groups [group_begin, group_end) of a panel as a panel of the wide format.
//                            group_begin is at the beginning of a block; `wide` is aligned to 64 bytes.
//   DirectProduct<F>::run    multiplies up to kMostTokens tokens, all rows of the arguments, if the columns
//                            are whole blocks.
//
// Bits do not depend on which of them ran, so a DirectProduct has the operations of the wide tile, group by
// group: sum = fma(scale * x_scale, float(dot), sum); with a scale for each half, sum = fma(x_scale,
// fma(scale[1], float(dot[1]), scale[0] * float(dot[0])), sum). A format with row scales multiplies the sum
// by them at the end.
#pragma once

#include "kernels/coded_row.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_quantized.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR

template <Format kFormat>
void matmul_coded(const MatmulArgs& a) {
  matmul_reference<kFormat>(a);
}

#else

// Writes the quants of one row of a wide group.
template <Format kWide>
[[gnu::always_inline]] inline void put_wide_row(uint8_t* block, int64_t row, const int8_t* q) {
  constexpr QuantFormat kQuant = quant_format(kWide);
  for (int64_t chunk = 0; chunk < 8; ++chunk) {
    uint32_t four;
    std::memcpy(&four, q + 4 * chunk, 4);
    four = (four ^ 0x80808080u) - uint32_t(128 - kQuant.zero) * 0x01010101u;  // no byte borrows
    std::memcpy(block + kQuant.block_scale_bytes() + chunk * kChunkBytes + 4 * row, &four, 4);
  }
}

template <Format kFormat>
struct Decode {
  static constexpr QuantFormat kQuant = quant_format(kFormat), kWide = quant_format(kQuant.wide);

  static void run(const uint8_t* panel, int64_t group_begin, int64_t group_end, uint8_t* wide) {
    for (int64_t group = group_begin; group < group_end; ++group, wide += kWide.block_bytes()) {
      float(*scales)[kPanelRows] = reinterpret_cast<float(*)[kPanelRows]>(wide);
      for (int64_t row = 0; row < kPanelRows; ++row) {
        int8_t q[kGroupSize];
        CodedRow<kFormat>::quants(panel, row, group, q);
        put_wide_row<kQuant.wide>(wide, row, q);
        for (int64_t part = 0; part < kWide.parts(); ++part) {
          scales[part][row] = CodedRow<kFormat>::scale(panel, row, group, part);
        }
      }
    }
  }
};

}  // namespace
}  // namespace argosy

#include "kernels/block_decode.h"

namespace argosy {
namespace {

template <Format kFormat>
struct DirectProduct {
  static constexpr int kMostTokens = 0;
  static void run(const MatmulArgs&) {}
};

// Columns of a product from group_begin on, decoded for kPanels panels.
struct Strip {
  const uint8_t* wide;  // the panels, wide_bytes apart
  int64_t wide_bytes;
  int64_t group_begin, group_end;
  const uint8_t* row_scales;  // of the first panel, after the last strip of a format that has them; or null
  int64_t row_scales_stride;
};

// Adds the products of a strip to the sums of kPanels panels from `row` and kTokens tokens from `token`.
template <Format kWide, int kPanels, int kTokens>
void run_strip(const MatmulArgs& a, const Strip& strip, int64_t row, int64_t token) {
  using Tile = QuantizedTile<kWide, kPanels, kTokens>;
  const TileOperands<kWide, kTokens> o(a, strip.wide, strip.wide_bytes, strip.group_begin, token);
  typename Tile::Sums sum = {};
  if (strip.group_begin > 0) Tile::take(a, row, token, sum);
  for (int64_t group = strip.group_begin; group < strip.group_end; ++group) {
    typename Tile::Dots dot;
    Tile::multiply(o, group, dot);
    Tile::scale(o, group, Tile::block_scales(o, group), dot, sum);
  }
  if (strip.row_scales != nullptr) Tile::multiply_rows(strip.row_scales, strip.row_scales_stride, sum);
  Tile::put(a, row, token, sum);
}

// All tokens of a strip, in tiles of nearly equal size.
template <Format kWide, int kPanels, int kMostTokens>
[[gnu::noinline]] void run_tokens(const MatmulArgs& a, const Strip& strip, int64_t row) {
  const int64_t tiles = (a.num_tokens + kMostTokens - 1) / kMostTokens;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = a.num_tokens * tile / tiles, end = a.num_tokens * (tile + 1) / tiles;
    with_number<kMostTokens>(end - first, [&]<int kTokens>(Number<kTokens>) {
      run_strip<kWide, kPanels, kTokens>(a, strip, row, first);
    });
  }
}

// All tokens of kPanels panels.
template <Format kFormat, int kPanels, int kMostTokens>
void run_decoded(const MatmulArgs& a, int64_t row) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  constexpr int64_t kMostGroups = kStripCols / kGroupSize;
  static_assert(kStripCols % kLongestBlock == 0);
  const int64_t stride = panel_bytes(kFormat, a.cols), groups = num_groups(a.cols);
  const uint8_t* panel = a.weights + row / kPanelRows * stride;
  uint8_t* wide = a.scratch + kWideScratchAt;
  // Without columns, the sums are zero.
  for (int64_t begin = 0; begin == 0 || begin < groups; begin += kMostGroups) {
    const bool is_last = groups - begin <= kMostGroups;
    const Strip strip = {wide,
                         panel_bytes(kQuant.wide, kStripCols),
                         begin,
                         is_last ? groups : begin + kMostGroups,
                         kQuant.has_row_scale && is_last ? panel : nullptr,
                         stride};
    for (int64_t i = 0; i < kPanels; ++i) {
      Decode<kFormat>::run(panel + i * stride, strip.group_begin, strip.group_end,
                           wide + i * strip.wide_bytes);
    }
    run_tokens<kQuant.wide, kPanels, kMostTokens>(a, strip, row);
  }
}

template <Format kFormat>
void matmul_coded(const MatmulArgs& a) {
  const bool has_whole_blocks = a.cols % quant_format(kFormat).block_cols == 0;
  if (has_whole_blocks && a.num_tokens <= DirectProduct<kFormat>::kMostTokens) {
    return DirectProduct<kFormat>::run(a);
  }
  int64_t row = a.row_begin;
#if ARGOSY_AVX512
  if (a.num_tokens >= a.tuning.two_panels_from) {
    for (; row + kPanelRows < a.row_end; row += 2 * kPanelRows) {
      run_decoded<kFormat, 2, two_panels_tokens(quant_format(kFormat).wide)>(a, row);
    }
  }
#endif
  for (; row < a.row_end; row += kPanelRows) {
    run_decoded<kFormat, 1, one_panel_tokens(quant_format(kFormat).wide)>(a, row);
  }
}

#endif

}  // namespace
}  // namespace argosy
