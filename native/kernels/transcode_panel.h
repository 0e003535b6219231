// transcode_panel.h: transcodes sixteen rows of blocks to one panel (transcode.h has the contract).
//
// One version for all instruction sets: four words of four rows are transposed in registers, so that a vector
// holds one word of each row; the rest is and, or and shift. Rows beyond the end of the matrix are read as
// zeros.
#pragma once

#include "kernels/coded_block.h"
#include "kernels/half.h"
#include "kernels/transcode.h"

namespace argosy {
namespace {

constexpr int64_t kRowsAtOnce = 4;
using RowWords = uint32_t __attribute__((vector_size(16)));  // one word of each of the four rows
constexpr uint32_t kLowNibbles = 0x0F0F0F0F;

// Four rows of one block, and their place in the panel.
struct BlockRows {
  const uint8_t* row[kRowsAtOnce];
  int64_t first;  // the first of these rows, among the panel's sixteen

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
    words = RowWords{read_unaligned<uint32_t>(row[0] + at), read_unaligned<uint32_t>(row[1] + at),
                     read_unaligned<uint32_t>(row[2] + at), read_unaligned<uint32_t>(row[3] + at)};
  }

  // Stores into 64 bytes that hold one word of every row of the panel.
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

  // chunk[(i / 2 * 16 + r) * 2 + i % 2] = byte i of the word of row r.
  void store_byte_pairs(uint8_t* chunk, const RowWords& words) const {
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      const uint16_t pairs[2] = {uint16_t(words[r]), uint16_t(words[r] >> 16)};
      std::memcpy(chunk + 2 * (first + r), &pairs[0], 2);
      std::memcpy(chunk + 2 * (kPanelRows + first + r), &pairs[1], 2);
    }
  }

  // Copies the float16 at `at` of every row; a `flip` of 0x8000 changes its sign.
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

// Of formats that keep the bytes of their blocks (coded_block.h); the others are specialised.
template <BlockType kType>
void transcode_block(const BlockRows& rows, uint8_t*, uint8_t* block) {
  static_assert(keeps_blocks(slot_format(kType)));
  constexpr int64_t kBytes = block_bytes(kType), kBeforeWords = kBytes % 4;
  if constexpr (kBeforeWords > 0) rows.copy_halves(0, block);
  uint8_t* words = block + kBeforeWords * kPanelRows;
  for (int64_t i = 0; i < kBytes / 4; ++i) {
    RowWords word;
    rows.load_one(kBeforeWords + 4 * i, word);
    rows.store(words + i * kChunkBytes, word);
  }
}

template <>
void transcode_block<BlockType::q8_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  RowWords words[8];
  rows.load(2, words);
  for (int c = 0; c < 8; ++c) rows.store(quants + c * kChunkBytes, words[c] ^ 0x80808080u);
  rows.copy_halves(0, scales);
}

// 16 bytes whose low halves are columns 0 to 15 of a group and whose high halves are 16 to 31, as in a panel.
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

// A word with the highest of five bits of columns 0 to 31, from the lowest bit on, as in a panel.
inline void transcode_fifth_bits(const BlockRows& rows, int64_t at, uint8_t* plane) {
  // Bit 4 c + j of the word, c from 0 to 7, goes to bit 8 j + c.
  RowWords bits;
  rows.load_one(at, bits);
  swap_bits(bits, 1, 0x22222222);
  swap_bits(bits, 3, 0x0A0A0A0A);
  swap_bits(bits, 6, 0x00CC00CC);
  swap_bits(bits, 12, 0x0000F0F0);
  rows.store(plane, bits);
}

template <>
void transcode_block<BlockType::q5_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 6, quants + kChunkBytes);
  transcode_fifth_bits(rows, 2, quants);
  rows.copy_halves(0, scales);
}

template <>
void transcode_block<BlockType::q5_1>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 8, quants + kChunkBytes);
  transcode_fifth_bits(rows, 4, quants);
  rows.copy_halves(0, scales);
  rows.copy_halves(2, scales + kPanelRows * 2);
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

// d, dmin and eight pairs of 6-bit sub-scales and sub-mins in 12 bytes: those of groups 0 to 3 are the low
// six bits of bytes 0 to 7; those of groups 4 to 7 have their low four bits in bytes 8 to 11 and their two
// highest bits in the top of bytes 0 to 7.
template <Format kFormat>
inline void transcode_k_scales(const BlockRows& rows, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  rows.copy_halves(0, scales);
  rows.copy_halves(2, scales + kPanelRows * 2, 0x8000);  // these blocks subtract dmin
  RowWords packed[4];                                    // also loads the block's first quants
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

// Moves bit g of a byte of word c, for c = 0 to 7, to bit c of the byte in word g.
inline void transpose_bits(RowWords (&words)[8]) {
  for (int i = 0; i < 4; ++i) swap_bits(words[i], words[i + 4], 4, 0x0F0F0F0F);
  for (int i = 0; i < 8; i += i % 2 == 0 ? 1 : 3) swap_bits(words[i], words[i + 2], 2, 0x33333333);
  for (int i = 0; i < 8; i += 2) swap_bits(words[i], words[i + 1], 1, 0x55555555);
}

// Moves bits 2 g and 2 g + 1 of a byte of word c, for c = 0 to 3, to bits 2 c and 2 c + 1 of the byte in word
// g.
inline void transpose_pairs(RowWords (&words)[4]) {
  swap_bits(words[0], words[2], 4, 0x0F0F0F0F);
  swap_bits(words[1], words[3], 4, 0x0F0F0F0F);
  swap_bits(words[0], words[1], 2, 0x33333333);
  swap_bits(words[2], words[3], 2, 0x33333333);
}

template <>
void transcode_block<BlockType::q5_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::q5_k);
  constexpr int64_t kGroupBytes = kQuant.group_bytes();
  transcode_k_scales<Format::q5_k>(rows, scales);
  for (int64_t pair = 0; pair < 4; ++pair) {
    RowWords words[8];
    rows.load(48 + 32 * pair, words);
    uint8_t* low = quants + 2 * pair * kGroupBytes + kQuant.low_at();
    store_two_groups(rows, words, low, low + kGroupBytes);
  }
  RowWords high[8];  // bit g of a byte belongs to group g
  rows.load(16, high);
  transpose_bits(high);
  for (int g = 0; g < 8; ++g) rows.store(quants + g * kGroupBytes, high[g]);
}

// 32 bytes with two bits of each of four groups: those of group g at bits 2 g and 2 g + 1. `planes` is the
// destination of the first group.
inline void store_pair_planes(const BlockRows& rows, int64_t at, uint8_t* planes, int64_t group_bytes) {
  for (int64_t plane = 0; plane < 2; ++plane) {
    RowWords pairs[4];
    rows.load(at + 16 * plane, pairs);
    transpose_pairs(pairs);
    for (int g = 0; g < 4; ++g) rows.store(planes + g * group_bytes + plane * kChunkBytes, pairs[g]);
  }
}

template <>
void transcode_block<BlockType::q6_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::q6_k);
  constexpr int64_t kGroupBytes = kQuant.group_bytes();
  for (int64_t half = 0; half < 2; ++half) {  // halves of 128 columns
    uint8_t* groups = quants + 4 * half * kGroupBytes;
    for (int64_t i = 0; i < 2; ++i) {
      RowWords words[8];
      rows.load(64 * half + 32 * i, words);
      uint8_t* low = groups + i * kGroupBytes + kQuant.low_at();
      store_two_groups(rows, words, low, low + 2 * kGroupBytes);
    }
    store_pair_planes(rows, 128 + 32 * half, groups, kGroupBytes);
  }
  RowWords sub_scales[4];
  rows.load(192, sub_scales);
  for (int i = 0; i < 4; ++i) {
    rows.store_bytes(scales + kQuant.sub_scales_at() + i * 4 * kPanelRows, sub_scales[i]);
  }
  rows.copy_halves(208, scales);
}

template <>
void transcode_block<BlockType::q2_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::q2_k);
  for (int64_t half = 0; half < 2; ++half) {
    store_pair_planes(rows, 16 + 32 * half, quants + 4 * half * kQuant.group_bytes(), kQuant.group_bytes());
  }
  RowWords sub_scales[4];
  rows.load(0, sub_scales);
  for (int i = 0; i < 4; ++i) {
    rows.store_byte_pairs(scales + kQuant.sub_scales_at() + i * 4 * kPanelRows, sub_scales[i]);
  }
  rows.copy_halves(80, scales);
  rows.copy_halves(82, scales + kPanelRows * 2, 0x8000);  // these blocks subtract dmin
}

// Six-bit values in bytes, minus 32.
inline RowWords signed_six_bits(const RowWords& bytes) {
  const RowWords number = bytes ^ 0x20202020u;
  const RowWords sign = number & 0x20202020u;
  return number | (sign << 1) | (sign << 2);
}

template <>
void transcode_block<BlockType::q3_k>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::q3_k);
  constexpr int64_t kGroupBytes = kQuant.group_bytes();
  for (int64_t half = 0; half < 2; ++half) {
    store_pair_planes(rows, 32 + 32 * half, quants + 4 * half * kGroupBytes + kQuant.low_at(), kGroupBytes);
  }
  RowWords high[8];  // bit g of a byte belongs to group g
  rows.load(0, high);
  transpose_bits(high);
  for (int g = 0; g < 8; ++g) rows.store(quants + g * kGroupBytes, high[g]);
  // Sixteen 6-bit sub-scales: their low four bits in the halves of eight bytes, their two highest bits in
  // four bytes.
  RowWords packed[4];
  rows.load(92, packed);  // also loads the last quants: the block ends right after the sub-scales
  uint8_t* sub_scales = scales + kQuant.sub_scales_at();
  for (int i = 0; i < 4; ++i) {
    const RowWords low = (packed[1 + i % 2] >> (i / 2 * 4)) & kLowNibbles;
    const RowWords top = ((packed[3] >> (2 * i)) & 0x03030303u) << 4;
    rows.store_byte_pairs(sub_scales + i * 4 * kPanelRows, signed_six_bits(low | top));
  }
  rows.copy_halves(108, scales);
}

template <>
void transcode_block<BlockType::iq4_nl>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 2, quants);
  rows.copy_halves(0, scales);
}

// Spreads the lowest four nibbles of each word to one byte each.
inline RowWords spread_nibbles(const RowWords& words) {
  const RowWords pairs = ((words & 0xFFFFu) | (words << 8)) & 0x00FF00FFu;
  return (pairs | (pairs << 4)) & kLowNibbles;
}

template <>
void transcode_block<BlockType::iq4_xs>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr QuantFormat kQuant = quant_format(Format::iq4_xs);
  for (int64_t g = 0; g < 8; ++g) transcode_nibbles(rows, 8 + 16 * g, quants + g * kQuant.group_bytes());
  rows.copy_halves(0, scales);
  // Eight 6-bit sub-scales: their two highest bits in a word of 16 bits, their low four bits in a word of 32.
  RowWords top, low;
  rows.load_one(2, top);
  rows.load_one(4, low);
  for (int i = 0; i < 2; ++i) {
    const RowWords eight = (top >> (8 * i)) & 0xFFu;
    const RowWords four = (eight | (eight << 12)) & 0x000F000Fu;
    const RowWords pairs = (four | (four << 6)) & 0x03030303u;
    const RowWords bytes = spread_nibbles(low >> (16 * i)) | (pairs << 4);
    rows.store_bytes(scales + kQuant.sub_scales_at() + i * 4 * kPanelRows, signed_six_bits(bytes));
  }
}

// 2^(e8m0 - 128), half of the value of the byte, as a bfloat16. 255 gives `last`.
inline uint16_t half_of_e8m0(uint8_t e8m0, uint16_t last) {
  if (e8m0 == 255) return last;
  return uint16_t(e8m0 < 2 ? 0x20 << e8m0 : (e8m0 - 1) << 7);  // below 2^-126: subnormal
}

template <>
void transcode_block<BlockType::mxfp4>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  transcode_nibbles(rows, 1, quants);
  for (int64_t r = 0; r < kRowsAtOnce; ++r) {
    const uint16_t scale = half_of_e8m0(rows.row[r][0], 0x7F00);  // 2^127
    std::memcpy(scales + 2 * (rows.first + r), &scale, 2);
  }
}

template <>
void transcode_block<BlockType::tq2_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  constexpr int64_t kGroupBytes = quant_format(Format::tq2_0).group_bytes();
  for (int64_t half = 0; half < 2; ++half) {
    store_pair_planes(rows, 32 * half, quants + 4 * half * kGroupBytes, kGroupBytes);
  }
  rows.copy_halves(64, scales);
}

template <>
void transcode_block<BlockType::q2_0>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  RowWords words[4];  // of sixteen columns each: four neighbours in a byte
  rows.load(2, words);
  for (int i = 0; i < 4; ++i) {
    // Bits 2 j of byte c, j and c from 0 to 3, go to bits 2 c of byte j.
    swap_bits(words[i], 6, 0x00CC00CC);
    swap_bits(words[i], 12, 0x0000F0F0);
    rows.store(quants + i * kChunkBytes, words[i]);
  }
  rows.copy_halves(0, scales);
}

// 16 bytes with two neighbouring columns each: the nibbles of columns 4 c to 4 c + 3 and of columns 4 (c + 4)
// to 4 (c + 4) + 3 share a word of a panel.
inline void transcode_neighbours(const BlockRows& rows, int64_t at, uint8_t* group) {
  RowWords words[4];
  rows.load(at, words);
  for (int c = 0; c < 4; ++c) {
    const int shift = c % 2 * 16;
    rows.store(group + c * kChunkBytes,
               spread_nibbles(words[c / 2] >> shift) | (spread_nibbles(words[c / 2 + 2] >> shift) << 4));
  }
}

template <>
void transcode_block<BlockType::int4_quants>(const BlockRows& rows, uint8_t* quants, uint8_t*) {
  transcode_neighbours(rows, 0, quants);
}

template <>
void transcode_block<BlockType::mxfp4_quants>(const BlockRows& rows, uint8_t* quants, uint8_t*) {
  transcode_neighbours(rows, 0, quants);
}

template <>
void transcode_block<BlockType::nvfp4_quants>(const BlockRows& rows, uint8_t* quants, uint8_t*) {
  constexpr int64_t kGroupBytes = quant_format(Format::nvfp4).group_bytes();
  for (int64_t g = 0; g < 2; ++g) transcode_neighbours(rows, 16 * g, quants + g * kGroupBytes);
}

// Four scales without a sign, then for each 16 columns eight bytes: the low halves are the first eight
// columns. A scale of 0x7F is zero, and one of 0xFF is 480 (ggml_ue4m3_to_fp32), which is what 0x7F means in
// a panel.
template <>
void transcode_block<BlockType::nvfp4_blocks>(const BlockRows& rows, uint8_t* quants, uint8_t* scales) {
  RowWords packed;
  rows.load_one(0, packed);
  for (int64_t r = 0; r < kRowsAtOnce; ++r) {
    for (int i = 0; i < 4; ++i) {
      const auto code = uint8_t(packed[r] >> (8 * i));
      scales[i * kPanelRows + rows.first + r] = code == 0x7F ? 0 : code & 0x7F;
    }
  }
  constexpr int64_t kGroupBytes = quant_format(Format::nvfp4).group_bytes();
  for (int64_t g = 0; g < 2; ++g) {
    RowWords words[4];  // two of each half of a group
    rows.load(4 + 16 * g, words);
    for (int c = 0; c < 2; ++c) {
      const RowWords &first = words[c], &second = words[2 + c];
      uint8_t* chunk = quants + g * kGroupBytes + c * kChunkBytes;
      rows.store(chunk, (first & kLowNibbles) | ((second & kLowNibbles) << 4));
      rows.store(chunk + 2 * kChunkBytes, ((first >> 4) & kLowNibbles) | (second & ~kLowNibbles));
    }
  }
}

// Transcodes only the scales of sixteen rows, one short row after another.
template <BlockType kType>
void transcode_scales(const uint8_t* from, int64_t row_stride, int64_t present, int64_t blocks,
                      uint8_t* panel) {
  constexpr QuantFormat kQuant = quant_format(slot_format(kType));
  for (int64_t b = 0; b < blocks; ++b)
    std::memset(panel + b * kQuant.block_bytes(), 0, size_t(kQuant.block_scale_bytes()));
  for (int64_t r = 0; r < kPanelRows && r < present; ++r) {
    const uint8_t* row = from + r * row_stride;
    for (int64_t b = 0; b < blocks; ++b) {
      constexpr uint16_t kNan = 0x7FC0;
      const uint16_t scale = kType == BlockType::mxfp4_scales ? half_of_e8m0(row[b], kNan)
                                                              : read_unaligned<uint16_t>(row + 2 * b);
      std::memcpy(panel + b * kQuant.block_bytes() + r * 2, &scale, 2);
    }
  }
}

// Transcodes sixteen rows, row_stride bytes apart, of which the first `present` exist. `next` points to the
// bytes of the next panel.
template <BlockType kType>
void transcode_blocks(const uint8_t* from, int64_t row_stride, int64_t present, int64_t cols, uint8_t* panel,
                      const uint8_t* next) {
  constexpr Format kFormat = slot_format(kType);
  constexpr QuantFormat kQuant = quant_format(kFormat);
  // A block of the format may be several of the file; then the last may be incomplete.
  constexpr int64_t kBytes = kQuant.block_cols / block_cols(kType) * block_bytes(kType);
  static constexpr uint8_t kNoRow[kBytes] = {};
  const int64_t blocks = num_blocks(kFormat, cols), row_bytes = block_row_bytes(kType, cols);
  for (int64_t b = 0; b < blocks; ++b) {
    // The hardware prefetcher cannot follow sixteen short streams; prefetch the next panel's rows, which are
    // one piece.
    if (next != nullptr) {
      const uint8_t* share = next + b * kPanelRows * kBytes;
      for (int64_t at = 0; at < kPanelRows * kBytes; at += 64) __builtin_prefetch(share + at, 0, 2);
    }
    const int64_t rest = row_bytes - b * kBytes;
    for (int64_t first = 0; first < kPanelRows; first += kRowsAtOnce) {
      BlockRows rows = {{}, first};
      uint8_t filled[kRowsAtOnce][kBytes];
      for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        const bool is_row = first + r < present;
        const int64_t at = (first + r) * row_stride + row_scale_bytes(kType) + b * kBytes;
        rows.row[r] = is_row ? from + at : kNoRow;
        if (is_row && kQuant.block_cols != block_cols(kType) && rest < kBytes) {
          std::memset(filled[r], 0, kBytes);
          std::memcpy(filled[r], rows.row[r], size_t(rest));
          rows.row[r] = filled[r];
        }
      }
      uint8_t* block = panel + kQuant.scales_at(b * kQuant.block_groups());
      transcode_block<kType>(rows, block + kQuant.block_scale_bytes(), block);
    }
  }
}

// Copies the scales that precede the rows, as float32, to the beginning of the panel.
template <BlockType kType>
void transcode_row_scales(const uint8_t* from, int64_t row_stride, int64_t present, uint8_t* panel) {
  for (int64_t r = 0; r < kPanelRows; ++r) {
    float scale = 0.0f;
    if (r < present) {
      const uint8_t* row = from + r * row_stride;
      scale = row_scale_bytes(kType) == 4 ? read_unaligned<float>(row)
                                          : float_from_f16(read_unaligned<uint16_t>(row));
    }
    std::memcpy(panel + 4 * r, &scale, 4);
  }
}

template <BlockType kType>
void transcode_panel(const uint8_t* from, int64_t row_stride, int64_t present, int64_t cols, uint8_t* panel,
                     const uint8_t* next) {
  constexpr Format kFormat = slot_format(kType);
  const int64_t blocks = num_blocks(kFormat, cols);
  if constexpr (is_scales(kType)) {
    transcode_scales<kType>(from, row_stride, present, blocks, panel);
  } else {
    if constexpr (row_scale_bytes(kType) > 0) transcode_row_scales<kType>(from, row_stride, present, panel);
    transcode_blocks<kType>(from, row_stride, present, cols, panel, next);
  }
  if constexpr (!is_quants(kType)) {
    constexpr QuantFormat kQuant = quant_format(kFormat);
    uint8_t* end = panel + kQuant.scales_at(blocks * kQuant.block_groups());
    std::memset(end, 0, size_t(panel + panel_bytes(kFormat, cols) - end));
  }
}

template <BlockType kType>
bool transcode_panels(const TranscodeArgs& a) {
  constexpr Format kFormat = slot_format(kType);
  const int64_t row_bytes = block_row_bytes(kType, a.cols);
  const int64_t row_stride = a.interleaved * row_bytes;
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    const uint8_t* from = a.rows_data + (index - a.panel_begin) * kPanelRows * row_stride;
    const uint8_t* next = index + 1 < a.panel_end ? from + kPanelRows * row_stride : nullptr;
    for (int64_t i = 0; i < a.interleaved; ++i) {
      uint8_t* matrix = a.matrix + i * matrix_bytes(kFormat, a.rows, a.cols);
      transcode_panel<kType>(from + i * row_bytes, row_stride, a.rows - index * kPanelRows, a.cols,
                             matrix + index * panel_bytes(kFormat, a.cols),
                             next != nullptr ? next + i * kPanelRows * row_bytes : nullptr);
    }
  }
  return true;
}

}  // namespace
}  // namespace argosy
