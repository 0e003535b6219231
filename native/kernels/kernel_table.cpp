// kernel_table.cpp: chooses the instruction set.

#include "kernels/kernel_table.h"

#include <stdexcept>

namespace argosy {

extern const KernelTable kPlainKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
void matmul_f8_vbmi(const MatmulArgs& args);
void round_to_panel_bf16(const PanelArgs& args);
void linear_panel_bf16(const LinearArgs& args);
void round_keys_bf16(const RoundKeysArgs& args);
void attend_rounded_bf16(const AttendRoundedArgs& args);
#endif

namespace {

#if defined(__x86_64__)
const KernelTable& avx512_kernels() {
  static const KernelTable with_extensions = [] {
    KernelTable table = kAvx512Kernels;
    if (__builtin_cpu_supports("avx512vbmi")) table.matmul[int(Format::f8)] = matmul_f8_vbmi;
    if (__builtin_cpu_supports("avx512bf16")) {
      table.round_to_panel = round_to_panel_bf16;
      table.linear_panel = linear_panel_bf16;
      table.round_keys = round_keys_bf16;
      table.attend_rounded = attend_rounded_bf16;
    }
    return table;
  }();
  return with_extensions;
}
#endif

std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables = {&kPlainKernels};
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks (XGETBV) whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&kAvx2Kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    tables.push_back(&avx512_kernels());
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

AskAhead ask_ahead_named(const std::string& name) {
  std::string known;
  for (const AskAhead& each : kAskAheads) {
    if (each.name == name) return each;
    known += (known.empty() ? "" : ", ") + std::string(each.name);
  }
  throw std::invalid_argument("unknown ask_ahead '" + name + "'; known: " + known);
}

Tuning default_tuning() {
  const AskAhead one_level = ask_ahead_named("one_level");
  return {.ask_ahead = one_level, .few_ask_ahead = one_level};
}

}  // namespace argosy
