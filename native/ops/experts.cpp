#include "ops/experts.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace argosy {

namespace {

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

std::string name_of(int64_t layer, int64_t expert) {
  return "expert " + std::to_string(expert) + " of layer " + std::to_string(layer);
}

}  // namespace

void Dispatch::assign(const int32_t* choices, const bool* is_decode, int64_t num_tokens, int64_t k,
                      int64_t num_experts) {
  num_tokens_ = num_tokens;
  k_ = k;
  is_list_ = false;
  num_assignments_ = num_tokens * k;
  adapters_.clear();
  std::vector<int32_t> next(static_cast<size_t>(num_experts));  // assignments, then where the next one goes
  std::vector<bool> decode_wants(static_cast<size_t>(num_experts));
  for (int64_t a = 0; a < num_assignments_; ++a) {
    const size_t expert = size_t(choices[a]);
    ++next[expert];
    if (is_decode[a / k]) decode_wants[expert] = true;
  }
  experts_.clear();
  scan_.clear();
  starts_.assign(1, 0);
  for (size_t expert = 0; expert < next.size(); ++expert) {
    if (next[expert] == 0) continue;
    experts_.push_back(int32_t(expert));
    if (!decode_wants[expert]) scan_.push_back(int32_t(expert));
    starts_.push_back(starts_.back() + next[expert]);
    next[expert] = starts_[starts_.size() - 2];
  }
  assignments_.resize(size_t(num_assignments_));
  for (int64_t a = 0; a < num_assignments_; ++a)
    assignments_[size_t(next[size_t(choices[a])]++)] = int32_t(a);
}

void Dispatch::list(std::vector<int32_t> experts, std::vector<int32_t> scan, std::vector<int32_t> starts,
                    std::vector<int32_t> tokens, int64_t num_tokens) {
  num_tokens_ = num_tokens;
  k_ = 0;
  is_list_ = true;
  experts_ = std::move(experts);
  scan_ = std::move(scan);
  starts_ = std::move(starts);
  tokens_ = std::move(tokens);
  num_assignments_ = int64_t(tokens_.size());
  adapters_.clear();
  assignments_.resize(tokens_.size());
  std::iota(assignments_.begin(), assignments_.end(), 0);
}

Dispatch Dispatch::only(std::vector<int32_t> experts) const {
  std::sort(experts.begin(), experts.end());
  Dispatch part;
  part.num_tokens_ = num_tokens_;
  part.k_ = k_;
  part.num_assignments_ = num_assignments_;
  part.is_list_ = is_list_;
  part.tokens_ = tokens_;
  part.adapters_ = adapters_;
  part.starts_.assign(1, 0);
  for (const int32_t expert : experts) {
    const int64_t index = index_of(expert);
    if (index < 0) refuse("no token chose expert " + std::to_string(expert));
    if (!part.experts_.empty() && part.experts_.back() == expert) {
      refuse("expert " + std::to_string(expert) + " is named twice");
    }
    const auto begin = assignments_.begin();
    part.assignments_.insert(part.assignments_.end(), begin + starts_[size_t(index)],
                             begin + starts_[size_t(index) + 1]);
    part.starts_.push_back(int32_t(part.assignments_.size()));
    part.experts_.push_back(expert);
    if (std::binary_search(scan_.begin(), scan_.end(), expert)) part.scan_.push_back(expert);
  }
  return part;
}

int64_t Dispatch::index_of(int32_t expert) const {
  const auto found = std::lower_bound(experts_.begin(), experts_.end(), expert);
  return found != experts_.end() && *found == expert ? found - experts_.begin() : -1;
}

ExpertTable::ExpertTable(std::shared_ptr<const void> hold, const uint8_t* data, int64_t nbytes,
                         int64_t hidden, const Activation& activation)
    : hold_(std::move(hold)), data_(data), nbytes_(nbytes), hidden_(hidden), activation_(activation) {}

void ExpertTable::add_layer(int64_t layer, ExpertLayer description) {
  if (layer < 0) refuse("layer is " + std::to_string(layer) + ", expected 0 or more");
  if (num_experts(layer) > 0) refuse("layer " + std::to_string(layer) + " was already added");
  if (description.has_gate != description.activation.value_or(activation_).has_gate())
    refuse("the experts of layer " + std::to_string(layer) +
           (description.has_gate ? " have a gate, which their activation does not use"
                                 : " have no gate, which their activation needs"));
  if (description.starts.empty()) refuse("layer " + std::to_string(layer) + " has no experts");
  if (layer >= int64_t(layers_.size())) layers_.resize(size_t(layer) + 1);
  std::vector<int64_t> places(description.starts.size(), -1);
  layers_[size_t(layer)] = {std::move(description), std::move(places)};
}

int64_t ExpertTable::num_experts(int64_t layer) const {
  if (layer < 0 || layer >= int64_t(layers_.size())) return 0;
  return int64_t(layers_[size_t(layer)].places.size());
}

const ExpertTable::Placed& ExpertTable::layer_of(int64_t layer) const {
  if (num_experts(layer) == 0) refuse("layer " + std::to_string(layer) + " has no experts in this table");
  return layers_[size_t(layer)];
}

void ExpertTable::place(int64_t layer, int64_t expert, int64_t at) {
  const Placed& placed = layer_of(layer);
  if (expert < 0 || expert >= num_experts(layer)) {
    refuse("expert is " + std::to_string(expert) + ", expected 0 to " +
           std::to_string(num_experts(layer) - 1));
  }
  const auto& [formats, has_gate, activation, width, biases, starts] = placed.description;
  for (size_t i = has_gate ? 0 : 1; i < 3; ++i) {
    const int64_t rows = i < 2 ? width : hidden_, cols = i < 2 ? hidden_ : width;
    const int64_t start = starts[size_t(expert)][i], size = matrix_bytes(formats[i], rows, cols);
    // No sum here overflows: each comparison leaves less than nbytes_.
    const bool fits =
        at >= 0 && start >= 0 && size <= nbytes_ && start <= nbytes_ - size && at <= nbytes_ - size - start;
    if (!fits) {
      refuse("matrix " + std::to_string(i) + " of " + name_of(layer, expert) + ", " + std::to_string(size) +
             " bytes at " + std::to_string(at) + " + " + std::to_string(start) +
             ", does not lie inside memory of " + std::to_string(nbytes_) + " bytes");
    }
  }
  layers_[size_t(layer)].places[size_t(expert)] = at;
}

bool ExpertTable::has_places(int64_t layer, const std::vector<int32_t>& experts) const {
  return std::all_of(experts.begin(), experts.end(), [&](int32_t expert) {
    return expert < num_experts(layer) && layers_[size_t(layer)].places[size_t(expert)] >= 0;
  });
}

ExpertView ExpertTable::view(const Placed& layer, int32_t expert) const {
  const auto& [formats, has_gate, activation, width, biases, starts] = layer.description;
  const uint8_t* memory = data_ + layer.places[size_t(expert)];
  const auto& start = starts[size_t(expert)];
  const auto row_of = [&](const float* rows, int64_t cols) {
    return rows != nullptr ? rows + expert * cols : nullptr;
  };
  const MatrixView gate = {formats[0], memory + start[0], width, hidden_};
  return {.gate = has_gate ? std::optional(gate) : std::nullopt,
          .up = {formats[1], memory + start[1], width, hidden_},
          .down = {formats[2], memory + start[2], hidden_, width},
          .bias = {row_of(biases.gate, width), row_of(biases.up, width), row_of(biases.down, hidden_)}};
}

void ExpertTable::set_adapter(int32_t number, std::shared_ptr<const ExpertAdapter> adapter) {
  if (number < 0) refuse("adapter is " + std::to_string(number) + ", expected 0 or more");
  if (adapter == nullptr) {
    adapters_.erase(number);
    return;
  }
  for (int64_t layer = 0; layer < adapter->num_layers(); ++layer) {
    const ExpertPart* part = adapter->part(layer);
    if (part == nullptr) continue;
    const ExpertLayer& base = layer_of(layer).description;
    const auto require = [&](const char* name, int64_t found, int64_t expected) {
      if (found == expected) return;
      refuse("the pairs of layer " + std::to_string(layer) + " have " + name + " " + std::to_string(found) +
             ", and the experts " + std::to_string(expected));
    };
    require("num_experts", part->num_experts, num_experts(layer));
    require("hidden", part->hidden, hidden_);
    require("width", part->width, base.width);
    if (!base.has_gate && part->ranks[0] > 0)
      refuse("layer " + std::to_string(layer) + " has pairs beside a gate, and its experts have no gate");
  }
  adapters_[number] = std::move(adapter);
}

// The pairs of each assignment; empty if none has any.
std::vector<const ExpertPairs*> ExpertTable::find_pairs(int64_t layer, const std::vector<int32_t>& experts,
                                                        const Dispatch& dispatch,
                                                        const std::vector<int32_t>& starts,
                                                        const std::vector<int32_t>& tokens) const {
  if (!dispatch.has_adapters() || adapters_.empty()) return {};
  std::vector<const ExpertPairs*> pairs(tokens.size());
  bool has_any = false;
  for (size_t i = 0; i < experts.size(); ++i) {
    int32_t before = -1;  // neighbours often have the same adapter
    const ExpertPairs* found = nullptr;
    for (size_t a = size_t(starts[i]); a < size_t(starts[i + 1]); ++a) {
      if (const int32_t number = dispatch.adapter_of(tokens[a]); number != before) {
        const auto adapter = adapters_.find(number);
        found = adapter != adapters_.end() ? adapter->second->find(layer, experts[i]) : nullptr;
        before = number;
      }
      pairs[a] = found;
      has_any |= found != nullptr;
    }
  }
  return has_any ? std::move(pairs) : std::vector<const ExpertPairs*>();
}

void ExpertTable::run(Runtime& runtime, int64_t layer, const std::vector<int32_t>& experts,
                      const Dispatch& dispatch, const float* rows, float* out) {
  const Placed& placed = layer_of(layer);
  const auto lock = runtime.lock();
  std::vector<bool> is_named(dispatch.experts().size());
  std::vector<ExpertView> views;
  std::vector<int32_t> starts = {0}, token, row;
  views.reserve(experts.size());
  starts.reserve(experts.size() + 1);
  for (const int32_t expert : experts) {
    const int64_t index = dispatch.index_of(expert);
    if (index < 0)
      refuse("no token of layer " + std::to_string(layer) + " chose expert " + std::to_string(expert));
    if (is_named[size_t(index)]) refuse(name_of(layer, expert) + " is named twice");
    is_named[size_t(index)] = true;
    if (expert >= num_experts(layer) || placed.places[size_t(expert)] < 0) {
      refuse(name_of(layer, expert) + " has no place in memory");
    }
    views.push_back(view(placed, expert));
    const auto begin = dispatch.assignments().begin();
    row.insert(row.end(), begin + dispatch.starts()[size_t(index)],
               begin + dispatch.starts()[size_t(index) + 1]);
    starts.push_back(int32_t(row.size()));
  }
  token.reserve(row.size());
  for (const int32_t assignment : row) token.push_back(dispatch.token_of(assignment));
  const std::vector<const ExpertPairs*> pairs = find_pairs(layer, experts, dispatch, starts, token);
  swiglu_experts(runtime, views, placed.description.activation.value_or(activation_), rows,
                 dispatch.num_tokens(), {starts.data(), token.data(), row.data()}, out,
                 pairs.empty() ? nullptr : pairs.data());
  num_runs_ += int64_t(experts.size());
}

}  // namespace argosy
