#include "ops/rotary.h"

#include <cmath>

namespace argosy {

void rotary_angles(Runtime& runtime, const Rotary& rotary, const int32_t* positions, int64_t num_tokens,
                   float* cosine, float* sine) {
  const int64_t pairs = rotary.num_pairs();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, pairs * 256, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < pairs; ++i) {
        // In float64: at position 32768 a float32 angle is off by up to 0.001 rad.
        const double angle = double(positions[t]) * rotary.inverse_frequency[size_t(i)];
        cosine[t * pairs + i] = float(rotary.scale * std::cos(angle));
        sine[t * pairs + i] = float(rotary.scale * std::sin(angle));
      }
    }
  });
}

}  // namespace argosy
