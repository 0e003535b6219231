// rotary.h: angles of the rotary position embedding (arXiv:2104.09864).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/runtime.h"

namespace argosy {

// From one position to the next, a pair of dimensions rotates by its inverse frequency, in radians; `scale`
// multiplies the cosines and sines. Positions may have several axes, such as time, row and column of a
// picture (m-rope, arXiv:2409.12191); each pair then rotates by its position on one of them.
struct Rotary {
  std::vector<double> inverse_frequency;
  double scale = 1;
  bool is_interleaved = false;     // dimension 2 i pairs with 2 i + 1, not with i + num_pairs
  std::vector<int32_t> axes = {};  // the axis of each pair; empty: all of them rotate on axis 0

  int64_t num_pairs() const { return int64_t(inverse_frequency.size()); }
  int64_t num_axes() const { return axes.empty() ? 1 : *std::max_element(axes.begin(), axes.end()) + 1; }
};

// Writes cosine and sine [num_tokens][num_pairs] from positions [num_tokens], the same on every axis.
void rotary_angles(Runtime& runtime, const Rotary& rotary, const int32_t* positions, int64_t num_tokens,
                   float* cosine, float* sine);
// The same from positions [rotary.num_axes() or more][num_tokens].
void rotary_angles(Runtime& runtime, const Rotary& rotary, const float* positions, int64_t num_tokens,
                   float* cosine, float* sine);

}  // namespace argosy
