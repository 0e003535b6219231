#include "kernels/transcode.h"

#include "kernels/kernel_table.h"

namespace argosy {

std::optional<BlockType> block_type_named(std::string_view name) {
  constexpr std::string_view names[kNumBlockTypes] = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K"};
  for (int i = 0; i < kNumBlockTypes; ++i) {
    if (names[i] == name) return BlockType(i);
  }
  return std::nullopt;
}

void transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols, int64_t panel_begin,
               int64_t panel_end, uint8_t* matrix) {
  kernels().transcode[int(type)]({rows_data, rows, cols, panel_begin, panel_end, matrix});
}

}  // namespace argosy
