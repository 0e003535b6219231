// routing.h: routing as Python describes it.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bind/bind.h"
#include "kernels/formats.h"
#include "kernels/route_args.h"

namespace argosy {

struct Routing {
  RouteRule rule;
  // Keep the memory that the rule points to alive.
  std::optional<ArrayOf<float>> choice_bias, expert_scale, media_bias;

  // Checks that the rule fits this number of experts.
  RouteRule checked(int64_t num_experts) const {
    require_range("experts_per_token", rule.k, 1, num_experts);
    require_range("num_groups", rule.num_groups, 1, num_experts);
    require_size("experts modulo groups", num_experts % rule.num_groups, 0);
    require_range("kept_groups", rule.kept_groups, 1, rule.num_groups);
    const int64_t size = num_experts / rule.num_groups;
    require_range("experts_per_token", rule.k, 1, rule.kept_groups * size);
    if (rule.kept_groups < rule.num_groups && rule.group_score == GroupScore::top2) {
      require_range("experts of a group", size, 2, num_experts);
    }
    if (choice_bias) read_array("choice_bias", *choice_bias, {num_experts});
    if (expert_scale) read_array("expert_scale", *expert_scale, {num_experts});
    if (media_bias) read_array("media_bias", *media_bias, {num_experts});
    return rule;
  }
};

using ScoreName = Named<std::string, "typing.Literal['softmax', 'sigmoid', 'sqrt_softplus']">;
using GroupScoreName = Named<std::string, "typing.Literal['max', 'top2']">;

inline Routing make_routing(int64_t experts_per_token, const std::string& score,
                            const std::optional<ArrayOf<float>>& choice_bias, int64_t num_groups,
                            int64_t kept_groups, const std::string& group_score, bool renormalize,
                            float renormalize_eps, float renormalize_least, float scale,
                            const std::optional<ArrayOf<float>>& expert_scale,
                            const std::optional<ArrayOf<float>>& media_bias) {
  if (score != "softmax" && score != "sigmoid" && score != "sqrt_softplus") {
    refuse("unknown score '" + score + "'; known: softmax, sigmoid, sqrt_softplus");
  }
  if (group_score != "max" && group_score != "top2") {
    refuse("unknown group_score '" + group_score + "'; known: max, top2");
  }
  return {
      .rule = {.k = experts_per_token,
               .score = score == "softmax"   ? Score::softmax
                        : score == "sigmoid" ? Score::sigmoid
                                             : Score::sqrt_softplus,
               .choice_bias = choice_bias ? read_array("choice_bias", *choice_bias, {kAnySize}) : nullptr,
               .num_groups = num_groups,
               .kept_groups = kept_groups,
               .group_score = group_score == "max" ? GroupScore::max : GroupScore::top2,
               .renormalize = renormalize,
               .renormalize_eps = renormalize_eps,
               .scale = scale,
               .expert_scale = expert_scale ? read_array("expert_scale", *expert_scale, {kAnySize}) : nullptr,
               .renormalize_least = renormalize_least,
               .media_bias = media_bias ? read_array("media_bias", *media_bias, {kAnySize}) : nullptr},
      .choice_bias = choice_bias,
      .expert_scale = expert_scale,
      .media_bias = media_bias,
  };
}

}  // namespace argosy
