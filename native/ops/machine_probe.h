// machine_probe.h: measures how fast this machine is right now, as a reference for other figures.
//
// Every probe takes the best of several passes: another process on the same core makes a pass slower, never
// faster.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/tuning.h"

namespace argosy {

// Returns the bytes per second at which `threads` threads together read `nbytes` on huge pages with the
// widest loads of `kernels`. Uses `nbytes` of memory while it runs. If `nbytes` is smaller than the
// last-level cache, it measures that cache. Throws std::invalid_argument for threads below 1 or nbytes below
// 4 MiB per thread, OutOfMemory.
double memory_probe(const KernelTable& kernels, int threads, int64_t nbytes);

// Products of one format that a probe times.
struct Trial {
  Format format;
  int64_t num_tokens;
  Tuning tuning;
};

// Returns, for each trial, the bytes of weights per second that this many threads together read in the
// fastest of `passes` passes over `nbytes` of weights that no cache holds; 0 if its results have other bits
// than those of the first trial of the same format and tokens. The trials take turns. Takes
// `nbytes` of memory, and a few percent more for what the products write. Throws std::invalid_argument for
// threads below 1, a format that is not quantised, tokens outside 1 to kMostProbeTokens, nbytes outside
// kFewestProbeBytes to kMostProbeBytes, or passes outside 1 to kMostPasses; std::runtime_error if the system
// refuses a thread; OutOfMemory.
std::vector<double> product_probe(const KernelTable& kernels, int threads, const std::vector<Trial>& trials,
                                  int64_t nbytes, int passes);
inline constexpr int64_t kMostProbeTokens = 32;
inline constexpr int64_t kFewestProbeBytes = int64_t{1} << 20, kMostProbeBytes = int64_t{1} << 30;
inline constexpr int kMostPasses = 1000;

// Returns integer operations per second, two per multiply-add, of the instruction that products with q4
// weights use in `kernels`. Throws std::invalid_argument for threads below 1.
double int8_probe(const KernelTable& kernels, int threads);

}  // namespace argosy
