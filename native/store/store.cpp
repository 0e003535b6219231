// store.cpp: the queue of parts, how parts begin and land, and how a ticket ends.
#include "store/store.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "store/crc32c.h"
#include "store/start_threads.h"

namespace argosy {

struct Store::PieceState {
  File* file;
  int64_t offset;
  int64_t nbytes;
  uint8_t* memory;  // destination of `offset` rounded down; for a transcoded piece, of the matrix
  std::optional<uint32_t> checksum;
  std::optional<Transcode> transcode;
  int64_t parts_left;
};

struct Store::Request {
  int64_t ticket;
  std::shared_ptr<const void> memory;
  std::vector<PieceState> pieces;
  int64_t parts_left = 0;
  bool is_begun = false;
  Outcome outcome;
};

namespace {

constexpr int64_t kMissesInARow = 8;       // after this many, the page cache is rarely checked
constexpr int64_t kAskedAfterMisses = 64;  // then only one part in this many checks it

int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

// The memory that glibc uses for a block of this size: an 8-byte header before it, in steps of 16 bytes.
int64_t heap_bytes(size_t nbytes) { return std::max<int64_t>(32, int64_t(nbytes + 8 + 15) / 16 * 16); }

std::string file_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

std::string range_of(int64_t offset, int64_t nbytes) {
  return "bytes " + std::to_string(offset) + " to " + std::to_string(offset + nbytes);
}

std::string hex(uint32_t value) {
  char text[16];
  snprintf(text, sizeof(text), "%08" PRIx32, value);
  return text;
}

// Size of the matrix that a piece becomes.
int64_t transcoded_bytes(const Piece& piece, const std::string& name) {
  const auto& [type, rows, cols, interleaved] = *piece.transcode;
  // These limits keep every product below from overflowing.
  constexpr int64_t kMostRows = int64_t{1} << 30;
  const bool is_possible = rows > 0 && cols > 0 && interleaved > 0 && cols <= kMostRows &&
                           rows <= kMostRows && interleaved <= kMostRows / rows &&
                           has_whole_blocks(type, cols) && has_whole_words(type, rows) &&
                           (interleaved == 1 || may_be_interleaved(type));
  if (!is_possible || source_bytes(type, interleaved * rows, cols) != piece.nbytes) {
    throw std::invalid_argument(name + ": " + std::to_string(piece.nbytes) + " bytes are not " +
                                (interleaved == 1 ? "" : std::to_string(interleaved) + " times ") +
                                std::to_string(rows) + " rows of " + std::to_string(cols) +
                                " columns in blocks of " + std::to_string(block_cols(type)));
  }
  return interleaved * matrix_bytes(slot_format(type), rows, cols);
}

}  // namespace

// Staging memory in granules, allocated first-fit. A part takes nine granules, so few searches fail.
class Store::Staging {
 public:
  explicit Staging(int64_t nbytes) : arena_(size_t(nbytes)), is_taken_(size_t(nbytes / kGranule)) {}

  int64_t size() const { return int64_t(arena_.size()); }

  // Returns null if no free run is long enough.
  uint8_t* take(int64_t nbytes) {
    const auto wanted = size_t(divide_up(nbytes, kGranule));
    size_t run = 0;
    for (size_t i = 0; i < is_taken_.size(); ++i) {
      run = is_taken_[i] ? 0 : run + 1;
      if (run < wanted) continue;
      mark(i + 1 - wanted, wanted, true);
      return arena_.data() + int64_t(i + 1 - wanted) * kGranule;
    }
    return nullptr;
  }

  void give_back(const uint8_t* memory, int64_t nbytes) {
    mark(size_t((memory - arena_.data()) / kGranule), size_t(divide_up(nbytes, kGranule)), false);
  }

 private:
  static constexpr int64_t kGranule = 64 << 10;

  void mark(size_t first, size_t count, bool is_taken) {
    std::fill_n(is_taken_.begin() + std::ptrdiff_t(first), count, is_taken);
  }

  Arena arena_;
  std::vector<bool> is_taken_;
};

int64_t Record::bytes(int64_t num_pieces, bool has_checksums) {
  const auto count = size_t(num_pieces);
  return heap_bytes(count * sizeof(Piece)) + (has_checksums ? heap_bytes(count * sizeof(uint32_t)) : 0);
}

int64_t Store::request_bytes(const std::vector<int64_t>& piece_bytes) {
  int64_t num_parts = 0;
  // A part has whole strips, so it may have little more than half of its size.
  for (const int64_t nbytes : piece_bytes) num_parts += 2 * nbytes / kTranscodedPartBytes + 1;
  const int64_t in_table =
      heap_bytes(sizeof(void*) + sizeof(decltype(requests_)::value_type)) + 2 * int64_t(sizeof(void*));
  return heap_bytes(sizeof(Request)) + heap_bytes(piece_bytes.size() * sizeof(PieceState)) + in_table +
         num_parts * int64_t(sizeof(Part));
}

Store::Store(int num_readers, std::shared_ptr<FileSystem> file_system, int64_t bytes_per_s,
             std::shared_ptr<Foreground> foreground)
    : file_system_(std::move(file_system)),
      num_readers_(num_readers),
      bytes_per_s_(bytes_per_s),
      foreground_(std::move(foreground)),
      is_in_background_(foreground_ != nullptr) {
  require_threads("num_readers", num_readers);
  queue_of_kernel_ = file_system_->read_queue(kMaxBegun);
  for (size_t i = kMaxBegun; i > 0; --i) free_.push_back(i - 1);
  readers_ = start_threads(num_readers, [this](int) { serve(); }, [this] { close(); });
}

Store::~Store() { close(); }

void Store::require_open() const {
  if (is_closed_) throw std::invalid_argument("the store is closed");
}

int Store::open(const std::string& path, bool direct) {
  {
    std::lock_guard lock(mutex_);
    require_open();
  }
  OpenFile file = file_system_->open(path, direct);
  std::lock_guard lock(mutex_);
  if (is_closed_) {
    file_system_->close(file);
    require_open();
  }
  files_.emplace_back(path, std::move(file));
  return int(files_.size()) - 1;
}

FileInfo Store::info(int file_id) const {
  std::lock_guard lock(mutex_);
  if (file_id < 0 || size_t(file_id) >= files_.size()) {
    throw std::invalid_argument("no file has the id " + std::to_string(file_id));
  }
  const File& file = files_[size_t(file_id)];
  return {file.path, file.open.size, file.open.alignment, file.open.is_direct, file.open.why_not_direct};
}

std::vector<int64_t> Store::fetch(Arena& arena, const std::vector<PlacedRecord>& records, Urgency urgency) {
  std::vector<std::unique_ptr<Request>> requests;
  std::vector<Part> parts;
  std::vector<int64_t> tickets;
  requests.reserve(records.size());
  tickets.reserve(records.size());

  std::unique_lock lock(mutex_);
  require_open();
  for (const auto& [record, base_offset] : records) {
    const auto& [pieces, checksums] = record;
    if (!checksums.empty() && checksums.size() != pieces.size()) {
      throw std::invalid_argument("found " + std::to_string(pieces.size()) + " pieces and " +
                                  std::to_string(checksums.size()) +
                                  " checksums, expected one checksum per piece");
    }
    auto& request = requests.emplace_back(std::make_unique<Request>());
    request->memory = arena.hold();
    request->pieces.reserve(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      add_piece(*request, pieces[i], checksums.empty() ? std::nullopt : std::optional(checksums[i]),
                base_offset, arena, parts);
    }
    for (const PieceState& piece : request->pieces) request->parts_left += piece.parts_left;
  }
  for (auto& request : requests) {
    tickets.push_back(request->ticket = next_ticket_++);
    if (request->parts_left > 0) ++num_pending_;
    requests_.emplace(request->ticket, std::move(request));
  }
  std::deque<Part>& queue = queues_[size_t(urgency)];
  queue.insert(queue.end(), parts.begin(), parts.end());
  begin_parts(lock);
  return tickets;
}

void Store::add_piece(Request& request, const Piece& piece, std::optional<uint32_t> checksum,
                      int64_t base_offset, Arena& arena, std::vector<Part>& parts) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const int64_t arena_bytes = int64_t(arena.size());
  if (piece.file_id < 0 || size_t(piece.file_id) >= files_.size()) {
    throw std::invalid_argument("no file has the id " + std::to_string(piece.file_id));
  }
  File& file = files_[size_t(piece.file_id)];
  const std::string& path = file.path;
  const int64_t align = file.open.alignment;
  if (piece.offset < 0 || piece.nbytes < 1 || piece.offset > kMost - align - piece.nbytes) {
    throw std::invalid_argument(
        file_name(path) + ": a piece must begin at 0 or later and hold at least 1 byte, found offset " +
        std::to_string(piece.offset) + " and " + std::to_string(piece.nbytes) + " bytes");
  }
  if (base_offset < 0 || piece.dest_offset < 0 || piece.dest_offset > kMost - base_offset) {
    throw std::invalid_argument("dest_offset must be 0 or more, found " + std::to_string(piece.dest_offset));
  }
  const int64_t dest_offset = base_offset + piece.dest_offset;
  const int64_t dest_align = piece.transcode ? kMatrixAlignment : align;
  if (dest_offset % dest_align != 0) {
    throw std::invalid_argument("dest_offset must be a multiple of " + std::to_string(dest_align) +
                                ", found " + std::to_string(dest_offset));
  }
  const int64_t region_offset = round_down(piece.offset, align);
  const int64_t region_end = round_up(piece.offset + piece.nbytes, align);
  const int64_t dest_bytes =
      piece.transcode ? transcoded_bytes(piece, file_name(path)) : region_end - region_offset;
  if (dest_offset > arena_bytes || dest_bytes > arena_bytes - dest_offset) {
    throw std::invalid_argument("a piece takes " + std::to_string(dest_bytes) + " bytes at " +
                                std::to_string(dest_offset) + ", but the arena ends at " +
                                std::to_string(arena_bytes));
  }
  const size_t index = request.pieces.size();
  const size_t parts_before = parts.size();
  if (piece.transcode) {
    if (checksum) throw std::invalid_argument("a transcoded piece cannot have a checksum");
    const int64_t rows = piece.transcode->rows, cols = piece.transcode->cols;
    const int64_t panel_bytes = piece.transcode->panel_bytes();
    if (panel_bytes > staging_bytes() - 2 * align) {
      throw std::invalid_argument(
          file_name(path) + ": " + std::to_string(rows * piece.transcode->interleaved) + " rows of " +
          std::to_string(cols) + " columns are read in strips of " + std::to_string(panel_bytes) +
          " bytes, but the readers can transcode at most " + std::to_string(staging_bytes() - 2 * align) +
          " at once");
    }
    const int64_t num_panels = num_strips(piece.transcode->block_type, rows, cols);
    const int64_t num_parts = divide_up(num_panels, std::max<int64_t>(1, kTranscodedPartBytes / panel_bytes));
    const int64_t part_panels = divide_up(num_panels, num_parts);
    for (int64_t panel = 0; panel < num_panels; panel += part_panels) {
      const int64_t panel_end = std::min(panel + part_panels, num_panels);
      const int64_t data_end = std::min(panel_end * panel_bytes, piece.nbytes);
      parts.push_back({&request, index, round_down(piece.offset + panel * panel_bytes, align),
                       round_up(piece.offset + data_end, align), panel, panel_end});
    }
  } else {
    const int64_t num_parts = divide_up(region_end - region_offset, kPartBytes);
    const int64_t part_bytes = round_up(divide_up(region_end - region_offset, num_parts), align);
    for (int64_t begin = region_offset; begin < region_end; begin += part_bytes) {
      parts.push_back({&request, index, begin, std::min(begin + part_bytes, region_end)});
    }
  }
  request.pieces.push_back({&file, piece.offset, piece.nbytes, arena.data() + dest_offset, checksum,
                            piece.transcode, int64_t(parts.size() - parts_before)});
}

std::vector<Completion> Store::wait_any(const std::vector<int64_t>& tickets,
                                        std::chrono::milliseconds timeout) {
  std::vector<Completion> done;
  std::unique_lock lock(mutex_);
  for (const int64_t ticket : tickets) {
    if (!requests_.contains(ticket))
      throw std::invalid_argument("no fetch has the ticket " + std::to_string(ticket));
  }
  const auto collect = [&] {
    for (const int64_t ticket : tickets) {
      const auto found = requests_.find(ticket);
      if (found == requests_.end() || found->second->parts_left > 0) continue;
      done.push_back({ticket, found->second->outcome.error, std::move(found->second->outcome.message)});
      requests_.erase(found);
    }
    return !done.empty();
  };
  if (!tickets.empty()) ticket_done_.wait_for(lock, timeout, collect);
  return done;
}

bool Store::cancel(int64_t ticket) {
  std::unique_lock lock(mutex_);
  const auto found = requests_.find(ticket);
  if (found == requests_.end()) return false;
  Request* request = found->second.get();
  const auto is_its = [request](const Part& part) { return part.request == request; };
  int64_t dropped = 0;
  for (std::deque<Part>& queue : queues_) dropped += int64_t(std::erase_if(queue, is_its));
  if (dropped > 0) {
    request->parts_left -= dropped;
    if (request->parts_left == 0) --num_pending_;
  }
  // Look the ticket up again each time: another thread may have collected it in between.
  ticket_done_.wait(lock, [this, ticket] {
    const auto still = requests_.find(ticket);
    return still == requests_.end() || still->second->parts_left == 0;
  });
  requests_.erase(ticket);
  return true;
}

void Store::hurry(const std::vector<int64_t>& tickets) {
  std::unordered_set<const Request*> requests;
  std::unique_lock lock(mutex_);
  for (const int64_t ticket : tickets) {
    const auto found = requests_.find(ticket);
    if (found != requests_.end()) requests.insert(found->second.get());
  }
  std::deque<Part>& needed = queues_[size_t(Urgency::now)];
  for (const Urgency urgency : {Urgency::soon, Urgency::maybe}) {
    std::deque<Part>& queue = queues_[size_t(urgency)];
    const auto first = std::stable_partition(queue.begin(), queue.end(), [&requests](const Part& part) {
      return !requests.contains(part.request);
    });
    needed.insert(needed.end(), first, queue.end());
    queue.erase(first, queue.end());
  }
  begin_parts(lock);
}

std::vector<int64_t> Store::drop(const std::vector<int64_t>& tickets) {
  std::vector<int64_t> dropped;
  std::unordered_map<const Request*, int64_t> parts;  // the parts of these requests that had not begun
  std::lock_guard lock(mutex_);
  for (const int64_t ticket : tickets) {
    const auto found = requests_.find(ticket);
    if (found != requests_.end()) parts.emplace(found->second.get(), 0);
  }
  for (std::deque<Part>& queue : queues_) {
    std::erase_if(queue, [&parts](const Part& part) {
      const auto found = parts.find(part.request);
      if (found != parts.end()) ++found->second;
      return found != parts.end();
    });
  }
  for (const int64_t ticket : tickets) {
    const auto found = requests_.find(ticket);
    if (found == requests_.end() || parts[found->second.get()] == 0) continue;
    Request& request = *found->second;
    request.parts_left -= std::exchange(parts[&request], 0);
    if (!request.is_begun) {
      dropped.push_back(ticket);
      requests_.erase(found);
      --num_pending_;
    } else {
      if (request.outcome.error == ReadError::none)
        request.outcome = {ReadError::dropped, "dropped before it was fully read"};
      if (request.parts_left == 0) end_request(request);
    }
  }
  return dropped;
}

int64_t Store::pending() const {
  std::lock_guard lock(mutex_);
  return num_pending_;
}

int64_t Store::staging_held_bytes() const {
  std::lock_guard lock(mutex_);
  return staging_ ? staging_->size() : 0;
}

StoreStats Store::stats() const {
  std::lock_guard lock(mutex_);
  StoreStats stats = stats_;
  if (free_.size() < kMaxBegun) stats.busy_seconds += file_system_->seconds() - busy_since_;
  return stats;
}

void Store::leave_background() {
  std::unique_lock lock(mutex_);
  is_in_background_ = false;
  if (!is_closed_) begin_parts(lock);
}

void Store::close() {
  std::vector<std::thread> readers;
  {
    std::lock_guard lock(mutex_);
    if (is_closed_) return;
    is_closed_ = true;
    readers.swap(readers_);
    for (std::deque<Part>& queue : queues_) {
      for (const Part& part : queue) {
        part.request->outcome = {ReadError::io, "the store was closed before the bytes were read"};
        if (--part.request->parts_left == 0) --num_pending_;
      }
      queue.clear();
    }
  }
  reader_needed_.notify_all();
  closed_.notify_all();
  for (std::thread& reader : readers) reader.join();
  ticket_done_.notify_all();
  std::lock_guard lock(mutex_);
  for (const File& file : files_) file_system_->close(file.open);
  for (auto& [ticket, request] : requests_) request->memory.reset();
}

void Store::serve() {
  std::unique_lock lock(mutex_);
  while (true) {
    begin_parts(lock);
    if (!landed_.empty()) {
      const double start = is_in_background_ ? thread_seconds() : 0;
      finish_landed(lock);
      if (is_in_background_ && !is_closed_) {
        lock.unlock();
        foreground_->give_way(thread_seconds() - start);
        lock.lock();
      }
    } else if (num_in_flight_ > 0 && !is_reaping_) {
      reap(lock);
    } else if (is_closed_ && num_in_flight_ == 0 && num_submitting_ == 0) {
      reader_needed_.notify_all();
      return;
    } else {
      reader_needed_.wait(lock);
    }
  }
}

// Returns the queue whose first part may begin now; null if none may. Prefetches leave one place per reader
// free, because a part that has begun delays demand reads that arrive later.
std::deque<Store::Part>* Store::next_queue() {
  const int num_begun = kMaxBegun - int(free_.size());
  if (is_in_background_ && num_begun >= kMostBegunInBackground) return nullptr;
  const std::array<int, kNumUrgencies> most_begun = {
      kMaxBegun - 1, kMaxBegun - 1 - std::min(num_readers_, kMaxBegun - 1), kMostBegunBeforeGuess - 1};
  for (size_t urgency = 0; urgency < queues_.size(); ++urgency) {
    if (!queues_[urgency].empty()) return num_begun <= most_begun[urgency] ? &queues_[urgency] : nullptr;
  }
  return nullptr;
}

// Begins as many parts as there is room for, in order. The kernel gets all parts that it can read
// asynchronously, in one call; the rest go straight to landed_ for a reader. Releases the lock during the
// call.
void Store::begin_parts(std::unique_lock<std::mutex>& lock) {
  std::array<AsyncRead, kMaxBegun> reads;
  size_t num_reads = 0, num_landed = 0;
  while (std::deque<Part>* queue = next_queue()) {
    const Part part = queue->front();
    const PieceState& piece = part.request->pieces[part.piece];
    if (part.request->outcome.error != ReadError::none) {  // do not read the rest of a failed request
      queue->pop_front();
      finish_part(lock, part, {});
      continue;
    }
    const OpenFile& file = piece.file->open;
    const bool asks_cache = Store::asks_cache(*piece.file);
    const bool is_for_kernel = queue_of_kernel_ && file.is_direct && !file.drops_cache && !asks_cache;
    if (!is_for_kernel && num_unread_ >= num_readers_) break;
    Begun begun{part};
    begun.asks_cache = asks_cache;
    begun.memory = piece.memory + (part.begin - round_down(piece.offset, file.alignment));
    if (piece.transcode) {
      try {
        if (!staging_) staging_ = std::make_unique<Staging>(staging_bytes());
      } catch (const OutOfMemory& error) {
        queue->pop_front();
        finish_part(lock, part, {ReadError::io, error.what()});
        continue;
      }
      begun.memory = staging_->take(part.end - part.begin);
      if (begun.memory == nullptr) break;
    }
    queue->pop_front();
    part.request->is_begun = true;
    begun.begin_seconds = file_system_->seconds();
    if (free_.size() == kMaxBegun) busy_since_ = begun.begin_seconds;
    if (bytes_per_s_ > 0) {
      const std::chrono::duration<double> seconds(double(part.end - part.begin) / double(bytes_per_s_));
      drive_free_ = std::max(drive_free_, std::chrono::steady_clock::now()) +
                    std::chrono::ceil<std::chrono::nanoseconds>(seconds);
      begun.due = drive_free_;
    }
    const size_t index = free_.back();
    free_.pop_back();
    begun_[index] = begun;
    if (is_for_kernel) {
      reads[num_reads++] = {file.handle, begun.memory, size_t(part.end - part.begin), part.begin, index};
    } else {
      landed_.push_back(index);
      ++num_unread_;
      ++num_landed;
    }
  }
  if (num_reads > 0) {
    ++num_submitting_;
    lock.unlock();
    const size_t num_taken = queue_of_kernel_->submit({reads.data(), num_reads});
    lock.lock();
    --num_submitting_;
    num_in_flight_ += int(num_taken);
    for (size_t i = num_taken; i < num_reads; ++i) {
      landed_.push_back(reads[i].tag);
      ++num_unread_;
      ++num_landed;
    }
  }
  wake_readers(num_landed + (num_reads > 0 && !is_reaping_ ? 1 : 0));
}

void Store::wake_readers(size_t num_needed) {
  if (num_needed >= size_t(num_readers_)) {
    reader_needed_.notify_all();
  } else {
    for (size_t i = 0; i < num_needed; ++i) reader_needed_.notify_one();
  }
}

// Waits for results from the kernel and distributes them. Nobody waits for the kernel while this reader
// finishes its part: by then more parts may have landed, and their readers are woken.
void Store::reap(std::unique_lock<std::mutex>& lock) {
  std::array<AsyncResult, kMaxBegun> results;
  is_reaping_ = true;
  lock.unlock();
  const size_t num_results = queue_of_kernel_->wait(results);
  lock.lock();
  is_reaping_ = false;
  num_in_flight_ -= int(num_results);
  const double now = file_system_->seconds();
  for (size_t i = 0; i < num_results; ++i) {
    Begun& begun = begun_[results[i].tag];
    begun.got = results[i].got;
    stats_.read_seconds += now - begun.begin_seconds;
    landed_.push_back(results[i].tag);
  }
  wake_readers(num_results - 1);
}

void Store::finish_landed(std::unique_lock<std::mutex>& lock) {
  const size_t index = landed_.front();
  landed_.pop_front();
  const Begun begun = begun_[index];
  const Part& part = begun.part;
  Outcome outcome;
  if (part.request->outcome.error == ReadError::none) {
    lock.unlock();
    outcome = read_part(begun);
    lock.lock();
    if (bytes_per_s_ > 0) closed_.wait_until(lock, begun.due, [this] { return is_closed_; });
  }
  if (begun.got == Begun::kUnread) --num_unread_;
  if (part.request->pieces[part.piece].transcode) {
    staging_->give_back(begun.memory, part.end - part.begin);
  }
  finish_part(lock, part, std::move(outcome));
  free_.push_back(index);
  if (free_.size() == kMaxBegun) stats_.busy_seconds += file_system_->seconds() - busy_since_;
}

// Reads, and if necessary transcodes, a part into its destination.
Store::Outcome Store::read_part(const Begun& begun) {
  const Part& part = begun.part;
  const PieceState& piece = part.request->pieces[part.piece];
  const int64_t piece_end = piece.offset + piece.nbytes;  // the file may end after this
  if (!piece.transcode) return read_range(piece, begun, std::min(part.end, piece_end));
  const auto& [type, rows, cols, interleaved] = *piece.transcode;
  const int64_t panel_bytes = piece.transcode->panel_bytes();
  const int64_t data_begin = piece.offset + part.panel_begin * panel_bytes;
  const int64_t data_end = std::min(piece.offset + part.panel_end * panel_bytes, piece_end);
  Outcome outcome = read_range(piece, begun, data_end);
  if (outcome.error != ReadError::none) return outcome;
  const double start = file_system_->seconds();
  const bool is_finite = transcode(type, begun.memory + (data_begin - part.begin), rows, cols, interleaved,
                                   part.panel_begin, part.panel_end, piece.memory);
  add_seconds(&StoreStats::transcode_seconds, file_system_->seconds() - start);
  if (is_finite) return {};
  return {ReadError::not_finite, file_name(piece.file->path) + ": " +
                                     range_of(data_begin, data_end - data_begin) + " hold " +
                                     what_is_refused(type)};
}

// Reads bytes [part.begin, part.end) of the file into the part's memory, except those already there. It is an
// error if the file ends before `needed_end`.
Store::Outcome Store::read_range(const PieceState& piece, const Begun& begun, int64_t needed_end) {
  const Part& part = begun.part;
  uint8_t* memory = begun.memory;
  const OpenFile& file = piece.file->open;
  const std::string& path = piece.file->path;
  ssize_t got = begun.got;
  int64_t num_reads = 0, num_bytes = 0;
  Outcome outcome;
  const double start = file_system_->seconds();
  const int64_t cached =
      begun.asks_cache ? read_cached(*piece.file, memory, part.begin, part.end - part.begin) : 0;
  if (cached > 0) num_reads = 1, num_bytes = cached;
  int64_t end = part.begin + cached;  // end of the bytes in memory
  while (end < needed_end) {
    const int64_t from = round_down(end, file.alignment);  // a direct read cannot resume inside a block
    if (got == Begun::kUnread) {
      got = file_system_->pread(file.handle, memory + (from - part.begin), size_t(part.end - from), from);
    }
    ++num_reads;
    const ssize_t latest = std::exchange(got, Begun::kUnread);
    if (latest == -EINTR) continue;
    if (latest < 0) {
      outcome = {ReadError::io, file_name(path) + ": reading " + range_of(piece.offset, piece.nbytes) + ": " +
                                    strerror(int(-latest))};
      break;
    }
    num_bytes += latest;
    if (from + latest <= end) {
      outcome = {ReadError::short_file, file_name(path) + " ends at byte " + std::to_string(end) + ", but " +
                                            range_of(piece.offset, piece.nbytes) + " were requested"};
      break;
    }
    end = from + latest;
  }
  if (file.drops_cache) file_system_->drop_cache(file.handle, part.begin, part.end - part.begin);
  const double seconds = begun.got == Begun::kUnread ? file_system_->seconds() - start : 0;
  std::lock_guard lock(mutex_);
  stats_.reads += num_reads;
  stats_.bytes_read += num_bytes;
  stats_.cached_bytes += cached;
  stats_.read_seconds += seconds;
  return outcome;
}

// Whether to check the page cache before reading a part from the drive.
bool Store::asks_cache(File& file) {
  if (!file.is_cache_asked.load(std::memory_order_relaxed)) return false;
  return file.cache_misses.load(std::memory_order_relaxed) < kMissesInARow ||
         file.cache_misses.fetch_add(1, std::memory_order_relaxed) % kAskedAfterMisses == 0;
}

// Reads the part from the page cache. Returns the bytes read from its start; 0 if the cache does not hold all
// of it.
int64_t Store::read_cached(File& file, uint8_t* memory, int64_t offset, int64_t nbytes) {
  const ssize_t got = file_system_->read_cached(file.open, memory, size_t(nbytes), offset);
  if (got > 0) {
    file.cache_misses.store(0, std::memory_order_relaxed);
    return got;
  }
  if (got == 0 || got == -EAGAIN || got == -EINTR) {
    file.cache_misses.fetch_add(1, std::memory_order_relaxed);
  } else {
    file.is_cache_asked.store(false, std::memory_order_relaxed);
  }
  return 0;
}

void Store::add_seconds(double StoreStats::* counter, double seconds) {
  std::lock_guard lock(mutex_);
  stats_.*counter += seconds;
}

Store::Outcome Store::check_piece(const PieceState& piece) {
  const double start = file_system_->seconds();
  const uint32_t found =
      crc32c_wide(piece.memory + piece.offset % piece.file->open.alignment, size_t(piece.nbytes));
  add_seconds(&StoreStats::checksum_seconds, file_system_->seconds() - start);
  if (found == *piece.checksum) return {};
  return {ReadError::checksum, file_name(piece.file->path) + ": " + range_of(piece.offset, piece.nbytes) +
                                   " have the checksum " + hex(found) + ", expected " + hex(*piece.checksum)};
}

// The reader that lands the last part of a piece verifies the piece before it counts that part as done: until
// then the request is not done.
void Store::finish_part(std::unique_lock<std::mutex>& lock, const Part& part, Outcome outcome) {
  Request& request = *part.request;
  PieceState& piece = request.pieces[part.piece];
  const auto note = [&request](Outcome&& latest) {
    if (request.outcome.error == ReadError::none) request.outcome = std::move(latest);
  };
  note(std::move(outcome));
  if (--piece.parts_left == 0 && piece.checksum && request.outcome.error == ReadError::none) {
    lock.unlock();
    Outcome checked = check_piece(piece);
    lock.lock();
    note(std::move(checked));
  }
  if (piece.parts_left == 0 && has_landed(request, piece) && request.outcome.error == ReadError::none) {
    lock.unlock();
    Outcome completed = complete_matrix(piece);
    lock.lock();
    note(std::move(completed));
  }
  if (--request.parts_left == 0) end_request(request);
}

// Whether the piece is the last of the parts of a matrix with act-order. The caller holds the lock.
bool Store::has_landed(const Request& request, const PieceState& piece) {
  if (!piece.transcode || !has_act_order(slot_format(piece.transcode->block_type))) return false;
  return std::all_of(request.pieces.begin(), request.pieces.end(), [&piece](const PieceState& each) {
    return each.memory != piece.memory || each.parts_left == 0;
  });
}

Store::Outcome Store::complete_matrix(const PieceState& piece) {
  const auto& [type, rows, cols, interleaved] = *piece.transcode;
  const double start = file_system_->seconds();
  const bool is_right = put_in_act_order(slot_format(type), rows, cols, piece.memory);
  add_seconds(&StoreStats::transcode_seconds, file_system_->seconds() - start);
  if (is_right) return {};
  return {ReadError::not_finite, file_name(piece.file->path) + ": the matrix of " +
                                     range_of(piece.offset, piece.nbytes) + " holds " + kWrongOrder};
}

void Store::end_request(Request& request) {
  --num_pending_;
  request.memory.reset();
  ticket_done_.notify_all();
}

}  // namespace argosy
