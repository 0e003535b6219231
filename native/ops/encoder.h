// encoder.h: the operations of encoders, which turn pictures and sounds into rows for a model.
//
// The results do not depend on the number of threads, nor those of a row on the other rows of x or query,
// except that `linear` may round many rows and not a few.
#pragma once

#include <cstdint>

#include "kernels/encoder_args.h"
#include "kernels/formats.h"
#include "ops/matmul.h"
#include "ops/rows.h"
#include "ops/runtime.h"

namespace argosy {

// out[t][r] is made (`finish`) of sum over c of W[r][c] * x[t][c] + bias[r]; bias may be nullptr. out and x
// must not overlap.
// Unless `exact`, products of bfloat16 weights with kFewestRounded tokens or more round x to bfloat16 if the
// CPU multiplies that faster (docs/decisions/0031).
inline constexpr int64_t kFewestRounded = 16;
void linear(Runtime& runtime, const MatrixView& matrix, Rows<const float> x, int64_t num_tokens,
            const float* bias, bool exact, Finish finish, Rows<float> out);

// out[n] = (x[n] - mean) / sqrt(variance + eps) * weight + bias; bias may be nullptr; out may be x.
void layer_norm(Runtime& runtime, const float* x, const float* weight, const float* bias, float eps,
                int64_t rows, int64_t cols, float* out);

// In place, on x [rows][cols].
void gelu(Runtime& runtime, Gelu kind, int64_t rows, int64_t cols, float* x);

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

// Keys and values that are rounded to bfloat16 once, for many queries (kernels/attend_bf16.h).
struct RoundedKeys {
  int64_t num_keys, num_kv_heads, dim;

  int64_t keys_bytes() const {
    return num_keys * dim * 2;
  }  // one KV head's keys, which come before its values
  int64_t head_bytes() const { return keys_bytes() + round_up(num_keys, kRoundedKeys) * dim * 2; }
  int64_t bytes() const { return num_kv_heads * head_bytes(); }
};

// For CPUs whose kernels round (Runtime::rounds). `rounded` has keys.bytes().
void round_keys(Runtime& runtime, const RoundedKeys& keys, Rows<const float> key, Rows<const float> value,
                uint8_t* rounded);

// `attend` with queries, keys, weights and values rounded to bfloat16 (docs/decisions/0031). out may be
// query.
void attend_rounded(Runtime& runtime, Rows<const float> query, int64_t num_queries, int64_t num_heads,
                    const RoundedKeys& keys, const uint8_t* rounded, float scale, Rows<float> out);

}  // namespace argosy
