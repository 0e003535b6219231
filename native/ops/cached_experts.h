// cached_experts.h: leases of the experts of a layer, as many in memory as there are slots; the others are
// read.
//
//   open(layer, experts, scan)  ->  group(), again and again: experts that are here, then others as they land
//                               ->  collect() where group() says that it waits for reads  ->  close()
//
// A lease is a promise that weights stay: those of a group stay until the next group, or the end. Before the
// first expert is computed, every slot gets a miss to read. A slot whose expert has been computed is free
// for the next miss, so a layer may need more experts than there are slots. When a lease ends, even early,
// none of its reads is in flight.
//
// guess() tells which experts the next layer will probably need, and look-ahead decides which of them are
// worth a read (the hint). These reads begin once the open lease has issued all of its own reads, in slots
// of the policy's window; the next lease takes them over at whatever stage they are. So the drive does not
// wait for arithmetic between two layers.
//
// Parts that adapters bring (part_cache.h) are read together with the experts that need them, also early, and
// an expert is in a group only when they are here.
//
// As LayerExperts, a stack runs a layer without a pause: unless a read fails, or the layer takes long. Then
// the lease stays open, and Python goes on with it.
//
// One thread at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/cache_policy.h"
#include "ops/expert_reads.h"
#include "ops/layer_experts.h"
#include "ops/look_ahead.h"
#include "ops/part_cache.h"
#include "store/store.h"

namespace argosy {

// Counters since the cache was created; hits / lookups is the hit rate. A miss whose read had started before
// the layer needed it counts in reads_ahead, a read-ahead that was not needed in idle_reads; bytes_read
// includes both. Counters of `decode` leave out experts that only prompts chose. Reads of parts that adapters
// bring were begun by guesses (parts_ahead) or by leases (parts_late).
struct LeaseCounts {
  int64_t lookups = 0, hits = 0, bytes_read = 0, reads_ahead = 0, idle_reads = 0, decode_lookups = 0,
          decode_hits = 0, parts_ahead = 0, parts_late = 0;
};

class CachedExperts : public LayerExperts {
 public:
  using Clock = std::chrono::steady_clock;
  using Milliseconds = std::chrono::milliseconds;

  // The layers that share a kind of slots, their policy, and where each slot begins in the arena.
  struct Kind {
    std::shared_ptr<CachePolicy> policy;
    std::vector<int64_t> layers;
    std::vector<int64_t> places;
  };
  struct Options {
    int64_t experts_per_token;
    bool look_ahead;  // whether guesses for decode are read
    // While there is a slot for every expert, also reads experts that no token chose.
    bool reads_all;
  };
  // A read that failed; the lease that needs the expert ends.
  struct Failure {
    ExpertKey key;
    ReadError error;
    std::string message;
    int32_t adapter = -1;  // whose part was read; -1: the expert itself
  };
  // What group() found.
  enum class State { group, waits, done, failed };

  // `keys` are all experts that may be read here.
  CachedExperts(std::shared_ptr<ExpertReads> reads, std::shared_ptr<ExpertTable> table,
                std::vector<Kind> kinds, const std::vector<ExpertKey>& keys, const Options& options);

  // ── leases ──

  // Finds the experts, each named once, and issues reads for those that are missing. `scan` are experts that
  // only prompt tokens chose: they pass through the cache without displacing experts that decode uses. Ends
  // a lease that is still open.
  // `pairs` are the adapters of the tokens that chose each expert.
  void open(int64_t layer, std::vector<int32_t> experts, std::vector<int32_t> scan,
            const PartLease::Pairs& pairs = {});
  void open(int64_t layer, const Dispatch& dispatch);
  bool is_open() const { return lease_.has_value(); }
  // Whether the open lease is for this dispatch, begun by begin().
  bool runs(const Dispatch& dispatch) const { return lease_ && lease_->dispatch.get() == &dispatch; }
  // The next group to compute: handed(). The weights of the one before may move.
  State group();
  const std::vector<int32_t>& handed() const { return lease_->handed; }
  const std::optional<Failure>& failure() const { return lease_->failure; }
  // Waits until a read of the lease has ended, or an early one that keeps a slot from it; false: none did in
  // `most`. nullopt: as long as it takes.
  bool collect(std::optional<Milliseconds> most);
  int64_t num_in_flight() const {
    return lease_ ? int64_t(lease_->in_flight.size()) + parts_.num_in_flight() : 0;
  }
  bool is_short_of_slots() const { return lease_ && !lease_->missing.empty(); }
  // Ends the lease. Only after a whole lease may experts that no token chose be read.
  void close(bool is_whole);
  // The experts that the stack's thread has run already.
  std::vector<int32_t> take_done();

  // ── the hint ──

  bool wants_guess(bool is_sweep) const;
  // Never waits.
  void guess(int64_t layer, const std::vector<std::vector<int32_t>>& by_rank, const PartLease::Pairs& pairs,
             bool is_sweep) override;
  // Gives up what the last hint still holds, except reads that have begun. Never waits. A read that has begun
  // stays among the early ones until it ends: complete, or abandoned halfway.
  void forget_hint();
  // Collects early reads that have ended: frees the slots of failed ones, and keeps experts that landed.
  bool collect_early(std::optional<Milliseconds> most);  // false: none ended
  int64_t num_early() const { return int64_t(early_.size()) + parts_.num_early(); }
  std::vector<ExpertKey> early() const;
  std::vector<ExpertKey> kept() const;  // resident experts of the hint, pinned until the next lease
  // From now on, ranks that are right at least so often are trusted.
  void trust(double least_right);
  const LookAhead& look_ahead(bool is_sweep) const { return look_ahead_[is_sweep]; }

  // ── the whole cache ──

  // From now on, an adapter's experts need these parts; null: none that are read. Ends a lease that is open.
  void set_parts(int32_t adapter, std::shared_ptr<PartCache> parts);
  int64_t num_slots() const;
  int64_t num_resident() const;  // any thread may ask
  bool has_all() const { return num_resident() == num_keys_ && num_early() == 0 && parts_.has_all(); }
  LeaseCounts counts() const;                   // any thread may ask
  int64_t num_run() const { return num_run_; }  // experts that ran in the stack's thread; any thread may ask
  void cancel_early();                          // at the end

  // ── LayerExperts ──

  bool begin(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows, float* out) override;
  bool wants_guess() const override;
  void run_here(Runtime& runtime) override;
  bool wait(std::chrono::nanoseconds most) override;
  double take_run_seconds() override { return std::exchange(run_seconds_, 0.0); }
  int64_t hidden() const override { return table_->hidden(); }
  int64_t experts_per_token() const { return options_.experts_per_token; }

 private:
  struct Ticket {
    int64_t number;
    int32_t expert;
  };
  struct Lease {
    int64_t layer;
    std::vector<int32_t> scan;     // ascending
    std::vector<int32_t> hits;     // not yet handed over, and their parts are here
    std::vector<int32_t> missing;  // the next to be read is last
    std::vector<int32_t> landed;   // not yet handed over, the oldest first; parts may be missing
    std::vector<int32_t> held;     // pinned for what was handed over
    std::vector<int32_t> handed;
    std::vector<Ticket> in_flight;
    std::optional<Failure> failure;
    bool has_guess = false;
    bool lacks_parts = false;  // some of its experts wait for slots of parts
    // What the stack runs.
    std::shared_ptr<const Dispatch> dispatch;
    const float* rows = nullptr;
    float* out = nullptr;
    Runtime* runtime = nullptr;
    std::vector<int32_t> done;
  };
  // Atomic, because other threads read them.
  struct Counters {
    std::atomic<int64_t> lookups = 0, hits = 0, bytes_read = 0, reads_ahead = 0, idle_reads = 0,
                         decode_lookups = 0, decode_hits = 0;
  };
  struct Early {
    ExpertKey key;
    int64_t ticket;
  };

  const Kind& kind_of(int64_t layer) const;
  CachePolicy& policy_of(int64_t layer) const { return *kind_of(layer).policy; }
  std::vector<int64_t> fetch(int64_t layer, const std::vector<std::pair<int32_t, int64_t>>& admitted,
                             Urgency urgency, const std::function<void()>& before = {});
  void find(std::vector<int32_t> experts);
  void issue();
  void request_parts(const std::vector<std::pair<int32_t, int64_t>>& admitted);
  void give_back();
  bool is_scan(int32_t expert) const;
  void read_ahead();
  void add_early(int64_t layer, const std::vector<std::pair<int32_t, int64_t>>& admitted, Urgency urgency,
                 const std::function<void()>& before = {});
  void fill(int64_t layer);
  bool is_early(ExpertKey key) const;
  bool run_groups();  // false: a lease waits for reads, or one has failed

  std::shared_ptr<ExpertReads> reads_;
  std::shared_ptr<ExpertTable> table_;
  std::vector<Kind> kinds_;
  std::vector<int32_t> kind_of_layer_;
  std::vector<std::vector<int32_t>> experts_of_layer_;  // that may be read here
  int64_t num_keys_;
  Options options_;
  bool may_fill_;
  LookAhead look_ahead_[2];  // decode, sweeps
  std::optional<Lease> lease_;
  std::vector<int32_t> hint_;  // experts of hint_layer_ not yet requested; the next is last
  int64_t hint_layer_ = -1;
  bool is_sweep_ = false;      // whether the hint is for a sweep
  std::vector<int32_t> kept_;  // of hint_layer_
  std::vector<Early> early_;   // reads that no lease waits for
  PartLease parts_;
  Counters counters_;
  std::atomic<int64_t> num_run_ = 0;
  double run_seconds_ = 0;
};

}  // namespace argosy
