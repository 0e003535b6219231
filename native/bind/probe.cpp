// probe.cpp: binds the probes that measure this machine.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind/bind.h"
#include "bind/matrix.h"
#include "ops/machine_probe.h"

namespace argosy {

using namespace nb::literals;

void bind_probe(nb::module_& m) {
  using Name = std::optional<std::string>;
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "memory_probe",
      [](int threads, int64_t nbytes, const Name& instruction_set) {
        return memory_probe(kernels_named(instruction_set), threads, nbytes);
      },
      "threads"_a, "nbytes"_a, "instruction_set"_a = nb::none(), Unlocked(), R"(
    Bytes per second at which `threads` threads together read `nbytes` on huge pages with the widest loads.

    Takes `nbytes` of memory while it runs. If that fits the last-level cache, it measures the cache.

    Raises:
        ValueError: threads below 1, or less than 4 MiB per thread.   MemoryError: not enough memory.)");
  m.def(
      "product_probe",
      [](int threads, const std::vector<std::tuple<FormatName, int64_t, NamedTuning>>& trials, int64_t nbytes,
         int passes, const Name& instruction_set) {
        std::vector<Trial> parsed;
        for (const auto& [format, num_tokens, tuning] : trials)
          parsed.push_back({parse_format(format), num_tokens, parse_tuning(tuning)});
        const nb::gil_scoped_release released;
        return product_probe(kernels_named(instruction_set), threads, parsed, nbytes, passes);
      },
      "threads"_a, "trials"_a, "nbytes"_a, "passes"_a, "instruction_set"_a = nb::none(), R"(
    Bytes of weights per second that products read, for each trial: a quantised format, tokens, and a tuning.

    The weights are in no cache, and the best of `passes` passes counts; the trials take turns. A pass over 8 MiB takes
    one to three milliseconds. Takes `nbytes` of memory while it runs, and up to a fifth more for 32 tokens.

    Raises:
        ValueError: threads below 1, a format that is not quantised, tokens outside 1 to 32, nbytes outside 1 MiB to
            1 GiB, or passes outside 1 to 1000.
        MemoryError: not enough memory.   RuntimeError: the system refuses to start a thread.)");
  m.def(
      "int8_probe",
      [](int threads, const Name& instruction_set) {
        return int8_probe(kernels_named(instruction_set), threads);
      },
      "threads"_a, "instruction_set"_a = nb::none(), Unlocked(), R"(
    Integer operations per second of the instruction that q4 products use; a multiply-add counts as two.)");
}

}  // namespace argosy
