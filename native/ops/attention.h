// attention.h: the KV cache, and attention of a batch over it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel_table.h"
#include "ops/runtime.h"
#include "store/arena.h"

namespace argosy {

// What a layer stores for each position.
struct KvShape {
  enum class Kind {
    none,         // nothing: the layer has a recurrent state
    keys_values,  // a key and a value of head_dim elements for each KV head
    latent,       // one vector of head_dim elements, which all heads share
  };
  Kind kind = Kind::none;
  int64_t kv_heads = 0, head_dim = 0;

  static KvShape keys_values(int64_t kv_heads, int64_t head_dim) {
    return {Kind::keys_values, kv_heads, head_dim};
  }
  static KvShape latent(int64_t dim) { return {Kind::latent, 1, dim}; }
};

// The KV cache of all layers, in blocks of block_tokens positions (layout: kernels/kernel_table.h).
class KvCache {
 public:
  // Throws std::invalid_argument for a size below 1 or a cache beyond 2^62 bytes.
  KvCache(std::vector<KvShape> layers, int64_t num_blocks, int64_t block_tokens, bool is_f16);

  static int64_t bytes(const std::vector<KvShape>& layers, int64_t num_blocks, int64_t block_tokens,
                       bool is_f16);

  // The layer must have the matching kind of shape.
  KvLayer layer(int64_t index);
  LatentLayer latent_layer(int64_t index);

  const KvShape& shape(int64_t index) const { return layers_[size_t(index)]; }
  int64_t num_layers() const { return int64_t(layers_.size()); }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t block_tokens() const { return block_tokens_; }
  int64_t nbytes() const { return nbytes_; }

  // The data of one block in all layers. Nothing else may use the block during a copy.
  int64_t block_bytes() const { return nbytes_ / num_blocks_; }
  void copy_out(int64_t block, uint8_t* to);
  void copy_in(int64_t block, const uint8_t* from);
  void copy_block(int64_t from, int64_t to);

 private:
  // For each layer, and separately for its keys and values: the offset of block 0, and the bytes per block.
  struct Part {
    int64_t offset, block_bytes;
  };
  std::vector<Part> parts();

  std::vector<KvShape> layers_;
  std::vector<int64_t> offsets_;  // of each layer, in the arena
  int64_t num_blocks_, block_tokens_;
  bool is_f16_;
  int64_t nbytes_;
  Arena arena_;
};

// keys and values are [num_tokens][kv_heads][head_dim]. All slots must be in range.
void kv_write(Runtime& runtime, const KvLayer& kv, const float* keys, const float* values,
              const int64_t* slots, int64_t num_tokens);

struct AttentionBatch {
  const float* q;  // [num_tokens][num_heads][head_dim]
  int64_t num_tokens, num_heads;
  const int32_t* block_table;  // [sequences][max_blocks]
  int64_t max_blocks;
  const int32_t* sequence;    // [num_tokens]
  const int32_t* order;       // [num_tokens], the index of each token in its sequence
  const int32_t* sees_until;  // [num_tokens], the end of the positions it sees; nullptr: order + 1
  float scale;
  int64_t window;                // positions begin at order - window + 1; 0: at 0
  const float* sinks = nullptr;  // [num_heads]; nullptr: none

  // The positions that a token sees: [first(token), until(token)). All their blocks must be in range.
  int64_t first(int64_t token) const {
    return window > 0 && order[token] >= window ? order[token] - window + 1 : 0;
  }
  int64_t until(int64_t token) const {
    return sees_until != nullptr ? int64_t(sees_until[token]) : int64_t(order[token]) + 1;
  }
};

void attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out);

// The runtime scratch that attention takes.
int64_t attention_scratch_bytes(int64_t head_dim, int num_threads);

}  // namespace argosy
