// matmul_args.h: where the rows of one token begin, and the arguments of some tokens.
#pragma once

#include "kernels/kernel_table.h"

namespace argosy {
namespace {

inline const uint8_t* activation_row(const MatmulArgs& a, int64_t token) {
  return a.x + (a.x_index != nullptr ? a.x_index[token] : token) * a.x_stride;
}
inline const float* float_row(const MatmulArgs& a, int64_t token) {
  return reinterpret_cast<const float*>(activation_row(a, token));
}
inline float* output_row(const MatmulArgs& a, int64_t token) {
  return a.y + (a.y_index != nullptr ? a.y_index[token] : token) * a.y_stride;
}

// The same product for `count` tokens from `first`.
inline MatmulArgs some_tokens(MatmulArgs a, int64_t first, int64_t count) {
  if (a.x_index != nullptr) {
    a.x_index += first;
  } else {
    a.x += first * a.x_stride;
  }
  if (a.y_index != nullptr) {
    a.y_index += first;
  } else {
    a.y += first * a.y_stride;
  }
  a.num_tokens = count;
  return a;
}

// A compile-time number.
template <int kValue>
struct Number {};

// Calls body(Number<n>{}) for n from 1 to kMost; does nothing for other n.
template <int kMost, class Body>
inline void with_number(int64_t n, const Body& body) {
  if constexpr (kMost > 0) {
    if (n == kMost) return body(Number<kMost>{});
    with_number<kMost - 1>(n, body);
  }
}

}  // namespace
}  // namespace argosy
