// test_cluster.cpp: whatever the other end sends, a link ends in an answer, a refusal or a named error.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cluster/exchange.h"
#include "cluster/worker_link.h"

using namespace argosy;
using std::chrono::microseconds;
using std::chrono::milliseconds;

namespace {

constexpr int64_t kHidden = 32, kWidth = 32, kTokens = 300, kK = 2, kLayer = 1;
constexpr int32_t kExperts = 4;
constexpr int kMutations = 10'000;
constexpr microseconds kLong{20'000'000};
constexpr uint32_t kUntouched = 0x7fc0dead;  // a value that no expert and no mutation of one byte writes

const LinkLimits kLimits = {kHidden, {0, kExperts}, kTokens, kTokens* kK};

using Bytes = std::vector<uint8_t>;

// Four experts of small weights, and a runtime that runs them.
struct Worker {
  Arena arena{size_t(kExperts * 3 * matrix_bytes(Format::f32, kHidden, kWidth))};
  ExpertTable table{arena.hold(), arena.data(), int64_t(arena.size()), kHidden, Activation{}};
  Runtime runtime{1};

  Worker() {
    const int64_t of_matrix = matrix_bytes(Format::f32, kHidden, kWidth);
    auto* weights = reinterpret_cast<float*>(arena.data());
    for (size_t i = 0; i < arena.size() / sizeof(float); ++i) weights[i] = float(int(i % 7) - 3) / 8;
    ExpertLayer layer = {.formats = {Format::f32, Format::f32, Format::f32}, .width = kWidth, .starts = {}};
    layer.starts.assign(kExperts, {0, of_matrix, 2 * of_matrix});
    table.add_layer(kLayer, layer);
    for (int64_t expert = 0; expert < kExperts; ++expert) table.place(kLayer, expert, 3 * of_matrix * expert);
  }
};

// The rows of a layer, and outputs with a guard on both sides.
struct Step {
  std::shared_ptr<Dispatch> dispatch = std::make_shared<Dispatch>();
  std::vector<float> rows, memory;

  explicit Step(int64_t num_tokens)
      : rows(size_t(num_tokens * kHidden)), memory(size_t((num_tokens * kK + 2) * kHidden)) {
    std::vector<int32_t> choices;
    const auto is_decode = std::make_unique<bool[]>(size_t(num_tokens));
    for (int64_t token = 0; token < num_tokens; ++token) {
      is_decode[size_t(token)] = token % 2 == 0;
      choices.push_back(int32_t(token % kExperts));
      choices.push_back(int32_t((token + 1 + token / kExperts % 2) % kExperts));
    }
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = float(i % 11) / 4;
    dispatch->assign(choices.data(), is_decode.get(), num_tokens, kK, kExperts);
    clear();
  }

  void clear() { std::fill(memory.begin(), memory.end(), std::bit_cast<float>(kUntouched)); }
  float* out() { return memory.data() + kHidden; }
  bool is_touched(int64_t row) const {
    const auto begin = memory.begin() + (row + 1) * kHidden;
    return std::none_of(begin, begin + kHidden,
                        [](float value) { return std::bit_cast<uint32_t>(value) == kUntouched; });
  }
  bool has_guards() const {
    const auto is_untouched = [](float value) { return std::bit_cast<uint32_t>(value) == kUntouched; };
    return std::all_of(memory.begin(), memory.begin() + kHidden, is_untouched) &&
           std::all_of(memory.end() - kHidden, memory.end(), is_untouched);
  }
  bool has(int32_t expert) const {
    const auto index = size_t(dispatch->index_of(expert));
    for (int32_t at = dispatch->starts()[index]; at < dispatch->starts()[index + 1]; ++at) {
      if (!is_touched(dispatch->assignments()[size_t(at)])) return false;
    }
    return true;
  }
};

struct Pair {
  int ours = -1, theirs = -1;
  Pair() {
    int fds[2];
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    ours = fds[0];
    theirs = fds[1];
  }
};

void put(int fd, const Bytes& bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t sent = ::send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (sent <= 0) return;  // the link has closed the connection
    at += size_t(sent);
  }
}

// Everything that has come.
Bytes take(int fd) {
  Bytes bytes(1 << 20);
  size_t size = 0;
  for (ssize_t got; (got = ::recv(fd, bytes.data() + size, bytes.size() - size, MSG_DONTWAIT)) > 0;) {
    size += size_t(got);
  }
  bytes.resize(size);
  return bytes;
}

FrameHeader header_at(const Bytes& bytes, size_t at) {
  FrameHeader header;
  memcpy(&header, bytes.data() + at, sizeof(header));
  return header;
}

std::vector<size_t> frames_of(const Bytes& bytes) {
  std::vector<size_t> starts;
  for (size_t at = 0; at < bytes.size(); at += sizeof(FrameHeader) + header_at(bytes, at).payload_bytes) {
    starts.push_back(at);
  }
  return starts;
}

// Returns a coordinator's stream: two requests, a guess, a ping and a cancel.
Bytes coordinator_bytes(Step& step, std::vector<int32_t> experts) {
  Exchange exchange(kLimits);
  Pair pair;
  const int64_t peer = exchange.add(pair.ours);
  exchange.tend(kLong);
  exchange.guess(peer, kLayer, {{1, 2}, {0}}, true);
  for (int i = 0; i < 2; ++i) {
    exchange.forget(exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, experts}}));
  }
  Bytes bytes = take(pair.theirs);
  ::close(pair.theirs);
  return bytes;
}

// Answers of a worker to request 1.
Bytes worker_bytes(Worker& worker, Step& step, const std::vector<std::vector<int32_t>>& groups) {
  Exchange exchange(kLimits);
  Pair pair;
  const int ours = dup(pair.ours);  // the exchange does not read, so the answers come out here
  const int64_t peer = exchange.add(pair.ours);
  WorkerLink link(pair.theirs, kLimits);
  exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, step.dispatch->experts()}});
  CHECK(link.next() == WorkerLink::Next::request);
  for (const auto& group : groups) {
    worker.table.run(worker.runtime, kLayer, group, *link.dispatch(), link.rows(), link.out());
    link.answer(group);
  }
  const Bytes bytes = take(ours);
  ::close(ours);
  return bytes;
}

Bytes mutated(const Bytes& valid, std::mt19937& random) {
  Bytes bytes = valid;
  const std::vector<size_t> frames = frames_of(valid);
  const auto below = [&random](size_t count) { return size_t(random() % count); };
  for (size_t left = 1 + below(3); left > 0 && !bytes.empty(); --left) {
    const size_t frame = frames[below(frames.size())];
    const size_t in_head = std::min(frame + below(sizeof(FrameHeader) + 64), bytes.size() - 1);
    const size_t length = std::min(1 + below(100), bytes.size() - in_head);
    const auto from = bytes.begin() + std::ptrdiff_t(in_head);
    switch (below(7)) {
      case 0:
      case 1:
        bytes[in_head] ^= uint8_t(1u << below(8));
        break;
      case 2: {  // a field of a header becomes extreme
        const uint32_t values[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 1'000'000'000};
        const uint32_t value = values[below(std::size(values))];
        const size_t field = std::min(frame + 4 * below(8), bytes.size());
        memcpy(bytes.data() + field, &value, std::min(sizeof(value), bytes.size() - field));
        break;
      }
      case 3:
        bytes.resize(in_head);
        break;
      case 4:
        bytes.erase(from, from + std::ptrdiff_t(length));
        break;
      case 5: {
        const Bytes copy(from, from + std::ptrdiff_t(length));
        bytes.insert(bytes.begin() + std::ptrdiff_t(below(bytes.size())), copy.begin(), copy.end());
        break;
      }
      default: {  // a frame comes twice
        const size_t end = std::min(frame + sizeof(FrameHeader) + 200, bytes.size());
        if (frame >= end) break;
        const Bytes copy(bytes.begin() + std::ptrdiff_t(frame), bytes.begin() + std::ptrdiff_t(end));
        bytes.insert(bytes.begin() + std::ptrdiff_t(frame), copy.begin(), copy.end());
      }
    }
  }
  return bytes;
}

// Serves a worker that receives these bytes and then the end. Returns the error, or nothing.
std::string serve(Worker& worker, const Bytes& bytes, Bytes* answers = nullptr) {
  Pair pair;
  WorkerLink link(pair.theirs, kLimits);
  std::thread writer([&] {
    put(pair.ours, bytes);
    ::shutdown(pair.ours, SHUT_WR);
  });
  std::string error;
  try {
    // Every call takes a frame or ends, so it ends.
    while (link.serve_resident(worker.runtime, worker.table) != WorkerLink::Next::ended) CHECK(false);
  } catch (const LinkError& thrown) {
    error = thrown.what();
  }
  link.close();
  writer.join();
  if (answers != nullptr) *answers = take(pair.ours);
  ::close(pair.ours);
  return error;
}

// Receives these bytes as the answer to a request for all experts. Returns the events.
std::vector<ExchangeEvent> receive(Step& step, const Bytes& bytes) {
  Exchange exchange(kLimits);
  Pair pair;
  const int64_t peer = exchange.add(pair.ours);
  step.clear();
  const int64_t ticket =
      exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, step.dispatch->experts()}});
  take(pair.theirs);
  put(pair.theirs, bytes);
  ::close(pair.theirs);
  std::vector<ExchangeEvent> events;
  while (true) {
    const auto latest = exchange.receive(ticket, kLong);
    if (latest.empty()) break;
    events.insert(events.end(), latest.begin(), latest.end());
  }
  exchange.forget(ticket);
  return events;
}

// ── what the other end may send
// ─────────────────────────────────────────────────────────────────────────────

void mutated_frames_end_a_worker_by_name_and_never_reach_beyond_its_buffers() {
  Worker worker;
  Step step(6);
  const Bytes valid = coordinator_bytes(step, step.dispatch->experts());
  CHECK_EQUAL(serve(worker, valid), "");
  std::mt19937 random(17);
  int num_named = 0;
  for (int i = 0; i < kMutations; ++i) {
    const std::string error = serve(worker, mutated(valid, random));
    if (!error.empty()) ++num_named;
  }
  CHECK(num_named > kMutations / 2);
  CHECK(num_named < kMutations);
}

void mutated_answers_end_a_connection_by_name_and_write_only_rows_that_were_asked_for() {
  Worker worker;
  Step step(6);
  const Bytes valid = worker_bytes(worker, step, {{0, 2}, {3}, {1}});
  std::vector<ExchangeEvent> events = receive(step, valid);
  CHECK_EQUAL(events.size(), 1u);
  CHECK_EQUAL(events[0].experts.size(), size_t(kExperts));
  CHECK(!events[0].failure);
  std::mt19937 random(18);
  int num_failed = 0;
  for (int i = 0; i < kMutations; ++i) {
    events = receive(step, mutated(valid, random));
    std::vector<int> times_told(kExperts);
    for (const ExchangeEvent& event : events) {
      for (const int32_t expert : event.experts) {
        ++times_told[size_t(expert)];
        if (!event.failure) CHECK(step.has(expert));
      }
      if (event.failure) ++num_failed;
    }
    CHECK(times_told == std::vector<int>(kExperts, 1));
    CHECK(step.has_guards());
  }
  CHECK(num_failed > kMutations / 2);
}

// A valid request of six rows, with one change.
Bytes changed(const std::function<void(Bytes&, size_t ask, size_t rows)>& change) {
  Step step(6);
  Exchange exchange(kLimits);
  Pair pair;
  const int64_t peer = exchange.add(pair.ours);
  exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, step.dispatch->experts()}});
  Bytes bytes = take(pair.theirs);
  ::close(pair.theirs);
  const std::vector<size_t> frames = frames_of(bytes);
  CHECK_EQUAL(frames.size(), 2u);
  change(bytes, frames[0], frames[1]);
  return bytes;
}

Bytes with_header(const std::function<void(FrameHeader& ask, FrameHeader& rows)>& change) {
  return changed([&](Bytes& bytes, size_t ask, size_t rows) {
    FrameHeader of_ask = header_at(bytes, ask), of_rows = header_at(bytes, rows);
    change(of_ask, of_rows);
    memcpy(bytes.data() + ask, &of_ask, sizeof(of_ask));
    memcpy(bytes.data() + rows, &of_rows, sizeof(of_rows));
  });
}

Bytes with_number(size_t index, uint32_t value) {  // in the list of experts and rows
  return changed([&](Bytes& bytes, size_t ask, size_t) {
    memcpy(bytes.data() + ask + sizeof(FrameHeader) + 4 * index, &value, sizeof(value));
  });
}

void expect(const Bytes& bytes, const std::string& sentence) {
  static Worker worker;
  const std::string error = serve(worker, bytes);
  if (error.find(sentence) == std::string::npos) CHECK_EQUAL(error, sentence);
  CHECK(!error.empty());
}

void a_worker_names_what_a_coordinator_did_wrong() {
  expect(with_header([](auto& ask, auto&) { ask.count_b = 1'000'000'000; }), "1000000000 rows");
  expect(with_header([](auto& ask, auto&) { ask.count_b = 0; }), "0 rows");
  expect(with_header([](auto& ask, auto&) { ask.count_b = kTokens + 1; }), "expected at most 4, 300 and 600");
  expect(with_header([](auto& ask, auto&) { ask.count_a = 0; }), "asked for 0 experts");
  expect(with_header([](auto& ask, auto&) { ask.count_a = 5; }), "asked for 5 experts");
  expect(with_header([](auto& ask, auto&) { ask.count_c = 601; }), "601 assignments");
  expect(with_header([](auto& ask, auto&) { ask.count_c = 11; }), "does not fit its counts");
  expect(with_header([](auto& ask, auto&) { ask.layer = 0; }), "layer 0, which has no routed experts");
  expect(with_header([](auto& ask, auto&) { ask.layer = 9; }), "layer 9, which has no routed experts");
  expect(with_header([](auto& ask, auto&) { ask.payload_bytes = uint64_t{1} << 63; }), "sent a list of 9223");
  expect(with_header([](auto& ask, auto&) { ask.version = 2; }), "version 2, expected 1");
  expect(with_header([](auto& ask, auto&) { ask.type = FrameType::answer; }), "sent a frame of type 6");
  expect(with_header([](auto& ask, auto&) { ask.type = FrameType(0); }), "sent a frame of type 0");
  expect(with_header([](auto& ask, auto&) { ask.type = FrameType::ping; }), "with a payload");
  expect(with_header([](auto& ask, auto&) { ask.type = FrameType::guess; }), "guessed");
  expect(with_header([](auto& ask, auto&) { ask.type = FrameType::rows; }), "did not begin");
  expect(with_header([](auto&, auto& rows) { rows.count_b = 7; }), "sent 7 rows from row 0");
  expect(with_header([](auto&, auto& rows) { rows.count_b = 0; }), "sent 0 rows from row 0");
  expect(with_header([](auto&, auto& rows) { rows.count_c = 1; }), "from row 1");
  expect(with_header([](auto&, auto& rows) { rows.request = 9; }), "did not begin");
  expect(with_header([](auto&, auto& rows) { rows.payload_bytes += 4; }), "expected at most 6 from row 0");
  expect(with_header([](auto&, auto& rows) { rows.type = FrameType::ask; }), "before all rows of a request");
  expect(with_header([](auto&, auto& rows) { rows.type = FrameType::ping; }), "before all rows of a request");
  expect(with_number(0, 4), "asked for expert 4");
  expect(with_number(2, 0), "in another order");
  expect(with_number(1, 0), "listed 0 assignments");
  expect(with_number(1, 0x80000001), "listed 2147483649 assignments");
  expect(with_number(8, 6), "an assignment of row 6, expected 0 to 5");
  expect(changed([](Bytes& bytes, size_t, size_t rows) { bytes.resize(rows + 40); }),
         "closed the connection");
  expect(changed([](Bytes& bytes, size_t, size_t rows) { bytes.resize(rows - 1); }), "closed the connection");
  expect(changed([](Bytes& bytes, size_t, size_t) { bytes.resize(31); }), "closed the connection");
  expect(changed([](Bytes& bytes, size_t ask, size_t rows) {  // the rows come twice
           const Bytes again(bytes.begin() + std::ptrdiff_t(rows), bytes.end());
           CHECK_EQUAL(ask, 0u);
           bytes.insert(bytes.end(), again.begin(), again.end());
         }),
         "did not begin");
}

Bytes answer_frame(FrameHeader header, const std::vector<Entry>& entries, size_t num_rows) {
  Bytes bytes;
  header.payload_bytes += entries.size() * sizeof(Entry) + num_rows * kHidden * sizeof(float);
  append(bytes, &header, 1);
  append(bytes, entries.data(), entries.size());
  bytes.resize(bytes.size() + num_rows * kHidden * sizeof(float), 0x40);
  return bytes;
}

void expect_failure(const Bytes& bytes, const std::string& sentence) {
  Step step(6);  // each expert has three assignments
  const auto events = receive(step, bytes);
  CHECK(!events.empty() && events.back().failure == LinkFailure::protocol);
  const std::string message = events.empty() ? "" : events.back().message;
  if (message.find(sentence) == std::string::npos) CHECK_EQUAL(message, sentence);
  CHECK(step.has_guards());
}

void a_coordinator_names_what_a_worker_did_wrong() {
  const FrameHeader answer = {
      .type = FrameType::answer, .layer = kLayer, .request = 1, .count_a = 1, .count_b = 3};
  const auto with = [&answer](const std::function<void(FrameHeader&)>& change,
                              const std::vector<Entry>& entries = {{0, 3}}) {
    FrameHeader header = answer;
    change(header);
    return answer_frame(header, entries, 3);
  };
  const auto same = [](FrameHeader&) {};
  expect_failure(with([](auto& h) { h.request = 2; }), "answered request 2 of layer 1");
  expect_failure(with([](auto& h) { h.layer = 0; }), "answered request 1 of layer 0");
  expect_failure(with([](auto& h) { h.count_b = 1'000'000'000; }), "sent an answer of");
  expect_failure(with([](auto& h) { h.payload_bytes = uint64_t{1} << 62; }), "sent an answer of");
  expect_failure(with([](auto& h) { h.count_a = 0; }), "sent an answer of");
  expect_failure(with([](auto& h) { h.count_a = 0xffffffff; }), "answered for too many experts");
  expect_failure(with([](auto& h) { h.version = 0; }), "version 0, expected 1");
  expect_failure(with([](auto& h) { h.type = FrameType::ask; }), "sent a frame of type 1");
  expect_failure(with([](auto& h) { h.type = FrameType::pong; }), "sent a pong without a ping");
  expect_failure(with([](auto& h) { h.type = FrameType::refusal, h.payload_bytes = 5000; }),
                 "sent a text of");
  expect_failure(with(same, {{4, 3}}), "answered expert 4 of layer 1");
  expect_failure(with(same, {{0xffffffff, 3}}), "answered expert 4294967295");
  expect_failure(with(same, {{0, 2}}), "answered expert 0 of layer 1 with 2 rows");
  FrameHeader two = answer;
  two.count_a = 2, two.count_b = 6;
  expect_failure(answer_frame(two, {{1, 3}, {0, 3}}, 6), "answered expert 0");
  expect_failure(answer_frame(two, {{1, 3}, {1, 3}}, 6), "answered expert 1");
  Bytes twice = answer_frame(answer, {{0, 3}}, 3);
  const Bytes again = twice;
  twice.insert(twice.end(), again.begin(), again.end());
  expect_failure(twice, "answered expert 0");
}

void an_answer_before_the_question_is_complete_ends_the_connection() {
  Exchange exchange(kLimits);
  Pair pair;
  int size = 4096;
  setsockopt(pair.ours, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
  const int64_t peer = exchange.add(pair.ours);
  Step step(kTokens);
  const int64_t ticket = exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, {0}}});
  CHECK(exchange.stats(peer).queued_bytes > 0);
  put(pair.theirs,
      answer_frame({.type = FrameType::answer, .layer = kLayer, .request = 1, .count_a = 1, .count_b = 150},
                   {{0, 150}}, 150));
  const auto events = exchange.receive(ticket, kLong);
  CHECK_EQUAL(events.size(), 1u);
  CHECK(events[0].failure == LinkFailure::protocol);
  CHECK(!step.is_touched(0));
  ::close(pair.theirs);
}

void a_peer_that_a_ticket_waits_for_is_given_up_once_it_is_silent_for_seven_times_as_long() {
  Exchange exchange(kLimits);
  Pair pair;
  const int64_t peer = exchange.add(pair.ours);
  Step step(kTokens);
  const int64_t ticket = exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, {0}}});
  CHECK(exchange.tend(kLong).empty());
  std::this_thread::sleep_for(microseconds(2000));
  const uint8_t byte = 1;
  CHECK_EQUAL(::send(pair.theirs, &byte, 1, MSG_NOSIGNAL), 1);
  CHECK(exchange.tend(microseconds(1)).empty());  // a byte has come, and receive() has not taken it yet
  CHECK(exchange.receive(ticket, microseconds(0)).empty());
  std::this_thread::sleep_for(microseconds(2000));
  CHECK_EQUAL(exchange.tend(microseconds(1)).size(), 1u);
  const auto events = exchange.receive(ticket, kLong);
  CHECK_EQUAL(events.size(), 1u);
  CHECK(events[0].failure == LinkFailure::silent);
  ::close(pair.theirs);
}

void a_coordinator_that_takes_nothing_of_an_answer_is_given_up() {
  Pair pair;
  int size = 4096;
  setsockopt(pair.theirs, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
  WorkerLink link(pair.theirs, kLimits, std::chrono::milliseconds(20));
  Exchange exchange(kLimits);
  exchange.add(pair.ours);
  Step step(kTokens);
  exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{1, {0}}});
  CHECK(link.next() == WorkerLink::Next::request);
  try {
    link.answer({0});
    CHECK(false);
  } catch (const LinkError& error) {
    CHECK(error.failure() == LinkFailure::silent);
  }
}

void a_single_stall_does_not_raise_the_usual_time() {
  Exchange exchange(kLimits);
  Pair pair;
  const int64_t peer = exchange.add(pair.ours);
  Step step(1);
  const auto answer_after = [&](microseconds pause, uint32_t request) {
    const std::vector<int32_t> experts = step.dispatch->experts();
    const int64_t ticket =
        exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(), {{peer, {experts[0]}}});
    std::this_thread::sleep_for(pause);
    put(pair.theirs,
        answer_frame(
            {.type = FrameType::answer, .layer = kLayer, .request = request, .count_a = 1, .count_b = 1},
            {{uint32_t(experts[0]), 1}}, 1));
    CHECK_EQUAL(exchange.receive(ticket, kLong).size(), 1u);
    exchange.forget(ticket);
    return exchange.usual_times(peer, 1)->ewma_us;
  };
  const double usual = answer_after(microseconds(2000), 1);
  CHECK(answer_after(microseconds(40 * 2000), 2) < 1.2 * usual);
  ::close(pair.theirs);
}

// ── threads
// ─────────────────────────────────────────────────────────────────────────────────────────────────

void layers_go_to_two_workers_while_others_tend_and_one_is_replaced() {
  Exchange exchange(kLimits);
  Worker workers[2];
  std::unique_ptr<WorkerLink> links[2];
  std::vector<std::thread> threads;
  int64_t peers[2];
  const auto start = [&](int i) {
    Pair pair;
    peers[i] = exchange.add(pair.ours);
    links[i] = std::make_unique<WorkerLink>(pair.theirs, kLimits);
    threads.emplace_back([link = links[i].get(), &worker = workers[i]] {
      try {
        CHECK(link->serve_resident(worker.runtime, worker.table) == WorkerLink::Next::ended);
      } catch (const LinkError&) {  // closed inside a request
      }
    });
  };
  start(0);
  start(1);
  std::atomic<bool> is_over = false;
  threads.emplace_back([&] {
    const auto check_status = [&exchange](int64_t peer) {
      try {
        CHECK(exchange.status(peer).size() < 10);
      } catch (const std::invalid_argument&) {  // it was removed after `peers` had listed it
        const std::vector<int64_t> left = exchange.peers();
        CHECK(std::find(left.begin(), left.end(), peer) == left.end());
      }
    };
    while (!is_over) {
      exchange.tend(kLong);
      for (const int64_t peer : exchange.peers()) check_status(peer);
      CHECK(exchange.buffer_bytes() > 0);
      std::this_thread::sleep_for(microseconds(200));
    }
  });
  Step step(8), expected(8);
  workers[0].table.run(workers[0].runtime, kLayer, {0, 1, 2, 3}, *expected.dispatch, expected.rows.data(),
                       expected.out());
  for (int round = 0; round < 300; ++round) {
    if (round == 150) {
      threads.emplace_back([&exchange, gone = peers[0]] { exchange.remove(gone); });
      std::this_thread::sleep_for(microseconds(300));
    }
    step.clear();
    const int64_t ticket = exchange.send(kLayer, step.dispatch, step.rows.data(), step.out(),
                                         {{peers[0], {0, 1}}, {peers[1], {2, 3}}});
    for (size_t num_done = 0; num_done < kExperts;) {
      const auto events = exchange.receive(ticket, kLong);
      CHECK(!events.empty());
      if (events.empty()) break;
      for (const ExchangeEvent& event : events) {
        if (event.failure) {
          exchange.resend(ticket, {{peers[1], event.experts}});
        } else {
          num_done += event.experts.size();
        }
      }
    }
    exchange.forget(ticket);
    CHECK(memcmp(step.memory.data(), expected.memory.data(), step.memory.size() * sizeof(float)) == 0);
  }
  is_over = true;
  exchange.close();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  mutated_frames_end_a_worker_by_name_and_never_reach_beyond_its_buffers();
  mutated_answers_end_a_connection_by_name_and_write_only_rows_that_were_asked_for();
  a_worker_names_what_a_coordinator_did_wrong();
  a_coordinator_names_what_a_worker_did_wrong();
  an_answer_before_the_question_is_complete_ends_the_connection();
  a_peer_that_a_ticket_waits_for_is_given_up_once_it_is_silent_for_seven_times_as_long();
  a_coordinator_that_takes_nothing_of_an_answer_is_given_up();
  a_single_stall_does_not_raise_the_usual_time();
  layers_go_to_two_workers_while_others_tend_and_one_is_replaced();
  return argosy::testing::check_result();
}
