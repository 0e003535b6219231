// replay.h: the hit rate that a cache of equal slots would have had on recorded choices of experts.
//
// All layers share the slots. In one step, a layer asks for the distinct experts of its tokens at once: those
// in a slot are hits. Then the others get a slot each, and none of this request is evicted for another. The
// cache is empty at first.
//
//   lru      evicts the expert that was used longest ago
//   lfu      evicts the expert that was used least since the beginning, evicted experts' uses included; on a
//   tie, as lru optimum  evicts the expert that is needed last (Belady 1966): no policy hits more
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
