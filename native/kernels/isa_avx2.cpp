// isa_avx2.cpp: the kernels for AVX2 with FMA and F16C.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 0
#include "kernels/quantized_tile_avx2.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {
// Tiles that fill the 16 registers.
constexpr int kFloatTileRows = 2, kFloatTileTokens = 4, kFloatRowsAlone = 4;
constexpr int kF8RowsAlone = 4, kF8VecsOfFewTokens = kF8Vecs;
// As many tokens as the 16 registers have sums for.
constexpr int one_panel_tokens(Format format) { return format == Format::q8 ? 2 : 4; }
// In a loop that may prefetch, addresses take registers and instructions.
constexpr bool kHasTilesWithoutPrefetch = true;
constexpr int kScoreQueries = 4, kScoreTiles = 1, kValueQueries = 2;
constexpr int kLatentTile = 6;
constexpr int kAttendTile = 6, kAttendVecs = 2;
}  // namespace
}  // namespace argosy

#include "kernels/all_kernels.h"

namespace argosy {
extern const KernelTable kAvx2Kernels;
constinit const KernelTable kAvx2Kernels = kernel_table_named("avx2");
}  // namespace argosy

#endif
