// iq_avx512.h: i-quants with AVX-512 BW and VNNI, without VBMI: few tokens straight from the codes, and the
// decoding of panels (iq_product.h).
//
// Grids of up to 512 entries: vpermi2w looks up 32 indices in 64 words of a table, and each word has all
// codes of an entry. vpshufb then turns codes and signs into bytes. Larger grids do not fit in registers: 8
// bytes of each entry are loaded, and vpsubb changes their signs where a mask says so.
#pragma once

#include "kernels/iq_product.h"

namespace argosy {
namespace {

[[gnu::always_inline]] inline void transpose_dwords(const __m512i (&from)[4], __m512i (&to)[4]) {
  __m512i even[2], odd[2];  // bytes 0 and 2, and bytes 1 and 3, of two vectors
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i a = from[2 * i], b = from[2 * i + 1];
    even[i] = _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, a, _mm512_slli_epi16(b, 8));
    odd[i] = _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, _mm512_srli_epi16(a, 8), b);
  }
  to[0] = _mm512_mask_blend_epi16(0xAAAAAAAA, even[0], _mm512_slli_epi32(even[1], 16));
  to[1] = _mm512_mask_blend_epi16(0xAAAAAAAA, odd[0], _mm512_slli_epi32(odd[1], 16));
  to[2] = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(even[0], 16), even[1]);
  to[3] = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(odd[0], 16), odd[1]);
}

inline __m512i lower_bytes(__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); }
inline __m512i upper_bytes(__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); }
inline __m512i broadcast_lane(const uint8_t* lane) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lane)));
}

struct Bytes16 {
  uint8_t at[16];
};
// Moves the bytes of four rows from place 4 r + k to where formats with two parts have them (iq_place).
alignas(16) constexpr Bytes16 kPlacesByHalf = [] {
  Bytes16 from = {};
  for (int row = 0; row < 4; ++row) {
    for (int k = 0; k < 4; ++k) from.at[iq_place(Format::iq2_s, row, k)] = uint8_t(4 * row + k);
  }
  return from;
}();
// 0x80 where the number of bits is odd.
alignas(16) constexpr Bytes16 kOddBits = [] {
  Bytes16 odd = {};
  for (int i = 0; i < 16; ++i) odd.at[i] = uint8_t(__builtin_popcount(unsigned(i)) % 2 << 7);
  return odd;
}();

// Sets the eighth sign of seven, so that their number is even.
inline __m512i with_eighth(__m512i signs) {
  const __m512i nibbles =
      _mm512_and_si512(_mm512_xor_si512(signs, _mm512_srli_epi16(signs, 4)), _mm512_set1_epi8(0xF));
  return _mm512_or_si512(signs, _mm512_shuffle_epi8(broadcast_lane(kOddBits.at), nibbles));
}
// The eight signs of each entry, at its place, from words by row.
inline __m512i signs_of_words(__m512i words) {
  __m512i found = _mm512_and_si512(words, _mm512_set1_epi32(0x7F));
  const auto add = [&](__m512i field, int mask) {  // found | (field & mask)
    found = _mm512_ternarylogic_epi32(found, field, _mm512_set1_epi32(mask), 0xF8);
  };
  add(_mm512_slli_epi32(words, 1), 0x7F00);
  add(_mm512_slli_epi32(words, 2), 0x7F0000);
  add(_mm512_slli_epi32(words, 3), 0x7F000000);
  return with_eighth(found);
}

// The codes of all columns of an entry in a word, each where vpshufb wants it: iq2: two bits a column, the
// first four in the low byte; iq3: columns 0 and 1 in the low nibbles of both bytes, 2 and 3 in the high
// ones. values: bytes by code and sign.
template <Format kFormat>
struct alignas(64) IqWords {
  static constexpr int kEntries = int(sizeof(kIqEntries<kFormat>) / 8);
  uint16_t codes[kEntries];
  uint8_t values[2][16];
};
template <Format kFormat>
alignas(64) constexpr IqWords<kFormat> kIqWords = [] {
  constexpr int kZero = quant_format(quant_format(kFormat).wide).zero;
  IqWords<kFormat> made = {};
  for (int i = 0; i < IqWords<kFormat>::kEntries; ++i) {
    if constexpr (is_iq3(kFormat)) {
      const int codes = kFormat == Format::iq3_s ? kIq3SGrid[i] : kIq3XxsGrid[i];
      for (int j = 0; j < 4; ++j) made.codes[i] |= uint16_t((codes >> 3 * j & 7) << (j % 2 * 8 + j / 2 * 4));
    } else {
      made.codes[i] = kFormat == Format::iq2_xs ? kIq2XsGrid[i] : kIq2XxsGrid[i];
    }
  }
  for (int i = 0; i < 16; ++i) {
    const auto put = [&](int table, int value, bool is_negative) {
      made.values[table][i] = uint8_t(kZero + (is_negative ? -value : value));
    };
    if constexpr (is_iq3(kFormat)) {
      put(0, kFormat == Format::iq3_s ? 2 * (i & 7) + 1 : kIq3XxsValues[i & 7], (i & 8) != 0);
    } else {
      put(0, kIq2Values[i & 3], (i & 4) != 0);
      put(1, kIq2Values[i & 3], (i & 8) != 0);
    }
  }
  return made;
}();

// Looks up words of at least 256 entries.
template <int kEntries>
[[gnu::always_inline]] inline __m512i look_up_words(const uint16_t* table, __m512i index) {
  if constexpr (kEntries == 128) {
    const __mmask32 is_6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __m512i first = _mm512_mask2_permutex2var_epi16(_mm512_load_si512(table), index, _knot_mask32(is_6),
                                                          _mm512_load_si512(table + 32));
    return _mm512_mask2_permutex2var_epi16(_mm512_load_si512(table + 64), first, is_6,
                                           _mm512_load_si512(table + 96));
  } else {
    constexpr int kHalf = kEntries / 2;
    const __mmask32 is_upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(kHalf));
    return _mm512_mask_blend_epi16(is_upper, look_up_words<kHalf>(table, index),
                                   look_up_words<kHalf>(table + kHalf, index));
  }
}

// iq2_xxs, iq2_xs: dword r of the words of a half group has both entries of row r.
template <Format kFormat>
  requires(kFormat == Format::iq2_xxs || kFormat == Format::iq2_xs)
struct IqDecoder<kFormat> {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr IqOrder kOrder = IqOrder::by_four;
  static constexpr int kMostTokens = kFormat == Format::iq2_xxs ? 12 : 6;
  static constexpr int kSteps = 1, kStepBytes = 8;

  struct Codes {
    __m512i words[2], signs;
  };
  [[gnu::always_inline]] static inline Codes look_up(const uint8_t* block, int64_t group, int) {
    const uint8_t* at = block + kQuant.front_bytes + group * kQuant.group_bytes();
    __m512i index = load_bytes(at), high = _mm512_setzero_si512();
    Codes found;
    if constexpr (kFormat == Format::iq2_xxs) {
      const __m512i places = broadcast_lane(kPlacesByHalf.at);
      index = _mm512_shuffle_epi8(index, places);
      found.signs = _mm512_shuffle_epi8(signs_of_words(load_bytes(at + iq_signs_at(kFormat))), places);
    } else {
      const __m512i second = load_bytes(at + iq_signs_at(kFormat));
      high = _mm512_and_si512(second, _mm512_set1_epi8(1));
      found.signs = with_eighth(_mm512_and_si512(_mm512_srli_epi16(second, 1), _mm512_set1_epi8(0x7F)));
    }
    constexpr int kEntries = IqWords<kFormat>::kEntries;
    found.words[0] = look_up_words<kEntries>(kIqWords<kFormat>.codes, lower_bytes(index, high));
    found.words[1] = look_up_words<kEntries>(kIqWords<kFormat>.codes, upper_bytes(index, high));
    return found;
  }

  struct Values {
    __m512i bytes[8];
  };
  [[gnu::always_inline]] static inline Values values(const Codes& codes, int) {
    Values found;
    const __m512i nibble = _mm512_set1_epi8(0xF), two_bits = _mm512_set1_epi8(3);
    const __m512i first = _mm512_and_si512(codes.signs, nibble);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi16(codes.signs, 4), nibble);
    const __m512i tables[2] = {broadcast_lane(kIqWords<kFormat>.values[0]),
                               broadcast_lane(kIqWords<kFormat>.values[1])};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i words = codes.words[half];
      const __m512i signs = half == 0 ? lower_bytes(first, last) : upper_bytes(first, last);
      const auto value = [&](int table, __m512i code, __m512i sign) {
        return _mm512_shuffle_epi8(tables[table], pick(sign, code, two_bits));
      };
      found.bytes[4 * half] = value(0, words, _mm512_slli_epi16(signs, 2));
      found.bytes[4 * half + 1] = value(0, _mm512_srli_epi16(words, 2), _mm512_slli_epi16(signs, 1));
      found.bytes[4 * half + 2] = value(0, _mm512_srli_epi16(words, 4), signs);
      found.bytes[4 * half + 3] = value(1, _mm512_srli_epi16(words, 6), signs);
    }
    return found;
  }
};

// iq3: a step is a half group. Dword r of a vector of words has two entries of row r, eight columns; its low
// nibbles are columns 0, 1, 4 and 5, its high ones the others.
template <Format kFormat>
  requires(is_iq3(kFormat))
struct IqDecoder<kFormat> {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr IqOrder kOrder = IqOrder::by_pairs;
  static constexpr int kMostTokens = 6;
  static constexpr int kSteps = 2, kStepBytes = 4;

  struct Codes {
    __m512i words[2], signs;
  };
  [[gnu::always_inline]] static inline Codes look_up(const uint8_t* block, int64_t group, int step) {
    const uint8_t* at = block + kQuant.front_bytes + group * kQuant.group_bytes();
    const __m512i places = broadcast_lane(kPlacesByHalf.at);
    const __m512i index = _mm512_shuffle_epi8(load_bytes(at + 64 * step), places);
    __m512i high = _mm512_setzero_si512();
    if constexpr (kFormat == Format::iq3_s) {
      const uint8_t* masks = block + iq_masks_at(kFormat) + group * iq_mask_bytes(kFormat) + 8 * step;
      high = _mm512_shuffle_epi8(_mm512_maskz_set1_epi8(read_unaligned<uint64_t>(masks), 1), places);
    }
    constexpr int kEntries = IqWords<kFormat>::kEntries;
    Codes found;
    found.words[0] = look_up_words<kEntries>(kIqWords<kFormat>.codes, lower_bytes(index, high));
    found.words[1] = look_up_words<kEntries>(kIqWords<kFormat>.codes, upper_bytes(index, high));
    found.signs = load_bytes(at + iq_signs_at(kFormat));
    if (has_words_by_row(kFormat) && step == 0) found.signs = signs_of_words(found.signs);
    return found;
  }

  struct Values {
    __m512i bytes[4];
  };
  [[gnu::always_inline]] static inline Values values(const Codes& codes, int step) {
    const __m512i magnitudes = broadcast_lane(kIqWords<kFormat>.values[0]);
    const __m512i twice_zero = _mm512_set1_epi8(int8_t(2 * quant_format(kQuant.wide).zero));
    Values found;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      // The signs of the eight columns, in all bytes of a dword.
      const __m512i signs = _mm512_shuffle_epi8(codes.signs, broadcast_lane(kEighths[2 * step + i].at));
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        // A code has three bits, so vpshufb reads a nibble as it is.
        const __m512i nibbles = pair == 0 ? codes.words[i] : _mm512_srli_epi16(codes.words[i], 4);
        const __m512i value = _mm512_shuffle_epi8(magnitudes, nibbles);
        const __mmask64 is_negative =
            _mm512_test_epi8_mask(signs, _mm512_set1_epi32(pair == 0 ? 0x20100201 : int32_t(0x80400804)));
        found.bytes[2 * i + pair] = _mm512_mask_sub_epi8(value, is_negative, twice_zero, value);
      }
    }
    return found;
  }

 private:
  static constexpr Bytes16 every_fourth(int from) {
    Bytes16 order = {};
    for (int i = 0; i < 16; ++i) order.at[i] = uint8_t(i / 4 * 4 + from);
    return order;
  }
  alignas(64) static constexpr Bytes16 kEighths[4] = {every_fourth(0), every_fourth(1), every_fourth(2),
                                                      every_fourth(3)};
};

// The bytes of each entry: of a wide panel without the sign, or with a positive delta; iq1_s: 8 times the
// codes.
template <Format kFormat>
struct alignas(64) IqEights {
  static constexpr int kEntries = int(sizeof(kIqEntries<kFormat>) / 8);
  uint64_t bytes[kEntries];
};
template <Format kFormat>
alignas(64) constexpr IqEights<kFormat> kIqEights = [] {
  constexpr uint64_t kEachByte = 0x0101010101010101;
  constexpr int kZero = quant_format(quant_format(kFormat).wide).zero;
  IqEights<kFormat> made = {};
  for (int i = 0; i < IqEights<kFormat>::kEntries; ++i) {
    const uint64_t entry = kIqEntries<kFormat>.bytes[i];
    made.bytes[i] = kFormat == Format::iq1_s   ? 8 * entry
                    : kFormat == Format::iq1_m ? 8 * entry + kEachByte * uint64_t(kZero - 7)
                                               : entry + kEachByte * uint64_t(kZero);
  }
  return made;
}();

// From the places of formats with two parts to masks of [entry][pair of rows of four][pair of four][row]:
// first in each lane, then pairs of bytes across lanes.
alignas(16) constexpr Bytes16 kEntriesOfLanes = [] {
  Bytes16 from = {};
  for (int i = 0; i < 16; ++i) {
    const int k = i / 4, row = i % 4;
    from.at[i] = uint8_t(iq_place(Format::iq2_s, row, k));
  }
  return from;
}();
struct alignas(64) Words32 {
  uint16_t at[32];
};
constexpr Words32 kEntriesOfAll = [] {
  Words32 from = {};
  for (int i = 0; i < 32; ++i) from.at[i] = uint16_t(i % 4 * 8 + i / 4);
  return from;
}();

// The others: a vector gets the eight bytes of an entry for rows 0, 1, 4, 5, 8, 9, 12, 13, or for those
// between.
template <Format kFormat>
  requires(kFormat == Format::iq2_s || is_iq1(kFormat))
struct IqDecoder<kFormat> {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr IqOrder kOrder = IqOrder::by_column;
  static constexpr int kMostTokens = 6;
  static constexpr int kSteps = 1, kStepBytes = 8;

  // indices[half]: in 64 bits, entries 2 half and 2 half + 1 of two rows.
  struct Codes {
    __m512i indices[2], signs;
  };
  [[gnu::always_inline]] static inline Codes look_up(const uint8_t* block, int64_t group, int) {
    const uint8_t* at = block + kQuant.front_bytes + group * kQuant.group_bytes();
    const uint8_t* masks = block + iq_masks_at(kFormat) + group * iq_mask_bytes(kFormat);
    const auto mask = [&](int number) { return read_unaligned<uint64_t>(masks + 8 * number); };
    __m512i index = load_bytes(at), high = _mm512_maskz_set1_epi8(mask(0), 1);
    high = _mm512_mask_add_epi8(high, mask(1), high, _mm512_set1_epi8(2));
    if constexpr (is_iq1(kFormat)) high = _mm512_mask_add_epi8(high, mask(2), high, _mm512_set1_epi8(4));
    if constexpr (kFormat == Format::iq1_s) {
      index = _mm512_shuffle_epi8(index, broadcast_lane(kPlacesByHalf.at));
      high = _mm512_shuffle_epi8(high, broadcast_lane(kPlacesByHalf.at));
    }
    Codes found;
    found.indices[0] = lower_bytes(index, high);
    found.indices[1] = upper_bytes(index, high);
    found.signs = _mm512_setzero_si512();
    if constexpr (kFormat == Format::iq2_s) found.signs = load_bytes(at + iq_signs_at(kFormat));
    if constexpr (kFormat == Format::iq1_m) found.signs = _mm512_movm_epi8(mask(3));
    return found;
  }

  struct Values {
    __m512i bytes[8];
  };
  [[gnu::always_inline]] static inline Values values(const Codes& codes, int) {
    alignas(64) uint64_t signs[8];
    if constexpr (kFormat != Format::iq1_s) {
      const __m512i of_lanes = _mm512_shuffle_epi8(codes.signs, broadcast_lane(kEntriesOfLanes.at));
      _mm512_store_si512(signs, _mm512_permutexvar_epi16(_mm512_load_si512(kEntriesOfAll.at), of_lanes));
    }
    Values found;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i rows[2][2];  // [entry][pair of rows]
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        __m128i lanes[2][4];
#pragma GCC unroll 4
        for (int lane = 0; lane < 4; ++lane) {
          const uint64_t four = lane_of(codes.indices[half], lane, pair);
          lanes[0][lane] = two_entries(four & 0xFFFF, four >> 32 & 0xFFFF);
          lanes[1][lane] = two_entries(four >> 16 & 0xFFFF, four >> 48);
        }
#pragma GCC unroll 2
        for (int entry = 0; entry < 2; ++entry) {
          __m512i bytes = join(lanes[entry]);
          if constexpr (kFormat != Format::iq1_s) {
            const __mmask64 is_negative = signs[4 * half + 2 * entry + pair];
            if constexpr (kFormat == Format::iq1_m) {
              bytes = _mm512_mask_sub_epi8(bytes, is_negative, bytes, _mm512_set1_epi8(2));
            } else {
              const __m512i twice_zero = _mm512_set1_epi8(int8_t(2 * quant_format(kQuant.wide).zero));
              bytes = _mm512_mask_sub_epi8(bytes, is_negative, twice_zero, bytes);
            }
          }
          rows[entry][pair] = bytes;
        }
      }
#pragma GCC unroll 2
      for (int entry = 0; entry < 2; ++entry) {
        const __m512 a = _mm512_castsi512_ps(rows[entry][0]), b = _mm512_castsi512_ps(rows[entry][1]);
        found.bytes[4 * half + 2 * entry] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
        found.bytes[4 * half + 2 * entry + 1] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD));
      }
    }
    return found;
  }

 private:
  [[gnu::always_inline]] static inline uint64_t lane_of(__m512i words, int lane, int pair) {
    const __m128i found = lane == 0   ? _mm512_castsi512_si128(words)
                          : lane == 1 ? _mm512_extracti32x4_epi32(words, 1)
                          : lane == 2 ? _mm512_extracti32x4_epi32(words, 2)
                                      : _mm512_extracti32x4_epi32(words, 3);
    return uint64_t(pair == 0 ? _mm_cvtsi128_si64(found) : _mm_extract_epi64(found, 1));
  }
  [[gnu::always_inline]] static inline __m128i two_entries(uint64_t first, uint64_t second) {
    const uint64_t* bytes = kIqEights<kFormat>.bytes;
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + first));
    return _mm_castps_si128(
        _mm_loadh_pi(_mm_castsi128_ps(low), reinterpret_cast<const __m64*>(bytes + second)));
  }
  [[gnu::always_inline]] static inline __m512i join(const __m128i (&lanes)[4]) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lanes[0]), lanes[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lanes[2]), lanes[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
};

}  // namespace
}  // namespace argosy
