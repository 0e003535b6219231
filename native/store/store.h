// store.h: bytes from files into arenas, asynchronously.
//
//   fetch(records) -> tickets     readers: check or transcode what has landed     wait_any(tickets) -> which
//   are in
//
// A piece is bytes [offset, offset + nbytes) of a file. A plain one is read in place with its surroundings,
// rounded outwards to the file's alignment: to `dest_offset`, so that its own bytes begin at dest_offset +
// offset % alignment. One with a Transcode is a matrix of blocks: some of its panels are read into
// staging memory, and a reader turns them into slot format; the matrix begins exactly at dest_offset. A large
// piece is cut into parts. A ticket is done when all its pieces are in memory and match their checksums, or
// one of them failed and nothing moves any more: after that, nobody writes to that memory.
//
//            direct                      reaped
//   queue ----------> kernel's queue ------------> landed ---> a reader: transcode, check, end the ticket
//         \------------------------------------->
//          page cache, buffered files, or no kernel's queue: the reader calls pread
//
// Whoever fetches hands its first parts to the kernel in one call, so the drive begins before anybody wakes,
// and has the next read at hand whatever the processor is busy with. One reader at a time waits for the
// kernel's results and shares them out.
//
// Stretches that the page cache holds anyway are copied from there, part by part; the rest is read past it. A
// file without one when it is opened is not looked for there, and where parts were missing several times in a
// row, only now and then.
//
// What is needed now goes before what will be soon, and that before what is only guessed; within each the
// order is that of the calls.
#pragma once

#include <array>
#include <atomic>
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
#include <utility>
#include <vector>

#include "kernels/transcode.h"
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

// A matrix of blocks, rows one after another, that becomes panels of slot_format(block_type), or the quants
// or the scales of these panels (kernels/transcode.h). With several matrices interleaved, row by row, in one
// tensor, each has `rows` rows, and they become matrices one behind the other.
struct Transcode {
  BlockType block_type;
  int64_t rows;
  int64_t cols;
  int64_t interleaved = 1;

  // Bytes of the file that become one strip of each matrix.
  int64_t panel_bytes() const { return interleaved * source_bytes(block_type, strip_rows(block_type), cols); }
};

struct Piece {
  int file_id;
  int64_t offset;
  int64_t nbytes;
  int64_t dest_offset;  // from the place of the record
  std::optional<Transcode> transcode = std::nullopt;
};

// What belongs together: it is read wherever there is a place for it, any number of times.
struct Record {
  std::vector<Piece> pieces;
  std::vector<uint32_t> checksums = {};  // none, or the crc32c_wide of each piece

  // What such a record takes of the heap.
  static int64_t bytes(int64_t num_pieces, bool has_checksums);
};

// What one ticket stands for.
struct PlacedRecord {
  const Record& record;
  int64_t base_offset = 0;  // of the arena
};

// now: somebody waits. soon: will be needed, almost for certain. maybe: a guess, which may use the drive only
// while it has nothing else to do.
enum class Urgency { now, soon, maybe };
constexpr int kNumUrgencies = 3;

enum class ReadError { none, io, checksum, short_file, not_finite, dropped };

struct Completion {
  int64_t ticket;
  ReadError error;
  std::string message;  // empty without an error
};

struct StoreStats {
  int64_t bytes_read = 0;
  int64_t reads = 0;
  int64_t cached_bytes = 0;      // of bytes_read, those that came from the page cache
  double read_seconds = 0;       // from the begin of each read to its end, summed over reads
  double checksum_seconds = 0;   // summed over readers
  double transcode_seconds = 0;  // summed over readers
  double busy_seconds = 0;       // wall time with at least one part begun and not finished
};

class Store {
 public:
  // Small enough that the readers share the last piece of a layer, large enough for the drive: whole pieces
  // of 2.5 MiB were 7 % slower, parts of 0.5 MiB no faster (benchmarks/reads.py).
  static constexpr int64_t kPartBytes = int64_t{1} << 20;
  // Half of that where a part is transcoded: nothing hides what is transcoded after the last read of a layer.
  // One expert of three slices of 864 KiB took 1.46 ms with halves, 1.63 ms with whole slices
  // (docs/experiments.md).
  static constexpr int64_t kTranscodedPartBytes = kPartBytes / 2;
  // Memory for each reader to transcode from, once it has to: one huge page.
  static constexpr int64_t kStagingBytes = int64_t{2} << 20;
  static constexpr int kMaxBegun = 16;  // parts
  // A guess begins only while fewer have begun: enough for the drive to be busy, and what comes to be needed
  // waits for no more than these.
  static constexpr int kMostBegunBeforeGuess = 6;

  explicit Store(int num_readers,
                 std::shared_ptr<FileSystem> file_system = std::make_shared<RealFileSystem>());
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // Throws std::system_error. Files stay open until close().
  int open(const std::string& path, bool direct = true);
  FileInfo info(int file_id) const;

  // Starts reading records, one ticket each, in one go. Throws std::invalid_argument, and starts nothing, for
  // a piece that cannot be meant: unknown file, unaligned or outside the arena, a matrix of another size, a
  // checksum beside a transcoded piece. A file that ends too early is found by the reader. The arena's memory
  // is held until the tickets are done.
  std::vector<int64_t> fetch(Arena& arena, const std::vector<PlacedRecord>& records,
                             Urgency urgency = Urgency::now);
  int64_t fetch(Arena& arena, std::vector<Piece> pieces, std::vector<uint32_t> checksums = {}) {
    const Record record{std::move(pieces), std::move(checksums)};
    return fetch(arena, {PlacedRecord{record}})[0];
  }

  // Somebody waits for these now: what has not begun of them goes behind what is needed already.
  void hurry(const std::vector<int64_t>& tickets);

  // Returns those of `tickets` that are done, at least one unless `tickets` is empty or the time is over, and
  // forgets them.
  std::vector<Completion> wait_any(const std::vector<int64_t>& tickets, std::chrono::milliseconds timeout);

  // Drops what no reader has begun, waits for what one has, forgets the ticket. Returns whether it was known.
  bool cancel(int64_t ticket);

  // Reads no more of `tickets`. Forgets those of which nothing has begun, and returns them; others end as
  // `dropped` when what has begun has landed. Never waits.
  std::vector<int64_t> drop(const std::vector<int64_t>& tickets);

  // Memory for transcoding that the readers may come to hold, all of them together.
  int64_t staging_bytes() const { return num_readers_ * kStagingBytes; }
  // What they hold of it.
  int64_t staging_held_bytes() const;
  // What one ticket takes of the heap, at most, until it is done: for pieces of so many bytes.
  static int64_t request_bytes(const std::vector<int64_t>& piece_bytes);

  bool is_asynchronous() const { return queue_of_kernel_ != nullptr; }

  int64_t pending() const;  // tickets that are not done
  StoreStats stats() const;

  // Joins the readers; tickets that are not done fail. Harmless the second time.
  void close();

 private:
  struct File {
    File(std::string file_path, OpenFile opened)
        : path(std::move(file_path)), open(std::move(opened)), is_cache_asked(open.cached_handle >= 0) {}

    const std::string path;
    const OpenFile open;
    std::atomic<bool> is_cache_asked;
    std::atomic<int64_t> cache_misses{0};  // in a row
  };
  struct Request;
  struct PieceState;
  struct Part {
    Request* request;
    size_t piece;
    int64_t begin;  // of the file, aligned
    int64_t end;
    int64_t panel_begin = 0;  // of a matrix to transcode
    int64_t panel_end = 0;
  };
  struct Outcome {
    ReadError error = ReadError::none;
    std::string message;
  };
  // A part that has begun. Ended, if `got` says so.
  struct Begun {
    static constexpr ssize_t kUnread = -100'000;  // no errno is as small

    Part part;
    uint8_t* memory = nullptr;  // what [part.begin, part.end) is read to: of the arena, or of staging_
    ssize_t got = kUnread;      // as of FileSystem::pread
    double begin_seconds = 0;
    bool asks_cache = false;
  };
  class Staging;

  // Appends the piece to the request and its parts to `parts`. Holding the lock.
  void add_piece(Request& request, const Piece& piece, std::optional<uint32_t> checksum, int64_t dest_offset,
                 Arena& arena, std::vector<Part>& parts);
  void serve();
  std::deque<Part>* next_queue();
  void begin_parts(std::unique_lock<std::mutex>& lock);
  void reap(std::unique_lock<std::mutex>& lock);
  void finish_landed(std::unique_lock<std::mutex>& lock);
  void wake_readers(size_t num_needed);
  static bool asks_cache(File& file);
  Outcome read_part(const Begun& begun);
  int64_t read_cached(File& file, uint8_t* memory, int64_t offset, int64_t nbytes);
  Outcome read_range(const PieceState& piece, const Begun& begun, int64_t needed_end);
  Outcome check_piece(const PieceState& piece);
  void finish_part(std::unique_lock<std::mutex>& lock, const Part& part, Outcome outcome);
  void end_request(Request& request);
  void add_seconds(double StoreStats::* counter, double seconds);
  void require_open() const;

  const std::shared_ptr<FileSystem> file_system_;
  const int num_readers_;
  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable reader_needed_;
  std::condition_variable ticket_done_;
  std::deque<File> files_;  // a deque: readers keep references
  std::array<std::deque<Part>, kNumUrgencies> queues_;
  std::array<Begun, kMaxBegun> begun_;
  std::vector<size_t> free_;          // of begun_
  std::deque<size_t> landed_;         // of begun_: a reader's turn
  std::unique_ptr<Staging> staging_;  // from the first part that needs it
  std::unique_ptr<ReadQueue> queue_of_kernel_;
  int num_submitting_ = 0;  // threads that hand reads to the kernel
  int num_in_flight_ = 0;   // of the kernel
  int num_unread_ = 0;      // in landed_, or with a reader that calls pread
  bool is_reaping_ = false;
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  std::vector<std::thread> readers_;
  StoreStats stats_;
  int64_t next_ticket_ = 1;
  int64_t num_pending_ = 0;
  double busy_since_ = 0;
  bool is_closed_ = false;
};

}  // namespace argosy
