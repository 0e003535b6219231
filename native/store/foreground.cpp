#include "store/foreground.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <stdexcept>
#include <string>

namespace argosy {
namespace {

constexpr double kLongestSeconds = 1;  // whoever closes what is paused waits no longer than this

}  // namespace

Foreground::Foreground(double share) : share_(share) {
  if (!(share > 0 && share <= 1)) {
    throw std::invalid_argument("share is " + std::to_string(share) + ", expected more than 0 and at most 1");
  }
}

void Foreground::begin() {
  std::lock_guard lock(mutex_);
  ++num_running_;
}

void Foreground::end() {
  std::lock_guard lock(mutex_);
  if (num_running_ > 0 && --num_running_ == 0) is_over_.notify_all();
}

void Foreground::give_way(double worked_seconds) {
  const double seconds = std::min(worked_seconds * (1 / share_ - 1), kLongestSeconds);
  if (!(seconds > 0)) return;  // nor if it is not a number
  std::unique_lock lock(mutex_);
  is_over_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return num_running_ == 0; });
}

double thread_seconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace argosy
