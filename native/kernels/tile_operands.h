// tile_operands.h: the operands of the inner loops of matmul_quantized.
#pragma once

#include "kernels/half.h"
#include "kernels/matmul_args.h"

namespace argosy {
namespace {

// The format of the weights. Only the arguments of a product know which of the grouped formats with a kernel
// in common it is.
template <Format kFormat>
inline Format format_of(const MatmulArgs& a) {
  return is_grouped(kFormat) ? a.format : kFormat;
}

// Rows starting at `row`, times kTokens tokens starting at `token`.
template <Format kFormat, int kTokens>
struct TileOperands {
  static constexpr QuantFormat kQuant = quant_format(kFormat);

  TileOperands(const MatmulArgs& a, int64_t row, int64_t token)
      : cols(a.cols),
        stride(panel_bytes(format_of<kFormat>(a), a.cols)),
        panel(a.weights + row / kPanelRows * stride),
        found(quant_format(format_of<kFormat>(a))),
        scale_bytes(found.block_scale_bytes()),
        scales_of_block(panel),
        next_quants(panel) {
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

  int64_t first() const { return kQuant.has_float_scales ? first_group : 0; }

  // Only the arguments of a product know the blocks of a grouped format, so its loops enter one block and one
  // group after another: a place computed from the group's number took twice as long.
  int64_t block_groups() const { return is_grouped(kFormat) ? found.block_groups() : kQuant.block_groups(); }
  [[gnu::always_inline]] void enter_block() {
    if constexpr (!is_grouped(kFormat)) return;
    scales_of_block = next_quants;
    next_quants += scale_bytes;
  }
  [[gnu::always_inline]] void leave_group() {
    if constexpr (is_grouped(kFormat)) next_quants += kQuant.group_bytes();
  }
  [[gnu::always_inline]] const uint8_t* quants(int64_t group) const {
    return is_grouped(kFormat) ? next_quants : panel + kQuant.quants_at(group - first());
  }
  [[gnu::always_inline]] const uint8_t* block_scales(int64_t group) const {
    return is_grouped(kFormat) ? scales_of_block : panel + kQuant.scales_at(group - first());
  }
  bool is_bf16() const { return is_grouped(kFormat) ? found.is_bf16 : kQuant.is_bf16; }
  GroupedMin grouped_min() const { return found.grouped_min; }

  int64_t cols, stride;
  int64_t first_group = 0;
  const uint8_t* panel;  // the first panel; the next lies `stride` bytes further
  // Of grouped formats only.
  QuantFormat found = {};
  int64_t scale_bytes = 0;
  const uint8_t *scales_of_block = nullptr, *next_quants = nullptr;
  const uint8_t* x[kTokens];
};

// What a min of a group is multiplied by: the sum of a token's activations in the group.
template <Format kFormat>
inline float activation_sum(const uint8_t* x, int64_t cols, int64_t group) {
  if constexpr (!takes_both_bytes(kFormat))
    return read_unaligned<float>(x + activation_sums_at(cols) + group * 4);
  const float scale = read_unaligned<float>(x + activation_scales_at(kFormat, cols) + group * 4);
  // Below 2^20, so a float32 holds it.
  const int32_t negated = read_unaligned<int32_t>(x + activation_negated_sums_at(kFormat, cols) + group * 4);
  return scale * float(-negated);
}

}  // namespace
}  // namespace argosy
