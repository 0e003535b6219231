// transcode_panel.h: sixteen rows of GGUF blocks to one panel (transcode.h has the contract).
//
// One version for every instruction set: four words of four rows are transposed in registers, so that a
// vector holds one word of each row; the rest is and, or and shift. A row that the matrix does not have is
// read as zeros.
#pragma once

#include "kernels/half.h"
#include "kernels/kernel_table.h"

namespace argosy {
namespace {

constexpr int64_t kRowsAtOnce = 4;
using RowWords = uint32_t __attribute__((vector_size(16)));  // one word of each of the four rows
constexpr uint32_t kLowNibbles = 0x0F0F0F0F;

// Four rows of one block, and where they lie in the panel.
struct BlockRows {
  const uint8_t* row[kRowsAtOnce];
  int64_t first;  // of the panel's sixteen

  // words[i] = bytes at + 4 i to at + 4 i + 3 of every row.
  template <int kWords>
  void load(int64_t at, RowWords (&words)[kWords]) const {
    static_assert(kWords % 4 == 0);
    for (int i = 0; i < kWords; i += 4) {
      RowWords of[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; ++r) std::memcpy(&of[r], row[r] + at + 4 * i, 16);
      const RowWords low_01 = __builtin_shufflevector(of[0], of[1], 0, 4, 1, 5);
      const RowWords low_23 = __builtin_shufflevector(of[2], of[3], 0, 4, 1, 5);
      const RowWords high_01 = __builtin_shufflevector(of[0], of[1], 2, 6, 3, 7);
      const RowWords high_23 = __builtin_shufflevector(of[2], of[3], 2, 6, 3, 7);
      words[i] = __builtin_shufflevector(low_01, low_23, 0, 1, 4, 5);
      words[i + 1] = __builtin_shufflevector(low_01, low_23, 2, 3, 6, 7);
      words[i + 2] = __builtin_shufflevector(high_01, high_23, 0, 1, 4, 5);
      words[i + 3] = __builtin_shufflevector(high_01, high_23, 2, 3, 6, 7);
    }
  }

  void load_one(int64_t at, RowWords& words) const {
    for (int r = 0; r < kRowsAtOnce; ++r) words[r] = read_unaligned<uint32_t>(row[r] + at);
  }

  // Into 64 bytes that hold a word of every row of the panel.
  void store(uint8_t* chunk, const RowWords& words) const { std::memcpy(chunk + 4 * first, &words, 16); }

  // chunk[i * 16 + r] = byte i of the word of row r.
  void store_bytes(uint8_t* chunk, const RowWords& words) const {
    using Bytes = uint8_t __attribute__((vector_size(16)));
    const Bytes bytes = Bytes(words);
    const Bytes by_byte =
        __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const RowWords columns = RowWords(by_byte);
    for (int i = 0; i < 4; ++i) {
      const uint32_t column = columns[i];
      std::memcpy(chunk + i * kPanelRows + first, &column, 4);
    }
  }

  // The float16 at `at` of every row, its sign flipped by 0x8000.
  void copy_halves(int64_t at, uint8_t* halves, uint16_t flip = 0) const {
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      const uint16_t half = read_unaligned<uint16_t>(row[r] + at) ^ flip;
      std::memcpy(halves + 2 * (first + r), &half, 2);
    }
  }
};

// Swaps the bits of `a` under `mask << shift` with the bits of `b` under `mask`.
inline void swap_bits(RowWords& a, RowWords& b, int shift, uint32_t mask) {
  const RowWords differ = ((a >> shift) ^ b) & mask;
  b ^= differ;
  a ^= differ << shift;
}

// Moves bits within a word: swaps those under `mask` with those under `mask << shift`.
inline void swap_bits(RowWords& a, int shift, uint32_t mask) {
  const RowWords differ = ((a >> shift) ^ a) & mask;
  a ^= differ ^ (differ << shift);
}

template <BlockType kType>
void transcode_block(const BlockRows& rows, uint8_t* quants, uint8_t* scales);

template <>
void transcode_block<BlockType::q8_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  RowWords words[8];
  rows.load(2, words);
  for (int c = 0; c < 8; ++c) rows.store(quants + c * kChunkBytes, words[c] ^ 0x80808080u);
  rows.copy_halves(0, scales);
}

// 16 bytes whose low halves are columns 0 to 15 of a group and whose high halves are 16 to 31: as in a panel.
inline void transcode_nibbles(const BlockRows& rows, int64_t at, uint8_t* group) {
  RowWords nibbles[4];
  rows.load(at, nibbles);
  for (int c = 0; c < 4; ++c) rows.store(group + c * kChunkBytes, nibbles[c]);
}

template <>
void transcode_block<BlockType::q4_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 2, quants);
  rows.copy_halves(0, scales);
}

template <>
void transcode_block<BlockType::q4_1>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 4, quants);
  rows.copy_halves(0, scales);
  rows.copy_halves(2, scales + kPanelRows * 2);
}

template <>
void transcode_block<BlockType::q5_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 6, quants);
  rows.copy_halves(0, scales);
  // Bit 4 c + j of the word, c from 0 to 7, goes to bit 8 j + c.
  RowWords bits;
  rows.load_one(2, bits);
  swap_bits(bits, 1, 0x22222222);
  swap_bits(bits, 3, 0x0A0A0A0A);
  swap_bits(bits, 6, 0x00CC00CC);
  swap_bits(bits, 12, 0x0000F0F0);
  rows.store(quants + 4 * kChunkBytes, bits);
}

// Two groups whose quants are the low and the high halves of words[0] to words[7].
inline void store_two_groups(const BlockRows& rows, const RowWords* words, uint8_t* low_group,
                             uint8_t* high_group) {
  for (int c = 0; c < 4; ++c) {
    const RowWords& first = words[c];
    const RowWords& second = words[c + 4];
    rows.store(low_group + c * kChunkBytes, (first & kLowNibbles) | ((second & kLowNibbles) << 4));
    rows.store(high_group + c * kChunkBytes, ((first >> 4) & kLowNibbles) | (second & ~kLowNibbles));
  }
}

// d, dmin and eight pairs of 6-bit sub-scales and sub-mins in 12 bytes: those of groups 0 to 3 in the low six
// bits of bytes 0 to 7; those of groups 4 to 7 have their low four bits in bytes 8 to 11 and the highest two
// in the top of bytes 0 to 7.
template <Format kFormat>
inline void transcode_k_scales(const BlockRows& rows, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  rows.copy_halves(0, scales);
  rows.copy_halves(2, scales + kPanelRows * 2, 0x8000);  // these blocks subtract what they call dmin
  RowWords packed[4];                                    // and the block's first quants
  rows.load(4, packed);
  uint8_t* sub_scales = scales + kQuant.sub_scales_at();
  uint8_t* sub_mins = scales + kQuant.sub_mins_at();
  rows.store_bytes(sub_scales, packed[0] & 0x3F3F3F3Fu);
  rows.store_bytes(sub_scales + 4 * kPanelRows, (packed[2] & kLowNibbles) | ((packed[0] >> 2) & 0x30303030u));
  rows.store_bytes(sub_mins, packed[1] & 0x3F3F3F3Fu);
  rows.store_bytes(sub_mins + 4 * kPanelRows,
                   ((packed[2] >> 4) & kLowNibbles) | ((packed[1] >> 2) & 0x30303030u));
}

template <>
void transcode_block<BlockType::q4_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr int64_t kGroupBytes = quant_format(Format::q4_k).group_bytes();
  transcode_k_scales<Format::q4_k>(rows, scales);
  for (int64_t pair = 0; pair < 4; ++pair) {
    RowWords words[8];
    rows.load(16 + 32 * pair, words);
    store_two_groups(rows, words, quants + 2 * pair * kGroupBytes, quants + (2 * pair + 1) * kGroupBytes);
  }
}

template <>
void transcode_block<BlockType::q5_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr int64_t kGroupBytes = quant_format(Format::q5_k).group_bytes();
  transcode_k_scales<Format::q5_k>(rows, scales);
  for (int64_t pair = 0; pair < 4; ++pair) {
    RowWords words[8];
    rows.load(48 + 32 * pair, words);
    store_two_groups(rows, words, quants + 2 * pair * kGroupBytes, quants + (2 * pair + 1) * kGroupBytes);
  }
  // Bit g of a byte of word c belongs to group g: to bit c of the byte in group g's plane.
  RowWords high[8];
  rows.load(16, high);
  for (int i = 0; i < 4; ++i) swap_bits(high[i], high[i + 4], 4, 0x0F0F0F0F);
  for (int i = 0; i < 8; i += i % 2 == 0 ? 1 : 3) swap_bits(high[i], high[i + 2], 2, 0x33333333);
  for (int i = 0; i < 8; i += 2) swap_bits(high[i], high[i + 1], 1, 0x55555555);
  for (int g = 0; g < 8; ++g) rows.store(quants + g * kGroupBytes + 4 * kChunkBytes, high[g]);
}

template <>
void transcode_block<BlockType::q6_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::q6_k);
  constexpr int64_t kGroupBytes = kQuant.group_bytes();
  for (int64_t half = 0; half < 2; ++half) {  // of 128 columns
    uint8_t* groups = quants + 4 * half * kGroupBytes;
    for (int64_t i = 0; i < 2; ++i) {
      RowWords words[8];
      rows.load(64 * half + 32 * i, words);
      store_two_groups(rows, words, groups + i * kGroupBytes, groups + (i + 2) * kGroupBytes);
    }
    // Two bits of a byte of word c, at bit 2 g, belong to group g: to bits 2 (c % 4) of its plane c / 4.
    for (int64_t plane = 0; plane < 2; ++plane) {
      RowWords high[4];
      rows.load(128 + 32 * half + 16 * plane, high);
      swap_bits(high[0], high[2], 4, 0x0F0F0F0F);
      swap_bits(high[1], high[3], 4, 0x0F0F0F0F);
      swap_bits(high[0], high[1], 2, 0x33333333);
      swap_bits(high[2], high[3], 2, 0x33333333);
      for (int g = 0; g < 4; ++g) {
        rows.store(groups + g * kGroupBytes + (4 + plane) * kChunkBytes, high[g]);
      }
    }
  }
  RowWords sub_scales[4];
  rows.load(192, sub_scales);
  for (int i = 0; i < 4; ++i) {
    rows.store_bytes(scales + kQuant.sub_scales_at() + i * 4 * kPanelRows, sub_scales[i]);
  }
  rows.copy_halves(208, scales);
}

template <BlockType kType>
bool transcode_panels(const TranscodeArgs& a) {
  constexpr Format kFormat = slot_format(kType);
  constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr uint8_t kNoRow[block_bytes(kType)] = {};
  const int64_t row_bytes = block_row_bytes(kType, a.cols);
  const int64_t blocks = num_blocks(kFormat, a.cols);
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    const uint8_t* from = a.rows_data + (index - a.panel_begin) * kPanelRows * row_bytes;
    const int64_t present = a.rows - index * kPanelRows;
    uint8_t* panel = a.matrix + index * panel_bytes(kFormat, a.cols);
    uint8_t* scales = panel + scales_at(kFormat, a.cols);
    for (int64_t b = 0; b < blocks; ++b) {
      // Sixteen short streams are more than the hardware foresees; the next panel's rows are one piece.
      if (index + 1 < a.panel_end) {
        const uint8_t* next = from + kPanelRows * (row_bytes + b * block_bytes(kType));
        for (int64_t at = 0; at < kPanelRows * block_bytes(kType); at += 64)
          __builtin_prefetch(next + at, 0, 2);
      }
      for (int64_t first = 0; first < kPanelRows; first += kRowsAtOnce) {
        BlockRows rows = {{}, first};
        for (int64_t r = 0; r < kRowsAtOnce; ++r) {
          const bool is_row = first + r < present;
          rows.row[r] = is_row ? from + (first + r) * row_bytes + b * block_bytes(kType) : kNoRow;
        }
        transcode_block<kType>(rows, panel + b * kQuant.block_quant_bytes(),
                               scales + b * kQuant.block_scale_bytes());
      }
    }
    uint8_t* end = scales + blocks * kQuant.block_scale_bytes();
    std::memset(end, 0, size_t(panel + panel_bytes(kFormat, a.cols) - end));
  }
  return true;
}

}  // namespace
}  // namespace argosy
