// The operations of encoders: equal to the reference, and the same for a query in any lane.

#include <algorithm>
#include <cmath>

#include "kernels/encoder_args.h"
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

// The attention of queries [begin, end).
std::vector<float> attend(const KernelTable& table, const Heads& heads, int64_t begin, int64_t end) {
  std::vector<float> out(size_t((end - begin) * heads.dim), NAN);
  const std::unique_ptr<float[]> scratch(new float[size_t(attend_scratch_floats(heads.dim))]);
  std::fill_n(scratch.get(), attend_scratch_floats(heads.dim), NAN);
  for (int64_t at = begin; at < end; at += kAttendQueries) {
    table.attend({
        .query = heads.query.data() + at * Heads::kQueryStride,
        .key = heads.key.data(),
        .value = heads.value.data(),
        .query_stride = Heads::kQueryStride,
        .key_stride = Heads::kKeyStride,
        .value_stride = Heads::kValueStride,
        .num_queries = std::min(end - at, kAttendQueries),
        .num_keys = heads.num_keys,
        .dim = heads.dim,
        .scale = 0.2f,
        .out = out.data() + (at - begin) * heads.dim,
        .out_stride = heads.dim,
        .scratch = scratch.get(),
    });
  }
  return out;
}

void attention_of_encoders_meets_the_reference_in_every_lane() {
  const int64_t shapes[][3] = {{1, 1, 1},    {7, 5, 3},     {16, 48, 64},
                               {40, 49, 72}, {70, 150, 80}, {64, 95, 128}};
  for (const KernelTable* table : all_tables()) {
    for (const auto& [num_queries, num_keys, dim] : shapes) {
      const Heads heads(num_queries, num_keys, dim);
      const std::vector<float> together = attend(*table, heads, 0, num_queries);
      CHECK(near(together, attend(plain(), heads, 0, num_queries), 4e-6));
      std::vector<float> pieces;
      for (int64_t begin = 0; begin < num_queries; begin += 13) {
        const std::vector<float> piece = attend(*table, heads, begin, std::min(begin + 13, num_queries));
        pieces.insert(pieces.end(), piece.begin(), piece.end());
      }
      CHECK(same_bits(pieces, together));
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
  return check_result();
}
