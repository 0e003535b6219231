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

constexpr KernelTable kernel_table_named(const char* name) {
  return {
      .name = name,
      .matmul = {matmul_float<F32Weights>, matmul_float<F16Weights>, matmul_float<Bf16Weights>, matmul_f8,
                 matmul_quantized<Format::q8>, matmul_quantized<Format::q4>, matmul_quantized<Format::q4_1>,
                 matmul_quantized<Format::q5_0>, matmul_quantized<Format::q5_1>,
                 matmul_quantized<Format::q4_k>, matmul_quantized<Format::q5_k>,
                 matmul_quantized<Format::q6_k>, matmul_quantized<Format::q2_k>,
                 matmul_quantized<Format::q3_k>, matmul_quantized<Format::iq4_nl>,
                 matmul_quantized<Format::iq4_xs>, matmul_quantized<Format::mxfp4>,
                 matmul_quantized<Format::int4>},
      .quantize_activations = quantize_activations,
      .quantize_q8 = quantize_panels<Format::q8>,
      .quantize_q4 = quantize_panels<Format::q4>,
      .transcode =
          {transcode_panels<BlockType::q8_0>,         transcode_panels<BlockType::q4_0>,
           transcode_panels<BlockType::q4_1>,         transcode_panels<BlockType::q5_0>,
           transcode_panels<BlockType::q5_1>,         transcode_panels<BlockType::q4_k>,
           transcode_panels<BlockType::q5_k>,         transcode_panels<BlockType::q6_k>,
           transcode_panels<BlockType::q2_k>,         transcode_panels<BlockType::q3_k>,
           transcode_panels<BlockType::iq4_nl>,       transcode_panels<BlockType::iq4_xs>,
           transcode_panels<BlockType::mxfp4>,        transcode_panels<BlockType::int4_quants>,
           transcode_panels<BlockType::int4_scales>,  transcode_panels<BlockType::mxfp4_quants>,
           transcode_panels<BlockType::mxfp4_scales>, transcode_f8_codes,
           transcode_f8_scales<BlockType::f8_scales>, transcode_f8_scales<BlockType::f8_scales_bf16>},
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
}

}  // namespace
}  // namespace argosy
