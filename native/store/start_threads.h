// start_threads.h: several threads, or an error and none.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace argosy {

constexpr int kMostThreads = 1024;  // of one kind; more are a mistake

// Throws std::invalid_argument unless `count` is 1 to kMostThreads; `name` is the caller's word for it.
void require_threads(const std::string& name, int64_t count);

// Starts threads that run body(0), body(1) ... body(count - 1). If the system refuses one, calls `stop`,
// joins those that run and throws std::runtime_error, which says how many could be started and which limits
// there are.
std::vector<std::thread> start_threads(int count, const std::function<void(int)>& body,
                                       const std::function<void()>& stop);

}  // namespace argosy
