// ik_decode.h: decodes panels of ik_llama.cpp's formats (coded.h), for AVX2 and AVX-512.
//
// A word of a block has the codes of four columns, and those of sixteen rows lie side by side, as they do in
// a chunk of a wide panel. So nothing moves: a chunk is masked words, looked up byte by byte.
#pragma once

#include "kernels/coded_block.h"
#include "kernels/formats.h"

namespace argosy {
namespace {

using BlockWords = uint32_t __attribute__((vector_size(4 * kLanes)));
using BlockHalves = uint16_t __attribute__((vector_size(2 * kLanes)));
using BlockBytes = uint8_t __attribute__((vector_size(4 * kLanes)));

template <class To, class From>
[[gnu::always_inline]] inline To same_bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The blocks of kLanes rows from `first` on.
template <Format kFormat>
struct RowsOfBlock {
  [[gnu::always_inline]] BlockWords first_two() const {
    BlockHalves halves;
    std::memcpy(&halves, block + 2 * first, sizeof halves);
    return __builtin_convertvector(halves, BlockWords);
  }
  [[gnu::always_inline]] BlockWords word(int64_t i) const {
    BlockWords words;
    std::memcpy(&words, block + bytes_before_words(kFormat) * kPanelRows + i * kChunkBytes + 4 * first,
                sizeof words);
    return words;
  }

  const uint8_t* block;
  int64_t first;
};

// The float16 in the lower half of each word.
[[gnu::always_inline]] inline Vec floats_of_halves(BlockWords words) {
  const auto halves = __builtin_convertvector(words, BlockHalves);
  uint8_t bytes[sizeof halves];
  std::memcpy(bytes, &halves, sizeof halves);
  return F16Weights::load(bytes);
}

[[gnu::always_inline]] inline void put_chunk(uint8_t* to, int64_t chunk, BlockWords bytes) {
  std::memcpy(to + chunk * kChunkBytes, &bytes, sizeof bytes);
}

// The values of codes as bytes of a wide panel.
template <int kEntries>
struct IkBytesOf {
  alignas(64) uint8_t bytes[kEntries];
};
template <Format kFormat, int kTable>
constexpr auto kIkBytes = [] {
  constexpr IkValues kValues = ik_values(kFormat);
  constexpr int kEntries = 1 << kValues.bits;
  IkBytesOf<(kEntries < 16 ? 16 : kEntries)> made = {};
  for (int i = 0; i < kEntries; ++i) {
    made.bytes[i] =
        uint8_t(kValues.values[kTable * kEntries + i] + quant_format(quant_format(kFormat).wide).zero);
  }
  return made;
}();

[[gnu::always_inline]] inline BlockBytes look_up_16(const uint8_t* table, BlockBytes index) {
  const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
#if ARGOSY_AVX512
  return same_bits_as<BlockBytes>(
      _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), same_bits_as<__m512i>(index)));
#else
  return same_bits_as<BlockBytes>(
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), same_bits_as<__m256i>(index)));
#endif
}
// vpshufb ignores bits 4 to 6 of an index.
template <int kBits>
[[gnu::always_inline]] inline BlockBytes look_up(const uint8_t* table, BlockBytes index) {
  if constexpr (kBits <= 4) {
    return look_up_16(table, index);
  } else {
    constexpr int kHalf = 1 << (kBits - 1);
    const BlockBytes lower = look_up<kBits - 1>(table, index),
                     upper = look_up<kBits - 1>(table + kHalf, index);
    return (index & uint8_t(kHalf)) != 0 ? upper : lower;
  }
}

// Interleaves the bytes of two vectors: rows with bytes abcd and efgh become aebf and cgdh.
[[gnu::always_inline]] inline void interleave(BlockBytes a, BlockBytes b, BlockWords (&to)[2]) {
#if ARGOSY_AVX512
  const auto as_floats = [](__m512i from) { return _mm512_castsi512_ps(from); };
  const __m512i x = same_bits_as<__m512i>(a), y = same_bits_as<__m512i>(b);
  const __m512 low = as_floats(_mm512_unpacklo_epi8(x, y)), high = as_floats(_mm512_unpackhi_epi8(x, y));
  to[0] = same_bits_as<BlockWords>(_mm512_shuffle_ps(low, high, 0x88));
  to[1] = same_bits_as<BlockWords>(_mm512_shuffle_ps(low, high, 0xDD));
#else
  const auto as_floats = [](__m256i from) { return _mm256_castsi256_ps(from); };
  const __m256i x = same_bits_as<__m256i>(a), y = same_bits_as<__m256i>(b);
  const __m256 low = as_floats(_mm256_unpacklo_epi8(x, y)), high = as_floats(_mm256_unpackhi_epi8(x, y));
  to[0] = same_bits_as<BlockWords>(_mm256_shuffle_ps(low, high, 0x88));
  to[1] = same_bits_as<BlockWords>(_mm256_shuffle_ps(low, high, 0xDD));
#endif
}

// Calls body(rows, to) for kLanes rows at a time of each block: `to` is where the wide panel has their first
// scales.
template <Format kFormat, class Body>
[[gnu::always_inline]] inline void for_rows_of_blocks(const uint8_t* panel, int64_t group_begin,
                                                      int64_t group_end, uint8_t* wide, const Body& body) {
  constexpr QuantFormat kQuant = quant_format(kFormat), kWide = quant_format(kQuant.wide);
  for (int64_t begin = group_begin; begin < group_end; begin += kQuant.block_groups()) {
    for (int64_t first = 0; first < kPanelRows; first += kLanes) {
      body(RowsOfBlock<kFormat>{panel + kQuant.scales_at(begin), first}, wide + 4 * first);
    }
    wide += kQuant.block_groups() * kWide.block_bytes();
  }
}

template <Format kFormat>
  requires(is_ik(kFormat))
struct Decode<kFormat> {
  static constexpr QuantFormat kQuant = quant_format(kFormat), kWide = quant_format(kQuant.wide);
  static constexpr IkValues kValues = ik_values(kFormat);

  static void run(const uint8_t* panel, int64_t group_begin, int64_t group_end, uint8_t* wide) {
    for_rows_of_blocks<kFormat>(panel, group_begin, group_end, wide, [](const auto& rows, uint8_t* to) {
      Vec d = broadcast(1.0f);
      if constexpr (!kQuant.has_row_scale) d = floats_of_halves(ik_d<kFormat>(rows));
      for (int group = 0; group < kQuant.block_groups(); ++group, to += kWide.block_bytes()) {
        BlockWords step[2];
        for (int part = 0; part < kQuant.parts(); ++part) {
          using Integers = int32_t __attribute__((vector_size(4 * kLanes)));
          const auto integers = same_bits_as<Integers>(ik_sub_scale<kFormat>(rows, group, part));
          store(reinterpret_cast<float*>(to + part * kChunkBytes),
                mul(d, __builtin_convertvector(integers, Vec)));
          step[part] = (0u - ik_table<kFormat>(rows, group, part)) & uint32_t(kValues.step) * 0x01010101u;
        }
        put_chunks(rows, group, step, to + kWide.block_scale_bytes());
      }
    });
  }

 private:
  [[gnu::always_inline]] static void put_chunks(const RowsOfBlock<kFormat>& rows, int group,
                                                const BlockWords (&step)[2], uint8_t* to) {
    const auto look_up_in = [&]<int kTable>(Number<kTable>, int chunk) {
      return look_up<kValues.bits>(kIkBytes<kFormat, kTable>.bytes,
                                   same_bits_as<BlockBytes>(ik_codes<kFormat>(rows, group, chunk)));
    };
    if constexpr (kFormat == Format::iq2_kl) {
#pragma GCC unroll 4
      for (int chunk = 0; chunk < 4; ++chunk) {
        BlockWords both[2];
        interleave(look_up_in(Number<0>{}, chunk), look_up_in(Number<1>{}, chunk), both);
        put_chunk(to, 2 * chunk, both[0]);
        put_chunk(to, 2 * chunk + 1, both[1]);
      }
    } else {
#pragma GCC unroll 8
      for (int chunk = 0; chunk < 8; ++chunk) {
        // No byte carries: the largest value plus the step is below 256.
        put_chunk(to, chunk,
                  same_bits_as<BlockWords>(look_up_in(Number<0>{}, chunk)) +
                      step[kQuant.parts() == 2 ? chunk / 4 : 0]);
      }
    }
  }
};

template <>
struct Decode<Format::q1_0> {
  static constexpr QuantFormat kQuant = quant_format(Format::q1_0), kWide = quant_format(kQuant.wide);

  static void run(const uint8_t* panel, int64_t group_begin, int64_t group_end, uint8_t* wide) {
    for_rows_of_blocks<Format::q1_0>(panel, group_begin, group_end, wide, [](const auto& rows, uint8_t* to) {
      const Vec d = floats_of_halves(rows.first_two());
      for (int64_t group = 0; group < kQuant.block_groups(); ++group, to += kWide.block_bytes()) {
        store(reinterpret_cast<float*>(to), d);
        BlockWords bits = rows.word(group);
        for (int64_t chunk = 0; chunk < 8; ++chunk, bits >>= 4) {
          const BlockWords spread =
              (bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21;  // a bit in each byte
          put_chunk(to + kWide.block_scale_bytes(), chunk,
                    2u * spread + uint32_t(kWide.zero - 1) * 0x01010101u);
        }
      }
    });
  }
};

template <>
struct Decode<Format::tq1_0> {
  static constexpr QuantFormat kQuant = quant_format(Format::tq1_0), kWide = quant_format(kQuant.wide);

  static void run(const uint8_t* panel, int64_t group_begin, int64_t group_end, uint8_t* wide) {
    for_rows_of_blocks<Format::tq1_0>(panel, group_begin, group_end, wide, [](const auto& rows, uint8_t* to) {
      const Vec d = floats_of_halves(rows.word(12) >> 16);
      for (int64_t group = 0; group < kQuant.block_groups(); ++group) {
        store(reinterpret_cast<float*>(to + group * kWide.block_bytes()), d);
      }
      for (int64_t i = 0; i < 13; ++i) {
        // Bytes 4 i to 4 i + 3; the words begin after two bytes.
        const BlockWords before = i == 0 ? rows.first_two() : rows.word(i - 1) >> 16;
        put_trits(before | rows.word(i) << 16, i, to);
      }
    });
  }

 private:
  // The columns of four bytes: 8, 4 or 1 chunks lie between those of two digits.
  [[gnu::always_inline]] static void put_trits(BlockWords word, int64_t i, uint8_t* to) {
    const int64_t first_chunk = i < 8 ? i : i < 12 ? 40 + i - 8 : 60, step = i < 8 ? 8 : i < 12 ? 4 : 1;
    BlockBytes rest = same_bits_as<BlockBytes>(word);
    for (int64_t digit = 0; digit < (i < 12 ? 5 : 4); ++digit) {
      const int64_t chunk = first_chunk + digit * step;
      // 3 * rest / 256; a comparison that holds is -1.
      const auto trits = uint8_t(kWide.zero - 1) - same_bits_as<BlockBytes>(rest >= uint8_t(86)) -
                         same_bits_as<BlockBytes>(rest >= uint8_t(171));
      put_chunk(to + chunk / 8 * kWide.block_bytes() + kWide.block_scale_bytes(), chunk % 8,
                same_bits_as<BlockWords>(trits));
      rest = rest + rest + rest;
    }
  }
};

}  // namespace
}  // namespace argosy
