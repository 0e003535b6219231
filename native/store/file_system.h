// file_system.h: the few file and clock calls that the store makes, behind one interface, so that a test can
// make the Nth read fail (tests/faulty_file_system.h).
//
//   RealFileSystem  the kernel's calls; decides whether a file is read with O_DIRECT
//   ReadQueue       reads that the kernel performs asynchronously, many at a time
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace argosy {

struct OpenFile {
  int handle = -1;
  int cached_handle = -1;              // for read_cached; -1: do not use the page cache
  std::vector<bool> cached_stretches;  // per kStretchBytes: whether the page cache held all of it at open
  int64_t size = 0;
  int64_t alignment = 1;       // required of the offset, length and memory address of every read
  bool is_direct = false;      // reads bypass the page cache
  bool drops_cache = false;    // drop the page cache after each read
  std::string why_not_direct;  // empty when is_direct
};

struct AsyncRead {
  int handle;
  uint8_t* memory;
  size_t nbytes;
  int64_t offset;
  uint64_t tag;
};

struct AsyncResult {
  uint64_t tag;
  ssize_t got;  // as returned by FileSystem::pread
};

// Only for files whose reads bypass the page cache: a read of any other file would run during submit. Any
// thread may submit, and one thread may wait at the same time. Destroy the queue only when no read is in
// flight.
class ReadQueue {
 public:
  virtual ~ReadQueue() = default;
  // Starts reads in order. Returns how many the kernel accepted; the rest have not started.
  virtual size_t submit(std::span<const AsyncRead> reads) = 0;
  // Waits until at least one read ends; returns the number of `results`. At least one read must be in flight.
  virtual size_t wait(std::span<AsyncResult> results) = 0;
};

class FileSystem {
 public:
  // The layout must not depend on how a file is read, so every read covers at least whole pages.
  static constexpr int64_t kMinAlignment = 4096;

  virtual ~FileSystem() = default;
  // Throws std::system_error. `direct` = false requests buffered reads.
  virtual OpenFile open(const std::string& path, bool direct) = 0;
  // Like pread(2), but errors are negative: returns bytes read, 0 at the end of the file, or -errno.
  virtual ssize_t pread(int handle, void* buffer, size_t nbytes, int64_t offset) = 0;
  // Longer than any read-ahead; the largest seen is 8 MiB.
  static constexpr int64_t kStretchBytes = int64_t{16} << 20;

  // Like pread, but reads only from the page cache. It succeeds if the cache holds all of [offset, offset +
  // nbytes) and if, at open, it held every stretch that this range touches and the next one. Nothing is read
  // from the drive, and nothing enters the page cache. -EAGAIN: the cache does not hold the whole range. Any
  // other error: the kernel or file system cannot tell, so do not ask again.
  virtual ssize_t read_cached(const OpenFile& file, void* buffer, size_t nbytes, int64_t offset) = 0;
  virtual void drop_cache(int handle, int64_t offset, int64_t nbytes) = 0;
  // For `depth` reads in flight. Null if there is no queue; then threads must make the reads.
  virtual std::unique_ptr<ReadQueue> read_queue(int depth) = 0;
  virtual void close(const OpenFile& file) = 0;
  virtual double seconds() = 0;  // from a monotonic clock
};

class RealFileSystem : public FileSystem {
 public:
  // `has_queue` = false simulates a system without asynchronous reads.
  explicit RealFileSystem(bool has_queue = true) : has_queue_(has_queue) {}

  OpenFile open(const std::string& path, bool direct) override;
  ssize_t pread(int handle, void* buffer, size_t nbytes, int64_t offset) override;
  ssize_t read_cached(const OpenFile& file, void* buffer, size_t nbytes, int64_t offset) override;
  void drop_cache(int handle, int64_t offset, int64_t nbytes) override;
  std::unique_ptr<ReadQueue> read_queue(int depth) override;
  void close(const OpenFile& file) override;
  double seconds() override;

 private:
  bool has_queue_;
};

}  // namespace argosy
