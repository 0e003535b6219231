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
  forget({});
  std::erase_if(early_, [&](const Early& early) {
    if (early.adapter != adapter) return false;
    cancel(early);
    return true;
  });
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

const PartLease::Early* PartLease::find_early(ExpertKey key, int32_t adapter) const {
  const auto found = std::find_if(early_.begin(), early_.end(), [&](const Early& early) {
    return early.key == key && early.adapter == adapter;
  });
  return found != early_.end() ? &*found : nullptr;
}

// Whether every part of an expert is here, or on its way.
bool PartLease::has_slots(const Need& need) const {
  const ExpertKey key = {int32_t(layer_), need.expert};
  return std::all_of(need.parts.begin(), need.parts.end(), [&](const Part& part) {
    const Early* early = find_early(key, part.adapter);
    return early != nullptr ? !early->is_given_up : caches_.at(part.adapter)->policy->has(key);
  });
}

// Pins all parts of an expert, and adds those to `missing` that must be read; false: one got no slot, and
// nothing has changed.
bool PartLease::admit(Need& need, Missing& missing) {
  const ExpertKey key = {int32_t(layer_), need.expert};
  std::vector<std::pair<int32_t, int64_t>> slots;
  for (const Part& part : need.parts) {
    CachePolicy& policy = *caches_.at(part.adapter)->policy;
    const Early* early = find_early(key, part.adapter);
    if (early == nullptr && policy.has(key)) continue;
    if (early != nullptr && !early->is_given_up) continue;
    const std::optional<int64_t> slot = early == nullptr ? policy.admit(key, need.is_scan) : std::nullopt;
    if (!slot) {
      for (const auto& [adapter, admitted] : slots) caches_.at(adapter)->policy->drop(key);
      return false;
    }
    slots.emplace_back(part.adapter, *slot);
  }
  std::vector<int64_t> early_tickets;
  for (Part& part : need.parts) {
    const PartCache& cache = *caches_.at(part.adapter);
    const auto admitted =
        std::find_if(slots.begin(), slots.end(), [&](const auto& one) { return one.first == part.adapter; });
    if (admitted != slots.end()) {
      part.at = At::reading;
      missing[part.adapter].push_back({key, admitted->second * cache.slot_bytes});
      continue;
    }
    cache.policy->use(layer_, {need.expert}, need.is_scan);
    std::erase(kept_, std::pair(key, part.adapter));
    if (const Early* early = find_early(key, part.adapter)) {
      part.at = At::reading;
      cache.reads->hurry({early->ticket});
      in_flight_.push_back({early->ticket, need.expert, part.adapter});
      early_.erase(early_.begin() + (early - early_.data()));
    } else {
      part.at = At::here;
    }
  }
  return true;
}

// Starts reads of parts that were just admitted. began(key, adapter, ticket) for each; if one cannot begin,
// dropped(key, adapter) for those that did not, which lose their slots.
template <class Began, class Dropped>
void PartLease::fetch(const Missing& missing, Urgency urgency, const Began& began, const Dropped& dropped) {
  for (auto at = missing.begin(); at != missing.end(); ++at) {
    const auto& [adapter, places] = *at;
    const PartCache& cache = *caches_.at(adapter);
    try {
      for (const auto& [key, place] : places) cache.adapter->place(key.layer, key.expert, place);
      const std::vector<int64_t> tickets = cache.reads->fetch(places, urgency);
      for (size_t i = 0; i < tickets.size(); ++i) began(places[i].key, adapter, tickets[i]);
    } catch (...) {
      for (; at != missing.end(); ++at) {
        for (const ExpertReads::Place& place : at->second) {
          caches_.at(at->first)->policy->drop(place.key);
          dropped(place.key, at->first);
        }
      }
      throw;
    }
  }
}

bool PartLease::request(const std::vector<int32_t>& experts) {
  if (needs_.empty()) return true;
  Missing missing;
  bool is_enough = true;
  for (const bool has_all : {true, false}) {  // before a missing part can evict one of them
    for (const int32_t expert : experts) {
      Need* need = find(expert);
      if (need == nullptr || need->parts.front().at != At::away) continue;  // all are away, or none
      if (has_all && !has_slots(*need)) continue;
      is_enough = admit(*need, missing);
      if (!is_enough) break;
    }
  }
  fetch(
      missing, Urgency::now,
      [&](ExpertKey key, int32_t adapter, int64_t ticket) {
        in_flight_.push_back({ticket, key.expert, adapter});
        num_late_ += 1;
      },
      [&](ExpertKey key, int32_t adapter) { part_of({0, key.expert, adapter}).at = At::away; });
  return is_enough;
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

// ── parts of guessed experts ──

void PartLease::guess(int64_t layer, Pairs pairs) {
  std::erase_if(pairs, [&](const auto& pair) {
    const auto cache = caches_.find(pair.second);
    return cache == caches_.end() || !cache->second->has_layer(layer);
  });
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  hint_ = std::move(pairs);
  hint_layer_ = layer;
}

void PartLease::read_ahead(const std::vector<int32_t>& experts, bool is_sweep) {
  if (hint_.empty()) return;
  Missing missing;
  for (const int32_t expert : experts) {
    const ExpertKey key = {int32_t(hint_layer_), expert};
    const auto first = std::lower_bound(hint_.begin(), hint_.end(), std::pair(expert, int32_t{0}));
    for (auto pair = first; pair != hint_.end() && pair->first == expert; ++pair) {
      const int32_t adapter = pair->second;
      const PartCache& cache = *caches_.at(adapter);
      if (find_early(key, adapter) != nullptr) continue;
      if (cache.policy->has(key)) {
        cache.policy->use(hint_layer_, {expert}, true);  // the reads of others must not displace it
        kept_.emplace_back(key, adapter);
      } else if (const std::optional<int64_t> slot = cache.policy->admit(key, true, !is_sweep)) {
        missing[adapter].push_back({key, *slot * cache.slot_bytes});
      }
    }
  }
  fetch(
      missing, is_sweep ? Urgency::soon : Urgency::maybe,
      [&](ExpertKey key, int32_t adapter, int64_t ticket) {
        early_.push_back({ticket, key, adapter});
        num_ahead_ += 1;
      },
      [](ExpertKey, int32_t) {});
}

void PartLease::add_early_tickets(std::vector<int64_t>& tickets) const {
  for (const Early& early : early_) tickets.push_back(early.ticket);
}

bool PartLease::complete_early(const Completion& completion) {
  const auto found = std::find_if(early_.begin(), early_.end(),
                                  [&](const Early& one) { return one.ticket == completion.ticket; });
  if (found == early_.end()) return false;
  const Early early = *found;
  early_.erase(found);
  const PartCache& cache = *caches_.at(early.adapter);
  if (completion.error == ReadError::none) {
    cache.policy->unpin(early.key.layer, {early.key.expert});
    bytes_read_ += cache.reads->bytes(early.key);
  } else {  // it was abandoned halfway; or a lease that needs the part will read it again and get the error
    cache.policy->drop(early.key);
  }
  return true;
}

void PartLease::forget(const std::vector<int64_t>& dropped) {
  hint_.clear();
  for (const auto& [key, adapter] : kept_) caches_.at(adapter)->policy->unpin(key.layer, {key.expert});
  kept_.clear();
  std::erase_if(early_, [&](Early& early) {
    early.is_given_up = true;
    if (std::find(dropped.begin(), dropped.end(), early.ticket) == dropped.end()) return false;
    caches_.at(early.adapter)->policy->drop(early.key);
    return true;
  });
}

void PartLease::cancel(const Early& early) {
  const PartCache& cache = *caches_.at(early.adapter);
  cache.reads->cancel(early.ticket);
  cache.policy->drop(early.key);
}

void PartLease::cancel_early() {
  for (const Early& early : early_) cancel(early);
  early_.clear();
}

}  // namespace argosy
