// kernel_queue.h: asynchronous reads by the kernel's own means (Linux AIO).
//
// A burst of reads is handed over in one call and the drive works through it without anybody waking up
// between two of them: 1.0 ms for one expert of 2.65 MB against 1.3 with four threads that call pread, 2.2
// against 2.5 for two (docs/decisions/0009-read-with-linux-aio.md).
#pragma once

#include <memory>

#include "store/file_system.h"

namespace argosy {

// Null where the kernel has no asynchronous reads or will not give any.
std::unique_ptr<ReadQueue> open_kernel_queue(int depth);

}  // namespace argosy
