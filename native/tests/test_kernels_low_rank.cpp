// Low-rank pairs: the same bits as the reference for every instruction set, for a token alone and among
// others, on any number of threads, and nothing is written but what changes. Experts with pairs have the bits
// of their operations one after another.

#include <algorithm>
#include <span>

#include "kernels/low_rank_args.h"
#include "kernels/swiglu_args.h"
#include "ops/low_rank.h"
#include "ops/swiglu.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

constexpr Format kPairFormats[] = {Format::f32, Format::f16, Format::bf16};

// One row of `up` for each rank, at an odd address; and t, y and their sums.
void low_rank_sums_have_the_bits_of_the_reference_at_every_size() {
  for (const KernelTable* table : all_tables()) {
    for (const Format format : kPairFormats) {
      for (const int64_t rank : {0, 1, 2, 7, 16, 65}) {
        for (const int64_t rows : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300}) {
          const int64_t most = rank == 16 ? 9 : 5;
          const Weights up(format, normal(rank * rows, 1), rank, rows, 3);
          const std::vector<float> t = normal(most * (rank + 1), 2), y = normal((most + 2) * (rows + 3), 3);
          const std::vector<int32_t> index = {4, 0, 6, 2, 1, 3, 5, 8, 7};
          for (const int64_t tokens : {int64_t(0), int64_t(1), int64_t(3), most}) {
            for (const bool is_indexed : {false, true}) {
              const int64_t begin = rows / 3;
              const auto added = [&](const KernelTable& by, int64_t first, int64_t count,
                                     std::vector<float> to) {
                LowRankArgs args = {format,  up.view.data, rows,    rank,     begin,   rows,
                                    nullptr, rank + 1,     nullptr, rows + 3, nullptr, count};
                args.t = t.data() + first * args.t_stride;
                args.y = to.data() + 1 + begin + (is_indexed ? 0 : first * args.y_stride);
                if (is_indexed) args.y_index = index.data() + first;
                by.add_low_rank(args);
                return to;
              };
              const std::vector<float> expected = added(plain(), 0, tokens, y);
              CHECK(same_bits(added(*table, 0, tokens, y), expected));
              std::vector<float> alone = y;
              for (int64_t i = 0; i < tokens; ++i) alone = added(*table, i, 1, alone);
              CHECK(same_bits(alone, expected));
            }
          }
        }
      }
    }
  }
}

void the_reference_follows_the_formula() {
  constexpr int64_t kRank = 5, kRows = 11;
  for (const Format format : kPairFormats) {
    const Weights up(format, normal(kRank * kRows, 1), kRank, kRows, 1);
    std::vector<float> values(size_t(kRank * kRows));
    dequantize(up.view, values.data());
    const std::vector<float> t = normal(kRank, 2), y = normal(kRows, 3);
    std::vector<float> found = y;
    plain().add_low_rank(
        {format, up.view.data, kRows, kRank, 0, kRows, t.data(), kRank, found.data(), kRows, nullptr, 1});
    for (int64_t row = 0; row < kRows; ++row) {
      double sum = double(y[size_t(row)]);
      for (int64_t i = 0; i < kRank; ++i)
        sum += double(t[size_t(i)]) * double(values[size_t(i * kRows + row)]);
      CHECK(std::fabs(double(found[size_t(row)]) - sum) <= 1e-6 * (1 + std::fabs(sum)));
    }
  }
}

// Two pairs for some tokens each: one reads and changes rows by index.
struct Case {
  static constexpr int64_t kTokens = 101, kCols = 70, kRows = 300, kStride = 330;

  Case(Format format, int64_t rank)
      : down(format, normal(rank * kCols, 1), rank, kCols, 1),
        up(format, normal(rank * kRows, 2), rank, kRows, 3),
        x(normal(kTokens * kCols, 4)),
        factors(normal(kRows, 6, 0.5f)) {
    for (int32_t i = 0; i < kTokens; ++i) {
      from.push_back(int32_t(i * 7 % kTokens));
      to.push_back(int32_t(i * 5 % kTokens));
    }
  }

  // The pair beside tokens [first, first + count) of the lists.
  LowRankProduct product(int64_t first, int64_t count, float* t, float* y) const {
    const LowRank pair = {down.view.format, down.view.data, up.view.data,
                          down.view.rows,   0.75f,          factors.data()};
    return {pair,
            kCols,
            kRows,
            count,
            x.data(),
            kCols,
            from.data() + first,
            t + first * pair.rank,
            y + 9,
            kStride,
            to.data() + first};
  }

  std::vector<float> add(Runtime& runtime, const std::vector<int64_t>& cuts) const {
    std::vector<float> y = normal(kTokens * kStride, 5);
    std::vector<float> t(size_t(kTokens * down.view.rows), NAN);
    std::vector<LowRankProduct> products;
    for (size_t i = 0; i + 1 < cuts.size(); ++i)
      products.push_back(product(cuts[i], cuts[i + 1] - cuts[i], t.data(), y.data()));
    low_rank_down(runtime, products);
    low_rank_up(runtime, products);
    return y;
  }

  Weights down, up;
  std::vector<float> x, factors;
  std::vector<int32_t> from, to;
};

void pairs_have_the_same_bits_alone_in_a_batch_and_on_threads() {
  for (const KernelTable* table : all_tables()) {
    Runtime one(1, std::nullopt, *table), three(3, std::nullopt, *table);
    for (const Format format : kPairFormats) {
      for (const int64_t rank : {0, 1, 8, 33, 128}) {
        const Case pairs(format, rank);
        const std::vector<float> together = pairs.add(one, {0, Case::kTokens});
        CHECK(same_bits(pairs.add(three, {0, Case::kTokens}), together));
        CHECK(same_bits(pairs.add(three, {0, 1, 1, 40, 100, Case::kTokens}), together));
        std::vector<int64_t> each;
        for (int64_t i = 0; i <= Case::kTokens; ++i) each.push_back(i);
        CHECK(same_bits(pairs.add(one, each), together));
        if (rank == 0) CHECK(same_bits(together, normal(Case::kTokens * Case::kStride, 5)));
      }
    }
  }
}

void pairs_follow_the_formula() {
  for (const KernelTable* table : all_tables()) {
    Runtime two(2, std::nullopt, *table);
    for (const Format format : kPairFormats) {
      constexpr int64_t kRank = 20;
      const Case pairs(format, kRank);
      std::vector<float> down(size_t(kRank * Case::kCols)), up(size_t(kRank * Case::kRows));
      dequantize(pairs.down.view, down.data());
      dequantize(pairs.up.view, up.data());
      const std::vector<float> before = normal(Case::kTokens * Case::kStride, 5);
      const std::vector<float> found = pairs.add(two, {0, 30, Case::kTokens});
      std::vector<double> expected(before.begin(), before.end());
      for (size_t i = 0; i < size_t(Case::kTokens); ++i) {
        const float* x = pairs.x.data() + pairs.from[i] * Case::kCols;
        double* y = expected.data() + 9 + pairs.to[i] * Case::kStride;
        for (int64_t j = 0; j < kRank; ++j) {
          double t = 0;
          for (int64_t col = 0; col < Case::kCols; ++col)
            t += double(down[size_t(j * Case::kCols + col)]) * double(x[col]);
          for (int64_t row = 0; row < Case::kRows; ++row)
            y[row] += 0.75 * t * double(up[size_t(j * Case::kRows + row)]);
        }
        for (int64_t row = 0; row < Case::kRows; ++row) y[row] *= double(pairs.factors[size_t(row)]);
      }
      // `amx` keeps 16 bits of activations.
      const double tolerance = std::string(table->name) == "amx" ? 1e-3 : 2e-5;
      bool is_near = true;
      for (size_t i = 0; i < found.size(); ++i)
        is_near &= std::fabs(double(found[i]) - expected[i]) <= tolerance * (1 + std::fabs(expected[i]));
      CHECK(is_near);
    }
  }
}

void squares_of_merged_rows_and_columns_follow_the_formula() {
  constexpr int64_t kRows = 29, kCols = 96, kRank = 5, kFirst = 3, kCount = 21;
  for (const Format format : {Format::f32, Format::bf16, Format::q8}) {
    const Weights matrix(format, normal(kRows * kCols, 1), kRows, kCols, 0);
    const std::vector<float> t = normal(kCount * kRank, 2), vectors = normal(kRank * kCols, 3);
    std::vector<float> values(size_t(kRows * kCols));
    dequantize(matrix.view, values.data());
    std::vector<double> of_rows(kCount, -1), of_columns(kCols, 7), rows(kCount, 0), columns(kCols, 7);
    merged_squares(matrix.view, kFirst, kCount, t.data(), vectors.data(), kRank, of_rows.data(), nullptr);
    merged_squares(matrix.view, kFirst, kCount, t.data(), vectors.data(), kRank, nullptr, of_columns.data());
    for (int64_t i = 0; i < kCount; ++i) {
      for (int64_t col = 0; col < kCols; ++col) {
        double sum = double(values[size_t((kFirst + i) * kCols + col)]);
        for (int64_t j = 0; j < kRank; ++j)
          sum += double(t[size_t(i * kRank + j)]) * double(vectors[size_t(j * kCols + col)]);
        rows[size_t(i)] += sum * sum;
        columns[size_t(col)] += sum * sum;
      }
    }
    bool is_near = true;
    for (size_t i = 0; i < size_t(kCount); ++i) is_near &= std::fabs(of_rows[i] - rows[i]) <= 2e-6 * rows[i];
    for (size_t i = 0; i < size_t(kCols); ++i)
      is_near &= std::fabs(of_columns[i] - columns[i]) <= 2e-6 * columns[i];
    CHECK(is_near);
  }
}

// Two sets of pairs for experts, of different ranks and formats; the second leaves up alone.
struct PairsOfExpert {
  PairsOfExpert(int64_t hidden, int64_t width, bool has_gate, int which, unsigned seed) {
    const Format format = kPairFormats[which == 0 ? 2 : 1];
    const int64_t rank = which == 0 ? 17 : 4;
    const auto pair = [&](int64_t cols, int64_t rows) {
      weights.push_back(Weights(format, normal(rank * cols, ++seed, 0.2f), rank, cols, 1));
      weights.push_back(Weights(format, normal(rank * rows, ++seed, 0.2f), rank, rows, 3));
      factors.push_back(normal(rows, ++seed));
      return LowRank{format, weights[weights.size() - 2].view.data,       weights.back().view.data, rank,
                     0.3f,   which == 0 ? nullptr : factors.back().data()};
    };
    if (has_gate) pairs.gate = pair(hidden, width);
    if (which == 0) pairs.up = pair(hidden, width);
    pairs.down = pair(width, hidden);
  }
  std::vector<Weights> weights;
  std::vector<std::vector<float>> factors;
  ExpertPairs pairs;
};

// y of some tokens [count][hidden] with the same pairs, operation by operation.
std::vector<float> composed(Runtime& runtime, const ExpertView& expert, const Activation& activation,
                            const std::vector<float>& x, const ExpertPairs* pairs) {
  const int64_t hidden = expert.up.cols, width = expert.up.rows, count = int64_t(x.size()) / hidden;
  const auto multiply_all = [&](const MatrixView& matrix, const std::vector<float>& from,
                                const LowRank* pair) {
    std::vector<float> y(size_t(count * matrix.rows));
    matmul(runtime, {{matrix, y.data()}}, from.data(), count);
    if (pair == nullptr) return y;
    std::vector<float> t(size_t(count * pair->rank));
    const LowRankProduct product = {*pair,   matrix.cols, matrix.rows, count,       from.data(), matrix.cols,
                                    nullptr, t.data(),    y.data(),    matrix.rows, nullptr};
    low_rank_down(runtime, {&product, 1});
    low_rank_up(runtime, {&product, 1});
    return y;
  };
  const std::vector<float> up = multiply_all(expert.up, x, pairs != nullptr ? &pairs->up : nullptr);
  std::vector<float> gate = up, inner(up.size()), with_bias;
  if (expert.gate) gate = multiply_all(*expert.gate, x, pairs != nullptr ? &pairs->gate : nullptr);
  runtime.kernels().activate({activation, gate.data(), up.data(), expert.bias.gate, expert.bias.up, width,
                              count, width, inner.data(), width});
  std::vector<float> out = multiply_all(expert.down, inner, pairs != nullptr ? &pairs->down : nullptr);
  for (size_t i = 0; i < out.size() && expert.bias.down != nullptr; ++i)
    out[i] += expert.bias.down[int64_t(i) % hidden];
  return out;
}

void experts_with_pairs_have_the_bits_of_their_operations() {
  constexpr int64_t kTokens = 103;
  for (const KernelTable* table : all_tables()) {
    Runtime one(1, std::nullopt, *table), three(3, std::nullopt, *table);
    for (const Format format : kFormats) {
      if (table == &plain() && format > Format::q4) continue;  // only slower
      for (const bool has_gate : {true, false}) {
        const int64_t hidden = cols_of(format, 200), width = cols_of(format, 130);
        const Activation activation = {has_gate ? Activation::Kind::silu : Activation::Kind::relu2};
        const std::vector<float> x = normal(kTokens * hidden, 8, 0.2f), biases = normal(width + hidden, 9);
        std::vector<Weights> weights;
        std::vector<PairsOfExpert> both;
        std::vector<ExpertView> experts;
        for (unsigned i = 0; i < 3; ++i) {
          for (unsigned j = 0; j < 3; ++j)
            weights.push_back(
                Weights::random(format, j < 2 ? width : hidden, j < 2 ? hidden : width, 10 * j + i, j));
          experts.push_back({std::nullopt, weights[3 * i + 1].view, weights[3 * i + 2].view});
          if (has_gate) experts.back().gate = weights[3 * i].view;
          for (int which : {0, 1}) both.emplace_back(hidden, width, has_gate, which, 100 * i);
        }
        experts[2].bias = {biases.data(), biases.data() + 1, biases.data() + width};
        if (!has_gate) experts[2].bias.gate = nullptr;
        // The last expert has runs of one token, of more than a block, and of none with pairs between them.
        const std::vector<int32_t> starts = {0, 5, 5, kTokens};
        std::vector<int32_t> token, row;
        std::vector<const ExpertPairs*> pairs;
        for (int32_t a = 0; a < kTokens; ++a) {
          token.push_back(int32_t(a * 7 % kTokens));
          row.push_back(int32_t(a * 5 % kTokens));
          const size_t expert = a < 5 ? 0 : 2;
          const int kind = a < 9 ? a % 3 : a < 70 ? 1 : a < 90 ? 0 : 2;
          pairs.push_back(kind == 0 ? nullptr : &both[2 * expert + size_t(kind) - 1].pairs);
        }
        const Assignments dispatch = {starts.data(), token.data(), row.data()};
        const auto run = [&](Runtime& runtime) {
          std::vector<float> out(size_t(kTokens * hidden), NAN);
          swiglu_experts(runtime, experts, activation, x.data(), kTokens, dispatch, out.data(), pairs.data());
          return out;
        };
        const std::vector<float> found = run(one);
        CHECK(same_bits(run(three), found));
        for (size_t a = 0; a < size_t(kTokens); ++a) {
          const auto from = x.begin() + token[a] * hidden, to = found.begin() + row[a] * hidden;
          const std::vector<float> expected =
              composed(one, experts[a < 5 ? 0 : 2], activation, {from, from + hidden}, pairs[a]);
          CHECK(same_bits({to, to + hidden}, expected));
        }
        CHECK(one.scratch_bytes() <= Runtime::scratch_size(swiglu_scratch_bytes(hidden, width, kTokens,
                                                                                kTokens, 1, true, true, 51)));
      }
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  low_rank_sums_have_the_bits_of_the_reference_at_every_size();
  the_reference_follows_the_formula();
  pairs_have_the_same_bits_alone_in_a_batch_and_on_threads();
  pairs_follow_the_formula();
  squares_of_merged_rows_and_columns_follow_the_formula();
  experts_with_pairs_have_the_bits_of_their_operations();
  return check_result();
}
