// start_threads.h: several threads, or an error and none.
#pragma once

#include <functional>
#include <thread>
#include <vector>

namespace argosy {

constexpr int kMostThreads = 1024;  // of one kind; more are a mistake

// Starts threads that run body(0), body(1) ... body(count - 1). If the system refuses one, calls `stop`,
// joins those that run and throws std::runtime_error, which says how many could be started and which limits
// there are.
std::vector<std::thread> start_threads(int count, const std::function<void(int)>& body,
                                       const std::function<void()>& stop);

}  // namespace argosy
