// transcode_panel.h: sixteen rows of GGUF blocks to one panel (transcode.h has the contract).
//
// One version for every instruction set: the words of sixteen rows lie side by side in a vector, and the rest
// is and, or and shift, which the compiler writes in whatever registers there are. A row that the matrix does
// not have is read as zeros.
#pragma once

#include "kernels/half.h"
#include "kernels/kernel_table.h"

namespace argosy {
namespace {

using RowWords = uint32_t __attribute__((vector_size(64)));  // one word of each row
constexpr uint32_t kLowNibbles = 0x0F0F0F0F;

struct PanelRows {
  const uint8_t* row[kPanelRows];

  uint16_t half(int64_t r, int64_t at) const { return read_unaligned<uint16_t>(row[r] + at); }
};

// words[i] = bytes at + 4 i to at + 4 i + 3 of every row.
template <int kWords>
inline void load_words(const PanelRows& rows, int64_t at, RowWords (&words)[kWords]) {
  auto* to = reinterpret_cast<uint8_t*>(words);
  for (int64_t r = 0; r < kPanelRows; ++r) {
    for (int64_t i = 0; i < kWords; ++i)
      std::memcpy(to + (i * kPanelRows + r) * 4, rows.row[r] + at + 4 * i, 4);
  }
}

inline void store_words(uint8_t* to, const RowWords& words) { std::memcpy(to, &words, sizeof words); }

// to[i * 16 + r] = byte i of row r.
inline void store_bytes(uint8_t* to, const RowWords& words) {
  for (int64_t r = 0; r < kPanelRows; ++r) {
    for (int i = 0; i < 4; ++i) to[i * kPanelRows + r] = uint8_t(words[r] >> (8 * i));
  }
}

inline void store_halves(uint8_t* to, const PanelRows& rows, int64_t at) {
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const uint16_t half = rows.half(r, at);
    std::memcpy(to + 2 * r, &half, 2);
  }
}

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
void transcode_block(const PanelRows& rows, uint8_t* block, uint8_t* scales);

template <>
void transcode_block<BlockType::q8_0>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  RowWords quants[8];
  load_words(rows, 2, quants);
  for (int c = 0; c < 8; ++c) store_words(block + c * kChunkBytes, quants[c] ^ 0x80808080u);
  store_halves(scales, rows, 0);
}

// 16 bytes whose low halves are columns 0 to 15 of a group and whose high halves are 16 to 31: as in a panel.
inline void transcode_nibbles(const PanelRows& rows, int64_t at, uint8_t* group) {
  RowWords nibbles[4];
  load_words(rows, at, nibbles);
  for (int c = 0; c < 4; ++c) store_words(group + c * kChunkBytes, nibbles[c]);
}

template <>
void transcode_block<BlockType::q4_0>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  transcode_nibbles(rows, 2, block);
  store_halves(scales, rows, 0);
}

template <>
void transcode_block<BlockType::q4_1>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  transcode_nibbles(rows, 4, block);
  store_halves(scales, rows, 0);
  store_halves(scales + kPanelRows * 2, rows, 2);
}

template <>
void transcode_block<BlockType::q5_0>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  transcode_nibbles(rows, 6, block);
  store_halves(scales, rows, 0);
  // Bit 4 c + j of the word, c from 0 to 7, goes to bit 8 j + c.
  RowWords high[1];
  load_words(rows, 2, high);
  RowWords& bits = high[0];
  swap_bits(bits, 1, 0x22222222);
  swap_bits(bits, 3, 0x0A0A0A0A);
  swap_bits(bits, 6, 0x00CC00CC);
  swap_bits(bits, 12, 0x0000F0F0);
  store_words(block + 4 * kChunkBytes, bits);
}

// Two groups whose quants are the low and the high halves of words[0] to words[7].
inline void store_two_groups(const RowWords* words, uint8_t* low_group, uint8_t* high_group) {
  for (int c = 0; c < 4; ++c) {
    const RowWords& first = words[c];
    const RowWords& second = words[c + 4];
    store_words(low_group + c * kChunkBytes, (first & kLowNibbles) | ((second & kLowNibbles) << 4));
    store_words(high_group + c * kChunkBytes, ((first >> 4) & kLowNibbles) | (second & ~kLowNibbles));
  }
}

// d, dmin and eight pairs of 6-bit sub-scales and sub-mins in 12 bytes: those of groups 0 to 3 in the low six
// bits of bytes 0 to 7; those of groups 4 to 7 have their low four bits in bytes 8 to 11 and the highest two
// in the top of bytes 0 to 7.
template <Format kFormat>
inline void transcode_k_scales(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  store_halves(scales, rows, 0);
  store_halves(scales + kPanelRows * 2, rows, 2);
  RowWords packed[3];
  load_words(rows, 4, packed);
  uint8_t* sub_scales = block + kQuant.sub_scales_at();
  uint8_t* sub_mins = block + kQuant.sub_mins_at();
  store_bytes(sub_scales, packed[0] & 0x3F3F3F3Fu);
  store_bytes(sub_scales + 4 * kPanelRows, (packed[2] & kLowNibbles) | ((packed[0] >> 2) & 0x30303030u));
  store_bytes(sub_mins, packed[1] & 0x3F3F3F3Fu);
  store_bytes(sub_mins + 4 * kPanelRows, ((packed[2] >> 4) & kLowNibbles) | ((packed[1] >> 2) & 0x30303030u));
}

template <>
void transcode_block<BlockType::q4_k>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  constexpr int64_t kGroupBytes = quant_format(Format::q4_k).group_bytes();
  transcode_k_scales<Format::q4_k>(rows, block, scales);
  for (int64_t pair = 0; pair < 4; ++pair) {
    RowWords words[8];
    load_words(rows, 16 + 32 * pair, words);
    store_two_groups(words, block + 2 * pair * kGroupBytes, block + (2 * pair + 1) * kGroupBytes);
  }
}

template <>
void transcode_block<BlockType::q5_k>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  constexpr int64_t kGroupBytes = quant_format(Format::q5_k).group_bytes();
  transcode_k_scales<Format::q5_k>(rows, block, scales);
  for (int64_t pair = 0; pair < 4; ++pair) {
    RowWords words[8];
    load_words(rows, 48 + 32 * pair, words);
    store_two_groups(words, block + 2 * pair * kGroupBytes, block + (2 * pair + 1) * kGroupBytes);
  }
  // Bit g of a byte of word c belongs to group g: to bit c of the byte in group g's plane.
  RowWords high[8];
  load_words(rows, 16, high);
  for (int i = 0; i < 4; ++i) swap_bits(high[i], high[i + 4], 4, 0x0F0F0F0F);
  for (int i = 0; i < 8; i += i % 2 == 0 ? 1 : 3) swap_bits(high[i], high[i + 2], 2, 0x33333333);
  for (int i = 0; i < 8; i += 2) swap_bits(high[i], high[i + 1], 1, 0x55555555);
  for (int g = 0; g < 8; ++g) store_words(block + g * kGroupBytes + 4 * kChunkBytes, high[g]);
}

template <>
void transcode_block<BlockType::q6_k>(const PanelRows& rows, uint8_t* block, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::q6_k);
  constexpr int64_t kGroupBytes = kQuant.group_bytes();
  for (int64_t half = 0; half < 2; ++half) {  // of 128 columns
    uint8_t* groups = block + 4 * half * kGroupBytes;
    for (int64_t i = 0; i < 2; ++i) {
      RowWords words[8];
      load_words(rows, 64 * half + 32 * i, words);
      store_two_groups(words, groups + i * kGroupBytes, groups + (i + 2) * kGroupBytes);
    }
    // Two bits of a byte of word c, at bit 2 g, belong to group g: to bits 2 (c % 4) of its plane c / 4.
    for (int64_t plane = 0; plane < 2; ++plane) {
      RowWords high[4];
      load_words(rows, 128 + 32 * half + 16 * plane, high);
      swap_bits(high[0], high[2], 4, 0x0F0F0F0F);
      swap_bits(high[1], high[3], 4, 0x0F0F0F0F);
      swap_bits(high[0], high[1], 2, 0x33333333);
      swap_bits(high[2], high[3], 2, 0x33333333);
      for (int g = 0; g < 4; ++g) {
        store_words(groups + g * kGroupBytes + (4 + plane) * kChunkBytes, high[g]);
      }
    }
  }
  RowWords sub_scales[4];
  load_words(rows, 192, sub_scales);
  for (int i = 0; i < 4; ++i) {
    store_bytes(block + kQuant.sub_scales_at() + i * 4 * kPanelRows, sub_scales[i]);
  }
  store_halves(scales, rows, 208);
}

template <BlockType kType>
void transcode_panels(const TranscodeArgs& a) {
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
      PanelRows rows;
      for (int64_t r = 0; r < kPanelRows; ++r) {
        rows.row[r] = r < present ? from + r * row_bytes + b * block_bytes(kType) : kNoRow;
      }
      transcode_block<kType>(rows, panel + b * kQuant.block_bytes(), scales + b * kQuant.scale_bytes());
    }
    uint8_t* end = scales + blocks * kQuant.scale_bytes();
    std::memset(end, 0, size_t(panel + panel_bytes(kFormat, a.cols) - end));
  }
}

}  // namespace
}  // namespace argosy
