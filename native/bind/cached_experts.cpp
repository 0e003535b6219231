// cached_experts.cpp: binds the policy of the expert cache, and its leases.

#include "ops/cached_experts.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind/experts.h"
#include "bind/reads.h"

namespace argosy {

using namespace nb::literals;

namespace {

using Key = std::pair<int64_t, int64_t>;  // (layer, expert)

// Far more than any model has, and few enough that a mistake cannot fill the memory.
constexpr int64_t kMostSlots = int64_t{1} << 24, kMostExperts = int64_t{1} << 16;

ExpertKey parse_key(const Key& key) {
  require_range("layer", key.first, 0, kMostExperts - 1);
  require_range("expert", key.second, 0, kMostExperts - 1);
  return {int32_t(key.first), int32_t(key.second)};
}

std::vector<Key> keys_of(const std::vector<ExpertKey>& keys) {
  std::vector<Key> found;
  for (const ExpertKey& key : keys) found.emplace_back(key.layer, key.expert);
  return found;
}

void require_experts(const std::vector<int32_t>& experts) {
  for (const int32_t expert : experts) require_range("an expert", expert, 0, kMostExperts - 1);
}

using RecordOf = nb::typed<nb::callable, Record(Key)>;
using KindOfSlots = std::tuple<std::shared_ptr<CachePolicy>, std::vector<int64_t>,
                               std::vector<int64_t>>;  // policy, layers, places

// Keeps the records alive that `record_of` returns.
StoreReads::RecordOf records_of(RecordOf record_of) {
  return [record_of = std::move(record_of),
          held = std::vector<nb::object>()](ExpertKey key) mutable -> const Record& {
    const nb::gil_scoped_acquire acquired;
    held.push_back(record_of(Key(key.layer, key.expert)));
    return nb::cast<const Record&>(held.back());
  };
}

void make_cached_experts(CachedExperts* self, std::shared_ptr<ExpertReads> reads,
                         std::shared_ptr<BoundExpertTable> table, const std::vector<KindOfSlots>& kinds,
                         const std::vector<Key>& keys, int64_t experts_per_token, bool look_ahead,
                         bool reads_all) {
  require_range("experts_per_token", experts_per_token, 0, kMostExperts);
  std::vector<CachedExperts::Kind> parsed;
  for (const auto& [policy, layers, places] : kinds) {
    if (policy == nullptr) refuse("a kind of slots needs a policy");
    for (const int64_t layer : layers) require_range("a layer", layer, 0, kMostExperts - 1);
    parsed.push_back({policy, layers, places});
  }
  std::vector<ExpertKey> parsed_keys;
  for (const Key& key : keys) parsed_keys.push_back(parse_key(key));
  new (self) CachedExperts(
      std::move(reads), std::move(table), std::move(parsed), parsed_keys,
      {.experts_per_token = experts_per_token, .look_ahead = look_ahead, .reads_all = reads_all});
}

void require_open(const CachedExperts& experts) {
  if (!experts.is_open()) refuse("no lease is open");
}

void open_lease(CachedExperts& experts, int64_t layer, std::vector<int32_t> asked, std::vector<int32_t> scan,
                const PartLease::Pairs& pairs) {
  require_range("layer", layer, 0, kMostExperts - 1);
  require_experts(asked);
  require_experts(scan);
  std::vector<int32_t> sorted = asked;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) refuse("an expert is named twice");
  experts.open(layer, std::move(asked), std::move(scan), pairs);
}

std::optional<std::vector<int32_t>> next_group(CachedExperts& experts) {
  require_open(experts);
  switch (experts.group()) {
    case CachedExperts::State::group:
      return experts.handed();
    case CachedExperts::State::done:
      return std::vector<int32_t>();
    case CachedExperts::State::waits:
    case CachedExperts::State::failed:
      break;
  }
  return std::nullopt;
}

void collect(CachedExperts& experts) {
  require_open(experts);
  if (experts.num_in_flight() + experts.num_early() == 0) refuse("no read is in flight");
  while (true) {
    bool has_ended;
    {
      nb::gil_scoped_release released;
      has_ended = experts.collect(kSignalInterval);
    }
    if (has_ended) return;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

std::optional<std::tuple<Key, std::string, std::string>> failure_of(const CachedExperts& experts) {
  if (!experts.is_open() || !experts.failure()) return std::nullopt;
  const CachedExperts::Failure& failure = *experts.failure();
  return std::tuple(Key(failure.key.layer, failure.key.expert), failure.message,
                    error_kind(failure.error).value_or(""));
}

using LayerOfParts = std::tuple<int64_t, int64_t, std::vector<uint32_t>>;  // begin, bytes, checksums

void make_part_reads(PartReads* self, std::shared_ptr<Store> store, std::shared_ptr<Arena> arena, int file_id,
                     int64_t stride, std::map<int64_t, LayerOfParts> layers) {
  require_range("stride", stride, 1, int64_t{1} << 40);
  std::map<int64_t, PartReads::Layer> parsed;
  for (auto& [layer, sizes] : layers) {
    auto& [begin, nbytes, checksums] = sizes;
    require_range("a layer", layer, 0, kMostExperts - 1);
    require_range("where the parts of a layer begin", begin, 0, int64_t{1} << 50);
    if (int64_t(checksums.size()) > kMostExperts) refuse("there are too many checksums");
    parsed[layer] = {begin, nbytes, std::move(checksums)};
  }
  new (self) PartReads(std::move(store), std::move(arena), file_id, stride, std::move(parsed));
}

void make_part_cache(PartCache* self, std::shared_ptr<ExpertReads> reads, std::shared_ptr<CachePolicy> policy,
                     std::shared_ptr<ExpertAdapter> adapter, int64_t slot_bytes, int64_t num_parts) {
  require_range("slot_bytes", slot_bytes, 1, int64_t{1} << 40);
  require_range("num_parts", num_parts, 0, kMostSlots);
  new (self) PartCache{std::move(reads), std::move(policy), slot_bytes, num_parts, std::move(adapter)};
}

void end_lease(CachedExperts& experts, bool is_whole) {
  if (experts.num_in_flight() == 0) return experts.close(is_whole);  // too short for other threads
  nb::gil_scoped_release released;
  experts.close(is_whole);
}

}  // namespace

void bind_cached_experts(nb::module_& m) {
  nb::class_<CachePolicy>(m, "CachePolicy", R"(
    Decides which expert gets which slot, and which one leaves (native/ops/cache_policy.h). Moves no bytes.

    Keys are (layer, expert).

    Args:
        layers: the layers whose experts may use these slots.)")
      .def(
          "__init__",
          [](CachePolicy* self, int64_t num_slots, const std::vector<int64_t>& layers,
             int64_t experts_per_token) {
            require_range("num_slots", num_slots, 0, kMostSlots);
            require_range("experts_per_token", experts_per_token, 0, kMostExperts);
            new (self) CachePolicy(num_slots, layers, experts_per_token);
          },
          nb::kw_only(), "num_slots"_a, "layers"_a, "experts_per_token"_a)
      .def(
          "copy", [](const CachePolicy& policy) { return CachePolicy(policy); },
          "A policy in the same state.")
      .def(
          "resize",
          [](CachePolicy& policy, int64_t num_slots) {
            require_range("num_slots", num_slots, 0, kMostSlots);
            policy.resize(num_slots);
          },
          "num_slots"_a, R"(
        Change the number of slots; slots are numbered from 0.

        If there are more experts than slots, those that misses of decode would displace next are evicted. The others
        stay in place. `moves` brings experts in removed slots to lower ones, which stay reserved until then.)")
      .def(
          "moves",
          [](CachePolicy& policy, int64_t num_slots) {
            require_range("num_slots", num_slots, policy.num_slots(), kMostSlots);
            std::vector<std::tuple<Key, int64_t, int64_t>> moves;
            for (const CachePolicy::Move& move : policy.moves(num_slots))
              moves.emplace_back(Key(move.key.layer, move.key.expert), move.slot, move.to);
            return moves;
          },
          "num_slots"_a, R"(
        Move the experts in slots from `num_slots` on, which is no less than the number of slots. None may be pinned.

        Returns:
            The copies to make now, (expert, its slot, its new slot); the new slots are empty.)")
      .def("begin", &CachePolicy::begin, "layer"_a,
           "Begin a layer's turn in decode: its experts are a turn older.")
      .def(
          "find",
          [](const CachePolicy& policy, int64_t layer, const std::vector<int32_t>& experts) {
            std::pair<std::vector<int32_t>, std::vector<int32_t>> found;
            for (const int32_t expert : experts)
              (policy.has({parse_key({layer, expert})}) ? found.first : found.second).push_back(expert);
            return found;
          },
          "layer"_a, "experts"_a,
          "Split a layer's experts into those with a slot and those without; the order stays.")
      .def(
          "use",
          [](CachePolicy& policy, int64_t layer, const std::vector<int32_t>& experts, bool is_scan) {
            require_experts(experts);
            policy.use(layer, experts, is_scan);
          },
          "layer"_a, "experts"_a, nb::kw_only(), "is_scan"_a,
          "Record hits of a layer, and pin them. A sweep does not make an expert younger.")
      .def(
          "admit",
          [](CachePolicy& policy, const Key& key, bool is_scan, bool is_guess) {
            return policy.admit(parse_key(key), is_scan, is_guess);
          },
          "key"_a, nb::kw_only(), "is_scan"_a, "is_guess"_a = false, R"(
        Find a slot for a missing expert, evicting another if necessary, and pin it. None means: wait for an unpin.

        A guess is a scan that may take fewer slots from others.)")
      .def(
          "unpin",
          [](CachePolicy& policy, int64_t layer, const std::vector<int32_t>& experts) {
            require_experts(experts);
            policy.unpin(layer, experts);
          },
          "layer"_a, "experts"_a)
      .def(
          "drop", [](CachePolicy& policy, const Key& key) { policy.drop(parse_key(key)); }, "key"_a,
          "Forget an expert whose bytes never arrived.")
      .def(
          "slot", [](const CachePolicy& policy, const Key& key) { return policy.slot(parse_key(key)); },
          "key"_a, "The slot of a resident expert, or None.")
      .def(
          "resident", [](const CachePolicy& policy) { return keys_of(policy.resident()); },
          "The experts that have a slot, by layer and number.")
      .def("pinned", [](const CachePolicy& policy) { return keys_of(policy.pinned()); })
      .def(
          "window", [](const CachePolicy& policy) { return keys_of(policy.window()); },
          "The experts that were only swept in or guessed, the oldest first.")
      .def(
          "ages",
          [](const CachePolicy& policy) {
            std::vector<std::tuple<double, int64_t, Key, bool>> ages;
            for (const CachePolicy::Age& age : policy.ages())
              ages.emplace_back(age.turns, age.last_turn, Key(age.key.layer, age.key.expert), age.is_pinned);
            return ages;
          },
          R"(
        The experts outside the window: (age, the last turn of its layer, expert, whether it is pinned).

        The oldest expert is evicted first. Among experts of equal age, the one whose layer had its turn most recently
        goes first.)")
      .def_prop_ro("num_slots", &CachePolicy::num_slots)
      .def_prop_ro("num_resident", &CachePolicy::num_resident)
      .def_prop_ro("floor", &CachePolicy::floor,
                   "Experts that a layer keeps while another layer can give one.")
      .def_prop_ro("window_slots", &CachePolicy::window_slots, "Most slots of a sweep.")
      .def_prop_ro("guess_slots", &CachePolicy::guess_slots, "Most slots of guesses.")
      .def_static(
          "bytes",
          [](int64_t num_slots, int64_t num_layers, int64_t num_experts) {
            require_range("num_slots", num_slots, 0, kMostSlots);
            require_range("num_layers", num_layers, 0, kMostExperts);
            require_range("num_experts", num_experts, 0, kMostExperts);
            return CachePolicy::bytes(num_slots, num_layers, num_experts);
          },
          nb::kw_only(), "num_slots"_a, "num_layers"_a, "num_experts"_a,
          "Most bytes that a policy can hold, with `num_experts` in each layer.");

  nb::class_<LeaseCounts>(
      m, "LeaseCounts", "Counters of a cache since it was created; see `argosy.experts.runner.RunnerStats`.")
      .def_ro("lookups", &LeaseCounts::lookups)
      .def_ro("hits", &LeaseCounts::hits)
      .def_ro("bytes_read", &LeaseCounts::bytes_read)
      .def_ro("reads_ahead", &LeaseCounts::reads_ahead)
      .def_ro("idle_reads", &LeaseCounts::idle_reads)
      .def_ro("decode_lookups", &LeaseCounts::decode_lookups)
      .def_ro("decode_hits", &LeaseCounts::decode_hits)
      .def_ro("parts_ahead", &LeaseCounts::parts_ahead)
      .def_ro("parts_late", &LeaseCounts::parts_late);

  nb::class_<ExpertReads>(m, "ExpertReads", "Reads of experts into the slots of a `CachedExperts`.");
  nb::class_<StoreReads, ExpertReads>(m, "StoreReads", R"(
    Reads by a store into an arena.

    Args:
        record_of: returns the record of (layer, expert); called once, before its first read.)")
      .def(
          "__init__",
          [](StoreReads* self, std::shared_ptr<Store> store, std::shared_ptr<Arena> arena,
             RecordOf record_of) {
            new (self) StoreReads(std::move(store), std::move(arena), records_of(std::move(record_of)));
          },
          "store"_a, "arena"_a, "record_of"_a);

  nb::class_<PartReads, ExpertReads>(m, "PartReads", R"(
    Reads by a store of parts that lie in a file, those of a layer one after another.

    Args:
        stride: bytes from one part to the next.
        layers: by layer, where its first part begins, the bytes of each, and the crc32c_wide of each.)")
      .def("__init__", &make_part_reads, "store"_a, "arena"_a, "file_id"_a, nb::kw_only(), "stride"_a,
           "layers"_a);

  nb::class_<PartCache>(m, "PartCache", R"(
    The parts of experts that one adapter brings, one per slot (native/ops/part_cache.h).

    Args:
        policy: decides which part gets which slot; slot i begins at byte i * slot_bytes. Its layers are those of the
            adapter.
        adapter: learns where parts lie.
        num_parts: the parts of all experts.)")
      .def("__init__", &make_part_cache, "reads"_a, "policy"_a, "adapter"_a, nb::kw_only(), "slot_bytes"_a,
           "num_parts"_a);

  nb::class_<CachedExperts, LayerExperts>(m, "CachedExperts", R"(
    Leases of the experts of a layer; memory holds one expert per slot (native/ops/cached_experts.h).

    As `LayerExperts`, a stack runs layers without Python, unless a read fails or a layer takes long; then the lease
    stays open. One thread at a time; counters may be read by any.

    Args:
        reads: how experts are read into the arena of the table.
        table: receives the place of each expert.
        kinds: the policy of each kind of slots, its layers, and where its slots begin in the arena.
        keys: the experts that may be read.
        look_ahead: read guesses for decode.
        reads_all: while there is a slot for every expert, also read experts that no token chose.)")
      .def("__init__", &make_cached_experts, "reads"_a, "table"_a, nb::kw_only(), "kinds"_a, "keys"_a,
           "experts_per_token"_a, "look_ahead"_a, "reads_all"_a)
      .def("open", &open_lease, "layer"_a, "experts"_a, "scan"_a, "pairs"_a = PartLease::Pairs(), R"(
        Open a lease of experts of a layer, each named once; a lease that is still open ends.

        Args:
            scan: experts that only prompt tokens chose.
            pairs: (expert, adapter) of the tokens that chose them; others than those of `set_parts` count for nothing.)")
      .def(
          "open_for",
          [](CachedExperts& experts, int64_t layer, const Dispatch& dispatch) {
            require_range("layer", layer, 0, kMostExperts - 1);
            experts.open(layer, dispatch);
          },
          "layer"_a, "dispatch"_a, "Open a lease of the experts of a dispatch, and of their parts.")
      .def("set_parts", &CachedExperts::set_parts, "adapter"_a, "parts"_a.none(), R"(
        From now on, experts of tokens with this adapter need these parts; None: no parts that are read.

        A lease that is open ends.)")
      .def("group", &next_group, R"(
        The experts to compute next; empty: all are done. None: wait with `collect`, unless there is a `failure`.

        The weights of the previous group may move.)")
      .def("collect", &collect, "Wait until a read of the open lease has ended.")
      .def_prop_ro("failure", &failure_of, "The read of the open lease that failed: (expert, message, kind).")
      .def_prop_ro(
          "failed_adapter",
          [](const CachedExperts& experts) {
            return experts.is_open() && experts.failure() ? experts.failure()->adapter : -1;
          },
          "The adapter whose part could not be read; -1: it was the expert itself, or there is no failure.")
      .def("end", &end_lease, nb::kw_only(), "is_whole"_a, R"(
        End the open lease, if there is one. No read of it is in flight then.

        Args:
            is_whole: it was not cut short.)")
      .def_prop_ro("is_open", &CachedExperts::is_open)
      .def(
          "is_running",
          [](const CachedExperts& experts, const Dispatch& dispatch) { return experts.runs(dispatch); },
          "dispatch"_a, "Whether the open lease is for this dispatch, begun by the stack.")
      .def("take_done", &CachedExperts::take_done, "The experts of the open lease that the stack has run.")
      .def_prop_ro("num_in_flight", &CachedExperts::num_in_flight, "Reads of the open lease.")
      .def_prop_ro("is_short_of_slots", &CachedExperts::is_short_of_slots,
                   "Whether experts of the open lease wait for a slot.")
      .def(
          "wants_guess",
          [](const CachedExperts& experts, bool is_sweep) { return experts.wants_guess(is_sweep); },
          nb::kw_only(), "is_sweep"_a, "Whether a guess would be of use in this step.")
      .def(
          "guess",
          [](CachedExperts& experts, int64_t layer, const std::vector<std::vector<int32_t>>& by_rank,
             bool is_sweep, const PartLease::Pairs& pairs) {
            for (const std::vector<int32_t>& rank : by_rank) require_experts(rank);
            experts.guess(layer, by_rank, pairs, is_sweep);
          },
          "layer"_a, "by_rank"_a, nb::kw_only(), "is_sweep"_a, "pairs"_a = PartLease::Pairs(), R"(
        Announce which experts the next lease may need, best first. Never waits.

        Args:
            pairs: (expert, adapter) of the tokens for which experts are guessed.)")
      .def("forget_hint", &CachedExperts::forget_hint,
           "Release what the last guess still holds, except reads that have begun. Never waits.")
      .def(
          "collect_early",
          [](CachedExperts& experts) {
            nb::gil_scoped_release released;
            experts.collect_early(std::nullopt);
          },
          "Wait until a read ends that no lease waits for.")
      .def_prop_ro(
          "early", [](const CachedExperts& experts) { return keys_of(experts.early()); },
          "Experts whose reads have begun although no lease waits for them.")
      .def_prop_ro("num_early", &CachedExperts::num_early, "Reads that no lease waits for, also of parts.")
      .def_prop_ro(
          "kept", [](const CachedExperts& experts) { return keys_of(experts.kept()); },
          "Guessed experts that stay in memory until the next lease.")
      .def(
          "trust", [](CachedExperts& experts, double least_right) { experts.trust(least_right); },
          "least_right"_a, "From now on, trust ranks of guesses that are right at least so often.")
      .def(
          "is_trusted",
          [](const CachedExperts& experts, int64_t rank, bool is_sweep) {
            require_range("rank", rank, 0, experts.experts_per_token() - 1);
            return experts.look_ahead(is_sweep).is_trusted(rank);
          },
          "rank"_a, nb::kw_only(), "is_sweep"_a)
      .def_prop_ro("has_all", &CachedExperts::has_all, "Whether every expert has landed; between two steps.")
      .def_prop_ro("counts", &CachedExperts::counts)
      .def_prop_ro("num_run", &CachedExperts::num_run,
                   "Experts that the stack has run, counted once per layer and step.")
      .def("cancel_early", &CachedExperts::cancel_early, nb::call_guard<nb::gil_scoped_release>(),
           "End all reads that no lease waits for.");

  m.attr("BONUS_TURNS") = CachePolicy::kBonusTurns;
  m.attr("HALF_LIFE_TURNS") = CachePolicy::kHalfLifeTurns;
}

}  // namespace argosy
