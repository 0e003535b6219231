// stream_socket.h: a connected stream socket that never blocks, and a descriptor that wakes a thread from
// poll.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace argosy {

// Parts of memory for one call to the kernel, `most` bytes in all. Neighbours become one part. Nothing may be
// added when it is full.
class Parts {
 public:
  static constexpr size_t kMost = 64;

  explicit Parts(int64_t most = std::numeric_limits<int64_t>::max()) : left_(most) {}

  bool is_full() const { return count_ == kMost || left_ == 0; }
  bool is_empty() const { return count_ == 0; }
  int64_t nbytes() const { return nbytes_; }
  std::span<iovec> span() { return {parts_.data(), count_}; }

  // Returns how many of the bytes it took.
  int64_t add(const void* memory, int64_t nbytes) {
    auto* at = static_cast<uint8_t*>(const_cast<void*>(memory));
    nbytes = std::min(nbytes, left_);
    left_ -= nbytes;
    nbytes_ += nbytes;
    if (count_ > 0) {
      iovec& last = parts_[count_ - 1];
      if (static_cast<uint8_t*>(last.iov_base) + last.iov_len == at) {
        last.iov_len += size_t(nbytes);
        return nbytes;
      }
    }
    parts_[count_++] = {at, size_t(nbytes)};
    return nbytes;
  }

  // Removes the first `nbytes`.
  void remove(int64_t nbytes) {
    nbytes_ -= nbytes;
    size_t num_gone = 0;
    while (num_gone < count_ && nbytes >= int64_t(parts_[num_gone].iov_len)) {
      nbytes -= int64_t(parts_[num_gone++].iov_len);
    }
    std::copy(parts_.begin() + num_gone, parts_.begin() + count_, parts_.begin());
    count_ -= num_gone;
    if (count_ == 0) return;
    parts_[0].iov_base = static_cast<uint8_t*>(parts_[0].iov_base) + nbytes;
    parts_[0].iov_len -= size_t(nbytes);
  }

 private:
  std::array<iovec, kMost> parts_;
  size_t count_ = 0;
  int64_t left_, nbytes_ = 0;
};

class StreamSocket {
 public:
  // Takes the descriptor over. Throws std::invalid_argument if it is not a stream socket; then it stays the
  // caller's. TCP gets TCP_NODELAY and keepalive, so that the kernel notices a machine that has gone.
  explicit StreamSocket(int fd);
  ~StreamSocket();
  StreamSocket(const StreamSocket&) = delete;
  StreamSocket& operator=(const StreamSocket&) = delete;

  int fd() const { return fd_; }

  // Return the bytes moved; 0: none can be moved now. Throw LinkError if the connection has ended.
  int64_t send(Parts& parts);
  int64_t receive(Parts& parts);

  // Ends the connection; wakes threads that poll it. Any thread may call it.
  void shutdown();

 private:
  int fd_;
};

class WakeUp {
 public:
  WakeUp();  // throws std::system_error
  ~WakeUp();
  WakeUp(const WakeUp&) = delete;
  WakeUp& operator=(const WakeUp&) = delete;

  int fd() const { return fd_; }  // readable after ring(), until clear()
  void ring();
  void clear();

 private:
  int fd_;
};

}  // namespace argosy
