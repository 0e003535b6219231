// isa_avx2.cpp: the kernels for AVX2 with FMA and F16C.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 0
#define ARGOSY_AVX_VNNI 0
#include "kernels/quantized_tile_avx2.h"
#include "kernels/vector_avx2.h"

namespace argosy {
namespace {
// Tiles that fill the 16 registers.
constexpr int kFloatTileRows = 2, kFloatTileTokens = 4, kFloatRowsAlone = 4;
constexpr int kF8RowsAlone = 4, kF8VecsOfFewTokens = kF8Vecs;
// The most tokens whose sums fit in the 16 registers.
constexpr int one_panel_tokens(Format format) { return takes_both_bytes(format) ? 2 : 4; }
// A loop that may prefetch spends registers and instructions on addresses, so tiles that never prefetch have
// a loop of their own.
constexpr bool kHasTilesWithoutPrefetch = true;
constexpr int kScoreQueries = 4, kScoreTiles = 1, kValueQueries = 2;
constexpr int kLatentTile = 6;
constexpr int kAttendTile = 6, kAttendVecs = 2;
}  // namespace
}  // namespace argosy

#include "kernels/iq_avx2.h"
// After the products that it uses.
#include "kernels/all_kernels.h"

namespace argosy {
extern const KernelTable kAvx2Kernels;
constinit const KernelTable kAvx2Kernels = kernel_table_named("avx2");
}  // namespace argosy

#endif
