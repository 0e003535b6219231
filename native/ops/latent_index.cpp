#include "ops/latent_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/latent_args.h"
#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr int64_t kTileTokens = 8;  // tokens whose candidates exist at a time
// Positions that are scored between two selections: memory does not grow with the context.
constexpr int64_t kRoundPositions = 32 * kSectionPositions;

// A position and its score as one number: the greatest is chosen first.
uint64_t rank_of(float score, int64_t position) {
  uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 ties with 0
  if (std::isnan(score)) bits = INT32_MAX;
  const uint32_t ascending = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t(ascending) << 32 | ~uint32_t(position);
}
int32_t position_of(uint64_t rank) { return int32_t(~uint32_t(rank)); }

struct Scratch {
  Scratch(const IndexSizes& sizes, int num_threads) : most_ranks(sizes.count + kRoundPositions) {
    keys = layout.add(num_threads * index_scratch_floats(sizes.dim) * 4);
    scores = layout.add(kTileTokens * kRoundPositions * 4);
    ranks = layout.add(kTileTokens * most_ranks * 8);
    selection = layout.add(num_threads * most_ranks * 8);
  }
  int64_t most_ranks;  // of a token
  ScratchLayout layout;
  int64_t keys, scores, ranks, selection;
};

// The best positions of one token so far, in ascending order.
class Candidates {
 public:
  Candidates(uint64_t* ranks, int64_t count) : ranks_(ranks), count_(count) {}

  // Takes the scores of positions [begin, end); `selection` has room for as many ranks as there may be.
  void add(const float* scores, int64_t begin, int64_t end, uint64_t* selection) {
    for (int64_t p = begin; p < end; ++p) {
      const uint64_t rank = rank_of(scores[p - begin], p);
      if (rank >= least_) ranks_[size_++] = rank;
    }
    if (size_ <= count_) return;
    std::copy_n(ranks_, size_, selection);
    std::nth_element(selection, selection + count_ - 1, selection + size_, std::greater<>());
    least_ = selection[count_ - 1];
    size_ = std::remove_if(ranks_, ranks_ + size_, [&](uint64_t rank) { return rank < least_; }) - ranks_;
  }

  void write(int32_t* positions) const { std::transform(ranks_, ranks_ + size_, positions, position_of); }

 private:
  uint64_t* ranks_;
  int64_t count_, size_ = 0;
  uint64_t least_ = 0;  // no position below is chosen
};

// Consecutive tokens of one sequence, which share the keys that a kernel has converted.
struct Group {
  int64_t begin, end;  // tokens
  int64_t until;       // of the positions that some of them see
};

// Groups of at most kTileTokens tokens in all, from `token` on, which moves behind them.
std::vector<Group> next_groups(const AttentionBatch& batch, const ChosenPositions& chosen, int64_t& token) {
  std::vector<Group> groups;
  for (int64_t size = 0; token < batch.num_tokens && size < kTileTokens; ++token) {
    if (!chosen.limits(batch, token)) continue;
    ++size;
    if (!groups.empty() && groups.back().end == token && batch.sequence[token] == batch.sequence[token - 1]) {
      groups.back().end = token + 1;
      groups.back().until = std::max(groups.back().until, batch.until(token));
    } else {
      groups.push_back({token, token + 1, batch.until(token)});
    }
  }
  return groups;
}

}  // namespace

void choose_positions(Runtime& runtime, const LatentLayer& keys, const float* weights,
                      const AttentionBatch& batch, int64_t count, int32_t* chosen) {
  const KernelTable& table = runtime.kernels();
  const ChosenPositions limit = {chosen, count};
  const auto lock = runtime.lock();
  const Scratch places({batch.num_heads, keys.dim, count}, runtime.num_threads());
  uint8_t* scratch = runtime.scratch(places.layout.bytes());
  float *copies = reinterpret_cast<float*>(scratch + places.keys),
        *scores = reinterpret_cast<float*>(scratch + places.scores);
  uint64_t *ranks = reinterpret_cast<uint64_t*>(scratch + places.ranks),
           *selection = reinterpret_cast<uint64_t*>(scratch + places.selection);
  for (int64_t token = 0; token < batch.num_tokens;) {
    const std::vector<Group> groups = next_groups(batch, limit, token);
    std::vector<int64_t> tokens;
    std::vector<Candidates> candidates;
    std::vector<int64_t> rows;  // of the first token of each group among the tokens
    int64_t most = 0;
    for (const Group& group : groups) {
      rows.push_back(int64_t(tokens.size()));
      most = std::max(most, group.until);
      for (int64_t t = group.begin; t < group.end; ++t) {
        candidates.emplace_back(ranks + int64_t(tokens.size()) * places.most_ranks, count);
        tokens.push_back(t);
      }
    }
    for (int64_t first = 0; first < most; first += kRoundPositions) {
      const int64_t after = std::min(first + kRoundPositions, most);
      const int64_t sections = (after - first - 1) / kSectionPositions + 1;
      const int64_t work = batch.num_heads * keys.dim * kSectionPositions / 8;
      runtime.parallel_for(
          int64_t(groups.size()) * sections, work * int64_t(tokens.size()) / int64_t(groups.size()),
          [&](int64_t from, int64_t to, int worker) {
            for (int64_t i = from; i < to; ++i) {
              const Group& group = groups[size_t(i / sections)];
              const int64_t begin = first + i % sections * kSectionPositions;
              const int64_t end = std::min(begin + kSectionPositions, group.until);
              if (begin >= end) continue;
              table.index_scores({
                  .keys = keys,
                  .blocks = batch.block_table + batch.sequence[group.begin] * batch.max_blocks,
                  .q = batch.q + group.begin * batch.num_heads * keys.dim,
                  .weights = weights + group.begin * batch.num_heads,
                  .num_tokens = group.end - group.begin,
                  .num_heads = batch.num_heads,
                  .begin = begin,
                  .end = end,
                  .scores = scores + rows[size_t(i / sections)] * kRoundPositions + begin - first,
                  .scores_row = kRoundPositions,
                  .scratch = copies + worker * index_scratch_floats(keys.dim),
              });
            }
          });
      runtime.parallel_for(int64_t(tokens.size()), 4 * (after - first),
                           [&](int64_t from, int64_t to, int worker) {
                             for (int64_t i = from; i < to; ++i) {
                               candidates[size_t(i)].add(scores + i * kRoundPositions, first,
                                                         std::min(after, batch.until(tokens[size_t(i)])),
                                                         selection + worker * places.most_ranks);
                             }
                           });
    }
    for (size_t i = 0; i < tokens.size(); ++i) candidates[i].write(chosen + tokens[i] * count);
  }
}

int64_t index_scratch_bytes(const IndexSizes& sizes, int num_threads) {
  // No part has more bytes than this product.
  checked_product("index scratch",
                  {512, kTileTokens + num_threads, sizes.dim + sizes.count + kRoundPositions + 64});
  return Scratch(sizes, num_threads).layout.bytes();
}

}  // namespace argosy
