// exchange.h: the coordinator's end: sends a layer's rows to workers, and collects the outputs of experts.
//
//   Exchange exchange(limits);
//   const int64_t peer = exchange.add(fd);
//   const int64_t ticket = exchange.send(layer, dispatch, rows, out, {{peer, {3, 7}}});
//   for (const Event& event : exchange.receive(ticket, timeout)) ...     // outputs are in `out`
//   exchange.forget(ticket);
//
// An exchange has no thread: every call that sends or receives moves the bytes of all peers, without waiting
// for any of them. A peer that is stuck delays only its own queue. Rows are sent from the caller's memory
// and outputs are received into it, so a queue holds only lists of numbers, however long it is.
//
// `out` is written only inside receive(), of any ticket, and not after forget(); rows of an expert not after
// drop() either. An event names an expert once all of its rows are there. All rows come from one frame: if
// two peers were asked for the same expert, the frame that began last writes the rows, the first complete
// one is reported, and the rest is dropped.
//
// Every function may be called from any thread, and throws std::invalid_argument for mistakes of the caller.
// A mistake of a peer closes its connection, and becomes an event of each ticket that waits for it.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cluster/frame.h"
#include "cluster/link_faults.h"
#include "cluster/stream_socket.h"
#include "ops/experts.h"

namespace argosy {

// The experts of a dispatch that one peer runs.
struct Share {
  int64_t peer;
  std::vector<int32_t> experts;
};

// Without `failure`: the outputs of `experts` have been written. With it: the peer does not send theirs.
struct ExchangeEvent {
  int64_t peer;
  std::vector<int32_t> experts;
  std::optional<LinkFailure> failure = std::nullopt;
  int32_t code = 0;  // the refusal's code
  std::string message = {};
};

// From send() to the last output of a request.
struct ExchangeTimes {
  int64_t count = 0;
  double ewma_us = 0;             // the latest counts for an eighth
  double p50_us = 0, p99_us = 0;  // over the latest 64
};

struct PeerStats {
  bool is_connected = false;
  std::string failure = {};           // why it is not connected
  int64_t num_outstanding = 0;        // requests that are not completely answered
  int64_t oldest_outstanding_us = 0;  // 0: none
  int64_t num_late = 0;               // experts that were answered too late, and dropped
  int64_t bytes_out = 0, bytes_in = 0;
  int64_t queued_bytes = 0;  // not taken by the socket yet
  ExchangeTimes few_rows;    // requests of at most kFewRows rows
  ExchangeTimes many_rows;   // the others
};

class Exchange {
 public:
  using Clock = std::chrono::steady_clock;
  using Microseconds = std::chrono::microseconds;

  static constexpr int64_t kMostOutstanding = 16;  // requests of a peer, late ones included
  static constexpr int64_t kMostTickets = 64;
  static constexpr int64_t kMostPeers = 256;
  static constexpr int64_t kFewRows = 32;

  explicit Exchange(LinkLimits limits);  // throws what LinkLimits::check does
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  const LinkLimits& limits() const { return limits_; }

  // Takes over a connected socket whose other end is a WorkerLink with the same limits. Ids are never reused.
  int64_t add(int fd);
  void remove(int64_t peer);           // does nothing if it was removed before
  std::vector<int64_t> peers() const;  // connected

  // Asks peers for the outputs of experts of a dispatch. rows [num_tokens][hidden] and out
  // [num_assignments][hidden] stay in place until forget(). A peer that is gone or full becomes an event.
  int64_t send(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows, float* out,
               const std::vector<Share>& shares);
  // Asks further peers for experts of the ticket that are not done.
  void resend(int64_t ticket, const std::vector<Share>& shares);
  // Waits for events of the ticket. Returns none when the time is over, or no request of it is outstanding.
  std::vector<ExchangeEvent> receive(int64_t ticket, Microseconds timeout);
  bool is_outstanding(int64_t ticket) const;  // whether a peer owes it something
  // From now on the caller writes the outputs of these experts; answers that still arrive are dropped.
  void drop(int64_t ticket, const std::vector<int32_t>& experts);
  void forget(int64_t ticket);  // does nothing if it was forgotten before

  // Tells a peer which experts may be requested next, best-ranked first. A full peer is skipped.
  void guess(int64_t peer, int64_t layer, const std::vector<std::vector<int32_t>>& by_rank, bool is_sweep);

  // To be called now and then from a thread that does not run experts: pings idle peers, and drops late
  // answers. Returns the peers that failed in here, with the reason: also those that owe a frame, and have
  // sent nothing for `silence`. A peer that a ticket waits for may compute, and has seven times as long; its
  // bytes are left to receive().
  std::vector<std::pair<int64_t, std::string>> tend(Microseconds silence);

  std::string status(int64_t peer) const;  // from its last pong
  PeerStats stats(int64_t peer) const;
  // Returns the usual time of a peer for requests of about `num_rows` rows, without quantiles; nullopt if the
  // peer was removed.
  std::optional<ExchangeTimes> usual_times(int64_t peer, int64_t num_rows) const;
  void inject(int64_t peer, const LinkFaults& faults);
  int64_t buffer_bytes() const;
  void close();  // removes all peers

  // The most memory that the buffers of a number of peers take.
  static int64_t most_buffer_bytes(const LinkLimits& limits, int64_t num_peers);

 private:
  struct Ticket;
  struct Request;
  struct Outgoing;
  struct Peer;
  class Times;
  enum class Moves { out, both };

  Peer& peer_of(int64_t id) const;
  Ticket& ticket_of(int64_t id) const;
  static void tell(Ticket& ticket, ExchangeEvent event);

  void ask(Ticket& ticket, const std::vector<Share>& shares);
  std::unique_ptr<Request> make_request(Ticket& ticket, const Share& share,
                                        std::vector<int32_t>& tokens) const;
  void cancel(Peer& peer, Request& request);
  void enqueue(Peer& peer, std::vector<uint8_t> head, Request* request, std::vector<int32_t> tokens);

  void move_bytes(Peer& peer, Moves moves);
  void write(Peer& peer);
  void read(Peer& peer);
  std::pair<int64_t, int64_t> receive_some(Peer& peer, int64_t most);
  void use_buffered(Peer& peer);
  uint8_t* row_at(const Peer& peer, size_t expert, int64_t row);
  void advance(Peer& peer, int64_t nbytes);

  bool take_frame(Peer& peer);
  Request& answered_request(Peer& peer, const FrameHeader& header);
  void begin_answer(Peer& peer, const FrameHeader& header);
  void take_refusal(Peer& peer, const FrameHeader& header, std::string message);
  static void end_request(Peer& peer, Request& request);
  static void fail(Peer& peer, LinkFailure failure, const std::string& message);
  static bool has_input(const Peer& peer);
  void wait(std::unique_lock<std::mutex>& lock, Clock::duration most);

  const LinkLimits limits_;
  const std::vector<float> zeros_;  // a row of a request that was forgotten while its frame was being sent
  std::vector<uint8_t> dropped_;    // where late rows go
  mutable std::mutex mutex_;        // guards everything below, and everything of the peers
  std::map<int64_t, std::unique_ptr<Peer>> peers_;
  std::map<int64_t, std::unique_ptr<Ticket>> tickets_;
  std::vector<int32_t> row_of_token_;  // scratch of ask()
  int64_t next_peer_ = 1, next_ticket_ = 1;
  uint64_t next_frame_ = 1;
};

}  // namespace argosy
