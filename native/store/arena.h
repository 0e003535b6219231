// arena.h: one private block of memory for weights.
//
// Pages appear when they are first written, so a large arena costs nothing before it is used. Huge pages are
// asked for: reads into 2 MiB pages were measured twice as fast as into ordinary ones.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>

namespace argosy {

// The system would not give the memory; Python sees a MemoryError with this sentence.
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

  // What gives pages to all of it, from its beginning on, on a thread that has time: the first write to a
  // huge page of a virtual machine may take two milliseconds. Ends early once the arena is closed.
  std::function<void()> populating() const;

  uint8_t* data();  // aligned to kAlignment, zero until written; throws std::invalid_argument after close()
  size_t size() const { return size_; }

  // Whoever keeps a pointer into the arena keeps this beside it: close() lets go of the memory, and it goes
  // back to the system with its last holder.
  std::shared_ptr<const void> hold() const { return mapping_; }
  void close() {
    is_wanted_->store(false);
    mapping_.reset();
  }
  bool is_closed() const { return mapping_ == nullptr; }

 private:
  size_t size_;
  std::shared_ptr<uint8_t> mapping_;
  std::shared_ptr<std::atomic<bool>> is_wanted_ = std::make_shared<std::atomic<bool>>(true);
};

}  // namespace argosy
