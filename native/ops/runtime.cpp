#include "ops/runtime.h"

#include <stdexcept>

#include "kernels/matmul_args.h"
#include "store/start_threads.h"

namespace argosy {

Tunings default_tunings() {
  Tunings tunings;
  tunings.fill(default_tuning());
  return tunings;
}

Runtime::Runtime(int num_threads, std::optional<Tunings> tunings, const KernelTable& kernels)
    : num_threads_(num_threads), kernels_(kernels), tunings_(tunings ? *tunings : default_tunings()) {
  require_threads("num_threads", num_threads);
  pool_ = std::make_unique<ThreadPool>(num_threads);
  if (const int64_t bytes = num_threads * kernels.product_scratch_bytes; bytes > 0) {
    product_scratch_ = std::make_unique<Arena>(size_t(bytes));
  }
}

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
    scratch_ = std::make_unique<Arena>(size_t(size));
    scratch_bytes_ = size;
  }
  return scratch_ != nullptr ? scratch_->data() : nullptr;
}

Runtime::Operations Runtime::operations() const {
  Operations sum = {};
  for (int worker = 0; worker < num_threads_ && product_scratch_ != nullptr; ++worker) {
    const ProductCounts& counts = *reinterpret_cast<const ProductCounts*>(product_scratch(worker));
    sum.in_tiles += __atomic_load_n(&counts.in_tiles, __ATOMIC_RELAXED);
    sum.all += __atomic_load_n(&counts.all, __ATOMIC_RELAXED);
  }
  return sum;
}

void Runtime::trim(int64_t bytes) {
  const auto held = lock();
  if (scratch_size(bytes) < scratch_bytes_) {
    scratch_.reset();
    scratch_bytes_ = 0;
  }
  scratch(bytes);
}

void Runtime::close() {
  const std::unique_lock held(mutex_);
  pool_.reset();
  scratch_.reset();
  scratch_bytes_ = 0;
}

}  // namespace argosy
