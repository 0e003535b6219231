// Products with quantised weights on the tiles of AMX have the bits of AVX-512; attention and products with
// bfloat16 and FP8 weights on tiles meet the reference. Skipped on a processor without AMX;
// `make test-emulated` runs this file on an emulated one.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "kernels/attention_args.h"
#include "kernels/matmul_args.h"
#include "ops/swiglu.h"
#include "tests/kernel_cases.h"

#if defined(__x86_64__)
namespace argosy {
extern const KernelTable kAvx512Kernels;  // without AMX
}
#endif

namespace argosy::testing {
namespace {

#if defined(__x86_64__)

struct FreeMemory {
  void operator()(uint8_t* memory) const { std::free(memory); }
};

// Memory of a product, with zeros.
std::unique_ptr<uint8_t[], FreeMemory> new_scratch() {
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(kAmxScratchBytes)));
  std::memset(memory, 0, size_t(kAmxScratchBytes));
  return std::unique_ptr<uint8_t[], FreeMemory>(memory);
}

const KernelTable& tables_with_tiles() { return kernel_table("avx512"); }

// Which NaN comes out of several depends on the order in which a compiler writes operands.
void make_nans_alike(std::vector<float>& values) {
  for (float& value : values) value = std::isnan(value) ? NAN : value;
}

// The same product without tiles, and with them.
void check_equal(MatmulArgs args, Format format, int64_t outputs) {
  std::vector<float> expected(size_t(outputs), -7.0f), found = expected;
  args.y = expected.data();
  kAvx512Kernels.matmul[int(format)](args);
  const auto scratch = new_scratch();
  args.y = found.data();
  args.tuning.amx_from = 1;
  args.scratch = scratch.get();
  tables_with_tiles().matmul[int(format)](args);
  make_nans_alike(expected);
  make_nans_alike(found);
  CHECK(same_bits(found, expected));
}

void tiles_have_the_bits_of_avx512() {
  int formats = 0;
  for (const Format format : kFormats) {
    const bool has_kernel = tables_with_tiles().matmul[int(format)] != kAvx512Kernels.matmul[int(format)] &&
                            !is_f8(format) && !is_coded(format);
    CHECK_EQUAL(has_kernel, has_amx_product(format));
    if (!has_kernel) continue;
    ++formats;
    // One group, a part of a block of groups, several blocks with a part.
    for (const int64_t size : {0, 1, 100, 1100}) {
      const int64_t cols = cols_of(format, size);
      for (const int64_t rows : {1, 16, 17, 32, 33, 53, 64}) {
        const Weights w = Weights::random(format, rows, cols, 3, rows % 4);
        const int64_t most = 50;
        const Inputs x(tables_with_tiles(), format, normal(most * cols, 4), cols, most);
        for (const int64_t tokens : {1, 7, 8, 15, 16, 17, 24, 31, 32, 40, 48, 50}) {
          if (rows > 1 && size > 100 && tokens % 8 != 1 && tokens < most) continue;
          check_equal(matmul_args(w.view, x, tokens, nullptr), format, rows * tokens);
        }
      }
    }
  }
  CHECK_EQUAL(formats, 14);
}

// More than fit in the scratch at once.
void many_tokens_are_multiplied_in_turns() {
  for (const Format format : {Format::q4, Format::q8, Format::q4_k}) {
    for (const int64_t size : {300, 5000, 40000}) {
      const int64_t cols = cols_of(format, size), rows = 48, tokens = size == 300 ? 300 : 70;
      const Weights w = Weights::random(format, rows, cols, 5);
      const Inputs x(tables_with_tiles(), format, normal(tokens * cols, 6), cols, tokens);
      check_equal(matmul_args(w.view, x, tokens, nullptr), format, rows * tokens);
    }
  }
}

void rows_and_tokens_may_be_picked() {
  std::vector<int32_t> from, to;
  for (int i = 0; i < 37; ++i) {
    from.push_back(i * 11 % 40);
    to.push_back(36 - i);
  }
  for (const Format format : kFormats) {
    if (!has_amx_product(format)) continue;
    const int64_t cols = cols_of(format, 70), rows = 115;
    const Weights w = Weights::random(format, rows, cols, 7), next = Weights::random(format, 16, cols, 8);
    const Inputs x(tables_with_tiles(), format, normal(40 * cols, 9), cols, 40);
    const int64_t ranges[][2] = {{0, 16}, {16, 64}, {32, 96}, {64, 115}, {112, 115}};
    for (const auto& [begin, end] : ranges) {
      MatmulArgs args = matmul_args(w.view, x, 37, nullptr);
      args.row_begin = begin;
      args.row_end = end;
      args.y_stride = end - begin + 3;
      args.x_index = from.data();
      args.y_index = to.data();
      args.next_weights = begin > 0 ? next.view.data : nullptr;
      check_equal(args, format, 37 * args.y_stride);
    }
  }
}

// All codes the same, and activations at their limits: the largest sums.
void the_largest_sums_are_exact() {
  constexpr int64_t kRows = 32, kTokens = 16;
  for (const Format format : kFormats) {
    if (!has_amx_product(format)) continue;
    const int64_t cols = cols_of(format, 300);
    for (const int code : {0x00, 0xFF, 0x0F, 0x80}) {
      const Weights w = Weights::random(format, kRows, cols, 10);
      const QuantFormat quant = quant_format(format);
      for (int64_t panel = 0; panel < kRows / kPanelRows; ++panel) {
        for (int64_t group = 0; group < num_groups(cols); ++group) {
          std::memset(w.bytes.get() + panel * panel_bytes(format, cols) + quant.quants_at(group), code,
                      size_t(quant.group_bytes()));
        }
      }
      std::vector<float> x(size_t(kTokens * cols));
      for (size_t i = 0; i < x.size(); ++i) x[i] = (i / size_t(cols)) % 2 == 0 || i % 3 == 0 ? 1.0f : -1.0f;
      const Inputs inputs(tables_with_tiles(), format, x, cols, kTokens);
      check_equal(matmul_args(w.view, inputs, kTokens, nullptr), format, kRows * kTokens);
    }
  }
}

// Scales that are no numbers, infinite and subnormal, in weights and in activations.
void scales_of_every_kind_have_the_same_bits() {
  constexpr int64_t kRows = 48, kTokens = 24;
  for (const Format format : kFormats) {
    if (!has_amx_product(format)) continue;
    const int64_t cols = cols_of(format, 130);
    const Weights w = Weights::random(format, kRows, cols, 11);
    for (int64_t panel = 0; panel < kRows / kPanelRows; ++panel) {
      const uint16_t kinds[] = {0x7F80, 0x7FC1, 0xFF80, 0x0001, 0x8001, 0x7C00, 0xFE01, 0xFC00, 0x0000};
      uint8_t* scales = w.bytes.get() + panel * panel_bytes(format, cols);
      std::memcpy(scales, kinds, sizeof kinds);
    }
    std::vector<float> x = normal(kTokens * cols, 12);
    const float specials[] = {NAN, INFINITY, -INFINITY, 1e-38f, 3e38f, 1e-36f};
    for (int64_t i = 0; i < 6; ++i) x[size_t((2 * i + 1) * cols + 5 * i)] = specials[i];
    const Inputs inputs(tables_with_tiles(), format, x, cols, kTokens);
    check_equal(matmul_args(w.view, inputs, kTokens, nullptr), format, kRows * kTokens);
  }
}

// The second product may use what the first one copied, and must not if they differ.
void repeated_activations_are_copied_once() {
  const Format format = Format::q8;
  const int64_t rows = 64, cols = 200, tokens = 40;
  const Weights w = Weights::random(format, rows, cols, 15);
  const Inputs x(tables_with_tiles(), format, normal(tokens * cols, 16), cols, tokens);
  const Inputs other(tables_with_tiles(), format, normal(tokens * cols, 17), cols, tokens);
  const auto scratch = new_scratch();
  const auto run = [&](const Inputs& inputs, int64_t count, bool repeats_x) {
    std::vector<float> y(size_t(rows * count)), expected = y;
    MatmulArgs args = matmul_args(w.view, inputs, count, y.data());
    args.tuning.amx_from = 1;
    args.scratch = scratch.get();
    args.repeats_x = repeats_x;
    tables_with_tiles().matmul[int(format)](args);
    args.y = expected.data();
    kAvx512Kernels.matmul[int(format)](args);
    return same_bits(y, expected);
  };
  CHECK(run(x, tokens, false));
  CHECK(run(x, tokens, true));
  CHECK(run(x, 32, true));      // fewer tokens
  CHECK(run(other, 32, true));  // other activations
  Inputs changed = other;
  CHECK(run(changed, 32, false));
  changed.bytes = x.bytes;  // others in the same place
  CHECK(run(changed, 32, false));
}

void tiles_are_used_from_the_tokens_on_that_the_tuning_says() {
  const Format format = Format::q4;
  const Weights w = Weights::random(format, 48, 64, 13);
  const Inputs x(tables_with_tiles(), format, normal(40 * 64, 14), 64, 40);
  const auto scratch = new_scratch();
  const auto& counts = *reinterpret_cast<const ProductCounts*>(scratch.get());
  std::vector<float> y(48 * 40);
  const auto run = [&](int64_t tokens, int64_t amx_from) {
    const uint64_t before = counts.in_tiles;
    MatmulArgs args = matmul_args(w.view, x, tokens, y.data());
    args.tuning.amx_from = amx_from;
    args.scratch = scratch.get();
    tables_with_tiles().matmul[int(format)](args);
    return counts.in_tiles - before;
  };
  CHECK_EQUAL(run(40, 0), 0u);
  CHECK_EQUAL(run(23, 24), 0u);
  CHECK_EQUAL(run(24, 24), 2u * 32 * 64 * 24);  // two of three panels
  CHECK_EQUAL(run(38, 24), 2u * 32 * 64 * 32);  // six tokens are left over
  CHECK_EQUAL(counts.all, 2u * 48 * 64 * (40 + 23 + 24 + 38));
}

// Of all values together.
template <class Expected>
double relative_error(const std::vector<float>& found, const Expected& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error += std::pow(double(found[i]) - double(expected[i]), 2);
    size += std::pow(double(expected[i]), 2);
  }
  return std::sqrt(error / size);
}

// Products with bfloat16 and FP8 weights in the instruction set `amx`.
const KernelTable& amx() { return kernel_table("amx"); }
const Format kFloatsOnTiles[] = {Format::bf16, Format::f8};

// y of rows [begin, end) for tokens [first, first + count).
std::vector<float> multiply_some(const MatrixView& w, const std::vector<float>& x, int64_t begin, int64_t end,
                                 int64_t first, int64_t count, bool repeats_x = false,
                                 const uint8_t* split_x = nullptr) {
  std::vector<float> y(size_t((end - begin) * count), -7.0f);
  MatmulArgs args = {};
  args.weights = w.data;
  args.cols = w.cols;
  args.row_begin = begin;
  args.row_end = end;
  args.x = reinterpret_cast<const uint8_t*>(x.data() + first * w.cols);
  args.x_stride = w.cols * 4;
  args.y = y.data();
  args.y_stride = end - begin;
  args.num_tokens = count;
  args.scratch = product_scratch();
  args.split_x = split_x;
  args.repeats_x = repeats_x;
  amx().matmul[int(w.format)](args);
  return y;
}

// The same rows and tokens of what `multiply_some` found for all.
std::vector<float> part_of(const std::vector<float>& all, int64_t rows, int64_t begin, int64_t end,
                           int64_t first, int64_t count) {
  std::vector<float> part;
  for (int64_t t = first; t < first + count; ++t) {
    part.insert(part.end(), all.begin() + t * rows + begin, all.begin() + t * rows + end);
  }
  return part;
}

std::vector<float> dequantized(const MatrixView& w) {
  std::vector<float> values(size_t(w.rows * w.cols));
  for (int64_t row = 0; row < w.rows; ++row) {
    plain().dequantize_row(w.format, w.data, w.cols, row, values.data() + row * w.cols);
  }
  return values;
}

// Sixteen bits of an activation are kept: each product has a relative error of 2^-17, and each addition one
// of 2^-24. Errors of many columns have either sign.
void floats_on_tiles_meet_float64() {
  double worst = 0;
  for (const Format format : kFloatsOnTiles) {
    for (const int64_t cols : {1, 31, 32, 33, 128, 200, 1100, 5000}) {
      const int64_t rows = 53, tokens = cols > 1000 ? 17 : 50;
      const Weights w = Weights::random(format, rows, cols, 3, cols % 4);
      const std::vector<float> x = normal(tokens * cols, 4), values = dequantized(w.view);
      std::vector<double> expected, magnitude;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < rows; ++row) {
          double sum = 0, all = 0;
          for (int64_t c = 0; c < cols; ++c) {
            const double product = double(values[size_t(row * cols + c)]) * double(x[size_t(t * cols + c)]);
            sum += product;
            all += std::fabs(product);
          }
          expected.push_back(sum);
          magnitude.push_back(all);
        }
      }
      for (const int64_t count : {int64_t{1}, int64_t{2}, int64_t{16}, int64_t{33}, tokens}) {
        if (count > tokens) continue;
        for (const int64_t end : {1, 15, 16, 17, 33, 53}) {
          if (cols > 1000 && end < 53 && end != 17) continue;
          const std::vector<float> y = multiply_some(w.view, x, 0, end, 0, count);
          double error = 0, size = 0;
          bool is_near = true;
          for (int64_t t = 0; t < count; ++t) {
            for (int64_t row = 0; row < end; ++row) {
              const size_t at = size_t(t * rows + row);
              const double off = double(y[size_t(t * end + row)]) - expected[at];
              is_near &= std::fabs(off) <= 0x1p-16 * magnitude[at];
              error += off * off;
              size += expected[at] * expected[at];
            }
          }
          CHECK(is_near);
          if (end == rows) worst = std::max(worst, std::sqrt(error / size));
        }
      }
    }
  }
  printf("bf16 and f8 on tiles: relative error %.1e\n", worst);
  CHECK(worst < 1e-5);
}

void floats_on_tiles_have_one_order_of_sums() {
  for (const Format format : kFloatsOnTiles) {
    for (const int64_t cols : {70, 192, 1100}) {  // whole tiles only with 192 columns
      const int64_t rows = 153, tokens = 50;
      const Weights w = Weights::random(format, rows, cols, 5, 2);
      const std::vector<float> x = normal(tokens * cols, 6);
      const std::vector<float> all = multiply_some(w.view, x, 0, rows, 0, tokens);
      const auto check = [&](int64_t begin, int64_t end, int64_t first, int64_t count) {
        CHECK(same_bits(multiply_some(w.view, x, begin, end, first, count),
                        part_of(all, rows, begin, end, first, count)));
      };
      for (int64_t token = 0; token < tokens; token += 7) check(0, rows, token, 1);
      for (const int64_t count : {2, 3, 15, 16, 17, 31, 32, 33, 48}) check(0, rows, tokens - count, count);
      for (const int64_t begin : {0, 1, 16, 120, 128, 140}) {
        for (const int64_t length : {1, 13, 16, 17, 32}) {
          if (begin + length > rows) continue;
          check(begin, begin + length, 3, 1);
          check(begin, begin + length, 5, 20);
        }
      }
      // At other addresses: cache lines begin elsewhere.
      alignas(64) static uint8_t memory[153 * 1100 * 2 + 4096];
      for (const int64_t misalign : {0, 1, 32, 63}) {
        uint8_t* place = memory + misalign;
        std::memcpy(place, w.view.data, size_t(matrix_bytes(format, rows, cols)));
        const MatrixView moved = {format, place, rows, cols};
        CHECK(same_bits(multiply_some(moved, x, 0, rows, 0, tokens), all));
        CHECK(same_bits(multiply_some(moved, x, 0, rows, 0, 20), part_of(all, rows, 0, rows, 0, 20)));
        CHECK(same_bits(multiply_some(moved, x, 0, rows, 9, 1), part_of(all, rows, 0, rows, 9, 1)));
      }
    }
  }
}

// More columns or tokens than fit in the scratch: sums wait in y, or tokens take turns.
void floats_on_tiles_take_turns() {
  const int64_t shapes[][3] = {{200, 300, 33}, {12000, 20, 17}, {40001, 18, 3}, {3000, 100, 17}};
  for (const Format format : kFloatsOnTiles) {
    for (const auto& [cols, tokens, rows] : shapes) {
      const Weights w = Weights::random(format, rows, cols, 7, 1);
      const std::vector<float> x = normal(tokens * cols, 8);
      const std::vector<float> all = multiply_some(w.view, x, 0, rows, 0, tokens);
      CHECK(near(all, multiply(kAvx512Kernels, w.view, x, tokens), 1e-2));
      for (const int64_t token : {int64_t{0}, tokens / 2, tokens - 1}) {
        CHECK(same_bits(multiply_some(w.view, x, 0, rows, token, 1), part_of(all, rows, 0, rows, token, 1)));
      }
      CHECK(same_bits(multiply_some(w.view, x, 0, rows, tokens - 5, 5),
                      part_of(all, rows, 0, rows, tokens - 5, 5)));
      CHECK(same_bits(multiply_some(w.view, x, 1, 3, 0, tokens, false), part_of(all, rows, 1, 3, 0, tokens)));
      CHECK(same_bits(multiply_some(w.view, x, 1, 3, 0, tokens, true), part_of(all, rows, 1, 3, 0, tokens)));
    }
  }
}

void rows_and_tokens_of_floats_may_be_picked() {
  std::vector<int32_t> from, to;
  for (int i = 0; i < 37; ++i) {
    from.push_back(i * 11 % 40);
    to.push_back(36 - i);
  }
  for (const Format format : kFloatsOnTiles) {
    const int64_t cols = 150, rows = 115;
    const Weights w = Weights::random(format, rows, cols, 7);
    const std::vector<float> x = normal(40 * cols, 9);
    const std::vector<float> all = multiply_some(w.view, x, 0, rows, 0, 40);
    bool repeats = false;
    for (const int64_t count : {1, 9, 37}) {
      for (const auto& [begin, end] : {std::pair{0, 16}, std::pair{16, 64}, std::pair{100, 115}}) {
        const int64_t stride = end - begin + 3;
        std::vector<float> y(size_t(37 * stride), -7.0f), expected = y;
        MatmulArgs args = {};
        args.weights = w.view.data;
        args.cols = cols;
        args.row_begin = begin;
        args.row_end = end;
        args.x = reinterpret_cast<const uint8_t*>(x.data());
        args.x_stride = cols * 4;
        args.x_index = from.data();
        args.y = y.data();
        args.y_stride = stride;
        args.y_index = to.data();
        args.num_tokens = count;
        args.scratch = product_scratch();
        args.repeats_x = repeats;  // with fewer tokens before, which must be noticed
        amx().matmul[int(format)](args);
        repeats = true;
        for (int64_t i = 0; i < count; ++i) {
          std::copy(all.begin() + from[size_t(i)] * rows + begin, all.begin() + from[size_t(i)] * rows + end,
                    expected.begin() + to[size_t(i)] * stride);
        }
        CHECK(same_bits(y, expected));  // what lies between the rows is kept
      }
    }
  }
}

// The second product may use what the first one copied, and must not if they differ.
void repeated_activations_of_floats_are_copied_once() {
  const int64_t rows = 64, cols = 200, tokens = 40;
  const Weights w = Weights::random(Format::bf16, rows, cols, 15),
                f8 = Weights::random(Format::f8, rows, cols, 18);
  const Weights q4 = Weights::random(Format::q4, rows, cols, 19);
  const std::vector<float> x = normal(tokens * cols, 16), other = normal(tokens * cols, 17);
  const std::vector<float> of_x = multiply_some(w.view, x, 0, rows, 0, tokens);
  const std::vector<float> of_other = multiply_some(w.view, other, 0, rows, 0, tokens);
  const std::vector<float> f8_of_x = multiply_some(f8.view, x, 0, rows, 0, tokens);
  const auto run = [&](const Weights& weights, const std::vector<float>& from, int64_t count,
                       bool repeats_x) {
    return multiply_some(weights.view, from, 0, rows, 0, count, repeats_x);
  };
  CHECK(same_bits(run(w, x, tokens, false), of_x));
  CHECK(same_bits(run(w, x, tokens, true), of_x));
  CHECK(same_bits(run(f8, x, tokens, true), f8_of_x));
  CHECK(same_bits(run(w, x, 32, true), part_of(of_x, rows, 0, rows, 0, 32)));          // fewer tokens
  CHECK(same_bits(run(w, other, 32, true), part_of(of_other, rows, 0, rows, 0, 32)));  // other activations
  std::vector<float> changed = x;
  CHECK(same_bits(run(w, changed, tokens, false), of_x));
  changed = other;  // others in the same place
  CHECK(same_bits(run(w, changed, tokens, false), of_other));
  // A copy is used if there is one: after a repetition that was none, results are those of the copy.
  changed = x;
  CHECK(same_bits(run(w, changed, tokens, true), of_other));
  // A product with quantised weights has used the scratch in between.
  const Inputs quants(amx(), Format::q4, x, cols, tokens);
  std::vector<float> y(size_t(rows * tokens));
  MatmulArgs args = matmul_args(q4.view, quants, tokens, y.data());
  args.tuning.amx_from = 1;
  CHECK(same_bits(run(w, x, tokens, false), of_x));
  amx().matmul[int(Format::q4)](args);
  args.repeats_x = true;
  amx().matmul[int(Format::q4)](args);
  CHECK(same_bits(run(w, x, tokens, true), of_x));
}

// Activations that were split before, for all rows and threads.
void split_activations_give_the_same_bits() {
  const int64_t shapes[][2] = {{1, 1},     {31, 5},   {70, 1},   {70, 50},   {192, 129},
                               {200, 145}, {1100, 1}, {300, 16}, {5000, 50}, {5000, 1}};  // columns, tokens
  for (const Format format : kFloatsOnTiles) {
    for (const auto& [cols, tokens] : shapes) {
      const int64_t rows = cols > 1000 ? 33 : 53;
      const Weights w = Weights::random(format, rows, cols, 31);
      const std::vector<float> x = normal(tokens * cols, 32);
      const std::vector<float> all = multiply_some(w.view, x, 0, rows, 0, tokens);
      const int64_t bytes = split_bytes(cols, tokens);
      const std::unique_ptr<uint8_t[], FreeMemory> split(
          static_cast<uint8_t*>(std::aligned_alloc(64, size_t(round_up(bytes, 64)))));
      std::memset(split.get(), 0xFF, size_t(bytes));
      for (int64_t tile = 0; tile * kSplitTokens < tokens; ++tile) {
        for (int64_t begin = 0; begin < cols; begin += 64) {
          amx().split_activations(
              {x.data(), cols, tokens, cols, tile, begin, std::min(begin + 64, cols), split.get()});
        }
      }
      for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, rows}, {16, 33}, {5, 8}}) {
        CHECK(same_bits(multiply_some(w.view, x, begin, end, 0, tokens, false, split.get()),
                        part_of(all, rows, begin, end, 0, tokens)));
      }
    }
  }
}

// Operations whose products have weights of several formats: a token alone, and many on three threads.
void operations_on_tiles_have_the_same_bits_on_any_threads() {
  constexpr int64_t kTokens = 150, kHidden = 192, kWidth = 96;
  Runtime one(1, std::nullopt, amx()), three(3, std::nullopt, amx()),
      other(1, std::nullopt, kernel_table("avx512"));
  const std::vector<float> x = normal(kTokens * kHidden, 33);
  const Format orders[][3] = {{Format::bf16, Format::f8, Format::bf16},
                              {Format::bf16, Format::q4, Format::f8},
                              {Format::q8, Format::bf16, Format::f32},
                              {Format::f8, Format::f8, Format::f8}};
  for (const auto& [a, b, c] : orders) {
    const Weights first = Weights::random(a, kWidth, kHidden, 34, 1),
                  second = Weights::random(b, kWidth, kHidden, 35),
                  third = Weights::random(c, kHidden, kWidth, 36),
                  fourth = Weights::random(c, 330, kHidden, 37);
    const auto products = [&](Runtime& runtime, const float* from, int64_t tokens) {
      const int64_t rows = 2 * kWidth + 330;
      std::vector<float> y(size_t(tokens * rows));
      matmul(runtime,
             {{first.view, y.data()},
              {second.view, y.data() + tokens * kWidth},
              {fourth.view, y.data() + tokens * 2 * kWidth}},
             from, tokens);
      return y;
    };
    const std::vector<float> together = products(one, x.data(), kTokens);
    CHECK(same_bits(products(three, x.data(), kTokens), together));
    CHECK(relative_error(together, products(other, x.data(), kTokens)) <
          1e-3);  // 8-bit activations are rounded
    for (const int64_t token : {0, 77, 149}) {
      const std::vector<float> alone = products(three, x.data() + token * kHidden, 1);
      std::vector<float> expected = part_of(together, kWidth, 0, kWidth, token, 1);
      for (const auto& [at, rows] : {std::pair<int64_t, int64_t>{kWidth, kWidth}, {2 * kWidth, 330}}) {
        const auto from = together.begin() + kTokens * at + token * rows;
        expected.insert(expected.end(), from, from + rows);
      }
      CHECK(same_bits(alone, expected));
    }
    const std::vector<ExpertView> experts(3, ExpertView{first.view, second.view, third.view, {}});
    const auto feed_forward = [&](Runtime& runtime, int64_t begin, int64_t count,
                                  std::vector<int32_t> starts) {
      std::vector<int32_t> token, row;
      for (int32_t i = 0; i < count; ++i) {
        token.push_back(int32_t(begin) + (count == kTokens ? i * 7 % int32_t(count) : i));
        row.push_back(token.back() - int32_t(begin));
      }
      std::vector<float> out(size_t(count * kHidden), NAN);
      swiglu_experts(runtime, experts, {}, x.data(), kTokens, {starts.data(), token.data(), row.data()},
                     out.data());
      return out;
    };
    const std::vector<float> outputs = feed_forward(one, 0, kTokens, {0, 130, 130, kTokens});
    CHECK(same_bits(feed_forward(three, 0, kTokens, {0, 5, 60, kTokens}), outputs));
    CHECK(relative_error(outputs, feed_forward(other, 0, kTokens, {0, 5, 60, kTokens})) < 1e-3);
    for (const int32_t count : {1, 3}) {
      CHECK(same_bits(feed_forward(three, 41, count, {0, 0, 1, count}),
                      part_of(outputs, kHidden, 0, kHidden, 41, count)));
    }
  }
}

// Memory whose last byte is the last of a mapping.
class EndOfMapping {
 public:
  explicit EndOfMapping(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), usable = round_up(bytes, page);
    mapped_ = size_t(usable + page);
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(base_ != MAP_FAILED && mprotect(base_ + usable, size_t(page), PROT_NONE) == 0);
    data_ = base_ + usable - bytes;
  }
  ~EndOfMapping() { munmap(base_, mapped_); }
  EndOfMapping(const EndOfMapping&) = delete;
  EndOfMapping& operator=(const EndOfMapping&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t *base_, *data_;
  size_t mapped_;
};

// Weights, activations and outputs end where their memory does; before and after are numbers that would turn
// sums into NaN.
void nothing_beyond_the_matrix_is_read() {
  for (const Format format : kFloatsOnTiles) {
    for (const int64_t cols : {1, 31, 32, 33, 64, 129, 530}) {
      for (const int64_t rows : {1, 15, 16, 17, 32, 33}) {
        for (const int64_t tokens : {1, 5, 33}) {
          const int64_t bytes = matrix_bytes(format, rows, cols);
          const Weights w = Weights::random(format, rows, cols, 21);
          const std::vector<float> x = normal(tokens * cols, 22);
          const std::vector<float> expected = multiply_some(w.view, x, 0, rows, 0, tokens);
          const EndOfMapping matrix(bytes + 256), inputs(tokens * cols * 4), outputs(tokens * rows * 4);
          std::memset(matrix.data(), 0xFF, 256);  // NaN, in both formats
          uint8_t* place = matrix.data() + 256;
          std::memcpy(place, w.view.data, size_t(bytes));
          std::memcpy(inputs.data(), x.data(), x.size() * 4);
          std::memset(product_scratch() + sizeof(ProductCounts), 0xFF,
                      size_t(kSplitScratchBytes) - sizeof(ProductCounts));
          MatmulArgs args = {};
          args.weights = place;
          args.cols = cols;
          args.row_end = rows;
          args.x = inputs.data();
          args.x_stride = cols * 4;
          args.y = reinterpret_cast<float*>(outputs.data());
          args.y_stride = rows;
          args.num_tokens = tokens;
          args.scratch = product_scratch();
          amx().matmul[int(format)](args);
          CHECK(std::memcmp(outputs.data(), expected.data(), expected.size() * 4) == 0);
        }
      }
    }
  }
}

void every_code_of_fp8_is_exact() {
  // Each row holds one code; NaN codes are refused when a matrix is brought.
  for (const int64_t cols : {1, 45}) {
    for (const int64_t place : {int64_t{0}, cols - 1}) {
      constexpr int64_t kRows = 256;
      std::vector<uint8_t> codes(size_t(kRows * cols), 0);
      for (int64_t row = 0; row < kRows; ++row)
        codes[size_t(row * cols + place)] = row % 128 == 127 ? 0 : uint8_t(row);
      const Weights w(Format::f8, codes, std::vector<float>{0.75f, 3.0f}, kRows, cols, 3);
      for (const int64_t tokens : {1, 3}) {
        const std::vector<float> x(size_t(tokens * cols), 1.0f);
        const std::vector<float> y = multiply_some(w.view, x, 0, kRows, 0, tokens);
        for (int64_t i = 0; i < tokens * kRows; ++i) {
          const int64_t row = i % kRows;
          const float scale = row < 128 ? 0.75f : 3.0f;
          CHECK_EQUAL(y[size_t(i)], scale * float_from_f8(codes[size_t(row * cols + place)]));
        }
      }
    }
  }
}

enum class Kind { number, infinity, minus_infinity, nan };
Kind kind_of(float value) {
  if (std::isnan(value)) return Kind::nan;
  return value == INFINITY ? Kind::infinity : value == -INFINITY ? Kind::minus_infinity : Kind::number;
}

// An activation that is infinite or NaN gives what it gives in float32. A weight makes its row NaN or
// infinite.
void what_is_no_number_stays_so() {
  const int64_t rows = 40, cols = 170;
  for (const Format format : kFloatsOnTiles) {
    const Weights w = Weights::random(format, rows, cols, 23);
    for (const int64_t tokens : {1, 20}) {
      for (const float special : {INFINITY, -INFINITY, NAN}) {
        for (const int64_t col : {0, 40, 169}) {
          std::vector<float> x = normal(tokens * cols, 24);
          const int64_t token = tokens / 2;
          x[size_t(token * cols + col)] = special;
          const std::vector<float> y = multiply_some(w.view, x, 0, rows, 0, tokens);
          const std::vector<float> expected = multiply(plain(), w.view, x, tokens);
          for (size_t i = 0; i < y.size(); ++i) CHECK(kind_of(y[i]) == kind_of(expected[i]));
          CHECK(kind_of(y[size_t(token * rows)]) != Kind::number);
        }
      }
    }
  }
  for (const uint16_t bits :
       {uint16_t{0x7F80}, uint16_t{0xFF80}, uint16_t{0x7FC1}}) {  // infinities and NaN in bfloat16
    for (const int64_t tokens : {1, 20}) {
      const Weights w = Weights::random(Format::bf16, rows, cols, 25);
      std::memcpy(w.bytes.get() + (17 * cols + 169) * 2, &bits, 2);
      const std::vector<float> x = normal(tokens * cols, 26);
      const std::vector<float> y = multiply_some(w.view, x, 0, rows, 0, tokens);
      for (int64_t i = 0; i < tokens * rows; ++i) {
        CHECK_EQUAL(kind_of(y[size_t(i)]) == Kind::number, i % rows != 17);
      }
    }
  }
  // The largest numbers of float32 round to an infinity in bfloat16.
  const Weights one(Format::bf16, std::vector<float>{0.5f}, 1, 1);
  CHECK(kind_of(multiply_some(one.view, {3.4e38f}, 0, 1, 0, 1)[0]) == Kind::infinity);
  CHECK_EQUAL(multiply_some(one.view, {0x1.fep127f}, 0, 1, 0, 1)[0], 0x1.fep126f);
  CHECK_EQUAL(multiply_some(one.view, {1e-40f}, 0, 1, 0, 1)[0], 0.0f);
}

void operations_of_floats_are_counted() {
  const auto& counts = *reinterpret_cast<const ProductCounts*>(product_scratch());
  const Weights w = Weights::random(Format::bf16, 33, 50, 27);
  const ProductCounts before = counts;
  multiply_some(w.view, normal(3 * 50, 28), 1, 33, 0, 3);
  CHECK_EQUAL(counts.in_tiles - before.in_tiles, 2u * 32 * 50 * 3);
  CHECK_EQUAL(counts.all - before.all, 2u * 32 * 50 * 3);
}

// A sequence in a KV cache. Every place that no token may see holds NaN.
struct Sequence {
  Sequence(int64_t length, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t block, KvFormat format)
      : num_blocks(length / block + 3),
        kv({KvShape::keys_values(kv_heads, dim, value_dim)}, {num_blocks, 1}, block, format) {
    for (int64_t i = 0; i < num_blocks; ++i) blocks.push_back(int32_t((i * 7 + 3) % num_blocks));
    if (num_blocks % 7 == 0) {
      for (int64_t i = 0; i < num_blocks; ++i) blocks[size_t(i)] = int32_t(num_blocks - 1 - i);
    }
    const int64_t all = num_blocks * block;
    const std::vector<float> garbage(size_t(all * kv_heads * std::max(dim, value_dim)), NAN);
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < all; ++i) slots.push_back(i);
    Runtime runtime(1);
    kv_write(runtime, kv.layer(0), garbage.data(), garbage.data(), slots.data(), all);
    slots.clear();
    for (int64_t i = 0; i < length; ++i) slots.push_back(blocks[size_t(i / block)] * block + i % block);
    const std::vector<float> keys = normal(length * kv_heads * dim, 5);
    const std::vector<float> values = normal(length * kv_heads * value_dim, 6);
    kv_write(runtime, kv.layer(0), keys.data(), values.data(), slots.data(), length);
  }

  // The outputs of tokens [begin, end), whose queries are rows of q from `begin` on.
  std::vector<float> attend(Runtime& runtime, const std::vector<float>& q, int64_t heads, int64_t begin,
                            int64_t end, Window window, const float* sinks) {
    const float* first = q.data() + begin * heads * kv.layer(0).head_dim;
    return attend_tokens(runtime, kv, blocks, first, heads, begin, end, window, sinks);
  }

  int64_t num_blocks;
  std::vector<int32_t> blocks;
  KvCache kv;
};

void attention_on_tiles_meets_the_reference_in_every_chunk() {
  const int64_t shapes[][5] = {// heads, KV heads, dim, dim of values, length
                               {4, 1, 7, 7, 75},    {8, 2, 16, 16, 300}, {5, 1, 40, 7, 300},
                               {8, 1, 64, 64, 530}, {9, 1, 33, 70, 75},  {32, 4, 130, 130, 75}};
  Runtime tiles(1, std::nullopt, kernel_table("amx")), reference(1, std::nullopt, plain());
  Runtime shared(3, std::nullopt, kernel_table("amx"));
  int number = 0;
  for (const auto& [heads, kv_heads, dim, value_dim, length] : shapes) {
    for (const int64_t block : {5, 16, 48}) {
      ++number;
      const Window window =
          std::vector<Window>{{}, {19}, {270}, {19, true}, {130, true}}[size_t(number / 2 % 5)];
      const KvFormat format =
          std::vector<KvFormat>{KvFormat::f32, KvFormat::f16, KvFormat::q8}[size_t(number) % 3];
      Sequence sequence(length, kv_heads, dim, value_dim, block, format);
      const std::vector<float> q = normal(length * heads * dim, 7);
      const std::vector<float> some = normal(heads, 8, 6.0f);  // below, among and above the scores
      const float* sinks = number % 2 == 0 ? some.data() : nullptr;
      const std::vector<float> expected = sequence.attend(reference, q, heads, 0, length, window, sinks);
      const std::vector<float> together = sequence.attend(tiles, q, heads, 0, length, window, sinks);
      CHECK(near(together, expected, 3e-4));
      CHECK(same_bits(sequence.attend(shared, q, heads, 0, length, window, sinks), together));
      const int64_t row = heads * value_dim;
      for (const int64_t chunk : {1, 3, 32, 70}) {
        const int64_t from = chunk < 30 && length > 100 ? length - 40 : 0;
        std::vector<float> pieces;
        for (int64_t begin = from; begin < length; begin += chunk) {
          const int64_t end = std::min(begin + chunk, length);
          const std::vector<float> piece = sequence.attend(tiles, q, heads, begin, end, window, sinks);
          pieces.insert(pieces.end(), piece.begin(), piece.end());
        }
        CHECK(same_bits(pieces, std::vector<float>(together.begin() + from * row, together.end())));
      }
    }
  }
}

// Decode and a chunk over several sections, whose states threads compute apart.
void sections_on_tiles_have_the_same_bits_on_any_threads() {
  const int64_t length = 2 * kSectionKeys + 77, heads = 8, dim = 32, count = 9;
  for (const KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::q8}) {
    Sequence sequence(length, 1, dim, dim, 48, format);
    const std::vector<float> q = normal(length * heads * dim, 7);
    Runtime alone(1, std::nullopt, kernel_table("amx")), three(3, std::nullopt, kernel_table("amx"));
    Runtime other(1, std::nullopt, kernel_table("avx512"));
    for (const Window window : {Window{}, Window{1500}, Window{1500, true}}) {
      const std::vector<float> all =
          sequence.attend(alone, q, heads, length - count, length, window, nullptr);
      CHECK(near(all, sequence.attend(other, q, heads, length - count, length, window, nullptr), 3e-4));
      CHECK(same_bits(sequence.attend(three, q, heads, length - count, length, window, nullptr), all));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = length - count + i;
        const std::vector<float> one = sequence.attend(three, q, heads, begin, begin + 1, window, nullptr);
        const auto from = all.begin() + i * heads * dim;
        CHECK(same_bits(one, std::vector<float>(from, from + heads * dim)));
      }
    }
  }
}

// The error is that of numbers of 16 bits, not that of bfloat16.
void attention_on_tiles_keeps_sixteen_bits() {
  const int64_t length = 200, heads = 4, dim = 64;
  Sequence sequence(length, 1, dim, dim, 16, KvFormat::f32);
  const std::vector<float> q = normal(length * heads * dim, 7);
  Runtime tiles(1, std::nullopt, kernel_table("amx")), reference(1, std::nullopt, plain());
  const std::vector<float> found = sequence.attend(tiles, q, heads, 0, length, {}, nullptr);
  const std::vector<float> expected = sequence.attend(reference, q, heads, 0, length, {}, nullptr);
  const double relative = relative_error(found, expected);
  printf("attention on tiles: relative error %.1e\n", relative);
  CHECK(relative < 4e-5);
}

#endif

}  // namespace
}  // namespace argosy::testing

int main() {
#if defined(__x86_64__)
  using namespace argosy::testing;
  if (!argosy::best_kernels().has_tiles) return skip("AMX");
  tiles_have_the_bits_of_avx512();
  many_tokens_are_multiplied_in_turns();
  rows_and_tokens_may_be_picked();
  the_largest_sums_are_exact();
  scales_of_every_kind_have_the_same_bits();
  repeated_activations_are_copied_once();
  tiles_are_used_from_the_tokens_on_that_the_tuning_says();
  floats_on_tiles_meet_float64();
  floats_on_tiles_have_one_order_of_sums();
  floats_on_tiles_take_turns();
  rows_and_tokens_of_floats_may_be_picked();
  repeated_activations_of_floats_are_copied_once();
  split_activations_give_the_same_bits();
  operations_on_tiles_have_the_same_bits_on_any_threads();
  nothing_beyond_the_matrix_is_read();
  every_code_of_fp8_is_exact();
  what_is_no_number_stays_so();
  operations_of_floats_are_counted();
  attention_on_tiles_meets_the_reference_in_every_chunk();
  sections_on_tiles_have_the_same_bits_on_any_threads();
  attention_on_tiles_keeps_sixteen_bits();
  return check_result();
#else
  return argosy::testing::skip("AMX");
#endif
}
