// attention.h: the KV cache, and attention of a batch over it.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"
#include "ops/runtime.h"
#include "store/arena.h"

namespace argosy {

// Keys and values of all layers, in blocks of block_tokens positions (layout: kernels/kernel_table.h).
class KvCache {
 public:
  // Throws std::invalid_argument for a size below 1 or a cache beyond 2^62 bytes.
  KvCache(int64_t num_layers, int64_t num_blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_dim,
          bool is_f16);

  static int64_t bytes(int64_t num_layers, int64_t num_blocks, int64_t block_tokens, int64_t kv_heads,
                       int64_t head_dim, bool is_f16);

  KvLayer layer(int64_t index);
  const KvLayer& shape() const { return shape_; }
  int64_t num_layers() const { return num_layers_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t nbytes() const { return int64_t(arena_.size()); }

 private:
  int64_t num_layers_, num_blocks_;
  KvLayer shape_;  // without pointers
  Arena arena_;
};

// keys and values [num_tokens][kv_heads][head_dim]; slots are in range.
void kv_write(Runtime& runtime, const KvLayer& kv, const float* keys, const float* values,
              const int64_t* slots, int64_t num_tokens);

struct AttentionBatch {
  const float* q;  // [num_tokens][num_heads][head_dim]
  int64_t num_tokens, num_heads;
  const int32_t* block_table;  // [sequences][max_blocks]
  int64_t max_blocks;
  const int32_t* sequence;  // [num_tokens]
  const int32_t* position;  // [num_tokens]; its blocks are in range
  float scale;
  int64_t window;                // 0: all positions
  const float* sinks = nullptr;  // [num_heads]; nullptr: none
};

void attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out);

}  // namespace argosy
