// store.cpp: the queue of parts, the reader threads, and the end of a ticket.
#include "store/store.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "store/crc32c.h"

namespace argosy {

struct Store::PieceState {
  File* file;
  int64_t offset;
  int64_t nbytes;
  uint8_t* memory;  // for `offset` rounded down; for a transcoded piece, the matrix
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

constexpr int64_t kMatrixAlignment = 64;   // where a transcoded matrix may begin
constexpr int64_t kMissesInARow = 8;       // after which the page cache is asked for
constexpr int64_t kAskedAfterMisses = 64;  // one part in so many

int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

std::string file_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

std::string range_of(int64_t offset, int64_t nbytes) {
  return "bytes " + std::to_string(offset) + " to " + std::to_string(offset + nbytes);
}

std::string hex(uint32_t value) {
  char text[16];
  snprintf(text, sizeof(text), "%08" PRIx32, value);
  return text;
}

// Bytes of the matrix that a piece becomes.
int64_t transcoded_bytes(const Piece& piece, const std::string& name) {
  const auto& [type, rows, cols] = *piece.transcode;
  const int64_t block_cols = quant_format(slot_format(type)).block_cols;
  // Half a byte for each weight at least: no product below can overflow.
  const bool is_possible = rows > 0 && cols > 0 && cols % block_cols == 0 &&
                           piece.nbytes < int64_t{1} << 55 && cols / 2 <= piece.nbytes / rows;
  if (!is_possible || rows * block_row_bytes(type, cols) != piece.nbytes) {
    throw std::invalid_argument(name + ": " + std::to_string(piece.nbytes) + " bytes are not " +
                                std::to_string(rows) + " rows of " + std::to_string(cols) +
                                " columns in blocks of " + std::to_string(block_cols));
  }
  return matrix_bytes(slot_format(type), rows, cols);
}

}  // namespace

Store::Store(int num_readers, std::shared_ptr<FileSystem> file_system)
    : file_system_(std::move(file_system)), num_readers_(num_readers) {
  if (num_readers < 1) {
    throw std::invalid_argument("a store needs at least 1 reader, asked for " + std::to_string(num_readers));
  }
  readers_.reserve(size_t(num_readers));
  for (int i = 0; i < num_readers; ++i) readers_.emplace_back([this] { read_parts(); });
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

std::vector<int64_t> Store::fetch(Arena& arena, const std::vector<Record>& records, bool ahead) {
  std::vector<std::unique_ptr<Request>> requests;
  std::vector<Part> parts;
  std::vector<int64_t> tickets;
  requests.reserve(records.size());
  tickets.reserve(records.size());

  std::unique_lock lock(mutex_);
  require_open();
  for (const Record& record : records) {
    const auto& [pieces, checksums, base_offset] = record;
    if (!checksums.empty() && checksums.size() != pieces.size()) {
      throw std::invalid_argument("there are " + std::to_string(pieces.size()) + " pieces and " +
                                  std::to_string(checksums.size()) + " checksums");
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
  std::deque<Part>& queue = ahead ? ahead_queue_ : queue_;
  queue.insert(queue.end(), parts.begin(), parts.end());
  lock.unlock();
  if (parts.size() < size_t(num_readers_)) {
    for (size_t i = 0; i < parts.size(); ++i) part_came_.notify_one();
  } else {
    part_came_.notify_all();
  }
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
                                std::to_string(dest_offset) + ", and the arena ends at " +
                                std::to_string(arena_bytes));
  }
  const size_t index = request.pieces.size();
  const size_t parts_before = parts.size();
  if (piece.transcode) {
    if (checksum) throw std::invalid_argument("a piece that is transcoded has no checksum");
    const auto& [type, rows, cols] = *piece.transcode;
    const int64_t panel_bytes = kPanelRows * block_row_bytes(type, cols);
    if (panel_bytes > kStagingBytes - 2 * align) {
      throw std::invalid_argument(file_name(path) + ": " + std::to_string(kPanelRows) + " rows of " +
                                  std::to_string(cols) + " columns take " + std::to_string(panel_bytes) +
                                  " bytes, and a reader transcodes from " +
                                  std::to_string(kStagingBytes - 2 * align) + " at most");
    }
    const int64_t num_panels = divide_up(rows, kPanelRows);
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
  const auto dropped = int64_t(std::erase_if(queue_, is_its) + std::erase_if(ahead_queue_, is_its));
  if (dropped > 0) {
    request->parts_left -= dropped;
    if (request->parts_left == 0) --num_pending_;
  }
  // Looked up again each time: another thread may have collected the ticket in between.
  ticket_done_.wait(lock, [this, ticket] {
    const auto still = requests_.find(ticket);
    return still == requests_.end() || still->second->parts_left == 0;
  });
  requests_.erase(ticket);
  return true;
}

std::vector<int64_t> Store::drop(const std::vector<int64_t>& tickets) {
  std::vector<int64_t> dropped;
  std::unordered_set<const Request*> requests;  // theirs
  std::lock_guard lock(mutex_);
  for (const int64_t ticket : tickets) {
    const auto found = requests_.find(ticket);
    if (found == requests_.end() || found->second->is_begun || found->second->parts_left == 0) continue;
    if (requests.insert(found->second.get()).second) dropped.push_back(ticket);
  }
  const auto is_theirs = [&requests](const Part& part) { return requests.contains(part.request); };
  std::erase_if(queue_, is_theirs);
  std::erase_if(ahead_queue_, is_theirs);
  for (const int64_t ticket : dropped) requests_.erase(ticket);
  num_pending_ -= int64_t(dropped.size());
  return dropped;
}

int64_t Store::pending() const {
  std::lock_guard lock(mutex_);
  return num_pending_;
}

StoreStats Store::stats() const {
  std::lock_guard lock(mutex_);
  StoreStats stats = stats_;
  if (num_busy_ > 0) stats.busy_seconds += file_system_->seconds() - busy_since_;
  return stats;
}

void Store::close() {
  std::vector<std::thread> readers;
  {
    std::lock_guard lock(mutex_);
    if (is_closed_) return;
    is_closed_ = true;
    readers.swap(readers_);
    for (std::deque<Part>* queue : {&queue_, &ahead_queue_}) {
      for (const Part& part : *queue) {
        part.request->outcome = {ReadError::io, "the store was closed before the bytes were read"};
        if (--part.request->parts_left == 0) --num_pending_;
      }
      queue->clear();
    }
  }
  part_came_.notify_all();
  for (std::thread& reader : readers) reader.join();
  ticket_done_.notify_all();
  std::lock_guard lock(mutex_);
  for (const File& file : files_) file_system_->close(file.open);
  for (auto& [ticket, request] : requests_) request->memory.reset();
}

void Store::read_parts() {
  std::optional<Arena> staging;  // from the first part that needs it
  std::unique_lock lock(mutex_);
  while (true) {
    part_came_.wait(lock, [this] { return is_closed_ || !queue_.empty() || !ahead_queue_.empty(); });
    std::deque<Part>& queue = queue_.empty() ? ahead_queue_ : queue_;
    if (queue.empty()) return;  // closed
    const Part part = queue.front();
    queue.pop_front();
    part.request->is_begun = true;
    if (num_busy_++ == 0) busy_since_ = file_system_->seconds();
    Outcome outcome;
    if (part.request->outcome.error == ReadError::none) {  // else the rest of a failed request is not read
      lock.unlock();
      outcome = read_part(part, staging);
      lock.lock();
    }
    finish_part(lock, part, std::move(outcome));
    if (--num_busy_ == 0) stats_.busy_seconds += file_system_->seconds() - busy_since_;
  }
}

Store::Outcome Store::read_part(const Part& part, std::optional<Arena>& staging) {
  const PieceState& piece = part.request->pieces[part.piece];
  const int64_t piece_end = piece.offset + piece.nbytes;  // beyond it the file may end
  if (!piece.transcode) {
    uint8_t* memory = piece.memory + (part.begin - round_down(piece.offset, piece.file->open.alignment));
    return read_range(piece, part, std::min(part.end, piece_end), memory);
  }
  if (!staging) {
    try {
      staging.emplace(size_t(kStagingBytes));
    } catch (const OutOfMemory& error) {
      return {ReadError::io, error.what()};
    }
  }
  const auto& [type, rows, cols] = *piece.transcode;
  const int64_t panel_bytes = kPanelRows * block_row_bytes(type, cols);
  const int64_t data_begin = piece.offset + part.panel_begin * panel_bytes;
  const int64_t data_end = std::min(piece.offset + part.panel_end * panel_bytes, piece_end);
  Outcome outcome = read_range(piece, part, data_end, staging->data());
  if (outcome.error != ReadError::none) return outcome;
  const double start = file_system_->seconds();
  transcode(type, staging->data() + (data_begin - part.begin), rows, cols, part.panel_begin, part.panel_end,
            piece.memory);
  add_seconds(&StoreStats::transcode_seconds, file_system_->seconds() - start);
  return {};
}

// Bytes [part.begin, part.end) of the file to `memory`; it is an error if it ends before `needed_end`.
Store::Outcome Store::read_range(const PieceState& piece, const Part& part, int64_t needed_end,
                                 uint8_t* memory) {
  const OpenFile& file = piece.file->open;
  const std::string& path = piece.file->path;
  int64_t num_reads = 0, num_bytes = 0;
  Outcome outcome;
  const double start = file_system_->seconds();
  const int64_t cached = read_cached(*piece.file, memory, part.begin, part.end - part.begin);
  if (cached > 0) num_reads = 1, num_bytes = cached;
  int64_t end = part.begin + cached;  // what is in memory ends here
  while (end < needed_end) {
    const int64_t from = round_down(end, file.alignment);  // a direct read cannot go on inside a block
    const ssize_t got =
        file_system_->pread(file.handle, memory + (from - part.begin), size_t(part.end - from), from);
    ++num_reads;
    if (got == -EINTR) continue;
    if (got < 0) {
      outcome = {ReadError::io, file_name(path) + ": reading " + range_of(piece.offset, piece.nbytes) + ": " +
                                    strerror(int(-got))};
      break;
    }
    num_bytes += got;
    if (from + got <= end) {
      outcome = {ReadError::short_file, file_name(path) + " ends at byte " + std::to_string(end) + ", and " +
                                            range_of(piece.offset, piece.nbytes) + " were asked for"};
      break;
    }
    end = from + got;
  }
  if (file.drops_cache) file_system_->drop_cache(file.handle, part.begin, part.end - part.begin);
  const double seconds = file_system_->seconds() - start;
  std::lock_guard lock(mutex_);
  stats_.reads += num_reads;
  stats_.bytes_read += num_bytes;
  stats_.cached_bytes += cached;
  stats_.read_seconds += seconds;
  return outcome;
}

// Bytes of the part that the page cache holds, from its begin on; 0 in most cases: it holds none, or is not
// asked.
int64_t Store::read_cached(File& file, uint8_t* memory, int64_t offset, int64_t nbytes) {
  if (!file.is_cache_asked.load(std::memory_order_relaxed)) return 0;
  if (file.cache_misses.load(std::memory_order_relaxed) >= kMissesInARow &&
      file.cache_misses.fetch_add(1, std::memory_order_relaxed) % kAskedAfterMisses != 0) {
    return 0;
  }
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

// The reader that brings the last part of a piece checks the piece, and then counts its part off: until then
// the request is not done.
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
  if (--request.parts_left > 0) return;
  --num_pending_;
  request.memory.reset();
  ticket_done_.notify_all();
}

}  // namespace argosy
