// quantized_tile_avx2.h: the inner loop of matmul_quantized with exact 16-bit products.
//
// q8: weights and activations are widened to 16 bits; vpmaddwd gives each row two partial sums of 32 bits.
// q4: a nibble times an activation, and the sum of the sixteen such products a lane collects in a group, fits
// 16 bits
//     (16 * 15 * 127 = 30480), so vpmaddubsw cannot saturate.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {

inline __m256i load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// The dot products of a group, rows 0-7 and 8-15, before the offset.
[[gnu::always_inline]] inline void dot_group_q8(const uint8_t* quants, const uint8_t* x, const uint8_t* x_low, __m256i& low,
                         __m256i& high) {
  __m256i pairs[4];  // rows 0-3, 4-7, 8-11, 12-15; two partial sums each
  for (int i = 0; i < 4; ++i) pairs[i] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int chunk = 0; chunk < 8; ++chunk) {
    const __m128i high_bytes = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(read_unaligned<int32_t>(x + 4 * chunk)));
    const __m128i low_bytes = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(read_unaligned<int32_t>(x_low + 4 * chunk)));
    const __m128i four = _mm_add_epi16(_mm_slli_epi16(high_bytes, 8), low_bytes);
    const __m256i activations = _mm256_broadcastq_epi64(four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = quants + chunk * kChunkBytes + 16 * i;
      const __m256i weights = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(weights, activations));
    }
  }
  // Horizontal addition works within 128-bit halves: rows 0 1 4 5 | 2 3 6 7, put back in order.
  low = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[0], pairs[1]), 0xD8);
  high = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[2], pairs[3]), 0xD8);
}

[[gnu::always_inline]] inline void dot_group_q4(const uint8_t* quants, const uint8_t* x, __m256i& low, __m256i& high) {
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};  // 16-bit, two per row
#pragma GCC unroll 4
  for (int chunk = 0; chunk < 4; ++chunk) {
    const __m256i first = _mm256_set1_epi32(read_unaligned<int32_t>(x + 4 * chunk));
    const __m256i second = _mm256_set1_epi32(read_unaligned<int32_t>(x + 4 * (chunk + 4)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i both = load_bytes(quants + chunk * kChunkBytes + 32 * i);
      const __m256i bottom = _mm256_and_si256(both, nibble);
      const __m256i top = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(bottom, first));
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(top, second));
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  low = _mm256_madd_epi16(sums[0], ones);
  high = _mm256_madd_epi16(sums[1], ones);
}

template <Format kFormat, int kPanels, int kTokens>
struct QuantizedTile {
  static_assert(kPanels == 1);

  static void run(const MatmulArgs& a, int64_t row, int64_t token) {
    const int64_t groups = num_groups(a.cols);
    const int64_t scales_at = activation_scales_at(kFormat, a.cols);
    const int64_t offsets_at = activation_offsets_at(kFormat, a.cols);
    constexpr int64_t kGroupBytes = kChunkBytes * (kFormat == Format::q8 ? 8 : 4);
    const uint8_t* quants = a.weights + row / kPanelRows * panel_bytes(kFormat, a.cols);
    const uint8_t* scales = quants + quant_bytes(kFormat, a.cols);
    const uint8_t* x[kTokens];
    Vec sum[kTokens][2];
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      x[j] = activation_row(a, token + j);
      sum[j][0] = zeros();
      sum[j][1] = zeros();
    }
    for (int64_t group = 0; group < groups; ++group) {
      const Vec weight_scale[2] = {F16Weights::load(scales + group * 32),
                                   F16Weights::load(scales + group * 32 + 16)};
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
        __m256i dot[2];
        const uint8_t* activations = x[j] + group * kGroupSize;
        if constexpr (kFormat == Format::q8) {
          dot_group_q8(quants + group * kGroupBytes, activations, activations + activation_low_at(a.cols), dot[0],
                       dot[1]);
        } else {
          dot_group_q4(quants + group * kGroupBytes, activations, dot[0], dot[1]);
        }
        const __m256i offset = _mm256_set1_epi32(read_unaligned<int32_t>(x[j] + offsets_at + group * 4));
        const Vec scale = broadcast(read_unaligned<float>(x[j] + scales_at + group * 4));
        for (int half = 0; half < 2; ++half) {
          const Vec exact = _mm256_cvtepi32_ps(_mm256_add_epi32(dot[half], offset));
          sum[j][half] = fma(mul(weight_scale[half], scale), exact, sum[j][half]);
        }
      }
    }
    const int64_t rows = a.row_end - row;
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      float* y = output_row(a, token + j) + (row - a.row_begin);
      store(y, sum[j][0], rows < 8 ? rows : 8);
      if (rows > 8) store(y + 8, sum[j][1], rows < 16 ? rows - 8 : 8);
    }
  }
};

}  // namespace
}  // namespace argosy
