// kv_gather.h: copies keys and values of scattered positions side by side, bit by bit in the cache's format,
// so that attention over them is attention over a sequence of only these positions.
#pragma once

#include <cstdint>

#include "kernels/kv_layer.h"

namespace argosy {

// The most bytes of `num_tiles` gathered tiles of one KV head, whatever the format.
int64_t gathered_bytes(int64_t head_dim, int64_t value_dim, int64_t num_tiles);

// One KV head of `kv`'s sizes and format in `memory`, aligned to 64: its blocks are single tiles.
KvLayer gathered_layer(const KvLayer& kv, int64_t num_tiles, uint8_t* memory);

// Copies `count` positions from `first` on of one KV head of a sequence to lanes of gathered tiles, from
// `lane` on.
void gather_positions(const KvLayer& kv, const int32_t* blocks, int64_t kv_head, int64_t first, int64_t count,
                      const KvLayer& to, int64_t lane);

}  // namespace argosy
