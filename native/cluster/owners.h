// owners.h: the hosts that may run an expert, the experts that each of them probably has in memory, and the
// choice among them.
//
//   const auto owner = std::make_shared<Owner>("10.0.0.2:7070");
//   const auto owners = std::make_shared<Owners>(hosts, here, num_layers, num_experts, replicas, table);
//   for (const OwnerShare& share : owners->choose(layer, dispatch.experts())) ...
//
// An Owner lives as long as its host is in the group, whatever happens to its connection; the thread that
// runs layers and the one that keeps connections both read and change it. Owners, the table, never changes: a
// group that plans anew makes another one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace argosy {

// A worker, or this machine.
class Owner : public std::enable_shared_from_this<Owner> {
 public:
  explicit Owner(std::string name) : name_(std::move(name)) {}
  Owner(const Owner&) = delete;
  Owner& operator=(const Owner&) = delete;

  const std::string& name() const { return name_; }

  std::atomic<int64_t> peer = 0;           // its number in the exchange; 0: not connected, or this machine
  std::atomic<bool> is_slow = false;       // it was late, and still owes an answer
  std::atomic<bool> is_set_aside = false;  // it computed something else than others
  std::atomic<bool> is_resident = false;   // every expert is in its memory

  // Counts of experts, once per layer and step: experts that it ran, that went to another owner after it,
  // that another owner also computed, and whose bits then differed.
  std::atomic<int64_t> num_run = 0, num_rerouted = 0, num_verified = 0, num_mismatches = 0;

  // Estimates the seconds that an expert takes here; a drive of 0 bytes per second is unknown.
  void set_rates(int64_t record_bytes, double disk_bytes_per_s);
  double hit_s() const { return hit_s_; }    // for an expert in memory
  double miss_s() const { return miss_s_; }  // for an expert that is read first

  // From now on remembers the last `num_slots` experts that it ran, and no earlier one. Takes 8 bytes for
  // each expert of the model.
  void remember(int64_t num_slots, int64_t num_layers, int64_t num_experts);
  void forget();                                                  // it may have been started again
  void note(int64_t layer, const std::vector<int32_t>& experts);  // it has run these
  bool has(int64_t layer, int64_t expert) const;                  // probably in memory
  int64_t num_remembered() const;

 private:
  void clear();
  void unlink(int32_t key);
  int32_t key_of(int64_t layer, int64_t expert) const;  // negative for an expert that there is not

  const std::string name_;
  std::atomic<double> hit_s_ = 0, miss_s_ = 0;
  mutable std::mutex mutex_;  // guards what follows: a list of layer * num_experts + expert, by last use
  int64_t num_slots_ = 0, num_layers_ = 0, num_experts_ = 0, count_ = 0;
  int32_t newest_ = -1, oldest_ = -1;
  std::vector<int32_t> newer_, older_;
};

struct OwnerShare {
  std::shared_ptr<Owner> owner;
  std::vector<int32_t> experts;
};

class Owners : public std::enable_shared_from_this<Owners> {
 public:
  static constexpr int64_t kMostHosts = 256;

  // table [num_layers][num_experts][replicas]: indices of `hosts`, the first owner before the second; -1
  // where there are fewer. `here` is this machine, one of the hosts or null. Throws std::invalid_argument for
  // sizes or indices that do not fit.
  Owners(std::vector<std::shared_ptr<Owner>> hosts, std::shared_ptr<Owner> here, int64_t num_layers,
         int64_t num_experts, int64_t replicas, std::vector<int16_t> table);

  const std::vector<std::shared_ptr<Owner>>& hosts() const { return hosts_; }
  const std::shared_ptr<Owner>& here() const { return here_; }  // null: this machine runs no experts

  // These throw std::invalid_argument for a layer or an expert that there is not.
  std::vector<std::shared_ptr<Owner>> owners_of(int64_t layer, int64_t expert) const;

  // Returns the hosts that can be asked for an expert now and were not tried: owners that should answer in
  // time, or else this machine, or else slow owners.
  std::vector<std::shared_ptr<Owner>> candidates(int64_t layer, int64_t expert,
                                                 const std::vector<const Owner*>& tried = {}) const;

  // Gives each expert of a layer to a candidate: one that has it in memory, otherwise the one that is done
  // first. Assigns hits first, because a busy drive does not delay them, and then each miss to the host with
  // the shorter queue; on a tie the first owner wins. Leaves out experts without a candidate.
  std::vector<OwnerShare> choose(int64_t layer, const std::vector<int32_t>& experts) const;

  // Splits a guess among the hosts that will be asked, as far as it is known: by host, by rank. A host that
  // has everything in memory gets nothing.
  std::vector<std::vector<std::vector<int32_t>>> split_guess(
      int64_t layer, const std::vector<std::vector<int32_t>>& by_rank) const;

  // Whether an owner can be asked now and is expected to answer in time.
  bool is_usable(const Owner& owner) const {
    return &owner == here_.get() || (owner.peer != 0 && !owner.is_slow && !owner.is_set_aside);
  }

 private:
  const int16_t* row_of(int64_t layer, int64_t expert) const;
  void find_candidates(int64_t layer, int64_t expert, const std::vector<const Owner*>& tried,
                       std::vector<int16_t>& found) const;

  const std::vector<std::shared_ptr<Owner>> hosts_;
  const std::shared_ptr<Owner> here_;
  const int64_t num_layers_, num_experts_, replicas_;
  const std::vector<int16_t> table_;
};

}  // namespace argosy
