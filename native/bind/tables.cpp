// tables.cpp: binds tables that stay on the drive, and the n-gram sublayer that reads them.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/layers.h"
#include "bind/reads.h"
#include "ops/table_rows.h"

namespace argosy {

using namespace nb::literals;

namespace {

using GivenSegment = std::tuple<int64_t, int, int64_t>;  // first row, file id, offset
using GivenPart = std::pair<std::optional<std::string>, std::vector<GivenSegment>>;
using BoundFault = std::tuple<std::string, std::optional<std::string>, std::vector<int64_t>>;

Table parse_table(const FormatName& format, int64_t num_rows, int64_t cols,
                  const std::vector<GivenPart>& parts) {
  Table table = {parse_format(format), num_rows, cols, {}};
  for (const auto& [block_type, segments] : parts) {
    TablePart part;
    if (block_type) {
      part.block_type = block_type_named(*block_type);
      if (!part.block_type) refuse("unknown block type '" + *block_type + "'");
    }
    for (const auto& [first_row, file_id, offset] : segments)
      part.segments.push_back({first_row, file_id, offset});
    table.parts.push_back(std::move(part));
  }
  return table;
}

BoundNgrams bind_ngrams(std::shared_ptr<TableRows> table, const Matrix& key, const Matrix& value,
                        const ArrayOf<float>& key_norm, const ArrayOf<float>& query_norm,
                        const std::optional<ArrayOf<float>>& conv,
                        const std::optional<ArrayOf<float>>& conv_norm, int64_t state_layer) {
  const int64_t channels = key.view.rows, hidden = value.view.rows;
  require_range("rows of value", hidden, 1, kLargestSize);
  require_size("rows of key modulo rows of value", channels % hidden, 0);
  require_size("columns of key", key.view.cols, value.view.cols);
  require_size("columns of value modulo columns of the table", value.view.cols % table->table().cols, 0);
  BoundNgrams bound;
  Kept& kept = bound.kept;
  kept.tables.push_back(table);
  bound.ngrams = {
      .table = table.get(),
      .key = kept.keep(key),
      .value = kept.keep(value),
      .key_norm = kept.keep("key_norm", key_norm, channels),
      .query_norm = kept.keep("query_norm", query_norm, channels),
      .state_layer = state_layer,
  };
  if (conv.has_value() != conv_norm.has_value()) refuse("conv and conv_norm belong together");
  if (conv) {
    read_array("conv", *conv, {kAnySize, channels});
    const int64_t width = int64_t(conv->shape(0));
    CausalConv::window_floats(channels, width);  // rejects sizes below 1 and products that overflow an int64
    bound.ngrams.conv_norm = kept.keep("conv_norm", *conv_norm, channels);
    bound.ngrams.conv = CausalConv{channels, width, kept.keep("conv", *conv, {width, channels}), nullptr};
  }
  return bound;
}

}  // namespace

void require_ngrams(const Ngrams& ngrams, const RecurrentState* recurrent, int64_t streams, int64_t hidden) {
  require_size("rows of value", ngrams.value.rows, hidden);
  require_size("rows of key", ngrams.key.rows, streams * hidden);
  if (!ngrams.conv) return;
  if (recurrent == nullptr) refuse("a convolution needs a recurrent state");
  require_range("state_layer", ngrams.state_layer, 0, recurrent->num_layers() - 1);
  const StateShape needed = {CausalConv::window_floats(ngrams.conv->channels, ngrams.conv->width), 0};
  if (!(recurrent->shape(ngrams.state_layer) == needed))
    refuse("layer " + std::to_string(ngrams.state_layer) + " of the recurrent state has another shape");
}

void bind_tables(nb::module_& m) {
  m.def(
      "table_rows_bytes",
      [](const FormatName& format, int64_t num_rows, int64_t cols, const std::vector<GivenPart>& parts,
         int64_t cache_bytes, int64_t most_rows) {
        return TableRows::bytes(parse_table(format, num_rows, cols, parts), cache_bytes, most_rows);
      },
      "format"_a, "num_rows"_a, "cols"_a, "parts"_a, "cache_bytes"_a, "most_rows"_a,
      "Bytes of memory of a TableRows.");

  nb::class_<TableRows>(m, "TableRows", R"(
    Rows of a table that stays on the drive, with a cache of those that were used last (native/ops/table_rows.h).

    Args:
        format: f32, f16 or bf16, or the slot format of every part.
        parts: the tensors with the bytes of a row: the block type, None for plain values, and segments of rows (first
            row, file of the store, offset of that row).
        cache_bytes: of cached rows and of what says which they are.
        most_rows: of one `begin`.)")
      .def(
          "__init__",
          [](TableRows* self, std::shared_ptr<Store> store, const FormatName& format, int64_t num_rows,
             int64_t cols, const std::vector<GivenPart>& parts, int64_t cache_bytes, int64_t most_rows) {
            new (self) TableRows(std::move(store), parse_table(format, num_rows, cols, parts), cache_bytes,
                                 most_rows);
          },
          "store"_a, "format"_a, "num_rows"_a, "cols"_a, "parts"_a, "cache_bytes"_a, "most_rows"_a)
      .def(
          "begin",
          [](TableRows& self, const ArrayOf<int64_t>& rows) {
            const int64_t* from = read_array("rows", rows, {kAnySize});
            const int64_t count = int64_t(rows.shape(0));
            for (int64_t i = 0; i < count; ++i)
              require_range(item_name("rows", size_t(i)), from[i], TableRows::kNoRow,
                            self.table().num_rows - 1);
            nb::gil_scoped_release released;
            self.begin(from, count);
          },
          "rows"_a, "Start to collect rows, whatever became of those of the last call; -1 is a row of zeros.")
      .def(
          "advance",
          [](TableRows& self, int64_t most_ms) {
            require_range("most_ms", most_ms, 0, 86'400'000);
            nb::gil_scoped_release released;
            return self.advance(std::chrono::milliseconds(most_ms));
          },
          "most_ms"_a, "Wait for the rows; return whether all of them are there, or have failed.")
      .def(
          "write",
          [](TableRows& self, Runtime& runtime, const OutArrayOf<float>& out) {
            float* to = write_array("out", out, {self.num_rows(), self.table().cols});
            if (self.fault()) refuse("rows are missing: " + self.fault()->message);
            nb::gil_scoped_release released;
            return self.write(runtime, to);
          },
          "runtime"_a, "out"_a.noconvert(),
          "Write float32 [rows, cols] after `advance` has returned True; return False for a `fault`.")
      .def_prop_ro(
          "fault",
          [](const TableRows& self) -> std::optional<BoundFault> {
            if (!self.fault()) return std::nullopt;
            const TableRows::Fault& fault = *self.fault();
            return BoundFault(fault.message, error_kind(fault.error), fault.indices);
          },
          "The error of reads that failed, its kind, and which rows of `begin` are missing; None: there is "
          "none.")
      .def_prop_ro(
          "stats",
          [](const TableRows& self) {
            const TableStats& stats = self.stats();
            return std::make_tuple(stats.asked, stats.found, stats.late, stats.read, stats.read_bytes);
          },
          "Rows asked for, found in the cache, and late; rows read, and the bytes of their pages.")
      .def_prop_ro("num_cached", &TableRows::num_cached, "Rows that the cache can hold.");

  nb::class_<BoundNgrams>(m, "Ngrams", "The n-gram sublayer of a layer; made by `ngrams`.");
  m.def("ngrams", &bind_ngrams, "table"_a, "key"_a, "value"_a, nb::kw_only(), "key_norm"_a, "query_norm"_a,
        "conv"_a.none() = nb::none(), "conv_norm"_a.none() = nb::none(), "state_layer"_a = 0, R"(
    Rows of a table, gated by the residual streams that they join (native/ops/ngrams.h).

    Args:
        key: [streams * hidden, width], where width is the values of the rows of a token.   value: [hidden, width].
        key_norm, query_norm, conv_norm: [streams * hidden].
        conv: [positions, streams * hidden], depthwise and causal, of the gated values; None means no convolution.
        state_layer: its layer of the recurrent state.)");
}

}  // namespace argosy
