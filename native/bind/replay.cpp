// replay.cpp: binds the replay of recorded choices.

#include "ops/replay.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "bind/bind.h"

namespace argosy {

using namespace nb::literals;

namespace {

ReplayPolicy policy_named(const std::string& name) {
  if (name == "lru") return ReplayPolicy::lru;
  if (name == "lfu") return ReplayPolicy::lfu;
  if (name == "optimum") return ReplayPolicy::optimum;
  refuse("unknown policy '" + name + "'; known: lru, lfu, optimum");
}

}  // namespace

void bind_replay(nb::module_& m) {
  m.def(
      "replay",
      [](const ArrayOf<uint16_t>& experts, const ArrayOf<int64_t>& steps, int64_t num_experts,
         const std::string& policy, int64_t num_slots, int64_t counted_from) {
        RouteTrace trace = {};
        trace.experts = read_array("experts", experts, {kAnySize, kAnySize, kAnySize});
        trace.num_tokens = int64_t(experts.shape(0));
        trace.num_layers = int64_t(experts.shape(1));
        trace.k = int64_t(experts.shape(2));
        trace.steps = read_array("steps", steps, {trace.num_tokens});
        trace.num_experts = num_experts;
        require_range("num_experts", num_experts, 1, 1 << 16);
        require_range("layers", trace.num_layers, 0, (1 << 22) / num_experts);
        require_range("num_slots", num_slots, 1, int64_t{1} << 32);
        for (size_t i = 0; i < experts.size(); ++i)
          require_range("an expert", trace.experts[i], 0, num_experts - 1);
        for (int64_t i = 1; i < trace.num_tokens; ++i) {
          if (trace.steps[i] < trace.steps[i - 1]) refuse("steps decrease at token " + std::to_string(i));
        }
        const ReplayPolicy chosen = policy_named(policy);
        nb::gil_scoped_release released;
        const ReplayCounts counts = replay(trace, chosen, num_slots, counted_from);
        return std::make_tuple(counts.lookups, counts.hits);
      },
      "experts"_a, "steps"_a, nb::kw_only(), "num_experts"_a, "policy"_a, "num_slots"_a, "counted_from"_a = 0,
      R"(
    Lookups and hits that a cache would have had on recorded choices (native/ops/replay.h).

    Args:
        experts: uint16 [tokens, layers, k].   steps: int64 [tokens], never decreasing; tokens of a step ask together.
        policy: lru, lfu or optimum.
        counted_from: the first token that counts; those before it only fill the cache.)");
}

}  // namespace argosy
