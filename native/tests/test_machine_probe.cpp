// The probes read and multiply all that they claim, with every instruction set.

#include "kernels/matmul_args.h"
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

void a_probe_times_every_trial() {
  const Tuning apart = {.ask_ahead = ask_ahead_named("two_levels"), .two_panels_from = 2};
  const std::vector<Trial> trials = {{Format::q4, 1, {}}, {Format::q2_k, 1, apart}, {Format::q8, 32, apart}};
  for (const KernelTable* table : all_tables()) {
    if (table == &plain()) continue;  // it takes seconds
    for (const int threads : {1, 3}) {
      const std::vector<double> found = product_probe(*table, threads, trials, kFewestProbeBytes, 1);
      CHECK_EQUAL(found.size(), trials.size());
      for (const double bytes_per_s : found) CHECK(bytes_per_s > 1e6 && bytes_per_s < 1e13);
    }
  }
  CHECK(product_probe(plain(), 1, {}, kFewestProbeBytes, 1).empty());
  const auto refused = [&](const Trial& trial, int threads, int64_t nbytes, int passes) {
    CHECK_THROWS(std::invalid_argument, product_probe(plain(), threads, {trial}, nbytes, passes));
  };
  refused(trials[0], 0, kFewestProbeBytes, 1);
  refused(trials[0], 1, kFewestProbeBytes - 1, 1);
  refused(trials[0], 1, kMostProbeBytes + 1, 1);
  refused(trials[0], 1, kFewestProbeBytes, 0);
  refused({Format::f32, 1, {}}, 1, kFewestProbeBytes, 1);
  refused({Format::q4, 0, {}}, 1, kFewestProbeBytes, 1);
  refused({Format::q4, kMostProbeTokens + 1, {}}, 1, kFewestProbeBytes, 1);
  CHECK_THROWS(std::invalid_argument, ask_ahead_named("three_levels"));
}

// Wrong for two_panels_from = 3.
void wrong_with_three(const MatmulArgs& args) {
  plain().matmul[int(Format::q4)](args);
  if (args.tuning.two_panels_from == 3) args.y[0] += 1.0f;
}

void a_trial_with_another_result_has_no_speed() {
  KernelTable table = plain();
  table.matmul[int(Format::q4)] = wrong_with_three;
  const Tuning wrong = {.two_panels_from = 3};
  const std::vector<Trial> trials = {
      {Format::q4, 1, {}}, {Format::q4, 2, {}}, {Format::q4, 2, wrong}, {Format::q4, 1, {}}};
  const std::vector<double> found = product_probe(table, 1, trials, kFewestProbeBytes, 1);
  CHECK(found[0] > 0 && found[1] > 0 && found[3] > 0);
  CHECK_EQUAL(found[2], 0.0);
}

}  // namespace
}  // namespace argosy::testing

int main() {
  using namespace argosy::testing;
  every_word_is_read();
  every_round_is_multiplied();
  probes_give_plausible_speeds();
  a_probe_times_every_trial();
  a_trial_with_another_result_has_no_speed();
  return check_result();
}
