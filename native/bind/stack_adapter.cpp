// stack_adapter.cpp: binds what an adapter changes in the layers of a Stack.
#include "bind/stack_adapter.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <string>
#include <tuple>

#include "bind/bind.h"
#include "bind/matrix.h"

namespace argosy {

using namespace nb::literals;

namespace {

using PairOfMatrices = Named<std::tuple<const Matrix*, const Matrix*, float, const Matrix*>,
                             "tuple[Matrix, Matrix, float, Matrix | None]">;  // down, up, scale, factors

void require_floats(const std::string& name, const Matrix& matrix) {
  const Format format = matrix.view.format;
  if (format != Format::f32 && format != Format::f16 && format != Format::bf16)
    refuse(name + " is " + format_name(format) + ", expected f32, f16 or bf16");
  if (matrix.memory.hold == nullptr) refuse(name + " does not lie in an Arena");
}

// [1, count], or with `is_of_rows` [count, 1]
const float* read_factors(StackAdapter& adapter, const Matrix& matrix, int64_t count,
                          bool is_of_rows = false) {
  const MatrixView& view = matrix.view;
  if (view.format != Format::f32) refuse("factors are " + format_name(view.format) + ", expected f32");
  if (matrix.memory.hold == nullptr) refuse("factors do not lie in an Arena");
  if (reinterpret_cast<uintptr_t>(view.data) % alignof(float) != 0) refuse("factors are not aligned");
  require_size("rows of factors", view.rows, is_of_rows ? count : 1);
  require_size("columns of factors", view.cols, is_of_rows ? 1 : count);
  adapter.hold.push_back(matrix.memory.hold);
  return reinterpret_cast<const float*>(view.data);
}

// down [num_down * rank, cols], up [num_up * rank, rows], factors [1, num_factors]
LowRank read_pair(StackAdapter& adapter, const PairOfMatrices& given, int64_t cols, int64_t rows,
                  int64_t num_factors, int64_t num_down = 1, int64_t num_up = 1) {
  const auto& [given_down, given_up, scale, factors] = given.base();
  const Matrix &down = require_item("down", given_down), &up = require_item("up", given_up);
  require_floats("down", down);
  require_floats("up", up);
  if (down.view.format != up.view.format) refuse("down and up have different formats");
  const int64_t rank = down.view.rows / num_down;
  require_range("the rank of a pair", rank, 1, kMostRank);
  require_size("rows of down", down.view.rows, num_down * rank);
  require_size("rows of up", up.view.rows, num_up * rank);
  require_size("columns of down", down.view.cols, cols);
  require_size("columns of up", up.view.cols, rows);
  adapter.hold.push_back(down.memory.hold);
  adapter.hold.push_back(up.memory.hold);
  return {down.view.format,
          down.view.data,
          up.view.data,
          rank,
          scale,
          factors == nullptr ? nullptr : read_factors(adapter, *factors, num_factors)};
}

MatrixView read_replacement(StackAdapter& adapter, const MatrixView& base, const Matrix& matrix) {
  require_floats("a replacement", matrix);
  require_size("rows of a replacement", matrix.view.rows, base.rows);
  require_size("columns of a replacement", matrix.view.cols, base.cols);
  adapter.hold.push_back(matrix.memory.hold);
  return matrix.view;
}

void add_pair(BoundStackAdapter& self, const Matrix& base, const PairOfMatrices& pair, int64_t row_begin) {
  const int64_t num_rows = require_item("up", std::get<1>(pair.base())).view.cols;
  require_range("row_begin", row_begin, 0, base.view.rows - num_rows);
  const LowRank read = read_pair(*self.adapter, pair, base.view.cols, num_rows, num_rows);
  self.adapter->products[base.view.data].pairs.push_back({read, row_begin, num_rows});
}

void add_network(BoundStackAdapter& self, const Matrix& up_base, const std::optional<PairOfMatrices>& gate,
                 const std::optional<PairOfMatrices>& up, const std::optional<PairOfMatrices>& down) {
  const int64_t hidden = up_base.view.cols, width = up_base.view.rows;
  ExpertPairs pairs;
  if (gate) pairs.gate = read_pair(*self.adapter, *gate, hidden, width, width);
  if (up) pairs.up = read_pair(*self.adapter, *up, hidden, width, width);
  if (down) pairs.down = read_pair(*self.adapter, *down, width, hidden, hidden);
  require_range("the ranks of a network", pairs.gate.rank + pairs.up.rank + pairs.down.rank, 0,
                self.adapter->ranks);
  self.adapter->networks[up_base.view.data] = pairs;
}

void add_latent(BoundStackAdapter& self, const Matrix& key_base, const Matrix& value_base, int64_t num_heads,
                const std::optional<PairOfMatrices>& key, const std::optional<PairOfMatrices>& value) {
  const LatentHeads heads = view_latent_heads(key_base.view, value_base.view, num_heads, 0, 1);
  LatentPairs pairs;
  if (key)
    pairs.key =
        read_pair(*self.adapter, *key, heads.nope_dim, heads.kv_rank, num_heads * heads.nope_dim, num_heads);
  if (value)
    pairs.value = read_pair(*self.adapter, *value, heads.kv_rank, heads.value_dim,
                            num_heads * heads.value_dim, 1, num_heads);
  self.adapter->latents[key_base.view.data] = pairs;
}

}  // namespace

void bind_stack_adapter(nb::module_& m) {
  nb::class_<BoundStackAdapter>(m, "StackAdapter", R"(
    What an adapter changes in a Stack (native/ops/stack_adapter.h): pairs of down, up and scale, in f32, f16 or bf16,
    and factors in f32.

    All matrices lie in arenas, which it keeps alive; `base` is a matrix of the stack. A pair adds
    `scale * up^T (down x)` to a product, and then multiplies its rows by `factors` [1, rows], unless these are None.
    `Stack.set_adapter` uses what has been added by then.

    Args:
        ranks: the most that the ranks of gate, up and down of a dense network, or of any expert, add up to.)")
      .def(
          "__init__",
          [](BoundStackAdapter* self, int64_t ranks) {
            require_range("ranks", ranks, 0, 3 * kMostRank);
            new (self) BoundStackAdapter();
            self->adapter->ranks = ranks;
          },
          "ranks"_a = 0)
      .def("add_pair", &add_pair, "base"_a, "pair"_a, "row_begin"_a = 0, R"(
        Add a pair to the product with `base`, from row `row_begin` on: down [rank, columns], up [rank, rows].)")
      .def("add_network", &add_network, "up_base"_a, "gate"_a.none(), "up"_a.none(), "down"_a.none(), R"(
        Add pairs to the dense network or shared expert with this `up`. None means no pair.)")
      .def("add_latent", &add_latent, "key_base"_a, "value_base"_a, "num_heads"_a, "key"_a.none(),
           "value"_a.none(), R"(
        Add pairs to the absorbed matrices of latent attention.

        Args:
            key_base, value_base: k_up [heads * kv_rank, nope_dim], v_up [heads * value_dim, kv_rank].
            key: down [heads * rank, nope_dim], up [rank, kv_rank].
            value: down [rank, kv_rank], up [heads * rank, value_dim].

        Factors are [1, heads * nope_dim] and [1, heads * value_dim].)")
      .def(
          "add_embedding",
          [](BoundStackAdapter& self, const Matrix& base, const PairOfMatrices& pair) {
            StackAdapter& adapter = *self.adapter;
            const auto& [rows, up, scale, factors] = pair.base();
            const Matrix& table = require_item("rows", rows);
            require_floats("rows", table);
            require_size("rows of rows", table.view.rows, base.view.rows);
            // `rows` [vocabulary, rank] is looked up by token id; the `down` of a product is [rank, columns].
            const Matrix& given = require_item("up", up);
            require_floats("up", given);
            require_range("the rank of a pair", table.view.cols, 1, kMostRank);
            require_size("rows of up", given.view.rows, table.view.cols);
            require_size("columns of up", given.view.cols, base.view.cols);
            if (table.view.format != given.view.format) refuse("rows and up have different formats");
            adapter.hold.push_back(table.memory.hold);
            adapter.hold.push_back(given.memory.hold);
            adapter.embedding = {table.view.format, table.view.data, given.view.data, table.view.cols, scale};
            adapter.token_factors = nullptr;
            if (factors == nullptr) return;
            if (factors->view.rows == 1) {
              adapter.embedding.factors = read_factors(adapter, *factors, base.view.cols);
            } else {
              adapter.token_factors = read_factors(adapter, *factors, base.view.rows, true);
            }
          },
          "base"_a, "pair"_a, R"(
        Add `scale * rows[id] up` to the embedding of a token, before the model's factor: rows [vocabulary, rank], up
        [rank, hidden], factors [1, hidden], or [vocabulary, 1] of tokens.)")
      .def(
          "replace",
          [](BoundStackAdapter& self, const Matrix& base, const Matrix& matrix) {
            self.adapter->products[base.view.data].replacement =
                read_replacement(*self.adapter, base.view, matrix);
          },
          "base"_a, "matrix"_a,
          "Multiply by this matrix instead of `base`, of the same shape, before pairs are added.")
      .def(
          "replace_embedding",
          [](BoundStackAdapter& self, const Matrix& base, const Matrix& matrix) {
            self.adapter->replaced_embedding = read_replacement(*self.adapter, base.view, matrix);
          },
          "base"_a, "matrix"_a, "Embed by this matrix instead of `base`, of the same shape.")
      .def_prop_ro_static(
          "scratch_bytes", [](nb::handle) { return adapter_scratch_bytes(); },
          "The most scratch memory that all adapters of a stack take together.");

  m.def(
      "merged_squares",
      [](const Matrix& matrix, int64_t first, const ArrayOf<float>& t, const ArrayOf<float>& vectors,
         const OutArrayOf<double>& out, bool of_columns) {
        const float* coefficients = read_array("t", t, {kAnySize, kAnySize});
        const int64_t num_rows = int64_t(t.shape(0)), rank = int64_t(t.shape(1));
        require_range("rows of t", num_rows, 0, matrix.view.rows);
        require_range("first", first, 0, matrix.view.rows - num_rows);
        const float* from = read_array("vectors", vectors, {rank, matrix.view.cols});
        double* to = write_array("out", out, {of_columns ? matrix.view.cols : num_rows});
        const nb::gil_scoped_release released;
        merged_squares(matrix.view, first, num_rows, coefficients, from, rank, of_columns ? nullptr : to,
                       of_columns ? to : nullptr);
      },
      "matrix"_a, "first"_a, "t"_a, "vectors"_a, "out"_a.noconvert(), "of_columns"_a = false, R"(
    Write the sums of squares of some rows of `matrix + t vectors`, or add those of their columns.

    Args:
        first: the row of `matrix` that t[0] belongs to.
        t, vectors: [rows, rank], [rank, columns].
        out: float64 [rows], or of columns [columns].)");
}

}  // namespace argosy
