// transcode_bnb4.h: transcodes the small tensors of a matrix of bitsandbytes (transcode.h has the contract).
//
// Each writes its places of all stretches, or is only checked.
#pragma once

#include "kernels/matmul_f8.h"
#include "kernels/transcode.h"

namespace argosy {
namespace {

// Texts of quant_state: a flat JSON object, whose keys have no escapes.
struct StateText {
  const char* text;
  int64_t size;

  bool is_object() const { return size > 1 && text[0] == '{' && text[size - 1] == '}'; }
  // Where the value of a key begins; -1: there is none, or there are several.
  int64_t value_at(const char* key) const {
    const auto length = int64_t(__builtin_strlen(key));
    int64_t found = -1;
    for (int64_t at = 0; at + length < size; ++at) {
      if (__builtin_memcmp(text + at, key, size_t(length)) != 0) continue;
      if (found >= 0) return -1;
      found = skip(at + length, ' ');
      if (found >= size || text[found] != ':') return -1;
      found = skip(found + 1, ' ');
    }
    return found;
  }
  int64_t skip(int64_t at, char what) const {
    while (at < size && text[at] == what) ++at;
    return at;
  }
  // Reads a whole number of at most 2^40 and moves behind it; -1: there is none.
  int64_t whole(int64_t& at) const {
    int64_t value = -1;
    for (; at < size && text[at] >= '0' && text[at] <= '9' && value < int64_t{1} << 36; ++at) {
      value = (value < 0 ? 0 : value) * 10 + (text[at] - '0');
    }
    return value;
  }
  bool is_number(const char* key, int64_t expected) const {
    int64_t at = value_at(key);
    if (at < 0 || whole(at) != expected) return false;
    at = skip(at, ' ');
    return at < size && (text[at] == ',' || text[at] == '}');
  }
  bool has_shape(int64_t rows, int64_t cols) const {
    int64_t at = value_at("\"shape\"");
    if (at < 0 || at >= size || text[at] != '[') return false;
    at = skip(at + 1, ' ');
    if (whole(at) != rows) return false;
    at = skip(at, ' ');
    if (at >= size || text[at] != ',') return false;
    at = skip(at + 1, ' ');
    if (whole(at) != cols) return false;
    at = skip(at, ' ');
    return at < size && text[at] == ']';
  }
  // A decimal number such as -0.0519 or 1e-05, to the precision of float32.
  bool read_float(const char* key, float& number) const {
    int64_t at = value_at(key);
    if (at < 0) return false;
    const bool is_negative = at < size && text[at] == '-';
    if (is_negative) ++at;
    double value = 0.0, unit = 1.0;
    bool has_digits = false, is_fraction = false;
    for (; at < size; ++at) {
      if (text[at] == '.' && !is_fraction) {
        is_fraction = true;
        continue;
      }
      if (text[at] < '0' || text[at] > '9') break;
      has_digits = true;
      value = value * 10.0 + (text[at] - '0');
      if (is_fraction) unit *= 10.0;
    }
    int64_t exponent = 0;
    if (at < size && (text[at] == 'e' || text[at] == 'E')) {
      const bool is_below = at + 1 < size && text[at + 1] == '-';
      at += is_below || (at + 1 < size && text[at + 1] == '+') ? 2 : 1;
      exponent = whole(at);
      if (exponent < 0 || exponent > 300) return false;
      exponent = is_below ? -exponent : exponent;
    }
    value /= unit;
    for (; exponent > 0; --exponent) value *= 10.0;
    for (; exponent < 0; ++exponent) value /= 10.0;
    at = skip(at, ' ');
    const bool is_last = at < size && (text[at] == ',' || text[at] == '}');
    number = float(is_negative ? -value : value);
    return has_digits && is_last && value < 0x1p100;
  }
};

constexpr float kLargestBnb4 = 0x1p100f;  // of factors, offsets and values: their products are float32
inline bool is_usable_bnb4(float value) { return value > -kLargestBnb4 && value < kLargestBnb4; }

// Older versions also stored the orders of columns that kernels of GPUs take.
inline bool transcode_int8_order(const TranscodeArgs& a) {
  return a.rows == 0 || a.cols == 0 || a.rows_data[0] == 0;
}

template <BlockType kType>
bool transcode_bnb4(const TranscodeArgs& a) {
  constexpr Format kFormat = slot_format(kType);
  constexpr F8Format kF8 = f8_format(kFormat);
  const int64_t scales = a.cols / kBnb4Block;
  const auto floats = [&](int64_t i) { return read_unaligned<float>(a.rows_data + 4 * i); };
  if (a.rows == 0 || a.cols == 0) return true;
  if constexpr (kType == BlockType::bnb4_double_nested_map) {
    for (int64_t i = 0; i < 256; ++i) {
      const float expected = kDynamicMap.value[i], found = floats(i);
      const float allowed = 1e-5f * (expected < 0 ? -expected : expected);
      if (!(found >= expected - allowed && found <= expected + allowed)) return false;
    }
  } else if constexpr (kType == BlockType::bnb4_map || kType == BlockType::bnb4_double_map) {
    for (int64_t row = 0; row < a.rows; row += kF8.stretch_rows) {
      std::memcpy(a.matrix + f8_stretch_at(kFormat, row, a.cols), a.rows_data, size_t(kF8.table_bytes));
    }
    for (int64_t i = 0; i < 16; ++i) {
      if (!(floats(i) >= -1.0f && floats(i) <= 1.0f)) return false;
    }
  } else if constexpr (kType == BlockType::bnb4_double_absmax) {
    const int64_t first_row = a.panel_begin * kPanelRows, last_row = a.panel_end * kPanelRows;
    for (int64_t row = first_row; row < a.rows && row < last_row; ++row) {
      uint8_t* to = a.matrix + f8_scales_at(kFormat, row, a.cols) + kF8.double_scales_at(a.cols);
      std::memcpy(to, a.rows_data + (row - first_row) * scales, size_t(scales));
      const bool is_last = (row + 1) % kF8.stretch_rows == 0 || row + 1 == a.rows;
      const uint8_t* end =
          is_last ? a.matrix + f8_stretch_at(kFormat, row, a.cols) + f8_scales_bytes(kFormat, a.cols)
                  : to + round_up(scales, 4);
      std::memset(to + scales, 0, size_t(end - to - scales));
    }
  } else if constexpr (kType == BlockType::bnb4_double_factors) {
    const int64_t given = source_bytes(kType, a.rows, a.cols) / 4;
    bool is_finite = true;
    for (int64_t i = 0; i < given; ++i) is_finite = is_finite && is_usable_bnb4(floats(i));
    for (int64_t row = 0; row < a.rows; ++row) {
      uint8_t* to = a.matrix + f8_scales_at(kFormat, row, a.cols);
      const int64_t first = row * scales / kDoubleBlock;
      const auto before = uint32_t(row * scales % kDoubleBlock);
      std::memcpy(to + 4, &before, 4);
      for (int64_t i = 0; i < kF8.num_factors(a.cols); ++i) {
        const float factor = is_finite && first + i < given ? floats(first + i) : 0.0f;
        std::memcpy(to + 8 + 4 * i, &factor, 4);
      }
    }
    return is_finite;
  } else {
    const StateText state = {reinterpret_cast<const char*>(a.rows_data), block_bytes(a.type)};
    if (!state.is_object() || !state.is_number("\"blocksize\"", kBnb4Block) ||
        !state.has_shape(a.rows, a.cols))
      return false;
    if constexpr (kType == BlockType::bnb4_double_state) {
      float offset = 0.0f;
      if (!state.is_number("\"nested_blocksize\"", kDoubleBlock)) return false;
      if (!state.read_float("\"nested_offset\"", offset)) return false;
      for (int64_t row = 0; row < a.rows; ++row) {
        std::memcpy(a.matrix + f8_scales_at(kFormat, row, a.cols), &offset, 4);
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace argosy
