#include "kernels/transcode.h"

#include <charconv>

#include "kernels/kernel_table.h"

namespace argosy {

namespace {

// "64x128": two numbers from 1 to kMostSized that are multiples of those of the format.
std::optional<BlockType> sized_type(const BlockTypeEntry& entry, std::string_view text) {
  int64_t rows = 0, cols = 0;
  const char* const end = text.data() + text.size();
  const auto [middle, error] = std::from_chars(text.data(), end, rows);
  if (error != std::errc() || middle == end || *middle != 'x') return std::nullopt;
  const auto [last, other_error] = std::from_chars(middle + 1, end, cols);
  if (other_error != std::errc() || last != end) return std::nullopt;
  const F8Format f8 = f8_format(entry.format);
  for (const auto& [size, unit] : {std::pair{rows, f8.scale_rows}, std::pair{cols, f8.scale_cols}}) {
    if (size < 1 || size > kMostSized || size % unit != 0) return std::nullopt;
  }
  return sized(entry.type, rows, cols);
}

}  // namespace

std::optional<BlockType> block_type_named(std::string_view name) {
  const BlockTypeEntry* longest = nullptr;  // of the names that begin it
  for (const BlockTypeEntry& entry : kBlockTypes) {
    if (entry.name == name) return entry.type;
    const bool begins = entry.may_be_sized && name.starts_with(std::string(entry.name) + "_");
    if (begins && (longest == nullptr || entry.name.size() > longest->name.size())) longest = &entry;
  }
  if (longest == nullptr) return std::nullopt;
  return sized_type(*longest, name.substr(longest->name.size() + 1));
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
  return best_kernels().transcode[kind_of(type)](
      {rows_data, rows, cols, interleaved, panel_begin, panel_end, matrix, type});
}

}  // namespace argosy
