// matmul_amx.h: matmul_quantized with Intel AMX, for many tokens; the same bits.
//
// The dot product of a group is an exact integer, whatever computes it, and the operations on floats are
// those of quantized_tile_avx512.h, in the same order (docs/decisions/0081). 64 bytes of a panel are four
// columns of sixteen rows, which is one row of a tile: a group of 32 columns is a tile of eight rows, and
// sixteen tokens are the other operand. The remainder (a last panel, a few tokens) goes to AVX-512.
//
// For a block of groups, the quants of two panels are unpacked to signed bytes and their scales to floats.
// Then, for each sixteen tokens, four groups at a time are multiplied, and then scaled: after a tile
// instruction, 512-bit multiplications run at half speed for about 140 cycles, so the two take turns rarely.
//
// Activations are copied tile by tile: by the number of instructions, that takes as long as multiplying them
// by eight rows. So a call should have many rows, or repeat the activations of the one before
// (MatmulArgs::repeats_x).
#pragma once

#include <cstring>

#include "kernels/amx.h"
#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "kernels/product_scratch.h"
#include "kernels/quantized_tile_avx512.h"

namespace argosy {

extern const KernelTable kAvx512Kernels;

namespace {

// The memory of one product: MatmulArgs::scratch.
struct AmxScratch {
  static constexpr int64_t kTokens = 128, kPanels = 2;
  // Groups whose weights are unpacked together, and groups that are multiplied before they are scaled.
  static constexpr int64_t kBlock = 16, kPhase = 4;
  static constexpr int64_t kActivationBytes = int64_t{512} << 10;
  static constexpr int64_t kScales = kActivationBytes / kGroupSize;  // a group of one token has one

  ProductScratch kept;  // of `activations`
  // [16 tokens][group][high, low][token][32]
  alignas(64) uint8_t activations[kActivationBytes];
  // [16 tokens][group][token]: activation scales, and scales times sums
  alignas(64) float x_scale[kScales], x_sum[kScales];
  alignas(64) uint8_t weights[kPanels][kBlock][kTileRowBytes * 8];
  alignas(64) float scale[kPanels][kBlock][2][kPanelRows], min[kPanels][kBlock][kPanelRows];
  // The dot products of the high and low bytes of q8, or of both halves of a group.
  alignas(64) int32_t dots[kPhase][kPanels][2][kTileRows][kPanelRows];
  alignas(64) float sums[kTokens / kTileRows][kPanels][kTileRows][kPanelRows];
};
static_assert(sizeof(AmxScratch) <= kAmxScratchBytes);

// Tiles 0 to 3 are dot products, 4 and 5 activations, 6 and 7 weights.
constexpr TileConfig tile_config(int64_t parts) {
  TileConfig config;
  for (int i = 0; i < 4; ++i) {  // dot products
    config.rows[i] = kTileRows;
    config.row_bytes[i] = kTileRowBytes;
  }
  for (int i = 4; i < 6; ++i) {  // activations
    config.rows[i] = kTileRows;
    config.row_bytes[i] = uint16_t(kGroupSize / parts);
  }
  for (int i = 6; i < 8; ++i) {  // weights
    config.rows[i] = uint8_t(kGroupSize / 4 / parts);
    config.row_bytes[i] = kTileRowBytes;
  }
  return config;
}

template <Format kFormat>
class AmxProduct {
  static constexpr QuantFormat kQuant = quant_format(kFormat);
  static constexpr bool kIsQ8 = kFormat == Format::q8;
  static constexpr int kParts = kQuant.parts();
  static constexpr int64_t kPlanes = kIsQ8 ? 2 : 1;  // bytes of an activation
  static constexpr int kDots = kIsQ8 ? 2 : kParts;   // tiles of dot products for a panel
  static constexpr int64_t kGroupActivations = kPlanes * kTileRows * kGroupSize;
  static constexpr int64_t kPanels = AmxScratch::kPanels, kBlock = AmxScratch::kBlock;
  static constexpr int64_t kPhase = AmxScratch::kPhase;
  static constexpr int kHalf = 8;  // tokens whose sums fit in registers
  static_assert(!kQuant.is_paired());

 public:
  // The most tokens that are processed together; 0: not even sixteen, because there are too many columns.
  static int64_t most_tokens(int64_t cols) {
    const int64_t fit = AmxScratch::kActivationBytes / (num_groups(cols) * kPlanes * kGroupSize);
    return (fit < AmxScratch::kTokens ? fit : AmxScratch::kTokens) / kTileRows * kTileRows;
  }

  // All rows are in whole pairs of panels, except that the last panel may have fewer rows.
  static void run(const MatmulArgs& a) {
    static constexpr TileConfig kConfig = tile_config(kParts);
    AmxProduct product(a);
    if (!a.repeats_x || !product.s.kept.holds(a, kFormat)) product.pack();
    const TileScope tiles(kConfig);
    for (int64_t row = a.row_begin; row < a.row_end; row += kPanels * kPanelRows) product.run_panels(row);
  }

 private:
  explicit AmxProduct(const MatmulArgs& args)
      : a(args),
        s(*reinterpret_cast<AmxScratch*>(args.scratch)),
        groups(num_groups(args.cols)),
        stride(panel_bytes(kFormat, args.cols)),
        num_tiles((args.num_tokens + kTileRows - 1) / kTileRows) {}

  uint8_t* activations(int64_t tile, int64_t group) const {
    return s.activations + (tile * groups + group) * kGroupActivations;
  }

  // Copies activations tile by tile, with zeros for missing tokens.
  void pack() {
    s.kept.hold(a, kFormat);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = tile * kTileRows;
      const uint8_t* x[kTileRows];  // null: missing
      for (int64_t j = 0; j < kTileRows; ++j) {
        x[j] = first + j < a.num_tokens ? activation_row(a, first + j) : nullptr;
        for (int64_t plane = 0; plane < kPlanes; ++plane) pack_token(x[j], tile, plane, j);
      }
      pack_floats(x, activation_scales_at(kFormat, a.cols), s.x_scale + first * groups);
      if constexpr (kQuant.has_min) pack_floats(x, activation_sums_at(a.cols), s.x_sum + first * groups);
    }
  }

  void pack_token(const uint8_t* x, int64_t tile, int64_t plane, int64_t j) {
    uint8_t* to = activations(tile, 0) + (plane * kTileRows + j) * kGroupSize;
    for (int64_t group = 0; group < groups; ++group) {
      __m256i bytes = _mm256_setzero_si256();
      if (x != nullptr) {
        const uint8_t* from = x + plane * activation_low_at(a.cols) + group * kGroupSize;
        bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + group * kGroupActivations), bytes);
    }
  }

  // Sixteen tokens' floats of each group, which lie `at` bytes after the beginning of their activations,
  // become [group][token].
  void pack_floats(const uint8_t* const (&x)[kTileRows], int64_t at, float* to) {
    for (int64_t group = 0; group < groups; group += kLanes) {
      const int64_t n = groups - group < kLanes ? groups - group : kLanes;
      Vec rows[kLanes];
      for (int64_t j = 0; j < kTileRows; ++j) {
        rows[j] = x[j] != nullptr ? F32Weights::load(x[j] + at + group * 4, n) : zeros();
      }
      transpose(rows);
      for (int64_t i = 0; i < n; ++i) store(to + (group + i) * kTileRows, rows[i]);
    }
  }

  void run_panels(int64_t row) {
    const uint8_t* panel = a.weights + row / kPanelRows * stride;
    const bool is_last = row + kPanels * kPanelRows >= a.row_end;
    const uint8_t* next = is_last ? a.next_weights : panel + kPanels * stride;
    std::memset(s.sums, 0, size_t(num_tiles) * sizeof(s.sums[0]));
    for (int64_t block = 0; block < groups; block += kBlock) {
      const int64_t count = groups - block < kBlock ? groups - block : kBlock;
      for (int64_t i = 0; i < kPanels; ++i) unpack(panel + i * stride, i, block, count);
      // Each phase prefetches its share of what the same block of the next panels holds.
      const int64_t phases = (count + kPhase - 1) / kPhase * num_tiles;
      const int64_t lines = (count * kQuant.block_bytes() / kQuant.block_groups() / phases + 63) / 64;
      const uint8_t* ask = next != nullptr ? next + kQuant.scales_at(block) : nullptr;
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        for (int64_t g = 0; g < count; g += kPhase) {
          if (ask != nullptr) {
            for (int64_t line = 0; line < lines; ++line) {
              // A prefetch cannot fault, so an address past the weights is harmless.
              __builtin_prefetch(ask + line * 64, 0, 2);
              __builtin_prefetch(ask + line * 64 + stride, 0, 2);
            }
            ask += lines * 64;
          }
          with_number<kPhase>(count - g < kPhase ? count - g : kPhase, [&]<int kCount>(Number<kCount>) {
            multiply<kCount>(activations(tile, block + g), g);
            scale<kCount>(tile, block + g, g, 0);
            if (a.num_tokens - tile * kTileRows > kHalf) scale<kCount>(tile, block + g, g, kHalf);
          });
        }
      }
    }
    put(row);
  }

  // Unpacks quants to signed bytes, and scales and mins to floats.
  void unpack(const uint8_t* panel, int64_t i, int64_t block, int64_t count) {
    using Tile = QuantizedTile<kFormat, 1, 1>;
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* quants = panel + kQuant.quants_at(block + g);
      uint8_t* to = s.weights[i][g];
      if constexpr (kQuant.bits == 4 && kQuant.table == nullptr) {
        // Both steps at once, as a product of bit matrices: the row of bit b of a result is in byte 7 - b.
        // With a zero of 8, bits 3 to 7 of a result are the inverse of the highest bit of the code.
        constexpr uint64_t kLow = kQuant.zero == 8 ? 0x0102040808080808 : 0x0102040800000000;
        constexpr int kInverted = kQuant.zero == 8 ? 0xF8 : 0;
        static_assert(kQuant.zero == 0 || kQuant.zero == 8);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const __m512i two = _mm512_loadu_si512(quants + c * kChunkBytes);
          const __m512i low = _mm512_gf2p8affine_epi64_epi8(two, _mm512_set1_epi64(kLow), kInverted);
          const __m512i high = _mm512_gf2p8affine_epi64_epi8(two, _mm512_set1_epi64(kLow << 4), kInverted);
          _mm512_store_si512(to + c * kChunkBytes, low);
          _mm512_store_si512(to + (c + 4) * kChunkBytes, high);
        }
      } else {
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) {
          const __m512i zero = _mm512_set1_epi8(char(kQuant.zero));
          _mm512_store_si512(to + c * kChunkBytes, _mm512_sub_epi8(Tile::unpack(quants, c), zero));
        }
      }
      const uint8_t* scales = panel + kQuant.scales_at(block + g);
      const Vec block_scale = kQuant.is_bf16 ? Bf16Weights::load(scales) : F16Weights::load(scales);
      Vec scale[kParts] = {block_scale};
      Vec min = zeros();
      if constexpr (kQuant.has_min) min = F16Weights::load(scales + kPanelRows * 2);
      if constexpr (kQuant.sub_scale_cols > 0) {
        constexpr bool kIsSigned = kQuant.sub_scales == SubScales::signed_bytes;
        const int64_t inside = (block + g) % kQuant.block_groups();
        const uint8_t* subs = scales + kQuant.sub_scales_at() + inside * kParts * kPanelRows;
        for (int part = 0; part < kParts; ++part) {
          scale[part] = mul(block_scale, bytes_to_floats(subs + part * kPanelRows, kIsSigned));
        }
        if constexpr (kQuant.has_min) {
          min = mul(min, bytes_to_floats(scales + kQuant.sub_mins_at() + inside * kPanelRows, false));
        }
      }
      for (int part = 0; part < kParts; ++part) store(s.scale[i][g][part], scale[part]);
      if constexpr (kQuant.has_min) store(s.min[i][g], min);
    }
  }

  // The dot products of kCount groups from group g of the block. A tile is stored after the next product has
  // begun, and each product has another tile of sums than the two before it.
  template <int kCount>
  [[gnu::always_inline]] void multiply(const uint8_t* x, int64_t g) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const uint8_t* of_group = x + i * kGroupActivations;
      if constexpr (kDots == 2) {
        multiply_two(of_group, g, i);
      } else if (i % 2 == 0) {
        multiply_one<0>(of_group, g, i);
      } else {
        multiply_one<1>(of_group, g, i);
      }
    }
    if constexpr (kDots == 2) {
      store_tile<2>(s.dots[kCount - 1][1][0], kTileRowBytes);
      store_tile<3>(s.dots[kCount - 1][1][1], kTileRowBytes);
    } else {
      store_tile<(kCount - 1) % 2 * 2>(s.dots[kCount - 1][0][0], kTileRowBytes);
      store_tile<(kCount - 1) % 2 * 2 + 1>(s.dots[kCount - 1][1][0], kTileRowBytes);
    }
  }

  // Group i of a phase; kOdd: whether i is odd.
  template <int kOdd>
  [[gnu::always_inline]] void multiply_one(const uint8_t* x, int64_t g, int i) {
    constexpr int kSums = 2 * kOdd, kLast = 2 - kSums, kX = 4 + kOdd;
    load_tile<kX>(x, kGroupSize);
    load_tile<6>(s.weights[0][g + i], kTileRowBytes);
    if (i > 0) store_tile<kLast>(s.dots[i - 1][0][0], kTileRowBytes);
    zero_tile<kSums>();
    dot_tile_int8<kSums, kX, 6>();
    load_tile<7>(s.weights[1][g + i], kTileRowBytes);
    if (i > 0) store_tile<kLast + 1>(s.dots[i - 1][1][0], kTileRowBytes);
    zero_tile<kSums + 1>();
    dot_tile_int8<kSums + 1, kX, 7>();
  }

  // The same for two dot products of a group: of both bytes of its activations, or of both its halves.
  [[gnu::always_inline]] void multiply_two(const uint8_t* x, int64_t g, int i) {
    constexpr int64_t kOther =
        kIsQ8 ? kTileRows * kGroupSize : kGroupSize / 2;  // from the first to the second
    const uint8_t *w0 = s.weights[0][g + i], *w1 = s.weights[1][g + i];
    load_tile<4>(x, kGroupSize);
    load_tile<6>(w0, kTileRowBytes);
    if (i > 0) store_tile<2>(s.dots[i - 1][1][0], kTileRowBytes);
    zero_tile<0>();
    dot_tile_int8<0, 4, 6>();
    load_tile<5>(x + kOther, kGroupSize);
    if constexpr (!kIsQ8) load_tile<7>(w0 + 4 * kChunkBytes, kTileRowBytes);
    if (i > 0) store_tile<3>(s.dots[i - 1][1][1], kTileRowBytes);
    zero_tile<1>();
    dot_tile_int8<1, 5, kIsQ8 ? 6 : 7>();
    load_tile<kIsQ8 ? 7 : 6>(w1, kTileRowBytes);
    store_tile<0>(s.dots[i][0][0], kTileRowBytes);
    zero_tile<2>();
    dot_tile_int8<2, 4, kIsQ8 ? 7 : 6>();
    if constexpr (!kIsQ8) load_tile<7>(w1 + 4 * kChunkBytes, kTileRowBytes);
    store_tile<1>(s.dots[i][0][1], kTileRowBytes);
    zero_tile<3>();
    dot_tile_int8<3, 5, 7>();
  }

  // Adds kCount groups to the sums of the tokens from `first` of a tile; g is the first group's place in the
  // block.
  template <int kCount>
  void scale(int64_t tile, int64_t group, int64_t g, int64_t first) {
    Vec sum[kPanels][kHalf];
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kHalf; ++j) sum[i][j] = load(s.sums[tile][i][first + j]);
    }
    const float* x_scale = s.x_scale + (tile * groups + group) * kTileRows + first;
    const float* x_sum = s.x_sum + (tile * groups + group) * kTileRows + first;
#pragma GCC unroll 1
    for (int n = 0; n < kCount; ++n) {
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) {
        const float(*weight_scale)[kPanelRows] = s.scale[i][g + n];
#pragma GCC unroll 8
        for (int j = 0; j < kHalf; ++j) {
          const Vec by = broadcast(x_scale[n * kTileRows + j]);
          Vec dot[2];
#pragma GCC unroll 2
          for (int part = 0; part < kDots; ++part) {
            const __m512i whole = _mm512_load_si512(s.dots[n][i][part][first + j]);
            dot[part] = _mm512_cvtepi32_ps(whole);
          }
          if constexpr (kIsQ8) {
            const __m512i high = _mm512_load_si512(s.dots[n][i][0][first + j]);
            const __m512i low = _mm512_load_si512(s.dots[n][i][1][first + j]);
            dot[0] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
          }
          if constexpr (kParts == 1) {
            sum[i][j] = fma(mul(load(weight_scale[0]), by), dot[0], sum[i][j]);
          } else {
            const Vec scaled = mul(load(weight_scale[0]), dot[0]);
            sum[i][j] = fma(by, fma(load(weight_scale[1]), dot[1], scaled), sum[i][j]);
          }
          if constexpr (kQuant.has_min) {
            sum[i][j] = fma(load(s.min[i][g + n]), broadcast(x_sum[n * kTileRows + j]), sum[i][j]);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kHalf; ++j) store(s.sums[tile][i][first + j], sum[i][j]);
    }
  }

  void put(int64_t row) {
    for (int64_t i = 0; i < kPanels; ++i) {
      const int64_t rows = a.row_end - (row + i * kPanelRows);
      for (int64_t token = 0; token < a.num_tokens; ++token) {
        store(output_row(a, token) + (row - a.row_begin) + i * kPanelRows,
              load(s.sums[token / kTileRows][i][token % kTileRows]), rows < kPanelRows ? rows : kPanelRows);
      }
    }
  }

  const MatmulArgs& a;
  AmxScratch& s;
  const int64_t groups, stride, num_tiles;
};

template <Format kFormat>
void matmul_amx(const MatmulArgs& a) {
  const auto avx512 = kAvx512Kernels.matmul[int(kFormat)];
  if (a.scratch == nullptr) return avx512(a);
  ProductScratch& kept = *reinterpret_cast<ProductScratch*>(a.scratch);
  const int64_t rows = a.row_end - a.row_begin, panels = (rows + kPanelRows - 1) / kPanelRows;
  count_operations(kept.counts.all, rows, a.cols, a.num_tokens);
  if (!a.repeats_x) kept.x = nullptr;
  const bool is_wanted = a.tuning.amx_from > 0 && a.num_tokens >= a.tuning.amx_from;
  const int64_t most = a.cols > 0 ? AmxProduct<kFormat>::most_tokens(a.cols) : 0;
  if (!is_wanted || panels < 2 || most == 0) return avx512(a);
  // A last panel without another is left over.
  MatmulArgs paired = a, alone = a;
  if (panels % 2 != 0) {
    paired.row_end = alone.row_begin = a.row_begin + (panels - 1) * kPanelRows;
    alone.y += alone.row_begin - a.row_begin;
    paired.next_weights = a.weights + alone.row_begin / kPanelRows * panel_bytes(kFormat, a.cols);
  }
  // A tile takes as long for one token as for sixteen.
  const int64_t left = a.num_tokens % kTileRows;
  const int64_t in_tiles = left < kTileRows / 2 ? a.num_tokens - left : a.num_tokens;
  count_operations(kept.counts.in_tiles, paired.row_end - a.row_begin, a.cols, in_tiles);
  for (int64_t first = 0; first < in_tiles; first += most) {
    AmxProduct<kFormat>::run(some_tokens(paired, first, in_tiles - first < most ? in_tiles - first : most));
  }
  if (in_tiles < a.num_tokens) avx512(some_tokens(paired, in_tiles, left));
  if (panels % 2 != 0) avx512(alone);
}

}  // namespace
}  // namespace argosy
