// thread_pool.h: a few persistent threads that share the ranges of a loop.
//
//   ThreadPool pool(2);
//   pool.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int worker) { ... });
//
// The caller takes part as worker 0, so a pool of n starts n - 1 threads. Each worker starts with its own
// stretch of the loop and takes ranges off its front: consecutive ranges read consecutive memory, so the
// hardware prefetcher keeps its stream between them. A worker whose stretch is empty takes ranges off the
// back of another's. So a worker on a busy core does less, and the loop does not wait for a worker that never
// wakes up. Ranges become smaller towards the end of a stretch, so that all threads finish together. Between
// loops, workers spin for a few microseconds, because a layer runs several loops in a row, and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace argosy {

class ThreadPool {
 public:
  // `num_threads` is at least 1. Throws std::runtime_error if the system refuses a thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return int(slots_.size()); }

  // Calls body(begin, end, worker) for ranges that cover [0, count) exactly once, each at most `grain` long
  // (at most 65535). `worker` is 0 to size() - 1, and no two calls with the same worker overlap. Returns when
  // all calls have returned. If a body throws, the ranges not yet begun are dropped and the exception is
  // rethrown here. Calls from several threads take turns; a body must not call parallel_for of its own pool.
  template <class F>
  void parallel_for(int64_t count, int64_t grain, F&& body) {
    using Callable = std::remove_reference_t<F>;
    run(
        count, grain,
        [](const void* context, int64_t begin, int64_t end, int worker) {
          (*static_cast<Callable*>(const_cast<void*>(context)))(begin, end, worker);
        },
        std::addressof(body));
  }

 private:
  using Body = void (*)(const void* context, int64_t begin, int64_t end, int worker);

  // The rest of a worker's stretch and the grain of its loop, in one word. Whoever takes a range sizes it
  // with the grain in the word that it takes it from, even a late worker from an earlier loop.
  struct Stretch {
    static constexpr int kIndexBits = 24, kGrainBits = 16;
    int64_t begin, end, grain;

    static Stretch from(uint64_t word);
    uint64_t word() const;
    int64_t left() const { return end - begin; }
  };
  struct alignas(64) Slot {
    std::atomic<uint64_t> stretch{0};  // a Stretch word; 0: empty
  };

  void stop();
  void run(int64_t count, int64_t grain, Body body, const void* context);
  void run_loop(int64_t count, int64_t grain);
  void work(int worker);
  bool run_one_range(int worker);
  bool take(int worker, Stretch& range);

  // The loop in progress. The caller writes it while nothing is unfinished; a worker reads it only between
  // taking a range off a stretch and subtracting that range from `unfinished_`.
  Body body_ = nullptr;
  const void* context_ = nullptr;
  int64_t first_ = 0;         // added to the indices in stretches
  std::exception_ptr error_;  // guarded by mutex_
  std::atomic<bool> failed_{false};

  std::vector<Slot> slots_;                    // one per worker
  alignas(64) std::atomic<uint64_t> loop_{0};  // counts loops: a worker without work waits for the next one
  alignas(64) std::atomic<int64_t> unfinished_{0};

  alignas(64) std::mutex mutex_;
  std::condition_variable work_came_;
  std::condition_variable work_done_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};

  std::mutex callers_;  // one loop at a time
  std::vector<std::thread> threads_;
};

}  // namespace argosy
