// quantized_tile_avx512.h: the inner loop of matmul_quantized with vpdpbusd.
//
// Sixteen rows are the lanes of a register: 64 bytes of quants times four broadcast activations add to
// sixteen sums. A sum starts at the group's offset, which removes the zero of the format from every weight.
// For weights of 8 bits there are two sums, of the high and of the low bytes of the activations; formats with
// a scale per 16 columns have one sum per half group. vpshufb does the table lookups.
#pragma once

#include "kernels/tile_operands.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {

inline __m512i broadcast_four(const uint8_t* activations) {
  return _mm512_set1_epi32(read_unaligned<int32_t>(activations));
}

inline Vec bytes_to_floats(const uint8_t* from, bool is_signed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

// Sixteen codes as value / 256 (weight_scale.h).
inline Vec e4m3_to_floats(const uint8_t* from) {
  Vec values[1];
  load_f8(from, values);
  return values[0];
}

template <Format kFormat, int kPanels, int kTokens>
struct QuantizedTile {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr int64_t kBlockGroups = kQuant.block_groups();
  static constexpr int kParts = kQuant.parts();
  static constexpr bool kBothBytes = takes_both_bytes(kFormat);
  using Operands = TileOperands<kFormat, kTokens>;
  using Dots = __m512i[kPanels][kTokens][kParts];
  using Sums = Vec[kPanels][kTokens];

  // The scales of a block, and its mins, if the format has them.
  struct BlockScales {
    Vec scale[kPanels], min[kPanels];
  };
  [[gnu::always_inline]] static inline BlockScales block_scales(const Operands& o, int64_t group) {
    BlockScales found;
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
      const uint8_t* scales = o.block_scales(group) + i * o.stride;
      if constexpr (kQuant.has_float_scales) {
        found.scale[i] = F32Weights::load(scales);
        found.min[i] = zeros();
        continue;
      }
      if constexpr (kQuant.sub_scales == SubScales::e4m3) {
        found.scale[i] = found.min[i] = zeros();
        continue;
      }
      const bool is_bf16 = o.is_bf16();
      found.scale[i] = is_bf16 ? Bf16Weights::load(scales) : F16Weights::load(scales);
      found.min[i] = zeros();
      if constexpr (kQuant.has_min) {
        const uint8_t* mins = scales + kPanelRows * 2;
        if (o.grouped_min() == GroupedMin::of_constant_zero) {
          found.min[i] = mul(found.scale[i], broadcast(-float(1 << (kQuant.bits - 1))));
        } else if (o.grouped_min() == GroupedMin::of_zeros) {
          found.min[i] = mul(found.scale[i], sub(zeros(), bytes_to_floats(mins, false)));
        } else {
          found.min[i] = is_bf16 ? Bf16Weights::load(mins) : F16Weights::load(mins);
        }
      }
    }
    return found;
  }

  // Computes the exact dot products of a group.
  [[gnu::always_inline]] static inline void multiply(const Operands& o, int64_t group, Dots& dot) {
    const int64_t x_at = group * kGroupSize;
    const int64_t low_at = activation_low_at(o.cols) + x_at;
    __m512i low[kPanels][kTokens];  // if kBothBytes
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) {
        if constexpr (kBothBytes) low[i][j] = offset(o, group, j, 0);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          dot[i][j][part] = kBothBytes ? _mm512_setzero_si512() : offset(o, group, j, part);
        }
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      // Chunks c and c + 4 share bytes.
      const int chunk = kQuant.bits == 8 ? step : step / 2 + step % 2 * 4;
      __m512i w[kPanels];
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) w[i] = unpack(o.quants(group) + i * o.stride, chunk);
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) {
        const __m512i four = broadcast_four(o.x[j] + x_at + 4 * chunk);
#pragma GCC unroll 2
        for (int i = 0; i < kPanels; ++i) {
          __m512i& to = dot[i][j][kParts == 1 ? 0 : chunk / 4];
          to = _mm512_dpbusd_epi32(to, w[i], four);
        }
        if constexpr (kBothBytes) {
          const __m512i four_low = broadcast_four(o.x[j] + low_at + 4 * chunk);
#pragma GCC unroll 2
          for (int i = 0; i < kPanels; ++i) low[i][j] = _mm512_dpbusd_epi32(low[i][j], w[i], four_low);
        }
      }
    }
    if constexpr (kBothBytes) {
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
        for (int i = 0; i < kPanels; ++i) {
          dot[i][j][0] = _mm512_add_epi32(_mm512_slli_epi32(dot[i][j][0], 8), low[i][j]);
        }
      }
    }
  }

  // Adds the dot products of a group to the sums.
  [[gnu::always_inline]] static inline void scale(const Operands& o, int64_t group,
                                                  const BlockScales& of_block, const Dots& dot, Sums& sum) {
    const int64_t x_scale_at = activation_scales_at(kFormat, o.cols) + group * 4;
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
      const uint8_t* scales = o.block_scales(group) + i * o.stride;
      const Vec block_scale = of_block.scale[i];
      Vec min = of_block.min[i];
      const uint8_t* subs = scales + kQuant.sub_scales_at() + group % kBlockGroups * kParts * kPanelRows;
      if constexpr (kQuant.is_paired()) {
        scale_pairs(o, group, block_scale, sub(zeros(), min), subs, dot[i], sum[i]);
        continue;
      }
      Vec weight_scale[kParts] = {block_scale};
      if constexpr (kQuant.has_float_scales) {
        if constexpr (kParts == 2) weight_scale[1] = F32Weights::load(scales + kPanelRows * 4);
      } else if constexpr (kQuant.sub_scales == SubScales::e4m3) {
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part)
          weight_scale[part] = e4m3_to_floats(subs + part * kPanelRows);
      } else if constexpr (kQuant.sub_scale_cols > 0) {
        constexpr bool kIsSigned = kQuant.sub_scales == SubScales::signed_bytes;
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          weight_scale[part] = mul(block_scale, bytes_to_floats(subs + part * kPanelRows, kIsSigned));
        }
        if constexpr (kQuant.has_min) {
          const uint8_t* sub_mins = scales + kQuant.sub_mins_at() + group % kBlockGroups * kPanelRows;
          min = mul(min, bytes_to_floats(sub_mins, false));
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) {
        const Vec x_scale = broadcast(read_unaligned<float>(o.x[j] + x_scale_at));
        if constexpr (kParts == 1) {
          sum[i][j] = fma(mul(weight_scale[0], x_scale), _mm512_cvtepi32_ps(dot[i][j][0]), sum[i][j]);
        } else {
          const Vec first = mul(weight_scale[0], _mm512_cvtepi32_ps(dot[i][j][0]));
          sum[i][j] = fma(x_scale, fma(weight_scale[1], _mm512_cvtepi32_ps(dot[i][j][1]), first), sum[i][j]);
        }
        if constexpr (kQuant.has_min) {
          sum[i][j] = fma(min, broadcast(activation_sum<kFormat>(o.x[j], o.cols, group)), sum[i][j]);
        }
      }
    }
  }

  [[gnu::always_inline]] static inline void put(const MatmulArgs& a, int64_t row, int64_t token,
                                                const Sums& sum) {
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
      const int64_t rows = a.row_end - (row + i * kPanelRows);
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) {
        store(output_row(a, token + j) + (row - a.row_begin) + i * kPanelRows, sum[i][j],
              rows < kPanelRows ? rows : kPanelRows);
      }
    }
  }

  // The opposite of put: continues sums that an earlier strip of columns has put.
  [[gnu::always_inline]] static inline void take(const MatmulArgs& a, int64_t row, int64_t token, Sums& sum) {
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
      const int64_t rows = a.row_end - (row + i * kPanelRows);
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) {
        sum[i][j] = load(output_row(a, token + j) + (row - a.row_begin) + i * kPanelRows,
                         rows < kPanelRows ? rows : kPanelRows);
      }
    }
  }

  // Multiplies the sums by a float32 for each row, which the panels begin with.
  [[gnu::always_inline]] static inline void multiply_rows(const uint8_t* panel, int64_t stride, Sums& sum) {
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
      const Vec by = F32Weights::load(panel + i * stride);
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) sum[i][j] = mul(sum[i][j], by);
    }
  }

  // Unpacks four columns of sixteen rows to bytes.
  [[gnu::always_inline]] static inline __m512i unpack(const uint8_t* group, int chunk) {
    if constexpr (kQuant.bits == 8) {
      return _mm512_loadu_si512(group + chunk * kChunkBytes);
    } else if constexpr (kQuant.table != nullptr) {
      return _mm512_shuffle_epi8(table(), low_bits(group, chunk));
    } else if constexpr (kQuant.bits == kQuant.low_bits()) {
      return low_bits(group, chunk);
    } else {
      constexpr int kLowBits = kQuant.low_bits(), kHighBits = kQuant.bits - kLowBits;
      const int plane = chunk * kHighBits / 8;
      const int bit = chunk * kHighBits % 8;
      const __m512i high = _mm512_loadu_si512(group + plane * kChunkBytes);
      const __m512i in_place = bit <= kLowBits ? _mm512_slli_epi16(high, unsigned(kLowBits - bit))
                                               : _mm512_srli_epi16(high, unsigned(bit - kLowBits));
      const __m512i mask = _mm512_set1_epi8(((1 << kHighBits) - 1) << kLowBits);
      return _mm512_ternarylogic_epi32(low_bits(group, chunk), in_place, mask, 0xF8);  // low | (high & mask)
    }
  }

 private:
  [[gnu::always_inline]] static inline __m512i offset(const Operands& o, int64_t group, int token, int part) {
    if constexpr (kQuant.zero == 0 || kQuant.is_paired()) {
      return _mm512_setzero_si512();
    } else {
      const uint8_t* negated = o.x[token] + activation_negated_sums_at(kFormat, o.cols);
      return _mm512_slli_epi32(broadcast_four(negated + (group * kParts + part) * 4),
                               unsigned(kQuant.zero_shift()));
    }
  }

  [[gnu::always_inline]] static inline __m512i low_bits(const uint8_t* group, int chunk) {
    if constexpr (kQuant.low_bits() == 2) {
      const __m512i four = _mm512_loadu_si512(group + kQuant.low_at() + chunk / 4 * kChunkBytes);
      return _mm512_and_si512(_mm512_srli_epi16(four, unsigned(chunk % 4 * 2)), _mm512_set1_epi8(0x03));
    } else {
      const __m512i two = _mm512_loadu_si512(group + kQuant.low_at() + chunk % 4 * kChunkBytes);
      return _mm512_and_si512(chunk < 4 ? two : _mm512_srli_epi16(two, 4), _mm512_set1_epi8(0x0F));
    }
  }

  [[gnu::always_inline]] static inline __m512i table() {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kQuant.table)));
  }

  // The same for sub-scales stored in pairs: 16 bits hold the dot product of half a group, so one
  // multiply-add takes both halves of a row. The sums of the activations remove the zero of the quants in the
  // same way.
  [[gnu::always_inline]] static inline void scale_pairs(const Operands& o, int64_t group, Vec block_scale,
                                                        Vec negated_min, const uint8_t* subs,
                                                        const __m512i (&dot)[kTokens][kParts],
                                                        Vec (&sum)[kTokens]) {
    constexpr bool kIsNibbles = kQuant.sub_scales == SubScales::nibble_pairs;
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(subs));
    const __m512i pairs = kIsNibbles ? _mm512_cvtepu8_epi16(bytes) : _mm512_cvtepi8_epi16(bytes);
    const __m512i sub_scales = kIsNibbles ? _mm512_and_si512(pairs, _mm512_set1_epi16(0xF)) : pairs;
    const __m512i zero_scales = _mm512_mullo_epi16(sub_scales, _mm512_set1_epi16(kQuant.zero));
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; ++j) {
      const Vec x_scale =
          broadcast(read_unaligned<float>(o.x[j] + activation_scales_at(kFormat, o.cols) + group * 4));
      const __m512i negated =
          broadcast_four(o.x[j] + activation_negated_sums_at(kFormat, o.cols) + group * 4);
      const __m512i dots =
          _mm512_mask_blend_epi16(0xAAAAAAAA, dot[j][0], _mm512_slli_epi32(dot[j][kParts - 1], 16));
      const __m512i offset =
          kQuant.zero != 0 ? _mm512_madd_epi16(negated, zero_scales) : _mm512_setzero_si512();
      const __m512i whole = _mm512_dpwssd_epi32(offset, dots, sub_scales);
      sum[j] = fma(mul(block_scale, x_scale), _mm512_cvtepi32_ps(whole), sum[j]);
      if constexpr (kQuant.has_min) {
        const __m512i mins = _mm512_madd_epi16(negated, _mm512_srli_epi16(pairs, 4));
        sum[j] = fma(mul(negated_min, x_scale), _mm512_cvtepi32_ps(mins), sum[j]);
      }
    }
  }
};

}  // namespace
}  // namespace argosy
