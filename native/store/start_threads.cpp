#include "store/start_threads.h"

#include <stdexcept>
#include <system_error>

namespace argosy {

void require_threads(const std::string& name, int64_t count) {
  if (count < 1 || count > kMostThreads) {
    throw std::invalid_argument(name + " is " + std::to_string(count) + ", expected 1 to " +
                                std::to_string(kMostThreads));
  }
}

std::vector<std::thread> start_threads(int count, const std::function<void(int)>& body,
                                       const std::function<void()>& stop) {
  std::vector<std::thread> threads;
  const auto end = [&] {  // destroying a thread without joining it would end the process
    stop();
    for (std::thread& thread : threads) thread.join();
  };
  try {
    threads.reserve(size_t(count));
    for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  } catch (const std::system_error& error) {
    end();
    throw std::runtime_error("only " + std::to_string(threads.size()) + " of " + std::to_string(count) +
                             " threads could be started: " + error.code().message() +
                             "; check the limits of the user (ulimit -u), the cgroup (pids.max) and memory "
                             "(ulimit -v)");
  } catch (...) {
    end();
    throw;
  }
  return threads;
}

}  // namespace argosy
