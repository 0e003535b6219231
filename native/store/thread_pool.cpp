// thread_pool.cpp: how workers take ranges, and how threads sleep and wake.
//
// A worker owns a range once it has taken it off a stretch by compare-and-swap. Only the caller writes new
// stretches, and only when nothing of the last loop is unfinished. So if the same word reappears (ABA), the
// compare-and-swap is still correct: it takes a range of the later loop.
//
// Sleeping follows one rule on both sides: the sleeper announces that it sleeps, then checks again; the waker
// changes the count, then checks for sleepers. All four steps are sequentially consistent, so one side always
// sees the other.
#include "store/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#include "store/start_threads.h"

namespace argosy {
namespace {

// Longer than the gap between two loops of one layer, and shorter than another process on the same core would
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

ThreadPool::Stretch ThreadPool::Stretch::from(uint64_t word) {
  constexpr uint64_t kIndex = (uint64_t{1} << kIndexBits) - 1;
  return {int64_t(word & kIndex), int64_t(word >> kIndexBits & kIndex), int64_t(word >> (2 * kIndexBits))};
}

uint64_t ThreadPool::Stretch::word() const {
  if (begin == end) return 0;
  return uint64_t(begin) | uint64_t(end) << kIndexBits | uint64_t(grain) << (2 * kIndexBits);
}

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument("a thread pool needs at least 1 thread, found " +
                                std::to_string(num_threads));
  }
  slots_ = std::vector<Slot>(size_t(num_threads));
  threads_ = start_threads(num_threads - 1, [this](int i) { work(i + 1); }, [this] { stop(); });
}

ThreadPool::~ThreadPool() {
  stop();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_came_.notify_all();
}

void ThreadPool::run(int64_t count, int64_t grain, Body body, const void* context) {
  constexpr int64_t kLongest = (int64_t{1} << Stretch::kIndexBits) - 1;
  if (count <= 0) return;
  grain = std::clamp<int64_t>(grain, 1, (int64_t{1} << Stretch::kGrainBits) - 1);
  std::lock_guard one_at_a_time(callers_);
  if (threads_.empty() || count <= grain) {
    for (int64_t begin = 0; begin < count; begin += grain) {
      body(context, begin, std::min(begin + grain, count), 0);
    }
    return;
  }
  body_ = body;
  context_ = context;
  for (first_ = 0; first_ < count; first_ += kLongest) run_loop(std::min(count - first_, kLongest), grain);
}

void ThreadPool::run_loop(int64_t count, int64_t grain) {
  failed_.store(false, std::memory_order_relaxed);
  unfinished_.store(count, std::memory_order_relaxed);
  for (int64_t worker = 0; worker < size(); ++worker) {
    const Stretch stretch = {count * worker / size(), count * (worker + 1) / size(), grain};
    slots_[size_t(worker)].stretch.store(stretch.word());
  }
  loop_.fetch_add(1);
  if (sleepers_.load() > 0) {
    {
      std::lock_guard lock(mutex_);
    }  // a worker between its last check and its sleep is asleep after this
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
  while (!stopping_.load()) {
    const uint64_t loop = loop_.load();
    while (run_one_range(worker)) {
    }
    const auto has_work = [&] { return loop_.load() != loop || stopping_.load(); };
    if (!spin_until(has_work)) {
      std::unique_lock lock(mutex_);
      ++sleepers_;
      work_came_.wait(lock, has_work);
      --sleepers_;
    }
  }
}

// Takes a range from the worker's own stretch, or from the first other stretch that is not empty. A range is
// at most half of the rest, so that the last ranges are small, but not so small that taking them is
// expensive. The owner takes from the front of a stretch, other workers from the back.
bool ThreadPool::take(int worker, Stretch& range) {
  for (int i = 0; i < size(); ++i) {
    std::atomic<uint64_t>& slot = slots_[size_t((worker + i) % size())].stretch;
    uint64_t seen = slot.load();
    while (seen != 0) {
      Stretch rest = Stretch::from(seen);
      const int64_t wanted = std::max(rest.left() / 2, (rest.grain + 7) / 8);
      const int64_t taken = std::min({wanted, rest.grain, rest.left()});
      range = rest;
      if (i == 0) {
        rest.begin = range.end = rest.begin + taken;
      } else {
        rest.end = range.begin = rest.end - taken;
      }
      if (slot.compare_exchange_weak(seen, rest.word())) return true;
    }
  }
  return false;
}

bool ThreadPool::run_one_range(int worker) {
  Stretch range = {};
  if (!take(worker, range)) return false;
  if (!failed_.load(std::memory_order_relaxed)) {
    try {
      body_(context_, first_ + range.begin, first_ + range.end, worker);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }
  if (unfinished_.fetch_sub(range.left()) == range.left() && caller_sleeps_.load()) {
    std::lock_guard lock(mutex_);
    work_done_.notify_one();
  }
  return true;
}

}  // namespace argosy
