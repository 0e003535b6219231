// attention.h: the KV cache, and attention of a batch over it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention_args.h"
#include "kernels/kv_layer.h"
#include "ops/runtime.h"
#include "store/arena.h"

namespace argosy {

// The data that a layer stores for each position, or for each group of consecutive positions.
struct KvShape {
  enum class Kind {
    none,         // nothing: the layer has a recurrent state
    keys_values,  // a key of head_dim and a value of value_dim elements for each KV head
    latent,       // one vector of head_dim elements, which all heads share
  };
  Kind kind = Kind::none;
  int64_t kv_heads = 0, head_dim = 0, value_dim = 0;
  bool is_windowed = false;  // the layer has blocks of its own, window blocks
  int64_t index_dim = 0;     // elements of an index key besides; 0: none
  // Latent vectors: entry e of a sequence stands for so many positions and lies where the last of them does,
  // position (e + 1) * positions_per_entry - 1. It divides the positions of a block, or is a multiple.
  int64_t positions_per_entry = 1;

  static KvShape keys_values(int64_t kv_heads, int64_t head_dim, int64_t value_dim, bool is_windowed = false,
                             int64_t index_dim = 0) {
    return {Kind::keys_values, kv_heads, head_dim, value_dim, is_windowed, index_dim};
  }
  static KvShape latent(int64_t dim, int64_t index_dim = 0, bool is_windowed = false) {
    return {Kind::latent, 1, dim, 0, is_windowed, index_dim};
  }
  // Entries that each stand for several positions.
  static KvShape pooled(int64_t dim, int64_t positions_per_entry) {
    return {Kind::latent, 1, dim, 0, false, 0, positions_per_entry};
  }
};

// How many blocks there are, for layers that keep all positions and for windowed ones.
struct KvBlockCounts {
  int64_t num_blocks, num_window_blocks;

  int64_t of(const KvShape& shape) const { return shape.is_windowed ? num_window_blocks : num_blocks; }
};

// The KV cache of all layers, in blocks of block_tokens positions (layout: kernels/kv_layer.h). Layers
// that keep all positions share the numbers of their blocks, and so do windowed layers. Behind the layers
// come the further stores of some of them, which count as layers here.
class KvCache {
 public:
  // Throws std::invalid_argument for a size below 1, positions_per_entry that does not fit block_tokens, or a
  // cache beyond 2^62 bytes.
  KvCache(std::vector<KvShape> layers, KvBlockCounts counts, int64_t block_tokens, KvFormat format);

  // The bytes of a layer's keys and of its values, or of its latent vectors; and of its index keys, if it has
  // any. Throws as the constructor does.
  static std::vector<int64_t> layer_parts(const KvShape& shape, int64_t num_blocks, int64_t block_tokens,
                                          KvFormat format);
  static int64_t bytes(const std::vector<KvShape>& layers, KvBlockCounts counts, int64_t block_tokens,
                       KvFormat format);

  // The layer must have the matching kind of shape.
  KvLayer layer(int64_t index);
  LatentLayer latent_layer(int64_t index);
  LatentLayer index_layer(int64_t index);  // the index keys, which lie like latent vectors

  const KvShape& shape(int64_t index) const { return layers_[size_t(index)]; }
  int64_t num_layers() const { return int64_t(layers_.size()); }
  int64_t num_blocks() const { return counts_.num_blocks; }
  int64_t num_window_blocks() const { return counts_.num_window_blocks; }
  int64_t num_blocks_of(int64_t layer) const { return counts_.of(shape(layer)); }
  int64_t block_tokens() const { return block_tokens_; }
  int64_t nbytes() const { return nbytes_; }

  // How much is in memory at most while nothing was written to blocks from number `num_blocks` on, window
  // blocks aside, and how to have no more. Layers lie one after another on huge pages, so a part of what
  // those blocks take stays.
  int64_t held_bytes(int64_t num_blocks);
  void release(int64_t num_blocks);

  // The data of one block in all layers that are windowed, or in all others. Nothing else may use the block
  // during a copy.
  int64_t block_bytes(bool is_windowed) const;
  void copy_out(int64_t block, uint8_t* to);
  void copy_in(int64_t block, const uint8_t* from);
  void copy_block(int64_t from, int64_t to, bool is_windowed);

 private:
  // For each layer, and separately for its keys and values, or latent vectors, and index keys: the offset of
  // block 0, and the bytes per block.
  struct Part {
    int64_t offset, block_bytes;
  };
  std::vector<Part> parts(bool is_windowed);

  std::vector<KvShape> layers_;
  std::vector<int64_t> offsets_;  // where each layer begins in the arena
  KvBlockCounts counts_;
  int64_t block_tokens_;
  KvFormat format_;
  int64_t nbytes_;
  Arena arena_;
};

// keys [num_tokens][kv_heads][head_dim], values [num_tokens][kv_heads][value_dim]. All slots must be in
// range.
void kv_write(Runtime& runtime, const KvLayer& kv, const float* keys, const float* values,
              const int64_t* slots, int64_t num_tokens);

// The blocks of positions that an index chose for each token (latent_index.h). Block b has positions
// [b * size, (b + 1) * size). Either each KV head sees blocks of its own, the last of which is the token's,
// and the size is a multiple of KvLayer::block_tokens. Or, if the choice is joint, all KV heads see the same,
// chosen among whole blocks of any size, and the token also sees the unfinished one behind them; keys and
// values are then gathered.
struct ChosenBlocks {
  const int32_t* blocks = nullptr;  // [num_tokens][kv_heads or 1][count], ascending; nullptr: tokens see all
  int64_t count = 0, size = 1;
  bool is_joint = false;

  // Whether the token at `order` sees only chosen blocks.
  bool limits(int64_t order) const {
    return blocks != nullptr && (is_joint ? (order + 1) / size > count : order / size >= count);
  }
  // How many positions it sees, its own the last of them.
  int64_t seen_by(int64_t order) const {
    if (!limits(order)) return order + 1;
    return is_joint ? count * size + (order + 1) % size : (count - 1) * size + order % size + 1;
  }
  int64_t most_seen() const { return count * size + (is_joint ? size - 1 : 0); }
};

struct AttentionBatch {
  const float* q;  // [num_tokens][num_heads][head_dim]
  int64_t num_tokens, num_heads;
  const int32_t* block_table;  // [sequences][max_blocks]
  int64_t max_blocks;
  const int32_t* sequence;    // [num_tokens]
  const int32_t* order;       // [num_tokens], the index of each token in its sequence
  const int32_t* sees_until;  // [num_tokens], the end of the positions it sees; nullptr: order + 1
  float scale;
  Window window;
  const float* sinks = nullptr;  // [num_heads]; nullptr: none
  // With chosen blocks, there is neither a window nor sees_until.
  ChosenBlocks chosen = {};

  // The positions that a token sees: [first(token), until(token)). All their blocks must be in range.
  int64_t first(int64_t token) const { return first_seen(window, order[token]); }
  int64_t until(int64_t token) const {
    return sees_until != nullptr ? int64_t(sees_until[token]) : int64_t(order[token]) + 1;
  }
};

// out [num_tokens][num_heads][value_dim].
void attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out);

struct AttentionScratchSizes {
  int64_t head_dim, value_dim;
  int64_t num_chosen = 0;      // the most positions of its chosen blocks that a token sees; 0: it sees all
  int64_t gathered_heads = 0;  // heads that share a KV head, if these positions are gathered

  bool operator==(const AttentionScratchSizes&) const = default;
};

// The runtime scratch that attention takes.
int64_t attention_scratch_bytes(const AttentionScratchSizes& sizes, int num_threads);

}  // namespace argosy
