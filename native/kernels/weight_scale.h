// weight_scale.h: the factors of a single quant, one row and column at a time.
#pragma once

#include "kernels/formats.h"
#include "kernels/half.h"

namespace argosy {
namespace {

// The factors of one column of one row: weight = scale * q + min.
struct WeightScale {
  float scale, min;
};

inline WeightScale weight_scale_at(Format format, const uint8_t* panel, int64_t row, int64_t col) {
  const QuantFormat q = quant_format(format);
  const int64_t inside = col % q.block_cols;
  const uint8_t* scales = panel + q.scales_at(col / kGroupSize);
  const uint16_t bits = read_unaligned<uint16_t>(scales + row * 2);
  const float scale = q.is_bf16 ? float_from_bf16(bits) : float_from_f16(bits);
  const float min =
      q.has_min ? float_from_f16(read_unaligned<uint16_t>(scales + (kPanelRows + row) * 2)) : 0.0f;
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

}  // namespace
}  // namespace argosy
