// experts.h: what the bindings of routed experts share with those of the stack.
#pragma once

#include <vector>

#include "bind/bind.h"
#include "ops/experts.h"

namespace argosy {

// A table that keeps alive the arrays behind its biases.
struct BoundExpertTable : ExpertTable {
  using ExpertTable::ExpertTable;
  std::vector<Array> biases;
};

}  // namespace argosy
