// thread_pool.h: a few persistent threads that share the ranges of a loop.
//
//   ThreadPool pool(2);
//   pool.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int worker) { ... });
//
// The caller takes part as worker 0, so a pool of n starts n - 1 threads. Ranges are handed out one at a
// time: a worker whose core is busy elsewhere takes fewer, and one that never wakes up is not waited for.
// Towards the end of a loop they become smaller, so that all threads end together.
// Workers spin for a few microseconds between loops, because a layer makes several in a row, and then sleep.
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
  explicit ThreadPool(int num_threads);  // at least 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return int(threads_.size()) + 1; }

  // Calls body(begin, end, worker) for ranges that cover [0, count) once, in ascending order of their
  // beginning, each of at most `grain`; worker is from 0 to size() - 1, and no two calls with the same worker
  // overlap. Returns when all have returned. An exception in a body drops the ranges not yet begun and comes
  // out here. Calls from several threads take turns; a body must not call parallel_for of its own pool.
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

  void run(int64_t count, int64_t grain, Body body, const void* context);
  void work(int worker);
  bool run_one_range(int worker);
  int64_t claim_size(int64_t unclaimed, int64_t grain) const;

  // The loop in progress. Written by the caller while nothing is unfinished; read by a worker only between
  // taking a range off `unclaimed_` and counting it off `unfinished_`.
  Body body_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;
  std::exception_ptr error_;  // guarded by mutex_
  std::atomic<bool> failed_{false};

  // How many are not claimed yet, times kGrainLimit, plus the grain: a worker that comes late sizes its claim
  // by the same word that it takes it from. Below kGrainLimit nothing is left.
  static constexpr int64_t kGrainLimit = int64_t{1} << 20;
  alignas(64) std::atomic<int64_t> unclaimed_{0};
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
