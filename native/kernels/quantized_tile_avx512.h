// quantized_tile_avx512.h: the inner loop of matmul_quantized with vpdpbusd.
//
// Sixteen rows are the lanes of a register: 64 bytes of a panel times four broadcast activations add to
// sixteen sums. The sum starts at the group's offset, which takes 128 (q8) or 8 (q4) out of every weight.
// Beside q8 weights there are two sums, of the high and of the low bytes of the activations; weights are
// loaded once.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {

// How far ahead of the products the weights are asked for.
constexpr int64_t kPanelPrefetchBytes = 8192;

inline __m512i broadcast_four(const uint8_t* activations) {
  return _mm512_set1_epi32(read_unaligned<int32_t>(activations));
}

template <Format kFormat, int kPanels, int kTokens>
struct QuantizedTile {
  // Sums of a group: of the high bytes of the activations, and beside q8 weights of the low ones.
  static constexpr int kBytes = kFormat == Format::q8 ? 2 : 1;
  using Dots = __m512i[kPanels][kTokens][kBytes];
  using Rows = const uint8_t* [kTokens];

  static void run(const MatmulArgs& a, int64_t row, int64_t token) {
    const int64_t groups = num_groups(a.cols);
    const int64_t stride = panel_bytes(kFormat, a.cols);
    const int64_t x_scales_at = activation_scales_at(kFormat, a.cols);
    const int64_t offsets_at = activation_offsets_at(kFormat, a.cols);
    const int64_t low_at = activation_low_at(a.cols);
    constexpr int64_t kGroupBytes = kChunkBytes * (kFormat == Format::q8 ? 8 : 4);
    const uint8_t* quants = a.weights + row / kPanelRows * stride;
    const uint8_t* scales = quants + scales_at(kFormat, a.cols);
    Rows x;
    Vec sum[kPanels][kTokens];
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; ++j) {
      x[j] = activation_row(a, token + j);
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) sum[i][j] = zeros();
    }
    for (int64_t group = 0; group < groups; ++group) {
      Dots dot;
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) {
#pragma GCC unroll 2
        for (int i = 0; i < kPanels; ++i) {
          dot[i][j][0] = kBytes == 1 ? broadcast_four(x[j] + offsets_at + group * 4) : _mm512_setzero_si512();
          if constexpr (kBytes == 2) dot[i][j][1] = broadcast_four(x[j] + offsets_at + group * 4);
        }
      }
      add_group(quants + group * kGroupBytes, stride, x, group * kGroupSize, low_at, dot);
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) {
        const Vec weight_scale = F16Weights::load(scales + i * stride + group * kPanelRows * 2);
#pragma GCC unroll 16
        for (int j = 0; j < kTokens; ++j) {
          const Vec scale =
              mul(weight_scale, broadcast(read_unaligned<float>(x[j] + x_scales_at + group * 4)));
          __m512i whole = dot[i][j][0];
          if constexpr (kBytes == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), dot[i][j][1]);
          sum[i][j] = fma(scale, _mm512_cvtepi32_ps(whole), sum[i][j]);
        }
      }
    }
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

  [[gnu::always_inline]] static inline void add_group(const uint8_t* quants, int64_t stride, const Rows& x,
                                                      int64_t col, int64_t low_at, Dots& dot) {
    constexpr int kChunks = kFormat == Format::q8 ? 8 : 4;
#pragma GCC unroll 8
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      __m512i w[kPanels];
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) {
        const uint8_t* from = quants + i * stride + chunk * kChunkBytes;
        w[i] = _mm512_loadu_si512(from);
        __builtin_prefetch(from + kPanelPrefetchBytes);
      }
      if constexpr (kFormat == Format::q8) {
        add_chunk<0>(w, x, col + 4 * chunk, dot);
        add_chunk<1>(w, x, low_at + col + 4 * chunk, dot);
      } else {
        const __m512i nibble = _mm512_set1_epi8(0x0F);
        __m512i half[kPanels];
#pragma GCC unroll 2
        for (int i = 0; i < kPanels; ++i) half[i] = _mm512_and_si512(w[i], nibble);
        add_chunk<0>(half, x, col + 4 * chunk, dot);
#pragma GCC unroll 2
        for (int i = 0; i < kPanels; ++i) half[i] = _mm512_and_si512(_mm512_srli_epi16(w[i], 4), nibble);
        add_chunk<0>(half, x, col + 4 * (chunk + 4), dot);
      }
    }
  }

  template <int kByte>
  [[gnu::always_inline]] static inline void add_chunk(const __m512i (&w)[kPanels], const Rows& x, int64_t at,
                                                      Dots& dot) {
#pragma GCC unroll 16
    for (int j = 0; j < kTokens; ++j) {
      const __m512i four = broadcast_four(x[j] + at);
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) dot[i][j][kByte] = _mm512_dpbusd_epi32(dot[i][j][kByte], w[i], four);
    }
  }
};

}  // namespace
}  // namespace argosy
