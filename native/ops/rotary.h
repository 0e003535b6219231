// rotary.h: angles of the rotary position embedding (arXiv:2104.09864).
#pragma once

#include <cstdint>
#include <vector>

#include "ops/runtime.h"

namespace argosy {

// From one position to the next, a pair of dimensions rotates by its inverse frequency, in radians; `scale`
// multiplies the cosines and sines.
struct Rotary {
  std::vector<double> inverse_frequency;
  double scale = 1;
  bool is_interleaved = false;  // dimension 2 i pairs with 2 i + 1, not with i + num_pairs

  int64_t num_pairs() const { return int64_t(inverse_frequency.size()); }
};

// cosine and sine [num_tokens][num_pairs]
void rotary_angles(Runtime& runtime, const Rotary& rotary, const int32_t* positions, int64_t num_tokens,
                   float* cosine, float* sine);

}  // namespace argosy
