// quantized_tile_avx2.h: the inner loop of matmul_quantized with exact 16-bit products, or with AVX-VNNI.
//
// With AVX-VNNI, vpdpbusd multiplies four bytes and adds them to 32 bits, for 8 bits once for the high and
// once for the low bytes of the activations. Without it:
//
//   8 bits   weights are widened to the 16 bits that activations have; vpmaddwd gives each row two partial
//            sums of 32 bits.
//   others   vpmaddubsw multiplies bytes and adds pairs into 16 bits. As many of these sums are added as 16
//            bits hold without saturating (8, 4, 2, 1 sums of 2 * 15, 31, 63, 127 * 127). Bytes too large
//            for even one sum are used with their sign: the weight's sign moves to the activation.
#pragma once

#include "kernels/tile_operands.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {

inline __m256i load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline Vec bytes_to_floats(const uint8_t* from, bool is_signed) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}

// Eight codes as value / 256 (weight_scale.h).
inline Vec e4m3_to_floats(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i halves = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  return _mm256_cvtph_ps(_mm_and_si128(halves, _mm_set1_epi16(int16_t(0xBF80))));
}

inline __m256i broadcast_four(const uint8_t* bytes) {
  return _mm256_set1_epi32(read_unaligned<int32_t>(bytes));
}

template <Format kFormat, int kPanels, int kTokens>
struct QuantizedTile {
  static_assert(kPanels == 1);
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr int64_t kBlockGroups = kQuant.block_groups();
  static constexpr int kParts = kQuant.parts();
  static constexpr bool kBothBytes = takes_both_bytes(kFormat);
  static constexpr int kLargestByte = kQuant.largest_byte();
  // Quants keep their sign and have no zero to remove. This applies to those that vpmaddubsw could not hold
  // otherwise.
  static constexpr bool kHasSign = kQuant.table != nullptr || kQuant.has_float_scales;
  static constexpr bool kIsSigned = kHasSign && kLargestByte > 127 && !ARGOSY_AVX_VNNI;
  using Operands = TileOperands<kFormat, kTokens>;
  using Dots = __m256i[kTokens][kParts][2];  // rows 0-7 and 8-15
  using Sums = Vec[kTokens][2];

  // Computes the exact dot products of a group.
  [[gnu::always_inline]] static inline void multiply(const Operands& o, int64_t group, Dots& dot) {
#if ARGOSY_AVX_VNNI
    multiply_four(o, group, dot);
#else
    if constexpr (kBothBytes) {
      multiply_wide(o, group, dot);
    } else {
      multiply_bytes(o, group, dot);
    }
#endif
  }

  // The scales of a block, and its mins, if the format has them: of each half of the rows.
  struct BlockScales {
    Vec scale[2], min[2];
  };
  [[gnu::always_inline]] static inline BlockScales block_scales(const Operands& o, int64_t group) {
    BlockScales found;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if constexpr (kQuant.has_float_scales) {
        const uint8_t* floats = o.block_scales(group) + half * 8 * 4;
        found.scale[half] = F32Weights::load(floats);
        found.min[half] = zeros();
        continue;
      }
      if constexpr (kQuant.sub_scales == SubScales::e4m3) {
        found.scale[half] = found.min[half] = zeros();
        continue;
      }
      const uint8_t* scales = o.block_scales(group) + half * 8 * 2;
      const bool is_bf16 = o.is_bf16();
      found.scale[half] = is_bf16 ? Bf16Weights::load(scales) : F16Weights::load(scales);
      found.min[half] = zeros();
      if constexpr (kQuant.has_min) {
        const uint8_t* mins = o.block_scales(group) + kPanelRows * 2;
        if (o.grouped_min() == GroupedMin::of_constant_zero) {
          found.min[half] = mul(found.scale[half], broadcast(-float(1 << (kQuant.bits - 1))));
        } else if (o.grouped_min() == GroupedMin::of_zeros) {
          found.min[half] = mul(found.scale[half], sub(zeros(), bytes_to_floats(mins + half * 8, false)));
        } else {
          mins += half * 8 * 2;
          found.min[half] = is_bf16 ? Bf16Weights::load(mins) : F16Weights::load(mins);
        }
      }
    }
    return found;
  }

  // Adds the dot products of a group to the sums.
  [[gnu::always_inline]] static inline void scale(const Operands& o, int64_t group,
                                                  const BlockScales& of_block, const Dots& dot, Sums& sum) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) scale_half(o, group, half, of_block, dot, sum);
  }

  [[gnu::always_inline]] static inline void put(const MatmulArgs& a, int64_t row, int64_t token,
                                                const Sums& sum) {
    const int64_t rows = a.row_end - row;
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      float* y = output_row(a, token + j) + (row - a.row_begin);
      store(y, sum[j][0], rows < 8 ? rows : 8);
      if (rows > 8) store(y + 8, sum[j][1], rows < 16 ? rows - 8 : 8);
    }
  }

  // The opposite of put: continues sums that an earlier strip of columns has put.
  [[gnu::always_inline]] static inline void take(const MatmulArgs& a, int64_t row, int64_t token, Sums& sum) {
    const int64_t rows = a.row_end - row;
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      const float* y = output_row(a, token + j) + (row - a.row_begin);
      sum[j][0] = load(y, rows < 8 ? rows : 8);
      sum[j][1] = rows > 8 ? load(y + 8, rows < 16 ? rows - 8 : 8) : zeros();
    }
  }

  // Multiplies the sums by a float32 for each row, which the panel begins with.
  [[gnu::always_inline]] static inline void multiply_rows(const uint8_t* panel, int64_t, Sums& sum) {
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      sum[j][0] = mul(sum[j][0], F32Weights::load(panel));
      sum[j][1] = mul(sum[j][1], F32Weights::load(panel + 32));
    }
  }

 private:
#if ARGOSY_AVX_VNNI

  // The zero of the quants stays in the dot products.
  [[gnu::always_inline]] static inline void multiply_four(const Operands& o, int64_t group, Dots& dot) {
    const uint8_t* quants = o.quants(group);
    const int64_t x_at = group * kGroupSize, low_at = activation_low_at(o.cols) + x_at;
    __m256i low[kTokens][2];  // if kBothBytes
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      low[j][0] = low[j][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) dot[j][part][0] = dot[j][part][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      // Chunks c and c + 4 share bytes.
      const int chunk = kBothBytes ? step : step / 2 + step % 2 * 4;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i w = unpack(quants + 32 * half, chunk);
#pragma GCC unroll 4
        for (int j = 0; j < kTokens; ++j) {
          __m256i& to = dot[j][kParts == 1 ? 0 : chunk / 4][half];
          to = _mm256_dpbusd_avx_epi32(to, w, broadcast_four(o.x[j] + x_at + 4 * chunk));
          if constexpr (kBothBytes) {
            const __m256i four = broadcast_four(o.x[j] + low_at + 4 * chunk);
            low[j][half] = _mm256_dpbusd_avx_epi32(low[j][half], w, four);
          }
        }
      }
    }
    if constexpr (kBothBytes) {
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          dot[j][0][half] = _mm256_add_epi32(_mm256_slli_epi32(dot[j][0][half], 8), low[j][half]);
        }
      }
    }
  }

#else

  // Multiplies by 16-bit activations, both bytes; the zero of the quants stays in the dot products.
  [[gnu::always_inline]] static inline void multiply_wide(const Operands& o, int64_t group, Dots& dot) {
    const uint8_t* quants = o.quants(group);
    const int64_t whole_at = activation_whole_at(o.cols) + group * 2 * kGroupSize;
    __m256i pairs[kTokens][4];  // rows 0-3, 4-7, 8-11, 12-15; two partial sums each
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) pairs[j][i] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int chunk = 0; chunk < 8; ++chunk) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* from = quants + chunk * kChunkBytes + 16 * i;
        const __m256i weights = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#pragma GCC unroll 4
        for (int j = 0; j < kTokens; ++j) {
          const auto four = read_unaligned<int64_t>(o.x[j] + whole_at + 8 * chunk);
          const __m256i products = _mm256_madd_epi16(weights, _mm256_set1_epi64x(four));
          pairs[j][i] = _mm256_add_epi32(pairs[j][i], products);
        }
      }
    }
    // Horizontal addition works within 128-bit halves: rows 0 1 4 5 | 2 3 6 7; restore their order.
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      dot[j][0][0] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[j][0], pairs[j][1]), 0xD8);
      dot[j][0][1] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[j][2], pairs[j][3]), 0xD8);
    }
  }

  [[gnu::always_inline]] static inline void multiply_bytes(const Operands& o, int64_t group, Dots& dot) {
    const uint8_t* quants = o.quants(group);
    // The number of chunks whose products fit in 16 bits, within one part of the group.
    constexpr int kMost = kIsSigned || kLargestByte > 63 ? 1
                          : kLargestByte < 16            ? 8
                          : kLargestByte < 32            ? 4
                                                         : 2;
    constexpr int kRun = kMost * kParts > 8 ? 8 / kParts : kMost;
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) dot[j][part][0] = dot[j][part][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int begin = 0; begin < 8; begin += kRun) {
      __m256i sums[kTokens][2];  // 16-bit, two per row
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) sums[j][0] = sums[j][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int chunk = begin; chunk < begin + kRun; ++chunk) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i w = unpack(quants + 32 * half, chunk);
#pragma GCC unroll 4
          for (int j = 0; j < kTokens; ++j) {
            const __m256i four = broadcast_four(o.x[j] + group * kGroupSize + 4 * chunk);
            const __m256i products = kIsSigned
                                         ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four, w))
                                         : _mm256_maddubs_epi16(w, four);
            sums[j][half] = _mm256_add_epi16(sums[j][half], products);
          }
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256i& to = dot[j][kParts == 1 ? 0 : begin / 4][half];
          to = _mm256_add_epi32(to, _mm256_madd_epi16(sums[j][half], ones));
        }
      }
    }
  }

#endif

  // Unpacks four columns of eight rows to bytes, with their sign if kIsSigned.
  [[gnu::always_inline]] static inline __m256i unpack(const uint8_t* group, int chunk) {
    if constexpr (kQuant.bits == 8) {
      const __m256i bytes = load_bytes(group + chunk * kChunkBytes);
      return kIsSigned ? _mm256_xor_si256(bytes, _mm256_set1_epi8(int8_t(kQuant.zero))) : bytes;
    } else if constexpr (kQuant.table != nullptr) {
      return _mm256_shuffle_epi8(table(), low_bits(group, chunk));
    } else if constexpr (kQuant.bits == kQuant.low_bits()) {
      return low_bits(group, chunk);
    } else {
      constexpr int kLowBits = kQuant.low_bits(), kHighBits = kQuant.bits - kLowBits;
      const int plane = chunk * kHighBits / 8;
      const int bit = chunk * kHighBits % 8;
      const __m256i high = load_bytes(group + plane * kChunkBytes);
      const __m256i in_place =
          bit <= kLowBits ? _mm256_slli_epi16(high, kLowBits - bit) : _mm256_srli_epi16(high, bit - kLowBits);
      const __m256i mask = _mm256_set1_epi8(((1 << kHighBits) - 1) << kLowBits);
      return _mm256_or_si256(low_bits(group, chunk), _mm256_and_si256(in_place, mask));
    }
  }

  [[gnu::always_inline]] static inline __m256i low_bits(const uint8_t* group, int chunk) {
    if constexpr (kQuant.low_bits() == 2) {
      const __m256i four = load_bytes(group + kQuant.low_at() + chunk / 4 * kChunkBytes);
      return _mm256_and_si256(_mm256_srli_epi16(four, chunk % 4 * 2), _mm256_set1_epi8(0x03));
    } else {
      const __m256i two = load_bytes(group + kQuant.low_at() + chunk % 4 * kChunkBytes);
      return _mm256_and_si256(chunk < 4 ? two : _mm256_srli_epi16(two, 4), _mm256_set1_epi8(0x0F));
    }
  }

  [[gnu::always_inline]] static inline __m256i table() {
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kQuant.table)));
    return kIsSigned ? _mm256_sub_epi8(bytes, _mm256_set1_epi8(int8_t(kQuant.zero))) : bytes;
  }

  // Adds the dot products of eight rows of a group to the sums.
  [[gnu::always_inline]] static inline void scale_half(const Operands& o, int64_t group, int half,
                                                       const BlockScales& of_block, const Dots& dot,
                                                       Sums& sum) {
    const uint8_t* scales = o.block_scales(group);
    const int64_t first_row = half * 8;
    const Vec block_scale = of_block.scale[half];
    Vec min = of_block.min[half];
    const uint8_t* subs = scales + kQuant.sub_scales_at() + group % kBlockGroups * kParts * kPanelRows;
    if constexpr (kQuant.is_paired()) {
      return scale_pairs(o, group, half, block_scale, sub(zeros(), min), subs + 2 * first_row, dot, sum);
    }
    Vec weight_scale[kParts] = {block_scale};
    if constexpr (kQuant.has_float_scales) {
      if constexpr (kParts == 2) weight_scale[1] = F32Weights::load(scales + (kPanelRows + first_row) * 4);
    } else if constexpr (kQuant.sub_scales == SubScales::e4m3) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        weight_scale[part] = e4m3_to_floats(subs + first_row + part * kPanelRows);
      }
    } else if constexpr (kQuant.sub_scale_cols > 0) {
      constexpr bool kSubsHaveSign = kQuant.sub_scales == SubScales::signed_bytes;
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        weight_scale[part] =
            mul(block_scale, bytes_to_floats(subs + first_row + part * kPanelRows, kSubsHaveSign));
      }
      if constexpr (kQuant.has_min) {
        const uint8_t* sub_mins =
            scales + kQuant.sub_mins_at() + first_row + group % kBlockGroups * kPanelRows;
        min = mul(min, bytes_to_floats(sub_mins, false));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      const Vec x_scale =
          broadcast(read_unaligned<float>(o.x[j] + activation_scales_at(kFormat, o.cols) + group * 4));
      Vec exact[kParts];
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        __m256i whole = dot[j][part][half];
        if constexpr (kQuant.zero != 0 && !kIsSigned) {
          const uint8_t* negated =
              o.x[j] + activation_negated_sums_at(kFormat, o.cols) + (group * kParts + part) * 4;
          whole = _mm256_add_epi32(whole, _mm256_slli_epi32(broadcast_four(negated), kQuant.zero_shift()));
        }
        exact[part] = _mm256_cvtepi32_ps(whole);
      }
      if constexpr (kParts == 1) {
        sum[j][half] = fma(mul(weight_scale[0], x_scale), exact[0], sum[j][half]);
      } else {
        sum[j][half] =
            fma(x_scale, fma(weight_scale[1], exact[1], mul(weight_scale[0], exact[0])), sum[j][half]);
      }
      if constexpr (kQuant.has_min) {
        const Vec x_sum = broadcast(activation_sum<kFormat>(o.x[j], o.cols, group));
        sum[j][half] = fma(min, x_sum, sum[j][half]);
      }
    }
  }

  // The same for sub-scales stored in pairs: 16 bits hold the dot product of half a group, so one
  // multiply-add takes both halves of a row. The sums of the activations remove the zero of the quants in the
  // same way.
  [[gnu::always_inline]] static inline void scale_pairs(const Operands& o, int64_t group, int half,
                                                        Vec block_scale, Vec negated_min, const uint8_t* subs,
                                                        const Dots& dot, Sums& sum) {
    constexpr bool kIsNibbles = kQuant.sub_scales == SubScales::nibble_pairs;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(subs));
    const __m256i pairs = kIsNibbles ? _mm256_cvtepu8_epi16(bytes) : _mm256_cvtepi8_epi16(bytes);
    const __m256i sub_scales = kIsNibbles ? _mm256_and_si256(pairs, _mm256_set1_epi16(0xF)) : pairs;
    const __m256i zero_scales = _mm256_mullo_epi16(sub_scales, _mm256_set1_epi16(kQuant.zero));
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      const Vec x_scale =
          broadcast(read_unaligned<float>(o.x[j] + activation_scales_at(kFormat, o.cols) + group * 4));
      const __m256i negated =
          broadcast_four(o.x[j] + activation_negated_sums_at(kFormat, o.cols) + group * 4);
      const __m256i dots =
          _mm256_blend_epi16(dot[j][0][half], _mm256_slli_epi32(dot[j][kParts - 1][half], 16), 0xAA);
      __m256i whole = _mm256_madd_epi16(dots, sub_scales);
      if constexpr (kQuant.zero != 0) {
        whole = _mm256_add_epi32(whole, _mm256_madd_epi16(negated, zero_scales));
      }
      sum[j][half] = fma(mul(block_scale, x_scale), _mm256_cvtepi32_ps(whole), sum[j][half]);
      if constexpr (kQuant.has_min) {
        const __m256i mins = _mm256_madd_epi16(negated, _mm256_srli_epi16(pairs, 4));
        sum[j][half] = fma(mul(negated_min, x_scale), _mm256_cvtepi32_ps(mins), sum[j][half]);
      }
    }
  }
};

}  // namespace
}  // namespace argosy
