// kernel_table.cpp: chooses the instruction set.

#include "kernels/kernel_table.h"

#include <stdexcept>
#include <string_view>

#include "kernels/encoder_args.h"
#include "kernels/matmul_args.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace argosy {

extern const KernelTable kPlainKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
void add_vnni_products(KernelTable& table);
void add_vbmi_products(KernelTable& table);
void add_gfni_products(KernelTable& table);
void add_bf16_encoders(KernelTable& table);
void add_amx_products(KernelTable& table);
void add_amx_attention(KernelTable& table);
void add_amx_float_products(KernelTable& table);
void add_amx_encoders(KernelTable& table);
#endif

namespace {

#if defined(__x86_64__)
// Whether this build has the code for a set or an extension: one for a single processor leaves out what that
// lacks (CMakeLists.txt).
consteval bool is_built(const std::string_view unit) {
  const std::string_view left_out = ARGOSY_LEFT_OUT;
  for (size_t begin = 0; begin < left_out.size();) {
    const size_t end = left_out.find(' ', begin);
    if (left_out.substr(begin, end - begin) == unit) return false;
    begin = end + 1;
  }
  return true;
}

// Linux is asked once for permission, which holds for all threads of the process
// (Documentation/arch/x86/xstate.rst). It refuses if a thread's signal stack is too small for the registers.
const char* request_amx() {
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return "absent";
  const bool has_others = (ecx & bit_GFNI) != 0 && __builtin_cpu_supports("avx512bf16");
  if ((edx & kTileBits) != kTileBits || !has_others) return "absent";
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "usable";
#endif
  return "refused";
}

bool may_use_amx() { return std::string(amx_state()) == "usable"; }

bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni) != 0;
}

const KernelTable& avx2_kernels() {
  static const KernelTable with_extensions = [] {
    KernelTable table = kAvx2Kernels;
    if constexpr (is_built("avx2_vnni")) {
      if (has_avx_vnni()) add_vnni_products(table);
    }
    return table;
  }();
  return with_extensions;
}

const KernelTable& avx512_kernels() {
  static const KernelTable with_extensions = [] {
    KernelTable table = kAvx512Kernels;
    if constexpr (is_built("avx512_vbmi")) {
      if (__builtin_cpu_supports("avx512vbmi")) add_vbmi_products(table);
    }
    if constexpr (is_built("avx512_gfni")) {
      if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni")) add_gfni_products(table);
    }
    if constexpr (is_built("avx512_bf16")) {
      if (__builtin_cpu_supports("avx512bf16")) add_bf16_encoders(table);
    }
    if constexpr (is_built("amx")) {
      if (may_use_amx()) {
        add_amx_products(table);
        add_amx_encoders(table);
      }
    }
    return table;
  }();
  return with_extensions;
}

const KernelTable& amx_kernels() {
  static const KernelTable with_tiles = [] {
    KernelTable table = avx512_kernels();
    table.name = "amx";
    add_amx_attention(table);
    add_amx_float_products(table);
    return table;
  }();
  return with_tiles;
}
#endif

std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables = {&kPlainKernels};
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks (XGETBV) whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if constexpr (is_built("avx2")) {
    if (avx2) tables.push_back(&avx2_kernels());
  }
  if constexpr (is_built("avx512")) {
    if constexpr (is_built("amx")) {
      if (avx512 && may_use_amx()) tables.push_back(&amx_kernels());
    }
    if (avx512) tables.push_back(&avx512_kernels());
  }
#endif
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> all = runnable_tables();
  return all;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const KernelTable* table : tables()) names.push_back(table->name);
  return names;
}

const KernelTable& kernel_table(const std::string& name) {
  std::string known;
  for (const KernelTable* table : tables()) {
    if (table->name == name) return *table;
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("this CPU does not support instruction set '" + name +
                              "'; supported: " + known);
}

const KernelTable& best_kernels() { return *tables().back(); }

namespace {

// The largest of(table) of all instruction sets here.
template <class Of>
int64_t largest(const Of& of) {
  int64_t most = 0;
  for (const KernelTable* table : tables()) {
    const int64_t found = of(*table);
    most = found > most ? found : most;
  }
  return most;
}

}  // namespace

int64_t most_attention_floats(int64_t head_dim, int64_t value_dim) {
  return largest([=](const KernelTable& table) { return table.attention_floats(head_dim, value_dim); });
}

int64_t most_attention_queries() {
  return largest([](const KernelTable& table) { return table.most_queries; });
}

int64_t most_latent_floats(int64_t dim, int64_t value_dim) {
  return largest([=](const KernelTable& table) { return table.latent_floats(dim, value_dim); });
}

int64_t most_latent_columns() {
  return largest([](const KernelTable& table) { return table.most_columns; });
}

const char* amx_state() {
#if defined(__x86_64__)
  static const char* const state = request_amx();
  return state;
#else
  return "absent";
#endif
}

}  // namespace argosy
