// test_thread_pool.cpp: every range runs once, on whichever thread, and an exception comes out.
#include <atomic>
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
        if (worker < 0 || worker >= 3 || begin % grain != 0 || end - begin > grain) is_in_range = false;
        for (int64_t i = begin; i < end; ++i) ++visits[size_t(i)];
      });
      for (int64_t i = 0; i < count; ++i) CHECK_EQUAL(visits[size_t(i)].load(), 1);
      CHECK(is_in_range);
    }
  }
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
  what_a_worker_wrote_is_seen_by_the_caller();
  workers_that_slept_wake_up();
  an_exception_comes_out_and_the_pool_still_works();
  callers_take_turns();
  CHECK_THROWS(std::invalid_argument, ThreadPool(0));
  return argosy::testing::check_result();
}
