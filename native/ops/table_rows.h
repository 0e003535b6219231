// table_rows.h: rows of a table that stays on the drive, such as one of n-gram embeddings.
//
//   begin(rows)     known rows are copied from the cache; reads of the others start
//   advance(most)   waits; as reads land, their rows go into the cache
//   write(out)      all rows as float32, in the order of begin()
//
// A row is bytes of one tensor, or of several: codes and their scales. A tensor may consist of segments in
// different files. Rows of a step that share a page of the drive are read once. If there are more rows than
// the landing memory holds, they are read in waves, each of which begins when the one before has landed.
//
// The cache is divided into sets of kWays rows, ordered by use. A row enters in the middle of its set and
// goes to the front when it is used again; the last one leaves. So the rows of a long prompt push out each
// other, but not those in front. If all rows fit, each has its own place.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/transcode.h"
#include "ops/runtime.h"
#include "store/arena.h"
#include "store/store.h"

namespace argosy {

struct TablePart {
  struct Segment {
    int64_t first_row;
    int file_id;
    int64_t offset;         // of first_row; rows follow each other
    int64_t alignment = 1;  // of reads of the file, which TableRows asks for
  };
  std::optional<BlockType> block_type;  // none: values in the table's format
  std::vector<Segment> segments;        // by first_row; the first begins at 0
};

struct Table {
  Format format;  // in which rows are decoded: f32, f16, bf16, or the slot format of every part
  int64_t num_rows, cols;
  std::vector<TablePart> parts;

  int64_t row_bytes(const TablePart& part) const;
  int64_t row_bytes() const;  // of all parts
};

struct TableStats {
  int64_t asked = 0;       // rows of tokens, without kNoRow
  int64_t found = 0;       // of these, in the cache
  int64_t late = 0;        // of these, not there when their layer asked
  int64_t read = 0;        // rows that were read
  int64_t read_bytes = 0;  // in whole pages
};

class TableRows {
 public:
  // The most rows, and the most bytes of a row; sizes beyond are refused.
  static constexpr int64_t kMostRows = int64_t{1} << 32;
  static constexpr int64_t kMostRowBytes = int64_t{1} << 20;
  static constexpr int64_t kWays = 8;
  static constexpr int64_t kNoRow = -1;  // in begin(): zeros
  // Landing memory of a wave: enough for the drive to be busy.
  static constexpr int64_t kLandingBytes = int64_t{8} << 20;

  // A failed read: the message, and the indices of the rows of begin() that are missing.
  struct Fault {
    std::string message;
    ReadError error;
    std::vector<int64_t> indices;
  };

  // cache_bytes: of cached rows and what says which they are. most_rows: of one begin(). Throws
  // std::invalid_argument if a size is not supported, or a segment does not exist.
  TableRows(std::shared_ptr<Store> store, Table table, int64_t cache_bytes, int64_t most_rows);
  ~TableRows();
  TableRows(const TableRows&) = delete;
  TableRows& operator=(const TableRows&) = delete;

  // All memory that such an object takes.
  static int64_t bytes(const Table& table, int64_t cache_bytes, int64_t most_rows);

  // Starts to collect rows, all in range or kNoRow, whatever became of those of the last call.
  void begin(const int64_t* rows, int64_t num_rows);
  // Returns whether all rows are there. With `most` of 0, only looks; otherwise the layer waits for them.
  bool advance(std::chrono::milliseconds most);
  // After advance() has returned true: set if rows are missing.
  const std::optional<Fault>& fault() const { return fault_; }
  // Writes float32 [rows][cols]. All rows are there. Returns false, with a fault(), if one of them holds what
  // cannot be decoded, such as NaN.
  [[nodiscard]] bool write(Runtime& runtime, float* out);

  int64_t num_rows() const { return int64_t(rows_.size()); }  // of the last begin()
  const Table& table() const { return table_; }
  int64_t num_cached() const { return num_slots_; }  // rows that the cache can hold
  const TableStats& stats() const { return stats_; }

 private:
  // Where the parts of the memory begin.
  struct Sizes {
    int64_t num_slots;    // of the cache
    int64_t wave_rows;    // different rows that are read at once
    int64_t place_bytes;  // of such a row in landing memory, all parts
    int64_t landed, decoded, slots, keys, ranks, end;
    bool is_direct;  // row i has slot i
  };
  static Sizes lay_out(const Table& table, int64_t cache_bytes, int64_t most_rows);

  struct Read {
    int64_t ticket;
    size_t first, end;  // of wave_
  };
  struct Missing {
    int64_t row;
    int64_t index;  // of rows_
  };
  struct Landing {
    int64_t row;
    size_t first, end;  // of missing_
    bool has_failed;
  };

  void begin_wave();
  void add_reads(size_t part, int64_t place, std::vector<Record>& records, std::vector<PlacedRecord>& placed);
  void end_wave();
  void find_refused();
  int64_t find(int64_t row) const;  // slot, or -1
  int64_t take_slot(int64_t row);   // -1: the cache has none
  void move(int64_t slot, int to);  // to a rank in its set
  uint8_t* landed(size_t part, int64_t index);
  void cancel();

  std::shared_ptr<Store> store_;
  Table table_;
  std::vector<int64_t> part_bytes_;
  int64_t row_bytes_, most_rows_;
  Sizes sizes_;
  int64_t num_slots_;
  Arena arena_;
  uint32_t* keys_;  // [slots]: row + 1; 0: empty
  uint8_t* ranks_;  // [slots]: in its set, from 0 in front; stored xor the rank that is first there
  std::vector<int64_t> rows_;
  std::vector<Missing> missing_;
  size_t next_missing_ = 0;  // of those not begun
  std::vector<Landing> wave_;
  std::vector<std::vector<int64_t>> places_;  // [part][wave_]: where the row's bytes land
  std::vector<Read> reads_;
  size_t next_read_ = 0;  // of those not landed
  bool is_waited_for_ = false;
  std::optional<Fault> fault_;
  TableStats stats_;
};

}  // namespace argosy
