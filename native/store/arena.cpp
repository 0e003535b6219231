// arena.cpp: map slightly more than requested, then unmap the excess before and after the aligned part.
#include "store/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

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

// Populating one huge page takes up to two milliseconds; then the loop checks whether to continue.
constexpr size_t kPopulatedAtOnce = Arena::kAlignment;

std::unique_lock<std::mutex> Arena::Populated::lock_first() {
  ++num_waiting;
  std::unique_lock lock(mutex);
  --num_waiting;
  num_waiting.notify_all();
  return lock;
}

std::function<void()> Arena::populating(std::shared_ptr<Foreground> foreground) const {
  return [held = mapping_, populated = populated_, foreground = std::move(foreground)] {
    while (held) {
      const double start = thread_seconds();
      for (int waiting; (waiting = populated->num_waiting) > 0;) populated->num_waiting.wait(waiting);
      {
        std::lock_guard lock(populated->mutex);
        const size_t at = populated->done;
        if (at >= populated->until) return;
        const size_t nbytes = std::min(kPopulatedAtOnce, populated->until - at);
        if (madvise(held.get() + at, nbytes, MADV_POPULATE_WRITE) != 0) return;
        populated->done = at + kPopulatedAtOnce;
      }
      if (foreground) foreground->give_way(thread_seconds() - start);
    }
  };
}

void Arena::resize(size_t nbytes) {
  if (is_closed()) throw std::invalid_argument("the arena is closed");
  if (nbytes > most_) {
    throw std::invalid_argument("an arena of " + std::to_string(most_) + " bytes cannot have " +
                                std::to_string(nbytes));
  }
  const auto lock = populated_->lock_first();
  populated_->until = nbytes;
  // Pages beyond go, and the last huge page may be populated in part only.
  populated_->done = std::min(populated_->done, nbytes / kPopulatedAtOnce * kPopulatedAtOnce);
  if (nbytes < size_) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t begin = (nbytes + page - 1) / page * page, end = (size_ + page - 1) / page * page;
    madvise(mapping_.get() + begin, end - begin, MADV_DONTNEED);
  }
  size_ = nbytes;
}

namespace {

// The huge pages that lie between two offsets: from the first to before the second, if the first is lower.
std::pair<size_t, size_t> whole_pages(size_t begin, size_t end) {
  return {(begin + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment,
          end / Arena::kAlignment * Arena::kAlignment};
}

}  // namespace

size_t Arena::discarded_bytes(size_t begin, size_t end) {
  const auto [first, last] = whole_pages(begin, end);
  return first < last ? last - first : 0;
}

void Arena::discard(size_t begin, size_t end) {
  const size_t nbytes = discarded_bytes(begin, std::min(end, size_));
  if (nbytes > 0) madvise(data() + whole_pages(begin, end).first, nbytes, MADV_DONTNEED);
}

void Arena::close() {
  {
    const auto lock = populated_->lock_first();
    populated_->until = 0;
  }
  mapping_.reset();
}

uint8_t* Arena::data() {
  if (is_closed()) throw std::invalid_argument("the arena is closed");
  return mapping_.get();
}

}  // namespace argosy
