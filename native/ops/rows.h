// rows.h: rows of a matrix of numbers that may lie apart.
#pragma once

#include <cstdint>

namespace argosy {

// Rows whose first elements are `stride` floats apart.
template <class Float>
struct Rows {
  Float* data;
  int64_t stride;
};

}  // namespace argosy
