#include "kernels/transcode.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <numeric>
#include <vector>

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
  if (is_text(entry.type)) {
    const bool is_size = rows == 1 && cols >= 1 && cols <= kMostSized;
    return is_size ? std::optional(sized(entry.type, rows, cols)) : std::nullopt;
  }
  const F8Format f8 = f8_format(entry.format);
  for (const auto& [size, unit] : {std::pair{rows, f8.scale_rows}, std::pair{cols, f8.scale_cols}}) {
    if (size < 1 || size > kMostSized || size % unit != 0) return std::nullopt;
  }
  return sized(entry.type, rows, cols);
}

// "uint4_128_f16:codes": a grouped format, and a part that it can have.
std::optional<BlockType> grouped_type_named(std::string_view name) {
  const size_t colon = name.find(':');
  if (colon == name.npos) return std::nullopt;
  const std::optional<Format> format = grouped_format_named(name.substr(0, colon));
  for (const GroupedPartEntry& entry : kGroupedParts) {
    if (format && entry.name == name.substr(colon + 1) && has_part(*format, entry.part)) {
      return grouped_type(*format, entry.part);
    }
  }
  return std::nullopt;
}

// Writes the order of columns of which `groups` are the groups: those of the first group, and so on. Returns
// false if a group does not have its number of columns.
bool order_columns(const std::vector<int32_t>& groups, int64_t group_cols, std::vector<int32_t>& order) {
  const auto cols = int64_t(groups.size()), num_groups = round_up(cols, group_cols) / group_cols;
  std::vector<int64_t> ends(size_t(num_groups), 0);
  for (int64_t g = 0; g < num_groups; ++g) ends[size_t(g)] = g * group_cols;
  for (int64_t col = 0; col < cols; ++col) {
    const int64_t g = groups[size_t(col)];
    if (g < 0 || g >= num_groups) return false;
    const int64_t place = ends[size_t(g)]++;
    if (place >= (g + 1) * group_cols || place >= cols) return false;
    order[size_t(place)] = int32_t(col);
  }
  return true;
}

}  // namespace

std::optional<BlockType> block_type_named(std::string_view name) {
  const BlockTypeEntry* longest = nullptr;  // of the names that begin it
  for (const BlockTypeEntry& entry : kBlockTypes) {
    if (entry.name == name) return entry.type;
    const bool begins = entry.may_be_sized && name.starts_with(std::string(entry.name) + "_");
    if (begins && (longest == nullptr || entry.name.size() > longest->name.size())) longest = &entry;
  }
  if (longest == nullptr) return grouped_type_named(name);
  return sized_type(*longest, name.substr(longest->name.size() + 1));
}

std::string known_block_types() {
  std::string known;
  for (const BlockTypeEntry& entry : kBlockTypes) {
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  return known + ", and parts of grouped formats such as " + grouped_name(Format::first_grouped) + ":codes";
}

const char* what_is_refused(BlockType type) {
  if (is_grouped(type)) {
    switch (part_of(type)) {
      case GroupedPart::gptq_zeros:
      case GroupedPart::gptq_channel_zeros:
        return "a stored zero with all bits set: one more is 0 to some programs, and 2^bits to others";
      case GroupedPart::g_idx:
      case GroupedPart::channel_g_idx:
        return "columns whose groups are not in order (act-order), though the settings say that they are";
      default:
        break;
    }
  }
  if (is_text(type)) {
    return "a quant_state of another shape or another blocksize than 64 (nested_blocksize 256); get a "
           "checkpoint with the block sizes that transformers writes";
  }
  if (type == BlockType::int8_row_order) {
    return "another weight_format than 0, rows; save the model again with bitsandbytes 0.46 or newer";
  }
  if (type == BlockType::bnb4_double_nested_map) {
    return "values of 8-bit scales that are not those of bitsandbytes; get the checkpoint without "
           "bnb_4bit_use_double_quant";
  }
  return "a code or scale that is not a finite number";
}

std::string grouped_name(Format format) {
  const QuantFormat quant = quant_format(format);
  return std::string(grouped_kind(format).name) + "_" + std::to_string(quant.block_cols) +
         (quant.is_bf16 ? "_bf16" : "_f16") + (has_act_order(format) ? "_act_order" : "");
}

std::optional<Format> grouped_format_named(std::string_view name) {
  for (int i = kFirstGrouped; i < kNumFormats; ++i) {
    if (grouped_name(Format(i)) == name) return Format(i);
  }
  return std::nullopt;
}

bool transcode(BlockType type, const uint8_t* rows_data, int64_t rows, int64_t cols, int64_t interleaved,
               int64_t panel_begin, int64_t panel_end, uint8_t* matrix) {
  const TranscodeArgs args = {rows_data, rows, cols, interleaved, panel_begin, panel_end, matrix, type};
  return is_grouped(type) ? best_kernels().transcode_grouped(args)
                          : best_kernels().transcode[kind_of(type)](args);
}

bool put_in_act_order(Format format, int64_t rows, int64_t cols, uint8_t* matrix) {
  if (rows == 0 || cols == 0) return true;
  uint8_t* const place = matrix + panels_bytes(format, rows, cols);
  std::vector<int32_t> groups(size_t(cols), 0), order(size_t(cols), 0);
  std::memcpy(groups.data(), place, size_t(cols) * 4);
  if (std::all_of(groups.begin(), groups.end(), [](int32_t group) { return group == -1; })) {
    std::iota(order.begin(), order.end(), 0);
  } else if (!order_columns(groups, quant_format(format).block_cols, order)) {
    return false;
  }
  if (std::is_sorted(order.begin(), order.end())) {
    order[0] = -1;
  } else {
    std::vector<uint32_t> columns(size_t(cols), 0);
    best_kernels().move_columns({format, rows, cols, matrix, order.data(), columns.data()});
  }
  std::memset(place, 0, size_t(order_bytes(format, cols)));
  std::memcpy(place, order.data(), size_t(cols) * 4);
  return true;
}

}  // namespace argosy
