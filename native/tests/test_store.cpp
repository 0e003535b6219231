// test_store.cpp: bytes arrive where they belong, whatever the kernel does to a read.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "store/drive_probe.h"
#include "store/store.h"
#include "tests/faulty_file_system.h"

using namespace argosy;
using std::chrono::milliseconds;

namespace {

constexpr milliseconds kLong{20'000};
constexpr int64_t kPage = 4096;

// Whether the kernel reads asynchronously, or threads read. All tests run both ways.
bool has_queue = true;

// A file of random bytes, deleted at the end of the test.
class TestFile {
 public:
  explicit TestFile(int64_t nbytes) : bytes_(size_t(nbytes)) {
    char name[] = "store_test_XXXXXX";
    const int handle = mkstemp(name);
    path_ = std::filesystem::absolute(name);
    std::mt19937 random(7);
    for (uint8_t& byte : bytes_) byte = uint8_t(random());
    CHECK_EQUAL(::write(handle, bytes_.data(), bytes_.size()), ssize_t(bytes_.size()));
    ::close(handle);
  }
  ~TestFile() { std::filesystem::remove(path_); }
  TestFile(const TestFile&) = delete;
  TestFile& operator=(const TestFile&) = delete;

  std::string path() const { return path_; }
  const uint8_t* at(int64_t offset) const { return bytes_.data() + offset; }
  int64_t size() const { return int64_t(bytes_.size()); }
  uint32_t checksum(int64_t offset, int64_t nbytes) const { return crc32c_wide(at(offset), size_t(nbytes)); }

 private:
  std::string path_;
  std::vector<uint8_t> bytes_;
};

Completion wait_one(Store& store, int64_t ticket) {
  const auto done = store.wait_any({ticket}, kLong);
  CHECK_EQUAL(done.size(), 1u);
  return done.empty() ? Completion{} : done[0];
}

bool holds(Arena& arena, int64_t dest, const TestFile& file, int64_t offset, int64_t nbytes) {
  return std::equal(file.at(offset), file.at(offset + nbytes), arena.data() + dest + offset % kPage);
}

std::shared_ptr<FileSystem> files() { return std::make_shared<RealFileSystem>(has_queue); }

std::shared_ptr<FaultyFileSystem> faulty(Fault fault, int64_t first_read, int64_t num_faults = 1,
                                         double delay_seconds = 0.05) {
  return std::make_shared<FaultyFileSystem>(files(), fault, first_read, num_faults, delay_seconds);
}

void pieces_arrive_at_any_offset_direct_and_buffered() {
  const TestFile file(3 * kPage + 777);
  for (const bool direct : {true, false}) {
    Store store(2, files());
    const int id = store.open(file.path(), direct);
    const FileInfo info = store.info(id);
    CHECK_EQUAL(info.alignment, kPage);
    CHECK_EQUAL(info.size, file.size());
    CHECK_EQUAL(info.is_direct, info.why_not_direct.empty());
    if (!direct) CHECK(!info.is_direct);
    Arena arena{size_t(16 * kPage)};
    const int64_t ranges[][2] = {{0, 1},         {0, kPage},          {1, kPage},       {kPage - 1, 2},
                                 {kPage, kPage}, {3 * kPage, 777},    {0, file.size()}, {file.size() - 1, 1},
                                 {5, kPage * 2}, {2 * kPage + 3, 900}};
    for (const auto& [offset, nbytes] : ranges) {
      std::fill_n(arena.data(), arena.size(), uint8_t{0});
      const int64_t ticket =
          store.fetch(arena, {{id, offset, nbytes, 2 * kPage}}, {file.checksum(offset, nbytes)});
      const Completion done = wait_one(store, ticket);
      CHECK_EQUAL(done.ticket, ticket);
      CHECK_EQUAL(done.message, "");
      CHECK(done.error == ReadError::none);
      CHECK(holds(arena, 2 * kPage, file, offset, nbytes));
    }
  }
}

void a_large_piece_is_shared_by_the_readers() {
  const TestFile file(3 * Store::kPartBytes + 5000);
  Store store(4, files());
  const int id = store.open(file.path());
  Arena arena{size_t(4 * Store::kPartBytes)};
  const int64_t nbytes = file.size() - 100;
  const int64_t ticket = store.fetch(arena, {{id, 100, nbytes, 0}}, {file.checksum(100, nbytes)});
  CHECK_EQUAL(wait_one(store, ticket).message, "");
  CHECK(holds(arena, 0, file, 100, nbytes));
  const StoreStats stats = store.stats();
  CHECK_EQUAL(stats.reads, 4);
  CHECK(stats.bytes_read >= nbytes);
  CHECK(stats.read_seconds > 0 && stats.busy_seconds > 0 && stats.checksum_seconds > 0);
}

void many_tickets_end_each_for_itself() {
  const TestFile file(64 * kPage);
  Store store(3, files());
  const int id = store.open(file.path());
  Arena arena{size_t(64 * kPage)};
  std::vector<int64_t> waiting;
  for (int64_t i = 0; i < 32; ++i) {
    waiting.push_back(store.fetch(arena, {{id, 2 * i * kPage, kPage, 2 * i * kPage},
                                          {id, (2 * i + 1) * kPage, kPage, (2 * i + 1) * kPage}}));
  }
  size_t num_done = 0;
  while (!waiting.empty()) {
    for (const Completion& done : store.wait_any(waiting, kLong)) {
      CHECK_EQUAL(done.message, "");
      std::erase(waiting, done.ticket);
      ++num_done;
    }
  }
  CHECK_EQUAL(num_done, 32u);
  CHECK_EQUAL(store.pending(), 0);
  CHECK(holds(arena, 0, file, 0, file.size()));
  CHECK(store.wait_any({}, kLong).empty());
}

void an_interrupted_or_partial_read_goes_on() {
  const TestFile file(5 * kPage + 17);
  for (const Fault fault : {Fault::interrupted, Fault::partial, Fault::delayed}) {
    for (const bool direct : {true, false}) {
      Store store(1, faulty(fault, 1, 2));
      const int id = store.open(file.path(), direct);
      Arena arena{size_t(8 * kPage)};
      const int64_t ticket =
          store.fetch(arena, {{id, 9, file.size() - 9, 0}}, {file.checksum(9, file.size() - 9)});
      CHECK_EQUAL(wait_one(store, ticket).message, "");
      CHECK(holds(arena, 0, file, 9, file.size() - 9));
    }
  }
}

void a_failed_read_fails_its_ticket_and_no_other() {
  const TestFile file(8 * kPage);
  Store store(1, faulty(Fault::io_error, 2));
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  std::vector<int64_t> tickets;
  for (int64_t i = 0; i < 4; ++i) tickets.push_back(store.fetch(arena, {{id, i * kPage, kPage, i * kPage}}));
  for (size_t i = 0; i < 4; ++i) {
    const Completion done = wait_one(store, tickets[i]);
    CHECK(done.error == (i == 1 ? ReadError::io : ReadError::none));
    if (i == 1)
      CHECK(done.message.find("reading bytes 4096 to 8192: Input/output error") != std::string::npos);
  }
}

void a_file_that_ends_too_early_is_an_error_and_not_a_loop() {
  const TestFile file(2 * kPage + 100);
  Store store(1, files());
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  const Completion past = wait_one(store, store.fetch(arena, {{id, kPage, kPage + 101, 0}}));
  CHECK(past.error == ReadError::short_file);
  CHECK(past.message.find("ends at byte 8292, but bytes 4096 to 8293 were requested") != std::string::npos);
  CHECK(wait_one(store, store.fetch(arena, {{id, 100 * kPage, 1, 0}})).error == ReadError::short_file);

  Store cut(1, faulty(Fault::truncated, 1, 1'000'000));
  const int cut_id = cut.open(file.path());
  CHECK(wait_one(cut, cut.fetch(arena, {{cut_id, 0, 10, 0}})).error == ReadError::short_file);
}

void a_flipped_bit_is_found_by_the_checksum() {
  const TestFile file(4 * kPage);
  Store store(1, faulty(Fault::flipped_bit, 1));
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  const std::vector<uint32_t> checksums = {file.checksum(0, kPage), file.checksum(kPage, kPage)};
  const std::vector<Piece> pieces = {{id, 0, kPage, 0}, {id, kPage, kPage, kPage}};
  const Completion flipped = wait_one(store, store.fetch(arena, pieces, checksums));
  CHECK(flipped.error == ReadError::checksum);
  CHECK(flipped.message.find("bytes 0 to 4096 have the checksum") != std::string::npos);
  CHECK(wait_one(store, store.fetch(arena, pieces, checksums)).error == ReadError::none);
}

void a_cancelled_ticket_is_forgotten_and_nothing_moves_after() {
  const TestFile file(8 * kPage);
  Store store(1, faulty(Fault::delayed, 1, 1'000'000, 0.03));
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  std::vector<int64_t> tickets;
  for (int64_t i = 0; i < 8; ++i) tickets.push_back(store.fetch(arena, {{id, i * kPage, kPage, i * kPage}}));
  while (store.pending() == 8) std::this_thread::sleep_for(milliseconds(1));  // the first has landed
  CHECK(store.cancel(tickets[7]));                                            // not begun
  CHECK(store.cancel(tickets[1]));  // a reader has begun it, or soon will
  const std::vector<uint8_t> before(arena.data() + kPage, arena.data() + 2 * kPage);
  CHECK(!store.cancel(tickets[7]));
  CHECK_THROWS(std::invalid_argument, store.wait_any({tickets[7]}, kLong));
  for (size_t i : {0u, 2u, 3u, 4u, 5u, 6u}) CHECK_EQUAL(wait_one(store, tickets[i]).message, "");
  CHECK(std::equal(before.begin(), before.end(), arena.data() + kPage));
  CHECK(std::all_of(arena.data() + 7 * kPage, arena.data() + 8 * kPage,
                    [](uint8_t byte) { return byte == 0; }));
  CHECK_EQUAL(store.pending(), 0);
}

void waiting_ends_when_its_time_is_over() {
  const TestFile file(kPage);
  const auto file_system = faulty(Fault::held, 1);
  Store store(1, file_system);
  const int id = store.open(file.path());
  Arena arena{size_t(kPage)};
  const int64_t ticket = store.fetch(arena, {{id, 0, kPage, 0}});
  CHECK(store.wait_any({ticket}, milliseconds(10)).empty());
  CHECK_EQUAL(store.pending(), 1);
  file_system->release();
  CHECK_EQUAL(wait_one(store, ticket).message, "");
}

void closing_fails_what_is_queued_and_joins() {
  const TestFile file(8 * kPage);
  Store store(1, faulty(Fault::delayed, 1, 1'000'000, 0.02));
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  std::vector<int64_t> tickets;
  for (int64_t i = 0; i < 8; ++i) tickets.push_back(store.fetch(arena, {{id, i * kPage, kPage, i * kPage}}));
  store.close();
  store.close();
  const auto done = store.wait_any(tickets, kLong);
  CHECK_EQUAL(done.size(), 8u);
  CHECK(done.back().error == ReadError::io);
  CHECK_EQUAL(store.pending(), 0);
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {{id, 0, kPage, 0}}));
  CHECK_THROWS(std::invalid_argument, store.open(file.path()));
}

void a_piece_that_cannot_be_meant_is_refused_at_once() {
  const TestFile file(4 * kPage);
  Store store(1, files());
  const int id = store.open(file.path());
  Arena arena{size_t(4 * kPage)};
  const Piece wrong[] = {
      {id + 1, 0, 1, 0},
      {-1, 0, 1, 0},
      {id, -1, 1, 0},
      {id, 0, 0, 0},
      {id, 0, -5, 0},
      {id, 0, 1, 1},
      {id, 0, 1, -kPage},
      {id, 0, 1, 4 * kPage},
      {id, 0, 4 * kPage + 1, 0},
      {id, kPage - 1, kPage * 4, 0},
      {id, INT64_MAX - 10, 100, 0},
      {id, 0, INT64_MAX, 0},
      {id, 0, 1, INT64_MAX / kPage * kPage},
  };
  for (const Piece& piece : wrong) CHECK_THROWS(std::invalid_argument, store.fetch(arena, {piece}));
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {{id, 0, 1, 0}}, {1, 2}));
  CHECK_EQUAL(store.pending(), 0);
  CHECK_THROWS(std::system_error, store.open("no such file"));
  CHECK_THROWS(std::system_error, store.open("."));
  CHECK_THROWS(std::invalid_argument, Store(0));
}

void a_closed_arena_lives_until_its_reads_are_done() {
  const TestFile file(kPage);
  Store store(1, faulty(Fault::delayed, 1, 1, 0.05));
  const int id = store.open(file.path());
  Arena arena{size_t(kPage)};
  const int64_t ticket = store.fetch(arena, {{id, 0, kPage, 0}}, {file.checksum(0, kPage)});
  arena.close();
  CHECK_EQUAL(wait_one(store, ticket).message, "");
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {{id, 0, kPage, 0}}));
}

// ── matrices of GGUF blocks ──

struct BlockMatrix {
  BlockType type;
  int64_t rows;
  int64_t cols;
  int64_t interleaved = 1;

  int64_t file_bytes() const { return interleaved * source_bytes(type, rows, cols); }
  int64_t bytes() const { return interleaved * matrix_bytes(slot_format(type), rows, cols); }
  Piece piece(int file_id, int64_t offset, int64_t dest) const {
    return {file_id, offset, file_bytes(), dest, Transcode{type, rows, cols, interleaved}};
  }
};

constexpr uint8_t kUntouched = 0xA5;

// Random bytes are valid blocks of some weights, so any file will do. A type with only quants or only scales
// leaves the rest of the panels unchanged.
std::vector<uint8_t> panels_of(const BlockMatrix& matrix, const uint8_t* blocks) {
  std::vector<uint8_t> panels(size_t(matrix.bytes()), kUntouched);
  CHECK(transcode(matrix.type, blocks, matrix.rows, matrix.cols, matrix.interleaved, 0,
                  num_strips(matrix.type, matrix.rows, matrix.cols), panels.data()));
  return panels;
}

bool holds_panels(Arena& arena, int64_t dest, const BlockMatrix& matrix, const TestFile& file,
                  int64_t offset) {
  const std::vector<uint8_t> panels = panels_of(matrix, file.at(offset));
  return std::equal(panels.begin(), panels.end(), arena.data() + dest);
}

void a_matrix_of_blocks_lands_as_panels_at_any_offset() {
  const TestFile file((int64_t{3} << 20) + 1000);
  for (const bool direct : {true, false}) {
    Store store(3, files());
    CHECK_EQUAL(store.staging_bytes(), 3 * Store::kStagingBytes);
    const int id = store.open(file.path(), direct);
    Arena arena{size_t{8} << 20};
    for (int type = 0; type < kNumBlockTypes; ++type) {
      if (may_be_refused(BlockType(type))) continue;
      for (const int64_t rows : {1, 15, 16, 17, 700, 1500}) {
        const BlockMatrix matrix{BlockType(type), rows, rows > 100 ? 1536 : 256, 1 + rows % 2};
        for (const int64_t offset :
             {int64_t{0}, int64_t{32}, kPage - 32, file.size() - matrix.file_bytes()}) {
          if (offset + matrix.file_bytes() > file.size()) continue;
          constexpr int64_t dest = 5 * 64;
          const int64_t end = dest + matrix.bytes();
          std::fill_n(arena.data(), size_t(end + 64), kUntouched);
          CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, offset, dest)})).message, "");
          CHECK(holds_panels(arena, dest, matrix, file, offset));
          const auto is_untouched = [](uint8_t byte) { return byte == kUntouched; };
          CHECK(std::all_of(arena.data(), arena.data() + dest, is_untouched));
          CHECK(std::all_of(arena.data() + end, arena.data() + end + 64, is_untouched));
        }
      }
    }
    CHECK(store.stats().transcode_seconds > 0);
  }
}

void a_large_matrix_of_blocks_is_shared_by_the_readers() {
  const BlockMatrix matrix{BlockType::q4_0, 3000, 2048};  // 3.3 MiB: seven parts
  const TestFile file(matrix.file_bytes() + 96);
  Store store(4, files());
  const int id = store.open(file.path());
  Arena arena{size_t(matrix.bytes())};
  CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, 96, 0)})).message, "");
  CHECK(holds_panels(arena, 0, matrix, file, 96));
  CHECK_EQUAL(store.stats().reads, 7);
  // Reads overlap at the borders of parts, by at most two blocks of the file per part.
  CHECK(store.stats().bytes_read <= matrix.file_bytes() + 7 * 2 * kPage);
}

// Quants and scales of one matrix, and of two with alternating rows, in parts that land in any order.
void quants_and_scales_land_in_the_same_panels() {
  const TestFile file(int64_t{5} << 20);
  for (const int64_t interleaved : {1, 2}) {
    const BlockMatrix quants{BlockType::mxfp4_quants, 1100, 2048, interleaved};  // several parts
    const BlockMatrix scales{BlockType::mxfp4_scales, 1100, 2048, interleaved};
    Store store(4, files());
    const int id = store.open(file.path());
    Arena arena{size_t(quants.bytes())};
    const int64_t scales_at = quants.file_bytes() + 17;
    CHECK_EQUAL(
        wait_one(store, store.fetch(arena, {scales.piece(id, scales_at, 0), quants.piece(id, 3, 0)})).message,
        "");
    std::vector<uint8_t> panels = panels_of(quants, file.at(3));
    CHECK(transcode(scales.type, file.at(scales_at), scales.rows, scales.cols, interleaved, 0, 69,
                    panels.data()));
    CHECK(std::equal(panels.begin(), panels.end(), arena.data()));
    CHECK(store.stats().reads > 3);
  }
}

// The strips of a part may be rows of the matrix, or columns: readers transcode both as they arrive.
void parts_of_grouped_formats_land_strip_by_strip() {
  const TestFile file(int64_t{3} << 20);
  const Format format = *grouped_format_named("uint4_128_f16");
  Store store(4, files());
  const int id = store.open(file.path());
  Arena arena{size_t{3} << 20};
  for (const GroupedPart part :
       {GroupedPart::codes, GroupedPart::gptq_codes, GroupedPart::awq_codes, GroupedPart::zeros,
        GroupedPart::channel_zeros, GroupedPart::gptq_v2_zeros, GroupedPart::awq_zeros}) {
    for (const int64_t rows : {8, 1128}) {
      const BlockMatrix matrix{grouped_type(format, part), rows, 2080};
      const int64_t reads = store.stats().reads;
      std::fill_n(arena.data(), size_t(matrix.bytes() + 64), kUntouched);
      CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, 35, 0)})).message, "");
      CHECK(holds_panels(arena, 0, matrix, file, 35));
      CHECK_EQUAL(arena.data()[matrix.bytes()], kUntouched);
      CHECK_EQUAL(store.stats().reads - reads > 1, matrix.file_bytes() > Store::kTranscodedPartBytes);
    }
  }
  const BlockMatrix words{grouped_type(format, GroupedPart::awq_codes), 12, 64};
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {words.piece(id, 0, 0)}));
  Piece twice = BlockMatrix{grouped_type(format, GroupedPart::codes), 8, 64, 2}.piece(id, 0, 0);
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {twice}));
}

void plain_and_transcoded_pieces_share_a_ticket() {
  const BlockMatrix gate{BlockType::q4_k, 40, 512}, down{BlockType::q6_k, 64, 256};
  const TestFile file(64 * kPage);
  Store store(2, files());
  const int id = store.open(file.path());
  Arena arena{size_t{1} << 20};
  const int64_t base = 16 * kPage, down_at = base + gate.bytes();
  const int64_t plain_at = (gate.bytes() + down.bytes() + kPage - 1) / kPage * kPage;
  const Record record{{gate.piece(id, 32, 0),
                       down.piece(id, 20 * kPage + 64, gate.bytes()),
                       {id, 40 * kPage + 5, 3000, plain_at}}};
  const auto tickets = store.fetch(arena, {PlacedRecord{record, base}});
  CHECK_EQUAL(tickets.size(), 1u);
  CHECK_EQUAL(wait_one(store, tickets[0]).message, "");
  CHECK(holds_panels(arena, base, gate, file, 32));
  CHECK(holds_panels(arena, down_at, down, file, 20 * kPage + 64));
  CHECK(holds(arena, base + plain_at, file, 40 * kPage + 5, 3000));
}

void an_interrupted_or_partial_read_of_blocks_goes_on() {
  const BlockMatrix matrix{BlockType::q4_1, 100, 640};
  const TestFile file(matrix.file_bytes() + 32);
  for (const Fault fault : {Fault::interrupted, Fault::partial, Fault::delayed}) {
    for (const bool direct : {true, false}) {
      Store store(1, faulty(fault, 1, 3));
      const int id = store.open(file.path(), direct);
      Arena arena{size_t(matrix.bytes())};
      CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, 32, 0)})).message, "");
      CHECK(holds_panels(arena, 0, matrix, file, 32));
    }
  }
}

void a_failed_read_of_blocks_fails_its_ticket_and_writes_nothing_of_that_part() {
  const BlockMatrix matrix{BlockType::q5_0, 64, 256};
  const TestFile file(2 * matrix.file_bytes());
  Store store(1, faulty(Fault::io_error, 1));
  const int id = store.open(file.path());
  Arena arena{size_t(matrix.bytes())};
  const Completion failed = wait_one(store, store.fetch(arena, {matrix.piece(id, 0, 0)}));
  CHECK(failed.error == ReadError::io);
  CHECK(failed.message.find("Input/output error") != std::string::npos);
  CHECK(std::all_of(arena.data(), arena.data() + arena.size(), [](uint8_t byte) { return byte == 0; }));
  CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, matrix.file_bytes(), 0)})).message, "");
  CHECK(holds_panels(arena, 0, matrix, file, matrix.file_bytes()));

  const Completion past = wait_one(store, store.fetch(arena, {matrix.piece(id, matrix.file_bytes() + 1, 0)}));
  CHECK(past.error == ReadError::short_file);
  Store cut(1, faulty(Fault::truncated, 1, 1'000'000));
  const int cut_id = cut.open(file.path());
  CHECK(wait_one(cut, cut.fetch(arena, {matrix.piece(cut_id, 0, 0)})).error == ReadError::short_file);
}

void blocks_that_are_cancelled_or_closed_on_move_nothing_after() {
  const BlockMatrix matrix{BlockType::q8_0, 2048, 1024};  // five parts
  const TestFile file(matrix.file_bytes());
  Store store(1, faulty(Fault::delayed, 1, 1'000'000, 0.03));
  const int id = store.open(file.path());
  Arena arena{size_t(2 * matrix.bytes())};
  const int64_t cancelled = store.fetch(arena, {matrix.piece(id, 0, 0)});
  std::this_thread::sleep_for(milliseconds(10));  // a reader has begun the first part
  CHECK(store.cancel(cancelled));
  const std::vector<uint8_t> before(arena.data(), arena.data() + matrix.bytes());
  const int64_t closed = store.fetch(arena, {matrix.piece(id, 0, matrix.bytes())});
  store.close();
  CHECK(std::equal(before.begin(), before.end(), arena.data()));
  CHECK(wait_one(store, closed).error == ReadError::io);
  CHECK_EQUAL(store.pending(), 0);
}

void blocks_that_cannot_be_meant_are_refused_at_once() {
  const TestFile file(16 * kPage);
  Store store(1, files());
  const int id = store.open(file.path());
  Arena arena{size_t(16 * kPage)};
  const BlockMatrix good{BlockType::q4_0, 16, 256};
  const int64_t nbytes = good.file_bytes();
  const auto piece = [&](int64_t bytes, int64_t dest, int64_t rows, int64_t cols) {
    return Piece{id, 0, bytes, dest, Transcode{BlockType::q4_0, rows, cols}};
  };
  const Piece wrong[] = {
      piece(nbytes - 1, 0, 16, 256),
      piece(nbytes, 0, 17, 256),
      piece(nbytes, 0, 0, 256),
      piece(nbytes, 0, -16, 256),
      piece(nbytes, 0, 16, 0),
      piece(nbytes, 0, 16, 250),
      piece(nbytes, 32, 16, 256),
      piece(nbytes, -64, 16, 256),
      piece(nbytes, 16 * kPage - good.bytes() + 64, 16, 256),
      piece(nbytes, 16 * kPage, 16, 256),
      piece(18, 0, INT64_MAX / 32, 64),
      piece(INT64_MAX / 4, 0, 16, INT64_MAX / 64 * 32),
      {id, 0, 210, 0, Transcode{BlockType::q6_k, 1, 32}},
      {id, 0, nbytes, 0, Transcode{BlockType::q4_0, 16, 256, 0}},
      {id, 0, nbytes, 0, Transcode{BlockType::q4_0, 16, 256, -1}},
      {id, 0, nbytes, 0, Transcode{BlockType::q4_0, 16, 256, 2}},
      {id, 0, nbytes, 0, Transcode{BlockType::q4_0, 16, 256, INT64_MAX / 16}},
      {id, 0, 1, 0, Transcode{BlockType::mxfp4_scales, 1, INT64_MAX / 32 * 32}},
  };
  for (const Piece& each : wrong) CHECK_THROWS(std::invalid_argument, store.fetch(arena, {each}));
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {piece(nbytes, 0, 16, 256)}, {1}));
  CHECK_EQUAL(wait_one(store, store.fetch(arena, {piece(nbytes, 0, 16, 256)})).message, "");

  const BlockMatrix wide{BlockType::q8_0, 16, 32 * 3900};  // a panel of 2.02 MiB
  Arena large{size_t(wide.bytes())};
  CHECK_THROWS(std::invalid_argument, store.fetch(large, {wide.piece(id, 0, 0)}));
  // One bad record keeps the good ones before it from starting.
  const Record sound{{piece(nbytes, 0, 16, 256)}}, unsound{{piece(nbytes, 0, 17, 256)}};
  CHECK_THROWS(std::invalid_argument, store.fetch(arena, {PlacedRecord{sound}, PlacedRecord{unsound}}));
  CHECK_EQUAL(store.pending(), 0);
}

// ── prefetches ──

// Pages of a file, each a record with its own place.
class Pages {
 public:
  Pages(int file_id, int64_t num_pages) {
    for (int64_t i = 0; i < num_pages; ++i) records_.push_back({{{file_id, i * kPage, kPage, 0}}});
  }
  std::vector<PlacedRecord> of(int64_t begin, int64_t end) const {
    std::vector<PlacedRecord> placed;
    for (int64_t i = begin; i < end; ++i) placed.push_back({records_[size_t(i)], i * kPage});
    return placed;
  }

 private:
  std::vector<Record> records_;
};

void what_is_needed_goes_before_what_will_be_and_that_before_a_guess() {
  const TestFile file(8 * kPage);
  Store store(1, faulty(Fault::delayed, 1, 1'000'000, 0.03));
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  const Pages pages(id, 8);
  const auto begun = store.fetch(arena, pages.of(0, 1));
  const auto guess = store.fetch(arena, pages.of(4, 5), Urgency::maybe);
  const auto soon = store.fetch(arena, pages.of(1, 3), Urgency::soon);
  const auto needed = store.fetch(arena, pages.of(3, 4));
  CHECK_EQUAL(store.pending(), 5);
  std::vector<int64_t> waiting = {guess[0], soon[0], soon[1], needed[0]}, landed;
  while (!waiting.empty()) {
    for (const Completion& done : store.wait_any(waiting, kLong)) {
      CHECK_EQUAL(done.message, "");
      landed.push_back(done.ticket);
      std::erase(waiting, done.ticket);
    }
  }
  CHECK(landed == (std::vector<int64_t>{needed[0], soon[0], soon[1], guess[0]}));
  CHECK_EQUAL(wait_one(store, begun[0]).message, "");
  CHECK(holds(arena, 0, file, 0, 5 * kPage));
}

void what_comes_to_be_needed_goes_before_what_was_read_ahead_with_it() {
  const TestFile file(8 * kPage);
  Store store(1, faulty(Fault::delayed, 1, 1'000'000, 0.03));
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  const Pages pages(id, 8);
  const auto begun = store.fetch(arena, pages.of(0, 1));
  const auto soon = store.fetch(arena, pages.of(1, 3), Urgency::soon);
  const auto guess = store.fetch(arena, pages.of(3, 4), Urgency::maybe);
  store.hurry({guess[0], soon[1], 99});
  const auto first = store.wait_any({soon[0], soon[1]}, kLong);
  CHECK_EQUAL(first.size(), 1u);
  CHECK_EQUAL(first[0].ticket, soon[1]);
  CHECK_EQUAL(wait_one(store, guess[0]).message, "");
  for (const int64_t ticket : {soon[0], begun[0]}) CHECK_EQUAL(wait_one(store, ticket).message, "");
}

void what_nobody_has_begun_is_dropped_without_waiting() {
  const TestFile file(8 * kPage);
  const auto file_system = faulty(Fault::delayed, 1, 1'000'000, 0.1);
  Store store(1, file_system);
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  const Pages pages(id, 8);
  const auto needed = store.fetch(arena, pages.of(0, 2));
  while (file_system->num_reads() == 0) std::this_thread::sleep_for(milliseconds(1));
  const auto ahead = store.fetch(arena, pages.of(2, 4), Urgency::soon);
  CHECK(store.drop({needed[0], needed[1], ahead[1], 99}) == (std::vector<int64_t>{needed[1], ahead[1]}));
  CHECK_EQUAL(store.pending(), 2);
  CHECK_THROWS(std::invalid_argument, store.wait_any({ahead[1]}, kLong));
  CHECK_EQUAL(wait_one(store, needed[0]).message, "");
  CHECK_EQUAL(wait_one(store, ahead[0]).message, "");
  CHECK(std::all_of(arena.data() + 3 * kPage, arena.data() + 4 * kPage,
                    [](uint8_t byte) { return byte == 0; }));
  // A finished ticket is not dropped: its end must be reported.
  const int64_t done = store.fetch(arena, {{id, 0, kPage, 0}});
  while (store.pending() > 0) std::this_thread::sleep_for(milliseconds(1));
  CHECK(store.drop({done}).empty());
  CHECK_EQUAL(wait_one(store, done).message, "");
  CHECK(store.fetch(arena, std::vector<PlacedRecord>{}).empty());
}

void what_is_dropped_half_way_ends_when_what_has_begun_has_landed() {
  constexpr int64_t num_parts = 4;
  const TestFile file(num_parts * Store::kPartBytes);
  const auto file_system = faulty(Fault::delayed, 1, 1'000'000, 0.05);
  Store store(1, file_system);
  const int id = store.open(file.path());
  Arena arena{size_t(file.size())};
  const int64_t ticket = store.fetch(arena, {{id, 0, file.size(), 0}}, {file.checksum(0, file.size())});
  while (file_system->num_reads() == 0) std::this_thread::sleep_for(milliseconds(1));
  CHECK(store.drop({ticket}).empty());
  CHECK_EQUAL(store.pending(), 1);
  CHECK(wait_one(store, ticket).error == ReadError::dropped);
  CHECK_EQUAL(store.pending(), 0);
  CHECK_EQUAL(file_system->num_reads(), 1);
}

void what_is_read_ahead_leaves_room_for_what_is_needed() {
  const TestFile file(32 * kPage);
  for (const auto& [urgency, most] : {std::pair(Urgency::soon, Store::kMaxBegun - 2),
                                      std::pair(Urgency::maybe, Store::kMostBegunBeforeGuess)}) {
    const auto file_system = faulty(Fault::delayed, 1, 1'000'000, 0.02);
    Store store(2, file_system);
    const int id = store.open(file.path());
    Arena arena{size_t(32 * kPage)};
    const Pages pages(id, 32);
    const auto ahead = store.fetch(arena, pages.of(0, 32), urgency);
    CHECK(file_system->num_reads() <= most);
    const auto dropped = store.drop(ahead);
    CHECK(int(dropped.size()) >= 32 - most - 1);
    for (const int64_t ticket : ahead) {
      const bool is_dropped = std::find(dropped.begin(), dropped.end(), ticket) != dropped.end();
      if (!is_dropped) CHECK_EQUAL(wait_one(store, ticket).message, "");
    }
    CHECK_EQUAL(store.pending(), 0);
  }
}

// More parts than may begin at once, and more than fit in staging memory, from several threads.
void everything_arrives_however_much_is_asked_for() {
  const BlockMatrix matrix{BlockType::q4_0, 2000, 2048};  // five parts
  constexpr int64_t num_plain = 100;
  const int64_t plain_bytes = 37 * kPage + 5;
  const TestFile file(matrix.file_bytes() + num_plain * plain_bytes);
  const auto read_all = [&](Store& store, int id) {
    Arena arena{size_t(8 * matrix.bytes() + num_plain * (plain_bytes + 2 * kPage))};
    std::vector<Record> records;
    for (int64_t i = 0; i < 8; ++i) records.push_back({{matrix.piece(id, 0, i * matrix.bytes())}});
    const int64_t plain = (8 * matrix.bytes() + kPage - 1) / kPage * kPage;
    const auto plain_at = [&](int64_t i) { return plain + i * 39 * kPage; };
    for (int64_t i = 0; i < num_plain; ++i) {
      const int64_t offset = matrix.file_bytes() + i * plain_bytes;
      records.push_back({{{id, offset, plain_bytes, plain_at(i)}}, {file.checksum(offset, plain_bytes)}});
    }
    const std::vector<PlacedRecord> placed(records.begin(), records.end());
    std::vector<int64_t> waiting = store.fetch(arena, placed);
    while (!waiting.empty()) {
      for (const Completion& done : store.wait_any(waiting, kLong)) {
        CHECK_EQUAL(done.message, "");
        std::erase(waiting, done.ticket);
      }
    }
    for (int64_t i = 0; i < 8; ++i) CHECK(holds_panels(arena, i * matrix.bytes(), matrix, file, 0));
    for (int64_t i = 0; i < num_plain; ++i)
      CHECK(holds(arena, plain_at(i), file, matrix.file_bytes() + i * plain_bytes, plain_bytes));
  };
  for (const int num_readers : {1, 4}) {
    Store store(num_readers, files());
    CHECK_EQUAL(store.staging_held_bytes(), 0);
    const int id = store.open(file.path());
    std::thread other([&] { read_all(store, id); });
    read_all(store, id);
    other.join();
    CHECK_EQUAL(store.pending(), 0);
    CHECK_EQUAL(store.staging_held_bytes(), num_readers * Store::kStagingBytes);
  }
}

// A kernel that accepts few reads at a time, or none.
class StingyFiles : public RealFileSystem {
 public:
  explicit StingyFiles(size_t most) : most_(most) {}

  std::unique_ptr<ReadQueue> read_queue(int depth) override {
    auto inner = RealFileSystem::read_queue(depth);
    return inner ? std::make_unique<Queue>(most_, std::move(inner)) : nullptr;
  }

 private:
  class Queue : public ReadQueue {
   public:
    Queue(size_t most, std::unique_ptr<ReadQueue> inner) : most_(most), inner_(std::move(inner)) {}
    size_t submit(std::span<const AsyncRead> reads) override {
      return inner_->submit(reads.first(std::min(most_, reads.size())));
    }
    size_t wait(std::span<AsyncResult> results) override { return inner_->wait(results); }

   private:
    size_t most_;
    std::unique_ptr<ReadQueue> inner_;
  };

  size_t most_;
};

void what_the_kernel_does_not_take_is_read_by_threads() {
  const BlockMatrix matrix{BlockType::q4_0, 3000, 2048};  // seven parts
  const TestFile file(matrix.file_bytes());
  for (const size_t most : {0u, 1u, 3u}) {
    Store store(3, std::make_shared<StingyFiles>(most));
    const int id = store.open(file.path());
    Arena arena{size_t(matrix.bytes())};
    CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, 0, 0)})).message, "");
    CHECK(holds_panels(arena, 0, matrix, file, 0));
    CHECK_EQUAL(store.stats().reads, 7);
  }
}

void a_store_ends_with_reads_in_flight() {
  const TestFile file(64 * kPage);
  for (int i = 0; i < 20; ++i) {
    Arena arena{size_t(64 * kPage)};
    Store store(2, files());
    const int id = store.open(file.path());
    CHECK_EQUAL(store.is_asynchronous(), has_queue);
    for (int64_t page = 0; page < 64; ++page) store.fetch(arena, {{id, page * kPage, kPage, page * kPage}});
  }
}

void an_arena_is_aligned_zero_and_untouched() {
  Arena arena(3 * Arena::kAlignment + 5);
  CHECK_EQUAL(reinterpret_cast<uintptr_t>(arena.data()) % Arena::kAlignment, 0u);
  CHECK_EQUAL(int(arena.data()[arena.size() - 1]), 0);
  CHECK_THROWS(OutOfMemory, Arena(SIZE_MAX));
  CHECK_THROWS(std::bad_alloc, Arena(size_t{1} << 60));
  CHECK(Arena(0).data() != nullptr);
}

void an_arena_is_populated_by_another_thread_and_keeps_what_is_in_it() {
  Arena arena(5 * Arena::kAlignment + 5);
  arena.data()[0] = 1;
  arena.data()[arena.size() - 1] = 2;
  std::thread thread(arena.populating());
  arena.data()[Arena::kAlignment] = 3;
  thread.join();
  CHECK_EQUAL(int(arena.data()[0]), 1);
  CHECK_EQUAL(int(arena.data()[Arena::kAlignment]), 3);
  CHECK_EQUAL(int(arena.data()[arena.size() - 1]), 2);
  const auto late = arena.populating();
  arena.close();
  late();  // holds the memory until it has ended
}

void an_arena_changes_its_size_while_another_thread_populates_it() {
  constexpr size_t kSize = size_t{64} << 20;
  Arena arena{kSize};
  std::fill_n(arena.data(), kSize, uint8_t{7});
  for (int i = 0; i < 8; ++i) {
    std::thread thread(arena.populating());
    arena.resize(kSize / 4 + size_t(i));  // not a whole page
    thread.join();
    CHECK_EQUAL(arena.size(), kSize / 4 + size_t(i));
    arena.resize(kSize);
    CHECK_EQUAL(int(arena.data()[kSize / 4 - 1]), 7);
    CHECK_EQUAL(int(arena.data()[kSize / 4 + kPage]), 0);
    CHECK_EQUAL(int(arena.data()[kSize - 1]), 0);
  }
  CHECK_THROWS(std::invalid_argument, arena.resize(kSize + 1));
  arena.close();
  CHECK_THROWS(std::invalid_argument, arena.resize(1));
}

void a_probe_reads_what_it_says() {
  const TestFile file(16 * kPage + 5);
  CHECK(drive_probe(file.path(), kPage, 40, 2, false) > 0);
  CHECK(drive_probe(file.path(), 3 * kPage, 5, 1, false) > 0);
  CHECK_THROWS(std::invalid_argument, drive_probe(file.path(), 32 * kPage, 1, 1, false));
  CHECK_THROWS(std::system_error, drive_probe("no such file", kPage, 1, 1, false));
}

// ── reads from the page cache ──

// Writes the file to the drive and evicts it from the page cache, then reads its first `nbytes` like any
// program, with whatever read-ahead the machine does.
void keep_in_page_cache(const TestFile& file, int64_t nbytes) {
  const int handle = ::open(file.path().c_str(), O_RDONLY);
  CHECK_EQUAL(fsync(handle), 0);
  posix_fadvise(handle, 0, 0, POSIX_FADV_DONTNEED);
  std::vector<uint8_t> buffer(size_t{1} << 17);
  for (int64_t at = 0; at < nbytes; at += int64_t(buffer.size())) {
    CHECK(::pread(handle, buffer.data(), std::min(buffer.size(), size_t(nbytes - at)), at) > 0);
  }
  ::close(handle);
}

// Returns how many bytes of the file the page cache holds.
int64_t in_page_cache(const TestFile& file) {
  const int handle = ::open(file.path().c_str(), O_RDONLY);
  void* memory = mmap(nullptr, size_t(file.size()), PROT_READ, MAP_SHARED, handle, 0);
  std::vector<uint8_t> pages(size_t((file.size() + kPage - 1) / kPage));
  CHECK_EQUAL(mincore(memory, size_t(file.size()), pages.data()), 0);
  munmap(memory, size_t(file.size()));
  ::close(handle);
  return kPage * std::count_if(pages.begin(), pages.end(), [](uint8_t page) { return page & 1; });
}

// Whether the page cache can be checked here: not with a kernel before 6.5, and not for a file without
// O_DIRECT.
bool has_page_cache_to_ask(const TestFile& file) {
  keep_in_page_cache(file, file.size());
  RealFileSystem file_system;
  const OpenFile opened = file_system.open(file.path(), true);
  file_system.close(opened);
  if (opened.cached_handle < 0) printf("skipped: the page cache cannot be checked here\n");
  return opened.cached_handle >= 0;
}

void what_the_page_cache_holds_comes_from_there_and_nothing_is_added() {
  constexpr int64_t stretch = FileSystem::kStretchBytes;
  const TestFile file(4 * stretch + 777);
  if (!has_page_cache_to_ask(file)) return;
  Arena arena{size_t(5 * stretch)};
  const uint32_t checksum = file.checksum(0, file.size());
  // Reads the file while `kept` bytes of it are in the page cache; returns how many bytes came from there.
  const auto cached_bytes = [&](int64_t kept) {
    for (int times_left = 9;; --times_left) {
      keep_in_page_cache(file, kept);
      int64_t held = -1;  // reads in progress do not count yet
      for (int64_t before = -2; before != held; before = std::exchange(held, in_page_cache(file)))
        std::this_thread::sleep_for(milliseconds(30));
      Store store(3, files());
      const int id = store.open(file.path());
      std::fill_n(arena.data(), arena.size(), uint8_t{0});
      CHECK_EQUAL(wait_one(store, store.fetch(arena, {{id, 0, file.size(), 0}}, {checksum})).message, "");
      CHECK(holds(arena, 0, file, 0, file.size()));
      // A busy drive ends read-ahead late, which adds to the cache; the store would add every time.
      if (in_page_cache(file) != held && times_left > 0) continue;
      CHECK_EQUAL(in_page_cache(file), held);
      const StoreStats stats = store.stats();
      CHECK_EQUAL(stats.reads, 65);  // one per part, each from a single source
      CHECK_EQUAL(stats.bytes_read, file.size());
      CHECK(stats.cached_bytes <= held);
      return stats.cached_bytes;
    }
  };
  // The kernel may lock pages for a moment, and then their parts come from the drive: look again.
  const auto most_cached = [&](int64_t kept, int64_t enough) {
    int64_t most = 0;
    for (int times = 0; times < 20 && most < enough; ++times) most = std::max(most, cached_bytes(kept));
    return most;
  };
  CHECK_EQUAL(cached_bytes(0), 0);
  CHECK_EQUAL(cached_bytes(stretch / 2), 0);  // as if only a header had been read
  CHECK(most_cached(2 * stretch + 3 * kPage, stretch / 2) >= stretch / 2);
  const int64_t whole = file.size() - 4 * Store::kPartBytes;
  CHECK(most_cached(file.size(), whole) >= whole);
}

void blocks_come_from_the_page_cache_too() {
  const BlockMatrix matrix{BlockType::q4_0, 3000, 2048};
  const TestFile file(matrix.file_bytes() + 96);
  if (!has_page_cache_to_ask(file)) return;
  for (const bool is_cached : {false, true}) {
    keep_in_page_cache(file, is_cached ? file.size() : 0);
    Store store(2, files());
    const int id = store.open(file.path());
    Arena arena{size_t(matrix.bytes())};
    CHECK_EQUAL(wait_one(store, store.fetch(arena, {matrix.piece(id, 96, 0)})).message, "");
    CHECK(holds_panels(arena, 0, matrix, file, 96));
    const StoreStats stats = store.stats();
    if (is_cached) CHECK(stats.cached_bytes >= stats.bytes_read - 2 * Store::kTranscodedPartBytes);
    if (!is_cached) CHECK_EQUAL(stats.cached_bytes, 0);
  }
}

void what_the_page_cache_loses_is_read_from_the_drive() {
  const TestFile file(40 * kPage + 17);
  if (!has_page_cache_to_ask(file)) return;
  for (const Fault fault : {Fault::uncached, Fault::partial_cached, Fault::no_cache}) {
    keep_in_page_cache(file, file.size());
    const auto file_system = faulty(fault, 2, 1);
    Store store(1, file_system);
    const int id = store.open(file.path());
    Arena arena{size_t(64 * kPage)};
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = 10 * kPage * i, nbytes = i < 3 ? 10 * kPage : 10 * kPage + 17;
      const auto ticket = store.fetch(arena, {{id, at, nbytes, at}}, {file.checksum(at, nbytes)});
      CHECK_EQUAL(wait_one(store, ticket).message, "");
    }
    CHECK(holds(arena, 0, file, 0, file.size()));
    // The second of four reads met the fault. It alone came from the drive, or half of it, or it and
    // everything after it.
    const int64_t lost = fault == Fault::uncached         ? 10 * kPage
                         : fault == Fault::partial_cached ? 5 * kPage
                                                          : 0;
    CHECK_EQUAL(store.stats().cached_bytes, fault == Fault::no_cache ? 10 * kPage : file.size() - lost);
    CHECK_EQUAL(store.stats().reads, fault == Fault::partial_cached ? 5 : 4);
    CHECK_EQUAL(file_system->num_reads(), fault == Fault::no_cache ? 2 : 4);
  }
}

void a_page_cache_without_the_file_is_asked_rarely() {
  const TestFile file(kPage);
  if (!has_page_cache_to_ask(file)) return;
  const auto file_system = faulty(Fault::uncached, 1, 1'000'000);
  Store store(1, file_system);
  const int id = store.open(file.path());
  Arena arena{size_t(kPage)};
  for (int i = 0; i < 200; ++i)
    CHECK_EQUAL(wait_one(store, store.fetch(arena, {{id, 0, kPage, 0}})).message, "");
  // Eight misses in a row, and then one part in 64.
  CHECK(file_system->num_reads() >= 8 + 2 && file_system->num_reads() <= 8 + 4);
  CHECK_EQUAL(store.stats().cached_bytes, 0);
}

void a_slow_drive_is_imitated_whatever_begins_at_once_and_closing_does_not_wait_for_it() {
  const TestFile file(4 * Store::kPartBytes);
  const auto started = std::chrono::steady_clock::now();
  Store store(2, files(), 100 * Store::kPartBytes);
  const int id = store.open(file.path());
  Arena arena{size_t(file.size())};
  std::vector<int64_t> tickets;
  for (int64_t at = 0; at < file.size(); at += Store::kPartBytes) {
    tickets.push_back(store.fetch(arena, {{id, at, Store::kPartBytes, at}}));
  }
  for (size_t i = 0; i < tickets.size(); ++i) {
    CHECK_EQUAL(wait_one(store, tickets[i]).message, "");
    CHECK(std::chrono::steady_clock::now() - started >= milliseconds(10 * int(i + 1)));
  }
  CHECK(holds(arena, 0, file, 0, file.size()));
  Store slowest(1, files(), 1);
  const int64_t ticket = slowest.fetch(arena, {{slowest.open(file.path()), 0, kPage, 0}});
  CHECK(slowest.wait_any({ticket}, milliseconds(20)).empty());
  slowest.close();
  CHECK_EQUAL(wait_one(slowest, ticket).ticket, ticket);
}

void few_parts_are_in_progress_in_the_background() {
  const TestFile file(40 * kPage);
  Store store(8, faulty(Fault::delayed, 1, 1'000'000, 0.5), 0, std::make_shared<Foreground>(0.5));
  const int id = store.open(file.path());
  Arena arena{size_t(40 * kPage)};
  const Record record{{{id, 0, kPage, 0}}};
  std::vector<PlacedRecord> records;
  for (int64_t i = 0; i < 40; ++i) records.push_back({record, i * kPage});
  const std::vector<int64_t> tickets = store.fetch(arena, records);
  // Reads that have begun cannot be dropped, and none of them ends so soon.
  CHECK_EQUAL(tickets.size() - store.drop(tickets).size(), size_t(Store::kMostBegunInBackground));
}

// The share is so small that each pause lasts as long as a pause may.
void readers_in_the_background_pause_while_there_is_a_foreground() {
  const TestFile file(64 * kPage);
  const auto foreground = std::make_shared<Foreground>(1e-12);
  Store store(2, files(), 0, foreground);
  const int id = store.open(file.path());
  Arena arena{size_t(64 * kPage)};
  const auto fetch = [&] {
    std::vector<int64_t> tickets;
    for (int64_t i = 0; i < 64; ++i) {
      tickets.push_back(store.fetch(arena, {{id, i * kPage, kPage, i * kPage}}));
    }
    return tickets;
  };
  const auto wait = [&](const std::vector<int64_t>& tickets) {
    for (const int64_t ticket : tickets) CHECK_EQUAL(wait_one(store, ticket).message, "");
    CHECK(holds(arena, 0, file, 0, 64 * kPage));
    std::fill_n(arena.data(), arena.size(), uint8_t{0});
  };
  wait(fetch());  // nothing is in the foreground
  foreground->begin();
  const std::vector<int64_t> tickets = fetch();
  while (store.pending() == 64) std::this_thread::sleep_for(milliseconds(1));
  std::this_thread::sleep_for(milliseconds(20));
  // One part each, and one more where the clock of processor time stood still, as it does in virtual
  // machines.
  CHECK(store.pending() > 32);
  foreground->end();
  wait(tickets);
  store.leave_background();
  foreground->begin();
  wait(fetch());  // a reader that was about to pause may still do so, once
  foreground->end();
}

void what_gives_way_waits_for_its_share_at_most() {
  Foreground foreground(0.5);
  foreground.give_way(1e9);  // nothing is in the foreground
  foreground.begin();
  const auto start = std::chrono::steady_clock::now();
  foreground.give_way(0.02);
  CHECK(std::chrono::steady_clock::now() - start >= milliseconds(20));
  foreground.give_way(0);
  foreground.give_way(-1);
  foreground.give_way(std::numeric_limits<double>::quiet_NaN());
  std::thread ending([&] { foreground.end(); });
  foreground.give_way(1e9);
  ending.join();
  Foreground all(1);
  all.begin();
  all.give_way(1e9);
}

}  // namespace

int main() {
  for (const bool kernel_reads : {true, false}) {
    has_queue = kernel_reads;
    pieces_arrive_at_any_offset_direct_and_buffered();
    a_large_piece_is_shared_by_the_readers();
    many_tickets_end_each_for_itself();
    an_interrupted_or_partial_read_goes_on();
    a_failed_read_fails_its_ticket_and_no_other();
    a_file_that_ends_too_early_is_an_error_and_not_a_loop();
    a_flipped_bit_is_found_by_the_checksum();
    waiting_ends_when_its_time_is_over();
    a_closed_arena_lives_until_its_reads_are_done();
    a_matrix_of_blocks_lands_as_panels_at_any_offset();
    a_large_matrix_of_blocks_is_shared_by_the_readers();
    quants_and_scales_land_in_the_same_panels();
    parts_of_grouped_formats_land_strip_by_strip();
    plain_and_transcoded_pieces_share_a_ticket();
    an_interrupted_or_partial_read_of_blocks_goes_on();
    a_failed_read_of_blocks_fails_its_ticket_and_writes_nothing_of_that_part();
    blocks_that_are_cancelled_or_closed_on_move_nothing_after();
    what_the_page_cache_holds_comes_from_there_and_nothing_is_added();
    blocks_come_from_the_page_cache_too();
    what_the_page_cache_loses_is_read_from_the_drive();
    a_page_cache_without_the_file_is_asked_rarely();
    what_is_read_ahead_leaves_room_for_what_is_needed();
    everything_arrives_however_much_is_asked_for();
    a_store_ends_with_reads_in_flight();
    a_slow_drive_is_imitated_whatever_begins_at_once_and_closing_does_not_wait_for_it();
    few_parts_are_in_progress_in_the_background();
    readers_in_the_background_pause_while_there_is_a_foreground();
  }
  // One reader takes one part after another, so it is known which parts have begun.
  a_cancelled_ticket_is_forgotten_and_nothing_moves_after();
  closing_fails_what_is_queued_and_joins();
  what_is_needed_goes_before_what_will_be_and_that_before_a_guess();
  what_comes_to_be_needed_goes_before_what_was_read_ahead_with_it();
  what_nobody_has_begun_is_dropped_without_waiting();
  what_is_dropped_half_way_ends_when_what_has_begun_has_landed();

  what_gives_way_waits_for_its_share_at_most();
  what_the_kernel_does_not_take_is_read_by_threads();
  a_piece_that_cannot_be_meant_is_refused_at_once();
  blocks_that_cannot_be_meant_are_refused_at_once();
  an_arena_is_aligned_zero_and_untouched();
  an_arena_is_populated_by_another_thread_and_keeps_what_is_in_it();
  an_arena_changes_its_size_while_another_thread_populates_it();
  a_probe_reads_what_it_says();
  return testing::check_result();
}
