// Products on the tiles of AMX: the bits of AVX-512. On a processor without AMX, there is nothing to check;
// `make test-emulated` runs this file on an emulated one.

#include <cstdlib>

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
    const bool has_kernel =
        tables_with_tiles().matmul[int(format)] != kAvx512Kernels.matmul[int(format)] && format != Format::f8;
    CHECK_EQUAL(has_kernel, has_amx_product(format));
    if (!has_kernel) continue;
    ++formats;
    // One group, a part of a block of groups, several blocks with a part.
    for (const int64_t size : {1, 100, 1100}) {
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
  CHECK_EQUAL(formats, 12);
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

#endif

}  // namespace
}  // namespace argosy::testing

int main() {
#if defined(__x86_64__)
  using namespace argosy::testing;
  if (argosy::best_kernels().product_scratch_bytes == 0) {
    printf("this processor has no AMX, or the system refuses it: nothing was checked\n");
    return 0;
  }
  tiles_have_the_bits_of_avx512();
  many_tokens_are_multiplied_in_turns();
  rows_and_tokens_may_be_picked();
  the_largest_sums_are_exact();
  scales_of_every_kind_have_the_same_bits();
  tiles_are_used_from_the_tokens_on_that_the_tuning_says();
#endif
  return argosy::testing::check_result();
}
