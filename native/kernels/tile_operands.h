// tile_operands.h: the operands of the inner loops of matmul_quantized.
#pragma once

#include "kernels/matmul_args.h"

namespace argosy {
namespace {

// Rows starting at `row`, times kTokens tokens starting at `token`.
template <Format kFormat, int kTokens>
struct TileOperands {
  static constexpr QuantFormat kQuant = quant_format(kFormat);

  TileOperands(const MatmulArgs& a, int64_t row, int64_t token)
      : cols(a.cols), stride(panel_bytes(kFormat, a.cols)), panel(a.weights + row / kPanelRows * stride) {
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; ++j) x[j] = activation_row(a, token + j);
  }

  // Of a wide format: panels that begin at group_begin.
  TileOperands(const MatmulArgs& a, const uint8_t* wide, int64_t wide_bytes, int64_t group_begin,
               int64_t token)
      : cols(a.cols), stride(wide_bytes), first_group(group_begin), panel(wide) {
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; ++j) x[j] = activation_row(a, token + j);
  }

  const uint8_t* quants(int64_t group) const { return panel + kQuant.quants_at(group - first()); }
  const uint8_t* block_scales(int64_t group) const { return panel + kQuant.scales_at(group - first()); }
  int64_t first() const { return kQuant.has_float_scales ? first_group : 0; }

  int64_t cols, stride;
  int64_t first_group = 0;
  const uint8_t* panel;  // the first panel; the next lies `stride` bytes further
  const uint8_t* x[kTokens];
};

}  // namespace
}  // namespace argosy
