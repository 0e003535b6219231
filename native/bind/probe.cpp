// probe.cpp: binds the probes that measure this machine.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bind/bind.h"
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
      "ask_ahead_probe",
      [](int threads, const Name& instruction_set) {
        return AskAheadName(ask_ahead_probe(kernels_named(instruction_set), threads).name);
      },
      "threads"_a, "instruction_set"_a = nb::none(), Unlocked(), R"(
    The `ask_ahead` with which this machine reads the weights of one token fastest; off on a tie.

    It takes some tens of milliseconds, and 8 MiB of memory while it runs. Without AVX-512 it measures nothing.

    Raises:
        ValueError: threads below 1.   MemoryError: not enough memory.
        RuntimeError: the system refuses to start a thread.)");
  m.def(
      "int8_probe",
      [](int threads, const Name& instruction_set) {
        return int8_probe(kernels_named(instruction_set), threads);
      },
      "threads"_a, "instruction_set"_a = nb::none(), Unlocked(), R"(
    Integer operations per second of the instruction that q4 products use; a multiply-add counts as two.)");
}

}  // namespace argosy
