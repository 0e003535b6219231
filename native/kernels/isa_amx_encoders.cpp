// isa_amx_encoders.cpp: products of encoders on the tiles of AMX (Sapphire Rapids and later), for the sets
// `avx512` and `amx`. What they round, and to what, is as in isa_avx512_bf16.cpp; the order of sums differs.

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 0
#define ARGOSY_AMX 1
#include "kernels/attend_bf16.h"
#include "kernels/kernel_table.h"
#include "kernels/linear_bf16.h"
#include "kernels/vector_avx512.h"

namespace argosy {

void add_amx_encoders(KernelTable& table);
void add_amx_encoders(KernelTable& table) {
  table.linear_panel = linear_panel;
  table.attend_rounded = attend_rounded;
}

}  // namespace argosy

#endif
