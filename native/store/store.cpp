// store.cpp: the queue of parts, the reader threads, and the end of a ticket.
#include "store/store.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "store/crc32c.h"

namespace argosy {

struct Store::PieceState {
  const std::string* path;
  const OpenFile* file;
  int64_t offset;
  int64_t nbytes;
  int64_t region_offset;  // of the file: `offset` rounded down
  int64_t region_bytes;   // up to `offset + nbytes` rounded up
  uint8_t* region;        // in memory
  std::optional<uint32_t> checksum;
  int64_t parts_left;
};

struct Store::Request {
  int64_t ticket;
  std::shared_ptr<const void> memory;
  std::vector<PieceState> pieces;
  int64_t parts_left = 0;
  Outcome outcome;
};

namespace {

int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

std::string file_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

std::string range_of(int64_t offset, int64_t nbytes) {
  return "bytes " + std::to_string(offset) + " to " + std::to_string(offset + nbytes);
}

std::string hex(uint32_t value) {
  char text[16];
  snprintf(text, sizeof(text), "%08" PRIx32, value);
  return text;
}

}  // namespace

Store::Store(int num_readers, std::shared_ptr<FileSystem> file_system)
    : file_system_(std::move(file_system)) {
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
    file_system_->close(file.handle);
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
  const auto& [path, file] = files_[size_t(file_id)];
  return {path, file.size, file.alignment, file.is_direct, file.why_not_direct};
}

int64_t Store::fetch(Arena& arena, const std::vector<Piece>& pieces, const std::vector<uint32_t>& checksums) {
  if (!checksums.empty() && checksums.size() != pieces.size()) {
    throw std::invalid_argument("there are " + std::to_string(pieces.size()) + " pieces and " +
                                std::to_string(checksums.size()) + " checksums");
  }
  auto request = std::make_unique<Request>();
  request->memory = arena.hold();
  uint8_t* const memory = arena.data();
  const int64_t arena_bytes = int64_t(arena.size());
  std::vector<Part> parts;

  std::unique_lock lock(mutex_);
  require_open();
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    if (piece.file_id < 0 || size_t(piece.file_id) >= files_.size()) {
      throw std::invalid_argument("no file has the id " + std::to_string(piece.file_id));
    }
    const auto& [path, file] = files_[size_t(piece.file_id)];
    const int64_t align = file.alignment;
    if (piece.offset < 0 || piece.nbytes < 1 ||
        piece.offset > std::numeric_limits<int64_t>::max() - align - piece.nbytes) {
      throw std::invalid_argument(
          file_name(path) + ": a piece must begin at 0 or later and hold at least 1 byte, found offset " +
          std::to_string(piece.offset) + " and " + std::to_string(piece.nbytes) + " bytes");
    }
    const int64_t region_offset = round_down(piece.offset, align);
    const int64_t region_bytes = round_up(piece.offset + piece.nbytes, align) - region_offset;
    if (piece.dest_offset < 0 || piece.dest_offset % align != 0) {
      throw std::invalid_argument("dest_offset must be a multiple of " + std::to_string(align) + ", found " +
                                  std::to_string(piece.dest_offset));
    }
    if (piece.dest_offset > arena_bytes || region_bytes > arena_bytes - piece.dest_offset) {
      throw std::invalid_argument("a piece takes " + std::to_string(region_bytes) + " bytes at " +
                                  std::to_string(piece.dest_offset) + ", and the arena ends at " +
                                  std::to_string(arena_bytes));
    }
    const int64_t num_parts = (region_bytes + kPartBytes - 1) / kPartBytes;
    const int64_t part_bytes = round_up((region_bytes + num_parts - 1) / num_parts, align);
    int64_t count = 0;
    for (int64_t begin = 0; begin < region_bytes; begin += part_bytes, ++count) {
      parts.push_back({request.get(), i, begin, std::min(begin + part_bytes, region_bytes)});
    }
    request->pieces.push_back({&path, &file, piece.offset, piece.nbytes, region_offset, region_bytes,
                               memory + piece.dest_offset,
                               checksums.empty() ? std::nullopt : std::optional(checksums[i]), count});
  }
  request->parts_left = int64_t(parts.size());
  request->ticket = next_ticket_++;
  const int64_t ticket = request->ticket;
  if (!parts.empty()) ++num_pending_;
  queue_.insert(queue_.end(), parts.begin(), parts.end());
  requests_.emplace(ticket, std::move(request));
  lock.unlock();
  if (parts.size() == 1) {
    part_came_.notify_one();
  } else {
    part_came_.notify_all();
  }
  return ticket;
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
  const int64_t dropped =
      int64_t(std::erase_if(queue_, [request](const Part& part) { return part.request == request; }));
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
    for (const Part& part : queue_) {
      part.request->outcome = {ReadError::io, "the store was closed before the bytes were read"};
      if (--part.request->parts_left == 0) --num_pending_;
    }
    queue_.clear();
  }
  part_came_.notify_all();
  for (std::thread& reader : readers) reader.join();
  ticket_done_.notify_all();
  std::lock_guard lock(mutex_);
  for (auto& [path, file] : files_) file_system_->close(file.handle);
  for (auto& [ticket, request] : requests_) request->memory.reset();
}

void Store::read_parts() {
  std::unique_lock lock(mutex_);
  while (true) {
    part_came_.wait(lock, [this] { return is_closed_ || !queue_.empty(); });
    if (queue_.empty()) return;  // closed
    const Part part = queue_.front();
    queue_.pop_front();
    if (num_busy_++ == 0) busy_since_ = file_system_->seconds();
    Outcome outcome;
    if (part.request->outcome.error == ReadError::none) {  // else the rest of a failed request is not read
      lock.unlock();
      outcome = read_part(part);
      lock.lock();
    }
    finish_part(lock, part, std::move(outcome));
    if (--num_busy_ == 0) stats_.busy_seconds += file_system_->seconds() - busy_since_;
  }
}

Store::Outcome Store::read_part(const Part& part) {
  const PieceState& piece = part.request->pieces[part.piece];
  const OpenFile& file = *piece.file;
  const int64_t data_end = piece.offset + piece.nbytes - piece.region_offset;  // beyond it the file may end
  const int64_t needed_end = std::min(part.end, data_end);
  int64_t num_reads = 0, num_bytes = 0;
  Outcome outcome;
  const double start = file_system_->seconds();
  int64_t end = part.begin;  // bytes of the region that are in memory end here
  while (end < needed_end) {
    const int64_t from = round_down(end, file.alignment);  // a direct read cannot go on inside a block
    const ssize_t got = file_system_->pread(file.handle, piece.region + from, size_t(part.end - from),
                                            piece.region_offset + from);
    ++num_reads;
    if (got == -EINTR) continue;
    if (got < 0) {
      outcome = {ReadError::io, file_name(*piece.path) + ": reading " + range_of(piece.offset, piece.nbytes) +
                                    ": " + strerror(int(-got))};
      break;
    }
    num_bytes += got;
    if (from + got <= end) {
      outcome = {ReadError::short_file, file_name(*piece.path) + " ends at byte " +
                                            std::to_string(piece.region_offset + end) + ", and " +
                                            range_of(piece.offset, piece.nbytes) + " were asked for"};
      break;
    }
    end = from + got;
  }
  if (file.drops_cache) {
    file_system_->drop_cache(file.handle, piece.region_offset + part.begin, part.end - part.begin);
  }
  const double seconds = file_system_->seconds() - start;
  std::lock_guard lock(mutex_);
  stats_.reads += num_reads;
  stats_.bytes_read += num_bytes;
  stats_.read_seconds += seconds;
  return outcome;
}

Store::Outcome Store::check_piece(const PieceState& piece) {
  const double start = file_system_->seconds();
  const uint32_t found =
      crc32c_wide(piece.region + (piece.offset - piece.region_offset), size_t(piece.nbytes));
  const double seconds = file_system_->seconds() - start;
  {
    std::lock_guard lock(mutex_);
    stats_.checksum_seconds += seconds;
  }
  if (found == *piece.checksum) return {};
  return {ReadError::checksum, file_name(*piece.path) + ": " + range_of(piece.offset, piece.nbytes) +
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
