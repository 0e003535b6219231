// matmul_quantized.h: y = W x for quantised weights and int8 activations.
//
//   W  panels of 16 rows (formats.h), at any alignment.    y  float32, overwritten.
//   x  the output of quantize_activations, per token: both bytes of an activation for weights of 8 bits, the
//      high byte for the other formats.
//
// For each group in ascending order: y += (weight scale * activation scale) * float(dot), where dot is the
// exact integer sum over the group of q * activation; then, if the format has mins, y += min * (activation
// scale * sum of the activations). q6_k: y += activation scale * (sum over both halves of scale *
// float(dot)). q2_k, q3_k: the same, with two products added up as integers: dot times sub-scale, and sub-min
// times the sum of the activations.
//
// Few tokens: bound by memory, 0.33 to 1.06 bytes per weight. Many tokens: bound by integer multiply-adds.
#pragma once

#include "kernels/half.h"
#include "kernels/matmul_args.h"
#include "kernels/tile_operands.h"
#include "kernels/weight_scale.h"

namespace argosy {
namespace {

inline int32_t activation_at(Format format, const uint8_t* x, int64_t cols, int64_t col) {
  const int32_t high = int8_t(x[col]);
  return takes_both_bytes(format) ? 256 * high + int8_t(x[activation_low_at(cols) + col]) : high;
}

// The reference.
template <Format kFormat>
void matmul_reference(const MatmulArgs& a) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  // Columns that share one scale of the weights and one of the activations.
  constexpr int64_t kSameScale = kGroupSize / kQuant.parts();
  const Format format = format_of<kFormat>(a);
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    const uint8_t* panel = a.weights + row / kPanelRows * panel_bytes(format, a.cols);
    const int64_t lane = row % kPanelRows;
    const auto sum = [&](int64_t token) -> float& { return output_row(a, token)[row - a.row_begin]; };
    for (int64_t token = 0; token < a.num_tokens; ++token) sum(token) = 0.0f;
    for (int64_t group = 0; group < num_groups(a.cols); ++group) {
      int32_t q[kGroupSize];
      quants_of_group<kFormat>(panel, lane, group, q, format);
      WeightScale weight[2];
      for (int64_t part = 0; part < kQuant.parts(); ++part) {
        weight[part] = scale_of_part<kFormat>(panel, lane, group, part, format);
      }
      for (int64_t token = 0; token < a.num_tokens; ++token) {
        const uint8_t* x = activation_row(a, token);
        const float scale = read_unaligned<float>(x + activation_scales_at(kFormat, a.cols) + group * 4);
        float scaled = 0.0f;
        for (int64_t part = 0; part < kQuant.parts(); ++part) {
          int32_t dot = 0;
          for (int64_t i = part * kSameScale; i < (part + 1) * kSameScale; ++i) {
            dot += q[i] * activation_at(kFormat, x, a.cols, group * kGroupSize + i);
          }
          scaled += weight[part].scale * float(dot);
        }
        if constexpr (kQuant.has_min && kQuant.parts() == 2) {
          const uint8_t* negated = x + activation_negated_sums_at(Format::q6_k, a.cols) + group * 8;
          for (int64_t part = 0; part < 2; ++part) {
            scaled += weight[part].min * float(-read_unaligned<int32_t>(negated + part * 4));
          }
        }
        sum(token) += scaled * scale;
        if constexpr (kQuant.has_min && kQuant.parts() == 1) {
          sum(token) += weight[0].min * activation_sum<kFormat>(x, a.cols, group);
        }
      }
    }
    if constexpr (kQuant.has_row_scale) {
      for (int64_t token = 0; token < a.num_tokens; ++token) {
        sum(token) *= read_unaligned<float>(panel + 4 * lane);
      }
    }
  }
}

#if !ARGOSY_VECTOR

template <Format kFormat>
void matmul_quantized(const MatmulArgs& a) {
  matmul_reference<kFormat>(a);
}

#else

// A QuantizedTile<kFormat, kPanels, kTokens> (quantized_tile_*.h) computes the products of kPanels panels and
// kTokens tokens: multiply(operands, group, dot); block_scales(operands, group), the scales of a block as
// floats; scale(operands, group, block scales, dot, sum), which adds the products to the sums; and put, which
// stores the sums.

// A compile-time number of bytes.
template <int64_t kBytes>
struct Bytes {};

template <int64_t kBytes, int kLevel>
[[gnu::always_inline]] inline void ask_for(const uint8_t* from) {
#pragma GCC unroll 8
  for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(from + line, 0, kLevel);
}
[[maybe_unused]] constexpr int kIntoL1 = 3, kIntoL2 = 2;
template <int kLevel>
struct Level {};

// What a tile prefetches as it reads its panels for the first time: lines as far ahead as `distance` says,
// or, if that is nothing, all of the panels that are read next.
struct Ahead {
  AskAhead distance;
  const uint8_t* next;  // null: none, or it is not the first time
};

// Computes rows [row, row + 16 * kPanels) for tokens [token, token + kTokens). Also prefetches the lines of
// y: outputs of routed experts lie far apart in a buffer larger than the cache, and the stores at the end of
// a tile would wait for their lines one by one. Prefetches what `ahead` says only if kAsks.
template <Format kFormat, int kPanels, int kTokens, bool kAsks>
void run_tile(const MatmulArgs& a, int64_t row, int64_t token, const Ahead& ahead) {
  using Tile = QuantizedTile<kFormat, kPanels, kTokens>;
  constexpr QuantFormat kQuant = quant_format(kFormat);
  TileOperands<kFormat, kTokens> o(a, row, token);
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    const float* y = output_row(a, token + j) + (row - a.row_begin);
#pragma GCC unroll 2
    for (int i = 0; i < kPanels; ++i) __builtin_prefetch(y + i * kPanelRows, 1, kIntoL1);
  }
  // The panels that are read next lie one panel ahead: see `further`.
  const bool asks_all_of_next = ahead.distance.into_l1 == 0 && ahead.next != nullptr;
  const int64_t into_l1 = ahead.distance.into_l1;
  const int64_t into_l2 = asks_all_of_next ? o.stride : ahead.distance.into_l2;
  // Each panel is read to its end, and then the one that lies kPanels further.
  const uint8_t* const end = o.panel + o.stride;
  const int64_t jump = ahead.next != nullptr ? ahead.next - end : 0;
  const auto ask = [&]<int64_t kBytes>(const uint8_t* at, Bytes<kBytes>) {
    const auto ask_at = [&]<int kLevel>(const uint8_t* from, Level<kLevel>) {
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; ++i) ask_for<kBytes, kLevel>(from + i * o.stride);
    };
    // A prefetch cannot fault, so an address past the weights is harmless.
    const auto further = [&](int64_t bytes) { return at + bytes + (at + bytes < end ? 0 : jump); };
    if (into_l2 > 0) ask_at(further(into_l2), Level<kIntoL2>{});
    if (into_l1 > 0) ask_at(further(into_l1), Level<kIntoL1>{});
  };
  const int64_t groups = num_groups(a.cols);
  typename Tile::Sums sum = {};
  for (int64_t block = 0; block < groups; block += o.block_groups()) {
    o.enter_block();
    if constexpr (kAsks) ask(o.block_scales(block), Bytes<kQuant.block_scale_bytes()>{});
    for (int64_t group = block; group < groups && group < block + o.block_groups(); ++group) {
      if constexpr (kAsks) ask(o.quants(group), Bytes<kQuant.group_bytes()>{});
      typename Tile::Dots dot;
      Tile::multiply(o, group, dot);
      // Converted again for each group: a large tile has no registers to keep the scales in.
      Tile::scale(o, group, Tile::block_scales(o, group), dot, sum);
      o.leave_group();
    }
  }
  if constexpr (kQuant.has_row_scale) Tile::multiply_rows(o.panel, o.stride, sum);
  Tile::put(a, row, token, sum);
}

// The same for one panel and one token. Reading the weights dominates, so it prefetches them as far ahead as
// a.tuning.ask_ahead says: up to the end of the rows, and from there at next_weights.
template <Format kFormat, bool kAsksL1, bool kAsksL2>
void run_one_token(const MatmulArgs& a, int64_t row) {
  using Tile = QuantizedTile<kFormat, 1, 1>;
  constexpr QuantFormat kQuant = quant_format(kFormat);
  TileOperands<kFormat, 1> o(a, row, 0);
  const uint8_t* end = o.panel + (a.row_end - row + kPanelRows - 1) / kPanelRows * o.stride;
  const uint8_t* next = a.next_weights != nullptr ? a.next_weights : end;
  // A prefetch cannot fault, so an address past the weights is harmless.
  const auto ahead = [&](const uint8_t* at, int64_t bytes) {
    return at + bytes < end ? at + bytes : next + (at + bytes - end);
  };
  const auto ask = [&]<int64_t kBytes>(const uint8_t* at, Bytes<kBytes>) {
    if constexpr (kAsksL2) ask_for<kBytes, kIntoL2>(ahead(at, a.tuning.ask_ahead.into_l2));
    if constexpr (kAsksL1) ask_for<kBytes, kIntoL1>(ahead(at, a.tuning.ask_ahead.into_l1));
  };
  const int64_t groups = num_groups(a.cols);
  typename Tile::Sums sum = {};
  for (int64_t block = 0; block < groups; block += o.block_groups()) {
    o.enter_block();
    ask(o.block_scales(block), Bytes<kQuant.block_scale_bytes()>{});
    const typename Tile::BlockScales scales = Tile::block_scales(o, block);
    for (int64_t group = block; group < groups && group < block + o.block_groups(); ++group) {
      ask(o.quants(group), Bytes<kQuant.group_bytes()>{});
      typename Tile::Dots dot;
      Tile::multiply(o, group, dot);
      Tile::scale(o, group, scales, dot, sum);
      o.leave_group();
    }
  }
  if constexpr (kQuant.has_row_scale) Tile::multiply_rows(o.panel, o.stride, sum);
  Tile::put(a, row, 0, sum);
}

constexpr bool l2_is_never_asked_alone() {
  for (const AskAhead& each : kAskAheads) {
    if (each.into_l2 > 0 && each.into_l1 == 0) return false;
  }
  return true;
}

template <Format kFormat>
void matmul_one_token(const MatmulArgs& a) {
  static_assert(l2_is_never_asked_alone());
  const bool asks_l1 = a.tuning.ask_ahead.into_l1 > 0, asks_l2 = a.tuning.ask_ahead.into_l2 > 0;
  const auto run = asks_l2   ? run_one_token<kFormat, true, true>
                   : asks_l1 ? run_one_token<kFormat, true, false>
                             : run_one_token<kFormat, false, false>;
  for (int64_t row = a.row_begin; row < a.row_end; row += kPanelRows) run(a, row);
}

// Processes all tokens of kPanels panels, at least two, in tiles of nearly equal size: a tile of one token
// takes as long as a tile of two. So the first of several tiles has at least half of kMostTokens, and each
// later one has more; the compiler makes no others.
template <Format kFormat, int kPanels, int kMostTokens>
void run_panels(const MatmulArgs& a, int64_t row) {
  const uint8_t* next =
      row + kPanels * kPanelRows < a.row_end
          ? a.weights + (row / kPanelRows + kPanels) * panel_bytes(format_of<kFormat>(a), a.cols)
          : a.next_weights;
  const int64_t tiles = (a.num_tokens + kMostTokens - 1) / kMostTokens;
  // The first of several tiles waits for memory and the others do not, so it prefetches the next panels.
  const Ahead ahead = {tiles == 1 ? a.tuning.few_ask_ahead : AskAhead{}, next};
  constexpr int kFewest = kMostTokens < 4 ? 1 : 2, kFewestLater = kMostTokens / 2 + 1;
  with_number<kMostTokens, kFewest>(a.num_tokens / tiles, [&]<int kTokens>(Number<kTokens>) {
    run_tile<kFormat, kPanels, kTokens, true>(a, row, 0, ahead);
  });
  for (int64_t tile = 1; tile < tiles; ++tile) {
    const int64_t begin = a.num_tokens * tile / tiles, end = a.num_tokens * (tile + 1) / tiles;
    with_number<kMostTokens, kFewestLater>(end - begin, [&]<int kTokens>(Number<kTokens>) {
      run_tile<kFormat, kPanels, kTokens, !kHasTilesWithoutPrefetch>(a, row, begin, {});
    });
  }
}

template <Format kFormat>
void matmul_quantized(const MatmulArgs& a) {
  if (a.num_tokens == 1) return matmul_one_token<kFormat>(a);
  int64_t row = a.row_begin;
#if ARGOSY_AVX512
  if (a.num_tokens >= a.tuning.two_panels_from) {
    for (; row + kPanelRows < a.row_end; row += 2 * kPanelRows) {
      run_panels<kFormat, 2, two_panels_tokens(kFormat)>(a, row);
    }
  }
#endif
  for (; row < a.row_end; row += kPanelRows) run_panels<kFormat, 1, one_panel_tokens(kFormat)>(a, row);
}

#endif

}  // namespace
}  // namespace argosy
