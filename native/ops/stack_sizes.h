// stack_sizes.h: the working memory of a Stack: its buffers and the scratch of its operations.
//
// The sizes follow from the dimensions of the layers, without their weights, so the memory plan computes
// them before anything is loaded, and a Stack allocates by the same numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/attention.h"
#include "ops/gated_delta.h"
#include "ops/latent_index.h"
#include "ops/mamba.h"
#include "ops/ngrams.h"
#include "ops/residual.h"

namespace argosy {

struct AttentionSizes {
  int64_t num_heads, kv_heads, head_dim, value_dim;
  bool has_gate;          // the query has rows of a gate
  int64_t gate_rows = 0;  // of the gate's own projection; 0: none
  IndexSizes index = {};  // of a block indexer, or one of groups; count 0: none
};

struct LatentSizes {
  int64_t num_heads, nope_dim, rope_dim, kv_rank, value_dim;
  int64_t query_rank;     // 0: queries are not compressed
  int64_t gate_rows = 0;  // of the gate's projection; 0: none
  IndexSizes index = {};  // count 0: no indexer

  bool operator==(const LatentSizes&) const = default;
};

struct CompressedSizes {
  int64_t num_heads, head_dim, query_rank, num_groups, output_rank;
  int64_t rope_dim = 0;
  int64_t pool_columns = 0;     // of its vectors; 0: no pool of its own
  bool has_gates = false;       // of its pools
  int64_t num_chosen = 0;       // entries that a token sees at most, which an index chose; 0: all
  IndexSizes index = {};        // count 0: no indexer
  IndexSizes candidates = {};   // of its blocks; count 0: none
  int64_t key_columns = 0;      // of the vectors of the indexer's pool
  bool has_entry_keys = false;  // index keys are made of the pool's entries

  bool operator==(const CompressedSizes&) const = default;
};

struct KimiDeltaSizes {
  DeltaShape shape;
  int64_t latent_rows;  // of the decay's and the gate's first factors together; 0: each is one matrix
};

struct ShortConvSizes {
  int64_t channels;
};

struct DenseSizes {
  int64_t width;
};

struct RoutedSizes {
  int64_t num_experts, k, width;
  int64_t shared_width;        // 0: no shared expert
  bool has_own_input = false;  // experts read something else than the shared expert
  int64_t latent = 0;          // the size of what experts read and write; 0: the hidden size
};

// Every buffer has room for max_tokens rows.
struct StackBuffers {
  float *hidden, *normed, *block;  // [hidden]; `block` is what a block adds to the hidden state
  float* query;                    // [num_heads * head_dim]; [num_groups * output_rank]
  float* attended;                 // [num_heads * value_dim]; [value_channels] of a delta net
  // [kv_heads * head_dim], [kv_heads * value_dim]; key [kv_rank + rope_dim], [head_dim]; value: an index key
  // and the weights of the index heads
  float *key, *value;
  float* query_latent;     // [query_rank]; [latent_rows]; queries and key, or weights, of a block indexer
  int32_t* chosen;         // [positions that an indexer chooses]; [kv_heads * blocks]; [groups]
  int32_t* candidates;     // [blocks that an indexer chooses inside]
  float* projected;        // query and gate, or gate, of gated heads; the inputs of recurrent layers
  float* delta_gates;      // [2 * value_heads]; [heads * (key_dim + 1)]; [heads]
  float *cosine, *sine;    // [pairs], those of one rotary embedding after another
  float* router_logits;    // [num_experts]
  float* routing_weights;  // [k]
  int32_t* expert_ids;     // [k]
  float* shared_score;     // [1]
  float* expert_in;        // [hidden or latent], if they do not read what the layer's norm gives
  float* expert_out;       // [k * (hidden or latent)]; rows of a table with their keys and value
  float* ffn_sum;          // [hidden], what the networks of a layer add up to before a norm or factor
  ResidualBuffers residual;
};

// The sizes of a stack, layer by layer. All functions throw std::invalid_argument for a dimension outside 0
// to 2^30, and for memory beyond 2^62 bytes.
class StackSizes {
 public:
  // num_pairs: of all rotary embeddings together.
  StackSizes(int64_t hidden, int64_t num_pairs);

  void add(const AttentionSizes& mixer);
  void add(const LatentSizes& mixer);
  void add(const CompressedSizes& mixer);
  void add(const DeltaShape& mixer);
  void add(const KimiDeltaSizes& mixer);
  void add(const ShortConvSizes& mixer);
  void add(const MambaShape& mixer);
  void add(const NgramSizes& ngrams);
  void add(const DenseSizes& ffn);
  void add(const RoutedSizes& ffn);
  void add(const ResidualSizes& residual);
  void add_ffn_post_norm();  // some layer norms or scales the sum of its feed-forward networks

  // Bytes of the buffers for at most max_tokens tokens. Also throws if an int32 cannot number the
  // assignments.
  int64_t buffer_bytes(int64_t max_tokens) const;
  // The buffers in `memory` of buffer_bytes(max_tokens) bytes, aligned to 64.
  StackBuffers place_buffers(uint8_t* memory, int64_t max_tokens) const;
  // Most bytes of the dispatch of a layer, and of the arrays of experts that run or are predicted: all that a
  // step allocates for itself.
  int64_t dispatch_bytes(int64_t max_tokens) const;
  // The most that any operation of a step requests from Runtime::scratch, whatever the formats of the
  // weights; less if none of them is quantised, because then no activations are, or if none has act-order.
  // `ranks`: StackAdapter::ranks, the most of all adapters.
  int64_t scratch_bytes(int64_t max_tokens, int num_threads, bool has_quants = true,
                        bool has_act_order = true, int64_t ranks = 0) const;

  bool operator==(const StackSizes&) const = default;

 private:
  // One network that all tokens run through `k` times.
  struct Network {
    int64_t hidden, width, k;
    bool operator==(const Network&) const = default;
  };

  int64_t lay_out(uint8_t* memory, int64_t max_tokens, StackBuffers& buffers) const;
  void add_network(const Network& network);
  void add_indexer(const IndexSizes& index);

  int64_t hidden_, num_pairs_;
  // Columns of the buffers: the most that any layer needs.
  int64_t query_ = 0, attended_ = 0, key_ = 0, value_ = 0, query_latent_ = 0, chosen_ = 0, projected_ = 0;
  int64_t candidates_ = 0;
  int64_t delta_gates_ = 0, num_experts_ = 0, k_ = 0, expert_in_ = 0, expert_out_ = 0;
  int64_t num_streams_ = 1, stream_weights_ = 0, stream_rank_ = 0;
  int64_t ffn_sum_ = 0, latent_ = 0, ngram_width_ = 0;
  std::vector<AttentionScratchSizes> attentions_;
  std::vector<LatentSizes> latents_;
  std::vector<IndexSizes> indexers_;
  std::vector<CompressedSizes> compressed_;
  std::vector<Network> networks_;
};

}  // namespace argosy
