// kernel_queue.cpp: io_setup, io_submit and io_getevents, called without a library.
//
// These calls are good at reads that bypass the page cache, and container runtimes that forbid io_uring allow
// them.
#include "store/kernel_queue.h"

#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <vector>

namespace argosy {
namespace {

constexpr size_t kBatch = 16;  // reads submitted, and results fetched, per call
// The kernel holds back a batch of more than two until the batch is complete. A small first batch lets the
// drive start earlier.
constexpr size_t kFirstBatch = 2;

// Contexts for later queues. io_destroy waits for grace periods of the kernel, 40 ms in all, which a process
// with two stores would pay at every start and end of an engine.
class IdleContexts {
 public:
  // Returns 0 if there is none of this depth.
  aio_context_t take(int depth) {
    const std::lock_guard lock(mutex_);
    if (process_ != getpid()) idle_.clear();  // after a fork: the parent's contexts are not the child's
    process_ = getpid();
    const auto found =
        std::ranges::find_if(idle_, [depth](const Idle& context) { return context.depth == depth; });
    if (found == idle_.end()) return 0;
    const aio_context_t context = found->context;
    idle_.erase(found);
    return context;
  }

  // Returns false if the caller must destroy it.
  bool keep(aio_context_t context, int depth) {
    const std::lock_guard lock(mutex_);
    if (process_ != getpid() || idle_.size() == kMost) return false;
    idle_.push_back({context, depth});
    return true;
  }

 private:
  static constexpr size_t kMost = 4;  // the system allows all processes together 65,536 reads in flight

  struct Idle {
    aio_context_t context;
    int depth;
  };

  std::mutex mutex_;
  pid_t process_ = 0;
  std::vector<Idle> idle_;
};

IdleContexts& idle_contexts() {
  static auto* const contexts = new IdleContexts;  // never destroyed: stores may outlive static objects
  return *contexts;
}

class KernelQueue : public ReadQueue {
 public:
  KernelQueue(aio_context_t context, int depth) : context_(context), depth_(depth) {}
  ~KernelQueue() override {
    // After a fork it is the parent's; with reads in flight, io_destroy waits for them.
    const bool may_be_kept = process_ == getpid() && num_in_flight_ == 0;
    if (!may_be_kept || !idle_contexts().keep(context_, depth_)) syscall(SYS_io_destroy, context_);
  }

  size_t submit(std::span<const AsyncRead> reads) override {
    size_t num_taken = 0;
    while (num_taken < reads.size()) {
      const size_t most = num_taken == 0 ? kFirstBatch : kBatch;
      const auto batch = reads.subspan(num_taken, std::min(most, reads.size() - num_taken));
      std::array<iocb, kBatch> blocks = {};
      std::array<iocb*, kBatch> pointers;
      for (size_t i = 0; i < batch.size(); ++i) {
        blocks[i].aio_data = batch[i].tag;
        blocks[i].aio_lio_opcode = IOCB_CMD_PREAD;
        blocks[i].aio_fildes = uint32_t(batch[i].handle);
        blocks[i].aio_buf = reinterpret_cast<uint64_t>(batch[i].memory);
        blocks[i].aio_nbytes = batch[i].nbytes;
        blocks[i].aio_offset = batch[i].offset;
        pointers[i] = &blocks[i];
      }
      const long taken = syscall(SYS_io_submit, context_, long(batch.size()), pointers.data());
      if (taken > 0) {
        num_taken += size_t(taken);
        num_in_flight_ += size_t(taken);
      }
      if (taken < long(batch.size()) && !(taken < 0 && errno == EINTR)) break;
    }
    return num_taken;
  }

  size_t wait(std::span<AsyncResult> results) override {
    std::array<io_event, kBatch> events;
    long got;
    do {
      got = syscall(SYS_io_getevents, context_, 1L, long(std::min(kBatch, results.size())), events.data(),
                    nullptr);
    } while (got < 0 && errno == EINTR);
    if (got < 0) throw std::system_error(errno, std::generic_category(), "io_getevents");
    num_in_flight_ -= size_t(got);
    for (size_t i = 0; i < size_t(got); ++i) results[i] = {events[i].data, ssize_t(events[i].res)};
    return size_t(got);
  }

 private:
  const aio_context_t context_;
  const int depth_;
  const pid_t process_ = getpid();
  std::atomic<size_t> num_in_flight_ = 0;  // a thread submits while another waits
};

}  // namespace

std::unique_ptr<ReadQueue> open_kernel_queue(int depth) {
  aio_context_t context = idle_contexts().take(depth);
  if (context == 0 && syscall(SYS_io_setup, long(depth), &context) != 0) return nullptr;
  return std::make_unique<KernelQueue>(context, depth);
}

}  // namespace argosy
