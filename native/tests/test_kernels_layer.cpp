// The small operations of a layer, and attention: equal to the reference, and the same for a token at any
// place in the batch.

#include <algorithm>

#include "kernels/attention_args.h"
#include "kernels/kv_layer.h"
#include "kernels/latent_args.h"
#include "kernels/route_args.h"
#include "kernels/swiglu_args.h"
#include "ops/attention.h"
#include "ops/latent_attention.h"
#include "ops/layer.h"
#include "ops/swiglu.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

void norms_meet_the_reference() {
  for (const KernelTable* table : all_tables()) {
    for (const int64_t cols : kSizes) {
      if (cols == 0) continue;
      const std::vector<float> x = normal(cols, 1), weight = normal(cols, 2);
      std::vector<float> expected(x.size()), found = x;
      plain().rms_norm(x.data(), weight.data(), cols, 1e-6f, expected.data());
      table->rms_norm(found.data(), weight.data(), cols, 1e-6f, found.data());
      CHECK(near(found, expected, 2e-6));
    }
  }
}

std::vector<float> activated(const KernelTable& table, const Activation& activation,
                             const std::vector<float>& gate, const std::vector<float>& up,
                             const float* gate_bias = nullptr, const float* up_bias = nullptr) {
  const int64_t n = int64_t(gate.size());
  std::vector<float> out(gate.size(), NAN);
  table.activate({activation, gate.data(), up.data(), gate_bias, up_bias, n, 1, n, out.data(), n});
  return out;
}

// This tests e^x through silu: silu(x) = x / (1 + e^-x).
void silu_is_exact_to_a_few_units_and_the_same_in_every_lane() {
  std::vector<float> x;
  for (float value = -88.0f; value < 100.0f; value += 0.037f) x.push_back(value);
  for (const float value : {0.0f, -0.0f, 1e-30f, -1e-30f, -103.0f, -150.0f, -3e38f, 3e38f, INFINITY, NAN}) {
    x.push_back(value);
  }
  const std::vector<float> ones(x.size(), 1.0f);
  for (const KernelTable* table : all_tables()) {
    const std::vector<float> found = activated(*table, {}, x, ones);
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = double(x[i]) / (1.0 + std::exp(-double(x[i])));
      if (std::isfinite(expected)) {
        // Two units for e^x and one each for the sum and the quotient. Below the smallest normal number, the
        // error may be that number.
        CHECK(std::fabs(double(found[i]) - expected) <= 4 * 0x1p-23 * std::fabs(expected) + 2e-38);
      } else {
        CHECK(std::isnan(found[i]) == std::isnan(expected));
      }
    }
    for (const float value : {-3.7f, 0.01f, 12.0f}) {
      for (int64_t n = 1; n < 40; ++n) {
        const std::vector<float> same(size_t(n), value), ups(size_t(n), 1.0f);
        const std::vector<float> out = activated(*table, {}, same, ups);
        for (const float each : out) CHECK_EQUAL(each, out[0]);
        CHECK_EQUAL(activated(*table, {}, {value}, {1.0f})[0], out.back());
      }
    }
  }
}

void a_clamped_activation_cuts_off_and_keeps_nan() {
  const Activation clamped = {Activation::Kind::clamped, 7.0f, 1.702f};
  std::vector<float> gate, up;
  for (const float g : {-200.0f, -9.0f, -0.5f, 0.0f, 0.3f, 6.9f, 7.0f, 7.1f, 300.0f, INFINITY, NAN}) {
    for (const float u : {-1e30f, -7.5f, -7.0f, -1.0f, 0.0f, 2.5f, 7.0f, 7.5f, INFINITY, NAN}) {
      gate.push_back(g);
      up.push_back(u);
    }
  }
  const std::vector<float> gate_bias = normal(int64_t(gate.size()), 11),
                           up_bias = normal(int64_t(up.size()), 12);
  for (const KernelTable* table : all_tables()) {
    for (const bool has_bias : {false, true}) {
      const std::vector<float> found =
          has_bias ? activated(*table, clamped, gate, up, gate_bias.data(), up_bias.data())
                   : activated(*table, clamped, gate, up);
      for (size_t i = 0; i < gate.size(); ++i) {
        double g = gate[i] + (has_bias ? gate_bias[i] : 0.0f), u = up[i] + (has_bias ? up_bias[i] : 0.0f);
        if (std::isnan(g) || std::isnan(u)) {
          CHECK(std::isnan(found[i]));
          continue;
        }
        g = std::min(g, 7.0);
        u = std::max(-7.0, std::min(u, 7.0));
        const double expected = g / (1.0 + std::exp(-double(1.702f) * g)) * (u + 1.0);
        CHECK(std::fabs(double(found[i]) - expected) <= 1e-6 * std::fabs(expected) + 2e-38);
      }
    }
  }
}

void limited_and_squared_activations_follow_their_formulas_and_keep_nan() {
  constexpr float kLimit = 2.5f;
  std::vector<float> gate, up;
  for (const float g : {-80.0f, -2.6f, -0.5f, 0.0f, 0.3f, 2.4f, 2.6f, 3.0f, 300.0f, INFINITY, NAN}) {
    for (const float u : {-1e9f, -2.6f, -2.5f, -1.0f, 0.0f, 2.4f, 2.6f, INFINITY, NAN}) {
      gate.push_back(g);
      up.push_back(u);
    }
  }
  const auto silu = [](double x) { return x / (1.0 + std::exp(-x)); };
  const auto cut = [](double x, double least) { return std::max(least, std::min(x, double(kLimit))); };
  using Kind = Activation::Kind;
  for (const KernelTable* table : all_tables()) {
    for (const Kind kind : {Kind::silu_limited, Kind::silu_capped, Kind::relu2}) {
      const std::vector<float> found = activated(*table, {kind, kLimit}, kind == Kind::relu2 ? up : gate, up);
      for (size_t i = 0; i < gate.size(); ++i) {
        const double g = gate[i], u = up[i];
        const bool is_nan = std::isnan(u) || (std::isnan(g) && kind != Kind::relu2);
        CHECK_EQUAL(std::isnan(found[i]), is_nan);
        if (is_nan || (kind == Kind::silu_capped && std::isinf(g))) continue;
        const double expected = kind == Kind::relu2          ? std::max(u, 0.0) * std::max(u, 0.0)
                                : kind == Kind::silu_limited ? silu(cut(g, -INFINITY)) * cut(u, -kLimit)
                                                             : cut(silu(g), -INFINITY) * cut(u, -kLimit);
        if (std::isinf(expected)) {
          CHECK(std::isinf(found[i]));
        } else {
          CHECK(std::fabs(double(found[i]) - expected) <= 1e-6 * std::fabs(expected) + 2e-38);
        }
      }
    }
  }
}

// The limits of Kimi-K3. Small results lose no digits.
void situ_is_exact_to_a_few_units_and_keeps_nan() {
  std::vector<float> gate, up;
  for (const float g : {-300.0f, -20.0f, -4.0f, -0.7f, -1e-4f, -1e-30f, 0.0f, 1e-7f, 0.02f, 0.69f, 1.4f, 9.0f,
                        86.0f, 1e30f, INFINITY, NAN}) {
    for (const float u : {-INFINITY, -1e9f, -600.0f, -30.0f, -1.0f, -1e-5f, 0.0f, 1e-30f, 0.003f, 8.0f, 17.0f,
                          26.0f, 600.0f, INFINITY, NAN}) {
      gate.push_back(g);
      up.push_back(u);
    }
  }
  const Activation situ = {Activation::Kind::situ, 25.0f, 4.0f};
  for (const KernelTable* table : all_tables()) {
    const std::vector<float> found = activated(*table, situ, gate, up);
    for (size_t i = 0; i < gate.size(); ++i) {
      const double g = gate[i], u = up[i];
      CHECK_EQUAL(std::isnan(found[i]), std::isnan(g) || std::isnan(u));
      if (std::isnan(g) || std::isnan(u)) continue;
      const double expected = 4 * std::tanh(g / 4) / (1 + std::exp(-g)) * 25 * std::tanh(u / 25);
      CHECK(std::fabs(double(found[i]) - expected) <= 1.5e-6 * std::fabs(expected) + 1e-37);
    }
  }
}

double gelu_tanh(double x) {
  return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

void gelu_is_exact_to_a_few_units_and_keeps_nan() {
  std::vector<float> x;
  for (float value = -12.0f; value < 12.0f; value += 0.0037f) x.push_back(value);
  for (const float value : {0.0f, -0.0f, 1e-30f, -1e-30f, -30.0f, 40.0f, -3e38f, 2e38f, INFINITY, NAN})
    x.push_back(value);
  const std::vector<float> up(x.size(), -1.5f);
  const Activation gelu = {Activation::Kind::gelu_tanh};
  for (const KernelTable* table : all_tables()) {
    const std::vector<float> found = activated(*table, gelu, x, up);
    for (size_t i = 0; i < x.size(); ++i) {
      if (!std::isfinite(x[i])) {
        CHECK(std::isnan(found[i]) == std::isnan(x[i]));
        CHECK(std::isnan(x[i]) || found[i] == -INFINITY);
        continue;
      }
      // The double's own 1 + tanh loses the digits of small results, from about -5 downwards.
      const double expected = -1.5 * gelu_tanh(double(x[i]));
      CHECK(std::fabs(double(found[i]) - expected) <= 2e-6 * std::fabs(expected) + 3e-9);
    }
  }
}

void soft_caps_meet_the_formula_at_every_length() {
  for (const KernelTable* table : all_tables()) {
    for (const int64_t n : kSizes) {
      std::vector<float> x = normal(n, 21, 40.0f);
      if (n > 2) x[0] = INFINITY, x[1] = -3e38f, x[2] = NAN;
      std::vector<float> found = x;
      found.push_back(7.0f);
      table->soft_cap(30.0f, n, found.data());
      CHECK_EQUAL(found.back(), 7.0f);
      for (size_t i = 0; i < x.size(); ++i) {
        const double expected = 30.0 * std::tanh(double(x[i]) / 30.0);
        CHECK(std::isnan(x[i]) ? std::isnan(found[i]) : std::fabs(found[i] - expected) < 30 * 4 * 0x1p-24);
      }
    }
  }
}

// Rows of tokens with gaps between them, in place, with a partial last vector.
void activations_stay_inside_their_rows() {
  constexpr int64_t kRows = 21, kStride = 40, kTokens = 3;
  for (const KernelTable* table : all_tables()) {
    for (const Activation& activation : {Activation{}, Activation{Activation::Kind::clamped, 1.0f, 2.0f},
                                         Activation{Activation::Kind::gelu_tanh}}) {
      const std::vector<float> before = normal(kTokens * kStride, 13), up = normal(kTokens * kStride, 14);
      const std::vector<float> bias = normal(kRows, 15);
      std::vector<float> gate = before;
      table->activate({activation, gate.data(), up.data(), bias.data(), nullptr, kStride, kTokens, kRows,
                       gate.data(), kStride});
      for (int64_t token = 0; token < kTokens; ++token) {
        for (int64_t i = 0; i < kStride; ++i) {
          const size_t at = size_t(token * kStride + i);
          const std::vector<float> one =
              i < kRows ? activated(*table, activation, {before[at] + bias[size_t(i)]}, {up[at]})
                        : std::vector<float>{before[at]};
          CHECK_EQUAL(gate[at], one[0]);
        }
      }
    }
  }
}

struct Routed {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Routed route(const KernelTable& table, const RouteRule& rule, const std::vector<float>& logits,
             const std::vector<int32_t>* given = nullptr) {
  const int64_t experts = int64_t(logits.size());
  Routed routed = {std::vector<int32_t>(size_t(rule.k), -1), std::vector<float>(size_t(rule.k), NAN)};
  std::vector<float> scratch(size_t(route_scratch_floats(experts)));
  RouteArgs args = {};
  args.rule = rule;
  args.logits = logits.data();
  args.num_experts = experts;
  args.ids = routed.ids.data();
  args.weights = routed.weights.data();
  args.scratch = scratch.data();
  std::vector<float> ids;
  if (given != nullptr) {
    ids.assign(given->begin(), given->end());
    args.given = reinterpret_cast<const uint8_t*>(ids.data());
  }
  table.route(args);
  return routed;
}

RouteRule plain_rule(int64_t k) {
  RouteRule rule = {};
  rule.k = k;
  rule.num_groups = rule.kept_groups = 1;
  rule.scale = 1.0f;
  return rule;
}

void routes_meet_the_reference() {
  std::mt19937 generator(4);
  for (const KernelTable* table : all_tables()) {
    for (const int64_t experts : {1, 7, 8, 15, 16, 17, 60, 128, 384}) {
      for (int round = 0; round < 16; ++round) {
        RouteRule rule = plain_rule(std::min<int64_t>(experts, 8));
        const std::vector<float> logits = normal(experts, unsigned(3 + round), 3.0f);
        const std::vector<float> bias = normal(experts, unsigned(50 + round), 0.3f);
        rule.score = Score(round % 3);
        if (round & 2) rule.choice_bias = bias.data();
        rule.renormalize = (round & 4) != 0;
        rule.renormalize_eps = 1e-20f;
        rule.renormalize_least = (round & 8) != 0 ? 0.75f : 0.0f;
        rule.scale = 2.5f;
        if ((round & 8) != 0 && experts % 4 == 0) {
          rule.num_groups = 4;
          rule.kept_groups = experts < 16 ? 4 : 2;
          rule.group_score = generator() % 2 ? GroupScore::max : GroupScore::top2;
        }
        const Routed expected = route(plain(), rule, logits), found = route(*table, rule, logits);
        CHECK(found.ids == expected.ids);
        CHECK(near(found.weights, expected.weights, 2e-6));
      }
    }
  }
}

void ties_go_to_the_lower_expert() {
  const float specials[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1.0f, -1.0f};
  std::mt19937 generator(9);
  for (const KernelTable* table : all_tables()) {
    for (int round = 0; round < 300; ++round) {
      const int64_t experts = 1 + int64_t(generator() % 140);
      RouteRule rule = plain_rule(1 + int64_t(generator() % uint32_t(std::min<int64_t>(experts, 10))));
      const uint32_t kinds = round % 3 == 0 ? 7 : round % 3 == 1 ? 4 : 2;
      std::vector<float> logits(static_cast<size_t>(experts));
      for (float& logit : logits) logit = specials[generator() % kinds];
      const std::vector<float> zeros(logits.size());
      rule.score = Score(round % 4 % 3);
      if (round % 5 == 0 && rule.score == Score::sigmoid) rule.choice_bias = zeros.data();
      const Routed found = route(*table, rule, logits);
      std::vector<int32_t> order(logits.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
      const auto worth = [&](int32_t id) {
        const float logit = logits[size_t(id)];
        if (std::isnan(logit)) return -INFINITY;
        return rule.choice_bias == nullptr ? logit : float(1.0 / (1.0 + std::exp(-double(logit))));
      };
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return worth(a) > worth(b); });
      CHECK(std::equal(found.ids.begin(), found.ids.end(), order.begin()));
      const bool has_nan = std::any_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x); });
      if (has_nan && rule.score == Score::softmax) CHECK(std::isnan(found.weights[0]));
    }
  }
}

void the_scale_of_an_expert_multiplies_its_weight_alone() {
  const std::vector<float> logits = normal(20, 31), scales = normal(20, 32);
  for (const KernelTable* table : all_tables()) {
    RouteRule rule = plain_rule(5);
    rule.renormalize = true;
    rule.scale = 2.5f;
    const Routed plain = route(*table, rule, logits);
    rule.expert_scale = scales.data();
    const Routed scaled = route(*table, rule, logits);
    CHECK(scaled.ids == plain.ids);
    for (size_t rank = 0; rank < 5; ++rank)
      CHECK_EQUAL(scaled.weights[rank], plain.weights[rank] * scales[size_t(plain.ids[rank])]);
  }
}

void weights_are_divided_by_no_less_than_the_least() {
  const std::vector<float> logits(8, 0.0f);  // softmax: 1 / 8 each
  for (const KernelTable* table : all_tables()) {
    RouteRule rule = plain_rule(2);
    rule.renormalize = true;
    for (const float least : {0.0f, 0.25f, 0.5f}) {
      rule.renormalize_least = least;
      for (const float weight : route(*table, rule, logits).weights)
        CHECK_EQUAL(weight, least > 0.25f ? 0.25f : 0.5f);
    }
  }
}

void given_experts_are_weighed_as_chosen_ones() {
  const std::vector<float> logits = normal(33, 41);
  for (const KernelTable* table : all_tables()) {
    RouteRule rule = plain_rule(4);
    rule.score = Score::sqrt_softplus;
    rule.renormalize = true;
    rule.scale = 1.5f;
    const Routed chosen = route(*table, rule, logits);
    const std::vector<int32_t> backwards(chosen.ids.rbegin(), chosen.ids.rend());
    const Routed given = route(*table, rule, logits, &backwards);
    CHECK(given.ids == backwards);
    for (size_t rank = 0; rank < 4; ++rank)
      CHECK(near({given.weights[rank]}, {chosen.weights[3 - rank]}, 1e-6));
    const std::vector<int32_t> others = {32, 32, 0, 7};  // an expert twice is weighed twice
    const Routed twice = route(*table, rule, logits, &others);
    CHECK(twice.ids == others);
    CHECK_EQUAL(twice.weights[0], twice.weights[1]);
    CHECK(near({twice.weights[0] + twice.weights[1] + twice.weights[2] + twice.weights[3]}, {1.5f}, 1e-6));
  }
}

void tied_groups_go_to_the_lower_one() {
  const std::vector<float> logits(27, 1.0f);
  for (const KernelTable* table : all_tables()) {
    RouteRule rule = plain_rule(3);
    rule.score = Score::sigmoid;
    rule.num_groups = 3;
    rule.kept_groups = 2;
    for (const GroupScore score : {GroupScore::max, GroupScore::top2}) {
      rule.group_score = score;
      CHECK(route(*table, rule, logits).ids == (std::vector<int32_t>{0, 1, 2}));
    }
    // Two good experts are worth more than the best one.
    std::vector<float> mixed(27, -5.0f);
    mixed[3] = 1.0f, mixed[4] = 1.0f, mixed[13] = 2.0f, mixed[22] = 1.0f, mixed[26] = 1.0f;
    rule.kept_groups = 1;
    CHECK(route(*table, rule, mixed).ids == (std::vector<int32_t>{3, 4, 0}));
    rule.group_score = GroupScore::max;
    CHECK(route(*table, rule, mixed).ids == (std::vector<int32_t>{13, 9, 10}));
    // No expert of another group is chosen, even if all experts of this group are minus infinity or worse.
    std::vector<float> bias(27, -1.0f);
    std::fill_n(bias.begin() + 9, 9, -INFINITY);
    bias[11] = NAN;
    bias[13] = 1.0f;
    rule.choice_bias = bias.data();
    CHECK(route(*table, rule, mixed).ids == (std::vector<int32_t>{13, 9, 10}));
  }
}

constexpr KvFormat kKvFormats[] = {KvFormat::f32, KvFormat::f16, KvFormat::q8};

// Sequences of random keys, with NaN in every place that no token may see.
struct Cache {
  Cache(int64_t heads, int64_t dim, int64_t value_dim, int64_t block, KvFormat format)
      : kv({KvShape::keys_values(heads, dim, value_dim)}, {kBlocks, kBlocks}, block, format),
        block_tokens(block) {
    const int64_t all = kBlocks * block_tokens;
    const std::vector<float> garbage(size_t(all * heads * std::max(dim, value_dim)), NAN);
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < all; ++i) slots.push_back(i);
    Runtime runtime(1);
    kv_write(runtime, kv.layer(0), garbage.data(), garbage.data(), slots.data(), all);
    slots.clear();
    for (int64_t i = 0; i < kLength; ++i) {
      slots.push_back(blocks[size_t(i / block_tokens)] * block_tokens + i % block_tokens);
    }
    keys = normal(kLength * heads * dim, 5);
    values = normal(kLength * heads * value_dim, 6);
    kv_write(runtime, kv.layer(0), keys.data(), values.data(), slots.data(), kLength);
  }
  static constexpr int64_t kBlocks = 16, kLength = 75;
  std::vector<int32_t> blocks = {3, 9, 0, 12, 7, 15, 1, 2, 11, 5, 6, 4, 8, 10, 13, 14};
  KvCache kv;
  int64_t block_tokens;
  std::vector<float> keys, values;
};

std::vector<float> attend(const KernelTable& table, Cache& cache, const std::vector<float>& q, int64_t heads,
                          int64_t begin, int64_t end, Window window, const float* sinks = nullptr,
                          const int32_t* sees_until = nullptr) {
  const KvLayer kv = cache.kv.layer(0);
  const int64_t row = heads * kv.value_dim;
  std::vector<float> out(size_t((end - begin) * row), NAN);
  std::vector<float> scratch(static_cast<size_t>(table.attention_floats(kv.head_dim, kv.value_dim)));
  std::vector<int32_t> order;
  for (int64_t p = begin; p < end; ++p) order.push_back(int32_t(p));
  for (int64_t head = 0; head < kv.kv_heads; ++head) {
    AttentionArgs args = {};
    args.kv = kv;
    args.kv_head = head;
    args.q = q.data() + begin * heads * kv.head_dim;
    args.out = out.data();
    args.order = order.data();
    args.sees_until = sees_until != nullptr ? sees_until + begin : nullptr;
    args.num_tokens = end - begin;
    args.num_heads = heads;
    args.blocks = cache.blocks.data();
    args.scale = 0.3f;
    args.window = window;
    args.scratch = scratch.data();
    args.sinks = sinks;
    table.attention(args);
  }
  return out;
}

// Tiles of AMX keep 16 bits of a number.
double attention_error(const KernelTable& table) { return std::string(table.name) == "amx" ? 3e-4 : 4e-6; }

void attention_meets_the_reference_in_every_chunk() {
  const int64_t shapes[][4] = {
      // heads, KV heads, dim, dim of values
      {2, 1, 7, 7}, {2, 2, 16, 16}, {9, 1, 40, 23}, {4, 2, 64, 64}, {1, 1, 130, 130}, {3, 1, 33, 65}};
  for (const KernelTable* table : all_tables()) {
    for (const auto& [heads, kv_heads, dim, value_dim] : shapes) {
      for (const int64_t block_tokens : {5, 16, 48}) {
        for (const Window window : {Window{0}, Window{1}, Window{19}, Window{19, true}}) {
          const KvFormat format = kKvFormats[size_t(dim + block_tokens + window.size) % 3];
          Cache cache(kv_heads, dim, value_dim, block_tokens, format);
          const std::vector<float> q = normal(Cache::kLength * heads * dim, 7);
          // Sinks below, among and above the scores.
          const std::vector<float> some = normal(heads, 8, 6.0f);
          const float* sinks = block_tokens == 16 ? some.data() : nullptr;
          const std::vector<float> expected =
              attend(plain(), cache, q, heads, 0, Cache::kLength, window, sinks);
          const std::vector<float> together =
              attend(*table, cache, q, heads, 0, Cache::kLength, window, sinks);
          CHECK(near(together, expected, attention_error(*table)));
          for (const int64_t chunk : {1, 3, 32}) {
            std::vector<float> pieces;
            for (int64_t begin = 0; begin < Cache::kLength; begin += chunk) {
              const int64_t end = std::min(begin + chunk, Cache::kLength);
              const std::vector<float> piece = attend(*table, cache, q, heads, begin, end, window, sinks);
              pieces.insert(pieces.end(), piece.begin(), piece.end());
            }
            CHECK(same_bits(pieces, together));
          }
        }
      }
    }
  }
}

// A sequence of several sections, in one KV cache.
struct LongSequence {
  LongSequence(const KvShape& shape, int64_t block, KvFormat format)
      : kv({shape}, {kLength / block + 1, 1}, block, format) {
    for (int64_t i = 0; i < kLength / block + 1; ++i) blocks.push_back(int32_t(kLength / block - i));
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < kLength; ++i) slots.push_back(blocks[size_t(i / block)] * block + i % block);
    keys = normal(kLength * shape.kv_heads * shape.head_dim, 5);
    values = normal(kLength * shape.kv_heads * shape.value_dim, 6);
    Runtime runtime(1);
    kv_write(runtime, kv.layer(0), keys.data(), values.data(), slots.data(), kLength);
  }

  // The outputs of the last `count` tokens.
  std::vector<float> attend(Runtime& runtime, const std::vector<float>& q, int64_t num_heads, int64_t count,
                            Window window, const float* sinks) {
    const float* first = q.data() + (kTokens - count) * num_heads * kv.layer(0).head_dim;
    return attend_tokens(runtime, kv, blocks, first, num_heads, kLength - count, kLength, window, sinks);
  }

  static constexpr int64_t kLength = 2 * kSectionKeys + 77, kTokens = 90;
  std::vector<int32_t> blocks;
  KvCache kv;
  std::vector<float> keys, values;
};

// The first output of a token's last head, in double.
double one_output(LongSequence& long_one, const float* q, int64_t first, int64_t last, const float* sink) {
  const KvShape& shape = long_one.kv.shape(0);
  const int64_t kv_heads = shape.kv_heads, dim = shape.head_dim;
  double sum = 0, value = 0, most = -INFINITY;
  std::vector<double> scores;
  for (int64_t p = first; p <= last; ++p) {
    const int64_t at = (p * kv_heads + kv_heads - 1) * dim;
    double score = 0;
    for (int64_t d = 0; d < dim; ++d) score += double(q[d]) * double(long_one.keys[size_t(at + d)]);
    scores.push_back(score * double(0.3f));
    most = std::max(most, scores.back());
  }
  if (sink != nullptr) sum += std::exp(double(*sink) - most);
  for (int64_t p = first; p <= last; ++p) {
    const double weight = std::exp(scores[size_t(p - first)] - most);
    sum += weight;
    value += weight * double(long_one.values[size_t((p * kv_heads + kv_heads - 1) * shape.value_dim)]);
  }
  return value / sum;
}

void sections_are_merged_the_same_by_any_threads_in_every_chunk() {
  constexpr int64_t kTokens = LongSequence::kTokens, kLength = LongSequence::kLength;
  const int64_t shapes[][4] = {{2, 1, 40, 40}, {9, 3, 16, 24}, {40, 1, 16, 16}};  // as above
  constexpr int kThreads[] = {1, 2, 5};
  for (const KernelTable* table : all_tables()) {
    int number = 0;
    for (const auto& [heads, kv_heads, dim, value_dim] : shapes) {
      const std::vector<float> q = normal(kTokens * heads * dim, 7), some = normal(heads, 8, 6.0f);
      for (const int64_t block_tokens : {5, 16}) {
        ++number;
        LongSequence sequence(KvShape::keys_values(kv_heads, dim, value_dim), block_tokens, KvFormat::f32);
        for (const Window window :
             {Window{}, Window{kSectionKeys + 200}, Window{30}, Window{kSectionKeys + 200, true}}) {
          const float* sinks = block_tokens == 16 ? some.data() : nullptr;
          Runtime alone(1, std::nullopt, *table);
          const int64_t row = heads * value_dim;
          const std::vector<float> together = sequence.attend(alone, q, heads, kTokens, window, sinks);
          for (const int64_t token : {int64_t(0), int64_t(20), kTokens - 1}) {
            const int64_t last = kLength - kTokens + token;
            const int64_t first = window.size == 0    ? 0
                                  : window.is_chunked ? last - last % window.size
                                                      : last - window.size + 1;
            const double expected = one_output(sequence, q.data() + ((token + 1) * heads - 1) * dim, first,
                                               last, sinks ? sinks + heads - 1 : nullptr);
            const double found = double(together[size_t((token + 1) * row - value_dim)]);
            CHECK(std::fabs(found - expected) <= 2e-5);
          }
          // All tokens take longest: each number of threads computes them in a third of the cases.
          const int for_all = kThreads[number++ % 3];
          for (const int threads : kThreads) {
            Runtime runtime(threads, std::nullopt, *table);
            for (const int64_t count : {int64_t(1), int64_t(7), kTokens}) {
              if (count == kTokens && threads != for_all) continue;
              const std::vector<float> some_of_them =
                  sequence.attend(runtime, q, heads, count, window, sinks);
              CHECK(same_bits(some_of_them, {together.end() - count * row, together.end()}));
            }
          }
        }
      }
    }
  }
}

// Tokens [6, 30) and [33, 70) see each other's spans, the others only what precedes them.
std::vector<int32_t> two_spans() {
  std::vector<int32_t> until;
  for (int32_t p = 0; p < Cache::kLength; ++p)
    until.push_back(p >= 6 && p < 30 ? 30 : p >= 33 && p < 70 ? 70 : p + 1);
  return until;
}

void tokens_of_a_span_see_later_ones() {
  constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 20;
  const std::vector<int32_t> until = two_spans();
  const std::vector<float> q = normal(Cache::kLength * kHeads * kDim, 7);
  for (const KernelTable* table : all_tables()) {
    for (const int64_t block_tokens : {5, 16, 48}) {
      for (const int64_t window : {0, 1, 19}) {
        Cache cache(kKvHeads, kDim, kDim, block_tokens, KvFormat::f32);
        const auto attend_until = [&](const KernelTable& by, int64_t begin, int64_t end) {
          return attend(by, cache, q, kHeads, begin, end, {window}, nullptr, until.data());
        };
        const std::vector<float> together = attend_until(*table, 0, Cache::kLength);
        CHECK(near(together, attend_until(plain(), 0, Cache::kLength), 4e-6));
        for (int64_t token = 0; token < Cache::kLength; ++token) {
          const int64_t row = kHeads * kDim;
          const std::vector<float> alone = attend_until(*table, token, token + 1);
          CHECK(same_bits(alone, {together.begin() + token * row, together.begin() + (token + 1) * row}));
          for (int64_t head = 0; head < kHeads; ++head) {
            const float* query = q.data() + (token * kHeads + head) * kDim;
            double sum = 0, value = 0;  // `value`: the first dimension
            for (int64_t p = window > 0 ? std::max<int64_t>(0, token - window + 1) : 0;
                 p < until[size_t(token)]; ++p) {
              const int64_t at = (p * kKvHeads + head * kKvHeads / kHeads) * kDim;
              double score = 0;
              for (int64_t d = 0; d < kDim; ++d)
                score += double(query[d]) * double(cache.keys[size_t(at + d)]);
              const double weight = std::exp(score * double(0.3f));
              sum += weight;
              value += weight * double(cache.values[size_t(at)]);
            }
            CHECK(std::fabs(double(alone[size_t(head * kDim)]) - value / sum) <= 1e-5);
          }
        }
      }
    }
  }
}

// A sink equals one more position with that score and a value of zero.
void a_sink_takes_its_share_of_the_weights() {
  constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 16;
  Cache cache(kKvHeads, kDim, kDim, 16, KvFormat::f32);
  const std::vector<float> q = normal(Cache::kLength * kHeads * kDim, 7);
  const std::vector<float> sinks = {-1.5f, 0.0f, 3.0f, 40.0f};
  for (const KernelTable* table : all_tables()) {
    const std::vector<float> without = attend(*table, cache, q, kHeads, 0, Cache::kLength, {});
    const std::vector<float> with = attend(*table, cache, q, kHeads, 0, Cache::kLength, {}, sinks.data());
    for (int64_t token = 0; token < Cache::kLength; ++token) {
      for (int64_t head = 0; head < kHeads; ++head) {
        double sum = 0;
        const float* query = q.data() + (token * kHeads + head) * kDim;
        for (int64_t p = 0; p <= token; ++p) {
          const float* key = cache.keys.data() + (p * kKvHeads + head * kKvHeads / kHeads) * kDim;
          double score = 0;
          for (int64_t d = 0; d < kDim; ++d) score += double(query[d]) * double(key[d]);
          sum += std::exp(score * double(0.3f));
        }
        const double share = sum / (sum + std::exp(double(sinks[size_t(head)])));
        for (int64_t d = 0; d < kDim; ++d) {
          const size_t at = size_t((token * kHeads + head) * kDim + d);
          CHECK(std::fabs(double(with[at]) - share * double(without[at])) <= 1e-5 * share);
        }
      }
    }
  }
}

// One sequence's latent vectors, with NaN in every place that no token may see.
struct LatentCache {
  LatentCache(int64_t dim, int64_t block, KvFormat format)
      : kv({KvShape::latent(dim)}, {kBlocks, kBlocks}, block, format), block_tokens(block) {
    const std::vector<float> garbage(size_t(kBlocks * block * dim), NAN);
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < kBlocks * block; ++i) slots.push_back(i);
    Runtime runtime(1);
    latent_write(runtime, kv.latent_layer(0), garbage.data(), slots.data(), kBlocks * block);
    slots.clear();
    for (int64_t i = 0; i < kLength; ++i) {
      slots.push_back(blocks[size_t(i / block)] * block + i % block);
    }
    const std::vector<float> vectors = normal(kLength * dim, 5);
    latent_write(runtime, kv.latent_layer(0), vectors.data(), slots.data(), kLength);
  }
  static constexpr int64_t kBlocks = 16, kLength = kSectionPositions + 75;
  std::vector<int32_t> blocks = {3, 9, 0, 12, 7, 15, 1, 2, 11, 5, 6, 4, 8, 10, 13, 14};
  KvCache kv;
  int64_t block_tokens;
};

// Processes the columns of tokens [begin, end), one or two per call, and both sections of those that see
// them.
std::vector<float> attend_latent(const KernelTable& table, LatentCache& cache, const std::vector<float>& q,
                                 int64_t heads, int64_t value_dim, int64_t begin, int64_t end) {
  const LatentLayer kv = cache.kv.latent_layer(0);
  const int64_t state_floats = latent_state_floats(value_dim);
  std::vector<float> out(size_t((end - begin) * heads * value_dim), NAN);
  std::vector<float> scratch(size_t(table.latent_floats(kv.dim, value_dim)), NAN);
  std::vector<float> states(size_t(2 * kMostColumns * state_floats), NAN);
  for (int64_t token = begin; token < end; token += kMostColumns) {
    for (int64_t section = 0; section < 2; ++section) {
      LatentColumn columns[kMostColumns];
      int64_t count = 0;
      for (int64_t t = token; t < std::min(token + kMostColumns, end); ++t) {
        if (t < section * kSectionPositions) continue;
        float* state = states.data() + (section * kMostColumns + t - token) * state_floats;
        columns[count++] = {q.data() + t * heads * kv.dim, heads, t, state};
      }
      if (count == 0) continue;
      LatentAttentionArgs args = {};
      args.kv = kv;
      args.blocks = cache.blocks.data();
      args.columns = columns;
      args.num_columns = count;
      args.begin = section * kSectionPositions;
      args.value_dim = value_dim;
      args.scale = 0.3f;
      args.scratch = scratch.data();
      table.latent_attention(args);
    }
    for (int64_t t = token; t < std::min(token + kMostColumns, end); ++t) {
      float* state = states.data() + (t - token) * state_floats;
      if (t >= kSectionPositions)
        table.latent_merge(state + kMostColumns * state_floats, value_dim, heads, state);
      table.latent_finish(state, value_dim, heads, nullptr, out.data() + (t - begin) * heads * value_dim);
    }
  }
  return out;
}

void latent_attention_meets_the_reference_in_every_chunk() {
  const int64_t shapes[][3] = {{1, 7, 7}, {3, 19, 13}, {16, 40, 32}, {7, 70, 64}};  // heads, dim, value dim
  for (const KernelTable* table : all_tables()) {
    if (table->most_columns > kMostColumns) continue;  // on tiles: test_kernels_amx_latent.cpp
    size_t num_caches = 0;
    for (const auto& [heads, dim, value_dim] : shapes) {
      for (const int64_t block_tokens : {21, 32}) {
        LatentCache cache(dim, block_tokens, kKvFormats[num_caches++ % 3]);
        const int64_t length = LatentCache::kLength;
        const std::vector<float> q = normal(length * heads * dim, 7, 0.5f);
        const std::vector<float> expected = attend_latent(plain(), cache, q, heads, value_dim, 0, length);
        const std::vector<float> together = attend_latent(*table, cache, q, heads, value_dim, 0, length);
        CHECK(near(together, expected, 4e-6));
        std::vector<float> pieces;
        for (int64_t begin = 0; begin < length; ++begin) {
          const std::vector<float> piece =
              attend_latent(*table, cache, q, heads, value_dim, begin, begin + 1);
          pieces.insert(pieces.end(), piece.begin(), piece.end());
        }
        CHECK(same_bits(pieces, together));
      }
    }
  }
}

// Operations on three threads give the same results as on one.
void threads_change_no_bit() {
  constexpr int64_t kTokens = 103;
  for (const KernelTable* table : all_tables()) {
    Runtime one(1, std::nullopt, *table), three(3, std::nullopt, *table);
    for (const Format format : kFormats) {
      const int64_t hidden = cols_of(format, 200), width = cols_of(format, 130);
      const std::vector<float> x = normal(kTokens * hidden, 8);
      std::vector<Weights> weights;
      std::vector<ExpertView> experts;
      for (unsigned i = 0; i < 3; ++i) {
        weights.push_back(Weights::random(format, width, hidden, 10 + i, 1));
        weights.push_back(Weights::random(format, width, hidden, 20 + i, 2));
        weights.push_back(Weights::random(format, hidden, width, 30 + i, 3));
        experts.push_back({weights[3 * i].view, weights[3 * i + 1].view, weights[3 * i + 2].view});
      }
      const std::vector<float> biases = normal(width + hidden, 9);
      experts[2].bias = {biases.data(), biases.data() + 1, biases.data() + width};
      const std::vector<int32_t> starts = {0, 50, 50, kTokens};
      std::vector<int32_t> token, row;
      for (int32_t i = 0; i < kTokens; ++i) {
        token.push_back(int32_t(i * 7 % kTokens));
        row.push_back(int32_t(i * 5 % kTokens));
      }
      std::vector<float> expected(size_t(kTokens * hidden), NAN), found = expected;
      const Assignments dispatch = {starts.data(), token.data(), row.data()};
      const Activation clamped = {Activation::Kind::clamped, 7.0f, 1.702f};
      for (const Activation& activation : {clamped, Activation{Activation::Kind::relu2}}) {
        for (ExpertView& expert : experts) {
          if (activation.has_gate()) continue;
          expert.gate = std::nullopt;
          expert.bias.gate = nullptr;
        }
        swiglu_experts(one, experts, activation, x.data(), kTokens, dispatch, expected.data());
        swiglu_experts(three, experts, activation, x.data(), kTokens, dispatch, found.data());
        CHECK(same_bits(found, expected));
      }

      std::vector<float> y_one(size_t(kTokens * width)), y_three = y_one;
      matmul(one, {{weights[0].view, y_one.data()}}, x.data(), kTokens);
      matmul(three, {{weights[0].view, y_three.data()}}, x.data(), kTokens);
      CHECK(same_bits(y_three, y_one));
      soft_cap(one, 30.0f, int64_t(y_one.size()), y_one.data());
      soft_cap(three, 30.0f, int64_t(y_three.size()), y_three.data());
      CHECK(same_bits(y_three, y_one));
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  norms_meet_the_reference();
  silu_is_exact_to_a_few_units_and_the_same_in_every_lane();
  a_clamped_activation_cuts_off_and_keeps_nan();
  limited_and_squared_activations_follow_their_formulas_and_keep_nan();
  situ_is_exact_to_a_few_units_and_keeps_nan();
  gelu_is_exact_to_a_few_units_and_keeps_nan();
  soft_caps_meet_the_formula_at_every_length();
  activations_stay_inside_their_rows();
  routes_meet_the_reference();
  ties_go_to_the_lower_expert();
  given_experts_are_weighed_as_chosen_ones();
  tied_groups_go_to_the_lower_one();
  the_scale_of_an_expert_multiplies_its_weight_alone();
  weights_are_divided_by_no_less_than_the_least();
  attention_meets_the_reference_in_every_chunk();
  sections_are_merged_the_same_by_any_threads_in_every_chunk();
  tokens_of_a_span_see_later_ones();
  a_sink_takes_its_share_of_the_weights();
  latent_attention_meets_the_reference_in_every_chunk();
  threads_change_no_bit();
  return check_result();
}
