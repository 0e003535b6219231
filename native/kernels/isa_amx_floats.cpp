// isa_amx_floats.cpp: what the set `amx` computes on tiles and `avx512` does not: attention, and products
// with bfloat16 and FP8 weights. For processors with the BF16 of AVX-512 and the tiles of AMX (Sapphire
// Rapids and later).

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 0
#include "kernels/vector_avx512.h"

// It uses the vectors above.
#include "kernels/attention_amx.h"
#include "kernels/kernel_table.h"
#include "kernels/latent_attention_amx.h"
#include "kernels/matmul_float_amx.h"

namespace argosy {

void add_amx_attention(KernelTable& table);
void add_amx_attention(KernelTable& table) {
  table.attention = attention_amx;
  table.most_queries = kAmxQueries;
  table.attention_floats = [](int64_t head_dim, int64_t value_dim) {
    const int64_t floats = AmxAttentionSizes(head_dim, value_dim).bytes() / 4,
                  other = attention_scratch_floats(head_dim, value_dim);
    return floats > other ? floats : other;
  };
  table.latent_attention = latent_attention_amx;
  table.most_columns = kAmxColumns;
  table.latent_floats = [](int64_t dim, int64_t value_dim) {
    return AmxLatentSizes(dim, value_dim).bytes() / 4;
  };
}

void add_amx_float_products(KernelTable& table);
void add_amx_float_products(KernelTable& table) {
  table.matmul[int(Format::bf16)] = matmul_float_amx<Bf16OnTiles>;
  table.matmul[int(Format::f8)] = matmul_float_amx<F8OnTiles>;
  table.split_activations = split_activations;
  static_assert(kSplitScratchBytes >= kAmxScratchBytes && kAmxScratchBytes >= kCodedScratchBytes);
  table.product_scratch_bytes = kSplitScratchBytes;
}

}  // namespace argosy

#endif
