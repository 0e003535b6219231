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

#include "kernels/matmul_f8.h"

namespace argosy {
void matmul_f8_vbmi(const MatmulArgs& args);
void matmul_f8_vbmi(const MatmulArgs& args) { matmul_f8(args); }
}  // namespace argosy

#endif
