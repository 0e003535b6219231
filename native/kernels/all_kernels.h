// all_kernels.h: every kernel in one table, compiled once per instruction set by isa_*.cpp.
//
// Everything in these headers has internal linkage, and none of it uses inline functions of the standard
// library: if two instruction sets share a function name, both compile it and the linker keeps only one.
#pragma once

#include "kernels/activations.h"
#include "kernels/attention.h"
#include "kernels/combine.h"
#include "kernels/gated_delta.h"
#include "kernels/kernel_table.h"
#include "kernels/kv_write.h"
#include "kernels/latent_attention.h"
#include "kernels/matmul_f8.h"
#include "kernels/matmul_float.h"
#include "kernels/matmul_quantized.h"
#include "kernels/probe.h"
#include "kernels/quantize.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/route.h"
#include "kernels/swiglu.h"
#include "kernels/transcode_f8.h"
#include "kernels/transcode_panel.h"

namespace argosy {
namespace {

template <Format... kFormats>
constexpr void set_quantized_matmul(KernelTable& table) {
  ((table.matmul[int(kFormats)] = matmul_quantized<kFormats>), ...);
}

template <BlockType... kTypes>
constexpr void set_panel_transcode(KernelTable& table) {
  ((table.transcode[int(kTypes)] = transcode_panels<kTypes>), ...);
}

// Evaluated when it is compiled: a missing kernel is an error of the compiler.
constexpr KernelTable kernel_table_named(const char* name) {
  KernelTable table = {
      .name = name,
      .matmul = {},
      .quantize_activations = quantize_activations,
      .quantize_q8 = quantize_panels<Format::q8>,
      .quantize_q4 = quantize_panels<Format::q4>,
      .transcode = {},
      .dequantize_row = dequantize_row,
      .rms_norm = rms_norm,
      .rope = rope,
      .route = route,
      .activate = activate,
      .combine = combine,
      .add_sigmoid_gated = add_sigmoid_gated,
      .mul_sigmoid = mul_sigmoid,
      .kv_write = kv_write,
      .attention = attention,
      .delta_gates = delta_gates,
      .delta_conv = delta_conv,
      .delta_rule = delta_rule,
      .latent_attention = latent_attention,
      .latent_merge = latent_merge,
      .latent_finish = latent_finish,
      .read_memory = read_memory,
      .multiply_int8 = multiply_int8,
      .int8_products_per_round = kInt8ProductsPerRound,
  };
  table.matmul[int(Format::f32)] = matmul_float<F32Weights>;
  table.matmul[int(Format::f16)] = matmul_float<F16Weights>;
  table.matmul[int(Format::bf16)] = matmul_float<Bf16Weights>;
  table.matmul[int(Format::f8)] = matmul_f8;
  set_quantized_matmul<Format::q8, Format::q4, Format::q4_1, Format::q5_0, Format::q5_1, Format::q4_k,
                       Format::q5_k, Format::q6_k, Format::q2_k, Format::q3_k, Format::iq4_nl, Format::iq4_xs,
                       Format::mxfp4, Format::int4>(table);
  set_panel_transcode<BlockType::q8_0, BlockType::q4_0, BlockType::q4_1, BlockType::q5_0, BlockType::q5_1,
                      BlockType::q4_k, BlockType::q5_k, BlockType::q6_k, BlockType::q2_k, BlockType::q3_k,
                      BlockType::iq4_nl, BlockType::iq4_xs, BlockType::mxfp4, BlockType::int4_quants,
                      BlockType::int4_scales, BlockType::mxfp4_quants, BlockType::mxfp4_scales>(table);
  table.transcode[int(BlockType::f8_codes)] = transcode_f8_codes;
  table.transcode[int(BlockType::f8_scales)] = transcode_f8_scales<BlockType::f8_scales>;
  table.transcode[int(BlockType::f8_scales_bf16)] = transcode_f8_scales<BlockType::f8_scales_bf16>;
  for (const auto kernel : table.matmul) {
    if (kernel == nullptr) throw "a format has no product";
  }
  for (const auto kernel : table.transcode) {
    if (kernel == nullptr) throw "a block type cannot be transcoded";
  }
  return table;
}

}  // namespace
}  // namespace argosy
