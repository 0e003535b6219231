// machine_probe.h: how fast this machine is right now, to hold figures against.
//
// Both take the best of several passes: a neighbour on the same core makes a pass slower, never faster.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"

namespace argosy {

// Bytes per second at which `threads` threads together read `nbytes` on huge pages with the widest loads.
// Takes `nbytes` of memory while it runs. Below the size of the last cache it measures that cache. Throws
// std::invalid_argument for threads below 1 or nbytes below 4 MiB a thread, OutOfMemory.
double memory_probe(int threads, int64_t nbytes);

// The one of kAskAheads with which so many threads read the weights of one token fastest; kAskNothing unless
// another is faster by more than the noise. It takes some tens of milliseconds, and kAskAheadProbeBytes of
// memory meanwhile. Kernels without AVX-512 are not measured and use default_ask_ahead(). Throws
// std::invalid_argument for threads below 1, std::runtime_error if the system refuses a thread, OutOfMemory.
AskAhead ask_ahead_probe(int threads);
inline constexpr int64_t kAskAheadProbeBytes = int64_t{8} << 20;

// Integer operations per second, two per multiply-add, of the instruction that the products with q4 weights
// use. Throws std::invalid_argument for threads below 1.
double int8_probe(int threads);

}  // namespace argosy
