#include "ops/kv_gather.h"

#include <algorithm>
#include <cstring>

namespace argosy {

namespace {

// Copies kBytes of each row of sixteen lanes. A size that the compiler knows makes this a load and a store.
template <int64_t kBytes>
void copy_known(const uint8_t* from, uint8_t* to, int64_t rows, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * stride, from + row * stride, kBytes);
}

void copy_rows(const uint8_t* from, uint8_t* to, int64_t rows, int64_t stride, int64_t bytes) {
  switch (bytes) {
    case 4:
      return copy_known<4>(from, to, rows, stride);
    case 8:
      return copy_known<8>(from, to, rows, stride);
    case 16:
      return copy_known<16>(from, to, rows, stride);
  }
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * stride, from + row * stride, size_t(bytes));
}

// Lanes of two tiles of keys.
struct Lanes {
  int64_t from, to, count;
};

void copy_lanes(const uint8_t* from, uint8_t* to, int64_t rows, int64_t element_bytes, const Lanes& lanes) {
  copy_rows(from + lanes.from * element_bytes, to + lanes.to * element_bytes, rows, kKeyTile * element_bytes,
            lanes.count * element_bytes);
}

void copy_keys(const KvLayer& kv, const uint8_t* from, uint8_t* to, const Lanes& lanes) {
  if (kv.format != KvFormat::q8) {
    copy_lanes(from, to, kv.head_dim, kv_element_bytes(kv.format), lanes);
    return;
  }
  for (int64_t d = 0; d < kv.head_dim; d += kKvGroup) {
    const int64_t at = d / kKvGroup * kKeyGroupBytes, bytes_at = at + 2 * kKeyTile;
    copy_lanes(from + at, to + at, 1, 2, lanes);
    copy_lanes(from + bytes_at, to + bytes_at, std::min(kKvGroup, kv.head_dim - d), 1, lanes);
  }
}

void copy_values(const KvLayer& kv, const uint8_t* from, uint8_t* to, const Lanes& lanes) {
  const int64_t row = padded_value_dim(kv) * kv_element_bytes(kv.format);
  std::memcpy(to + lanes.to * row, from + lanes.from * row, size_t(lanes.count * row));
  const int64_t scales = kv_scale_bytes(kv.format, kv.value_dim);
  std::memcpy(to + kKeyTile * row + lanes.to * scales, from + kKeyTile * row + lanes.from * scales,
              size_t(lanes.count * scales));
}

}  // namespace

int64_t gathered_bytes(int64_t head_dim, int64_t value_dim, int64_t num_tiles) {
  const KvLayer widest = {nullptr, nullptr, kKeyTile, 1, head_dim, value_dim, KvFormat::f32};
  return num_tiles * (key_tile_bytes(widest) + value_tile_bytes(widest));
}

KvLayer gathered_layer(const KvLayer& kv, int64_t num_tiles, uint8_t* memory) {
  KvLayer to = kv;
  to.block_tokens = kKeyTile;
  to.kv_heads = 1;
  to.keys = memory;
  to.values = memory + num_tiles * key_tile_bytes(kv);
  return to;
}

void gather_positions(const KvLayer& kv, const int32_t* blocks, int64_t kv_head, int64_t first, int64_t count,
                      const KvLayer& to, int64_t lane) {
  for (int64_t position = first; position < first + count;) {
    const int64_t block = blocks[position / kv.block_tokens], offset = position % kv.block_tokens;
    const int64_t tile = offset / kKeyTile, to_tile = lane / kKeyTile;
    Lanes lanes = {offset % kKeyTile, lane % kKeyTile, first + count - position};
    for (const int64_t rest : {kv.block_tokens - offset, kKeyTile - lanes.from, kKeyTile - lanes.to})
      lanes.count = std::min(lanes.count, rest);
    copy_keys(kv, key_head(kv, block, kv_head) + tile * key_tile_bytes(kv),
              to.keys + to_tile * key_tile_bytes(kv), lanes);
    copy_values(kv, value_head(kv, block, kv_head) + tile * value_tile_bytes(kv),
                to.values + to_tile * value_tile_bytes(kv), lanes);
    position += lanes.count;
    lane += lanes.count;
  }
}

}  // namespace argosy
