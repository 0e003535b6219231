// coded_block.h: coded formats that keep the bytes of the file's blocks.
//
// A block of a panel has the blocks of sixteen rows: if they are two bytes longer than whole words, the first
// two bytes of each, uint16 [16]; then the words of each, uint32 [word][16]. CodedBlock<F>::decode reads one
// block of one row, in the order of the file.
//
//   tq1_0   bytes of five trits, 32 and 16 of them, and 4 bytes of four; d f16. In a part of n bytes, byte m
//           has columns m, n + m, 2 n + m, ...: the digits to base three of a fraction of 256, the first
//           first.
//   q1_0    d f16, then a bit for each of 128 columns: d, or -d where it is 0.
//
// And those of ik_llama.cpp, whose ggml-common.h has the layouts and the tables of values; the tables are
// data, MIT licence, Copyright (C) 2024-2025 Iwan Kawrakow. Each part of a block chooses one of two tables.
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

template <Format kFormat>
struct CodedBlock;

template <Format kFormat>
constexpr int64_t kRowBlockBytes = quant_format(kFormat).front_bytes / kPanelRows;
template <Format kFormat>
constexpr int kSubScales = int(quant_format(kFormat).block_groups() * quant_format(kFormat).parts());

// The quants and scales of a block of one row.
template <Format kFormat>
struct DecodedBlock {
  int8_t q[quant_format(kFormat).block_cols];
  float scale[kSubScales<kFormat>];

  DecodedBlock(const uint8_t* block, int64_t row) {
    constexpr int64_t kBytes = kRowBlockBytes<kFormat>, kBeforeWords = kBytes % 4;
    static_assert(kBeforeWords % 2 == 0);
    uint8_t bytes[kBytes];
    std::memcpy(bytes, block + kBeforeWords * row, kBeforeWords);
    block += kBeforeWords * kPanelRows;
    for (int64_t i = 0; i < kBytes / 4; ++i) {
      std::memcpy(bytes + kBeforeWords + 4 * i, block + i * kChunkBytes + 4 * row, 4);
    }
    CodedBlock<kFormat>::decode(bytes, *this);
  }
};

template <>
struct CodedBlock<Format::tq1_0> {
  static void decode(const uint8_t* bytes, DecodedBlock<Format::tq1_0>& to) {
    const auto put = [&](int first, int count, const uint8_t* from, int digits) {
      for (int m = 0; m < count; ++m) {
        uint8_t rest = from[m];
        for (int digit = 0; digit < digits; ++digit) {
          to.q[first + digit * count + m] = int8_t((rest * 3 >> 8) - 1);
          rest = uint8_t(rest * 3);
        }
      }
    };
    put(0, 32, bytes, 5);
    put(160, 16, bytes + 32, 5);
    put(240, 4, bytes + 48, 4);
    for (float& scale : to.scale) scale = float_from_f16(read_unaligned<uint16_t>(bytes + 52));
  }
};

template <>
struct CodedBlock<Format::q1_0> {
  static void decode(const uint8_t* bytes, DecodedBlock<Format::q1_0>& to) {
    for (int i = 0; i < 128; ++i) to.q[i] = int8_t((bytes[2 + i / 8] >> i % 8 & 1) != 0 ? 1 : -1);
    for (float& scale : to.scale) scale = float_from_f16(read_unaligned<uint16_t>(bytes));
  }
};

// The values of codes: the first table, then the second.
constexpr int8_t kIkValues2[2][4] = {{-31, -13, 1, 17}, {-26, -8, 6, 22}};
constexpr int8_t kIkValues3[2][8] = {{-63, -40, -23, -10, 1, 13, 28, 47}, {-59, -36, -19, -6, 5, 17, 32, 51}};
constexpr int8_t kIkValues4[2][16] = {
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {-123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117}};
constexpr int8_t kIkValues5[2][32] = {
    {-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
     -1,   5,    11,   17,  23,  29,  36,  43,  51,  59,  68,  77,  87,  97,  109, 121},
    {-124, -112, -101, -90, -81, -72, -63, -55, -48, -41, -34, -28, -22, -16, -10, -4,
     1,    7,    13,   19,  25,  31,  38,  45,  53,  61,  70,  79,  89,  99,  111, 123}};
// The second table is the first plus 1.
constexpr int8_t kIkValues6[64] = {-127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66,
                                   -62,  -58,  -54,  -51,  -47,  -44, -40, -37, -34, -31, -28, -25, -22,
                                   -19,  -16,  -13,  -11,  -8,   -5,  -2,  0,   3,   6,   9,   12,  14,
                                   17,   20,   23,   27,   30,   33,  36,  40,  44,  47,  51,  55,  59,
                                   63,   68,   72,   77,   82,   87,  92,  98,  103, 109, 115, 121};
constexpr int8_t kIkPairs[32][2] = {
    {-63, -23}, {-63, 13}, {-40, -63}, {-40, -10}, {-40, 13}, {-40, 47}, {-23, -40}, {-23, -23},
    {-23, 1},   {-23, 13}, {-23, 28},  {-10, -63}, {-10, 1},  {-10, 13}, {-10, 47},  {1, -23},
    {1, -10},   {1, 1},    {1, 13},    {1, 28},    {13, -40}, {13, -23}, {13, -10},  {13, 1},
    {13, 13},   {28, -63}, {28, -23},  {28, 1},    {28, 28},  {28, 47},  {47, -23},  {47, 13}};

// Where the codes of a column lie in the bytes of a block. Two low bits: those of 32 columns of four groups
// share 32 bytes. Four: those of both halves of a group share 16 bytes, or those of two groups 32.
inline int low_two_bits(const uint8_t* codes, int group, int col) {
  return codes[group / 4 * 32 + col] >> group % 4 * 2 & 3;
}
inline int nibble_of_half(const uint8_t* codes, int group, int col) {
  return codes[16 * group + col % 16] >> col / 16 * 4 & 15;
}
inline int nibble_of_group(const uint8_t* codes, int group, int col) {
  return codes[group / 2 * 32 + col] >> group % 2 * 4 & 15;
}
// The bit of a column in 32 bytes, one for each column of every group.
inline int high_bit(const uint8_t* bits, int group, int col) { return bits[col] >> group & 1; }

// Six bits of a sub-scale, minus 32: the lower four in the nibbles of `low`, the others in `high`.
inline int six_bit_scale(const uint8_t* low, const uint8_t* high, int group, int half) {
  return (low[group] >> 4 * half & 15) + (high[group / 2] >> (4 * (group % 2) + 2 * half) & 3) * 16 - 32;
}

// Fills a block: value(group, col, table), scale(group, half), and table(group, half), 0 or 1.
template <Format kFormat, class Value, class Scale, class Table>
void fill_block(DecodedBlock<kFormat>& to, const Value& value, const Scale& scale, const Table& table) {
  constexpr int kParts = quant_format(kFormat).parts(), kCols = int(kGroupSize) / kParts;
  for (int group = 0; group < 8; ++group) {
    for (int half = 0; half < kParts; ++half) {
      to.scale[group * kParts + half] = scale(group, half);
      const int chosen = table(group, half);
      for (int i = 0; i < kCols; ++i) {
        const int col = half * kCols + i;
        to.q[group * int(kGroupSize) + col] = int8_t(value(group, col, chosen));
      }
    }
  }
}

// The formats with a float16 scale in each block, and a table for each half group.
template <Format kFormat>
  requires(kFormat >= Format::iq2_k && kFormat <= Format::iq6_k)
struct CodedBlock<kFormat> {
  static void decode(const uint8_t* b, DecodedBlock<kFormat>& to) {
    const float d = float_from_f16(read_unaligned<uint16_t>(b));
    const unsigned tables = read_unaligned<uint16_t>(b + 2);
    const auto table = [&](int group, int half) { return int(tables >> (2 * group + half) & 1); };
    if constexpr (kFormat == Format::iq2_k) {
      fill_block(
          to, [&](int g, int col, int t) { return kIkValues2[t][low_two_bits(b + 12, g, col)]; },
          [&](int g, int half) { return d * float((b[4 + g] >> 4 * half & 15) - 8); }, table);
    } else if constexpr (kFormat == Format::iq3_k) {
      const unsigned signs = read_unaligned<uint16_t>(b + 4);
      fill_block(
          to,
          [&](int g, int col, int t) {
            return kIkValues3[t][low_two_bits(b + 14, g, col) + 4 * high_bit(b + 78, g, col)];
          },
          [&](int g, int half) {
            const int scale = 2 * (b[6 + g] >> 4 * half & 15) + 1;
            return d * float((signs >> (2 * g + half) & 1) != 0 ? -scale : scale);
          },
          table);
    } else if constexpr (kFormat == Format::iq4_k) {
      fill_block(
          to, [&](int g, int col, int t) { return kIkValues4[t][nibble_of_half(b + 16, g, col)]; },
          [&](int g, int half) { return d * float(six_bit_scale(b + 8, b + 4, g, half)); }, table);
    } else if constexpr (kFormat == Format::iq5_k) {
      fill_block(
          to,
          [&](int g, int col, int t) {
            return kIkValues5[t][nibble_of_group(b + 16, g, col) + 16 * high_bit(b + 144, g, col)];
          },
          [&](int g, int half) { return d * float(six_bit_scale(b + 8, b + 4, g, half)); }, table);
    } else {
      fill_block(
          to,
          [&](int g, int col, int t) {
            return kIkValues6[nibble_of_group(b + 20, g, col) + 16 * low_two_bits(b + 148, g, col)] + t;
          },
          [&](int g, int half) { return d * float(int8_t(b[4 + 2 * g + half])); }, table);
    }
  }
};

// The formats whose rows have a scale.
template <Format kFormat>
  requires(kFormat >= Format::iq2_ks && kFormat <= Format::iq2_kl)
struct CodedBlock<kFormat> {
  static void decode(const uint8_t* b, DecodedBlock<kFormat>& to) {
    const unsigned bits = read_unaligned<uint16_t>(b);
    const auto bit = [&](int at) { return int(bits >> at & 1); };
    if constexpr (kFormat == Format::iq2_ks) {
      fill_block(
          to, [&](int g, int col, int t) { return kIkValues2[t][low_two_bits(b + 6, g, col)]; },
          [&](int g, int) { return float((b[2 + g / 2] >> g % 2 * 4 & 15) + 16 * bit(8 + g) - 16); },
          [&](int g, int) { return bit(g); });
    } else if constexpr (kFormat == Format::iq3_ks) {
      fill_block(
          to,
          [&](int g, int col, int t) {
            return kIkValues3[t][low_two_bits(b + 6, g, col) + 4 * high_bit(b + 70, g, col)];
          },
          [&](int g, int) { return float((b[2 + g % 4] >> g / 4 * 4 & 15) + 16 * bit(g) - 16); },
          [&](int g, int) { return bit(8 + g); });
    } else if constexpr (kFormat == Format::iq2_kl) {
      fill_block(
          to,
          [&](int g, int col, int) {
            const int low = b[6 + g / 2 * 16 + col / 2] >> g % 2 * 4 & 15;
            return kIkPairs[low + 16 * (b[70 + col / 2] >> g & 1)][col % 2];
          },
          [&](int g, int) {
            return float((b[2 + g % 4] >> g / 4 * 4 & 15) + 16 * int(bits >> 2 * g & 3) - 32);
          },
          [](int, int) { return 0; });
    } else {
      const auto scale = [&](int g, int) { return float((b[g] & 254) - 127); };
      const auto table = [&](int g, int) { return b[g] & 1; };
      fill_block(
          to,
          [&](int g, int col, int t) {
            if constexpr (kFormat == Format::iq4_ks) return kIkValues4[t][nibble_of_half(b + 8, g, col)];
            return kIkValues5[t][nibble_of_group(b + 8, g, col) + 16 * high_bit(b + 136, g, col)];
          },
          scale, table);
    }
  }
};

}  // namespace
}  // namespace argosy
