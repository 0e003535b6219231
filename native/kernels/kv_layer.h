// kv_layer.h: where keys, values and latent vectors lie in their KV blocks, and what writes them.
#pragma once

#include <cstdint>

#include "kernels/formats.h"

namespace argosy {

// The format of keys, values and latent vectors. In q8, 32 dimensions of one position (of one head) are
// signed bytes that share a float16 scale: an element is its byte times the scale. Scales belong to a
// position, so that writing one changes no other.
enum class KvFormat { f32, f16, q8 };

// Keys lie in tiles of sixteen positions.
[[maybe_unused]] static constexpr int64_t kKeyTile = 16;
// Dimensions that share a scale, and the bytes of that many in a tile of q8 keys.
[[maybe_unused]] static constexpr int64_t kKvGroup = 32;
[[maybe_unused]] static constexpr int64_t kKeyGroupBytes = kKeyTile * (2 + kKvGroup);

// The memory of one layer's keys and values. A block holds, for each KV head, tiles of sixteen positions:
//   keys    [head_dim][16]: one load brings one dimension of sixteen positions;
//           q8: for each 32 dimensions (the last group may have fewer) the scales [16], then the bytes
//           [32][16];
//   values  [16][value_dim padded to 16];
//           q8: then the scales [16][groups of 32 dimensions].
// Positions of a block are padded to 16.
struct KvLayer {
  uint8_t* keys;
  uint8_t* values;
  int64_t block_tokens, kv_heads, head_dim, value_dim;
  KvFormat format;
};

static inline int64_t kv_element_bytes(KvFormat format) {
  return format == KvFormat::f32 ? 4 : format == KvFormat::f16 ? 2 : 1;
}
static inline int64_t kv_groups(int64_t dim) { return (dim + kKvGroup - 1) / kKvGroup; }
// Bytes of the scales of one position's `dim` elements.
static inline int64_t kv_scale_bytes(KvFormat format, int64_t dim) {
  return format == KvFormat::q8 ? 2 * kv_groups(dim) : 0;
}
static inline int64_t padded_value_dim(const KvLayer& kv) { return round_up(kv.value_dim, 16); }
static inline int64_t key_tile_bytes(const KvLayer& kv) {
  return kKeyTile * (kv.head_dim * kv_element_bytes(kv.format) + kv_scale_bytes(kv.format, kv.head_dim));
}
static inline int64_t value_tile_bytes(const KvLayer& kv) {
  return kKeyTile *
         (padded_value_dim(kv) * kv_element_bytes(kv.format) + kv_scale_bytes(kv.format, kv.value_dim));
}
static inline int64_t tiles_per_block(const KvLayer& kv) {
  return (kv.block_tokens + kKeyTile - 1) / kKeyTile;
}
// The lane of a position: its number in the tiles of the sequence's blocks, padding included.
static inline int64_t lane_of(const KvLayer& kv, int64_t position) {
  return position / kv.block_tokens * tiles_per_block(kv) * kKeyTile + position % kv.block_tokens;
}
// Bytes of one head in one block.
static inline int64_t key_head_bytes(const KvLayer& kv) { return tiles_per_block(kv) * key_tile_bytes(kv); }
static inline int64_t value_head_bytes(const KvLayer& kv) {
  return tiles_per_block(kv) * value_tile_bytes(kv);
}
static inline uint8_t* key_head(const KvLayer& kv, int64_t block, int64_t head) {
  return kv.keys + (block * kv.kv_heads + head) * key_head_bytes(kv);
}
static inline uint8_t* value_head(const KvLayer& kv, int64_t block, int64_t head) {
  return kv.values + (block * kv.kv_heads + head) * value_head_bytes(kv);
}

// The vectors of one layer with latent attention: [blocks][block_tokens][dim]. A q8 vector has its scales
// [groups of 32 dimensions] before its bytes.
struct LatentLayer {
  uint8_t* vectors;
  int64_t block_tokens, dim;  // block_tokens: vectors of a block
  KvFormat format;
  int64_t block_stride = 1;  // the vectors of a sequence lie in the last of every so many of its blocks
};

static inline int64_t latent_vector_bytes(const LatentLayer& kv) {
  return kv_scale_bytes(kv.format, kv.dim) + kv.dim * kv_element_bytes(kv.format);
}

struct KvWriteArgs {
  KvLayer kv;
  const float* keys;     // [num_tokens][kv_heads][head_dim]
  const float* values;   // [num_tokens][kv_heads][value_dim]
  const int64_t* slots;  // block * block_tokens + offset
  int64_t num_tokens;
  int64_t kv_head;  // the one to write
};

struct LatentWriteArgs {
  LatentLayer kv;
  const float* vectors;  // [num_tokens][dim]
  const int64_t* slots;  // block * block_tokens + offset
  int64_t num_tokens;
};

}  // namespace argosy
