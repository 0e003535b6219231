// matmul_float_amx.h: y = W x for bfloat16 and FP8 weights on the tiles of Intel AMX, for any number of
// tokens.
//
//   W  as in matmul_float.h and matmul_f8.h.    x  float32 [tokens][cols].    y  float32, overwritten.
//
// Activations are split into two bfloat16 parts, which keep 16 bits of each (split_bf16.h). Sixteen rows by
// 32 columns of weights are the left operand of a product of tiles, and the same columns of one part of
// sixteen tokens are the right one. Every 32 columns, in ascending order, add two products to a sum: that
// with the low parts, then that with the high ones. FP8 codes are exact in bfloat16; the sum of each 128
// columns begins at zero and is multiplied by its scale in float32.
//
// Tiles sum even and odd columns apart, so the bits are not those of AVX-512. But they are the same for one
// token as for many: a sum depends on its row and on its token, not on the other contents of the tiles.
// Incomplete columns, rows and tokens are filled up with zeros.
//
// Numbers below the smallest normal one count as zero. An activation that is infinite, or beyond the largest
// bfloat16, is multiplied as infinite, as in float32. A weight that is infinite or NaN makes its row NaN or
// infinite.
//
// Few tokens: bound by memory; what a block of weights is followed by is prefetched while it is multiplied.
// Many tokens: bound by products of tiles. Weights that are not aligned to cache lines, or that more than 32
// tokens share, are first copied to tiles, and FP8 codes converted there: for all tokens of the call, 512
// columns of 32 rows at a time.
//
// By a count of cycles, splitting activations takes as long as multiplying them by about a hundred rows. So a
// call should get them split (MatmulArgs::split_x), have many rows, or repeat the activations of the one
// before (repeats_x). One token needs no transposition: its tiles have one column.
#pragma once

#include "kernels/amx.h"
#include "kernels/matmul_args.h"
#include "kernels/product_scratch.h"
#include "kernels/split_bf16.h"

namespace argosy {
namespace {

constexpr int64_t kStepCols = 32;  // columns of a product of tiles
static_assert(kSplitTokens == kTileRows);

// The memory of one product: MatmulArgs::scratch.
struct FloatScratch {
  static constexpr int64_t kTokens = most_split_tokens(1);  // that are processed together
  static constexpr int64_t kRows = 2 * kTileRows, kCols = 512, kSteps = kCols / kStepCols;  // of a block

  ProductScratch kept;  // of `activations`
  // [16 tokens][step][high, low]: tiles, of one column if there is one token
  alignas(64) uint8_t activations[kKeptSplitBytes];
  alignas(64) uint8_t weights[2][kSteps][kTileBytes];
  // [16 tokens][16 rows]: tiles of sums, and of sums of 128 columns
  alignas(64) uint8_t sums[kTokens / kTileRows * 2 * kTileBytes], parts[4 * kTileBytes];
};
static_assert(sizeof(FloatScratch) <= kSplitScratchBytes);

struct Bf16OnTiles {
  static constexpr int64_t kBytes = 2, kScaledSteps = 0;
  static const uint8_t* row(const MatmulArgs& a, int64_t row) { return a.weights + row * a.cols * 2; }
  // The next n columns, at most 32, followed by zeros.
  static __m512i load(const uint8_t* from, int64_t n) {
    if (n >= kStepCols) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, from);
  }
};

struct F8OnTiles {
  static constexpr int64_t kBytes = 1, kScaledSteps = kF8Block / kStepCols;
  static const uint8_t* row(const MatmulArgs& a, int64_t row) {
    return a.weights + f8_row_at(Format::f8, row, a.cols);
  }
  static float scale(const MatmulArgs& a, int64_t row, int64_t col) {
    return read_unaligned<float>(a.weights + f8_scales_at(Format::f8, row, a.cols) + col / kF8Block * 4);
  }
  // A normal code has the exponent and the three highest bits of its bfloat16, which has another bias. The
  // seven magnitudes below come from a table: as bfloat16, they are normal numbers.
  static __m512i load(const uint8_t* from, int64_t n) {
    const __m256i bytes = n >= kStepCols ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                         : _mm256_maskz_loadu_epi8((__mmask32{1} << n) - 1, from);
    const __m512i codes = _mm512_cvtepi8_epi16(bytes);
    const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7F));
    const __m512i normal =
        _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16((127 - 7) << 7));
    // 0, 1 / 512, 2 / 512, ... 7 / 512
    const __m512i small =
        _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
    const __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    const __m512i value = _mm512_mask_permutexvar_epi16(normal, is_small, magnitude, small);
    // value | (codes & sign)
    return _mm512_ternarylogic_epi32(value, codes, _mm512_set1_epi16(int16_t(0x8000)), 0xF8);
  }
};

// Pairs of columns of `count` tokens become rows of a tile, with zeros for missing tokens.
inline void put_columns(const __m512i (&tokens)[kTileRows], int64_t count, uint8_t* to) {
  Vec rows[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) rows[t] = t < count ? _mm512_castsi512_ps(tokens[t]) : zeros();
  transpose(rows);
  for (int64_t i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + i * kTileRowBytes), rows[i]);
}

// Splits columns [begin, end) of up to sixteen tokens into tiles; `begin` is a multiple of 32. If the token
// is alone, its tiles have one column.
inline void split_tokens(const float* const (&x)[kTileRows], int64_t count, bool is_alone, int64_t begin,
                         int64_t end, uint8_t* to) {
  for (int64_t col = begin; col < end; col += kStepCols) {
    const int64_t n = end - col;
    __m512i high[kTileRows], low[kTileRows];
    for (int64_t t = 0; t < count; ++t) {
      const Vec first = load(x[t] + col, n < kLanes ? n : kLanes);
      const int64_t rest = n < kStepCols ? n - kLanes : kLanes;
      const Vec second = rest > 0 ? load(x[t] + col + kLanes, rest) : zeros();
      split_any(first, second, high[t], low[t]);
    }
    if (is_alone) {
      _mm512_store_si512(to, high[0]);
      _mm512_store_si512(to + kTileRowBytes, low[0]);
      to += 2 * kTileRowBytes;
    } else {
      put_columns(high, count, to);
      put_columns(low, count, to + kTileBytes);
      to += 2 * kTileBytes;
    }
  }
}

void split_activations(const SplitArgs& a) {
  const int64_t first = a.tile * kSplitTokens, rest = a.num_tokens - first;
  const int64_t count = rest < kSplitTokens ? rest : kSplitTokens;
  const float* x[kTileRows];
  for (int64_t t = 0; t < count; ++t) x[t] = a.x + (first + t) * a.x_stride;
  const bool is_alone = a.num_tokens == 1;
  const int64_t col_bytes = is_alone ? 4 : 4 * kSplitTokens;
  uint8_t* to = a.out + (a.tile * round_up(a.cols, kStepCols) + a.begin) * col_bytes;
  split_tokens(x, count, is_alone, a.begin, a.end, to);
}

// One or two tiles of rows of a block: `row` bytes from one to the other, `stride` from one of their rows to
// the next, `step` from 32 columns to the next 32.
struct LeftTiles {
  const uint8_t* data;
  int64_t row, stride, step;
  const uint8_t* ask;  // what to prefetch meanwhile, as far apart as what is multiplied; nullptr: nothing
};

// All sixteen rows of the tiles of weights; tokens of `row_bytes` in the others.
constexpr TileConfig float_config(int64_t row_bytes) {
  TileConfig config = whole_tiles();
  for (const int i : {0, 1, 2, 3, 6, 7}) config.row_bytes[i] = uint16_t(row_bytes);
  return config;
}

template <class Weights>
class FloatProduct {
  static constexpr bool kHasScales = Weights::kScaledSteps > 0;
  static constexpr int64_t kRows = FloatScratch::kRows, kCols = FloatScratch::kCols;

 public:
  // The product of all tokens of `a`, which are at most most_split_tokens(), with activations that it splits.
  static void run(const MatmulArgs& a) {
    FloatProduct product(a, a.num_tokens == 1);
    const int64_t step_bytes = 2 * product.num_tiles * product.tile_bytes;
    const int64_t fit = kKeptSplitBytes / step_bytes * kStepCols;
    const int64_t most_cols = fit >= a.cols ? a.cols : fit / kCols * kCols;
    product.x = product.s.activations;
    do {  // if not all columns fit, sums wait in y
      product.begin = product.end;
      product.end = a.cols - product.begin <= most_cols ? a.cols : product.begin + most_cols;
      product.steps = (product.end - product.begin + kStepCols - 1) / kStepCols;
      if (!product.s.kept.holds(a, Format::bf16, product.begin)) product.pack();
      product.run_columns();
    } while (product.end < a.cols);
  }

  // The same with activations that were split before, of which `x` are those of its first token. They have
  // one column if the token is alone in them.
  static void run_split(const MatmulArgs& a, const uint8_t* x, bool is_alone) {
    FloatProduct product(a, is_alone);
    product.x = x;
    product.end = a.cols;
    product.steps = (a.cols + kStepCols - 1) / kStepCols;
    product.run_columns();
  }

 private:
  FloatProduct(const MatmulArgs& args, bool alone)
      : a(args),
        s(*reinterpret_cast<FloatScratch*>(args.scratch)),
        is_alone(alone),
        num_tiles((args.num_tokens + kTileRows - 1) / kTileRows),
        row_bytes(alone ? 4 : kTileRowBytes),
        tile_bytes(kTileRows * row_bytes) {}

  void run_columns() {
    static constexpr TileConfig kAlone = float_config(4), kSeveral = float_config(kTileRowBytes);
    const TileScope tiles(is_alone ? kAlone : kSeveral);
    for (int64_t row = a.row_begin; row < a.row_end; row += kRows) {
      if (a.row_end - row > kTileRows) {
        run_rows<2>(row);
      } else {
        run_rows<1>(row);
      }
    }
  }

  // Splits the current columns of all tokens, for weights of either format.
  void pack() {
    s.kept.hold(a, Format::bf16, begin);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = tile * kTileRows, rest = a.num_tokens - first;
      const int64_t count = rest < kTileRows ? rest : kTileRows;
      const float* rows[kTileRows];
      for (int64_t t = 0; t < count; ++t) rows[t] = float_row(a, first + t);
      split_tokens(rows, count, is_alone, begin, end, s.activations + tile * 2 * steps * tile_bytes);
    }
  }

  template <int kTiles>
  void run_rows(int64_t row) {
    const int64_t num_rows = a.row_end - row < kRows ? a.row_end - row : kRows;
    begin_sums<kTiles>(row, num_rows);
    for (int64_t col = begin; col < end; col += kCols) {
      const int64_t count = end - col < kCols ? end - col : kCols;
      const LeftTiles left = bring<kTiles>(row, num_rows, col, count);
      const int64_t num_steps = (count + kStepCols - 1) / kStepCols;
      int64_t tile = 0;
      for (; tile + 2 <= num_tiles; tile += 2) multiply<kTiles, 2>(left, tile, col, num_steps);
      if (tile < num_tiles) multiply<kTiles, 1>(left, tile, col, num_steps);
    }
    put<kTiles>(row, num_rows);
  }

  // The weights of a block: in place, or copied to tiles.
  template <int kTiles>
  LeftTiles bring(int64_t row, int64_t num_rows, int64_t col, int64_t count) {
    // Afterwards come the next columns of these rows, or the first ones of the next rows.
    const bool is_last = col + count == end;
    const int64_t next_row = is_last ? row + kRows : row, next_col = is_last ? begin : col + count;
    if constexpr (kHasScales) put_scales(row, num_rows, col, count);
    if constexpr (!kHasScales) {
      const uint8_t* data = Weights::row(a, row) + col * Weights::kBytes;
      const int64_t stride = a.cols * Weights::kBytes;
      const bool is_whole = num_rows == kTiles * kTileRows && count % kStepCols == 0;
      const bool is_aligned = (reinterpret_cast<uintptr_t>(data) | uintptr_t(stride)) % kTileRowBytes == 0;
      if (is_whole && is_aligned && num_tiles <= 2) {
        const uint8_t* ask = Weights::row(a, next_row) + next_col * Weights::kBytes;
        return {data, kTileRows * stride, stride, kTileRowBytes, ask};
      }
    }
    for (int64_t i = 0; i < kTiles * kTileRows; ++i) {
      uint8_t* to = s.weights[i / kTileRows][0] + i % kTileRows * kTileRowBytes;
      if (i >= num_rows) {
        for (int64_t c = 0; c < count; c += kStepCols, to += kTileBytes) {
          _mm512_store_si512(to, _mm512_setzero_si512());
        }
        continue;
      }
      const uint8_t* from = Weights::row(a, row + i) + col * Weights::kBytes;
      const uint8_t* ask = Weights::row(a, next_row + i) + next_col * Weights::kBytes;
      // A prefetch cannot fault, so an address past the weights is harmless.
      for (int64_t at = 0; at < count * Weights::kBytes; at += 64) __builtin_prefetch(ask + at, 0, 2);
      for (int64_t c = 0; c < count; c += kStepCols, to += kTileBytes) {
        _mm512_store_si512(to, Weights::load(from + c * Weights::kBytes, count - c));
      }
    }
    return {s.weights[0][0], sizeof s.weights[0], kTileRowBytes, kTileBytes, nullptr};
  }

  void put_scales(int64_t row, int64_t num_rows, int64_t col, int64_t count) {
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t c = 0; c < count; c += kF8Block) {
        scales[c / kF8Block][i] = i < num_rows ? Weights::scale(a, row + i, col + c) : 0.0f;
      }
    }
  }

  // Adds the products of a block of weights to the sums of one or two tiles of tokens.
  template <int kTiles, int kTokens>
  void multiply(const LeftTiles& left, int64_t tile, int64_t col, int64_t num_steps) {
    using Grid = TileGrid<kTiles, kTokens>;
    const uint8_t* right = x + (tile * steps + (col - begin) / kStepCols) * 2 * tile_bytes;
    uint8_t* sums = sums_of(tile);
    if constexpr (kHasScales) {
      for (int64_t step = 0; step < num_steps; step += Weights::kScaledSteps) {
        const int64_t rest = num_steps - step;
        Grid::zero();
        add_products<kTiles, kTokens>(
            left, right, step, rest < Weights::kScaledSteps ? num_steps : step + Weights::kScaledSteps);
        Grid::store(s.parts, tile_bytes, 2 * tile_bytes, row_bytes);
        add_parts<kTiles, kTokens>(scales[step / Weights::kScaledSteps], sums);
      }
    } else {
      Grid::load(sums, tile_bytes, 2 * tile_bytes, row_bytes);
      add_products<kTiles, kTokens>(left, right, 0, num_steps);
      Grid::store(sums, tile_bytes, 2 * tile_bytes, row_bytes);
    }
  }

  template <int kTiles, int kTokens>
  void add_products(const LeftTiles& left, const uint8_t* right, int64_t first, int64_t last) const {
    using Grid = TileGrid<kTiles, kTokens>;
    const int64_t column = 2 * steps * tile_bytes;
    for (int64_t step = first; step < last; ++step) {
      if (left.ask != nullptr) {
        for (int64_t i = 0; i < kTiles * kTileRows; ++i) {
          __builtin_prefetch(left.ask + step * left.step + i * left.stride, 0, 2);
        }
      }
      const uint8_t* of_step = right + step * 2 * tile_bytes;
      Grid::load_left(left.data + step * left.step, left.row, left.stride);
      Grid::load_right(of_step + tile_bytes, column, row_bytes);
      Grid::dot_bf16();
      Grid::load_right(of_step, column, row_bytes);
      Grid::dot_bf16();
    }
  }

  // Adds the sums of 128 columns, times the scale of each row.
  template <int kTiles, int kTokens>
  void add_parts(const float (&scale)[kRows], uint8_t* sums) const {
    if (is_alone) {
      for (int64_t i = 0; i < kTiles; ++i) {
        float* to = reinterpret_cast<float*>(sums + i * tile_bytes);
        const Vec part = load(reinterpret_cast<const float*>(s.parts + i * tile_bytes));
        store(to, fma(load(scale + i * kTileRows), part, load(to)));
      }
      return;
    }
    for (int64_t j = 0; j < kTokens; ++j) {
      for (int64_t i = 0; i < kTiles * kTileRows; ++i) {
        const int64_t at = 2 * j * tile_bytes + i * row_bytes;
        float* to = reinterpret_cast<float*>(sums + at);
        const Vec part = load(reinterpret_cast<const float*>(s.parts + at));
        store(to, fma(broadcast(scale[i]), part, load(to)));
      }
    }
  }

  uint8_t* sums_of(int64_t tile) const { return s.sums + tile * 2 * tile_bytes; }

  // Calls body(sums, first, count, at, n) for each tile of sums: those of `count` tokens from `first`, and n
  // rows, which begin `at` floats after the beginning of a token's outputs.
  template <int kTiles, class Body>
  void for_each_tile(int64_t row, int64_t num_rows, const Body& body) const {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = tile * kTileRows, rest = a.num_tokens - first;
      for (int64_t i = 0; i < kTiles; ++i) {
        const int64_t rows = num_rows - i * kTileRows;
        body(reinterpret_cast<float*>(sums_of(tile) + i * tile_bytes), first,
             rest < kTileRows ? rest : kTileRows, row - a.row_begin + i * kTileRows,
             rows < kTileRows ? rows : kTileRows);
      }
    }
  }

  template <int kTiles>
  void begin_sums(int64_t row, int64_t num_rows) const {
    for_each_tile<kTiles>(
        row, num_rows, [&](float* sums, int64_t first, int64_t count, int64_t at, int64_t n) {
          Vec tokens[kLanes];
          for (int64_t t = 0; t < kLanes; ++t) {
            tokens[t] = begin > 0 && t < count ? load(output_row(a, first + t) + at, n) : zeros();
          }
          if (is_alone) return store(sums, tokens[0]);
          if (begin > 0) transpose(tokens);
          for (int64_t i = 0; i < kLanes; ++i) store(sums + i * kLanes, tokens[i]);
        });
  }

  template <int kTiles>
  void put(int64_t row, int64_t num_rows) const {
    for_each_tile<kTiles>(row, num_rows,
                          [&](float* sums, int64_t first, int64_t count, int64_t at, int64_t n) {
                            if (is_alone) return store(output_row(a, first) + at, load(sums), n);
                            Vec rows[kLanes];
                            for (int64_t i = 0; i < kLanes; ++i) rows[i] = load(sums + i * kLanes);
                            transpose(rows);
                            for (int64_t t = 0; t < count; ++t)
                              store(output_row(a, first + t) + at, rows[t], n);
                          });
  }

  const MatmulArgs& a;
  FloatScratch& s;
  const bool is_alone;  // one token, in tiles of one column
  const int64_t num_tiles, row_bytes, tile_bytes;
  const uint8_t* x = nullptr;             // the split activations of the current columns,
  int64_t begin = 0, end = 0;             // which are these,
  int64_t steps = 0;                      // and their steps
  float scales[kCols / kF8Block][kRows];  // of the current block of weights
};

template <class Weights>
void matmul_float_amx(const MatmulArgs& a) {
  ProductScratch& kept = *reinterpret_cast<ProductScratch*>(a.scratch);
  count_operations(kept.counts.all, a.row_end - a.row_begin, a.cols, a.num_tokens);
  count_operations(kept.counts.in_tiles, a.row_end - a.row_begin, a.cols, a.num_tokens);
  if (!a.repeats_x) kept.x = nullptr;
  const bool is_split = a.split_x != nullptr;
  const int64_t most = most_split_tokens(a.cols);
  for (int64_t first = 0; first < a.num_tokens; first += most) {
    const int64_t rest = a.num_tokens - first;
    const MatmulArgs some = some_tokens(a, first, rest < most ? rest : most);
    if (is_split) {
      FloatProduct<Weights>::run_split(some, a.split_x + split_bytes(a.cols, first), a.num_tokens == 1);
    } else {
      FloatProduct<Weights>::run(some);
    }
  }
}

}  // namespace
}  // namespace argosy
