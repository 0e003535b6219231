// stack.h: the layers of a decoder, run on the tokens of a step without Python between them.
//
//   Stack stack(runtime, kv, recurrent, description, max_tokens);
//   stack.begin(step);
//   while (true) {
//     switch (stack.advance(50ms)) {
//       case Pause::time: continue;      // look for ^C, for instance
//       case Pause::done: return;        // step.logits is written
//       case Pause::experts: ...         // run dispatch().experts() on rows(), write expert_out(), call
//                                        // finish_experts(); meanwhile run_shared()
//     }
//   }
//
// A step pauses at every layer that has routed experts, with two exceptions: it never pauses if a table holds
// all experts, and it seldom pauses if native code reads the experts or has others run them
// (layer_experts.h). Each call is one or more operations of ops/, so its bits equal those of the same
// operations called one by one: for one row and one token the order of sums is fixed, and every assignment
// (one token, one of its experts) has its own row until `combine` adds the rows in the router's order.
//
// To add a kind of mixer or feed-forward network, add an alternative to `Mixer` or `Ffn` and an overload of
// `mix` or `feed_forward`. A mixer reads `normed` and leaves it as it is: a parallel network reads it too.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/route_args.h"
#include "ops/attention.h"
#include "ops/causal_conv.h"
#include "ops/experts.h"
#include "ops/gated_delta.h"
#include "ops/latent_attention.h"
#include "ops/latent_index.h"
#include "ops/layer_experts.h"
#include "ops/mamba.h"
#include "ops/matmul.h"
#include "ops/ngrams.h"
#include "ops/pool.h"
#include "ops/residual.h"
#include "ops/rotary.h"
#include "ops/runtime.h"
#include "ops/stack_adapter.h"
#include "ops/stack_sizes.h"
#include "ops/swiglu.h"

namespace argosy {

// Queries are multiplied by 1 + beta * log(1 + floor((position + offset) / period)), which keeps attention
// sharp over many positions (arXiv:2501.19399). beta 0: they stay.
struct QueryScale {
  float beta = 0;
  int64_t period = 1, offset = 0;
};

// The result of attention is multiplied by the activation of a projection of the mixer's input.
struct OutputGate {
  MatrixView matrix;  // [num_heads, hidden], one for each head; or [num_heads * value_dim, hidden]
  GateKind kind;
};

// Where a pool keeps its entries, and what it has gathered.
struct PoolPlace {
  PoolShape shape;
  int64_t store = 0;  // a number of the KV cache
  int64_t state_layer = 0, state_begin = 0;
};

// Chooses the blocks of positions that the heads of each KV head see (ops/latent_index.h). The first
// dimensions of queries and keys rotate by the angles of the layer's rotary embedding.
//
// With a pool, its heads choose together for all KV heads (Qwen3.8-Flash-Next): whole blocks by one key each,
// the mean of theirs, which is normed and rotates where the block begins; the unfinished block is always
// seen.
struct BlockIndexer {
  MatrixView query;         // [kv_heads * dim, hidden]; with a pool, any number of heads
  MatrixView key;           // [dim, hidden]
  const float* query_norm;  // [dim], applied to each head
  const float* key_norm;    // [dim]
  int64_t count;            // blocks that a head sees at most
  int64_t block_size;       // in positions
  int64_t num_local;  // the token's own block, and those before it that are always chosen; 0 with a pool
  std::optional<PoolPlace> pool = std::nullopt;
  int64_t dim() const { return key.rows; }
  int64_t num_heads() const { return query.rows / key.rows; }
};

// Grouped-query attention (arXiv:2305.13245): q, k, v -> rotary -> KV cache -> attention -> output
// projection.
struct GroupedQueryAttention {
  MatrixView query;                   // [num_heads * head_dim, hidden]
  MatrixView key;                     // [kv_heads * head_dim, hidden]
  std::optional<MatrixView> value;    // [kv_heads * value_dim, hidden]; none: keys, before their norm
  MatrixView output;                  // [hidden, num_heads * value_dim]
  const float* query_bias = nullptr;  // one per row of the matrix; nullptr: none
  const float* key_bias = nullptr;
  const float* value_bias = nullptr;
  const float* output_bias = nullptr;
  // [head_dim], applied to each head; or one per row of the matrix if is_norm_flat, to all heads at once.
  // nullptr: none.
  const float* query_norm = nullptr;
  const float* key_norm = nullptr;
  bool is_norm_flat = false;
  bool is_norm_last = false;          // q and k are normed after rotary
  const float* value_norm = nullptr;  // [value_dim], applied to each head; nullptr: none
  float value_scale = 1;              // multiplies the values
  float limit = 0;                    // q, k and v are clamped to [-limit, limit] before rotary; 0: no clamp
  const float* sinks = nullptr;  // [num_heads], a score that takes weight and adds no value; nullptr: none
  int64_t num_heads = 0;
  Window window;
  bool is_causal = false;  // a token sees no position after its own, whatever Step::sees_until says
  float scale = 0;         // multiplies the scores
  QueryScale query_scale;
  // Query rows are [query, gate] of each head; a head's result is multiplied by sigmoid(gate).
  bool has_gate = false;
  std::optional<OutputGate> gate;
  std::optional<BlockIndexer> indexer;  // is_causal, and without a window; none: tokens see all positions
};

// A gated delta net (arXiv:2412.06464): a recurrent state per sequence instead of keys and values. The rows
// of the projections are either grouped by part (q of all key heads, k, v; z; b; a), or by key head with the
// value heads that share it: [q, k, v, z] of each in one matrix, [b, a] in another.
struct GatedDeltaNet {
  MatrixView qkv;               // [conv_channels, hidden]; if it includes z, value_channels rows more
  std::optional<MatrixView> z;  // [value_channels, hidden]
  MatrixView b;                 // [value_heads, hidden]; if it includes a, twice as many rows
  std::optional<MatrixView> a;  // [value_heads, hidden]
  MatrixView output;            // [hidden, value_channels]
  DeltaShape shape = {};
  DeltaWeights weights = {};  // eps is ignored: the stack's norm_eps is used
  int64_t state_layer = 0;    // layer of the recurrent state
};

// Chooses the positions that latent attention sees (ops/latent_index.h). Dimensions of queries and keys from
// rope_begin on rotate by the angles of the layer's rotary embedding.
struct PositionIndexer {
  MatrixView query;            // [num_heads * dim, query_rank]
  MatrixView key;              // [dim, hidden]
  MatrixView weights;          // [num_heads, hidden]
  const float* key_norm;       // [dim], of a LayerNorm
  const float* key_norm_bias;  // [dim]
  float norm_eps;              // of this norm
  bool has_interleaved_pairs;  // whatever the rotary embedding says
  int64_t rope_begin = 0;
  // Groups of positions share a key, which does not rotate: the mean of theirs by the softmax of the gate
  // [dim, hidden] and its bias [ratio][dim]. All or none.
  std::optional<MatrixView> gate = std::nullopt;
  const float* gate_bias = nullptr;
  std::optional<PoolPlace> pool = std::nullopt;
  int64_t num_heads() const { return weights.rows; }
  int64_t dim() const { return key.rows; }
};

// Kimi Delta Attention (arXiv:2510.26692): a delta net with a decay for each key dimension. Values have as
// many heads and dimensions as keys. The projections of the decay and of the output gate may have two
// factors.
struct KimiDeltaAttention {
  MatrixView query, key, value;          // [key_channels, hidden]
  MatrixView beta;                       // [heads, hidden]
  std::optional<MatrixView> decay_down;  // [rank, hidden]; none: `decay` takes the hidden state
  MatrixView decay;                      // [key_channels, rank or hidden]
  std::optional<MatrixView> gate_down;   // the same for `gate`
  MatrixView gate;                       // [key_channels, rank or hidden]
  MatrixView output;                     // [hidden, key_channels]
  DeltaShape shape = {};
  DeltaWeights weights = {};  // eps is ignored: the stack's norm_eps is used
  int64_t state_layer = 0;
};

// Lightning attention (arXiv:2401.04658) with norms and rotary of q and k: a recurrent state that each head
// forgets at a fixed rate. The outputs of all heads are normed in groups, then gated.
struct LightningAttention {
  // [num_heads * head_dim, hidden]; without key and value, query has the rows of q, k and v of each head in
  // turn, which have no norms and do not rotate.
  MatrixView query;
  std::optional<MatrixView> key, value;
  MatrixView gate;                    // [num_heads * head_dim, hidden]: the output is times sigmoid(gate x)
  MatrixView output;                  // [hidden, num_heads * head_dim]
  bool has_silu = false;              // q, k and v become silu of themselves, before their norms
  const float* query_norm = nullptr;  // [head_dim], to each head, before rotary; nullptr: none
  const float* key_norm = nullptr;
  const float* decay = nullptr;  // [num_heads]
  const float* norm = nullptr;   // [num_heads * head_dim]
  float norm_eps = 0;            // of this norm
  int64_t num_groups = 1;
  float scale = 0;  // multiplies q . k
  DeltaShape shape = {};
  int64_t state_layer = 0;
};

// Multi-head latent attention (arXiv:2405.04434): compressed query, compressed keys and values -> norms ->
// rotary on the rope dimensions -> KV cache -> attention -> output projection.
struct LatentAttention {
  std::optional<MatrixView> query_down;  // [query_rank, hidden]; none: `query` takes the hidden state
  const float* query_norm = nullptr;     // [query_rank], with query_down
  MatrixView query;                      // [num_heads * (nope_dim + rope_dim), query_rank or hidden]
  MatrixView kv_down;                    // [kv_rank + rope_dim, hidden]
  const float* kv_norm = nullptr;        // [kv_rank]
  LatentHeads heads;
  MatrixView output;  // [hidden, num_heads * value_dim]
  float norm_eps = 0;
  int64_t num_chosen = 0;  // a token sees at most so many groups of positions, and its unfinished one; 0: all
  int64_t group_size = 1;  // positions of such a group
  // With num_chosen and query_down; none: the layer sees what the last layer with an indexer chose.
  std::optional<PositionIndexer> indexer;
  QueryScale query_scale;
  std::optional<OutputGate> gate;
};

// A pool of a layer (ops/pool.h): its entries are normed and their last dimensions rotate by the angles of
// the position where their group begins. They lie in a store of their own.
struct Pool {
  MatrixView vectors;               // [shape.columns(), hidden]
  std::optional<MatrixView> gates;  // the same; none: an entry is a mean
  const float* bias = nullptr;      // [shape.ratio][shape.columns()], added to the gates; nullptr: none
  const float* norm = nullptr;      // [shape.dim]
  PoolShape shape;
  int64_t store = 0;        // a number of the KV cache
  int64_t state_begin = 0;  // floats of other pools before it in the layer's recurrent state
};

// Index keys that are made of the entries of the layer's pool, before these rotate: normed, then rotated like
// them (DeepSeek-V4.1).
struct EntryKeys {
  MatrixView matrix;  // [dim, dimension of an entry]
  const float* norm;  // [dim]
};

// Chooses the entries that a token sees, by index keys in a store of their own (ops/latent_index.h). The last
// dimensions of its queries rotate by the angles of the layer's rotary embedding.
struct EntryIndexer {
  MatrixView query;    // [num_heads * dim(), query_rank]
  MatrixView weights;  // [num_heads, hidden]
  // What fills the store; nothing: an earlier layer does.
  std::variant<std::monostate, Pool, EntryKeys> keys;
  int64_t store = 0;  // a number of the KV cache
  // Not 0: a token chooses inside so many blocks of `candidate_size` entries, the best of the last layer that
  // finds_candidates.
  int64_t num_candidates = 0, candidate_size = 1;
  bool finds_candidates = false;

  const Pool* pool() const { return std::get_if<Pool>(&keys); }
  const EntryKeys* entry_keys() const { return std::get_if<EntryKeys>(&keys); }
  int64_t num_heads() const { return weights.rows; }
  int64_t dim() const { return query.rows / weights.rows; }
};

// Where the entries of a pool lie, and how many positions each stands for.
struct EntryStore {
  int64_t store = 0;  // a number of the KV cache
  int64_t ratio = 1;
};

// DeepSeek-V4's attention: one vector of head_dim elements for each position is key and value of all heads.
// A token sees a window of positions, with all of its span if that sees both ways, and entries of a pool, the
// layer's or an earlier layer's: all of them or those that an index chose. Its last dimensions rotate, and
// because values rotate with them, the result is rotated back by the token's own angles. The output
// projection has two factors, of which the first multiplies each group of heads by a matrix of its own.
struct CompressedAttention {
  MatrixView query_down;              // [query_rank, hidden]
  const float* query_norm = nullptr;  // [query_rank]
  MatrixView query;                   // [num_heads * head_dim, query_rank]
  const float* head_norm = nullptr;   // [head_dim], of each head's query, before rotary; nullptr: none
  MatrixView key_value;               // [head_dim, hidden]
  const float* kv_norm = nullptr;     // [head_dim]
  MatrixView group_output;            // [num_groups * output_rank, num_heads / num_groups * head_dim]
  MatrixView output;                  // [hidden, num_groups * output_rank]
  int64_t num_heads = 0, num_groups = 1, rope_dim = 0;
  Window window;
  float norm_eps = 0;                 // of all these norms
  float scale = 0;                    // multiplies the scores
  const float* sinks = nullptr;       // [num_heads]; nullptr: none
  std::optional<EntryStore> entries;  // none: a token sees only its window
  std::optional<Pool> pool;           // fills the entries' store; none: an earlier layer does
  int64_t num_chosen = 0;             // a token sees at most so many entries; 0: all
  // With num_chosen; none: the layer sees what the last layer with an indexer chose.
  std::optional<EntryIndexer> indexer;
  int64_t state_layer = 0;  // of the recurrent state, if there is a pool with a state

  int64_t head_dim() const { return key_value.rows; }
  int64_t state_floats() const {
    const Pool* keys = indexer ? indexer->pool() : nullptr;
    return (pool ? pool->shape.state_floats() : 0) + (keys != nullptr ? keys->shape.state_floats() : 0);
  }
};

// A short convolution with two gates: a row of the input projection is [B, C, x], and C * conv(B * x) goes
// through the output projection.
struct ShortConv {
  MatrixView input;                   // [3 * hidden, hidden]
  MatrixView output;                  // [hidden, hidden]
  const float* input_bias = nullptr;  // one per row of the matrix; nullptr: none
  const float* output_bias = nullptr;
  CausalConv conv = {};
  int64_t state_layer = 0;  // layer of the recurrent state
};

// A Mamba-2 mixer (arXiv:2405.21060).
struct Mamba {
  MatrixView input;                   // [shape.projected(), hidden]
  MatrixView output;                  // [hidden, shape.channels()]
  const float* input_bias = nullptr;  // one per row of the matrix; nullptr: none
  const float* output_bias = nullptr;
  MambaShape shape = {};
  MambaWeights weights = {};  // eps is ignored: the stack's norm_eps is used
  int64_t state_layer = 0;    // layer of the recurrent state
};

using Mixer = std::variant<GroupedQueryAttention, LatentAttention, CompressedAttention, GatedDeltaNet,
                           KimiDeltaAttention, LightningAttention, ShortConv, Mamba>;

struct DenseFfn {
  ExpertView network;
  std::optional<Activation> activation = std::nullopt;  // none: the stack's
};

struct Router {
  MatrixView matrix;            // [num_experts, hidden]
  const float* bias = nullptr;  // [num_experts], added to the product; nullptr: none
  // [hidden]: the router reads the hidden state after a norm of its own; nullptr: what the layer's norm
  // gives.
  const float* norm = nullptr;
  RouteRule rule = {};
  float logit_cap = 0;  // logits become cap * tanh(logit / cap) before the rule; 0: they stay
  // The weight of a token's only expert multiplies the expert's input instead of its output.
  bool weighs_input = false;
  // f32 [vocabulary, k], the experts of each token: only their weights follow from the logits. Rows whose
  // embeddings a step gives have no token, so they choose by the rule.
  std::optional<MatrixView> token_experts = std::nullopt;
};

// Runs for every token.
struct SharedExpert {
  ExpertView network;
  std::optional<MatrixView> score;   // [1, hidden]: the output is multiplied by sigmoid(score . x)
  const float* post_norm = nullptr;  // [hidden], of the output, before the score; nullptr: none
  std::optional<Activation> activation = std::nullopt;  // none: the stack's
};

// Routed experts that read and write vectors of another size than the hidden state: they read down . x, and
// up . norm(their weighted sum) is added.
struct LatentExperts {
  MatrixView down;              // [latent, hidden]
  MatrixView up;                // [hidden, latent]
  const float* norm = nullptr;  // [latent], RMSNorm; nullptr: none
};

struct RoutedFfn {
  Router router;
  int64_t width = 0;  // inner neurons of one expert; the stack reserves the scratch that they need
  // [hidden]: routed experts read the hidden state after a norm of their own; nullptr: what the layer's norm
  // gives.
  const float* norm = nullptr;
  const float* post_norm = nullptr;  // [hidden], of the weighted sum of their outputs; nullptr: none
  std::optional<SharedExpert> shared;
  std::optional<LatentExperts> latent = std::nullopt;

  int64_t expert_hidden() const { return latent ? latent->down.rows : router.matrix.cols; }
  bool has_own_input() const { return norm != nullptr || latent || router.weighs_input; }
};

using Ffn = std::variant<DenseFfn, RoutedFfn>;

// A norm of the hidden state, of the stack's kind.
struct Norm {
  const float* weight = nullptr;  // [hidden]; nullptr: no norm
  const float* bias = nullptr;    // [hidden], for NormKind::layer; nullptr: none
};

enum class NormKind { rms, layer };

struct Layer {
  Norm mixer_norm;               // none: the mixer reads the hidden state
  std::optional<Mixer> mixer;    // none: the layer has only a network
  std::optional<Ngrams> ngrams;  // added before the mixer reads the hidden state
  Norm ffn_norm;                 // none: the network reads the hidden state
  std::optional<Ffn> ffn;        // none: the layer has only a mixer
  // The network reads what the mixer reads, not the hidden state after it; ffn_norm is not used.
  bool is_parallel = false;
  std::optional<int64_t> rotary = 0;       // an index of StackDescription::rotaries; none: nothing rotates
  const float* mixer_post_norm = nullptr;  // [hidden], of what the mixer adds; nullptr: none
  const float* ffn_post_norm = nullptr;    // [hidden], of what the networks add together; nullptr: none
  float mixer_scale = 1, ffn_scale = 1;    // multiply what the mixer, or the networks together, add
  // Not 0: they add it to this factor times what they read, instead of the hidden state.
  float normed_residual = 0;
  float scale = 1;  // multiplies the hidden state after the layer
  // How the mixer and the networks read and write residual streams; none: there is one hidden state.
  std::optional<StreamMix> mixer_mix, ffn_mix;
  // Not 0: the networks of this layer and all later layers run only for tokens with a smaller Step::to_end.
  int64_t reach = 0;

  const RoutedFfn* routed() const { return ffn ? std::get_if<RoutedFfn>(&*ffn) : nullptr; }
  // Whether the outputs of the networks are summed apart from the hidden state.
  bool sums_apart() const { return ffn_post_norm != nullptr || ffn_scale != 1; }
};

struct StackDescription {
  MatrixView embedding, head;  // [vocabulary, hidden]
  Norm final_norm;
  NormKind norm_kind;  // of every norm of the hidden state
  float norm_eps;
  ResidualRule residual = {};
  std::vector<Rotary> rotaries;
  Activation activation;      // in dense networks and shared experts
  bool experts_off;           // leaves routed experts out of every sum
  ExpertTable* resident;      // holds every routed expert; nullptr: the step pauses for experts
  float embedding_scale = 1;  // multiplies embeddings, but not those that a step gives
  float logit_scale = 1;      // multiplies logits, before the cap
  float logit_cap = 0;        // logits become cap * tanh(logit / cap); 0: they stay
  int64_t first_layer = 0;    // the number of layers[0] in the KV cache and among routed experts
  std::vector<Layer> layers;
};

// Vectors [num_rows][hidden] for some rows of a step, each row at most once.
struct RowVectors {
  const int64_t* rows = nullptr;
  int64_t num_rows = 0;
  const float* vectors = nullptr;
};

// The tokens of one step. All numbers are in range, and all memory stays valid until the step is done.
struct Step {
  int64_t num_tokens;
  const int32_t* token_ids;
  const int32_t* sequence;      // a row of block_table
  const int64_t* slots;         // destination of keys and values
  const int64_t* window_slots;  // the same in windowed layers; nullptr if none has blocks of its own
  const bool* is_decode;        // false: a prompt token
  const int32_t* block_table;
  const int32_t* window_table;  // the same in windowed layers, where a token sees a block
  int64_t max_blocks;
  const int32_t* state_slots;  // recurrent state slot for each row of block_table; nullptr without one
  const int32_t* order;        // index of each token in its sequence
  const float* angles;         // [axes][num_tokens], rotary positions; nullptr: order on every axis
  const int32_t* sees_until;   // end of the positions that each token sees; nullptr: order + 1
  // How far before the end of a prompt a token is; 0: its output is needed. nullptr: that of every token is.
  const int32_t* to_end;
  const int32_t* adapters;  // the number of each token's adapter, -1: none; nullptr: no token has one
  RowVectors overrides;     // given instead of the embeddings of some tokens
  struct Addition {
    int64_t layer;
    RowVectors vectors;  // added to the hidden state after the layer, or to every residual stream
  };
  std::vector<Addition> additions;
  struct Tap {
    int64_t layer;
    // [num_tokens][hidden], the hidden state after the layer and its additions; of residual streams, the mean
    float* hidden;
  };
  std::vector<Tap> taps;
  int32_t* choices = nullptr;  // [routed layers][num_tokens][k], the experts of each token, -1 in layers that
                               // leave it out; nullptr: not wanted
  const int64_t* wanted;       // [num_wanted], rows whose logits are wanted; at most max_tokens
  int64_t num_wanted;
  float* logits;  // [num_wanted][vocabulary]
};

// The parts of a step that are timed.
enum class Part { router, attention_and_dense, expert_compute, waiting };
constexpr int kNumParts = 4;

enum class Pause { done, experts, time };

class Stack {
 public:
  // The memory behind the views, the KV cache and the recurrent state must outlive the stack. `recurrent` may
  // be nullptr if no layer has a recurrent state. All sizes must agree. The stack allocates its buffers and
  // reserves the scratch of `runtime` for steps of at most max_tokens tokens.
  Stack(Runtime& runtime, KvCache& kv, RecurrentState* recurrent, StackDescription description,
        int64_t max_tokens);

  // The layers that the step has run; 0 once it is done. Any thread may ask while it runs.
  int64_t layers_done() const { return layers_done_.load(std::memory_order_relaxed); }

  // Starts a step, however the previous one ended. With a recurrent state, throws std::invalid_argument if
  // the tokens of a sequence are not consecutive or do not continue at the position of its slot. With to_end,
  // the same if its layers leave out a token whose logits are wanted, or one of an addition or a tap.
  void begin(const Step& step);

  // Runs until the step is done, a layer waits for experts, or `slice` has passed. A layer whose table has a
  // fault() passes the time until the step is given up. Throws std::invalid_argument if a layer waited and
  // not all of its experts have run, or if a table has not begun to read the rows of the step.
  Pause advance(std::chrono::nanoseconds slice);

  // After Pause::experts and before the next advance(): run the shared expert, if there is one, and see to it
  // that the outputs of every expert of the dispatch are in expert_out(), in any order. These calls throw
  // std::invalid_argument if no layer waits.
  int64_t waiting_layer() const;  // from first_layer on
  std::shared_ptr<const Dispatch> dispatch() const;
  const float* rows() const;  // [tokens][expert_hidden()], the input of the routed experts
  float* expert_out() const;  // [tokens * k][expert_hidden()], a row for each assignment
  // Predicts the choice of the next layer with routed experts, as if this layer and the mixer between them
  // added nothing. Returns, for each rank, the experts that some token ranks there and no token ranks higher.
  // Empty if no later layer has routed experts.
  std::vector<std::vector<int32_t>> look_ahead();
  void run_shared();
  // The outputs of these experts are in expert_out(). Throws std::invalid_argument for an expert that no
  // token chose, or that has finished already.
  void finish_experts(const std::vector<int32_t>& experts);

  // Computes the hidden states [num_rows][hidden] of rows of the last step after the final norm. Throws
  // std::invalid_argument for a row that a layer left out.
  void final_states(const int64_t* rows, int64_t num_rows, float* out);

  // Computes the logits [num_rows][vocabulary] of rows of the last step, at most max_tokens rows.
  void logits(const int64_t* rows, int64_t num_rows, float* out);

  // Limits further steps to max_tokens tokens, no more than the stack was made for. Buffers and the
  // runtime's scratch keep room for them, and the system gets the rest. Throws std::invalid_argument.
  void resize(int64_t max_tokens);

  const StackDescription& description() const { return description_; }
  int64_t max_tokens() const { return max_tokens_; }
  const StackSizes& sizes() const { return sizes_; }
  int64_t buffer_bytes() const { return int64_t(memory_.size()); }
  const KvCache& kv() const { return kv_; }
  const RecurrentState* recurrent() const { return recurrent_; }

  // The tokens of the last step that no layer has left out, [num_left()]; nullptr: all of them.
  int64_t num_left() const { return step_.num_tokens; }
  const int64_t* left() const { return has_left_out_ ? left_.rows.data() : nullptr; }
  // Their hidden state [num_left()][hidden], as the last operation left it.
  const float* hidden() const { return buffers_.hidden; }
  // The experts that they chose in the layer that chose last, best first: [num_left()][chosen_per_token()].
  // chosen_per_token() is 0 until a layer of the step has chosen.
  const int32_t* expert_ids() const { return buffers_.expert_ids; }
  int64_t chosen_per_token() const { return chosen_per_token_; }

  // Seconds by Part since the previous call.
  std::array<double, kNumParts> take_seconds();

  // From the next step on, no token chooses these experts of a layer, and the others share its weight as if
  // the layer had never had them; an empty list allows all again. An expert that a table gives to a token
  // remains its expert, with the weight 0. Throws std::invalid_argument if the layer
  // has no such experts, or a group of them would keep too few.
  void forbid(int64_t layer, std::vector<int32_t> experts);

  // From the next step on, tokens with this number have this adapter; nullptr: no token may have the number.
  // The adapter changes matrices of this stack. Throws std::invalid_argument if a step runs with the number.
  void set_adapter(int32_t number, std::shared_ptr<const StackAdapter> adapter);

  // From the next step on, this table holds every routed expert, or others run them, until the next call.
  // With neither, steps pause.
  void use_experts(ExpertTable* resident, LayerExperts* elsewhere) {
    description_.resident = resident;
    elsewhere_ = elsewhere;
  }

  // How often each expert was chosen since the previous call, [layers][most experts of a layer].
  std::vector<int64_t> take_uses();
  int64_t most_experts() const { return most_experts_; }
  int64_t num_routed_layers() const { return num_routed_layers_; }
  int64_t expert_hidden() const { return expert_hidden_; }  // the size of what routed experts read and write
  int64_t experts_per_token() const {
    return experts_per_token_;
  }  // the same in every layer; 0: layers differ

 private:
  using Clock = std::chrono::steady_clock;
  enum class Stage { begun, between_layers, waits_for_experts, done };

  void mix(const GroupedQueryAttention& attention);
  void mix(const GatedDeltaNet& net);
  void mix(const KimiDeltaAttention& mixer);
  void mix(const LightningAttention& mixer);
  void mix(const ShortConv& mixer);
  void mix(const Mamba& mixer);
  // matmul() of x [num_tokens][cols], with the adapters of the step's tokens.
  void multiply(const std::vector<Product>& products, const float* x);
  int64_t scratch_bytes() const;
  std::vector<AdaptedRows> group_rows(const int64_t* rows, int64_t num_rows) const;
  // The pairs that each token has for a part of a layer, in `room`; nullptr: no token has any.
  template <class Pairs>
  const Pairs* const* pairs_of(std::unordered_map<const uint8_t*, Pairs> StackAdapter::* of,
                               const uint8_t* key, std::vector<const Pairs*>& room) const {
    bool has_any = false;
    for (const AdaptedRows& adapted : adapted_) {
      const auto& all = *adapted.adapter.*of;
      const auto found = all.find(key);
      if (found == all.end()) continue;
      if (!std::exchange(has_any, true)) room.assign(size_t(step_.num_tokens), nullptr);
      for (const int32_t row : adapted.rows) room[size_t(row)] = &found->second;
    }
    return has_any ? room.data() : nullptr;
  }
  void begin_runs();
  void begin_bounded();
  void leave_out();
  int64_t place(int64_t row) const;            // among the tokens that are left
  bool add_table_rows(Clock::time_point end);  // false: they are not all there, or some cannot be read
  void end_layer();
  void add_block(const MatrixView& output, const float* bias) { add_block(output, bias, buffers_.attended); }
  void add_block(const MatrixView& output, const float* bias, const float* attended);
  void mix(const LatentAttention& attention);
  void mix(const CompressedAttention& attention);
  LatentSource window_of(const CompressedAttention& attention);
  LatentSource entries_of(const CompressedAttention& attention, const float* query_latent);
  void gather(const Pool& pool, const EntryKeys* keys, const CompressedAttention& attention);
  void choose_entries(const CompressedAttention& attention, const float* query_latent);
  void choose_positions(const PositionIndexer& indexer, const AttentionBatch& batch,
                        const ChosenPositions& chosen);
  // Adds the step's tokens to a pool, and stores the entries that they complete after `finish`.
  LatentLayer store_entries(const PoolPlace& place, const PoolInputs& inputs,
                            const std::function<void(PoolEntries&)>& finish);
  // Stores vectors of the groups that these tokens complete.
  LatentLayer write_entries(const EntryStore& to, const std::vector<int64_t>& tokens, const float* vectors);
  void choose_blocks(const BlockIndexer& indexer, AttentionBatch& batch);
  bool feed_forward(const DenseFfn& ffn);  // false: the layer waits for experts
  bool feed_forward(const RoutedFfn& ffn);
  void choose(const Router& router, int64_t layer, const float* x, int32_t* ids, float* weights);
  void dispatch_tokens(const RoutedFfn& ffn);
  void write_expert_in(const RoutedFfn& ffn);
  bool run_elsewhere(const RoutedFfn& ffn);  // false: the layer waits for experts
  int64_t next_routed_layer() const;
  // The choice of a later layer, by rank, and if `pairs` is not null the (expert, adapter) of its tokens.
  std::vector<std::vector<int32_t>> predict(int64_t layer,
                                            std::set<std::pair<int32_t, int32_t>>* pairs = nullptr);
  void add_shared(const RoutedFfn& ffn);
  void combine_experts(const RoutedFfn& ffn);
  // What a block of the current layer reads, and the sum it adds to.
  void norm_block(const Norm& by, const std::optional<StreamMix>& mix);
  void norm(const Norm& by, const float* x, float* out);  // for every token
  void norm(const Norm& by, const float* x, int64_t rows, float* out);
  void norm(const float* weight, const float* x, float* out) { norm(Norm{weight}, x, out); }
  void write_angles();
  // By the angles of the current layer's rotary, if it has one, in its pairs or in others.
  void rotate(float* x, int64_t num_heads, int64_t head_dim);
  void rotate(float* x, int64_t num_heads, int64_t head_dim, bool has_interleaved_pairs);
  void rotate_back(float* x, int64_t num_heads, int64_t head_dim);
  int64_t angles_at(int64_t rotary) const;
  void scale_queries(const QueryScale& scale, int64_t cols);
  void gate_output(const OutputGate& gate, int64_t num_heads, int64_t value_dim);
  const Layer& layer() const { return description_.layers[size_t(layer_)]; }
  int64_t number() const { return description_.first_layer + layer_; }  // the current layer's
  const RoutedFfn& routed_ffn() const;                                  // the current layer's
  const float* expert_in(const RoutedFfn& ffn) const;
  float* ffn_sum() const;  // where the networks of the current layer add their outputs
  void require_waiting() const;
  void start_clock() { last_mark_ = Clock::now(); }
  void mark(Part part);

  Runtime& runtime_;
  KvCache& kv_;
  RecurrentState* recurrent_;
  StackDescription description_;
  LayerExperts* elsewhere_ = nullptr;
  int64_t max_tokens_;
  StackSizes sizes_;
  Arena memory_;  // holds the buffers
  StackBuffers buffers_;
  Residual residual_;

  Step step_ = {};  // of the tokens that are left, which `left_` holds once some have been left out
  struct Left {
    std::vector<int64_t> rows;  // of the step that was given
    std::unique_ptr<int32_t[]> sequence, order, sees_until, to_end, adapters;
    std::unique_ptr<int64_t[]> slots, window_slots;
    std::unique_ptr<bool[]> is_decode;
    std::vector<float> angles;
  } left_;
  bool has_left_out_ = false;
  std::map<int32_t, std::shared_ptr<const StackAdapter>> adapters_;  // by number
  std::vector<AdaptedRows> adapted_;                                 // the tokens that are left
  std::vector<const ExpertPairs*> network_pairs_;                    // of each token, in the current network
  std::vector<const LatentPairs*> latent_pairs_;
  int64_t num_given_ = 0;                         // tokens of the step
  const int32_t* given_order_ = nullptr;          // and their order
  int64_t chosen_cols_ = 0, candidate_cols_ = 0;  // of a token, by the last layer with an entry indexer
  std::vector<StateRun> runs_;                    // runs of the step, if there is a recurrent state
  Stage stage_ = Stage::done;
  int64_t layer_ = 0;
  std::atomic<int64_t> layers_done_ = 0;
  int64_t chosen_per_token_ = 0;
  std::shared_ptr<Dispatch> dispatch_ = std::make_shared<Dispatch>();  // the current layer's
  std::vector<bool> is_finished_;                                      // [experts of the dispatch]
  int64_t num_unfinished_ = 0;
  bool has_run_shared_ = false;  // the shared expert of the layer that waits

  Clock::time_point last_mark_;
  std::array<double, kNumParts> seconds_ = {};
  int64_t most_experts_ = 0;  // in one layer
  int64_t num_routed_layers_ = 0, experts_per_token_ = 0, expert_hidden_ = 0;
  int64_t num_chosen_layers_ = 0;                // routed layers of the step that have chosen
  std::vector<std::vector<int32_t>> forbidden_;  // [layers], experts that no token may choose
  std::vector<int64_t> uses_;
  std::vector<int32_t> table_rows_;  // [num_tokens] of the step, rows of token_experts; -1: none
};

}  // namespace argosy
