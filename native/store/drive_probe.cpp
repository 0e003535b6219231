// drive_probe.cpp: shuffle the records, start the readers together, and measure from the first start to the
// last end.
#include "store/drive_probe.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <latch>
#include <random>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/formats.h"
#include "store/arena.h"
#include "store/file_system.h"
#include "store/start_threads.h"

namespace argosy {
namespace {

// A reader that keeps refilling one small buffer finds it in the processor's cache, and appears up to a third
// faster than one that fills the slots of an expert cache (benchmarks/reads.py).
constexpr int64_t kDestinationBytes = int64_t{256} << 20;
constexpr int64_t kMostRecords = int64_t{1} << 24;

class ClosedAtEnd {
 public:
  ClosedAtEnd(FileSystem& file_system, const OpenFile& file) : file_system_(file_system), file_(file) {}
  ~ClosedAtEnd() { file_system_.close(file_); }
  ClosedAtEnd(const ClosedAtEnd&) = delete;
  ClosedAtEnd& operator=(const ClosedAtEnd&) = delete;

 private:
  FileSystem& file_system_;
  const OpenFile& file_;
};

// Returns the offsets of records without holes. A worker's copy of a model has holes, and reading a hole does
// not touch the drive.
std::vector<int64_t> records_of_data(const OpenFile& file, int64_t record_bytes) {
  std::vector<int64_t> offsets;
  for (int64_t at = 0; at < file.size;) {
    int64_t data = ::lseek(file.handle, at, SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;  // nothing but a hole follows
    if (data < 0) data = at;
    int64_t end = ::lseek(file.handle, data, SEEK_HOLE);
    if (end <= data) end = file.size;
    for (data = round_up(data, file.alignment); data + record_bytes <= end; data += record_bytes) {
      offsets.push_back(data);
    }
    at = end;
  }
  return offsets;
}

std::vector<int64_t> shuffled(std::vector<int64_t> all, int64_t num_records) {
  // Any seed that differs will do, and std::random_device would need a newer glibc than all else here.
  std::mt19937_64 random{static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count())};
  std::vector<int64_t> records;
  while (int64_t(records.size()) < num_records) {
    std::shuffle(all.begin(), all.end(), random);
    const auto wanted = std::min<int64_t>(int64_t(all.size()), num_records - int64_t(records.size()));
    records.insert(records.end(), all.begin(), all.begin() + wanted);
  }
  return records;
}

}  // namespace

double drive_probe(const std::string& path, int64_t record_bytes, int64_t num_records, int num_readers,
                   bool direct) {
  if (record_bytes < 1 || num_records < 1 || num_readers < 1) {
    throw std::invalid_argument("a probe needs at least 1 byte, 1 record and 1 reader");
  }
  if (num_records > kMostRecords || num_readers > kMostThreads) {
    throw std::invalid_argument("a probe may have at most " + std::to_string(kMostRecords) + " records and " +
                                std::to_string(kMostThreads) + " readers");
  }
  RealFileSystem file_system;
  const OpenFile file = file_system.open(path, direct);
  const ClosedAtEnd closed_at_end(file_system, file);
  if (direct && !file.is_direct) throw std::runtime_error(path + ": " + file.why_not_direct);
  // The comparison keeps round_up from overflowing: no file is large enough.
  std::vector<int64_t> of_data;
  if (record_bytes <= file.size) of_data = records_of_data(file, round_up(record_bytes, file.alignment));
  if (of_data.empty()) {
    throw std::invalid_argument(path + " holds " + std::to_string(file.size) +
                                " bytes, holes included, too few for one record of " +
                                std::to_string(record_bytes) + " bytes");
  }
  record_bytes = round_up(record_bytes, file.alignment);
  const std::vector<int64_t> records = shuffled(std::move(of_data), num_records);
  if (!direct) file_system.drop_cache(file.handle, 0, 0);

  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  std::latch begin(1);
  const int64_t num_slots = std::max<int64_t>(
      num_readers, std::min(num_records, std::max<int64_t>(1, kDestinationBytes / record_bytes)));
  Arena arena(size_t(num_slots * record_bytes));
  memset(arena.data(), 0, arena.size());

  // Each reader records its own times: this thread may wake up long after they have started.
  std::vector<double> began(static_cast<size_t>(num_readers)), ended(static_cast<size_t>(num_readers));
  const auto read_records = [&](size_t reader) {
    begin.wait();
    began[reader] = file_system.seconds();
    for (size_t i = next++; i < records.size() && error == 0; i = next++) {
      uint8_t* slot = arena.data() + int64_t(i) % num_slots * record_bytes;
      ssize_t got;
      do {
        got = file_system.pread(file.handle, slot, size_t(record_bytes), records[i]);
      } while (got == -EINTR);
      if (got != record_bytes) error = got < 0 ? int(-got) : EIO;
    }
    ended[reader] = file_system.seconds();
  };
  std::vector<std::thread> readers = start_threads(
      num_readers, [&](int reader) { read_records(size_t(reader)); },
      [&] {
        error = ECANCELED;
        begin.count_down();
      });
  begin.count_down();
  for (std::thread& reader : readers) reader.join();
  const double seconds =
      *std::max_element(ended.begin(), ended.end()) - *std::min_element(began.begin(), began.end());
  if (!direct) file_system.drop_cache(file.handle, 0, 0);
  if (error != 0) throw std::system_error(error, std::generic_category(), path);
  return double(record_bytes) * double(num_records) / seconds;
}

}  // namespace argosy
