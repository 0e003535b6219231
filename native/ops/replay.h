// replay.h: the hit rate that a cache of equal slots would have had on recorded choices of experts.
//
// The layers share the slots. In each step, a layer requests the distinct experts of its tokens together.
// Experts that occupy a slot are hits; each of the others then gets a slot, and no expert of a request is
// evicted for another one of it. The cache starts empty.
//
//   lru       evicts the expert whose last use is oldest
//
//   lfu       evicts the expert with the fewest uses since the start, including uses before an eviction, and
//             the one that lru would evict if several have the fewest
//
//   optimum   evicts the expert whose next use is farthest away (Belady 1966); no policy has more hits
#pragma once

#include <cstdint>

namespace argosy {

enum class ReplayPolicy { lru, lfu, optimum };

struct RouteTrace {
  const uint16_t* experts;  // [num_tokens][num_layers][k], each below num_experts
  const int64_t* steps;     // [num_tokens], the step of each token, never decreasing
  int64_t num_tokens, num_layers, k, num_experts;
};

struct ReplayCounts {
  int64_t lookups = 0, hits = 0;
};

// Replays the whole trace with num_slots >= 1, and counts from the token `counted_from` on.
ReplayCounts replay(const RouteTrace& trace, ReplayPolicy policy, int64_t num_slots, int64_t counted_from);

}  // namespace argosy
