// machine_probe.h: measures how fast this machine is right now, as a reference for other figures.
//
// Every probe takes the best of several passes: another process on the same core makes a pass slower, never
// faster.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"

namespace argosy {

// Returns the bytes per second at which `threads` threads together read `nbytes` on huge pages with the
// widest loads of `kernels`. Uses `nbytes` of memory while it runs. If `nbytes` is smaller than the
// last-level cache, it measures that cache. Throws std::invalid_argument for threads below 1 or nbytes below
// 4 MiB per thread, OutOfMemory.
double memory_probe(const KernelTable& kernels, int threads, int64_t nbytes);

// Returns the entry of kAskAheads with which this many threads read the weights of one token fastest with
// `kernels`; kAskNothing unless another is faster by more than the noise. Takes a few tens of milliseconds
// and kAskAheadProbeBytes of memory. Kernels without AVX-512 are not measured and use
// default_ask_ahead(kernels). Throws std::invalid_argument for threads below 1, std::runtime_error if the
// system refuses a thread, OutOfMemory.
AskAhead ask_ahead_probe(const KernelTable& kernels, int threads);
inline constexpr int64_t kAskAheadProbeBytes = int64_t{8} << 20;

// Returns integer operations per second, two per multiply-add, of the instruction that products with q4
// weights use in `kernels`. Throws std::invalid_argument for threads below 1.
double int8_probe(const KernelTable& kernels, int threads);

}  // namespace argosy
