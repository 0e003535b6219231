// formats.h: how the weights of a matrix lie in memory.
//
//   f32, f16, bf16   row-major [rows, cols], no padding, any alignment.
//   q8, q4           32 columns of a row are a group and share one float16 scale; weight = scale * q.
//                    q8: q from -127 to 127.    q4: q from -8 to 7.
//
// A quantised matrix is a list of panels of 16 rows, rows padded with zeros to 16 and columns to 32. A panel
// holds all its quants, then all its scales (float16 [groups][16]), and is padded to 64 bytes:
//
//   q8 quants   group g, chunk c = 0..7: 64 bytes; byte 4 r + j = q[row r][32 g + 4 c + j] + 128.
//   q4 quants   group g, chunk c = 0..3: 64 bytes; byte 4 r + j = (q of column 32 g + 4 c + j) + 8 in the low
//   half,
//               (q of column 32 g + 4 (c + 4) + j) + 8 in the high half.
//
// So 64 bytes are four columns of sixteen rows: what one vpdpbusd multiplies with four broadcast activations.
#pragma once

#include <cstdint>

namespace argosy {

enum class Format : uint8_t { f32, f16, bf16, q8, q4 };

// Internal linkage throughout: this header is compiled under several instruction sets, and the linker must
// not pick one of the copies for all.
[[maybe_unused]] static constexpr int kNumFormats = 5;
[[maybe_unused]] static constexpr int64_t kGroupSize = 32;
[[maybe_unused]] static constexpr int64_t kPanelRows = 16;
[[maybe_unused]] static constexpr int64_t kChunkBytes = 64;  // four columns of a panel (q4: two times four)

static inline constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

static inline constexpr bool is_quantized(Format format) {
  return format == Format::q8 || format == Format::q4;
}

static inline constexpr int64_t num_groups(int64_t cols) { return round_up(cols, kGroupSize) / kGroupSize; }

// Of f32, f16, bf16.
static inline constexpr int64_t weight_bytes(Format format) { return format == Format::f32 ? 4 : 2; }

// Of the quants of one panel; the scales follow.
static inline constexpr int64_t quant_bytes(Format format, int64_t cols) {
  return num_groups(cols) * kChunkBytes * (format == Format::q8 ? 8 : 4);
}

static inline constexpr int64_t panel_bytes(Format format, int64_t cols) {
  return round_up(quant_bytes(format, cols) + num_groups(cols) * kPanelRows * 2, 64);
}

static inline constexpr int64_t matrix_bytes(Format format, int64_t rows, int64_t cols) {
  if (is_quantized(format)) return round_up(rows, kPanelRows) / kPanelRows * panel_bytes(format, cols);
  return rows * cols * weight_bytes(format);
}

// The quant of row 0 to 15 of a panel, as the number it stands for.
static inline int32_t quant_at(Format format, const uint8_t* panel, int64_t row, int64_t col) {
  const int64_t group = col / kGroupSize;
  const int64_t chunk = col % kGroupSize / 4;
  const int64_t byte = row * 4 + col % 4;
  if (format == Format::q8) return panel[(group * 8 + chunk) * kChunkBytes + byte] - 128;
  const uint8_t both = panel[(group * 4 + chunk % 4) * kChunkBytes + byte];
  return (chunk < 4 ? both & 0xF : both >> 4) - 8;
}

// One token's activations, quantised for products with q8 and q4 weights; 64-byte aligned, in this order:
//
//   int8  [groups * 32]   high: with low, x / (scale / 256) rounded to the nearest (even) = 256 * high + low
//   int8  [groups * 32]   low
//   float [groups]        scale = largest magnitude in the group / 127, for high alone (q4)
//   float [groups]        scale / 256, for both (q8)
//   int32 [groups]        -128 * sum of (256 * high + low): takes the offset of the q8 quants out of a dot
//                         product
//   int32 [groups]        -8 * sum of high: the same for q4
//
// Beside q4 weights, whose own rounding is sixteen times that of q8, 8 bits of an activation are plenty.
// Beside q8 weights they are not: the error of the activations would be three times that of the weights
// (docs/decisions/0006-sixteen-bit-activations-for-q8.md).
static inline constexpr int64_t activation_low_at(int64_t cols) { return num_groups(cols) * kGroupSize; }
static inline constexpr int64_t activation_scales_at(Format format, int64_t cols) {
  return num_groups(cols) * (2 * kGroupSize + (format == Format::q4 ? 0 : 4));
}
static inline constexpr int64_t activation_offsets_at(Format format, int64_t cols) {
  return num_groups(cols) * (2 * kGroupSize + (format == Format::q8 ? 8 : 12));
}
static inline constexpr int64_t activation_bytes(int64_t cols) {
  return round_up(num_groups(cols) * (2 * kGroupSize + 16), 64);
}

}  // namespace argosy
