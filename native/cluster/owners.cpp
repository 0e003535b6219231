#include "cluster/owners.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace argosy {

namespace {

constexpr double kMemoryBytesPerS = 1e10;  // an estimate of how fast experts in memory run
constexpr double kUsualDisk = 5e8;         // bytes per second of a drive of which nothing is known
constexpr int32_t kEnd = -1, kAbsent = -2;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

}  // namespace

// ── one owner
// ───────────────────────────────────────────────────────────────────────────────────────────────

void Owner::set_rates(int64_t record_bytes, double disk_bytes_per_s) {
  hit_s_ = double(record_bytes) / kMemoryBytesPerS;
  miss_s_ = hit_s_ + double(record_bytes) / (disk_bytes_per_s > 0 ? disk_bytes_per_s : kUsualDisk);
}

void Owner::remember(int64_t num_slots, int64_t num_layers, int64_t num_experts) {
  if (num_slots < 0 || num_layers < 0 || num_experts < 0 ||
      (num_experts > 0 && num_layers > std::numeric_limits<int32_t>::max() / num_experts)) {
    refuse("a model of " + std::to_string(num_layers) + " layers of " + std::to_string(num_experts) +
           " experts cannot be remembered in " + std::to_string(num_slots) + " slots");
  }
  std::lock_guard lock(mutex_);
  num_slots_ = num_slots;
  num_layers_ = num_layers;
  num_experts_ = num_experts;
  newer_.resize(size_t(num_layers * num_experts));
  older_.resize(newer_.size());
  clear();
}

void Owner::forget() {
  std::lock_guard lock(mutex_);
  clear();
}

void Owner::clear() {
  std::fill(newer_.begin(), newer_.end(), kAbsent);
  newest_ = oldest_ = kEnd;
  count_ = 0;
}

void Owner::unlink(int32_t key) {
  const int32_t newer = newer_[size_t(key)], older = older_[size_t(key)];
  (newer == kEnd ? newest_ : older_[size_t(newer)]) = older;
  (older == kEnd ? oldest_ : newer_[size_t(older)]) = newer;
  newer_[size_t(key)] = kAbsent;
  --count_;
}

int32_t Owner::key_of(int64_t layer, int64_t expert) const {
  const bool is_there = layer >= 0 && layer < num_layers_ && expert >= 0 && expert < num_experts_;
  return is_there ? int32_t(layer * num_experts_ + expert) : kAbsent;
}

void Owner::note(int64_t layer, const std::vector<int32_t>& experts) {
  std::lock_guard lock(mutex_);
  for (const int32_t expert : experts) {
    const int32_t key = key_of(layer, expert);
    if (key == kAbsent) continue;
    if (newer_[size_t(key)] != kAbsent) unlink(key);
    newer_[size_t(key)] = kEnd;
    older_[size_t(key)] = newest_;
    (newest_ == kEnd ? oldest_ : newer_[size_t(newest_)]) = key;
    newest_ = key;
    if (++count_ > num_slots_) unlink(oldest_);
  }
}

bool Owner::has(int64_t layer, int64_t expert) const {
  if (is_resident) return true;
  std::lock_guard lock(mutex_);
  const int32_t key = key_of(layer, expert);
  return key != kAbsent && newer_[size_t(key)] != kAbsent;
}

int64_t Owner::num_remembered() const {
  std::lock_guard lock(mutex_);
  return count_;
}

// ── the owners of all experts
// ───────────────────────────────────────────────────────────────────────────────

Owners::Owners(std::vector<std::shared_ptr<Owner>> hosts, std::shared_ptr<Owner> here, int64_t num_layers,
               int64_t num_experts, int64_t replicas, std::vector<int16_t> table)
    : hosts_(std::move(hosts)),
      here_(std::move(here)),
      num_layers_(num_layers),
      num_experts_(num_experts),
      replicas_(replicas),
      table_(std::move(table)) {
  if (int64_t(hosts_.size()) > kMostHosts) {
    refuse("there are " + std::to_string(hosts_.size()) + " hosts, expected at most " +
           std::to_string(kMostHosts));
  }
  if (here_ != nullptr && std::find(hosts_.begin(), hosts_.end(), here_) == hosts_.end()) {
    refuse("this machine is not among the hosts");
  }
  for (const int16_t host : table_) {
    if (host < -1 || host >= int64_t(hosts_.size())) {
      refuse("the table names host " + std::to_string(host) + " of " + std::to_string(hosts_.size()));
    }
  }
}

const int16_t* Owners::row_of(int64_t layer, int64_t expert) const {
  if (layer < 0 || layer >= num_layers_ || expert < 0 || expert >= num_experts_) {
    refuse("the table has no expert " + std::to_string(expert) + " of layer " + std::to_string(layer));
  }
  return table_.data() + (layer * num_experts_ + expert) * replicas_;
}

std::vector<std::shared_ptr<Owner>> Owners::owners_of(int64_t layer, int64_t expert) const {
  const int16_t* row = row_of(layer, expert);
  std::vector<std::shared_ptr<Owner>> found;
  for (int64_t i = 0; i < replicas_; ++i) {
    if (row[i] >= 0) found.push_back(hosts_[size_t(row[i])]);
  }
  return found;
}

void Owners::find_candidates(int64_t layer, int64_t expert, const std::vector<const Owner*>& tried,
                             std::vector<int16_t>& found) const {
  const int16_t* row = row_of(layer, expert);
  const auto is_tried = [&tried](const Owner* owner) {
    return std::find(tried.begin(), tried.end(), owner) != tried.end();
  };
  const auto find = [&](const auto& is_wanted) {
    found.clear();
    for (int64_t i = 0; i < replicas_; ++i) {
      if (row[i] < 0) continue;
      const Owner& owner = *hosts_[size_t(row[i])];
      if (!is_tried(&owner) && is_wanted(owner)) found.push_back(row[i]);
    }
  };
  find([this](const Owner& owner) { return is_usable(owner); });
  if (!found.empty()) return;
  if (here_ != nullptr && !is_tried(here_.get())) {
    found.push_back(int16_t(std::find(hosts_.begin(), hosts_.end(), here_) - hosts_.begin()));
    return;
  }
  // A slow owner is better than none.
  find([](const Owner& owner) { return owner.peer != 0 && !owner.is_set_aside; });
}

std::vector<std::shared_ptr<Owner>> Owners::candidates(int64_t layer, int64_t expert,
                                                       const std::vector<const Owner*>& tried) const {
  std::vector<int16_t> found;
  find_candidates(layer, expert, tried, found);
  std::vector<std::shared_ptr<Owner>> owners;
  for (const int16_t host : found) owners.push_back(hosts_[size_t(host)]);
  return owners;
}

std::vector<OwnerShare> Owners::choose(int64_t layer, const std::vector<int32_t>& experts) const {
  std::vector<double> queues(hosts_.size());  // seconds
  std::vector<int16_t> given(experts.size(), -1), found;
  const auto give = [&](size_t at, double (Owner::*seconds)() const) {
    const auto done_at = [&](int16_t host) {
      return queues[size_t(host)] + (*hosts_[size_t(host)].*seconds)();
    };
    const auto first = std::min_element(found.begin(), found.end(), [&](int16_t one, int16_t other) {
      return done_at(one) < done_at(other);
    });
    queues[size_t(*first)] = done_at(*first);
    given[at] = *first;
  };
  for (size_t at = 0; at < experts.size(); ++at) {
    find_candidates(layer, experts[at], {}, found);
    std::erase_if(found, [&](int16_t host) { return !hosts_[size_t(host)]->has(layer, experts[at]); });
    if (!found.empty()) give(at, &Owner::hit_s);
  }
  for (size_t at = 0; at < experts.size(); ++at) {
    if (given[at] >= 0) continue;
    find_candidates(layer, experts[at], {}, found);
    if (!found.empty()) give(at, &Owner::miss_s);
  }
  std::vector<OwnerShare> shares;
  std::vector<int> share_of(hosts_.size(), -1);
  for (size_t at = 0; at < experts.size(); ++at) {
    if (given[at] < 0) continue;
    int& share = share_of[size_t(given[at])];
    if (share < 0) {
      share = int(shares.size());
      shares.push_back({hosts_[size_t(given[at])], {}});
    }
    shares[size_t(share)].experts.push_back(experts[at]);
  }
  return shares;
}

std::vector<std::vector<std::vector<int32_t>>> Owners::split_guess(
    int64_t layer, const std::vector<std::vector<int32_t>>& by_rank) const {
  std::vector<std::vector<std::vector<int32_t>>> split(hosts_.size());
  for (size_t rank = 0; rank < by_rank.size(); ++rank) {
    for (const int32_t expert : by_rank[rank]) {
      const int16_t* row = row_of(layer, expert);
      int16_t chosen = -1;
      for (int64_t i = 0; i < replicas_; ++i) {
        if (row[i] < 0 || !is_usable(*hosts_[size_t(row[i])])) continue;
        if (chosen < 0) chosen = row[i];
        if (hosts_[size_t(row[i])]->has(layer, expert)) {
          chosen = row[i];
          break;
        }
      }
      if (chosen < 0 || hosts_[size_t(chosen)]->is_resident) continue;
      auto& ranks = split[size_t(chosen)];
      ranks.resize(by_rank.size());
      ranks[rank].push_back(expert);
    }
  }
  return split;
}

}  // namespace argosy
