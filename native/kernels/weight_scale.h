// weight_scale.h: the factors and the quants of one row, for every quantised format.
#pragma once

#include "kernels/coded_row.h"
#include "kernels/formats.h"
#include "kernels/half.h"

namespace argosy {
namespace {

// The factors of one column of one row: weight = scale * q + min.
struct WeightScale {
  float scale, min;
};

// Not for coded formats.
inline WeightScale weight_scale_at(Format format, const uint8_t* panel, int64_t row, int64_t col) {
  const QuantFormat q = quant_format(format);
  const int64_t inside = col % q.block_cols;
  const uint8_t* scales = panel + q.scales_at(col / kGroupSize);
  if (q.sub_scales == SubScales::e4m3) {
    return {float_from_f8_over_256(scales[inside / q.sub_scale_cols * kPanelRows + row]), 0.0f};
  }
  const uint16_t bits = read_unaligned<uint16_t>(scales + row * 2);
  const float scale = q.is_bf16 ? float_from_bf16(bits) : float_from_f16(bits);
  if (q.grouped_min == GroupedMin::of_constant_zero) return {scale, -scale * float(1 << (q.bits - 1))};
  if (q.grouped_min == GroupedMin::of_zeros) return {scale, -scale * float(scales[kPanelRows * 2 + row])};
  const uint16_t min_bits =
      q.has_min ? read_unaligned<uint16_t>(scales + (kPanelRows + row) * 2) : uint16_t(0);
  const float min = q.is_bf16 ? float_from_bf16(min_bits) : float_from_f16(min_bits);
  if (q.sub_scales == SubScales::none) return {scale, min};
  const int64_t number = inside / q.sub_scale_cols;
  const int64_t at =
      q.is_paired() ? (number / 2 * kPanelRows + row) * 2 + number % 2 : number * kPanelRows + row;
  const uint8_t sub_scale = scales[q.sub_scales_at() + at];
  if (q.sub_scales == SubScales::nibble_pairs) {
    return {scale * float(sub_scale & 0xF), min * float(sub_scale >> 4)};
  }
  if (q.sub_scales != SubScales::bytes) return {scale * float(int8_t(sub_scale)), 0.0f};
  const uint8_t sub_min = scales[q.sub_mins_at() + inside / kGroupSize * kPanelRows + row];
  return {scale * float(sub_scale), min * float(sub_min)};
}

// The same for half `part` of a group, or for a whole group, whose part is 0. `format` is one of those with
// the kernel of kFormat.
template <Format kFormat>
WeightScale scale_of_part(const uint8_t* panel, int64_t row, int64_t group, int64_t part, Format format) {
  if constexpr (is_coded(kFormat)) {
    return {CodedRow<kFormat>::scale(panel, row, group, part), 0.0f};
  } else {
    return weight_scale_at(format, panel, row, group * kGroupSize + part * kGroupSize / 2);
  }
}

// The quants of a group.
template <Format kFormat>
void quants_of_group(const uint8_t* panel, int64_t row, int64_t group, int32_t (&q)[kGroupSize],
                     Format format) {
  if constexpr (is_coded(kFormat)) {
    int8_t bytes[kGroupSize];
    CodedRow<kFormat>::quants(panel, row, group, bytes);
    for (int i = 0; i < kGroupSize; ++i) q[i] = bytes[i];
  } else {
    const QuantFormat quant = quant_format(format);
    for (int i = 0; i < kGroupSize; ++i) q[i] = quant_at(quant, panel, row, group * kGroupSize + i);
  }
}

}  // namespace
}  // namespace argosy
