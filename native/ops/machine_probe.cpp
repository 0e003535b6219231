#include "ops/machine_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels/kernel_table.h"
#include "store/arena.h"
#include "store/start_threads.h"
#include "store/thread_pool.h"

namespace argosy {

namespace {

constexpr int kPasses = 7;
constexpr int64_t kPart = int64_t{1} << 20;  // a thread claims this much at once
constexpr int kMostAskAheadThreads = 4;      // more threads would need more memory to read for as long
constexpr double kAskAheadMargin = 0.03;

// Evicts memory from all caches.
#if defined(__x86_64__)
bool can_flush() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_CLFLUSHOPT) != 0;
}
void flush(const uint8_t* data, int64_t nbytes) {
  for (int64_t i = 0; i < nbytes; i += 64) asm volatile("clflushopt %0" : : "m"(data[i]) : "memory");
  asm volatile("mfence" : : : "memory");
}
#else
bool can_flush() { return false; }
void flush(const uint8_t*, int64_t) {}
#endif

// Returns the seconds of the fastest of several passes.
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

double memory_probe(const KernelTable& kernels, int threads, int64_t nbytes) {
  require_threads("threads", threads);
  if (nbytes < threads * 4 * kPart) {
    throw std::invalid_argument("nbytes is " + std::to_string(nbytes) + ", expected " +
                                std::to_string(threads * 4 * kPart) + " or more for " +
                                std::to_string(threads) + " threads");
  }
  const int64_t parts = nbytes / kPart;
  Arena arena(size_t(parts * kPart));
  uint8_t* data = arena.data();
  ThreadPool pool(threads);
  // A page exists only once it is written: unwritten pages would all be one page of zeros.
  pool.parallel_for(parts, 1, [&](int64_t begin, int64_t end, int) {
    std::memset(data + begin * kPart, 1, size_t((end - begin) * kPart));
  });
  std::atomic<uint64_t> sum{0};
  const double seconds = best_seconds([&] {
    pool.parallel_for(parts, 1, [&](int64_t begin, int64_t end, int) {
      sum += kernels.read_memory(data + begin * kPart, (end - begin) * kPart);
    });
  });
  if (sum != uint64_t(kPasses) * uint64_t(parts) * (kPart / 8) * 0x0101010101010101u) {
    throw std::logic_error("the memory probe did not read back what it wrote");
  }
  return double(parts * kPart) / seconds;
}

AskAhead ask_ahead_probe(const KernelTable& kernels, int threads) {
  require_threads("threads", threads);
  if (std::string(kernels.name) != "avx512" || !can_flush()) return default_ask_ahead(kernels);
  constexpr Format kFormat = Format::q4;  // all formats agreed on the measured machines
  constexpr int64_t kCols = 2048, kRangePanels = 8;
  const int64_t panel = panel_bytes(kFormat, kCols), panels = kAskAheadProbeBytes / panel;
  Arena arena(kAskAheadProbeBytes);
  std::memset(arena.data(), 1, arena.size());
  std::vector<uint8_t> activations(size_t(activation_bytes(kCols)));
  const std::vector<float> x(kCols, 1.0f);
  kernels.quantize_activations(x.data(), kCols, 0, num_groups(kCols), activations.data());
  std::vector<float> y(size_t(panels * kPanelRows));
  ThreadPool pool(std::min(threads, kMostAskAheadThreads));
  const auto read = [&](const AskAhead& ask_ahead) {
    pool.parallel_for(panels, kRangePanels, [&](int64_t begin, int64_t end, int) {
      kernels.matmul[int(kFormat)]({
          .weights = arena.data(),
          .cols = kCols,
          .row_begin = begin * kPanelRows,
          .row_end = end * kPanelRows,
          .x = activations.data(),
          .x_stride = 0,
          .x_index = nullptr,
          .y = y.data() + begin * kPanelRows,
          .y_stride = 0,
          .y_index = nullptr,
          .num_tokens = 1,
          .next_weights = arena.data() + end * panel,
          .ask_ahead = ask_ahead,
      });
    });
  };
  std::vector<double> best(std::size(kAskAheads), 1e30);  // seconds
  // Flushing keeps the weights out of every cache without using more memory than the largest cache. The
  // settings take turns, because disturbances come and go. The best time of each counts, because a
  // disturbance only ever slows a pass down.
  for (int pass = 0; pass < kPasses; ++pass) {
    for (size_t i = 0; i < best.size(); ++i) {
      flush(arena.data(), int64_t(arena.size()));  // one thread flushes: two together took longer
      const auto start = std::chrono::steady_clock::now();
      read(kAskAheads[i]);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      best[i] = std::min(best[i], taken.count());
    }
  }
  const size_t fastest = size_t(std::min_element(best.begin(), best.end()) - best.begin());
  return best[fastest] < (1 - kAskAheadMargin) * best[0] ? kAskAheads[fastest] : kAskNothing;
}

double int8_probe(const KernelTable& kernels, int threads) {
  require_threads("threads", threads);
  // Per range; the slowest instruction set takes about 10 milliseconds.
  constexpr int64_t kProducts = int64_t{1} << 24;
  const int64_t rounds = kProducts / kernels.int8_products_per_round;
  const int64_t ranges = 16 * threads;
  ThreadPool pool(threads);
  std::atomic<uint64_t> sum{0};
  const double seconds = best_seconds([&] {
    pool.parallel_for(ranges, 1, [&](int64_t, int64_t, int) { sum += kernels.multiply_int8(rounds); });
  });
  return 2.0 * double(ranges) * double(rounds) * double(kernels.int8_products_per_round) / seconds;
}

}  // namespace argosy
