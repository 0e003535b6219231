// expert_adapter.h: the pairs of an adapter beside routed experts: the part of each expert, and where it
// lies.
//
//   ExpertAdapter adapter(memory, nbytes);
//   adapter.add_layer(layer, {...});
//   adapter.place(layer, expert, at);        // and again whenever the part moves; -1: it is not in memory
//   table.set_adapter(number, adapter);      // ops/experts.h
//
// The part of an expert: `down` and `up` of gate's pair, of up's and of down's, each aligned to
// kPairAlignment from the beginning of the part on. A matrix whose rank is 0 has no pair. Every expert of a
// layer has the same layout (src/argosy/adapters/files.py: ExpertPart).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/low_rank.h"

namespace argosy {

inline constexpr int64_t kPairAlignment = 64;

// Of every routed expert of a layer.
struct ExpertPart {
  Format format = Format::f32;  // f32, f16 or bf16
  std::array<int64_t, 3> ranks = {};
  std::array<float, 3> scales = {};
  int64_t hidden = 0, width = 0, num_experts = 0;

  // Where `down` and `up` of each matrix begin.
  std::array<std::array<int64_t, 2>, 3> offsets() const;
  int64_t nbytes() const;
};

// Parts in one block of memory, which must stay in place while an expert runs; the caller sees to that.
class ExpertAdapter {
 public:
  ExpertAdapter(std::shared_ptr<const void> hold, const uint8_t* data, int64_t nbytes);

  // Functions throw std::invalid_argument for a layer that was not added, or an expert that it does not have.

  // Throws std::invalid_argument for a layer that was added, a format that is not a float's, a size out of
  // range, a scale that is not finite, or no pair at all.
  void add_layer(int64_t layer, const ExpertPart& part);
  // From now on the expert's part begins at byte `at`; -1: it is not in memory. Throws std::invalid_argument
  // if it does not fit.
  void place(int64_t layer, int64_t expert, int64_t at);

  // Whether each of `experts` has its part in memory; true for a layer without pairs.
  bool has_places(int64_t layer, const std::vector<int32_t>& experts) const;
  // The pairs of an expert, at an address that stays; nullptr if its layer has none. Throws
  // std::invalid_argument if they are not in memory.
  const ExpertPairs* find(int64_t layer, int64_t expert) const;

  int64_t nbytes() const { return nbytes_; }
  int64_t num_layers() const { return int64_t(layers_.size()); }  // one more than the last that was added
  const ExpertPart* part(int64_t layer) const;                    // nullptr: the layer has no pairs

 private:
  struct Placed {
    ExpertPart part;                 // without experts: the layer was not added
    std::vector<ExpertPairs> pairs;  // [num_experts]
    std::vector<bool> has_place;     // [num_experts]

    bool has(int64_t expert) const {
      return expert >= 0 && expert < part.num_experts && has_place[size_t(expert)];
    }
  };

  Placed& layer_of(int64_t layer, int64_t expert);

  std::shared_ptr<const void> hold_;
  const uint8_t* data_;
  int64_t nbytes_;
  std::vector<Placed> layers_;
};

}  // namespace argosy
