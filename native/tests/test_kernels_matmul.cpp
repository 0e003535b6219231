// Products: every vector path equals the reference, and every tile has the same order of sums.

#include "kernels/matmul_args.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

void vector_paths_meet_the_reference() {
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      for (const int64_t size : kSizes) {
        const int64_t cols = cols_of(format, size);
        for (const int64_t rows : {0, 1, 8, 15, 16, 17, 33, 49}) {
          const int64_t num_tokens = 1 + (rows + size) % 15;
          const Weights w = Weights::random(format, rows, cols, 1, (rows + size) % 4);
          const std::vector<float> x = normal(num_tokens * cols, 2);
          // Up to 256 products of numbers up to about 4, each rounded to 2^-24, summed in another order; or
          // to 2^-17, if activations are split.
          const bool splits = table->split_activations != nullptr && splits_activations(format);
          CHECK(near(multiply(*table, w.view, x, num_tokens), multiply(plain(), w.view, x, num_tokens),
                     splits ? 3e-4 : 4e-5));
        }
      }
    }
  }
}

void a_token_has_one_order_of_sums() {
  constexpr int64_t kTokens = 70, kRows = 53;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      const int64_t cols = cols_of(format, 165);
      const Weights w = Weights::random(format, kRows, cols, 3);
      const std::vector<float> x = normal(kTokens * cols, 4);
      const std::vector<float> all = multiply(*table, w.view, x, kTokens);
      for (int64_t count = 1; count <= 17; ++count) {
        const std::vector<float> some(x.end() - count * cols, x.end());
        CHECK(same_bits(multiply(*table, w.view, some, count),
                        std::vector<float>(all.end() - count * kRows, all.end())));
      }
      for (int64_t misalign = 1; misalign < 4; ++misalign) {
        const Weights odd = Weights::random(format, kRows, cols, 3, misalign);
        CHECK(same_bits(multiply(*table, odd.view, x, kTokens), all));
      }
    }
  }
}

// One token takes a different path through short panels than through long ones.
void a_long_row_has_the_same_order_of_sums() {
  constexpr int64_t kTokens = 5, kRows = 40, kCols = 5120;
  for (const KernelTable* table : all_tables()) {
    if (table == &plain()) continue;
    for (const Format format : kFormats) {
      const Weights w = Weights::random(format, kRows, kCols, 3);
      const std::vector<float> x = normal(kTokens * kCols, 4);
      const std::vector<float> all = multiply(*table, w.view, x, kTokens);
      for (int64_t t = 0; t < kTokens; ++t) {
        const std::vector<float> one(x.begin() + t * kCols, x.begin() + (t + 1) * kCols);
        CHECK(same_bits(multiply(*table, w.view, one, 1),
                        std::vector<float>(all.begin() + t * kRows, all.begin() + (t + 1) * kRows)));
      }
    }
  }
}

// Prefetches along a matrix, past its end, and into another one.
void what_is_asked_for_ahead_changes_no_bit() {
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      for (const int64_t size : {7, 5000}) {
        const int64_t cols = cols_of(format, size), rows = 53;
        const Weights w = Weights::random(format, rows, cols, 3), next = Weights::random(format, 16, cols, 4);
        const std::vector<float> x = normal(3 * cols, 5);
        const Inputs inputs(*table, format, x, cols, 3);
        for (const int64_t tokens : {1, 3}) {
          const std::vector<float> expected =
              multiply(*table, w.view, {x.begin(), x.begin() + tokens * cols}, tokens);
          for (const AskAhead& ask_ahead : kAskAheads) {
            std::vector<float> y(size_t(rows * tokens), NAN);
            MatmulArgs args = matmul_args(w.view, inputs, tokens, y.data());
            args.tuning.ask_ahead = args.tuning.few_ask_ahead = ask_ahead;
            args.next_weights = next.view.data;
            table->matmul[int(format)](args);
            CHECK(same_bits(y, expected));
          }
        }
      }
    }
  }
}

void the_panels_of_a_tile_change_no_bit() {
  constexpr int64_t kRows = 53, kMostTokens = 17;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      const int64_t cols = cols_of(format, 300);
      const Weights w = Weights::random(format, kRows, cols, 3);
      const Inputs inputs(*table, format, normal(kMostTokens * cols, 5), cols, kMostTokens);
      for (const int64_t tokens : {2, 3, 5, 8, 9, 17}) {
        std::vector<float> expected;
        for (int64_t from = kFewestForTwoPanels; from <= kMostForOnePanel + 1; ++from) {
          std::vector<float> y(size_t(kRows * tokens), NAN);
          MatmulArgs args = matmul_args(w.view, inputs, tokens, y.data());
          args.tuning.two_panels_from = from;
          table->matmul[int(format)](args);
          if (expected.empty()) expected = y;
          CHECK(same_bits(y, expected));
        }
      }
    }
  }
}

void rows_and_tokens_may_be_picked() {
  constexpr int64_t kTokens = 9, kRows = 50;
  const std::vector<int32_t> from = {8, 0, 3, 3, 1};
  const std::vector<int32_t> to = {0, 4, 1, 3, 2};
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      const int64_t cols = cols_of(format, 70);
      const Weights w = Weights::random(format, kRows, cols, 5);
      const std::vector<float> x = normal(kTokens * cols, 6);
      const std::vector<float> all = multiply(*table, w.view, x, kTokens);
      const Inputs inputs(*table, format, x, cols, kTokens);
      const int64_t ranges[][2] = {{0, 16}, {16, 32}, {16, 48}, {32, 50}, {48, 50}};
      for (const auto& [begin, end] : ranges) {
        std::vector<float> y(size_t(5 * (end - begin)), NAN);
        MatmulArgs args = matmul_args(w.view, inputs, 5, y.data());
        args.row_begin = begin;
        args.row_end = end;
        args.y_stride = end - begin;
        args.x_index = from.data();
        args.y_index = to.data();
        table->matmul[int(format)](args);
        bool equal = true;
        for (size_t i = 0; i < from.size(); ++i) {
          const float* found = y.data() + to[i] * (end - begin);
          equal &= std::memcmp(found, all.data() + from[i] * kRows + begin, size_t(end - begin) * 4) == 0;
        }
        CHECK(equal);
      }
    }
  }
}

// Each token has a single activation of 127 with a scale of one, so its products are rounded once: one wrong
// index, sign or scale is a different number.
void every_weight_of_a_coded_format_is_that_of_the_reference() {
  constexpr int64_t kRows = 17, kCols = 256;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      if (!is_coded(format) || table == &plain()) continue;
      const Weights w = Weights::random(format, kRows, kCols, 8);
      std::vector<float> x(size_t(kCols * kCols));
      for (int64_t t = 0; t < kCols; ++t) x[size_t(t * kCols + t)] = 127.0f;
      const std::vector<float> expected = multiply(plain(), w.view, x, kCols);
      CHECK(multiply(*table, w.view, x, kCols) == expected);
      for (const int64_t tokens : {1, 2, 4}) {
        for (int64_t t = 0; t < kCols; t += tokens) {
          CHECK(multiply(*table, w.view, {x.begin() + t * kCols, x.begin() + (t + tokens) * kCols}, tokens) ==
                std::vector<float>(expected.begin() + t * kRows, expected.begin() + (t + tokens) * kRows));
        }
      }
    }
  }
}

// Every result is a whole number that a float can hold, from activations that are whole numbers: it must be
// exact.
void check_exact_products(const KernelTable& table, const MatrixView& w) {
  std::vector<float> seen(size_t(w.rows * w.cols));
  dequantize(w, seen.data());
  for (int tokens = 1; tokens < 9; ++tokens) {
    std::vector<float> x(size_t(tokens * w.cols));
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = (i / size_t(w.cols)) % 2 == 0 || i % 3 == 0 ? 127.0f : -127.0f;
    }
    const std::vector<float> y = multiply(table, w, x, tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t row = 0; row < w.rows; ++row) {
        double sum = 0;
        for (int64_t col = 0; col < w.cols; ++col) {
          sum += double(seen[size_t(row * w.cols + col)]) * double(x[size_t(t * w.cols + col)]);
        }
        CHECK_EQUAL(double(y[size_t(t * w.rows + row)]), sum);
      }
    }
  }
}

// Makes all scales of a block of an i-quant one: sub-scales of zero, which stand for their unit.
void make_unit_scales(BlockType type, uint8_t* block) {
  const auto clear = [&](int64_t at, uint8_t kept, int64_t step) {
    for (int64_t i = 0; i < 8; ++i) block[at + i * step] &= kept;
  };
  if (type == BlockType::iq2_xxs) clear(2 + 7, 0x0F, 8);
  if (type == BlockType::iq2_xs) clear(66, 0, 1);
  if (type == BlockType::iq2_s) clear(74, 0, 1);
  if (type == BlockType::iq3_xxs) clear(66 + 3, 0x0F, 4);
  if (type == BlockType::iq3_s) std::memset(block + 106, 0, 4);
  if (type == BlockType::iq1_s) clear(34 + 1, 0x8F, 2);
  if (type == BlockType::iq1_m) {
    clear(48, 0, 1);
    put_iq1_m_scale(block, 8.0f);
  } else {
    put_half(block, type == BlockType::iq3_s ? 1.0f : type == BlockType::iq3_xxs ? 4.0f : 8.0f);
  }
}

// The sums are the largest possible, with all scales one.
void integer_sums_are_exact() {
  constexpr int64_t kRows = 16, kCols = 64;
  const auto is_high = [](int64_t row, int64_t col) {
    const int64_t kind = row % 4;
    return kind == 0 || (kind == 1 && col % 2 == 0) || (kind == 2 && col % 7 != 0);
  };
  for (const KernelTable* table : all_tables()) {
    for (const Format format : {Format::q8, Format::q4}) {
      std::vector<float> values(kRows * kCols);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t col = 0; col < kCols; ++col) {
          const float most = format == Format::q8 ? 127.0f : 7.0f;
          const float least = format == Format::q8 ? -127.0f : -8.0f;
          values[size_t(row * kCols + col)] = is_high(row, col) ? most : least;
        }
      }
      check_exact_products(*table, Weights(format, values, kRows, kCols).view);
    }
    for (const BlockType type : kBlockTypes) {
      if (slot_format(type) > Format::q1_0) continue;  // their sums need more bits than a float has
      const QuantFormat quant = quant_format(slot_format(type));
      const int64_t size = block_bytes(type);
      std::vector<uint8_t> blocks(size_t(kRows * size));
      for (int64_t row = 0; row < kRows; ++row) {
        uint8_t* block = blocks.data() + row * size;
        for (int64_t i = 0; i < size; ++i) block[i] = is_high(row, i) ? 0xFF : 0x00;
        if (quant.sub_scales == SubScales::bytes) {  // sub-scales of one, sub-mins of zero
          std::memset(block + 4, 1, 4);
          std::memset(block + 8, 0, 4);
          std::memset(block + 12, 1, 4);
        } else if (type == BlockType::q6_k) {
          for (int64_t i = 0; i < 16; ++i) block[192 + i] = is_high(row, i) ? 0x01 : 0xFF;
        } else if (type == BlockType::q2_k) {
          std::memset(block, 0x11, 16);
        } else if (type == BlockType::q3_k) {  // 33 - 32
          std::memset(block + 96, 0x11, 8);
          std::memset(block + 104, 0xAA, 4);
        } else if (type == BlockType::iq4_xs) {
          std::memset(block + 2, 0xAA, 2);
          std::memset(block + 4, 0x11, 4);
        }
        if (type == BlockType::mxfp4) {
          block[0] = 128;
          continue;
        }
        if (is_coded(slot_format(type)) && !keeps_blocks(slot_format(type))) {
          make_unit_scales(type, block);
          continue;
        }
        put_half(block + scale_at(type), 1.0f);
        if (quant.has_min) put_half(block + scale_at(type) + 2, quant.sub_scale_cols == 0 ? -3.0f : 1.0f);
      }
      check_exact_products(*table, Weights(type, blocks, kRows, quant.block_cols).view);
    }
  }
}

void activations_are_the_same_bytes_everywhere() {
  const float specials[] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 1e-38f, 1e-36f, 3e38f, -1e30f};
  for (const KernelTable* table : all_tables()) {
    for (const int64_t cols : kSizes) {
      for (const float special : specials) {
        std::vector<float> x = normal(cols, 7);
        if (cols > 0) x[size_t(cols / 2)] = special;
        std::vector<uint8_t> expected(size_t(activation_bytes(cols))), found = expected;
        plain().quantize_activations(x.data(), cols, 0, num_groups(cols), expected.data());
        table->quantize_activations(x.data(), cols, 0, num_groups(cols), found.data());
        CHECK(found == expected);
      }
    }
    // Ties go to the even number: if the largest is 32512, the scale of both bytes is one.
    const std::vector<float> ties = {32512.0f, 0.5f, 1.5f, 2.5f, 127.5f, -128.5f, -32512.0f};
    std::vector<uint8_t> found(size_t(activation_bytes(7)));
    table->quantize_activations(ties.data(), 7, 0, 1, found.data());
    const int8_t high[] = {127, 0, 0, 0, 1, 0, -127, 0};
    const int8_t low[] = {0, 0, 2, 2, -128, -128, 0, 0};
    const int16_t whole[] = {32512, 0, 2, 2, 128, -128, -32512, 0};
    CHECK(std::memcmp(found.data(), high, sizeof high) == 0);
    CHECK(std::memcmp(found.data() + activation_low_at(7), low, sizeof low) == 0);
    CHECK(std::memcmp(found.data() + activation_whole_at(7), whole, sizeof whole) == 0);
  }
}

// Panels with a NaN scale in row 3 and an infinite scale in row 7.
Weights spoiled(Format format, int64_t rows) {
  const int64_t cols = quant_format(format).block_cols;
  Weights w = Weights::random(format, rows, cols, 8);
  const uint16_t infinity = quant_format(format).is_bf16 ? 0x7F80 : 0x7C00, nan = infinity | 0x40;
  const auto spoil = [&](int64_t row, uint16_t bits) {
    if (format == Format::iq1_m) {  // the bytes of a scale lie on top of two words
      for (int half = 0; half < 2; ++half)
        w.bytes[size_t(64 * half + 4 * row + 3)] = uint8_t(bits >> 8 * half);
    } else if (quant_format(format).has_row_scale) {
      const float scale = float_from_f16(bits);
      std::memcpy(w.bytes.get() + row * 4, &scale, 4);
    } else if (format == Format::tq1_0) {  // behind 52 bytes of each row
      std::memcpy(w.bytes.get() + 32 + 12 * kChunkBytes + row * 4 + 2, &bits, 2);
    } else {
      const bool is_in_words = keeps_blocks(format) && quant_format(format).front_bytes / kPanelRows % 4 == 0;
      std::memcpy(w.bytes.get() + row * (is_in_words ? 4 : 2), &bits, 2);
    }
  };
  spoil(3, nan);
  spoil(7, infinity);
  return w;
}

// The value of a code according to the specification.
double e4m3(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code < 128 ? magnitude : -magnitude;
}

// Sizes with several blocks, and with partial blocks at both edges.
constexpr int64_t kF8Rows = 290, kF8Cols = 700, kF8Tokens = 61;

void f8_weights_are_codes_times_scales() {
  std::vector<uint8_t> codes(size_t(kF8Rows * kF8Cols));
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = uint8_t(i);
  // The rows and columns of a scale, or of a block of scales that are equal.
  const std::tuple<Format, BlockType, size_t, size_t> cases[] = {
      {Format::f8, BlockType::f8_scales, 128, 128},
      {Format::f8, sized(BlockType::f8_scales, 256, 384), 256, 384},
      {Format::f8, BlockType::f8_scale, 1000, 1000},
      {Format::f8_row, BlockType::f8_row_scales, 1, 1000},
      {Format::f8_32, BlockType::f8_32_scales, 1, 32},
      {Format::f8_32, sized(BlockType::f8_32_scales, 64, 64), 64, 64},
      {Format::f8_32, sized(BlockType::f8_32_scales, 10, 96), 10, 96},
      {Format::f8_32, sized(BlockType::f8_32_scales, 1, 128), 1, 128},
  };
  for (const auto& [format, type, rows, cols] : cases) {
    const size_t across = (kF8Cols + cols - 1) / cols, down = (kF8Rows + rows - 1) / rows;
    const std::vector<float> scales = normal(int64_t(down * across), 12);
    Weights w(format, kF8Rows, kF8Cols, 1);
    w.bring(codes_of(format), codes);
    const auto* bits = reinterpret_cast<const uint8_t*>(scales.data());
    CHECK(w.bring(type, {bits, bits + scales.size() * 4}));
    std::vector<float> found(codes.size());
    for (const KernelTable* table : all_tables()) {
      for (int64_t row = 0; row < kF8Rows; ++row)
        table->dequantize_row(format, w.view.data, kF8Cols, row, found.data() + row * kF8Cols);
      bool equal = true;
      for (size_t i = 0; i < codes.size(); ++i) {
        const size_t row = i / kF8Cols, col = i % kF8Cols;
        const float expected = float(e4m3(codes[i]) * double(scales[row / rows * across + col / cols]));
        equal &= std::isnan(expected) ? std::isnan(found[i]) : found[i] == expected;
      }
      CHECK(equal);
    }
  }
}

void f8_scales_may_have_other_types() {
  const std::vector<uint8_t> codes(size_t(kF8Rows * kF8Cols), 0x38);  // 1
  const auto require = [&](BlockType type, const auto& stored, int64_t count,
                           double (*value)(int64_t number)) {
    Weights w(slot_format(type), kF8Rows, kF8Cols, 3);
    CHECK(w.bring(codes_of(slot_format(type)), codes));
    const auto* bits = reinterpret_cast<const uint8_t*>(stored.data());
    CHECK(w.bring(type, {bits, bits + size_t(count * block_bytes(type))}));
    std::vector<float> found(codes.size());
    dequantize(w.view, found.data());
    const int64_t across = block_row_bytes(type, kF8Cols) / block_bytes(type);
    bool equal = true;
    for (int64_t i = 0; i < kF8Rows * kF8Cols; ++i) {
      const int64_t row = i / kF8Cols / block_rows(type), col = i % kF8Cols / block_cols(type);
      equal &= double(found[size_t(i)]) == value(row * across + col);
    }
    CHECK(equal);
  };
  std::vector<uint16_t> bf16(kF8Rows * 22), f16(bf16.size());
  std::vector<uint8_t> e8m0(bf16.size());
  for (size_t i = 0; i < bf16.size(); ++i) {
    bf16[i] = uint16_t(0x3800 + i % 1000);
    f16[i] = uint16_t(i % 0x7C00);  // subnormal ones too
    e8m0[i] = uint8_t(i % 246);
  }
  const auto bf16_at = [](int64_t i) { return double(float_from_bf16(uint16_t(0x3800 + i % 1000))); };
  const auto f16_at = [](int64_t i) { return double(float_from_f16(uint16_t(i % 0x7C00))); };
  const auto e8m0_at = [](int64_t i) { return std::ldexp(1.0, int(i % 246) - 127); };
  require(BlockType::f8_scales_bf16, bf16, 18, bf16_at);
  require(BlockType::f8_scales_f16, f16, 18, f16_at);
  require(BlockType::f8_scales_e8m0, e8m0, 18, e8m0_at);
  require(BlockType::f8_scale_bf16, bf16, 1, bf16_at);
  require(BlockType::f8_scale_f16, f16, 1, f16_at);
  require(BlockType::f8_row_scales_bf16, bf16, kF8Rows, bf16_at);
  require(BlockType::f8_row_scales_f16, f16, kF8Rows, f16_at);
  require(BlockType::f8_32_scales_bf16, bf16, kF8Rows * 22, bf16_at);
  require(BlockType::f8_32_scales_f16, f16, kF8Rows * 22, f16_at);
  require(BlockType::mxfp8_scales, e8m0, kF8Rows * 22, e8m0_at);
  require(sized(BlockType::mxfp8_scales, 32, 32), e8m0, 10 * 22, e8m0_at);
  require(sized(BlockType::mxfp8_scales, 7, 64), e8m0, 42 * 11, e8m0_at);
}

void sizes_of_blocks_are_part_of_their_names() {
  CHECK(block_type_named("f8_scales_256x128") == sized(BlockType::f8_scales, 256, 128));
  CHECK(block_type_named("f8_scales_bf16_128x384") == sized(BlockType::f8_scales_bf16, 128, 384));
  CHECK(block_type_named("mxfp8_scales_3x64") == sized(BlockType::mxfp8_scales, 3, 64));
  CHECK_EQUAL(block_rows(sized(BlockType::mxfp8_scales, 3, 64)), 3);
  CHECK_EQUAL(block_cols(sized(BlockType::mxfp8_scales, 3, 64)), 64);
  CHECK_EQUAL(strip_rows(sized(BlockType::mxfp8_scales, 3, 64)), 18);
  for (const char* wrong :
       {"f8_scales_64x128", "f8_scales_128x64", "mxfp8_scales_1x16", "mxfp8_scales_0x32", "mxfp8_scales_1x0",
        "mxfp8_scales_-1x32", "mxfp8_scales_1x32x", "mxfp8_scales_1x", "mxfp8_scales_x32", "mxfp8_scales_",
        "mxfp8_scales_16777216x32", "mxfp8_scales_99999999999999999999x32", "f8_scale_128x128",
        "f8_codes_128x128", "f8_row_scales_1x32", "Q4_0_1x32", "f8_scales_bf16_", ""}) {
    CHECK(!block_type_named(wrong));
  }
}

void f8_products_are_those_of_the_float32_weights() {
  const std::vector<float> x = normal(kF8Tokens * kF8Cols, 14);
  for (const Format format : kF8Formats) {
    const Weights w = Weights::random(format, kF8Rows, kF8Cols, 13, 1);
    std::vector<float> weights(size_t(kF8Rows * kF8Cols));
    dequantize(w.view, weights.data());
    const Weights as_floats(Format::f32, weights, kF8Rows, kF8Cols);
    for (const KernelTable* table : all_tables()) {
      const std::vector<float> all = multiply(*table, w.view, x, kF8Tokens);
      // 700 products of numbers up to about 10, rounded to 2^-24, summed in another order; or to 2^-17.
      const bool splits = table->split_activations != nullptr && splits_activations(format);
      CHECK(near(all, multiply(*table, as_floats.view, x, kF8Tokens), splits ? 1e-3 : 1e-4));
      for (int64_t t = 0; t < kF8Tokens; ++t) {
        const std::vector<float> one(x.begin() + t * kF8Cols, x.begin() + (t + 1) * kF8Cols);
        CHECK(same_bits(multiply(*table, w.view, one, 1),
                        std::vector<float>(all.begin() + t * kF8Rows, all.begin() + (t + 1) * kF8Rows)));
      }
    }
  }
}

// Each code in each place of a vector, alone in its row's sum.
void a_product_with_an_f8_code_is_its_value() {
  constexpr int64_t kRows = 256, kCols = 250;
  std::vector<uint8_t> codes(size_t(kRows * kCols));
  for (size_t i = 0; i < codes.size(); ++i) {
    const int code = int(i) / int(kCols);
    codes[i] = uint8_t(code % 128 == 127 ? 0 : code);
  }
  const auto weights_of = [&](Format format) {
    const auto scales = size_t(num_f8_scales(format, kRows, kCols));
    if (format == Format::mxfp8) {
      return Weights(format, codes, std::vector<uint8_t>(scales, 126), kRows, kCols, 3);
    }
    return Weights(format, codes, std::vector<float>(scales, 0.5f), kRows, kCols, 3);
  };
  for (const Format format : kF8Formats) {
    const Weights w = weights_of(format);
    for (const KernelTable* table : all_tables()) {
      for (const int64_t tokens : {1, 2, 3, 6, 30}) {
        for (int64_t first = 0; first < kCols; first += tokens) {
          std::vector<float> x(size_t(tokens * kCols), 0.0f);
          for (int64_t t = 0; t < tokens && first + t < kCols; ++t) x[size_t(t * kCols + first + t)] = 1.0f;
          const std::vector<float> y = multiply(*table, w.view, x, tokens);
          bool equal = true;
          for (int64_t t = 0; t < tokens && first + t < kCols; ++t) {
            for (int64_t row = 0; row < kRows; ++row) {
              const double value = row % 128 == 127 ? 0 : e4m3(int(row));
              equal &= double(y[size_t(t * kRows + row)]) == value / 2;
            }
          }
          CHECK(equal);
        }
      }
    }
  }
}

void what_is_no_number_is_seen_while_it_is_transcoded() {
  for (const KernelTable* table : all_tables()) {
    std::vector<uint8_t> matrix(size_t(matrix_bytes(Format::f8_32, kF8Rows, kF8Cols)));  // the largest
    const auto run = [&](BlockType type, const void* data) {
      return table->transcode[kind_of(type)]({static_cast<const uint8_t*>(data), kF8Rows, kF8Cols, 1, 0,
                                              num_strips(type, kF8Rows), matrix.data()});
    };
    std::vector<uint8_t> codes(size_t(kF8Rows * kF8Cols), 0xFE);
    CHECK(run(BlockType::f8_codes, codes.data()));
    for (const size_t at : {size_t(0), codes.size() / 2, codes.size() - 1}) {
      std::vector<uint8_t> damaged = codes;
      damaged[at] = at % 2 == 0 ? 0x7F : 0xFF;
      for (const Format format : kF8Formats) CHECK(!run(codes_of(format), damaged.data()));
    }
    std::vector<float> scales(18, 6e35f);
    CHECK(run(BlockType::f8_scales, scales.data()));
    for (const float wrong : {NAN, INFINITY, -INFINITY, 1e36f}) {
      std::vector<float> damaged = scales;
      damaged[17] = wrong;
      CHECK(!run(BlockType::f8_scales, damaged.data()));
    }
    std::vector<uint16_t> halves(18, 0x3F80);
    CHECK(run(BlockType::f8_scales_bf16, halves.data()));
    halves[3] = 0x7F80;
    CHECK(!run(BlockType::f8_scales_bf16, halves.data()));
    halves[3] = 0x7C00;
    CHECK(!run(BlockType::f8_scales_f16, halves.data()));
    const float nan = NAN;
    CHECK(!run(BlockType::f8_scale, &nan));
    std::vector<float> of_rows(kF8Rows, 6e35f);
    CHECK(run(BlockType::f8_row_scales, of_rows.data()));
    of_rows.back() = 1e36f;
    CHECK(!run(BlockType::f8_row_scales, of_rows.data()));
    std::vector<uint8_t> powers(kF8Rows * 22, 245);
    CHECK(run(BlockType::mxfp8_scales, powers.data()));
    for (const uint8_t wrong : {uint8_t{246}, uint8_t{254}, uint8_t{255}}) {
      powers.back() = wrong;
      CHECK(!run(BlockType::mxfp8_scales, powers.data()));
    }
  }
}

// Readers transcode a few rows of a tensor at a time, scales before or after codes.
void f8_tensors_may_be_transcoded_apart() {
  std::vector<uint8_t> codes(size_t(kF8Rows * kF8Cols));
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = uint8_t(i * 7 % 127);
  std::vector<uint16_t> halves(18);
  std::vector<float> scales(18);
  for (size_t i = 0; i < 18; ++i) {
    halves[i] = uint16_t(0x3C00 + 77 * i);
    scales[i] = float_from_bf16(halves[i]);
  }
  const Weights whole(Format::f8, codes, scales, kF8Rows, kF8Cols);
  const auto size = size_t(matrix_bytes(Format::f8, kF8Rows, kF8Cols));
  for (const KernelTable* table : all_tables()) {
    std::vector<uint8_t> parts(size, 0xAA);
    const int64_t strips[][2] = {{2, 3}, {0, 2}};
    for (const auto& [begin, end] : strips) {
      table->transcode[int(BlockType::f8_scales_bf16)](
          {reinterpret_cast<const uint8_t*>(halves.data() + begin * 6), kF8Rows, kF8Cols, 1, begin, end,
           parts.data()});
    }
    const int64_t panels[][2] = {{9, 19}, {0, 1}, {1, 9}};
    for (const auto& [begin, end] : panels) {
      table->transcode[int(BlockType::f8_codes)](
          {codes.data() + begin * 16 * kF8Cols, kF8Rows, kF8Cols, 1, begin, end, parts.data()});
    }
    CHECK(std::memcmp(parts.data(), whole.view.data, size) == 0);
  }
}

// Random bytes, so scales and mins of every kind; f8 codes are never NaN.
std::vector<uint8_t> any_source(BlockType type, int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<uint8_t> bytes(size_t(source_bytes(type, rows, cols)));
  for (uint8_t& byte : bytes) byte = uint8_t(generator());
  if (!may_be_refused(type)) return bytes;
  const ScaleType scale = entry_of(type).scale;
  if (is_factor(type)) {
    const float factor = 0.37f;
    std::memcpy(bytes.data(), &factor, 4);
  } else if (scale == ScaleType::none) {
    for (uint8_t& byte : bytes) byte = (byte & 0x7F) == 0x7F ? 0 : byte;
  } else if (scale == ScaleType::f32) {
    const std::vector<float> scales = normal(int64_t(bytes.size() / 4), seed);
    std::memcpy(bytes.data(), scales.data(), bytes.size());
  } else if (scale == ScaleType::e8m0) {
    for (uint8_t& byte : bytes) byte = uint8_t(byte % 246);
  } else {
    for (size_t i = 1; i < bytes.size(); i += 2) bytes[i] = bytes[i] % 2 == 0 ? 0x3D : 0xBD;
  }
  return bytes;
}

// The strips of blocks of any height, scales before or after codes.
void f8_scales_of_any_block_may_be_transcoded_apart() {
  const std::pair<Format, BlockType> cases[] = {
      {Format::f8, sized(BlockType::f8_scales, 256, 128)},
      {Format::f8_row, BlockType::f8_row_scales},
      {Format::f8_32, sized(BlockType::f8_32_scales, 10, 64)},
      {Format::mxfp8, sized(BlockType::mxfp8_scales, 32, 32)},
      {Format::mxfp8, sized(BlockType::mxfp8_scales, 7, 96)},
  };
  for (const auto& [format, type] : cases) {
    const std::vector<uint8_t> codes = any_source(codes_of(format), kF8Rows, kF8Cols, 17);
    const std::vector<uint8_t> scales = any_source(type, kF8Rows, kF8Cols, 18);
    Weights whole(format, kF8Rows, kF8Cols, 0);
    CHECK(whole.bring(codes_of(format), codes));
    CHECK(whole.bring(type, scales));
    const auto size = size_t(matrix_bytes(format, kF8Rows, kF8Cols));
    const int64_t strip_bytes = source_bytes(type, strip_rows(type), kF8Cols);
    std::vector<uint8_t> parts(size, 0xAA);
    for (int64_t strip = num_strips(type, kF8Rows) - 1; strip >= 0; --strip) {
      const int64_t begin = strip * strip_bytes, end = begin + strip_bytes;
      // Only these bytes, so that a sanitizer sees reads beyond them.
      const std::vector<uint8_t> some(
          scales.begin() + begin,
          scales.begin() + (end < int64_t(scales.size()) ? end : int64_t(scales.size())));
      CHECK(transcode(type, some.data(), kF8Rows, kF8Cols, 1, strip, strip + 1, parts.data()));
    }
    CHECK(transcode(codes_of(format), codes.data(), kF8Rows, kF8Cols, 1, 0,
                    num_strips(codes_of(format), kF8Rows), parts.data()));
    CHECK(std::memcmp(parts.data(), whole.view.data, size) == 0);
  }
}

void nan_and_infinity_stay_in_their_row() {
  constexpr int64_t kRows = 20, kCols = 70;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      if (is_f8(format)) continue;  // their scales are finite
      std::vector<float> values = normal(kRows * kCols, 8);
      values[3 * kCols + 40] = NAN;
      values[7 * kCols + 69] = -INFINITY;
      const Weights w =
          is_quantized_here(format) ? Weights(format, values, kRows, kCols) : spoiled(format, kRows);
      const std::vector<float> y = multiply(*table, w.view, normal(2 * w.view.cols, 9), 2);
      for (size_t i = 0; i < y.size(); ++i) {
        const size_t row = i % kRows;
        CHECK(std::isfinite(y[i]) == (row != 3 && row != 7));
        CHECK(row != 3 || std::isnan(y[i]));
      }
    }
  }
}

void every_instruction_set_packs_the_same_bytes() {
  std::vector<float> values = normal(35 * 70, 10);
  for (int64_t i = 0; i < 70; ++i) values[size_t(5 * 70 + i)] *= 1e-7f;
  for (int64_t i = 0; i < 70; ++i) values[size_t(6 * 70 + i)] = 0.0f;
  for (const Format format : {Format::q8, Format::q4}) {
    const size_t size = size_t(matrix_bytes(format, 35, 70));
    std::vector<uint8_t> expected(size), found(size);
    for (const KernelTable* table : all_tables()) {
      const auto run = format == Format::q8 ? table->quantize_q8 : table->quantize_q4;
      run(values.data(), 35, 70, 0, 3, found.data());
      if (table == &plain()) expected = found;
      CHECK(found == expected);
    }
  }
}

// Readers, pack and the Python functions without a runtime use best_kernels(), whatever an engine computes
// with.
void every_instruction_set_transcodes_to_the_same_bytes() {
  for (int number = 0; number < kNumBlockTypes; ++number) {
    const BlockType type = BlockType(number);
    const Format format = slot_format(type);
    if (is_f8(format) && !has_e4m3_codes(format))
      continue;  // tensors_of_bitsandbytes_may_be_transcoded_apart
    const int64_t rows = 300, cols = is_f8(format) ? 300 : 3 * quant_format(format).block_cols;
    for (const int64_t interleaved : {1, 2}) {
      if (!may_be_interleaved(type) && interleaved > 1) continue;
      const std::vector<uint8_t> source = any_source(type, interleaved * rows, cols, 15);
      std::vector<uint8_t> expected;
      for (const KernelTable* table : all_tables()) {
        std::vector<uint8_t> found(size_t(interleaved * matrix_bytes(format, rows, cols)), 0xA5);
        CHECK(table->transcode[number](
            {source.data(), rows, cols, interleaved, 0, num_strips(type, rows), found.data()}));
        if (table == &plain()) expected = found;
        CHECK(found == expected);
      }
    }
  }
}

void every_instruction_set_dequantizes_to_the_same_bits() {
  for (const Format format : kFormats) {
    const int64_t rows = 50, cols = cols_of(format, 300);
    const Weights w = Weights::random(format, rows, cols, 16, 1);
    std::vector<float> expected(size_t(rows * cols));
    dequantize(w.view, expected.data());
    for (const KernelTable* table : all_tables()) {
      std::vector<float> found(expected.size());
      for (int64_t row = 0; row < rows; ++row)
        table->dequantize_row(format, w.view.data, cols, row, found.data() + row * cols);
      CHECK(same_bits(found, expected));
    }
  }
}

// Every part of every grouped format, in any order of strips, writes its places and no others, the same in
// every instruction set.
void parts_of_grouped_formats_may_be_transcoded_apart() {
  for (int number = 0; number < kNumGroupedParts * kNumGrouped; ++number) {
    const BlockType type = BlockType(kNumBlockTypes + number);
    const Format format = slot_format(type);
    const GroupedPart part = part_of(type);
    if (!has_part(format, part)) continue;
    CHECK(block_type_named(grouped_name(format) + ":" + std::string(kGroupedParts[int(part)].name)) == type);
    for (const auto& [rows, cols] : {std::pair{96, 160}, std::pair{40, 96}, std::pair{33, 256}}) {
      if (!has_whole_words(type, rows)) continue;
      const std::vector<uint8_t> source = random_part(format, part, rows, cols, 3);
      const int64_t strips = num_strips(type, rows, cols), stride = strip_bytes(type, rows, cols);
      CHECK(stride * (strips - 1) < int64_t(source.size()) && int64_t(source.size()) <= stride * strips);
      std::vector<uint8_t> expected(size_t(matrix_bytes(format, rows, cols)), 0xA5);
      CHECK(plain().transcode_grouped({source.data(), rows, cols, 1, 0, strips, expected.data(), type}));
      for (const KernelTable* table : all_tables()) {
        std::vector<uint8_t> found(expected.size(), 0xA5);
        for (int64_t strip = strips - 1; strip >= 0; --strip) {
          // Exactly the strip's bytes, so that a sanitizer detects reads beyond them.
          const int64_t end = std::min(int64_t(source.size()), (strip + 1) * stride);
          const std::vector<uint8_t> some(source.begin() + strip * stride, source.begin() + end);
          CHECK(table->transcode_grouped({some.data(), rows, cols, 1, strip, strip + 1, found.data(), type}));
        }
        CHECK(found == expected);
      }
    }
  }
}

// Codes, scales, and zeros or biases together write every byte of the matrix.
void grouped_parts_fill_the_matrix() {
  for (int i = kFirstGrouped; i < kNumFormats; ++i) {
    const Format format = Format(i);
    for (const auto& [rows, cols] : {std::pair{33, 96}, std::pair{16, 256}}) {
      std::vector<uint8_t> filled[2];
      for (const uint8_t before : {uint8_t{0x00}, uint8_t{0xFF}}) {
        std::vector<uint8_t>& matrix = filled[before != 0];
        matrix.assign(size_t(matrix_bytes(format, rows, cols)), before);
        for (const GroupedPart part : {GroupedPart::codes, GroupedPart::scales, GroupedPart::zeros,
                                       GroupedPart::biases, GroupedPart::g_idx}) {
          if (!has_part(format, part)) continue;
          const BlockType type = grouped_type(format, part);
          const std::vector<uint8_t> source = random_part(format, part, rows, cols, 3);
          CHECK(
              transcode(type, source.data(), rows, cols, 1, 0, num_strips(type, rows, cols), matrix.data()));
        }
        if (has_act_order(format)) CHECK(put_in_act_order(format, rows, cols, matrix.data()));
      }
      CHECK(filled[0] == filled[1]);
    }
  }
}

// Every instruction set moves the same columns: those of the panels, which hold the codes and nothing else.
void columns_move_to_the_places_of_their_order() {
  constexpr int64_t kRows = 33, kCols = 160;
  std::vector<int32_t> order(kCols);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  for (int i = kFirstGrouped + kNumInPlace; i < kNumFormats; ++i) {
    const Format format = Format(i);
    const BlockType type = grouped_type(format, GroupedPart::codes);
    const std::vector<uint8_t> source = random_part(format, GroupedPart::codes, kRows, kCols, 3);
    Weights before(format, kRows, kCols, 0);
    std::memset(before.bytes.get(), 0, size_t(matrix_bytes(format, kRows, kCols)));
    CHECK(before.bring(type, source));
    for (const KernelTable* table : all_tables()) {
      Weights after(format, kRows, kCols, 0);
      std::memcpy(after.bytes.get(), before.bytes.get(), size_t(matrix_bytes(format, kRows, kCols)));
      std::vector<uint32_t> columns(kCols);
      table->move_columns({format, kRows, kCols, after.bytes.get(), order.data(), columns.data()});
      for (int64_t row = 0; row < kRows; ++row) {
        const int64_t panel = row / kPanelRows * panel_bytes(format, kCols);
        for (int64_t col = 0; col < kCols; ++col) {
          CHECK_EQUAL(quant_at(format, after.view.data + panel, row % kPanelRows, col),
                      quant_at(format, before.view.data + panel, row % kPanelRows, order[size_t(col)]));
        }
      }
    }
  }
}

// The sums are the largest possible, with all scales one.
void integer_sums_of_grouped_formats_are_exact() {
  constexpr int64_t kRows = 16, kCols = 64;
  for (const KernelTable* table : all_tables()) {
    for (int i = kFirstGrouped; i < kFirstGrouped + kNumInPlace; ++i) {
      const Format format = Format(i);
      for (const uint8_t byte : {uint8_t{0x00}, uint8_t{0xFF}}) {
        Weights w(format, kRows, kCols, 0);
        for (const GroupedPart part :
             {GroupedPart::codes, GroupedPart::scales, GroupedPart::zeros, GroupedPart::biases}) {
          if (!has_part(format, part)) continue;
          std::vector<uint8_t> bytes(size_t(part_bytes(format, part, kRows, kCols)),
                                     part == GroupedPart::zeros ? uint8_t(~byte) : byte);
          if (part == GroupedPart::scales || part == GroupedPart::biases) {
            const uint16_t one = quant_format(format).is_bf16 ? 0x3F80 : 0x3C00;
            for (size_t at = 0; at < bytes.size(); at += 2) std::memcpy(&bytes[at], &one, 2);
          }
          CHECK(w.bring(grouped_type(format, part), bytes));
        }
        check_exact_products(*table, w.view);
      }
    }
  }
}

// In any order of tensors and strips, each writes its places and no others.
void tensors_of_bitsandbytes_may_be_transcoded_apart() {
  for (const Format format : {Format::int8_row, Format::bnb4, Format::bnb4_double}) {
    for (const auto& [rows, cols] : {std::pair{53, 128}, std::pair{300, 320}, std::pair{16, 64}}) {
      const Weights whole = Weights::random(format, rows, cols, 4);
      std::vector<BlockType> parts = bnb_parts(format, rows, cols);
      for (const KernelTable* table : all_tables()) {
        std::reverse(parts.begin(), parts.end());
        std::vector<uint8_t> found(size_t(matrix_bytes(format, rows, cols)), 0xA5);
        std::vector<float> expected(size_t(rows * cols)), values(expected.size());
        for (const BlockType type : parts) {
          const std::vector<uint8_t> source = random_bnb_part(type, rows, cols, 4);
          const int64_t strips = num_strips(type, rows), stride = strip_bytes(type, rows, cols);
          for (int64_t strip = strips - 1; strip >= 0; --strip) {
            const auto begin = source.begin() + strip * stride;
            const std::vector<uint8_t> some(begin, strip + 1 < strips ? begin + stride : source.end());
            CHECK(table->transcode[kind_of(type)](
                {some.data(), rows, cols, 1, strip, strip + 1, found.data(), type}));
          }
        }
        dequantize(whole.view, expected.data());
        dequantize({format, found.data(), rows, cols}, values.data());
        CHECK(same_bits(values, expected));
      }
    }
  }
}

// A reader transcodes a few panels of a matrix at a time, from the rows it has.
void panels_may_be_transcoded_apart() {
  constexpr int64_t kRows = 53;
  for (const KernelTable* table : all_tables()) {
    for (int number = 0; number < kNumBlockTypes; ++number) {
      const BlockType type = BlockType(number);
      const Format format = slot_format(type);
      if (is_f8(format) || is_factor(type)) continue;  // f8_tensors_may_be_transcoded_apart
      const int64_t cols = 2 * quant_format(format).block_cols;
      const int64_t row_bytes = block_row_bytes(type, cols);
      for (const int64_t interleaved : {1, 2, 3}) {
        const std::vector<uint8_t> blocks = random_blocks(type, interleaved * kRows, cols, 11);
        std::vector<uint8_t> whole(size_t(interleaved * matrix_bytes(format, kRows, cols))),
            parts(whole.size());
        table->transcode[number]({blocks.data(), kRows, cols, interleaved, 0, 4, whole.data()});
        const int64_t ranges[][2] = {{2, 4}, {0, 1}, {1, 2}};
        for (const auto& [begin, end] : ranges) {
          // The source holds only these rows, which end where its memory ends.
          const int64_t rows = (end * kPanelRows < kRows ? end * kPanelRows : kRows) - begin * kPanelRows;
          const int64_t stride = interleaved * row_bytes;
          const std::vector<uint8_t> some(blocks.begin() + begin * kPanelRows * stride,
                                          blocks.begin() + (begin * kPanelRows + rows) * stride);
          table->transcode[number]({some.data(), kRows, cols, interleaved, begin, end, parts.data()});
        }
        CHECK(parts == whole);
        // Each matrix equals the result of its own rows.
        std::vector<uint8_t> apart;
        for (int64_t i = 0; i < interleaved; ++i) {
          std::vector<uint8_t> own, matrix(size_t(matrix_bytes(format, kRows, cols)));
          for (int64_t row = 0; row < kRows; ++row) {
            const auto at = blocks.begin() + (row * interleaved + i) * row_bytes;
            own.insert(own.end(), at, at + row_bytes);
          }
          table->transcode[number]({own.data(), kRows, cols, 1, 0, 4, matrix.data()});
          apart.insert(apart.end(), matrix.begin(), matrix.end());
        }
        CHECK(apart == whole);
      }
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  vector_paths_meet_the_reference();
  a_token_has_one_order_of_sums();
  a_long_row_has_the_same_order_of_sums();
  f8_weights_are_codes_times_scales();
  f8_scales_may_have_other_types();
  sizes_of_blocks_are_part_of_their_names();
  f8_products_are_those_of_the_float32_weights();
  a_product_with_an_f8_code_is_its_value();
  what_is_no_number_is_seen_while_it_is_transcoded();
  f8_tensors_may_be_transcoded_apart();
  f8_scales_of_any_block_may_be_transcoded_apart();
  what_is_asked_for_ahead_changes_no_bit();
  the_panels_of_a_tile_change_no_bit();
  rows_and_tokens_may_be_picked();
  every_weight_of_a_coded_format_is_that_of_the_reference();
  integer_sums_are_exact();
  activations_are_the_same_bytes_everywhere();
  nan_and_infinity_stay_in_their_row();
  every_instruction_set_packs_the_same_bytes();
  every_instruction_set_transcodes_to_the_same_bytes();
  tensors_of_bitsandbytes_may_be_transcoded_apart();
  every_instruction_set_dequantizes_to_the_same_bits();
  panels_may_be_transcoded_apart();
  parts_of_grouped_formats_may_be_transcoded_apart();
  grouped_parts_fill_the_matrix();
  columns_move_to_the_places_of_their_order();
  integer_sums_of_grouped_formats_are_exact();
  return check_result();
}
