// experts.cpp: binds the dispatch of a layer's tokens, and the experts in memory here.

#include "bind/experts.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind/matrix.h"
#include "ops/layer_experts.h"

namespace argosy {

using namespace nb::literals;

namespace {

using PlaceOfExpert = std::pair<std::pair<int64_t, int64_t>, int64_t>;  // (layer, expert), byte

std::shared_ptr<Dispatch> make_dispatch(const ArrayOf<int32_t>& choices, const ArrayOf<bool>& is_decode,
                                        int64_t num_experts,
                                        const std::optional<ArrayOf<int32_t>>& adapters) {
  const int32_t* from = read_array("choices", choices, {kAnySize, kAnySize});
  const int64_t num_tokens = int64_t(choices.shape(0)), k = int64_t(choices.shape(1));
  require_range("tokens * experts per token", num_tokens * k, 0, INT32_MAX);
  const bool* decodes = read_array("is_decode", is_decode, {num_tokens});
  require_range("num_experts", num_experts, 0, kLargestSize);
  require_ids("choices", from, num_tokens * k, num_experts);
  auto dispatch = std::make_shared<Dispatch>();
  dispatch->assign(from, decodes, num_tokens, k, num_experts);
  if (adapters) {
    const int32_t* numbers = read_array("adapters", *adapters, {num_tokens});
    for (int64_t i = 0; i < num_tokens; ++i)
      require_range(item_name("adapters", size_t(i)), numbers[i], -1, INT32_MAX);
    dispatch->set_adapters(numbers);
  }
  return dispatch;
}

int64_t experts_per_token(const Dispatch& dispatch) {
  if (dispatch.is_list()) refuse("a list of assignments has no experts per token");
  return dispatch.k();
}

View<int32_t> copy_of_choices(const Dispatch& dispatch) {
  if (!dispatch.is_complete()) refuse("this dispatch has some experts of its tokens only");
  const std::vector<int32_t>&starts = dispatch.starts(), &assignments = dispatch.assignments();
  auto choices = std::make_unique<int32_t[]>(assignments.size());
  for (size_t i = 0; i < dispatch.experts().size(); ++i) {
    for (int32_t at = starts[i]; at < starts[i + 1]; ++at)
      choices[size_t(assignments[size_t(at)])] = dispatch.experts()[i];
  }
  const nb::capsule owner(choices.get(), [](void* data) noexcept { delete[] static_cast<int32_t*>(data); });
  return View<int32_t>(choices.release(), {size_t(dispatch.num_tokens()), size_t(dispatch.k())}, owner);
}

std::vector<int32_t> assignments_of(const Dispatch& dispatch, int32_t expert) {
  const int64_t index = dispatch.index_of(expert);
  if (index < 0) refuse("no token chose expert " + std::to_string(expert));
  const auto begin = dispatch.assignments().begin();
  return {begin + dispatch.starts()[size_t(index)], begin + dispatch.starts()[size_t(index) + 1]};
}

void add_layer(BoundExpertTable& table, int64_t layer, const FormatNames& formats, int64_t width,
               const ArrayOf<int64_t>& starts, const std::optional<ArrayOf<float>>& gate_bias,
               const std::optional<ArrayOf<float>>& up_bias, const std::optional<ArrayOf<float>>& down_bias,
               const std::optional<ActivationOfNumbers>& activation) {
  require_range("layer", layer, 0, UINT16_MAX);
  require_range("width", width, 0, kLargestSize);
  std::array<Format, 3> of_matrices;
  const int64_t num_matrices = parse_formats(formats, of_matrices);
  const int64_t* from = read_array("starts", starts, {kAnySize, num_matrices});
  const int64_t num_experts = int64_t(starts.shape(0));
  require_range("experts in starts", num_experts, 1, kLargestSize);
  const auto read_bias = [&](const char* name, const std::optional<ArrayOf<float>>& bias, int64_t size) {
    return bias ? read_array(name, *bias, {num_experts, size}) : nullptr;
  };
  ExpertLayer description = {
      .formats = of_matrices,
      .has_gate = num_matrices == 3,
      .activation = activation ? std::optional(parse_activation(*activation)) : std::nullopt,
      .width = width,
      .biases = {read_bias("gate_bias", gate_bias, width), read_bias("up_bias", up_bias, width),
                 read_bias("down_bias", down_bias, table.hidden())},
      .starts = std::vector<std::array<int64_t, 3>>(size_t(num_experts)),
  };
  for (auto& start : description.starts) {
    start = {};
    std::copy_n(from, num_matrices, start.end() - num_matrices);
    from += num_matrices;
  }
  table.add_layer(layer, std::move(description));
  for (const auto& bias : {gate_bias, up_bias, down_bias}) {
    if (bias) table.biases.push_back(*bias);
  }
}

void add_adapter_layer(ExpertAdapter& adapter, int64_t layer, const FormatName& format,
                       const std::array<int64_t, 3>& ranks, const std::array<float, 3>& scales,
                       int64_t hidden, int64_t width, int64_t num_experts) {
  adapter.add_layer(layer, {.format = parse_format(format),
                            .ranks = ranks,
                            .scales = scales,
                            .hidden = hidden,
                            .width = width,
                            .num_experts = num_experts});
}

const ExpertPart& require_part(const ExpertAdapter& adapter, int64_t layer) {
  const ExpertPart* part = adapter.part(layer);
  if (part == nullptr) refuse("layer " + std::to_string(layer) + " has no pairs in this adapter");
  return *part;
}

double run(BoundExpertTable& table, Runtime& runtime, int64_t layer, const std::vector<int32_t>& experts,
           const Dispatch& dispatch, const ArrayOf<float>& rows, const OutArrayOf<float>& out) {
  const int64_t hidden = table.hidden();
  const float* from = read_array("rows", rows, {dispatch.num_tokens(), hidden});
  float* to = write_array("out", out, {dispatch.num_assignments(), hidden});
  nb::gil_scoped_release released;
  const auto began = std::chrono::steady_clock::now();
  table.run(runtime, layer, experts, dispatch, from, to);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

}  // namespace

void bind_expert_table(nb::module_& m) {
  nb::class_<Dispatch>(m, "Dispatch", R"(
    The experts that the tokens of a layer chose, and the assignments (a token and one of its experts) of each.

    Args:
        choices: [tokens, experts per token], the experts of each token, best first.
        is_decode: bool [tokens], False for prompt tokens.
        adapters: [tokens], the number of each token's adapter, -1 for none.)")
      .def(nb::new_(&make_dispatch), "choices"_a, "is_decode"_a, "num_experts"_a,
           "adapters"_a.none() = nb::none())
      .def_prop_ro("num_tokens", &Dispatch::num_tokens)
      .def_prop_ro("experts_per_token", &experts_per_token, "ValueError in a worker.")
      .def_prop_ro("num_assignments", &Dispatch::num_assignments)
      .def_prop_ro("experts", &Dispatch::experts, "The experts that any token chose, ascending.")
      .def_prop_ro("scan", &Dispatch::scan, "The experts that only prompt tokens chose.")
      .def("assignments", &assignments_of, "expert"_a,
           "The assignments of an expert: token * experts per token + rank, ascending.")
      .def("choices", &copy_of_choices,
           R"(
        The experts of each token, best first: [tokens, experts per token], a new array.

        Raises:
            ValueError: `only` or the coordinator left some out.)")
      .def(
          "only",
          [](const Dispatch& dispatch, std::vector<int32_t> experts) {
            return std::make_shared<Dispatch>(dispatch.only(std::move(experts)));
          },
          "experts"_a, R"(
        The same tokens and assignments, without other experts than these.

        Raises:
            ValueError: no token chose an expert, or it is named twice.)");

  nb::class_<LayerExperts>(m, "LayerExperts",
                           "Experts of a layer that run elsewhere, while a step continues without Python.");

  nb::class_<ExpertAdapter>(m, "ExpertAdapter", R"(
    The low-rank pairs of an adapter beside routed experts, in an arena: the part of each expert, and where it lies.

    A part holds `down` and `up` of the gate, up and down pairs in turn, laid out by `ExpertPart` of
    argosy.adapters.files. The adapter does not know which parts have landed: the caller that places a part does.)")
      .def(
          "__init__",
          [](ExpertAdapter* self, Arena& arena) {
            new (self) ExpertAdapter(arena.hold(), arena.data(), int64_t(arena.size()));
          },
          "arena"_a)
      .def_prop_ro("nbytes", &ExpertAdapter::nbytes, "Bytes of the arena.")
      .def("add_layer", &add_adapter_layer, "layer"_a, nb::kw_only(), "format"_a, "ranks"_a, "scales"_a,
           "hidden"_a, "width"_a, "num_experts"_a, R"(
        Describe the pairs of a layer; no part has a place yet.

        Args:
            format: f32, f16 or bf16.
            ranks, scales: of gate, up and down. A matrix of rank 0 has no pair.)")
      .def(
          "part_bytes",
          [](const ExpertAdapter& self, int64_t layer) { return require_part(self, layer).nbytes(); },
          "layer"_a, "Bytes of one expert's part.")
      .def(
          "offsets",
          [](const ExpertAdapter& self, int64_t layer) { return require_part(self, layer).offsets(); },
          "layer"_a, "Where `down` and `up` of gate, of up and of down begin in a part.")
      .def(
          "place",
          [](ExpertAdapter& adapter, const std::vector<PlaceOfExpert>& places) {
            for (const auto& [key, at] : places) adapter.place(key.first, key.second, at);
          },
          "places"_a,
          "From now on, the part of each (layer, expert) begins at that byte of the arena; -1: it is not "
          "there.")
      .def("has_places", &ExpertAdapter::has_places, "layer"_a, "experts"_a,
           "Whether all of these experts have their part in memory; True for a layer without pairs.");

  nb::class_<BoundExpertTable>(m, "ExpertTable", R"(
    Routed experts whose weights are in an arena: where each lies, and how to run it.

    It does not know which weights have landed; whoever places an expert sees to that.

    Args:
        hidden: the size of the experts' inputs and outputs.
        activation: the activation of gate and up.)")
      .def(
          "__init__",
          [](BoundExpertTable* self, Arena& arena, int64_t hidden, const ActivationOfNumbers& activation) {
            require_range("hidden", hidden, 1, kLargestSize);
            new (self) BoundExpertTable(arena.hold(), arena.data(), int64_t(arena.size()), hidden,
                                        parse_activation(activation));
          },
          "arena"_a, nb::kw_only(), "hidden"_a, "activation"_a)
      .def_prop_ro("nbytes", &ExpertTable::nbytes, "Bytes of the arena.")
      .def_prop_ro("num_runs", &ExpertTable::num_runs,
                   "The number of experts that have run, counted once per layer and step.")
      .def("add_layer", &add_layer, "layer"_a, nb::kw_only(), "formats"_a, "width"_a, "starts"_a,
           "gate_bias"_a.none() = nb::none(), "up_bias"_a.none() = nb::none(),
           "down_bias"_a.none() = nb::none(), "activation"_a.none() = nb::none(), R"(
        Describe the experts of a layer; none has a place yet.

        Args:
            formats: formats of gate, up and down, or of up and down if the activation has no gate.
            starts: int64 [experts, 3 or 2], bytes from an expert's place to gate and up [width, hidden] and down
                [hidden, width].
            gate_bias, up_bias: [experts, width].   down_bias: [experts, hidden].
            activation: None means the table's.)")
      .def(
          "place",
          [](BoundExpertTable& table, const std::vector<PlaceOfExpert>& places) {
            for (const auto& [key, at] : places) table.place(key.first, key.second, at);
          },
          "places"_a, "From now on, the memory of each (layer, expert) begins at that byte of the arena.")
      .def(
          "set_adapter",
          [](BoundExpertTable& table, int64_t number, std::shared_ptr<ExpertAdapter> adapter) {
            require_range("number", number, 0, INT32_MAX);
            table.set_adapter(int32_t(number), std::move(adapter));
          },
          "number"_a, "adapter"_a.none(), R"(
        From now on, the experts of tokens of adapter `number` have these pairs beside them; None: they have none.

        Only while nothing runs.

        Raises:
            ValueError: the adapter has a layer or a pair that the table lacks, or another size.)")
      .def("run", &run, "runtime"_a, "layer"_a, "experts"_a, "dispatch"_a, "rows"_a, "out"_a.noconvert(), R"(
        Write the outputs of some experts of a dispatch, each named once; return the seconds that it took.

        Args:
            rows: [tokens, hidden].
            out: [assignments, hidden], a row for each assignment; the rows of other experts do not change.

        Raises:
            ValueError: no token chose an expert, or it has no place, or its pairs are not in memory.)");
}

}  // namespace argosy
