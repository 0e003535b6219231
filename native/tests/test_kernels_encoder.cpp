// The operations of encoders: equal to the reference, and the same for a query in any lane.

#include <algorithm>

#include "ops/encoder.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

void layer_norms_meet_the_reference() {
  for (const KernelTable* table : all_tables()) {
    for (const int64_t cols : kSizes) {
      if (cols == 0) continue;
      const std::vector<float> x = normal(cols, 1), weight = normal(cols, 2), bias = normal(cols, 3);
      for (const float* plus : {bias.data(), static_cast<const float*>(nullptr)}) {
        std::vector<float> expected(x.size()), found = x;
        plain().layer_norm(x.data(), weight.data(), plus, cols, 1e-6f, expected.data());
        table->layer_norm(found.data(), weight.data(), plus, cols, 1e-6f, found.data());
        CHECK(near(found, expected, 4e-6));
      }
    }
  }
}

void activations_meet_the_reference_in_every_lane() {
  std::vector<float> x;
  for (float value = -15.0f; value < 15.0f; value += 0.0137f) x.push_back(value);
  for (const KernelTable* table : all_tables()) {
    for (const Gelu kind : {Gelu::erf, Gelu::tanh, Gelu::quick}) {
      std::vector<float> expected = x, found = x;
      plain().gelu(kind, int64_t(x.size()), expected.data());
      table->gelu(kind, int64_t(x.size()), found.data());
      CHECK(near(found, expected, 1e-6));
      for (int64_t n = 0; n < 40; ++n) {
        std::vector<float> first(x.begin() + 700, x.begin() + 700 + n);
        table->gelu(kind, n, first.data());
        CHECK(same_bits(first, {found.begin() + 700, found.begin() + 700 + n}));
      }
    }
    std::vector<float> expected = x, found = x;
    plain().silu(int64_t(x.size()), expected.data());
    table->silu(int64_t(x.size()), found.data());
    CHECK(near(found, expected, 1e-6));
  }
}

struct Heads {
  static constexpr int64_t kQueryStride = 300, kKeyStride = 250, kValueStride = 275;

  Heads(int64_t count, int64_t keys, int64_t head_dim)
      : num_queries(count),
        num_keys(keys),
        dim(head_dim),
        query(normal(count * kQueryStride, 1)),
        key(normal(keys * kKeyStride, 2)),
        value(normal(keys * kValueStride, 3)) {}

  // Queries [begin, end).
  std::vector<float> attend(const KernelTable& table, int64_t begin, int64_t end) const {
    std::vector<float> out(size_t((end - begin) * dim), NAN);
    const std::unique_ptr<float[]> scratch(new float[size_t(attend_scratch_floats(dim))]);
    std::fill_n(scratch.get(), attend_scratch_floats(dim), NAN);
    for (int64_t at = begin; at < end; at += kAttendQueries) {
      table.attend({
          .query = query.data() + at * kQueryStride,
          .key = key.data(),
          .value = value.data(),
          .query_stride = kQueryStride,
          .key_stride = kKeyStride,
          .value_stride = kValueStride,
          .num_queries = std::min(end - at, kAttendQueries),
          .num_keys = num_keys,
          .dim = dim,
          .scale = 0.2f,
          .out = out.data() + (at - begin) * dim,
          .out_stride = dim,
          .scratch = scratch.get(),
      });
    }
    return out;
  }

  int64_t num_queries, num_keys, dim;
  std::vector<float> query, key, value;
};

void attention_of_encoders_meets_the_reference_in_every_lane() {
  const int64_t shapes[][3] = {{1, 1, 1},    {7, 5, 3},     {16, 48, 64},
                               {40, 49, 72}, {70, 150, 80}, {64, 95, 128}};
  for (const KernelTable* table : all_tables()) {
    for (const auto& [num_queries, num_keys, dim] : shapes) {
      const Heads heads(num_queries, num_keys, dim);
      const std::vector<float> together = heads.attend(*table, 0, num_queries);
      CHECK(near(together, heads.attend(plain(), 0, num_queries), 4e-6));
      std::vector<float> pieces;
      for (int64_t begin = 0; begin < num_queries; begin += 13) {
        const std::vector<float> piece = heads.attend(*table, begin, std::min(begin + 13, num_queries));
        pieces.insert(pieces.end(), piece.begin(), piece.end());
      }
      CHECK(same_bits(pieces, together));
    }
  }
}

// The memory of weights and rows ends with their last element, so that a sanitizer detects reads beyond it.
void rounded_products_stay_inside_their_rows() {
  for (const KernelTable* table : all_tables()) {
    if (table->linear_panel == nullptr) continue;
    for (const int64_t cols : kSizes) {
      if (cols == 0) continue;
      for (const int64_t num_tokens : {1, 15, 16, 17, 64}) {
        for (const int64_t num_rows : {1, 6, 13, 48}) {
          const std::vector<float> x = normal(num_tokens * cols, 1), bias = normal(num_rows, 2);
          const Weights weights = Weights::random(Format::bf16, num_rows, cols, 3, 1);
          const std::unique_ptr<uint8_t[]> panel(new uint8_t[size_t(token_panel_bytes(cols))]);
          std::fill_n(panel.get(), token_panel_bytes(cols), uint8_t(0xFF));  // NaN
          for (int64_t token = 0; token < num_tokens; token += kRoundedTokens) {
            table->round_to_panel({
                .x = x.data() + token * cols,
                .x_stride = cols,
                .num_tokens = std::min(num_tokens - token, kRoundedTokens),
                .cols = cols,
                .panel = panel.get() + token * 4,
            });
          }
          std::vector<float> found(size_t(num_tokens * num_rows), NAN);
          table->linear_panel({
              .weights = weights.view.data,
              .cols = cols,
              .row_begin = 0,
              .row_end = num_rows,
              .panel = panel.get(),
              .num_tokens = num_tokens,
              .bias = bias.data(),
              .y = found.data(),
              .y_stride = num_rows,
          });
          std::vector<float> rounded = x;
          for (float& value : rounded) value = float_from_bf16(bf16_from_float(value));
          std::vector<float> expected = multiply(plain(), weights.view, rounded, num_tokens);
          for (size_t i = 0; i < expected.size(); ++i) expected[i] += bias[i % size_t(num_rows)];
          CHECK(near(found, expected, 1e-5));
        }
      }
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  layer_norms_meet_the_reference();
  activations_meet_the_reference_in_every_lane();
  attention_of_encoders_meets_the_reference_in_every_lane();
  rounded_products_stay_inside_their_rows();
  return check_result();
}
