// encoder.cpp: binds the operations of encoders.

#include "ops/encoder.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bind/bind.h"
#include "bind/matrix.h"
#include "kernels/encoder_args.h"

namespace argosy {

using namespace nb::literals;

namespace {

using GeluName = Named<std::string, "Gelu">;
using FinishName = Named<std::string, "Finish">;

Gelu parse_gelu(const std::string& name) {
  if (name == "erf") return Gelu::erf;
  if (name == "tanh") return Gelu::tanh;
  if (name == "quick") return Gelu::quick;
  refuse("unknown kind '" + name + "'; known: erf, tanh, quick");
}

Finish parse_finish(const std::string& name) {
  if (name == "store") return Finish::store;
  if (name == "add") return Finish::add;
  if (name == "multiply") return Finish::multiply;
  if (name == "gelu_erf") return Finish::gelu_erf;
  if (name == "gelu_tanh") return Finish::gelu_tanh;
  if (name == "gelu_quick") return Finish::gelu_quick;
  if (name == "silu") return Finish::silu;
  refuse("unknown finish '" + name + "'; known: store, add, multiply, gelu_erf, gelu_tanh, gelu_quick, silu");
}

RoundedKeys rounded_keys(int64_t num_keys, int64_t num_kv_heads, int64_t dim) {
  require_range("keys", num_keys, 1, kLargestSize);
  require_range("KV heads", num_kv_heads, 1, kLargestSize);
  require_range("dim", dim, 0, kLargestSize);
  return {num_keys, num_kv_heads, dim};
}

void require_rounding(const Runtime& runtime) {
  if (!runtime.rounds()) refuse("this runtime does not round");
}

}  // namespace

void bind_encoder(nb::module_& m) {
  m.def(
      "linear",
      [](Runtime& runtime, const Matrix& matrix, const ArrayOf<float>& x, const OutArrayOf<float>& out,
         const std::optional<ArrayOf<float>>& bias, const FinishName& finish, bool exact) {
        const Rows<const float> from = read_rows("x", x, {kAnySize, matrix.view.cols});
        const int64_t num_tokens = int64_t(x.shape(0));
        const Rows<float> to = write_rows("out", out, {num_tokens, matrix.view.rows});
        const float* by = bias ? read_array("bias", *bias, {matrix.view.rows}) : nullptr;
        const Finish form = parse_finish(finish);
        nb::gil_scoped_release released;
        linear(runtime, matrix.view, from, num_tokens, by, exact, form, to);
      },
      "runtime"_a, "matrix"_a, "x"_a, "out"_a.noconvert(), "bias"_a.none() = nb::none(), nb::kw_only(),
      "finish"_a = FinishName("store"), "exact"_a = false, R"(
    out = x matrix^T + bias, for x [tokens, cols], out [tokens, rows] and bias [rows].

    Rows of x and out may be strided; x and out must not overlap. With bf16 weights and 16 tokens or more, x is rounded
    to bfloat16 if the CPU multiplies that faster (`Runtime.rounds`), unless `exact`. Sums are float32.

    Args:
        finish: store the result, add it to out, multiply out by it, or store an activation of it.)");

  m.def(
      "layer_norm",
      [](Runtime& runtime, const ArrayOf<float>& x, const ArrayOf<float>& weight,
         const std::optional<ArrayOf<float>>& bias, float eps, const OutArrayOf<float>& out) {
        const float* from = read_array("x", x, {kAnySize, kAnySize});
        const int64_t rows = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
        const float* by = read_array("weight", weight, {cols});
        const float* plus = bias ? read_array("bias", *bias, {cols}) : nullptr;
        float* to = write_array("out", out, {rows, cols});
        nb::gil_scoped_release released;
        layer_norm(runtime, from, by, plus, eps, rows, cols, to);
      },
      "runtime"_a, "x"_a, "weight"_a, "bias"_a.none(), "eps"_a, "out"_a.noconvert(),
      "out[n] = (x[n] - mean) / sqrt(variance + eps) * weight + bias, for x [n, cols]; out may be x.");

  m.def(
      "gelu",
      [](Runtime& runtime, const OutArrayOf<float>& x, const GeluName& kind) {
        float* values = write_array("x", x, {kAnySize, kAnySize});
        const Gelu form = parse_gelu(kind);
        nb::gil_scoped_release released;
        gelu(runtime, form, int64_t(x.shape(0)), int64_t(x.shape(1)), values);
      },
      "runtime"_a, "x"_a.noconvert(), "kind"_a, R"(
    Replace each element of x [n, cols] by x * P(normal <= x): exactly (erf), or by one of two approximations.

    tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).   quick: x * sigmoid(1.702 x).)");

  m.def(
      "attend",
      [](Runtime& runtime, const ArrayOf<float>& query, const ArrayOf<float>& key,
         const ArrayOf<float>& value, float scale, const OutArrayOf<float>& out) {
        const Rows<const float> queries = read_rows("query", query, {kAnySize, kAnySize, kAnySize});
        const int64_t num_queries = int64_t(query.shape(0)), num_heads = int64_t(query.shape(1));
        const int64_t dim = int64_t(query.shape(2));
        const Rows<const float> keys = read_rows("key", key, {kAnySize, kAnySize, dim});
        const int64_t num_keys = int64_t(key.shape(0)), num_kv_heads = int64_t(key.shape(1));
        const Rows<const float> values = read_rows("value", value, {num_keys, num_kv_heads, dim});
        const Rows<float> to = write_rows("out", out, {num_queries, num_heads, dim});
        require_range("keys", num_keys, 1, kLargestSize);
        require_range("KV heads", num_kv_heads, 1, kLargestSize);
        require_size("heads modulo KV heads", num_heads % num_kv_heads, 0);
        nb::gil_scoped_release released;
        attend(runtime, {queries, keys, values, num_queries, num_keys, num_heads, num_kv_heads, dim, scale},
               to);
      },
      "runtime"_a, "query"_a, "key"_a, "value"_a, "scale"_a, "out"_a.noconvert(), R"(
    out[t, h] = sum over s of softmax over s (scale * query[t, h] . key[s, k]) * value[s, k]: no mask.

    k is the KV head that head h shares with its neighbours. Rows may be strided; out may be query.

    Args:
        query, out: [tokens, heads, dim].
        key, value: [keys, kv_heads, dim], at least one key; kv_heads divides heads.)");

  m.def(
      "rounded_keys_bytes",
      [](int64_t num_keys, int64_t num_kv_heads, int64_t dim) {
        return rounded_keys(num_keys, num_kv_heads, dim).bytes();
      },
      "num_keys"_a, "num_kv_heads"_a, "dim"_a, "Bytes that `round_keys` writes.");

  m.def(
      "round_keys",
      [](Runtime& runtime, const ArrayOf<float>& key, const ArrayOf<float>& value,
         const OutArrayOf<uint8_t>& rounded) {
        const Rows<const float> from = read_rows("key", key, {kAnySize, kAnySize, kAnySize});
        const RoundedKeys keys =
            rounded_keys(int64_t(key.shape(0)), int64_t(key.shape(1)), int64_t(key.shape(2)));
        const Rows<const float> values =
            read_rows("value", value, {keys.num_keys, keys.num_kv_heads, keys.dim});
        uint8_t* to = write_array("rounded", rounded, {keys.bytes()});
        require_rounding(runtime);
        nb::gil_scoped_release released;
        round_keys(runtime, keys, from, values, to);
      },
      "runtime"_a, "key"_a, "value"_a, "rounded"_a.noconvert(), R"(
    Round keys and values [keys, kv_heads, dim] to bfloat16, in the layout that `attend_rounded` reads.

    Needs `Runtime.rounds`. Rows may be strided.)");

  m.def(
      "attend_rounded",
      [](Runtime& runtime, const ArrayOf<float>& query, const ArrayOf<uint8_t>& rounded, int64_t num_keys,
         int64_t num_kv_heads, float scale, const OutArrayOf<float>& out) {
        const Rows<const float> queries = read_rows("query", query, {kAnySize, kAnySize, kAnySize});
        const int64_t num_queries = int64_t(query.shape(0)), num_heads = int64_t(query.shape(1));
        const RoundedKeys keys = rounded_keys(num_keys, num_kv_heads, int64_t(query.shape(2)));
        const uint8_t* from = read_array("rounded", rounded, {keys.bytes()});
        const Rows<float> to = write_rows("out", out, {num_queries, num_heads, keys.dim});
        require_size("heads modulo KV heads", num_heads % num_kv_heads, 0);
        require_rounding(runtime);
        nb::gil_scoped_release released;
        attend_rounded(runtime, queries, num_queries, num_heads, keys, from, scale, to);
      },
      "runtime"_a, "query"_a, "rounded"_a, "num_keys"_a, "num_kv_heads"_a, "scale"_a, "out"_a.noconvert(), R"(
    `attend` with keys and values from `round_keys`, and queries and weights rounded to bfloat16; sums are float32.)");
}

}  // namespace argosy
