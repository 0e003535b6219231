// isa_amx_products.cpp: products with quantised weights and many tokens on the tiles of AMX (Sapphire Rapids
// and later), for the sets `avx512` and `amx`. Results have the same bits as those of isa_avx512.cpp.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 0
#include "kernels/kernel_table.h"
#include "kernels/matmul_amx.h"

namespace argosy {

void add_amx_products(KernelTable& table);
void add_amx_products(KernelTable& table) {
  const auto add = [&]<int kFormat>(Number<kFormat>) {
    if constexpr (has_amx_product(Format(kFormat))) table.matmul[kFormat] = matmul_amx<Format(kFormat)>;
  };
  for (int format = 0; format < kNumFormats; ++format) with_number<kNumFormats - 1>(format, add);
  table.product_scratch_bytes = kAmxScratchBytes;
  table.has_tiles = true;
}

}  // namespace argosy

#endif
