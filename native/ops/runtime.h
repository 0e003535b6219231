// runtime.h: the kernels, the threads and the scratch memory that operations share.
//
//   Runtime runtime(2);
//   matmul(runtime, matrices, x, num_tokens);
//
// An operation locks the runtime, requests its scratch once, and splits its work over the pool. Scratch
// grows on demand; trim() shrinks it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

#include "kernels/kernel_table.h"
#include "kernels/tuning.h"
#include "store/arena.h"
#include "store/thread_pool.h"

namespace argosy {

// Offsets of the parts of an operation's scratch, each a multiple of kMatrixAlignment.
class ScratchLayout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += round_up(bytes, kMatrixAlignment);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// One for each format.
using Tunings = std::array<Tuning, kNumFormats>;

// default_tuning() of all formats.
Tunings default_tunings();

class Runtime {
 public:
  // Without `tunings`, uses default_tunings(). Throws std::invalid_argument for fewer than 1 or
  // more than kMostThreads threads, std::runtime_error if the system refuses a thread.
  explicit Runtime(int num_threads, std::optional<Tunings> tunings = std::nullopt,
                   const KernelTable& kernels = best_kernels());

  int num_threads() const { return num_threads_; }
  const KernelTable& kernels() const { return kernels_; }
  const Tuning& tuning(Format format) const { return tunings_[size_t(measured_as(format))]; }
  // The scratch of products that `worker` computes: MatmulArgs::scratch.
  uint8_t* product_scratch(int worker) const {
    return product_scratch_ != nullptr ? product_scratch_->data() + worker * kernels_.product_scratch_bytes
                                       : nullptr;
  }
  // Blocks of `rows` rows that a product should process in one call: on tiles, it copies its activations once
  // for all of them.
  int64_t blocks_together(int64_t rows) const { return kernels_.has_tiles ? kRowsOnTiles / rows : 1; }
  // Multiplications and additions since the runtime began, of products with weights for which the kernels
  // have tiles (the quantised ones, and in `amx` bfloat16 and FP8): on the tiles of AMX, and all of them.
  // Both are 0 if the kernels have no tiles.
  struct Operations {
    uint64_t in_tiles, all;
  };
  Operations operations() const;
  // Whether encoders may round to bfloat16, because the CPU multiplies that faster.
  bool rounds() const { return kernels_.linear_panel != nullptr; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  // The size that the scratch has after a request for `bytes`, if no request was larger.
  static int64_t scratch_size(int64_t bytes) { return round_up(bytes, 1 << 16); }
  // Has scratch for requests of at most `bytes`, and gives what is beyond back to the system.
  void trim(int64_t bytes);
  void close();  // ends the threads and frees the scratch; later operations throw std::invalid_argument

  // For operations. Hold the lock from before scratch() to the end of the operation. The thread that holds it
  // may call further operations; each of them reuses the scratch and overwrites its contents.
  std::unique_lock<std::recursive_mutex> lock();
  uint8_t* scratch(int64_t bytes);

  // Calls body(begin, end, worker) for ranges of [0, count). `item_work` is roughly the number of
  // multiply-adds or bytes per item: it decides how many items make a range, and a loop too small to share
  // runs on the caller. A range has at least `together` items, if there are enough for all threads.
  template <class F>
  void parallel_for(int64_t count, int64_t item_work, F&& body, int64_t together = 1) {
    if (count <= 0) return;
    if (num_threads_ == 1 || count == 1 || count * item_work < kWorthSharing)
      return body(int64_t{0}, count, 0);
    // Several ranges for each thread, so that all threads finish together.
    const int64_t largest = count / (int64_t{4} * num_threads_);
    const int64_t by_work = kRangeWork / (item_work + 1);
    const int64_t wanted = by_work > together ? by_work : together;
    const int64_t grain = wanted < largest ? wanted : largest;
    pool_->parallel_for(count, grain > 1 ? grain : 1, body);
  }

 private:
  // Waking a thread takes a few microseconds, in which a core does about this much work.
  static constexpr int64_t kWorthSharing = int64_t{128} << 10;
  static constexpr int64_t kRangeWork = int64_t{1} << 20;
  static constexpr int64_t kRowsOnTiles = 256;

  int num_threads_;
  const KernelTable& kernels_;
  Tunings tunings_;
  std::recursive_mutex mutex_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Arena> product_scratch_;  // of each thread; absent if no product uses any
  std::unique_ptr<Arena> scratch_;
  int64_t scratch_bytes_ = 0;
};

}  // namespace argosy
