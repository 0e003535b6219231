// watermark.h: tournament sampling (SynthID-Text, Nature 634, 2024): keyed bits of n-grams, and how they
// reweigh tokens.
//
//   word(n-gram)    SipHash-2-4 (Aumasson and Bernstein, 2012) of its ids, as little-endian uint32
//
//   g(n-gram, i)    bit i of the word: a fair coin to anybody without the key of the hash
//
//   tournament      for i from 0 to depth - 1, in this order, with p the weights before round i:
//                     mass = sum of g_i p, in the order of the tokens
//                     p    = p (1 + g_i - mass)
//
// A round is a match of two tokens drawn from p, which the larger g_i wins and chance decides if they are
// equal. Weights that sum to 1 still do, up to rounding; on average over the coins, each weight stays what it
// was.
#pragma once

#include <cstdint>

namespace argosy {

constexpr int kMostTournamentRounds = 64;  // bits of a word

struct WatermarkKey {
  uint64_t low, high;  // the first and the second eight bytes, little-endian
};

// words[i] = the word of the i-th row of ngrams, which has num_rows rows of row_size ids.
void ngram_words(const WatermarkKey& key, const uint32_t* ngrams, int64_t num_rows, int64_t row_size,
                 uint64_t* words);

// Reweighs num_tokens weights, which sum to 1, in place; words has the word of each token. depth is at
// most 64.
void tournament(const uint64_t* words, int64_t num_tokens, int depth, double* weights);

}  // namespace argosy
