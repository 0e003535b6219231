// isa_avx2_vnni.cpp: products with quantised weights for AVX2 with AVX-VNNI (Intel Core since the 12th
// generation, Zen 5). Results have the same bits as those of isa_avx2.cpp.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 0
#define ARGOSY_AVX_VNNI 1
#include "kernels/quantized_tile_avx2.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {
// As in isa_avx2.cpp.
constexpr int one_panel_tokens(Format format) { return takes_both_bytes(format) ? 2 : 4; }
constexpr bool kHasTilesWithoutPrefetch = true;
}  // namespace
}  // namespace argosy

#include "kernels/coded.h"
#include "kernels/iq_avx2.h"
#include "kernels/kernel_table.h"
#include "kernels/matmul_quantized.h"

namespace argosy {

void add_vnni_products(KernelTable& table);
void add_vnni_products(KernelTable& table) {
  const auto add = [&]<int kFormat>(Number<kFormat>) {
    if constexpr (is_coded(Format(kFormat))) {
      table.matmul[kFormat] = matmul_coded<Format(kFormat)>;
    } else if constexpr (is_quantized(Format(kFormat))) {
      table.matmul[kFormat] = matmul_quantized<kernel_format(Format(kFormat))>;
    }
  };
  for (int format = 0; format < kNumFormats; ++format) with_number<kNumFormats - 1>(format, add);
}

}  // namespace argosy

#endif
