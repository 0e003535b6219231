#include "ops/part_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace argosy {

PartReads::PartReads(std::shared_ptr<Store> store, std::shared_ptr<Arena> arena, int file_id, int64_t stride,
                     std::map<int64_t, Layer> layers)
    : ReadsByStore(std::move(store), std::move(arena)),
      file_id_(file_id),
      stride_(stride),
      layers_(std::move(layers)) {
  for (const auto& [number, layer] : layers_) {
    if (layer.begin < 0 || layer.nbytes <= 0 || layer.nbytes > stride_)
      throw std::invalid_argument("the parts of layer " + std::to_string(number) + " are " +
                                  std::to_string(layer.nbytes) + " bytes each, expected 1 to " +
                                  std::to_string(stride_));
  }
}

const PartReads::Layer& PartReads::layer_of(ExpertKey key) const {
  const auto found = layers_.find(key.layer);
  if (found == layers_.end() || key.expert < 0 || key.expert >= int64_t(found->second.checksums.size()))
    throw std::invalid_argument("layer " + std::to_string(key.layer) + ", expert " +
                                std::to_string(key.expert) + " has no part here");
  return found->second;
}

std::vector<int64_t> PartReads::fetch(const std::vector<Place>& places, Urgency urgency) {
  std::vector<Record> records;
  records.reserve(places.size());
  std::vector<PlacedRecord> placed;
  placed.reserve(places.size());
  for (const auto& [key, at] : places) {
    const Layer& layer = layer_of(key);
    const int64_t begin = layer.begin + key.expert * stride_;
    records.push_back({{{file_id_, begin, layer.nbytes, 0}}, {layer.checksums[size_t(key.expert)]}});
    placed.push_back({records.back(), at});
  }
  return fetch_records(placed, urgency);
}

void PartLease::set(int32_t adapter, std::shared_ptr<PartCache> parts) {
  if (layer_ >= 0) throw std::invalid_argument("a lease is open");
  if (parts == nullptr) {
    caches_.erase(adapter);
  } else {
    caches_[adapter] = std::move(parts);
  }
}

bool PartLease::has_all() const {
  return std::all_of(caches_.begin(), caches_.end(), [](const auto& entry) {
    return entry.second->policy->num_resident() == entry.second->num_parts;
  });
}

PartLease::Pairs PartLease::pairs_of(int64_t layer, const Dispatch& dispatch) const {
  Pairs pairs;
  if (caches_.empty() || !dispatch.has_adapters()) return pairs;
  for (size_t i = 0; i < dispatch.experts().size(); ++i) {
    const size_t first = pairs.size();
    for (int32_t at = dispatch.starts()[i]; at < dispatch.starts()[i + 1]; ++at) {
      const int32_t adapter = dispatch.adapter_of(dispatch.token_of(dispatch.assignments()[size_t(at)]));
      const auto found = caches_.find(adapter);
      if (found == caches_.end() || !found->second->has_layer(layer)) continue;
      const std::pair<int32_t, int32_t> pair = {dispatch.experts()[i], adapter};
      if (std::find(pairs.begin() + int64_t(first), pairs.end(), pair) == pairs.end()) pairs.push_back(pair);
    }
  }
  return pairs;
}

void PartLease::open(int64_t layer, const Pairs& pairs, const std::vector<int32_t>& scan) {
  close();
  layer_ = layer;
  Pairs sorted = pairs;
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  std::vector<int32_t> in_decode;
  for (const auto& [expert, adapter] : sorted) {
    const auto cache = caches_.find(adapter);
    if (cache == caches_.end() || !cache->second->has_layer(layer)) continue;
    const bool is_scan = std::binary_search(scan.begin(), scan.end(), expert);
    if (needs_.empty() || needs_.back().expert != expert) needs_.push_back({expert, is_scan, {}});
    needs_.back().parts.push_back({adapter});
    if (!is_scan && std::find(in_decode.begin(), in_decode.end(), adapter) == in_decode.end()) {
      in_decode.push_back(adapter);
      cache->second->policy->begin(layer);
    }
  }
}

const PartLease::Need* PartLease::find(int32_t expert) const {
  const auto found = std::lower_bound(needs_.begin(), needs_.end(), expert,
                                      [](const Need& need, int32_t number) { return need.expert < number; });
  return found != needs_.end() && found->expert == expert ? &*found : nullptr;
}

PartLease::Part& PartLease::part_of(const Flight& flight) {
  for (Part& part : find(flight.expert)->parts) {
    if (part.adapter == flight.adapter) return part;
  }
  throw std::logic_error("a part is read that nobody needs");
}

bool PartLease::is_ready(int32_t expert) const {
  const Need* need = find(expert);
  return need == nullptr || std::all_of(need->parts.begin(), need->parts.end(),
                                        [](const Part& part) { return part.at == At::here; });
}

// Pins all parts of an expert, and adds those to `missing` that must be read; false: one got no slot, and
// nothing has changed.
bool PartLease::admit(Need& need, std::map<int32_t, std::vector<ExpertReads::Place>>& missing) {
  const ExpertKey key = {int32_t(layer_), need.expert};
  std::vector<std::pair<int32_t, int64_t>> slots;
  for (const Part& part : need.parts) {
    CachePolicy& policy = *caches_.at(part.adapter)->policy;
    if (policy.has(key)) continue;
    const std::optional<int64_t> slot = policy.admit(key, need.is_scan);
    if (!slot) {
      for (const auto& [adapter, admitted] : slots) caches_.at(adapter)->policy->drop(key);
      return false;
    }
    slots.emplace_back(part.adapter, *slot);
  }
  for (Part& part : need.parts) {
    const PartCache& cache = *caches_.at(part.adapter);
    const auto admitted =
        std::find_if(slots.begin(), slots.end(), [&](const auto& one) { return one.first == part.adapter; });
    if (admitted == slots.end()) {
      cache.policy->use(layer_, {need.expert}, need.is_scan);
      part.at = At::here;
    } else {
      part.at = At::reading;
      missing[part.adapter].push_back({key, admitted->second * cache.slot_bytes});
    }
  }
  return true;
}

bool PartLease::request(const std::vector<int32_t>& experts) {
  if (needs_.empty()) return true;
  std::map<int32_t, std::vector<ExpertReads::Place>> missing;
  bool has_slots = true;
  for (const int32_t expert : experts) {
    Need* need = find(expert);
    if (need == nullptr || need->parts.front().at != At::away) continue;  // all are away, or none
    has_slots = admit(*need, missing);
    if (!has_slots) break;
  }
  for (auto at = missing.begin(); at != missing.end(); ++at) {
    const auto& [adapter, places] = *at;
    const PartCache& cache = *caches_.at(adapter);
    try {
      for (const auto& [key, place] : places) cache.adapter->place(key.layer, key.expert, place);
      const std::vector<int64_t> tickets = cache.reads->fetch(places, Urgency::now);
      for (size_t i = 0; i < tickets.size(); ++i)
        in_flight_.push_back({tickets[i], places[i].key.expert, adapter});
    } catch (...) {
      for (; at != missing.end(); ++at) {
        for (const ExpertReads::Place& place : at->second) {
          caches_.at(at->first)->policy->drop(place.key);
          part_of({0, place.key.expert, at->first}).at = At::away;
        }
      }
      throw;
    }
  }
  return has_slots;
}

// Unpins the parts that are here.
void PartLease::forget(Need& need) {
  for (Part& part : need.parts) {
    if (part.at == At::here) caches_.at(part.adapter)->policy->unpin(layer_, {need.expert});
    part.at = At::away;
  }
}

void PartLease::release(const std::vector<int32_t>& experts) {
  for (const int32_t expert : experts) {
    if (Need* need = find(expert)) forget(*need);
  }
}

void PartLease::add_tickets(std::vector<int64_t>& tickets) const {
  for (const Flight& flight : in_flight_) tickets.push_back(flight.ticket);
}

std::optional<PartLease::Failure> PartLease::complete(const Completion& completion) {
  const auto flight = std::find_if(in_flight_.begin(), in_flight_.end(),
                                   [&](const Flight& one) { return one.ticket == completion.ticket; });
  if (flight == in_flight_.end()) throw std::logic_error("a read ended that nobody began");
  const Flight ended = *flight;
  in_flight_.erase(flight);
  const PartCache& cache = *caches_.at(ended.adapter);
  const ExpertKey key = {int32_t(layer_), ended.expert};
  Part& part = part_of(ended);
  if (completion.error == ReadError::none) {
    part.at = At::here;
    bytes_read_ += cache.reads->bytes(key);
    return std::nullopt;
  }
  part.at = At::away;
  cache.policy->drop(key);
  return Failure{ended.expert, ended.adapter};
}

void PartLease::close() {
  for (const Flight& flight : in_flight_) {
    const PartCache& cache = *caches_.at(flight.adapter);
    cache.reads->cancel(flight.ticket);
    cache.policy->drop({int32_t(layer_), flight.expert});
    part_of(flight).at = At::away;
  }
  in_flight_.clear();
  for (Need& need : needs_) forget(need);
  needs_.clear();
  layer_ = -1;
}

}  // namespace argosy
