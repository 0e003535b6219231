// probe.cpp: binds the probes that measure this machine.

#include <nanobind/stl/string.h>

#include <string>

#include "bind/bind.h"
#include "ops/machine_probe.h"

namespace argosy {

using namespace nb::literals;

void bind_probe(nb::module_& m) {
  m.def("memory_probe", &memory_probe, "threads"_a, "nbytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "ask_ahead_probe", [](int threads) { return std::string(ask_ahead_probe(threads).name); }, "threads"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def("int8_probe", &int8_probe, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace argosy
