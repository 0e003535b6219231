// kernel_cases.h: what the tests of the kernels share: random numbers, weights in a format at an odd address,
// tables.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"
#include "ops/matmul.h"
#include "tests/check.h"

namespace argosy::testing {

inline const Format kFormats[] = {Format::f32, Format::f16, Format::bf16, Format::q8, Format::q4};

// Around the vectors (8, 16), the panel (16) and the group (32).
inline const int64_t kSizes[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70};

inline std::vector<float> normal(int64_t n, unsigned seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = distribution(generator);
  return values;
}

inline std::vector<const KernelTable*> all_tables() {
  std::vector<const KernelTable*> tables;
  for (const std::string& name : instruction_sets()) tables.push_back(&kernel_table(name));
  return tables;
}
inline const KernelTable& plain() { return kernel_table("plain"); }

// Exactly the bytes of a matrix, `misalign` after an aligned address, so that a sanitizer sees a read beyond.
struct Weights {
  Weights(Format format, const std::vector<float>& values, int64_t rows, int64_t cols, int64_t misalign = 0)
      : bytes(new uint8_t[size_t(matrix_bytes(format, rows, cols) + misalign)]),
        view{format, bytes.get() + misalign, rows, cols} {
    quantize(nullptr, format, values.data(), rows, cols, bytes.get() + misalign);
  }
  std::unique_ptr<uint8_t[]> bytes;
  MatrixView view;
};

// The activations a format wants, and how far apart they are.
struct Inputs {
  Inputs(const KernelTable& table, Format format, const std::vector<float>& x, int64_t cols,
         int64_t num_tokens) {
    stride = is_quantized(format) ? activation_bytes(cols) : cols * 4;
    bytes.resize(size_t(stride * num_tokens));
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (is_quantized(format)) {
        table.quantize_activations(x.data() + t * cols, cols, 0, num_groups(cols), bytes.data() + t * stride);
      } else if (cols > 0) {
        std::memcpy(bytes.data() + t * stride, x.data() + t * cols, size_t(cols) * 4);
      }
    }
  }
  std::vector<uint8_t> bytes;
  int64_t stride;
};

inline MatmulArgs matmul_args(const MatrixView& w, const Inputs& x, int64_t num_tokens, float* y) {
  MatmulArgs args = {};
  args.weights = w.data;
  args.cols = w.cols;
  args.row_end = w.rows;
  args.x = x.bytes.data();
  args.x_stride = x.stride;
  args.y = y;
  args.y_stride = w.rows;
  args.num_tokens = num_tokens;
  return args;
}

inline std::vector<float> multiply(const KernelTable& table, const MatrixView& w, const std::vector<float>& x,
                                   int64_t num_tokens) {
  std::vector<float> y(size_t(w.rows * num_tokens), NAN);
  const Inputs inputs(table, w.format, x, w.cols, num_tokens);
  table.matmul[int(w.format)](matmul_args(w, inputs, num_tokens, y.data()));
  return y;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline bool near(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(double(a[i]) - double(b[i])) <= tolerance * (1.0 + std::fabs(double(b[i])))))
      return false;
  }
  return a.size() == b.size();
}

}  // namespace argosy::testing
