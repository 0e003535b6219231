#include "ops/look_ahead.h"

#include <algorithm>

namespace argosy {

namespace {

// Roughly the number of guesses remembered: a subject lasts for hundreds of tokens, and a token guesses in
// every layer.
constexpr double kRemembered = 256.0;
// A rank starts as if nine of its last twelve guesses had been right, so look-ahead helps from the first
// token. Six wrong guesses in a row end that.
constexpr double kPriorGuesses = 12.0, kPriorRight = 9.0;
// While no rank is trusted, one step in this many still guesses, to see whether that has changed.
constexpr int64_t kStepsBetweenTrials = 16;

}  // namespace

LookAhead::LookAhead(int64_t num_ranks, double least_right)
    : least_right_(least_right),
      guesses_(size_t(num_ranks), kPriorGuesses),
      right_(size_t(num_ranks), kPriorRight),
      is_trusted_(size_t(num_ranks), kPriorRight / kPriorGuesses >= least_right) {}

bool LookAhead::wants_guess() const {
  return steps_ % kStepsBetweenTrials == 0 ||
         std::find(is_trusted_.begin(), is_trusted_.end(), true) != is_trusted_.end();
}

double LookAhead::share_right(int64_t rank) const { return right_[size_t(rank)] / guesses_[size_t(rank)]; }

std::vector<int32_t> LookAhead::trusted(const std::vector<std::vector<int32_t>>& by_rank) const {
  std::vector<int32_t> found;
  for (size_t rank = 0; rank < std::min(by_rank.size(), is_trusted_.size()); ++rank) {
    if (is_trusted_[rank]) found.insert(found.end(), by_rank[rank].begin(), by_rank[rank].end());
  }
  return found;
}

void LookAhead::remember(int64_t layer, std::vector<Ranked> missing) {
  if (layer >= int64_t(pending_.size())) pending_.resize(size_t(layer) + 1);
  pending_[size_t(layer)] = std::move(missing);
}

void LookAhead::learn(int64_t layer, const std::vector<int32_t>& asked) {
  steps_ += layer <= layer_;
  layer_ = layer;
  if (layer >= int64_t(pending_.size())) return;
  constexpr double kKept = 1.0 - 1.0 / kRemembered;
  for (const auto& [expert, number] : pending_[size_t(layer)]) {
    const auto rank = size_t(number);
    const bool is_right = std::find(asked.begin(), asked.end(), expert) != asked.end();
    guesses_[rank] = guesses_[rank] * kKept + 1.0;
    right_[rank] = right_[rank] * kKept + double(is_right);
    is_trusted_[rank] = share_right(int64_t(rank)) >= least_right_;
  }
  pending_[size_t(layer)].clear();
}

}  // namespace argosy
