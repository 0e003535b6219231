// isa_avx512_gfni.cpp: products with i-quants for AVX-512 with VBMI and GFNI (Intel since Ice Lake, AMD since
// Zen 4). Results have the same bits as those of isa_avx512.cpp.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 1
#include "kernels/quantized_tile_avx512.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {
// As in isa_avx512.cpp.
constexpr int one_panel_tokens(Format) { return 8; }
constexpr int two_panels_tokens(Format format) { return quant_format(format).parts() == 2 ? 4 : 6; }
constexpr bool kHasTilesWithoutPrefetch = false;
}  // namespace
}  // namespace argosy

#include "kernels/iq_vbmi.h"
#include "kernels/kernel_table.h"

namespace argosy {

void add_gfni_products(KernelTable& table);
void add_gfni_products(KernelTable& table) {
  const auto add = [&]<int kFormat>(Number<kFormat>) {
    if constexpr (is_iq(Format(kFormat))) table.matmul[kFormat] = matmul_coded<Format(kFormat)>;
  };
  for (int format = 0; format < kNumFormats; ++format) with_number<kNumFormats - 1>(format, add);
}

}  // namespace argosy

#endif
