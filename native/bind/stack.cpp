// stack.cpp: binds the layers of a decoder.
//
// Python describes a model from matrices and vectors it owns. A Stack keeps all of them alive and checks once
// that their sizes agree. A step keeps its arrays alive until the next step begins.

#include "ops/stack.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/layers.h"
#include "bind/recurrent.h"
#include "bind/routing.h"
#include "bind/stack_adapter.h"
#include "kernels/half.h"
#include "store/start_threads.h"

namespace argosy {

using namespace nb::literals;

namespace {

// A call runs this long between two checks for ^C.
constexpr std::chrono::milliseconds kSignalInterval{50};

constexpr int64_t kMostAxes = 8;  // rotary position axes

using NetworkOfMatrices =
    Named<std::tuple<const Matrix*, const Matrix*, const Matrix*>, "tuple[Matrix | None, Matrix, Matrix]">;
using LatentOfMatrices = std::tuple<const Matrix*, const Matrix*>;               // down, up
using OverridesOfArrays = std::tuple<ArrayOf<int64_t>, ArrayOf<float>>;          // rows, embeddings
using AdditionOfArrays = std::tuple<int64_t, ArrayOf<int64_t>, ArrayOf<float>>;  // layer, rows, vectors
using TapOfArray = std::tuple<int64_t, OutArrayOf<float>>;                       // layer, hidden state
using NumbersOfTokens = Named<Array, "numpy.ndarray[dtype=int32] | numpy.ndarray[dtype=float32]">;
using LayerAndDispatch = std::tuple<int64_t, std::shared_ptr<const Dispatch>>;

std::optional<Activation> parse_activation(const std::optional<ActivationOfNumbers>& activation) {
  return activation ? std::optional(parse_activation(*activation)) : std::nullopt;
}

BoundFfn dense_ffn(const Matrix* gate, const Matrix& up, const Matrix& down,
                   const std::optional<ActivationOfNumbers>& activation) {
  BoundFfn bound;
  bound.ffn = DenseFfn{bound.kept.keep(gate, up, down), parse_activation(activation)};
  return bound;
}

// Checks that a table has k experts in each row.
void require_table(const MatrixView& table, int64_t k, int64_t num_experts) {
  if (table.format != Format::f32) refuse("token_experts is a matrix of format f32");
  require_size("columns of token_experts", table.cols, k);
  for (int64_t i = 0; i < table.rows * k; ++i) {
    const auto id = read_unaligned<float>(table.data + 4 * i);
    if (!(id >= 0) || id >= float(num_experts) || id != float(int32_t(id)))
      refuse("token_experts has " + std::to_string(id) + " in row " + std::to_string(i / k) +
             "; the layer has experts 0 to " + std::to_string(num_experts - 1));
  }
}

BoundFfn routed_ffn(const Matrix& router, const Routing& routing,
                    const std::optional<ArrayOf<float>>& router_bias, int64_t width,
                    const std::optional<NetworkOfMatrices>& shared, const Matrix* shared_score,
                    const std::optional<ArrayOf<float>>& router_norm,
                    const std::optional<ArrayOf<float>>& norm, const std::optional<ArrayOf<float>>& post_norm,
                    const std::optional<ArrayOf<float>>& shared_post_norm,
                    const std::optional<ActivationOfNumbers>& shared_activation,
                    const std::optional<LatentOfMatrices>& latent, float router_logit_cap, bool weighs_input,
                    const std::optional<ArrayOf<float>>& latent_norm, const Matrix* token_experts) {
  BoundFfn bound;
  RoutedFfn ffn = {};
  ffn.router = {
      .matrix = bound.kept.keep(router),
      .bias = bound.kept.keep("router_bias", router_bias, router.view.rows),
      .norm = bound.kept.keep("router_norm", router_norm, router.view.cols),
      .rule = routing.checked(router.view.rows),
      .logit_cap = router_logit_cap,
      .weighs_input = weighs_input,
  };
  if (weighs_input) require_size("experts_per_token with weighs_input", ffn.router.rule.k, 1);
  if (token_experts != nullptr) {
    ffn.router.token_experts = bound.kept.keep(*token_experts);
    require_table(*ffn.router.token_experts, ffn.router.rule.k, router.view.rows);
  }
  if (routing.choice_bias) bound.kept.arrays.push_back(*routing.choice_bias);
  if (routing.expert_scale) bound.kept.arrays.push_back(*routing.expert_scale);
  if (routing.media_bias) bound.kept.arrays.push_back(*routing.media_bias);
  require_range("width", width, 0, kLargestSize);
  ffn.width = width;
  ffn.norm = bound.kept.keep("norm", norm, router.view.cols);
  ffn.post_norm = bound.kept.keep("post_norm", post_norm, router.view.cols);
  if (shared) {
    const auto& [gate, up, down] = shared->base();
    ffn.shared = SharedExpert{
        bound.kept.keep(gate, require_item("shared[1]", up), require_item("shared[2]", down)),
        std::nullopt,
        bound.kept.keep("shared_post_norm", shared_post_norm, router.view.cols),
        parse_activation(shared_activation),
    };
    if (shared_score != nullptr) ffn.shared->score = bound.kept.keep(*shared_score);
  }
  if (latent) {
    const auto& [down, up] = *latent;
    ffn.latent = LatentExperts{bound.kept.keep(require_item("latent[0]", down)),
                               bound.kept.keep(require_item("latent[1]", up))};
    require_size("columns of latent[0]", ffn.latent->down.cols, router.view.cols);
    require_size("rows of latent[1]", ffn.latent->up.rows, router.view.cols);
    require_size("columns of latent[1]", ffn.latent->up.cols, ffn.latent->down.rows);
    ffn.latent->norm = bound.kept.keep("latent_norm", latent_norm, ffn.latent->down.rows);
    if (norm) refuse("latent experts read what the layer's norm gives: leave out norm");
  } else if (latent_norm) {
    refuse("latent_norm is the norm of latent experts: give latent");
  }
  bound.ffn = std::move(ffn);
  return bound;
}

void make_layer(BoundLayer* self, const std::optional<ArrayOf<float>>& mixer_norm, const BoundMixer* mixer,
                const std::optional<ArrayOf<float>>& ffn_norm, const BoundFfn* ffn,
                std::optional<int64_t> rotary, const std::optional<ArrayOf<float>>& mixer_post_norm,
                const std::optional<ArrayOf<float>>& ffn_post_norm, float scale, bool is_parallel,
                float mixer_scale, float ffn_scale, float normed_residual, const BoundMix* mixer_mix,
                const BoundMix* ffn_mix, const BoundNgrams* ngrams, int64_t reach) {
  Kept kept;
  require_range("reach", reach, 0, INT64_MAX);
  if (mixer == nullptr && ffn == nullptr) refuse("a layer needs a mixer or a feed-forward network");
  if (is_parallel && (mixer == nullptr || ffn == nullptr || ffn_norm))
    refuse("a parallel layer has a mixer and a feed-forward network, and mixer_norm is its only norm");
  if (mixer == nullptr && (mixer_norm || mixer_post_norm))
    refuse("the layer has norms of a mixer, but no mixer");
  if (ffn == nullptr && (ffn_norm || ffn_post_norm))
    refuse("the layer has norms of a feed-forward network, but no such network");
  if (mixer != nullptr) kept.keep(mixer->kept);
  if (ffn != nullptr) kept.keep(ffn->kept);
  if (ngrams != nullptr) kept.keep(ngrams->kept);
  int64_t hidden = 0;  // the last dimension of the norms, the first one decides
  for (const auto* norm : {&ffn_post_norm, &mixer_post_norm, &ffn_norm, &mixer_norm}) {
    if (*norm && (*norm)->ndim() > 0) hidden = int64_t((*norm)->shape((*norm)->ndim() - 1));
  }
  if (hidden == 0 && mixer_mix == nullptr && ffn_mix == nullptr)
    refuse("a layer needs a norm of its mixer or of its feed-forward network");
  if (mixer_mix != nullptr) kept.keep(mixer_mix->kept);
  if (ffn_mix != nullptr) kept.keep(ffn_mix->kept);
  Layer layer = {
      .mixer_norm = kept.keep_norm("mixer_norm", mixer_norm, hidden),
      .mixer = mixer != nullptr ? std::optional(mixer->mixer) : std::nullopt,
      .ngrams = ngrams != nullptr ? std::optional(ngrams->ngrams) : std::nullopt,
      .ffn_norm = kept.keep_norm("ffn_norm", ffn_norm, hidden),
      .ffn = ffn != nullptr ? std::optional(ffn->ffn) : std::nullopt,
      .is_parallel = is_parallel,
      .rotary = rotary,
      .mixer_post_norm = kept.keep("mixer_post_norm", mixer_post_norm, hidden),
      .ffn_post_norm = kept.keep("ffn_post_norm", ffn_post_norm, hidden),
      .mixer_scale = mixer_scale,
      .ffn_scale = ffn_scale,
      .normed_residual = normed_residual,
      .scale = scale,
      .mixer_mix = mixer_mix != nullptr ? std::optional(mixer_mix->mix) : std::nullopt,
      .ffn_mix = ffn_mix != nullptr ? std::optional(ffn_mix->mix) : std::nullopt,
      .reach = reach,
  };
  const auto copy = [](const BoundMix* mix) { return mix != nullptr ? std::optional(*mix) : std::nullopt; };
  new (self) BoundLayer{std::move(layer), hidden, std::move(kept), copy(mixer_mix), copy(ffn_mix)};
}

void require_fit(const DenseFfn& ffn, int64_t hidden, int64_t, const Activation& activation) {
  require_size("columns of up", ffn.network.up.cols, hidden);
  require_gate("the dense network", ffn.network.gate.has_value(), ffn.activation.value_or(activation));
}

void require_fit(const RoutedFfn& ffn, int64_t hidden, int64_t vocabulary, const Activation& activation) {
  require_size("columns of router", ffn.router.matrix.cols, hidden);
  if (ffn.router.token_experts)
    require_size("rows of token_experts", ffn.router.token_experts->rows, vocabulary);
  if (!ffn.shared) return;
  require_size("columns of the shared up", ffn.shared->network.up.cols, hidden);
  require_gate("the shared expert", ffn.shared->network.gate.has_value(),
               ffn.shared->activation.value_or(activation));
  if (ffn.shared->score) {
    require_size("rows of shared_score", ffn.shared->score->rows, 1);
    require_size("columns of shared_score", ffn.shared->score->cols, hidden);
  }
}

// Checks that the table holds the layer's experts.
void require_experts(const DenseFfn&, const ExpertTable&, int64_t) {}
void require_experts(const RoutedFfn& ffn, const ExpertTable& table, int64_t layer) {
  require_size("experts of layer " + std::to_string(layer) + " in the table", table.num_experts(layer),
               ffn.router.matrix.rows);
}

using OptionalTable = nb::typed<nb::object, BoundExpertTable>;
using RunningExperts = nb::typed<nb::object, TypeName<"ExpertTable | LayerExperts | None">>;
using NormKindName = Named<std::string, "typing.Literal['rms', 'layer']">;
void require_store(const KvCache& kv, int64_t store, const PoolShape& pool) {
  require_range("the store of a pool", store, 0, kv.num_layers() - 1);
  const KvShape& shape = kv.shape(store);
  require_kind(shape, KvShape::Kind::latent);
  require_size("elements of a pool's entry", shape.head_dim, pool.dim);
  require_size("positions of a pool's entry", shape.positions_per_entry, pool.ratio);
  if (shape.is_windowed) refuse("the store of a pool keeps all entries, and this one is windowed");
}

// What layers with compressed attention leave for later ones: entries, index keys, choices and candidates.
class SharedEntries {
 public:
  explicit SharedEntries(const KvCache& kv) : kv_(kv) {}

  // Checks that all a layer needs is there.
  void add(const CompressedAttention& mixer) {
    if (!mixer.entries) return;
    const EntryStore& entries = *mixer.entries;
    fill(entries.store, {entries.ratio, mixer.head_dim()}, mixer.pool.has_value());
    if (!mixer.indexer) {
      require_size("num_chosen", mixer.num_chosen, mixer.num_chosen > 0 ? num_chosen_ : 0);
      if (mixer.num_chosen > 0) require_size("the store of the entries chosen", entries.store, chosen_of_);
      return;
    }
    const EntryIndexer& indexer = *mixer.indexer;
    const bool has_keys = indexer.pool() != nullptr || indexer.entry_keys() != nullptr;
    fill(indexer.store, {entries.ratio, indexer.dim()}, has_keys);
    num_chosen_ = mixer.num_chosen;
    chosen_of_ = entries.store;
    if (indexer.num_candidates == 0) return;
    if (indexer.finds_candidates)
      candidates_ = {entries.store, indexer.num_candidates, indexer.candidate_size};
    if (candidates_ != std::array{entries.store, indexer.num_candidates, indexer.candidate_size})
      refuse("no earlier layer finds such candidates");
  }

 private:
  void fill(int64_t store, const PoolShape& shape, bool has_own) {
    require_store(kv_, store, shape);
    if (has_own) {
      filled_.push_back(store);
    } else if (std::find(filled_.begin(), filled_.end(), store) == filled_.end()) {
      refuse("no earlier layer fills the store " + std::to_string(store));
    }
  }

  const KvCache& kv_;
  std::vector<int64_t> filled_;
  int64_t num_chosen_ = 0, chosen_of_ = -1;
  std::array<int64_t, 3> candidates_ = {};  // store of the entries, blocks, entries of a block
};

using OptionalState = nb::typed<nb::object, RecurrentState>;

// A layer behind one that leaves out tokens sees only a window, and finds it written.
void require_reach(const std::string& name, const Layer& layer, const Layer* before) {
  const int64_t given = before != nullptr ? before->reach : 0;
  if (given == 0) return;
  int64_t window = 1;
  if (layer.mixer) {
    const auto* attention = std::get_if<GroupedQueryAttention>(&*layer.mixer);
    const auto* compressed = std::get_if<CompressedAttention>(&*layer.mixer);
    if (attention != nullptr && !attention->indexer) {
      window = attention->window.size;
    } else {
      window = compressed != nullptr && !compressed->pool ? compressed->window.size : 0;
    }
  }
  if (window == 0 || layer.ngrams)
    refuse(name + " needs every token of a prompt, and the layer before it has a reach");
  require_range(name + ": reach", layer.reach, 1, given - (window - 1));
}

class BoundStack {
 public:
  BoundStack(Runtime& runtime, KvCache& kv, const Matrix& embedding, const Matrix& head,
             const std::optional<ArrayOf<float>>& final_norm, float norm_eps,
             const std::vector<const Rotary*>& rotaries, const ActivationOfNumbers& activation,
             const std::vector<const BoundLayer*>& layers, int64_t max_tokens, const OptionalTable& resident,
             bool experts_off, const OptionalState& recurrent, float embedding_scale, float logit_cap,
             int64_t first_layer, float logit_scale, const NormKindName& norm_kind,
             const BoundResidual* residual)
      : resident_(resident), recurrent_(recurrent), hidden_(embedding.view.cols), most_tokens_(max_tokens) {
    RecurrentState* state = recurrent.is_none() ? nullptr : nb::cast<RecurrentState*>(recurrent);
    require_size("columns of head", head.view.cols, hidden_);
    require_range("number of layers", int64_t(layers.size()), 0, kv.num_layers());
    require_range("first_layer", first_layer, 0, kv.num_layers() - int64_t(layers.size()));
    expert_hidden_ = expert_hidden_of(layers, hidden_);
    ExpertTable* table = table_of(resident);

    StackDescription description;
    description.embedding = kept_.keep(embedding);
    description.head = kept_.keep(head);
    description.final_norm = kept_.keep_norm("final_norm", final_norm, hidden_);
    if (norm_kind != "rms" && norm_kind != "layer")
      refuse("unknown norm_kind '" + norm_kind + "'; known: rms, layer");
    description.norm_kind = norm_kind == "rms" ? NormKind::rms : NormKind::layer;
    description.norm_eps = norm_eps;
    if (residual != nullptr) {
      description.residual = residual->rule;
      require_mix(residual->head, residual->rule, hidden_, true);
      kept_.keep(residual->head.kept);
    }
    for (const Rotary* rotary : rotaries)
      description.rotaries.push_back(
          require_item(item_name("rotaries", description.rotaries.size()), rotary));
    description.activation = parse_activation(activation);
    description.experts_off = experts_off;
    description.resident = table;
    description.embedding_scale = embedding_scale;
    description.logit_scale = logit_scale;
    description.logit_cap = logit_cap;
    description.first_layer = first_layer;
    int64_t num_chosen = 0, group_size = 1;  // of the last layer with an indexer
    SharedEntries shared(kv);
    for (const BoundLayer* given : layers) {
      const std::string name = item_name("layers", description.layers.size());
      const BoundLayer& layer = require_item(name, given);
      if (layer.hidden != 0) require_size((name + ": size of the norms").c_str(), layer.hidden, hidden_);
      require_streams(layer, description.residual, hidden_);
      const std::optional<int64_t>& turning = layer.layer.rotary;
      if (turning) require_range(name + ": rotary", *turning, 0, int64_t(rotaries.size()) - 1);
      kept_.keep(layer.kept);
      description.layers.push_back(layer.layer);
      const Rotary* rotary = turning ? &description.rotaries[size_t(*turning)] : nullptr;
      const int64_t number = first_layer + int64_t(description.layers.size()) - 1;
      const KvShape& shape = kv.shape(number);
      if (description.norm_kind == NormKind::rms &&
          (layer.layer.mixer_norm.bias != nullptr || layer.layer.ffn_norm.bias != nullptr))
        refuse(name + ": an RMSNorm has no bias");
      const auto check_ffn = [&](const auto& block) {
        require_fit(block, hidden_, description.embedding.rows, description.activation);
        if (table != nullptr) require_experts(block, *table, number);
      };
      if (layer.layer.ngrams)
        require_ngrams(*layer.layer.ngrams, state, description.residual.num_streams, hidden_);
      if (layer.layer.mixer) {
        require_mixer(*layer.layer.mixer, kv, number, state, rotary, hidden_);
      } else {
        require_kind(shape, KvShape::Kind::none);
      }
      const Mixer* mixer = layer.layer.mixer ? &*layer.layer.mixer : nullptr;
      if (const LatentAttention* latent = std::get_if<LatentAttention>(mixer)) {
        if (latent->indexer) {
          num_chosen = latent->num_chosen;
          group_size = latent->group_size;
        }
        if (latent->num_chosen > 0 && num_chosen == 0)
          refuse(name +
                 " sees the positions that an earlier layer chose, and no earlier layer has an indexer");
        if (latent->num_chosen > 0) {
          require_size(name + ": num_chosen", latent->num_chosen, num_chosen);
          require_size(name + ": group_size", latent->group_size, group_size);
        }
      }
      const auto* attention = std::get_if<GroupedQueryAttention>(mixer);
      if (attention != nullptr && attention->indexer && !attention->indexer->pool)
        require_size(name + ": block_size of the indexer modulo block_tokens",
                     attention->indexer->block_size % kv.block_tokens(), 0);
      if (shape.is_windowed) {
        const auto* compressed = std::get_if<CompressedAttention>(mixer);
        const int64_t window = compressed != nullptr ? compressed->window.size
                                                     : std::get<GroupedQueryAttention>(*mixer).window.size;
        require_range(name + ": window", window, 1, INT32_MAX);
        window_ = std::max(window_, window);
      }
      if (const auto* compressed = std::get_if<CompressedAttention>(mixer)) shared.add(*compressed);
      if (layer.layer.ffn) std::visit(check_ffn, *layer.layer.ffn);
      require_reach(name, layer.layer,
                    description.layers.size() > 1 ? &description.layers.rbegin()[1] : nullptr);
    }
    require_room(description.layers, description.residual);
    stack_ = std::make_unique<Stack>(runtime, kv, state, std::move(description), max_tokens);
  }

  void begin(const ArrayOf<int32_t>& token_ids, const ArrayOf<int32_t>& sequence,
             const ArrayOf<int64_t>& slots, const ArrayOf<bool>& is_decode,
             const ArrayOf<int32_t>& block_table, const ArrayOf<int32_t>& order,
             const ArrayOf<int64_t>& wanted, const OutArrayOf<float>& logits,
             const std::optional<ArrayOf<int32_t>>& state_slots, const std::optional<ArrayOf<float>>& angles,
             const std::optional<ArrayOf<int32_t>>& sees_until,
             const std::optional<OverridesOfArrays>& overrides,
             const std::vector<AdditionOfArrays>& additions, const std::vector<TapOfArray>& taps,
             const std::optional<OutArrayOf<int32_t>>& choices,
             const std::optional<ArrayOf<int32_t>>& window_blocks,
             const std::optional<ArrayOf<int32_t>>& to_end, const std::optional<ArrayOf<int32_t>>& adapters) {
    const KvCache& kv = stack_->kv();
    StepArrays arrays;
    arrays.read = {token_ids, sequence, slots, is_decode, block_table, order, wanted};
    arrays.written = {logits};
    Step step = {};
    step.token_ids = read_array("token_ids", token_ids, {kAnySize});
    const int64_t tokens = step.num_tokens = int64_t(token_ids.shape(0));
    require_range("tokens", tokens, 1, stack_->max_tokens());
    step.sequence = read_array("sequence", sequence, {tokens});
    step.slots = read_array("slots", slots, {tokens});
    step.is_decode = read_array("is_decode", is_decode, {tokens});
    step.block_table = read_array("block_table", block_table, {kAnySize, kAnySize});
    step.max_blocks = int64_t(block_table.shape(1));
    step.order = read_array("order", order, {tokens});
    step.wanted = read_array("wanted", wanted, {kAnySize});
    step.num_wanted = int64_t(wanted.shape(0));
    step.logits = write_array("logits", logits, {step.num_wanted, vocabulary()});
    if (angles) {
      step.angles = read_angles(*angles, tokens);
      arrays.read.push_back(*angles);
    }
    if (sees_until) {
      step.sees_until = read_array("sees_until", *sees_until, {tokens});
      arrays.read.push_back(*sees_until);
    }
    if (to_end) {
      step.to_end = read_array("to_end", *to_end, {tokens});
      for (int64_t t = 0; t < tokens; ++t) require_range("to_end", step.to_end[t], 0, INT32_MAX);
      arrays.read.push_back(*to_end);
    }
    if (adapters) {
      step.adapters = read_array("adapters", *adapters, {tokens});
      arrays.read.push_back(*adapters);
    }
    if (overrides) {
      const auto& [rows, embeddings] = *overrides;
      step.overrides = read_vectors("overrides", rows, embeddings, tokens, arrays);
    }
    const int64_t last_layer = int64_t(stack_->description().layers.size()) - 1;
    for (const auto& [layer, rows, vectors] : additions) {
      require_range("the layer of an addition", layer, 0, last_layer);
      step.additions.push_back({layer, read_vectors("an addition", rows, vectors, tokens, arrays)});
    }
    for (const auto& [layer, hidden] : taps) {
      require_range("the layer of a tap", layer, 0, last_layer);
      step.taps.push_back({layer, write_array("a tap", hidden, {tokens, hidden_})});
      arrays.written.push_back(hidden);
    }
    if (choices) {
      const int64_t k = stack_->experts_per_token();
      if (k == 0 || stack_->description().experts_off)
        refuse("choices need routed experts, and the same number of them for a token in every layer");
      step.choices = write_array("choices", *choices, {stack_->num_routed_layers(), tokens, k});
      arrays.written.push_back(*choices);
    }

    require_ids("token_ids", step.token_ids, tokens, stack_->description().embedding.rows);
    require_slots(kv, kv.num_blocks(), step.slots, tokens);
    AttentionBatch reach = {};
    reach.num_tokens = tokens;
    reach.block_table = step.block_table;
    reach.max_blocks = step.max_blocks;
    reach.sequence = step.sequence;
    reach.order = step.order;
    reach.sees_until = step.sees_until;
    require_blocks(kv, kv.num_blocks(), reach, int64_t(block_table.shape(0)));
    if (window_ > 0) {
      if (!window_blocks)
        refuse("the step needs window_blocks, because windowed layers have blocks of their own");
      reach.window = {window_};
      find_windows(kv, reach, read_array("window_blocks", *window_blocks, {kv.num_blocks()}), step,
                   int64_t(block_table.shape(0)));
    }
    require_rows(step.wanted, step.num_wanted, tokens);
    const RecurrentState* recurrent = stack_->recurrent();
    if (recurrent != nullptr) {
      if (!state_slots) refuse("the step needs state_slots, because the stack has a recurrent state");
      const int64_t sequences = int64_t(block_table.shape(0));
      step.state_slots = read_array("state_slots", *state_slots, {sequences});
      require_ids("state_slots", step.state_slots, sequences, recurrent->num_slots());
      arrays.read.push_back(*state_slots);
    }
    arrays_ = std::move(arrays);
    num_tokens_ = tokens;
    stack_->begin(step);
  }

  std::optional<LayerAndDispatch> advance(
      const std::optional<nb::typed<nb::callable, void()>>& between_layers) {
    while (true) {
      Pause pause;
      {
        nb::gil_scoped_release released;
        pause = stack_->advance(kSignalInterval);
      }
      if (pause == Pause::done) return std::nullopt;
      if (pause == Pause::experts) return LayerAndDispatch(stack_->waiting_layer(), stack_->dispatch());
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      if (between_layers) (*between_layers)();
    }
  }

  std::vector<std::vector<int32_t>> look_ahead() {
    nb::gil_scoped_release released;
    return stack_->look_ahead();
  }

  void resize(int64_t max_tokens) {
    require_range("max_tokens", max_tokens, 1, most_tokens_);
    num_tokens_ = 0;
    nb::gil_scoped_release released;
    stack_->resize(max_tokens);
  }

  void run_shared() {
    nb::gil_scoped_release released;
    stack_->run_shared();
  }

  void finish_experts(const std::vector<int32_t>& experts) { stack_->finish_experts(experts); }

  // Views of the stack's own memory, which lives as long as `owner`, its Python object.
  View<const float> rows(nb::handle owner) const {
    const float* rows = stack_->rows();
    return View<const float>(rows, {size_t(stack_->dispatch()->num_tokens()), size_t(expert_hidden_)}, owner);
  }
  View<float> expert_out(nb::handle owner) const {
    float* out = stack_->expert_out();
    const Dispatch& dispatch = *stack_->dispatch();
    return View<float>(out, {size_t(dispatch.num_tokens() * dispatch.k()), size_t(expert_hidden_)}, owner);
  }

  void final_states(const ArrayOf<int64_t>& rows, const OutArrayOf<float>& out) {
    const int64_t* chosen = read_array("rows", rows, {kAnySize});
    const int64_t num_rows = int64_t(rows.shape(0));
    float* to = write_array("out", out, {num_rows, hidden_});
    require_rows(chosen, num_rows, num_tokens_);
    nb::gil_scoped_release released;
    stack_->final_states(chosen, num_rows, to);
  }

  void logits(const ArrayOf<int64_t>& rows, const OutArrayOf<float>& out) {
    const int64_t* chosen = read_array("rows", rows, {kAnySize});
    const int64_t num_rows = int64_t(rows.shape(0));
    float* to = write_array("out", out, {num_rows, vocabulary()});
    require_rows(chosen, num_rows, num_tokens_);
    nb::gil_scoped_release released;
    stack_->logits(chosen, num_rows, to);
  }

  View<const float> hidden(nb::handle self) const {
    if (stack_->left() != nullptr) refuse("the layers of the last step left out some of its tokens");
    const size_t shape[2] = {size_t(num_tokens_), size_t(hidden_)};
    return View<const float>(stack_->hidden(), 2, shape, self);
  }

  View<const int32_t> expert_ids(nb::handle self) const {
    const size_t shape[2] = {size_t(num_tokens_ > 0 ? stack_->num_left() : 0),
                             size_t(stack_->chosen_per_token())};
    return View<const int32_t>(stack_->expert_ids(), 2, shape, self);
  }

  std::optional<std::vector<int64_t>> left() const {
    const int64_t* rows = stack_->left();
    if (rows == nullptr) return std::nullopt;
    return std::vector<int64_t>(rows, rows + stack_->num_left());
  }

  void forbid(int64_t layer, const std::vector<int32_t>& experts) { stack_->forbid(layer, experts); }

  void use_experts(const RunningExperts& experts) {
    LayerExperts* elsewhere = nullptr;
    ExpertTable* table = nullptr;
    if (nb::isinstance<LayerExperts>(experts)) {
      elsewhere = nb::cast<LayerExperts*>(experts);
      require_size("columns of the experts", elsewhere->hidden(), expert_hidden_);
    } else {
      table = table_of(experts);
    }
    stack_->use_experts(table, elsewhere);
    resident_ = experts;
  }

  void set_adapter(int32_t number, const BoundStackAdapter* adapter) {
    require_range("number", number, 0, INT32_MAX);
    // A copy, because the given one may still change.
    auto own = adapter != nullptr ? std::make_shared<const StackAdapter>(*adapter->adapter) : nullptr;
    nb::gil_scoped_release released;
    stack_->set_adapter(number, std::move(own));
  }

  int64_t layers_done() const { return stack_->layers_done(); }
  const StackSizes& sizes() const { return stack_->sizes(); }
  int64_t buffer_bytes() const { return stack_->buffer_bytes(); }

  std::tuple<double, double, double, double> take_seconds() {
    const auto seconds = stack_->take_seconds();
    return {seconds[0], seconds[1], seconds[2], seconds[3]};
  }

  void take_uses(const OutArrayOf<int64_t>& out) {
    const int64_t layers = int64_t(stack_->description().layers.size());
    int64_t* to = write_array("out", out, {layers, stack_->most_experts()});
    const std::vector<int64_t> uses = stack_->take_uses();
    std::copy(uses.begin(), uses.end(), to);
  }

 private:
  // The size of what the routed experts of all layers read and write.
  static int64_t expert_hidden_of(const std::vector<const BoundLayer*>& layers, int64_t hidden) {
    int64_t found = 0;
    for (const BoundLayer* layer : layers) {
      const RoutedFfn* ffn = layer != nullptr ? layer->layer.routed() : nullptr;
      if (ffn == nullptr) continue;
      if (found > 0) require_size("rows of latent[0], as in the other layers,", ffn->expert_hidden(), found);
      found = ffn->expert_hidden();
    }
    return found > 0 ? found : hidden;
  }

  int64_t vocabulary() const { return stack_->description().head.rows; }

  // The memory that a step refers to.
  struct StepArrays {
    std::vector<Array> read;
    std::vector<OutArray> written;
  };

  RowVectors read_vectors(const std::string& name, const ArrayOf<int64_t>& rows,
                          const ArrayOf<float>& vectors, int64_t tokens, StepArrays& arrays) const {
    RowVectors given;
    given.rows = read_array(("rows of " + name).c_str(), rows, {kAnySize});
    given.num_rows = int64_t(rows.shape(0));
    given.vectors = read_array(("vectors of " + name).c_str(), vectors, {given.num_rows, hidden_});
    std::vector<bool> is_given(static_cast<size_t>(tokens));
    for (int64_t i = 0; i < given.num_rows; ++i) {
      require_range("a row of " + name, given.rows[i], 0, tokens - 1);
      if (is_given[size_t(given.rows[i])])
        refuse(name + " gives row " + std::to_string(given.rows[i]) + " twice");
      is_given[size_t(given.rows[i])] = true;
    }
    arrays.read.push_back(rows);
    arrays.read.push_back(vectors);
    return given;
  }

  // Finds the window blocks of what the step writes, and of what its tokens see in windowed layers.
  void find_windows(const KvCache& kv, const AttentionBatch& reach, const int32_t* of_block, Step& step,
                    int64_t num_sequences) {
    const int64_t size = kv.block_tokens();
    const auto find = [&](int64_t block) {
      const int64_t found = of_block[block];
      require_range(item_name("window_blocks", size_t(block)), found, 0, kv.num_window_blocks() - 1);
      return found;
    };
    window_slots_.resize(size_t(step.num_tokens));
    window_table_.assign(size_t(num_sequences * step.max_blocks), 0);
    int64_t known = 0;  // blocks of the sequence before this one are found
    for (int64_t t = 0; t < step.num_tokens; ++t) {
      window_slots_[size_t(t)] = find(step.slots[t] / size) * size + step.slots[t] % size;
      // Tokens of a sequence usually follow each other.
      if (t == 0 || step.sequence[t] != step.sequence[t - 1] || reach.first(t) < reach.first(t - 1))
        known = 0;
      const int64_t row = step.sequence[t] * step.max_blocks;
      const int64_t end = (reach.until(t) - 1) / size + 1;
      for (int64_t b = std::max(known, reach.first(t) / size); b < end; ++b)
        window_table_[size_t(row + b)] = int32_t(find(step.block_table[row + b]));
      known = std::max(known, end);
    }
    step.window_slots = window_slots_.data();
    step.window_table = window_table_.data();
  }

  const float* read_angles(const ArrayOf<float>& angles, int64_t tokens) const {
    const float* from = read_array("angles", angles, {kAnySize, tokens});
    int64_t num_axes = 1;
    for (const Rotary& rotary : stack_->description().rotaries)
      num_axes = std::max(num_axes, rotary.num_axes());
    require_range("axes of angles", int64_t(angles.shape(0)), num_axes, kMostAxes);
    if (!std::all_of(from, from + angles.size(), [](float angle) { return std::isfinite(angle); }))
      refuse("angles hold a number that is not finite");
    return from;
  }

  void require_rows(const int64_t* rows, int64_t num_rows, int64_t num_tokens) const {
    require_range("number of rows", num_rows, 0, stack_->max_tokens());
    for (int64_t i = 0; i < num_rows; ++i) require_range("a row", rows[i], 0, num_tokens - 1);
  }

  ExpertTable* table_of(const nb::object& resident) const {
    if (resident.is_none()) return nullptr;
    ExpertTable* table = nb::cast<BoundExpertTable*>(resident);
    require_size("columns of the experts", table->hidden(), expert_hidden_);
    return table;
  }

  Kept kept_;
  nb::object resident_, recurrent_;
  StepArrays arrays_;  // kept alive since the last step
  int64_t hidden_ = 0, expert_hidden_ = 0, most_tokens_ = 0, num_tokens_ = 0;
  int64_t window_ = 0;                 // the largest of layers with window blocks; 0: there are none
  std::vector<int64_t> window_slots_;  // window slots of the last step, and so on
  std::vector<int32_t> window_table_;
  std::unique_ptr<Stack> stack_;
};

}  // namespace

void bind_stack(nb::module_& m) {
  nb::class_<BoundFfn>(m, "Ffn", "The feed-forward network of a layer.");

  nb::class_<BoundLayer>(m, "Layer", R"(
    A layer of a Stack: norm -> mixer -> sum, norm -> feed-forward network -> sum.

    Args:
        mixer_norm, ffn_norm: [hidden]; [2, hidden], weight and bias, of a LayerNorm; None means no norm.
        mixer, ffn: one of them may be None.
        rotary: the one of the stack's rotary embeddings that the mixer uses; None means that nothing rotates.
        mixer_post_norm: [hidden], of what the mixer adds to the hidden state; None means no norm.
        ffn_post_norm: the same for what the layer's feed-forward networks add together.
        scale: multiplies the hidden state after the layer.
        is_parallel: the network reads what the mixer reads, after mixer_norm, and there is no ffn_norm.
        mixer_scale, ffn_scale: multiply what the mixer, or the networks together, add to the hidden state.
        normed_residual: not 0 means that they add it to this factor times what they read, instead.
        mixer_mix, ffn_mix: how they read and write residual streams; None with one hidden state.
        ngrams: rows of a table, added before the mixer reads the hidden state. Its table has begun to read the rows of
            a step before the step begins.
        reach: not 0 means that the networks of this layer and all later layers run only for tokens whose `to_end` in
            the step is smaller. Later layers see only a window.)")
      .def("__init__", &make_layer, "mixer_norm"_a.none(), "mixer"_a.none(), "ffn_norm"_a.none(),
           "ffn"_a.none(), nb::kw_only(), "rotary"_a.none() = 0, "mixer_post_norm"_a.none() = nb::none(),
           "ffn_post_norm"_a.none() = nb::none(), "scale"_a = 1.0f, "is_parallel"_a = false,
           "mixer_scale"_a = 1.0f, "ffn_scale"_a = 1.0f, "normed_residual"_a = 0.0f,
           "mixer_mix"_a.none() = nb::none(), "ffn_mix"_a.none() = nb::none(), "ngrams"_a.none() = nb::none(),
           "reach"_a = 0);

  m.def("dense_ffn", &dense_ffn, "gate"_a.none(), "up"_a, "down"_a, nb::kw_only(),
        "activation"_a.none() = nb::none(), R"(
    A network for every token: gate and up [width, hidden], down [hidden, width].

    Args:
        gate: None if the activation has none.
        activation: None means the stack's.)");
  m.def("routed_ffn", &routed_ffn, "router"_a, "routing"_a, nb::kw_only(),
        "router_bias"_a.none() = nb::none(), "width"_a, "shared"_a.none() = nb::none(),
        "shared_score"_a.none() = nb::none(), "router_norm"_a.none() = nb::none(),
        "norm"_a.none() = nb::none(), "post_norm"_a.none() = nb::none(),
        "shared_post_norm"_a.none() = nb::none(), "shared_activation"_a.none() = nb::none(),
        "latent"_a.none() = nb::none(), "router_logit_cap"_a = 0.0f, "weighs_input"_a = false,
        "latent_norm"_a.none() = nb::none(), "token_experts"_a.none() = nb::none(), R"(
    Experts of `width` chosen by the router, as in `route`, and a shared expert for every token.

    Args:
        router: [experts, hidden].
        router_bias: [experts], added to the router's product; None means no bias.
        shared: gate, up and down of the shared expert; the gate is None if the activation has none.
        shared_score: [1, hidden]; the shared expert's output is multiplied by sigmoid(shared_score . x).
        router_norm, norm: [hidden]; the router, or the routed experts, read the hidden state after this norm instead
            of the layer's.
        post_norm, shared_post_norm: [hidden], of the weighted sum of the routed experts, and of the shared expert's
            output; None means no norm.
        shared_activation: of the shared expert; None means the stack's.
        latent: down [latent, hidden] and up [hidden, latent]: the routed experts read down . x, and up . (their sum) is
            added.
        router_logit_cap: logits become cap * tanh(logit / cap) before `routing`; 0 means that they stay.
        weighs_input: the weight of a token's only expert multiplies the expert's input instead of its output.
        latent_norm: [latent], of an RMSNorm of the latent experts' weighted sum; None means no norm.
        token_experts: f32 [vocabulary, k], the experts of each token; None means that tokens choose.)");

  nb::class_<Rotary>(m, "Rotary", R"(
    Angles of the rotary position embedding: position * inverse_frequency (float64 [pairs], in radians).

    Angles, and cosines and sines times `scale`, are computed in float64, then rounded to float32. `is_interleaved` says
    which dimensions form a pair, as for `rope`.

    Args:
        axes: [pairs], the axis whose position rotates each pair (m-rope, arXiv:2409.12191), from 0 to 7; empty means 0
            for all of them.)")
      .def(
          "__init__",
          [](Rotary* self, const ArrayOf<double>& inverse_frequency, double scale, bool is_interleaved,
             const std::vector<int32_t>& axes) {
            const double* from = read_array("inverse_frequency", inverse_frequency, {kAnySize});
            const size_t num_pairs = inverse_frequency.shape(0);
            if (!axes.empty()) require_size("number of axes", int64_t(axes.size()), int64_t(num_pairs));
            require_ids("axes", axes.data(), int64_t(axes.size()), kMostAxes);
            new (self) Rotary{{from, from + num_pairs}, scale, is_interleaved, axes};
          },
          "inverse_frequency"_a, "scale"_a, "is_interleaved"_a = false, "axes"_a = std::vector<int32_t>{})
      .def(
          "angles",
          [](const Rotary& self, Runtime& runtime, const NumbersOfTokens& positions,
             const OutArrayOf<float>& cosine, const OutArrayOf<float>& sine) {
            const bool has_axes = positions.ndim() == 2;
            const int32_t* order = nullptr;
            const float* angles = nullptr;
            if (has_axes) {
              angles = read_array("positions", ArrayOf<float>(positions), {kAnySize, kAnySize});
              require_range("axes of positions", int64_t(positions.shape(0)), self.num_axes(), kMostAxes);
            } else {
              order = read_array("positions", ArrayOf<int32_t>(positions), {kAnySize});
            }
            const int64_t num_tokens = int64_t(positions.shape(has_axes ? 1 : 0));
            float* c = write_array("cosine", cosine, {num_tokens, self.num_pairs()});
            float* s = write_array("sine", sine, {num_tokens, self.num_pairs()});
            nb::gil_scoped_release released;
            if (has_axes) {
              rotary_angles(runtime, self, angles, num_tokens, c, s);
            } else {
              rotary_angles(runtime, self, order, num_tokens, c, s);
            }
          },
          "runtime"_a, "positions"_a, "cosine"_a.noconvert(), "sine"_a.noconvert(), R"(
        Write cosine and sine [tokens, pairs] for `rope`.

        Args:
            positions: int32 [tokens], the same on every axis; or float32 [axes, tokens].)");

  nb::class_<StackSizes>(m, "StackSizes", R"(
    The dimensions of a Stack's layers, from which its working memory follows (native/ops/stack_sizes.h).

    Add every layer; 0 stands for a part that a layer does not have. Two are equal if their memory is.

    Args:
        num_pairs: pairs of dimensions that the rotary embeddings rotate, all of them together.

    Raises:
        ValueError: a dimension is outside 0 to 2^30, or the memory would exceed 2^62 bytes.)")
      .def(nb::init<int64_t, int64_t>(), "hidden"_a, "num_pairs"_a)
      .def(
          "add_attention",
          [](StackSizes& self, int64_t num_heads, int64_t kv_heads, int64_t head_dim, bool has_gate,
             std::optional<int64_t> value_dim, int64_t gate_rows, int64_t index_dim, int64_t num_chosen,
             int64_t block_size, int64_t joint_heads) {
            AttentionSizes sizes = {num_heads, kv_heads,  head_dim, value_dim.value_or(head_dim),
                                    has_gate,  gate_rows, {}};
            if (joint_heads > 0) {
              sizes.index = {joint_heads, index_dim, num_chosen, 0, block_size};
            } else if (num_chosen > 0) {
              sizes.index = {kv_heads, index_dim, num_chosen, block_size};
            }
            self.add(sizes);
          },
          "num_heads"_a, "kv_heads"_a, "head_dim"_a, "has_gate"_a, "value_dim"_a.none() = nb::none(),
          "gate_rows"_a = 0, "index_dim"_a = 0, "num_chosen"_a = 0, "block_size"_a = 0, "joint_heads"_a = 0,
          "index_dim, num_chosen and block_size are those of a block indexer, of which joint_heads choose "
          "together.")
      .def(
          "add_latent_attention",
          [](StackSizes& self, int64_t num_heads, int64_t nope_dim, int64_t rope_dim, int64_t kv_rank,
             int64_t value_dim, int64_t query_rank, int64_t index_heads, int64_t index_dim,
             int64_t num_chosen, int64_t gate_rows, int64_t group_size) {
            self.add(LatentSizes{num_heads,
                                 nope_dim,
                                 rope_dim,
                                 kv_rank,
                                 value_dim,
                                 query_rank,
                                 gate_rows,
                                 {index_heads, index_dim, num_chosen, 0, group_size}});
          },
          "num_heads"_a, "nope_dim"_a, "rope_dim"_a, "kv_rank"_a, "value_dim"_a, "query_rank"_a,
          "index_heads"_a = 0, "index_dim"_a = 0, "num_chosen"_a = 0, "gate_rows"_a = 0, "group_size"_a = 1,
          "index_heads, index_dim, num_chosen and group_size are those of an indexer.")
      .def(
          "add_compressed_attention",
          [](StackSizes& self, int64_t num_heads, int64_t head_dim, int64_t query_rank, int64_t num_groups,
             int64_t output_rank, int64_t rope_dim, const std::optional<PoolSizes>& pool, bool has_gates,
             int64_t num_chosen, const std::optional<std::pair<int64_t, int64_t>>& index,
             const std::optional<PoolSizes>& keys, bool has_entry_keys,
             const std::optional<std::pair<int64_t, int64_t>>& candidates) {
            require_range("num_groups", num_groups, 1, kLargestSize);
            CompressedSizes sizes = {num_heads, head_dim, query_rank, num_groups, output_rank};
            if (pool) {
              sizes.rope_dim = rope_dim;
              sizes.pool_columns = pool_shape(*pool).columns();
              sizes.has_gates = has_gates;
            }
            sizes.num_chosen = num_chosen;
            if (index) {
              sizes.index = {index->first, index->second, num_chosen};
              if (keys) sizes.key_columns = pool_shape(*keys).columns();
              sizes.has_entry_keys = has_entry_keys;
              if (candidates) {
                require_range("entries of a candidate block", candidates->second, 1, kMostIndexBlock);
                sizes.candidates = {index->first, index->second, candidates->first, candidates->second, 1,
                                    true};
              }
            }
            self.add(sizes);
          },
          "num_heads"_a, "head_dim"_a, "query_rank"_a, "num_groups"_a, "output_rank"_a, "rope_dim"_a = 0,
          "pool"_a.none() = nb::none(), "has_gates"_a = false, "num_chosen"_a = 0,
          "index"_a.none() = nb::none(), "keys"_a.none() = nb::none(), "has_entry_keys"_a = false,
          "candidates"_a.none() = nb::none(),
          "index: heads and dimension of an indexer; keys, if it has a pool; candidates as for "
          "`EntryIndexer`.")
      .def(
          "add_delta_net", [](StackSizes& self, const DeltaSizes& sizes) { self.add(delta_shape(sizes)); },
          "sizes"_a)
      .def(
          "add_kimi_delta",
          [](StackSizes& self, const DeltaSizes& sizes, int64_t latent_rows) {
            self.add(KimiDeltaSizes{delta_shape(sizes), latent_rows});
          },
          "sizes"_a, "latent_rows"_a, "latent_rows: of decay_down and gate_down together.")
      .def(
          "add_short_conv", [](StackSizes& self, int64_t channels) { self.add(ShortConvSizes{channels}); },
          "channels"_a)
      .def(
          "add_mamba", [](StackSizes& self, const MambaSizes& sizes) { self.add(mamba_shape(sizes)); },
          "sizes"_a)
      .def(
          "add_ngrams",
          [](StackSizes& self, int64_t width, int64_t streams) { self.add(NgramSizes{width, streams}); },
          "width"_a, "streams"_a, "width: values of the rows of a token.")
      .def(
          "add_dense", [](StackSizes& self, int64_t width) { self.add(DenseSizes{width}); }, "width"_a)
      .def(
          "add_routed",
          [](StackSizes& self, int64_t num_experts, int64_t experts_per_token, int64_t width,
             int64_t shared_width, bool has_own_input, int64_t latent) {
            self.add(RoutedSizes{num_experts, experts_per_token, width, shared_width, has_own_input, latent});
          },
          "num_experts"_a, "experts_per_token"_a, "width"_a, "shared_width"_a, "has_own_input"_a = false,
          "latent"_a = 0, R"(
        Add a layer's routed experts and its shared expert.

        Args:
            has_own_input: the routed experts read something else than the shared expert.
            latent: the size of what they read and write; 0 means the hidden size.)")
      .def(
          "add_residual",
          [](StackSizes& self, int64_t num_streams, int64_t weights, int64_t rank) {
            self.add(ResidualSizes{num_streams, weights, rank});
          },
          "num_streams"_a, "weights"_a, "rank"_a = 0, R"(
        Add residual streams: the most rows of a matrix that gives weights, and the rank of `gated_mix`.)")
      .def("add_ffn_post_norm", &StackSizes::add_ffn_post_norm,
           "Add the sum of a layer's feed-forward networks, for its norm or its factor.")
      .def("buffer_bytes", &StackSizes::buffer_bytes, "max_tokens"_a,
           "Bytes that a Stack allocates for steps of at most `max_tokens`.")
      .def("dispatch_bytes", &StackSizes::dispatch_bytes, "max_tokens"_a, R"(
        Most bytes that a step allocates: a layer's dispatch, and arrays of experts that run or are predicted.)")
      .def(
          "scratch_bytes",
          [](const StackSizes& self, int64_t max_tokens, int num_threads, bool has_quants, bool has_act_order,
             int64_t ranks) {
            require_range("num_threads", num_threads, 1, kMostThreads);
            require_range("ranks", ranks, 0, 3 * kMostRank);
            return self.scratch_bytes(max_tokens, num_threads, has_quants, has_act_order, ranks);
          },
          "max_tokens"_a, "num_threads"_a, "has_quants"_a = true, "has_act_order"_a = true, "ranks"_a = 0, R"(
        Bytes of scratch memory that a Stack reserves in its Runtime: no operation of a step takes more. `ranks` is that
        of its `StackAdapter`s, the largest.

        Without `has_quants`, the bytes that operations take if no weights are quantised, and without `has_act_order`,
        if none are in an `act_order` format: the rest of what is reserved is never touched.)")
      .def(
          "__eq__", [](const StackSizes& self, const StackSizes& other) { return self == other; },
          nb::sig("def __eq__(self, other: object, /) -> bool"));

  nb::class_<BoundStack>(m, "Stack", R"(
    Embedding, layers and head of a decoder (native/ops/stack.h), run without Python in between; one step at a time.

    It keeps its arguments alive. Its results equal those of the operations above, called one by one, bit for bit.

    Args:
        embedding, head: [vocabulary, hidden].   final_norm: as in `Layer`.
        activation: the activation of dense networks and shared experts that have none of their own.
        rotaries: the rotary embeddings that layers choose from.
        layers: with keys and values in the layers of `kv` from `first_layer` on.
        max_tokens: most tokens of a step; working memory is allocated for them.
        resident: a table of every routed expert; see `use_experts`.
        experts_off: leave routed experts out of every sum.
        recurrent: the state of the layers without keys and values.
        embedding_scale: multiplies embeddings, but not those that a step gives.
        logit_scale: multiplies logits.
        logit_cap: logits become cap * tanh(logit / cap); 0 means that they stay.
        norm_kind: RMSNorm or LayerNorm, for all norms of the hidden state.
        first_layer: the number of the first layer, in `kv` and for those who run its experts.
        residual: None means one hidden state.)")
      .def(nb::init<Runtime&, KvCache&, const Matrix&, const Matrix&, const std::optional<ArrayOf<float>>&,
                    float, const std::vector<const Rotary*>&, const ActivationOfNumbers&,
                    const std::vector<const BoundLayer*>&, int64_t, const OptionalTable&, bool,
                    const OptionalState&, float, float, int64_t, float, const NormKindName&,
                    const BoundResidual*>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), "runtime"_a, "kv"_a, nb::kw_only(), "embedding"_a,
           "head"_a, "final_norm"_a, "norm_eps"_a, "rotaries"_a, "activation"_a, "layers"_a, "max_tokens"_a,
           "resident"_a.none() = nb::none(), "experts_off"_a = false, "recurrent"_a.none() = nb::none(),
           "embedding_scale"_a = 1.0f, "logit_cap"_a = 0.0f, "first_layer"_a = 0, "logit_scale"_a = 1.0f,
           "norm_kind"_a = "rms", "residual"_a.none() = nb::none())
      .def("begin", &BoundStack::begin, "token_ids"_a, "sequence"_a, "slots"_a, "is_decode"_a,
           "block_table"_a, "order"_a, "wanted"_a, "logits"_a.noconvert(),
           "state_slots"_a.none() = nb::none(), "angles"_a.none() = nb::none(),
           "sees_until"_a.none() = nb::none(), "overrides"_a.none() = nb::none(),
           "additions"_a = std::vector<AdditionOfArrays>{}, "taps"_a.noconvert() = std::vector<TapOfArray>{},
           "choices"_a.noconvert() = nb::none(), "window_blocks"_a.none() = nb::none(),
           "to_end"_a.none() = nb::none(), "adapters"_a.none() = nb::none(), R"(
        Start a step, even if the last one did not finish; nothing is computed yet.

        Args:
            logits: [wanted, vocabulary], written at the end of the step.
            taps: layers, and [tokens, hidden] for the hidden state after each of them.
            choices: [routed layers, tokens, k], for the experts of each token, best first; -1 where a layer leaves
                the token out.
            The others are the fields of `model.step.Step`.

        Raises:
            ValueError: a value is out of range; or, with a recurrent state, tokens of a sequence are not consecutive,
                or do not continue at its slot's position; or, with `to_end`, the step wants something of a token that
                layers leave out.)")
      .def("advance", &BoundStack::advance, "between_layers"_a.none() = nb::none(), R"(
        Continue until the step is done (None), or a layer waits for experts: the layer, and its dispatch.

        All experts of the dispatch must be finished before the next call. ^C ends the call, and the step, between two
        layers.

        Args:
            between_layers: called about every 50 ms, between two layers; it may call `use_experts`. An exception ends
                the call, and the step.)")
      .def("look_ahead", &BoundStack::look_ahead, R"(
        While a layer waits, the experts that the next layer would choose from the current hidden state.

        Returns the experts that any token ranks first, then those that any ranks second and none first ...: one list
        for each of `experts_per_token` ranks. Empty if no later layer has routed experts.)")
      .def("run_shared", &BoundStack::run_shared,
           "Run the shared expert of the waiting layer, if it has one; once, before the next `advance`.")
      .def("finish_experts", &BoundStack::finish_experts, "experts"_a,
           "Announce that the outputs of these experts of the waiting layer are in `expert_out`; each once.")
      .def(
          "rows", [](nb::handle_t<BoundStack> self) { return nb::cast<BoundStack&>(self).rows(self); }, R"(
        While a layer waits, the input of its experts: [tokens, hidden or latent], a read-only view.)")
      .def(
          "expert_out",
          [](nb::handle_t<BoundStack> self) { return nb::cast<BoundStack&>(self).expert_out(self); }, R"(
        While a layer waits, where the outputs of its experts belong: [tokens * experts per token, hidden or latent], a
        view.

        Row token * experts per token + rank is for that token and its expert of that rank.)")
      .def("final_states", &BoundStack::final_states, "rows"_a, "out"_a.noconvert(),
           "Hidden states [rows, hidden] after the final norm, of tokens of the finished step that are "
           "`left`.")
      .def("logits", &BoundStack::logits, "rows"_a, "out"_a.noconvert(),
           "Logits [rows, vocabulary] of tokens of the finished step that are `left`.")
      .def(
          "hidden", [](nb::handle_t<BoundStack> self) { return nb::cast<BoundStack&>(self).hidden(self); },
          R"(
        A read-only view of the hidden state [tokens, hidden] of the last step, as the last operation left it.

        Raises:
            ValueError: layers left out some of its tokens.)")
      .def_prop_ro(
          "left", &BoundStack::left,
          "The tokens of the last step that no layer has left out, in ascending order; None: all of them.")
      .def(
          "expert_ids",
          [](nb::handle_t<BoundStack> self) { return nb::cast<BoundStack&>(self).expert_ids(self); }, R"(
        A read-only view of the choices in the layer that chose last: [tokens that are `left`, k], best first.

        k is 0 until a layer of the last step has chosen. The view is valid until the next layer chooses.)")
      .def("resize", &BoundStack::resize, "max_tokens"_a, R"(
        Limit the tokens of a step from the next one on, to at most the number at construction. Gives memory that such
        steps do not need back to the system, and discards the results of the last step.)")
      .def("use_experts", &BoundStack::use_experts, "experts"_a.none(), R"(
        Choose who runs the routed experts from the next step on: a table that holds all of them, or other processes.
        With None, a step stops after each layer has chosen its experts.)")
      .def("forbid", &BoundStack::forbid, "layer"_a, "experts"_a, R"(
        From the next step on, no token chooses these experts of a layer; an empty list allows all again.

        Raises:
            ValueError: the layer has no such experts, or a group of them would keep too few.)")
      .def("set_adapter", &BoundStack::set_adapter, "number"_a, "adapter"_a.none(), R"(
        Choose the adapter of tokens with this number in `adapters`, from the next step on. None: no token may have it.

        Raises:
            ValueError: a step runs with tokens of this number.)")
      .def_prop_ro(
          "layers_done", &BoundStack::layers_done,
          "The layers that the step has run; 0 once it is done. Any thread may call this while it runs.")
      .def_prop_ro("sizes", &BoundStack::sizes)
      .def_prop_ro("buffer_bytes", &BoundStack::buffer_bytes,
                   "Bytes of the allocated working memory, without scratch.")
      .def("take_seconds", &BoundStack::take_seconds, R"(
        Seconds since the last call in the router, in attention and dense networks, in routed experts, and waiting for
        experts that run elsewhere.)")
      .def("take_uses", &BoundStack::take_uses, "out"_a.noconvert(), R"(
        Write how often tokens chose each expert since the last call to `out` [layers, most experts of a layer].)");
}

}  // namespace argosy
