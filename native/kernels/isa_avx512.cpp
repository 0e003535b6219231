// isa_avx512.cpp: the kernels for AVX-512 with VNNI.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 0
#include "kernels/quantized_tile_avx512.h"
#include "kernels/vector_avx512.h"

namespace argosy {
namespace {
// Tiles that fill the 32 registers.
constexpr int kFloatTileRows = 4, kFloatTileTokens = 6, kFloatRowsAlone = 4;
constexpr int kF8RowsAlone = 4, kF8VecsOfFewTokens = kF8Vecs;
constexpr int one_panel_tokens(Format) { return 8; }
constexpr int two_panels_tokens(Format format) {
  return takes_both_bytes(format) || quant_format(format).parts() == 2 ? 4 : 6;
}
constexpr bool kHasTilesWithoutPrefetch = false;
constexpr int kScoreQueries = 8, kScoreTiles = 2, kValueQueries = 4;
constexpr int kLatentTile = 16;
constexpr int kAttendTile = 6, kAttendVecs = 4;
}  // namespace
}  // namespace argosy

#include "kernels/iq_avx512.h"
// After the products that it uses.
#include "kernels/all_kernels.h"

namespace argosy {
extern const KernelTable kAvx512Kernels;
constinit const KernelTable kAvx512Kernels = kernel_table_named("avx512");
}  // namespace argosy

#endif
