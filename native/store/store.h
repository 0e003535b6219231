// store.h: bytes from files into arenas, asynchronously.
//
//   fetch(records) -> tickets  ->  readers: read, check, transcode  ->  wait_any(tickets) -> completions
//
// A piece is bytes [offset, offset + nbytes) of a file. A plain piece is read in place, rounded outwards to
// the file's alignment, into `dest_offset`, so its own bytes begin at dest_offset + offset % alignment. A
// piece with a Transcode is a matrix of blocks: a few panels at a time are read into staging memory, and a
// reader transcodes them into slot format; the matrix begins exactly at dest_offset. A large piece is cut
// into parts. A ticket is done when all its pieces are in memory and match their checksums, or when one has
// failed and all its reads have stopped. After that, nothing writes to that memory.
//
//            direct                      reaped
//   queue ----------> kernel's queue ------------> landed ---> a reader: transcode, check, end the ticket
//         \------------------------------------->
//          page cache, buffered files, or no kernel's queue: the reader calls pread
//
// The thread that fetches submits its first parts to the kernel in one call, so the drive starts before any
// reader wakes up, and always has its next read queued, however busy the processor is. One reader at a time
// waits for the kernel's results and distributes them.
//
// Stretches already in the page cache are copied from it, part by part; all other reads bypass it. If no
// stretch of a file is cached at open, the page cache is never checked for it. After several misses in a row,
// it is checked only occasionally.
//
// Demand reads go first, then certain prefetches, then guesses. Within each class, reads run in the order of
// the calls.
//
// A store can imitate a slower drive: with `bytes_per_s`, a part lands no sooner than a drive of that rate
// would have read it and all parts that began before it. Bytes from the page cache also count.
//
// A store may begin in the background, to load a model while others answer: few parts are then in progress,
// and its readers give way to work in the foreground.
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
#include "store/foreground.h"

namespace argosy {

struct FileInfo {
  std::string path;
  int64_t size;
  int64_t alignment;
  bool is_direct;
  std::string why_not_direct;
};

// A matrix of blocks, one row after another (grouped_parts.h: or one strip of columns after another). It
// becomes panels of slot_format(block_type), or only the quants or only the scales of these panels
// (kernels/transcode.h). If several matrices are interleaved row by row in one tensor, each has `rows` rows,
// and the results are stored one after another.
struct Transcode {
  BlockType block_type;
  int64_t rows;
  int64_t cols;
  int64_t interleaved = 1;

  // Bytes of the file that become one strip of each matrix.
  int64_t panel_bytes() const { return interleaved * strip_bytes(block_type, rows, cols); }
};

struct Piece {
  int file_id;
  int64_t offset;
  int64_t nbytes;
  int64_t dest_offset;  // relative to the base_offset of the record
  std::optional<Transcode> transcode = std::nullopt;
};

// Pieces that are fetched together. A record can be fetched any number of times, to any free place.
struct Record {
  std::vector<Piece> pieces;
  std::vector<uint32_t> checksums = {};  // none, or the crc32c_wide of each piece

  // Heap memory that one record takes.
  static int64_t bytes(int64_t num_pieces, bool has_checksums);
};

// One record to fetch, for one ticket.
struct PlacedRecord {
  const Record& record;
  int64_t base_offset = 0;  // in the arena
};

// now: a caller waits for it. soon: it will almost certainly be needed. maybe: a guess, which may use the
// drive only when it is otherwise idle.
enum class Urgency { now, soon, maybe };
constexpr int kNumUrgencies = 3;

enum class ReadError { none, io, checksum, short_file, not_finite, dropped };

struct Completion {
  int64_t ticket;
  ReadError error;
  std::string message;  // empty if there is no error
};

struct StoreStats {
  int64_t bytes_read = 0;
  int64_t reads = 0;
  int64_t cached_bytes = 0;      // the part of bytes_read that came from the page cache
  double read_seconds = 0;       // from the start of each read to its end, summed over reads
  double checksum_seconds = 0;   // summed over readers
  double transcode_seconds = 0;  // summed over readers
  double busy_seconds = 0;       // wall time with at least one part begun and not finished
};

class Store {
 public:
  // Small enough that the readers share the last piece of a layer, and large enough for the drive: whole
  // pieces of 2.5 MiB were 7 % slower, and parts of 0.5 MiB were no faster (benchmarks/reads.py).
  static constexpr int64_t kPartBytes = int64_t{1} << 20;
  // Transcoded parts are half as large, because nothing overlaps the transcoding after the last read of a
  // layer. One expert of three slices of 864 KiB took 1.46 ms with halves and 1.63 ms with whole slices
  // (docs/experiments.md).
  static constexpr int64_t kTranscodedPartBytes = kPartBytes / 2;
  // Staging memory per reader, allocated when first needed: one huge page.
  static constexpr int64_t kStagingBytes = int64_t{2} << 20;
  static constexpr int kMaxBegun = 16;  // parts in progress
  // A guess begins only while fewer parts than this have begun: enough to keep the drive busy, and a demand
  // read waits for at most this many.
  static constexpr int kMostBegunBeforeGuess = 6;
  static constexpr int kMostBegunInBackground = 4;

  // `bytes_per_s` of 0: as fast as the drive is. Gives way to `foreground` until leave_background(); null: to
  // nothing.
  explicit Store(int num_readers,
                 std::shared_ptr<FileSystem> file_system = std::make_shared<RealFileSystem>(),
                 int64_t bytes_per_s = 0, std::shared_ptr<Foreground> foreground = nullptr);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // Throws std::system_error. Files stay open until close().
  int open(const std::string& path, bool direct = true);
  FileInfo info(int file_id) const;

  // Starts reading all records at once, one ticket each. Throws std::invalid_argument and starts nothing if a
  // piece is invalid: an unknown file, a destination that is unaligned or outside the arena, a matrix of the
  // wrong size, or a checksum for a transcoded piece. A file that ends too early is detected by the reader.
  // The store holds the arena's memory until the tickets are done.
  std::vector<int64_t> fetch(Arena& arena, const std::vector<PlacedRecord>& records,
                             Urgency urgency = Urgency::now);
  int64_t fetch(Arena& arena, std::vector<Piece> pieces, std::vector<uint32_t> checksums = {}) {
    const Record record{std::move(pieces), std::move(checksums)};
    return fetch(arena, {PlacedRecord{record}})[0];
  }

  // Moves the parts of these tickets that have not begun to the end of the `now` queue.
  void hurry(const std::vector<int64_t>& tickets);

  // Returns and forgets the tickets that are done: at least one, unless `tickets` is empty or the timeout
  // expires.
  std::vector<Completion> wait_any(const std::vector<int64_t>& tickets, std::chrono::milliseconds timeout);

  // Drops the parts that have not begun, waits for those that have, and forgets the ticket. Returns whether
  // the ticket was known.
  bool cancel(int64_t ticket);

  // Stops reading `tickets`. Forgets and returns the tickets with no part begun; each other ticket ends as
  // `dropped` once the parts that have begun have landed. Never waits.
  std::vector<int64_t> drop(const std::vector<int64_t>& tickets);

  // The most staging memory that all readers together can use.
  int64_t staging_bytes() const { return num_readers_ * kStagingBytes; }
  // The part of it allocated now.
  int64_t staging_held_bytes() const;
  // The most heap memory that one ticket with pieces of these sizes takes until it is done.
  static int64_t request_bytes(const std::vector<int64_t>& piece_bytes);

  bool is_asynchronous() const { return queue_of_kernel_ != nullptr; }

  int64_t pending() const;  // tickets that are not done
  StoreStats stats() const;

  // From now on the store reads as much at once as the drive takes, and gives way to nothing.
  void leave_background();

  // Joins the readers; tickets that are not done fail. Calling it again does nothing.
  void close();

 private:
  struct File {
    File(std::string file_path, OpenFile opened)
        : path(std::move(file_path)), open(std::move(opened)), is_cache_asked(open.cached_handle >= 0) {}

    const std::string path;
    const OpenFile open;
    std::atomic<bool> is_cache_asked;
    std::atomic<int64_t> cache_misses{0};  // consecutive misses
  };
  struct Request;
  struct PieceState;
  struct Part {
    Request* request;
    size_t piece;
    int64_t begin;  // in the file, aligned
    int64_t end;
    int64_t panel_begin = 0;  // first panel of the matrix to transcode
    int64_t panel_end = 0;
  };
  struct Outcome {
    ReadError error = ReadError::none;
    std::string message;
  };
  // A part that has begun. If `got` is set, its read has ended.
  struct Begun {
    static constexpr ssize_t kUnread = -100'000;  // outside the range of -errno

    Part part;
    uint8_t* memory = nullptr;  // destination of [part.begin, part.end): in the arena or in staging_
    ssize_t got = kUnread;      // as returned by FileSystem::pread
    double begin_seconds = 0;
    bool asks_cache = false;
    std::chrono::steady_clock::time_point due = {};  // it lands no sooner
  };
  class Staging;

  // Appends the piece to the request and its parts to `parts`. The caller holds the lock.
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
  static bool has_landed(const Request& request, const PieceState& piece);
  Outcome complete_matrix(const PieceState& piece);
  void finish_part(std::unique_lock<std::mutex>& lock, const Part& part, Outcome outcome);
  void end_request(Request& request);
  void add_seconds(double StoreStats::* counter, double seconds);
  void require_open() const;

  const std::shared_ptr<FileSystem> file_system_;
  const int num_readers_;
  const int64_t bytes_per_s_;
  // Kept to the end, even after leave_background(): whoever frees it may wait for a lock of its owner
  // (Python's), and readers hold mutex_.
  const std::shared_ptr<Foreground> foreground_;
  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable reader_needed_;
  std::condition_variable ticket_done_;
  std::condition_variable closed_;
  std::chrono::steady_clock::time_point drive_free_ =
      {};                   // when a drive of bytes_per_s_ has read what has begun
  std::deque<File> files_;  // a deque, because readers keep references
  std::array<std::deque<Part>, kNumUrgencies> queues_;
  std::array<Begun, kMaxBegun> begun_;
  std::vector<size_t> free_;          // free indices of begun_
  std::deque<size_t> landed_;         // indices of begun_ that wait for a reader
  std::unique_ptr<Staging> staging_;  // allocated for the first part that needs it
  std::unique_ptr<ReadQueue> queue_of_kernel_;
  int num_submitting_ = 0;  // threads inside ReadQueue::submit
  int num_in_flight_ = 0;   // reads in flight in the kernel
  int num_unread_ = 0;      // parts in landed_, or with a reader, that still need pread
  bool is_reaping_ = false;
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  bool is_in_background_;  // never without foreground_
  std::vector<std::thread> readers_;
  StoreStats stats_;
  int64_t next_ticket_ = 1;
  int64_t num_pending_ = 0;
  double busy_since_ = 0;
  bool is_closed_ = false;
};

}  // namespace argosy
