// test_thread_pool.cpp: every range runs once, on any thread, and an exception is rethrown to the caller.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "store/thread_pool.h"

using argosy::ThreadPool;

namespace {

void every_index_is_visited_once_at_any_count_and_grain() {
  ThreadPool pool(3);
  for (int64_t count = 0; count < 40; ++count) {
    for (int64_t grain = 1; grain < 7; ++grain) {
      std::vector<std::atomic<int>> visits(size_t(count + 1));
      std::atomic<bool> is_in_range{true};
      pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int worker) {
        if (worker < 0 || worker >= 3 || begin >= end || end - begin > grain) is_in_range = false;
        for (int64_t i = begin; i < end; ++i) ++visits[size_t(i)];
      });
      for (int64_t i = 0; i < count; ++i) CHECK_EQUAL(visits[size_t(i)].load(), 1);
      CHECK(is_in_range);
    }
  }
}

// Each worker has a stretch of 500: its ranges are consecutive, and the last are small.
void a_worker_goes_through_its_stretch() {
  ThreadPool pool(2);
  std::vector<std::atomic<int64_t>> length(1000);
  std::atomic<int> num_waiting{2};
  std::atomic<bool> is_own{true};
  pool.parallel_for(1000, 64, [&](int64_t begin, int64_t end, int worker) {
    length[size_t(begin)] = end - begin;
    if (begin % 500 != 0) return;
    if (worker != begin / 500) is_own = false;
    --num_waiting;  // each worker holds its first range until the other arrives, so neither steals earlier
    while (num_waiting > 0) std::this_thread::yield();
  });
  CHECK(is_own);
  CHECK_EQUAL(length[0].load(), 64);
  CHECK_EQUAL(length[500].load(), 64);
  int64_t visited = 0;
  for (const auto& one : length) visited += one.load();
  CHECK_EQUAL(visited, 1000);
  CHECK(*std::min_element(length.begin(), length.end(), [](const auto& a, const auto& b) {
    return (a == 0 ? 1000 : a.load()) < (b == 0 ? 1000 : b.load());
  }) <= 8);
}

void a_loop_longer_than_a_word_holds() {
  ThreadPool pool(2);
  constexpr int64_t kCount = (int64_t{1} << 24) + 5;
  std::atomic<int64_t> visited{0}, sum{0};
  std::atomic<bool> is_short{true};
  pool.parallel_for(kCount, 1 << 20, [&](int64_t begin, int64_t end, int) {  // the grain is limited, too
    if (end - begin >= 1 << 16) is_short = false;
    visited += end - begin;
    sum += (end - begin) * (begin + end - 1) / 2;
  });
  CHECK(is_short);
  CHECK_EQUAL(visited.load(), kCount);
  CHECK_EQUAL(sum.load(), kCount * (kCount - 1) / 2);
}

void many_threads_share_few_cores() {
  ThreadPool pool(16);
  for (int64_t round = 0; round < 200; ++round) {
    std::vector<int64_t> squares(300);
    pool.parallel_for(300, 1 + round % 9, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) squares[size_t(i)] = i * i;
    });
    for (int64_t i = 0; i < 300; ++i) CHECK_EQUAL(squares[size_t(i)], i * i);
  }
}

// Short loops run in a row while other threads keep cores busy: no loop waits for a thread that is not
// running. A barrier that spins takes a time slice of a few milliseconds for each loop.
void a_busy_neighbour_does_not_stop_short_loops() {
  std::atomic<bool> is_over{false};
  std::vector<std::thread> neighbours;
  for (unsigned i = 0; i < 1 + std::thread::hardware_concurrency() / 2; ++i) {
    neighbours.emplace_back([&] {
      while (!is_over) continue;
    });
  }
  ThreadPool pool(2);
  constexpr int kLoops = 2000;
  std::atomic<int64_t> sum{0};
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0; round < kLoops; ++round) {
    pool.parallel_for(8, 1, [&](int64_t begin, int64_t, int) { sum += begin; });
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  is_over = true;
  for (std::thread& neighbour : neighbours) neighbour.join();
  CHECK_EQUAL(sum.load(), int64_t{kLoops} * 28);
  CHECK(taken.count() < kLoops * 1e-3);
}

void what_a_worker_wrote_is_seen_by_the_caller() {
  ThreadPool pool(2);
  std::vector<int64_t> values(1000);  // plain memory: a missing barrier is a data race under ThreadSanitizer
  for (int64_t round = 0; round < 200; ++round) {
    pool.parallel_for(1000, 10, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) values[size_t(i)] += i;
    });
  }
  for (int64_t i = 0; i < 1000; ++i) CHECK_EQUAL(values[size_t(i)], 200 * i);
}

void workers_that_slept_wake_up() {
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::atomic<int> ranges{0};
    pool.parallel_for(8, 1, [&](int64_t, int64_t, int) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      ++ranges;
    });
    CHECK_EQUAL(ranges.load(), 8);
  }
}

void an_exception_comes_out_and_the_pool_still_works() {
  ThreadPool pool(2);
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS(std::runtime_error, pool.parallel_for(100, 1, [](int64_t begin, int64_t, int) {
      if (begin == 50) throw std::runtime_error("half way");
    }));
    std::atomic<int64_t> sum{0};
    pool.parallel_for(10, 1, [&](int64_t begin, int64_t, int) { sum += begin; });
    CHECK_EQUAL(sum.load(), 45);
  }
}

void callers_take_turns() {
  ThreadPool pool(2);
  std::vector<int> count(64);  // not atomic: two loops at once would race
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        pool.parallel_for(64, 4, [&](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; ++i) ++count[size_t(i)];
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int visits : count) CHECK_EQUAL(visits, 300);
}

}  // namespace

int main() {
  every_index_is_visited_once_at_any_count_and_grain();
  a_worker_goes_through_its_stretch();
  a_loop_longer_than_a_word_holds();
  many_threads_share_few_cores();
  a_busy_neighbour_does_not_stop_short_loops();
  what_a_worker_wrote_is_seen_by_the_caller();
  workers_that_slept_wake_up();
  an_exception_comes_out_and_the_pool_still_works();
  callers_take_turns();
  CHECK_THROWS(std::invalid_argument, ThreadPool(0));
  return argosy::testing::check_result();
}
