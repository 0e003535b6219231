// checked_size.h: multiplies sizes from outside without overflow.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace argosy {

inline constexpr int64_t kMostBytes = int64_t{1} << 62;

// Throws std::invalid_argument for a factor below 1 or a product above kMostBytes; `what` names the object in
// the message.
inline int64_t checked_product(const std::string& what, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (factor < 1)
      throw std::invalid_argument(what + " has a size of " + std::to_string(factor) + ", expected 1 or more");
    if (product > kMostBytes / factor) throw std::invalid_argument(what + " would take more than 2^62 bytes");
    product *= factor;
  }
  return product;
}

}  // namespace argosy
