// stack.h: the layers of a decoder, run on a batch without Python between them.
//
//   Stack stack(runtime, kv, description, buffers);
//   stack.begin(batch);
//   while (true) {
//     switch (stack.advance(50ms)) {
//       case Pause::time: continue;      // look for ^C, for instance
//       case Pause::done: return;        // batch.logits is written
//       case Pause::experts: ...         // lease demand().expert_ids, run_shared(), and
//                                        // run_experts() as they land
//     }
//   }
//
// A step pauses for experts at every layer that has routed ones, or never where all of them are in memory for
// good. Each call is one or more operations of ops/, so the bits are those of the operations called one by
// one: for one row and one token the order of sums is fixed, and every assignment (one token, one of its
// experts) has a row of its own until `combine` adds them in the router's order.
//
// A new kind of mixer or feed-forward network is another alternative of `Mixer` or `Ffn` and one more
// overload of `mix` or `feed_forward`.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "ops/attention.h"
#include "ops/gated_delta.h"
#include "ops/latent_attention.h"
#include "ops/matmul.h"
#include "ops/rotary.h"
#include "ops/runtime.h"
#include "ops/swiglu.h"

namespace argosy {

// Grouped-query attention (arXiv:2305.13245): q, k, v -> rotary -> KV cache -> attention -> output
// projection.
struct GroupedQueryAttention {
  MatrixView query;                   // [num_heads * head_dim, hidden]
  MatrixView key, value;              // [kv_heads * head_dim, hidden]
  MatrixView output;                  // [hidden, num_heads * head_dim]
  const float* query_bias = nullptr;  // one per row of the matrix; nullptr: none
  const float* key_bias = nullptr;
  const float* value_bias = nullptr;
  const float* output_bias = nullptr;
  const float* query_norm = nullptr;  // before rotary: [head_dim], of each head, or one per row of the matrix
  const float* key_norm = nullptr;    //   where it is flat, over all heads at once; nullptr: none
  bool is_norm_flat = false;
  float limit = 0;               // q, k and v are cut off at both signs of it, behind the norm; 0: not
  const float* sinks = nullptr;  // [num_heads], a score that takes weight and adds nothing; nullptr: none
  int64_t num_heads = 0;
  int64_t window = 0;  // a token sees its last `window` positions; 0: all
  float scale = 0;     // of the scores
  // query has rows [query, gate] of each head; what a head saw is taken times sigmoid of its gate
  bool has_gate = false;
};

// A gated delta net (arXiv:2412.06464): a recurrent state per sequence instead of keys and values. Rows of
// the projections lie part by part (q of all key heads, k, v; z; b; a), or key head by key head, with the
// value heads that share it: [q, k, v, z] of each in one matrix, [b, a] in another.
struct GatedDeltaNet {
  MatrixView qkv;               // [conv_channels, hidden]; with z: and value_channels
  std::optional<MatrixView> z;  // [value_channels, hidden]
  MatrixView b;                 // [value_heads, hidden]; with a: twice as many
  std::optional<MatrixView> a;  // [value_heads, hidden]
  MatrixView output;            // [hidden, value_channels]
  DeltaShape shape = {};
  DeltaWeights weights = {};  // eps is the stack's
  int64_t state_layer = 0;    // of the recurrent state
};

// Multi-head latent attention (arXiv:2405.04434): compressed query and compressed keys and values -> norms ->
// rotary of the dimensions that turn -> KV cache -> attention -> output projection.
struct LatentAttention {
  std::optional<MatrixView> query_down;  // [query_rank, hidden]; none: `query` takes the hidden state
  const float* query_norm = nullptr;     // [query_rank], with query_down
  MatrixView query;                      // [num_heads * (nope_dim + rope_dim), query_rank or hidden]
  MatrixView kv_down;                    // [kv_rank + rope_dim, hidden]
  const float* kv_norm = nullptr;        // [kv_rank]
  LatentHeads heads;
  MatrixView output;  // [hidden, num_heads * value_dim]
  float norm_eps = 0;
};

using Mixer = std::variant<GroupedQueryAttention, LatentAttention, GatedDeltaNet>;

struct DenseFfn {
  ExpertView network;
};

struct Router {
  MatrixView matrix;            // [num_experts, hidden]
  const float* bias = nullptr;  // [num_experts], of the product; nullptr: none
  RouteRule rule = {};
};

// Runs for every token.
struct SharedExpert {
  ExpertView network;
  std::optional<MatrixView> score;  // [1, hidden]: the output is taken times sigmoid(score . x)
};

// Biases of all routed experts of a layer; nullptr: none.
struct ExpertBiases {
  const float *gate = nullptr, *up = nullptr;  // [num_experts, width]
  const float* down = nullptr;                 // [num_experts, hidden]
};

struct RoutedFfn {
  Router router;
  int64_t width = 0;              // of an expert
  std::array<Format, 3> formats;  // of gate, up and down of every expert of the layer
  ExpertBiases biases = {};
  std::optional<SharedExpert> shared;
  std::vector<ExpertView> resident;  // of all experts, biases not set; empty where they are leased
};

using Ffn = std::variant<DenseFfn, RoutedFfn>;

struct Layer {
  const float* mixer_norm;  // [hidden]
  Mixer mixer;
  const float* ffn_norm;  // [hidden]
  Ffn ffn;
};

struct StackDescription {
  MatrixView embedding, head;  // [vocabulary, hidden]
  const float* final_norm;     // [hidden]
  float norm_eps;
  Rotary rotary;
  Activation activation;  // of all feed-forward networks
  bool experts_off;       // leave routed experts out of every sum
  std::vector<Layer> layers;
};

// Room for max_tokens rows of each.
struct StackBuffers {
  int64_t max_tokens;
  float *hidden, *normed, *block;  // [hidden]; `block` is what a block adds to the hidden state
  float* query;                    // [num_heads * head_dim]
  float* attended;                 // [num_heads * value_dim]; [value_channels] of a delta net
  float *key, *value;              // [kv_heads * head_dim]; key [kv_rank + rope_dim]
  float* query_latent;             // [query_rank]
  float* projected;                // query and gate of gated heads; q, k, v and z of a delta net
  float* delta_gates;              // [2 * value_heads]
  float *cosine, *sine;            // [pairs]
  float* router_logits;            // [num_experts]
  float* routing_weights;          // [k]
  int32_t* expert_ids;             // [k]
  float* shared_score;             // [1]
  float* expert_out;               // [k * hidden]
  int32_t *assignment, *group_token, *group_row;  // [k]
};

// What one step runs. All numbers are in range, and all memory stays until the step is done.
struct StepBatch {
  int64_t num_tokens;
  const int32_t* token_ids;
  const int32_t* position;
  const int32_t* sequence;  // a row of block_table
  const int64_t* slots;     // where keys and values go
  const bool* is_decode;    // false: a prompt token
  const int32_t* block_table;
  int64_t max_blocks;
  const int32_t* state_slots;  // of the recurrent state, for each row of block_table; nullptr without one
  const int64_t* last_rows;    // [num_last], rows whose logits are wanted; at most max_tokens
  int64_t num_last;
  float* logits;  // [num_last][vocabulary]
};

// The experts a layer waits for, ascending; `scan` are those that only prompt tokens chose.
struct Demand {
  int64_t layer;
  std::vector<int32_t> expert_ids, scan;
};

// Where the time of a step goes.
enum class Part { router, attention_and_dense, expert_compute };
constexpr int kNumParts = 3;

enum class Pause { done, experts, time };

class Stack {
 public:
  // The memory behind the views, the KV cache and the recurrent state (nullptr: no layer has one) outlive the
  // stack. Sizes agree.
  Stack(Runtime& runtime, KvCache& kv, RecurrentState* recurrent, StackDescription description,
        const StackBuffers& buffers);

  // Starts a step, whatever became of the one before. With a recurrent state, throws std::invalid_argument
  // where tokens of a sequence are not consecutive, or do not go on where its slot stands.
  void begin(const StepBatch& batch);

  // Runs on until the step is done, a layer waits for experts, or `slice` has passed.
  // Throws std::invalid_argument when a layer waited and not all of its experts were run.
  Pause advance(std::chrono::nanoseconds slice);

  // After Pause::experts, and before the next advance(): the shared expert, if there is one; and routed
  // experts of the demand, each once, as they come. Throw std::invalid_argument when no layer waits, or for
  // an expert not asked for.
  const Demand& demand() const;
  // What the next layer with routed experts would choose if the present layer and the mixer between them
  // added nothing: by rank, the experts that a token ranks there and none ranks higher. Empty where no such
  // layer follows. Throws std::invalid_argument once experts of the demand have run: it works in their
  // memory.
  std::vector<std::vector<int32_t>> look_ahead();
  void run_shared();
  void run_experts(const std::vector<int32_t>& expert_ids, const std::vector<ExpertView>& experts);

  // Logits [num_rows][vocabulary] of rows of the batch that was run, at most max_tokens.
  void logits(const int64_t* rows, int64_t num_rows, float* out);

  const StackDescription& description() const { return description_; }
  int64_t max_tokens() const { return buffers_.max_tokens; }
  const KvCache& kv() const { return kv_; }
  const RecurrentState* recurrent() const { return recurrent_; }

  // Seconds by Part, and look-ups of resident experts, since the last time they were taken.
  std::array<double, kNumParts> take_seconds();
  int64_t take_lookups();

  // How often each expert was chosen since the last time this was taken, [layers][most experts of a layer].
  std::vector<int64_t> take_uses();
  int64_t most_experts() const { return int64_t(next_.size()); }

 private:
  using Clock = std::chrono::steady_clock;
  enum class Stage { begun, between_layers, waits_for_experts, done };

  void mix(const GroupedQueryAttention& attention);
  void mix(const GatedDeltaNet& net);
  void begin_runs();
  void add_block(const MatrixView& output, const float* bias);
  void mix(const LatentAttention& attention);
  bool feed_forward(const DenseFfn& ffn);  // false: it waits for experts
  bool feed_forward(const RoutedFfn& ffn);
  void choose(const Router& router, const float* x, int32_t* ids, float* weights);
  void dispatch(const RoutedFfn& ffn);
  void add_shared(const RoutedFfn& ffn);
  void run_group(const std::vector<int32_t>& expert_ids);
  void combine_experts(const RoutedFfn& ffn);
  void norm(const float* weight);
  const RoutedFfn& routed_ffn() const;  // of the layer that runs
  void require_waiting() const;
  bool claim(int32_t expert);
  void start_clock() { last_mark_ = Clock::now(); }
  void mark(Part part);

  Runtime& runtime_;
  KvCache& kv_;
  RecurrentState* recurrent_;
  StackDescription description_;
  StackBuffers buffers_;

  StepBatch batch_ = {};
  std::vector<DeltaRun> runs_;  // of the batch, where there is a recurrent state
  Stage stage_ = Stage::done;
  int64_t layer_ = 0;
  Demand demand_ = {};
  std::vector<int32_t> starts_;     // [experts + 1]: where an expert's part of buffers_.assignment begins
  std::vector<int32_t> next_;       // [experts]: while it is filled
  std::vector<bool> decode_wants_;  // [experts]
  std::vector<bool> is_claimed_;    // [experts]
  int64_t num_unclaimed_ = 0;       // experts of the demand that were not run yet
  std::vector<int32_t> group_starts_;
  std::vector<ExpertView> group_;

  Clock::time_point last_mark_;
  std::array<double, kNumParts> seconds_ = {};
  int64_t lookups_ = 0;
  std::vector<int64_t> uses_;
};

}  // namespace argosy
