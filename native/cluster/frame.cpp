#include "cluster/frame.h"

#include "ops/checked_size.h"

namespace argosy {

void LinkLimits::check() const {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto check_size = [](const char* name, int64_t found, int64_t lowest, int64_t highest) {
    if (found >= lowest && found <= highest) return;
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(found) + ", expected " +
                                std::to_string(lowest) + " to " + std::to_string(highest));
  };
  check_size("hidden", hidden, 1, kMost);
  check_size("most_rows", most_rows, 1, kMost);
  check_size("most_assignments", most_assignments, 1, kMost);
  check_size("layers in num_experts", int64_t(num_experts.size()), 1, UINT16_MAX + 1);
  for (const int32_t count : num_experts) check_size("experts of a layer", count, 0, 1 << 20);
  check_size("most experts of a layer", most_experts(), 1, 1 << 20);
  checked_product("the outputs of a request", {most_assignments, row_bytes()});
}

}  // namespace argosy
