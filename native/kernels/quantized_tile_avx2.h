// quantized_tile_avx2.h: the inner loop of matmul_quantized with exact 16-bit products.
//
//   q8  weights and activations are widened to 16 bits; vpmaddwd gives each row two partial sums of 32 bits.
//   q4  a nibble times an activation, and the sum of the sixteen such products that a lane collects in a
//       group, fits 16 bits (16 * 15 * 127 = 30480), so vpmaddubsw cannot saturate.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {

inline __m256i load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// How far ahead of the products the weights are asked for.
constexpr int64_t kPanelPrefetchBytes = 4096;

// The dot products of a group, rows 0-7 and 8-15 of each token, before the
// offset.
template <int kTokens>
[[gnu::always_inline]] inline void dot_group_q8(const uint8_t* quants, const uint8_t* const (&x)[kTokens],
                                                int64_t col, int64_t low_at, __m256i (&dot)[kTokens][2]) {
  __m256i pairs[kTokens][4];  // rows 0-3, 4-7, 8-11, 12-15; two partial sums each
#pragma GCC unroll 4
  for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) pairs[j][i] = _mm256_setzero_si256();
  }
#pragma GCC unroll 8
  for (int chunk = 0; chunk < 8; ++chunk) {
    __m256i activations[kTokens];
#pragma GCC unroll 4
    for (int j = 0; j < kTokens; ++j) {
      const uint8_t* from = x[j] + col + 4 * chunk;
      const __m128i high = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(read_unaligned<int32_t>(from)));
      const __m128i low = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(read_unaligned<int32_t>(from + low_at)));
      activations[j] = _mm256_broadcastq_epi64(_mm_add_epi16(_mm_slli_epi16(high, 8), low));
    }
    __builtin_prefetch(quants + chunk * kChunkBytes + kPanelPrefetchBytes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = quants + chunk * kChunkBytes + 16 * i;
      const __m256i weights = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
        pairs[j][i] = _mm256_add_epi32(pairs[j][i], _mm256_madd_epi16(weights, activations[j]));
      }
    }
  }
  // Horizontal addition works within 128-bit halves: rows 0 1 4 5 | 2 3 6 7, put back in order.
#pragma GCC unroll 4
  for (int j = 0; j < kTokens; ++j) {
    dot[j][0] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[j][0], pairs[j][1]), 0xD8);
    dot[j][1] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[j][2], pairs[j][3]), 0xD8);
  }
}

template <int kTokens>
[[gnu::always_inline]] inline void dot_group_q4(const uint8_t* quants, const uint8_t* const (&x)[kTokens],
                                                int64_t col, __m256i (&dot)[kTokens][2]) {
  const __m256i nibble = _mm256_set1_epi8(0x0F);
  __m256i sums[kTokens][2];  // 16-bit, two per row
#pragma GCC unroll 4
  for (int j = 0; j < kTokens; ++j) sums[j][0] = sums[j][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int chunk = 0; chunk < 4; ++chunk) {
    __builtin_prefetch(quants + chunk * kChunkBytes + kPanelPrefetchBytes);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i both = load_bytes(quants + chunk * kChunkBytes + 32 * i);
      const __m256i bottom = _mm256_and_si256(both, nibble);
      const __m256i top = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
        const uint8_t* from = x[j] + col + 4 * chunk;
        const __m256i first = _mm256_set1_epi32(read_unaligned<int32_t>(from));
        const __m256i second = _mm256_set1_epi32(read_unaligned<int32_t>(from + 16));
        const __m256i both_halves =
            _mm256_add_epi16(_mm256_maddubs_epi16(bottom, first), _mm256_maddubs_epi16(top, second));
        sums[j][i] = _mm256_add_epi16(sums[j][i], both_halves);
      }
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int j = 0; j < kTokens; ++j) {
    dot[j][0] = _mm256_madd_epi16(sums[j][0], ones);
    dot[j][1] = _mm256_madd_epi16(sums[j][1], ones);
  }
}

template <Format kFormat, int kPanels, int kTokens>
struct QuantizedTile {
  static_assert(kPanels == 1);

  static void run(const MatmulArgs& a, int64_t row, int64_t token) {
    const int64_t groups = num_groups(a.cols);
    const int64_t x_scales_at = activation_scales_at(kFormat, a.cols);
    const int64_t offsets_at = activation_offsets_at(kFormat, a.cols);
    constexpr int64_t kGroupBytes = kChunkBytes * (kFormat == Format::q8 ? 8 : 4);
    const uint8_t* quants = a.weights + row / kPanelRows * panel_bytes(kFormat, a.cols);
    const uint8_t* scales = quants + scales_at(kFormat, a.cols);
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
      __m256i dot[kTokens][2];
      if constexpr (kFormat == Format::q8) {
        dot_group_q8<kTokens>(quants + group * kGroupBytes, x, group * kGroupSize, activation_low_at(a.cols),
                              dot);
      } else {
        dot_group_q4<kTokens>(quants + group * kGroupBytes, x, group * kGroupSize, dot);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
        const __m256i offset = _mm256_set1_epi32(read_unaligned<int32_t>(x[j] + offsets_at + group * 4));
        const Vec scale = broadcast(read_unaligned<float>(x[j] + x_scales_at + group * 4));
        for (int half = 0; half < 2; ++half) {
          const Vec exact = _mm256_cvtepi32_ps(_mm256_add_epi32(dot[j][half], offset));
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
