// kernels.cpp: binds matrices, the KV cache and the operations on them.

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/matrix.h"
#include "bind/routing.h"
#include "kernels/kernel_table.h"
#include "kernels/kv_layer.h"
#include "kernels/matmul_args.h"
#include "kernels/route_args.h"
#include "ops/attention.h"
#include "ops/layer.h"
#include "ops/matmul.h"
#include "ops/swiglu.h"
#include "store/start_threads.h"

namespace argosy {

using namespace nb::literals;

namespace {

using NamedTunings = std::map<FormatName, NamedTuning>;

Tunings parse_tunings(const NamedTunings& named) {
  Tunings tunings = default_tunings();
  for (const auto& [format, tuning] : named) {
    if (!is_quantized(parse_format(format)) || is_grouped(parse_format(format)))
      refuse("format '" + format + "' has nothing to tune");
    tunings[size_t(parse_format(format))] = parse_tuning(tuning);
  }
  return tunings;
}

NamedTuning named_tuning(const Tuning& tuning) {
  return std::tuple(std::string(tuning.ask_ahead.name), std::string(tuning.few_ask_ahead.name),
                    tuning.two_panels_from, tuning.amx_from);
}

NamedTunings named_tunings(const Runtime& runtime) {
  NamedTunings named;
  for (int i = int(Format::q8); i < kFirstGrouped; ++i) {
    named[format_name(Format(i))] = named_tuning(runtime.tuning(Format(i)));
  }
  return named;
}

void bind_choice(nb::module_& m) {
  m.def(
      "instruction_sets",
      [] {
        const std::vector<std::string> names = instruction_sets();
        return std::vector<InstructionSetName>(names.begin(), names.end());
      },
      "The instruction sets that this CPU supports, worst first.");

  m.def(
      "product_scratch_bytes",
      [](int num_threads, const std::optional<std::string>& instruction_set) {
        require_range("num_threads", num_threads, 1, kMostThreads);
        return num_threads * kernels_named(instruction_set).product_scratch_bytes;
      },
      "num_threads"_a, "instruction_set"_a = nb::none(),
      "The most memory that products of a Runtime take besides its scratch.");

  m.def("amx_state", &amx_state,
        "absent: the CPU has no AMX, or not what kernels need; refused: the system lets this process use "
        "none; usable.");
  m.def(
      "amx_formats",
      [] {
        std::vector<FormatName> names;
        for (int i = 0; i < kNumFormats && best_kernels().has_tiles; ++i) {
          if (has_amx_product(Format(i))) names.push_back(format_name(Format(i)));
        }
        return names;
      },
      "Formats whose products can run on the tiles of AMX; none if the CPU or the system has no tiles.");

  m.def(
      "measured_as", [](const std::string& name) { return format_name(measured_as(parse_format(name))); },
      "format"_a, R"(
    The format that is measured in place of a format: for a grouped format, one of as many bits with the same
    arithmetic; any other is measured itself.)");

  m.def(
      "coded_formats",
      [] {
        std::vector<FormatName> names;
        for (int i = 0; i < kNumFormats; ++i) {
          if (is_coded(Format(i))) names.push_back(format_name(Format(i)));
        }
        return names;
      },
      "Formats whose products decode the weights before they multiply them.");

  m.attr("FEWEST_FOR_TWO_PANELS") = kFewestForTwoPanels;
  m.attr("MOST_FOR_ONE_PANEL") = kMostForOnePanel;
  m.def(
      "default_tuning", [] { return named_tuning(default_tuning()); },
      "How products run if nothing was measured.");

  nb::class_<Runtime>(m, "Runtime", R"(
    The kernels of one instruction set, a pool of threads, including the caller, and scratch memory.

    Args:
        num_threads: at most 1024.
        tunings: how products with the weights of each quantised format run (`product_probe` measures it); formats that
            are left out have `default_tuning()`. It does not affect results.
        instruction_set: one of `instruction_sets()`, for all operations of this runtime; None: the best one.

    Raises:
        RuntimeError: the system refuses to start a thread.)")
      .def(
          "__init__",
          [](Runtime* self, int num_threads, const std::optional<NamedTunings>& tunings,
             const std::optional<std::string>& instruction_set) {
            const KernelTable& kernels = kernels_named(instruction_set);
            new (self) Runtime(num_threads, parse_tunings(tunings.value_or(NamedTunings())), kernels);
          },
          "num_threads"_a, "tunings"_a = nb::none(), "instruction_set"_a = nb::none())
      .def_prop_ro("num_threads", &Runtime::num_threads)
      .def_prop_ro("tunings", &named_tunings)
      .def_prop_ro("instruction_set",
                   [](const Runtime& self) { return InstructionSetName(self.kernels().name); })
      .def_prop_ro("scratch_bytes", &Runtime::scratch_bytes)
      .def_prop_ro(
          "operations",
          [](const Runtime& runtime) {
            const Runtime::Operations found = runtime.operations();
            return std::tuple(found.in_tiles, found.all);
          },
          "Operations so far of products whose format can run on the tiles of AMX: on tiles, and all. (0, 0) "
          "without AMX.")
      .def_prop_ro("rounds", &Runtime::rounds,
                   "Whether `linear` may round to bfloat16: the CPU multiplies that faster than float32.")
      .def("close", &Runtime::close, nb::call_guard<nb::gil_scoped_release>(),
           "End the threads and free the scratch memory; later operations raise ValueError.");
}

void bind_matrix(nb::module_& m) {
  m.def(
      "matrix_bytes",
      [](const FormatName& format, int64_t rows, int64_t cols) {
        return checked_matrix_bytes(parse_format(format), rows, cols);
      },
      "format"_a, "rows"_a, "cols"_a, R"(
    Bytes of a matrix (layout: native/kernels/formats.h).

    Raises:
        ValueError: more than LARGEST_SIZE rows or columns.)");

  m.def(
      "f8_scales_bytes",
      [](int64_t cols) {
        require_range("cols", cols, 0, kLargestSize);
        return f8_scales_bytes(Format::f8, cols);
      },
      "cols"_a, "Bytes of the scales before each F8_BLOCK rows of codes of an f8 matrix.");

  m.attr("LARGEST_SIZE") = kLargestSize;
  m.attr("MATRIX_ALIGNMENT") = kMatrixAlignment;
  m.attr("PANEL_ROWS") = kPanelRows;
  m.attr("F8_BLOCK") = kF8Block;

  m.def(
      "quantize",
      [](const FormatName& format_name, const ArrayOf<float>& weights, const OutArrayOf<uint8_t>& out,
         Runtime* runtime) {
        const Format format = parse_format(format_name);
        if (is_f8(format) || format > Format::q4) {
          refuse("cannot quantise to " + format_name +
                 ", which only holds weights transcoded from a file; known: f32, f16, bf16, q8, q4");
        }
        const float* from = read_array("weights", weights, {kAnySize, kAnySize});
        const int64_t rows = int64_t(weights.shape(0));
        const int64_t cols = int64_t(weights.shape(1));
        uint8_t* to = write_array("out", out, {checked_matrix_bytes(format, rows, cols)});
        nb::gil_scoped_release released;
        quantize(runtime, format, from, rows, cols, to);
      },
      "format"_a, "weights"_a, "out"_a.noconvert(), "runtime"_a.none() = nb::none(), R"(
    Write weights [rows, cols] to `out` [matrix_bytes] as f32, f16, bf16, or q8 or q4 on the threads of `runtime`.

    The bytes are the same on every instruction set. q4 scales are the candidates with the least squared error. A
    group of 32 with an infinity or a NaN gets a NaN scale. The other formats can only come from a file.)");

  m.def(
      "transcode",
      [](const std::string& block_type, const ArrayOf<uint8_t>& data, int64_t rows, int64_t cols,
         int64_t interleaved,
         const std::optional<OutArrayOf<uint8_t>>& out) -> nb::typed<nb::object, View<uint8_t>> {
        const std::optional<BlockType> type = block_type_named(block_type);
        if (!type) refuse("unknown block type '" + block_type + "'; known: " + known_block_types());
        require_range("interleaved", interleaved, 1, kLargestSize);
        require_range("rows", rows, 0, kLargestSize / interleaved);
        const int64_t size = interleaved * checked_matrix_bytes(slot_format(*type), rows, cols);
        if (interleaved > 1 && !may_be_interleaved(*type)) {
          refuse(format_name(slot_format(*type)) + " matrices cannot be interleaved");
        }
        if (!has_whole_words(*type, rows)) {
          refuse("rows is " + std::to_string(rows) + ", but " + block_type + " holds whole words of rows");
        }
        if (!has_whole_blocks(*type, cols)) {
          refuse("cols is " + std::to_string(cols) + ", expected a multiple of " +
                 std::to_string(block_cols(*type)) + " for " + block_type);
        }
        const uint8_t* from = read_array("data", data, {source_bytes(*type, interleaved * rows, cols)});
        const auto fill = [&](uint8_t* matrix) {
          bool is_finite;
          {
            nb::gil_scoped_release released;
            is_finite =
                transcode(*type, from, rows, cols, interleaved, 0, num_strips(*type, rows, cols), matrix);
          }
          if (!is_finite) refuse(block_type + " data holds " + what_is_refused(*type));
        };
        if (out) {
          fill(write_array("out", *out, {size}));
          return nb::cast(*out);
        }
        auto matrix = std::make_unique<uint8_t[]>(size_t(size));
        fill(matrix.get());
        uint8_t* raw = matrix.release();
        const nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
        const size_t shape[1] = {size_t(size)};
        return nb::cast(View<uint8_t>(raw, 1, shape, owner));
      },
      "block_type"_a, "data"_a, "rows"_a, "cols"_a, "interleaved"_a = 1,
      "out"_a.noconvert().none() = nb::none(), R"(
    Convert the blocks of a matrix [rows, cols] to the bytes of its slot format, without loss.

    The bytes are the same on every instruction set.

    Q8_0 becomes q8, Q4_0 becomes q4, and GGUF's other types become the format with their name; cols is a multiple of
    their block size, 32, 64 or 256. Types with lower-case names, such as `int4_quants` and `f8_scales_64x128`
    (native/kernels/transcode.h), and parts of grouped formats, such as `uint4_128_f16:gptq_codes` (grouped_parts.h),
    write only their part of the matrix: into `out` [matrix_bytes], which is returned, or into new zeros.
    `interleaved` matrices with `rows` rows each, which alternate row by row in `data`, come out one after another.

    Raises:
        ValueError: the data holds what its type refuses: a code that is NaN, a scale that is no number or too
            large, a stored zero that programs disagree about, or columns whose groups are not in order.)");

  m.def(
      "put_in_act_order",
      [](const FormatName& format_name, const OutArrayOf<uint8_t>& matrix, int64_t rows, int64_t cols) {
        const Format format = parse_format(format_name);
        if (!has_act_order(format)) refuse(format_name + " has no act-order");
        uint8_t* data = write_array("matrix", matrix, {checked_matrix_bytes(format, rows, cols)});
        bool is_right;
        {
          nb::gil_scoped_release released;
          is_right = put_in_act_order(format, rows, cols, data);
        }
        if (!is_right) refuse("the matrix holds " + std::string(kWrongOrder));
      },
      "format"_a, "matrix"_a.noconvert(), "rows"_a, "cols"_a, R"(
    Complete a matrix of an `act_order` format after `transcode` has written all its parts; a Store does it itself.

    Raises:
        ValueError: g_idx names a group that the matrix does not have, or a group has more or fewer columns than the
            format says; `matrix` is undefined then.)");

  m.def(
      "dequantize",
      [](const FormatName& format_name, const ArrayOf<uint8_t>& data, int64_t rows, int64_t cols) {
        const Format format = parse_format(format_name);
        const uint8_t* from = read_array("data", data, {checked_matrix_bytes(format, rows, cols)});
        auto values = std::make_unique<float[]>(size_t(rows * cols));
        {
          nb::gil_scoped_release released;
          dequantize({format, from, rows, cols}, values.get());
        }
        float* raw = values.release();
        const nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<float*>(p); });
        const size_t shape[2] = {size_t(rows), size_t(cols)};
        return View<float>(raw, 2, shape, owner);
      },
      "format"_a, "data"_a, "rows"_a, "cols"_a,
      "The weights [rows, cols] as products use them, with the same bits on every instruction set.");

  nb::class_<Matrix>(m, "Matrix", R"(
    Weights inside an arena or a uint8 array, which it keeps alive. Any offset works; multiples of 64 are fastest.)")
      .def(
          "__init__",
          [](Matrix* self, MemoryObject owner, int64_t offset, const FormatName& format, int64_t rows,
             int64_t cols) {
            Memory memory = open_memory(std::move(owner));
            const MatrixView view =
                view_matrix("a matrix", memory.data, memory.nbytes, offset, parse_format(format), rows, cols);
            new (self) Matrix{std::move(memory), view};
          },
          "memory"_a, "offset"_a, "format"_a, "rows"_a, "cols"_a)
      .def_prop_ro("rows", [](const Matrix& self) { return self.view.rows; })
      .def_prop_ro("cols", [](const Matrix& self) { return self.view.cols; })
      .def_prop_ro("format", [](const Matrix& self) { return FormatName(format_name(self.view.format)); });

  m.def(
      "matmul",
      [](Runtime& runtime, const std::vector<const Matrix*>& matrices, const ArrayOf<float>& x,
         const std::vector<OutArrayOf<float>>& outs) {
        require_size("number of outs", int64_t(outs.size()), int64_t(matrices.size()));
        const float* from = read_array("x", x, {kAnySize, kAnySize});
        const int64_t num_tokens = int64_t(x.shape(0));
        std::vector<Product> products;
        for (size_t i = 0; i < outs.size(); ++i) {
          const MatrixView& view = require_item(item_name("matrices", i), matrices[i]).view;
          require_size("columns of x", int64_t(x.shape(1)), view.cols);
          products.push_back({view, write_array("out", outs[i], {num_tokens, view.rows})});
        }
        nb::gil_scoped_release released;
        matmul(runtime, products, from, num_tokens);
      },
      "runtime"_a, "matrices"_a, "x"_a, "outs"_a, R"(
    outs[i] = x matrices[i]^T, for x [tokens, cols] and outs[i] [tokens, rows of matrix i].

    With quantised weights, x is quantised per group of 32 to int8 (int16 with q8), once for all matrices.)");

  m.def(
      "embed",
      [](Runtime& runtime, const Matrix& matrix, const ArrayOf<int32_t>& ids, const OutArrayOf<float>& out) {
        const int32_t* rows = read_array("ids", ids, {kAnySize});
        const int64_t num_tokens = int64_t(ids.shape(0));
        float* to = write_array("out", out, {num_tokens, matrix.view.cols});
        require_ids("ids", rows, num_tokens, matrix.view.rows);
        nb::gil_scoped_release released;
        embed(runtime, matrix.view, rows, num_tokens, to);
      },
      "runtime"_a, "matrix"_a, "ids"_a, "out"_a.noconvert(), "out[t] = row ids[t] of the matrix.");
}

void bind_layer(nb::module_& m) {
  m.def(
      "rms_norm",
      [](Runtime& runtime, const ArrayOf<float>& x, const ArrayOf<float>& weight, float eps,
         const OutArrayOf<float>& out) {
        const float* from = read_array("x", x, {kAnySize, kAnySize});
        const int64_t rows = int64_t(x.shape(0));
        const int64_t cols = int64_t(x.shape(1));
        const float* by = read_array("weight", weight, {cols});
        float* to = write_array("out", out, {rows, cols});
        nb::gil_scoped_release released;
        rms_norm(runtime, from, by, eps, rows, cols, to);
      },
      "runtime"_a, "x"_a, "weight"_a, "eps"_a, "out"_a.noconvert(),
      "out[n] = x[n] / sqrt(mean(x[n]^2) + eps) * weight, for x [n, cols]; out may be x.");

  m.def(
      "rope",
      [](Runtime& runtime, const OutArrayOf<float>& x, const ArrayOf<float>& cosine,
         const ArrayOf<float>& sine, bool is_interleaved) {
        const Rows<float> values = write_rows("x", x, {kAnySize, kAnySize, kAnySize});
        const int64_t num_tokens = int64_t(x.shape(0));
        const float* c = read_array("cosine", cosine, {num_tokens, kAnySize});
        const int64_t num_pairs = int64_t(cosine.shape(1));
        const float* s = read_array("sine", sine, {num_tokens, num_pairs});
        const int64_t head_dim = int64_t(x.shape(2));
        require_range("rotated dimensions", 2 * num_pairs, 0, head_dim);
        nb::gil_scoped_release released;
        rope(runtime, values, num_tokens, int64_t(x.shape(1)), head_dim, c, s, num_pairs, is_interleaved);
      },
      "runtime"_a, "x"_a.noconvert(), "cosine"_a, "sine"_a, "is_interleaved"_a = false, R"(
    Rotate x [tokens, heads, head_dim] in place, by cosine and sine [tokens, pairs]. Rows of x may be strided.

    Dimension i is paired with i + pairs; if interleaved, dimension 2 i is paired with 2 i + 1. Dimensions from
    2 * pairs on do not change.)");

  nb::class_<Routing>(m, "Routing", R"(
    How a token's experts are chosen from its router logits (native/kernels/route.h).

    Scores are the softmax over all experts, or the sigmoid or sqrt(softplus) of each. The k best experts by score plus
    `choice_bias` are chosen from the best `kept_groups` of `num_groups` groups of equal size; a group is scored by its
    best expert, or by the sum of its best two. On a tie the lower id wins. Routing weights are the scores of the chosen
    experts, without the bias; with `renormalize`, divided by their sum plus `renormalize_eps`, or by
    `renormalize_least` if that is more; then multiplied by `scale`, and by the expert's own scale.

    Args:
        experts_per_token: k.
        choice_bias: [experts]; None means no bias.
        expert_scale: [experts]; None means 1 for each.
        media_bias: [experts], the `choice_bias` of tokens of media, which is their own choice where token ids decide
            for others; None means that theirs is the same.)")
      .def(
          "__init__",
          [](Routing* self, int64_t experts_per_token, const ScoreName& score,
             const std::optional<ArrayOf<float>>& choice_bias, int64_t num_groups, int64_t kept_groups,
             const GroupScoreName& group_score, bool renormalize, float renormalize_eps,
             float renormalize_least, float scale, const std::optional<ArrayOf<float>>& expert_scale,
             const std::optional<ArrayOf<float>>& media_bias) {
            new (self) Routing(make_routing(experts_per_token, score, choice_bias, num_groups, kept_groups,
                                            group_score, renormalize, renormalize_eps, renormalize_least,
                                            scale, expert_scale, media_bias));
          },
          "experts_per_token"_a, nb::kw_only(), "score"_a, "choice_bias"_a.none() = nb::none(),
          "num_groups"_a = 1, "kept_groups"_a = 1, "group_score"_a = "top2", "renormalize"_a,
          "renormalize_eps"_a = 0.0f, "renormalize_least"_a = 0.0f, "scale"_a = 1.0f,
          "expert_scale"_a.none() = nb::none(), "media_bias"_a.none() = nb::none());
}

void require_block(const char* name, const KvCache& kv, int64_t block, bool is_windowed = false) {
  require_range(name, block, 0, (is_windowed ? kv.num_window_blocks() : kv.num_blocks()) - 1);
}

using KvDtypeName = Named<std::string, "KvDtype">;

KvFormat parse_kv_format(const std::string& dtype) {
  if (dtype == "f32") return KvFormat::f32;
  if (dtype == "f16") return KvFormat::f16;
  if (dtype == "q8") return KvFormat::q8;
  refuse("unknown KV dtype '" + dtype + "'; known: f32, f16, q8");
}

void bind_attention(nb::module_& m) {
  nb::class_<KvShape>(m, "KvShape", "The data that a layer keeps per position in a KvCache.")
      .def_static(
          "keys_values",
          [](int64_t kv_heads, int64_t head_dim, bool is_windowed, std::optional<int64_t> value_dim,
             int64_t index_dim) {
            require_range("index_dim", index_dim, 0, kLargestSize);
            return KvShape::keys_values(kv_heads, head_dim, value_dim.value_or(head_dim), is_windowed,
                                        index_dim);
          },
          "kv_heads"_a, "head_dim"_a, "is_windowed"_a = false, "value_dim"_a.none() = nb::none(),
          "index_dim"_a = 0, R"(
        A key and a value for each KV head. Positions per block and value dimensions are padded to 16.

        A windowed layer lies in window blocks, of which a KvCache may have fewer. Values have the size of keys unless
        `value_dim` is given. There is also an index key of `index_dim` elements, if it is not 0.)")
      .def_static(
          "latent",
          [](int64_t dim, int64_t index_dim, bool is_windowed) {
            require_range("index_dim", index_dim, 0, kLargestSize);
            if (is_windowed && index_dim > 0) refuse("a windowed layer has no index keys");
            return KvShape::latent(dim, index_dim, is_windowed);
          },
          "dim"_a, "index_dim"_a = 0, "is_windowed"_a = false,
          "Only one vector, shared by all heads; and an index key of `index_dim` elements, if it is not 0.")
      .def_static("pooled", &KvShape::pooled, "dim"_a, "positions_per_entry"_a, R"(
        One vector for each group of so many positions, which all heads share. The number divides the positions of a
        block or is a multiple of them.)")
      .def_ro("positions_per_entry", &KvShape::positions_per_entry)
      .def_ro("is_windowed", &KvShape::is_windowed, "Whether it lies in window blocks.")
      .def_static("none", [] { return KvShape{}; }, "Nothing: the layer has a recurrent state.");

  m.def(
      "kv_cache_bytes",
      [](const std::vector<KvShape>& layers, int64_t num_blocks, int64_t block_tokens,
         const KvDtypeName& dtype, std::optional<int64_t> num_window_blocks) {
        return KvCache::bytes(layers, {num_blocks, num_window_blocks.value_or(num_blocks)}, block_tokens,
                              parse_kv_format(dtype));
      },
      "layers"_a, "num_blocks"_a, "block_tokens"_a, "dtype"_a, "num_window_blocks"_a.none() = nb::none(),
      "Bytes of a KvCache.");
  m.def(
      "kv_layer_parts",
      [](const KvShape& shape, int64_t num_blocks, int64_t block_tokens, const KvDtypeName& dtype) {
        return KvCache::layer_parts(shape, num_blocks, block_tokens, parse_kv_format(dtype));
      },
      "shape"_a, "num_blocks"_a, "block_tokens"_a, "dtype"_a, R"(
    Bytes of a layer's keys and values, or of its latent vectors; then of index keys. They lie in a KvCache in this
    order.)");

  nb::class_<KvCache>(m, "KvCache", R"(
    The data that all layers keep of past positions; memory is committed when it is first written.

    Args:
        num_window_blocks: blocks of windowed layers; None means num_blocks, and that the blocks are the same.)")
      .def(
          "__init__",
          [](KvCache* self, std::vector<KvShape> layers, int64_t num_blocks, int64_t block_tokens,
             const KvDtypeName& dtype, std::optional<int64_t> num_window_blocks) {
            for (KvShape& shape : layers) shape.is_windowed &= num_window_blocks.has_value();
            new (self) KvCache(std::move(layers), {num_blocks, num_window_blocks.value_or(num_blocks)},
                               block_tokens, parse_kv_format(dtype));
          },
          "layers"_a, "num_blocks"_a, "block_tokens"_a, "dtype"_a, "num_window_blocks"_a.none() = nb::none())
      .def_prop_ro("nbytes", &KvCache::nbytes)
      .def_prop_ro(
          "block_bytes", [](const KvCache& self) { return self.block_bytes(false); },
          "Bytes of one block, all layers without window blocks.")
      .def(
          "held_bytes",
          [](KvCache& self, int64_t num_blocks) {
            require_range("num_blocks", num_blocks, 0, self.num_blocks());
            return self.held_bytes(num_blocks);
          },
          "num_blocks"_a, R"(
        Most bytes in memory while nothing was written to other blocks than the first `num_blocks`.)")
      .def(
          "release",
          [](KvCache& self, int64_t num_blocks) {
            require_range("num_blocks", num_blocks, 0, self.num_blocks());
            nb::gil_scoped_release released;
            self.release(num_blocks);
          },
          "num_blocks"_a, R"(
        Give the memory of all but the first `num_blocks` back to the system, as far as `held_bytes` says. The data of
        the others are lost.)")
      .def(
          "copy_out",
          [](KvCache& self, int64_t block, const OutArrayOf<uint8_t>& to) {
            require_block("block", self, block);
            uint8_t* data = write_array("to", to, {self.block_bytes(false)});
            nb::gil_scoped_release released;
            self.copy_out(block, data);
          },
          "block"_a, "to"_a.noconvert(), "Copy a whole block into `to` [block_bytes].")
      .def(
          "copy_in",
          [](KvCache& self, int64_t block, const ArrayOf<uint8_t>& saved) {
            require_block("block", self, block);
            const uint8_t* data = read_array("saved", saved, {self.block_bytes(false)});
            nb::gil_scoped_release released;
            self.copy_in(block, data);
          },
          "block"_a, "saved"_a, "Copy data from `copy_out` into any block of a cache with the same shapes.")
      .def(
          "copy_block",
          [](KvCache& self, int64_t from, int64_t to, bool is_windowed) {
            require_block("from_block", self, from, is_windowed);
            require_block("to_block", self, to, is_windowed);
            nb::gil_scoped_release released;
            if (from != to) self.copy_block(from, to, is_windowed);
          },
          "from_block"_a, "to_block"_a, "is_windowed"_a = false,
          "Copy a block of all layers without window blocks, or a window block of the others.");

  m.def(
      "kv_write",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& keys,
         const ArrayOf<float>& values, const ArrayOf<int64_t>& slots) {
        require_range("layer", layer, 0, kv.num_layers() - 1);
        const KvShape& shape = kv.shape(layer);
        require_kind(shape, KvShape::Kind::keys_values);
        const int64_t* at = read_array("slots", slots, {kAnySize});
        const int64_t num_tokens = int64_t(slots.shape(0));
        const float* k = read_array("keys", keys, {num_tokens, shape.kv_heads, shape.head_dim});
        const float* v = read_array("values", values, {num_tokens, shape.kv_heads, shape.value_dim});
        require_slots(kv, kv.num_blocks_of(layer), at, num_tokens);
        nb::gil_scoped_release released;
        kv_write(runtime, kv.layer(layer), k, v, at, num_tokens);
      },
      "runtime"_a, "kv"_a, "layer"_a, "keys"_a, "values"_a, "slots"_a, R"(
    Store keys [tokens, kv_heads, head_dim] and values [tokens, kv_heads, value_dim]; slot = block * block_tokens +
    offset, int64 [tokens].)");

  m.def(
      "attention",
      [](Runtime& runtime, KvCache& kv, int64_t layer, const ArrayOf<float>& q,
         const ArrayOf<int32_t>& block_table, const ArrayOf<int32_t>& sequence, const ArrayOf<int32_t>& order,
         float scale, int64_t window, const OutArrayOf<float>& out,
         const std::optional<ArrayOf<float>>& sinks, const std::optional<ArrayOf<int32_t>>& sees_until,
         bool is_chunked) {
        require_range("layer", layer, 0, kv.num_layers() - 1);
        require_range("window", window, 0, INT32_MAX);
        const KvShape& shape = kv.shape(layer);
        require_kind(shape, KvShape::Kind::keys_values);
        AttentionBatch batch = {};
        batch.q = read_array("q", q, {kAnySize, kAnySize, shape.head_dim});
        batch.num_tokens = int64_t(q.shape(0));
        batch.num_heads = int64_t(q.shape(1));
        if (batch.num_heads == 0 || batch.num_heads % shape.kv_heads != 0) {
          refuse("q has " + std::to_string(batch.num_heads) + " heads, expected a multiple of the " +
                 std::to_string(shape.kv_heads) + " KV heads");
        }
        batch.block_table = read_array("block_table", block_table, {kAnySize, kAnySize});
        batch.max_blocks = int64_t(block_table.shape(1));
        batch.sequence = read_array("sequence", sequence, {batch.num_tokens});
        batch.order = read_array("order", order, {batch.num_tokens});
        if (sees_until) batch.sees_until = read_array("sees_until", *sees_until, {batch.num_tokens});
        batch.scale = scale;
        batch.window = {window, is_chunked};
        batch.sinks = sinks ? read_array("sinks", *sinks, {batch.num_heads}) : nullptr;
        float* to = write_array("out", out, {batch.num_tokens, batch.num_heads * shape.value_dim});
        require_blocks(kv, kv.num_blocks_of(layer), batch, int64_t(block_table.shape(0)));
        nb::gil_scoped_release released;
        attention(runtime, kv.layer(layer), batch, to);
      },
      "runtime"_a, "kv"_a, "layer"_a, "q"_a, "block_table"_a, "sequence"_a, "order"_a, "scale"_a, "window"_a,
      "out"_a.noconvert(), "sinks"_a.none() = nb::none(), "sees_until"_a.none() = nb::none(),
      "is_chunked"_a = false, R"(
    Grouped-query attention; adjacent tokens of a sequence share one pass over its keys.

    Args:
        q: [tokens, heads, head_dim], heads a multiple of kv_heads.
        block_table: [sequences, max_blocks]; position p of sequence s is in block block_table[s, p // block_tokens].
        sequence, order: [tokens], a row of `block_table` and the index in the sequence.
        window: positions begin at order - window + 1; 0 means at 0.
        out: [tokens, heads * value_dim].
        sinks: [heads], a score per head that takes weight and adds nothing; None means no sinks.
        sees_until: [tokens], the end of the positions that a token sees, which must have been written; None means
            order + 1: its own position is the last.
        is_chunked: positions begin at order // window * window instead.)");
}

}  // namespace

void bind_kernels(nb::module_& m) {
  bind_choice(m);
  bind_matrix(m);
  bind_layer(m);
  bind_attention(m);
}

}  // namespace argosy
