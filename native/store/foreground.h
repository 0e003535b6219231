// foreground.h: work that somebody waits for, and how work in the background gives way to it.
#pragma once

#include <condition_variable>
#include <mutex>

namespace argosy {

// Counts work in the foreground. All calls are safe from any thread.
//
// A low priority of threads would not do: such a thread may lose its core while it holds a lock that the
// foreground needs next, and a thread cannot raise its priority again. Here it pauses between two pieces of
// its work, and all of it gives way: cores, memory bandwidth and the drive.
class Foreground {
 public:
  // While there is work in the foreground, each thread in the background works for this part of the time,
  // above 0 and at most 1. Throws std::invalid_argument.
  explicit Foreground(double share);

  void begin();
  void end();

  // Call this after worked_seconds of work in the background, without holding a lock. Waits until there is no
  // work in the foreground, but no longer than the share demands, and never longer than a second.
  void give_way(double worked_seconds);

 private:
  const double share_;
  std::mutex mutex_;
  std::condition_variable is_over_;
  int num_running_ = 0;  // guarded by mutex_
};

// Seconds that the calling thread has had a core.
double thread_seconds();

}  // namespace argosy
