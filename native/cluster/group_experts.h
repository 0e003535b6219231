// group_experts.h: the experts of a group's layers, run by their owners while nothing goes wrong.
//
//   GroupExperts experts(exchange);
//   experts.use(owners, table);                 // before a step: the owners, and the experts in memory here
//   experts.begin(layer, dispatch, rows, out);  // chooses owners, and asks them
//   experts.run_here(runtime);
//   if (!experts.wait(50ms)) auto begun = experts.take_over();   // an owner failed, is late, or takes long
//
// One thread runs layers, one at a time. The owner that runs an expert is chosen here, for every layer.
// Python decides what happens when one fails: it takes over the ticket, what is owed, and the failures.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cluster/exchange.h"
#include "cluster/owners.h"
#include "ops/layer_experts.h"

namespace argosy {

// Experts requested from owners, counted once per layer and step; an expert that was probably in its owner's
// memory is a hit. Counts of `decode` leave out experts that only prompt tokens chose.
struct AskedCounts {
  int64_t lookups = 0, hits = 0, decode_lookups = 0, decode_hits = 0;
};

class GroupExperts : public LayerExperts {
 public:
  using Clock = std::chrono::steady_clock;

  // A layer that is on its way. The one who takes it over forgets its ticket.
  struct Begun {
    struct Share {
      std::shared_ptr<Owner> owner;
      int64_t peer;
      std::vector<int32_t> experts;  // those that it still owes
      Clock::time_point deadline;
    };
    int64_t layer;
    int64_t ticket;
    std::shared_ptr<Owners> owners;
    std::vector<int32_t> done;  // experts whose outputs are there
    std::vector<Share> shares;
    std::vector<ExchangeEvent> failures;
  };

  explicit GroupExperts(Exchange& exchange) : exchange_(exchange) {}

  // From the next layer on. `table` has every expert that falls to this machine; null: a layer that needs it
  // pauses the step.
  void use(std::shared_ptr<Owners> owners, ExpertTable* table);

  bool begin(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows, float* out) override;
  bool wants_guess() const override;
  void guess(int64_t layer, const std::vector<std::vector<int32_t>>& by_rank,
             const std::vector<std::pair<int32_t, int32_t>>& pairs, bool is_sweep) override;
  void run_here(Runtime& runtime) override;
  bool wait(std::chrono::nanoseconds most) override;
  int64_t hidden() const override { return exchange_.limits().hidden; }

  std::optional<Begun> take_over();  // none: no layer is on its way
  void abandon();                    // forgets the layer that is on its way, if there is one

  // Passes a guess on to the workers concerned; returns the ranks of this machine.
  std::vector<std::vector<int32_t>> guess_for(const Owners& owners, int64_t layer,
                                              const std::vector<std::vector<int32_t>>& by_rank,
                                              bool is_sweep);
  // Whether a worker of these would use a guess.
  static bool wants_guess(const Owners& owners);

  // How long an answer may take: max(4 * usual, 50 ms + bytes / bandwidth). While the times of an owner are
  // hardly known, it has a second, twice the time of its reads, and some more.
  Clock::duration patience(const Owner& owner, int64_t peer, int64_t layer, int64_t num_rows,
                           const std::vector<int32_t>& experts) const;

  void count_asked(const Owner& owner, int64_t layer, const Dispatch& dispatch,
                   const std::vector<int32_t>& experts);
  AskedCounts counts() const;

 private:
  struct Round {
    Begun begun;
    std::shared_ptr<const Dispatch> dispatch;
    const float* rows;
    float* out;
    std::vector<int32_t> local;  // experts for this machine, not run yet
    int64_t num_missing;         // asked of workers, and not there
  };

  void take(Begun& begun, ExchangeEvent event);

  Exchange& exchange_;
  std::shared_ptr<Owners> owners_;
  ExpertTable* table_ = nullptr;
  std::optional<Round> round_;
  std::atomic<int64_t> lookups_ = 0, hits_ = 0, decode_lookups_ = 0, decode_hits_ = 0;
};

}  // namespace argosy
