// matmul_quantized.h: y = W x for q8 and q4 weights and int8 activations.
//
//   W  panels of 16 rows (formats.h), at any alignment.    x  what quantize_activations wrote, per token:
//   both bytes of an activation beside q8 weights, the high one beside q4. y  float32, overwritten.
//
// For each group in ascending order: y += (weight scale * activation scale) * float(dot), where dot is the
// exact integer sum over the group of q * activation. Few tokens: bound by memory, 1.0625 or 0.5625 bytes per
// weight. Many: bound by integer multiply-adds.
#pragma once

#include "kernels/half.h"
#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

inline int32_t activation_at(Format format, const uint8_t* x, int64_t cols, int64_t col) {
  const int32_t high = int8_t(x[col]);
  return format == Format::q8 ? 256 * high + int8_t(x[activation_low_at(cols) + col]) : high;
}

template <Format kFormat>
void matmul_quantized(const MatmulArgs& a) {
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* panel = a.weights + row / kPanelRows * panel_bytes(kFormat, a.cols);
    const uint8_t* weight_scales = panel + quant_bytes(kFormat, a.cols) + row % kPanelRows * 2;
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      const uint8_t* x = activation_row(a, token);
      float sum = 0.0f;
      for (int64_t group = 0; group < num_groups(a.cols); ++group) {
        int32_t dot = 0;
        for (int64_t col = group * kGroupSize; col < (group + 1) * kGroupSize; ++col) {
          dot += quant_at(kFormat, panel, row % kPanelRows, col) * activation_at(kFormat, x, a.cols, col);
        }
        const float weight_scale =
            float_from_f16(read_unaligned<uint16_t>(weight_scales + group * kPanelRows * 2));
        const float scale = read_unaligned<float>(x + activation_scales_at(kFormat, a.cols) + group * 4);
        sum += (weight_scale * scale) * float(dot);
      }
      output_row(a, token)[row - a.row_begin] = sum;
    }
  }
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
