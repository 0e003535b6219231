// isa_avx512_bf16.cpp: products of encoders for AVX-512 with BF16 (Zen 4, Cooper Lake, Sapphire Rapids and
// later).

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 0
#define ARGOSY_AMX 0
#include "kernels/attend_bf16.h"
#include "kernels/kernel_table.h"
#include "kernels/linear_bf16.h"
#include "kernels/vector_avx512.h"

namespace argosy {
void add_bf16_encoders(KernelTable& table);
void add_bf16_encoders(KernelTable& table) {
  table.round_to_panel = [](const PanelArgs& args) { round_to_panel(args); };
  table.linear_panel = linear_panel;
  table.round_keys = [](const RoundKeysArgs& args) { round_keys(args); };
  table.attend_rounded = attend_rounded;
}
}  // namespace argosy

#endif
