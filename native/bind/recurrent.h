// recurrent.h: the sizes of a gated delta net as Python gives them.
#pragma once

#include <array>

#include "bind/bind.h"
#include "ops/gated_delta.h"

namespace argosy {

// key heads, value heads, dimensions of a key head, of a value head, positions of the convolution.
using DeltaSizes = std::array<int64_t, 5>;

inline DeltaShape delta_shape(const DeltaSizes& sizes) {
  const DeltaShape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  RecurrentState::bytes(1, 1, shape);  // no size below 1, and no product beyond an int64
  require_size("value heads modulo key heads", shape.num_value_heads % shape.num_key_heads, 0);
  return shape;
}

}  // namespace argosy
