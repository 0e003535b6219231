// transcode.h: GGUF's quantised blocks to the panels of formats.h, without loss.
//
//   Q8_0 Q4_0 Q4_1 Q5_0   a row is blocks of 32 columns      ->  q8 q4 q4_1 q5_0
//   Q4_K Q5_K Q6_K        a row is blocks of 256 columns     ->  q4_k q5_k q6_k
//
// Every weight has the value that the block gives it: only the order of the bits changes. The blocks' layouts
// are those of the GGUF specification (ggml's block_q8_0 to block_q6_K).
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/formats.h"

namespace argosy {

enum class BlockType : uint8_t { q8_0, q4_0, q4_1, q5_0, q4_k, q5_k, q6_k };
[[maybe_unused]] static constexpr int kNumBlockTypes = 7;

static inline constexpr Format slot_format(BlockType type) {
  constexpr Format formats[kNumBlockTypes] = {Format::q8,   Format::q4,   Format::q4_1, Format::q5_0,
                                              Format::q4_k, Format::q5_k, Format::q6_k};
  return formats[int(type)];
}

// Bytes of one block in the file.
static inline constexpr int64_t block_bytes(BlockType type) {
  constexpr int64_t bytes[kNumBlockTypes] = {34, 18, 20, 22, 144, 176, 210};
  return bytes[int(type)];
}

// Bytes of a row in the file; cols is a multiple of the block's columns.
static inline constexpr int64_t block_row_bytes(BlockType type, int64_t cols) {
  return cols / quant_format(slot_format(type)).block_cols * block_bytes(type);
}

// By GGUF's name, such as "Q4_0".
std::optional<BlockType> block_type_named(std::string_view name);

// Rows of panels [panel_begin, panel_end), the last of which may be short, to the same panels of `matrix`.
// `rows` is the number of rows of the whole matrix and `matrix` its first byte; `rows_data` begins at the
// first row of panel_begin. cols is a multiple of the block's columns. Any alignment.
void transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols, int64_t panel_begin,
               int64_t panel_end, uint8_t* matrix);

}  // namespace argosy
