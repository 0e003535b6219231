// layer.h: the small operations between the products of a layer. Each processes a whole batch.
#pragma once

#include <cstdint>

#include "kernels/route_args.h"
#include "kernels/swiglu_args.h"
#include "ops/rows.h"
#include "ops/runtime.h"

namespace argosy {

// out[n] = x[n] / sqrt(mean(x[n]^2) + eps) * weight; out may be x. With `num_weights`, row n takes weight
// n % num_weights of [num_weights][cols].
void rms_norm(Runtime& runtime, const float* x, const float* weight, float eps, int64_t rows, int64_t cols,
              float* out, int64_t num_weights = 1);

// Rotates x, num_tokens rows of [num_heads][head_dim] in place; cosine and sine are
// [num_tokens][num_pairs].
void rope(Runtime& runtime, Rows<float> x, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
          const float* cosine, const float* sine, int64_t num_pairs, bool is_interleaved);

// Computes ids and weights [num_tokens][k] from logits [num_tokens][num_experts]. A token of media has a
// negative id. With experts_of, f32 [vocabulary][k] of any alignment, the others have the experts of their
// row.
void route(Runtime& runtime, const RouteRule& rule, const float* logits, int64_t num_tokens,
           int64_t num_experts, int32_t* ids, float* weights, const uint8_t* experts_of = nullptr,
           const int32_t* token_ids = nullptr);

// The runtime scratch that route takes.
int64_t route_scratch_bytes(int64_t num_experts, int num_threads);

// out[t] += sum over j of weights[t][j] * expert_out[t * k + j]
void combine(Runtime& runtime, const float* expert_out, const float* weights, int64_t num_tokens, int64_t k,
             int64_t hidden, float* out);

// out[t] += sigmoid(gate_logit[t]) * x[t]
void add_sigmoid_gated(Runtime& runtime, const float* x, const float* gate_logit, int64_t num_tokens,
                       int64_t hidden, float* out);

// x[n] = cap * tanh(x[n] / cap)
void soft_cap(Runtime& runtime, float cap, int64_t n, float* x);

// Multiplies row n of x by the activation of row n of `gate`, elementwise, or of its first element if
// gate_step is 0. Rows of gate are gate_stride floats apart.
void mul_gate(Runtime& runtime, GateKind kind, const float* gate, int64_t gate_stride, int64_t gate_step,
              int64_t rows, int64_t cols, float* x);

// out[n] += x[n]; with x_stride 0, adds x[0] to every row.
void add_rows(Runtime& runtime, const float* x, int64_t x_stride, int64_t rows, int64_t cols, float* out);

// Adds [cols] to every row; nullptr: nothing.
void add_bias(Runtime& runtime, const float* bias, int64_t rows, int64_t cols, float* out);

// Clamps to [-limit, limit]; NaN stays NaN.
void cut_off(Runtime& runtime, float limit, int64_t rows, int64_t cols, float* out);

void multiply_rows(Runtime& runtime, float factor, int64_t rows, int64_t cols, float* out);

// Copies the first `cols` of every `stride` floats.
void copy_heads(Runtime& runtime, const float* x, int64_t stride, int64_t rows, int64_t cols, float* out);

}  // namespace argosy
