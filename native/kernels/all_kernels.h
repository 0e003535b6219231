// all_kernels.h: every kernel in one table, compiled once per instruction set by isa_*.cpp.
//
// Everything in these headers has internal linkage, and none of it uses inline functions of the standard
// library: if two instruction sets share a function name, both compile it and the linker keeps only one.
#pragma once

#include <utility>

#include "kernels/activations.h"
#include "kernels/attend.h"
#include "kernels/attention.h"
#include "kernels/causal_conv.h"
#include "kernels/coded.h"
#include "kernels/combine.h"
#include "kernels/gated_delta.h"
#include "kernels/gelu.h"
#include "kernels/kernel_table.h"
#include "kernels/kv_write.h"
#include "kernels/latent_args.h"
#include "kernels/latent_attention.h"
#include "kernels/latent_index.h"
#include "kernels/layer_norm.h"
#include "kernels/low_rank.h"
#include "kernels/mamba.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_f8.h"
#include "kernels/matmul_float.h"
#include "kernels/matmul_quantized.h"
#include "kernels/pool.h"
#include "kernels/probe.h"
#include "kernels/quantize.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/route.h"
#include "kernels/swiglu.h"
#include "kernels/transcode_bnb4.h"
#include "kernels/transcode_f8.h"
#include "kernels/transcode_grouped.h"
#include "kernels/transcode_iq.h"
#include "kernels/transcode_nvfp4.h"
#include "kernels/transcode_panel.h"

namespace argosy {
namespace {

// A table, and which entries of its arrays are set. (UBSan makes GCC refuse to compare a
// function with nullptr while it compiles.)
struct TableBuilder {
  KernelTable table = {};
  bool has_matmul[kNumFormats] = {};
  bool has_transcode[kNumBlockTypes] = {};

  constexpr void set(Format format, void (*kernel)(const MatmulArgs&)) {
    table.matmul[int(format)] = kernel;
    has_matmul[int(format)] = true;
  }
  constexpr void set(BlockType type, bool (*kernel)(const TranscodeArgs&)) {
    table.transcode[kind_of(type)] = kernel;
    has_transcode[kind_of(type)] = true;
  }
  template <Format kFormat>
  constexpr void set_quantized() {
    if constexpr (is_coded(kFormat)) {
      set(kFormat, matmul_coded<kFormat>);
    } else if constexpr (is_quantized(kFormat)) {
      set(kFormat, matmul_quantized<kernel_format(kFormat)>);
    }
  }
  template <size_t... kFormats>
  constexpr void set_all_quantized(std::index_sequence<kFormats...>) {
    (set_quantized<Format(kFormats)>(), ...);
  }
  template <Format... kFormats>
  constexpr void set_f8() {
    (set(kFormats, matmul_f8<kFormats>), ...);
  }
  template <BlockType kType>
  constexpr void set_transcode() {
    if constexpr (kType == BlockType::nvfp4) {
      set(kType, transcode_nvfp4_alone);
    } else if constexpr (kType == BlockType::nvfp4_scales || kType == BlockType::nvfp4_scales_alone) {
      constexpr bool kHasFactor = kType == BlockType::nvfp4_scales;
      set(kType, transcode_nvfp4_scales<kHasFactor>);
    } else if constexpr (is_factor(kType)) {
      set(kType, transcode_nvfp4_factor<kType>);
    } else if constexpr (kType == BlockType::int8_row_order) {
      set(kType, transcode_int8_order);
    } else if constexpr (is_bnb4(slot_format(kType)) && kType != BlockType::bnb4_codes &&
                         kType != BlockType::bnb4_double_codes && kType != BlockType::bnb4_scales) {
      set(kType, transcode_bnb4<kType>);
    } else if constexpr (!is_f8(slot_format(kType))) {
      set(kType, transcode_panels<kType>);
    } else if constexpr (entry_of(kType).scale == ScaleType::none) {
      set(kType, transcode_f8_codes<slot_format(kType)>);
    } else {
      set(kType, transcode_f8_scales<kType>);
    }
  }
  template <size_t... kTypes>
  constexpr void set_transcode_of_all(std::index_sequence<kTypes...>) {
    (set_transcode<BlockType(kTypes)>(), ...);
  }
};

// Evaluated when it is compiled: a missing kernel is an error of the compiler.
constexpr KernelTable kernel_table_named(const char* name) {
  TableBuilder builder;
  builder.table = {
      .name = name,
      .matmul = {},
      .product_scratch_bytes = kCodedScratchBytes,
      .has_tiles = false,
      .quantize_activations = quantize_activations,
      .split_activations = nullptr,
      .quantize_q8 = quantize_panels<Format::q8>,
      .quantize_q4 = quantize_panels<Format::q4>,
      .transcode = {},
      .transcode_grouped = transcode_grouped,
      .move_columns = move_columns,
      .dequantize_row = dequantize_row,
      .rms_norm = rms_norm,
      .rope = rope,
      .route = route,
      .activate = activate,
      .add_low_rank = add_low_rank,
      .combine = combine,
      .add_sigmoid_gated = add_sigmoid_gated,
      .mul_gate = mul_gate,
      .soft_cap = soft_cap,
      .layer_norm = layer_norm,
      .gelu = gelu,
      .silu = silu_in_place,
      .attend = attend,
      .round_to_panel = nullptr,
      .linear_panel = nullptr,
      .round_keys = nullptr,
      .attend_rounded = nullptr,
      .kv_write = kv_write,
      .latent_write = latent_write,
      .attention = attention,
      .most_queries = kMaxQueries,
      .attention_floats = attention_scratch_floats,
      .attention_merge = attention_merge,
      .attention_finish = attention_finish,
      .causal_conv = causal_conv,
      .pool = pool,
      .delta_gates = delta_gates,
      .channel_gates = channel_gates,
      .delta_rule = delta_rule,
      .mamba_steps = mamba_steps,
      .latent_attention = latent_attention,
      .most_columns = kMostColumns,
      .latent_floats = [](int64_t dim, int64_t) { return latent_scratch_floats(dim); },
      .latent_merge = latent_merge,
      .latent_finish = latent_finish,
      .index_scores = index_scores,
      .read_memory = read_memory,
      .multiply_int8 = multiply_int8,
      .int8_products_per_round = kInt8ProductsPerRound,
  };
  builder.set(Format::f32, matmul_float<F32Weights>);
  builder.set(Format::f16, matmul_float<F16Weights>);
  builder.set(Format::bf16, matmul_float<Bf16Weights>);
  builder.set_f8<Format::f8, Format::f8_row, Format::f8_32, Format::mxfp8, Format::int8_row, Format::bnb4,
                 Format::bnb4_double>();
  builder.set_all_quantized(std::make_index_sequence<kNumFormats>());
  builder.set_transcode_of_all(std::make_index_sequence<kNumBlockTypes>());
  for (const bool is_set : builder.has_matmul) {
    if (!is_set) throw "a format has no product";
  }
  for (const bool is_set : builder.has_transcode) {
    if (!is_set) throw "a block type cannot be transcoded";
  }
  return builder.table;
}

}  // namespace
}  // namespace argosy
