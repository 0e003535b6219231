#include "cluster/worker_link.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <utility>

namespace argosy {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kInputBytes = 64 << 10;  // at least

[[noreturn]] void refuse_call(const std::string& sentence) { throw std::invalid_argument(sentence); }

void require(bool holds, const std::string& sentence) {
  if (!holds) throw LinkError(LinkFailure::protocol, "the coordinator " + sentence);
}

std::string text_of(int64_t number) { return std::to_string(number); }

int64_t input_bytes(const LinkLimits& limits) {
  return std::max(kInputBytes, int64_t(sizeof(FrameHeader)) +
                                   limits.most_experts() * int64_t(2 * sizeof(uint32_t)) +
                                   limits.most_assignments * int64_t(sizeof(uint32_t)));
}

}  // namespace

WorkerLink::WorkerLink(int fd, LinkLimits limits, std::chrono::milliseconds most_blocked)
    : limits_((limits.check(), std::move(limits))),
      most_blocked_(most_blocked),
      input_(size_t(input_bytes(limits_))),
      rows_(size_t(limits_.most_rows * limits_.row_bytes())),
      out_(size_t(limits_.most_assignments * limits_.row_bytes())),
      socket_(fd) {}

float* WorkerLink::rows() { return reinterpret_cast<float*>(rows_.data()); }

float* WorkerLink::out() { return reinterpret_cast<float*>(out_.data()); }

int64_t WorkerLink::buffer_bytes(const LinkLimits& limits) {
  return input_bytes(limits) + (limits.most_rows + limits.most_assignments) * limits.row_bytes();
}

void WorkerLink::interrupt() {
  is_interrupted_ = true;
  wake_.ring();
}

void WorkerLink::close() {
  is_closed_ = true;
  socket_.shutdown();  // wakes a thread that waits for it
}

void WorkerLink::set_status(std::string status) {
  if (int64_t(status.size()) > kMostTextBytes) {
    refuse_call("a status has " + std::to_string(status.size()) + " bytes, expected at most " +
                text_of(kMostTextBytes));
  }
  std::lock_guard lock(mutex_);
  status_ = std::move(status);
}

std::string WorkerLink::status() const {
  std::lock_guard lock(mutex_);
  return status_;
}

// ── receiving
// ───────────────────────────────────────────────────────────────────────────────────────────────

WorkerLink::Next WorkerLink::next(std::optional<std::chrono::milliseconds> timeout) {
  if (std::exchange(is_kept_, false)) return Next::request;
  if (num_unanswered_ > 0) {
    refuse_call("the request has " + text_of(num_unanswered_) +
                " experts without an answer; answer or refuse it first");
  }
  try {
    return receive_next(timeout ? Deadline(Clock::now() + *timeout) : std::nullopt);
  } catch (const LinkError& error) {
    const bool is_between_requests = !is_receiving_ && input_.size() == 0;
    const bool has_ended = is_closed_ || (error.failure() == LinkFailure::ended && is_between_requests);
    close();
    if (has_ended) return Next::ended;
    throw;
  }
}

WorkerLink::Next WorkerLink::receive_next(Deadline deadline) {
  while (true) {
    if (is_interrupted_.exchange(false)) {
      wake_.clear();
      return Next::interrupted;
    }
    if (const auto found = take_frame()) return *found;
    if (!wait_for_input(deadline)) return Next::idle;
    if (!is_interrupted_) receive();  // otherwise the end of the connection could hide the interrupt
  }
}

// Uses up what is in the buffer, as far as it is complete.
std::optional<WorkerLink::Next> WorkerLink::take_frame() {
  while (true) {
    use_buffered();
    if (frame_bytes_left_ > 0) return std::nullopt;
    if (is_receiving_ && row_bytes_here_ == rows_bytes()) {
      is_receiving_ = false;
      is_answered_.assign(dispatch_->experts().size(), false);
      num_unanswered_ = int64_t(dispatch_->experts().size());
      was_cancelled_ = false;
      return Next::request;
    }
    if (input_.size() < sizeof(FrameHeader)) return std::nullopt;
    const FrameHeader header = read_header(input_, "the coordinator");
    const bool has_list = header.type == FrameType::ask || header.type == FrameType::guess;
    const bool is_of_request = header.type == FrameType::rows || header.type == FrameType::cancel;
    require(has_list || is_of_request || header.type == FrameType::ping,
            "sent a frame of type " + text_of(int(header.type)));
    require(is_of_request || !is_receiving_,
            "sent a frame of type " + text_of(int(header.type)) + " before all rows of a request");
    if (has_list) {
      const uint64_t fits = input_.capacity() - sizeof(FrameHeader);
      require(header.payload_bytes <= fits, "sent a list of " + std::to_string(header.payload_bytes) +
                                                " bytes, expected at most " + std::to_string(fits));
      if (input_.size() < sizeof(FrameHeader) + header.payload_bytes) return std::nullopt;
    }
    input_.consume(sizeof(FrameHeader));
    if (has_list) {
      header.type == FrameType::ask ? begin_request(header) : take_guess(header);
      input_.consume(size_t(header.payload_bytes));
      if (header.type == FrameType::guess) return Next::guess;
    } else if (header.type == FrameType::rows) {
      begin_rows(header);
    } else {
      require(header.payload_bytes == 0, "sent a ping or a cancel with a payload");
      if (header.type == FrameType::ping) {
        send_text(FrameType::pong, header.request, 0, status());
      } else if (is_receiving_ && header.request == request_) {
        is_receiving_ = false;
        cancel();
      }  // otherwise the request was answered before the coordinator cancelled it
    }
  }
}

void WorkerLink::begin_request(const FrameHeader& header) {
  const int64_t num_experts = limits_.experts_of(header.layer);
  const int64_t num_asked = header.count_a, num_rows = header.count_b, num_assignments = header.count_c;
  require(num_experts > 0, "asked for layer " + text_of(header.layer) + ", which has no routed experts");
  require(num_asked >= 1 && num_asked <= num_experts && num_rows >= 1 && num_rows <= limits_.most_rows &&
              num_assignments >= num_asked && num_assignments <= limits_.most_assignments,
          "asked for " + text_of(num_asked) + " experts, " + text_of(num_rows) + " rows and " +
              text_of(num_assignments) + " assignments, expected at most " + text_of(num_experts) + ", " +
              text_of(limits_.most_rows) + " and " + text_of(limits_.most_assignments));
  const int64_t entry_bytes = num_asked * int64_t(sizeof(Entry));
  require(int64_t(header.payload_bytes) == entry_bytes + num_assignments * int64_t(sizeof(uint32_t)),
          "sent a list of " + std::to_string(header.payload_bytes) + " bytes, which does not fit its counts");
  std::vector<int32_t> experts, scan, starts = {0}, tokens;
  for (int64_t i = 0; i < num_asked; ++i) {
    const auto entry = read_item<Entry>(input_.data(), i);
    const auto expert = int64_t(entry.expert & ~Entry::kScan);
    require(expert < num_experts && (experts.empty() || expert > experts.back()),
            "asked for expert " + text_of(expert) + " of layer " + text_of(header.layer) + ", which has " +
                text_of(num_experts) + ", or asked for experts in another order");
    require(entry.count >= 1 && int64_t(entry.count) <= num_assignments - starts.back(),
            "listed " + text_of(entry.count) + " assignments of expert " + text_of(expert) +
                ", expected 1 to " + text_of(num_assignments - starts.back()));
    experts.push_back(int32_t(expert));
    if (entry.expert & Entry::kScan) scan.push_back(int32_t(expert));
    starts.push_back(starts.back() + int32_t(entry.count));
  }
  require(starts.back() == num_assignments,
          "listed " + text_of(starts.back()) + " assignments, expected " + text_of(num_assignments));
  tokens.reserve(size_t(num_assignments));
  for (int64_t a = 0; a < num_assignments; ++a) {
    const auto row = read_item<uint32_t>(input_.data() + entry_bytes, a);
    require(row < num_rows,
            "listed an assignment of row " + text_of(row) + ", expected 0 to " + text_of(num_rows - 1));
    tokens.push_back(int32_t(row));
  }
  if (dispatch_.use_count() > 1) dispatch_ = std::make_shared<Dispatch>();  // somebody keeps the last one
  dispatch_->list(std::move(experts), std::move(scan), std::move(starts), std::move(tokens), num_rows);
  request_ = header.request;
  layer_ = header.layer;
  is_receiving_ = true;
  row_bytes_here_ = 0;
}

void WorkerLink::begin_rows(const FrameHeader& header) {
  require(is_receiving_ && header.request == request_ && header.layer == layer_,
          "sent rows of a request that it did not begin");
  const int64_t row_bytes = limits_.row_bytes(), num_here = row_bytes_here_ / row_bytes;
  const int64_t most = std::min(kMostRowsOfFrame, dispatch_->num_tokens() - num_here);
  const int64_t num_rows = header.count_b;
  require(header.count_c == num_here && num_rows >= 1 && num_rows <= most &&
              header.payload_bytes == uint64_t(num_rows * row_bytes),
          "sent " + text_of(num_rows) + " rows from row " + text_of(header.count_c) + " in " +
              std::to_string(header.payload_bytes) + " bytes, expected at most " + text_of(most) +
              " from row " + text_of(num_here));
  frame_bytes_left_ = num_rows * row_bytes;
}

void WorkerLink::take_guess(const FrameHeader& header) {
  const int64_t num_experts = limits_.experts_of(header.layer), num_ranks = header.count_a;
  const int64_t num_numbers = int64_t(header.payload_bytes / sizeof(uint32_t));
  require(num_ranks <= num_experts && num_numbers >= num_ranks && num_numbers <= num_ranks + num_experts &&
              header.payload_bytes % sizeof(uint32_t) == 0,
          "guessed " + text_of(num_numbers) + " numbers in " + text_of(num_ranks) + " ranks for layer " +
              text_of(header.layer) + ", which has " + text_of(num_experts) + " experts");
  Guess guess = {.layer = header.layer, .by_rank = {}, .is_sweep = header.count_c != 0};
  std::vector<bool> is_named(static_cast<size_t>(num_experts));
  int64_t at = num_ranks;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    const int64_t size = read_item<uint32_t>(input_.data(), rank);
    require(size <= num_numbers - at, "guessed more experts than it sent");
    std::vector<int32_t>& experts = guess.by_rank.emplace_back();
    for (const int64_t end = at + size; at < end; ++at) {
      const int64_t expert = read_item<uint32_t>(input_.data(), at);
      require(expert < num_experts && !is_named[size_t(expert)],
              "guessed expert " + text_of(expert) + " twice, or a layer without it");
      is_named[size_t(expert)] = true;
      experts.push_back(int32_t(expert));
    }
  }
  require(at == num_numbers, "guessed fewer experts than it sent");
  guess_ = std::move(guess);
}

// Rows that came in one call with what was before them.
void WorkerLink::use_buffered() {
  const int64_t nbytes = std::min(int64_t(input_.size()), frame_bytes_left_);
  if (nbytes == 0) return;
  std::copy_n(input_.data(), nbytes, rows_.data() + row_bytes_here_);
  input_.consume(size_t(nbytes));
  row_bytes_here_ += nbytes;
  frame_bytes_left_ -= nbytes;
}

// Receives what is there: rows to their place, what follows them to the buffer.
void WorkerLink::receive() {
  Parts parts;
  if (frame_bytes_left_ > 0) parts.add(rows_.data() + row_bytes_here_, frame_bytes_left_);
  uint8_t* room = input_.room();
  if (input_.room_bytes() > 0) parts.add(room, int64_t(input_.room_bytes()));
  const int64_t received = socket_.receive(parts);
  const int64_t of_rows = std::min(received, frame_bytes_left_);
  row_bytes_here_ += of_rows;
  frame_bytes_left_ -= of_rows;
  input_.landed(size_t(received - of_rows));
}

bool WorkerLink::wait_for_input(Deadline deadline) {
  pollfd polled[] = {{socket_.fd(), POLLIN, 0}, {wake_.fd(), POLLIN, 0}};
  int most_ms = -1;
  if (deadline) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline - Clock::now()).count();
    most_ms = int(std::clamp<int64_t>(left, 0, 1 << 30));
  }
  const int num_ready = poll(polled, 2, most_ms);
  if (polled[1].revents != 0) wake_.clear();
  return num_ready != 0 || !deadline || Clock::now() < *deadline;
}

bool WorkerLink::is_cancelled() {
  if (num_unanswered_ == 0) return was_cancelled_;
  try {
    if (input_.room_bytes() > 0) receive();
    if (input_.size() < sizeof(FrameHeader)) return false;
    const FrameHeader header = read_header(input_, "the coordinator");
    if (header.type != FrameType::cancel || header.request != request_) return false;
    require(header.payload_bytes == 0, "sent a cancel with a payload");
    input_.consume(sizeof(FrameHeader));
    cancel();
  } catch (const LinkError&) {
    was_cancelled_ = true;  // next() finds the same
    num_unanswered_ = 0;
  }
  return was_cancelled_;
}

void WorkerLink::cancel() {
  was_cancelled_ = true;
  num_unanswered_ = 0;
  send_text(FrameType::refusal, request_, kRefusedAsCancelled, "");
}

// ── answering
// ───────────────────────────────────────────────────────────────────────────────────────────────

void WorkerLink::answer(const std::vector<int32_t>& experts) {
  if (was_cancelled_ || experts.empty()) return;
  std::vector<size_t> indices;
  for (const int32_t expert : experts) {
    const int64_t index = num_unanswered_ > 0 ? dispatch_->index_of(expert) : -1;
    if (index < 0 || is_answered_[size_t(index)]) {
      refuse_call("expert " + text_of(expert) + " waits for no answer");
    }
    indices.push_back(size_t(index));
  }
  std::sort(indices.begin(), indices.end());
  if (std::adjacent_find(indices.begin(), indices.end()) != indices.end()) {
    refuse_call("an expert is named twice");
  }
  const std::vector<int32_t>& starts = dispatch_->starts();
  const int64_t row_bytes = limits_.row_bytes();
  std::vector<uint8_t> head(sizeof(FrameHeader));
  int64_t num_rows = 0;
  for (const size_t index : indices) {
    const Entry entry = {uint32_t(dispatch_->experts()[index]), uint32_t(starts[index + 1] - starts[index])};
    append(head, &entry, 1);
    num_rows += entry.count;
  }
  const FrameHeader header = {
      .type = FrameType::answer,
      .layer = uint16_t(layer_),
      .request = request_,
      .count_a = uint32_t(indices.size()),
      .count_b = uint32_t(num_rows),
      .payload_bytes = head.size() - sizeof(FrameHeader) + uint64_t(num_rows * row_bytes)};
  memcpy(head.data(), &header, sizeof(header));
  Parts parts;
  parts.add(head.data(), int64_t(head.size()));
  for (const size_t index : indices) {
    if (parts.is_full()) send(parts);
    parts.add(out_.data() + starts[index] * row_bytes, (starts[index + 1] - starts[index]) * row_bytes);
  }
  send(parts);
  for (const size_t index : indices) is_answered_[index] = true;
  num_unanswered_ -= int64_t(indices.size());
}

void WorkerLink::refuse(int32_t code, const std::string& message) {
  if (was_cancelled_) return;
  if (num_unanswered_ == 0) refuse_call("no request waits for an answer");
  num_unanswered_ = 0;
  send_text(FrameType::refusal, request_, code, message.substr(0, size_t(kMostTextBytes)));
}

void WorkerLink::send_text(FrameType type, uint32_t request, int32_t code, const std::string& text) {
  const FrameHeader header = {.type = type,
                              .layer = type == FrameType::refusal ? uint16_t(layer_) : uint16_t(0),
                              .request = request,
                              .count_c = uint32_t(code),
                              .payload_bytes = text.size()};
  Parts parts;
  parts.add(&header, sizeof(header));
  if (!text.empty()) parts.add(text.data(), int64_t(text.size()));
  send(parts);
}

// Sends all parts and removes them. Waits only while the socket is full.
void WorkerLink::send(Parts& parts) {
  try {
    while (!parts.is_empty()) {
      const int64_t sent = socket_.send(parts);
      parts.remove(sent);
      if (sent > 0) continue;
      pollfd polled = {socket_.fd(), POLLOUT, 0};
      if (poll(&polled, 1, int(most_blocked_.count())) == 0) {
        throw LinkError(LinkFailure::silent,
                        "the coordinator took nothing for " + text_of(most_blocked_.count()) + " ms");
      }
    }
  } catch (const LinkError&) {
    num_unanswered_ = 0;
    close();
    throw;
  }
}

WorkerLink::Next WorkerLink::serve_resident(Runtime& runtime, ExpertTable& table,
                                            std::optional<std::chrono::milliseconds> timeout) {
  if (table.hidden() != limits_.hidden) {
    refuse_call("the table's hidden is " + text_of(table.hidden()) + ", expected " + text_of(limits_.hidden));
  }
  while (true) {
    const Next found = next(timeout);
    if (found == Next::guess) continue;
    if (found != Next::request) return found;
    const std::vector<int32_t>& experts = dispatch_->experts();
    if (!table.has_places(layer_, experts)) {
      is_kept_ = true;
      return Next::request;
    }
    try {
      table.run(runtime, layer_, experts, *dispatch_, rows(), out());
    } catch (const std::exception& error) {
      refuse(0, error.what());
      throw;
    }
    answer(experts);
  }
}

}  // namespace argosy
