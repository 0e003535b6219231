// grouped_parts.h: the tensors that become grouped formats (formats.h), which store codes, scales, and zeros
// or biases apart.
//
//   "uint4_128_f16:gptq_codes"    a block type: the format, and the part of a matrix that the tensor becomes
//
// G is the number of groups of a row, cols / group rounded up; cols is a multiple of 32. Words are int32. A
// stream holds codes of `bits` bits, the first in the lowest bits of the first word. CT stands for
// compressed-tensors, GPTQ 2 for the second version of GPTQ's files.
//
//   codes               words [rows, cols * bits / 32]: a stream for each row              CT, MLX
//   int8_codes          int8 [rows, cols]: code - 128                                      CT
//   gptq_codes          words [cols * bits / 32, rows]: a stream down each column          GPTQ
//   awq_codes           words [cols, rows / 8]: eight rows in AWQ's order                  AWQ
//   scales              [rows, G], of the type that the format names                       CT, MLX
//   channel_scales      [rows]: the same for all groups                                    CT, GPTQ
//   scales_by_group     [G, rows]                                                          GPTQ, AWQ
//   zeros               words [rows * bits / 32 rounded up, G]: a stream down each column  CT
//   channel_zeros       a stream of rows                                                   CT, GPTQ 2
//   int8_zeros          int8 [rows, G]: zero - 128                                         CT
//   int8_channel_zeros  int8 [rows]: the same for all groups                               CT
//   gptq_zeros          words [G, rows * bits / 32]: a stream of rows, zero - 1            GPTQ
//   gptq_v2_zeros       the same, but the zero itself                                      GPTQ 2
//   gptq_channel_zeros  a stream of rows, zero - 1                                         GPTQ
//   awq_zeros           words [G, rows / 8] in AWQ's order                                 AWQ
//   biases              [rows, G], of the type that the format names                       MLX
//   g_idx               int32 [cols]: the group of each column, which must be in order     GPTQ, CT
//                       unless the format has act-order
//   channel_g_idx       int32 [cols]: zeros                                                GPTQ
//
// A stored zero with all bits set is refused where one is added: some programs read it as 0, others as
// 2^bits. In AWQ's order, nibble k of a word belongs to row (0, 2, 4, 6, 1, 3, 5, 7)[k] of eight.
//
// A tensor is transcoded strip by strip. A strip is contiguous in the file: the rows of a panel (zeros down a
// column: 32 rows); or, of a tensor whose rows are columns of the matrix, 32 columns of codes or one group of
// scales or zeros. So a reader transcodes such a tensor while it arrives as well. The scales write the
// padding.
//
// With act-order, the codes land in the order of the file, and g_idx behind the panels. When all parts have
// landed, put_in_act_order() (transcode.h) moves the columns of a group together.
#pragma once

#include <string_view>

#include "kernels/formats.h"

namespace argosy {

enum class GroupedPart : uint8_t {
  codes,
  int8_codes,
  gptq_codes,
  awq_codes,
  scales,
  channel_scales,
  scales_by_group,
  zeros,
  channel_zeros,
  int8_zeros,
  int8_channel_zeros,
  gptq_zeros,
  gptq_v2_zeros,
  gptq_channel_zeros,
  awq_zeros,
  biases,
  g_idx,
  channel_g_idx
};

// What one strip of a part covers: rows of the matrix and all columns, or some columns and all rows.
enum class StripOf : uint8_t { panel, two_panels, group, scale_group };

// The least rows that fill whole words: all, or one word of the stream.
enum class RowUnit : uint8_t { one, eight, word };

struct GroupedPartEntry {
  GroupedPart part;
  std::string_view name;
  StripOf strip;
  RowUnit rows = RowUnit::one;
};
[[maybe_unused]] static constexpr GroupedPartEntry kGroupedParts[] = {
    {GroupedPart::codes, "codes", StripOf::panel},
    {GroupedPart::int8_codes, "int8_codes", StripOf::panel},
    {GroupedPart::gptq_codes, "gptq_codes", StripOf::group},
    {GroupedPart::awq_codes, "awq_codes", StripOf::group, RowUnit::eight},
    {GroupedPart::scales, "scales", StripOf::panel},
    {GroupedPart::channel_scales, "channel_scales", StripOf::panel},
    {GroupedPart::scales_by_group, "scales_by_group", StripOf::scale_group},
    {GroupedPart::zeros, "zeros", StripOf::two_panels},
    {GroupedPart::channel_zeros, "channel_zeros", StripOf::two_panels},
    {GroupedPart::int8_zeros, "int8_zeros", StripOf::panel},
    {GroupedPart::int8_channel_zeros, "int8_channel_zeros", StripOf::panel},
    {GroupedPart::gptq_zeros, "gptq_zeros", StripOf::scale_group, RowUnit::word},
    {GroupedPart::gptq_v2_zeros, "gptq_v2_zeros", StripOf::scale_group, RowUnit::word},
    {GroupedPart::gptq_channel_zeros, "gptq_channel_zeros", StripOf::two_panels, RowUnit::word},
    {GroupedPart::awq_zeros, "awq_zeros", StripOf::scale_group, RowUnit::eight},
    {GroupedPart::biases, "biases", StripOf::panel},
    {GroupedPart::g_idx, "g_idx", StripOf::group},
    {GroupedPart::channel_g_idx, "channel_g_idx", StripOf::group},
};
[[maybe_unused]] static constexpr int kNumGroupedParts =
    int(sizeof(kGroupedParts) / sizeof(kGroupedParts[0]));
static_assert([] {
  for (int i = 0; i < kNumGroupedParts; ++i) {
    if (kGroupedParts[i].part != GroupedPart(i)) return false;
  }
  return true;
}());

// Whether a matrix of this grouped format can have the part.
static inline constexpr bool has_part(Format format, GroupedPart part) {
  const GroupedKind kind = grouped_kind(format);
  const bool has_zeros = kind.min == GroupedMin::of_zeros, is_affine = kind.min == GroupedMin::stored;
  switch (part) {
    case GroupedPart::codes:
    case GroupedPart::scales:
    case GroupedPart::channel_scales:
      return true;
    case GroupedPart::int8_codes:
      return kind.bits == 8 && !is_affine;
    case GroupedPart::gptq_codes:
    case GroupedPart::scales_by_group:
    case GroupedPart::g_idx:
      return !is_affine;
    case GroupedPart::channel_g_idx:
      return !is_affine && !has_act_order(format);
    case GroupedPart::awq_codes:
      return kind.bits == 4 && !is_affine;
    case GroupedPart::int8_zeros:
    case GroupedPart::int8_channel_zeros:
      return kind.bits == 8 && has_zeros;
    case GroupedPart::awq_zeros:
      return kind.bits == 4 && has_zeros;
    case GroupedPart::biases:
      return is_affine;
    default:
      return has_zeros;
  }
}

// Whether some bytes of the part are refused: no numbers, or numbers with several meanings.
static inline constexpr bool part_may_be_refused(GroupedPart part) {
  switch (part) {
    case GroupedPart::scales:
    case GroupedPart::channel_scales:
    case GroupedPart::scales_by_group:
    case GroupedPart::biases:
    case GroupedPart::gptq_zeros:
    case GroupedPart::gptq_channel_zeros:
    case GroupedPart::g_idx:
    case GroupedPart::channel_g_idx:
      return true;
    default:
      return false;
  }
}

// Whether the part can have this many rows.
static inline constexpr bool has_whole_words(Format format, GroupedPart part, int64_t rows) {
  const RowUnit unit = kGroupedParts[int(part)].rows;
  if (unit == RowUnit::eight) return rows % 8 == 0;
  return unit == RowUnit::one || rows * grouped_kind(format).bits % 32 == 0;
}

// The bytes of the part for a number of rows of the matrix.
static inline constexpr int64_t part_bytes(Format format, GroupedPart part, int64_t rows, int64_t cols) {
  const int64_t bits = grouped_kind(format).bits, groups = num_blocks(format, cols);
  const int64_t words = round_up(rows * bits, 32) / 32;
  switch (part) {
    case GroupedPart::codes:
    case GroupedPart::gptq_codes:
      return rows * (cols / 32 * 4 * bits);
    case GroupedPart::int8_codes:
      return rows * cols;
    case GroupedPart::awq_codes:
      return rows / 2 * cols;
    case GroupedPart::scales:
    case GroupedPart::scales_by_group:
    case GroupedPart::biases:
      return rows * groups * 2;
    case GroupedPart::channel_scales:
      return rows * 2;
    case GroupedPart::zeros:
    case GroupedPart::gptq_zeros:
    case GroupedPart::gptq_v2_zeros:
      return words * 4 * groups;
    case GroupedPart::channel_zeros:
    case GroupedPart::gptq_channel_zeros:
      return words * 4;
    case GroupedPart::int8_zeros:
      return rows * groups;
    case GroupedPart::int8_channel_zeros:
      return rows;
    case GroupedPart::awq_zeros:
      return rows / 2 * groups;
    case GroupedPart::g_idx:
    case GroupedPart::channel_g_idx:
      return cols * 4;
  }
  return 0;
}

static inline constexpr int64_t part_strips(Format format, GroupedPart part, int64_t rows, int64_t cols) {
  switch (kGroupedParts[int(part)].strip) {
    case StripOf::panel:
      return round_up(rows, kPanelRows) / kPanelRows;
    case StripOf::two_panels:
      return round_up(rows, 2 * kPanelRows) / (2 * kPanelRows);
    case StripOf::group:
      return num_groups(cols);
    case StripOf::scale_group:
      return num_blocks(format, cols);
  }
  return 0;
}

// The bytes of a strip; the last may have fewer.
static inline constexpr int64_t part_strip_bytes(Format format, GroupedPart part, int64_t rows,
                                                 int64_t cols) {
  switch (kGroupedParts[int(part)].strip) {
    case StripOf::panel:
      return part_bytes(format, part, kPanelRows, cols);
    case StripOf::two_panels:
      return part_bytes(format, part, 2 * kPanelRows, cols);
    case StripOf::group:
      return part_bytes(format, part, rows, kGroupSize);
    case StripOf::scale_group:
      return part_bytes(format, part, rows, kGroupSize);
  }
  return 0;
}

}  // namespace argosy
