// start_threads.h: start all threads, or start none and throw.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace argosy {

constexpr int kMostThreads = 1024;  // per kind; a higher count is a mistake

// Throws std::invalid_argument unless `count` is 1 to kMostThreads; `name` names it in the message.
void require_threads(const std::string& name, int64_t count);

// Starts threads that run body(0), body(1) ... body(count - 1). If the system refuses one, calls `stop`,
// joins the running threads and throws std::runtime_error with the number of started threads and the limits
// to check.
std::vector<std::thread> start_threads(int count, const std::function<void(int)>& body,
                                       const std::function<void()>& stop);

}  // namespace argosy
