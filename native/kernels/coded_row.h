// coded_row.h: one row of a group of a coded format: its quants and their scales.
//
//   CodedRow<F>::quants(panel, row, group, q)     the 32 quants of the group
//   CodedRow<F>::scale(panel, row, group, part)   weight = scale * q, times the row's scale if there is one;
//                                                 part: the half of the group, if each has a scale
//
// Defined for each coded format. From it come the references of products, the rows that embeddings look up,
// and the plain way to decode a panel (coded.h).
#pragma once

#include "kernels/coded_block.h"
#include "kernels/formats.h"
#include "kernels/half.h"
#include "kernels/iq_grids.h"

namespace argosy {
namespace {

template <Format kFormat>
struct CodedRow;

// ---- GGUF's i-quants ----
//
// A block of 256 columns takes sixteen times the bytes of the file's block:
//
//            d         sub-scales            bit masks of 8 groups   8 groups, bytes each
//   iq2_xxs  f16 [16]  -                     -                       64 index, 64 words by row
//   iq2_xs   f16 [16]  128 nibbles by half   -                       64 index, 64 index bit 8 and signs
//   iq2_s    f16 [16]  128 nibbles by half   16: index bits 8, 9     64 index, 64 signs
//   iq3_xxs  f16 [16]  -                     -                       128 index, 64 words by row
//   iq3_s    f16 [16]  64 nibbles by row     16: index bit 8, twice  128 index, 64 signs
//   iq1_s    f16 [16]  64 nibbles by row     24: index bits 8 to 10  64 index
//   iq1_m    -         128 threes by half    32: the same, delta     64 index
//
// Index k of a row belongs to columns 8 k to 8 k + 7 of a group; in iq3, to columns 4 k to 4 k + 3. Its place
// is 4 r + k; if each half of a group has a sub-scale, it is 16 (r / 4) + 8 (k / 2) + 2 (r % 4) + k % 2:
// vpunpcklbw and vpunpckhbw of two lookups then leave the halves of a group in two vectors, in the order of
// the rows.
//
//   index         the low byte of each index, at its place; iq3: the second 64 bytes have indices 4 to 7.
//                 iq1: the low byte of the name of an entry (iq_grids.h).
//   signs         at the place of index k, the signs of columns 8 k to 8 k + 7. iq2_xs: bit 0 is bit 8 of the
//                 index, bits 1 to 7 are seven signs; the eighth makes their number even.
//   words by row  uint32 [16]: four fields of seven signs, the sub-scale on top.
//   bit masks     uint64 each: the bit at its place belongs to the index; iq3: the second to indices 4 to 7.
//   by row        uint32 [16]: nibble g belongs to group g; iq1_s: bit 3 of a nibble: delta is negative.
//   by half       uint32 [half][16]: nibble g, or the three bits from 3 g on, belongs to group g. iq1_m: the
//                 top bytes of a row's two words are the bytes of d.
//
// weight = d * unit * (2 sub-scale + 1) * value. The value is that of the grid with its sign; iq1: 8 times
// that of the grid, plus or minus 1 (delta).

constexpr bool is_iq(Format format) { return format >= Format::iq2_xxs && format <= Format::iq1_m; }
constexpr bool is_iq1(Format format) { return format == Format::iq1_s || format == Format::iq1_m; }
constexpr bool is_iq3(Format format) { return format == Format::iq3_xxs || format == Format::iq3_s; }
constexpr bool has_words_by_row(Format format) {
  return format == Format::iq2_xxs || format == Format::iq3_xxs;
}
constexpr float iq_unit(Format format) {
  return format == Format::iq3_s ? 1.0f : format == Format::iq3_xxs ? 0.25f : 0.125f;
}
// Offsets in a block, and bytes of the masks of a group.
constexpr int64_t iq_sub_scales_at(Format format) { return format == Format::iq1_m ? 0 : kPanelRows * 2; }
constexpr int64_t iq_mask_bytes(Format format) {
  return format == Format::iq2_s || format == Format::iq3_s ? 16
         : format == Format::iq1_s                          ? 24
         : format == Format::iq1_m                          ? 32
                                                            : 0;
}
constexpr int64_t iq_masks_at(Format format) {
  return quant_format(format).front_bytes - 8 * iq_mask_bytes(format);
}
// Index k of a row: where it lies in 64 bytes or bits.
constexpr int64_t iq_place(Format format, int64_t row, int64_t k) {
  return quant_format(format).parts() == 2 ? row / 4 * 16 + k / 2 * 8 + row % 4 * 2 + k % 2 : 4 * row + k;
}

struct EightSigns {
  uint64_t mask[256];  // 0xFF in each byte whose bit is set
  uint8_t of_seven[128];
};
constexpr EightSigns kEightSigns = [] {
  EightSigns made = {};
  for (int s = 0; s < 256; ++s) {
    for (int j = 0; j < 8; ++j) made.mask[s] |= (s >> j & 1) != 0 ? uint64_t{0xFF} << 8 * j : 0;
  }
  for (int s = 0; s < 128; ++s) made.of_seven[s] = uint8_t(s | __builtin_popcount(unsigned(s)) % 2 << 7);
  return made;
}();

// The entries of a grid as bytes: eight values, in iq3 four, of column 0 in the lowest byte.
template <int kEntries>
struct IqEntries {
  uint64_t bytes[kEntries];
};
template <Format kFormat>
constexpr auto make_iq_entries() {
  constexpr int kEntries = kFormat == Format::iq2_xxs || kFormat == Format::iq3_xxs ? 256
                           : kFormat == Format::iq2_xs || kFormat == Format::iq3_s  ? 512
                           : kFormat == Format::iq2_s                               ? 1024
                                                                                    : 2048;
  IqEntries<kEntries> made = {};
  for (int i = 0; i < kEntries; ++i) {
    for (int j = 0; j < (is_iq3(kFormat) ? 4 : 8); ++j) {
      uint8_t value;
      if constexpr (kFormat == Format::iq3_xxs) {
        value = kIq3XxsValues[kIq3XxsGrid[i] >> 3 * j & 7];
      } else if constexpr (kFormat == Format::iq3_s) {
        value = uint8_t(2 * (kIq3SGrid[i] >> 3 * j & 7) + 1);
      } else if constexpr (is_iq1(kFormat)) {
        value = uint8_t(kIq1Grid[i] >> 2 * j & 3);
      } else {
        const uint16_t* grid = kFormat == Format::iq2_xxs  ? kIq2XxsGrid
                               : kFormat == Format::iq2_xs ? kIq2XsGrid
                                                           : kIq2SGrid;
        value = kIq2Values[grid[i] >> 2 * j & 3];
      }
      made.bytes[i] |= uint64_t(value) << 8 * j;
    }
  }
  return made;
}
template <Format kFormat>
constexpr auto kIqEntries = make_iq_entries<kFormat>();

// One row of a group of an i-quant.
template <Format kFormat>
struct IqRow {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr uint64_t kEachByte = 0x0101010101010101u;

  IqRow(const uint8_t* panel, int64_t at_row, int64_t at_group)
      : block(panel + kQuant.scales_at(at_group)),
        codes(panel + kQuant.quants_at(at_group)),
        row(at_row),
        group(at_group % kQuant.block_groups()) {
    if constexpr (has_words_by_row(kFormat)) {
      word = read_unaligned<uint32_t>(codes + (is_iq3(kFormat) ? 128 : 64) + 4 * row);
    }
  }

  // The bit of a mask that belongs to index k.
  uint32_t mask_bit(int mask, int k) const {
    const uint8_t* masks = block + iq_masks_at(kFormat) + group * iq_mask_bytes(kFormat) + 8 * mask;
    const int64_t place = iq_place(kFormat, row, k);
    return uint32_t(masks[place / 8] >> place % 8 & 1);
  }
  uint32_t index(int k) const {
    uint32_t found = codes[k / 4 * 64 + iq_place(kFormat, row, k % 4)];
    if constexpr (kFormat == Format::iq2_xs) found |= (codes[64 + iq_place(kFormat, row, k)] & 1u) << 8;
    if constexpr (kFormat == Format::iq3_s) found |= mask_bit(k / 4, k % 4) << 8;
    if constexpr (kFormat == Format::iq2_s || is_iq1(kFormat)) {
      for (int m = 0; m < (is_iq1(kFormat) ? 3 : 2); ++m) found |= mask_bit(m, k) << (8 + m);
    }
    return found;
  }
  uint32_t sub_scale(int64_t half) const {
    if constexpr (has_words_by_row(kFormat)) return word >> 28;
    const uint8_t* at = block + iq_sub_scales_at(kFormat);
    if constexpr (kFormat == Format::iq1_m) {
      return read_unaligned<uint32_t>(at + half * kChunkBytes + 4 * row) >> 3 * group & 7;
    }
    const uint32_t nibble = read_unaligned<uint32_t>(at + half * kChunkBytes + 4 * row) >> 4 * group & 15;
    return kFormat == Format::iq1_s ? nibble & 7 : nibble;
  }
  // Whether delta is negative.
  bool is_below(int k) const {
    if constexpr (kFormat == Format::iq1_m) return mask_bit(3, k) != 0;
    const uint32_t nibbles = read_unaligned<uint32_t>(block + iq_sub_scales_at(kFormat) + 4 * row);
    return (nibbles >> (4 * group + 3) & 1) != 0;
  }
  float d() const {
    if constexpr (kFormat == Format::iq1_m) {
      return float_from_f16(uint16_t(block[4 * row + 3] | block[kChunkBytes + 4 * row + 3] << 8));
    } else {
      return float_from_f16(read_unaligned<uint16_t>(block + 2 * row));
    }
  }
  // The codes of columns 8 k to 8 k + 7 in the grid, without signs; iq1: 0, 1, 2.
  uint64_t entry(int k) const {
    if constexpr (is_iq3(kFormat)) {
      return kIqEntries<kFormat>.bytes[index(2 * k)] | kIqEntries<kFormat>.bytes[index(2 * k + 1)] << 32;
    } else {
      return kIqEntries<kFormat>.bytes[index(k)];
    }
  }
  // Columns 8 k to 8 k + 7 as signed bytes.
  uint64_t eight(int k) const {
    if constexpr (is_iq1(kFormat)) {
      // 8 * code - 7 or - 9, without a carry between bytes: 8 * code + 121 or + 119, minus 128.
      return (entry(k) * 8 + kEachByte * (is_below(k) ? 119 : 121)) ^ kEachByte * 0x80;
    } else {
      uint8_t signs;
      if constexpr (has_words_by_row(kFormat)) {
        signs = kEightSigns.of_seven[word >> 7 * k & 127];
      } else if constexpr (kFormat == Format::iq2_xs) {
        signs = kEightSigns.of_seven[codes[64 + iq_place(kFormat, row, k)] >> 1];
      } else {
        signs = codes[(is_iq3(kFormat) ? 128 : 64) + iq_place(kFormat, row, k)];
      }
      // Values are at least 1, so changing a sign carries nothing into the next byte.
      const uint64_t mask = kEightSigns.mask[signs];
      return (entry(k) ^ mask) + (mask & kEachByte);
    }
  }

  const uint8_t *block, *codes;
  int64_t row, group;
  uint32_t word = 0;
};

template <Format kFormat>
  requires(is_iq(kFormat))
struct CodedRow<kFormat> {
  static void quants(const uint8_t* panel, int64_t row, int64_t group, int8_t (&q)[kGroupSize]) {
    const IqRow<kFormat> found(panel, row, group);
    for (int k = 0; k < 4; ++k) {
      const uint64_t eight = found.eight(k);
      std::memcpy(q + 8 * k, &eight, 8);
    }
  }
  static float scale(const uint8_t* panel, int64_t row, int64_t group, int64_t part) {
    const IqRow<kFormat> found(panel, row, group);
    return found.d() * (iq_unit(kFormat) * float(2 * found.sub_scale(part) + 1));
  }
};

// ---- Formats that keep the bytes of the file's blocks ----

template <Format kFormat>
  requires(keeps_blocks(kFormat))
struct CodedRow<kFormat> {
  static constexpr QuantFormat kQuant = quant_format(kFormat);

  static void quants(const uint8_t* panel, int64_t row, int64_t group, int8_t (&q)[kGroupSize]) {
    CodedBlock<kFormat>::quants({panel + kQuant.scales_at(group), row}, group % kQuant.block_groups(), q);
  }
  static float scale(const uint8_t* panel, int64_t row, int64_t group, int64_t part) {
    return CodedBlock<kFormat>::scale({panel + kQuant.scales_at(group), row}, group % kQuant.block_groups(),
                                      part);
  }
};

}  // namespace
}  // namespace argosy
