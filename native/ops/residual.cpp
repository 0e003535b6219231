#include "ops/residual.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "ops/layer.h"
#include "ops/rows.h"

namespace argosy {

namespace {

constexpr int64_t kMostStreams = 16;
constexpr int64_t kPartialSums = 16;
constexpr int64_t kBlock = 64;  // elements of all streams that are mixed at once

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// Of n numbers: partial sums of every sixteenth, then their sum, so that the order is the same everywhere.
float dot(const float* a, const float* b, int64_t n) {
  std::array<float, kPartialSums> sums = {};
  int64_t i = 0;
  for (; i + kPartialSums <= n; i += kPartialSums)
    for (int64_t j = 0; j < kPartialSums; ++j) sums[size_t(j)] += a[i + j] * b[i + j];
  for (; i < n; ++i) sums[size_t(i % kPartialSums)] += a[i] * b[i];
  float sum = 0;
  for (const float part : sums) sum += part;
  return sum;
}

float mean_square(const float* x, int64_t n) { return dot(x, x, n) / float(n); }

// Divides the columns of m [n][n] by their sums.
void divide_columns(float* m, int64_t n, float eps) {
  for (int64_t j = 0; j < n; ++j) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += m[i * n + j];
    for (int64_t i = 0; i < n; ++i) m[i * n + j] /= sum + eps;
  }
}

void divide_rows(float* m, int64_t n, float eps) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += m[i * n + j];
    for (int64_t j = 0; j < n; ++j) m[i * n + j] /= sum + eps;
  }
}

// The weights of one token, in place.
void sinkhorn(float* raw, const SinkhornMix& mix, int64_t n, const ResidualRule& rule) {
  const float *base = mix.base, *scale = mix.scale;
  for (int64_t i = 0; i < n; ++i) raw[i] = sigmoid(raw[i] * scale[0] + base[i]) + rule.eps;
  if (mix.matrix.rows == n) return;
  const float least = rule.mixes_streams() ? 0 : rule.eps;
  for (int64_t i = n; i < 2 * n; ++i) raw[i] = rule.magnitude * sigmoid(raw[i] * scale[1] + base[i]) + least;
  if (!rule.mixes_streams()) return;
  float* m = raw + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    float* row = m + i * n;
    for (int64_t j = 0; j < n; ++j) row[j] = row[j] * scale[2] + base[2 * n + i * n + j];
    const float most = *std::max_element(row, row + n);
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += row[j] = std::exp(row[j] - most);
    for (int64_t j = 0; j < n; ++j) row[j] = row[j] / sum + rule.eps;
  }
  divide_columns(m, n, rule.eps);
  for (int64_t pass = 1; pass < rule.iterations; ++pass) {
    divide_rows(m, n, rule.eps);
    divide_columns(m, n, rule.eps);
  }
}

// What a sublayer that gives `out` [hidden], or zeros if it is nullptr, makes of the streams of one token.
// `to` may be `from`.
void mix_streams(const float* weights, int64_t n, int64_t hidden, const float* from, const float* out,
                 float* to) {
  const float *post = weights + n, *mixed = weights + 2 * n;
  float old[kMostStreams][kBlock];
  for (int64_t first = 0; first < hidden; first += kBlock) {
    const int64_t count = std::min(kBlock, hidden - first);
    for (int64_t i = 0; i < n; ++i) std::copy_n(from + i * hidden + first, count, old[i]);
    for (int64_t j = 0; j < n; ++j) {
      float* row = to + j * hidden + first;
      for (int64_t d = 0; d < count; ++d) row[d] = out != nullptr ? post[j] * out[first + d] : 0.0f;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < count; ++d) row[d] += mixed[i * n + j] * old[i][d];
    }
  }
}

}  // namespace

void Residual::begin(const float* x, int64_t num_tokens) {
  const int64_t n = rule_.num_streams;
  num_tokens_ = num_tokens;
  num_banked_ = 0;
  mix_ = nullptr;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens, n * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t i = 0; i < num_written(); ++i)
        std::copy_n(x + token * hidden_, hidden_, buffers_.streams + (token * n + i) * hidden_);
      std::fill_n(buffers_.carried + token * n, n, 0.0f);
      buffers_.carried[token * n] = 1;
    }
  });
}

void Residual::keep(const std::vector<int64_t>& tokens) {
  const int64_t n = rule_.num_streams;
  move_up(tokens, n * hidden_, buffers_.streams);
  move_up(tokens, n, buffers_.carried);
  num_tokens_ = int64_t(tokens.size());
}

void Residual::read(const StreamMix& mix, float* x) {
  const int64_t n = rule_.num_streams;
  mix_ = &mix;
  if (!rule_.is_lagged || !std::holds_alternative<SinkhornMix>(mix)) {
    compute(mix, buffers_.weights, x);
    if (const auto* bank = std::get_if<BankMix>(&mix); bank != nullptr && bank->starts_block) start_block();
    return;
  }
  const auto& own = std::get<SinkhornMix>(mix);
  weigh(own, buffers_.streams, buffers_.weights);
  weigh_sums(buffers_.streams, buffers_.carried, n, n, x);
  for (int64_t token = 0; token < num_tokens_; ++token)
    std::copy_n(buffers_.weights + token * own.matrix.rows, n, buffers_.carried + token * n);
}

void Residual::compute(const StreamMix& mix, float* weights, float* x) {
  if (const auto* own = std::get_if<SinkhornMix>(&mix)) {
    weigh(*own, buffers_.streams, weights);
    weigh_sums(buffers_.streams, weights, own->matrix.rows, rule_.num_streams, x);
  } else if (const auto* gated = std::get_if<GatedMix>(&mix)) {
    read_gated(*gated, weights, x);
  } else if (std::holds_alternative<CarriedMix>(mix)) {
    weigh_sums(buffers_.streams, buffers_.carried, rule_.num_streams, rule_.num_streams, x);
  } else if (const auto* bank = std::get_if<BankMix>(&mix)) {
    weigh_bank(*bank, weights);
    weigh_sums(buffers_.streams, weights, rule_.num_streams, 1 + num_banked_, x);
  } else {
    mean(x);
  }
}

void Residual::peek(const std::vector<const StreamMix*>& sublayers, float* x) {
  if (!std::holds_alternative<SinkhornMix>(*sublayers.back())) {
    compute(*sublayers.back(), buffers_.peeked, x);  // nothing else mixes streams
    return;
  }
  const float *streams = buffers_.streams, *weights = buffers_.weights;
  const StreamMix* mix = mix_;
  for (const StreamMix* next : sublayers) {
    if (const auto* own = std::get_if<SinkhornMix>(mix); own != nullptr && rule_.mixes_streams()) {
      pass(*own, weights, streams);
      streams = buffers_.ahead;
    }
    if (rule_.is_lagged && next == sublayers.back()) break;  // it has the weights of the one before
    mix = next;
    if (const auto* own = std::get_if<SinkhornMix>(next)) {
      weigh(*own, streams, buffers_.peeked);
      weights = buffers_.peeked;
    }
  }
  const auto* last = std::get_if<SinkhornMix>(mix);
  weigh_sums(streams, weights, last->matrix.rows, rule_.num_streams, x);
}

void Residual::weigh(const SinkhornMix& mix, const float* streams, float* weights) {
  const int64_t n = rule_.num_streams, cols = n * hidden_, rows = mix.matrix.rows;
  matmul(runtime_, {{mix.matrix, weights}}, streams, num_tokens_);
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* raw = weights + token * rows;
      const float scale = 1 / std::sqrt(mean_square(streams + token * cols, cols) + norm_eps_);
      for (int64_t row = 0; row < rows; ++row) raw[row] *= scale;
      sinkhorn(raw, mix, n, rule_);
    }
  });
}

void Residual::weigh_bank(const BankMix& mix, float* weights) const {
  const int64_t n = rule_.num_streams, count = 1 + num_banked_;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, 2 * count * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const float* streams = buffers_.streams + token * n * hidden_;
      float* scores = weights + token * n;
      for (int64_t i = 0; i < count; ++i) {
        const float* stream = streams + i * hidden_;
        const float rms = std::sqrt(mean_square(stream, hidden_) + norm_eps_);
        scores[i] = dot(stream, mix.weight, hidden_) / rms;
      }
      const float most = *std::max_element(scores, scores + count);
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += scores[i] = std::exp(scores[i] - most);
      for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
    }
  });
}

// Moves the hidden state to the bank, and leaves zeros for what the sublayer gives.
void Residual::start_block() {
  const int64_t n = rule_.num_streams;
  ++num_banked_;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, 2 * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* streams = buffers_.streams + token * n * hidden_;
      std::copy_n(streams, hidden_, streams + num_banked_ * hidden_);
      std::fill_n(streams, hidden_, 0.0f);
    }
  });
}

// x = sum over the first streams of weights[i] stream[i]; weights of a token are `stride` floats apart.
void Residual::weigh_sums(const float* streams, const float* weights, int64_t stride, int64_t num_streams,
                          float* x) const {
  const int64_t n = rule_.num_streams;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, n * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const float* own = streams + token * n * hidden_;
      float* out = x + token * hidden_;
      for (int64_t d = 0; d < hidden_; ++d) out[d] = weights[token * stride] * own[d];
      for (int64_t i = 1; i < num_streams; ++i) {
        const float weight = weights[token * stride + i];
        for (int64_t d = 0; d < hidden_; ++d) out[d] += weight * own[i * hidden_ + d];
      }
    }
  });
}

void Residual::read_gated(const GatedMix& mix, float* weights, float* x) {
  const int64_t n = rule_.num_streams, cols = n * hidden_, rank = mix.down.rows;
  float *normed = buffers_.normed, *low = buffers_.low, *gates = buffers_.gates;
  rms_norm(runtime_, buffers_.streams, mix.norm, norm_eps_, num_tokens_ * n, hidden_, normed, n);
  std::vector<Product> products = {{mix.down, low}};
  if (mix.inject) products.push_back({*mix.inject, weights});
  matmul(runtime_, products, normed, num_tokens_);
  const KernelTable& kernels = runtime_.kernels();
  const auto lock = runtime_.lock();
  for (int64_t i = 0; i < num_tokens_ * rank; ++i) low[i] /= float(n);
  kernels.silu(num_tokens_ * rank, low);
  for (int64_t i = 0; mix.inject && i < num_tokens_ * n; ++i) weights[i] = 2 * sigmoid(weights[i] / float(n));
  matmul(runtime_, {{mix.up, gates}}, low, num_tokens_);
  runtime_.parallel_for(num_tokens_, 4 * cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float *out = x + token * hidden_, *stream = normed + token * cols;
      kernels.mul_gate(GateKind::sigmoid, gates + token * cols, 1, cols, stream);
      std::copy_n(stream, hidden_, out);
      for (int64_t i = 1; i < n; ++i) {
        stream += hidden_;
        for (int64_t d = 0; d < hidden_; ++d) out[d] += stream[d];
      }
      for (int64_t d = 0; d < hidden_; ++d) out[d] /= float(n);
    }
  });
}

void Residual::write(const float* out) {
  const int64_t n = rule_.num_streams;
  const auto* sinkhorn_mix = std::get_if<SinkhornMix>(mix_);
  const bool is_bank = std::holds_alternative<BankMix>(*mix_);
  const int64_t stride = sinkhorn_mix != nullptr ? sinkhorn_mix->matrix.rows : n;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, n * n * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* streams = buffers_.streams + token * n * hidden_;
      const float *weights = buffers_.weights + token * stride, *given = out + token * hidden_;
      if (is_bank) {
        for (int64_t d = 0; d < hidden_; ++d) streams[d] += given[d];
        continue;
      }
      if (sinkhorn_mix == nullptr || !rule_.mixes_streams()) {
        const float* own = sinkhorn_mix != nullptr ? weights + n : weights;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t d = 0; d < hidden_; ++d) streams[i * hidden_ + d] += own[i] * given[d];
        continue;
      }
      mix_streams(weights, n, hidden_, streams, given, streams);
    }
  });
}

// Mixes the streams `from` into `ahead`, which may be the same, as if the sublayer gave zeros.
void Residual::pass(const SinkhornMix& mix, const float* weights, const float* from) {
  const int64_t n = rule_.num_streams;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, n * n * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t at = token * n * hidden_;
      mix_streams(weights + token * mix.matrix.rows, n, hidden_, from + at, nullptr, buffers_.ahead + at);
    }
  });
}

void Residual::mean(float* x) const {
  const int64_t n = rule_.num_streams, count = num_written();
  const auto lock = runtime_.lock();
  runtime_.parallel_for(num_tokens_, n * hidden_, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const float* streams = buffers_.streams + token * n * hidden_;
      for (int64_t d = 0; d < hidden_; ++d) {
        float sum = streams[d];
        for (int64_t i = 1; i < count; ++i) sum += streams[i * hidden_ + d];
        x[token * hidden_ + d] = sum / float(count);
      }
    }
  });
}

void Residual::add(const int64_t* rows, int64_t num_rows, const float* vectors) {
  const int64_t n = rule_.num_streams;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t i = 0; i < num_written(); ++i) {
      float* stream = buffers_.streams + (rows[row] * n + i) * hidden_;
      for (int64_t d = 0; d < hidden_; ++d) stream[d] += vectors[row * hidden_ + d];
    }
  }
}

}  // namespace argosy
