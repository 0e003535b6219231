// route_args.h: how the experts of a token are chosen (route.h).
#pragma once

#include <cstdint>

namespace argosy {

enum class Score { softmax, sigmoid, sqrt_softplus };
enum class GroupScore { max, top2 };

// How a token's experts follow from its logits (route.h).
struct RouteRule {
  int64_t k;                 // experts per token
  Score score;               // applied to all logits
  const float* choice_bias;  // [num_experts], added to the scores for the choice only; nullptr: none
  int64_t num_groups;        // groups have equal size and consecutive experts
  int64_t kept_groups;       // number of best groups kept; together they hold at least k experts
  GroupScore group_score;    // top2 needs groups of at least two experts
  bool renormalize;          // weights are divided by their sum plus renormalize_eps
  float renormalize_eps;
  float scale;                          // multiplies the weights, last
  const float* expert_scale = nullptr;  // [num_experts], also multiplies the weight of each; nullptr: none
  float renormalize_least = 0;          // the least that renormalize divides by
  // [num_experts], the choice_bias of tokens of media; nullptr: theirs is the same.
  const float* media_bias = nullptr;
};

struct RouteArgs {
  RouteRule rule;
  const float* logits;  // [num_experts]
  int64_t num_experts;
  // f32 [k] of any alignment: the experts, instead of those with the greatest worth; nullptr: none.
  const uint8_t* given = nullptr;
  int32_t* ids;    // [k]
  float* weights;  // [k]
  float* scratch;  // route_scratch_floats(num_experts)
};

// For all experts their scores and their worth in the choice, and the worth of each group.
static inline constexpr int64_t route_scratch_floats(int64_t num_experts) { return 3 * num_experts; }

}  // namespace argosy
