// The probes read and multiply all that they claim, with every instruction set.

#include "ops/machine_probe.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

void every_word_is_read() {
  alignas(64) uint64_t words[256];
  uint64_t expected = 0;
  for (uint64_t i = 0; i < 256; ++i) {
    words[i] = i * i * 0x9E3779B97F4A7C15u;
    expected += words[i];
  }
  for (const KernelTable* table : all_tables()) {
    CHECK_EQUAL(table->read_memory(reinterpret_cast<const uint8_t*>(words), sizeof words), expected);
  }
}

// More rounds give another sum: no round is left out.
void every_round_is_multiplied() {
  for (const KernelTable* table : all_tables()) {
    CHECK(table->multiply_int8(5) != table->multiply_int8(6));
    CHECK(table->int8_products_per_round > 0);
  }
  // Twelve sums of sixteen lanes; sum i begins at i, and each round adds 4 * 3 * -5.
  const std::vector<std::string> sets = instruction_sets();
  if (sets.back() == "avx512") {
    CHECK_EQUAL(int64_t(kernel_table("avx512").multiply_int8(7)),
                16 * 66 + int64_t{7} * 12 * 16 * 4 * 3 * -5);
  }
}

void probes_give_plausible_speeds() {
  for (const KernelTable* table : all_tables()) {
    for (const int threads : {1, 3}) {
      const double bytes_per_s = memory_probe(*table, threads, int64_t{16} << 20);
      CHECK(bytes_per_s > 1e7 && bytes_per_s < 1e13);
    }
  }
  const double ops_per_s = int8_probe(best_kernels(), 2);
  CHECK(ops_per_s > 1e7 && ops_per_s < 1e15);
  CHECK_THROWS(std::invalid_argument, memory_probe(plain(), 0, 1 << 24));
  CHECK_THROWS(std::invalid_argument, memory_probe(plain(), 1, (4 << 20) - 1));
  CHECK_THROWS(std::invalid_argument, int8_probe(plain(), 0));
}

void the_probe_of_asking_ahead_chooses_one_that_there_is() {
  for (const KernelTable* table : all_tables()) {
    for (const int threads : {1, 3, 9}) {
      const AskAhead chosen = ask_ahead_probe(*table, threads);
      CHECK_EQUAL(ask_ahead_named(chosen.name).into_l2, chosen.into_l2);
      if (table->name != std::string("avx512")) CHECK_EQUAL(std::string(chosen.name), "one_level");
    }
  }
  CHECK_THROWS(std::invalid_argument, ask_ahead_probe(best_kernels(), 0));
  CHECK_THROWS(std::invalid_argument, ask_ahead_named("three_levels"));
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  every_word_is_read();
  every_round_is_multiplied();
  probes_give_plausible_speeds();
  the_probe_of_asking_ahead_chooses_one_that_there_is();
  return check_result();
}
