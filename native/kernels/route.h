// route.h: the experts of one token, and the weight of each.
//
//   logits  float32 [num_experts].    ids  int32 [k], best first; on a tie the lower id wins.
//   weights  float32 [k]: softmax over all experts at the chosen ones; with renormalize divided by their sum.
//
// Chosen by logit, so that two experts whose softmax rounds to the same number are still told apart. NaN
// logits give NaN weights and k different ids all the same.
#pragma once

#include <math.h>

#include "kernels/exp.h"
#include "kernels/kernel_table.h"

namespace argosy {
namespace {

inline float largest(const float* values, int64_t n) {
  float most = values[0];
  for (int64_t i = 1; i < n; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

inline void choose_experts(const float* logits, int64_t num_experts, int64_t k, int32_t* ids) {
  for (int64_t rank = 0; rank < k; ++rank) {
    int64_t best = -1;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      if (best >= 0 && !(logits[expert] > logits[best])) continue;
      bool is_taken = false;
      for (int64_t i = 0; i < rank; ++i) is_taken |= ids[i] == expert;
      if (!is_taken) best = expert;
    }
    ids[rank] = int32_t(best);
  }
}

inline void weigh_choice(const float* scores, float sum, int64_t k, bool renormalize, const int32_t* ids,
                         float* weights) {
  float chosen_sum = 0.0f;
  for (int64_t rank = 0; rank < k; ++rank) {
    weights[rank] = scores[ids[rank]] / sum;
    chosen_sum += weights[rank];
  }
  for (int64_t rank = 0; renormalize && rank < k; ++rank) weights[rank] /= chosen_sum;
}

#if !ARGOSY_VECTOR  // the reference

void route(const float* logits, int64_t num_experts, int64_t k, bool renormalize, int32_t* ids,
           float* weights, float* scratch) {
  const float most = largest(logits, num_experts);
  float sum = 0.0f;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    scratch[expert] = expf(logits[expert] - most);
    sum += scratch[expert];
  }
  choose_experts(logits, num_experts, k, ids);
  weigh_choice(scratch, sum, k, renormalize, ids, weights);
}

#else

void route(const float* logits, int64_t num_experts, int64_t k, bool renormalize, int32_t* ids,
           float* weights, float* scratch) {
  const Vec most = broadcast(largest(logits, num_experts));
  Vec sum = zeros();
  for (int64_t expert = 0; expert < num_experts; expert += kLanes) {
    const int64_t n = num_experts - expert < kLanes ? num_experts - expert : kLanes;
    const Vec scores = keep_lanes(exp(sub(load(logits + expert, n), most)), 0, n, 0.0f);
    sum = add(sum, scores);
    store(scratch + expert, scores, n);
  }
  choose_experts(logits, num_experts, k, ids);
  weigh_choice(scratch, sum_lanes(sum), k, renormalize, ids, weights);
}

#endif

}  // namespace
}  // namespace argosy
