// link_faults.h: what goes wrong on a connection, for tests and benchmarks.
//
// It stands between an exchange and one of its sockets, since not every kernel can delay or limit loopback.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>

namespace argosy {

struct LinkFaults {
  std::chrono::microseconds delay{0};    // from send() to the first byte on the wire
  std::optional<int64_t> bytes_per_s;    // in each direction
  std::optional<int64_t> bytes_to_live;  // after so many bytes in both directions, the connection is lost
  bool is_stalled = false;               // nothing moves
};

class FaultyLink {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Way { out, in };

  static constexpr int64_t kAnyBytes = std::numeric_limits<int64_t>::max();
  // A limited link waits this long before it asks again whether bytes may move.
  static constexpr std::chrono::microseconds kTick{100};

  explicit FaultyLink(const LinkFaults& faults) : faults_(faults) {}

  std::chrono::microseconds delay() const { return faults_.delay; }
  bool is_dead() const { return faults_.bytes_to_live && moved_ >= *faults_.bytes_to_live; }

  // How many bytes may move this way now.
  int64_t allowance(Way way, Clock::time_point now) {
    if (faults_.is_stalled) return 0;
    int64_t most = kAnyBytes;
    if (faults_.bytes_to_live) most = std::max<int64_t>(0, *faults_.bytes_to_live - moved_);
    if (faults_.bytes_per_s) {
      Bucket& bucket = buckets_[way == Way::out ? 0 : 1];
      const double rate = double(*faults_.bytes_per_s);
      const double elapsed = std::chrono::duration<double>(now - bucket.filled_at).count();
      bucket.bytes = std::min(bucket.bytes + elapsed * rate, std::max(1.0, rate * kBucketSeconds));
      bucket.filled_at = now;
      most = std::min(most, int64_t(bucket.bytes));
    }
    return most;
  }

  void moved(Way way, int64_t nbytes) {
    moved_ += nbytes;
    if (faults_.bytes_per_s) buckets_[way == Way::out ? 0 : 1].bytes -= double(nbytes);
  }

 private:
  static constexpr double kBucketSeconds =
      0.002;  // how much may move at once, so that a frame takes its time

  struct Bucket {
    double bytes = 0;
    Clock::time_point filled_at = Clock::now();
  };

  LinkFaults faults_;
  Bucket buckets_[2];
  int64_t moved_ = 0;
};

}  // namespace argosy
