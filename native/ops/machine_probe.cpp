#include "ops/machine_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "store/arena.h"
#include "store/crc32c.h"
#include "store/start_threads.h"
#include "store/thread_pool.h"

namespace argosy {

namespace {

constexpr int kPasses = 7;
constexpr int64_t kPart = int64_t{1} << 20;  // a thread claims this much at once

// Evicts memory from all caches. Every x86-64 processor has CLFLUSH, which takes several times as long.
#if defined(__x86_64__)
bool has_clflushopt() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_CLFLUSHOPT) != 0;
}
void flush(const uint8_t* data, int64_t nbytes) {
  static const bool is_fast = has_clflushopt();
  for (int64_t i = 0; i < nbytes; i += 64) {
    if (is_fast) {
      asm volatile("clflushopt %0" : : "m"(data[i]) : "memory");
    } else {
      asm volatile("clflush %0" : : "m"(data[i]) : "memory");
    }
  }
  asm volatile("mfence" : : : "memory");
}
#else
void flush(const uint8_t*, int64_t) {}
#endif

void require_within(const char* name, int64_t found, int64_t lowest, int64_t highest) {
  if (found >= lowest && found <= highest) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(found) + ", expected " +
                              std::to_string(lowest) + " to " + std::to_string(highest));
}

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

std::vector<double> product_probe(const KernelTable& kernels, int threads, const std::vector<Trial>& trials,
                                  int64_t nbytes, int passes) {
  require_threads("threads", threads);
  require_within("nbytes", nbytes, kFewestProbeBytes, kMostProbeBytes);
  require_within("passes", passes, 1, kMostPasses);
  constexpr int64_t kCols = 2048, kRangePanels = 8, kStride = activation_bytes(kCols);
  int64_t most_tokens = 0, most_outputs = 0;
  for (const Trial& trial : trials) {
    if (!is_quantized(trial.format)) throw std::invalid_argument("a trial's format is not quantised");
    require_within("num_tokens", trial.num_tokens, 1, kMostProbeTokens);
    const int64_t rows = nbytes / panel_bytes(trial.format, kCols) * kPanelRows;
    most_tokens = std::max(most_tokens, trial.num_tokens);
    most_outputs = std::max(most_outputs, rows * trial.num_tokens);
  }
  if (trials.empty()) return {};
  Arena arena(static_cast<size_t>(nbytes));
  // As a scale in float16 or bfloat16, this is no subnormal number, which would be slow.
  constexpr int kWeight = 0x3A;
  std::memset(arena.data(), kWeight, arena.size());
  std::vector<uint8_t> activations(size_t(most_tokens * kStride));
  const std::vector<float> x(kCols, 1.0f);
  for (int64_t token = 0; token < most_tokens; ++token) {
    kernels.quantize_activations(x.data(), kCols, 0, num_groups(kCols), activations.data() + token * kStride);
  }
  std::vector<float> y(static_cast<size_t>(most_outputs));
  ThreadPool pool(threads);
  Arena scratch(static_cast<size_t>(std::max<int64_t>(1, threads * kernels.product_scratch_bytes)));
  const auto multiply = [&](const Trial& trial) {
    const int64_t panel = panel_bytes(trial.format, kCols), panels = nbytes / panel;
    pool.parallel_for(panels, kRangePanels, [&](int64_t begin, int64_t end, int worker) {
      kernels.matmul[int(trial.format)]({
          .format = trial.format,
          .weights = arena.data(),
          .cols = kCols,
          .row_begin = begin * kPanelRows,
          .row_end = end * kPanelRows,
          .x = activations.data(),
          .x_stride = kStride,
          .x_index = nullptr,
          .y = y.data() + begin * kPanelRows,
          .y_stride = panels * kPanelRows,
          .y_index = nullptr,
          .num_tokens = trial.num_tokens,
          .next_weights = end < panels ? arena.data() + end * panel : nullptr,
          .tuning = trial.tuning,
          .scratch = scratch.data() + worker * kernels.product_scratch_bytes,
      });
    });
  };
  std::vector<double> best(trials.size(), 1e30);   // seconds
  std::vector<uint32_t> checksums(trials.size());  // of the results
  // Flushing keeps the weights out of every cache without using more memory than the largest cache. The
  // trials take turns, because disturbances come and go. The best time of each counts, because a disturbance
  // only ever slows a pass down.
  for (int pass = 0; pass < passes; ++pass) {
    for (size_t i = 0; i < trials.size(); ++i) {
      flush(arena.data(), nbytes);  // one thread flushes: two together took longer
      const auto start = std::chrono::steady_clock::now();
      multiply(trials[i]);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      best[i] = std::min(best[i], taken.count());
      const int64_t rows = nbytes / panel_bytes(trials[i].format, kCols) * kPanelRows;
      if (pass == 0)
        checksums[i] = crc32c(reinterpret_cast<const uint8_t*>(y.data()),
                              size_t(rows * trials[i].num_tokens) * sizeof(float));
    }
  }
  for (size_t i = 0; i < trials.size(); ++i) {
    const size_t first = size_t(std::find_if(trials.begin(), trials.end(),
                                             [&](const Trial& other) {
                                               return other.format == trials[i].format &&
                                                      other.num_tokens == trials[i].num_tokens;
                                             }) -
                                trials.begin());
    const int64_t panel = panel_bytes(trials[i].format, kCols);
    best[i] = checksums[i] == checksums[first] ? double(nbytes / panel * panel) / best[i] : 0.0;
  }
  return best;
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
