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

// Ranks from `rank` on; those before are chosen.
inline void choose_experts(const float* logits, int64_t num_experts, int64_t rank, int64_t k, int32_t* ids) {
  for (; rank < k; ++rank) {
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
  choose_experts(logits, num_experts, 0, k, ids);
  const float most = logits[ids[0]];
  float sum = 0.0f;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    scratch[expert] = expf(logits[expert] - most);
    sum += scratch[expert];
  }
  weigh_choice(scratch, sum, k, renormalize, ids, weights);
}

#else

// The same with one pass over all logits for each rank; what is chosen becomes NaN in `left`. Each lane keeps
// the first of its largest, and the lowest id among the lanes wins, so ties go as above.
inline void choose_experts_in_lanes(const float* logits, int64_t num_experts, int64_t k, int32_t* ids,
                                    float* left) {
  const int64_t whole = num_experts / kLanes * kLanes;
  const int64_t rest = num_experts - whole;
  for (int64_t expert = 0; expert < whole; expert += kLanes) store(left + expert, load(logits + expert));
  if (rest > 0) store(left + whole, load(logits + whole, rest), rest);
  for (int64_t rank = 0; rank < k; ++rank) {
    Vec best = broadcast(-INFINITY);
    Vec best_id = zeros();
    Vec id = lane_numbers();
    for (int64_t expert = 0; expert < whole; expert += kLanes) {
      keep_greater(load(left + expert), id, best, best_id);
      id = add(id, broadcast(float(kLanes)));
    }
    if (rest > 0) {
      keep_greater(keep_lanes(load(left + whole, rest), 0, rest, -INFINITY), id, best, best_id);
    }
    const float most = max_lanes(best);
    // Only minus infinity and NaN are left.
    if (most == -INFINITY) return choose_experts(logits, num_experts, rank, k, ids);
    const Vec among = where_equal(best, broadcast(most), sub(zeros(), best_id), broadcast(-INFINITY));
    ids[rank] = int32_t(-max_lanes(among));
    left[ids[rank]] = NAN;
  }
}

void route(const float* logits, int64_t num_experts, int64_t k, bool renormalize, int32_t* ids,
           float* weights, float* scratch) {
  choose_experts_in_lanes(logits, num_experts, k, ids, scratch);
  const Vec most = broadcast(logits[ids[0]]);
  Vec sum = zeros();
  for (int64_t expert = 0; expert < num_experts; expert += kLanes) {
    const int64_t n = num_experts - expert < kLanes ? num_experts - expert : kLanes;
    const Vec scores = keep_lanes(exp(sub(load(logits + expert, n), most)), 0, n, 0.0f);
    sum = add(sum, scores);
    store(scratch + expert, scores, n);
  }
  weigh_choice(scratch, sum_lanes(sum), k, renormalize, ids, weights);
}

#endif

}  // namespace
}  // namespace argosy
