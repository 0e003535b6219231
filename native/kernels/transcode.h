// transcode.h: converts quantised weights from the layout of files to the formats of formats.h, without loss.
//
//   Q8_0 Q4_0                       a row is blocks of 32 columns    ->  q8 q4
//   Q4_1 Q5_0 Q5_1 IQ4_NL MXFP4     the same                         ->  q4_1 q5_0 q5_1 iq4_nl mxfp4
//   Q4_K Q5_K Q6_K Q2_K Q3_K        a row is blocks of 256 columns   ->  q4_k q5_k q6_k q2_k q3_k
//   IQ4_XS                          the same                         ->  iq4_xs
//   int4_quants int4_scales         compressed-tensors               ->  int4
//   mxfp4_quants mxfp4_scales       OCP MX                           ->  mxfp4
//
// Every weight keeps the value that the file gives it: only the order of the bits changes. The block layouts
// are those of the GGUF specification (ggml's block_q8_0 to block_mxfp4). Its MXFP4 reads a scale of 255 as
// 2^128, where OCP MX has NaN.
//
// Safetensors files store quants and scales in separate tensors. Each becomes its part of every panel, and
// they may land in any order, or at the same time:
//
//   int4_quants    int32 [rows, cols / 8], the first column in the lowest four bits: value + 8
//   int4_scales    bf16 [rows, cols / 32]
//   mxfp4_quants   u8 [rows, cols / 2], the even column in the low half: a code of e2m1
//   mxfp4_scales   u8 [rows, cols / 32], e8m0: 2^(byte - 127), 255 is NaN
//   f8_codes       u8 [rows, cols], E4M3: NaN is refused
//   f8_scales      float32 [rows / 128, cols / 128], rounded up; f8_scales_bf16 the same as bfloat16. A scale
//                  with which the largest code overflows float32 is refused
//
// For these tensors, a block is the data of 32 columns (f8_codes: of one column; f8 scales: of 128 rows and
// columns). The scales write the padding.
//
// Several matrices may be interleaved in one tensor: a row of the first, a row of the second, and so on. They
// become matrices stored one after another.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/formats.h"

namespace argosy {

enum class BlockType : uint8_t {
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  q2_k,
  q3_k,
  iq4_nl,
  iq4_xs,
  mxfp4,
  int4_quants,
  int4_scales,
  mxfp4_quants,
  mxfp4_scales,
  f8_codes,
  f8_scales,
  f8_scales_bf16
};

// name: its GGUF name, or the name of a part.   format: the slot format that holds it.
// bytes: of one block in the file.
struct BlockTypeEntry {
  BlockType type;
  std::string_view name;
  Format format;
  int64_t bytes;
};
[[maybe_unused]] static constexpr BlockTypeEntry kBlockTypes[] = {
    {BlockType::q8_0, "Q8_0", Format::q8, 34},
    {BlockType::q4_0, "Q4_0", Format::q4, 18},
    {BlockType::q4_1, "Q4_1", Format::q4_1, 20},
    {BlockType::q5_0, "Q5_0", Format::q5_0, 22},
    {BlockType::q5_1, "Q5_1", Format::q5_1, 24},
    {BlockType::q4_k, "Q4_K", Format::q4_k, 144},
    {BlockType::q5_k, "Q5_K", Format::q5_k, 176},
    {BlockType::q6_k, "Q6_K", Format::q6_k, 210},
    {BlockType::q2_k, "Q2_K", Format::q2_k, 84},
    {BlockType::q3_k, "Q3_K", Format::q3_k, 110},
    {BlockType::iq4_nl, "IQ4_NL", Format::iq4_nl, 18},
    {BlockType::iq4_xs, "IQ4_XS", Format::iq4_xs, 136},
    {BlockType::mxfp4, "MXFP4", Format::mxfp4, 17},
    {BlockType::int4_quants, "int4_quants", Format::int4, 16},
    {BlockType::int4_scales, "int4_scales", Format::int4, 2},
    {BlockType::mxfp4_quants, "mxfp4_quants", Format::mxfp4, 16},
    {BlockType::mxfp4_scales, "mxfp4_scales", Format::mxfp4, 1},
    {BlockType::f8_codes, "f8_codes", Format::f8, 1},
    {BlockType::f8_scales, "f8_scales", Format::f8, 4},
    {BlockType::f8_scales_bf16, "f8_scales_bf16", Format::f8, 2},
};
[[maybe_unused]] static constexpr int kNumBlockTypes = int(sizeof(kBlockTypes) / sizeof(kBlockTypes[0]));

static inline constexpr const BlockTypeEntry& entry_of(BlockType type) { return kBlockTypes[int(type)]; }
static_assert([] {
  for (int i = 0; i < kNumBlockTypes; ++i) {
    if (kBlockTypes[i].type != BlockType(i)) return false;
  }
  return true;
}());

static inline constexpr Format slot_format(BlockType type) { return entry_of(type).format; }

// Bytes of one block in the file.
static inline constexpr int64_t block_bytes(BlockType type) { return entry_of(type).bytes; }

// Whether the type holds only quants, and whether it holds only scales.
static inline constexpr bool is_quants(BlockType type) {
  return type == BlockType::int4_quants || type == BlockType::mxfp4_quants;
}
static inline constexpr bool is_scales(BlockType type) {
  return type == BlockType::int4_scales || type == BlockType::mxfp4_scales;
}

// Rows and columns of the matrix that one block covers. If blocks cover several rows, blocks at the edges may
// cover fewer rows and columns; otherwise cols is a multiple of the block's columns.
static inline constexpr int64_t block_rows(BlockType type) {
  return type == BlockType::f8_scales || type == BlockType::f8_scales_bf16 ? kF8Block : 1;
}
static inline constexpr int64_t block_cols(BlockType type) {
  if (type == BlockType::f8_codes) return 1;
  return block_rows(type) > 1 ? block_rows(type) : quant_format(slot_format(type)).block_cols;
}
static inline constexpr bool has_whole_blocks(BlockType type, int64_t cols) {
  return block_rows(type) > 1 || cols % block_cols(type) == 0;
}

// Bytes of a row of blocks in the file.
static inline constexpr int64_t block_row_bytes(BlockType type, int64_t cols) {
  return round_up(cols, block_cols(type)) / block_cols(type) * block_bytes(type);
}

// Bytes of `rows` rows in the file.
static inline constexpr int64_t source_bytes(BlockType type, int64_t rows, int64_t cols) {
  return round_up(rows, block_rows(type)) / block_rows(type) * block_row_bytes(type, cols);
}

// The rows that are transcoded at once: those of a panel, or of a block if it has more.
static inline constexpr int64_t strip_rows(BlockType type) {
  return block_rows(type) > kPanelRows ? block_rows(type) : kPanelRows;
}
static inline constexpr int64_t num_strips(BlockType type, int64_t rows) {
  return round_up(rows, strip_rows(type)) / strip_rows(type);
}

// By its GGUF name, such as "Q4_0", or by the name of a part, such as "int4_scales".
std::optional<BlockType> block_type_named(std::string_view name);
// All names, separated by commas.
std::string known_block_types();

// Transcodes the rows of strips [panel_begin, panel_end), the last of which may be short, to the same rows of
// `matrix`. `rows` is the number of rows of the whole matrix and `matrix` its first byte; `rows_data` begins
// at the first row of panel_begin. cols must consist of whole blocks. Any alignment. With `interleaved`
// matrices of `rows` rows each, `rows_data` holds the rows of all of them, and they become matrices of
// matrix_bytes(...) one after another; f8 is never interleaved. For the types that refuse it, returns false
// if a code is NaN or a scale gives weights that overflow float32. Runs with best_kernels(): every
// instruction set writes the same bytes.
[[nodiscard]] bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols,
                             int64_t interleaved, int64_t panel_begin, int64_t panel_end, uint8_t* matrix);

// The arguments of transcode(); panels are strips of strip_rows(type) rows.
struct TranscodeArgs {
  const uint8_t* rows_data;
  int64_t rows, cols;
  int64_t interleaved;
  int64_t panel_begin, panel_end;
  uint8_t* matrix;
};

}  // namespace argosy
