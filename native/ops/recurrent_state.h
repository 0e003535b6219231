// recurrent_state.h: what layers without keys and values keep of a sequence, and the tokens that change it.
#pragma once

#include <cstdint>
#include <vector>

#include "store/arena.h"

namespace argosy {

// The floats that one layer keeps of a sequence.
struct StateShape {
  int64_t window_floats;  // the last inputs of a convolution; 0: there is none, or it is one position wide
  int64_t matrix_floats;  // the matrices of all heads; 0: none

  bool operator==(const StateShape&) const = default;
  int64_t num_floats() const { return window_floats + matrix_floats; }
};

// The recurrent state of the running sequences, float32. A slot holds a sequence: layer after layer, the
// window of its convolution, then its matrices.
//
// The position of a slot is the number of tokens of its sequence that it has seen. A failed step leaves the
// slot without a position: it can only start again at position 0, or be restored.
class RecurrentState {
 public:
  // Throws std::invalid_argument for no slot, no layer, a size below 0, no floats at all, or a state beyond
  // 2^62 bytes.
  RecurrentState(int64_t num_slots, std::vector<StateShape> layers);

  static int64_t bytes(int64_t num_slots, const std::vector<StateShape>& layers);

  const StateShape& shape(int64_t layer) const { return layers_[size_t(layer)]; }
  int64_t num_slots() const { return int64_t(positions_.size()); }
  int64_t num_layers() const { return int64_t(layers_.size()); }
  int64_t nbytes() const { return int64_t(arena_.size()); }
  int64_t slot_floats() const { return begins_.back(); }

  float* window(int64_t slot, int64_t layer) { return slot_data(slot) + begins_[size_t(layer)]; }
  float* matrices(int64_t slot, int64_t layer) { return window(slot, layer) + shape(layer).window_floats; }

  // Returns -1 if a step failed half-way.
  int64_t position(int64_t slot) const { return positions_[size_t(slot)]; }
  void set_position(int64_t slot, int64_t position) { positions_[size_t(slot)] = position; }

  // Copies a whole slot, float32 [slot_floats()].
  void copy_out(int64_t slot, float* to);
  void copy_in(int64_t slot, const float* from, int64_t position);
  void copy_slot(int64_t from, int64_t to);  // including the position

 private:
  float* slot_data(int64_t slot) { return reinterpret_cast<float*>(arena_.data()) + slot * slot_floats(); }

  std::vector<StateShape> layers_;
  std::vector<int64_t> begins_;  // of each layer in a slot, then the end of the slot
  // Before positions_, which also grows with num_slots: the arena rejects a count that is too large.
  Arena arena_;
  std::vector<int64_t> positions_;
};

// Consecutive tokens of one sequence.
struct StateRun {
  int64_t begin, end;  // tokens of the batch
  int64_t slot;
  bool is_start;  // the first token is at position 0, so the state starts as zeros
};

}  // namespace argosy
