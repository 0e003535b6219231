// store.h: bytes from files into arenas, asynchronously.
//
//   fetch(pieces) -> ticket     reader threads: pread, check the CRC      wait_any(tickets) -> which are in
//
// A piece is bytes [offset, offset + nbytes) of a file. It is read with its surroundings, rounded outwards to
// the file's alignment, to `dest_offset`; its own bytes begin at dest_offset + offset % alignment. A large
// piece is cut into parts that several readers take. A ticket is done when all its pieces are in memory and
// match their checksums, or one of them failed and nothing moves any more: after that, nobody writes to that
// memory.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "store/arena.h"
#include "store/file_system.h"

namespace argosy {

struct FileInfo {
  std::string path;
  int64_t size;
  int64_t alignment;
  bool is_direct;
  std::string why_not_direct;
};

struct Piece {
  int file_id;
  int64_t offset;
  int64_t nbytes;
  int64_t dest_offset;
};

enum class ReadError { none, io, checksum, short_file };

struct Completion {
  int64_t ticket;
  ReadError error;
  std::string message;  // empty without an error
};

struct StoreStats {
  int64_t bytes_read = 0;
  int64_t reads = 0;
  double read_seconds = 0;      // in pread, summed over readers
  double checksum_seconds = 0;  // summed over readers
  double busy_seconds = 0;      // wall time with at least one part in a reader's hands
};

class Store {
 public:
  // Small enough that the readers share the last piece of a layer, large enough for the drive: whole pieces
  // of 2.5 MiB were 7 % slower, parts of 0.5 MiB no faster (benchmarks/reads.py).
  static constexpr int64_t kPartBytes = int64_t{1} << 20;

  explicit Store(int num_readers,
                 std::shared_ptr<FileSystem> file_system = std::make_shared<RealFileSystem>());
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // Throws std::system_error. Files stay open until close().
  int open(const std::string& path, bool direct = true);
  FileInfo info(int file_id) const;

  // Starts reading; `checksums` is empty, or holds the crc32c_wide of each piece. Throws
  // std::invalid_argument for a piece that cannot be meant: unknown file, unaligned or outside the arena. A
  // file that ends too early is found by the reader. The arena's memory is held until the ticket is done.
  int64_t fetch(Arena& arena, const std::vector<Piece>& pieces, const std::vector<uint32_t>& checksums = {});

  // Returns those of `tickets` that are done, at least one unless `tickets` is empty or the time is over, and
  // forgets them.
  std::vector<Completion> wait_any(const std::vector<int64_t>& tickets, std::chrono::milliseconds timeout);

  // Drops what no reader has begun, waits for what one has, forgets the ticket. Returns whether it was known.
  bool cancel(int64_t ticket);

  int64_t pending() const;  // tickets that are not done
  StoreStats stats() const;

  // Joins the readers; tickets that are not done fail. Harmless the second time.
  void close();

 private:
  struct Request;
  struct PieceState;
  struct Part {
    Request* request;
    size_t piece;
    int64_t begin;  // within the piece's region, aligned
    int64_t end;
  };
  struct Outcome {
    ReadError error = ReadError::none;
    std::string message;
  };

  void read_parts();
  Outcome read_part(const Part& part);
  Outcome check_piece(const PieceState& piece);
  void finish_part(std::unique_lock<std::mutex>& lock, const Part& part, Outcome outcome);
  void require_open() const;

  const std::shared_ptr<FileSystem> file_system_;
  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable part_came_;
  std::condition_variable ticket_done_;
  std::deque<std::pair<std::string, OpenFile>> files_;  // a deque: readers keep references
  std::deque<Part> queue_;
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  std::vector<std::thread> readers_;
  StoreStats stats_;
  int64_t next_ticket_ = 1;
  int64_t num_pending_ = 0;
  int num_busy_ = 0;
  double busy_since_ = 0;
  bool is_closed_ = false;
};

}  // namespace argosy
