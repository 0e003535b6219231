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
#include <cerrno>
#include <system_error>

namespace argosy {
namespace {

constexpr size_t kBatch = 16;  // reads submitted, and results fetched, per call
// The kernel holds back a batch of more than two until the batch is complete. A small first batch lets the
// drive start earlier.
constexpr size_t kFirstBatch = 2;

class KernelQueue : public ReadQueue {
 public:
  explicit KernelQueue(aio_context_t context) : context_(context) {}
  ~KernelQueue() override { syscall(SYS_io_destroy, context_); }

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
      if (taken > 0) num_taken += size_t(taken);
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
    for (size_t i = 0; i < size_t(got); ++i) results[i] = {events[i].data, ssize_t(events[i].res)};
    return size_t(got);
  }

 private:
  const aio_context_t context_;
};

}  // namespace

std::unique_ptr<ReadQueue> open_kernel_queue(int depth) {
  aio_context_t context = 0;
  if (syscall(SYS_io_setup, long(depth), &context) != 0) return nullptr;
  return std::make_unique<KernelQueue>(context);
}

}  // namespace argosy
