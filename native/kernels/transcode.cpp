#include "kernels/transcode.h"

#include "kernels/kernel_table.h"

namespace argosy {

namespace {

constexpr std::string_view kNames[kNumBlockTypes] = {
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "F8_CODES", "F8_SCALES", "F8_SCALES_BF16"};

}  // namespace

std::optional<BlockType> block_type_named(std::string_view name) {
  for (int i = 0; i < kNumBlockTypes; ++i) {
    if (kNames[i] == name) return BlockType(i);
  }
  return std::nullopt;
}

std::string block_type_names() {
  std::string names;
  for (const std::string_view name : kNames) names += (names.empty() ? "" : ", ") + std::string(name);
  return names;
}

bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols, int64_t panel_begin,
               int64_t panel_end, uint8_t* matrix) {
  return kernels().transcode[int(type)]({rows_data, rows, cols, panel_begin, panel_end, matrix});
}

}  // namespace argosy
