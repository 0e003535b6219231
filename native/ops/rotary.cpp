#include "ops/rotary.h"

#include <cmath>

namespace argosy {

namespace {

// position_of(token, pair) is a position as float64.
template <class PositionOf>
void write_angles(Runtime& runtime, const Rotary& rotary, int64_t num_tokens, float* cosine, float* sine,
                  const PositionOf& position_of) {
  const int64_t pairs = rotary.num_pairs();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, pairs * 256, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < pairs; ++i) {
        // In float64: at position 32768 a float32 angle is off by up to 0.001 rad.
        const double angle = position_of(t, i) * rotary.inverse_frequency[size_t(i)];
        cosine[t * pairs + i] = float(rotary.scale * std::cos(angle));
        sine[t * pairs + i] = float(rotary.scale * std::sin(angle));
      }
    }
  });
}

}  // namespace

void rotary_angles(Runtime& runtime, const Rotary& rotary, const int32_t* positions, int64_t num_tokens,
                   float* cosine, float* sine) {
  write_angles(runtime, rotary, num_tokens, cosine, sine,
               [&](int64_t token, int64_t) { return double(positions[token]); });
}

void rotary_angles(Runtime& runtime, const Rotary& rotary, const float* positions, int64_t num_tokens,
                   float* cosine, float* sine) {
  write_angles(runtime, rotary, num_tokens, cosine, sine, [&](int64_t token, int64_t pair) {
    const int64_t axis = rotary.axes.empty() ? 0 : rotary.axes[size_t(pair)];
    return double(positions[axis * num_tokens + token]);
  });
}

}  // namespace argosy
