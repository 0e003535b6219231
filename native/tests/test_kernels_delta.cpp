// Recurrent layers: equal to the reference, and the same for a token whatever the other tokens in the call.
// Memory has exactly the necessary size, so that a sanitizer detects accesses beyond it.

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernels/causal_conv_args.h"
#include "kernels/gated_delta_args.h"
#include "kernels/mamba_args.h"
#include "ops/gated_delta.h"
#include "ops/layer.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

using Update = DeltaRuleArgs::Update;

constexpr int64_t kTokens = 5;

void output_gates_meet_the_reference() {
  for (const KernelTable* table : all_tables()) {
    for (const int64_t n : kSizes) {
      std::vector<float> gate = normal(n, 1, 6.0f);
      if (n > 0) gate[0] = n % 2 ? 0.0f : -12.0f;
      for (const GateKind kind : {GateKind::sigmoid, GateKind::softplus}) {
        for (const int64_t step : {0, 1}) {
          const std::vector<float> x = normal(n, 2);
          std::vector<float> expected, found = x;
          for (int64_t i = 0; i < n; ++i) {
            const double by = double(gate[size_t(step * i)]);
            const double factor =
                kind == GateKind::softplus ? std::log1p(std::exp(by)) : 1 / (1 + std::exp(-by));
            expected.push_back(float(factor * double(x[size_t(i)])));
          }
          table->mul_gate(kind, gate.data(), step, n, found.data());
          for (int64_t i = 0; i < n; ++i)
            CHECK(std::fabs(found[size_t(i)] - expected[size_t(i)]) <=
                  1e-6f * std::fabs(expected[size_t(i)]));
        }
      }
    }
    std::vector<float> ends = {INFINITY, -INFINITY, NAN, 100.0f}, ones(4, 1.0f);
    table->mul_gate(GateKind::softplus, ends.data(), 1, 4, ones.data());
    CHECK(ones[0] == INFINITY && ones[1] == 0.0f && std::isnan(ones[2]) && ones[3] == 100.0f);
  }
}

struct Convolved {
  std::vector<float> out, window;
};

Convolved convolve(const KernelTable& table, int64_t channels, int64_t width, float length, bool has_gates,
                   bool has_bias, int64_t tokens_a_call) {
  const std::vector<float> weights = normal(width * channels, 3), bias = normal(channels, 12);
  const std::vector<float> in = normal(kTokens * channels, 13), gate = normal(kTokens * channels, 14);
  const std::vector<float> x = normal(kTokens * channels, 4);
  Convolved result = {std::vector<float>(x.size(), NAN), normal((width - 1) * channels, 5)};
  for (int64_t t = 0; t < kTokens; t += tokens_a_call) {
    table.causal_conv({
        .x = x.data() + t * channels,
        .x_stride = channels,
        .in_gate = has_gates ? in.data() + t * channels : nullptr,
        .out_gate = has_gates ? gate.data() + t * channels : nullptr,
        .weights = weights.data(),
        .bias = has_bias ? bias.data() : nullptr,
        .window = result.window.data(),
        .out = result.out.data() + t * channels,
        .out_stride = channels,
        .stride = channels,
        .width = width,
        .channels = channels,
        .num_tokens = std::min(tokens_a_call, kTokens - t),
        .length = length,
        .eps = 1e-6f,
    });
  }
  return result;
}

void convolutions_meet_the_reference_and_go_on_where_they_stopped() {
  for (const KernelTable* table : all_tables()) {
    for (const int64_t channels : kSizes) {
      for (const int64_t width : {1, 2, 4, 5}) {
        for (const int kind : {0, 1, 2, 3, 4}) {
          const float length = kind == 1 ? 0.25f : 0.0f;
          const bool has_gates = kind >= 3, has_bias = kind == 2 || kind == 4;
          const auto run = [&](const KernelTable& kernels, int64_t tokens) {
            return convolve(kernels, channels, width, length, has_gates, has_bias, tokens);
          };
          const Convolved expected = run(plain(), kTokens), found = run(*table, kTokens);
          CHECK(near(found.out, expected.out, 1e-5));
          CHECK(found.window == expected.window);
          for (const int64_t tokens : {1, 2}) {
            const Convolved parts = run(*table, tokens);
            CHECK(parts.out == found.out);
            CHECK(parts.window == found.window);
          }
        }
      }
    }
  }
}

struct Gates {
  std::vector<float> a, b;
};

Gates channel_gates(const KernelTable& table, int64_t key_dim, float floor, int64_t tokens_a_call) {
  const std::vector<float> dt_bias = normal(key_dim, 12);
  Gates gates = {normal(kTokens * key_dim, 13, 20.0f), normal(kTokens, 14, 4.0f)};
  for (int64_t t = 0; t < kTokens; t += tokens_a_call) {
    table.channel_gates({
        .a = gates.a.data() + t * key_dim,
        .b = gates.b.data() + t,
        .a_stride = key_dim,
        .b_stride = 1,
        .dt_bias = dt_bias.data(),
        .rate = -0.2f,
        .floor = floor,
        .num_tokens = std::min(tokens_a_call, kTokens - t),
        .key_dim = key_dim,
    });
  }
  return gates;
}

void channel_gates_meet_the_reference_and_the_formula() {
  for (const KernelTable* table : all_tables()) {
    for (const int64_t key_dim : kSizes) {
      for (const float floor : {0.0f, -5.0f}) {
        const Gates found = channel_gates(*table, key_dim, floor, kTokens);
        const Gates expected = channel_gates(plain(), key_dim, floor, kTokens);
        CHECK(near(found.a, expected.a, 2e-6));
        CHECK(near(found.b, expected.b, 1e-6));
        CHECK(channel_gates(*table, key_dim, floor, 2).a == found.a);
        const std::vector<float> a = normal(kTokens * key_dim, 13, 20.0f), dt_bias = normal(key_dim, 12);
        for (int64_t i = 0; i < kTokens * key_dim; ++i) {
          const double x = double(a[size_t(i)]) + double(dt_bias[size_t(i % key_dim)]);
          const double log = floor < 0 ? floor / (1 + std::exp(-0.2 * x)) : -0.2 * std::log1p(std::exp(x));
          CHECK(std::abs(found.a[size_t(i)] - std::exp(log)) < 2e-6);
        }
      }
    }
  }
}

struct Recalled {
  std::vector<float> out, state;
};

struct Rule {
  Update update = Update::delta;
  bool is_sigmoid = false, has_norm = true;
};

Recalled recall(const KernelTable& table, const Rule& rule, int64_t key_dim, int64_t value_dim,
                int64_t tokens_a_call) {
  const std::vector<float> q = normal(kTokens * key_dim, 6, 0.3f), k = normal(kTokens * key_dim, 7, 0.3f);
  const std::vector<float> v = normal(kTokens * value_dim, 8), z = normal(kTokens * value_dim, 9);
  const std::vector<float> norm = normal(value_dim, 10);
  std::vector<float> decay = {0.9f, 0.0f, 1.0f, 0.5f, 0.7f}, beta = {0.3f, 1.0f, 0.0f, 0.6f, 0.2f};
  const int64_t num_decays = rule.update == Update::channel_delta ? key_dim : 1;
  if (num_decays > 1) {
    decay = normal(kTokens * key_dim, 15);
    for (float& value : decay) value = 1.0f / (1.0f + value * value);
  }
  // q, k and v have the same stride, as in the projections.
  const int64_t stride = 2 * key_dim + value_dim;
  std::vector<float> qkv(size_t(kTokens * stride));
  for (int64_t t = 0; t < kTokens; ++t) {
    float* to = qkv.data() + t * stride;
    to = std::copy_n(q.data() + t * key_dim, key_dim, to);
    to = std::copy_n(k.data() + t * key_dim, key_dim, to);
    std::copy_n(v.data() + t * value_dim, value_dim, to);
  }
  Recalled result = {std::vector<float>(size_t(kTokens * value_dim), NAN), normal(key_dim * value_dim, 11)};
  for (int64_t t = 0; t < kTokens; t += tokens_a_call) {
    table.delta_rule({
        .update = rule.update,
        .q = qkv.data() + t * stride,
        .k = qkv.data() + t * stride + key_dim,
        .v = qkv.data() + t * stride + 2 * key_dim,
        .stride = stride,
        .z = z.data() + t * value_dim,
        .z_stride = value_dim,
        .is_sigmoid = rule.is_sigmoid,
        .decay = decay.data() + t * num_decays,
        .decay_stride = num_decays,
        .beta = beta.data() + t,
        .beta_stride = 1,
        .state = result.state.data(),
        .out = result.out.data() + t * value_dim,
        .out_stride = value_dim,
        .norm = rule.has_norm ? norm.data() : nullptr,
        .eps = 1e-6f,
        .num_tokens = std::min(tokens_a_call, kTokens - t),
        .key_dim = key_dim,
        .value_dim = value_dim,
    });
  }
  return result;
}

void the_rule_meets_the_reference_and_goes_on_where_it_stopped() {
  const Rule rules[] = {
      {}, {Update::channel_delta, true}, {Update::add, false, false}, {Update::delta, true}};
  for (const KernelTable* table : all_tables()) {
    for (const Rule& rule : rules) {
      for (const int64_t key_dim : {1, 16, 33}) {
        for (const int64_t value_dim : kSizes) {
          if (value_dim == 0) continue;
          const Recalled expected = recall(plain(), rule, key_dim, value_dim, kTokens);
          const Recalled found = recall(*table, rule, key_dim, value_dim, kTokens);
          CHECK(near(found.state, expected.state, 1e-5));
          CHECK(near(found.out, expected.out, 1e-4));
          for (const int64_t tokens : {1, 2}) {
            const Recalled parts = recall(*table, rule, key_dim, value_dim, tokens);
            CHECK(parts.out == found.out);
            CHECK(parts.state == found.state);
          }
        }
      }
    }
  }
}

void equal_decays_of_all_key_dimensions_are_one_decay() {
  const std::vector<float> q = normal(16, 6), k = normal(16, 7), v = normal(9, 8), decay(16, 0.6f);
  const float beta = 0.3f;
  std::vector<float> out[2], state[2];
  for (const KernelTable* table : all_tables()) {
    for (const Update update : {Update::delta, Update::channel_delta}) {
      const size_t i = update == Update::delta ? 0 : 1;
      out[i].assign(9, NAN);
      state[i] = normal(16 * 9, 11);
      table->delta_rule({
          .update = update,
          .q = q.data(),
          .k = k.data(),
          .v = v.data(),
          .stride = 0,
          .z = nullptr,
          .z_stride = 0,
          .decay = decay.data(),
          .decay_stride = 0,
          .beta = &beta,
          .beta_stride = 0,
          .state = state[i].data(),
          .out = out[i].data(),
          .out_stride = 0,
          .norm = nullptr,
          .eps = 0.0f,
          .num_tokens = 1,
          .key_dim = 16,
          .value_dim = 9,
      });
    }
    CHECK(near(out[1], out[0], 1e-5));
    CHECK(near(state[1], state[0], 1e-5));
  }
}

void steps_are_clamped_and_stay_finite() {
  for (const KernelTable* table : all_tables()) {
    std::vector<float> dt = {-200.0f, 0.0f, 1.0f, 50.0f, 3e4f, 0.5f}, decay(6, NAN);
    const std::vector<float> rate = {-1, -2, -1}, bias = {0, 0, 0.5f};
    table->mamba_steps({
        .dt = dt.data(),
        .dt_stride = 3,
        .decay = decay.data(),
        .decay_stride = 3,
        .rate = rate.data(),
        .dt_bias = bias.data(),
        .least_dt = 0.25f,
        .most_dt = 40.0f,
        .num_tokens = 2,
        .num_heads = 3,
    });
    // Between the bounds: softplus of 0, 1.5 and 1.
    CHECK(near(dt, {0.25f, 0.69314718f, 1.70141328f, 40.0f, 40.0f, 1.31326169f}, 1e-6));
    CHECK(near(decay, {0.77880078f, 0.25f, 0.18242545f, 0.0f, 0.0f, 0.26894142f}, 1e-6));
  }
}

void a_state_is_as_large_as_it_says_and_slots_do_not_meet() {
  const DeltaShape shape = {2, 4, 3, 5, 4};
  CHECK_EQUAL(shape.state().window_floats, 3 * (2 * 6 + 20));
  CHECK_EQUAL(shape.state().matrix_floats, 4 * 3 * 5);
  // Layers of different sizes: a convolution alone, matrices alone, and both.
  RecurrentState state(3, {{7, 0}, shape.state(), {0, 11}});
  CHECK_EQUAL(state.num_layers(), 3);
  CHECK_EQUAL(state.slot_floats(), 7 + (3 * (2 * 6 + 20) + 4 * 3 * 5) + 11);
  CHECK_EQUAL(state.nbytes(), 3 * 4 * state.slot_floats());
  for (int64_t slot = 0; slot < 3; ++slot) {
    CHECK(state.matrices(slot, 0) == state.window(slot, 1));
    CHECK(state.matrices(slot, 1) == state.window(slot, 1) + shape.state().window_floats);
    CHECK(state.window(slot, 2) == state.matrices(slot, 1) + shape.state().matrix_floats);
    CHECK(state.window(slot, 2) == state.matrices(slot, 2));
    CHECK(slot == 0 || state.window(slot, 0) == state.matrices(slot - 1, 2) + 11);
    state.copy_in(slot, std::vector<float>(size_t(state.slot_floats()), float(slot + 1)).data(), slot);
  }
  for (int64_t slot = 0; slot < 3; ++slot) {
    std::vector<float> found(static_cast<size_t>(state.slot_floats()));
    state.copy_out(slot, found.data());
    CHECK(found == std::vector<float>(found.size(), float(slot + 1)));
    CHECK_EQUAL(state.position(slot), slot);
  }
  constexpr int64_t kMany = int64_t{1} << 60;
  using Layers = std::vector<StateShape>;
  CHECK_THROWS(std::invalid_argument, RecurrentState(0, {{7, 0}}));
  CHECK_THROWS(std::invalid_argument, RecurrentState(1, {}));
  CHECK_THROWS(std::invalid_argument, RecurrentState(1, {{0, 0}}));
  CHECK_THROWS(std::invalid_argument, RecurrentState(1, {{7, -1}}));
  CHECK_THROWS(std::invalid_argument, RecurrentState::bytes(int64_t{1} << 58, {{7, 0}}));
  CHECK_THROWS(std::invalid_argument, RecurrentState::bytes(1, Layers(8, {kMany / 2, kMany / 4})));
  CHECK_THROWS(std::invalid_argument, RecurrentState::bytes(1, {{kMany, kMany}}));
  CHECK_THROWS(std::invalid_argument, (DeltaShape{1, 1, 1, 1, 0}.state()));
  CHECK_THROWS(std::invalid_argument,
               (DeltaShape{int64_t{1} << 30, int64_t{1} << 30, 1 << 30, 1 << 30, 4}.state()));
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  output_gates_meet_the_reference();
  convolutions_meet_the_reference_and_go_on_where_they_stopped();
  channel_gates_meet_the_reference_and_the_formula();
  the_rule_meets_the_reference_and_goes_on_where_it_stopped();
  equal_decays_of_all_key_dimensions_are_one_decay();
  steps_are_clamped_and_stay_finite();
  a_state_is_as_large_as_it_says_and_slots_do_not_meet();
  return check_result();
}
