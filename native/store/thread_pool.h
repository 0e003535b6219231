// thread_pool.h: a few persistent threads that share the ranges of a loop.
//
//   ThreadPool pool(2);
//   pool.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int worker) { ... });
//
// The caller takes part as worker 0, so a pool of n starts n - 1 threads. Each worker begins with a stretch
// of the loop of its own and takes ranges off its front: ranges that follow each other read memory that
// follows itself, and the processor's read-ahead is not lost between them. A worker whose stretch is done
// takes ranges off the back of another's, so one whose core is busy elsewhere does less, and one that never
// wakes up is not waited for. Towards the end of a stretch the ranges become smaller, so that all threads end
// together. Workers spin for a few microseconds between loops, because a layer makes several in a row, and
// then sleep.
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
  // At least 1. Throws std::runtime_error if the system refuses a thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return int(slots_.size()); }

  // Calls body(begin, end, worker) for ranges that cover [0, count) once, each of at most `grain` (65535 at
  // most); worker is from 0 to size() - 1, and no two calls with the same worker overlap. Returns when all
  // have returned. An exception in a body drops the ranges not yet begun and comes out here. Calls from
  // several threads take turns; a body must not call parallel_for of its own pool.
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

  // What is left of a worker's stretch, and the grain of its loop, in one word: whoever takes a range sizes
  // it by the same word that it takes it from, also a worker that comes late, from an earlier loop.
  struct Stretch {
    static constexpr int kIndexBits = 24, kGrainBits = 16;
    int64_t begin, end, grain;

    static Stretch from(uint64_t word);
    uint64_t word() const;
    int64_t left() const { return end - begin; }
  };
  struct alignas(64) Slot {
    std::atomic<uint64_t> stretch{0};  // a word of Stretch; all zeros: nothing left
  };

  void stop();
  void run(int64_t count, int64_t grain, Body body, const void* context);
  void run_loop(int64_t count, int64_t grain);
  void work(int worker);
  bool run_one_range(int worker);
  bool take(int worker, Stretch& range);

  // The loop in progress. Written by the caller while nothing is unfinished; read by a worker only between
  // taking a range off a stretch and counting it off `unfinished_`.
  Body body_ = nullptr;
  const void* context_ = nullptr;
  int64_t first_ = 0;         // added to the indices of the stretches
  std::exception_ptr error_;  // guarded by mutex_
  std::atomic<bool> failed_{false};

  std::vector<Slot> slots_;                    // one for each worker
  alignas(64) std::atomic<uint64_t> loop_{0};  // counts loops: a worker that found nothing waits for the next
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
