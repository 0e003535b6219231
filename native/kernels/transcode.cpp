#include "kernels/transcode.h"

#include "kernels/kernel_table.h"

namespace argosy {

namespace {
constexpr std::string_view kNames[kNumBlockTypes] = {
    "Q8_0",        "Q4_0",         "Q4_1",         "Q5_0",     "Q5_1",      "Q4_K",          "Q5_K",
    "Q6_K",        "Q2_K",         "Q3_K",         "IQ4_NL",   "IQ4_XS",    "MXFP4",         "int4_quants",
    "int4_scales", "mxfp4_quants", "mxfp4_scales", "f8_codes", "f8_scales", "f8_scales_bf16"};
}

std::optional<BlockType> block_type_named(std::string_view name) {
  for (int i = 0; i < kNumBlockTypes; ++i) {
    if (kNames[i] == name) return BlockType(i);
  }
  return std::nullopt;
}

std::string known_block_types() {
  std::string known;
  for (const std::string_view name : kNames) known += (known.empty() ? "" : ", ") + std::string(name);
  return known;
}

bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols, int64_t interleaved,
               int64_t panel_begin, int64_t panel_end, uint8_t* matrix) {
  return best_kernels().transcode[int(type)](
      {rows_data, rows, cols, interleaved, panel_begin, panel_end, matrix});
}

}  // namespace argosy
