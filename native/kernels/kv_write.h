// kv_write.h: writes the keys and values of new tokens into their KV blocks (layout: kv_layer.h), for one
// KV head; and the latent vectors of new tokens.
//
// Rounds to nearest even if the cache is float16 or q8. A group with an infinity or a NaN gets a scale that
// is not finite in q8, so that the damage stays visible. Several tokens share cache lines of keys, so threads
// may split the heads, but not the tokens.
#pragma once

#include "kernels/half.h"
#include "kernels/kv_layer.h"
#include "kernels/quantize.h"

namespace argosy {
namespace {

static_assert(kKvGroup == kGroupSize);

// Rounds the first n of 32 values to multiples of a scale, up to 127 of them; the quants after them are zero.
inline uint16_t quantize_kv_group(const float* values, int64_t n, int8_t (&quants)[kKvGroup]) {
  const WeightGroup group = load_group(values, n);
  const uint16_t scale = f16_from_float(group.absmax / 127.0f);
  const float inverse = 1.0f / float_from_f16(scale);
  if (inverse < 1e30f && inverse > 0.0f) {
    round_group(group, inverse, -127.0f, 127.0f, quants);
  } else {  // the scale is zero, infinite or NaN
    std::memset(quants, 0, sizeof quants);
  }
  return scale;
}

// Calls put(group, scale, quants, number of quants) for each group of `dim` values.
template <class Put>
inline void quantize_kv(const float* values, int64_t dim, const Put& put) {
  for (int64_t d = 0; d < dim; d += kKvGroup) {
    const int64_t n = dim - d < kKvGroup ? dim - d : kKvGroup;
    int8_t quants[kKvGroup];
    const uint16_t scale = quantize_kv_group(values + d, n, quants);
    put(d / kKvGroup, scale, quants, n);
  }
}

template <class Element>
inline Element element_from(float value) {
  if constexpr (sizeof(Element) == 2) {
    return f16_from_float(value);
  } else {
    return value;
  }
}

struct KvPlace {
  uint8_t *key_tile, *value_tile;
  int64_t row;  // row of the tiles
};

inline KvPlace kv_place(const KvWriteArgs& a, int64_t token) {
  const KvLayer& kv = a.kv;
  const int64_t block = a.slots[token] / kv.block_tokens, offset = a.slots[token] % kv.block_tokens;
  return {key_head(kv, block, a.kv_head) + offset / kKeyTile * key_tile_bytes(kv),
          value_head(kv, block, a.kv_head) + offset / kKeyTile * value_tile_bytes(kv), offset % kKeyTile};
}

template <class Element>
void kv_write_as(const KvWriteArgs& a) {
  const KvLayer& kv = a.kv;
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const KvPlace place = kv_place(a, token);
    const int64_t row = token * kv.kv_heads + a.kv_head;
    Element* keys = reinterpret_cast<Element*>(place.key_tile) + place.row;
    Element* values = reinterpret_cast<Element*>(place.value_tile) + place.row * padded_value_dim(kv);
    for (int64_t d = 0; d < kv.head_dim; ++d)
      keys[d * kKeyTile] = element_from<Element>(a.keys[row * kv.head_dim + d]);
    for (int64_t d = 0; d < kv.value_dim; ++d)
      values[d] = element_from<Element>(a.values[row * kv.value_dim + d]);
  }
}

void kv_write_q8(const KvWriteArgs& a) {
  const KvLayer& kv = a.kv;
  const int64_t padded_dim = padded_value_dim(kv), groups = kv_groups(kv.value_dim);
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const KvPlace place = kv_place(a, token);
    const int64_t row = token * kv.kv_heads + a.kv_head;
    const auto put_key = [&](int64_t group, uint16_t scale, const int8_t* quants, int64_t n) {
      uint8_t* scales = place.key_tile + group * kKeyGroupBytes;
      std::memcpy(scales + 2 * place.row, &scale, sizeof scale);
      uint8_t* to = scales + 2 * kKeyTile + place.row;
      for (int64_t d = 0; d < n; ++d) to[d * kKeyTile] = uint8_t(quants[d]);
    };
    const auto put_value = [&](int64_t group, uint16_t scale, const int8_t* quants, int64_t n) {
      uint8_t* scales = place.value_tile + kKeyTile * padded_dim;
      std::memcpy(scales + 2 * (place.row * groups + group), &scale, sizeof scale);
      std::memcpy(place.value_tile + place.row * padded_dim + group * kKvGroup, quants, size_t(n));
    };
    quantize_kv(a.keys + row * kv.head_dim, kv.head_dim, put_key);
    quantize_kv(a.values + row * kv.value_dim, kv.value_dim, put_value);
  }
}

void kv_write(const KvWriteArgs& args) {
  switch (args.kv.format) {
    case KvFormat::f32:
      return kv_write_as<float>(args);
    case KvFormat::f16:
      return kv_write_as<uint16_t>(args);
    case KvFormat::q8:
      return kv_write_q8(args);
  }
}

void latent_write(const LatentWriteArgs& a) {
  const LatentLayer& kv = a.kv;
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const float* from = a.vectors + token * kv.dim;
    uint8_t* vector = kv.vectors + a.slots[token] * latent_vector_bytes(kv);
    uint8_t* to = vector + kv_scale_bytes(kv.format, kv.dim);
    switch (kv.format) {
      case KvFormat::f32:
        std::memcpy(to, from, size_t(kv.dim) * 4);
        break;
      case KvFormat::f16:
        for (int64_t d = 0; d < kv.dim; ++d) {
          const uint16_t bits = f16_from_float(from[d]);
          std::memcpy(to + 2 * d, &bits, sizeof bits);
        }
        break;
      case KvFormat::q8:
        quantize_kv(from, kv.dim, [&](int64_t group, uint16_t scale, const int8_t* quants, int64_t n) {
          std::memcpy(vector + 2 * group, &scale, sizeof scale);
          std::memcpy(to + group * kKvGroup, quants, size_t(n));
        });
        break;
    }
  }
}

}  // namespace
}  // namespace argosy
