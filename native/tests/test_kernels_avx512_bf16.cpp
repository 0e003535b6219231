// The operations of encoders that round to bfloat16, with AVX-512 BF16 and on the tiles of AMX: equal to
// their formulas, and the same for a query in any lane.

#include <algorithm>
#include <cmath>
#include <iterator>

#include "kernels/encoder_args.h"
#include "ops/encoder.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

std::vector<float> rounded(std::vector<float> values) {
  for (float& value : values) value = float_from_bf16(bf16_from_float(value));
  return values;
}

// The attention of queries [begin, end) in double, with queries, keys and values rounded.
std::vector<float> attend_in_double(const Heads& heads, int64_t begin, int64_t end, float scale) {
  std::vector<float> query = heads.query;
  for (float& value : query) value *= scale * 1.44269504f;
  query = rounded(query);
  const std::vector<float> key = rounded(heads.key), value = rounded(heads.value);
  std::vector<float> out;
  for (int64_t q = begin; q < end; ++q) {
    std::vector<double> scores(size_t(heads.num_keys), 0.0), sums(size_t(heads.dim), 0.0);
    for (int64_t s = 0; s < heads.num_keys; ++s) {
      for (int64_t d = 0; d < heads.dim; ++d) {
        scores[size_t(s)] += double(query[size_t(q * Heads::kQueryStride + d)]) *
                             double(key[size_t(s * Heads::kKeyStride + d)]);
      }
    }
    const double most = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (int64_t s = 0; s < heads.num_keys; ++s) {
      const double weight = std::exp2(scores[size_t(s)] - most);
      sum += weight;
      for (int64_t d = 0; d < heads.dim; ++d) {
        sums[size_t(d)] += weight * double(value[size_t(s * Heads::kValueStride + d)]);
      }
    }
    for (const double of_dim : sums) out.push_back(float(of_dim / sum));
  }
  return out;
}

// Keys and values as attend_rounded takes them.
struct RoundedHead {
  RoundedHead(const KernelTable& table, const Heads& heads)
      : keys(new uint8_t[size_t(heads.num_keys * heads.dim * 2)]),
        values(new uint8_t[size_t(round_up(heads.num_keys, kRoundedKeys) * heads.dim * 2)]) {
    std::fill_n(values.get(), round_up(heads.num_keys, kRoundedKeys) * heads.dim * 2, uint8_t(0xFF));  // NaN
    for (int64_t s = 0; s < heads.num_keys; s += kRoundedKeys) {
      table.round_keys({
          .key = heads.key.data() + s * Heads::kKeyStride,
          .value = heads.value.data() + s * Heads::kValueStride,
          .key_stride = Heads::kKeyStride,
          .value_stride = Heads::kValueStride,
          .num_keys = std::min(heads.num_keys - s, kRoundedKeys),
          .dim = heads.dim,
          .keys = keys.get() + s * heads.dim * 2,
          .values = values.get() + s * heads.dim * 2,
      });
    }
  }

  std::vector<float> attend(const KernelTable& table, const Heads& heads, int64_t begin, int64_t end,
                            float scale) const {
    std::vector<float> out(size_t((end - begin) * heads.dim), NAN);
    const std::unique_ptr<float[]> scratch(new float[size_t(attend_rounded_scratch_floats(heads.dim))]);
    std::fill_n(scratch.get(), attend_rounded_scratch_floats(heads.dim), NAN);
    for (int64_t at = begin; at < end; at += kAttendQueries) {
      table.attend_rounded({
          .query = heads.query.data() + at * Heads::kQueryStride,
          .query_stride = Heads::kQueryStride,
          .num_queries = std::min(end - at, kAttendQueries),
          .keys = keys.get(),
          .values = values.get(),
          .num_keys = heads.num_keys,
          .dim = heads.dim,
          .scale = scale,
          .out = out.data() + (at - begin) * heads.dim,
          .out_stride = heads.dim,
          .scratch = scratch.get(),
      });
    }
    return out;
  }

  std::unique_ptr<uint8_t[]> keys, values;
};

// Sizes around a pair, a vector, a tile and a block of keys, and of dimensions; a vector and a panel of
// queries.
void rounded_attention_meets_its_formula_in_every_lane() {
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 2, 2},     {7, 5, 3},      {16, 17, 31},
                               {17, 95, 33}, {40, 96, 72},  {33, 97, 64},   {70, 191, 80},
                               {64, 192, 6}, {65, 193, 16}, {15, 300, 128}, {48, 289, 13}};
  for (const KernelTable* table : all_tables()) {
    if (table->attend_rounded == nullptr) continue;
    for (const auto& [num_queries, num_keys, dim] : shapes) {
      // Scores spread over less than one and over dozens: weights are all alike, or one takes nearly all.
      for (const float scale : {0.02f, 0.2f, 3.0f}) {
        const Heads heads(num_queries, num_keys, dim);
        const RoundedHead head(*table, heads);
        const std::vector<float> together = head.attend(*table, heads, 0, num_queries, scale);
        // A weight is rounded by at most 2^-9 of itself, and so is the sum that it is divided by. The errors
        // of many weights that are all alike cancel out; a key too many or too few would not.
        const double tolerance = scale < 0.1f ? 8e-3 / std::sqrt(double(num_keys)) : 4e-3;
        CHECK(near(together, attend_in_double(heads, 0, num_queries, scale), tolerance));
        std::vector<float> pieces;
        for (int64_t begin = 0; begin < num_queries; begin += 13) {
          const std::vector<float> piece =
              head.attend(*table, heads, begin, std::min(begin + 13, num_queries), scale);
          pieces.insert(pieces.end(), piece.begin(), piece.end());
        }
        CHECK(same_bits(pieces, together));
      }
    }
  }
}

// The weights of a query add up to one as they are multiplied, rounded.
void rounded_attention_keeps_a_constant_value() {
  for (const KernelTable* table : all_tables()) {
    if (table->attend_rounded == nullptr) continue;
    Heads heads(64, 500, 72);
    std::fill(heads.value.begin(), heads.value.end(), 1.25f);
    const std::vector<float> found = RoundedHead(*table, heads).attend(*table, heads, 0, 64, 0.2f);
    CHECK(near(found, std::vector<float>(found.size(), 1.25f), 1e-6));
  }
}

constexpr Finish kFinishes[] = {Finish::store,     Finish::add,        Finish::multiply, Finish::gelu_erf,
                                Finish::gelu_tanh, Finish::gelu_quick, Finish::silu};

float finished(Finish finish, double sum, double before) {
  switch (finish) {
    case Finish::store:
      return float(sum);
    case Finish::add:
      return float(before + sum);
    case Finish::multiply:
      return float(before * sum);
    case Finish::gelu_erf:
      return float(0.5 * sum * (1 + std::erf(sum / std::sqrt(2.0))));
    case Finish::gelu_tanh:
      return float(0.5 * sum * (1 + std::tanh(0.7978845608 * (sum + 0.044715 * sum * sum * sum))));
    case Finish::gelu_quick:
      return float(sum / (1 + std::exp(-1.702 * sum)));
    case Finish::silu:
      return float(sum / (1 + std::exp(-sum)));
  }
  return NAN;
}

// The memory of weights and rows ends with their last element, so that a sanitizer detects reads beyond it.
void rounded_products_stay_inside_their_rows() {
  for (const KernelTable* table : all_tables()) {
    if (table->linear_panel == nullptr) continue;
    size_t finishes = 0;
    for (const int64_t cols : kSizes) {
      if (cols == 0) continue;
      for (const int64_t num_tokens : {1, 15, 16, 17, 64}) {
        for (const int64_t num_rows : {1, 6, 13, 40, 48}) {
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
          // Several finishes at each size, all of them over the sizes.
          const Finish finish = kFinishes[finishes++ % std::size(kFinishes)];
          const std::vector<float> before = normal(num_tokens * num_rows, 4);
          std::vector<float> found = before;
          table->linear_panel({
              .weights = weights.view.data,
              .cols = cols,
              .row_begin = 0,
              .row_end = num_rows,
              .panel = panel.get(),
              .num_tokens = num_tokens,
              .bias = bias.data(),
              .finish = finish,
              .y = found.data(),
              .y_stride = num_rows,
          });
          std::vector<float> expected = multiply(plain(), weights.view, rounded(x), num_tokens);
          for (size_t i = 0; i < expected.size(); ++i) {
            expected[i] =
                finished(finish, double(expected[i] + bias[i % size_t(num_rows)]), double(before[i]));
          }
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
  if (argosy::best_kernels().attend_rounded == nullptr) return skip("AVX-512 with BF16");
  rounded_attention_meets_its_formula_in_every_lane();
  rounded_attention_keeps_a_constant_value();
  rounded_products_stay_inside_their_rows();
  return check_result();
}
