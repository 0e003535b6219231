// encoder.cpp: binds the operations of encoders.

#include "ops/encoder.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <optional>
#include <string>

#include "bind/bind.h"
#include "bind/matrix.h"

namespace argosy {

using namespace nb::literals;

namespace {

using GeluName = Named<std::string, "Gelu">;

Gelu parse_gelu(const std::string& name) {
  if (name == "erf") return Gelu::erf;
  if (name == "tanh") return Gelu::tanh;
  if (name == "quick") return Gelu::quick;
  refuse("unknown kind '" + name + "'; known: erf, tanh, quick");
}

template <class ArrayType>
int64_t row_stride(const ArrayType& array) {
  return array.size() > 0 ? array.stride(0) : 0;
}

Rows<const float> read_rows(const char* name, const ArrayOf<float>& array,
                            std::initializer_list<int64_t> shape) {
  require_array<float>(name, array, shape, Order::rows);
  return {static_cast<const float*>(array.data()), row_stride(array)};
}

// Refuses rows that overlap.
Rows<float> write_rows(const char* name, const OutArrayOf<float>& array,
                       std::initializer_list<int64_t> shape) {
  require_array<float>(name, array, shape, Order::rows);
  const int64_t stride = row_stride(array);
  if (array.size() > 0 && array.shape(0) > 1 && std::abs(stride) < int64_t(array.size() / array.shape(0))) {
    refuse("rows of " + std::string(name) + " overlap: they are " + std::to_string(stride) +
           " elements apart");
  }
  return {static_cast<float*>(array.data()), stride};
}

}  // namespace

void bind_encoder(nb::module_& m) {
  m.def(
      "linear",
      [](Runtime& runtime, const Matrix& matrix, const ArrayOf<float>& x, const OutArrayOf<float>& out,
         const std::optional<ArrayOf<float>>& bias, bool exact) {
        const Rows<const float> from = read_rows("x", x, {kAnySize, matrix.view.cols});
        const int64_t num_tokens = int64_t(x.shape(0));
        const Rows<float> to = write_rows("out", out, {num_tokens, matrix.view.rows});
        const float* by = bias ? read_array("bias", *bias, {matrix.view.rows}) : nullptr;
        nb::gil_scoped_release released;
        linear(runtime, matrix.view, from, num_tokens, by, exact, to);
      },
      "runtime"_a, "matrix"_a, "x"_a, "out"_a.noconvert(), "bias"_a.none() = nb::none(), nb::kw_only(),
      "exact"_a = false, R"(
    out = x matrix^T + bias, for x [tokens, cols], out [tokens, rows] and bias [rows].

    Rows of x and out may be strided; x and out must not overlap. With bf16 weights and 16 tokens or more, x is rounded
    to bfloat16 if the CPU multiplies that faster, unless `exact`. Sums are float32.)");

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
      "silu",
      [](Runtime& runtime, const OutArrayOf<float>& x) {
        float* values = write_array("x", x, {kAnySize, kAnySize});
        nb::gil_scoped_release released;
        silu(runtime, int64_t(x.shape(0)), int64_t(x.shape(1)), values);
      },
      "runtime"_a, "x"_a.noconvert(), "Replace each element of x [n, cols] by x * sigmoid(x).");

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
}

}  // namespace argosy
