// Products with FP8 weights have the same bits with VBMI as with AVX-512 alone.

#include "tests/kernel_cases.h"

#if defined(__x86_64__)

namespace argosy {
extern const KernelTable kAvx512Kernels;  // without VBMI
}

namespace argosy::testing {
namespace {

// A processor with VBMI runs different versions of these products than one without.
void f8_products_have_the_same_bits_with_and_without_vbmi() {
  for (const Format format : kF8Formats)
    for (const int64_t cols : {1, 63, 64, 127, 128, 129, 700, 5120}) {
      const Weights w = Weights::random(format, 150, cols, 21, 1);
      for (const int64_t tokens : {1, 2, 3, 6, 7, 30}) {
        // Numbers small enough that some of the products are subnormal.
        for (const float scale : {1.0f, 1e-36f}) {
          const std::vector<float> x = normal(tokens * cols, 22, scale);
          CHECK(same_bits(multiply(kernel_table("avx512"), w.view, x, tokens),
                          multiply(kAvx512Kernels, w.view, x, tokens)));
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
      kernel_table("avx512").matmul[int(Format::f8)] == kAvx512Kernels.matmul[int(Format::f8)])
    return skip("AVX-512 with VBMI");
  f8_products_have_the_same_bits_with_and_without_vbmi();
  return check_result();
}

#else

int main() { return argosy::testing::skip("AVX-512 with VBMI"); }

#endif
