// mixers.cpp: binds the mixers of a layer, and checks that one fits its layer.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <string>
#include <tuple>
#include <utility>

#include "bind/layers.h"
#include "bind/recurrent.h"

namespace argosy {

using namespace nb::literals;

namespace {

struct BoundIndexer {
  PositionIndexer indexer;
  Kept kept;
};

struct BoundBlockIndexer {
  BlockIndexer indexer;
  Kept kept;
};

struct BoundPool {
  Pool pool;
  Kept kept;
};

struct BoundEntryIndexer {
  EntryIndexer indexer;
  Kept kept;
};

using StorePlace = std::pair<int64_t, int64_t>;  // store of the KV cache, layer of the recurrent state
using GateKindName = Named<std::string, "typing.Literal['sigmoid', 'softplus']">;
using QueryScaleOfNumbers = std::tuple<float, int64_t, int64_t>;  // beta, period, offset

QueryScale parse_query_scale(const QueryScaleOfNumbers& numbers) {
  const auto& [beta, period, offset] = numbers;
  require_range("the period of query_scale", period, 1, INT32_MAX);
  require_range("the offset of query_scale", offset, 0, INT32_MAX);
  return {beta, period, offset};
}

std::optional<OutputGate> keep_gate(Kept& kept, const Matrix* matrix, const std::string& kind) {
  if (kind != "sigmoid" && kind != "softplus")
    refuse("unknown gate_kind '" + kind + "'; known: sigmoid, softplus");
  if (matrix == nullptr) return std::nullopt;
  return OutputGate{kept.keep(*matrix), kind == "softplus" ? GateKind::softplus : GateKind::sigmoid};
}

BoundMixer grouped_query_attention(
    const Matrix& query, const Matrix& key, const Matrix* value, const Matrix& output, int64_t num_heads,
    int64_t window, float scale, const std::optional<ArrayOf<float>>& query_bias,
    const std::optional<ArrayOf<float>>& key_bias, const std::optional<ArrayOf<float>>& value_bias,
    const std::optional<ArrayOf<float>>& output_bias, const std::optional<ArrayOf<float>>& query_norm,
    const std::optional<ArrayOf<float>>& key_norm, bool is_norm_flat, float limit,
    const std::optional<ArrayOf<float>>& sinks, bool has_gate,
    const std::optional<ArrayOf<float>>& value_norm, bool is_causal, bool is_norm_last, float value_scale,
    bool is_chunked, const Matrix* gate, const GateKindName& gate_kind,
    const QueryScaleOfNumbers& query_scale, const BoundBlockIndexer* indexer) {
  require_range("heads", num_heads, 1, query.view.rows);
  require_range("window", window, 0, INT32_MAX);
  const int64_t parts = has_gate ? 2 * num_heads : num_heads;
  require_size("rows of query modulo heads", query.view.rows % parts, 0);
  if (query_norm.has_value() != key_norm.has_value())
    refuse("query_norm and key_norm must be given together");
  if (indexer != nullptr && (window > 0 || !is_causal)) refuse("an indexer needs is_causal and no window");
  const int64_t head_dim = query.view.rows / parts;
  require_size("columns of output modulo heads", output.view.cols % num_heads, 0);
  const int64_t value_dim = output.view.cols / num_heads;
  BoundMixer bound;
  Kept& kept = bound.kept;
  bound.mixer = GroupedQueryAttention{
      .query = kept.keep(query),
      .key = kept.keep(key),
      .value = value != nullptr ? std::optional(kept.keep(*value)) : std::nullopt,
      .output = kept.keep(output),
      .query_bias = kept.keep("query_bias", query_bias, query.view.rows),
      .key_bias = kept.keep("key_bias", key_bias, key.view.rows),
      .value_bias = kept.keep("value_bias", value_bias, value != nullptr ? value->view.rows : key.view.rows),
      .output_bias = kept.keep("output_bias", output_bias, output.view.rows),
      .query_norm = kept.keep("query_norm", query_norm, is_norm_flat ? query.view.rows : head_dim),
      .key_norm = kept.keep("key_norm", key_norm, is_norm_flat ? key.view.rows : head_dim),
      .is_norm_flat = is_norm_flat,
      .is_norm_last = is_norm_last,
      .value_norm = kept.keep("value_norm", value_norm, value_dim),
      .value_scale = value_scale,
      .limit = limit,
      .sinks = kept.keep("sinks", sinks, num_heads),
      .num_heads = num_heads,
      .window = {window, is_chunked},
      .is_causal = is_causal,
      .scale = scale,
      .query_scale = parse_query_scale(query_scale),
      .has_gate = has_gate,
      .gate = keep_gate(kept, gate, gate_kind),
      .indexer = indexer != nullptr ? std::optional(indexer->indexer) : std::nullopt,
  };
  if (indexer != nullptr) kept.keep(indexer->kept);
  return bound;
}

BoundMixer gated_delta_net(const Matrix& qkv, const Matrix& b, const Matrix& output, const Matrix* z,
                           const Matrix* a, const ArrayOf<float>& conv, const ArrayOf<float>& rate,
                           const ArrayOf<float>& dt_bias, const ArrayOf<float>& norm, const DeltaShape& shape,
                           bool is_tiled, bool has_sigmoid_gate, int64_t state_layer) {
  BoundMixer bound;
  Kept& kept = bound.kept;
  GatedDeltaNet net = {};
  net.qkv = kept.keep(qkv);
  if (z != nullptr) net.z = kept.keep(*z);
  net.b = kept.keep(b);
  if (a != nullptr) net.a = kept.keep(*a);
  net.output = kept.keep(output);
  net.shape = shape;
  net.weights = {
      .conv = {},
      .has_joined_conv = true,
      .rate = kept.keep("rate", rate, shape.num_value_heads),
      .dt_bias = kept.keep("dt_bias", dt_bias, shape.num_value_heads),
      .norm = kept.keep("norm", norm, shape.value_dim),
      .eps = 0.0f,
      .is_tiled = is_tiled,
      .has_sigmoid_gate = has_sigmoid_gate,
  };
  const float* channels = kept.keep("conv", conv, {shape.conv_width, shape.conv_channels()});
  for (int64_t part = 0; part < 3; ++part) net.weights.conv[part] = channels + part * shape.key_channels();
  net.state_layer = state_layer;
  if (is_tiled && z == nullptr) refuse("is_tiled needs z: without z, value heads lie beside their key heads");
  require_size("rows of qkv", net.qkv.rows, shape.conv_channels() + (net.z ? 0 : shape.value_channels()));
  if (net.z) require_size("rows of z", net.z->rows, shape.value_channels());
  require_size("rows of b", net.b.rows, shape.num_value_heads * (net.a ? 1 : 2));
  if (net.a) require_size("rows of a", net.a->rows, shape.num_value_heads);
  require_size("columns of output", net.output.cols, shape.value_channels());
  bound.mixer = std::move(net);
  return bound;
}

using Convolutions = std::tuple<ArrayOf<float>, ArrayOf<float>, ArrayOf<float>>;  // of q, k and v

BoundMixer kimi_delta_attention(const Matrix& query, const Matrix& key, const Matrix& value,
                                const Matrix& beta, const Matrix& decay, const Matrix& gate,
                                const Matrix& output, const Matrix* decay_down, const Matrix* gate_down,
                                const Convolutions& conv, const ArrayOf<float>& rate,
                                const ArrayOf<float>& dt_bias, const ArrayOf<float>& norm, float floor,
                                const DeltaSizes& sizes, int64_t state_layer) {
  const DeltaShape shape = delta_shape(sizes);
  require_size("value heads", shape.num_value_heads, shape.num_key_heads);
  require_size("value dim", shape.value_dim, shape.key_dim);  // q, k and v have one stride
  if (!(floor <= 0) || !std::isfinite(floor))
    refuse("floor is " + std::to_string(floor) + ", expected 0 or less");
  BoundMixer bound;
  Kept& kept = bound.kept;
  KimiDeltaAttention mixer = {};
  mixer.query = kept.keep(query);
  mixer.key = kept.keep(key);
  mixer.value = kept.keep(value);
  mixer.beta = kept.keep(beta);
  if (decay_down != nullptr) mixer.decay_down = kept.keep(*decay_down);
  mixer.decay = kept.keep(decay);
  if (gate_down != nullptr) mixer.gate_down = kept.keep(*gate_down);
  mixer.gate = kept.keep(gate);
  mixer.output = kept.keep(output);
  mixer.shape = shape;
  const int64_t keys = shape.key_channels(), values = shape.value_channels();
  mixer.weights = {
      .conv = {kept.keep("conv[0]", std::get<0>(conv), {shape.conv_width, keys}),
               kept.keep("conv[1]", std::get<1>(conv), {shape.conv_width, keys}),
               kept.keep("conv[2]", std::get<2>(conv), {shape.conv_width, values})},
      .has_joined_conv = false,
      .rate = kept.keep("rate", rate, shape.num_key_heads),
      .dt_bias = kept.keep("dt_bias", dt_bias, keys),
      .norm = kept.keep("norm", norm, shape.value_dim),
      .eps = 0.0f,
      .is_tiled = false,
      .has_sigmoid_gate = true,
      .has_channel_decay = true,
      .floor = floor,
  };
  mixer.state_layer = state_layer;
  require_size("rows of query", query.view.rows, keys);
  require_size("rows of key", key.view.rows, keys);
  require_size("rows of value", value.view.rows, values);
  require_size("rows of beta", beta.view.rows, shape.num_key_heads);
  require_size("rows of decay", decay.view.rows, keys);
  require_size("rows of gate", gate.view.rows, values);
  if (decay_down != nullptr) require_size("columns of decay", decay.view.cols, decay_down->view.rows);
  if (gate_down != nullptr) require_size("columns of gate", gate.view.cols, gate_down->view.rows);
  require_size("columns of output", output.view.cols, values);
  bound.mixer = std::move(mixer);
  return bound;
}

BoundMixer lightning_attention_layer(const Matrix& query, const Matrix* key, const Matrix* value,
                                     const Matrix& gate, const Matrix& output, int64_t num_heads,
                                     bool has_silu, const std::optional<ArrayOf<float>>& query_norm,
                                     const std::optional<ArrayOf<float>>& key_norm,
                                     const ArrayOf<float>& decay, const ArrayOf<float>& norm, float norm_eps,
                                     int64_t num_groups, float scale, int64_t state_layer) {
  const int64_t channels = gate.view.rows;
  require_range("heads", num_heads, 1, channels);
  require_size("rows of gate modulo heads", channels % num_heads, 0);
  if (query_norm.has_value() != key_norm.has_value())
    refuse("query_norm and key_norm must be given together");
  if ((key == nullptr) != (value == nullptr)) refuse("key and value must be given together");
  if (key == nullptr && query_norm) refuse("q and k in one matrix have no norms");
  const int64_t head_dim = channels / num_heads;
  require_range("num_groups", num_groups, 1, channels);
  require_size("rows of gate modulo num_groups", channels % num_groups, 0);
  require_size("rows of query", query.view.rows, key == nullptr ? 3 * channels : channels);
  if (key != nullptr) require_size("rows of key", key->view.rows, channels);
  if (value != nullptr) require_size("rows of value", value->view.rows, channels);
  require_size("columns of output", output.view.cols, channels);
  BoundMixer bound;
  Kept& kept = bound.kept;
  bound.mixer = LightningAttention{
      .query = kept.keep(query),
      .key = key == nullptr ? std::nullopt : std::optional(kept.keep(*key)),
      .value = value == nullptr ? std::nullopt : std::optional(kept.keep(*value)),
      .gate = kept.keep(gate),
      .output = kept.keep(output),
      .has_silu = has_silu,
      .query_norm = kept.keep("query_norm", query_norm, head_dim),
      .key_norm = kept.keep("key_norm", key_norm, head_dim),
      .decay = kept.keep("decay", decay, num_heads),
      .norm = kept.keep("norm", norm, channels),
      .norm_eps = norm_eps,
      .num_groups = num_groups,
      .scale = scale,
      .shape = {num_heads, num_heads, head_dim, head_dim, 1},
      .state_layer = state_layer,
  };
  return bound;
}

BoundMixer short_conv(const Matrix& input, const Matrix& output, const ArrayOf<float>& conv,
                      const std::optional<ArrayOf<float>>& conv_bias,
                      const std::optional<ArrayOf<float>>& input_bias,
                      const std::optional<ArrayOf<float>>& output_bias, int64_t state_layer) {
  const int64_t channels = output.view.cols;
  read_array("conv", conv, {kAnySize, channels});
  const int64_t width = int64_t(conv.shape(0));
  CausalConv::window_floats(channels, width);  // rejects sizes below 1 and products that overflow an int64
  require_size("rows of input", input.view.rows, 3 * channels);
  BoundMixer bound;
  Kept& kept = bound.kept;
  bound.mixer = ShortConv{
      .input = kept.keep(input),
      .output = kept.keep(output),
      .input_bias = kept.keep("input_bias", input_bias, input.view.rows),
      .output_bias = kept.keep("output_bias", output_bias, output.view.rows),
      .conv = {channels, width, kept.keep("conv", conv, {width, channels}),
               kept.keep("conv_bias", conv_bias, channels)},
      .state_layer = state_layer,
  };
  return bound;
}

BoundMixer mamba_mixer(const Matrix& input, const Matrix& output, const ArrayOf<float>& conv,
                       const std::optional<ArrayOf<float>>& conv_bias, const ArrayOf<float>& rate,
                       const ArrayOf<float>& dt_bias, const ArrayOf<float>& skip, const ArrayOf<float>& norm,
                       const MambaShape& shape, std::tuple<float, float> dt_limit,
                       const std::optional<ArrayOf<float>>& input_bias,
                       const std::optional<ArrayOf<float>>& output_bias, int64_t state_layer) {
  const auto [least_dt, most_dt] = dt_limit;
  if (!(least_dt >= 0 && least_dt <= most_dt)) refuse("dt_limit must be two numbers from 0 on, in order");
  require_size("rows of input", input.view.rows, shape.projected());
  require_size("columns of output", output.view.cols, shape.channels());
  BoundMixer bound;
  Kept& kept = bound.kept;
  bound.mixer = Mamba{
      .input = kept.keep(input),
      .output = kept.keep(output),
      .input_bias = kept.keep("input_bias", input_bias, input.view.rows),
      .output_bias = kept.keep("output_bias", output_bias, output.view.rows),
      .shape = shape,
      .weights =
          {
              .conv = kept.keep("conv", conv, {shape.conv_width, shape.conv_channels()}),
              .conv_bias = kept.keep("conv_bias", conv_bias, shape.conv_channels()),
              .rate = kept.keep("rate", rate, shape.num_heads),
              .dt_bias = kept.keep("dt_bias", dt_bias, shape.num_heads),
              .skip = kept.keep("skip", skip, shape.num_heads),
              .norm = kept.keep("norm", norm, shape.channels()),
              .eps = 0.0f,
              .least_dt = least_dt,
              .most_dt = most_dt,
          },
      .state_layer = state_layer,
  };
  return bound;
}

BoundMixer multi_head_latent_attention(const Matrix& query, const Matrix& kv_down, const Matrix& key_up,
                                       const Matrix& value_up, const Matrix& output, int64_t num_heads,
                                       int64_t rope_dim, float scale, float norm_eps,
                                       const ArrayOf<float>& kv_norm, const Matrix* query_down,
                                       const std::optional<ArrayOf<float>>& query_norm, int64_t num_chosen,
                                       const BoundIndexer* indexer, const Matrix* gate,
                                       const GateKindName& gate_kind, const QueryScaleOfNumbers& query_scale,
                                       int64_t group_size, const std::optional<ArrayOf<float>>& sinks) {
  if ((query_down != nullptr) != query_norm.has_value())
    refuse("query_down and query_norm must be given together");
  require_range("group_size", group_size, 1, int64_t{1} << 20);
  require_range("num_chosen", num_chosen, 0, INT32_MAX / group_size - 1);
  if (indexer != nullptr && (num_chosen == 0 || query_down == nullptr))
    refuse("an indexer needs query_down and num_chosen");
  if (indexer != nullptr) {
    const auto& pool = indexer->indexer.pool;
    require_size("group_size", group_size, pool ? pool->shape.ratio : 1);
  }
  BoundMixer bound;
  Kept& kept = bound.kept;
  LatentAttention mixer;
  mixer.heads = view_latent_heads(kept.keep(key_up), kept.keep(value_up), num_heads, rope_dim, scale);
  mixer.heads.sinks = kept.keep("sinks", sinks, num_heads);
  if (query_down != nullptr) {
    mixer.query_down = kept.keep(*query_down);
    mixer.query_norm = kept.keep("query_norm", query_norm, query_down->view.rows);
  }
  mixer.query = kept.keep(query);
  mixer.kv_down = kept.keep(kv_down);
  mixer.kv_norm = kept.keep("kv_norm", kv_norm, mixer.heads.kv_rank);
  mixer.output = kept.keep(output);
  mixer.norm_eps = norm_eps;
  mixer.num_chosen = num_chosen;
  mixer.group_size = group_size;
  if (indexer != nullptr) {
    mixer.indexer = indexer->indexer;
    kept.keep(indexer->kept);
  }
  mixer.query_scale = parse_query_scale(query_scale);
  mixer.gate = keep_gate(kept, gate, gate_kind);
  bound.mixer = mixer;
  return bound;
}

// Checks that an indexer fits its mixer, and gives its pool a place behind the mixer's.
void finish_indexer(CompressedAttention& mixer) {
  EntryIndexer& own = *mixer.indexer;
  require_range("num_chosen", mixer.num_chosen, 1, INT32_MAX);
  require_range("rope_dim", mixer.rope_dim, 0, own.dim());
  require_size("columns of the indexer's query", own.query.cols, mixer.query_down.rows);
  if (own.num_candidates > 0) {
    require_range("num_chosen", mixer.num_chosen, 1, (own.num_candidates - 1) * own.candidate_size + 1);
  }
  if (own.pool() == nullptr && own.entry_keys() == nullptr) return;
  if (!mixer.pool) refuse("an indexer makes keys beside a pool, and there is none");
  if (own.entry_keys() != nullptr)
    return require_size("columns of the indexer's key", own.entry_keys()->matrix.cols, mixer.head_dim());
  Pool& keys = std::get<Pool>(own.keys);
  require_size("the ratio of the indexer's pool", keys.shape.ratio, mixer.pool->shape.ratio);
  if (keys.gates.has_value() != mixer.pool->gates.has_value())
    refuse("the pool and the indexer's must both have gates, or neither");
  keys.state_begin = mixer.pool->shape.state_floats();
}

BoundMixer compressed_attention(const Matrix& query_down, const Matrix& query, const Matrix& key_value,
                                const Matrix& group_output, const Matrix& output, int64_t num_heads,
                                int64_t num_groups, int64_t rope_dim, int64_t window, float scale,
                                float norm_eps, const ArrayOf<float>& query_norm,
                                const ArrayOf<float>& kv_norm, const std::optional<ArrayOf<float>>& head_norm,
                                const std::optional<ArrayOf<float>>& sinks, const BoundPool* pool,
                                const std::optional<std::pair<int64_t, int64_t>>& entries,
                                const BoundEntryIndexer* indexer, int64_t num_chosen, int64_t state_layer) {
  require_range("heads", num_heads, 1, kLargestSize);
  require_range("num_groups", num_groups, 1, num_heads);
  require_size("heads modulo groups", num_heads % num_groups, 0);
  require_range("window", window, 1, INT32_MAX);
  const int64_t dim = key_value.view.rows;
  require_range("rows of key_value", dim, 1, kLargestSize);
  require_range("rope_dim", rope_dim, 0, dim);
  require_size("rows of query", query.view.rows, num_heads * dim);
  require_size("columns of query", query.view.cols, query_down.view.rows);
  require_size("columns of group_output", group_output.view.cols, num_heads / num_groups * dim);
  require_size("rows of group_output modulo groups", group_output.view.rows % num_groups, 0);
  require_size("columns of output", output.view.cols, group_output.view.rows);
  // A product with a quantised matrix must begin at a panel.
  if (is_quantized(group_output.view.format)) {
    require_size("rows of a group modulo the panel rows of a quantised group_output",
                 group_output.view.rows / num_groups % kPanelRows, 0);
  }
  BoundMixer bound;
  Kept& kept = bound.kept;
  bound.mixer = CompressedAttention{
      .query_down = kept.keep(query_down),
      .query_norm = kept.keep("query_norm", query_norm, query_down.view.rows),
      .query = kept.keep(query),
      .head_norm = kept.keep("head_norm", head_norm, dim),
      .key_value = kept.keep(key_value),
      .kv_norm = kept.keep("kv_norm", kv_norm, dim),
      .group_output = kept.keep(group_output),
      .output = kept.keep(output),
      .num_heads = num_heads,
      .num_groups = num_groups,
      .rope_dim = rope_dim,
      .window = {window},
      .norm_eps = norm_eps,
      .scale = scale,
      .sinks = kept.keep("sinks", sinks, num_heads),
      .num_chosen = num_chosen,
      .state_layer = state_layer,
  };
  auto& mixer = std::get<CompressedAttention>(bound.mixer);
  if (pool != nullptr && entries) refuse("entries are those of the pool, or of an earlier layer's");
  if (pool != nullptr) {
    require_size("the dimension of the pool", pool->pool.shape.dim, dim);
    kept.keep(pool->kept);
    mixer.pool = pool->pool;
    mixer.entries = EntryStore{pool->pool.store, pool->pool.shape.ratio};
  } else if (entries) {
    require_range("the store of entries", entries->first, 0, INT32_MAX);
    require_range("the ratio of entries", entries->second, 1, int64_t{1} << 20);
    mixer.entries = EntryStore{entries->first, entries->second};
  }
  require_range("num_chosen", num_chosen, 0, INT32_MAX);
  if (num_chosen > 0 && !mixer.entries) refuse("an index chooses entries of a pool, and there is none");
  if (indexer == nullptr) return bound;
  mixer.indexer = indexer->indexer;
  kept.keep(indexer->kept);
  finish_indexer(mixer);
  return bound;
}

void make_entry_indexer(BoundEntryIndexer* self, const Matrix& query, const Matrix& weights,
                        const BoundPool* pool, const Matrix* key,
                        const std::optional<ArrayOf<float>>& key_norm, int64_t store,
                        const std::optional<std::pair<int64_t, int64_t>>& candidates, bool finds_candidates) {
  require_range("rows of weights", weights.view.rows, 1, kLargestSize);
  require_size("rows of query modulo heads", query.view.rows % weights.view.rows, 0);
  require_range("store", store, 0, INT32_MAX);
  if ((key != nullptr) != key_norm.has_value()) refuse("key and key_norm must be given together");
  if (pool != nullptr && key != nullptr) refuse("index keys are those of a pool, or made of entries");
  Kept kept;
  EntryIndexer indexer = {
      .query = kept.keep(query), .weights = kept.keep(weights), .keys = {}, .store = store};
  require_range("elements of an index key", indexer.dim(), 1, kLargestSize);
  if (pool != nullptr) {
    require_size("rows of query", query.view.rows, weights.view.rows * pool->pool.shape.dim);
    indexer.keys = pool->pool;
    indexer.store = pool->pool.store;
    kept.keep(pool->kept);
  } else if (key != nullptr) {
    require_size("rows of key", key->view.rows, indexer.dim());
    indexer.keys = EntryKeys{kept.keep(*key), kept.keep("key_norm", *key_norm, indexer.dim())};
  }
  if (candidates) {
    require_range("candidate blocks", candidates->first, 1, int64_t{1} << 20);
    require_range("entries of a candidate block", candidates->second, 1, kMostIndexBlock);
    indexer.num_candidates = candidates->first;
    indexer.candidate_size = candidates->second;
  }
  if (finds_candidates && !candidates) refuse("finds_candidates needs candidates");
  indexer.finds_candidates = finds_candidates;
  new (self) BoundEntryIndexer{indexer, std::move(kept)};
}

void make_pool(BoundPool* self, const Matrix& vectors, const Matrix* gates, const PoolSizes& sizes,
               const std::optional<ArrayOf<float>>& bias, const ArrayOf<float>& norm, int64_t store) {
  const PoolShape shape = pool_shape(sizes);
  require_size("rows of vectors", vectors.view.rows, shape.columns());
  if (gates != nullptr) require_size("rows of gates", gates->view.rows, shape.columns());
  if (gates == nullptr && bias) refuse("a pool without gates has no bias of gates");
  require_range("store", store, 0, INT32_MAX);
  Kept kept;
  Pool pool;
  pool.vectors = kept.keep(vectors);
  pool.shape = shape;
  pool.store = store;
  if (gates != nullptr) pool.gates = kept.keep(*gates);
  if (bias) pool.bias = kept.keep("bias", *bias, {shape.ratio, shape.columns()});
  pool.norm = kept.keep("norm", norm, shape.dim);
  new (self) BoundPool{pool, std::move(kept)};
}

void make_indexer(BoundIndexer* self, const Matrix& query, const Matrix& key, const Matrix& weights,
                  const ArrayOf<float>& key_norm, const ArrayOf<float>& key_norm_bias, float norm_eps,
                  bool has_interleaved_pairs, int64_t rope_begin, const Matrix* gate,
                  const std::optional<ArrayOf<float>>& gate_bias, int64_t store, int64_t state_layer) {
  require_range("rows of key", key.view.rows, 1, kLargestSize);
  require_range("rope_begin", rope_begin, 0, key.view.rows);
  require_range("rows of weights", weights.view.rows, 1, kLargestSize);
  require_size("rows of query", query.view.rows, weights.view.rows * key.view.rows);
  Kept kept;
  PositionIndexer indexer = {
      .query = kept.keep(query),
      .key = kept.keep(key),
      .weights = kept.keep(weights),
      .key_norm = kept.keep("key_norm", key_norm, key.view.rows),
      .key_norm_bias = kept.keep("key_norm_bias", key_norm_bias, key.view.rows),
      .norm_eps = norm_eps,
      .has_interleaved_pairs = has_interleaved_pairs,
      .rope_begin = rope_begin,
  };
  if ((gate != nullptr) != gate_bias.has_value()) refuse("gate and gate_bias must be given together");
  if (gate != nullptr) {
    const int64_t dim = key.view.rows;
    require_size("rows of gate", gate->view.rows, dim);
    require_size("columns of gate", gate->view.cols, key.view.cols);
    indexer.gate = kept.keep(*gate);
    indexer.gate_bias = kept.keep("gate_bias", *gate_bias, {kAnySize, dim});
    const PoolShape shape = {int64_t(gate_bias->shape(0)), dim};
    require_range("the ratio of a pool", shape.ratio, 2, int64_t{1} << 20);
    indexer.pool = PoolPlace{shape, store, state_layer, 0};
  }
  new (self) BoundIndexer{indexer, std::move(kept)};
}

void make_block_indexer(BoundBlockIndexer* self, const Matrix& query, const Matrix& key,
                        const ArrayOf<float>& query_norm, const ArrayOf<float>& key_norm, int64_t num_chosen,
                        int64_t block_size, int64_t num_local, const std::optional<StorePlace>& pool) {
  require_range("rows of key", key.view.rows, 1, kLargestSize);
  require_size("rows of query modulo rows of key", query.view.rows % key.view.rows, 0);
  require_range("rows of query", query.view.rows, key.view.rows, kLargestSize);
  require_range("block_size", block_size, pool ? 2 : 1, kMostIndexBlock);
  require_range("num_chosen", num_chosen, 1, INT32_MAX / block_size - 1);
  require_range("num_local", num_local, pool ? 0 : 1, pool ? 0 : num_chosen);
  Kept kept;
  BlockIndexer indexer = {
      .query = kept.keep(query),
      .key = kept.keep(key),
      .query_norm = kept.keep("query_norm", query_norm, key.view.rows),
      .key_norm = kept.keep("key_norm", key_norm, key.view.rows),
      .count = num_chosen,
      .block_size = block_size,
      .num_local = num_local,
  };
  if (pool) indexer.pool = PoolPlace{{block_size, key.view.rows}, pool->first, pool->second, 0};
  new (self) BoundBlockIndexer{indexer, std::move(kept)};
}

void require_fit(const std::optional<OutputGate>& gate, int64_t num_heads, int64_t attended, int64_t hidden) {
  if (!gate) return;
  if (gate->matrix.rows != num_heads) require_size("rows of gate", gate->matrix.rows, attended);
  require_size("columns of gate", gate->matrix.cols, hidden);
}

// Checks that the parts of a layer fit the hidden state, the cache and each other.
void require_fit(const GroupedQueryAttention& mixer, const KvShape& kv, const Rotary* rotary,
                 int64_t hidden) {
  require_kind(kv, KvShape::Kind::keys_values);
  if (rotary != nullptr) require_range("rotated dimensions", 2 * rotary->num_pairs(), 0, kv.head_dim);
  const int64_t attended = mixer.num_heads * kv.value_dim, queries = mixer.num_heads * kv.head_dim;
  require_size("rows of query", mixer.query.rows, mixer.has_gate ? 2 * queries : queries);
  if (mixer.has_gate || !mixer.value) require_size("value dimensions of a head", kv.value_dim, kv.head_dim);
  require_fit(mixer.gate, mixer.num_heads, attended, hidden);
  require_size("heads modulo KV heads", mixer.num_heads % kv.kv_heads, 0);
  require_size("rows of key", mixer.key.rows, kv.kv_heads * kv.head_dim);
  if (mixer.value) require_size("rows of value", mixer.value->rows, kv.kv_heads * kv.value_dim);
  require_size("rows of output", mixer.output.rows, hidden);
  require_size("columns of query", mixer.query.cols, hidden);
  require_size("columns of key", mixer.key.cols, hidden);
  if (mixer.value) require_size("columns of value", mixer.value->cols, hidden);
  require_size("columns of output", mixer.output.cols, attended);
  const bool has_own_keys = mixer.indexer && !mixer.indexer->pool;
  require_size("elements of an index key", has_own_keys ? mixer.indexer->dim() : 0, kv.index_dim);
  if (!mixer.indexer) return;
  if (rotary != nullptr)
    require_range("rotated dimensions", 2 * rotary->num_pairs(), 0, mixer.indexer->dim());
  if (has_own_keys) require_size("heads of the indexer", mixer.indexer->num_heads(), kv.kv_heads);
  require_size("columns of the indexer's query", mixer.indexer->query.cols, hidden);
  require_size("columns of the indexer's key", mixer.indexer->key.cols, hidden);
}

void require_fit(const GatedDeltaNet& net, const KvShape& kv, const Rotary*, int64_t hidden) {
  require_kind(kv, KvShape::Kind::none);
  for (const MatrixView* matrix : {&net.qkv, &net.b})
    require_size("columns of qkv or b", matrix->cols, hidden);
  if (net.z) require_size("columns of z", net.z->cols, hidden);
  if (net.a) require_size("columns of a", net.a->cols, hidden);
  require_size("rows of output", net.output.rows, hidden);
}

void require_fit(const KimiDeltaAttention& mixer, const KvShape& kv, const Rotary*, int64_t hidden) {
  require_kind(kv, KvShape::Kind::none);
  for (const MatrixView* matrix : {&mixer.query, &mixer.key, &mixer.value, &mixer.beta})
    require_size("columns of query, key, value or beta", matrix->cols, hidden);
  require_size("columns of decay", (mixer.decay_down ? *mixer.decay_down : mixer.decay).cols, hidden);
  require_size("columns of gate", (mixer.gate_down ? *mixer.gate_down : mixer.gate).cols, hidden);
  require_size("rows of output", mixer.output.rows, hidden);
}

void require_fit(const LightningAttention& mixer, const KvShape& kv, const Rotary* rotary, int64_t hidden) {
  require_kind(kv, KvShape::Kind::none);
  if (rotary != nullptr) require_range("rotated dimensions", 2 * rotary->num_pairs(), 0, mixer.shape.key_dim);
  if (rotary != nullptr && !mixer.key) refuse("q and k in one matrix cannot rotate");
  for (const auto& matrix : {std::optional(mixer.query), mixer.key, mixer.value, std::optional(mixer.gate)})
    if (matrix) require_size("columns of query, key, value or gate", matrix->cols, hidden);
  require_size("rows of output", mixer.output.rows, hidden);
}

// A short convolution, or a Mamba-2 mixer.
template <class RecurrentMixer>
void require_fit(const RecurrentMixer& mixer, const KvShape& kv, const Rotary*, int64_t hidden) {
  require_kind(kv, KvShape::Kind::none);
  require_size("columns of input", mixer.input.cols, hidden);
  require_size("rows of output", mixer.output.rows, hidden);
}

template <class MatrixMixer>
StateShape state_of(const MatrixMixer& mixer) {
  return mixer.shape.state();
}
StateShape state_of(const CompressedAttention& mixer) { return {0, mixer.state_floats()}; }
StateShape state_of(const ShortConv& mixer) {
  return {CausalConv::window_floats(mixer.conv.channels, mixer.conv.width), 0};
}

// Checks that the recurrent state has the shape and the layer that the mixer needs.
template <class AnyMixer>
void require_state(const AnyMixer& mixer, const RecurrentState* recurrent) {
  if constexpr (requires { mixer.state_layer; }) {
    if (state_of(mixer).num_floats() == 0) return;
    if (recurrent == nullptr) refuse("a mixer with a state needs a recurrent state");
    require_range("state_layer", mixer.state_layer, 0, recurrent->num_layers() - 1);
    if (state_of(mixer) != recurrent->shape(mixer.state_layer))
      refuse("the mixer and the recurrent state have different sizes");
  }
}

// Checks that the cache has the pool's store, and the recurrent state its layer.
void require_pool(const PoolPlace& pool, const KvCache& cache, const RecurrentState* recurrent) {
  require_range("store", pool.store, 0, cache.num_layers() - 1);
  const KvShape& shape = cache.shape(pool.store);
  require_kind(shape, KvShape::Kind::latent);
  require_size("elements of an entry", shape.head_dim, pool.shape.dim);
  require_size("positions of an entry", shape.positions_per_entry, pool.shape.ratio);
  if (shape.is_windowed) refuse("the store of a pool keeps all positions");
  if (pool.shape.ratio == 1) return;
  if (recurrent == nullptr) refuse("a pool needs a recurrent state");
  require_range("state_layer", pool.state_layer, 0, recurrent->num_layers() - 1);
  const StateShape& state = recurrent->shape(pool.state_layer);
  require_range("the end of a pool's state", pool.state_begin + pool.shape.state_floats(), 0,
                state.matrix_floats);
}

void require_fit(const LatentAttention& mixer, const KvShape& kv, const Rotary* rotary, int64_t hidden) {
  require_kind(kv, KvShape::Kind::latent);
  const LatentHeads& heads = mixer.heads;
  require_size("kv_rank + rope_dim", heads.vector_dim(), kv.head_dim);
  if (rotary != nullptr) require_size("rotated dimensions", 2 * rotary->num_pairs(), heads.rope_dim);
  require_fit(mixer.gate, heads.num_heads, heads.num_heads * heads.value_dim, hidden);
  require_size("rows of query", mixer.query.rows, heads.num_heads * heads.query_dim());
  if (mixer.query_down) require_size("columns of query_down", mixer.query_down->cols, hidden);
  require_size("columns of query", mixer.query.cols, mixer.query_down ? mixer.query_down->rows : hidden);
  require_size("rows of kv_down", mixer.kv_down.rows, heads.vector_dim());
  require_size("columns of kv_down", mixer.kv_down.cols, hidden);
  require_size("rows of output", mixer.output.rows, hidden);
  require_size("columns of output", mixer.output.cols, heads.num_heads * heads.value_dim);
  const bool has_own_keys = mixer.indexer && !mixer.indexer->pool;
  require_size("elements of an index key", has_own_keys ? mixer.indexer->dim() : 0, kv.index_dim);
  if (!mixer.indexer) return;
  if (has_own_keys) {
    require_range("rotated dimensions", mixer.indexer->rope_begin + heads.rope_dim, 0, kv.index_dim);
  } else if (rotary != nullptr) {
    refuse("index keys of groups do not rotate");
  }
  require_size("columns of the indexer's query", mixer.indexer->query.cols, mixer.query_down->rows);
  require_size("columns of the indexer's key", mixer.indexer->key.cols, hidden);
  require_size("columns of the indexer's weights", mixer.indexer->weights.cols, hidden);
}

void require_fit(const CompressedAttention& mixer, const KvShape& kv, const Rotary* rotary, int64_t hidden) {
  require_kind(kv, KvShape::Kind::latent);
  require_size("rows of key_value", mixer.head_dim(), kv.head_dim);
  require_size("elements of an index key", kv.index_dim, 0);
  if (rotary != nullptr) require_size("rotated dimensions", 2 * rotary->num_pairs(), mixer.rope_dim);
  require_size("columns of query_down", mixer.query_down.cols, hidden);
  require_size("columns of key_value", mixer.key_value.cols, hidden);
  require_size("rows of output", mixer.output.rows, hidden);
  const auto require_pool = [&](const Pool& pool) {
    require_size("columns of a pool's vectors", pool.vectors.cols, hidden);
    if (pool.gates) require_size("columns of a pool's gates", pool.gates->cols, hidden);
  };
  if (mixer.pool) require_pool(*mixer.pool);
  if (!mixer.indexer) return;
  if (mixer.indexer->pool() != nullptr) require_pool(*mixer.indexer->pool());
  require_size("columns of the indexer's weights", mixer.indexer->weights.cols, hidden);
}

}  // namespace

void require_mixer(const Mixer& mixer, const KvCache& cache, int64_t layer, const RecurrentState* recurrent,
                   const Rotary* rotary, int64_t hidden) {
  std::visit(
      [&](const auto& one) {
        require_fit(one, cache.shape(layer), rotary, hidden);
        require_state(one, recurrent);
      },
      mixer);
  const auto require_pool_of = [&](const auto* one) {
    if (one != nullptr && one->indexer && one->indexer->pool)
      require_pool(*one->indexer->pool, cache, recurrent);
  };
  require_pool_of(std::get_if<LatentAttention>(&mixer));
  require_pool_of(std::get_if<GroupedQueryAttention>(&mixer));
}

void bind_mixers(nb::module_& m) {
  nb::class_<BoundMixer>(m, "Mixer", "The part of a layer that lets positions see each other.");
  nb::class_<BoundBlockIndexer>(m, "BlockIndexer", R"(
    Chooses the blocks of positions that the heads of each KV head see: the token's own and the num_local - 1 before
    it, then those with the highest product of an index query and the index key of a position.

    Args:
        query: [KV heads * dim, hidden].   key: [dim, hidden].
        query_norm, key_norm: [dim], of each head; then the first dimensions rotate as the layer's.
        num_chosen: blocks of block_size positions, which a KvCache's blocks must divide.
        pool: with any number of heads, which choose together, and num_local 0: a block has one key, the mean of its
            positions' before norm and rotary, in this store of the KV cache; unfinished blocks are in this layer of the
            recurrent state.)")
      .def(
          "__init__",
          [](BoundBlockIndexer* self, const Matrix& query, const Matrix& key,
             const ArrayOf<float>& query_norm, const ArrayOf<float>& key_norm, int64_t num_chosen,
             int64_t block_size, int64_t num_local, const std::optional<StorePlace>& pool) {
            make_block_indexer(self, query, key, query_norm, key_norm, num_chosen, block_size, num_local,
                               pool);
          },
          "query"_a, "key"_a, nb::kw_only(), "query_norm"_a, "key_norm"_a, "num_chosen"_a, "block_size"_a,
          "num_local"_a = 0, "pool"_a.none() = nb::none());

  m.def("grouped_query_attention", &grouped_query_attention, "query"_a, "key"_a, "value"_a.none(), "output"_a,
        nb::kw_only(), "num_heads"_a, "window"_a, "scale"_a, "query_bias"_a.none() = nb::none(),
        "key_bias"_a.none() = nb::none(), "value_bias"_a.none() = nb::none(),
        "output_bias"_a.none() = nb::none(), "query_norm"_a.none() = nb::none(),
        "key_norm"_a.none() = nb::none(), "is_norm_flat"_a = false, "limit"_a = 0.0f,
        "sinks"_a.none() = nb::none(), "has_gate"_a = false, "value_norm"_a.none() = nb::none(),
        "is_causal"_a = false, "is_norm_last"_a = false, "value_scale"_a = 1.0f, "is_chunked"_a = false,
        "gate"_a.none() = nb::none(), "gate_kind"_a = "sigmoid",
        "query_scale"_a = QueryScaleOfNumbers{0.0f, 1, 0}, "indexer"_a.none() = nb::none(), R"(
    q, k, v -> norm -> clamp -> rotary -> KV cache -> attention -> output projection.

    Args:
        query: [heads * head_dim, hidden].   output: [hidden, heads * value_dim].
        key, value: [kv_heads * head_dim, hidden] and [kv_heads * value_dim, hidden].
        value: None means that the keys, before their norm, are the values.
        window, is_chunked, scale: as for `attention`.
        query_bias ...: one number per row of the matrix; None means no bias.
        query_norm, key_norm: per head, [head_dim]; if flat, over all heads at once, one number per row; both or none.
        is_norm_last: they come after rotary.
        limit: q, k and v are clamped to [-limit, limit] before rotary; 0 means no clamping.
        sinks: [heads], as for `attention`.
        has_gate: query has rows [query, gate] for each head; a head's output is multiplied by sigmoid of its gate.
        value_norm: [value_dim], applied to each head; None means no norm.
        value_scale: multiplies the values.
        is_causal: no token sees a position after its own, whatever a step's `sees_until` says.
        gate: [heads, hidden] or [heads * value_dim, hidden]; the result of each head, or each of its elements, is
            multiplied by `gate_kind` of the gate's product with the layer's input.
        query_scale: beta, period, offset: queries are multiplied by 1 + beta * log(1 + (position + offset) // period).
        indexer: chooses the positions that a token sees, with is_causal and without a window; None means all.)");
  m.def(
      "gated_delta_net",
      [](const Matrix& qkv, const Matrix& b, const Matrix& output, const Matrix* z, const Matrix* a,
         const ArrayOf<float>& conv, const ArrayOf<float>& rate, const ArrayOf<float>& dt_bias,
         const ArrayOf<float>& norm, const DeltaSizes& sizes, bool is_tiled, int64_t state_layer,
         bool has_sigmoid_gate) {
        return gated_delta_net(qkv, b, output, z, a, conv, rate, dt_bias, norm, delta_shape(sizes), is_tiled,
                               has_sigmoid_gate, state_layer);
      },
      "qkv"_a, "b"_a, "output"_a, nb::kw_only(), "z"_a.none() = nb::none(), "a"_a.none() = nb::none(),
      "conv"_a, "rate"_a, "dt_bias"_a, "norm"_a, "sizes"_a, "is_tiled"_a, "state_layer"_a,
      "has_sigmoid_gate"_a = false, R"(
    Projections -> `gated_delta` -> output projection. Vectors and `is_tiled` are as for `gated_delta`.

    Args:
        qkv: [channels, hidden]. Without z: [q, k, v, z] of the first key head and its value heads, then of the next.
        b: [value heads, hidden]. Without a: [b, a] of the first key head's value heads, then of the next's.
        output: [hidden, value heads * value dim].
        state_layer: the layer of the recurrent state.)");
  nb::class_<BoundIndexer>(m, "PositionIndexer", R"(
    Chooses the positions that latent attention sees, by the lightning indexer (arXiv:2512.02556).

    Args:
        query: [heads * dim, query_rank].   key: [dim, hidden].   weights: [heads, hidden].
        key_norm, key_norm_bias: [dim], of a LayerNorm with epsilon `norm_eps`.
        has_interleaved_pairs: which of the dimensions from `rope_begin` on rotate together, as for `rope`, whatever the
            layer's rotary embedding says.
        gate, gate_bias: [dim, hidden] and [size, dim], both or none; with them, keys belong to groups of `size`
            positions, as `KvShape.pooled` stores them, and nothing rotates.
        store: the number of a pooled KvShape in the KV cache, for these keys.
        state_layer: the layer of the recurrent state that has only this pool's.)")
      .def(
          "__init__",
          [](BoundIndexer* self, const Matrix& query, const Matrix& key, const Matrix& weights,
             const ArrayOf<float>& key_norm, const ArrayOf<float>& key_norm_bias, float norm_eps,
             bool has_interleaved_pairs, int64_t rope_begin, const Matrix* gate,
             const std::optional<ArrayOf<float>>& gate_bias, int64_t store, int64_t state_layer) {
            make_indexer(self, query, key, weights, key_norm, key_norm_bias, norm_eps, has_interleaved_pairs,
                         rope_begin, gate, gate_bias, store, state_layer);
          },
          "query"_a, "key"_a, "weights"_a, nb::kw_only(), "key_norm"_a, "key_norm_bias"_a, "norm_eps"_a,
          "has_interleaved_pairs"_a, "rope_begin"_a = 0, "gate"_a.none() = nb::none(),
          "gate_bias"_a.none() = nb::none(), "store"_a = 0, "state_layer"_a = 0);
  m.def("kimi_delta_attention", &kimi_delta_attention, "query"_a, "key"_a, "value"_a, "beta"_a, "decay"_a,
        "gate"_a, "output"_a, nb::kw_only(), "decay_down"_a.none() = nb::none(),
        "gate_down"_a.none() = nb::none(), "conv"_a, "rate"_a, "dt_bias"_a, "norm"_a, "floor"_a, "sizes"_a,
        "state_layer"_a, R"(
    A delta net with a decay for each key dimension (arXiv:2510.26692). Values are like keys in heads and dimensions.

    A decay is e^(rate softplus(decay x + dt_bias)), or e^(floor sigmoid(-rate (decay x + dt_bias))).

    Args:
        query, key, value: [heads * dim, hidden].   beta: [heads, hidden].
        decay, gate: [heads * dim, hidden]; or their columns are the rows of decay_down and gate_down [rank, hidden].
        output: [hidden, heads * dim].
        conv: of q, k and v, [width, heads * dim].   rate: [heads], negative.   dt_bias: [heads * dim].
        norm: [dim], of each head's output, which is then multiplied by sigmoid(gate x).
        floor: the least logarithm of a decay; 0 means that there is none.
        state_layer: the layer of the recurrent state.)");
  m.def("lightning_attention", &lightning_attention_layer, "query"_a, "key"_a.none(), "value"_a.none(),
        "gate"_a, "output"_a, nb::kw_only(), "num_heads"_a, "has_silu"_a = false,
        "query_norm"_a.none() = nb::none(), "key_norm"_a.none() = nb::none(), "decay"_a, "norm"_a,
        "norm_eps"_a, "num_groups"_a, "scale"_a, "state_layer"_a, R"(
    Linear attention that each head forgets at a fixed rate (arXiv:2401.04658): S = decay S + k v^T.

    Args:
        query, key, value, gate: [heads * head dim, hidden].   output: [hidden, heads * head dim].
        key, value: None means that query has the rows of q, k and v of each head in turn; then nothing rotates.
        has_silu: q, k and v become silu of themselves, before their norms.
        query_norm, key_norm: [head dim], of each head, before rotary; both or none.
        decay: [heads].
        norm: [heads * head dim], of `num_groups` equal parts of all heads' output, with epsilon `norm_eps`; the output
            is then multiplied by sigmoid(gate x).
        scale: multiplies q . k.
        state_layer: the layer of the recurrent state, whose sizes are (heads, heads, head dim, head dim, 1).)");
  m.def("short_conv", &short_conv, "input"_a, "output"_a, nb::kw_only(), "conv"_a,
        "conv_bias"_a.none() = nb::none(), "input_bias"_a.none() = nb::none(),
        "output_bias"_a.none() = nb::none(), "state_layer"_a, R"(
    A convolution with two gates: [B, C, x] = input projection; C * conv(B * x) -> output projection.

    Args:
        input, output: [3 * hidden, hidden] and [hidden, hidden].
        conv: [width, hidden], depthwise and causal.   conv_bias: [hidden]; None means no bias.
        input_bias, output_bias: one number per row of the matrix; None means no bias.
        state_layer: the layer of the recurrent state.)");
  m.def(
      "mamba",
      [](const Matrix& input, const Matrix& output, const ArrayOf<float>& conv,
         const std::optional<ArrayOf<float>>& conv_bias, const ArrayOf<float>& rate,
         const ArrayOf<float>& dt_bias, const ArrayOf<float>& skip, const ArrayOf<float>& norm,
         const MambaSizes& sizes, std::tuple<float, float> dt_limit,
         const std::optional<ArrayOf<float>>& input_bias, const std::optional<ArrayOf<float>>& output_bias,
         int64_t state_layer) {
        return mamba_mixer(input, output, conv, conv_bias, rate, dt_bias, skip, norm, mamba_shape(sizes),
                           dt_limit, input_bias, output_bias, state_layer);
      },
      "input"_a, "output"_a, nb::kw_only(), "conv"_a, "conv_bias"_a.none() = nb::none(), "rate"_a,
      "dt_bias"_a, "skip"_a, "norm"_a, "sizes"_a, "dt_limit"_a, "input_bias"_a.none() = nb::none(),
      "output_bias"_a.none() = nb::none(), "state_layer"_a, R"(
    A Mamba-2 mixer (arXiv:2405.21060): [z, x, B, C, dt] = input projection; convolution over x, B and C, silu ->
    recurrence -> gate silu(z) -> norm within groups -> output projection.

    Args:
        input, output: [2 * channels + 2 * groups * state dim + heads, hidden] and [hidden, channels], where channels
            are heads * head dim.
        conv: [width, channels + 2 * groups * state dim].   conv_bias: one number per column; None means no bias.
        rate, dt_bias, skip: [heads]. dt = softplus(dt + dt_bias); the state decays by e^(rate dt); skip * x is added.
        norm: [channels].
        dt_limit: dt is clamped to these bounds.
        input_bias, output_bias: one number per row of the matrix; None means no bias.
        state_layer: the layer of the recurrent state.)");
  m.def("multi_head_latent_attention", &multi_head_latent_attention, "query"_a, "kv_down"_a, "key_up"_a,
        "value_up"_a, "output"_a, nb::kw_only(), "num_heads"_a, "rope_dim"_a, "scale"_a, "norm_eps"_a,
        "kv_norm"_a, "query_down"_a.none() = nb::none(), "query_norm"_a.none() = nb::none(),
        "num_chosen"_a = 0, "indexer"_a.none() = nb::none(), "gate"_a.none() = nb::none(),
        "gate_kind"_a = "sigmoid", "query_scale"_a = QueryScaleOfNumbers{0.0f, 1, 0}, "group_size"_a = 1,
        "sinks"_a.none() = nb::none(), R"(
    Query and compressed keys and values -> norms -> rotary -> KV cache -> attention -> output projection.

    Args:
        query: [heads * (nope_dim + rope_dim), query_rank]; without `query_down`, [..., hidden].
        kv_down: [kv_rank + rope_dim, hidden].   kv_norm: [kv_rank].
        key_up, value_up, scale: as for `latent_attention`.
        output: [hidden, heads * value_dim].
        query_down, query_norm: [query_rank, hidden] and [query_rank], both or none.
        norm_eps: the epsilon of both norms.
        num_chosen, group_size: a token sees at most so many groups of so many positions, and its unfinished one; 0
            means all.
        indexer: chooses them; None means that the layer sees what the last layer with an indexer chose.
        gate, gate_kind, query_scale, sinks: as for `grouped_query_attention`.)");
  nb::class_<BoundPool>(m, "Pool", R"(
    Entries that stand for groups of positions (native/ops/pool.h), normed and rotated where their groups begin.

    Args:
        vectors, gates: [columns, hidden]: `dim` columns, or twice as many if groups overlap. Without gates, an entry is
            the mean of its group.
        sizes: ratio, dim, whether groups overlap.
        bias: [ratio, columns], added to the gates.   norm: [dim].
        store: the number of a pooled KvShape in the KV cache.)")
      .def(
          "__init__",
          [](BoundPool* self, const Matrix& vectors, const Matrix* gates, const PoolSizes& sizes,
             const std::optional<ArrayOf<float>>& bias, const ArrayOf<float>& norm,
             int64_t store) { make_pool(self, vectors, gates, sizes, bias, norm, store); },
          "vectors"_a, "gates"_a.none(), nb::kw_only(), "sizes"_a, "bias"_a.none() = nb::none(), "norm"_a,
          "store"_a);
  nb::class_<BoundEntryIndexer>(m, "EntryIndexer", R"(
    Chooses the entries of a pool that a token sees, by index keys.

    Args:
        query: [heads * dim of keys, query_rank].   weights: [heads, hidden].
        pool: its entries are the keys.
        key, key_norm: [dim of keys, head_dim] and [dim of keys]: keys are made of the layer's entries before these
            rotate, and kept in `store`, the number of a pooled KvShape. With neither, an earlier layer did so.
        candidates: blocks, and entries of a block: the choice is made inside so many blocks, those with the best
            entries by the scores of the last layer with `finds_candidates`.)")
      .def(
          "__init__",
          [](BoundEntryIndexer* self, const Matrix& query, const Matrix& weights, const BoundPool* pool,
             const Matrix* key, const std::optional<ArrayOf<float>>& key_norm, int64_t store,
             const std::optional<std::pair<int64_t, int64_t>>& candidates, bool finds_candidates) {
            make_entry_indexer(self, query, weights, pool, key, key_norm, store, candidates,
                               finds_candidates);
          },
          "query"_a, "weights"_a, nb::kw_only(), "pool"_a.none() = nb::none(), "key"_a.none() = nb::none(),
          "key_norm"_a.none() = nb::none(), "store"_a = 0, "candidates"_a.none() = nb::none(),
          "finds_candidates"_a = false);
  m.def("compressed_attention", &compressed_attention, "query_down"_a, "query"_a, "key_value"_a,
        "group_output"_a, "output"_a, nb::kw_only(), "num_heads"_a, "num_groups"_a, "rope_dim"_a, "window"_a,
        "scale"_a, "norm_eps"_a, "query_norm"_a, "kv_norm"_a, "head_norm"_a.none() = nb::none(),
        "sinks"_a.none() = nb::none(), "pool"_a.none() = nb::none(), "entries"_a.none() = nb::none(),
        "indexer"_a.none() = nb::none(), "num_chosen"_a = 0, "state_layer"_a = 0, R"(
    DeepSeek-V4's attention: a position's one vector is key and value of all heads; the last dimensions rotate, and
    those of the result are rotated back. A token sees a window, and entries of the pool.

    Args:
        query_down: [query_rank, hidden].   query: [heads * head_dim, query_rank].   key_value: [head_dim, hidden].
        group_output: [groups * rank, heads / groups * head_dim]: each group of heads has `rank` of the rows.
        output: [hidden, groups * rank].
        rope_dim: dimensions that rotate.
        window, scale, sinks: as for `attention`.
        norm_eps: the epsilon of all norms.
        query_norm, kv_norm: [query_rank] and [head_dim].
        head_norm: [head_dim], of each head's query; None means no norm.
        pool: of head_dim; its entries are seen.
        entries: store and ratio of an earlier layer's pool, whose entries are seen. With neither, a token sees only its
            window.
        num_chosen: the entries that a token sees at most; 0 means all.
        indexer: chooses them; None means those that the last layer with an indexer chose.
        state_layer: the layer of the recurrent state, if the pool has a ratio above 1.)");
}

}  // namespace argosy
