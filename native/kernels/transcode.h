// transcode.h: quantised weights as files have them to the formats of formats.h, without loss.
//
//   Q8_0 Q4_0 Q4_1 Q5_0   a row is blocks of 32 columns                        ->  q8 q4 q4_1 q5_0
//   Q4_K Q5_K Q6_K        a row is blocks of 256 columns                       ->  q4_k q5_k q6_k
//   F8_CODES              a row is its FP8 codes                               ->  f8, all but the scales
//   F8_SCALES             the float32 scales of 128 rows                       ->  f8, the scales alone
//   F8_SCALES_BF16        the same as bfloat16
//
// Every weight has the value that the file gives it: only the order of the bits changes. The blocks' layouts
// are those of the GGUF specification (ggml's block_q8_0 to block_q6_K). Where codes and scales are different
// tensors, each writes its share of the matrix and no other byte, so they may land in any order.
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
  q4_k,
  q5_k,
  q6_k,
  f8_codes,
  f8_scales,
  f8_scales_bf16
};
[[maybe_unused]] static constexpr int kNumBlockTypes = 10;

static inline constexpr Format slot_format(BlockType type) {
  constexpr Format formats[kNumBlockTypes] = {Format::q8,   Format::q4,   Format::q4_1, Format::q5_0,
                                              Format::q4_k, Format::q5_k, Format::q6_k, Format::f8,
                                              Format::f8,   Format::f8};
  return formats[int(type)];
}

// Bytes of one block in the file.
static inline constexpr int64_t block_bytes(BlockType type) {
  constexpr int64_t bytes[kNumBlockTypes] = {34, 18, 20, 22, 144, 176, 210, 1, 4, 2};
  return bytes[int(type)];
}

// Rows and columns of the matrix that a block stands for. Where blocks are of several rows, those at the
// edges may be of fewer rows and columns; otherwise the columns are a multiple of the block's.
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

// Bytes of a whole matrix in the file.
static inline constexpr int64_t source_bytes(BlockType type, int64_t rows, int64_t cols) {
  return round_up(rows, block_rows(type)) / block_rows(type) * block_row_bytes(type, cols);
}

// Rows of the matrix that are transcoded at least, and their bytes in the file.
static inline constexpr int64_t strip_rows(BlockType type) {
  return block_rows(type) > kPanelRows ? block_rows(type) : kPanelRows;
}
static inline constexpr int64_t strip_bytes(BlockType type, int64_t cols) {
  return source_bytes(type, strip_rows(type), cols);
}
static inline constexpr int64_t num_strips(BlockType type, int64_t rows) {
  return round_up(rows, strip_rows(type)) / strip_rows(type);
}

// By its name, such as "Q4_0".
std::optional<BlockType> block_type_named(std::string_view name);
// All names, for an error.
std::string block_type_names();

// Rows of panels (strips) [panel_begin, panel_end), the last of which may be short, to the same rows of
// `matrix`. `rows` is the number of rows of the whole matrix and `matrix` its first byte; `rows_data` begins
// at the first row of panel_begin. Any alignment. Returns false where an FP8 code or scale is no finite
// number.
[[nodiscard]] bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols,
                             int64_t panel_begin, int64_t panel_end, uint8_t* matrix);

}  // namespace argosy
