// product_scratch.h: what products on tiles keep in the scratch of a thread between calls.
#pragma once

#include "kernels/matmul_args.h"

namespace argosy {
namespace {

// Lies at the beginning of MatmulArgs::scratch.
struct ProductScratch {
  ProductCounts counts;
  // The activations whose copy the scratch holds: those of `num_tokens` tokens, from column `begin` on, in
  // the layout of `format`. nullptr: none.
  const uint8_t* x;
  const int32_t* x_index;
  int64_t num_tokens, cols, begin;
  Format format;

  bool holds(const MatmulArgs& a, Format layout, int64_t first_col = 0) const {
    return x == a.x && x_index == a.x_index && num_tokens == a.num_tokens && cols == a.cols &&
           begin == first_col && format == layout;
  }
  void hold(const MatmulArgs& a, Format layout, int64_t first_col = 0) {
    x = a.x;
    x_index = a.x_index;
    num_tokens = a.num_tokens;
    cols = a.cols;
    begin = first_col;
    format = layout;
  }
};

inline void count_operations(uint64_t& counter, int64_t rows, int64_t cols, int64_t tokens) {
  __atomic_store_n(&counter, counter + 2 * uint64_t(rows) * uint64_t(cols) * uint64_t(tokens),
                   __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace argosy
