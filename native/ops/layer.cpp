#include "ops/layer.h"

#include <algorithm>

#include "kernels/route_args.h"

namespace argosy {

void rms_norm(Runtime& runtime, const float* x, const float* weight, float eps, int64_t rows, int64_t cols,
              float* out, int64_t num_weights) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      table.rms_norm(x + row * cols, weight + row % num_weights * cols, cols, eps, out + row * cols);
  });
}

void rope(Runtime& runtime, Rows<float> x, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
          const float* cosine, const float* sine, int64_t num_pairs, bool is_interleaved) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, num_heads * head_dim, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      table.rope(x.data + t * x.stride, num_heads, head_dim, cosine + t * num_pairs, sine + t * num_pairs,
                 num_pairs, is_interleaved);
    }
  });
}

int64_t route_scratch_bytes(int64_t num_experts, int num_threads) {
  return num_threads * route_scratch_floats(num_experts) * 4;
}

void route(Runtime& runtime, const RouteRule& rule, const float* logits, int64_t num_tokens,
           int64_t num_experts, int32_t* ids, float* weights, const uint8_t* experts_of,
           const int32_t* token_ids) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t floats = route_scratch_floats(num_experts);
  float* scratch =
      reinterpret_cast<float*>(runtime.scratch(route_scratch_bytes(num_experts, runtime.num_threads())));
  runtime.parallel_for(num_tokens, num_experts * (rule.k + 4), [&](int64_t begin, int64_t end, int worker) {
    for (int64_t t = begin; t < end; ++t) {
      const bool is_media = token_ids != nullptr && token_ids[t] < 0;
      RouteRule own = rule;
      if (is_media && rule.media_bias != nullptr) own.choice_bias = rule.media_bias;
      table.route({
          .rule = own,
          .logits = logits + t * num_experts,
          .num_experts = num_experts,
          .given = experts_of != nullptr && !is_media ? experts_of + 4 * rule.k * token_ids[t] : nullptr,
          .ids = ids + t * rule.k,
          .weights = weights + t * rule.k,
          .scratch = scratch + worker * floats,
      });
    }
  });
}

void combine(Runtime& runtime, const float* expert_out, const float* weights, int64_t num_tokens, int64_t k,
             int64_t hidden, float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, k * hidden, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      table.combine(expert_out + t * k * hidden, weights + t * k, k, hidden, out + t * hidden);
    }
  });
}

void add_sigmoid_gated(Runtime& runtime, const float* x, const float* gate_logit, int64_t num_tokens,
                       int64_t hidden, float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, hidden, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      table.add_sigmoid_gated(x + t * hidden, gate_logit[t], hidden, out + t * hidden);
    }
  });
}

void soft_cap(Runtime& runtime, float cap, int64_t n, float* x) {
  constexpr int64_t kBlock = 1024;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for((n + kBlock - 1) / kBlock, 16 * kBlock, [&](int64_t begin, int64_t end, int) {
    table.soft_cap(cap, std::min(end * kBlock, n) - begin * kBlock, x + begin * kBlock);
  });
}

void mul_gate(Runtime& runtime, GateKind kind, const float* gate, int64_t gate_stride, int64_t gate_step,
              int64_t rows, int64_t cols, float* x) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, 16 * cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      table.mul_gate(kind, gate + row * gate_stride, gate_step, cols, x + row * cols);
    }
  });
}

void add_rows(Runtime& runtime, const float* x, int64_t x_stride, int64_t rows, int64_t cols, float* out) {
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = x + row * x_stride;
      float* to = out + row * cols;
      for (int64_t i = 0; i < cols; ++i) to[i] += from[i];
    }
  });
}

void add_bias(Runtime& runtime, const float* bias, int64_t rows, int64_t cols, float* out) {
  if (bias != nullptr) add_rows(runtime, bias, 0, rows, cols, out);
}

void cut_off(Runtime& runtime, float limit, int64_t rows, int64_t cols, float* out) {
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
    for (float* x = out + begin * cols; x < out + end * cols; ++x) {
      *x = *x > limit ? limit : *x < -limit ? -limit : *x;
    }
  });
}

void multiply_rows(Runtime& runtime, float factor, int64_t rows, int64_t cols, float* out) {
  if (factor == 1) return;
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
    for (float* x = out + begin * cols; x < out + end * cols; ++x) *x *= factor;
  });
}

void copy_heads(Runtime& runtime, const float* x, int64_t stride, int64_t rows, int64_t cols, float* out) {
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) std::copy_n(x + row * stride, cols, out + row * cols);
  });
}

}  // namespace argosy
