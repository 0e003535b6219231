// swiglu.h: the activation between the products of a feed-forward network, with its biases (swiglu_args.h,
// Activation).
//
//   gate, up, out  float32 [tokens][n]; out may be gate or up.
//
// A gate is only limited from above, and NaN stays NaN in both gate and up.
//
//   mul_gate       x *= 1 / (1 + e^-gate) or log(1 + e^gate): the output gate of attention heads
//   soft_cap       x = cap * tanh(x / cap), computed as cap * (1 - 2 / (1 + e^(2 x / cap)));
//                  its error is a few units in the last place of cap
#pragma once

#include <math.h>

#include "kernels/elementwise.h"
#include "kernels/swiglu_args.h"

namespace argosy {
namespace {

#if !ARGOSY_VECTOR  // the reference

inline float activated(const Activation& activation, float gate, float up) {
  if (activation.kind == Activation::Kind::silu) return gate / (1.0f + expf(-gate)) * up;
  if (activation.kind == Activation::Kind::gelu_tanh) return gelu_tanh(gate) * up;
  if (activation.kind == Activation::Kind::relu2) return up < 0.0f ? 0.0f : up * up;
  const float limit = activation.limit;
  if (activation.kind == Activation::Kind::situ)
    return soft_limit(activation.alpha, gate) * sigmoid(gate) * soft_limit(limit, up);
  up = up > limit ? limit : up < -limit ? -limit : up;
  if (activation.kind == Activation::Kind::silu_capped) {
    const float value = gate * sigmoid(gate);
    return (value > limit ? limit : value) * up;
  }
  gate = gate > limit ? limit : gate;
  if (activation.kind == Activation::Kind::silu_limited) return gate * sigmoid(gate) * up;
  return gate * sigmoid(activation.alpha * gate) * (up + 1.0f);
}

void activate(const ActivateArgs& a) {
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    for (int64_t i = 0; i < a.n; ++i) {
      float gate = a.gate[token * a.stride + i], up = a.up[token * a.stride + i];
      if (a.gate_bias != nullptr) gate += a.gate_bias[i];
      if (a.up_bias != nullptr) up += a.up_bias[i];
      a.out[token * a.out_stride + i] = activated(a.activation, gate, up);
    }
  }
}

void mul_gate(GateKind kind, const float* gate, int64_t gate_step, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i, gate += gate_step)
    x[i] *= kind == GateKind::softplus ? softplus(*gate) : sigmoid(*gate);
}

void soft_cap(float cap, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = cap * (1.0f - 2.0f / (1.0f + expf(2.0f * (x[i] / cap))));
}

#else

struct SiluActivation {
  Vec operator()(Vec gate, Vec up) const { return mul(silu(gate), up); }
};

// The bound comes first: a comparison with NaN returns the second operand.
struct Limits {
  Vec most, least;

  explicit Limits(float limit) : most(broadcast(limit)), least(broadcast(-limit)) {}
  Vec from_above(Vec x) const { return min_or_second(most, x); }
  Vec operator()(Vec x) const { return max_or_second(least, from_above(x)); }
};

struct ClampedActivation {
  Limits limit;
  Vec minus_alpha;

  Vec operator()(Vec gate, Vec up) const {
    const Vec one = broadcast(1.0f);
    gate = limit.from_above(gate);
    return mul(div(gate, add(one, exp(mul(minus_alpha, gate)))), add(limit(up), one));
  }
};

struct SiluLimitedActivation {
  Limits limit;
  Vec operator()(Vec gate, Vec up) const { return mul(silu(limit.from_above(gate)), limit(up)); }
};

struct SiluCappedActivation {
  Limits limit;
  Vec operator()(Vec gate, Vec up) const { return mul(limit.from_above(silu(gate)), limit(up)); }
};

struct SquaredReluActivation {
  Vec operator()(Vec, Vec up) const {
    const Vec positive = max_or_second(zeros(), up);
    return mul(positive, positive);
  }
};

struct SituActivation {
  Vec gate_limit, up_limit;
  Vec operator()(Vec gate, Vec up) const {
    return mul(gated(soft_limit(gate_limit, gate), sub(zeros(), gate)), soft_limit(up_limit, up));
  }
};

struct GeluTanhActivation {
  Vec operator()(Vec gate, Vec up) const { return mul(gelu_tanh(gate), up); }
};

template <class Activated>
void activate_rows(const ActivateArgs& a, const Activated& activated) {
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const float* gates = a.gate + token * a.stride;
    const float* ups = a.up + token * a.stride;
    float* out = a.out + token * a.out_stride;
    for (int64_t i = 0; i < a.n; i += kLanes) {
      const int64_t here = a.n - i < kLanes ? a.n - i : kLanes;
      Vec gate = load(gates + i, here), up = load(ups + i, here);
      if (a.gate_bias != nullptr) gate = add(gate, load(a.gate_bias + i, here));
      if (a.up_bias != nullptr) up = add(up, load(a.up_bias + i, here));
      store(out + i, activated(gate, up), here);
    }
  }
}

void activate(const ActivateArgs& a) {
  const Activation& activation = a.activation;
  const Limits limit(activation.limit);
  switch (activation.kind) {
    case Activation::Kind::silu:
      return activate_rows(a, SiluActivation{});
    case Activation::Kind::gelu_tanh:
      return activate_rows(a, GeluTanhActivation{});
    case Activation::Kind::silu_limited:
      return activate_rows(a, SiluLimitedActivation{limit});
    case Activation::Kind::silu_capped:
      return activate_rows(a, SiluCappedActivation{limit});
    case Activation::Kind::relu2:
      return activate_rows(a, SquaredReluActivation{});
    case Activation::Kind::situ:
      return activate_rows(a, SituActivation{broadcast(activation.alpha), limit.most});
    case Activation::Kind::clamped:
      return activate_rows(a, ClampedActivation{limit, broadcast(-activation.alpha)});
  }
}

void mul_gate(GateKind kind, const float* gate, int64_t gate_step, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t here = n - i < kLanes ? n - i : kLanes;
    const Vec by = gate_step == 0 ? broadcast(*gate) : load(gate + i, here), value = load(x + i, here);
    store(x + i, kind == GateKind::softplus ? mul(value, softplus(by)) : gated(value, sub(zeros(), by)),
          here);
  }
}

void soft_cap(float cap, int64_t n, float* x) {
  const Vec one = broadcast(1.0f), two = broadcast(2.0f), most = broadcast(cap);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t here = n - i < kLanes ? n - i : kLanes;
    const Vec power = exp(mul(two, div(load(x + i, here), most)));
    store(x + i, mul(most, sub(one, div(two, add(one, power)))), here);
  }
}

#endif

}  // namespace
}  // namespace argosy
