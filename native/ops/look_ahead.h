// look_ahead.h: decides which guesses of the next layer's experts to trust, by how often past guesses were
// right.
//
//   next layer's router, on this layer's hidden state  ->  guess, best first  ->  experts worth a read
//
// Attention changes the hidden state before the next layer's router sees it, so the guess is usually but not
// always right: its first expert is nearly certain, its last is not. Guessed experts are read only while the
// drive has little else to do, so a right guess saves up to a whole read, and a wrong one delays needed reads
// by a few parts of a read and wears the drive. A rank that is right less than half of the time is not read.
//
// Only experts that were missing when they were guessed are counted: they are often less certain than the
// others, and they are the ones that would be read. Counting them needs no reads, so look-ahead switches
// itself on and off.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace argosy {

// For each rank of a guess, how often a missing guessed expert was then needed.
class LookAhead {
 public:
  static constexpr double kLeastRight = 0.5;
  using Ranked = std::pair<int32_t, int32_t>;  // an expert, and its rank in a guess

  explicit LookAhead(int64_t num_ranks, double least_right = kLeastRight);

  bool wants_guess() const;
  double share_right(int64_t rank) const;
  bool is_trusted(int64_t rank) const { return is_trusted_[size_t(rank)]; }
  // The experts of a guess at trusted ranks, best first.
  std::vector<int32_t> trusted(const std::vector<std::vector<int32_t>>& by_rank) const;
  // Records the missing experts of a guess for a layer.
  void remember(int64_t layer, std::vector<Ranked> missing);
  // Compares the guess for a layer with the experts that it needed.
  void learn(int64_t layer, const std::vector<int32_t>& asked);

 private:
  double least_right_;
  std::vector<double> guesses_, right_;  // by rank
  std::vector<bool> is_trusted_;
  std::vector<std::vector<Ranked>> pending_;  // by layer
  int64_t layer_ = -1;                        // the last layer that learnt
  int64_t steps_ = 0;
};

}  // namespace argosy
