// native_testing.cpp: tests.native._native_testing, what only tests and benchmarks call.
//
// Single operations of native/ops, which a stack runs one after another; file systems with a fault; and reads
// of experts in an order that a test chooses. It uses the classes of argosy._native and is in no wheel.

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
#include <string>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/experts.h"
#include "bind/matrix.h"
#include "bind/reads.h"
#include "bind/recurrent.h"
#include "bind/routing.h"
#include "kernels/kv_layer.h"
#include "kernels/route_args.h"
#include "kernels/swiglu_args.h"
#include "ops/causal_conv.h"
#include "ops/expert_reads.h"
#include "ops/gated_delta.h"
#include "ops/latent_attention.h"
#include "ops/latent_index.h"
#include "ops/layer.h"
#include "ops/mamba.h"
#include "ops/pool.h"
#include "ops/swiglu.h"
#include "tests/faulty_file_system.h"

namespace argosy {

using namespace nb::literals;

namespace {

using FaultName = Named<std::string,
                        "typing.Literal['eio', 'eintr', 'short', 'truncated', 'flip', 'delay', 'hold', "
                        "'uncached', 'short_cached', 'no_cache']">;

Fault parse_fault(const std::string& kind) {
  if (kind == "eio") return Fault::io_error;
  if (kind == "eintr") return Fault::interrupted;
  if (kind == "short") return Fault::partial;
  if (kind == "truncated") return Fault::truncated;
  if (kind == "flip") return Fault::flipped_bit;
  if (kind == "delay") return Fault::delayed;
  if (kind == "hold") return Fault::held;
  if (kind == "uncached") return Fault::uncached;
  if (kind == "short_cached") return Fault::partial_cached;
  if (kind == "no_cache") return Fault::no_cache;
  throw std::invalid_argument(
      "unknown kind of fault '" + kind +
      "'; known: eio, eintr, short, truncated, flip, delay, hold, uncached, short_cached, no_cache");
}

void bind_file_systems(nb::module_& m) {
  nb::class_<RealFileSystem, FileSystem>(
      m, "RealFileSystem",
      "The kernel's files. `has_queue` False imitates a system without asynchronous reads.")
      .def(nb::init<bool>(), "has_queue"_a = true);
  nb::class_<FaultyFileSystem, FileSystem>(m, "FaultyFileSystem", R"(
    `num_faults` reads, starting with read number `fail_read` (counted from 1), have a fault.

    Reads from the drive, which then bypass the page cache. eio: fails. eintr: is interrupted and must be retried.
    short: returns half of the bytes; the rest must be read. truncated: end of file. flip: one wrong bit in the middle.
    delay: returns `delay_seconds` later. hold: returns when `release` is called.

    Reads from the page cache. uncached: it lost the bytes. short_cached: it has the first half. no_cache: it cannot
    tell what it has.)")
      .def(
          "__init__",
          [](FaultyFileSystem* self, int64_t fail_read, const FaultName& kind, int64_t num_faults,
             double delay_seconds, std::shared_ptr<FileSystem> inner) {
            if (!inner) inner = std::make_shared<RealFileSystem>();
            new (self)
                FaultyFileSystem(std::move(inner), parse_fault(kind), fail_read, num_faults, delay_seconds);
          },
          "fail_read"_a, "kind"_a, "num_faults"_a = 1, "delay_seconds"_a = 0.05, "inner"_a = nb::none())
      .def("release", &FaultyFileSystem::release, "Let the reads that are held, and all later ones, go on.")
      .def_prop_ro("num_reads", &FaultyFileSystem::num_reads);
}

ReadError parse_error_kind(const std::string& kind) {
  for (const auto& [error, name] : kReadErrors) {
    if (kind == name) return error;
  }
  throw std::invalid_argument("no error of a read is called '" + kind + "'");
}

using Key = std::pair<int64_t, int64_t>;  // (layer, expert)

// The methods of an object that stands in for a store, written in Python.
class ReadsInPython : public ExpertReads {
 public:
  using Done = std::tuple<int64_t, std::optional<std::string>, std::optional<std::string>>;

  ReadsInPython(nb::object store, nb::object fetch, nb::object bytes_of)
      : store_(std::move(store)), fetch_(std::move(fetch)), bytes_of_(std::move(bytes_of)) {}

  std::vector<int64_t> fetch(const std::vector<Place>& places, Urgency urgency) override {
    const nb::gil_scoped_acquire acquired;
    std::vector<std::pair<Key, int64_t>> placed;
    for (const auto& [key, at] : places) placed.emplace_back(Key(key.layer, key.expert), at);
    return nb::cast<std::vector<int64_t>>(fetch_(placed, kUrgencies[int(urgency)]));
  }
  void hurry(const std::vector<int64_t>& tickets) override {
    const nb::gil_scoped_acquire acquired;
    store_.attr("hurry")(tickets);
  }
  std::vector<Completion> wait_any(const std::vector<int64_t>& tickets,
                                   std::optional<std::chrono::milliseconds> most) override {
    const nb::gil_scoped_acquire acquired;
    const nb::object wait = store_.attr("wait_any");
    const nb::object done = most && most->count() == 0 ? wait(tickets, 0) : wait(tickets);
    std::vector<Completion> found;
    for (auto& [ticket, message, kind] : nb::cast<std::vector<Done>>(done)) {
      found.push_back({ticket, kind ? parse_error_kind(*kind) : ReadError::none, message.value_or("")});
    }
    return found;
  }
  std::vector<int64_t> drop(const std::vector<int64_t>& tickets) override {
    const nb::gil_scoped_acquire acquired;
    return nb::cast<std::vector<int64_t>>(store_.attr("drop")(tickets));
  }
  void cancel(int64_t ticket) override {
    const nb::gil_scoped_acquire acquired;
    store_.attr("cancel")(ticket);
  }
  int64_t bytes(ExpertKey key) override {
    const nb::gil_scoped_acquire acquired;
    return nb::cast<int64_t>(bytes_of_(Key(key.layer, key.expert)));
  }

 private:
  nb::object store_, fetch_, bytes_of_;
};

void bind_reads(nb::module_& m) {
  using Fetch =
      nb::typed<nb::callable, std::vector<int64_t>(std::vector<std::pair<Key, int64_t>>, UrgencyName)>;
  using BytesOf = nb::typed<nb::callable, int64_t(Key)>;
  nb::class_<ReadsInPython, ExpertReads>(m, "ReadsInPython", R"(
    Reads that a test answers.

    Args:
        store: an object with the methods `hurry`, `wait_any`, `drop` and `cancel` of a `Store`.
        fetch: (places, urgency) -> tickets.
        bytes_of: the bytes that are read for an expert.)")
      .def(
          "__init__",
          [](ReadsInPython* self, nb::object store, Fetch fetch, BytesOf bytes_of) {
            new (self) ReadsInPython(std::move(store), std::move(fetch), std::move(bytes_of));
          },
          "store"_a, "fetch"_a, "bytes_of"_a);
}

void bind_layer(nb::module_& m) {
  m.def(
      "route",
      [](Runtime& runtime, const Routing& routing, const ArrayOf<float>& logits,
         const OutArrayOf<int32_t>& ids, const OutArrayOf<float>& weights) {
        const float* from = read_array("logits", logits, {kAnySize, kAnySize});
        const int64_t num_tokens = int64_t(logits.shape(0));
        const int64_t num_experts = int64_t(logits.shape(1));
        const RouteRule rule = routing.checked(num_experts);
        int32_t* chosen = write_array("ids", ids, {num_tokens, rule.k});
        float* to = write_array("weights", weights, {num_tokens, rule.k});
        nb::gil_scoped_release released;
        route(runtime, rule, from, num_tokens, num_experts, chosen, to);
      },
      "runtime"_a, "routing"_a, "logits"_a, "ids"_a.noconvert(), "weights"_a.noconvert(), R"(
    Write ids (best first) and routing weights [tokens, k] from logits [tokens, experts].

    Raises:
        ValueError: the routing does not fit the number of experts.)");

  m.def(
      "combine",
      [](Runtime& runtime, const ArrayOf<float>& expert_out, const ArrayOf<float>& weights,
         const OutArrayOf<float>& out) {
        const float* w = read_array("weights", weights, {kAnySize, kAnySize});
        const int64_t num_tokens = int64_t(weights.shape(0));
        const int64_t k = int64_t(weights.shape(1));
        float* to = write_array("out", out, {num_tokens, kAnySize});
        const int64_t hidden = int64_t(out.shape(1));
        const float* from = read_array("expert_out", expert_out, {num_tokens * k, hidden});
        nb::gil_scoped_release released;
        combine(runtime, from, w, num_tokens, k, hidden, to);
      },
      "runtime"_a, "expert_out"_a, "weights"_a, "out"_a.noconvert(),
      "out[t] += sum over ascending j of weights[t, j] * expert_out[t * k + j].");

  m.def(
      "add_sigmoid_gated",
      [](Runtime& runtime, const ArrayOf<float>& x, const ArrayOf<float>& gate_logit,
         const OutArrayOf<float>& out) {
        const float* from = read_array("x", x, {kAnySize, kAnySize});
        const int64_t num_tokens = int64_t(x.shape(0));
        const int64_t hidden = int64_t(x.shape(1));
        const float* gate = read_array("gate_logit", gate_logit, {num_tokens});
        float* to = write_array("out", out, {num_tokens, hidden});
        nb::gil_scoped_release released;
        add_sigmoid_gated(runtime, from, gate, num_tokens, hidden, to);
      },
      "runtime"_a, "x"_a, "gate_logit"_a, "out"_a.noconvert(),
      "out[t] += sigmoid(gate_logit[t]) * x[t], for x and out [tokens, hidden].");

  m.def(
      "mul_gate",
      [](Runtime& runtime, const ArrayOf<float>& gate, const OutArrayOf<float>& x, bool is_softplus) {
        const float* by = read_array("gate", gate, {kAnySize, kAnySize});
        float* values = write_array("x", x, {kAnySize, kAnySize});
        const int64_t rows = int64_t(x.shape(0)), cols = int64_t(x.shape(1)), gates = int64_t(gate.shape(1));
        require_size("rows of gate", int64_t(gate.shape(0)), rows);
        if (gates != 1) require_size("columns of gate", gates, cols);
        nb::gil_scoped_release released;
        mul_gate(runtime, is_softplus ? GateKind::softplus : GateKind::sigmoid, by, gates, gates == 1 ? 0 : 1,
                 rows, cols, values);
      },
      "runtime"_a, "gate"_a, "x"_a.noconvert(), "is_softplus"_a = false,
      "x[n] *= sigmoid or softplus of gate[n], elementwise, for x [n, cols] and gate [n, cols] or [n, 1].");

  m.def(
      "soft_cap",
      [](Runtime& runtime, const OutArrayOf<float>& x, float cap) {
        float* values = write_array("x", x, {kAnySize, kAnySize});
        const int64_t n = int64_t(x.size());
        if (!(cap > 0)) refuse("cap is " + std::to_string(cap) + ", expected more than 0");
        nb::gil_scoped_release released;
        soft_cap(runtime, cap, n, values);
      },
      "runtime"_a, "x"_a.noconvert(), "cap"_a, "x = cap * tanh(x / cap), in place, for x [rows, cols].");
}

// offsets [num_experts][num_matrices]: where gate, up and down begin, or up and down.
std::vector<ExpertView> view_experts(const uint8_t* data, int64_t nbytes, const int64_t* offsets,
                                     int64_t num_experts, int64_t num_matrices,
                                     const std::array<Format, 3>& formats, int64_t hidden, int64_t width) {
  std::vector<ExpertView> experts;
  experts.reserve(size_t(num_experts));
  for (int64_t i = 0; i < num_experts; ++i) {
    const int64_t* end = offsets + (i + 1) * num_matrices;
    experts.push_back({std::nullopt, view_matrix("an up", data, nbytes, end[-2], formats[1], width, hidden),
                       view_matrix("a down", data, nbytes, end[-1], formats[2], hidden, width)});
    if (num_matrices == 3)
      experts.back().gate = view_matrix("a gate", data, nbytes, end[-3], formats[0], width, hidden);
  }
  return experts;
}

const ActivationOfNumbers kSilu = std::tuple("silu", 0.0f, 0.0f);

void bind_experts(nb::module_& m) {
  m.def(
      "swiglu_experts",
      [](Runtime& runtime, Arena& arena, const FormatNames& formats, int64_t hidden, int64_t width,
         const ArrayOf<int64_t>& offsets, const ArrayOf<float>& x, const ArrayOf<int32_t>& starts,
         const ArrayOf<int32_t>& token, const ArrayOf<int32_t>& row, const OutArrayOf<float>& out,
         const ActivationOfNumbers& activation, const std::optional<ArrayOf<float>>& gate_bias,
         const std::optional<ArrayOf<float>>& up_bias, const std::optional<ArrayOf<float>>& down_bias) {
        std::array<Format, 3> of_matrices;
        const int64_t num_matrices = parse_formats(formats, of_matrices);
        const int64_t* at = read_array("offsets", offsets, {kAnySize, num_matrices});
        const int64_t num_experts = int64_t(offsets.shape(0));
        const float* from = read_array("x", x, {kAnySize, hidden});
        const int64_t num_tokens = int64_t(x.shape(0));
        const int32_t* start = read_array("starts", starts, {num_experts + 1});
        const int32_t* tokens = read_array("token", token, {kAnySize});
        const int64_t assignments = int64_t(token.shape(0));
        const int32_t* rows = read_array("row", row, {assignments});
        float* to = write_array("out", out, {kAnySize, hidden});
        require_size("starts[0]", start[0], 0);
        require_size("the last element of starts", start[num_experts], assignments);
        if (!std::is_sorted(start, start + num_experts + 1)) refuse("starts is not in ascending order");
        require_ids("token", tokens, assignments, num_tokens);
        require_ids("row", rows, assignments, int64_t(out.shape(0)));

        const std::shared_ptr<const void> hold = arena.hold();
        std::vector<ExpertView> experts = view_experts(arena.data(), int64_t(arena.size()), at, num_experts,
                                                       num_matrices, of_matrices, hidden, width);
        const auto set_biases = [&](const char* name, const std::optional<ArrayOf<float>>& biases,
                                    int64_t size, const float* ExpertBias::* bias) {
          if (!biases) return;
          const float* from_row = read_array(name, *biases, {num_experts, size});
          for (ExpertView& expert : experts) {
            expert.bias.*bias = from_row;
            from_row += size;
          }
        };
        set_biases("gate_bias", gate_bias, width, &ExpertBias::gate);
        set_biases("up_bias", up_bias, width, &ExpertBias::up);
        set_biases("down_bias", down_bias, hidden, &ExpertBias::down);
        const Activation between = parse_activation(activation);
        require_gate("each expert", num_matrices == 3, between);
        nb::gil_scoped_release released;
        swiglu_experts(runtime, experts, between, from, num_tokens, {start, tokens, rows}, to);
      },
      "runtime"_a, "arena"_a, "formats"_a, "hidden"_a, "width"_a, "offsets"_a, "x"_a, "starts"_a, "token"_a,
      "row"_a, "out"_a.noconvert(), nb::kw_only(), "activation"_a = kSilu, "gate_bias"_a.none() = nb::none(),
      "up_bias"_a.none() = nb::none(), "down_bias"_a.none() = nb::none(), R"(
    Run each expert on its tokens: out[row[a]] = activation(x Wg^T + bg, x Wu^T + bu) Wd^T + bd, x = x[token[a]].

    Args:
        formats: formats of gate, up and down, or of up and down if the activation has no gate.
        offsets: int64 [experts, 3 or 2], where gate and up [width, hidden] and down [hidden, width] begin in the arena.
        x: [tokens, hidden].
        starts: [experts + 1]; expert i runs assignments starts[i] to starts[i + 1]; the last entry is their number.
        token: [assignments], the row of x.
        row: [assignments], the row of `out`, each at most once.
        out: [any, hidden]; rows that are not in `row` do not change.
        activation: the activation of gate and up.
        gate_bias, up_bias: [experts, width].   down_bias: [experts, hidden].)");

  m.def(
      "swiglu",
      [](Runtime& runtime, const Matrix* gate, const Matrix& up, const Matrix& down, const ArrayOf<float>& x,
         const OutArrayOf<float>& out, const ActivationOfNumbers& activation) {
        const ExpertView network = view_network(gate, up, down);
        const int64_t hidden = up.view.cols;
        const float* from = read_array("x", x, {kAnySize, hidden});
        const int64_t num_tokens = int64_t(x.shape(0));
        require_range("tokens", num_tokens, 0, INT32_MAX);
        float* to = write_array("out", out, {num_tokens, hidden});
        const int32_t starts[2] = {0, int32_t(num_tokens)};
        const Activation between = parse_activation(activation);
        require_gate("the network", gate != nullptr, between);
        nb::gil_scoped_release released;
        swiglu_experts(runtime, {network}, between, from, num_tokens, {starts, nullptr, nullptr}, to);
      },
      "runtime"_a, "gate"_a.none(), "up"_a, "down"_a, "x"_a, "out"_a.noconvert(), "activation"_a = kSilu, R"(
    Run one network on all tokens of x [tokens, hidden]: a dense layer or a shared expert.)");
}

LatentLayer require_index(KvCache& kv, int64_t layer) {
  require_range("layer", layer, 0, kv.num_layers() - 1);
  require_range("index_dim", kv.shape(layer).index_dim, 1, kLargestSize);
  return kv.index_layer(layer);
}

void bind_latent_attention(nb::module_& m) {
  m.def(
      "latent_write",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& vectors,
         const ArrayOf<int64_t>& slots) {
        require_range("layer", layer, 0, kv.num_layers() - 1);
        require_kind(kv.shape(layer), KvShape::Kind::latent);
        const int64_t* at = read_array("slots", slots, {kAnySize});
        const int64_t num_tokens = int64_t(slots.shape(0));
        const float* from = read_array("vectors", vectors, {num_tokens, kv.shape(layer).head_dim});
        require_slots(kv, kv.num_blocks_of(layer), at, num_tokens);
        nb::gil_scoped_release released;
        latent_write(runtime, kv.latent_layer(layer), from, at, num_tokens);
      },
      "runtime"_a, "kv"_a, "layer"_a, "vectors"_a, "slots"_a, R"(
    Store the latent vectors [tokens, dim] of a layer with `KvShape.latent`; slots as for `kv_write`.)");

  m.def(
      "latent_attention",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& q, const Matrix& key_up,
         const Matrix& value_up, const ArrayOf<int32_t>& block_table, const ArrayOf<int32_t>& sequence,
         const ArrayOf<int32_t>& order, float scale, const OutArrayOf<float>& out,
         const std::optional<ArrayOf<int32_t>>& sees_until, const std::optional<ArrayOf<int32_t>>& chosen) {
        require_range("layer", layer, 0, kv.num_layers() - 1);
        const KvShape& shape = kv.shape(layer);
        require_kind(shape, KvShape::Kind::latent);
        AttentionBatch batch = {};
        batch.q = read_array("q", q, {kAnySize, kAnySize, kAnySize});
        batch.num_tokens = int64_t(q.shape(0));
        batch.num_heads = int64_t(q.shape(1));
        const LatentHeads heads = view_latent_heads(key_up.view, value_up.view, batch.num_heads,
                                                    int64_t(q.shape(2)) - key_up.view.cols, scale);
        require_size("kv_rank + rope_dim", heads.vector_dim(), shape.head_dim);
        batch.block_table = read_array("block_table", block_table, {kAnySize, kAnySize});
        batch.max_blocks = int64_t(block_table.shape(1));
        batch.sequence = read_array("sequence", sequence, {batch.num_tokens});
        batch.order = read_array("order", order, {batch.num_tokens});
        if (sees_until) batch.sees_until = read_array("sees_until", *sees_until, {batch.num_tokens});
        float* to = write_array("out", out, {batch.num_tokens, batch.num_heads * heads.value_dim});
        require_blocks(kv, kv.num_blocks_of(layer), batch, int64_t(block_table.shape(0)));
        ChosenPositions positions;
        if (chosen) {
          positions = {read_array("chosen", *chosen, {batch.num_tokens, kAnySize}),
                       int64_t(chosen->shape(1))};
          require_range("positions to choose", positions.count, 1, INT32_MAX);
          for (int64_t t = 0; t < batch.num_tokens; ++t) {
            if (!positions.limits(batch, t)) continue;
            require_ids("chosen", positions.positions + t * positions.count, positions.count, batch.until(t));
          }
        }
        nb::gil_scoped_release released;
        latent_attention(runtime, kv.latent_layer(layer), heads, batch, positions, to);
      },
      "runtime"_a, "kv"_a, "layer"_a, "q"_a, "key_up"_a, "value_up"_a, "block_table"_a, "sequence"_a,
      "order"_a, "scale"_a, "out"_a.noconvert(), "sees_until"_a.none() = nb::none(),
      "chosen"_a.none() = nb::none(), R"(
    Multi-head latent attention (arXiv:2405.04434) in its absorbed form, over vectors that all heads share.

    Args:
        q: [tokens, heads, nope_dim + rope_dim], with the last rope_dim dimensions rotated.
        key_up: [heads * kv_rank, nope_dim]. For each head, maps a query from nope_dim to kv_rank dimensions.
        value_up: [heads * value_dim, kv_rank]. For each head, maps the weighted sum of latent vectors to its result.
        block_table, sequence, order, sees_until: as for `attention`.
        out: [tokens, heads * value_dim].
        chosen: [tokens, count], the positions that a token sees which would see more than `count`.)");

  m.def(
      "index_write",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& keys,
         const ArrayOf<int64_t>& slots) {
        const LatentLayer index = require_index(kv, layer);
        const int64_t* at = read_array("slots", slots, {kAnySize});
        const int64_t num_tokens = int64_t(slots.shape(0));
        const float* from = read_array("keys", keys, {num_tokens, index.dim});
        require_slots(kv, kv.num_blocks_of(layer), at, num_tokens);
        nb::gil_scoped_release released;
        latent_write(runtime, index, from, at, num_tokens);
      },
      "runtime"_a, "kv"_a, "layer"_a, "keys"_a, "slots"_a,
      "Store the index keys [tokens, index_dim] of a layer.");

  m.def(
      "choose_positions",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& q, const ArrayOf<float>& weights,
         const ArrayOf<int32_t>& block_table, const ArrayOf<int32_t>& sequence, const ArrayOf<int32_t>& order,
         const OutArrayOf<int32_t>& chosen, const std::optional<ArrayOf<int32_t>>& sees_until) {
        const LatentLayer index = require_index(kv, layer);
        AttentionBatch batch = {};
        batch.q = read_array("q", q, {kAnySize, kAnySize, index.dim});
        batch.num_tokens = int64_t(q.shape(0));
        batch.num_heads = int64_t(q.shape(1));
        const float* by = read_array("weights", weights, {batch.num_tokens, batch.num_heads});
        batch.block_table = read_array("block_table", block_table, {kAnySize, kAnySize});
        batch.max_blocks = int64_t(block_table.shape(1));
        batch.sequence = read_array("sequence", sequence, {batch.num_tokens});
        batch.order = read_array("order", order, {batch.num_tokens});
        if (sees_until) batch.sees_until = read_array("sees_until", *sees_until, {batch.num_tokens});
        int32_t* to = write_array("chosen", chosen, {batch.num_tokens, kAnySize});
        const int64_t count = int64_t(chosen.shape(1));
        require_range("positions to choose", count, 1, INT32_MAX);
        require_blocks(kv, kv.num_blocks_of(layer), batch, int64_t(block_table.shape(0)));
        nb::gil_scoped_release released;
        choose_positions(runtime, index, by, batch, count, to);
      },
      "runtime"_a, "kv"_a, "layer"_a, "q"_a, "weights"_a, "block_table"_a, "sequence"_a, "order"_a,
      "chosen"_a.noconvert(), "sees_until"_a.none() = nb::none(), R"(
    Choose the positions of each token that sees more than `count` (native/ops/latent_index.h).

    Args:
        q: [tokens, heads, index_dim].   weights: [tokens, heads].
        block_table, sequence, order, sees_until: as for `attention`.
        chosen: [tokens, count]; rows of tokens that see all their positions do not change.)");

  m.def(
      "block_attention",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& q, const ArrayOf<float>& index_q,
         const ArrayOf<int32_t>& block_table, const ArrayOf<int32_t>& sequence, const ArrayOf<int32_t>& order,
         int64_t block_size, int64_t num_local, float scale, const OutArrayOf<int32_t>& chosen,
         const OutArrayOf<float>& out) {
        const LatentLayer index = require_index(kv, layer);
        require_range("block_size", block_size, 1, kMostIndexBlock);
        if (block_size % kv.block_tokens())
          throw std::invalid_argument("block_size: whole KV blocks are chosen");
        require_range("num_local", num_local, 1, int64_t(chosen.ndim() == 3 ? chosen.shape(2) : 1));
        const KvShape& shape = kv.shape(layer);
        require_kind(shape, KvShape::Kind::keys_values);
        AttentionBatch batch = {};
        batch.q = read_array("q", q, {kAnySize, kAnySize, shape.head_dim});
        batch.num_tokens = int64_t(q.shape(0));
        batch.num_heads = int64_t(q.shape(1));
        batch.scale = scale;
        batch.block_table = read_array("block_table", block_table, {kAnySize, kAnySize});
        batch.max_blocks = int64_t(block_table.shape(1));
        batch.sequence = read_array("sequence", sequence, {batch.num_tokens});
        batch.order = read_array("order", order, {batch.num_tokens});
        AttentionBatch index_batch = batch;
        index_batch.q = read_array("index_q", index_q, {batch.num_tokens, shape.kv_heads, index.dim});
        index_batch.num_heads = shape.kv_heads;
        int32_t* blocks = write_array("chosen", chosen, {batch.num_tokens, shape.kv_heads, kAnySize});
        batch.chosen = {blocks, int64_t(chosen.shape(2)), block_size};
        float* to = write_array("out", out, {batch.num_tokens, batch.num_heads * shape.value_dim});
        require_blocks(kv, kv.num_blocks_of(layer), batch, int64_t(block_table.shape(0)));
        nb::gil_scoped_release released;
        choose_blocks(runtime, index, index_batch, batch.chosen, num_local, blocks);
        attention(runtime, kv.layer(layer), batch, to);
      },
      "runtime"_a, "kv"_a, "layer"_a, "q"_a, "index_q"_a, "block_table"_a, "sequence"_a, "order"_a,
      "block_size"_a, "num_local"_a, "scale"_a, "chosen"_a.noconvert(), "out"_a.noconvert(), R"(
    Choose blocks for each token and KV head, and attend to them (native/ops/latent_index.h).

    Args:
        q, block_table, sequence, order, scale, out: as for `attention`.
        index_q: [tokens, kv_heads, index_dim].
        chosen: [tokens, kv_heads, blocks]; rows of tokens that see all their blocks do not change.)");

  m.def(
      "joint_attention",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& q,
         const ArrayOf<int32_t>& block_table, const ArrayOf<int32_t>& sequence, const ArrayOf<int32_t>& order,
         const ArrayOf<int32_t>& chosen, int64_t size, float scale,
         const std::optional<ArrayOf<float>>& sinks, const OutArrayOf<float>& out) {
        require_range("layer", layer, 0, kv.num_layers() - 1);
        require_range("size", size, 1, kLargestSize);
        const KvShape& shape = kv.shape(layer);
        require_kind(shape, KvShape::Kind::keys_values);
        AttentionBatch batch = {};
        batch.q = read_array("q", q, {kAnySize, kAnySize, shape.head_dim});
        batch.num_tokens = int64_t(q.shape(0));
        batch.num_heads = int64_t(q.shape(1));
        batch.scale = scale;
        if (sinks) batch.sinks = read_array("sinks", *sinks, {batch.num_heads});
        batch.block_table = read_array("block_table", block_table, {kAnySize, kAnySize});
        batch.max_blocks = int64_t(block_table.shape(1));
        batch.sequence = read_array("sequence", sequence, {batch.num_tokens});
        batch.order = read_array("order", order, {batch.num_tokens});
        batch.chosen = {read_array("chosen", chosen, {batch.num_tokens, kAnySize}), int64_t(chosen.shape(1)),
                        size, true};
        float* to = write_array("out", out, {batch.num_tokens, batch.num_heads * shape.value_dim});
        require_blocks(kv, kv.num_blocks_of(layer), batch, int64_t(block_table.shape(0)));
        for (int64_t token = 0; token < batch.num_tokens; ++token) {
          const int32_t* blocks = batch.chosen.blocks + token * batch.chosen.count;
          for (int64_t i = 0; batch.chosen.limits(batch.order[token]) && i < batch.chosen.count; ++i)
            require_range("a chosen block", blocks[i], 0, (batch.order[token] + 1) / size - 1);
        }
        nb::gil_scoped_release released;
        attention(runtime, kv.layer(layer), batch, to);
      },
      "runtime"_a, "kv"_a, "layer"_a, "q"_a, "block_table"_a, "sequence"_a, "order"_a, "chosen"_a, "size"_a,
      "scale"_a, "sinks"_a.none(), "out"_a.noconvert(), R"(
    Attend to blocks of `size` positions that all KV heads share, and to the unfinished block (native/ops/attention.h).

    Args:
        q, block_table, sequence, order, scale, sinks, out: as for `attention`.
        chosen: [tokens, blocks], ascending; rows of tokens that see no more whole blocks are not read.)");
}

// runs [num_runs][3]: begin, end, slot.
std::vector<StateRun> read_runs(const RecurrentState& state, const ArrayOf<int64_t>& runs,
                                int64_t num_tokens) {
  const int64_t* from = read_array("runs", runs, {kAnySize, 3});
  std::vector<StateRun> found;
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

// After the last layer, the slots are at the end of their runs.
void move_on(RecurrentState& state, int64_t layer, const std::vector<StateRun>& runs) {
  if (layer + 1 < state.num_layers()) return;
  for (const StateRun& run : runs)
    state.set_position(run.slot, state.position(run.slot) + run.end - run.begin);
}

void run_gated_delta(Runtime& runtime, RecurrentState& state, int64_t layer, const OutArrayOf<float>& qkv,
                     const ArrayOf<float>& z, const OutArrayOf<float>& b, const OutArrayOf<float>& a,
                     const ArrayOf<int64_t>& runs, const ArrayOf<float>& conv, const ArrayOf<float>& rate,
                     const ArrayOf<float>& dt_bias, const ArrayOf<float>& norm, float eps,
                     const DeltaSizes& sizes, bool is_tiled, const OutArrayOf<float>& out,
                     std::optional<float> floor) {
  const DeltaShape shape = delta_shape(sizes);
  const int64_t heads = shape.num_value_heads;
  require_range("layer", layer, 0, state.num_layers() - 1);
  if (shape.state() != state.shape(layer)) refuse("the layer of the state has other sizes");
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
  const int64_t dims = floor ? shape.key_dim : 1;  // decays of a head
  inputs.a = write_array("a", a, {num_tokens, heads * dims});
  inputs.a_stride = heads * dims;
  inputs.b_stride = heads;
  inputs.b_group = heads / shape.num_key_heads;
  inputs.a_group = inputs.b_group * dims;
  const int64_t rows = floor ? 1 : shape.conv_width, part = shape.key_channels() * shape.conv_width / rows;
  const float* channels = read_array("conv", conv, {rows, shape.conv_width / rows * shape.conv_channels()});
  const DeltaWeights weights = {
      .conv = {channels, channels + part, channels + 2 * part},
      .has_joined_conv = !floor,
      .rate = read_array("rate", rate, {heads}),
      .dt_bias = read_array("dt_bias", dt_bias, {heads * dims}),
      .norm = read_array("norm", norm, {shape.value_dim}),
      .eps = eps,
      .is_tiled = is_tiled,
      .has_sigmoid_gate = floor.has_value(),
      .has_channel_decay = floor.has_value(),
      .floor = floor.value_or(0.0f),
  };
  float* to = write_array("out", out, {num_tokens, shape.value_channels()});
  const std::vector<StateRun> found = read_runs(state, runs, num_tokens);
  {
    nb::gil_scoped_release released;
    gated_delta(runtime, state, layer, shape, weights, inputs, found, to);
  }
  move_on(state, layer, found);
}

void run_lightning_attention(Runtime& runtime, RecurrentState& state, int64_t layer, const ArrayOf<float>& q,
                             const ArrayOf<float>& k, const ArrayOf<float>& v, const ArrayOf<int64_t>& runs,
                             const ArrayOf<float>& decay, float scale, const OutArrayOf<float>& out) {
  require_range("layer", layer, 0, state.num_layers() - 1);
  const float* decays = read_array("decay", decay, {kAnySize});
  const int64_t heads = int64_t(decay.shape(0));
  float* to = write_array("out", out, {kAnySize, kAnySize});
  const int64_t num_tokens = int64_t(out.shape(0)), channels = int64_t(out.shape(1));
  require_range("heads", heads, 1, channels);
  const int64_t dim = channels / heads;
  const DeltaShape shape = {heads, heads, dim, dim, 1};
  if (shape.state() != state.shape(layer)) refuse("the layer of the state has other sizes");
  const LightningInputs inputs = {read_array("q", q, {num_tokens, channels}),
                                  read_array("k", k, {num_tokens, channels}),
                                  read_array("v", v, {num_tokens, channels}), channels, dim};
  const std::vector<StateRun> found = read_runs(state, runs, num_tokens);
  {
    nb::gil_scoped_release released;
    lightning_attention(runtime, state, layer, shape, decays, scale, inputs, found, to);
  }
  move_on(state, layer, found);
}

void run_causal_conv(Runtime& runtime, RecurrentState& state, int64_t layer, const ArrayOf<float>& x,
                     const std::optional<ArrayOf<float>>& in_gate,
                     const std::optional<ArrayOf<float>>& out_gate, const ArrayOf<int64_t>& runs,
                     const ArrayOf<float>& weights, const std::optional<ArrayOf<float>>& bias,
                     const OutArrayOf<float>& out) {
  require_range("layer", layer, 0, state.num_layers() - 1);
  if (in_gate.has_value() != out_gate.has_value()) refuse("in_gate and out_gate must be given together");
  ConvInputs inputs = {};
  inputs.x = read_array("x", x, {kAnySize, kAnySize});
  const int64_t num_tokens = int64_t(x.shape(0)), channels = inputs.stride = int64_t(x.shape(1));
  if (in_gate) inputs.in_gate = read_array("in_gate", *in_gate, {num_tokens, channels});
  if (out_gate) inputs.out_gate = read_array("out_gate", *out_gate, {num_tokens, channels});
  CausalConv conv = {};
  conv.channels = channels;
  conv.weights = read_array("weights", weights, {kAnySize, channels});
  conv.width = int64_t(weights.shape(0));
  if (bias) conv.bias = read_array("bias", *bias, {channels});
  if (CausalConv::window_floats(channels, conv.width) != state.shape(layer).window_floats)
    refuse("the layer of the state has other sizes");
  float* to = write_array("out", out, {num_tokens, channels});
  const std::vector<StateRun> found = read_runs(state, runs, num_tokens);
  {
    nb::gil_scoped_release released;
    causal_conv(runtime, state, layer, conv, inputs, found, {to, channels});
  }
  move_on(state, layer, found);
}

void run_mamba(Runtime& runtime, RecurrentState& state, int64_t layer, const OutArrayOf<float>& projected,
               const ArrayOf<int64_t>& runs, const ArrayOf<float>& conv,
               const std::optional<ArrayOf<float>>& conv_bias, const ArrayOf<float>& rate,
               const ArrayOf<float>& dt_bias, const ArrayOf<float>& skip, const ArrayOf<float>& norm,
               float eps, const MambaSizes& sizes, std::tuple<float, float> dt_limit,
               const OutArrayOf<float>& out) {
  const MambaShape shape = mamba_shape(sizes);
  require_range("layer", layer, 0, state.num_layers() - 1);
  if (shape.state() != state.shape(layer)) refuse("the layer of the state has other sizes");
  float* from = write_array("projected", projected, {kAnySize, shape.projected()});
  const int64_t num_tokens = int64_t(projected.shape(0)), heads = shape.num_heads;
  const MambaWeights weights = {
      .conv = read_array("conv", conv, {shape.conv_width, shape.conv_channels()}),
      .conv_bias = conv_bias ? read_array("conv_bias", *conv_bias, {shape.conv_channels()}) : nullptr,
      .rate = read_array("rate", rate, {heads}),
      .dt_bias = read_array("dt_bias", dt_bias, {heads}),
      .skip = read_array("skip", skip, {heads}),
      .norm = read_array("norm", norm, {shape.channels()}),
      .eps = eps,
      .least_dt = std::get<0>(dt_limit),
      .most_dt = std::get<1>(dt_limit),
  };
  float* to = write_array("out", out, {num_tokens, shape.channels()});
  const std::vector<StateRun> found = read_runs(state, runs, num_tokens);
  std::vector<float> decay(size_t(num_tokens * heads));
  {
    nb::gil_scoped_release released;
    mamba(runtime, state, layer, shape, weights, from, decay.data(), found, to);
  }
  move_on(state, layer, found);
}

int64_t run_pool(Runtime& runtime, RecurrentState& state, int64_t layer, const ArrayOf<float>& vectors,
                 const std::optional<ArrayOf<float>>& gates, const std::optional<ArrayOf<float>>& bias,
                 const ArrayOf<int64_t>& runs, const PoolSizes& sizes, const OutArrayOf<float>& out,
                 const OutArrayOf<float>& begins) {
  const PoolShape shape = pool_shape(sizes);
  require_range("layer", layer, 0, state.num_layers() - 1);
  require_size("floats of the layer's state", state.shape(layer).matrix_floats, shape.state_floats());
  const float* from = read_array("vectors", vectors, {kAnySize, shape.columns()});
  const int64_t num_tokens = int64_t(vectors.shape(0));
  const PoolInputs inputs = {
      from, gates ? read_array("gates", *gates, {num_tokens, shape.columns()}) : nullptr, shape.columns(),
      bias ? read_array("bias", *bias, {shape.ratio, shape.columns()}) : nullptr};
  const std::vector<StateRun> found = read_runs(state, runs, num_tokens);
  std::vector<int32_t> order(static_cast<size_t>(num_tokens));
  for (const StateRun& run : found) {
    for (int64_t t = run.begin; t < run.end; ++t)
      order[size_t(t)] = int32_t(state.position(run.slot) + t - run.begin);
  }
  PoolEntries entries = {write_array("out", out, {num_tokens, shape.dim}),
                         write_array("begins", begins, {shape.kMostAxes * num_tokens}),
                         {}};
  {
    nb::gil_scoped_release released;
    pool_tokens(runtime, &state, layer, 0, shape, inputs, found, {order.data(), nullptr, num_tokens, 1},
                entries);
  }
  move_on(state, layer, found);
  return entries.count();
}

}  // namespace
}  // namespace argosy

NB_MODULE(_native_testing, m) {
  using namespace argosy;
  m.doc() = "What only tests and benchmarks call of the native module.";
  nb::module_::import_("argosy._native");  // its classes
  bind_file_systems(m);
  bind_reads(m);
  bind_layer(m);
  bind_experts(m);
  bind_latent_attention(m);
  m.def("gated_delta", &run_gated_delta, "runtime"_a, "state"_a, "layer"_a, "qkv"_a.noconvert(), "z"_a,
        "b"_a.noconvert(), "a"_a.noconvert(), "runs"_a, nb::kw_only(), "conv"_a, "rate"_a, "dt_bias"_a,
        "norm"_a, "eps"_a, "sizes"_a, "is_tiled"_a, "out"_a.noconvert(), "floor"_a = nb::none(), R"(
    A gated delta net (native/kernels/gated_delta.h) after its projections; overwrites qkv, b and a.

    With a floor, Kimi Delta Attention: each key dimension has a value of `a` and of dt_bias, and conv is one row, the
    [width, channels] of q, of k and of v.

    After the last layer, the slots are at the end of their runs.

    Args:
        layer: the layer of the state.
        qkv: [tokens, channels], q of all key heads, then k, then v.   z: [tokens, value heads * value dim].
        b, a: [tokens, value heads].
        runs: [runs, 3], first and end token of each sequence, and its slot.
        conv: [width, channels].   rate, dt_bias: [value heads].   norm: [value dim].
        is_tiled: value head i uses key head i modulo key heads, instead of i // (value heads per key head).
        out: [tokens, value heads * value dim].)");
  m.def("lightning_attention", &run_lightning_attention, "runtime"_a, "state"_a, "layer"_a, "q"_a, "k"_a,
        "v"_a, "runs"_a, nb::kw_only(), "decay"_a, "scale"_a, "out"_a.noconvert(), R"(
    Lightning attention (native/kernels/gated_delta.h) between its norms.

    Args:
        q, k, v, out: [tokens, heads * head dim].   decay: [heads].   runs: as for `gated_delta`.)");
  m.def("causal_conv", &run_causal_conv, "runtime"_a, "state"_a, "layer"_a, "x"_a, "in_gate"_a.none(),
        "out_gate"_a.none(), "runs"_a, nb::kw_only(), "weights"_a, "bias"_a.none() = nb::none(),
        "out"_a.noconvert(), R"(
    silu(conv(x)), or with gates out_gate * conv(in_gate * x) (native/kernels/causal_conv.h).

    Args:
        x, in_gate, out_gate, out: [tokens, channels]; both gates or none.
        runs: as for `gated_delta`.   weights: [width, channels].   bias: [channels].)");
  m.def("pool", &run_pool, "runtime"_a, "state"_a, "layer"_a, "vectors"_a, "gates"_a.none(), "bias"_a.none(),
        "runs"_a, nb::kw_only(), "sizes"_a, "out"_a.noconvert(), "begins"_a.noconvert(), R"(
    Gather tokens in groups (native/ops/pool.h); return how many entries they completed. Runs cover all tokens.

    Args:
        vectors, gates: [tokens, columns].   bias: [ratio, columns].   runs: as for `gated_delta`.
        out: [tokens, dim]; the first rows become the entries.
        begins: [3 * tokens]; the first elements become the positions at which the groups of entries begin.)");
  m.def("mamba_recurrence", &run_mamba, "runtime"_a, "state"_a, "layer"_a, "projected"_a.noconvert(),
        "runs"_a, nb::kw_only(), "conv"_a, "conv_bias"_a.none() = nb::none(), "rate"_a, "dt_bias"_a, "skip"_a,
        "norm"_a, "eps"_a, "sizes"_a, "dt_limit"_a, "out"_a.noconvert(), R"(
    A Mamba-2 mixer (native/ops/mamba.h) between its projections; overwrites `projected` [tokens, z, x, B, C, dt].

    Args:
        runs: as for `gated_delta`.   out: [tokens, heads * head dim].   The others are those of `mamba`.)");
}
