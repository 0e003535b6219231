// recurrent.h: the sizes of recurrent layers as Python passes them.
#pragma once

#include <array>
#include <tuple>

#include "bind/bind.h"
#include "bind/matrix.h"
#include "ops/gated_delta.h"
#include "ops/mamba.h"
#include "ops/pool.h"

namespace argosy {

// Key heads, value heads, key head dimension, value head dimension, convolution width.
using DeltaSizes = Named<std::array<int64_t, 5>, "_DeltaSizes">;

inline DeltaShape delta_shape(const DeltaSizes& sizes) {
  const DeltaShape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  shape.state();  // rejects sizes below 1 and products that overflow an int64
  require_size("value heads modulo key heads", shape.num_value_heads % shape.num_key_heads, 0);
  return shape;
}

// Heads, head dimension, state dimension, groups, convolution width.
using MambaSizes = Named<std::array<int64_t, 5>, "_MambaSizes">;

inline MambaShape mamba_shape(const MambaSizes& sizes) {
  const MambaShape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  shape.state();  // rejects sizes below 1 and products that overflow an int64
  require_size("heads modulo groups", shape.num_heads % shape.num_groups, 0);
  return shape;
}

// Ratio, dimension, whether groups overlap.
using PoolSizes = Named<std::tuple<int64_t, int64_t, bool>, "_PoolSizes">;

inline PoolShape pool_shape(const PoolSizes& sizes) {
  const auto& [ratio, dim, has_overlap] = sizes.base();
  require_range("the ratio of a pool", ratio, 1, int64_t{1} << 20);
  require_range("the dimension of a pool", dim, 1, kLargestSize);
  return {ratio, dim, has_overlap};
}

inline void require_slot(const RecurrentState& state, int64_t slot) {
  require_range("slot", slot, 0, state.num_slots() - 1);
}

}  // namespace argosy
