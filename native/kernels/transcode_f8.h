// transcode_f8.h: transcodes the two tensors of an FP8 matrix (transcode.h has the contract).
//
//   codes    [rows, cols], copied to their rows.
//   scales   of any blocks that consist of whole blocks of the format, and repeated in each of these.
#pragma once

#include "kernels/half.h"
#include "kernels/transcode.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR

// Whether any of the n codes is NaN.
inline bool has_nan_code(const uint8_t* codes, int64_t n) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = (codes[i] & 0x7F) > largest ? codes[i] & 0x7F : largest;
  return largest == 0x7F;
}

#endif

template <Format kFormat>
bool transcode_f8_codes(const TranscodeArgs& a) {
  constexpr int64_t kInCache = 4096;  // bytes to copy and then check
  bool has_nan = false;
  const uint8_t* from = a.rows_data;
  for (int64_t row = a.panel_begin * kPanelRows; row < a.panel_end * kPanelRows && row < a.rows;
       row += kPanelRows) {
    // The rows of a panel are contiguous, because a stretch is whole panels.
    const int64_t nbytes =
        (a.rows - row < kPanelRows ? a.rows - row : kPanelRows) * f8_format(kFormat).row_code_bytes(a.cols);
    uint8_t* to = a.matrix + f8_row_at(kFormat, row, a.cols);
    for (int64_t at = 0; at < nbytes; at += kInCache) {
      const int64_t n = nbytes - at < kInCache ? nbytes - at : kInCache;
      std::memcpy(to + at, from + at, size_t(n));
      if constexpr (has_e4m3_codes(kFormat)) has_nan |= has_nan_code(from + at, n);
    }
    from += nbytes;
  }
  return !has_nan;
}

// The bits of a float32 scale.
template <ScaleType kScale>
uint32_t read_f8_scale(const uint8_t* from) {
  if constexpr (kScale == ScaleType::e8m0) {
    return bit_cast<uint32_t>(float_from_e8m0(*from));
  } else if constexpr (kScale == ScaleType::f16) {
    return bit_cast<uint32_t>(float_from_f16(read_unaligned<uint16_t>(from)));
  } else if constexpr (kScale == ScaleType::bf16) {
    return uint32_t(read_unaligned<uint16_t>(from)) << 16;
  } else if constexpr (kScale == ScaleType::largest) {
    return bit_cast<uint32_t>(read_unaligned<float>(from) * (1.0f / 127.0f));
  } else {
    return read_unaligned<uint32_t>(from);
  }
}

template <BlockType kType>
bool transcode_f8_scales(const TranscodeArgs& a) {
  constexpr BlockTypeEntry kEntry = entry_of(kType);
  constexpr F8Format kF8 = f8_format(kEntry.format);
  const BlockType type = kind_of(a.type) == kind_of(kType) ? a.type : kType;
  const int64_t scales = kF8.num_scales(a.cols);
  const int64_t copies = kF8.scale_cols == 0 ? 1 : block_cols(type) / kF8.scale_cols;
  const int64_t first_row = a.panel_begin * strip_rows(type);
  const int64_t end_row = a.panel_end * strip_rows(type) < a.rows ? a.panel_end * strip_rows(type) : a.rows;
  bool is_finite = true;
  for (int64_t row = first_row; row < end_row; row += kF8.scale_rows) {
    const uint8_t* from = a.rows_data + (row - first_row) / block_rows(type) * block_row_bytes(type, a.cols);
    uint8_t* to = a.matrix + f8_scales_at(kEntry.format, row, a.cols);
    for (int64_t begin = 0; begin < scales; begin += copies, from += kEntry.bytes) {
      const uint32_t bits = read_f8_scale<kEntry.scale>(from);
      // Below 2^119, the largest code, 448, times the scale is still a float32.
      is_finite = is_finite && (bits & 0x7FFFFFFFu) < 0x7B000000u;
      const int64_t end = scales - begin < copies ? scales : begin + copies;
      for (int64_t i = begin; i < end; ++i, to += kF8.scale_bytes) {
        if constexpr (kF8.scale_bytes == 1) {
          *to = *from;
        } else {
          std::memcpy(to, &bits, 4);
        }
      }
    }
    const int64_t next = row + kF8.scale_rows;
    if (next % kF8.stretch_rows == 0 || next >= a.rows) {  // the last scales of a stretch
      const uint8_t* codes =
          a.matrix + f8_stretch_at(kEntry.format, row, a.cols) + f8_scales_bytes(kEntry.format, a.cols);
      std::memset(to, 0, size_t(codes - to));
    }
  }
  return is_finite;
}

}  // namespace
}  // namespace argosy
