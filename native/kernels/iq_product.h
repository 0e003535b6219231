// iq_product.h: products of i-quants with a few tokens, straight from their codes; for AVX-512.
//
// IqDecoder<kFormat> (iq_vbmi.h, iq_avx512.h) decodes a group of sixteen rows into eight vectors, and each is
// multiplied with all tokens at once. Their columns are not in order, so the thread's scratch gets the
// activations in the order of the decoder, and next to them what else a group needs of a token.
#pragma once

#include "kernels/coded.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {

// The decoder of an instruction set:
//   look_up(block, group, step)   finds the codes of a step, which is all of a group or half of it
//   kMostTokens                   with more, products are faster by way of the scratch
//   values(codes, step)           makes bytes of them: of a wide panel or, if kHasDeltaByRow, 8 times the
//   codes
// Dword r of vector i of a group belongs to row r, and to the columns of dword i in the decoder's order.
template <Format kFormat>
struct IqDecoder;
[[gnu::always_inline]] inline void transpose_dwords(const __m512i (&from)[4], __m512i (&to)[4]);

// Whether all values of a row have the same delta: their zero is then 8 minus delta.
template <Format kFormat>
constexpr bool kHasDeltaByRow = kFormat == Format::iq1_s;

struct Bytes64 {
  uint8_t at[64];
};
inline __m512i load_bytes(const Bytes64& from) { return _mm512_loadu_si512(&from); }
inline __m512i load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }

// Where signs, or words by row, lie in a group.
constexpr int64_t iq_signs_at(Format format) { return is_iq3(format) ? 128 : 64; }

// mask ? b : a, for each bit
inline __m512i pick(__m512i a, __m512i b, __m512i mask) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xD8);
}

// The scales of a block, one group after another.
template <Format kFormat>
struct IqScales {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr int kParts = kQuant.parts();

  [[gnu::always_inline]] explicit IqScales(const uint8_t* block) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      subs[part] = has_words_by_row(kFormat) ? _mm512_setzero_si512()
                                             : load_bytes(block + iq_sub_scales_at(kFormat) + 64 * part);
    }
    if constexpr (kFormat == Format::iq1_m) {  // the top bytes of the words of both halves
      const __m512i bits = pick(_mm512_srli_epi32(subs[kParts - 1], 16), _mm512_srli_epi32(subs[0], 24),
                                _mm512_set1_epi32(0xFF));
      d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
    } else {
      d = F16Weights::load(block);
    }
  }
  // iq1_s: the rows whose delta is negative in the next group.
  [[gnu::always_inline]] __mmask16 is_below() const {
    return _mm512_test_epi32_mask(subs[0], _mm512_set1_epi32(8));
  }
  // The scales of each part of the next group, which is number `group` of the block.
  [[gnu::always_inline]] void take(const uint8_t* block, int64_t group, Vec (&found)[kParts]) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      __m512i sub = subs[part];
      if constexpr (has_words_by_row(kFormat)) {
        const uint8_t* at = block + kQuant.front_bytes + group * kQuant.group_bytes();
        sub = _mm512_srli_epi32(load_bytes(at + iq_signs_at(kFormat)), 28);
      } else {
        subs[part] = _mm512_srli_epi32(sub, kFormat == Format::iq1_m ? 3 : 4);
      }
      found[part] = mul(_mm512_permutexvar_ps(sub, _mm512_load_ps(kTable.scale)), d);
    }
  }

  Vec d;
  __m512i subs[kParts];  // each group shifts them on to the next

 private:
  struct alignas(64) Table {
    float scale[16];
  };
  static constexpr Table kTable = [] {
    Table table = {};
    for (int s = 0; s < 16; ++s)  // iq1: the fourth bit belongs to something else
      table.scale[s] = iq_unit(kFormat) * float(2 * (is_iq1(kFormat) ? s & 7 : s) + 1);
    return table;
  }();
};

// Dword i of the activations of a group.
enum class IqOrder {
  by_column,  // columns 4 i to 4 i + 3
  by_pairs,   // of the eight columns i / 2: 2 (i % 2), the next, 4 + 2 (i % 2), the next
  by_eight,   // columns i, 8 + i, 16 + i, 24 + i
  by_four     // of the half group i / 4: columns i % 4, 4 + i % 4, 8 + i % 4, 12 + i % 4
};

// Each lane of 16 columns in the order of dwords, or with columns i and 8 + i side by side; those of two
// lanes then meet in pairs.
constexpr Bytes64 order_in_lanes(IqOrder order) {
  Bytes64 from = {};
  for (int i = 0; i < 64; ++i) {
    from.at[i] = uint8_t(order == IqOrder::by_four    ? i % 4 * 4 + i % 16 / 4
                         : order == IqOrder::by_pairs ? i / 8 % 2 * 8 + i / 4 % 2 * 2 + i / 2 % 2 * 4 + i % 2
                                                      : i % 2 * 8 + i % 16 / 2);
  }
  return from;
}
alignas(64) constexpr Bytes64 kByPairs = order_in_lanes(IqOrder::by_pairs);
alignas(64) constexpr Bytes64 kByFour = order_in_lanes(IqOrder::by_four);
alignas(64) constexpr Bytes64 kPairsByEight = order_in_lanes(IqOrder::by_eight);
alignas(64) constexpr Bytes64 kPairsOfLanes = [] {
  Bytes64 from = {};
  for (int i = 0; i < 32; ++i) from.at[2 * i] = uint8_t(i / 16 * 16 + i % 2 * 8 + i % 16 / 2);
  return from;
}();
template <IqOrder kOrder>
inline __m512i in_order(__m512i two_groups) {
  if constexpr (kOrder == IqOrder::by_column) return two_groups;
  if constexpr (kOrder == IqOrder::by_pairs) return _mm512_shuffle_epi8(two_groups, load_bytes(kByPairs));
  if constexpr (kOrder == IqOrder::by_four) return _mm512_shuffle_epi8(two_groups, load_bytes(kByFour));
  return _mm512_permutexvar_epi16(load_bytes(kPairsOfLanes),
                                  _mm512_shuffle_epi8(two_groups, load_bytes(kPairsByEight)));
}

template <Format kFormat>
  requires(is_iq(kFormat))
struct Decode<kFormat> {
  using Decoder = IqDecoder<kFormat>;
  static constexpr QuantFormat kQuant = quant_format(kFormat), kWide = quant_format(kQuant.wide);
  static constexpr int kParts = kQuant.parts();

  static void run(const uint8_t* panel, int64_t group_begin, int64_t group_end, uint8_t* wide) {
    for (int64_t begin = group_begin; begin < group_end; begin += kQuant.block_groups()) {
      const uint8_t* block = panel + kQuant.scales_at(begin);
      IqScales<kFormat> scales(block);
      for (int64_t group = 0; group < kQuant.block_groups() && begin + group < group_end; ++group) {
        __m512i bytes[2][4];
        typename Decoder::Codes codes = {};
#pragma GCC unroll 2
        for (int step = 0; step < Decoder::kSteps; ++step) {
          const __m512i signs = codes.signs;
          codes = Decoder::look_up(block, group, step);
          if (step > 0) codes.signs = signs;
          const auto values = Decoder::values(codes, step);
#pragma GCC unroll 8
          for (int i = 0; i < Decoder::kStepBytes; ++i) {
            const int number = step * Decoder::kStepBytes + i;
            bytes[number / 4][number % 4] = values.bytes[i];
          }
        }
        const __m512i zero =
            kHasDeltaByRow<kFormat>
                ? _mm512_mask_blend_epi32(scales.is_below(), _mm512_set1_epi8(kWide.zero - 7),
                                          _mm512_set1_epi8(kWide.zero - 9))
                : _mm512_setzero_si512();
        Vec scale[kParts];
        scales.take(block, group, scale);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          store(reinterpret_cast<float*>(wide) + part * kPanelRows, scale[part]);
        }
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          __m512i chunks[4];
          if constexpr (Decoder::kOrder == IqOrder::by_column) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) chunks[i] = bytes[q][i];
          } else if constexpr (Decoder::kOrder == IqOrder::by_pairs) {
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
              const __m512i first = bytes[q][i], second = bytes[q][i + 1];
              chunks[i] = _mm512_mask_blend_epi16(0xAAAAAAAA, first, _mm512_slli_epi32(second, 16));
              chunks[i + 1] = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(first, 16), second);
            }
          } else {
            transpose_dwords(bytes[q], chunks);
          }
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const int chunk = Decoder::kOrder == IqOrder::by_eight ? 2 * i + q : 4 * q + i;
            if constexpr (kHasDeltaByRow<kFormat>) chunks[i] = _mm512_add_epi8(chunks[i], zero);
            _mm512_storeu_si512(wide + kWide.block_scale_bytes() + chunk * kChunkBytes, chunks[i]);
          }
        }
        wide += kWide.block_bytes();
      }
    }
  }
};

// A group of one token.
struct IqActivations {
  int8_t x[kGroupSize];
  int32_t offset[2];  // what a dot product of each part begins with, which removes the zero of the bytes
  float scale;
};

// Writes groups [begin, end) of all tokens: [group][token]. If kHasDeltaByRow, offset[0] is that of a
// positive delta, and offset[1] is added for a negative one.
template <Format kFormat, int kTokens>
void put_activations(const MatmulArgs& a, int64_t begin, int64_t end, IqActivations* to) {
  using Decoder = IqDecoder<kFormat>;
  constexpr QuantFormat kQuant = quant_format(kFormat);
  constexpr Format kWide = kQuant.wide;
  constexpr int kParts = kQuant.parts();
  constexpr int32_t kZero = kHasDeltaByRow<kFormat> ? 7 : quant_format(kWide).zero;
  for (int token = 0; token < kTokens; ++token) {
    const uint8_t* x = activation_row(a, token);
    const uint8_t* scales = x + activation_scales_at(kWide, a.cols);
    const uint8_t* negated = x + activation_negated_sums_at(kWide, a.cols);
    for (int64_t group = begin; group < end; group += 2) {  // a block has eight
      const __m512i two = in_order<Decoder::kOrder>(load_bytes(x + group * kGroupSize));
      const __m256i each[2] = {_mm512_castsi512_si256(two), _mm512_extracti64x4_epi64(two, 1)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        IqActivations& one = to[(group - begin + i) * kTokens + token];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(one.x), each[i]);
        one.scale = read_unaligned<float>(scales + (group + i) * 4);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          one.offset[part] = kZero * read_unaligned<int32_t>(negated + ((group + i) * kParts + part) * 4);
        }
        if constexpr (kHasDeltaByRow<kFormat>) {
          one.offset[1] = 2 * read_unaligned<int32_t>(negated + (group + i) * 4);
        }
      }
    }
  }
}

// Groups [begin, end) of sixteen rows and all tokens. Prefetches as far ahead as the tuning says, up to the
// end of the rows, and from there at next_weights.
template <Format kFormat, int kTokens>
[[gnu::always_inline]] inline void multiply_panel(const MatmulArgs& a, int64_t row, int64_t begin,
                                                  int64_t end, const IqActivations* x) {
  using Decoder = IqDecoder<kFormat>;
  constexpr QuantFormat kQuant = quant_format(kFormat);
  constexpr int kParts = kQuant.parts();
  const int64_t stride = panel_bytes(kFormat, a.cols);
  const uint8_t* panel = a.weights + row / kPanelRows * stride;
  const uint8_t* const last = panel + (a.row_end - row + kPanelRows - 1) / kPanelRows * stride;
  const uint8_t* block = panel + kQuant.scales_at(begin);
  const AskAhead& distance = kTokens == 1 ? a.tuning.ask_ahead : a.tuning.few_ask_ahead;
  const auto ahead = [&](int64_t bytes) {
    return block + bytes + (block + bytes < last || a.next_weights == nullptr ? 0 : a.next_weights - last);
  };
  const int64_t rows = a.row_end - row < kPanelRows ? a.row_end - row : kPanelRows;
  const auto y = [&](int token) { return output_row(a, token) + (row - a.row_begin); };
  Vec sum[kTokens];
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) sum[j] = begin > 0 ? load(y(j), rows) : zeros();
  typename Decoder::Codes next = {};
  if (begin < end) next = Decoder::look_up(block, 0, 0);
  for (int64_t left = end - begin; left > 0; left -= kQuant.block_groups()) {
    // A prefetch cannot fault, so an address past the weights is harmless.
    const uint8_t *l1 = ahead(distance.into_l1), *l2 = ahead(distance.into_l2);
    const auto ask = [&]<int kBytes>(int64_t from, Number<kBytes>) {
#pragma GCC unroll 8
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(l1 + from + line, 0, kIntoL1);
      if (distance.into_l2 > 0) {
#pragma GCC unroll 8
        for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(l2 + from + line, 0, kIntoL2);
      }
    };
    ask(0, Number<int(kQuant.front_bytes)>{});
    IqScales<kFormat> scales(block);
    for (int64_t group = 0; group < kQuant.block_groups(); ++group, x += kTokens) {
      ask(kQuant.front_bytes + group * kQuant.group_bytes(), Number<int(kQuant.group_bytes())>{});
      __m512i dot[kTokens][kParts];
#pragma GCC unroll 2
      for (int step = 0; step < Decoder::kSteps; ++step) {
        // The lookups of the next step depend on nothing here: they fill the time in which this one waits for
        // its own (up to a fifth faster than one step after the other).
        const auto codes = next;
        if (step + 1 < Decoder::kSteps) {
          next = Decoder::look_up(block, group, step + 1);
          next.signs = codes.signs;
        } else {
          const bool is_last = group + 1 == kQuant.block_groups(), is_end = left <= kQuant.block_groups();
          next = Decoder::look_up(is_last && !is_end ? block + kQuant.block_bytes() : block,
                                  is_last ? 0 : group + 1, 0);
        }
        if (step == 0) {
#pragma GCC unroll 8
          for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) dot[j][part] = _mm512_set1_epi32(x[j].offset[part]);
          }
        }
        const auto values = Decoder::values(codes, step);
#pragma GCC unroll 8
        for (int i = 0; i < Decoder::kStepBytes; ++i) {
          const int dword = step * Decoder::kStepBytes + i;
#pragma GCC unroll 8
          for (int j = 0; j < kTokens; ++j) {
            __m512i& to = dot[j][kParts == 1 ? 0 : dword / 4];
            to = _mm512_dpbusd_epi32(to, values.bytes[i],
                                     _mm512_set1_epi32(read_unaligned<int32_t>(x[j].x + 4 * dword)));
          }
        }
      }
      if constexpr (kHasDeltaByRow<kFormat>) {
        const __mmask16 is_below = scales.is_below();
#pragma GCC unroll 8
        for (int j = 0; j < kTokens; ++j) {
          dot[j][0] =
              _mm512_mask_add_epi32(dot[j][0], is_below, dot[j][0], _mm512_set1_epi32(x[j].offset[1]));
        }
      }
      Vec scale[kParts];
      scales.take(block, group, scale);
#pragma GCC unroll 8
      for (int j = 0; j < kTokens; ++j) {
        const Vec x_scale = broadcast(x[j].scale);
        if constexpr (kParts == 1) {
          sum[j] = fma(mul(scale[0], x_scale), _mm512_cvtepi32_ps(dot[j][0]), sum[j]);
        } else {
          const Vec first = mul(scale[0], _mm512_cvtepi32_ps(dot[j][0]));
          sum[j] = fma(x_scale, fma(scale[1], _mm512_cvtepi32_ps(dot[j][1]), first), sum[j]);
        }
      }
    }
    block += kQuant.block_bytes();
  }
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) store(y(j), sum[j], rows);
}

// The panels of rows [row, row_end).
template <Format kFormat, int kTokens>
[[gnu::noinline]] void multiply_panels(const MatmulArgs& a, int64_t row, int64_t row_end, int64_t begin,
                                       int64_t end, const IqActivations* x) {
  for (; row < row_end; row += kPanelRows) multiply_panel<kFormat, kTokens>(a, row, begin, end, x);
}

template <Format kFormat>
  requires(is_iq(kFormat))
struct DirectProduct<kFormat> {
  static constexpr int kMostOfTile = 6, kMostTokens = IqDecoder<kFormat>::kMostTokens;

  // A panel is decoded for each tile of up to six tokens: two of them still beat the way through the scratch.
  static void run(const MatmulArgs& a) {
    constexpr QuantFormat kQuant = quant_format(kFormat);
    const int64_t tiles = (a.num_tokens + kMostOfTile - 1) / kMostOfTile, groups = num_groups(a.cols);
    const int64_t fit =
        (kCodedScratchBytes - kWideScratchAt) / (a.num_tokens * int64_t(sizeof(IqActivations)));
    const int64_t most = fit / kQuant.block_groups() * kQuant.block_groups();
    // Without columns, the sums are zero.
    for (int64_t begin = 0; begin == 0 || begin < groups; begin += most) {
      const int64_t end = begin + most < groups ? begin + most : groups;
      const auto each_tile = [&](const auto& body) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t first = a.num_tokens * tile / tiles, last = a.num_tokens * (tile + 1) / tiles;
          IqActivations* x =
              reinterpret_cast<IqActivations*>(a.scratch + kWideScratchAt) + first * (end - begin);
          with_number<kMostOfTile>(last - first, [&]<int kTokens>(Number<kTokens> number) {
            body(some_tokens(a, first, kTokens), x, number);
          });
        }
      };
      each_tile([&]<int kTokens>(const MatmulArgs& some, IqActivations* x, Number<kTokens>) {
        put_activations<kFormat, kTokens>(some, begin, end, x);
      });
      const int64_t step = tiles == 1 ? a.row_end - a.row_begin : kPanelRows;
      for (int64_t row = a.row_begin; row < a.row_end; row += step) {
        each_tile([&]<int kTokens>(const MatmulArgs& some, const IqActivations* x, Number<kTokens>) {
          multiply_panels<kFormat, kTokens>(some, row, row + step, begin, end, x);
        });
      }
    }
  }
};

}  // namespace
}  // namespace argosy
