// matrix.h: weights in memory that Python owns, and bounds checks for matrices and batches.
#pragma once

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bind/bind.h"
#include "kernels/swiglu_args.h"
#include "kernels/transcode.h"
#include "ops/attention.h"
#include "ops/latent_attention.h"
#include "ops/swiglu.h"
#include "store/arena.h"

namespace argosy {

inline constexpr const char* kFormatNames[kFirstGrouped] = {
    "f32",     "f16",    "bf16",   "f8",     "f8_row", "f8_32", "mxfp8", "int8_row", "bnb4",   "bnb4_double",
    "q8",      "q4",     "q4_1",   "q5_0",   "q5_1",   "q4_k",  "q5_k",  "q6_k",     "q2_k",   "q3_k",
    "iq4_nl",  "iq4_xs", "mxfp4",  "nvfp4",  "int4",   "tq2_0", "q2_0",  "iq2_xxs",  "iq2_xs", "iq2_s",
    "iq3_xxs", "iq3_s",  "iq1_s",  "iq1_m",  "tq1_0",  "q1_0",  "iq2_k", "iq3_k",    "iq4_k",  "iq5_k",
    "iq6_k",   "iq2_ks", "iq3_ks", "iq4_ks", "iq5_ks", "iq2_kl"};
// The largest number of rows or columns: products stay below 2^62 bytes.
inline constexpr int64_t kLargestSize = int64_t{1} << 30;

using FormatName = Named<std::string, "Format">;

inline std::string format_name(Format format) {
  return is_grouped(format) ? grouped_name(format) : kFormatNames[int(format)];
}

inline Format parse_format(const std::string& name) {
  for (int i = 0; i < kFirstGrouped; ++i) {
    if (name == kFormatNames[i]) return Format(i);
  }
  if (const std::optional<Format> format = grouped_format_named(name)) return *format;
  std::string known;
  for (const char* each : kFormatNames) known += (known.empty() ? "" : ", ") + std::string(each);
  refuse("unknown format '" + name + "'; known: " + known + ", and grouped formats such as " +
         grouped_name(Format::first_grouped));
}

inline int64_t checked_matrix_bytes(Format format, int64_t rows, int64_t cols) {
  require_range("rows", rows, 0, kLargestSize);
  require_range("cols", cols, 0, kLargestSize);
  return matrix_bytes(format, rows, cols);
}

// Weights inside an arena or a numpy array. The owner keeps them alive and in place.
struct Memory {
  nb::object owner;
  std::shared_ptr<const void> hold;
  const uint8_t* data;
  int64_t nbytes;
};

using MemoryObject = nb::typed<nb::object, TypeName<"Arena | numpy.ndarray[dtype=uint8]">>;

inline Memory open_memory(MemoryObject owner) {
  if (nb::isinstance<Arena>(owner)) {
    if (!nb::inst_ready(owner)) {
      refuse("memory is an Arena that was never initialised: make it with Arena(nbytes)");
    }
    Arena& arena = *nb::inst_ptr<Arena>(owner);
    return {owner, arena.hold(), arena.data(), int64_t(arena.size())};
  }
  const auto array = nb::cast<ArrayOf<uint8_t>>(owner);
  return {owner, nullptr, read_array("memory", array, {kAnySize}), int64_t(array.shape(0))};
}

struct Matrix {
  Memory memory;
  MatrixView view;
};

// Checks that the matrix lies inside the memory.
inline MatrixView view_matrix(const char* name, const uint8_t* data, int64_t nbytes, int64_t offset,
                              Format format, int64_t rows, int64_t cols) {
  const int64_t size = checked_matrix_bytes(format, rows, cols);
  if (offset < 0 || offset > nbytes || size > nbytes - offset) {
    refuse(std::string(name) + " of " + std::to_string(size) + " bytes at offset " + std::to_string(offset) +
           " does not lie inside memory of " + std::to_string(nbytes) + " bytes");
  }
  return {format, data + offset, rows, cols};
}

inline void require_ids(const char* name, const int32_t* ids, int64_t n, int64_t limit) {
  const int32_t* wrong = std::find_if(ids, ids + n, [&](int32_t id) { return id < 0 || id >= limit; });
  if (wrong != ids + n) {
    refuse(std::string(name) + "[" + std::to_string(wrong - ids) + "] is " + std::to_string(*wrong) +
           ", expected 0 to " + std::to_string(limit - 1));
  }
}

// The formats of gate, up and down, or of up and down if there is no gate.
using FormatNames = std::vector<FormatName>;

// Their number. The formats of a network without a gate are the last two.
inline int64_t parse_formats(const FormatNames& names, std::array<Format, 3>& formats) {
  require_range("number of formats", int64_t(names.size()), 2, 3);
  formats[0] = {};
  for (size_t i = 0; i < names.size(); ++i) formats[i + 3 - names.size()] = parse_format(names[i]);
  return int64_t(names.size());
}

// Kind, limit and alpha.
using ActivationOfNumbers = Named<std::tuple<std::string, float, float>, "Activation">;

inline Activation parse_activation(const ActivationOfNumbers& activation) {
  const auto& [kind, limit, alpha] = activation.base();
  if (kind == "silu") return {};
  if (kind == "gelu_tanh") return {Activation::Kind::gelu_tanh};
  if (kind == "relu2") return {Activation::Kind::relu2};
  if (kind != "clamped" && kind != "silu_limited" && kind != "silu_capped" && kind != "situ")
    refuse("unknown activation '" + kind +
           "'; known: silu, clamped, gelu_tanh, silu_limited, silu_capped, relu2, situ");
  if (!(limit > 0)) refuse("limit is " + std::to_string(limit) + ", expected more than 0");
  if (kind == "silu_limited") return {Activation::Kind::silu_limited, limit};
  if (kind == "silu_capped") return {Activation::Kind::silu_capped, limit};
  if (kind == "clamped") return {Activation::Kind::clamped, limit, alpha};
  if (!(alpha > 0)) refuse("alpha is " + std::to_string(alpha) + ", expected more than 0");
  return {Activation::Kind::situ, limit, alpha};
}

inline void require_kind(const KvShape& shape, KvShape::Kind kind) {
  constexpr const char* kNames[] = {"nothing", "keys and values", "latent vectors"};
  if (shape.kind == kind) return;
  refuse(std::string("the layer keeps ") + kNames[int(shape.kind)] + ", expected one that keeps " +
         kNames[int(kind)]);
}

inline void require_slots(const KvCache& kv, int64_t num_blocks, const int64_t* slots, int64_t num_tokens) {
  for (int64_t i = 0; i < num_tokens; ++i)
    require_range("a slot", slots[i], 0, num_blocks * kv.block_tokens() - 1);
}

// gate and up [width, hidden], down [hidden, width]; nullptr: no gate.
inline ExpertView view_network(const Matrix* gate, const Matrix& up, const Matrix& down) {
  if (gate != nullptr) {
    require_size("rows of up", up.view.rows, gate->view.rows);
    require_size("columns of up", up.view.cols, gate->view.cols);
  }
  require_size("rows of down", down.view.rows, up.view.cols);
  require_size("columns of down", down.view.cols, up.view.rows);
  return {gate != nullptr ? std::optional(gate->view) : std::nullopt, up.view, down.view};
}

inline void require_gate(const std::string& name, bool has_gate, const Activation& activation) {
  if (has_gate == activation.has_gate()) return;
  refuse(name + (has_gate ? " has a gate, which its activation does not use"
                          : " has no gate, which its activation needs"));
}

// key_up [num_heads * kv_rank, nope_dim], value_up [num_heads * value_dim, kv_rank].
inline LatentHeads view_latent_heads(const MatrixView& key_up, const MatrixView& value_up, int64_t num_heads,
                                     int64_t rope_dim, float scale) {
  require_range("heads", num_heads, 1, kLargestSize);
  require_range("rope_dim", rope_dim, 0, kLargestSize);
  const LatentHeads heads = {.key_up = key_up,
                             .value_up = value_up,
                             .num_heads = num_heads,
                             .nope_dim = key_up.cols,
                             .rope_dim = rope_dim,
                             .kv_rank = value_up.cols,
                             .value_dim = value_up.rows / num_heads,
                             .scale = scale};
  require_size("rows of key_up", key_up.rows, num_heads * heads.kv_rank);
  require_size("rows of value_up modulo heads", value_up.rows % num_heads, 0);
  require_range("rows of value_up", value_up.rows, 1, kLargestSize);
  require_range("columns of value_up", value_up.cols, 1, kLargestSize);
  // A product with a quantised matrix must begin at a panel.
  if (is_quantized(key_up.format))
    require_size("kv_rank modulo the panel rows of a quantised key_up", heads.kv_rank % kPanelRows, 0);
  if (is_quantized(value_up.format))
    require_size("value_dim modulo the panel rows of a quantised value_up", heads.value_dim % kPanelRows, 0);
  return heads;
}

// Checks that every position that a token sees lies in one of num_blocks blocks, and that it sees itself.
inline void require_blocks(const KvCache& kv, int64_t num_blocks, const AttentionBatch& batch,
                           int64_t num_sequences) {
  require_ids("sequence", batch.sequence, batch.num_tokens, num_sequences);
  const int64_t num_positions = batch.max_blocks * kv.block_tokens();
  require_ids("order", batch.order, batch.num_tokens, num_positions);
  for (int64_t token = 0; batch.sees_until != nullptr && token < batch.num_tokens; ++token) {
    const int64_t least = int64_t(batch.order[token]) + 1, until = batch.sees_until[token];
    if (until < least || until > num_positions)
      require_range(item_name("sees_until", size_t(token)), until, least, num_positions);
  }
  for (int64_t token = 0; token < batch.num_tokens; ++token) {
    const int64_t last = batch.until(token) - 1;
    // The next token of the same sequence sees every position that this token sees.
    if (token + 1 < batch.num_tokens && batch.sequence[token + 1] == batch.sequence[token] &&
        batch.until(token + 1) - 1 >= last && batch.window.size == 0) {
      continue;
    }
    const int32_t* row = batch.block_table + batch.sequence[token] * batch.max_blocks;
    const int64_t first_block = batch.first(token) / kv.block_tokens();
    require_ids("block_table", row + first_block, last / kv.block_tokens() + 1 - first_block, num_blocks);
  }
}

}  // namespace argosy
