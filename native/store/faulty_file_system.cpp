// faulty_file_system.cpp: one fault, put into the reads of another file system.
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "store/file_system.h"

namespace argosy {

FaultyFileSystem::FaultyFileSystem(std::shared_ptr<FileSystem> inner, Fault fault, int64_t first_read,
                                   int64_t num_faults, double delay_seconds)
    : inner_(std::move(inner)),
      fault_(fault),
      first_read_(first_read),
      num_faults_(num_faults),
      delay_seconds_(delay_seconds) {}

OpenFile FaultyFileSystem::open(const std::string& path, bool direct) {
  OpenFile file = inner_->open(path, direct);
  if (file.cached_handle >= 0 && !is_fault_of_cache()) {
    OpenFile unused;
    std::swap(unused.handle, file.cached_handle);
    inner_->close(unused);
  }
  return file;
}

ssize_t FaultyFileSystem::pread(int handle, void* buffer, size_t nbytes, int64_t offset) {
  if (is_fault_of_cache() || !has_fault(++num_reads_)) return inner_->pread(handle, buffer, nbytes, offset);
  switch (fault_) {
    case Fault::io_error:
      return -EIO;
    case Fault::interrupted:
      return -EINTR;
    case Fault::truncated:
      return 0;
    case Fault::partial: {
      const ssize_t got = inner_->pread(handle, buffer, nbytes, offset);
      return got > 1 ? got / 2 : got;
    }
    case Fault::flipped_bit: {
      const ssize_t got = inner_->pread(handle, buffer, nbytes, offset);
      if (got > 0) static_cast<uint8_t*>(buffer)[got / 2] ^= 1;
      return got;
    }
    case Fault::delayed:
      std::this_thread::sleep_for(std::chrono::duration<double>(delay_seconds_));
      return inner_->pread(handle, buffer, nbytes, offset);
    case Fault::uncached:
    case Fault::partial_cached:
    case Fault::no_cache:
      break;
  }
  return -EINVAL;
}

ssize_t FaultyFileSystem::read_cached(const OpenFile& file, void* buffer, size_t nbytes, int64_t offset) {
  if (!has_fault(++num_reads_)) return inner_->read_cached(file, buffer, nbytes, offset);
  if (fault_ == Fault::uncached) return -EAGAIN;
  if (fault_ == Fault::no_cache) return -EOPNOTSUPP;
  const ssize_t got = inner_->read_cached(file, buffer, nbytes, offset);
  return got > 1 ? got / 2 : got;
}

void FaultyFileSystem::drop_cache(int handle, int64_t offset, int64_t nbytes) {
  inner_->drop_cache(handle, offset, nbytes);
}

void FaultyFileSystem::close(const OpenFile& file) { inner_->close(file); }

double FaultyFileSystem::seconds() { return inner_->seconds(); }

}  // namespace argosy
