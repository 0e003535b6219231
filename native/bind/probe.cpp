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
      "threads"_a, "nbytes"_a, "instruction_set"_a = nb::none(), Unlocked());
  m.def(
      "ask_ahead_probe",
      [](int threads, const Name& instruction_set) {
        return AskAheadName(ask_ahead_probe(kernels_named(instruction_set), threads).name);
      },
      "threads"_a, "instruction_set"_a = nb::none(), Unlocked());
  m.def(
      "int8_probe",
      [](int threads, const Name& instruction_set) {
        return int8_probe(kernels_named(instruction_set), threads);
      },
      "threads"_a, "instruction_set"_a = nb::none(), Unlocked());
}

}  // namespace argosy
