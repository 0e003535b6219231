// transcode_iq.h: transcodes sixteen rows of GGUF's i-quants to one panel (coded_row.h has the layouts).
//
// Indices, signs and words only move. The high bits of the indices become masks: the four bits of a row, for
// each of four groups, lie in the bytes of a word before they are joined with those of the other rows.
#pragma once

#include "kernels/coded_row.h"
#include "kernels/transcode_panel.h"

namespace argosy {
namespace {

// Stores four bits of each row in a mask of each of four groups: byte g of a word has those of group g.
template <Format kFormat>
void store_mask_bits(const BlockRows& rows, const RowWords& nibbles, uint8_t* masks) {
  // The bytes of both words are the two bytes of each group's mask.
  RowWords part = nibbles;
  uint32_t first, second;
  if constexpr (quant_format(kFormat).parts() == 2) {  // two bits of each row, and then the two others
    part &= 0x03030303u;
    first = part[0] | part[1] << 2 | part[2] << 4 | part[3] << 6;
    part = (nibbles >> 2) & 0x03030303u;
    second = part[0] | part[1] << 2 | part[2] << 4 | part[3] << 6;
  } else {
    first = part[0] | part[1] << 4;
    second = part[2] | part[3] << 4;
  }
  for (int64_t g = 0; g < 4; ++g) {
    const uint16_t bits = uint16_t((first >> 8 * g & 0xFF) | (second >> 8 * g & 0xFF) << 8);
    std::memcpy(masks + g * iq_mask_bytes(kFormat) + rows.first / 2, &bits, 2);
  }
}

// The bytes of the four indices of each row, in their places.
template <Format kFormat>
RowWords in_place(const RowWords& words) {
  if constexpr (quant_format(kFormat).parts() == 1) return words;
  using Bytes = uint8_t __attribute__((vector_size(16)));
  const Bytes bytes = Bytes(words);
  return RowWords(
      __builtin_shufflevector(bytes, bytes, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
}

// Bits 0, 2, 4 and 6 of each byte, as its lower four.
inline RowWords even_bits(const RowWords& words) {
  const RowWords pairs = ((words & 0x55555555u) | ((words & 0x55555555u) >> 1)) & 0x33333333u;
  return (pairs | (pairs >> 2)) & kLowNibbles;
}

// The lower four bits of each byte, side by side in the lower half of the word.
inline RowWords join_nibbles(const RowWords& words) {
  const RowWords pairs = ((words & kLowNibbles) | ((words & kLowNibbles) >> 4)) & 0x00FF00FFu;
  return (pairs | (pairs >> 8)) & 0xFFFFu;
}

// Eight bytes with the sub-scales of both halves of a group.
template <Format kFormat>
void transcode_nibbles_by_half(const BlockRows& rows, int64_t at, uint8_t* front) {
  RowWords low, high;
  rows.load_one(at, low);
  rows.load_one(at + 4, high);
  uint8_t* to = front + iq_sub_scales_at(kFormat);
  rows.store(to, join_nibbles(low) | (join_nibbles(high) << 16));
  rows.store(to + kChunkBytes, join_nibbles(low >> 4) | (join_nibbles(high >> 4) << 16));
}

// Words of bytes that belong to indices, one after another, to the groups' bytes from `to` on.
template <Format kFormat, int kWords>
void move_words(const BlockRows& rows, int64_t at, uint8_t* groups, int64_t to) {
  constexpr int64_t kGroupBytes = quant_format(kFormat).group_bytes();
  RowWords words[kWords];
  rows.load(at, words);
  constexpr int kInGroup = kWords / 8;
  for (int i = 0; i < kWords; ++i) {
    rows.store(groups + i / kInGroup * kGroupBytes + to + i % kInGroup * kChunkBytes,
               in_place<kFormat>(words[i]));
  }
}

template <>
void transcode_block<BlockType::iq2_xxs>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  rows.copy_halves(0, front);
  move_words<Format::iq2_xxs, 16>(rows, 2, groups, 0);
}

template <>
void transcode_block<BlockType::iq2_xs>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  constexpr int64_t kGroupBytes = quant_format(Format::iq2_xs).group_bytes();
  rows.copy_halves(0, front);
  RowWords words[16];
  rows.load(2, words);
  for (int g = 0; g < 8; ++g) {
    const Bytes first = Bytes(words[2 * g]), second = Bytes(words[2 * g + 1]);
    rows.store(groups + g * kGroupBytes,
               RowWords(__builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24,
                                                26, 28, 30)));
    rows.store(groups + g * kGroupBytes + kChunkBytes,
               RowWords(__builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25,
                                                27, 29, 31)));
  }
  transcode_nibbles_by_half<Format::iq2_xs>(rows, 66, front);
}

template <>
void transcode_block<BlockType::iq2_s>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  constexpr int64_t kMaskBytes = iq_mask_bytes(Format::iq2_s);
  rows.copy_halves(0, front);
  move_words<Format::iq2_s, 8>(rows, 2, groups, 0);
  move_words<Format::iq2_s, 8>(rows, 34, groups, kChunkBytes);
  for (int64_t four = 0; four < 2; ++four) {
    uint8_t* masks = front + iq_masks_at(Format::iq2_s) + 4 * four * kMaskBytes;
    RowWords high;
    rows.load_one(66 + 4 * four, high);
    store_mask_bits<Format::iq2_s>(rows, even_bits(high), masks);
    store_mask_bits<Format::iq2_s>(rows, even_bits(high >> 1), masks + 8);
  }
  transcode_nibbles_by_half<Format::iq2_s>(rows, 74, front);
}

template <>
void transcode_block<BlockType::iq3_xxs>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  rows.copy_halves(0, front);
  move_words<Format::iq3_xxs, 16>(rows, 2, groups, 0);
  move_words<Format::iq3_xxs, 8>(rows, 66, groups, 2 * kChunkBytes);
}

template <>
void transcode_block<BlockType::iq3_s>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  constexpr int64_t kMaskBytes = iq_mask_bytes(Format::iq3_s);
  rows.copy_halves(0, front);
  move_words<Format::iq3_s, 16>(rows, 2, groups, 0);
  move_words<Format::iq3_s, 8>(rows, 74, groups, 2 * kChunkBytes);
  for (int64_t four = 0; four < 2; ++four) {
    uint8_t* masks = front + iq_masks_at(Format::iq3_s) + 4 * four * kMaskBytes;
    RowWords high;
    rows.load_one(66 + 4 * four, high);
    store_mask_bits<Format::iq3_s>(rows, high & kLowNibbles, masks);
    store_mask_bits<Format::iq3_s>(rows, (high >> 4) & kLowNibbles, masks + 8);
  }
  RowWords sub_scales;
  rows.load_one(106, sub_scales);
  rows.store(front + iq_sub_scales_at(Format::iq3_s), sub_scales);
}

// Names of entries of iq1's grid by their index: the low byte, then each of the three highest bits in a byte.
struct Iq1Names {
  uint32_t spread[2048];
};
constexpr Iq1Names kSpreadNames = [] {
  Iq1Names made = {};
  for (int i = 0; i < 2048; ++i) {
    const uint32_t name = kIq1Names[i];
    made.spread[i] = (name & 0xFF) | (name & 0x100) | (name >> 9 & 1) << 16 | (name >> 10 & 1) << 24;
  }
  return made;
}();

// Stores the names of the indices of four groups: `low` has the four lowest bytes of a group, and the three
// bits above those of index k begin at bit kStep * k of `high`.
template <Format kFormat, int kStep>
void store_names(const BlockRows& rows, const RowWords* low, const RowWords (&high)[4], uint8_t* groups,
                 uint8_t* masks) {
  RowWords bits[3] = {};  // of each mask, those of group g in byte g
  for (int g = 0; g < 4; ++g) {
    RowWords low_bytes = {}, above = {};
    for (int k = 0; k < 4; ++k) {
      const RowWords index = ((low[g] >> (8 * k)) & 0xFFu) | (((high[g] >> (kStep * k)) & 7u) << 8);
      const RowWords name = {kSpreadNames.spread[index[0]], kSpreadNames.spread[index[1]],
                             kSpreadNames.spread[index[2]], kSpreadNames.spread[index[3]]};
      low_bytes |= (name & 0xFFu) << (8 * k);
      above |= (name & 0xFFFFFF00u) << k;
    }
    rows.store(groups + g * quant_format(kFormat).group_bytes(), in_place<kFormat>(low_bytes));
    for (int m = 0; m < 3; ++m) bits[m] |= ((above >> (8 * (m + 1))) & 15u) << (8 * g);
  }
  for (int m = 0; m < 3; ++m) store_mask_bits<kFormat>(rows, bits[m], masks + 8 * m);
}

template <>
void transcode_block<BlockType::iq1_s>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  constexpr Format kFormat = Format::iq1_s;
  rows.copy_halves(0, front);
  RowWords low[8], high[4], nibbles = {};  // `high`: two groups in a word
  rows.load(2, low);
  rows.load(34, high);
  for (int four = 0; four < 2; ++four) {
    const RowWords of_groups[4] = {high[2 * four], high[2 * four] >> 16, high[2 * four + 1],
                                   high[2 * four + 1] >> 16};
    store_names<kFormat, 3>(rows, low + 4 * four, of_groups,
                            groups + 4 * four * quant_format(kFormat).group_bytes(),
                            front + iq_masks_at(kFormat) + 4 * four * iq_mask_bytes(kFormat));
  }
  // The sub-scale and delta of each group are on top.
  for (int i = 0; i < 4; ++i) nibbles |= (((high[i] >> 12) & 15u) | ((high[i] >> 28) << 4)) << (8 * i);
  rows.store(front + iq_sub_scales_at(kFormat), nibbles);
}

template <>
void transcode_block<BlockType::iq1_m>(const BlockRows& rows, uint8_t* groups, uint8_t* front) {
  constexpr Format kFormat = Format::iq1_m;
  RowWords low[8],
      high[4];  // `high`: a nibble for each index, its highest bits and whether delta is negative
  rows.load(0, low);
  rows.load(32, high);
  for (int four = 0; four < 2; ++four) {
    uint8_t* masks = front + iq_masks_at(kFormat) + 4 * four * iq_mask_bytes(kFormat);
    const RowWords of_groups[4] = {high[2 * four], high[2 * four] >> 16, high[2 * four + 1],
                                   high[2 * four + 1] >> 16};
    store_names<kFormat, 4>(rows, low + 4 * four, of_groups,
                            groups + 4 * four * quant_format(kFormat).group_bytes(), masks);
    RowWords deltas = {};  // byte g: of group g
    for (int g = 0; g < 4; ++g) {
      const RowWords signs = (of_groups[g] >> 3) & 0x1111u;
      deltas |= ((signs | (signs >> 3) | (signs >> 6) | (signs >> 9)) & 15u) << (8 * g);
    }
    store_mask_bits<kFormat>(rows, deltas, masks + 24);
  }
  // Four words of 16 bits: the sub-scales of the halves of two groups, and four bits of d on top.
  RowWords scales[2], d = {}, halves[2] = {};
  rows.load_one(48, scales[0]);
  rows.load_one(52, scales[1]);
  for (int i = 0; i < 4; ++i) {
    const RowWords four = (scales[i / 2] >> (i % 2 * 16)) & 0xFFFFu;
    d |= (four >> 12) << (4 * i);
    for (int h = 0; h < 2; ++h) {
      const RowWords two = ((four >> (3 * h)) & 7u) | (((four >> (6 + 3 * h)) & 7u) << 3);
      halves[h] |= two << (6 * i);
    }
  }
  rows.store(front, halves[0] | (d << 24));
  rows.store(front + kChunkBytes, halves[1] | ((d >> 8) << 24));
}

}  // namespace
}  // namespace argosy
