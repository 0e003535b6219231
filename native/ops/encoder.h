// encoder.h: the operations of encoders, which turn pictures and sounds into rows for a model.
//
// The results do not depend on the number of threads, nor those of a row on the other rows of x or query,
// except that `linear` may round many rows and not a few.
#pragma once

#include <cstdint>

#include "kernels/kernel_table.h"
#include "ops/matmul.h"
#include "ops/runtime.h"

namespace argosy {

// Rows whose first elements are `stride` floats apart.
template <class Float>
struct Rows {
  Float* data;
  int64_t stride;
};

// out[t][r] = sum over c of W[r][c] * x[t][c] + bias[r]; bias may be nullptr. out and x must not overlap.
// Unless `exact`, products of bfloat16 weights with kFewestRounded tokens or more round x to bfloat16 if the
// CPU multiplies that faster (docs/decisions/0031).
inline constexpr int64_t kFewestRounded = 16;
void linear(Runtime& runtime, const MatrixView& matrix, Rows<const float> x, int64_t num_tokens,
            const float* bias, bool exact, Rows<float> out);

// out[n] = (x[n] - mean) / sqrt(variance + eps) * weight + bias; bias may be nullptr; out may be x.
void layer_norm(Runtime& runtime, const float* x, const float* weight, const float* bias, float eps,
                int64_t rows, int64_t cols, float* out);

// In place, on x [rows][cols].
void gelu(Runtime& runtime, Gelu kind, int64_t rows, int64_t cols, float* x);
void silu(Runtime& runtime, int64_t rows, int64_t cols, float* x);

// A row of query and out has num_heads * dim floats, a row of key and value num_kv_heads * dim.
struct AttendBatch {
  Rows<const float> query, key, value;
  int64_t num_queries, num_keys;
  int64_t num_heads, num_kv_heads, dim;
  float scale;
};

// out[t][h] = sum over s of softmax over s (scale * query[t][h] . key[s][k]) * value[s][k], where k is the KV
// head that head h shares. Every query sees every key, and there is at least one. out may be query.
void attend(Runtime& runtime, const AttendBatch& batch, Rows<float> out);

}  // namespace argosy
