// Products on the tiles of AMX have the bits of AVX-512, and attention on tiles meets the reference. On a
// processor without AMX, there is nothing to check; `make test-emulated` runs this file on an emulated one.

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

// A sequence in a KV cache. Every place that no token may see holds NaN.
struct Sequence {
  Sequence(int64_t length, int64_t kv_heads, int64_t dim, int64_t block, KvFormat format)
      : num_blocks(length / block + 3),
        kv({KvShape::keys_values(kv_heads, dim)}, {num_blocks, 1}, block, format) {
    for (int64_t i = 0; i < num_blocks; ++i) blocks.push_back(int32_t((i * 7 + 3) % num_blocks));
    if (num_blocks % 7 == 0) {
      for (int64_t i = 0; i < num_blocks; ++i) blocks[size_t(i)] = int32_t(num_blocks - 1 - i);
    }
    const int64_t all = num_blocks * block;
    const std::vector<float> garbage(size_t(all * kv_heads * dim), NAN);
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < all; ++i) slots.push_back(i);
    Runtime runtime(1);
    kv_write(runtime, kv.layer(0), garbage.data(), garbage.data(), slots.data(), all);
    slots.clear();
    for (int64_t i = 0; i < length; ++i) slots.push_back(blocks[size_t(i / block)] * block + i % block);
    const std::vector<float> keys = normal(length * kv_heads * dim, 5);
    const std::vector<float> values = normal(length * kv_heads * dim, 6);
    kv_write(runtime, kv.layer(0), keys.data(), values.data(), slots.data(), length);
  }

  // The outputs of tokens [begin, end), whose queries are rows of q from `begin` on.
  std::vector<float> attend(Runtime& runtime, const std::vector<float>& q, int64_t heads, int64_t begin,
                            int64_t end, int64_t window, const float* sinks) {
    const float* first = q.data() + begin * heads * kv.layer(0).head_dim;
    return attend_tokens(runtime, kv, blocks, first, heads, begin, end, window, sinks);
  }

  int64_t num_blocks;
  std::vector<int32_t> blocks;
  KvCache kv;
};

void attention_on_tiles_meets_the_reference_in_every_chunk() {
  const int64_t shapes[][4] = {
      // heads, KV heads, dim, length
      {4, 1, 7, 75}, {8, 2, 16, 300}, {5, 1, 40, 300}, {8, 1, 64, 530}, {9, 1, 33, 75}, {32, 4, 130, 75}};
  Runtime tiles(1, std::nullopt, kernel_table("amx")), reference(1, std::nullopt, plain());
  Runtime shared(3, std::nullopt, kernel_table("amx"));
  int number = 0;
  for (const auto& [heads, kv_heads, dim, length] : shapes) {
    for (const int64_t block : {5, 16, 48}) {
      ++number;
      const int64_t window = std::vector<int64_t>{0, 19, 270}[size_t(number / 2 % 3)];
      const KvFormat format =
          std::vector<KvFormat>{KvFormat::f32, KvFormat::f16, KvFormat::q8}[size_t(number) % 3];
      Sequence sequence(length, kv_heads, dim, block, format);
      const std::vector<float> q = normal(length * heads * dim, 7);
      const std::vector<float> some = normal(heads, 8, 6.0f);  // below, among and above the scores
      const float* sinks = number % 2 == 0 ? some.data() : nullptr;
      const std::vector<float> expected = sequence.attend(reference, q, heads, 0, length, window, sinks);
      const std::vector<float> together = sequence.attend(tiles, q, heads, 0, length, window, sinks);
      CHECK(near(together, expected, 3e-4));
      CHECK(same_bits(sequence.attend(shared, q, heads, 0, length, window, sinks), together));
      const int64_t row = heads * dim;
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
    Sequence sequence(length, 1, dim, 48, format);
    const std::vector<float> q = normal(length * heads * dim, 7);
    Runtime alone(1, std::nullopt, kernel_table("amx")), three(3, std::nullopt, kernel_table("amx"));
    Runtime other(1, std::nullopt, kernel_table("avx512"));
    for (const int64_t window : {int64_t{0}, int64_t{1500}}) {
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
  Sequence sequence(length, 1, dim, 16, KvFormat::f32);
  const std::vector<float> q = normal(length * heads * dim, 7);
  Runtime tiles(1, std::nullopt, kernel_table("amx")), reference(1, std::nullopt, plain());
  const std::vector<float> found = sequence.attend(tiles, q, heads, 0, length, 0, nullptr);
  const std::vector<float> expected = sequence.attend(reference, q, heads, 0, length, 0, nullptr);
  double error = 0, size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error += std::pow(double(found[i]) - double(expected[i]), 2);
    size += std::pow(double(expected[i]), 2);
  }
  const double relative = std::sqrt(error / size);
  printf("attention on tiles: relative error %.1e\n", relative);
  CHECK(relative < 4e-5);
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
  repeated_activations_are_copied_once();
  tiles_are_used_from_the_tokens_on_that_the_tuning_says();
  attention_on_tiles_meets_the_reference_in_every_chunk();
  sections_on_tiles_have_the_same_bits_on_any_threads();
  attention_on_tiles_keeps_sixteen_bits();
#endif
  return argosy::testing::check_result();
}
