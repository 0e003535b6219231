// transcode_nvfp4.h: transcodes the scales of NVFP4 (transcode.h has the contract).
//
//   scales   e4m3 [rows, cols / 16], in the layout of formats.h, with zeros for missing columns.
//   factor   float32 of the whole matrix: the scale of every row, times what products leave out. That is a
//            half, because the table of e2m1 is doubled, and 256 (weight_scale.h).
#pragma once

#include "kernels/half.h"
#include "kernels/transcode.h"
#include "kernels/transcode_panel.h"

namespace argosy {
namespace {

constexpr float kNvfp4RowScale = 128.0f;

inline void put_nvfp4_factor(const TranscodeArgs& a, int64_t panel_begin, int64_t panel_end, float factor) {
  float scales[kPanelRows];
  for (float& scale : scales) scale = factor * kNvfp4RowScale;
  for (int64_t i = 0; i < a.interleaved; ++i) {
    uint8_t* matrix = a.matrix + i * matrix_bytes(Format::nvfp4, a.rows, a.cols);
    for (int64_t index = panel_begin; index < panel_end; ++index) {
      std::memcpy(matrix + index * panel_bytes(Format::nvfp4, a.cols), scales, sizeof scales);
    }
  }
}

// Below 2^116, the largest weight, 448 * 6 * factor, is a float32. A matrix of zeros may have a factor of
// zero.
template <BlockType kType>
bool transcode_nvfp4_factor(const TranscodeArgs& a) {
  if (a.rows == 0 || a.cols == 0) return true;  // and no factor
  const float given = read_unaligned<float>(a.rows_data);
  constexpr bool kIsDivisor = kType == BlockType::nvfp4_divisor;
  const float factor = kIsDivisor                          ? 1.0f / given
                       : kType == BlockType::nvfp4_largest ? given / 2688.0f
                                                           : given;
  // An infinite divisor would make every weight zero.
  const bool is_usable = factor > -0x1p116f && factor < 0x1p116f && (!kIsDivisor || factor != 0.0f);
  put_nvfp4_factor(a, 0, (a.rows + kPanelRows - 1) / kPanelRows, is_usable ? factor : 0.0f);
  return is_usable;
}

template <bool kHasFactor>
bool transcode_nvfp4_scales(const TranscodeArgs& a) {
  constexpr QuantFormat kQuant = quant_format(Format::nvfp4);
  constexpr int64_t kInBlock = kQuant.block_cols / kQuant.sub_scale_cols;
  const int64_t scales = a.cols / kQuant.sub_scale_cols, blocks = num_blocks(Format::nvfp4, a.cols);
  bool has_nan = false;
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    const int64_t first_row = index * kPanelRows;
    for (int64_t i = 0; i < a.interleaved; ++i) {
      uint8_t* panel = a.matrix + i * matrix_bytes(Format::nvfp4, a.rows, a.cols) +
                       index * panel_bytes(Format::nvfp4, a.cols);
      for (int64_t b = 0; b < blocks; ++b) {
        std::memset(panel + kQuant.scales_at(b * kQuant.block_groups()), 0,
                    size_t(kQuant.block_scale_bytes()));
      }
      for (int64_t r = 0; r < kPanelRows && first_row + r < a.rows; ++r) {
        const int64_t row = (index - a.panel_begin) * kPanelRows + r;
        const uint8_t* from = a.rows_data + (row * a.interleaved + i) * scales;
        has_nan |= has_nan_code(from, scales);
        for (int64_t s = 0; s < scales; ++s) {
          panel[kQuant.scales_at(s / kInBlock * kQuant.block_groups()) + s % kInBlock * kPanelRows + r] =
              from[s];
        }
      }
    }
  }
  if constexpr (!kHasFactor) put_nvfp4_factor(a, a.panel_begin, a.panel_end, 1.0f);
  return !has_nan;
}

// GGUF's blocks without a factor.
inline bool transcode_nvfp4_alone(const TranscodeArgs& a) {
  put_nvfp4_factor(a, a.panel_begin, a.panel_end, 1.0f);
  return transcode_panels<BlockType::nvfp4_blocks>(a);
}

}  // namespace
}  // namespace argosy
