// amx.h: the tile instructions of Intel AMX that kernels use (Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 1, chapter 18).
//
//   const TileScope tiles(kConfig);  // until the end of the scope
//   load_tile<4>(a, 32); load_tile<6>(b, 64); zero_tile<0>(); dot_tile_int8<0, 4, 6>(); store_tile<0>(c, 64);
//
// The instructions are written as assembly: with GCC 12, the configuration that _tile_loadconfig reads may be
// removed, because the intrinsic declares 8 of its 64 bytes, and _tile_loadd declares no memory at all.
#pragma once

#include <cstdint>

namespace argosy {
namespace {

[[maybe_unused]] constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Eight tiles of sixteen rows of 64 bytes.
[[maybe_unused]] constexpr TileConfig whole_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = kTileRows;
    config.row_bytes[i] = kTileRowBytes;
  }
  return config;
}

// Tiles are released at the end: as long as a thread has some, each switch of threads saves 8 KiB.
class TileScope {
 public:
  explicit TileScope(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The rows of a tile lie `stride` bytes apart.
template <int kTile>
[[gnu::always_inline]] inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// sums[m][n] += sum over k and j of a[m][4 k + j] * b[k][4 n + j], all signed bytes.
template <int kSums, int kA, int kB>
[[gnu::always_inline]] inline void dot_tile_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

// sums[m][n] += (sum over k of a[m][2 k] * b[k][2 n]) + (sum over k of a[m][2 k + 1] * b[k][2 n + 1]), all
// bfloat16. Both sums are chains of fused multiply-adds that begin at zero; numbers below the smallest normal
// one count as zero.
template <int kSums, int kA, int kB>
[[gnu::always_inline]] inline void dot_tile_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

// Up to two by two tiles of sums: tiles 0 and 1 are the first row of them, tiles 2 and 3 the second. Tiles 4
// and 5 hold the left operands, one for each row, and tiles 6 and 7 the right ones, one for each column.
// `row` and `column` are the distances between tiles in bytes, `stride` that between the rows of a tile.
template <int kRows, int kColumns>
struct TileGrid {
  static_assert((kRows == 1 || kRows == 2) && (kColumns == 1 || kColumns == 2));

  static void zero() {
    zero_tile<0>();
    if constexpr (kColumns == 2) zero_tile<1>();
    if constexpr (kRows == 2) zero_tile<2>();
    if constexpr (kRows == 2 && kColumns == 2) zero_tile<3>();
  }
  static void load(const void* from, int64_t row, int64_t column, int64_t stride) {
    const auto* at = static_cast<const uint8_t*>(from);
    load_tile<0>(at, stride);
    if constexpr (kColumns == 2) load_tile<1>(at + column, stride);
    if constexpr (kRows == 2) load_tile<2>(at + row, stride);
    if constexpr (kRows == 2 && kColumns == 2) load_tile<3>(at + row + column, stride);
  }
  static void store(void* to, int64_t row, int64_t column, int64_t stride) {
    auto* at = static_cast<uint8_t*>(to);
    store_tile<0>(at, stride);
    if constexpr (kColumns == 2) store_tile<1>(at + column, stride);
    if constexpr (kRows == 2) store_tile<2>(at + row, stride);
    if constexpr (kRows == 2 && kColumns == 2) store_tile<3>(at + row + column, stride);
  }
  static void load_left(const uint8_t* from, int64_t row, int64_t stride) {
    load_tile<4>(from, stride);
    if constexpr (kRows == 2) load_tile<5>(from + row, stride);
  }
  static void load_right(const uint8_t* from, int64_t column, int64_t stride) {
    load_tile<6>(from, stride);
    if constexpr (kColumns == 2) load_tile<7>(from + column, stride);
  }
  static void dot_bf16() {
    dot_tile_bf16<0, 4, 6>();
    if constexpr (kColumns == 2) dot_tile_bf16<1, 4, 7>();
    if constexpr (kRows == 2) dot_tile_bf16<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) dot_tile_bf16<3, 5, 7>();
  }
};

}  // namespace
}  // namespace argosy
