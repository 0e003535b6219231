// arena.cpp: map slightly more than requested, then unmap the excess before and after the aligned part.
#include "store/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels refuse it
#endif

namespace argosy {
namespace {

void refuse(size_t nbytes, const char* reason) {
  throw OutOfMemory("cannot reserve " + std::to_string(nbytes) + " bytes of memory: " + reason);
}

}  // namespace

Arena::Arena(size_t nbytes) : size_(nbytes), most_(nbytes) {
  if (nbytes > SIZE_MAX / 4) refuse(nbytes, "larger than the address space");
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t mapped = nbytes == 0 ? page : (nbytes + page - 1) / page * page;

  void* raw = mmap(nullptr, mapped + kAlignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) refuse(nbytes, strerror(errno));
  auto* start = static_cast<uint8_t*>(raw);
  const size_t before = (kAlignment - reinterpret_cast<uintptr_t>(start) % kAlignment) % kAlignment;
  uint8_t* aligned = start + before;
  if (before > 0) munmap(start, before);
  munmap(aligned + mapped, kAlignment - before);
  mapping_ = std::shared_ptr<uint8_t>(aligned, [mapped](uint8_t* data) { munmap(data, mapped); });

  // Both calls are advice: a kernel without huge pages refuses the first, and everything still works.
  madvise(aligned, mapped, MADV_HUGEPAGE);
  madvise(aligned, mapped, MADV_DONTDUMP);
  populated_->until = nbytes;
}

// Populating this much takes a few milliseconds; then the loop checks whether to continue.
constexpr size_t kPopulatedAtOnce = size_t{8} << 20;

std::function<void()> Arena::populating() const {
  return [held = mapping_, populated = populated_] {
    for (size_t at = 0; held; at += kPopulatedAtOnce) {
      std::lock_guard lock(populated->mutex);
      if (at >= populated->until) return;
      const size_t nbytes = std::min(kPopulatedAtOnce, populated->until - at);
      if (madvise(held.get() + at, nbytes, MADV_POPULATE_WRITE) != 0) return;
    }
  };
}

void Arena::resize(size_t nbytes) {
  if (is_closed()) throw std::invalid_argument("the arena is closed");
  if (nbytes > most_) {
    throw std::invalid_argument("an arena of " + std::to_string(most_) + " bytes cannot have " +
                                std::to_string(nbytes));
  }
  std::lock_guard lock(populated_->mutex);
  populated_->until = nbytes;
  if (nbytes < size_) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t begin = (nbytes + page - 1) / page * page, end = (size_ + page - 1) / page * page;
    madvise(mapping_.get() + begin, end - begin, MADV_DONTNEED);
  }
  size_ = nbytes;
}

void Arena::close() {
  {
    std::lock_guard lock(populated_->mutex);
    populated_->until = 0;
  }
  mapping_.reset();
}

uint8_t* Arena::data() {
  if (is_closed()) throw std::invalid_argument("the arena is closed");
  return mapping_.get();
}

}  // namespace argosy
