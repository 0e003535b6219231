// isa_plain.cpp: the references, compiled for any CPU. They define the result; the other instruction sets are
// tested against them.

#define ARGOSY_VECTOR 0
#include "kernels/all_kernels.h"

namespace argosy {
extern const KernelTable kPlainKernels;
constinit const KernelTable kPlainKernels = kernel_table_named("plain");
}  // namespace argosy
