// tuning.cpp: ways to prefetch by name, and the default.

#include "kernels/tuning.h"

#include <stdexcept>

namespace argosy {

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
