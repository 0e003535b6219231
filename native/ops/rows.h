// rows.h: rows of a matrix of numbers that may lie apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace argosy {

// Rows whose first elements are `stride` floats apart.
template <class Float>
struct Rows {
  Float* data;
  int64_t stride;
};

// Moves these rows of x [cols], in ascending order, to its beginning.
template <class T>
void move_up(const std::vector<int64_t>& rows, int64_t cols, T* x) {
  for (size_t i = 0; i < rows.size(); ++i)
    if (rows[i] != int64_t(i)) std::copy_n(x + rows[i] * cols, cols, x + int64_t(i) * cols);
}

}  // namespace argosy
