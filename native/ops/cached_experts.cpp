#include "ops/cached_experts.h"

#include <algorithm>
#include <stdexcept>

namespace argosy {

namespace {

// Experts that are computed together. The slots of a group are free for other reads only when the group is
// done, so without this limit a prompt that found half a layer read ahead would keep the drive waiting.
// Usually more than one token asks for.
constexpr size_t kMostInGroup = 8;
constexpr size_t kFilling = 4;  // reads at once of experts that no token asked for
// Slots for the experts of so many tokens, for each kind. With fewer, guesses would take slots that a token
// itself needs.
constexpr int64_t kTokensForGuesses = 4;

bool contains(const std::vector<int32_t>& some, int32_t expert) {
  return std::find(some.begin(), some.end(), expert) != some.end();
}

}  // namespace

CachedExperts::CachedExperts(std::shared_ptr<ExpertReads> reads, std::shared_ptr<ExpertTable> table,
                             std::vector<Kind> kinds, const std::vector<ExpertKey>& keys,
                             const Options& options)
    : reads_(std::move(reads)),
      table_(std::move(table)),
      kinds_(std::move(kinds)),
      num_keys_(int64_t(keys.size())),
      options_(options),
      may_fill_(options.reads_all),
      look_ahead_{LookAhead(options.experts_per_token), LookAhead(options.experts_per_token)} {
  for (size_t i = 0; i < kinds_.size(); ++i) {
    for (const int64_t layer : kinds_[i].layers) {
      if (layer >= int64_t(kind_of_layer_.size())) kind_of_layer_.resize(size_t(layer) + 1, -1);
      kind_of_layer_[size_t(layer)] = int32_t(i);
    }
  }
  experts_of_layer_.resize(kind_of_layer_.size());
  for (const ExpertKey& key : keys) {
    kind_of(key.layer);
    experts_of_layer_[size_t(key.layer)].push_back(key.expert);
  }
}

const CachedExperts::Kind& CachedExperts::kind_of(int64_t layer) const {
  if (layer < 0 || layer >= int64_t(kind_of_layer_.size()) || kind_of_layer_[size_t(layer)] < 0)
    throw std::invalid_argument("experts of layer " + std::to_string(layer) + " have no slots here");
  return kinds_[size_t(kind_of_layer_[size_t(layer)])];
}

// ── leases ──

void CachedExperts::open(int64_t layer, const Dispatch& dispatch) {
  open(layer, dispatch.experts(), dispatch.scan(), parts_.pairs_of(layer, dispatch));
}

void CachedExperts::open(int64_t layer, std::vector<int32_t> experts, std::vector<int32_t> scan,
                         const PartLease::Pairs& pairs) {
  if (lease_) close(false);
  kind_of(layer);
  lease_.emplace();
  lease_->layer = layer;
  std::sort(scan.begin(), scan.end());
  lease_->scan = std::move(scan);
  try {
    parts_.open(layer, pairs, lease_->scan);
    find(std::move(experts));
    issue();
  } catch (...) {
    close(false);
    throw;
  }
}

bool CachedExperts::is_scan(int32_t expert) const {
  return std::binary_search(lease_->scan.begin(), lease_->scan.end(), expert);
}

void CachedExperts::find(std::vector<int32_t> asked) {
  Lease& lease = *lease_;
  CachePolicy& policy = policy_of(lease.layer);
  const auto num_scan =
      std::count_if(asked.begin(), asked.end(), [this](int32_t expert) { return is_scan(expert); });
  const bool is_sweep = !lease.scan.empty();
  if (num_scan < int64_t(asked.size())) policy.begin(lease.layer);
  std::vector<int32_t> swept, used;
  for (const int32_t expert : asked) {  // before a miss can evict one of them
    if (!policy.has({int32_t(lease.layer), expert})) {
      lease.missing.push_back(expert);
      continue;
    }
    lease.held.push_back(expert);
    (is_scan(expert) ? swept : used).push_back(expert);
  }
  if (!swept.empty()) policy.use(lease.layer, swept, true);
  policy.use(lease.layer, used, false);
  // Experts that decode waits for are read first; otherwise the file order decides.
  std::sort(lease.missing.begin(), lease.missing.end(),
            [this](int32_t a, int32_t b) { return std::pair(is_scan(a), a) > std::pair(is_scan(b), b); });
  // The hint's experts are this lease's from now on, at whatever stage their reads are.
  if (lease.layer == hint_layer_)
    std::erase_if(kept_, [&](int32_t expert) { return contains(lease.held, expert); });
  std::erase_if(early_, [&](const Early& early) {
    if (early.key.layer != lease.layer || !contains(lease.held, early.key.expert)) return false;
    lease.in_flight.push_back({early.ticket, early.key.expert});
    return true;
  });
  if (!lease.in_flight.empty()) {
    std::vector<int64_t> tickets;
    for (const Ticket& ticket : lease.in_flight) {
      tickets.push_back(ticket.number);
      std::erase(lease.held, ticket.expert);
    }
    counters_.reads_ahead += int64_t(tickets.size());
    reads_->hurry(tickets);
  }
  lease.hits = lease.held;
  request_parts({});  // takes over early reads
  forget_hint();
  look_ahead_[is_sweep].learn(lease.layer, asked);
  const auto num_asked = int64_t(asked.size());
  counters_.lookups += num_asked;
  counters_.hits += int64_t(lease.hits.size());
  counters_.decode_lookups += num_asked - num_scan;
  counters_.decode_hits += std::count_if(lease.hits.begin(), lease.hits.end(),
                                         [this](int32_t expert) { return !is_scan(expert); });
  std::erase_if(lease.hits, [&](int32_t expert) {
    if (parts_.is_ready(expert)) return false;
    lease.landed.push_back(expert);
    std::erase(lease.held, expert);
    return true;
  });
}

// Starts reads of missing experts and parts while there are slots, then reads of the hint.
void CachedExperts::issue() {
  Lease& lease = *lease_;
  CachePolicy& policy = policy_of(lease.layer);
  std::vector<std::pair<int32_t, int64_t>> admitted;
  while (!lease.missing.empty()) {
    const int32_t expert = lease.missing.back();
    const std::optional<int64_t> slot = policy.admit({int32_t(lease.layer), expert}, is_scan(expert));
    if (!slot) break;
    lease.missing.pop_back();
    admitted.emplace_back(expert, *slot);
  }
  if (admitted.empty()) {
    request_parts({});
  } else {
    // Parts first: they are small, and the first expert that lands should not wait for its part behind all
    // others.
    const std::vector<int64_t> tickets =
        fetch(lease.layer, admitted, Urgency::now, [&] { request_parts(admitted); });
    for (size_t i = 0; i < tickets.size(); ++i) lease.in_flight.push_back({tickets[i], admitted[i].first});
  }
  read_ahead();
}

// Of experts that have their slots: here, read, or about to be.
void CachedExperts::request_parts(const std::vector<std::pair<int32_t, int64_t>>& admitted) {
  Lease& lease = *lease_;
  std::vector<int32_t> experts = lease.hits;
  experts.insert(experts.end(), lease.landed.begin(), lease.landed.end());
  for (const Ticket& ticket : lease.in_flight) experts.push_back(ticket.expert);
  for (const auto& [expert, slot] : admitted) experts.push_back(expert);
  lease.lacks_parts = !parts_.request(experts);
}

// Starts reads of (expert, slot) pairs that were just admitted, after `before`.
std::vector<int64_t> CachedExperts::fetch(int64_t layer,
                                          const std::vector<std::pair<int32_t, int64_t>>& admitted,
                                          Urgency urgency, const std::function<void()>& before) {
  const Kind& kind = kind_of(layer);
  try {
    if (before) before();
    std::vector<ExpertReads::Place> places;
    for (const auto& [expert, slot] : admitted) {
      places.push_back({{int32_t(layer), expert}, kind.places.at(size_t(slot))});
      table_->place(layer, expert, places.back().at);
    }
    return reads_->fetch(places, urgency);
  } catch (...) {
    for (const auto& [expert, slot] : admitted) kind.policy->drop({int32_t(layer), expert});
    throw;
  }
}

CachedExperts::State CachedExperts::group() {
  Lease& lease = *lease_;
  if (lease.failure) return State::failed;
  if (!lease.hits.empty()) {
    lease.handed = std::exchange(lease.hits, {});
    return State::group;
  }
  if (!lease.landed.empty() || !lease.in_flight.empty() || !lease.missing.empty()) {
    give_back();
    issue();
    lease.handed.clear();
    std::erase_if(lease.landed, [&](int32_t expert) {
      if (lease.handed.size() == kMostInGroup || !parts_.is_ready(expert)) return false;
      lease.handed.push_back(expert);
      return true;
    });
    lease.held = lease.handed;
    if (!lease.handed.empty()) return State::group;
    // With nothing in flight, early reads have the slots: nothing else is pinned.
    return State::waits;
  }
  return State::done;
}

bool CachedExperts::collect(std::optional<Milliseconds> most) {
  Lease& lease = *lease_;
  if (num_in_flight() == 0) return collect_early(most);
  std::vector<int64_t> tickets;
  for (const Ticket& ticket : lease.in_flight) tickets.push_back(ticket.number);
  parts_.add_tickets(tickets);
  std::vector<Completion> ended = reads_->wait_any(tickets, most);
  for (Completion& completion : ended) {
    const auto ticket = std::find_if(lease.in_flight.begin(), lease.in_flight.end(),
                                     [&](const Ticket& one) { return one.number == completion.ticket; });
    if (ticket == lease.in_flight.end()) {
      if (const auto failed = parts_.complete(completion)) {
        lease.failure = Failure{{int32_t(lease.layer), failed->expert},
                                completion.error,
                                std::move(completion.message),
                                failed->adapter};
      }
      counters_.bytes_read += parts_.take_bytes_read();
      continue;
    }
    const ExpertKey key = {int32_t(lease.layer), ticket->expert};
    lease.in_flight.erase(ticket);
    if (completion.error == ReadError::none) {
      counters_.bytes_read += reads_->bytes(key);
      lease.landed.push_back(key.expert);
      continue;
    }
    policy_of(lease.layer).drop(key);
    if (completion.error == ReadError::dropped) {  // by an earlier hint, before this lease took it over
      lease.missing.push_back(key.expert);
    } else {
      lease.failure = Failure{key, completion.error, std::move(completion.message)};
    }
  }
  return !ended.empty();
}

void CachedExperts::give_back() {
  if (lease_->held.empty()) return;
  policy_of(lease_->layer).unpin(lease_->layer, lease_->held);
  parts_.release(lease_->held);
  lease_->held.clear();
}

void CachedExperts::close(bool is_whole) {
  if (!lease_) return;
  Lease& lease = *lease_;
  CachePolicy& policy = policy_of(lease.layer);
  give_back();
  policy.unpin(lease.layer, lease.landed);
  for (const Ticket& ticket : lease.in_flight) {
    reads_->cancel(ticket.number);
    policy.drop({int32_t(lease.layer), ticket.expert});
  }
  parts_.close();
  const int64_t layer = lease.layer;
  lease_.reset();
  if (is_whole) fill(layer);
}

std::vector<int32_t> CachedExperts::take_done() {
  return lease_ ? std::exchange(lease_->done, {}) : std::vector<int32_t>();
}

// If there is a slot for every expert, starts to read some of a layer that are not here.
void CachedExperts::fill(int64_t layer) {
  if (!may_fill_ || early_.size() >= kFilling || num_slots() < num_keys_) return;
  CachePolicy& policy = policy_of(layer);
  std::vector<std::pair<int32_t, int64_t>> admitted;
  for (const int32_t expert : experts_of_layer_[size_t(layer)]) {
    if (early_.size() + admitted.size() >= kFilling) break;
    const ExpertKey key = {int32_t(layer), expert};
    if (policy.has(key)) continue;
    const std::optional<int64_t> slot = policy.admit(key, true);
    if (!slot) break;
    admitted.emplace_back(expert, *slot);
  }
  if (!admitted.empty()) add_early(layer, admitted, Urgency::maybe);
}

// ── the hint ──

bool CachedExperts::wants_guess(bool is_sweep) const {
  if (lease_ && lease_->has_guess) return false;
  const int64_t fewest = kTokensForGuesses * options_.experts_per_token * int64_t(kinds_.size());
  const bool has_room = options_.look_ahead && num_slots() >= fewest;
  return (is_sweep || has_room) && look_ahead_[is_sweep].wants_guess();
}

bool CachedExperts::is_early(ExpertKey key) const {
  return std::any_of(early_.begin(), early_.end(), [&](const Early& early) { return early.key == key; });
}

void CachedExperts::guess(int64_t layer, const std::vector<std::vector<int32_t>>& by_rank,
                          const PartLease::Pairs& pairs, bool is_sweep) {
  const CachePolicy& policy = policy_of(layer);
  forget_hint();
  if (lease_) lease_->has_guess = true;
  std::vector<LookAhead::Ranked> missing;
  for (size_t rank = 0; rank < by_rank.size() && int64_t(rank) < options_.experts_per_token; ++rank) {
    for (const int32_t expert : by_rank[rank]) {
      const ExpertKey key = {int32_t(layer), expert};
      if (!policy.has(key) || is_early(key)) missing.emplace_back(expert, int32_t(rank));
    }
  }
  look_ahead_[is_sweep].remember(layer, std::move(missing));
  if (lease_ && lease_->layer == layer) return;  // its slots are in use
  hint_ = look_ahead_[is_sweep].trusted(by_rank);
  if (is_sweep) std::sort(hint_.begin(), hint_.end());  // in file order
  std::reverse(hint_.begin(), hint_.end());
  hint_layer_ = layer;
  is_sweep_ = is_sweep;
  parts_.guess(layer, pairs);
  read_ahead();
}

// Starts reads of the hint and of its parts, unless the open lease still needs slots.
void CachedExperts::read_ahead() {
  if (hint_.empty() || is_short_of_slots() || (lease_ && lease_->lacks_parts)) return;
  CachePolicy& policy = policy_of(hint_layer_);
  const auto layer = int32_t(hint_layer_);
  std::vector<int32_t> kept, missing, placed;
  for (const int32_t expert : hint_) {
    if (!policy.has({layer, expert})) {
      missing.push_back(expert);
      continue;
    }
    placed.insert(placed.begin(), expert);
    if (!is_early({layer, expert})) kept.push_back(expert);
  }
  hint_ = std::move(missing);
  policy.use(layer, kept, true);  // the reads of their neighbours must not displace them
  kept_.insert(kept_.end(), kept.begin(), kept.end());
  std::vector<std::pair<int32_t, int64_t>> admitted;
  while (!hint_.empty()) {
    const std::optional<int64_t> slot = policy.admit({layer, hint_.back()}, true, !is_sweep_);
    if (!slot) break;
    admitted.emplace_back(hint_.back(), *slot);
    placed.push_back(hint_.back());
    hint_.pop_back();
  }
  const auto read_parts = [&] { parts_.read_ahead(placed, is_sweep_); };
  if (admitted.empty()) return read_parts();
  add_early(layer, admitted, is_sweep_ ? Urgency::soon : Urgency::maybe, read_parts);
}

void CachedExperts::add_early(int64_t layer, const std::vector<std::pair<int32_t, int64_t>>& admitted,
                              Urgency urgency, const std::function<void()>& before) {
  const std::vector<int64_t> tickets = fetch(layer, admitted, urgency, before);
  for (size_t i = 0; i < tickets.size(); ++i)
    early_.push_back({{int32_t(layer), admitted[i].first}, tickets[i]});
}

void CachedExperts::forget_hint() {
  hint_.clear();
  if (!kept_.empty()) {
    policy_of(hint_layer_).unpin(hint_layer_, kept_);
    kept_.clear();
  }
  if (num_early() == 0) return parts_.forget({});
  std::vector<int64_t> tickets;
  for (const Early& early : early_) tickets.push_back(early.ticket);
  parts_.add_early_tickets(tickets);
  const std::vector<int64_t> dropped = reads_->drop(tickets);
  parts_.forget(dropped);
  std::erase_if(early_, [&](const Early& early) {
    if (std::find(dropped.begin(), dropped.end(), early.ticket) == dropped.end()) return false;
    policy_of(early.key.layer).drop(early.key);
    return true;
  });
  if (num_early() > 0) collect_early(Milliseconds(0));
}

bool CachedExperts::collect_early(std::optional<Milliseconds> most) {
  std::vector<int64_t> tickets;
  for (const Early& early : early_) tickets.push_back(early.ticket);
  parts_.add_early_tickets(tickets);
  if (tickets.empty()) return false;
  const std::vector<Completion> ended = reads_->wait_any(tickets, most);
  for (const Completion& completion : ended) {
    const auto early = std::find_if(early_.begin(), early_.end(),
                                    [&](const Early& one) { return one.ticket == completion.ticket; });
    if (early == early_.end()) {
      if (!parts_.complete_early(completion)) throw std::logic_error("a read ended that nobody began");
      counters_.bytes_read += parts_.take_bytes_read();
      continue;
    }
    const ExpertKey key = early->key;
    early_.erase(early);
    if (completion.error != ReadError::none) {
      // It was abandoned halfway; or a lease that needs the expert will read it again and get the error.
      if (completion.error != ReadError::dropped) may_fill_ = false;
      policy_of(key.layer).drop(key);
      continue;
    }
    policy_of(key.layer).unpin(key.layer, {key.expert});
    counters_.bytes_read += reads_->bytes(key);
    counters_.idle_reads += 1;
  }
  return !ended.empty();
}

std::vector<ExpertKey> CachedExperts::early() const {
  std::vector<ExpertKey> found;
  for (const Early& early : early_) found.push_back(early.key);
  return found;
}

std::vector<ExpertKey> CachedExperts::kept() const {
  std::vector<ExpertKey> found;
  for (const int32_t expert : kept_) found.push_back({int32_t(hint_layer_), expert});
  return found;
}

void CachedExperts::trust(double least_right) {
  for (LookAhead& each : look_ahead_) each = LookAhead(options_.experts_per_token, least_right);
}

// ── the whole cache ──

void CachedExperts::set_parts(int32_t adapter, std::shared_ptr<PartCache> parts) {
  close(false);
  forget_hint();
  parts_.set(adapter, std::move(parts));
}

int64_t CachedExperts::num_slots() const {
  int64_t sum = 0;
  for (const Kind& kind : kinds_) sum += kind.policy->num_slots();
  return sum;
}

int64_t CachedExperts::num_resident() const {
  int64_t sum = 0;
  for (const Kind& kind : kinds_) sum += kind.policy->num_resident();
  return sum;
}

LeaseCounts CachedExperts::counts() const {
  return {.lookups = counters_.lookups,
          .hits = counters_.hits,
          .bytes_read = counters_.bytes_read,
          .reads_ahead = counters_.reads_ahead,
          .idle_reads = counters_.idle_reads,
          .decode_lookups = counters_.decode_lookups,
          .decode_hits = counters_.decode_hits,
          .parts_ahead = parts_.num_ahead(),
          .parts_late = parts_.num_late()};
}

void CachedExperts::cancel_early() {
  for (const Early& early : early_) reads_->cancel(early.ticket);
  parts_.cancel_early();
}

// ── LayerExperts ──

bool CachedExperts::begin(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows,
                          float* out) {
  try {
    open(layer, *dispatch);
  } catch (...) {
    return false;  // Python opens the lease again, and reports the error
  }
  lease_->dispatch = std::move(dispatch);
  lease_->rows = rows;
  lease_->out = out;
  return true;
}

bool CachedExperts::wants_guess() const { return wants_guess(!lease_->scan.empty()); }

// Runs the groups that are there.
bool CachedExperts::run_groups() {
  State state = group();
  for (; state == State::group; state = group()) {
    Lease& lease = *lease_;
    const Clock::time_point began = Clock::now();
    table_->run(*lease.runtime, lease.layer, lease.handed, *lease.dispatch, lease.rows, lease.out);
    run_seconds_ += std::chrono::duration<double>(Clock::now() - began).count();
    num_run_ += int64_t(lease.handed.size());
    lease.done.insert(lease.done.end(), lease.handed.begin(), lease.handed.end());
  }
  if (state == State::done) close(true);
  return state == State::done;
}

void CachedExperts::run_here(Runtime& runtime) {
  lease_->runtime = &runtime;
  run_groups();
}

bool CachedExperts::wait(std::chrono::nanoseconds most) {
  const Clock::time_point end = Clock::now() + most;
  try {
    while (lease_) {
      if (lease_->failure) return false;
      const auto left = std::chrono::ceil<Milliseconds>(end - Clock::now());
      if (left.count() <= 0 || !collect(left)) return false;
      run_groups();
    }
  } catch (...) {
    close(false);  // Python opens the lease again, and reports the error
    return false;
  }
  return true;
}

}  // namespace argosy
