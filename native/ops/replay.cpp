#include "ops/replay.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

namespace argosy {

namespace {

// The distinct experts (layer * num_experts + expert) that one layer asks for in one step.
struct Request {
  int64_t begin, end;  // in Requests::experts
  bool is_counted;
};

struct Requests {
  std::vector<int32_t> experts;
  std::vector<Request> all;
};

Requests list_requests(const RouteTrace& trace, int64_t counted_from) {
  Requests requests;
  requests.experts.reserve(size_t(trace.num_tokens * trace.num_layers * trace.k));
  std::vector<int64_t> named(size_t(trace.num_layers * trace.num_experts), -1);  // the last request with each
  for (int64_t first = 0, end; first < trace.num_tokens; first = end) {
    end = first + 1;
    while (end < trace.num_tokens && trace.steps[end] == trace.steps[first]) ++end;
    for (int64_t layer = 0; layer < trace.num_layers; ++layer) {
      const int64_t number = int64_t(requests.all.size()), begin = int64_t(requests.experts.size());
      for (int64_t token = first; token < end; ++token) {
        const uint16_t* chosen = trace.experts + (token * trace.num_layers + layer) * trace.k;
        for (int64_t rank = 0; rank < trace.k; ++rank) {
          const int64_t expert = layer * trace.num_experts + chosen[rank];
          if (std::exchange(named[size_t(expert)], number) == number) continue;
          requests.experts.push_back(int32_t(expert));
        }
      }
      requests.all.push_back({begin, int64_t(requests.experts.size()), first >= counted_from});
    }
  }
  return requests;
}

// For each entry of Requests::experts, the number of the next request with the same expert.
std::vector<int64_t> next_uses(const Requests& requests, int64_t num_keys) {
  const int64_t never = int64_t(requests.all.size());
  std::vector<int64_t> following(size_t(num_keys), never), next(requests.experts.size());
  for (int64_t number = never - 1; number >= 0; --number) {
    for (int64_t at = requests.all[size_t(number)].begin; at < requests.all[size_t(number)].end; ++at) {
      next[size_t(at)] = std::exchange(following[size_t(requests.experts[size_t(at)])], number);
    }
  }
  return next;
}

}  // namespace

ReplayCounts replay(const RouteTrace& trace, ReplayPolicy policy, int64_t num_slots, int64_t counted_from) {
  const int64_t num_keys = trace.num_layers * trace.num_experts;
  const Requests requests = list_requests(trace, counted_from);
  std::vector<int64_t> next;
  if (policy == ReplayPolicy::optimum) next = next_uses(requests, num_keys);
  // The least of a resident expert's rank (first, second) is evicted first.
  using Rank = std::pair<int64_t, int64_t>;
  std::vector<Rank> ranks(static_cast<size_t>(num_keys));
  std::vector<bool> is_resident(static_cast<size_t>(num_keys));
  std::set<std::pair<Rank, int32_t>> resident;
  ReplayCounts counts;
  for (size_t number = 0; number < requests.all.size(); ++number) {
    const Request& request = requests.all[number];
    int64_t hits = 0;
    // The experts of the request leave the set, so that none of them is evicted, and come back with a new
    // rank.
    for (int64_t at = request.begin; at < request.end; ++at) {
      const int32_t expert = requests.experts[size_t(at)];
      Rank& rank = ranks[size_t(expert)];
      if (is_resident[size_t(expert)]) {
        ++hits;
        resident.erase({rank, expert});
      }
      if (policy == ReplayPolicy::optimum)
        rank.first = -next[size_t(at)];
      else if (policy == ReplayPolicy::lfu)
        ++rank.first;
      rank.second = int64_t(number);
    }
    if (request.is_counted) {
      counts.lookups += request.end - request.begin;
      counts.hits += hits;
    }
    const int64_t size = request.end - request.begin;
    while (!resident.empty() && int64_t(resident.size()) + size > num_slots) {
      is_resident[size_t(resident.begin()->second)] = false;
      resident.erase(resident.begin());
    }
    for (int64_t at = request.begin; at < request.end; ++at) {
      const int32_t expert = requests.experts[size_t(at)];
      is_resident[size_t(expert)] = at - request.begin < num_slots;
      if (is_resident[size_t(expert)]) resident.insert({ranks[size_t(expert)], expert});
    }
  }
  return counts;
}

}  // namespace argosy
