// transcode.h: converts quantised weights from the layout of files to the formats of formats.h, without loss.
//
//   Q8_0 Q4_0                       a row is blocks of 32 columns    ->  q8 q4
//   Q4_1 Q5_0 Q5_1 IQ4_NL MXFP4     the same                         ->  q4_1 q5_0 q5_1 iq4_nl mxfp4
//   Q4_K Q5_K Q6_K Q2_K Q3_K        a row is blocks of 256 columns   ->  q4_k q5_k q6_k q2_k q3_k
//   IQ4_XS                          the same                         ->  iq4_xs
//   IQ2_XXS IQ2_XS IQ2_S            the same                         ->  iq2_xxs iq2_xs iq2_s
//   IQ3_XXS IQ3_S IQ1_S IQ1_M       the same                         ->  iq3_xxs iq3_s iq1_s iq1_m
//   TQ1_0 TQ2_0                     the same                         ->  tq1_0 tq2_0
//   Q1_0 Q2_0                       a row is blocks of 128, 64       ->  q1_0 q2_0
//   NVFP4                           a row is blocks of 64 columns    ->  nvfp4
//   IQ2_K IQ3_K IQ4_K IQ5_K IQ6_K   a row is blocks of 256           ->  iq2_k iq3_k iq4_k iq5_k iq6_k
//   IQ2_KS IQ3_KS IQ2_KL            a row is a float16, then blocks  ->  iq2_ks iq3_ks iq2_kl
//   IQ4_KS IQ5_KS                   a row is a float32, then blocks  ->  iq4_ks iq5_ks
//   int4_quants int4_scales         compressed-tensors               ->  int4
//   mxfp4_quants mxfp4_scales       OCP MX                           ->  mxfp4
//   uint4_128_f16:gptq_codes ...    parts (grouped_parts.h)          ->  grouped formats
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
//   nvfp4_quants   u8 [rows, cols / 2], as mxfp4_quants
//   nvfp4_scales   e4m3 [rows, cols / 16]: NaN is refused
//   nvfp4_factor   float32, multiplies all weights; nvfp4_divisor divides them; nvfp4_largest is the largest
//                  weight that scales can give: 448 * 6 = 2688 times the factor. It is refused if it is no
//                  number, or if weights would overflow. nvfp4_blocks is NVFP4 with a factor beside it;
//                  nvfp4_scales_alone has none
//   f8_codes       u8 [rows, cols], E4M3: NaN is refused; f8_row_codes, f8_32_codes, mxfp8_codes the same
//   f8_scales      float32 [rows / 128, cols / 128], rounded up. A scale is refused if the largest code times
//                  it overflows float32
//   f8_scale       float32, of the whole matrix
//   f8_row_scales  float32 [rows]
//   f8_32_scales   float32 [rows, cols / 32], rounded up
//   int8_row_codes int8 [rows, cols]; int8_row_scales float32 [rows]; or int8_row_largest, the same times
//                  127. int8_row_order: u8, bitsandbytes' weight_format, 0 for rows
//   mxfp8_scales   e8m0 [rows, cols / 32], rounded up
//
// Scales of FP8 may also be bfloat16, float16 or e8m0: f8_scales_bf16 and so on. Those of blocks may have
// other blocks than their format, if these consist of whole blocks of the format: f8_32_scales_64x128 is
// float32 [rows / 64, cols / 128], rounded up, and each scale is repeated.
//
// bitsandbytes' tensors of four bits go on from row to row, so rows must be whole blocks of 64 columns:
//
//   bnb4_codes     u8 [rows * cols / 2], the even column in the high half
//   bnb4_scales    float32 [rows * cols / 64]
//   bnb4_map       float32 [16]: the values of the codes
//   bnb4_state     JSON, checked. Its name ends in "_1xN", N bytes
//   bnb4_double_*  has the same codes, map and state, which also holds the offset. Its scales are themselves
//                  quantised: absmax is u8 [rows * cols / 64], factors float32 [rows * cols / 64 / 256]
//                  rounded up, and nested_map float32 [256] has the values of the bytes of absmax, which must
//                  be those of double_scale
//
// For these tensors, a block is the data of 32 columns (codes of FP8: of one column; scales of FP8: of their
// rows and columns). The scales write the padding.
//
// Several matrices may be interleaved in one tensor: a row of the first, a row of the second, and so on. They
// become matrices stored one after another.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/formats.h"
#include "kernels/grouped_parts.h"

namespace argosy {

// Bits 16 and up hold the rows and columns of a block, if a name gives them: `sized`. After the named ones
// follow the parts of grouped formats: grouped_type().
enum class BlockType : uint64_t {
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
  nvfp4,
  iq2_xxs,
  iq2_xs,
  iq2_s,
  iq3_xxs,
  iq3_s,
  iq1_s,
  iq1_m,
  tq1_0,
  tq2_0,
  q1_0,
  q2_0,
  iq2_k,
  iq3_k,
  iq4_k,
  iq5_k,
  iq6_k,
  iq2_ks,
  iq3_ks,
  iq4_ks,
  iq5_ks,
  iq2_kl,
  int4_quants,
  int4_scales,
  mxfp4_quants,
  mxfp4_scales,
  f8_codes,
  f8_scales,
  f8_scales_bf16,
  f8_scales_f16,
  f8_scales_e8m0,
  f8_scale,
  f8_scale_bf16,
  f8_scale_f16,
  f8_row_codes,
  f8_row_scales,
  f8_row_scales_bf16,
  f8_row_scales_f16,
  f8_32_codes,
  f8_32_scales,
  f8_32_scales_bf16,
  f8_32_scales_f16,
  mxfp8_codes,
  mxfp8_scales,
  int8_row_codes,
  int8_row_scales,
  int8_row_largest,
  int8_row_order,
  bnb4_codes,
  bnb4_scales,
  bnb4_map,
  bnb4_state,
  bnb4_double_codes,
  bnb4_double_map,
  bnb4_double_state,
  bnb4_double_absmax,
  bnb4_double_factors,
  bnb4_double_nested_map,
  nvfp4_blocks,
  nvfp4_quants,
  nvfp4_scales,
  nvfp4_scales_alone,
  nvfp4_factor,
  nvfp4_divisor,
  nvfp4_largest
};

// How a scale of FP8 is stored. largest: the weight of code 127, as float32.
enum class ScaleType : uint8_t { none, f32, bf16, f16, e8m0, largest };

// Rows or columns of a block that covers the whole matrix: at least as many as a matrix can have.
[[maybe_unused]] static constexpr int64_t kWhole = int64_t{1} << 30;

// name: its GGUF name, or the name of a part.   format: the slot format that holds it.
// bytes: of one block in the file.              rows, cols: of one block; no columns: those of the format.
// scale: of FP8 scales.                         may_be_sized: whether a name may give other rows and columns.
struct BlockTypeEntry {
  BlockType type;
  std::string_view name;
  Format format;
  int64_t bytes;
  int64_t rows = 1, cols = 0;
  ScaleType scale = ScaleType::none;
  bool may_be_sized = false;
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
    {BlockType::nvfp4, "NVFP4", Format::nvfp4, 36},
    {BlockType::iq2_xxs, "IQ2_XXS", Format::iq2_xxs, 66},
    {BlockType::iq2_xs, "IQ2_XS", Format::iq2_xs, 74},
    {BlockType::iq2_s, "IQ2_S", Format::iq2_s, 82},
    {BlockType::iq3_xxs, "IQ3_XXS", Format::iq3_xxs, 98},
    {BlockType::iq3_s, "IQ3_S", Format::iq3_s, 110},
    {BlockType::iq1_s, "IQ1_S", Format::iq1_s, 50},
    {BlockType::iq1_m, "IQ1_M", Format::iq1_m, 56},
    {BlockType::tq1_0, "TQ1_0", Format::tq1_0, 54},
    {BlockType::tq2_0, "TQ2_0", Format::tq2_0, 66},
    {BlockType::q1_0, "Q1_0", Format::q1_0, 18},
    {BlockType::q2_0, "Q2_0", Format::q2_0, 18},
    {BlockType::iq2_k, "IQ2_K", Format::iq2_k, 76},
    {BlockType::iq3_k, "IQ3_K", Format::iq3_k, 110},
    {BlockType::iq4_k, "IQ4_K", Format::iq4_k, 144},
    {BlockType::iq5_k, "IQ5_K", Format::iq5_k, 176},
    {BlockType::iq6_k, "IQ6_K", Format::iq6_k, 212},
    {BlockType::iq2_ks, "IQ2_KS", Format::iq2_ks, 70},
    {BlockType::iq3_ks, "IQ3_KS", Format::iq3_ks, 102},
    {BlockType::iq4_ks, "IQ4_KS", Format::iq4_ks, 136},
    {BlockType::iq5_ks, "IQ5_KS", Format::iq5_ks, 168},
    {BlockType::iq2_kl, "IQ2_KL", Format::iq2_kl, 86},
    {BlockType::int4_quants, "int4_quants", Format::int4, 16},
    {BlockType::int4_scales, "int4_scales", Format::int4, 2},
    {BlockType::mxfp4_quants, "mxfp4_quants", Format::mxfp4, 16},
    {BlockType::mxfp4_scales, "mxfp4_scales", Format::mxfp4, 1},
    {BlockType::f8_codes, "f8_codes", Format::f8, 1, 1, 1},
    {BlockType::f8_scales, "f8_scales", Format::f8, 4, 128, 128, ScaleType::f32, true},
    {BlockType::f8_scales_bf16, "f8_scales_bf16", Format::f8, 2, 128, 128, ScaleType::bf16, true},
    {BlockType::f8_scales_f16, "f8_scales_f16", Format::f8, 2, 128, 128, ScaleType::f16, true},
    {BlockType::f8_scales_e8m0, "f8_scales_e8m0", Format::f8, 1, 128, 128, ScaleType::e8m0, true},
    {BlockType::f8_scale, "f8_scale", Format::f8, 4, kWhole, kWhole, ScaleType::f32},
    {BlockType::f8_scale_bf16, "f8_scale_bf16", Format::f8, 2, kWhole, kWhole, ScaleType::bf16},
    {BlockType::f8_scale_f16, "f8_scale_f16", Format::f8, 2, kWhole, kWhole, ScaleType::f16},
    {BlockType::f8_row_codes, "f8_row_codes", Format::f8_row, 1, 1, 1},
    {BlockType::f8_row_scales, "f8_row_scales", Format::f8_row, 4, 1, kWhole, ScaleType::f32},
    {BlockType::f8_row_scales_bf16, "f8_row_scales_bf16", Format::f8_row, 2, 1, kWhole, ScaleType::bf16},
    {BlockType::f8_row_scales_f16, "f8_row_scales_f16", Format::f8_row, 2, 1, kWhole, ScaleType::f16},
    {BlockType::f8_32_codes, "f8_32_codes", Format::f8_32, 1, 1, 1},
    {BlockType::f8_32_scales, "f8_32_scales", Format::f8_32, 4, 1, 32, ScaleType::f32, true},
    {BlockType::f8_32_scales_bf16, "f8_32_scales_bf16", Format::f8_32, 2, 1, 32, ScaleType::bf16, true},
    {BlockType::f8_32_scales_f16, "f8_32_scales_f16", Format::f8_32, 2, 1, 32, ScaleType::f16, true},
    {BlockType::mxfp8_codes, "mxfp8_codes", Format::mxfp8, 1, 1, 1},
    {BlockType::mxfp8_scales, "mxfp8_scales", Format::mxfp8, 1, 1, 32, ScaleType::e8m0, true},
    {BlockType::int8_row_codes, "int8_row_codes", Format::int8_row, 1, 1, 1},
    {BlockType::int8_row_scales, "int8_row_scales", Format::int8_row, 4, 1, kWhole, ScaleType::f32},
    {BlockType::int8_row_largest, "int8_row_largest", Format::int8_row, 4, 1, kWhole, ScaleType::largest},
    {BlockType::int8_row_order, "int8_row_order", Format::int8_row, 1, kWhole, kWhole},
    {BlockType::bnb4_codes, "bnb4_codes", Format::bnb4, 32, 1, 64},
    {BlockType::bnb4_scales, "bnb4_scales", Format::bnb4, 4, 1, 64, ScaleType::f32},
    {BlockType::bnb4_map, "bnb4_map", Format::bnb4, 64, kWhole, kWhole},
    {BlockType::bnb4_state, "bnb4_state", Format::bnb4, 0, kWhole, kWhole, ScaleType::none, true},
    {BlockType::bnb4_double_codes, "bnb4_double_codes", Format::bnb4_double, 32, 1, 64},
    {BlockType::bnb4_double_map, "bnb4_double_map", Format::bnb4_double, 64, kWhole, kWhole},
    {BlockType::bnb4_double_state, "bnb4_double_state", Format::bnb4_double, 0, kWhole, kWhole,
     ScaleType::none, true},
    {BlockType::bnb4_double_absmax, "bnb4_double_absmax", Format::bnb4_double, 1, 1, 64},
    {BlockType::bnb4_double_factors, "bnb4_double_factors", Format::bnb4_double, 4, kWhole, kWhole},
    {BlockType::bnb4_double_nested_map, "bnb4_double_nested_map", Format::bnb4_double, 1024, kWhole, kWhole},
    {BlockType::nvfp4_blocks, "nvfp4_blocks", Format::nvfp4, 36},
    {BlockType::nvfp4_quants, "nvfp4_quants", Format::nvfp4, 8, 1, 16},
    {BlockType::nvfp4_scales, "nvfp4_scales", Format::nvfp4, 1, 1, 16},
    {BlockType::nvfp4_scales_alone, "nvfp4_scales_alone", Format::nvfp4, 1, 1, 16},
    {BlockType::nvfp4_factor, "nvfp4_factor", Format::nvfp4, 4, kWhole, kWhole},
    {BlockType::nvfp4_divisor, "nvfp4_divisor", Format::nvfp4, 4, kWhole, kWhole},
    {BlockType::nvfp4_largest, "nvfp4_largest", Format::nvfp4, 4, kWhole, kWhole},
};
[[maybe_unused]] static constexpr int kNumBlockTypes = int(sizeof(kBlockTypes) / sizeof(kBlockTypes[0]));

// Index of the entry.
static inline constexpr int kind_of(BlockType type) { return int(uint64_t(type) & 0xFFFF); }
static inline constexpr const BlockTypeEntry& entry_of(BlockType type) { return kBlockTypes[kind_of(type)]; }
static_assert([] {
  for (int i = 0; i < kNumBlockTypes; ++i) {
    if (kBlockTypes[i].type != BlockType(i)) return false;
  }
  return true;
}());

// The type whose blocks have these rows and columns, at most kMostSized.
[[maybe_unused]] static constexpr int64_t kMostSized = (int64_t{1} << 24) - 1;
static inline constexpr BlockType sized(BlockType type, int64_t rows, int64_t cols) {
  return BlockType(uint64_t(kind_of(type)) | uint64_t(rows) << 16 | uint64_t(cols) << 40);
}

static inline constexpr bool is_grouped(BlockType type) { return kind_of(type) >= kNumBlockTypes; }
static inline constexpr BlockType grouped_type(Format format, GroupedPart part) {
  return BlockType(kNumBlockTypes + int(part) * kNumGrouped + int(format) - kFirstGrouped);
}
// For grouped types only.
static inline constexpr GroupedPart part_of(BlockType type) {
  return GroupedPart((kind_of(type) - kNumBlockTypes) / kNumGrouped);
}

static inline constexpr Format slot_format(BlockType type) {
  if (is_grouped(type)) return Format(kFirstGrouped + (kind_of(type) - kNumBlockTypes) % kNumGrouped);
  return entry_of(type).format;
}

// Whether the type is text, whose bytes the name counts.
static inline constexpr bool is_text(BlockType type) {
  return !is_grouped(type) && (entry_of(type).type == BlockType::bnb4_state ||
                               entry_of(type).type == BlockType::bnb4_double_state);
}

// Bytes of one block in the file; not of grouped types.
static inline constexpr int64_t block_bytes(BlockType type) {
  return is_text(type) ? int64_t(uint64_t(type) >> 40) : entry_of(type).bytes;
}

// Whether the type holds only quants, and whether it holds only scales.
static inline constexpr bool is_quants(BlockType type) {
  return type == BlockType::int4_quants || type == BlockType::mxfp4_quants || type == BlockType::nvfp4_quants;
}
static inline constexpr bool is_scales(BlockType type) {
  return type == BlockType::int4_scales || type == BlockType::mxfp4_scales;
}

// Whether the type holds one number for a whole matrix of panels.
static inline constexpr bool is_factor(BlockType type) {
  return type == BlockType::nvfp4_factor || type == BlockType::nvfp4_divisor ||
         type == BlockType::nvfp4_largest;
}

// Whether some bytes are refused: transcode() returns false.
static inline constexpr bool may_be_refused(BlockType type) {
  if (is_grouped(type)) return part_may_be_refused(part_of(type));
  return is_f8(slot_format(type)) || is_factor(type) || type == BlockType::nvfp4_scales ||
         type == BlockType::nvfp4_scales_alone;
}

// Rows and columns of the matrix that one block covers. Blocks of FP8 at the edges may cover fewer; otherwise
// cols is a multiple of the block's columns.
static inline constexpr int64_t block_rows(BlockType type) {
  if (is_grouped(type)) return 1;
  if (is_text(type)) return kWhole;
  const auto rows = int64_t(uint64_t(type) >> 16 & uint64_t(kMostSized));
  return rows > 0 ? rows : entry_of(type).rows;
}
static inline constexpr int64_t block_cols(BlockType type) {
  if (is_grouped(type)) return kGroupSize;
  if (is_text(type)) return kWhole;
  const auto cols = int64_t(uint64_t(type) >> 40);
  if (cols > 0) return cols;
  return entry_of(type).cols > 0 ? entry_of(type).cols : quant_format(slot_format(type)).block_cols;
}
static inline constexpr bool has_whole_blocks(BlockType type, int64_t cols) {
  if (is_bnb4(slot_format(type))) return cols % kBnb4Block == 0;
  return is_f8(slot_format(type)) || is_factor(type) || cols % block_cols(type) == 0;
}
// Whether the rows of several matrices may alternate in the file.
static inline constexpr bool may_be_interleaved(BlockType type) {
  return !is_grouped(type) && !is_f8(slot_format(type)) && !is_factor(type);
}

// Bytes of the scale, float32 or float16, that precedes a row's blocks in the file.
static inline constexpr int64_t row_scale_bytes(BlockType type) {
  const Format format = slot_format(type);
  if (format < Format::iq2_ks || format > Format::iq2_kl) return 0;
  return format == Format::iq4_ks || format == Format::iq5_ks ? 4 : 2;
}
// Bytes of a row in the file.
static inline constexpr int64_t block_row_bytes(BlockType type, int64_t cols) {
  return row_scale_bytes(type) + round_up(cols, block_cols(type)) / block_cols(type) * block_bytes(type);
}

// Whether the type can have this many rows.
static inline constexpr bool has_whole_words(BlockType type, int64_t rows) {
  return !is_grouped(type) || has_whole_words(slot_format(type), part_of(type), rows);
}

// Bytes of `rows` rows in the file.
static inline constexpr int64_t source_bytes(BlockType type, int64_t rows, int64_t cols) {
  if (is_grouped(type)) return part_bytes(slot_format(type), part_of(type), rows, cols);
  if (type == BlockType::bnb4_double_factors) {
    return round_up(rows * (cols / kBnb4Block), kDoubleBlock) / kDoubleBlock * 4;
  }
  return round_up(rows, block_rows(type)) / block_rows(type) * block_row_bytes(type, cols);
}

// The rows that are transcoded at once: those of whole blocks, and at least those of a panel.
static inline constexpr int64_t strip_rows(BlockType type) { return round_up(kPanelRows, block_rows(type)); }
static inline constexpr int64_t num_strips(BlockType type, int64_t rows) {
  return round_up(rows, strip_rows(type)) / strip_rows(type);
}
// The same for all types; the strips of some grouped types are columns of the matrix.
static inline constexpr int64_t num_strips(BlockType type, int64_t rows, int64_t cols) {
  return is_grouped(type) ? part_strips(slot_format(type), part_of(type), rows, cols)
                          : num_strips(type, rows);
}
// Bytes of a strip in the file; the last strip may have fewer.
static inline constexpr int64_t strip_bytes(BlockType type, int64_t rows, int64_t cols) {
  if (is_grouped(type)) return part_strip_bytes(slot_format(type), part_of(type), rows, cols);
  if (type == BlockType::bnb4_double_factors) return source_bytes(type, rows, cols);
  return source_bytes(type, strip_rows(type), cols);
}

// By its GGUF name, such as "Q4_0", or by the name of a part, such as "int4_scales" or
// "uint4_128_f16:scales";
// "_64x128" after the name of scales gives the rows and columns of their blocks.
std::optional<BlockType> block_type_named(std::string_view name);
// All names, separated by commas.
std::string known_block_types();

// What makes transcode() return false, to follow "holds".
const char* what_is_refused(BlockType type);

// The name of a grouped format, such as "uint4_128_f16", and the reverse.
std::string grouped_name(Format format);
std::optional<Format> grouped_format_named(std::string_view name);

// Transcodes the rows of strips [panel_begin, panel_end), the last of which may be short, to the same rows of
// `matrix`. `rows` is the number of rows of the whole matrix and `matrix` its first byte; `rows_data` begins
// at the first row of panel_begin; if strips are columns, at strip panel_begin. cols must consist of whole
// blocks. Any alignment. With `interleaved` matrices of `rows` rows each, `rows_data` holds the rows of all
// of them, and they become matrices of matrix_bytes(...) one after another, if may_be_interleaved(). For the
// types that refuse it, returns false if a code is NaN or a scale gives weights that overflow float32. Runs
// with best_kernels(): every instruction set writes the same bytes.
[[nodiscard]] bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols,
                             int64_t interleaved, int64_t panel_begin, int64_t panel_end, uint8_t* matrix);

// Completes a matrix whose format has act-order, in which all parts have landed as the file has them: moves
// the columns of a group together, and g_idx becomes the order. Returns false if the matrix holds what
// kWrongOrder says; it is undefined then. If all of g_idx is -1, as compressed-tensors writes where it has
// not reordered, the columns are in their places.
[[nodiscard]] bool put_in_act_order(Format format, int64_t rows, int64_t cols, uint8_t* matrix);
[[maybe_unused]] static constexpr const char* kWrongOrder =
    "an order of columns (g_idx) that names a group the matrix does not have, "
    "or in which a group has more or fewer columns than the settings say";

// Moves column order[i] of the panels to i.
struct ActOrderArgs {
  Format format;
  int64_t rows, cols;
  uint8_t* matrix;
  const int32_t* order;  // [cols]
  uint32_t* columns;     // [cols], scratch
};

// The arguments of transcode(); panels are strips.
struct TranscodeArgs {
  const uint8_t* rows_data;
  int64_t rows, cols;
  int64_t interleaved;
  int64_t panel_begin, panel_end;
  uint8_t* matrix;
  BlockType type = {};  // gives the size of a block, if it is not that of the type
};

}  // namespace argosy
