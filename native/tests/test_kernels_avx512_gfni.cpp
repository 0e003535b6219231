// Products with i-quants have the same bits with VBMI and GFNI as with AVX-512 alone.

#include "tests/kernel_cases.h"

#if defined(__x86_64__)

namespace argosy {
extern const KernelTable kAvx512Kernels;  // without VBMI and GFNI
}

namespace argosy::testing {
namespace {

// From one token to tiles of two panels; and rows so long that activations, or panels, are decoded in strips.
void i_quants_have_the_same_bits_with_and_without_gfni() {
  const KernelTable& best = kernel_table("avx512");
  for (const Format format : kFormats) {
    if (!is_quantized(format) || best.matmul[int(format)] == kAvx512Kernels.matmul[int(format)]) continue;
    for (const int64_t cols : {256, 2304, 12288}) {
      const Weights w = Weights::random(format, 53, cols, 21, 1);
      for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 12, 13, 30}) {
        const std::vector<float> x = normal(tokens * cols, 22);
        CHECK(same_bits(multiply(best, w.view, x, tokens), multiply(kAvx512Kernels, w.view, x, tokens)));
      }
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy;
  using namespace argosy::testing;
  if (!has_set("avx512") ||
      kernel_table("avx512").matmul[int(Format::iq2_xxs)] == kAvx512Kernels.matmul[int(Format::iq2_xxs)])
    return skip("AVX-512 with VBMI and GFNI");
  i_quants_have_the_same_bits_with_and_without_gfni();
  return check_result();
}

#else

int main() { return argosy::testing::skip("AVX-512 with VBMI and GFNI"); }

#endif
