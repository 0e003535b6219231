// The mixers of a Stack (stack.h): each reads `normed`, and add_block adds what it gives to the hidden state.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "ops/encoder.h"
#include "ops/layer.h"
#include "ops/stack.h"

namespace argosy {

// Multiplies the queries, `cols` of each token.
void Stack::scale_queries(const QueryScale& scale, int64_t cols) {
  if (scale.beta == 0) return;
  const auto lock = runtime_.lock();
  runtime_.parallel_for(step_.num_tokens, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const double periods = double((step_.order[t] + scale.offset) / scale.period);
      const float factor = float(1 + double(scale.beta) * std::log1p(periods));
      for (float* x = buffers_.query + t * cols; x < buffers_.query + (t + 1) * cols; ++x) *x *= factor;
    }
  });
}

void Stack::gate_output(const OutputGate& gate, int64_t num_heads, int64_t value_dim) {
  const int64_t tokens = step_.num_tokens, rows = gate.matrix.rows;
  multiply({{gate.matrix, buffers_.projected}}, buffers_.normed);
  mul_gate(runtime_, gate.kind, buffers_.projected, rows / num_heads, rows == num_heads ? 0 : 1,
           tokens * num_heads, value_dim, buffers_.attended);
}

// Multiplies the mixer's result by the output matrix and adds the product to the hidden state.
void Stack::add_block(const MatrixView& output, const float* bias, const float* attended) {
  const int64_t tokens = step_.num_tokens;
  multiply({{output, buffers_.block}}, attended);
  add_bias(runtime_, bias, tokens, output.rows, buffers_.block);
  if (layer().mixer_post_norm != nullptr) norm(layer().mixer_post_norm, buffers_.block, buffers_.block);
  multiply_rows(runtime_, layer().mixer_scale, tokens, output.rows, buffers_.block);
  add_rows(runtime_, buffers_.block, output.rows, tokens, output.rows, buffers_.hidden);
  mark(Part::attention_and_dense);
}

void Stack::mix(const GroupedQueryAttention& mixer) {
  const KvLayer kv = kv_.layer(number());
  const int64_t tokens = step_.num_tokens;
  const float eps = description_.norm_eps;
  float *query = buffers_.query, *key = buffers_.key, *value = buffers_.value;

  float* projected = mixer.has_gate ? buffers_.projected : query;
  std::vector<Product> products = {{mixer.query, projected}, {mixer.key, key}};
  if (mixer.value) products.push_back({*mixer.value, value});
  if (mixer.indexer) {
    products.push_back({mixer.indexer->query, buffers_.query_latent});
    products.push_back({mixer.indexer->key, buffers_.query_latent + tokens * mixer.indexer->query.rows});
  }
  multiply(products, buffers_.normed);
  add_bias(runtime_, mixer.query_bias, tokens, mixer.query.rows, projected);
  add_bias(runtime_, mixer.key_bias, tokens, mixer.key.rows, key);
  if (!mixer.value) std::copy_n(key, tokens * mixer.key.rows, value);
  const int64_t value_cols = kv.kv_heads * kv.value_dim;
  add_bias(runtime_, mixer.value_bias, tokens, value_cols, value);
  if (mixer.has_gate)
    copy_heads(runtime_, projected, 2 * kv.head_dim, tokens * mixer.num_heads, kv.head_dim, query);
  const auto norm_heads = [&](const float* weight, int64_t heads, float* x) {
    if (weight == nullptr) return;
    const int64_t cols = mixer.is_norm_flat ? heads * kv.head_dim : kv.head_dim;
    rms_norm(runtime_, x, weight, eps, tokens * heads * kv.head_dim / cols, cols, x);
  };
  const auto norm_queries_and_keys = [&] {
    norm_heads(mixer.query_norm, mixer.num_heads, query);
    norm_heads(mixer.key_norm, kv.kv_heads, key);
  };
  if (!mixer.is_norm_last) norm_queries_and_keys();
  if (mixer.value_norm != nullptr)
    rms_norm(runtime_, value, mixer.value_norm, eps, tokens * kv.kv_heads, kv.value_dim, value);
  if (mixer.limit > 0) {
    cut_off(runtime_, mixer.limit, tokens, mixer.num_heads * kv.head_dim, query);
    cut_off(runtime_, mixer.limit, tokens, mixer.key.rows, key);
    cut_off(runtime_, mixer.limit, tokens, value_cols, value);
  }
  multiply_rows(runtime_, mixer.value_scale, tokens, value_cols, value);
  rotate(query, mixer.num_heads, kv.head_dim);
  rotate(key, kv.kv_heads, kv.head_dim);
  if (mixer.is_norm_last) norm_queries_and_keys();
  scale_queries(mixer.query_scale, mixer.num_heads * kv.head_dim);

  const bool is_windowed = kv_.shape(number()).is_windowed;
  kv_write(runtime_, kv, key, value, is_windowed ? step_.window_slots : step_.slots, tokens);
  AttentionBatch batch = {
      .q = query,
      .num_tokens = tokens,
      .num_heads = mixer.num_heads,
      .block_table = is_windowed ? step_.window_table : step_.block_table,
      .max_blocks = step_.max_blocks,
      .sequence = step_.sequence,
      .order = step_.order,
      .sees_until = mixer.is_causal ? nullptr : step_.sees_until,
      .scale = mixer.scale,
      .window = mixer.window,
      .sinks = mixer.sinks,
  };
  if (mixer.indexer) choose_blocks(*mixer.indexer, batch);
  attention(runtime_, kv, batch, buffers_.attended);
  if (mixer.has_gate) {
    mul_gate(runtime_, GateKind::sigmoid, projected + kv.head_dim, 2 * kv.head_dim, 1,
             tokens * mixer.num_heads, kv.head_dim, buffers_.attended);
  }
  if (mixer.gate) gate_output(*mixer.gate, mixer.num_heads, kv.value_dim);
  add_block(mixer.output, mixer.output_bias);
}

// Stores the index keys of the step's tokens, and chooses the blocks of those that see more than they may.
void Stack::choose_blocks(const BlockIndexer& indexer, AttentionBatch& batch) {
  const int64_t tokens = batch.num_tokens, heads = indexer.num_heads(), dim = indexer.dim();
  const float eps = description_.norm_eps;
  float *query = buffers_.query_latent, *key = query + tokens * indexer.query.rows;
  LatentLayer keys;
  if (indexer.pool) {
    keys = store_entries(*indexer.pool, {key, nullptr, dim, nullptr}, [&](PoolEntries& entries) {
      const int64_t count = entries.count();
      rms_norm(runtime_, entries.vectors, indexer.key_norm, eps, count, dim, entries.vectors);
      if (!layer().rotary) return;
      const Rotary& rotary = description_.rotaries[size_t(*layer().rotary)];
      const int64_t pairs = rotary.num_pairs();
      float *cosine = entries.positions + tokens * PoolShape::kMostAxes, *sine = cosine + count * pairs;
      rotary_angles(runtime_, rotary, entries.positions, count, cosine, sine);
      rope(runtime_, {entries.vectors, dim}, count, 1, dim, cosine, sine, pairs, rotary.is_interleaved);
    });
  } else {
    rms_norm(runtime_, key, indexer.key_norm, eps, tokens, dim, key);
    rotate(key, 1, dim);
    keys = kv_.index_layer(number());
    latent_write(runtime_, keys, key, step_.slots, tokens);
  }

  const ChosenBlocks chosen = {buffers_.chosen, indexer.count, indexer.block_size, indexer.pool.has_value()};
  const bool is_limited =
      std::any_of(batch.order, batch.order + tokens, [&](int32_t order) { return chosen.limits(order); });
  if (!is_limited) return;
  rms_norm(runtime_, query, indexer.query_norm, eps, tokens * heads, dim, query);
  rotate(query, heads, dim);
  AttentionBatch index_batch = batch;
  index_batch.q = query;
  index_batch.num_heads = heads;
  if (indexer.pool) {
    std::vector<int32_t> whole;
    for (int64_t token = 0; token < tokens; ++token)
      whole.push_back(int32_t((batch.order[token] + 1) / indexer.block_size));
    index_batch.sees_until = whole.data();
    float* weights = key;  // the same for all heads: a factor changes no order
    std::fill_n(weights, tokens * heads, 1.0f);
    argosy::choose_positions(runtime_, keys, weights, index_batch, chosen.count, buffers_.chosen);
  } else {
    argosy::choose_blocks(runtime_, keys, index_batch, chosen, indexer.num_local, buffers_.chosen);
  }
  batch.chosen = chosen;
}

void Stack::mix(const GatedDeltaNet& net) {
  const int64_t tokens = step_.num_tokens;
  const DeltaShape& shape = net.shape;
  const int64_t sharing = shape.num_value_heads / shape.num_key_heads;
  float *mixed = buffers_.projected, *gates = buffers_.delta_gates;
  std::vector<Product> products = {{net.qkv, mixed}, {net.b, gates}};

  DeltaInputs inputs = {};
  inputs.stride = net.qkv.rows;
  inputs.key_group = shape.key_dim;
  inputs.value_group = inputs.z_group = sharing * shape.value_dim;
  inputs.q = mixed;
  if (net.z) {
    inputs.k = mixed + shape.key_channels();
    inputs.v = mixed + 2 * shape.key_channels();
    float* z = mixed + tokens * net.qkv.rows;
    inputs.z = z;
    inputs.z_stride = net.z->rows;
    products.push_back({*net.z, z});
  } else {
    inputs.key_group = inputs.value_group = inputs.z_group = net.qkv.rows / shape.num_key_heads;
    inputs.k = mixed + shape.key_dim;
    inputs.v = mixed + 2 * shape.key_dim;
    inputs.z = inputs.v + sharing * shape.value_dim;
    inputs.z_stride = net.qkv.rows;
  }
  inputs.b = gates;
  inputs.a_stride = inputs.b_stride = net.b.rows;
  inputs.a_group = inputs.b_group = net.b.rows / shape.num_key_heads;
  if (net.a) {
    inputs.a = gates + tokens * net.b.rows;
    products.push_back({*net.a, inputs.a});
  } else {
    inputs.a = gates + sharing;
  }
  multiply(products, buffers_.normed);
  DeltaWeights weights = net.weights;
  weights.eps = description_.norm_eps;
  gated_delta(runtime_, *recurrent_, net.state_layer, shape, weights, inputs, runs_, buffers_.attended);
  add_block(net.output, nullptr);
}

// Stores the index keys of the step's tokens. If a token sees more positions than it may, chooses some.
void Stack::choose_positions(const PositionIndexer& indexer, const AttentionBatch& batch,
                             const ChosenPositions& chosen) {
  const int64_t tokens = batch.num_tokens, heads = indexer.num_heads(), dim = indexer.dim();
  float *query = buffers_.query, *key = buffers_.value, *weights = key + tokens * dim;
  layer_norm(runtime_, key, indexer.key_norm, indexer.key_norm_bias, indexer.norm_eps, tokens, dim, key);
  LatentLayer keys;
  if (indexer.pool) {
    keys = store_entries(*indexer.pool, {key, weights + tokens * heads, dim, indexer.gate_bias},
                         [](PoolEntries&) {});
  } else {
    rotate(key + indexer.rope_begin, 1, dim, indexer.has_interleaved_pairs);
    keys = kv_.index_layer(number());
    latent_write(runtime_, keys, key, step_.slots, tokens);
  }

  bool is_limited = false;
  for (int64_t token = 0; token < tokens; ++token) is_limited |= chosen.limits(batch, token);
  if (!is_limited) return;
  multiply({{indexer.query, query}}, buffers_.query_latent);
  if (!indexer.pool) rotate(query + indexer.rope_begin, heads, dim, indexer.has_interleaved_pairs);
  // The scale of the scores, dim^-0.5, is not negative, so it may multiply the weights instead.
  multiply_rows(runtime_, 1 / std::sqrt(float(heads * dim)), tokens, heads, weights);
  AttentionBatch index_batch = batch;
  index_batch.num_heads = heads;
  std::vector<int32_t> groups;
  if (indexer.pool) {
    for (int64_t token = 0; token < tokens; ++token)
      groups.push_back(int32_t(batch.until(token) / chosen.size));
    index_batch.sees_until = groups.data();
  }
  argosy::choose_positions(runtime_, keys, weights, index_batch, chosen.count, buffers_.chosen);
  if (indexer.pool) expand_groups(batch, chosen, buffers_.chosen);
}

LatentLayer Stack::store_entries(const PoolPlace& place, const PoolInputs& inputs,
                                 const std::function<void(PoolEntries&)>& finish) {
  const int64_t tokens = step_.num_tokens;
  // Nothing is attended yet.
  PoolEntries entries = {buffers_.attended, buffers_.attended + tokens * place.shape.dim, {}};
  const bool is_turning = layer().rotary.has_value();
  const int64_t axes = is_turning ? description_.rotaries[size_t(*layer().rotary)].num_axes() : 1;
  pool_tokens(runtime_, recurrent_, place.state_layer, place.state_begin, place.shape, inputs, runs_,
              {step_.order, step_.angles, tokens, axes}, entries);
  if (entries.count() > 0) finish(entries);
  return write_entries({place.store, place.shape.ratio}, entries.tokens, entries.vectors);
}

LatentLayer Stack::write_entries(const EntryStore& to, const std::vector<int64_t>& tokens,
                                 const float* vectors) {
  const LatentLayer store = kv_.latent_layer(to.store);
  std::vector<int64_t> slots;
  for (const int64_t token : tokens)
    slots.push_back(entry_slot(step_.slots[token], kv_.block_tokens(), store, to.ratio));
  if (!slots.empty()) latent_write(runtime_, store, vectors, slots.data(), int64_t(slots.size()));
  return store;
}

void Stack::mix(const KimiDeltaAttention& mixer) {
  const int64_t tokens = step_.num_tokens;
  const DeltaShape& shape = mixer.shape;
  const int64_t heads = shape.num_key_heads, channels = shape.key_channels();

  DeltaInputs inputs = {};
  inputs.q = buffers_.projected;
  inputs.k = inputs.q + tokens * channels;
  inputs.v = inputs.k + tokens * channels;
  float* z = inputs.v + tokens * channels;
  inputs.z = z;
  inputs.a = buffers_.delta_gates;
  inputs.stride = inputs.z_stride = inputs.a_stride = channels;
  inputs.key_group = inputs.value_group = inputs.z_group = inputs.a_group = shape.key_dim;
  inputs.b = inputs.a + tokens * channels;
  inputs.b_stride = heads;
  inputs.b_group = 1;

  std::vector<Product> products = {
      {mixer.query, inputs.q}, {mixer.key, inputs.k}, {mixer.value, inputs.v}, {mixer.beta, inputs.b}};
  float* decay_latent = buffers_.query_latent;
  float* gate_latent = decay_latent + (mixer.decay_down ? tokens * mixer.decay_down->rows : 0);
  products.push_back(mixer.decay_down ? Product{*mixer.decay_down, decay_latent}
                                      : Product{mixer.decay, inputs.a});
  products.push_back(mixer.gate_down ? Product{*mixer.gate_down, gate_latent} : Product{mixer.gate, z});
  multiply(products, buffers_.normed);
  if (mixer.decay_down) multiply({{mixer.decay, inputs.a}}, decay_latent);
  if (mixer.gate_down) multiply({{mixer.gate, z}}, gate_latent);

  DeltaWeights weights = mixer.weights;
  weights.eps = description_.norm_eps;
  gated_delta(runtime_, *recurrent_, mixer.state_layer, shape, weights, inputs, runs_, buffers_.attended);
  add_block(mixer.output, nullptr);
}

void Stack::mix(const LightningAttention& mixer) {
  const int64_t tokens = step_.num_tokens, heads = mixer.shape.num_key_heads, dim = mixer.shape.key_dim;
  const int64_t channels = heads * dim;
  float* const q = buffers_.projected;
  float* const gate = q + 3 * tokens * channels;
  LightningInputs inputs = {q, q + dim, q + 2 * dim, 3 * channels, 3 * dim};
  std::vector<Product> products = {{mixer.query, q}, {mixer.gate, gate}};
  float* const k = q + tokens * channels;
  if (mixer.key) {
    inputs = {q, k, k + tokens * channels, channels, dim};
    products.push_back({*mixer.key, k});
    products.push_back({*mixer.value, k + tokens * channels});
  }
  multiply(products, buffers_.normed);
  // silu(x) = x sigmoid(x)
  if (mixer.has_silu) mul_gate(runtime_, GateKind::sigmoid, q, channels, 1, 3 * tokens, channels, q);
  if (mixer.query_norm != nullptr) {
    const float eps = description_.norm_eps;
    rms_norm(runtime_, q, mixer.query_norm, eps, tokens * heads, dim, q);
    rms_norm(runtime_, k, mixer.key_norm, eps, tokens * heads, dim, k);
  }
  if (mixer.key) {
    rotate(q, heads, dim);
    rotate(k, heads, dim);
  }
  float* out = buffers_.attended;
  lightning_attention(runtime_, *recurrent_, mixer.state_layer, mixer.shape, mixer.decay, mixer.scale, inputs,
                      runs_, out);
  rms_norm(runtime_, out, mixer.norm, mixer.norm_eps, tokens * mixer.num_groups, channels / mixer.num_groups,
           out, mixer.num_groups);
  mul_gate(runtime_, GateKind::sigmoid, gate, channels, 1, tokens, channels, out);
  add_block(mixer.output, nullptr);
}

void Stack::mix(const ShortConv& mixer) {
  const int64_t tokens = step_.num_tokens, channels = mixer.conv.channels;
  float* projected = buffers_.projected;
  multiply({{mixer.input, projected}}, buffers_.normed);
  add_bias(runtime_, mixer.input_bias, tokens, mixer.input.rows, projected);
  const ConvInputs inputs = {projected + 2 * channels, projected, projected + channels, mixer.input.rows};
  causal_conv(runtime_, *recurrent_, mixer.state_layer, mixer.conv, inputs, runs_,
              {buffers_.attended, channels});
  add_block(mixer.output, mixer.output_bias);
}

void Stack::mix(const Mamba& mixer) {
  const int64_t tokens = step_.num_tokens;
  float* projected = buffers_.projected;
  multiply({{mixer.input, projected}}, buffers_.normed);
  add_bias(runtime_, mixer.input_bias, tokens, mixer.input.rows, projected);
  MambaWeights weights = mixer.weights;
  weights.eps = description_.norm_eps;
  mamba(runtime_, *recurrent_, mixer.state_layer, mixer.shape, weights, projected, buffers_.delta_gates,
        runs_, buffers_.attended);
  add_block(mixer.output, mixer.output_bias);
}

void Stack::mix(const LatentAttention& mixer) {
  const LatentHeads& heads = mixer.heads;
  const LatentLayer kv = kv_.latent_layer(number());
  const int64_t tokens = step_.num_tokens;
  float *query = buffers_.query, *vectors = buffers_.key;
  const AttentionBatch batch = {
      .q = query,
      .num_tokens = tokens,
      .num_heads = heads.num_heads,
      .block_table = step_.block_table,
      .max_blocks = step_.max_blocks,
      .sequence = step_.sequence,
      .order = step_.order,
      .sees_until = step_.sees_until,
      .scale = heads.scale,
      .window = {},
  };
  ChosenPositions chosen;
  if (mixer.num_chosen > 0) chosen = {buffers_.chosen, mixer.num_chosen, mixer.group_size};

  if (mixer.query_down) {
    float* latent = buffers_.query_latent;
    std::vector<Product> products = {{*mixer.query_down, latent}, {mixer.kv_down, vectors}};
    if (mixer.indexer) {
      products.push_back({mixer.indexer->key, buffers_.value});
      float* weights = buffers_.value + tokens * mixer.indexer->dim();
      products.push_back({mixer.indexer->weights, weights});
      if (mixer.indexer->gate)
        products.push_back({*mixer.indexer->gate, weights + tokens * mixer.indexer->num_heads()});
    }
    multiply(products, buffers_.normed);
    rms_norm(runtime_, latent, mixer.query_norm, mixer.norm_eps, tokens, mixer.query_down->rows, latent);
    if (mixer.indexer) choose_positions(*mixer.indexer, batch, chosen);
    multiply({{mixer.query, query}}, latent);
  } else {
    multiply({{mixer.query, query}, {mixer.kv_down, vectors}}, buffers_.normed);
  }
  latent_norm(runtime_, vectors, mixer.kv_norm, mixer.norm_eps, tokens, heads.kv_rank, kv.dim);
  rotate(query + heads.nope_dim, heads.num_heads, heads.query_dim());
  rotate(vectors + heads.kv_rank, 1, kv.dim);
  scale_queries(mixer.query_scale, heads.num_heads * heads.query_dim());

  latent_write(runtime_, kv, vectors, step_.slots, tokens);
  const LatentPairs* const* pairs = pairs_of(&StackAdapter::latents, heads.key_up.data, latent_pairs_);
  if (pairs != nullptr) multiply_queries(runtime_, heads, pairs, tokens, query);
  latent_attention(runtime_, kv, heads, batch, chosen, buffers_.attended, pairs);
  if (mixer.gate) gate_output(*mixer.gate, heads.num_heads, heads.value_dim);
  add_block(mixer.output, nullptr);
}

// Adds the step's tokens to a pool, and stores the entries that they complete, with their index keys.
void Stack::gather(const Pool& pool, const EntryKeys* keys, const CompressedAttention& mixer) {
  const int64_t tokens = step_.num_tokens, dim = pool.shape.dim, columns = pool.shape.columns();
  float *vectors = buffers_.projected, *gates = vectors + tokens * columns;
  std::vector<Product> products = {{pool.vectors, vectors}};
  if (pool.gates) products.push_back({*pool.gates, gates});
  multiply(products, buffers_.normed);

  const auto finish = [&](PoolEntries& entries) {
    const int64_t count = entries.count();
    rms_norm(runtime_, entries.vectors, pool.norm, mixer.norm_eps, count, dim, entries.vectors);
    float* cosine = entries.positions + tokens * PoolShape::kMostAxes;
    float* index_keys = cosine + tokens * mixer.rope_dim;
    const int64_t key_dim = keys != nullptr ? keys->matrix.rows : 0;
    if (keys != nullptr) {
      matmul(runtime_, {{keys->matrix, index_keys}}, entries.vectors, count);
      rms_norm(runtime_, index_keys, keys->norm, mixer.norm_eps, count, key_dim, index_keys);
    }
    if (layer().rotary) {
      const Rotary& rotary = description_.rotaries[size_t(*layer().rotary)];
      float* sine = cosine + count * rotary.num_pairs();
      rotary_angles(runtime_, rotary, entries.positions, count, cosine, sine);
      const auto turn = [&](float* x, int64_t size) {
        rope(runtime_, {x + size - mixer.rope_dim, size}, count, 1, size, cosine, sine, rotary.num_pairs(),
             rotary.is_interleaved);
      };
      turn(entries.vectors, dim);
      if (keys != nullptr) turn(index_keys, key_dim);
    }
    if (keys != nullptr) write_entries({mixer.indexer->store, pool.shape.ratio}, entries.tokens, index_keys);
  };
  store_entries({pool.shape, pool.store, mixer.state_layer, pool.state_begin},
                {vectors, pool.gates ? gates : nullptr, columns, pool.bias}, finish);
}

// Chooses entries for the tokens that would see more than num_chosen, after index keys are stored.
void Stack::choose_entries(const CompressedAttention& mixer, const float* query_latent) {
  const EntryIndexer& indexer = *mixer.indexer;
  const int64_t tokens = step_.num_tokens, heads = indexer.num_heads(), dim = indexer.dim();
  if (indexer.pool() != nullptr) gather(*indexer.pool(), nullptr, mixer);
  std::vector<int32_t> until;
  int64_t most = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    until.push_back(int32_t((step_.order[token] + 1) / mixer.entries->ratio));
    most = std::max<int64_t>(most, until.back());
  }
  if (most <= mixer.num_chosen) return;
  float *query = buffers_.query, *weights = buffers_.value;
  multiply({{indexer.query, query}}, query_latent);
  multiply({{indexer.weights, weights}}, buffers_.normed);
  rotate(query + dim - mixer.rope_dim, heads, dim);
  // The scale of the scores, dim^-0.5, is not negative, so it may multiply the weights instead.
  multiply_rows(runtime_, 1 / std::sqrt(float(heads * dim)), tokens, heads, weights);
  const AttentionBatch batch = {
      .q = query,
      .num_tokens = tokens,
      .num_heads = heads,
      .block_table = step_.block_table,
      .max_blocks = step_.max_blocks,
      .sequence = step_.sequence,
      .order = step_.order,
      .sees_until = until.data(),
      .scale = 1,
      .window = {},
  };
  const LatentLayer keys = kv_.latent_layer(indexer.store);
  CandidateBlocks candidates;
  if (indexer.num_candidates > 0)
    candidates = {buffers_.candidates, indexer.num_candidates, indexer.candidate_size};
  if (indexer.finds_candidates) {
    choose_candidates(runtime_, keys, weights, batch, candidates.count, candidates.size, buffers_.candidates);
    candidate_cols_ = candidates.count;
    // The best entries lie in the best blocks, because even with the last block there are enough.
    if (mixer.num_chosen >= candidates.count) candidates = {};
  }
  argosy::choose_positions(runtime_, keys, weights, batch, mixer.num_chosen, buffers_.chosen, candidates);
  chosen_cols_ = mixer.num_chosen;
}

// The entries that the tokens see, after those that they complete are stored, if the layer has the pool.
LatentSource Stack::entries_of(const CompressedAttention& mixer, const float* query_latent) {
  if (mixer.pool) gather(*mixer.pool, mixer.indexer ? mixer.indexer->entry_keys() : nullptr, mixer);
  if (mixer.indexer) choose_entries(mixer, query_latent);
  LatentSource source = {kv_.latent_layer(mixer.entries->store), step_.block_table, step_.max_blocks, {}};
  for (int64_t token = 0; token < step_.num_tokens; ++token) {
    const int64_t count = (step_.order[token] + 1) / mixer.entries->ratio;
    const bool is_limited = mixer.num_chosen > 0 && count > mixer.num_chosen;
    source.seen.push_back({is_limited ? buffers_.chosen + token * mixer.num_chosen : nullptr, 0,
                           is_limited ? mixer.num_chosen : count});
  }
  return source;
}

LatentSource Stack::window_of(const CompressedAttention& mixer) {
  const bool is_windowed = kv_.shape(number()).is_windowed;
  LatentSource source = {
      kv_.latent_layer(number()), is_windowed ? step_.window_table : step_.block_table, step_.max_blocks, {}};
  const auto until = [&](int64_t token) {
    return step_.sees_until != nullptr ? int64_t(step_.sees_until[token]) : int64_t(step_.order[token]) + 1;
  };
  int64_t span = 0;  // the first of the tokens that see as far as this one
  for (int64_t token = 0; token < step_.num_tokens; ++token) {
    if (step_.sequence[token] != step_.sequence[span] || until(token) != until(span)) span = token;
    const int64_t first = std::min(first_seen(mixer.window, step_.order[token]), int64_t(step_.order[span]));
    source.seen.push_back({nullptr, first, until(token) - first});
  }
  return source;
}

void Stack::mix(const CompressedAttention& mixer) {
  const LatentLayer kv = kv_.latent_layer(number());
  const int64_t tokens = step_.num_tokens, heads = mixer.num_heads, dim = kv.dim;
  const int64_t nope_dim = dim - mixer.rope_dim;
  float *query = buffers_.query, *vectors = buffers_.key, *latent = buffers_.query_latent;
  float *attended = buffers_.attended, *grouped = query;  // queries are not needed after attention

  multiply({{mixer.query_down, latent}, {mixer.key_value, vectors}}, buffers_.normed);
  rms_norm(runtime_, latent, mixer.query_norm, mixer.norm_eps, tokens, mixer.query_down.rows, latent);
  rms_norm(runtime_, vectors, mixer.kv_norm, mixer.norm_eps, tokens, dim, vectors);
  rotate(vectors + nope_dim, 1, dim);
  std::vector<LatentSource> sources = {window_of(mixer)};
  if (mixer.entries) sources.push_back(entries_of(mixer, latent));
  multiply({{mixer.query, query}}, latent);
  if (mixer.head_norm != nullptr)
    rms_norm(runtime_, query, mixer.head_norm, mixer.norm_eps, tokens * heads, dim, query);
  rotate(query + nope_dim, heads, dim);

  const bool is_windowed = kv_.shape(number()).is_windowed;
  latent_write(runtime_, kv, vectors, is_windowed ? step_.window_slots : step_.slots, tokens);
  shared_attention(runtime_, sources, {heads, dim, mixer.scale, mixer.sinks}, query, step_.sequence, tokens,
                   attended);
  rotate_back(attended + nope_dim, heads, dim);
  multiply_groups(runtime_, mixer.group_output, mixer.num_groups, attended, tokens, grouped);
  add_block(mixer.output, nullptr, grouped);
}

}  // namespace argosy
