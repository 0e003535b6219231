#include "ops/stack_sizes.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "ops/attention.h"
#include "ops/checked_size.h"
#include "ops/latent_attention.h"
#include "ops/layer.h"
#include "ops/matmul.h"
#include "ops/pool.h"
#include "ops/swiglu.h"

namespace argosy {

namespace {

constexpr const char* kWorkingMemory = "the working memory of a stack";
constexpr int64_t kLargestDimension = int64_t{1} << 30;
constexpr int64_t kLargestWidth = int64_t{1} << 40;

void widen(int64_t& width, int64_t wanted) { width = std::max(width, wanted); }

// The product of some dimensions; 0 if one of them is 0.
int64_t width_of(std::initializer_list<int64_t> dimensions) {
  for (const int64_t dimension : dimensions) {
    if (dimension < 0 || dimension > kLargestDimension) {
      throw std::invalid_argument("a dimension of a layer is " + std::to_string(dimension) +
                                  ", expected 0 to " + std::to_string(kLargestDimension));
    }
  }
  if (std::find(dimensions.begin(), dimensions.end(), 0) != dimensions.end()) return 0;
  const int64_t width = checked_product(kWorkingMemory, dimensions);
  if (width > kLargestWidth)
    throw std::invalid_argument("a layer is " + std::to_string(width) + " columns wide, expected at most " +
                                std::to_string(kLargestWidth));
  return width;
}

}  // namespace

StackSizes::StackSizes(int64_t hidden, int64_t num_pairs)
    : hidden_(width_of({hidden})), num_pairs_(width_of({num_pairs})) {}

void StackSizes::add(const AttentionSizes& mixer) {
  const int64_t query = width_of({mixer.num_heads, mixer.head_dim});
  widen(query_, query);
  widen(attended_, width_of({mixer.num_heads, mixer.value_dim}));
  widen(key_, width_of({mixer.kv_heads, mixer.head_dim}));
  widen(value_, width_of({mixer.kv_heads, mixer.value_dim}));
  widen(projected_, mixer.has_gate ? 2 * query : 0);
  widen(projected_, width_of({mixer.gate_rows}));
  const IndexSizes& index = mixer.index;
  AttentionScratchSizes scratch = {mixer.head_dim, mixer.value_dim,
                                   width_of({index.count, index.block_size})};
  if (index.pool_size > 1) {
    scratch.num_chosen = width_of({index.count, index.pool_size}) + index.pool_size - 1;
    scratch.gathered_heads = mixer.num_heads / std::max<int64_t>(1, mixer.kv_heads);
    // Keys of groups, where these begin, and their cosines and sines.
    widen(attended_, width_of({2, index.dim}) + PoolShape::kMostAxes);
  }
  if (std::find(attentions_.begin(), attentions_.end(), scratch) == attentions_.end())
    attentions_.push_back(scratch);
  widen(query_latent_, width_of({index.num_heads, index.dim}) + std::max(index.num_heads, index.dim));
  widen(chosen_, width_of({index.choices_per_token(), index.count}));
  add_indexer(index);
}

void StackSizes::add_indexer(const IndexSizes& index) {
  if (index.count > 0 && std::find(indexers_.begin(), indexers_.end(), index) == indexers_.end())
    indexers_.push_back(index);
}

void StackSizes::add(const LatentSizes& mixer) {
  const int64_t nope = width_of({mixer.nope_dim}), rope = width_of({mixer.rope_dim});
  widen(query_, width_of({mixer.num_heads, nope + rope}));
  widen(key_, width_of({mixer.kv_rank}) + rope);
  widen(query_latent_, width_of({mixer.query_rank}));
  widen(attended_, width_of({mixer.num_heads, mixer.value_dim}));
  widen(query_, width_of({mixer.index.num_heads, mixer.index.dim}));
  const bool is_pooled = mixer.index.pool_size > 1;
  widen(value_, width_of({mixer.index.dim, is_pooled ? 2 : 1}) + width_of({mixer.index.num_heads}));
  widen(chosen_,
        width_of({mixer.index.count, mixer.index.pool_size}) + (is_pooled ? mixer.index.pool_size : 0));
  if (is_pooled) widen(attended_, width_of({mixer.index.dim}) + PoolShape::kMostAxes);
  add_indexer(mixer.index);
  widen(projected_, width_of({mixer.gate_rows}));
  if (std::find(latents_.begin(), latents_.end(), mixer) == latents_.end()) latents_.push_back(mixer);
}

void StackSizes::add(const CompressedSizes& mixer) {
  const int64_t attended = width_of({mixer.num_heads, mixer.head_dim});
  const int64_t grouped = width_of({mixer.num_groups, mixer.output_rank});
  widen(query_, std::max(attended, grouped));
  widen(attended_, std::max(attended, grouped));
  widen(key_, width_of({mixer.head_dim}));
  widen(query_latent_, width_of({mixer.query_rank}));
  const int64_t columns = std::max(width_of({mixer.pool_columns}), width_of({mixer.key_columns}));
  widen(projected_, mixer.has_gates ? 2 * columns : columns);
  // Entries, where their groups begin, their cosines and sines, and their index keys.
  const int64_t keys = mixer.has_entry_keys ? width_of({mixer.index.dim}) : 0;
  if (columns > 0) widen(attended_, columns + PoolShape::kMostAxes + width_of({mixer.rope_dim}) + keys);
  widen(query_, width_of({mixer.index.num_heads, mixer.index.dim}));
  widen(value_, width_of({mixer.index.num_heads}));
  widen(chosen_, width_of({mixer.num_chosen}));
  widen(candidates_, width_of({mixer.candidates.count}));
  add_indexer(mixer.index);
  add_indexer(mixer.candidates);
  if (std::find(compressed_.begin(), compressed_.end(), mixer) == compressed_.end())
    compressed_.push_back(mixer);
}

void StackSizes::add(const DeltaShape& mixer) {
  const int64_t value = width_of({mixer.num_value_heads, mixer.value_dim});
  widen(projected_, 2 * width_of({mixer.num_key_heads, mixer.key_dim}) + 2 * value);
  widen(delta_gates_, 2 * width_of({mixer.num_value_heads}));
  widen(attended_, value);
}

void StackSizes::add(const KimiDeltaSizes& mixer) {
  add(mixer.shape);
  widen(delta_gates_, width_of({mixer.shape.num_key_heads, mixer.shape.key_dim + 1}));
  widen(query_latent_, width_of({mixer.latent_rows}));
}

void StackSizes::add(const ShortConvSizes& mixer) {
  widen(projected_, 3 * width_of({mixer.channels}));
  widen(attended_, width_of({mixer.channels}));
}

void StackSizes::add(const MambaShape& mixer) {
  const int64_t heads = width_of({mixer.num_heads}), channels = width_of({mixer.num_heads, mixer.head_dim});
  const int64_t shared = width_of({mixer.num_groups, mixer.state_dim});
  widen(projected_, 2 * channels + 2 * shared + heads);
  widen(delta_gates_, heads);
  widen(attended_, channels);
}

void StackSizes::add(const NgramSizes& ngrams) {
  const int64_t width = width_of({ngrams.width});
  widen(expert_out_, width + width_of({ngrams.streams + 1, hidden_}));
  widen(ngram_width_, width);
}

void StackSizes::add(const DenseSizes& ffn) { add_network({hidden_, ffn.width, 1}); }

void StackSizes::add(const RoutedSizes& ffn) {
  widen(num_experts_, width_of({ffn.num_experts}));
  widen(k_, width_of({ffn.k}));
  const int64_t expert_hidden = ffn.latent > 0 ? width_of({ffn.latent}) : hidden_;
  if (ffn.has_own_input || ffn.latent > 0) widen(expert_in_, expert_hidden);
  widen(expert_out_, width_of({ffn.k, expert_hidden}));
  widen(latent_, ffn.latent);
  add_network({expert_hidden, ffn.width, ffn.k});
  if (ffn.shared_width > 0) add_network({hidden_, ffn.shared_width, 1});
}

void StackSizes::add(const ResidualSizes& residual) {
  num_streams_ = residual.num_streams;
  stream_weights_ = width_of({residual.weights});
  stream_rank_ = width_of({residual.rank});
  const int64_t streams = width_of({num_streams_, hidden_});
  if (stream_weights_ > num_streams_) widen(attended_, streams);  // the streams that a look-ahead mixes
}

void StackSizes::add_ffn_post_norm() { ffn_sum_ = hidden_; }

void StackSizes::add_network(const Network& network) {
  width_of({network.width, network.k});
  if (std::find(networks_.begin(), networks_.end(), network) == networks_.end()) networks_.push_back(network);
}

int64_t StackSizes::lay_out(uint8_t* memory, int64_t max_tokens, StackBuffers& buffers) const {
  const int64_t most_assignments = INT32_MAX / std::max<int64_t>(1, k_);
  if (max_tokens < 1 || max_tokens > most_assignments) {
    throw std::invalid_argument("max_tokens is " + std::to_string(max_tokens) + ", expected 1 to " +
                                std::to_string(most_assignments));
  }
  int64_t end = 0;
  const auto place = [&]<class T>(int64_t width, T*& buffer) {
    static_assert(sizeof(T) == 4);
    buffer = memory != nullptr ? reinterpret_cast<T*>(memory + end) : nullptr;
    if (width == 0) return;
    const int64_t bytes = round_up(checked_product(kWorkingMemory, {4, max_tokens, width}), 64);
    if (bytes > kMostBytes - end)
      throw std::invalid_argument(std::string(kWorkingMemory) + " would take more than 2^62 bytes");
    end += bytes;
  };
  place(hidden_, buffers.hidden);
  place(hidden_, buffers.normed);
  place(hidden_, buffers.block);
  place(query_, buffers.query);
  place(attended_, buffers.attended);
  place(key_, buffers.key);
  place(value_, buffers.value);
  place(query_latent_, buffers.query_latent);
  place(chosen_, buffers.chosen);
  place(candidates_, buffers.candidates);
  place(projected_, buffers.projected);
  place(delta_gates_, buffers.delta_gates);
  place(num_pairs_, buffers.cosine);
  place(num_pairs_, buffers.sine);
  place(num_experts_, buffers.router_logits);
  place(k_, buffers.routing_weights);
  place(k_, buffers.expert_ids);
  place(1, buffers.shared_score);
  place(expert_in_, buffers.expert_in);
  place(expert_out_, buffers.expert_out);
  place(ffn_sum_, buffers.ffn_sum);
  const int64_t streams = num_streams_ > 1 ? width_of({num_streams_, hidden_}) : 0;
  place(streams, buffers.residual.streams);
  place(stream_weights_, buffers.residual.weights);
  place(stream_weights_, buffers.residual.peeked);
  place(streams > 0 ? num_streams_ : 0, buffers.residual.carried);
  place(stream_rank_ > 0 ? streams : 0, buffers.residual.normed);
  place(stream_rank_ > 0 ? streams : 0, buffers.residual.gates);
  place(stream_rank_, buffers.residual.low);
  buffers.residual.ahead = buffers.attended;
  return end;
}

int64_t StackSizes::buffer_bytes(int64_t max_tokens) const {
  StackBuffers none = {};
  return lay_out(nullptr, max_tokens, none);
}

int64_t StackSizes::dispatch_bytes(int64_t max_tokens) const {
  if (k_ == 0) return 0;
  // Assignments in their order, of this layer and the last; tokens and rows of experts that run, or experts
  // and weights of a look-ahead.
  const int64_t of_tokens = checked_product(kWorkingMemory, {4, 4, max_tokens, k_});
  return of_tokens + 32 * num_experts_ + int64_t(sizeof(ExpertView)) * num_experts_;
}

StackBuffers StackSizes::place_buffers(uint8_t* memory, int64_t max_tokens) const {
  StackBuffers buffers = {};
  lay_out(memory, max_tokens, buffers);
  return buffers;
}

int64_t StackSizes::scratch_bytes(int64_t max_tokens, int num_threads, bool has_quants, bool has_act_order,
                                  int64_t ranks) const {
  int64_t widest = std::max({int64_t{1}, hidden_, attended_, query_latent_, latent_, ngram_width_});
  if (num_streams_ > 1) widest = std::max({widest, num_streams_ * hidden_, stream_rank_});
  const int64_t cols = widest;  // the most columns of a matrix outside of the feed-forward networks
  for (const Network& network : networks_) widest = std::max({widest, (network.width + ranks) * network.k});
  checked_product(kWorkingMemory, {64, max_tokens, widest});  // nothing below is larger, so nothing overflows

  int64_t bytes = has_quants ? matmul_scratch_bytes(cols, max_tokens) : 0;
  if (num_experts_ > 0) bytes = std::max(bytes, route_scratch_bytes(num_experts_, num_threads));
  for (const AttentionScratchSizes& sizes : attentions_)
    bytes = std::max(bytes, attention_scratch_bytes(sizes, num_threads));
  for (const IndexSizes& index : indexers_) bytes = std::max(bytes, index_scratch_bytes(index, num_threads));
  for (const LatentSizes& latent : latents_) {
    LatentHeads heads = {};
    heads.num_heads = latent.num_heads;
    heads.nope_dim = latent.nope_dim;
    heads.rope_dim = latent.rope_dim;
    heads.kv_rank = latent.kv_rank;
    bytes = std::max(bytes, latent_scratch_bytes(heads, max_tokens, num_threads));
  }
  for (const CompressedSizes& mixer : compressed_) {
    const int64_t group_dim = mixer.num_heads / mixer.num_groups * mixer.head_dim;
    bytes = std::max(bytes, shared_scratch_bytes(mixer.head_dim, num_threads));
    bytes = std::max(bytes, group_scratch_bytes(mixer.num_groups, group_dim, max_tokens));
  }
  for (const Network& network : networks_) {
    bytes = std::max(bytes,
                     swiglu_scratch_bytes(network.hidden, network.width, max_tokens, max_tokens * network.k,
                                          num_threads, has_quants, has_act_order, ranks));
  }
  return Runtime::scratch_size(bytes);
}

}  // namespace argosy
