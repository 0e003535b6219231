// reads.h: what Python calls the urgency and the errors of a read.
#pragma once

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>

#include "bind/bind.h"
#include "store/store.h"

namespace argosy {

using UrgencyName = Named<std::string, "Urgency">;

// Python checks for ^C this often while it waits for the drive.
constexpr std::chrono::milliseconds kSignalInterval{100};

constexpr const char* kUrgencies[kNumUrgencies] = {"now", "soon", "maybe"};

inline Urgency parse_urgency(const std::string& name) {
  for (int i = 0; i < kNumUrgencies; ++i) {
    if (name == kUrgencies[i]) return Urgency(i);
  }
  throw std::invalid_argument("unknown urgency '" + name + "'; known: now, soon, maybe");
}

constexpr std::pair<ReadError, const char*> kReadErrors[] = {{ReadError::io, "io"},
                                                             {ReadError::checksum, "checksum"},
                                                             {ReadError::short_file, "short"},
                                                             {ReadError::not_finite, "not finite"},
                                                             {ReadError::dropped, "dropped"}};

// None: there is no error.
inline std::optional<std::string> error_kind(ReadError error) {
  for (const auto& [known, name] : kReadErrors) {
    if (known == error) return name;
  }
  return std::nullopt;
}

}  // namespace argosy
