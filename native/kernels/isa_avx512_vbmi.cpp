// isa_avx512_vbmi.cpp: products with FP8 weights for AVX-512 with VBMI, which looks up 64 bytes in a table of
// 128 at once. Results have the same bits as those of isa_avx512.cpp.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 1
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {
// The same tiles as in isa_avx512.cpp, with wider conversion.
constexpr int kFloatTileRows = 4, kFloatTileTokens = 6, kFloatRowsAlone = 4;
constexpr int kF8RowsAlone = 4, kF8VecsOfFewTokens = 4;
}  // namespace
}  // namespace argosy

#include "kernels/kernel_table.h"
#include "kernels/matmul_f8.h"

namespace argosy {
void add_vbmi_products(KernelTable& table);
void add_vbmi_products(KernelTable& table) {
  table.matmul[int(Format::f8)] = matmul_f8<Format::f8>;
  table.matmul[int(Format::f8_row)] = matmul_f8<Format::f8_row>;
  table.matmul[int(Format::f8_32)] = matmul_f8<Format::f8_32>;
  table.matmul[int(Format::mxfp8)] = matmul_f8<Format::mxfp8>;
}
}  // namespace argosy

#endif
