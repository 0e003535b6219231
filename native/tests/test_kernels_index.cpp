// The lightning indexer: scores equal the reference's, and those of a token and position have the same bits
// in every call.

#include "kernels/latent_args.h"
#include "ops/attention.h"
#include "ops/latent_attention.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

// A sequence's index keys, with NaN in every other place.
struct IndexKeys {
  IndexKeys(int64_t dim, int64_t block, KvFormat format)
      : kv({KvShape::latent(3, dim)}, {kBlocks, kBlocks}, block, format) {
    Runtime runtime(1);
    const std::vector<float> garbage(size_t(kBlocks * block * dim), NAN), keys = normal(kLength * dim, 5);
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < kBlocks * block; ++i) slots.push_back(i);
    latent_write(runtime, kv.index_layer(0), garbage.data(), slots.data(), kBlocks * block);
    slots.clear();
    for (int64_t i = 0; i < kLength; ++i) slots.push_back(blocks[size_t(i / block)] * block + i % block);
    latent_write(runtime, kv.index_layer(0), keys.data(), slots.data(), kLength);
  }
  static constexpr int64_t kBlocks = 6, kLength = 83;
  std::vector<int32_t> blocks = {3, 5, 0, 2, 4, 1};
  KvCache kv;
};

// Scores of tokens [first, first + tokens) and positions [begin, end).
std::vector<float> score(const KernelTable& table, IndexKeys& keys, const std::vector<float>& q,
                         const std::vector<float>& weights, int64_t heads, int64_t first, int64_t tokens,
                         int64_t begin, int64_t end) {
  const LatentLayer layer = keys.kv.index_layer(0);
  std::vector<float> scores(size_t(tokens * (end - begin)), NAN);
  std::vector<float> scratch(size_t(index_scratch_floats(layer.dim)), NAN);
  table.index_scores({
      .keys = layer,
      .blocks = keys.blocks.data(),
      .q = q.data() + first * heads * layer.dim,
      .weights = weights.empty() ? nullptr : weights.data() + first * heads,
      .num_tokens = tokens,
      .num_heads = heads,
      .begin = begin,
      .end = end,
      .scores = scores.data(),
      .scores_row = end - begin,
      .scratch = scratch.data(),
  });
  return scores;
}

void scores_meet_the_reference_in_every_part() {
  constexpr int64_t kTokens = 3, kLength = IndexKeys::kLength;
  const int64_t shapes[][2] = {{1, 7}, {2, 16}, {13, 33}, {64, 40}};  // heads, dim
  for (const KernelTable* table : all_tables()) {
    for (const KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::q8}) {
      for (const auto& [heads, dim] : shapes) {
        IndexKeys keys(dim, format == KvFormat::f16 ? 21 : 16, format);
        const std::vector<float> q = normal(kTokens * heads * dim, 7), weights = normal(kTokens * heads, 8);
        const auto part = [&](const KernelTable& with, int64_t first, int64_t tokens, int64_t begin,
                              int64_t end) {
          return score(with, keys, q, weights, heads, first, tokens, begin, end);
        };
        const std::vector<float> whole = part(*table, 0, kTokens, 0, kLength);
        CHECK(near(whole, part(plain(), 0, kTokens, 0, kLength), 1e-5));
        for (int64_t t = 0; t < kTokens; ++t) {
          for (int64_t begin = 0; begin < kLength; begin += 9) {
            const int64_t end = std::min(begin + (begin % 2 == 0 ? 1 : 40), kLength);
            const std::vector<float> some = part(*table, t, 1, begin, end);
            CHECK(same_bits(some, std::vector<float>(whole.begin() + t * kLength + begin,
                                                     whole.begin() + t * kLength + end)));
          }
        }
      }
    }
  }
}

void negative_products_add_nothing_and_nan_stays() {
  for (const KernelTable* table : all_tables()) {
    IndexKeys keys(1, 16, KvFormat::f32);
    const LatentLayer layer = keys.kv.index_layer(0);
    Runtime runtime(1);
    const std::vector<float> values = {-2, 3, NAN};
    const std::vector<int64_t> slots = {3 * 16, 3 * 16 + 1, 3 * 16 + 2};
    latent_write(runtime, layer, values.data(), slots.data(), 3);
    const std::vector<float> found = score(*table, keys, {1, -1}, {-5, 7}, 2, 0, 1, 0, 3);
    CHECK(found[0] == 14 && found[1] == -15 && std::isnan(found[2]));
  }
}

// One head without weights: the products themselves, with the same bits beside any other tokens.
void products_meet_the_reference_in_every_part() {
  constexpr int64_t kTokens = 17, kDim = 37, kLength = IndexKeys::kLength;
  const std::vector<float> q = normal(kTokens * kDim, 7);
  for (const KernelTable* table : all_tables()) {
    IndexKeys keys(kDim, 16, KvFormat::f16);
    const std::vector<float> whole = score(*table, keys, q, {}, 1, 0, kTokens, 0, kLength);
    CHECK(near(whole, score(plain(), keys, q, {}, 1, 0, kTokens, 0, kLength), 1e-5));
    for (int64_t t = 0; t < kTokens; ++t) {
      const std::vector<float> some = score(*table, keys, q, {}, 1, t, 1, 30, kLength);
      CHECK(same_bits(
          some, std::vector<float>(whole.begin() + t * kLength + 30, whole.begin() + (t + 1) * kLength)));
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  scores_meet_the_reference_in_every_part();
  negative_products_add_nothing_and_nan_stays();
  products_meet_the_reference_in_every_part();
  return check_result();
}
