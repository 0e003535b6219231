#include "ops/latent_index.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/latent_args.h"
#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr int64_t kTileTokens = 8;  // tokens whose candidates exist at a time
// Positions that are scored between two selections: memory does not grow with the context.
constexpr int64_t kRoundPositions = 32 * kSectionPositions;
static_assert(kMostIndexBlock <= kRoundPositions);

// A score as a number that grows with it.
uint32_t ascending(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 ties with 0
  const uint32_t ordered = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? UINT32_MAX - 1 : ordered;  // NaN
}
constexpr uint32_t kAboveAllScores = UINT32_MAX;

// A position or block and its score as one number: the greatest is chosen first.
uint64_t rank_of(uint32_t score, int64_t number) { return uint64_t(score) << 32 | ~uint32_t(number); }
int32_t number_of(uint64_t rank) { return int32_t(~uint32_t(rank)); }

struct Scratch {
  Scratch(const IndexSizes& sizes, int num_threads)
      : most_rows(kTileTokens * sizes.choices_per_token()),
        most_ranks(sizes.count + kRoundPositions / std::max<int64_t>(1, sizes.block_size) + 1) {
    keys = layout.add(num_threads * index_scratch_floats(sizes.dim) * 4);
    scores = layout.add(most_rows * kRoundPositions * 4);
    ranks = layout.add(most_rows * most_ranks * 8);
    selection = layout.add(num_threads * most_ranks * 8);
  }
  int64_t most_rows;
  int64_t most_ranks;  // of a choice
  ScratchLayout layout;
  int64_t keys, scores, ranks, selection;
};

// The best positions, or blocks, of one choice so far, in ascending order.
class Candidates {
 public:
  Candidates(uint64_t* ranks, int64_t count) : ranks_(ranks), count_(count) {}

  // Takes the scores of blocks from position `begin`, where one starts, to `end`. Blocks from number `local`
  // on are chosen whatever their scores. `selection` has room for as many ranks as there may be.
  void add(const float* scores, int64_t begin, int64_t end, int64_t block_size, int64_t local,
           uint64_t* selection) {
    for (int64_t p = begin, block = begin / block_size; p < end; p += block_size, ++block) {
      uint32_t best = ascending(scores[p - begin]);
      for (int64_t i = p + 1; i < std::min(p + block_size, end); ++i)
        best = std::max(best, ascending(scores[i - begin]));
      offer(rank_of(block >= local ? kAboveAllScores : best, block));
    }
    keep_best(selection);
  }

  // The same of the positions of some blocks, one by one.
  void add_within(const float* scores, int64_t begin, int64_t end, const int32_t* blocks, int64_t num_blocks,
                  int64_t block_size, uint64_t* selection) {
    const int32_t* block = std::lower_bound(blocks, blocks + num_blocks, begin / block_size);
    for (; block != blocks + num_blocks && *block * block_size < end; ++block) {
      const int64_t first = std::max(begin, *block * block_size);
      const int64_t after = std::min(end, (*block + 1) * block_size);
      for (int64_t p = first; p < after; ++p) offer(rank_of(ascending(scores[p - begin]), p));
    }
    keep_best(selection);
  }

  void write(int32_t* numbers) const { std::transform(ranks_, ranks_ + size_, numbers, number_of); }

 private:
  void offer(uint64_t rank) {
    if (rank >= least_) ranks_[size_++] = rank;
  }
  void keep_best(uint64_t* selection) {
    if (size_ <= count_) return;
    std::copy_n(ranks_, size_, selection);
    std::nth_element(selection, selection + count_ - 1, selection + size_, std::greater<>());
    least_ = selection[count_ - 1];
    size_ = std::remove_if(ranks_, ranks_ + size_, [&](uint64_t rank) { return rank < least_; }) - ranks_;
  }

  uint64_t* ranks_;
  int64_t count_, size_ = 0;
  uint64_t least_ = 0;  // no position below is chosen
};

// Consecutive tokens of one sequence, which share the keys that a kernel has converted.
struct Group {
  int64_t begin, end;  // tokens
  int64_t until;       // of the positions that some of them see
  // The ranges of positions that some of them choose among, ascending and apart.
  std::vector<std::pair<int64_t, int64_t>> ranges = {};
};

// Groups of at most kTileTokens tokens in all, from `token` on, which moves behind them. Tokens that see no
// more than `limit` positions choose nothing.
std::vector<Group> next_groups(const AttentionBatch& batch, int64_t limit, int64_t& token) {
  std::vector<Group> groups;
  for (int64_t size = 0; token < batch.num_tokens && size < kTileTokens; ++token) {
    if (batch.until(token) <= limit) continue;
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

void find_ranges(Group& group, const AttentionBatch& batch, const CandidateBlocks& candidates) {
  std::vector<int32_t> blocks;
  for (int64_t token = group.begin; token < group.end; ++token) {
    if (!candidates.limits(batch, token)) {
      group.ranges = {{0, group.until}};
      return;
    }
    const int32_t* own = candidates.blocks + token * candidates.count;
    blocks.insert(blocks.end(), own, own + candidates.count);
  }
  std::sort(blocks.begin(), blocks.end());
  for (const int32_t block : blocks) {
    const int64_t begin = block * candidates.size, end = std::min(begin + candidates.size, group.until);
    if (group.ranges.empty() || begin > group.ranges.back().second) {
      group.ranges.emplace_back(begin, end);
    } else {
      group.ranges.back().second = std::max(group.ranges.back().second, end);
    }
  }
}

// weights: nullptr if heads choose blocks. num_local: blocks that are chosen whatever their scores.
void choose(Runtime& runtime, const LatentLayer& keys, const float* weights, const AttentionBatch& batch,
            const IndexSizes& sizes, int64_t num_local, const CandidateBlocks& within, int32_t* chosen) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const Scratch places(sizes, runtime.num_threads());
  const int64_t count = sizes.count, per_token = sizes.choices_per_token();
  const int64_t block_size = std::max<int64_t>(1, sizes.block_size), limit = count * block_size;
  const int64_t round = kRoundPositions / block_size * block_size;
  uint8_t* scratch = runtime.scratch(places.layout.bytes());
  float *copies = reinterpret_cast<float*>(scratch + places.keys),
        *scores = reinterpret_cast<float*>(scratch + places.scores);
  uint64_t *ranks = reinterpret_cast<uint64_t*>(scratch + places.ranks),
           *selection = reinterpret_cast<uint64_t*>(scratch + places.selection);
  for (int64_t token = 0; token < batch.num_tokens;) {
    std::vector<Group> groups = next_groups(batch, limit, token);
    for (Group& group : groups) find_ranges(group, batch, within);
    std::vector<int64_t> tokens;  // of each choice
    std::vector<Candidates> candidates;
    std::vector<int64_t> rows;  // the first choice of each group
    int64_t most = 0;
    for (const Group& group : groups) {
      rows.push_back(int64_t(tokens.size()));
      most = std::max(most, group.until);
      for (int64_t t = group.begin * per_token; t < group.end * per_token; ++t) {
        candidates.emplace_back(ranks + int64_t(tokens.size()) * places.most_ranks, count);
        tokens.push_back(t / per_token);
      }
    }
    for (int64_t first = 0; first < most; first += round) {
      const int64_t after = std::min(first + round, most);
      const int64_t sections = (after - first - 1) / kSectionPositions + 1;
      const int64_t work = batch.num_heads * keys.dim * kSectionPositions / 8;
      runtime.parallel_for(
          int64_t(groups.size()) * sections,
          work * int64_t(tokens.size()) / per_token / int64_t(groups.size()),
          [&](int64_t from, int64_t to, int worker) {
            for (int64_t i = from; i < to; ++i) {
              const Group& group = groups[size_t(i / sections)];
              const int64_t from_here = first + i % sections * kSectionPositions;
              const int64_t until = std::min(from_here + kSectionPositions, after);
              auto range = std::partition_point(group.ranges.begin(), group.ranges.end(),
                                                [&](const auto& one) { return one.second <= from_here; });
              for (; range != group.ranges.end() && range->first < until; ++range) {
                const int64_t begin = std::max(from_here, range->first);
                table.index_scores({
                    .keys = keys,
                    .blocks = batch.block_table + batch.sequence[group.begin] * batch.max_blocks,
                    .q = batch.q + group.begin * batch.num_heads * keys.dim,
                    .weights = weights != nullptr ? weights + group.begin * batch.num_heads : nullptr,
                    .num_tokens = (group.end - group.begin) * per_token,
                    .num_heads = batch.num_heads / per_token,
                    .begin = begin,
                    .end = std::min(until, range->second),
                    .scores = scores + rows[size_t(i / sections)] * kRoundPositions + begin - first,
                    .scores_row = kRoundPositions,
                    .scratch = copies + worker * index_scratch_floats(keys.dim),
                });
              }
            }
          });
      runtime.parallel_for(
          int64_t(tokens.size()), 4 * (after - first), [&](int64_t from, int64_t to, int worker) {
            for (int64_t i = from; i < to; ++i) {
              const int64_t own = tokens[size_t(i)], until = batch.until(own);
              uint64_t* of_worker = selection + worker * places.most_ranks;
              if (within.limits(batch, own)) {
                candidates[size_t(i)].add_within(scores + i * kRoundPositions, first, std::min(after, until),
                                                 within.blocks + own * within.count, within.count,
                                                 within.size, of_worker);
                continue;
              }
              const int64_t local = num_local > 0 ? (until - 1) / block_size + 1 - num_local : until;
              candidates[size_t(i)].add(scores + i * kRoundPositions, first, std::min(after, until),
                                        block_size, local, of_worker);
            }
          });
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int64_t choice = tokens[i] * per_token + int64_t(i) % per_token;  // every group has whole tokens
      candidates[i].write(chosen + choice * count);
    }
  }
}

}  // namespace

void choose_positions(Runtime& runtime, const LatentLayer& keys, const float* weights,
                      const AttentionBatch& batch, int64_t count, int32_t* chosen,
                      const CandidateBlocks& candidates) {
  choose(runtime, keys, weights, batch, {batch.num_heads, keys.dim, count}, 0, candidates, chosen);
}

void choose_candidates(Runtime& runtime, const LatentLayer& keys, const float* weights,
                       const AttentionBatch& batch, int64_t count, int64_t size, int32_t* blocks) {
  choose(runtime, keys, weights, batch, {batch.num_heads, keys.dim, count, size, 1, true}, 1, {}, blocks);
}

void choose_blocks(Runtime& runtime, const LatentLayer& keys, const AttentionBatch& batch,
                   const ChosenBlocks& chosen, int64_t num_local, int32_t* blocks) {
  choose(runtime, keys, nullptr, batch, {batch.num_heads, keys.dim, chosen.count, chosen.size}, num_local, {},
         blocks);
}

void expand_groups(const AttentionBatch& batch, const ChosenPositions& chosen, int32_t* positions) {
  // From behind: what is written lies behind what is still to be read.
  for (int64_t token = batch.num_tokens - 1; token >= 0; --token) {
    if (!chosen.limits(batch, token)) continue;
    int32_t* row = positions + token * chosen.row();
    const int64_t until = batch.until(token), size = chosen.size, tail = until % size;
    for (int64_t i = 0; i < tail; ++i) row[chosen.count * size + i] = int32_t(until - tail + i);
    for (int64_t group = chosen.count - 1; group >= 0; --group) {
      const int64_t first = positions[token * chosen.count + group] * size;
      for (int64_t i = 0; i < size; ++i) row[group * size + i] = int32_t(first + i);
    }
  }
}

int64_t index_scratch_bytes(const IndexSizes& sizes, int num_threads) {
  // No part has more bytes than this product.
  checked_product("index scratch", {512, kTileTokens * sizes.choices_per_token() + num_threads,
                                    sizes.dim + sizes.count + kRoundPositions + 64});
  return Scratch(sizes, num_threads).layout.bytes();
}

}  // namespace argosy
