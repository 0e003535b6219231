// thread_pool.cpp: how ranges are claimed, and how threads sleep and wake.
//
// Sleeping follows one rule on both sides: say that you sleep, then look again; change the count, then look
// whether anybody sleeps. All four steps are sequentially consistent, so one side always sees the other.
#include "store/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

namespace argosy {
namespace {

// Longer than the gap between two loops of one layer, shorter than what a neighbour on the same core would
// notice.
constexpr std::chrono::microseconds kSpin{20};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(Condition&& holds) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (holds()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument("a thread pool needs at least 1 thread, asked for " +
                                std::to_string(num_threads));
  }
  threads_.reserve(size_t(num_threads - 1));
  for (int worker = 1; worker < num_threads; ++worker)
    threads_.emplace_back([this, worker] { work(worker); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_came_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t count, int64_t grain, Body body, const void* context) {
  if (count <= 0) return;
  if (count > INT64_MAX / kGrainLimit) {
    throw std::invalid_argument("a loop of " + std::to_string(count) + " rounds, expected at most " +
                                std::to_string(INT64_MAX / kGrainLimit));
  }
  grain = std::clamp<int64_t>(grain, 1, kGrainLimit - 1);
  std::lock_guard one_at_a_time(callers_);
  if (threads_.empty() || count <= grain) {
    for (int64_t begin = 0; begin < count; begin += grain) {
      body(context, begin, std::min(begin + grain, count), 0);
    }
    return;
  }

  body_ = body;
  context_ = context;
  count_ = count;
  failed_.store(false, std::memory_order_relaxed);
  unfinished_.store(count, std::memory_order_relaxed);
  unclaimed_.store(count * kGrainLimit + grain);
  if (sleepers_.load() > 0) {
    {
      std::lock_guard lock(mutex_);
    }  // a worker between its last look and its sleep is asleep after this
    work_came_.notify_all();
  }

  while (run_one_range(0)) {
  }
  const auto finished = [this] { return unfinished_.load() == 0; };
  if (!spin_until(finished)) {
    std::unique_lock lock(mutex_);
    caller_sleeps_ = true;
    work_done_.wait(lock, finished);
    caller_sleeps_ = false;
  }
  if (failed_.load()) {
    std::exception_ptr error;
    {
      std::lock_guard lock(mutex_);
      error = std::exchange(error_, nullptr);
    }
    std::rethrow_exception(error);
  }
}

void ThreadPool::work(int worker) {
  const auto has_work = [this] { return unclaimed_.load() >= kGrainLimit || stopping_.load(); };
  while (true) {
    while (run_one_range(worker)) {
    }
    if (!spin_until(has_work)) {
      std::unique_lock lock(mutex_);
      ++sleepers_;
      work_came_.wait(lock, has_work);
      --sleepers_;
    }
    if (stopping_.load()) return;
  }
}

// Half of a thread's fair share, so that the last claims are small, but not so small that claiming costs.
int64_t ThreadPool::claim_size(int64_t unclaimed, int64_t grain) const {
  const int64_t share = std::max(unclaimed / (2 * size()), (grain + 7) / 8);
  return std::min({share, grain, unclaimed});
}

bool ThreadPool::run_one_range(int worker) {
  int64_t seen = unclaimed_.load();
  int64_t unclaimed = 0;
  int64_t claimed = 0;
  do {
    if (seen < kGrainLimit) return false;
    unclaimed = seen / kGrainLimit;
    claimed = claim_size(unclaimed, seen % kGrainLimit);
  } while (!unclaimed_.compare_exchange_weak(seen, seen - claimed * kGrainLimit));

  if (!failed_.load(std::memory_order_relaxed)) {
    const int64_t begin = count_ - unclaimed;
    try {
      body_(context_, begin, begin + claimed, worker);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }
  if (unfinished_.fetch_sub(claimed) == claimed && caller_sleeps_.load()) {
    std::lock_guard lock(mutex_);
    work_done_.notify_one();
  }
  return true;
}

}  // namespace argosy
