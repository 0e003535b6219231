// expert_reads.h: reads of experts into the slots of a cache.
//
// StoreReads requests the record of an expert when it is first read, and keeps a table of known records.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "ops/cache_policy.h"
#include "store/arena.h"
#include "store/store.h"

namespace argosy {

// Functions are those of Store.
class ExpertReads {
 public:
  struct Place {
    ExpertKey key;
    int64_t at;  // in the arena
  };
  virtual ~ExpertReads() = default;

  virtual std::vector<int64_t> fetch(const std::vector<Place>& places, Urgency urgency) = 0;
  virtual void hurry(const std::vector<int64_t>& tickets) = 0;
  // nullopt: as long as it takes.
  virtual std::vector<Completion> wait_any(const std::vector<int64_t>& tickets,
                                           std::optional<std::chrono::milliseconds> most) = 0;
  virtual std::vector<int64_t> drop(const std::vector<int64_t>& tickets) = 0;
  virtual void cancel(int64_t ticket) = 0;
  virtual int64_t bytes(ExpertKey key) = 0;  // that are read for one expert
};

// Reads by a store into an arena. What derives from it knows the records.
class ReadsByStore : public ExpertReads {
 public:
  void hurry(const std::vector<int64_t>& tickets) override { store_->hurry(tickets); }
  std::vector<Completion> wait_any(const std::vector<int64_t>& tickets,
                                   std::optional<std::chrono::milliseconds> most) override;
  std::vector<int64_t> drop(const std::vector<int64_t>& tickets) override { return store_->drop(tickets); }
  void cancel(int64_t ticket) override { store_->cancel(ticket); }

 protected:
  ReadsByStore(std::shared_ptr<Store> store, std::shared_ptr<Arena> arena)
      : store_(std::move(store)), arena_(std::move(arena)) {}

  std::vector<int64_t> fetch_records(const std::vector<PlacedRecord>& placed, Urgency urgency) {
    return store_->fetch(*arena_, placed, urgency);
  }

 private:
  std::shared_ptr<Store> store_;
  std::shared_ptr<Arena> arena_;
};

class StoreReads : public ReadsByStore {
 public:
  // The record of an expert, which stays where it is. Called once for each expert.
  using RecordOf = std::function<const Record&(ExpertKey)>;

  StoreReads(std::shared_ptr<Store> store, std::shared_ptr<Arena> arena, RecordOf record_of);

  std::vector<int64_t> fetch(const std::vector<Place>& places, Urgency urgency) override;
  int64_t bytes(ExpertKey key) override { return known(key).nbytes; }

 private:
  struct Known {
    const Record* record = nullptr;
    int64_t nbytes = 0;
  };

  const Known& known(ExpertKey key);

  RecordOf record_of_;
  std::vector<std::vector<Known>> known_;  // by layer and expert
};

}  // namespace argosy
