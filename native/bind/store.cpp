// bind/store.cpp: binds Arena, Store and their file systems: check, unlock the GIL, call.
#include "store/store.h"

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "bind/bind.h"
#include "bind/reads.h"
#include "store/arena.h"
#include "store/crc32c.h"
#include "store/drive_probe.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace argosy {
namespace {

using namespace nb::literals;

using Done = std::tuple<int64_t, std::optional<std::string>, std::optional<std::string>>;

constexpr int64_t kMostPieces = int64_t{1} << 20, kMostPieceBytes = int64_t{1} << 50;  // no product overflows
constexpr int64_t kMostBytesPerSecond = int64_t{1} << 50;

constexpr int64_t kMostWaitMs = 86'400'000;  // a day

// Calls `body` and turns a failed system call into an OSError with `path`.
template <class Body>
auto with_os_errors(const std::string& path, Body&& body) {
  try {
    return body();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw nb::python_error();
  }
}

using Path = Named<std::filesystem::path, "str">;  // it need not be UTF-8

View<uint8_t> arena_view(Arena& arena) {
  using Holder = std::shared_ptr<const void>;
  uint8_t* data = arena.data();
  nb::capsule owner(new Holder(arena.hold()),
                    [](void* holder) noexcept { delete static_cast<Holder*>(holder); });
  return View<uint8_t>(data, {arena.size()}, owner);
}

// (file_id, offset, nbytes, dest_offset), optionally followed by (block_type, rows, cols) or (block_type,
// rows, cols, interleaved).
Piece parse_piece(nb::handle given) {
  const nb::tuple fields = nb::cast<nb::tuple>(given);
  if (fields.size() != 4 && fields.size() != 7 && fields.size() != 8) {
    throw std::invalid_argument("a piece has 4 fields, or 7 or 8 if it is transcoded; found " +
                                std::to_string(fields.size()));
  }
  Piece piece{nb::cast<int>(fields[0]), nb::cast<int64_t>(fields[1]), nb::cast<int64_t>(fields[2]),
              nb::cast<int64_t>(fields[3])};
  if (fields.size() > 4) {
    const auto name = nb::cast<std::string>(fields[4]);
    const std::optional<BlockType> type = block_type_named(name);
    if (!type) throw std::invalid_argument("unknown block type '" + name + "'");
    piece.transcode = Transcode{*type, nb::cast<int64_t>(fields[5]), nb::cast<int64_t>(fields[6]),
                                fields.size() > 7 ? nb::cast<int64_t>(fields[7]) : 1};
  }
  return piece;
}

using Pieces = nb::typed<nb::sequence, TypeName<"Piece">>;

Record parse_record(const Pieces& pieces, const std::optional<std::vector<uint32_t>>& checksums) {
  Record record;
  record.pieces.reserve(nb::len(pieces));
  for (nb::handle piece : pieces) record.pieces.push_back(parse_piece(piece));
  if (checksums && checksums->size() != record.pieces.size()) {
    throw std::invalid_argument("found " + std::to_string(record.pieces.size()) + " pieces and " +
                                std::to_string(checksums->size()) +
                                " checksums, expected one checksum per piece");
  }
  if (checksums) record.checksums = *checksums;
  return record;
}

std::vector<int64_t> fetch_many(Store& store, Arena& arena,
                                const std::vector<std::pair<const Record*, int64_t>>& records,
                                const UrgencyName& urgency) {
  std::vector<PlacedRecord> placed;
  placed.reserve(records.size());
  for (const auto& [record, base_offset] : records) {
    placed.push_back({require_item(item_name("records", placed.size()) + "[0]", record), base_offset});
  }
  const Urgency parsed = parse_urgency(urgency);
  nb::gil_scoped_release released;  // the caller's list keeps the records alive
  return store.fetch(arena, placed, parsed);
}

std::vector<Done> wait_any(Store& store, const std::vector<int64_t>& tickets,
                           std::optional<int64_t> most_ms) {
  using std::chrono::milliseconds;
  if (most_ms) require_range("most_ms", *most_ms, 0, kMostWaitMs);
  std::vector<Completion> done;
  if (most_ms == 0) {
    done = store.wait_any(tickets, milliseconds(0));  // too short to let other threads run meanwhile
  } else {
    for (milliseconds left(most_ms.value_or(0)); done.empty() && !tickets.empty();) {
      const milliseconds now = most_ms ? std::min(left, kSignalInterval) : kSignalInterval;
      {
        nb::gil_scoped_release released;
        done = store.wait_any(tickets, now);
      }
      if (done.empty() && PyErr_CheckSignals() != 0) throw nb::python_error();
      left -= now;
      if (most_ms && left.count() == 0) break;
    }
  }
  std::vector<Done> result;
  for (Completion& completion : done) {
    const bool failed = completion.error != ReadError::none;
    result.emplace_back(completion.ticket,
                        failed ? std::optional(std::move(completion.message)) : std::nullopt,
                        error_kind(completion.error));
  }
  return result;
}

uint32_t checksum_of(nb::typed<nb::handle, TypeName<"_Buffer">> buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
  uint32_t checksum;
  {
    nb::gil_scoped_release released;  // the view keeps the bytes in place
    checksum = crc32c_wide(static_cast<const uint8_t*>(view.buf), size_t(view.len));
  }
  PyBuffer_Release(&view);
  return checksum;
}

}  // namespace

void bind_store(nb::module_& m) {
  nb::class_<Foreground>(m, "Foreground", R"(
    Counts work that somebody waits for: `with foreground:` surrounds it. Others give way to it meanwhile: each of their
    threads works for `share` of the time, above 0 and at most 1.)")
      .def(nb::init<double>(), "share"_a)
      .def("__enter__", &Foreground::begin)
      .def(
          "__exit__", [](Foreground& foreground, nb::handle, nb::handle, nb::handle) { foreground.end(); },
          "kind"_a.none(), "error"_a.none(), "trace"_a.none())
      .def(
          "give_way",
          [](Foreground& foreground, double worked_seconds) {
            nb::gil_scoped_release released;
            foreground.give_way(worked_seconds);
          },
          "worked_seconds"_a, R"(
        Call it after so many seconds of work in the background: waits until there is no work in the foreground, or
        until the work took no more than its share of the time.)");

  nb::class_<Arena>(m, "Arena", R"(
    One private block of memory, aligned to 2 MiB and on huge pages; a page takes memory when it is first written.

    Raises:
        MemoryError: the system refuses to reserve it.)")
      .def(nb::init<size_t>(), "nbytes"_a)
      .def_prop_ro("nbytes", &Arena::size)
      .def("array", &arena_view, "A view of all bytes. It keeps the memory alive, even after close().")
      .def(
          "populate",
          [](const Arena& arena, std::shared_ptr<Foreground> foreground) {
            // Must run before another thread can close the arena.
            const auto populate = arena.populating(std::move(foreground));
            nb::gil_scoped_release released;
            populate();
          },
          "foreground"_a = nb::none(), R"(
        Commit all pages, in a background thread that gives way to `foreground`; ends early if another thread closes
        the arena or makes it smaller.)")
      .def("resize", &Arena::resize, nb::call_guard<nb::gil_scoped_release>(), "nbytes"_a, R"(
        Use only the first `nbytes` from now on, at most what the arena was made with. The system gets the pages beyond
        at once; they are zero if the arena grows again. Nothing may be using them.)")
      .def("close", &Arena::close, R"(
        Release the memory; the system gets it back when the last view, matrix or read that uses it ends.)");

  nb::class_<FileSystem>(m, "FileSystem", "The file system that a store reads from.");

  nb::class_<Record>(m, "Record", R"(
    Pieces that are read together, with the crc32c_wide of each or none; parsed once, fetched any number of times.)")
      .def(
          "__init__",
          [](Record* self, const Pieces& pieces, const std::optional<std::vector<uint32_t>>& checksums) {
            new (self) Record(parse_record(pieces, checksums));
          },
          "pieces"_a, "checksums"_a = nb::none())
      .def_prop_ro(
          "pieces",
          [](const Record& record) {
            std::vector<std::tuple<int, int64_t, int64_t, int64_t>> found;
            for (const Piece& piece : record.pieces) {
              found.emplace_back(piece.file_id, piece.offset, piece.nbytes, piece.dest_offset);
            }
            return found;
          },
          "The source and destination of each piece, without its transcoding.");

  m.def(
      "record_bytes",
      [](int64_t num_pieces, bool has_checksums) {
        require_range("num_pieces", num_pieces, 0, kMostPieces);
        return Record::bytes(num_pieces, has_checksums);
      },
      "num_pieces"_a, "has_checksums"_a, "Heap bytes of a `Record` in addition to its Python object.");
  m.def(
      "request_bytes",
      [](const std::vector<int64_t>& piece_bytes) {
        require_range("number of pieces", int64_t(piece_bytes.size()), 0, kMostPieces);
        for (size_t i = 0; i < piece_bytes.size(); ++i)
          require_range(item_name("piece_bytes", i), piece_bytes[i], 0, kMostPieceBytes);
        return Store::request_bytes(piece_bytes);
      },
      "piece_bytes"_a, R"(
    Most heap bytes that a ticket takes until it is done, for a record with pieces of `piece_bytes`.)");

  nb::class_<Store>(m, "Store", R"(
    Threads, at most 1024, that read pieces of files into arenas.

    Args:
        bytes_per_s: imitate a drive that is no faster; None: do not.
        foreground: read few pieces at once and give way to this work, until `leave_background`; None: do not.

    Raises:
        RuntimeError: the system refuses to start a thread.)")
      .def(
          "__init__",
          [](Store* self, int num_readers, std::shared_ptr<FileSystem> file_system,
             std::optional<int64_t> bytes_per_s, std::shared_ptr<Foreground> foreground) {
            if (!file_system) file_system = std::make_shared<RealFileSystem>();
            if (bytes_per_s) require_range("bytes_per_s", *bytes_per_s, 1, kMostBytesPerSecond);
            new (self)
                Store(num_readers, std::move(file_system), bytes_per_s.value_or(0), std::move(foreground));
          },
          "num_readers"_a, "file_system"_a = nb::none(), "bytes_per_s"_a = nb::none(),
          "foreground"_a = nb::none())
      .def(
          "open",
          [](Store& store, const Path& path, bool direct) {
            return with_os_errors(path.string(), [&] { return store.open(path.string(), direct); });
          },
          "path"_a, "direct"_a = true, R"(
        Open a file and return its id. Uses O_DIRECT if the file system accepts it; otherwise reads are buffered, and
        the page cache is dropped after them.

        Even with O_DIRECT, bytes in the page cache are read from there; nothing is added to it.

        Raises:
            OSError: the file cannot be opened, or is not a regular file.)")
      .def(
          "info",
          [](const Store& store, int file_id) {
            const FileInfo info = store.info(file_id);
            const auto path = nb::steal<nb::str>(PyUnicode_DecodeFSDefault(info.path.c_str()));
            return std::tuple(path, info.size, info.alignment, info.is_direct, info.why_not_direct);
          },
          "file_id"_a, "path, size, alignment, is_direct, why_not_direct. The alignment is at least 4096.")
      .def(
          "fetch",
          [](Store& store, Arena& arena, const Pieces& pieces,
             const std::optional<std::vector<uint32_t>>& checksums) {
            const Record record = parse_record(pieces, checksums);
            return store.fetch(arena, {PlacedRecord{record}})[0];
          },
          "arena"_a, "pieces"_a, "checksums"_a = nb::none(), R"(
        Start reading pieces (file_id, offset, nbytes, dest_offset); return a ticket.

        A plain piece is rounded outwards to the alignment: its bytes begin at dest_offset + offset % alignment, and
        dest_offset is a multiple of the alignment. A checksum is the crc32c_wide of exactly the piece.

        A piece (..., block_type, rows, cols) is a matrix of GGUF blocks ("Q4_0"): a reader transcodes it to the
        corresponding slot format, beginning exactly at dest_offset, a multiple of 64. It has no checksum.)")
      .def("fetch_many", &fetch_many, "arena"_a, "records"_a, "urgency"_a = "now", R"(
        The same for several (record, base) at once, with a ticket for each; `base` is added to each dest_offset.

        now: a caller is waiting. soon: read after those. maybe: a guess, read only while the drive has little to do.)")
      .def("hurry", &Store::hurry, "tickets"_a, "Make these urgent: a caller is now waiting for them.")
      .def("wait_any", &wait_any, "tickets"_a, "most_ms"_a = nb::none(), R"(
        Wait until a ticket is done, for at most `most_ms`; return every finished one as (ticket, error message,
        kind of error).

        Kinds: "io", "checksum", "short", "not finite" (a code or scale that is not a number), "dropped".

        Returned tickets are forgotten. After a ticket is done, even if it failed, nothing more is written for it. ^C
        ends the wait and does not change the tickets.)")
      .def("drop", &Store::drop, "tickets"_a, R"(
        Stop reading these; forget those with no read begun, and return them. Never waits.

        The others end, as "dropped" unless all their reads had begun, and must be waited for.)")
      .def("cancel", &Store::cancel, "ticket"_a, nb::call_guard<nb::gil_scoped_release>(), R"(
        Drop reads of a ticket that have not begun, wait for the others, and forget it. False: unknown ticket.)")
      .def("pending", &Store::pending, "The number of tickets that are not done.")
      .def_prop_ro("staging_bytes", &Store::staging_bytes,
                   "Most bytes that readers may hold for transcoding, STAGING_BYTES each.")
      .def_prop_ro("staging_held_bytes", &Store::staging_held_bytes,
                   "Bytes that readers hold for transcoding now.")
      .def_prop_ro("is_asynchronous", &Store::is_asynchronous,
                   "Whether the kernel reads asynchronously; otherwise the readers call pread.")
      .def(
          "stats",
          [](const Store& store) -> nb::typed<nb::dict, nb::str, nb::float_> {
            const StoreStats stats = store.stats();
            nb::dict result;
            result["bytes_read"] = stats.bytes_read;
            result["reads"] = stats.reads;
            result["cached_bytes"] = stats.cached_bytes;
            result["read_seconds"] = stats.read_seconds;
            result["checksum_seconds"] = stats.checksum_seconds;
            result["transcode_seconds"] = stats.transcode_seconds;
            result["busy_seconds"] = stats.busy_seconds;
            return result;
          },
          R"(
        bytes_read, with cached_bytes of them from the page cache; reads; busy_seconds of wall time.

        read_seconds are summed over reads, from begin to end; checksum_ and transcode_seconds are summed over readers.)")
      .def("leave_background", &Store::leave_background, nb::call_guard<nb::gil_scoped_release>(), R"(
        Read as much at once as the drive takes, and give way to nothing.)")
      .def("close", &Store::close, nb::call_guard<nb::gil_scoped_release>(),
           "Join the readers and close the files. Unfinished reads fail.");

  m.def(
      "trim_heap",
      [] {
#ifdef __GLIBC__
        malloc_trim(0);
#endif
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Return freed heap memory to the system, if the C library can.");
  m.attr("STAGING_BYTES") = Store::kStagingBytes;
  m.def("crc32c_wide", &checksum_of, "buffer"_a, R"(
    The checksum of a record: CRC32C over the CRC32Cs of its four quarters (native/store/crc32c.h).)");
  m.def(
      "drive_probe",
      [](const Path& path, int64_t record_bytes, int64_t num_records, int num_readers, bool direct) {
        return with_os_errors(path.string(), [&] {
          nb::gil_scoped_release released;
          return drive_probe(path.string(), record_bytes, num_records, num_readers, direct);
        });
      },
      "path"_a, "record_bytes"_a, "num_records"_a, "num_readers"_a, "direct"_a, R"(
    Bytes per second of reading records in shuffled order into huge-page buffers.

    Raises:
        OSError: `path` cannot be opened or read.   RuntimeError: `direct` is refused.
        ValueError: the file has less than one record.)");
}

}  // namespace argosy
