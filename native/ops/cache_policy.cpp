#include "ops/cache_policy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>

namespace argosy {

namespace {

// worth = turn of the last use * kGrowth + kBonusTurns * log2(uses then), and age = turn now * kGrowth -
// worth: as the use count decays, the bonus shrinks by kBonusTurns every kHalfLifeTurns.
constexpr double kGrowth = 1.0 + CachePolicy::kBonusTurns / CachePolicy::kHalfLifeTurns;

constexpr int64_t kDecayTurns = int64_t(20 * CachePolicy::kHalfLifeTurns);

double decay(int64_t turns) {
  static const auto kDecay = [] {
    std::array<double, kDecayTurns> table;
    for (int64_t i = 0; i < kDecayTurns; ++i) {
      table[size_t(i)] = std::pow(0.5, double(i) / CachePolicy::kHalfLifeTurns);
    }
    return table;
  }();
  return kDecay[size_t(turns)];
}

// Void entries are removed from the heap of layers once it has more than this many for each layer.
constexpr size_t kMostEntries = 8;

template <class T>
void push(std::vector<T>& heap, const T& entry) {
  heap.push_back(entry);
  std::push_heap(heap.begin(), heap.end(), std::greater<>());
}

template <class T>
void pop(std::vector<T>& heap) {
  std::pop_heap(heap.begin(), heap.end(), std::greater<>());
  heap.pop_back();
}

template <class T>
void replace_top(std::vector<T>& heap, const T& entry) {
  pop(heap);
  push(heap, entry);
}

std::string text(ExpertKey key) {
  return "layer " + std::to_string(key.layer) + ", expert " + std::to_string(key.expert);
}

}  // namespace

bool CachePolicy::Oldest::operator>(const Oldest& other) const {
  if (bound != other.bound) return bound > other.bound;
  if (passed != other.passed) return passed > other.passed;
  return layer != other.layer ? layer > other.layer : turn > other.turn;
}

CachePolicy::CachePolicy(int64_t num_slots, const std::vector<int64_t>& layers, int64_t experts_per_token)
    : experts_per_token_(experts_per_token) {
  std::vector<int64_t> sorted = layers;
  std::sort(sorted.begin(), sorted.end());
  for (const int64_t layer : sorted) {
    if (layer < 0 || layer > UINT16_MAX) throw std::invalid_argument("no layer " + std::to_string(layer));
    index_of_.resize(size_t(layer) + 1, -1);
    if (index_of_.back() >= 0) throw std::invalid_argument("layer " + std::to_string(layer) + " twice");
    index_of_.back() = int32_t(layers_.size());
    layers_.push_back({.number = layer, .experts = {}, .heap = {}});
  }
  resize(num_slots);
}

int32_t CachePolicy::index_of(int64_t layer) const {
  if (layer < 0 || layer >= int64_t(index_of_.size()) || index_of_[size_t(layer)] < 0)
    throw std::invalid_argument("experts of layer " + std::to_string(layer) + " have no slots here");
  return index_of_[size_t(layer)];
}

CachePolicy::Expert& CachePolicy::expert(int32_t index, int64_t number) {
  std::vector<Expert>& experts = layers_[size_t(index)].experts;
  if (number < 0 || number > INT32_MAX) throw std::invalid_argument("no expert " + std::to_string(number));
  if (number >= int64_t(experts.size())) experts.resize(size_t(number) + 1);
  return experts[size_t(number)];
}

const CachePolicy::Expert* CachePolicy::find(ExpertKey key) const {
  const std::vector<Expert>& experts = layers_[size_t(index_of(key.layer))].experts;
  if (key.expert < 0 || key.expert >= int64_t(experts.size())) return nullptr;
  const Expert& found = experts[size_t(key.expert)];
  return found.slot >= 0 ? &found : nullptr;
}

void CachePolicy::count(int64_t change) {
  std::atomic_ref(num_resident_).store(num_resident_ + change, std::memory_order_relaxed);
}

bool CachePolicy::has(ExpertKey key) const { return find(key) != nullptr; }

std::optional<int64_t> CachePolicy::slot(ExpertKey key) const {
  const Expert* found = find(key);
  return found != nullptr ? std::optional<int64_t>(found->slot) : std::nullopt;
}

// ── the number of slots ──

void CachePolicy::resize(int64_t num_slots) {
  floor_ = std::min(experts_per_token_, num_slots / std::max<int64_t>(1, int64_t(layers_.size())));
  // A sweep gets at most a quarter of the cache, but never less than one token asks for.
  window_slots_ = std::max(experts_per_token_, num_slots / 4);
  // The floor may be lower, so layers may have experts to give.
  for (int32_t index = 0; index < int32_t(layers_.size()); ++index) note_oldest(index);
  for (int64_t beyond = num_resident_ - num_slots; beyond > 0; --beyond) {
    int32_t slot = from_window(false);
    if (slot < 0) slot = evict_oldest(-1);
    if (slot < 0) throw std::invalid_argument("more experts are pinned than there will be slots");
    count(-1);
  }
  num_slots_ = num_slots;
  std::vector<bool> is_used(static_cast<size_t>(num_slots));
  size_t num_beyond = 0;
  for (const Layer& layer : layers_) {
    for (const Expert& expert : layer.experts) {
      if (expert.slot < 0) continue;
      if (expert.slot < num_slots) {
        is_used[size_t(expert.slot)] = true;
      } else {
        ++num_beyond;
      }
    }
  }
  // The last one is taken next. Low slots are, so that few experts have to move when there are fewer slots.
  free_.clear();
  reserved_.clear();
  for (int64_t slot = num_slots - 1; slot >= 0; --slot) {
    if (is_used[size_t(slot)]) continue;
    (reserved_.size() < num_beyond ? reserved_ : free_).push_back(int32_t(slot));
  }
}

std::vector<CachePolicy::Move> CachePolicy::moves(int64_t num_slots) {
  std::vector<Move> moves;
  if (reserved_.empty()) return moves;
  for (Layer& layer : layers_) {
    for (size_t i = 0; i < layer.experts.size() && !reserved_.empty(); ++i) {
      Expert& expert = layer.experts[i];
      if (expert.slot < std::max(num_slots, num_slots_)) continue;
      if (expert.is_pinned) throw std::invalid_argument("a pinned expert cannot move");
      moves.push_back({{int32_t(layer.number), int32_t(i)}, expert.slot, reserved_.back()});
      expert.slot = reserved_.back();
      reserved_.pop_back();
    }
  }
  return moves;
}

// ── leases ──

void CachePolicy::begin(int64_t number) {
  const int32_t index = index_of(number);
  Layer& layer = layers_[size_t(index)];
  ++layer.turn;
  layer.passed = -++clock_;
  if (layer.num_lasting > floor_) note_oldest(index);
  if (oldest_.size() > kMostEntries * layers_.size()) {
    std::erase_if(oldest_,
                  [this](const Oldest& entry) { return entry.turn != layers_[size_t(entry.layer)].turn; });
    std::make_heap(oldest_.begin(), oldest_.end(), std::greater<>());
  }
}

void CachePolicy::use(int64_t layer, const std::vector<int32_t>& experts, bool is_scan) {
  const int32_t index = index_of(layer);
  for (const int32_t number : experts) {
    Expert& used = expert(index, number);
    if (used.slot < 0) throw std::invalid_argument(text({int32_t(layer), number}) + " has no slot");
    set_pinned(used, true);
    if (is_scan) continue;
    if (used.is_in_window) {
      keep(index, number, leave_window(index, number));
    } else {
      used.worth = count_use(layers_[size_t(index)], used);
    }
  }
}

std::optional<int64_t> CachePolicy::admit(ExpertKey key, bool is_scan, bool is_guess) {
  const int32_t index = index_of(key.layer);
  if (expert(index, key.expert).slot >= 0) throw std::invalid_argument(text(key) + " has a slot already");
  int32_t slot = -1;
  if (!free_.empty()) {
    slot = free_.back();
    free_.pop_back();
    count(1);
  } else if (is_guess) {
    slot = window_size_ < guess_slots() ? evict_oldest(index) : from_window(false);
  } else if (is_scan) {
    slot = slot_for_sweep(index);
  } else {
    slot = from_window(false);
    if (slot < 0) slot = evict_oldest(index);
  }
  if (slot < 0) return std::nullopt;
  if (is_scan) {
    enter_window(index, key.expert, slot);
  } else {
    keep(index, key.expert, slot);
  }
  set_pinned(expert(index, key.expert), true);
  return slot;
}

void CachePolicy::unpin(int64_t layer, const std::vector<int32_t>& experts) {
  const int32_t index = index_of(layer);
  for (const int32_t number : experts) set_pinned(expert(index, number), false);
}

void CachePolicy::drop(ExpertKey key) {
  const int32_t index = index_of(key.layer);
  Expert& dropped = expert(index, key.expert);
  if (dropped.slot < 0) throw std::invalid_argument(text(key) + " has no slot");
  set_pinned(dropped, false);
  int32_t slot = dropped.is_in_window ? leave_window(index, key.expert) : take(index, key.expert);
  if (slot >= num_slots_) {  // that slot goes
    slot = reserved_.back();
    reserved_.pop_back();
  }
  free_.push_back(slot);
  count(-1);
}

// ── one expert ──

double CachePolicy::count_use(Layer& layer, Expert& used) const {
  double uses = 1.0;
  if (used.uses_turn >= 0 && layer.turn - used.uses_turn < kDecayTurns) {
    uses += used.uses * decay(layer.turn - used.uses_turn);
  }
  used.uses = uses;
  used.uses_turn = layer.turn;
  return double(layer.turn) * kGrowth + kBonusTurns * std::log2(uses);
}

// Keeps an expert in its slot beyond the window, and counts a use.
void CachePolicy::keep(int32_t index, int32_t number, int32_t slot) {
  Layer& layer = layers_[size_t(index)];
  Expert& kept = layer.experts[size_t(number)];
  kept.worth = count_use(layer, kept);
  kept.slot = slot;
  push(layer.heap, {kept.worth, number});
  const int64_t above = ++layer.num_lasting - floor_;
  if (above == 1 || (above > 1 && layer.heap.front().expert == number)) note_oldest(index);
}

int32_t CachePolicy::take(int32_t index, int32_t number) {
  Layer& layer = layers_[size_t(index)];
  --layer.num_lasting;
  return std::exchange(layer.experts[size_t(number)].slot, -1);
}

void CachePolicy::set_pinned(Expert& of, bool is_pinned) {
  if (of.is_in_window) pinned_in_window_ += int64_t(is_pinned) - int64_t(of.is_pinned);
  of.is_pinned = is_pinned;
}

// ── the window ──

void CachePolicy::enter_window(int32_t index, int32_t number, int32_t slot) {
  const ExpertKey key = {index, number};
  Expert& entering = at(key);
  entering.slot = slot;
  entering.is_in_window = true;
  entering.older = window_newest_;
  entering.newer = kNone;
  (window_newest_ == kNone ? window_oldest_ : at(window_newest_).newer) = key;
  window_newest_ = key;
  ++window_size_;
  pinned_in_window_ += entering.is_pinned;
}

int32_t CachePolicy::leave_window(int32_t index, int32_t number) {
  Expert& leaving = at({index, number});
  (leaving.older == kNone ? window_oldest_ : at(leaving.older).newer) = leaving.newer;
  (leaving.newer == kNone ? window_newest_ : at(leaving.newer).older) = leaving.older;
  leaving.older = leaving.newer = kNone;
  leaving.is_in_window = false;
  --window_size_;
  pinned_in_window_ -= leaving.is_pinned;
  return std::exchange(leaving.slot, -1);
}

// A slot from others while the window is small, then from the window; at most its size is pinned at once.
int32_t CachePolicy::slot_for_sweep(int32_t index) {
  if (pinned_in_window_ >= window_slots_) return -1;
  const int32_t slot = window_size_ < window_slots_ ? evict_oldest(index) : -1;
  return slot >= 0 ? slot : from_window(true);
}

int32_t CachePolicy::from_window(bool newest) {
  ExpertKey key = newest ? window_newest_ : window_oldest_;
  while (key != kNone && at(key).is_pinned) key = newest ? at(key).older : at(key).newer;
  return key != kNone ? leave_window(key.layer, key.expert) : -1;
}

// ── the oldest ──

void CachePolicy::note_oldest(int32_t index) {
  const Layer& layer = layers_[size_t(index)];
  if (layer.heap.empty()) return;
  const double bound = layer.heap.front().worth - double(layer.turn) * kGrowth;
  push(oldest_, {bound, layer.passed, index, layer.turn});
}

// The slot of the oldest unpinned expert; a layer at its floor gives one only as a last resort. The layer
// that asks may give one at its floor, too, because it gets one.
int32_t CachePolicy::evict_oldest(int32_t asking) {
  if (asking >= 0 && layers_[size_t(asking)].num_lasting <= floor_) note_oldest(asking);
  int32_t slot = evict(asking, floor_);
  if (slot < 0 && floor_ > 0) {
    for (int32_t index = 0; index < int32_t(layers_.size()); ++index) note_oldest(index);
    slot = evict(asking, 0);
  }
  return slot;
}

int32_t CachePolicy::evict(int32_t asking, int64_t floor) {
  int32_t slot = -1;
  Pinned pinned;
  while (!oldest_.empty() && slot < 0) {
    const Oldest entry = oldest_.front();
    Layer& layer = layers_[size_t(entry.layer)];
    if (entry.turn != layer.turn || (entry.layer != asking && layer.num_lasting <= floor)) {
      pop(oldest_);
      continue;
    }
    const std::optional<double> worth = least_worth(entry.layer, pinned);
    if (!worth) {
      pop(oldest_);
      continue;
    }
    const double bound = *worth - double(entry.turn) * kGrowth;
    if (bound > entry.bound) {
      replace_top(oldest_, {bound, entry.passed, entry.layer, entry.turn});
    } else {
      const int32_t number = layer.heap.front().expert;
      pop(layer.heap);
      slot = take(entry.layer, number);
    }
  }
  for (const auto& [index, worth] : pinned) push(layers_[size_t(index)].heap, worth);
  for (size_t i = 0; i < pinned.size(); ++i) {
    const auto same_layer = [&](const auto& other) { return other.first == pinned[i].first; };
    if (std::none_of(pinned.begin(), pinned.begin() + int64_t(i), same_layer)) note_oldest(pinned[i].first);
  }
  return slot;
}

// Brings a layer's oldest unpinned expert to the top of its heap, and moves the pinned ones before it to
// `pinned`.
std::optional<double> CachePolicy::least_worth(int32_t index, Pinned& pinned) {
  Layer& layer = layers_[size_t(index)];
  while (!layer.heap.empty()) {
    const Worth top = layer.heap.front();
    const Expert& oldest = layer.experts[size_t(top.expert)];
    if (!oldest.is_lasting()) {  // it was dropped
      pop(layer.heap);
    } else if (oldest.worth != top.worth) {  // it was used since
      replace_top(layer.heap, {oldest.worth, top.expert});
    } else if (oldest.is_pinned) {
      pinned.emplace_back(index, top);
      pop(layer.heap);
    } else {
      return top.worth;
    }
  }
  return std::nullopt;
}

// ── what is where ──

template <class Is>
std::vector<ExpertKey> CachePolicy::keys_where(const Is& is) const {
  std::vector<ExpertKey> found;
  for (const Layer& layer : layers_) {
    for (size_t i = 0; i < layer.experts.size(); ++i) {
      if (is(layer.experts[i])) found.push_back({int32_t(layer.number), int32_t(i)});
    }
  }
  return found;
}

std::vector<ExpertKey> CachePolicy::resident() const {
  return keys_where([](const Expert& expert) { return expert.slot >= 0; });
}

std::vector<ExpertKey> CachePolicy::pinned() const {
  return keys_where([](const Expert& expert) { return expert.is_pinned; });
}

std::vector<CachePolicy::Age> CachePolicy::ages() const {
  std::vector<Age> found;
  for (const Layer& layer : layers_) {
    for (size_t i = 0; i < layer.experts.size(); ++i) {
      const Expert& expert = layer.experts[i];
      if (!expert.is_lasting()) continue;
      found.push_back({{int32_t(layer.number), int32_t(i)},
                       double(layer.turn) * kGrowth - expert.worth,
                       -layer.passed,
                       expert.is_pinned});
    }
  }
  return found;
}

std::vector<ExpertKey> CachePolicy::window() const {
  std::vector<ExpertKey> found;
  for (ExpertKey key = window_oldest_; key != kNone;) {
    const Layer& layer = layers_[size_t(key.layer)];
    found.push_back({int32_t(layer.number), key.expert});
    key = layer.experts[size_t(key.expert)].newer;
  }
  return found;
}

int64_t CachePolicy::bytes(int64_t num_slots, int64_t num_layers, int64_t num_experts) {
  // A vector may have twice the room that it needs. An expert that was dropped leaves an entry in its heap.
  const int64_t layer = int64_t(sizeof(Layer)) + 2 * num_experts * int64_t(sizeof(Expert));
  const int64_t entries = 2 * int64_t(kMostEntries + 1) * int64_t(sizeof(Oldest));
  const int64_t slot = 2 * 2 * int64_t(sizeof(Worth)) + 2 * 2 * int64_t(sizeof(int32_t));
  return int64_t(sizeof(CachePolicy)) + num_layers * (layer + entries + int64_t(sizeof(int32_t))) +
         num_slots * slot;
}

}  // namespace argosy
