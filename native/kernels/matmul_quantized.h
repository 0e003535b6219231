// matmul_quantized.h: y = W x for quantised weights and int8 activations.
//
//   W  panels of 16 rows (formats.h), at any alignment.    x  what quantize_activations wrote, per token:
//   both bytes of an activation beside q8 weights, the high one beside the others. y  float32, overwritten.
//
// For each group in ascending order: y += (weight scale * activation scale) * float(dot), where dot is the
// exact integer sum over the group of q * activation. Few tokens: bound by memory, 1.0625 or 0.5625 bytes per
// weight. Many: bound by integer multiply-adds.
#pragma once

#include "kernels/half.h"
#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/weight_scale.h"

namespace argosy {
namespace {

inline int32_t activation_at(Format format, const uint8_t* x, int64_t cols, int64_t col) {
  const int32_t high = int8_t(x[col]);
  return format == Format::q8 ? 256 * high + int8_t(x[activation_low_at(cols) + col]) : high;
}

// The reference.
template <Format kFormat>
void matmul_reference(const MatmulArgs& a) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  // Columns that share a scale of the weights and one of the activations.
  constexpr int64_t kSameScale = kQuant.sub_scale_cols == 16 ? 16 : kGroupSize;
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* panel = a.weights + row / kPanelRows * panel_bytes(kFormat, a.cols);
    const int64_t lane = row % kPanelRows;
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      const uint8_t* x = activation_row(a, token);
      float sum = 0.0f;
      for (int64_t group = 0; group < num_groups(a.cols); ++group) {
        const float scale = read_unaligned<float>(x + activation_scales_at(kFormat, a.cols) + group * 4);
        for (int64_t begin = group * kGroupSize; begin < (group + 1) * kGroupSize; begin += kSameScale) {
          int32_t dot = 0;
          for (int64_t col = begin; col < begin + kSameScale; ++col) {
            dot += quant_at(kFormat, panel, lane, col) * activation_at(kFormat, x, a.cols, col);
          }
          sum += (weight_scale_at(kFormat, panel, a.cols, lane, begin).scale * scale) * float(dot);
        }
        if (kQuant.has_min) {
          sum += weight_scale_at(kFormat, panel, a.cols, lane, group * kGroupSize).min *
                 read_unaligned<float>(x + activation_sums_at(a.cols) + group * 4);
        }
      }
      output_row(a, token)[row - a.row_begin] = sum;
    }
  }
}

#if !ARGOSY_VECTOR

template <Format kFormat>
void matmul_quantized(const MatmulArgs& a) {
  matmul_reference<kFormat>(a);
}

#else

// Tiles of kPanels panels and kTokens tokens, and the rest in smaller ones.
template <Format kFormat, int kPanels>
void matmul_quantized_panels(const MatmulArgs& a, int64_t row) {
  constexpr int kTokens = kPanels == 1 ? kOnePanelTokens : two_panels_tokens(kFormat);
  int64_t token = 0;
  for (; token + kTokens <= a.num_tokens; token += kTokens) {
    QuantizedTile<kFormat, kPanels, kTokens>::run(a, row, token);
  }
  with_number<kTokens - 1>(a.num_tokens - token, [&]<int kRest>(Number<kRest>) {
    QuantizedTile<kFormat, kPanels, kRest>::run(a, row, token);
  });
}

template <Format kFormat>
void matmul_quantized(const MatmulArgs& a) {
  if constexpr (kFormat != Format::q8 && kFormat != Format::q4) return matmul_reference<kFormat>(a);
  int64_t row = a.row_begin;
  if constexpr (two_panels_tokens(kFormat) > 0) {
    for (; row + kPanelRows < a.row_end; row += 2 * kPanelRows) {
      matmul_quantized_panels<kFormat, 2>(a, row);
    }
  }
  for (; row < a.row_end; row += kPanelRows) matmul_quantized_panels<kFormat, 1>(a, row);
}

#endif

}  // namespace
}  // namespace argosy
