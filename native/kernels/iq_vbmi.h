// iq_vbmi.h: i-quants with AVX-512 VBMI, VNNI and GFNI: products of a few tokens straight from the codes, and
// the decoding of panels (coded.h).
//
// vpermi2b looks up 64 indices in 128 entries, and leaves an index as it is where its mask is 0: so two
// lookups make one in 256 entries, and blends make it larger. A lookup gives the codes of four columns of an
// entry (iq3: of two); vpermb then turns codes and signs into bytes. It reads six bits of its index and
// ignores the others, so fields are shifted but never cut out.
//
// A byte of the result belongs to one entry, so the four bytes of a dword are columns that lie eight apart
// (iq2_xxs, iq1_s), or four apart in a half group (the others). Direct products take activations in that
// order; decoding puts the bytes in the order of the columns.
#pragma once

#include "kernels/iq_product.h"

namespace argosy {
namespace {

// low[i]: the codes of the first four columns of entry i, two bits each; high[i]: of the last four. iq3:
// low[i]: column 0 in bits 3 to 5 and column 3 in bits 0 to 2; high[i]: columns 1 and 2. values: bytes by
// codes and signs, as IqDecoder::values looks them up.
//
// iq1: three codes are digits to base three in bits 0 to 4, and the fourth is in bits 6 and 7. Bit 5 of
// low[i] says which of the two last halves of u an entry has (iq_grids.h); high has all first ones, then all
// second ones. IqDecoder::values puts the sign of delta in bit 5 (iq1_m).
template <Format kFormat>
struct alignas(64) IqTables {
  static constexpr int kEntries = int(sizeof(kIqEntries<kFormat>) / 8);
  uint8_t low[kEntries];
  uint8_t high[is_iq1(kFormat) ? 256 : kEntries];
  uint8_t values[is_iq1(kFormat) ? 4 : 3][64];
};

template <Format kFormat>
constexpr IqTables<kFormat> iq_tables() {
  using Tables = IqTables<kFormat>;
  constexpr int kZero = quant_format(quant_format(kFormat).wide).zero;
  Tables t = {};
  const auto code = [](int entry, int column) {
    if constexpr (kFormat == Format::iq3_xxs) return kIq3XxsGrid[entry] >> 3 * column & 7;
    if constexpr (kFormat == Format::iq3_s) return kIq3SGrid[entry] >> 3 * column & 7;
    if constexpr (kFormat == Format::iq2_xxs) return kIq2XxsGrid[entry] >> 2 * column & 3;
    if constexpr (kFormat == Format::iq2_xs) return kIq2XsGrid[entry] >> 2 * column & 3;
    if constexpr (kFormat == Format::iq2_s) return kIq2SGrid[entry] >> 2 * column & 3;
    return kIq1Grid[entry] >> 2 * column & 3;
  };
  const auto four = [&](int entry, int first) {
    int codes = 0;
    if constexpr (is_iq1(kFormat)) {
      for (int j = 2; j >= 0; --j) codes = codes * 3 + code(entry, first + j);
      return uint8_t(codes | code(entry, first + 3) << 6);
    }
    for (int j = 0; j < 4; ++j) codes |= code(entry, first + j) << 2 * j;
    return uint8_t(codes);
  };
  for (int i = 0; i < Tables::kEntries; ++i) {
    if constexpr (is_iq3(kFormat)) {
      t.low[i] = uint8_t(code(i, 0) << 3 | code(i, 3));
      t.high[i] = uint8_t(code(i, 1) << 3 | code(i, 2));
    } else {
      t.low[i] = four(i, 0);
      if constexpr (is_iq1(kFormat)) {
        if (i >> 7 >= kIq1From[i & 127]) t.low[i] |= 0x20;
      } else {
        t.high[i] = four(i, 4);
      }
    }
  }
  if constexpr (is_iq1(kFormat)) {
    for (int u = 0; u < 128; ++u) {  // the first and the last entry of u
      t.high[u] = four(u, 4);
      t.high[128 + u] = four(15 << 7 | u, 4);
    }
  }
  const auto byte_of = [&](int of_code, bool is_negative) {
    if constexpr (is_iq1(kFormat)) return uint8_t(kZero + 8 * (of_code - 1) + (is_negative ? -1 : 1));
    const int value = kFormat == Format::iq3_s     ? 2 * of_code + 1
                      : kFormat == Format::iq3_xxs ? kIq3XxsValues[of_code]
                                                   : kIq2Values[of_code];
    return uint8_t(kZero + (is_negative ? -value : value));
  };
  for (int i = 0; i < 64; ++i) {
    if constexpr (is_iq3(kFormat)) {
      t.values[0][i] = byte_of(i >> 3, (i & 1) != 0);
      t.values[1][i] = byte_of(i >> 3, (i & 2) != 0);
      t.values[2][i] = byte_of(i & 7, (i & 8) != 0);
    } else if constexpr (is_iq1(kFormat)) {
      // The fourth comes with bit 5 in front of it.
      const int digits[] = {i % 32 % 3, i % 32 / 3 % 3, i % 32 / 9, i >> 1 & 3};
      for (int j = 0; j < 4; ++j) {
        const bool is_negative = (i & (j < 3 ? 0x20 : 1)) != 0;
        t.values[j][i] = kFormat == Format::iq1_s ? uint8_t(8 * digits[j]) : byte_of(digits[j], is_negative);
      }
    } else {
      for (int j = 0; j < 2; ++j) t.values[j][i] = byte_of(i >> 2 * j & 3, (i >> (4 + j) & 1) != 0);
    }
  }
  return t;
}

template <Format kFormat>
alignas(64) constexpr IqTables<kFormat> kIqTables = iq_tables<kFormat>();

// A matrix of vgf2p8affineqb: bit i of the result is the parity of the bits that rows[i] selects.
constexpr long long bit_matrix(const uint8_t (&rows)[8]) {
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i) matrix |= uint64_t(rows[i]) << 8 * (7 - i);
  return static_cast<long long>(matrix);
}

// Where vpmultishiftqb finds the four fields of each dword.
constexpr Bytes64 fields_of_dwords(int bits, int first) {
  Bytes64 offsets = {};
  for (int i = 0; i < 64; ++i) offsets.at[i] = uint8_t(i / 4 % 2 * 32 + first + bits * (i % 4));
  return offsets;
}
alignas(64) constexpr Bytes64 kSevenBits = fields_of_dwords(7, 0);
alignas(64) constexpr Bytes64 kNibbles[2] = {fields_of_dwords(4, 0), fields_of_dwords(4, 16)};
alignas(64) constexpr Bytes64 kOnes = [] {
  Bytes64 ones = {};
  for (uint8_t& one : ones.at) one = 1;
  return ones;
}();

// For transpose_dwords: the lower or upper halves of the dwords of two vectors, byte by byte; then those of
// the results, in pairs.
constexpr Bytes64 halves_of_dwords(bool is_upper, int bytes) {
  Bytes64 order = {};
  for (int i = 0; i < 64; ++i) {
    const int inside = i % 4, second = inside / bytes % 2;
    const int from = (is_upper ? 2 : 0) + inside / (2 * bytes) * bytes + inside % bytes;
    order.at[i] = uint8_t(i / 4 * 4 + from + 64 * second);
  }
  return order;
}
alignas(64) constexpr Bytes64 kJoinBytes[2] = {halves_of_dwords(false, 1), halves_of_dwords(true, 1)};
alignas(64) constexpr Bytes64 kJoinPairs[2] = {halves_of_dwords(false, 2), halves_of_dwords(true, 2)};

template <Format kFormat>
struct IqDecoder {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr const IqTables<kFormat>& kTables = kIqTables<kFormat>;
  static constexpr bool kIsByEight = kFormat == Format::iq2_xxs || kFormat == Format::iq1_s;
  static constexpr IqOrder kOrder = kIsByEight ? IqOrder::by_eight : IqOrder::by_four;

  // Those of iq1 take longest to decode.
  static constexpr int kMostTokens = is_iq1(kFormat) ? 6 : 12;
  // A group is decoded in steps: the half groups of iq3, or all of it.
  static constexpr int kSteps = is_iq3(kFormat) ? 2 : 1, kStepBytes = 8 / kSteps;

  // The codes of a step, and its signs; iq1_m: ones for each negative delta. Later steps have the signs of
  // step 0.
  struct Codes {
    __m512i low, high, signs;
  };
  [[gnu::always_inline]] static inline Codes look_up(const uint8_t* block, int64_t group, int step) {
    const uint8_t* at = block + kQuant.front_bytes + group * kQuant.group_bytes();
    const uint8_t* masks = block + iq_masks_at(kFormat) + group * iq_mask_bytes(kFormat);
    Codes found;
    look_up(at, masks + 8 * step, load_bytes(at + 64 * step), found.low, found.high);
    if (step > 0 || kFormat == Format::iq1_s) {
      found.signs = _mm512_setzero_si512();
    } else if constexpr (kFormat == Format::iq1_m) {
      found.signs = _mm512_movm_epi8(mask_at(masks + 24));
    } else {
      found.signs = sign_bytes(at);
    }
    return found;
  }

  // The bytes of a step: of a wide panel or, if kHasDeltaByRow, 8 times the codes. bytes[4 q + j] of a group
  // has in byte k of dword r the column 8 k + 4 q + j (kIsByEight) or 16 q + 4 k + j of row r.
  struct Values {
    __m512i bytes[kStepBytes];
  };
  [[gnu::always_inline]] static inline Values values(const Codes& codes, int step) {
    Values found;
    const __m512i low = codes.low, high = codes.high, signs = codes.signs;
    if constexpr (is_iq3(kFormat)) {
      const __m512i nibbles = _mm512_multishift_epi64_epi8(load_bytes(kNibbles[step]), signs);
      const __m512i shifted = _mm512_add_epi8(nibbles, nibbles);
      found.bytes[0] = value(0, pick(low, nibbles, _mm512_set1_epi8(1)));
      found.bytes[1] = value(1, pick(high, nibbles, _mm512_set1_epi8(2)));
      found.bytes[2] = value(2, pick(high, shifted, _mm512_set1_epi8(8)));
      found.bytes[3] = value(2, pick(low, nibbles, _mm512_set1_epi8(8)));
    } else if constexpr (kFormat == Format::iq1_s) {
      put_four_of_iq1(low, found.bytes);
      put_four_of_iq1(high, found.bytes + 4);
    } else if constexpr (kFormat == Format::iq1_m) {
      const __m512i bit_5 = _mm512_set1_epi8(0x20);
      const __m512i first = pick(low, signs, bit_5), last = pick(high, signs, bit_5);
      put_four_of_iq1(_mm512_unpacklo_epi8(first, last), found.bytes);
      put_four_of_iq1(_mm512_unpackhi_epi8(first, last), found.bytes + 4);
    } else {
      const auto lower = [](__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); };
      const auto upper = [](__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); };
      // Those of columns 0 and 1, then of 2 and 3, of the first and of the last four, in bits 4 and 5.
      const __m512i low_01 = _mm512_slli_epi16(signs, 4), low_23 = _mm512_slli_epi16(signs, 2);
      const __m512i high_01 = signs, high_23 = _mm512_srli_epi16(signs, 2);
      if constexpr (kIsByEight) {
        put_four(low, low_01, low_23, found.bytes);
        put_four(high, high_01, high_23, found.bytes + 4);
      } else {
        put_four(lower(low, high), lower(low_01, high_01), lower(low_23, high_23), found.bytes);
        put_four(upper(low, high), upper(low_01, high_01), upper(low_23, high_23), found.bytes + 4);
      }
    }
    return found;
  }

 private:
  // Which indices have bit 7, which have not, and which have bits 8, 9 and 10.
  struct IndexBits {
    __mmask64 is_7, not_7, is[3];
  };
  static __mmask64 mask_at(const uint8_t* from) { return read_unaligned<uint64_t>(from); }
  // Looks up in 128 entries what belongs to them.
  [[gnu::always_inline]] static inline __m512i look_up_128(const uint8_t* table, __m512i so_far,
                                                           __mmask64 some) {
    return _mm512_mask2_permutex2var_epi8(_mm512_load_si512(table), so_far, some,
                                          _mm512_load_si512(table + 64));
  }
  template <int kEntries>
  [[gnu::always_inline]] static inline __m512i look_up_in(const uint8_t* table, __m512i index,
                                                          const IndexBits& bits) {
    if constexpr (kEntries == 256) {
      return look_up_128(table + 128, look_up_128(table, index, bits.not_7), bits.is_7);
    } else {
      constexpr int kHalf = kEntries / 2;
      return _mm512_mask_blend_epi8(bits.is[__builtin_ctz(kHalf) - 8], look_up_in<kHalf>(table, index, bits),
                                    look_up_in<kHalf>(table + kHalf, index, bits));
    }
  }

  [[gnu::always_inline]] static inline void look_up(const uint8_t* at, const uint8_t* masks, __m512i index,
                                                    __m512i& low, __m512i& high) {
    constexpr int kEntries = IqTables<kFormat>::kEntries;
    IndexBits bits;
    bits.is_7 = _mm512_movepi8_mask(index);
    bits.not_7 = _knot_mask64(bits.is_7);
    if constexpr (kFormat == Format::iq2_xs) {
      bits.is[0] = _mm512_test_epi8_mask(load_bytes(at + iq_signs_at(kFormat)), load_bytes(kOnes));
    } else {
#pragma GCC unroll 3
      for (int i = 0; 256 << i < kEntries; ++i) bits.is[i] = mask_at(masks + 8 * i);
    }
    low = look_up_in<kEntries>(kTables.low, index, bits);
    if constexpr (is_iq1(kFormat)) {
      const __mmask64 is_second = _mm512_test_epi8_mask(low, _mm512_set1_epi8(0x20));
      high = look_up_128(kTables.high + 128, look_up_128(kTables.high, index, _knot_mask64(is_second)),
                         is_second);
    } else {
      high = look_up_in<kEntries>(kTables.high, index, bits);
    }
  }

  // Eight signs of each entry in a byte.
  [[gnu::always_inline]] static inline __m512i sign_bytes(const uint8_t* at) {
    const __m512i bytes = load_bytes(at + iq_signs_at(kFormat));
    if constexpr (has_words_by_row(kFormat)) {
      constexpr long long kWithParity = bit_matrix({1, 2, 4, 8, 16, 32, 64, 127});
      const __m512i fields = _mm512_multishift_epi64_epi8(load_bytes(kSevenBits), bytes);
      return _mm512_gf2p8affine_epi64_epi8(fields, _mm512_set1_epi64(kWithParity), 0);
    } else if constexpr (kFormat == Format::iq2_xs) {  // bit 0 belongs to the index
      constexpr long long kWithParity = bit_matrix({2, 4, 8, 16, 32, 64, 128, 254});
      return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(kWithParity), 0);
    } else {
      return bytes;
    }
  }

  [[gnu::always_inline]] static inline __m512i value(int table, __m512i index) {
    return _mm512_permutexvar_epi8(index, _mm512_load_si512(kTables.values[table]));
  }

  // Bits 4 and 5 of signs_01 and of signs_23 are the signs of the first and of the last two of four columns.
  [[gnu::always_inline]] static inline void put_four(__m512i codes, __m512i signs_01, __m512i signs_23,
                                                     __m512i* to) {
    const __m512i upper = _mm512_set1_epi8(int8_t(0xF0));
    const __m512i of_01 = pick(codes, signs_01, upper);
    const __m512i of_23 = pick(_mm512_srli_epi16(codes, 4), signs_23, upper);
    to[0] = value(0, of_01);
    to[1] = value(1, of_01);
    to[2] = value(0, of_23);
    to[3] = value(1, of_23);
  }

  [[gnu::always_inline]] static inline void put_four_of_iq1(__m512i codes, __m512i* to) {
    to[0] = value(0, codes);
    to[1] = value(1, codes);
    to[2] = value(2, codes);
    to[3] = value(3, _mm512_srli_epi16(codes, 5));
  }
};

// Byte j of dword r of to[k] is byte k of dword r of from[j].
[[gnu::always_inline]] inline void transpose_dwords(const __m512i (&from)[4], __m512i (&to)[4]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i order = load_bytes(kJoinBytes[half]);
    const __m512i first = _mm512_permutex2var_epi8(from[0], order, from[1]);
    const __m512i second = _mm512_permutex2var_epi8(from[2], order, from[3]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      to[2 * half + i] = _mm512_permutex2var_epi8(first, load_bytes(kJoinPairs[i]), second);
    }
  }
}

}  // namespace
}  // namespace argosy
