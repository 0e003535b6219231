// faulty_file_system.h: a file system with one injected fault, for tests.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

#include "store/file_system.h"

namespace argosy {

enum class Fault {
  io_error,     // EIO
  interrupted,  // EINTR; the reader must retry
  partial,      // half of the requested bytes: legal, and the reader must read the rest
  truncated,    // end of file
  flipped_bit,  // all bytes arrive, with one bit of the middle byte flipped
  delayed,      // all bytes arrive late
  held,         // all bytes arrive when `release` is called
  // Faults of the page cache; reads from the drive are correct.
  uncached,        // EAGAIN
  partial_cached,  // half of the requested bytes
  no_cache         // EOPNOTSUPP
};

class FaultyFileSystem : public FileSystem {
 public:
  // Reads are counted from 1 over all files, in the order they start. Reads `first_read` to `first_read` +
  // `num_faults` - 1 get the fault. For a page cache fault, only page cache reads count. For any other fault,
  // only drive reads count, and nothing is read from the page cache.
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

  // Lets held reads go on, and all later ones.
  void release();

 private:
  class Queue;

  // Turns the result of a good read into the result of the fault.
  ssize_t spoil(ssize_t got, uint8_t* memory) const;
  bool is_fault_of_cache() const { return fault_ >= Fault::uncached; }
  bool has_fault(int64_t read) const { return read >= first_read_ && read - first_read_ < num_faults_; }

  std::shared_ptr<FileSystem> inner_;
  Fault fault_;
  int64_t first_read_;
  int64_t num_faults_;
  double delay_seconds_;
  std::atomic<int64_t> num_reads_{0};
  std::atomic<bool> is_released_{false};
};

inline FaultyFileSystem::FaultyFileSystem(std::shared_ptr<FileSystem> inner, Fault fault, int64_t first_read,
                                          int64_t num_faults, double delay_seconds)
    : inner_(std::move(inner)),
      fault_(fault),
      first_read_(first_read),
      num_faults_(num_faults),
      delay_seconds_(delay_seconds) {}

inline OpenFile FaultyFileSystem::open(const std::string& path, bool direct) {
  OpenFile file = inner_->open(path, direct);
  if (file.cached_handle >= 0 && !is_fault_of_cache()) {
    OpenFile unused;
    std::swap(unused.handle, file.cached_handle);
    inner_->close(unused);
  }
  return file;
}

inline ssize_t FaultyFileSystem::spoil(ssize_t got, uint8_t* memory) const {
  switch (fault_) {
    case Fault::io_error:
      return -EIO;
    case Fault::interrupted:
      return -EINTR;
    case Fault::truncated:
      return 0;
    case Fault::partial:
      return got > 1 ? got / 2 : got;
    case Fault::flipped_bit:
      if (got > 0) memory[got / 2] ^= 1;
      return got;
    case Fault::delayed:
      std::this_thread::sleep_for(std::chrono::duration<double>(delay_seconds_));
      return got;
    case Fault::held:
      is_released_.wait(false);
      return got;
    case Fault::uncached:
    case Fault::partial_cached:
    case Fault::no_cache:
      break;
  }
  return got;
}

inline void FaultyFileSystem::release() {
  is_released_ = true;
  is_released_.notify_all();
}

inline ssize_t FaultyFileSystem::pread(int handle, void* buffer, size_t nbytes, int64_t offset) {
  const bool is_bad = !is_fault_of_cache() && has_fault(++num_reads_);
  const ssize_t got = inner_->pread(handle, buffer, nbytes, offset);
  return is_bad ? spoil(got, static_cast<uint8_t*>(buffer)) : got;
}

// Wraps another queue and remembers, by tag, which reads get the fault.
class FaultyFileSystem::Queue : public ReadQueue {
 public:
  Queue(FaultyFileSystem& owner, std::unique_ptr<ReadQueue> inner)
      : owner_(owner), inner_(std::move(inner)) {}

  size_t submit(std::span<const AsyncRead> reads) override {
    std::lock_guard lock(mutex_);
    for (const AsyncRead& read : reads) {
      if (!owner_.is_fault_of_cache() && owner_.has_fault(++owner_.num_reads_)) bad_[read.tag] = read.memory;
    }
    const size_t taken = inner_->submit(reads);
    for (const AsyncRead& read : reads.subspan(taken)) bad_.erase(read.tag);
    return taken;
  }

  size_t wait(std::span<AsyncResult> results) override {
    const size_t num_results = inner_->wait(results);
    for (AsyncResult& result : results.first(num_results)) {
      // A late read must not keep others from being submitted.
      if (uint8_t* const memory = take_bad(result.tag)) result.got = owner_.spoil(result.got, memory);
    }
    return num_results;
  }

 private:
  // Returns the memory of the read with this tag and forgets the read; null if it gets no fault.
  uint8_t* take_bad(uint64_t tag) {
    std::lock_guard lock(mutex_);
    const auto found = bad_.find(tag);
    if (found == bad_.end()) return nullptr;
    uint8_t* const memory = found->second;
    bad_.erase(found);
    return memory;
  }

  FaultyFileSystem& owner_;
  std::unique_ptr<ReadQueue> inner_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, uint8_t*> bad_;
};

inline std::unique_ptr<ReadQueue> FaultyFileSystem::read_queue(int depth) {
  std::unique_ptr<ReadQueue> queue = inner_->read_queue(depth);
  return queue ? std::make_unique<Queue>(*this, std::move(queue)) : nullptr;
}

inline ssize_t FaultyFileSystem::read_cached(const OpenFile& file, void* buffer, size_t nbytes,
                                             int64_t offset) {
  if (!has_fault(++num_reads_)) return inner_->read_cached(file, buffer, nbytes, offset);
  if (fault_ == Fault::uncached) return -EAGAIN;
  if (fault_ == Fault::no_cache) return -EOPNOTSUPP;
  const ssize_t got = inner_->read_cached(file, buffer, nbytes, offset);
  return got > 1 ? got / 2 : got;
}

inline void FaultyFileSystem::drop_cache(int handle, int64_t offset, int64_t nbytes) {
  inner_->drop_cache(handle, offset, nbytes);
}

inline void FaultyFileSystem::close(const OpenFile& file) { inner_->close(file); }

inline double FaultyFileSystem::seconds() { return inner_->seconds(); }

}  // namespace argosy
