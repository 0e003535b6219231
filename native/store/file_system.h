// file_system.h: the few calls the store makes on files and the clock, behind one interface, so that a test
// can make the Nth read fail.
//
//   RealFileSystem    the kernel's calls; decides whether a file is read with O_DIRECT
//   FaultyFileSystem  another file system, with one fault put into it
//   ReadQueue         reads that the kernel carries out by itself, many at a time
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
  int cached_handle = -1;              // for read_cached; -1: the page cache is not asked
  std::vector<bool> cached_stretches;  // of kStretchBytes: wholly in the page cache when the file was opened
  int64_t size = 0;
  int64_t alignment = 1;       // of offset, length and memory of every read
  bool is_direct = false;      // past the page cache
  bool drops_cache = false;    // the page cache has to be dropped behind each read
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
  ssize_t got;  // as of FileSystem::pread
};

// Only for files that are read past the page cache: of others a read is carried out while it is submitted.
// Any thread may submit, and one wait, at the same time. It ends when no read is in flight any more.
class ReadQueue {
 public:
  virtual ~ReadQueue() = default;
  // Starts reads in their order. Returns how many the kernel took: the others have not begun.
  virtual size_t submit(std::span<const AsyncRead> reads) = 0;
  // Waits for the end of a read, at least; returns the number of `results`. One has to be in flight.
  virtual size_t wait(std::span<AsyncResult> results) = 0;
};

class FileSystem {
 public:
  // Layout must not depend on how a file can be read, so every file is read in whole pages at least.
  static constexpr int64_t kMinAlignment = 4096;

  virtual ~FileSystem() = default;
  // Throws std::system_error. `direct` false: buffered on purpose.
  virtual OpenFile open(const std::string& path, bool direct) = 0;
  // As pread(2), but with the error as a negative number: bytes read, 0 at the end of the file, or -errno.
  virtual ssize_t pread(int handle, void* buffer, size_t nbytes, int64_t offset) = 0;
  // More than any read-ahead; 8 MiB is the largest seen.
  static constexpr int64_t kStretchBytes = int64_t{16} << 20;

  // As pread, from the page cache alone, if that holds all of [offset, offset + nbytes) and, when the file
  // was opened, the whole stretches it lies in and one behind. Nothing is read from the drive, and nothing
  // comes into the page cache. -EAGAIN: it does not hold all of them. Any other error: kernel or file system
  // cannot say, and need not be asked again.
  virtual ssize_t read_cached(const OpenFile& file, void* buffer, size_t nbytes, int64_t offset) = 0;
  virtual void drop_cache(int handle, int64_t offset, int64_t nbytes) = 0;
  // For `depth` reads in flight; null where there is none: the reads are to be made by threads.
  virtual std::unique_ptr<ReadQueue> read_queue(int depth) = 0;
  virtual void close(const OpenFile& file) = 0;
  virtual double seconds() = 0;  // of a clock that never goes back
};

class RealFileSystem : public FileSystem {
 public:
  // `has_queue` false: as on a system without asynchronous reads.
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

enum class Fault {
  io_error,     // EIO
  interrupted,  // EINTR, which a reader must try again
  partial,      // half of what was asked for, which is legal and must be read on
  truncated,    // end of file
  flipped_bit,  // the bytes arrive, and one bit of the one in the middle is wrong
  delayed,      // the bytes arrive later
  // Of the page cache; reads from the drive are sound.
  uncached,        // EAGAIN
  partial_cached,  // half of what was asked for
  no_cache         // EOPNOTSUPP
};

class FaultyFileSystem : public FileSystem {
 public:
  // Reads are counted from 1 over all files, as they begin; those from `first_read` on, `num_faults` of them,
  // get the fault. The reads are those from the drive, and then nothing is read from the page cache; or those
  // from the page cache, for a fault of that.
  FaultyFileSystem(std::shared_ptr<FileSystem> inner, Fault fault, int64_t first_read, int64_t num_faults = 1,
                   double delay_seconds = 0.05);

  OpenFile open(const std::string& path, bool direct) override;
  ssize_t pread(int handle, void* buffer, size_t nbytes, int64_t offset) override;
  ssize_t read_cached(const OpenFile& file, void* buffer, size_t nbytes, int64_t offset) override;
  void drop_cache(int handle, int64_t offset, int64_t nbytes) override;
  std::unique_ptr<ReadQueue> read_queue(int depth) override;
  void close(const OpenFile& file) override;
  double seconds() override;

  int64_t num_reads() const { return num_reads_; }

 private:
  class Queue;

  // What a sound read got, or would get, becomes what the fault makes of it.
  ssize_t spoil(ssize_t got, uint8_t* memory) const;
  bool is_fault_of_cache() const { return fault_ >= Fault::uncached; }
  bool has_fault(int64_t read) const { return read >= first_read_ && read - first_read_ < num_faults_; }

  std::shared_ptr<FileSystem> inner_;
  Fault fault_;
  int64_t first_read_;
  int64_t num_faults_;
  double delay_seconds_;
  std::atomic<int64_t> num_reads_{0};
};

}  // namespace argosy
