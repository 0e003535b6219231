#include "ops/stack.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/encoder.h"
#include "ops/layer.h"
#include "ops/rows.h"

namespace argosy {

namespace {

// How long a layer waits in native code. Python checks for ^C then, and goes on with the layer.
constexpr std::chrono::milliseconds kMostWait{50};

// Calls body(vector, row of `to`) for every vector.
template <class Body>
void for_vectors(Runtime& runtime, const RowVectors& given, int64_t cols, float* to, const Body& body) {
  if (given.num_rows == 0) return;
  const auto lock = runtime.lock();
  runtime.parallel_for(given.num_rows, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) body(given.vectors + i * cols, to + given.rows[i] * cols);
  });
}

void copy_vectors(Runtime& runtime, const RowVectors& given, int64_t cols, float* to) {
  for_vectors(runtime, given, cols, to, [&](const float* from, float* row) { std::copy_n(from, cols, row); });
}

void add_vectors(Runtime& runtime, const RowVectors& given, int64_t cols, float* to) {
  for_vectors(runtime, given, cols, to, [&](const float* from, float* row) {
    for (int64_t i = 0; i < cols; ++i) row[i] += from[i];
  });
}

// Leaves the elements of these rows, in memory that `own` holds.
template <class T>
void pick(const std::vector<int64_t>& rows, std::unique_ptr<T[]>& own, const T*& given) {
  if (given == nullptr) return;
  auto kept = std::make_unique<T[]>(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) kept[i] = given[rows[i]];
  own = std::move(kept);
  given = own.get();
}

// Runs one network on all tokens.
void swiglu(Runtime& runtime, const ExpertView& network, const Activation& activation, const float* x,
            int64_t num_tokens, const ExpertPairs* const* pairs, float* out) {
  const int32_t starts[2] = {0, int32_t(num_tokens)};
  swiglu_experts(runtime, {network}, activation, x, num_tokens, {starts, nullptr, nullptr}, out, pairs);
}

AttentionSizes sizes_of(const GroupedQueryAttention& mixer) {
  const int64_t head_dim = mixer.query.rows / mixer.num_heads / (mixer.has_gate ? 2 : 1);
  AttentionSizes sizes = {mixer.num_heads, mixer.key.rows / head_dim,
                          head_dim,        mixer.output.cols / mixer.num_heads,
                          mixer.has_gate,  mixer.gate ? mixer.gate->matrix.rows : 0};
  if (const auto& indexer = mixer.indexer) {
    const bool is_pooled = indexer->pool.has_value();
    sizes.index = {indexer->num_heads(), indexer->dim(), indexer->count, is_pooled ? 0 : indexer->block_size,
                   is_pooled ? indexer->block_size : 1};
  }
  return sizes;
}

LatentSizes sizes_of(const LatentAttention& mixer) {
  const LatentHeads& heads = mixer.heads;
  LatentSizes sizes = {heads.num_heads,
                       heads.nope_dim,
                       heads.rope_dim,
                       heads.kv_rank,
                       heads.value_dim,
                       mixer.query_down ? mixer.query_down->rows : 0,
                       mixer.gate ? mixer.gate->matrix.rows : 0};
  if (mixer.indexer) {
    sizes.index = {mixer.indexer->num_heads(), mixer.indexer->dim(), mixer.num_chosen, 0, mixer.group_size};
  }
  return sizes;
}

CompressedSizes sizes_of(const CompressedAttention& mixer) {
  CompressedSizes sizes = {mixer.num_heads, mixer.head_dim(), mixer.query_down.rows, mixer.num_groups,
                           mixer.group_output.rows / mixer.num_groups};
  sizes.num_chosen = mixer.num_chosen;
  if (mixer.pool) {
    sizes.rope_dim = mixer.rope_dim;
    sizes.pool_columns = mixer.pool->shape.columns();
    sizes.has_gates = mixer.pool->gates.has_value();
  }
  if (!mixer.indexer) return sizes;
  const EntryIndexer& indexer = *mixer.indexer;
  sizes.index = {indexer.num_heads(), indexer.dim(), mixer.num_chosen};
  if (indexer.num_candidates > 0)
    sizes.candidates = {
        indexer.num_heads(), indexer.dim(), indexer.num_candidates, indexer.candidate_size, 1, true};
  if (indexer.pool() != nullptr) sizes.key_columns = indexer.pool()->shape.columns();
  sizes.has_entry_keys = indexer.entry_keys() != nullptr;
  return sizes;
}

DeltaShape sizes_of(const GatedDeltaNet& net) { return net.shape; }

DeltaShape sizes_of(const LightningAttention& mixer) { return mixer.shape; }

KimiDeltaSizes sizes_of(const KimiDeltaAttention& mixer) {
  return {mixer.shape,
          (mixer.decay_down ? mixer.decay_down->rows : 0) + (mixer.gate_down ? mixer.gate_down->rows : 0)};
}

ShortConvSizes sizes_of(const ShortConv& mixer) { return {mixer.conv.channels}; }

MambaShape sizes_of(const Mamba& mixer) { return mixer.shape; }

DenseSizes sizes_of(const DenseFfn& ffn) { return {ffn.network.up.rows}; }

RoutedSizes sizes_of(const RoutedFfn& ffn) {
  return {ffn.router.matrix.rows,
          ffn.router.rule.k,
          ffn.width,
          ffn.shared ? ffn.shared->network.up.rows : 0,
          ffn.has_own_input(),
          ffn.latent ? ffn.latent->down.rows : 0};
}

// The most that a mix needs of each size.
void widen(const StreamMix& mix, ResidualSizes& sizes) {
  if (const auto* own = std::get_if<SinkhornMix>(&mix))
    sizes.weights = std::max(sizes.weights, own->matrix.rows);
  if (std::holds_alternative<BankMix>(mix)) sizes.weights = std::max(sizes.weights, sizes.num_streams);
  if (const auto* gated = std::get_if<GatedMix>(&mix)) {
    sizes.weights = std::max(sizes.weights, sizes.num_streams);
    sizes.rank = std::max(sizes.rank, gated->down.rows);
  }
}

StackSizes sizes_of(const StackDescription& description) {
  int64_t num_pairs = 0;
  for (const Rotary& rotary : description.rotaries) num_pairs += rotary.num_pairs();
  StackSizes sizes(description.embedding.cols, num_pairs);
  for (const Layer& layer : description.layers) {
    if (layer.mixer) std::visit([&](const auto& mixer) { sizes.add(sizes_of(mixer)); }, *layer.mixer);
    if (layer.ffn) std::visit([&](const auto& ffn) { sizes.add(sizes_of(ffn)); }, *layer.ffn);
    if (layer.ngrams) sizes.add(NgramSizes{layer.ngrams->value.cols, layer.ngrams->streams()});
    if (layer.sums_apart()) sizes.add_ffn_post_norm();
  }
  if (description.residual.num_streams > 1) {
    ResidualSizes residual = {.num_streams = description.residual.num_streams};
    for (const Layer& layer : description.layers) {
      for (const std::optional<StreamMix>& mix : {layer.mixer_mix, layer.ffn_mix}) {
        if (mix) widen(*mix, residual);
      }
    }
    widen(description.residual.head, residual);
    sizes.add(residual);
  }
  return sizes;
}

}  // namespace

Stack::Stack(Runtime& runtime, KvCache& kv, RecurrentState* recurrent, StackDescription description,
             int64_t max_tokens)
    : runtime_(runtime),
      kv_(kv),
      recurrent_(recurrent),
      description_(std::move(description)),
      max_tokens_(max_tokens),
      sizes_(sizes_of(description_)),
      memory_(size_t(sizes_.buffer_bytes(max_tokens))),
      buffers_(sizes_.place_buffers(memory_.data(), max_tokens)),
      residual_(runtime, description_.residual, description_.embedding.cols, description_.norm_eps) {
  residual_.use(buffers_.residual);
  const auto lock = runtime_.lock();
  runtime_.scratch(scratch_bytes());
  for (const Layer& layer : description_.layers) {
    const RoutedFfn* ffn = layer.routed();
    if (ffn == nullptr) continue;
    expert_hidden_ = ffn->expert_hidden();
    most_experts_ = std::max(most_experts_, ffn->router.matrix.rows);
    const int64_t k = ffn->router.rule.k;
    experts_per_token_ = num_routed_layers_ == 0 || experts_per_token_ == k ? k : 0;
    ++num_routed_layers_;
  }
  forbidden_.resize(description_.layers.size());
  uses_.resize(description_.layers.size() * size_t(most_experts_));
}

void Stack::resize(int64_t max_tokens) {
  const auto lock = runtime_.lock();
  memory_.resize(size_t(sizes_.buffer_bytes(max_tokens)));
  buffers_ = sizes_.place_buffers(memory_.data(), max_tokens);
  residual_.use(buffers_.residual);
  max_tokens_ = max_tokens;
  stage_ = Stage::done;
  runtime_.trim(scratch_bytes());
}

// What steps take, with the adapters that are set.
int64_t Stack::scratch_bytes() const {
  int64_t ranks = 0;
  for (const auto& [number, adapter] : adapters_) ranks = std::max(ranks, adapter->ranks);
  const int64_t bytes = sizes_.scratch_bytes(max_tokens_, runtime_.num_threads(), true, true, ranks);
  return adapters_.empty() ? bytes : std::max(bytes, adapter_scratch_bytes());
}

void Stack::begin(const Step& step) {
  stage_ = Stage::done;  // if anything throws, there is no step
  step_ = step;
  has_left_out_ = false;
  chosen_cols_ = candidate_cols_ = 0;
  num_given_ = step.num_tokens;
  given_order_ = step.order;
  layer_ = chosen_per_token_ = num_chosen_layers_ = 0;
  layers_done_.store(0, std::memory_order_relaxed);
  adapted_ = group_rows(nullptr, step.num_tokens);
  if (recurrent_ != nullptr) begin_runs();
  if (step.to_end != nullptr) begin_bounded();
  table_rows_.assign(step.token_ids, step.token_ids + step.num_tokens);
  for (int64_t i = 0; i < step.overrides.num_rows; ++i) table_rows_[size_t(step.overrides.rows[i])] = -1;
  stage_ = Stage::begun;
}

void Stack::begin_runs() {
  runs_.clear();
  std::vector<bool> is_taken(size_t(recurrent_->num_slots()));
  for (int64_t t = 0; t < step_.num_tokens; ++t) {
    const int64_t position = step_.order[t], slot = step_.state_slots[step_.sequence[t]];
    const bool goes_on = t > 0 && step_.sequence[t] == step_.sequence[t - 1];
    const int64_t expected = goes_on ? step_.order[t - 1] + 1 : recurrent_->position(slot);
    if (position != expected && (goes_on || position != 0)) {
      throw std::invalid_argument("token " + std::to_string(t) + " is at position " +
                                  std::to_string(position) + ", but the recurrent state in slot " +
                                  std::to_string(slot) + " is at " + std::to_string(expected));
    }
    if (goes_on) {
      runs_.back().end = t + 1;
      continue;
    }
    if (is_taken[size_t(slot)]) {
      throw std::invalid_argument("two runs of tokens use the recurrent state in slot " +
                                  std::to_string(slot));
    }
    is_taken[size_t(slot)] = true;
    runs_.push_back({t, t + 1, slot, position == 0});
  }
  for (const StateRun& run : runs_) recurrent_->set_position(run.slot, -1);  // until the step is done
}

void Stack::begin_bounded() {
  const auto& layers = description_.layers;
  if (layers.empty() || layers.back().reach == 0) {  // no layer leaves out a token
    step_.to_end = nullptr;
    return;
  }
  for (int64_t i = 0; i < step_.num_wanted; ++i) {
    if (step_.to_end[step_.wanted[i]] >= layers.back().reach)
      throw std::invalid_argument("the logits of token " + std::to_string(step_.wanted[i]) +
                                  " are wanted, and it is not at the end of its prompt");
  }
  const auto require_all = [&](int64_t layer) {
    if (layers[size_t(layer)].reach > 0)
      throw std::invalid_argument("additions and taps need every token, and layer " + std::to_string(layer) +
                                  " leaves some out");
  };
  for (const Step::Addition& addition : step_.additions) require_all(addition.layer);
  for (const Step::Tap& tap : step_.taps) require_all(tap.layer);
  if (step_.choices != nullptr)
    std::fill_n(step_.choices, num_routed_layers_ * num_given_ * experts_per_token_, -1);
}

// Leaves out the tokens that neither the networks of this layer nor later layers need.
void Stack::leave_out() {
  if (step_.to_end == nullptr || layer().reach == 0) return;
  const int64_t tokens = step_.num_tokens, hidden = description_.embedding.cols;
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < tokens; ++t)
    if (step_.to_end[t] < layer().reach) rows.push_back(t);
  const int64_t num_left = int64_t(rows.size());
  if (num_left == tokens) return;
  pick(rows, left_.sequence, step_.sequence);
  pick(rows, left_.order, step_.order);
  pick(rows, left_.sees_until, step_.sees_until);
  pick(rows, left_.to_end, step_.to_end);
  pick(rows, left_.slots, step_.slots);
  pick(rows, left_.window_slots, step_.window_slots);
  pick(rows, left_.is_decode, step_.is_decode);
  pick(rows, left_.adapters, step_.adapters);
  if (step_.angles != nullptr) {
    int64_t num_axes = 1;
    for (const Rotary& rotary : description_.rotaries) num_axes = std::max(num_axes, rotary.num_axes());
    std::vector<float> angles;
    for (int64_t axis = 0; axis < num_axes; ++axis)
      for (const int64_t row : rows) angles.push_back(step_.angles[axis * tokens + row]);
    left_.angles = std::move(angles);
    step_.angles = left_.angles.data();
  }
  move_up(rows, 1, table_rows_.data());
  move_up(rows, chosen_cols_, buffers_.chosen);
  move_up(rows, candidate_cols_, buffers_.candidates);
  move_up(rows, hidden, buffers_.hidden);
  if (layer().is_parallel) move_up(rows, hidden, buffers_.normed);
  if (residual_.has_streams()) residual_.keep(rows);
  if (has_left_out_) {
    for (int64_t& row : rows) row = left_.rows[size_t(row)];
  }
  left_.rows = std::move(rows);
  has_left_out_ = true;
  step_.num_tokens = num_left;
  adapted_ = group_rows(nullptr, num_left);
  write_angles();
}

void Stack::set_adapter(int32_t number, std::shared_ptr<const StackAdapter> adapter) {
  const auto lock = runtime_.lock();
  std::erase_if(adapted_, [&](const AdaptedRows& adapted) {
    if (adapted.number != number) return false;
    if (stage_ != Stage::done)
      throw std::invalid_argument("the running step has tokens of adapter " + std::to_string(number));
    return true;
  });
  if (adapter != nullptr) {
    adapters_[number] = std::move(adapter);
  } else {
    adapters_.erase(number);
  }
  runtime_.scratch(scratch_bytes());
}

// Groups rows of the step by their adapters; null: the first num_rows tokens that are left.
std::vector<AdaptedRows> Stack::group_rows(const int64_t* rows, int64_t num_rows) const {
  std::vector<AdaptedRows> groups;
  if (step_.adapters == nullptr) return groups;
  for (int64_t i = 0; i < num_rows; ++i) {
    const int32_t number = step_.adapters[rows != nullptr ? place(rows[i]) : i];
    if (number < 0) continue;
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const AdaptedRows& adapted) { return adapted.number == number; });
    if (group == groups.end()) {
      const auto found = adapters_.find(number);
      if (found == adapters_.end())
        throw std::invalid_argument("a token has adapter " + std::to_string(number) + ", which is not set");
      group = groups.insert(group, {number, found->second, {}});
    }
    group->rows.push_back(int32_t(i));
  }
  return groups;
}

void Stack::multiply(const std::vector<Product>& products, const float* x) {
  matmul(runtime_, products, x, step_.num_tokens);
  for (const AdaptedRows& adapted : adapted_) change_products(runtime_, adapted, products, x);
}

int64_t Stack::place(int64_t row) const {
  if (!has_left_out_) return row;
  const auto found = std::lower_bound(left_.rows.begin(), left_.rows.end(), row);
  if (found == left_.rows.end() || *found != row)
    throw std::invalid_argument("the layers of the last step left out token " + std::to_string(row));
  return found - left_.rows.begin();
}

Pause Stack::advance(std::chrono::nanoseconds slice) {
  const auto lock = runtime_.lock();
  start_clock();
  const Clock::time_point end = last_mark_ + slice;
  const Stage stage = std::exchange(stage_, Stage::done);  // if anything throws, the step ends
  if (stage == Stage::done) return Pause::done;
  if (stage == Stage::begun) {
    const int64_t hidden = description_.embedding.cols;
    embed(runtime_, description_.embedding, step_.token_ids, step_.num_tokens, buffers_.hidden);
    for (const AdaptedRows& adapted : adapted_)
      change_embeddings(runtime_, adapted, step_.token_ids, hidden, buffers_.hidden);
    multiply_rows(runtime_, description_.embedding_scale, step_.num_tokens, hidden, buffers_.hidden);
    copy_vectors(runtime_, step_.overrides, hidden, buffers_.hidden);
    if (residual_.has_streams()) residual_.begin(buffers_.hidden, step_.num_tokens);
    write_angles();
  } else if (stage == Stage::waits_for_experts) {
    if (num_unfinished_ > 0) {
      throw std::invalid_argument("layer " + std::to_string(number()) + " still waits for " +
                                  std::to_string(num_unfinished_) + " experts");
    }
    combine_experts(routed_ffn());
    end_layer();
  }
  for (; layer_ < int64_t(description_.layers.size()); end_layer()) {
    if (Clock::now() >= end) {
      stage_ = Stage::between_layers;
      return Pause::time;
    }
    if (layer().ngrams && !add_table_rows(end)) {
      stage_ = Stage::between_layers;
      return Pause::time;
    }
    if (layer().mixer) {
      norm_block(layer().mixer_norm, layer().mixer_mix);
      std::visit([&](const auto& mixer) { mix(mixer); }, *layer().mixer);
      if (residual_.has_streams()) residual_.write(buffers_.hidden);
    }
    leave_out();
    if (step_.num_tokens == 0) break;
    if (!layer().ffn) continue;
    if (!layer().is_parallel) norm_block(layer().ffn_norm, layer().ffn_mix);
    if (layer().sums_apart())
      std::fill_n(buffers_.ffn_sum, step_.num_tokens * description_.embedding.cols, 0.0f);
    const bool is_complete = std::visit([&](const auto& ffn) { return feed_forward(ffn); }, *layer().ffn);
    if (!is_complete) {
      stage_ = Stage::waits_for_experts;
      return Pause::experts;
    }
  }
  for (const StateRun& run : runs_) recurrent_->set_position(run.slot, given_order_[run.end - 1] + 1);
  if (residual_.has_streams() && step_.num_tokens > 0) residual_.finish(buffers_.hidden);
  logits(step_.wanted, step_.num_wanted, step_.logits);
  layers_done_.store(0, std::memory_order_relaxed);
  return Pause::done;
}

bool Stack::add_table_rows(Clock::time_point end) {
  const Ngrams& ngrams = *layer().ngrams;
  TableRows& table = *ngrams.table;
  const int64_t tokens = step_.num_tokens;
  if (table.num_rows() != tokens * ngrams.rows_per_token()) {
    throw std::invalid_argument("the table of layer " + std::to_string(number()) + " has begun to read " +
                                std::to_string(table.num_rows()) + " rows, but the step has " +
                                std::to_string(tokens) + " tokens");
  }
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now());
  const bool is_there = table.advance(std::max(left, std::chrono::milliseconds(1)));
  mark(Part::waiting);
  if (!is_there || table.fault()) return false;
  float* rows = buffers_.expert_out;  // free until the layer's experts run
  if (!table.write(runtime_, rows)) return false;
  add_ngrams(runtime_, ngrams, description_.norm_eps, rows, tokens, recurrent_, runs_,
             rows + tokens * ngrams.value.cols,
             residual_.has_streams() ? residual_.streams() : buffers_.hidden);
  mark(Part::attention_and_dense);
  return true;
}

void Stack::end_layer() {
  const int64_t hidden = description_.embedding.cols;
  if (layer().ffn && layer().sums_apart()) {
    if (layer().ffn_post_norm != nullptr) norm(layer().ffn_post_norm, buffers_.ffn_sum, buffers_.ffn_sum);
    multiply_rows(runtime_, layer().ffn_scale, step_.num_tokens, hidden, buffers_.ffn_sum);
    add_rows(runtime_, buffers_.ffn_sum, hidden, step_.num_tokens, hidden, buffers_.hidden);
  }
  multiply_rows(runtime_, layer().scale, step_.num_tokens, hidden, buffers_.hidden);
  if (layer().ffn && residual_.has_streams()) residual_.write(buffers_.hidden);
  for (const Step::Addition& addition : step_.additions) {
    if (addition.layer != layer_) continue;
    const RowVectors& given = addition.vectors;
    if (residual_.has_streams()) {
      residual_.add(given.rows, given.num_rows, given.vectors);
    } else {
      add_vectors(runtime_, given, hidden, buffers_.hidden);
    }
  }
  for (const Step::Tap& tap : step_.taps) {
    if (tap.layer != layer_) continue;
    if (residual_.has_streams()) {
      residual_.mean(tap.hidden);
    } else {
      std::copy_n(buffers_.hidden, step_.num_tokens * hidden, tap.hidden);
    }
  }
  ++layer_;
  for (size_t i = size_t(layer_); i < description_.layers.size(); ++i) {
    if (description_.layers[i].ngrams) description_.layers[i].ngrams->table->advance({});  // the next wave
  }
  layers_done_.store(layer_, std::memory_order_relaxed);
}

void Stack::norm_block(const Norm& by, const std::optional<StreamMix>& mix) {
  if (residual_.has_streams()) residual_.read(*mix, buffers_.hidden);
  norm(by, buffers_.hidden, buffers_.normed);
  if (residual_.has_streams())  // the block's sum goes to the streams, with their weights
    std::fill_n(buffers_.hidden, step_.num_tokens * description_.embedding.cols, 0.0f);
  if (layer().normed_residual == 0) return;
  const int64_t tokens = step_.num_tokens, hidden = description_.embedding.cols;
  std::copy_n(buffers_.normed, tokens * hidden, buffers_.hidden);
  multiply_rows(runtime_, layer().normed_residual, tokens, hidden, buffers_.hidden);
}

void Stack::norm(const Norm& by, const float* x, float* out) { norm(by, x, step_.num_tokens, out); }

void Stack::norm(const Norm& by, const float* x, int64_t rows, float* out) {
  const int64_t hidden = description_.embedding.cols;
  if (by.weight == nullptr) {
    std::copy_n(x, rows * hidden, out);
  } else if (description_.norm_kind == NormKind::rms) {
    rms_norm(runtime_, x, by.weight, description_.norm_eps, rows, hidden, out);
  } else {
    layer_norm(runtime_, x, by.weight, by.bias, description_.norm_eps, rows, hidden, out);
  }
}

// Writes the cosines and sines of all rotary embeddings, one embedding after another.
void Stack::write_angles() {
  int64_t at = 0;
  for (const Rotary& rotary : description_.rotaries) {
    float *cosine = buffers_.cosine + at, *sine = buffers_.sine + at;
    if (step_.angles != nullptr) {
      rotary_angles(runtime_, rotary, step_.angles, step_.num_tokens, cosine, sine);
    } else {
      rotary_angles(runtime_, rotary, step_.order, step_.num_tokens, cosine, sine);
    }
    at += step_.num_tokens * rotary.num_pairs();
  }
}

void Stack::rotate(float* x, int64_t num_heads, int64_t head_dim) {
  if (!layer().rotary) return;
  rotate(x, num_heads, head_dim, description_.rotaries[size_t(*layer().rotary)].is_interleaved);
}

void Stack::rotate(float* x, int64_t num_heads, int64_t head_dim, bool has_interleaved_pairs) {
  if (!layer().rotary) return;
  const int64_t at = angles_at(*layer().rotary);
  const Rotary& rotary = description_.rotaries[size_t(*layer().rotary)];
  rope(runtime_, {x, num_heads * head_dim}, step_.num_tokens, num_heads, head_dim, buffers_.cosine + at,
       buffers_.sine + at, rotary.num_pairs(), has_interleaved_pairs);
}

void Stack::rotate_back(float* x, int64_t num_heads, int64_t head_dim) {
  if (!layer().rotary) return;
  float* sine = buffers_.sine + angles_at(*layer().rotary);
  const int64_t pairs = description_.rotaries[size_t(*layer().rotary)].num_pairs();
  // Negation is exact, so the sines are the same again afterwards.
  multiply_rows(runtime_, -1, step_.num_tokens, pairs, sine);
  rotate(x, num_heads, head_dim);
  multiply_rows(runtime_, -1, step_.num_tokens, pairs, sine);
}

// Where the cosines and sines of a rotary embedding begin.
int64_t Stack::angles_at(int64_t rotary) const {
  int64_t at = 0;
  for (int64_t i = 0; i < rotary; ++i) at += step_.num_tokens * description_.rotaries[size_t(i)].num_pairs();
  return at;
}

bool Stack::feed_forward(const DenseFfn& ffn) {
  const int64_t hidden = description_.embedding.cols;
  swiglu(runtime_, ffn.network, ffn.activation.value_or(description_.activation), buffers_.normed,
         step_.num_tokens, pairs_of(&StackAdapter::networks, ffn.network.up.data, network_pairs_),
         buffers_.block);
  add_rows(runtime_, buffers_.block, hidden, step_.num_tokens, hidden, ffn_sum());
  mark(Part::attention_and_dense);
  return true;
}

bool Stack::feed_forward(const RoutedFfn& ffn) {
  has_run_shared_ = false;
  if (!description_.experts_off) dispatch_tokens(ffn);
  if (!description_.experts_off && description_.resident == nullptr) return run_elsewhere(ffn);
  add_shared(ffn);
  if (description_.experts_off) return true;
  description_.resident->run(runtime_, number(), dispatch_->experts(), *dispatch_, expert_in(ffn),
                             buffers_.expert_out);
  combine_experts(ffn);
  return true;
}

bool Stack::run_elsewhere(const RoutedFfn& ffn) {
  if (elsewhere_ == nullptr) return false;
  if (!elsewhere_->begin(number(), dispatch_, expert_in(ffn), buffers_.expert_out)) return false;
  if (elsewhere_->wants_guess()) {
    const int64_t next = next_routed_layer();
    if (next >= 0) {
      std::set<std::pair<int32_t, int32_t>> pairs;
      const std::vector<std::vector<int32_t>> by_rank = predict(next, &pairs);
      elsewhere_->guess(next, by_rank, {pairs.begin(), pairs.end()}, !dispatch_->scan().empty());
    }
  }
  add_shared(ffn);
  elsewhere_->run_here(runtime_);
  mark(Part::expert_compute);
  elsewhere_->take_run_seconds();
  const bool is_complete = elsewhere_->wait(kMostWait);
  mark(Part::waiting);
  const double computed = elsewhere_->take_run_seconds();  // while it waited for others
  seconds_[size_t(Part::waiting)] -= computed;
  seconds_[size_t(Part::expert_compute)] += computed;
  if (is_complete) combine_experts(ffn);
  return is_complete;
}

// Computes the ids and weights [num_tokens][k] of the layer's router for x [num_tokens][hidden].
void Stack::choose(const Router& router, int64_t layer, const float* x, int32_t* ids, float* weights) {
  const int64_t tokens = step_.num_tokens, experts = router.matrix.rows;
  multiply({{router.matrix, buffers_.router_logits}}, x);
  add_bias(runtime_, router.bias, tokens, experts, buffers_.router_logits);
  if (router.logit_cap > 0) soft_cap(runtime_, router.logit_cap, tokens * experts, buffers_.router_logits);
  RouteRule rule = router.rule;
  std::vector<float> biases[2];
  if (const std::vector<int32_t>& forbidden = forbidden_[size_t(layer)]; !forbidden.empty()) {
    const float** given[] = {&rule.choice_bias, &rule.media_bias};
    for (size_t i = 0; i < 2; ++i) {
      if (*given[i] == nullptr) continue;
      biases[i].assign(*given[i], *given[i] + experts);
      *given[i] = biases[i].data();
    }
    for (const int32_t expert : forbidden) {
      for (int64_t token = 0; token < tokens; ++token)
        buffers_.router_logits[token * experts + expert] = -INFINITY;
      for (std::vector<float>& bias : biases)
        if (!bias.empty()) bias[size_t(expert)] = -INFINITY;
    }
  }
  route(runtime_, rule, buffers_.router_logits, tokens, experts, ids, weights,
        router.token_experts ? router.token_experts->data : nullptr, table_rows_.data());
}

void Stack::forbid(int64_t layer, std::vector<int32_t> experts) {
  const auto lock = runtime_.lock();
  const RoutedFfn* ffn = layer < 0 || layer >= int64_t(description_.layers.size())
                             ? nullptr
                             : description_.layers[size_t(layer)].routed();
  if (ffn == nullptr)
    throw std::invalid_argument("layer " + std::to_string(layer) + " has no routed experts");
  const RouteRule& rule = ffn->router.rule;
  const int64_t num_experts = ffn->router.matrix.rows, group_size = num_experts / rule.num_groups;
  const int64_t needed = (rule.k + rule.kept_groups - 1) / rule.kept_groups;
  std::vector<int64_t> left(size_t(rule.num_groups), group_size);
  std::sort(experts.begin(), experts.end());
  experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
  for (const int32_t expert : experts) {
    if (expert < 0 || expert >= num_experts)
      throw std::invalid_argument("layer " + std::to_string(layer) + " has no expert " +
                                  std::to_string(expert));
    if (--left[size_t(expert / group_size)] < needed)
      throw std::invalid_argument("layer " + std::to_string(layer) +
                                  " would keep too few experts: a token needs " + std::to_string(needed) +
                                  " of every " + std::to_string(group_size));
  }
  forbidden_[size_t(layer)] = std::move(experts);
}

// Chooses the experts of each token.
void Stack::dispatch_tokens(const RoutedFfn& ffn) {
  const int64_t experts = ffn.router.matrix.rows, k = ffn.router.rule.k;
  const float* router_in = buffers_.normed;
  if (ffn.router.norm != nullptr) {
    norm(ffn.router.norm, buffers_.hidden, buffers_.block);
    router_in = buffers_.block;
  }
  choose(ffn.router, layer_, router_in, buffers_.expert_ids, buffers_.routing_weights);
  if (step_.choices != nullptr) {
    int32_t* choices = step_.choices + num_chosen_layers_++ * num_given_ * k;
    for (int64_t i = 0; i < step_.num_tokens; ++i)
      std::copy_n(buffers_.expert_ids + i * k, k, choices + (has_left_out_ ? left_.rows[size_t(i)] : i) * k);
  }
  write_expert_in(ffn);
  chosen_per_token_ = k;
  if (dispatch_.use_count() > 1) dispatch_ = std::make_shared<Dispatch>();  // somebody keeps the last one
  dispatch_->assign(buffers_.expert_ids, step_.is_decode, step_.num_tokens, k, experts);
  if (step_.adapters != nullptr) dispatch_->set_adapters(step_.adapters);
  const std::vector<int32_t>&chosen = dispatch_->experts(), &starts = dispatch_->starts();
  int64_t* uses = uses_.data() + layer_ * most_experts_;
  for (size_t i = 0; i < chosen.size(); ++i) uses[chosen[i]] += starts[i + 1] - starts[i];
  is_finished_.assign(chosen.size(), false);
  num_unfinished_ = int64_t(chosen.size());
  mark(Part::router);
}

// Computes what the routed experts read, if it is not what the layer's norm gives.
void Stack::write_expert_in(const RoutedFfn& ffn) {
  const int64_t tokens = step_.num_tokens;
  if (ffn.norm != nullptr) {
    norm(ffn.norm, buffers_.hidden, buffers_.expert_in);
  } else if (ffn.latent) {
    multiply({{ffn.latent->down, buffers_.expert_in}}, buffers_.normed);
  } else if (ffn.router.weighs_input) {
    std::copy_n(buffers_.normed, tokens * ffn.expert_hidden(), buffers_.expert_in);
  }
  if (!ffn.router.weighs_input) return;
  const int64_t cols = ffn.expert_hidden();
  runtime_.parallel_for(tokens, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const float weight = std::exchange(buffers_.routing_weights[token], 1.0f);
      float* row = buffers_.expert_in + token * cols;
      for (int64_t i = 0; i < cols; ++i) row[i] *= weight;
    }
  });
}

void Stack::add_shared(const RoutedFfn& ffn) {
  if (!ffn.shared || std::exchange(has_run_shared_, true)) return;
  const int64_t hidden = description_.embedding.cols, tokens = step_.num_tokens;
  swiglu(runtime_, ffn.shared->network, ffn.shared->activation.value_or(description_.activation),
         buffers_.normed, tokens,
         pairs_of(&StackAdapter::networks, ffn.shared->network.up.data, network_pairs_), buffers_.block);
  if (ffn.shared->post_norm != nullptr) norm(ffn.shared->post_norm, buffers_.block, buffers_.block);
  if (ffn.shared->score) {
    multiply({{*ffn.shared->score, buffers_.shared_score}}, buffers_.normed);
    add_sigmoid_gated(runtime_, buffers_.block, buffers_.shared_score, tokens, hidden, ffn_sum());
  } else {
    add_rows(runtime_, buffers_.block, hidden, tokens, hidden, ffn_sum());
  }
  mark(Part::attention_and_dense);
}

void Stack::combine_experts(const RoutedFfn& ffn) {
  const int64_t hidden = description_.embedding.cols, tokens = step_.num_tokens;
  const bool is_apart = ffn.post_norm != nullptr || ffn.latent;
  // The experts have run, so the latent vectors that they read are no longer needed.
  float* sum = ffn.latent ? buffers_.expert_in : is_apart ? buffers_.block : ffn_sum();
  if (is_apart) std::fill_n(sum, tokens * ffn.expert_hidden(), 0.0f);
  combine(runtime_, buffers_.expert_out, buffers_.routing_weights, tokens, ffn.router.rule.k,
          ffn.expert_hidden(), sum);
  if (ffn.latent && ffn.latent->norm != nullptr)
    rms_norm(runtime_, sum, ffn.latent->norm, description_.norm_eps, tokens, ffn.expert_hidden(), sum);
  if (ffn.latent) multiply({{ffn.latent->up, buffers_.block}}, sum);
  if (ffn.post_norm != nullptr) norm(ffn.post_norm, buffers_.block, buffers_.block);
  if (is_apart) add_rows(runtime_, buffers_.block, hidden, tokens, hidden, ffn_sum());
  mark(Part::expert_compute);
}

const float* Stack::expert_in(const RoutedFfn& ffn) const {
  return ffn.has_own_input() ? buffers_.expert_in : buffers_.normed;
}

float* Stack::ffn_sum() const { return layer().sums_apart() ? buffers_.ffn_sum : buffers_.hidden; }

const RoutedFfn& Stack::routed_ffn() const { return std::get<RoutedFfn>(*layer().ffn); }

void Stack::require_waiting() const {
  if (stage_ != Stage::waits_for_experts) throw std::invalid_argument("no layer waits for experts");
}

int64_t Stack::waiting_layer() const {
  require_waiting();
  return number();
}

std::shared_ptr<const Dispatch> Stack::dispatch() const {
  require_waiting();
  return dispatch_;
}

const float* Stack::rows() const {
  require_waiting();
  return expert_in(routed_ffn());
}

float* Stack::expert_out() const {
  require_waiting();
  return buffers_.expert_out;
}

std::vector<std::vector<int32_t>> Stack::look_ahead() {
  const auto lock = runtime_.lock();
  require_waiting();
  const int64_t next = next_routed_layer();
  if (next < 0) return {};
  start_clock();
  return predict(next);
}

// -1: no later layer has routed experts.
int64_t Stack::next_routed_layer() const {
  const auto& layers = description_.layers;
  const auto next = std::find_if(layers.begin() + layer_ + 1, layers.end(),
                                 [](const Layer& layer) { return layer.routed() != nullptr; });
  return next == layers.end() ? -1 : next - layers.begin();
}

std::vector<std::vector<int32_t>> Stack::predict(int64_t layer,
                                                 std::set<std::pair<int32_t, int32_t>>* pairs) {
  const int64_t tokens = step_.num_tokens;
  const Layer& next = description_.layers[size_t(layer)];
  const Router& router = next.routed()->router;
  const int64_t experts = router.matrix.rows, k = router.rule.k;
  float* normed = buffers_.block;
  std::vector<int32_t> ids(static_cast<size_t>(tokens * k));
  std::vector<float> weights(ids.size());
  const Norm& read = next.is_parallel ? next.mixer_norm : next.ffn_norm;
  if (residual_.has_streams()) {
    std::vector<const StreamMix*> sublayers;
    for (int64_t i = layer_ + 1; i <= layer; ++i) {
      const Layer& between = description_.layers[size_t(i)];
      for (const auto* mix : {&between.mixer_mix, &between.ffn_mix})
        if (*mix) sublayers.push_back(&**mix);
    }
    residual_.peek(sublayers, normed);
    norm(read, normed, normed);
  } else {
    norm(router.norm != nullptr ? Norm{router.norm} : read, buffers_.hidden, normed);
  }
  choose(router, layer, normed, ids.data(), weights.data());
  std::vector<std::vector<int32_t>> by_rank(static_cast<size_t>(k));
  std::vector<bool> is_named(static_cast<size_t>(experts));
  for (int64_t rank = 0; rank < k; ++rank) {
    for (int64_t token = 0; token < tokens; ++token) {
      if (step_.to_end != nullptr && next.reach > 0 && step_.to_end[token] >= next.reach) continue;
      const int32_t expert = ids[size_t(token * k + rank)];
      if (pairs != nullptr && step_.adapters != nullptr && step_.adapters[token] >= 0)
        pairs->emplace(expert, step_.adapters[token]);
      if (is_named[size_t(expert)]) continue;
      is_named[size_t(expert)] = true;
      const bool is_certain = router.token_experts && table_rows_[size_t(token)] >= 0;
      by_rank[is_certain ? 0 : size_t(rank)].push_back(expert);
    }
  }
  mark(Part::router);
  return by_rank;
}

void Stack::run_shared() {
  const auto lock = runtime_.lock();
  require_waiting();
  start_clock();
  add_shared(routed_ffn());
}

void Stack::finish_experts(const std::vector<int32_t>& experts) {
  const auto lock = runtime_.lock();
  require_waiting();
  for (const int32_t expert : experts) {
    const int64_t index = dispatch_->index_of(expert);
    if (index < 0 || is_finished_[size_t(index)]) {
      throw std::invalid_argument("layer " + std::to_string(number()) + " does not wait for expert " +
                                  std::to_string(expert));
    }
    is_finished_[size_t(index)] = true;
    --num_unfinished_;
  }
  // What is left of the layer is little beside its experts.
  if (num_unfinished_ == 0) layers_done_.store(layer_ + 1, std::memory_order_relaxed);
}

void Stack::final_states(const int64_t* rows, int64_t num_rows, float* out) {
  const auto lock = runtime_.lock();
  const int64_t hidden = description_.embedding.cols;
  for (int64_t i = 0; i < num_rows; ++i)
    std::copy_n(buffers_.hidden + place(rows[i]) * hidden, hidden, out + i * hidden);
  norm(description_.final_norm, out, num_rows, out);
}

void Stack::logits(const int64_t* rows, int64_t num_rows, float* out) {
  const auto lock = runtime_.lock();
  final_states(rows, num_rows, buffers_.normed);
  const std::vector<Product> products = {{description_.head, out}};
  matmul(runtime_, products, buffers_.normed, num_rows);
  if (!adapted_.empty()) {
    for (const AdaptedRows& adapted : group_rows(rows, num_rows))
      change_products(runtime_, adapted, products, buffers_.normed);
  }
  multiply_rows(runtime_, description_.logit_scale, num_rows, description_.head.rows, out);
  if (description_.logit_cap > 0)
    soft_cap(runtime_, description_.logit_cap, num_rows * description_.head.rows, out);
  mark(Part::attention_and_dense);
}

void Stack::mark(Part part) {
  const Clock::time_point now = Clock::now();
  seconds_[size_t(part)] += std::chrono::duration<double>(now - last_mark_).count();
  last_mark_ = now;
}

std::array<double, kNumParts> Stack::take_seconds() { return std::exchange(seconds_, {}); }

std::vector<int64_t> Stack::take_uses() { return std::exchange(uses_, std::vector<int64_t>(uses_.size())); }

}  // namespace argosy
