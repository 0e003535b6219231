#include "kernels/transcode.h"

#include "kernels/kernel_table.h"

namespace argosy {

std::optional<BlockType> block_type_named(std::string_view name) {
  for (const BlockTypeEntry& entry : kBlockTypes) {
    if (entry.name == name) return entry.type;
  }
  return std::nullopt;
}

std::string known_block_types() {
  std::string known;
  for (const BlockTypeEntry& entry : kBlockTypes) {
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  return known;
}

bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols, int64_t interleaved,
               int64_t panel_begin, int64_t panel_end, uint8_t* matrix) {
  return best_kernels().transcode[int(type)](
      {rows_data, rows, cols, interleaved, panel_begin, panel_end, matrix});
}

}  // namespace argosy
