// arena.h: one private block of memory for weights.
//
// Pages appear when they are first written, so a large arena costs nothing until it is used. The arena
// requests huge pages: reads into 2 MiB pages were measured to be twice as fast as reads into ordinary pages.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "store/foreground.h"

namespace argosy {

// The system refused to provide the memory. Python sees a MemoryError with this message.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

class Arena {
 public:
  static constexpr size_t kAlignment = size_t{2} << 20;

  explicit Arena(size_t nbytes);

  // Returns a function that populates all pages that were not yet, from the first to the last. Call it on an
  // idle thread: the first write to a huge page of a virtual machine may take two milliseconds. It returns
  // early once the arena is closed, and populates nothing beyond the arena's size at any moment. It gives way
  // to `foreground`, if there is one.
  std::function<void()> populating(std::shared_ptr<Foreground> foreground = nullptr) const;

  // Uses only the first `nbytes` from now on, at most what the arena was made with. The pages beyond return
  // to the system at once, and are zero if the arena grows again. The caller makes sure that nothing uses
  // them. Throws std::invalid_argument if `nbytes` is larger, or after close().
  void resize(size_t nbytes);

  // Gives whole huge pages between two offsets back to the system: those are zero when they are next read.
  // Throws std::invalid_argument after close().
  void discard(size_t begin, size_t end);
  // How many bytes discard() gives back.
  static size_t discarded_bytes(size_t begin, size_t end);

  uint8_t* data();  // aligned to kAlignment, zero until written; throws std::invalid_argument after close()
  size_t size() const { return size_; }

  // Code that keeps a pointer into the arena also keeps this handle. close() releases the arena's own
  // reference, and the memory returns to the system with the last handle.
  std::shared_ptr<const void> hold() const { return mapping_; }
  void close();
  bool is_closed() const { return mapping_ == nullptr; }

 private:
  // How far threads have populated the arena, and how far they may.
  struct Populated {
    std::mutex mutex;
    size_t done = 0, until;  // guarded by mutex; `done` is a multiple of kAlignment
    // The number of threads that wait for the mutex. A populating thread would lock it again at once, so it
    // waits until this is 0.
    std::atomic<int> num_waiting = 0;

    std::unique_lock<std::mutex> lock_first();
  };

  size_t size_;
  size_t most_;
  std::shared_ptr<uint8_t> mapping_;
  std::shared_ptr<Populated> populated_ = std::make_shared<Populated>();
};

}  // namespace argosy
