// expert_reads.cpp: the table of known records.

#include "ops/expert_reads.h"

#include <utility>

namespace argosy {

StoreReads::StoreReads(std::shared_ptr<Store> store, std::shared_ptr<Arena> arena, RecordOf record_of)
    : ReadsByStore(std::move(store), std::move(arena)), record_of_(std::move(record_of)) {}

std::vector<int64_t> StoreReads::fetch(const std::vector<Place>& places, Urgency urgency) {
  std::vector<PlacedRecord> placed;
  placed.reserve(places.size());
  for (const auto& [key, at] : places) placed.push_back({*known(key).record, at});
  return fetch_records(placed, urgency);
}

std::vector<Completion> ReadsByStore::wait_any(const std::vector<int64_t>& tickets,
                                               std::optional<std::chrono::milliseconds> most) {
  if (most) return store_->wait_any(tickets, *most);
  std::vector<Completion> done;
  while (done.empty() && !tickets.empty()) done = store_->wait_any(tickets, std::chrono::seconds(1));
  return done;
}

const StoreReads::Known& StoreReads::known(ExpertKey key) {
  if (key.layer >= int64_t(known_.size())) known_.resize(size_t(key.layer) + 1);
  std::vector<Known>& layer = known_[size_t(key.layer)];
  if (key.expert >= int64_t(layer.size())) layer.resize(size_t(key.expert) + 1);
  Known& found = layer[size_t(key.expert)];
  if (found.record == nullptr) {
    const Record& record = record_of_(key);
    for (const Piece& piece : record.pieces) found.nbytes += piece.nbytes;
    found.record = &record;
  }
  return found;
}

}  // namespace argosy
