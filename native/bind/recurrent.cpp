// recurrent.cpp: binds the recurrent state of sequences and the operation on it.

#include "bind/recurrent.h"

#include <nanobind/stl/array.h>

#include <vector>

#include "ops/runtime.h"

namespace argosy {

using namespace nb::literals;

namespace {

void require_slot(const RecurrentState& state, int64_t slot) {
  require_range("slot", slot, 0, state.num_slots() - 1);
}

// runs [num_runs][3]: begin, end, slot.
std::vector<DeltaRun> read_runs(const RecurrentState& state, const ArrayOf<int64_t>& runs,
                                int64_t num_tokens) {
  const int64_t* from = read_array("runs", runs, {kAnySize, 3});
  std::vector<DeltaRun> found;
  std::vector<bool> is_taken(size_t(state.num_slots()));
  for (const int64_t* run = from; run != from + 3 * runs.shape(0); run += 3) {
    require_range("the beginning of a run", run[0], found.empty() ? 0 : found.back().end, num_tokens - 1);
    require_range("the end of a run", run[1], run[0] + 1, num_tokens);
    require_slot(state, run[2]);
    if (is_taken[size_t(run[2])]) refuse("slot " + std::to_string(run[2]) + " has two runs");
    is_taken[size_t(run[2])] = true;
    require_range("the position of a slot", state.position(run[2]), 0, INT32_MAX);
    found.push_back({run[0], run[1], run[2], state.position(run[2]) == 0});
  }
  return found;
}

void run_gated_delta(Runtime& runtime, RecurrentState& state, int64_t layer, const OutArrayOf<float>& qkv,
                     const ArrayOf<float>& z, const OutArrayOf<float>& b, const OutArrayOf<float>& a,
                     const ArrayOf<int64_t>& runs, const ArrayOf<float>& conv, const ArrayOf<float>& rate,
                     const ArrayOf<float>& dt_bias, const ArrayOf<float>& norm, float eps, bool is_tiled,
                     const OutArrayOf<float>& out) {
  const DeltaShape& shape = state.shape();
  const int64_t heads = shape.num_value_heads;
  require_range("layer", layer, 0, state.num_layers() - 1);
  DeltaInputs inputs = {};
  inputs.q = write_array("qkv", qkv, {kAnySize, shape.conv_channels()});
  const int64_t num_tokens = int64_t(qkv.shape(0));
  inputs.k = inputs.q + shape.key_channels();
  inputs.v = inputs.k + shape.key_channels();
  inputs.stride = shape.conv_channels();
  inputs.key_group = shape.key_dim;
  inputs.value_group = inputs.z_group = shape.value_channels() / shape.num_key_heads;
  inputs.z = read_array("z", z, {num_tokens, shape.value_channels()});
  inputs.z_stride = shape.value_channels();
  inputs.b = write_array("b", b, {num_tokens, heads});
  inputs.a = write_array("a", a, {num_tokens, heads});
  inputs.gate_stride = heads;
  inputs.gate_group = heads / shape.num_key_heads;
  const DeltaWeights weights = {
      .conv = read_array("conv", conv, {shape.conv_width, shape.conv_channels()}),
      .rate = read_array("rate", rate, {heads}),
      .dt_bias = read_array("dt_bias", dt_bias, {heads}),
      .norm = read_array("norm", norm, {shape.value_dim}),
      .eps = eps,
      .is_tiled = is_tiled,
  };
  float* to = write_array("out", out, {num_tokens, shape.value_channels()});
  const std::vector<DeltaRun> found = read_runs(state, runs, num_tokens);
  {
    nb::gil_scoped_release released;
    gated_delta(runtime, state, layer, weights, inputs, found, to);
  }
  if (layer + 1 < state.num_layers()) return;
  for (const DeltaRun& run : found)
    state.set_position(run.slot, state.position(run.slot) + run.end - run.begin);
}

}  // namespace

void bind_recurrent(nb::module_& m) {
  m.def(
      "recurrent_state_bytes",
      [](int64_t num_slots, int64_t num_layers, const DeltaSizes& sizes) {
        return RecurrentState::bytes(num_slots, num_layers, delta_shape(sizes));
      },
      "num_slots"_a, "num_layers"_a, "sizes"_a, "Bytes of a RecurrentState.");

  nb::class_<RecurrentState>(m, "RecurrentState", R"(
    The state of gated delta nets, one slot per running sequence; memory is committed when it is first written.

    The position of a slot is the number of tokens it has seen. A run of tokens continues from there, or starts over
    from zeros at position 0. A step that failed halfway leaves position -1.

    Args:
        num_layers: the layers with a gated delta net, all of the same sizes.)")
      .def(
          "__init__",
          [](RecurrentState* self, int64_t num_slots, int64_t num_layers, const DeltaSizes& sizes) {
            new (self) RecurrentState(num_slots, num_layers, delta_shape(sizes));
          },
          "num_slots"_a, "num_layers"_a, "sizes"_a)
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

  m.def("gated_delta", &run_gated_delta, "runtime"_a, "state"_a, "layer"_a, "qkv"_a.noconvert(), "z"_a,
        "b"_a.noconvert(), "a"_a.noconvert(), "runs"_a, nb::kw_only(), "conv"_a, "rate"_a, "dt_bias"_a,
        "norm"_a, "eps"_a, "is_tiled"_a, "out"_a.noconvert(), R"(
    A gated delta net (native/kernels/gated_delta.h) after its projections; overwrites qkv, b and a.

    After the last layer, the slots are at the end of their runs.

    Args:
        layer: the layer of the state.
        qkv: [tokens, channels], q of all key heads, then k, then v.   z: [tokens, value heads * value dim].
        b, a: [tokens, value heads].
        runs: [runs, 3], first and end token of each sequence, and its slot.
        conv: [width, channels].   rate, dt_bias: [value heads].   norm: [value dim].
        is_tiled: value head i uses key head i modulo key heads, instead of i // (value heads per key head).
        out: [tokens, value heads * value dim].)");
}

}  // namespace argosy
