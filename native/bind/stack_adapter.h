// stack_adapter.h: the adapter of a Stack, made of matrices that Python owns.
#pragma once

#include <memory>

#include "ops/stack_adapter.h"

namespace argosy {

struct BoundStackAdapter {
  std::shared_ptr<StackAdapter> adapter = std::make_shared<StackAdapter>();
};

}  // namespace argosy
