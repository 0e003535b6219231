// transcode_grouped.h: transcodes the parts of grouped formats (grouped_parts.h has the contract).
//
// Whatever packed the codes, they pass through the same eight vectors: byte j of chunk c is the code of
// column 4 c + j of four rows. A part writes its places of every panel; absent rows and columns become zeros.
#pragma once

#include "kernels/matmul_args.h"
#include "kernels/transcode_panel.h"

namespace argosy {
namespace {

struct GroupedMatrix {
  Format format;
  QuantFormat quant;
  int64_t rows, cols, groups, blocks;
  uint8_t* data;

  explicit GroupedMatrix(const TranscodeArgs& a)
      : GroupedMatrix(slot_format(a.type), a.rows, a.cols, a.matrix) {}
  explicit GroupedMatrix(const ActOrderArgs& a) : GroupedMatrix(a.format, a.rows, a.cols, a.matrix) {}
  GroupedMatrix(Format slot, int64_t num_rows, int64_t num_cols, uint8_t* matrix)
      : format(slot),
        quant(quant_format(slot)),
        rows(num_rows),
        cols(num_cols),
        groups(num_groups(num_cols)),
        blocks(num_blocks(slot, num_cols)),
        data(matrix) {}

  int64_t num_panels() const { return round_up(rows, kPanelRows) / kPanelRows; }
  uint8_t* panel(int64_t index) const { return data + index * panel_bytes(format, cols); }
  uint8_t* block(int64_t index, int64_t number) const { return panel(index) + number * quant.block_bytes(); }
  uint8_t* group(int64_t index, int64_t number) const { return panel(index) + quant.quants_at(number); }
  int64_t rows_of(int64_t index) const {
    const int64_t left = rows - index * kPanelRows;
    return left < kPanelRows ? left : kPanelRows;
  }
  // Clears the groups of the last block that the matrix does not have.
  void clear_missing_groups(int64_t index) const {
    for (int64_t g = groups; g < blocks * quant.block_groups(); ++g)
      std::memset(group(index, g), 0, size_t(quant.group_bytes()));
  }
  void clear_padding(int64_t index) const {
    uint8_t* end = block(index, blocks);
    std::memset(end, 0, size_t(panel(index + 1) - end));
  }
};

// Eight chunks of a group of four rows, from one stream for each row.
template <int kBits>
inline void chunks_of_stream(const RowWords (&words)[kBits], RowWords (&chunks)[8]) {
  for (int c = 0; c < 8; ++c) {
    if constexpr (kBits == 8) {
      chunks[c] = words[c];
    } else if constexpr (kBits == 4) {
      chunks[c] = spread_nibbles(words[c / 2] >> (c % 2 * 16));
    } else {
      const int begin = c * 4 * kBits, word = begin / 32, shift = begin % 32;
      RowWords codes = words[word] >> shift;
      if (shift + 4 * kBits > 32) codes |= words[word + 1] << (32 - shift);
      constexpr uint32_t kMask = (1u << kBits) - 1;
      chunks[c] = (codes & kMask) | ((codes << (8 - kBits)) & (kMask << 8)) |
                  ((codes << (16 - 2 * kBits)) & (kMask << 16)) |
                  ((codes << (24 - 3 * kBits)) & (kMask << 24));
    }
  }
}

// The quants of a group of four rows, as formats.h has them.
template <int kBits>
inline void store_chunks(const BlockRows& rows, const RowWords (&chunks)[8], uint8_t* group) {
  if constexpr (kBits == 8) {
    for (int c = 0; c < 8; ++c) rows.store(group + c * kChunkBytes, chunks[c]);
    return;
  }
  const auto store_pairs = [&](int shift, uint8_t* planes) {
    for (int plane = 0; plane < 2; ++plane) {
      RowWords pairs = {};
      for (int c = 0; c < 4; ++c) pairs |= ((chunks[4 * plane + c] >> shift) & 0x03030303u) << (2 * c);
      rows.store(planes + plane * kChunkBytes, pairs);
    }
  };
  constexpr int kLow = kBits < 4 ? 2 : 4;
  if constexpr (kBits - kLow == 1) {
    RowWords bits = {};
    for (int c = 0; c < 8; ++c) bits |= ((chunks[c] >> kLow) & 0x01010101u) << c;
    rows.store(group, bits);
  }
  if constexpr (kBits - kLow == 2) store_pairs(kLow, group);
  uint8_t* low = group + (kBits - kLow) * kChunkBytes;
  if constexpr (kLow == 2) {
    store_pairs(0, low);
  } else {
    for (int c = 0; c < 4; ++c)
      rows.store(low + c * kChunkBytes, (chunks[c] & kLowNibbles) | ((chunks[c + 4] & kLowNibbles) << 4));
  }
}

// The reverse.
template <int kBits>
inline void load_chunks(const BlockRows& rows, const uint8_t* group, RowWords (&chunks)[8]) {
  const auto load = [&](const uint8_t* at) {
    RowWords words;
    std::memcpy(&words, at + rows.first * 4, sizeof words);
    return words;
  };
  constexpr int kLow = kBits == 8 ? 8 : kBits < 4 ? 2 : 4;
  const uint8_t* low = group + (kBits - kLow) * kChunkBytes;
  RowWords bits = {};
  if constexpr (kBits - kLow == 1) bits = load(group);
  for (int c = 0; c < 8; ++c) {
    if constexpr (kBits == 8) {
      chunks[c] = load(low + c * kChunkBytes);
    } else if constexpr (kLow == 4) {
      chunks[c] = (load(low + c % 4 * kChunkBytes) >> (c / 4 * 4)) & kLowNibbles;
    } else {
      chunks[c] = (load(low + c / 4 * kChunkBytes) >> (c % 4 * 2)) & 0x03030303u;
    }
    if constexpr (kBits - kLow == 1) chunks[c] |= ((bits >> c) & 0x01010101u) << kLow;
  }
}

// Calls body(Number<bits>{}) for the bits of a format.
template <class Body>
inline void with_bits(int bits, const Body& body) {
  with_number<6, 2>(bits, body);
  if (bits == 8) body(Number<8>{});
}

// codes, int8_codes: one row after another.
template <int kBits>
void transcode_code_rows(const GroupedMatrix& m, const TranscodeArgs& a, uint32_t flip) {
  static constexpr uint8_t kNoRow[4 * kBits] = {};
  const int64_t row_bytes = m.groups * 4 * kBits;
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    const uint8_t* from = a.rows_data + (index - a.panel_begin) * kPanelRows * row_bytes;
    for (int64_t g = 0; g < m.groups; ++g) {
      for (int64_t first = 0; first < kPanelRows; first += kRowsAtOnce) {
        BlockRows rows = {{}, first};
        for (int64_t r = 0; r < kRowsAtOnce; ++r) {
          rows.row[r] =
              first + r < m.rows_of(index) ? from + (first + r) * row_bytes + g * 4 * kBits : kNoRow;
        }
        RowWords words[kBits], chunks[8];
        if constexpr (kBits % 4 == 0) {
          rows.load(0, words);
        } else {
          const auto word = [&](int r, int i) { return read_unaligned<uint32_t>(rows.row[r] + 4 * i); };
          for (int i = 0; i < kBits; ++i) words[i] = RowWords{word(0, i), word(1, i), word(2, i), word(3, i)};
        }
        chunks_of_stream<kBits>(words, chunks);
        if (flip != 0) {
          for (RowWords& chunk : chunks) chunk ^= flip;
        }
        store_chunks<kBits>(rows, chunks, m.group(index, g));
      }
    }
    m.clear_missing_groups(index);
  }
}

// gptq_codes: a strip is `bits` rows of words, one word for each row of the matrix.
template <int kBits>
void transcode_gptq_codes(const GroupedMatrix& m, const TranscodeArgs& a) {
  for (int64_t g = a.panel_begin; g < a.panel_end; ++g) {
    const uint8_t* from = a.rows_data + (g - a.panel_begin) * kBits * 4 * m.rows;
    for (int64_t index = 0; index < m.num_panels(); ++index) {
      for (int64_t first = 0; first < kPanelRows; first += kRowsAtOnce) {
        const BlockRows rows = {{}, first};
        const int64_t row = index * kPanelRows + first, left = m.rows - row;
        const int64_t present = left < 0 ? 0 : left < kRowsAtOnce ? left : kRowsAtOnce;
        RowWords words[kBits] = {}, chunks[8];
        for (int i = 0; i < kBits; ++i) {
          const uint8_t* at = from + (i * m.rows + row) * 4;
          if (present == kRowsAtOnce) {
            std::memcpy(&words[i], at, 16);
          } else {
            for (int64_t r = 0; r < present; ++r) words[i][r] = read_unaligned<uint32_t>(at + 4 * r);
          }
        }
        chunks_of_stream<kBits>(words, chunks);
        store_chunks<kBits>(rows, chunks, m.group(index, g));
      }
      if (g + 1 == m.groups) m.clear_missing_groups(index);
    }
  }
}

// awq_codes: a strip is 32 columns, each with a word for eight rows.
void transcode_awq_codes(const GroupedMatrix& m, const TranscodeArgs& a) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  const int64_t col_bytes = m.rows / 2;
  for (int64_t g = a.panel_begin; g < a.panel_end; ++g) {
    const uint8_t* from = a.rows_data + (g - a.panel_begin) * kGroupSize * col_bytes;
    for (int64_t index = 0; index < m.num_panels(); ++index) {
      for (int64_t eight = 0; eight < kPanelRows; eight += 8) {
        const bool is_there = eight < m.rows_of(index);
        RowWords chunks[2][8] = {};
        for (int c = 0; c < 8 && is_there; ++c) {
          const auto column = [&](int j) {
            return read_unaligned<uint32_t>(from + (4 * c + j) * col_bytes +
                                            (index * kPanelRows + eight) / 2);
          };
          const RowWords columns = {column(0), column(1), column(2), column(3)};
          // A lane for each row: rows 0, 4, 1, 5 of the eight, and rows 2, 6, 3, 7.
          const auto by_row = [](const RowWords& nibbles) {
            const Bytes bytes = Bytes(nibbles & kLowNibbles);
            return RowWords(
                __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
          };
          const RowWords even = by_row(columns), odd = by_row(columns >> 4);
          chunks[0][c] = __builtin_shufflevector(even, odd, 0, 2, 4, 6);
          chunks[1][c] = __builtin_shufflevector(even, odd, 1, 3, 5, 7);
        }
        for (int64_t half = 0; half < 2; ++half) {
          store_chunks<4>(BlockRows{{}, eight + half * kRowsAtOnce}, chunks[half], m.group(index, g));
        }
      }
      if (g + 1 == m.groups) m.clear_missing_groups(index);
    }
  }
}

inline bool is_finite_half(uint16_t bits, bool is_bf16) {
  // Of a bfloat16 below 2^119, the largest weight, 255 times the scale, is a float32.
  if (is_bf16) return (bits & 0x7F80) < 0x7B00;
  const uint16_t exponent = 0x7C00;
  return (bits & exponent) != exponent;
}

// Scales or biases, at `at` in each block. value(row, block) points to the value in the file.
template <class Value>
bool transcode_halves(const GroupedMatrix& m, int64_t index, int64_t block_begin, int64_t block_end,
                      int64_t at, const Value& value) {
  bool is_finite = true;
  for (int64_t b = block_begin; b < block_end; ++b) {
    uint16_t halves[kPanelRows] = {};
    for (int64_t r = 0; r < m.rows_of(index); ++r) {
      halves[r] = read_unaligned<uint16_t>(value(r, b));
      is_finite = is_finite && is_finite_half(halves[r], m.quant.is_bf16);
    }
    std::memcpy(m.block(index, b) + at, halves, sizeof halves);
  }
  return is_finite;
}

// scales, channel_scales, biases: one row after another.
bool transcode_half_rows(const GroupedMatrix& m, const TranscodeArgs& a, GroupedPart part) {
  const bool is_bias = part == GroupedPart::biases, is_channel = part == GroupedPart::channel_scales;
  const int64_t row_bytes = 2 * (is_channel ? 1 : m.blocks);
  bool is_finite = true;
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    const uint8_t* from = a.rows_data + (index - a.panel_begin) * kPanelRows * row_bytes;
    is_finite &= transcode_halves(
        m, index, 0, m.blocks, is_bias ? kPanelRows * 2 : 0,
        [&](int64_t r, int64_t b) { return from + r * row_bytes + (is_channel ? 0 : 2 * b); });
    if (!is_bias) m.clear_padding(index);
  }
  return is_finite;
}

bool transcode_scales_by_group(const GroupedMatrix& m, const TranscodeArgs& a) {
  bool is_finite = true;
  for (int64_t b = a.panel_begin; b < a.panel_end; ++b) {
    const uint8_t* from = a.rows_data + (b - a.panel_begin) * 2 * m.rows;
    for (int64_t index = 0; index < m.num_panels(); ++index) {
      is_finite &= transcode_halves(m, index, b, b + 1, 0,
                                    [&](int64_t r, int64_t) { return from + (index * kPanelRows + r) * 2; });
      if (b + 1 == m.blocks) m.clear_padding(index);
    }
  }
  return is_finite;
}

// Code number `row` of a stream whose words are `stride` bytes apart.
inline int code_of_stream(const uint8_t* words, int64_t stride, int bits, int64_t row) {
  const int64_t begin = row * bits, word = begin / 32, shift = begin % 32;
  uint64_t codes = read_unaligned<uint32_t>(words + word * stride);
  if (shift + bits > 32) codes |= uint64_t{read_unaligned<uint32_t>(words + (word + 1) * stride)} << 32;
  return int(codes >> shift & ((1u << bits) - 1));
}

// What gptq_zeros add to a stored zero. Programs disagree about one with all bits set, so it is refused.
inline int added_to_zero(GroupedPart part) {
  return part == GroupedPart::gptq_zeros || part == GroupedPart::gptq_channel_zeros ? 1 : 0;
}

// The zeros of a panel. zero(row, block) is the zero of a row; returns whether all are below 2^bits.
template <class Zero>
bool put_zeros(const GroupedMatrix& m, int64_t index, int64_t block_begin, int64_t block_end,
               const Zero& zero) {
  bool fits = true;
  for (int64_t b = block_begin; b < block_end; ++b) {
    uint8_t zeros[kPanelRows] = {};
    for (int64_t r = 0; r < m.rows_of(index); ++r) {
      const int found = zero(r, b);
      fits = fits && found < 1 << m.quant.bits;
      zeros[r] = uint8_t(found);
    }
    std::memcpy(m.block(index, b) + kPanelRows * 2, zeros, sizeof zeros);
  }
  return fits;
}

// Zeros whose strips are rows: of panels or of two panels.
bool transcode_zeros_of_rows(const GroupedMatrix& m, const TranscodeArgs& a, GroupedPart part) {
  const bool is_stream = kGroupedParts[int(part)].strip == StripOf::two_panels;
  const bool is_channel = part != GroupedPart::zeros && part != GroupedPart::int8_zeros;
  const int64_t panels = is_stream ? 2 : 1, per_row = is_channel ? 1 : m.blocks;
  const int64_t strip_bytes = is_stream ? m.quant.bits * 4 * per_row : kPanelRows * per_row;
  bool fits = true;
  for (int64_t index = a.panel_begin * panels; index < a.panel_end * panels && index < m.num_panels();
       ++index) {
    const uint8_t* strip = a.rows_data + (index / panels - a.panel_begin) * strip_bytes;
    fits &= put_zeros(m, index, 0, m.blocks, [&](int64_t r, int64_t b) {
      const int64_t at = is_channel ? 0 : b;
      if (!is_stream) return strip[r * per_row + at] ^ 0x80;
      const int64_t row = index % panels * kPanelRows + r;
      return code_of_stream(strip + at * 4, per_row * 4, m.quant.bits, row) + added_to_zero(part);
    });
  }
  return fits;
}

// Zeros whose strips are groups of columns.
bool transcode_zeros_of_groups(const GroupedMatrix& m, const TranscodeArgs& a, GroupedPart part) {
  constexpr int kNibbleOf[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  const int64_t strip_bytes = m.rows * m.quant.bits / 8;
  bool fits = true;
  for (int64_t block = a.panel_begin; block < a.panel_end; ++block) {
    const uint8_t* strip = a.rows_data + (block - a.panel_begin) * strip_bytes;
    for (int64_t index = 0; index < m.num_panels(); ++index) {
      fits &= put_zeros(m, index, block, block + 1, [&](int64_t r, int64_t) {
        const int64_t row = index * kPanelRows + r;
        if (part == GroupedPart::awq_zeros) {
          return code_of_stream(strip, 4, 4, row / 8 * 8 + kNibbleOf[row % 8]);
        }
        return code_of_stream(strip, 4, m.quant.bits, row) + added_to_zero(part);
      });
    }
  }
  return fits;
}

constexpr int64_t kLargestGroup = int64_t{1} << 30;  // as wide as a matrix can be

// Whether each column belongs to the group of its place. Nothing is written.
bool is_in_order(const TranscodeArgs& a, int64_t group_cols) {
  bool is_right = true;
  for (int64_t col = a.panel_begin * kGroupSize; col < a.panel_end * kGroupSize; ++col) {
    const uint8_t* from = a.rows_data + (col - a.panel_begin * kGroupSize) * 4;
    is_right = is_right && read_unaligned<int32_t>(from) == int32_t(col / group_cols);
  }
  return is_right;
}

// Moves column order[i] of four rows to i. `columns` is scratch: one word for each column.
template <int kBits>
void move_columns(const GroupedMatrix& m, int64_t index, int64_t first, const int32_t* order,
                  uint32_t* columns) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  // Four columns of four rows: byte j of word r becomes byte r of word j.
  const auto turned = [](const RowWords& words) {
    const Bytes bytes = Bytes(words);
    return RowWords(
        __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  };
  const BlockRows rows = {{}, first};
  RowWords chunks[8];
  for (int64_t g = 0; g < m.groups; ++g) {
    load_chunks<kBits>(rows, m.group(index, g), chunks);
    for (int c = 0; c < 8; ++c) {
      const RowWords four = turned(chunks[c]);
      std::memcpy(columns + g * kGroupSize + 4 * c, &four, sizeof four);
    }
  }
  for (int64_t g = 0; g < m.groups; ++g) {
    const int32_t* from = order + g * kGroupSize;
    for (int c = 0; c < 8; ++c, from += 4) {
      chunks[c] = turned(RowWords{columns[from[0]], columns[from[1]], columns[from[2]], columns[from[3]]});
    }
    store_chunks<kBits>(rows, chunks, m.group(index, g));
  }
}

void move_columns(const ActOrderArgs& a) {
  const GroupedMatrix m(a);
  with_bits(m.quant.bits, [&]<int kBits>(Number<kBits>) {
    for (int64_t index = 0; index < m.num_panels(); ++index) {
      for (int64_t first = 0; first < kPanelRows; first += kRowsAtOnce)
        move_columns<kBits>(m, index, first, a.order, a.columns);
    }
  });
}

bool transcode_grouped(const TranscodeArgs& a) {
  const GroupedMatrix m(a);
  const GroupedPart part = part_of(a.type);
  switch (part) {
    case GroupedPart::codes:
      with_bits(m.quant.bits, [&]<int kBits>(Number<kBits>) { transcode_code_rows<kBits>(m, a, 0); });
      return true;
    case GroupedPart::int8_codes:
      transcode_code_rows<8>(m, a, 0x80808080u);
      return true;
    case GroupedPart::gptq_codes:
      with_bits(m.quant.bits, [&]<int kBits>(Number<kBits>) { transcode_gptq_codes<kBits>(m, a); });
      return true;
    case GroupedPart::awq_codes:
      transcode_awq_codes(m, a);
      return true;
    case GroupedPart::scales:
    case GroupedPart::channel_scales:
    case GroupedPart::biases:
      return transcode_half_rows(m, a, part);
    case GroupedPart::scales_by_group:
      return transcode_scales_by_group(m, a);
    case GroupedPart::zeros:
    case GroupedPart::channel_zeros:
    case GroupedPart::int8_zeros:
    case GroupedPart::int8_channel_zeros:
    case GroupedPart::gptq_channel_zeros:
      return transcode_zeros_of_rows(m, a, part);
    case GroupedPart::gptq_zeros:
    case GroupedPart::gptq_v2_zeros:
    case GroupedPart::awq_zeros:
      return transcode_zeros_of_groups(m, a, part);
    case GroupedPart::g_idx:
      if (has_act_order(m.format)) {
        std::memcpy(m.panel(m.num_panels()) + a.panel_begin * kGroupSize * 4, a.rows_data,
                    size_t(a.panel_end - a.panel_begin) * kGroupSize * 4);
        return true;
      }
      return is_in_order(a, m.quant.block_cols);
    case GroupedPart::channel_g_idx:
      return is_in_order(a, kLargestGroup);
  }
  return false;
}

}  // namespace
}  // namespace argosy
