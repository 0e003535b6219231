// layer_experts.h: the experts of a layer that run elsewhere, or are read, while a stack goes on without a
// pause.
//
//   if (experts.begin(layer, dispatch, rows, out)) {   // asks owners; if false, the step pauses
//     ...                                              // work that needs no outputs
//     experts.run_here(runtime);                       // the experts that fall to this machine
//     if (experts.wait(50ms)) combine();               // otherwise the step pauses
//   }
//
// It handles layers in which nothing goes wrong. If something does, or if a layer takes long, the stack
// pauses, and Python goes on with the layer that was begun.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "ops/experts.h"
#include "ops/runtime.h"

namespace argosy {

class LayerExperts {
 public:
  virtual ~LayerExperts() = default;

  // Starts to have the experts of a dispatch run. rows [num_tokens][hidden] and out [num_assignments][hidden]
  // stay in place until wait() returned true, or Python is done with the layer. Returns false if the step
  // must pause; then nothing was begun.
  virtual bool begin(int64_t layer, std::shared_ptr<const Dispatch> dispatch, const float* rows,
                     float* out) = 0;

  // Whether a guess for the next layer would be of use, and one; between begin() and run_here().
  virtual bool wants_guess() const = 0;
  // `pairs`: (expert, adapter) of the tokens for which each is guessed.
  virtual void guess(int64_t layer, const std::vector<std::vector<int32_t>>& by_rank,
                     const std::vector<std::pair<int32_t, int32_t>>& pairs, bool is_sweep) = 0;

  virtual void run_here(Runtime& runtime) = 0;

  // Waits for outputs, at most for `most`. Returns true when all of them are in `out`, and false if the step
  // must pause.
  virtual bool wait(std::chrono::nanoseconds most) = 0;

  // Seconds in which experts ran in this thread, within run_here() and wait(), since the previous call.
  virtual double take_run_seconds() { return 0; }

  virtual int64_t hidden() const = 0;  // the size of a row
};

}  // namespace argosy
