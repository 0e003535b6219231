// part_cache.h: the parts of experts that adapters bring, as many in memory as there are slots; the others
// are read.
//
//   PartCache: one adapter's slots, their policy, and how parts are read into them
//   PartLease: within a lease of experts, the parts that must be here before each expert runs; and those that
//              guesses read early
//
//   open(layer, pairs, scan)  ->  request(experts), again and again  ->  is_ready(expert)  ->
//   release(experts)
//                             ->  complete() for each read that ended                      ->  close()
//   guess(layer, pairs)  ->  read_ahead(experts)  ->  the next lease's request() takes them over, or forget()
//
// The parts of an expert are admitted together or not at all, and only for experts that have their own slot.
// Whoever holds a slot of parts therefore waits for nothing but reads, and one slot for each adapter is
// enough for any number of experts. Early reads only take slots that the open lease does not wait for, and
// all of them end by themselves.
//
// One thread at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "ops/cache_policy.h"
#include "ops/expert_adapter.h"
#include "ops/expert_reads.h"
#include "ops/experts.h"

namespace argosy {

// Reads of parts from a file in which those of a layer lie one after another, `stride` bytes apart.
class PartReads : public ReadsByStore {
 public:
  struct Layer {
    int64_t begin;  // of its first part, in bytes
    int64_t nbytes;
    std::vector<uint32_t> checksums;  // crc32c_wide of each part; as many as there are experts
  };
  PartReads(std::shared_ptr<Store> store, std::shared_ptr<Arena> arena, int file_id, int64_t stride,
            std::map<int64_t, Layer> layers);

  std::vector<int64_t> fetch(const std::vector<Place>& places, Urgency urgency) override;
  int64_t bytes(ExpertKey key) override { return layer_of(key).nbytes; }

 private:
  const Layer& layer_of(ExpertKey key) const;

  int file_id_;
  int64_t stride_;
  std::map<int64_t, Layer> layers_;
};

struct PartCache {
  std::shared_ptr<ExpertReads> reads;  // of the same store as the experts'
  std::shared_ptr<CachePolicy> policy;
  int64_t slot_bytes;
  int64_t num_parts;                       // of all experts
  std::shared_ptr<ExpertAdapter> adapter;  // learns where parts lie

  bool has_layer(int64_t layer) const { return adapter->part(layer) != nullptr; }
};

class PartLease {
 public:
  using Pairs = std::vector<std::pair<int32_t, int32_t>>;  // expert, adapter
  struct Failure {
    int32_t expert, adapter;
  };

  // Only while no lease is open. Null: the adapter has no parts that are read. Early reads of those that it
  // had are cancelled.
  void set(int32_t adapter, std::shared_ptr<PartCache> parts);
  // Whether every part of every adapter is here; while no lease is open.
  bool has_all() const;

  // The pairs that the tokens of a dispatch need.
  Pairs pairs_of(int64_t layer, const Dispatch& dispatch) const;
  // `scan`, ascending: experts that only prompt tokens chose.
  void open(int64_t layer, const Pairs& pairs, const std::vector<int32_t>& scan);
  bool is_ready(int32_t expert) const;
  // Pins the parts of these experts, takes over early reads, and starts to read what is missing, in this
  // order, while there are slots. Returns false if slots ran out.
  bool request(const std::vector<int32_t>& experts);
  // The experts have run.
  void release(const std::vector<int32_t>& experts);
  int64_t num_in_flight() const { return int64_t(in_flight_.size()); }
  void add_tickets(std::vector<int64_t>& tickets) const;
  // A read has ended; the part whose read failed, if it did. Throws std::logic_error if nobody began it.
  std::optional<Failure> complete(const Completion& completion);
  // None of its reads is in flight then.
  void close();

  // ── parts of guessed experts ──

  // The pairs that the next lease of a layer may need. After forget().
  void guess(int64_t layer, Pairs pairs);
  // Pins the parts of these experts, and starts to read those that are missing and get a slot, in this order.
  // Only while the open lease waits for no slot.
  void read_ahead(const std::vector<int32_t>& experts, bool is_sweep);
  void add_early_tickets(std::vector<int64_t>& tickets) const;
  // An early read has ended; false: it is none of a part.
  bool complete_early(const Completion& completion);
  // Gives up the guess, except reads that have begun: others than `dropped`. They end by themselves.
  void forget(const std::vector<int64_t>& dropped);
  int64_t num_early() const { return int64_t(early_.size()); }
  void cancel_early();  // at the end

  int64_t take_bytes_read() { return std::exchange(bytes_read_, 0); }
  // Reads begun by guesses, and by leases; any thread may ask.
  int64_t num_ahead() const { return num_ahead_.load(std::memory_order_relaxed); }
  int64_t num_late() const { return num_late_.load(std::memory_order_relaxed); }

 private:
  enum class At { away, reading, here };  // reading and here: it has a slot, and is pinned
  struct Part {
    int32_t adapter;
    At at = At::away;
  };
  struct Need {
    int32_t expert;
    bool is_scan;
    std::vector<Part> parts;
  };
  struct Flight {
    int64_t ticket;
    int32_t expert, adapter;
  };
  struct Early {
    int64_t ticket;
    ExpertKey key;
    int32_t adapter;
    bool is_given_up = false;  // it may end without its bytes
  };
  using Missing = std::map<int32_t, std::vector<ExpertReads::Place>>;  // by adapter

  const Need* find(int32_t expert) const;
  Need* find(int32_t expert) { return const_cast<Need*>(std::as_const(*this).find(expert)); }
  Part& part_of(const Flight& flight);
  const Early* find_early(ExpertKey key, int32_t adapter) const;
  bool has_slots(const Need& need) const;
  bool admit(Need& need, Missing& missing);
  void cancel(const Early& early);
  template <class Began, class Dropped>
  void fetch(const Missing& missing, Urgency urgency, const Began& began, const Dropped& dropped);
  void forget(Need& need);

  std::map<int32_t, std::shared_ptr<PartCache>> caches_;  // by adapter
  int64_t layer_ = -1;
  std::vector<Need> needs_;  // by expert
  std::vector<Flight> in_flight_;
  int64_t hint_layer_ = -1;
  Pairs hint_;                                       // ascending
  std::vector<std::pair<ExpertKey, int32_t>> kept_;  // parts of the guess that were here, and are pinned
  std::vector<Early> early_;                         // reads that no lease waits for; pinned
  int64_t bytes_read_ = 0;
  std::atomic<int64_t> num_ahead_ = 0, num_late_ = 0;
};

}  // namespace argosy
