// tuning.h: how products with quantised weights run on this machine.
#pragma once

#include <cstdint>
#include <string>

namespace argosy {

// How far ahead of what it reads a product prefetches quantised weights, in bytes: into the first-level
// cache, and into the second-level cache; 0 disables it.
struct AskAhead {
  const char* name;
  int64_t into_l1, into_l2;
};

[[maybe_unused]] static constexpr AskAhead kAskAheads[] = {{"off", 0, 0},
                                                           {"one_level", 6 << 10, 0},
                                                           {"one_level_far", 12 << 10, 0},
                                                           {"two_levels", 3 << 10, 16 << 10}};

// How products with the weights of one format run on this machine. It changes no result: a probe measures
// which is fastest (docs/decisions/0069).
struct Tuning {
  AskAhead ask_ahead = kAskAheads[0];  // with one token
  // With up to a tile of tokens. If this is off, the next panels are prefetched into the second-level cache,
  // as with more tokens.
  AskAhead few_ask_ahead = kAskAheads[0];
  // AVX-512: from this many tokens on, a tile takes two panels of 16 rows, and one panel with fewer.
  int64_t two_panels_from = 4;
  // From this many tokens on, a product runs on the tiles of AMX; 0: never. Without AMX, it has no effect.
  int64_t amx_from = 0;
};

// A tile of one panel takes at most eight tokens; with more, two panels share each activation.
[[maybe_unused]] static constexpr int64_t kFewestForTwoPanels = 2, kMostForOnePanel = 8;

// For processes without measurements: the choice that lost least on the machines measured
// (docs/decisions/0069).
Tuning default_tuning();
// Throws std::invalid_argument for a name that is not in kAskAheads.
AskAhead ask_ahead_named(const std::string& name);

}  // namespace argosy
