// swiglu_args.h: the activation of a feed-forward network.
#pragma once

#include <cstdint>

namespace argosy {

// The activation of a feed-forward network, between its first two products and its last.
//   silu     silu(gate) * up, where silu(x) = x / (1 + e^-x)  (Shazeer, arXiv:2002.05202)
//   clamped  g * sigmoid(alpha * g) * (u + 1), where g is gate, at most `limit`, and u is up, from -limit to
//            limit  (gpt-oss)
//   gelu_tanh  gelu(gate) * up, where gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
//            (arXiv:1606.08415)
//   silu_limited  silu(g) * u, where g is gate, at most `limit`, and u is up, from -limit to limit
//            (DeepSeek-V4)
//   silu_capped   min(silu(gate), limit) * u, where u is up, from -limit to limit  (Step-3.5)
//   relu2    max(up, 0)^2, without a gate (So and others, arXiv:2109.08668)
//   situ     alpha * tanh(gate / alpha) * sigmoid(gate) * limit * tanh(up / limit)  (Kimi-K3,
//   arXiv:2607.24653)
struct Activation {
  enum class Kind { silu, clamped, gelu_tanh, silu_limited, silu_capped, relu2, situ };
  Kind kind = Kind::silu;
  float limit = 0, alpha = 0;

  bool has_gate() const { return kind != Kind::relu2; }
};

// The activation of the output gate of attention heads: 1 / (1 + e^-x) or log(1 + e^x).
enum class GateKind { sigmoid, softplus };

// out[t][i] = activation(gate[t][i] + gate_bias[i], up[t][i] + up_bias[i])
struct ActivateArgs {
  Activation activation;
  const float *gate, *up;            // [num_tokens][n], `stride` floats apart; without a gate, both are up
  const float *gate_bias, *up_bias;  // [n]; nullptr: none
  int64_t stride;
  int64_t num_tokens, n;
  float* out;  // [num_tokens][n]; may be gate or up
  int64_t out_stride;
};

}  // namespace argosy
