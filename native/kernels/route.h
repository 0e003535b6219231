// route.h: chooses the experts of one token, and the weight of each.
//
//   score of expert e     softmax over all logits, or of its own logit sigmoid, or sqrt(log(1 + e^logit))
//   worth of e            score + choice_bias. Without a bias it is the logit, which has the same order but
//                         still separates two experts whose scores round to the same number. A NaN is worth
//                         minus infinity
//   worth of a group      that of its best expert, or the sum of score + choice_bias of its best two
//   ids      int32 [k]    those that are given; otherwise the k experts of greatest worth, best first, from
//   the kept_groups groups with the
//                         greatest worth; experts in other groups are never chosen. On a tie the lower id
//                         wins, for experts and for groups
//   weights  float32 [k]  scores (without bias) of the chosen experts; with renormalize divided by (their
//                         sum + eps), or by `least` if that is more; then multiplied by scale, and by the
//                         expert's own scale
//
// As in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2). NaN logits still give k different ids.
#pragma once

#include <math.h>

#include "kernels/elementwise.h"
#include "kernels/exp.h"
#include "kernels/formats.h"
#include "kernels/route_args.h"

namespace argosy {
namespace {

// Returns the index of the first maximum and replaces it with NaN. At least one element must not be NaN.
inline int64_t take_best(float* left, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (left[i] == left[i] && (best < 0 || left[i] > left[best])) best = i;
  }
  left[best] = NAN;
  return best;
}

inline float or_least(float worth) { return worth == worth ? worth : -INFINITY; }

// Replaces experts outside the best groups with NaN in `left`.
inline void keep_groups(const RouteArgs& args, const float* scores, float* left, float* groups) {
  const RouteRule& rule = args.rule;
  const int64_t size = args.num_experts / rule.num_groups;
  for (int64_t group = 0; group < rule.num_groups; ++group) {
    const int64_t begin = group * size;
    float best = -INFINITY, second = -INFINITY;
    for (int64_t expert = begin; expert < begin + size; ++expert) {
      float worth = left[expert];
      if (rule.group_score == GroupScore::top2 && rule.choice_bias == nullptr) worth = scores[expert];
      if (worth > best) {
        second = best;
        best = worth;
      } else if (worth > second) {
        second = worth;
      }
    }
    groups[group] = or_least(rule.group_score == GroupScore::top2 ? best + second : best);
  }
  for (int64_t i = 0; i < rule.kept_groups; ++i) take_best(groups, rule.num_groups);
  for (int64_t expert = 0; expert < args.num_experts; ++expert) {
    if (groups[expert / size] == groups[expert / size]) left[expert] = NAN;
  }
}

inline void weigh_choice(const RouteArgs& args, const float* scores) {
  const RouteRule& rule = args.rule;
  float sum = 0.0f;
  for (int64_t rank = 0; rank < rule.k; ++rank) {
    args.weights[rank] = scores[args.ids[rank]];
    sum += args.weights[rank];
  }
  sum += rule.renormalize_eps;
  if (sum < rule.renormalize_least) sum = rule.renormalize_least;
  for (int64_t rank = 0; rank < rule.k; ++rank) {
    if (rule.renormalize) args.weights[rank] /= sum;
    args.weights[rank] *= rule.scale;
    if (rule.expert_scale != nullptr) args.weights[rank] *= rule.expert_scale[args.ids[rank]];
  }
}

#if !ARGOSY_VECTOR  // the reference

inline void score_experts(const RouteArgs& args, float* scores, float* left) {
  const int64_t n = args.num_experts;
  float most = -INFINITY, sum = 0.0f;
  for (int64_t expert = 0; expert < n; ++expert)
    most = args.logits[expert] > most ? args.logits[expert] : most;
  for (int64_t expert = 0; expert < n; ++expert) {
    const float logit = args.logits[expert];
    scores[expert] = args.rule.score == Score::softmax   ? expf(logit - most)
                     : args.rule.score == Score::sigmoid ? sigmoid(logit)
                                                         : sqrtf(softplus(logit));
    sum += scores[expert];
  }
  for (int64_t expert = 0; expert < n; ++expert) {
    if (args.rule.score == Score::softmax) scores[expert] /= sum;
    const float* bias = args.rule.choice_bias;
    left[expert] = or_least(bias == nullptr ? args.logits[expert] : scores[expert] + bias[expert]);
  }
}

inline void choose_experts(const RouteArgs& args, float* left) {
  for (int64_t rank = 0; rank < args.rule.k; ++rank)
    args.ids[rank] = int32_t(take_best(left, args.num_experts));
}

#else

inline void score_experts(const RouteArgs& args, float* scores, float* left) {
  const float *logits = args.logits, *bias = args.rule.choice_bias;
  const bool is_softmax = args.rule.score == Score::softmax;
  const int64_t n = args.num_experts;
  Vec most = broadcast(-INFINITY);
  for (int64_t expert = 0; expert < n && is_softmax; expert += kLanes) {
    const int64_t lanes = n - expert < kLanes ? n - expert : kLanes;
    most = max_or_second(keep_lanes(load(logits + expert, lanes), 0, lanes, -INFINITY), most);
  }
  most = broadcast(max_lanes(most));
  Vec sums = zeros();
  for (int64_t expert = 0; expert < n; expert += kLanes) {
    const int64_t lanes = n - expert < kLanes ? n - expert : kLanes;
    const Vec logit = load(logits + expert, lanes);
    Vec score;
    if (is_softmax) {
      score = keep_lanes(exp(sub(logit, most)), 0, lanes, 0.0f);
      sums = add(sums, score);
    } else if (args.rule.score == Score::sigmoid) {
      score = gated(broadcast(1.0f), sub(zeros(), logit));
    } else {
      score = square_root(softplus(logit));
    }
    store(scores + expert, score, lanes);
  }
  const Vec sum = broadcast(is_softmax ? sum_lanes(sums) : 1.0f);
  for (int64_t expert = 0; expert < n; expert += kLanes) {
    const int64_t lanes = n - expert < kLanes ? n - expert : kLanes;
    const Vec score = div(load(scores + expert, lanes), sum);
    store(scores + expert, score, lanes);
    const Vec worth = bias == nullptr ? load(logits + expert, lanes) : add(score, load(bias + expert, lanes));
    store(left + expert, max_or_second(worth, broadcast(-INFINITY)), lanes);
  }
}

// Makes one pass over all experts per rank and replaces each chosen one with NaN. Each lane keeps its first
// maximum, and the lowest id among the lanes wins, so ties follow the rule above.
inline void choose_experts(const RouteArgs& args, float* left) {
  const int64_t n = args.num_experts, whole = n / kLanes * kLanes;
  for (int64_t rank = 0; rank < args.rule.k; ++rank) {
    Vec best = broadcast(-INFINITY);
    Vec best_id = zeros();
    Vec id = lane_numbers();
    for (int64_t expert = 0; expert < whole; expert += kLanes) {
      keep_greater(load(left + expert), id, best, best_id);
      id = add(id, broadcast(float(kLanes)));
    }
    if (n > whole) {
      keep_greater(keep_lanes(load(left + whole, n - whole), 0, n - whole, -INFINITY), id, best, best_id);
    }
    const float most = max_lanes(best);
    if (most > -INFINITY) {
      const Vec among = where_equal(best, broadcast(most), sub(zeros(), best_id), broadcast(-INFINITY));
      args.ids[rank] = int32_t(-max_lanes(among));
      left[args.ids[rank]] = NAN;
    } else {  // only minus infinity is left, which no lane kept
      args.ids[rank] = int32_t(take_best(left, n));
    }
  }
}

#endif

void route(const RouteArgs& args) {
  float *scores = args.scratch, *left = scores + args.num_experts, *groups = left + args.num_experts;
  score_experts(args, scores, left);
  if (args.given != nullptr) {
    for (int64_t rank = 0; rank < args.rule.k; ++rank)
      args.ids[rank] = int32_t(read_unaligned<float>(args.given + 4 * rank));
  } else {
    if (args.rule.kept_groups < args.rule.num_groups) keep_groups(args, scores, left, groups);
    choose_experts(args, left);
  }
  weigh_choice(args, scores);
}

}  // namespace
}  // namespace argosy
