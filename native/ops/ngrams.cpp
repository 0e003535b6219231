#include "ops/ngrams.h"

#include <algorithm>
#include <cmath>

#include "ops/layer.h"

namespace argosy {

namespace {

constexpr int64_t kLanes = 16;
constexpr float kLeastDot = 1e-6f;  // before the square root

// The sum of value(i) for i from 0 to n - 1, lane by lane, so that every instruction set adds in one order.
template <class Value>
float sum_of(int64_t n, const Value& value) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += value(i + lane);
  }
  for (; i < n; ++i) lanes[i % kLanes] += value(i);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

float inverse_rms(const float* x, int64_t n, float eps) {
  const float squares = sum_of(n, [&](int64_t i) { return x[i] * x[i]; });
  return 1 / std::sqrt(squares / float(n) + eps);
}

float gate_of(float dot) {
  const float root = std::sqrt(std::max(std::fabs(dot), kLeastDot));
  return 1 / (1 + std::exp(dot == 0 ? 0 : std::copysign(root, -dot)));
}

}  // namespace

void add_ngrams(Runtime& runtime, const Ngrams& ngrams, float eps, const float* rows, int64_t num_tokens,
                RecurrentState* state, const std::vector<StateRun>& runs, float* scratch, float* hidden) {
  const int64_t size = ngrams.hidden(), streams = ngrams.streams(), channels = streams * size;
  float *gated = scratch, *value = scratch + num_tokens * channels;
  matmul(runtime, {{ngrams.key, gated}, {ngrams.value, value}}, rows, num_tokens);
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens * streams, 8 * size, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float *key = gated + i * size, *stream = hidden + i * size;
      const float* key_norm = ngrams.key_norm + i % streams * size;
      const float* query_norm = ngrams.query_norm + i % streams * size;
      const float* added = value + i / streams * size;
      const float scale =
          inverse_rms(key, size, eps) * inverse_rms(stream, size, eps) / std::sqrt(float(size));
      const float dot =
          sum_of(size, [&](int64_t j) { return key[j] * key_norm[j] * (stream[j] * query_norm[j]); });
      const float gate = gate_of(dot * scale);
      for (int64_t j = 0; j < size; ++j) {
        key[j] = gate * added[j];
        stream[j] += key[j];
      }
    }
  });
  if (!ngrams.conv) return;
  rms_norm(runtime, gated, ngrams.conv_norm, eps, num_tokens * streams, size, gated, streams);
  causal_conv(runtime, *state, ngrams.state_layer, *ngrams.conv, {gated, nullptr, nullptr, channels}, runs,
              {gated, channels});
  runtime.parallel_for(num_tokens, channels, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * channels; i < end * channels; ++i) hidden[i] += gated[i];
  });
}

}  // namespace argosy
