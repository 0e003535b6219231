// test_store.cpp: bytes arrive where they belong, whatever the kernel does to a read.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "store/drive_probe.h"
#include "store/store.h"

using namespace argosy;
using std::chrono::milliseconds;

namespace {

constexpr milliseconds kLong{20'000};
constexpr int64_t kPage = 4096;

// A file of random bytes that goes away with the test.
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

std::shared_ptr<FaultyFileSystem> faulty(Fault fault, int64_t first_read, int64_t num_faults = 1,
                                         double delay_seconds = 0.05) {
  return std::make_shared<FaultyFileSystem>(std::make_shared<RealFileSystem>(), fault, first_read, num_faults,
                                            delay_seconds);
}

void pieces_arrive_at_any_offset_direct_and_buffered() {
  const TestFile file(3 * kPage + 777);
  for (const bool direct : {true, false}) {
    Store store(2);
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
  Store store(4);
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
  Store store(3);
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
  Store store(1);
  const int id = store.open(file.path());
  Arena arena{size_t(8 * kPage)};
  const Completion past = wait_one(store, store.fetch(arena, {{id, kPage, kPage + 101, 0}}));
  CHECK(past.error == ReadError::short_file);
  CHECK(past.message.find("ends at byte 8292, and bytes 4096 to 8293 were asked for") != std::string::npos);
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
  while (store.pending() == 8) std::this_thread::sleep_for(milliseconds(1));  // the first is in
  CHECK(store.cancel(tickets[7]));                                            // not begun
  CHECK(store.cancel(tickets[1]));                                            // in a reader's hands, or soon
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
  Store store(1, faulty(Fault::delayed, 1, 1, 0.2));
  const int id = store.open(file.path());
  Arena arena{size_t(kPage)};
  const int64_t ticket = store.fetch(arena, {{id, 0, kPage, 0}});
  CHECK(store.wait_any({ticket}, milliseconds(10)).empty());
  CHECK_EQUAL(store.pending(), 1);
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
  Store store(1);
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

void an_arena_is_aligned_zero_and_untouched() {
  Arena arena(3 * Arena::kAlignment + 5);
  CHECK_EQUAL(reinterpret_cast<uintptr_t>(arena.data()) % Arena::kAlignment, 0u);
  CHECK_EQUAL(int(arena.data()[arena.size() - 1]), 0);
  CHECK_THROWS(OutOfMemory, Arena(SIZE_MAX));
  CHECK_THROWS(std::bad_alloc, Arena(size_t{1} << 60));
  CHECK(Arena(0).data() != nullptr);
}

void a_probe_reads_what_it_says() {
  const TestFile file(16 * kPage + 5);
  CHECK(drive_probe(file.path(), kPage, 40, 2, false) > 0);
  CHECK(drive_probe(file.path(), 3 * kPage, 5, 1, false) > 0);
  CHECK_THROWS(std::invalid_argument, drive_probe(file.path(), 32 * kPage, 1, 1, false));
  CHECK_THROWS(std::system_error, drive_probe("no such file", kPage, 1, 1, false));
}

}  // namespace

int main() {
  pieces_arrive_at_any_offset_direct_and_buffered();
  a_large_piece_is_shared_by_the_readers();
  many_tickets_end_each_for_itself();
  an_interrupted_or_partial_read_goes_on();
  a_failed_read_fails_its_ticket_and_no_other();
  a_file_that_ends_too_early_is_an_error_and_not_a_loop();
  a_flipped_bit_is_found_by_the_checksum();
  a_cancelled_ticket_is_forgotten_and_nothing_moves_after();
  waiting_ends_when_its_time_is_over();
  closing_fails_what_is_queued_and_joins();
  a_piece_that_cannot_be_meant_is_refused_at_once();
  a_closed_arena_lives_until_its_reads_are_done();
  an_arena_is_aligned_zero_and_untouched();
  a_probe_reads_what_it_says();
  return testing::check_result();
}
