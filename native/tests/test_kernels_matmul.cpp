// Products: every vector path against the reference, and one order of sums for every tile.

#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

void vector_paths_meet_the_reference() {
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      for (const int64_t cols : kSizes) {
        for (const int64_t rows : {0, 1, 8, 15, 16, 17, 33, 49}) {
          const int64_t num_tokens = 1 + (rows + cols) % 15;
          const Weights w(format, normal(rows * cols, 1), rows, cols, (rows + cols) % 4);
          const std::vector<float> x = normal(num_tokens * cols, 2);
          // 70 products of numbers up to about 4, each rounded to 2^-24, in another order.
          CHECK(
              near(multiply(*table, w.view, x, num_tokens), multiply(plain(), w.view, x, num_tokens), 4e-5));
        }
      }
    }
  }
}

void a_token_has_one_order_of_sums() {
  constexpr int64_t kTokens = 70, kRows = 53, kCols = 165;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      const Weights w(format, normal(kRows * kCols, 3), kRows, kCols);
      const std::vector<float> x = normal(kTokens * kCols, 4);
      const std::vector<float> all = multiply(*table, w.view, x, kTokens);
      for (int64_t count = 1; count <= 17; ++count) {
        const std::vector<float> some(x.end() - count * kCols, x.end());
        CHECK(same_bits(multiply(*table, w.view, some, count),
                        std::vector<float>(all.end() - count * kRows, all.end())));
      }
      for (int64_t misalign = 1; misalign < 4; ++misalign) {
        const Weights odd(format, normal(kRows * kCols, 3), kRows, kCols, misalign);
        CHECK(same_bits(multiply(*table, odd.view, x, kTokens), all));
      }
    }
  }
}

void rows_and_tokens_may_be_picked() {
  constexpr int64_t kTokens = 9, kRows = 50, kCols = 70;
  const std::vector<int32_t> from = {8, 0, 3, 3, 1};
  const std::vector<int32_t> to = {0, 4, 1, 3, 2};
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      const Weights w(format, normal(kRows * kCols, 5), kRows, kCols);
      const std::vector<float> x = normal(kTokens * kCols, 6);
      const std::vector<float> all = multiply(*table, w.view, x, kTokens);
      const Inputs inputs(*table, format, x, kCols, kTokens);
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

// The largest sums there are: with all scales one, the result is a whole number that a float holds.
void integer_sums_are_exact() {
  constexpr int64_t kRows = 16, kCols = 64;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : {Format::q8, Format::q4}) {
      const float most = format == Format::q8 ? 127.0f : 7.0f;
      const float least = format == Format::q8 ? -127.0f : -8.0f;
      std::vector<float> values(kRows * kCols);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t col = 0; col < kCols; ++col) {
          const int64_t kind = row % 4;
          const bool high = kind == 0 || (kind == 1 && col % 2 == 0) || (kind == 2 && col % 7 != 0);
          values[size_t(row * kCols + col)] = high ? most : least;
        }
      }
      const Weights w(format, values, kRows, kCols);
      std::vector<float> seen(size_t(kRows * kCols));
      dequantize(w.view, seen.data());
      for (int tokens = 1; tokens < 9; ++tokens) {
        std::vector<float> x(size_t(tokens * kCols));
        for (size_t i = 0; i < x.size(); ++i) x[i] = (i / kCols) % 2 == 0 || i % 3 == 0 ? 127.0f : -127.0f;
        const std::vector<float> y = multiply(*table, w.view, x, tokens);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t row = 0; row < kRows; ++row) {
            double sum = 0;
            for (int64_t col = 0; col < kCols; ++col) {
              sum += double(seen[size_t(row * kCols + col)]) * double(x[size_t(t * kCols + col)]);
            }
            CHECK_EQUAL(double(y[size_t(t * kRows + row)]), sum);
          }
        }
      }
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
    // Ties go to the even number: with the largest 32512 the scale of both bytes is one.
    const std::vector<float> ties = {32512.0f, 0.5f, 1.5f, 2.5f, 127.5f, -128.5f, -32512.0f};
    std::vector<uint8_t> found(size_t(activation_bytes(7)));
    table->quantize_activations(ties.data(), 7, 0, 1, found.data());
    const int8_t high[] = {127, 0, 0, 0, 1, 0, -127, 0};
    const int8_t low[] = {0, 0, 2, 2, -128, -128, 0, 0};
    CHECK(std::memcmp(found.data(), high, sizeof high) == 0);
    CHECK(std::memcmp(found.data() + activation_low_at(7), low, sizeof low) == 0);
  }
}

void nan_and_infinity_stay_in_their_row() {
  constexpr int64_t kRows = 20, kCols = 70;
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kFormats) {
      std::vector<float> values = normal(kRows * kCols, 8);
      values[3 * kCols + 40] = NAN;
      values[7 * kCols + 69] = -INFINITY;
      const Weights w(format, values, kRows, kCols);
      const std::vector<float> y = multiply(*table, w.view, normal(2 * kCols, 9), 2);
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

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  vector_paths_meet_the_reference();
  a_token_has_one_order_of_sums();
  rows_and_tokens_may_be_picked();
  integer_sums_are_exact();
  activations_are_the_same_bytes_everywhere();
  nan_and_infinity_stay_in_their_row();
  every_instruction_set_packs_the_same_bytes();
  return check_result();
}
