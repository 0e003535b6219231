// worker_link.h: the worker's end of a connection: receives requests one after another, and answers them.
//
//   WorkerLink link(fd, limits);
//   while (link.next() == WorkerLink::Next::request) {
//     table.run(runtime, link.layer(), experts, *link.dispatch(), link.rows(), link.out());
//     link.answer(experts);                                      // some experts, then the others
//   }
//
// The rows of a request and the outputs of its assignments lie in memory that the link has from the start.
// Everything that the coordinator sends is compared with the limits before it is used. A frame that breaks a
// rule closes the connection and throws LinkError.
//
// One thread serves a link; interrupt(), close() and set_status() may be called from any.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cluster/frame.h"
#include "cluster/stream_socket.h"
#include "ops/experts.h"
#include "store/arena.h"

namespace argosy {

class WorkerLink {
 public:
  enum class Next {
    request,      // layer(), dispatch(), rows(), out()
    guess,        // guess()
    ended,        // the coordinator closed the connection between two requests, or close() was called
    interrupted,  // interrupt() was called
    idle,         // nothing came in time
  };
  struct Guess {
    int64_t layer;
    std::vector<std::vector<int32_t>> by_rank;
    bool is_sweep;
  };

  // A coordinator that takes nothing of an answer for this long is given up: others wait for this machine.
  static constexpr std::chrono::milliseconds kMostBlocked{10'000};

  // Takes over a connected socket. Throws std::invalid_argument for invalid limits or a descriptor that is
  // not a stream socket, which then stays the caller's, and OutOfMemory.
  WorkerLink(int fd, LinkLimits limits, std::chrono::milliseconds most_blocked = kMostBlocked);
  WorkerLink(const WorkerLink&) = delete;
  WorkerLink& operator=(const WorkerLink&) = delete;

  const LinkLimits& limits() const { return limits_; }

  // Waits for a request or a guess, for at most `timeout`; answers pings meanwhile. Throws
  // std::invalid_argument while the current request has experts without an answer.
  Next next(std::optional<std::chrono::milliseconds> timeout = std::nullopt);

  // The current request, until next() is called again.
  int64_t layer() const { return layer_; }
  const std::shared_ptr<Dispatch>& dispatch() const { return dispatch_; }
  float* rows();  // [num_tokens][hidden]
  float* out();   // [num_assignments][hidden]
  const Guess& guess() const { return guess_; }

  // Sends the outputs of these experts of the request, each named once; waits until the socket has taken
  // them. Does nothing if the request was cancelled.
  void answer(const std::vector<int32_t>& experts);
  // Ends the request without the outputs that were not sent. `message` is cut after kMostTextBytes.
  void refuse(int32_t code, const std::string& message);
  // Whether the coordinator no longer wants the request, which then has ended. Never waits.
  bool is_cancelled();

  // Answers requests until one needs an expert without a place (`request`; next() then returns it, too), the
  // connection ends, interrupt() is called, or nothing came for `timeout`. Drops guesses. Rethrows what
  // ExpertTable::run throws, after a refusal.
  Next serve_resident(Runtime& runtime, ExpertTable& table,
                      std::optional<std::chrono::milliseconds> timeout = std::nullopt);

  void interrupt();  // the call of next() or serve_resident() that runs, or the following one, returns
  void close();
  void set_status(std::string status);  // for pongs; throws std::invalid_argument above kMostTextBytes
  std::string status() const;

  int64_t buffer_bytes() const;
  static int64_t buffer_bytes(const LinkLimits& limits);

 private:
  using Deadline = std::optional<std::chrono::steady_clock::time_point>;

  Next receive_next(Deadline deadline);
  std::optional<Next> take_frame();
  void begin_request(const FrameHeader& header);
  void begin_rows(const FrameHeader& header);
  void take_guess(const FrameHeader& header);
  void use_buffered();
  void receive();
  bool wait_for_input(Deadline deadline);
  void cancel();
  void send_text(FrameType type, uint32_t request, int32_t code, const std::string& text);
  void send(Parts& parts);
  int64_t rows_bytes() const { return dispatch_->num_tokens() * limits_.row_bytes(); }

  const LinkLimits limits_;
  const std::chrono::milliseconds most_blocked_;
  WakeUp wake_;
  InputBuffer input_;
  Arena rows_, out_;
  StreamSocket socket_;  // the last that may throw, so a descriptor is taken over by all or by nothing
  uint32_t request_ = 0;
  int64_t layer_ = 0;
  std::shared_ptr<Dispatch> dispatch_ = std::make_shared<Dispatch>();
  bool is_receiving_ = false;      // the rows of the request
  int64_t row_bytes_here_ = 0;     // rows of the request, as bytes
  int64_t frame_bytes_left_ = 0;   // in the frame of rows that is being received
  std::vector<bool> is_answered_;  // by index in dispatch_->experts()
  int64_t num_unanswered_ = 0;
  bool was_cancelled_ = false;
  bool is_kept_ = false;  // next() returns the current request again
  Guess guess_ = {};
  std::atomic<bool> is_interrupted_ = false, is_closed_ = false;
  mutable std::mutex mutex_;  // guards status_
  std::string status_;
};

}  // namespace argosy
