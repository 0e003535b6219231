#include "ops/machine_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernel_table.h"
#include "store/arena.h"
#include "store/thread_pool.h"

namespace argosy {

namespace {

constexpr int kPasses = 7;
constexpr int64_t kPart = int64_t{1} << 20;  // what a thread claims at once

void require_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to 1024");
  }
}

// The least seconds of several passes.
template <class Pass>
double best_seconds(Pass&& pass) {
  double best = 1e30;
  for (int i = 0; i < kPasses; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pass();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

}  // namespace

double memory_probe(int threads, int64_t nbytes) {
  require_threads(threads);
  if (nbytes < threads * 4 * kPart) {
    throw std::invalid_argument("nbytes is " + std::to_string(nbytes) + ", expected " +
                                std::to_string(threads * 4 * kPart) + " or more for " +
                                std::to_string(threads) + " threads");
  }
  const KernelTable& table = kernels();
  const int64_t parts = nbytes / kPart;
  Arena arena(size_t(parts * kPart));
  uint8_t* data = arena.data();
  ThreadPool pool(threads);
  // Pages come into being when they are written: all of them would otherwise be one page of zeros.
  pool.parallel_for(parts, 1, [&](int64_t begin, int64_t end, int) {
    std::memset(data + begin * kPart, 1, size_t((end - begin) * kPart));
  });
  std::atomic<uint64_t> sum{0};
  const double seconds = best_seconds([&] {
    pool.parallel_for(parts, 1, [&](int64_t begin, int64_t end, int) {
      sum += table.read_memory(data + begin * kPart, (end - begin) * kPart);
    });
  });
  if (sum != uint64_t(kPasses) * uint64_t(parts) * (kPart / 8) * 0x0101010101010101u) {
    throw std::logic_error("the memory probe read something else than it wrote");
  }
  return double(parts * kPart) / seconds;
}

double int8_probe(int threads) {
  require_threads(threads);
  const KernelTable& table = kernels();
  constexpr int64_t kProducts = int64_t{1} << 24;  // of a range; the slowest set takes about 10 milliseconds
  const int64_t rounds = kProducts / table.int8_products_per_round;
  const int64_t ranges = 16 * threads;
  ThreadPool pool(threads);
  std::atomic<uint64_t> sum{0};
  const double seconds = best_seconds([&] {
    pool.parallel_for(ranges, 1, [&](int64_t, int64_t, int) { sum += table.multiply_int8(rounds); });
  });
  return 2.0 * double(ranges) * double(rounds) * double(table.int8_products_per_round) / seconds;
}

}  // namespace argosy
