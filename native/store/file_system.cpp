// file_system.cpp: opens a file with O_DIRECT if its file system supports it.
//
// Three checks run in order: open() may refuse the flag, statx() may report that the file has no direct reads
// (Linux 6.1 and newer), and a trial read of one page may fail. If any check fails, the file is opened
// buffered, and why_not_direct keeps the reason.
//
// A file with direct reads gets a second, buffered descriptor for the parts that the page cache already
// holds. RWF_NOWAIT alone is not enough: where pages are missing, Linux starts to read ahead (1 MiB of a
// dropped file was in the cache after one such call of 1 MiB), and the budget does not pay for a page cache.
// So cachestat (Linux 6.5) first checks that every page is cached. A cached page may also carry the mark that
// makes read-ahead continue with the missing pages of the next window; so whole stretches must be cached,
// including the next one.
#include "store/file_system.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "store/kernel_queue.h"

namespace argosy {
namespace {

struct DirectAnswer {
  bool is_known = false;  // statx reported the alignment
  int64_t alignment = 0;  // 0: no direct reads
};

#if defined(STATX_DIOALIGN)
DirectAnswer ask_alignment(int handle) {
  struct statx facts;
  if (statx(handle, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) != 0 || !(facts.stx_mask & STATX_DIOALIGN))
    return {};
  return {true, std::max<int64_t>(facts.stx_dio_mem_align, facts.stx_dio_offset_align)};
}
#else
DirectAnswer ask_alignment(int) { return {}; }
#endif

// Returns 0, or the error of reading one aligned page.
int try_one_page(int handle) {
  constexpr size_t page = size_t(FileSystem::kMinAlignment);
  void* buffer = std::aligned_alloc(page, page);
  if (buffer == nullptr) return ENOMEM;
  ssize_t got;
  do {
    got = ::pread(handle, buffer, page, 0);
  } while (got < 0 && errno == EINTR);
  const int error = got < 0 ? errno : 0;
  std::free(buffer);
  return error;
}

OpenFile open_direct(const std::string& path) {
  OpenFile file;
  file.handle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (file.handle < 0) {
    file.why_not_direct = std::string("the file system refuses O_DIRECT: ") + strerror(errno);
    return file;
  }
  const DirectAnswer answer = ask_alignment(file.handle);
  if (answer.is_known && answer.alignment == 0) {
    file.why_not_direct = "the file system does not support direct reads of this file";
  } else if (const int error = try_one_page(file.handle)) {
    file.why_not_direct = std::string("a trial read with O_DIRECT failed: ") + strerror(error);
  } else {
    file.is_direct = true;
    file.alignment = std::max(FileSystem::kMinAlignment, answer.alignment);
    // A file system that does not report its alignment may accept O_DIRECT and still use the page cache.
    file.drops_cache = !answer.is_known;
    return file;
  }
  ::close(file.handle);
  file.handle = -1;
  return file;
}

#if defined(SYS_cachestat)
constexpr long kCachestat = SYS_cachestat;
#else
constexpr long kCachestat = 451;  // on x86-64 and arm64, as on most architectures
#endif

// Returns how many bytes of [offset, offset + nbytes) the page cache holds, or -errno. The range consists of
// whole pages.
int64_t cached_bytes(int handle, int64_t offset, int64_t nbytes) {
  struct {
    uint64_t offset, nbytes;
  } range = {uint64_t(offset), uint64_t(nbytes)};
  struct {
    uint64_t cached, dirty, in_writeback, evicted, recently_evicted;  // pages
  } pages = {};
  if (syscall(kCachestat, handle, &range, &pages, 0) != 0) return -errno;
  return int64_t(pages.cached) * sysconf(_SC_PAGESIZE);
}

// Gives `file` a descriptor for read_cached if the kernel can report what is cached and at least one stretch
// of the file is cached. `facts` identify the open file: another file may have taken its name since.
void open_cached(const std::string& path, const struct stat& facts, OpenFile& file) {
  const int handle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (handle < 0) return;
  struct stat own;
  bool is_any_cached = false;
  if (fstat(handle, &own) == 0 && own.st_dev == facts.st_dev && own.st_ino == facts.st_ino) {
    for (int64_t at = 0; at < file.size; at += FileSystem::kStretchBytes) {
      const int64_t nbytes = std::min(file.size - at, FileSystem::kStretchBytes);
      const bool is_cached = cached_bytes(handle, at, nbytes) >= nbytes;
      file.cached_stretches.push_back(is_cached);
      is_any_cached |= is_cached;
    }
  }
  if (is_any_cached) {
    posix_fadvise(handle, 0, 0, POSIX_FADV_RANDOM);
    file.cached_handle = handle;
  } else {
    ::close(handle);
  }
}

}  // namespace

OpenFile RealFileSystem::open(const std::string& path, bool direct) {
  OpenFile file;
  file.why_not_direct = "buffered reads were requested";
  if (direct) file = open_direct(path);
  if (!file.is_direct) {
    file.handle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file.handle < 0) throw std::system_error(errno, std::generic_category(), path);
    file.alignment = kMinAlignment;
    file.drops_cache = true;
    // Read-ahead beyond the requested range would stay in the page cache, which the budget pays for.
    posix_fadvise(file.handle, 0, 0, POSIX_FADV_RANDOM);
  }
  struct stat facts;
  int error = fstat(file.handle, &facts) == 0 ? 0 : errno;
  if (error == 0 && !S_ISREG(facts.st_mode)) error = S_ISDIR(facts.st_mode) ? EISDIR : EINVAL;
  if (error != 0) {
    ::close(file.handle);
    throw std::system_error(error, std::generic_category(), path);
  }
  file.size = facts.st_size;
  if (file.is_direct && !file.drops_cache) open_cached(path, facts, file);
  return file;
}

ssize_t RealFileSystem::pread(int handle, void* buffer, size_t nbytes, int64_t offset) {
  const ssize_t got = ::pread(handle, buffer, nbytes, offset);
  return got < 0 ? -errno : got;
}

ssize_t RealFileSystem::read_cached(const OpenFile& file, void* buffer, size_t nbytes, int64_t offset) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t last_page_end = (file.size + page - 1) / page * page;
  const int64_t wanted = std::min(int64_t(nbytes), last_page_end - offset);
  if (wanted <= 0) return -EAGAIN;
  const int64_t last_stretch =
      std::min((offset + wanted - 1) / kStretchBytes + 1, (file.size - 1) / kStretchBytes);
  for (int64_t stretch = offset / kStretchBytes; stretch <= last_stretch; ++stretch) {
    if (!file.cached_stretches[size_t(stretch)]) return -EAGAIN;
  }
  const int64_t cached = cached_bytes(file.cached_handle, offset, wanted);
  if (cached < 0) return ssize_t(cached);
  if (cached < wanted) return -EAGAIN;
  const iovec memory = {buffer, size_t(wanted)};
  const ssize_t got = preadv2(file.cached_handle, &memory, 1, offset, RWF_NOWAIT);
  return got < 0 ? -errno : got;
}

void RealFileSystem::drop_cache(int handle, int64_t offset, int64_t nbytes) {
  posix_fadvise(handle, offset, nbytes, POSIX_FADV_DONTNEED);
}

void RealFileSystem::close(const OpenFile& file) {
  ::close(file.handle);
  if (file.cached_handle >= 0) ::close(file.cached_handle);
}

std::unique_ptr<ReadQueue> RealFileSystem::read_queue(int depth) {
  return has_queue_ ? open_kernel_queue(depth) : nullptr;
}

double RealFileSystem::seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace argosy
