#include "ops/table_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "ops/checked_size.h"
#include "ops/matmul.h"

namespace argosy {

namespace {

constexpr const char* kMemory = "the rows of a table";
constexpr int64_t kPage = 4096;  // the largest alignment of O_DIRECT
constexpr int kFront = 0, kMiddle = 4, kLast = TableRows::kWays - 1;
// Lists of a step: its rows, those that are missing, and those of a wave with their reads and tickets.
constexpr int64_t kRowBookkeeping = 64, kWaveBookkeeping = 1024;

// A row that begins anywhere in a page.
int64_t place_bytes(int64_t row_bytes) { return round_up(kPage - 1 + row_bytes, kPage); }

void require(bool is_valid, const std::string& what) {
  if (!is_valid) throw std::invalid_argument("a table " + what);
}

}  // namespace

int64_t Table::row_bytes(const TablePart& part) const {
  return part.block_type ? block_row_bytes(*part.block_type, cols) : cols * weight_bytes(format);
}

int64_t Table::row_bytes() const {
  int64_t sum = 0;
  for (const TablePart& part : parts) sum += row_bytes(part);
  return sum;
}

TableRows::Sizes TableRows::lay_out(const Table& table, int64_t cache_bytes, int64_t most_rows) {
  require(table.num_rows >= 1 && table.num_rows < kMostRows,
          "of " + std::to_string(table.num_rows) + " rows is not supported");
  require(table.cols >= 1 && table.cols <= kMostRowBytes && !table.parts.empty(),
          "of " + std::to_string(table.cols) + " columns is not supported");
  require(cache_bytes >= 0 && most_rows >= 1, "needs room for at least one row");
  int64_t places = 0;
  for (const TablePart& part : table.parts) {
    if (part.block_type) {
      require(slot_format(*part.block_type) == table.format &&
                  has_whole_blocks(*part.block_type, table.cols) && block_rows(*part.block_type) == 1 &&
                  !is_grouped(*part.block_type),
              "has rows that cannot be read one by one");
    } else {
      require(table.parts.size() == 1 && weight_bytes(table.format) > 0, "has rows of an unknown format");
    }
    require(!part.segments.empty() && part.segments[0].first_row == 0, "does not begin at row 0");
    places += place_bytes(table.row_bytes(part));
  }
  const int64_t row_bytes = table.row_bytes();
  require(row_bytes <= kMostRowBytes, "has rows of " + std::to_string(row_bytes) + " bytes");
  checked_product(kMemory, {most_rows, 8 * kMostRowBytes});  // nothing below overflows
  Sizes sizes = {};
  const int64_t slot_bytes = row_bytes + 5;
  sizes.is_direct = cache_bytes / slot_bytes >= table.num_rows;
  sizes.num_slots = sizes.is_direct ? table.num_rows : cache_bytes / slot_bytes / kWays * kWays;
  sizes.place_bytes = places;
  sizes.wave_rows = std::max<int64_t>(1, std::min(most_rows, kLandingBytes / places));
  sizes.landed = round_up(sizes.wave_rows * places, kPage);
  sizes.decoded = round_up(sizes.landed + most_rows * row_bytes, 64);
  const bool is_decoded = table.parts[0].block_type.has_value();
  sizes.slots =
      round_up(sizes.decoded + (is_decoded ? matrix_bytes(table.format, most_rows, table.cols) : 0), 64);
  sizes.keys = round_up(sizes.slots + sizes.num_slots * row_bytes, 64);
  sizes.ranks = sizes.keys + 4 * sizes.num_slots;
  sizes.end = sizes.ranks + sizes.num_slots;
  return sizes;
}

int64_t TableRows::bytes(const Table& table, int64_t cache_bytes, int64_t most_rows) {
  const Sizes sizes = lay_out(table, cache_bytes, most_rows);
  return round_up(sizes.end, int64_t(Arena::kAlignment)) + kRowBookkeeping * most_rows +
         kWaveBookkeeping * sizes.wave_rows * int64_t(table.parts.size());
}

TableRows::TableRows(std::shared_ptr<Store> store, Table table, int64_t cache_bytes, int64_t most_rows)
    : store_(std::move(store)),
      table_(std::move(table)),
      row_bytes_(table_.row_bytes()),
      most_rows_(most_rows),
      sizes_(lay_out(table_, cache_bytes, most_rows)),
      num_slots_(sizes_.num_slots),
      arena_(size_t(sizes_.end)),
      keys_(reinterpret_cast<uint32_t*>(arena_.data() + sizes_.keys)),
      ranks_(arena_.data() + sizes_.ranks),
      places_(table_.parts.size()) {
  for (TablePart& part : table_.parts) {
    part_bytes_.push_back(table_.row_bytes(part));
    int64_t last = -1;
    for (TablePart::Segment& segment : part.segments) {
      require(segment.first_row > last && segment.first_row < table_.num_rows,
              "has segments that are not in order");
      const FileInfo file = store_->info(segment.file_id);
      require(file.alignment <= kPage, "lies on a drive with pages of " + std::to_string(file.alignment));
      require(segment.offset >= 0 && segment.offset <= file.size, "lies outside of " + file.path);
      segment.alignment = file.alignment;
      last = segment.first_row;
    }
  }
}

TableRows::~TableRows() { cancel(); }

void TableRows::cancel() {
  for (; next_read_ < reads_.size(); ++next_read_) store_->cancel(reads_[next_read_].ticket);
  reads_.clear();
  next_read_ = 0;
}

uint8_t* TableRows::landed(size_t part, int64_t index) {
  int64_t at = sizes_.landed;
  for (size_t i = 0; i < part; ++i) at += num_rows() * part_bytes_[i];
  return arena_.data() + at + index * part_bytes_[part];
}

int64_t TableRows::find(int64_t row) const {
  const auto key = uint32_t(row + 1);
  if (sizes_.is_direct) return keys_[row] == key ? row : -1;
  if (num_slots_ == 0) return -1;
  // Rows that a hash chose are spread evenly already, but other tables need not be.
  const uint64_t mixed = uint64_t(row) * 0x9E3779B97F4A7C15u;
  const int64_t set = int64_t((mixed >> 32) % uint64_t(num_slots_ / kWays)) * kWays;
  for (int64_t slot = set; slot < set + kWays; ++slot) {
    if (keys_[slot] == key) return slot;
  }
  return -1 - set - 1;
}

int64_t TableRows::take_slot(int64_t row) {
  int64_t slot = find(row);
  if (slot >= 0 || num_slots_ == 0) return slot;
  if (sizes_.is_direct) {
    slot = row;
  } else {
    for (slot = -slot - 2; (ranks_[slot] ^ slot % kWays) != kLast;) ++slot;
    move(slot, kMiddle);
  }
  keys_[slot] = uint32_t(row + 1);
  return slot;
}

void TableRows::move(int64_t slot, int to) {
  if (sizes_.is_direct) return;
  const int64_t set = slot / kWays * kWays;
  const int from = ranks_[slot] ^ int(slot - set);
  for (int way = 0; way < kWays; ++way) {
    int rank = ranks_[set + way] ^ way;
    if (rank == from) {
      rank = to;
    } else if (rank >= std::min(from, to) && rank <= std::max(from, to)) {
      rank += from > to ? 1 : -1;
    }
    ranks_[set + way] = uint8_t(rank ^ way);
  }
}

void TableRows::begin(const int64_t* rows, int64_t num_rows) {
  if (num_rows > most_rows_) {
    throw std::invalid_argument("a step asks for " + std::to_string(num_rows) + " rows, expected at most " +
                                std::to_string(most_rows_));
  }
  cancel();
  rows_.assign(rows, rows + num_rows);
  missing_.clear();
  wave_.clear();
  next_missing_ = 0;
  is_waited_for_ = false;
  fault_.reset();
  for (int64_t index = 0; index < num_rows; ++index) {
    if (rows_[size_t(index)] == kNoRow) {
      for (size_t part = 0; part < part_bytes_.size(); ++part)
        std::memset(landed(part, index), 0, size_t(part_bytes_[part]));
      continue;
    }
    ++stats_.asked;
    const int64_t slot = find(rows_[size_t(index)]);
    if (slot < 0) {
      missing_.push_back({rows_[size_t(index)], index});
      continue;
    }
    ++stats_.found;
    move(slot, kFront);
    const uint8_t* from = arena_.data() + sizes_.slots + slot * row_bytes_;
    for (size_t part = 0; part < part_bytes_.size(); from += part_bytes_[part++])
      std::memcpy(landed(part, index), from, size_t(part_bytes_[part]));
  }
  std::sort(missing_.begin(), missing_.end(), [](const Missing& a, const Missing& b) {
    return a.row != b.row ? a.row < b.row : a.index < b.index;
  });
  begin_wave();
}

// Starts to read the next different rows.
void TableRows::begin_wave() {
  wave_.clear();
  while (next_missing_ < missing_.size() && int64_t(wave_.size()) < sizes_.wave_rows) {
    const size_t first = next_missing_;
    const int64_t row = missing_[first].row;
    while (next_missing_ < missing_.size() && missing_[next_missing_].row == row) ++next_missing_;
    wave_.push_back({row, first, next_missing_, false});
  }
  reads_.clear();
  next_read_ = 0;
  if (wave_.empty()) return;
  std::vector<Record> records;
  std::vector<PlacedRecord> placed;
  records.reserve(wave_.size() * table_.parts.size());  // PlacedRecord refers to them
  int64_t place = 0;
  for (size_t part = 0; part < table_.parts.size(); ++part) {
    add_reads(part, place, records, placed);
    place += sizes_.wave_rows * place_bytes(part_bytes_[part]);
  }
  // Rows are few bytes and certainly needed; the experts of earlier layers hardly wait for them.
  const std::vector<int64_t> tickets = store_->fetch(arena_, placed, Urgency::now);
  for (size_t i = 0; i < tickets.size(); ++i) reads_[i].ticket = tickets[i];
  stats_.read += int64_t(wave_.size());
  for (const auto& [pieces, checksums] : records)
    stats_.read_bytes += round_up(pieces[0].offset % kPage + pieces[0].nbytes, kPage);
}

// Adds the reads of one part of the wave's rows: rows that share a page, or whose pages follow each other,
// are one read.
void TableRows::add_reads(size_t part, int64_t place, std::vector<Record>& records,
                          std::vector<PlacedRecord>& placed) {
  const std::vector<TablePart::Segment>& segments = table_.parts[part].segments;
  const int64_t nbytes = part_bytes_[part];
  places_[part].resize(wave_.size());
  Piece* piece = nullptr;  // the last read's
  for (size_t i = 0; i < wave_.size(); ++i) {
    const int64_t row = wave_[i].row;
    const auto after = std::upper_bound(
        segments.begin(), segments.end(), row,
        [](int64_t number, const TablePart::Segment& one) { return number < one.first_row; });
    const TablePart::Segment& segment = *(after - 1);
    const int64_t offset = segment.offset + (row - segment.first_row) * nbytes, end = offset + nbytes;
    if (piece != nullptr && piece->file_id == segment.file_id && offset >= piece->offset &&
        offset / kPage * kPage <= round_up(piece->offset + piece->nbytes, kPage)) {
      piece->nbytes = std::max(piece->nbytes, end - piece->offset);
      reads_.back().end = i + 1;
    } else {
      if (piece != nullptr) place += round_up(piece->offset % kPage + piece->nbytes, kPage);
      records.push_back({{Piece{segment.file_id, offset, nbytes, place}}});
      placed.push_back({records.back(), 0});
      piece = &records.back().pieces[0];
      reads_.push_back({0, i, i + 1});
    }
    places_[part][i] = piece->dest_offset + piece->offset % segment.alignment + (offset - piece->offset);
  }
}

// Gives the rows that have landed to the tokens and to the cache.
void TableRows::end_wave() {
  for (size_t i = 0; i < wave_.size(); ++i) {
    const Landing& landing = wave_[i];
    if (landing.has_failed) {
      for (size_t at = landing.first; at < landing.end; ++at) fault_->indices.push_back(missing_[at].index);
      continue;
    }
    const int64_t slot = take_slot(landing.row);
    uint8_t* cached = slot < 0 ? nullptr : arena_.data() + sizes_.slots + slot * row_bytes_;
    for (size_t part = 0; part < part_bytes_.size(); ++part) {
      const auto nbytes = size_t(part_bytes_[part]);
      const uint8_t* from = arena_.data() + places_[part][i];
      for (size_t at = landing.first; at < landing.end; ++at)
        std::memcpy(landed(part, missing_[at].index), from, nbytes);
      if (cached == nullptr) continue;
      std::memcpy(cached, from, nbytes);
      cached += nbytes;
    }
  }
}

bool TableRows::advance(std::chrono::milliseconds most) {
  const auto until = std::chrono::steady_clock::now() + most;
  bool counts_late = false;
  if (most.count() > 0 && !is_waited_for_) is_waited_for_ = counts_late = true;
  while (true) {
    while (next_read_ < reads_.size()) {
      const Read& read = reads_[next_read_];
      std::vector<Completion> done = store_->wait_any({read.ticket}, std::chrono::milliseconds(0));
      if (done.empty()) {
        if (std::exchange(counts_late, false))
          stats_.late += int64_t(missing_.size() - wave_[read.first].first);
        const auto left =
            std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
        if (left.count() <= 0) return false;
        done = store_->wait_any({read.ticket}, left);
        if (done.empty()) return false;
      }
      if (done[0].error != ReadError::none) {
        if (!fault_) fault_ = Fault{done[0].message, done[0].error, {}};
        for (size_t i = read.first; i < read.end; ++i) wave_[i].has_failed = true;
      }
      ++next_read_;
    }
    end_wave();
    begin_wave();
    if (reads_.empty()) break;
  }
  return true;
}

// Collects the rows of which a part is refused.
void TableRows::find_refused() {
  uint8_t* decoded = arena_.data() + sizes_.decoded;
  for (int64_t i = 0; i < num_rows(); ++i) {
    const bool is_refused = std::any_of(table_.parts.begin(), table_.parts.end(), [&](const TablePart& part) {
      const auto number = size_t(&part - table_.parts.data());
      const BlockType type = *part.block_type;
      return !transcode(type, landed(number, i), 1, table_.cols, 1, 0, num_strips(type, 1), decoded);
    });
    if (is_refused) fault_->indices.push_back(i);
  }
}

bool TableRows::write(Runtime& runtime, float* out) {
  const int64_t count = num_rows(), cols = table_.cols;
  if (count == 0) return true;
  const auto lock = runtime.lock();
  MatrixView matrix = {table_.format, landed(0, 0), count, cols};
  if (table_.parts[0].block_type) {
    uint8_t* decoded = arena_.data() + sizes_.decoded;
    for (size_t part = 0; part < table_.parts.size(); ++part) {
      const BlockType type = *table_.parts[part].block_type;
      if (transcode(type, landed(part, 0), count, cols, 1, 0, num_strips(type, count), decoded)) continue;
      fault_ = Fault{std::string("a row holds ") + what_is_refused(type), ReadError::not_finite, {}};
      find_refused();
      return false;
    }
    matrix.data = decoded;
  }
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) ids[size_t(i)] = int32_t(i);
  embed(runtime, matrix, ids.data(), count, out);
  return true;
}

}  // namespace argosy
