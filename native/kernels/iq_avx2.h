// iq_avx2.h: GGUF's i-quants with AVX2 or AVX-VNNI: panels decoded to bytes, products of one or two tokens.
//
// An entry of a grid is loaded as the bytes of eight columns; iq3: of four. Four entries (eight) fill a
// vector: columns 8 e to 8 e + 7 of the rows {0, 1, 4, 5} or {2, 3, 6, 7} of eight, so that adding neighbours
// (vphaddd) leaves eight rows in order. Products multiply magnitudes and move the signs to the activations;
// iq1: they multiply 8 g + 8 of g = -1, 0, 1 and remove 8 - delta from the dot products.
//
// Indices of more than 8 bits are assembled in a small buffer one group ahead, because a load that directly
// follows a store of another width to the same place must wait for it.
#pragma once

#include "kernels/coded.h"
#include "kernels/quantized_tile_avx2.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {

// iq1: 8 g + 8 of each column.
constexpr auto kIq1Eights = [] {
  auto made = kIqEntries<Format::iq1_s>;
  for (uint64_t& entry : made.bytes) entry *= 8;
  return made;
}();

// Calls body(Number<n>{}) for n from 0 to kCount - 1.
template <int kCount, int kFirst = 0, class Body>
[[gnu::always_inline]] inline void with_each(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(Number<kFirst>{});
    with_each<kCount, kFirst + 1>(body);
  }
}

// Bits 0-31 at `from` as bytes of -1 or 0.
inline __m256i spread_bits(const uint8_t* from) {
  const __m256i take = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bits = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(read_unaligned<int32_t>(from)), take);
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bits), bits);
}

// Seven bits of each byte, with their parity as bit 7.
inline __m256i with_parity(__m256i seven) {
  const __m256i parity = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
  const __m256i folded =
      _mm256_and_si256(_mm256_xor_si256(seven, _mm256_srli_epi16(seven, 4)), _mm256_set1_epi8(0x0F));
  return _mm256_or_si256(seven, _mm256_shuffle_epi8(parity, folded));
}

// A block of a panel.
template <Format kFormat>
struct IqBlock {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr int kParts = kQuant.parts();
  static constexpr bool kIsIq1 = is_iq1(kFormat), kIsIq3 = is_iq3(kFormat);
  static constexpr bool kIsWidened = !has_words_by_row(kFormat);  // whether indices have more than 8 bits
  static constexpr int kNumIndices = kIsIq3 ? 128 : 64;           // of a group
  static constexpr int64_t kSignsAt = kIsIq3 ? 128 : 64;          // in a group
  static constexpr int64_t kSubScalesAt = iq_sub_scales_at(kFormat), kMasksAt = iq_masks_at(kFormat);
  static constexpr int64_t kMaskBytes = iq_mask_bytes(kFormat);
  using Index = std::conditional_t<kIsWidened, uint16_t, uint8_t>;

  const uint8_t* block;
  Vec d[2];  // times the unit, of rows 0-7 and 8-15

  [[gnu::always_inline]] explicit inline IqBlock(const uint8_t* from) : block(from) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vec values;
      if constexpr (kFormat == Format::iq1_m) {
        const __m256i low = _mm256_srli_epi32(load_bytes(block + 32 * half), 24);
        const __m256i high = _mm256_srli_epi32(load_bytes(block + kChunkBytes + 32 * half), 24);
        const __m256i bits = _mm256_or_si256(low, _mm256_slli_epi32(high, 8));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
        values = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
      } else {
        values = F16Weights::load(block + 16 * half);
      }
      d[half] = mul(values, broadcast(iq_unit(kFormat)));
    }
  }

  // Of a group of the block.
  const uint8_t* codes(int64_t group) const {
    return block + kQuant.front_bytes + group * kQuant.coded_group_bytes;
  }
  const uint8_t* masks(int64_t group) const { return block + kMasksAt + group * kMaskBytes; }

  // Where index k of a row lies among those of a group that `widen` made, or among those of the panel.
  static constexpr int64_t index_at(int row, int k) {
    const int64_t at = k / 4 * 64 + iq_place(kFormat, row, k % 4);
    return kIsWidened ? at / 32 * 32 + at % 16 / 8 * 16 + at % 32 / 16 * 8 + at % 8 : at;
  }

  // Puts the indices of a group together.
  [[gnu::always_inline]] inline void widen(int64_t group, uint16_t (&to)[kNumIndices]) const {
    constexpr int kHighBits = kIsIq1 ? 3 : kIsIq3 ? 1 : 2;
#pragma GCC unroll 4
    for (int i = 0; i < kNumIndices / 32; ++i) {
      __m256i high = _mm256_set1_epi8(1);
      if constexpr (kFormat == Format::iq2_xs) {
        high = _mm256_and_si256(high, load_bytes(codes(group) + kSignsAt + 32 * i));
      } else {
        high = _mm256_and_si256(high, spread_bits(masks(group) + 4 * i));
#pragma GCC unroll 2
        for (int bit = 1; bit < kHighBits; ++bit) {
          const __m256i bits = spread_bits(masks(group) + 8 * bit + 4 * i);
          high = _mm256_or_si256(high, _mm256_and_si256(bits, _mm256_set1_epi8(char(1 << bit))));
        }
      }
      const __m256i low = load_bytes(codes(group) + 32 * i);
      auto* words = reinterpret_cast<__m256i*>(to + 32 * i);
      _mm256_storeu_si256(words, _mm256_unpacklo_epi8(low, high));
      _mm256_storeu_si256(words + 1, _mm256_unpackhi_epi8(low, high));
    }
  }

  // The entries of columns 8 kE to 8 kE + 7 of the rows {0, 1, 4, 5} + 2 * kPair + 8 * kHalf.
  template <int kHalf, int kE, int kPair>
  [[gnu::always_inline]] static inline __m256i entries(const Index* index) {
    constexpr int kRow = 8 * kHalf + 2 * kPair;
    return _mm256_set_m128i(two_rows<kRow + 4, kE>(index), two_rows<kRow, kE>(index));
  }
  template <int kRow, int kE>
  [[gnu::always_inline]] static inline __m128i two_rows(const Index* index) {
    if constexpr (kIsIq3) {
      constexpr int64_t kAt[4] = {index_at(kRow, 2 * kE), index_at(kRow, 2 * kE + 1),
                                  index_at(kRow + 1, 2 * kE), index_at(kRow + 1, 2 * kE + 1)};
      const auto four = [&](int i) { return int32_t(grid()[index[kAt[i]]]); };
      return _mm_setr_epi32(four(0), four(1), four(2), four(3));
    } else {
      constexpr int64_t kFirst = index_at(kRow, kE), kSecond = index_at(kRow + 1, kE);
      return _mm_set_epi64x(int64_t(grid()[index[kSecond]]), int64_t(grid()[index[kFirst]]));
    }
  }
  static constexpr const auto& grid() {
    if constexpr (kIsIq1) {
      return kIq1Eights.bytes;
    } else {
      return kIqEntries<kFormat>.bytes;
    }
  }

  // The signs of eight rows of a group, for sign_of; iq1: delta + 1, for delta_of.
  struct Signs {
    __m256i bytes[2];
  };
  [[gnu::always_inline]] inline Signs signs(int64_t group, int half) const {
    if constexpr (kIsIq1) {
      __m256i is_below;
      if constexpr (kFormat == Format::iq1_m) {
        is_below = spread_bits(masks(group) + 24 + 4 * half);
      } else {
        const __m256i words = load_bytes(block + kSubScalesAt + 32 * half);
        is_below = _mm256_srai_epi32(_mm256_sll_epi32(words, _mm_cvtsi64_si128(28 - 4 * group)), 31);
      }
      return {{_mm256_andnot_si256(is_below, _mm256_set1_epi8(2)), is_below}};
    }
    __m256i bits = load_bytes(codes(group) + kSignsAt + 32 * half);
    if constexpr (has_words_by_row(kFormat)) {
      const auto field = [&](int k) {
        return _mm256_and_si256(_mm256_slli_epi32(bits, k), _mm256_set1_epi32(0x7F << 8 * k));
      };
      bits = with_parity(
          _mm256_or_si256(_mm256_or_si256(field(0), field(1)), _mm256_or_si256(field(2), field(3))));
    }
    if constexpr (kFormat == Format::iq2_xs) {
      bits = with_parity(_mm256_and_si256(_mm256_srli_epi16(bits, 1), _mm256_set1_epi8(0x7F)));
    }
    // Behind each byte the same from its second bit on.
    const __m256i further = _mm256_srli_epi16(bits, 1);
    return {{_mm256_unpacklo_epi8(bits, further), _mm256_unpackhi_epi8(bits, further)}};
  }
  // For the columns and rows of entries(): bytes above or below zero.
  template <int kE, int kPair>
  [[gnu::always_inline]] static inline __m256i sign_of(const Signs& signs) {
    constexpr int64_t kFirst = iq_place(kFormat, 2 * kPair, kE),
                      kSecond = iq_place(kFormat, 2 * kPair + 1, kE);
    constexpr auto kFourWords = [](int64_t place) {
      return (2 * place % 16 + 256 * (2 * place % 16 + 1)) * 0x0001000100010001;
    };
    const __m256i take =
        _mm256_setr_epi64x(kFourWords(kFirst), kFourWords(kSecond), kFourWords(kFirst), kFourWords(kSecond));
    // Times 2^(7 - j), bit j of the low byte becomes its highest, and bit j + 1 that of the high byte.
    const __m256i to_top = _mm256_set1_epi64x(0x0002000800200080);
    const __m256i words = _mm256_mullo_epi16(_mm256_shuffle_epi8(signs.bytes[kFirst / 8], take), to_top);
    return _mm256_or_si256(words, _mm256_set1_epi8(1));  // vpsignb makes zero of what a zero multiplies
  }
  template <int kE, int kPair>
  [[gnu::always_inline]] static inline __m256i delta_of(const Signs& signs) {
    constexpr int64_t kEight = 0x0101010101010101;
    constexpr int64_t kFirst = iq_place(kFormat, 2 * kPair, kE) * kEight;
    constexpr int64_t kSecond = iq_place(kFormat, 2 * kPair + 1, kE) * kEight;
    return _mm256_shuffle_epi8(signs.bytes[0], _mm256_setr_epi64x(kFirst, kSecond, kFirst, kSecond));
  }

  // The scale of eight rows of a group, or of half of it.
  [[gnu::always_inline]] inline Vec scale(int64_t group, int half, int part) const {
    constexpr int kBits = kIsIq1 ? 3 : 4, kStep = kFormat == Format::iq1_m ? 3 : 4;
    __m256i top;  // the sub-scale in the highest bits
    if constexpr (has_words_by_row(kFormat)) {
      top = load_bytes(codes(group) + kSignsAt + 32 * half);
    } else {
      const uint8_t* words = block + kSubScalesAt + kChunkBytes * part + 32 * half;
      top = _mm256_sll_epi32(load_bytes(words), _mm_cvtsi64_si128(32 - kBits - kStep * group));
    }
    const __m256i odd = _mm256_or_si256(_mm256_srli_epi32(top, 31 - kBits), _mm256_set1_epi32(1));
    return mul(d[half], _mm256_cvtepi32_ps(odd));
  }

  // Calls body(group, its indices) for each group.
  template <class Body>
  [[gnu::always_inline]] inline void each_group(const Body& body) const {
    alignas(32) uint16_t widened[2][kNumIndices];
    if constexpr (kIsWidened) widen(0, widened[0]);
    for (int64_t group = 0; group < kQuant.block_groups(); ++group) {
      if constexpr (kIsWidened) {
        if (group + 1 < kQuant.block_groups()) widen(group + 1, widened[(group + 1) % 2]);
        body(group, widened[group % 2]);
      } else {
        body(group, codes(group));
      }
    }
  }
};

// Products of kTokens tokens with one panel.
template <Format kFormat, int kTokens>
struct IqTile {
  using Block = IqBlock<kFormat>;
  static constexpr int kParts = Block::kParts;
  using Dots = __m256i[kTokens][kParts][2];  // rows {0, 1, 4, 5} and {2, 3, 6, 7}, in two sums each

  int64_t cols;
  const uint8_t* x[kTokens];
  Vec sum[kTokens][2];

  // The dot products of a group and eight rows.
  template <int kHalf>
  [[gnu::always_inline]] inline void multiply(const typename Block::Index* index, int64_t group,
                                              const typename Block::Signs& signs, Dots& dot) const {
    [[maybe_unused]] __m256i run[kTokens][2];  // 16-bit
    with_each<4>([&]<int kE>(Number<kE>) __attribute__((always_inline)) {
      with_each<2>([&]<int kPair>(Number<kPair>) __attribute__((always_inline)) {
        __m256i w = Block::template entries<kHalf, kE, kPair>(index), sign;
        if constexpr (kFormat == Format::iq1_m) {
          w = _mm256_add_epi8(w, Block::template delta_of<kE, kPair>(signs));
        }
        if constexpr (!Block::kIsIq1) sign = Block::template sign_of<kE, kPair>(signs);
        with_each<kTokens>([&]<int kToken>(Number<kToken>) __attribute__((always_inline)) {
          __m256i x8 = _mm256_set1_epi64x(read_unaligned<int64_t>(x[kToken] + group * kGroupSize + 8 * kE));
          if constexpr (!Block::kIsIq1) x8 = _mm256_sign_epi8(x8, sign);
          __m256i& to = dot[kToken][kE * kParts / 4][kPair];
          if constexpr (kE % (4 / kParts) == 0) to = _mm256_setzero_si256();
#if ARGOSY_AVX_VNNI
          to = _mm256_dpbusd_avx_epi32(to, w, x8);
#else
          // 16 bits hold the products of two vectors (4 columns * 62 * 127), or of all four if bytes are at
          // most 18.
          constexpr int kRun = kParts == 1 && (kFormat == Format::iq3_s || Block::kIsIq1) ? 4 : 2;
          const __m256i products = _mm256_maddubs_epi16(w, x8);
          __m256i& sums = run[kToken][kPair];
          sums = kE % kRun == 0 ? products : _mm256_add_epi16(sums, products);
          if constexpr (kE % kRun == kRun - 1) {
            to = _mm256_add_epi32(to, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
          }
#endif
        });
      });
    });
  }

  // Adds the products of a group and eight rows to the sums.
  template <int kHalf>
  [[gnu::always_inline]] inline void add_half(const Block& block, const typename Block::Index* index,
                                              int64_t inside, int64_t group) {
    constexpr Format kWide = quant_format(kFormat).wide;
    const typename Block::Signs signs = block.signs(inside, kHalf);
    Dots dot;
    multiply<kHalf>(index, group, signs, dot);
    Vec scale[kParts];
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) scale[part] = block.scale(inside, kHalf, part);
#pragma GCC unroll 2
    for (int j = 0; j < kTokens; ++j) {
      const auto x_scale = read_unaligned<float>(x[j] + activation_scales_at(kWide, cols) + group * 4);
      Vec exact[kParts];
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        __m256i whole = _mm256_hadd_epi32(dot[j][part][0], dot[j][part][1]);
        if constexpr (Block::kIsIq1) {
          const int64_t at = activation_negated_sums_at(kWide, cols) + (group * kParts + part) * 4;
          const auto negated = read_unaligned<int32_t>(x[j] + at);
          // iq1_m: delta + 1 was added to each byte.
          __m256i zero = _mm256_set1_epi32((kFormat == Format::iq1_m ? 9 : 7) * negated);
          if constexpr (kFormat == Format::iq1_s) {
            const __m256i twice = _mm256_and_si256(signs.bytes[1], _mm256_set1_epi32(2 * negated));
            zero = _mm256_add_epi32(zero, twice);
          }
          whole = _mm256_add_epi32(whole, zero);
        }
        exact[part] = _mm256_cvtepi32_ps(whole);
      }
      Vec& to = sum[j][kHalf];
      if constexpr (kParts == 1) {
        to = fma(mul(scale[0], broadcast(x_scale)), exact[0], to);
      } else {
        to = fma(broadcast(x_scale), fma(scale[1], exact[1], mul(scale[0], exact[0])), to);
      }
    }
  }

  // Rows [row, row + 16) of all tokens.
  [[gnu::always_inline]] static inline void run(const MatmulArgs& a, int64_t row) {
    constexpr QuantFormat kQuant = quant_format(kFormat);
    const AskAhead distance = kTokens == 1 ? a.tuning.ask_ahead : a.tuning.few_ask_ahead;
    IqTile tile;
    tile.cols = a.cols;
#pragma GCC unroll 2
    for (int j = 0; j < kTokens; ++j) {
      tile.x[j] = activation_row(a, j);
      tile.sum[j][0] = tile.sum[j][1] = zeros();
    }
    const int64_t stride = panel_bytes(kFormat, a.cols);
    const uint8_t* panel = a.weights + row / kPanelRows * stride;
    const uint8_t* end = panel + (a.row_end - row + kPanelRows - 1) / kPanelRows * stride;
    const uint8_t* next = a.next_weights != nullptr ? a.next_weights : end;
    const auto ask = [&]<int64_t kBytes>(const uint8_t* at, Bytes<kBytes>) {
      // A prefetch cannot fault, so an address past the weights is harmless.
      const auto ahead = [&](int64_t bytes) {
        return at + bytes < end ? at + bytes : next + (at + bytes - end);
      };
      if (distance.into_l2 > 0) ask_for<kBytes, kIntoL2>(ahead(distance.into_l2));
      if (distance.into_l1 > 0) ask_for<kBytes, kIntoL1>(ahead(distance.into_l1));
    };
    const int64_t groups = num_groups(a.cols);
    for (int64_t begin = 0; begin < groups; begin += kQuant.block_groups()) {
      const Block block(panel + kQuant.scales_at(begin));
      ask(block.block, Bytes<kQuant.front_bytes>{});
      block.each_group([&](int64_t inside, const typename Block::Index* index)
                           __attribute__((always_inline)) {
                             ask(block.codes(inside), Bytes<kQuant.coded_group_bytes>{});
                             tile.template add_half<0>(block, index, inside, begin + inside);
                             tile.template add_half<1>(block, index, inside, begin + inside);
                           });
    }
    const int64_t rows = a.row_end - row;
#pragma GCC unroll 2
    for (int j = 0; j < kTokens; ++j) {
      float* y = output_row(a, j) + (row - a.row_begin);
      store(y, tile.sum[j][0], rows < 8 ? rows : 8);
      if (rows > 8) store(y + 8, tile.sum[j][1], rows < 16 ? rows - 8 : 8);
    }
  }
};

template <Format kFormat>
  requires(is_iq(kFormat))
struct DirectProduct<kFormat> {
  // With three, decoding a strip and the tiles of the wide format are about as fast.
  static constexpr int kMostTokens = 2;
  static void run(const MatmulArgs& a) {
    with_number<kMostTokens>(a.num_tokens, [&]<int kTokens>(Number<kTokens>) {
      for (int64_t row = a.row_begin; row < a.row_end; row += kPanelRows) {
        IqTile<kFormat, kTokens>::run(a, row);
      }
    });
  }
};

template <Format kFormat>
  requires(is_iq(kFormat))
struct Decode<kFormat> {
  using Block = IqBlock<kFormat>;
  static constexpr QuantFormat kQuant = quant_format(kFormat), kWide = quant_format(kQuant.wide);

  static void run(const uint8_t* panel, int64_t group_begin, int64_t group_end, uint8_t* wide) {
    for (int64_t begin = group_begin; begin < group_end; begin += kQuant.block_groups()) {
      const Block block(panel + kQuant.scales_at(begin));
      block.each_group([&](int64_t group, const typename Block::Index* index) __attribute__((always_inline)) {
        decode_half<0>(block, index, group, wide);
        decode_half<1>(block, index, group, wide);
        wide += kWide.block_bytes();
      });
    }
  }

  template <int kHalf>
  [[gnu::always_inline]] static inline void decode_half(const Block& block,
                                                        const typename Block::Index* index, int64_t group,
                                                        uint8_t* wide) {
    const auto floats_at = [&](int64_t at) { return reinterpret_cast<float*>(wide + at + 32 * kHalf); };
#pragma GCC unroll 2
    for (int part = 0; part < Block::kParts; ++part) {
      store(floats_at(part * kPanelRows * 4), block.scale(group, kHalf, part));
    }
    const typename Block::Signs signs = block.signs(group, kHalf);
    with_each<4>([&]<int kE>(Number<kE>) __attribute__((always_inline)) {
      Vec bytes[2];
      with_each<2>([&]<int kPair>(Number<kPair>) __attribute__((always_inline)) {
        __m256i w = Block::template entries<kHalf, kE, kPair>(index);
        if constexpr (Block::kIsIq1) {
          w = _mm256_add_epi8(w, Block::template delta_of<kE, kPair>(signs));
        } else {
          w = _mm256_sign_epi8(w, Block::template sign_of<kE, kPair>(signs));
        }
        const __m256i zero = _mm256_set1_epi8(char(kWide.zero - (Block::kIsIq1 ? 9 : 0)));
        bytes[kPair] = _mm256_castsi256_ps(_mm256_add_epi8(w, zero));
      });
      constexpr int64_t kAt = kWide.block_scale_bytes() + 2 * kE * kChunkBytes;
      store(floats_at(kAt), _mm256_shuffle_ps(bytes[0], bytes[1], 0x88));
      store(floats_at(kAt + kChunkBytes), _mm256_shuffle_ps(bytes[0], bytes[1], 0xDD));
    });
  }
};

}  // namespace
}  // namespace argosy
