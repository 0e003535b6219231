#include "ops/runtime.h"

#include <new>
#include <stdexcept>

#include "store/start_threads.h"

namespace argosy {

namespace {
constexpr std::align_val_t kScratchAlignment{4096};
}

Runtime::Runtime(int num_threads, std::optional<AskAhead> ask_ahead, const KernelTable& kernels)
    : num_threads_(num_threads),
      kernels_(kernels),
      ask_ahead_(ask_ahead ? *ask_ahead : default_ask_ahead(kernels)) {
  require_threads("num_threads", num_threads);
  pool_ = std::make_unique<ThreadPool>(num_threads);
}

void Runtime::FreeScratch::operator()(uint8_t* memory) const { ::operator delete(memory, kScratchAlignment); }

std::unique_lock<std::recursive_mutex> Runtime::lock() {
  std::unique_lock held(mutex_);
  if (pool_ == nullptr) throw std::invalid_argument("this runtime is closed");
  return held;
}

uint8_t* Runtime::scratch(int64_t bytes) {
  if (bytes > scratch_bytes_) {
    scratch_.reset();
    scratch_bytes_ = 0;
    const int64_t size = scratch_size(bytes);
    scratch_.reset(static_cast<uint8_t*>(::operator new(size_t(size), kScratchAlignment)));
    scratch_bytes_ = size;
  }
  return scratch_.get();
}

void Runtime::close() {
  const std::unique_lock held(mutex_);
  pool_.reset();
  scratch_.reset();
  scratch_bytes_ = 0;
}

}  // namespace argosy
