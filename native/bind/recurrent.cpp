// recurrent.cpp: binds the recurrent state of sequences and the operation on it.

#include "bind/recurrent.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <vector>

namespace argosy {

using namespace nb::literals;

void bind_recurrent(nb::module_& m) {
  nb::class_<StateShape>(m, "StateShape", R"(
    The float32 values that a layer keeps of a sequence: last inputs of its convolution and the matrices of its heads,
    or what its pools have gathered.)")
      .def_static(
          "delta_net", [](const DeltaSizes& sizes) { return delta_shape(sizes).state(); }, "sizes"_a)
      .def_static(
          "short_conv",
          [](int64_t channels, int64_t width) {
            return StateShape{CausalConv::window_floats(channels, width), 0};
          },
          "channels"_a, "width"_a)
      .def_static(
          "mamba", [](const MambaSizes& sizes) { return mamba_shape(sizes).state(); }, "sizes"_a)
      .def_static(
          "pools",
          [](const std::vector<PoolSizes>& pools) {
            StateShape shape = {};
            for (const PoolSizes& sizes : pools) shape.matrix_floats += pool_shape(sizes).state_floats();
            return shape;
          },
          "pools"_a, "What the pools of a layer have gathered of unfinished groups, one after another.")
      .def_ro("window_floats", &StateShape::window_floats)
      .def_ro("matrix_floats", &StateShape::matrix_floats);

  m.def("recurrent_state_bytes", &RecurrentState::bytes, "num_slots"_a, "layers"_a,
        "Bytes of a RecurrentState.");
  nb::class_<RecurrentState>(m, "RecurrentState", R"(
    What layers keep of a sequence as a whole, one slot per running sequence; memory is committed when it is first
    written.

    The position of a slot is the number of tokens it has seen. A run of tokens continues from there, or starts over
    from zeros at position 0. A step that failed halfway leaves position -1.

    Args:
        layers: the layers that have a recurrent state, in their order.)")
      .def(nb::init<int64_t, std::vector<StateShape>>(), "num_slots"_a, "layers"_a)
      .def_prop_ro("nbytes", &RecurrentState::nbytes)
      .def_prop_ro("num_slots", &RecurrentState::num_slots)
      .def_prop_ro("slot_floats", &RecurrentState::slot_floats,
                   "The number of float32 values in one slot, all layers.")
      .def(
          "position",
          [](const RecurrentState& self, int64_t slot) {
            require_slot(self, slot);
            return self.position(slot);
          },
          "slot"_a)
      .def(
          "restart",
          [](RecurrentState& self, int64_t slot) {
            require_slot(self, slot);
            self.set_position(slot, 0);
          },
          "slot"_a, "Reset a slot to position 0.")
      .def(
          "copy_out",
          [](RecurrentState& self, int64_t slot, const OutArrayOf<float>& to) {
            require_slot(self, slot);
            self.copy_out(slot, write_array("to", to, {self.slot_floats()}));
          },
          "slot"_a, "to"_a.noconvert(), "Copy a whole slot into `to` [slot_floats].")
      .def(
          "copy_in",
          [](RecurrentState& self, int64_t slot, const ArrayOf<float>& saved, int64_t position) {
            require_slot(self, slot);
            require_range("position", position, 0, INT32_MAX);
            self.copy_in(slot, read_array("saved", saved, {self.slot_floats()}), position);
          },
          "slot"_a, "saved"_a, "position"_a, "Copy data that `copy_out` saved at `position` into any slot.")
      .def(
          "copy_slot",
          [](RecurrentState& self, int64_t from, int64_t to) {
            require_slot(self, from);
            require_slot(self, to);
            nb::gil_scoped_release released;
            self.copy_slot(from, to);
          },
          "from_slot"_a, "to_slot"_a, "Copy state and position.");
}

}  // namespace argosy
