#include "ops/recurrent_state.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr const char* kState = "a recurrent state";

// Where each layer begins in a slot, and where the last one ends.
std::vector<int64_t> layer_begins(const std::vector<StateShape>& layers) {
  std::vector<int64_t> begins = {0};
  for (const StateShape& layer : layers) {
    for (const int64_t floats : {layer.window_floats, layer.matrix_floats}) {
      if (floats < 0) checked_product(kState, {floats});
      // Each part alone first, so that no sum can overflow.
      if (floats > 0) checked_product(kState, {8, floats});
    }
    begins.push_back(begins.back() + layer.num_floats());
    checked_product(kState, {4, std::max<int64_t>(1, begins.back())});
  }
  return begins;
}

}  // namespace

int64_t RecurrentState::bytes(int64_t num_slots, const std::vector<StateShape>& layers) {
  return checked_product(kState, {4, num_slots, layer_begins(layers).back()});
}

RecurrentState::RecurrentState(int64_t num_slots, std::vector<StateShape> layers)
    : layers_(std::move(layers)),
      begins_(layer_begins(layers_)),
      arena_(size_t(bytes(num_slots, layers_))),
      positions_(size_t(num_slots), 0) {}

void RecurrentState::copy_out(int64_t slot, float* to) { std::copy_n(slot_data(slot), slot_floats(), to); }

void RecurrentState::copy_in(int64_t slot, const float* from, int64_t position) {
  std::copy_n(from, slot_floats(), slot_data(slot));
  set_position(slot, position);
}

void RecurrentState::copy_slot(int64_t from, int64_t to) {
  if (from != to) copy_in(to, slot_data(from), position(from));
}

}  // namespace argosy
