// gated_delta.h: the recurrent state of sequences, and the gated delta net that updates it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kv_layer.h"
#include "ops/runtime.h"
#include "store/arena.h"

namespace argosy {

// Sizes of a gated delta net. The channels of its convolution are q of all key heads, then k, then v.
struct DeltaShape {
  int64_t num_key_heads, num_value_heads, key_dim, value_dim;
  int64_t conv_width;  // positions that the convolution sees

  bool operator==(const DeltaShape&) const = default;
  int64_t key_channels() const { return num_key_heads * key_dim; }
  int64_t value_channels() const { return num_value_heads * value_dim; }
  int64_t conv_channels() const { return 2 * key_channels() + value_channels(); }
  int64_t window_floats() const { return (conv_width - 1) * conv_channels(); }
  int64_t state_floats() const { return window_floats() + num_value_heads * key_dim * value_dim; }
};

// The recurrent state of the running sequences, float32. Each slot and layer stores the last conv_width - 1
// inputs of the convolution [conv_width - 1][conv_channels], then the states
// [value_heads][key_dim][value_dim].
//
// The position of a slot is the number of tokens of its sequence that it has seen. A failed step leaves the
// slot without a position: it can only start again at position 0, or be restored.
class RecurrentState {
 public:
  // Throws std::invalid_argument for a size below 1 or a state beyond 2^62 bytes.
  RecurrentState(int64_t num_slots, int64_t num_layers, const DeltaShape& shape);

  static int64_t bytes(int64_t num_slots, int64_t num_layers, const DeltaShape& shape);

  const DeltaShape& shape() const { return shape_; }
  int64_t num_slots() const { return int64_t(positions_.size()); }
  int64_t num_layers() const { return num_layers_; }
  int64_t nbytes() const { return int64_t(arena_.size()); }
  int64_t slot_floats() const { return num_layers_ * shape_.state_floats(); }

  float* window(int64_t slot, int64_t layer);
  float* state(int64_t slot, int64_t layer) { return window(slot, layer) + shape_.window_floats(); }

  // Returns -1 if a step failed half-way.
  int64_t position(int64_t slot) const { return positions_[size_t(slot)]; }
  void set_position(int64_t slot, int64_t position) { positions_[size_t(slot)] = position; }

  // Copies a whole slot, float32 [slot_floats()].
  void copy_out(int64_t slot, float* to);
  void copy_in(int64_t slot, const float* from, int64_t position);
  void copy_slot(int64_t from, int64_t to);  // including the position

 private:
  int64_t num_layers_;
  DeltaShape shape_;
  // Before positions_, which also grows with num_slots: the arena rejects a count that is too large.
  Arena arena_;
  std::vector<int64_t> positions_;
};

// Consecutive tokens of one sequence.
struct DeltaRun {
  int64_t begin, end;  // tokens of the batch
  int64_t slot;
  bool is_start;  // the first token is at position 0, so the state starts as zeros
};

// Where the parts of a token lie in the outputs of its projections. Strides are in floats. A `group` is the
// distance between key heads, for q and k, or between the groups of value heads that share a key head. Value
// heads of one group lie side by side.
struct DeltaInputs {
  float *q, *k, *v;
  int64_t stride, key_group, value_group;
  const float* z;
  int64_t z_stride, z_group;
  float *a, *b;
  int64_t gate_stride, gate_group;
};

struct DeltaWeights {
  const float* conv;     // [conv_width][conv_channels]
  const float* rate;     // [value_heads], negative: the decay rate
  const float* dt_bias;  // [value_heads]
  const float* norm;     // [value_dim]
  float eps;             // the norm's epsilon
  bool is_tiled;         // value head i uses key head i modulo key heads, not i / (value heads per key head)
};

// out is [num_tokens][value_heads * value_dim]. Overwrites its inputs.
void gated_delta(Runtime& runtime, RecurrentState& state, int64_t layer, const DeltaWeights& weights,
                 const DeltaInputs& inputs, const std::vector<DeltaRun>& runs, float* out);

}  // namespace argosy
