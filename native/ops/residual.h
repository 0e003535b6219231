// residual.h: residual streams: each token has several hidden states, which every sublayer (a mixer, or the
// networks) reads through weights and writes to through others.
//
//   Residual residual(runtime, rule, hidden, norm_eps);
//   residual.use(buffers);
//   residual.begin(embeddings, num_tokens);
//   for each sublayer: residual.read(mix, x);  out = sublayer(norm(x));  residual.write(out);
//   residual.finish(x);  // for the final norm and the head
//
// Everything is float32. A token's sums have a fixed order, whatever tokens are beside it.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "ops/matmul.h"
#include "ops/runtime.h"

namespace argosy {

// Manifold-constrained hyper-connections (arXiv:2512.24880). With n streams, of which f is the concatenation
// after an RMSNorm without weight, and [a, b, c] = matrix f of n, n and n * n rows:
//
//   input weights   sigmoid(a scale[0] + base) + eps
//   output weights  2 sigmoid(b scale[1] + base)
//   stream weights  rows of softmax(c scale[2] + base) + eps; then columns and rows are divided by their
//   sums,
//                   columns first and last, `iterations` times
//
//   x = sum over i of input[i] stream[i]    stream[j] = output[j] out + sum over i of streams[i][j] stream[i]
//
// Without iterations (independent hyper-connections, Hy4), there are no stream weights, each stream stays as
// it is but for `output[j] out`, and output weights are magnitude sigmoid(b scale[1] + base) + eps.
struct SinkhornMix {
  MatrixView matrix;   // [n (2 + n), n * hidden], or [2 n, ...]; before the head [n, ...]: input weights only
  const float* base;   // one for each row
  const float* scale;  // [3], or [2]; before the head [1]
};

// Gated residual streams (Qwen3.8). With f the streams after an RMSNorm each:
//
//   x = mean over i of sigmoid(up silu(down f / n))[i] f[i]    stream[j] += 2 sigmoid(inject f / n)[j] out
struct GatedMix {
  const float* norm;                 // [n * hidden]
  MatrixView down, up;               // [rank, n * hidden] and [n * hidden, rank]
  std::optional<MatrixView> inject;  // [n, n * hidden]; none before the head
};

// A bank of earlier hidden states (Kimi-K3, arXiv:2607.24653). The first stream is the hidden state, and the
// others are those that sublayers which start a block have banked. With p the softmax of
// weight . RMSNorm(stream[i]):
//
//   x = sum over i of p[i] stream[i]; without a bank stream[0]
//   stream[0] += out; if the sublayer starts a block, stream[0] goes to the bank, and out takes its place
struct BankMix {
  const float* weight;  // [hidden]
  bool starts_block;
};

// Before the head: the mean of the streams; or the sum with the input weights that the last sublayer left.
struct MeanMix {};
struct CarriedMix {};

using StreamMix = std::variant<SinkhornMix, GatedMix, BankMix, MeanMix, CarriedMix>;

struct ResidualRule {
  int64_t num_streams = 1;  // 1: none of what follows applies
  // Of SinkhornMix.
  int64_t iterations = 0;
  float eps = 0, magnitude = 2;
  // The input weights of a sublayer are for the next one; those of the first are [1, 0, ...].
  bool is_lagged = false;
  StreamMix head = MeanMix{};

  bool mixes_streams() const { return iterations > 0; }
};

struct ResidualSizes {
  int64_t num_streams = 1;
  int64_t weights = 0;  // the most rows of a matrix that gives weights
  int64_t rank = 0;     // of GatedMix; 0: none
};

// Each has room for max_tokens rows.
struct ResidualBuffers {
  float* streams;  // [num_streams][hidden]
  float* weights;  // [weights], of the current sublayer
  float* peeked;   // [weights]
  float* carried;  // [num_streams], input weights
  float* normed;   // [num_streams][hidden], with a rank
  float* gates;    // [num_streams][hidden], with a rank
  float* low;      // [rank]
  float* ahead;    // [num_streams][hidden], with a SinkhornMix; others may use it between peeks
};

class Residual {
 public:
  Residual(Runtime& runtime, const ResidualRule& rule, int64_t hidden, float norm_eps)
      : runtime_(runtime), rule_(rule), hidden_(hidden), norm_eps_(norm_eps) {}

  bool has_streams() const { return rule_.num_streams > 1; }
  float* streams() { return buffers_.streams; }  // [num_tokens][num_streams][hidden]
  void use(const ResidualBuffers& buffers) { buffers_ = buffers; }

  // Every stream of a token is its row of x [num_tokens][hidden]; a bank is empty.
  void begin(const float* x, int64_t num_tokens);
  // Computes what a sublayer reads [num_tokens][hidden]. `mix` must live until write().
  void read(const StreamMix& mix, float* x);
  // Computes what the last of `sublayers` would read if these followed the current one, and neither it nor
  // those before the last gave anything: streams are mixed all the same.
  void peek(const std::vector<const StreamMix*>& sublayers, float* x);
  // Writes what a sublayer gives [num_tokens][hidden].
  void write(const float* out);
  void finish(float* x) { read(rule_.head, x); }
  // Between two sublayers: leaves these tokens, in ascending order.
  void keep(const std::vector<int64_t>& tokens);

  // The mean of the streams; with a bank, the hidden state.
  void mean(float* x) const;
  // Adds vectors [num_rows][hidden] to every stream of these tokens; with a bank, to the hidden state.
  void add(const int64_t* rows, int64_t num_rows, const float* vectors);

 private:
  void compute(const StreamMix& mix, float* weights, float* x);
  void weigh(const SinkhornMix& mix, const float* streams, float* weights);
  void pass(const SinkhornMix& mix, const float* weights, const float* from);
  void start_block();
  void weigh_bank(const BankMix& mix, float* weights) const;
  void weigh_sums(const float* streams, const float* weights, int64_t stride, int64_t num_streams,
                  float* x) const;
  bool has_bank() const { return std::holds_alternative<BankMix>(rule_.head); }
  // The streams that are written together.
  int64_t num_written() const { return has_bank() ? 1 : rule_.num_streams; }
  void read_gated(const GatedMix& mix, float* weights, float* x);

  Runtime& runtime_;
  ResidualRule rule_;
  int64_t hidden_;
  float norm_eps_;
  ResidualBuffers buffers_ = {};
  int64_t num_tokens_ = 0;
  int64_t num_banked_ = 0;
  const StreamMix* mix_ = nullptr;
};

}  // namespace argosy
