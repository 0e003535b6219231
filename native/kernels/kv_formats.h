// kv_formats.h: reads keys, values and latent vectors of every KvFormat as float32 (layouts: kv_layer.h).
//
// Kernels are templates over the types below, so the compiler makes separate loops for each format. A q8
// element is its scale times its quant, rounded once to float32, wherever it is read, so all kernels see the
// same numbers.
#pragma once

#include "kernels/half.h"
#include "kernels/kv_layer.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

// `index` counts elements from `base`.
inline float kv_element(KvFormat format, const uint8_t* base, int64_t index) {
  switch (format) {
    case KvFormat::f32:
      return read_unaligned<float>(base + 4 * index);
    case KvFormat::f16:
      return float_from_f16(read_unaligned<uint16_t>(base + 2 * index));
    case KvFormat::q8:
      break;
  }
  return float(int8_t(base[index]));
}

inline float kv_scale(KvFormat format, const uint8_t* scales, int64_t index) {
  return format == KvFormat::q8 ? float_from_f16(read_unaligned<uint16_t>(scales + 2 * index)) : 1.0f;
}

// Dimension d of the key at `offset` in a block, whose keys of one head begin at `keys`.
inline float key_element(const KvLayer& kv, const uint8_t* keys, int64_t offset, int64_t d) {
  const uint8_t* tile = keys + offset / kKeyTile * key_tile_bytes(kv);
  const int64_t lane = offset % kKeyTile;
  if (kv.format != KvFormat::q8) return kv_element(kv.format, tile, d * kKeyTile + lane);
  const uint8_t* scales = tile + d / kKvGroup * kKeyGroupBytes;
  return kv_scale(kv.format, scales, lane) *
         kv_element(kv.format, scales + 2 * kKeyTile, d % kKvGroup * kKeyTile + lane);
}

// Dimension d of the value at `offset` in a block, whose values of one head begin at `values`.
inline float value_element(const KvLayer& kv, const uint8_t* values, int64_t offset, int64_t d) {
  const uint8_t* tile = values + offset / kKeyTile * value_tile_bytes(kv);
  const int64_t row = offset % kKeyTile;
  const uint8_t* scales = tile + kKeyTile * padded_value_dim(kv) * kv_element_bytes(kv.format);
  return kv_scale(kv.format, scales, row * kv_groups(kv.value_dim) + d / kKvGroup) *
         kv_element(kv.format, tile, row * padded_value_dim(kv) + d);
}

inline float latent_element(const LatentLayer& kv, const uint8_t* vector, int64_t d) {
  return kv_scale(kv.format, vector, d / kKvGroup) *
         kv_element(kv.format, vector + kv_scale_bytes(kv.format, kv.dim), d);
}

#else

// Elements that need no scale.
template <class Weights>
struct FloatKv {
  static constexpr int64_t kBytes = Weights::kBytes;
  static constexpr int64_t kGroup = INT64_MAX;  // dimensions that share a scale
  static constexpr int64_t kKeyScaleBytes = 0;  // before the elements of a group of a tile's keys
  struct Scale {};

  static Scale key_scale(const uint8_t*, int64_t) { return {}; }
  static Scale value_scale(const uint8_t*, int64_t) { return {}; }
  static Vec load(const uint8_t* from, const Scale&) { return Weights::load(from); }
  static Vec load(const uint8_t* from, int64_t n, const Scale&) { return Weights::load(from, n); }
};

using F32Kv = FloatKv<F32Weights>;
using F16Kv = FloatKv<F16Weights>;

struct Q8Kv {
  static constexpr int64_t kBytes = 1;
  static constexpr int64_t kGroup = kKvGroup;
  static constexpr int64_t kKeyScaleBytes = 2 * kKeyTile;
  struct Scale {
    Vec of_lanes;
  };

  // The scales of positions [first, first + kLanes) of a tile, from the beginning of a group of its keys.
  static Scale key_scale(const uint8_t* group, int64_t first) {
    return {F16Weights::load(group + 2 * first)};
  }
  // The scale at `index` of `scales`, in every lane.
  static Scale value_scale(const uint8_t* scales, int64_t index) {
    return {broadcast_f16(scales + 2 * index)};
  }
  static Vec load(const uint8_t* from, const Scale& scale) { return mul(load_i8(from), scale.of_lanes); }
  static Vec load(const uint8_t* from, int64_t n, const Scale& scale) {
    return mul(load_i8(from, n), scale.of_lanes);
  }
};

// Calls body(Kv{}) with the type of a format.
template <class Body>
inline void with_kv(KvFormat format, const Body& body) {
  switch (format) {
    case KvFormat::f32:
      return body(F32Kv{});
    case KvFormat::f16:
      return body(F16Kv{});
    case KvFormat::q8:
      return body(Q8Kv{});
  }
}

#endif

}  // namespace
}  // namespace argosy
