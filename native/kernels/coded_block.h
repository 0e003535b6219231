// coded_block.h: coded formats that keep the bytes of the file's blocks.
//
// A block of a panel has the blocks of sixteen rows: if they are two bytes longer than whole words, the first
// two bytes of each, uint16 [16]; then the words of each, uint32 [word][16]. CodedBlock<F> decodes a group of
// one row; block_decode.h decodes several rows at once.
//
//   tq1_0   bytes of five trits, 32 and 16 of them, and 4 bytes of four; d f16. In a part of n bytes, byte m
//           has columns m, n + m, 2 n + m, ...: the digits to base three of a fraction of 256, the first
//           first.
//   q1_0    d f16, then a bit for each of 128 columns: d, or -d where it is 0.
//
// And those of ik_llama.cpp, whose ggml-common.h has the layouts and the tables of values; the tables are
// data, MIT licence, Copyright (C) 2024-2025 Iwan Kawrakow. Each part of a block chooses one of two tables,
// and the second is the first plus a constant.
//
//   iq2_k iq3_k iq4_k iq5_k iq6_k          scale = d f16 * an integer for each 16 columns
//   iq2_ks iq3_ks iq4_ks iq5_ks iq2_kl     scale = that of the row, which precedes its blocks in the file and
//                                          begins the panel, * an integer for each 32 columns. A code of
//                                          iq2_kl is of two columns.
#pragma once

#include "kernels/formats.h"
#include "kernels/half.h"

namespace argosy {
namespace {

constexpr bool keeps_blocks(Format format) { return format >= Format::tq1_0 && format <= Format::iq2_kl; }
constexpr bool is_ik(Format format) { return format >= Format::iq2_k && format <= Format::iq2_kl; }

template <Format kFormat>
struct CodedBlock;

// The bytes of each row's block in front of its words.
constexpr int64_t bytes_before_words(Format format) {
  return quant_format(format).front_bytes / kPanelRows % 4;
}

// The block of one row.
template <Format kFormat>
struct RowOfBlock {
  static constexpr int64_t kBeforeWords = bytes_before_words(kFormat);
  static_assert(kBeforeWords % 2 == 0);

  // The two bytes in front of the words.
  uint32_t first_two() const { return read_unaligned<uint16_t>(block + 2 * row); }
  uint32_t word(int64_t i) const {
    return read_unaligned<uint32_t>(block + kBeforeWords * kPanelRows + i * kChunkBytes + 4 * row);
  }
  uint8_t byte(int64_t i) const {
    if (i < kBeforeWords) return block[kBeforeWords * row + i];
    return uint8_t(word((i - kBeforeWords) / 4) >> (i - kBeforeWords) % 4 * 8);
  }

  const uint8_t* block;
  int64_t row;
};

template <>
struct CodedBlock<Format::tq1_0> {
  using Row = RowOfBlock<Format::tq1_0>;

  static void quants(const Row& row, int64_t group, int8_t* q) {
    constexpr uint8_t kPowers[] = {1, 3, 9, 27, 81};
    const auto trit = [&](int64_t at, int64_t digit) {
      return int8_t((uint8_t(row.byte(at) * kPowers[digit]) * 3 >> 8) - 1);
    };
    for (int64_t i = 0; i < kGroupSize; ++i) {
      const int64_t col = group * kGroupSize + i;
      q[i] = col < 160   ? trit(col % 32, col / 32)
             : col < 240 ? trit(32 + col % 16, (col - 160) / 16)
                         : trit(48 + col % 4, (col - 240) / 4);
    }
  }
  static float scale(const Row& row, int64_t, int64_t) {
    return float_from_f16(uint16_t(row.byte(52) | row.byte(53) << 8));
  }
};

template <>
struct CodedBlock<Format::q1_0> {
  using Row = RowOfBlock<Format::q1_0>;

  static void quants(const Row& row, int64_t group, int8_t* q) {
    const uint32_t bits = row.word(group);
    for (int i = 0; i < kGroupSize; ++i) q[i] = int8_t((bits >> i & 1) != 0 ? 1 : -1);
  }
  static float scale(const Row& row, int64_t, int64_t) { return float_from_f16(uint16_t(row.first_two())); }
};

// The first table of values, of 1 << kBits codes, and what the second one adds; of iq2_kl, the
// values of the first column of a pair, then of the second.
constexpr int8_t kIkValues2[4] = {-31, -13, 1, 17};
constexpr int8_t kIkValues3[8] = {-63, -40, -23, -10, 1, 13, 28, 47};
constexpr int8_t kIkValues4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kIkValues5[32] = {-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36,
                                   -30,  -24,  -18,  -12, -6,  -1,  5,   11,  17,  23,  29,
                                   36,   43,   51,   59,  68,  77,  87,  97,  109, 121};
constexpr int8_t kIkValues6[64] = {-127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66,
                                   -62,  -58,  -54,  -51,  -47,  -44, -40, -37, -34, -31, -28, -25, -22,
                                   -19,  -16,  -13,  -11,  -8,   -5,  -2,  0,   3,   6,   9,   12,  14,
                                   17,   20,   23,   27,   30,   33,  36,  40,  44,  47,  51,  55,  59,
                                   63,   68,   72,   77,   82,   87,  92,  98,  103, 109, 115, 121};
constexpr int8_t kIkPairs[64] = {
    -63, -63, -40, -40, -40, -40, -23, -23, -23, -23, -23, -10, -10, -10, -10, 1,  1,   1,   1,   1,  13, 13,
    13,  13,  13,  28,  28,  28,  28,  28,  47,  47,  -23, 13,  -63, -10, 13,  47, -40, -23, 1,   13, 28, -63,
    1,   13,  47,  -23, -10, 1,   13,  28,  -40, -23, -10, 1,   13,  -63, -23, 1,  28,  47,  -23, 13};

struct IkValues {
  int bits;
  const int8_t* values;
  int step;
};
constexpr IkValues ik_values(Format format) {
  switch (format) {
    case Format::iq2_k:
    case Format::iq2_ks:
      return {2, kIkValues2, 5};
    case Format::iq3_k:
    case Format::iq3_ks:
      return {3, kIkValues3, 4};
    case Format::iq4_k:
    case Format::iq4_ks:
      return {4, kIkValues4, 4};
    case Format::iq5_k:
    case Format::iq5_ks:
      return {5, kIkValues5, 2};
    case Format::iq6_k:
      return {6, kIkValues6, 1};
    default:
      return {5, kIkPairs, 0};
  }
}

// Where the parts of a group lie. `block` has the words of a row (RowOfBlock) or vectors of those of several
// rows (RowsOfBlock); results are of the same type.

// The codes of columns 4 chunk to 4 chunk + 3, a byte each; iq2_kl: of the pairs in columns 8 chunk to
// 8 chunk + 7.
template <Format kFormat, class Block>
[[gnu::always_inline]] inline auto ik_codes(const Block& block, int group, int chunk) {
  // Two bits: those of 32 columns of four groups share 8 words. Four: those of both halves of a group share 4
  // words, or those of two groups 8. One: each column has a byte with a bit for each group.
  const auto two_bits = [&](int at) {
    return block.word(at + group / 4 * 8 + chunk) >> group % 4 * 2 & 0x03030303u;
  };
  const auto nibbles_of_halves = [&](int at) {
    return block.word(at + 4 * group + chunk % 4) >> chunk / 4 * 4 & 0x0F0F0F0Fu;
  };
  const auto nibbles_of_groups = [&](int at, int words) {
    return block.word(at + group / 2 * words + chunk) >> group % 2 * 4 & 0x0F0F0F0Fu;
  };
  const auto one_bit = [&](int at) { return block.word(at + chunk) >> group & 0x01010101u; };
  if constexpr (kFormat == Format::iq2_k) {
    return two_bits(3);
  } else if constexpr (kFormat == Format::iq2_ks) {
    return two_bits(1);
  } else if constexpr (kFormat == Format::iq3_k) {
    return two_bits(3) | one_bit(19) << 2;
  } else if constexpr (kFormat == Format::iq3_ks) {
    return two_bits(1) | one_bit(17) << 2;
  } else if constexpr (kFormat == Format::iq4_k) {
    return nibbles_of_halves(4);
  } else if constexpr (kFormat == Format::iq4_ks) {
    return nibbles_of_halves(2);
  } else if constexpr (kFormat == Format::iq5_k) {
    return nibbles_of_groups(4, 8) | one_bit(36) << 4;
  } else if constexpr (kFormat == Format::iq5_ks) {
    return nibbles_of_groups(2, 8) | one_bit(34) << 4;
  } else if constexpr (kFormat == Format::iq6_k) {
    return nibbles_of_groups(5, 8) | two_bits(37) << 4;
  } else {
    return nibbles_of_groups(1, 4) | one_bit(17) << 4;
  }
}

// 1 where the second table is chosen, otherwise 0.
template <Format kFormat, class Block>
[[gnu::always_inline]] inline auto ik_table(const Block& block, int group, int half) {
  if constexpr (kFormat == Format::iq3_k) {
    return block.word(0) >> (2 * group + half) & 1u;
  } else if constexpr (kFormat <= Format::iq6_k) {
    return block.word(0) >> (16 + 2 * group + half) & 1u;
  } else if constexpr (kFormat == Format::iq2_ks) {
    return block.first_two() >> group & 1u;
  } else if constexpr (kFormat == Format::iq3_ks) {
    return block.first_two() >> (8 + group) & 1u;
  } else if constexpr (kFormat == Format::iq2_kl) {
    return block.word(0) & 0u;
  } else {
    return block.word(group / 4) >> group % 4 * 8 & 1u;
  }
}

// The integer of the scale, modulo 2^32.
template <Format kFormat, class Block>
[[gnu::always_inline]] inline auto ik_sub_scale(const Block& block, int group, int half) {
  const auto nibble = [&](int at) { return block.word(at + group / 4) >> (group % 4 * 8 + 4 * half) & 15u; };
  // The nibbles of groups 0 to 3 lie below those of 4 to 7.
  const auto nibble_of_four = [&] { return block.word(0) >> (group % 4 * 8 + group / 4 * 4) & 15u; };
  if constexpr (kFormat == Format::iq2_k) {
    return nibble(1) - 8u;
  } else if constexpr (kFormat == Format::iq3_k) {
    const auto is_negative = block.word(0) >> (16 + 2 * group + half) & 1u;
    return ((2u * nibble(1) + 1u) ^ (0u - is_negative)) + is_negative;
  } else if constexpr (kFormat == Format::iq4_k || kFormat == Format::iq5_k) {
    return nibble(2) + (block.word(1) >> (4 * group + 2 * half) & 3u) * 16u - 32u;
  } else if constexpr (kFormat == Format::iq6_k) {
    const int byte = 2 * group + half;
    return ((block.word(1 + byte / 4) >> byte % 4 * 8 & 255u) ^ 128u) - 128u;
  } else if constexpr (kFormat == Format::iq2_ks) {
    return (block.word(0) >> 4 * group & 15u) + (block.first_two() >> (8 + group) & 1u) * 16u - 16u;
  } else if constexpr (kFormat == Format::iq3_ks) {
    return nibble_of_four() + (block.first_two() >> group & 1u) * 16u - 16u;
  } else if constexpr (kFormat == Format::iq2_kl) {
    return nibble_of_four() + (block.first_two() >> 2 * group & 3u) * 16u - 32u;
  } else {
    return (block.word(group / 4) >> group % 4 * 8 & 254u) - 127u;
  }
}

// The bits of d, for formats whose rows have no scale.
template <Format kFormat, class Block>
[[gnu::always_inline]] inline auto ik_d(const Block& block) {
  if constexpr (kFormat == Format::iq3_k) {
    return block.first_two();
  } else {
    return block.word(0) & 0xFFFFu;
  }
}

template <Format kFormat>
  requires(is_ik(kFormat))
struct CodedBlock<kFormat> {
  using Row = RowOfBlock<kFormat>;
  static constexpr IkValues kValues = ik_values(kFormat);

  static void quants(const Row& row, int64_t group, int8_t* q) {
    if constexpr (kFormat == Format::iq2_kl) {
      for (int chunk = 0; chunk < 4; ++chunk) {
        const uint32_t codes = ik_codes<kFormat>(row, int(group), chunk);
        for (int j = 0; j < 8; ++j) q[8 * chunk + j] = kIkPairs[j % 2 * 32 + (codes >> j / 2 * 8 & 31)];
      }
    } else {
      for (int chunk = 0; chunk < 8; ++chunk) {
        const uint32_t codes = ik_codes<kFormat>(row, int(group), chunk);
        const int step = int(ik_table<kFormat>(row, int(group), chunk / 4)) * kValues.step;
        for (int j = 0; j < 4; ++j) q[4 * chunk + j] = int8_t(kValues.values[codes >> 8 * j & 63] + step);
      }
    }
  }
  static float scale(const Row& row, int64_t group, int64_t half) {
    const auto integer = float(int32_t(ik_sub_scale<kFormat>(row, int(group), int(half))));
    if constexpr (quant_format(kFormat).has_row_scale) {
      return integer;
    } else {
      return float_from_f16(uint16_t(ik_d<kFormat>(row))) * integer;
    }
  }
};

}  // namespace
}  // namespace argosy
