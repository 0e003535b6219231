#include "cluster/group_experts.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace argosy {

namespace {

using Seconds = std::chrono::duration<double>;

constexpr int64_t kHurryAfter = 64;     // exchanges; before that, an owner's times are hardly known
constexpr double kLeastS = 0.05;        // shortest deadline
constexpr double kFirstS = 1.0;         // deadline while times are hardly known
constexpr double kWireBytesPerS = 1e8;  // a slow network; only deadlines use it

}  // namespace

void GroupExperts::use(std::shared_ptr<Owners> owners, ExpertTable* table) {
  owners_ = std::move(owners);
  table_ = table;
}

bool GroupExperts::begin(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows,
                         float* out) {
  abandon();
  if (owners_ == nullptr) return false;
  std::vector<OwnerShare> chosen = owners_->choose(layer, dispatch->experts());
  Round round = {
      .begun = {.layer = layer, .ticket = 0, .owners = owners_, .done = {}, .shares = {}, .failures = {}},
      .dispatch = std::move(dispatch),
      .rows = rows,
      .out = out,
      .local = {},
      .num_missing = 0};
  size_t num_given = 0;
  for (OwnerShare& share : chosen) {
    num_given += share.experts.size();
    if (share.owner == owners_->here()) {
      if (table_ == nullptr || !table_->has_places(layer, share.experts)) return false;
      round.local = std::move(share.experts);
      continue;
    }
    const int64_t peer = share.owner->peer;
    if (peer == 0) return false;  // it went away since
    round.num_missing += int64_t(share.experts.size());
    round.begun.shares.push_back({std::move(share.owner), peer, std::move(share.experts), {}});
  }
  if (num_given < round.dispatch->experts().size()) return false;  // nobody runs some expert
  std::vector<Share> shares;
  const Clock::time_point now = Clock::now();
  for (Begun::Share& share : round.begun.shares) {
    const int64_t num_rows = round.dispatch->num_tokens();
    share.deadline = now + patience(*share.owner, share.peer, layer, num_rows, share.experts);
    count_asked(*share.owner, layer, *round.dispatch, share.experts);
    shares.push_back({share.peer, share.experts});
  }
  if (!shares.empty()) round.begun.ticket = exchange_.send(layer, round.dispatch, rows, out, shares);
  round_ = std::move(round);
  return true;
}

bool GroupExperts::wants_guess() const { return round_ && wants_guess(*round_->begun.owners); }

bool GroupExperts::wants_guess(const Owners& owners) {
  return std::any_of(owners.hosts().begin(), owners.hosts().end(), [](const auto& owner) {
    return owner->peer != 0 && !owner->is_resident && !owner->is_slow;
  });
}

void GroupExperts::guess(int64_t layer, const std::vector<std::vector<int32_t>>& by_rank,
                         const std::vector<std::pair<int32_t, int32_t>>&, bool is_sweep) {
  if (round_) guess_for(*round_->begun.owners, layer, by_rank, is_sweep);
}

std::vector<std::vector<int32_t>> GroupExperts::guess_for(const Owners& owners, int64_t layer,
                                                          const std::vector<std::vector<int32_t>>& by_rank,
                                                          bool is_sweep) {
  std::vector<std::vector<int32_t>> here;
  std::vector<std::vector<std::vector<int32_t>>> split = owners.split_guess(layer, by_rank);
  for (size_t host = 0; host < split.size(); ++host) {
    if (split[host].empty()) continue;
    const std::shared_ptr<Owner>& owner = owners.hosts()[host];
    if (owner == owners.here()) {
      here = std::move(split[host]);
    } else if (const int64_t peer = owner->peer; peer != 0) {
      exchange_.guess(peer, layer, split[host], is_sweep);
    }
  }
  return here;
}

void GroupExperts::run_here(Runtime& runtime) {
  if (!round_ || round_->local.empty()) return;
  Begun& begun = round_->begun;
  try {
    table_->run(runtime, begun.layer, round_->local, *round_->dispatch, round_->rows, round_->out);
  } catch (...) {
    abandon();
    throw;
  }
  begun.owners->here()->num_run += int64_t(round_->local.size());
  begun.done.insert(begun.done.end(), round_->local.begin(), round_->local.end());
  round_->local.clear();
}

bool GroupExperts::wait(std::chrono::nanoseconds most) {
  if (!round_) return false;
  Begun& begun = round_->begun;
  const Clock::time_point end = Clock::now() + most;
  while (round_->num_missing > 0) {
    Clock::time_point until = end;
    for (const Begun::Share& share : begun.shares) {
      if (!share.experts.empty()) until = std::min(until, share.deadline);
    }
    const auto left = std::chrono::ceil<Exchange::Microseconds>(until - Clock::now());
    std::vector<ExchangeEvent> events =
        exchange_.receive(begun.ticket, std::max(left, Exchange::Microseconds::zero()));
    for (ExchangeEvent& event : events) take(begun, std::move(event));
    if (!begun.failures.empty() || (events.empty() && left.count() <= 0)) return false;
  }
  abandon();  // nothing is owed: this only returns the ticket
  return true;
}

void GroupExperts::take(Begun& begun, ExchangeEvent event) {
  if (event.failure) {
    begun.failures.push_back(std::move(event));
    return;
  }
  for (Begun::Share& share : begun.shares) {
    if (share.peer != event.peer) continue;
    std::erase_if(share.experts, [&event](int32_t expert) {
      return std::find(event.experts.begin(), event.experts.end(), expert) != event.experts.end();
    });
    share.owner->note(begun.layer, event.experts);
    share.owner->num_run += int64_t(event.experts.size());
  }
  round_->num_missing -= int64_t(event.experts.size());
  begun.done.insert(begun.done.end(), event.experts.begin(), event.experts.end());
}

std::optional<GroupExperts::Begun> GroupExperts::take_over() {
  if (!round_) return std::nullopt;
  Begun begun = std::move(round_->begun);
  round_.reset();
  return begun;
}

void GroupExperts::abandon() {
  if (!round_) return;
  const int64_t ticket = round_->begun.ticket;
  if (ticket != 0) exchange_.forget(ticket);
  round_.reset();
}

GroupExperts::Clock::duration GroupExperts::patience(const Owner& owner, int64_t peer, int64_t layer,
                                                     int64_t num_rows,
                                                     const std::vector<int32_t>& experts) const {
  const std::optional<ExchangeTimes> times = exchange_.usual_times(peer, num_rows);
  double seconds = kFirstS;  // if it was removed since: sending tells
  if (times) {
    const auto num_missed = double(std::count_if(experts.begin(), experts.end(),
                                                 [&](int32_t expert) { return !owner.has(layer, expert); }));
    const auto num_experts = double(experts.size());
    const double reads = num_missed * (owner.miss_s() - owner.hit_s());
    const double wire =
        (double(num_rows) + num_experts) * double(exchange_.limits().row_bytes()) / kWireBytesPerS;
    const double computing = double(num_rows) * num_experts * owner.hit_s();
    const double least =
        times->count < kHurryAfter ? kFirstS + 2 * reads + wire + computing : kLeastS + reads + wire;
    seconds = std::max(4e-6 * times->ewma_us, least);
  }
  return std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
}

void GroupExperts::count_asked(const Owner& owner, int64_t layer, const Dispatch& dispatch,
                               const std::vector<int32_t>& experts) {
  for (const int32_t expert : experts) {
    const bool is_hit = owner.has(layer, expert);
    const bool is_decode = !std::binary_search(dispatch.scan().begin(), dispatch.scan().end(), expert);
    lookups_ += 1;
    hits_ += is_hit;
    decode_lookups_ += is_decode;
    decode_hits_ += is_hit && is_decode;
  }
}

AskedCounts GroupExperts::counts() const { return {lookups_, hits_, decode_lookups_, decode_hits_}; }

}  // namespace argosy
