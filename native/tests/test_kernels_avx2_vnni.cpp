// Products with quantised weights have the same bits with AVX-VNNI as with AVX2 alone.

#include "tests/kernel_cases.h"

#if defined(__x86_64__)

namespace argosy {
extern const KernelTable kAvx2Kernels;  // without AVX-VNNI
}

namespace argosy::testing {
namespace {

// A processor with AVX-VNNI runs different versions of these products than one without.
void quantised_products_have_the_same_bits_with_and_without_avx_vnni() {
  const KernelTable& best = kernel_table("avx2");
  for (const Format format : kFormats) {
    if (!is_quantized(format)) continue;
    for (const int64_t size : {1, 100, 600}) {
      const int64_t cols = cols_of(format, size);
      const Weights w = Weights::random(format, 53, cols, 21, 1);
      // Largest and smallest codes, too.
      std::memset(w.bytes.get() + 1 + quant_format(format).quants_at(0), 0xFF, 32);
      for (const int64_t tokens : {1, 2, 3, 4, 9}) {
        const std::vector<float> x = normal(tokens * cols, 22);
        CHECK(same_bits(multiply(best, w.view, x, tokens), multiply(kAvx2Kernels, w.view, x, tokens)));
      }
    }
  }
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy;
  using namespace argosy::testing;
  if (!has_set("avx2") ||
      kernel_table("avx2").matmul[int(Format::q4)] == kAvx2Kernels.matmul[int(Format::q4)])
    return skip("AVX-VNNI");
  quantised_products_have_the_same_bits_with_and_without_avx_vnni();
  return check_result();
}

#else

int main() { return argosy::testing::skip("AVX-VNNI"); }

#endif
