// transcode_f8.h: transcodes the two tensors of an FP8 matrix to f8 (transcode.h has the contract).
//
//   codes    [rows, cols], copied to their rows.
//   scales   [rows / 128, cols / 128] rounded up, float32 or bfloat16, stored as float32 before their rows.
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

bool transcode_f8_codes(const TranscodeArgs& a) {
  constexpr int64_t kInCache = 4096;  // bytes to copy and then check
  bool has_nan = false;
  const uint8_t* from = a.rows_data;
  for (int64_t row = a.panel_begin * kPanelRows; row < a.panel_end * kPanelRows && row < a.rows;
       row += kPanelRows) {
    // The rows of a panel are contiguous, because 128 is a multiple of 16.
    const int64_t nbytes = (a.rows - row < kPanelRows ? a.rows - row : kPanelRows) * a.cols;
    uint8_t* to = a.matrix + f8_row_at(row, a.cols);
    for (int64_t at = 0; at < nbytes; at += kInCache) {
      const int64_t n = nbytes - at < kInCache ? nbytes - at : kInCache;
      std::memcpy(to + at, from + at, size_t(n));
      has_nan |= has_nan_code(from + at, n);
    }
    from += nbytes;
  }
  return !has_nan;
}

template <BlockType kType>
bool transcode_f8_scales(const TranscodeArgs& a) {
  const int64_t scales = round_up(a.cols, kF8Block) / kF8Block;
  bool is_finite = true;
  const uint8_t* from = a.rows_data;
  for (int64_t row = a.panel_begin * kF8Block; row < a.panel_end * kF8Block && row < a.rows;
       row += kF8Block) {
    uint8_t* to = a.matrix + f8_scales_at(row, a.cols);
    for (int64_t i = 0; i < scales; ++i, from += kType == BlockType::f8_scales ? 4 : 2) {
      const uint32_t bits = kType == BlockType::f8_scales ? read_unaligned<uint32_t>(from)
                                                          : uint32_t(read_unaligned<uint16_t>(from)) << 16;
      // Below 2^119, the largest code, 448, times the scale is still a float32.
      is_finite = is_finite && (bits & 0x7FFFFFFFu) < 0x7B000000u;
      std::memcpy(to + 4 * i, &bits, 4);
    }
    std::memset(to + 4 * scales, 0, size_t(f8_scales_bytes(a.cols) - 4 * scales));
  }
  return is_finite;
}

}  // namespace
}  // namespace argosy
