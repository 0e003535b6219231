// experts.h: routed experts: which tokens chose which expert, and the outputs of experts in memory here.
//
//   Dispatch dispatch;
//   dispatch.assign(choices, is_decode, num_tokens, k, num_experts);
//   ExpertTable table(memory, nbytes, hidden, activation);
//   table.add_layer(layer, {...});
//   table.place(layer, expert, at);                     // and again whenever the expert moves
//   table.run(runtime, layer, dispatch.experts(), dispatch, rows, out);
//
// An assignment is one token and one of its experts: token * k + rank. Each has its own row of `out`, so it
// does not matter which experts run together, or which run first. A dispatch may also be a list of some
// assignments of another one, which then have their own numbers.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "ops/expert_adapter.h"
#include "ops/swiglu.h"

namespace argosy {

// The experts that the tokens of one layer chose, and the assignments of each.
class Dispatch {
 public:
  // Sorts the assignments by expert. choices [num_tokens][k], each from 0 to num_experts - 1; is_decode
  // [num_tokens] says which tokens are not prompt tokens.
  void assign(const int32_t* choices, const bool* is_decode, int64_t num_tokens, int64_t k,
              int64_t num_experts);

  // Takes assignments that are sorted already: experts[i], ascending, has assignments starts[i] to
  // starts[i + 1], and assignment a is of token tokens[a]. `scan` as below.
  void list(std::vector<int32_t> experts, std::vector<int32_t> scan, std::vector<int32_t> starts,
            std::vector<int32_t> tokens, int64_t num_tokens);

  // From now on, adapter of_tokens[i] (0 or more; -1: none) is that of token i; nullptr: no token has one.
  // After assign(), which forgets them, as list() does.
  void set_adapters(const int32_t* of_tokens) {
    if (of_tokens == nullptr) return adapters_.clear();
    adapters_.assign(of_tokens, of_tokens + num_tokens_);
  }

  // The same tokens and assignments, without other experts than these. Throws std::invalid_argument for an
  // expert that no token chose, or that is named twice.
  Dispatch only(std::vector<int32_t> experts) const;

  int64_t num_tokens() const { return num_tokens_; }
  bool is_list() const { return is_list_; }
  bool is_complete() const { return !is_list_ && num_assignments_ == int64_t(assignments_.size()); }
  int64_t k() const { return k_; }                              // 0 for a list
  int64_t num_assignments() const { return num_assignments_; }  // with those of experts that only() left out
  int32_t token_of(int32_t assignment) const {
    return is_list_ ? tokens_[size_t(assignment)] : int32_t(assignment / k_);
  }
  bool has_adapters() const { return !adapters_.empty(); }
  int32_t adapter_of(int32_t token) const { return has_adapters() ? adapters_[size_t(token)] : -1; }
  const std::vector<int32_t>& experts() const { return experts_; }  // chosen by any token, ascending
  const std::vector<int32_t>& scan() const { return scan_; }        // those that only prompt tokens chose
  // experts()[i] has assignments()[starts()[i]] to assignments()[starts()[i + 1]], ascending.
  const std::vector<int32_t>& starts() const { return starts_; }
  const std::vector<int32_t>& assignments() const { return assignments_; }

  int64_t index_of(int32_t expert) const;  // its place in experts(); -1 if no token chose it

 private:
  int64_t num_tokens_ = 0, k_ = 0, num_assignments_ = 0;
  bool is_list_ = false;
  std::vector<int32_t> experts_, scan_, starts_, assignments_, tokens_, adapters_;
};

// Biases of all routed experts of a layer; nullptr: none.
struct ExpertBiases {
  const float *gate = nullptr, *up = nullptr;  // [num_experts, width]
  const float* down = nullptr;                 // [num_experts, hidden]
};

struct ExpertLayer {
  // Of gate, up and down, the same for every expert of the layer; the first counts only if there is a gate.
  std::array<Format, 3> formats;
  bool has_gate = true;
  std::optional<Activation> activation = std::nullopt;  // none: the table's
  int64_t width = 0;                                    // inner neurons of one expert
  ExpertBiases biases = {};
  std::vector<std::array<int64_t, 3>>
      starts;  // [num_experts]: bytes from an expert's place to gate, up, down
};

// The experts whose weights are in one block of memory. The weights, and the vectors behind the biases, must
// stay in place while an expert runs; the caller sees to that.
class ExpertTable {
 public:
  ExpertTable(std::shared_ptr<const void> hold, const uint8_t* data, int64_t nbytes, int64_t hidden,
              const Activation& activation);

  // Functions throw std::invalid_argument for a layer that was not added, or an expert that it does not have.
  void add_layer(int64_t layer, ExpertLayer description);
  // From now on the expert's memory begins at byte `at`. Throws std::invalid_argument if it does not fit.
  void place(int64_t layer, int64_t expert, int64_t at);

  // Whether each of `experts` has a place.
  bool has_places(int64_t layer, const std::vector<int32_t>& experts) const;

  // From now on, tokens of adapter `number` have these pairs beside their experts; nullptr: none. Throws
  // std::invalid_argument if the adapter has a layer or a pair that the table lacks, or another size. Only
  // while no expert runs.
  void set_adapter(int32_t number, std::shared_ptr<const ExpertAdapter> adapter);

  // Writes the outputs of `experts` to out [num_assignments][hidden], a row for each of their assignments,
  // for rows [num_tokens][hidden]. Other rows of `out` do not change. Throws std::invalid_argument for an
  // expert that is named twice, has no place, or that no token chose, and for pairs that a token's adapter
  // has but that are not in memory.
  void run(Runtime& runtime, int64_t layer, const std::vector<int32_t>& experts, const Dispatch& dispatch,
           const float* rows, float* out);

  int64_t hidden() const { return hidden_; }
  int64_t nbytes() const { return nbytes_; }
  int64_t num_experts(int64_t layer) const;       // 0: the layer was not added
  int64_t num_runs() const { return num_runs_; }  // experts that have run, counted once per call of run()

 private:
  struct Placed {
    ExpertLayer description;
    std::vector<int64_t> places;  // [num_experts]; -1: none yet
  };

  const Placed& layer_of(int64_t layer) const;
  ExpertView view(const Placed& layer, int32_t expert) const;
  std::vector<const ExpertPairs*> find_pairs(int64_t layer, const std::vector<int32_t>& experts,
                                             const Dispatch& dispatch, const std::vector<int32_t>& starts,
                                             const std::vector<int32_t>& tokens) const;

  std::shared_ptr<const void> hold_;
  const uint8_t* data_;
  int64_t nbytes_, hidden_;
  Activation activation_;
  std::vector<Placed> layers_;
  std::map<int32_t, std::shared_ptr<const ExpertAdapter>> adapters_;
  std::atomic<int64_t> num_runs_ = 0;
};

}  // namespace argosy
