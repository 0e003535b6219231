// isa_avx512_bf16.cpp: products of encoders for AVX-512 with BF16 (Zen 4, Cooper Lake, Sapphire Rapids and
// later).

#if defined(__x86_64__)

#define ARGOSY_VECTOR 1
#define ARGOSY_AVX512 1
#define ARGOSY_VBMI 0
#define ARGOSY_AMX 0
#include "kernels/attend_bf16.h"
#include "kernels/linear_bf16.h"
#include "kernels/vector_avx512.h"

namespace argosy {
void round_to_panel_bf16(const PanelArgs& args);
void round_to_panel_bf16(const PanelArgs& args) { round_to_panel(args); }
void linear_panel_bf16(const LinearArgs& args);
void linear_panel_bf16(const LinearArgs& args) { linear_panel(args); }
void round_keys_bf16(const RoundKeysArgs& args);
void round_keys_bf16(const RoundKeysArgs& args) { round_keys(args); }
void attend_rounded_bf16(const AttendRoundedArgs& args);
void attend_rounded_bf16(const AttendRoundedArgs& args) { attend_rounded(args); }
}  // namespace argosy

#endif
