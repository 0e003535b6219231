// gated_delta.h: linear attention of one sequence over a state S, token by token: the gated delta net (Yang
// et al., arXiv:2412.06464), Kimi Delta Attention (arXiv:2510.26692), lightning attention (arXiv:2401.04658).
//
//   delta_gates    a, b  ->  decay = e^(rate softplus(a + dt_bias)),  beta = 1 / (1 + e^-b)
//   channel_gates  the same for a vector a; with a floor, decay = e^(floor / (1 + e^(rate (a + dt_bias))))
//   delta_rule     q, k, v, z  ->  S = decay S + k (beta (v - decay S^T k))^T
//                                  out = rms_norm(S^T q) * silu(z)
//
// With a decay for each key dimension, decay S is diag(decay) S. Lightning attention subtracts nothing from
// v.
//
// Promise: the operations of a token and their order do not depend on the other tokens in the call. Sums over
// key dimensions ascend, one per column of S. Columns are independent, so 32 at a time go through all tokens
// before the next 32: that part of S stays in the first-level cache.
#pragma once

#include <math.h>

#include "kernels/elementwise.h"
#include "kernels/gated_delta_args.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"

namespace argosy {
namespace {

// Gates are few, and every head differs: one version for all instruction sets.
void delta_gates(const DeltaGatesArgs& args) {
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    float* a = args.a + t * args.a_stride;
    float* b = args.b + t * args.b_stride;
    for (int64_t i = 0; i < args.num_heads; ++i) {
      const float x = a[i] + args.dt_bias[i];
      const float softplus = x > 20.0f ? x : log1pf(expf(x));  // beyond 20 the difference is below rounding
      a[i] = expf(args.rate[i] * softplus);
      b[i] = 1.0f / (1.0f + expf(-b[i]));
    }
  }
}

#if !ARGOSY_VECTOR  // the reference

void channel_gates(const ChannelGatesArgs& args) {
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    float* a = args.a + t * args.a_stride;
    float& b = args.b[t * args.b_stride];
    for (int64_t i = 0; i < args.key_dim; ++i) {
      const float x = a[i] + args.dt_bias[i];
      a[i] = expf(args.floor < 0 ? args.floor * sigmoid(-args.rate * x) : args.rate * softplus(x));
    }
    b = sigmoid(b);
  }
}

void delta_rule(const DeltaRuleArgs& args) {
  const bool subtracts = args.update != DeltaRuleArgs::Update::add;
  const bool is_channel = args.update == DeltaRuleArgs::Update::channel_delta;
  const int64_t keys = args.key_dim, values = args.value_dim;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const float *q = args.q + t * args.stride, *k = args.k + t * args.stride, *v = args.v + t * args.stride;
    const float *decay = args.decay + t * args.decay_stride, beta = args.beta[t * args.beta_stride];
    float* out = args.out + t * args.out_stride;
    for (int64_t j = 0; j < values; ++j) {
      float recalled = 0.0f;
      for (int64_t i = 0; i < keys && subtracts; ++i)
        recalled += args.state[i * values + j] * (is_channel ? decay[i] * k[i] : k[i]);
      const float change = (v[j] - (is_channel ? recalled : decay[0] * recalled)) * beta;
      out[j] = 0.0f;
      for (int64_t i = 0; i < keys; ++i) {
        float& state = args.state[i * values + j];
        state = state * decay[is_channel ? i : 0] + k[i] * change;
        out[j] += state * q[i];
      }
    }
    if (args.norm == nullptr) continue;
    const float* z = args.z + t * args.z_stride;
    rms_norm(out, args.norm, values, args.eps, out);
    for (int64_t j = 0; j < values; ++j) out[j] *= (args.is_sigmoid ? 1.0f : z[j]) / (1.0f + expf(-z[j]));
  }
}

#else

void channel_gates(const ChannelGatesArgs& args) {
  const Vec rate = broadcast(args.rate), floor = broadcast(args.floor);
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    float* a = args.a + t * args.a_stride;
    float* b = args.b + t * args.b_stride;
    for (int64_t i = 0; i < args.key_dim; i += kLanes) {
      const int64_t n = args.key_dim - i < kLanes ? args.key_dim - i : kLanes;
      const Vec x = add(load(a + i, n), load(args.dt_bias + i, n));
      const Vec log = args.floor < 0 ? gated(floor, mul(rate, x)) : mul(rate, softplus(x));
      store(a + i, exp(log), n);
    }
    store(b, gated(broadcast(1.0f), broadcast(-*b)), 1);
  }
}

// Runs all tokens through kVecs vectors of columns, or through one vector of `lanes` columns.
template <DeltaRuleArgs::Update kUpdate, int kVecs, bool kIsPartial>
void delta_columns(const DeltaRuleArgs& args, int64_t begin, int64_t lanes) {
  static_assert(!kIsPartial || kVecs == 1);
  constexpr bool kSubtracts = kUpdate != DeltaRuleArgs::Update::add;
  constexpr bool kIsChannel = kUpdate == DeltaRuleArgs::Update::channel_delta;
  const auto get = [lanes](const float* from, int i) {
    if constexpr (kIsPartial) return load(from, lanes);
    return load(from + i * kLanes);
  };
  const auto put = [lanes](float* to, int i, Vec value) {
    if constexpr (kIsPartial) return store(to, value, lanes);
    store(to + i * kLanes, value);
  };
  const int64_t keys = args.key_dim, values = args.value_dim;
  float* const state = args.state + begin;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const float *q = args.q + t * args.stride, *k = args.k + t * args.stride;
    const float* v = args.v + t * args.stride + begin;
    const float* decays = args.decay + t * args.decay_stride;
    Vec decay = broadcast(decays[0]);
    const Vec beta = broadcast(args.beta[t * args.beta_stride]);
    Vec change[kVecs], out[kVecs];
    for (int i = 0; i < kVecs; ++i) change[i] = zeros();
    for (int64_t row = 0; row < keys && kSubtracts; ++row) {
      const Vec key = broadcast(kIsChannel ? decays[row] * k[row] : k[row]);
      for (int i = 0; i < kVecs; ++i) change[i] = fma(get(state + row * values, i), key, change[i]);
    }
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (!kIsChannel) change[i] = mul(decay, change[i]);
      change[i] = mul(kSubtracts ? sub(get(v, i), change[i]) : get(v, i), beta);
      out[i] = zeros();
    }
    for (int64_t row = 0; row < keys; ++row) {
      const Vec key = broadcast(k[row]), query = broadcast(q[row]);
      if constexpr (kIsChannel) decay = broadcast(decays[row]);
      for (int i = 0; i < kVecs; ++i) {
        const Vec next = fma(key, change[i], mul(get(state + row * values, i), decay));
        put(state + row * values, i, next);
        out[i] = fma(next, query, out[i]);
      }
    }
    for (int i = 0; i < kVecs; ++i) put(args.out + t * args.out_stride + begin, i, out[i]);
  }
}

template <DeltaRuleArgs::Update kUpdate>
void delta_state(const DeltaRuleArgs& args) {
  constexpr int kVecs = int(32 / kLanes);  // with 128 key dimensions, 16 KiB of S
  const int64_t values = args.value_dim;
  int64_t begin = 0;
  for (; begin + kVecs * kLanes <= values; begin += kVecs * kLanes)
    delta_columns<kUpdate, kVecs, false>(args, begin, 0);
  for (; begin + kLanes <= values; begin += kLanes) delta_columns<kUpdate, 1, false>(args, begin, 0);
  if (begin < values) delta_columns<kUpdate, 1, true>(args, begin, values - begin);
}

void delta_rule(const DeltaRuleArgs& args) {
  using Update = DeltaRuleArgs::Update;
  if (args.update == Update::delta) delta_state<Update::delta>(args);
  if (args.update == Update::channel_delta) delta_state<Update::channel_delta>(args);
  if (args.update == Update::add) delta_state<Update::add>(args);
  const int64_t values = args.value_dim;
  for (int64_t t = 0; t < args.num_tokens && args.norm != nullptr; ++t) {
    const float* z = args.z + t * args.z_stride;
    float* out = args.out + t * args.out_stride;
    rms_norm(out, args.norm, values, args.eps, out);
    for (int64_t j = 0; j < values; j += kLanes) {
      const int64_t n = values - j < kLanes ? values - j : kLanes;
      const Vec gate = load(z + j, n), normed = load(out + j, n);
      store(out + j, args.is_sigmoid ? gated(normed, sub(zeros(), gate)) : mul(silu(gate), normed), n);
    }
  }
}

#endif

}  // namespace
}  // namespace argosy
