#include "cluster/exchange.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace argosy {

namespace {

using Clock = Exchange::Clock;

constexpr uint64_t kDone = std::numeric_limits<uint64_t>::max();  // no frame writes these rows any more
constexpr int64_t kMostBytesOfPass = int64_t{4} << 20;            // received from a peer before the next peer
constexpr int64_t kInputBytes = 16 << 10;  // at least; most answers begin and end in one call with so many
constexpr int kNumTimes = 64;
constexpr int kComputing = 7;  // a peer that computes an answer may be silent for so many times longer

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

[[noreturn]] void fail_protocol(const std::string& sentence) {
  throw LinkError(LinkFailure::protocol, "the worker " + sentence);
}

double microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

int64_t input_bytes(const LinkLimits& limits) {
  const int64_t most_head = std::max(limits.most_experts() * int64_t(sizeof(Entry)), kMostTextBytes);
  return std::max<int64_t>(kInputBytes, int64_t(sizeof(FrameHeader)) + most_head);
}

}  // namespace

// The caller's request of one layer.
struct Exchange::Ticket {
  int64_t layer;
  std::shared_ptr<const Dispatch> dispatch;
  const float* rows;
  float* out;
  std::vector<uint64_t> writers;  // by index in dispatch->experts(): the frame that writes the rows, or kDone
  int64_t num_outstanding = 0;    // requests
  std::vector<ExchangeEvent> events = {};
};

// A request that one peer was sent.
struct Exchange::Request {
  struct Asked {
    int32_t expert;
    int32_t index;  // in dispatch->experts()
    int32_t count;  // assignments
    bool is_answered = false;
  };

  uint32_t id = 0;
  Ticket* ticket = nullptr;  // null: forgotten
  int64_t layer = 0;
  int64_t num_rows = 0;
  std::vector<Asked> experts = {};
  int64_t num_left = 0;  // experts that are not answered
  bool is_sent = false;
  Clock::time_point asked_at = {};

  std::vector<int32_t> unanswered() const {
    std::vector<int32_t> left;
    for (const Asked& asked : experts) {
      if (!asked.is_answered) left.push_back(asked.expert);
    }
    return left;
  }
};

// Bytes for one peer: complete frames, and the rows of a request, straight from the caller's memory.
struct Exchange::Outgoing {
  std::vector<uint8_t> head = {};
  Request* request = nullptr;        // null: none, or it has ended before its rows were sent
  FrameHeader rows = {};             // header of the rows' frames, without their number
  std::vector<int32_t> tokens = {};  // token of each row
  int64_t nbytes = 0;                // in all
  int64_t sent = 0;
  Clock::time_point not_before = {};

  static int64_t frame_bytes(int64_t row_bytes) {
    return int64_t(sizeof(FrameHeader)) + kMostRowsOfFrame * row_bytes;
  }
  // Bytes up to the end of the frame that is being sent.
  int64_t end_of_frame(int64_t row_bytes) const {
    const int64_t head_bytes = int64_t(head.size()), frame = frame_bytes(row_bytes);
    if (sent <= head_bytes) return head_bytes;
    return std::min(nbytes, head_bytes + (sent - head_bytes + frame - 1) / frame * frame);
  }
};

class Exchange::Times {
 public:
  void note(double us) {
    // A single stall must not raise the deadlines, which follow the mean.
    ewma_us_ = count_ == 0 ? us : ewma_us_ + (std::min(us, 2 * ewma_us_) - ewma_us_) / 8;
    latest_[size_t(count_ % kNumTimes)] = us;
    ++count_;
  }

  ExchangeTimes usual() const { return {.count = count_, .ewma_us = ewma_us_}; }

  ExchangeTimes summary() const {
    const auto num_kept = std::min<int64_t>(count_, kNumTimes);
    if (num_kept == 0) return {};
    std::array<double, kNumTimes> sorted = latest_;
    std::sort(sorted.begin(), sorted.begin() + num_kept);
    const auto quantile = [&](double share) { return sorted[size_t(share * double(num_kept - 1) + 0.5)]; };
    return {count_, ewma_us_, quantile(0.5), quantile(0.99)};
  }

 private:
  int64_t count_ = 0;
  double ewma_us_ = 0;
  std::array<double, kNumTimes> latest_ = {};
};

struct Exchange::Peer {
  struct Answer;
  // A place in the rows of an answer.
  struct Place {
    size_t expert = 0;  // in Answer::experts
    int64_t row = 0;    // index among the expert's rows
    int64_t byte = 0;   // offset in the row

    // Goes on by `nbytes`, which end in the same row, or with it.
    void step(int64_t nbytes, const Answer& answer, int64_t row_bytes);
  };
  struct Answer {
    Request* request = nullptr;        // null: no answer is being received
    std::vector<size_t> experts = {};  // indices in request->experts
    uint64_t frame = 0;
    Place place = {};
    int64_t bytes_left = 0;
  };

  Peer(int64_t peer_id, std::shared_ptr<StreamSocket> connected, int64_t buffer_bytes)
      : id(peer_id), socket(std::move(connected)), input(size_t(buffer_bytes)) {}

  bool is_connected() const { return socket != nullptr; }
  bool owes() const { return !outstanding.empty() || is_pinged; }
  bool is_busy() const { return owes() || !queue.empty(); }
  bool is_waited_for() const {
    return std::any_of(outstanding.begin(), outstanding.end(),
                       [](const auto& request) { return request->ticket != nullptr; });
  }

  const int64_t id;
  std::shared_ptr<StreamSocket> socket;  // null: the connection has ended
  std::deque<Outgoing> queue = {};
  std::vector<std::unique_ptr<Request>> outstanding = {};
  InputBuffer input;
  Answer answer = {};
  std::optional<FaultyLink> faults = {};
  std::string status = {};
  std::string failure = {};  // why the connection has ended
  bool is_pinged = false;
  Clock::time_point heard_at = {};  // the last bytes, or when it began to owe some
  uint32_t next_request = 1;
  int64_t num_late = 0, bytes_out = 0, bytes_in = 0;
  Times few_rows = {}, many_rows = {};
};

void Exchange::Peer::Place::step(int64_t nbytes, const Answer& answer, int64_t row_bytes) {
  byte += nbytes;
  if (byte < row_bytes) return;
  byte = 0;
  if (++row < answer.request->experts[answer.experts[expert]].count) return;
  row = 0;
  ++expert;
}

Exchange::Exchange(LinkLimits limits)
    : limits_((limits.check(), std::move(limits))),
      zeros_(size_t(limits_.hidden)),
      dropped_(size_t(limits_.row_bytes())) {}

Exchange::~Exchange() = default;

// ── peers
// ───────────────────────────────────────────────────────────────────────────────────────────────────

int64_t Exchange::add(int fd) {
  std::lock_guard lock(mutex_);
  if (int64_t(peers_.size()) == kMostPeers) {
    refuse("an exchange has at most " + std::to_string(kMostPeers) + " peers; remove one first");
  }
  auto peer = std::make_unique<Peer>(next_peer_, nullptr, input_bytes(limits_));
  peer->socket = std::make_shared<StreamSocket>(fd);
  peers_.emplace(next_peer_, std::move(peer));
  return next_peer_++;
}

void Exchange::remove(int64_t id) {
  std::lock_guard lock(mutex_);
  if (id < 1 || id >= next_peer_) refuse("no peer has the id " + std::to_string(id));
  const auto found = peers_.find(id);
  if (found == peers_.end()) return;
  fail(*found->second, LinkFailure::ended, "the peer was removed");
  peers_.erase(found);
}

std::vector<int64_t> Exchange::peers() const {
  std::lock_guard lock(mutex_);
  std::vector<int64_t> connected;
  for (const auto& [id, peer] : peers_) {
    if (peer->is_connected()) connected.push_back(id);
  }
  return connected;
}

Exchange::Peer& Exchange::peer_of(int64_t id) const {
  const auto found = peers_.find(id);
  if (found == peers_.end()) refuse("no peer has the id " + std::to_string(id));
  return *found->second;
}

std::string Exchange::status(int64_t peer) const {
  std::lock_guard lock(mutex_);
  return peer_of(peer).status;
}

PeerStats Exchange::stats(int64_t id) const {
  std::lock_guard lock(mutex_);
  const Peer& peer = peer_of(id);
  PeerStats stats = {.is_connected = peer.is_connected(),
                     .failure = peer.failure,
                     .num_outstanding = int64_t(peer.outstanding.size()),
                     .num_late = peer.num_late,
                     .bytes_out = peer.bytes_out,
                     .bytes_in = peer.bytes_in,
                     .few_rows = peer.few_rows.summary(),
                     .many_rows = peer.many_rows.summary()};
  if (!peer.outstanding.empty()) {
    stats.oldest_outstanding_us = int64_t(microseconds(Clock::now() - peer.outstanding.front()->asked_at));
  }
  for (const Outgoing& outgoing : peer.queue) stats.queued_bytes += outgoing.nbytes - outgoing.sent;
  return stats;
}

std::optional<ExchangeTimes> Exchange::usual_times(int64_t id, int64_t num_rows) const {
  std::lock_guard lock(mutex_);
  const auto found = peers_.find(id);
  if (found == peers_.end()) return std::nullopt;
  return (num_rows <= kFewRows ? found->second->few_rows : found->second->many_rows).usual();
}

void Exchange::inject(int64_t peer, const LinkFaults& faults) {
  std::lock_guard lock(mutex_);
  peer_of(peer).faults.emplace(faults);
}

int64_t Exchange::buffer_bytes() const {
  std::lock_guard lock(mutex_);
  int64_t nbytes = 2 * limits_.row_bytes() + int64_t(row_of_token_.capacity() * sizeof(int32_t));
  for (const auto& [id, peer] : peers_) {
    nbytes += int64_t(peer->input.capacity());
    for (const Outgoing& outgoing : peer->queue) {
      nbytes += int64_t(outgoing.head.capacity() + outgoing.tokens.capacity() * sizeof(int32_t));
    }
    for (const auto& request : peer->outstanding) {
      nbytes += int64_t(sizeof(Request) + request->experts.capacity() * sizeof(Request::Asked));
    }
  }
  return nbytes;
}

int64_t Exchange::most_buffer_bytes(const LinkLimits& limits, int64_t num_peers) {
  const int64_t experts = limits.most_experts();
  const int64_t head = 2 * int64_t(sizeof(FrameHeader)) + experts * int64_t(sizeof(Entry)) +
                       limits.most_assignments * int64_t(sizeof(uint32_t));
  const int64_t request =
      int64_t(sizeof(Request) + sizeof(Outgoing)) + experts * int64_t(sizeof(Request::Asked));
  const int64_t tokens = limits.most_rows * int64_t(sizeof(int32_t));
  return 2 * limits.row_bytes() + tokens +
         num_peers * (input_bytes(limits) + kMostOutstanding * (head + request + tokens));
}

void Exchange::close() {
  std::lock_guard lock(mutex_);
  for (const auto& [id, peer] : peers_) fail(*peer, LinkFailure::ended, "the exchange was closed");
  peers_.clear();
}

// ── tickets
// ─────────────────────────────────────────────────────────────────────────────────────────────────

Exchange::Ticket& Exchange::ticket_of(int64_t id) const {
  const auto found = tickets_.find(id);
  if (found == tickets_.end()) refuse("no exchange has the ticket " + std::to_string(id));
  return *found->second;
}

void Exchange::tell(Ticket& ticket, ExchangeEvent event) {
  const auto of_same_kind = [&event](const ExchangeEvent& told) {
    return !event.failure && !told.failure && told.peer == event.peer;
  };
  const auto told = std::find_if(ticket.events.begin(), ticket.events.end(), of_same_kind);
  if (told == ticket.events.end()) {
    ticket.events.push_back(std::move(event));
  } else {
    told->experts.insert(told->experts.end(), event.experts.begin(), event.experts.end());
  }
}

int64_t Exchange::send(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows, float* out,
                       const std::vector<Share>& shares) {
  std::lock_guard lock(mutex_);
  if (limits_.experts_of(layer) == 0) refuse("layer " + std::to_string(layer) + " has no routed experts");
  if (int64_t(tickets_.size()) == kMostTickets) {
    refuse("an exchange has at most " + std::to_string(kMostTickets) + " tickets; forget one first");
  }
  const size_t num_experts = dispatch->experts().size();
  auto ticket = std::make_unique<Ticket>(
      Ticket{layer, std::move(dispatch), rows, out, std::vector<uint64_t>(num_experts, 0)});
  ask(*ticket, shares);
  tickets_.emplace(next_ticket_, std::move(ticket));
  return next_ticket_++;
}

void Exchange::resend(int64_t ticket, const std::vector<Share>& shares) {
  std::lock_guard lock(mutex_);
  ask(ticket_of(ticket), shares);
}

// Makes every request before the first is queued, so an invalid one changes nothing.
void Exchange::ask(Ticket& ticket, const std::vector<Share>& shares) {
  std::vector<std::unique_ptr<Request>> requests;
  std::vector<std::vector<int32_t>> tokens(shares.size());
  for (size_t i = 0; i < shares.size(); ++i) {
    if (shares[i].peer < 1 || shares[i].peer >= next_peer_) {
      refuse("no peer has the id " + std::to_string(shares[i].peer));
    }
    requests.push_back(make_request(ticket, shares[i], tokens[i]));
  }
  for (size_t i = 0; i < shares.size(); ++i) {
    Request& request = *requests[i];
    if (request.experts.empty()) continue;
    const auto found = peers_.find(shares[i].peer);
    const bool is_gone = found == peers_.end() || !found->second->is_connected();
    if (is_gone || int64_t(found->second->outstanding.size()) == kMostOutstanding) {
      ExchangeEvent event = {.peer = shares[i].peer, .experts = {}};
      for (const Request::Asked& asked : request.experts) event.experts.push_back(asked.expert);
      event.failure = is_gone ? LinkFailure::ended : LinkFailure::full;
      event.message = is_gone ? "the connection has ended"
                              : std::to_string(kMostOutstanding) + " requests have no answer yet";
      tell(ticket, std::move(event));
      continue;
    }
    Peer& peer = *found->second;
    const Dispatch& dispatch = *ticket.dispatch;
    row_of_token_.resize(std::max(row_of_token_.size(), size_t(dispatch.num_tokens())));
    for (size_t row = 0; row < tokens[i].size(); ++row) row_of_token_[size_t(tokens[i][row])] = int32_t(row);
    int64_t num_assignments = 0;
    for (const Request::Asked& asked : request.experts) num_assignments += asked.count;
    request.id = peer.next_request++;
    request.asked_at = Clock::now();
    const int64_t list_bytes =
        int64_t(request.experts.size() * sizeof(Entry)) + num_assignments * int64_t(sizeof(uint32_t));
    const FrameHeader header = {.type = FrameType::ask,
                                .layer = uint16_t(ticket.layer),
                                .request = request.id,
                                .count_a = uint32_t(request.experts.size()),
                                .count_b = uint32_t(tokens[i].size()),
                                .count_c = uint32_t(num_assignments),
                                .payload_bytes = uint64_t(list_bytes)};
    std::vector<uint8_t> head;
    head.reserve(sizeof(header) + size_t(list_bytes));
    append(head, &header, 1);
    for (const Request::Asked& asked : request.experts) {
      const bool is_scan = std::binary_search(dispatch.scan().begin(), dispatch.scan().end(), asked.expert);
      const Entry entry = {uint32_t(asked.expert) | (is_scan ? Entry::kScan : 0), uint32_t(asked.count)};
      append(head, &entry, 1);
    }
    for (const Request::Asked& asked : request.experts) {
      const auto begin = dispatch.assignments().begin() + dispatch.starts()[size_t(asked.index)];
      for (const int32_t a : std::span(begin, size_t(asked.count))) {
        const auto row = uint32_t(row_of_token_[size_t(dispatch.token_of(a))]);
        append(head, &row, 1);
      }
    }
    if (!peer.owes()) peer.heard_at = request.asked_at;
    ++ticket.num_outstanding;
    Request* asked = peer.outstanding.emplace_back(std::move(requests[i])).get();
    enqueue(peer, std::move(head), asked, std::move(tokens[i]));
  }
}

// Checks a share, and leaves out experts that are done. `tokens` becomes those that chose one of the others:
// the rows of the request, in order.
std::unique_ptr<Exchange::Request> Exchange::make_request(Ticket& ticket, const Share& share,
                                                          std::vector<int32_t>& tokens) const {
  auto request = std::make_unique<Request>(Request{.ticket = &ticket, .layer = ticket.layer});
  const Dispatch& dispatch = *ticket.dispatch;
  std::vector<int32_t> experts = share.experts;
  std::sort(experts.begin(), experts.end());
  std::vector<bool> is_needed(size_t(dispatch.num_tokens()));
  int64_t num_assignments = 0;
  for (size_t i = 0; i < experts.size(); ++i) {
    const int32_t expert = experts[i];
    const int64_t index = dispatch.index_of(expert);
    if (index < 0) {
      refuse("no token of layer " + std::to_string(ticket.layer) + " chose expert " + std::to_string(expert));
    }
    if (expert >= limits_.experts_of(ticket.layer)) {
      refuse("layer " + std::to_string(ticket.layer) + " has no expert " + std::to_string(expert));
    }
    if (i > 0 && experts[i - 1] == expert) {
      refuse("expert " + std::to_string(expert) + " is named twice for peer " + std::to_string(share.peer));
    }
    if (ticket.writers[size_t(index)] == kDone) continue;
    const int32_t begin = dispatch.starts()[size_t(index)], end = dispatch.starts()[size_t(index) + 1];
    for (int32_t at = begin; at < end; ++at) {
      is_needed[size_t(dispatch.token_of(dispatch.assignments()[size_t(at)]))] = true;
    }
    request->experts.push_back({expert, int32_t(index), end - begin});
    num_assignments += end - begin;
  }
  for (size_t token = 0; token < is_needed.size(); ++token) {
    if (is_needed[token]) tokens.push_back(int32_t(token));
  }
  const auto num_rows = int64_t(tokens.size());
  if (num_rows > limits_.most_rows || num_assignments > limits_.most_assignments) {
    refuse("a request has " + std::to_string(num_rows) + " rows and " + std::to_string(num_assignments) +
           " assignments, expected at most " + std::to_string(limits_.most_rows) + " and " +
           std::to_string(limits_.most_assignments));
  }
  request->num_rows = num_rows;
  request->num_left = int64_t(request->experts.size());
  return request;
}

bool Exchange::is_outstanding(int64_t id) const {
  std::lock_guard lock(mutex_);
  return ticket_of(id).num_outstanding > 0;
}

void Exchange::drop(int64_t id, const std::vector<int32_t>& experts) {
  std::lock_guard lock(mutex_);
  Ticket& ticket = ticket_of(id);
  std::vector<size_t> indices;
  for (const int32_t expert : experts) {
    const int64_t index = ticket.dispatch->index_of(expert);
    if (index < 0) {
      refuse("no token of layer " + std::to_string(ticket.layer) + " chose expert " + std::to_string(expert));
    }
    indices.push_back(size_t(index));
  }
  for (const size_t index : indices) ticket.writers[index] = kDone;
}

void Exchange::forget(int64_t id) {
  std::lock_guard lock(mutex_);
  const auto found = tickets_.find(id);
  if (found == tickets_.end()) {
    if (id < 1 || id >= next_ticket_) refuse("no exchange has the ticket " + std::to_string(id));
    return;
  }
  const Ticket* ticket = found->second.get();
  for (const auto& [peer_id, peer] : peers_) {
    const auto is_its = [ticket](const auto& request) { return request->ticket == ticket; };
    auto& outstanding = peer->outstanding;  // cancel() may remove any of them
    for (auto at = outstanding.begin();
         (at = std::find_if(outstanding.begin(), outstanding.end(), is_its)) != outstanding.end();) {
      (*at)->ticket = nullptr;
      cancel(*peer, **at);
    }
  }
  tickets_.erase(found);
}

// The rest of its frames is not sent, but a frame that has begun must end: its rows become zeros.
void Exchange::cancel(Peer& peer, Request& request) {
  const auto is_its = [&request](const Outgoing& outgoing) { return outgoing.request == &request; };
  auto place = std::find_if(peer.queue.begin(), peer.queue.end(), is_its);
  if (place != peer.queue.end() && place->sent == 0) {
    peer.queue.erase(place);
    end_request(peer, request);
    return;
  }
  if (place != peer.queue.end()) {
    place->nbytes = place->end_of_frame(limits_.row_bytes());
    request.is_sent = true;  // as far as it will be
    const bool is_all_sent = place->sent == place->nbytes;
    place = is_all_sent ? peer.queue.erase(place) : place + 1;
  }
  Outgoing outgoing;
  const FrameHeader header = {
      .type = FrameType::cancel, .layer = uint16_t(request.layer), .request = request.id};
  append(outgoing.head, &header, 1);
  outgoing.nbytes = int64_t(outgoing.head.size());
  peer.queue.insert(place, std::move(outgoing));
  move_bytes(peer, Moves::out);
}

void Exchange::guess(int64_t id, int64_t layer, const std::vector<std::vector<int32_t>>& by_rank,
                     bool is_sweep) {
  std::lock_guard lock(mutex_);
  const int64_t num_experts = limits_.experts_of(layer);
  std::vector<uint32_t> numbers;
  std::vector<bool> is_named(size_t{0} + size_t(num_experts));
  for (const auto& experts : by_rank) numbers.push_back(uint32_t(experts.size()));
  for (const auto& experts : by_rank) {
    for (const int32_t expert : experts) {
      if (expert < 0 || expert >= num_experts || is_named[size_t(expert)]) {
        refuse("a guess for layer " + std::to_string(layer) + " names expert " + std::to_string(expert) +
               ", expected each of 0 to " + std::to_string(num_experts - 1) + " once at most");
      }
      is_named[size_t(expert)] = true;
      numbers.push_back(uint32_t(expert));
    }
  }
  if (int64_t(by_rank.size()) > num_experts) {
    refuse("a guess has " + std::to_string(by_rank.size()) + " ranks, expected at most " +
           std::to_string(num_experts));
  }
  const auto found = peers_.find(id);
  if (found == peers_.end() || !found->second->is_connected()) return;
  Peer& peer = *found->second;
  if (int64_t(peer.queue.size()) >= kMostOutstanding) return;
  const FrameHeader header = {.type = FrameType::guess,
                              .layer = uint16_t(layer),
                              .count_a = uint32_t(by_rank.size()),
                              .count_c = is_sweep,
                              .payload_bytes = numbers.size() * sizeof(uint32_t)};
  std::vector<uint8_t> frame;
  append(frame, &header, 1);
  append(frame, numbers.data(), numbers.size());
  enqueue(peer, std::move(frame), nullptr, {});
}

// ── bytes
// ───────────────────────────────────────────────────────────────────────────────────────────────────

void Exchange::enqueue(Peer& peer, std::vector<uint8_t> head, Request* request, std::vector<int32_t> tokens) {
  const auto num_rows = int64_t(tokens.size());
  const int64_t num_frames = (num_rows + kMostRowsOfFrame - 1) / kMostRowsOfFrame;
  Outgoing outgoing = {.head = std::move(head), .request = request, .tokens = std::move(tokens)};
  outgoing.nbytes = int64_t(outgoing.head.size()) + num_frames * int64_t(sizeof(FrameHeader)) +
                    num_rows * limits_.row_bytes();
  if (request != nullptr) {
    outgoing.rows = {.type = FrameType::rows, .layer = uint16_t(request->layer), .request = request->id};
  }
  if (peer.faults) outgoing.not_before = Clock::now() + peer.faults->delay();
  peer.queue.push_back(std::move(outgoing));
  move_bytes(peer, Moves::out);
}

// Whatever happens to a connection happens in here.
void Exchange::move_bytes(Peer& peer, Moves moves) {
  if (!peer.is_connected()) return;
  try {
    write(peer);
    if (moves == Moves::both) read(peer);
    if (peer.faults && peer.faults->is_dead()) {
      throw LinkError(LinkFailure::ended, "the connection was lost: a fault was injected");
    }
  } catch (const LinkError& error) {
    fail(peer, error.failure(), error.what());
  }
}

void Exchange::write(Peer& peer) {
  const int64_t row_bytes = limits_.row_bytes();
  while (!peer.queue.empty()) {
    Outgoing& outgoing = peer.queue.front();
    int64_t most = FaultyLink::kAnyBytes;
    if (peer.faults) {
      const Clock::time_point now = Clock::now();
      most = now < outgoing.not_before ? 0 : peer.faults->allowance(FaultyLink::Way::out, now);
      if (most == 0) return;
    }
    Parts parts(most);
    std::array<FrameHeader, Parts::kMost> headers;  // one for each frame of rows that these parts touch
    size_t num_headers = 0;
    const auto head_bytes = int64_t(outgoing.head.size());
    const float* rows = outgoing.request != nullptr && outgoing.request->ticket != nullptr
                            ? outgoing.request->ticket->rows
                            : nullptr;
    for (int64_t at = outgoing.sent; at < outgoing.nbytes && !parts.is_full();) {
      if (at < head_bytes) {
        at += parts.add(outgoing.head.data() + at, head_bytes - at);
        continue;
      }
      const int64_t frame_bytes = Outgoing::frame_bytes(row_bytes);
      const int64_t frame = (at - head_bytes) / frame_bytes, in_frame = (at - head_bytes) % frame_bytes;
      if (in_frame < int64_t(sizeof(FrameHeader))) {
        FrameHeader& header = headers[num_headers++];
        const int64_t first = frame * kMostRowsOfFrame;
        const int64_t num_rows = std::min(kMostRowsOfFrame, int64_t(outgoing.tokens.size()) - first);
        header = outgoing.rows;
        header.count_b = uint32_t(num_rows);
        header.count_c = uint32_t(first);
        header.payload_bytes = uint64_t(num_rows * row_bytes);
        at += parts.add(reinterpret_cast<const uint8_t*>(&header) + in_frame,
                        int64_t(sizeof(header)) - in_frame);
        continue;
      }
      const int64_t in_rows = in_frame - int64_t(sizeof(FrameHeader)), byte = in_rows % row_bytes;
      const int64_t row = frame * kMostRowsOfFrame + in_rows / row_bytes;
      const float* from =
          rows != nullptr ? rows + int64_t(outgoing.tokens[size_t(row)]) * limits_.hidden : zeros_.data();
      at += parts.add(reinterpret_cast<const uint8_t*>(from) + byte, row_bytes - byte);
    }
    const int64_t sent = peer.socket->send(parts);
    const bool is_full = sent < parts.nbytes();
    peer.bytes_out += sent;
    if (peer.faults) peer.faults->moved(FaultyLink::Way::out, sent);
    outgoing.sent += sent;
    if (is_full) return;
    if (outgoing.sent < outgoing.nbytes) continue;
    if (outgoing.request != nullptr) outgoing.request->is_sent = true;
    peer.queue.pop_front();
  }
}

void Exchange::read(Peer& peer) {
  bool is_drained = false;
  for (int64_t left = kMostBytesOfPass;;) {
    if (peer.answer.request == nullptr && take_frame(peer)) continue;
    if (peer.answer.request != nullptr && peer.input.size() > 0) {
      use_buffered(peer);
      continue;
    }
    int64_t most = left;
    if (peer.faults) most = std::min(most, peer.faults->allowance(FaultyLink::Way::in, Clock::now()));
    if (most == 0 || is_drained) return;
    const auto [asked, received] = receive_some(peer, most);
    if (received == 0) return;
    is_drained = received < asked;  // otherwise the socket may have more
    left -= received;
    peer.heard_at = Clock::now();
    peer.bytes_in += received;
    if (peer.faults) peer.faults->moved(FaultyLink::Way::in, received);
  }
}

// Outputs go straight to their rows; what follows them, to the buffer. Returns the bytes asked for, and
// received.
std::pair<int64_t, int64_t> Exchange::receive_some(Peer& peer, int64_t most) {
  const int64_t row_bytes = limits_.row_bytes();
  Peer::Answer& answer = peer.answer;
  Parts parts(most);
  int64_t of_answer = 0;
  if (answer.request != nullptr) {
    Peer::Place place = answer.place;
    while (of_answer < answer.bytes_left && !parts.is_full()) {
      const int64_t added =
          parts.add(row_at(peer, place.expert, place.row) + place.byte, row_bytes - place.byte);
      of_answer += added;
      place.step(added, answer, row_bytes);
    }
  }
  const bool has_all = of_answer == answer.bytes_left;
  if (has_all && !parts.is_full()) {
    uint8_t* room = peer.input.room();
    parts.add(room, int64_t(peer.input.room_bytes()));
  }
  const int64_t received = peer.socket->receive(parts);
  const int64_t landed = std::min(received, of_answer);
  if (landed > 0) advance(peer, landed);
  peer.input.landed(size_t(received - landed));
  return {parts.nbytes(), received};
}

void Exchange::use_buffered(Peer& peer) {
  Peer::Answer& answer = peer.answer;
  const int64_t nbytes = std::min(int64_t(peer.input.size()),
                                  limits_.row_bytes() - answer.place.byte);  // at most the rest of one row
  memcpy(row_at(peer, answer.place.expert, answer.place.row) + answer.place.byte, peer.input.data(),
         size_t(nbytes));
  peer.input.consume(size_t(nbytes));
  advance(peer, nbytes);
}

// Where a row of an answer goes: nowhere, if it is late, or if another frame began to write the same expert.
uint8_t* Exchange::row_at(const Peer& peer, size_t expert, int64_t row) {
  const Peer::Answer& answer = peer.answer;
  const Request& request = *answer.request;
  const Request::Asked& asked = request.experts[answer.experts[expert]];
  const Ticket* ticket = request.ticket;
  if (ticket == nullptr || ticket->writers[size_t(asked.index)] != answer.frame) return dropped_.data();
  const Dispatch& dispatch = *ticket->dispatch;
  const int64_t at = dispatch.starts()[size_t(asked.index)] + row;
  const int64_t assignment = dispatch.assignments()[size_t(at)];
  return reinterpret_cast<uint8_t*>(ticket->out + assignment * limits_.hidden);
}

// `nbytes` of the answer have landed.
void Exchange::advance(Peer& peer, int64_t nbytes) {
  const int64_t row_bytes = limits_.row_bytes();
  Peer::Answer& answer = peer.answer;
  Request& request = *answer.request;
  answer.bytes_left -= nbytes;
  while (nbytes > 0) {
    const size_t current = answer.place.expert;
    const int64_t of_row = std::min(nbytes, row_bytes - answer.place.byte);
    answer.place.step(of_row, answer, row_bytes);
    nbytes -= of_row;
    if (answer.place.expert == current) continue;
    Request::Asked& asked = request.experts[answer.experts[current]];
    asked.is_answered = true;
    --request.num_left;
    uint64_t* writer = request.ticket != nullptr ? &request.ticket->writers[size_t(asked.index)] : nullptr;
    if (writer == nullptr || *writer != answer.frame) {
      ++peer.num_late;
      continue;
    }
    *writer = kDone;
    tell(*request.ticket, {.peer = peer.id, .experts = {asked.expert}});
  }
  if (answer.bytes_left > 0) return;
  answer.request = nullptr;
  if (request.num_left > 0) return;
  if (request.ticket != nullptr) {
    Times& times = request.num_rows <= kFewRows ? peer.few_rows : peer.many_rows;
    times.note(microseconds(Clock::now() - request.asked_at));
  }
  end_request(peer, request);
}

// Uses up a frame, or the part of an answer before its rows, if it is complete in the buffer.
bool Exchange::take_frame(Peer& peer) {
  InputBuffer& input = peer.input;
  if (input.size() < sizeof(FrameHeader)) return false;
  const FrameHeader header = read_header(input, "the worker");
  uint64_t nbytes = header.payload_bytes;
  if (header.type == FrameType::answer) {
    nbytes = uint64_t(header.count_a) * sizeof(Entry);
    if (header.count_a > uint64_t(limits_.most_experts())) fail_protocol("answered for too many experts");
  } else if (header.type != FrameType::refusal && header.type != FrameType::pong) {
    fail_protocol("sent a frame of type " + std::to_string(int(header.type)));
  } else if (nbytes > uint64_t(kMostTextBytes)) {
    fail_protocol("sent a text of " + std::to_string(nbytes) + " bytes, expected at most " +
                  std::to_string(kMostTextBytes));
  }
  if (input.size() < sizeof(header) + nbytes) return false;
  input.consume(sizeof(header));
  if (header.type == FrameType::answer) {
    begin_answer(peer, header);
    input.consume(size_t(nbytes));
    return true;
  }
  std::string text(reinterpret_cast<const char*>(input.data()), size_t(nbytes));
  input.consume(size_t(nbytes));
  if (header.type == FrameType::refusal) {
    take_refusal(peer, header, std::move(text));
  } else {
    if (!peer.is_pinged) fail_protocol("sent a pong without a ping");
    peer.is_pinged = false;
    peer.status = std::move(text);
  }
  return true;
}

// The request that a frame answers. Only requests that are wholly sent can have an answer.
Exchange::Request& Exchange::answered_request(Peer& peer, const FrameHeader& header) {
  const auto found = std::find_if(peer.outstanding.begin(), peer.outstanding.end(),
                                  [&](const auto& request) { return request->id == header.request; });
  if (found == peer.outstanding.end() || !(*found)->is_sent || (*found)->layer != header.layer) {
    fail_protocol("answered request " + std::to_string(header.request) + " of layer " +
                  std::to_string(header.layer) + ", which it was not asked");
  }
  return **found;
}

void Exchange::begin_answer(Peer& peer, const FrameHeader& header) {
  Request& request = answered_request(peer, header);
  Peer::Answer answer = {.request = &request, .frame = next_frame_++};
  uint64_t num_rows = 0;
  for (int64_t i = 0; i < int64_t(header.count_a); ++i) {
    const auto [expert, count] = read_item<Entry>(peer.input.data(), i);
    const auto found = std::lower_bound(
        request.experts.begin(), request.experts.end(), expert,
        [](const Request::Asked& asked, uint32_t id) { return uint32_t(asked.expert) < id; });
    const auto at = size_t(found - request.experts.begin());
    const bool is_expected = found != request.experts.end() && uint32_t(found->expert) == expert &&
                             uint32_t(found->count) == count && !found->is_answered &&
                             (answer.experts.empty() || answer.experts.back() < at);
    if (!is_expected) {
      fail_protocol("answered expert " + std::to_string(expert) + " of layer " +
                    std::to_string(header.layer) + " with " + std::to_string(count) +
                    " rows, which it was not asked");
    }
    answer.experts.push_back(at);
    num_rows += count;
  }
  const uint64_t expected =
      uint64_t(header.count_a) * sizeof(Entry) + num_rows * uint64_t(limits_.row_bytes());
  if (num_rows == 0 || num_rows != header.count_b || header.payload_bytes != expected) {
    fail_protocol("sent an answer of " + std::to_string(header.payload_bytes) + " bytes, expected " +
                  std::to_string(expected));
  }
  answer.bytes_left = int64_t(num_rows) * limits_.row_bytes();
  if (Ticket* ticket = request.ticket) {
    for (const size_t at : answer.experts) {
      uint64_t& writer = ticket->writers[size_t(request.experts[at].index)];
      if (writer != kDone) writer = answer.frame;
    }
  }
  peer.answer = std::move(answer);
}

void Exchange::take_refusal(Peer& peer, const FrameHeader& header, std::string message) {
  Request& request = answered_request(peer, header);
  if (request.ticket != nullptr) {
    tell(*request.ticket, {.peer = peer.id,
                           .experts = request.unanswered(),
                           .failure = LinkFailure::refused,
                           .code = int32_t(header.count_c),
                           .message = std::move(message)});
  }
  end_request(peer, request);
}

void Exchange::end_request(Peer& peer, Request& request) {
  if (request.ticket != nullptr) --request.ticket->num_outstanding;
  for (Outgoing& outgoing : peer.queue) {
    if (outgoing.request == &request) outgoing.request = nullptr;
  }
  std::erase_if(peer.outstanding, [&request](const auto& other) { return other.get() == &request; });
}

void Exchange::fail(Peer& peer, LinkFailure failure, const std::string& message) {
  if (!peer.is_connected()) return;
  peer.failure = message;
  peer.socket->shutdown();
  peer.socket.reset();
  peer.queue.clear();
  peer.answer = {};
  peer.is_pinged = false;
  for (const auto& request : peer.outstanding) {
    if (request->ticket == nullptr) continue;
    --request->ticket->num_outstanding;
    tell(*request->ticket,
         {.peer = peer.id, .experts = request->unanswered(), .failure = failure, .message = message});
  }
  peer.outstanding.clear();
}

// ── waiting
// ─────────────────────────────────────────────────────────────────────────────────────────────────

std::vector<ExchangeEvent> Exchange::receive(int64_t id, Microseconds timeout) {
  std::unique_lock lock(mutex_);
  const Clock::time_point deadline = Clock::now() + timeout;
  for (bool is_over = false;;) {
    Ticket& ticket = ticket_of(id);
    if (!ticket.events.empty()) return std::exchange(ticket.events, {});
    if (ticket.num_outstanding == 0 || is_over) return {};
    const Clock::duration left = deadline - Clock::now();
    is_over = left <= Clock::duration::zero();  // look once more
    wait(lock, std::max(left, Clock::duration::zero()));
  }
}

// Waits without the lock until sockets are ready, or for `most`; then moves their bytes. The sockets stay
// open meanwhile, even if their peers are removed.
void Exchange::wait(std::unique_lock<std::mutex>& lock, Clock::duration most) {
  std::vector<pollfd> polled;
  std::vector<std::pair<int64_t, std::shared_ptr<StreamSocket>>> waiting;
  for (const auto& [id, peer] : peers_) {
    if (!peer->is_connected() || !peer->is_busy()) continue;
    // The socket of a faulty link may be ready while its bytes may not move: it is looked at again and again.
    if (peer->faults) most = std::min<Clock::duration>(most, FaultyLink::kTick);
    const bool has_output = !peer->queue.empty();
    polled.push_back(
        {peer->faults ? -1 : peer->socket->fd(), short(has_output ? POLLIN | POLLOUT : POLLIN), 0});
    waiting.emplace_back(id, peer->socket);
  }
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(most).count();
  const timespec time = {.tv_sec = nanoseconds / 1'000'000'000, .tv_nsec = nanoseconds % 1'000'000'000};
  lock.unlock();
  ppoll(polled.data(), polled.size(), &time, nullptr);
  lock.lock();
  for (size_t i = 0; i < polled.size(); ++i) {
    const auto found = peers_.find(waiting[i].first);
    if (found != peers_.end() && (polled[i].revents != 0 || polled[i].fd < 0)) {
      move_bytes(*found->second, Moves::both);
    }
  }
}

// Whether bytes have come that nobody has taken: whoever waits for them has other work.
bool Exchange::has_input(const Peer& peer) {
  pollfd polled = {peer.socket->fd(), POLLIN, 0};
  return peer.is_connected() && !peer.faults && poll(&polled, 1, 0) > 0;
}

std::vector<std::pair<int64_t, std::string>> Exchange::tend(Microseconds silence) {
  std::vector<std::pair<int64_t, std::string>> failed;
  std::lock_guard lock(mutex_);
  for (const auto& [id, peer] : peers_) {
    if (!peer->is_connected()) continue;
    const bool is_waited_for = peer->is_waited_for();
    const Microseconds most = is_waited_for ? kComputing * silence : silence;
    if (!peer->owes()) {
      const FrameHeader ping = {.type = FrameType::ping};
      std::vector<uint8_t> frame;
      append(frame, &ping, 1);
      peer->is_pinged = true;
      peer->heard_at = Clock::now();
      enqueue(*peer, std::move(frame), nullptr, {});
    }
    if (!is_waited_for) move_bytes(*peer, Moves::both);
    if (peer->owes() && Clock::now() - peer->heard_at > most && !has_input(*peer)) {
      fail(*peer, LinkFailure::silent,
           "nothing was received for " +
               std::to_string(std::chrono::duration_cast<std::chrono::seconds>(most).count()) + " s");
    }
    if (!peer->is_connected()) failed.emplace_back(id, peer->failure);
  }
  return failed;
}

}  // namespace argosy
